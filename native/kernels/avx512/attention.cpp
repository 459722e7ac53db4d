#include "kernels/ops/attention.h"

#include "dispatch/kernels.h"
#include "kernels/simd/avx512.h"
#include "kernels/tables.h"

namespace nybble::avx512 {

void add_attention(Kernels& table) { table.attention = ops::attention<Avx512>; }

}  // namespace nybble::avx512
