#include "qk_norm_rope.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

// A head is a short row, so that its loops pay only where their length is known at compile time: `K` is the head dimension,
// or 0 for one that is not among those below.
template <class T, int K>
UNITE_FAST_INLINE void forward_chunk(const QkNormRope& op, const Heads& q, const Heads& k, Index b, Index begin,
                                     Index end) {
    const Index dim = K ? K : op.head_dim, half = dim / 2;
    for (Index t = begin; t < end; ++t) {
        const T* __restrict x = op.qkv.row<T>(b, t);
        const float* __restrict cos = op.cos + t * half;
        const float* __restrict sin = op.sin + t * half;
        for (int part = 0; part < 2; ++part) {
            const float* __restrict weight = part ? op.k_weight : op.q_weight;
            for (Index head = 0; head < op.heads; ++head, x += dim) {
                T* __restrict out = (part ? k : q).row<T>(b, head, t);
                if (weight) {
                    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
                    for (Index i = 0; i < dim; ++i) squares += load(x[i]) * load(x[i]);
                    const float r = inverse_rms(squares, dim, op.eps);
                    op.inverse[((b * op.tokens + t) * 2 + part) * op.heads + head] = r;
#pragma omp simd
                    for (Index i = 0; i < half; ++i) {
                        const float even = load(x[2 * i]) * r * weight[2 * i];
                        const float odd = load(x[2 * i + 1]) * r * weight[2 * i + 1];
                        store(even * cos[i] - odd * sin[i], out[2 * i]);
                        store(odd * cos[i] + even * sin[i], out[2 * i + 1]);
                    }
                } else {
#pragma omp simd
                    for (Index i = 0; i < half; ++i) {
                        const float even = load(x[2 * i]), odd = load(x[2 * i + 1]);
                        store(even * cos[i] - odd * sin[i], out[2 * i]);
                        store(odd * cos[i] + even * sin[i], out[2 * i + 1]);
                    }
                }
            }
        }
    }
}

template <class T>
UNITE_FAST_INLINE void forward_chunk(const QkNormRope& op, const Heads& q, const Heads& k, Index b, Index begin,
                                     Index end) {
    switch (op.head_dim) {
        case 16: return forward_chunk<T, 16>(op, q, k, b, begin, end);
        case 32: return forward_chunk<T, 32>(op, q, k, b, begin, end);
        case 64: return forward_chunk<T, 64>(op, q, k, b, begin, end);
        default: return forward_chunk<T, 0>(op, q, k, b, begin, end);
    }
}

UNITE_FAST_PER_CPU void forward_tokens(const QkNormRope& op, const Heads& q, const Heads& k, Index b, Index begin,
                                       Index end) {
    if (op.qkv.type == Type::f32)
        forward_chunk<float>(op, q, k, b, begin, end);
    else
        forward_chunk<Bf16>(op, q, k, b, begin, end);
}

// With n = x / rms(x), the gradient a of n is what the rotation passes back, times the weight; the norm passes back
// r (a - n mean(a n)). Needs a head of scratch; `partial` is [2, K].
template <class T, int K>
UNITE_FAST_INLINE void backward_chunk(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                                      const Rows& d_qkv, Index b, Index begin, Index end, float* partial,
                                      float* scratch) {
    const Index dim = K ? K : op.head_dim, half = dim / 2;
    const float one_over_dim = 1.0f / static_cast<float>(dim);
    std::fill(partial, partial + 2 * dim, 0.0f);
    for (Index t = begin; t < end; ++t) {
        const T* __restrict x = op.qkv.row<T>(b, t);
        T* __restrict out = d_qkv.row<T>(b, t);
        const float* __restrict cos = op.cos + t * half;
        const float* __restrict sin = op.sin + t * half;
        for (int part = 0; part < 2; ++part) {
            const float* __restrict weight = part ? op.k_weight : op.q_weight;
            float* __restrict sum = partial + part * dim;
            for (Index head = 0; head < op.heads; ++head, x += dim, out += dim) {
                const T* __restrict g = (part ? d_k : d_q).row<T>(b, head, t);
                if (weight) {
                    const float r = op.inverse[((b * op.tokens + t) * 2 + part) * op.heads + head];
                    float* __restrict a = scratch;
#pragma omp simd
                    for (Index i = 0; i < half; ++i) {
                        const float even = load(g[2 * i]), odd = load(g[2 * i + 1]);
                        a[2 * i] = even * cos[i] + odd * sin[i];
                        a[2 * i + 1] = odd * cos[i] - even * sin[i];
                    }
                    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                    for (Index i = 0; i < dim; ++i) {
                        const float product = a[i] * (load(x[i]) * r);
                        sum[i] += product;
                        dot += product * weight[i];
                    }
                    const float mean = dot * one_over_dim;
#pragma omp simd
                    for (Index i = 0; i < dim; ++i) store(r * (a[i] * weight[i] - load(x[i]) * r * mean), out[i]);
                } else {
#pragma omp simd
                    for (Index i = 0; i < half; ++i) {
                        const float even = load(g[2 * i]), odd = load(g[2 * i + 1]);
                        store(even * cos[i] + odd * sin[i], out[2 * i]);
                        store(odd * cos[i] - even * sin[i], out[2 * i + 1]);
                    }
                }
            }
        }
        for (Index head = 0; head < op.heads; ++head, out += dim) std::copy_n(d_v.row<T>(b, head, t), dim, out);
    }
}

template <class T>
UNITE_FAST_INLINE void backward_chunk(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                                      const Rows& d_qkv, Index b, Index begin, Index end, float* partial,
                                      float* scratch) {
    switch (op.head_dim) {
        case 16: return backward_chunk<T, 16>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
        case 32: return backward_chunk<T, 32>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
        case 64: return backward_chunk<T, 64>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
        default: return backward_chunk<T, 0>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
    }
}

UNITE_FAST_PER_CPU void backward_tokens(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                                        const Rows& d_qkv, Index b, Index begin, Index end, float* partial,
                                        float* scratch) {
    if (op.qkv.type == Type::f32)
        backward_chunk<float>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
    else
        backward_chunk<Bf16>(op, d_q, d_k, d_v, d_qkv, b, begin, end, partial, scratch);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRope& op, const Heads& q, const Heads& k, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks;
    const int used = threads_for(op.batch * op.tokens * op.heads * op.head_dim, threads);
    (void)used;  // unused where OpenMP is missing
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        forward_tokens(op, q, k, task / chunks, begin, end);
    }
}

void qk_norm_rope_backward(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v, const Rows& d_qkv,
                           float* d_q_weight, float* d_k_weight, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks, dim = op.head_dim;
    const int used = threads_for(op.batch * op.tokens * op.heads * dim, threads);
    const std::unique_ptr<float[]> scratch(new float[used * dim]);
    const std::unique_ptr<float[]> partial(new float[tasks * 2 * dim]);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (Index task = 0; task < tasks; ++task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        backward_tokens(op, d_q, d_k, d_v, d_qkv, task / chunks, begin, end, partial.get() + task * 2 * dim,
                        scratch.get() + thread_number() * dim);
    }
    if (!op.q_weight) return;
    std::fill(d_q_weight, d_q_weight + dim, 0.0f);
    std::fill(d_k_weight, d_k_weight + dim, 0.0f);
    for (Index task = 0; task < tasks; ++task)
#pragma omp simd
        for (Index i = 0; i < dim; ++i) {
            d_q_weight[i] += partial[task * 2 * dim + i];
            d_k_weight[i] += partial[task * 2 * dim + dim + i];
        }
}

}  // namespace unite_fast
