// Packing of GGUF tensors, and single rows of packed ones. Built for the baseline CPU.
// The file's block formats are those of GGML (ggml-common.h, and gguf.quants in the gguf package).
#include "quant.h"

#include <cstring>

namespace aserve {
namespace {

uint32_t word(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

// Four codes of a row, one a byte, put at step j (columns 4 j .. 4 j + 3) of a packed block.
struct Lines {
  uint8_t* block;
  int row, bits;
  void put(int j, uint32_t codes) const {
    if (bits == 8) {
      store(64 * j, codes);
      return;
    }
    const uint32_t low = codes & 0x0f0f0f0fu;
    add(64 * (j & 3), j < 4 ? low : low << 4);
    const uint32_t high = codes >> 4;
    if (bits == 5) add(256, (high & 0x01010101u) << j);
    if (bits == 6) add(256 + 64 * (j >> 2), (high & 0x03030303u) << 2 * (j & 3));
  }
  void store(int at, uint32_t value) const { std::memcpy(block + at + 4 * row, &value, 4); }
  void add(int at, uint32_t value) const { store(at, word(block + at + 4 * row) | value); }
};

// Bits i, i + 4, ... , i + 28 of x as one byte.
uint32_t every_fourth(uint32_t x, int i) {
  x = (x >> i) & 0x11111111u;
  x = (x | x >> 3) & 0x03030303u;
  x = (x | x >> 6) & 0x000f000fu;
  return (x | x >> 12) & 0xffu;
}

void pack_block(Format format, const uint8_t* file, const Lines& lines, uint8_t* scales) {
  const bool minima = quant_layout(format).minima;
  const uint8_t* codes = file + (minima ? 4 : 2);
  std::memcpy(scales + 2 * lines.row, file, 2);
  if (minima) std::memcpy(scales + 32 + 2 * lines.row, file + 2, 2);
  if (format == Format::q8_0) {
    for (int j = 0; j < 8; j++) lines.store(64 * j, word(codes + 4 * j) ^ 0x80808080u);
    return;
  }
  if (lines.bits == 5) {
    const uint32_t high = word(codes);
    codes += 4;
    uint32_t plane = 0;
    for (int b = 0; b < 4; b++) plane |= every_fourth(high, b) << 8 * b;
    lines.store(256, plane);
  }
  for (int j = 0; j < 4; j++) lines.store(64 * j, word(codes + 4 * j));
}

// Six-bit scale and minimum of 32-column block s, from the 12 bytes of Q4_K and Q5_K.
void six_bits(const uint8_t* packed, int s, uint8_t& scale, uint8_t& minimum) {
  if (s < 4) {
    scale = packed[s] & 63;
    minimum = packed[s + 4] & 63;
  } else {
    scale = static_cast<uint8_t>((packed[s + 4] & 15) | (packed[s - 4] >> 6 << 4));
    minimum = static_cast<uint8_t>((packed[s + 4] >> 4) | (packed[s] >> 6 << 4));
  }
}

// The codes of columns 32 s + 4 j .. 32 s + 4 j + 3 of a super-block, one a byte.
uint32_t super_codes(Format format, const uint8_t* file, int s, int j) {
  if (format == Format::q6_k) {
    const uint8_t* low = file + 64 * (s / 4) + 32 * (s % 2) + 4 * j;
    const uint8_t* high = file + 128 + 32 * (s / 4) + 4 * j;
    return (word(low) >> (s % 4 / 2 * 4) & 0x0f0f0f0fu) | (word(high) >> 2 * (s % 4) & 0x03030303u) << 4;
  }
  const bool five = format == Format::q5_k;
  const uint8_t* low = file + (five ? 48 : 16) + 32 * (s / 2) + 4 * j;
  const uint32_t codes = word(low) >> 4 * (s % 2) & 0x0f0f0f0fu;
  return five ? codes | (word(file + 16 + 4 * j) >> s & 0x01010101u) << 4 : codes;
}

void pack_super(Format format, const uint8_t* file, int row, uint8_t* codes, uint8_t* scales, uint8_t* supers) {
  const QuantLayout layout = quant_layout(format);
  const bool six = format == Format::q6_k;
  if (six) {
    std::memcpy(supers + 2 * row, file + 208, 2);
  } else {
    std::memcpy(supers + 2 * row, file, 2);
    std::memcpy(supers + 32 + 2 * row, file + 2, 2);
  }
  for (int s = 0; s < 8; s++, codes += layout.code_bytes, scales += layout.scale_bytes) {
    if (six) {
      scales[row] = file[192 + 2 * s];
      scales[16 + row] = file[193 + 2 * s];
    } else {
      six_bits(file + 4, s, scales[row], scales[16 + row]);
    }
    for (int j = 0; j < 8; j++) Lines{codes, row, layout.bits}.put(j, super_codes(format, file, s, j));
  }
}

float half_to_float(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00) {
    const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
    std::memcpy(&value, &bits, 4);
  } else {
    // As if the exponent had float32's bias: 2^112 too small, subnormal halves included.
    const uint32_t bits = magnitude << 13;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    if (sign) value = -value;
  }
  return value;
}

// The 32 codes of one row of a block.
void read_codes(const QuantLayout& layout, const uint8_t* block, int row, int codes[32]) {
  for (int k = 0; k < 32; k++) {
    const int j = k / 4, at = 4 * row + k % 4;
    if (layout.bits == 8) {
      codes[k] = block[64 * j + at];
      continue;
    }
    codes[k] = block[64 * (j & 3) + at] >> (j < 4 ? 0 : 4) & 15;
    if (layout.bits == 5) codes[k] |= (block[256 + at] >> j & 1) << 4;
    if (layout.bits == 6) codes[k] |= (block[256 + 64 * (j >> 2) + at] >> 2 * (j & 3) & 3) << 4;
  }
}

// Offsets in a chunk of `blocks` blocks.
struct Parts {
  int64_t scales, supers, end;
};

Parts parts_of(const QuantLayout& layout, int64_t blocks) {
  const int64_t scales = blocks * layout.code_bytes, supers = scales + blocks * layout.scale_bytes;
  return {scales, supers, supers + layout.super_bytes};
}

int64_t chunk_blocks(int64_t blocks, int64_t first) { return blocks - first < kChunk ? blocks - first : kChunk; }

}  // namespace

size_t quant_group_bytes(Format format, int64_t columns) {
  const QuantLayout layout = quant_layout(format);
  const int64_t blocks = columns / 32;
  const int64_t used = blocks * (layout.code_bytes + layout.scale_bytes) + blocks / kChunk * layout.super_bytes;
  return static_cast<size_t>((used + 63) / 64 * 64);
}

// Two groups at a time are expanded.
size_t quant_scratch_bytes(Format, int64_t columns) {
  return static_cast<size_t>(columns / 32) * 2 * kExpandedBlock;
}

size_t quant_ready_bytes(int64_t columns) { return static_cast<size_t>(columns / 32) * sizeof(Ready); }

void pack_quant(Format format, const uint8_t* file_rows, const int64_t* row_order, int64_t rows,
                int64_t columns, uint8_t* out) {
  const QuantLayout layout = quant_layout(format);
  const size_t group_size = quant_group_bytes(format, columns);
  const int64_t blocks = columns / 32;
  for (int64_t first = 0; first < rows; first += kGroup, out += group_size) {
    // The rows of a group go in side by side: its lines are written while they are in cache.
    std::memset(out, 0, group_size);
    for (int row = 0; row < kGroup && first + row < rows; row++) {
      const int64_t source = row_order == nullptr ? first + row : row_order[first + row];
      const uint8_t* file = file_rows + source * (columns / layout.file_columns) * layout.file_bytes;
      uint8_t* chunk = out;
      for (int64_t b = 0; b < blocks; b += kChunk) {
        const int64_t count = chunk_blocks(blocks, b);
        const Parts parts = parts_of(layout, count);
        if (layout.super_bytes != 0) {
          pack_super(format, file, row, chunk, chunk + parts.scales, chunk + parts.supers);
          file += layout.file_bytes;
        } else {
          for (int64_t i = 0; i < count; i++, file += layout.file_bytes) {
            const Lines lines = {chunk + i * layout.code_bytes, row, layout.bits};
            pack_block(format, file, lines, chunk + parts.scales + i * layout.scale_bytes);
          }
        }
        chunk += parts.end;
      }
    }
  }
}

void quant_unpack_row(const PackedWeight& weight, int64_t row, float* out) {
  const QuantLayout layout = quant_layout(weight.format);
  const int64_t blocks = weight.columns / 32;
  const size_t group_size = quant_group_bytes(weight.format, weight.columns);
  const uint8_t* chunk = weight.data + static_cast<size_t>(row / kGroup) * group_size;
  const int r = static_cast<int>(row % kGroup);
  for (int64_t b = 0; b < blocks; b++, out += 32) {
    const Parts parts = parts_of(layout, chunk_blocks(blocks, b / kChunk * kChunk));
    const uint8_t* scales = chunk + parts.scales + b % kChunk * layout.scale_bytes;
    const uint8_t* supers = chunk + parts.supers;
    int codes[32];
    read_codes(layout, chunk + b % kChunk * layout.code_bytes, r, codes);
    if (b % kChunk == kChunk - 1) chunk += parts.end;
    float scale[2], least = 0.0f;
    if (layout.super_bytes == 0) {
      scale[0] = scale[1] = half_to_float(scales + 2 * r);
      if (layout.minima) least = half_to_float(scales + 32 + 2 * r);
    } else {
      const float super = half_to_float(supers + 2 * r);
      if (layout.minima) {
        scale[0] = scale[1] = super * static_cast<float>(scales[r]);
        least = -(half_to_float(supers + 32 + 2 * r) * static_cast<float>(scales[16 + r]));
      } else {
        scale[0] = super * static_cast<float>(static_cast<int8_t>(scales[r]));
        scale[1] = super * static_cast<float>(static_cast<int8_t>(scales[16 + r]));
      }
    }
    for (int k = 0; k < 32; k++) {
      const float value = scale[k / 16] * static_cast<float>(codes[k] - layout.zero);
      out[k] = layout.minima ? value + least : value;
    }
  }
}

}  // namespace aserve
