"""One contender of `train_cpu.py` in a process of its own:  python benchmarks/cpu_contenders.py SPEC.json-text OUT.json

SPEC: contender, data, method (lora, full), precision (float32, bfloat16), folder, rows (of a step), work, plant.
"""

import contextlib
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu_work import ALPHA, RANK, Row, definition, encode, held_out_loss, trained_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

WARM_UP = 3
RATES = {"lora": 1e-3, "full": 3e-4}
LONGEST = 1024


@dataclass
class Record:
    """What a contender did: when each step ended, and its tokens and targets; its first step."""

    ends: list[float] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    first_rows: list[Row] = field(default_factory=list)
    first_loss: float = float("nan")
    first_norm: float = float("nan")
    initial: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    loaded_rss: int = 0
    peak_rss: int = 0

    def step(self) -> None:
        """A step has ended. Memory is read here: what comes behind the last step, a checkpoint of Ingot's alone, is not
        training.
        """
        self.ends.append(time.perf_counter())
        self.peak_rss = _peak_rss()

    def loaded(self, model: nn.Module) -> None:
        self.initial, self.loaded_rss = trained_of(model), _peak_rss()

    def batch(self, batch: dict[str, Any]) -> None:
        """Count a collated batch; keep the rows of the first."""
        ids_BT, labels_BT = batch["input_ids"], batch["labels"]
        mask_BT = batch.get("attention_mask")
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        self.counts.append((int(mask_BT.sum()), int((labels_BT[:, 1:] != -100).sum())))
        if not self.first_rows:
            for number, (ids_T, labels_T, mask_T) in enumerate(zip(ids_BT, labels_BT, mask_BT, strict=True)):
                ids, labels = ids_T[mask_T > 0].tolist(), labels_T[mask_T > 0].tolist()
                places = batch["position_ids"][number].tolist() if "position_ids" in batch else [0]
                starts = [place for place, position in enumerate(places) if position == 0]  # a pack holds several rows
                for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                    self.first_rows.append(Row(ids[start:end], labels[start:end]))


def _peak_rss() -> int:
    """Highest resident memory of this process so far, bytes. Not `ru_maxrss`: across fork and exec it starts with what
    the parent held, which is a trained tokenizer and a model here.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _model(spec: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(Path(spec["folder"]) / "model", dtype=torch.float32)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    """Of Hugging Face's arguments; TRL has checkpointing on by itself, which is slower here, so it is off for all."""
    packs = max(1, round(spec["tokens"] / LONGEST))
    return {
        "output_dir": spec["work"],
        "per_device_train_batch_size": packs if spec["contender"] == "trl_packed" else spec["rows"],
        "num_train_epochs": 1,
        "learning_rate": RATES[spec["method"]],
        "lr_scheduler_type": "constant",
        "bf16": spec["precision"] == "bfloat16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1_000_000,
        "disable_tqdm": True,
    }


def _watch(trainer: Any, record: Record) -> None:
    """Record a Hugging Face trainer's steps, and its logged first one."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            record.step()
            control.should_log = state.global_step == 1

    inner = trainer.data_collator

    def collate(rows: list[Any]) -> Any:
        batch = inner(rows)
        record.batch(batch)
        return batch

    trainer.data_collator = collate
    trainer.add_callback(Watch())
    record.loaded(trainer.model)
    trainer.train()
    first = trainer.state.log_history[0]
    record.first_loss, record.first_norm = first["loss"], float(first["grad_norm"])
    record.trained = trained_of(trainer.model)


def trl(spec: dict[str, Any], record: Record) -> None:
    """TRL's SFTTrainer with peft; prompt and completion columns, so that completions alone are learned."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    packed = spec["contender"] == "trl_packed"
    path = str(Path(spec["folder"]) / f"{spec['data']}-train.jsonl")
    rows = load_dataset("json", data_files=path, split="train", cache_dir=spec["work"])
    trainer = SFTTrainer(
        _model(spec),
        args=SFTConfig(**_settings(spec), max_length=LONGEST, packing=packed, completion_only_loss=True),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(Path(spec["folder"]) / "model"),
        peft_config=_lora() if spec["method"] == "lora" else None,
    )
    _watch(trainer, record)


