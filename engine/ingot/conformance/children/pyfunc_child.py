"""Run as `python -I pyfunc_child.py REQUEST RESPONSE`: loads the package by MLflow and answers rows, one a call."""

import json
import sys
from pathlib import Path

import mlflow.pyfunc


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    model = mlflow.pyfunc.load_model(request["package"])
    found = [model.predict([row]).to_json(orient="records", double_precision=15) for row in request["rows"]]
    records = [json.loads(text)[0] for text in found]
    Path(response_file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
