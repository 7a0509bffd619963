"""Rotary positions (Su et al. 2021) of queries and keys, with the normalization of heads before it (Qwen3, Gemma 3).

    y = x cos + rotate(x) sin;  rotate([u, v]) = [-v, u] of halves, or of neighbours (interleaved)

B rows, T tokens, G heads of queries and Gk of keys, D features of a head, the first P of which are turned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl, device_of, jit, tl, triton, uses_triton, warps
from ingot_kernels.rms_norm import Mode, _backward, _forward, _launch_backward, rms_norm_reference


def rope_reference(x_BGTD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, interleaved: bool = False) -> Tensor:
    """The definition. cos and sin [B or 1, T, P] hold every angle twice: in halves, or (interleaved) side by side."""
    turned, rest = x_BGTD.split([cos_BTP.shape[-1], x_BGTD.shape[-1] - cos_BTP.shape[-1]], dim=-1)
    cos, sin = cos_BTP.unsqueeze(1), sin_BTP.unsqueeze(1)
    if interleaved:
        u, v = turned[..., ::2], turned[..., 1::2]
        rotated = torch.stack([-v, u], dim=-1).flatten(-2)
    else:
        u, v = turned.chunk(2, dim=-1)
        rotated = torch.cat([-v, u], dim=-1)
    return torch.cat([(turned * cos + rotated * sin).to(x_BGTD.dtype), rest], dim=-1)


def qk_rope_reference(
    q_BTGD: Tensor,
    k_BTGD: Tensor,
    cos_BTP: Tensor,
    sin_BTP: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    mode: Mode = "llama",
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries [B, G, T, D] and keys [B, Gk, T, D] ready for attention, from projections [B, T, G, D] and
    [B, T, Gk, D]. `norms`: weights [D] of the normalization of each head, before it is turned.
    """
    if norms is not None:
        q_BTGD = rms_norm_reference(q_BTGD, norms[0], eps, mode).to(q_BTGD.dtype)
        k_BTGD = rms_norm_reference(k_BTGD, norms[1], eps, mode).to(k_BTGD.dtype)
    q, k = q_BTGD.transpose(1, 2), k_BTGD.transpose(1, 2)
    return (
        rope_reference(q, cos_BTP, sin_BTP, interleaved=interleaved),
        rope_reference(k, cos_BTP, sin_BTP, interleaved=interleaved),
    )


