#include "kernels/ops/register_gemm.h"
#include "kernels/simd/generic.h"
#include "kernels/tables.h"

namespace nybble::generic {

void add_gemm_q8_legacy(Kernels& table) {
    ops::register_gemm_q8<Generic, Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::IQ4_NL,
                          Format::MXFP4>(table);
}

}  // namespace nybble::generic
