#include "base/digest.h"

#include <bit>
#include <cstddef>
#include <cstring>

namespace nybble {
namespace {

constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 / golden ratio
constexpr std::size_t kLanes = 8;
constexpr std::size_t kStripe = kLanes * sizeof(std::uint64_t);
using Lanes = std::array<std::uint64_t, kLanes>;

void mix(Lanes& lanes, const std::uint8_t* stripe) {
    for (std::size_t i = 0; i < kLanes; ++i) {
        std::uint64_t word = 0;
        std::memcpy(&word, stripe + i * sizeof word, sizeof word);
        lanes[i] = std::rotl(lanes[i] ^ word, 29) * kOdd;
    }
}

std::uint64_t fold(const Lanes& lanes, std::uint64_t start) {
    std::uint64_t folded = start;
    for (const std::uint64_t lane : lanes) {
        folded = (folded ^ lane) * kOdd;
        folded ^= folded >> 32;
    }
    return folded;
}

}  // namespace

Digest digest(std::span<const std::uint8_t> data) {
    Lanes lanes{};
    for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = kOdd * (i + 1);
    const std::size_t whole = data.size() / kStripe * kStripe;
    for (std::size_t at = 0; at < whole; at += kStripe) mix(lanes, data.data() + at);
    std::array<std::uint8_t, kStripe> rest{};
    if (data.size() > whole) std::memcpy(rest.data(), data.data() + whole, data.size() - whole);
    mix(lanes, rest.data());
    return {fold(lanes, data.size()), fold(lanes, ~static_cast<std::uint64_t>(data.size()))};
}

}  // namespace nybble
