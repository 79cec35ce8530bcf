// Dense linear layers: float32, bfloat16 and float16 weights, float32 activations and arithmetic.
//
// Every output is one chain of fused multiply-adds over k in rising order, then the bias: whatever the
// tile, the block and the number of rows. The chains of a tile are many enough to hide their latency.
// Blocking over k parks the sums in the output and takes them up again, which changes no bit.

// A line is 64 bytes of a group: 16 rows times kColumns columns.
constexpr int64_t kLine = 64;
constexpr int kParts = static_cast<int>(kGroup) / W;  // vectors that hold one column of a group

template <typename T>
struct Line;
template <>
struct Line<float> {
  static constexpr int kColumns = 1;
  static V part(const uint8_t* line, int, int part) { return load(reinterpret_cast<const float*>(line) + part * W); }
};
template <>
struct Line<f16> {
  static constexpr int kColumns = 2;
  static V part(const uint8_t* line, int column, int part) {
    return load(reinterpret_cast<const f16*>(line) + column * kGroup + part * W);
  }
};
template <>
struct Line<bf16> {
  static constexpr int kColumns = 2;
  static V part(const uint8_t* line, int column, int part) {
    Words words;
    __builtin_memcpy(&words, line + part * sizeof(Words), sizeof(Words));
    const bf16* kind = nullptr;
    return column == 0 ? low(kind, words) : high(kind, words);
  }
};

// One tile: R rows of activations times C groups of weights, over `lines` lines.
struct DenseTile {
  const float* x;
  int64_t x_stride;
  const uint8_t* weight;  // the first group's first line
  int64_t group_stride;   // bytes from group to group
  int64_t lines;
  float* out;
  int64_t out_stride;
  const float* bias;     // of the first group, or null: not the last lines, or no bias
  int64_t bias_count;    // values of bias that exist
  bool resume;           // the sums so far are in out
  // Lines to fetch for a later tile, one beside each line. With kStream: the groups of the next tile.
  const uint8_t* ahead;
  int64_t ahead_stride;  // with kStream: bytes from group to group there
};

// How far ahead of its use a streamed line is fetched.
constexpr int64_t kAheadLines = 24;

// kStream: the weights come from memory and are used once; each group's lines are fetched early, towards the end of
// a group those of the next tile.
template <typename T, int R, int C, bool kStream>
__attribute__((noinline)) void dense_tile(const DenseTile& t) {
  constexpr int kVectors = C * kParts, kColumns = Line<T>::kColumns;
  V sum[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) sum[r][v] = t.resume ? load(t.out + r * t.out_stride + v * W) : zero();
  const int64_t x_stride = t.x_stride, group_stride = t.group_stride, lines = t.lines;
  const float* x = t.x;
  const uint8_t* line = t.weight;
  const uint8_t* ahead = t.ahead;
  // Rows of a wide output lie far apart: without this each store would wait for its line.
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) __builtin_prefetch(t.out + r * t.out_stride + c * kGroup, 0, 3);
  const uint8_t* fetch = line + kAheadLines * kLine;
  int64_t fetch_stride = group_stride;
  int64_t until = kStream && lines > kAheadLines ? lines - kAheadLines : lines;
  for (int64_t at = 0; at < lines;) {
    for (; at < until; at++) {
      if constexpr (kStream) {
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) __builtin_prefetch(fetch + c * fetch_stride, 0, 3);
        fetch += kLine;
      } else {
        __builtin_prefetch(ahead, 0, 2);
        ahead += kLine;
      }
#pragma GCC unroll 2
      for (int column = 0; column < kColumns; column++) {
        // Hides that both columns come from the same words: kept for the second, they would push sums
        // out of the registers.
        const uint8_t* here = line;
        __asm__ volatile("" : "+r"(here));
        const auto part = [&](int v) { return Line<T>::part(here + v / kParts * group_stride, column, v % kParts); };
        if constexpr (R < kVectors) {
          V a[R];
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) a[r] = set1(x[r * x_stride + column]);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; v++) {
            const V w = part(v);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sum[r][v] = fma(a[r], w, sum[r][v]);
          }
        } else {
          V w[kVectors];
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; v++) w[v] = part(v);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const V a = set1(x[r * x_stride + column]);
#pragma GCC unroll 16
            for (int v = 0; v < kVectors; v++) sum[r][v] = fma(a, w[v], sum[r][v]);
          }
        }
      }
      line += kLine;
      x += kColumns;
    }
    until = lines;
    fetch = t.ahead;
    fetch_stride = t.ahead_stride;
  }
  if (t.bias != nullptr) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) {
      const int64_t left = t.bias_count - v * W;
      const V b = left >= W ? load(t.bias + v * W) : left > 0 ? load(t.bias + v * W, static_cast<int>(left)) : zero();
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[r][v] = add(sum[r][v], b);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v++) store(t.out + r * t.out_stride + v * W, sum[r][v]);
}

