// The elements of a residual that hold all but a little of its mass, and the weight's rows they stand for;
// compiled once for each CPU capability.
#include "logprob/kernel_parts.h"
#include "logprob/sparse_residual.h"

namespace reprdpo::logprob::REPRDPO_CAPABILITY {
namespace {

// Tokens side by side: a cache line of half-precision residuals on AVX-512.
constexpr int kPanelVecs = 2;
constexpr int kPanelTokens = kPanelVecs * Vec::kWidth;
// Rows of a residual, or of the weight, that are asked for ahead of their use.
constexpr int64_t kAhead = 8;
constexpr int64_t kPanelAhead = 48;
constexpr int kBins = 128;

// The largest level under which there is no more than the mass.
int level_of(const MassLevels& levels, const double* below) {
  int level = kMassLevels - 1;
  while (level > 0 && !(below[level] <= levels.mass)) --level;
  return level;
}

// Drops what a level finer by kBins than the one of the list still allows; the order stays.
int64_t trim(const MassLevels& levels, int level, double below, const Entries& kept, int64_t count) {
  if (level + 1 == kMassLevels) return count;
  const float low = levels.level[level], high = levels.level[level + 1], per_step = kBins / (high - low);
  const auto bin = [&](float size) {
    const int at = static_cast<int>((size - low) * per_step);
    return at < kBins ? at : kBins - 1;
  };
  double mass[kBins] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(kept.value[i]);
    if (size < high) mass[bin(size)] += size;
  }
  int first = 0;
  for (double left = levels.mass - below; first < kBins && mass[first] <= left; ++first) left -= mass[first];
  int64_t trimmed = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float size = __builtin_fabsf(kept.value[i]);
    if (size < high && bin(size) < first) continue;
    kept.column[trimmed] = kept.column[i];
    kept.value[trimmed++] = kept.value[i];
  }
  return trimmed;
}

// One token, its columns side by side.
template <typename T>
int64_t keep_row(const T* row, int64_t vocabulary, const MassLevels& levels, const Entries& kept) {
  double below[kMassLevels] = {};
  for (int64_t begin = 0; begin < vocabulary; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, vocabulary);
    Vec sums[kMassLevels];
    for (Vec& sum : sums) sum = Vec::zero();
    for (int64_t i = begin; i < end; i += Vec::kWidth) {
      const Vec size = load_up_to(row + i, end - i).magnitude();
      for (int k = 0; k < kMassLevels; ++k) {
        sums[k] = sums[k] + Vec::select_less(size, Vec::broadcast(levels.level[k]), size, Vec::zero());
      }
    }
    for (int k = 0; k < kMassLevels; ++k) below[k] += sums[k].sum();
  }
  const int level = level_of(levels, below);
  const Vec least = Vec::broadcast(levels.level[level]);
  int64_t count = 0;
  for (int64_t i = 0; i < vocabulary; i += Vec::kWidth) {
    uint32_t bits = Vec::not_less(load_up_to(row + i, vocabulary - i).magnitude(), least);
    for (; bits != 0; bits &= bits - 1) {
      if (count == kept.room) return -1;
      const int64_t column = i + __builtin_ctz(bits);
      kept.column[count] = static_cast<int32_t>(column);
      kept.value[count++] = to_float(row[column]);
    }
  }
  return trim(levels, level, below[level], kept, count);
}

