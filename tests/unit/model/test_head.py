"""A head that answers gives the loss and gradients of the model's own logits; one that cannot says why."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from ingot.model.adapters import attach_adapter
from ingot.model.head import SCALES, Form, asked, attach, detach, fused_head, trial
from ingot.model.kinds import KINDS, logits_of
from ingot.recipe import Adapter
from ingot_kernels.linear_cross_entropy import IGNORE, linear_cross_entropy

WORDS = 97
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
ENCODER = {**WIDE, "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4}
# kind -> (task, configuration, form of its head)
FAMILIES: dict[str, tuple[str, dict[str, Any], Form]] = {
    "llama": ("language-modeling", {"tie_word_embeddings": True}, Form()),
    "qwen3": ("language-modeling", {}, Form()),
    "gemma2": ("language-modeling", {"final_logit_softcapping": 3.0}, Form(softcap=3.0)),
    "granite": ("language-modeling", {"logits_scaling": 4.0}, Form(0.25)),
    "cohere2": ("language-modeling", {"logit_scale": 0.3}, Form(0.3)),
    "gpt2": ("language-modeling", {}, Form()),
    "phi": ("language-modeling", {}, Form()),  # the head has a bias
    "bert": ("fill-mask", {}, Form()),
    "modernbert": ("fill-mask", {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, Form()),
    "t5": ("summarization", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, Form()),
    "bart": ("summarization", ENCODER, Form()),  # adds a buffer to its logits
}
CLOSE = 1e-5


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    task, own, _ = FAMILIES[kind]
    config = AutoConfig.for_model(kind, **{**SHAPE, **own, **changes})
    model = KINDS.get(task, AutoModelForCausalLM).from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits of a size that a cap shows in
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_()
    return model


def inputs_for(model: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, WORDS, (2, 7), generator=draw)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    return inputs | ({"decoder_input_ids": ids_BT.flip(1)} if model.config.is_encoder_decoder else {})


def targets() -> Tensor:
    """int64 [2, 7]; another number in each row."""
    targets_BT = torch.randint(3, WORDS, (2, 7), generator=torch.Generator().manual_seed(2))
    targets_BT[0, :3] = targets_BT[1, 2:4] = IGNORE
    return targets_BT


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def from_logits(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    logits_NV = logits_of(model(**inputs_for(model))).flatten(0, 1)
    loss = F.cross_entropy(logits_NV, targets().flatten(), reduction="sum")
    return loss.detach(), gradients(model, loss)


def from_head(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    targets_N = targets().flatten()
    fused = fused_head(model)
    assert fused is not None
    rows_M = (targets_N != IGNORE).nonzero().squeeze(1)
    with asked(fused, lambda hidden, head: linear_cross_entropy(hidden, head, targets_N, rows_M=rows_M)) as question:
        output = model(**inputs_for(model))
    assert output.logits.shape == (2, 7, 1)
    loss = question.answer(output)
    return loss.detach(), gradients(model, loss)


def same(model: nn.Module) -> None:
    """The head that answers, beside the model's logits when it is not asked: loss and every gradient."""
    (loss, expected), (fused, found) = from_logits(model), from_head(model)
    assert fused.item() == pytest.approx(loss.item(), rel=CLOSE)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=CLOSE * scale, msg=name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gives_the_loss_and_gradients_of_the_logits(kind: str) -> None:
    model = model_of(kind)
    assert attach(model, "auto") == (1, None)
    assert fused_head(model).form == FAMILIES[kind][2]
    same(model)


@pytest.mark.parametrize("wrong", [Form(0.25, 3.0), Form(0.5), Form(0.25, 50.0)])
def test_another_form_is_noticed(wrong: Form) -> None:
    model = model_of("granite")
    attach(model, "auto")
    fused_head(model).form = wrong
    with pytest.raises(AssertionError):
        same(model)


def test_what_is_done_to_logits_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_of("granite").config
    monkeypatch.delitem(SCALES, "logits_scaling")  # as of a family whose setting nobody knows
    found = trial(type(model_of("granite")), config)
    assert found == "GraniteForCausalLM changes its logits in a way that is not known here"
    model = model_of("granite")
    assert attach(model, "auto") == (0, found)
    assert fused_head(model) is None


