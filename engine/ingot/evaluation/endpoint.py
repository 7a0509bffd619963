"""A model behind an OpenAI-style endpoint as a `Subject`: it writes, and where the server tells likelihoods, it scores.

What it gives equals what the same model gives in this process: greedy answers, cut at the same stop texts; the
likelihood of a continuation's tokens, cut from its prompt where lm-evaluation-harness cuts; of a whole text, behind one
BOS more than its tokenizer puts before it. A server rolls no windows: a text longer than its context is refused.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ingot.errors import EndpointError, RecipeError
from ingot.evaluation.api import Api, Refused
from ingot.evaluation.kept import Kept, key_of
from ingot.evaluation.task import Answer, Likelihood, Prompt
from ingot.registry import nearest

CHAT, TEXT = "/chat/completions", "/completions"
SHOWN = 20  # names of models in a message
STOPS = 4  # as many stop texts does OpenAI take
WRITES, CHATS, SCORES, STARTS = "write", "chat", "score", "start"
"""What tasks need: going on with texts, answering chats, likelihoods behind a prompt, and of a whole text."""
ABSENT = (400, 404, 405, 422, 501)  # how servers say that they have not what was asked for
PROBE, PROBE_TOKENS = "One, two, three", 16  # fewer are an error where a model reasons first
_INSTEAD = "use a generation task, or measure a local model"
LACKS = {
    WRITES: "this endpoint does not go on with texts; make the task's kind chat-completion, or measure a local model",
    CHATS: "this endpoint answers no chats; make the task's kind text-generation, or measure a local model",
    SCORES: f"this endpoint tells no likelihoods of a prompt's tokens (echo with logprobs); {_INSTEAD}",
    STARTS: f"this endpoint tells no likelihoods of whole texts; {_INSTEAD}",
}


class Echoed(NamedTuple):
    """A text's tokens as the server cuts them; of each its log-probability in nats and the largest of any token there.
    None: not known, as of a first token.
    """

    tokens: list[str]
    logprobs: list[float | None]
    best: list[float | None]


class Endpoint:
    """The model called `model` behind `api`. `kept`: answers of an earlier start, and where new ones are put."""

    def __init__(self, api: Api, model: str, kept: Kept | None = None) -> None:
        self.api, self.model, self.kept = api, model, kept
        self.said: dict[str, str] = {}  # of its model, with its last answer
        self._limit_name = "max_tokens"
        self._start: str | None = None  # written before a text, has it begin with two BOS
        self._beyond = 0  # tokens that must be written where only the prompt's are wanted

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Answer]:
        """Greedy answers: of texts by /completions, of chats by /chat/completions. Raises EndpointError."""
        return self.api.each(partial(self._write, max_new_tokens=max_new_tokens, stop=tuple(stop)), prompts)

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        """Log-likelihoods of continuations. Raises EndpointError, also where the server does not tell them."""
        asked = [(prompt, text) for prompt, texts in questions for text in texts]
        found = iter(self.api.each(self._score, asked))
        return [[next(found) for _ in texts] for _, texts in questions]

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Log-likelihoods of documents. Raises EndpointError, also for one longer than the model's context."""
        if self._start is None:
            self._start = self._probe_start()
        return self.api.each(self._roll, texts)

    def _write(self, prompt: Prompt, *, max_new_tokens: int, stop: tuple[str, ...]) -> Answer:
        key = key_of(WRITES, prompt, max_new_tokens, stop)
        if (before := self._before(key)) is not None:
            return Answer(*before)
        choice, usage = self._choice(prompt, max_new_tokens, stop)
        said = choice.get("text") if isinstance(prompt, str) else choice.get("message", {}).get("content")
        text, reason = said or "", str(choice.get("finish_reason") or "stop")
        if found := [place for one in stop if (place := text.find(one)) >= 0]:
            text, reason = text[: min(found)], "stop"
        return Answer(*self._keep(key, [text, reason, usage.get("prompt_tokens"), usage.get("completion_tokens")]))

    def _choice(
        self, prompt: Prompt, max_new_tokens: int, stop: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first choice, and the usage."""
        body: dict[str, Any] = {"model": self.model, "temperature": 0}
        if isinstance(prompt, str):
            # As in this process: the blank before an answer is the answer's.
            path, body["prompt"] = TEXT, prompt.rstrip(" ")
        else:
            path = CHAT
            body["messages"] = [{name: value for name, value in turn.items() if value is not None} for turn in prompt]
        if stop:
            body["stop"] = list(stop[:STOPS])
        name = self._limit_name
        try:
            return self._post(path, body | {name: max_new_tokens})
        except Refused as error:
            if name != "max_tokens" or "max_completion_tokens" not in error.words:
                raise
            self._limit_name = "max_completion_tokens"
            return self._post(path, body | {self._limit_name: max_new_tokens})

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        reply = self.api.post(path, body)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EndpointError(f"{self.api.address.url}{path} answered without choices: not as OpenAI's does")
        told = {"served": reply.get("model"), "system_fingerprint": reply.get("system_fingerprint")}
        before, self.said = self.said, {name: str(value) for name, value in told.items() if value is not None}
        was, now = before.get("served"), self.said.get("served")
        if was and now and was != now:
            fix = "answers of two models make no result; evaluate again"
            raise EndpointError(f"{self.api.address.host} served {was} and now serves {now}: {fix}")
        usage = reply.get("usage")
        return choices[0], usage if isinstance(usage, dict) else {}

    def _score(self, question: tuple[Prompt, str]) -> Likelihood:
        prompt, continuation = question
        if not isinstance(prompt, str):
            raise EndpointError("an endpoint tells no likelihoods behind chats; ask as text, or measure a local model")
        key = key_of(SCORES, prompt, continuation)
        if (before := self._before(key)) is not None:
            return Likelihood(*before)
        whole, bare = prompt + continuation, prompt.rstrip()
        echoed = self.echo(whole)
        start = _place(echoed.tokens, whole, len(bare)) if bare else _first(echoed)
        if start is None:  # pieces of characters: their tokens' texts do not add up
            start = len(self.echo(bare).tokens)
        logprob, n = self._sum(echoed, start, continuation)
        pairs = zip(echoed.logprobs[start:], echoed.best[start:], strict=True)
        greedy = all(own is not None and (best is None or own >= best) for own, best in pairs)
        return Likelihood(*self._keep(key, [logprob, greedy, n]))

    def _roll(self, text: str) -> tuple[float, int]:
        key = key_of(STARTS, text)
        if (before := self._before(key)) is None:
            before = self._keep(key, list(self._sum(self.echo(f"{self._start}{text}"), 1, text)))
        return before[0], before[1]

    def _sum(self, echoed: Echoed, start: int, text: str) -> tuple[float, int]:
        known = [one for one in echoed.logprobs[start:] if one is not None]
        if not known:
            raise EndpointError(f"{len(text)} characters add no token of their own to what stands before; remove them")
        if len(known) < len(echoed.logprobs) - start:
            raise EndpointError(f"{self.api.address.url}{TEXT} told no likelihood of some tokens of a text")
        return sum(known), len(known)

    def echo(self, text: str) -> Echoed:
        """The tokens of `text` with their likelihoods. Raises EndpointError."""
        body = {"model": self.model, "prompt": text, "max_tokens": self._beyond, "temperature": 0, "echo": True}
        choice, usage = self._post(TEXT, body | {"logprobs": 1})
        told = choice.get("logprobs")
        told = told if isinstance(told, dict) else {}
        tokens, logprobs, tops = (told.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
        if not tokens or not isinstance(logprobs, list) or len(logprobs) != len(tokens):
            raise EndpointError(f"{self.api.address.url}{TEXT} answered without logprobs of the prompt's tokens")
        end = len(tokens) - (int(usage.get("completion_tokens") or 1) if self._beyond else 0)
        best = [max(it.values()) if it else None for it in tops or [None] * len(tokens)]
        return Echoed(tokens[:end], logprobs[:end], best[:end])

    def _before(self, key: str) -> Any:
        return None if self.kept is None else self.kept.get(key)

    def _keep(self, key: str, value: list[Any]) -> list[Any]:
        if self.kept is not None:
            self.kept.put(key, value)
        return value

    def probe(self, needs: Iterable[str]) -> dict[str, str]:
        """Try what tasks need, each by a request of a few tokens. Returns what the server then says of its model:
        `served`, and `system_fingerprint` where it has one. Raises EndpointError that says what to do where something
        is not there.
        """
        for need in sorted(set(needs)):
            try:
                self._try(need)
            except Refused as error:
                if error.status not in ABSENT:
                    raise
                raise EndpointError(f"{LACKS[need]} ({error})") from error
        return self.said

    def _try(self, need: str) -> None:
        if need == CHATS:
            self._choice([{"role": "user", "content": PROBE}], PROBE_TOKENS, ())
        elif need == WRITES:
            self._choice(PROBE, 1, ())
        elif need == SCORES:
            self._probe_echo()
        else:
            self._start = self._probe_start()

    def _probe_start(self) -> str:
        """What has a text begin with two BOS: where a tokenizer puts one before each text, lm-evaluation-harness puts
        another before that, and counts the tokenizer's among the text's tokens.
        """
        begin = self._probe_echo().tokens[0]
        if PROBE.startswith(begin):
            raise Refused("its tokenizer puts nothing before the first token, which so has no likelihood", 400)
        for start in (begin, 2 * begin):  # some servers put none before a text that has one
            tokens = self.echo(start + PROBE).tokens
            if tokens[:2] == [begin, begin] and tokens[2:3] != [begin]:
                return start
        raise Refused(f"it does not read {begin} in a prompt as the token that it puts before each text", 400)

    def _probe_echo(self) -> Echoed:
        """Find how many tokens must be written where none are wanted: some servers allow no 0."""
        for self._beyond in (0, 1):
            try:
                return self.echo(PROBE)
            except Refused as error:
                if error.status not in ABSENT:
                    raise
                refused = error
            except EndpointError as error:
                refused = Refused(str(error), 400)
        raise refused


def _place(tokens: Sequence[str], whole: str, border: int) -> int | None:
    """The first token that begins at or behind character `border` of `whole`, which the tokens end with; None where
    they do not.
    """
    joined = "".join(tokens)
    if not joined.endswith(whole):
        return None
    at, border = 0, len(joined) - len(whole) + border
    for place, token in enumerate(tokens):
        if at >= border:
            return place
        at += len(token)
    return len(tokens)


def _first(echoed: Echoed) -> int:
    """The first token that has a likelihood: behind a BOS, where the server puts one."""
    return 1 if echoed.logprobs[0] is None else 0


def model_of(api: Api) -> str:
    """The model that the address names, or the server's only one. Raises RecipeError with the nearest name for one that
    the server does not list; a server without a list is believed.
    """
    wanted = api.address.model
    try:
        listed = api.get("/models")
    except Refused as error:
        if error.status not in ABSENT:
            raise
        listed = {}
    data = listed.get("data") if isinstance(listed, dict) else None
    names = [str(it["id"]) for it in data or [] if isinstance(it, dict) and "id" in it]
    if wanted is None:
        if len(names) == 1:
            return names[0]
        there = f"{', '.join(sorted(names)[:SHOWN])}" if names else "which it does not list"
        raise RecipeError("model", api.address.url, f"write which model behind it: {api.address.url}#MODEL ({there})")
    if names and wanted not in names:
        raise RecipeError("model", wanted, f"{api.address.host} has no such model; {nearest(wanted, names)}")
    return wanted
