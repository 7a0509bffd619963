"""`ingot serve`: a model behind an endpoint."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ingot.command import Debug, Override, guarded, out
from ingot.serve_options import (
    Adapters,
    AdminRoutes,
    EndpointName,
    MirrorTo,
    Models,
    Otel,
    Replay,
    Supervise,
    VersionsOf,
    WeightsFile,
    admin_key,
    port_of,
    refusing,
    setting,
    settings,
    supervised,
    weights_file,
)


def serve(
    models: Models = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port")] = None,
    engine: Annotated[Literal["auto", "own", "vllm"] | None, setting("engine")] = None,
    passes: Annotated[Literal["auto", "threads", "processes"] | None, setting("passes")] = None,
    keys: Annotated[Path | None, setting("keys")] = None,
    requests_per_minute: Annotated[int | None, setting("requests_per_minute")] = None,
    tokens_per_minute: Annotated[int | None, setting("tokens_per_minute")] = None,
    deadline: Annotated[float | None, setting("deadline")] = None,
    drain: Annotated[float | None, setting("drain")] = None,
    max_waiting: Annotated[int | None, setting("max_waiting")] = None,
    max_waiting_tokens: Annotated[int | None, setting("max_waiting_tokens")] = None,
    max_rows: Annotated[int | None, setting("max_rows")] = None,
    max_tokens: Annotated[int | None, setting("max_tokens")] = None,
    cache_tokens: Annotated[int | None, setting("cache_tokens")] = None,
    max_body: Annotated[int | None, setting("max_body")] = None,
    body_timeout: Annotated[float | None, setting("body_timeout")] = None,
    hung_after: Annotated[float | None, setting("hung_after")] = None,
    log_format: Annotated[Literal["text", "json"] | None, setting("log_format")] = None,
    adapter: Adapters = None,
    endpoint: EndpointName = None,
    version: VersionsOf = None,
    mirror: MirrorTo = None,
    weights: WeightsFile = None,
    replay: Replay = 0,
    admin: AdminRoutes = False,
    otel: Otel = None,
    supervise: Supervise = True,
    override: Override = None,
    debug: Debug = False,
) -> None:
    """Serve models: /v1/chat/completions, /v1/completions, /invocations, /metrics, /ready. Stop with Ctrl-C.

    Exit code 3: the model's promotion policy is not met.

    Examples:

        ingot serve runs/quickstart-20261124-101500-1a2b3c/package

        curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once"}'

        ingot keys add ann && ingot serve runs/quickstart-20261124-101500-1a2b3c/package --host 0.0.0.0 --keys keys.json

        ingot serve base --adapter letters=runs/letters/adapter --adapter poems=runs/poems/adapter

        ingot serve --endpoint chat --version blue=models:/chat/3:90 --version green=models:/chat/4:10 --mirror green

        ingot serve model --log-format json --requests-per-minute 120 --deadline 30
    """

    if not models and endpoint is None:
        raise typer.BadParameter("Missing argument 'MODEL...': what to serve, or --endpoint with its versions")

    given = {
        "host": host,
        "port": port,
        "engine": engine,
        "passes": passes,
        "keys": keys,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "deadline": deadline,
        "drain": drain,
        "max_waiting": max_waiting,
        "max_waiting_tokens": max_waiting_tokens,
        "max_rows": max_rows,
        "max_tokens": max_tokens,
        "cache_tokens": cache_tokens,
        "max_body": max_body,
        "body_timeout": body_timeout,
        "hung_after": hung_after,
        "log_format": log_format,
    }

    def work() -> None:
        from ingot.serving.channel import Parent

        parent, key = Parent.from_environment(), admin_key(admin)
        section, told = settings(() if endpoint else models or (), given)
        if parent is None and told:
            out.print(told, markup=False, highlight=False, soft_wrap=True)
        if parent is None and supervise and os.name == "posix":
            raise typer.Exit(supervised(section))
        from ingot import verbs

        with refusing(parent):
            verbs.serve(
                models or (),
                host=section.host,
                port=port_of(section),
                override=override,
                options=verbs.ServeOptions.of(section, key, otel),
                parent=parent,
                adapters=adapter or (),
                endpoint=endpoint,
                versions=version or (),
                mirror=mirror,
                weights=weights_file(weights, endpoint),
                replay=replay,
            )

    guarded(work, debug)
