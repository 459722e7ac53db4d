// Float GEMM of one packed group of 16 output rows: the reference arithmetic (NYBBLE_ACT=f32) for quantised weights,
// and the only one for weights that are floats. Weights take exactly the values of the dequantised tensor; only the
// scale of FP8 is applied to the sum of its block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "kernels/act_block.h"
#include "kernels/ops/prefetch.h"
#include "kernels/simd/common.h"
#include "quant/packed_codebook.h"
#include "quant/packed_float8.h"

namespace nybble::ops {

template <class S>
inline constexpr int kFloatTile = S::max_tile >= 8 ? 8 : S::max_tile;

// Plain float weights, packed [k][16 rows]. `Load` names how `lanes` of them are read.
struct WeightF32 {
    using Element = float;
    template <class S>
    NYBBLE_SIMD typename S::F load(const float* p) {
        return S::load(p);
    }
};
struct WeightF16 {
    using Element = uint16_t;
    template <class S>
    NYBBLE_SIMD typename S::F load(const uint16_t* p) {
        return S::load_f16(p);
    }
};
struct WeightBF16 {
    using Element = uint16_t;
    template <class S>
    NYBBLE_SIMD typename S::F load(const uint16_t* p) {
        return S::load_bf16(p);
    }
};

template <class S, class W, int T>
[[gnu::noinline]] void gemm_plain_tile(const uint8_t* w_group, const float* x, ptrdiff_t ldx, int k, float* out,
                                       ptrdiff_t ldo) {
    using Element = typename W::Element;
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        typename S::F acc[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t] = S::zero();
        const Element* w = reinterpret_cast<const Element*>(w_group) + row0;
        for (int i = 0; i < k; ++i, w += kGroupRows) {
            if (T == 1) __builtin_prefetch(reinterpret_cast<const char*>(w) + 4096);
            typename S::F value = W::template load<S>(w);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) acc[t] = S::fma(value, S::set1(x[t * ldx + i]), acc[t]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) S::store(out + t * ldo + row0, acc[t]);
    }
}

template <class S, class Q, int T>
[[gnu::noinline]] void gemm_decoded_tile(const uint8_t* w_group, const float* x, ptrdiff_t ldx, int k, float* out,
                                         ptrdiff_t ldo) {
    using F = typename S::F;
    using I = typename S::I;
    constexpr int blocks_per_unit = Q::unit_k / kBlockInputs;
    const I byte = S::iset1(255);
    const I offset = S::iset1(Q::shift < 0 ? 0 : 1 << (Q::shift < 0 ? 0 : Q::shift));
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        F acc[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t] = S::zero();
        const uint8_t* unit = w_group;
        const float* input = x;
        for (int done = 0; done < k; done += Q::unit_k, unit += Q::unit_bytes) {
            for (int kb = 0; kb < blocks_per_unit; ++kb) {
                typename S::B codes[packed::kNumCodes<Q>];
                F ws[2], wm[2];
                Q::template codes<S>(unit, kb, row0, codes);
                Q::template scales<S>(unit, kb, row0, ws, wm);
                for (int v = 0; v < 8; ++v) {
                    const int sub = v * Q::subs / 8;
                    I four = S::as_int(codes[v]);
                    [[maybe_unused]] I low{};
                    if constexpr (packed::kTwoPlanes<Q>) low = S::as_int(codes[8 + v]);
                    for (int j = 0; j < 4; ++j, ++input) {
                        // Product, then sum, each rounded: the value the reference decoder gives.
                        I code = S::isub(S::iand(four, byte), offset);
                        if constexpr (packed::kTwoPlanes<Q>) {
                            code = S::iadd(S::template ishl<8>(code), S::isub(S::iand(low, byte), offset));
                            low = S::template ishr<8>(low);
                        }
                        F value = S::mul(ws[sub], S::cvt(code));
                        if constexpr (Q::has_min) value = S::add(value, wm[sub]);
                        four = S::template ishr<8>(four);
#pragma GCC unroll 16
                        for (int t = 0; t < T; ++t) acc[t] = S::fma(value, S::set1(input[t * ldx]), acc[t]);
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) S::store(out + t * ldo + row0, acc[t]);
    }
}

// Two sums of each token and row, because one would wait for itself; a unit's scale is applied to both at its end.
template <class S, class Q, int T>
[[gnu::noinline]] void gemm_float8_tile(const uint8_t* w_group, const float* x, ptrdiff_t ldx, int k, float* out,
                                        ptrdiff_t ldo) {
    using F = typename S::F;
    constexpr int line = 4;  // inputs whose codes fill a line of the cache
    for (int row0 = 0; row0 < kGroupRows; row0 += S::lanes) {
        F acc[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) acc[t] = S::zero();
        const uint8_t* unit = w_group;
        const float* input = x;
        for (int done = 0; done < k; done += Q::unit_k, unit += Q::unit_bytes) {
            const uint8_t* codes = unit + Q::header_bytes + row0;
            F even[T], odd[T];
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) even[t] = odd[t] = S::zero();
            for (int i = 0; i < Q::unit_k; i += line, input += line, codes += line * kGroupRows) {
                if (row0 == 0) prefetch_weights<S, T, 64>(codes);
#pragma GCC unroll 4
                for (int j = 0; j < line; ++j) {
                    const F value = S::load_e4m3(codes + j * kGroupRows);
                    F* sum = j % 2 ? odd : even;
#pragma GCC unroll 16
                    for (int t = 0; t < T; ++t) sum[t] = S::fma(value, S::set1(input[t * ldx + j]), sum[t]);
                }
            }
            const F scale = S::mul(S::load(reinterpret_cast<const float*>(unit) + row0), S::set1(packed::kE4m3Unit));
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) acc[t] = S::fma(S::add(even[t], odd[t]), scale, acc[t]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) S::store(out + t * ldo + row0, acc[t]);
    }
}

// Which tile function serves weight type W: plain floats have an Element, packed types have a unit.
template <class S, class W, int T>
NYBBLE_INLINE void gemm_f32_tile(const uint8_t* w_group, const float* x, ptrdiff_t ldx, int k, float* out,
                                 ptrdiff_t ldo) {
    if constexpr (requires { typename W::Element; }) {
        gemm_plain_tile<S, W, T>(w_group, x, ldx, k, out, ldo);
    } else if constexpr (packed::kFloat8<W>) {
        gemm_float8_tile<S, W, T>(w_group, x, ldx, k, out, ldo);
    } else {
        gemm_decoded_tile<S, W, T>(w_group, x, ldx, k, out, ldo);
    }
}

// out[t][0..15] for all tokens of x[tokens][ldx].
template <class S, class W>
void gemm_f32(const uint8_t* w_group, const float* x, int ldx, int tokens, int k, float* out, int ldo) {
    int t = 0;
    for (; t + kFloatTile<S> <= tokens; t += kFloatTile<S>) {
        gemm_f32_tile<S, W, kFloatTile<S>>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
    }
    if (t + 4 <= tokens) {
        gemm_f32_tile<S, W, 4>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
        t += 4;
    }
    if (t + 2 <= tokens) {
        gemm_f32_tile<S, W, 2>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
        t += 2;
    }
    if (t < tokens) {
        gemm_f32_tile<S, W, 1>(w_group, x + (ptrdiff_t)t * ldx, ldx, k, out + (ptrdiff_t)t * ldo, ldo);
    }
}

}  // namespace nybble::ops