def trainer(spec: dict[str, Any], record: Record) -> None:
    """Hugging Face's Trainer on encoded rows, padded to the longest of a batch."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(Path(spec["folder"]) / "model")
    model = _model(spec)
    model = get_peft_model(model, _lora()) if spec["method"] == "lora" else model
    rows = [
        {"input_ids": row.ids, "labels": row.labels, "attention_mask": [1] * len(row.ids)}
        for row in _rows(spec, tokenizer)
    ]
    arguments = TrainingArguments(**_settings(spec))
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    _watch(Trainer(model, args=arguments, train_dataset=rows, data_collator=collate), record)


def plain(spec: dict[str, Any], record: Record) -> None:
    """A loop as one writes it: peft, shuffled rows padded to the longest of a batch, AdamW, clipping."""
    from peft import get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(Path(spec["folder"]) / "model")
    torch.manual_seed(0)
    model = _model(spec)
    model = get_peft_model(model, _lora()) if spec["method"] == "lora" else model
    model.train()
    record.loaded(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATES[spec["method"]], weight_decay=0.0)
    rows = _rows(spec, tokenizer)
    random.Random(0).shuffle(rows)
    pad = torch.nn.utils.rnn.pad_sequence
    for start in range(0, len(rows), spec["rows"]):
        part = rows[start : start + spec["rows"]]
        ids_BT = pad([torch.tensor(row.ids) for row in part], True, tokenizer.pad_token_id)
        labels_BT = pad([torch.tensor(row.labels) for row in part], True, -100)
        mask_BT = pad([torch.ones(len(row.ids), dtype=torch.long) for row in part], True, 0)
        batch = {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}
        record.batch(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec["precision"] == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if start == 0:
            record.first_loss, record.first_norm = loss.item(), norm.item()
        record.step()
    record.trained = trained_of(model)


def ingot(spec: dict[str, Any], record: Record) -> None:
    """Ingot by a recipe: its own preparation, assembly and loop, with what it decides by itself."""
    from ingot.assembly import build
    from ingot.data.plan import Cursor
    from ingot.data.rows import ListRows
    from ingot.parallel.strategies import parallelize
    from ingot.preparation import prepare
    from ingot.ranks import Ranks
    from ingot.recipe import Recipe
    from ingot.stages import resolve
    from ingot.train.checkpoint import Checkpoints
    from ingot.train.loop import Rows, StepInfo, fit
    from ingot.train.meter import Meter

    folder, work = Path(spec["folder"]), Path(spec["work"])
    settings = {
        "name": "benchmark",
        "output": str(work),
        "model": {"source": str(folder / "model"), "dtype": spec["precision"]},
        "data": {
            "train": str(folder / f"{spec['data']}-train.jsonl"),
            "validation_share": 0.0,
            "test_share": 0.0,
            "max_tokens": LONGEST,
            "cache": str(work / "cache"),
        },
        "objective": {"task": "text-generation"},
        "adapter": {"kind": "lora" if spec["method"] == "lora" else "none", "rank": RANK, "alpha": ALPHA},
        "optim": {"lr": RATES[spec["method"]], "schedule": "constant", "warmup_share": 0.0},
        "train": {
            "tokens_per_step": max(LONGEST, spec["tokens"]),
            "tokens_per_microbatch": max(LONGEST, spec["tokens"]),
            "final": "last",
        },
    }
    cpu = torch.device("cpu")
    recipe = resolve(Recipe.model_validate(settings), folder, Ranks(), cpu)
    prepared = prepare(recipe, folder)
    model = build(recipe, folder, prepared.facts.labels, Ranks()).model
    sharded = parallelize(model, Ranks(), recipe, cpu, getattr(torch, spec["precision"]))
    record.loaded(sharded.plain)
    meter, rows = Meter(), prepared.rows
    portion = next(iter(rows.train.start(Cursor())))
    for index in portion.indices:
        row = portion.rows[int(index)]
        kept = [token if yes else -100 for token, yes in zip(row.ids, row.trainable, strict=True)]
        record.first_rows.append(Row(list(row.ids), kept))
    seen = [0]

    def on_step(info: StepInfo) -> None:
        if not record.ends:
            record.first_loss, record.first_norm = info.loss, info.grad_norm
        record.counts.append((info.tokens, meter.targets - seen[0]))
        seen[0] = meter.targets
        record.step()

    fit(
        sharded,
        Rows(rows.train, ListRows([]), rows.pad_id),
        recipe,
        Checkpoints(work / "checkpoints", Ranks(), "benchmark", 1),
        on_step=(on_step,),
        meter=meter,
    )
    record.trained = trained_of(sharded.plain)


def _rows(spec: dict[str, Any], tokenizer: Any) -> list[Row]:
    return encode(Path(spec["folder"]) / f"{spec['data']}-train.jsonl", tokenizer)


CONTENDERS = {"ingot": ingot, "trl": trl, "trl_packed": trl, "trainer": trainer, "plain": plain}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as SPEC says; speed of the steps behind the warm-up, memory, first step beside the definition's, loss."""
    torch.set_num_threads(spec["threads"])
    record, folder = Record(), Path(spec["folder"])
    CONTENDERS[spec["contender"]](spec, record)
    peak = record.peak_rss
    steps = len(record.ends)
    seconds = record.ends[-1] - record.ends[WARM_UP - 1]
    timed = record.counts[WARM_UP:steps]
    loss, norm = definition(folder, record.initial, record.first_rows)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return {
        "trainable": sum(targets for _, targets in timed) / seconds,
        "all": sum(tokens for tokens, _ in timed) / seconds,
        "peak_memory": peak,
        "memory_rise": peak - record.loaded_rss,
        "steps": steps,
        "tokens_per_step": sum(tokens for tokens, _ in record.counts[:steps]) / steps,
        "targets": sum(targets for _, targets in record.counts[:steps]),
        "first": {
            "loss": record.first_loss + spec.get("plant", 0.0),
            "norm": record.first_norm,
            "defined_loss": loss,
            "defined_norm": norm,
        },
        "final_loss": held_out_loss(folder, record.trained, spec["data"], tokenizer),
        "start_loss": held_out_loss(folder, record.initial, spec["data"], tokenizer),
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
