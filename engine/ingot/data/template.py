"""Examples to token ids and the mask of what is learned. Special tokens are encoded exactly once.

Masks are by position, never by id: a tokenizer whose pad token is its eos token still learns to stop.

text-generation: prompt and completion are joined (`joined`), encoded as one text, and parted by character offsets.
A token belongs to the completion when it starts at or after the joint, and spaces at the joint belong to the
completion, because tokenizers glue a space to the word behind it. `prompt_ids` ends at the same joint, so the model
is asked with exactly the tokens it was trained behind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.data.conversation import Conversation, Document, Example, Labeled, PromptCompletion
from ingot.data.turns import Tokenizer, encode_chats, first_token, render, require_template
from ingot.errors import DataError, ModelError
from ingot.recipe import Data, Objective
from ingot.registry import nearest

ROWS_PER_CALL = 1000  # a fast tokenizer wants long lists; progress wants to be told now and then
LISTED_DROPS = 20


@dataclass(frozen=True)
class Encoded:
    """One row as ids. `trainable[i]`: token i is a target. `label`: class index of a classification row."""

    ids: list[int]
    trainable: list[bool]
    label: int | None
    where: str


@dataclass(frozen=True)
class DroppedReport:
    """What truncation to `data.max_tokens` did: `count` of `total` rows lost every trainable token and are left out."""

    total: int
    truncated: int
    count: int
    where: list[str] = field(default_factory=list)
    """Places of the first dropped rows, 20 at most."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"total": self.total, "truncated": self.truncated, "dropped": self.count, "where": list(self.where)}


def encode(example: Example, tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]) -> Encoded:
    """Encode one row, cut to `data.max_tokens`. Raises `DataError` or `ModelError` for what cannot be encoded."""
    return _encode_many([example], tokenizer, data, objective, labels)[0][0]


def encode_all(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    data: Data,
    objective: Objective,
    labels: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Encoded], DroppedReport]:
    """Encode all rows in order; rows left without a target are dropped and counted. `progress(done, total)`."""
    kept: list[Encoded] = []
    dropped: list[str] = []
    truncated = 0
    for start in range(0, len(examples), ROWS_PER_CALL):
        for row, was_cut in _encode_many(examples[start : start + ROWS_PER_CALL], tokenizer, data, objective, labels):
            truncated += was_cut
            # The first token has nothing before it to be predicted from: a row with that target alone teaches nothing.
            if row.label is None and not any(row.trainable[1:]):
                dropped.append(row.where)
            else:
                kept.append(row)
        if progress is not None:
            progress(min(start + ROWS_PER_CALL, len(examples)), len(examples))
    return kept, DroppedReport(len(examples), truncated, len(dropped), dropped[:LISTED_DROPS])


def prompt_ids(example: Example, tokenizer: Tokenizer, data: Data, objective: Objective) -> list[int]:
    """Ids that the model is asked with, not truncated.

    Chat: all before the last assistant turn, with the generation prompt. text-generation: the prompt up to the joint.
    Classification: the text with its special tokens. A document has no prompt: `DataError`.
    """
    if isinstance(example, Conversation):
        require_template(tokenizer)
        text = render(example, tokenizer, example.last_assistant, prompt=True)
        return _ids(tokenizer, text)
    if isinstance(example, PromptCompletion):
        text, joint = joined(example)
        return _with_prefix(_ids(tokenizer, text[:joint]), _prefix(tokenizer))
    if isinstance(example, Labeled):
        return list(tokenizer(example.text)["input_ids"])
    fix = "language-modeling rows have no prompt; use chat-completion or text-generation to generate"
    raise DataError("objective.task", objective.task, fix, where=example.where)


def reference_text(example: Example) -> str:
    """What the model should answer: the last assistant turn, the completion, the label or the document.

    A tool call without content is the JSON of its calls, one a line, as `{"name": ..., "arguments": ...}`.
    """
    if isinstance(example, Conversation):
        return example.messages[example.last_assistant].answer()
    if isinstance(example, PromptCompletion):
        return example.completion
    if isinstance(example, Labeled):
        return example.label
    return example.text


def joined(example: PromptCompletion) -> tuple[str, int]:
    """Prompt and completion as one text, and the character where the completion begins.

    One space is put between them where neither brings a blank of its own; spaces at the joint count as completion.
    """
    prompt, completion = example.prompt, example.completion
    apart = prompt[-1:].isspace() or completion[:1].isspace()
    return prompt + ("" if apart else " ") + completion, len(prompt.rstrip(" "))


# --- batches ---------------------------------------------------------------------------------------------------


