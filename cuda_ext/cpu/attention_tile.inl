// The arithmetic of paged attention: one tile of queries over one stretch of keys. See attention.inl.
//
// A score is the sum of two chains of products, over the even and over the odd features, each in order. All
// paths keep to that, so that a query's result does not depend on the path.

// 2 W features. Those of a 16-bit type that is the upper half of float32 come as the even and the odd ones.
template <typename T>
inline void load_pair(const T* p, V& x, V& y) {
  x = load(p);
  y = load(p + W);
}
template <>
inline void load_pair(const bf16* p, V& x, V& y) {
  const Words both = load_words(p);
  x = low(p, both);
  y = high(p, both);
}
// The first n of them, n even; zero for the others.
template <typename T>
inline void load_pair(const T* p, int n, V& x, V& y) {
  x = load(p, n < W ? n : W);
  y = n > W ? load(p + W, n - W) : zero();
}
template <>
inline void load_pair(const bf16* p, int n, V& x, V& y) {
  const Words both = load_words(p, n / 2);
  x = low(p, both);
  y = high(p, both);
}

// Requests a share, `part` of `parts`, of W rows of the cache, `offset` bytes further. Blocks are scattered, which the hardware's own
// prefetching cannot follow, and a burst of requests would stall: shares go between the arithmetic.
inline void request(const char* const* rows, int64_t offset, int part, int parts) {
  const int last = W * (part + 1) / parts;
  for (int i = W * part / parts; i < last; i++)
    for (int line = 0; line < parts; line++) __builtin_prefetch(rows[i] + offset + line * static_cast<int>(sizeof(Words)), 0, 3);
}

// W words from each of W rows of the cache, `offset` bytes further, turned: words[i] holds word `first` + i of every row; `count`
// of them exist.
[[gnu::always_inline]] inline void read_words(const char* const* rows, int64_t offset, int first, int count,
                                              Words* words) {
  offset += 4 * first;
  if (count >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) words[i] = load_words(rows[i] + offset);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) words[i] = load_words(rows[i] + offset, count);
  }
  turn(words);
}

// sum[0][m] += even and sum[1][m] += odd features of a word of W keys times query m.
template <typename T, int M>
[[gnu::always_inline]] inline void add_word(const float* const (&query)[M], int index, Words word, V (&sum)[2][M]) {
  if constexpr (sizeof(T) == 4) {
    const V key = low(static_cast<const T*>(nullptr), word);
    V(&chain)[M] = sum[index % 2];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) chain[m] = fma(set1(query[m][index]), key, chain[m]);
  } else {
    const V even = low(static_cast<const T*>(nullptr), word), odd = high(static_cast<const T*>(nullptr), word);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[0][m] = fma(set1(query[m][2 * index]), even, sum[0][m]);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[1][m] = fma(set1(query[m][2 * index + 1]), odd, sum[1][m]);
  }
}

// scores[m, 0 : W] = query[m] . key, m < M, for W keys: each word is used where it comes up. The keys, and the rows
// requested, lie `offset` bytes after what `rows` and `ahead` point at.
template <typename T, int M>
inline void score_keys(const float* query, const char* const* rows, const char* const* ahead, int64_t offset,
                       int head_size, float* scores) {
  constexpr int kEach = 4 / sizeof(T);  // features of a word
  V sum[2][M];
  const float* q[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    sum[0][m] = sum[1][m] = zero();
    q[m] = query + m * head_size;
  }
  const int words = head_size / kEach, parts = (words + W - 1) / W;
  int first = 0;
  for (; first + W <= words; first += W) {
    Words word[W];
    read_words(rows, offset, first, W, word);
    request(ahead, offset, first / W, parts);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) add_word<T, M>(q, i, word[i], sum);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) q[m] += W * kEach;
  }
  if (first < words) {
    Words word[W];
    read_words(rows, offset, first, words - first, word);
    request(ahead, offset, first / W, parts);
    for (int i = 0; i < words - first; i += 2) {  // the head size is a multiple of 8
      add_word<T, M>(q, i, word[i], sum);
      add_word<T, M>(q, i + 1, word[i + 1], sum);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) store(scores + m * kSegment, add(sum[0][m], sum[1][m]));
}

// Keys as columns: columns[d * kKeys + t] = key t, feature d, for whole vectors of keys.
template <typename T>
inline void turn_keys(const char* const* rows, const char* const* ahead, int vectors, int head_size,
                      float* columns) {
  constexpr int kEach = 4 / sizeof(T);
  const int words = head_size / kEach, parts = (words + W - 1) / W;
  for (int j = 0; j < vectors; j++) {
    for (int first = 0; first < words; first += W) {
      Words word[W];
      const int count = words - first < W ? words - first : W;
      read_words(rows + j * W, 0, first, count, word);
      request(ahead + j * W, 0, first / W, parts);
      float* out = columns + static_cast<int64_t>(first) * kEach * kKeys + j * W;
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) {
        if (i >= count) break;
        store(out + i * kEach * kKeys, low(static_cast<const T*>(nullptr), word[i]));
        if constexpr (kEach == 2) store(out + (2 * i + 1) * kKeys, high(static_cast<const T*>(nullptr), word[i]));
      }
    }
  }
}

