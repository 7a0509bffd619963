"""Where the rows of a line begin and end, and what attention derives from that, once a forward pass."""

# T tokens of the line, G documents of a group, L tokens of its longest

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

NEAR = 16  # tokens by which documents of one call may differ under causal attention (benchmarks/results/packing.md)

# query, key, value -> output, of whole lines
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
# the same from and to a part of each line, by other ranks: called with what attends to whole lines
Exchange: TypeAlias = Callable[[Attend, Tensor, Tensor, Tensor], Tensor]


class Group(NamedTuple):
    """Documents of one call: `size` of them, `length` tokens each after filling up."""

    size: int
    length: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the rows of a line begin and end. `lengths` in tokens; `bounds` int32 [documents + 1] on the device.

    `exchange`: where ranks each hold a part of the line (parallel/context.py); `lengths` are those of the whole line.
    `seen`: collects what each layer asks (its options, sizes of query and value heads), for lines.py.
    What is derived is kept, so every layer of a forward pass shares it.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    exchange: Exchange | None = None
    seen: list[tuple[Any, int, int]] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device, exchange: Exchange | None = None) -> "Documents":
        """From lengths alone."""
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), exchange)

    @cached_property
    def mask(self) -> Tensor:
        """What goes in as `attention_mask` [1, 1, 1, 1]: a NaN.

        transformers hands a mask of four dimensions through as it is, so no mask of T x T is built (nor is the line
        searched for documents, which costs a synchronization a layer type). Nothing here reads it. Whatever else would
        (a layer that `documents` do not reach) turns the loss into NaN instead of looking into other documents.
        """
        return torch.full((1, 1, 1, 1), torch.nan, device=self.bounds.device)

    @cached_property
    def ids(self) -> Tensor:
        """[T] int64: the document of each token."""
        numbers = torch.arange(len(self.lengths), device=self.bounds.device)
        return numbers.repeat_interleave(self.bounds.diff(), output_size=sum(self.lengths))

    @cached_property
    def blocks(self) -> dict[tuple[bool, int | None], Any]:
        """FlexAttention's block masks by (causal, window)."""
        return {}

    @cached_property
    def near(self) -> tuple[list[Group], Tensor | None, Tensor | None]:
        """`grouped` with lengths that differ by up to NEAR."""
        return grouped(self.lengths, NEAR, self.bounds.device)

    @cached_property
    def equal(self) -> tuple[list[Group], Tensor | None, Tensor | None]:
        """`grouped` with equal lengths."""
        return grouped(self.lengths, 0, self.bounds.device)


class _Take(torch.autograd.Function):
    """[T, ...] -> the tokens of all groups [sum of G x L, ...].

    What fills a document up gets no gradient, for causal attention never looks at it and `_Return` drops what it gives;
    so the gradient is read at one place a token, where that of index_select adds up all.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor, taken: Tensor, back: Tensor) -> Tensor:
        context.save_for_backward(back)
        return rows.index_select(0, taken)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, *context.saved_tensors), None, None


class _Return(torch.autograd.Function):
    """The inverse of `_Take`, from tokens of all groups [sum of G x L, ...] to [T, ...]."""

    @staticmethod
    def forward(context: Any, rows: Tensor, back: Tensor) -> Tensor:
        context.save_for_backward(back)
        context.size = len(rows)
        return rows.index_select(0, back)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [back] = context.saved_tensors
        return gradient.new_zeros(context.size, *gradient.shape[1:]).index_copy_(0, back, gradient), None


def take(rows: Tensor, taken: Tensor, back: Tensor) -> Tensor:
    """The tokens `taken` of a line [T, ...], as `grouped` says."""
    return _Take.apply(rows, taken, back)


def put_back(rows: Tensor, back: Tensor) -> Tensor:
    """What attention gave for `taken` tokens, in the order of the line [T, ...]."""
    return _Return.apply(rows, back)


def grouped(
    lengths: tuple[int, ...], near: int, device: torch.device
) -> tuple[list[Group], Tensor | None, Tensor | None]:
    """(groups, taken, back): documents sorted into few calls, longest first; lengths in a group differ by up to `near`.

    `taken` [sum of G x L] are the line's tokens in the order of the groups, a shorter document filled up with its last
    token; `back` [T] is where in it each token of the line stands. None where that order is the line's own.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    members: list[list[int]] = []
    for number in order:
        if not members or lengths[members[-1][0]] - lengths[number] > near:
            members.append([])
        members[-1].append(number)
    groups = [Group(len(group), lengths[group[0]]) for group in members]
    if order == sorted(order) and sum(group.size * group.length for group in groups) == sum(lengths):
        return groups, None, None
    starts = [0, *accumulate(lengths)]
    taken, back = [], torch.empty(starts[-1], dtype=torch.long)
    place = 0
    for group in members:
        longest = lengths[group[0]]
        for number in group:
            length, start = lengths[number], starts[number]
            taken.append(torch.arange(start, start + longest).clamp_(max=start + length - 1))
            back[start : start + length] = torch.arange(place, place + length)
            place += longest
    return groups, torch.cat(taken).to(device), back.to(device)
