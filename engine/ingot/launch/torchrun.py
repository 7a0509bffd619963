"""torchrun, and whatever else sets torch.distributed's own variables (accelerate, deepspeed, Kubeflow, a hand).

torchrun: https://pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from collections.abc import Mapping
from pathlib import PurePath

from ingot.errors import IngotError
from ingot.launch.value import Ranks, complete, master_of, number, shown, within

NEEDED, OPTIONAL = ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
FIX = "launch with torchrun"
OTHERS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
HERE = ("localhost", "127.0.0.1", "::1")


def read(env: Mapping[str, str]) -> Ranks | None:
    """None when no variable of torch.distributed is set, or when the platform of Azure ML has set them."""
    elastic = "TORCHELASTIC_RUN_ID" in env
    if not elastic and "AZUREML_RUN_ID" in env:
        return None
    if "RANK" not in env and any(name in env for name in OTHERS):
        return None  # batch scripts export WORLD_SIZE for all and leave the rank to srun or mpirun
    if not complete(env, NEEDED, OPTIONAL, FIX):
        return None
    rank, world = within(env, *NEEDED, FIX)
    master, port = master_of(env)
    local, local_world = _local(env, rank, world)
    nodes = number(env, "GROUP_WORLD_SIZE") if "GROUP_WORLD_SIZE" in env else max(1, world // local_world)
    launcher = "torchrun" if elastic else "environment"
    return Ranks(rank, world, local, local_world, nodes, launcher, _job(env) if elastic else None, master, port)


def _local(env: Mapping[str, str], rank: int, world: int) -> tuple[int, int]:
    """(local rank, ranks of this node). Without the variables it is clear for one rank and for one machine only."""
    if "LOCAL_RANK" not in env:
        if world > 1 and env.get("MASTER_ADDR", "localhost") not in HERE:
            raise IngotError(
                f"the environment has {shown(env, 'RANK', 'WORLD_SIZE', 'MASTER_ADDR')} but not LOCAL_RANK, so it is "
                f"unknown which GPU this rank has; set LOCAL_RANK and LOCAL_WORLD_SIZE, or {FIX}"
            )
        return (rank, world) if world > 1 else (0, 1)
    known = "LOCAL_WORLD_SIZE" in env
    local, local_world = number(env, "LOCAL_RANK"), number(env, "LOCAL_WORLD_SIZE") if known else world
    if not 0 <= local < local_world <= world:
        raise IngotError(f"the environment has {shown(env, *OPTIONAL, 'WORLD_SIZE')}, which do not fit; {FIX}")
    return local, local_world


def _job(env: Mapping[str, str]) -> str:
    """A name that a restart keeps and another launch has not.

    Without --rdzv-id every launch is called "none": what tells it apart is the folder for logs that its agent made.
    """
    run = env["TORCHELASTIC_RUN_ID"]
    if run not in ("", "none"):
        return f"torchrun:{run}"
    # .../none_abc123/attempt_0/0/error.json
    error_file = PurePath(env.get("TORCHELASTIC_ERROR_FILE", ""))
    launch = error_file.parts[-4] if len(error_file.parts) > 4 else "none"
    return f"torchrun:{launch}@{env.get('MASTER_ADDR', '')}:{env.get('MASTER_PORT', '')}"
