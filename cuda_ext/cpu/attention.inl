// Attention over the paged cache: one kernel for decode, prefill, and chunks after a cached prefix.
//
// The queries of one row and one KV head, `group` heads times its tokens, are the rows of a matrix
// (token-major), cut into tiles of kTile; where they are few a tile holds those of several KV heads. Keys are taken in segments of kSegment: all scores of a segment,
// their softmax, then the weighted values. Few queries meet the keys as these are read; many meet them
// turned into float32 columns, kKeys at a time. Segments are merged in their order by the rule of the online
// softmax (Milakov & Gimelshein 2018), so that they can go to different threads.
//
// A query's result is bit for bit the same whatever shares its tile, batch or thread count: segments lie at
// fixed key positions, each query has its own chains of additions, and a key or segment it does not see
// changes nothing.
//
// Use within a parallel region, with one plan (attention_plan.inl) for all layers of a step that have the
// same rows, heads, cache layout and window:
//   memory of attention_plan_bytes(shape, workers);  attention_plan(shape, workers, memory, &plan);
//   for each layer: one thread attention_begin(*plan); a barrier; every thread
//   attention_part(*plan, layer, worker); a barrier.

// The first keys an item reads.
inline Stretch first_stretch(const AttentionArgs& a, const Item& item) {
  const TileShape s = tile_shape(a, item.place);
  return stretch_at(item.place, maximum(s.begin, item.first_segment * int64_t{kSegment}), s.end);
}

// following: the thread's next item, or null.
template <typename T>
inline void run_item(AttentionPlan& plan, const AttentionArgs& a, const Item& item, const Item* following,
                     const Workspace& w, int64_t width) {
  const TileShape s = tile_shape(a, item.place);
  read_query(a, item.place, s, w.query);
  const auto sum_up = [&](int segment, Sums sums) {
    const int64_t begin = maximum(s.begin, segment * int64_t{kSegment});
    const int64_t end = minimum(s.end, (segment + 1) * int64_t{kSegment});
    Stretch next = {item.place, 0, 0};
    if (segment + 1 < item.last_segment) {
      next = stretch_at(item.place, end, s.end);
    } else if (following != nullptr) {
      next = first_stretch(a, *following);
    }
    stretch_sums<T>(a, s, w, {item.place, begin, end}, next, sums, width);
  };
  if (item.part >= 0) {
    const int64_t floats = sums_floats(plan.queries, width);
    for (int g = item.first_segment; g < item.last_segment; g++) {
      const int64_t at = (item.part + g - item.first_segment) * floats;
      sum_up(g, sums_at(plan.partial + at, plan.queries, width));
    }
    const int32_t mine = item.last_segment - item.first_segment;
    if (__atomic_sub_fetch(&plan.left[item.counter], mine, __ATOMIC_ACQ_REL) != 0) return;
    // The last to finish merges all segments, in their order, and sets the counter for the next layer.
    plan.left[item.counter] = item.parts;
    const int64_t first_part = item.part + s.begin / kSegment - item.first_segment;
    for (int g = 0; g < item.parts; g++) {
      const Sums part = sums_at(plan.partial + (first_part + g) * floats, plan.queries, width);
      merge(w.closed, part, s.rows, width, g == 0);
    }
    write_out<T>(a, item.place, s, w.closed, width);
    return;
  }
  for (int g = item.first_segment; g < item.last_segment; g++) {
    sum_up(g, w.open);
    if (item.last_segment - item.first_segment > 1) merge(w.closed, w.open, s.rows, width, g == item.first_segment);
  }
  write_out<T>(a, item.place, s, item.last_segment - item.first_segment > 1 ? w.closed : w.open, width);
}

// Makes the plan ready for its next layer. One thread calls it, after all have left the last
// attention_part and before any enters the next.
void attention_begin(AttentionPlan& plan) { __atomic_store_n(&plan.next, 0, __ATOMIC_RELAXED); }

// One thread's share of a layer: draws items until none is left. layer: the plan's shape with the layer's
// own q, out, k_cache, v_cache, alibi_slopes, scale, softcap and strides of q. The result is complete
// once every thread has returned. worker: 0 .. workers - 1, each given to one thread at a time; not all
// need to come.
void attention_part(AttentionPlan& plan, const AttentionArgs& layer, int worker) {
  const int64_t width = padded_width(layer.head_size);
  const size_t floats = whole_lines(static_cast<size_t>(workspace_floats(layer.head_size, width)) * sizeof(float)) / 4;
  const Workspace w = workspace_at(plan.workspace + floats * static_cast<size_t>(worker), layer.head_size, width);
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
    with_type(layer.cache_dtype, [&](auto element) {
      run_item<typename Plain<decltype(element)>::type>(plan, layer, *item, following, w, width);
    });
  }
}

Status attention(const AttentionArgs& a, const Threads& threads) {
  constexpr int64_t kWorthAThread = 32768;  // multiply-adds
  const PlanSizes sizes = plan_sizes(a, 1);
  if (sizes.tiles == 0) return Status::ok;
  const int workers = static_cast<int>(maximum(1, minimum(threads.count, sizes.work / kWorthAThread)));
  struct Call {
    AttentionPlan* plan;
    const AttentionArgs* args;
  } call = {nullptr, &a};
  void* memory = thread_scratch(attention_plan_bytes(a, workers));
  if (memory == nullptr) return Status::no_memory;
  const Status status = attention_plan(a, workers, memory, &call.plan);
  if (status != Status::ok) return status;
  attention_begin(*call.plan);
  const auto task = [](void* data, int worker) {
    const Call& c = *static_cast<Call*>(data);
    attention_part(*c.plan, *c.args, worker);
  };
  if (workers == 1) {
    task(&call, 0);
  } else {
    threads.run(workers, task, &call);
  }
  return Status::ok;
}
