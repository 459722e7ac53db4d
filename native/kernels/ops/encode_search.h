// The searches for the scale (and minimum) of groups of weights: what to divide by before rounding. Every lane is a
// group and runs through the same candidates, taking over those that lower its own weighted error.
#pragma once

#include "kernels/ops/encode_lanes.h"

namespace nybble::ops {

inline constexpr float kSmallestMax = 1e-15f;  // groups below it are taken for zeros

// A scale, and what codes are made with: code = clamp(round(x * code_scale)) + offset, all zero where is_zero.
template <class S>
struct Symmetric {
    typename Lanes<S>::F scale, code_scale;
};

template <class S, int size>
[[gnu::always_inline]] inline void signed_extreme(const typename Lanes<S>::F* x, typename Lanes<S>::F& max,
                                                  typename Lanes<S>::F& abs_max) {
    using L = Lanes<S>;
    max = abs_max = typename L::F{};
    for (int i = 0; i < size; ++i) {
        const typename L::F a = L::abs(x[i]);
        max = a > abs_max ? x[i] : max;
        abs_max = a > abs_max ? a : abs_max;
    }
}

// x ~ scale * (code - levels), codes 0 .. 2 * levels - 1. Least squares for the plain grid and 18 near it, in which the
// signed extreme lies on -levels or up to 0.9 steps beside it. Zero groups get scale 0 and code_scale 0.
template <class S, int size, int levels>
Symmetric<S> search_symmetric(const typename Lanes<S>::F* x, const typename Lanes<S>::F* w) {
    using L = Lanes<S>;
    using F = typename L::F;
    F max, abs_max;
    signed_extreme<S, size>(x, max, abs_max);
    F wx[size];
    for (int i = 0; i < size; ++i) wx[i] = w[i] * x[i];

    F scale{}, best{}, code_scale{};
    for (int step = -10; step <= 9; ++step) {  // -10 stands for the plain grid, which comes first
        if (step == 0) continue;
        const float numerator =
            step == -10 ? -static_cast<float>(levels) : -(static_cast<float>(levels) + 0.1f * static_cast<float>(step));
        const F inverse = numerator / max;
        F sum_lx{}, sum_l2{};
        for (int i = 0; i < size; ++i) {
            const F l = L::cvt(L::round_clamp(inverse * x[i], -levels, levels - 1));
            sum_lx += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
        if (step == -10) {
            scale = sum_l2 != 0.0f ? sum_lx / sum_l2 : F{};
            best = scale * sum_lx;
            code_scale = inverse;
            continue;
        }
        const auto better = (sum_l2 > 0.0f) & (sum_lx * sum_lx > best * sum_l2);
        scale = better ? sum_lx / sum_l2 : scale;
        best = better ? scale * sum_lx : best;
        code_scale = better ? inverse : code_scale;
    }
    const auto zero = abs_max < kSmallestMax;
    return {zero ? F{} : scale, zero ? F{} : code_scale};
}

// Q3_K: x ~ scale * (code - 4) with weights x^2. Rounds once, then five times asks of each code in turn whether
// another one fits better. Codes 0 .. 7 (0 in zero groups).
template <class S>
typename Lanes<S>::F search_three_bits(const typename Lanes<S>::F* x, typename Lanes<S>::I* codes) {
    using L = Lanes<S>;
    using F = typename L::F;
    using I = typename L::I;
    constexpr int size = 16, levels = 4;
    F max, abs_max;
    signed_extreme<S, size>(x, max, abs_max);
    const F inverse = -static_cast<float>(levels) / max;
    F w[size], wx[size], l[size];
    F sum_lx{}, sum_l2{};
    for (int i = 0; i < size; ++i) {
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
        l[i] = L::cvt(L::round_clamp(inverse * x[i], -levels, levels - 1));
        sum_lx += wx[i] * l[i];
        sum_l2 += w[i] * l[i] * l[i];
    }
    for (int sweep = 0; sweep < 5; ++sweep) {
        I any_change{};
        for (int i = 0; i < size; ++i) {
            F lx = sum_lx - wx[i] * l[i];
            const I possible = lx > 0.0f;
            F l2 = sum_l2 - w[i] * l[i] * l[i];
            const F fresh = L::cvt(L::round_clamp(x[i] * l2 / lx, -levels, levels - 1));
            lx += wx[i] * fresh;
            l2 += w[i] * fresh * fresh;
            const I change = possible & (fresh != l[i]) & (l2 > 0.0f) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            l[i] = change ? fresh : l[i];
            sum_lx = change ? lx : sum_lx;
            sum_l2 = change ? l2 : sum_l2;
            any_change |= change;
        }
        int changes = 0;
        for (int lane = 0; lane < L::n; ++lane) changes |= any_change[lane];
        if (!changes) break;  // no lane would ever change again
    }
    const I zero = abs_max < kSmallestMax;
    for (int i = 0; i < size; ++i) codes[i] = zero ? I{} : L::truncate(l[i]) + levels;
    const F scale = sum_l2 > 0.0f ? sum_lx / sum_l2 : F{};
    return zero ? F{} : scale;
}

// x ~ scale * code - minimum. code = clamp(round((x - code_minimum) * code_scale)).
template <class S>
struct Affine {
    typename Lanes<S>::F scale, minimum, code_scale, code_minimum;
};

struct AffineGrid {
    float first, step;
    int last;  // candidates 0 .. last
};

// Least squares for scale and minimum (never above 0) on grids with first + step * k more steps than top.
// absolute: compares by weighted absolute errors, not squares. guarded: the variant used with importance, which also
// survives a minimum that has risen to the maximum.
template <class S, int size, int top, bool absolute, bool guarded>
Affine<S> search_affine(const typename Lanes<S>::F* x, const typename Lanes<S>::F* w, const AffineGrid& grid) {
    using L = Lanes<S>;
    using F = typename L::F;
    F min = x[0], max = x[0], sum_w = w[0], sum_x = sum_w * x[0];
    for (int i = 1; i < size; ++i) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    min = min > 0.0f ? F{} : min;
    const auto flat = guarded ? max <= min : max == min;
    const F start_min = min;

    F code_scale = static_cast<float>(top) / (max - min), code_min = min;
    F scale = 1.0f / code_scale;
    const auto error_of = [&](F l, F s, F m, int i) {
        const F difference = s * l + m - x[i];
        return w[i] * (absolute ? L::abs(difference) : difference * difference);
    };
    F best{};
    for (int i = 0; i < size; ++i)
        best += error_of(L::cvt(L::round_clamp(code_scale * (x[i] - min), 0, top)), scale, min, i);

    F l[size];
    for (int k = 0; k <= grid.last; ++k) {
        const float steps = grid.first + grid.step * static_cast<float>(k) + static_cast<float>(top);
        const F inverse = steps / (max - min);
        F sum_l{}, sum_l2{}, sum_xl{};
        for (int i = 0; i < size; ++i) {
            F v = inverse * (x[i] - min);
            if constexpr (guarded) {
                const F capped = v < static_cast<float>(top) ? v : L::set(static_cast<float>(top));
                l[i] = v > 0.0f ? L::cvt(L::nearest(capped)) : F{};
            } else {
                l[i] = L::cvt(L::round_clamp(v, 0, top));
            }
            const F wl = w[i] * l[i];
            sum_l += wl;
            sum_l2 += wl * l[i];
            sum_xl += wl * x[i];
        }
        const F determinant = sum_w * sum_l2 - sum_l * sum_l;
        F new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        F new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const auto above = new_min > 0.0f;
        new_min = above ? F{} : new_min;
        new_scale = above ? sum_xl / sum_l2 : new_scale;
        F error{};
        for (int i = 0; i < size; ++i) error += error_of(l[i], new_scale, new_min, i);
        const auto better = (determinant > 0.0f) & (error < best);
        best = better ? error : best;
        scale = better ? new_scale : scale;
        code_scale = better ? inverse : code_scale;
        code_min = better ? min : code_min;
        min = better ? new_min : min;
    }
    return {flat ? F{} : scale, -(flat ? start_min : min), flat ? F{} : code_scale, code_min};
}

}  // namespace nybble::ops
