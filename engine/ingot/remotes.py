"""A model behind an OpenAI-style endpoint as something that `ingot evaluate` measures."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from ingot.address import Address, key_for, read_address
from ingot.errors import RecipeError
from ingot.evaluation.api import Api, Limits
from ingot.evaluation.endpoint import CHATS, SCORES, STARTS, WRITES, Endpoint, model_of
from ingot.evaluation.kept import Kept
from ingot.evaluation.prompted import DefinedTask
from ingot.evaluation.task import Task

KEPT = ".endpoint-*.jsonl"  # beside the results while they are not whole


class Reach(NamedTuple):
    """How an endpoint is reached: the environment variable with its key (None: OPENAI_API_KEY where it is set), whether
    texts may go over plain http to another machine, requests at once.
    """

    key_env: str | None = None
    allow_http: bool = False
    at_once: int = Limits.at_once


class Remote:
    """A model to measure where it is served. Nothing is sent before `connect`."""

    kind = "endpoint"

    def __init__(self, source: str, reach: Reach) -> None:
        self._address, self._reach = read_address(source, "target"), reach
        self._key = key_for(self._address, reach.key_env, reach.allow_http, "target")
        self._api: Api | None = None
        self._endpoint: Endpoint | None = None
        self._facts: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """The address, with the model once it is known."""
        return str(self._address)

    @property
    def name(self) -> str:
        """What the model is called."""
        model = self._address.model or self._address.host
        return "-".join(part for part in model.replace(":", "/").split("/") if part.strip("."))[-60:] or "model"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._api is not None:
            self._api.close()

    def connect(self, needs: Iterable[str]) -> dict[str, Any]:
        """Find the model and try what the tasks need of it, see `needs_of`. Returns the facts of results: `fingerprint`
        is another one as soon as the endpoint says that its model is.

        Raises RecipeError for an unknown model, EndpointError for what is not there or does not answer.
        """
        self._api = api = Api(self._address, self._key, Limits(at_once=self._reach.at_once))
        model = model_of(api)
        self._address = Address(self._address.url, model, self._address.query)
        self._endpoint = Endpoint(api, model)
        says = {"endpoint": self._address.url, "model": model, **self._endpoint.probe(needs)}
        fingerprint = hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]
        self._facts = {"kind": self.kind, "source": self.source, **says, "fingerprint": fingerprint}
        return self._facts

    def load(self, folder: Path, rank: int, note: Callable[[str], None]) -> Endpoint:
        """What answers, with what it answered before an interruption; further answers are kept in `folder`."""
        if self._endpoint is None:
            raise ValueError("connect comes first")
        about = {"fingerprint": self._facts["fingerprint"]}
        kept = Kept(folder / KEPT.replace("*", str(rank)), about, sorted(folder.glob(KEPT)))
        if kept.stale is not None:
            note(f"{self._address.host} serves another model than when this was interrupted: all rows are asked again")
        elif len(kept):
            note(f"{self._address.host}: {len(kept):,} answers are there from before")
        self._endpoint.kept = kept
        return self._endpoint


def forget(folder: Path) -> None:
    """Remove what `load` kept: results hold it."""
    for path in folder.glob(KEPT):
        path.unlink(missing_ok=True)


def needs_of(tasks: Iterable[Task]) -> set[str]:
    """What an endpoint must be able to do for tasks from files. Raises RecipeError for one that none can answer."""
    found = set()
    for task in tasks:
        made = cast(DefinedTask, task).definition
        if made.kind == "multiple-choice":
            if made.is_chat:
                fix = "an endpoint tells no likelihoods behind chats; remove chat, or measure a local model"
                raise RecipeError(f"{task.name}: chat", made.kind, fix)
            found |= {SCORES, STARTS} if "unconditional" in task.asked() else {SCORES}
        else:
            found.add(STARTS if made.kind == "perplexity" else CHATS if made.is_chat else WRITES)
    return found
