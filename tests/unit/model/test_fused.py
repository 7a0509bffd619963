"""Fused operations in models of many families: as many places as stated, and nothing computed differently."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.errors import RecipeError
from ingot.model import fused, fused_blocks
from ingot.model.adapters import attach_adapter
from ingot.model.attention import implementation
from ingot.model.documents import Documents
from ingot.model.head import asked, fused_head
from ingot.model.kinds import KINDS, logits_of
from ingot.model.quantize import QuantizedLinear, quantized
from ingot.parallel.recompute import apply_activations
from ingot.recipe import Adapter, Kernels, Quantization, Train
from ingot_kernels import gated, rms_norm, rope
from ingot_kernels.linear_cross_entropy import linear_cross_entropy

# B rows, T tokens, V vocabulary

WORDS = 97
CLOSE = 1e-4  # of each tensor's largest value
NOISE = 1e-6  # of the largest gradient: biases of keys have none, but rounding
LENGTHS = (9, 1, 14)  # rows of a line, longer than WINDOW
WINDOW = 4
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    name: value
    for side in ("encoder", "decoder")
    for name, value in {f"{side}_layers": 2, f"{side}_ffn_dim": 48, f"{side}_attention_heads": 4}.items()
} | {"d_model": 32, "dropout": 0.0}
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WRITES, MASKS, REWRITES = "language-modeling", "fill-mask", "summarization"
# name -> (model type, task, configuration,
#          replaced: rms_norm, rope, gated, linear_cross_entropy, and lora_linear with adapters everywhere)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int, int, int]]] = {
    "llama": ("llama", WRITES, {"attention_bias": True, "mlp_bias": True}, (7, 2, 2, 1, 14)),
    "mistral": ("mistral", WRITES, {"sliding_window": WINDOW}, (7, 2, 2, 1, 14)),
    "mixtral": ("mixtral", WRITES, {**LOCAL, "sliding_window": WINDOW}, (7, 2, 0, 1, 8)),
    "qwen2": ("qwen2", WRITES, {**WINDOWED, "use_sliding_window": True}, (7, 2, 2, 1, 14)),
    "qwen3": ("qwen3", WRITES, {**WINDOWED, "use_sliding_window": True}, (11, 2, 2, 1, 14)),
    "qwen3_moe": ("qwen3_moe", WRITES, {**EXPERTS, "mlp_only_layers": [0]}, (11, 2, 1, 1, 8)),
    "gemma2": ("gemma2", WRITES, {**WINDOWED, "final_logit_softcapping": 3.0}, (9, 2, 2, 1, 14)),
    "gemma3": ("gemma3_text", WRITES, WINDOWED, (13, 2, 2, 1, 14)),
    "phi3": ("phi3", WRITES, {"sliding_window": WINDOW}, (7, 0, 2, 1, 8)),
    "olmo2": ("olmo2", WRITES, {}, (9, 0, 2, 1, 14)),
    "granite": ("granite", WRITES, {"residual_multiplier": 0.5, "logits_scaling": 2.0}, (5, 2, 2, 1, 14)),
    "cohere2": ("cohere2", WRITES, WINDOWED, (0, 0, 2, 1, 14)),
    "gpt_oss": ("gpt_oss", WRITES, {**LOCAL, **WINDOWED}, (5, 0, 0, 1, 8)),
    "bert": ("bert", MASKS, ENCODER, (0, 0, 0, 1, 12)),
    "roberta": ("roberta", MASKS, {**ENCODER, "pad_token_id": 1, "bos_token_id": 0}, (0, 0, 0, 1, 12)),
    "modernbert": (
        "modernbert",
        MASKS,
        {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        (0, 0, 2, 1, 8),
    ),
    "t5": ("t5", REWRITES, T5, (12, 0, 0, 1, 32)),
    "t5_gated": ("t5", REWRITES, {**T5, "feed_forward_proj": "gated-gelu"}, (12, 0, 4, 1, 36)),
    "bart": ("bart", REWRITES, BART, (0, 0, 0, 1, 32)),
}
OPS = ("rms_norm", "rope", "gated", "linear_cross_entropy", "lora_linear")
DECODERS = [name for name, (_, task, _, _) in FAMILIES.items() if task == WRITES]


def base_of(family: str, **changes: Any) -> Any:
    kind, task, own, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **own, **changes})
    model = KINDS.get(task, AutoModelForCausalLM).from_config(config, attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, where a mix-up has no effect
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return model


def with_adapter(model: nn.Module, family: str, **settings: Any) -> Any:
    """Adapters on all linear layers, as if they had learned."""
    adapter = Adapter(**{"rank": 4, "alpha": 8, **settings})
    model = attach_adapter(model, adapter, FAMILIES[family][1], 0).train()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def pair(family: str = "llama", *, lora: bool = True, impl: Any = "auto", **settings: Any) -> tuple[Any, Any]:
    """(the untouched model, the same with fused operations)."""
    model = with_adapter(base_of(family), family, **settings) if lora else base_of(family)
    applied = copy.deepcopy(model)
    fused.apply(applied, Kernels(impl=impl))
    return model, applied


def batch_of(model: Any) -> dict[str, Tensor]:
    """Two rows, one of them filled up."""
    ids_BT = torch.randint(3, WORDS, (2, 13), generator=torch.Generator().manual_seed(3))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 9:] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return inputs | ({"decoder_input_ids": ids_BT.flip(1)} if model.config.is_encoder_decoder else {})


def line_of(_model: Any) -> dict[str, Any]:
    """Rows end to end."""
    ids_1T = torch.randint(3, WORDS, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
    documents = Documents.of(LENGTHS, torch.device("cpu"))
    positions_1T = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return {
        "input_ids": ids_1T,
        "attention_mask": documents.mask,
        "position_ids": positions_1T,
        "documents": documents,
    }


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Without a cache, as in training; zeros where there is nothing."""
    found_BTV = logits_of(model(**inputs, use_cache=False)).float()
    mask_BT = inputs["attention_mask"]
    return found_BTV * mask_BT[..., None] if mask_BT.shape == found_BTV.shape[:2] else found_BTV


