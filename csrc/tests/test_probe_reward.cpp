// The dot products of probe_reward, in every version this machine can run, against sums in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_capability.h"
#include "probe_reward/probe_reward.h"

namespace {

using reprdpo::CpuCapability;
using reprdpo::probe_reward::DotsKernel;
using reprdpo::probe_reward::kMaxRows;
using reprdpo::probe_reward::RowType;

int failures = 0;

void expect(bool holds, const char* version, const char* what, int64_t dim, int count) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s (dim %lld, rows %d)\n", version, what, static_cast<long long>(dim), count);
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Any bits are a value of a 16-bit type; this is that value, written independently of the kernels.
double value_of(RowType type, uint16_t bits) {
  if (type == RowType::kBFloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) magnitude = mantissa != 0 ? std::nan("") : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct Rows {
  RowType type;
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<uint16_t>> halves;
  std::vector<std::vector<double>> values;
  std::vector<const void*> pointers;
};

// Rows one element off alignment, followed by NaN that no kernel may read.
Rows make_rows(RowType type, int count, int64_t dim, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Rows rows{type, {}, {}, {}, {}};
  rows.floats.assign(count, std::vector<float>(dim + 2, NAN));
  rows.halves.assign(count, std::vector<uint16_t>(dim + 2, 0x7fff));
  rows.values.assign(count, std::vector<double>(dim));
  for (int r = 0; r < count; ++r) {
    for (int64_t i = 0; i < dim; ++i) {
      const float value = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      rows.floats[r][i + 1] = value;
      rows.values[r][i] = value;
      if (type == RowType::kFloat) continue;
      const uint16_t half =
          type == RowType::kBFloat16 ? bits >> 16 : static_cast<uint16_t>(random() % 0x7c00);
      rows.halves[r][i + 1] = half;
      rows.values[r][i] = value_of(type, half);
    }
    if (type == RowType::kFloat) rows.pointers.push_back(rows.floats[r].data() + 1);
    if (type != RowType::kFloat) rows.pointers.push_back(rows.halves[r].data() + 1);
  }
  return rows;
}

// |got - sum| <= 8 eps sqrt(dim) * the norm of the products: what rounding of partial sums allows.
bool close(float got, const std::vector<double>& row, const std::vector<float>& weight) {
  double sum = 0, norm = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    sum += row[i] * weight[i];
    norm += row[i] * weight[i] * row[i] * weight[i];
  }
  return std::abs(got - sum) <= 8 * 0x1p-24 * std::sqrt(norm * std::max<size_t>(row.size(), 1));
}

void check_sums(DotsKernel dots, const char* version) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (RowType type : {RowType::kFloat, RowType::kBFloat16, RowType::kHalf}) {
    // One, less than a vector, whole vectors, a tail, more than a chunk of partial sums, a real width.
    for (int64_t dim : {1, 7, 8, 16, 31, 256, 300, 515, 4096}) {
      for (int count = 1; count <= kMaxRows; ++count) {
        const Rows rows = make_rows(type, count, dim, random);
        std::vector<float> probe(dim), gate(dim);
        for (float& w : probe) w = normal(random);
        for (float& v : gate) v = normal(random);
        float scores[kMaxRows], logits[kMaxRows], alone[kMaxRows];
        dots(type, rows.pointers.data(), count, dim, probe.data(), gate.data(), scores, logits);
        dots(type, rows.pointers.data(), count, dim, probe.data(), nullptr, alone, nullptr);
        for (int r = 0; r < count; ++r) {
          expect(close(scores[r], rows.values[r], probe), version, "the score is the probe's dot product",
                 dim, count);
          expect(close(logits[r], rows.values[r], gate), version, "the logit is the gate's dot product", dim,
                 count);
          expect(scores[r] == alone[r], version, "the score is the same without a gate", dim, count);
        }
      }
    }
  }
}

// Every one of the 65536 values of a 16-bit type is converted exactly: a dot product with 1 gives it back.
void check_conversion(DotsKernel dots, const char* version, RowType type) {
  for (int bits = 0; bits < 65536; ++bits) {
    const uint16_t element = static_cast<uint16_t>(bits);
    std::vector<uint16_t> row(16, 0);
    row[3] = element;
    const std::vector<float> one(16, 1.0f);
    const void* pointer = row.data();
    float score;
    dots(type, &pointer, 1, 16, one.data(), nullptr, &score, nullptr);
    const double wanted = value_of(type, element);
    expect(std::isnan(wanted) ? std::isnan(score) : score == wanted, version,
           "a 16-bit value is converted exactly", bits, 1);
  }
}

void check(DotsKernel dots, CpuCapability capability) {
  const char* version = reprdpo::name(capability);
  if (capability > reprdpo::cpu_capability()) {
    std::printf("skipped %s: not on this machine\n", version);
    return;
  }
  check_sums(dots, version);
  check_conversion(dots, version, RowType::kBFloat16);
  check_conversion(dots, version, RowType::kHalf);
  std::printf("checked %s\n", version);
}

}  // namespace

int main() {
  check(&reprdpo::probe_reward::portable::dots, CpuCapability::kPortable);
#ifdef REPRDPO_X86_KERNELS
  check(&reprdpo::probe_reward::avx2::dots, CpuCapability::kAvx2);
  check(&reprdpo::probe_reward::avx512::dots, CpuCapability::kAvx512);
#endif
  return failures == 0 ? 0 : 1;
}
