// The product of packed weights with ready activations. See quant.h for how both lie in memory.
//
// Each output is a sum over the blocks of 32 columns in order, a block's part being
//   fma(fma(bits, scale, unmagic), d, sum) and then, with minima, fma(m, total, sum)
// where bits is the block's integer sum added to the bit pattern of kMagic, which makes the inner fma the
// exact sum times the activations' scale, rounded once. Every path below does just these operations, so
// the result is the same on every path and at every level.
//
// Measured on one core of a Zen 5 server (read of 96 MB 33-35 GB/s; vpdpbusd alone 985 GOP/s), medians:
//   1 row    90-98 % of the read's rate in Q4_1, Q8_0, Q4_0 and Q4_K; 80-85 % in the 5-bit formats and Q6_K
//   8 rows   470-560 GOP/s (22 GB/s): between the two limits
//   32 rows  570-650, 128 rows 610-670 GOP/s
// With many rows the limit is the scaling of block sums: of 11 operations on the multiplying units in Q4_1
// (10 in Q8_0) 8 are vpdpbusd, so 716 (788) GOP/s is the most. At one row the rate hangs on prefetching in
// the order of the addresses, some 16 KB ahead; without prefetch it is half.
// Tried without gain: 7 and 8 rows by 2 groups, 4 rows by 3 groups (the same), 12 rows by 2 groups with
// float sums in memory (a fifth slower).

namespace quant {

#define UNROLL _Pragma("GCC unroll 16")

// How the kernels see a chunk of packed weights. b: a block of the chunk; offset: from the group at hand to
// another one.
template <Format kFormat>
struct Packed {
  static constexpr QuantLayout layout = quant_layout(kFormat);
  static constexpr bool kSuper = layout.super_bytes != 0;
  // Of a block, with its share of the chunk's end: how far apart blocks are, near enough to prefetch by.
  static constexpr int kBlockBytes = layout.code_bytes + layout.scale_bytes + layout.super_bytes / kChunk;
  const uint8_t *codes, *scales, *supers;

  // Of a group: block `first`, a multiple of kChunk, and those after it.
  Packed(const uint8_t* group, int64_t first, int64_t count)
      : codes(group + first * (layout.code_bytes + layout.scale_bytes) + first / kChunk * layout.super_bytes),
        scales(codes + count * layout.code_bytes),
        supers(scales + count * layout.scale_bytes) {}

  // Step j of block b: the codes of columns 4 j .. 4 j + 3.
  Int line(size_t offset, int64_t b, int j, int part) const {
    const uint8_t* block = codes + offset + b * layout.code_bytes;
    if constexpr (layout.bits == 8) return load_line(block + 64 * j, part);
    const Int stored = load_line(block + 64 * (j & 3), part);
    const Int low = both(j < 4 ? stored : down(stored, 4), 15);
    if constexpr (layout.bits == 5) {
      const Int plane = load_line(block + 256, part);
      return either(low, both(j < 4 ? up(plane, 4 - j) : down(plane, j - 4), 16));
    }
    if constexpr (layout.bits == 6) {
      const Int plane = load_line(block + 256 + 64 * (j >> 2), part);
      return either(low, both((j & 3) < 2 ? up(plane, 4 - 2 * (j & 3)) : down(plane, 2 * (j & 3) - 4), 48));
    }
    return low;
  }
  // Of half h of block b; only Q6_K's differ.
  V scale(size_t offset, int64_t b, int h, int part) const {
    const uint8_t* own = scales + offset + b * layout.scale_bytes;
    if constexpr (!kSuper) return halves(own, part);
    const V super = halves(supers + offset, part);
    return mul(super, layout.bits == 6 ? signed_bytes(own + 16 * h, part) : unsigned_bytes(own, part));
  }
  V least(size_t offset, int64_t b, int part) const {
    const uint8_t* own = scales + offset + b * layout.scale_bytes;
    if constexpr (!kSuper) return halves(own + 32, part);
    const V super = halves(supers + offset + 32, part);
    return mul(super, sub(zero(), unsigned_bytes(own + 16, part)));
  }
  void prefetch(size_t offset, int64_t b) const {
    const char* block = reinterpret_cast<const char*>(codes) + offset + b * kBlockBytes;
    UNROLL
    for (int i = 0; i < kBlockBytes; i += 64) _mm_prefetch(block + i, _MM_HINT_T0);
  }
};

// A group with one code a byte and float32 scales: see kExpandedBlock.
template <Format kFormat>
struct Expanded {
  static constexpr QuantLayout layout = quant_layout(kFormat);
  const uint8_t* blocks;

