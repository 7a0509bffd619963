"""A loss or gradient that is not finite: which tensor was the first, and the batch that caused it, kept for a look."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ingot.data.loader import Batch
from ingot.errors import NotFinite
from ingot.parallel.sharded import Sharded

FOLDER = "not-finite"  # in a run's folder
LISTED_ROWS, LISTED_RANKS = 5, 3
ADVICE = {
    "weight": "the weights were bad before this step: take an earlier checkpoint and a lower optim.lr, or mend the "
    "model's files",
    "output": "look at the batch's rows; lower optim.lr, or use model.dtype=float32",
    "gradient": "lower optim.lr, or use model.dtype=float32; clipping does not mend what is not finite",
    "nothing": "the values overflow only in a sum over the whole step: lower optim.lr or train.tokens_per_step",
}


@dataclass
class _Findings:
    """The first bad tensors of one rank: of its weights, of what modules return in forward order, of gradients in
    backward order. `microbatch`: in which the first output or gradient was.
    """

    weight: str | None = None
    output: str | None = None
    gradient: str | None = None
    microbatch: int | None = None
    _under_way: int = field(default=-1, repr=False)

    @property
    def kind(self) -> str:
        """What was first."""
        return next((kind for kind in ("weight", "output", "gradient") if getattr(self, kind)), "nothing")

    def text(self) -> str:
        """All that was found, in the order in which it came about."""
        found = [text for text in (self.weight, self.output or self.gradient) if text]
        return ", then ".join(found)

    def look(self, kind: str, name: str, tensor: Tensor) -> None:
        """Remember the first bad one of `kind`."""
        if getattr(self, kind) is None and (problem := _bad(tensor)):
            setattr(self, kind, f"{name}: {problem}")
            if self.microbatch is None:
                self.microbatch = self._under_way

    def begin(self, *_: object) -> None:
        """A microbatch's forward pass begins."""
        self._under_way += 1


def not_finite(
    reason: str,
    sharded: Sharded,
    learn: Callable[[], object],
    batches: Sequence[Batch],
    where: Sequence[Sequence[str]],
    folder: Path,
    step: int,
) -> NotFinite:
    """The error to raise: the first bad tensor of every rank that has one, and where its batch lies for a look.

    All ranks call it together: `learn` repeats the step's forward and backward passes, with all that ranks do together
    in them. `where`: the rows of each of `batches`. Weights stay as they are, the gradient is forgotten.
    """
    findings = _Findings()
    for name, tensor in _weights(sharded.plain):
        findings.look("weight", f"weight {name}", tensor)
    findings.microbatch = None
    sharded.drop()
    with _watched(sharded.plain, findings):
        learn()
    rank = sharded.layout.ranks.rank
    reports = _gathered(_report(findings, reason, rank, batches, where, folder, step))
    if not reports:
        # Hooks never see gradients of weights that a strategy swaps for whole ones while it computes, nor the sums over
        # ranks. Last, because a bad sum is bad on every rank, whoever's part of it was.
        for name, parameter in sharded.plain.named_parameters():
            if parameter.grad is not None:
                findings.look("gradient", f"summed gradient of {name}", parameter.grad)
        findings.microbatch = None
        reports = _gathered(_report(findings, reason, rank, batches, where, folder, step))
    sharded.drop()
    kinds = [found.kind for found in reports]
    kind = next((kind for kind in ADVICE if kind in kinds), "nothing")
    # A bad weight may be on every rank or on one; those whose batches met it may be others.
    shown = [found for found in reports if found.met]
    if "weight" not in [found.kind for found in shown]:
        shown = [found for found in reports if not found.met][:1] + shown
    rows = ", ".join([name for names in where for name in names][:LISTED_ROWS])
    detail = "; ".join(found.text for found in shown[:LISTED_RANKS])
    detail = detail or f"Every tensor of the repeated step is finite; its first rows are {rows}"
    more = f"; and on {len(shown) - LISTED_RANKS} more ranks" if len(shown) > LISTED_RANKS else ""
    return NotFinite(f"{reason}; no weight was changed by it. {detail}{more}. To do: {ADVICE[kind]}")


@dataclass(frozen=True)
class _Report:
    """Of one rank that found something. `met`: a batch of its own led to it."""

    kind: str
    text: str
    met: bool


def _report(
    findings: _Findings,
    reason: str,
    rank: int,
    batches: Sequence[Batch],
    where: Sequence[Sequence[str]],
    folder: Path,
    step: int,
) -> _Report | None:
    """What this rank has to say; saves its bad batch."""
    if findings.kind == "nothing":
        return None
    text = f"First bad tensor on rank {rank}: {findings.text()}"
    number = findings.microbatch
    if number is not None and number < len(batches):
        stem = folder / FOLDER / f"step-{step:06d}-rank-{rank}-microbatch-{number}"
        rows = list(where[number])
        facts = {"step": step, "rank": rank, "microbatch": number, "reason": reason, "found": findings.text()}
        try:
            path = save_batch(batches[number], stem, facts | {"where": rows})
            text += f". Its batch: {path} (ingot.train.diagnosis.load_batch reads it)"
        except OSError as error:
            text += f". Its batch cannot be saved ({error.strerror})"
        more = f" and {len(rows) - LISTED_ROWS} more" if len(rows) > LISTED_ROWS else ""
        text += f", rows {', '.join(rows[:LISTED_ROWS])}{more}"
    return _Report(findings.kind, text, number is not None)


def save_batch(batch: Batch, stem: Path, facts: Mapping[str, Any]) -> Path:
    """Write `stem`.safetensors (what forward gets) and `stem`.json (`facts` and what else a Batch holds)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in vars(batch).items() if value is not None and name not in tensors}
    path = stem.with_suffix(".safetensors")
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    text = json.dumps({**facts, "batch": rest}, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path


def load_batch(path: Path | str) -> Batch:
    """The batch that `save_batch` wrote: give it to an objective, or decode its `ids_BT` with the tokenizer."""
    rest = json.loads(Path(path).with_suffix(".json").read_text(encoding="utf-8"))["batch"]
    if "row_lengths" in rest:
        rest["row_lengths"] = tuple(rest["row_lengths"])
    return Batch(**load_file(path), **rest)


@contextlib.contextmanager
def _watched(model: nn.Module, findings: _Findings) -> Iterator[None]:
    """Look at what every module returns, and at the gradients of that and of the weights, while the block runs."""

    def returned(name: str, module: nn.Module, inputs: object, output: object) -> None:
        for tensor in _tensors(output):
            findings.look("output", f"output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(findings.look, "gradient", f"gradient of the output of {name}"))

    handles = [model.register_forward_pre_hook(findings.begin)]
    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(partial(returned, name or "the model")))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(partial(findings.look, "gradient", f"gradient of {name}")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, getattr(tensor, "ds_tensor", tensor)  # this rank's part, under ZeRO-3


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        inner: Iterable[object] = value.values() if isinstance(value, Mapping) else value
        for part in inner:
            yield from _tensors(part)


@torch.no_grad()
def _bad(tensor: Tensor) -> str | None:
    """How many values of this rank's part are not finite, and where in it the first is; None when all are."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.is_floating_point() or bool(local.isfinite().all()):
        return None
    bad = ~local.isfinite()
    first = bad.nonzero()[0].tolist()
    count = f"{int(bad.sum()):,} of {local.numel():,} values here are not finite"
    return f"{count}, the first is {local[tuple(first)]} at {first}"


def _gathered(report: _Report | None) -> list[_Report]:
    """Those of all ranks, on all ranks."""
    found: list[_Report | None] = [report]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, report)
    return [other for other in found if other is not None]
