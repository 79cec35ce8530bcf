// All decoder layers of a step in one parallel region.
//
// Up to kAloneTokens tokens every member keeps the residual stream for itself and computes norms and
// ready activations redundantly, so that a layer has five barriers. For more tokens rows are divided too,
// at three barriers more. Columns are divided by groups; for many tokens in small parts, of which members take
// each other's when their own are done (decoder_share.inl).
//
// Query and key heads are turned, and keys and values stored, by the member that computed them, before
// the barrier. None of the divisions changes a result: each row of an output is computed whole, by
// operations that depend on nothing else.
//
// Where a step goes (30 layers of SmolLM2-135M in Q4_1, context 160, bfloat16 cache, AVX512_VNNI on Zen 5, one
// thread, milliseconds of its CPU time without the output head, shares in per cent):
//                    ms    norms  q k v  attention  out  gate, up  down
//   1 row            2.7     4     14       13       8      41      20
//   8 rows           5.7     6     12       30       6      29      17
//   32 rows         22.4     4     12       30       6      32      16
//   128 rows        86.5     4     11       38       5      29      13
//   prefill 2x128    110     5     14       10       7      44      20

// With -DASERVE_PROFILE: the time stamp counter's ticks of member 0 in each phase.
#ifdef ASERVE_PROFILE
#define PROFILE(phase)                          \
  if (member_.index == 0) {                     \
    const uint64_t stamp = __builtin_ia32_rdtsc(); \
    decoder_ticks[phase] += stamp - stamp_;     \
    stamp_ = stamp;                             \
  }
#else
#define PROFILE(phase)
#endif

constexpr int64_t kAloneTokens = 3;
constexpr int64_t kDrawTokens = 16;     // from so many on, members take each other's parts
constexpr int64_t kDrawRows = 128;      // likewise of norms, which take as long as asking for a part
constexpr int64_t kDrawParts = 8;       // of a member
constexpr int64_t kPieceRows = 256;     // of the tokens that are multiplied at a time
constexpr size_t kFetchWaiting = 128 << 10;  // bytes of weights that are fetched while waiting at a barrier
constexpr int64_t kMlpFloats = 48 << 10;  // of such a block: it stays in the second-level cache

// One member's work in a call.
class DecoderWorker {
 public:
  DecoderWorker(DecoderCall& call, Member& member)
      : call_(call),
        a_(*call.args),
        stack_(*call.args->stack),
        member_(member),
        memory_(call.shared),
        sharing_(call.taken, member.index, member.count) {
    const DecoderSizes sizes = decoder_sizes(a_);
    Cutter cut = {call.members, call.member_bytes * static_cast<size_t>(member.index)};
    place(cut, sizes);
  }

  // What `place` cuts for one member.
  static size_t bytes(DecoderCall& call, const DecoderSizes& sizes) {
    Cutter cut = {nullptr, 0};
    DecoderMemory memory;
    float* f;
    uint8_t* b;
    cut_member(cut, call, sizes, memory, f, f, b);
    return cut.used;
  }

  void run() {
    for (int64_t i = 0; i < stack_.layers; i++) {
      const DecoderLayer& l = a_.layers[i];
      path_.look_ahead(a_, i, member_.index, member_.count, call_.draw);
      const float* before = i > 0 ? a_.layers[i - 1].post_mlp_norm : nullptr;
      rows([&](int64_t t) {
        if (i == 0) {
          __builtin_memcpy(x(t), a_.x + t * stack_.hidden, static_cast<size_t>(stack_.hidden) * sizeof(float));
        } else {
          add_sublayer(t, before, a_.layers[i - 1].eps);
        }
        ready_hidden(t, l.input_norm, l.eps, needs({&l.q, &l.k, &l.v}), l.q.columns);
      });
      PROFILE(0)
      project(l);
      if (member_.index == 0) attention_begin(*call_.plans[l.window]);
      PROFILE(1)
      sync(kV);
      PROFILE(7)
      attend(l);
      PROFILE(2)
      sync(kV);
      PROFILE(7)
      const size_t attended = ready_bytes(l.out.format, l.out.columns);
      rows([&](int64_t t) {
        linear_prepare(l.out.format, call_.attended + t * l.out.columns, l.out.columns, 0, l.out.columns,
                       memory_.ready_attended + static_cast<size_t>(t) * attended);
      });
      PROFILE(0)
      product(l.out, memory_.ready_attended, kOut);
      PROFILE(3)
      sync(kOut);
      PROFILE(7)
      rows([&](int64_t t) {
        add_sublayer(t, l.post_attention_norm, l.eps);
        ready_hidden(t, l.pre_mlp_norm, l.eps, needs({&l.gate, &l.up}), l.gate.columns);
      });
      PROFILE(0)
      gate_and_up(l);
      PROFILE(4)
      sync(kUp);
      PROFILE(7)
      product(l.down, call_.ready_mlp, kDown);
      PROFILE(5)
      sync(kDown);
      PROFILE(7)
    }
    finish();
    PROFILE(0)
  }

