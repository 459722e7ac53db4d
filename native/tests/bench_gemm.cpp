// Speed and self-consistency of the packed GEMMs on one thread, on random weights. By hand, from native/:
//   c="g++ -O3 -std=c++20 -ffp-contract=off -I. -c"; mkdir -p /tmp/o
//   for f in kernels/generic/*.cpp; do $c $f -o /tmp/o/generic-$(basename $f).o; done
//   for f in kernels/avx2/*.cpp; do $c -mavx2 -mfma -mf16c -mbmi2 $f -o /tmp/o/avx2-$(basename $f).o; done
//   for f in kernels/avx512/*.cpp; do $c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c -mbmi2
//       -mprefer-vector-width=512 $f -o /tmp/o/avx512-$(basename $f).o; done
//   g++ -O3 -std=c++20 -ffp-contract=off -I. tests/bench_gemm.cpp dispatch/kernels.cpp base/cpu.cpp base/roofline.cpp
//       /tmp/o/*.o -o /tmp/bench_gemm -pthread && /tmp/bench_gemm [generic|avx2|avx512]
// It checks that a row computed alone equals (==) the same row in a batch, and that every ISA agrees with generic.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "base/roofline.h"
#include "dispatch/kernels.h"
#include "quant/packed.h"

namespace nybble {
namespace {

constexpr int kInputs = 1536, kOutputs = 1536, kMaxTokens = 512;
constexpr int kBlocks = kInputs / kBlockInputs;
constexpr int kFloats = -1;
constexpr int kSuperTile = 208;  // tokens whose activations stay in the second-level cache

struct Case {
    const char* name;
    Format format;
    int unit_k, unit_bytes;
    int halves;  // the unit starts with so many f16 vectors of 16 scales; 0: with exponents, kFloats: with one of f32
};

template <Format format>
Case make_case(const char* name, int halves) {
    using Q = typename PackedOf<format>::type;
    return {name, format, Q::unit_k, Q::unit_bytes, halves};
}

int failures = 0;

void check(bool ok, const char* what, const Case& c, Isa isa) {
    if (ok) return;
    ++failures;
    std::printf("FAIL %s: %s on %s\n", what, c.name, std::string(name(isa)).c_str());
}

std::vector<uint8_t> random_weights(const Case& c, std::mt19937& rng) {
    const size_t units = (size_t)kOutputs / kGroupRows * (kInputs / c.unit_k);
    std::vector<uint8_t> data(units * c.unit_bytes + 64);
    for (uint8_t& byte : data) byte = (uint8_t)rng();
    std::uniform_real_distribution<float> scale(0.001f, 0.01f);
    for (size_t unit = 0; unit < units; ++unit) {
        for (int i = 0; i < c.halves * kGroupRows; ++i) {
            uint16_t half = float_to_half(scale(rng));
            std::memcpy(&data[unit * c.unit_bytes + 2 * i], &half, 2);
        }
        for (int row = 0; c.halves == kFloats && row < kGroupRows; ++row) {
            const float value = scale(rng) / 100;  // for codes of 16 bits
            std::memcpy(&data[unit * c.unit_bytes + 4 * row], &value, 4);
        }
        if (c.halves == 0) std::memset(&data[unit * c.unit_bytes], 120, kGroupRows);  // exponents
    }
    return data;
}

struct ActVectors {
    std::vector<ActBlock> blocks, fine;
    std::vector<uint8_t> refined;

