// How the multiplication of one operand by some weight matrices is cut into tasks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "base/thread_pool.h"
#include "dispatch/kernels.h"
#include "model/operand.h"

namespace nybble {

// What the phases of a step need to know about the machine.
struct Machine {
    const Kernels* kernels = nullptr;
    bool act_f32 = false;  // NYBBLE_ACT=f32: all GEMMs in floats
};

// Tokens that a task handles at most; bounds the workers' result buffers.
inline constexpr int kMaxTaskTokens = 256;

// Output groups of one matrix x tokens: out[t * ldo + 0..15] for one group of rows.
void multiply_group(const Machine& machine, const Matrix& matrix, int group, const Operand& in, int token0, int tokens,
                    float* out, int ldo);

// Tokens per super-tile, so that their activations stay in the second-level cache while weights stream past them.
int task_tokens(const Machine& machine, const Operand& in);

// Items (of `item_bytes` of weights each) per task: at least 32 KiB, as far as every worker still gets four tasks.
int items_per_task(int items, std::size_t item_bytes, int token_tiles, int workers);

// Up to three matrices that share an operand, as one list of tasks. A task is some groups of rows of one matrix and
// one super-tile of tokens. Never along k: so the cut does not change any result.
class GemmList {
public:
    GemmList(const Machine& machine, const Operand& in, std::initializer_list<const Matrix*> matrices, int workers);

    // Calls epilogue(matrix index, first row, rows <= 16, first token, tokens, out[tokens][16]) for every group.
    // `out` is the worker's own memory of kMaxTaskTokens * 16 floats.
    template <class Epilogue>
    void run(Worker& worker, float* out, Epilogue&& epilogue) const {
        worker.parallel_for(total_, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t task = begin; task < end; ++task) run_task(static_cast<int>(task), out, epilogue);
        });
    }

private:
    struct Part {
        const Matrix* matrix = nullptr;
        int groups_per_task = 1;
        int tasks = 0;
    };

    template <class Epilogue>
    void run_task(int task, float* out, Epilogue& epilogue) const {
        const int token0 = task / tasks_per_tile_ * tile_tokens_;
        const int tokens = std::min(tile_tokens_, in_.tokens - token0);
        int index = task % tasks_per_tile_;
        int which = 0;
        while (index >= parts_[static_cast<std::size_t>(which)].tasks) {
            index -= parts_[static_cast<std::size_t>(which++)].tasks;
        }
        const Part& part = parts_[static_cast<std::size_t>(which)];
        const Matrix& matrix = *part.matrix;
        const int first = index * part.groups_per_task;
        const int last = std::min(first + part.groups_per_task, matrix.groups());
        for (int group = first; group < last; ++group) {
            multiply_group(machine_, matrix, group, in_, token0, tokens, out, kGroupRows);
            const int row0 = group * kGroupRows;
            epilogue(which, row0, std::min(kGroupRows, matrix.rows() - row0), token0, tokens, static_cast<float*>(out));
        }
    }

    Machine machine_;
    const Operand& in_;
    std::array<Part, 3> parts_;
    int tile_tokens_;
    int tasks_per_tile_ = 0;
    std::int64_t total_ = 0;
};

}  // namespace nybble
