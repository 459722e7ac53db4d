#include "dispatch/kernels.h"

#include "kernels/tables.h"

namespace nybble {
namespace {

template <void (*... add)(Kernels&)>
Kernels build(Isa isa) {
    Kernels table;
    table.isa = isa;
    (add(table), ...);
    return table;
}

}  // namespace

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::amx) {
        static const Kernels table =
            build<avx512::add_gemm_q8_legacy, avx512::add_gemm_q8_k, avx512::add_gemm_grouped, avx512::add_gemm_f32,
                  avx512::add_vector_ops, avx512::add_attention, amx::add_gemm_q8, amx::add_peak>(isa);
        return table;
    }
    if (isa == Isa::avx512) {
        static const Kernels table = build<avx512::add_gemm_q8_legacy, avx512::add_gemm_q8_k, avx512::add_gemm_grouped,
                                           avx512::add_gemm_f32, avx512::add_vector_ops, avx512::add_attention>(isa);
        return table;
    }
    if (isa == Isa::avx2) {
        static const Kernels table = build<avx2::add_gemm_q8_legacy, avx2::add_gemm_q8_k, avx2::add_gemm_grouped,
                                           avx2::add_gemm_f32, avx2::add_vector_ops, avx2::add_attention>(isa);
        return table;
    }
#endif
    static const Kernels table =
        build<generic::add_gemm_q8_legacy, generic::add_gemm_q8_k, generic::add_gemm_grouped, generic::add_gemm_f32,
              generic::add_vector_ops, generic::add_attention>(Isa::generic);
    return table;
}

}  // namespace nybble
