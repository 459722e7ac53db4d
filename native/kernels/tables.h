// The functions by which each ISA's translation units put their kernels into the table.
#pragma once

namespace nybble {

struct Kernels;

#define NYBBLE_KERNEL_TABLE(isa)             \
    namespace isa {                          \
    void add_gemm_q8_legacy(Kernels& table); \
    void add_gemm_q8_k(Kernels& table);      \
    void add_gemm_grouped(Kernels& table);   \
    void add_gemm_f32(Kernels& table);       \
    void add_vector_ops(Kernels& table);     \
    void add_attention(Kernels& table);      \
    }

NYBBLE_KERNEL_TABLE(generic)
NYBBLE_KERNEL_TABLE(avx2)
NYBBLE_KERNEL_TABLE(avx512)

#undef NYBBLE_KERNEL_TABLE

namespace amx {
void add_gemm_q8(Kernels& table);  // around those of avx512
void add_peak(Kernels& table);
}  // namespace amx

}  // namespace nybble
