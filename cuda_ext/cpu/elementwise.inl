// Norms, rotary embedding, cache writes, gated activations, greedy log-probability.

template <typename T, typename TW, bool kAdd>
inline void norm_row(const NormArgs& a, int64_t row) {
  const int size = static_cast<int>(a.size);
  const T* x = static_cast<const T*>(a.x) + a.x_rows.at(row);
  const T* residual = kAdd ? static_cast<const T*>(a.residual) + a.residual_rows.at(row) : nullptr;
  T* total = kAdd ? static_cast<T*>(a.total) + row * a.size : nullptr;
  T* out = static_cast<T*>(a.out) + row * a.size;
  const TW* weight = static_cast<const TW*>(a.weight);
  const int whole = size / W * W, rest = size - whole;
  V squares = zero();
  for (int i = 0; i < whole; i += W) {
    V v = load(x + i);
    if constexpr (kAdd) {
      store(total + i, add(v, load(residual + i)));
      v = load(total + i);  // the sum as stored, rounded: what the next layer will see
    }
    squares = fma(v, v, squares);
  }
  if (rest > 0) {
    V v = load(x + whole, rest);
    if constexpr (kAdd) {
      store(total + whole, add(v, load(residual + whole, rest)), rest);
      v = load(total + whole, rest);
    }
    squares = fma(v, v, squares);
  }
  const V scale = set1(1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(size) + a.eps));
  const T* source = kAdd ? total : x;
  for (int i = 0; i < whole; i += W) store(out + i, mul(mul(load(source + i), scale), load(weight + i)));
  if (rest > 0)
    store(out + whole, mul(mul(load(source + whole, rest), scale), load(weight + whole, rest)), rest);
}

void norm(const NormArgs& a, const Threads& threads) {
  with_type(a.dtype, [&](auto x) {
    with_type(a.weight_dtype, [&](auto w) {
      using T = typename Plain<decltype(x)>::type;
      using TW = typename Plain<decltype(w)>::type;
      over_rows(threads, a.x_rows.count, a.size, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
          if (a.residual != nullptr) {
            norm_row<T, TW, true>(a, row);
          } else {
            norm_row<T, TW, false>(a, row);
          }
        }
      });
    });
  });
}

template <typename T, typename TO>
inline void copy_row(const T* x, TO* out, int size) {
  const int whole = size / W * W;
  for (int i = 0; i < whole; i += W) store(out + i, load(x + i));
  if (size > whole) store(out + whole, load(x + whole, size - whole), size - whole);
}

// Through the storage type T, as though the turned head had been stored before going to the cache.
template <typename T>
inline V rounded(V x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T through[W];
    store(through, x);
    return load(through);
  }
}

// Turns the first `rotary` features of a head and copies the others. cos_sin: the row of the head's
// position, [rotary]. out may be x.
template <typename T, typename TO>
inline void rotate_head(const T* x, TO* out, const float* cos_sin, int rotary, int size, bool interleaved) {
  const int half_size = rotary / 2;
  const float *cosine = cos_sin, *sine = cos_sin + half_size;
  if (interleaved) {
    for (int i = 0; i < half_size; i += W) {
      const int n = half_size - i < W ? half_size - i : W;
      float pairs[2 * W], turned[2 * W] = {};
      const int first = 2 * n < W ? 2 * n : W;
      store(pairs, load(x + 2 * i, first));
      if (2 * n > W) store(pairs + W, load(x + 2 * i + W, 2 * n - W));
      for (int j = 0; j < n; j++) {
        const float a = pairs[2 * j], b = pairs[2 * j + 1], c = cosine[i + j], s = sine[i + j];
        turned[2 * j] = a * c - b * s;
        turned[2 * j + 1] = b * c + a * s;
      }
      store(out + 2 * i, rounded<T>(load(turned)), first);
      if (2 * n > W) store(out + 2 * i + W, rounded<T>(load(turned + W)), 2 * n - W);
    }
  } else {
    for (int i = 0; i < half_size; i += W) {
      const int n = half_size - i < W ? half_size - i : W;
      const V c = load(cosine + i, n), s = load(sine + i, n);
      const V a = load(x + i, n), b = load(x + half_size + i, n);
      store(out + i, rounded<T>(sub(mul(a, c), mul(b, s))), n);
      store(out + half_size + i, rounded<T>(add(mul(b, c), mul(a, s))), n);
    }
  }
  if (size > rotary) copy_row(x + rotary, out + rotary, size - rotary);
}

