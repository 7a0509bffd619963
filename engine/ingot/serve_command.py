"""`ingot serve`: a model behind an endpoint."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from ingot.command import Debug, Override, guarded
from ingot.serve_options import (
    Adapters,
    AdminRoutes,
    EndpointName,
    EngineOf,
    MirrorTo,
    Models,
    Otel,
    Replay,
    Supervise,
    VersionsOf,
    WeightsFile,
    admin_key,
    refusing,
    supervised,
    weights_file,
)


def serve(
    models: Models = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback needs --keys or INGOT_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="File of keys that callers must send: ingot keys add.", show_default=False)
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="For each key that has no limit of its own.", min=1, show_default=False)
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompts and answers, likewise.", min=1, show_default=False)
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Most seconds a request takes; X-Request-Timeout may say less.", min=0.1)
    ] = 600.0,
    drain: Annotated[
        float, typer.Option(help="Seconds that running requests have after SIGTERM or Ctrl-C.", min=0.0)
    ] = 30.0,
    max_waiting: Annotated[int, typer.Option(help="Requests that wait at most; further ones get 503.", min=1)] = 256,
    max_waiting_tokens: Annotated[int, typer.Option(help="Tokens of them, prompts and answers.", min=1)] = 262_144,
    max_rows: Annotated[int, typer.Option(help="Answers that are written together.", min=1)] = 64,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of one answer.", min=1, show_default=False)
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens whose keys and values are held at most. None: a quarter of the free memory.",
            min=1,
            show_default=False,
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request's body.", min=1024)] = 4 * 1024 * 1024,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Lines on standard error, one a request.")
    ] = "text",
    engine: EngineOf = "auto",
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

    def work() -> None:
        from ingot.serving.channel import Parent

        parent, key = Parent.from_environment(), admin_key(admin)
        if parent is None and supervise and os.name == "posix":
            raise typer.Exit(supervised(host, port, keys, log_format, drain))
        from ingot import verbs
        from ingot.serving.engine import Limits

        limits = Limits(
            waiting_requests=max_waiting,
            waiting_tokens=max_waiting_tokens,
            rows=max_rows,
            cache_tokens=cache_tokens,
            answer_tokens=max_tokens,
        )
        options = verbs.ServeOptions(
            limits=limits,
            keys=keys,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            deadline_s=deadline,
            drain_s=drain,
            max_body_bytes=max_body,
            log_format=log_format,
            admin_key=key,
            engine=engine,
            otel=otel,
        )
        with refusing(parent):
            verbs.serve(
                models or (),
                host=host,
                port=port,
                override=override,
                options=options,
                parent=parent,
                adapters=adapter or (),
                endpoint=endpoint,
                versions=version or (),
                mirror=mirror,
                weights=weights_file(weights, endpoint),
                replay=replay,
            )

    guarded(work, debug)
