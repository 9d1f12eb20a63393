// The float vector a kernel is written in, one definition for each CPU capability.
//
// A kernel file is compiled once per capability, with REPRDPO_CAPABILITY (portable, avx2 or avx512) naming
// the namespace. Nothing here comes from the standard library or torch: an inline function compiled for
// AVX-512 could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(REPRDPO_CAPABILITY_AVX2) || defined(REPRDPO_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace reprdpo {

// Storage only; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace REPRDPO_CAPABILITY {

#if defined(REPRDPO_CAPABILITY_AVX512)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 value;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float everywhere) { return {_mm512_set1_ps(everywhere)}; }
  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec load(const BFloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vec load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
  Vec operator+(Vec other) const { return {_mm512_add_ps(value, other.value)}; }
  float sum() const { return _mm512_reduce_add_ps(value); }
  void store(float* into) const { _mm512_storeu_ps(into, value); }
  void store(BFloat16* into) const {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(into), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  void store(Half* into) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(into), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
};

#elif defined(REPRDPO_CAPABILITY_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 value;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float everywhere) { return {_mm256_set1_ps(everywhere)}; }
  static Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Vec load(const BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const Half* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
  Vec operator+(Vec other) const { return {_mm256_add_ps(value, other.value)}; }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  void store(float* into) const { _mm256_storeu_ps(into, value); }
  void store(BFloat16* into) const {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
    const __m256i high = _mm256_srli_epi32(kept, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(into), _mm256_castsi256_si128(packed));
  }
  void store(Half* into) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(into), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
};

#else

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline float to_float(float from) { return from; }
static inline float to_float(BFloat16 from) { return bits_to_float(static_cast<uint32_t>(from.bits) << 16); }
// The exponent moves from bias 15 to bias 127 by one multiplication, exact for subnormals too.
static inline float to_float(Half from) {
  const uint32_t sign = static_cast<uint32_t>(from.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(from.bits & 0x7fff) << 13;
  const float scaled = bits_to_float(magnitude) * 0x1p112f;
  const float infinite = bits_to_float(magnitude | 0x7f800000);
  const float value = (from.bits & 0x7c00) == 0x7c00 ? infinite : scaled;
  return sign != 0 ? -value : value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
// To the nearest, ties to even, as every conversion here.
static inline void from_float(float from, float* into) { *into = from; }
static inline void from_float(float from, BFloat16* into) {
  const uint32_t bits = float_to_bits(from);
  into->bits = from != from ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// The subnormal numbers of half are the last bits of a float just above 1/2.
static inline void from_float(float from, Half* into) {
  const uint32_t bits = float_to_bits(from), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  if (magnitude < 0x38800000) half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  if (magnitude >= 0x477ff000) half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  into->bits = static_cast<uint16_t>(sign | half);
}

// Fixed trip counts, which every compiler turns into the vectors its target has (SSE2, NEON, ...).
struct Vec {
  static constexpr int kWidth = 8;
  float value[kWidth];

  static Vec zero() { return {{}}; }
  static Vec broadcast(float everywhere) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = everywhere;
    return result;
  }
  template <typename T>
  static Vec load(const T* from) {
    Vec loaded;
    for (int i = 0; i < kWidth; ++i) loaded.value[i] = to_float(from[i]);
    return loaded;
  }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = a.value[i] * b.value[i] + c.value[i];
    return result;
  }
  Vec operator+(const Vec& other) const {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = value[i] + other.value[i];
    return result;
  }
  float sum() const {
    float half[4];
    for (int i = 0; i < 4; ++i) half[i] = value[i] + value[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
  }
  template <typename T>
  void store(T* into) const {
    for (int i = 0; i < kWidth; ++i) from_float(value[i], into + i);
  }
};

#endif

// The first `count` < kWidth elements, zero after them.
template <typename T>
inline Vec load_partial(const T* from, int64_t count) {
  T padded[Vec::kWidth] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Vec::load(padded);
}

template <typename T>
inline void store_partial(const Vec& from, T* into, int64_t count) {
  T padded[Vec::kWidth];
  from.store(padded);
  memcpy(into, padded, static_cast<size_t>(count) * sizeof(T));
}

}  // namespace REPRDPO_CAPABILITY
}  // namespace reprdpo
