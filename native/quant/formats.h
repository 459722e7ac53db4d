// The weight encodings: names, GGUF type ids and block sizes. The Python side has the same table in nybble.quant.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string_view>

namespace nybble {

enum class Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    // What the safetensors dialects become: no file of ours has them (packed_grouped.h, packed_codebook.h,
    // packed_float8.h).
    U2_32,
    U2_128,
    U3_32,
    U3_128,
    U4_32,
    U4_128,
    U8_32,
    U8_128,
    NF4_64,
    FP4_64,
    F8_32,
    F8_128,
    count_,
};

inline constexpr int kNotInGguf = -1;

struct FormatInfo {
    std::string_view name;
    int ggml_type;    // or kNotInGguf
    int block_size;   // weights per block
    int block_bytes;  // bytes per block
};

inline constexpr std::array<FormatInfo, static_cast<int>(Format::count_)> kFormats = {{
    {"F32", 0, 1, 4},
    {"F16", 1, 1, 2},
    {"BF16", 30, 1, 2},
    {"Q4_0", 2, 32, 18},
    {"Q4_1", 3, 32, 20},
    {"Q5_0", 6, 32, 22},
    {"Q5_1", 7, 32, 24},
    {"Q8_0", 8, 32, 34},
    {"Q2_K", 10, 256, 84},
    {"Q3_K", 11, 256, 110},
    {"Q4_K", 12, 256, 144},
    {"Q5_K", 13, 256, 176},
    {"Q6_K", 14, 256, 210},
    {"IQ4_NL", 20, 32, 18},
    {"IQ4_XS", 23, 256, 136},
    {"MXFP4", 39, 32, 17},
    {"U2_32", kNotInGguf, 32, 12},
    {"U2_128", kNotInGguf, 128, 36},
    {"U3_32", kNotInGguf, 32, 16},
    {"U3_128", kNotInGguf, 128, 52},
    {"U4_32", kNotInGguf, 32, 20},
    {"U4_128", kNotInGguf, 128, 68},
    {"U8_32", kNotInGguf, 32, 40},
    {"U8_128", kNotInGguf, 128, 136},
    {"NF4_64", kNotInGguf, 64, 36},
    {"FP4_64", kNotInGguf, 64, 36},
    {"F8_32", kNotInGguf, 32, 36},
    {"F8_128", kNotInGguf, 128, 132},
}};

constexpr const FormatInfo& info(Format format) { return kFormats[static_cast<int>(format)]; }

// Bytes of one row of `cols` weights; cols must be a multiple of the block size.
constexpr std::size_t row_bytes(Format format, std::size_t cols) {
    return cols / info(format).block_size * info(format).block_bytes;
}

constexpr std::optional<Format> format_by_name(std::string_view name) {
    for (int i = 0; i < static_cast<int>(Format::count_); ++i) {
        if (kFormats[i].name == name) return static_cast<Format>(i);
    }
    return std::nullopt;
}

}  // namespace nybble
