"""A recipe -> encoded rows, and the checks that come before any training is paid for. No process group exists yet."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingot.data import cache, stream
from ingot.data.plan import Feed, PlannedFeed
from ingot.data.seen import check_files, files_of
from ingot.data.splits import training_sources
from ingot.errors import RecipeError
from ingot.evaluation.measure import GENERATING, TEST, check_room, choose, recipe_task
from ingot.evaluation.metrics import metric_names
from ingot.evaluation.policy import Measured, check_policy, groups_in, slices_known
from ingot.evaluation.runner import foreseen_of, merge_items, rows_of
from ingot.evaluation.samples import Item
from ingot.evaluation.vllm_engine import require_vllm
from ingot.model.kinds import pad_id
from ingot.model.load import Tokenizer, context_length, load_tokenizer
from ingot.model.source import model_folder
from ingot.progress import Progress
from ingot.ranks import read_ranks
from ingot.recipe import Recipe
from ingot.recipe_data import SEQUENCE_TO_SEQUENCE
from ingot.task_files import check_tasks
from ingot.train.distillation import check_teacher
from ingot.train.loop import Rows
from ingot.watching import Watched, as_asked, watched

# Tasks of which no row is one text.
SEVERAL_COLUMNS = ("question-answering",)
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Prepared:
    """What a recipe becomes before any model is loaded."""

    tokenizer: Tokenizer
    rows: Rows
    facts: cache.Facts

    def data_facts(self) -> dict[str, Any]:
        """What became of the data, for the run's record: `rows` to learn from (streamed: read so far), and `data`."""
        feed, report = self.rows.train, self.facts.report.as_dict()
        if isinstance(feed, stream.StreamFeed):
            return {"rows": feed.counts.rows, "data": report | {"streamed": feed.facts()}}
        return {"rows": len(feed.rows), "data": report | {"truncation": self.facts.dropped.as_dict()}}


def prepare(recipe: Recipe, home: Path, progress: Progress = QUIET) -> Prepared:
    """Read, split and encode the data, or find it in the cache. What is wrong with data or tokenizer is raised here;
    streaming, what is wrong with the first rows.

    Raises DataError when no row with a trainable token is left, ModelError when the tokenizer does not fit the task.
    """
    if recipe.data.streaming:
        stream.check(recipe, home)
    tokenizer = load_tokenizer(recipe.model, home)
    found = cache.encoded(recipe, home, tokenizer, progress, first=read_ranks().local == 0)
    facts, feed = found.facts, _feed(found, recipe, home, tokenizer, progress)
    if isinstance(feed, stream.StreamFeed) and not facts.example:
        facts = replace(facts, example=feed.example)
    rows = Rows(feed, found.validation, pad_id(tokenizer))
    if recipe.objective.task == "fill-mask":
        rows = replace(rows, mask_id=tokenizer.mask_token_id, vocabulary=len(tokenizer))
    prepared = Prepared(tokenizer, rows, facts)
    for line in _findings(facts, recipe):
        progress.note(line)
    return prepared


def _feed(found: cache.EncodedData, recipe: Recipe, home: Path, tokenizer: Tokenizer, progress: Progress) -> Feed:
    if recipe.data.streaming:
        return stream.StreamFeed(recipe, home, tokenizer, found.facts.report.bad_rows, progress.note)
    weights = [reading.source.weight for reading in training_sources(recipe.data)]
    sources = list(zip(found.facts.sources, weights, strict=True))
    return PlannedFeed(found.train, recipe.data, recipe.train, sources)


def _findings(facts: cache.Facts, recipe: Recipe) -> Iterator[str]:
    """What the user should know about the data, a line each."""
    found, dropped = facts.report, facts.dropped
    parts = [f"{count:,} {name} ({found.origins[name]})" for name, count in found.counts.items()]
    yield f"data: {', '.join([*(['train (streamed)'] if recipe.data.streaming else []), *parts])}"
    yield from _mixture(facts, recipe)
    for name, rows in found.bad_rows.items():
        if rows:
            first = rows[0]
            yield f"data: {len(rows):,} unusable rows left out of {name}; the first is {first.where}: {first.reason}"
    for name, count in found.shared_with_train.items():
        if count:
            yield f"data: {count:,} {name} rows ask what a training row asks too"
    if dropped.truncated:
        lost = (
            f"{dropped.count:,} of them lost every trainable token and are left out"
            if dropped.count
            else "all still learn"
        )
        yield f"data: {dropped.truncated:,} training rows cut at {recipe.data.max_tokens} tokens; {lost}"


