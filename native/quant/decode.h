// Decodes file blocks to floats, one weight after the other in file order.
#pragma once

#include <cstddef>

#include "quant/formats.h"

namespace nybble {

// n weights of file blocks at `src` (which need not be aligned) as floats; n must be a multiple of the block size.
// Rounds as the GGUF reference decoders do, after every operation: (d * scale) * code, then minus dmin * min.
void dequantize(Format format, const void* src, float* dst, std::size_t n);

}  // namespace nybble
