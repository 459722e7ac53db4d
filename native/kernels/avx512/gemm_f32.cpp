#include "kernels/ops/register_gemm.h"
#include "kernels/simd/avx512.h"
#include "kernels/tables.h"

namespace nybble::avx512 {

void add_gemm_f32(Kernels& table) {
    ops::register_gemm_plain<Avx512>(table);
    ops::register_gemm_f32<Avx512, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::IQ4_NL,
                           Format::MXFP4, Format::Q2_K, Format::Q3_K, Format::Q4_K, Format::Q5_K, Format::Q6_K,
                           Format::IQ4_XS, Format::F8_32, Format::F8_128>(table);
}

}  // namespace nybble::avx512