  Expanded(const uint8_t* group, int64_t first, int64_t) : blocks(group + first * kExpandedBlock) {}

  Int line(size_t offset, int64_t b, int j, int part) const {
    return load_line(blocks + offset + b * kExpandedBlock + 64 * j, part);
  }
  const float* floats(size_t offset, int64_t b) const {
    return reinterpret_cast<const float*>(blocks + offset + b * kExpandedBlock + 512);
  }
  V scale(size_t offset, int64_t b, int h, int part) const { return load(floats(offset, b) + 16 * h + W * part); }
  V least(size_t offset, int64_t b, int part) const { return load(floats(offset, b) + 16 + W * part); }
  void prefetch(size_t, int64_t) const {}
};

template <Format kFormat>
[[gnu::noinline]] void expand(const uint8_t* group, int64_t blocks, size_t ahead, uint8_t* out) {
  constexpr QuantLayout layout = quant_layout(kFormat);
  for (int64_t block = 0; block < blocks; block++, out += kExpandedBlock) {
    const int64_t first = block / kChunk * kChunk, b = block - first;
    const Packed<kFormat> source(group, first, minimum(kChunk, blocks - first));
    source.prefetch(ahead, b);
    float* floats = reinterpret_cast<float*>(out + 512);
    UNROLL
    for (int part = 0; part < kParts; part++) {
      UNROLL
      for (int j = 0; j < 8; j++) store_line(out + 64 * j, part, source.line(0, b, j, part));
      store(floats + W * part, source.scale(0, b, 0, part));
      if constexpr (layout.minima) store(floats + 16 + W * part, source.least(0, b, part));
      if constexpr (layout.bits == 6) store(floats + 16 + W * part, source.scale(0, b, 1, part));
    }
  }
}

template <Format kFormat>
constexpr Start start_of(int half) {
  constexpr QuantLayout layout = quant_layout(kFormat);
  if (layout.minima || (layout.bits == 8 && kSignedBytes)) return Start::none;
  if (layout.bits == 6) return half == 0 ? Start::zero32_low : Start::zero32_high;
  return layout.bits == 8 ? Start::zero128 : layout.bits == 5 ? Start::zero16 : Start::zero8;
}

struct TileArgs {
  const uint8_t* weights;  // of the first group: packed or expanded
  const Ready* ready;
  int64_t blocks;       // of a row
  size_t group_stride;  // from group to group of the source
  size_t ahead;         // where to prefetch, from the block at hand, modulo 2^64; 0: nowhere
  float* out;
  int64_t out_stride;
  const float* bias;    // of the tile's first column, or null
  int64_t bias_count;   // columns that have one
};

// kMade rows times kGroups groups. The sums of a block are integers in registers; those of all blocks
// are floats, which the compiler may keep in memory: they are touched once in eight steps.
template <Format kFormat, class Source, int kMade, int kGroups>
[[gnu::noinline]] void tile(const TileArgs& args) {
  constexpr QuantLayout layout = quant_layout(kFormat);
  constexpr int kVectors = kGroups * kParts, kSplits = layout.bits == 6 ? 2 : 1;
  const int64_t blocks = args.blocks;
  const size_t stride = args.group_stride, ahead = args.ahead;
  const Ready* ready = args.ready;
  V total[kMade][kVectors];
  UNROLL
  for (int i = 0; i < kMade; i++) {
    UNROLL
    for (int v = 0; v < kVectors; v++) total[i][v] = zero();
  }
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block / kChunk * kChunk, b = block - first;
    const Source source(args.weights, first, minimum(kChunk, blocks - first));
    if (ahead != 0) {
      UNROLL
      for (int g = 0; g < kGroups; g++) source.prefetch(g * stride + ahead, b);
    }
    const Ready* x = ready + block;
    UNROLL
    for (int h = 0; h < kSplits; h++) {
      constexpr int kSteps = 8 / kSplits;
      const auto start = [&](int i) {
        constexpr int none = static_cast<int>(Start::none);
        const int which = static_cast<int>(start_of<kFormat>(h));
        return which == none ? kMagicBits : x[i * blocks].start[which];
      };
      Int sum[kMade][kVectors];
      UNROLL
      for (int i = 0; i < kMade; i++) {
        UNROLL
        for (int v = 0; v < kVectors; v++) sum[i][v] = begin_sum<layout.bits>(start(i));
      }
      UNROLL
      for (int j = h * kSteps; j < (h + 1) * kSteps; j++) {
        Int codes[kVectors];
        UNROLL
        for (int v = 0; v < kVectors; v++) codes[v] = source.line(v / kParts * stride, b, j, v % kParts);
        UNROLL
        for (int i = 0; i < kMade; i++) {
          int32_t four;
          __builtin_memcpy(&four, x[i * blocks].codes + 4 * j, 4);
          const Int broadcast = splat(four);
          UNROLL
          for (int v = 0; v < kVectors; v++) add_products<layout.bits>(sum[i][v], codes[v], broadcast);
        }
      }
      V scale[kVectors];
      UNROLL
      for (int v = 0; v < kVectors; v++) scale[v] = source.scale(v / kParts * stride, b, h, v % kParts);
      UNROLL
      for (int i = 0; i < kMade; i++) {
        const V own = set1(x[i * blocks].scale), unmagic = set1(x[i * blocks].unmagic);
        UNROLL
        for (int v = 0; v < kVectors; v++) {
          const V part = fma(float_bits(end_sum<layout.bits>(sum[i][v], start(i))), own, unmagic);
          total[i][v] = fma(part, scale[v], total[i][v]);
        }
      }
    }
    if constexpr (layout.minima) {
      V least[kVectors];
      UNROLL
      for (int v = 0; v < kVectors; v++) least[v] = source.least(v / kParts * stride, b, v % kParts);
      UNROLL
      for (int i = 0; i < kMade; i++) {
        const V own = set1(x[i * blocks].total);
        UNROLL
        for (int v = 0; v < kVectors; v++) total[i][v] = fma(least[v], own, total[i][v]);
      }
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; v++) {
    V bias = zero();
    const int64_t left = args.bias_count - v * W;
    if (args.bias != nullptr && left > 0) bias = load(args.bias + v * W, left < W ? static_cast<int>(left) : W);
    UNROLL
    for (int i = 0; i < kMade; i++) {
      store(args.out + i * args.out_stride + v * W, args.bias == nullptr ? total[i][v] : add(total[i][v], bias));
    }
  }
}

template <Format kFormat, class Source, int kGroups, int kMade = kTileRows>
inline void tile_of(int64_t made, const TileArgs& args) {
  if constexpr (kMade > 1) {
    if (made < kMade) return tile_of<kFormat, Source, kGroups, kMade - 1>(made, args);
  }
  tile<kFormat, Source, kMade, kGroups>(args);
}

// `rows` rows times kGroups groups, in tiles of nearly equal height.
template <Format kFormat, class Source, int kGroups>
inline void row_tiles(TileArgs args, int64_t rows) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t t = 0, row = 0; t < tiles; t++) {
    const int64_t made = rows * (t + 1) / tiles - row;
    tile_of<kFormat, Source, kGroups>(made, args);
    args.ready += made * args.blocks;
    args.out += made * args.out_stride;
    args.ahead = 0;
    row += made;
  }
}

