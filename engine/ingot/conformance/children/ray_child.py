"""Run as `python -I ray_child.py REQUEST RESPONSE`: the package as a Ray Serve deployment, asked over HTTP."""

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import mlflow.pyfunc
import ray
from ray import serve
from ray.serve.config import HTTPOptions


class Package:
    """One replica, which holds the model."""

    def __init__(self, package: str) -> None:
        self.model = mlflow.pyfunc.load_model(package)

    async def __call__(self, request: Any) -> Any:
        """One JSON body of rows -> one record a row."""
        found = self.model.predict(await request.json())
        return json.loads(found.to_json(orient="records", double_precision=15))


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=request["port"]))
        deployment: Any = serve.deployment(Package, ray_actor_options={"num_cpus": 0})
        serve.run(deployment.bind(request["package"]), name="ingot-conform", route_prefix="/answer")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        records = []
        for row in request["rows"]:
            sent = urllib.request.Request(f"http://127.0.0.1:{request['port']}/answer", json.dumps([row]).encode())
            with opener.open(sent, timeout=request["timeout_s"]) as response:
                records += json.load(response)
    finally:
        serve.shutdown()
        ray.shutdown()
    Path(response_file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
