// The CPU kernels of probe_reward, in every version this machine can run, against sums in double.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_capability.h"
#include "probe_reward/probe_reward.h"
#include "probe_reward_reference.h"

namespace {

using namespace reprdpo::probe_reward;
using reprdpo::CpuCapability;

int failures = 0;

void expect(bool holds, const char* version, const char* what, int64_t dim, int count) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s (dim %lld, rows %d)\n", version, what, static_cast<long long>(dim), count);
}

double value_of_bits(RowType type, uint16_t bits) {
  return type == RowType::kBFloat16 ? value_of(reprdpo::BFloat16{bits}) : value_of(reprdpo::Half{bits});
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
      rows.values[r][i] = value_of_bits(type, half);
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
    const double wanted = value_of_bits(type, element);
    expect(std::isnan(wanted) ? std::isnan(score) : score == wanted, version,
           "a 16-bit value is converted exactly", bits, 1);
  }
}

// Sums of rows into what is there already, and one set of weights or two.
void check_added_rows(AddRowsKernel add_rows, const char* version) {
  std::mt19937 random(0);
  for (RowType type : {RowType::kFloat, RowType::kBFloat16, RowType::kHalf}) {
    // None, less than a vector, whole vectors, several together, a tail.
    for (int64_t dim : {0, 1, 7, 16, 64, 131, 515}) {
      for (int count : {1, 3, 8}) {
        const Rows rows = make_rows(type, count, dim, random);
        const auto weight = normal_values(count, 1, random), other = normal_values(count, 1, random);
        const auto before = normal_values(dim, 1, random);
        auto sum = before, other_sum = before, alone = before;
        add_rows(type, rows.pointers.data(), count, dim, weight.data(), other.data(), sum.data(),
                 other_sum.data());
        add_rows(type, rows.pointers.data(), count, dim, weight.data(), nullptr, alone.data(), nullptr);
        std::vector<double> wanted(before.begin(), before.end()), other_wanted = wanted;
        for (int r = 0; r < count; ++r) {
          for (int64_t i = 0; i < dim; ++i) {
            wanted[i] += weight[r] * rows.values[r][i];
            other_wanted[i] += other[r] * rows.values[r][i];
          }
        }
        expect(all_close(sum, wanted, 1e-6), version, "rows are added", dim, count);
        expect(all_close(other_sum, other_wanted, 1e-6), version, "the second weights too", dim, count);
        expect(sum == alone, version, "the sum is the same without a second", dim, count);
      }
    }
  }
}

template <typename T>
void check_combined(CombineKernel combine, const char* version, double step) {
  std::mt19937 random(0);
  for (int64_t dim : {0, 1, 7, 16, 33, 515}) {
    const auto probe = normal_values(dim, 1, random), gate = normal_values(dim, 1e-3, random);
    std::vector<T> row(dim), alone(dim);
    combine(row_type_of(T()), dim, 2.5f, probe.data(), -1.5f, gate.data(), row.data());
    combine(row_type_of(T()), dim, 2.5f, probe.data(), -1.5f, nullptr, alone.data());
    for (int64_t i = 0; i < dim; ++i) {
      const double wanted = 2.5 * probe[i] - 1.5 * gate[i], half_step = step / 2 * std::abs(wanted) + 0x1p-25;
      expect(std::abs(value_of(row[i]) - wanted) <= half_step * (1 + 1e-6), version, "d w + dz v is rounded",
             dim, 1);
      expect(std::abs(value_of(alone[i]) - 2.5 * probe[i]) <= step / 2 * std::abs(2.5 * probe[i]) + 0x1p-25,
             version, "d w alone", dim, 1);
    }
  }
}

