#include "quant/encode.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "base/cpu_count.h"
#include "base/thread_pool.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"

namespace nybble {
namespace {

constexpr int kMaxThreads = 4096;

// Keeps its threads between tensors.
class Encoder {
public:
    Encoder(std::optional<int> threads, const std::optional<std::string>& isa)
        : isa_(isa_argument(isa)), pool_(checked(threads.value_or(default_threads()))) {}

    int threads() const { return pool_.size(); }

    // out is written in place; the return value is the first row with a NaN, an infinity or too large a weight, or -1.
    std::int64_t encode_into(const std::string& to, const std::string& from, nb::handle source, std::int64_t rows,
                             std::int64_t cols,
                             const nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& out,
                             const std::optional<AnyArray>& importance) {
        const Format to_format = format_argument(to), from_format = format_argument(from);
        require(can_encode(to_format), "there is no encoder for " + to);
        require(rows >= 1 && cols >= 1 && cols <= std::int64_t{1} << 32, "rows and cols must be at least 1");
        for (const Format format : {to_format, from_format}) {
            require(
                cols % info(format).block_size == 0,
                std::to_string(cols) + " weights in a row are not whole blocks of " + std::string(info(format).name));
        }
        const Bytes bytes(source);
        const auto columns = static_cast<std::size_t>(cols);
        const std::size_t in_row = row_bytes(from_format, columns), out_row = row_bytes(to_format, columns);
        require(bytes.span().size() / in_row == static_cast<std::size_t>(rows) && bytes.span().size() % in_row == 0,
                "the source does not fit the shape");
        require(out.size() / out_row == static_cast<std::size_t>(rows) && out.size() % out_row == 0,
                "out does not fit the shape");
        EncodeTask task{from_format, bytes.span().data(), rows, cols, to_format, nullptr, out.data()};
        if (importance.has_value()) {
            const std::span<const float> values = flat<float>(*importance, "importance");
            require(values.size() == columns, "importance must have one number per column");
            task.importance = values.data();
        }
        const nb::gil_scoped_release free_gil;
        return encode(task, pool_, isa_);
    }

private:
    static int checked(int threads) {
        require(threads >= 1 && threads <= kMaxThreads, "threads must be 1 to " + std::to_string(kMaxThreads));
        return threads;
    }

    Isa isa_;
    ThreadPool pool_;
};

}  // namespace

void bind_encode(nb::module_& m) {
    nb::class_<Encoder>(m, "Encoder", "Encodes rows of weights as the blocks of GGUF files, on its own threads.")
        .def(nb::init<std::optional<int>, const std::optional<std::string>&>(), nb::kw_only(),
             nb::arg("threads") = nb::none(), nb::arg("isa") = nb::none())
        .def_prop_ro("threads", &Encoder::threads)
        .def("encode_into", &Encoder::encode_into, nb::kw_only(), nb::arg("to"), nb::arg("source_format"),
             nb::arg("source"), nb::arg("rows"), nb::arg("cols"), nb::arg("out"), nb::arg("importance") = nb::none(),
             "Writes the encoded rows to `out` and returns the first row that has a NaN, an infinity or too large a "
             "weight, or -1.");
}

}  // namespace nybble
