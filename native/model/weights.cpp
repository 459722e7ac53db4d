#include "model/weights.h"

#include <algorithm>
#include <span>

namespace nybble {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 20;  // bytes that one thread fingerprints at a time

}  // namespace

Weights::Weights(const ModelConfig& config) : layers(config.layers.size()) {
    const int hidden = config.hidden_size;
    expect("embed", embed, config.vocab_size, hidden);
    if (!config.tied_head) expect("head", head_, config.vocab_size, hidden);
    expect("final_norm", final_norm, hidden);
    for (std::size_t i = 0; i < layers.size(); ++i) {
        expect_layer("layers." + std::to_string(i) + ".", config.layers[i], hidden, layers[i]);
    }
}

void Weights::expect_layer(const std::string& prefix, const LayerConfig& layer, int hidden, LayerWeights& weights) {
    expect(prefix + "attn_norm", weights.attn_norm, hidden);
    expect(prefix + "attn.q", weights.q, layer.q_size(), hidden, &weights.order(Site::qkv));
    expect(prefix + "attn.k", weights.k, layer.kv_size(), hidden, &weights.order(Site::qkv));
    expect(prefix + "attn.v", weights.v, layer.kv_size(), hidden, &weights.order(Site::qkv));
    expect(prefix + "attn.o", weights.o, hidden, layer.q_size(), &weights.order(Site::o));
    expect(prefix + "ffn_norm", weights.ffn_norm, hidden);
    expect(prefix + "ffn.gate", weights.gate, layer.ffn_size, hidden, &weights.order(Site::gate_up));
    expect(prefix + "ffn.up", weights.up, layer.ffn_size, hidden, &weights.order(Site::gate_up));
    expect(prefix + "ffn.down", weights.down, hidden, layer.ffn_size, &weights.order(Site::down));
    if (layer.qkv_bias) {
        expect(prefix + "attn.q.bias", weights.q_bias, layer.q_size());
        expect(prefix + "attn.k.bias", weights.k_bias, layer.kv_size());
        expect(prefix + "attn.v.bias", weights.v_bias, layer.kv_size());
    }
    if (layer.out_bias) expect(prefix + "attn.o.bias", weights.o_bias, hidden);
    if (layer.qk_norm) {
        expect(prefix + "attn.q_norm", weights.q_norm, layer.head_dim);
        expect(prefix + "attn.k_norm", weights.k_norm, layer.head_dim);
    }
    if (layer.post_norms) {
        expect(prefix + "attn.post_norm", weights.attn_post_norm, hidden);
        expect(prefix + "ffn.post_norm", weights.ffn_post_norm, hidden);
    }
}

void Weights::expect(const std::string& name, Matrix& matrix, int rows, int cols, InputOrder* order) {
    slots_[name] = Slot{&matrix, nullptr, order, rows, cols};
}

void Weights::expect(const std::string& name, Vector& vector, int size) {
    slots_[name] = Slot{nullptr, &vector, nullptr, 1, size};
}

const Weights::Slot* Weights::find(const std::string& name) const {
    const auto found = slots_.find(name);
    return found == slots_.end() ? nullptr : &found->second;
}

std::vector<std::string> Weights::missing() const {
    std::vector<std::string> names;
    for (const auto& [name, slot] : slots_) {
        if (!slot.filled()) names.push_back(name);
    }
    return names;
}

std::size_t Weights::bytes() const {
    std::size_t total = 0;
    for (const auto& [name, slot] : slots_) {
        total += slot.matrix != nullptr ? slot.matrix->bytes() : slot.vector->size() * sizeof(float);
    }
    for (const LayerWeights& layer : layers) {
        for (const InputOrder& order : layer.orders) total += order.inputs.size() * sizeof(std::int32_t);
    }
    return total;
}

Digest Weights::fingerprint(ThreadPool& pool) const {
    std::string heads;
    std::vector<std::span<const std::uint8_t>> pieces;
    for (const auto& [name, slot] : slots_) {
        const int format = slot.matrix != nullptr ? static_cast<int>(slot.matrix->format()) : -1;
        heads += name + ' ' + std::to_string(format) + ' ' + std::to_string(slot.rows) + ' ' +
                 std::to_string(slot.cols) + '\n';
        const std::uint8_t* data =
            slot.matrix != nullptr ? slot.matrix->group(0) : reinterpret_cast<const std::uint8_t*>(slot.vector->data());
        const std::size_t size = slot.matrix != nullptr ? slot.matrix->bytes() : slot.vector->size() * sizeof(float);
        for (std::size_t at = 0; at < size; at += kPiece) pieces.emplace_back(data + at, std::min(kPiece, size - at));
        if (slot.order == nullptr || slot.order->inputs.empty()) continue;
        const std::vector<std::int32_t>& inputs = slot.order->inputs;
        heads += name + " ordered\n";
        pieces.emplace_back(reinterpret_cast<const std::uint8_t*>(inputs.data()), inputs.size() * sizeof(std::int32_t));
    }
    std::vector<Digest> digests(pieces.size() + 1);
    digests.back() = digest({reinterpret_cast<const std::uint8_t*>(heads.data()), heads.size()});
    pool.run([&](Worker& worker) {
        worker.parallel_for(static_cast<std::int64_t>(pieces.size()), 1, [&](std::int64_t begin, std::int64_t end) {
            for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
                digests[i] = digest(pieces[i]);
            }
        });
    });
    return digest({reinterpret_cast<const std::uint8_t*>(digests.data()), digests.size() * sizeof(Digest)});
}

}  // namespace nybble
