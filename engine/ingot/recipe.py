"""The recipe: one frozen schema for every stage. A field's meaning, unit and default stand beside it.

This is the only place where a knob can exist. Unknown keys are errors, nothing is ever written back, and
"auto" is resolved by the one reader of the field and saved in the run's `resolved.yaml`.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ingot.recipe_data import CAUSAL as CAUSAL
from ingot.recipe_data import COLUMNS, OPTIONAL_COLUMNS, SEQUENCE_TO_SEQUENCE, Positive, Section, Share
from ingot.recipe_data import ONE as ONE
from ingot.recipe_data import SEVERAL as SEVERAL
from ingot.recipe_data import Data as Data
from ingot.recipe_data import Objective as Objective
from ingot.recipe_data import Source as Source
from ingot.recipe_data import Task as Task
from ingot.recipe_evaluate import JUDGED as JUDGED
from ingot.recipe_evaluate import Evaluate as Evaluate
from ingot.recipe_evaluate import Judge as Judge
from ingot.recipe_evaluate import check_decidable
from ingot.recipe_serve import Serve

Form = Literal["merged", "adapter", "quantized", "gguf"]
Op = Literal["linear_cross_entropy", "lora_linear", "rms_norm", "rope", "gated"]


class Model(Section):
    """Which model to start from."""

    source: str = Field(min_length=1)
    """Where the model is: `ingot://nano` (embedded), `ingot://nano-t5` (embedded, no weights), `hf://org/name`,
    `package://python_package/folder`, or a folder."""
    revision: str | None = None
    """Commit, tag or branch of an `hf://` source. None: the hub's default branch."""
    initialization: Literal["pretrained", "random"] = "pretrained"
    """random: only the configuration and tokenizer of `source` are used; weights are drawn with `train.seed`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and activations. auto: bfloat16 on a GPU that has it, float32 on a CPU without bfloat16 units."""
    trust_remote_code: bool = False
    """Run Python files that come with the model. Off: such a model is refused."""
    chat_template: str | None = None
    """Path of a Jinja chat template for a tokenizer that has none (or a wrong one). It is packaged with the model."""
    attention: Literal["auto", "eager", "sdpa", "varlen", "flex", "flash"] = "auto"
    """Who computes attention. sdpa: torch's, document by document where rows lie end to end. varlen:
    `torch.nn.attention.varlen`. flex: FlexAttention. flash: the package flash-attn. eager: plain matrix products, the
    definition that the others are tested against. auto: varlen (flash where torch has none) on a GPU, sdpa on a CPU."""
    pooling: Literal["auto", "mean", "head"] = "auto"
    """Classification: mean of the last hidden states, or the architecture's own `head`. auto: mean for encoders without
    a trained head, `head` otherwise."""


class Adapter(Section):
    """Low-rank adaptation (Hu et al. 2021) through peft. `kind: none` trains every weight."""

    kind: Literal["lora", "none"] = "lora"
    """lora: the base is frozen and low-rank updates are learned. none: full fine-tuning."""
    rank: Positive = 16
    """Width r of the update B·A; adapter size grows linearly with it."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024)."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which weights: all linear layers and fused experts but the output head, or names such as `[q_proj, v_proj]`;
    `experts` are all fused experts. A head or embedding that is named and tied to the other is untied."""


class Quantization(Section):
    """A frozen base held in few bits; adapters are trained over it (QLoRA, Dettmers et al. 2023)."""

    kind: Literal["none", "nf4", "int8", "fp8"] = "none"
    """nf4: 4-bit NormalFloat in blocks of 64. int8: a scale a row, for weights only. fp8: float8 e4m3, a scale a row;
    products of bfloat16 activations run in float8 where the GPU has it and 16 divides both sizes of the weight."""
    double: bool = True
    """nf4: quantize the scales too (0.4 bits a weight less)."""


class Kernels(Section):
    """Fused operations in the place of the model's own (`ingot_kernels`). The same results, in less time and memory."""

    ops: Literal["auto", "none"] | Annotated[list[Op], Field(min_length=1)] = "auto"
    """auto: every operation that this model has a place for. A list: these, and it is an error when the model has no
    place for one of them."""
    impl: Literal["auto", "triton", "torch"] = "auto"
    """Who computes them. auto: Triton on a GPU, torch on a CPU. Quantized weights and optim.state choose by
    themselves."""


