#include "model/executor.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace nybble {

Executor::Executor(const ModelConfig& config, const Weights& weights, const Kernels& kernels, bool act_f32,
                   ThreadPool& pool)
    : config_(config),
      weights_(weights),
      kernels_(kernels),
      machine_{&kernels, act_f32},
      pool_(pool),
      scratch_(config, weights, act_f32, pool.size()) {}

void Executor::execute(KvCache& cache, const Step& step, float* logits, float* hidden) {
    if (step.tokens() == 0) return;
    plan(step);
    pool_.run([&](Worker& worker) {
        start(worker, step);
        for (std::size_t i = 0; i < config_.layers.size(); ++i) {
            run_layer(worker, {static_cast<int>(i), config_.layers[i], weights_.layers[i], cache, step});
        }
        head(worker, step, logits, hidden);
    });
}

// Everything that allocates or is too small to share out.
void Executor::plan(const Step& step) {
    tokens_ = step.tokens();
    scratch_.reserve(std::max(tokens_, static_cast<int>(step.logit_rows.size())));  // a row may be asked for twice
    plan_adapters(step);
    tiles_.clear();
    for (int s = 0; s < step.sequences(); ++s) {
        const auto index = static_cast<std::size_t>(s);
        const int begin = step.cu_seqlens[index];
        const int end = step.cu_seqlens[index + 1];
        for (int token = begin; token < end; ++token) {
            scratch_.sequence_of[static_cast<std::size_t>(token)] = s;
            scratch_.position_of[static_cast<std::size_t>(token)] = step.context_lens[index] + token - begin;
        }
        for (int token = begin; token < end; token += kAttentionMaxTokens) {
            tiles_.push_back({s, token, std::min(kAttentionMaxTokens, end - token)});
        }
    }
    // The longest first, so that no worker is left alone with one at the end of the phase.
    const auto cost = [&](const AttentionTile& tile) {
        const auto last = static_cast<std::size_t>(tile.token0 + tile.tokens - 1);
        return static_cast<std::int64_t>(scratch_.position_of[last] + 1) * tile.tokens;
    };
    std::stable_sort(tiles_.begin(), tiles_.end(),
                     [&](const AttentionTile& a, const AttentionTile& b) { return cost(a) > cost(b); });
}

void Executor::run_layer(Worker& worker, const LayerRun& layer) {
    const LayerConfig& config = layer.config;
    const LayerWeights& w = layer.weights;
    const bool f32 = machine_.act_f32;
    // The post-norm of the layer before is applied here: it needs whole rows, and so does the norm.
    const Vector* pending = nullptr;
    if (layer.index > 0 && config_.layers[static_cast<std::size_t>(layer.index - 1)].post_norms) {
        pending = &weights_.layers[static_cast<std::size_t>(layer.index - 1)].ffn_post_norm;
    }
    const Operand qkv_in =
        layer_operand(Forms().include(w.q, f32).include(w.k, f32).include(w.v, f32), w.order(Site::qkv));
    normalise(worker, pending, w.attn_norm, qkv_in, {layer.index, Site::qkv});
    project_qkv(worker, layer, qkv_in);
    rotate_and_store(worker, layer);
    const Operand o_in = inner_operand(config.q_size(), Forms().include(w.o, f32), w.order(Site::o));
    attend(worker, layer, o_in);
    multiply_to_stream(worker, o_in, w.o, w.o_bias, config.post_norms, {layer.index, Site::o});

    const Operand ffn_in = layer_operand(Forms().include(w.gate, f32).include(w.up, f32), w.order(Site::gate_up));
    normalise(worker, config.post_norms ? &w.attn_post_norm : nullptr, w.ffn_norm, ffn_in,
              {layer.index, Site::gate_up});
    const Operand down_in = inner_operand(config.ffn_size, Forms().include(w.down, f32), w.order(Site::down));
    feed_forward(worker, layer, ffn_in, down_in);
    multiply_to_stream(worker, down_in, w.down, {}, config.post_norms, {layer.index, Site::down});
}

