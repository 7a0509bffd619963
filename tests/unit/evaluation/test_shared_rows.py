"""Rows that training saw: planted ones are found by the way that they were planted for, and others are not."""

import csv
import json
import random
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ingot.data.seen import File, Seen, in_file
from ingot.evaluation import shared_rows
from ingot.evaluation.shared_rows import Hit, Index

PEOPLE = ["Amanda", "Josie", "the baker", "a farmer", "Mr. Chen", "our teacher", "the twins", "my uncle", "Ines"]
VERBS = ["buys", "sells", "counts", "paints", "carries", "finds", "borrows", "mends", "wraps", "weighs"]
THINGS = ["apples", "red bricks", "old books", "tickets", "boxes of chalk", "lamps", "kites", "bags of rice", "shirts"]
PLACES = ["at the market", "in the harbour", "near the old mill", "for the school fair", "on the way home", "at noon"]


def stories(seed: int, count: int, sentences: int = 4) -> list[str]:
    """Word problems that share words and phrases, as real rows of a set do."""
    draw = random.Random(seed)
    return [
        " ".join(
            f"{draw.choice(PEOPLE)} {draw.choice(VERBS)} {draw.randrange(2, 90)} {draw.choice(THINGS)} "
            f"{draw.choice(PLACES)}."
            for _ in range(sentences)
        )
        for _ in range(count)
    ]


def found(test: Iterable[Any], train: Iterable[Any], **settings: Any) -> list[Hit]:
    """Hits of texts, or of (question, answers), in texts or in tuples of parts."""
    rows = [(it, []) if isinstance(it, str) else it for it in test]
    index = Index(rows, **settings)
    parts = ((it,) if isinstance(it, str) else it for it in train)
    for _ in index.scan(Seen(f"t:{n}", it) for n, it in enumerate(parts)):
        pass
    return index.hits()


def rows_of(hits: Sequence[Hit], way: str) -> dict[int, str]:
    return {hit.row: hit.where for hit in hits if hit.way == way}


