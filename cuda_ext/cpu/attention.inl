// Attention over the paged cache: one kernel for decode, prefill, and chunks after a cached prefix.
//
// The queries of one row and one KV head, `group` heads times its tokens, are the rows of a matrix
// (token-major), cut into tiles of kTile. A tile walks the keys in steps of kKeys: the step's keys are
// turned into float32 columns, multiplied with all queries of the tile, put through an online softmax
// (Milakov & Gimelshein 2018) and multiplied with the step's values. Every kSegment keys the sums are
// closed and merged, so that segments can go to different threads.
//
// A query's result is bit for bit the same whatever shares its tile, batch or thread count: steps and
// segments lie at fixed key positions, each query has its own chains of additions, and a step or segment
// it does not see changes nothing.

struct Item {
  Place place;
  int32_t first_segment, last_segment;
  int32_t part;     // index of its first partial result, or -1: the item is the whole tile
  int32_t parts;    // of the tile
  int32_t counter;  // of the tile: index into `left`
};

struct Plan {
  const AttentionArgs* args;
  const Item* items;
  int64_t count, next;
  int32_t* left;    // parts of a tile not yet done
  float* partial;   // one Sums a segment
  int64_t queries;  // of each of them
  int workers;
  int failed;
};

// The first keys an item reads.
inline Step first_step(const AttentionArgs& a, const Item& item) {
  const TileShape s = tile_shape(a, item.place.row, item.place.tile);
  return step_at(item.place, maximum(s.begin, item.first_segment * int64_t{kSegment}), s.end);
}

// following: the thread's next item, or null.
template <typename T>
inline bool run_item(Plan& plan, const Item& item, const Item* following, const Workspace& w, int64_t width) {
  const AttentionArgs& a = *plan.args;
  const TileShape s = tile_shape(a, item.place.row, item.place.tile);
  read_query(a, item.place, s, w.query);
  const auto sum_up = [&](int segment, Sums sums) {
    const int64_t begin = maximum(s.begin, segment * int64_t{kSegment});
    const int64_t end = minimum(s.end, (segment + 1) * int64_t{kSegment});
    Step next = {item.place, 0, 0};
    if (segment + 1 < item.last_segment) {
      next = step_at(item.place, end, s.end);
    } else if (following != nullptr) {
      next = first_step(a, *following);
    }
    return segment_sums<T>(a, item.place, s, w, begin, end, next, sums, width);
  };
  if (item.part >= 0) {
    const int64_t floats = sums_floats(plan.queries, width);
    for (int g = item.first_segment; g < item.last_segment; g++) {
      const int64_t at = (item.part + g - item.first_segment) * floats;
      if (!sum_up(g, sums_at(plan.partial + at, plan.queries))) return false;
    }
    const int32_t mine = item.last_segment - item.first_segment;
    if (__atomic_sub_fetch(&plan.left[item.counter], mine, __ATOMIC_ACQ_REL) != 0) return true;
    // The last to finish merges all segments, in their order.
    const int64_t first_part = item.part + s.begin / kSegment - item.first_segment;
    for (int g = 0; g < item.parts; g++) {
      const Sums part = sums_at(plan.partial + (first_part + g) * floats, plan.queries);
      merge(w.closed, part, s.count, width, g == 0);
    }
    write_out(a, item.place, s, w.closed, width);
    return true;
  }
  for (int g = item.first_segment; g < item.last_segment; g++) {
    if (!sum_up(g, w.open)) return false;
    if (item.last_segment - item.first_segment > 1) merge(w.closed, w.open, s.count, width, g == item.first_segment);
  }
  write_out(a, item.place, s, item.last_segment - item.first_segment > 1 ? w.closed : w.open, width);
  return true;
}

