"""The losses of Ingot against TRL's own trainers, on the same rows and weights: loss and gradients.

Rows go through both from the raw form on, so that the batches are the same too. float32, rows of uneven length.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ingot.data.example import to_example
from ingot.data.loader import collate
from ingot.data.pairs import pairs
from ingot.data.plan import Divisor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.data.sources import Row
from ingot.data.template import encode_all
from ingot.model.head import attach, fused_head
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress
from ingot.ranks import Ranks
from ingot.train.distillation import distillation
from ingot.train.loop import Rows
from ingot.train.objectives import next_token
from ingot.train.preferences import dpo, orpo, reward
from ingot.train.reference import with_reference

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
CATALOG = Path(__file__).resolve().parents[3] / "engine" / "ingot" / "catalog" / "nano"
ASKED = ("what is the time?", "send ten euros to Ann", "hello")
ANSWERS = ("it is nine", "I have sent ten euros to Ann, as you asked", "good morning to you")
WRONG = ("I do not know what you mean by that", "no", "what?")
CLOSE = 1e-5


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


CHATS = [{"messages": [turn("user", ask), turn("assistant", good)]} for ask, good in zip(ASKED, ANSWERS, strict=True)]
PAIRS = [
    {"prompt": [turn("user", ask)], "chosen": [turn("assistant", good)], "rejected": [turn("assistant", bad)]}
    for ask, good, bad in zip(ASKED, ANSWERS, WRONG, strict=True)
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CATALOG)


def tiny(kind: type = LlamaForCausalLM, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=2048, max_position_embeddings=128, initializer_range=0.2, **shape, **ids, **settings
    )
    return kind(config)


def trained_by(name: str, tmp_path: Path, **options: Any) -> Any:
    """TRL's arguments for a trainer that only computes losses."""
    import trl

    config = getattr(trl, name, None)
    if config is None:
        from trl.experimental import orpo as module

        config = getattr(module, name)
    plain = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 8}
    return config(output_dir=str(tmp_path), gradient_checkpointing=False, **plain, **options)


@pytest.fixture(params=["logits", "fused head"])
def ours(request, make_recipe) -> Any:
    """ours(model, objective, batches="padded") -> (sharded, recipe)."""

    def made(model: Any, objective: dict[str, Any], batches: str = "padded") -> tuple[Sharded, Any]:
        recipe = make_recipe(objective=objective, data={"max_tokens": 64, "batches": batches})
        if request.param == "fused head" and recipe.objective.loss != "reward":
            assert attach(model, "auto") == (1, None)
        return parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32), recipe

    return made


def encoded(rows: list[dict[str, Any]], tokenizer: Any, recipe: Any) -> list[Any]:
    examples = [to_example(Row(row, f"row:{n}"), recipe.data, recipe.objective) for n, row in enumerate(rows)]
    kept, report = encode_all(examples, tokenizer, recipe.data, recipe.objective, ())
    assert report.count == 0
    return kept


def divisor_of(rows: list[Any]) -> Divisor:
    return Divisor(sum(row.n_targets for row in rows), len(rows))


def same(loss: torch.Tensor, model: Any, theirs: torch.Tensor, other: Any) -> None:
    """Loss and every gradient."""
    assert loss.item() == pytest.approx(theirs.item(), abs=CLOSE)
    loss.backward()
    theirs.backward()
    found = {name: p.grad for name, p in other.named_parameters()}
    largest = 0.0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, found[name], rtol=0, atol=CLOSE, msg=name)
        largest = max(largest, parameter.grad.abs().max().item())
    assert largest > 1e-3


@pytest.mark.parametrize("batches", ["padded", "padding-free"])
def test_sft(ours, tokenizer, tmp_path, batches):
    from datasets import Dataset
    from trl import SFTTrainer

    other = tiny()
    sharded, recipe = ours(tiny(attn_implementation="ingot"), {"task": "chat-completion"}, batches)
    rows = encoded(CHATS, tokenizer, recipe)
    options = trained_by("SFTConfig", tmp_path, assistant_only_loss=True, max_length=64)
    trainer = SFTTrainer(other, options, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer)
    batch = collate(rows, 0, flat=batches != "padded")
    loss = next_token(sharded, batch, divisor_of(rows), recipe.objective)
    same(loss, sharded.plain, trainer.compute_loss(other, next(iter(trainer.get_train_dataloader()))), other)


