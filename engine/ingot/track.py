"""Metrics, params and artifacts to a local JSONL file, and to MLflow where it is installed. Owns MLflow tracking.

The JSONL in the run folder is always written and is what the engine itself reads back; MLflow is a copy for people.
So a tracking server that dies costs a warning, never the training.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from ingot.errors import FieldError
from ingot.recipe import Track

log = logging.getLogger(__name__)

Status = Literal["finished", "failed", "killed"]

MAX_PARAMS = 200  # a run with more is slow to open in MLflow's pages, and servers of clouds refuse it
MAX_PARAM_CHARS = 500  # the limit of MLflow servers before 2.8; values are cut so that they fit everywhere
PARAMS_PER_CALL = 100  # the limit of the REST API
METRICS_PER_CALL = 50
FLUSH_SECONDS = 2.0
# Kept first when there are too many params.
IMPORTANT = ("name", "model.", "data.train", "objective.", "adapter.", "optim.", "train.", "data.", "parallel.")
REDACTED = "[redacted]"
# `token` but not `tokens`: `data.max_tokens` is a length.
_SECRET_KEY = re.compile(r"token$|secret|passw|credential|(?:api|access|account|private)[._-]?key", re.IGNORECASE)
_SECRET_VALUE = (
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{REDACTED}@"),  # user:password@host
    (re.compile(r"(?i)(?<=[?&;])((?:sig|sas|token|secret|password|[a-z_-]*key)=)[^&;\s]+"), rf"\1{REDACTED}"),
    (re.compile(r"\b(?:hf_|ghp_|sk-)[A-Za-z0-9_-]{16,}"), REDACTED),
)


def redact(key: str, value: str) -> str:
    """Return `value` without what looks like a token or password, judged by the key and by the value itself."""
    if _SECRET_KEY.search(key) and value not in ("", "null"):
        return REDACTED
    for pattern, replacement in _SECRET_VALUE:
        value = pattern.sub(replacement, value)
    return value


def choose_params(params: Mapping[str, str]) -> dict[str, str]:
    """Return at most `MAX_PARAMS` of them, the most important first, redacted and cut to `MAX_PARAM_CHARS`."""

    def rank(key: str) -> int:
        return next((place for place, prefix in enumerate(IMPORTANT) if key.startswith(prefix)), len(IMPORTANT))

    kept = sorted(params, key=rank)[:MAX_PARAMS]
    values = {key: redact(key, params[key]) for key in kept}
    return {key: v if len(v) <= MAX_PARAM_CHARS else v[: MAX_PARAM_CHARS - 1] + "…" for key, v in values.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, one a step, sorted; of a step that was run twice (resume) the later one counts.

    Each is `{"step": int, "time": seconds since 1970, "metrics": {name: float | None}}`. A missing file is an empty
    list, and a last line that a killed process left half written is left out.
    """
    merged: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        if not line.endswith("\n"):
            continue
        point = json.loads(line)
        old = merged.get(point["step"], {"metrics": {}})
        merged[point["step"]] = point | {"metrics": old["metrics"] | point["metrics"]}
    return [merged[step] for step in sorted(merged)]


