"""Rotary positions (Su et al. 2021) of queries and keys, with the normalization of heads before it (Qwen3, Gemma 3).

    y = x cos + rotate(x) sin;  rotate([u, v]) = [-v, u] of halves, or of neighbours (interleaved)

B rows, T tokens, G heads of queries and Gk of keys, D features of a head, the first P of which are turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingot_kernels.dispatch import Impl
from ingot_kernels.rms_norm import Mode, rms_norm_reference


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
        q_BTGD = rms_norm_reference(q_BTGD, norms[0], eps, mode)
        k_BTGD = rms_norm_reference(k_BTGD, norms[1], eps, mode)
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
    """As the reference. Packed rows need nothing of their own: cos and sin are those of each token's position."""
    return qk_rope_reference(q_BTGD, k_BTGD, cos_BTP, sin_BTP, norms, eps, mode, interleaved=interleaved)