 private:
  static void cut_member(Cutter& cut, const DecoderCall& call, const DecoderSizes& sizes, DecoderMemory& memory,
                         float*& row, float*& block, uint8_t*& scratch) {
    const DecoderArgs& a = *call.args;
    if (call.alone) {
      memory = cut_memory(cut, sizes, a.tokens);
      memory.x = cut.floats(a.tokens * a.stack->hidden);
    }
    row = cut.floats(a.stack->hidden);
    block = cut.floats(2 * minimum(a.tokens, kPieceRows) * call.gate_groups * kGroup);
    scratch = cut.bytes(sizes.scratch);
    cut.bytes(64);  // the next member's first line is not fetched beside this one's last
  }

  void place(Cutter& cut, const DecoderSizes& sizes) {
    cut_member(cut, call_, sizes, memory_, row_, block_, scratch_);
  }

  // A barrier. `last`: what has been read last, where what follows is known.
  void sync(Read last = kReads) {
    const Upcoming next = last == kReads ? kNothingUpcoming : *path_.after(last);
    sharing_.end_phase();
    member_.sync(next.data, minimum(next.bytes, kFetchWaiting));
  }

  // body(first, last) over parts of the rows. A barrier follows.
  template <typename F>
  void share_rows(const F& body) {
    if (a_.tokens < kDrawRows) {
      const Part own = part_of(a_.tokens, 1, member_.index, member_.count);
      if (own.first < own.last) body(own.first, own.last);
    } else {
      sharing_.over(a_.tokens, 4, kDrawParts, 1, [&](const Share& s) { body(s.first, s.last); });
    }
  }

  // body(top, rows, share) over pieces of the rows, within each over parts of `groups` that begin at multiples of
  // `multiple`: a piece's activations stay in cache while the weights pass. A barrier follows.
  template <typename F>
  void share_groups(int64_t groups, int64_t multiple, const F& body) {
    if (!call_.draw) {
      const Part own = part_of(groups, multiple, member_.index, member_.count);
      if (own.first < own.last) body(0, a_.tokens, Share{own.first, own.last, own.last, 0});
      return;
    }
    const int64_t pieces = ceil_div(a_.tokens, kPieceRows);
    sharing_.over(groups, multiple, kDrawParts, pieces, [&](const Share& s) {
      const int64_t top = a_.tokens * s.piece / pieces;
      body(top, a_.tokens * (s.piece + 1) / pieces - top, s);
    });
  }

  // What is read after a part of a share: `then`, the rest of the share of w, and what the path has after `read`.
  struct Ahead {
    Upcoming list[5];
    operator const Upcoming*() const { return list; }
  };
  Ahead ahead(const PackedWeight& w, const Share& share, Read read, Upcoming then = kNothingUpcoming) const {
    const Upcoming* path = a_.tokens <= kPieceRows ? path_.after(read) : &kNothingUpcoming;
    Ahead a = {};
    int used = 0;
    const auto append = [&](const Upcoming& next) {
      if (next.bytes > 0) a.list[used++] = next;
    };
    append(then);
    append(upcoming_groups(w, {share.last, share.end}));
    append(path[0]);
    if (path[0].bytes > 0) append(path[1]);
    a.list[used] = kNothingUpcoming;
    return a;
  }

