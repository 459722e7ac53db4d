// A low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685): for some matrices W of the model, y = W x + factor B (A
// x).
//
// An adapter belongs to a step, not to a model: steps name the adapters of their sequences, so loading and unloading
// one needs no word to the executor.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "model/config.h"
#include "model/matrix.h"

namespace nybble {

// One pair of factors as it comes from a file: a[rank][in] and b[out][rank], both in the adapter's encoding.
struct Factors {
    std::string name;  // attn.q, ffn.down, ...
    int rank = 0;
    std::span<const std::uint8_t> a;
    std::span<const std::uint8_t> b;
    float factor = 1.0f;
};

class Adapter {
public:
    // Of one of the matrices of a site.
    struct Part {
        Matrix b;        // empty: the adapter leaves this matrix alone
        int offset = 0;  // where its rows of `a` begin
    };
    struct SiteWeights {
        Matrix a;                    // the first factors of all parts, one below the other; empty: nothing is here
        std::vector<float> factors;  // one for each row of a, of whole groups
        std::array<Part, 3> parts;   // in the order q, k, v and gate, up
    };

    // `format` is F16 or F32. `config` must outlive the adapter.
    Adapter(const ModelConfig& config, Format format);
    Adapter(const Adapter&) = delete;
    Adapter& operator=(const Adapter&) = delete;

    // Packs the factors of one layer. Throws std::invalid_argument if one does not fit, or the layer was set before.
    void set_layer(int layer, std::span<const Factors> factors);
    // Ends loading: what is shared between threads from now on does not change.
    void finish() { finished_ = true; }
    bool finished() const { return finished_; }

    const SiteWeights& site(int layer, Site site) const {
        return layers_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(site)];
    }
    Format format() const { return format_; }
    // The most rows that a first factor has, in whole groups.
    int width() const { return width_; }
    std::size_t bytes() const { return bytes_; }

private:
    using Layer = std::array<SiteWeights, kSites>;

    void set_site(SiteWeights& site, std::span<const Factors* const> parts, int inputs, ThreadPool& pool);

    const ModelConfig& config_;
    Format format_;
    std::vector<Layer> layers_;
    int width_ = 0;
    std::size_t bytes_ = 0;
    bool finished_ = false;
};

}  // namespace nybble
