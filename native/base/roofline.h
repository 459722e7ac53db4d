// What this machine can do at best, measured: the yardstick of `nybble doctor` and of the benchmarks.
#pragma once

#include "base/cpu.h"

namespace nybble {

struct Roofline {
    double int8_gops = 0;      // 1e9 multiplies and adds of 8-bit integers per second, all threads together
    double read_gb_per_s = 0;  // 1e9 bytes read from memory per second, all threads together
};

// Takes about half a second. `isa` must be supported.
Roofline measure_roofline(Isa isa, int threads);

}  // namespace nybble
