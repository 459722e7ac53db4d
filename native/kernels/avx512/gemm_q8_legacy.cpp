#include "kernels/ops/register_gemm.h"
#include "kernels/simd/avx512.h"
#include "kernels/tables.h"

namespace nybble::avx512 {

void add_gemm_q8_legacy(Kernels& table) {
    ops::register_gemm_q8<Avx512, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::IQ4_NL,
                          Format::MXFP4>(table);
}

}  // namespace nybble::avx512
