"""What an encoder-decoder writes about a source: summaries, translations.

Evaluation, the MLflow package (which holds a copy) and the endpoint all answer through it. Self-contained (torch and
its neighbours `inputs.py` and `kinds.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from .inputs import first_of_target
from .kinds import batches, pad_id, padded


@torch.no_grad()
def write(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    max_new_tokens: int,
    tokens_per_batch: int,
    tick: Callable[[int], None] = lambda n: None,
    *,
    num_beams: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The most likely next token, up to `max_new_tokens` times, for each of `sources`; texts in their order. With
    `num_beams` above 1 the likeliest text that a search of so many beams finds.

    `tokens_per_batch` counts the padding of sources and what may be written. What the model's own generation settings
    force (a first token, no repeats) holds here too; where they name no first token, the tokenizer's for targets does
    (NLLB: the language to write). `stopped` is asked before each token: once it is true, what is written so far is all.
    """
    forced = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
    forced = first_of_target(tokenizer) if forced is None else forced
    texts = [""] * len(sources)

    def ends(ids_BL: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.full((len(ids_BL),), stopped(), device=ids_BL.device)

    for part in batches([(len(ids) + max_new_tokens) * num_beams for ids in sources], tokens_per_batch):
        generate: Any = model.generate  # nn.Module knows nothing of it
        written = generate(
            **padded(model, [sources[index] for index in part], pad_id(tokenizer)),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            pad_token_id=pad_id(tokenizer),
            forced_bos_token_id=forced,
            stopping_criteria=StoppingCriteriaList([ends]),
        )
        for index, text in zip(part, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[index] = text.strip()
        tick(len(part))
    return texts
