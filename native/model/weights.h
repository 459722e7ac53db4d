// All weights of a decoder, under their canonical names.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/digest.h"
#include "base/thread_pool.h"
#include "model/config.h"
#include "model/matrix.h"

namespace nybble {

using Vector = std::vector<float>;

// In which order the quantised matrices of a site have their inputs; those in floats have them as they are.
struct InputOrder {
    bool settled = false;              // by the first of these matrices
    std::vector<std::int32_t> inputs;  // empty: as they are
    const std::int32_t* data() const { return inputs.empty() ? nullptr : inputs.data(); }
};

struct LayerWeights {
    const InputOrder& order(Site site) const { return orders[static_cast<std::size_t>(site)]; }
    InputOrder& order(Site site) { return orders[static_cast<std::size_t>(site)]; }

    Vector attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm;
    Vector q_bias, k_bias, v_bias, o_bias;
    Matrix q, k, v, o, gate, up, down;
    std::array<InputOrder, kSites> orders;
};

class Weights {
public:
    // `config` must outlive the weights.
    explicit Weights(const ModelConfig& config);
    Weights(const Weights&) = delete;
    Weights& operator=(const Weights&) = delete;

    // Where a tensor goes and what shape it must have. A vector has one row.
    struct Slot {
        Matrix* matrix = nullptr;
        Vector* vector = nullptr;
        InputOrder* order = nullptr;  // of a layer's matrix
        int rows = 0;
        int cols = 0;
        bool filled() const { return matrix != nullptr ? !matrix->empty() : !vector->empty(); }
    };

    // Null if the model has no such tensor.
    const Slot* find(const std::string& name) const;
    // Names of the tensors that have not been set.
    std::vector<std::string> missing() const;
    std::size_t bytes() const;
    // Of the names, shapes, encodings, packed bytes and input orders of all tensors.
    Digest fingerprint(ThreadPool& pool) const;

    const Matrix& head() const { return head_.empty() ? embed : head_; }

    Matrix embed;
    Vector final_norm;
    std::vector<LayerWeights> layers;

private:
    void expect(const std::string& name, Matrix& matrix, int rows, int cols, InputOrder* order = nullptr);
    void expect(const std::string& name, Vector& vector, int size);
    void expect_layer(const std::string& prefix, const LayerConfig& layer, int hidden, LayerWeights& weights);

    Matrix head_;
    std::map<std::string, Slot> slots_;
};

}  // namespace nybble
