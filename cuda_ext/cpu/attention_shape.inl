// What attention works on: tiles of queries, stretches of keys, and the memory in between. See attention.inl.

constexpr int kTile = 48;      // queries of a tile; a multiple of kRows
constexpr int kKeys = 64;      // keys turned into columns at a time; a multiple of W * kCols
constexpr int kSegment = 256;  // keys of a segment; a multiple of kKeys
constexpr int kAhead = 64;     // rows of the cache requested ahead of their use, at most; a multiple of W
constexpr float kNever = -1e30f;

// What a tile has gathered over some keys: greatest score, sum of weights, weighted values. Values lie in
// the order of load_pair.
struct Sums {
  float* greatest;  // [queries]
  float* weight;    // [queries]; 0 for one that has seen no key yet
  float* values;    // [queries, width]
};

inline int64_t padded_width(int64_t head_size) { return ceil_div(head_size, 2 * W) * 2 * W; }
inline int64_t sums_floats(int64_t queries, int64_t width) { return queries * (width + 2); }
inline Sums sums_at(float* p, int64_t queries, int64_t width) {
  return {p + queries * width, p + queries * (width + 1), p};
}

struct Workspace {
  float* query;    // [kTile, head_size], scaled
  float* columns;  // [head_size, kKeys]
  float* scores;   // [kTile, kSegment]
  Sums open, closed;
  // Of a segment's keys from begin / W * W on, in whole vectors: the keys' rows in the cache, the values'
  // rows, then the first rows that the thread reads after them.
  const char** rows;  // [2 * kSegment + kAhead]
};

inline int64_t workspace_floats(int64_t head_size, int64_t width) {
  const int64_t pointers = (2 * kSegment + kAhead) * static_cast<int64_t>(sizeof(char*) / sizeof(float));
  return head_size * kKeys + kTile * kSegment + 2 * sums_floats(kTile, width) + kTile * head_size + pointers;
}

inline Workspace workspace_at(float* p, int64_t head_size, int64_t width) {
  Workspace w;
  w.columns = p;
  p += head_size * kKeys;
  w.scores = p;
  p += kTile * kSegment;
  w.open = sums_at(p, kTile, width);
  p += sums_floats(kTile, width);
  w.closed = sums_at(p, kTile, width);
  p += sums_floats(kTile, width);
  w.query = p;
  p += kTile * head_size;
  w.rows = reinterpret_cast<const char**>(p);
  return w;
}

// Which tile: of which row, for which KV heads.
struct Place {
  int32_t row, kv_head, heads, tile;
};

struct TileShape {
  int64_t first_token;     // of the row in q and out
  int64_t first_position;  // of the row's first query
  int64_t first_index;     // of the tile's first query among the row's group * tokens
  int count;               // queries of the tile for each KV head
  int group;
  int rows;                // queries of the tile, those of its first KV head first
  int64_t begin, end;      // keys any of its queries sees
};

inline TileShape tile_shape(const AttentionArgs& a, const Place& place) {
  const int row = place.row, tile = place.tile;
  TileShape s;
  s.group = static_cast<int>(a.q_heads / a.kv_heads);
  const int64_t tokens = a.query_start[row + 1] - a.query_start[row];
  s.first_token = a.query_start[row];
  s.first_position = a.seq_lens[row] - tokens;
  s.first_index = static_cast<int64_t>(tile) * kTile;
  s.count = static_cast<int>(minimum(kTile, tokens * s.group - s.first_index));
  s.rows = s.count * place.heads;
  s.end = s.first_position + (s.first_index + s.count - 1) / s.group + 1;
  const int64_t first = s.first_position + s.first_index / s.group;
  s.begin = a.window > 0 ? maximum(0, first - a.window + 1) : 0;
  return s;
}

// How many KV heads a tile of a row takes. A block of the cache holds the keys of all heads one after the other: few
// queries go through it in that order, as fast as the memory gives it, where that leaves enough tiles.
inline int64_t heads_of_tile(const AttentionArgs& a, int64_t row, int workers) {
  const int64_t group = a.q_heads / a.kv_heads, each = (a.query_start[row + 1] - a.query_start[row]) * group;
  if (each > kFew || a.rows < 4 * workers) return 1;
  return minimum(a.kv_heads, kTile / maximum(each, 1));
}

// Keys [begin, end) of a tile's row and KV heads, within one segment. Empty where there is none.
struct Stretch {
  Place place;
  int64_t begin, end;
};

inline Stretch stretch_at(const Place& place, int64_t begin, int64_t limit) {
  return {place, begin, minimum(limit, begin / kSegment * kSegment + kSegment)};
}

