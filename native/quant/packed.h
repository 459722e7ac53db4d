// From a Format to its packed layout. The float formats have none: they are packed [k][16 rows] in their own type.
#pragma once

#include "quant/formats.h"
#include "quant/packed_codebook.h"
#include "quant/packed_float8.h"
#include "quant/packed_grouped.h"
#include "quant/packed_k.h"
#include "quant/packed_legacy.h"

namespace nybble {

template <Format format>
struct PackedOf;

#define NYBBLE_PACKED(name)         \
    template <>                     \
    struct PackedOf<Format::name> { \
        using type = packed::name;  \
    }
NYBBLE_PACKED(Q4_0);
NYBBLE_PACKED(Q4_1);
NYBBLE_PACKED(Q5_0);
NYBBLE_PACKED(Q5_1);
NYBBLE_PACKED(Q8_0);
NYBBLE_PACKED(Q2_K);
NYBBLE_PACKED(Q3_K);
NYBBLE_PACKED(Q4_K);
NYBBLE_PACKED(Q5_K);
NYBBLE_PACKED(Q6_K);
NYBBLE_PACKED(IQ4_NL);
NYBBLE_PACKED(IQ4_XS);
NYBBLE_PACKED(MXFP4);
NYBBLE_PACKED(U2_32);
NYBBLE_PACKED(U2_128);
NYBBLE_PACKED(U3_32);
NYBBLE_PACKED(U3_128);
NYBBLE_PACKED(U4_32);
NYBBLE_PACKED(U4_128);
NYBBLE_PACKED(U8_32);
NYBBLE_PACKED(U8_128);
NYBBLE_PACKED(NF4_64);
NYBBLE_PACKED(FP4_64);
NYBBLE_PACKED(F8_32);
NYBBLE_PACKED(F8_128);
#undef NYBBLE_PACKED

// Calls f(type) with the packed type of `format`, which must not be a float format.
template <class Function>
decltype(auto) with_packed(Format format, Function&& f) {
    switch (format) {
        case Format::Q4_0: return f(packed::Q4_0{});
        case Format::Q4_1: return f(packed::Q4_1{});
        case Format::Q5_0: return f(packed::Q5_0{});
        case Format::Q5_1: return f(packed::Q5_1{});
        case Format::Q8_0: return f(packed::Q8_0{});
        case Format::Q2_K: return f(packed::Q2_K{});
        case Format::Q3_K: return f(packed::Q3_K{});
        case Format::Q4_K: return f(packed::Q4_K{});
        case Format::Q5_K: return f(packed::Q5_K{});
        case Format::Q6_K: return f(packed::Q6_K{});
        case Format::IQ4_NL: return f(packed::IQ4_NL{});
        case Format::IQ4_XS: return f(packed::IQ4_XS{});
        case Format::MXFP4: return f(packed::MXFP4{});
        case Format::U2_32: return f(packed::U2_32{});
        case Format::U2_128: return f(packed::U2_128{});
        case Format::U3_32: return f(packed::U3_32{});
        case Format::U3_128: return f(packed::U3_128{});
        case Format::U4_32: return f(packed::U4_32{});
        case Format::U4_128: return f(packed::U4_128{});
        case Format::U8_32: return f(packed::U8_32{});
        case Format::U8_128: return f(packed::U8_128{});
        case Format::NF4_64: return f(packed::NF4_64{});
        case Format::FP4_64: return f(packed::FP4_64{});
        case Format::F8_32: return f(packed::F8_32{});
        default: return f(packed::F8_128{});
    }
}

}  // namespace nybble
