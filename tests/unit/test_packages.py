"""The packages of a finished run: one lineage, its terms, and each form loaded where only it is."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ingot import batches, conforming, packages, provenance, registering, verbs
from ingot.conformance.targets import TARGETS
from ingot.errors import MissingPackage, ModelError, PackageError, RecipeError
from ingot.model.adapted import sha256
from ingot.model.adapters import attach_adapter, merge, save_adapter
from ingot.model.export import export_model
from ingot.model.load import load_model, load_tokenizer
from ingot.model.runtime import Runtime
from ingot.packages import check_forms, write_package
from ingot.packaging.bundle import check_manifest
from ingot.preparation import QUIET
from ingot.provenance import lineage_of, origin_of, terms_of
from ingot.ranks import Ranks
from ingot.recipe import Recipe
from ingot.recipe_io import dump_recipe, parse_recipe
from ingot.runfolder import Run, commit_of, create_run
from ingot.serving.fleet import find_model_folder
from ingot.serving.server import Endpoint
from ingot.stages import resolve
from ingot.subjects import open_target

NANO = Path(packages.__file__).parent / "catalog" / "nano"
NO_POLICY = {"status": "no policy", "sentence": ""}


def _recipe(tmp_path: Path, **sections: Any) -> Recipe:
    return parse_recipe({
        "name": "tool-calls",
        "output": str(tmp_path / "runs"),
        "model": {"source": "ingot://nano", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "test": "rows.jsonl", "max_tokens": 64},
        "adapter": {"rank": 8},
        "track": {"uri": "https://me:secret@tracking.example"},
        **sections,
    })  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run over the embedded model that was not trained: its adapter is drawn."""
    rows = [{"messages": [{"role": "user", "content": f"Pay {n} yen to Maria"}, {"role": "assistant", "content": "{}"}]}
            for n in range(3)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = _recipe(tmp_path, package={"verify": False})
    found = create_run(recipe, tmp_path)
    model: Any = load_model(recipe.model, tmp_path, "chat-completion")
    model = attach_adapter(model, recipe.adapter, "chat-completion", 0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    save_adapter(model, found.adapter, recipe.model.source)
    merged, _ = merge(model, [])
    about = {"task": "chat-completion", "max_new_tokens": 8, "example": {"messages": rows[0]["messages"][:1]}}
    export_model(merged, load_tokenizer(recipe.model, tmp_path), found.model, torch.float32, about)
    return found


def test_all_forms_carry_one_lineage(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = write_package(run, NO_POLICY, "", QUIET, ["merged", "adapter", "quantized"])
    assert out == run.package
    folders = [run.form("merged"), run.form("adapter"), run.form("quantized")]
    metadata = [yaml.safe_load((it / "MLmodel").read_text())["metadata"] for it in folders]
    assert [it["form"] for it in metadata] == ["merged", "adapter", "quantized"]
    assert len({it["lineage"] for it in metadata}) == 1
    assert {it["is_acft_model"] for it in metadata} == {False}
    assert metadata[0]["base_model_task"] == "text-generation"
    for folder in folders:
        check_manifest(folder)
        for path in folder.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert str(tmp_path).encode() not in data, path
                assert b"secret" not in data, path
    adapter = folders[1]
    assert {path.name for path in (adapter / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    base = json.loads((adapter / "model/base.json").read_text())
    assert base["weights"] == lineage_of(run)["base"]["weights"]
    assert json.loads((adapter / "model/adapter_config.json").read_text())["base_model_name_or_path"] == "ingot://nano"
    assert "peft==" in (adapter / "requirements.txt").read_text()
    assert "bitsandbytes==" in (folders[2] / "requirements.txt").read_text()
    assert "quantization_config" in json.loads((folders[2] / "model/config.json").read_text())
    assert set(run.record()["stages"]["package"]["forms"]) == {"merged", "adapter", "quantized"}
    assert not list(run.folder.glob(".form-*"))


def test_the_lineage_names_base_data_recipe_and_environment(run: Run, tmp_path: Path) -> None:
    found = lineage_of(run)
    train = found["data"][0]
    assert train["content"][-1].startswith("rows.jsonl ")
    assert len(train["content"][-1].split()[1]) == 64
    assert found["base"]["files"].keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert found["recipe"]["adapter"]["rank"] == 8
    assert "output" not in found["recipe"]
    assert found["seeds"] == {"train": 0, "splits": 0}
    assert found["environment"]["versions"]["torch"]
    assert found["recipe_hash"] == run.record()["recipe_hash"]
    (tmp_path / "rows.jsonl").write_text("{}\n")  # what is kept is what the first package said
    assert lineage_of(run) == found


def test_the_lineage_is_of_what_training_read(tmp_path: Path, model_folder: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    rows = [{"text": f"item {n} costs {n * 7 % 50} euros"} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {it.name: sha256(it) for it in (path, base / "model.safetensors")}
    recipe = _recipe(
        tmp_path,
        model={"source": "base"},
        data={"train": "rows.jsonl", "max_tokens": 64, "test_share": 0},
        objective={"task": "language-modeling"},
        train={"max_steps": 1, "tokens_per_step": 64, "threads": 1},
        track={"enabled": False},
        evaluate={"enabled": False},
    )
    run = verbs.finetune(recipe, home=tmp_path)
    with path.open("a") as file:
        file.write('{"text": "a row that nobody learned"}\n')
    with (base / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x11")
    found = lineage_of(run)
    assert found["data"][0]["content"][-1] == f"rows.jsonl {read['rows.jsonl']}"
    assert found["base"]["files"]["model.safetensors"] == read["model.safetensors"]
    assert found["hashed"] == "before it was trained"


def test_a_base_that_takes_long_to_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    origin_of(_recipe(tmp_path, data={"train": "ingot://tool-calls"}), tmp_path, told.append)
    assert told == []
    monkeypatch.setattr(provenance, "SLOW_BYTES", 1000)
    origin_of(_recipe(tmp_path, data={"train": "ingot://tool-calls"}), tmp_path, told.append)
    assert told == ["lineage: 0 GB of the base are read for their SHA-256"]


def test_a_commit_is_recorded_where_there_is_one(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    found = commit_of(Path(packages.__file__).parent)
    if found is not None:  # a source tree without git has none
        assert len(found["id"]) == 40


def test_terms_come_from_base_and_data(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.jsonl").write_text("{}\n")
    (tmp_path / "rows/README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    (tmp_path / "LICENSE").write_text("MIT License")  # the project's own, beside the recipe
    (tmp_path / "rows.jsonl").write_text("{}\n")
    data = {"train": "rows/rows.jsonl", "test": "rows.jsonl", "validation": "ingot://tool-calls"}
    terms = terms_of(_recipe(tmp_path, data=data), tmp_path)
    assert [(part.role, part.name, part.licence) for part in terms.parts] == [
        ("base", "ingot://nano", "apache-2.0"),
        ("data", "rows/rows.jsonl", "cc-by-sa-4.0"),
        ("data", "rows.jsonl", None),
    ]
    stated = data | {"train": {"uri": "rows/rows.jsonl", "license": "cc-by-nc-4.0"}}
    recipe = _recipe(tmp_path, data=stated, package={"license": "apache-2.0"})
    with pytest.raises(RecipeError, match=r"package\.license.*cc-by-nc-4\.0"):
        terms_of(recipe, tmp_path)


def test_a_conflict_stops_before_anything_is_written(run: Run) -> None:
    recipe = run.recipe.model_copy(
        update={"data": run.recipe.data.model_copy(update={
            "train": run.recipe.data.train.model_copy(update={"license": "cc-by-nc-4.0"})}),  # type: ignore[union-attr]
            "package": run.recipe.package.model_copy(update={"license": "mit"})}
    )  # fmt: skip
    with pytest.raises(RecipeError, match="license_waiver"):
        write_package(Run(run.folder, recipe, run.home), NO_POLICY, "", QUIET)
    assert not run.package.exists()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"adapter": {"kind": "none"}, "package": {"forms": ["adapter"]}}, "full fine-tuning"),
        ({"package": {"forms": ["merged", "merged"]}}, "twice"),
        ({"objective": {"task": "text-classification"}, "package": {"forms": ["gguf"]}}, "gguf is for"),
    ],
)
def test_forms_that_cannot_be_made_are_refused_by_the_recipe(
    tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        _recipe(tmp_path, **sections)


def test_what_a_form_needs_is_asked_for_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"--form.*merged"):
        write_package(run, NO_POLICY, "", QUIET, ["merge"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError, match="converter"):
        write_package(run, NO_POLICY, "", QUIET, ["merged", "gguf"])
    assert not run.package.exists()
    wanted = run.recipe.package.model_copy(update={"forms": ["quantized"]})
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="bitsandbytes"):
        check_forms(run.recipe.model_copy(update={"package": wanted}), run.home)


def test_the_record_says_which_forms_are_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(run, NO_POLICY, "", QUIET, ["adapter"])
    assert packages.missing_forms(run) == ["merged"]  # which the recipe asks for
    write_package(run, NO_POLICY, "", QUIET)
    assert packages.missing_forms(run) == []
    stage = run.record()["stages"]["package"]
    assert list(stage["forms"]) == ["adapter", "merged"] and stage["verified"] is False
    assert stage["seconds"] == pytest.approx(sum(it["seconds"] for it in stage["forms"].values()), abs=0.01)

    def refused(*_: Any, **__: Any) -> None:
        raise PackageError("answers otherwise")

    monkeypatch.setattr(packages, "verify_package", refused)
    proved = run.recipe.model_copy(update={"package": run.recipe.package.model_copy(update={"verify": True})})
    with pytest.raises(PackageError, match="answers otherwise"):
        write_package(Run(run.folder, proved, run.home), NO_POLICY, "", QUIET, ["merged"])
    assert list(packages.packaged_forms(run)) == ["adapter"]
    shutil.rmtree(run.form("adapter"))
    assert packages.packaged_forms(run) == {}


def test_a_resumed_run_packages_the_forms_that_are_missing(run: Run, tmp_path: Path) -> None:
    changes = {"evaluate": {"enabled": False}, "serve": {"enabled": False}, "package": {"verify": False}}
    recipe = resolve(_recipe(tmp_path, **changes), tmp_path, Ranks(), torch.device("cpu"))
    (run.folder / "resolved.yaml").write_text(dump_recipe(recipe))
    run.note_stage("finetune", 1.0)
    verbs.package(run.folder, forms=["adapter"])
    kept = (run.form("adapter") / "manifest.json").stat().st_mtime_ns
    verbs.run(recipe, home=tmp_path, resume=run.folder)
    assert set(run.record()["stages"]["package"]["forms"]) == {"adapter", "merged"}
    written = (run.package / "manifest.json").stat().st_mtime_ns
    verbs.run(recipe, home=tmp_path, resume=run.folder)
    assert (run.package / "manifest.json").stat().st_mtime_ns == written
    assert (run.form("adapter") / "manifest.json").stat().st_mtime_ns == kept


def test_a_gguf_that_could_not_be_made_is_not_tried_at_each_resume(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    converter = tmp_path / "convert"
    converter.write_text(f"#!/bin/sh\necho >> {tries}\necho 'Model OddForCausalLM is not supported'\nexit 1\n")
    converter.chmod(0o755)
    monkeypatch.setenv("INGOT_GGUF_CONVERTER", str(converter))
    forms = {"forms": ["merged", "gguf"], "verify": False}
    changes = {"evaluate": {"enabled": False}, "serve": {"enabled": False}, "package": forms}
    recipe = resolve(_recipe(tmp_path, **changes), tmp_path, Ranks(), torch.device("cpu"))
    (run.folder / "resolved.yaml").write_text(dump_recipe(recipe))
    run.note_stage("finetune", 1.0)
    for again in (False, True, True):
        with pytest.raises(PackageError, match="does not know the architecture OddForCausalLM") as caught:
            verbs.run(recipe, home=tmp_path, resume=run.folder)
        assert (f"ingot package {run.folder} --form gguf" in str(caught.value)) is again
        assert (run.record()["status"] == "not packaged", (run.folder / "summary.json").is_file()) == (again, again)
    assert tries.read_text() == "\n" and list(packages.packaged_forms(run)) == ["merged"]
    with pytest.raises(PackageError):
        verbs.package(run.folder, forms=["gguf"])
    assert tries.read_text() == "\n\n"
    converter.write_text(CONVERTER)
    verbs.package(run.folder, forms=["gguf"])
    verbs.run(recipe, home=tmp_path, resume=run.folder)
    assert run.record()["status"] == "finished"


def test_a_run_without_a_merged_form_stands_for_its_first(run: Run) -> None:
    with pytest.raises(ModelError, match="ingot package"):
        registering.package_of(run.folder)
    forms = run.recipe.package.model_copy(update={"forms": ["adapter"]})
    recipe = run.recipe.model_copy(update={"package": forms})
    (run.folder / "resolved.yaml").write_text(dump_recipe(recipe))
    write_package(Run(run.folder, recipe, run.home), NO_POLICY, "", QUIET)
    assert registering.package_of(run.folder)[0] == run.form("adapter").resolve()


def test_the_proof_of_a_gguf_loads_no_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(
        "import struct, sys\nplace = sys.argv[sys.argv.index('--outfile') + 1]\n"
        "open(place, 'wb').write(b'GGUF' + struct.pack('<IQQ', 3, 12, 20))\n"
    )
    monkeypatch.setenv("INGOT_GGUF_CONVERTER", str(converter))

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Runtime, "load", loaded)
    proved = run.recipe.model_copy(update={"package": run.recipe.package.model_copy(update={"verify": True})})
    out = write_package(Run(run.folder, proved, run.home), NO_POLICY, "", QUIET, ["gguf"])
    assert json.loads((out / "verification.json").read_text())["tensors"] == 12


def test_a_converter_that_fails_leaves_the_other_forms(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convert.py").write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    monkeypatch.setenv("INGOT_GGUF_CONVERTER", str(tmp_path / "convert.py"))
    with pytest.raises(PackageError) as caught:
        write_package(run, NO_POLICY, "", QUIET, ["gguf", "merged"])
    assert str(caught.value) == (
        "package.forms: gguf: convert.py made no GGUF of this model: it does not know this model's tokenizer, of which "
        "it keeps a list; leave gguf out of package.forms"
    )
    check_manifest(run.package)
    assert list(run.record()["stages"]["package"]["forms"]) == ["merged"]
    assert not list(run.folder.glob("*gguf*"))


@pytest.mark.slow
def test_each_form_is_proved_in_a_clean_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    proved = run.recipe.model_copy(update={"package": run.recipe.package.model_copy(update={"verify": True})})
    run.note(versions=run.record()["versions"] | {"numpy": "1.0.0"})
    write_package(Run(run.folder, proved, run.home), NO_POLICY, "", QUIET, ["merged", "adapter", "quantized"])
    forms = run.record()["stages"]["package"]["forms"]
    assert forms["merged"]["difference"] is None  # its answers are equal
    assert 0 <= forms["adapter"]["difference"] <= 1e-3
    assert 0 < forms["quantized"]["difference"] <= forms["quantized"]["tolerance"] == 0.5
    for form in ("merged", "adapter", "quantized"):
        check_manifest(run.form(form))
        assert json.loads((run.form(form) / "verification.json").read_text())["pinned_otherwise"] == {"numpy": "1.0.0"}
    monkeypatch.setenv("INGOT_BASE_MODEL", str(NANO))
    for form in ("merged", "adapter", "quantized"):
        [found] = conforming.run(str(run.form(form)), ["runtime"]).results
        assert (found.state, found.reason) == ("passed", "")


def test_the_rows_of_a_run_are_read_without_its_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Runtime, "load", loaded)
    rows = conforming.test_rows(run, QUIET)
    assert [json.loads(row["messages"])[0]["content"] for row in rows] == [f"Pay {n} yen to Maria" for n in range(3)]


CONVERTER = """#!/bin/sh
printf 'GGUF\\003\\000\\000\\000\\001\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000\\000' > "$3"
"""


def test_a_gguf_form_is_asked_of_what_reads_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = tmp_path / "convert"
    converter.write_text(CONVERTER)
    converter.chmod(0o755)
    monkeypatch.setenv("INGOT_GGUF_CONVERTER", str(converter))
    write_package(run, NO_POLICY, "", QUIET, ["gguf"])
    place = run.form("gguf")
    monkeypatch.setenv("PATH", f"/usr/bin:/bin:{tmp_path}/bin")
    found = conforming.run(str(place))
    assert {it.state for it in found.results} == {"skipped"}
    assert (found.name, found.task) == ("tool-calls", "chat-completion")
    kept = json.loads(place.with_name("package-gguf.conformance.json").read_text())
    assert not kept["passed"] and len(kept["results"]) == len(TARGETS)

    answer = Runtime.load(run.model, "cpu").answer([{"messages": json.dumps([{"role": "user", "content": "Pay"}])}])
    (tmp_path / "rows.jsonl").write_text('{"input_string": "Pay"}\n')
    (tmp_path / "bin").mkdir()
    engine = tmp_path / "bin" / "llama-server"
    engine.write_text(ENGINE.format(python=sys.executable, text=answer[0]["output_string"]))
    engine.chmod(0o755)
    [asked] = conforming.run(str(place), ["llama-cpp"], rows_file=tmp_path / "rows.jsonl").results
    assert (asked.state, asked.reason, asked.rows) == ("passed", "", 2)

    shutil.move(place, tmp_path / "alone")
    with pytest.raises(ModelError, match="move it back there"):
        conforming.run(str(tmp_path / "alone"))


ENGINE = """#!{python}
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({{"choices": [{{"message": {{"content": {text!r}}}}}]}}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(answer))); self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def adapter_package(run: Run) -> Path:
    write_package(run, NO_POLICY, "", QUIET, ["adapter"])
    return run.form("adapter")


ROW = {"input_string": "Pay 3 yen to Maria"}


def answers_everywhere(package: Path, folder: Path) -> None:
    """Endpoint, batch and `ingot conform` answer as the runtime does."""
    wanted = Runtime.load(package / "model", "cpu").answer([ROW])
    with Endpoint(package) as endpoint:
        assert endpoint.ask(ROW["input_string"]) == wanted[0]["output_string"]
    (folder / "asked.jsonl").write_text(json.dumps(ROW) + "\n")
    done = batches.batch(package, folder / "asked.jsonl", folder / "answers")
    assert (done["answers"], done["errors"]) == (1, 0)
    [part] = (folder / "answers").glob("part-*.jsonl")
    assert json.loads(part.read_text())["output_string"] == wanted[0]["output_string"]
    found = conforming.run(str(package), ["pyfunc", "batch", "ingot-serve", "huggingface", "vllm"])
    states = {it.target: it.state for it in found.results}
    assert {states[name] for name in ("pyfunc", "batch", "ingot-serve")} == {"passed"}, found.results


def test_an_adapter_s_package_is_batched_over_the_base_that_it_names(
    adapter_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps(ROW) + "\n")
    monkeypatch.delenv("INGOT_BASE_MODEL", raising=False)
    for refused in (adapter_package, adapter_package / "model"):
        with pytest.raises(ModelError, match="its base ingot://nano is not here; set INGOT_BASE_MODEL"):
            batches.batch(refused, asked, tmp_path / "answers")
    with pytest.raises(PackageError, match="set INGOT_BASE_MODEL"):
        conforming.run(str(adapter_package), ["runtime"])
    monkeypatch.setenv("INGOT_BASE_MODEL", str(model_folder))
    with pytest.raises(ModelError, match="is not the base of this adapter"):
        batches.batch(adapter_package, asked, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()
    monkeypatch.delenv("INGOT_BASE_MODEL")
    (adapter_package.parent / "base").symlink_to(NANO)
    assert batches.batch(adapter_package, asked, tmp_path / "answers")["answers"] == 1
    assert open_target(str(adapter_package)).adapter == adapter_package / "model"
    assert find_model_folder(adapter_package) == adapter_package / "model"


@pytest.mark.slow
def test_an_adapter_s_package_answers_wherever_its_base_is(
    adapter_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INGOT_BASE_MODEL", str(NANO))
    answers_everywhere(adapter_package, tmp_path)


@pytest.mark.slow
def test_a_quantized_package_answers_everywhere(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    write_package(run, NO_POLICY, "", QUIET, ["quantized"])
    answers_everywhere(run.form("quantized"), tmp_path)
