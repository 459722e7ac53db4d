#include "model/model.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <deque>

#include "base/cpu_count.h"
#include "bindings/bindings.h"
#include "bindings/check_step.h"
#include "bindings/convert.h"
#include "bindings/sampling.h"

namespace nybble {
namespace {

constexpr int kMaxThreads = 1024;

// A cache knows the model that it was made for.
struct BoundCache {
    BoundCache(const Model& model, int num_blocks) : model(&model), cache(make(model, num_blocks)) {}

    static KvCache make(const Model& model, int num_blocks) {
        require(num_blocks >= 1, "num_blocks must be at least 1, not " + std::to_string(num_blocks));
        return KvCache(model.config(), num_blocks, model.kv_type());
    }

    const Model* model;
    KvCache cache;
};

// An adapter knows the model that it was made for.
struct BoundAdapter {
    BoundAdapter(const Model& model, const std::string& format)
        : model(&model), adapter(model.config(), format_argument(format)) {}

    const Model* model;
    Adapter adapter;
};

// name, rank, a[rank][in], b[out][rank], factor
using FactorsArgument = std::tuple<std::string, int, nb::object, nb::object, float>;

void set_adapter_layer(BoundAdapter& self, int layer, const std::vector<FactorsArgument>& factors) {
    std::deque<Bytes> buffers;  // a view must not move
    std::vector<Factors> all;
    for (const auto& [name, rank, a, b, factor] : factors) {
        const auto a_bytes = buffers.emplace_back(a).span();
        const auto b_bytes = buffers.emplace_back(b).span();
        all.push_back({name, rank, a_bytes, b_bytes, factor});
    }
    const nb::gil_scoped_release free_gil;
    self.adapter.set_layer(layer, all);
}

std::vector<const Adapter*> adapters_argument(const Model& model, const std::vector<const BoundAdapter*>& bound) {
    std::vector<const Adapter*> adapters;
    for (const BoundAdapter* one : bound) {
        if (one == nullptr) fail("adapters must not hold None");
        if (one->model != &model) fail("an adapter was made for another model");
        if (!one->adapter.finished()) fail("an adapter is not complete: call finish() after its last layer");
        adapters.push_back(&one->adapter);
    }
    return adapters;
}

Activation activation_argument(const std::string& name) {
    require(name == "silu" || name == "gelu_tanh", "unknown activation '" + name + "': use silu or gelu_tanh");
    return name == "silu" ? Activation::silu : Activation::gelu_tanh;
}

void init_model(Model* self, int vocab_size, int hidden_size, float norm_eps, std::vector<LayerConfig> layers,
                bool tied_head, float embed_scale, float logit_scale, float logit_softcap, std::optional<int> threads,
                const std::optional<std::string>& isa, const std::string& act, const std::string& kv) {
    require(act == "int8" || act == "f32", "unknown activation type '" + act + "': use int8 or f32");
    require(kv == "f16" || kv == "int8", "unknown type of keys and values '" + kv + "': use f16 or int8");
    const bool f32 = act == "f32";  // the reference arithmetic keeps them exact, unless int8 is what is looked at
    const KvType kv_type = kv == "int8" ? KvType::int8 : f32 ? KvType::f32 : KvType::f16;
    const int count = threads.value_or(default_threads());
    require(count >= 1 && count <= kMaxThreads,
            "threads must be between 1 and " + std::to_string(kMaxThreads) + ", not " + std::to_string(count));
    ModelConfig config{vocab_size,  hidden_size, norm_eps,      tied_head,
                       embed_scale, logit_scale, logit_softcap, std::move(layers)};
    new (self) Model(std::move(config), isa_argument(isa), f32, count, kv_type);
}

std::span<const std::int32_t> order_argument(const std::optional<AnyArray>& order) {
    return order ? flat<std::int32_t>(*order, "order") : std::span<const std::int32_t>();
}

void set_tensor(Model& model, const std::string& name, const std::string& format, int rows, int cols, nb::handle data,
                const std::optional<AnyArray>& order) {
    const Format encoding = format_argument(format);
    const Bytes bytes(data);
    const std::span<const std::int32_t> inputs = order_argument(order);
    const nb::gil_scoped_release free_gil;
    model.set_tensor(name, encoding, rows, cols, bytes.span(), inputs);
}

bool takes_order(Model& model, const std::string& name, const std::string& format,
                 const std::optional<AnyArray>& order) {
    return model.takes_order(name, format_argument(format), order_argument(order));
}

// The logits, or a pair of logits and hidden states if `hidden_rows` is given.
nb::object execute(Model& model, BoundCache& cache, const AnyArray& token_ids, const AnyArray& cu_seqlens_q,
                   const AnyArray& context_lens, const AnyArray& block_tables, const AnyArray& logit_rows,
                   const std::optional<AnyArray>& hidden_rows, const std::vector<const BoundAdapter*>& bound,
                   const std::optional<AnyArray>& adapter_of) {
    require(model.finished(), "the model is not complete: call finish() after the last tensor");
    require(cache.model == &model, "the cache was made for another model");
    Step step;
    step.token_ids = flat<std::int32_t>(token_ids, "token_ids");
    step.cu_seqlens = flat<std::int32_t>(cu_seqlens_q, "cu_seqlens_q");
    step.context_lens = flat<std::int32_t>(context_lens, "context_lens");
    step.block_tables = flat<std::int32_t>(block_tables, "block_tables", 2).data();
    step.logit_rows = flat<std::int32_t>(logit_rows, "logit_rows");
    if (hidden_rows) step.hidden_rows = flat<std::int32_t>(*hidden_rows, "hidden_rows");
    require(block_tables.shape(0) == step.context_lens.size(), "block_tables must have one row for each sequence");
    step.max_blocks = static_cast<std::ptrdiff_t>(block_tables.shape(1));
    const std::vector<const Adapter*> adapters = adapters_argument(model, bound);
    step.adapters = adapters;
    if (adapter_of) step.adapter_of = flat<std::int32_t>(*adapter_of, "adapter_of");
    check_step(model, cache.cache, step);
    const std::size_t rows = step.logit_rows.size();
    const auto vocab_size = static_cast<std::size_t>(model.config().vocab_size);
    Buffer<float> logits = model.spare_logits()->take(checked_mul(rows, vocab_size));
    FloatArray hidden(step.hidden_rows.size(), static_cast<std::size_t>(model.config().hidden_size));
    {
        const nb::gil_scoped_release free_gil;
        model.execute(cache.cache, step, logits.data(), hidden.data);
    }
    auto array = as_numpy(std::move(logits), rows, vocab_size, model.spare_logits());
    if (!hidden_rows) return nb::cast(array);
    return nb::make_tuple(array, hidden.release());
}

void copy_blocks(Model& model, BoundCache& cache, const AnyArray& pairs) {
    require(cache.model == &model, "the cache was made for another model");
    const auto ids = flat<std::int32_t>(pairs, "pairs", 2);
    require(pairs.shape(1) == 2, "pairs must have 2 columns, from and to");
    check_ids(ids, cache.cache.num_blocks(), "pairs");
    std::vector<BlockCopy> copies(pairs.shape(0));
    for (std::size_t i = 0; i < copies.size(); ++i) copies[i] = {ids[2 * i], ids[2 * i + 1]};
    const nb::gil_scoped_release free_gil;
    model.copy_blocks(cache.cache, copies);
}

// The bytes of blocks, [ids, cache_bytes_per_block].
nb::object read_blocks(const Model& model, const BoundCache& cache, const AnyArray& ids) {
    require(cache.model == &model, "the cache was made for another model");
    const auto blocks = flat<std::int32_t>(ids, "ids");
    check_ids(blocks, cache.cache.num_blocks(), "ids");
    const std::size_t bytes = KvCache::bytes_per_block(model.config(), model.kv_type());
    ByteArray out(blocks.size(), bytes);
    {
        const nb::gil_scoped_release free_gil;
        for (std::size_t i = 0; i < blocks.size(); ++i) cache.cache.read_block(blocks[i], out.data + i * bytes);
    }
    return nb::cast(out.release());
}

void write_blocks(const Model& model, BoundCache& cache, const AnyArray& ids, const AnyArray& data) {
    require(cache.model == &model, "the cache was made for another model");
    const auto blocks = flat<std::int32_t>(ids, "ids");
    check_ids(blocks, cache.cache.num_blocks(), "ids");
    const auto source = flat<std::uint8_t>(data, "data", 2);
    const std::size_t bytes = KvCache::bytes_per_block(model.config(), model.kv_type());
    require(data.shape(0) == blocks.size() && data.shape(1) == bytes,
            "data must have " + std::to_string(bytes) + " bytes for each of the ids");
    const nb::gil_scoped_release free_gil;
    for (std::size_t i = 0; i < blocks.size(); ++i) cache.cache.write_block(blocks[i], source.data() + i * bytes);
}

nb::bytes weights_fingerprint(Model& model) {
    require(model.finished(), "the model is not complete: call finish() after the last tensor");
    Digest digest{};
    {
        const nb::gil_scoped_release free_gil;
        digest = model.weights_fingerprint();
    }
    return nb::bytes(reinterpret_cast<const char*>(digest.data()), sizeof digest);
}

void bind_layer(nb::module_& m) {
    nb::class_<LayerConfig>(m, "LayerConfig", "The numbers of one decoder layer.")
        .def(
            "__init__",
            [](LayerConfig* self, int q_heads, int kv_heads, int head_dim, int ffn_size, float sm_scale,
               const std::string& activation, int window, bool qkv_bias, bool out_bias, bool qk_norm, bool post_norms,
               float attn_softcap, const AnyArray& inv_freq, float rope_scale, bool rope_interleaved) {
                const auto frequencies = flat<float>(inv_freq, "inv_freq");
                new (self) LayerConfig{q_heads,
                                       kv_heads,
                                       head_dim,
                                       ffn_size,
                                       sm_scale,
                                       activation_argument(activation),
                                       window,
                                       qkv_bias,
                                       out_bias,
                                       qk_norm,
                                       post_norms,
                                       attn_softcap,
                                       {frequencies.begin(), frequencies.end()},
                                       rope_scale,
                                       rope_interleaved};
            },
            nb::kw_only(), nb::arg("q_heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("ffn_size"),
            nb::arg("sm_scale"), nb::arg("activation") = "silu", nb::arg("window") = 0, nb::arg("qkv_bias") = false,
            nb::arg("out_bias") = false, nb::arg("qk_norm") = false, nb::arg("post_norms") = false,
            nb::arg("attn_softcap") = 0.0f, nb::arg("inv_freq"), nb::arg("rope_scale") = 1.0f,
            nb::arg("rope_interleaved") = false);
}

}  // namespace

void bind_model(nb::module_& m) {
    bind_layer(m);
    nb::class_<Model> model(m, "Model", "A decoder: packed weights, threads and the executor.");
    model
        .def("__init__", &init_model, nb::kw_only(), nb::arg("vocab_size"), nb::arg("hidden_size"), nb::arg("norm_eps"),
             nb::arg("layers"), nb::arg("tied_head"), nb::arg("embed_scale") = 1.0f, nb::arg("logit_scale") = 1.0f,
             nb::arg("logit_softcap") = 0.0f, nb::arg("threads") = nb::none(), nb::arg("isa") = nb::none(),
             nb::arg("act") = "int8", nb::arg("kv") = "f16")
        .def("set_tensor", &set_tensor, nb::arg("name"), nb::arg("format"), nb::arg("rows"), nb::arg("cols"),
             nb::arg("data"), nb::arg("order") = nb::none())
        .def("takes_order", &takes_order, nb::arg("name"), nb::arg("format"), nb::arg("order") = nb::none())
        .def("finish", &Model::finish, nb::call_guard<nb::gil_scoped_release>())
        .def("execute", &execute, nb::arg("cache"), nb::arg("token_ids"), nb::arg("cu_seqlens_q"),
             nb::arg("context_lens"), nb::arg("block_tables"), nb::arg("logit_rows"),
             nb::arg("hidden_rows") = nb::none(), nb::arg("adapters") = std::vector<const BoundAdapter*>(),
             nb::arg("adapter_of") = nb::none())
        .def("copy_blocks", &copy_blocks, nb::arg("cache"), nb::arg("pairs"))
        .def("read_blocks", &read_blocks, nb::arg("cache"), nb::arg("ids"))
        .def("write_blocks", &write_blocks, nb::arg("cache"), nb::arg("ids"), nb::arg("data"))
        .def("weights_fingerprint", &weights_fingerprint)
        .def_prop_ro("isa", [](const Model& model) { return std::string(name(model.isa())); })
        .def_prop_ro("act", [](const Model& model) { return model.act_f32() ? "f32" : "int8"; })
        .def_prop_ro("threads", &Model::threads)
        .def_prop_ro("weight_bytes", &Model::weight_bytes)
        .def_prop_ro("cache_bytes_per_block",
                     [](const Model& self) { return KvCache::bytes_per_block(self.config(), self.kv_type()); });
    bind_sampling(m, model);
    nb::class_<BoundAdapter>(m, "Adapter", "Low-rank factors beside the matrices of one model.")
        .def(nb::init<const Model&, const std::string&>(), nb::arg("model"), nb::arg("format"), nb::keep_alive<1, 2>())
        .def("set_layer", &set_adapter_layer, nb::arg("layer"), nb::arg("factors"))
        .def("finish", [](BoundAdapter& self) { self.adapter.finish(); })
        .def_prop_ro("nbytes", [](const BoundAdapter& self) { return self.adapter.bytes(); });
    nb::class_<BoundCache>(m, "KvCache", "The paged keys and values of one model.")
        .def(nb::init<const Model&, int>(), nb::arg("model"), nb::arg("num_blocks"), nb::keep_alive<1, 2>())
        .def_prop_ro("num_blocks", [](const BoundCache& cache) { return cache.cache.num_blocks(); })
        .def_prop_ro("nbytes", [](const BoundCache& cache) { return cache.cache.bytes(); });
}

}  // namespace nybble
