"""Which launcher started this process: the files beside this one are asked, and must not contradict each other."""

from collections.abc import Mapping
from dataclasses import replace

from ingot.errors import IngotError
from ingot.launch import azureml, mpi, slurm, torchrun
from ingot.launch.value import Ranks, shown

# The first that answers is the innermost: it started this very process.
LAUNCHERS = (torchrun.read, azureml.read, mpi.read, slurm.read)
# What shows a launcher's opinion, for messages.
NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE"),
    "environment": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "azureml": ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "NODE_RANK"),
    "mpi": (*mpi.OPEN_MPI[:2], *mpi.MVAPICH[:2], *mpi.HYDRA[:2]),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_STEP_ID"),
}


def detect(env: Mapping[str, str]) -> Ranks:
    """The ranks that `env` tells of; a single one when no launcher is in it.

    Raises IngotError for half a set of variables, a rank outside of its world, and launchers that contradict.
    """
    found = [ranks for read in LAUNCHERS if (ranks := read(env)) is not None]
    if not found:
        return Ranks()
    inner, *outer = found
    mpi.check_master(inner, env)
    for other in outer:
        _agree(inner, other, env)
    if inner.world > 1 and env.get("WORLD_SIZE", str(inner.world)) != str(inner.world):
        raise IngotError(
            f"the environment has {shown(env, 'WORLD_SIZE')}, and {inner.launcher} started {inner.world} ranks "
            f"({shown(env, *NAMES[inner.launcher])}); unset WORLD_SIZE, or start that many"
        )
    job = inner.job
    # The scheduler's job outlives a restart of anything in it.
    if "AZUREML_RUN_ID" in env:
        job = azureml.job(env)
    elif "SLURM_JOB_ID" in env:
        job = slurm.job(env)
    return replace(inner, job=job)


def _agree(inner: Ranks, outer: Ranks, env: Mapping[str, str]) -> None:
    """Raise IngotError unless `inner` says the same as `outer`, or was started by a task of it on each node."""
    if outer.world == 1 or (inner.rank, inner.world) == (outer.rank, outer.world):
        return
    said = (
        f"{inner.launcher} says rank {inner.rank} of {inner.world} ({shown(env, *NAMES[inner.launcher])}), "
        f"{outer.launcher} says rank {outer.rank} of {outer.world} ({shown(env, *NAMES[outer.launcher])})"
    )
    if outer.local_world > 1 or outer.world > inner.world:
        raise IngotError(
            f"two launchers started ranks: {said}. Use one of them: either {outer.launcher} starts one task on each "
            f"node and {inner.launcher} the ranks, or {outer.launcher} starts all ranks and {inner.launcher} is left "
            "out (unset its variables)"
        )
    if inner.launcher == "torchrun" and inner.nodes < outer.world:
        raise IngotError(
            f"{said}: {outer.world} torchruns that do not know of each other would train {outer.world} models. Add "
            f"--nnodes {outer.world} --rdzv-backend c10d --rdzv-id JOB --rdzv-endpoint HOST:29500 to torchrun"
        )
