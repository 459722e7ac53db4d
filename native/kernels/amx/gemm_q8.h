// Integer GEMM of one packed group of 16 output rows on AMX tiles (Intel, from Sapphire Rapids on). One instruction
// sums the products of 16 tokens and 16 rows over a k block; scales and minima are then applied by the float operations
// of ops/gemm_q8.h in the same order, so that results are the same bits. That pays for full tiles of tokens only.
//
// The packed codes lie as AMX wants them: vector v of a block holds inputs 4v..4v+3 of every row. They are unpacked for
// some k blocks at a time, once for all tokens, without their offset.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch/kernels.h"
#include "kernels/act_block.h"
#include "kernels/amx/tiles.h"
#include "kernels/ops/gemm_q8.h"
#include "kernels/ops/prefetch.h"
#include "kernels/simd/avx512.h"

namespace nybble::amx {

using S = Avx512;

inline constexpr int kChunkBlocks = 16;  // k blocks unpacked at a time, so that they stay in the first-level cache
inline constexpr int kVectors = kBlockInputs / 4;

// Whether codes stand for negative values too: without their offset they are signed bytes, else unsigned ones.
template <class Q>
inline constexpr bool kHasOffset = Q::shift >= 0;

// Some k blocks of the group, unpacked.
template <class Q>
struct alignas(64) Chunk {
    int8_t codes[kChunkBlocks][packed::kNumCodes<Q> * kVectorBytes];
    float ws[kChunkBlocks][Q::subs][kGroupRows];
    float wm[Q::has_min ? kChunkBlocks : 1][Q::subs][kGroupRows];

    NYBBLE_INLINE void unpack(const uint8_t* unit, int kb, int into) {
        constexpr int offset = kHasOffset<Q> ? 1 << Q::shift : 0;
        static_assert(Q::max_code - offset <= (kHasOffset<Q> ? 127 : 255));
        S::B w[packed::kNumCodes<Q>];
        S::F scales[2], minima[2];
        Q::template codes<S>(unit, kb, 0, w);
        Q::template scales<S>(unit, kb, 0, scales, minima);
#pragma GCC unroll 16
        for (int v = 0; v < packed::kNumCodes<Q>; ++v) {
            const S::B code = kHasOffset<Q> ? _mm512_sub_epi8(w[v], S::bset1((uint8_t)offset)) : w[v];
            _mm512_store_si512(codes[into] + v * kVectorBytes, code);
        }
#pragma GCC unroll 2
        for (int sub = 0; sub < Q::subs; ++sub) {
            S::store(ws[into][sub], scales[sub]);
            if constexpr (Q::has_min) S::store(wm[into][sub], minima[sub]);
        }
    }
};

// The sums of one k block for a tile of tokens: one for each scale or plane of codes.
template <class Q>
struct alignas(64) Sums {
    static constexpr int count = Q::subs * packed::kNumCodes<Q> / kVectors;
    int32_t of[count][kTokenTile][kGroupRows];

