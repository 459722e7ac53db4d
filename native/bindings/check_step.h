// What has to hold before a step may run: the native core itself trusts its arguments.
#pragma once

#include <cstdint>
#include <span>

#include "model/kv_cache.h"
#include "model/model.h"
#include "model/step.h"

namespace nybble {

// Raises ValueError unless every id, length and block of the step is in range, and no block that the step writes is
// seen by a second sequence.
void check_step(const Model& model, const KvCache& cache, const Step& step);

// Raises ValueError unless every value is in [0, limit).
void check_ids(std::span<const std::int32_t> values, int limit, const char* what);

}  // namespace nybble
