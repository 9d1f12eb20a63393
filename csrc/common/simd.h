// The float vector a kernel is written in, one definition for each CPU capability.
//
// A kernel file is compiled once per capability, with REPRDPO_CAPABILITY (portable, avx2, avx512 or
// avx512bf16) naming the namespace. Nothing here comes from the standard library or torch: an inline function
// compiled for AVX-512 could otherwise be the copy that the linker keeps for everyone.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/element_types.h"

#if defined(REPRDPO_CAPABILITY_AVX512BF16)
#define REPRDPO_CAPABILITY_AVX512
#endif
#if defined(REPRDPO_CAPABILITY_AVX2) || defined(REPRDPO_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

namespace reprdpo {

namespace REPRDPO_CAPABILITY {

static inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
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

// Rounding to nearest, ties to even; every NaN becomes the quiet one.
static inline void from_float(float value, float* to) { *to = value; }
static inline void from_float(float value, BFloat16* to) {
  const uint32_t bits = float_to_bits(value);
  to->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_float(float value, Half* to) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // The sum's last place is a half's smallest step, so that the addition rounds.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

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
  void store(float* to) const { _mm512_storeu_ps(to, value); }
  void store(BFloat16* to) const {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i high =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
  }
  void store(Half* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
  // b where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.value, b.value)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.value, b.value)}; }
  // a < b ? yes : no, no where either is NaN.
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_mov_ps(no.value, _mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ), yes.value)};
  }
  // A bit for each place where a < b does not hold, NaN included.
  static uint32_t not_less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.value, b.value, _CMP_NLT_UQ); }
  Vec round() const { return {_mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec magnitude() const { return {_mm512_abs_ps(value)}; }
  // value 2^n for whole n in [-126, 127].
  Vec times_power_of_two(Vec n) const { return {_mm512_scalef_ps(value, n.value)}; }
  Vec operator+(Vec other) const { return {_mm512_add_ps(value, other.value)}; }
  Vec operator-(Vec other) const { return {_mm512_sub_ps(value, other.value)}; }
  Vec operator*(Vec other) const { return {_mm512_mul_ps(value, other.value)}; }
  Vec operator/(Vec other) const { return {_mm512_div_ps(value, other.value)}; }
  float sum() const { return _mm512_reduce_add_ps(value); }
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
  void store(float* to) const { _mm256_storeu_ps(to, value); }
  void store(BFloat16* to) const {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.value, b.value)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.value, b.value)}; }
  static Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.value, yes.value, _mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ))};
  }
  static uint32_t not_less(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.value, b.value, _CMP_NLT_UQ)));
  }
  Vec round() const { return {_mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec magnitude() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), value)}; }
  Vec times_power_of_two(Vec n) const {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.value), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }
  Vec operator+(Vec other) const { return {_mm256_add_ps(value, other.value)}; }
  Vec operator-(Vec other) const { return {_mm256_sub_ps(value, other.value)}; }
  Vec operator*(Vec other) const { return {_mm256_mul_ps(value, other.value)}; }
  Vec operator/(Vec other) const { return {_mm256_div_ps(value, other.value)}; }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
};

#else

// Fixed trip counts, which every compiler turns into the vectors its target has (SSE2, NEON, ...).
struct Vec {
  static constexpr int kWidth = 8;
  float value[kWidth];

