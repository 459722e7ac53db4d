#include "kernels/ops/register_gemm.h"
#include "kernels/simd/avx2.h"
#include "kernels/tables.h"

namespace nybble::avx2 {

void add_gemm_grouped(Kernels& table) {
    ops::register_gemm_both<Avx2, Format::U2_32, Format::U2_128, Format::U3_32, Format::U3_128, Format::U4_32,
                            Format::U4_128, Format::U8_32, Format::U8_128, Format::NF4_64, Format::FP4_64>(table);
}

}  // namespace nybble::avx2
