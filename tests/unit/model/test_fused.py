"""Fused operations in models of many families: as many places as stated, and nothing computed differently."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.model import fused
from ingot.model.adapters import attach_adapter
from ingot.model.attention import implementation
from ingot.model.documents import Documents
from ingot.model.load import KINDS, logits_of
from ingot.recipe import Adapter, Kernels

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
