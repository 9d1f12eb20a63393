// The log-prob kernels, in every version this machine can run, against the formulas in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/cpu_capability.h"
#include "logprob/logprob.h"

namespace {

using namespace reprdpo::logprob;
using reprdpo::CpuCapability;

constexpr float kInfinity = INFINITY;

int failures = 0;
const char* version = "";

void expect(bool holds, const char* what, double got, double wanted) {
  if (holds) return;
  if (++failures > 20) return;
  std::printf("FAILED %s: %s: %.9g, not %.9g\n", version, what, got, wanted);
}

void expect_close(double got, double wanted, double tolerance, const char* what) {
  const bool same =
      std::isnan(wanted) ? std::isnan(got) : got == wanted || std::abs(got - wanted) <= tolerance;
  expect(same, what, got, wanted);
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double value_of(Element type, const void* at) {
  if (type == Element::kFloat) return *static_cast<const float*>(at);
  const uint16_t bits = *static_cast<const uint16_t*>(at);
  if (type == Element::kBFloat16) return from_bits(static_cast<uint32_t>(bits) << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) magnitude = mantissa != 0 ? std::nan("") : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

int64_t size_of(Element type) { return type == Element::kFloat ? 4 : 2; }

// How far the nearest value of the type may be from x, relative to x.
double rounding(Element type) {
  return type == Element::kFloat ? 0x1p-24 : type == Element::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

// A matrix whose rows lie `stride` apart, one element off alignment, and end where the memory does.
struct Matrix {
  Element type;
  int64_t height, width, stride;
  std::vector<char> bytes;
  std::vector<double> values;

  Matrix(Element type, int64_t height, int64_t width, std::mt19937& random, double spread)
      : type(type), height(height), width(width), stride(width + 3), values(height * width) {
    bytes.assign((1 + std::max<int64_t>(height - 1, 0) * stride + width) * size_of(type), char(0xff));
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t c = 0; c < width; ++c) set(r, c, static_cast<float>(spread * normal(random)));
    }
  }
  void* at(int64_t r, int64_t c) { return bytes.data() + (1 + r * stride + c) * size_of(type); }
  void set(int64_t r, int64_t c, float value) {
    const uint32_t bits = bits_of(value);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type == Element::kHalf) {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      half = static_cast<uint16_t>((bits >> 16 & 0x8000) | (exponent << 10) | (bits >> 13 & 1023));
      if (exponent <= 0) half = 0;
      if (exponent >= 31) half = 0x7c00 | (bits & 0x7fffff ? 512 : 0) | (bits >> 16 & 0x8000);
    }
    std::memcpy(at(r, c), type == Element::kFloat ? static_cast<const void*>(&value) : &half, size_of(type));
    values[r * width + c] = value_of(type, at(r, c));
  }
  double operator()(int64_t r, int64_t c) const { return values[r * width + c]; }
  Rows rows() { return {at(0, 0), type, stride, width}; }
};

// What the formulas say of one row of raw logits.
struct Oracle {
  double most = -INFINITY, sum = 0, entr = 0, total = 0, target = 0;
  bool leads = true;  // of the label's block
  std::vector<double> residual, without_slope;

