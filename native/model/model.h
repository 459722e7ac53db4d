// A decoder with everything it needs to run: threads, weights, executor and sampler.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/spare_buffer.h"
#include "model/config.h"
#include "model/executor.h"
#include "model/kv_cache.h"
#include "model/sampler.h"
#include "model/step.h"
#include "model/weights.h"

namespace nybble {

class Model {
public:
    // Throws std::invalid_argument if the configuration cannot be run. `isa` must be supported.
    Model(ModelConfig config, Isa isa, bool act_f32, int threads, KvType kv_type);

    // Packs one tensor. `data` holds whole rows in the file's encoding; it is not needed afterwards. Column i of a
    // matrix belongs to its input order[i]; an empty order is that of the inputs.
    // Throws std::invalid_argument if the tensor is unknown, has the wrong shape, was set before, or cannot have such
    // an order.
    void set_tensor(const std::string& name, Format format, int rows, int cols, std::span<const std::uint8_t> data,
                    std::span<const std::int32_t> order);

    // Whether a matrix may have this order of inputs: floats are never put in order, and of the others all that read
    // one input must agree.
    bool takes_order(const std::string& name, Format format, std::span<const std::int32_t> order);

    // Ends loading. Throws std::invalid_argument if tensors are missing.
    void finish();

    // The step is checked by the caller; see Step.
    void execute(KvCache& cache, const Step& step, float* logits, float* hidden);
    // Ids are checked by the caller.
    std::vector<Sampled> sample(const float* logits, std::span<const SampleRow> rows);
    std::vector<Sampled> score(const float* logits, std::span<const std::int32_t> targets, int top);
    // The same from final-normed hidden states. Only a few rows of logits exist at a time.
    std::vector<Sampled> score_hidden(const float* hidden, std::span<const std::int32_t> targets, int top);
    void copy_blocks(KvCache& cache, std::span<const BlockCopy> pairs);
    // Of what the weights are, and of how they are packed for this machine.
    Digest weights_fingerprint();

    const ModelConfig& config() const { return config_; }
    bool finished() const { return executor_ != nullptr; }
    bool act_f32() const { return act_f32_; }
    KvType kv_type() const { return kv_type_; }
    Isa isa() const { return kernels_.isa; }
    int threads() const { return pool_.size(); }
    std::size_t weight_bytes() const { return weights_.bytes(); }
    // Where the logits of a step come from and go to; they may live longer than the model.
    const std::shared_ptr<SpareBuffer<float>>& spare_logits() const { return spare_logits_; }

private:
    ModelConfig config_;
    bool act_f32_;
    KvType kv_type_;
    const Kernels& kernels_;
    ThreadPool pool_;
    Weights weights_;
    std::unique_ptr<Executor> executor_;
    Sampler sampler_;
    std::shared_ptr<SpareBuffer<float>> spare_logits_ = std::make_shared<SpareBuffer<float>>();
    std::mutex mutex_;  // scratch memory is shared, so callers take turns
};

}  // namespace nybble
