"""The training loop: portions planned ahead, one loss divisor, checkpoints, and a clean stop. No integration is named
here.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ingot.data.loader import Batch, batches_of, collate
from ingot.data.plan import Cursor, Feed, Portion
from ingot.data.rows import EncodedRows
from ingot.errors import Interrupted
from ingot.parallel.optim import lr_at
from ingot.parallel.sharded import Sharded
from ingot.ranks import all_reduce_sum
from ingot.recipe import Recipe
from ingot.train import diagnosis, memory
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.guard import RECENT_STEPS, is_spike
from ingot.train.meter import Meter
from ingot.train.objectives import OBJECTIVES
from ingot.train.prefetch import ahead

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """What to learn from, and encoded rows to watch; `pad_id` fills up batches."""

    train: Feed
    validation: EncodedRows
    pad_id: int


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
) -> Fitted:
    """Train `sharded` on `rows.train`; leave the best or last weights in it, as `train.final` says.

    With `resume` the newest usable checkpoint is continued, exactly. Raises Interrupted (after a checkpoint) on SIGINT
    or SIGTERM, CheckpointError when the disk fails, NotFinite and OutOfMemory when the recipe lets them stop the run.
    """
    train, n_steps = recipe.train, rows.train.steps
    state = Progress(steps=n_steps, recipe_hash=checkpoints.recipe_hash)
    if resume:
        state = checkpoints.load(sharded, "last", notify)
    watch_every, save_every = _intervals(rows.train, recipe)
    meter = meter or Meter()
    step = _Step(sharded, rows.pad_id, recipe, meter, notify)
    with _stop_signals() as stopped, checkpoints:
        for portion, batches in ahead(rows.train.start(state.cursor), step.batches):
            if state.step == n_steps:
                break
            meter.got_data()
            lr = lr_at(state.step, n_steps, recipe.optim)
            # Every rank hears of a stop or of a failed write in the same step, so that none waits for one that left.
            flags = [float(stopped()), float(checkpoints.failed() is not None)]
            loss, norm, (stop, failed) = step(portion, batches, state, lr, flags)
            if failed:
                checkpoints.wait()
            applied = math.isfinite(norm)
            recent = (*state.recent_losses, loss)[-RECENT_STEPS:] if applied else state.recent_losses
            state = replace(
                state,
                step=state.step + 1,
                tokens=state.tokens + portion.n_tokens,
                cursor=portion.cursor,
                skipped=state.skipped + (not applied),
                recent_losses=recent,
                validation_loss=None,
            )
            if not applied and math.isfinite(loss) and train.on_spike == "rewind":
                checkpoints.wait()
                checkpoints.load(sharded, "last", notify)
            meter.step(portion.n_tokens, portion.n_targets)
            done, end = state.step, state.step == n_steps
            if len(rows.validation) and (done % watch_every == 0 or end):
                with meter.phase("validation"):
                    state = state.watched(validation_loss(sharded, rows, recipe, step.tokens_per_microbatch))
            for report in on_step:
                info = StepInfo(
                    done, n_steps, loss, lr, norm, portion.n_tokens, meter.rates(), state.validation_loss, applied
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
        meter.rates(),
    )


class _Step:
    """One optimizer step; knows the budget of a forward pass, which running out of memory may halve."""

    def __init__(self, sharded: Sharded, pad_id: int, recipe: Recipe, meter: Meter, notify: Notify) -> None:
        self.sharded, self.pad_id, self.recipe, self.meter, self.notify = sharded, pad_id, recipe, meter, notify
        self.tokens_per_microbatch = recipe.train.tokens_per_microbatch
        self.objective = OBJECTIVES[recipe.objective.task]

    def batches(self, portion: Portion) -> list[Batch]:
        """This rank's share of a step."""
        layout, flat = self.sharded.layout, self.recipe.data.batches != "padded"
        parts = batches_of(
            portion, layout.data_rank, layout.data, self.tokens_per_microbatch, flat=flat, even=self.sharded.even
        )
        return [collate(part, self.pad_id, flat=flat, multiple=layout.context) for part in parts]

    def __call__(
        self, portion: Portion, batches: list[Batch], state: Progress, lr: float, flags: list[float]
    ) -> tuple[float, float, list[bool]]:
        """Learn from `portion`; return (mean loss, gradient norm, which of `flags` any rank has set).

        The norm is NaN for a step that was left out.
        """
        sharded, train = self.sharded, self.recipe.train
        while True:
            try:
                loss_sum = self._learn(batches, portion.n_targets, state.step)
                break
            except (torch.OutOfMemoryError, MemoryError) as error:
                sharded.drop()
                self.tokens_per_microbatch = memory.relieve(
                    error, sharded, batches, portion, self.recipe, self.tokens_per_microbatch, self.notify
                )
                batches = self.batches(portion)
        with self.meter.phase("communication"):
            total = torch.stack([loss_sum, *loss_sum.new_tensor(flags)])
            loss, *counts = all_reduce_sum(total).tolist()
        loss, raised = loss / sharded.layout.tensor, [count > 0 for count in counts]
        reason = None
        if not math.isfinite(loss):
            reason = f"step {state.step + 1}: the loss is {loss}"
        elif train.spike_factor is not None and is_spike(loss, state.recent_losses, train.spike_factor):
            text = f"step {state.step + 1}: the loss {loss:.4g} is a spike"
            if train.on_spike != "warn":
                self.notify(f"{text}; the step is left out")
                sharded.drop()
                return loss, math.nan, raised
            self.notify(text)
        if reason is None:
            with self.meter.phase("step"):
                norm = sharded.step(lr, self.recipe.optim.clip_grad_norm)
            if math.isfinite(norm):
                return loss, norm, raised
            reason = f"step {state.step + 1}: loss {loss:.4g}, but the gradient's norm is {norm}"
        sharded.drop()
        if state.skipped >= train.nonfinite_budget:
            raise diagnosis.not_finite(reason, sharded, batches, portion, self.recipe, self.objective)
        self.notify(f"{reason}; the step is left out ({state.skipped + 1} of at most {train.nonfinite_budget})")
        return loss if math.isfinite(loss) else math.nan, math.nan, raised

    def _learn(self, batches: list[Batch], divisor: int, step: int) -> torch.Tensor:
        """Gradients of this rank's part of a step; returns its part of the mean loss, a float32 scalar."""
        sharded, layout = self.sharded, self.sharded.layout
        sharded.wrapped.train()
        # Dropout is a function of (seed, step, rank), so a resumed run draws the same masks without stored generator
        # states. Ranks of one tensor group draw the same.
        rank = layout.ranks.rank // layout.tensor
        torch.manual_seed((self.recipe.train.seed * 1_000_003 + step) * 1_024 + rank)
        total = torch.zeros((), device=sharded.device)
        for number, batch in enumerate(batches):
            with sharded.microbatch(last=number == len(batches) - 1):
                with self.meter.phase("forward"):
                    loss = self.objective(sharded, batch, divisor, self.recipe.objective)
                with self.meter.phase("backward"):
                    sharded.backward(loss)
            total += loss.detach()
        return total


@torch.no_grad()
def validation_loss(sharded: Sharded, rows: Rows, recipe: Recipe, tokens_per_microbatch: int) -> float:
    """Mean loss per target over all validation rows, over all ranks."""
    sharded.wrapped.eval()
    objective, layout, flat = OBJECTIVES[recipe.objective.task], sharded.layout, recipe.data.batches != "padded"
    everything = Portion(rows.validation, [[index] for index in range(len(rows.validation))], Cursor())
    total = torch.zeros((), device=sharded.device)
    for part in batches_of(
        everything, layout.data_rank, layout.data, tokens_per_microbatch, flat=flat, even=sharded.even
    ):
        batch = collate(part, rows.pad_id, flat=flat, multiple=layout.context)
        total += objective(sharded, batch, everything.n_targets, recipe.objective)
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
