#include "dispatch/kernels.h"
#include "kernels/amx/tiles.h"
#include "kernels/simd/avx512.h"
#include "kernels/tables.h"

namespace nybble::amx {
namespace {

// For base/roofline.h, with tiles of 64 inputs. The iterations are meant for vectors, which finish them faster.
double int8_peak_loop(long iterations) {
    static constexpr TileConfig config(2 * kBlockInputs);
    alignas(64) static const int8_t codes[kTokenTile * kVectorBytes] = {1};
    constexpr double operations = 2.0 * kTokenTile * kGroupRows * 2 * kBlockInputs;
    iterations /= 10;
    _tile_loadconfig(&config);
    _tile_loadd(1, codes, kVectorBytes);
    _tile_loadd(2, codes, kVectorBytes);
    _tile_zero(0);
    for (long i = 0; i < iterations; ++i) {
        _tile_dpbssd(0, 1, 2);
        _tile_dpbssd(0, 1, 2);
        _tile_dpbssd(0, 1, 2);
        _tile_dpbssd(0, 1, 2);
    }
    _tile_release();
    return 4 * operations * (double)iterations;
}

}  // namespace

void add_peak(Kernels& table) { table.int8_peak_loop = int8_peak_loop; }

}  // namespace nybble::amx