def step(model: Any, inputs: dict[str, Any], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, every gradient)."""
    torch.manual_seed(seed)  # of dropout
    model.zero_grad(set_to_none=True)
    output_BTV = logits(model, inputs)
    (output_BTV * torch.randn(output_BTV.shape, generator=torch.Generator().manual_seed(6))).mean().backward()
    return output_BTV.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(plain: Any, applied: Any, inputs: dict[str, Any], close: float = CLOSE) -> None:
    """Outputs and all gradients of both are the same."""
    (expected, gradients), (found, others) = step(plain, inputs), step(applied, inputs)
    assert (found - expected).abs().max() <= close * expected.abs().max(), "output"
    assert gradients.keys() == others.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        allowed = close * gradient.abs().max() + NOISE / CLOSE * close * largest
        assert (others[name] - gradient).abs().max() <= allowed, name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_untouched_model(family: str, lora: bool) -> None:
    """In as many places as the table says: an operation that silently finds none fails here."""
    plain = with_adapter(base_of(family), family) if lora else base_of(family)
    applied = copy.deepcopy(plain)
    report = fused.apply(applied, Kernels())
    *places, adapted = FAMILIES[family][3]
    assert [len(report.replaced[op]) for op in OPS] == [*places, adapted if lora else 0], report.lines()
    check(plain, applied, batch_of(plain))
    if family in DECODERS:
        for model in (plain, applied):
            getattr(model, "get_base_model", lambda model=model: model)().set_attn_implementation(
                implementation("eager")
            )
        check(plain, applied, line_of(plain))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_made_in_the_head(family: str) -> None:
    plain, applied = pair(family)
    inputs = batch_of(plain)
    targets_N = torch.randint(3, WORDS, (26,), generator=torch.Generator().manual_seed(7))
    loss = nn.functional.cross_entropy(plain(**inputs, use_cache=False).logits.flatten(0, 1), targets_N)
    loss.backward()
    fused_one = fused_head(applied)
    assert fused_one is not None
    with asked(fused_one, lambda hidden, head: linear_cross_entropy(hidden, head, targets_N)) as question:
        output = applied(**inputs, use_cache=False)
    found = question.answer(output) / len(targets_N)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=CLOSE)
    for (name, one), other in zip(plain.named_parameters(), applied.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert (one.grad - other.grad).abs().max() <= CLOSE * one.grad.abs().max(), name


def stand_ins(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("family", "op", "reason"),
    [
        ("llama", "lora_linear", "LlamaForCausalLM has no place for it: nothing in it computes that"),
        ("bert", "rope", "BertForMaskedLM has no place for it"),
        ("olmo2", "rope", "Olmo2Attention computes something else"),
    ],
)
def test_a_named_operation_without_a_place_is_an_error(family: str, op: Any, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        fused.apply(base_of(family), Kernels(ops=[op]))
    assert (caught.value.field, caught.value.value) == ("kernels.ops", op)


def test_only_what_is_named_is_replaced() -> None:
    model = base_of("llama")
    report = fused.apply(model, Kernels(ops=["gated"]))
    assert stand_ins(model) == ["model.layers.0.mlp", "model.layers.1.mlp"] == report.replaced["gated"]
    assert sum(len(names) for names in report.replaced.values()) == 2


def test_none_replaces_nothing() -> None:
    model = with_adapter(base_of("llama"), "llama")
    report = fused.apply(model, Kernels(ops="none"))
    assert stand_ins(model) == [] == report.lines()


def test_is_undone() -> None:
    plain, applied = pair("qwen3")
    assert stand_ins(applied)
    fused.restore(applied)
    assert stand_ins(applied) == []
    inputs = batch_of(plain)
    assert torch.equal(step(plain, inputs)[0], step(applied, inputs)[0])


def test_a_copy_is_a_model_of_its_own() -> None:
    plain, applied = pair()
    copied = copy.deepcopy(applied)
    assert stand_ins(copied) == stand_ins(applied)
    with torch.no_grad():
        for parameter in applied.parameters():
            parameter.zero_()
    check(plain, copied, batch_of(plain))


def test_writes_with_a_cache() -> None:
    plain, applied = (model.eval() for model in pair("mistral"))
    inputs = {"input_ids": batch_of(plain)["input_ids"], "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    options = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    one, other = (model.generate(**inputs, **options) for model in (plain, applied))
    assert torch.equal(one.sequences, other.sequences)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5_gated"])
def test_evaluates_without_gradients(family: str) -> None:
    plain, applied = (model.eval() for model in pair(family))
    inputs = batch_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(logits(applied, inputs), logits(plain, inputs), rtol=0, atol=CLOSE)


def test_an_adapter_that_is_switched_off_has_no_part() -> None:
    plain, applied = pair(dropout=0.5)
    inputs = batch_of(plain)
    base = logits(base_of("llama"), inputs)
    with torch.no_grad():
        with applied.disable_adapter():
            torch.testing.assert_close(logits(applied, inputs), base, rtol=0, atol=CLOSE)
        assert (logits(applied.eval(), inputs) - base).abs().max() > 0.01
    check(plain.eval(), applied, inputs)


def test_several_adapters() -> None:
    plain, _ = pair(targets=["q_proj", "down_proj"])
    plain.add_adapter("other", copy.deepcopy(plain.peft_config["default"]))
    plain.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_(std=0.1)
    applied = copy.deepcopy(plain)
    assert len(fused.apply(applied, Kernels()).replaced["lora_linear"]) == 4
    check(plain, applied, batch_of(plain))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["reentrant", "full", "selective"])
def test_is_recomputed(kind: Any, lora: bool, family: str) -> None:
    plain, applied = pair(family, lora=lora)
    if kind == "reentrant":
        if lora:  # or nothing in a block would need a gradient
            applied.enable_input_require_grads()
        inner = applied.get_base_model() if lora else applied
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    else:
        apply_activations(applied, Train(activation_checkpointing=kind), torch.device("cpu"))
    check(plain, applied, batch_of(plain))


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_drops_the_same(kind: Any) -> None:
    _, applied = pair(dropout=0.3)
    again = copy.deepcopy(applied)
    apply_activations(again, Train(activation_checkpointing=kind), torch.device("cpu"))
    check(applied, again, batch_of(applied))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_under_autocast_is_close(family: str, lora: bool) -> None:
    plain, applied = pair(family, lora=lora)
    inputs = batch_of(plain)
    with torch.autocast("cpu", torch.bfloat16):
        (expected, gradients), (found, others) = step(plain, inputs), step(applied, inputs)
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    assert gradients.keys() == others.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert others[name].dtype == gradient.dtype
        assert (others[name] - gradient).norm() <= 5e-2 * max(float(gradient.norm()), 0.1 * largest), name


def test_inputs_are_dropped_in_training_only() -> None:
    plain, applied = pair(dropout=0.5)
    inputs = batch_of(plain)
    first, gradients = step(applied, inputs, seed=1)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert len(gradients) == 28
    assert not torch.equal(first, step(applied, inputs, seed=2)[0])
    check(plain.eval(), applied.eval(), inputs)


def test_dora() -> None:
    plain, applied = pair(dora=True)
    assert len([name for name in stand_ins(applied) if name.endswith("q_proj")]) == 2
    check(plain, applied, batch_of(plain))


def test_dora_that_drops_inputs_is_left() -> None:
    model = with_adapter(base_of("llama"), "llama", dora=True, dropout=0.1)
    report = fused.apply(model, Kernels())
    assert {why: len(names) for why, names in report.left["lora_linear"].items()} == {"dora with dropout": 14}


@pytest.mark.parametrize("section", [Quantization(kind="nf4"), Quantization(kind="int8")], ids=["nf4", "int8"])
def test_over_a_quantized_base(section: Quantization) -> None:
    plain = with_adapter(quantized(base_of("llama"), section), "llama")
    applied = copy.deepcopy(plain)
    report = fused.apply(applied, Kernels())
    assert len(report.replaced["lora_linear"]) == 14 == sum(isinstance(m, QuantizedLinear) for m in plain.modules())
    check(plain, applied, batch_of(plain))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_triton_computes_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def spied(module: Any, launch: Any, *args: Any, **named: Any) -> Any:
        called.add(module)
        return launch(*args, **named)

    for module, name in ((gated, "_launch"), (rms_norm, "_launch_forward"), (rope, "_launch")):
        monkeypatch.setattr(module, name, partial(spied, module, getattr(module, name)))
    plain, applied = pair(family, impl="triton")
    check(plain, applied, {name: tensor[:, :5] for name, tensor in batch_of(plain).items()})
    assert len(called) == 3


def scaled(function: Any, factor: float) -> Any:
    """`function` with results that are `factor` times as large."""

    def wrong(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        return found * factor if isinstance(found, Tensor) else tuple(part * factor for part in found)

    return wrong


def steeper(function: Any, factor: float) -> Any:
    """`function` with right results, and gradients that are `factor` times as large."""

    def turned(part: Tensor) -> Tensor:
        return part * factor - part.detach() * (factor - 1)

    def wrong(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        return turned(found) if isinstance(found, Tensor) else tuple(turned(part) for part in found)

    return wrong


@pytest.mark.parametrize("fault", [scaled, steeper])
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_rope", "gated", "lora_linear"])
def test_a_wrong_operation_is_noticed(op: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, applied = pair()
    inputs = batch_of(plain)
    check(plain, applied, inputs)
    monkeypatch.setattr(fused_blocks, op, fault(getattr(fused_blocks, op), 1.01))
    with pytest.raises(AssertionError):
        check(plain, applied, inputs)


def test_a_wrong_operation_finds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("rms_norm", "add_rms_norm", "qk_rope", "gated"):
        monkeypatch.setattr(fused_blocks, op, scaled(getattr(fused_blocks, op), 1.01))
    report = fused.apply(base_of("llama"), Kernels(ops=["linear_cross_entropy"]))
    assert report.left["rope"] == {}
    report = fused.apply(base_of("llama"), Kernels())
    assert not any(report.replaced[op] for op in ("rms_norm", "rope", "gated"))
    assert list(report.left["rope"]) == ["LlamaAttention computes something else"]


def test_dropout_that_only_training_shows() -> None:
    """Phi3's blocks drop what attention gives, which evaluation would never tell."""
    report = fused.apply(base_of("phi3", resid_pdrop=0.1), Kernels())
    assert len(report.replaced["rms_norm"]) == 5
    assert list(report.left["rms_norm"]) == ["Phi3DecoderLayer computes something else"]


