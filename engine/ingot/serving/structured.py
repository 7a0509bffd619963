"""Answers that keep to a JSON Schema: before each token, llguidance says which ones may come."""

# V vocabulary

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ingot.model.generate import end_ids
from ingot.model.runtime import Runtime
from ingot.model.sampling import Guide, InputError

# No white space but one space behind a comma and a colon: a model that likes line breaks would otherwise write them
# until its tokens are used up. A keyword that is not understood is an error: to skip it would be to break the schema.
WRITTEN = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
UNKNOWN_KEYS = "Unimplemented keys: "


class SchemaGuide:
    """What an answer may say next: llguidance's matcher as `Guide`."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size
        self.finished = self.failed = False

    def allowed(self, width: int) -> Tensor:
        """[width], on the CPU. Ids beyond the tokenizer's (a padded matrix has them) are never allowed."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        known_V = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: min(self._size, width)]
        self.failed = self._matcher.is_error()
        return torch.nn.functional.pad(known_V, (0, width - len(known_V))).bool()

    def push(self, token: int) -> None:
        """Go on behind a token."""
        self._matcher.consume_token(token)
        self.failed = self._matcher.is_error()
        self.finished = self.failed or self._matcher.is_stopped()


@dataclass(frozen=True, eq=False)
class Guides:
    """Makes a guide along `schema` for each answer."""

    schema: dict[str, Any]
    whole: Any
    size: int

    def __call__(self) -> Guide:
        """A new one."""
        return SchemaGuide(self.whole.deep_copy(), self.size)


@lru_cache(maxsize=16)  # about a second for 150,000 tokens
def _vocabulary(tokenizer: Any, ends: tuple[int, ...]) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer.backend_tokenizer.to_str(), n_vocab=len(tokenizer), eos_token=list(ends))


def guided(runtime: Runtime, schema: dict[str, Any], field: str) -> Guides:
    """What makes a guide along `schema` for each answer. Raises InputError, naming `field`."""
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise InputError(field, f"{field} needs an extra of this server: pip install 'ingot[structured]'") from error
    ends = tuple(sorted(end_ids(runtime.model, runtime.tokenizer)))
    if not ends or not runtime.tokenizer.is_fast:
        lacks = "has no fast tokenizer" if ends else "has no end token"
        raise InputError(field, f"{field}: this model {lacks}, so that its answers cannot be guided")
    try:
        vocabulary = _vocabulary(runtime.tokenizer, ends)
    except ValueError as error:
        raise InputError(field, f"{field}: answers of this model's tokenizer cannot be guided") from error
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WRITTEN)
    except (ValueError, RecursionError) as error:
        raise InputError(field, f"{field}: not a JSON Schema") from error
    if problem := LLMatcher.validate_grammar(grammar, vocabulary):
        # The library's sentences repeat parts of the schema: only the keywords that it lacks are told.
        what = problem if problem.startswith(UNKNOWN_KEYS) else "it is no valid JSON Schema, or nothing can satisfy it"
        raise InputError(field, f"{field}: the schema cannot be followed: {what[:200]}")
    whole = LLMatcher(vocabulary, grammar, log_level=0)
    whole.compute_bitmask()
    if whole.is_error():
        raise InputError(field, f"{field}: the schema cannot be followed: it has no beginning, or is too large")
    return Guides(schema, whole, vocabulary.vocab_size)
