// Penalties and drawing on the CPU: float32 logits, plain code for the baseline CPU.
#pragma once

#include "kernels.h"

namespace aserve {

struct PenaltyArgs {
  void* logits;             // [rows, size], changed in place
  const int64_t* starts;    // [rows + 1] into ids and counts, rising
  const int64_t* ids;       // distinct within a row
  const int32_t* counts;    // how often the output holds the token; 0: only the prompt does
  const float* repetition;  // [rows], 1: none
  const float* frequency;   // [rows]
  const float* presence;    // [rows]
  int64_t rows, size, stride;
  DType dtype;
};

struct SampleArgs {
  const void* logits;        // [rows, size]
  const float* temperature;  // [rows]; 0: the greatest logit, the first of equal ones
  const int64_t* seeds;      // [rows]
  const int64_t* positions;  // [rows]
  int64_t* token;            // [rows]
  float* logprob;            // [rows]: of softmax(logits / temperature), of softmax(logits) where greedy
  int64_t rows, size, stride;
  DType dtype;
};

// bad_row: an id that is no token. Nothing is changed then.
Status penalties(const PenaltyArgs& args);

// The greatest of logit / temperature + Gumbel noise (Gumbel 1954); the noise is SplitMix64 (Steele, Lea & Flood
// 2014) of seed, position and token, as on CUDA.
Status sample(const SampleArgs& args);

}  // namespace aserve
