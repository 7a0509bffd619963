"""Run as `python -I mlflow_child.py REQUEST RESPONSE`: rows asked by MLflow's own client of scoring servers."""

import json
import sys
from pathlib import Path

import pandas as pd
from mlflow.pyfunc.scoring_server.client import ScoringServerClient


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    client = ScoringServerClient("127.0.0.1", request["port"])
    answers = [json.loads(client.invoke(pd.DataFrame([row])).to_json()) for row in request["rows"]]
    records = [answer["predictions"][0] for answer in answers]
    Path(response_file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
