// The packed layouts against the file blocks, on random bytes (so with NaN, infinity and subnormal scales as well):
// unpack_row() gives the bits of dequantize(), and so do the codes and scales that the kernels read, for every
// instruction set that this test is compiled for. tests/native/test_cpp_checks.py builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernels/simd/generic.h"
#include "quant/pack.h"
#include "quant/packed.h"
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include "kernels/simd/avx512.h"  // first, as it keeps GCC quiet about its own intrinsics
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "kernels/simd/avx2.h"
#endif

namespace nybble {
namespace {

constexpr std::size_t kCols = 768, kGuard = 64;

int failures = 0;

void check(bool ok, Format format, const char* what) {
    if (ok) return;
    ++failures;
    std::printf("FAIL %s: %s\n", info(format).name.data(), what);
}

bool same_bits(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (std::isnan(a) && std::isnan(b)); }

std::vector<uint8_t> random_bytes(std::size_t n, unsigned seed) {
    std::mt19937 rng(seed);
    std::vector<uint8_t> bytes(n);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng());
    return bytes;
}

// Row by row of the whole matrix as the file has it.
std::vector<float> decoded(Format format, const std::vector<uint8_t>& file, std::size_t rows) {
    std::vector<float> floats(rows * kCols);
    dequantize(format, file.data(), floats.data(), floats.size());
    return floats;
}

// What the kernels compute from their codes and scales: products, then sums, each rounded.
template <class S, class Q>
bool kernels_see(const uint8_t* packed, std::size_t group_bytes, std::size_t rows, const std::vector<float>& expected) {
    const int offset = Q::shift < 0 ? 0 : 1 << (Q::shift < 0 ? 0 : Q::shift);
    bool same = true;
    for (std::size_t row0 = 0; row0 < rows; row0 += S::lanes) {
        const uint8_t* unit = packed + row0 / 16 * group_bytes;
        for (std::size_t k = 0; k < kCols; k += 32) {
            const int kb = static_cast<int>(k % Q::unit_k / 32);
            typename S::B codes[packed::kNumCodes<Q>];
            typename S::F scales[2], minima[2];
            Q::template codes<S>(unit + k / Q::unit_k * Q::unit_bytes, kb, static_cast<int>(row0 % 16), codes);
            Q::template scales<S>(unit + k / Q::unit_k * Q::unit_bytes, kb, static_cast<int>(row0 % 16), scales,
                                  minima);
            uint8_t bytes[packed::kNumCodes<Q>][4 * S::lanes];
            float ws[2][S::lanes] = {}, wm[2][S::lanes] = {};
            std::memcpy(bytes, codes, sizeof bytes);
            for (int sub = 0; sub < Q::subs; ++sub) {
                S::store(ws[sub], scales[sub]);
                if (Q::has_min) S::store(wm[sub], minima[sub]);
            }
            for (std::size_t r = 0; r < S::lanes && row0 + r < rows; ++r) {
                for (int i = 0; i < 32; ++i) {
                    const int code = bytes[i / 4][4 * r + i % 4], sub = i * Q::subs / 32;
                    int value = code - offset;
                    if constexpr (packed::kTwoPlanes<Q>) {
                        value = 256 * value + bytes[8 + i / 4][4 * r + i % 4] - offset;
                    }
                    float x = ws[sub][r] * static_cast<float>(value);
                    if (Q::has_min) x = x + wm[sub][r];
                    same &= code <= Q::max_code && same_bits(x, expected[(row0 + r) * kCols + k + i]);
                }
            }
        }
    }
    return same;
}

void check_format(Format format, std::size_t rows, unsigned seed) {
    const std::vector<uint8_t> file = random_bytes(rows * row_bytes(format, kCols), seed);
    const std::vector<float> expected = decoded(format, file, rows);
    const std::size_t bytes = packed_bytes(format, rows, kCols), groups = (rows + 15) / 16;
    check(bytes == groups * 16 * row_bytes(format, kCols), format, "the packed size is not the file's");

    // Group by group and backwards: each call must write its own groups and nothing else.
    std::vector<uint8_t> packed(bytes + kGuard, 0xa5);
    for (std::size_t g = groups; g-- > 0;) pack_rows(format, file.data(), rows, kCols, g, g + 1, packed.data());
    for (std::size_t i = 0; i < kGuard; ++i) check(packed[bytes + i] == 0xa5, format, "wrote past the end");
    std::vector<uint8_t> at_once(bytes, 0x5a);
    pack_rows(format, file.data(), rows, kCols, 0, groups, at_once.data());
    check(!std::memcmp(at_once.data(), packed.data(), bytes), format, "packing depends on how the work is cut");

    std::vector<float> row(kCols);
    bool same = true;
    for (std::size_t r = 0; r < rows; ++r) {
        unpack_row(format, packed.data(), kCols, r, row.data());
        for (std::size_t k = 0; k < kCols; ++k) same &= same_bits(row[k], expected[r * kCols + k]);
    }
    check(same, format, "unpack_row is not dequantize");
    if (info(format).block_size == 1) return;

    with_packed(format, [&]<class Q>(Q) {
        if constexpr (!packed::kFloat8<Q>) {  // whose codes the kernels read as they lie
            const std::size_t group = packed_group_bytes(format, kCols);
            check(kernels_see<Generic, Q>(packed.data(), group, rows, expected), format, "generic codes and scales");
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
            check(kernels_see<Avx2, Q>(packed.data(), group, rows, expected), format, "avx2 codes and scales");
#endif
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
            check(kernels_see<Avx512, Q>(packed.data(), group, rows, expected), format, "avx512 codes and scales");
#endif
        }
    });
}

// Rows that do not exist must not add NaN to what a kernel computes beside the rows that do.
void check_padding(Format format) {
    const std::vector<uint8_t> file = random_bytes(row_bytes(format, kCols), 5);
    std::vector<uint8_t> packed(packed_bytes(format, 1, kCols), 0xff);
    pack_rows(format, file.data(), 1, kCols, 0, 1, packed.data());
    std::vector<float> row(kCols);
    for (std::size_t r = 1; r < 16; ++r) {
        unpack_row(format, packed.data(), kCols, r, row.data());
        for (float x : row) check(x == 0.0f, format, "a padding row is not zero");
    }
}

// The agreement that bit twiddling must not drift from: vector v of a nibble plane is the file's word, byte for byte.
void check_layout() {
    const std::vector<uint8_t> file = random_bytes(16 * sizeof(raw::Q4_1), 3);
    std::vector<uint8_t> packed(16 * sizeof(raw::Q4_1));
    pack_rows(Format::Q4_1, file.data(), 16, 32, 0, 1, packed.data());
    for (int row = 0; row < 16; ++row) {
        for (int i = 0; i < 4; ++i) {
            const uint8_t* word = file.data() + row * sizeof(raw::Q4_1) + 4 + 4 * i;
            check(!std::memcmp(packed.data() + 64 + 64 * i + 4 * row, word, 4), Format::Q4_1, "the nibble plane");
        }
    }
}

}  // namespace
}  // namespace nybble

int main() {
    using namespace nybble;
    for (int i = 0; i < static_cast<int>(Format::count_); ++i) {
        const auto format = static_cast<Format>(i);
        unsigned seed = 0;
        for (std::size_t rows : {1, 16, 21, 64}) check_format(format, rows, ++seed);
        check_padding(format);
    }
    check_layout();
    std::printf(failures ? "%d checks failed\n" : "packed layouts: all formats agree\n", failures);
    return failures != 0;
}
