// Storage types, and the call of a template by the storage type at hand.

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline size_t element_size(DType type) { return type == DType::f32 ? 4 : 2; }

// f(const T*) with T the storage type; only the pointer's type is used.
template <typename F>
inline auto with_type(DType type, F f) {
  switch (type) {
    case DType::f32:
      return f(static_cast<const float*>(nullptr));
    case DType::bf16:
      return f(static_cast<const bf16*>(nullptr));
    default:
      return f(static_cast<const f16*>(nullptr));
  }
}

template <typename T>
struct Plain;
template <typename T>
struct Plain<const T*> {
  using type = T;
};

// Rows [0, count) cut into one stretch a worker. `cost` is about the number of elements of a row.
template <typename F>
inline void over_rows(const Threads& threads, int64_t count, int64_t cost, const F& body) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t useful = count * cost / kWorthAThread;
  const int workers = static_cast<int>(maximum(1, minimum(minimum(threads.count, count), useful)));
  struct Context {
    const F* body;
    int64_t count;
    int workers;
  } context = {&body, count, workers};
  const auto task = [](void* data, int worker) {
    const Context& c = *static_cast<Context*>(data);
    (*c.body)(c.count * worker / c.workers, c.count * (worker + 1) / c.workers);
  };
  if (workers == 1) {
    task(&context, 0);
  } else {
    threads.run(workers, task, &context);
  }
}
