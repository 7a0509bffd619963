"""A look inside some steps: torch's profiler as a trace and a table, and the GPU's allocations. Changes no result."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ingot.errors import RecipeError
from ingot.recipe import Diagnose

WARMUP_STEPS = 2  # kernels are loaded, memory is reserved, the optimizer's state is made
TABLE_ROWS = 30
SNAPSHOT_ENTRIES = 200_000  # allocations that are remembered: about 100 MiB of pickle

Notify = Callable[[str], None]
Hook = Callable[[object], None]


def check(section: Diagnose, device: torch.device) -> None:
    """Raise RecipeError for what `device` cannot record."""
    if not section.memory_snapshot:
        return
    if device.type != "cuda":
        fix = "torch records no allocations on a CPU; remove it (diagnose.profile_steps gives memory by operation)"
        raise RecipeError("diagnose.memory_snapshot", True, fix)
    if section.profile_steps == 0:
        raise RecipeError("diagnose.memory_snapshot", True, "say of how many steps: diagnose.profile_steps=3")


@contextlib.contextmanager
def recorded(section: Diagnose, folder: Path, rank: int, device: torch.device, notify: Notify) -> Iterator[list[Hook]]:
    """What to call after every step so that `section.profile_steps` of them are recorded, after two of warm-up.

    Leaves `folder`/rank-R.json (for ui.perfetto.dev), rank-R.txt (the operations that take longest) and, where asked
    for, memory-rank-R.pickle. A run that ends before leaves what there was.
    """
    if section.profile_steps == 0:
        yield []
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        hooks = [_profiler(stack, section.profile_steps, folder / f"rank-{rank}", device, notify)]
        if section.memory_snapshot:
            path = folder / f"memory-rank-{rank}.pickle"
            hooks.append(_snapshot(stack, section.profile_steps, path, notify))
        yield hooks


def _profiler(stack: contextlib.ExitStack, steps: int, stem: Path, device: torch.device, notify: Notify) -> Hook:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    written = False

    def write(found: profile) -> None:
        nonlocal written
        written = True
        found.export_chrome_trace(str(stem.with_suffix(".json")))
        order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=TABLE_ROWS)
        stem.with_suffix(".txt").write_text(table, encoding="utf-8")
        notify(f"profile: {stem.with_suffix('.json')} (open it in ui.perfetto.dev), {stem.with_suffix('.txt')}")

    def say_if_nothing() -> None:
        if not written:
            notify(f"profile: the run ended within its {WARMUP_STEPS} steps of warm-up; nothing was recorded")

    stack.callback(say_if_nothing)
    plan = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    profiler = stack.enter_context(
        profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True, profile_memory=True)
    )
    return lambda info: profiler.step()


def _snapshot(stack: contextlib.ExitStack, steps: int, path: Path, notify: Notify) -> Hook:
    """torch's own format: a pickle that only pytorch.org/memory_viz is meant to read; Ingot never reads one."""
    done, recording = 0, False

    def write() -> None:
        nonlocal recording
        if recording:
            recording = False
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            notify(f"memory snapshot: {path} (open it at pytorch.org/memory_viz)")

    def hook(info: object) -> None:
        nonlocal done, recording
        done += 1
        if done == WARMUP_STEPS:
            recording = True
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        elif done == WARMUP_STEPS + steps:
            write()

    stack.callback(write)  # a run that ended before
    return hook
