"""The data path at a million rows: planning an epoch, the cache of encoded rows, windows of a stream.

    python benchmarks/data_path.py [--out FOLDER] [--rows 1000000]

Writes data_path.json and data_path.md: hardware, versions, date, and

  plan     steps of an epoch: plain, grouped by length, packed
  cache    `prepare` of a JSONL file with a cold and a warm cache: without drawn parts, with them; shipped recipes
  stream   windows of the same file: rows encoded a second

Each figure is of a process of its own. Processor seconds (all threads, waiting not counted) say more than the clock on
a shared machine; both are written. `peak_mb` is what the process held at most beyond what it held before the work;
pages of mapped files that the kernel may drop at any time are not counted (RssAnon).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("quickstart", "text-classification/banking77")


def held_mb() -> float:
    """Memory of this process without mapped files, in MB."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(facts["RssAnon"].split()[0]) / 1000


class Peak:
    """Looks every 10 ms at what the process holds."""

    def __init__(self) -> None:
        self._before = self._most = held_mb()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, held_mb())

    def stop(self) -> float:
        """The most so far beyond the start, in MB."""
        self._done.set()
        self._thread.join()
        return round(max(self._most, held_mb()) - self._before, 1)


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, with its seconds and its memory."""
    peak, wall, cpu = Peak(), time.perf_counter(), time.process_time()
    found = work()
    seconds = {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    return {**found, **seconds, "peak_mb": peak.stop()}


def plan(kind: str, rows: int) -> dict[str, Any]:
    """Steps of one epoch of log-normal lengths (median 148 tokens), 65,536 tokens each."""
    from ingot.data.plan import plan_epoch
    from ingot.recipe import Data, Train

    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5, 0.9, rows)).astype(np.int64), 4, 2048)
    data = Data(train="unused", batches="packed" if kind == "packed" else "padded", max_tokens=2048)
    train = Train(tokens_per_step=65_536, group_by_length=kind == "grouped")

    def work() -> dict[str, Any]:
        found = plan_epoch(lengths, data, train, 0)
        kept = sum(part.nbytes for part in (found.rows, found.pack_ends, found.step_ends)) / 1e6
        fill = int(lengths.sum()) / (len(found) * 65_536)
        return {"steps": len(found), "kept_mb": round(kept, 1), "steps_filled": round(fill, 4)}

    return measured(work)


def write_rows(path: Path, rows: int) -> None:
    """Documents of 4 to 20 words."""
    draw = random.Random(0)
    words = [line.split()[0] for line in (ROOT / "README.md").read_text().splitlines() if line.split()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = f"{number} " + " ".join(draw.choices(words, k=draw.randint(4, 20)))
            file.write(json.dumps({"text": text}) + "\n")


def recipe_of(kind: str, home: Path) -> tuple[Any, Path]:
    """A recipe and its home: of the big file, or a shipped one."""
    from ingot.recipe_io import load_recipe, parse_recipe

    if kind in RECIPES:
        path = ROOT / "recipes" / f"{kind}.yaml"
        return load_recipe(path), path.parent
    share = 0.01 if kind == "drawn" else 0.0
    data = {"train": str(home / "rows.jsonl"), "validation_share": share, "test_share": share}
    values = {"name": "big", "model": {"source": "ingot://nano"}, "data": data}
    values |= {"objective": {"task": "language-modeling"}, "evaluate": {"enabled": False}}
    return parse_recipe(values), home


def prepared(kind: str, home: Path) -> dict[str, Any]:
    """`prepare` and `preflight`, up to the first step's rows."""
    from ingot.data.plan import Cursor
    from ingot.preparation import preflight, prepare
    from ingot.progress import Progress

    recipe, folder = recipe_of(kind, home)
    quiet = Progress(quiet=True)

    def work() -> dict[str, Any]:
        found = prepare(recipe, folder, quiet)
        preflight(recipe, folder, found, quiet)
        first = next(iter(found.rows.train.start(Cursor())))
        return {"rows": len(found.rows.train.rows), "first": len([first.rows[row].ids for row in first.indices])}

    return measured(work)


