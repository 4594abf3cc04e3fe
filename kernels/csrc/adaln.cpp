// adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln; kernels/adaln.py has the formulas. Weights and
// all tensors [D] or [B, T] are dense float32.
#include "arguments.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

// x_out = x, or if gated x + gate * branch, or if normed too rms_norm of that;
// h = rms_norm(x_out) * weight * (1 + scale) + shift.
struct AdalnForward {
    Size size;
    float eps;
    // They select the op; fields that only the other ops have are unused. Null pointers could not select it: the
    // address of a tensor without elements is null too.
    bool gated, normed;
    Rows x, branch;
    Vectors gate;
    const float* norm_weight;
    const float* weight;
    Vectors shift, scale;
    Rows x_out, h;     // x_out only if gated
    float* norm_rstd;  // [B, T], 1 / rms(x + gate * branch)
    float* rstd;       // [B, T], 1 / rms(x_out)
};

// x is the forward's x if normed, else its x_out.
struct AdalnBackward {
    Size size;
    bool gated, normed;
    Rows d_x_out, d_h;
    Rows x, branch;
    Vectors gate;
    const float* norm_weight;
    const float* weight;
    Vectors scale;
    const float* norm_rstd;
    const float* rstd;
    Rows d_x, d_branch;
    Vectors d_gate, d_shift, d_scale;
    float* d_norm_weight;
    float* d_weight;
};

// Below, a row is the D channels of one token, `factor` is weight (1 + scale) of its sample, and scratch rows are
// float32. `omp simd` tells the compiler that the rows of a loop do not overlap and that it may sum in lanes.

// The forward pass --------------------------------------------------------------------------------------------------

constexpr Index kForwardScratch = 4;  // rows

// Each of these three fills y with x_out and returns the sum of its squares. It sums the rounded numbers, because those
// are what the next op reads.

template <class X>
UNITE_FAST_INLINE float read(const AdalnForward& op, Index b, Index t, float* __restrict y) {
    const X* __restrict x = op.x.row<X>(b, t);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < op.size.width; ++i) {
        y[i] = load(x[i]);
        squares += y[i] * y[i];
    }
    return squares;
}

template <class X, class B>
UNITE_FAST_INLINE float add(const AdalnForward& op, Index b, Index t, const float* __restrict gate,
                            float* __restrict y) {
    const X* __restrict x = op.x.row<X>(b, t);
    const B* __restrict branch = op.branch.row<B>(b, t);
    X* __restrict x_out = op.x_out.row<X>(b, t);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < op.size.width; ++i) {
        store(load(x[i]) + gate[i] * load(branch[i]), x_out[i]);
        y[i] = load(x_out[i]);
        squares += y[i] * y[i];
    }
    return squares;
}

template <class X, class B>
UNITE_FAST_INLINE float add_and_norm(const AdalnForward& op, Index b, Index t, const float* __restrict gate,
                                     float* __restrict y) {
    const Index d = op.size.width;
    const X* __restrict x = op.x.row<X>(b, t);
    const B* __restrict branch = op.branch.row<B>(b, t);
    X* __restrict x_out = op.x_out.row<X>(b, t);
    const float* __restrict norm_weight = op.norm_weight;
    float sum_squares = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum_squares)
    for (Index i = 0; i < d; ++i) {
        y[i] = load(x[i]) + gate[i] * load(branch[i]);
        sum_squares += y[i] * y[i];
    }
    const float r = rms_rstd(sum_squares, d, op.eps);
    op.norm_rstd[b * op.size.tokens + t] = r;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < d; ++i) {
        store(y[i] * r * norm_weight[i], x_out[i]);
        y[i] = load(x_out[i]);
        squares += y[i] * y[i];
    }
    return squares;
}

UNITE_FAST_INLINE float residual(const AdalnForward& op, Index b, Index t, const float* gate, float* y) {
    float squares = 0.0f;
    with_type(op.x.type, [&](auto x) UNITE_FAST_INLINE_LAMBDA {
        using X = decltype(x);
        if (!op.gated) {
            squares = read<X>(op, b, t, y);
            return;
        }
        with_type(op.branch.type, [&](auto branch) UNITE_FAST_INLINE_LAMBDA {
            using B = decltype(branch);
            squares = op.normed ? add_and_norm<X, B>(op, b, t, gate, y) : add<X, B>(op, b, t, gate, y);
        });
    });
    return squares;
}

template <class H>
UNITE_FAST_INLINE void modulate(const AdalnForward& op, Index b, Index t, float squares, const float* __restrict y,
                                const float* __restrict factor, const float* __restrict shift) {
    const Index d = op.size.width;
    const float r = rms_rstd(squares, d, op.eps);
    op.rstd[b * op.size.tokens + t] = r;
    H* __restrict h = op.h.row<H>(b, t);
#pragma omp simd
    for (Index i = 0; i < d; ++i) store(y[i] * r * factor[i] + shift[i], h[i]);
}