class Optim(Section):
    """AdamW (Loshchilov & Hutter 2019) and its schedule."""

    state: Literal["float32", "int8"] = "float32"
    """How the moments are held. int8: in blocks of 256 with a scale each (Dettmers et al. 2021); small tensors and
    embeddings stay in float32."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """How trained weights are held. bfloat16: rounded stochastically after each step, without a float32 copy."""
    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; biases, norms and embeddings are not decayed."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    warmup_share: Share = 0.03
    """Share of all steps over which the rate rises linearly from 0."""
    min_lr_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the schedule ends, as a share of `lr`."""
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient. None: no clipping."""


class Train(Section):
    """How long, in which portions, and what is kept."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; fractions are allowed. `max_steps` wins when it is set."""
    max_steps: Positive | None = None
    """Optimizer steps. None: from `epochs`."""
    tokens_per_step: Positive = 8192
    """Tokens (not counting padding) of one optimizer step, over all ranks. Rows are not cut to fit: a step takes rows
    until the
    next one would exceed this."""
    tokens_per_microbatch: Positive = 4096
    """Tokens (counting padding) of one forward pass on one rank, or on all ranks that share its lines
    (`parallel.context`). Changes memory and speed, never the gradient."""
    group_by_length: bool = False
    """Put rows of similar length into the same step: less padding, slightly less random steps."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """What the backward pass computes again instead of keeping it. full: every block (Chen et al. 2016), about a third
    more time. selective: only what is cheap, so that results of attention and of matrix products are kept."""
    offload_activations: bool = False
    """GPU: keep what the backward pass needs in CPU memory, moved there and back beside the computation."""
    compile: bool = False
    """torch.compile every block: faster steps after minutes of compiling in the first."""
    seed: int = 0
    """Seed of initialisation, dropout and row order."""
    deterministic: bool = False
    """Only kernels that give the same bits at every run, or an error that names the one that has none. Slower on GPUs.
    """
    nonfinite_budget: int = Field(default=0, ge=0)
    """Steps with a loss or gradient that is not finite which may be left out before the run stops."""
    spike_factor: float | None = Field(default=None, gt=1)
    """A step is a spike when its loss is above the median of the last 50 by this many of their robust standard
    deviations (1.4826 x median absolute deviation). None: no guard. 6 is a cautious value."""
    on_spike: Literal["warn", "skip", "rewind"] = "warn"
    """warn: say so. skip: do not apply the step. rewind: go back to the last checkpoint's weights and on with the rows
    behind the spike."""
    on_oom: Literal["stop", "halve"] = "stop"
    """Out of memory. stop: say what grew and what to change. halve: halve `tokens_per_microbatch` and repeat the step;
    tokens per step and the gradient stay the same."""
    evaluate_every_steps: Positive | None = None
    """Measure the validation loss this often. None: once an epoch. It is always measured at the end."""
    checkpoint_every_steps: Positive | None = None
    """Write a resumable checkpoint this often. None: whenever the validation loss is measured."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints to keep; the best one is always kept too."""
    final: Literal["best", "last"] = "best"
    """Which weights become the model: those of the best step by `best_by`, or those of the last step."""
    best_by: str = Field(default="validation_loss", min_length=1)
    """What decides which step is the best: `validation_loss`, or a metric that `evaluate.during` measures, by its name
    there; whether more is better is the metric's own. Of equal steps the first."""
    threads: Positive | None = None
    """CPU threads per rank. None: torch's default under one rank, cores divided by local ranks under several."""


