#include "model/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace nybble {
namespace {

constexpr int kMaxHeadDim = 1024;
constexpr std::size_t kScoreRows = 64;  // enough to stream the head's weights once for many rows
constexpr int kMaxSize = 1 << 24;       // of any single dimension: keeps every product of two within 64 bits

void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

bool takes_order(const Weights::Slot& slot, Format format, std::span<const std::int32_t> order, bool act_f32) {
    if (slot.order == nullptr || is_float_format(format)) return order.empty();
    const InputOrder& site = *slot.order;
    if (site.settled) return std::equal(order.begin(), order.end(), site.inputs.begin(), site.inputs.end());
    if (order.empty()) return true;
    if (act_f32 || order.size() != static_cast<std::size_t>(slot.cols)) return false;
    std::vector<bool> seen(order.size());
    for (const std::int32_t input : order) {
        if (input < 0 || input >= slot.cols || seen[static_cast<std::size_t>(input)]) return false;
        seen[static_cast<std::size_t>(input)] = true;
    }
    return true;
}

void check_size(int value, const std::string& what) {
    require(value >= 1 && value <= kMaxSize,
            what + " must be between 1 and " + std::to_string(kMaxSize) + ", not " + std::to_string(value));
}

void check_layer(const LayerConfig& layer, const std::string& where) {
    check_size(layer.q_heads, where + "q_heads");
    check_size(layer.kv_heads, where + "kv_heads");
    check_size(layer.ffn_size, where + "ffn_size");
    require(layer.q_heads % layer.kv_heads == 0, where + "q_heads must be a multiple of kv_heads");
    require(layer.head_dim >= 16 && layer.head_dim % 16 == 0 && layer.head_dim <= kMaxHeadDim,
            where + "head_dim must be a multiple of 16 up to " + std::to_string(kMaxHeadDim) + ", not " +
                std::to_string(layer.head_dim));
    require(static_cast<std::int64_t>(layer.q_heads) * layer.head_dim <= kMaxSize, where + "heads are too wide");
    require(layer.inv_freq.size() <= static_cast<std::size_t>(layer.head_dim) / 2,
            where + "inv_freq turns more dimensions than a head has");
    for (const float f : layer.inv_freq) require(std::isfinite(f), where + "inv_freq must be finite");
    require(layer.window >= 0, where + "window must not be negative");
    require(std::isfinite(layer.sm_scale) && std::isfinite(layer.rope_scale), where + "scales must be finite");
    require(std::isfinite(layer.attn_softcap) && layer.attn_softcap >= 0, where + "attn_softcap must not be negative");
}

ModelConfig checked(ModelConfig config) {
    check_size(config.vocab_size, "vocab_size");
    check_size(config.hidden_size, "hidden_size");
    require(std::isfinite(config.norm_eps) && config.norm_eps >= 0, "norm_eps must not be negative");
    require(std::isfinite(config.embed_scale) && std::isfinite(config.logit_scale), "scales must be finite");
    require(std::isfinite(config.logit_softcap) && config.logit_softcap >= 0, "logit_softcap must not be negative");
    for (std::size_t i = 0; i < config.layers.size(); ++i) {
        check_layer(config.layers[i], "layer " + std::to_string(i) + ": ");
    }
    return config;
}

std::string shape(int rows, int cols) { return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]"; }

}  // namespace

Model::Model(ModelConfig config, Isa isa, bool act_f32, int threads, KvType kv_type)
    : config_(checked(std::move(config))),
      act_f32_(act_f32),
      kv_type_(kv_type),
      kernels_(kernels(isa)),
      pool_(threads),
      weights_(config_),
      sampler_(kernels_, pool_, config_.vocab_size) {}

bool Model::takes_order(const std::string& name, Format format, std::span<const std::int32_t> order) {
    const std::lock_guard lock(mutex_);
    const Weights::Slot* slot = weights_.find(name);
    return slot != nullptr && nybble::takes_order(*slot, format, order, act_f32_);
}

