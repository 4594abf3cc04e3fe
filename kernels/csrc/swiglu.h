// The C++ body of swiglu: kernels/swiglu.py holds its formula. All tensors are dense and of one type.
#pragma once

#include "element.h"

namespace unite_fast {

// uw [rows, 2 width] -> out [rows, width].
void swiglu_forward(Type type, Index rows, Index width, const void* uw, void* out, int threads);

void swiglu_backward(Type type, Index rows, Index width, const void* d_out, const void* uw, void* d_uw, int threads);

}  // namespace unite_fast
