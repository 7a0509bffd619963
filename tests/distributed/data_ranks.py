"""Fine-tunes recipes on this rank; run as a script by several ranks.

    python data_ranks.py HOME RECIPE... [--stop-after N] [--slow SECONDS]

Every encoding appends a line to HOME/encoded.jsonl: the rank, whether a process group existed, and the rows.
"""

import argparse
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from ingot.data import cache
from ingot.errors import Interrupted
from ingot.progress import Bar, Progress
from ingot.recipe_io import load_recipe
from ingot.verbs import finetune


class Stopping(Progress):
    """Asks the run to stop, as Ctrl-C does, after so many steps; keeps what is said."""

    def __init__(self, stop_after: int | None) -> None:
        super().__init__(quiet=True)
        self.stop_after = stop_after
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Bar]:
        stop_after = self.stop_after

        class Counting(Bar):
            def _show(self) -> None:
                if name == "finetune" and self.done == stop_after:
                    os.kill(os.getpid(), signal.SIGINT)

        yield Counting(name, total, unit)


def note_encodings(home: Path, slow: float) -> None:
    """Let every encoding say that it happens, and take `slow` seconds longer."""
    real = cache._encode

    def encode(*args):
        found = real(*args)
        line = {
            "rank": os.environ.get("RANK", "0"),
            "group": dist.is_initialized(),
            "rows": len(found.train) + len(found.validation),
            "seconds": slow,
        }
        with (home / "encoded.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        time.sleep(slow)
        return found

    cache._encode = encode


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--slow", type=float, default=0.0)
    asked = parser.parse_args()
    note_encodings(asked.home, asked.slow)
    for name in asked.recipes:
        recipe = load_recipe(asked.home / f"{name}.yaml")
        recipe = recipe.model_copy(update={"output": str(asked.home / "out" / name)})
        progress = Stopping(asked.stop_after if name.startswith("stopped") else None)
        with contextlib.suppress(Interrupted):
            finetune(recipe, home=asked.home, progress=progress)
        if os.environ.get("RANK", "0") == "0":
            (asked.home / f"{name}.said.json").write_text(json.dumps(progress.said))


if __name__ == "__main__":
    main()
