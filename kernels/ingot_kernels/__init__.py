"""Operations of a training step, importable on their own: they import torch and triton, never ingot.

A file is one operation, or what several share: a reference in plain torch (the definition, and what the tests compare
with), a version that keeps and moves less on any device, where it pays a Triton version for GPUs, and one public
function with `impl="auto" | "triton" | "torch"`. Gradients are exact, but for float8 products, whose operands are
rounded; none can be differentiated twice.
"""
