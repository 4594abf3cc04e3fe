"""The Triton backends for CUDA devices, one file for each kind of op. Only unite_fast.kernels.fused_op imports them."""
