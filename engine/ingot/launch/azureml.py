"""Azure Machine Learning: the platform starts the ranks, with torch's variables (PyTorch distribution) or mpirun's.

https://learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu
"""

from collections.abc import Mapping
from dataclasses import replace

from ingot.errors import IngotError
from ingot.launch import mpi
from ingot.launch.value import Ranks, complete, master_of, number, shown, within

NEEDED, OPTIONAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("LOCAL_WORLD_SIZE",)
FIX = "set distribution: {type: pytorch, process_count_per_instance: GPUS OF A NODE} in the job"
TORCHRUN = (
    "torchrun --nnodes $AZUREML_NODE_COUNT --node-rank $NODE_RANK --nproc-per-node GPUS "
    "--master-addr $MASTER_ADDR --master-port $MASTER_PORT -m ingot ..."
)
PORT = 6105  # the one that the platform's PyTorch distribution takes


def read(env: Mapping[str, str]) -> Ranks | None:
    """None outside of an Azure ML job, inside of a torchrun that the job's command starts, and in a job of one
    process.
    """
    if "AZUREML_RUN_ID" not in env or "TORCHELASTIC_RUN_ID" in env:
        return None
    if "RANK" not in env and mpi.OPEN_MPI[0] in env:
        return _from_mpi(env)
    if "RANK" not in env and "NODE_RANK" in env and env.get("WORLD_SIZE", "1") != "1":
        raise IngotError(
            f"Azure ML started one process on each node ({shown(env, 'NODE_RANK', 'WORLD_SIZE', 'MASTER_ADDR')}) and "
            f"leaves it to the command to start the ranks; {FIX}, or write the command as: {TORCHRUN}"
        )
    if "RANK" not in env or not complete(env, NEEDED, OPTIONAL, FIX):
        return None
    rank, world = within(env, "RANK", "WORLD_SIZE", FIX)
    local = number(env, "LOCAL_RANK")
    nodes = _nodes(env, rank, world, local)
    local_world = number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else world // nodes
    if world % nodes or not 0 <= local < local_world:
        known = shown(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "AZUREML_NODE_COUNT")
        raise IngotError(f"the environment has {known}, which do not fit; {FIX}")
    return Ranks(rank, world, local, local_world, nodes, "azureml", job(env), *master_of(env))


def job(env: Mapping[str, str]) -> str:
    """Name of the job; a preempted one is started again under the same."""
    return f"azureml:{env['AZUREML_RUN_ID']}"


def _nodes(env: Mapping[str, str], rank: int, world: int, local: int) -> int:
    """Nodes of the job. The platform documents no variable with the ranks of a node."""
    if "AZUREML_NODE_COUNT" in env:
        return max(1, number(env, "AZUREML_NODE_COUNT"))
    node = number(env, "NODE_RANK") if "NODE_RANK" in env else 0
    if node > 0 and rank > local:  # ranks are counted node by node
        return max(1, round(world * node / (rank - local)))
    hosts = [host for host in env.get("AZ_BATCH_HOST_LIST", "").replace(";", ",").split(",") if host]
    return max(1, len(set(hosts)))


def _from_mpi(env: Mapping[str, str]) -> Ranks | None:
    """The MPI distribution: mpirun's variables, and the platform's own words for the first node."""
    found = mpi.read(env)
    if found is None or found.world == 1:
        return found
    host, _, port = env.get("AZ_BATCH_MASTER_NODE", "").partition(":")
    if found.nodes == 1 or not host:
        host, port = env.get("AZ_BATCHAI_MPI_MASTER_NODE", host), port if found.nodes > 1 else ""
    master = env.get("MASTER_ADDR") or host or ("127.0.0.1" if found.nodes == 1 else "")
    if not master:
        raise IngotError(
            f"mpirun started {found.world} ranks on several nodes, and neither AZ_BATCH_MASTER_NODE nor MASTER_ADDR "
            "says which is the first; set MASTER_ADDR in the job's environment_variables, or use distribution pytorch"
        )
    chosen = env.get("MASTER_PORT") or port
    return replace(
        found, launcher="azureml", job=job(env), master=master, port=int(chosen) if chosen.isdigit() else PORT
    )