    NYBBLE_INLINE void multiply(const int8_t* codes, const ActBlock* acts) {
#pragma GCC unroll 2
        for (int i = 0; i < count; ++i) {
            const int8_t* q = acts->q + (Q::subs == 2 ? i * kBlockInputs / 2 : 0);
            _tile_zero(0);
            _tile_loadd(1, q, sizeof(ActBlock));
            _tile_loadd(2, codes + i * kVectors / Q::subs * kVectorBytes, kVectorBytes);
            if constexpr (kHasOffset<Q>) {
                _tile_dpbssd(0, 1, 2);
            } else {
                _tile_dpbsud(0, 1, 2);
            }
            _tile_stored(0, of[i], kVectorBytes);
        }
    }
};

// ops::add_block(), with the products at hand.
template <class Q>
NYBBLE_INLINE S::F add_block(S::F acc, const Sums<Q>& sums, int t, const S::F* ws, const S::F* wm,
                             const ActBlock& act) {
    S::I dot = S::iload(sums.of[0][t]);
    if constexpr (packed::kTwoPlanes<Q>) dot = S::iadd(S::template ishl<8>(dot), S::iload(sums.of[1][t]));
    S::F sum = S::mul(S::cvt(dot), ws[0]);
    if constexpr (Q::subs == 2) sum = S::fma(S::cvt(S::iload(sums.of[1][t])), ws[1], sum);
    return S::fma(ops::add_minima<S, Q>(sum, wm, act), S::set1(act.scale), acc);
}

// How far ahead of their use codes are unpacked: tiles are loaded from the cache, which stores reach late.
inline constexpr int kUnpackAhead = 4;

// Adds `blocks` k blocks of a tile to what `out` holds. Calls unpack(block) for those that shall be in the chunk. The
// products of the next block are asked for before those of this one are used, because they take long to arrive and
// what waits for them fills the scheduler.
template <class Q, class Unpack>
[[gnu::noinline]] void add_tile(const Chunk<Q>& chunk, int blocks, Unpack unpack, const ActBlock* acts, float* out,
                                ptrdiff_t ldo) {
    S::F acc[kTokenTile], ws[2], wm[2];
#pragma GCC unroll 16
    for (int t = 0; t < kTokenTile; ++t) acc[t] = S::load(out + t * ldo);
    for (int block = 0; block < kUnpackAhead && block < blocks; ++block) unpack(block);
    Sums<Q> sums[2];
    sums[0].multiply(chunk.codes[0], acts);
    for (int block = 0; block < blocks; ++block, acts += kTokenTile) {
        if (block + kUnpackAhead < blocks) unpack(block + kUnpackAhead);
        if (block + 1 < blocks) sums[(block + 1) % 2].multiply(chunk.codes[block + 1], acts + kTokenTile);
#pragma GCC unroll 2
        for (int sub = 0; sub < Q::subs; ++sub) {
            ws[sub] = S::load(chunk.ws[block][sub]);
            if constexpr (Q::has_min) wm[sub] = S::load(chunk.wm[block][sub]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kTokenTile; ++t) acc[t] = add_block<Q>(acc[t], sums[block % 2], t, ws, wm, acts[t]);
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokenTile; ++t) S::store(out + t * ldo, acc[t]);
}

// `tokens` is a multiple of the tile.
template <class Q>
[[gnu::noinline]] void gemm_q8_tiles(const uint8_t* w_group, Acts acts, int tokens, int k_blocks, float* out,
                                     ptrdiff_t ldo) {
    static constexpr TileConfig config(kBlockInputs / Q::subs);
    constexpr int blocks_per_unit = Q::unit_k / kBlockInputs;
    constexpr int bytes_per_block = Q::unit_bytes / blocks_per_unit;
    static_assert(kChunkBlocks % blocks_per_unit == 0);
    _tile_loadconfig(&config);
    Chunk<Q> chunk;
    for (int t = 0; t < tokens; ++t) S::store(out + t * ldo, S::zero());
    const uint8_t* units = w_group;
    for (int first = 0; first < k_blocks; first += kChunkBlocks) {
        const int blocks = k_blocks - first < kChunkBlocks ? k_blocks - first : kChunkBlocks;
        const auto unpack = [&](int block) {
            const uint8_t* unit = units + block / blocks_per_unit * Q::unit_bytes;
            const int kb = block % blocks_per_unit;
            ops::prefetch_weights<S, kTokenTile, bytes_per_block>(unit + kb * bytes_per_block);
            chunk.unpack(unit, kb, block);
        };
        const ActBlock* tile = acts.blocks + (ptrdiff_t)first * kTokenTile;
        add_tile<Q>(chunk, blocks, unpack, tile, out, ldo);
        for (int tile0 = kTokenTile; tile0 < tokens; tile0 += kTokenTile) {
            add_tile<Q>(chunk, blocks, [](int) {}, tile + (ptrdiff_t)tile0 * k_blocks, out + tile0 * ldo, ldo);
        }
        units += kChunkBlocks / blocks_per_unit * Q::unit_bytes;
    }
    _tile_release();
    ops::gemm_q8_refine_tiles<S, Q>(w_group, acts, tokens, k_blocks, out, ldo);
}

// The kernel for the tokens that fill no tile.
template <class Q>
inline Kernels::GemmQ8 gemm_q8_rest = nullptr;

// out[t][0..15] for all tokens; acts in tile layout.
template <class Q>
void gemm_q8(const uint8_t* w_group, Acts acts, int tokens, int k_blocks, float* out, int ldo) {
    const int in_tiles = tokens / kTokenTile * kTokenTile;
    if (in_tiles > 0) gemm_q8_tiles<Q>(w_group, acts, in_tiles, k_blocks, out, ldo);
    if (in_tiles == tokens) return;
    gemm_q8_rest<Q>(w_group, acts.at((ptrdiff_t)in_tiles * k_blocks), tokens - in_tiles, k_blocks,
                    out + (ptrdiff_t)in_tiles * ldo, ldo);
}

}  // namespace nybble::amx
