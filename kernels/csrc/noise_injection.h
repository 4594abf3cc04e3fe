// The C++ body of noise_injection: kernels/noise_injection.py holds its formula. t, the result and all gradients are
// dense float32.
#pragma once

#include "element.h"
#include "philox.h"

namespace unite_fast {

struct NoiseInjection {
    Index draws, batch, elements;  // elements of a sample
    const float* t;                // [draws, batch]
    const std::uint8_t* gate;      // [batch], 0 or 1; null: all pass
};

// z [batch, elements], dense -> out [draws, batch, elements]. Draw f is `first_draw` with its draw raised by f.
void noise_injection_forward(const NoiseInjection& op, const PhiloxDraw& first_draw, const std::int64_t* positions,
                             Type z_type, const void* z, float* out, int threads);

// d_out [draws, batch, elements] -> d_z [batch, elements].
void noise_injection_backward(const NoiseInjection& op, const float* d_out, float* d_z, int threads);

}  // namespace unite_fast
