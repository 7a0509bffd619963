"""Whole training steps on one GPU: Llama-3.1-8B's shape with adapters over a bfloat16, NF4 or FP8 base, and all weights
of Llama-3.2-1B's, beside plain Hugging Face + peft and Liger-Kernel. Random weights: speed does not depend on them.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from gpu_timing import Bench
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingot.data.loader import IGNORE, Batch, line, padded
from ingot.data.plan import Divisor
from ingot.model import fused
from ingot.model.attention import implementation, varlen_kernel
from ingot.model.quantize import quantized
from ingot.parallel.layout import Layout
from ingot.parallel.optim import make_optimizer
from ingot.parallel.sharded import Sharded
from ingot.ranks import Ranks
from ingot.recipe import Kernels, Objective, Optim, Quantization
from ingot.train.flops import Flops, peak_flops
from ingot.train.objectives import next_token

# Tokens of prompt and answer of 20 rows of gsm8k and 20 of dialogsum, evenly drawn, as a WordPiece tokenizer of 30,522
# cuts them: the mixture that packing and masking are for.
LENGTHS = (
    (34, 48), (178, 29), (42, 59), (70, 16), (36, 44), (225, 41), (89, 263), (581, 58), (40, 73), (156, 32),
    (89, 92), (325, 61), (112, 186), (279, 19), (22, 57), (202, 34), (77, 69), (304, 41), (63, 190), (183, 24),
    (101, 248), (334, 59), (34, 58), (140, 29), (98, 305), (161, 20), (41, 141), (102, 22), (42, 79), (144, 24),
    (72, 97), (169, 33), (63, 76), (138, 36), (73, 171), (234, 35), (55, 79), (320, 64), (25, 44), (268, 53),
)  # fmt: skip
CURVE_STEPS = 30


def shape(name: str, dry: bool) -> LlamaConfig:
    """The published shapes; in a dry run two thin layers."""
    if dry:
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
        return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=name == "1B")
    common: dict[str, Any] = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 128256}
    common |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "max_position_embeddings": 8192}
    if name == "8B":
        return LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, **common)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    return LlamaConfig(**sizes, tie_word_embeddings=True, **common)


def build(name: str, bench: Bench, dtype: torch.dtype, attention: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(bench.device):
        return LlamaForCausalLM._from_config(shape(name, bench.dry), dtype=dtype, attn_implementation=attention)


def rows(tokens: int, full: bool, vocabulary: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of rows that fill `tokens`: one that is learned whole, or real lengths with masked prompts."""
    lengths: Iterator[tuple[int, int]] = iter([(0, tokens)] if full else LENGTHS * 100)
    found, left = [], tokens
    for prompt, answer in lengths:
        prompt, answer = (prompt, answer) if prompt + answer <= left else (left // 2, left - left // 2)
        ids = torch.randint(0, vocabulary, (prompt + answer,), generator=generator)
        labels = ids.clone()
        labels[: max(prompt, 1)] = IGNORE
        found.append((ids, labels))
        left -= prompt + answer
        if left < 8:
            break
    return found


Step = Callable[[Batch], Tensor]


class Trial:
    """A model with its optimizer, and how one step of it is made."""

    def __init__(self, model: nn.Module, bench: Bench, optim: Optim) -> None:
        self.sharded = Sharded(model, model, Layout(Ranks()), torch.bfloat16, make_optimizer(model, optim))
        self.model, self.optim = model.train(), optim

    def ours(self, batch: Batch) -> Tensor:
        loss = next_token(self.sharded, batch, Divisor(batch.n_targets, 1), Objective())
        self.sharded.backward(loss)
        self.sharded.step(self.optim.lr, 1.0)
        return loss.detach()

    def plain(self, batch: Batch) -> Tensor:
        """The model's own loss, as a Trainer asks for it."""
        device = self.sharded.device
        inputs = {"input_ids": batch.ids_BT.to(device), "labels": batch.labels_BT.to(device)}
        if batch.attention_BT is not None:
            inputs["attention_mask"] = batch.attention_BT.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.sharded.optimizer.step()
        self.sharded.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def adapted(model: nn.Module) -> nn.Module:
    """LoRA of rank 16 on all linear layers, in float32 as Ingot and peft keep it."""
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def made(kind: str, who: str, bench: Bench) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a contender, and what was done to it."""
    own = "varlen" if bench.device.type == "cuda" and varlen_kernel() is not None else "sdpa"
    attention = implementation(own) if who == "ingot" else "sdpa"
    name, dtype = ("1B", torch.float32) if kind == "full" else ("8B", torch.bfloat16)
    model = build(name, bench, dtype, attention)
    facts: dict[str, Any] = {"attention": attention}
    if who == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    if kind in ("qlora", "fp8"):
        quantized(model, Quantization(kind="nf4" if kind == "qlora" else "fp8"))
    if kind != "full":
        model = adapted(model)
    if who == "ingot":
        facts["kernels"] = fused.apply(model, Kernels()).lines()
    return model, facts


def contenders(kind: str, bench: Bench) -> list[str]:
    """Who takes part: over a quantized base Ingot alone, for peers need bitsandbytes there."""
    peers = ["hf"] if kind in ("lora", "full") else []
    if peers and bench.device.type == "cuda" and find_spec("liger_kernel") is not None:
        peers.append("liger")
    return ["ingot", *peers]


def measure(kind: str, who: str, bench: Bench, tokens: int) -> dict[str, Any]:
    """tokens/s over full-length and over packed real rows, with MFU and peak memory. Tokens are counted without
    padding; a peer, which has no lines, gets real rows padded.
    """
    model, facts = made(kind, who, bench)
    trial = Trial(model, bench, Optim(lr=1e-4))
    flops = Flops.of(model)
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if bench.device.type == "cuda" else None
    for data in ("full-length", "real rows"):
        try:
            facts[data] = timed(trial, who, bench, tokens, data, flops, peak)
        except Exception as error:  # what was measured before stays
            facts[data] = failed(error)
            _free(bench)
    return facts


def failed(error: Exception) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}


def timed(
    trial: Trial, who: str, bench: Bench, tokens: int, data: str, flops: Flops, peak: float | None
) -> dict[str, Any]:
    """Steps over rows of one kind."""
    generator = torch.Generator().manual_seed(0)
    parts = rows(tokens, data == "full-length", trial.model.config.vocab_size, generator)  # type: ignore[union-attr, arg-type]
    batch = line(parts, 0, 1) if who == "ingot" else padded(parts, 0)
    step: Step = trial.ours if who == "ingot" else trial.plain
    losses: list[Tensor] = []
    if peak:
        torch.cuda.reset_peak_memory_stats()
    taken = [bench.once(lambda: losses.append(step(batch))) for _ in range(1 if bench.dry else 10)]
    taken = sorted(taken[0 if bench.dry else 3 :])
    seconds = statistics.median(taken)
    needed = flops.step(np.array([len(ids) for ids, _ in parts], dtype=np.int64), batch.n_targets)
    return {
        "tokens_per_second": tokens / seconds,
        "slowest_and_fastest": [tokens / taken[-1], tokens / taken[0]],
        "targets_per_second": batch.n_targets / seconds,
        "mfu": {name: value / seconds / peak for name, value in needed.items() if name != "hardware"} if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() - bench.own_bytes() if peak else None,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }


def steps(bench: Bench, save: Callable[[str, Any], None]) -> None:
    """Every kind and contender, one after the other, since their models do not fit beside each other; `save` gets each
    result as it is there. What does not begin with plain Hugging Face's loss has failed, however fast.
    """
    for kind in ("lora", "qlora", "fp8", "full"):
        found: dict[str, dict[str, Any]] = {}
        for who in contenders(kind, bench):
            try:
                found[who] = measure(kind, who, bench, 64 if bench.dry else 4096)
            except Exception as error:  # a peer that is not made for this image is a result, too
                found[who] = failed(error)
            save(f"{kind}, {who}", found[who])
            _free(bench)
        why = apart(found)
        if why:
            save(f"{kind}, ingot", {"failed": why})


def apart(found: dict[str, dict[str, Any]]) -> str | None:
    """Why Ingot's speed does not count beside `hf`, or None: first losses on full-length rows more than 1 % apart."""
    first = [found.get(who, {}).get("full-length", {}).get("first_loss") for who in ("ingot", "hf")]
    if None in first or abs(first[0] - first[1]) <= 0.01 * abs(first[1]):
        return None
    return f"its first loss is {first[0]:.4f}, plain Hugging Face's {first[1]:.4f}"


def curves(bench: Bench) -> dict[str, Any]:
    """Losses of an adapter over a bfloat16 and over an FP8 base, on the same batches: how far apart they are."""
    found: dict[str, list[float]] = {}
    n_steps = 2 if bench.dry else CURVE_STEPS
    for kind in ("lora", "fp8"):
        config = shape("1B", bench.dry)
        torch.manual_seed(0)
        with torch.device(bench.device):
            model = LlamaForCausalLM._from_config(
                config, dtype=torch.bfloat16, attn_implementation=implementation("sdpa")
            )
        if kind == "fp8":
            quantized(model, Quantization(kind="fp8"))
        model = adapted(model)
        fused.apply(model, Kernels())
        trial, generator = Trial(model, bench, Optim(lr=1e-3)), torch.Generator().manual_seed(1)
        parts = [rows(64 if bench.dry else 1024, False, 64, generator) for _ in range(4)]
        found[kind] = [float(trial.ours(line(parts[n % len(parts)], 0, 1))) for n in range(n_steps)]
        _free(bench)
    apart = max(abs(a - b) / a for a, b in zip(found["lora"], found["fp8"], strict=True))
    return {"losses": found, "largest_difference": apart}


def _free(bench: Bench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
