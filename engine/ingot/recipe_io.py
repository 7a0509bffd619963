"""YAML <-> `Recipe`: files with line numbers in every complaint, dotted overrides, a stable hash, JSON Schema.

Values are read by YAML 1.2's rules, because 1.1's surprise people in recipes: there `1e-4` is a string, `no` is
false, `12:30` is 750 and `2024-01-01` is a date.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import pydantic
import yaml

from ingot.errors import RecipeError
from ingot.recipe import Recipe, Section, Source
from ingot.recipe_errors import Draft, Keys, dotted, translate

# What has no influence on the trained, measured and packaged model.
NOT_HASHED = frozenset(
    {"name", "description", "output", "parallel", "track", "serve", "diagnose", "check", "data.cache"}
)
_CORE = "tag:yaml.org,2002:"
Schema = TypeVar("Schema", bound=Section)


class _Loader(yaml.SafeLoader):
    """Scalars by YAML 1.2, and no aliases: a nest of them can be made to fill the memory."""

    yaml_implicit_resolvers = {}  # type: ignore[var-annotated]  # noqa: RUF012 (PyYAML declares it so)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read, write the value twice", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern in (
    ("null", r"(?:~|null|Null|NULL|)\Z"),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    ("int", r"[-+]?[0-9]+\Z"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_CORE + _tag, re.compile(_pattern), None)  # type: ignore[no-untyped-call]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; each override is `dotted.field=value` with the value written as in YAML.

    Raises `RecipeError` with file, line, field, value and fix; all problems are listed, the likeliest cause first.
    """
    path = Path(path)
    return parse_recipe_text(read_text(path), overrides, source=str(path))


