#include "base/cpu.h"

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nybble {
namespace {

struct Features {
    bool avx2 = false;
    bool avx512 = false;
};

#if defined(__x86_64__)
// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

constexpr bool has_bit(uint32_t word, int bit) { return (word >> bit & 1) != 0; }

Features probe() {
    Features found;
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    const bool fma = has_bit(ecx, 12), osxsave = has_bit(ecx, 27), avx = has_bit(ecx, 28), f16c = has_bit(ecx, 29);
    if (!osxsave || !avx) return found;
    const uint64_t states = saved_states();
    const bool ymm_saved = (states & 0x6) == 0x6, zmm_saved = (states & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    const bool avx2 = has_bit(ebx, 5), bmi2 = has_bit(ebx, 8);
    const bool f = has_bit(ebx, 16), dq = has_bit(ebx, 17), bw = has_bit(ebx, 30), vl = has_bit(ebx, 31);
    const bool vnni = has_bit(ecx, 11);
    found.avx2 = ymm_saved && avx2 && fma && f16c && bmi2;
    found.avx512 = found.avx2 && zmm_saved && f && dq && bw && vl && vnni;
    return found;
}
#else
Features probe() { return {}; }
#endif

const Features& features() {
    static const Features found = probe();
    return found;
}

}  // namespace

std::string_view name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        default: return "generic";
    }
}

std::optional<Isa> parse_isa(std::string_view text) {
    for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
        if (text == name(isa)) return isa;
    }
    return std::nullopt;
}

bool supported(Isa isa) {
    switch (isa) {
        case Isa::avx2: return features().avx2;
        case Isa::avx512: return features().avx512;
        default: return true;
    }
}

Isa detect_isa() {
    if (supported(Isa::avx512)) return Isa::avx512;
    return supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
}

}  // namespace nybble
