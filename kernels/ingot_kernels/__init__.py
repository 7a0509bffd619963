"""Operations of a training step, importable on their own: they import torch and triton, never ingot.

Each file is one operation: its reference in plain torch (the definition, and what the tests compare with), a version
that keeps and moves less on any device, a Triton version for GPUs, and one public function with
`impl="auto" | "triton" | "torch"`. Gradients are exact; none can be differentiated twice.
"""
