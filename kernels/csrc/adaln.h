// The C++ bodies of adaln_modulate, gated_residual_adaln and gated_residual_norm_adaln: their files in kernels/ hold
// the formulas. Weights and everything of [D] or [B, T] is dense float32.
#pragma once

#include "element.h"

namespace unite_fast {

struct Size {
    Index batch, tokens, width;
};

// x_out = x, or if gated x + gate * branch, or if normed too rms_norm of that;
// h = rms_norm(x_out) * weight * (1 + scale) + shift.
struct AdalnForward {
    Size size;
    float eps;
    // Which op it is; what belongs only to another is unused. Null pointers could not tell: the address of a tensor
    // without elements is null too.
    bool gated, normed;
    Rows x, branch;
    Vectors gate;
    const float* norm_weight;
    const float* weight;
    Vectors shift, scale;
    Rows x_out, h;        // x_out only if gated
    float* norm_inverse;  // [B, T], 1 / rms(x + gate * branch)
    float* inverse;       // [B, T], 1 / rms(x_out)
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
