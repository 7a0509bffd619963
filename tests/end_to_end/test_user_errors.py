"""Mistakes that users will make: one message that names field, value and fix, the exit code, and nothing written."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ingot.evaluation.metrics import METRICS
from ingot.model import fused
from ingot.train import shards


def refused(done: Any, project: Any, *said: str, code: int = 2) -> None:
    """The command was refused with one message that holds all of `said`, and left nothing behind."""
    assert done.code == code, (done.out, done.err)
    message = done.err[done.err.index("error: ") :]
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    for part in said:
        assert part in message
    assert not (project.folder / "runs").exists()


# --- data ------------------------------------------------------------------------------------------------------


def test_missing_data_file(ingot, project):
    done = ingot("run", project.recipe, "data.train=trian.jsonl")
    refused(done, project, "data.train", "'trian.jsonl'", "train.jsonl'?")


def test_wrong_column(ingot, project):
    project.write(data={"columns": {"prompt": "qestion"}})
    project.rows("train", [{"question": "what", "completion": "that"}] * 4)
    done = ingot("finetune", project.recipe)
    refused(done, project, "data.columns", "'qestion'", "did you mean 'question'?", "train.jsonl:")


def test_empty_data_set(ingot, project):
    (project.folder / "train.jsonl").write_text("")
    refused(ingot("finetune", project.recipe), project, "data.train", "'train.jsonl'", "name a file with rows")


def test_label_that_training_never_saw(ingot, make_project, model_folder):
    project = make_project(model_folder, "text-classification")
    project.rows("test", [{"text": "a table", "label": "priase"}])
    done = ingot("finetune", project.recipe)
    refused(done, project, "test.jsonl:1", "'priase'", "training never saw", "did you mean 'praise'?")


def test_too_long_prompt_is_found_before_training(ingot, project):
    project.rows("test", [{"prompt": "one", "completion": "1"}, {"prompt": "word " * 400, "completion": "2"}])
    done = ingot("run", project.recipe)
    refused(done, project, "test.jsonl:2", "evaluate.max_new_tokens = 8", "context 256", "shorten the row")


def test_no_row_keeps_a_trainable_token(ingot, project):
    project.rows("train", [{"prompt": f"word {n} " * 40, "completion": " yes"} for n in range(20)])
    refused(ingot("run", project.recipe), project, "data.max_tokens = 96", "none of 19 training rows", "raise it")


def test_an_operation_without_a_place_in_the_model(ingot, project):
    project.write(kernels={"ops": ["rope", "lora_linear"]}, adapter={"kind": "none"})
    done = ingot("finetune", project.recipe)
    refused(done, project, "kernels.ops", "'lora_linear'", "LlamaForCausalLM has no place for it", "leave it out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is missing here")
def test_what_needs_a_gpu_is_found_before_training(ingot, project, monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", False)  # as it is for users
    done = ingot("finetune", project.recipe, "kernels.impl=triton")
    refused(done, project, "kernels.impl", "'triton'", "there is no GPU here; use auto")
    done = ingot("finetune", project.recipe, "train.offload_activations=true")
    refused(done, project, "train.offload_activations", "in CPU memory already")


# --- model -----------------------------------------------------------------------------------------------------


def test_model_folder_without_tokenizer(ingot, project, model_folder):
    (model_folder / "tokenizer.json").unlink()
    done = ingot("finetune", project.recipe)
    refused(done, project, "model.source", str(model_folder), "no tokenizer", "copy the base model's tokenizer")


def test_tokenizer_without_chat_template(ingot, chat_project, model_folder):
    (model_folder / "chat_template.jinja").unlink()
    done = ingot("finetune", chat_project.recipe)
    refused(done, chat_project, "model.chat_template = None", "template")


def test_only_pickle_weights(ingot, project, model_folder):
    torch.save({}, model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    done = ingot("finetune", project.recipe)
    refused(done, project, "model.source", "pytorch_model.bin", "can run any code", "convert them to safetensors")


def test_model_that_brings_code(ingot, project, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own.Model"}}))
    (model_folder / "own.py").write_text(f"open({str(project.folder / 'ran')!r}, 'w')")
    done = ingot("finetune", project.recipe)
    refused(done, project, "model.trust_remote_code = False", "its own Python code", "model.trust_remote_code: true")
    assert not (project.folder / "ran").exists()


def test_hub_model_offline(ingot, project):
    done = ingot("finetune", project.recipe, "model.source=hf://Qwen/Qwen3-0.6B")
    refused(done, project, "model.source = 'hf://Qwen/Qwen3-0.6B'", "cannot be reached", "name a local folder")


def test_missing_model_folder(ingot, project, model_folder):
    done = ingot("finetune", project.recipe, f"model.source={model_folder}x")
    refused(done, project, "model.source", f"{model_folder}x", f"did you mean {model_folder.name!r}?")


# --- recipe and command ----------------------------------------------------------------------------------------


def test_typo_in_the_recipe(ingot, project):
    text = project.recipe.read_text().replace("lr: 0.005", "learning_rate: 0.005")
    project.recipe.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "learning_rate" in row)
    done = ingot("run", project.recipe)
    refused(done, project, f"recipe.yaml:{line}: optim.learning_rate = 0.005", "did you mean 'optim.lr'?")


def test_typo_in_an_override(ingot, project):
    done = ingot("run", project.recipe, "adapter.rnak=4")
    refused(done, project, "adapter.rnak", "did you mean 'rank'?")


def test_missing_recipe(ingot, project):
    done = ingot("run", "recipy.yaml")
    refused(done, project, "recipe = 'recipy.yaml'", "no such file", "recipe.yaml")


def test_unknown_metric_is_found_before_training(ingot, project):
    done = ingot("run", project.recipe, "evaluate.metrics=[blue]")
    refused(done, project, "evaluate.metrics = 'blue'", "did you mean 'bleu'?")
    done = ingot("run", project.recipe, "evaluate.metrics=[accuracy]")
    refused(done, project, "evaluate.metrics = 'accuracy'", "text-generation has")
    assert "accuracy" in METRICS


def test_summary_to_a_missing_folder(ingot, project):
    done = ingot("run", project.recipe, "--summary", "nowhere/summary.json")
    refused(done, project, "--summary = 'nowhere/summary.json'", str(project.folder / "nowhere"), "does not exist")


def test_output_that_is_a_file(ingot, project):
    (project.folder / "taken").write_text("")
    done = ingot("finetune", project.recipe, "output=taken")
    refused(done, project, "taken", "cannot be written", "set output=FOLDER", code=1)


def test_resume_of_no_run(ingot, project):
    refused(ingot("run", project.recipe, "--resume", "runs/gone"), project, "'runs/gone'", "`ingot runs`")


def test_evaluate_and_package_of_a_folder_that_is_no_run(ingot, project, model_folder):
    for verb in ("evaluate", "package"):
        done = ingot(verb, model_folder)
        refused(done, project, f"RUN = '{model_folder}': is no run: it has no run.json", "`ingot runs`")


def test_a_place_that_is_not_there(ingot, project):
    for words in (("package", "gone"), ("consolidate", "gone", "out"), ("compare", "gone", "lost")):
        refused(ingot(*words), project, " = 'gone': ", "; ")


def test_evaluate_of_nothing(ingot, project):
    refused(ingot("evaluate", "runs/gone"), project, "'runs/gone'", "no such file")


def test_no_runs(ingot, project):
    refused(ingot("runs"), project, "no runs in", str(project.folder / "runs"), "start one with", code=1)
    assert ingot("runs", "--json").json() == []


def test_port_in_use(ingot, project, model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ingot("serve", model_folder, "--port", port)
    refused(done, project, f"serve.port = {port}", "another program listens there", "choose another port")


def test_serving_to_others_needs_a_key(ingot, project, model_folder):
    done = ingot("serve", model_folder, "--host", "0.0.0.0", "--port", 0)
    refused(done, project, "serve.host = '0.0.0.0'", "INGOT_API_KEY")


def test_serving_nothing(ingot, project):
    refused(ingot("serve", "gone", "--port", 0, "--no-supervise"), project, "'gone'", "no such folder")


def test_debug_shows_the_traceback(ingot, project):
    from ingot import IngotError

    with pytest.raises(IngotError, match=r"trian\.jsonl") as caught:  # raised to the interpreter, which prints it
        ingot("finetune", project.recipe, "data.train=trian.jsonl", "--debug")
    assert any(entry.path.name == "sources.py" for entry in caught.traceback)


# --- a run that stops half-way ---------------------------------------------------------------------------------


def full_from(step: int, monkeypatch: pytest.MonkeyPatch, everything: bool = False) -> None:
    """Let the disk be full from the checkpoint of `step` on; `everything`: for run.json too."""
    from ingot import runfolder

    save, write_json, full = shards.write, runfolder.write_json, False

    def write_shards(folder: Path, *args: Any) -> list[str]:
        nonlocal full
        full = full or int(folder.name.strip(".").split("-")[1].split(".")[0]) >= step
        if full:
            (folder / "shard").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(folder, *args)

    def write(path: Path, content: Any) -> None:
        if full and everything:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, content)

    monkeypatch.setattr(shards, "write", write_shards)
    monkeypatch.setattr(runfolder, "write_json", write)


@pytest.mark.parametrize("everything", [False, True], ids=["checkpoint", "everything"])
def test_full_disk_leaves_the_last_good_checkpoint(ingot, project, everything):
    project.write(train={"checkpoint_every_steps": 1})
    assert ingot("finetune", project.recipe).code == 0
    whole = project.losses()
    shutil.rmtree(project.folder / "runs")

    with pytest.MonkeyPatch.context() as patch:
        full_from(3, patch, everything)
        done = ingot("finetune", project.recipe)
    assert done.code == 1
    assert done.err.count("error: ") == 1
    for part in ("step-000003", "No space left on device", "the last good one is", "step-000002", "--resume"):
        assert part in done.err
    run = project.run
    assert (run / "checkpoints" / "last").resolve().name == "step-000002"
    assert sorted(path.name for path in (run / "checkpoints").glob("[!lb]*")) == ["step-000001", "step-000002"]
    assert json.loads((run / "run.json").read_text())["status"] == ("started" if everything else "failed")

    done = ingot("finetune", project.recipe, "--resume", run)
    assert done.code == 0, done.err
    assert project.losses() == whole
    assert json.loads((run / "run.json").read_text())["status"] == "trained"


def test_full_disk_at_the_model_keeps_the_checkpoints(ingot, project, monkeypatch):
    from ingot.model import export

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export, "os", SimpleNamespace(replace=full, environ=os.environ))
        done = ingot("finetune", project.recipe)
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "--resume" in done.err
    assert not (project.run / "model").exists()
    assert not list(project.run.glob(".model*"))
    assert ingot("finetune", project.recipe, "--resume", project.run).code == 0
    assert (project.run / "model" / "model.safetensors").is_file()


def test_resume_with_another_recipe(ingot, project):
    assert ingot("run", project.recipe, "evaluate.enabled=false").code == 0
    before = sorted(path for path in project.run.rglob("*"))
    for verb in ("finetune", "run"):
        done = ingot(verb, project.recipe, "optim.lr=1e-3", "evaluate.enabled=false", "--resume", project.run)
        assert done.code == 2
        assert f"--resume = '{project.run}'" in done.err
        assert "another recipe" in done.err
    done = ingot("finetune", project.recipe, "evaluate.enabled=false", "--resume", project.run)
    assert done.code == 2
    assert "`ingot run RECIPE --resume` goes on" in done.err
    assert sorted(path for path in project.run.rglob("*")) == before


def test_loss_that_is_not_finite(ingot, project):
    done = ingot("finetune", project.recipe, "adapter.kind=none", "optim.lr=1e30", "optim.clip_grad_norm=null")
    assert done.code == 1
    assert "loss" in done.err
    assert "lower optim.lr" in done.err
    assert json.loads((project.run / "run.json").read_text())["status"] == "failed"


def test_hub_without_a_network_is_one_message_within_seconds(tmp_path):
    """The real hub library, in a process of its own, against a port where nothing listens."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
    code = "import time; start = time.monotonic(); from ingot.model.load import load_tokenizer\n"
    code += "from ingot.recipe import Model; from pathlib import Path\nfrom ingot.errors import ModelError\n"
    code += "began = time.monotonic()\ntry: load_tokenizer(Model(source='hf://Qwen/ingot-test-absent'), Path('.'))\n"
    code += "except ModelError as error: print(error, round(time.monotonic() - began, 1), sep='|')\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | nowhere, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    message, seconds = done.stdout.strip().rsplit("|", 1)
    assert "model.source = 'hf://Qwen/ingot-test-absent'" in message
    assert "the hub cannot be reached" in message
    assert float(seconds) < 60
