"""What a request in OpenAI's form may hold. Every field is honoured; any other field is an error that names it."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ingot.model.sampling import InputError
from ingot.serving.schemas import Body, Stop

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
Schema = dict[str, Any]
CHOICES = 16  # of one request


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Called(Body):
    """A function that was called; `arguments` are JSON."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(Body):
    """One turn of a conversation. Fields that answers hold may come back empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self


class Function(Body):
    """What may be called. `parameters`: a JSON Schema."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A function that is offered."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A function by its name."""

    name: Name


class ToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    """A schema with its name, which is the caller's own."""

    name: Name
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must be: text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_belongs(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError('json_schema and type "json_schema" go together')
        return self

    def schema_wanted(self) -> Schema | None:
        """The schema of answers; None: they are free."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Body):
    """What a stream holds besides text."""

    include_usage: bool = False


class Settings(Body):
    """Sampling and form of an answer, as OpenAI names them. Missing: the model's own defaults."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, le=2**31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(default=None, max_length=1024)
    stop: Stop | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1, le=CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def told(self) -> int | None:
        """`Sampling.top_logprobs`."""
        raise NotImplementedError

    def sampling(self, vocabulary: int) -> dict[str, Any]:
        """As `Runtime.sampling` takes it, for a model of so many tokens. Raises InputError."""
        same = ("temperature", "top_p", "top_k", "min_p", "stop", "seed")
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: getattr(self, name) for name in (*same, *penalties)}
        given |= {"max_new_tokens": self.max_tokens, "top_logprobs": self.told}
        if self.logit_bias:
            ids = [int(key) if key.isdecimal() and len(key) < 10 else -1 for key in self.logit_bias]
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise InputError("logit_bias", f"logit_bias: its keys are token ids, from 0 to {vocabulary - 1}")
            given["logit_bias"] = tuple(zip(ids, self.logit_bias.values(), strict=True))
        return given


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise ValueError("max_tokens and max_completion_tokens are two names of one limit: send one")
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs: true")
        if self.tools is None and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice is only for a request with tools")
        if self.tools is None and self.parallel_tool_calls is not None:
            raise ValueError("parallel_tool_calls is only for a request with tools")
        return self

    @property
    def told(self) -> int | None:
        """`Sampling.top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    def must_call(self) -> list[Tool]:
        """The tools of which one must be called; none where the model decides. Raises InputError."""
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            wanted = [tool for tool in self.offered() if tool.function.name == name]
            if not wanted:
                raise InputError("tool_choice", "tool_choice: tools holds no function of that name")
            return wanted
        return self.offered() if self.tool_choice == "required" else []

    def schema_wanted(self) -> Schema | None:
        """The schema of answers; None: they are free. Raises InputError."""
        wanted = None if self.response_format is None else self.response_format.schema_wanted()
        if wanted is not None and self.offered():
            raise InputError("response_format", "response_format: not beside tools: calls have a form of their own")
        if any(tool.function.strict for tool in self.offered()) and not self.must_call():
            needs = "strict is honoured where a call is certain: tool_choice required, or a function's name"
            raise InputError("tools", f"tools: {needs}")
        return wanted

    def turns(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them: text in one piece, arguments of calls as objects."""
        turns = []
        for place, message in enumerate(self.messages):
            turn = message.model_dump(exclude_none=True, exclude={"annotations"})
            if isinstance(message.content, list):
                turn["content"] = "".join(part.text for part in message.content)
            for call in turn.get("tool_calls", []):
                try:
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
                except (ValueError, RecursionError) as error:
                    where = f"messages.{place}.tool_calls"
                    raise InputError(where, f"{where}: arguments are not JSON") from error
            turns.append(turn)
        return turns


class CompletionRequest(Settings):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=256)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def told(self) -> int | None:
        """`Sampling.top_logprobs`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def scores(self) -> bool:
        """Whether the prompts' own likelihoods are wanted, and nothing is to be written. Raises InputError for a part
        of that.
        """
        if not self.echo and self.max_tokens != 0:
            return False
        alone = not self.stream and (self.n or 1) == 1
        if self.echo and self.max_tokens == 0 and self.logprobs == 1 and alone:
            return True
        needs = "echo: true, logprobs: 1 and max_tokens: 0 go together, without stream and n"
        first = "echo" if self.echo else "max_tokens"
        raise InputError(first, f"{first}: {needs}; they tell how likely the prompt is")


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
