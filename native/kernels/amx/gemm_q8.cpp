#include "kernels/amx/gemm_q8.h"

#include "dispatch/kernels.h"
#include "kernels/tables.h"
#include "quant/packed.h"

namespace nybble::amx {
namespace {

template <Format... formats>
void add(Kernels& table) {
    ((gemm_q8_rest<typename PackedOf<formats>::type> = table.q8(formats)), ...);
    ((table.gemm_q8[static_cast<int>(formats)] = gemm_q8<typename PackedOf<formats>::type>), ...);
}

}  // namespace

void add_gemm_q8(Kernels& table) {
    add<Format::Q4_0, Format::Q4_1, Format::Q5_0, Format::Q5_1, Format::Q8_0, Format::IQ4_NL, Format::MXFP4>(table);
    add<Format::Q2_K, Format::Q3_K, Format::Q4_K, Format::Q5_K, Format::Q6_K, Format::IQ4_XS>(table);
    add<Format::U2_32, Format::U2_128, Format::U3_32, Format::U3_128, Format::U4_32, Format::U4_128, Format::U8_32,
        Format::U8_128, Format::NF4_64, Format::FP4_64>(table);
}

}  // namespace nybble::amx
