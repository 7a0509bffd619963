"""The product of a gated layer (Shazeer 2020): act(gate) * up, with silu (SwiGLU) or gelu (GeGLU).

Only gate and up are kept for the backward pass, which computes the rest again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl, device_of, jit, tl, triton, uses_triton

BLOCK = 1024  # columns of a program
Act = Literal["silu", "gelu_tanh", "gelu"]


def gated_reference(gate: Tensor, up: Tensor, act: Act = "silu") -> Tensor:
    """The definition."""
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def gated(gate: Tensor, up: Tensor, act: Act = "silu", *, impl: Impl = "auto") -> Tensor:
    """act(gate) * up, both [..., I], in their type.

    Either may be a strided part of a wider tensor. A compiler gets the definition, which it fuses by itself. Triton has
    no error function everywhere, so `gelu` is torch's under every `impl`.
    """
    if torch.compiler.is_compiling():
        return gated_reference(gate, up, act)
    output: Tensor = _Gated.apply(gate, up, act, uses_triton(impl, gate) and act != "gelu")
    return output


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act, triton: bool) -> Tensor:
        ctx.act, ctx.triton = act, triton
        ctx.save_for_backward(gate, up)
        if triton:
            return _launch(gate, up, None, act)[0]
        return _activated(gate, act).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        if ctx.triton:
            dgate, dup = _launch(gate, up, grad, ctx.act)
            return dgate, dup, None, None
        dup = _activated(gate, ctx.act).mul_(grad)
        product = grad * up
        if ctx.act == "silu":
            dgate = torch.ops.aten.silu_backward(product, gate)
        else:
            approximate = "tanh" if ctx.act == "gelu_tanh" else "none"
            dgate = torch.ops.aten.gelu_backward(product, gate, approximate=approximate)
        return dgate, dup, None, None


def _activated(gate: Tensor, act: Act) -> Tensor:
    return F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")


def _launch(gate: Tensor, up: Tensor, grad: Tensor | None, act: Act) -> tuple[Tensor, Tensor]:
    """(act(gate) * up, nothing), or with `grad` the gradients of both."""
    rows_of = [t.reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (gate, up, *(() if grad is None else (grad,)))]
    rows_of = [t if t.stride(-1) == 1 else t.contiguous() for t in rows_of]
    M, size = rows_of[0].shape
    first = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    second = first if grad is None else torch.empty_like(first)
    if M and size:
        grad_MI = rows_of[-1]
        with device_of(gate):
            _gated_kernel[(M, triton.cdiv(size, BLOCK))](
                *rows_of[:2], grad_MI, first, second, *(t.stride(0) for t in (*rows_of[:2], grad_MI)), size,
                BACKWARD=grad is not None, TANH=act == "gelu_tanh", BLOCK=BLOCK,
            )  # fmt: skip
    return first, second


@jit
def _gated_kernel(  # type: ignore[no-untyped-def]
    gate, up, grad, first, second, gate_stride, up_stride, grad_stride, size,
    BACKWARD: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row: the output, or both gradients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        half = 1.0 / (1.0 + tl.exp(-2.0 * inner))  # (1 + tanh(inner)) / 2
        activated = g * half
        slope = half + g * 2.0 * half * (1.0 - half) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * g * g)
    else:
        half = 1.0 / (1.0 + tl.exp(-g))
        activated = g * half
        slope = half + activated * (1.0 - half)
    place = row * size + columns
    if BACKWARD:
        d = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(first + place, (d * u * slope).to(first.dtype.element_ty), mask=inside)
        tl.store(second + place, (d * activated).to(second.dtype.element_ty), mask=inside)
    else:
        # Rounded as torch rounds: what is multiplied is of the tensor's own type.
        product = activated.to(first.dtype.element_ty).to(tl.float32) * u
        tl.store(first + place, product.to(first.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) * up."""
    return gated(gate, up, "silu", impl=impl)


def geglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """gelu(gate) * up, by the tanh approximation."""
    return gated(gate, up, "gelu_tanh", impl=impl)
