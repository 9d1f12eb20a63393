#include "common/device.cuh"
#include "probe_reward/probe_reward_cuda.h"

namespace reprdpo::probe_reward {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Blocks on a multiprocessor: leaves a thread 128 registers, so that nothing spills.
constexpr int kResident = 2;
__device__ unsigned arrival_counters[kArrivals];

__device__ int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ float sigmoid(float logit) { return 1.0f / (1.0f + expf(-logit)); }
__device__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

// The row that sequence b reads, -1 where the index points nowhere.
__device__ int64_t token_of(const DeviceIndex& at, int64_t b) {
  const int64_t token = at.index == nullptr ? 0 : at.index[b];
  return token >= 0 && token < at.tokens ? token : -1;
}

// Whether this block is the last of `expected` to come here; the counter is then zero again. What every block
// wrote before is visible to the last one, through L2 (__ldcg).
__device__ bool last_to_arrive(unsigned* counter, unsigned expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, expected - 1) == expected - 1;
  __syncthreads();
  __threadfence();
  return last;
}

template <typename T>
__device__ Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

// Both dot products of kRows rows with the weights of one layer, this thread's share of them; a null row is
// left out.
template <typename T, int kRows, bool kGate>
__device__ void dots_of_vectors(const T* const (&row)[kRows], T* const (&saved)[kRows], const float* probe,
                                const float* gate, int dim, float (&score)[kRows], float (&logit)[kRows]) {
  constexpr int kWidth = Vector<T>::kWidth, kFloats = Vector<float>::kWidth;
  // Two steps in flight, but not at the price of registers that four rows need.
#pragma unroll(kRows > 2 ? 1 : 2)
  for (int i = static_cast<int>(threadIdx.x) * kWidth; i < dim; i += kThreads * kWidth) {
    Vector<T> h[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) h[r] = row[r] != nullptr ? load(row[r] + i) : Vector<T>{};
    Vector<float> w[kWidth / kFloats], v[kWidth / kFloats];
#pragma unroll
    for (int k = 0; k < kWidth / kFloats; ++k) {
      w[k] = load(probe + i + k * kFloats);
      if (kGate) v[k] = load(gate + i + k * kFloats);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (saved[r] != nullptr) *reinterpret_cast<Vector<T>*>(saved[r] + i) = h[r];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float element = to_float(h[r].at[k]);
        score[r] = fmaf(element, w[k / kFloats].at[k % kFloats], score[r]);
        if (kGate) logit[r] = fmaf(element, v[k / kFloats].at[k % kFloats], logit[r]);
      }
    }
  }
}

// The same for one row whose elements lie anywhere.
template <typename T, bool kGate>
__device__ void dots_of_elements(const T* row, int64_t stride, T* saved, const float* probe,
                                 const float* gate, int dim, float& score, float& logit) {
  if (row == nullptr) return;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads) {
    const T h = row[static_cast<int64_t>(i) * stride];
    if (saved != nullptr) saved[i] = h;
    score = fmaf(to_float(h), probe[i], score);
    if (kGate) logit = fmaf(to_float(h), gate[i], logit);
  }
}

// Where the index points nowhere, the saved row is NaN: all bits set is one in every type.
template <typename T>
__device__ void save_nothing(T* saved, int dim) {
  T element;
  from_float(not_a_number(), element);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads) saved[i] = element;
}

// One warp, one sequence: logits (or the bias) to g, and the reward. softmax and static gates.
__device__ void mix_by_softmax(const ForwardArguments& a, int64_t b) {
  const float* scores = a.scores + b * a.L;
  float* gate = a.gate_values + b * a.L;
  const auto logit = [&](int l) { return a.gate == Gate::kStatic ? a.gate_bias[l] : __ldcg(gate + l); };
  float most = -INFINITY;
  for (int l = lane(); l < a.L; l += kWarpSize) most = fmaxf(most, logit(l));
  most = warp_max(most);
  float total = 0;
  for (int l = lane(); l < a.L; l += kWarpSize) total += expf(logit(l) - most);
  total = warp_sum(total);
  float reward = 0;
  for (int l = lane(); l < a.L; l += kWarpSize) {
    const float g = expf(logit(l) - most) / total;
    gate[l] = g;
    reward = fmaf(g, __ldcg(scores + l), reward);
  }
  reward = warp_sum(reward);
  if (lane() == 0) a.reward[b] = reward;
}