  Oracle(const std::vector<double>& u, int64_t label, const std::vector<float>& bias, Transform transform) {
    std::vector<double> z, slope;
    for (size_t j = 0; j < u.size(); ++j) {
      const double x = (u[j] + (bias.empty() ? 0 : bias[j])) * transform.scale, t = std::tanh(x);
      z.push_back(transform.cap != 0 ? t * transform.cap : x);
      slope.push_back(transform.cap != 0 ? 1 - t * t : 1);
      most = std::max(most, z.back());
      total += z.back();
    }
    if (label >= 0) target = z[label];
    for (size_t j = 0; j < u.size(); ++j) {
      const bool is_label = static_cast<int64_t>(j) == label;
      const double e = std::exp(z[j] - most);
      if (!is_label) sum += e;
      if (!is_label && e > 0) entr += e * (z[j] - most);
      const bool before =
          static_cast<int64_t>(j) < label && label - static_cast<int64_t>(j) <= label % kBlockRows;
      if (before && z[j] >= target) leads = false;
      without_slope.push_back(is_label ? 1 : -e);
    }
    for (size_t j = 0; j < u.size(); ++j) {
      if (static_cast<int64_t>(j) != label) without_slope[j] /= sum;
      residual.push_back(without_slope[j] * slope[j]);
    }
  }
};

struct Case {
  int64_t tokens, depth, vocabulary;
  bool bias;
  float scale, cap;
};

// One token, less than a vector or a tile, whole panels and blocks and one beyond, several blocks of the
// depth.
const Case kCases[] = {{1, 1, 1, false, 1, 0},      {3, 7, 7, true, 0.5f, 0},
                       {64, 64, 96, false, 1, 0},   {70, 33, 200, true, 0.7f, 5},
                       {17, 1030, 97, false, 1, 0}, {33, 515, 100, true, 1.5f, 0},
                       {5, 0, 9, true, 1, 0},       {130, 16, 193, false, 0.2f, 30}};

// 1 - tanh^2 is as exact as tanh is: to some units of 2^-24, however small it is.
void check_residual(const Oracle& oracle, Transform transform, Element type, const void* residual,
                    int64_t step, double slack) {
  const double scale = type == Element::kHalf ? kHalfResidualScale : 1;
  const double cap_slack = transform.cap != 0 ? slack * transform.cap + 0x1p-21 : 0;
  for (size_t j = 0; j < oracle.residual.size(); ++j) {
    const double wanted = oracle.residual[j] * scale;
    const double got = value_of(type, static_cast<const char*>(residual) + j * step);
    const double tiny = type == Element::kHalf ? 0x1p-24 : 0x1p-126;
    const double tolerance = std::abs(wanted) * (slack + 1.01 * rounding(type)) + tiny;
    expect_close(got, wanted, tolerance + std::abs(oracle.without_slope[j]) * scale * cap_slack, "residual");
  }
}

void check_linear(const LinearKernels& k, Element type, const Case& c) {
  std::mt19937 random(7);
  const int64_t n = c.tokens, V = c.vocabulary, panels = (n + k.panel_columns - 1) / k.panel_columns;
  const int64_t blocks = (V + kBlockRows - 1) / kBlockRows, tile = panels * k.panel_columns;
  Matrix hidden(type, n, c.depth, random, 1), weight(type, V, c.depth, random, 1 / std::sqrt(c.depth + 1.0));
  std::vector<float> bias;
  for (int64_t j = 0; j < V && c.bias; ++j) bias.push_back(static_cast<float>(random() % 100) / 50);
  std::vector<int64_t> labels(tile, -1);
  for (int64_t i = 0; i < n; ++i) labels[i] = i % 5 == 4 ? -1 : static_cast<int64_t>(random() % V);

  const int64_t panel_bytes = k.panel_bytes(type, c.depth), panel_floats = kBlockRows * k.panel_columns;
  std::vector<char> packed(panels * panel_bytes), scratch(k.scratch_bytes(weight.rows()));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * k.panel_columns;
    k.pack_rows(hidden.rows(), first, std::min(k.panel_columns, n - first), packed.data() + p * panel_bytes);
  }
  std::vector<float> logits(blocks * panels * panel_floats), stats(4 * (blocks + 1) * tile), target(tile),
      leads(tile);
  std::vector<char> residual(V * n * size_of(type));
  const Transform transform{c.scale, c.cap};
  const Wanted wanted{true, true, true};
  const auto stats_of = [&](int64_t block, int64_t column) -> BlockStats {
    float* at = stats.data() + block * tile + column;
    const int64_t size = (blocks + 1) * tile;
    return {at, at + size, at + 2 * size, at + 3 * size};
  };
  const auto for_panels = [&](const auto& body) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = p * k.panel_columns;
        body(b, b * kBlockRows, std::min<int64_t>(kBlockRows, V - b * kBlockRows), column,
             std::min(k.panel_columns, n - column), logits.data() + (b * panels + p) * panel_floats,
             PanelLabels{labels.data() + column, target.data() + column, leads.data() + column});
      }
    }
  };
  for (int64_t b = 0; b < blocks; ++b) {
    k.multiply(weight.rows(), b * kBlockRows, std::min<int64_t>(kBlockRows, V - b * kBlockRows),
               packed.data(), n, scratch.data(), logits.data() + b * panels * panel_floats);
  }
  for_panels([&](int64_t b, int64_t row, int64_t rows, int64_t column, int64_t columns, float* at,
                 PanelLabels names) {
    k.softmax_block(at, row, rows, columns, bias.empty() ? nullptr : bias.data() + row, transform, wanted,
                    names, stats_of(b, column));
  });
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t column = p * k.panel_columns;
    k.merge_blocks(blocks, tile, std::min(k.panel_columns, n - column), wanted, stats_of(0, column),
                   stats_of(blocks, column));
  }
  for_panels([&](int64_t b, int64_t row, int64_t rows, int64_t column, int64_t columns, float* at,
                 PanelLabels names) {
    k.residual_block(at, row, rows, columns, stats_of(b, column).sum, transform, names, type,
                     residual.data() + (row * n + column) * size_of(type), n);
  });

  const double error = 16 * 0x1p-24 * std::sqrt(c.depth + 4.0);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> u(V, 0);
    for (int64_t j = 0; j < V; ++j) {
      for (int64_t d = 0; d < c.depth; ++d) u[j] += hidden(i, d) * weight(j, d);
    }
    const Oracle oracle(u, labels[i], bias, transform);
    const BlockStats got = stats_of(blocks, i);
    expect_close(*got.most, oracle.most, error * 4, "maximum");
    expect_close(*got.sum, oracle.sum, error * oracle.sum, "sum without the label");
    expect_close(*got.entr, oracle.entr, error * (oracle.sum + std::abs(oracle.entr)), "entropy term");
    expect_close(*got.total, oracle.total, error * V, "sum of the logits");
    if (labels[i] >= 0) expect_close(target[i], oracle.target, error * 4, "label's logit");
    if (labels[i] >= 0) expect((leads[i] != 0) == oracle.leads, "leading label", leads[i], oracle.leads);
    check_residual(oracle, transform, type, residual.data() + i * size_of(type), n * size_of(type), error);
  }
}

