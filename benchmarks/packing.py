"""Rows padded, end to end, or packed: tokens per second of training, and who computes attention within documents.

    python benchmarks/packing.py [--out FOLDER] [--rounds 8] [--steps 8] [--only RECIPE] [--fill-only]

Three shipped recipes (the quickstart's chat, e2e, banking77) on a CPU. Writes packing.json and packing.md: hardware,
versions, date, and

  fill       how many of the computed tokens are padding, by layout
  training   the recipe's own training loop, `steps` steps a round, the layouts in turn: tokens that are not padding a
             second, as a ratio to padded in the same round (median, and the middle half of the rounds)
  attention  forward and backward of whole lines of the recipe by ways of keeping rows apart, likewise
  losses     the first steps of padded and padding-free training, dropout off: the same numbers

On a shared machine processor time (of all threads, waiting not counted) says more than the clock: both are written.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits for another must not count as working

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ingot.assembly import build
from ingot.data.loader import batches_of, collate
from ingot.data.packing import best_fit
from ingot.data.plan import Cursor, PlannedFeed
from ingot.data.rows import EncodedRows, ListRows
from ingot.model.attention import BACKENDS, FEATURES, Options, register, sdpa
from ingot.model.documents import Documents, grouped
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.preparation import prepare
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import load_recipe
from ingot.stages import resolve
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, StepInfo, fit
from ingot.train.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("quickstart", "text-generation/e2e", "text-classification/banking77")
LAYOUTS = ("padded", "padding-free", "packed")
CPU, THREADS = torch.device("cpu"), 2


class Now(NamedTuple):
    """Seconds."""

    processor: float
    wall: float


class Rate(NamedTuple):
    """Tokens that are not padding, a second."""

    processor: float
    wall: float


def now() -> Now:
    """Processor time of all threads, and the clock."""
    return Now(time.process_time(), time.perf_counter())


def rate(tokens: int, start: Now, end: Now) -> Rate:
    """By both."""
    return Rate(tokens / (end.processor - start.processor), tokens / (end.wall - start.wall))


def one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """sdpa for each document."""
    gqa = query.shape[1] != key.shape[1]
    parts = zip(*(tensor.split(documents.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    settings: dict[str, Any] = {"dropout_p": options.dropout, "scale": options.scale, "enable_gqa": gqa}
    outputs = [F.scaled_dot_product_attention(*part, is_causal=options.causal, **settings) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def dense(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
    """sdpa for the whole line, with a mask of its documents: what is masked is computed."""
    copies, ids = query.shape[1] // key.shape[1], documents.ids
    mask = ids[:, None] == ids[None, :]
    mask = mask.tril() if options.causal else mask
    key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    settings: dict[str, Any] = {"dropout_p": options.dropout, "scale": options.scale}
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings).transpose(1, 2)


def near(tokens: int) -> Callable[..., Tensor]:
    """Ours with another limit of how much lengths in one call may differ."""

    def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, options: Options) -> Tensor:
        if "near" not in vars(documents):
            vars(documents)["near"] = grouped(documents.lengths, tokens, documents.bounds.device)
        return sdpa(query, key, value, documents, options)

    return attend


WAYS: dict[str, Callable[..., Tensor]] = {
    "dense": dense,
    "one-by-one": one_by_one,
    "equal": near(0),
    "near-8": near(8),
    "near-16": near(16),
    "near-32": near(32),
    "near-64": near(64),
}


class Case:
    """A recipe with its rows and a model for each layout."""

    def __init__(self, name: str, cache: Path) -> None:
        path = ROOT / f"recipes/{name}.yaml"
        overrides = [f"data.cache={cache}", "data.batches=padded", f"train.threads={THREADS}"]
        self.name, self.home = path.stem, path.parent
        self.recipe = resolve(load_recipe(path, overrides), self.home, Ranks(), CPU)
        prepared = prepare(self.recipe, self.home)
        self.rows, self.pad_id, self.labels = prepared.rows.train.rows, prepared.rows.pad_id, prepared.facts.labels

    def recipe_of(self, layout: str, **train: Any) -> Recipe:
        """The recipe with another layout."""
        data = self.recipe.data.model_copy(update={"batches": layout})
        return self.recipe.model_copy(update={"data": data, "train": self.recipe.train.model_copy(update=train)})

    def model(self, *, dropout: bool = True) -> Sharded:
        """Ready to train; without `dropout` every layer's is off."""
        built = build(self.recipe, self.home, self.labels, Ranks())
        for module in built.model.modules() if not dropout else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        return parallelize(built.model, Ranks(), self.recipe, CPU, torch.float32)

    def feed(self, recipe: Recipe) -> PlannedFeed:
        """Its steps."""
        return PlannedFeed(self.rows, recipe.data, recipe.train)