void Model::set_tensor(const std::string& name, Format format, int rows, int cols, std::span<const std::uint8_t> data,
                       std::span<const std::int32_t> order) {
    const std::lock_guard lock(mutex_);
    require(!finished(), "tensor " + name + " comes after finish()");
    const Weights::Slot* slot = weights_.find(name);
    require(slot != nullptr, "this model has no tensor " + name);
    require(rows == slot->rows && cols == slot->cols,
            "tensor " + name + " must be " + shape(slot->rows, slot->cols) + ", not " + shape(rows, cols));
    require(!slot->filled(), "tensor " + name + " was set before");
    const FormatInfo& encoding = info(format);
    require(cols % encoding.block_size == 0, "tensor " + name + " has rows of " + std::to_string(cols) +
                                                 " weights, which are not whole blocks of " +
                                                 std::string(encoding.name));
    const std::size_t bytes = row_bytes(format, static_cast<std::size_t>(cols)) * static_cast<std::size_t>(rows);
    require(data.size() == bytes,
            "tensor " + name + " must have " + std::to_string(bytes) + " bytes, not " + std::to_string(data.size()));
    require(nybble::takes_order(*slot, format, order, act_f32_),
            "tensor " + name + " cannot have its inputs in this order");
    if (slot->order != nullptr && !is_float_format(format)) *slot->order = {true, {order.begin(), order.end()}};
    if (slot->matrix != nullptr) {
        *slot->matrix = Matrix::pack(format, rows, cols, data.data(), pool_);
        return;
    }
    require(format == Format::F32, "tensor " + name + " must be F32, not " + std::string(encoding.name));
    slot->vector->resize(static_cast<std::size_t>(cols));
    std::memcpy(slot->vector->data(), data.data(), bytes);
}

void Model::finish() {
    const std::lock_guard lock(mutex_);
    const std::vector<std::string> missing = weights_.missing();
    if (!missing.empty()) {
        std::string message = std::to_string(missing.size()) + " tensors are missing: ";
        for (std::size_t i = 0; i < missing.size() && i < 5; ++i) message += (i > 0 ? ", " : "") + missing[i];
        throw std::invalid_argument(missing.size() > 5 ? message + ", ..." : message);
    }
    if (executor_ == nullptr) executor_ = std::make_unique<Executor>(config_, weights_, kernels_, act_f32_, pool_);
}

void Model::execute(KvCache& cache, const Step& step, float* logits, float* hidden) {
    const std::lock_guard lock(mutex_);
    executor_->execute(cache, step, logits, hidden);
}

std::vector<Sampled> Model::sample(const float* logits, std::span<const SampleRow> rows) {
    const std::lock_guard lock(mutex_);
    return sampler_.sample(logits, rows);
}

std::vector<Sampled> Model::score(const float* logits, std::span<const std::int32_t> targets, int top) {
    const std::lock_guard lock(mutex_);
    return sampler_.score(logits, targets, top);
}

std::vector<Sampled> Model::score_hidden(const float* hidden, std::span<const std::int32_t> targets, int top) {
    const std::lock_guard lock(mutex_);
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    const auto width = static_cast<std::size_t>(config_.hidden_size);
    Buffer<float> logits(checked_mul(std::min(targets.size(), kScoreRows), vocab));
    std::vector<Sampled> out;
    out.reserve(targets.size());
    for (std::size_t row = 0; row < targets.size(); row += kScoreRows) {
        const std::size_t count = std::min(targets.size() - row, kScoreRows);
        executor_->project(hidden + row * width, static_cast<int>(count), logits.data());
        std::vector<Sampled> part = sampler_.score(logits.data(), targets.subspan(row, count), top);
        std::move(part.begin(), part.end(), std::back_inserter(out));
    }
    return out;
}

void Model::copy_blocks(KvCache& cache, std::span<const BlockCopy> pairs) {
    const std::lock_guard lock(mutex_);
    cache.copy_blocks(pairs, pool_);
}

Digest Model::weights_fingerprint() {
    const std::lock_guard lock(mutex_);
    return weights_.fingerprint(pool_);
}

}  // namespace nybble
