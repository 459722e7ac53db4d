#include "quant/pack.h"

#include <cstring>

#include "base/half.h"
#include "quant/one_row.h"
#include "quant/packed.h"

namespace nybble {
namespace {

constexpr std::size_t kGroup = 16;

bool is_float(Format format) { return info(format).block_size == 1; }

// [k][16 rows] of `Element`, row by row so that the file is read in order.
template <class Element>
void pack_plain(const uint8_t* src, std::size_t row0, std::size_t rows, std::size_t cols, uint8_t* group) {
    auto* out = reinterpret_cast<Element*>(group);
    for (std::size_t r = 0; r < kGroup; ++r) {
        if (row0 + r >= rows) {
            for (std::size_t k = 0; k < cols; ++k) out[k * kGroup + r] = 0;
            continue;
        }
        const uint8_t* row = src + (row0 + r) * cols * sizeof(Element);
        for (std::size_t k = 0; k < cols; ++k) {
            std::memcpy(&out[k * kGroup + r], row + k * sizeof(Element), sizeof(Element));
        }
    }
}

template <class Q>
void pack_group(const uint8_t* src, std::size_t row0, std::size_t rows, std::size_t cols, uint8_t* group) {
    using Block = typename Q::Block;
    const std::size_t units = cols / Q::unit_k;
    if (row0 + kGroup > rows) std::memset(group, 0, units * Q::unit_bytes);
    const std::size_t here = rows - row0 < kGroup ? rows - row0 : kGroup;
    for (std::size_t u = 0; u < units; ++u) {
        for (std::size_t r = 0; r < here; ++r) {
            Block block;
            std::memcpy(&block, src + ((row0 + r) * units + u) * sizeof(Block), sizeof(Block));
            Q::pack(group + u * Q::unit_bytes, static_cast<int>(r), block);
        }
    }
}

// Row `row` of a group: decoded by the kernels' code, then rounded as dequantize() does.
template <class Q>
void unpack_units(const uint8_t* unit, std::size_t cols, int row, float* dst) {
    constexpr int offset = Q::shift < 0 ? 0 : 1 << (Q::shift < 0 ? 0 : Q::shift);
    for (std::size_t k = 0; k < cols; k += Q::unit_k, unit += Q::unit_bytes) {
        for (int kb = 0; kb < Q::unit_k / 32; ++kb, dst += 32) {
            OneRow::B words[packed::kNumCodes<Q>];
            OneRow::F ws[2], wm[2];
            Q::template codes<OneRow>(unit, kb, row, words);
            Q::template scales<OneRow>(unit, kb, row, ws, wm);
            uint8_t codes[4 * packed::kNumCodes<Q>];
            std::memcpy(codes, words, sizeof codes);
            for (int i = 0; i < 32; ++i) {
                int code = codes[i] - offset;
                if constexpr (packed::kTwoPlanes<Q>) code = 256 * code + codes[32 + i] - offset;
                float x = ws[i * Q::subs / 32] * static_cast<float>(code);
                if constexpr (Q::has_min) x = x + wm[i * Q::subs / 32];
                dst[i] = x;
            }
        }
    }
}

template <class Q>
void unpack_float8(const uint8_t* unit, std::size_t cols, int row, float* dst) {
    for (std::size_t k = 0; k < cols; k += Q::unit_k, unit += Q::unit_bytes) {
        float scale;
        std::memcpy(&scale, unit + 4 * row, 4);
        for (int i = 0; i < Q::unit_k; ++i) *dst++ = scale * packed::e4m3_value(unit[Q::header_bytes + 16 * i + row]);
    }
}

float load_plain(Format format, const uint8_t* p) {
    if (format == Format::F32) {
        float x;
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    return format == Format::F16 ? half_to_float(half) : bf16_to_float(half);
}

}  // namespace

void pack_rows(Format format, const uint8_t* src, std::size_t rows, std::size_t cols, std::size_t group_begin,
               std::size_t group_end, uint8_t* dst) {
    for (std::size_t g = group_begin; g < group_end; ++g) {
        uint8_t* group = dst + g * packed_group_bytes(format, cols);
        if (format == Format::F32) {
            pack_plain<uint32_t>(src, g * kGroup, rows, cols, group);
        } else if (is_float(format)) {
            pack_plain<uint16_t>(src, g * kGroup, rows, cols, group);
        } else {
            with_packed(format, [&]<class Q>(Q) { pack_group<Q>(src, g * kGroup, rows, cols, group); });
        }
    }
}

void unpack_row(Format format, const uint8_t* packed, std::size_t cols, std::size_t row, float* dst) {
    const uint8_t* group = packed + row / kGroup * packed_group_bytes(format, cols);
    if (is_float(format)) {
        const std::size_t size = info(format).block_bytes;
        for (std::size_t k = 0; k < cols; ++k) dst[k] = load_plain(format, group + (k * kGroup + row % kGroup) * size);
        return;
    }
    with_packed(format, [&]<class Q>(Q) {
        if constexpr (packed::kFloat8<Q>) {
            unpack_float8<Q>(group, cols, static_cast<int>(row % kGroup), dst);
        } else {
            unpack_units<Q>(group, cols, static_cast<int>(row % kGroup), dst);
        }
    });
}

}  // namespace nybble
