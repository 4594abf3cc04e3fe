#include "qk_norm_rope.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

// A head is so short that its loops pay only where their length is known at compile time: `K` below is the head
// dimension, or 0 for one that is not in the list of `with_head_dim`, which calls f with it as a type.
template <int K>
struct HeadDim {
    static constexpr int value = K;
};

template <class F>
UNITE_FAST_INLINE void with_head_dim(Index dim, F&& f) {
    switch (dim) {
        case 16: return f(HeadDim<16>{});
        case 32: return f(HeadDim<32>{});
        case 64: return f(HeadDim<64>{});
        default: return f(HeadDim<0>{});
    }
}

// Position of (token, part, head) in `inverse`.
UNITE_FAST_INLINE Index inverse_at(const QkNormRope& op, Index b, Index t, int part, Index head) {
    return ((b * op.tokens + t) * 2 + part) * op.heads + head;
}

template <class T, int K>
UNITE_FAST_INLINE void forward_head(const QkNormRope& op, Index t, const T* __restrict x,
                                    const float* __restrict weight, float* inverse, T* __restrict out) {
    const Index dim = K ? K : op.head_dim, half = dim / 2;
    const float* __restrict cos = op.cos + t * half;
    const float* __restrict sin = op.sin + t * half;
    if (!weight) {
#pragma omp simd
        for (Index i = 0; i < half; ++i) {
            const float even = load(x[2 * i]), odd = load(x[2 * i + 1]);
            store(even * cos[i] - odd * sin[i], out[2 * i]);
            store(odd * cos[i] + even * sin[i], out[2 * i + 1]);
        }
        return;
    }
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (Index i = 0; i < dim; ++i) squares += load(x[i]) * load(x[i]);
    const float r = inverse_rms(squares, dim, op.eps);
    *inverse = r;
#pragma omp simd
    for (Index i = 0; i < half; ++i) {
        const float even = load(x[2 * i]) * r * weight[2 * i], odd = load(x[2 * i + 1]) * r * weight[2 * i + 1];
        store(even * cos[i] - odd * sin[i], out[2 * i]);
        store(odd * cos[i] + even * sin[i], out[2 * i + 1]);
    }
}

UNITE_FAST_PER_CPU void forward_chunk(const QkNormRope& op, const Heads& q, const Heads& k, Index b, Index begin,
                                      Index end) {
    with_type(op.qkv.type, [&](auto type) UNITE_FAST_INLINE_LAMBDA {
        with_head_dim(op.head_dim, [&](auto head_dim) UNITE_FAST_INLINE_LAMBDA {
            using T = decltype(type);
            constexpr int K = decltype(head_dim)::value;
            for (Index t = begin; t < end; ++t) {
                const T* x = op.qkv.row<T>(b, t);
                for (int part = 0; part < 2; ++part) {
                    const float* weight = part ? op.k_weight : op.q_weight;
                    for (Index head = 0; head < op.heads; ++head, x += op.head_dim)
                        forward_head<T, K>(op, t, x, weight, op.inverse + inverse_at(op, b, t, part, head),
                                           (part ? k : q).row<T>(b, head, t));
                }
            }
        });
    });
}

// With n = x / rms(x) and a the gradient of n, which is what the rotation passes back, `turned`, times the weight, the
// norm passes back (a - n mean(a n)) / rms(x). Adds turned n, the gradient of the weight, to `sum`.
template <class T, int K>
UNITE_FAST_INLINE void backward_head(const QkNormRope& op, Index t, const T* __restrict g, const T* __restrict x,
                                     const float* __restrict weight, float r, T* __restrict out,
                                     float* __restrict sum, float* __restrict turned) {
    const Index dim = K ? K : op.head_dim, half = dim / 2;
    const float* __restrict cos = op.cos + t * half;
    const float* __restrict sin = op.sin + t * half;
    if (!weight) {
#pragma omp simd
        for (Index i = 0; i < half; ++i) {
            const float even = load(g[2 * i]), odd = load(g[2 * i + 1]);
            store(even * cos[i] + odd * sin[i], out[2 * i]);
            store(odd * cos[i] - even * sin[i], out[2 * i + 1]);
        }
        return;
    }
#pragma omp simd
    for (Index i = 0; i < half; ++i) {
        const float even = load(g[2 * i]), odd = load(g[2 * i + 1]);
        turned[2 * i] = even * cos[i] + odd * sin[i];
        turned[2 * i + 1] = odd * cos[i] - even * sin[i];
    }
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (Index i = 0; i < dim; ++i) {
        const float product = turned[i] * (load(x[i]) * r);
        sum[i] += product;
        dot += product * weight[i];
    }
    const float mean = dot / static_cast<float>(dim);
#pragma omp simd
    for (Index i = 0; i < dim; ++i) store(r * (turned[i] * weight[i] - load(x[i]) * r * mean), out[i]);
}

