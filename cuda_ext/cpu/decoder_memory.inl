// The memory of a decoder call: what is shared, and what each member has for itself. See decoder.inl.

// The two layouts that ready activations can have.
constexpr int kLayouts = 2;
constexpr int ready_layout(Format format) { return is_dense(format) ? 0 : 1; }

// Buffers of a call. Null ones are not used.
struct DecoderMemory {
  uint8_t* ready_hidden[kLayouts];  // [tokens] rows of the residual stream, normed
  uint8_t* ready_attended;
  float* x;  // residual stream [tokens, hidden]
};

struct DecoderCall {
  const DecoderArgs* args;
  bool alone, draw;
  int64_t delta_stride, gate_groups;  // gate_groups: of a block
  float *q, *k, *v, *attended;        // [tokens, heads * head_size]
  float* delta;                       // [tokens, delta_stride]: what a sublayer adds to the residual stream
  uint8_t* ready_mlp;                 // [tokens] rows of down's input
  DecoderMemory shared;
  uint8_t* members;
  size_t member_bytes;
  AttentionPlan* plans[kMaxWindows];
  Taken* taken;  // see Sharing
};

// The most that any layer needs.
struct DecoderSizes {
  size_t ready_hidden[kLayouts], ready_attended, ready_mlp, scratch;  // bytes, of a row
};

inline DecoderSizes decoder_sizes(const DecoderArgs& a) {
  const auto grow = [](size_t& size, size_t wanted) { size = wanted > size ? wanted : size; };
  DecoderSizes s = {};
  for (int64_t i = 0; i < a.stack->layers; i++) {
    const DecoderLayer& l = a.layers[i];
    const PackedWeight* const weights[] = {&l.q, &l.k, &l.v, &l.gate, &l.up, &l.out, &l.down};
    for (int w = 0; w < 5; w++)
      grow(s.ready_hidden[ready_layout(weights[w]->format)],
           ready_bytes(weights[w]->format, weights[w]->columns));
    grow(s.ready_attended, ready_bytes(l.out.format, l.out.columns));
    grow(s.ready_mlp, ready_bytes(l.down.format, l.down.columns));
    for (const PackedWeight* w : weights)
      grow(s.scratch, whole_lines(scratch_bytes(w->format, w->columns)));
  }
  return s;
}

// Cuts buffers from memory; with memory null it only counts.
struct Cutter {
  uint8_t* memory;
  size_t used;
  uint8_t* bytes(size_t count) {
    uint8_t* const start = memory == nullptr ? nullptr : memory + used;
    used += whole_lines(count);
    return start;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float))); }
};

inline DecoderMemory cut_memory(Cutter& cut, const DecoderSizes& s, int64_t tokens) {
  DecoderMemory m = {};
  const size_t rows = static_cast<size_t>(tokens);
  for (int i = 0; i < kLayouts; i++)
    if (s.ready_hidden[i] > 0) m.ready_hidden[i] = cut.bytes(rows * s.ready_hidden[i]);
  m.ready_attended = cut.bytes(rows * s.ready_attended);
  return m;
}
