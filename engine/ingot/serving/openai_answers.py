"""What answers in OpenAI's form look like: made from generations, and described for the OpenAPI document."""

import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ingot.model.sampling import Generation, Told

SPACE = "\u2581"  # SentencePiece's


class Answer(BaseModel):
    """Base of all parts of an answer."""

    model_config = ConfigDict(extra="forbid")


class Usage(Answer):
    """Tokens: a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class EmbeddingUsage(Answer):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class Model(Answer):
    """A model that is served. `parent`: the base of an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str
    parent: str | None = None


class Models(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Likely(Answer):
    """A token that may stand at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    """The token that stands there, and the likeliest ones."""

    top_logprobs: list[Likely]


class ChatLogprobs(Answer):
    """A number for each token of an answer."""

    content: list[TokenLogprob]


class FunctionCall(Answer):
    """`arguments` are JSON."""

    name: str
    arguments: str


class Call(Answer):
    """A function that the model calls."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[Call] | None = None


class ChatChoice(Answer):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None


class ChatCompletion(Answer):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Answer):
    """Lists of one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    """One answer to a prompt."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None


class TextCompletion(Answer):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(Answer):
    """The vector of a text; base64: little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def envelope(model: str, prefix: str, kind: str) -> dict[str, Any]:
    """What every answer and event of one request begins with."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(answers: Sequence[Generation], n: int) -> dict[str, int]:
    """Tokens of `n` answers to each prompt."""
    prompt, new = sum(a.n_prompt for a in answers[::n]), sum(len(a.ids) for a in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


@lru_cache(maxsize=1)
def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes bytes as letters: printable ones as they are, the others in order from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


@lru_cache(maxsize=16)
def _letters(tokenizer: Any) -> bool:
    """Whether its tokens are bytes written as letters: only there a space is a letter of its own."""
    return "\u0120" in "".join(tokenizer.convert_ids_to_tokens(tokenizer("a b", add_special_tokens=False)["input_ids"]))


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The UTF-8 that a token stands for, which need not be whole characters."""
    name = str(tokenizer.convert_ids_to_tokens(token) or "")
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    if _letters(tokenizer):
        letters = _bytes_of_letters()
        return b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in name)
    return name.replace(SPACE, " ").encode()


def _likely(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def chat_logprobs(tokenizer: Any, told: Sequence[Told]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat choice."""
    content = [
        _likely(tokenizer, one.token, one.logprob) | {"top_logprobs": [_likely(tokenizer, *top) for top in one.top]}
        for one in told
    ]
    return {"content": content}


def text_logprobs(tokenizer: Any, told: Sequence[Told], offset: int = 0) -> dict[str, Any]:
    """OpenAI's `logprobs` of a completion. `offset`: characters of the text before these tokens."""
    tokens = [token_bytes(tokenizer, one.token).decode("utf-8", "replace") for one in told]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    # The likeliest last: where two tokens read the same, its number stays.
    tops = [
        {token_bytes(tokenizer, i).decode("utf-8", "replace"): logprob for i, logprob in reversed(one.top)}
        for one in told
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
