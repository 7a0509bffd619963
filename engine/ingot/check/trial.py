"""The recipe's own model on this machine alone, ready for a few steps, and the losses that proofs compare."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ingot.assembly import build
from ingot.data.encoded import Encoded
from ingot.data.loader import batches_of
from ingot.data.plan import Cursor, Divisor, Portion
from ingot.data.rows import ListRows
from ingot.errors import IngotError
from ingot.model.adapters import trainable_tensors
from ingot.model.load import resolve_dtype
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.distillation import load_teacher
from ingot.train.objectives import OBJECTIVES
from ingot.train.reference import referenced

from .subject import Subject

STILL = 0.01  # root mean square that a tensor of zeros is stirred as if it had: one half of an adapter starts so
SMALL_LOSS = 0.05  # below it differences are taken as a share of this
MOST_DRAWN = 1 << 16  # numbers that are drawn for a tensor; larger ones repeat them


@dataclass(frozen=True)
class Trial:
    """`sharded`: the model that trains, on one rank. `rows`: what it is tried on."""

    subject: Subject
    sharded: Sharded
    rows: list[Encoded]

    @property
    def exact(self) -> bool:
        """Whether everything is computed in float32."""
        return self.sharded.compute_dtype == torch.float32

    def tolerance(self, exact: float, rounded: float) -> float:
        """How far two computations of one number may be apart, relatively, in float32 and in bfloat16."""
        return exact if self.exact else rounded


class Frozen(IngotError):
    """Internal: the model has nothing to train."""


def set_up(subject: Subject) -> Trial:
    """Build the model as training would, on `subject.device`. Raises what building raises, and Frozen."""
    recipe, rows = subject.alone, subject.probes
    labels = subject.prepared.facts.labels
    model = build(recipe, subject.home, labels, Ranks()).model
    if not any(p.requires_grad for p in model.parameters()):
        raise Frozen("nothing is trainable: every tensor is frozen")
    dtype = resolve_dtype(recipe.model.dtype, subject.device)
    sharded = on_one_rank(model, subject, load_teacher(recipe, subject.home, subject.device, dtype))
    return Trial(subject, sharded, referenced(sharded, rows, recipe, subject.prepared.rows.pad_id))


def on_one_rank(model: nn.Module, subject: Subject, teacher: nn.Module | None = None) -> Sharded:
    """`model` behind the loop's verbs, beside its teacher if it has one."""
    recipe = subject.alone
    dtype = resolve_dtype(recipe.model.dtype, subject.device)
    sharded = parallelize(model, Ranks(), recipe, subject.device, dtype)
    sharded.teacher = teacher
    return sharded


def shares(rows: Sequence[Encoded], subject: Subject, world: int = 1, budget: int | None = None) -> list[list[Encoded]]:
    """The microbatches of all `world` ranks for a step of `rows`, one rank's after the other's.

    `budget`: tokens of one; None: all of a rank's rows are one.
    """
    budget = budget or len(rows) * max(len(row.ids) for row in rows)
    portion = Portion(ListRows(rows), [[number] for number in range(len(rows))], Cursor())
    flat = subject.recipe.data.batches != "padded"
    return [part for rank in range(world) for part in batches_of(portion, rank, world, budget, flat=flat, even=False)]


def divisor_of(rows: Sequence[Encoded]) -> Divisor:
    """What the loss of a step of `rows` is divided by."""
    return Divisor(sum(row.n_targets for row in rows), len(rows))


def loss_of(
    sharded: Sharded,
    subject: Subject,
    parts: Sequence[Sequence[Encoded]],
    divisor: Divisor,
    *,
    flat: bool | None = None,
) -> Tensor:
    """The step's loss from its microbatches. `flat`: how rows lie; None as the recipe says. Float32, a scalar."""
    objective, section = OBJECTIVES[subject.recipe.objective.loss], subject.recipe.objective
    total = torch.zeros((), device=sharded.device)
    for part in parts:
        loss = objective(sharded, subject.batch(part, flat=flat), divisor, section)
        if torch.is_grad_enabled():
            sharded.backward(loss)
        total += loss.detach()
    return total


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Without dropout, so that two passes over the same rows can be compared."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def stir(trial: Trial) -> None:
    """Move what is trained until the loss shows it well above what `tolerance` lets pass.

    Two steps with a small optim.lr change the loss by less than rounding, and a model that lost them would look right.
    """
    seeded, wanted = torch.Generator().manual_seed(0), trial.tolerance(1e-2, 1e-1)
    with quiet(trial.sharded.wrapped), torch.no_grad():
        before = _stirred_loss(trial)
        for size in (0.03, 0.1, 0.3, 1.0):
            for p in (p for _, p in trainable_tensors(trial.sharded.plain) if p.numel()):
                few = torch.randn(min(p.numel(), MOST_DRAWN), generator=seeded)
                noise = few.repeat(-(-p.numel() // len(few)))[: p.numel()].view(p.shape).to(p)
                p.add_(noise, alpha=size * max(float(p.float().square().mean().sqrt()), STILL))
            if not abs(_stirred_loss(trial) - before) < wanted * max(before, 0.1):
                return


def _stirred_loss(trial: Trial) -> float:
    return loss_of(trial.sharded, trial.subject, shares(trial.rows, trial.subject), divisor_of(trial.rows)).item()


def apart_by(one: float, other: float) -> float:
    """How far `other` is from `one`, as a share of it; a loss near zero is a difference of numbers around one, and as
    exact as these.
    """
    return abs(one - other) / max(abs(one), SMALL_LOSS)


def gradients(sharded: Sharded) -> dict[str, Tensor]:
    """Copies of the gradients on the CPU, in float32; then they are forgotten."""
    found = {name: p.grad.detach().float().cpu() for name, p in trainable_tensors(sharded.plain) if p.grad is not None}
    found = {name: gradient.clone() for name, gradient in found.items()}
    sharded.drop()
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, as a share of the first one's norm."""
    names = one.keys() | other.keys()
    zero = torch.zeros(())
    apart = sum(float((one.get(name, zero) - other.get(name, zero)).square().sum()) for name in names)
    size = sum(float(gradient.square().sum()) for gradient in one.values())
    return float((apart / size) ** 0.5) if size else float("inf") if apart else 0.0


def fingerprints(model: nn.Module) -> dict[str, Any]:
    """Frozen tensor -> a number that changes when any of its bits does."""
    return {name: _bits(p.detach()) for name, p in model.named_parameters() if not p.requires_grad}


def _bits(tensor: Tensor) -> tuple[int, int]:
    """Sum of the bytes, and of the bytes times their places: a change that keeps the one changes the other."""
    found = tensor.contiguous().flatten().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, len(found) + 1, device=found.device) % 65_521
    return int(found.sum()), int((found * places).sum())
