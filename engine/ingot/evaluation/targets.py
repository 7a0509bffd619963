"""What an encoder-decoder writes about the test rows' sources, beside what it should have written."""

from collections.abc import Sequence

from ingot.evaluation.measure import How, Kind, read_texts
from ingot.evaluation.samples import Item, Output
from ingot.evaluation.subject import Local
from ingot.model.inputs import source_ids
from ingot.model.targets import write


def _answer_targets(local: Local, items: Sequence[Item], how: How) -> list[Output]:
    """Write greedily about every source, cut as in training."""
    recipe, section = how.recipe, how.recipe.evaluate
    sources = [ids for ids, _ in source_ids([it.prompt for it in items], local.tokenizer, recipe.data.max_tokens)]
    texts = write(local.model, local.tokenizer, sources, section.max_new_tokens, section.tokens_per_batch)
    return [
        {"text": text, "n_prompt_tokens": len(ids), "engine": local.engine}
        for text, ids in zip(texts, sources, strict=True)
    ]


TARGETS = Kind(_answer_targets, read_texts)
