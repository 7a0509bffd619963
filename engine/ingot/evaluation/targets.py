"""What an encoder-decoder writes about the test rows' sources, beside what it should have written.

B rows, S tokens of the longest source, N rows in all, K numbers per row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ingot.data.example import Example
from ingot.data.loader import microbatches
from ingot.data.targets import first_of_target, source_ids
from ingot.evaluation.measure import Tick, make_items
from ingot.evaluation.runner import Evaluation, evaluate_texts
from ingot.model.load import Tokenizer, pad_id
from ingot.recipe import Recipe


def measure_targets(
    name: str,
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    labels: tuple[str, ...],
    recipe: Recipe,
    tick: Tick,
    started: float,
) -> Evaluation:
    """Write greedily about every source, cut as in training, and score the texts."""
    items = make_items(examples, tokenizer, recipe, None)
    sources = [ids for ids, _ in source_ids([item.prompt for item in items], tokenizer, recipe.data.max_tokens)]
    section = recipe.evaluate
    texts = write(model, tokenizer, sources, section.max_new_tokens, section.tokens_per_batch, tick)
    return evaluate_texts(name, items, texts, section, recipe.objective.rows, started)


@torch.no_grad()
def write(
    model: nn.Module,
    tokenizer: Tokenizer,
    sources: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokens_per_batch: int,
    tick: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """The most likely next token, up to `max_new_tokens` times, for each of `sources`; texts in their order.

    `tokens_per_batch` counts the padding of sources and what may be written. What the model's own generation settings
    force (a first token, no repeats) holds here too; where they name no first token, the tokenizer's for targets does
    (NLLB: the language to write).
    """
    device = next(model.parameters()).device
    forced = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
    forced = first_of_target(tokenizer) if forced is None else forced
    lengths = [len(ids) + max_new_tokens for ids in sources]
    budget = max(tokens_per_batch, max(lengths, default=0))
    texts = [""] * len(sources)
    for part in microbatches([[index] for index in range(len(sources))], lengths, 0, 1, budget, flat=False):
        inputs = _padded([sources[index] for index in part], pad_id(tokenizer))
        generate: Any = model.generate  # nn.Module knows nothing of it
        written = generate(
            **{key: value.to(device) for key, value in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id(tokenizer),
            forced_bos_token_id=forced,
        )
        for index, text in zip(part, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
        tick(len(part))
    return texts


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """ids and mask [B, S] int64, padded on the right."""
    parts = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids_BS = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad)
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    return {"input_ids": ids_BS, "attention_mask": (torch.arange(ids_BS.shape[1]) < lengths_B1).long()}