// The whole block: g = sigmoid(V s + c) of the sequences [first, end), then their rewards.
__device__ void mix_by_vote(const ForwardArguments& a, int64_t first, int64_t end) {
  for (int64_t item = warp(); item < (end - first) * a.L; item += kWarps) {
    const int64_t b = first + item / a.L;
    const int l = static_cast<int>(item % a.L);
    float logit = 0;
    for (int j = lane(); j < a.L; j += kWarpSize) {
      logit = fmaf(a.gate_weight[static_cast<int64_t>(l) * a.L + j], __ldcg(a.scores + b * a.L + j), logit);
    }
    logit = warp_sum(logit);
    if (lane() == 0) a.gate_values[b * a.L + l] = sigmoid(logit + a.gate_bias[l]);
  }
  __syncthreads();
  for (int64_t b = first + warp(); b < end; b += kWarps) {
    float reward = 0;
    for (int l = lane(); l < a.L; l += kWarpSize) {
      reward = fmaf(a.gate_values[b * a.L + l], __ldcg(a.scores + b * a.L + l), reward);
    }
    reward = warp_sum(reward);
    if (lane() == 0) a.reward[b] = reward;
  }
}

// The whole block: gamma of every pair.
__device__ void write_confidence(const ForwardArguments& a) {
  __shared__ float partial[kWarps];
  const DeviceConfidence& options = a.confidence;
  const int64_t P = a.B / 2;
  float total = 0;
  for (int64_t p = threadIdx.x; p < P; p += kThreads) {
    float chosen = __ldcg(a.reward + p), rejected = __ldcg(a.reward + P + p);
    if (options.squash) chosen = sigmoid(chosen), rejected = sigmoid(rejected);
    float gamma = sigmoid(options.alpha * (chosen - rejected));
    if (options.has_floor && gamma < options.floor) gamma = options.floor;
    if (!options.reduce_batch) options.gamma[p] = gamma;
    total += gamma;
  }
  if (!options.reduce_batch) return;
  total = warp_sum(total);
  if (lane() == 0) partial[warp()] = total;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += partial[w];
  for (int64_t p = threadIdx.x; p < P; p += kThreads) options.gamma[p] = total / P;
}

