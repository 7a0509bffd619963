"""The table of targets: a name -> what answers there. Each is a function of a `Case`, imported when it is asked."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ingot.errors import IngotError
from ingot.registry import resolve

from .case import Answers, Case, Mismatch, Unavailable, difference

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
    "batch": f"{HERE}.python_targets:batch",
    "azure-no-code": f"{HERE}.azure_targets:azure_no_code",
    "azure-server": f"{HERE}.azure_targets:azure_server",
    "mlserver": f"{HERE}.server_targets:mlserver",
    "spark_udf": f"{HERE}.python_targets:spark_udf",
    "ray-serve": f"{HERE}.python_targets:ray_serve",
    "vllm": f"{HERE}.engine_targets:vllm",
    "tgi": f"{HERE}.engine_targets:tgi",
    "ollama": f"{HERE}.engine_targets:ollama",
    "llama-cpp": f"{HERE}.engine_targets:llama_cpp",
}
READ_GGUF = ("llama-cpp", "ollama")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Result:
    """What a target did. `forms`: the ways in which it was asked. `difference`: the largest between two numbers. `at`:
    when (ISO 8601); `rows`: how many it was asked; `versions`: of what answered here.
    """

    target: str
    state: str
    seconds: float
    forms: tuple[str, ...] = ()
    difference: float | None = None
    reason: str = ""
    at: str = ""
    rows: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"forms": list(self.forms)}


def runtime(case: Case) -> Answers:
    """The answer that was stored when the model was packaged, held against this process's."""
    if case.trained is None:
        raise Unavailable("no answer stored: verification.json of the package has none (package.verify)")
    device = case.about.get("answered_on", "cpu")
    if device != "cpu":
        raise Unavailable(f"the stored answer was computed on {device}, and this one on the CPU: numbers differ")
    yield "example", [case.trained, *case.expected[1:]]


def conform(case: Case, name: str) -> Result:
    """Ask one target all rows in each of its forms, until one answers otherwise."""
    answers = resolve(TARGETS, "--target", name)
    forms: list[str] = []
    largest, started = 0.0, time.perf_counter()

    def ended(state: str, reason: str = "") -> Result:
        seconds = round(time.perf_counter() - started, 2)
        return Result(name, state, seconds, tuple(forms), largest if forms else None, reason)

    try:
        if case.gguf is not None and name not in READ_GGUF:
            raise Unavailable(f"the package holds a GGUF file, which only {' and '.join(READ_GGUF)} read")
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
