"""Poison is found by halves, what fails for a moment is tried again, and no error holds the row."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ingot.batching.answering import Patience, isolated, require_alive, seeded
from ingot.batching.rows import Entry, Failure
from ingot.errors import IngotError
from ingot.model.sampling import InputError

ENTRIES = [Entry(place, place, f"a:{place}", {"text": f"secret {place}"}) for place in range(64)]


class Model:
    """Answers with the places; `fails`: place -> error."""

    def __init__(self, fails: dict[int, Exception] | None = None, moments: int = 0) -> None:
        self.fails, self.moments = fails or {}, moments
        self.asked: list[int] = []

    def __call__(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        self.asked.append(len(entries))
        if self.moments:
            self.moments -= 1
            raise RuntimeError("of the moment")
        for entry in entries:
            if entry.place in self.fails:
                raise self.fails[entry.place]
        return [{"place": entry.place} for entry in entries]


def patient(retries: int = 2) -> tuple[Patience, list[float]]:
    waited: list[float] = []
    return Patience(retries, sleep=waited.append), waited


def test_poison_is_found_by_halves_and_the_others_are_answered() -> None:
    model = Model({5: InputError("text", "5 tokens too many"), 40: InputError("text", "no token")})
    patience, waited = patient()
    found = isolated(model, ENTRIES, patience)
    assert found[5] == Failure("text", "5 tokens too many")
    assert found[40] == Failure("text", "no token")
    assert [one for one in found if not isinstance(one, Failure)] == [
        {"place": n} for n in range(64) if n not in (5, 40)
    ]
    assert len(model.asked) <= 1 + 2 * 2 * 6  # two halves a level and poisoned row
    assert waited == []


def test_what_fails_for_a_moment_is_tried_again_with_longer_waits() -> None:
    patience, waited = patient(3)
    model = Model(moments=3)
    assert isolated(model, ENTRIES, patience) == [{"place": n} for n in range(64)]
    assert waited == [1.0, 2.0, 4.0]
    assert model.asked == [64] * 4


def test_an_unexpected_error_is_told_by_its_name_only() -> None:
    patience, _ = patient(1)
    found = isolated(Model({9: ValueError("secret 9")}), ENTRIES, patience)
    assert found[9] == Failure("row", "ValueError while the row was answered", unexpected=True)
    assert sum(isinstance(one, Failure) for one in found) == 1


def test_rows_that_need_more_memory_are_asked_in_halves_at_once() -> None:
    def ask(entries: Sequence[Entry]) -> list[dict[str, Any]]:
        if len(entries) > 8:
            raise torch.OutOfMemoryError("of the device")
        return [{"place": entry.place} for entry in entries]

    patience, waited = patient()
    assert isolated(ask, ENTRIES, patience) == [{"place": n} for n in range(64)]
    assert waited == []
    alone = isolated(Model({3: torch.OutOfMemoryError("x")}), ENTRIES[3:4], patience)
    assert alone == [Failure("row", "the memory is not enough for this row")]


def test_errors_that_the_user_can_mend_end_it() -> None:
    with pytest.raises(IngotError, match="quota"):
        isolated(Model({0: IngotError("quota")}), ENTRIES, patient()[0])


def test_a_model_that_answers_nothing_is_told_from_rows_that_are_wrong() -> None:
    lost, wrong = Failure("row", "RuntimeError", unexpected=True), Failure("text", "no token")
    with pytest.raises(IngotError, match="answers no row any more"):
        require_alive([lost, lost])
    require_alive([lost])
    require_alive([lost, wrong])
    require_alive([lost, {"a": 1}])
    require_alive([])


def test_draws_differ_between_buckets_and_not_between_starts() -> None:
    params = {"temperature": 1.0, "seed": 7}
    first, second = seeded(params, ENTRIES[:4]), seeded(params, ENTRIES[4:8])
    assert first == seeded(params, ENTRIES[:8])
    assert first["seed"] != second["seed"]
    assert first["seed"] != seeded({"temperature": 1.0, "seed": 8}, ENTRIES[:4])["seed"]
    for plain in ({"temperature": 0, "seed": 7}, {"temperature": 1.0}, {"temperature": 1.0, "seed": -1}):
        assert seeded(plain, ENTRIES) == plain