    explicit ActVectors(size_t count) : blocks(count), fine(count), refined(count) {}
    Acts view() { return {blocks.data(), fine.data(), refined.data()}; }
};

// Quantises x[tokens][kInputs] to the tile layout.
void quantize_tiles(const Kernels& table, const float* x, int tokens, ActVectors& acts) {
    for (int t = 0; t < tokens; ++t) {
        const int tile = t / kTokenTile * kTokenTile;
        const int stride = std::min(kTokenTile, tokens - tile);
        table.quantize(x + (size_t)t * kInputs, kInputs, acts.view().at((ptrdiff_t)tile * kBlocks + (t - tile)),
                       stride);
    }
}

void multiply(const Kernels& table, const Case& c, const uint8_t* w, Acts acts, int tokens, float* out) {
    const size_t group_bytes = (size_t)(kInputs / c.unit_k) * c.unit_bytes;
    for (int first = 0; first < tokens; first += kSuperTile) {
        const int count = std::min(kSuperTile, tokens - first);
        for (int group = 0; group < kOutputs / kGroupRows; ++group) {
            table.q8(c.format)(w + group * group_bytes, acts.at((ptrdiff_t)first * kBlocks), count, kBlocks,
                               out + (size_t)first * kOutputs + group * kGroupRows, kOutputs);
        }
    }
}

// multiply() as the model does it: each group's results lie together, and something else reads them.
void multiply_for_speed(const Kernels& table, const Case& c, const uint8_t* w, Acts acts, int tokens, float* out) {
    const size_t group_bytes = (size_t)(kInputs / c.unit_k) * c.unit_bytes;
    for (int first = 0; first < tokens; first += kSuperTile) {
        const int count = std::min(kSuperTile, tokens - first);
        for (int group = 0; group < kOutputs / kGroupRows; ++group) {
            table.q8(c.format)(w + group * group_bytes, acts.at((ptrdiff_t)first * kBlocks), count, kBlocks, out,
                               kGroupRows);
        }
    }
}

// The best, because the peak it is compared with is a best as well, and other work comes and goes on a machine.
double best_seconds(int repeats, auto work) {
    double best = 1e9;
    for (int i = 0; i < repeats; ++i) {
        const auto start = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b, size_t n) {
    float worst = 0, size = 0;
    for (size_t i = 0; i < n; ++i) {
        worst = std::max(worst, std::abs(a[i] - b[i]));
        size = std::max(size, std::abs(a[i]));
    }
    return worst / size;
}

void run(Isa isa, const Case& c, bool speed, double peak) {
    const Kernels& table = kernels(isa);
    const Kernels& plain = kernels(Isa::generic);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    const std::vector<uint8_t> w = random_weights(c, rng);
    std::vector<float> x((size_t)kMaxTokens * kInputs), out((size_t)kMaxTokens * kOutputs), other(out.size());
    for (float& value : x) value = normal(rng);
    // As in real decoders: one block of eight has a channel that dwarfs the others, so it is refined.
    for (size_t i = 5; i < x.size(); i += 256) x[i] *= 30;
    ActVectors acts((size_t)kMaxTokens * kBlocks), one(kBlocks);

    for (int tokens : {17, 19, 21, 22, 31}) {
        quantize_tiles(table, x.data(), tokens, acts);
        multiply(table, c, w.data(), acts.view(), tokens, out.data());
        for (int t = 0; t < tokens; ++t) {
            quantize_tiles(table, &x[(size_t)t * kInputs], 1, one);
            multiply(table, c, w.data(), one.view(), 1, other.data());
            check(!std::memcmp(other.data(), &out[(size_t)t * kOutputs], kOutputs * 4), "alone == in a batch", c, isa);
        }
    }
    quantize_tiles(plain, x.data(), 31, acts);
    multiply(plain, c, w.data(), acts.view(), 31, other.data());
    const float int_error = largest_difference(other, out, 31 * kOutputs);
    check(int_error < 1e-5f, "int8 close to generic", c, isa);
    const size_t group_bytes = (size_t)(kInputs / c.unit_k) * c.unit_bytes;
    for (int group = 0; group < kOutputs / kGroupRows; ++group) {
        table.f32(c.format)(w.data() + group * group_bytes, x.data(), kInputs, 31, kInputs,
                            out.data() + group * kGroupRows, kOutputs);
    }
    const float quantization_error = largest_difference(out, other, 31 * kOutputs);
    check(quantization_error < 0.03f, "float close to int8", c, isa);
    std::printf("%-8s %-7s against generic %.1e, float against int8 %.1e", std::string(name(isa)).c_str(), c.name,
                int_error, quantization_error);
    for (int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64, 512}) {
        if (!speed) break;
        quantize_tiles(table, x.data(), tokens, acts);
        const double seconds = best_seconds(
            tokens > 100 ? 21 : 81, [&] { multiply_for_speed(table, c, w.data(), acts.view(), tokens, out.data()); });
        const double gops = 2e-9 * tokens * kInputs * kOutputs / seconds;
        if (tokens == 1) std::printf(" | %.1f GB/s", 1e-9 * w.size() / seconds);
        std::printf(" | M=%d %.0f Gop/s (%.0f%%)", tokens, gops, 100 * gops / peak);
    }
    std::printf("\n");
}

// One token against weights far larger than a cache, as in decoding: bytes per second.
void run_stream(Isa isa, const Case& c) {
    const Kernels& table = kernels(isa);
    std::mt19937 rng(1);
    const std::vector<uint8_t> part = random_weights(c, rng);
    const int copies = (int)((size_t{256} << 20) / part.size());
    std::vector<uint8_t> w;
    for (int i = 0; i < copies; ++i) w.insert(w.end(), part.begin(), part.end() - 64);
    ActVectors acts((size_t)16 * kBlocks);
    std::vector<float> x((size_t)16 * kInputs, 0.5f), out((size_t)16 * kOutputs);
    const size_t group_bytes = (size_t)(kInputs / c.unit_k) * c.unit_bytes;
    std::printf("%-8s %-7s streamed from memory", std::string(name(isa)).c_str(), c.name);
    for (int tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16}) {
        quantize_tiles(table, x.data(), tokens, acts);
        const double seconds = best_seconds(7, [&] {
            for (size_t at = 0; at + group_bytes <= w.size(); at += group_bytes) {
                table.q8(c.format)(w.data() + at, acts.view(), tokens, kBlocks, out.data(), kOutputs);
            }
        });
        std::printf(" | M=%d %.1f GB/s", tokens, 1e-9 * w.size() / seconds);
    }
    std::printf("\n");
}

}  // namespace
}  // namespace nybble