  template <typename Lane>
  static Vec each(const Lane& lane) {
    Vec result;
    for (int i = 0; i < kWidth; ++i) result.value[i] = lane(i);
    return result;
  }
  static Vec zero() { return {{}}; }
  static Vec broadcast(float everywhere) {
    return each([&](int) { return everywhere; });
  }
  template <typename T>
  static Vec load(const T* from) {
    return each([&](int i) { return to_float(from[i]); });
  }
  template <typename T>
  void store(T* to) const {
    for (int i = 0; i < kWidth; ++i) from_float(value[i], to + i);
  }
  static Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) { return a.value[i] * b.value[i] + c.value[i]; });
  }
  static Vec max(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.value[i] > b.value[i] ? a.value[i] : b.value[i]; });
  }
  static Vec min(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.value[i] < b.value[i] ? a.value[i] : b.value[i]; });
  }
  static Vec select_less(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
    return each([&](int i) { return a.value[i] < b.value[i] ? yes.value[i] : no.value[i]; });
  }
  static uint32_t not_less(const Vec& a, const Vec& b) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(!(a.value[i] < b.value[i])) << i;
    return bits;
  }
  // Added to 1.5 2^23, a number of magnitude under 2^22 loses what follows the point.
  Vec round() const {
    return each([&](int i) { return value[i] + 0x1.8p23f - 0x1.8p23f; });
  }
  Vec magnitude() const {
    return each([&](int i) { return bits_to_float(float_to_bits(value[i]) & 0x7fffffff); });
  }
  Vec times_power_of_two(const Vec& n) const {
    // The sum's low bits are n: no conversion, which would be undefined for NaN.
    return each(
        [&](int i) { return value[i] * bits_to_float((float_to_bits(n.value[i] + 0x1.8p23f) + 127) << 23); });
  }
  Vec operator+(const Vec& other) const {
    return each([&](int i) { return value[i] + other.value[i]; });
  }
  Vec operator-(const Vec& other) const {
    return each([&](int i) { return value[i] - other.value[i]; });
  }
  Vec operator*(const Vec& other) const {
    return each([&](int i) { return value[i] * other.value[i]; });
  }
  Vec operator/(const Vec& other) const {
    return each([&](int i) { return value[i] / other.value[i]; });
  }
  float sum() const {
    float half[4];
    for (int i = 0; i < 4; ++i) half[i] = value[i] + value[i + 4];
    return (half[0] + half[2]) + (half[1] + half[3]);
  }
};

#endif

// The first `count` < kWidth elements, `rest` after them.
template <typename T>
inline Vec load_partial(const T* from, int64_t count, float rest = 0.0f) {
  T padded[Vec::kWidth];
  for (int i = 0; i < Vec::kWidth; ++i) from_float(rest, padded + i);
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return Vec::load(padded);
}

template <typename T>
inline void store_partial(Vec from, T* to, int64_t count) {
  T padded[Vec::kWidth];
  from.store(padded);
  memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// e^x for x <= 0 within 1.1 ulp; 0 where that is under the smallest normal number, NaN for NaN.
// x = n log 2 + r, and on |r| <= log(2) / 2 a minimax polynomial of degree 6 with the first two terms exact.
inline Vec exp_nonpositive(Vec x) {
  const Vec n = (x * Vec::broadcast(0x1.715476p+0f)).round();
  Vec r = Vec::multiply_add(n, Vec::broadcast(-0x1.62ep-1f), x);
  r = Vec::multiply_add(n, Vec::broadcast(-0x1.0bfbe8p-15f), r);
  Vec p = Vec::multiply_add(r, Vec::broadcast(0.0013814538f), Vec::broadcast(0.0083687453f));
  p = Vec::multiply_add(p, r, Vec::broadcast(0.041668391f));
  p = Vec::multiply_add(p, r, Vec::broadcast(0.16666520f));
  p = Vec::multiply_add(p, r, Vec::broadcast(0.49999993f));
  p = Vec::multiply_add(p * r, r, r) + Vec::broadcast(1.0f);
  return Vec::select_less(x, Vec::broadcast(-87.33654f), Vec::zero(), p.times_power_of_two(n));
}

// Within 2 ulp. Near 0 an odd minimax polynomial, elsewhere 1 - 2 e / (1 + e) with e = exp(-2 |x|).
inline Vec tanh(Vec x) {
  const Vec size = x.magnitude(), square = x * x, one = Vec::broadcast(1.0f);
  Vec p = Vec::multiply_add(square, Vec::broadcast(-0.0058951503f), Vec::broadcast(0.020795965f));
  p = Vec::multiply_add(p, square, Vec::broadcast(-0.053783838f));
  p = Vec::multiply_add(p, square, Vec::broadcast(0.13331924f));
  p = Vec::multiply_add(p, square, Vec::broadcast(-0.33333298f));
  const Vec small = Vec::multiply_add(p * square, x, x);
  const Vec e = exp_nonpositive(size * Vec::broadcast(-2.0f));
  const Vec large = one - (e + e) / (one + e);
  const Vec signed_large = Vec::select_less(x, Vec::zero(), Vec::zero() - large, large);
  return Vec::select_less(size, Vec::broadcast(0.6f), small, signed_large);
}

}  // namespace REPRDPO_CAPABILITY
}  // namespace reprdpo
