#include "base/cpu.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace nybble {
namespace {

struct Features {
    bool avx2 = false;
    bool avx512 = false;
    bool amx = false;
};

#if defined(__x86_64__)
// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

constexpr bool has_bit(uint32_t word, int bit) { return (word >> bit & 1) != 0; }

// Linux keeps room for the tiles (8 KiB a thread) only where a process asks for them.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

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
    const bool tiles = has_bit(edx, 24), tiles_int8 = has_bit(edx, 25), tiles_saved = (states & 0x60000) == 0x60000;
    found.amx = found.avx512 && tiles && tiles_int8 && tiles_saved && tiles_granted();
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
        case Isa::amx: return "amx";
        default: return "generic";
    }
}

std::optional<Isa> parse_isa(std::string_view text) {
    for (Isa isa : kAllIsas) {
        if (text == name(isa)) return isa;
    }
    return std::nullopt;
}

bool supported(Isa isa) {
    switch (isa) {
        case Isa::avx2: return features().avx2;
        case Isa::avx512: return features().avx512;
        case Isa::amx: return features().amx;
        default: return true;
    }
}

Isa detect_isa() {
    Isa best = Isa::generic;
    for (Isa isa : kAllIsas) {
        if (supported(isa)) best = isa;
    }
    return best;
}

}  // namespace nybble
