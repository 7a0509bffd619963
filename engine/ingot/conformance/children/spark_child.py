"""Run as `python -I spark_child.py REQUEST RESPONSE`: the package as a Spark function of columns."""

import json
import os
import sys
from pathlib import Path

import mlflow.pyfunc
from pyspark.sql import SparkSession
from pyspark.sql.functions import struct


def main(request_file: str, response_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    place = Path(response_file).parent
    builder = SparkSession.builder.master("local[1]").appName("ingot-conform").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.bindAddress", "127.0.0.1").config("spark.driver.host", "127.0.0.1")
    spark = builder.config("spark.local.dir", str(place)).getOrCreate()
    try:
        predict = mlflow.pyfunc.spark_udf(spark, request["package"], env_manager="local")
        records = []
        for row in request["rows"]:  # one by one: rows may have other columns than the one before
            data = spark.createDataFrame([tuple(row.values())], list(row))
            [found] = data.select(predict(struct(*row)).alias("answer")).collect()
            answer, [first, *_] = found["answer"], request["outputs"]
            # A signature of one output column gives bare values, one of several gives rows.
            records.append(answer.asDict(recursive=True) if hasattr(answer, "asDict") else {first: answer})
    finally:
        spark.stop()
    Path(response_file).write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