// Which of a stretch's keys a query sees, by their place in the segment.
struct Range {
  int first, last;
};

inline Range visible(const AttentionArgs& a, const TileShape& s, const Stretch& keys, int query) {
  const int64_t position = s.first_position + (static_cast<int>(s.first_index) + query) / s.group;
  const int64_t first = a.window > 0 ? maximum(keys.begin, position - a.window + 1) : keys.begin;
  const int64_t last = minimum(keys.end, position + 1), start = keys.begin / kSegment * kSegment;
  return {static_cast<int>(first - start), static_cast<int>(maximum(first, last) - start)};
}

// Finds rows of the cache through the block table: of the keys begin / W * W and following, in whole vectors
// and at most `limit`; the rows of the first KV head. Those before `begin` and from `end` on get the address of a neighbour. Returns how many.
inline int find_rows(const AttentionArgs& a, const Stretch& keys, const void* cache, size_t size, int limit,
                     const char** rows) {
  const int32_t* table = a.block_tables + keys.place.row * a.table_stride;
  const int64_t start = keys.begin / W * W;
  const int count = static_cast<int>(minimum(limit, ceil_div(keys.end - start, W) * W));
  const int last = static_cast<int>(minimum(count, keys.end - start));
  const int64_t step = a.cache_slot * static_cast<int64_t>(size);
  int t = static_cast<int>(keys.begin - start);
  const int first = t;
  int64_t block = keys.begin / a.block_size, slot = keys.begin % a.block_size;
  for (; t < last; block++, slot = 0) {
    const int64_t at = table[block] * a.cache_block + keys.place.kv_head * a.cache_head + slot * a.cache_slot;
    const char* row = static_cast<const char*>(cache) + at * static_cast<int64_t>(size);
    const int stop = static_cast<int>(minimum(last, t + a.block_size - slot));
    for (; t < stop; t++, row += step) rows[t] = row;
  }
  for (t = 0; t < first; t++) rows[t] = rows[first];
  for (t = last; t < count; t++) rows[t] = rows[last - 1];
  return count;
}

// Rows requested ahead: enough bytes to hide the memory's latency, few enough to stay in the nearest cache. Where the
// reading is in the order of the addresses the hardware's own prefetching does its part.
inline int rows_ahead(size_t row_bytes, int heads) {
  const int64_t rows = (heads > 1 ? 4096 : 8192) / static_cast<int64_t>(row_bytes) / W * W;
  return static_cast<int>(maximum(W, minimum(kAhead, rows)));
}

// f(place among the tile's queries, token, head) for each of them.
template <typename F>
inline void each_query(const Place& place, const TileShape& s, const F& f) {
  for (int h = 0, m = 0; h < place.heads; h++) {
    int64_t token = s.first_token + s.first_index / s.group, member = s.first_index % s.group;
    for (const int stop = m + s.count; m < stop; m++) {
      f(m, token, (place.kv_head + h) * s.group + member);
      if (++member == s.group) {
        member = 0;
        token++;
      }
    }
  }
}

inline void read_query(const AttentionArgs& a, const Place& place, const TileShape& s, float* query) {
  const int head_size = static_cast<int>(a.head_size);
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    each_query(place, s, [&](int m, int64_t token, int64_t head) {
      const T* q = static_cast<const T*>(a.q) + token * a.q_token + head * a.q_head;
      for (int d = 0; d < head_size; d += W) {
        const int n = head_size - d < W ? head_size - d : W;
        store(query + m * head_size + d, mul(load(q + d, n), set1(a.scale)), n);
      }
    });
  });
}

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// TC: the cache's type, which decides the order of the values.
template <typename TC>
inline void write_out(const AttentionArgs& a, const Place& place, const TileShape& s, Sums sums, int64_t width) {
  const int head_size = static_cast<int>(a.head_size);
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    each_query(place, s, [&](int m, int64_t token, int64_t head) {
      T* out = static_cast<T*>(a.out) + (token * a.q_heads + head) * head_size;
      const V scale = set1(1.0f / sums.weight[m]);
      for (int d = 0; d < head_size; d += 2 * W) {
        V x = mul(load(sums.values + m * width + d), scale), y = mul(load(sums.values + m * width + d + W), scale);
        if constexpr (is_bf16<TC>) interleave(x, y);
        if (d + 2 * W <= head_size) {
          store(out + d, x);
          store(out + d + W, y);
        } else {
          store(out + d, x, head_size - d < W ? head_size - d : W);
          if (d + W < head_size) store(out + d + W, y, head_size - d - W);
        }
      }
    });
  });
}
