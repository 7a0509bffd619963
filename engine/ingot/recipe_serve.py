"""How the finished model is served: the recipe's `serve`, which is also what `ingot serve` has as options."""

from typing import Literal

from pydantic import Field

from ingot.recipe_data import Positive, Section


class Serve(Section):
    """The endpoint that `ingot run` asks one question, and `ingot serve RUN` keeps up: an option given there wins."""

    enabled: bool = True
    """Off: `ingot run` skips the stage."""
    question: str | None = None
    """What `ingot run` asks. None: the first test row."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback needs keys or INGOT_API_KEY."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """None: 8000 for `ingot serve`, a free one for the question of `ingot run`. 0: a free one, which is printed."""
    engine: Literal["auto", "own", "vllm"] | None = None
    """What runs the model: our own engines, or vLLM. auto: vLLM for models that write, where it is installed and there
    is a GPU. None: auto for `ingot serve`, own for the question of `ingot run`."""
    passes: Literal["auto", "threads", "processes"] | None = None
    """Where a model that answers a row in one pass runs on a CPU: on threads of the server, or in processes, a core
    each, which hold the model each. auto: in processes, where memory allows it. None: auto for `ingot serve`, threads
    for the question of `ingot run`."""
    keys: str | None = None
    """File of keys that callers must send: `ingot keys add`. From where the command is typed."""
    requests_per_minute: Positive | None = None
    """For each key that has no limit of its own. None: as many as wanted."""
    tokens_per_minute: Positive | None = None
    """Prompts and answers, likewise."""
    deadline: float = Field(default=600.0, ge=0.1)
    """Most seconds a request takes; X-Request-Timeout may say less."""
    drain: float = Field(default=30.0, ge=0.0)
    """Seconds that running requests have after SIGTERM or Ctrl-C."""
    max_waiting: Positive = 256
    """Requests that wait at most; further ones get 503."""
    max_waiting_tokens: Positive = 262_144
    """Tokens of them, prompts and answers."""
    max_rows: Positive = 64
    """Answers that are written together."""
    max_tokens: Positive | None = None
    """Most tokens of one answer. None: what the model's context holds."""
    cache_tokens: Positive | None = None
    """Tokens whose keys and values are held at most. None: a quarter of the free memory."""
    max_body: int = Field(default=4 * 1024 * 1024, ge=1024)
    """Most bytes of a request's body."""
    body_timeout: float = Field(default=60.0, ge=0.1)
    """Seconds for a request's body to arrive."""
    hung_after: float = Field(default=30.0, ge=1.0)
    """Seconds without a sign of life until the serving process is killed and started again."""
    log_format: Literal["text", "json"] = "text"
    """Lines on standard error, one a request."""
