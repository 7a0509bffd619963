"""OpenAI's routes: models, chat completions, completions, embeddings."""

import base64
import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

from ingot.model.runtime import Runtime
from ingot.model.sampling import Generation, InputError, Sampling
from ingot.serving.deployments import Deployed, Deployments
from ingot.serving.likelihoods import echoed
from ingot.serving.openai_answers import chat_logprobs, envelope, text_logprobs, usage
from ingot.serving.openai_schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Settings
from ingot.serving.openai_stream import ChatEvents, TextEvents, streamed
from ingot.serving.record import current
from ingot.serving.structured import guided
from ingot.serving.tools import CLOSES, forced, prompt_of, read


@dataclass(frozen=True)
class Asked:
    """A request as the engine takes it: each prompt `n` times."""

    prompts: list[list[int]]
    samplings: list[Sampling]


def _asked(runtime: Runtime, prompts: list[list[int]], body: Settings, more: dict[str, Any] | None = None) -> Asked:
    vocabulary = int(runtime.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    given = body.sampling(vocabulary) | (more or {})
    samplings = [runtime.sampling([prompt], given) for prompt in prompts]
    n = body.n or 1
    return Asked([p for p in prompts for _ in range(n)], [s for s in samplings for _ in range(n)])


def _chat(runtime: Runtime, body: ChatRequest) -> Asked:
    """Raises InputError."""
    wanted, offered, must = body.schema_wanted(), body.offered(), body.must_call()
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in offered]
    prompt, more = prompt_of(runtime, body.turns(), tools or None), dict[str, Any]()
    if must:
        named = [tool.model_dump(exclude_none=True) for tool in must]
        begun, schema = forced(runtime, named)
        prompt, more = prompt + begun, {"guide": guided(runtime, schema, "tool_choice")}
    elif wanted is not None:
        more = {"guide": guided(runtime, wanted, "response_format")}
    elif offered and body.parallel_tool_calls is False:
        own = [body.stop] if isinstance(body.stop, str) else body.stop or []
        more = {"stop": [*own, CLOSES]}  # behind the first call
    return _asked(runtime, [prompt], body, more)


def _completion_prompts(runtime: Runtime, body: CompletionRequest) -> list[list[int]]:
    vocabulary = int(runtime.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    prompts = [p if isinstance(p, list) else runtime.prompt_ids(p) for p in body.prompts()]
    if any(not 0 <= token < vocabulary for prompt in prompts for token in prompt):
        raise InputError("prompt", f"prompt: token ids are from 0 to {vocabulary - 1}")
    if not isinstance(body.prompt, str):
        runtime.prompt_ids("")  # refuses for a model that writes no text
    return prompts


class OpenAI:
    """The handlers over what is served."""

    def __init__(self, deployments: Deployments) -> None:
        self.deployments = deployments

    def models(self) -> dict[str, Any]:
        """What is served."""
        return {"object": "list", "data": [_entry(one) for one in self.deployments.all()]}

    def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        return _entry(self.deployments.choose(model))

    async def chat(self, body: ChatRequest) -> Any:
        """Answer a conversation, or stream the answer."""
        model = self.deployments.choose(body.model)
        asked = await model.engine.prepare(lambda runtime: _chat(runtime, body))
        names = {tool.function.name for tool in body.offered()}
        tokenizer = model.engine.runtime.tokenizer
        if body.stream:
            events = ChatEvents(envelope(model.name, "chatcmpl", "chat.completion.chunk"), body, tokenizer, names)
            return await streamed(model.engine.stream(asked.prompts, asked.samplings), events, len(asked.prompts))
        answers = await model.engine.write(asked.prompts, asked.samplings)
        choices = [_chat_choice(i, answer, names, tokenizer, body) for i, answer in enumerate(answers)]
        return envelope(model.name, "chatcmpl", "chat.completion") | {
            "choices": choices,
            "usage": usage(answers, body.n or 1),
        }

    async def completions(self, body: CompletionRequest) -> Any:
        """Continue prompts, or stream how they go on."""
        model = self.deployments.choose(body.model)
        if body.scores():
            return await self._scores(model, body)
        asked = await model.engine.prepare(lambda runtime: _asked(runtime, _completion_prompts(runtime, body), body))
        tokenizer = model.engine.runtime.tokenizer
        begins = envelope(model.name, "cmpl", "text_completion")
        if body.stream:
            events = TextEvents(begins, body, tokenizer)
            return await streamed(model.engine.stream(asked.prompts, asked.samplings), events, len(asked.prompts))
        answers = await model.engine.write(asked.prompts, asked.samplings)
        choices = [
            {
                "index": i,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "logprobs": None if body.told is None else text_logprobs(tokenizer, answer.told),
            }
            for i, answer in enumerate(answers)
        ]
        return begins | {"choices": choices, "usage": usage(answers, body.n or 1)}

    async def _scores(self, model: Deployed, body: CompletionRequest) -> dict[str, Any]:
        prompts = body.prompts()
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("prompt", "prompt: likelihoods are told of texts, not of token ids")
        texts = [str(prompt) for prompt in prompts]
        # One at a time: others' rows are written between them, and a request that has ended asks no more.
        told = [await model.engine.run(partial(echoed, text=text)) for text in texts]
        choices = [
            {"index": index, "text": text, "finish_reason": "length", "logprobs": one}
            for index, (text, one) in enumerate(zip(texts, told, strict=True))
        ]
        n = sum(len(one["tokens"]) for one in told)
        current().prompt_tokens += n
        used = {"prompt_tokens": n, "completion_tokens": 0, "total_tokens": n}
        return envelope(model.name, "cmpl", "text_completion") | {"choices": choices, "usage": used}

    async def embeddings(self, body: EmbeddingRequest) -> dict[str, Any]:
        """The vectors of texts."""
        model = self.deployments.choose(body.model)
        if model.task != "embeddings":
            raise InputError("model", f"this model is for {model.task}: it makes no embeddings")
        texts = [body.input] if isinstance(body.input, str) else body.input
        answers = await model.engine.answer([{"text": text} for text in texts], {})
        n = await model.engine.prepare(lambda it: sum(map(len, it.answering.text_ids(texts, "input"))))
        current().prompt_tokens = n  # instead of the estimate
        data = [
            {"object": "embedding", "index": i, "embedding": _coded(answer["embedding"], body.encoding_format)}
            for i, answer in enumerate(answers)
        ]
        used = {"prompt_tokens": n, "total_tokens": n}
        return {"object": "list", "data": data, "model": model.name, "usage": used}


def _entry(one: Deployed) -> dict[str, Any]:
    told = {"id": one.name, "object": "model", "created": one.created, "owned_by": "ingot", "task": one.task}
    return told | ({"parent": one.parent} if one.parent else {})


def _coded(vector: list[float], form: str | None) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector


def _chat_choice(index: int, answer: Generation, names: set[str], tokenizer: Any, body: ChatRequest) -> dict[str, Any]:
    said, calls = read(answer.text, names) if names else (answer.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": said or None if calls else said}
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "finish_reason": "tool_calls" if calls else answer.finish_reason,
        "logprobs": None if body.told is None else chat_logprobs(tokenizer, answer.told),
    }