  // body(t) over all rows for each member alone, or once over all, complete on return.
  template <typename F>
  void rows(const F& body) {
    if (call_.alone) {
      for (int64_t t = 0; t < a_.tokens; t++) body(t);
      return;
    }
    share_rows([&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) body(t);
    });
    PROFILE(0)
    sync();
    PROFILE(7)
  }

  float* x(int64_t t) { return memory_.x + t * stack_.hidden; }

  void add_sublayer(int64_t t, const float* post_norm, float eps) {
    const float* delta = call_.delta + t * call_.delta_stride;
    if (post_norm != nullptr) {
      rms_norm_row(delta, post_norm, row_, stack_.hidden, eps);
      delta = row_;
    }
    add_range(delta, x(t), stack_.hidden);
  }

  // For each layout a weight that wants it, or null.
  struct Needs {
    const PackedWeight* weight[kLayouts];
  };
  template <size_t N>
  static Needs needs(const PackedWeight* const (&weights)[N]) {
    Needs n = {};
    for (const PackedWeight* w : weights) n.weight[ready_layout(w->format)] = w;
    return n;
  }

  void ready_hidden(int64_t t, const float* norm, float eps, const Needs& needed, int64_t columns) {
    rms_norm_row(x(t), norm, row_, columns, eps);
    for (int i = 0; i < kLayouts; i++) {
      if (needed.weight[i] == nullptr) continue;
      const Format format = needed.weight[i]->format;
      linear_prepare(format, row_, columns, 0, columns,
                     memory_.ready_hidden[i] + static_cast<size_t>(t) * ready_bytes(format, columns));
    }
  }

  const uint8_t* hidden_for(const PackedWeight& w) const { return memory_.ready_hidden[ready_layout(w.format)]; }

  void product(const PackedWeight& w, const uint8_t* ready, Read read) {
    const size_t stride = ready_bytes(w.format, w.columns);
    share_groups(w.groups(), product_multiple(call_.draw), [&](int64_t top, int64_t rows, const Share& s) {
      linear_multiply(w, ready + static_cast<size_t>(top) * stride, rows, s.first, s.last,
                      call_.delta + top * call_.delta_stride, call_.delta_stride, scratch_, ahead(w, s, read));
    });
  }

  // Queries, keys and values: turned and stored.
  void project(const DecoderLayer& l) {
    const int64_t head_groups = stack_.head_size / kGroup;
    share_groups(projected_groups(stack_), 1, [&](int64_t top, int64_t rows, const Share& s) {
      const ProjectParts parts = project_parts(stack_, {s.first, s.last}), rest = project_parts(stack_, {s.first, s.end});
      const auto groups = [&](const PackedWeight& w, Part part, Part all, Read read, float* out, const auto& then) {
        if (part.first >= part.last) return;
        const size_t stride = ready_bytes(w.format, w.columns);
        linear_multiply(w, hidden_for(w) + static_cast<size_t>(top) * stride, rows, part.first, part.last,
                        out + top * w.rows, w.rows, scratch_, ahead(w, {part.first, part.last, all.last, 0}, read));
        then(part.first, part.last);
      };
      groups(l.q, parts.q, rest.q, kQ, call_.q, [&](int64_t from, int64_t to) {
        turn_queries(l, top, top + rows, from / head_groups, to / head_groups);
      });
      with_type(stack_.cache_dtype, [&](auto element) {
        using T = typename Plain<decltype(element)>::type;
        groups(l.k, parts.k, rest.k, kK, call_.k, [&](int64_t from, int64_t to) {
          store_keys<T>(l, top, top + rows, from / head_groups, to / head_groups);
        });
        groups(l.v, parts.v, rest.v, kV, call_.v, [&](int64_t from, int64_t to) {
          store_values<T>(l, top, top + rows, from, to);
        });
      });
    });
  }

  const float* cos_sin(const DecoderLayer& l, int64_t t) const {
    return l.cos_sin + a_.positions[t] * l.rotary_size;
  }

  int64_t cache_place(int64_t t) const {
    return a_.slots[t] / stack_.block_size * stack_.cache_block + a_.slots[t] % stack_.block_size * stack_.cache_slot;
  }

  void turn_queries(const DecoderLayer& l, int64_t top, int64_t bottom, int64_t first_head, int64_t last_head) {
    const int64_t size = stack_.head_size;
    for (int64_t t = top; t < bottom; t++) {
      for (int64_t h = first_head; h < last_head; h++) {
        float* head = call_.q + (t * stack_.q_heads + h) * size;
        if (l.q_norm != nullptr) rms_norm_row(head, l.q_norm, head, size, l.eps);
        rotate_head(head, head, cos_sin(l, t), static_cast<int>(l.rotary_size), static_cast<int>(size), l.interleaved);
      }
    }
  }

  template <typename T>
  void store_keys(const DecoderLayer& l, int64_t top, int64_t bottom, int64_t first_head, int64_t last_head) {
    const int64_t size = stack_.head_size;
    for (int64_t t = top; t < bottom; t++) {
      T* to = static_cast<T*>(l.k_cache) + cache_place(t);
      for (int64_t h = first_head; h < last_head; h++) {
        float* head = call_.k + (t * stack_.kv_heads + h) * size;
        if (l.k_norm != nullptr) rms_norm_row(head, l.k_norm, head, size, l.eps);
        rotate_head(head, to + h * stack_.cache_head, cos_sin(l, t), static_cast<int>(l.rotary_size),
                    static_cast<int>(size), l.interleaved);
      }
    }
  }

  template <typename T>
  void store_values(const DecoderLayer& l, int64_t top, int64_t bottom, int64_t first_group, int64_t last_group) {
    const int64_t size = stack_.head_size, width = stack_.kv_heads * size;
    for (int64_t t = top; t < bottom; t++) {
      T* to = static_cast<T*>(l.v_cache) + cache_place(t);
      for (int64_t n = first_group * kGroup; n < last_group * kGroup; n += kGroup)
        copy_row(call_.v + t * width + n, to + n / size * stack_.cache_head + n % size, static_cast<int>(kGroup));
    }
  }

  void attend(const DecoderLayer& l) {
    AttentionArgs args = call_.plans[l.window]->shape;
    args.q = call_.q;
    args.out = call_.attended;
    args.k_cache = l.k_cache;
    args.v_cache = l.v_cache;
    args.scale = l.scale;
    args.softcap = l.softcap;
    attention_part(*call_.plans[l.window], args, member_.index);
  }

  // Gate and up of the same columns, their product made ready for down.
  void gate_and_up(const DecoderLayer& l) {
    const int64_t width = l.gate.rows, block_width = call_.gate_groups * kGroup;
    const size_t ready = ready_bytes(l.down.format, width);
    share_groups(l.gate.groups(), gate_multiple(l, call_.draw), [&](int64_t top, int64_t rows, const Share& s) {
      float *gate = block_, *up = block_ + rows * block_width;
      for (int64_t group = s.first; group < s.last; group += call_.gate_groups) {
        const int64_t end = minimum(s.last, group + call_.gate_groups), column = group * kGroup;
        const auto multiply = [&](const PackedWeight& w, float* out, const Upcoming& then) {
          // The kernel places a group at its own columns, hence the shifted start.
          linear_multiply(w, hidden_for(w) + static_cast<size_t>(top) * ready_bytes(w.format, w.columns), rows, group,
                          end, out - column, block_width, scratch_, ahead(w, {group, end, s.end, 0}, kUp, then));
        };
        // Block by block gate and up take turns.
        multiply(l.gate, gate, upcoming_groups(l.up, {group, end}));
        multiply(l.up, up, upcoming_groups(l.gate, {end, s.end}));
        const int64_t columns = minimum(end * kGroup, width) - column;
        for (int64_t i = 0; i < rows; i++) {
          float* product = gate + i * block_width;
          gate_range(product, up + i * block_width, product, columns, l.activation);
          linear_prepare(l.down.format, product, width, column, columns,
                         call_.ready_mlp + static_cast<size_t>(top + i) * ready);
        }
      }
    });
  }

  void finish() {
    const DecoderLayer& l = a_.layers[stack_.layers - 1];
    const auto row = [&](int64_t t) {
      add_sublayer(t, l.post_mlp_norm, l.eps);
      rms_norm_row(x(t), stack_.final_norm, a_.out + t * stack_.hidden, stack_.hidden, stack_.final_eps);
    };
    if (call_.alone) {
      for (int64_t t = member_.index; t < a_.tokens; t += member_.count) row(t);
      return;
    }
    share_rows([&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) row(t);
    });
  }

  DecoderCall& call_;
  const DecoderArgs& a_;
  const DecoderStack& stack_;
  Member& member_;
  DecoderMemory memory_;
  float *row_, *block_;
  uint8_t* scratch_;
  Sharing sharing_;
  ReadPath path_;