void Executor::start(Worker& worker, const Step& step) {
    worker.parallel_for(tokens_, grain(worker, tokens_), [&](std::int64_t begin, std::int64_t end) {
        for (int token = static_cast<int>(begin); token < end; ++token) {
            float* x = x_row(token);
            weights_.embed.decode_row(step.token_ids[static_cast<std::size_t>(token)], x);
            if (config_.embed_scale != 1.0f) kernels_.scale(x, config_.embed_scale, config_.hidden_size);
            fill_rope_tables(token);
        }
    });
}

void Executor::fill_rope_tables(int token) {
    const auto position = static_cast<float>(scratch_.position_of[static_cast<std::size_t>(token)]);
    for (RopeTable& rope : scratch_.ropes) {
        const std::vector<float>& inv_freq = rope.layer->inv_freq;
        const std::size_t row = static_cast<std::size_t>(token) * inv_freq.size();
        for (std::size_t i = 0; i < inv_freq.size(); ++i) {
            const float angle = position * inv_freq[i];
            rope.cos[row + i] = std::cos(angle) * rope.layer->rope_scale;
            rope.sin[row + i] = std::sin(angle) * rope.layer->rope_scale;
        }
    }
}

// x += post_norm(y) where there is one, then norm(x) becomes the operand.
void Executor::normalise(Worker& worker, const Vector* post_norm, const Vector& norm, const Operand& to, SiteRef site) {
    const int hidden = config_.hidden_size;
    float* row = memory(worker).rows.data();
    worker.parallel_for(tokens_, grain(worker, tokens_), [&](std::int64_t begin, std::int64_t end) {
        for (int token = static_cast<int>(begin); token < end; ++token) {
            float* x = x_row(token);
            if (post_norm != nullptr) {
                kernels_.rms_norm(y_row(token), post_norm->data(), config_.norm_eps, hidden, row);
                kernels_.add(x, row, hidden, x);
            }
            kernels_.rms_norm(x, norm.data(), config_.norm_eps, hidden, row);
            store_row(worker, row, token, to);
        }
        if (has_adapters()) multiply_first_factors(site, to, static_cast<int>(begin), static_cast<int>(end));
    });
}

// x += matrix * in + bias, or y = ... where a post-norm comes first.
void Executor::multiply_to_stream(Worker& worker, const Operand& in, const Matrix& matrix, const Vector& bias,
                                  bool has_post_norm, SiteRef site) {
    const GemmList list(machine_, in, {&matrix}, worker.size());
    list.run(worker, memory(worker).results.data(), [&](int, int row0, int rows, int token0, int tokens, float* out) {
        if (has_adapters()) add_second_factors(site, 0, row0 / kGroupRows, token0, tokens, out, kGroupRows);
        for (int t = 0; t < tokens; ++t, out += kGroupRows) {
            float* x = x_row(token0 + t) + row0;
            float* y = has_post_norm ? y_row(token0 + t) + row0 : x;
            for (int r = 0; r < rows; ++r) {
                const float value = bias.empty() ? out[r] : out[r] + bias[static_cast<std::size_t>(row0 + r)];
                y[r] = has_post_norm ? value : x[r] + value;
            }
        }
    });
}

// Every row is normalised anew, and not in place: a token may be asked for twice.
template <class Store>
void Executor::final_norm(Worker& worker, std::span<const std::int32_t> tokens, Store&& store) {
    const auto rows = static_cast<std::int64_t>(tokens.size());
    if (rows == 0) return;
    const int hidden = config_.hidden_size;
    const bool pending = !config_.layers.empty() && config_.layers.back().post_norms;
    float* row = memory(worker).rows.data();
    worker.parallel_for(rows, grain(worker, rows), [&](std::int64_t begin, std::int64_t end) {
        for (int r = static_cast<int>(begin); r < end; ++r) {
            const int token = tokens[static_cast<std::size_t>(r)];
            const float* x = x_row(token);
            if (pending) {
                kernels_.rms_norm(y_row(token), weights_.layers.back().ffn_post_norm.data(), config_.norm_eps, hidden,
                                  row);
                kernels_.add(x, row, hidden, row);
                x = row;
            }
            kernels_.rms_norm(x, weights_.final_norm.data(), config_.norm_eps, hidden, row + hidden);
            store(r, row + hidden);
        }
    });
}

