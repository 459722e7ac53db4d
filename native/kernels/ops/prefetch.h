// Fetching packed weights ahead of the kernels that unpack them.
#pragma once

#include <cstdint>

#include "kernels/act_block.h"
#include "kernels/simd/common.h"

namespace nybble::ops {

// Asks for the weights of a later k block. Unpacking leaves the hardware prefetchers too few misses in flight: without
// this a K-quant streams at half the memory's speed. To the first-level cache they go only where they pass through it
// once, beside the activations of one token. Those of several fill half of it, as does a group that is read twice, for
// eight rows at a time: lines that wait there for long would drive them out, and the second level is near enough.
// Past the end of the group lies the next one.
template <class S, int T, int bytes>
NYBBLE_INLINE void prefetch_weights(const uint8_t* block) {
    constexpr bool first_level = T == 1 && S::lanes == kGroupRows;
    constexpr int distance = first_level ? 4096 : 8192;
#pragma GCC unroll 16
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(block + distance + line, 0, first_level ? 3 : 2);
}

}  // namespace nybble::ops