def fill(case: Case) -> dict[str, Any]:
    """Shares of computed tokens that are padding, over an epoch."""
    lengths, train = case.rows.lengths, case.recipe.train
    found: dict[str, Any] = {"rows": len(lengths), "mean_tokens": float(lengths.mean()), "longest": int(lengths.max())}
    for grouped_rows in (False, True):
        recipe = case.recipe_of("padded", group_by_length=grouped_rows)
        steps = case.feed(recipe).epoch(0)
        computed = tokens = 0
        for packs in steps:
            rows = sorted((lengths[row] for [row] in packs), reverse=True)
            while rows:
                size = max(1, train.tokens_per_microbatch // rows[0])
                part, rows = rows[:size], rows[size:]
                computed, tokens = computed + part[0] * len(part), tokens + sum(part)
        found[f"padded{' grouped' if grouped_rows else ''}"] = {
            "padding": float(1 - tokens / computed),
            "steps": len(steps),
            "tokens_of_a_step": float(tokens / len(steps) / train.tokens_per_step),
        }
    for capacity in (case.recipe.data.max_tokens, 512, 2048, 4096):
        started = time.process_time()
        packs = best_fit(lengths.tolist(), capacity)
        found[f"packed {capacity}"] = {
            "padding": float(1 - lengths.sum() / (capacity * len(packs))),
            "packs": len(packs),
            "fewest": int(-(-lengths.sum() // capacity)),
            "seconds": time.process_time() - started,
        }
    return found


def training(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of the training loop by layout."""
    layouts = LAYOUTS[:2] if case.recipe.objective.task == "text-classification" else LAYOUTS
    models = {layout: case.model() for layout in layouts}
    rates: dict[str, list[Rate]] = {layout: [] for layout in layouts}
    for number in range(rounds + 1):
        for layout in layouts if number % 2 else layouts[::-1]:
            measured = _segment(case, models[layout], layout, steps, seed=number)
            if number:  # the first warms up
                rates[layout].append(measured)
    return _ratios(rates, "padded")


def _segment(case: Case, sharded: Sharded, layout: str, steps: int, seed: int) -> Rate:
    """Rates of `steps` steps behind a first one."""
    recipe = case.recipe_of(layout, max_steps=steps + 1, seed=seed, final="last")
    marks: list[tuple[Now, int]] = []

    def mark(info: StepInfo) -> None:
        marks.append((now(), info.tokens))

    nothing: EncodedRows = ListRows([])
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), Ranks(), "benchmark", 1)
        fit(sharded, Rows(case.feed(recipe), nothing, case.pad_id), recipe, checkpoints, on_step=(mark,))
    return rate(sum(tokens for _, tokens in marks[1:]), marks[0][0], marks[-1][0])


def ways(case: Case, rounds: int) -> dict[str, Any]:
    """Forward and backward of lines by ways of keeping rows apart, beside padded batches of the same rows."""
    sharded, recipe = case.model(), case.recipe_of("padding-free")
    inner: Any = getattr(sharded.plain, "backbone", sharded.plain)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    inner = getattr(inner, "backbone", inner)
    portions = [portion for portion, _ in zip(case.feed(recipe).start(Cursor()), range(rounds + 1), strict=False)]
    # Encoders look both ways, past what would fill a document up: only equal lengths meet, whatever the limit.
    names = [name for name in WAYS if recipe.objective.task != "text-classification" or not name.startswith("near")]
    rates: dict[str, list[Rate]] = {name: [] for name in ("padded", *names)}
    for number, portion in enumerate(portions):
        for name in rates if number % 2 else [*rates][::-1]:
            flat = name != "padded"
            inner.set_attn_implementation(f"ingot_{name}" if flat else "ingot")
            parts = batches_of(portion, 0, 1, recipe.train.tokens_per_microbatch, flat=flat, even=False)
            batches = [collate(part, case.pad_id, flat=flat) for part in parts]
            started = now()
            for batch in batches:
                loss = OBJECTIVES[recipe.objective.loss](sharded, batch, portion.divisor, recipe.objective)
                sharded.backward(loss)
            measured = rate(portion.n_tokens, started, now())
            sharded.drop()
            if number:
                rates[name].append(measured)
    return _ratios(rates, "padded")


def _ratios(rates: dict[str, list[Rate]], base: str) -> dict[str, Any]:
    """By processor time and by the clock: rates, and ratios to `base` (median, middle half)."""
    found: dict[str, Any] = {}
    for name, values in rates.items():
        found[name] = {}
        for place, clock in enumerate(Rate._fields):
            ratios = [value[place] / one[place] for value, one in zip(values, rates[base], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            found[name][clock] = {
                "tokens_per_second": statistics.median(value[place] for value in values),
                "ratio": statistics.median(ratios),
                "middle_half": [low, high],
            }
    return found


def losses(case: Case, steps: int = 6) -> dict[str, Any]:
    """Losses and gradient norms of the first steps, dropout off."""
    found: dict[str, Any] = {}
    for layout in LAYOUTS[:2]:
        recipe, infos = case.recipe_of(layout, max_steps=steps, final="last"), []
        with tempfile.TemporaryDirectory() as folder:
            checkpoints, nothing = Checkpoints(Path(folder), Ranks(), "benchmark", 1), ListRows([])
            rows = Rows(case.feed(recipe), nothing, case.pad_id)
            fit(case.model(dropout=False), rows, recipe, checkpoints, on_step=(infos.append,))
        found[layout] = {"losses": [info.loss for info in infos], "norms": [info.grad_norm for info in infos]}
    pairs = zip(found["padded"]["losses"], found["padding-free"]["losses"], strict=True)
    found["largest_relative_difference"] = max(abs(one / other - 1) for one, other in pairs)
    return found


def page(report: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    machine = report["hardware"]
    yield "# Padded, padding-free, packed"
    yield ""
    yield f"{report['date']}, {machine['processor']}, {machine['threads']} threads, float32; " + ", ".join(
        f"{name} {number}" for name, number in report["versions"].items()
    )
    yield ""
    yield "Written by `python benchmarks/packing.py`. Tokens are those that are not padding. Ratios are medians of"
    yield "rounds in alternating order, with the middle half of them in brackets. The machine is shared: processor time"
    yield "(of all threads) says more than the clock."
    for name, case in report["cases"].items():
        facts = case["fill"]
        yield ""
        yield f"## {name}"
        yield ""
        yield f"{facts['rows']:,} rows of {facts['mean_tokens']:.0f} tokens on average, the longest {facts['longest']}."
        yield ""
        yield "| layout | padding | |"
        yield "|---|---|---|"
        for layout, values in facts.items():
            if isinstance(values, dict):
                if "packs" in values:
                    what = f"{values['packs']:,} packs ({values['fewest']:,} is the least), {values['seconds']:.2f} s"
                else:
                    what = f"{values['steps']:,} steps, {values['tokens_of_a_step']:.0%} of their tokens used"
                yield f"| {layout} | {values['padding']:.1%} | {what} |"
        for part, title in (("training", "training, whole loop"), ("attention", "forward and backward")):
            if part in case:
                yield ""
                yield f"| {title} | tokens a processor second | beside padded | by the clock |"
                yield "|---|---|---|---|"
                for way, clocks in case[part].items():
                    ratios = (
                        f"{clock['ratio']:.2f} [{clock['middle_half'][0]:.2f}, {clock['middle_half'][1]:.2f}]"
                        for clock in clocks.values()
                    )
                    yield f"| {way} | {clocks['processor']['tokens_per_second']:,.0f} | {' | '.join(ratios)} |"
        if "rounds" in case:
            yield ""
            yield f"{case['rounds']} rounds of {case['steps']} steps (training), {2 * case['rounds']} of one (else)."
        if "losses" in case:
            worst = case["losses"]["largest_relative_difference"]
            shown = ", ".join(f"{loss:.6f}" for loss in case["losses"]["padding-free"]["losses"][:3])
            yield ""
            yield f"First losses, padding-free: {shown}; largest relative difference to padded: {worst:.1e}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=[name.split("/")[-1] for name in RECIPES])
    parser.add_argument("--fill-only", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    for name, way in WAYS.items():
        BACKENDS[name], FEATURES[name] = way, FEATURES["sdpa"]
        register(name)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {"processor": processor, "threads": THREADS},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "ingot")},
        "cases": {},
    }
    before = given.out / "packing.json"
    if given.only and before.is_file():  # the others stay as they were measured
        report["cases"] = json.loads(before.read_text(encoding="utf-8"))["cases"]
    with tempfile.TemporaryDirectory() as cache:
        for name in RECIPES:
            if given.only and not name.endswith(given.only):
                continue
            case = Case(name, Path(cache))
            found = report["cases"][case.name] = {"fill": fill(case)}
            if not given.fill_only:
                found["rounds"], found["steps"] = given.rounds, given.steps
                found["losses"] = losses(case)
                found["attention"] = ways(case, 2 * given.rounds)
                found["training"] = training(case, given.rounds, given.steps)
            print(json.dumps({case.name: found}, indent=1), file=sys.stderr)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "packing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (given.out / "packing.md").write_text("\n".join(page(report)) + "\n", encoding="utf-8")
    print("\n".join(page(report)))


if __name__ == "__main__":
    main()