Status rotary(const RotaryArgs& a, const Threads& threads) {
  int failed = 0;
  const int size = static_cast<int>(a.head_size), turned = static_cast<int>(a.rotary_size);
  with_type(a.dtype, [&](auto element) {
    with_type(a.cache_dtype, [&](auto cached) {
      using T = typename Plain<decltype(element)>::type;
      using TC = typename Plain<decltype(cached)>::type;
      const int64_t heads = a.q_heads + 2 * a.kv_heads;
      over_rows(threads, a.tokens, heads * a.head_size, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
          const int64_t position = a.positions[t];
          if (position < 0 || position >= a.max_position) {
            __atomic_store_n(&failed, static_cast<int>(Status::bad_position), __ATOMIC_RELAXED);
            return;
          }
          const float* cos_sin = a.cos_sin + position * a.rotary_size;
          const T* q = static_cast<const T*>(a.q) + t * a.q_stride;
          const T* k = static_cast<const T*>(a.k) + t * a.k_stride;
          T* q_out = static_cast<T*>(a.q_out) + t * a.q_heads * size;
          for (int64_t h = 0; h < a.q_heads; h++)
            rotate_head(q + h * size, q_out + h * size, cos_sin, turned, size, a.interleaved);
          if (a.v == nullptr) {
            T* k_out = static_cast<T*>(a.k_out) + t * a.kv_heads * size;
            for (int64_t h = 0; h < a.kv_heads; h++)
              rotate_head(k + h * size, k_out + h * size, cos_sin, turned, size, a.interleaved);
            continue;
          }
          const int64_t slot = a.slots[t], block = slot / a.block_size;
          if (slot < 0 || block >= a.num_blocks) {
            __atomic_store_n(&failed, static_cast<int>(Status::bad_slot), __ATOMIC_RELAXED);
            return;
          }
          const int64_t place = block * a.cache_block + slot % a.block_size * a.cache_slot;
          const T* v = static_cast<const T*>(a.v) + t * a.v_stride;
          for (int64_t h = 0; h < a.kv_heads; h++) {
            const int64_t head = place + h * a.cache_head;
            rotate_head(k + h * size, static_cast<TC*>(a.k_cache) + head, cos_sin, turned, size, a.interleaved);
            copy_row(v + h * size, static_cast<TC*>(a.v_cache) + head, size);
          }
        }
      });
    });
  });
  return static_cast<Status>(failed);
}

Status store_kv(const StoreArgs& a, const Threads& threads) {
  int failed = 0;
  const int size = static_cast<int>(a.head_size);
  with_type(a.dtype, [&](auto element) {
    with_type(a.cache_dtype, [&](auto cached) {
      using T = typename Plain<decltype(element)>::type;
      using TC = typename Plain<decltype(cached)>::type;
      over_rows(threads, a.tokens, 2 * a.kv_heads * a.head_size, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
          const int64_t slot = a.slots[t], block = slot / a.block_size;
          if (slot < 0 || block >= a.num_blocks) {
            __atomic_store_n(&failed, static_cast<int>(Status::bad_slot), __ATOMIC_RELAXED);
            return;
          }
          const int64_t place = block * a.cache_block + slot % a.block_size * a.cache_slot;
          for (int64_t h = 0; h < a.kv_heads; h++) {
            const int64_t head = place + h * a.cache_head;
            copy_row(static_cast<const T*>(a.k) + t * a.k_stride + h * size, static_cast<TC*>(a.k_cache) + head,
                     size);
            copy_row(static_cast<const T*>(a.v) + t * a.v_stride + h * size, static_cast<TC*>(a.v_cache) + head,
                     size);
          }
        }
      });
    });
  });
  return static_cast<Status>(failed);
}

