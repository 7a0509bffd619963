"""One optimizer step: microbatches, one loss divisor, what is left out; and the loss over rows only watched."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from ingot.data.encoded import Encoded
from ingot.data.loader import Batch, Drawn, batches_of
from ingot.data.plan import Cursor, Divisor, Feed, Portion
from ingot.data.rows import EncodedRows
from ingot.errors import DataError
from ingot.parallel.layout import Layout
from ingot.parallel.sharded import Sharded
from ingot.ranks import all_reduce_sum
from ingot.recipe import Recipe
from ingot.train import diagnosis, guard, memory
from ingot.train.checkpoint import Progress
from ingot.train.meter import Meter
from ingot.train.objectives import OBJECTIVES, collator_of

Notify = Callable[[str], None]
Value = TypeVar("Value")
Made = tuple[int, list[Batch]]  # the microbatches of a step, and the budget that they were cut for


@dataclass(frozen=True)
class Rows:
    """What to learn from, and encoded rows to watch; `pad_id` fills up batches. fill-mask: `mask_id` hides tokens of
    `vocabulary` many.
    """

    train: Feed
    validation: EncodedRows
    pad_id: int
    mask_id: int | None = None
    vocabulary: int = 0

    def batch(self, part: Sequence[Encoded], recipe: Recipe, layout: Layout, draw: object) -> Batch:
        """A microbatch, as the objective wants it; what it draws by chance depends on `draw` and the seed alone."""
        drawn = None
        if self.mask_id is not None:
            drawn = Drawn(self.mask_id, self.vocabulary, f"{recipe.train.seed} {draw}")
        make, flat = collator_of(recipe.objective), recipe.data.batches != "padded"
        return make(part, self.pad_id, flat=flat, multiple=layout.context, drawn=drawn)


@dataclass(frozen=True)
class Outcome:
    """Of one step: mean loss, norm of the gradient (NaN: left out), which flags any rank has raised."""

    loss: float
    norm: float
    raised: list[bool]
    spiked: bool = False

    @property
    def applied(self) -> bool:
        return math.isfinite(self.norm)


class Step:
    """One optimizer step; knows the budget of a forward pass, which running out of memory may halve."""

    def __init__(
        self, sharded: Sharded, rows: Rows, recipe: Recipe, meter: Meter, folder: Path, notify: Notify
    ) -> None:
        self.sharded, self.rows, self.recipe, self.meter, self.notify = sharded, rows, recipe, meter, notify
        self.folder, self.tokens_per_microbatch = folder, memory.budget_of(recipe, folder, notify)
        self.objective = OBJECTIVES[recipe.objective.loss]
        self.under_way = self.largest = memory.Load()

    def parts(self, portion: Portion) -> list[list[Encoded]]:
        """Rows of this rank's microbatches."""
        layout, flat = self.sharded.layout, self.recipe.data.batches != "padded"
        return batches_of(
            portion, layout.data_rank, layout.data, self.tokens_per_microbatch, flat=flat, even=self.sharded.even
        )

    def batches(self, portion: Portion) -> Made:
        """This rank's share of a step."""
        budget, layout = self.tokens_per_microbatch, self.sharded.layout
        return budget, [
            self.rows.batch(part, self.recipe, layout, portion.cursor.epoch) for part in self.parts(portion)
        ]

    def __call__(self, portion: Portion, made: Made, state: Progress, lr: float, flags: list[float]) -> Outcome:
        """Learn from `portion`. Raises what `fit` names."""
        sharded, train, step = self.sharded, self.recipe.train, state.step + 1
        if portion.n_targets == 0:
            rows = portion.rows[portion.indices[0]].where
            raise DataError("data.train", rows, f"none of the rows of step {step} has a trainable token; remove them")
        loss_sum, batches = self._learned(portion, made, step)
        with self.meter.phase("communication"):
            total = torch.stack([loss_sum, *loss_sum.new_tensor(flags)])
            loss, *counts = all_reduce_sum(total).tolist()
        loss, raised = loss / sharded.layout.tensor, [count > 0 for count in counts]
        if math.isfinite(loss):
            if train.spike_factor is not None and guard.is_spike(loss, state.recent_losses, train.spike_factor):
                left_out = train.on_spike != "warn"
                usual = f"the last {len(state.recent_losses)} were about {median(state.recent_losses):.4g}"
                self.notify(f"step {step}: the loss {loss:.4g} is a spike ({usual})" + "; left out" * left_out)
                if left_out:
                    sharded.drop()
                    return Outcome(loss, math.nan, raised, spiked=True)
            with self.meter.phase("step"):
                norm = self.fitting(lambda: sharded.step(lr, self.recipe.optim.clip_grad_norm), step)
            if math.isfinite(norm):
                return Outcome(loss, norm, raised)
            reason = f"step {step}: the loss is {loss:.4g}, but the gradient's norm is {norm}"
        else:
            reason = f"step {step}: the loss is {loss}"
        sharded.drop()
        left_out_before = state.skipped - state.spikes
        if left_out_before >= train.nonfinite_budget:
            where = [[row.where for row in part] for part in self.parts(portion)]
            learn = partial(self._learn, batches, portion.divisor, step)
            raise diagnosis.not_finite(reason, sharded, learn, batches, where, self.folder, step)
        self.notify(f"{reason}; the step is left out ({left_out_before + 1} of at most {train.nonfinite_budget})")
        return Outcome(loss, math.nan, raised)

    def _learned(self, portion: Portion, made: Made, step: int) -> tuple[torch.Tensor, list[Batch]]:
        """This rank's part of the mean loss, and the microbatches that it came from: smaller ones after running out of
        memory.
        """
        budget, batches = made
        if budget != self.tokens_per_microbatch:  # made ahead, before the budget was halved
            _, batches = self.batches(portion)
        while True:
            found = self._attempt(partial(self._learn, batches, portion.divisor, step))
            if not isinstance(found, memory.Failure):
                return found, batches
            self.sharded.drop()
            self.tokens_per_microbatch = memory.relieve(
                found,
                self.sharded,
                portion,
                self.recipe,
                self.tokens_per_microbatch,
                self.largest,
                step,
                self.folder,
                self.notify,
            )
            _, batches = self.batches(portion)

    def _attempt(self, work: Callable[[], Value]) -> Value | memory.Failure:
        """What `work` returns, or what was in memory when it ran out. The traceback, which keeps the failed step's
        tensors alive, ends here.
        """
        try:
            return work()
        except Exception as error:
            if memory.is_out_of_memory(error):
                strategy = self.recipe.parallel.strategy
                return memory.Failure.of(error, self.meter.at, self.under_way, self.sharded, strategy)
            found = guard.explained(error)
            if found is error:
                raise
            raise found from error

    def fitting(self, work: Callable[[], Value], step: int) -> Value:
        """What `work` returns; OutOfMemory, with what grew, when it does not fit."""
        found = self._attempt(work)
        if isinstance(found, memory.Failure):
            ranks = self.sharded.layout.ranks
            budget = self.tokens_per_microbatch
            raise memory.explain(found, self.recipe, budget, self.largest, ranks.world, ranks.rank, step)
        return found

    def _learn(self, batches: list[Batch], divisor: Divisor, step: int) -> torch.Tensor:
        """Gradients of this rank's part of step `step` (1 is the first); returns its part of the mean loss, a float32
        scalar.
        """
        sharded, layout = self.sharded, self.sharded.layout
        sharded.wrapped.train()
        # Dropout is a function of (seed, step, rank), so a resumed run draws the same masks without stored generator
        # states. Ranks of one tensor group draw the same.
        rank = layout.ranks.rank // layout.tensor
        torch.manual_seed((self.recipe.train.seed * 1_000_003 + step - 1) * 1_024 + rank)
        total = torch.zeros((), device=sharded.device)
        for number, batch in enumerate(batches):
            self.under_way = memory.Load.of(batch)
            with sharded.microbatch(last=number == len(batches) - 1):
                with self.meter.phase("forward"):
                    loss = self.objective(sharded, batch, divisor, self.recipe.objective)
                with self.meter.phase("backward"):
                    sharded.backward(loss)
            total += loss.detach()
            self.largest = max(self.largest, self.under_way, key=lambda load: load.tokens)
        return total


@torch.no_grad()
def validation_loss(sharded: Sharded, rows: Rows, recipe: Recipe, tokens_per_microbatch: int) -> float:
    """The loss over all validation rows, over all ranks."""
    sharded.wrapped.eval()
    objective, layout, flat = OBJECTIVES[recipe.objective.loss], sharded.layout, recipe.data.batches != "padded"
    everything = Portion(rows.validation, [[index] for index in range(len(rows.validation))], Cursor())
    total = torch.zeros((), device=sharded.device)
    for part in batches_of(
        everything, layout.data_rank, layout.data, tokens_per_microbatch, flat=flat, even=sharded.even
    ):
        batch = rows.batch(part, recipe, layout, "validation")
        total += objective(sharded, batch, everything.divisor, recipe.objective)
    return all_reduce_sum(total).item() / layout.tensor