def qk_rope(
    q_BTGD: Tensor,
    k_BTGD: Tensor,
    cos_BTP: Tensor,
    sin_BTP: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    mode: Mode = "llama",
    *,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """As the reference, in the projections' type whatever that of angles and norms; the results are [B, G, T, D] views
    of memory in the order of tokens, as attention reads lines.

    Packed rows need nothing of their own: cos and sin are those of each token's position. A compiler gets the
    definition, which it fuses by itself.
    """
    if torch.compiler.is_compiling():
        return qk_rope_reference(q_BTGD, k_BTGD, cos_BTP, sin_BTP, norms, eps, mode, interleaved=interleaved)
    options = _Options(eps, mode, interleaved, uses_triton(impl, q_BTGD))
    weights = (None, None) if norms is None else norms
    q, k = _Turned.apply(q_BTGD, k_BTGD, cos_BTP, sin_BTP, *weights, options)
    return q.transpose(1, 2), k.transpose(1, 2)


class _Options(NamedTuple):
    eps: float
    mode: Mode
    interleaved: bool
    triton: bool


class _Turned(torch.autograd.Function):
    """Queries and keys normalized and turned, in the order of tokens. Kept: what comes in, and a number a head and
    token for the normalization.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        ctx.options, run = options, _launch if options.triton else _turn_all
        ctx.set_materialize_grads(True)
        q_out, q_rstd = run(q, cos, sin, q_weight, options)
        k_out, k_rstd = run(k, cos, sin, k_weight, options)
        kept = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(cos, sin, *kept, q_weight, k_weight, q_rstd, k_rstd)
        return q_out, k_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Any, ...]:
        cos, sin, q, k, q_weight, k_weight, q_rstd, k_rstd = ctx.saved_tensors
        options = ctx.options
        found: list[tuple[Tensor, Tensor | None]] = []
        for number, (grad, x, weight, rstd) in enumerate(
            ((q_grad, q, q_weight, q_rstd), (k_grad, k, k_weight, k_rstd))
        ):
            run = _launch if options.triton else _turn_all
            grad, _ = run(grad, cos, sin, None, options, back=True)
            if weight is None:
                found.append((grad, None))
                continue
            normed = _launch_backward if options.triton else _backward
            needs = ctx.needs_input_grad[4 + number]
            found.append(normed(grad, None, x, weight, rstd, options.mode, needs))
        (dq, dq_weight), (dk, dk_weight) = found
        return dq, dk, None, None, dq_weight, dk_weight, None


def _halves(x: Tensor, turned: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of both numbers of every pair that is turned."""
    if interleaved:
        return x[..., 0:turned:2], x[..., 1:turned:2]
    return x[..., : turned // 2], x[..., turned // 2 : turned]


def _turn_all(
    x_BTGD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, weight: Tensor | None, options: _Options, *, back: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Turned forwards after the normalization, or (`back`) a gradient turned back by the transposed matrix."""
    rstd = None
    x, dtype, turned = x_BTGD, x_BTGD.dtype, cos_BTP.shape[-1]
    if weight is not None:
        x, rstd = _forward(x, weight, options.eps, options.mode)
    cos, sin = cos_BTP.unsqueeze(2), sin_BTP.unsqueeze(2)
    head = x[..., :turned] * cos
    u, v = _halves(x, turned, options.interleaved)
    sin_u, sin_v = _halves(sin, turned, options.interleaved)
    out_u, out_v = _halves(head, turned, options.interleaved)
    if back:
        out_u.addcmul_(v, sin_v)
        out_v.addcmul_(u, sin_u, value=-1)
    else:
        out_u.addcmul_(v, sin_u, value=-1)
        out_v.addcmul_(u, sin_v)
    head = head.to(dtype)
    return (head if turned == x.shape[-1] else torch.cat([head, x[..., turned:].to(dtype)], dim=-1)), rstd


def _launch(
    x_BTGD: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, weight: Tensor | None, options: _Options, *, back: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `_turn_all`, by Triton."""
    B, T, G, D = x_BTGD.shape
    P = cos_BTP.shape[-1]
    x = x_BTGD if x_BTGD.stride(-1) == 1 else x_BTGD.contiguous()
    cos, sin = cos_BTP.contiguous(), sin_BTP.contiguous()
    out = torch.empty((B, T, G, D), dtype=x.dtype, device=x.device)
    rstd = None if weight is None else torch.empty((B, T, G, 1), dtype=torch.float32, device=x.device)
    if out.numel():
        with device_of(x):
            _turn_kernel[(B * T,)](
                x, cos, sin, x if weight is None else weight.contiguous(), out, out if rstd is None else rstd,
                *x.stride()[:3], T, G, P // 2, D, 0 if cos.shape[0] == 1 else T * P, EPS=options.eps,
                NORMED=weight is not None, GEMMA=options.mode == "gemma", INTERLEAVED=options.interleaved, BACK=back,
                HEADS=triton.next_power_of_2(G), HALF=triton.next_power_of_2(P // 2),
                REST=triton.next_power_of_2(D - P) if D > P else 0,
                num_warps=warps(triton.next_power_of_2(G) * triton.next_power_of_2(D)),
            )  # fmt: skip
    return out, rstd


@jit
def _turn_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, weight, out, rstd, batch_stride, token_stride, head_stride, T, G, half, D, cos_stride,
    EPS: tl.constexpr, NORMED: tl.constexpr, GEMMA: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """All heads of a token: angles are read once."""
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // T, place % T
    # 64 bits: heads of a gradient may lie a whole sequence apart.
    heads, pairs = tl.arange(0, HEADS).to(tl.int64), tl.arange(0, HALF)
    first, second = pairs, pairs + half
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    in_half, in_heads = pairs < half, heads < G
    inside = in_heads[:, None] & in_half[None, :]
    begin = x + batch * batch_stride + token * token_stride + heads[:, None] * head_stride
    u = tl.load(begin + first[None, :], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(begin + second[None, :], mask=inside, other=0.0).to(tl.float32)
    end = out + (place * G + heads[:, None]) * D
    dtype = out.dtype.element_ty
    if NORMED:
        squares = tl.sum(u * u + v * v, axis=1)
    if REST > 0:
        behind = 2 * half + tl.arange(0, REST)
        in_rest = in_heads[:, None] & (behind < D)[None, :]
        rest = tl.load(begin + behind[None, :], mask=in_rest, other=0.0).to(tl.float32)
        if NORMED:
            squares += tl.sum(rest * rest, axis=1)
    if NORMED:
        r = 1.0 / tl.sqrt(squares / D + EPS)
        tl.store(rstd + place * G + heads, r, mask=in_heads)
        u = _weighed(u * r[:, None], weight, first, in_half, GEMMA, dtype)
        v = _weighed(v * r[:, None], weight, second, in_half, GEMMA, dtype)
        if REST > 0:
            rest = _weighed(rest * r[:, None], weight, behind, behind < D, GEMMA, dtype)
    if REST > 0:
        tl.store(end + behind[None, :], rest.to(dtype), mask=in_rest)
    angle = batch * cos_stride + token * 2 * half
    cos_u = tl.load(cos + angle + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_v = tl.load(cos + angle + second, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_u = tl.load(sin + angle + first, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_v = tl.load(sin + angle + second, mask=in_half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        out_u, out_v = u * cos_u + v * sin_v, v * cos_v - u * sin_u
    else:
        out_u, out_v = u * cos_u - v * sin_u, v * cos_v + u * sin_v
    tl.store(end + first[None, :], out_u.to(dtype), mask=inside)
    tl.store(end + second[None, :], out_v.to(dtype), mask=inside)


@jit
def _weighed(n, weight, columns, inside, GEMMA: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a normalization makes of n, rounded as it rounds."""
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GEMMA:
        return (n * (1.0 + w)).to(dtype).to(tl.float32)
    return (n.to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
