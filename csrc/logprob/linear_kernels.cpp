// The head's product and the softmax over it, block by block; compiled once for each CPU capability.
#include "logprob/kernel_parts.h"

namespace reprdpo::logprob::REPRDPO_CAPABILITY {
namespace {

// A tile of 6 rows by a panel's vectors is summed in registers: 24 + 4 + 1 of AVX-512's 32, 12 + 2 + 1 of
// AVX2's 16.
constexpr int kTileRows = 6;
#if defined(REPRDPO_CAPABILITY_AVX512)
constexpr int kPanelVecs = 4;
#else
constexpr int kPanelVecs = 2;
#endif
constexpr int64_t kPanel = kPanelVecs * Vec::kWidth;
static_assert(kBlockRows % kTileRows == 0);

// Steps of the depth that are summed at once: their part of a panel stays in the second-level cache, and
// partial sums keep the rounding error small.
template <typename Op>
constexpr int64_t kStepBlock = Op::kDepth == 1 ? 256 : 512;

struct FloatOp {
  using Unit = float;
  using Register = Vec;
  static constexpr int kDepth = 1;
  static Vec broadcast(const char* from) {
    float unit;
    memcpy(&unit, from, sizeof unit);
    return Vec::broadcast(unit);
  }
  static Vec load(const Unit* from) { return Vec::load(from); }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return Vec::multiply_add(a, b, sum); }
};

template <typename T>
struct OpOf {
  using type = FloatOp;
};

#if defined(REPRDPO_CAPABILITY_AVX512BF16)
// Two neighbours of the depth in 32 bits: their products are added in float.
struct PairOp {
  using Unit = uint32_t;
  using Register = __m512bh;
  static constexpr int kDepth = 2;
  static Register broadcast(const char* from) {
    uint32_t unit;
    memcpy(&unit, from, sizeof unit);
    return (Register)_mm512_set1_epi32(static_cast<int>(unit));
  }
  static Register load(const Unit* from) { return (Register)_mm512_loadu_si512(from); }
  static Vec multiply_add(Register a, Register b, Vec sum) { return {_mm512_dpbf16_ps(sum.value, a, b)}; }
};
template <>
struct OpOf<BFloat16> {
  using type = PairOp;
};
#endif

template <typename Op>
int64_t steps_of(int64_t depth) {
  return (depth + Op::kDepth - 1) / Op::kDepth;
}

// Rows that lie in memory as the tile reads them: no conversion, and whole units.
template <typename T>
bool read_in_place(const Rows& rows) {
  using Op = typename OpOf<T>::type;
  return sizeof(T) * Op::kDepth == sizeof(typename Op::Unit) && rows.depth % Op::kDepth == 0;
}

int64_t panel_bytes(Element type, int64_t depth) {
  return with_type(type, [&](auto element) -> int64_t {
    using Op = typename OpOf<decltype(element)>::type;
    return steps_of<Op>(depth) * kPanel * static_cast<int64_t>(sizeof(typename Op::Unit));
  });
}

int64_t scratch_bytes(const Rows& rows) {
  return with_type(rows.type, [&](auto element) -> int64_t {
    using T = decltype(element);
    using Op = typename OpOf<T>::type;
    if (read_in_place<T>(rows)) return 0;
    return kBlockRows * steps_of<Op>(rows.depth) * static_cast<int64_t>(sizeof(typename Op::Unit));
  });
}

inline void set_unit(float value, int, float* unit) { *unit = value; }
inline void set_unit(BFloat16 value, int place, uint32_t* unit) {
  memcpy(reinterpret_cast<char*>(unit) + place * sizeof value, &value, sizeof value);
}
template <typename T>
inline void set_unit(T value, int place, float* unit) {
  set_unit(to_float(value), place, unit);
}

// One row as the tile reads it, the unfinished unit at its end filled with 0.
template <typename T>
void convert_row(const T* row, int64_t depth, typename OpOf<T>::type::Unit* units, int64_t unit_stride) {
  using Op = typename OpOf<T>::type;
  for (int64_t step = 0; step < steps_of<Op>(depth); ++step) {
    typename Op::Unit unit = 0;
    for (int place = 0; place < Op::kDepth && step * Op::kDepth + place < depth; ++place) {
      set_unit(row[step * Op::kDepth + place], place, &unit);
    }
    units[step * unit_stride] = unit;
  }
}

void pack_rows(const Rows& rows, int64_t first, int64_t count, void* panel) {
  if (rows.depth == 0) return;
  memset(panel, 0, static_cast<size_t>(panel_bytes(rows.type, rows.depth)));
  with_type(rows.type, [&](auto element) {
    using T = decltype(element);
    using Unit = typename OpOf<T>::type::Unit;
    const T* from = static_cast<const T*>(rows.data) + first * rows.stride;
    for (int64_t c = 0; c < count; ++c) {
      convert_row(from + c * rows.stride, rows.depth, static_cast<Unit*>(panel) + c, kPanel);
    }
  });
}

// The units of rows k and, where a unit holds two, k + 1; `second` is null beyond the last row.
inline void join_rows(const float* row, const float*, int64_t count, float* units) {
  memcpy(units, row, static_cast<size_t>(count) * sizeof(float));
}
inline void join_rows(const BFloat16* row, const BFloat16* second, int64_t count, uint32_t* units) {
  for (int64_t c = 0; c < count; ++c) {
    units[c] = row[c].bits | (second == nullptr ? 0 : static_cast<uint32_t>(second[c].bits) << 16);
  }
}
template <typename T>
inline void join_rows(const T* row, const T*, int64_t count, float* units) {
  int64_t c = 0;
  for (; c + Vec::kWidth <= count; c += Vec::kWidth) Vec::load(row + c).store(units + c);
  for (; c < count; ++c) units[c] = to_float(row[c]);
}

// A row times a number, in the dtype that is multiplied: float, or bf16 where it is multiplied as such.
template <typename From, typename To>
void scale_row(const From* row, int64_t count, float scale, To* scaled) {
  int64_t c = 0;
  const Vec factor = Vec::broadcast(scale);
  for (; c + Vec::kWidth <= count; c += Vec::kWidth) (Vec::load(row + c) * factor).store(scaled + c);
  for (; c < count; ++c) from_float(to_float(row[c]) * scale, scaled + c);
}

void pack_columns(const Rows& rows, int64_t depth, const float* scale, int64_t first, int64_t count,
                  void* panel) {
  if (depth == 0) return;
  with_type(rows.type, [&](auto element) {
    using T = decltype(element);
    using Op = typename OpOf<T>::type;
    auto* units = static_cast<typename Op::Unit*>(panel);
    if (count < kPanel) memset(panel, 0, static_cast<size_t>(panel_bytes(rows.type, depth)));
    for (int64_t k = 0; k < depth; k += Op::kDepth, units += kPanel) {
      const T* row = static_cast<const T*>(rows.data) + k * rows.stride + first;
      const T* second = k + 1 < depth ? row + rows.stride : nullptr;
      if (scale == nullptr) {
        join_rows(row, second, count, units);
      } else if constexpr (Op::kDepth == 1) {
        scale_row(row, count, scale[k], units);
      } else {
        T scaled[2][kPanel];
        scale_row(row, count, scale[k], scaled[0]);
        if (second != nullptr) scale_row(second, count, scale[k + 1], scaled[1]);
        join_rows(scaled[0], second == nullptr ? nullptr : scaled[1], count, units);
      }
    }
  });
}

int64_t group_bytes(Element type, int64_t depth, int64_t columns) {
  return (columns + kTileRows - 1) / kTileRows * kTileRows * (panel_bytes(type, depth) / kPanel);
}

void pack_groups(const Rows& rows, int64_t depth, int64_t columns, void* groups) {
  with_type(rows.type, [&](auto element) {
    using T = decltype(element);
    using Op = typename OpOf<T>::type;
    using Unit = typename Op::Unit;
    constexpr int64_t kChunk = 16 * kTileRows;
    const int64_t steps = steps_of<Op>(depth);
    for (int64_t step = 0; step < steps; ++step) {
      const T* row = static_cast<const T*>(rows.data) + step * Op::kDepth * rows.stride;
      const T* second = step * Op::kDepth + 1 < depth ? row + rows.stride : nullptr;
      for (int64_t c = 0; c < columns; c += kChunk) {
        Unit joined[kChunk] = {};
        const int64_t count = smaller(kChunk, columns - c);
        join_rows(row + c, second == nullptr ? nullptr : second + c, count, joined);
        for (int64_t i = 0; i < count; i += kTileRows) {
          memcpy(static_cast<Unit*>(groups) + ((c + i) / kTileRows * steps + step) * kTileRows, joined + i,
                 kTileRows * sizeof(Unit));
        }
      }
    }
  });
}

template <typename Op, int kVecs>
void multiply_tile(const char* const* rows, int64_t step_bytes, const typename Op::Unit* panel, int64_t steps,
                   bool first, float* out) {
  Vec sums[kTileRows][kVecs];
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      sums[r][v] = Vec::zero();
    }
  }
  const char* at[kTileRows];
  for (int r = 0; r < kTileRows; ++r) at[r] = rows[r];
  for (int64_t step = 0; step < steps; ++step) {
    typename Op::Register columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = Op::load(panel + step * kPanel + v * Vec::kWidth);
    for (int r = 0; r < kTileRows; ++r) {
      const typename Op::Register weight = Op::broadcast(at[r] + step * step_bytes);
      for (int v = 0; v < kVecs; ++v) sums[r][v] = Op::multiply_add(weight, columns[v], sums[r][v]);
    }
  }
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* to = out + r * kPanel + v * Vec::kWidth;
      (first ? sums[r][v] : sums[r][v] + Vec::load(to)).store(to);
    }
  }
}

