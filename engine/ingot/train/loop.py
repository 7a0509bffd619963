"""The training loop: steps planned ahead, one loss divisor, checkpoints, and a clean stop. No integration is named
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

import torch

from ingot.data.loader import IGNORE, collate, microbatches, plan_epoch
from ingot.data.template import Encoded
from ingot.errors import IngotError, Interrupted
from ingot.parallel.apply import Sharded
from ingot.ranks import all_reduce_sum, on_main
from ingot.recipe import Recipe, Train
from ingot.train import checkpoint
from ingot.train.checkpoint import Progress
from ingot.train.meter import Meter
from ingot.train.objectives import OBJECTIVES
from ingot.train.optim import clip, lr_at, make_optimizer


@dataclass(frozen=True)
class Rows:
    """Encoded rows to learn from and to watch; `pad_id` fills up batches."""

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    pad_id: int


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did. `loss` is the mean over all targets of the step, over all ranks."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    rates: dict[str, float]
    validation_loss: float | None = None


@dataclass(frozen=True)
class Fitted:
    """How training ended."""

    steps: int
    tokens: int
    seconds: float
    best_step: int | None
    best_loss: float | None
    final_step: int
    rates: dict[str, float]


def plan_steps(lengths: Sequence[int], train: Train) -> list[list[int]]:
    """Row indices of every optimizer step of the whole run: a pure function of the lengths and the section."""
    steps: list[list[int]] = []
    remaining, epoch = train.epochs, 0
    while remaining > 1e-9 if train.max_steps is None else len(steps) < train.max_steps:
        plan = plan_epoch(lengths, train.tokens_per_step, train.seed, epoch, train.group_by_length)
        share = 1.0 if train.max_steps is not None else min(1.0, remaining)
        steps += plan[: max(1, round(share * len(plan)))]
        remaining, epoch = remaining - 1.0, epoch + 1
    return steps[: train.max_steps]


def n_targets(rows: Sequence[Encoded]) -> int:
    """Trainable targets of `rows`: classes, or trainable tokens that have something before them."""
    return sum(1 if row.label is not None else sum(row.trainable[1:]) for row in rows)


def fit(
    sharded: Sharded,
    rows: Rows,
    recipe: Recipe,
    folder: Path,
    recipe_hash: str,
    *,
    resume: bool = False,
    on_step: Sequence[Callable[[StepInfo], None]] = (),
) -> Fitted:
    """Train `sharded` on `rows.train`; leave the best or last weights in it, as `train.final` says.

    Checkpoints go to `folder`. With `resume` the newest of them is continued, exactly. Raises Interrupted (after a
    checkpoint) on
    SIGINT or SIGTERM, CheckpointError when the disk fails, IngotError when the loss is not finite.
    """
    train = recipe.train
    lengths = [len(row.ids) for row in rows.train]
    plan = plan_steps(lengths, train)
    optimizer = make_optimizer(sharded.plain, recipe.optim)
    state = Progress(0, len(plan), 0, recipe_hash, None, None, None)
    if resume:
        state = checkpoint.load(folder / "last", sharded.plain, optimizer, recipe_hash)
    watch_every, save_every = _intervals(plan, train)
    meter = Meter()
    with _stop_signals() as stopped:
        for step in range(state.step, len(plan)):
            chosen = [rows.train[index] for index in plan[step]]
            lr = lr_at(step, len(plan), recipe.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm, stop = _train_step(
                sharded, rows, plan[step], chosen, lengths, optimizer, recipe, step, stopped()
            )
            tokens = sum(map(len, (row.ids for row in chosen)))
            meter.step(tokens, n_targets(chosen))
            done = step + 1
            state = replace(state, step=done, tokens=state.tokens + tokens, validation_loss=None)
            if rows.validation and (done % watch_every == 0 or done == len(plan)):
                state = _watch(state, validation_loss(sharded, rows, recipe))
            for report in on_step:
                report(StepInfo(done, len(plan), loss, lr, norm, tokens, meter.rates(), state.validation_loss))
            if (
                done % save_every == 0
                or done == len(plan)
                or stop
                or (state.validation_loss is not None and state.best_step == done)
            ):
                on_main(partial(checkpoint.save, folder, sharded.plain, optimizer, state, train.keep_checkpoints))
            if stop and done < len(plan):
                raise Interrupted(
                    f"stopped after step {done} of {len(plan)}; everything up to it is in {folder / 'last'}. "
                    "Continue with --resume"
                )
            meter.resume()
    final = "best" if train.final == "best" and state.best_step is not None else "last"
    finished = checkpoint.load(folder / final, sharded.plain, None, recipe_hash)
    return Fitted(
        len(plan), state.tokens, meter.seconds, state.best_step, state.best_loss, finished.step, meter.rates()
    )


def _train_step(
    sharded: Sharded,
    rows: Rows,
    indices: Sequence[int],
    chosen: Sequence[Encoded],
    lengths: Sequence[int],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    stop: bool,
) -> tuple[float, float, bool]:
    """One optimizer step over the rows at `indices`: returns (mean loss, gradient norm, whether any rank wants to
    stop).
    """
    ranks, train = sharded.ranks, recipe.train
    objective = OBJECTIVES[recipe.objective.task]
    divisor = n_targets(chosen)  # of ALL ranks: every rank knows the whole plan, so nothing has to be communicated
    sharded.wrapped.train()
    # Dropout is a function of (seed, step, rank), so a resumed run draws the same masks without stored generator
    # states.
    torch.manual_seed((train.seed * 1_000_003 + step) * 1_024 + ranks.rank)
    batches = [
        [rows.train[i] for i in part]
        for part in microbatches(indices, lengths, ranks.rank, ranks.world, train.tokens_per_microbatch)
    ]
    if not batches:  # more ranks than rows in this step: the others still wait for this one's (zero) gradients
        batches = [[_muted(chosen[0])]]
    total = torch.zeros(2, device=next(sharded.plain.parameters()).device)
    for number, part in enumerate(batches):
        with sharded.microbatch(last=number == len(batches) - 1):
            loss = objective(sharded, collate(part, rows.pad_id), divisor, recipe.objective)
            sharded.backward(loss)
        total[0] += loss.detach()
    total[1] = float(stop)
    all_reduce_sum(total)
    mean = total[0].item()
    norm = clip(sharded.plain, recipe.optim.clip_grad_norm).item()
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise IngotError(
            f"step {step + 1}: loss {mean}, gradient norm {norm}; nothing was updated by it. "
            f"Rows: {', '.join(row.where for row in chosen[:3])} ... "
            "Lower optim.lr, or use model.dtype=float32"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, norm, bool(total[1] > 0)


def _muted(row: Encoded) -> Encoded:
    return replace(row, trainable=[False] * len(row.ids), label=None if row.label is None else IGNORE)


@torch.no_grad()
def validation_loss(sharded: Sharded, rows: Rows, recipe: Recipe) -> float:
    """Mean loss per target over all validation rows, over all ranks."""
    sharded.wrapped.eval()
    objective = OBJECTIVES[recipe.objective.task]
    lengths = [len(row.ids) for row in rows.validation]
    divisor = n_targets(rows.validation)
    total = torch.zeros(1, device=next(sharded.plain.parameters()).device)
    for part in microbatches(
        range(len(lengths)), lengths, sharded.ranks.rank, sharded.ranks.world, recipe.train.tokens_per_microbatch
    ):
        total += objective(sharded, collate([rows.validation[i] for i in part], rows.pad_id), divisor, recipe.objective)
    return all_reduce_sum(total).item()


def _intervals(plan: Sequence[Sequence[int]], train: Train) -> tuple[int, int]:
    per_epoch = max(1, math.ceil(len(plan) / max(1.0, train.epochs))) if train.max_steps is None else len(plan)
    watch = train.evaluate_every_steps or per_epoch
    return watch, train.checkpoint_every_steps or watch


def _watch(state: Progress, loss: float) -> Progress:
    if state.best_loss is None or loss < state.best_loss:
        state = replace(state, best_loss=loss, best_step=state.step)
    return replace(state, validation_loss=loss)


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
