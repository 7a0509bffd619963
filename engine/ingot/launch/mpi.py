"""mpirun and mpiexec: Open MPI, MVAPICH, and Hydra (MPICH, Intel MPI).

https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
"""

import zlib
from collections.abc import Mapping

from ingot.errors import IngotError
from ingot.launch.value import Ranks, complete, master_of, number, shown, within

# rank, world, local rank, ranks of this node
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MVAPICH = ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE")
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# One job of mpirun has one of these; they keep two jobs on one machine apart.
JOB_NAMES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_ID")
FIX = "launch with mpirun, or with torchrun"


def read(env: Mapping[str, str]) -> Ranks | None:
    """None when no MPI started this process. Slurm sets PMI_* too (srun --mpi=pmi2): they count where nothing says
    that they are Slurm's.
    """
    for names in (OPEN_MPI, MVAPICH):
        if complete(env, names, (), FIX):
            return _made(env, names)
    if "SLURM_STEP_ID" in env and HYDRA[2] not in env:
        return None
    if complete(env, HYDRA[:2], (), FIX):
        return _made(env, HYDRA)
    if "PMIX_RANK" in env and "SLURM_JOB_ID" not in env:
        raise IngotError(
            f"the environment has {shown(env, 'PMIX_RANK')}, and nothing says how many ranks there are; {FIX}"
        )
    return None


def _made(env: Mapping[str, str], names: tuple[str, ...]) -> Ranks:
    rank, world = within(env, names[0], names[1], FIX)
    if world > 1 and names[2] not in env:
        raise IngotError(f"the environment has {shown(env, *names)} but not {names[2]} and {names[3]}; {FIX}")
    local = number(env, names[2]) if names[2] in env else 0
    local_world = number(env, names[3]) if names[3] in env else 1
    if not 0 <= local < local_world <= world:
        raise IngotError(f"the environment has {shown(env, *names)}, which do not fit; {FIX}")
    nodes = -(-world // local_world)
    master, port = master_of(env)
    if world > 1 and master is None and nodes == 1:
        master = "127.0.0.1"
    return Ranks(rank, world, local, local_world, nodes, "mpi", None, master, port or _port(env))


def check_master(ranks: Ranks, env: Mapping[str, str]) -> None:
    """Raise IngotError when ranks on several nodes do not know where the first one is: mpirun has no word for it."""
    if ranks.launcher == "mpi" and ranks.world > 1 and ranks.master is None:
        known = shown(env, OPEN_MPI[0], MVAPICH[0], HYDRA[0])
        raise IngotError(
            f"mpirun started {ranks.world} ranks on {ranks.nodes} nodes ({known}), and nothing says where rank 0 "
            "is; add: mpirun -x MASTER_ADDR=HOST (mpiexec -genv MASTER_ADDR HOST)"
        )


def _port(env: Mapping[str, str]) -> int:
    """The same on all ranks of a job, and under 32768, where the ports begin that systems give away."""
    name = "".join(env.get(name, "") for name in JOB_NAMES)
    return 12_000 + zlib.crc32(name.encode()) % 20_000 if name else 29_500
