"""How a model of each task answers rows: columns of `task_schemas.py` in, its columns out.

Evaluation measures a model by the same functions (`pointing.py`, `pooling.py`, `targets.py`, `inputs.py`), and rows are
cut as in training: what was measured is what is answered. Self-contained (standard library, torch, transformers and its
neighbours): the MLflow package holds a copy.
"""

# C classes, K masks, V vocabulary, D hidden

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .embedding import embed
from .generate import context_limit
from .inputs import (
    Window,
    first_tokens,
    ids_of,
    joined_text,
    source_ids,
    spans_of,
    text_ids,
    whole_ids,
    windows_of,
    word_spans,
)
from .kinds import pad_id
from .pointing import answers_in, entities_of, logits_at, outside_of, tags_at
from .pooling import class_logits, class_probabilities
from .sampling import InputError
from .targets import write
from .task_schemas import TASKS

Record = dict[str, Any]
TOKENS_PER_BATCH = 8192
DEFAULT_NEW_TOKENS = 128
DEFAULT_WINDOW, DEFAULT_OVERLAP, DEFAULT_ANSWER_TOKENS = 384, 128, 30  # of a context, where a folder says nothing


@dataclass(frozen=True)
class Answering:
    """A model with its tokenizer, the names of its classes, and what `ingot.json` says of it. `stopped`: whether nobody
    waits for what is being written any more.
    """

    task: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    about: dict[str, Any]
    stopped: Callable[[], bool] = lambda: False

    @property
    def longest(self) -> int | None:
        """Tokens at which training cut a row."""
        found = self.about.get("max_tokens")
        return None if found is None else int(found)

    @property
    def limit(self) -> int | None:
        """Tokens that the model reaches, as far as it says so: no fewer than it was trained on."""
        positions, stated = context_limit(self.model), self.tokenizer.model_max_length
        if not positions and self.longest:  # a T5 learns longer rows than its tokenizer's settings speak of
            stated = max(stated or 0, self.longest)
        return min((n for n in (positions, stated) if n), default=None)

    def checked(self, rows: Sequence[list[int]], column: str) -> list[list[int]]:
        """The rows of ids. Raises InputError for one that is empty or longer than the model reaches."""
        for ids in rows:
            if not ids:
                raise InputError(column, f"{column}: the text holds no token")
            if self.limit is not None and len(ids) > self.limit:
                raise InputError(column, f"{column}: {len(ids)} tokens, and the model reaches {self.limit}")
        return list(rows)

    def text_ids(self, texts: Sequence[str], column: str) -> list[list[int]]:
        """Ids of each text, cut as in training."""
        return self.checked([ids for ids, _ in text_ids(texts, self.tokenizer, self.longest)], column)


def shares_of(it: Answering, texts: Sequence[str], tokens_per_batch: int = TOKENS_PER_BATCH) -> list[dict[str, float]]:
    """The probability of every label for each text."""
    rows = it.text_ids(texts, "text")
    shares = class_probabilities(it.model, rows, pad_id(it.tokenizer), tokens_per_batch)
    return [dict(zip(it.labels, row, strict=True)) for row in shares]


def _likeliest(shares: dict[str, float], count: int) -> list[Record]:
    """The first `count` labels; 0: all."""
    found = sorted(shares.items(), key=lambda item: -item[1])  # stable: of equals, the model's first one
    return [{"label": label, "probability": share} for label, share in found[: count or None]]


