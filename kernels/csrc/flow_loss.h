// The C++ body of flow_loss: kernels/flow_loss.py holds its formula. All tensors are dense, those without a type
// float32.
#pragma once

#include "element.h"

namespace unite_fast {

struct FlowLoss {
    Index draws, batch, tokens, channels;
    Type y_type;
    const void* y;  // [draws, batch, tokens, channels]
    const float *weight, *bias;
    Type z_type;
    const void* z;  // [batch, tokens, channels]
    // Written by the forward pass.
    float* share;    // [draws, batch], what a squared error counts in its sample's loss
    float* mean;     // [draws, batch, tokens], of y's channels
    float* inverse;  // [draws, batch, tokens], 1 / deviation of them
};

// t and loss [draws, batch].
void flow_loss_forward(const FlowLoss& op, const float* t, float min_time_left, float eps, float* loss, int threads);

// d_y has y's type.
void flow_loss_backward(const FlowLoss& op, const float* d_loss, void* d_y, float* d_weight, float* d_bias,
                        int threads);

}  // namespace unite_fast
