#include "quant/decode.h"

#include <cstring>

#include "base/half.h"
#include "quant/packed_float8.h"
#include "quant/raw_codes.h"

namespace nybble {
namespace {

// What turns the codes of 32 weights into floats: value = scale * (code - offset) + minimum, per half of 16 weights.
struct Scales {
    float scale[2];
    float minimum[2];
};

Scales same(float scale, float minimum = 0.0f) { return {{scale, scale}, {minimum, minimum}}; }

template <class Block>
Scales half_scale(const Block& b, int) {
    return same(half_to_float(b.d));
}

template <class Block>
Scales half_scale_min(const Block& b, int) {
    return same(half_to_float(b.d), half_to_float(b.m));
}

template <class Block>
Scales six_bit_scale_min(const Block& b, int kb) {
    uint8_t scale, min;
    raw::scale_min(b.scales, kb, scale, min);
    return same(half_to_float(b.d) * static_cast<float>(scale), -(half_to_float(b.dmin) * static_cast<float>(min)));
}

Scales q2_scales(const raw::Q2_K& b, int kb) {
    const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
    Scales s;
    for (int i = 0; i < 2; ++i) {
        const uint8_t both = b.scales[2 * kb + i];
        s.scale[i] = d * static_cast<float>(both & 15);
        s.minimum[i] = -(dmin * static_cast<float>(both >> 4));
    }
    return s;
}

Scales q3_scales(const raw::Q3_K& b, int kb) {
    const float d = half_to_float(b.d);
    return {{d * static_cast<float>(raw::q3_scale(b, 2 * kb) - 32),
             d * static_cast<float>(raw::q3_scale(b, 2 * kb + 1) - 32)},
            {}};
}

Scales q6_scales(const raw::Q6_K& b, int kb) {
    const float d = half_to_float(b.d);
    return {{d * static_cast<float>(b.scales[2 * kb]), d * static_cast<float>(b.scales[2 * kb + 1])}, {}};
}

Scales iq4_xs_scale(const raw::IQ4_XS& b, int kb) {
    return same(half_to_float(b.d) * static_cast<float>(raw::iq4_scale(b, kb) - 32));
}

// 2^(e - 128), half of the E8M0 value because the codes are doubled. The two smallest are subnormal.
Scales e8m0_scale(const raw::MXFP4& b, int) {
    return same(bits_to_float(b.e < 2 ? 0x00200000u << b.e : static_cast<uint32_t>(b.e - 1) << 23));
}

float scale_of(uint16_t half) { return half_to_float(half); }
float scale_of(float value) { return value; }

template <class Block>
Scales grouped_scale(const Block& b, int) {
    const float d = scale_of(b.d);
    return same(d, d * static_cast<float>(-b.zero));
}

template <class Block, int offset, bool has_min, Scales scales(const Block&, int)>
void decode(const uint8_t* src, float* dst, std::size_t n, std::size_t block_size) {
    for (std::size_t done = 0; done < n; done += block_size, src += sizeof(Block)) {
        Block block;
        std::memcpy(&block, src, sizeof(Block));
        for (int kb = 0; kb < static_cast<int>(block_size / 32); ++kb, dst += 32) {
            raw::Words words;
            raw::codes(block, kb, words);
            uint8_t codes[32];
            std::memcpy(codes, words, sizeof codes);
            const Scales s = scales(block, kb);
            for (int i = 0; i < 32; ++i) {
                float x = s.scale[i / 16] * static_cast<float>(codes[i] - offset);
                if constexpr (has_min) x = x + s.minimum[i / 16];
                dst[i] = x;
            }
        }
    }
}

template <Format format>
void decode_codebook(const uint8_t* src, float* dst, std::size_t n) {
    for (std::size_t done = 0; done < n; done += 64, src += sizeof(raw::Codebook<format>), dst += 64) {
        raw::Codebook<format> block;
        std::memcpy(&block, src, sizeof block);
        for (int i = 0; i < 64; ++i) {
            dst[i] = block.d * static_cast<float>(codebook_value<format>(block.codes[i / 2] >> 4 * (i % 2) & 15));
        }
    }
}

template <int group>
void decode_float8(const uint8_t* src, float* dst, std::size_t n) {
    for (std::size_t done = 0; done < n; done += group, src += sizeof(raw::Float8<group>)) {
        raw::Float8<group> block;
        std::memcpy(&block, src, sizeof block);
        for (uint8_t code : block.codes) *dst++ = block.d * packed::e4m3_value(code);
    }
}

template <class Half>
void decode_halves(const uint8_t* src, float* dst, std::size_t n, Half to_float) {
    for (std::size_t i = 0; i < n; ++i) {
        uint16_t half;
        std::memcpy(&half, src + 2 * i, 2);
        dst[i] = to_float(half);
    }
}

}  // namespace

void dequantize(Format format, const void* src, float* dst, std::size_t n) {
    const auto* bytes = static_cast<const uint8_t*>(src);
    const auto size = static_cast<std::size_t>(info(format).block_size);
    using namespace raw;
    switch (format) {
        case Format::F32:
            if (n > 0) std::memcpy(dst, src, 4 * n);
            return;
        case Format::F16: return decode_halves(bytes, dst, n, half_to_float);
        case Format::BF16: return decode_halves(bytes, dst, n, bf16_to_float);
        case Format::Q4_0: return decode<Q4_0, 8, false, half_scale>(bytes, dst, n, size);
        case Format::Q4_1: return decode<Q4_1, 0, true, half_scale_min>(bytes, dst, n, size);
        case Format::Q5_0: return decode<Q5_0, 16, false, half_scale>(bytes, dst, n, size);
        case Format::Q5_1: return decode<Q5_1, 0, true, half_scale_min>(bytes, dst, n, size);
        case Format::Q8_0: return decode<Q8_0, 128, false, half_scale>(bytes, dst, n, size);
        case Format::Q2_K: return decode<Q2_K, 0, true, q2_scales>(bytes, dst, n, size);
        case Format::Q3_K: return decode<Q3_K, 4, false, q3_scales>(bytes, dst, n, size);
        case Format::Q4_K: return decode<Q4_K, 0, true, six_bit_scale_min>(bytes, dst, n, size);
        case Format::Q5_K: return decode<Q5_K, 0, true, six_bit_scale_min>(bytes, dst, n, size);
        case Format::Q6_K: return decode<Q6_K, 32, false, q6_scales>(bytes, dst, n, size);
        case Format::IQ4_NL: return decode<IQ4_NL, 128, false, half_scale>(bytes, dst, n, size);
        case Format::IQ4_XS: return decode<IQ4_XS, 128, false, iq4_xs_scale>(bytes, dst, n, size);
        case Format::MXFP4: return decode<MXFP4, 16, false, e8m0_scale>(bytes, dst, n, size);
        case Format::U2_32: return decode<Grouped<2, 32>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U2_128: return decode<Grouped<2, 128>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U3_32: return decode<Grouped<3, 32>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U3_128: return decode<Grouped<3, 128>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U4_32: return decode<Grouped<4, 32>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U4_128: return decode<Grouped<4, 128>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U8_32: return decode<Grouped<8, 32>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::U8_128: return decode<Grouped<8, 128>, 0, true, grouped_scale>(bytes, dst, n, size);
        case Format::NF4_64: return decode_codebook<Format::NF4_64>(bytes, dst, n);
        case Format::FP4_64: return decode_codebook<Format::FP4_64>(bytes, dst, n);
        case Format::F8_32: return decode_float8<32>(bytes, dst, n);
        case Format::F8_128: return decode_float8<128>(bytes, dst, n);
        case Format::count_: return;
    }
}

}  // namespace nybble
