"""Answers that are JSON: whether they are, how much of the reference they hold, and which tools they call."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ingot.evaluation.statistic import References, Statistic, TextMetric, row_mean


def parse_json(text: str) -> Any:
    """What the JSON in `text` says. NaN and Infinity are no JSON. Raises ValueError when it is none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, or None."""
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


Leaf = tuple[tuple[str | int, ...], str, Any]


def leaves(value: Any) -> Counter[Leaf]:
    """The leaves of parsed JSON as a bag of (path, kind, value); an empty object or array is a leaf.

    Two values have the same leaves exactly when they are the same JSON: the order of keys does not matter, 1 is 1.0,
    and true is not 1.
    """
    return Counter(_walk(value))


def _walk(value: Any) -> Iterator[Leaf]:
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]  # no recursion: a model may nest without end
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict) and node:
            waiting.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list) and node:
            waiting.extend(((*path, index), child) for index, child in enumerate(node))
        elif isinstance(node, dict | list):
            yield path, type(node).__name__, None
        else:
            number = isinstance(node, int | float) and not isinstance(node, bool)
            yield path, "number" if number else type(node).__name__, node


def json_valid(predictions: Sequence[str], references: References) -> Statistic:
    """Prediction is one JSON object and nothing else."""
    return row_mean([float(parse_object(p) is not None) for p in predictions])


def json_undefined(references: References, **options: Any) -> str | None:
    if any(parse_object(r) is None for refs in references for r in refs):
        return "a reference is no JSON object; use exact_match"
    return None


def leaf_f1(found: Counter[Leaf], wanted: Counter[Leaf]) -> float:
    """F1 of two bags of leaves; 1 exactly when they are equal."""
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def by_leaves(score: Callable[[Counter[Leaf], Counter[Leaf]], float]) -> TextMetric:
    """Mean over rows of `score` against the best reference; 0 when the prediction is no JSON object."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        scores = []
        for prediction, refs in zip(predictions, references, strict=True):
            found = parse_object(prediction)
            wanted = [leaves(parse_object(r)) for r in refs]
            scores.append(0.0 if found is None else max(score(leaves(found), w) for w in wanted))
        return row_mean(scores)

    return compute


# --- tool calls ---

Call = tuple[str, frozenset[tuple[Leaf, int]]]


def tool_calls(text: str) -> Counter[Call] | None:
    """The calls that `text` makes, as a bag of (name, leaves of its arguments), or None when it is no such JSON.

    One call or a list of them, bare or under `tool_calls` as an OpenAI-style message has them; a call is
    {"name", "arguments"}, or that under `function`. Arguments are an object, or one as text; none are {}.
    """
    try:
        value = parse_json(text)
        if isinstance(value, dict) and "tool_calls" in value:
            value = value["tool_calls"] or []
        calls = value if isinstance(value, list) else [value]
        return Counter(_call(call) for call in calls)
    except ValueError:
        return None


def _call(call: Any) -> Call:
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("a call has a name")
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = parse_json(arguments) if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return call["name"], frozenset(leaves(arguments).items())


def tool_call_match(predictions: Sequence[str], references: References) -> Statistic:
    """Share of answers that make exactly the calls of a reference, in any order."""
    scores = []
    for prediction, refs in zip(predictions, references, strict=True):
        found = tool_calls(prediction)
        scores.append(float(found is not None and found in [tool_calls(r) for r in refs]))
    return row_mean(scores)


def tool_calls_undefined(references: References, **options: Any) -> str | None:
    """Whether a reference is no tool call, as a reason."""
    wrong = [text for refs in references for text in refs if tool_calls(text) is None]
    return f"the reference {wrong[0][:40]!r} is no tool call (name and arguments as JSON)" if wrong else None


json_exact_match = by_leaves(lambda found, wanted: float(found == wanted))
json_argument_f1 = by_leaves(leaf_f1)
