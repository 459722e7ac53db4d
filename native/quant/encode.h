// Encodes float rows as the blocks of GGUF files.
//
// Without importance every byte is what llama.cpp's quantizer writes; with it, weighted errors are never above its.
// That holds because sums run in the same order and are rounded after every step, whatever the instruction set: groups
// of weights lie side by side in the lanes of a vector (kernels/ops/encode_*.h), and never share a sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/cpu.h"
#include "quant/formats.h"

namespace nybble {

class ThreadPool;

// Whether encode() writes this format.
bool can_encode(Format format);

// What a row is on its way through one encoder; groups are those of 16 or 32 weights that share a scale.
struct EncodeScratch {
    std::vector<float> row;
    std::vector<float> scales, minima;            // of groups, as found by the search
    std::vector<float> code_scales, code_minima;  // what the search divided and shifted by
    std::vector<float> weights;                   // of groups: their summed weights
    std::vector<float> sigma2;                    // of groups: the mean square that their weights are built from
    std::vector<uint8_t> codes;

    explicit EncodeScratch(std::size_t cols);
};

struct EncodeTask {
    Format from;  // F32, F16, BF16 or any other format that can be decoded
    const void* source;
    int64_t rows, cols;       // cols: whole blocks of both formats
    Format to;                // can_encode()
    const float* importance;  // [cols], mean squares of the inputs, or nullptr
    uint8_t* out;             // rows of `to`
};

// The first row that has a NaN, an infinity or a weight that is too large for the format, or -1 and all rows are in
// task.out.
int64_t encode(const EncodeTask& task, ThreadPool& pool, Isa isa = detect_isa());

// One row of floats, all finite, into blocks.
using EncodeRow = void (*)(const float* x, const float* importance, int64_t cols, uint8_t* out, EncodeScratch& scratch);

// The encoders of one instruction set.
struct Encoders {
    EncodeRow rows[static_cast<int>(Format::count_)] = {};
    void (*read_f16)(const void* source, float* out, int64_t n) = nullptr;
    bool (*all_below)(float limit, const float* x, int64_t n) = nullptr;
};

}  // namespace nybble
