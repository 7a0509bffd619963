"""How likely a prompt's own tokens are, in the form of OpenAI's completions: echo with logprobs and max_tokens 0."""

# T tokens, V vocabulary

from typing import Any

import torch
from torch import Tensor

from ingot.model.generate import context_limit
from ingot.model.runtime import WRITING, Runtime
from ingot.model.sampling import InputError

ROWS = 256  # of the logits at a time in float32


@torch.inference_mode()
def echoed(runtime: Runtime, text: str) -> dict[str, Any]:
    """OpenAI's `logprobs` of `text`: `tokens`, `text_offset`, `token_logprobs` in nats and `top_logprobs` (the token
    itself and the likeliest there); None for the first token. Special tokens stand before it as the tokenizer has them,
    once.

    Raises InputError for a model that writes no text, an empty prompt, and one longer than the model's context.
    """
    if runtime.task not in WRITING:
        raise InputError("model", f"this model is for {runtime.task}: it does not write text")
    tokenizer, begins = runtime.tokenizer, runtime.tokenizer.bos_token or runtime.tokenizer.eos_token
    dressed = not (begins and text.startswith(str(begins)))
    coded = tokenizer(text, add_special_tokens=dressed, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids, limit = list(coded["input_ids"]), context_limit(runtime.model)
    if not ids:
        raise InputError("prompt", "the prompt holds no token")
    if limit is not None and len(ids) > limit:
        raise InputError("prompt", f"{len(ids)} prompt tokens: the model reaches {limit}")
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    places = coded["offset_mapping"] if tokenizer.is_fast else [(0, 0)] * len(ids)
    tokens = [text[a:b] if b > a else name for name, (a, b) in zip(names, places, strict=True)]
    ids_T = torch.tensor(ids, device=next(runtime.model.parameters()).device)
    own, best, best_ids = _told(runtime.model(input_ids=ids_T[None], use_cache=False).logits[0, :-1], ids_T[1:])
    # The likeliest last: where two tokens read the same, its number stays.
    tops = [
        {tokenizer.decode([top]): most} if most == it else {token: it, tokenizer.decode([top]): most}
        for top, most, token, it in zip(best_ids, best, tokens[1:], own, strict=True)
    ]
    return {
        "tokens": tokens,
        "text_offset": [a for a, _ in places],
        "token_logprobs": [None, *own],
        "top_logprobs": [None, *tops],
    }


def _told(logits_TV: Tensor, ids_T: Tensor) -> tuple[list[float], list[float], list[int]]:
    """Of each token: its log-probability, the largest, and whose that is."""
    own: list[float] = []
    best: list[float] = []
    best_ids: list[int] = []
    for start in range(0, len(ids_T), ROWS):
        logprobs_TV = logits_TV[start : start + ROWS].float().log_softmax(-1)
        own += logprobs_TV.gather(-1, ids_T[start : start + ROWS, None]).squeeze(-1).tolist()
        top = logprobs_TV.max(-1)
        best += top.values.tolist()
        best_ids += top.indices.tolist()
    return own, best, best_ids
