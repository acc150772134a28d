"""CUDA targets: the integer graph as kernels for NVIDIA GPUs, machine code in a library of the host (docs/cuda.md)."""