// gelu with tanh is x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016).
template <Activation kKind>
inline V activate(V x) {
  if constexpr (kKind == Activation::silu) return mul(x, sigmoid(x));
  if constexpr (kKind == Activation::gelu_tanh) {
    const V cubic = mul(mul(x, x), mul(x, set1(0.044715f)));
    return mul(x, sigmoid(mul(set1(1.5957691216f), add(x, cubic))));
  }
  float lane[W];
  store(lane, x);
  for (int i = 0; i < W; i++) lane[i] *= 0.5f * (1.0f + __builtin_erff(lane[i] * 0.70710678f));
  return load(lane);
}

template <typename T, Activation kKind>
inline void gate_row(const T* gate, const T* up, T* out, int64_t count) {
  const int64_t whole = count / W * W;
  const int rest = static_cast<int>(count - whole);
  for (int64_t i = 0; i < whole; i += W) store(out + i, mul(activate<kKind>(load(gate + i)), load(up + i)));
  if (rest > 0) store(out + whole, mul(activate<kKind>(load(gate + whole, rest)), load(up + whole, rest)), rest);
}

template <typename T, Activation kKind>
inline void gated_rows(const GatedArgs& a, const Threads& threads) {
  over_rows(threads, a.x_rows.count, 4 * a.size, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const T* gate = static_cast<const T*>(a.x) + a.x_rows.at(row);
      gate_row<T, kKind>(gate, gate + a.size, static_cast<T*>(a.out) + row * a.size, a.size);
    }
  });
}

void gated(const GatedArgs& a, Activation kind, const Threads& threads) {
  with_type(a.dtype, [&](auto x) {
    using T = typename Plain<decltype(x)>::type;
    if (kind == Activation::silu) gated_rows<T, Activation::silu>(a, threads);
    if (kind == Activation::gelu_tanh) gated_rows<T, Activation::gelu_tanh>(a, threads);
    if (kind == Activation::gelu_erf) gated_rows<T, Activation::gelu_erf>(a, threads);
  });
}

void greedy_logprob(const LogprobArgs& a, const Threads& threads) {
  with_type(a.dtype, [&](auto element) {
    using T = typename Plain<decltype(element)>::type;
    over_rows(threads, a.rows, 4 * a.size, [&](int64_t first, int64_t last) {
      const int64_t whole = a.size / W * W;
      const int rest = static_cast<int>(a.size - whole);
      for (int64_t row = first; row < last; row++) {
        const T* x = static_cast<const T*>(a.logits) + row * a.stride;
        const V lowest = set1(-__builtin_inff());
        V greatest = lowest;
        for (int64_t i = 0; i < whole; i += W) greatest = max(greatest, load(x + i));
        if (rest > 0) greatest = max(greatest, select(lanes(0, rest), load(x + whole, rest), lowest));
        const V top = set1(hmax(greatest));
        V sum = zero();
        int64_t token = -1;
        for (int64_t start = 0; start < whole; start += 64 * W) {
          V part = zero();  // a sum of sums: one chain over a vocabulary would gather rounding
          for (int64_t i = start; i < minimum(whole, start + 64 * W); i += W) {
            const V v = load(x + i);
            if (token < 0) {
              const unsigned hits = equal_bits(v, top);
              if (hits != 0) token = i + __builtin_ctz(hits);
            }
            part = add(part, exp(sub(v, top)));
          }
          sum = add(sum, part);
        }
        if (rest > 0) {
          const V v = select(lanes(0, rest), load(x + whole, rest), lowest);
          const unsigned hits = equal_bits(v, top);
          if (token < 0 && hits != 0) token = whole + __builtin_ctz(hits);
          sum = add(sum, select(lanes(0, rest), exp(sub(v, top)), zero()));
        }
        a.token[row] = token < 0 ? 0 : token;  // none equals the greatest only where that is a NaN
        a.logprob[row] = -__builtin_logf(hsum(sum));
      }
    });
  });
}

