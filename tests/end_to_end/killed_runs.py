"""Kills runs of a tiny model and resumes them; test_kills.py starts it and judges what it found.

    python killed_runs.py FOLDER SCENARIO=COUNT ...

Leaves FOLDER/SCENARIO.json: what was found, or {"error": traceback}. Every training is a forked child, so that a kill
costs a fork and not the imports.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "train"))
import conftest as tiny
import forked

from ingot.errors import CheckpointError, Interrupted
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train import manifest, shards
from ingot.train.checkpoint import Checkpoints, Progress, published
from ingot.train.loop import StepInfo, fit

EVERY = 2  # steps between checkpoints
INTERRUPTED = 130
REFUSED = 3


class Job:
    """A run in a folder, trained by children that may be killed at any time."""

    def __init__(self, folder: Path, steps: int, world: int = 1) -> None:
        self.folder, self.steps, self.world = folder, steps, world
        self.checkpoints, self.log = folder / "checkpoints", folder / "losses.jsonl"
        self.checkpoints.mkdir(parents=True)
        self.log.touch()

    def start(self, before: Callable[[Ranks], None] = lambda ranks: None) -> list[int]:
        """Start training, or go on with it; `before` runs in each child first."""
        return forked.start(self.world, functools.partial(self._train, before=before), self.folder)

    def _train(self, ranks: Ranks, before: Callable[[Ranks], None]) -> None:
        strategy = "ddp" if ranks.world > 1 else "none"
        train = {"max_steps": self.steps, "checkpoint_every_steps": EVERY, "evaluate_every_steps": 5}
        recipe = tiny.recipe(train=train, parallel={"strategy": strategy})
        sharded = parallelize(tiny.tiny_llama(ranks.rank), ranks, recipe, torch.device("cpu"), torch.float32)
        rows = tiny.feed_of((tiny.random_rows(60), tiny.random_rows(10, seed=2)), recipe)
        resume = bool(published(self.checkpoints))
        kept = Checkpoints(self.checkpoints, ranks, "hash", keep=2)
        before(ranks)
        try:
            fit(
                sharded, rows, recipe, kept, resume=resume, on_step=(self._note,) if ranks.main else (), notify=self.say
            )
        except Interrupted:
            os._exit(INTERRUPTED)
        except CheckpointError as error:
            self.say(str(error))
            os._exit(REFUSED)

    def _note(self, info: StepInfo) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps([info.step, info.loss]) + "\n")

    def say(self, text: str) -> None:
        with (self.folder / "said").open("a") as file:
            file.write(text + "\n")

    def said(self) -> str:
        path = self.folder / "said"
        return path.read_text() if path.exists() else ""

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) as they were reported, by all children one after the other."""
        return [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]

    def newest(self) -> int:
        """Step of the newest published checkpoint. Raises when one that looks published is not whole."""
        found = published(self.checkpoints)
        for path in found:
            wrong = manifest.problems(path, manifest.read(path))
            if wrong:
                raise AssertionError(f"{path.name}: {wrong}")
        return manifest.read(found[-1])["progress"]["step"] if found else 0

    def finish(self, before: Callable[[Ranks], None] = lambda ranks: None) -> list[int]:
        return forked.ended(self.start(before))


def curve_of(job: Job) -> list[float]:
    """One loss a step; raises when a step that was done again has another loss."""
    found: dict[int, float] = {}
    for step, loss in job.losses():
        if found.setdefault(step, loss) != loss:
            raise AssertionError(f"step {step}: first {found[step]!r}, then {loss!r}")
    if sorted(found) != list(range(1, job.steps + 1)):
        raise AssertionError(f"steps {sorted(found)}")
    return [found[step] for step in sorted(found)]


def undisturbed(folder: Path, steps: int, world: int = 1) -> list[float]:
    job = Job(folder / "whole", steps, world)
    assert job.finish() == [0] * world
    assert [step for step, _ in job.losses()] == list(range(1, steps + 1))
    return curve_of(job)


# --- where a kill strikes --------------------------------------------------------------------------------------------

FILE_OPERATIONS = (
    (os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "symlink"), (os, "unlink"), (os, "rmdir"), (os, "open"),
)  # fmt: skip


