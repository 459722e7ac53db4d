#include "model/gemm.h"

namespace nybble {
namespace {

constexpr std::size_t kTileBytes = 320 * 1024;
constexpr std::size_t kTaskBytes = 32 * 1024;
constexpr int kTasksPerWorker = 4;

}  // namespace

void multiply_group(const Machine& machine, const Matrix& matrix, int group, const Operand& in, int token0, int tokens,
                    float* out, int ldo) {
    const std::uint8_t* weights = matrix.group(group);
    if (machine.act_f32 || is_float_format(matrix.format())) {
        machine.kernels->f32(matrix.format())(weights, in.row(token0), in.k, tokens, in.k, out, ldo);
    } else {
        // token0 is a multiple of the tile, so its first block starts a tile.
        machine.kernels->q8(matrix.format())(weights, in.first_block(token0), tokens, in.k_blocks(), out, ldo);
    }
}

int task_tokens(const Machine& machine, const Operand& in) {
    const bool floats = machine.act_f32 || !in.forms.blocks;
    const std::size_t token_bytes = static_cast<std::size_t>(in.k) * (floats ? 4 : 2);
    const auto fitting = static_cast<int>(std::min<std::size_t>(kTileBytes / token_bytes, kMaxTaskTokens));
    return std::max(kTokenTile, fitting / kTokenTile * kTokenTile);
}

int items_per_task(int items, std::size_t item_bytes, int token_tiles, int workers) {
    const auto wanted = static_cast<std::int64_t>((kTaskBytes + item_bytes - 1) / item_bytes);
    const std::int64_t all = static_cast<std::int64_t>(items) * token_tiles;
    const std::int64_t fair = workers == 1 ? all : all / (static_cast<std::int64_t>(workers) * kTasksPerWorker);
    return static_cast<int>(std::clamp<std::int64_t>(std::min(wanted, fair), 1, items));
}

GemmList::GemmList(const Machine& machine, const Operand& in, std::initializer_list<const Matrix*> matrices,
                   int workers)
    : machine_(machine), in_(in), tile_tokens_(task_tokens(machine, in)) {
    const int token_tiles = (in.tokens + tile_tokens_ - 1) / tile_tokens_;
    std::size_t count = 0;
    for (const Matrix* matrix : matrices) {
        Part& part = parts_[count++];
        part.matrix = matrix;
        part.groups_per_task = items_per_task(matrix->groups(), matrix->group_bytes(), token_tiles, workers);
        part.tasks = (matrix->groups() + part.groups_per_task - 1) / part.groups_per_task;
        tasks_per_tile_ += part.tasks;
    }
    total_ = static_cast<std::int64_t>(tasks_per_tile_) * token_tiles;
}

}  // namespace nybble
