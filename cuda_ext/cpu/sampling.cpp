// From logits to tokens. See sampling.h.
#include "sampling.h"

#include <cmath>
#include <limits>

namespace aserve {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

uint64_t scramble(uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

// From (0, 1), never its ends: 23 bits and a half, which float32 holds exactly.
float gumbel(uint64_t stream, int64_t token) {
  const uint64_t bits = scramble(stream + (static_cast<uint64_t>(token) + 1) * 0x9e3779b97f4a7c15ull) >> 41;
  const float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-23f;
  return -std::log(-std::log(uniform));
}

void draw(const SampleArgs& a, int64_t row) {
  const float* logits = static_cast<const float*>(a.logits) + row * a.stride;
  const bool greedy = a.temperature[row] == 0.0f;
  const float over = greedy ? 1.0f : 1.0f / a.temperature[row];
  const uint64_t stream =
      scramble(scramble(static_cast<uint64_t>(a.seeds[row])) + static_cast<uint64_t>(a.positions[row]));
  float best = kNone, value_of_best = kNone, maximum = kNone;
  int64_t chosen = -1;
  for (int64_t token = 0; token < a.size; token++) {
    const float value = logits[token] * over;
    // No noise lifts a token that is ruled out.
    const float key = greedy || value == kNone ? value : value + gumbel(stream, token);
    if (key > best || (chosen < 0 && key == best)) {
      best = key;
      value_of_best = value;
      chosen = token;
    }
    if (value > maximum) maximum = value;
  }
  double sum = 0;
  for (int64_t token = 0; token < a.size; token++) sum += std::exp(static_cast<double>(logits[token] * over) - maximum);
  a.token[row] = chosen < 0 ? 0 : chosen;
  // NaN where a logit is NaN or +inf, or all are -inf: whoever reads it sees that there is no best.
  a.logprob[row] = static_cast<float>(static_cast<double>(value_of_best) - maximum - std::log(sum));
}

}  // namespace

Status penalties(const PenaltyArgs& a) {
  if (a.dtype != DType::f32) return Status::bad_type;
  for (int64_t i = 0; i < a.starts[a.rows]; i++)
    if (a.ids[i] < 0 || a.ids[i] >= a.size) return Status::bad_row;
  for (int64_t row = 0; row < a.rows; row++) {
    float* logits = static_cast<float*>(a.logits) + row * a.stride;
    for (int64_t i = a.starts[row]; i < a.starts[row + 1]; i++) {
      float value = logits[a.ids[i]];
      value = value > 0.0f ? value / a.repetition[row] : value * a.repetition[row];
      value -= a.frequency[row] * static_cast<float>(a.counts[i]);
      if (a.counts[i] > 0) value -= a.presence[row];
      logits[a.ids[i]] = value;
    }
  }
  return Status::ok;
}

Status sample(const SampleArgs& a) {
  if (a.dtype != DType::f32) return Status::bad_type;
  for (int64_t row = 0; row < a.rows; row++) draw(a, row);
  return Status::ok;
}

}  // namespace aserve
