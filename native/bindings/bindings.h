// The parts of the module nybble._native.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>

#include "base/cpu.h"
#include "quant/formats.h"

namespace nybble {

void bind_model(nanobind::module_& m);
void bind_machine(nanobind::module_& m);
void bind_quant(nanobind::module_& m);
void bind_encode(nanobind::module_& m);

// Both raise ValueError.
Isa isa_argument(const std::optional<std::string>& name);  // none: the best of this machine
Format format_argument(const std::string& name);

}  // namespace nybble
