// Element types of the KV cache, and the store of new tokens into it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/half.h"
#include "kernels/attention_args.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

struct KvF16 {
    using Element = uint16_t;
    static constexpr bool scaled = false;
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
    static constexpr bool scaled = false;
    template <class S>
    NYBBLE_SIMD typename S::F load(const float* p) {
        return S::load(p);
    }
    template <class S>
    NYBBLE_SIMD void store(float* p, typename S::F x) {
        S::store(p, x);
    }
};

// value = scale * code, with a scale per token and head that stands behind the block's codes.
struct KvInt8 {
    using Element = int8_t;
    static constexpr bool scaled = true;
    static const uint16_t* key_scales(const void* block, int head_dim) {
        return reinterpret_cast<const uint16_t*>(static_cast<const int8_t*>(block) + 2 * head_dim * kKvBlockTokens);
    }
    static const uint16_t* value_scales(const void* block, int head_dim) {
        return key_scales(block, head_dim) + kKvBlockTokens;
    }
};

// Gives put(i, code) the codes of one head's numbers; returns their scale. The scale is rounded to f16 first, up, so
// that no code exceeds 127; what is not finite becomes a scale of the same kind.
template <class Put>
inline uint16_t quantize_head(const float* x, int count, Put put) {
    float largest = 0.0f;
    bool finite = true;
    for (int i = 0; i < count; ++i) {
        const float size = x[i] < 0.0f ? -x[i] : x[i];
        finite &= size <= 3.0e38f;
        largest = size > largest ? size : largest;
    }
    uint16_t half = float_to_half(largest / 127.0f);
    if (half_to_float(half) * 127.0f < largest) ++half;
    const float scale = half_to_float(half);
    const bool usable = finite && scale > 0.0f && scale < 65504.0f;
    const float inverse = usable ? 1.0f / scale : 0.0f;
    for (int i = 0; i < count; ++i) put(i, usable ? (int8_t)__builtin_lrintf(x[i] * inverse) : (int8_t)0);
    if (finite && scale < 65504.0f) return half;
    for (int i = 0; i < count; ++i) put(i, (int8_t)1);
    return 0x7e00;  // NaN: it must show
}

inline void store_kv_int8(const float* k, const float* v, int head_dim, int8_t* block, int slot) {
    auto* scales = reinterpret_cast<uint16_t*>(block + 2 * head_dim * kKvBlockTokens);
    int8_t* keys = block + 2 * slot;
    scales[slot] = quantize_head(
        k, head_dim, [&](int d, int8_t code) NYBBLE_LAMBDA { keys[d / 2 * 2 * kKvBlockTokens + d % 2] = code; });
    int8_t* values = block + (ptrdiff_t)(kKvBlockTokens + slot / 2 * 2) * head_dim + slot % 2;
    scales[kKvBlockTokens + slot] =
        quantize_head(v, head_dim, [&](int d, int8_t code) NYBBLE_LAMBDA { values[2 * d] = code; });
}

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
void store_kv(const float* k, const float* v, int head_dim, KvType type, uint8_t* block, int slot) {
    if (type == KvType::int8) {
        store_kv_int8(k, v, head_dim, reinterpret_cast<int8_t*>(block), slot);
    } else if (type == KvType::f32) {
        store_kv_typed<S, KvF32>(k, v, head_dim, reinterpret_cast<float*>(block), slot);
    } else {
        store_kv_typed<S, KvF16>(k, v, head_dim, reinterpret_cast<uint16_t*>(block), slot);
    }
}

}  // namespace nybble::ops
