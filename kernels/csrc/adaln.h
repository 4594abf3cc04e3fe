// The C++ bodies of adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln: their files in kernels/ hold the
// formulas. Weights and everything of [D] or [B, T] is dense float32.
#pragma once

#include "element.h"

namespace unite_fast {

struct Size {
    Index batch, tokens, width;
};

// x_out = x, or with a gate x + gate * branch, or with a norm_weight besides rms_norm of that;
// h = rms_norm(x_out) * weight * (1 + scale) + shift.
struct AdalnForward {
    Size size;
    float eps;
    Rows x, branch;  // branch.data may be null: then gate and norm_weight are unused
    Vectors gate;
    const float* norm_weight;  // may be null
    const float* weight;
    Vectors shift, scale;
    Rows x_out, h;        // x_out is written where there is a branch
    float* norm_inverse;  // [B, T], 1 / rms(x + gate * branch), where there is a norm_weight
    float* inverse;       // [B, T], 1 / rms(x_out)
};

// x is the forward's x where it has a norm_weight, else its x_out.
struct AdalnBackward {
    Size size;
    Rows d_x_out, d_h;  // d_x_out.data is null where there is no branch
    Rows x, branch;
    Vectors gate;
    const float* norm_weight;
    const float* weight;
    Vectors scale;
    const float* norm_inverse;
    const float* inverse;
    Rows d_x, d_branch;
    Vectors d_gate, d_shift, d_scale;
    float* d_norm_weight;
    float* d_weight;
};

void adaln_forward(const AdalnForward& op, int threads);
void adaln_backward(const AdalnBackward& op, int threads);

}  // namespace unite_fast
