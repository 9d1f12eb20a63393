// The sparse product's kernels, in every version this machine can run: what is dropped, and the sum of what
// is kept.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_capability.h"
#include "logprob/sparse_residual.h"

namespace {

using namespace reprdpo::logprob;
using reprdpo::CpuCapability;

int failures = 0;
const char* version = "";

void expect(bool holds, const char* what, double got, double wanted) {
  if (holds || ++failures > 20) return;
  std::printf("FAILED %s: %s: %.9g, not %.9g\n", version, what, got, wanted);
}

// Float or bf16, whose bits are a float's upper half, with memory that ends where the matrix does.
struct Matrix {
  Element type;
  int64_t height, width, stride;
  std::vector<char> bytes;

  Matrix(Element type, int64_t height, int64_t width)
      : type(type), height(height), width(width), stride(width + 3) {
    bytes.assign(((height - 1) * stride + width) * size(), char(0xff));
  }
  int64_t size() const { return type == Element::kFloat ? 4 : 2; }
  char* at(int64_t r, int64_t c) { return bytes.data() + (r * stride + c) * size(); }
  void set(int64_t r, int64_t c, float value) {
    std::memcpy(at(r, c), reinterpret_cast<const char*>(&value) + 4 - size(), size());
  }
  float operator()(int64_t r, int64_t c) {
    float value = 0;
    std::memcpy(reinterpret_cast<char*>(&value) + 4 - size(), at(r, c), size());
    return value;
  }
};

MassLevels levels_of(double mass, int64_t vocabulary) {
  MassLevels levels{mass, {}};
  for (int k = 0; k < kMassLevels; ++k) {
    levels.level[k] = static_cast<float>(mass * std::pow(static_cast<double>(vocabulary), k / 8.0 - 1));
  }
  return levels;
}

// Tokens [n] by vocabulary [V], either of them side by side; magnitudes over `decades` powers of ten.
void check_keep(const SparseKernels& k, Element type, bool columns_side_by_side, int64_t n, int64_t V,
                double decades, double mass) {
  std::mt19937 random(7);
  Matrix residual(type, columns_side_by_side ? n : V, columns_side_by_side ? V : n);
  const auto place = [&](int64_t i, int64_t j) {
    return columns_side_by_side ? std::pair{i, j} : std::pair{j, i};
  };
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sizes(V);
    double sum = 0;
    for (double& size : sizes) sum += size = std::pow(10, -decades * (random() % 1000) / 1000);
    const int64_t label = static_cast<int64_t>(random() % V);
    for (int64_t j = 0; j < V; ++j) {
      const auto [r, c] = place(i, j);
      residual.set(r, c, j == label ? 1 : static_cast<float>(-sizes[j] / sum));
    }
  }
  const bool with_nan = n > 2;
  if (with_nan) residual.set(place(2, V / 2).first, place(2, V / 2).second, NAN);

  const int64_t room = std::max<int64_t>(4, V / 3);
  std::vector<int32_t> column(n * room);
  std::vector<float> value(n * room);
  std::vector<Entries> kept;
  for (int64_t i = 0; i < n; ++i) kept.push_back({column.data() + i * room, value.data() + i * room, room});
  std::vector<int64_t> counts(n, -7);
  const MassLevels levels = levels_of(mass, V);
  for (int64_t i = 0; i < n; i += k.panel_tokens) {
    const int64_t token_stride = columns_side_by_side ? residual.stride : 1;
    k.keep(type, residual.bytes.data() + i * token_stride * residual.size(), token_stride,
           columns_side_by_side ? 1 : residual.stride, V, std::min(k.panel_tokens, n - i), levels,
           kept.data() + i, counts.data() + i);
  }
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sizes;
    double all = 0, held = 0, dropped_most = 0;
    for (int64_t j = 0; j < V; ++j) {
      const auto [r, c] = place(i, j);
      sizes.push_back(std::abs(residual(r, c)));
      all += sizes.back();
    }
    if (counts[i] < 0) {  // no room even for what the coarse level keeps
      std::vector<double> sorted = sizes;
      std::sort(sorted.begin(), sorted.end());
      double sum = 0;
      int64_t fewest = V;
      for (double size : sorted) {
        if ((sum += size) > mass) break;
        --fewest;
      }
      expect(std::isnan(all) || fewest > room / 8, "fewest kept of a flat row", fewest, room / 8.0);
      continue;
    }
    expect(counts[i] <= room, "kept", counts[i], room);
    std::vector<bool> is_kept(V);
    int64_t before = -1;
    double least = INFINITY;
    for (int64_t t = 0; t < counts[i]; ++t) {
      const int64_t j = kept[i].column[t];
      expect(j > before && j < V, "column", j, before);
      before = j;
      is_kept[j] = true;
      const auto [r, c] = place(i, j);
      const float wanted = residual(r, c), got = kept[i].value[t];
      expect(std::memcmp(&wanted, &got, 4) == 0, "value", got, wanted);
      held += sizes[j];
      if (sizes[j] < least) least = sizes[j];
    }
    double dropped = 0;
    for (int64_t j = 0; j < V; ++j) {
      if (is_kept[j]) continue;
      expect(!std::isnan(sizes[j]), "a NaN is kept", 0, 1);
      dropped += sizes[j];
      dropped_most = std::max(dropped_most, sizes[j]);
    }
    expect(dropped <= mass * (1 + 1e-4), "mass dropped", dropped, mass);
    expect(dropped_most <= least, "the smallest are dropped", dropped_most, least);
    (void)held;
  }
}

