"""Which settings go together: one table that turns recipes away, writes the support matrix, lists what tests train."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product

from ingot.errors import MissingPackage, RecipeError
from ingot.ranks import Ranks
from ingot.recipe import CAUSAL, Recipe

STRATEGIES = ("none", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
ZERO = ("zero1", "zero2", "zero3")
WHOLE_ROWS = ("text-classification", "multi-label-classification", "reward", "dpo", "orpo")
LINES = ("padding-free", "packed")


@dataclass(frozen=True)
class Cell:
    """A combination of settings, named as in the recipe; `world` ranks in all, `task` is `objective.loss`."""

    strategy: str = "none"
    adapter: str = "lora"
    quantization: str = "none"
    batches: str = "padding-free"
    offload: str = "none"
    context: int = 1
    tensor: int = 1
    task: str = "chat-completion"
    world: int = 2
    shard_ranks: int | None = None
    activations: str = "none"
    offload_activations: bool = False
    compile: bool = False
    state: str = "float32"
    weights: str = "float32"

    @property
    def name(self) -> str:
        """What differs from the plainest cell, as a test id."""
        parts = [self.strategy, self.adapter if self.adapter == "lora" else "full", self.quantization, self.batches]
        parts += [f"offload-{self.offload}"] if self.offload != "none" else []
        parts += [f"context{self.context}"] if self.context > 1 else []
        parts += [f"tensor{self.tensor}"] if self.tensor > 1 else []
        parts += [self.activations] if self.activations != "none" else []
        parts += ["activations-offloaded"] if self.offload_activations else []
        parts += ["compiled"] if self.compile else []
        parts += ["8-bit-state"] if self.state == "int8" else []
        parts += ["bfloat16-weights"] if self.weights == "bfloat16" else []
        return " ".join(part for part in parts if part != "none" or part is self.strategy)


@dataclass(frozen=True)
class Rule:
    """`broken` says which cells cannot be; `field` is what to change, and `because` why and to what."""

    field: str
    broken: Callable[[Cell], bool]
    because: str


RULES = (
    Rule(
        "parallel.strategy",
        lambda c: c.strategy == "none" and c.world > c.context * c.tensor,
        "several ranks would train several different models; use auto or ddp",
    ),
    Rule(
        "parallel.strategy",
        lambda c: c.strategy in ("ddp", "fsdp", "hsdp") and c.world == 1,
        "there is only one rank; launch with torchrun --nproc-per-node N, or use auto",
    ),
    Rule(
        "parallel.tensor",
        lambda c: c.world % c.tensor != 0,
        "tensor must divide the number of ranks",
    ),
    Rule(
        "parallel.context",
        lambda c: c.world % (c.context * c.tensor) != 0,
        "context x tensor must divide the number of ranks",
    ),
    Rule(
        "parallel.shard_ranks",
        lambda c: c.shard_ranks is not None and c.strategy != "hsdp",
        "only hsdp cuts one copy among some of the ranks; remove it, or use parallel.strategy=hsdp",
    ),
    Rule(
        "parallel.shard_ranks",
        lambda c: c.shard_ranks is not None and c.world % c.shard_ranks != 0,
        "must divide the number of ranks",
    ),
    Rule(
        "quantization.kind",
        lambda c: c.quantization != "none" and c.adapter == "none",
        "a quantized weight cannot be trained, only an adapter over it; use adapter.kind=lora",
    ),
    Rule(
        "quantization.kind",
        lambda c: c.quantization != "none" and c.tensor > 1,
        "the blocks that share a scale cannot be cut with the matrix; use fsdp, or quantization.kind=none",
    ),
    Rule(
        "parallel.tensor",
        lambda c: c.tensor > 1 and c.strategy in ZERO,
        "DeepSpeed cuts whole parameters and takes none that are cut already; use fsdp or ddp with tensor",
    ),
    Rule(
        "parallel.tensor",
        lambda c: c.tensor > 1 and c.strategy == "hsdp",
        "ranks of a node would be both a copy and a tensor group; use fsdp, which cuts over the groups",
    ),
    Rule(
        "parallel.offload",
        lambda c: c.offload == "optimizer" and c.strategy not in ZERO,
        "only zero1, zero2 and zero3 keep the optimizer alone in CPU memory; use one of them, or offload=parameters "
        "with fsdp",
    ),
    Rule(
        "parallel.offload",
        lambda c: c.offload == "parameters" and c.strategy not in ("zero3", "fsdp"),
        "only zero3 and fsdp cut parameters and can keep them in CPU memory; use one of them",
    ),
    Rule(
        "parallel.context",
        lambda c: c.context > 1 and c.batches not in LINES,
        "ranks can only share a line of tokens; use data.batches=padding-free or packed",
    ),
    Rule(
        "parallel.context",
        lambda c: c.context > 1 and c.task == "distillation",
        "the teacher is whole on every rank and reads whole lines; use context=1",
    ),
    Rule(
        "parallel.context",
        lambda c: c.context > 1 and c.task not in CAUSAL,
        "only next tokens can be learned from a part of a row, and this objective looks at whole rows; use context=1",
    ),
    Rule(
        "data.batches",
        lambda c: c.batches == "packed" and c.task in WHOLE_ROWS,
        "packs fill up steps of many tokens, and this objective counts rows; use padding-free",
    ),
    Rule(
        "train.compile",
        lambda c: c.compile and c.activations != "none",
        "blocks are computed again inside of themselves, and torch leaves such a block uncompiled; use "
        "activation_checkpointing=none (compiled code already computes cheap operations again), or compile=false",
    ),
    Rule(
        "train.compile",
        lambda c: c.compile and c.offload_activations,
        "compiled code decides by itself what it keeps; use one of compile and offload_activations",
    ),
    Rule(
        "train.compile",
        lambda c: c.compile and (c.strategy in ZERO or c.tensor > 1),
        "DeepSpeed and tensor watch, gather or cut parameters by hooks inside of blocks, which compiled code may leave "
        "out; use ddp or fsdp, or compile=false",
    ),
    Rule(
        "train.activation_checkpointing",
        lambda c: c.activations == "selective" and c.tensor > 1,
        "results that are cut over ranks cannot be told apart by where they lie; use activation_checkpointing=full",
    ),
    Rule(
        "train.offload_activations",
        lambda c: c.offload_activations and c.strategy == "zero3",
        "DeepSpeed gathers weights for each block, and copies of them would be moved too; use fsdp, or "
        "offload_activations=false",
    ),
    Rule(
        "optim.state",
        lambda c: c.state == "int8" and (c.strategy in ZERO or c.tensor > 1),
        "DeepSpeed lays parameters end to end and tensor cuts inside of rows, so that blocks that share a scale would "
        "be torn; use fsdp, or state=float32",
    ),
    Rule(
        "optim.weights",
        lambda c: c.weights == "bfloat16" and c.adapter != "none",
        "adapters are small and stay in float32, and a frozen base has the type of model.dtype; use weights=float32, "
        "or adapter.kind=none",
    ),
    Rule(
        "optim.weights",
        lambda c: c.weights == "bfloat16" and (c.strategy in ZERO or c.tensor > 1),
        "DeepSpeed keeps float32 copies of weights, and what tensor cuts inside of rows cannot be rounded alike on all "
        "ranks; use fsdp, or weights=float32",
    ),
)


def cell_of(recipe: Recipe, ranks: Ranks) -> Cell:
    """The combination that a resolved recipe asks for."""
    section = recipe.parallel
    return Cell(
        section.strategy,
        recipe.adapter.kind,
        recipe.quantization.kind,
        recipe.data.batches,
        section.offload,
        section.context,
        section.tensor,
        recipe.objective.loss,
        ranks.world,
        section.shard_ranks,
        recipe.train.activation_checkpointing,
        recipe.train.offload_activations,
        recipe.train.compile,
        recipe.optim.state,
        recipe.optim.weights,
    )


def broken(cell: Cell) -> Rule | None:
    """The first rule that `cell` breaks."""
    return next((rule for rule in RULES if rule.broken(cell)), None)


def check(recipe: Recipe, ranks: Ranks) -> None:
    """Raise RecipeError for a combination that cannot work, with reason and way out; MissingPackage for one that
    needs a package that is not there.
    """
    if recipe.parallel.strategy in ZERO and find_spec("deepspeed") is None:
        raise MissingPackage("deepspeed", "parallel.strategy")
    rule = broken(cell_of(recipe, ranks))
    if rule is None:
        return
    section, name = rule.field.split(".")
    raise RecipeError(rule.field, getattr(getattr(recipe, section), name), f"{rule.because} ({ranks.world} ranks)")


def cells(**fixed: int | str) -> Iterator[Cell]:
    """Every allowed combination on two ranks (on one for `none`); `fixed` settings take only the given value."""
    sizes = (1, 2)
    choices = product(
        STRATEGIES,
        ("lora", "none"),
        ("none", "nf4", "int8", "fp8"),
        ("padded", *LINES),
        ("none", "optimizer", "parameters"),
        sizes,
        sizes,
    )
    for choice in choices:
        cell = Cell(*choice)
        if cell.strategy == "none" and cell.context == cell.tensor == 1:
            cell = replace(cell, world=1)
        if broken(cell) is None and all(getattr(cell, name) == value for name, value in fixed.items()):
            yield cell
