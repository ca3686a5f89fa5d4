"""Triton kernels of the CUDA path. One file per kernel, with a naive torch twin beside it.

The bits of a row depend neither on the number of rows nor on the tile that a kernel runs with:
each output of a linear is one chain over K, and attention visits the blocks of 64 keys in order.

Importing a module of this package imports triton.
"""
