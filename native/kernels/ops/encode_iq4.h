// Encoders of IQ4_NL and IQ4_XS: four-bit indices into a table of sixteen unevenly spaced values.
#pragma once

#include <cmath>

#include "base/half.h"
#include "kernels/ops/encode_search.h"
#include "kernels/ops/encode_weights.h"
#include "quant/blocks.h"

namespace nybble::ops {

inline constexpr float kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

constexpr float iq4_border(int i) { return (kIq4Values[i] + kIq4Values[i + 1]) / 2; }  // from here on, value i + 1

// The nearest table value; of two equally near ones the upper.
template <class S>
[[gnu::always_inline]] inline typename Lanes<S>::F nearest_value(typename Lanes<S>::F x) {
    typename Lanes<S>::F value = Lanes<S>::set(kIq4Values[15]);
    for (int i = 14; i >= 0; --i) value = x < iq4_border(i) ? Lanes<S>::set(kIq4Values[i]) : value;
    return value;
}

template <class S>
[[gnu::always_inline]] inline typename Lanes<S>::I nearest_index(typename Lanes<S>::F x) {
    typename Lanes<S>::I index = typename Lanes<S>::I{} + 15;
    for (int i = 0; i < 15; ++i) index += x < iq4_border(i);  // a true comparison is -1
    return index;
}

// The scale of each group of 32: least squares for grids in which the extreme becomes -134 to -120, or 0 for zeros.
template <class S>
void search_iq4_row(const float* x, const float* importance, int64_t cols, int64_t span, EncodeScratch& scratch) {
    using L = Lanes<S>;
    using F = typename L::F;
    const int64_t groups = cols / 32;
    if (importance != nullptr) mean_squares<32>(x, cols, span, 2.0f, scratch.sigma2);
    for (int64_t first = 0; first < groups; first += L::n) {
        F xs[32], w[32];
        load_groups<S, 32>(x, first, groups, xs);
        if (importance != nullptr) {
            importance_weights<S, 32>(xs, importance, scratch.sigma2, first, groups, w);
        } else {
            for (int i = 0; i < 32; ++i) w[i] = xs[i] * xs[i];
        }
        F max, abs_max;
        signed_extreme<S, 32>(xs, max, abs_max);
        F scale{}, best{};
        for (int attempt = -8; attempt <= 7; ++attempt) {  // -8 stands for the plain grid, which comes first
            const bool plain = attempt == -8;
            const F inverse =
                plain ? 1.0f / (-max / kIq4Values[0]) : (static_cast<float>(attempt) + kIq4Values[0]) / max;
            F sum_qx{}, sum_q2{};
            for (int i = 0; i < 32; ++i) {
                const F q = nearest_value<S>(inverse * xs[i]);
                const F wq = w[i] * q;
                sum_qx += wq * xs[i];
                sum_q2 += wq * q;
            }
            const auto better = plain ? sum_q2 > 0.0f : (sum_q2 > 0.0f) & (sum_qx * sum_qx > best * sum_q2);
            scale = better ? sum_qx / sum_q2 : scale;
            best = better ? scale * sum_qx : best;
        }
        store_lanes<S>(scratch.scales.data(), first, groups, abs_max < kSmallestMax ? F{} : scale);
    }
}

// 32 weights as indices, packed two to a byte.
template <class S>
void iq4_codes(const float* x, float inverse, uint8_t* out) {
    using L = Lanes<S>;
    uint8_t index[32];
    for (int i = 0; i < 32; i += L::n) {
        L::store_bytes(index + i, nearest_index<S>(inverse * L::load(x + i)));
    }
    for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(index[i] | index[i + 16] << 4);
}

template <class S>
void encode_iq4_nl(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_iq4_row<S>(x, importance, cols, 32, scratch);
    for (int64_t b = 0; b < cols / 32; ++b) {
        raw::IQ4_NL block;
        const float scale = scratch.scales[static_cast<std::size_t>(b)];
        block.d = float_to_half(scale);
        iq4_codes<S>(x + 32 * b, scale != 0.0f ? 1.0f / scale : 0.0f, block.qs);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

template <class S>
void encode_iq4_xs(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch) {
    search_iq4_row<S>(x, importance, cols, 256, scratch);
    for (int64_t b = 0; b < cols / 256; ++b) {
        raw::IQ4_XS block{};
        const float* scales = scratch.scales.data() + 8 * b;
        float largest = 0.0f, magnitude = 0.0f;
        for (int g = 0; g < 8; ++g) {
            if (std::fabs(scales[g]) > magnitude) {
                magnitude = std::fabs(scales[g]);
                largest = scales[g];
            }
        }
        const float d = -largest / 32.0f;
        block.d = float_to_half(d);
        const float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        unsigned high = 0;
        for (int g = 0; g < 8; ++g) {
            const int l = std::clamp(nearest_int(inverse * scales[g]), -32, 31);
            const float step = d * static_cast<float>(l);
            iq4_codes<S>(x + 256 * b + 32 * g, step != 0.0f ? 1.0f / step : 0.0f, block.qs + 16 * g);
            const auto code = static_cast<unsigned>(l + 32);
            block.scales_l[g / 2] |= static_cast<uint8_t>((code & 15) << 4 * (g % 2));
            high |= code >> 4 << 2 * g;
        }
        block.scales_h[0] = static_cast<uint8_t>(high);
        block.scales_h[1] = static_cast<uint8_t>(high >> 8);
        std::memcpy(out + b * sizeof(block), &block, sizeof(block));
    }
}

}  // namespace nybble::ops
