// Checks the kernels that are not GEMMs, on every instruction set of this machine: against double-precision references,
// and for independence from how the work was cut. tests/native/test_cpp_checks.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"
#include "dispatch/kernels.h"

namespace nybble {
namespace {

int failures = 0;

void check(bool ok, const char* what, Isa isa) {
    if (ok) return;
    ++failures;
    std::printf("FAIL on %s: %s\n", std::string(name(isa)).c_str(), what);
}

std::vector<float> normals(size_t n, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> out(n);
    for (float& x : out) x = normal(rng);
    return out;
}

bool close(float a, double b, double tolerance) { return std::abs(a - b) <= tolerance * (1 + std::abs(b)); }

void check_half(const Kernels& table) {
    bool round_trip = true, same = true;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const uint16_t half = (uint16_t)bits;
        if ((half & 0x7c00) == 0x7c00) continue;  // inf and NaN
        round_trip &= float_to_half(half_to_float(half)) == half;
    }
    std::mt19937 rng(3);
    for (int i = 0; i < 200000; ++i) {  // store_kv shows the vector conversion
        float x = bits_to_float((uint32_t)rng());
        if (i % 2) x = std::ldexp(1.0f + (float)(rng() % 4096) / 4096, (int)(rng() % 42) - 26);
        if (std::isnan(x)) continue;
        float k[16], v[16];
        std::fill_n(k, 16, x);
        std::fill_n(v, 16, -x);
        uint16_t block[2 * 16 * 16];
        table.store_kv(k, v, 16, KvType::f16, (uint8_t*)block, 5);
        same &= block[16 * 3 + 5] == float_to_half(std::clamp(x, -65504.0f, 65504.0f));
        same &= block[256 + 5 * 16 + 3] == float_to_half(std::clamp(-x, -65504.0f, 65504.0f));
    }
    check(round_trip, "half round trip", table.isa);
    check(same, "store_kv equals scalar conversion", table.isa);
}

void check_elementwise(const Kernels& table) {
    const int n = 1003;
    const std::vector<float> a = normals(n, 1), b = normals(n, 2);
    std::vector<float> out(n);
    bool ok = true;
    std::vector<float> gate(n);
    for (int i = 0; i < n; ++i) gate[i] = a[i] * 20;
    table.silu_mul(gate.data(), b.data(), n, out.data());
    for (int i = 0; i < n; ++i) ok &= close(out[i], (double)b[i] * gate[i] / (1 + std::exp(-(double)gate[i])), 5e-7);
    check(ok, "silu_mul", table.isa);
    ok = true;
    table.gelu_tanh_mul(a.data(), b.data(), n, out.data());
    for (int i = 0; i < n; ++i) {
        const double x = a[i], y = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
        ok &= close(out[i], 0.5 * x * (1 + std::tanh(y)) * b[i], 5e-7);
    }
    check(ok, "gelu_tanh_mul", table.isa);
    const float inf = std::numeric_limits<float>::infinity();
    float edge[4] = {-200.0f, 200.0f, -inf, 0.0f}, one[4] = {1, 1, 1, 1};
    table.silu_mul(edge, one, 2, edge);
    check(edge[0] == 0.0f && edge[1] == 200.0f, "silu saturates", table.isa);
    ok = true;
    table.rms_norm(a.data(), b.data(), 1e-5f, n, out.data());
    double squares = 0;
    for (float x : a) squares += (double)x * x;
    for (int i = 0; i < n; ++i) ok &= close(out[i], a[i] / std::sqrt(squares / n + 1e-5) * b[i], 1e-6);
    check(ok, "rms_norm", table.isa);
    ok = true;
    std::vector<float> capped(gate);
    table.softcap(capped.data(), 30.0f, n);
    for (int i = 0; i < n; ++i) ok &= close(capped[i], 30 * std::tanh(gate[i] / 30.0), 1e-5);
    check(ok, "softcap", table.isa);
    ok = true;
    for (bool interleaved : {false, true}) {
        std::vector<float> x(a.begin(), a.begin() + 100), cosines(40), sines(40);
        for (int i = 0; i < 40; ++i) cosines[i] = std::cos(0.3f * i), sines[i] = std::sin(0.3f * i);
        table.rope(x.data(), cosines.data(), sines.data(), 80, interleaved);
        for (int i = 0; i < 40; ++i) {
            const int p = interleaved ? 2 * i : i, q = interleaved ? 2 * i + 1 : i + 40;
            ok &= close(x[p], (double)a[p] * cosines[i] - (double)a[q] * sines[i], 1e-6);
            ok &= close(x[q], (double)a[q] * cosines[i] + (double)a[p] * sines[i], 1e-6);
        }
        for (int i = 80; i < 100; ++i) ok &= x[i] == a[i];
    }
    check(ok, "rope", table.isa);
}

void check_quantize(const Kernels& table) {
    std::vector<float> x = normals(32 * 40, 4);
    std::fill_n(&x[32], 32, 0.0f);
    std::fill_n(&x[64], 32, 1e-40f);
    std::fill_n(&x[96], 32, 3e38f);
    std::vector<ActBlock> blocks(40 * 3), fine(40 * 3);
    std::vector<uint8_t> refined(40 * 3);
    const Acts acts{blocks.data(), fine.data(), refined.data()};
    table.quantize(x.data(), (int)x.size(), acts, 3);
    bool ok = true;
    for (int b = 0; b < 40; ++b) {
        const ActBlock& block = blocks[b * 3];
        int sums[2] = {0, 0};
        for (int i = 0; i < 32; ++i) {
            sums[i / 16] += block.q[i];
            ok &= std::abs(block.q[i] * (double)block.scale - x[b * 32 + i]) <= 0.501 * block.scale + 1e-38;
        }
        ok &= block.neg_sum16[0] == -sums[0] && block.neg_sum16[1] == -sums[1] && block.neg_sum == -sums[0] - sums[1];
        ok &= block.sum == sums[0] + sums[1] && block.sum16[0] == sums[0] && block.sum16[1] == sums[1];
    }
    check(ok, "quantize", table.isa);
    ok = true;
    std::fill_n(&x[96], 32, 0.0f);
    x[200] = 50;  // block 6
    table.quantize(x.data(), (int)x.size(), acts, 3);
    for (int b = 0; b < 40; ++b) {
        ok &= refined[b * 3] == (b == 6);
        for (int i = 0; b == 6 && i < 32; ++i) {
            const ActBlock &coarse = blocks[b * 3], &rest = fine[b * 3];
            const double value = coarse.q[i] * (double)coarse.scale + rest.q[i] * (double)rest.scale;
            ok &= std::abs(value - x[b * 32 + i]) <= 0.51 * rest.scale;
        }
    }
    check(ok, "quantize refines the block of an outlier", table.isa);
    x[5] = std::numeric_limits<float>::quiet_NaN();
    x[40] = std::numeric_limits<float>::infinity();
    table.quantize(x.data(), (int)x.size(), acts, 3);  // must only return
}

struct AttentionCase {
    int head_dim, heads, length, window;
    float softcap;
    KvType type;
};

// A sequence of `length` tokens: the cache is filled, then the last `queries` tokens attend in tiles of `tile`.
struct AttentionRun {
    AttentionCase c;
    int kv_heads = 2, kv_head = 1;
    std::vector<float> q, k, v;
    std::vector<uint8_t> cache;
    std::vector<int32_t> blocks;