// out = (a^T diag(scale) b), the weight's gradient, once and once more on top.
void check_columns(const LinearKernels& k, Element type, int64_t depth, int64_t height, int64_t width) {
  std::mt19937 random(3);
  Matrix a(type, height, depth, random, 1), b(type, depth, width, random, 1);
  std::vector<float> scale(depth);
  for (float& s : scale) s = static_cast<float>(random() % 64) / 16 - 2;
  const int64_t panels = (width + k.panel_columns - 1) / k.panel_columns, bytes = k.panel_bytes(type, depth);
  std::vector<char> packed(panels * bytes), scratch(k.scratch_bytes(a.rows()));
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * k.panel_columns;
    k.pack_columns(b.rows(), depth, scale.data(), first, std::min(k.panel_columns, width - first),
                   packed.data() + p * bytes);
  }
  std::vector<float> sums(panels * kBlockRows * k.panel_columns);
  std::vector<float> out(height * width, 1);
  k.multiply(a.rows(), 0, height, packed.data(), width, scratch.data(), sums.data());
  for (bool accumulate : {false, true}) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = p * k.panel_columns;
      k.store_block(sums.data() + p * kBlockRows * k.panel_columns, height,
                    std::min(k.panel_columns, width - first), nullptr, accumulate, Element::kFloat,
                    out.data() + first, width);
    }
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        double wanted = 0, size = 0;
        for (int64_t d = 0; d < depth; ++d) {
          wanted += a(r, d) * b(d, c) * scale[d];
          size += std::abs(a(r, d) * b(d, c) * scale[d]);
        }
        const double slack = type == Element::kBFloat16 ? 0x1p-8 : 0x1p-20;
        expect_close(out[r * width + c], wanted * (accumulate ? 2 : 1), slack * 2 * size, "scaled product");
      }
    }
  }
}

