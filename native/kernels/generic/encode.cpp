#include "base/half.h"
#include "kernels/ops/register_encoders.h"

namespace nybble::generic {
namespace {

struct Encoding {
    static constexpr int lanes = 4;  // every 64-bit CPU has vectors of 16 bytes

    static void read_f16(const void* source, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
            uint16_t half;
            std::memcpy(&half, static_cast<const char*>(source) + 2 * i, 2);
            out[i] = half_to_float(half);
        }
    }
    static void encode_f16(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
        for (int64_t i = 0; i < cols; ++i) {
            const uint16_t half = float_to_half(x[i]);
            std::memcpy(out + 2 * i, &half, 2);
        }
    }
};

}  // namespace

Encoders encoders() { return ops::make_encoders<Encoding>(); }

}  // namespace nybble::generic
