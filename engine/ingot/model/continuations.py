"""Texts to the token ids that are scored, cut where lm-evaluation-harness cuts them."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from ingot.errors import DataError, ModelError
from ingot.model.score import Group


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands in front of a text without context: BOS, else EOS. Raises ModelError when there is neither."""
    found = next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), None)
    if found is None:
        raise ModelError("tokenizer", tokenizer.name_or_path, "it names neither a BOS nor an EOS token; add one")
    return int(found)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    """The ids of each different text, with the tokenizer's own special tokens; of one that starts with the written
    prefix token, without them: so BOS is there once.
    """
    unique = list(dict.fromkeys(texts))
    start = str(tokenizer.decode([prefix_id(tokenizer)]))
    found: dict[str, list[int]] = {}
    for dressed in (True, False):
        part = [text for text in unique if text.startswith(start) is not dressed]
        if part:
            ids = tokenizer(part, add_special_tokens=dressed, verbose=False)["input_ids"]
            found.update(zip(part, map(list, ids), strict=True))
    return found


def encode_groups(tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, Sequence[str]]]) -> list[Group]:
    """A group of token ids for each (context, continuations).

    White space at a context's end belongs to its continuations. Context and continuation are encoded as one text, which
    is cut behind as many tokens as the context has by itself; each context is encoded once. In place of an empty
    context stands `prefix_id`. Raises DataError for a continuation that is left without a token.
    """
    bare = [context.rstrip() for context, _ in asked]
    wholes = [[context + one for one in ones] if context else [] for context, ones in asked]
    ids = encode_texts(tokenizer, [*filter(None, bare), *(text for texts in wholes for text in texts)])
    first = prefix_id(tokenizer)
    alone = [one for context, continuations in asked if not context for one in continuations]
    alone_ids = iter(tokenizer(alone, add_special_tokens=False, verbose=False)["input_ids"] if alone else [])
    groups = []
    for (context, continuations), start, texts in zip(asked, bare, wholes, strict=True):
        if context:
            head = ids[start] if start else encode_texts(tokenizer, [""])[""]
            tails = [ids[text][len(head) :] for text in texts]
        else:
            head, tails = [], [list(next(alone_ids)) for _ in continuations]
        if not head:
            head, tails = [first], [tail[1:] if tail[:1] == [first] else tail for tail in tails]
        for tail, one in zip(tails, continuations, strict=True):
            if not tail:
                raise DataError("continuation", one, "it adds no token to its context; remove it")
        groups.append(Group(head, tails))
    return groups
