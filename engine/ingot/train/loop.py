"""The training loop: portions planned ahead, one loss divisor, checkpoints, and a clean stop. No integration is named
here.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from ingot.data.encoded import Encoded
from ingot.data.loader import Batch, Drawn, batches_of
from ingot.data.plan import Cursor, Divisor, Feed, Portion
from ingot.data.rows import EncodedRows
from ingot.errors import DataError, Interrupted
from ingot.parallel.layout import Layout
from ingot.parallel.optim import lr_at
from ingot.parallel.sharded import Sharded
from ingot.ranks import all_reduce_sum, on_main
from ingot.recipe import Recipe
from ingot.train import diagnosis, guard, memory
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.meter import Meter
from ingot.train.objectives import OBJECTIVES, collator_of
from ingot.train.prefetch import ahead

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
class StepInfo:
    """What one optimizer step did. `loss` is the mean over all targets of the step, over all ranks.

    `applied` is False for a step that was left out: not finite, or a spike.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    rates: dict[str, float]
    validation_loss: float | None = None
    applied: bool = True


@dataclass(frozen=True)
class Fitted:
    """How training ended."""

    steps: int
    tokens: int
    seconds: float
    best_step: int | None
    best_loss: float | None
    final_step: int
    skipped: int
    rates: dict[str, float]


def fit(
    sharded: Sharded,
    rows: Rows,
    recipe: Recipe,
    checkpoints: Checkpoints,
    *,
    resume: bool = False,
    on_step: Sequence[Callable[[StepInfo], None]] = (),
    notify: Notify = lambda text: None,
    meter: Meter | None = None,
    folder: Path | None = None,
) -> Fitted:
    """Train `sharded` on `rows.train`; leave the best or last weights in it, as `train.final` says.

    With `resume` the newest usable checkpoint is continued, exactly. `folder`: for bad batches and what running out of
    memory changed; None: beside the checkpoints.

    Raises Interrupted (after a checkpoint) on SIGINT or SIGTERM, CheckpointError when the disk fails, NotFinite and
    OutOfMemory when the recipe lets them stop the run, RecipeError where `train.deterministic` is not possible.
    """
    train, n_steps = recipe.train, rows.train.steps
    state = Progress(steps=n_steps, recipe_hash=checkpoints.recipe_hash)
    if resume:
        state = checkpoints.load(sharded, "last", notify)
    watch_every, save_every = _intervals(rows.train, recipe)
    meter = meter or Meter()
    meter.watch(sharded, train.activation_checkpointing == "full")
    step = _Step(sharded, rows, recipe, meter, folder or checkpoints.folder, notify)
    with _stop_signals() as stopped, guard.deterministic(train.deterministic), checkpoints:
        for portion, made in ahead(rows.train.start(state.cursor), step.batches):
            if state.step == n_steps:
                break
            meter.got_data()
            lr = lr_at(state.step, n_steps, recipe.optim)
            # Every rank hears of a stop or of a failed write in the same step, so that none waits for one that left.
            flags = [float(stopped()), float(checkpoints.failed() is not None)]
            outcome = step(portion, made, state, lr, flags)
            stop, failed = outcome.raised
            if failed:
                checkpoints.wait()
            recent = state.recent_losses
            if outcome.spiked and train.on_spike == "rewind":
                recent = _rewound(sharded, checkpoints, state, notify)
            state = replace(
                state,
                step=state.step + 1,
                tokens=state.tokens + portion.n_tokens,
                cursor=portion.cursor,
                skipped=state.skipped + (not outcome.applied),
                spikes=state.spikes + outcome.spiked,
                # Spikes too: where losses rise for good, they are no spikes any more after half of the window.
                recent_losses=(*recent, outcome.loss)[-guard.RECENT_STEPS :] if math.isfinite(outcome.loss) else recent,
                validation_loss=None,
            )
            meter.step(portion.n_tokens, portion.n_targets, portion.rows.lengths[portion.indices])
            done, end = state.step, state.step == n_steps
            if len(rows.validation) and (done % watch_every == 0 or end):
                with meter.phase("validation"):
                    watched = step.fitting(
                        lambda: validation_loss(sharded, rows, recipe, step.tokens_per_microbatch), done
                    )
                state = state.watched(watched)
            for report in on_step:
                info = StepInfo(
                    done,
                    n_steps,
                    outcome.loss,
                    lr,
                    outcome.norm,
                    portion.n_tokens,
                    meter.rates(),
                    state.validation_loss,
                    outcome.applied,
                )
                report(info)
            if done % save_every == 0 or end or stop or (state.validation_loss is not None and state.best_step == done):
                with meter.phase("checkpoint"):
                    checkpoints.save(sharded, state)
            if stop and not end:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped after step {done} of {n_steps}; everything up to it is in {checkpoints.last}. "
                    "Continue with --resume"
                )
            meter.resume()
    checkpoints.wait()
    final = "best" if train.final == "best" and state.best_step is not None else "last"
    finished = checkpoints.load(sharded, final, notify, weights_only=True)
    return Fitted(
        n_steps,
        state.tokens,
        meter.seconds,
        state.best_step,
        state.best_loss,
        finished.step,
        state.skipped,
        meter.averages(),
    )


def _rewound(sharded: Sharded, checkpoints: Checkpoints, state: Progress, notify: Notify) -> tuple[float, ...]:
    """Go back to the last checkpoint's weights, if there is one; return the losses that the next are compared with."""
    checkpoints.wait()
    if not on_main(checkpoints.last.exists):
        notify("there is no checkpoint to go back to yet: the weights stay as they are")
        return state.recent_losses
    found = checkpoints.load(sharded, "last", notify)
    notify(f"went back to the weights of step {found.step}, and on with the rows behind the spike")
    # Those weights are compared with their own losses. When nothing was learned since, these hold the spikes too, so
    # that a run whose losses rose for good goes back half a window of times and then on.
    nothing_since = state.step - found.step == state.skipped - found.skipped
    return state.recent_losses if nothing_since else found.recent_losses


@dataclass(frozen=True)
class _Outcome:
    """Of one step: mean loss, norm of the gradient (NaN: left out), which flags any rank has raised."""

    loss: float
    norm: float
    raised: list[bool]
    spiked: bool = False

    @property
    def applied(self) -> bool:
        return math.isfinite(self.norm)


class _Step:
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

    def __call__(self, portion: Portion, made: Made, state: Progress, lr: float, flags: list[float]) -> _Outcome:
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
                    return _Outcome(loss, math.nan, raised, spiked=True)
            with self.meter.phase("step"):
                norm = self.fitting(lambda: sharded.step(lr, self.recipe.optim.clip_grad_norm), step)
            if math.isfinite(norm):
                return _Outcome(loss, norm, raised)
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
        return _Outcome(loss, math.nan, raised)

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


def _intervals(feed: Feed, recipe: Recipe) -> tuple[int, int]:
    train = recipe.train
    per_epoch = max(1, math.ceil(feed.steps / max(1.0, train.epochs))) if train.max_steps is None else feed.steps
    watch = train.evaluate_every_steps or per_epoch
    return watch, train.checkpoint_every_steps or watch


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag that is read between steps; a second one acts at once."""
    seen = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach only the main thread; a notebook's worker thread trains without them
        return

    def note(number: int, _frame: object) -> None:
        nonlocal seen
        seen = True
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