def test_planted_rows_are_found_by_their_way_and_others_are_not() -> None:
    test = stories(1, 60)
    train = stories(2, 3000)
    train[100] = f"  {test[0].upper()}\n"  # the same text
    train[200] = f"{stories(3, 1, 9)[0]} {test[1]} {stories(4, 1, 9)[0]}"  # within a long document
    train[300] = test[2].replace(test[2].split()[0], "Somebody", 1)  # another name
    words = test[3].split()
    train[400] = " ".join(words[: len(words) // 2])  # half of it: neither way's threshold
    hits = found(test, train)
    assert rows_of(hits, "exact") == {0: "t:100"}
    assert rows_of(hits, "ngram") == {0: "t:100", 1: "t:200", 2: "t:300"}
    assert rows_of(hits, "minhash") == {0: "t:100", 2: "t:300"}
    assert {hit.text for hit in hits} == {"prompt"}
    by = {(hit.row, hit.way): hit.similarity for hit in hits}
    assert by[0, "exact"] == by[0, "minhash"] == by[0, "ngram"] == by[1, "ngram"] == 1.0
    assert 0.8 <= by[2, "minhash"] < 1
    assert 0.8 <= by[2, "ngram"] < 1


def test_ways_and_thresholds_are_as_asked() -> None:
    test = stories(1, 3)
    words = test[0].split()
    train = [*stories(2, 300), " ".join(words[: len(words) // 2 + 3])]
    assert found(test, train, ways=["exact"]) == []
    assert rows_of(found(test, train, threshold=0.3), "ngram") == {0: "t:300"}
    assert {hit.way for hit in found(test, test, ways=["exact", "ngram"])} == {"exact", "ngram"}
    assert rows_of(found(test, [" ".join(words[:10])], ngram=5, threshold=0.2), "ngram") == {0: "t:0"}


def test_question_and_answer_are_looked_for_together_and_apart() -> None:
    questions, answers = stories(1, 6), stories(5, 6, 2)
    test = [(question, [answer]) for question, answer in zip(questions, answers, strict=True)]
    train = [*((it, "x y") for it in stories(2, 200)), (questions[0], answers[0]), (questions[1], stories(6, 1)[0])]
    hits = found(test, train)
    assert {(hit.row, hit.text) for hit in hits if hit.way == "exact"} == {(0, "prompt"), (0, "whole"), (1, "prompt")}
    assert {(hit.row, hit.text) for hit in hits if hit.way == "minhash"} == {(0, "prompt"), (0, "whole"), (1, "prompt")}
    # One column with both, as of pretraining.
    joined = found(test, [f"{questions[2]} {answers[2]}"])
    assert (2, "exact", "whole") in {hit[:3] for hit in joined}
    # A short answer is no likeness, and no match by itself.
    labels = [("how do I top up my card", ["card lost yesterday in town"]), ("where is it", ["yes"])]
    assert found(labels, [("how can I freeze my card", "card lost yesterday in town"), ("no idea", "yes")]) == []
    question, answer = "红色的球放在桌子上面", "它是一个很大的红色的球"
    chinese = found([(question, [answer])], [("x", "y"), (question, answer)], ways=["minhash"])
    assert {hit.text for hit in chinese} == {"prompt", "whole"}
    several = found([(questions[0], answers)], [(questions[0], answers[4])], ways=["exact"])
    assert {hit.text for hit in several} == {"prompt", "whole"}


def test_what_all_rows_share_is_no_likeness() -> None:
    template = f"Read the following problem with care, think step by step, and write the number: {stories(9, 1)[0]}"
    numbers = [str(n) for n in random.Random(0).sample(range(10**6), 700)]
    test, train = ([f"{template} {n}" for n in part] for part in (numbers[:100], numbers[100:]))
    assert found(test, train) == []
    train[5] = test[7]
    assert rows_of(found(test, train), "exact") == {7: "t:5"}


def test_likeness_beside_a_template_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long template common to all rows, and little that is their own: that decides."""
    template = " ".join(stories(9, 8))
    own, others = stories(1, 20), stories(2, 2000)
    changed = f"{own[3]} indeed"
    test, train = ([f"{template} {text}" for text in texts] for texts in (own, others))
    train[900] = f"{template} {changed}"
    assert rows_of(found(test, train), "minhash") == {3: "t:900"}
    # The template shows only after signatures were made without knowing of it.
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 1000)
    assert rows_of(found([*test, own[0]], [changed, own[0], *stories(4, 998), *train]), "minhash")[3] == "t:1900"


def test_a_source_among_others_has_a_template_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of 12,000 rows: too few of all to be common, but not of their block."""
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 1000)
    template = stories(9, 1, 6)[0]
    test, train = ([f"{template} {n}" for n in numbers] for numbers in (range(50), range(100, 1100)))
    assert found(test, [*stories(2, 11000, 2), *train]) == []


def test_scripts_without_blanks_are_compared_by_characters() -> None:
    test = [
        "小明有五个苹果，他又买了三个，请问他现在一共有几个苹果？",
        "红色的球放在桌子上面。",
        "今日はとても良い天気なので散歩に行きました。",
    ]
    train = ["蓝色的鱼住在很深的海里。", test[0].replace("明", "红"), test[0].replace("三", "七"), test[2].rstrip("。")]
    hits = found(test, train)
    assert rows_of(hits, "exact") == {}
    assert rows_of(hits, "ngram") == rows_of(hits, "minhash") == {0: "t:1", 2: "t:3"}
    assert found(test, train[2:3]) == []  # another number, in the middle of 25 characters
    assert rows_of(found(["ＡＢＣ ﬁnd it"], ["abc find it"]), "exact") == {0: "t:0"}


def test_short_rows_are_not_found_within_others() -> None:
    train = ["yes I know where my card is and what to do", "Hello there"]
    assert found(["my card", "what", "hello there"], train) == [
        Hit(2, "exact", "prompt", "t:1", 1.0),
        Hit(2, "minhash", "prompt", "t:1", 1.0),
    ]
    eight = "where can I find my card right now"
    assert rows_of(found([eight], [f"please, {eight}, if you can"]), "ngram") == {0: "t:0"}


@pytest.mark.parametrize("train", [[], [()], ["", " "], [("", "")], ["?!"]])
def test_empty_texts_match_nothing(train: list[Any]) -> None:
    assert found(["", " ", ("", [""]), ("", []), "text"], train) == []
    assert found([], stories(1, 3)) == []


def test_punctuation_alone_is_only_exact() -> None:
    assert found(["?!"], ["?!"]) == [Hit(0, "exact", "prompt", "t:0", 1.0)]


def test_the_same_is_found_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    test = stories(1, 80)
    train = [*stories(2, 400), *(it.replace("buys", "takes") for it in test[::3]), *test[::7]]
    whole = found(test, train)
    assert len({hit.row for hit in whole}) > 25
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 37)
    assert found(test, train) == whole
    monkeypatch.setattr(shared_rows, "BLOCK_CHARACTERS", 500)
    assert found(test, train) == whole


def test_training_rows_stream_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 rows, hits among them, no more than two blocks are alive at a time."""
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 50)
    alive: weakref.WeakSet[Seen] = weakref.WeakSet()
    most, test = 0, stories(1, 20)

    class Tracked(Seen):
        __hash__ = object.__hash__

    def rows() -> Iterator[Seen]:
        nonlocal most
        for number, text in enumerate(stories(2, 3000)):
            row = Tracked(f"t:{number}", (test[number // 150] if number % 150 == 0 else text,))
            alive.add(row)
            most = max(most, len(alive))
            yield row

    index = Index([(text, []) for text in test])
    for read in index.scan(rows()):
        assert read.rows == 50
    assert len({hit.row for hit in index.hits()}) == 20
    assert 50 <= most <= 100


def test_a_limit_of_words_is_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "BLOCK_ROWS", 10)
    test, train = stories(1, 5), [Seen(str(n), (text,)) for n, text in enumerate(stories(2, 100))]
    index = Index([(text, []) for text in test])
    read = list(index.scan([*train, Seen("late", (test[0],))], most_words=400))
    assert index.stopped
    assert 400 <= sum(it.words for it in read) == index.seen_words < 400 + max(it.words for it in read)
    assert index.hits() == []
    index = Index([(text, []) for text in test])
    assert sum(it.rows for it in index.scan(train, most_words=10**6)) == 100
    assert not index.stopped


def test_many_rows_that_are_all_alike_take_no_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of 400 x 3,000 rows shares bands; a test row is compared with a few of them."""
    compared = 0
    real = shared_rows.overlap.similarity

    def counted(*sets: Any) -> float:
        nonlocal compared
        compared += 1
        return real(*sets)

    monkeypatch.setattr(shared_rows.overlap, "similarity", counted)
    frames = stories(7, 40, 3)  # each in 2.5 % of the rows: too few to be common
    train, test = ([f"{frames[n % 40]} {n + first}" for n in range(count)] for first, count in ((0, 3000), (9000, 400)))
    hits = found(test, train)
    assert len(rows_of(hits, "minhash")) == 400
    assert compared <= 400 * shared_rows.CANDIDATES


# --- real sets ---


def real(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines]


def test_banking77_has_rows_of_its_training_set_in_its_test_set(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "banking77"
    test = real(folder / "test.csv")
    index = Index((row["text"], [row["category"]]) for row in test)
    for _ in index.scan(in_file(File("train.csv", folder, "x"))):
        pass
    hits = index.hits()
    train = {" ".join(row["text"].casefold().split()) for row in real(folder / "train.csv")}
    expected = {n for n, row in enumerate(test) if " ".join(row["text"].casefold().split()) in train}
    assert set(rows_of(hits, "exact")) == expected
    assert len(expected) == 7
    texts = {test[hit.row]["text"] for hit in hits if hit.way == "minhash" and hit.row not in expected}
    assert "what is the top up limit" in texts  # `What is the top-up limit?`
    assert "Pending transfer?" not in texts  # though it is the label of 148 rows
    assert 20 < len(texts) < 60


def test_dialogsum_has_dialogues_in_both_of_its_parts(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "dialogsum"
    test = real(folder / "test.jsonl")
    index = Index((row["dialogue"], [row["summary1"]]) for row in test)
    for _ in index.scan(in_file(File("dev.jsonl", folder, "x"))):
        pass
    hits = index.hits()
    assert [len(rows_of(hits, way)) for way in ("exact", "ngram", "minhash")] == [6, 10, 10]