void attention_worker(void* data, int) {
  Plan& plan = *static_cast<Plan*>(data);
  const AttentionArgs& a = *plan.args;
  const int64_t width = ceil_div(a.head_size, W) * W;
  void* scratch = thread_scratch(static_cast<size_t>(workspace_floats(a.head_size, width)) * sizeof(float));
  if (scratch == nullptr) {
    __atomic_store_n(&plan.failed, static_cast<int>(Status::no_memory), __ATOMIC_RELAXED);
    return;
  }
  const Workspace w = workspace_at(static_cast<float*>(scratch), a.head_size, width);
  const auto draw = [&] {
    const int64_t i = __atomic_fetch_add(&plan.next, 1, __ATOMIC_RELAXED);
    return i < plan.count ? &plan.items[i] : nullptr;
  };
  // Knowing the next item lets its keys come early; near the end, one taken early could keep a thread idle.
  const auto draw_early = [&] {
    const int64_t left = plan.count - __atomic_load_n(&plan.next, __ATOMIC_RELAXED);
    return left > 2 * plan.workers ? draw() : nullptr;
  };
  for (const Item *item = draw(), *following = nullptr; item != nullptr;
       item = following != nullptr ? following : draw()) {
    following = draw_early();
    const bool done = with_type(a.cache_dtype, [&](auto element) {
      return run_item<typename Plain<decltype(element)>::type>(plan, *item, following, w, width);
    });
    if (!done) __atomic_store_n(&plan.failed, static_cast<int>(Status::bad_block), __ATOMIC_RELAXED);
  }
}

Status attention(const AttentionArgs& a, const Threads& threads) {
  const int group = static_cast<int>(a.q_heads / a.kv_heads);
  const int64_t width = ceil_div(a.head_size, W) * W;
  int64_t tiles = 0, segments = 0, work = 0, queries = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t tokens = a.query_start[row + 1] - a.query_start[row];
    const int64_t row_tiles = ceil_div(tokens * group, kTile);
    queries = maximum(queries, minimum(kTile, tokens * group));
    tiles += row_tiles * a.kv_heads;
    segments += row_tiles * a.kv_heads * ceil_div(a.seq_lens[row], kSegment);
    work += tokens * a.seq_lens[row] * a.q_heads * a.head_size;
  }
  if (tiles == 0) return Status::ok;
  constexpr int64_t kWorthAThread = 32768;  // multiply-adds
  const int64_t useful = work / kWorthAThread;
  const int workers = static_cast<int>(maximum(1, minimum(threads.count, useful)));
  // With few tiles a thread, each segment is an item of its own.
  const bool split = workers > 1 && tiles < 4 * workers && segments > tiles;
  const int64_t most = split ? segments : tiles;
  const size_t item_bytes = sizeof(Item) * static_cast<size_t>(most);
  const size_t left_bytes = split ? sizeof(int32_t) * static_cast<size_t>(tiles) : 0;
  const size_t start = (item_bytes + left_bytes + 63) / 64 * 64;
  const size_t partial_bytes = split ? sizeof(float) * static_cast<size_t>(segments * sums_floats(queries, width)) : 0;
  char* memory = static_cast<char*>(__builtin_malloc(start + partial_bytes + 64));
  if (memory == nullptr) return Status::no_memory;
  Item* items = reinterpret_cast<Item*>(memory);
  Plan plan = {&a, items, 0, 0, reinterpret_cast<int32_t*>(memory + item_bytes),
               reinterpret_cast<float*>(memory + start), queries, workers, 0};
  int32_t part = 0, counter = 0;
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t tokens = a.query_start[row + 1] - a.query_start[row];
    // The last tiles of a row see the most keys: they go first.
    for (int64_t tile = ceil_div(tokens * group, kTile) - 1; tile >= 0; tile--) {
      const TileShape s = tile_shape(a, static_cast<int>(row), static_cast<int>(tile));
      const int32_t first = static_cast<int32_t>(s.begin / kSegment);
      const int32_t last = static_cast<int32_t>(ceil_div(s.end, kSegment));
      for (int64_t head = 0; head < a.kv_heads; head++) {
        const Place place = {static_cast<int32_t>(row), static_cast<int32_t>(head), static_cast<int32_t>(tile)};
        Item item = {place, first, last, -1, last - first, counter};
        if (!split || last - first == 1) {
          items[plan.count++] = item;
          continue;
        }
        plan.left[counter++] = last - first;
        for (int32_t g = first; g < last; g++) {
          item.first_segment = g;
          item.last_segment = g + 1;
          item.part = part++;
          items[plan.count++] = item;
        }
      }
    }
  }
  const int used = static_cast<int>(minimum(workers, plan.count));
  if (used == 1) {
    attention_worker(&plan, 0);
  } else {
    threads.run(used, attention_worker, &plan);
  }
  __builtin_free(memory);
  return static_cast<Status>(plan.failed);
}