    AttentionRun(const Kernels& table, AttentionCase c) : c(c) {
        q = normals((size_t)c.length * c.heads * c.head_dim, 5);
        for (float& x : q) x /= std::sqrt((float)c.head_dim) / 3;
        k = normals((size_t)c.length * c.head_dim, 6);
        v = normals((size_t)c.length * c.head_dim, 7);
        const int count = (c.length + 15) / 16;
        const size_t head_bytes = kv_head_bytes(c.head_dim, c.type);
        cache.assign(head_bytes * kv_heads * (count + 3), 0);
        for (int b = 0; b < count; ++b) blocks.push_back((b * 7 + 2) % count + 1);
        if (count % 7 == 0) {
            for (int b = 0; b < count; ++b) blocks[b] = b + 1;
        }
        for (int t = 0; t < c.length; ++t) {
            uint8_t* block = cache.data() + head_bytes * (blocks[t / 16] * kv_heads + kv_head);
            table.store_kv(&k[(size_t)t * c.head_dim], &v[(size_t)t * c.head_dim], c.head_dim, c.type, block, t % 16);
        }
    }

    std::vector<float> attend(const Kernels& table, int first, int tile) const {
        const int width = c.heads * c.head_dim;
        std::vector<float> out((size_t)c.length * width);
        std::vector<float> scratch(attention_scratch_floats(tile * c.heads, c.head_dim));
        for (int t = first; t < c.length; t += tile) {
            AttentionArgs args{};
            args.q = &q[(size_t)t * width];
            args.q_stride = width;
            args.out = &out[(size_t)t * width];
            args.out_stride = width;
            const size_t head_bytes = kv_head_bytes(c.head_dim, c.type);
            args.kv = cache.data() + head_bytes * kv_head;
            args.kv_block_stride = (ptrdiff_t)(head_bytes * kv_heads);
            args.block_table = blocks.data();
            args.tokens = std::min(tile, c.length - t);
            args.heads = c.heads;
            args.head_dim = c.head_dim;
            args.first_position = t;
            args.window = c.window;
            args.softcap = c.softcap;
            args.kv_type = c.type;
            args.scratch = scratch.data();
            std::fill(scratch.begin(), scratch.end(), std::numeric_limits<float>::quiet_NaN());
            table.attention(args);
        }
        return out;
    }

