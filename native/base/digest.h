// A fingerprint of 128 bits at the speed of memory. It tells contents apart that differ by accident, not by intent.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace nybble {

using Digest = std::array<std::uint64_t, 2>;

// Eight independent lanes of xor, rotate and multiply: every step can be undone, so bytes that differ in one place
// always give lanes that differ. The length counts.
Digest digest(std::span<const std::uint8_t> data);

}  // namespace nybble
