// The CUDA kernels of probe_reward as their host side sees them; see probe_reward.h for the formulas.
//
// Forward, one launch for every kMaxLayers layers: a block takes both dot products of up to kMaxDeviceRows
// sequences in one layer; the last block to arrive of those sequences mixes their layers, and the last of all
// writes the confidence. Bytes: B L D of rows once, 2 L D floats of weights once for each kMaxDeviceRows
// sequences (from L2). Backward, the same: blocks that sum a stretch of a layer's weight gradients over the
// sequences, in order, and blocks that write the hidden states' gradients, zeros included. Both take d and dz
// from [B, L] values themselves. Results depend neither on the order of blocks nor on atomics.
#pragma once

#include <cstdint>

#include "common/cuda_queries.h"
#include "probe_reward/gate.h"
#include "probe_reward/probe_reward.h"

namespace reprdpo::probe_reward {

// Layers that one launch takes by value, as pointers.
constexpr int kMaxLayers = 128;
// Sequences whose rows share one read of the weights.
constexpr int kMaxDeviceRows = 4;

// Which row of a layer each of B sequences reads; strides in elements. A null index means row 0.
struct DeviceIndex {
  const int64_t* index;
  int64_t tokens;
};

struct DeviceConfidence {
  float* gamma;  // [B / 2], null where nobody asks
  float alpha;
  float floor;
  bool squash;
  bool has_floor;
  bool reduce_batch;
};

struct ForwardArguments {
  const void* layers[kMaxLayers];
  int64_t sequence_stride, token_stride, element_stride;
  DeviceIndex at;
  const float *probe_weight, *probe_bias, *gate_weight, *gate_bias;
  float *reward, *scores, *gate_values;
  void* pooled;  // [B, L, D], null where nobody asks
  // One counter for each group of sequences and one for all: zero before and after every launch, nobody
  // else's during it.
  unsigned* arrivals;
  DeviceConfidence confidence;
  int64_t B;
  int D, first_layer, launch_layers, L;
  Gate gate;
};

// How the gradient of hidden_states lies: a row of layer l is layers[l] + row * row_stride.
enum class HiddenForm { kPadded, kPacked, kPooled };

struct BackwardArguments {
  void* hidden[kMaxLayers];  // null pointers where nobody asks
  int64_t hidden_rows, hidden_row_stride;
  HiddenForm hidden_form;
  const void* pooled;  // null where no weight that multiplies the rows asks
  int64_t sequence_stride, layer_stride, element_stride;
  DeviceIndex at;
  Upstream upstream;
  const float *scores, *gate_values, *probe_weight, *gate_weight;
  float *probe_weight_grad, *probe_bias_grad, *gate_weight_grad, *gate_bias_grad;  // null where nobody asks
  int64_t B;
  int D, first_layer, launch_layers, L;
  Gate gate;
};

// `vectors`: rows, weights and what is written may be moved 16 bytes at a time (strides included). `rows` is
// how many sequences a block takes, 1, 2 or 4 (1 without vectors).
const char* launch_forward(const ForwardArguments& arguments, RowType type, bool vectors, int rows,
                           CudaStream stream);
const char* launch_backward(const BackwardArguments& arguments, RowType type, bool vectors,
                            int multiprocessors, CudaStream stream);

// Counters for ForwardArguments::arrivals that every device has, zero at first: `kArrivals` of them.
constexpr int64_t kArrivals = 1 << 18;
const char* arrivals_of_device(unsigned** arrivals);

}  // namespace reprdpo::probe_reward
