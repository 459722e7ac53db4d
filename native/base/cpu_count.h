// How many CPUs this process may use.
#pragma once

namespace nybble {

// Logical CPUs in the scheduler's affinity mask, at least 1.
int usable_cpus();

// Good number of compute threads: physical cores in the affinity mask (hyper-threads share the vector units),
// no more than the CPU quota of the control groups (v1 and v2) that hold this process.
int default_threads();

}  // namespace nybble
