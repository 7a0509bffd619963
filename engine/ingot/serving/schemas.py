"""What a request may hold. Every field is honoured; any other field is an error that names it."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ingot.model.generate import InputError

Stop = str | Annotated[list[str], Field(max_length=16)]


class Body(BaseModel):
    """Base of all bodies: no unknown fields, and no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool = False


class Settings(Body):
    """Sampling and form of an answer, as OpenAI names them. Missing: the model's own defaults."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    stop: Stop | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    def sampling(self) -> dict[str, Any]:
        """As `Runtime.generate` takes it."""
        return {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": self.seed,
        }


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise ValueError("max_tokens and max_completion_tokens are two names of one limit: send one")
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(Settings):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _one_stream(self) -> Self:
        if self.stream and isinstance(self.prompt, list):
            raise ValueError("stream takes one prompt, as a string")
        return self


class Params(Body):
    """`params` of /invocations: as the packaged signature declares them."""

    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    stop: Stop | None = None
    seed: int | None = None

    def sampling(self) -> dict[str, Any]:
        """As `Runtime.generate` takes it. 0 tokens and seed -1 mean "not given", as in the packaged signature."""
        return {
            "max_new_tokens": self.max_tokens or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            "seed": None if self.seed == -1 else self.seed,
        }


class Split(Body):
    """A pandas DataFrame in the orientation `split`."""

    columns: list[str]
    data: list[list[Any]]
    index: list[Any] | None = None


class InvocationRequest(Params):
    """POST /invocations: exactly one form of input. `messages`, `prompt`, `input_string` and `text` are one bare row,
    with the sampling fields beside them instead of in `params`."""

    dataframe_split: Split | None = None
    dataframe_records: list[dict[str, Any]] | None = None
    inputs: dict[str, Any] | list[Any] | str | None = None
    instances: list[Any] | dict[str, Any] | None = None
    params: Params | None = None
    messages: list[Any] | None = None
    prompt: str | None = None
    input_string: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        forms = (
            "dataframe_split",
            "dataframe_records",
            "inputs",
            "instances",
            "messages",
            "prompt",
            "input_string",
            "text",
        )
        given = [form for form in forms if getattr(self, form) is not None]
        if len(given) != 1:
            raise ValueError(f"send exactly one of {', '.join(forms)}; got {' and '.join(given) or 'none'}")
        bare = [name for name in Params.model_fields if getattr(self, name) is not None]
        if bare and (self.params is not None or given[0] in forms[:4]):
            raise ValueError(f"{bare[0]} belongs into params here")
        return self

    @property
    def settings(self) -> Params:
        """The sampling fields, wherever they stood."""
        return self if self.params is None else self.params

    def rows(self) -> list[dict[str, Any]]:
        """The input as one mapping a row."""
        if self.dataframe_split is not None:
            columns = self.dataframe_split.columns
            if any(len(row) != len(columns) for row in self.dataframe_split.data):
                raise InputError("dataframe_split", f"every row of data must hold {len(columns)} values, as columns do")
            return [dict(zip(columns, row, strict=True)) for row in self.dataframe_split.data]
        if self.dataframe_records is not None:
            return self.dataframe_records
        for form in ("inputs", "instances"):
            if (value := getattr(self, form)) is not None:
                return _tensor_rows(form, value)
        name = next(n for n in ("messages", "prompt", "input_string", "text") if getattr(self, n) is not None)
        return [{name: getattr(self, name)}]


def _tensor_rows(form: str, value: Any) -> list[dict[str, Any]]:
    """`{column: [cells]}`, `{column: cell}`, `[rows]`, `[strings]` or a string -> rows; a bare string is column ""."""
    if isinstance(value, str):
        return [{"": value}]
    if isinstance(value, list):
        return [row if isinstance(row, dict) else {"": row} for row in value]
    if not any(isinstance(cells, list) for cells in value.values()):
        return [value]
    if all(isinstance(cells, list) and cells and isinstance(cells[0], dict) for cells in value.values()):
        return [value]  # {"messages": [{...}, {...}]}: one conversation
    lengths = {len(cells) if isinstance(cells, list) else -1 for cells in value.values()}
    if len(lengths) != 1:
        raise InputError(form, "all columns must be lists of one length")
    return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]


def text_of(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The one string of a row, under any of `names` or bare."""
    found = [row[name] for name in (*names, "") if name in row]
    if len(found) != 1 or not isinstance(found[0], str):
        raise InputError(names[0], f"each row needs one string named {' or '.join(names)}")
    if unknown := set(row) - {*names, ""}:
        raise InputError(min(unknown), f"unknown column {min(unknown)!r}; the model reads {' or '.join(names)}")
    return found[0]


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row: `messages` (a list, or its JSON), or `input_string` as the user's only turn."""
    if "messages" not in row:
        return [{"role": "user", "content": text_of(row, ("input_string", "prompt"))}]
    messages = row["messages"]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise InputError("messages", "messages is a string, but not JSON") from error
    if not isinstance(messages, list) or not messages:
        raise InputError("messages", "messages must be a list of at least one message")
    if unknown := set(row) - {"messages"}:
        raise InputError(min(unknown), f"unknown column {min(unknown)!r} beside messages")
    try:
        return [Message.model_validate(turn).model_dump(exclude_none=True) for turn in messages]
    except ValueError as error:
        raise InputError(
            "messages", 'each message must be an object such as {"role": "user", "content": "..."}'
        ) from error
