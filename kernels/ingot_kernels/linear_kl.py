"""Kullback-Leibler divergence between a teacher's and a student's linear heads, without the logits of either.

    p = softmax(z_teacher / tau), q = softmax(z_student / tau),  loss = tau² sum_v p_v (log p_v - log q_v)

(Hinton et al. 2015, section 2.) N hidden states, M of them taught, H and H' hidden sizes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl, uses_triton
from ingot_kernels.head import Head, Job, accumulator, autocast_dtype, logits_reference, loss_of, parts_of


def linear_kl_reference(
    hidden_NH: Tensor, head: Head, taught_NH: Tensor, teacher: Head, rows_M: Tensor, temperature: float = 1.0
) -> Tensor:
    """The definition: all logits of the rows at once. Vocabularies of two widths: their common beginning."""
    width = min(head.weight.shape[0], teacher.weight.shape[0])
    student_MV = logits_reference(hidden_NH[rows_M], head)[:, :width] / temperature
    with torch.no_grad():
        teacher_MV = logits_reference(taught_NH[rows_M], teacher)[:, :width] / temperature
    divergence = F.kl_div(student_MV.log_softmax(1), teacher_MV.log_softmax(1), reduction="sum", log_target=True)
    return divergence * temperature**2


def linear_kl(
    hidden_NH: Tensor,
    head: Head,
    taught_NH: Tensor,
    teacher: Head,
    rows_M: Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The divergence of the rows `rows_M` (int64), summed: float32. No gradient goes to the teacher.

    Chunk by chunk as `linear_cross_entropy`; a chunk holds both models' logits. `impl` chooses nothing: what is between
    the products is torch's on every device. Under torch.compile it breaks the graph and runs eagerly.
    """
    uses_triton(impl, hidden_NH)
    hidden_NH = hidden_NH.to(autocast_dtype(hidden_NH))
    taught_NH = taught_NH.detach().to(autocast_dtype(taught_NH))
    teacher = _frozen(teacher, taught_NH.dtype)
    width = min(head.weight.shape[0], teacher.weight.shape[0])

    def grade(logits_CV: Tensor, part: slice, weights_C: Tensor | None, gradient: bool) -> Tensor:
        kind = accumulator(logits_CV.dtype)
        taught_CV = logits_reference(taught_NH.index_select(0, rows_M[part]), teacher)[:, :width]
        log_p_CV = taught_CV.to(kind).div_(temperature).log_softmax(1)
        z_CV = logits_CV[:, :width].to(kind) * head.scale
        cap = head.softcap
        if cap is not None:
            z_CV = torch.tanh(z_CV / cap) * cap
        log_q_CV = (z_CV / temperature).log_softmax(1)
        p_CV = log_p_CV.exp()
        losses_C = (p_CV * (log_p_CV - log_q_CV)).sum(1) * temperature**2
        if gradient:
            slope_CV = (log_q_CV.exp_() - p_CV).mul_(temperature * head.scale)
            if cap is not None:
                slope_CV.mul_(1 - (z_CV / cap).square_())
            if weights_C is not None:
                slope_CV.mul_(weights_C[:, None])
            logits_CV[:, width:] = 0
            logits_CV[:, :width] = slope_CV
        return losses_C

    parts = parts_of(head)
    tensors = (hidden_NH, *parts[:4])
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]
    return loss_of(Job(grade, rows_M, parts.factor, chunk_bytes), False, needs, *tensors)


def _frozen(head: Head, dtype: torch.dtype) -> Head:
    """A head's tensors in `dtype`, cast once for all chunks."""
    adapter = head.adapter
    if adapter is not None:
        adapter = adapter._replace(a=adapter.a.detach().to(dtype), b=adapter.b.detach().to(dtype))
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return head._replace(weight=head.weight.detach().to(dtype), bias=bias, adapter=adapter)
