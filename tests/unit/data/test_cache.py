"""The cache of encoded rows: what hits, what misses, who encodes, and what happens when the disk or a process fails."""

import json
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ingot.data import cache, splits
from ingot.data.cache import Question
from ingot.data.splits import load_splits
from ingot.data.template import encode_all
from ingot.errors import DataError
from ingot.progress import Progress
from ingot.recipe_io import parse_recipe

ROOT = Path(__file__).resolve().parents[3]


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def recipe(task: str = "text-generation", train_on: str = "all-assistant", sections: dict | None = None, **data):
    return parse_recipe(
        {
            "name": "t",
            "model": {"source": "unused"},
            "data": {"train": "train.jsonl", "max_tokens": 64, "cache": "cache", **data},
            "objective": {"task": task, "train_on": train_on},
            **(sections or {}),
        }
    )


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(n: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"item {k} costs", "completion": f" {k * 7 % 50} euros"} for k in range(start, start + n)]


CHATS = [
    {"messages": [{"role": role, "content": f"{role} says {n}"} for role in ("user", "assistant") * 2]}
    for n in range(40)
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", answers(60))
    write(tmp_path / "chats.jsonl", CHATS)
    write(tmp_path / "classes.jsonl", [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(60)])
    return tmp_path


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read and what was tokenized, in the order of the calls."""
    calls: list[str] = []

    def count(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kw: (calls.append(name), real(*args, **kw))[1])

    for module, name in ((cache, "encode_all"), (cache, "prompt_ids"), (splits, "read_rows")):
        count(module, name)
    return calls


def entry_of(home: Path) -> Path:
    [found] = [path for path in (home / "cache").iterdir() if not path.name.startswith(".")]
    return found


# --- what is in it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["text-generation", "chat-completion", "text-classification"])
def test_a_second_run_gets_the_same_and_reads_and_tokenizes_nothing(home, tiny_tokenizer, work, task):
    files = {"chat-completion": "chats.jsonl", "text-classification": "classes.jsonl"}
    asked = recipe(task, train=files.get(task, "train.jsonl"))
    parts = load_splits(asked, home)
    settings = (tiny_tokenizer, asked.data, asked.objective, parts.labels)
    wanted, dropped = encode_all(parts.train, *settings)
    watched, _ = encode_all(parts.validation, *settings)
    notes = Notes()
    first = cache.encoded(asked, home, tiny_tokenizer, notes)
    assert not any("from the cache" in said for said in notes.said)
    assert {"encode_all", "read_rows"} <= set(work)
    work.clear()
    second = cache.encoded(asked, home, tiny_tokenizer, notes)
    assert work == []
    assert any(f"{len(wanted) + len(watched)} rows from the cache" in said for said in notes.said)
    for found in (first, second):
        assert list(found.train) == wanted
        assert list(found.validation) == watched
        assert found.train.lengths.tolist() == [len(row.ids) for row in wanted]
        assert found.train.targets.tolist() == [
            len(row.labels) if row.labels is not None else sum(row.trainable[1:]) for row in wanted
        ]
        assert (found.facts.labels, found.facts.report) == (parts.labels, parts.report)
        assert found.facts.dropped == dropped
        assert [question.where for question in found.facts.questions] == [row.where for row in parts.test]
        assert found.facts.sources == [len(wanted)]
    assert second.facts == first.facts


def test_questions_are_what_the_checks_before_training_need(home, tiny_tokenizer):
    found = cache.encoded(recipe(), home, tiny_tokenizer, Notes())
    test = load_splits(recipe(), home).test
    question = found.facts.questions[0]
    assert question == Question(
        test[0].where,
        test[0].prompt,
        test[0].completion,
        len(tiny_tokenizer(test[0].prompt, add_special_tokens=False)["input_ids"]),
    )
    assert found.facts.example == {"input_string": test[0].prompt}


def test_rows_are_mapped_and_not_read(home, tiny_tokenizer):
    cache.encoded(recipe(), home, tiny_tokenizer, Notes())
    before = pa.total_allocated_bytes()
    found = cache.encoded(recipe(), home, tiny_tokenizer, Notes())
    assert isinstance(found.train.lengths, np.memmap)
    assert isinstance(found.train.targets, np.memmap)
    _ = [found.train[index] for index in range(len(found.train))]
    assert pa.total_allocated_bytes() == before
    with pytest.raises(IndexError):
        found.train[len(found.train)]


def test_a_cleared_cache_leaves_open_rows_readable(home, tiny_tokenizer):
    found = cache.encoded(recipe(), home, tiny_tokenizer, Notes())
    wanted = list(found.train)
    assert [(entry["name"], entry["rows"]) for entry in cache.entries(home / "cache")] == [
        (entry_of(home).name, len(found.train) + len(found.validation))
    ]
    assert cache.clear(home / "cache") > 1000
    assert cache.entries(home / "cache") == []
    assert list(found.train) == wanted


def test_a_mixture_keeps_its_rows_in_the_order_of_its_sources(home, tiny_tokenizer):
    write(home / "a.jsonl", answers(1500))
    write(home / "b.jsonl", answers(1700, start=5000))
    found = cache.encoded(recipe(train=["a.jsonl", "b.jsonl"]), home, tiny_tokenizer, Notes())
    places = [row.where.split(":") for row in found.train]
    assert places == sorted(places, key=lambda place: (place[0], int(place[1])))
    names = [name for name, _ in places]
    assert found.facts.sources == [names.count("a.jsonl"), names.count("b.jsonl")]
    assert found.facts.report.sources == {
        "train[0]": names.count("a.jsonl"),
        "train[1]": names.count("b.jsonl"),
    }
    # Drawn parts are taken from each source, in proportion.
    for drawn in (found.facts.questions, found.validation):
        taken = [row.where.split(":")[0] for row in drawn]
        assert abs(taken.count("a.jsonl") / len(taken) - 1500 / 3200) < 0.01


def test_a_source_without_a_trainable_token_is_named(home, tiny_tokenizer):
    write(home / "long.jsonl", [{"prompt": "word " * 100 + str(n), "completion": "x"} for n in range(20)])
    with pytest.raises(DataError, match=r"none of 1[678] training rows of data\.train\[1\] keeps a trainable token"):
        cache.encoded(recipe(train=["train.jsonl", "long.jsonl"]), home, tiny_tokenizer, Notes())
    assert list((home / "cache").iterdir()) == [home / "cache" / cache.LOCKS]  # nothing is left behind


# --- hits and misses -------------------------------------------------------------------------------------------


def change_a_byte(home, options, kinds):
    path = home / options["train"]
    path.write_bytes(path.read_bytes().replace(b"says 3", b"says 5", 1))


def change_the_name(home, options, kinds):
    shutil.copy(home / options["train"], home / "other.jsonl")
    options["train"] = "other.jsonl"


def change_a_given_part(home, options, kinds):
    write(home / "test.jsonl", CHATS[:4])


CHANGES = {
    "a byte of the data": change_a_byte,
    "the name of the file": change_the_name,
    "a byte of the test rows": change_a_given_part,
    "max_tokens": lambda home, options, kinds: options.update(max_tokens=32),
    "max_target_tokens": lambda home, options, kinds: options.update(max_target_tokens=32),
    "overlap_tokens": lambda home, options, kinds: options.update(overlap_tokens=32),
    "train_on": lambda home, options, kinds: options.update(train_on="last-assistant"),
    "split_seed": lambda home, options, kinds: options.update(split_seed=1),
    "validation_share": lambda home, options, kinds: options.update(validation_share=0.3),
    "max_bad_rows": lambda home, options, kinds: options.update(max_bad_rows=1),
    "the chat template": lambda home, options, kinds: kinds.update(blank="  "),
    "the tokenizer": lambda home, options, kinds: kinds.update(eos_token="<|im_end|>"),
    "how the tokenizer cuts": lambda home, options, kinds: kinds.update(trim_offsets=True),
}


@pytest.fixture
def run(home, make_tokenizer, marked_template, work):
    """run(options, kinds) -> whether anything was encoded."""

    def go(options: dict, kinds: dict) -> bool:
        kinds = dict(kinds)
        template = marked_template + kinds.pop("blank", "")
        work.clear()
        asked = recipe("chat-completion", **options)
        cache.encoded(asked, home, make_tokenizer(template, **kinds), Notes())
        return "encode_all" in work

    return go


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_rows_misses_when_it_changes(home, run, change):
    write(home / "test.jsonl", CHATS[:3])
    options, kinds = {"train": "chats.jsonl", "test": "test.jsonl"}, {}
    assert run(options, kinds)
    assert not run(options, kinds)
    CHANGES[change](home, options, kinds)
    assert run(options, kinds)
    assert not run(options, kinds)


def test_the_share_of_hidden_tokens_decides_how_many_are_learned(home):
    texts = {"columns": {"text": "prompt"}}
    sections = [{"objective": {"task": "fill-mask", "mask_share": share}} for share in (0.15, 0.15, 0.3)]
    first, again, other = (cache.key_of(recipe(sections=it, **texts), home, _Tokenizer()) for it in sections)
    assert first == again != other


def test_changed_code_and_changed_packages_miss(home, run, monkeypatch, tmp_path):
    options = {"train": "chats.jsonl"}
    assert run(options, {})
    code = tmp_path / "code"
    shutil.copytree(cache.CODE, code, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "CODE", code)
    assert not run(options, {})  # the same files elsewhere
    (code / "synthetic" / "values.py").write_text((code / "synthetic" / "values.py").read_text() + "\n")
    assert run(options, {})
    monkeypatch.setattr(cache, "version", lambda name: "0")
    assert run(options, {})


@pytest.mark.parametrize(
    "options",
    [
        {"batches": "padded"},
        {"sections": {"optim": {"lr": 0.5}}},
        {"sections": {"train": {"epochs": 7, "seed": 3, "tokens_per_step": 64}}},
        {"sections": {"evaluate": {"max_rows": 5}, "adapter": {"rank": 4}, "name": "other"}},
        {"train": {"uri": "chats.jsonl", "weight": 3}},
    ],
    ids=str,
)
def test_what_does_not_decide_the_rows_hits(run, options):
    assert run({"train": "chats.jsonl"}, {})
    assert not run({"train": "chats.jsonl", **options}, {})


def test_the_same_data_in_another_place_hits(home, run, tmp_path_factory):
    assert run({"train": "chats.jsonl"}, {})
    [entry] = cache.entries(home / "cache")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(home / "chats.jsonl", elsewhere)
    assert (
        cache.key_of(recipe(train="chats.jsonl"), elsewhere, _Tokenizer())["rows"]
        == json.loads((home / "cache" / entry["name"] / "facts.json").read_text())["key"]["rows"]
    )


def test_saved_data_sets_are_known_by_their_fingerprint(home, run):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(CHATS).save_to_disk(str(home / "saved"))
    assert run({"train": "saved"}, {})
    assert not run({"train": "saved"}, {})
    shutil.rmtree(home / "saved")
    datasets.Dataset.from_list(CHATS[1:]).save_to_disk(str(home / "saved"))
    assert run({"train": "saved"}, {})


def test_generated_sets_are_known_by_name_and_split(home, run):
    options = {"train": {"uri": "ingot://tool-calls", "split": "validation"}, "max_tokens": 256}
    assert run(options, {})
    assert not run(options, {})
    assert run({**options, "train": {"uri": "ingot://tool-calls", "split": "test"}}, {})


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path / "env"))
    assert cache.cache_folder(recipe(cache=None).data, tmp_path) == tmp_path / "env"
    assert cache.cache_folder(recipe(cache="here").data, tmp_path) == tmp_path / "here"
    assert cache.cache_folder(recipe(cache="/abs").data, tmp_path) == Path("/abs")
    monkeypatch.delenv("INGOT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder(recipe(cache=None).data, Path("/x")) == tmp_path / ".cache" / "ingot"


# --- a disk that fails -----------------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "rows cut": lambda entry: cut_in_half(entry / "train.arrow"),
    "rows of zeros": lambda entry: (entry / "train.arrow").write_bytes(b"\0" * (entry / "train.arrow").stat().st_size),
    "lengths gone": lambda entry: (entry / "train.lengths.npy").unlink(),
    "lengths of zeros": lambda entry: (entry / "train.lengths.npy").write_bytes(
        b"\0" * (entry / "train.lengths.npy").stat().st_size
    ),
    "facts cut": lambda entry: cut_in_half(entry / "facts.json"),
    "facts of another kind": lambda entry: (entry / "facts.json").write_text("[]"),
    "questions gone": lambda entry: (entry / "questions.jsonl").unlink(),
    "everything gone": lambda entry: [path.unlink() for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again_and_said(home, tiny_tokenizer, work, damage):
    wanted = list(cache.encoded(recipe(), home, tiny_tokenizer, Notes()).train)
    DAMAGES[damage](entry_of(home))
    work.clear()
    notes = Notes()
    assert list(cache.encoded(recipe(), home, tiny_tokenizer, notes).train) == wanted
    assert "encode_all" in work
    assert sum("damaged" in said for said in notes.said) == 1
    work.clear()
    assert list(cache.encoded(recipe(), home, tiny_tokenizer, notes).train) == wanted
    assert work == []


def test_a_folder_that_cannot_be_written_leaves_the_rows_in_memory(home, tiny_tokenizer, work):
    wanted = list(cache.encoded(recipe(), home, tiny_tokenizer, Notes()).train)
    (home / "file").write_text("in the way")
    for _ in range(2):
        work.clear()
        notes = Notes()
        found = cache.encoded(recipe(cache="file/cache"), home, tiny_tokenizer, notes)
        assert list(found.train) == wanted
        assert "encode_all" in work
        assert any("cannot be used (Not a directory); the memory holds the rows" in said for said in notes.said)


def test_a_full_disk_leaves_the_rows_in_memory_and_nothing_behind(home, tiny_tokenizer):
    write(home / "train.jsonl", answers(3000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    notes = Notes()
    try:
        found = cache.encoded(recipe(), home, tiny_tokenizer, notes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any("cannot be used" in said for said in notes.said), notes.said
    assert [path.name for path in (home / "cache").iterdir()] == [cache.LOCKS]
    assert list(found.train) == list(cache.encoded(recipe(), home, tiny_tokenizer, Notes()).train)


def test_data_that_changes_while_it_is_read_is_told(home, tiny_tokenizer, monkeypatch):
    real = cache.scan

    def scan_then_append(*args):
        found = real(*args)
        write(home / "train.jsonl", answers(61))
        return found

    monkeypatch.setattr(cache, "scan", scan_then_append)
    with pytest.raises(DataError, match="was changed while it was read"):
        cache.encoded(recipe(), home, tiny_tokenizer, Notes())


def test_encoding_holds_a_thousand_rows_and_not_all(home, monkeypatch):
    """No drawn splits: what grows with the rows is a few numbers a row."""
    monkeypatch.setattr(cache, "encode_all", fake_encode_all)
    peaks = []
    for n in (2_000, 10_000):
        write(home / "train.jsonl", [{"text": f"{k} " + "word " * 200} for k in range(n)])
        asked = recipe("language-modeling", validation_share=0.0, test_share=0.0, max_tokens=1024)
        tracemalloc.start()
        cache.encoded(asked, home, _Tokenizer(), Notes())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 8_000 < 100, peaks  # bytes a row; a row itself has more than 1000


# --- several processes -----------------------------------------------------------------------------------------


class _Tokenizer:
    """Enough of one for the key; `fake_encode_all` asks for no more."""

    chat_template = None
    init_kwargs: dict = {}  # noqa: RUF012
    special_tokens_map: dict = {}  # noqa: RUF012
    is_fast = True

    class backend_tokenizer:  # noqa: N801
        @staticmethod
        def to_str() -> str:
            return "none"


def fake_encode_all(examples, tokenizer, data, objective, labels):
    from ingot.data.template import DroppedReport, Encoded

    rows = [Encoded([1, 2, 3], [True] * 3, None, example.where) for example in examples]
    return rows, DroppedReport(len(rows), 0, 0)


# A process without torch and transformers: importing them would take most of the test's time.
PROCESS = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{engine!r}, {tests!r}]
import test_cache
from ingot.data import cache
home, first, mode = Path({home!r}), {first}, {mode!r}
real = test_cache.fake_encode_all
def encode(*args):
    with open(home / "log", "a") as log:
        log.write(f"{{os.getpid()}}\\n")
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({seconds})
    return real(*args)
cache.encode_all = encode
notes = test_cache.Notes()
asked = test_cache.recipe("language-modeling", train="lines.jsonl", validation_share=0.0, test_share=0.0)
found = cache.encoded(asked, home, test_cache._Tokenizer(), notes, first=first)
print(len(found.train), found.train[0].where, *notes.said, sep="|")
"""


def start(home: Path, *, first: bool = True, mode: str = "", seconds: float = 1.0) -> subprocess.Popen[str]:
    code = PROCESS.format(
        engine=str(ROOT / "engine"),
        tests=str(Path(__file__).parent),
        home=str(home),
        first=first,
        mode=mode,
        seconds=seconds,
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said_by(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    return out


@pytest.fixture
def lines(home: Path) -> Path:
    write(home / "lines.jsonl", [{"text": f"line {n}"} for n in range(50)])
    return home


def test_of_processes_that_start_together_one_encodes(lines):
    processes = [start(lines, first=number == 2) for number in range(3)]
    said = [said_by(process) for process in processes]
    assert all(text.startswith("50|lines.jsonl:1") for text in said), said
    assert len((lines / "log").read_text().split()) == 1
    assert sum("50 rows from the cache" in text for text in said) == 2
    assert "waiting" not in said[2] or "from the cache" in said[2]


def test_a_killed_encoder_leaves_no_lock_and_no_entry(lines):
    process = start(lines, mode="die")
    process.communicate(timeout=120)
    assert process.returncode == -9
    left = [path.name for path in (lines / "cache").iterdir()]
    assert any(name.startswith(".lines.jsonl-") for name in left)  # half an entry, under a name that nobody opens
    assert all(name.startswith(".") for name in left)
    assert said_by(start(lines)).startswith("50|")
    left = sorted(path.name for path in (lines / "cache").iterdir())
    assert [name.startswith(".") for name in left] == [True, False]  # the locks and the entry; the half is gone


def test_the_others_give_the_first_a_head_start_but_do_not_depend_on_it(home, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "HEAD_START_SECONDS", 0.3)
    started = time.monotonic()
    found = cache.encoded(recipe(), home, tiny_tokenizer, Notes(), first=False)
    assert len(found.train)
    assert time.monotonic() - started > 0.3


def test_a_file_system_without_locks_still_caches(home, tiny_tokenizer, work, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    wanted = list(cache.encoded(recipe(), home, tiny_tokenizer, Notes()).train)
    work.clear()
    assert list(cache.encoded(recipe(), home, tiny_tokenizer, Notes()).train) == wanted
    assert work == []
