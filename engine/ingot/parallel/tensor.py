"""Tensor parallel: ranks of a tensor group each hold a part of the matrices and compute the same loss.

What is cut is a DTensor on the group, what is whole is a plain tensor that every rank updates by the same gradient.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ingot.model.adapters import trainable_tensors
from ingot.model.head import detach, fused_head, split_over
from ingot.model.split import split
from ingot.parallel.layout import Layout, local
from ingot.parallel.sharded import Sharded

BUCKET_BYTES = 256 * 2**20  # gradients that are summed in one collective


def cut(model: nn.Module, layout: Layout) -> None:
    """Leave in `model` what this rank of its tensor group holds."""
    assert layout.grid is not None
    fused = fused_head(model)
    detach(model)  # what cuts a head stands in for its forward too, and below
    split(model, layout.grid["tensor"], layout.tensor_rank)
    if fused is not None:
        split_over(model, fused, layout.grid.get_group("tensor"))


class TensorSharded(Sharded):
    """Replicas of a cut model: gradients are summed over the ranks that hold the same part, once a step.

    Not by DistributedDataParallel, which wants plain parameters.
    """

    whole = False

    @contextlib.contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Context for forward and backward of one microbatch; gradients travel behind the `last` one of a step."""
        yield
        if last and self.layout.loss_parts > 1:
            self._sum_gradients()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of this rank's part of the global loss."""
        loss.backward()

    def _sum_gradients(self) -> None:
        assert self.layout.grid is not None
        group = self.layout.grid.get_group("parts")
        gradients = []
        for _, parameter in trainable_tensors(self.plain):
            if parameter.grad is None:  # a rank without rows for it, or experts that got no token
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(local(parameter.grad))
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat, group=group)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Stretches of equal type and at most BUCKET_BYTES, or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket) + tensor.nbytes
        if bucket and (size > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
