"""A packaged model gives one answer everywhere: MLflow's loader, MLflow's own server, and our endpoint."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingot.model.runtime import Runtime
from ingot.packaging import package_model, verify_package
from ingot.serving import Endpoint

PROMPT = "Once upon a time"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
START_TIMEOUT_S = 180.0


@contextmanager
def _mlflow_serve(package: Path, place: Path) -> Iterator[str]:
    """`mlflow models serve` on a free port, in an environment that does not know Ingot; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        str(package),
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with (place / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local"],
            cwd=place,
            env=kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    httpx.get(f"{url}/ping", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    running = server.poll() is None and time.monotonic() < deadline
                    assert running, (place / "server.log").read_text()[-3000:]
                    time.sleep(0.3)
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _ask(url: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{url}/invocations", json=body, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.slow
def test_a_story_is_the_same_everywhere(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "stories260k"
    out = tmp_path / "package"
    example = {"input_string": PROMPT}
    package_model(
        source, out, name="stories", task="text-generation", example_input=example, metadata={}, license="mit"
    )
    wanted = Runtime.load(source).complete(PROMPT).text
    assert wanted.startswith(", there was a little girl named Lily.")
    assert verify_package(out, [example], [wanted]).answers == [wanted]
    short = Runtime.load(source).complete(PROMPT, max_new_tokens=7).text
    params = {"max_tokens": 7}
    with _mlflow_serve(out, tmp_path) as url:
        saved = json.loads((out / "serving_input_example.json").read_text())
        assert _ask(url, saved) == {"predictions": [{"output_string": wanted}]}
        for body in (
            {"dataframe_split": {"columns": ["input_string"], "data": [[PROMPT]]}, "params": params},
            {"dataframe_records": [example], "params": params},
            {"inputs": {"input_string": [PROMPT]}, "params": params},
        ):
            assert _ask(url, body) == {"predictions": [{"output_string": short}]}
    with Endpoint(out) as endpoint:
        assert endpoint.name == "stories"
        assert endpoint.ask(PROMPT) == wanted
        assert _ask(endpoint.url, saved) == {"predictions": [{"output_string": wanted}]}


@pytest.mark.slow
def test_a_conversation_is_the_same_everywhere(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "package"
    package_model(
        tmp_path / "model",
        out,
        name="tiny",
        task="chat-completion",
        example_input={"messages": TURNS},
        metadata={},
        license=None,
    )
    wanted = Runtime.load(out / "model").chat(TURNS).text
    alone = Runtime.load(out / "model").chat(TURNS[1:]).text
    assert wanted != alone
    with _mlflow_serve(out, tmp_path) as url, Endpoint(out) as endpoint:
        for body, answer in (
            ({"dataframe_records": [{"messages": json.dumps(TURNS)}]}, wanted),
            ({"dataframe_records": [{"messages": TURNS}]}, wanted),
            ({"dataframe_records": [{"input_string": "Hello!"}]}, alone),
            ({"inputs": {"input_string": "Hello!"}}, alone),
        ):
            assert _ask(url, body) == _ask(endpoint.url, body) == {"predictions": [{"output_string": answer}]}
        # MLflow returns the answer to an unwrapped body without the envelope.
        assert _ask(url, {"messages": TURNS}) == [{"output_string": wanted}]
        assert endpoint.ask(TURNS) == wanted
