// How much the error of each weight counts, and the search for the scales of scales.
#pragma once

#include <cmath>

#include "kernels/ops/encode_lanes.h"

namespace nybble::ops {

// For every group of `size`: factor * mean square of the `span` weights around it, added up in file order.
template <int size>
void mean_squares(const float* x, int64_t cols, int64_t span, float factor, std::vector<float>& sigma2) {
    for (int64_t begin = 0; begin < cols; begin += span) {
        float sum = 0.0f;
        for (int64_t i = begin; i < begin + span; ++i) sum += x[i] * x[i];
        const float mean = factor * sum / static_cast<float>(span);
        for (int64_t i = begin; i < begin + span; i += size) sigma2[static_cast<std::size_t>(i / size)] = mean;
    }
}

// importance * sqrt(sigma2 + x^2), side by side like x.
template <class S, int size>
void importance_weights(const typename Lanes<S>::F* x, const float* importance, const std::vector<float>& sigma2,
                        int64_t first, int64_t count, typename Lanes<S>::F* w) {
    using L = Lanes<S>;
    load_groups<S, size>(importance, first, count, w);
    typename L::F sigma{};
    const auto present = static_cast<std::size_t>(std::min<int64_t>(L::n, count - first));
    std::memcpy(&sigma, sigma2.data() + first, present * sizeof(float));
    for (int i = 0; i < size; ++i) {
        float root[L::n];
        L::store(root, sigma + x[i] * x[i]);
        for (float& r : root) r = std::sqrt(r);
        w[i] = w[i] * L::load(root);
    }
}

// Rounds the n >= 0 scales (or minima) of a block to codes 0 .. top, minding how much each counts: a grid of nine, then
// up to five sweeps over single codes. Returns what one step is worth.
inline float search_scales(int n, int top, const float* x, const float* w, uint8_t* codes) {
    float max = 0.0f;
    for (int i = 0; i < n; ++i) max = max > x[i] ? max : x[i];
    if (max < 1e-15f) {
        std::memset(codes, 0, static_cast<std::size_t>(n));
        return 0.0f;
    }
    float inverse = static_cast<float>(top) / max;
    float best = 0.0f;
    for (int i = 0; i < n; ++i) {
        const auto code = static_cast<uint8_t>(nearest_int(inverse * x[i]));
        const float difference = x[i] - (1.0f / inverse) * static_cast<float>(code);
        best += w[i] * difference * difference;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float candidate = (0.1f * static_cast<float>(step) + static_cast<float>(top)) / max;
        const float scale = 1.0f / candidate;
        float error = 0.0f;
        for (int i = 0; i < n; ++i) {
            const int code = std::min(top, nearest_int(candidate * x[i]));
            const float difference = x[i] - scale * static_cast<float>(code);
            error += w[i] * difference * difference;
        }
        if (error < best) {
            best = error;
            inverse = candidate;
        }
    }
    float sum_lx = 0.0f, sum_l2 = 0.0f;
    for (int i = 0; i < n; ++i) {
        const int code = std::min(top, nearest_int(inverse * x[i]));
        codes[i] = static_cast<uint8_t>(code);
        sum_lx += w[i] * x[i] * static_cast<float>(code);
        sum_l2 += w[i] * static_cast<float>(code) * static_cast<float>(code);
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        bool changed = false;
        for (int i = 0; i < n; ++i) {
            const auto old = static_cast<float>(codes[i]);
            float lx = sum_lx - w[i] * x[i] * old;
            float l2 = sum_l2 - w[i] * old * old;
            if (!(lx > 0.0f && l2 > 0.0f)) continue;
            const int code = std::min(top, nearest_int(x[i] * l2 / lx));
            if (code == codes[i]) continue;
            lx += w[i] * x[i] * static_cast<float>(code);
            l2 += w[i] * static_cast<float>(code) * static_cast<float>(code);
            if (lx * lx * sum_l2 > sum_lx * sum_lx * l2) {
                codes[i] = static_cast<uint8_t>(code);
                sum_lx = lx;
                sum_l2 = l2;
                changed = true;
            }
        }
        if (!changed) break;
    }
    return sum_l2 > 0.0f ? sum_lx / sum_l2 : 0.0f;
}

}  // namespace nybble::ops
