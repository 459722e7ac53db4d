#include "kernels/ops/attention.h"

#include "dispatch/kernels.h"
#include "kernels/simd/avx2.h"
#include "kernels/tables.h"

namespace nybble::avx2 {

void add_attention(Kernels& table) { table.attention = ops::attention<Avx2>; }

}  // namespace nybble::avx2