// Every value of a 16-bit type, what lies between two neighbours and above the greatest: to the nearest, ties
// to even.
template <typename T>
void check_rounding(CombineKernel combine, const char* version) {
  for (int bits = 0; bits < 65536; ++bits) {
    const double here = value_of(T{static_cast<uint16_t>(bits)}),
                 next = value_of(T{static_cast<uint16_t>(bits + 1)});
    const bool has_next = (bits & 0x7fff) != 0x7fff && std::isfinite(here) && std::isfinite(next);
    const float middle = static_cast<float>(has_next ? (here + next) / 2 : here);
    const float values[3] = {static_cast<float>(here), middle,
                             std::nextafter(middle, static_cast<float>(next))};
    T rounded[3];
    combine(row_type_of(T()), 3, 1, values, 0, nullptr, rounded);
    const double even = bits % 2 == 0 ? here : next;
    const auto same = [](double a, double b) { return std::isnan(b) ? std::isnan(a) : a == b; };
    expect(same(value_of(rounded[0]), here), version, "a value of the type stays", bits, 1);
    if (!has_next) continue;
    expect(same(value_of(rounded[1]), even), version, "a tie goes to even", bits, 1);
    expect(same(value_of(rounded[2]), next), version, "beyond the middle goes up", bits, 1);
  }
}

// The [B, L] stage: gates, reward and slopes of one sequence against the formulas.
void check_small_stage() {
  std::mt19937 random(0);
  for (Gate gate : {Gate::kSoftmax, Gate::kStatic, Gate::kVote}) {
    for (int64_t L : {1, 2, 33, 80}) {
      Problem p = make_problem(gate, 3, L, 5, random);
      for (double& value : p.rows) value = std::normal_distribution<double>()(random);
      const Forward exact = forward_of(p);
      const Gradients wanted = gradients_of(p, exact);
      const Mixer mixer{gate, L, p.v.data(), p.c.data()};
      for (int64_t b = 0; b < p.B; ++b) {
        std::vector<float> scores(exact.scores.begin() + b * L, exact.scores.begin() + (b + 1) * L), mixed(L);
        for (int64_t l = 0; gate == Gate::kSoftmax && l < L; ++l) {
          double logit = p.c[l];
          for (int64_t i = 0; i < p.D; ++i) logit += p.row(b, l, i) * p.v[l * p.D + i];
          mixed[l] = static_cast<float>(logit);
        }
        const float reward = mix(mixer, scores.data(), mixed.data());
        std::vector<float> d(L), dz(L);
        const Upstream upstream{
            {p.grad_reward.data(), 1, 0}, {p.grad_scores.data(), L, 1}, {p.grad_gate.data(), L, 1}};
        slopes(mixer, upstream, b, scores.data(), mixed.data(), d.data(), dz.data());
        const auto part = [&](const std::vector<double>& all) {
          return std::vector<double>(all.begin() + b * L, all.begin() + (b + 1) * L);
        };
        expect(all_close(mixed, part(exact.gate), 1e-6), "gate", "the layers' shares", L, 1);
        expect(std::abs(reward - exact.reward[b]) <= 1e-6 * L, "gate", "the reward", L, 1);
        expect(all_close(d, part(wanted.d), 4e-6), "gate", "the scores' slopes", L, 1);
        expect(all_close(dz, part(wanted.dz), 4e-6), "gate", "the logits' slopes", L, 1);
      }
    }
  }
}

void check(DotsKernel dots, AddRowsKernel add_rows, CombineKernel combine, CpuCapability capability) {
  const char* version = reprdpo::name(capability);
  if (capability > reprdpo::cpu_capability()) {
    std::printf("skipped %s: not on this machine\n", version);
    return;
  }
  check_sums(dots, version);
  check_conversion(dots, version, RowType::kBFloat16);
  check_conversion(dots, version, RowType::kHalf);
  check_added_rows(add_rows, version);
  check_combined<float>(combine, version, 0x1p-22);
  check_combined<reprdpo::BFloat16>(combine, version, 0x1p-7);
  check_combined<reprdpo::Half>(combine, version, 0x1p-10);
  check_rounding<reprdpo::BFloat16>(combine, version);
  check_rounding<reprdpo::Half>(combine, version);
  std::printf("checked %s\n", version);
}

}  // namespace

int main() {
  check_small_stage();
  check(&portable::dots, &portable::add_rows, &portable::combine, CpuCapability::kPortable);
#ifdef REPRDPO_X86_KERNELS
  check(&avx2::dots, &avx2::add_rows, &avx2::combine, CpuCapability::kAvx2);
  check(&avx512::dots, &avx512::add_rows, &avx512::combine, CpuCapability::kAvx512);
#endif
  return failures == 0 ? 0 : 1;
}
