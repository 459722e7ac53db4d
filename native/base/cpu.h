// Which instruction sets this machine (and its operating system) can run.
#pragma once

#include <optional>
#include <string_view>

namespace nybble {

enum class Isa { generic, avx2, avx512 };

std::string_view name(Isa isa);
std::optional<Isa> parse_isa(std::string_view name);

// True when this build has the kernels of `isa` and this machine can run them.
bool supported(Isa isa);

// The fastest supported one.
Isa detect_isa();

}  // namespace nybble