template <typename Op>
void multiply_tile(const char* const* rows, int64_t step_bytes, const typename Op::Unit* panel, int64_t steps,
                   bool first, int64_t columns, float* out) {
  static_assert(kPanelVecs == 2 || kPanelVecs == 4);
  switch ((columns + Vec::kWidth - 1) / Vec::kWidth) {
    case 1:
      return multiply_tile<Op, 1>(rows, step_bytes, panel, steps, first, out);
    case 2:
      return multiply_tile<Op, 2>(rows, step_bytes, panel, steps, first, out);
    case 3:
      if constexpr (kPanelVecs > 2) return multiply_tile<Op, 3>(rows, step_bytes, panel, steps, first, out);
      return;
    case 4:
      if constexpr (kPanelVecs > 2) return multiply_tile<Op, 4>(rows, step_bytes, panel, steps, first, out);
  }
}

template <typename T>
void multiply_type(const Rows& rows, int64_t first, int64_t count, const void* panels, int64_t columns,
                   void* scratch, float* logits) {
  using Op = typename OpOf<T>::type;
  using Unit = typename Op::Unit;
  const int64_t steps = steps_of<Op>(rows.depth);
  const char* data = static_cast<const char*>(rows.data) + first * rows.stride * sizeof(T);
  int64_t stride = rows.stride * sizeof(T);
  if (!read_in_place<T>(rows)) {
    for (int64_t r = 0; r < count; ++r) {
      const T* row = static_cast<const T*>(rows.data) + (first + r) * rows.stride;
      if constexpr (Op::kDepth == 1) {
        join_rows(row, row, rows.depth, static_cast<Unit*>(scratch) + r * steps);
      } else {
        convert_row(row, rows.depth, static_cast<Unit*>(scratch) + r * steps, 1);
      }
    }
    data = static_cast<const char*>(scratch);
    stride = steps * sizeof(Unit);
  }
  int64_t begin = 0;
  do {
    const int64_t block = smaller(kStepBlock<Op>, steps - begin);
    for (int64_t c = 0; c < columns; c += kPanel) {
      const Unit* panel = static_cast<const Unit*>(panels) + c * steps + begin * kPanel;
      for (int64_t r = 0; r < count; r += kTileRows) {
        const char* tile[kTileRows];
        for (int i = 0; i < kTileRows; ++i) {
          tile[i] = data + smaller(r + i, count - 1) * stride + begin * sizeof(Unit);
        }
        float* out = logits + (c / kPanel * kBlockRows + r) * kPanel;
        multiply_tile<Op>(tile, sizeof(Unit), panel, block, begin == 0, smaller(kPanel, columns - c), out);
      }
    }
    begin += block;
  } while (begin < steps);
}

