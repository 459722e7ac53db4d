// Encoders of the formats with blocks of 32 weights and of the float formats.
#pragma once

#include <cmath>

#include "base/half.h"
#include "kernels/ops/encode_search.h"
#include "kernels/ops/encode_weights.h"
#include "quant/blocks.h"

namespace nybble::ops {

// 32 codes of four bits, or of five with the fifth bits in qh.
inline void pack_pairs(const uint8_t* codes, uint8_t* qs) {
    for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[i + 16] & 15) << 4);
}

inline void pack_fifth_bits(const uint8_t* codes, uint8_t* qh) {
    for (int byte = 0; byte < 4; ++byte) {
        unsigned bits = 0;
        for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(codes[8 * byte + i] >> 4) << i;
        qh[byte] = static_cast<uint8_t>(bits);
    }
}

template <class Block>
void pack_codes(const uint8_t* codes, Block& block) {
    pack_pairs(codes, block.qs);
    if constexpr (requires { block.qh; }) pack_fifth_bits(codes, block.qh);
}

struct Range {
    float min, max;
};

template <class S>
Range range_of(const float* x) {
    using L = Lanes<S>;
    typename L::F low = L::load(x), high = low;
    for (int i = L::n; i < 32; i += L::n) {
        const typename L::F v = L::load(x + i);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    Range range{low[0], high[0]};
    for (int lane = 1; lane < L::n; ++lane) {
        range.min = std::min(range.min, low[lane]);
        range.max = std::max(range.max, high[lane]);
    }
    // Of zeros with both signs, the first.
    if (range.min == 0.0f) range.min = *std::find(x, x + 31, 0.0f);
    return range;
}

// codes[i] = (int)((x[i] - shift) * inverse + offset), at most top.
template <class S>
void scale_codes(const float* x, float shift, float inverse, float offset, int top, uint8_t* codes) {
    using L = Lanes<S>;
    for (int i = 0; i < 32; i += L::n) {
        const typename L::I l = L::truncate((L::load(x + i) - shift) * inverse + offset);
        const typename L::I capped = l > top ? typename L::I{} + top : l;
        L::store_bytes(codes + i, capped);
    }
}

// Q4_0 and Q5_0: the weight of largest magnitude becomes code 0, its sign that of the scale.
template <class S, class Block, int levels>
void encode_centered(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    using L = Lanes<S>;
    const int64_t blocks = cols / 32;
    uint8_t codes[32];
    if (importance != nullptr) mean_squares<32>(x, cols, cols, 1.0f, scratch.sigma2);
    for (int64_t first = 0; importance != nullptr && first < blocks; first += L::n) {
        typename L::F xs[32], w[32];
        load_groups<S, 32>(x, first, blocks, xs);
        importance_weights<S, 32>(xs, importance, scratch.sigma2, first, blocks, w);
        const Symmetric<S> found = search_symmetric<S, 32, levels>(xs, w);
        store_lanes<S>(scratch.scales.data(), first, blocks, found.scale);
        store_lanes<S>(scratch.code_scales.data(), first, blocks, found.code_scale);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        Block block;
        const float* group = x + 32 * b;
        if (importance != nullptr) {
            const float inverse = scratch.code_scales[static_cast<std::size_t>(b)];
            block.d = float_to_half(scratch.scales[static_cast<std::size_t>(b)]);
            for (int i = 0; i < 32; ++i) {
                const int l = std::clamp(nearest_int(inverse * group[i]), -levels, levels - 1) + levels;
                codes[i] = static_cast<uint8_t>(inverse == 0.0f ? 0 : l);
            }
        } else {
            const Range range = range_of<S>(group);
            float extreme = range.max > -range.min ? range.max : range.min;
            if (range.max == -range.min) {  // the first one decides
                extreme = *std::find_if(group, group + 31, [&](float v) { return std::fabs(v) == range.max; });
                extreme += 0.0f;  // -0 becomes 0
            }
            const float d = extreme / -static_cast<float>(levels);
            block.d = float_to_half(d);
            const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
            scale_codes<S>(group, 0.0f, inverse, static_cast<float>(levels) + 0.5f, 2 * levels - 1, codes);
        }
        pack_codes(codes, block);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

// Q4_1 and Q5_1: from the smallest weight to the largest.
template <class S, class Block, int top>
void encode_ranged(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    using L = Lanes<S>;
    const int64_t blocks = cols / 32;
    uint8_t codes[32];
    if (importance != nullptr) mean_squares<32>(x, cols, cols, 1.0f, scratch.sigma2);
    for (int64_t first = 0; importance != nullptr && first < blocks; first += L::n) {
        typename L::F xs[32], w[32];
        load_groups<S, 32>(x, first, blocks, xs);
        importance_weights<S, 32>(xs, importance, scratch.sigma2, first, blocks, w);
        const auto found = search_affine<S, 32, top, false, true>(xs, w, {-0.9f, 0.05f, 36});
        store_lanes<S>(scratch.scales.data(), first, blocks, found.scale);
        store_lanes<S>(scratch.minima.data(), first, blocks, found.minimum);
        store_lanes<S>(scratch.code_scales.data(), first, blocks, found.code_scale);
        store_lanes<S>(scratch.code_minima.data(), first, blocks, found.code_minimum);
    }
    for (int64_t b = 0; b < blocks; ++b) {
        Block block;
        const float* group = x + 32 * b;
        const auto at = static_cast<std::size_t>(b);
        if (importance != nullptr) {
            block.d = float_to_half(scratch.scales[at]);
            block.m = float_to_half(-scratch.minima[at]);
            for (int i = 0; i < 32; ++i) {
                const float v = scratch.code_scales[at] * (group[i] - scratch.code_minima[at]);
                codes[i] = static_cast<uint8_t>(v > 0.0f ? nearest_int(std::min(v, static_cast<float>(top))) : 0);
            }
        } else {
            const Range range = range_of<S>(group);
            const float d = (range.max - range.min) / static_cast<float>(top);
            block.d = float_to_half(d);
            block.m = float_to_half(range.min);
            scale_codes<S>(group, range.min, d != 0.0f ? 1.0f / d : 0.0f, 0.5f, top, codes);
        }
        pack_codes(codes, block);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

template <class S>
void encode_q8_0(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
    using L = Lanes<S>;
    for (int64_t b = 0; b < cols / 32; ++b) {
        raw::Q8_0 block;
        const float* group = x + 32 * b;
        const Range range = range_of<S>(group);
        const float d = std::fabs(std::max(range.max, -range.min)) / 127.0f;
        block.d = float_to_half(d);
        const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        for (int i = 0; i < 32; i += L::n) {
            const typename L::F v = L::load(group + i) * inverse;
            typename L::I l = L::truncate(v);
            const typename L::F rest = v - L::cvt(l);  // exact, so that halves go away from zero
            l -= rest >= 0.5f;
            l += rest <= -0.5f;
            L::store_bytes(reinterpret_cast<uint8_t*>(block.qs) + i, l);
        }
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

// E2M1 codes under a power of two: the nearest, of two equally near ones the smaller.
template <class S>
void encode_mxfp4(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
    using L = Lanes<S>;
    for (int64_t b = 0; b < cols / 32; ++b) {
        raw::MXFP4 block;
        const float* group = x + 32 * b;
        const Range range = range_of<S>(group);
        const float largest = std::max(range.max, -range.min);
        const float exponent = largest > 0.0f ? std::floor(std::log2(largest)) - 2.0f + 127.0f : 0.0f;
        block.e = static_cast<uint8_t>(std::max(exponent, 0.0f));
        const float half_unit = std::ldexp(1.0f, block.e - 128);  // codes stand for 0 1 2 3 4 6 8 12 of these
        uint8_t codes[32];
        for (int i = 0; i < 32; i += L::n) {
            const typename L::F v = L::load(group + i), a = L::abs(v);
            typename L::I code{};
            for (const float border : {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f}) code -= a > border * half_unit;
            code += ((v < 0.0f) & (code > 0)) & 8;
            L::store_bytes(codes + i, code);
        }
        pack_pairs(codes, block.qs);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

template <class S>
void encode_bf16(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
    for (int64_t i = 0; i < cols; ++i) {
        const uint16_t half = float_to_bf16(x[i]);
        std::memcpy(out + 2 * i, &half, 2);
    }
}

template <class S>
void encode_f32(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
    std::memcpy(out, x, static_cast<std::size_t>(cols) * 4);
}

// Whether every magnitude is below `limit`; NaN is not.
template <class S>
bool all_below(float limit, const float* x, int64_t n) {
    const uint32_t limit_bits = float_to_bits(limit);
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= (float_to_bits(x[i]) & 0x7fffffff) >= limit_bits;
    return bad == 0;
}

}  // namespace nybble::ops