// Rows of activations gone through before going on to the next weights stay in the second-level cache.
constexpr int64_t kChunkBytes = 384 << 10;
// How far ahead of the block at hand weights are asked for.
constexpr size_t kAhead = 16384;

// What to fetch beside the groups `at`, as a distance from them, modulo 2^64: groups that come some tiles later, or
// what comes after the share. left: the share's bytes from `at` on. 0: nothing.
inline size_t fetch_distance(const uint8_t* at, size_t groups_bytes, size_t left, const Upcoming* upcoming) {
  if (groups_bytes > 2 * kAhead) return kAhead;
  const size_t ahead = ceil_div(static_cast<int64_t>(kAhead), static_cast<int64_t>(groups_bytes)) * groups_bytes;
  if (ahead < left) return ahead;
  size_t past = ahead - left;
  for (; upcoming->bytes > 0; upcoming++) {
    if (past < upcoming->bytes)
      return reinterpret_cast<uintptr_t>(upcoming->data) + past - reinterpret_cast<uintptr_t>(at);
    past -= upcoming->bytes;
  }
  return 0;
}

template <Format kFormat, int kGroups>
inline void multiply_groups(size_t size, size_t ahead, TileArgs args, int64_t rows, uint8_t* scratch) {
  // Up to so many rows the tiles take the codes apart themselves, for more that is done once. Nibbles cost a
  // tile little; 5- and 6-bit codes more.
  constexpr int bits = quant_layout(kFormat).bits;
  if (bits == 8 || rows <= (bits == 4 ? kDirectRows4 : kDirectRows)) {
    args.group_stride = size;
    args.ahead = ahead;
    row_tiles<kFormat, Packed<kFormat>, kGroups>(args, rows);
  } else {
    args.group_stride = static_cast<size_t>(args.blocks) * kExpandedBlock;
    args.ahead = 0;
    for (int g = 0; g < kGroups; g++) {
      expand<kFormat>(args.weights + g * size, args.blocks, ahead, scratch + g * args.group_stride);
    }
    args.weights = scratch;
    row_tiles<kFormat, Expanded<kFormat>, kGroups>(args, rows);
  }
}