class Parallel(Section):
    """How ranks share the work. Ranks themselves come from the launcher (torchrun, Azure ML, Slurm, MPI)."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"] = "auto"
    """auto: none on one rank, ddp on several. ddp: every rank holds everything. fsdp: parameters, gradients and
    optimizer are cut over all ranks (FSDP2). hsdp: cut inside a node, repeated across nodes. zero1, zero2, zero3:
    DeepSpeed cuts the optimizer, the gradients too, the parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """zero1 to zero3, fsdp: what lives in CPU memory between uses. parameters: these and the optimizer (zero3, fsdp).
    """
    shard_ranks: Positive | None = None
    """hsdp: ranks that cut one copy among them. None: the ranks of a node."""
    tensor: Positive = 1
    """Ranks that share every matrix product, by the model's own tensor-parallel plan. They must divide the ranks."""
    context: Positive = 1
    """Ranks that share every line of tokens (Ulysses: all-to-all around attention). They must divide ranks and heads.
    """
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl on GPUs, gloo on CPUs."""
    timeout_minutes: float = Field(default=10.0, gt=0)
    """How long a collective may wait for a rank before the job is ended."""
    meeting_minutes: float = Field(default=60.0, gt=0)
    """How long ranks wait at the start for those whose node is still encoding the data, or has not started."""


class Check(Section):
    """The trust gate: proofs on this recipe, model and data before anything is trained."""

    enabled: bool = True
    """Off: `ingot run` starts without it."""
    waive: list[str] = Field(default_factory=list)
    """Proofs that may fail without stopping the run, by name."""
    max_rows: Positive = 2000
    """Rows that are looked at token by token, drawn with `data.split_seed`; those near-duplicates are searched among
    are ten times as many."""
    max_probe_tokens: Positive = 2048
    """Tokens that the model's proofs run on: the shortest rows of the first steps, so many."""


class Package(Section):
    """The MLflow model."""

    enabled: bool = True
    """Off: `ingot run` skips the stage."""
    name: str | None = None
    """Folder name of the package, and the model's name in it. None: the recipe's name."""
    verify: bool = True
    """Load it in a clean process that may import only the packaged requirements, and compare its answers."""
    forms: list[Form] = Field(default_factory=lambda: list[Form](("merged",)), min_length=1)
    """What is written, all of one lineage. merged: a complete model. adapter: only what was learned, with the base it
    needs by name and SHA-256. quantized: merged, in the few bits of `quantization`. gguf: merged, for llama.cpp, by its
    own converter."""
    quantization: Literal["nf4", "int8"] = "nf4"
    """Form quantized: bitsandbytes' NF4 with quantized scales (Dettmers et al. 2023), or its int8."""
    gguf_type: Literal["f16", "bf16", "q8_0"] = "q8_0"
    """Form gguf: how llama.cpp's converter holds the weights."""
    license: str | None = None
    """SPDX identifier of the tuned model, written to its card. None: as the base model's card says."""
    license_waiver: str | None = Field(default=None, pattern=r"^[^:\n]*\w[^:\n]*:[^\n]*\w[^\n]*$", max_length=500)
    """`NAME: REASON` of who lets a conflict of licences pass; it is recorded in the package."""
    registered_model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name in the MLflow Model Registry of which the package becomes a version. None: it is not registered."""
    alias: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,99}$")
    """Alias that the new version gets, such as champion; it needs `evaluate.promotion`, which must be met."""


class Track(Section):
    """MLflow tracking."""

    enabled: bool = True
    """Off: metrics still go to the run's `metrics.jsonl`."""
    uri: str | None = None
    """Tracking server. None: MLFLOW_TRACKING_URI, else a SQLite file in the output folder."""
    experiment: str = "ingot"
    """Experiment name."""


class Diagnose(Section):
    """Looking inside a run; changes no result."""

    profile_steps: int = Field(default=0, ge=0)
    """Record this many steps (after two of warm-up) with torch's profiler: `profile/rank-*.json`, for Perfetto."""
    memory_snapshot: bool = False
    """Record allocations of the same steps on a GPU: `profile/memory-rank-*.pickle`, for pytorch.org/memory_viz."""


def unfit_form(recipe: "Recipe") -> str:
    """Why a form that `package.forms` asks for cannot be made of this recipe; empty where all can."""
    forms, task = recipe.package.forms, recipe.objective.task
    if len(set(forms)) < len(forms):
        return f"package.forms names {max(forms, key=forms.count)} twice; name it once"
    if "adapter" in forms and recipe.adapter.kind == "none":
        return "package.forms: adapter, and adapter.kind is none: full fine-tuning leaves no adapter; use merged"
    if "gguf" in forms and task not in CAUSAL:
        return f"package.forms: gguf is for {', '.join(CAUSAL)}, and objective.task is {task}; use merged"
    return ""


