"""What engines that serve adapters beside a base refuse of one, read off peft's `adapter_config.json`.

Facts as their sources say: vLLM's PEFTHelper and LoRAConfig, llama.cpp's convert_lora_to_gguf.py. What is refused as an
adapter is served everywhere once it is merged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM reserves room for one of these; 16 unless it is told
DEFAULT_RANK = 16
EVERYWHERE = 64  # the largest rank that every engine's kernels are written for
ENDS = ("lm_head", "embed_tokens", "embed_in", "embed_out", "wte", "word_embeddings", "shared")


@dataclass(frozen=True)
class Refusal:
    """Who does not take an adapter as it is, why, and what to change in the recipe."""

    engines: str
    why: str
    fix: str


def refusals(config: Mapping[str, Any], *, tokens: int | None = None, rows: int | None = None) -> list[Refusal]:
    """What engines refuse of the adapter of this configuration; empty for one that all of them take.

    tokens: how many the tokenizer knows. rows: how many the base's embedding has room for.
    """
    return [*_of_kind(config), *_of_rank(int(config.get("r") or 0)), *_of_places(config, tokens, rows)]


def _of_kind(config: Mapping[str, Any]) -> Iterator[Refusal]:
    if config.get("use_dora"):
        yield Refusal("vLLM, llama.cpp", "DoRA adapters are refused", "adapter.dora: false, or package.forms: [merged]")
    if config.get("bias", "none") != "none":
        yield Refusal("vLLM, llama.cpp", "trained biases are refused", "package.forms: [merged]")
    kept = sorted(config.get("modules_to_save") or ())
    if kept:
        why = f"layers that are trained as a whole ({', '.join(kept)}) are refused"
        yield Refusal("vLLM, llama.cpp", why, "package.forms: [merged]")
    if config.get("target_parameters"):
        why = "adapters on fused experts are in a form that peft alone reads"
        yield Refusal("vLLM, TGI, llama.cpp", why, "leave experts out of adapter.targets, or package.forms: [merged]")


def _of_rank(rank: int) -> Iterator[Refusal]:
    if rank > RANKS[-1]:
        yield Refusal("vLLM", f"rank {rank} is over its largest, {RANKS[-1]}", f"adapter.rank: {RANKS[-1]} or less")
    elif rank not in RANKS:
        near = next(allowed for allowed in RANKS if allowed >= rank)
        why = (
            f"rank {rank} is none of {', '.join(map(str, RANKS[:4]))}, ...: it takes the room of {near}, or is refused"
        )
        yield Refusal("vLLM, TGI", why, f"adapter.rank: {near}")
    elif rank > EVERYWHERE:
        why = f"rank {rank} is over {EVERYWHERE}, which is the most that every engine's kernels take"
        yield Refusal("TGI and others", why, f"adapter.rank: {EVERYWHERE}, or package.forms: [merged]")


def _of_places(config: Mapping[str, Any], tokens: int | None, rows: int | None) -> Iterator[Refusal]:
    targets = config.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else targets
    ends = sorted({name for name in names if name.rpartition(".")[2] in ENDS})
    if ends:
        why = f"adapters on embeddings or the output head ({', '.join(ends)}) are taken for few architectures only"
        yield Refusal("vLLM, TGI", why, f"leave {ends[0]} out of adapter.targets, or package.forms: [merged]")
    if tokens is not None and rows is not None and tokens > rows:
        why = f"the tokenizer knows {tokens:,} tokens and the base has {rows:,}: a resized vocabulary is refused"
        yield Refusal("vLLM, TGI, llama.cpp", why, "package.forms: [merged]")