void multiply(const Rows& rows, int64_t first, int64_t count, const void* panels, int64_t columns,
              void* scratch, float* logits) {
  with_type(rows.type, [&](auto element) {
    multiply_type<decltype(element)>(rows, first, count, panels, columns, scratch, logits);
  });
}

void multiply_groups(Element type, const void* groups, int64_t count, int64_t depth, const void* panel,
                     bool first, int64_t columns, float* sums) {
  with_type(type, [&](auto element) {
    using Op = typename OpOf<decltype(element)>::type;
    using Unit = typename Op::Unit;
    const int64_t steps = steps_of<Op>(depth), step_bytes = kTileRows * sizeof(Unit);
    for (int64_t r = 0; r < count; r += kTileRows) {
      const char* tile[kTileRows];
      for (int i = 0; i < kTileRows; ++i) {
        tile[i] = static_cast<const char*>(groups) + r / kTileRows * steps * step_bytes + i * sizeof(Unit);
      }
      multiply_tile<Op>(tile, step_bytes, static_cast<const Unit*>(panel), steps, first, columns,
                        sums + r * kPanel);
    }
  });
}

// Visits the vectors of a panel's tokens together, or one at a time where the panel is not full.
template <typename Visit>
void for_vectors(int64_t columns, const Visit& visit) {
  if (columns > kPanel - Vec::kWidth) {
    visit.template operator()<kPanelVecs>(0);
  } else {
    for (int64_t c = 0; c < columns; c += Vec::kWidth) visit.template operator()<1>(c);
  }
}