// scores[m, 0 : N * W] = query[m] . columns, m < M.
template <int M, int N>
inline void score_block(const float* query, const float* columns, int head_size, float* scores) {
  V sum[2][M][N];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) sum[0][m][j] = sum[1][m][j] = zero();
  for (int d = 0; d < head_size; d += 2) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      V key[N];
      for (int j = 0; j < N; j++) key[j] = load(columns + (d + odd) * kKeys + j * W);
      for (int m = 0; m < M; m++) {
        const V q = set1(query[m * head_size + d + odd]);
        for (int j = 0; j < N; j++) sum[odd][m][j] = fma(q, key[j], sum[odd][m][j]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) store(scores + m * kSegment + j * W, add(sum[0][m][j], sum[1][m][j]));
}

template <int M>
inline void score_rows(const float* query, const float* columns, int vectors, int head_size, float* scores) {
  constexpr int kWide = kCols / 2;
  int j = 0;
  for (; j + kWide <= vectors; j += kWide) score_block<M, kWide>(query, columns + j * W, head_size, scores + j * W);
  if constexpr (kWide > 1)
    for (; j < vectors; j++) score_block<M, 1>(query, columns + j * W, head_size, scores + j * W);
}

// values[m] += sum over t in [0, count) of weights[m, t] * value t, m < M, for N pairs of vectors of
// features; `part` of the features of the last pair exist. ahead: as many rows to be requested, or null. Both lie
// `offset` bytes after what is pointed at.
template <typename T, int M, int N, bool kPart>
inline void value_block(const float* weights, const char* const* rows, const char* const* ahead, int64_t offset,
                        int count, int feature, int part, float* values, int64_t width) {
  V sum[M][2 * N];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2 * N; j++) sum[m][j] = load(values + m * width + feature + j * W);
  for (int t = 0; t < count; t++) {
    const T* row = reinterpret_cast<const T*>(rows[t] + offset) + feature;
    if (ahead != nullptr) {
      const T* next = reinterpret_cast<const T*>(ahead[t] + offset) + feature;
      for (size_t at = 0; at < 2 * N * W * sizeof(T); at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(next) + at, 0, 3);
    }
    V value[2 * N];
    for (int j = 0; j < N; j++) {
      if (kPart && j == N - 1) {
        load_pair(row + 2 * j * W, part, value[2 * j], value[2 * j + 1]);
      } else {
        load_pair(row + 2 * j * W, value[2 * j], value[2 * j + 1]);
      }
    }
    for (int m = 0; m < M; m++) {
      const V weight = set1(weights[m * kSegment + t]);
      for (int j = 0; j < 2 * N; j++) sum[m][j] = fma(weight, value[j], sum[m][j]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < 2 * N; j++) store(values + m * width + feature + j * W, sum[m][j]);
}

template <typename T, int M>
inline void value_rows(const float* weights, const char* const* rows, const char* const* ahead, int64_t offset,
                       int count, int head_size, float* values, int64_t width) {
  constexpr int kPairs = kCols / 2, kStep = 2 * W;
  int d = 0;
  for (; d + kPairs * kStep <= head_size; d += kPairs * kStep)
    value_block<T, M, kPairs, false>(weights, rows, ahead, offset, count, d, 0, values, width);
  for (; d + kStep <= head_size; d += kStep)
    value_block<T, M, 1, false>(weights, rows, ahead, offset, count, d, 0, values, width);
  if (d < head_size) value_block<T, M, 1, true>(weights, rows, ahead, offset, count, d, head_size - d, values, width);
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

// A query's scores of a stretch become weights. seen: the keys it sees; those of `all`, in whole vectors,
// that it does not see get the weight 0. distance: from the segment's first key to the query.
inline void weigh(const AttentionArgs& a, float* scores, Range seen, Range all, float slope, int64_t distance,
                  float& greatest, float& weight) {
  const int begin = all.first / W, end = (all.last + W - 1) / W;
  const int first = seen.first / W, last = seen.last > seen.first ? (seen.last + W - 1) / W : first;
  for (int j = begin; j < first; j++) store(scores + j * W, zero());
  for (int j = last > begin ? last : begin; j < end; j++) store(scores + j * W, zero());
  greatest = kNever;
  weight = 0.0f;
  if (first == last) return;
  if (a.softcap > 0 || slope != 0) {
    for (int j = first; j < last; j++) {
      V s = load(scores + j * W);
      if (a.softcap > 0) s = mul(set1(a.softcap), tanh(mul(s, set1(1.0f / a.softcap))));
      if (slope != 0) {
        const V away = sub(set1(static_cast<float>(distance - j * W)), iota());
        s = sub(s, mul(set1(slope), away));
      }
      store(scores + j * W, s);
    }
  }
  // Only the first and the last vector may hold keys that the query does not see.
  const auto mask = [&](int j) {
    V s = load(scores + j * W);
    store(scores + j * W, select(lanes(seen.first - j * W, seen.last - j * W), s, set1(kNever)));
  };
  mask(first);
  if (last - 1 > first) mask(last - 1);
  V top = set1(kNever);
  for (int j = first; j < last; j++) top = max(top, load(scores + j * W));
  greatest = hmax(top);
  V sum = zero();
  const V shift = set1(greatest);
  const auto turn_into_weight = [&](int j, bool edge) {
    V e = exp(sub(load(scores + j * W), shift));
    if (edge) e = select(lanes(seen.first - j * W, seen.last - j * W), e, zero());
    store(scores + j * W, e);
    sum = add(sum, e);
  };
  turn_into_weight(first, true);
  for (int j = first + 1; j < last - 1; j++) turn_into_weight(j, false);
  if (last - 1 > first) turn_into_weight(last - 1, true);
  weight = hsum(sum);
}

// The tile's sums over a stretch of keys, into sums. following: what this thread reads after them.
template <typename T>
inline void stretch_sums(const AttentionArgs& a, const TileShape& s, const Workspace& w, const Stretch& keys,
                         const Stretch& following, Sums sums, int64_t width) {
  const int head_size = static_cast<int>(a.head_size);
  for (int64_t i = 0; i < s.rows * width; i += W) store(sums.values + i, zero());
  const int heads = keys.place.heads, ahead = rows_ahead(a.head_size * sizeof(T), heads);
  const char** key_rows = w.rows;
  const int count = find_rows(a, keys, a.k_cache, sizeof(T), kSegment, key_rows);
  const char** value_rows_ = key_rows + count;
  find_rows(a, keys, a.v_cache, sizeof(T), kSegment, value_rows_);
  const char** later = value_rows_ + count;
  int found = following.begin < following.end ? find_rows(a, following, a.k_cache, sizeof(T), ahead, later) : 0;
  for (; found < ahead; found++) later[found] = later[found - 1];

  const int64_t start = keys.begin / kSegment * kSegment;
  const int base = static_cast<int>(keys.begin - start) / W * W;  // place in the segment of the first row
  Range seen[kTile];
  for (int m = 0; m < s.count; m++) seen[m] = visible(a, s, keys, m);
  const auto range = [&](int first, int last) {  // of queries
    return Range{seen[first].first, seen[last - 1].last};
  };
  const int64_t to_next_head = a.cache_head * static_cast<int64_t>(sizeof(T));
  if (s.count <= kFew) {
    by_rows(s.count, [&](auto size, int) {
      constexpr int M = decltype(size)::value;
      for (int t = 0; t < count; t += W)
        for (int h = 0; h < heads; h++)
          score_keys<T, M>(w.query + h * M * head_size, key_rows + t, key_rows + t + ahead, h * to_next_head, head_size,
                           w.scores + h * M * kSegment + base + t);
    });
  } else {
    for (int t = 0; t < count; t += kKeys) {
      const int stop = t + kKeys < count ? t + kKeys : count;
      turn_keys<T>(key_rows + t, key_rows + t + ahead, (stop - t) / W, head_size, w.columns);
      by_rows(s.count, [&](auto size, int m) {
        const Range some = range(m, m + decltype(size)::value);
        const int first = (some.first - base) / W * W, last = some.last - base < stop ? some.last - base : stop;
        const int from = first > t ? first : t;
        if (from < last)
          score_rows<decltype(size)::value>(w.query + m * head_size, w.columns + (from - t),
                                            (last - from + W - 1) / W, head_size,
                                            w.scores + m * kSegment + base + from);
      });
    }
  }
  by_rows(s.count, [&](auto size, int m) {
    const Range all = range(m, m + decltype(size)::value);
    for (int i = m; i < m + decltype(size)::value; i++) {
      const int index = static_cast<int>(s.first_index) + i;
      for (int h = 0; h < heads; h++) {
        const int query = h * s.count + i;
        const int64_t head = (keys.place.kv_head + h) * s.group + index % s.group;
        weigh(a, w.scores + query * kSegment, seen[i], all, a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[head],
              s.first_position + index / s.group - start, sums.greatest[query], sums.weight[query]);
      }
    }
  });
  const int step = heads > 1 ? W : kKeys;
  for (int t = 0; t < count; t += step) {
    const int stop = t + step < count ? t + step : count;
    by_rows(s.count, [&](auto size, int m) {
      const Range some = range(m, m + decltype(size)::value);
      const int first = some.first - base, last = some.last - base < stop ? some.last - base : stop;
      const int from = first > t ? first : t;
      if (from >= last) return;
      for (int h = 0; h < heads; h++) {
        const int query = h * s.count + m;
        value_rows<T, decltype(size)::value>(w.scores + query * kSegment + base + from, value_rows_ + from,
                                             m == 0 ? value_rows_ + from + ahead : nullptr, h * to_next_head,
                                             last - from, head_size, sums.values + query * width, width);
      }
    });
  }
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
