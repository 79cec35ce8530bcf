// Linear layers over packed weights: how weights and activations lie in memory, and the functions that
// read them. Everything is called from inside one thread's share of a step; nothing here starts threads.
//
// Weights: groups of kGroup output rows, one after the other, each group with all its columns. The last
// group is filled up with rows of zeros. A dense group is lines of 64 bytes: float32 [columns][16],
// float16 [columns / 2][2][16], bfloat16 [columns / 2][16][2] (the layout that the CPUs' dot products of
// bfloat16 pairs take too); an odd last column is paired with zero. Quantised formats are described in
// quant.h.
//
// Activations come as float32 and are first made ready: for a dense format they stay float32, with rows
// at a distance of ready_bytes, for a quantised one they become int8 codes with a scale for each 32
// columns. All dense formats share one ready layout, all quantised ones share another.
//
// A result depends on its own row of activations and its own row of weights, bit for bit: never on how
// many rows come together, nor on which groups one call covers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aserve {

constexpr int64_t kGroup = 16;

enum class Format : int32_t {
  f32 = 0,
  bf16 = 1,
  f16 = 2,
  q4_0 = 8,
  q4_1 = 9,
  q5_0 = 10,
  q5_1 = 11,
  q8_0 = 12,
  q4_k = 13,
  q5_k = 14,
  q6_k = 15,
};

constexpr bool is_dense(Format format) { return static_cast<int32_t>(format) < 8; }

struct PackedWeight {
  Format format;
  int64_t rows, columns;  // of the layer, before filling up
  const uint8_t* data;    // 64-byte aligned
  const float* bias;      // [rows], or null
  int64_t groups() const { return (rows + kGroup - 1) / kGroup; }
};

// True for the values of Format that can be packed and multiplied.
bool known_format(int64_t format);
// The columns of a matrix in this format come in multiples of it.
int64_t column_multiple(Format format);

// Sizes in bytes. group_bytes is a multiple of 64. columns of a quantised format: a multiple of 32
// (of 256 for the K formats).
size_t group_bytes(Format format, int64_t columns);
size_t ready_bytes(Format format, int64_t columns);    // of one ready row, a multiple of 64
size_t scratch_bytes(Format format, int64_t columns);  // that a call of multiply may use

// Packs a dense matrix [rows, columns] of the format's element type into groups() * group_bytes at out.
void pack_dense(Format format, const void* weight, int64_t rows, int64_t columns, uint8_t* out);

// Weights that a thread reads after those of the product at hand: a list of them, in the order of reading, ends with
// an empty one. A product fetches their beginning while it multiplies its own end; only the speed hangs on them.
struct Upcoming {
  const uint8_t* data;
  size_t bytes, group_bytes;
};

struct LinearKernels {
  // Makes columns [first, first + count) of one row ready. x points at column `first`. For a quantised
  // format first and count are multiples of 32. ready: the row's ready_bytes(format, columns).
  void (*prepare)(Format format, const float* x, int64_t columns, int64_t first, int64_t count, void* ready);

  // out[i * out_stride + n] = bias[n] + sum over k of activations[i, k] * weight[n, k]
  // for i < rows and the n of groups [first_group, last_group), the filled-up ones included.
  // ready: rows of ready_bytes, one after the other. scratch: scratch_bytes, 64-byte aligned.
  void (*multiply)(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                   int64_t last_group, float* out, int64_t out_stride, void* scratch, const Upcoming* upcoming);

  // One row of the weights as float32.
  void (*unpack_row)(const PackedWeight& weight, int64_t row, float* out);
};

}  // namespace aserve
