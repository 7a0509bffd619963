"""What every contender of `train_cpu.py` is given, and the definition that it is held to.

A folder with a seeded Llama, a byte-level tokenizer made from the training texts, and rows; the loss and gradient of
the first batch by plain float32 products over one row at a time; and the loss on held-out rows.
"""

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[2] / "shared/data"
RANK, ALPHA = 16, 32.0
VOCABULARY = 32_000
HELD_OUT = 32


class Row(NamedTuple):
    """One encoded row; labels are -100 where a token is no target."""

    ids: list[int]
    labels: list[int]


def read_rows() -> dict[str, list[dict[str, str]]]:
    """Prompts and completions: `e2e` has even lengths, `mixed` (gsm8k and dialogsum) uneven ones.

    Raises RuntimeError where the data is not there.
    """
    missing = [name for name in ("e2e", "gsm8k", "dialogsum") if not (DATA / name).is_dir()]
    if missing:
        raise RuntimeError(f"there is no {', '.join(missing)} in {DATA.resolve()}, beside the checkout")
    with (DATA / "e2e/devset.csv").open(encoding="utf-8") as file:
        e2e = [{"prompt": row["mr"] + "\n", "completion": row["ref"]} for row in csv.DictReader(file)]
    gsm8k, dialogsum = (_lines(DATA / name) for name in ("gsm8k/train.jsonl", "dialogsum/dev.jsonl"))
    mixed = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in gsm8k[:500]]
    mixed += [{"prompt": row["dialogue"] + "\n", "completion": row["summary"]} for row in dialogsum]
    for rows in (e2e, mixed):
        random.Random(0).shuffle(rows)
    return {"e2e": e2e, "mixed": mixed}


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, n_rows: Mapping[str, int], hidden: int, layers: int) -> None:
    """Write the model, the tokenizer, and `NAME-train.jsonl` and `NAME-held.jsonl` of each data set."""
    rows = read_rows()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] + row["completion"] for name in rows for row in rows[name]]
    core.train_from_iterator(texts, trainer)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, count in n_rows.items():
        parts = {"train": rows[name][:count], "held": rows[name][-HELD_OUT:]}
        for part, chosen in parts.items():
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}-{part}.jsonl").write_text(text, encoding="utf-8")


def encode(path: Path, tokenizer: Any) -> list[Row]:
    """Prompt, completion, eos; the prompt is no target."""
    found = []
    for row in _lines(path):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append(Row([*prompt, *completion], [-100] * len(prompt) + completion))
    return found


def _plain(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )


def _weights(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain model with W + alpha / rank B A in place of W, or the trained ones themselves."""
    found = {}
    for name, weight in model.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in trained:
            found[name] = weight + ALPHA / RANK * trained[f"{stem}.lora_B"] @ trained[f"{stem}.lora_A"]
        else:
            found[name] = trained.get(name, weight)
    return found


def _summed(model: nn.Module, weights: Mapping[str, Tensor], row: Row) -> Tensor:
    """Sum of the row's losses."""
    logits_1TV = torch.func.functional_call(model, dict(weights), (torch.tensor([row.ids]),)).logits
    return F.cross_entropy(logits_1TV[0, :-1].float(), torch.tensor(row.labels[1:]), reduction="sum")


def n_targets(rows: Sequence[Row]) -> int:
    return sum(label != -100 for row in rows for label in row.labels[1:])


def definition(folder: Path, trained: Mapping[str, Tensor], rows: Sequence[Row]) -> tuple[float, float]:
    """(Mean loss over the rows' targets, norm of its gradient by the `trained` tensors)."""
    model, total = _plain(folder).eval(), n_targets(rows)
    leaves = {name: tensor.detach().float().clone().requires_grad_() for name, tensor in trained.items()}
    loss = 0.0
    for row in rows:
        part = _summed(model, _weights(model, leaves), row) / total
        part.backward()
        loss += part.item()
    squares = sum(float(leaf.grad.double().square().sum()) for leaf in leaves.values() if leaf.grad is not None)
    return loss, squares**0.5


@torch.no_grad()
def held_out_loss(folder: Path, trained: Mapping[str, Tensor], name: str, tokenizer: Any) -> float:
    """Mean loss over the targets of the held-out rows, float32."""
    model, rows = _plain(folder).eval(), encode(folder / f"{name}-held.jsonl", tokenizer)
    weights = _weights(model, {key: tensor.detach().float() for key, tensor in trained.items()})
    return sum(float(_summed(model, weights, row)) for row in rows) / n_targets(rows)


def trained_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what a model trains, named as in the plain model, without peft's and Ingot's wrappings."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for old, new in ((".default.weight", ""), (".default", ""), (".base_layer", "")):
                name = name.replace(old, new)
            start = max(name.find("model.layers."), name.find("model.embed_tokens."), name.find("model.norm."))
            name = name[start:] if start >= 0 else name
            found[name] = parameter.detach().float().clone()
    return found
