"""The mean-pooling classifier: padding does not count, and what is saved is what is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from ingot.model.pooling import CLASSIFIER_FILE, MeanPoolClassifier, class_probabilities

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
}
SPECIALS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _bert() -> MeanPoolClassifier:
    torch.manual_seed(0)
    return MeanPoolClassifier(BertModel(BertConfig(**SIZES), add_pooling_layer=False), 3).eval()


def _modern() -> MeanPoolClassifier:
    torch.manual_seed(0)
    return MeanPoolClassifier(ModernBertModel(ModernBertConfig(**SIZES, **SPECIALS)), 3).eval()


def test_padding_changes_nothing() -> None:
    model, ids_BT = _bert(), torch.randint(5, 50, (1, 7))
    padded_BT = torch.nn.functional.pad(ids_BT, (0, 4))
    mask_BT = (torch.arange(11) < 7).long().unsqueeze(0)
    torch.testing.assert_close(model(padded_BT, mask_BT), model(ids_BT, torch.ones_like(ids_BT)))


def test_logits_are_the_head_on_the_mean_state() -> None:
    model, ids_BT = _bert(), torch.randint(5, 50, (2, 7))
    mask_BT = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    hidden_BTD = model.backbone(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    mean_BD = torch.stack([hidden_BTD[0].mean(0), hidden_BTD[1, :4].mean(0)])
    torch.testing.assert_close(model(ids_BT, mask_BT), mean_BD @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize("make", [_bert, _modern])
def test_a_saved_model_answers_the_same(make: Any, tmp_path: Path) -> None:
    model, ids_BT = make(), torch.randint(5, 50, (2, 7))
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path)
    again = MeanPoolClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(ids_BT, torch.ones_like(ids_BT)), model(ids_BT, torch.ones_like(ids_BT)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", CLASSIFIER_FILE}
    assert not again.training


def test_bfloat16_weights_give_float32_logits(tmp_path: Path) -> None:
    _bert().to(torch.bfloat16).save_pretrained(tmp_path)
    model = MeanPoolClassifier.from_pretrained(tmp_path, dtype="auto")
    assert model.backbone.dtype == model.classifier.weight.dtype == torch.bfloat16
    ids_BT = torch.randint(5, 50, (2, 7))
    assert model(ids_BT, torch.ones_like(ids_BT)).dtype == torch.float32


def test_probabilities_come_in_input_order_whatever_the_batches() -> None:
    model = _bert()
    rows = [torch.randint(5, 50, (n,)).tolist() for n in (3, 9, 1, 6)]
    many = class_probabilities(model, rows, 0, 1000)
    few = class_probabilities(model, rows, 0, 1)
    for row, one, other in zip(rows, many, few, strict=True):
        ids_BT = torch.tensor([row])
        alone = torch.softmax(model(ids_BT, torch.ones_like(ids_BT)), -1)[0].tolist()
        assert one == pytest.approx(alone, abs=1e-6)
        assert other == pytest.approx(alone, abs=1e-6)
