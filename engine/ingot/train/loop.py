"""The training loop: portions planned ahead, one loss divisor, checkpoints, and a clean stop. No integration is named
here.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ingot.data.plan import Feed
from ingot.errors import IngotError, Interrupted, OutOfMemory
from ingot.parallel.optim import lr_at
from ingot.parallel.sharded import Sharded
from ingot.ranks import on_main
from ingot.recipe import Recipe
from ingot.train import guard
from ingot.train.checkpoint import Checkpoints, Progress
from ingot.train.meter import Meter
from ingot.train.prefetch import ahead
from ingot.train.step import Notify, Step
from ingot.train.step import Rows as Rows
from ingot.train.step import validation_loss as validation_loss
from ingot.train.watch import Measured, Watch


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
    """How training ended. `best_step` is so by `best_by`; `best_loss` is the lowest validation loss. `measured`: scores
    of tasks by step, the base model's first; empty where none are watched.
    """

    steps: int
    tokens: int
    seconds: float
    best_step: int | None
    best_loss: float | None
    final_step: int
    skipped: int
    rates: dict[str, float]
    best_by: str = "validation_loss"
    best_value: float | None = None
    measured: tuple[Measured, ...] = ()


def fit(
    sharded: Sharded,
    rows: Rows,
    recipe: Recipe,
    checkpoints: Checkpoints,
    *,
    resume: bool = False,
    on_step: Sequence[Callable[[StepInfo], None]] = (),
    watch: Watch | None = None,
    on_measured: Callable[[Measured, Progress], None] = lambda point, state: None,
    notify: Notify = lambda text: None,
    meter: Meter | None = None,
    folder: Path | None = None,
) -> Fitted:
    """Train `sharded` on `rows.train`; leave the best or last weights in it, as `train.final` says.

    With `resume` the newest usable checkpoint is continued, exactly. `watch`: what else to measure than the validation
    loss, and `on_measured` hears of it. `folder`: for bad batches and what running out of memory changed; None: beside
    the checkpoints.

    Raises Interrupted (after a checkpoint) on SIGINT or SIGTERM, CheckpointError when the disk fails, NotFinite and
    OutOfMemory when the recipe lets them stop the run, RecipeError where `train.deterministic` is not possible.
    """
    train, n_steps = recipe.train, rows.train.steps
    state = Progress(steps=n_steps, recipe_hash=checkpoints.recipe_hash)
    if resume:
        state = checkpoints.load(sharded, "last", notify)
    if watch is not None:
        state = replace(state, best_by=watch.best_by, higher_is_better=watch.higher_is_better)
    watch_every, save_every = _intervals(rows.train, recipe)
    meter = meter or Meter()
    meter.watch(sharded, train.activation_checkpointing == "full")
    step = Step(sharded, rows, recipe, meter, folder or checkpoints.folder, notify)
    with _stop_signals() as stopped, guard.deterministic(train.deterministic), checkpoints:
        if watch is not None and not state.measured:
            state = _measured(watch, step, state)
            on_measured(state.measured[-1], state)
            meter.resume()
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
                judged=None,
            )
            meter.step(portion.n_tokens, portion.n_targets, portion.rows.lengths[portion.indices])
            done, end = state.step, state.step == n_steps
            if len(rows.validation) and (done % watch_every == 0 or end):
                with meter.phase("validation"):
                    watched = step.fitting(
                        lambda: validation_loss(sharded, rows, recipe, step.tokens_per_microbatch), done
                    )
                state = state.watched(watched)
            if watch is not None and watch.due(done, n_steps):
                state = _measured(watch, step, state)
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
            if state.measured and state.measured[-1].step == done:
                on_measured(state.measured[-1], state)
            if done % save_every == 0 or end or stop or state.best_step == done:
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
        state.best_by,
        state.best_value,
        state.measured,
    )


def _measured(watch: Watch, step: Step, state: Progress) -> Progress:
    """`state` with the metrics of its step.

    What fails for the base model stops the run before anything is spent; later it costs the point, not the run.
    """
    with step.meter.phase("evaluation"):
        try:
            scores = step.fitting(lambda: watch.measure(step.sharded), state.step)
        except OutOfMemory:
            raise
        except IngotError as error:
            if state.step == 0:
                raise
            step.notify(f"step {state.step}: not measured: {error}")
            return state
    return state.with_scores(Measured(state.step, scores))


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
