"""A packaged model gives one answer everywhere: MLflow's loader, MLflow's own server, and our endpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingot.model.runtime import Runtime
from ingot.packaging import package_model, verify_package
from ingot.serving.server import Endpoint

PROMPT = "Once upon a time"
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]


def _ask(url: str, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{url}/invocations", json=body, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.slow
def test_a_story_is_the_same_everywhere(shared_dir: Path, tmp_path: Path, mlflow_serve: Callable[..., Any]) -> None:
    source = shared_dir / "models" / "stories260k"
    out = tmp_path / "package"
    example = {"input_string": PROMPT}
    package_model(
        source, out, name="stories", task="text-generation", example_input=example, metadata={}, license="mit"
    )
    wanted = Runtime.load(source).complete(PROMPT).text
    assert wanted.startswith(", there was a little girl named Lily.")
    answer = {"output_string": wanted}
    assert verify_package(out, [example], [answer]).answers == [answer]
    short = Runtime.load(source).complete(PROMPT, max_new_tokens=7).text
    params = {"max_tokens": 7}
    with mlflow_serve(out) as url:
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
def test_a_conversation_is_the_same_everywhere(
    make_tokenizer: Callable[..., Any], tmp_path: Path, mlflow_serve: Callable[..., Any]
) -> None:
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
    with mlflow_serve(out) as url, Endpoint(out) as endpoint:
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
