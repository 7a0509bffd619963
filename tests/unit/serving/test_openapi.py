"""The OpenAPI document is true: whatever it allows or forbids is sent, and every answer is one that it describes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from ingot.serving.server import Endpoint

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
WITH_BODY = 8  # operations that take a body have so many times the cases of the others
TASKS = ("chat-completion", "text-classification")


@pytest.fixture(scope="module")
def urls(folder_of: Callable[[str], Path]) -> Iterator[list[str]]:
    """An endpoint of a model that writes, and one of a model that does not."""
    with Endpoint(folder_of(TASKS[0])) as writes, Endpoint(folder_of(TASKS[1])) as labels:
        yield [writes.url, labels.url]


def _operations(url: str) -> list[Any]:
    config = schemathesis.Config.from_dict({})
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    return [found.ok() for found in schema.get_all_operations()]


def _sent(url: str, n: int) -> tuple[int, dict[int, int]]:
    """Send about `n` cases -> how many were sent, and how many answers had each status."""
    operations, statuses = _operations(url), dict[int, int]()
    share = n / sum(WITH_BODY if operation.body else 1 for operation in operations)
    with requests.Session() as session:
        session.trust_env = False
        for operation in operations:
            # Nothing is wrong with a request that has no more than a path.
            for mode in GenerationMode if operation.body or operation.query else [GenerationMode.POSITIVE]:
                count = max(1, round(share * (WITH_BODY if operation.body else 1) / 2))
                _send(operation.as_strategy(mode), count, session, statuses)
    return sum(statuses.values()), statuses


def _send(cases: Any, count: int, session: requests.Session, statuses: dict[int, int]) -> None:
    quiet = settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @quiet
    @given(case=cases)
    def send(case: Case) -> None:
        response = case.call(session=session, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=CHECKS)
        assert "Traceback" not in response.text

    send()


def test_the_document_tells_of_every_route(urls: list[str]) -> None:
    for url in urls:
        document = requests.get(f"{url}/openapi.json", timeout=60).json()
        told = {(path, method) for path, operations in document["paths"].items() for method in operations}
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/chat/completions", "/completions"):
            assert (path, "post") in told
        for path in (
            "/invocations",
            "/score",
            "/v2/models/{model}/infer",
            "/v2/models/{model}/versions/{version}/infer",
        ):
            assert (path, "post") in told
        for path in (
            "/v1/models",
            "/v1/models/{model}",
            "/score",
            "/ping",
            "/version",
            "/swagger.json",
            "/v2",
            "/ready",
        ):
            assert (path, "get") in told
        for operations in document["paths"].values():
            for operation in operations.values():
                assert "422" not in operation["responses"] and "200" in operation["responses"]
    body = document["paths"]["/invocations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"$ref": "#/components/schemas/BareTextClassificationRow"} in body["anyOf"]


def test_cases_of_the_document(urls: list[str]) -> None:
    for url in urls:
        sent, statuses = _sent(url, 75)
        assert sent >= 60
        assert set(statuses) <= {200, 400, 404}, statuses


@pytest.mark.slow
@pytest.mark.timeout(1800)  # cases are costly to make: 500 s where other work shared the two cores
def test_five_thousand_cases_of_the_document(urls: list[str]) -> None:
    found = [_sent(url, n) for url, n in zip(urls, (3600, 2700), strict=True)]
    assert sum(sent for sent, _ in found) >= 5000, found
    for _, statuses in found:
        assert set(statuses) <= {200, 400, 404}, statuses
        assert statuses[200] > 20
