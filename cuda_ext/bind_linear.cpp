// Binding of packed weights and linear layers over them to torch's stable ABI.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "binding.h"
#include "cpu/quant.h"

namespace {

using aserve::Format;
using aserve::kGroup;
using aserve::PackedWeight;

void pack_dense(const Tensor& weight_, const Tensor& out_) {
  const char* op = "pack_dense";
  const View weight(op, "weight", weight_), out(op, "out", out_);
  weight.rank(2).dense_from(0);
  const Format format = static_cast<Format>(static_cast<int32_t>(weight.storage()));
  check_packed(out, format, weight.sizes[0], weight.sizes[1]);
  aserve::pack_dense(format, weight.data, weight.sizes[0], weight.sizes[1], static_cast<uint8_t*>(out.data));
}

void pack_gguf(const Tensor& raw_, int64_t format_, int64_t rows, int64_t columns, std::optional<Tensor> row_order_,
               const Tensor& out_) {
  const char* op = "pack_gguf";
  const View raw(op, "raw", raw_), out(op, "out", out_);
  const Format format = format_of(op, format_);
  if (aserve::is_dense(format)) refuse(op, "format ", format_, " is not quantised");
  check_packed(out, format, rows, columns);
  const aserve::QuantLayout layout = aserve::quant_layout(format);
  raw.rank(1).typed(aoti_torch_dtype_uint8(), "uint8").dense_from(0);
  raw.size(0, rows * (columns / layout.file_columns) * layout.file_bytes);
  const int64_t* order = nullptr;
  if (row_order_.has_value()) {
    const View row_order(op, "row_order", *row_order_);
    row_order.rank(1).size(0, rows).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
    order = static_cast<const int64_t*>(row_order.data);
    for (int64_t row = 0; row < rows; row++)
      if (order[row] < 0 || order[row] >= rows) refuse(op, "row_order has an entry outside the matrix, ", order[row]);
  }
  aserve::pack_quant(format, static_cast<const uint8_t*>(raw.data), order, rows, columns,
                     static_cast<uint8_t*>(out.data));
}

void packed_linear(const Tensor& x_, const Tensor& data_, std::optional<Tensor> bias_, int64_t format, int64_t rows,
                   int64_t columns, const Tensor& out_) {
  const char* op = "packed_linear";
  const View x(op, "x", x_), data(op, "data", data_), out(op, "out", out_);
  aserve::LinearArgs a = {};
  a.weight = packed_weight(data, format, rows, columns);
  a.x_rows = rows_of(x);
  x.size(x.dims - 1, columns);
  out.rank(x.dims).size(x.dims - 1, rows).dense_from(0);
  for (int64_t d = 0; d + 1 < x.dims; d++) out.size(d, x.sizes[d]);
  a.x = x.data;
  a.out = out.data;
  a.dtype = x.storage();
  a.out_dtype = out.storage();
  if (bias_.has_value()) {
    const View bias(op, "bias", *bias_);
    bias.rank(1).size(0, rows).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
    a.weight.bias = static_cast<const float*>(bias.data);
  }
  check(op, table(op).packed_linear(a, threads()));
}

void packed_rows(const Tensor& ids_, const Tensor& data_, int64_t format, int64_t rows, int64_t columns,
                 const Tensor& out_) {
  const char* op = "packed_rows";
  const View ids(op, "ids", ids_), data(op, "data", data_), out(op, "out", out_);
  aserve::RowsArgs a = {};
  a.weight = packed_weight(data, format, rows, columns);
  ids.rank(1).typed(aoti_torch_dtype_int64(), "int64").dense_from(0);
  a.count = ids.sizes[0];
  out.rank(2).size(0, a.count).size(1, columns).typed(aoti_torch_dtype_float32(), "float32").dense_from(0);
  a.ids = static_cast<const int64_t*>(ids.data);
  a.out = static_cast<float*>(out.data);
  check(op, table(op).packed_rows(a, threads()));
}

}  // namespace

// Called through ctypes by aserve.ops.packed: the size of a packed matrix in bytes, or -1 where the
// format is unknown or cannot have so many columns.
extern "C" __attribute__((visibility("default"))) int64_t aserve_packed_bytes(int64_t format, int64_t rows,
                                                                              int64_t columns) {
  if (!aserve::known_format(format) || rows < 0 || columns < 1) return -1;
  const Format known = static_cast<Format>(format);
  if (columns % aserve::column_multiple(known) != 0) return -1;
  return (rows + kGroup - 1) / kGroup * static_cast<int64_t>(aserve::group_bytes(known, columns));
}

STABLE_TORCH_LIBRARY_FRAGMENT(aserve, m) {
  m.def("pack_dense(Tensor weight, Tensor(a!) out) -> ()");
  m.def("pack_gguf(Tensor raw, int format, int rows, int columns, Tensor? row_order, Tensor(a!) out) -> ()");
  m.def(
      "packed_linear(Tensor x, Tensor data, Tensor? bias, int format, int rows, int columns, "
      "Tensor(a!) out) -> ()");
  m.def("packed_rows(Tensor ids, Tensor data, int format, int rows, int columns, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(aserve, CPU, m) {
  m.impl("pack_dense", TORCH_BOX(&pack_dense));
  m.impl("pack_gguf", TORCH_BOX(&pack_gguf));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("packed_rows", TORCH_BOX(&packed_rows));
}