def streamed(home: Path, windows: int) -> dict[str, Any]:
    """Windows of 10,000 rows, learned as fast as they come."""
    from ingot.data.plan import Cursor
    from ingot.preparation import prepare
    from ingot.recipe_io import parse_recipe

    recipe, _ = recipe_of("given", home)
    data = {"streaming": True, **recipe.data.model_dump(mode="json", exclude={"streaming"})}
    recipe = parse_recipe({**recipe.model_dump(mode="json"), "data": data, "train": {"max_steps": 1_000_000}})

    def work() -> dict[str, Any]:
        feed, rows, tokens = prepare(recipe, home).rows.train, 0, 0
        for portion in feed.start(Cursor()):
            if portion.cursor.epoch == windows:
                break
            rows, tokens = rows + len(portion.indices), tokens + portion.n_tokens
        return {"rows": rows, "tokens": tokens}

    return measured(work)


def in_a_process(name: str, *args: str, cache: Path) -> dict[str, Any]:
    """One figure, by this script in a process of its own."""
    command = [sys.executable, __file__, "--one", name, *args]
    environment = {**os.environ, "INGOT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, *args, found, file=sys.stderr, flush=True)
    return found


def everything(rows: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as name:
        home, cache = Path(name), Path(name) / "cache"
        write_rows(home / "rows.jsonl", rows)
        small = Path(name) / "small"
        small.mkdir()
        write_rows(small / "rows.jsonl", rows // 10)
        plans = {kind: in_a_process("plan", kind, str(rows), cache=cache) for kind in ("plain", "grouped", "packed")}
        caches: dict[str, Any] = {}
        for kind, folder in (("given", home), ("drawn", home), ("given", small), *((kind, home) for kind in RECIPES)):
            for state in ("cold", "warm"):
                label = f"{kind} {rows // 10 if folder == small else rows}" if kind in ("given", "drawn") else kind
                caches[f"{label}, {state}"] = in_a_process("prepared", kind, str(folder), cache=cache)
        stream = in_a_process("streamed", str(home), "5", cache=cache)
        size = (home / "rows.jsonl").stat().st_size
        entries = {
            path.name: sum(file.stat().st_size for file in path.iterdir())
            for path in cache.iterdir()
            if not path.name.startswith(".")
        }
    return {"plan": plans, "cache": caches, "stream": stream, "source_bytes": size, "entry_bytes": entries}


def about() -> dict[str, Any]:
    """Hardware, versions, date."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    names = ("numpy", "pyarrow", "tokenizers", "transformers")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return {
        "hardware": f"{os.cpu_count()} shared cores, {model.split(':')[1].strip()}",
        "load_average": round(os.getloadavg()[1], 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of Markdown."""
    columns = list(dict.fromkeys(key for facts in results.values() for key in facts if key != "first"))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, facts in results.items():
        cells = (f"{facts[key]:,}" if key in facts else "" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def page(result: dict[str, Any]) -> str:
    """data_path.md."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# The data path at scale",
        "",
        f"{result['hardware']}; load average while measured: {result['load_average']}. {versions}. Commit "
        f"{result['commit']}, {result['date']}. `python benchmarks/data_path.py`; columns are explained there.",
        "",
        "## Planning an epoch of a million rows",
        "",
        *table(result["plan"]),
        "",
        "## Preparing: cold and warm cache",
        "",
        f"The big file is {result['source_bytes'] / 1e6:,.0f} MB of JSONL; given: nothing is drawn from it, drawn: 1 % "
        "each for validation and test.",
        "",
        *table(result["cache"]),
        "",
        "## Streaming: five windows of 10,000 rows",
        "",
        *table({"stream": result["stream"]}),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        name, *args = asked.one
        if name == "plan":
            print(json.dumps(plan(args[0], int(args[1]))))
        elif name == "prepared":
            print(json.dumps(prepared(args[0], Path(args[1]))))
        else:
            print(json.dumps(streamed(Path(args[0]), int(args[1]))))
        return
    result = everything(asked.rows)
    result = {**about(), **result}
    (asked.out / "data_path.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (asked.out / "data_path.md").write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