def _encode_many(
    examples: Sequence[Example], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Each row with whether it was cut. All rows are of one kind, that of the task."""
    if not examples:
        return []
    if not tokenizer.is_fast:
        fix = "this tokenizer gives no character offsets; use a model with a tokenizer.json (a fast tokenizer)"
        raise ModelError("model.source", tokenizer.name_or_path, fix)
    if isinstance(examples[0], Labeled):
        return _labeled([row for row in examples if isinstance(row, Labeled)], tokenizer, data.max_tokens, labels)
    if isinstance(examples[0], Conversation):
        masked = encode_chats([row for row in examples if isinstance(row, Conversation)], tokenizer, objective)
    elif isinstance(examples[0], PromptCompletion):
        masked = _completions([row for row in examples if isinstance(row, PromptCompletion)], tokenizer)
    else:
        masked = _documents([row for row in examples if isinstance(row, Document)], tokenizer)
    longest = data.max_tokens
    return [
        (Encoded(ids[:longest], trainable[:longest], None, row.where), len(ids) > longest)
        for row, (ids, trainable) in zip(examples, masked, strict=True)
    ]


def _completions(rows: Sequence[PromptCompletion], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    texts, joints = zip(*map(joined, rows), strict=True)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    prefix, eos = _prefix(tokenizer), _eos(tokenizer)
    results = []
    for ids, offsets, joint in zip(encoded["input_ids"], encoded["offset_mapping"], joints, strict=True):
        n_prompt = first_token(offsets, joint)
        whole = _with_prefix(ids, prefix)
        trainable = [False] * (n_prompt + len(whole) - len(ids)) + [True] * (len(ids) - n_prompt)
        results.append(_ended(whole, trainable, eos))
    return results


def _documents(rows: Sequence[Document], tokenizer: Tokenizer) -> list[tuple[list[int], list[bool]]]:
    encoded = tokenizer([row.text for row in rows], add_special_tokens=False)
    prefix, eos = _prefix(tokenizer), _eos(tokenizer)
    results = []
    for ids in encoded["input_ids"]:
        whole = _with_prefix(ids, prefix)
        n_prefix = len(prefix) if whole[: len(prefix)] == prefix else 0
        results.append(_ended(whole, [False] * n_prefix + [True] * (len(whole) - n_prefix), eos))
    return results


def _labeled(
    rows: Sequence[Labeled], tokenizer: Tokenizer, max_tokens: int, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    index = {label: number for number, label in enumerate(labels)}
    results = []
    for row, ids in zip(rows, tokenizer([row.text for row in rows])["input_ids"], strict=True):
        if row.label not in index:
            fix = f"training never saw this label; {nearest(row.label, index)}"
            raise DataError("label", row.label, fix, where=row.where)
        is_long = len(ids) > max_tokens
        if is_long:  # cut by the tokenizer, which keeps the closing special token ([SEP]) that a plain cut would lose
            ids = tokenizer(row.text, truncation=True, max_length=max_tokens)["input_ids"]
        results.append((Encoded(list(ids), [False] * len(ids), index[row.label], row.where), is_long))
    return results


# --- special tokens --------------------------------------------------------------------------------------------


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text of its own accord (a BOS, or nothing), learned by asking it."""
    bare, dressed = _ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    return dressed[: next((n for n in range(len(dressed)) if dressed[n : n + len(bare)] == bare), 0)]


def _with_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    return ids if ids[: len(prefix)] == prefix else prefix + ids


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        fix = "the tokenizer has no eos token, so the model could not learn to stop; set eos_token in its configuration"
        raise ModelError("model.source", tokenizer.name_or_path, fix)
    return int(tokenizer.eos_token_id)


def _ended(ids: list[int], trainable: list[bool], eos: int) -> tuple[list[int], list[bool]]:
    return (ids, trainable) if ids and ids[-1] == eos else ([*ids, eos], [*trainable, True])


def prompt_text(example: Example) -> str:
    """What the model is asked, as text for people: the last user turn, the prompt, or the text."""
    if isinstance(example, Conversation):
        asked = [turn.content for turn in example.messages[: example.last_assistant] if turn.role != "assistant"]
        return asked[-1] if asked else ""
    return joined(example)[0][: joined(example)[1]] if isinstance(example, PromptCompletion) else example.text


def request_of(example: Example) -> dict[str, Any]:
    """The row as a request to an endpoint: `messages` before the last assistant turn, `input_string`, or `text`.

    A document is asked for the rest of its first eight words.
    """
    if isinstance(example, Conversation):
        return {"messages": [turn.as_dict() for turn in example.messages[: example.last_assistant]]}
    if isinstance(example, Labeled):
        return {"text": example.text}
    if isinstance(example, Document):
        return {"input_string": " ".join(example.text.split()[:8])}
    return {"input_string": prompt_text(example)}
