"""Two import roots in container folders: `engine/ingot` is `ingot`, `kernels/ingot_kernels` is `ingot_kernels`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

INSTALL = [
    "datasets>=4.0",
    "fastapi>=0.115",
    "httpx>=0.27,<1",
    "huggingface_hub>=1.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "mlflow>=3.1,<4",
    "numpy>=1.26",
    "packaging>=24.0",
    "pandas>=2.2",
    "peft>=0.18",
    "prometheus_client>=0.20,<1",
    "pyarrow>=16.0",
    "pydantic>=2.8,<3",
    "pyyaml>=6.0",
    "rich>=13.7",
    "rouge_score>=0.1.2",
    "sacrebleu>=2.4",
    "safetensors>=0.5",
    "seqeval>=1.2",
    "tokenizers>=0.22",
    "torch>=2.8,<3",
    "transformers>=5.0,<6",
    "typer>=0.15",
    "uvicorn>=0.30",
    "uvloop>=0.20; platform_system != 'Windows'",  # uvicorn takes it by itself: 0.2 ms of 0.8 a request
]
EXTRAS = {
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],  # parallel.strategy zero1, zero2, zero3
    "harness": ["lm_eval>=0.4.13,<0.5"],  # ingot evaluate --harness
    "structured": ["llguidance>=1.3,<2"],  # response_format and forced tool calls of the endpoint
    "vllm": ["vllm>=0.11"],  # evaluate.engine vllm, ingot serve --engine vllm
    # ingot serve --otel
    "otel": ["opentelemetry-sdk>=1.30,<2", "opentelemetry-exporter-otlp-proto-http>=1.30,<2"],
    "quantization": ["bitsandbytes>=0.48"],  # quantization.kind nf4
    "dev": [
        "aiohttp>=3.10,<4",  # the load generator of the serving benchmark
        "bitsandbytes>=0.48",
        "deepspeed>=0.19.8,<0.20",
        "jsonschema>=4.21",
        "llguidance>=1.3,<2",
        "lm_eval>=0.4.13,<0.5",  # tests and benchmarks hold scores and prompts against it
        "mypy>=1.15",
        "openai>=2.0,<4",  # contract tests of the endpoint
        "opentelemetry-exporter-otlp-proto-http>=1.30,<2",
        "opentelemetry-sdk>=1.30,<2",
        "pre-commit>=4.0",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "schemathesis>=4.0,<5",  # the endpoint's OpenAPI document is tested by its own cases
        "scikit-learn>=1.5",  # the tests hold our F1 against it
        "scipy>=1.11",
        "triton>=3.3; platform_system == 'Linux'",  # tests run the kernels by its interpreter
        "trl>=1.16,<2",  # tests and benchmarks hold ours against it
        "types-PyYAML>=6.0",
    ],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6"],
}

setup(
    name="ingot",
    version="0.1.0",
    description="Turn a foundation model and your data into a tested model that any endpoint can serve.",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Namespace packages too: a folder of plain data below ingot is shipped as it is.
    packages=[
        *find_namespace_packages("engine", include=["ingot", "ingot.*"]),
        *find_namespace_packages("kernels", include=["ingot_kernels", "ingot_kernels.*"]),
    ],
    package_dir={"ingot": "engine/ingot", "ingot_kernels": "kernels/ingot_kernels"},
    package_data={
        "ingot": [
            "py.typed",
            "catalog/nano/*",
            "catalog/nano-t5/*",
            "check/*.jinja",
            "conformance/*.jinja",
            "evaluation/*.jinja",
            "evaluation/*.css",
            "evaluation/*.js",
        ],
        "ingot_kernels": ["py.typed"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ingot=ingot.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
