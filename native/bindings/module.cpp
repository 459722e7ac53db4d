#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_native, m) {
    m.doc() = "The native core of nybble: packed weights, kernels, and the decoder that runs on them.";
    nybble::bind_machine(m);
    nybble::bind_quant(m);
    nybble::bind_encode(m);
    nybble::bind_model(m);
}