def _classes(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    answers = []
    for shares in shares_of(it, [row["text"] for row in rows]):
        found = _likeliest(shares, params.get("top_k", 1))
        answers.append(dict(found[0]) | ({"probabilities": found} if params.get("top_k", 1) > 1 else {}))
    return answers


def _label_sets(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    threshold = params.get("threshold", TASKS[it.task].param("threshold").default)
    return [
        {
            "labels": [label for label in it.labels if shares[label] >= threshold],
            "probabilities": _likeliest(shares, params.get("top_k", 0)),
        }
        for shares in shares_of(it, [row["text"] for row in rows])
    ]


@torch.no_grad()
def _tags(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    texts = [row["text"] if "text" in row else " ".join(row["tokens"]) for row in rows]
    words = [word_spans(row["text"]) if "text" in row else spans_of(row["tokens"]) for row in rows]
    found = first_tokens(texts, words, it.tokenizer, it.longest)
    ids = it.checked([row[0] for row in found], "text")
    best = tags_at(it.model, ids, [row[1] for row in found], pad_id(it.tokenizer), TOKENS_PER_BATCH)
    missing = outside_of(it.labels)
    answers = []
    for text, spans, tags in zip(texts, words, best, strict=True):
        names = [missing if tag is None else it.labels[tag[0]] for tag in tags]
        entities = entities_of(names, [0.0 if tag is None else tag[1] for tag in tags], spans, it.labels)
        answers.append(
            {
                "tags": names,
                "entities": [
                    {"type": e.type, "text": text[e.start : e.end], "start": e.start, "end": e.end, "score": e.score}
                    for e in entities
                ],
            }
        )
    return answers


@torch.no_grad()
def _answers(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    longest = params.get("max_answer_tokens") or int(it.about.get("max_new_tokens") or DEFAULT_ANSWER_TOKENS)
    may_be_none = {"allow": True, "forbid": False}.get(params.get("no_answer", ""), bool(it.about.get("no_answer")))
    best = answers_in(it.model, _windows(it, rows), longest, pad_id(it.tokenizer), TOKENS_PER_BATCH)
    answers = []
    for row, found in zip(rows, best, strict=True):
        if may_be_none and found.nowhere > found.score:
            answers.append({"answer": "", "score": math.exp(found.nowhere), "start": 0, "end": 0})
            continue
        text = row["context"][found.start : found.end]
        answers.append({"answer": text, "score": math.exp(found.score), "start": found.start, "end": found.end})
    return answers


def _windows(it: Answering, rows: Sequence[Record]) -> list[list[Window]]:
    """Raises InputError for a question that leaves no room for its context, and for a context without text."""
    reach = min((n for n in (it.longest, it.limit) if n), default=DEFAULT_WINDOW)
    longest = reach if it.longest else min(reach, DEFAULT_WINDOW)
    overlap = int(it.about.get("overlap_tokens") or DEFAULT_OVERLAP)
    found = windows_of([(row["question"], row["context"]) for row in rows], it.tokenizer, longest, overlap)
    if not all(found):
        raise InputError("question", f"question: too long to leave room for its context within {longest} tokens")
    if not all(any(map(any, (window.spans for window in windows))) for windows in found):
        raise InputError("context", "context: holds no text that could be an answer")
    return found


def _written(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    sources = [ids for ids, _ in source_ids([row["input_string"] for row in rows], it.tokenizer, it.longest)]
    reach = context_limit(it.model)
    own = int(it.about.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
    new = params.get("max_tokens") or (own if reach is None else min(own, reach))
    if reach is not None and new > reach:
        raise InputError("max_tokens", f"max_tokens: {new}, and the model reaches {reach}")
    texts = write(
        it.model,
        it.tokenizer,
        it.checked(sources, "input_string"),
        new,
        TOKENS_PER_BATCH,
        num_beams=params.get("num_beams", 1),
        stopped=it.stopped,
    )
    return [{"output_string": text} for text in texts]


@torch.no_grad()
def _filled(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    mask, texts = it.tokenizer.mask_token_id, [row["text"] for row in rows]
    if mask is None:
        raise InputError("model", "this model's tokenizer has no mask token: it fills no gaps")
    ids = it.text_ids(texts, "text")
    places = [[place for place, token in enumerate(row) if token == mask] for row in ids]
    for text, found in zip(texts, places, strict=True):
        if len(found) != text.count(str(it.tokenizer.mask_token)) or not found:
            beyond = f" within {it.longest} tokens" if found or str(it.tokenizer.mask_token) in text else ""
            raise InputError("text", f"text: needs the mask token {it.tokenizer.mask_token}{beyond}, once or more")
    answers: list[Record] = [{} for _ in rows]
    count = min(params.get("top_k", TASKS[it.task].param("top_k").default), len(it.tokenizer))
    for index, logits_KV in logits_at(it.model, ids, places, pad_id(it.tokenizer), TOKENS_PER_BATCH):
        answers[index] = _gaps(it, texts[index], logits_KV.softmax(-1).topk(count))
    return answers


def _gaps(it: Answering, text: str, top: Any) -> Record:
    candidates = [
        {"mask": number, "token": it.tokenizer.decode([token]).strip(), "probability": share}
        for number, (tokens, shares) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        for token, share in zip(tokens, shares, strict=True)
    ]
    best = [it.tokenizer.decode([tokens[0]]).strip() for tokens in top.indices.tolist()]
    pieces = text.split(str(it.tokenizer.mask_token))
    whole = "".join(piece + token for piece, token in zip(pieces, [*best, ""], strict=True))
    return {"output_string": whole, "tokens": best, "candidates": candidates}


def _scores(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    encoded = [answered(it, row)[: it.longest] for row in rows]
    logits = class_logits(it.model, it.checked(encoded, "text"), pad_id(it.tokenizer), TOKENS_PER_BATCH)
    return [{"score": float(logits_C[0])} for logits_C in logits]


def answered(it: Answering, row: Record) -> list[int]:
    """A prompt with its answer as ids, as `data/pairs.py` writes them for training."""
    if "messages" in row:
        try:
            text: Any = it.tokenizer.apply_chat_template(row["messages"], tokenize=False)
        except Exception as error:  # templates are programs: they raise anything, mostly jinja2's TemplateError
            raise InputError("messages", f"messages: the model's chat template refuses them: {error}") from error
        return ids_of(it.tokenizer, text)
    if "text" in row:
        return answer_ids(it.tokenizer, None, row["text"])
    return answer_ids(it.tokenizer, row["prompt"], row["completion"])


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | None, completion: str) -> list[int]:
    """An answer behind its prompt, as a reward model reads it. Encoders end no text of their own accord: where the
    tokenizer has no eos, prompt and answer are the two texts that it knows apart.
    """
    if tokenizer.eos_token_id is None:
        return list(tokenizer(*([completion] if prompt is None else [prompt, completion]))["input_ids"])
    return whole_ids(tokenizer, completion if prompt is None else joined_text(prompt, completion)[0])


def vectors(it: Answering, texts: Sequence[str], pooling: str | None = None, normalize: bool = True) -> torch.Tensor:
    """[texts, D] float32. `pooling` mean, first or last; None: `embedding` of ingot.json, else mean."""
    rows = it.text_ids(texts, "text")
    way = pooling or str(it.about.get("embedding") or "mean")
    found = embed(it.model, rows, pad_id(it.tokenizer), way, TOKENS_PER_BATCH)
    vectors_ND = torch.stack(found) if found else torch.empty(0, 0)
    return nn.functional.normalize(vectors_ND, dim=-1) if normalize else vectors_ND


def _embeddings(it: Answering, rows: Sequence[Record], params: Record) -> list[Record]:
    normalize = params.get("normalize", True)
    vectors_ND = vectors(it, [row["text"] for row in rows], params.get("pooling"), normalize)
    if kept := params.get("dimensions"):
        if kept > vectors_ND.shape[-1]:
            raise InputError("dimensions", f"dimensions: {kept}, and the model's vectors have {vectors_ND.shape[-1]}")
        vectors_ND = vectors_ND[:, :kept]
        vectors_ND = nn.functional.normalize(vectors_ND, dim=-1) if normalize else vectors_ND
    return [{"embedding": vector} for vector in vectors_ND.tolist()]


# Tasks whose model reads a row once; what writes from left to right is `Runtime`'s own.
ANSWERS: dict[str, Callable[[Answering, Sequence[Record], Record], list[Record]]] = {
    "text-classification": _classes,
    "multi-label-classification": _label_sets,
    "token-classification": _tags,
    "question-answering": _answers,
    "summarization": _written,
    "translation": _written,
    "fill-mask": _filled,
    "reward": _scores,
    "embeddings": _embeddings,
}
