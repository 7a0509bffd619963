"""Rows and parameters held against the table of tasks; the same table as pydantic models and JSON Schemas.

Self-contained (standard library, pydantic and its neighbour `task_schemas.py`): the MLflow package holds a copy.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from .task_schemas import TASKS, Column, Param, TaskSchema

ROLES = ("system", "developer", "user", "assistant", "tool")
BARE = ""  # the column of a row that is a bare string
NESTED = ("strings", "doubles", "objects", "messages", "words")


class SchemaError(ValueError):
    """A row or a parameter that does not fit; `field` names the column or parameter. Never holds a row's contents."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def schema_of(task: str) -> TaskSchema:
    """The task's part of the table. Raises SchemaError."""
    if task not in TASKS:
        raise SchemaError("task", f"no model answers {task!r}; tasks are {', '.join(TASKS)}")
    return TASKS[task]


def read_row(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row by the table's own names: aliases, JSON texts and a bare string resolved, empty cells left out.

    Raises SchemaError.
    """
    schema = schema_of(task)
    given = {str(name): plain for name, value in row.items() if (plain := _plain(value)) is not None}
    try:
        found = _given(row_model(task).model_validate(given))
    except ValidationError as error:
        raise _as_schema_error(error, [column.name for column in schema.inputs], "column") from error
    if set(found) not in map(set, schema.forms):
        missing = next((n for form in schema.forms for n in form if set(found) & set(form) and n not in found), None)
        raise SchemaError(missing or schema.forms[0][0], f"each row needs {_forms(schema)}; got {_names(found)}")
    for name, value in found.items():
        if _has_halves(value):  # no tokenizer takes them
            raise SchemaError(name, f"{name}: holds half of a surrogate pair, which is no character")
    return found


def read_params(task: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for: without what is None or the same as not given. Raises SchemaError."""
    schema = schema_of(task)
    given = {name: plain for name, value in params.items() if (plain := _plain(value)) is not None}
    try:
        return _given(params_model(task).model_validate(given))
    except ValidationError as error:
        raise _as_schema_error(error, [param.name for param in schema.params], "parameter") from error


def flat(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of single values: lists as JSON text, and a conversation of one user turn as that turn's text. Hosts that
    read a package's example (Azure ML without a scoring script) take nothing nested. Raises SchemaError.
    """
    found = read_row(task, row)
    turns = found.get("messages")
    if turns and task == "chat-completion" and [turn["role"] for turn in turns] == ["user"] and len(turns[0]) == 2:
        return {"input_string": turns[0]["content"]}
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in found.items()}


@cache
def row_model(task: str) -> type[BaseModel]:
    """A row as a pydantic model: unknown columns forbidden, aliases known. `read_row` knows which go together."""
    schema = schema_of(task)
    single = len(schema.forms[0]) == 1
    fields: dict[str, Any] = {}
    for column in schema.inputs:
        # A bare string is the first column that is a text by itself.
        bare = (BARE,) if single and column.type == "string" and (column.name,) in schema.forms else ()
        alias = AliasChoices(column.name, *column.aliases, *bare)
        kind = _INPUTS[column.type]
        if len(schema.forms) == 1:
            fields[column.name] = (kind, Field(validation_alias=alias, description=column.doc))
        else:
            fields[column.name] = (kind | None, Field(None, validation_alias=alias, description=column.doc))
    return create_model(_title(task, "Row"), __config__=_STRICT, **fields)


@cache
def params_model(task: str) -> type[BaseModel]:
    """Parameters as a pydantic model: None where not given, or given as the default."""
    fields: dict[str, Any] = {}
    for param in schema_of(task).params:
        field = Field(ge=param.low, le=param.high, gt=param.above, description=param.doc)
        absent = BeforeValidator(_absent(param.default), json_schema_input_type=_sent(param) | None)
        fields[param.name] = (Annotated[_kind(param) | None, field, absent], None)
    return create_model(_title(task, "Params"), __config__=_STRICT, **fields)


def output_schema(task: str) -> dict[str, Any]:
    """The JSON Schema of an answered row."""
    return _object(schema_of(task).outputs)


# --- how it is done ---

_STRICT = ConfigDict(extra="forbid", strict=True, populate_by_name=False)


def _given(found: BaseModel) -> dict[str, Any]:
    return {name: value for name in type(found).model_fields if (value := getattr(found, name)) is not None}


def _plain(value: Any) -> Any:
    """Values of numpy and pandas as Python's; None for an empty cell."""
    value = getattr(value, "tolist", lambda: value)()
    return None if isinstance(value, float) and value != value else value


def _has_halves(value: Any) -> bool:
    """Whether a text anywhere in `value` is not Unicode. A loop, since JSON may be nested as deeply as Python calls."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return True
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, Sequence):
            left += one
    return False


def _turns(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("is a string, but not JSON") from error
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("must be a list of at least one message, or its JSON")
    if not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in value):
        raise ValueError('each message must be an object such as {"role": "user", "content": "..."}')
    return list(value)


def _words(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError("is a string, but not JSON; a whole text goes into the column text") from error
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("must be a list of words, or its JSON")
    if not value or not all(isinstance(word, str) and word.strip() for word in value):
        raise ValueError("must hold words, at least one, none of them blank")
    return list(value)


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Messages = Annotated[list[dict[str, Any]], BeforeValidator(_turns, json_schema_input_type=list[dict[str, Any]] | str)]
Words = Annotated[list[str], BeforeValidator(_words, json_schema_input_type=list[str] | str)]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=16),
    BeforeValidator(_texts, json_schema_input_type=list[str] | str),
]
_INPUTS: dict[str, Any] = {"string": str, "messages": Messages, "words": Words}
_PARAMS: dict[str, Any] = {"string": str, "long": int, "double": float, "boolean": bool, "strings": Texts}
_JSON = {"string": "string", "long": "integer", "double": "number", "boolean": "boolean"}


def _kind(param: Param) -> Any:
    return Literal[param.choices] if param.choices else _PARAMS[param.type]


def _sent(param: Param) -> Any:
    """What a request may hold: the default, too."""
    if param.choices:
        return Literal[(param.default, *param.choices)]
    low = param.low if param.low is None else min(param.low, param.default)
    return Annotated[_PARAMS[param.type], Field(ge=low, gt=param.above, le=param.high)]


def _absent(default: Any) -> Callable[[Any], Any]:
    return lambda value: None if type(value) is type(default) and value == default else value


def _title(task: str, what: str) -> str:
    return "".join(part.capitalize() for part in task.split("-")) + what


def _object(columns: Sequence[Column]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {column.name: _json_type(column) | {"description": column.doc} for column in columns},
        "required": [column.name for column in columns if not column.asked],
    }


def _json_type(column: Column) -> dict[str, Any]:
    if column.type == "objects":
        return {"type": "array", "items": _object(column.fields)}
    if column.type in NESTED:
        return {"type": "array", "items": {"type": _JSON[column.type.removesuffix("s")]}}
    return {"type": _JSON[column.type]}


def _forms(schema: TaskSchema) -> str:
    """Every form in words: "text (or input_string)", "question and context"."""
    columns = {column.name: column for column in schema.inputs}

    def name(of: str) -> str:
        others = columns[of].aliases
        return f"{of} (or {', '.join(others)})" if others else of

    return "; or ".join(" and ".join(map(name, form)) for form in schema.forms)


def _names(names: Collection[str]) -> str:
    return ", ".join(repr(name) if name else "a bare value" for name in names) or "none"


def _as_schema_error(error: ValidationError, known: Sequence[str], what: str) -> SchemaError:
    errors = error.errors(include_url=False, include_input=False)
    # A column by another name is both unknown and missing: the name is what went wrong.
    first = next((it for it in errors if it["type"] == "extra_forbidden"), errors[0])
    field = str(first["loc"][0]) if first["loc"] else known[0]
    if first["type"] == "extra_forbidden":
        if field == BARE:
            return SchemaError(field, f"a bare value is no row; the model takes {', '.join(known)}")
        near = get_close_matches(field, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"the model takes {', '.join(known) or 'none'}"
        return SchemaError(field, f"unknown {what} {field!r}; {hint}")
    if first["type"] == "missing":
        return SchemaError(field, f"{what} {field!r} is missing; the model takes {', '.join(known)}")
    return SchemaError(field, f"{field}: {first['msg'].removeprefix('Value error, ')}")
