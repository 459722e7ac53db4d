// Runs one ragged step through the whole decoder, as one parallel region.
//
// A region is a chain of phases; each phase is a parallel_for over tokens, heads or rows of weights and ends with a
// barrier. No work is ever split along a sum, so every number is the same for any batch, chunking and thread count.
#pragma once

#include <span>
#include <vector>

#include "model/gemm.h"
#include "model/kv_cache.h"
#include "model/scratch.h"
#include "model/step.h"
#include "model/weights.h"

namespace nybble {

class Executor {
public:
    // All references must outlive the executor. `weights` must be complete.
    Executor(const ModelConfig& config, const Weights& weights, const Kernels& kernels, bool act_f32, ThreadPool& pool);

    // Puts the step's keys and values into the cache, its logits into logits[logit_rows][vocab_size], and final-normed
    // hidden states into hidden[hidden_rows][hidden_size]. One caller at a time.
    void execute(KvCache& cache, const Step& step, float* logits, float* hidden);
    // The logits of final-normed hidden states, the same to the bit as those of the step that they come from.
    void project(const float* hidden, int rows, float* logits);

private:
    // Some query tokens of one sequence whose attention is one task per kv head.
    struct AttentionTile {
        int sequence;
        int token0;
        int tokens;
    };
    // What the phases of one layer share.
    struct LayerRun {
        int index;
        const LayerConfig& config;
        const LayerWeights& weights;
        KvCache& cache;
        const Step& step;
    };

    // Tokens one after the other with the same adapter.
    struct AdapterRun {
        const Adapter* adapter;
        int token0;
        int tokens;
    };
    // Which products of which layer.
    struct SiteRef {
        int layer;
        Site site;
    };

    void plan(const Step& step);
    void run_layer(Worker& worker, const LayerRun& layer);

    // executor.cpp
    void start(Worker& worker, const Step& step);
    void fill_rope_tables(int token);
    void normalise(Worker& worker, const Vector* post_norm, const Vector& norm, const Operand& to, SiteRef site);
    void multiply_to_stream(Worker& worker, const Operand& in, const Matrix& matrix, const Vector& bias,
                            bool has_post_norm, SiteRef site);
    void head(Worker& worker, const Step& step, float* logits, float* hidden);
    template <class Store>
    void final_norm(Worker& worker, std::span<const std::int32_t> tokens, Store&& store);
    void multiply_head(Worker& worker, const Operand& in, float* logits);

    // executor_attention.cpp
    void project_qkv(Worker& worker, const LayerRun& layer, const Operand& in);
    void rotate_and_store(Worker& worker, const LayerRun& layer);
    void attend(Worker& worker, const LayerRun& layer, const Operand& to);
    void attend_tile(const LayerRun& layer, const AttentionTile& tile, int kv_head, float* memory, const Operand& to);

    // executor_ffn.cpp
    void feed_forward(Worker& worker, const LayerRun& layer, const Operand& in, const Operand& to);
    void feed_forward_columns(const LayerRun& layer, int block, const Operand& in, int token0, int tokens,
                              float* memory, const Operand& to);

    // executor_adapter.cpp
    void plan_adapters(const Step& step);
    // What the adapters of tokens [begin, end) make of their input, before and inside of the site's products.
    void multiply_first_factors(SiteRef where, const Operand& in, int begin, int end);
    void add_second_factors(SiteRef where, int part, int group, int token0, int tokens, float* out, int ldo);
    bool has_adapters() const { return !runs_.empty(); }

    Operand wide_operand(int tokens, Forms forms);
    Operand layer_operand(Forms forms, const InputOrder& order);
    Operand inner_operand(int width, Forms forms, const InputOrder& order);
    void store_row(Worker& worker, const float* row, int token, const Operand& to);
    void quantize_row(Worker& worker, const float* row, int token, const Operand& to);
    void finish_rows(Worker& worker, const Operand& operand, SiteRef site);
    // How many tokens (or other short items) a worker takes at a time.
    std::int64_t grain(const Worker& worker, std::int64_t total) const;
    WorkerScratch& memory(const Worker& worker) { return scratch_.workers[static_cast<std::size_t>(worker.index())]; }
    float* x_row(int token) { return scratch_.x.data() + static_cast<std::ptrdiff_t>(token) * config_.hidden_size; }
    float* y_row(int token) { return scratch_.y.data() + static_cast<std::ptrdiff_t>(token) * config_.hidden_size; }
    float* low_rank_row(int token) {
        return scratch_.low_rank.data() + static_cast<std::ptrdiff_t>(token) * low_rank_width_;
    }
    float* qkv_row(int token, const LayerConfig& layer) {
        return scratch_.qkv.data() + static_cast<std::ptrdiff_t>(token) * layer.qkv_size();
    }

    const ModelConfig& config_;
    const Weights& weights_;
    const Kernels& kernels_;
    Machine machine_;
    ThreadPool& pool_;
    Scratch scratch_;
    int tokens_ = 0;  // of the current step
    std::vector<AttentionTile> tiles_;
    std::vector<AdapterRun> runs_;  // in ascending order of tokens
    int low_rank_width_ = 0;
};

}  // namespace nybble
