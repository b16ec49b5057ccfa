"""Triton kernels of the ops, for GPUs without the CUDA library. Installed as
saesteer_fast.triton_kernels; importing this package imports nothing heavy."""
