"""Texts to write -> ids and mask: prompt and completion, documents.

text-generation: prompt and completion are joined (`joined`), encoded as one text, and parted by character offsets.
A token belongs to the completion when it starts at or after the joint, and spaces at the joint belong to the
completion, because tokenizers glue a space to the word behind it. `template.prompt_ids` ends at the same joint, so the
model is asked with exactly the tokens it was trained behind.
"""

from collections.abc import Sequence

from ingot.data.conversation import Document, PromptCompletion
from ingot.data.encoded import ended, eos_of
from ingot.data.turns import Masked, Tokenizer, first_token
from ingot.model.inputs import joined_text, prefix_of, with_prefix


def joined(example: PromptCompletion) -> tuple[str, int]:
    """`joined_text` of the row."""
    return joined_text(example.prompt, example.completion)


def completions(rows: Sequence[PromptCompletion], tokenizer: Tokenizer) -> list[Masked]:
    texts, joints = zip(*map(joined, rows), strict=True)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    prefix, eos = prefix_of(tokenizer), eos_of(tokenizer)
    results = []
    for ids, offsets, joint in zip(encoded["input_ids"], encoded["offset_mapping"], joints, strict=True):
        n_prompt = first_token(offsets, joint)
        whole = with_prefix(ids, prefix)
        trainable = [False] * (n_prompt + len(whole) - len(ids)) + [True] * (len(ids) - n_prompt)
        results.append(ended(whole, trainable, eos))
    return results


def documents(rows: Sequence[Document], tokenizer: Tokenizer) -> list[Masked]:
    encoded = tokenizer([row.text for row in rows], add_special_tokens=False)
    prefix, eos = prefix_of(tokenizer), eos_of(tokenizer)
    results = []
    for ids in encoded["input_ids"]:
        whole = with_prefix(ids, prefix)
        n_prefix = len(prefix) if whole[: len(prefix)] == prefix else 0
        results.append(ended(whole, [False] * n_prefix + [True] * (len(whole) - n_prefix), eos))
    return results