// z, its maximum and sum, over u.
template <int kVecs>
void transform_columns(float* logits, int64_t count, const float* bias, Transform transform, float* most,
                       float* total) {
  Vec highest[kVecs], sums[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    highest[v] = Vec::broadcast(-kInfinity);
    sums[v] = Vec::zero();
  }
  const Vec scale = Vec::broadcast(transform.scale), cap = Vec::broadcast(transform.cap);
  for (int64_t r = 0; r < count; ++r) {
    const Vec b = Vec::broadcast(bias == nullptr ? 0.0f : bias[r]);
    for (int v = 0; v < kVecs; ++v) {
      float* at = logits + r * kPanel + v * Vec::kWidth;
      Vec z = (Vec::load(at) + b) * scale;
      if (transform.cap != 0) z = tanh(z) * cap;
      z.store(at);
      highest[v] = Vec::max(z, highest[v]);
      sums[v] = sums[v] + z;
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    highest[v].store(most + v * Vec::kWidth);
    if (total != nullptr) sums[v].store(total + v * Vec::kWidth);
  }
}

// Each label's logit, which then leaves the block.
void take_targets(float* logits, int64_t first, int64_t count, int64_t columns, PanelLabels labels) {
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t row = labels.label[c] - first;
    if (labels.label[c] < 0 || row < 0 || row >= count) continue;
    float* at = logits + row * kPanel + c;
    labels.target[c] = *at;
    if (labels.leads != nullptr) {
      labels.leads[c] = 1;
      for (int64_t r = 0; r < row; ++r) {
        if (logits[r * kPanel + c] >= *at) labels.leads[c] = 0;
      }
    }
    *at = -kInfinity;
  }
}

