#include "bindings/sampling.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <limits>

#include "bindings/check_step.h"
#include "bindings/convert.h"

namespace nybble {
namespace {

using OptionalArray = std::optional<AnyArray>;

// Keeps the arrays alive that the spans look into.
struct BoundEdits {
    OptionalArray allowed, banned_ids, bias_ids, bias, prompt_ids, output_ids;
    LogitEdits edits;
};

template <class T>
std::span<const T> flat_or_empty(const OptionalArray& array, const char* name) {
    return array.has_value() ? flat<T>(*array, name) : std::span<const T>();
}

void init_edits(BoundEdits* self, OptionalArray allowed, OptionalArray banned_ids, OptionalArray bias_ids,
                OptionalArray bias, float repetition_penalty, float presence_penalty, float frequency_penalty,
                OptionalArray prompt_ids, OptionalArray output_ids) {
    LogitEdits edits;
    edits.allowed = flat_or_empty<std::uint32_t>(allowed, "allowed");
    require(!allowed.has_value() || !edits.allowed.empty(), "allowed must not be empty");
    edits.banned = flat_or_empty<std::int32_t>(banned_ids, "banned_ids");
    edits.bias_ids = flat_or_empty<std::int32_t>(bias_ids, "bias_ids");
    edits.bias = flat_or_empty<float>(bias, "bias");
    require(edits.bias.size() == edits.bias_ids.size(), "bias must have one value for each of bias_ids");
    for (const float value : edits.bias) require(std::isfinite(value), "bias must be finite");
    require(std::isfinite(repetition_penalty) && repetition_penalty > 0,
            "repetition_penalty must be finite and above 0");
    require(std::isfinite(presence_penalty), "presence_penalty must be finite");
    require(std::isfinite(frequency_penalty), "frequency_penalty must be finite");
    edits.repetition = repetition_penalty;
    edits.presence = presence_penalty;
    edits.frequency = frequency_penalty;
    edits.prompt_ids = flat_or_empty<std::int32_t>(prompt_ids, "prompt_ids");
    edits.output_ids = flat_or_empty<std::int32_t>(output_ids, "output_ids");
    new (self) BoundEdits{std::move(allowed),
                          std::move(banned_ids),
                          std::move(bias_ids),
                          std::move(bias),
                          std::move(prompt_ids),
                          std::move(output_ids),
                          edits};
}

void check_edits(const LogitEdits& edits, int vocab) {
    const std::size_t words = (static_cast<std::size_t>(vocab) + 31) / 32;
    require(edits.allowed.empty() || edits.allowed.size() == words,
            "allowed must have " + std::to_string(words) + " words, not " + std::to_string(edits.allowed.size()));
    check_ids(edits.banned, vocab, "banned_ids");
    check_ids(edits.bias_ids, vocab, "bias_ids");
    check_ids(edits.prompt_ids, vocab, "prompt_ids");
    check_ids(edits.output_ids, vocab, "output_ids");
    require(edits.output_ids.size() < (std::size_t{1} << 30), "output_ids are too many to count");
}

std::span<const float> logit_rows(const Model& model, const AnyArray& logits) {
    const auto values = flat<float>(logits, "logits", 2);
    require(logits.shape(1) == static_cast<std::size_t>(model.config().vocab_size),
            "logits must have vocab_size columns, " + std::to_string(model.config().vocab_size));
    return values;
}

nb::list to_python(const std::vector<Sampled>& sampled) {
    nb::list result;
    for (const Sampled& one : sampled) {
        if (!one.ok) {
            result.append(nb::none());
            continue;
        }
        nb::list top;
        for (const TokenLogprob& token : one.top) top.append(nb::make_tuple(token.id, token.logprob));
        result.append(nb::make_tuple(one.token.id, one.token.logprob, one.rank, nb::tuple(top)));
    }
    return result;
}

nb::list sample(Model& model, const AnyArray& logits, const AnyArray& temperature, const AnyArray& top_k,
                const AnyArray& top_p, const AnyArray& min_p, const AnyArray& seed, const AnyArray& position,
                const AnyArray& top_logprobs, const std::optional<nb::list>& edits) {
    const auto values = logit_rows(model, logits);
    const auto temperatures = flat<float>(temperature, "temperature");
    const auto top_ks = flat<std::int32_t>(top_k, "top_k");
    const auto top_ps = flat<float>(top_p, "top_p");
    const auto min_ps = flat<float>(min_p, "min_p");
    const auto seeds = flat<std::uint64_t>(seed, "seed");
    const auto positions = flat<std::uint64_t>(position, "position");
    const auto counts = flat<std::int32_t>(top_logprobs, "top_logprobs");
    std::vector<SampleRow> rows(logits.shape(0));
    for (const std::size_t size : {temperatures.size(), top_ks.size(), top_ps.size(), min_ps.size(), seeds.size(),
                                   positions.size(), counts.size(), edits ? edits->size() : rows.size()}) {
        require(size == rows.size(), "every sampling parameter needs one value for each row of logits");
    }
    std::vector<nb::object> alive;  // another thread may change the list
    for (std::size_t i = 0; i < rows.size(); ++i) {
        rows[i] = {temperatures[i], top_ks[i], top_ps[i], min_ps[i], seeds[i], positions[i], counts[i], {}};
        require(temperatures[i] >= 0 && temperatures[i] <= std::numeric_limits<float>::max(),
                "temperature must be finite and not negative");
        require(top_ps[i] > 0 && top_ps[i] <= 1, "top_p must be above 0 and at most 1");
        require(min_ps[i] >= 0 && min_ps[i] <= 1, "min_p must be between 0 and 1");
        if (!edits) continue;
        nb::object one = (*edits)[i];
        if (one.is_none()) continue;
        const BoundEdits* bound = nullptr;
        require(nb::try_cast(one, bound) && bound != nullptr, "edits must hold LogitEdits or None");
        check_edits(bound->edits, model.config().vocab_size);
        rows[i].edits = bound->edits;
        alive.push_back(std::move(one));
    }
    std::vector<Sampled> drawn;
    {
        const nb::gil_scoped_release free_gil;
        drawn = model.sample(values.data(), rows);
    }
    return to_python(drawn);
}

void check_targets(const Model& model, std::span<const std::int32_t> targets, std::size_t rows, int top) {
    require(targets.size() == rows, "target_ids must have one id for each row");
    require(top >= 0, "top must not be negative");
    check_ids(targets, model.config().vocab_size, "target_ids");
}

nb::list score(Model& model, const AnyArray& logits, const AnyArray& target_ids, int top) {
    const auto values = logit_rows(model, logits);
    const auto targets = flat<std::int32_t>(target_ids, "target_ids");
    check_targets(model, targets, logits.shape(0), top);
    std::vector<Sampled> scored;
    {
        const nb::gil_scoped_release free_gil;
        scored = model.score(values.data(), targets, top);
    }
    return to_python(scored);
}

nb::list score_hidden(Model& model, const AnyArray& hidden, const AnyArray& target_ids, int top) {
    require(model.finished(), "the model is not complete: call finish() after the last tensor");
    const auto values = flat<float>(hidden, "hidden", 2);
    require(hidden.shape(1) == static_cast<std::size_t>(model.config().hidden_size),
            "hidden must have hidden_size columns, " + std::to_string(model.config().hidden_size));
    const auto targets = flat<std::int32_t>(target_ids, "target_ids");
    check_targets(model, targets, hidden.shape(0), top);
    std::vector<Sampled> scored;
    {
        const nb::gil_scoped_release free_gil;
        scored = model.score_hidden(values.data(), targets, top);
    }
    return to_python(scored);
}

}  // namespace

void bind_sampling(nb::module_& m, nb::class_<Model>& model) {
    nb::class_<BoundEdits>(m, "LogitEdits", "What a request does to one row of logits before a token is drawn.")
        .def("__init__", &init_edits, nb::kw_only(), nb::arg("allowed") = nb::none(),
             nb::arg("banned_ids") = nb::none(), nb::arg("bias_ids") = nb::none(), nb::arg("bias") = nb::none(),
             nb::arg("repetition_penalty") = 1.0f, nb::arg("presence_penalty") = 0.0f,
             nb::arg("frequency_penalty") = 0.0f, nb::arg("prompt_ids") = nb::none(),
             nb::arg("output_ids") = nb::none());
    model
        .def("sample", &sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"),
             nb::arg("min_p"), nb::arg("seed"), nb::arg("position"), nb::arg("top_logprobs"),
             nb::arg("edits") = nb::none())
        .def("score", &score, nb::arg("logits"), nb::arg("target_ids"), nb::arg("top"))
        .def("score_hidden", &score_hidden, nb::arg("hidden"), nb::arg("target_ids"), nb::arg("top"));
}

}  // namespace nybble
