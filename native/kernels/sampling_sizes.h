// How the sampler's kernels cut up a row of logits.
#pragma once

namespace nybble {

inline constexpr int kMaximaBlock = 64;  // logits under one maximum: a top k reads about k such blocks
inline constexpr int kExpChunk = 1024;   // weights that are summed in float; beyond, sums are double

}  // namespace nybble