// out = diag(scale) a^T b in parts of the depth, the hidden states' gradient.
void check_groups(const LinearKernels& k, Element type, int64_t depth, int64_t height, int64_t width) {
  std::mt19937 random(4);
  Matrix a(type, depth, height, random, 1), b(type, depth, width, random, 1);
  std::vector<float> scale(height), out(height * width, NAN);
  for (float& s : scale) s = static_cast<float>(random() % 64) / 16 - 2;
  const int64_t middle = depth / 4 * 2;
  for (int64_t column = 0; column < width; column += k.panel_columns) {
    const int64_t columns = std::min(k.panel_columns, width - column);
    std::vector<float> sums((height + 5) * k.panel_columns);
    for (int64_t begin = 0; begin < depth; begin += std::max<int64_t>(middle, 1)) {
      const int64_t count = std::min(std::max<int64_t>(middle, 1), depth - begin);
      Rows a_part = a.rows(), b_part = b.rows();
      a_part.data = a.at(begin, 0);
      b_part.data = b.at(begin, 0);
      std::vector<char> groups(k.group_bytes(type, count, height)), panel(k.panel_bytes(type, count));
      k.pack_groups(a_part, count, height, groups.data());
      k.pack_columns(b_part, count, nullptr, column, columns, panel.data());
      k.multiply_groups(type, groups.data(), height, count, panel.data(), begin == 0, columns, sums.data());
    }
    k.store_block(sums.data(), height, columns, scale.data(), false, Element::kFloat, out.data() + column,
                  width);
  }
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      double wanted = 0, size = 0;
      for (int64_t d = 0; d < depth; ++d) {
        wanted += a(d, r) * b(d, c) * scale[r];
        size += std::abs(a(d, r) * b(d, c) * scale[r]);
      }
      expect_close(out[r * width + c], wanted, 0x1p-20 * size, "product of a transpose");
    }
  }
}

void check_logprob_rows(const RowKernels& k, Element type) {
  std::mt19937 random(9);
  for (int64_t V : {1, 7, 8, 16, 33, 1024, 3000}) {
    for (int64_t label : {int64_t{-1}, int64_t{0}, V / 2, V - 1}) {
      Matrix logits(type, 1, V, random, 3), out(type, 1, V, random, 0);
      const Oracle oracle(logits.values, label, {}, {0.8f, 0});
      RowStats got{};
      k.logprob_row(type, logits.at(0, 0), V, label, 0.8f, &got);
      expect_close(got.most, oracle.most, 2e-6, "maximum");
      expect_close(got.sum, oracle.sum, 4e-6 * oracle.sum, "sum without the label");
      k.logprob_row_backward(type, logits.at(0, 0), V, label, 0.8f, got.most, -0.5f, 0.75f, out.at(0, 0));
      for (int64_t j = 0; j < V; ++j) {
        const double wanted = j == label ? 0.75 : -0.5 * std::exp(logits(0, j) * 0.8f - oracle.most);
        const double tolerance = std::abs(wanted) * (4e-6 + rounding(type)) + 0x1p-24;
        expect_close(value_of(type, out.at(0, j)), wanted, tolerance, "gradient of a logit");
      }
    }
  }
}

