// swiglu; kernels/swiglu.py has the formula. All tensors are dense and of one type.
#include "arguments.h"

#include "exp.h"

namespace unite_fast {
namespace {

UNITE_FAST_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

template <class T>
UNITE_FAST_INLINE void forward_row(Index width, const T* __restrict uw, T* __restrict out) {
#pragma omp simd
    for (Index i = 0; i < width; ++i) {
        const float u = load(uw[i]), w = load(uw[width + i]);
        store(u / (1.0f + exp_f32(-u)) * w, out[i]);
    }
}

template <class T>
UNITE_FAST_INLINE void backward_row(Index width, const T* __restrict d_out, const T* __restrict uw,
                                    T* __restrict d_uw) {
#pragma omp simd
    for (Index i = 0; i < width; ++i) {
        const float g = load(d_out[i]), u = load(uw[i]), w = load(uw[width + i]);
        const float s = sigmoid(u);
        store(g * w * (s * (1.0f + u * (1.0f - s))), d_uw[i]);
        store(g * (u * s), d_uw[width + i]);
    }
}

UNITE_FAST_PER_CPU void forward_row(Type type, Index row, Index width, const void* uw, void* out) {
    const Index from = row * 2 * width, to = row * width;
    if (type == Type::f32)
        forward_row(width, static_cast<const float*>(uw) + from, static_cast<float*>(out) + to);
    else
        forward_row(width, static_cast<const Bf16*>(uw) + from, static_cast<Bf16*>(out) + to);
}

UNITE_FAST_PER_CPU void backward_row(Type type, Index row, Index width, const void* d_out, const void* uw, void* d_uw) {
    const Index from = row * 2 * width, to = row * width;
    if (type == Type::f32)
        backward_row(width, static_cast<const float*>(d_out) + to, static_cast<const float*>(uw) + from,
                     static_cast<float*>(d_uw) + from);
    else
        backward_row(width, static_cast<const Bf16*>(d_out) + to, static_cast<const Bf16*>(uw) + from,
                     static_cast<Bf16*>(d_uw) + from);
}

// uw [rows, 2 width] -> out [rows, width].
void swiglu_forward(Type type, Index rows, Index width, const void* uw, void* out, int threads) {
    const int used = threads_for(rows * width, threads);
    (void)used;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index row = 0; row < rows; ++row) forward_row(type, row, width, uw, out);
}

void swiglu_backward(Type type, Index rows, Index width, const void* d_out, const void* uw, void* d_uw, int threads) {
    const int used = threads_for(rows * width, threads);
    (void)used;
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index row = 0; row < rows; ++row) backward_row(type, row, width, d_out, uw, d_uw);
}

}  // namespace

UNITE_FAST_FUNCTION(swiglu_forward) {
    const Type type = in.type();
    const Index rows = in.integer(), width = in.integer();
    const void* uw = in.address();
    void* out = in.address();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    swiglu_forward(type, rows, width, uw, out, threads);
}

UNITE_FAST_FUNCTION(swiglu_backward) {
    const Type type = in.type();
    const Index rows = in.integer(), width = in.integer();
    const void *d_out = in.address(), *uw = in.address();
    void* d_uw = in.address();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    swiglu_backward(type, rows, width, d_out, uw, d_uw, threads);
}

}  // namespace unite_fast
