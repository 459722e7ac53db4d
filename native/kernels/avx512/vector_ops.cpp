#include "kernels/ops/register_vector_ops.h"
#include "kernels/simd/avx512.h"
#include "kernels/tables.h"

namespace nybble::avx512 {

void add_vector_ops(Kernels& table) { ops::register_vector_ops<Avx512>(table); }

}  // namespace nybble::avx512
