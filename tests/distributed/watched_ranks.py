"""Trains cells with and without tasks that are measured on the way; run as a script by several ranks.

    python watched_ranks.py CELLS.json OUT     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

A cell is {"name", "sections" of its recipe, "model", "kind": "writes" by default, or "targets" of an encoder-decoder}.
Rank 0 leaves OUT/NAME.json: the curve, the best step, whether the same weights came out without measuring, and how many
rows this rank answered.
"""

import json
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import cells
import torch
import torch.distributed as dist

from ingot.assembly import fuse
from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.evaluation.metrics import statistics_of_texts
from ingot.evaluation.samples import Item
from ingot.model.adapters import attach_adapter
from ingot.model.generate import generate
from ingot.model.score import Group, score
from ingot.model.targets import write
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit
from ingot.train.watch import Watch
from ingot.watching import Measure


class Words:
    """A tokenizer of words: w7 is token 7."""

    eos_token_id, pad_token_id, chat_template = 2, 0, None
    all_special_ids, added_tokens_decoder = (0, 1, 2), {}

    def __call__(self, text_target: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text_target.split() if word[0] == "w"] or [3]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(f"w{int(token)}" for token in ids)

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [self.decode([token for token in row.tolist() if token > 2]) for row in rows]


class Written:
    """What the model writes behind random tokens, beside random words."""

    name, kind = "validation", "text-generation"

    def __init__(self, kind: str) -> None:
        self._targets, self.answered = kind == "targets", 0
        draw = random.Random(5)
        ids = [[draw.randrange(3, cells.VOCABULARY) for _ in range(draw.randint(2, 9))] for _ in range(11)]
        words = [" ".join(f"w{draw.randrange(3, 60)}" for _ in range(40)) for _ in ids]
        self._items = [Item(str(n), "", [text], row) for n, (row, text) in enumerate(zip(ids, words, strict=True))]

    def asked(self) -> dict[str, Any]:
        return {}

    def scoring(self) -> dict[str, Any]:
        return {}

    def windows(self) -> Iterator[list[Item]]:
        yield self._items

    def size(self, item: Item) -> int:
        return len(item.request)

    def answer(self, subject: Any, items: Sequence[Item]) -> list[dict[str, Any]]:
        self.answered += len(items)
        rows = [item.request for item in items]
        if self._targets:
            return [{"text": text} for text in write(subject.model, subject.tokenizer, rows, 8, 60)]
        found = generate(subject.model, subject.tokenizer, rows, max_new_tokens=8, tokens_per_batch=60)
        assert not subject.model.training
        # Likelihoods go through the head by itself; which of two is the larger is one more word.
        pairs = [Group(row, [[7, 9], [11, 12]]) for row in rows]
        scored = score(subject.model, pairs, pad_id=0, tokens_per_batch=60)
        likelier = [int(one.logprob < other.logprob) for one, other in scored]
        return [{"text": f"{it.text} w{40 + place}"} for it, place in zip(found, likelier, strict=True)]

    def predictions(self, items: Sequence[Item], outputs: Sequence[dict[str, Any]]) -> Sequence[str]:
        return [output["text"] for output in outputs]

    def metrics(self, items: Sequence[Item]) -> list[str]:
        return ["rouge1"]

    def compute(self, items: Sequence[Item], outputs: Sequence[dict[str, Any]]) -> Any:
        return statistics_of_texts(self.predictions(items, outputs), [item.references for item in items])


def train(cell: dict[str, Any], out: Path, ranks: Ranks, *, watched: bool) -> dict[str, Any]:
    """Train a cell; what is known of it then."""
    recipe = cells.recipe_of(cell["sections"])
    task = recipe.objective.task
    model = attach_adapter(
        cells.small_model(**cell.get("model", {"kind": "llama"}), task=task), recipe.adapter, task, 0
    )
    if ranks.world > 1:
        fuse(model, recipe, ranks)
    sharded = parallelize(model, ranks, recipe, torch.device("cpu"), torch.float32)
    make: Any = cells.with_targets if model.config.is_encoder_decoder else list
    rows = Rows(
        PlannedFeed(ListRows(make(cells.random_rows(60, 1))), recipe.data, recipe.train),
        ListRows(make(cells.random_rows(7, 2))),
        pad_id=0,
    )
    written = Written(cell.get("kind", "writes"))
    watch = None
    if watched:
        tokenizer: Any = Words()
        watch = Watch(2, Measure(recipe, [written], tokenizer, lambda: None), "rouge1", True)
    losses: list[float] = []
    folder = out / f"{cell['name']} {watched}"
    fitted = fit(
        sharded,
        rows,
        recipe,
        Checkpoints(folder, ranks, "hash", 3),
        on_step=(lambda info: losses.append(info.loss),),
        watch=watch,
    )
    last = {name: cells.whole(value) for name, value in sharded.state().items()}
    curve = [[it.step, *it.scores["rouge1"]] for it in fitted.measured]
    return {"losses": losses, "weights": last, "curve": curve, "best": fitted.best_step, "answered": written.answered}


def both(cell: dict[str, Any], out: Path, ranks: Ranks) -> None:
    """With and without measuring, both to the last step."""
    found, plain = (train(cell, out, ranks, watched=watched) for watched in (True, False))
    weights, others = found.pop("weights"), plain.pop("weights")
    same = all(torch.equal(weights[name], others[name]) for name in weights) and found["losses"] == plain["losses"]
    agreed: list[Any] = [(same, found["curve"], found["best"], found["answered"])]
    if ranks.world > 1:
        agreed = [None] * ranks.world
        dist.all_gather_object(agreed, (same, found["curve"], found["best"], found["answered"]))
    if ranks.main:
        alike = all(it[1:3] == agreed[0][1:3] for it in agreed)
        facts = {"same": all(it[0] for it in agreed), "alike": alike, "answered": [it[3] for it in agreed]}
        (out / f"{cell['name']}.json").write_text(json.dumps(found | facts))


def main() -> None:
    cells_, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, world = dist.get_rank(), dist.get_world_size()
    for cell in cells_:
        try:
            both(cell, out, Ranks(rank, world, rank, world))
        except Exception:
            traceback.print_exc()
            print("in cell", cell["name"], flush=True)
            os._exit(1)  # the other ranks wait in a collective: they are killed
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
