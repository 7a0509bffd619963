"""Passed, failed, skipped; faults that are planted in a package are seen."""

import importlib.util
import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingot.conformance import azure_targets, engine_targets, processes, server_targets, targets, venvs
from ingot.conformance.case import Case, Mismatch, Unavailable
from ingot.conformance.targets import TARGETS, all_passed, conform
from ingot.model.runtime import Runtime
from ingot.packaging.bundle import package_model

EXAMPLES = {"chat": {"input_string": "Hello!"}, "text": {"input_string": "What is"}, "head": {"text": "Hello!"}}
TASKS = {"chat": "chat-completion", "text": "text-generation", "head": "text-classification"}


@pytest.fixture
def make_case(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Case]:
    """make_case("chat"): its package, and what the runtime answers."""

    def make(kind: str) -> Case:
        folder, example = request.getfixturevalue(f"{kind}_folder"), EXAMPLES[kind]
        if kind == "head":  # training's export names the classes in both
            config = json.loads((folder / "config.json").read_text())
            config["id2label"] = {str(i): label for i, label in enumerate(["bad", "fair", "good"])}
            (folder / "config.json").write_text(json.dumps(config))
        runtime = Runtime.load(folder)
        answer = json.loads(json.dumps(runtime.answer([example])[0]))
        package = package_model(
            folder,
            tmp_path / "package",
            name="tiny",
            task=TASKS[kind],
            example_input=example,
            metadata={},
            license=None,
        )
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        about = {"new_tokens": runtime.default_new_tokens, "longest": runtime.answering.longest}
        return Case(package, TASKS[kind], [example], [answer], scratch, answer, False, 60.0, about)

    return make


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Without a package: for targets that open none."""
    return Case(tmp_path, "text-classification", [{"text": "x"}], [{"label": "a", "probability": 0.5}], tmp_path)


def answering(monkeypatch: pytest.MonkeyPatch, function: Callable[[Case], Any]) -> None:
    monkeypatch.setitem(TARGETS, "planted", "ingot.conformance.targets:planted")
    monkeypatch.setattr(targets, "planted", function, raising=False)


def test_a_target_is_asked_form_by_form_until_one_differs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forms(case: Case) -> Iterator[Any]:
        yield "first", case.expected
        yield "second", [{"label": "a", "probability": 0.5 + 5e-6}]
        yield "third", [{"label": "b", "probability": 0.5}]
        raise AssertionError("asked on")

    answering(monkeypatch, forms)
    found = conform(case, "planted")
    assert (found.state, found.forms) == ("failed", ("first", "second", "third"))
    assert found.difference == pytest.approx(5e-6)
    assert found.reason.startswith("third: [0].label differs")


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (Unavailable("no such program"), "skipped", "no such program"),
        (Mismatch("does not load\nmore"), "failed", "does not load"),
        (KeyError("outputs"), "failed", "KeyError: 'outputs'"),
        (OSError("disk"), "failed", "disk"),
    ],
)
def test_errors_are_results(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str, said: str
) -> None:
    def broken(case: Case) -> Iterator[Any]:
        raise error
        yield

    answering(monkeypatch, broken)
    found = conform(case, "planted")
    assert (found.state, found.reason) == (state, said)


def test_a_row_too_few_is_a_difference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda case: iter([("form", [])]))
    assert conform(case, "planted").reason == "form: the answer has 0 entries instead of 1"
    answering(monkeypatch, lambda case: iter([]))
    assert conform(case, "planted").reason == "it gave no answer"


def test_skipped_never_counts_as_passed() -> None:
    passed, skipped = targets.Result("a", "passed", 0.1), targets.Result("b", "skipped", 0.1)
    assert all_passed([passed, skipped])
    assert not all_passed([skipped])
    assert not all_passed([passed, targets.Result("c", "failed", 0.1)])


def child(name: str) -> Any:
    """A child script as a module: its imports cost seconds in a process of its own."""
    spec = importlib.util.spec_from_file_location(name, processes.CHILDREN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_this_process(case: Case, script: Path, python: Path = Path(), **request: Any) -> Any:
    about = {"model": str(case.model), "package": str(case.package), "rows": case.rows, "task": case.task}
    asked, answered = case.scratch / "request.json", case.scratch / "response.json"
    asked.write_text(json.dumps(about | request))
    child(script.stem).main(str(asked), str(answered))
    return json.loads(answered.read_text())


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.conformance import python_targets

    monkeypatch.setattr(python_targets, "ask_child", in_this_process)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_plain_transformers_answers_the_same(make_case: Callable[[str], Case], near: None, kind: str) -> None:
    found = conform(make_case(kind), "huggingface")
    assert (found.state, found.reason) == ("passed", "")
    assert found.difference is not None and found.difference < 1e-6


def asked(case: Case, row: dict[str, str]) -> Case:
    """With one other row, and what the runtime answers it."""
    return replace(case, rows=[row], expected=json.loads(json.dumps(Runtime.load(case.model).answer([row]))))


def test_plain_transformers_cuts_a_text_where_training_did(
    make_case: Callable[[str], Case], near: None, head_folder: Path
) -> None:
    about = json.loads((head_folder / "ingot.json").read_text()) | {"max_tokens": 8}
    (head_folder / "ingot.json").write_text(json.dumps(about))
    found = conform(asked(make_case("head"), {"text": "Hello! How are you? " * 50}), "huggingface")
    assert (found.state, found.reason) == ("passed", "")


def test_plain_transformers_writes_as_far_as_positions_reach(make_case: Callable[[str], Case], near: None) -> None:
    case = make_case("text")
    runtime = Runtime.load(case.model)
    text = next(text for n in range(200) if len(runtime.prompt_ids(text := "What" + " is" * n)) == 126)
    found = conform(asked(case, {"input_string": text}), "huggingface")
    assert (found.state, found.reason) == ("passed", "")


def test_answers_of_a_batch_are_cut_at_line_feeds_alone(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.conformance import python_targets

    answer = {"output_string": "a\u2028b\x85c"}

    def write(*_: Any) -> None:
        (case.scratch / "answers").mkdir()
        line = json.dumps(answer, ensure_ascii=False) + "\n"
        (case.scratch / "answers" / "part-0.jsonl").write_text(line, encoding="utf-8")

    monkeypatch.setattr(python_targets, "run", write)
    found = conform(replace(case, expected=[answer]), "batch")
    assert (found.state, found.reason) == ("passed", "")


def rewrite(path: Path, content: bytes) -> None:
    """Another file in its place: the model folder that it was linked from stays."""
    path.unlink()
    path.write_bytes(content)


def change_weight(case: Case) -> None:
    from safetensors.torch import load_file, save_file

    path = case.model / "model.safetensors"
    tensors = load_file(path)
    name = "score.weight" if case.task == "text-classification" else "model.embed_tokens.weight"
    tensors[name] = tensors[name].roll(1, 0)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def change_tokenizer(case: Case) -> None:
    path = case.model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["H"], vocabulary["e"], vocabulary["W"] = vocabulary["e"], vocabulary["W"], vocabulary["H"]
    rewrite(path, json.dumps(content).encode())


def lose_template(case: Case) -> None:
    (case.model / "chat_template.jinja").unlink()


def change_template(case: Case) -> None:
    path = case.model / "chat_template.jinja"
    rewrite(path, path.read_bytes().replace(b"<|im_start|>assistant", b"<|im_start|>system"))


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("chat", change_weight, "differs"),
        ("head", change_weight, "differs"),
        ("text", change_tokenizer, "differs"),
        ("chat", lose_template, "chat_template"),
        ("chat", change_template, "differs"),
    ],
)
def test_planted_faults_are_seen(
    make_case: Callable[[str], Case], near: None, kind: str, fault: Callable[[Case], None], said: str
) -> None:
    case = make_case(kind)
    fault(case)
    found = conform(case, "huggingface")
    assert found.state == "failed" and said in found.reason


def test_the_answer_from_training_is_held_against_this_process(make_case: Callable[[str], Case]) -> None:
    case = make_case("head")
    assert conform(case, "runtime").state == "passed"
    other = case.expected[0] | {"probability": 0.25}
    assert "probability differs" in conform(replace(case, expected=[other]), "runtime").reason
    assert case.trained is not None
    near = case.trained | {"probability": case.trained["probability"] + 5e-6}
    assert conform(replace(case, trained=near), "runtime").difference == pytest.approx(5e-6)
    without = conform(replace(case, trained=None), "runtime")
    assert without.state == "skipped" and without.reason.startswith("no answer stored")
    elsewhere = conform(replace(case, about=case.about | {"answered_on": "cuda"}), "runtime")
    assert elsewhere.state == "skipped" and "cuda" in elsewhere.reason


@pytest.mark.slow  # a server in a process of its own
@pytest.mark.parametrize("kind", ["chat", "head"])
def test_our_endpoint_answers_every_form(
    make_case: Callable[[str], Case], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("INGOT_API_KEY", "INGOT_ADMIN_KEY"):  # the user's own, for other servers
        monkeypatch.setenv(name, "k" * 40)
    found = conform(make_case(kind), "ingot-serve")
    assert (found.state, found.reason) == ("passed", "")
    assert found.forms[:4] == ("dataframe_split", "dataframe_records", "instances", "inputs")
    assert ("openai" in found.forms) == (kind == "chat")


@pytest.mark.slow
def test_our_endpoint_with_another_weight_is_seen(make_case: Callable[[str], Case]) -> None:
    case = make_case("head")
    change_weight(case)
    assert "differs" in conform(case, "ingot-serve").reason


def model_file(case: Case) -> dict[str, Any]:
    return dict(yaml.safe_load((case.package / "MLmodel").read_text()))


def test_azures_contract_names_what_it_would_trip_over(make_case: Callable[[str], Case]) -> None:
    case = make_case("chat")
    assert conform(case, "azure-no-code").state == "passed"
    whole = model_file(case)
    nested = [{"type": "array", "items": {"type": "object"}, "name": "messages"}]
    for change, said in (
        ({"flavors": {}}, "no python_function"),
        ({"saved_input_example_info": {"type": "json_object"}}, "json_object"),
        ({"signature": whole["signature"] | {"inputs": json.dumps(nested)}}, "messages are no scalars"),
        ({"signature": None}, "names no inputs"),
    ):
        [found, *_] = azure_targets.no_code_faults(case, whole | change)
        assert said in found
    (case.package / "conda.yaml").unlink()
    assert "azureml-inference-server-http" in azure_targets.no_code_faults(case, whole)[0]


def test_what_cannot_run_here_says_why(
    make_case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    case = make_case("text")
    said = {name: conform(case, name) for name in ("mlserver", "openai-client", "spark_udf", "azure-server", "vllm")}
    assert {it.state for it in said.values()} == {"skipped"}
    assert "--no-install" in said["mlserver"].reason and "mlserver" in said["mlserver"].reason
    assert "Java" in said["spark_udf"].reason
    assert "--no-install" in said["azure-server"].reason
    (case.package / "azure" / "score.py").unlink()
    assert "azure/score.py" in conform(case, "azure-server").reason
    assert "vllm is not on PATH" in said["vllm"].reason
    assert not (tmp_path / "cache").exists()


ENGINE = """#!{python}
import http.server, json, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.dumps([self.path, body.get("max_tokens"), sys.argv[1:3]])
        answer = json.dumps({{"choices": [{{"text": text}}]}}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(answer))); self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *arguments): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_an_engine_on_path_is_pointed_inside_the_package(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM cannot be installed here: a program of its name speaks its protocol."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(ENGINE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    text = json.dumps(["/v1/completions", 12, ["serve", str(case.model)]])
    found = conform(writes(case, text), "vllm")
    assert (found.state, found.reason) == ("passed", "")


def writes(case: Case, *expected: str) -> Case:
    return replace(
        case,
        task="text-generation",
        rows=[{"input_string": "x"} for _ in expected],
        expected=[{"output_string": text} for text in expected],
        about={"new_tokens": 12},
    )


def test_a_gguf_file_is_for_llama_cpp(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither llama.cpp nor Ollama can be installed here: programs of these names speak their protocol."""
    case.model.mkdir()
    (case.model / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    case = writes(case, "wrong", json.dumps(["/v1/completions", 12, ["--model", str(case.gguf)]]))
    found = {name: conform(case, name) for name in TARGETS}
    assert {it.state for it in found.values()} == {"skipped"}
    others = [it.reason for name, it in found.items() if name not in targets.READ_GGUF]
    assert set(others) == {"the package holds a GGUF file, which only llama-cpp and ollama read"}
    assert "llama-server" in found["llama-cpp"].reason and "ollama is not on PATH" in found["ollama"].reason

    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(ENGINE.format(python=sys.executable))
    program.chmod(0o755)
    passed = conform(case, "llama-cpp")
    assert (passed.state, passed.reason) == ("passed", "")
    assert passed.forms == ("openai (1 of 2 texts as the merged model's)",)
    other = conform(writes(case, "wrong", "wrong too"), "llama-cpp")
    assert (other.state, other.reason) == ("failed", "openai: no text begins as the merged model's does")
    (case.model / "model.gguf").unlink()
    assert "no GGUF file" in conform(case, "llama-cpp").reason


LLAMA = """
import json
class Llama:
    def __init__(self, model_path, n_ctx, verbose): self.path = model_path
    def create_completion(self, prompt, **how):
        return {"choices": [{"text": json.dumps([self.path, prompt, how])}]}
    def create_chat_completion(self, messages, **how):
        return {"choices": [{"message": {"content": json.dumps([self.path, messages, how])}}]}
"""


@pytest.mark.parametrize("task", ["text-generation", "chat-completion"])
def test_llama_cpp_s_python_package_is_asked_where_its_program_is_not(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str
) -> None:
    """The package cannot be installed here: a module of its name answers what it was asked."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(engine_targets, "ask_child", in_this_process)
    case.model.mkdir()
    (case.model / "model.gguf").write_bytes(b"GGUF")
    asked = "x" if task == "text-generation" else [{"role": "user", "content": "x"}]
    case = writes(case, json.dumps([str(case.gguf), asked, {"temperature": 0.0, "max_tokens": 12}]))
    found = conform(replace(case, task=task), "llama-cpp")
    sys.modules.pop("llama_cpp", None)  # imported here and not in a child: other tests would take it for installed
    assert (found.reason, found.forms) == ("", ("python (1 of 1 texts as the merged model's)",))


def test_a_server_that_ends_or_never_comes_up_is_told(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [sys.executable, "-c", "print('no such flag'); raise SystemExit(3)"]
    with (
        pytest.raises(Mismatch, match="status 3: no such flag"),
        processes.server(case, "x", ends, "http://127.0.0.1:1"),
    ):
        pass
    case = replace(case, timeout_s=0.2)
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    with pytest.raises(Mismatch, match="was not up"), processes.server(case, "x", hangs, "http://127.0.0.1:1"):
        pass
    assert time.monotonic() - started < 30


def test_a_server_is_waited_for_as_long_as_the_case_says(case: Case) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/invocations"
        started = time.monotonic()
        with pytest.raises(Mismatch, match=r"no answer within 0\.3 s \(--timeout\)"):
            processes.post(replace(case, timeout_s=0.3), url, {})
        assert time.monotonic() - started < 10
    with pytest.raises(Mismatch, match="no connection"):
        processes.post(case, url, {})


def test_children_learn_how_long_they_may_wait(case: Case, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys\nopen(sys.argv[2], 'w').write(json.dumps(json.load(open(sys.argv[1]))['timeout_s']))"
    )
    assert processes.ask_child(replace(case, timeout_s=77.0), script) == 77.0


def test_nothing_but_engines_sees_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert processes.clean(case)["CUDA_VISIBLE_DEVICES"] == ""
    assert processes.clean(case, gpu=True)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_child_runs_clean_and_is_ended(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\nassert 'INGOT_SECRET' not in os.environ and os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "open(sys.argv[2], 'w').write(json.dumps(json.load(open(sys.argv[1]))['rows']))"
    )
    monkeypatch.setenv("INGOT_SECRET", "x")
    assert processes.ask_child(case, script) == case.rows
    script.write_text("raise SystemExit('broken')")
    with pytest.raises(Mismatch, match="exit status 1: broken"):
        processes.ask_child(case, script)
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(Mismatch, match="no answer within"):
        processes.ask_child(replace(case, timeout_s=0.5), script)


def test_environments_are_kept_by_what_is_in_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INGOT_CACHE", str(tmp_path))
    made: list[list[str]] = []

    def run(command: list[str], log: Path) -> None:
        made.append(command)
        if "venv" in command:
            own = Path(command[-1]) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
            (own / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(venvs, "_run", run)
    python = venvs.environment("x", ["a==1"], install=True)
    assert made[1][-1] == "a==1" and "install" in made[1]
    [beside] = python.parents[1].rglob("beside.pth")
    assert str(Path(pytest.__file__).parents[1]) == beside.read_text().strip()
    assert venvs.environment("x", ["a==1"], install=False) == python and len(made) == 2
    assert venvs.environment("x", ["a==2"], install=True) != python
    shutil.rmtree(python.parents[1])

    def fails(command: list[str], log: Path) -> None:
        if "install" in command:
            raise Unavailable("its environment cannot be installed: no matching distribution")

    monkeypatch.setattr(venvs, "_run", lambda command, log: (run(command, log), fails(command, log)))
    with pytest.raises(Unavailable, match="no matching"):
        venvs.environment("x", ["a==1"], install=True)
    with pytest.raises(Unavailable, match="--no-install"):  # half of one is none
        venvs.environment("x", ["a==1"], install=False)


def test_v2_carries_every_column() -> None:
    body = server_targets.v2({"question": "q", "context": "c"})
    assert [it["name"] for it in body["inputs"]] == ["question", "context"]
    answer = {"outputs": [{"name": "label", "data": ["a"]}, {"name": "probability", "data": [0.5]}]}
    assert server_targets.of_v2(answer) == {"label": "a", "probability": 0.5}
    nested = {"name": "tags", "data": ['["O"]'], "parameters": {"content_type": "pd_json"}}
    assert server_targets.of_v2({"outputs": [nested]}) == {"tags": ["O"]}
