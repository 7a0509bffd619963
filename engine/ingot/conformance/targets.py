"""The table of targets: a name -> what answers there. Each is a function of a `Case`, imported when it is asked."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ingot.errors import IngotError
from ingot.registry import resolve

from .case import Case, Mismatch, Unavailable, difference

HERE = "ingot.conformance"
TARGETS = {
    "runtime": f"{HERE}.targets:runtime",
    "pyfunc": f"{HERE}.python_targets:pyfunc",
    "pyfunc-env": f"{HERE}.python_targets:pyfunc_environment",
    "huggingface": f"{HERE}.python_targets:huggingface",
    "mlflow-serve": f"{HERE}.server_targets:mlflow_serve",
    "mlflow-client": f"{HERE}.server_targets:mlflow_client",
    "ingot-serve": f"{HERE}.server_targets:ingot_serve",
    "openai-client": f"{HERE}.server_targets:openai_client",
    "batch": f"{HERE}.batch_target:batch",
    "azure-no-code": f"{HERE}.azure_targets:azure_no_code",
    "azure-server": f"{HERE}.azure_targets:azure_server",
    "mlserver": f"{HERE}.server_targets:mlserver",
    "spark_udf": f"{HERE}.python_targets:spark_udf",
    "ray-serve": f"{HERE}.python_targets:ray_serve",
    "vllm": f"{HERE}.engine_targets:vllm",
    "tgi": f"{HERE}.engine_targets:tgi",
    "ollama": f"{HERE}.engine_targets:ollama",
}
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Result:
    """What a target did. `forms`: the ways in which it was asked. `difference`: the largest between two numbers."""

    target: str
    state: str
    seconds: float
    forms: tuple[str, ...] = ()
    difference: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"forms": list(self.forms)}


def runtime(case: Case) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """This process, held against the answer that was stored when the model was packaged."""
    if case.trained is None:
        raise Unavailable("the package holds no answer from when it was made (answer in verification.json)")
    _, reason = difference(case.trained, case.expected[0])
    if reason:
        raise Mismatch(f"not as when it was packaged: {reason}")
    yield "example", [case.trained | {key: case.expected[0][key] for key in case.trained}, *case.expected[1:]]


def conform(case: Case, name: str) -> Result:
    """Ask one target all rows in each of its forms, until one answers otherwise."""
    answers = resolve(TARGETS, "--target", name)
    forms: list[str] = []
    largest, started = 0.0, time.perf_counter()

    def ended(state: str, reason: str = "") -> Result:
        seconds = round(time.perf_counter() - started, 2)
        return Result(name, state, seconds, tuple(forms), largest if forms else None, reason)

    try:
        for form, records in answers(case):
            forms.append(form)
            apart, reason = difference(case.expected, records)
            largest = max(largest, apart)
            if reason:
                return ended(FAILED, f"{form}: {reason}")
    except Unavailable as error:
        return ended(SKIPPED, str(error))
    except (Mismatch, IngotError, OSError) as error:
        return ended(FAILED, str(error).splitlines()[0][:400])
    except Exception as error:  # an answer of another form than a target's protocol has
        return ended(FAILED, f"{type(error).__name__}: {str(error)[:300]}")
    return ended(PASSED) if forms else ended(FAILED, "it gave no answer")


def all_passed(results: Sequence[Result]) -> bool:
    """Whether everything that ran passed, and something ran."""
    ran = [it for it in results if it.state != SKIPPED]
    return bool(ran) and all(it.state == PASSED for it in ran)