void Executor::head(Worker& worker, const Step& step, float* logits, float* hidden) {
    final_norm(worker, step.hidden_rows, [&](int r, const float* row) {
        const auto width = static_cast<std::size_t>(config_.hidden_size);
        std::memcpy(hidden + static_cast<std::size_t>(r) * width, row, width * sizeof(float));
    });
    const auto rows = static_cast<int>(step.logit_rows.size());
    if (rows == 0) return;
    const Operand in = wide_operand(rows, Forms().include(weights_.head(), machine_.act_f32));
    final_norm(worker, step.logit_rows, [&](int r, const float* row) { store_row(worker, row, r, in); });
    multiply_head(worker, in, logits);
}

void Executor::project(const float* hidden, int rows, float* logits) {
    scratch_.reserve(rows);
    const Operand in = wide_operand(rows, Forms().include(weights_.head(), machine_.act_f32));
    pool_.run([&](Worker& worker) {
        worker.parallel_for(rows, grain(worker, rows), [&](std::int64_t begin, std::int64_t end) {
            for (int r = static_cast<int>(begin); r < end; ++r) {
                store_row(worker, hidden + static_cast<std::ptrdiff_t>(r) * config_.hidden_size, r, in);
            }
        });
        multiply_head(worker, in, logits);
    });
}

void Executor::multiply_head(Worker& worker, const Operand& in, float* logits) {
    const Matrix& matrix = weights_.head();
    const GemmList list(machine_, in, {&matrix}, worker.size());
    float* results = memory(worker).results.data();
    list.run(worker, results, [&](int, int row0, int count, int token0, int tokens, float* out) {
        if (config_.logit_scale != 1.0f) kernels_.scale(out, config_.logit_scale, tokens * kGroupRows);
        if (config_.logit_softcap > 0.0f) kernels_.softcap(out, config_.logit_softcap, tokens * kGroupRows);
        for (int t = 0; t < tokens; ++t) {
            std::memcpy(logits + static_cast<std::ptrdiff_t>(token0 + t) * config_.vocab_size + row0,
                        out + t * kGroupRows, static_cast<std::size_t>(count) * sizeof(float));
        }
    });
}

Operand Executor::wide_operand(int tokens, Forms forms) {
    return {tokens, config_.hidden_size, forms, scratch_.wide_blocks.acts(), scratch_.wide_floats.data()};
}

// What a layer's products read: adapters want floats.
Operand Executor::layer_operand(Forms forms, const InputOrder& order) {
    forms.floats |= has_adapters();
    Operand operand = wide_operand(tokens_, forms);
    operand.order = order.data();
    return operand;
}

Operand Executor::inner_operand(int width, Forms forms, const InputOrder& order) {
    return {tokens_, width, forms, scratch_.inner_blocks.acts(), scratch_.inner_floats.data(), order.data()};
}

void Executor::quantize_row(Worker& worker, const float* row, int token, const Operand& to) {
    if (to.order != nullptr) {
        float* ordered = memory(worker).ordered.data();
        for (int i = 0; i < to.k; ++i) ordered[i] = row[to.order[i]];
        row = ordered;
    }
    kernels_.quantize(row, to.k, to.first_block(token), to.stride(token));
}

void Executor::store_row(Worker& worker, const float* row, int token, const Operand& to) {
    if (to.forms.blocks) quantize_row(worker, row, token, to);
    if (to.forms.floats) std::memcpy(to.row(token), row, static_cast<std::size_t>(to.k) * sizeof(float));
}

// A whole row is needed to tell which of its blocks are worth refining, so this is a phase of its own.
void Executor::finish_rows(Worker& worker, const Operand& operand, SiteRef site) {
    if (!operand.forms.blocks && !has_adapters()) return;
    worker.parallel_for(operand.tokens, grain(worker, operand.tokens), [&](std::int64_t begin, std::int64_t end) {
        for (int token = static_cast<int>(begin); token < end && operand.forms.blocks; ++token) {
            quantize_row(worker, operand.row(token), token, operand);
        }
        if (has_adapters()) multiply_first_factors(site, operand, static_cast<int>(begin), static_cast<int>(end));
    });
}

std::int64_t Executor::grain(const Worker& worker, std::int64_t total) const {
    return std::max<std::int64_t>(1, total / (std::int64_t{4} * worker.size()));
}

}  // namespace nybble
