// The kernels at the level "avx512". Compiled with that level's flags, entered only where cpuid shows it.
//
// Hazard: an inline function or template with external linkage compiled here may be the copy the
// linker keeps for the whole library, and would then run on a CPU without this level. So everything
// below lives in an anonymous namespace and nothing of the C++ library's templates is included.
#include <immintrin.h>

#include "decoder.h"
#include "kernels.h"
#include "quant.h"
#include "team.h"

namespace aserve {
namespace {

#include "types.inl"

#include "simd_avx512.h"

#include "maths.inl"

#include "elementwise.inl"

#include "attention_shape.inl"

#include "attention_tile.inl"

#include "attention_plan.inl"

#include "attention.inl"

#include "dense.inl"

#include "quant_avx512.inl"

#include "quant.inl"

#include "linear.inl"

#include "decoder_share.inl"

#include "decoder_path.inl"

#include "decoder_memory.inl"

#include "decoder.inl"

constexpr Kernels table = {"avx512", norm, rotary, store_kv, attention, gated, greedy_logprob,
                           greedy_allowed, linear_kernels, packed_linear, packed_rows, decoder};

}  // namespace

const Kernels* avx512_kernels() { return &table; }

}  // namespace aserve
