// How the attention of a step is cut into items that threads draw. A plan depends on the rows, the heads
// and the window only, so that one plan serves every layer that has them in common.

struct Item {
  Place place;
  int32_t first_segment, last_segment;
  int32_t part;     // index of its first partial result, or -1: the item is the whole tile
  int32_t parts;    // of the tile
  int32_t counter;  // of the tile: index into `left`
};

struct AttentionPlan {
  AttentionArgs shape;
  const Item* items;
  int64_t count;
  int64_t queries;   // of each partial result
  int32_t* left;     // parts of each divided tile that are not yet done
  float* partial;    // one Sums a segment of a divided tile
  float* workspace;  // one for each worker
  int workers;
  alignas(64) int64_t next;  // the item to be drawn next; alone in its cache line
};

struct PlanSizes {
  int64_t tiles, segments, queries, work;
  int workers;
  bool split;
  size_t items, left, partial, workspace, total;  // bytes
};

inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

inline PlanSizes plan_sizes(const AttentionArgs& a, int workers) {
  const int64_t group = a.q_heads / a.kv_heads, width = padded_width(a.head_size);
  PlanSizes s = {};
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t tokens = a.query_start[row + 1] - a.query_start[row];
    const int64_t heads = heads_of_tile(a, row, workers);
    const int64_t row_tiles = ceil_div(tokens * group, kTile) * ceil_div(a.kv_heads, heads);
    s.queries = maximum(s.queries, minimum(kTile, tokens * group * heads));
    s.tiles += row_tiles;
    s.segments += row_tiles * ceil_div(a.seq_lens[row], kSegment);
    s.work += tokens * a.seq_lens[row] * a.q_heads * a.head_size;
  }
  s.workers = workers;
  // With few tiles a thread, each segment is an item of its own.
  s.split = workers > 1 && s.tiles < 4 * workers && s.segments > s.tiles;
  s.items = whole_lines(sizeof(Item) * static_cast<size_t>(s.split ? s.segments : s.tiles));
  s.left = s.split ? whole_lines(sizeof(int32_t) * static_cast<size_t>(s.tiles)) : 0;
  s.partial = s.split ? sizeof(float) * static_cast<size_t>(s.segments * sums_floats(s.queries, width)) : 0;
  s.partial = whole_lines(s.partial);
  s.workspace = whole_lines(static_cast<size_t>(workspace_floats(a.head_size, width)) * sizeof(float));
  s.total = whole_lines(sizeof(AttentionPlan)) + s.items + s.left + s.partial +
            s.workspace * static_cast<size_t>(workers);
  return s;
}

// False on a block id outside the cache among those that a row's queries see.
inline bool blocks_exist(const AttentionArgs& a) {
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t tokens = a.query_start[row + 1] - a.query_start[row], length = a.seq_lens[row];
    if (tokens == 0) continue;
    const int64_t first = a.window > 0 ? maximum(0, length - tokens - a.window + 1) : 0;
    const int32_t* table = a.block_tables + row * a.table_stride;
    for (int64_t b = first / a.block_size; b < ceil_div(length, a.block_size); b++)
      if (table[b] < 0 || table[b] >= a.num_blocks) return false;
  }
  return true;
}

// Bytes of memory for attention_plan; attention_plan wants it 64-byte aligned.
size_t attention_plan_bytes(const AttentionArgs& shape, int workers) { return plan_sizes(shape, workers).total; }

// Makes the plan of `workers` threads in `memory`. Of `shape` everything is read but the tensors q, out,
// k_cache and v_cache, alibi_slopes, scale and softcap. The plan points at query_start, seq_lens and
// block_tables, which must outlive it unchanged. bad_block: a block id is outside the cache.
Status attention_plan(const AttentionArgs& shape, int workers, void* memory, AttentionPlan** made) {
  if (!blocks_exist(shape)) return Status::bad_block;
  const PlanSizes s = plan_sizes(shape, workers);
  char* at = static_cast<char*>(memory);
  const auto take = [&](size_t bytes) {
    char* start = at;
    at += bytes;
    return static_cast<void*>(start);
  };
  AttentionPlan& plan = *static_cast<AttentionPlan*>(take(whole_lines(sizeof(AttentionPlan))));
  plan = {};
  Item* items = static_cast<Item*>(take(s.items));
  plan.shape = shape;
  plan.items = items;
  plan.queries = s.queries;
  plan.left = static_cast<int32_t*>(take(s.left));
  plan.partial = static_cast<float*>(take(s.partial));
  plan.workspace = static_cast<float*>(take(s.workspace * static_cast<size_t>(workers)));
  plan.workers = workers;
  const int64_t group = shape.q_heads / shape.kv_heads;
  int32_t part = 0, counter = 0;
  for (int64_t row = 0; row < shape.rows; row++) {
    const int64_t tokens = shape.query_start[row + 1] - shape.query_start[row];
    const int64_t heads = heads_of_tile(shape, row, workers);
    // The last tiles of a row see the most keys: they go first.
    for (int64_t tile = ceil_div(tokens * group, kTile) - 1; tile >= 0; tile--) {
      Place place = {static_cast<int32_t>(row), 0, static_cast<int32_t>(heads), static_cast<int32_t>(tile)};
      const TileShape t = tile_shape(shape, place);
      const int32_t first = static_cast<int32_t>(t.begin / kSegment);
      const int32_t last = static_cast<int32_t>(ceil_div(t.end, kSegment));
      for (int64_t head = 0; head < shape.kv_heads; head += heads) {
        place.kv_head = static_cast<int32_t>(head);
        place.heads = static_cast<int32_t>(minimum(heads, shape.kv_heads - head));
        Item item = {place, first, last, -1, last - first, counter};
        if (!s.split || last - first == 1) {
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
  *made = &plan;
  return Status::ok;
}