// e (z - most) for its sum; where e is 0, z may be -inf.
inline Vec add_entropy(Vec e, Vec below_most, Vec sum) {
  return Vec::multiply_add(e, Vec::max(Vec::broadcast(-100.0f), below_most), sum);
}

// e (1 - tanh^2) of a capped z; where e is 0, z may be -inf.
inline Vec times_slope(Vec e, Vec z, Vec inverse_cap) {
  const Vec t = z * inverse_cap, slope = Vec::broadcast(1.0f) - t * t;
  return Vec::select_less(Vec::zero(), e, e * slope, e);
}

template <int kVecs, bool kEntropy>
void exponentiate_columns(float* logits, int64_t count, Transform transform, Wanted wanted, const float* most,
                          float* sum, float* entr) {
  Vec origin[kVecs], sums[kVecs], entrs[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    // A block of -inf alone, which has no maximum to subtract, sums to 0.
    origin[v] = Vec::max(Vec::load(most + v * Vec::kWidth), Vec::broadcast(kLowest));
    sums[v] = entrs[v] = Vec::zero();
  }
  const Vec inverse_cap = Vec::broadcast(transform.cap != 0 ? 1 / transform.cap : 0);
  for (int64_t r = 0; r < count; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* at = logits + r * kPanel + v * Vec::kWidth;
      const Vec z = Vec::load(at), x = z - origin[v];
      Vec e = exp_nonpositive(x);
      sums[v] = sums[v] + e;
      if (kEntropy) entrs[v] = add_entropy(e, x, entrs[v]);
      if (!wanted.residual) continue;
      if (transform.cap != 0) e = times_slope(e, z, inverse_cap);
      e.store(at);
    }
  }
  for (int v = 0; v < kVecs; ++v) {
    sums[v].store(sum + v * Vec::kWidth);
    if (kEntropy) entrs[v].store(entr + v * Vec::kWidth);
  }
}

void softmax_block(float* logits, int64_t first, int64_t count, int64_t columns, const float* bias,
                   Transform transform, Wanted wanted, PanelLabels labels, BlockStats stats) {
  for_vectors(columns, [&]<int kVecs>(int64_t c) {
    transform_columns<kVecs>(logits + c, count, bias, transform, stats.most + c,
                             wanted.stats ? stats.total + c : nullptr);
  });
  take_targets(logits, first, count, columns, labels);
  for_vectors(columns, [&]<int kVecs>(int64_t c) {
    if (wanted.entropy) {
      exponentiate_columns<kVecs, true>(logits + c, count, transform, wanted, stats.most + c, stats.sum + c,
                                        stats.entr + c);
    } else {
      exponentiate_columns<kVecs, false>(logits + c, count, transform, wanted, stats.most + c, stats.sum + c,
                                         nullptr);
    }
  });
}