template <Format kFormat>
void multiply_format(const PackedWeight& weight, const Ready* ready, int64_t rows, int64_t first, int64_t last,
                     float* out, int64_t out_stride, uint8_t* scratch, const Upcoming* upcoming) {
  const int64_t blocks = weight.columns / 32;
  const size_t size = quant_group_bytes(kFormat, weight.columns);
  const int64_t fitting = kChunkBytes / (blocks * static_cast<int64_t>(sizeof(Ready)));
  const int64_t chunk = maximum(fitting / kTileRows, 8) * kTileRows;
  const Upcoming nothing = {nullptr, 0, 0};
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = minimum(chunk, rows - row);
    for (int64_t group = first; group < last;) {
      const int64_t column = group * kGroup;
      const float* bias = weight.bias == nullptr ? nullptr : weight.bias + column;
      const uint8_t* data = weight.data + static_cast<size_t>(group) * size;
      const TileArgs args = {data, ready + row * blocks, blocks, 0, 0, out + row * out_stride + column, out_stride,
                             bias, weight.rows - column};
      const bool wide = kTileGroups > 1 && count > 1 && last - group >= kTileGroups;
      const int64_t taken = wide ? kTileGroups : 1;
      const size_t ahead = fetch_distance(data, static_cast<size_t>(taken) * size,
                                          static_cast<size_t>(last - group) * size,
                                          row + count < rows ? &nothing : upcoming);
      if (wide) {
        multiply_groups<kFormat, kTileGroups>(size, ahead, args, count, scratch);
      } else {
        multiply_groups<kFormat, 1>(size, ahead, args, count, scratch);
      }
      group += taken;
    }
  }
}

inline void multiply_tiles(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                           int64_t last_group, float* out, int64_t out_stride, void* scratch,
                           const Upcoming* upcoming) {
  const auto run = [&](auto function) {
    function(weight, static_cast<const Ready*>(ready), rows, first_group, last_group, out, out_stride,
             static_cast<uint8_t*>(scratch), upcoming);
  };
  switch (weight.format) {
    case Format::q4_0:
      return run(multiply_format<Format::q4_0>);
    case Format::q4_1:
      return run(multiply_format<Format::q4_1>);
    case Format::q5_0:
      return run(multiply_format<Format::q5_0>);
    case Format::q5_1:
      return run(multiply_format<Format::q5_1>);
    case Format::q8_0:
      return run(multiply_format<Format::q8_0>);
    case Format::q4_k:
      return run(multiply_format<Format::q4_k>);
    case Format::q5_k:
      return run(multiply_format<Format::q5_k>);
    default:
      return run(multiply_format<Format::q6_k>);
  }
}

}  // namespace quant

#undef UNROLL
