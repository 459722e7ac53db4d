// Encoders of the formats with super-blocks of 256 weights and a minimum per group: Q2_K, Q4_K, Q5_K. A row is done in
// two phases: the searches, over groups of the whole row, and then block by block the scales of scales, the codes and
// the packing.
#pragma once

#include <cmath>

#include "base/half.h"
#include "kernels/ops/encode_search.h"
#include "kernels/ops/encode_weights.h"
#include "quant/blocks.h"

namespace nybble::ops {

inline constexpr int kBlock = 256;

// codes[i] = clamp(round((x[i] + shift) / d)) - low, for one group.
template <class S, int size>
void divide_group(const float* x, float d, float shift, int low, int high, uint8_t* codes) {
    using L = Lanes<S>;
    for (int i = 0; i < size; i += L::n) {
        L::store_bytes(codes + i, L::round_clamp((L::load(x + i) + shift) / d, low, high) - low);
    }
}

// The codes that a search ended with, needed where a group's own scale has been rounded to zero.
template <int size>
void searched_codes(const float* x, float code_scale, float code_minimum, int low, int high, uint8_t* codes) {
    for (int i = 0; i < size; ++i) {
        const int l = nearest_int(code_scale * (x[i] - code_minimum));
        codes[i] = static_cast<uint8_t>(code_scale == 0.0f ? 0 : std::clamp(l, low, high) - low);
    }
}

inline void pack_two_bits(const uint8_t* codes, uint8_t* out) {
    for (int half = 0; half < 2; ++half) {
        const uint8_t* c = codes + 128 * half;
        for (int i = 0; i < 32; ++i) {
            out[32 * half + i] = static_cast<uint8_t>(c[i] | c[i + 32] << 2 | c[i + 64] << 4 | c[i + 96] << 6);
        }
    }
}

template <class S, int size, int top, bool absolute>
void search_affine_row(const float* x, const float* importance, int64_t cols, const AffineGrid& grid,
                       float sigma_factor, EncodeScratch& scratch) {
    using L = Lanes<S>;
    using F = typename L::F;
    const int64_t groups = cols / size;
    if (importance != nullptr) mean_squares<size>(x, cols, kBlock, sigma_factor, scratch.sigma2);
    for (int64_t first = 0; first < groups; first += L::n) {
        F xs[size], w[size], sum_w{};
        load_groups<S, size>(x, first, groups, xs);
        Affine<S> found;
        if (importance != nullptr) {
            importance_weights<S, size>(xs, importance, scratch.sigma2, first, groups, w);
            for (int i = 0; i < size; ++i) sum_w += w[i];
            found = search_affine<S, size, top, false, true>(xs, w, {-0.9f, 0.05f, 36});
        } else {
            F base{};
            if constexpr (!absolute) {  // root of the group's mean square
                for (int i = 0; i < size; ++i) base += xs[i] * xs[i];
                base = base / static_cast<float>(size);
                for (int lane = 0; lane < L::n; ++lane) base[lane] = std::sqrt(base[lane]);
            }
            for (int i = 0; i < size; ++i) w[i] = absolute ? L::abs(xs[i]) : base + L::abs(xs[i]);
            found = search_affine<S, size, top, absolute, false>(xs, w, grid);
        }
        store_lanes<S>(scratch.scales.data(), first, groups, found.scale);
        store_lanes<S>(scratch.minima.data(), first, groups, found.minimum);
        store_lanes<S>(scratch.code_scales.data(), first, groups, found.code_scale);
        store_lanes<S>(scratch.code_minima.data(), first, groups, found.code_minimum);
        store_lanes<S>(scratch.weights.data(), first, groups, sum_w);
    }
}

// The codes 0 .. levels of n scales, and as a half what one step is worth.
inline uint16_t plain_scales(int n, int levels, const float* x, uint8_t* codes) {
    float max = 0.0f;
    for (int i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
    const float inverse = max > 0.0f ? static_cast<float>(levels) / max : 0.0f;
    for (int i = 0; i < n; ++i) {
        const auto code = static_cast<uint8_t>(nearest_int(inverse * x[i]));
        codes[i] = std::min(code, static_cast<uint8_t>(levels));
    }
    return float_to_half(max > 0.0f ? max / static_cast<float>(levels) : 0.0f);
}

// Scales and minima of one block, then the codes of its weights.
template <class S, int size, int top>
void affine_block(const float* x, bool weighted, int64_t first_group, int levels, EncodeScratch& scratch, uint16_t& d,
                  uint16_t& dmin, uint8_t* scale_codes, uint8_t* minimum_codes) {
    constexpr int groups = kBlock / size;
    const float* scales = scratch.scales.data() + first_group;
    const float* minima = scratch.minima.data() + first_group;
    if (weighted) {
        const float* w = scratch.weights.data() + first_group;
        d = float_to_half(search_scales(groups, levels, scales, w, scale_codes));
        dmin = float_to_half(search_scales(groups, levels, minima, w, minimum_codes));
    } else {
        d = plain_scales(groups, levels, scales, scale_codes);
        dmin = plain_scales(groups, levels, minima, minimum_codes);
    }
    for (int g = 0; g < groups; ++g) {
        const float scale = half_to_float(d) * static_cast<float>(scale_codes[g]);
        const float shift = half_to_float(dmin) * static_cast<float>(minimum_codes[g]);
        uint8_t* codes = scratch.codes.data() + g * size;
        if (scale != 0.0f) {
            divide_group<S, size>(x + g * size, scale, shift, 0, top, codes);
        } else {
            const auto at = static_cast<std::size_t>(first_group + g);
            searched_codes<size>(x + g * size, scratch.code_scales[at], scratch.code_minima[at], 0, top, codes);
        }
    }
}

template <class S>
void encode_q2_k(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_affine_row<S, 16, 3, true>(x, importance, cols, {-0.5f, 0.1f, 15}, 1.0f, scratch);
    for (int64_t b = 0; b < cols / kBlock; ++b) {
        raw::Q2_K block;
        uint8_t scales[16], minima[16];
        affine_block<S, 16, 3>(x + b * kBlock, importance != nullptr, b * 16, 15, scratch, block.d, block.dmin, scales,
                               minima);
        for (int g = 0; g < 16; ++g) block.scales[g] = static_cast<uint8_t>(scales[g] | minima[g] << 4);
        pack_two_bits(scratch.codes.data(), block.qs);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

// Eight scales and minima of six bits in twelve bytes.
inline void pack_six_bits(const uint8_t* scales, const uint8_t* minima, uint8_t* out) {
    for (int g = 0; g < 4; ++g) {
        out[g] = static_cast<uint8_t>(scales[g] | scales[g + 4] >> 4 << 6);
        out[g + 4] = static_cast<uint8_t>(minima[g] | minima[g + 4] >> 4 << 6);
        out[g + 8] = static_cast<uint8_t>((scales[g + 4] & 15) | (minima[g + 4] & 15) << 4);
    }
}

inline void pack_nibbles(const uint8_t* codes, uint8_t* out) {
    for (int chunk = 0; chunk < 4; ++chunk) {
        const uint8_t* c = codes + 64 * chunk;
        for (int i = 0; i < 32; ++i) {
            out[32 * chunk + i] = static_cast<uint8_t>((c[i] & 15) | (c[i + 32] & 15) << 4);
        }
    }
}

template <class S>
void encode_q4_k(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_affine_row<S, 32, 15, false>(x, importance, cols, {-1.0f, 0.1f, 20}, 2.0f, scratch);
    for (int64_t b = 0; b < cols / kBlock; ++b) {
        raw::Q4_K block;
        uint8_t scales[8], minima[8];
        affine_block<S, 32, 15>(x + b * kBlock, importance != nullptr, b * 8, 63, scratch, block.d, block.dmin, scales,
                                minima);
        pack_six_bits(scales, minima, block.scales);
        pack_nibbles(scratch.codes.data(), block.qs);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

template <class S>
void encode_q5_k(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_affine_row<S, 32, 31, false>(x, importance, cols, {-0.5f, 0.1f, 15}, 2.0f, scratch);
    for (int64_t b = 0; b < cols / kBlock; ++b) {
        raw::Q5_K block;
        uint8_t scales[8], minima[8];
        affine_block<S, 32, 31>(x + b * kBlock, importance != nullptr, b * 8, 63, scratch, block.d, block.dmin, scales,
                                minima);
        pack_six_bits(scales, minima, block.scales);
        pack_nibbles(scratch.codes.data(), block.qs);
        const uint8_t* codes = scratch.codes.data();
        for (int i = 0; i < 32; ++i) {
            unsigned bits = 0;
            for (int g = 0; g < 8; ++g) bits |= static_cast<unsigned>(codes[32 * g + i] >> 4) << g;
            block.qh[i] = static_cast<uint8_t>(bits);
        }
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

}  // namespace nybble::ops