template <typename T, int kRows, bool kVectors, bool kGate>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const __grid_constant__ ForwardArguments a) {
  __shared__ float partial[2 * kRows][kWarps];
  const int layer = static_cast<int>(blockIdx.x % a.launch_layers), l = a.first_layer + layer;
  const int64_t group = blockIdx.x / a.launch_layers, first = group * kRows;
  const int64_t end = first + kRows < a.B ? first + kRows : a.B;
  const T* row[kRows];
  T* saved[kRows];
  float score[kRows] = {}, logit[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t b = first + r, token = b < end ? token_of(a.at, b) : -1;
    const T* data = static_cast<const T*>(a.layers[layer]) + b * a.sequence_stride + token * a.token_stride;
    row[r] = token >= 0 ? data : nullptr;
    saved[r] = a.pooled != nullptr && b < end ? static_cast<T*>(a.pooled) + (b * a.L + l) * a.D : nullptr;
    if (saved[r] != nullptr && row[r] == nullptr) {
      save_nothing(saved[r], a.D);
      saved[r] = nullptr;
    }
  }
  const float* probe = a.probe_weight + static_cast<int64_t>(l) * a.D;
  const float* gate = kGate ? a.gate_weight + static_cast<int64_t>(l) * a.D : nullptr;
  if constexpr (kVectors) {
    dots_of_vectors<T, kRows, kGate>(row, saved, probe, gate, a.D, score, logit);
  } else {
    static_assert(kRows == 1);
    dots_of_elements<T, kGate>(row[0], a.element_stride, saved[0], probe, gate, a.D, score[0], logit[0]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = warp_sum(score[r]), other = kGate ? warp_sum(logit[r]) : 0.0f;
    if (lane() == 0) partial[r][warp()] = sum;
    if (lane() == 0) partial[kRows + r][warp()] = other;
  }
  __syncthreads();
  const int64_t b = first + threadIdx.x % kRows;
  if (threadIdx.x < 2 * kRows && b < end) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[threadIdx.x][w];
    if (token_of(a.at, b) < 0) sum = not_a_number();
    if (threadIdx.x < kRows) {
      a.scores[b * a.L + l] = sum + a.probe_bias[l];
    } else if (kGate) {
      a.gate_values[b * a.L + l] = sum + a.gate_bias[l];
    }
  }
  if (!last_to_arrive(a.arrivals + group, a.L)) return;
  if (a.gate == Gate::kVote) {
    mix_by_vote(a, first, end);
  } else if (first + warp() < end) {
    mix_by_softmax(a, first + warp());
  }
  if (a.confidence.gamma == nullptr) return;
  const int64_t groups = (a.B + kRows - 1) / kRows;
  if (last_to_arrive(a.arrivals + groups, static_cast<unsigned>(groups))) write_confidence(a);
}

// Backward

struct Slope {
  float score, logit;
};

// One warp: d and dz of a (sequence, layer), the same in every lane.
__device__ Slope slope_of(const BackwardArguments& a, int64_t b, int l) {
  const float* scores = a.scores + b * a.L;
  const float* gate = a.gate_values + b * a.L;
  const float grad_reward = a.upstream.reward.at(b, 0);
  const auto by_gate = [&](int j) { return fmaf(grad_reward, scores[j], a.upstream.gate.at(b, j)); };
  Slope slope{fmaf(grad_reward, gate[l], a.upstream.scores.at(b, l)), 0.0f};
  float sum = 0;
  if (a.gate == Gate::kVote) {
    const auto by_logit = [&](int j) { return gate[j] * (1.0f - gate[j]) * by_gate(j); };
    for (int j = lane(); j < a.L; j += kWarpSize) {
      sum = fmaf(by_logit(j), a.gate_weight[static_cast<int64_t>(j) * a.L + l], sum);
    }
    slope.score += warp_sum(sum);
    slope.logit = by_logit(l);
  } else {
    for (int j = lane(); j < a.L; j += kWarpSize) sum = fmaf(gate[j], by_gate(j), sum);
    slope.logit = gate[l] * (by_gate(l) - warp_sum(sum));
  }
  return slope;
}

// The sequences whose slopes a block holds at a time, and the threads that share a column.
constexpr int kTile = 32;
constexpr int kColumnThreads = 64;
constexpr int kGroups = kThreads / kColumnThreads;
// Rows that a thread has in flight.
constexpr int kAhead = 4;

template <typename T>
constexpr int kColumns = kColumnThreads * Vector<T>::kWidth;

// d and dz of a tile of sequences in one layer; zero where the index points nowhere.
struct Tile {
  float score[kTile], logit[kTile];
  bool present[kTile];
};

__device__ void fill(Tile& tile, const BackwardArguments& a, int64_t begin, int count, int l) {
#pragma unroll 1
  for (int t = warp(); t < kTile; t += kWarps) {
    const bool present = t < count && token_of(a.at, begin + t) >= 0;
    const Slope slope = present ? slope_of(a, begin + t, l) : Slope{0.0f, 0.0f};
    if (lane() == 0) {
      tile.score[t] = slope.score;
      tile.logit[t] = slope.logit;
      tile.present[t] = present;
    }
  }
}