class Recipe(Section):
    """Everything that a run needs, from base model and data to a served package."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Short name: letters, digits, `.`, `_`, `-`. Runs and packages are named after it."""
    description: str = ""
    """One sentence for people."""
    output: str = "runs"
    """Folder for runs, relative to where the command is typed."""
    model: Model
    data: Data
    objective: Objective = Objective()
    adapter: Adapter = Adapter()
    quantization: Quantization = Quantization()
    kernels: Kernels = Kernels()
    optim: Optim = Optim()
    train: Train = Train()
    parallel: Parallel = Parallel()
    check: Check = Check()
    evaluate: Evaluate = Evaluate()
    package: Package = Package()
    serve: Serve = Serve()
    track: Track = Track()
    diagnose: Diagnose = Diagnose()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        data, train = self.data, self.train
        if data.validation_share + data.test_share >= 1.0:
            raise ValueError(
                "data.validation_share + data.test_share must be under 1, or nothing is left to learn from"
            )
        if train.tokens_per_microbatch < data.max_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch = {train.tokens_per_microbatch} cannot hold one row of data.max_tokens = "
                f"{data.max_tokens} tokens; raise the first or lower the second"
            )
        writes_anew = self.objective.task in SEQUENCE_TO_SEQUENCE
        if writes_anew and train.tokens_per_microbatch < data.max_tokens + data.max_target_tokens:
            raise ValueError(
                f"train.tokens_per_microbatch = {train.tokens_per_microbatch} cannot hold one row of data.max_tokens = "
                f"{data.max_tokens} and data.max_target_tokens = {data.max_target_tokens} tokens; raise the first"
            )
        if train.best_by != "validation_loss" and self.evaluate.during is None:
            raise ValueError(
                f"train.best_by = {train.best_by} is measured by evaluate.during, which is not set; set "
                "evaluate.during.every_steps, or use validation_loss"
            )
        pack = data.pack_tokens or data.max_tokens
        if data.pack_tokens is not None and data.batches != "packed":
            raise ValueError(f"data.pack_tokens is for data.batches: packed, and that is {data.batches}; remove it")
        if data.batches == "packed" and not data.max_tokens <= pack <= min(
            train.tokens_per_microbatch, train.tokens_per_step
        ):
            raise ValueError(
                f"data.pack_tokens = {pack} must lie between data.max_tokens = {data.max_tokens} and both "
                f"train.tokens_per_microbatch = {train.tokens_per_microbatch} and train.tokens_per_step = "
                f"{train.tokens_per_step}"
            )
        if data.batches == "packed" and train.group_by_length:
            raise ValueError("train.group_by_length evens out padding, and packed batches have none; remove it")
        merging = ("text-generation", *SEQUENCE_TO_SEQUENCE)
        if wrong := unfit_form(self):
            raise ValueError(wrong)
        if self.evaluate.merge_references and self.objective.task not in merging:
            raise ValueError(
                f"evaluate.merge_references is for {', '.join(merging)}, and objective.task is {self.objective.task}; "
                "remove it"
            )
        if self.evaluate.judge is not None:
            if self.objective.task not in JUDGED:
                raise ValueError(
                    f"evaluate.judge grades written answers ({', '.join(JUDGED)}), and objective.task is "
                    f"{self.objective.task}; remove it"
                )
            if not self.evaluate.judge.endpoint:
                raise ValueError("evaluate.judge.endpoint is missing: write who judges, https://HOST/v1#MODEL")
        _check_registered(self.package, self.evaluate)
        check_decidable(self.evaluate, later=self.package.enabled or self.serve.enabled)
        if data.columns:
            known = {*OPTIONAL_COLUMNS, *(name for names in COLUMNS.values() for name in names)}
            unknown = sorted(set(data.columns) - known)
            if unknown:
                raise ValueError(f"data.columns names {unknown[0]!r}; the engine knows: {', '.join(sorted(known))}")
        return self


def _check_registered(section: Package, evaluate: Evaluate) -> None:
    """Raise ValueError where the package cannot be registered, or not under this alias."""
    if section.registered_model is not None and not section.enabled:
        raise ValueError("package.registered_model is for package.enabled: true; set that, or remove the name")
    if section.alias is not None and re.fullmatch(r"latest|v\d+", section.alias, re.IGNORECASE):
        raise ValueError(f"package.alias = {section.alias} is a name that MLflow keeps to itself; write another one")
    if section.alias is not None and section.registered_model is None:
        raise ValueError(f"package.alias = {section.alias} names a registered model; set package.registered_model")
    if section.alias is not None and evaluate.promotion is None:
        raise ValueError(
            f"package.alias = {section.alias} is given by a promotion verdict; set evaluate.promotion, or remove it "
            "and promote the version by name: ingot models promote"
        )
