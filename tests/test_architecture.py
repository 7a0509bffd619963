"""The rules of docs/architecture.md that a machine can check."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INGOT = ROOT / "engine" / "ingot"
KERNELS = ROOT / "kernels" / "ingot_kernels"
FILES = sorted([*INGOT.rglob("*.py"), *KERNELS.rglob("*.py")])
MAX_LINES = 400

# Files and folders of engine/ingot -> floor. A file imports only lower floors or its own folder.
FLOORS = {
    "errors": 0, "registry": 0, "address": 0,
    "recipe": 1, "recipe_data": 1, "recipe_evaluate": 1, "recipe_serve": 1, "recipe_errors": 1, "recipe_io": 1,
    "launch": 2, "ranks": 2, "track": 2, "progress": 2, "display": 2, "pages": 2,
    "catalog": 2, "data": 2, "model": 2, "parallel": 2,
    "train": 3, "evaluation": 3,
    "packaging": 4, "serving": 4, "batching": 4,
    "runfolder": 5, "preparation": 5, "check": 5, "summary": 5, "stages": 5, "assembly": 5, "verbs": 5,
    "subjects": 5, "remotes": 5, "evaluating": 5, "comparing": 5, "overlapping": 5, "task_files": 5, "judging": 5,
    "watching": 5, "promoting": 5, "packages": 5, "provenance": 5, "registering": 5, "conformance": 5, "conforming": 5,
    "batches": 5, "deploying": 5, "replaying": 5,
    "command": 6, "cache_command": 6, "check_command": 6, "compare_command": 6, "evaluate_command": 6,
    "cli": 6, "__main__": 6, "judge_options": 6, "models_command": 6, "conform_command": 6, "batch_command": 6,
    "serve_command": 6, "keys_command": 6, "serve_options": 6,
}  # fmt: skip
# Files of one floor that stand beside each other: the first may import the second.
NEIGHBOURS = {
    ("registry", "errors"), ("address", "errors"),
    ("recipe", "recipe_data"), ("recipe", "recipe_evaluate"), ("recipe_evaluate", "recipe_data"),
    ("recipe", "recipe_serve"), ("recipe_serve", "recipe_data"),
    ("recipe_errors", "recipe"), ("recipe_io", "recipe"), ("recipe_io", "recipe_errors"),
    ("data", "progress"), ("data", "model"),
    ("stages", "preparation"), ("verbs", "preparation"), ("assembly", "preparation"),
    ("stages", "runfolder"), ("verbs", "runfolder"), ("verbs", "stages"),
    ("assembly", "runfolder"), ("assembly", "stages"), ("verbs", "assembly"),
    ("check", "preparation"), ("check", "assembly"), ("check", "runfolder"), ("verbs", "check"),
    ("subjects", "runfolder"), ("evaluating", "runfolder"), ("evaluating", "stages"), ("evaluating", "subjects"),
    ("subjects", "remotes"), ("evaluating", "remotes"), ("task_files", "remotes"), ("evaluating", "judging"),
    ("comparing", "judging"),
    ("verbs", "evaluating"), ("evaluating", "comparing"), ("evaluating", "task_files"),
    ("task_files", "subjects"), ("preparation", "task_files"), ("comparing", "runfolder"),
    ("preparation", "watching"), ("stages", "watching"), ("assembly", "watching"), ("watching", "task_files"),
    ("evaluating", "overlapping"), ("overlapping", "comparing"), ("overlapping", "runfolder"),
    ("promoting", "runfolder"), ("promoting", "subjects"), ("evaluating", "promoting"), ("verbs", "promoting"),
    ("summary", "runfolder"), ("verbs", "summary"),
    ("verbs", "deploying"), ("deploying", "promoting"), ("deploying", "replaying"), ("deploying", "stages"),
    ("replaying", "runfolder"), ("serve_command", "serve_options"),
    ("packages", "provenance"), ("packages", "runfolder"), ("packages", "stages"), ("verbs", "packages"),
    ("verbs", "provenance"),
    ("provenance", "runfolder"), ("provenance", "summary"), ("check", "packages"), ("check", "provenance"),
    ("batching", "serving"), ("batches", "promoting"), ("batches", "remotes"), ("batches", "runfolder"),
    ("batches", "stages"), ("batches", "subjects"),
    ("cli", "batch_command"), ("batch_command", "command"), ("batch_command", "judge_options"),
    ("__main__", "cli"), ("cli", "cache_command"), ("cli", "check_command"), ("cli", "command"),
    ("cli", "evaluate_command"), ("evaluate_command", "command"), ("evaluate_command", "judge_options"),
    ("cli", "serve_command"), ("serve_command", "command"), ("cli", "keys_command"), ("keys_command", "command"),
    ("cli", "compare_command"), ("compare_command", "command"), ("compare_command", "judge_options"),
    ("check_command", "command"), ("cache_command", "command"), ("model", "catalog"),
    ("registering", "promoting"), ("registering", "runfolder"), ("verbs", "registering"),
    ("conforming", "registering"), ("conforming", "conformance"), ("conforming", "runfolder"),
    ("conforming", "stages"),
    ("cli", "models_command"), ("models_command", "command"), ("cli", "conform_command"),
    ("conform_command", "command"),
    ("ranks", "launch"), ("parallel", "launch"), ("parallel", "ranks"), ("parallel", "model"),
}  # fmt: skip
COMMAND_LINE = (
    *("cli.py", "command.py", "cache_command.py", "check_command.py", "compare_command.py", "evaluate_command.py"),
    *("judge_options.py", "models_command.py", "conform_command.py", "batch_command.py"),
    *("serve_command.py", "serve_options.py", "keys_command.py"),
)
# A third-party package -> the only files or folders that may import it.
DOORS = {
    "transformers": ("model/", "conformance/children/"),
    "peft": ("model/",),
    "bitsandbytes": ("model/",),
    "deepspeed": ("parallel/zero.py",),
    "triton": (),
    "huggingface_hub": ("model/",),
    "datasets": ("data/hub.py",),
    "pyarrow": ("data/sources.py", "data/table.py", "evaluation/samples.py", "batching/sinks.py"),
    "mlflow": ("track.py", "packaging/", "conformance/children/"),
    "openai": ("conformance/children/",),
    "pyspark": ("conformance/children/",),
    "ray": ("conformance/children/",),
    "llama_cpp": ("conformance/children/",),
    "httpx": ("evaluation/api.py",),
    "fastapi": ("serving/",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
    "prometheus_client": ("serving/metrics.py", "serving/version_metrics.py"),
    "sklearn": ("evaluation/",),
    "scipy": ("evaluation/",),
    "sacrebleu": ("evaluation/",),
    "rouge_score": ("evaluation/",),
    "lm_eval": ("evaluation/harness.py",),
    "vllm": ("evaluation/vllm_engine.py", "serving/vllm_model.py"),
    "opentelemetry": ("serving/tracing.py",),
    "llguidance": ("serving/structured.py",),
    "seqeval": ("evaluation/entities.py",),
    "azureml_inference_server_http": ("packaging/azure/",),
    "jinja2": ("pages.py", "evaluation/wording.py"),
    "matplotlib": ("evaluation/plots.py",),
    "rich": (*COMMAND_LINE, "progress.py", "display.py", "data/inspect.py"),
    "typer": COMMAND_LINE,
    "yaml": ("recipe_io.py", "packaging/", "serving/", "conformance/azure_targets.py"),
    "pydantic": (
        "recipe.py",
        "recipe_data.py",
        "recipe_evaluate.py",
        "recipe_serve.py",
        "recipe_errors.py",
        "recipe_io.py",
        "serving/",
        "evaluation/definition.py",
        "model/task_checks.py",
    ),
}


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted module, line) of every import in a file, at its top and within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:  # a relative import stays in its folder: model/'s files are copied into packages
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            else:
                assert node.level == 1, f"{path}:{node.lineno}: `..` leaves the folder"


def part_of(path: Path) -> str:
    """Return the file or folder of engine/ingot that `path` belongs to."""
    return path.relative_to(INGOT).parts[0].removesuffix(".py")


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in INGOT.rglob("*.py")} - {"__init__"} <= set(FLOORS)


def test_files_import_lower_floors_or_their_own_folder() -> None:
    wrong = []
    for path in INGOT.rglob("*.py"):
        here = part_of(path)
        if here == "__init__":
            continue  # the table of contents
        for name, line in imports_of(path):
            parts = name.split(".")
            if parts[0] != "ingot" or parts[1] == here:
                continue
            there = parts[1] if parts[1] in FLOORS else "verbs"  # `from ingot import __version__` and the like
            if FLOORS[there] >= FLOORS[here] and (here, there) not in NEIGHBOURS:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {here} imports {there}")
    assert wrong == []


def test_kernels_import_torch_and_triton_only() -> None:
    allowed = {"ingot_kernels", "torch", *sys.stdlib_module_names}  # Triton by dispatch.py, where it is installed
    assert [
        f"{path.name}: {name}"
        for path in KERNELS.rglob("*.py")
        for name, _ in imports_of(path)
        if name.split(".")[0] not in allowed
    ] == []


@pytest.mark.parametrize("package", DOORS)
def test_each_package_has_its_door(package: str) -> None:
    wrong = [
        f"{place}:{line}"
        for path in INGOT.rglob("*.py")
        for name, line in imports_of(path)
        if name.split(".")[0] == package
        and not (place := path.relative_to(INGOT).as_posix()).startswith(DOORS[package])
    ]
    assert wrong == []


def test_container_folders_are_not_packages() -> None:
    # A regular package named `kernels` on the path breaks `import transformers` beside Hugging Face's own.
    assert [
        name
        for name in ("engine", "kernels", "recipes", "benchmarks", "tests")
        if (ROOT / name / "__init__.py").exists()
    ] == []


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_both_roots_are_typed() -> None:
    assert (INGOT / "py.typed").is_file()
    assert (KERNELS / "py.typed").is_file()


def run_python(code: str) -> str:
    """Run `code` in a new interpreter that sees both roots; return its standard output."""
    roots = [str(ROOT / "engine"), str(ROOT / "kernels")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {roots!r}\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "mlflow", "datasets", "peft", "pandas", "matplotlib", "sklearn")


@pytest.mark.parametrize(
    "code",
    [
        "import ingot",
        "from ingot.recipe_io import json_schema; json_schema()",
        "import ingot.cli",
        "import sys; sys.argv = ['ingot', '--help']\nfrom ingot.cli import main\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["import", "schema", "cli", "help"],
)
def test_light_doors_import_nothing_heavy(code: str) -> None:
    show = f"\nimport json, sys; print('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    assert json.loads(run_python(code + show).splitlines()[-1]) == []


def test_public_names_are_deliberate() -> None:
    import ingot

    assert set(ingot.__all__) == {
        "IngotError",
        "Recipe",
        "batch",
        "compare",
        "evaluate",
        "finetune",
        "load_recipe",
        "package",
        "run",
        "serve",
    }


def test_verbs_stay_functions_beside_folders() -> None:
    """A folder named as a verb would replace it in the namespace as soon as something in that folder is imported."""
    folders = [path.parent.name for path in INGOT.glob("*/__init__.py")]
    code = "".join(f"import ingot.{name}\n" for name in [*folders, "verbs"])
    verbs = ("run", "finetune", "evaluate", "compare", "package", "serve", "batch")
    check = f"print([n for n in {verbs} if not callable(getattr(ingot, n))])"
    assert run_python(f"{code}{check}") == "[]"
