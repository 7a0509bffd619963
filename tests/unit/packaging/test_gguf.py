"""The form for llama.cpp: asked of its converter, which is a program here, and never taken at its word; and of the real
one, where it is installed.
"""

import json
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ingot.errors import PackageError
from ingot.packaging import gguf

WRITES = """import sys, struct
out = sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "q8_0"
open(out, "wb").write({content})
"""


def _converter(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(WRITES.format(content=content))
    monkeypatch.setenv(gguf.VARIABLE, str(script))


def test_without_a_converter_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError, match=r"pip install gguf.*INGOT_GGUF_CONVERTER"):
        gguf.find_converter()
    monkeypatch.setenv(gguf.VARIABLE, "nowhere.py")
    with pytest.raises(PackageError, match=r"nowhere\.py is no file"):
        gguf.find_converter()


def test_the_converter_is_asked_for_the_recipe_s_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _converter(tmp_path, 'b"GGUF" + struct.pack("<IQQ", 3, 12, 20)', monkeypatch)
    made = gguf.convert(tmp_path, tmp_path / "out", "q8_0")
    assert made == tmp_path / "out" / "model.gguf"
    assert gguf.check_gguf(made) == 12


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('b"PK"', "no GGUF file"),
        ('b"GGUF" + struct.pack("<IQQ", 3, 0, 0)', "no tensor"),
        ('sys.exit("out of memory")', "exit status 1\\nout of memory"),
        (
            'sys.exit("NotImplementedError: BPE pre-tokenizer was not recognized")',
            "know this model's tokenizer",
        ),
        ('sys.exit("ERROR:hf-to-gguf:Model Mamba3 is not supported")', "the architecture Mamba3; leave gguf out"),
        (
            "sys.exit(\"ModuleNotFoundError: No module named 'gguf'\")",
            "needs the Python package gguf: pip install gguf",
        ),
        ('sys.exit("FileNotFoundError: File not found: /x/tokenizer.model")', "from tokenizer.model alone; leave gguf"),
    ],
)
def test_what_it_made_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str) -> None:
    _converter(tmp_path, content, monkeypatch)
    with pytest.raises(PackageError, match=says):
        gguf.convert(tmp_path, tmp_path / "out", "q8_0")


LOOKS = """import json, pathlib, struct, sys
source = pathlib.Path(sys.argv[1])
assert source.name == "tuned", source
found = json.loads((source / "tokenizer_config.json").read_text()) | {"files": sorted(p.name for p in source.iterdir())}
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0))
pathlib.Path("FOUND").write_text(json.dumps(found))
"""


def test_the_converter_is_shown_the_base_s_own_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, found = tmp_path / "base", tmp_path / "tuned", tmp_path / "found.json"
    (tmp_path / "convert_hf_to_gguf.py").write_text(LOOKS.replace("FOUND", str(found)))
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path / "convert_hf_to_gguf.py"))
    base.mkdir()
    tuned.mkdir()
    added = {"id": 7, "content": "<turn>", "special": True}
    (tuned / "tokenizer.json").write_text(json.dumps({"added_tokens": [added]}))
    (tuned / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    gguf.convert(tuned, tmp_path / "out" / "model", "q8_0", base)
    assert json.loads(found.read_text()) == {"bos_token": "<s>", "files": ["tokenizer.json", "tokenizer_config.json"]}
    (base / "tokenizer.model").write_bytes(b"pieces")
    gguf.convert(tuned, tmp_path / "out" / "model", "q8_0", base)
    shown = json.loads(found.read_text())
    assert shown["files"] == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert (shown["bos_token"], shown["added_tokens_decoder"]) == ("<s>", {"7": added})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert (tuned / "tokenizer_config.json").read_text() == '{"bos_token": "<s>"}'


def test_a_header_is_read_as_the_format_says(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 291, 24) + b"more")
    assert gguf.check_gguf(tmp_path / "x") == 291


TOKENS = ["<unk>", "a", "b", "c", "ab", "bc", "abc"]
BPE = {"type": "BPE", "vocab": {token: place for place, token in enumerate(TOKENS)}}


