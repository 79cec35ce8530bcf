// How the members of a region share the work between two barriers. See decoder.inl.
//
// Every member has a stretch of its own and goes through it from the front, part by part, so that it reads
// weights in the order of their addresses and knows what it reads next. Who has finished takes parts from
// the ends of the others' stretches, so that one that loses its core for a while does not hold up the others.

struct Part {
  int64_t first, last;
};
// Part i of `parts` of [0, count), parts beginning at multiples of `multiple`.
inline Part part_of(int64_t count, int64_t multiple, int64_t i, int64_t parts) {
  const int64_t units = ceil_div(count, multiple);
  return {minimum(count, units * i / parts * multiple), minimum(count, units * (i + 1) / parts * multiple)};
}

// How many parts of a member's stretch are taken: from the front in the low half, from the end in the high.
struct alignas(64) Taken {
  uint64_t parts;
};

constexpr int kSharePhases = 4;  // between barriers, whose counters are apart

// A part, `end` of the stretch that its member goes on to read, and which of the pieces it is of.
struct Share {
  int64_t first, last, end, piece;
};

class Sharing {
 public:
  // taken: [kSharePhases, members], zeros at first.
  Sharing(Taken* taken, int index, int count) : taken_(taken), index_(index), count_(count) {}

  static size_t bytes(int members) { return sizeof(Taken) * kSharePhases * static_cast<size_t>(members); }

  // Once a phase, before its barrier.
  void end_phase() {
    // This counter was last used before the last barrier but one, and is not used before the next.
    __atomic_store_n(&at(phase_ + 2, index_).parts, 0, __ATOMIC_RELAXED);
    phase_++;
  }

  // body(share) for parts of [0, count) that begin at multiples of `multiple`, up to `most` of each member's stretch,
  // and once for each of `pieces` that the whole is to be done for. All members call it, once in a phase.
  template <typename F>
  void over(int64_t count, int64_t multiple, int64_t most, int64_t pieces, const F& body) {
    for (int n = 0; n < count_; n++) {
      const int whose = (index_ + n) % count_;
      const Part own = part_of(count, multiple, whose, count_);
      const int64_t parts = minimum(ceil_div(own.last - own.first, multiple), most), total = parts * pieces;
      for (int64_t i = take(whose, total, n > 0); i >= 0; i = take(whose, total, n > 0)) {
        const Part p = part_of(own.last - own.first, multiple, i % parts, parts);
        const int64_t last = own.first + p.last;
        body(Share{own.first + p.first, last, n > 0 ? last : own.last, i / parts});
      }
    }
  }

 private:
  Taken& at(int64_t phase, int member) { return taken_[phase % kSharePhases * count_ + member]; }

  // The index of the part taken, -1 if there is none.
  int64_t take(int whose, int64_t total, bool from_end) {
    uint64_t& parts = at(phase_, whose).parts;
    uint64_t seen = __atomic_load_n(&parts, __ATOMIC_RELAXED);
    while (true) {
      const int64_t front = static_cast<int64_t>(seen & 0xffffffff), end = static_cast<int64_t>(seen >> 32);
      if (front + end >= total) return -1;
      const uint64_t more = seen + (from_end ? uint64_t{1} << 32 : 1);
      if (__atomic_compare_exchange_n(&parts, &seen, more, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        return from_end ? total - 1 - end : front;
    }
  }

  Taken* taken_;
  int index_, count_;
  int64_t phase_ = 0;
};
