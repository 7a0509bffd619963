"""Text classification: a classifier on the mean of an encoder's last hidden states, and class probabilities of any.

Self-contained (torch, safetensors, transformers and its neighbour `kinds.py`): the MLflow package holds a copy.
"""

# B batch, T tokens (of a row, or of a line of rows end to end), N rows of a line, D hidden, C classes

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from .folder import CLASSIFIER_FILE
from .kinds import batches, logits_of, padded


class MeanPoolClassifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, and one linear layer to the class logits."""

    def __init__(self, backbone: PreTrainedModel, n_labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.get_text_config().hidden_size, n_labels)
        std = getattr(backbone.config.get_text_config(), "initializer_range", 0.02)
        nn.init.normal_(self.classifier.weight, std=std)
        nn.init.zeros_(self.classifier.bias)
        self.classifier.to(backbone.dtype)

    @property
    def config(self):  # type: ignore[no-untyped-def]
        """The encoder's configuration; `id2label` names the classes."""
        return self.backbone.config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Any = None,
    ) -> Tensor:
        """Logits float32; the mean is taken in float32.

        Rows: input_ids and attention_mask [B, T] int64 -> [B, C]. A line of rows end to end: input_ids and position_ids
        (which start again at 0 with every row) [1, T] int64 and `documents`, where they begin and end -> [N, C].
        """
        if documents is None:
            assert attention_mask is not None
            hidden_BTD = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask_BT1 = attention_mask.unsqueeze(-1).float()
            mean_BD = (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)
            return self.classifier(mean_BD.to(self.classifier.weight.dtype)).float()
        assert position_ids is not None
        inputs = {"attention_mask": attention_mask, "documents": documents}
        positions_BT = position_ids + self._first_position
        hidden_TD = self.backbone(input_ids=input_ids, position_ids=positions_BT, **inputs).last_hidden_state[0]
        sums_ND = hidden_TD.new_zeros(len(documents.lengths), hidden_TD.shape[1], dtype=torch.float32)
        sums_ND = sums_ND.index_add(0, documents.ids, hidden_TD.float())
        mean_ND = sums_ND / documents.bounds.diff().unsqueeze(-1)
        return self.classifier(mean_ND.to(self.classifier.weight.dtype)).float()

    @property
    def _first_position(self) -> int:
        """What the encoder calls the first token of a row: RoBERTa and its kin count on from the padding id."""
        embeddings = getattr(self.backbone, "embeddings", None)
        counts_on = hasattr(embeddings, "create_position_ids_from_inputs_embeds")
        return int(embeddings.padding_idx) + 1 if counts_on else 0  # type: ignore[union-attr]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the encoder as a Hugging Face folder with `classifier.safetensors` {weight [C, D], bias [C]} in it."""
        self.backbone.save_pretrained(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.classifier.state_dict().items()}
        save_file(tensors, Path(folder) / CLASSIFIER_FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | str = torch.float32) -> "MeanPoolClassifier":
        """Read what `save_pretrained` wrote, from local safetensors only. `dtype` "auto": as saved."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = MODEL_MAPPING[type(config)]
        # The pooler is not on the path of mean pooling and was not saved: asking for none avoids drawing a random one.
        options = {"add_pooling_layer": False} if "add_pooling_layer" in kind.__init__.__code__.co_varnames else {}
        backbone = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=dtype,
            **options,
        )
        tensors = load_file(Path(folder) / CLASSIFIER_FILE)
        model = cls(backbone, tensors["weight"].shape[0])
        model.classifier.load_state_dict(tensors)
        return model.eval()


def class_probabilities(
    model: nn.Module,
    rows: Sequence[list[int]],
    pad_id: int,
    tokens_per_batch: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[list[float]]:
    """Token ids of each text -> probabilities [C] of each, in input order. Where a text may have several classes
    (`problem_type` of the configuration), each is by itself. Batches as in `class_logits`.
    """
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"  # type: ignore[union-attr]
    found = class_logits(model, rows, pad_id, tokens_per_batch, progress)
    return [(logits_C.sigmoid() if several else logits_C.softmax(-1)).tolist() for logits_C in found]


@torch.no_grad()  # not inference_mode: the model may go on training
def class_logits(
    model: nn.Module,
    rows: Sequence[list[int]],
    pad_id: int,
    tokens_per_batch: int,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Tensor]:
    """Token ids of each text -> logits [C] float32 of each, in input order.

    Batches hold texts of similar length, at most `tokens_per_batch` tokens counting padding (at least one text).
    `progress` gets the number of texts that each batch finished.
    """
    configured = getattr(model.config, "pad_token_id", None)  # type: ignore[union-attr]
    # Decoders find the last token by comparing with the configured padding id; without one they take single rows.
    single = configured is None and not isinstance(model, MeanPoolClassifier)
    pad_id = pad_id if configured is None else configured
    found = [torch.empty(0)] * len(rows)
    for part in batches([len(row) for row in rows], 1 if single else tokens_per_batch):
        output = model(**padded(model, [rows[index] for index in part], pad_id))
        for index, logits_C in zip(part, logits_of(output).cpu(), strict=True):
            found[index] = logits_C
        progress(len(part))
    return found
