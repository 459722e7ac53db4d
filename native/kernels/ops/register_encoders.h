// The table of encoders of one instruction set.
#pragma once

#include "kernels/ops/encode_iq4.h"
#include "kernels/ops/encode_k_symmetric.h"
#include "kernels/ops/encode_simple.h"

namespace nybble::ops {

// S: its lanes, and the conversions of halves, for which instruction sets have instructions of their own.
template <class S>
Encoders make_encoders() {
    Encoders e;
    const auto set = [&](Format format, EncodeRow row) { e.rows[static_cast<int>(format)] = row; };
    set(Format::F32, encode_f32<S>);
    set(Format::F16, S::encode_f16);
    set(Format::BF16, encode_bf16<S>);
    set(Format::Q4_0, encode_centered<S, raw::Q4_0, 8>);
    set(Format::Q4_1, encode_ranged<S, raw::Q4_1, 15>);
    set(Format::Q5_0, encode_centered<S, raw::Q5_0, 16>);
    set(Format::Q5_1, encode_ranged<S, raw::Q5_1, 31>);
    set(Format::Q8_0, encode_q8_0<S>);
    set(Format::Q2_K, encode_q2_k<S>);
    set(Format::Q3_K, encode_q3_k<S>);
    set(Format::Q4_K, encode_q4_k<S>);
    set(Format::Q5_K, encode_q5_k<S>);
    set(Format::Q6_K, encode_q6_k<S>);
    set(Format::IQ4_NL, encode_iq4_nl<S>);
    set(Format::IQ4_XS, encode_iq4_xs<S>);
    set(Format::MXFP4, encode_mxfp4<S>);
    e.read_f16 = S::read_f16;
    e.all_below = all_below<S>;
    return e;
}

}  // namespace nybble::ops