    // The query as it is multiplied: with int8 keys as codes of 14 bits.
    std::vector<double> query(int t, int head) const {
        const float* row = &q[((size_t)t * c.heads + head) * c.head_dim];
        std::vector<double> found(row, row + c.head_dim);
        if (c.type != KvType::int8) return found;
        float most = 0;
        for (int i = 0; i < c.head_dim; ++i) most = std::max(most, std::abs(row[i]));
        for (int i = 0; i < c.head_dim; ++i) found[i] = (double)std::lrint(row[i] * (16383 / most)) * most / 16383;
        return found;
    }

    double reference(int t, int head, int d) const {
        const std::vector<double> row = query(t, head);
        auto stored = [&](const std::vector<float>& all, int s, int i) {
            const float* head = &all[(size_t)s * c.head_dim];
            if (c.type != KvType::int8) return c.type == KvType::f32 ? head[i] : half_to_float(float_to_half(head[i]));
            float largest = 0;
            for (int j = 0; j < c.head_dim; ++j) largest = std::max(largest, std::abs(head[j]));
            uint16_t half = float_to_half(largest / 127);
            if (half_to_float(half) * 127 < largest) ++half;
            const float scale = half_to_float(half);
            return scale * (float)std::lrint(head[i] * (1 / scale));
        };
        std::vector<double> scores;
        double max = -1e300, total = 0, sum = 0;
        const int begin = c.window ? std::max(0, t + 1 - c.window) : 0;
        for (int s = begin; s <= t; ++s) {
            double score = 0;
            for (int i = 0; i < c.head_dim; ++i) score += row[i] * stored(k, s, i);
            if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
            scores.push_back(score);
            max = std::max(max, score);
        }
        for (int s = begin; s <= t; ++s) {
            const double weight = std::exp(scores[s - begin] - max);
            total += weight;
            sum += weight * stored(v, s, d);
        }
        return sum / total;
    }
};

void check_attention(const Kernels& table, AttentionCase c) {
    const AttentionRun run(table, c);
    const std::vector<float> whole = run.attend(table, 0, 16);
    double worst = 0;
    std::mt19937 rng(8);
    for (int i = 0; i < 300; ++i) {
        const int t = i < 40 ? std::min(i, c.length - 1) : (int)(rng() % c.length);
        const int head = (int)(rng() % c.heads), d = (int)(rng() % c.head_dim);
        const double difference = whole[((size_t)t * c.heads + head) * c.head_dim + d] - run.reference(t, head, d);
        worst = std::max(worst, std::isnan(difference) ? 1e9 : std::abs(difference));
    }
    // With int8 the weights of several hundred tokens are rounded to 15 bits of the largest one, which the reference
    // does not do: a thirtieth of what rounding the values themselves to 8 bits costs.
    const double allowed = c.type == KvType::int8 ? 3e-4 : 3e-6;
    if (worst > allowed) std::printf("attention error %.2e\n", worst);
    check(worst <= allowed, "attention against the reference", table.isa);
    bool same = true;
    for (int tile : {1, 3, 7}) {
        for (int first : {0, 5, c.length - 1}) {
            const std::vector<float> cut = run.attend(table, first, tile);
            const size_t skip = (size_t)first * c.heads * c.head_dim;
            same &= !std::memcmp(&cut[skip], &whole[skip], (cut.size() - skip) * sizeof(float));
        }
    }
    check(same, "attention does not depend on the tile", table.isa);
}

// What lies in cells that were not written changes nothing, and what is not a number shows, from its token on.
void check_attention_poison(const Kernels& table, KvType type) {
    const AttentionCase c = {64, 3, 300, 0, 0, type};
    const AttentionRun clean(table, c);
    const std::vector<float> want = clean.attend(table, 0, 16);
    const size_t head_bytes = kv_head_bytes(c.head_dim, type), width = (size_t)c.heads * c.head_dim;
    const auto block_of = [&](AttentionRun& run, int t) {
        return run.cache.data() + head_bytes * (run.blocks[t / 16] * run.kv_heads + run.kv_head);
    };
    AttentionRun stale = clean;
    std::vector<float> wild(c.head_dim, std::numeric_limits<float>::quiet_NaN());
    for (int t = c.length; t % 16; ++t) {
        table.store_kv(wild.data(), wild.data(), c.head_dim, type, block_of(stale, c.length - 1), t % 16);
    }
    const std::vector<float> beside = stale.attend(table, 0, 16);
    check(!std::memcmp(beside.data(), want.data(), want.size() * sizeof(float)), "cells never written", table.isa);
    for (bool key : {true, false}) {
        AttentionRun poisoned = clean;
        const int bad = 270;
        const float* k = key ? wild.data() : &clean.k[(size_t)bad * c.head_dim];
        const float* v = key ? &clean.v[(size_t)bad * c.head_dim] : wild.data();
        table.store_kv(k, v, c.head_dim, type, block_of(poisoned, bad), bad % 16);
        const std::vector<float> found = poisoned.attend(table, 0, 1);
        check(!std::memcmp(found.data(), want.data(), bad * width * sizeof(float)), "before a NaN", table.isa);
        bool shows = true;
        for (size_t i = bad * width; i < found.size(); ++i) shows &= std::isnan(found[i]);
        check(shows, "a NaN shows", table.isa);
    }
}

}  // namespace
}  // namespace nybble

int main() {
    using namespace nybble;
    for (Isa isa : kAllIsas) {
        if (!supported(isa)) continue;
        const Kernels& table = kernels(isa);
        check_half(table);
        check_elementwise(table);
        check_quantize(table);
        const AttentionCase cases[] = {{64, 4, 600, 0, 0, KvType::f16},     {128, 7, 330, 0, 0, KvType::f16},
                                       {80, 1, 530, 0, 50, KvType::f16},    {64, 3, 700, 100, 0, KvType::f32},
                                       {96, 8, 300, 300, 30, KvType::f32},  {16, 2, 33, 8, 0, KvType::f16},
                                       {256, 2, 270, 0, 0, KvType::f16},    {64, 7, 600, 0, 0, KvType::int8},
                                       {128, 2, 300, 90, 20, KvType::int8}, {16, 1, 40, 0, 0, KvType::int8}};
        for (const AttentionCase& c : cases) check_attention(table, c);
        for (KvType type : {KvType::f32, KvType::int8}) check_attention_poison(table, type);
    }
    std::printf(failures ? "%d failures\n" : "all checks passed\n", failures);
    return failures != 0;
}