def dies_at_file_operation(number: int) -> Callable[[Ranks], None]:
    """The process is gone just before the `number`-th (from 0) change of the disk in its background writes."""

    def before(_: Ranks) -> None:
        count = 0

        def counted(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **options)

        for module, name in FILE_OPERATIONS:
            setattr(module, name, functools.partial(counted, getattr(module, name)))

    return before


def dies_in_the_middle_of_a_file(saves: int) -> Callable[[Ranks], None]:
    """The process is gone when half of the weights of its `saves`-th write are on the disk."""

    def before(_: Ranks) -> None:
        real, count = shards.write, 0

        def write(folder: Path, *args: Any) -> list[str]:
            nonlocal count
            names = real(folder, *args)
            count += 1
            if count == saves:
                os.truncate(folder / names[0], (folder / names[0]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return names

        shards.write = write

    return before


def slow_writer(seconds: float) -> Callable[[Ranks], None]:
    """Writes that take a while, so that a kill at any time often meets one."""

    def before(_: Ranks) -> None:
        real = shards.write

        def write(*args: Any) -> list[str]:
            time.sleep(seconds)
            return real(*args)

        shards.write = write

    return before


def struck(
    job: Job, draw: random.Random, number: int = signal.SIGKILL, before: Any = None, steps: int | None = None
) -> list[int]:
    """Train until some steps more are done (`steps`, or up to 5), then send the signal: SIGKILL to one rank, another to
    one or all. Return the exit codes.
    """
    until, delay = len(job.losses()) + (steps or draw.randint(1, 5)), draw.random() * 0.02
    victims = [draw.randrange(job.world)] if number == signal.SIGKILL or draw.random() < 0.5 else range(job.world)
    pids = job.start(before or slow_writer(0.02))
    deadline = time.monotonic() + 60
    while len(job.losses()) < until and time.monotonic() < deadline:
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    time.sleep(delay)
    for victim in victims:
        os.kill(pids[victim], number)
    codes = forked.ended(pids)
    if number == signal.SIGKILL and codes[victims[0]] not in (0, -signal.SIGKILL):
        raise AssertionError(f"ranks ended with {codes}: {job.said()}")
    return codes


# --- scenarios -------------------------------------------------------------------------------------------------------


def kills(folder: Path, count: int, world: int = 1, seed: int = 0) -> dict[str, Any]:
    """`count` kills, at random steps and times, in the middle of files and between changes of the disk."""
    draw = random.Random(seed)
    steps = 3 * count + 6
    whole = undisturbed(folder, steps, world)
    job = Job(folder / "killed", steps, world)
    before, again, died = 0, 0, 0
    for number in range(count):
        kind = ("time", "file", "operation")[number % 3]
        if kind == "time" or world > 1:
            struck(job, draw)
        else:
            point = dies_in_the_middle_of_a_file(draw.randint(1, 3))
            codes = job.finish(point if kind == "file" else dies_at_file_operation(draw.randrange(60)))
            if codes not in ([0], [-signal.SIGKILL]):
                raise AssertionError(f"{kind}: {codes}: {job.said()}")
        reached, newest = max((step for step, _ in job.losses()), default=0), job.newest()
        # A step's line is written before its save begins, and a save begins when the one before it is published.
        if newest < before or newest < ((reached - 1) // EVERY - 1) * EVERY:
            raise AssertionError(f"{kind}: step {reached} was done, but {newest} is the newest checkpoint")
        before, died = newest, died + (reached < steps)
        again = len(job.losses()) - reached
    assert job.finish() == [0] * world, job.said()
    return {"equal": curve_of(job) == whole, "kills": died, "again": again, "left": leftovers(job), "said": job.said()}


def two_ranks(folder: Path, count: int) -> dict[str, Any]:
    return kills(folder, count, world=2)


def leftovers(job: Job) -> list[str]:
    """Everything in the folder of checkpoints that is no checkpoint and no link."""
    return sorted(
        p.name for p in job.checkpoints.iterdir() if p not in published(job.checkpoints) and not p.is_symlink()
    )


def every_operation(folder: Path, _: int) -> dict[str, Any]:
    """Killed before each single change of the disk in the third of three saves: the second or the third is there."""
    found: dict[int, int] = {}
    for number in range(200):
        kept = folder / f"{number}"

        def work(ranks: Ranks, kept: Path = kept, number: int = number) -> None:
            checkpoints = Checkpoints(kept, ranks, "hash", keep=1)
            for step in (1, 2, 3):
                if step == 3:
                    dies_at_file_operation(number)(ranks)
                checkpoints.save(OneTensor(step), Progress(9, "hash", step=step).watched(1.0 / step))
                checkpoints.wait()

        [code] = forked.ended(forked.start(1, work, folder))

        def check(ranks: Ranks, kept: Path = kept, number: int = number) -> None:
            tensor, checkpoints = OneTensor(0), Checkpoints(kept, ranks, "hash", keep=1)
            for path in published(kept):
                assert not manifest.problems(path, manifest.read(path)), path
            step = checkpoints.load(tensor, "last", lambda text: sys.exit(text)).step
            assert tensor.value == step
            best = OneTensor(0)
            assert checkpoints.load(best, "best", print, weights_only=True).step == step
            with checkpoints:
                checkpoints.save(OneTensor(4), Progress(9, "hash", step=4).watched(0.1))
            assert sorted(path.name for path in kept.iterdir()) == ["best", "last", "step-000004"]
            (kept / "found").write_text(str(step))

        if forked.ended(forked.start(1, check, folder)) != [0]:
            raise AssertionError(f"killed before operation {number}: see above")
        found[number] = int((kept / "found").read_text())
        if code == 0:
            break
    return {"operations": len(found) - 1, "found": list(found.values())}


class OneTensor:
    """The part of a Sharded that checkpoints use."""

    device = torch.device("cpu")

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((100,), float(value))

    def state(self) -> dict[str, torch.Tensor]:
        return {"model/a": self.tensor}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor = state["model/a"]

    @property
    def value(self) -> float:
        [value] = set(self.tensor.tolist())
        return value


def preempted(folder: Path, count: int) -> dict[str, Any]:
    """SIGTERM and a grace period, `count` times on one rank and on two."""
    equal, lost, codes = [], [], []
    for world in (1, 2):
        draw, steps = random.Random(world), 6 * count + 10
        whole = undisturbed(folder / f"{world}", steps, world)
        job = Job(folder / f"{world}" / "preempted", steps, world)
        for _ in range(count):
            codes += struck(job, draw, signal.SIGTERM)
            lost.append(max(step for step, _ in job.losses()) - job.newest())
        assert job.finish() == [0] * world, job.said()
        equal.append(curve_of(job) == whole and len(job.losses()) == steps)
    return {"equal": equal, "lost": lost, "codes": codes}


def full_disk(folder: Path, _: int) -> dict[str, Any]:
    """A real file system that fills up; then there is room again."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode == 0
    if not mounted:
        return {"mounted": False}
    try:
        whole = undisturbed(folder, 12)
        job = Job(disk / "run", 12)
        size = sum(path.stat().st_size for path in (folder / "whole" / "checkpoints" / "last").iterdir())
        room = shutil.disk_usage(disk).free - 2 * size - size // 2
        (disk / "ballast").write_bytes(bytes(room))
        codes, said, newest = job.finish(), job.said(), job.newest()
        left = leftovers(job)
        (disk / "ballast").unlink()
        again = job.finish()
        return {
            "mounted": True, "codes": codes, "said": said, "newest": newest, "left": left, "again": again,
            "done": [step for step, _ in job.losses()], "equal": curve_of(job) == whole,
        }  # fmt: skip
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def corrupted(folder: Path, _: int) -> dict[str, Any]:
    """The newest checkpoint rots while nobody looks."""
    whole = undisturbed(folder, 14)
    job = Job(folder / "rotten", 14)
    struck(job, random.Random(1), before=slow_writer(0.0), steps=8)
    newest = job.newest()
    [weights] = published(job.checkpoints)[-1].glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    before = len(job.losses())
    codes = job.finish()
    return {
        "codes": codes, "newest": newest, "resumed_at": job.losses()[before][0], "said": job.said(),
        "equal": curve_of(job) == whole,
    }  # fmt: skip


SCENARIOS = (kills, two_ranks, every_operation, preempted, full_disk, corrupted)


def main(folder: Path, wanted: list[str]) -> None:
    for text in wanted:
        name, _, count = text.partition("=")
        [scenario] = [scenario for scenario in SCENARIOS if scenario.__name__ == name]
        place = folder / name
        place.mkdir()
        try:
            found = scenario(place, int(count or 0))
        except Exception:
            found = {"error": traceback.format_exc()}
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
