"""Kernels, importable on their own: they import torch and triton, never ingot. The first ones come with their benchmarks."""
