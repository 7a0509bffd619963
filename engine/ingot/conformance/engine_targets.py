"""Engines that are pointed inside the package, where they are installed: vLLM, TGI, Ollama, llama.cpp. They may use a
GPU, as nothing else here: without one, some do not start.
"""

import shutil
from importlib.util import find_spec

from ingot.model.runtime import WRITING

from .case import Answers, Case, Mismatch, Record, Unavailable
from .processes import CHILDREN, ask_child, clean, free_port, post, run, server
from .server_targets import openai_row


def _program(case: Case, name: str) -> str:
    if case.task not in WRITING:
        raise Unavailable(f"it is asked by OpenAI's text routes, and this model is for {case.task}")
    if case.base is not None:
        raise Unavailable("the package holds an adapter: it is pointed at a complete folder, the merged form's")
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"the program {name} is not on PATH")
    return found


def vllm(case: Case) -> Answers:
    """`vllm serve` on the inner folder."""
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model", "--dtype", "float32"]
    command = [_program(case, "vllm"), "serve", str(case.model), *flags, "--generation-config", "vllm"]
    url = f"http://127.0.0.1:{port}"
    with server(case, "vllm", command, f"{url}/health", gpu=True):
        yield "openai", [openai_row(case, url, row, "model") for row in case.rows]


def tgi(case: Case) -> Answers:
    """`text-generation-launcher` on the inner folder."""
    port = free_port()
    flags = ["--hostname", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command = [_program(case, "text-generation-launcher"), "--model-id", str(case.model), *flags]
    url = f"http://127.0.0.1:{port}"
    with server(case, "tgi", command, f"{url}/health", gpu=True):
        yield "openai", [openai_row(case, url, row, "tgi") for row in case.rows]


def ollama(case: Case) -> Answers:
    """Ollama's own server, with the inner folder (or the package's GGUF file) as a model that is made and removed."""
    program, port = _program(case, "ollama"), free_port()
    modelfile = case.scratch / "Modelfile"
    settings = f"PARAMETER temperature 0\nPARAMETER num_predict {_new_tokens(case)}\n"
    modelfile.write_text(f"FROM {case.gguf or case.model}\n{settings}", encoding="utf-8")
    env = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(case.scratch / "ollama")}
    url = f"http://127.0.0.1:{port}"
    with server(case, "ollama", [program, "serve"], url, env, gpu=True):
        run(case, "ollama-create", [program, "create", "ingot-conform", "-f", str(modelfile)], clean(case, env))
        if case.task == "chat-completion":
            yield _held(case, "openai", [openai_row(case, url, row, "ingot-conform") for row in case.rows])
            return
        found = []
        for row in case.rows:
            asked = {"model": "ingot-conform", "prompt": row["input_string"], "raw": True, "stream": False}
            found.append({"output_string": post(case, f"{url}/api/generate", asked)["response"]})
        yield _held(case, "generate", found)


def llama_cpp(case: Case) -> Answers:
    """llama.cpp on the package's GGUF file: its server, else its Python package."""
    if case.gguf is None:
        raise Unavailable("the package holds no GGUF file, which llama.cpp reads (package.forms: gguf)")
    program = shutil.which("llama-server")
    if program is None and find_spec("llama_cpp") is None:
        raise Unavailable("neither the program llama-server is on PATH nor the Python package llama_cpp installed")
    if program is None:
        script = CHILDREN / "llama_child.py"
        yield _held(case, "python", ask_child(case, script, gguf=str(case.gguf), new_tokens=_new_tokens(case)))
        return
    port = free_port()
    flags = ["--model", str(case.gguf), "--host", "127.0.0.1", "--port", str(port), "--jinja"]
    url = f"http://127.0.0.1:{port}"
    with server(case, "llama-cpp", [program, *flags], f"{url}/health", gpu=True):
        yield _held(case, "openai", [openai_row(case, url, row, "model") for row in case.rows])


def _new_tokens(case: Case) -> int:
    return int(case.about.get("new_tokens", 128))


def _held(case: Case, form: str, records: list[Record]) -> tuple[str, list[Record]]:
    """What a target yields. A GGUF file holds rounded weights, so that a text may go another way after some words: how
    many are equal is told. Where none begins with the word that it should, another tokenizer or template is at work,
    and Mismatch is raised.
    """
    if case.gguf is None:
        return form, records
    pairs = [(one["output_string"], other["output_string"]) for one, other in zip(case.expected, records, strict=True)]
    if not any(wanted.split()[:1] == got.split()[:1] for wanted, got in pairs):
        raise Mismatch(f"{form}: no text begins as the merged model's does")
    same = sum(wanted == got for wanted, got in pairs)
    return f"{form} ({same} of {len(pairs)} texts as the merged model's)", case.expected
