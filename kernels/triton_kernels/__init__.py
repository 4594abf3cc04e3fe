"""Triton kernels for CUDA devices, one file per op. `fused_op.triton_backend` imports them with the first call."""
