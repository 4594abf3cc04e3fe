// qk_norm_rope; kernels/qk_norm_rope.py has the formula. Weights, cos and sin are dense float32.
#include "arguments.h"

#include <algorithm>
#include <memory>

namespace unite_fast {
namespace {

struct QkNormRope {
    Index batch, tokens, heads, head_dim;
    float eps;
    Rows qkv;                          // all tensors of tokens have its type
    const float *q_weight, *k_weight;  // both may be null: no norm, and `rstd` is unused
    const float *cos, *sin;            // [T, K / 2]
    float* rstd;                       // [B, T, 2 H], 1 / rms of each head of q, then of k
};

// A head is so short that vector code pays only with a length known at compile time: `K` below is the head dimension,
// or 0 if `with_head_dim`, which calls f with it as a type, does not list it.
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

// Position of (token, part, head) in `rstd`.
UNITE_FAST_INLINE Index rstd_at(const QkNormRope& op, Index b, Index t, int part, Index head) {
    return ((b * op.tokens + t) * 2 + part) * op.heads + head;
}

template <class T, int K>
UNITE_FAST_INLINE void forward_head(const QkNormRope& op, Index t, const T* __restrict x,
                                    const float* __restrict weight, float* rstd, T* __restrict out) {
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
    const float r = rms_rstd(squares, dim, op.eps);
    *rstd = r;
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
                        forward_head<T, K>(op, t, x, weight, op.rstd + rstd_at(op, b, t, part, head),
                                           (part ? k : q).row<T>(b, head, t));
                }
            }
        });
    });
}

// `turned` is the gradient of the norm's output, g rotated back. With n = x / rms(x) and a = turned * weight, the
// gradient of x is (a - n mean(a n)) / rms(x). Adds turned * n, the gradient of the weight, to `sum`.
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

// Gradients of the tokens from begin to end, at most kBlock; adds their sums over all heads to partial [2, K]. Each
// head has its own sum first, so that heads do not depend on one another. Needs 2 H + 1 heads of scratch.
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
                const float r = weight ? op.rstd[rstd_at(op, b, t, part, head)] : 0.0f;
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

// Writes q and k; v remains in qkv.
void qk_norm_rope_forward(const QkNormRope& op, const Heads& q, const Heads& k, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks;
    parallel_for(tasks, op.batch * op.tokens * op.heads * op.head_dim, threads, [&](Index task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        forward_chunk(op, q, k, task / chunks, begin, end);
    });
}

void qk_norm_rope_backward(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                           const Rows& d_qkv, float* d_q_weight, float* d_k_weight, int threads) {
    const Index chunks = chunks_of(op.tokens), tasks = op.batch * chunks, dim = op.head_dim;
    const Index scratch_size = (2 * op.heads + 1) * dim;
    const Index elements = op.batch * op.tokens * op.heads * dim;
    const std::unique_ptr<float[]> scratch(new float[threads_for(elements, threads) * scratch_size]);
    const std::unique_ptr<float[]> partial(new float[tasks * 2 * dim]);
    parallel_for(tasks, elements, threads, [&](Index task) {
        const Index begin = task % chunks * kChunk, end = std::min(begin + kChunk, op.tokens);
        backward_chunk(op, d_q, d_k, d_v, d_qkv, task / chunks, begin, end, partial.get() + task * 2 * dim,
                       scratch.get() + thread_number() * scratch_size);
    });
    if (op.q_weight) sum_tasks(partial.get(), tasks, dim, d_q_weight, d_k_weight);
}

}  // namespace

static QkNormRope read_op(Arguments& in) {
    QkNormRope op{};
    op.batch = in.integer();
    op.tokens = in.integer();
    op.heads = in.integer();
    op.head_dim = in.integer();
    op.eps = in.number();
    op.qkv = in.rows();
    op.q_weight = in.floats();
    op.k_weight = in.floats();
    op.cos = in.floats();
    op.sin = in.floats();
    op.rstd = in.floats();
    return op;
}

UNITE_FAST_FUNCTION(qk_norm_rope_forward) {
    const QkNormRope op = read_op(in);
    const Heads q = in.heads(), k = in.heads();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    qk_norm_rope_forward(op, q, k, threads);
}

UNITE_FAST_FUNCTION(qk_norm_rope_backward) {
    const QkNormRope op = read_op(in);
    const Heads d_q = in.heads(), d_k = in.heads(), d_v = in.heads();
    const Rows d_qkv = in.rows();
    float *d_q_weight = in.floats(), *d_k_weight = in.floats();
    const int threads = in.threads();
    nb::gil_scoped_release release;
    qk_norm_rope_backward(op, d_q, d_k, d_v, d_qkv, d_q_weight, d_k_weight, threads);
}

}  // namespace unite_fast