void check_sum(const SparseKernels& k, Element type, int64_t count, int64_t D) {
  std::mt19937 random(8);
  const int64_t V = 57;
  Matrix weight(type, V, D), out(type, 1, D);
  std::normal_distribution<float> normal;
  for (int64_t j = 0; j < V; ++j) {
    for (int64_t d = 0; d < D; ++d) weight.set(j, d, normal(random));
  }
  std::vector<int32_t> column;
  std::vector<float> value;
  for (int64_t t = 0; t < count; ++t) {
    column.push_back(static_cast<int32_t>(random() % V));
    value.push_back(normal(random));
  }
  const Entries kept{column.data(), value.data(), count};
  const Rows rows{weight.bytes.data(), type, weight.stride, D};
  const int64_t at_once = k.sum_columns(type);
  for (int64_t d = 0; d < D; d += at_once) {
    k.sum_rows(rows, d, std::min(at_once, D - d), kept, count, kept, d % 2 == 0 ? count : 0, 0.5f,
               out.bytes.data());
  }
  for (int64_t d = 0; d < D; ++d) {
    double wanted = 0, size = 0;
    for (int64_t t = 0; t < count; ++t) {
      wanted += 0.5 * value[t] * weight(column[t], d);
      size += std::abs(0.5 * value[t] * weight(column[t], d));
    }
    const double tolerance = 0x1p-20 * size + (type == Element::kFloat ? 0 : 0x1p-8 * std::abs(wanted));
    expect(std::abs(out(0, d) - wanted) <= tolerance, "sum", out(0, d), wanted);
  }
}

void check(const SparseKernels& k, CpuCapability capability) {
  version = reprdpo::name(capability);
  if (capability > reprdpo::cpu_capability()) {
    std::printf("skipped %s: not on this machine\n", version);
    return;
  }
  for (Element type : {Element::kFloat, Element::kBFloat16}) {
    for (bool side_by_side : {true, false}) {
      // One of each, less and more than a vector, a whole panel and one beyond, several chunks of the
      // vocabulary.
      const int64_t shapes[][2] = {{1, 2}, {3, 7}, {16, 33}, {32, 500}, {33, 1030}, {65, 3001}};
      for (const auto& [n, V] : shapes) {
        for (double decades : {0.0, 3.0, 9.0}) {
          for (double mass : {0x1p-9, 0.3}) check_keep(k, type, side_by_side, n, V, decades, mass);
        }
      }
    }
    for (int64_t count : {0, 1, 8, 9, 40}) {
      for (int64_t D : {1, 63, 64, 200, 513}) check_sum(k, type, count, D);
    }
  }
  std::printf("checked %s\n", version);
}

}  // namespace

int main() {
  check(portable::sparse_kernels(), CpuCapability::kPortable);
#ifdef REPRDPO_X86_KERNELS
  check(avx2::sparse_kernels(), CpuCapability::kAvx2);
  check(avx512::sparse_kernels(), CpuCapability::kAvx512);
#endif
  return failures == 0 ? 0 : 1;
}
