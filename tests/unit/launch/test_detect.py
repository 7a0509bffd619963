"""Launchers inside launchers: those that agree, those that contradict."""

import subprocess
import sys

import pytest

from ingot.errors import IngotError
from ingot.launch.detect import detect
from ingot.launch.value import Ranks


def torchrun(rank: int, world: int, local_world: int, nodes: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % local_world),
        "LOCAL_WORLD_SIZE": str(local_world), "GROUP_WORLD_SIZE": str(nodes), "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip


def srun(rank: int, world: int, local_world: int) -> dict[str, str]:
    node, local = divmod(rank, local_world)
    nodes = world // local_world
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(world), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), "SLURM_STEP_NODELIST": f"gpu[03-{nodes + 2:02}]",
        "SLURM_STEP_TASKS_PER_NODE": f"{local_world}(x{nodes})", "SLURM_STEP_NUM_NODES": str(nodes),
    }  # fmt: skip


def test_nobody_is_a_single_rank():
    assert detect({"PATH": "/bin"}) == Ranks()


def test_torchrun_started_by_one_task_a_node_of_srun():
    found = detect(srun(1, 2, 1) | torchrun(9, 16, 8, 2))
    assert (found.launcher, found.rank, found.world, found.job) == ("torchrun", 9, 16, "slurm::7")


def test_torchrun_in_the_batch_script():
    found = detect({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"} | torchrun(1, 4, 4, 1))
    assert (found.launcher, found.world, found.job) == ("torchrun", 4, "slurm::7")


def test_the_same_said_twice():
    found = detect(srun(3, 16, 8) | torchrun(3, 16, 8, 2) | {"PMI_RANK": "3", "PMI_SIZE": "16"})
    assert (found.rank, found.world) == (3, 16)


def test_a_torchrun_in_every_task_of_srun():
    with pytest.raises(
        IngotError, match=r"torchrun says rank 9 of 16 \(RANK=9.*slurm says rank 1 of 16 \(SLURM_PROCID=1"
    ):
        detect(srun(1, 16, 8) | torchrun(9, 16, 8, 2))


def test_torchruns_that_do_not_know_of_each_other():
    with pytest.raises(IngotError, match=r"2 torchruns that do not know of each other.*--nnodes 2"):
        detect(srun(1, 2, 1) | torchrun(3, 8, 8, 1))


def test_mpirun_against_torchrun():
    mpi = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "1"), ("SIZE", "4"), ("LOCAL_RANK", "1"))}
    with pytest.raises(IngotError, match=r"OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=4.*Use one of them"):
        detect(torchrun(0, 2, 2, 1) | mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})


def test_mpirun_in_a_slurm_job_whose_own_daemons_are_tasks():
    mpi = {"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    found = detect(srun(1, 2, 1) | mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "MASTER_ADDR": "gpu03"})
    assert (found.launcher, found.rank, found.job) == ("mpi", 9, "slurm::7")


def test_a_world_size_of_the_batch_script_must_be_the_steps():
    assert detect(srun(1, 16, 8) | {"WORLD_SIZE": "16", "MASTER_ADDR": "gpu03"}).rank == 1
    with pytest.raises(IngotError, match="WORLD_SIZE=2, and slurm started 16 ranks"):
        detect(srun(1, 16, 8) | {"WORLD_SIZE": "2"})


def test_detection_needs_no_torch():
    code = "import sys, ingot.launch.detect; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
