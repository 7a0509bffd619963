"""What is wrong with a recipe, in the words of the person who wrote it: place, field, value, fix, nearest name."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import pydantic

from ingot.errors import RecipeError
from ingot.recipe import ONE, SEVERAL, Recipe, Section
from ingot.registry import nearest

Keys = tuple[str | int, ...]

# What other trainers call our fields; no distance between words finds `lr` from `learning_rate`.
KNOWN_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "batch_size": "train.tokens_per_step",
    "per_device_train_batch_size": "train.tokens_per_microbatch",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "output_dir": "output",
    "model_name_or_path": "model.source",
}


@dataclass
class Draft:
    """Plain values on their way to a `Recipe`, and where each of them was written."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """Return "file:line" (or the override) of the value, or of the nearest section around it."""
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return self.source


def translate(invalid: pydantic.ValidationError, draft: Draft, schema: type[Section] = Recipe) -> RecipeError:
    """Turn pydantic's errors into one `RecipeError`: unknown keys first (they explain missing ones), then by place.

    `schema`: what the draft is measured by.
    """
    problems: dict[Keys, tuple[bool, object, list[str]]] = {}
    for error in invalid.errors(include_url=False):
        keys, value = _locate(error, draft)
        known = problems.setdefault(keys, (error["type"] != "extra_forbidden", value, []))
        known[2].append(_fix(error, keys, value, schema))
    order = list(draft.places)
    ranked = sorted(
        problems.items(), key=lambda item: (item[1][0], order.index(item[0]) if item[0] in draft.places else len(order))
    )
    errors = [
        RecipeError(dotted(keys), value, " or ".join(dict.fromkeys(fixes)), where=draft.where(keys))
        for keys, (_, value, fixes) in ranked
    ]
    first, others = errors[0], errors[1:]
    fix = first.fix + "".join(f"\n  also {other}" for other in others)
    return RecipeError(first.field, first.value, fix, where=first.where)


def _locate(error: Any, draft: Draft) -> tuple[Keys, object]:
    """Return the keys and the written value that an error is about."""
    keys: Keys = ()
    if not error["loc"]:  # a rule over several fields: its message names them, the first is the one to point at
        named = re.findall(r"\b[a-z_]+\.[a-z_]+\b", error["msg"])
        named += [word for word in re.findall(r"\b[a-z_]+\b", error["msg"]) if word in draft.values]
        keys = tuple(named[0].split(".")) if named else ()
        written: Any = draft.values
        for key in keys:
            written = written.get(key) if isinstance(written, dict) else None
        return keys, written
    place = tuple(key for key in error["loc"] if key not in (ONE, SEVERAL))
    if error["type"] == "missing":
        return place, None
    # pydantic adds the tried branch of a union ("list[str]") to the keys: stop where the draft ends.
    value: Any = draft.values
    for key in place:
        is_index = isinstance(value, list) and isinstance(key, int) and key < len(value)
        if not (is_index or (isinstance(value, dict) and key in value)):
            break
        value, keys = value[key], (*keys, key)
    return keys, value


def _fix(error: Any, keys: Keys, written: object, schema: type[Section]) -> str:
    """Say what to write instead."""
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"unknown field, {_nearest_field(keys, schema)}"
        case "missing":
            return f"is missing; {_meaning(keys, schema)}".rstrip("; ")
        case "value_error":
            return str(context["error"]).removeprefix(f"{dotted(keys)} = {written!r} ")
        case "literal_error":
            return f"must be {context['expected']}"
        case "string_type":
            return "must be text; put it in quotes" if isinstance(error["input"], int | float) else "must be text"
        case "model_type":
            return "must be a section with fields of its own"
        case "string_pattern_mismatch":
            return _meaning(keys, schema)
    message = str(error["msg"])
    for theirs, ours in (("Input should", "must"), ("valid integer", "whole number"), ("valid array", "list")):
        message = message.replace(theirs, ours)
    return message


def _meaning(keys: Keys, schema: type[Section]) -> str:
    """Return the documentation of a field, or "" where the schema has none."""
    section: Any = schema
    for key in keys[:-1]:
        section = _sections(section).get(str(key), section)
    known = section.model_fields.get(str(keys[-1]))
    inner = _sections(section).get(str(keys[-1]))
    return (known.description if known and known.description else "") or (inner.__doc__ if inner else "") or ""


def _sections(section: type[Section]) -> dict[str, type[Section]]:
    """Return the fields of a section that are sections themselves."""
    found = {}
    for name, known in section.model_fields.items():
        parts = [known.annotation]
        while parts:  # a section may stand inside `Annotated` inside `| None`
            part = parts.pop()
            parts.extend(get_args(part))
            if isinstance(part, type) and issubclass(part, Section):
                found[name] = part
    return found


def _field_names(section: type[Section], keys: Keys = ()) -> Iterator[Keys]:
    """Yield the keys of every field below `section`."""
    inner = _sections(section)
    for name in section.model_fields:
        yield (*keys, name)
        if name in inner:
            yield from _field_names(inner[name], (*keys, name))


def _nearest_field(keys: Keys, schema: type[Section]) -> str:
    """Say which field was probably meant: a sibling, the same name elsewhere, or what others call it."""
    every = list(_field_names(schema))
    name = str(keys[-1])
    section = tuple(key for key in keys[:-1] if isinstance(key, str))  # the items of a list are alike
    siblings = [str(known[-1]) for known in every if known[:-1] == section]
    if not difflib.get_close_matches(name, siblings, n=1, cutoff=0.7):
        elsewhere = [dotted(known) for known in every if known[-1] == name]
        if elsewhere or (schema is Recipe and name in KNOWN_ELSEWHERE):
            return f"did you mean {(elsewhere or [KNOWN_ELSEWHERE[name]])[0]!r}?"
    return nearest(name, siblings)


def dotted(keys: Keys) -> str:
    """The keys as people write them: `data.train[1].uri`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")
