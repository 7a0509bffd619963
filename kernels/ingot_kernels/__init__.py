"""Kernels, importable on their own: they import torch and triton, never ingot. None is written yet."""