// dV[l][j] += sum over the tile of dz s[j]; the first tile sets it.
__device__ void add_votes(const Tile& tile, const BackwardArguments& a, int64_t begin, int l) {
  for (int j = threadIdx.x; j < a.L; j += kThreads) {
    float* grad = a.gate_weight_grad + static_cast<int64_t>(l) * a.L + j;
    float sum = begin == 0 ? 0.0f : *grad;
#pragma unroll 4
    for (int t = 0; t < kTile; ++t) {
      if (tile.present[t]) sum = fmaf(tile.logit[t], a.scores[(begin + t) * a.L + j], sum);
    }
    *grad = sum;
  }
}

// This thread's columns of a layer: side by side as one vector, or kColumnThreads apart.
template <typename T, bool kVectors>
__device__ int column_of(int first_column, int k) {
  const int thread = static_cast<int>(threadIdx.x) % kColumnThreads;
  return first_column + (kVectors ? thread * Vector<T>::kWidth + k : k * kColumnThreads + thread);
}

template <typename T, bool kVectors>
__device__ Vector<T> load_columns(const BackwardArguments& a, int64_t b, int l, int first_column) {
  const T* row = static_cast<const T*>(a.pooled) + b * a.sequence_stride + l * a.layer_stride;
  const int column = column_of<T, kVectors>(first_column, 0);
  Vector<T> loaded = {};
  if constexpr (kVectors) {
    if (column < a.D) loaded = load(row + column);
  } else {
#pragma unroll
    for (int k = 0; k < Vector<T>::kWidth; ++k) {
      const int at = column_of<T, kVectors>(first_column, k);
      if (at < a.D) loaded.at[k] = row[static_cast<int64_t>(at) * a.element_stride];
    }
  }
  return loaded;
}

// Every group of threads takes each kGroups-th row of the tile.
template <typename T, bool kVectors>
__device__ void add_rows(const Tile& tile, const BackwardArguments& a, int64_t begin, int l, int first_column,
                         float (&score)[Vector<T>::kWidth], float (&logit)[Vector<T>::kWidth]) {
  const int group = static_cast<int>(threadIdx.x) / kColumnThreads;
#pragma unroll 1
  for (int t = group; t < kTile && begin + t < a.B; t += kGroups * kAhead) {
    Vector<T> h[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = t + u * kGroups;
      h[u] = at < kTile && tile.present[at] ? load_columns<T, kVectors>(a, begin + at, l, first_column)
                                            : Vector<T>{};
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int at = t + u * kGroups;
      const float d = at < kTile ? tile.score[at] : 0.0f, dz = at < kTile ? tile.logit[at] : 0.0f;
#pragma unroll
      for (int k = 0; k < Vector<T>::kWidth; ++k) {
        score[k] = fmaf(d, to_float(h[u].at[k]), score[k]);
        logit[k] = fmaf(dz, to_float(h[u].at[k]), logit[k]);
      }
    }
  }
}

