"""A text classifier on the mean of an encoder's last hidden states.

Self-contained (torch, safetensors and transformers only): the packager copies this file into the MLflow model.
"""

# B batch, T tokens, D hidden, C classes

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

CLASSIFIER_FILE = "classifier.safetensors"


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids and attention_mask [B, T] int64 -> logits [B, C] float32. The mean is taken in float32."""
        hidden_BTD = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BT1 = attention_mask.unsqueeze(-1).float()
        mean_BD = (hidden_BTD.float() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1.0)
        return self.classifier(mean_BD.to(self.classifier.weight.dtype)).float()

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