def _written(kind: str, scores: list[float]) -> bytes:
    """A GGUF file of no tensors that holds what the converter says of a tokenizer, and a field behind it."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    return b"".join([
        b"GGUF" + struct.pack("<IQQ", 3, 1, 5),
        text("tokenizer.ggml.model") + struct.pack("<I", 8) + text(kind),
        text("general.file_type") + struct.pack("<II", 4, 0),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(TOKENS)) + b"".join(map(text, TOKENS)),
        text("tokenizer.ggml.scores") + struct.pack(f"<IIQ{len(scores)}f", 9, 6, len(scores), *scores),
        text("tokenizer.ggml.add_bos_token") + struct.pack("<I?", 7, True),
    ])  # fmt: skip


def _order(tmp_path: Path, merges: list[Any], kind: str = "llama", scores: list[float] | None = None) -> list[float]:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": BPE | {"merges": merges}}))
    before = _written(kind, scores or [-1000.0] * len(TOKENS))
    (tmp_path / "x.gguf").write_bytes(before)
    gguf.order_merges(tmp_path / "x.gguf", tmp_path / "tokenizer.json")
    after = (tmp_path / "x.gguf").read_bytes()
    end = after.index(b"tokenizer.ggml.scores") + 21 + 16
    found = list(struct.unpack_from(f"<{len(TOKENS)}f", after, end))
    assert after[:end] + after[end + 4 * len(TOKENS) :] == before[:end] + before[end + 4 * len(TOKENS) :]
    return found


@pytest.mark.parametrize("joined", [True, False])
def test_the_order_of_merges_is_written_where_the_converter_lost_it(tmp_path: Path, joined: bool) -> None:
    pairs = [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]
    merges = [" ".join(pair) for pair in pairs] if joined else [list(pair) for pair in pairs]
    assert _order(tmp_path, merges) == [-1000.0, -1000.0, -1000.0, -1000.0, -4.0, -1.0, -2.0]


def test_what_a_tokenizer_s_file_says_stays(tmp_path: Path) -> None:
    scores = [0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert _order(tmp_path, ["a b"], scores=scores) == scores
    assert _order(tmp_path, ["a b"], kind="gpt2") == [-1000.0] * len(TOKENS)


@pytest.mark.parametrize(
    "merges", [["b c", "a b", "a bc"], ["a bc", "b c", "a b", "ab c"]], ids=["one way of two", "two ranks of one token"]
)
def test_merges_that_no_scores_can_say_are_refused(tmp_path: Path, merges: list[str]) -> None:
    with pytest.raises(PackageError, match="would merge 'abc' otherwise than this tokenizer; leave gguf out"):
        _order(tmp_path, merges)


TEXTS = ["Once upon a time, there was a little girl named Lily.", "Tim's dog  ran; \u00e9t\u00e9, 12 \U0001f642"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "away"), [("f16", 5e-3), ("q8_0", 5e-2)])
def test_the_real_converter_s_file_reads_and_computes_as_the_model(
    tmp_path: Path, shared_dir: Path, kind: Any, away: float
) -> None:
    """With q8_0 0.020 were measured, with f16 0.0014."""
    try:
        gguf.find_converter()
    except PackageError as error:
        pytest.skip(str(error))
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = shared_dir / "models" / "stories260k"
    made = gguf.convert(source, tmp_path, kind)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=made.name, dtype=torch.float32)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.no_grad():
        for row in rows:
            wanted, found = (it(torch.tensor([row])).logits for it in (model, back))
            assert (found - wanted).abs().max() < away * wanted.abs().max()
    if find_spec("llama_cpp") is not None:
        _assert_llama_cpp_writes_the_same(made, model, rows)


def _assert_llama_cpp_writes_the_same(made: Path, model: Any, rows: list[list[int]]) -> None:
    import torch
    from llama_cpp import Llama

    engine = Llama(str(made), n_ctx=256, n_threads=1, verbose=False)
    assert [engine.tokenize(text.encode()) for text in TEXTS] == rows
    for row in rows[:1]:
        written = model.generate(torch.tensor([row]), max_new_tokens=40, do_sample=False)[0, len(row) :].tolist()
        answers = engine.generate(row, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(answers) for _ in written] == written
