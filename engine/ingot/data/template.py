"""Examples to token ids and the mask of what is learned. Special tokens are encoded exactly once.

Masks are by position, never by id: a tokenizer whose pad token is its eos token still learns to stop.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingot.data.conversation import Conversation, Document, PromptCompletion, SourceTarget
from ingot.data.encoded import Encoded as Encoded
from ingot.data.example import Example
from ingot.data.labeled import Asked, Labeled, MultiLabeled, Tagged
from ingot.data.preference import Preference
from ingot.data.texts import completions, documents, joined
from ingot.data.turns import Masked, Tokenizer, encode_chats, render, require_template
from ingot.errors import DataError, ModelError
from ingot.model.inputs import ids_of, prefix_of, with_prefix
from ingot.recipe import Data, Objective
from ingot.registry import resolve

ROWS_PER_CALL = 1000  # a fast tokenizer wants long lists; progress wants to be told now and then
LISTED_DROPS = 20
# Kind of rows -> encoder: (examples, tokenizer, data, objective, labels) -> each row, and whether it was cut.
ENCODERS = {
    "chat-completion": "ingot.data.template:masked",
    "text-generation": "ingot.data.template:masked",
    "language-modeling": "ingot.data.template:masked",
    "preference": "ingot.data.pairs:preferences",
    "summarization": "ingot.data.targets:source_targets",
    "translation": "ingot.data.targets:source_targets",
    "text-classification": "ingot.data.labels:labeled",
    "multi-label-classification": "ingot.data.labels:multi_labeled",
    "token-classification": "ingot.data.labels:tagged",
    "question-answering": "ingot.data.spans:asked",
    "fill-mask": "ingot.data.masking:maskable",
}


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
            if row.labels is None and not row.n_targets:
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
    if isinstance(example, Preference):
        example = example.chosen
    if isinstance(example, Conversation):
        require_template(tokenizer)
        text = render(example, tokenizer, example.last_assistant, prompt=True)
        return ids_of(tokenizer, text)
    if isinstance(example, PromptCompletion):
        text, joint = joined(example)
        return with_prefix(ids_of(tokenizer, text[:joint]), prefix_of(tokenizer))
    if isinstance(example, SourceTarget):
        return list(tokenizer(example.source)["input_ids"])
    if isinstance(example, Labeled | MultiLabeled):
        return list(tokenizer(example.text)["input_ids"])
    fix = f"{objective.loss} rows have no prompt; use chat-completion or text-generation to generate"
    raise DataError("objective.task", objective.task, fix, where=example.where)


def reference_text(example: Example) -> str:
    """What the model should answer: the last assistant turn, the completion, the target, the label, the labels as JSON,
    the tags with blanks between them, the first right answer, the document; of two answers the preferred one.

    A tool call without content is the JSON of its calls, one a line, as `{"name": ..., "arguments": ...}`.
    """
    if isinstance(example, Preference):
        example = example.chosen
    if isinstance(example, Conversation):
        return example.messages[example.last_assistant].answer()
    if isinstance(example, PromptCompletion):
        return example.completion
    if isinstance(example, SourceTarget):
        return example.target
    if isinstance(example, Labeled):
        return example.label
    if isinstance(example, MultiLabeled):
        return json.dumps(example.labels, ensure_ascii=False)
    if isinstance(example, Tagged):
        return " ".join(example.tags)
    if isinstance(example, Asked):
        return example.answers[0][0] if example.answers else ""
    return example.text


def _encode_many(
    examples: Sequence[Example], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Each row with whether it was cut. All rows are of one kind, that of the objective."""
    if not examples:
        return []
    if not tokenizer.is_fast:
        fix = "this tokenizer gives no character offsets; use a model with a tokenizer.json (a fast tokenizer)"
        raise ModelError("model.source", tokenizer.name_or_path, fix)
    encoder = resolve(ENCODERS, "objective.task", objective.rows)
    found: list[tuple[Encoded, bool]] = encoder(examples, tokenizer, data, objective, labels)
    return found


def masked(
    examples: Sequence[Example], tokenizer: Tokenizer, data: Data, objective: Objective, labels: Sequence[str]
) -> list[tuple[Encoded, bool]]:
    """Texts of which some tokens are learned; what is over `data.max_tokens` loses its end."""
    longest = data.max_tokens
    pairs = zip(examples, masks(examples, tokenizer, objective), strict=True)
    return [
        (Encoded(ids[:longest], trainable[:longest], None, row.where), len(ids) > longest)
        for row, (ids, trainable) in pairs
    ]


def masks(examples: Sequence[Example], tokenizer: Tokenizer, objective: Objective) -> list[Masked]:
    """Ids and mask of conversations, prompts with completions, or documents; all of one kind."""
    if isinstance(examples[0], Conversation):
        return encode_chats([row for row in examples if isinstance(row, Conversation)], tokenizer, objective)
    if isinstance(examples[0], PromptCompletion):
        return completions([row for row in examples if isinstance(row, PromptCompletion)], tokenizer)
    return documents([row for row in examples if isinstance(row, Document)], tokenizer)


def prompt_text(example: Example) -> str:
    """What the model is asked, as text for people: the last user turn, the prompt, the source, or the text."""
    if isinstance(example, Preference):
        example = example.chosen
    if isinstance(example, Conversation):
        asked = [turn.content for turn in example.messages[: example.last_assistant] if turn.role != "assistant"]
        return asked[-1] if asked else ""
    if isinstance(example, SourceTarget):
        return example.source
    if isinstance(example, Asked):
        return f"{example.question}\n{example.context}"
    return joined(example)[0][: joined(example)[1]] if isinstance(example, PromptCompletion) else example.text


def _judged(answer: Conversation | PromptCompletion | Document) -> dict[str, Any]:
    if isinstance(answer, Conversation):
        return {"messages": [turn.as_dict() for turn in answer.messages]}
    if isinstance(answer, PromptCompletion):
        return {"prompt": answer.prompt, "completion": answer.completion}
    return {"text": answer.text}


def request_of(example: Example, task: str, tokenizer: Tokenizer = None) -> dict[str, Any]:
    """The row as a request to a model of `task`, in columns of model/task_schemas.py: an answered conversation for
    reward, one without its last answer elsewhere.

    A document is asked for the rest of its first eight words; with gaps to fill, for the middle one, in whose place the
    tokenizer's mask token stands.
    """
    if isinstance(example, Preference):
        example = example.chosen
        if task == "reward":
            return _judged(example)
    if isinstance(example, Conversation):
        return {"messages": [turn.as_dict() for turn in example.messages[: example.last_assistant]]}
    if isinstance(example, Tagged) and tuple(example.text.split()) != example.words:
        return {"tokens": list(example.words)}
    if isinstance(example, Labeled | MultiLabeled | Tagged):
        return {"text": example.text}
    if isinstance(example, Asked):
        return {"question": example.question, "context": example.context}
    if isinstance(example, Document):
        words = example.text.split()[:8]
        if task != "fill-mask":
            return {"input_string": " ".join(words)}
        words[len(words) // 2 : len(words) // 2 + 1] = [tokenizer.mask_token]
        return {"text": " ".join(words)}
    return {"input_string": prompt_text(example)}
