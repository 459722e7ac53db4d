// Encoders of the formats with super-blocks of 256 weights and only a scale per group: Q3_K, Q6_K.
#pragma once

#include <cmath>

#include "kernels/ops/encode_k.h"

namespace nybble::ops {

template <class S, int levels>
void search_symmetric_row(const float* x, const float* importance, int64_t cols, bool mean_square_weights,
                          EncodeScratch& scratch) {
    using L = Lanes<S>;
    using F = typename L::F;
    const int64_t groups = cols / 16;
    if (importance != nullptr && mean_square_weights) mean_squares<16>(x, cols, kBlock, 2.0f, scratch.sigma2);
    for (int64_t first = 0; first < groups; first += L::n) {
        F xs[16], w[16], sum_w{};
        load_groups<S, 16>(x, first, groups, xs);
        if (importance == nullptr) {
            for (int i = 0; i < 16; ++i) w[i] = xs[i] * xs[i];
        } else if (mean_square_weights) {
            importance_weights<S, 16>(xs, importance, scratch.sigma2, first, groups, w);
        } else {
            load_groups<S, 16>(importance, first, groups, w);
        }
        for (int i = 0; i < 16; ++i) sum_w += w[i];
        const Symmetric<S> found = search_symmetric<S, 16, levels>(xs, w);
        store_lanes<S>(scratch.scales.data(), first, groups, found.scale);
        store_lanes<S>(scratch.code_scales.data(), first, groups, found.code_scale);
        store_lanes<S>(scratch.weights.data(), first, groups, sum_w);
    }
}

// The scale of largest magnitude with its sign, the first of equals.
inline float largest_scale(const float* scales) {
    float largest = 0.0f, magnitude = 0.0f;
    for (int g = 0; g < 16; ++g) {
        if (std::fabs(scales[g]) > magnitude) {
            magnitude = std::fabs(scales[g]);
            largest = scales[g];
        }
    }
    return largest;
}

template <class S>
void encode_q6_k(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_symmetric_row<S, 32>(x, importance, cols, false, scratch);
    for (int64_t b = 0; b < cols / kBlock; ++b) {
        raw::Q6_K block{};
        const float* scales = scratch.scales.data() + b * 16;
        const float largest = largest_scale(scales);
        if (std::fabs(largest) >= kSmallestMax) {
            const float inverse = -128.0f / largest;
            block.d = float_to_half(1.0f / inverse);
            uint8_t* codes = scratch.codes.data();
            for (int g = 0; g < 16; ++g) {
                const float* group = x + b * kBlock + g * 16;
                block.scales[g] = static_cast<int8_t>(std::min(127, nearest_int(inverse * scales[g])));
                const float d = half_to_float(block.d) * static_cast<float>(block.scales[g]);
                if (d != 0.0f) {
                    divide_group<S, 16>(group, d, 0.0f, -32, 31, codes + 16 * g);
                } else {
                    const float code_scale = scratch.code_scales[static_cast<std::size_t>(b * 16 + g)];
                    searched_codes<16>(group, code_scale, 0.0f, -32, 31, codes + 16 * g);
                }
            }
            for (int half = 0; half < 2; ++half) {
                const uint8_t* c = codes + 128 * half;
                for (int i = 0; i < 32; ++i) {
                    block.ql[64 * half + i] = static_cast<uint8_t>((c[i] & 15) | (c[i + 64] & 15) << 4);
                    block.ql[64 * half + i + 32] = static_cast<uint8_t>((c[i + 32] & 15) | (c[i + 96] & 15) << 4);
                    block.qh[32 * half + i] = static_cast<uint8_t>(c[i] >> 4 | c[i + 32] >> 4 << 2 |
                                                                   c[i + 64] >> 4 << 4 | c[i + 96] >> 4 << 6);
                }
            }
        }
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

// The sixteen scales of a Q3_K block as codes 0 .. 63 around 32.
template <class S>
uint16_t q3_scales(const float* scales, const float* weights, uint8_t* codes) {
    if (weights != nullptr) {  // by the same search as for weights, in a single lane
        using L = Lanes<S>;
        typename L::F x[16]{}, w[16]{};
        for (int g = 0; g < 16; ++g) x[g][0] = scales[g], w[g][0] = weights[g];
        const Symmetric<S> found = search_symmetric<S, 16, 32>(x, w);
        for (int g = 0; g < 16; ++g) {
            const int l = std::clamp(nearest_int(found.code_scale[0] * scales[g]), -32, 31) + 32;
            codes[g] = static_cast<uint8_t>(found.code_scale[0] == 0.0f ? 0 : l);
        }
        return float_to_half(found.scale[0]);
    }
    const float largest = largest_scale(scales);
    if (largest == 0.0f) {
        std::memset(codes, 0, 16);
        return 0;
    }
    const float inverse = -32.0f / largest;
    for (int g = 0; g < 16; ++g) {
        const auto l = static_cast<int8_t>(nearest_int(inverse * scales[g]));
        codes[g] = static_cast<uint8_t>(std::clamp<int>(l, -32, 31) + 32);
    }
    return float_to_half(1.0f / inverse);
}

template <class S>
void encode_q3_k(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    using L = Lanes<S>;
    const int64_t groups = cols / 16;
    uint8_t* codes = scratch.codes.data();  // of the whole row: the search without importance gives codes at once
    if (importance != nullptr) {
        search_symmetric_row<S, 4>(x, importance, cols, true, scratch);
        for (int64_t g = 0; g < groups; ++g) {
            const auto at = static_cast<std::size_t>(g);
            searched_codes<16>(x + 16 * g, scratch.code_scales[at], 0.0f, -4, 3, codes + 16 * g);
        }
    } else {
        for (int64_t first = 0; first < groups; first += L::n) {
            typename L::F xs[16];
            typename L::I found[16];
            load_groups<S, 16>(x, first, groups, xs);
            store_lanes<S>(scratch.scales.data(), first, groups, search_three_bits<S>(xs, found));
            const int64_t present = std::min<int64_t>(L::n, groups - first);
            for (int64_t lane = 0; lane < present; ++lane) {
                for (int i = 0; i < 16; ++i) codes[16 * (first + lane) + i] = static_cast<uint8_t>(found[i][lane]);
            }
        }
    }
    for (int64_t b = 0; b < cols / kBlock; ++b, codes += kBlock) {
        raw::Q3_K block{};
        uint8_t scales[16];
        const float* weights = importance != nullptr ? scratch.weights.data() + b * 16 : nullptr;
        block.d = q3_scales<S>(scratch.scales.data() + b * 16, weights, scales);
        for (int g = 0; g < 16; ++g) {
            block.scales[g % 8] |= static_cast<uint8_t>((scales[g] & 15) << (g < 8 ? 0 : 4));
            block.scales[8 + g % 4] |= static_cast<uint8_t>(scales[g] >> 4 << 2 * (g / 4));
            const float d = half_to_float(block.d) * static_cast<float>(scales[g] - 32);
            if (d != 0.0f) divide_group<S, 16>(x + b * kBlock + 16 * g, d, 0.0f, -4, 3, codes + 16 * g);
        }
        for (int i = 0; i < 32; ++i) {
            for (int g = 0; g < 8; ++g) block.hmask[i] |= static_cast<uint8_t>(codes[32 * g + i] >> 2 << g);
        }
        for (int i = 0; i < kBlock; ++i) codes[i] &= 3;
        pack_two_bits(codes, block.qs);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

}  // namespace nybble::ops
