"""dpo's reference: taken once from the starting model, kept with the run, never taken again."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ingot.data.pairs import answers_of
from ingot.data.plan import Cursor, PlannedFeed
from ingot.data.rows import ListRows
from ingot.errors import CheckpointError
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress
from ingot.ranks import Ranks
from ingot.train.loop import Rows
from ingot.train.preferences import dpo
from ingot.train.reference import FILE, ReferencedRows, with_reference

DPO = {"task": "chat-completion", "method": "dpo", "beta": 0.5, "label_smoothing": 0.1}


@pytest.fixture
def started(make_recipe, make_model, pair_rows):
    """(sharded, rows, recipe) before the first step."""
    recipe = make_recipe(objective=DPO, data={"batches": "padding-free"})
    sharded = parallelize(make_model(), Ranks(), recipe, torch.device("cpu"), torch.float32)
    feed = PlannedFeed(ListRows(pair_rows(30)), recipe.data, recipe.train)
    return sharded, Rows(feed, ListRows(pair_rows(5, seed=2)), pad_id=0), recipe


def referenced(started, folder: Path, *, begun: bool = False) -> Rows:
    sharded, rows, recipe = started
    return with_reference(sharded, rows, recipe, folder, Progress(quiet=True), begun=begun)


def forget(model: torch.nn.Module) -> None:
    """As if it had learned something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_equals_each_answers_log_probability(started, tmp_path):
    sharded, _, _ = started
    found = referenced(started, tmp_path)
    for part in (found.train.rows, found.validation):
        for index in range(len(part)):
            row = part[index]
            for answer, known in zip(answers_of(row), row.reference, strict=True):
                logits = sharded.plain(input_ids=torch.tensor([answer.ids])).logits[0, :-1]
                wanted = torch.tensor(answer.ids[1:]).masked_fill(~torch.tensor(answer.trainable[1:]), -100)
                assert known == pytest.approx(-F.cross_entropy(logits, wanted, reduction="sum").item(), abs=1e-4)


def test_the_first_step_knows_no_preference(started, tmp_path):
    """log 2 a pair without smoothing, whatever beta: the policy is its own reference then."""
    sharded, _, recipe = started
    rows = referenced(started, tmp_path)
    section = recipe.objective.model_copy(update={"label_smoothing": 0.0})
    portion = next(iter(rows.train.start(Cursor())))
    batch = rows.batch([portion.rows[index] for index in portion.indices], recipe, sharded.layout, 0)
    assert dpo(sharded, batch, portion.divisor, section).item() == pytest.approx(0.693147, abs=1e-5)


def test_a_run_that_goes_on_keeps_the_first_numbers(started, tmp_path):
    before = referenced(started, tmp_path)
    forget(started[0].plain)
    after = referenced(started, tmp_path, begun=True)
    assert [after.train.rows[n].reference for n in range(30)] == [before.train.rows[n].reference for n in range(30)]
    assert set(load_file(tmp_path / FILE)) == {"train", "validation"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_run_that_goes_on_without_them_is_refused(started, tmp_path):
    with pytest.raises(CheckpointError, match="cannot go on"):
        referenced(started, tmp_path, begun=True)


def test_numbers_of_other_rows_are_refused(started, pair_rows, tmp_path):
    referenced(started, tmp_path)
    sharded, rows, recipe = started
    feed = PlannedFeed(ListRows(pair_rows(30, seed=5)), recipe.data, recipe.train)
    with pytest.raises(CheckpointError, match="other rows"):
        referenced((sharded, Rows(feed, rows.validation, pad_id=0), recipe), tmp_path)


def test_a_damaged_file_is_refused(started, tmp_path):
    (tmp_path / FILE).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        referenced(started, tmp_path)


def test_dropout_is_off(started, tmp_path, monkeypatch):
    sharded, _, _ = started
    sharded.wrapped.train()
    modes = []
    forward = sharded.plain.forward
    monkeypatch.setattr(sharded.plain, "forward", lambda **kw: modes.append(sharded.plain.training) or forward(**kw))
    referenced(started, tmp_path)
    assert modes
    assert not any(modes)


def test_rows_keep_their_shape(started, pair_rows, tmp_path):
    _, rows, _ = started
    found = referenced(started, tmp_path)
    assert isinstance(found.train.rows, ReferencedRows)
    assert found.train.steps == rows.train.steps
    assert found.train.rows.lengths.tolist() == rows.train.rows.lengths.tolist()
    assert found.train.rows.targets.tolist() == rows.train.rows.targets.tolist()
    assert rows.train.rows[0].reference == pair_rows(30)[0].reference  # the feed that was given is as it was


def test_other_objectives_need_none(started, tmp_path, make_recipe):
    sharded, rows, _ = started
    recipe = make_recipe(objective={"task": "chat-completion", "method": "orpo"})
    assert with_reference(sharded, rows, recipe, tmp_path, Progress(quiet=True), begun=False) is rows
    assert list(tmp_path.iterdir()) == []
