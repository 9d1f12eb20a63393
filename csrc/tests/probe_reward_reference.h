// The representation reward and its gradients in double, from the formulas of probe_reward.h alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/element_types.h"
#include "probe_reward/gate.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo::probe_reward {

// Any bits are a value of a 16-bit type; this is that value, written independently of the kernels.
inline double value_of(float value) { return value; }
inline double value_of(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline double value_of(Half value) {
  const int bits = value.bits, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) magnitude = mantissa != 0 ? std::nan("") : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A value of the type near `value`.
inline void element_near(float value, float& into) { into = value; }
inline void element_near(float value, BFloat16& into) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  into.bits = static_cast<uint16_t>(bits >> 16);
}
inline void element_near(float value, Half& into) {
  const double magnitude = std::fmin(std::abs(value), 60000.0);
  int exponent;
  const double mantissa = std::frexp(magnitude, &exponent);
  const int biased = exponent + 14;
  const int bits =
      magnitude == 0 || biased < 1 ? 0 : biased << 10 | (static_cast<int>(mantissa * 2048) & 1023);
  into.bits = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

inline RowType row_type_of(float) { return RowType::kFloat; }
inline RowType row_type_of(BFloat16) { return RowType::kBFloat16; }
inline RowType row_type_of(Half) { return RowType::kHalf; }

// One case: rows h[b][l] (of sequences that are present), parameters, upstream gradients.
struct Problem {
  Gate gate;
  int64_t B, L, D;
  std::vector<double> rows;
  std::vector<char> present;
  std::vector<float> w, bias, v, c;  // v is v [L, D] or V [L, L]
  std::vector<float> grad_reward, grad_scores, grad_gate;

  double row(int64_t b, int64_t l, int64_t i) const { return rows[(b * L + l) * D + i]; }
};

inline std::vector<float> normal_values(int64_t count, double scale, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(normal(random) * scale);
  return values;
}

// Everything but the rows.
inline Problem make_problem(Gate gate, int64_t B, int64_t L, int64_t D, std::mt19937& random) {
  const double scale = 1 / std::sqrt(static_cast<double>(D));
  Problem p{gate, B,  L,  D, std::vector<double>(B * L * D), std::vector<char>(B, 1), {}, {}, {},
            {},   {}, {}, {}};
  p.w = normal_values(L * D, scale, random);
  p.bias = normal_values(L, 1, random);
  if (gate != Gate::kStatic)
    p.v = normal_values(L * (gate == Gate::kVote ? L : D), gate == Gate::kVote ? 1 : scale, random);
  p.c = normal_values(L, 1, random);
  p.grad_reward = normal_values(B, 1, random);
  p.grad_scores = normal_values(B * L, 1, random);
  p.grad_gate = normal_values(B * L, 1, random);
  return p;
}

struct Forward {
  std::vector<double> scores, gate, reward;
};

inline Forward forward_of(const Problem& p) {
  Forward out{std::vector<double>(p.B * p.L), std::vector<double>(p.B * p.L), std::vector<double>(p.B)};
  for (int64_t b = 0; b < p.B; ++b) {
    double* scores = &out.scores[b * p.L];
    double* gate = &out.gate[b * p.L];
    for (int64_t l = 0; l < p.L; ++l) {
      scores[l] = p.bias[l];
      gate[l] = p.c[l];
      for (int64_t i = 0; i < p.D; ++i) {
        scores[l] += p.row(b, l, i) * p.w[l * p.D + i];
        if (p.gate == Gate::kSoftmax) gate[l] += p.row(b, l, i) * p.v[l * p.D + i];
      }
      if (!p.present[b]) scores[l] = std::nan("");
      if (!p.present[b] && p.gate == Gate::kSoftmax) gate[l] = std::nan("");
    }
    double most = -INFINITY, total = 0;
    for (int64_t l = 0; l < p.L; ++l) {
      for (int64_t j = 0; p.gate == Gate::kVote && j < p.L; ++j) gate[l] += p.v[l * p.L + j] * scores[j];
      most = std::fmax(most, gate[l]);
    }
    for (int64_t l = 0; l < p.L; ++l) {
      gate[l] = p.gate == Gate::kVote ? 1 / (1 + std::exp(-gate[l])) : std::exp(gate[l] - most);
      total += gate[l];
    }
    for (int64_t l = 0; l < p.L; ++l) {
      if (p.gate != Gate::kVote) gate[l] /= total;
      out.reward[b] += gate[l] * scores[l];
    }
  }
  return out;
}

struct Gradients {
  std::vector<double> d, dz, w, bias, v, c;
};

inline Gradients gradients_of(const Problem& p, const Forward& f) {
  Gradients g{std::vector<double>(p.B * p.L),  std::vector<double>(p.B * p.L),
              std::vector<double>(p.w.size()), std::vector<double>(p.L),
              std::vector<double>(p.v.size()), std::vector<double>(p.L)};
  for (int64_t b = 0; b < p.B; ++b) {
    if (!p.present[b]) continue;
    const double *s = &f.scores[b * p.L], *gate = &f.gate[b * p.L];
    const auto u = [&](int64_t l) { return p.grad_reward[b] * s[l] + p.grad_gate[b * p.L + l]; };
    double mean = 0;
    for (int64_t l = 0; l < p.L; ++l) mean += gate[l] * u(l);
    for (int64_t l = 0; l < p.L; ++l) {
      const int64_t at = b * p.L + l;
      g.d[at] = p.grad_reward[b] * gate[l] + p.grad_scores[at];
      g.dz[at] = p.gate == Gate::kVote ? gate[l] * (1 - gate[l]) * u(l) : gate[l] * (u(l) - mean);
    }
    for (int64_t l = 0; l < p.L; ++l) {
      for (int64_t j = 0; p.gate == Gate::kVote && j < p.L; ++j) {
        g.d[b * p.L + l] += g.dz[b * p.L + j] * p.v[j * p.L + l];
        g.v[l * p.L + j] += g.dz[b * p.L + l] * s[j];
      }
      g.bias[l] += g.d[b * p.L + l];
      g.c[l] += g.dz[b * p.L + l];
      for (int64_t i = 0; i < p.D; ++i) {
        g.w[l * p.D + i] += g.d[b * p.L + l] * p.row(b, l, i);
        if (p.gate == Gate::kSoftmax) g.v[l * p.D + i] += g.dz[b * p.L + l] * p.row(b, l, i);
      }
    }
  }
  return g;
}

// Whether every value is right to a float's rounding, or NaN where it must be.
template <typename T>
bool all_close(const std::vector<T>& got, const std::vector<double>& wanted, double tolerance) {
  double most = 0;
  for (double value : wanted) most = std::isnan(value) ? most : std::fmax(most, std::abs(value));
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = value_of(got[i]);
    if (std::isnan(wanted[i]) ? !std::isnan(value)
                              : !(std::abs(value - wanted[i]) <= tolerance * (most + 1e-30))) {
      return false;
    }
  }
  return got.size() == wanted.size();
}

}  // namespace reprdpo::probe_reward
