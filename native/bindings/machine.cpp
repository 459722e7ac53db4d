#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <vector>

#include "base/cpu_count.h"
#include "base/roofline.h"
#include "bindings/bindings.h"
#include "bindings/convert.h"

namespace nybble {

Isa isa_argument(const std::optional<std::string>& name_or_none) {
    if (!name_or_none) return detect_isa();
    const std::optional<Isa> isa = parse_isa(*name_or_none);
    require(isa.has_value(), "unknown instruction set '" + *name_or_none + "': use generic, avx2, avx512 or amx");
    require(supported(*isa), "this machine cannot run " + *name_or_none);
    return *isa;
}

namespace {

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa isa : kAllIsas) {
        if (supported(isa)) names.emplace_back(name(isa));
    }
    return names;
}

Roofline roofline(int threads, const std::optional<std::string>& isa_name) {
    require(threads >= 1, "threads must be at least 1, not " + std::to_string(threads));
    const Isa isa = isa_argument(isa_name);
    const nb::gil_scoped_release free_gil;
    return measure_roofline(isa, threads);
}

}  // namespace

void bind_machine(nb::module_& m) {
    m.def("isa", [] { return std::string(name(detect_isa())); }, "The fastest instruction set of this machine.");
    m.def("available_isas", &available_isas, "The instruction sets that this machine can run, slowest first.");
    m.def("default_threads", &default_threads, "Physical cores that this process may use.");
    m.def(
        "measure_read_bandwidth",
        [](int threads, const std::optional<std::string>& isa) { return roofline(threads, isa).read_gb_per_s; },
        nb::arg("threads"), nb::arg("isa") = nb::none(), "1e9 bytes read from memory per second.");
    m.def(
        "measure_int8_peak",
        [](int threads, const std::optional<std::string>& isa) { return roofline(threads, isa).int8_gops; },
        nb::arg("threads"), nb::arg("isa") = nb::none(), "1e9 8-bit multiplications and additions per second.");
}

}  // namespace nybble
