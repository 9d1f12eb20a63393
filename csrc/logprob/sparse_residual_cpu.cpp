#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/cpu_capability.h"
#include "logprob/sparse_residual.h"
#include "logprob/token_outputs.h"
#include "ops.h"

namespace reprdpo {
namespace logprob {
namespace {

const SparseKernels& kernels() { return REPRDPO_PICK(sparse_kernels)(); }

// Lists alive at once.
constexpr int64_t kListBytes = int64_t{8} << 20;
// From this part of the vocabulary on the dense product is the faster one.
constexpr int64_t kDensePart = 8;

// What the rounding of float sums of 1024 could add to the mass is taken off first.
MassLevels levels_of(double mass, int64_t vocabulary) {
  MassLevels levels{mass * (1 - 0x1p-9), {}};
  for (int k = 0; k < kMassLevels; ++k) {
    const double power = static_cast<double>(k) / (kMassLevels - 1) - 1;
    levels.level[k] = static_cast<float>(levels.mass * std::pow(static_cast<double>(vocabulary), power));
  }
  return levels;
}

}  // namespace
}  // namespace logprob

std::tuple<Tensor, Tensor> sparse_residual_product_cpu(Tensor residual, Tensor weight, double mass) {
  using namespace logprob;
  check_rows("weight", weight);
  const int64_t n = residual.size(0), V = weight.size(0), D = weight.size(1);
  check_shape("residual", residual, {n, V});
  STD_TORCH_CHECK(residual.scalar_type() == weight.scalar_type() && V > 0,
                  "residual and weight must be of one dtype, and the vocabulary not empty");
  STD_TORCH_CHECK(V == 1 || residual.stride(1) == 1 || n <= 1 || residual.stride(0) == 1,
                  "residual must have its rows or its columns side by side");
  STD_TORCH_CHECK(V <= INT32_MAX && mass > 0 && mass < 1, "mass must be in (0, 1)");
  const Tensor product = torch::stable::new_empty(weight, {n, D});
  const Tensor counts = torch::stable::new_empty(weight, {n}, ScalarType::Long);
  const SparseKernels& k = kernels();
  const Rows weight_rows = rows_of(weight);
  const bool half = weight_rows.type == Element::kHalf;
  const MassLevels levels = levels_of(half ? mass * kHalfResidualScale : mass, V);
  const float scale = half ? 1 / kHalfResidualScale : 1;
  const int64_t element_size = static_cast<int64_t>(weight.element_size());
  const int64_t column_stride = V == 1 ? 1 : residual.stride(1), token_stride = residual.stride(0);
  const char* from = static_cast<const char*>(residual.const_data_ptr());
  char* to = static_cast<char*>(product.mutable_data_ptr());
  int64_t* count = counts.mutable_data_ptr<int64_t>();

  const int64_t room = std::max<int64_t>(16, V / kDensePart), entry_bytes = room * 8;
  const int64_t panels_at_once = std::max<int64_t>(1, kListBytes / (entry_bytes * k.panel_tokens));
  const int64_t group = std::min(panels_at_once * k.panel_tokens, std::max<int64_t>(n, 1));
  // Mostly unused: no large pages.
  const std::unique_ptr<char[]> lists(new char[static_cast<size_t>(group * entry_bytes)]);
  std::vector<Entries> kept(group);
  for (int64_t i = 0; i < group; ++i) {
    char* at = lists.get() + i * entry_bytes;
    kept[i] = {reinterpret_cast<int32_t*>(at), reinterpret_cast<float*>(at + room * 4), room};
  }
  const int64_t at_once = k.sum_columns(weight_rows.type);
  for (int64_t first = 0; first < n; first += group) {
    const int64_t tokens = std::min(group, n - first);
    torch::stable::parallel_for(
        0, (tokens + k.panel_tokens - 1) / k.panel_tokens, 1, [&](int64_t begin, int64_t end) {
          for (int64_t p = begin; p < end; ++p) {
            const int64_t c = p * k.panel_tokens;
            k.keep(weight_rows.type, from + (first + c) * token_stride * element_size, token_stride,
                   column_stride, V, std::min(k.panel_tokens, tokens - c), levels, kept.data() + c,
                   count + first + c);
          }
        });
    // Some columns of the weight for all tokens, so that what several of them keep is in the cache.
    for (int64_t d = 0; d < D; d += at_once) {
      torch::stable::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
        const auto entries = [&](int64_t c) { return c < end ? std::max<int64_t>(count[first + c], 0) : 0; };
        for (int64_t c = begin; c < end; ++c) {
          k.sum_rows(weight_rows, d, std::min(at_once, D - d), kept[c], entries(c),
                     kept[std::min(c + 1, end - 1)], entries(c + 1), scale,
                     to + (first + c) * D * element_size);
        }
      });
    }
  }
  return {product, counts};
}

}  // namespace reprdpo
