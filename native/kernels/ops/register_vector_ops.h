// Puts everything that is neither GEMM nor attention into the kernel table.
#pragma once

#include "dispatch/kernels.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/hadamard.h"
#include "kernels/ops/kv_store.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/quantize.h"
#include "kernels/ops/roofline_loops.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/sampling.h"

namespace nybble::ops {

template <class S>
NYBBLE_INLINE void register_vector_ops(Kernels& table) {
    table.quantize = quantize<S>;
    table.rms_norm = rms_norm<S>;
    table.rope = rope<S>;
    table.hadamard = hadamard<S>;
    table.silu_mul = act_mul<S, Silu>;
    table.gelu_tanh_mul = act_mul<S, GeluTanh>;
    table.add = add<S>;
    table.scale = scale<S>;
    table.softcap = softcap<S>;
    table.store_kv = store_kv<S>;
    table.block_maxima = block_maxima<S>;
    table.exp_weights = exp_weights<S>;
    table.exp_sums = exp_sums<S>;
    table.mask_logits = mask_logits<S>;
    table.int8_peak_loop = int8_peak_loop<S>;
    table.read_loop = read_loop<S>;
}

}  // namespace nybble::ops
