"""Triton kernels for CUDA, each with its launcher and a torch twin for the tests.

`model/device_step.py` runs them as one step. The layers of the model use the same ones where the
host takes each step. docs/cuda has the design and what was measured.

The bits of a row depend neither on the number of rows nor on the tile that a kernel runs with: an
output of a linear is one chain over k, and attention visits the blocks of 64 keys in order. float32
follows docs/arithmetic.md.

Importing a module of this package imports triton, except for tiles.py.
"""