def _mixture(facts: cache.Facts, recipe: Recipe) -> Iterator[str]:
    """A line for each source of a mixture: its share of an epoch, and how often that shows each of its rows."""
    readings = training_sources(recipe.data)
    total = sum(reading.source.weight for reading in readings)
    for number, reading in enumerate(readings):
        if len(readings) == 1:
            return
        share = reading.source.weight / total
        named = f"data: {reading.name} = {reading.source.uri}: {share:.1%} of the rows learned"
        if recipe.data.streaming:
            yield named
            continue
        rows = facts.sources[number]
        yield f"{named}; each of its {rows:,} rows {share * sum(facts.sources) / rows:.2f} times an epoch"


def preflight(recipe: Recipe, home: Path, prepared: Prepared, progress: Progress) -> Watched | None:
    """Everything about the later stages that can be known to fail before training is paid for. Returns what is measured
    while the model trains.
    """
    model_folder(recipe.model, home, weights=recipe.model.initialization == "pretrained")
    check_teacher(recipe, home, prepared.tokenizer)
    if recipe.serve.enabled and recipe.serve.question and recipe.objective.task in SEVERAL_COLUMNS:
        fix = f"a row of {recipe.objective.task} has several columns; leave it out, and a test row is asked"
        raise RecipeError("serve.question", recipe.serve.question, fix)
    _check_reach(recipe, home)
    if recipe.evaluate.enabled:
        if recipe.evaluate.contamination.enabled:
            check_files(files_of(recipe, home))
        _check_engine(recipe)
        questions, context = choose(prepared.facts.questions, recipe), context_length(recipe.model, home)
        for asked in questions:
            check_room(asked.n_prompt, asked.where, recipe, context)
        items = [Item(asked.where, asked.prompt, [asked.reference]) for asked in questions]
        items = merge_items(items) if recipe.evaluate.merge_references else items
        metrics = metric_names(recipe.evaluate, recipe.objective.rows, [item.references for item in items])
        cluster_N = None
        if recipe.evaluate.cluster_by is not None or recipe.evaluate.slices:  # columns that nothing else has read
            cluster_N = rows_of(recipe_task(recipe, home, None, None)).cluster_N
        if items:
            progress.note(f"evaluate: {foreseen_of(metrics, len(items), cluster_N)}")
        kind = recipe.objective.rows
        slices, groups = slices_known(kind, recipe.evaluate.slices), groups_in(cluster_N)
        measured = [Measured(TEST, kind, len(items), metrics, slices, groups)]
        for task, seen in check_tasks(recipe, home, prepared.tokenizer, prepared.facts.labels):
            progress.note(f"evaluate: {task.task}: {seen}")
            measured.append(task)
        for sentence in check_policy(recipe.evaluate.promotion, measured) if recipe.evaluate.promotion else ():
            progress.note(sentence)
    labels, steps = prepared.facts.labels, prepared.rows.train.steps
    return watched(recipe, home, labels, prepared.tokenizer, steps, progress.note)


def _check_engine(recipe: Recipe) -> None:
    if recipe.evaluate.engine != "vllm":
        return
    require_vllm()
    if recipe.objective.rows not in GENERATING:
        fix = f"vLLM writes and scores text; test rows of {recipe.objective.rows} need another engine"
        raise RecipeError("evaluate.engine", "vllm", fix)
    if recipe.evaluate.base and recipe.model.initialization != "pretrained":
        fix = "vLLM reads the base model's folder, and this one is drawn; use another engine, or evaluate.base=false"
        raise RecipeError("evaluate.engine", "vllm", fix)


def _check_reach(recipe: Recipe, home: Path) -> None:
    """Whether an encoder-decoder's positions reach as far as source, target and what is written when it is measured."""
    limit = context_length(recipe.model, home)
    if recipe.objective.task not in SEQUENCE_TO_SEQUENCE or limit is None:
        return
    lengths = {"data.max_tokens": recipe.data.max_tokens, "data.max_target_tokens": recipe.data.max_target_tokens}
    if recipe.evaluate.enabled:
        lengths["evaluate.max_new_tokens"] = recipe.evaluate.max_new_tokens
    if recipe.evaluate.during is not None:
        lengths["evaluate.during.max_new_tokens"] = as_asked(recipe).evaluate.max_new_tokens
    for name, length in lengths.items():
        if length > limit:
            raise RecipeError(name, length, f"the model's positions reach {limit}; use at most that")
