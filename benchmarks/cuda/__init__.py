"""The sections of cuda_check.py, a process each."""