UNITE_FAST_INLINE void read_factor(const float* __restrict weight, const Vectors& scale, Index b, Index d,
                                   float* __restrict factor) {
    scale.read(b, d, factor);
#pragma omp simd
    for (Index i = 0; i < d; ++i) factor[i] = weight[i] * (1.0f + factor[i]);
}

UNITE_FAST_PER_CPU void forward_chunk(const AdalnForward& op, Index b, Index begin, Index end, float* scratch) {
    const Index d = op.size.width;
    float *y = scratch, *factor = scratch + d, *shift = scratch + 2 * d, *gate = scratch + 3 * d;
    read_factor(op.weight, op.scale, b, d, factor);
    op.shift.read(b, d, shift);
    if (op.gated) op.gate.read(b, d, gate);
    // Types are looked up row by row: one lookup for all rows would need a copy of each loop for every three types.
    for (Index t = begin; t < end; ++t) {
        const float squares = residual(op, b, t, gate, y);
        with_type(op.h.type, [&](auto h) UNITE_FAST_INLINE_LAMBDA {
            modulate<decltype(h)>(op, b, t, squares, y, factor, shift);
        });
    }
}

// The backward pass -------------------------------------------------------------------------------------------------
//
// With n = x / rms(x) and a the gradient of n, the gradient of x is (a - n mean(a n)) / rms(x). In the modulated norm
// a = d_h factor. Each chunk of tokens sums four products, the rows of `Partial`:
//   kShift   d_h               d_shift itself
//   kScale   d_h n             d_scale = weight times it, d_weight = sum over samples of (1 + scale) times it
//   kGate    d_x branch        d_gate itself
//   kNorm    d_x_out n         d_norm_weight = sum over samples; d_x_out with the gradient of h, n of the first norm

enum Partial : Index { kShift, kScale, kGate, kNorm, kPartials };

constexpr Index kBackwardScratch = 4 + kPartials;  // rows

// Adds d_h and d_h n to their sums and returns the sum of a n.
template <class X, class H>
UNITE_FAST_INLINE float sum_modulation(const X* __restrict x, float r, const H* __restrict d_h,
                                       const float* __restrict factor, Index d, float* __restrict partial) {
    float* __restrict sum_shift = partial + kShift * d;
    float* __restrict sum_scale = partial + kScale * d;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (Index i = 0; i < d; ++i) {
        const float g = load(d_h[i]), product = g * (load(x[i]) * r);
        sum_shift[i] += g;
        sum_scale[i] += product;
        dot += product * factor[i];
    }
    return dot;
}

template <class X, class H>
UNITE_FAST_INLINE void plain_row(const AdalnBackward& op, Index b, Index t, const float* __restrict factor,
                                 float* partial) {
    const Index d = op.size.width;
    const X* __restrict x = op.x.row<X>(b, t);
    const H* __restrict d_h = op.d_h.row<H>(b, t);
    X* __restrict d_x = op.d_x.row<X>(b, t);
    const float r = op.rstd[b * op.size.tokens + t];
    const float mean = sum_modulation(x, r, d_h, factor, d, partial) / static_cast<float>(d);
#pragma omp simd
    for (Index i = 0; i < d; ++i) store(r * (load(d_h[i]) * factor[i] - load(x[i]) * r * mean), d_x[i]);
}

template <class X, class B, class H>
UNITE_FAST_INLINE void gated_row(const AdalnBackward& op, Index b, Index t, const float* __restrict factor,
                                 const float* __restrict gate, float* partial) {
    const Index d = op.size.width;
    const X* __restrict x = op.x.row<X>(b, t);
    const B* __restrict branch = op.branch.row<B>(b, t);
    const X* __restrict d_x_out = op.d_x_out.row<X>(b, t);
    const H* __restrict d_h = op.d_h.row<H>(b, t);
    X* __restrict d_x = op.d_x.row<X>(b, t);
    B* __restrict d_branch = op.d_branch.row<B>(b, t);
    float* __restrict sum_gate = partial + kGate * d;
    const float r = op.rstd[b * op.size.tokens + t];
    const float mean = sum_modulation(x, r, d_h, factor, d, partial) / static_cast<float>(d);
#pragma omp simd
    for (Index i = 0; i < d; ++i) {
        const float total = load(d_x_out[i]) + r * (load(d_h[i]) * factor[i] - load(x[i]) * r * mean);
        store(total, d_x[i]);
        store(total * gate[i], d_branch[i]);
        sum_gate[i] += total * load(branch[i]);
    }
}

