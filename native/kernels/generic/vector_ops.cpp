#include "kernels/ops/register_vector_ops.h"
#include "kernels/simd/generic.h"
#include "kernels/tables.h"

namespace nybble::generic {

void add_vector_ops(Kernels& table) { ops::register_vector_ops<Generic>(table); }

}  // namespace nybble::generic