int main(int argc, char** argv) {
    using namespace nybble;
    const Case cases[] = {
        make_case<Format::Q4_0>("Q4_0", 1),           make_case<Format::Q4_1>("Q4_1", 2),
        make_case<Format::Q5_0>("Q5_0", 1),           make_case<Format::Q5_1>("Q5_1", 2),
        make_case<Format::Q8_0>("Q8_0", 1),           make_case<Format::IQ4_NL>("IQ4_NL", 1),
        make_case<Format::MXFP4>("MXFP4", 0),         make_case<Format::Q2_K>("Q2_K", 2),
        make_case<Format::Q3_K>("Q3_K", 1),           make_case<Format::Q4_K>("Q4_K", 2),
        make_case<Format::Q5_K>("Q5_K", 2),           make_case<Format::Q6_K>("Q6_K", 1),
        make_case<Format::IQ4_XS>("IQ4_XS", 1),       make_case<Format::U4_128>("U4_128", 1),
        make_case<Format::NF4_64>("NF4_64", kFloats), make_case<Format::U8_128>("U8_128", kFloats),
    };
    for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::generic}) {
        if (!supported(isa) || (argc > 1 && parse_isa(argv[1]) != isa)) continue;
        const Roofline best = measure_roofline(isa, 1), two = measure_roofline(isa, 2);
        std::printf("%s: peak %.0f Gop/s, read %.1f GB/s; two threads %.0f Gop/s, %.1f GB/s\n",
                    std::string(name(isa)).c_str(), best.int8_gops, best.read_gb_per_s, two.int8_gops,
                    two.read_gb_per_s);
        for (const Case& c : cases) run(isa, c, isa != Isa::generic, best.int8_gops);
        for (const Case& c : cases) {
            if (isa != Isa::generic) run_stream(isa, c);
        }
    }
    std::printf(failures ? "%d failures\n" : "all checks passed\n", failures);
    return failures != 0;
}