// Needs 2 rows of scratch.
template <class X, class B, class H>
UNITE_FAST_INLINE void normed_row(const AdalnBackward& op, Index b, Index t, const float* __restrict factor,
                                  const float* __restrict gate, float* partial, float* scratch) {
    const Index d = op.size.width;
    const X* __restrict x = op.x.row<X>(b, t);
    const B* __restrict branch = op.branch.row<B>(b, t);
    const X* __restrict d_x_out = op.d_x_out.row<X>(b, t);
    const H* __restrict d_h = op.d_h.row<H>(b, t);
    X* __restrict d_x = op.d_x.row<X>(b, t);
    B* __restrict d_branch = op.d_branch.row<B>(b, t);
    const float* __restrict norm_weight = op.norm_weight;
    float* __restrict sum_gate = partial + kGate * d;
    float* __restrict sum_norm = partial + kNorm * d;
    float* __restrict n = scratch;      // of the first norm
    float* __restrict y = scratch + d;  // x_out, rounded as the forward pass did; then the gradient of n
    const float norm_r = op.norm_rstd[b * op.size.tokens + t], r = op.rstd[b * op.size.tokens + t];
#pragma omp simd
    for (Index i = 0; i < d; ++i) {
        n[i] = (load(x[i]) + gate[i] * load(branch[i])) * norm_r;
        y[i] = round_to<X>(n[i] * norm_weight[i]);
    }
    const float mean = sum_modulation(y, r, d_h, factor, d, partial) / static_cast<float>(d);
    float norm_dot = 0.0f;
#pragma omp simd reduction(+ : norm_dot)
    for (Index i = 0; i < d; ++i) {
        const float total = load(d_x_out[i]) + r * (load(d_h[i]) * factor[i] - y[i] * r * mean);
        sum_norm[i] += total * n[i];
        y[i] = total * norm_weight[i];
        norm_dot += y[i] * n[i];
    }
    const float norm_mean = norm_dot / static_cast<float>(d);
#pragma omp simd
    for (Index i = 0; i < d; ++i) {
        const float total = norm_r * (y[i] - n[i] * norm_mean);
        store(total, d_x[i]);
        store(total * gate[i], d_branch[i]);
        sum_gate[i] += total * load(branch[i]);
    }
}

UNITE_FAST_INLINE Index partials_of(const AdalnBackward& op) {
    return op.normed ? kPartials : op.gated ? kNorm : kGate;
}

UNITE_FAST_INLINE void backward_row(const AdalnBackward& op, Index b, Index t, const float* factor, const float* gate,
                                    float* sums, float* scratch) {
    with_types(op.x.type, op.d_h.type, [&](auto x, auto h) UNITE_FAST_INLINE_LAMBDA {
        using X = decltype(x);
        using H = decltype(h);
        if (!op.gated) {
            plain_row<X, H>(op, b, t, factor, sums);
            return;
        }
        with_type(op.branch.type, [&](auto branch) UNITE_FAST_INLINE_LAMBDA {
            using B = decltype(branch);
            if (op.normed)
                normed_row<X, B, H>(op, b, t, factor, gate, sums, scratch);
            else
                gated_row<X, B, H>(op, b, t, factor, gate, sums);
        });
    });
}

UNITE_FAST_PER_CPU void backward_chunk(const AdalnBackward& op, Index b, Index begin, Index end, float* partial,
                                       float* scratch) {
    const Index d = op.size.width;
    float *factor = scratch, *gate = scratch + d, *rows = scratch + 2 * d, *sums = scratch + 4 * d;
    read_factor(op.weight, op.scale, b, d, factor);
    if (op.gated) op.gate.read(b, d, gate);
    Index from = begin;
    do {
        const Index to = std::min(from + kBlock, end);
        float* into = from == begin ? partial : sums;
        std::fill_n(into, partials_of(op) * d, 0.0f);
        for (Index t = from; t < to; ++t) backward_row(op, b, t, factor, gate, into, rows);
        if (into != partial) add_row(sums, partials_of(op) * d, partial);
        from = to;
    } while (from < end);
}

// Adds up the chunks of sample b and writes its gradients. Leaves the sample's part of the gradients of weights in the
// first chunk: d_weight in kScale, d_norm_weight in kNorm.
UNITE_FAST_PER_CPU void finish_sample(const AdalnBackward& op, Index b, float* partial, float* scratch) {
    const Index d = op.size.width, chunks = chunks_of(op.size.tokens);
    for (Index c = 1; c < chunks; ++c) add_row(partial + c * kPartials * d, partials_of(op) * d, partial);
    op.d_shift.write(b, d, partial + kShift * d);
    if (op.gated) op.d_gate.write(b, d, partial + kGate * d);
    float* __restrict scale = scratch;
    float* __restrict d_scale = scratch + d;
    float* __restrict sum_scale = partial + kScale * d;
    const float* __restrict weight = op.weight;
    op.scale.read(b, d, scale);
#pragma omp simd
    for (Index i = 0; i < d; ++i) {
        d_scale[i] = weight[i] * sum_scale[i];
        sum_scale[i] *= 1.0f + scale[i];
    }
    op.d_scale.write(b, d, d_scale);
}

