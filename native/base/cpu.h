// Which instruction sets this machine (and its operating system) can run.
#pragma once

#include <initializer_list>
#include <optional>
#include <string_view>

namespace nybble {

// amx: those of avx512, with int8 GEMMs on tiles.
enum class Isa { generic, avx2, avx512, amx };

inline constexpr std::initializer_list<Isa> kAllIsas = {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx};

std::string_view name(Isa isa);
std::optional<Isa> parse_isa(std::string_view name);

// True when this build has the kernels of `isa` and this machine can run them.
bool supported(Isa isa);

// The fastest supported one.
Isa detect_isa();

}  // namespace nybble
