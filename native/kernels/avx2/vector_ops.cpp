#include "kernels/ops/register_vector_ops.h"
#include "kernels/simd/avx2.h"
#include "kernels/tables.h"

namespace nybble::avx2 {

void add_vector_ops(Kernels& table) { ops::register_vector_ops<Avx2>(table); }

}  // namespace nybble::avx2
