// What a native op asks of its tensors before it reads their memory. Callers of the public ops never see
// these messages: the Python side has checked, in the user's words.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace reprdpo {

inline void check_shape(const char* name, const torch::stable::Tensor& tensor,
                        std::initializer_list<int64_t> shape) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
                  " has not the shape it must have");
}

// A contiguous tensor of this dtype and shape, on the CPU or on a CUDA device.
inline void check_dense(const char* name, const torch::stable::Tensor& tensor,
                        torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> shape,
                        bool on_cuda = false) {
  check_shape(name, tensor, shape);
  STD_TORCH_CHECK((on_cuda ? tensor.is_cuda() : tensor.is_cpu()) && tensor.is_contiguous() &&
                      tensor.scalar_type() == dtype,
                  name, " must be a contiguous tensor of the dtype and device that the op takes");
}

}  // namespace reprdpo