// `tokens` <= kPanelTokens of them, side by side. The second pass finds in the cache what the first one read.
template <typename T, bool kWhole>
void keep_panel(const T* residual, int64_t stride, int64_t vocabulary, int64_t tokens,
                const MassLevels& levels, const Entries* kept, int64_t* counts) {
  const auto load = [&](int64_t j, int v) {
    const T* at = residual + j * stride + v * Vec::kWidth;
    if constexpr (kWhole) return Vec::load(at);
    const int64_t count = tokens - v * Vec::kWidth;
    return count <= 0 ? Vec::zero() : load_up_to(at, count);
  };
  double below[kPanelTokens][kMassLevels] = {};
  for (int64_t begin = 0; begin < vocabulary; begin += kChunk) {
    const int64_t end = smaller(begin + kChunk, vocabulary);
    Vec sums[kMassLevels][kPanelVecs];
    for (auto& level : sums) {
      for (Vec& sum : level) sum = Vec::zero();
    }
    for (int64_t j = begin; j < end; ++j) {
      __builtin_prefetch(residual + smaller(j + kPanelAhead, vocabulary - 1) * stride);
      for (int v = 0; v < kPanelVecs; ++v) {
        const Vec size = load(j, v).magnitude();
        for (int k = 0; k < kMassLevels; ++k) {
          sums[k][v] =
              sums[k][v] + Vec::select_less(size, Vec::broadcast(levels.level[k]), size, Vec::zero());
        }
      }
    }
    for (int k = 0; k < kMassLevels; ++k) {
      float lanes[kPanelTokens];
      for (int v = 0; v < kPanelVecs; ++v) sums[k][v].store(lanes + v * Vec::kWidth);
      for (int c = 0; c < kPanelTokens; ++c) below[c][k] += lanes[c];
    }
  }
  int level[kPanelTokens];
  float least[kPanelTokens];
  int64_t found[kPanelTokens] = {};
  for (int c = 0; c < kPanelTokens; ++c) {
    level[c] = level_of(levels, below[c]);
    least[c] = c < tokens ? levels.level[level[c]] : kInfinity;
  }
  for (int64_t j = 0; j < vocabulary; ++j) {
    __builtin_prefetch(residual + smaller(j + kPanelAhead, vocabulary - 1) * stride);
    for (int v = 0; v < kPanelVecs; ++v) {
      uint32_t bits = Vec::not_less(load(j, v).magnitude(), Vec::load(least + v * Vec::kWidth));
      for (; bits != 0; bits &= bits - 1) {
        const int c = v * Vec::kWidth + __builtin_ctz(bits);
        if (found[c] == kept[c].room) {
          least[c] = kInfinity;  // too many: look no further
          found[c] = -1;
        }
        if (found[c] < 0) continue;
        kept[c].column[found[c]] = static_cast<int32_t>(j);
        kept[c].value[found[c]++] = to_float(residual[j * stride + c]);
      }
    }
  }
  for (int64_t c = 0; c < tokens; ++c) {
    counts[c] = found[c] < 0 ? -1 : trim(levels, level[c], below[c][level[c]], kept[c], found[c]);
  }
}

void keep(Element type, const void* residual, int64_t token_stride, int64_t column_stride, int64_t vocabulary,
          int64_t tokens, const MassLevels& levels, const Entries* kept, int64_t* counts) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(residual);
    if (column_stride == 1) {
      for (int64_t c = 0; c < tokens; ++c) {
        counts[c] = keep_row(from + c * token_stride, vocabulary, levels, kept[c]);
      }
    } else if (tokens == kPanelTokens) {
      keep_panel<T, true>(from, column_stride, vocabulary, tokens, levels, kept, counts);
    } else {
      keep_panel<T, false>(from, column_stride, vocabulary, tokens, levels, kept, counts);
    }
  });
}

// Sums that stay in registers: 16 of AVX-512's, 8 elsewhere.
template <typename T>
constexpr int kSumVecs = Vec::kWidth == 16 && sizeof(T) == 2 ? 16 : 8;

int64_t sum_columns(Element type) {
  return with_type(type, [](auto element) -> int64_t { return kSumVecs<decltype(element)> * Vec::kWidth; });
}

template <typename T>
void sum_type(const T* weight, int64_t stride, int64_t columns, const Entries& kept, int64_t count,
              const Entries& next, int64_t next_count, float scale, T* out) {
  constexpr int kVecs = kSumVecs<T>;
  if (columns == kVecs * Vec::kWidth) {
    Vec sums[kVecs];
    for (Vec& sum : sums) sum = Vec::zero();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t beyond = i + kAhead - count;
      if (beyond < next_count) {
        const T* ahead = weight + (beyond < 0 ? kept.column[i + kAhead] : next.column[beyond]) * stride;
        for (int64_t d = 0; d < columns; d += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(ahead + d);
      }
      const T* row = weight + kept.column[i] * stride;
      const Vec factor = Vec::broadcast(kept.value[i]);
      for (int v = 0; v < kVecs; ++v) {
        sums[v] = Vec::multiply_add(factor, Vec::load(row + v * Vec::kWidth), sums[v]);
      }
    }
    for (int v = 0; v < kVecs; ++v) (sums[v] * Vec::broadcast(scale)).store(out + v * Vec::kWidth);
    return;
  }
  for (int64_t d = 0; d < columns; d += Vec::kWidth) {
    Vec sum = Vec::zero();
    for (int64_t i = 0; i < count; ++i) {
      const Vec row = load_up_to(weight + kept.column[i] * stride + d, columns - d);
      sum = Vec::multiply_add(Vec::broadcast(kept.value[i]), row, sum);
    }
    store_up_to(sum * Vec::broadcast(scale), out + d, columns - d);
  }
}

void sum_rows(const Rows& weight, int64_t first, int64_t columns, const Entries& kept, int64_t count,
              const Entries& next, int64_t next_count, float scale, void* out) {
  with_type(weight.type, [&](auto element) {
    using T = decltype(element);
    sum_type(static_cast<const T*>(weight.data) + first, weight.stride, columns, kept, count, next,
             next_count, scale, static_cast<T*>(out) + first);
  });
}

}  // namespace

const SparseKernels& sparse_kernels() {
  static constexpr SparseKernels kernels{kPanelTokens, keep, sum_columns, sum_rows};
  return kernels;
}

}  // namespace reprdpo::logprob::REPRDPO_CAPABILITY
