#include "quant/encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "base/thread_pool.h"
#include "quant/decode.h"

namespace nybble {

namespace generic {
Encoders encoders();
}
namespace avx2 {
Encoders encoders();
}
namespace avx512 {
Encoders encoders();
}

namespace {

constexpr int64_t kWeightsPerPiece = 1 << 15;  // of the work that threads take turns to fetch

const Encoders& encoders_of(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512 || isa == Isa::amx) {
        static const Encoders table = avx512::encoders();
        return table;
    }
    if (isa == Isa::avx2) {
        static const Encoders table = avx2::encoders();
        return table;
    }
#endif
    static const Encoders table = generic::encoders();
    return table;
}

// A row as floats: the source itself, or a copy in `buffer`.
const float* read_row(const Encoders& encoders, Format from, const uint8_t* source, int64_t cols, float* buffer) {
    if (from == Format::F16) {
        encoders.read_f16(source, buffer, cols);
    } else if (from == Format::F32 && reinterpret_cast<std::uintptr_t>(source) % alignof(float) == 0) {
        return reinterpret_cast<const float*>(source);
    } else if (from == Format::F32) {
        std::memcpy(buffer, source, static_cast<std::size_t>(cols) * sizeof(float));
    } else {
        dequantize(from, source, buffer, static_cast<std::size_t>(cols));
    }
    return buffer;
}

}  // namespace

EncodeScratch::EncodeScratch(std::size_t cols)
    : row(cols),
      scales(cols / 16 + 1),
      minima(cols / 16 + 1),
      code_scales(cols / 16 + 1),
      code_minima(cols / 16 + 1),
      weights(cols / 16 + 1),
      sigma2(cols / 16 + 1),
      codes(cols + 1) {}

bool can_encode(Format format) { return encoders_of(Isa::generic).rows[static_cast<int>(format)] != nullptr; }

int64_t encode(const EncodeTask& task, ThreadPool& pool, Isa isa) {
    const Encoders& encoders = encoders_of(isa);
    const EncodeRow encode_row = encoders.rows[static_cast<int>(task.to)];
    const auto cols = static_cast<std::size_t>(task.cols);
    const std::size_t in_bytes = row_bytes(task.from, cols), out_bytes = row_bytes(task.to, cols);
    std::vector<EncodeScratch> scratches(static_cast<std::size_t>(pool.size()), EncodeScratch(cols));
    // From 65520 on a half is infinite, and all scales but those of MXFP4 are halves.
    const bool wide = task.to == Format::F32 || task.to == Format::BF16 || task.to == Format::MXFP4;
    const float limit = wide ? std::numeric_limits<float>::infinity() : 65520.0f;
    std::atomic<int64_t> bad_row{-1};
    const auto note_bad = [&](int64_t row) {
        int64_t known = bad_row.load();
        while ((known < 0 || row < known) && !bad_row.compare_exchange_weak(known, row)) {
        }
    };
    pool.run([&](Worker& worker) {
        EncodeScratch& scratch = scratches[static_cast<std::size_t>(worker.index())];
        const int64_t grain = std::max<int64_t>(1, kWeightsPerPiece / std::max<int64_t>(1, task.cols));
        worker.parallel_for(task.rows, grain, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                const auto at = static_cast<std::size_t>(r);
                const auto* source = static_cast<const uint8_t*>(task.source) + at * in_bytes;
                const float* row = read_row(encoders, task.from, source, task.cols, scratch.row.data());
                if (!encoders.all_below(limit, row, task.cols)) {
                    note_bad(r);
                    continue;
                }
                encode_row(row, task.importance, task.cols, task.out + at * out_bytes, scratch);
            }
        });
    });
    return bad_row.load();
}

}  // namespace nybble
