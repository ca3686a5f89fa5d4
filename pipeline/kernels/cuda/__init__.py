"""Triton kernels for CUDA, with torch twins for the tests. The engine does not use them yet.

With `engine.device: cuda` it still runs padded attention in torch. `benchmarks/cuda_step.py` runs
these kernels as a decode step, and `make cuda-check` measures them on a GPU; docs/cuda has results.

By design the bits of a row depend neither on the number of rows nor on the tile that a kernel runs
with: an output of a linear is a sum over fixed segments of K in order, and attention visits the
blocks of 64 keys in order. Triton's interpreter shows nothing of this: `make cuda-check` tests it.

Importing a module of this package imports triton.
"""
