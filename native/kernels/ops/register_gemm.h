// Puts the GEMMs of a list of formats into the kernel table.
#pragma once

#include "dispatch/kernels.h"
#include "kernels/ops/gemm_f32.h"
#include "kernels/ops/gemm_q8.h"
#include "kernels/ops/low_rank.h"
#include "quant/packed.h"

namespace nybble::ops {

template <class S, Format... formats>
NYBBLE_INLINE void register_gemm_q8(Kernels& table) {
    ((table.gemm_q8[static_cast<int>(formats)] = gemm_q8<S, typename PackedOf<formats>::type>), ...);
}

template <class S, Format... formats>
NYBBLE_INLINE void register_gemm_f32(Kernels& table) {
    ((table.gemm_f32[static_cast<int>(formats)] = gemm_f32<S, typename PackedOf<formats>::type>), ...);
}

template <class S, Format... formats>
NYBBLE_INLINE void register_gemm_both(Kernels& table) {
    register_gemm_q8<S, formats...>(table);
    register_gemm_f32<S, formats...>(table);
}

template <class S>
NYBBLE_INLINE void register_gemm_plain(Kernels& table) {
    table.gemm_f32[static_cast<int>(Format::F32)] = gemm_f32<S, WeightF32>;
    table.gemm_f32[static_cast<int>(Format::F16)] = gemm_f32<S, WeightF16>;
    table.gemm_f32[static_cast<int>(Format::BF16)] = gemm_f32<S, WeightBF16>;
    table.low_rank[static_cast<int>(Format::F32)] = low_rank<S, WeightF32, false>;
    table.low_rank[static_cast<int>(Format::F16)] = low_rank<S, WeightF16, false>;
    table.low_rank_add[static_cast<int>(Format::F32)] = low_rank<S, WeightF32, true>;
    table.low_rank_add[static_cast<int>(Format::F16)] = low_rank<S, WeightF16, true>;
}

}  // namespace nybble::ops
