#include "kernels/ops/register_gemm.h"
#include "kernels/simd/generic.h"
#include "kernels/tables.h"

namespace nybble::generic {

void add_gemm_q8_k(Kernels& table) {
    ops::register_gemm_q8<Generic, Format::Q2_K, Format::Q3_K, Format::Q4_K, Format::Q5_K, Format::Q6_K,
                          Format::IQ4_XS>(table);
}

}  // namespace nybble::generic