// The most rows of a tile, and the groups that a tile of so many rows takes: the sums, a line's vectors
// and one activation fit the registers.
constexpr int kDenseRows = W == 16 ? 12 : 5;
constexpr int dense_groups(int rows) {
  if (W == 16) return rows <= 2 ? 8 : rows == 3 ? 6 : rows <= 6 ? 4 : rows <= 8 ? 3 : 2;
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}
constexpr int kBlockGroups = W == 16 ? 2 : 1;  // of a tile where the rows fill several tiles

template <typename T, int R, int C, bool kStream>
inline void dense_pick_groups(int groups, const DenseTile& t) {
  if (groups == C) return dense_tile<T, R, C, kStream>(t);
  if constexpr (C > 1) dense_pick_groups<T, R, C - 1, kStream>(groups, t);
}

template <typename T, bool kStream, int R = kDenseRows>
inline void dense_pick(int rows, int groups, const DenseTile& t) {
  if (rows == R) return dense_pick_groups<T, R, kStream ? dense_groups(R) : kBlockGroups, kStream>(groups, t);
  // Rows that fill several tiles are spread evenly over them.
  constexpr int kLeast = kStream ? 1 : (kDenseRows + 1) / 2;
  if constexpr (R > kLeast) dense_pick<T, kStream, R - 1>(rows, groups, t);
}

// Group n of what is read next, or null.
inline const uint8_t* upcoming_group(const Upcoming* upcoming, int64_t n) {
  for (; upcoming->bytes > 0; upcoming++) {
    const int64_t groups = static_cast<int64_t>(upcoming->bytes / upcoming->group_bytes);
    if (n < groups) return upcoming->data + n * static_cast<int64_t>(upcoming->group_bytes);
    n -= groups;
  }
  return nullptr;
}

// Floats of activations that stay in the second-level cache while all groups pass.
constexpr int64_t kBlockFloats = W == 16 ? 96 * 1024 : 32 * 1024;
constexpr int64_t kBlockColumns = 1536;

