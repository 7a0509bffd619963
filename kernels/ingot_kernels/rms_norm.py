"""Root-mean-square normalization (Zhang & Sennrich 2019), with the addition to the residual before it.

    n = x / sqrt(mean(x²) + eps);   y = w n (llama), (1 + w) n (gemma), n without a weight

M rows, H features. llama: n is rounded to the type of x before it is multiplied; gemma: after it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl, device_of, jit, tl, triton, uses_triton, warps

PROGRAMS = 264  # of a backward pass: two for each multiprocessor of an H100 or H200
Mode = Literal["llama", "gemma"]


def rms_norm_reference(x: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama") -> Tensor:
    """The definition."""
    x_32 = x if x.dtype == torch.float64 else x.float()
    normed = x_32 * torch.rsqrt(x_32.square().mean(-1, keepdim=True) + eps)
    if weight_H is None:
        return normed.to(x.dtype)
    if mode == "gemma":
        return (normed * (1 + weight_H.to(normed.dtype))).to(x.dtype)
    return weight_H * normed.to(x.dtype)


def rms_norm(x: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama", *, impl: Impl = "auto") -> Tensor:
    """x [..., H] normalized, in its type (llama: wider where the weight is). A compiler gets the definition, which it
    fuses by itself.
    """
    if torch.compiler.is_compiling():
        return rms_norm_reference(x, weight_H, eps, mode)
    output: Tensor = _Norm.apply(x, None, weight_H, eps, mode, uses_triton(impl, x))
    return output


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor | None, eps: float, mode: Mode = "llama", *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [..., H]."""
    if torch.compiler.is_compiling() or x.dtype != residual.dtype:
        total = x + residual
        return rms_norm(total, weight_H, eps, mode, impl=impl), total
    normed, total = _Norm.apply(x, residual, weight_H, eps, mode, uses_triton(impl, x))
    return normed, total


class _Norm(torch.autograd.Function):
    """Keeps what is normalized and 1 / sqrt(mean(x^2) + eps) of each row; the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: Mode, triton: bool
    ) -> Any:
        ctx.mode, ctx.triton, ctx.adds = mode, triton, residual is not None
        if triton:
            y, total, rstd_M = _launch_forward(x, residual, weight, eps, mode)
        else:
            total = x if residual is None else x + residual
            y, rstd_M = _forward(total, weight, eps, mode)
        ctx.save_for_backward(total, weight, rstd_M)
        return y if residual is None else (y, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor | None = None) -> tuple[Any, ...]:
        total, weight, rstd_M = ctx.saved_tensors
        needs_weight = weight is not None and ctx.needs_input_grad[2]
        run = _launch_backward if ctx.triton else _backward
        dx, dweight = run(grad, grad_total, total, weight, rstd_M, ctx.mode, needs_weight)
        return dx, dx if ctx.adds else None, dweight, None, None, None


def _forward(x: Tensor, weight: Tensor | None, eps: float, mode: Mode) -> tuple[Tensor, Tensor]:
    """(y, rstd [..., 1]). The norm is summed in float32 without a float32 copy of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(max(x.shape[-1], 1)).add_(eps).rsqrt_()
    if weight is None:
        return (x * rstd).to(x.dtype), rstd
    if mode == "gemma":
        return (x * rstd).mul_(1 + weight.to(wide)).to(x.dtype), rstd
    normed = (x * rstd).to(x.dtype)
    return normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed, rstd