// Gradients of the tokens from begin to end, at most kBlock; adds their sums over all heads to partial [2, K]. Until
// then each head has a sum of its own: no head need wait for the one before. Needs 2 H + 1 heads of scratch.
template <class T, int K>
UNITE_FAST_INLINE void backward_block(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                                      const Rows& d_qkv, Index b, Index begin, Index end, float* partial,
                                      float* scratch) {
    const Index dim = K ? K : op.head_dim, all = 2 * op.heads * dim;
    float *sums = scratch, *turned = scratch + all;
    std::fill_n(sums, all, 0.0f);
    for (Index t = begin; t < end; ++t) {
        const T* x = op.qkv.row<T>(b, t);
        T* out = d_qkv.row<T>(b, t);
        float* sum = sums;
        for (int part = 0; part < 2; ++part)
            for (Index head = 0; head < op.heads; ++head, x += dim, out += dim, sum += dim) {
                const float* weight = part ? op.k_weight : op.q_weight;
                const float r = weight ? op.inverse[inverse_at(op, b, t, part, head)] : 0.0f;
                backward_head<T, K>(op, t, (part ? d_k : d_q).row<T>(b, head, t), x, weight, r, out, sum, turned);
            }
        for (Index head = 0; head < op.heads; ++head, out += dim) std::copy_n(d_v.row<T>(b, head, t), dim, out);
    }
    for (Index i = 0; i < 2 * op.heads; ++i) add_row(sums + i * dim, dim, partial + i / op.heads * dim);
}

UNITE_FAST_PER_CPU void backward_chunk(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                                       const Rows& d_qkv, Index b, Index begin, Index end, float* partial,
                                       float* scratch) {
    std::fill_n(partial, 2 * op.head_dim, 0.0f);
    with_type(op.qkv.type, [&](auto type) UNITE_FAST_INLINE_LAMBDA {
        with_head_dim(op.head_dim, [&](auto head_dim) UNITE_FAST_INLINE_LAMBDA {
            for (Index from = begin; from < end; from += kBlock)
                backward_block<decltype(type), decltype(head_dim)::value>(
                    op, d_q, d_k, d_v, d_qkv, b, from, std::min(from + kBlock, end), partial, scratch);
        });
    });
}

UNITE_FAST_PER_CPU void sum_tasks(float* partial, Index tasks, Index dim, float* d_q_weight, float* d_k_weight) {
    sum_rows(partial, tasks, 2 * dim, dim, d_q_weight);
    sum_rows(partial + dim, tasks, 2 * dim, dim, d_k_weight);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRope& op, const Heads& q, const Heads& k, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks;
    const int used = threads_for(op.batch * op.tokens * op.heads * op.head_dim, threads);
    (void)used;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        forward_chunk(op, q, k, task / chunks, begin, end);
    }
}

void qk_norm_rope_backward(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                           const Rows& d_qkv, float* d_q_weight, float* d_k_weight, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks, dim = op.head_dim;
    const Index scratch_size = (2 * op.heads + 1) * dim;
    const int used = threads_for(op.batch * op.tokens * op.heads * dim, threads);
    const std::unique_ptr<float[]> scratch(new float[used * scratch_size]);
    const std::unique_ptr<float[]> partial(new float[tasks * 2 * dim]);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        backward_chunk(op, d_q, d_k, d_v, d_qkv, task / chunks, begin, end, partial.get() + task * 2 * dim,
                       scratch.get() + thread_number() * scratch_size);
    }
    if (op.q_weight) sum_tasks(partial.get(), tasks, dim, d_q_weight, d_k_weight);
}

}  // namespace unite_fast
