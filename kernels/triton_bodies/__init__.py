"""The Triton bodies for CUDA devices, one file for each kind of op. Only unite_fast.kernels.op imports them."""
