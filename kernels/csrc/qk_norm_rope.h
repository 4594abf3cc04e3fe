// The C++ body of qk_norm_rope: kernels/qk_norm_rope.py holds its formula. Weights, cos and sin are dense float32.
#pragma once

#include "element.h"

namespace unite_fast {

// A tensor [B, H, T, K], dense in K; strides count elements.
struct Heads {
    void* data;
    Index batch_stride;
    Index head_stride;
    Index token_stride;

    template <class T>
    UNITE_FAST_INLINE T* row(Index b, Index h, Index t) const {
        return static_cast<T*>(data) + b * batch_stride + h * head_stride + t * token_stride;
    }
};

struct QkNormRope {
    Index batch, tokens, heads, head_dim;
    float eps;
    Rows qkv;                          // all tensors of tokens have its type
    const float *q_weight, *k_weight;  // both may be null: no norm, and `inverse` is unused
    const float *cos, *sin;            // [T, K / 2]
    float* inverse;                    // [B, T, 2 H], 1 / rms of each head of q, then of k
};

// Writes q and k; v stays where it is, in qkv.
void qk_norm_rope_forward(const QkNormRope& op, const Heads& q, const Heads& k, int threads);

void qk_norm_rope_backward(const QkNormRope& op, const Heads& d_q, const Heads& d_k, const Heads& d_v,
                           const Rows& d_qkv, float* d_q_weight, float* d_k_weight, int threads);

}  // namespace unite_fast
