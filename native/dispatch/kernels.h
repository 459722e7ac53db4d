// The kernels of one instruction set, as function pointers. Everything above this line is compiled once, for the
// baseline machine, and picks its table at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"
#include "kernels/act_block.h"
#include "kernels/attention_args.h"
#include "quant/formats.h"

namespace nybble {

struct Kernels {
    // One packed group of 16 output rows x all tokens given: out[t * ldo + 0..15]. Activations are in tile layout.
    using GemmQ8 = void (*)(const uint8_t* w_group, Acts acts, int tokens, int k_blocks, float* out, int ldo);
    // The same with float activations x[t * ldx + 0..k-1].
    using GemmF32 = void (*)(const uint8_t* w_group, const float* x, int ldx, int tokens, int k, float* out, int ldo);

    static constexpr int formats = static_cast<int>(Format::count_);

    Isa isa = Isa::generic;
    GemmQ8 gemm_q8[formats] = {};  // null for floats, those of 8 bits too
    GemmF32 gemm_f32[formats] = {};
    // The same for the factors of adapters, F32 and F16 only; the second adds to what is there.
    GemmF32 low_rank[formats] = {};
    GemmF32 low_rank_add[formats] = {};

    // One token's whole row, k a multiple of 32; block b goes to index b * stride.
    void (*quantize)(const float* x, int k, Acts to, int stride) = nullptr;
    // out = x / rms(x) * w; out may be x.
    void (*rms_norm)(const float* x, const float* w, float eps, int n, float* out) = nullptr;
    // One head in place; cos and sin hold rotary / 2 values.
    void (*rope)(float* x, const float* cos, const float* sin, int rotary, bool interleaved) = nullptr;
    // Rotates one head, in place.
    void (*hadamard)(float* x, int n) = nullptr;
    // out = act(gate) * up; out may be either input.
    void (*silu_mul)(const float* gate, const float* up, int n, float* out) = nullptr;
    void (*gelu_tanh_mul)(const float* gate, const float* up, int n, float* out) = nullptr;
    void (*add)(const float* a, const float* b, int n, float* out) = nullptr;
    void (*scale)(float* x, float factor, int n) = nullptr;
    // x = cap * tanh(x / cap), in place.
    void (*softcap)(float* x, float cap, int n) = nullptr;
    // One token's K and V of one kv head, into `slot` of its block; `block` is where the (block, kv head) starts.
    void (*store_kv)(const float* k, const float* v, int head_dim, KvType type, uint8_t* block, int slot) = nullptr;
    void (*attention)(const AttentionArgs& args) = nullptr;

    // For the sampler. maxima[b] = the largest of block b of kMaximaBlock; returns the largest of all, NaN if x has
    // one.
    float (*block_maxima)(const float* x, int n, float* maxima) = nullptr;
    // out[i] = exp((x[i] - max) * factor), where no product is above 0; out may be x.
    void (*exp_weights)(const float* x, int n, float max, float factor, float* out) = nullptr;
    // The sums of these over chunks of kExpChunk.
    void (*exp_sums)(const float* x, int n, float max, float factor, float* sums) = nullptr;
    // out = x where the bit is set, else -inf; out may be x.
    void (*mask_logits)(const float* x, const uint32_t* allowed, int n, float* out) = nullptr;

    // For base/roofline.h: runs integer dot products from registers and returns how many operations they were.
    double (*int8_peak_loop)(long iterations) = nullptr;
    // Reads `bytes` (a multiple of 1024) and returns a checksum.
    uint64_t (*read_loop)(const uint8_t* data, size_t bytes) = nullptr;

    GemmQ8 q8(Format format) const { return gemm_q8[static_cast<int>(format)]; }
    GemmF32 f32(Format format) const { return gemm_f32[static_cast<int>(format)]; }
};

// The table of `isa`, which must be supported(): callers check, so that they can say what is wrong.
const Kernels& kernels(Isa isa);

}  // namespace nybble
