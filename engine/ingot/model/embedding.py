"""Vectors of texts: hidden states of a model's last layer, pooled.

Self-contained (torch and its neighbours `kinds.py` and `pooling.py`): the MLflow package holds a copy.
"""

# B rows, T tokens, D hidden

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kinds import batches, padded
from .pooling import MeanPoolClassifier


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a model that ends in hidden states; of an encoder-decoder its encoder."""
    if isinstance(model, MeanPoolClassifier):
        return model.backbone
    if getattr(model.config, "is_encoder_decoder", False):  # type: ignore[union-attr]
        encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
        return encoder
    inner: nn.Module = getattr(model, "base_model", model)
    return inner


@torch.no_grad()
def embed(
    model: nn.Module, rows: Sequence[Sequence[int]], pad: int, pooling: str, tokens_per_batch: int
) -> list[Tensor]:
    """The vector [D] float32, on the CPU, of each row of ids. `pooling`: the mean of its tokens' hidden states, the
    first one's or the last one's.
    """
    backbone, found = backbone_of(model), [torch.empty(0)] * len(rows)
    for part in batches([len(row) for row in rows], tokens_per_batch):
        inputs = padded(model, [rows[index] for index in part], pad)
        hidden_BTD = backbone(**inputs).last_hidden_state
        for index, vector_D in zip(part, _pooled(hidden_BTD, inputs["attention_mask"], pooling), strict=True):
            found[index] = vector_D.cpu()
    return found


def _pooled(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """[B, D] float32."""
    if pooling == "first":
        return hidden_BTD[:, 0].float()
    if pooling == "last":
        rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        return hidden_BTD[rows, mask_BT.sum(1) - 1].float()
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    return (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