class Tracker:
    """Where a run's numbers go. Ranks other than 0 get a tracker that does nothing, so callers need no `if`."""

    def __init__(self, file: IO[str] | None, sink: "_MlflowSink | None") -> None:
        self._file, self._sink = file, sink
        self._closed = False

    @classmethod
    def start(
        cls,
        section: Track,
        run_folder: Path,
        name: str,
        params: Mapping[str, str],
        enabled_rank0: bool,
        run_id: str | None = None,
    ) -> Self:
        """Open `run_folder`/metrics.jsonl (appending, for a resumed run) and, if asked for, an MLflow run.

        `run_id` goes on with that MLflow run (a resumed run, a later stage) instead of starting one.

        Raises `FieldError` about `track.uri` when the tracking server cannot be reached now: better than after hours.
        """
        if not enabled_rank0:
            return cls(None, None)
        run_folder.mkdir(parents=True, exist_ok=True)
        sink = _MlflowSink.connect(section, run_folder, name, run_id) if section.enabled else None
        file = _open_log(run_folder / "metrics.jsonl")
        tracker = cls(file, sink)
        if sink and run_id is None:
            kept = choose_params(params)
            sink.params(kept)
            if kept != dict(params):
                everything = {key: redact(key, value) for key, value in params.items()}
                sink.text(json.dumps(everything, indent=1, ensure_ascii=False), "params.json")
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None where only the JSONL is written."""
        return self._sink.run_id if self._sink else None

    @property
    def uri(self) -> str | None:
        """The tracking URI in use, without credentials; None where only the JSONL is written."""
        return redact("", self._sink.uri) if self._sink else None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of one step. Values that are not finite go to the JSONL as null (JSON has no NaN)."""
        if self._file is None:
            return
        now = time.time()
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        line = {"step": step, "time": round(now, 3), "metrics": dict.fromkeys(values) | finite}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._sink:
            self._sink.metrics(finite, step, int(now * 1000))

    def rewind(self, step: int) -> None:
        """Forget the JSONL's lines of steps after `step`: they come again. MLflow keeps its points."""
        if self._file is None:
            return
        path = Path(self._file.name)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            return
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        self._file.close()
        os.replace(partial, path)
        self._file = _open_log(path)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder with all in it, to the run's artifacts, below `folder` when given."""
        if self._sink:
            self._sink.artifact(path, folder)

    def tag(self, values: Mapping[str, str]) -> None:
        """Set tags, e.g. `{"recipe_hash": ...}`."""
        if self._sink:
            self._sink.tags({key: redact(key, value) for key, value in values.items()})

    def finish(self, status: Status = "finished") -> None:
        """Send what is buffered and close the run; calls after the first do nothing."""
        if self._closed:
            return
        self._closed = True
        if self._file:
            self._file.close()
            self._file = None
        if self._sink:
            self._sink.finish(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = error is not None and (isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", 0) == 130)
        self.finish("finished" if error is None else "killed" if stopped else "failed")


def _open_log(path: Path) -> IO[str]:
    """Open for appending; a half-written last line (the process was killed in it) is cut off first."""
    if path.is_file():
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            path.write_bytes(written[: written.rfind(b"\n") + 1])
    return path.open("a", encoding="utf-8")


class _MlflowSink:
    """One MLflow run. After the first failed call it says so once and does nothing any more."""

    def __init__(self, client: Any, uri: str, run_id: str) -> None:
        self._client, self.uri, self.run_id = client, uri, run_id
        self._pending: list[Any] = []
        self._sent_at = time.monotonic()
        self._lost = False

    @classmethod
    def connect(cls, section: Track, run_folder: Path, name: str, run_id: str | None) -> "_MlflowSink | None":
        """Create the experiment (if new) and the run, or reopen `run_id`; None, with a note, without mlflow."""
        try:
            from mlflow import MlflowClient
        except ImportError:
            log.warning("mlflow is not installed: metrics go to metrics.jsonl only (pip install mlflow)")
            return None
        # MLflow's own 7 retries with doubling pauses would hold the training loop for four minutes a call.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        for noisy in ("mlflow.store.db.utils", "alembic", "urllib3.connectionpool"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        output = run_folder.resolve().parent
        local = f"sqlite:///{output / 'mlflow.db'}"
        uri = section.uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        try:
            client = MlflowClient(tracking_uri=uri)
            if run_id is not None:
                client.update_run(run_id, status="RUNNING")
                return cls(client, uri, run_id)
            experiment = client.get_experiment_by_name(section.experiment)
            if experiment is None:
                # Next to the database, not in the working directory, which is MLflow's own default.
                place = (output / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
                identity = client.create_experiment(section.experiment, artifact_location=place)
            else:
                identity = experiment.experiment_id
            run = client.create_run(identity, run_name=name)
        except Exception as error:  # any transport, database or server: MLflow wraps only some of them
            fix = f"tracking cannot start there ({_reason(error)}); mend it, or set track.enabled=false"
            raise FieldError("track.uri", redact("", uri), fix) from error
        return cls(client, uri, run.info.run_id)

    def metrics(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        """Buffer metrics; every `METRICS_PER_CALL` of them or `FLUSH_SECONDS` go out in one call."""
        from mlflow.entities import Metric

        self._pending += [Metric(key, value, milliseconds, step) for key, value in values.items()]
        if len(self._pending) >= METRICS_PER_CALL or time.monotonic() - self._sent_at > FLUSH_SECONDS:
            self._flush()

    def params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        every = [Param(key, value) for key, value in values.items()]
        for start in range(0, len(every), PARAMS_PER_CALL):
            self._call("log_batch", self.run_id, params=every[start : start + PARAMS_PER_CALL])

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._call("log_batch", self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def text(self, text: str, name: str) -> None:
        self._call("log_text", self.run_id, text, name)

    def artifact(self, path: Path, folder: str | None) -> None:
        name = "log_artifacts" if path.is_dir() else "log_artifact"
        self._call(name, self.run_id, str(path), folder)

    def finish(self, status: Status) -> None:
        self._flush()
        self._call("set_terminated", self.run_id, status=status.upper())

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending:
            self._call("log_batch", self.run_id, metrics=pending)
        self._sent_at = time.monotonic()

    def _call(self, name: str, *arguments: Any, **named: Any) -> None:
        if self._lost:
            return
        try:
            getattr(self._client, name)(*arguments, **named)
        except Exception as error:  # training must survive whatever a server does
            self._lost = True
            log.warning("tracking stopped (%s): the run goes on, metrics are in metrics.jsonl", _reason(error))


def _reason(error: Exception) -> str:
    """The first line of an error, without credentials, short enough for one line on a terminal."""
    lines = redact("", str(error)).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 160 else lines[0][:159] + "…"