def read_text(path: Path, what: str = "recipe") -> str:
    """The text of a YAML file; `what` it is called in errors. Raises `RecipeError` when it cannot be read."""
    if path.is_dir():
        files = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "it holds none"
        raise RecipeError(what, str(path), f"is a folder; name one {what} file in it: {files}")
    if not path.is_file():
        raise RecipeError(what, str(path), f"there is no such file{_nearest_file(path)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(what, str(path), f"cannot be read as UTF-8 text: {error}") from error


def parse_recipe_text(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """Read a recipe from YAML text; `source` names it in messages."""
    draft = parse_draft(text, source)
    for override in overrides:
        apply_override(draft, override)
    return validate(draft)


def parse_draft(text: str, source: str, what: str = "recipe", needs: str = "name, model and data") -> Draft:
    """Plain values of YAML text. Raises `RecipeError` for what is no YAML, or no mapping."""
    draft = Draft(source)
    root = _compose(text, source)
    if root is None:
        raise RecipeError(what, source, f"is empty; a {what} needs at least {needs}")
    if not isinstance(root, yaml.MappingNode):
        keys = ", ".join(f"{name}:" for name in re.split(", | and ", needs))
        raise RecipeError(what, source, f"must be a mapping of sections ({keys}, ...)", where=f"{source}:1")
    draft.values = _plain(root, (), draft)
    return draft


def parse_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """Build a recipe from plain values (as JSON or a form gives them), as strict as a file."""
    return validate(Draft("", dict(mapping)))


def dump_recipe(recipe: Recipe, resolved: bool = True) -> str:
    """Write YAML that loads to an equal recipe. `resolved`: with every default spelled out, else only what differs."""
    values = recipe.model_dump(mode="json", exclude_defaults=not resolved)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of what decides the result: all fields, defaults included, except `NOT_HASHED`.

    The order of keys and defaults that are spelled out change nothing; a new default in a later version does.
    """
    whole = {name: True for name in NOT_HASHED if "." not in name}
    values = recipe.model_dump(mode="json", exclude={**whole, "data": {"cache"}})
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def flat_params(recipe: Recipe) -> dict[str, str]:
    """Return `{"optim.lr": "0.0002", ...}`: every field by its dotted name; what is not a string is written as JSON."""
    return {
        ".".join(map(str, keys)): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for keys, value in _leaves(recipe.model_dump(mode="json"), ())
    }


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe file, with meanings and defaults, for editors and forms."""
    schema = Recipe.model_json_schema()
    rows = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/Source"}]}
    data = schema["$defs"]["Data"]["properties"]
    several = {"type": "array", "minItems": 1, "items": rows}
    described = {key: value for key, value in data["train"].items() if key not in ("anyOf", "oneOf")}
    data["train"] = described | {"anyOf": [*rows["anyOf"], several]}
    for name in ("validation", "test"):
        data[name]["anyOf"] = [*rows["anyOf"], {"type": "null"}]
    schema["description"] = "Everything that a run needs, from base model and data to a served package."
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:ingot:recipe",
        "title": "Ingot recipe",
    }
    return head | {key: value for key, value in schema.items() if key != "title"}


def _compose(text: str, source: str) -> yaml.Node | None:
    """Parse `text` into nodes that know their lines."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        written = (text.splitlines() or [""])[min(line, len(text.splitlines())) - 1] if text else ""
        problem = getattr(error, "problem", None) or str(error)
        fix = "indent with spaces, not tabs" if "\t" in written.partition("#")[0] else f"is not YAML: {problem}"
        raise RecipeError("recipe", written.strip(), fix, where=f"{source}:{line}") from error


def _plain(node: yaml.Node, keys: Keys, draft: Draft) -> Any:
    """Turn a node into plain values, noting in `draft` where each one stands."""
    draft.places.setdefault(keys, f"{draft.source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, keys, draft)
    if node.tag not in (_CORE + "seq", _CORE + "map"):
        raise _unfit_tag(node, dotted(keys), draft.where(keys))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*keys, index), draft) for index, child in enumerate(node.value)]
    values: dict[str, Any] = {}
    for key_node, child in node.value:
        name = str(key_node.value)
        place = f"{draft.source}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(dotted(keys) or "recipe", name, "a key must be a plain name", where=place)
        if name in values:
            fix = f"is written twice (first in {draft.places[*keys, name]}); keep one"
            raise RecipeError(dotted((*keys, name)), child.value, fix, where=place)
        draft.places[*keys, name] = place
        values[name] = _plain(child, (*keys, name), draft)
    return values


def _scalar(node: yaml.ScalarNode, keys: Keys, draft: Draft) -> Any:
    """Return the value of a scalar node by its YAML 1.2 core tag."""
    text = str(node.value)
    try:
        match node.tag.removeprefix(_CORE):
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
    except (KeyError, ValueError):
        pass  # an explicit tag on a value of another type: told below, like an unknown tag
    raise _unfit_tag(node, text, draft.where(keys))


def _unfit_tag(node: yaml.Node, value: str, where: str) -> RecipeError:
    if node.tag == "!function":  # of task files of lm-evaluation-harness
        fix = "is a Python function, which is not run here; run the task by its own library: ingot evaluate --harness"
        return RecipeError("task", f"!function {value}", fix, where=where)
    return RecipeError("recipe", value, f"the tag {node.tag!r} does not fit here; leave it out", where=where)


def apply_override(draft: Draft, override: str) -> None:
    """Write the value of `dotted.field=value` into the draft."""
    name, equals, text = override.partition("=")
    keys: Keys = tuple(re.sub(r"\[(\d+)\]", r".\1", name.strip()).split("."))
    place = f"override {override}"
    if not equals or not all(keys):
        raise RecipeError("override", override, "write dotted.field=value, e.g. optim.lr=1e-4")
    if not text.strip():
        raise RecipeError(name, text, "has no value; write null for none or '\"\"' for an empty text", where=place)
    section: Any = draft.values
    for end in range(1, len(keys)):
        key, inside = keys[end - 1], dotted(keys[:end])
        inner = section.get(key) if isinstance(section, dict) else section[key]
        if isinstance(inner, str) and _is_short_source(keys, end):
            inner = {"uri": inner}
        elif isinstance(inner, list):
            index = str(keys[end])
            if not index.isdigit() or int(index) >= len(inner):
                fix = (
                    f"{inside} is a list of {len(inner)}; name one of them, e.g. {inside}[0], or override it as a whole"
                )
                raise RecipeError(name, inner, fix, where=place)
            keys = (*keys[:end], int(index), *keys[end + 1 :])
        elif inner is not None and not isinstance(inner, dict):
            raise RecipeError(name, inner, f"{inside} holds one value; override it as a whole", where=place)
        draft.places.setdefault(keys[:end], place)
        section[key] = section = list(inner) if isinstance(inner, list) else dict(inner or {})
    for known in [known for known in draft.places if known[: len(keys)] == keys]:
        del draft.places[known]
    draft.places[keys] = place
    node = _compose(text, place)
    section[keys[-1]] = None if node is None else _plain(node, keys, Draft(place))


def _is_short_source(keys: Keys, end: int) -> bool:
    """The text at `keys[:end]` is the short form of a source: see recipe.Rows, and `data` of a task file."""
    if keys[0] == "data" and keys[1] in ("train", "validation", "test"):
        return True
    return keys[:end] in (("data",), ("fewshot", "data")) and keys[end] in (*Source.model_fields, "skip", "take")


@overload
def validate(draft: Draft) -> Recipe: ...
@overload
def validate(draft: Draft, schema: type[Schema]) -> Schema: ...
def validate(draft: Draft, schema: type[Section] = Recipe) -> Section:
    """Check all values against the schema; a `RecipeError` lists everything that is wrong."""
    for keys, value in _leaves(draft.values, ()):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(
                dotted(keys), value, "must be a finite number (text is put in quotes)", where=draft.where(keys)
            )
    try:
        text = json.dumps(draft.values)
    except (TypeError, ValueError) as error:
        raise RecipeError("recipe", draft.values, f"must hold plain values only: {error}") from error
    try:
        # Strict, or `rank: true` would be 1 and `epochs: "3"` 3.0; through JSON, where a list is fit for a tuple.
        return schema.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        raise translate(error, draft, schema) from error


def _nearest_file(path: Path) -> str:
    """Return "; did you mean ...?" for the closest recipe beside a missing file, or ""."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    # Two levels: enough for recipes/<task>/<name>.yaml, and cheap when someone stands in a home folder.
    files = [str(file) for pattern in ("*.yaml", "*/*.yaml", "*/*/*.yaml") for file in folder.glob(pattern)]
    close = difflib.get_close_matches(str(path), files, n=1, cutoff=0.6)
    by_name = [file for file in files if Path(file).stem == path.stem]
    return f"; did you mean {(by_name or close)[0]!r}?" if by_name or close else ""


def _leaves(value: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """Yield every value that is not a non-empty mapping, with its keys."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key))
    else:
        yield keys, value
