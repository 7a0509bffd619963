"""Engines that are pointed inside the package, where they are installed: vLLM, TGI, and Ollama."""

import shutil
import subprocess

from .case import Answers, Case, Mismatch, Unavailable
from .processes import clean, free_port, post, server
from .server_targets import WRITING, openai_row


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
    with server(case, "vllm", command, f"{url}/health"):
        yield "openai", [openai_row(case, url, row, "model") for row in case.rows]


def tgi(case: Case) -> Answers:
    """`text-generation-launcher` on the inner folder."""
    port = free_port()
    flags = ["--hostname", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command = [_program(case, "text-generation-launcher"), "--model-id", str(case.model), *flags]
    url = f"http://127.0.0.1:{port}"
    with server(case, "tgi", command, f"{url}/health"):
        yield "openai", [openai_row(case, url, row, "tgi") for row in case.rows]


def ollama(case: Case) -> Answers:
    """Ollama's own server, with the inner folder (or the package's GGUF file) as a model that is made and removed."""
    program, port = _program(case, "ollama"), free_port()
    gguf = sorted(case.package.rglob("*.gguf"))
    source = gguf[0] if gguf else case.model
    modelfile = case.scratch / "Modelfile"
    new_tokens = case.about.get("new_tokens", 128)
    settings = f"PARAMETER temperature 0\nPARAMETER num_predict {new_tokens}\n"
    modelfile.write_text(f"FROM {source}\n{settings}", encoding="utf-8")
    env = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(case.scratch / "ollama")}
    url = f"http://127.0.0.1:{port}"
    with server(case, "ollama", [program, "serve"], url, env):
        done = subprocess.run(
            [program, "create", "ingot-conform", "-f", str(modelfile)],
            env=clean(case, env),
            capture_output=True,
            text=True,
            timeout=case.timeout_s,
        )
        if done.returncode != 0:
            raise Mismatch(f"ollama does not take the model: {done.stderr.strip()[-200:]}")
        if case.task == "chat-completion":
            yield "openai", [openai_row(case, url, row, "ingot-conform") for row in case.rows]
            return
        found = []
        for row in case.rows:
            asked = {"model": "ingot-conform", "prompt": row["input_string"], "raw": True, "stream": False}
            found.append({"output_string": post(f"{url}/api/generate", asked)["response"]})
        yield "generate", found
