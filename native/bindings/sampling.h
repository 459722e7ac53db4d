// Sampling and scoring of logits, as methods of the model.
#pragma once

#include <nanobind/nanobind.h>

#include "model/model.h"

namespace nybble {

void bind_sampling(nanobind::module_& m, nanobind::class_<Model>& model);

}  // namespace nybble