#ifdef ASERVE_PROFILE
  uint64_t stamp_ = __builtin_ia32_rdtsc();
#endif
};

#undef PROFILE

inline Status check_tokens(const DecoderArgs& a) {
  const DecoderStack& s = *a.stack;
  int64_t positions = a.layers[0].max_position;
  for (int64_t i = 1; i < s.layers; i++) positions = minimum(positions, a.layers[i].max_position);
  for (int64_t t = 0; t < a.tokens; t++) {
    if (a.positions[t] < 0 || a.positions[t] >= positions) return Status::bad_position;
    if (a.slots[t] < 0 || a.slots[t] >= s.num_blocks * s.block_size) return Status::bad_slot;
  }
  return Status::ok;
}

inline AttentionArgs attention_shape(const DecoderArgs& a, int64_t window) {
  const DecoderStack& s = *a.stack;
  AttentionArgs shape = {};
  shape.query_start = a.query_start;
  shape.seq_lens = a.seq_lens;
  shape.block_tables = a.block_tables;
  shape.rows = a.rows;
  shape.q_heads = s.q_heads;
  shape.kv_heads = s.kv_heads;
  shape.head_size = s.head_size;
  shape.q_token = s.q_heads * s.head_size;
  shape.q_head = s.head_size;
  shape.cache_block = s.cache_block;
  shape.cache_head = s.cache_head;
  shape.cache_slot = s.cache_slot;
  shape.block_size = s.block_size;
  shape.num_blocks = s.num_blocks;
  shape.max_blocks = a.max_blocks;
  shape.table_stride = a.table_stride;
  shape.window = window;
  shape.dtype = DType::f32;
  shape.cache_dtype = s.cache_dtype;
  return shape;
}

