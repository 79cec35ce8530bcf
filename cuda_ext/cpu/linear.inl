// Linear layers over packed weights: the choice by format, and the whole layer over threads.

void linear_prepare(Format format, const float* x, int64_t columns, int64_t first, int64_t count, void* ready) {
  if (is_dense(format)) return dense_prepare(x, columns, first, count, ready);
  quant_prepare(format, x, columns, first, count, ready);
}

void linear_multiply(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                     int64_t last_group, float* out, int64_t out_stride, void* scratch, const Upcoming* upcoming) {
  if (is_dense(weight.format))
    return dense_multiply(weight, ready, rows, first_group, last_group, out, out_stride, upcoming);
  quant_multiply(weight, ready, rows, first_group, last_group, out, out_stride, scratch, upcoming);
}

void linear_unpack_row(const PackedWeight& weight, int64_t row, float* out) {
  if (is_dense(weight.format)) return dense_unpack_row(weight, row, out);
  quant_unpack_row(weight, row, out);
}

constexpr Upcoming kNothingUpcoming = {nullptr, 0, 0};

constexpr LinearKernels linear_kernels = {linear_prepare, linear_multiply, linear_unpack_row};

template <typename T>
inline void widen_row(const T* x, int64_t count, float* out) {
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < whole; i += W) store(out + i, load(x + i));
  if (count > whole) {
    const int rest = static_cast<int>(count - whole);
    store(out + whole, load(x + whole, rest), rest);
  }
}

template <typename T>
inline void narrow_row(const float* x, int64_t count, T* out) {
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < whole; i += W) store(out + i, load(x + i));
  if (count > whole) {
    const int rest = static_cast<int>(count - whole);
    store(out + whole, load(x + whole, rest), rest);
  }
}

// Rows of activations made ready, those of x in its storage type.
inline void ready_rows(const LinearArgs& a, int64_t first, int64_t last, uint8_t* ready, size_t stride) {
  constexpr int64_t kPiece = 512;  // a multiple of the quantised formats' 32
  [[maybe_unused]] float piece[kPiece];
  const PackedWeight& w = a.weight;
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    for (int64_t row = first; row < last; row++) {
      const T* x = static_cast<const T*>(a.x) + a.x_rows.at(row);
      uint8_t* made = ready + static_cast<size_t>(row) * stride;
      if constexpr (sizeof(T) == sizeof(float)) {
        linear_prepare(w.format, x, w.columns, 0, w.columns, made);
      } else {
        for (int64_t k = 0; k < w.columns; k += kPiece) {
          const int64_t count = minimum(kPiece, w.columns - k);
          widen_row(x + k, count, piece);
          linear_prepare(w.format, piece, w.columns, k, count, made);
        }
      }
    }
  });
}

// Groups [first, last) of all rows into the output, by way of a float32 block where the output's rows
// are not float32 or end inside a group. False when memory is short.
inline bool linear_groups(const LinearArgs& a, const uint8_t* ready, size_t stride, int64_t first, int64_t last) {
  constexpr int64_t kBlockRows = 192, kBlock = kBlockRows * 256;
  const PackedWeight& w = a.weight;
  const size_t scratch = (scratch_bytes(w.format, w.columns) + 63) / 64 * 64;
  const bool direct = a.out_dtype == DType::f32 && (w.rows % kGroup == 0 || last * kGroup <= w.rows);
  const size_t wanted = scratch + (direct ? 64 : kBlock * sizeof(float));
  uint8_t* memory = static_cast<uint8_t*>(thread_scratch(wanted));
  if (memory == nullptr) return false;
  if (direct) {
    linear_multiply(w, ready, a.x_rows.count, first, last, static_cast<float*>(a.out), w.rows, memory,
                    &kNothingUpcoming);
    return true;
  }
  float* block = reinterpret_cast<float*>(memory + scratch);
  for (int64_t row = 0; row < a.x_rows.count; row += kBlockRows) {
    const int64_t rows = minimum(kBlockRows, a.x_rows.count - row), step = kBlock / (rows * kGroup);
    for (int64_t group = first; group < last; group += step) {
      const int64_t end = minimum(last, group + step), width = (end - group) * kGroup;
      // The kernel places a group at its own columns, hence the shifted start.
      linear_multiply(w, ready + static_cast<size_t>(row) * stride, rows, group, end, block - group * kGroup, width,
                      memory, &kNothingUpcoming);
      const int64_t count = minimum(end * kGroup, w.rows) - group * kGroup;
      with_type(a.out_dtype, [&](auto element) {
        using T = typename Plain<decltype(element)>::type;
        for (int64_t i = 0; i < rows; i++)
          narrow_row(block + i * width, count,
                     static_cast<T*>(a.out) + (row + i) * w.rows + group * kGroup);
      });
    }
  }
  return true;
}

Status packed_linear(const LinearArgs& a, const Threads& threads) {
  const PackedWeight& w = a.weight;
  const int64_t rows = a.x_rows.count;
  if (rows == 0 || w.rows == 0) return Status::ok;
  const size_t stride = ready_bytes(w.format, w.columns);
  const bool as_is = is_dense(w.format) && a.dtype == DType::f32 && stride == static_cast<size_t>(w.columns) * 4 &&
                     (rows == 1 || (a.x_rows.inner >= rows && a.x_rows.inner_stride == w.columns));
  const uint8_t* ready = static_cast<const uint8_t*>(a.x);
  if (!as_is) {
    uint8_t* made = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(rows) * stride, 1));
    if (made == nullptr) return Status::no_memory;
    over_rows(threads, rows, w.columns / 4,
              [&](int64_t first, int64_t last) { ready_rows(a, first, last, made, stride); });
    ready = made;
  }
  int failed = 0;
  // A group's share: its bytes, and the work of the rows beyond the few that reading them hides.
  const int64_t cost = static_cast<int64_t>(group_bytes(w.format, w.columns)) / 4 + rows * w.columns;
  over_rows(threads, w.groups(), cost, [&](int64_t first, int64_t last) {
    if (!linear_groups(a, ready, stride, first, last))
      __atomic_store_n(&failed, static_cast<int>(Status::no_memory), __ATOMIC_RELAXED);
  });
  return static_cast<Status>(failed);
}

Status packed_rows(const RowsArgs& a, const Threads& threads) {
  for (int64_t i = 0; i < a.count; i++)
    if (a.ids[i] < 0 || a.ids[i] >= a.weight.rows) return Status::bad_row;
  over_rows(threads, a.count, 4 * a.weight.columns, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) linear_unpack_row(a.weight, a.ids[i], a.out + i * a.weight.columns);
  });
  return Status::ok;
}
