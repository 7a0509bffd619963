"""A package answers every form of /invocations alike behind MLflow's own server and behind our endpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ingot.packaging import package_model
from ingot.serving import Endpoint

TALK = [{"role": "user", "content": "Hello!"}]
LIMIT = {"max_tokens": 7}
BODIES: list[dict[str, Any]] = [
    {"dataframe_split": {"columns": ["input_string"], "data": [["Hello!"], ["What is"]]}},
    {"dataframe_split": {"index": [4, 5], "columns": ["input_string"], "data": [["Hello!"], ["What is"]]}},
    {"dataframe_records": [{"input_string": "Hello!"}, {"input_string": "What is"}], "params": LIMIT},
    {"inputs": {"input_string": ["Hello!", "What is"]}, "params": LIMIT},
    {"inputs": {"input_string": "Hello!"}},
    {"instances": [{"input_string": "Hello!"}, {"input_string": "What is"}]},
    {"instances": {"input_string": ["Hello!"]}, "params": {"temperature": 1.0, "seed": 3}},
    {"dataframe_records": [{"messages": json.dumps(TALK)}]},
    {"dataframe_records": [{"messages": TALK}], "params": {"stop": ["a"]}},
    {"messages": TALK},
    {"messages": TALK, "max_tokens": 5},
]
WRONG: list[dict[str, Any]] = [
    {"dataframe_records": [{"input_string": "Hello!"}], "params": {"temperature": "hot"}},
    {"bogus": 1},
    {"inputs": ["a"], "instances": ["a"]},
]


@pytest.mark.slow
def test_every_form_of_a_body(
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
    about: dict[str, Any] = {"name": "tiny", "task": "chat-completion", "metadata": {}, "license": None}
    package_model(tmp_path / "model", out, example_input={"input_string": "Hello!"}, **about)
    with mlflow_serve(out) as theirs, Endpoint(out) as ours, httpx.Client(trust_env=False) as client:
        for body in BODIES:
            told = [client.post(f"{url}/invocations", json=body, timeout=60) for url in (theirs, ours.url)]
            assert [one.status_code for one in told] == [200, 200], (body, [one.text for one in told])
            assert told[0].json() == told[1].json(), body
        for body in WRONG:
            told = [client.post(f"{url}/invocations", json=body, timeout=60) for url in (theirs, ours.url)]
            assert [one.status_code for one in told] == [400, 400], (body, [one.text for one in told])