Status decoder(const DecoderArgs& a, int threads) {
  const DecoderStack& s = *a.stack;
  if (a.tokens == 0) return Status::ok;
  const Status tokens = check_tokens(a);
  if (tokens != Status::ok) return tokens;
  DecoderCall call = {};
  call.args = &a;
  call.alone = a.tokens <= kAloneTokens;
  call.draw = a.tokens >= kDrawTokens;
  call.delta_stride = ceil_div(s.hidden, kGroup) * kGroup;
  call.gate_groups = maximum(2, kMlpFloats / (2 * kGroup * minimum(a.tokens, kPieceRows)) / 2 * 2);
  int64_t most = 1;
  for (int64_t i = 0; i < s.layers; i++) most = maximum(most, a.layers[i].gate.groups());
  call.gate_groups = minimum(call.gate_groups, (most + 1) / 2 * 2);
  const DecoderSizes sizes = decoder_sizes(a);
  call.member_bytes = DecoderWorker::bytes(call, sizes);
  AttentionArgs shapes[kMaxWindows];
  size_t plan_bytes[kMaxWindows];
  for (int i = 0; i < s.num_windows; i++) {
    shapes[i] = attention_shape(a, s.windows[i]);
    plan_bytes[i] = attention_plan_bytes(shapes[i], threads);
  }
  uint8_t* plans[kMaxWindows];
  const auto cut_all = [&](Cutter cut) {
    const int64_t wide = a.tokens * s.q_heads * s.head_size, narrow = a.tokens * s.kv_heads * s.head_size;
    call.q = cut.floats(wide);
    call.k = cut.floats(narrow);
    call.v = cut.floats(narrow);
    call.attended = cut.floats(wide);
    call.delta = cut.floats(a.tokens * call.delta_stride);
    call.ready_mlp = cut.bytes(static_cast<size_t>(a.tokens) * sizes.ready_mlp);
    if (!call.alone) {
      call.shared = cut_memory(cut, sizes, a.tokens);
      call.shared.x = a.out;
    }
    for (int i = 0; i < s.num_windows; i++) plans[i] = cut.bytes(plan_bytes[i]);
    call.taken = reinterpret_cast<Taken*>(cut.bytes(Sharing::bytes(threads)));
    call.members = cut.bytes(call.member_bytes * static_cast<size_t>(threads));
    return cut.used;
  };
  uint8_t* memory = static_cast<uint8_t*>(thread_scratch(cut_all({nullptr, 0})));
  if (memory == nullptr) return Status::no_memory;
  cut_all({memory, 0});
  __builtin_memset(call.taken, 0, Sharing::bytes(threads));
  for (int i = 0; i < s.num_windows; i++) {
    const Status status = attention_plan(shapes[i], threads, plans[i], &call.plans[i]);
    if (status != Status::ok) return status;
  }
  team_run(
      threads,
      [](void* data, Member& member) {
        DecoderWorker worker(*static_cast<DecoderCall*>(data), member);
        worker.run();
      },
      &call);
  return Status::ok;
}
