import random

import pytest

from ingot.data.table import ArrowRows, Digests, RowWriter, Texts
from ingot.data.template import Encoded


def rows(n: int, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    found = []
    for number in range(n):
        length = draw.randint(1, 30)
        ids = [draw.randrange(2**31 - 1) for _ in range(length)]
        mask = [draw.random() < 0.5 for _ in range(length)]
        found.append(Encoded(ids, mask, draw.choice([None, [0], [76, -100]]), f"rows é.jsonl:{number}"))
    return found


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("sizes", [[0], [1], [1000, 1000, 3], [5, 0, 7]])
def test_rows_come_back_as_they_were(tmp_path, is_file, sizes):
    path = tmp_path / "train.arrow" if is_file else None
    writer, wanted = RowWriter(path), []
    for size in sizes:
        wanted += (part := rows(size, seed=size))
        writer.add(part)
    writer.close()
    found = ArrowRows.mapped(path) if path else writer.rows()
    assert list(found) == wanted
    assert found.lengths.tolist() == [len(row.ids) for row in wanted]
    assert found.targets.tolist() == [row.n_targets for row in wanted]
    assert len(found) == len(wanted)
    if wanted:
        assert type(found[0].ids[0]) is int
        assert type(found[0].trainable[0]) is bool
    with pytest.raises(IndexError):
        found[len(wanted)]


def test_lengths_of_another_file_are_refused(tmp_path):
    for name, n in (("a", 5), ("b", 6)):
        writer = RowWriter(tmp_path / f"{name}.arrow")
        writer.add(rows(n))
        writer.close()
    (tmp_path / "a.lengths.npy").write_bytes((tmp_path / "b.lengths.npy").read_bytes())
    with pytest.raises(ValueError, match="5 rows, but 6 lengths"):
        ArrowRows.mapped(tmp_path / "a.arrow")


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("n", [0, 1, 30_000])
def test_groups_of_texts_are_in_the_order_that_python_sorts_them_in(tmp_path, is_file, n):
    draw = random.Random(n)
    texts = [
        "".join(draw.choices(["a", "Z", "é", "ß", "z", "\uffff", "😀", " "], k=draw.randint(0, 3))) for _ in range(n)
    ]
    collected, unordered = Texts(tmp_path if is_file else None), Digests()
    for text in texts:
        collected.add(text)
        unordered.add(text)
    groups = collected.groups().tolist()
    number = {text: place for place, text in enumerate(sorted(set(texts)))}
    assert groups == [number[text] for text in texts]
    assert len(set(zip(groups, unordered.groups().tolist(), strict=True))) == len(number)
    assert list(tmp_path.iterdir()) == []
