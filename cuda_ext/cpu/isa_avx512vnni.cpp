// The quantised products with AVX512_VNNI. A file of its own, as the level "avx512" must run without.
// The hazard of isa_avx512.cpp holds here too.
#include <immintrin.h>

#include "kernels.h"
#include "quant.h"

namespace aserve {
namespace {

#include "types.inl"

#include "simd_avx512.h"

#define ASERVE_VNNI

#include "quant_avx512.inl"

#include "quant_tile.inl"

}  // namespace

void quant_multiply_vnni(const PackedWeight& weight, const void* ready, int64_t rows, int64_t first_group,
                         int64_t last_group, float* out, int64_t out_stride, void* scratch, const Upcoming* upcoming) {
  quant::multiply_tiles(weight, ready, rows, first_group, last_group, out, out_stride, scratch, upcoming);
}

}  // namespace aserve
