// What the Simd instances share: the inlining attribute and the polynomials.
#pragma once

#include <cstdint>

// Every Simd function must vanish into its caller: an out-of-line copy compiled with one ISA's flags must never be
// the one the linker keeps for another translation unit.
#define NYBBLE_INLINE [[gnu::always_inline]] inline
#define NYBBLE_SIMD [[gnu::always_inline]] static inline
#define NYBBLE_LAMBDA __attribute__((always_inline))

namespace nybble {

// The two steps of e^x: x = n ln2 + r with |r| <= ln2 / 2, and p = e^r - 1 by a polynomial, to full relative accuracy.
template <class S>
struct ExpParts {
    typename S::F n, p;
};

template <class S>
NYBBLE_INLINE ExpParts<S> exp_parts(typename S::F x) {
    using F = typename S::F;
    F n = S::round(S::mul(x, S::set1(1.44269504f)));
    F r = S::fma(n, S::set1(-0.693359375f), x);  // the high part has few bits, so n * it is exact
    r = S::fma(n, S::set1(2.12194440e-4f), r);
    F p = S::set1(0.00019882773f);
    p = S::fma(p, r, S::set1(0.00139262508f));
    p = S::fma(p, r, S::set1(0.00833332084f));
    p = S::fma(p, r, S::set1(0.0416665542f));
    p = S::fma(p, r, S::set1(0.166666667f));
    p = S::fma(p, r, S::set1(0.5f));
    return {n, S::fma(p, S::mul(r, r), r)};
}

// e^x to about 1 ulp. Below -110 it is 0 (so exp(-inf) = 0), above 89 it is inf, and NaN stays NaN.
template <class S>
NYBBLE_INLINE typename S::F simd_exp(typename S::F x) {
    x = S::max(S::set1(-110.0f), x);  // this operand order keeps NaN
    x = S::min(S::set1(89.0f), x);
    const ExpParts<S> parts = exp_parts<S>(x);
    return S::scale_by_power_of_2(S::add(parts.p, S::set1(1.0f)), parts.n);
}

// tanh(x) = E / (E + 2) with E = e^2x - 1 = 2^n p + (2^n - 1), which stays accurate around 0.
template <class S>
NYBBLE_INLINE typename S::F simd_tanh(typename S::F x) {
    using F = typename S::F;
    x = S::max(S::set1(-10.0f), x);
    x = S::min(S::set1(10.0f), x);
    const ExpParts<S> parts = exp_parts<S>(S::add(x, x));
    const F one = S::set1(1.0f);
    const F power = S::scale_by_power_of_2(one, parts.n);
    const F e = S::fma(power, parts.p, S::sub(power, one));
    return S::div(e, S::add(e, S::set1(2.0f)));
}

}  // namespace nybble
