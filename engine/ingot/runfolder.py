"""A run's folder: what is where in it, and what has been done so far. Everything a verb leaves behind goes through
here.
"""

import errno
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ingot.errors import FieldError, IngotError
from ingot.launch import process
from ingot.recipe import Recipe
from ingot.recipe_io import dump_recipe, load_recipe, recipe_hash

VERSIONS = (
    *("ingot", "torch", "transformers", "peft", "datasets", "mlflow"),
    *("safetensors", "tokenizers", "numpy", "pandas", "pydantic", "accelerate", "bitsandbytes"),
)


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

    def form(self, form: str) -> Path:
        """The package of one of `package.forms`."""
        return self.package if form == "merged" else self.folder / f"package-{form}"

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


def create_run(recipe: Recipe, home: Path, job: str | None = None) -> Run:
    """Make a new folder under `recipe.output` and write the resolved recipe into it.

    job: the launcher's name of the job, which a restart of it has too.

    Raises IngotError when the folder cannot be written.
    """
    output = Path(recipe.output).resolve()
    folder = output
    try:
        folder = _new_folder(output, recipe)
        (folder / "resolved.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        policy = recipe.evaluate.promotion
        write_json(
            folder / "run.json",
            {
                "name": recipe.name,
                "created": datetime.now().astimezone().isoformat(timespec="seconds"),
                "home": str(home.resolve()),
                "recipe_hash": recipe_hash(recipe),
                "versions": versions(),
                "python": platform.python_version(),
                "commit": commit_of(home),
                "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
                "status": "started",
                "job": job,
                "process": process.myself(),
                "stages": {},
                **({"promotion": {"policy": policy.model_dump(mode="json")}} if policy else {}),
            },
        )
    except OSError as error:
        raise IngotError(
            f"the run's folder {folder} cannot be written ({error.strerror}); set output=FOLDER to another place"
        ) from error
    return Run(folder, recipe, home.resolve())


def find_run(recipe: Recipe, job: str | None) -> Run | None:
    """The newest run that this job began with this recipe and did not finish; None when there is none.

    A run whose process still trains on this machine is not it: the job trains the same recipe twice at a time.
    """
    for record in list_runs(Path(recipe.output).resolve()) if job is not None else []:
        same = record.get("job") == job and record["recipe_hash"] == recipe_hash(recipe)
        if same and record["status"] != "finished" and not process.alive(record["process"]):
            return open_run(Path(record["folder"]))
    return None


def _new_folder(output: Path, recipe: Recipe) -> Path:
    """Make a folder that no other run has: runs of one sweep start within one second."""
    output.mkdir(parents=True, exist_ok=True)
    stamp = f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}-{recipe_hash(recipe)[:6]}"
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        try:
            (output / f"{stamp}{suffix}").mkdir()
        except FileExistsError:
            continue
        return output / f"{stamp}{suffix}"
    raise FileExistsError(errno.EEXIST, "it and a thousand more exist", str(output / stamp))


def open_run(folder: Path) -> Run:
    """Open a run's folder. Raises FieldError for one that is none, IngotError for one that is damaged."""
    if not (folder / "run.json").is_file():
        raise FieldError("RUN", str(folder), "is no run: it has no run.json; `ingot runs` lists the runs")
    folder = folder.resolve()
    try:
        home = Path(json.loads((folder / "run.json").read_text(encoding="utf-8"))["home"])
    except (ValueError, KeyError) as error:
        raise IngotError(f"{folder / 'run.json'} is damaged ({error}); start a new run") from error
    return Run(folder, load_recipe(folder / "resolved.yaml"), home)


def find_checkpoint(target: Path) -> tuple[Path, Run | None]:
    """A run's folder, or a checkpoint's -> the checkpoint, and the run that it belongs to if it is still in its folder.

    Raises FieldError for anything else, IngotError for a run without a checkpoint.
    """
    if (target / "run.json").is_file():
        run = open_run(target)
        wanted = ("best", "last") if run.recipe.train.final == "best" else ("last",)
        found = [run.checkpoints / name for name in wanted if (run.checkpoints / name).exists()]
        if not found:
            raise IngotError(f"{run.folder} holds no checkpoint yet")
        return found[0].resolve(), run
    if (target / "checkpoint.json").is_file():
        folder = target.resolve().parents[1]
        return target.resolve(), open_run(folder) if (folder / "run.json").is_file() else None
    fix = "is neither a run nor a checkpoint: it has no run.json and no checkpoint.json; `ingot runs` lists the runs"
    raise FieldError("RUN_OR_CHECKPOINT", str(target), fix)


def list_runs(output: Path) -> list[dict[str, Any]]:
    """Records of all runs under `output`, newest first; each with its folder and, where measured, its scores."""
    found = []
    for path in output.glob("*/run.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            summary = path.parent / "summary.json"
            scores = json.loads(summary.read_text(encoding="utf-8")).get("metrics", {}) if summary.is_file() else {}
        except ValueError:  # one damaged run does not hide the others
            continue
        found.append(record | {"folder": str(path.parent), "metrics": scores})
    # Runs of one second: the one with the higher number is newer.
    return sorted(found, key=lambda record: (record["created"], len(record["folder"]), record["folder"]), reverse=True)


def versions() -> dict[str, str]:
    """Versions of the packages that shape a result; absent ones are left out, but for Ingot on the import path only."""
    found = {"ingot": "not installed"}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit_of(folder: Path) -> dict[str, Any] | None:
    """The git commit that `folder` stands at, and whether files that git knows were changed since; None without one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside `path` and move it there, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
