// Quantised linear layers: GGUF weights kept packed, multiplied with int8 activations.
//
// Weights. A group of 16 rows is a sequence of chunks of 256 columns (the last may have fewer), each laid
// out as below: so the weights lie in memory in about the order in which they are read, which a read at
// the memory's full rate asks for. A chunk holds, one after the other:
//   codes   a block for each 32 columns, of whole 64-byte lines:
//             nibbles  4 lines (4- to 6-bit formats): line j, byte 4 r + b of row r holds column 4 j + b in
//                      its low and column 16 + 4 j + b in its high half
//             plane    1 line (5-bit): bit j of byte 4 r + b is bit 4 of column 4 j + b, j < 8
//                      2 lines (6-bit): bits 2 j, 2 j + 1 of byte 4 r + b of line i are bits 4, 5 of
//                      column 16 i + 4 j + b, j < 4
//             bytes    8 lines (Q8_0): line j, byte 4 r + b holds column 4 j + b, plus 128
//   scales  for each 32 columns 16 fp16 scales (and 16 fp16 minima), or for the K formats of 16 byte scales
//           and 16 byte minima (Q6_K: 16 signed scales of each half of the block)
//   supers  K formats: 16 fp16 scales (and, but for Q6_K, 16 fp16 scales of the minima)
// and a group zeros up to a multiple of 64 bytes. Nothing is rounded: the codes and scales are those of the
// file, and but for that filling a group takes the file's bytes (Q4_K and Q5_K 0.125 bits a weight more, as
// their 6-bit scales become bytes).
//
// Activations: one Ready for each 32 columns, see below.
#pragma once

#include "linear.h"

namespace aserve {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: its bit pattern plus n is that of the float kMagic + n
constexpr int32_t kMagicBits = 0x4b400000;

// 32 activations: x = scale * codes, rounded to nearest, scale = max |x| / 127 (rounded up by at most
// 2^-21, so that kMagic * scale is exact). Where an x is not finite, or too large for kMagic * scale,
// scale is NaN; where all are below 1e-30, scale is 0.
struct alignas(64) Ready {
  int8_t codes[32];
  float scale;
  float unmagic;    // -kMagic * scale
  float total;      // scale * sum of codes
  int32_t start[5]; // kMagicBits - zero * sum of codes: see Start
};
static_assert(sizeof(Ready) == 64);

// Which element of Ready::start belongs to a format, by the code that stands for zero: 8 (Q4_0),
// 16 (Q5_0), 128 (Q8_0), and 32 for the columns 0 .. 15 and 16 .. 31 (Q6_K).
enum class Start : int { zero8 = 0, zero16 = 1, zero128 = 2, zero32_low = 3, zero32_high = 4, none = 5 };

struct QuantLayout {
  int code_bytes;   // of a group's block of 32 columns
  int scale_bytes;  // likewise
  int super_bytes;  // of a group's 256 columns, or 0
  int bits;         // of a code
  int zero;         // the code that stands for zero, where there are no minima
  bool minima;
  int file_columns, file_bytes;  // of a block in the file
};

// Of internal linkage: see the hazard in isa_avx2.cpp.
static constexpr QuantLayout quant_layout(Format format) {
  switch (format) {
    case Format::q4_0:
      return {256, 32, 0, 4, 8, false, 32, 18};
    case Format::q4_1:
      return {256, 64, 0, 4, 0, true, 32, 20};
    case Format::q5_0:
      return {320, 32, 0, 5, 16, false, 32, 22};
    case Format::q5_1:
      return {320, 64, 0, 5, 0, true, 32, 24};
    case Format::q8_0:
      return {512, 32, 0, 8, 128, false, 32, 34};
    case Format::q4_k:
      return {256, 32, 64, 4, 0, true, 256, 144};
    case Format::q5_k:
      return {320, 32, 64, 5, 0, true, 256, 176};
    default:
      return {384, 32, 32, 6, 32, false, 256, 210};
  }
}

// A group of the large-batch path, in scratch: one code a byte and float32 scales. A block is 8 lines of codes,
// 16 scales, and 16 minima (Q6_K: 16 scales of its second half).
constexpr int kExpandedBlock = 640;

constexpr int kChunk = 8;  // blocks of 32 columns in a chunk

// Sizes in bytes, as group_bytes, ready_bytes and scratch_bytes of linear.h.
size_t quant_group_bytes(Format format, int64_t columns);
size_t quant_ready_bytes(int64_t columns);
size_t quant_scratch_bytes(Format format, int64_t columns);

// Packs `rows` rows of a GGUF tensor: packed row n is the file's row row_order[n], or n where row_order
// is null. columns: a multiple of the file's block. out: groups * quant_group_bytes, 64-byte aligned,
// written whole.
void pack_quant(Format format, const uint8_t* file_rows, const int64_t* row_order, int64_t rows,
                int64_t columns, uint8_t* out);

// One row of packed weights as float32: the values the file stands for, rounded as the gguf package does.
void quant_unpack_row(const PackedWeight& weight, int64_t row, float* out);

// Whether the level avx512 uses AVX512_VNNI: what cpuid says, unless quant_allow_vnni(false) was called.
bool quant_vnni();
void quant_allow_vnni(bool allow);
void quant_multiply_vnni(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                         int64_t last_group, float* out, int64_t out_stride, void* scratch, const Upcoming* upcoming);

}  // namespace aserve
