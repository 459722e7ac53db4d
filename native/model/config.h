// A decoder as plain numbers: the native mirror of nybble.core.spec.
#pragma once

#include <vector>

namespace nybble {

enum class Activation { silu, gelu_tanh };

// The inputs of a layer's matrices. Those that read the same one share its operand, and an adapter's first factor.
enum class Site { qkv, o, gate_up, down };
inline constexpr int kSites = 4;

struct LayerConfig {
    int q_heads = 0;
    int kv_heads = 0;
    int head_dim = 0;  // a multiple of 16
    int ffn_size = 0;
    float sm_scale = 1.0f;
    Activation activation = Activation::silu;
    int window = 0;  // how many tokens a token sees, itself included; 0: all before it
    bool qkv_bias = false;
    bool out_bias = false;
    bool qk_norm = false;
    bool post_norms = false;
    float attn_softcap = 0.0f;  // 0: off
    // Rotary embedding: pairs turn by position * inv_freq, cos and sin are multiplied by rope_scale.
    std::vector<float> inv_freq;
    float rope_scale = 1.0f;
    bool rope_interleaved = false;

    int group() const { return q_heads / kv_heads; }  // query heads that share a kv head
    int q_size() const { return q_heads * head_dim; }
    int kv_size() const { return kv_heads * head_dim; }
    int qkv_size() const { return q_size() + 2 * kv_size(); }
    int rotary_dim() const { return 2 * static_cast<int>(inv_freq.size()); }
};

struct ModelConfig {
    int vocab_size = 0;
    int hidden_size = 0;
    float norm_eps = 1e-6f;
    bool tied_head = false;
    float embed_scale = 1.0f;
    float logit_scale = 1.0f;
    float logit_softcap = 0.0f;  // 0: off
    std::vector<LayerConfig> layers;
};

}  // namespace nybble