def test_a_head_that_is_not_called_is_found_by_trying() -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **named: Any) -> Any:
            output = super().forward(input_ids, **named)
            hidden = self.model(input_ids, attention_mask=named["attention_mask"]).last_hidden_state
            output.logits = F.linear(hidden, self.lm_head.weight)
            return output

    found = trial(Odd, model_of("llama").config)
    assert isinstance(found, str)
    assert "Odd" in found


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_on_the_head_learns(tied: bool) -> None:
    model = model_of("gemma2", tie_word_embeddings=tied)
    model = attach_adapter(model, Adapter(rank=4, targets=["lm_head", "q_proj"]), "language-modeling", 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    assert attach(model, "auto") == (1, None)
    same(model)
    adapted = from_logits(model)[0]
    with model.disable_adapter():
        model.base_model.model.model.norm.weight.requires_grad_()  # else nothing has a gradient
        same(model)
        assert abs(from_logits(model)[0] - adapted) > 0.1


@pytest.mark.parametrize(
    ("adapter", "reason"), [({"dropout": 0.1}, "adapter.dropout"), ({"dora": True}, "adapter.dora")]
)
def test_adapters_that_it_cannot_compute_are_named(adapter: dict[str, Any], reason: str) -> None:
    section = Adapter(rank=4, targets=["lm_head"], **adapter)
    number, said = attach(attach_adapter(model_of("llama"), section, "language-modeling", 0), "auto")
    assert (number, reason in str(said)) == (0, True)


@pytest.mark.parametrize(
    ("ranks", "changes", "reason"),
    [
        (1, {}, None),
        (2, {}, "parallel.tensor = 2 does not divide its vocabulary of 97"),
        (2, {"vocab_size": 98}, None),
        (4, {"vocab_size": 98, "num_key_value_heads": 4}, "parallel.tensor = 4 does not divide its vocabulary of 98"),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_ranks_share_a_vocabulary_evenly(
    ranks: int, changes: dict[str, int], reason: str | None, adapted: bool
) -> None:
    model = model_of("llama", **changes)
    if adapted:
        model = attach_adapter(model, Adapter(rank=4, targets=["lm_head"]), "language-modeling", 0)
    assert attach(model, "auto", ranks) == (0 if reason else 1, reason)


def test_a_head_that_stays_whole_or_is_cut_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_neox", **SHAPE, tie_word_embeddings=True)
    assert attach(AutoModelForCausalLM.from_config(config), "auto", 2) == (1, None)  # tied to what no plan cuts
    model = model_of("llama", vocab_size=98)
    monkeypatch.setitem(model._tp_plan, "lm_head", "rowwise_split_input")
    assert attach(model, "auto", 2) == (0, "parallel.tensor = 2 cuts the output head along hidden states")


def test_models_without_a_vocabulary_have_none() -> None:
    config = AutoConfig.for_model("bert", **SHAPE)
    model = KINDS["token-classification"].from_config(config)
    assert attach(model, "auto") == (0, "the model has no output head over a vocabulary")


def test_gives_logits_when_it_is_not_asked_and_is_gone_when_detached() -> None:
    model = model_of("llama")
    before = model(**inputs_for(model)).logits
    attach(model, "auto")
    attach(model, "auto")  # again
    assert torch.equal(model(**inputs_for(model)).logits, before)
    with pytest.raises(ZeroDivisionError), asked(fused_head(model), lambda hidden, head: hidden.sum() / (1 // 0)):
        model(**inputs_for(model))
    assert torch.equal(model(**inputs_for(model)).logits, before)
    detach(model)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**inputs_for(model)).logits, before)


def test_another_stand_in_stays_below_it() -> None:
    model = model_of("llama")
    before = model(**inputs_for(model)).logits
    plain = model.lm_head.forward
    model.lm_head.forward = stand_in = lambda hidden: 2 * plain(hidden)
    attach(model, "auto")
    assert torch.equal(model(**inputs_for(model)).logits, 2 * before)
    detach(model)
    assert vars(model.lm_head)["forward"] is stand_in


def test_a_copy_answers_for_itself() -> None:
    model = model_of("bart")
    attach(model, "auto")
    other = copy.deepcopy(model)
    assert fused_head(other).module is other.lm_head
    assert fused_head(other).owner is other
    model.lm_head.weight.data.zero_()
    same(other)


def test_rows_without_targets_give_zero_gradients() -> None:
    model = model_of("llama")
    attach(model, "auto")
    targets_N = torch.full((14,), IGNORE)
    empty_M = torch.empty(0, dtype=torch.int64)
    with asked(
        fused_head(model), lambda hidden, head: linear_cross_entropy(hidden, head, targets_N, rows_M=empty_M)
    ) as question:
        loss = question.answer(model(**inputs_for(model)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
