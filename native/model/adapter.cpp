#include "model/adapter.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace nybble {
namespace {

constexpr int kMaxRank = 1 << 16;

void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

// Where a matrix of a layer is: its site, its place there, and its sizes.
struct Place {
    const char* name;
    Site site;
    int part;
    int rows;
    int cols;
};

std::array<Place, 7> places(const LayerConfig& layer, int hidden) {
    return {{
        {"attn.q", Site::qkv, 0, layer.q_size(), hidden},
        {"attn.k", Site::qkv, 1, layer.kv_size(), hidden},
        {"attn.v", Site::qkv, 2, layer.kv_size(), hidden},
        {"attn.o", Site::o, 0, hidden, layer.q_size()},
        {"ffn.gate", Site::gate_up, 0, layer.ffn_size, hidden},
        {"ffn.up", Site::gate_up, 1, layer.ffn_size, hidden},
        {"ffn.down", Site::down, 0, hidden, layer.ffn_size},
    }};
}

}  // namespace

Adapter::Adapter(const ModelConfig& config, Format format)
    : config_(config), format_(format), layers_(config.layers.size()) {
    require(format == Format::F16 || format == Format::F32, "an adapter is kept in F16 or F32");
}

void Adapter::set_layer(int layer, std::span<const Factors> factors) {
    require(!finished_, "the adapter is complete already");
    require(layer >= 0 && layer < static_cast<int>(layers_.size()),
            "the model has no layer " + std::to_string(layer) + " for the adapter");
    const LayerConfig& config = config_.layers[static_cast<std::size_t>(layer)];
    std::array<std::array<const Factors*, 3>, kSites> found{};
    std::array<int, kSites> inputs{};
    const auto all = places(config, config_.hidden_size);
    for (const Factors& one : factors) {
        const std::string what = "the adapter's factors of layer " + std::to_string(layer) + ", " + one.name;
        const auto place = std::find_if(all.begin(), all.end(), [&](const Place& p) { return one.name == p.name; });
        require(place != all.end(), what + ": a layer has no such matrix");
        require(one.rank >= 1 && one.rank <= kMaxRank, what + ": the rank " + std::to_string(one.rank) + " is no rank");
        require(std::isfinite(one.factor), what + ": the factor must be finite");
        const auto rank = static_cast<std::size_t>(one.rank);
        const std::size_t a_bytes = row_bytes(format_, static_cast<std::size_t>(place->cols)) * rank;
        const std::size_t b_bytes = row_bytes(format_, rank) * static_cast<std::size_t>(place->rows);
        require(one.a.size() == a_bytes && one.b.size() == b_bytes,
                what + " must have " + std::to_string(a_bytes) + " and " + std::to_string(b_bytes) + " bytes, not " +
                    std::to_string(one.a.size()) + " and " + std::to_string(one.b.size()));
        const auto site = static_cast<std::size_t>(place->site);
        require(found[site][static_cast<std::size_t>(place->part)] == nullptr, what + " come twice");
        found[site][static_cast<std::size_t>(place->part)] = &one;
        inputs[site] = place->cols;
    }
    Layer& to = layers_[static_cast<std::size_t>(layer)];
    for (const SiteWeights& site : to) require(site.a.empty(), "a layer of the adapter was set before");
    ThreadPool pool(1);  // the model's own would wait for its steps, one by one
    for (std::size_t site = 0; site < kSites; ++site) set_site(to[site], found[site], inputs[site], pool);
}

void Adapter::set_site(SiteWeights& site, std::span<const Factors* const> parts, int inputs, ThreadPool& pool) {
    std::vector<std::uint8_t> stacked;
    int rows = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        if (parts[i] == nullptr) continue;
        const Factors& one = *parts[i];
        const auto out_rows = static_cast<int>(one.b.size() / row_bytes(format_, static_cast<std::size_t>(one.rank)));
        site.parts[i] = {Matrix::pack(format_, out_rows, one.rank, one.b.data(), pool), rows};
        stacked.insert(stacked.end(), one.a.begin(), one.a.end());
        site.factors.insert(site.factors.end(), static_cast<std::size_t>(one.rank), one.factor);
        rows += one.rank;
        bytes_ += site.parts[i].b.bytes();
    }
    if (rows == 0) return;
    site.a = Matrix::pack(format_, rows, inputs, stacked.data(), pool);
    site.factors.resize(static_cast<std::size_t>(site.a.groups()) * kGroupRows, 0.0f);
    width_ = std::max(width_, site.a.groups() * kGroupRows);
    bytes_ += site.a.bytes();
}

}  // namespace nybble