UNITE_FAST_PER_CPU void sum_samples(float* partial, Index samples, Index stride, Index d, float* out) {
    sum_rows(partial, samples, stride, d, out);
}

void adaln_forward(const AdalnForward& op, int threads) {
    const Index tokens = op.size.tokens, chunks = chunks_of(tokens), elements = op.size.elements();
    const Index scratch_size = kForwardScratch * op.size.width;
    const std::unique_ptr<float[]> scratch(new float[threads_for(elements, threads) * scratch_size]);
    parallel_for(op.size.batch * chunks, elements, threads, [&](Index task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, tokens);
        forward_chunk(op, task / chunks, begin, end, scratch.get() + thread_number() * scratch_size);
    });
}

void adaln_backward(const AdalnBackward& op, int threads) {
    const Index batch = op.size.batch, tokens = op.size.tokens, width = op.size.width;
    const Index chunks = chunks_of(tokens), tasks = batch * chunks;
    const Index scratch_size = kBackwardScratch * width, partial_size = kPartials * width;
    const Index stride = chunks * partial_size, elements = op.size.elements();
    const std::unique_ptr<float[]> scratch(new float[threads_for(elements, threads) * scratch_size]);
    const std::unique_ptr<float[]> partial(new float[tasks * partial_size]);
    parallel_for(tasks, elements, threads, [&](Index task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, tokens);
        backward_chunk(op, task / chunks, begin, end, partial.get() + task * partial_size,
                       scratch.get() + thread_number() * scratch_size);
    });
    parallel_for(batch, elements, threads, [&](Index b) {
        finish_sample(op, b, partial.get() + b * stride, scratch.get() + thread_number() * scratch_size);
    });
    sum_samples(partial.get() + kScale * width, batch, stride, width, op.d_weight);
    if (op.normed) sum_samples(partial.get() + kNorm * width, batch, stride, width, op.d_norm_weight);
}

}  // namespace

// The rstd of one norm is a tensor [B, T], of two norms [2, B, T].
template <bool kNormed>
static float* rstd(Arguments& in) {
    return static_cast<float*>(kNormed ? in.rows().data : in.vectors().data);
}

// Inputs, then outputs, in the order of the op, without those that it does not have.
template <bool kGated, bool kNormed>
static void forward(Arguments& in) {
    AdalnForward op{};
    op.size = in.size();
    op.gated = kGated;
    op.normed = kNormed;
    op.x = in.rows();
    if (kGated) op.branch = in.rows(), op.gate = in.vectors();
    if (kNormed) op.norm_weight = in.floats();
    op.weight = in.floats();
    op.shift = in.vectors();
    op.scale = in.vectors();
    op.eps = in.number();
    if (kGated) op.x_out = in.rows();
    op.h = in.rows();
    op.rstd = rstd<kNormed>(in);
    if (kNormed) op.norm_rstd = op.rstd + op.size.batch * op.size.tokens;
    const int threads = in.threads();
    nb::gil_scoped_release release;
    adaln_forward(op, threads);
}

template <bool kGated, bool kNormed>
static void backward(Arguments& in) {
    AdalnBackward op{};
    op.size = in.size();
    op.gated = kGated;
    op.normed = kNormed;
    if (kGated) op.d_x_out = in.rows();
    op.d_h = in.rows();
    op.x = in.rows();
    if (kGated) op.branch = in.rows(), op.gate = in.vectors();
    if (kNormed) op.norm_weight = in.floats();
    op.weight = in.floats();
    op.scale = in.vectors();
    op.rstd = rstd<kNormed>(in);
    if (kNormed) op.norm_rstd = op.rstd + op.size.batch * op.size.tokens;
    op.d_x = in.rows();
    if (kGated) op.d_branch = in.rows(), op.d_gate = in.vectors();
    if (kNormed) op.d_norm_weight = in.floats();
    op.d_weight = in.floats();
    op.d_shift = in.vectors();
    op.d_scale = in.vectors();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    adaln_backward(op, threads);
}

UNITE_FAST_FUNCTION(adaln_modulate_forward) { forward<false, false>(in); }
UNITE_FAST_FUNCTION(adaln_modulate_backward) { backward<false, false>(in); }
UNITE_FAST_FUNCTION(gated_residual_adaln_forward) { forward<true, false>(in); }
UNITE_FAST_FUNCTION(gated_residual_adaln_backward) { backward<true, false>(in); }
UNITE_FAST_FUNCTION(gated_residual_norm_adaln_forward) { forward<true, true>(in); }
UNITE_FAST_FUNCTION(gated_residual_norm_adaln_backward) { backward<true, true>(in); }

}  // namespace unite_fast
