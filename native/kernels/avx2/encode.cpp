#include "kernels/simd/avx2.h"
// The line above brings in the intrinsics.
#include "base/half.h"
#include "kernels/ops/register_encoders.h"

namespace nybble::avx2 {
namespace {

constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

struct Encoding {
    static constexpr int lanes = 8;

    static void read_f16(const void* source, float* out, int64_t n) {
        const char* from = static_cast<const char*>(source);
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
        }
        for (; i < n; ++i) {
            uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            out[i] = half_to_float(half);
        }
    }
    static void encode_f16(const float* x, const float*, int64_t cols, uint8_t* out, EncodeScratch&) {
        int64_t i = 0;
        for (; i + lanes <= cols; i += lanes) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(x + i), kRounding));
        }
        for (; i < cols; ++i) {
            const uint16_t half = float_to_half(x[i]);
            std::memcpy(out + 2 * i, &half, 2);
        }
    }
};

}  // namespace

Encoders encoders() { return ops::make_encoders<Encoding>(); }

}  // namespace nybble::avx2