@pytest.mark.parametrize(("batches", "smoothing"), [("padded", 0.0), ("padding-free", 0.2)])
def test_dpo(ours, tokenizer, tmp_path, batches, smoothing):
    from datasets import Dataset
    from trl import DPOTrainer

    other, start = tiny(seed=0), tiny(seed=5)
    objective = {"task": "chat-completion", "method": "dpo", "beta": 0.3, "label_smoothing": smoothing}
    sharded, recipe = ours(tiny(seed=5, attn_implementation="ingot"), objective, batches)
    rows = encoded(PAIRS, tokenizer, recipe)
    feed = PlannedFeed(ListRows(rows), recipe.data, recipe.train)
    known = with_reference(
        sharded, Rows(feed, ListRows([]), pad_id=0), recipe, tmp_path, Progress(quiet=True), begun=False
    )
    sharded.plain.load_state_dict(tiny(seed=0).state_dict())  # as if it had learned since
    # TRL's DPO has exact label smoothing only in the losses that are named so; its sigmoid has none.
    options = trained_by("DPOConfig", tmp_path, beta=0.3, max_length=64, disable_dropout=True)
    trainer = DPOTrainer(other, start, args=options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    given = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(other, given)
    if smoothing:  # Mitchell (2023): the other way round for a share of the pairs
        half = len(given["input_ids"]) // 2
        turned = {name: torch.cat([value[half:], value[:half]]) for name, value in given.items()}
        theirs = (1 - smoothing) * theirs + smoothing * trainer.compute_loss(other, turned)
    batch = pairs([known.train.rows[n] for n in range(len(rows))], 0, flat=batches != "padded")
    same(dpo(sharded, batch, divisor_of(rows), recipe.objective), sharded.plain, theirs, other)


@pytest.mark.parametrize("batches", ["padded", "padding-free"])
def test_orpo(ours, tokenizer, tmp_path, batches):
    from datasets import Dataset
    from trl.experimental.orpo import ORPOTrainer

    other = tiny()
    objective = {"task": "chat-completion", "method": "orpo", "beta": 0.4}
    sharded, recipe = ours(tiny(attn_implementation="ingot"), objective, batches)
    rows = encoded(PAIRS, tokenizer, recipe)
    options = trained_by("ORPOConfig", tmp_path, beta=0.4, max_length=64)
    other.warnings_issued = {}
    trainer = ORPOTrainer(other, options, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    given = next(iter(trainer.get_train_dataloader()))
    # TRL takes the likelihood of prompt and answer. The paper's (equation 5), and ours, is that of the answer alone: so
    # the same weights are asked for their loss on the prompt's tokens to put one in place of the other.
    ids, mask, labels = (given[f"chosen_{part}"] for part in ("input_ids", "attention_mask", "labels"))
    likelihoods = [other(input_ids=ids, attention_mask=mask, labels=wanted).loss for wanted in
                   (ids.masked_fill(mask == 0, -100), labels)]  # fmt: skip
    theirs = trainer.compute_loss(other, given) - likelihoods[0] + likelihoods[1]
    loss = orpo(sharded, pairs(rows, 0, flat=batches != "padded"), divisor_of(rows), recipe.objective)
    same(loss, sharded.plain, theirs, other)


@pytest.mark.parametrize("pad_id", [0, 2], ids=["own pad", "pad is eos"])
def test_reward(ours, tokenizer, tmp_path, pad_id):
    from datasets import Dataset
    from trl import RewardTrainer

    model = tiny(LlamaForSequenceClassification, num_labels=1)
    model.config.pad_token_id = pad_id
    other = copy.deepcopy(model)
    sharded, recipe = ours(model, {"task": "reward"})
    rows = encoded(PAIRS, tokenizer, recipe)
    asked = copy.deepcopy(tokenizer)
    asked.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    options = trained_by("RewardConfig", tmp_path, max_length=64, disable_dropout=True)
    trainer = RewardTrainer(other, options, train_dataset=Dataset.from_list(PAIRS), processing_class=asked)
    given = next(iter(trainer.get_train_dataloader()))
    # Batches are filled up with the tokenizer's pad token, whatever the model calls padding.
    loss = reward(sharded, pairs(rows, 0), divisor_of(rows), recipe.objective)
    same(loss, sharded.plain, trainer.compute_loss(other, given), other)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(ours, tokenizer, temperature):
    from trl.experimental.gkd import GKDTrainer

    objective = {"task": "chat-completion", "method": "distillation", "teacher": "any", "temperature": temperature}
    sharded, recipe = ours(tiny(), objective)
    sharded.teacher = tiny(seed=7).eval().requires_grad_(False)
    if fused_head(sharded.plain) is not None:
        attach(sharded.teacher, "auto")
    other, teacher = tiny(), tiny(seed=7)
    rows = encoded(CHATS, tokenizer, recipe)
    batch = collate(rows, 0)
    given = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT}
    with torch.no_grad():
        taught = teacher(**given).logits[:, :-1]
    # beta 0 is KL(teacher || student); it has no factor of the squared temperature.
    theirs = temperature**2 * GKDTrainer.generalized_jsd_loss(
        other(**given).logits[:, :-1], taught, batch.labels_BT[:, 1:], beta=0, temperature=temperature
    )
    same(distillation(sharded, batch, divisor_of(rows), recipe.objective), sharded.plain, theirs, other)
