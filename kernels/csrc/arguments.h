// Functions of the Python module unite_fast.kernels._native. A tensor arrives as plain integers (address, type,
// strides): converting tensor objects would cost more than a small op. All checks are made in Python, by the callers
// in kernels/*.py.
//
// An op defines its functions in its own file; `in` are the arguments (docs/adding-a-kernel.md has the whole example):
//
//     UNITE_FAST_FUNCTION(scale_shift_forward) {
//         ScaleShift op{};
//         op.size = in.size(), op.a = in.rows(), op.scale = in.vectors(), op.shift = in.vectors(), op.out = in.rows();
//         in.parallel_for(op.size.batch, op.size.elements(), [&](Index b) { run(op, b, false); });
//     }
#pragma once

#include <nanobind/nanobind.h>

#include "element.h"

namespace nb = nanobind;

namespace unite_fast {

// The arguments of a call, read in their order.
class Arguments {
public:
    explicit Arguments(const nb::args& args) : args_(args) {}

    Index integer() { return nb::cast<Index>(next()); }
    float number() { return nb::cast<float>(next()); }
    Type type() { return static_cast<Type>(integer()); }
    void* address() { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(integer())); }
    float* floats() { return static_cast<float*>(address()); }

    // Braced lists are evaluated from left to right.
    Size size() { return {integer(), integer(), integer()}; }
    Rows rows() { return {address(), type(), integer(), integer()}; }
    Vectors vectors() { return {address(), type(), integer()}; }
    Heads heads() { return {address(), integer(), integer(), integer()}; }

    // The number of threads is the last argument.
    int threads() {
        const auto count = static_cast<int>(integer());
        if (next_ != args_.size()) throw nb::value_error("wrong number of arguments");
        return count < 1 ? 1 : count;
    }

    // Reads the last argument and runs the op without the GIL: `parallel_for` of element.h.
    template <class Run>
    void parallel_for(Index tasks, Index elements, Run&& run) {
        const int count = threads();
        nb::gil_scoped_release release;
        unite_fast::parallel_for(tasks, elements, count, run);
    }

private:
    nb::handle next() {
        if (next_ >= args_.size()) throw nb::value_error("wrong number of arguments");
        return args_[next_++];
    }

    const nb::args& args_;
    std::size_t next_ = 0;
};

struct Function {
    const char* name;
    void (*run)(Arguments&);
};

// Adds a function to the module. Called before the import, to initialise a static variable; always true.
bool add_function(Function function);

}  // namespace unite_fast

#define UNITE_FAST_FUNCTION(name)                                                                       \
    static void name##_call(::unite_fast::Arguments& in);                                               \
    [[maybe_unused]] static const bool name##_added = ::unite_fast::add_function({#name, name##_call}); \
    static void name##_call(::unite_fast::Arguments& in)