void merge_blocks(int64_t blocks, int64_t stride, int64_t columns, Wanted wanted, BlockStats each,
                  BlockStats merged) {
  const Vec lowest = Vec::broadcast(kLowest);
  for (int64_t c = 0; c < columns; c += Vec::kWidth) {
    Vec most = Vec::broadcast(-kInfinity);
    for (int64_t b = 0; b < blocks; ++b) most = Vec::max(Vec::load(each.most + b * stride + c), most);
    const Vec origin = Vec::max(most, lowest);
    Vec sum = Vec::zero(), entr = Vec::zero(), total = Vec::zero();
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c;
      const Vec below = Vec::max(Vec::load(each.most + at), lowest) - origin;
      const Vec share = exp_nonpositive(below), block_sum = Vec::load(each.sum + at);
      sum = Vec::multiply_add(share, block_sum, sum);
      if (wanted.entropy) {
        const Vec shifted = Vec::multiply_add(Vec::max(lowest, below), block_sum, Vec::load(each.entr + at));
        entr = Vec::multiply_add(share, shifted, entr);
      }
      if (wanted.stats) total = total + Vec::load(each.total + at);
    }
    most.store(merged.most + c);
    sum.store(merged.sum + c);
    if (wanted.entropy) entr.store(merged.entr + c);
    if (wanted.stats) total.store(merged.total + c);
    if (!wanted.residual) continue;
    // Where nothing but the label has any mass the residual is the label's alone.
    const Vec inverse =
        Vec::select_less(sum, Vec::broadcast(kSmallestNormal), Vec::zero(), Vec::broadcast(-1.0f) / sum);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * stride + c;
      const Vec share = exp_nonpositive(Vec::max(Vec::load(each.most + at), lowest) - origin);
      (share * inverse).store(each.sum + at);
    }
  }
}

template <typename T>
void residual_type(const float* logits, int64_t first, int64_t count, int64_t columns, const float* factor,
                   Transform transform, PanelLabels labels, float scale, T* residual, int64_t stride) {
  const int64_t whole = columns - columns % Vec::kWidth;
  for (int64_t r = 0; r < count; ++r) {
    T* to = residual + r * stride;
    const float* from = logits + r * kPanel;
    for (int64_t c = 0; c < whole; c += Vec::kWidth) {
      (Vec::load(from + c) * (Vec::load(factor + c) * Vec::broadcast(scale))).store(to + c);
    }
    if (whole == columns) continue;
    const Vec last = Vec::load(from + whole) * (Vec::load(factor + whole) * Vec::broadcast(scale));
    store_partial(last, to + whole, columns - whole);
  }
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t row = labels.label[c] - first;
    if (labels.label[c] < 0 || row < 0 || row >= count) continue;
    const float t = transform.cap != 0 ? labels.target[c] / transform.cap : 0;
    from_float(scale * (1 - t * t), residual + row * stride + c);
  }
}

void residual_block(const float* logits, int64_t first, int64_t count, int64_t columns, const float* factor,
                    Transform transform, PanelLabels labels, Element type, void* residual, int64_t stride) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    residual_type(logits, first, count, columns, factor, transform, labels,
                  type == Element::kHalf ? kHalfResidualScale : 1.0f, static_cast<T*>(residual), stride);
  });
}

void store_block(const float* logits, int64_t count, int64_t columns, const float* scale, bool accumulate,
                 Element type, void* out, int64_t stride) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t whole = columns - columns % Vec::kWidth, rest = columns - whole;
    for (int64_t r = 0; r < count; ++r) {
      T* to = static_cast<T*>(out) + r * stride;
      const float* from = logits + r * kPanel;
      const Vec factor = Vec::broadcast(scale == nullptr ? 1.0f : scale[r]);
      for (int64_t c = 0; c < whole; c += Vec::kWidth) {
        const Vec sum = Vec::load(from + c) * factor;
        (accumulate ? sum + Vec::load(to + c) : sum).store(to + c);
      }
      if (rest == 0) continue;
      const Vec sum = Vec::load(from + whole) * factor;
      store_partial(accumulate ? sum + load_partial(to + whole, rest) : sum, to + whole, rest);
    }
  });
}

}  // namespace

const LinearKernels& linear_kernels() {
  static constexpr LinearKernels kernels{
      kPanel,   panel_bytes,     scratch_bytes, group_bytes,  pack_rows,      pack_columns, pack_groups,
      multiply, multiply_groups, softmax_block, merge_blocks, residual_block, store_block};
  return kernels;
}

}  // namespace reprdpo::logprob::REPRDPO_CAPABILITY
