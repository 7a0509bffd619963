"""Kullback-Leibler divergence between a teacher's and a student's linear heads, without the logits of either.

    p = softmax(z_teacher / tau), q = softmax(z_student / tau),  loss = tau² sum_v p_v (log p_v - log q_v)

(Hinton et al. 2015, section 2.) N hidden states, M of them taught, H and H' hidden sizes, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot_kernels.dispatch import Impl
from ingot_kernels.linear_cross_entropy import Head, logits_reference


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
    """The divergence of the rows `rows_M` (int64), summed: float32. No gradient goes to the teacher."""
    return linear_kl_reference(hidden_NH, head, taught_NH, teacher, rows_M, temperature)