// A stretch of columns of dw[l] and dv[l], and with the first stretch db[l], dc[l] and dV[l].
template <typename T, bool kVectors>
__device__ void parameter_gradients(const BackwardArguments& a, int l, int stretch) {
  constexpr int kWidth = Vector<T>::kWidth;
  __shared__ Tile tile;
  __shared__ float sums[2][kGroups][kWidth][kColumnThreads];
  const int first_column = stretch * kColumns<T>;
  float score[kWidth] = {}, logit[kWidth] = {};
  float bias = 0;  // of the scores in warp 0, of the logits in warp 1
  for (int64_t begin = 0; begin < a.B; begin += kTile) {
    const int count = static_cast<int>(a.B - begin < kTile ? a.B - begin : kTile);
    fill(tile, a, begin, count, l);
    __syncthreads();
    if (a.pooled != nullptr) add_rows<T, kVectors>(tile, a, begin, l, first_column, score, logit);
    if (stretch == 0 && warp() == 0) bias += warp_sum(tile.score[lane()]);
    if (stretch == 0 && warp() == 1) bias += warp_sum(tile.logit[lane()]);
    if (stretch == 0 && a.gate == Gate::kVote && a.gate_weight_grad != nullptr) add_votes(tile, a, begin, l);
    __syncthreads();
  }
  if (stretch == 0 && threadIdx.x == 0 && a.probe_bias_grad != nullptr) a.probe_bias_grad[l] = bias;
  if (stretch == 0 && threadIdx.x == kWarpSize && a.gate_bias_grad != nullptr) a.gate_bias_grad[l] = bias;
  if (stretch == 0 && a.B == 0 && a.gate == Gate::kVote && a.gate_weight_grad != nullptr) {
    for (int j = threadIdx.x; j < a.L; j += kThreads)
      a.gate_weight_grad[static_cast<int64_t>(l) * a.L + j] = 0;
  }
  if (a.pooled == nullptr) return;
  const int group = static_cast<int>(threadIdx.x) / kColumnThreads;
  const int thread = static_cast<int>(threadIdx.x) % kColumnThreads;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    sums[0][group][k][thread] = score[k];
    sums[1][group][k][thread] = logit[k];
  }
  __syncthreads();
  const bool asks_gate = a.gate == Gate::kSoftmax && a.gate_weight_grad != nullptr;
  for (int k = group; k < kWidth; k += kGroups) {
    const int column = column_of<T, kVectors>(first_column, k);
    if (column >= a.D) continue;
    float total = 0, other = 0;
    for (int g = 0; g < kGroups; ++g) {
      total += sums[0][g][k][thread];
      other += sums[1][g][k][thread];
    }
    if (a.probe_weight_grad != nullptr) a.probe_weight_grad[static_cast<int64_t>(l) * a.D + column] = total;
    if (asks_gate) a.gate_weight_grad[static_cast<int64_t>(l) * a.D + column] = other;
  }
}

// One warp: d and dz of a row of one layer, summed over the sequences that read it.
__device__ Slope slope_of_row(const BackwardArguments& a, int64_t row, int l) {
  if (a.hidden_form == HiddenForm::kPooled) return slope_of(a, row, l);
  if (a.hidden_form == HiddenForm::kPadded) {
    const int64_t b = row / a.at.tokens;
    return a.at.index[b] == row % a.at.tokens ? slope_of(a, b, l) : Slope{0.0f, 0.0f};
  }
  Slope total{0.0f, 0.0f};
  for (int64_t begin = 0; begin < a.B; begin += kWarpSize) {
    const int64_t b = begin + lane();
    unsigned readers = __ballot_sync(0xffffffffu, b < a.B && a.at.index[b] == row);
    for (; readers != 0; readers &= readers - 1) {
      const Slope slope = slope_of(a, begin + __ffs(static_cast<int>(readers)) - 1, l);
      total.score += slope.score;
      total.logit += slope.logit;
    }
  }
  return total;
}

