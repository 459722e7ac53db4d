// Element types of the KV cache, and the store of new tokens into it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention_args.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

struct KvF16 {
    using Element = uint16_t;
    template <class S>
    NYBBLE_SIMD typename S::F load(const uint16_t* p) {
        return S::load_f16(p);
    }
    template <class S>
    NYBBLE_SIMD void store(uint16_t* p, typename S::F x) {
        S::store_f16(p, x);
    }
};

struct KvF32 {
    using Element = float;
    template <class S>
    NYBBLE_SIMD typename S::F load(const float* p) {
        return S::load(p);
    }
    template <class S>
    NYBBLE_SIMD void store(float* p, typename S::F x) {
        S::store(p, x);
    }
};

template <class S, class KV>
NYBBLE_INLINE void store_kv_typed(const float* k, const float* v, int head_dim, typename KV::Element* block, int slot) {
    using Element = typename KV::Element;
    Element* values = block + (ptrdiff_t)head_dim * kKvBlockTokens + (ptrdiff_t)slot * head_dim;
    for (int d = 0; d < head_dim; d += S::lanes) {
        KV::template store<S>(values + d, S::load(v + d));
        Element converted[S::lanes];
        KV::template store<S>(converted, S::load(k + d));
        for (int i = 0; i < S::lanes; ++i) block[(d + i) * kKvBlockTokens + slot] = converted[i];
    }
}

// Stores one token's K and V of one kv head at `slot` of its block; `block` is the (block, kv head) start.
template <class S>
void store_kv(const float* k, const float* v, int head_dim, bool kv_f32, uint8_t* block, int slot) {
    if (kv_f32) {
        store_kv_typed<S, KvF32>(k, v, head_dim, reinterpret_cast<float*>(block), slot);
    } else {
        store_kv_typed<S, KvF16>(k, v, head_dim, reinterpret_cast<uint16_t*>(block), slot);
    }
}

}  // namespace nybble::ops
