"""Which model does a task, and what all of these models take and return.

Self-contained (standard library, torch, transformers): the MLflow package holds a copy.
"""

# B rows, T tokens

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)

# What reads a task's model; the others write text from left to right.
KINDS: dict[str, Any] = {
    "summarization": AutoModelForSeq2SeqLM,
    "translation": AutoModelForSeq2SeqLM,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "fill-mask": AutoModelForMaskedLM,
}
POOLED = ("text-classification", "multi-label-classification", "reward")  # an output for a whole row


def knows_segments(model: nn.Module) -> bool:
    """Whether the model is told a first segment of a row from a second one (`token_type_ids`)."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)  # peft's wrapper takes anything and hides the names
    base: Any = unwrap()
    kinds = getattr(base.config, "type_vocab_size", 2)
    return kinds > 1 and "token_type_ids" in inspect.signature(base.forward).parameters


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up batches. Padding is masked by position, so eos or 0 will do where there is no pad token."""
    found = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return int(found)  # type: ignore[arg-type]


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model's forward returned, as float32. Of an answer's place [B, T, 2]."""
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits, output.end_logits], dim=-1).float()
    return (output if isinstance(output, Tensor) else output.logits).float()


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of the rows of each padded batch, at most `tokens` tokens counting padding (at least one row); long rows
    first.
    """
    waiting = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    while waiting:
        size = max(1, tokens // max(1, lengths[waiting[0]]))
        yield waiting[:size]
        waiting = waiting[size:]


def padded(
    model: nn.Module, rows: Sequence[Sequence[int]], pad: int, parts: Sequence[tuple[int, ...]] = ()
) -> dict[str, Tensor]:
    """Rows of ids as forward arguments [B, T] int64 on the model's device, padded on the right. `parts`: tokens of each
    row's first and second segment; all must have them, and the model know them, to be told.
    """
    shape = (len(rows), max(map(len, rows)))
    ids_BT, mask_BT = torch.full(shape, pad, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)], mask_BT[number, : len(row)] = torch.as_tensor(row, dtype=torch.long), 1
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if parts and all(parts) and knows_segments(model):
        types_BT = torch.zeros(shape, dtype=torch.long)
        for number, (row, lengths) in enumerate(zip(rows, parts, strict=True)):
            types_BT[number, lengths[0] : len(row)] = 1
        inputs["token_type_ids"] = types_BT
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}