// One warp: dh = d w + dz v of one row, zero where nobody reads it.
template <typename T, bool kVectors>
__device__ void write_row(const BackwardArguments& a, T* row, int l, Slope slope) {
  constexpr int kWidth = kVectors ? Vector<T>::kWidth : 1;
  const float* probe = a.probe_weight + static_cast<int64_t>(l) * a.D;
  const float* gate = a.gate == Gate::kSoftmax ? a.gate_weight + static_cast<int64_t>(l) * a.D : nullptr;
  const bool is_read = slope.score != 0.0f || slope.logit != 0.0f;
  for (int i = lane() * kWidth; i < a.D; i += kWarpSize * kWidth) {
    Vector<T> values = {};
    if (is_read) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const float by_probe = slope.score * probe[i + k];
        from_float(gate != nullptr ? fmaf(slope.logit, gate[i + k], by_probe) : by_probe, values.at[k]);
      }
    }
    if constexpr (kVectors) {
      *reinterpret_cast<Vector<T>*>(row + i) = values;
    } else {
      row[i] = values.at[0];
    }
  }
}

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  const int64_t stretches = a.pooled != nullptr && a.D > 0 ? (a.D + kColumns<T> - 1) / kColumns<T> : 1;
  const int64_t parameter_blocks = stretches * a.launch_layers;
  if (blockIdx.x < parameter_blocks) {
    parameter_gradients<T, kVectors>(a, a.first_layer + static_cast<int>(blockIdx.x / stretches),
                                     static_cast<int>(blockIdx.x % stretches));
    return;
  }
  const int64_t hidden_warps = (gridDim.x - parameter_blocks) * kWarps;
  for (int64_t item = (blockIdx.x - parameter_blocks) * kWarps + warp();
       item < a.hidden_rows * a.launch_layers; item += hidden_warps) {
    const int layer = static_cast<int>(item / a.hidden_rows), l = a.first_layer + layer;
    const int64_t row = item % a.hidden_rows;
    write_row<T, kVectors>(a, static_cast<T*>(a.hidden[layer]) + row * a.hidden_row_stride, l,
                           slope_of_row(a, row, l));
  }
}

template <typename T, bool kGate>
const char* forward_of(const ForwardArguments& a, bool vectors, int rows, CudaStream stream) {
  const int64_t blocks = (a.B + rows - 1) / rows * a.launch_layers;
  if (!vectors) return launch(forward_kernel<T, 1, false, kGate>, blocks, kThreads, stream, a);
  if (rows == 1) return launch(forward_kernel<T, 1, true, kGate>, blocks, kThreads, stream, a);
  if (rows == 2) return launch(forward_kernel<T, 2, true, kGate>, blocks, kThreads, stream, a);
  return launch(forward_kernel<T, kMaxDeviceRows, true, kGate>, blocks, kThreads, stream, a);
}

template <typename T>
const char* backward_of(const BackwardArguments& a, bool vectors, int multiprocessors, CudaStream stream) {
  const int64_t stretches = a.pooled != nullptr && a.D > 0 ? (a.D + kColumns<T> - 1) / kColumns<T> : 1;
  const int64_t rows = a.hidden[0] != nullptr ? a.hidden_rows * a.launch_layers : 0;
  const int64_t enough = 8 * static_cast<int64_t>(multiprocessors), wanted = (rows + kWarps - 1) / kWarps;
  const int64_t blocks = stretches * a.launch_layers + (wanted < enough ? wanted : enough);
  if (vectors) return launch(backward_kernel<T, true>, blocks, kThreads, stream, a);
  return launch(backward_kernel<T, false>, blocks, kThreads, stream, a);
}

}  // namespace

const char* launch_forward(const ForwardArguments& a, RowType type, bool vectors, int rows,
                           CudaStream stream) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    return a.gate == Gate::kSoftmax ? forward_of<T, true>(a, vectors, rows, stream)
                                    : forward_of<T, false>(a, vectors, rows, stream);
  };
  if (type == RowType::kFloat) return run(float());
  return type == RowType::kBFloat16 ? run(BFloat16()) : run(Half());
}

const char* launch_backward(const BackwardArguments& a, RowType type, bool vectors, int multiprocessors,
                            CudaStream stream) {
  if (type == RowType::kFloat) return backward_of<float>(a, vectors, multiprocessors, stream);
  return type == RowType::kBFloat16 ? backward_of<BFloat16>(a, vectors, multiprocessors, stream)
                                    : backward_of<Half>(a, vectors, multiprocessors, stream);
}

const char* arrivals_of_device(unsigned** arrivals) {
  return text(cudaGetSymbolAddress(reinterpret_cast<void**>(arrivals), arrival_counters));
}

}  // namespace reprdpo::probe_reward
