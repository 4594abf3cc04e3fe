"""Triton kernels for CUDA devices, one file per op or family of ops. `fused_op.triton_backend` imports a file
at its first call."""
