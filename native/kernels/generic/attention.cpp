#include "kernels/ops/attention.h"

#include "dispatch/kernels.h"
#include "kernels/simd/generic.h"
#include "kernels/tables.h"

namespace nybble::generic {

void add_attention(Kernels& table) { table.attention = ops::attention<Generic>; }

}  // namespace nybble::generic
