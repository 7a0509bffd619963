"""The trust gate: every proof on the user's own recipe, model and rows, before anything is paid for."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ingot.data.example import Example, input_of
from ingot.data.splits import examples, scan
from ingot.data.stream import StreamFeed, first_rows
from ingot.errors import IngotError, RecipeError
from ingot.preparation import Prepared
from ingot.progress import Progress
from ingot.recipe import Recipe
from ingot.recipe_io import recipe_hash
from ingot.registry import nearest
from ingot.runfolder import versions
from ingot.train.memory import is_out_of_memory

from . import on_packaging, on_rows, on_saving, on_training
from .leakage import Texts, no_leakage
from .room import no_room
from .subject import Subject, draw, probes_of
from .trial import Frozen, Trial, set_up
from .verdict import Report, Status, Verdict

ON_ROWS: dict[str, Callable[[Subject], Verdict]] = {
    "trainable-tokens": on_rows.trainable_tokens,
    "whole-answers": on_rows.whole_answers,
    "prompt-mask": on_rows.prompt_mask,
    "one-bos": on_rows.one_bos,
    "stop-token": on_rows.stop_token,
    "same-template": on_rows.same_template,
    "right-labels": on_rows.right_labels,
    "licence-terms": on_packaging.licence_terms,
    "package-forms": on_packaging.package_forms,
}
ON_MODEL: dict[str, Callable[[Trial], Verdict]] = {
    "adapter-coverage": on_saving.adapter_coverage,
    "portable-adapter": on_packaging.portable_adapter,
    "everything-moves": on_training.everything_moves,
    "right-loss": on_training.right_loss,
    "isolated-rows": on_training.isolated_rows,
    "invariant-loss": on_training.invariant_loss,
}
SAVING = ("same-after-reload", "same-after-merge")
PROOFS = (*ON_ROWS, "no-leakage", *ON_MODEL, *SAVING)


def check_waivers(recipe: Recipe) -> None:
    """Raise RecipeError where `check.waive` names no proof."""
    for name in recipe.check.waive:
        if name not in PROOFS:
            raise RecipeError("check.waive", name, nearest(name, PROOFS))


def prove(recipe: Recipe, home: Path, prepared: Prepared, device: torch.device, progress: Progress) -> Report:
    """Run every proof on the resolved `recipe`; nothing is written but files in a temporary folder.

    Raises DataError and ModelError for data and models that cannot be read at all.
    """
    check_waivers(recipe)
    started = time.perf_counter()
    verdicts: list[Verdict] = []
    with progress.stage("check", total=len(PROOFS), unit="proofs") as bar:
        subject, texts = _collect(recipe, home, prepared, device)
        for verdict in _all(subject, texts):
            verdicts.append(_waived(verdict, recipe))
            bar.advance(1, proof=verdict.name)
        evidence = subject.evidence()
    seconds = time.perf_counter() - started
    sampled = [*subject.sampled, texts.sampled]
    return Report(recipe.name, recipe_hash(recipe), verdicts, evidence, sampled, versions(), seconds)


def _all(subject: Subject, texts: Texts) -> Iterator[Verdict]:
    for row_proof in ON_ROWS.values():
        yield _timed(lambda proof=row_proof: proof(subject))  # type: ignore[misc]
    yield _timed(lambda: no_leakage(texts))
    reason, done = no_room(subject), set[str]()
    try:
        for verdict in () if reason else _on_model(subject):
            done.add(verdict.name)
            yield verdict
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = f"model: not tried to the end, there is no memory left on this {subject.device.type}"
    if reason:
        subject.sampled.append(reason)
    for name in (*ON_MODEL, *SAVING):
        if name not in done:
            yield Verdict(name, Status.not_applicable, reason or "")


def _on_model(subject: Subject) -> Iterator[Verdict]:
    try:
        trial = set_up(subject)
    except (RecipeError, Frozen) as error:  # what the recipe asks of the model: the adapter's targets, foremost
        yield from _not_set_up(error)
        return
    for model_proof in ON_MODEL.values():
        yield _timed(lambda proof=model_proof: proof(trial))  # type: ignore[misc]
    started = time.perf_counter()
    for verdict in on_saving.saved_and_merged(trial):
        yield replace(verdict, seconds=round(time.perf_counter() - started, 3))
        started = time.perf_counter()


def _not_set_up(error: RecipeError | Frozen) -> Iterator[Verdict]:
    frozen = isinstance(error, Frozen)
    blamed, fix = "adapter-coverage", "mend what it names"
    if frozen:
        blamed, fix = "everything-moves", "set adapter.kind: lora, or none to train every weight"
    for name in (*ON_MODEL, *SAVING):
        if name == blamed:
            yield Verdict(name, Status.failed, str(error), fix)
        else:
            yield Verdict(name, Status.not_applicable, "nothing is trained" if frozen else "the model was not set up")


def _timed(proof: Callable[[], Verdict]) -> Verdict:
    started = time.perf_counter()
    verdict = proof()
    return replace(verdict, seconds=round(time.perf_counter() - started, 3))


def _waived(verdict: Verdict, recipe: Recipe) -> Verdict:
    waived = verdict.is_failure and verdict.name in recipe.check.waive
    return replace(verdict, status=Status.waived) if waived else verdict


def _collect(recipe: Recipe, home: Path, prepared: Prepared, device: torch.device) -> tuple[Subject, Texts]:
    """The sampled rows with the examples that they were made from, and the texts that duplicates are looked for in."""
    feed, section, seed = prepared.rows.train, recipe.check, recipe.data.split_seed
    rows = [feed.rows[number] for number in draw(len(feed.rows), section.max_rows, seed)]
    probes = probes_of(prepared, recipe)
    wanted, found = {row.where for row in [*rows, *probes]}, dict[str, Example]()
    texts = Texts(section.max_rows, seed, measured=recipe.evaluate.enabled)
    streamed = isinstance(feed, StreamFeed)
    for example in first_rows(recipe, home) if streamed else ():
        found[example.where] = example
        texts.add("train", input_of(example))
    for part, _, example in examples(scan(recipe, home), recipe, home):
        if part == "train" and example.where in wanted:
            found[example.where] = example
        if part != "validation":
            texts.add(part, input_of(example))
    kept, probes = [row for row in rows if row.where in found], [row for row in probes if row.where in found]
    if not kept or not probes:
        raise IngotError("no sampled row was found again in the data: it changed while it was read; start again")
    of = "rows of the stream's beginning" if streamed else f"{len(feed.rows):,} training rows"
    how = "all" if len(kept) == len(feed.rows) else f"{len(kept):,} of"
    sampled = [f"rows: {how} {of}" + ("" if how == "all" else f", drawn with data.split_seed = {seed}")]
    n_tokens = sum(len(row.ids) for row in probes)
    sampled.append(f"model: the {len(probes)} shortest rows of the first steps, {n_tokens:,} tokens")
    return Subject(recipe, home, prepared, device, kept, probes, found, sampled), texts
