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
};

#elif defined(REPRDPO_CAPABILITY_AVX2)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 value;

  static Vec zero() { return {_mm256_setzero_ps()}; }
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

// Fixed trip counts, which every compiler turns into the vectors its target has (SSE2, NEON, ...).
struct Vec {
  static constexpr int kWidth = 8;
  float value[kWidth];

  static Vec zero() { return {{}}; }
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
};

#endif

// The first `count` < kWidth elements, zero after them.
template <typename T>
inline Vec load_partial(const T* from, int64_t count) {
  T padded[Vec::kWidth] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Vec::load(padded);
}

}  // namespace REPRDPO_CAPABILITY
}  // namespace reprdpo
