"""Log-likelihoods of continuations of texts, and of whole texts.

What stands before several continuations is run once (`prefix`). Models whose cache cannot be shared so (state spaces,
windows shorter than the text, positions by distance in the row) run whole sequences; which, is found by trying.
Encoder-decoders read the context and write the continuation. A token more or less of padding changes nothing, so scores
do not depend on the budget but for rounding.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ingot.errors import DataError, ModelError
from ingot.model.generate import context_limit, without_gradients
from ingot.model.prefix import ENDLESS, score_shared, shared_reach
from ingot.model.projection import Projection
from ingot.model.sequences import Job, Scored, run_whole

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Group:
    """Continuations of one context, as token ids; none of the sequences is empty (an empty context: BOS or EOT)."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass
class _Part:
    """Continuations of a group that keep the same context: those too long for the model lose tokens at its left."""

    group: int
    context: list[int]
    continuations: list[list[int]]
    places: list[int]  # in the group

    def reach(self) -> int:
        return len(self.context) + max(len(one) for one in self.continuations)


def score(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    pad_id: int,
    max_length: int | None = None,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
) -> list[list[Scored]]:
    """Score every continuation given its group's context; in input order.

    Of context and continuation the last `max_length` + 1 tokens count (None: the model's positions), as in
    lm-evaluation-harness. `tokens_per_batch` bounds the tokens of one forward pass, padding included (at least one
    group); `progress` gets how many groups are done. Raises ModelError where the model has no output head, DataError
    where a sequence is empty or a continuation longer than `max_length`.
    """
    encoder = _is_encoder_decoder(model)
    limit = max_length or context_limit(model) or ENDLESS
    parts = [part for index, group in enumerate(groups) for part in _parts(index, group, limit, encoder)]
    found: list[dict[int, Scored]] = [{} for _ in groups]

    def put(part: _Part, places: Sequence[int], scores: Sequence[Scored]) -> None:
        found[part.group].update(zip(places, scores, strict=True))
        if progress is not None and len(found[part.group]) == len(groups[part.group].continuations):
            progress(1)

    with _Quiet(model), without_gradients():
        projection = Projection(model)
        reach = 0 if encoder else shared_reach(model, pad_id)
        shared = [part for part in parts if part.reach() <= reach]
        contexts, behind = [part.context for part in shared], [part.continuations for part in shared]
        for index, scores in score_shared(projection, contexts, behind, pad_id, tokens_per_batch):
            put(shared[index], shared[index].places, scores)
        owners = [(part, number) for part in parts if part.reach() > reach for number in range(len(part.places))]
        jobs = [_job(model, part.context, part.continuations[number], encoder) for part, number in owners]
        for index, scored in run_whole(projection, jobs, pad_id, tokens_per_batch):
            part, number = owners[index]
            put(part, [part.places[number]], [scored])
    if progress is not None and (empty := sum(not group.continuations for group in groups)):
        progress(empty)
    return [[scores[place] for place in range(len(scores))] for scores in found]


def rolling(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    prefix_id: int,
    pad_id: int,
    max_length: int | None = None,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """Log-likelihood in nats of each whole text, and its number of tokens.

    Windows as lm-evaluation-harness rolls them: the first begins with `prefix_id`, each next predicts the following
    `max_length` tokens, the last fewer behind a longer context; every token is predicted once. `progress` gets how many
    texts are done. Raises ModelError for an encoder-decoder, and where no `max_length` is given or known.
    """
    limit = max_length or context_limit(model)
    if limit is None:
        raise ModelError("max_length", max_length, "the model does not say how many tokens it reads; give a number")
    if _is_encoder_decoder(model):
        raise ModelError("model", type(model).__name__, "an encoder-decoder has no likelihood of a text by itself")
    owners, jobs = [], []
    for index, row in enumerate(rows):
        for job in _windows(list(row), prefix_id, limit):
            owners.append(index)
            jobs.append(job)
    sums, left = [0.0] * len(rows), Counter(owners)
    with _Quiet(model), without_gradients():
        for place, scored in run_whole(Projection(model), jobs, pad_id, tokens_per_batch):
            index = owners[place]
            sums[index] += scored.logprob
            left[index] -= 1
            if progress is not None and left[index] == 0:
                progress(1)
    if progress is not None and len(rows) > len(left):
        progress(len(rows) - len(left))  # those without a token
    return [(total, len(row)) for total, row in zip(sums, rows, strict=True)]


class _Quiet:
    """The model in evaluation mode, inside."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_error: object) -> None:
        self.model.train(self.was_training)


def _is_encoder_decoder(model: nn.Module) -> bool:
    config: Any = model.config
    return bool(getattr(config, "is_encoder_decoder", False))


# --- what is to be run ---


def _parts(index: int, group: Group, limit: int, encoder: bool) -> Iterator[_Part]:
    context = list(group.context)
    if not context or any(not len(one) for one in group.continuations):
        raise DataError("group", index, "a context or a continuation has no token; give the model's BOS or EOT")
    by_cut: dict[int, _Part] = {}
    for place, one in enumerate(group.continuations):
        if len(one) > limit:
            raise DataError("group", index, f"a continuation of {len(one)} tokens; the model reaches {limit}")
        cut = max(0, len(context) - limit if encoder else len(context) + len(one) - (limit + 1))
        part = by_cut.setdefault(cut, _Part(index, context[cut:], [], []))
        part.continuations.append(list(one))
        part.places.append(place)
    yield from by_cut.values()


def _windows(row: list[int], prefix_id: int, limit: int) -> Iterator[Job]:
    for start in range(0, len(row), limit):
        end = min(start + limit, len(row))
        begin = max(0, end - limit - 1)
        ids = row[begin : end - 1] if start else [prefix_id, *row[: end - 1]]
        yield Job(ids, row[start:end])


def _job(model: nn.Module, context: list[int], continuation: list[int], encoder: bool) -> Job:
    if not encoder:
        return Job(context + continuation[:-1], continuation)
    owners: Any = (model.config, getattr(model, "generation_config", None))
    starts = (getattr(owner, "decoder_start_token_id", None) for owner in owners)
    start = next((one for one in starts if one is not None), None)
    if start is None:
        raise ModelError("decoder_start_token_id", None, "the model's configuration must say how its decoder starts")
    return Job([start, *continuation[:-1]], continuation, context)
