// What a binding reads of a tensor, and how it refuses one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "cpu/kernels.h"

// Where a binding's tensors must be, if not on the CPU: defined before this is included.
#ifndef ASERVE_DEVICE_TYPE
#define ASERVE_DEVICE_TYPE aoti_torch_device_type_cpu()
#define ASERVE_DEVICE_NAME "the CPU"
#endif

namespace {

using aserve::DType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "aserve::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's data and layout, read once.
struct View {
  const char* op;
  const char* name;
  void* data;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t type;
  int32_t device = -1;

  // wanted: the type of device it must be on, called `place`; kAnywhere: any.
  static constexpr int32_t kAnywhere = -1;

  View(const char* op_name, const char* tensor_name, const Tensor& tensor)
      : View(op_name, tensor_name, tensor, ASERVE_DEVICE_TYPE, ASERVE_DEVICE_NAME) {}

  View(const char* op_name, const char* tensor_name, const Tensor& tensor, int32_t wanted, const char* place)
      : op(op_name), name(tensor_name) {
    const AtenTensorHandle handle = tensor.get();
    int64_t *size = nullptr, *stride = nullptr;
    if (aoti_torch_get_device_type(handle, &device) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_data_ptr(handle, &data) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_dim(handle, &dims) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_sizes(handle, &size) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_strides(handle, &stride) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_dtype(handle, &type) != AOTI_TORCH_SUCCESS)
      refuse(op, name, " cannot be read");
    if (wanted != kAnywhere && device != wanted) refuse(op, name, " must be on ", place);
    sizes = size;
    strides = stride;
  }

  const View& rank(int64_t wanted) const {
    if (dims != wanted) refuse(op, name, " must have ", wanted, " dimensions, has ", dims);
    return *this;
  }
  const View& size(int64_t dim, int64_t wanted) const {
    if (sizes[dim] != wanted)
      refuse(op, name, " must have size ", wanted, " in dimension ", dim, ", has ", sizes[dim]);
    return *this;
  }
  const View& typed(int32_t wanted, const char* type_name) const {
    if (type != wanted) refuse(op, name, " must be ", type_name);
    return *this;
  }
  // Dimensions first .. dims - 1 lie densely behind each other.
  const View& dense_from(int64_t first) const {
    int64_t step = 1;
    for (int64_t d = dims - 1; d >= first; d--) {
      if (sizes[d] > 1 && strides[d] != step)
        refuse(op, name, " must be dense from dimension ", first, ", has stride ", strides[d], " in dimension ", d);
      if (sizes[d] > 1) step *= sizes[d];
    }
    return *this;
  }
  DType storage() const {
    if (type == aoti_torch_dtype_float32()) return DType::f32;
    if (type == aoti_torch_dtype_bfloat16()) return DType::bf16;
    if (type == aoti_torch_dtype_float16()) return DType::f16;
    refuse(op, name, " must be float32, bfloat16 or float16");
  }
  // Of a type of 8 bits, which only a cache has.
  bool narrow() const {
    return type == aoti_torch_dtype_float8_e4m3fn() || type == aoti_torch_dtype_float8_e5m2();
  }
  int64_t element_bytes() const { return narrow() ? 1 : storage() == DType::f32 ? 4 : 2; }
};

inline void check_same_type(const View& a, const View& b) {
  if (a.type != b.type) refuse(a.op, a.name, " and ", b.name, " must have one dtype");
}

// x as rows, all dimensions but the last: evenly spaced, or groups of evenly spaced rows.
inline aserve::Rows rows_of(const View& x) {
  if (x.dims < 1) refuse(x.op, x.name, " must have a dimension");
  x.dense_from(x.dims - 1);
  aserve::Rows rows = {1, 1, 0, 0};
  bool grouped = false;
  for (int64_t d = x.dims - 2; d >= 0; d--) {
    const int64_t size = x.sizes[d], stride = x.strides[d];
    if (size == 1) continue;
    if (rows.count == 1 && !grouped) {
      rows.inner_stride = stride;
    } else if (!grouped && stride != rows.inner_stride * rows.inner) {
      grouped = true;
      rows.outer_stride = stride;
    } else if (grouped && stride != rows.outer_stride * (rows.count / rows.inner)) {
      refuse(x.op, x.name, " must have rows, or groups of rows, that lie evenly");
    }
    rows.count *= size;
    if (!grouped) rows.inner = rows.count;
  }
  if (rows.inner == 0) rows.inner = 1;
  return rows;
}

inline void same_shape(const View& x, const View& y) {
  y.rank(x.dims);
  for (int64_t d = 0; d < x.dims; d++) y.size(d, x.sizes[d]);
}

}  // namespace
