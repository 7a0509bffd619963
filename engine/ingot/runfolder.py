"""A run's folder: what is where in it, and what has been done so far. Everything a verb leaves behind goes through
here.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ingot.errors import IngotError
from ingot.recipe import Recipe
from ingot.recipe_io import dump_recipe, load_recipe, recipe_hash

VERSIONS = ("ingot", "torch", "transformers", "peft", "datasets", "mlflow")


@dataclass(frozen=True)
class Run:
    """A run: its folder, its resolved recipe, and the folder where the recipe's relative paths start."""

    folder: Path
    recipe: Recipe
    home: Path

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints, with the links `last` and `best`."""
        return self.folder / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The adapter in peft's layout (absent after full fine-tuning)."""
        return self.folder / "adapter"

    @property
    def model(self) -> Path:
        """The tuned model as a complete Hugging Face folder."""
        return self.folder / "model"

    @property
    def evaluation(self) -> Path:
        """Scores and rows of the base and the tuned model."""
        return self.folder / "evaluation"

    @property
    def package(self) -> Path:
        """The MLflow model."""
        return self.folder / "package"

    @property
    def picture(self) -> Path:
        """Loss curve and before/after bars."""
        return self.folder / "picture.png"

    @property
    def metrics(self) -> Path:
        """Training metrics, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    def record(self) -> dict[str, Any]:
        """What run.json holds."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def note(self, **changes: Any) -> None:
        """Merge `changes` into run.json in one step."""
        write_json(self.folder / "run.json", self.record() | changes)

    def note_stage(self, stage: str, seconds: float, **facts: Any) -> None:
        """Remember that `stage` is finished, how long it took, and facts about it."""
        stages = self.record()["stages"] | {stage: {"seconds": round(seconds, 3), **facts}}
        self.note(stages=stages)

    def finished(self, stage: str) -> bool:
        """Whether `stage` has been finished in this folder."""
        return stage in self.record()["stages"]


def create_run(recipe: Recipe, home: Path) -> Run:
    """Make a new folder under `recipe.output` and write the resolved recipe into it.

    Raises IngotError when the folder cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(recipe.output).resolve() / f"{recipe.name}-{stamp}-{recipe_hash(recipe)[:6]}"
    try:
        folder.mkdir(parents=True)
        (folder / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        write_json(
            folder / "run.json",
            {
                "name": recipe.name,
                "created": datetime.now().astimezone().isoformat(timespec="seconds"),
                "home": str(home.resolve()),
                "recipe_hash": recipe_hash(recipe),
                "versions": versions(),
                "python": platform.python_version(),
                "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
                "status": "started",
                "stages": {},
            },
        )
    except OSError as error:
        raise IngotError(
            f"the run's folder {folder} cannot be written ({error.strerror}); set output=FOLDER to another place"
        ) from error
    return Run(folder, recipe, home.resolve())


def open_run(folder: Path) -> Run:
    """Open a run's folder; a folder that is none is an IngotError that says what a run holds."""
    folder = folder.resolve()
    if not (folder / "run.json").is_file():
        raise IngotError(f"{folder} is no run: it has no run.json. `ingot runs` lists the runs")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Run(folder, load_recipe(folder / "resolved.yaml"), Path(record["home"]))


def list_runs(output: Path) -> list[dict[str, Any]]:
    """Records of all runs under `output`, newest first; each with its folder and, where measured, its scores."""
    found = []
    for path in sorted(output.glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        record = json.loads(path.read_text(encoding="utf-8")) | {"folder": str(path.parent)}
        summary = path.parent / "summary.json"
        record["metrics"] = (
            json.loads(summary.read_text(encoding="utf-8")).get("metrics", {}) if summary.is_file() else {}
        )
        found.append(record)
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that shape a result; absent ones are left out."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside `path` and move it there, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
