"""The mean-pooling classifier: padding does not count, and what is saved is what is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, RobertaConfig, RobertaModel

from ingot.model.attention import implementation
from ingot.model.documents import Documents
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


def _roberta() -> MeanPoolClassifier:
    torch.manual_seed(0)
    config = RobertaConfig(**{**SIZES, "pad_token_id": 1}, max_position_embeddings=32)
    return MeanPoolClassifier(RobertaModel(config, add_pooling_layer=False), 3).eval()


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


LENGTHS = (7, 1, 4, 7)


def _line(model: MeanPoolClassifier, ids_BT: torch.Tensor) -> torch.Tensor:
    documents = Documents.of(LENGTHS, torch.device("cpu"))
    positions_BT = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return model(ids_BT, documents.mask, positions_BT, documents)


@pytest.mark.parametrize("make", [_bert, _modern, _roberta])
def test_rows_of_a_line_get_what_they_get_padded(make: Any) -> None:
    """Logits and the gradient of every weight."""
    model = make()
    torch.nn.init.normal_(model.classifier.bias)
    ids_BT = torch.randint(5, 50, (1, sum(LENGTHS)))
    rows = ids_BT.split(LENGTHS, dim=1)
    pad_id = model.config.pad_token_id
    padded_BT = torch.cat([torch.nn.functional.pad(row, (0, 7 - row.shape[1]), value=pad_id) for row in rows])
    mask_BT = (torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    gradients, weights_NC = [], torch.randn(4, 3)
    for implement, answer in (
        ("sdpa", lambda: model(padded_BT, mask_BT)),
        (implementation("sdpa"), lambda: _line(model, ids_BT)),
    ):
        model.backbone.set_attn_implementation(implement)
        logits_NC = answer()
        assert logits_NC.dtype == torch.float32
        gradients.append([logits_NC, *torch.autograd.grad((logits_NC * weights_NC).sum(), list(model.parameters()))])
    for padded, line in zip(*gradients, strict=True):
        torch.testing.assert_close(line, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [_bert, _modern, _roberta])
def test_no_gradient_crosses_the_rows_of_a_line(make: Any) -> None:
    model, embedded = make(), []
    model.backbone.set_attn_implementation(implementation("sdpa"))
    model.backbone.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output)
    )
    logits_NC = _line(model, torch.randint(5, 50, (1, sum(LENGTHS))))
    start = 0
    for row, length in enumerate(LENGTHS):
        [gradient] = torch.autograd.grad(logits_NC[row].square().sum(), embedded[0], retain_graph=True)
        own = slice(start, start + length)
        assert gradient[0, own].abs().sum() > 0
        gradient[0, own] = 0
        assert gradient.abs().max() == 0
        start += length


def test_the_mean_of_a_line_is_taken_in_float32() -> None:
    model = _bert().to(torch.bfloat16)
    model.backbone.set_attn_implementation(implementation("sdpa"))
    ids_BT = torch.randint(5, 50, (1, sum(LENGTHS)))
    found: list[torch.Tensor] = []
    model.classifier.register_forward_hook(lambda _module, inputs, _output: found.append(inputs[0]))
    states: list[torch.Tensor] = []
    model.backbone.register_forward_hook(lambda _module, _inputs, output: states.append(output.last_hidden_state[0]))
    _line(model, ids_BT)
    means_ND = torch.stack([part.float().mean(0) for part in states[0].split(LENGTHS)])
    torch.testing.assert_close(found[0], means_ND.to(torch.bfloat16), rtol=0, atol=0)