// The same on float32 rows and ranges, for one thread within a parallel region.

// out = x / sqrt(mean(x^2) + eps) * weight, each [size]. out may be x. Bit for bit what the operation gives.
inline void rms_norm_row(const float* x, const float* weight, float* out, int64_t size, float eps) {
  NormArgs a = {};
  a.x = x;
  a.weight = weight;
  a.out = out;
  a.x_rows = {1, 1, 0, 0};
  a.size = size;
  a.eps = eps;
  norm_row<float, float, false>(a, 0);
}

// total += x.
inline void add_range(const float* x, float* total, int64_t count) {
  const int64_t whole = count / W * W;
  const int rest = static_cast<int>(count - whole);
  for (int64_t i = 0; i < whole; i += W) store(total + i, add(load(total + i), load(x + i)));
  if (rest > 0) store(total + whole, add(load(total + whole, rest), load(x + whole, rest)), rest);
}

// out = activation(gate) * up. out may be either.
inline void gate_range(const float* gate, const float* up, float* out, int64_t count, Activation kind) {
  if (kind == Activation::silu) gate_row<float, Activation::silu>(gate, up, out, count);
  if (kind == Activation::gelu_tanh) gate_row<float, Activation::gelu_tanh>(gate, up, out, count);
  if (kind == Activation::gelu_erf) gate_row<float, Activation::gelu_erf>(gate, up, out, count);
}

// The logits from i on whose bits are set, -inf in the other lanes. `bits` begins at i; `left` logits are left.
inline V allowed_logits(const float* x, unsigned bits, int64_t left) {
  const V lowest = set1(-__builtin_inff());
  if (left >= W) return select(bit_lanes(bits), load(x), lowest);
  return select(bit_lanes(bits & ((1u << left) - 1)), load(x, static_cast<int>(left)), lowest);
}

void greedy_allowed(const AllowedArgs& a, const Threads& threads) {
  constexpr unsigned kLanes = W == 32 ? ~0u : (1u << W) - 1;
  over_rows(threads, a.rows, 4 * a.size, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      const float* x = a.logits + row * a.stride;
      const uint32_t* words = a.allowed + row * a.words;
      V greatest = set1(-__builtin_inff());
      for (int64_t word = 0; word < a.words; word++) {
        if (words[word] == 0) continue;
        const int64_t end = minimum(a.size, 32 * word + 32);
        for (int64_t i = 32 * word; i < end; i += W) {
          const unsigned bits = words[word] >> (i % 32) & kLanes;
          if (bits != 0) greatest = max(greatest, allowed_logits(x + i, bits, a.size - i));
        }
      }
      const V top = set1(hmax(greatest));
      V sum = zero();
      int64_t token = -1;
      for (int64_t start = 0; start < a.words; start += 2 * W) {
        V part = zero();  // a sum of sums, as above
        for (int64_t word = start; word < minimum(a.words, start + 2 * W); word++) {
          if (words[word] == 0) continue;
          const int64_t end = minimum(a.size, 32 * word + 32);
          for (int64_t i = 32 * word; i < end; i += W) {
            const unsigned bits = words[word] >> (i % 32) & kLanes;
            if (bits == 0) continue;
            const V v = allowed_logits(x + i, bits, a.size - i);
            if (token < 0) {
              const unsigned hits = equal_bits(v, top) & bits;
              if (hits != 0) token = i + __builtin_ctz(hits);
            }
            part = add(part, exp(sub(v, top)));
          }
        }
        sum = add(sum, part);
      }
      a.token[row] = token < 0 ? 0 : token;
      a.logprob[row] = -__builtin_logf(hsum(sum));
    }
  });
}
