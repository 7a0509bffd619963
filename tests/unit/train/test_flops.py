"""Counted operations against torch's own counter, which sees every matrix product that really runs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
)

from ingot.model.adapters import attach_adapter
from ingot.parallel.recompute import recompute_blocks
from ingot.recipe import Adapter
from ingot.train.flops import AttentionShape, Flops, peak_flops

ROWS, TOKENS, TARGETS = 2, 48, 20  # a row has so many targets, the same positions in each
SHAPE = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4}
LENGTHS = np.array([TOKENS] * ROWS)


def llama(**more):
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=128, num_key_value_heads=2, attn_implementation="eager", **more)
    )


def counted(model: torch.nn.Module) -> int:
    """What runs in forward and backward of a batch, the head at `TARGETS` positions."""
    ids_BT = torch.randint(0, 90, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, logits_to_keep=torch.arange(TARGETS)).logits.sum().backward()
    return counter.get_total_flops()


def attention_of(flops: Flops) -> float:
    """Forward and backward. torch's counter sees all pairs where a causal half is needed: as much again."""
    return 3 * sum(shape.forward(LENGTHS) for shape in flops.attention)


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_equal_to_what_torch_counts(kind):
    model = attach_adapter(llama(), Adapter(kind=kind, rank=8), "language-modeling", 0)
    flops = Flops.of(model)
    ours = flops.step(LENGTHS, ROWS * TARGETS)
    real = counted(model)
    assert attention_of(flops) > 0.05 * real, "too small to be tested here"
    # LoRA: the first layer's inputs need no gradient, which neither convention leaves out: 0.7 % of 12 layers.
    assert ours["lora_aware"] + attention_of(flops) == pytest.approx(real, rel=0.01)
    # The head at every token instead of 20 of 48; and, under LoRA, gradients of weights that have none.
    assert ours["6n"] + attention_of(flops) > (1.3 if kind == "lora" else 1.01) * real


def test_recomputed_blocks_are_in_hardware_only():
    model = llama()
    before = counted(model)
    recompute_blocks(model)
    again = counted(model.train()) - before
    ours = Flops.of(model).step(LENGTHS, ROWS * TARGETS)
    shapes = Flops.of(model).attention
    extra = ours["hardware"] - ours["lora_aware"] + sum(shape.forward(LENGTHS) for shape in shapes)
    # torch stops a block's second forward pass before its last product, which nothing in the backward pass needs.
    assert again == pytest.approx(extra - 12 * 2 * 64 * 128 * ROWS * TOKENS, rel=0.01)


def test_tied_head_counts_as_a_product_and_lookup_does_not():
    tied, apart = Flops.of(llama(tie_word_embeddings=True)), Flops.of(llama(tie_word_embeddings=False))
    assert tied == apart
    assert tied.trained_head == 199 * 64


def test_layers_of_other_families():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, eos_token_id=0, bos_token_id=0))
    assert Flops.of(gpt2).trained_body == 3 * 12 * 32 * 32
    assert Flops.of(gpt2).attention == (AttentionShape(32, True, None),) * 3
    bert = BertModel(BertConfig(**SHAPE | {"num_hidden_layers": 2}, intermediate_size=128), add_pooling_layer=False)
    assert Flops.of(bert).attention == (AttentionShape(64, False, None),) * 2
    mixture = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE | {"num_hidden_layers": 1},
            num_key_value_heads=4,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
        )
    )
    # q, k, v, o, the router, and two of eight experts of three matrices
    assert Flops.of(mixture).trained_body == 4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 24


def test_attention_sees_half_a_row_or_its_window():
    rows = np.array([4, 10])
    assert AttentionShape(8, False, None).forward(rows) == 4 * 8 * (16 + 100)
    assert AttentionShape(8, True, None).forward(rows) == 4 * 8 * (16 + 100) / 2
    assert AttentionShape(8, True, 4).forward(rows) == 4 * 8 * (8 + 8 + 6 * 4)
    # Rows of one line see only themselves: two of 5 cost half of one of 10.
    assert AttentionShape(8, True, None).forward(np.array([5, 5])) == 4 * 8 * 25


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_those_of_known_devices_only(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None


def encoder_decoder(kind):
    sizes = {"vocab_size": 199, "d_model": 64, "decoder_start_token_id": 0}
    if kind == "t5":
        config = T5Config(**sizes, d_kv=24, d_ff=128, num_layers=12, num_heads=4)
    else:
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
        layers = {"encoder_layers": 12, "decoder_layers": 12, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
        config = BartConfig(**sizes, **heads, **layers)
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_reads_sources_and_a_decoder_targets(kind, adapter):
    model = attach_adapter(encoder_decoder(kind), Adapter(kind=adapter, rank=8), "translation", 0)
    source, target = TOKENS - TARGETS, TARGETS
    ids_BT = torch.randint(0, 90, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids_BT[:, :source], decoder_input_ids=ids_BT[:, source:], use_cache=False)
        output.logits.sum().backward()
    flops = Flops.of(model)
    ours = flops.step(LENGTHS, ROWS * target)
    causal = [shape for shape in flops.attention if shape.causal]
    assert [shape.reads for shape in causal] == ["target"] * 12
    assert len(flops.attention) == 36
    unneeded = 3 * sum(shape.forward(LENGTHS, target / TOKENS) for shape in causal)
    assert ours["lora_aware"] + unneeded == pytest.approx(counter.get_total_flops(), rel=0.02)
    everywhere = 6 * sum(p.numel() for p in model.parameters()) * ROWS * TOKENS
    assert ours["6n"] < 0.8 * everywhere, "no token meets both halves"