def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    mode: Mode,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx = rstd (w dy - n mean(w dy n)) + what reaches the sum by itself; dw = sum over rows of dy n."""
    wide, size = rstd.dtype, max(x.shape[-1], 1)
    grad_n = grad.to(wide) if weight is None else grad * ((1 + weight.to(wide)) if mode == "gemma" else weight.to(wide))
    with torch.autocast(x.device.type, enabled=False):  # it would take this product in its own type
        pull = torch.linalg.vecdot(grad_n, x.to(wide)).unsqueeze(-1).mul_(rstd.pow(3) / size)
    dx = (grad_n.mul_(rstd) if grad_n is not grad else grad_n * rstd).sub_(x * pull)
    if grad_total is not None:
        dx += grad_total
    if not needs_weight:
        return dx.to(x.dtype), None
    assert weight is not None
    normed = x * rstd if mode == "gemma" else (x * rstd).to(x.dtype)
    dweight = _rows(grad * normed).sum(0, dtype=wide)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]).contiguous()


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, mode: Mode
) -> tuple[Tensor, Tensor, Tensor]:
    x_MH = _rows(x)
    residual_MH = x_MH if residual is None else _rows(residual)
    M, H = x_MH.shape
    kind = x.dtype if weight is None or mode == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    y_MH = torch.empty_like(x_MH, dtype=kind)
    total_MH = x_MH if residual is None else torch.empty_like(x_MH)
    rstd_M = torch.empty(M, dtype=torch.float32, device=x.device)
    if M and H:
        with device_of(x):
            _forward_kernel[(M,)](
                x_MH, residual_MH, x_MH if weight is None else weight.contiguous(), y_MH, total_MH, rstd_M, H, EPS=eps,
                ADDS=residual is not None, WEIGHTED=weight is not None, GEMMA=mode == "gemma",
                BLOCK=triton.next_power_of_2(H), num_warps=warps(triton.next_power_of_2(H)),
            )  # fmt: skip
    return y_MH.view(x.shape), total_MH.view(x.shape), rstd_M


def _launch_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd_M: Tensor,
    mode: Mode,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    grad_MH, x_MH = _rows(grad), _rows(x)
    more_MH = grad_MH if grad_total is None else _rows(grad_total)
    M, H = x_MH.shape
    dx_MH = torch.empty_like(x_MH)
    programs = min(M, PROGRAMS)
    partial_PH = torch.zeros(programs if needs_weight else 0, H, dtype=torch.float32, device=x.device)
    if M and H:
        with device_of(x):
            _backward_kernel[(programs,)](
                grad_MH, more_MH, x_MH, x_MH if weight is None else weight.contiguous(), rstd_M, dx_MH, partial_PH,
                M, H, ADDS=grad_total is not None, WEIGHTED=weight is not None, LEARNED=needs_weight,
                GEMMA=mode == "gemma", BLOCK=triton.next_power_of_2(H), num_warps=warps(triton.next_power_of_2(H)),
            )  # fmt: skip
    dweight = partial_PH.sum(0).to(weight.dtype) if needs_weight and weight is not None else None
    return dx_MH.view(x.shape), dweight


@jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, y, total, rstd, H, EPS: tl.constexpr,
    ADDS: tl.constexpr, WEIGHTED: tl.constexpr, GEMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    place = row * H + columns
    v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        v += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        # What is normalized is what is kept: the sum as it is rounded.
        v = v.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + place, v.to(total.dtype.element_ty), mask=inside)
    r = 1.0 / tl.sqrt(tl.sum(v * v, axis=0) / H + EPS)
    tl.store(rstd + row, r)
    n = v * r
    if WEIGHTED:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        n = n * (1.0 + w) if GEMMA else n.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(y + place, n.to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, more, x, weight, rstd, dx, partial, M, H,
    ADDS: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr, GEMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th row; the weight's gradient of these rows is added up in registers."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    w = tl.zeros([BLOCK], dtype=tl.float32) + 1.0
    if WEIGHTED:
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if GEMMA:
            w += 1.0
    learned = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(tl.cdiv(M, programs)):
        row = program + turn * programs
        place, present = row * H + columns, inside & (columns * 0 + row < M)
        d = tl.load(grad + place, mask=present, other=0.0).to(tl.float32)
        v = tl.load(x + place, mask=present, other=0.0).to(tl.float32)
        r = tl.load(rstd + tl.minimum(row, M - 1))
        n = v * r
        if LEARNED:
            learned += d * n
        wd = w * d
        out = r * (wd - n * (tl.sum(wd * n, axis=0) / H))
        if ADDS:
            out += tl.load(more + place, mask=present, other=0.0).to(tl.float32)
        tl.store(dx + place, out.to(dx.dtype.element_ty), mask=present)
    if LEARNED:
        tl.store(partial + program * H + columns, learned, mask=inside)
