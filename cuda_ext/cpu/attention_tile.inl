// The arithmetic of paged attention: one tile of queries over one segment of keys. See attention.inl.

constexpr int kTile = 48;      // queries of a tile; a multiple of kRows
constexpr int kKeys = 64;      // keys of a step; a multiple of W * kCols
constexpr int kSegment = 256;  // keys of a segment; a multiple of kKeys
constexpr float kNever = -1e30f;

// What a tile has gathered over some keys: greatest score, sum of weights, weighted values.
struct Sums {
  float* greatest;  // [queries]
  float* weight;    // [queries]; 0 for one that has seen no key yet
  float* values;    // [queries, width]
};

inline int64_t padded_width(int64_t head_size) { return ceil_div(head_size, W) * W; }
inline int64_t sums_floats(int64_t queries, int64_t width) { return queries * (width + 2); }
inline Sums sums_at(float* p, int64_t queries) { return {p, p + queries, p + 2 * queries}; }

struct Workspace {
  float* query;    // [kTile, head_size], scaled
  float* columns;  // [head_size, kKeys]
  float* scores;   // [kTile, kKeys]
  float* lanes;    // [kTile, W]: sums of weights lane by lane
  float* rescale;  // [kTile]
  Sums open, closed;
};

inline int64_t workspace_floats(int64_t head_size, int64_t width) {
  return kTile * head_size + head_size * kKeys + kTile * kKeys + kTile * W + kTile + 2 * sums_floats(kTile, width);
}

inline Workspace workspace_at(float* p, int64_t head_size, int64_t width) {
  Workspace w;
  w.columns = p;
  p += head_size * kKeys;
  w.scores = p;
  p += kTile * kKeys;
  w.lanes = p;
  p += kTile * W;
  w.open = sums_at(p, kTile);
  p += sums_floats(kTile, width);
  w.closed = sums_at(p, kTile);
  p += sums_floats(kTile, width);
  w.query = p;
  p += kTile * head_size;
  w.rescale = p;
  return w;
}

// The cache lines of `bytes` from `offset` on that start in them. Blocks are scattered, which the hardware's
// own prefetching cannot follow, and a burst of requests would stall: they go between the arithmetic.
inline void prefetch(const void* row, size_t offset, size_t bytes) {
  for (size_t at = (offset + 63) / 64 * 64; at < offset + bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(row) + at, 0, 3);
}

// Keys of one step as columns: columns[d * kKeys + t] = key t, feature d, for whole vectors of keys.
// ahead: rows to be read next, [kKeys].
template <typename T>
inline void turn_keys(const void* const* keys, const void* const* ahead, int vectors, int head_size,
                      float* columns) {
  for (int j = 0; j < vectors; j++) {
    float* out = columns + j * W;
    Words words[4];
    if constexpr (sizeof(T) == 4) {
      for (int d = 0; d < head_size; d += 4) {
        turn(keys + j * W, static_cast<size_t>(d) * 4, words);
        for (int i = 0; i < W; i++) prefetch(ahead[j * W + i], static_cast<size_t>(d) * 4, 16);
        for (int i = 0; i < 4; i++) store(out + (d + i) * kKeys, low(static_cast<const T*>(nullptr), words[i]));
      }
    } else {
      for (int d = 0; d < head_size; d += 8) {
        turn(keys + j * W, static_cast<size_t>(d) * 2, words);
        for (int i = 0; i < W; i++) prefetch(ahead[j * W + i], static_cast<size_t>(d) * 2, 16);
        for (int i = 0; i < 4; i++) {
          store(out + (d + 2 * i) * kKeys, low(static_cast<const T*>(nullptr), words[i]));
          store(out + (d + 2 * i + 1) * kKeys, high(static_cast<const T*>(nullptr), words[i]));
        }
      }
    }
  }
}