def test_kinds_of_gelu_are_told_apart() -> None:
    for act, name in (("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("silu", "silu")):
        model: Any = base_of("llama", hidden_act=act)
        fused.apply(model, Kernels())
        assert model.model.layers[0].mlp.forward.fused.keywords["act"] == name


def test_norms_of_a_class_may_differ_in_eps() -> None:
    plain = base_of("llama")
    plain.model.layers[0].input_layernorm.variance_epsilon = plain.model.layers[1].input_layernorm.variance_epsilon = (
        0.1
    )
    plain.model.layers[1].post_attention_layernorm.variance_epsilon = 0.2
    applied = copy.deepcopy(plain)
    fused.apply(applied, Kernels())
    check(plain, applied, batch_of(plain))


def test_hooks_on_single_layers_still_fire() -> None:
    _, applied = pair()
    seen: list[str] = []
    attention = applied.get_base_model().model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    attention.register_forward_hook(lambda *_: seen.append("attention"))
    logits(applied, batch_of(applied))
    assert seen == ["q_proj", "k_proj", "v_proj", "o_proj", "attention"]


def test_what_others_hook_into_is_left() -> None:
    plain = with_adapter(base_of("llama"), "llama")
    applied = copy.deepcopy(plain)
    report = fused.apply(applied, Kernels(), hooked="zero3")
    assert [len(report.replaced[op]) for op in OPS] == [5, 0, 2, 1, 0]
    assert {why: len(names) for why, names in report.left["lora_linear"].items()} == {
        "zero3 puts hooks on its parts": 14
    }
    check(plain, applied, batch_of(plain))


def test_draws_nothing_from_the_generator_of_the_run() -> None:
    model = base_of("llama")
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    fused.apply(model, Kernels())
    assert torch.equal(torch.rand(3), wanted)


def test_says_what_it_did() -> None:
    model = with_adapter(base_of("mixtral"), "mixtral")
    report = fused.apply(model, Kernels())
    assert "kernels.rope: 2 replaced" in report.lines()
    assert json.loads(json.dumps(report.facts()))["rope"] == {
        "replaced": [f"base_model.model.model.layers.{layer}.self_attn" for layer in range(2)],
        "left": {},
    }
    assert list(report.left["lora_linear"]) == ["adapters over a MixtralExperts"]


def test_triton_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"kernels\.impl"):
        fused.apply(base_of("llama"), Kernels(impl="triton"))
