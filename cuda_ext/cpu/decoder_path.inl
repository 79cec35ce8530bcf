// Which parts of a layer's weights a member multiplies, and the order in which it reads them. See decoder.inl.

// The groups of queries, keys and values together.
inline int64_t projected_groups(const DecoderStack& s) {
  return (s.q_heads + 2 * s.kv_heads) * (s.head_size / kGroup);
}

// A part of the groups of q, k and v, one after the other, as groups of each: of queries and keys whole heads.
struct ProjectParts {
  Part q, k, v;
};
inline ProjectParts project_parts(const DecoderStack& s, Part part) {
  const int64_t each = s.head_size / kGroup, q_end = s.q_heads * each, k_end = q_end + s.kv_heads * each;
  const auto edge = [&](int64_t group) { return group > k_end ? group : (group + each / 2) / each * each; };
  const int64_t first = edge(part.first), last = edge(part.last);
  const auto within = [&](int64_t begin, int64_t end) {
    return Part{maximum(first, begin) - begin, minimum(last, end) - begin};
  };
  return {within(0, q_end), within(q_end, k_end), within(k_end, projected_groups(s))};
}

// What the groups of a part of gate and up are a multiple of: a block of a quantised down's input is not divided.
inline int64_t gate_multiple(const DecoderLayer& l, bool draw) { return draw || !is_dense(l.down.format) ? 2 : 1; }

inline int64_t product_multiple(bool draw) { return draw ? 2 : 1; }

// Groups of a weight as what is read next.
inline Upcoming upcoming_groups(const PackedWeight& w, Part part) {
  if (part.first >= part.last) return kNothingUpcoming;
  const size_t size = group_bytes(w.format, w.columns);
  return {w.data + static_cast<size_t>(part.first) * size, static_cast<size_t>(part.last - part.first) * size, size};
}

// What a member reads of a layer, in this order.
enum Read { kQ, kK, kV, kOut, kGate, kUp, kDown, kReads };

// A member's own parts of the weights of a layer and of what it reads after that.
class ReadPath {
 public:
  ReadPath() { path_[0] = kNothingUpcoming; }

  // What follows `read` of the layer last given to look_ahead; nothing if there was none.
  const Upcoming* after(Read read) const { return path_ + after_[read]; }

  void look_ahead(const DecoderArgs& a, int64_t layer, int index, int count, bool draw) {
    const DecoderStack& s = *a.stack;
    used_ = 0;
    const auto part = [&](const PackedWeight& w, int64_t multiple) {
      append(w, part_of(w.groups(), multiple, index, count));
    };
    for (int64_t i = layer; i < minimum(layer + 2, s.layers); i++) {
      const DecoderLayer& l = a.layers[i];
      const auto note = [&](Read read) {
        if (i == layer) after_[read] = used_;
      };
      const ProjectParts parts = project_parts(s, part_of(projected_groups(s), 1, index, count));
      append(l.q, parts.q);
      note(kQ);
      append(l.k, parts.k);
      note(kK);
      append(l.v, parts.v);
      note(kV);
      part(l.out, product_multiple(draw));
      note(kOut);
      part(l.gate, gate_multiple(l, draw));
      note(kGate);
      part(l.up, gate_multiple(l, draw));
      note(kUp);
      part(l.down, product_multiple(draw));
      note(kDown);
    }
    if (layer + 2 > s.layers && s.head.data != nullptr) part(s.head, 1);
    path_[used_] = kNothingUpcoming;
  }

 private:
  void append(const PackedWeight& w, Part part) {
    if (part.first < part.last) path_[used_++] = upcoming_groups(w, part);
  }

  Upcoming path_[2 * kReads + 2];
  int after_[kReads] = {};
  int used_ = 0;
};