// scores[m, 0 : N * W] = query[m] . columns, m < M.
template <int M, int N>
inline void score_block(const float* query, const float* columns, int head_size, float* scores) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) sum[m][j] = zero();
  for (int d = 0; d < head_size; d++) {
    V key[N];
    for (int j = 0; j < N; j++) key[j] = load(columns + d * kKeys + j * W);
    for (int m = 0; m < M; m++) {
      const V q = set1(query[m * head_size + d]);
      for (int j = 0; j < N; j++) sum[m][j] = fma(q, key[j], sum[m][j]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) store(scores + m * kKeys + j * W, sum[m][j]);
}

template <int M>
inline void score_rows(const float* query, const float* columns, int vectors, int head_size, float* scores) {
  int j = 0;
  for (; j + kCols <= vectors; j += kCols) score_block<M, kCols>(query, columns + j * W, head_size, scores + j * W);
  for (; j < vectors; j++) score_block<M, 1>(query, columns + j * W, head_size, scores + j * W);
}

// values[m] = values[m] * rescale[m] + sum over t in [first, last) of weights[m, t] * value t, m < M,
// for N vectors of features; `part` of the last vector's lanes exist. ahead: as above, or null.
template <typename T, int M, int N, bool kPart>
inline void value_block(const float* weights, const void* const* rows, const void* const* ahead, int first, int last, int feature,
                        int part, const float* rescale, float* values, int64_t width) {
  V sum[M][N];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) sum[m][j] = mul(load(values + m * width + feature + j * W), set1(rescale[m]));
  for (int t = first; t < last; t++) {
    const T* row = static_cast<const T*>(rows[t]) + feature;
    if (ahead != nullptr) prefetch(ahead[t], feature * sizeof(T), N * W * sizeof(T));
    V value[N];
    for (int j = 0; j < N; j++) value[j] = kPart && j == N - 1 ? load(row + j * W, part) : load(row + j * W);
    for (int m = 0; m < M; m++) {
      const V weight = set1(weights[m * kKeys + t]);
      for (int j = 0; j < N; j++) sum[m][j] = fma(weight, value[j], sum[m][j]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) store(values + m * width + feature + j * W, sum[m][j]);
}

template <typename T, int M>
inline void value_rows(const float* weights, const void* const* rows, const void* const* ahead, int first, int last, int head_size,
                       const float* rescale, float* values, int64_t width) {
  int d = 0;
  for (; d + kCols * W <= head_size; d += kCols * W)
    value_block<T, M, kCols, false>(weights, rows, ahead, first, last, d, W, rescale, values, width);
  for (; d + W <= head_size; d += W)
    value_block<T, M, 1, false>(weights, rows, ahead, first, last, d, W, rescale, values, width);
  if (d < head_size)
    value_block<T, M, 1, true>(weights, rows, ahead, first, last, d, head_size - d, rescale, values, width);
}

// f(integral constant M, first row) over `count` rows in register tiles of M <= kRows.
template <int M>
struct Size {
  static constexpr int value = M;
};
template <typename F>
inline void by_rows(int count, const F& f) {
  int m = 0;
  for (; m + kRows <= count; m += kRows) f(Size<kRows>{}, m);
  switch (count - m) {
    case 5:
      return f(Size<5>{}, m);
    case 4:
      return f(Size<4>{}, m);
    case 3:
      return f(Size<3>{}, m);
    case 2:
      return f(Size<2>{}, m);
    case 1:
      return f(Size<1>{}, m);
    default:
      return;
  }
}

// Which tile: of which row and KV head.
struct Place {
  int32_t row, kv_head, tile;
};

struct TileShape {
  int64_t first_token;     // of the row in q and out
  int64_t first_position;  // of the row's first query
  int64_t first_index;     // of the tile's first query among the row's group * tokens
  int count;               // queries of the tile
  int group;
  int64_t begin, end;      // keys any of its queries sees
};

inline TileShape tile_shape(const AttentionArgs& a, int row, int tile) {
  TileShape s;
  s.group = static_cast<int>(a.q_heads / a.kv_heads);
  const int64_t tokens = a.query_start[row + 1] - a.query_start[row];
  s.first_token = a.query_start[row];
  s.first_position = a.seq_lens[row] - tokens;
  s.first_index = static_cast<int64_t>(tile) * kTile;
  s.count = static_cast<int>(minimum(kTile, tokens * s.group - s.first_index));
  s.end = s.first_position + (s.first_index + s.count - 1) / s.group + 1;
  const int64_t first = s.first_position + s.first_index / s.group;
  s.begin = a.window > 0 ? maximum(0, first - a.window + 1) : 0;
  return s;
}

// Scores of query m become weights, given its position and the step's first key; keeps m's running sums.
// visible: [first, last) of the step's keys.
inline void weigh(const AttentionArgs& a, float* scores, int vectors, int first, int last, float slope,
                  int64_t distance, Sums sums, float* lane_sums, float* rescale, int m) {
  if (first >= last) {
    for (int j = 0; j < vectors; j++) store(scores + j * W, zero());
    rescale[m] = 1.0f;
    return;
  }
  V top = set1(kNever);
  const bool whole = first <= 0 && last >= vectors * W;
  for (int j = 0; j < vectors; j++) {
    V s = load(scores + j * W);
    if (a.softcap > 0) s = mul(set1(a.softcap), tanh(mul(s, set1(1.0f / a.softcap))));
    if (slope != 0) {
      const V away = sub(set1(static_cast<float>(distance - j * W)), iota());
      s = sub(s, mul(set1(slope), away));
    }
    if (!whole) s = select(lanes(first - j * W, last - j * W), s, set1(kNever));
    store(scores + j * W, s);
    top = max(top, s);
  }
  const float before = sums.greatest[m];
  const float highest = hmax(top);
  const float greatest = highest > before ? highest : before;
  sums.greatest[m] = greatest;
  float scale = 1.0f;
  if (greatest != before) {
    float lane[W];
    store(lane, exp(set1(before - greatest)));
    scale = lane[0];
  }
  rescale[m] = scale;
  V sum = mul(load(lane_sums + m * W), set1(scale));
  for (int j = 0; j < vectors; j++) {
    V e = exp(sub(load(scores + j * W), set1(greatest)));
    if (!whole) e = select(lanes(first - j * W, last - j * W), e, zero());
    store(scores + j * W, e);
    sum = add(sum, e);
  }
  store(lane_sums + m * W, sum);
}

// Keys [begin, end) of a row and KV head, within one step. Empty where there is none.
struct Step {
  Place place;
  int64_t begin, end;
};

inline Step step_at(const Place& place, int64_t begin, int64_t limit) {
  return {place, begin, minimum(limit, begin / kKeys * kKeys + kKeys)};
}

// Where a step's keys and values are, by their place in the step. Those that are not to be read, before
// `first` and from `last` on, have the address of a neighbour.
struct Found {
  const void *keys[kKeys + W], *values[kKeys];
  int first, last;
};

// Finds them through the block table.
template <typename T>
inline void find(const AttentionArgs& a, const Step& step, Found& found) {
  const int32_t* table = a.block_tables + step.place.row * a.table_stride;
  found.first = static_cast<int>(step.begin % kKeys);
  found.last = found.first + static_cast<int>(step.end - step.begin);
  int64_t block = step.begin / a.block_size, slot = step.begin % a.block_size;
  for (int t = found.first; t < found.last; block++, slot = 0) {
    const int64_t offset = table[block] * a.cache_block + step.place.kv_head * a.cache_head;
    for (; slot < a.block_size && t < found.last; slot++, t++) {
      found.keys[t] = static_cast<const T*>(a.k_cache) + offset + slot * a.cache_slot;
      found.values[t] = static_cast<const T*>(a.v_cache) + offset + slot * a.cache_slot;
    }
  }
  for (int t = 0; t < found.first; t++) found.keys[t] = found.keys[found.first];
  for (int t = 0; t < found.first; t++) found.values[t] = found.values[found.first];
  for (int t = found.last; t < kKeys + W; t++) found.keys[t] = found.keys[found.last - 1];
  for (int t = found.last; t < kKeys; t++) found.values[t] = found.values[found.last - 1];
}

// The tile's sums over the keys [begin, end) of one segment, into sums. following: what this thread reads
// after them.
template <typename T>
inline void segment_sums(const AttentionArgs& a, const Place& place, const TileShape& s, const Workspace& w,
                         int64_t begin, int64_t end, const Step& following, Sums sums, int64_t width) {
  const int head_size = static_cast<int>(a.head_size);
  for (int m = 0; m < s.count; m++) sums.greatest[m] = kNever;
  for (int i = 0; i < s.count * W; i += W) store(w.lanes + i, zero());
  for (int64_t i = 0; i < s.count * width; i += W) store(sums.values + i, zero());
  Found both[2];
  Step step = step_at(place, begin, end);
  find<T>(a, step, both[0]);
  for (int turns = 0; step.begin < end; turns ^= 1) {
    const Found& found = both[turns];
    const Found* ahead = &both[turns ^ 1];
    const Step next = step.end < end ? step_at(place, step.end, end) : following;
    if (next.begin == next.end) {
      ahead = &found;
    } else {
      find<T>(a, next, both[turns ^ 1]);
    }
    const int64_t at = step.begin / kKeys * kKeys;
    const int vectors = (found.last + W - 1) / W;
    turn_keys<T>(found.keys, ahead->keys, vectors, head_size, w.columns);
    by_rows(s.count, [&](auto size, int m) {
      score_rows<decltype(size)::value>(w.query + m * head_size, w.columns, vectors, head_size,
                                        w.scores + m * kKeys);
    });
    for (int m = 0; m < s.count; m++) {
      const int64_t index = s.first_index + m, position = s.first_position + index / s.group;
      const int64_t first = a.window > 0 ? maximum(0, position - a.window + 1) : 0;
      const int64_t head = place.kv_head * s.group + index % s.group;
      weigh(a, w.scores + m * kKeys, vectors, static_cast<int>(maximum(first - at, 0)),
            static_cast<int>(minimum(position + 1 - at, found.last)),
            a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[head], position - at, sums, w.lanes, w.rescale, m);
    }
    by_rows(s.count, [&](auto size, int m) {
      value_rows<T, decltype(size)::value>(w.scores + m * kKeys, found.values, m == 0 ? ahead->values : nullptr,
                                           found.first, found.last, head_size, w.rescale + m,
                                           sums.values + m * width, width);
    });
    step = step_at(place, step.end, end);
  }
  for (int m = 0; m < s.count; m++) sums.weight[m] = hsum(load(w.lanes + m * W));
}

// total += part, query by query; total is fresh where `first`.
inline void merge(Sums total, Sums part, int count, int64_t width, bool first) {
  for (int m = 0; m < count; m++) {
    if (!first && part.weight[m] == 0) continue;
    if (first || total.weight[m] == 0) {
      total.greatest[m] = part.greatest[m];
      total.weight[m] = part.weight[m];
      for (int64_t i = 0; i < width; i += W) store(total.values + m * width + i, load(part.values + m * width + i));
      continue;
    }
    const float greatest = part.greatest[m] > total.greatest[m] ? part.greatest[m] : total.greatest[m];
    const V before = exp(set1(total.greatest[m] - greatest)), now = exp(set1(part.greatest[m] - greatest));
    float a[W], b[W];
    store(a, before);
    store(b, now);
    total.greatest[m] = greatest;
    total.weight[m] = total.weight[m] * a[0] + part.weight[m] * b[0];
    for (int64_t i = 0; i < width; i += W) {
      float* to = total.values + m * width + i;
      store(to, fma(load(part.values + m * width + i), now, mul(load(to), before)));
    }
  }
}

inline void write_out(const AttentionArgs& a, const Place& place, const TileShape& s, Sums sums, int64_t width) {
  const int head_size = static_cast<int>(a.head_size);
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    for (int m = 0; m < s.count; m++) {
      const int64_t index = s.first_index + m, token = s.first_token + index / s.group;
      const int64_t head = place.kv_head * s.group + index % s.group;
      T* out = static_cast<T*>(a.out) + (token * a.q_heads + head) * head_size;
      const V scale = set1(1.0f / sums.weight[m]);
      int d = 0;
      for (; d + W <= head_size; d += W) store(out + d, mul(load(sums.values + m * width + d), scale));
      if (d < head_size) store(out + d, mul(load(sums.values + m * width + d), scale), head_size - d);
    }
  });
}

inline void read_query(const AttentionArgs& a, const Place& place, const TileShape& s, float* query) {
  const int head_size = static_cast<int>(a.head_size);
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    for (int m = 0; m < s.count; m++) {
      const int64_t index = s.first_index + m, token = s.first_token + index / s.group;
      const int64_t head = place.kv_head * s.group + index % s.group;
      const T* q = static_cast<const T*>(a.q) + token * a.q_token + head * a.q_head;
      for (int d = 0; d < head_size; d += W) {
        const int n = head_size - d < W ? head_size - d : W;
        store(query + m * head_size + d, mul(load(q + d, n), set1(a.scale)), n);
      }
    }
  });
}
