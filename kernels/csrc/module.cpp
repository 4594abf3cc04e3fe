// The Python module unite_fast.kernels._native. Callers go through kernels/native.py, which takes torch tensors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <vector>

#include "arguments.h"
#include "philox.h"

namespace unite_fast {

static std::vector<Function>& functions() {
    static std::vector<Function> all;
    return all;
}

bool add_function(Function function) {
    functions().push_back(function);
    return true;
}

}  // namespace unite_fast

namespace {

constexpr std::int64_t kWord = std::int64_t{1} << 32;

using Positions = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Draw = void (*)(const unite_fast::PhiloxDraw&, const std::int64_t*, std::int64_t, std::int64_t, T*, int);

template <class T, Draw<T> kDraw>
void philox(std::uint64_t seed, std::uint32_t step, std::uint16_t stream, std::uint16_t draw, Positions positions,
            std::int64_t elements, Out<T> out, int threads) {
    const auto samples = static_cast<std::int64_t>(positions.shape(0));
    // A block's number is one counter word, so a sample has at most 2**32 blocks of 4 elements.
    if (elements < 0 || elements > kWord * 4) throw nb::value_error("philox: elements must be in [0, 2**34]");
    const std::int64_t blocks = (elements + 3) / 4;
    if (static_cast<std::int64_t>(out.shape(0)) != samples || static_cast<std::int64_t>(out.shape(1)) != blocks * 4)
        throw nb::value_error("philox: out must be [len(positions), ceil(elements / 4) * 4]");
    for (std::int64_t i = 0; i < samples; ++i)
        if (positions(i) < 0) throw nb::value_error("philox: positions must not be negative");

    const unite_fast::PhiloxDraw philox_draw{seed, step, static_cast<std::uint32_t>(stream) << 16 | draw};
    const std::int64_t* from = positions.data();
    T* to = out.data();
    nb::gil_scoped_release release;
    kDraw(philox_draw, from, samples, blocks, to, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    using namespace nb::literals;
    m.def("philox_words", &philox<std::int64_t, unite_fast::philox_words>, "seed"_a, "step"_a, "stream"_a, "draw"_a,
          "positions"_a.noconvert(), "elements"_a, "out"_a.noconvert(), "threads"_a = 1,
          "Write the words of unite_fast.randomness.Philox.words into out, int64 [b, ceil(elements / 4) * 4].");
    m.def("philox_normals", &philox<float, unite_fast::philox_normals>, "seed"_a, "step"_a, "stream"_a, "draw"_a,
          "positions"_a.noconvert(), "elements"_a, "out"_a.noconvert(), "threads"_a = 1,
          "Write the normals of unite_fast.randomness.Philox.normal into out, float32 [b, ceil(elements / 4) * 4].");
    for (const auto& function : unite_fast::functions())
        m.def(function.name, [run = function.run](const nb::args& args) {
            unite_fast::Arguments in(args);
            run(in);
        });
    m.attr("sources") = UNITE_FAST_SOURCES;  // the hash that CMake makes of these files
}