// exp and tanh over all magnitudes: a row of two logits, one of them 0, is a function of the other.
void check_functions(const LinearKernels& linear, const RowKernels& k) {
  std::vector<float> panel(kBlockRows * linear.panel_columns), stats(6 * linear.panel_columns);
  const std::vector<int64_t> labels(linear.panel_columns, 0);
  float* const target = stats.data();
  const auto of_panel = [&](int64_t number) { return target + number * linear.panel_columns; };
  const float* const total = of_panel(5);
  double worst_exp = 0, worst_tanh = 0;
  for (uint32_t bits = 0; bits < bits_of(120.0f); bits += 10007) {
    const float x = from_bits(bits);
    float row[2] = {0, -x};
    RowStats got;
    k.logprob_row(Element::kFloat, row, 2, 0, 1, &got);
    const double wanted = std::exp(-static_cast<double>(x));
    if (x < 87) worst_exp = std::max(worst_exp, std::abs(got.sum - wanted) / wanted);
    if (x > 87.4f) expect(got.sum == 0, "exp is 0 where it is under the smallest number", got.sum, 0);
    panel[0] = x;
    panel[linear.panel_columns] = -x;
    linear.softmax_block(panel.data(), 0, 2, 1, nullptr, {1, 1}, {false, false, true},
                         {labels.data(), target, of_panel(1)},
                         {of_panel(2), of_panel(3), of_panel(4), of_panel(5)});
    const double tanh = std::tanh(static_cast<double>(x));
    if (tanh > 1e-30) worst_tanh = std::max(worst_tanh, std::abs(*target - tanh) / tanh);
    expect(*total == 0, "tanh is odd", *total, 0);
  }
  expect(worst_exp < 1.2 * 0x1p-23, "exp within 1.2 ulp", worst_exp * 0x1p23, 1.2);
  expect(worst_tanh < 2.5 * 0x1p-23, "tanh within 2.5 ulp", worst_tanh * 0x1p23, 2.5);
}

// NaN and inf are seen wherever they stand; -inf is a logit without mass.
void check_special(const RowKernels& k) {
  for (int64_t V : {2, 9, 40}) {
    for (int64_t place = 0; place < V; ++place) {
      for (float special : {static_cast<float>(NAN), kInfinity, -kInfinity}) {
        std::vector<float> u(V, 0.5f);
        u[place] = special;
        RowStats got{};
        k.logprob_row(Element::kFloat, u.data(), V, (place + 1) % V, 1, &got);
        expect_close(got.sum, special < 0 ? static_cast<double>(V - 2) : NAN, 1e-6 * V,
                     "sum beside a special number");
      }
    }
  }
}

void check(const LinearKernels* linear, const RowKernels* rows, CpuCapability capability) {
  version = reprdpo::name(capability);
  if (capability > reprdpo::cpu_capability()) {
    std::printf("skipped %s: not on this machine\n", version);
    return;
  }
  for (Element type : {Element::kFloat, Element::kBFloat16, Element::kHalf}) {
    for (const Case& c : kCases) check_linear(*linear, type, c);
    check_columns(*linear, type, 1, 1, 1);
    check_columns(*linear, type, 37, 13, 70);
    check_columns(*linear, type, 0, 2, 3);
    check_groups(*linear, type, 1, 1, 1);
    check_groups(*linear, type, 37, 13, 70);
    check_groups(*linear, type, 9, 200, 5);
    if (rows == nullptr) continue;
    check_logprob_rows(*rows, type);
  }
  if (rows != nullptr) check_functions(*linear, *rows);
  if (rows != nullptr) check_special(*rows);
  std::printf("checked %s\n", version);
}

}  // namespace

int main() {
  check(&portable::linear_kernels(), &portable::row_kernels(), CpuCapability::kPortable);
#ifdef REPRDPO_X86_KERNELS
  check(&avx2::linear_kernels(), &avx2::row_kernels(), CpuCapability::kAvx2);
  check(&avx512::linear_kernels(), &avx512::row_kernels(), CpuCapability::kAvx512);
  check(&avx512bf16::linear_kernels(), nullptr, CpuCapability::kAvx512Bf16);
#endif
  return failures == 0 ? 0 : 1;
}