template <typename T>
inline void dense_product(const PackedWeight& weight, const float* x, int64_t x_stride, int64_t rows, int64_t first,
                          int64_t last, float* out, int64_t out_stride, const Upcoming* upcoming) {
  const int64_t lines = ceil_div(weight.columns, Line<T>::kColumns), group_stride = lines * kLine;
  const auto tile = [&](int64_t row, int64_t group, int64_t line, int64_t count) {
    DenseTile t = {};
    t.x = x + row * x_stride + line * Line<T>::kColumns;
    t.x_stride = x_stride;
    t.weight = weight.data + group * group_stride + line * kLine;
    t.group_stride = group_stride;
    t.lines = count;
    t.out = out + row * out_stride + group * kGroup;
    t.out_stride = out_stride;
    t.bias = weight.bias != nullptr && line + count == lines ? weight.bias + group * kGroup : nullptr;
    t.bias_count = weight.rows - group * kGroup;
    t.resume = line > 0;
    return t;
  };
  const int64_t tiles = ceil_div(rows, kDenseRows);
  if (tiles == 1) {
    const int64_t count = last - first, pieces = ceil_div(count, dense_groups(static_cast<int>(rows)));
    for (int64_t p = 0; p < pieces; p++) {
      const int64_t group = first + count * p / pieces, end = first + count * (p + 1) / pieces;
      DenseTile t = tile(0, group, 0, lines);
      t.ahead = t.weight + (end - group) * group_stride;
      t.ahead_stride = group_stride;
      if (p + 1 == pieces && upcoming->bytes > 0) {
        t.ahead = upcoming->data;
        t.ahead_stride = static_cast<int64_t>(upcoming->group_bytes);
      }
      dense_pick<T, true>(static_cast<int>(rows), static_cast<int>(end - group), t);
    }
    return;
  }
  const int64_t blocks = ceil_div(weight.columns, kBlockColumns), depth = ceil_div(lines, blocks);
  const int64_t high = maximum(2, kBlockFloats / (depth * Line<T>::kColumns * kDenseRows));  // tiles of a block
  for (int64_t top = 0; top < tiles; top += high) {
    const int64_t bottom = minimum(tiles, top + high);
    for (int64_t line = 0; line < lines; line += depth) {
      const int64_t count = minimum(depth, lines - line);
      for (int64_t group = first; group < last; group += kBlockGroups) {
        const int64_t groups = minimum(kBlockGroups, last - group);
        for (int64_t i = top; i < bottom; i++) {
          const int64_t row = rows * i / tiles, end = rows * (i + 1) / tiles;
          DenseTile t = tile(row, group, line, count);
          // The first tiles each fetch one of the groups that come next.
          const int64_t next = group + groups + i - top;
          t.ahead = t.weight;
          if (i - top < kBlockGroups) {
            if (next < last) {
              t.ahead += (next - group) * group_stride;
            } else if (bottom == tiles && line + count == lines) {
              const uint8_t* const after = upcoming_group(upcoming, next - last);
              if (after != nullptr) t.ahead = after;
            }
          }
          dense_pick<T, false>(static_cast<int>(end - row), static_cast<int>(groups), t);
        }
      }
    }
  }
}

template <typename F>
inline void with_dense(Format format, F f) {
  switch (format) {
    case Format::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case Format::f16:
      return f(static_cast<const f16*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

void dense_prepare(const float* x, int64_t columns, int64_t first, int64_t count, void* ready) {
  float* out = static_cast<float*>(ready) + first;
  __builtin_memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
  if (first + count < columns) return;
  for (int64_t i = columns; i < ceil_div(columns, kGroup) * kGroup; i++) static_cast<float*>(ready)[i] = 0.0f;
}

void dense_multiply(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                    int64_t last_group, float* out, int64_t out_stride, const Upcoming* upcoming) {
  const int64_t x_stride = static_cast<int64_t>(ready_bytes(weight.format, weight.columns) / sizeof(float));
  with_dense(weight.format, [&](auto element) {
    dense_product<typename Plain<decltype(element)>::type>(weight, static_cast<const float*>(ready), x_stride, rows,
                                                           first_group, last_group, out, out_stride, upcoming);
  });
}

void dense_unpack_row(const PackedWeight& weight, int64_t row, float* out) {
  with_dense(weight.format, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    constexpr int kColumns = Line<T>::kColumns;
    const uint8_t* line = weight.data + row / kGroup * static_cast<int64_t>(group_bytes(weight.format, weight.columns));
    const int lane = static_cast<int>(row % kGroup);
    for (int64_t k = 0; k < weight.columns; k++) {
      float values[W];
      store(values, Line<T>::part(line + k / kColumns * kLine, static_cast<int>(k % kColumns), lane / W));
      out[k] = values[lane % W];
    }
  });
}
