"""mpirun of Open MPI, MVAPICH and Hydra."""

import pytest

from ingot.errors import IngotError
from ingot.launch.detect import detect
from ingot.launch.mpi import HYDRA, MVAPICH, OPEN_MPI, read


def started(names: tuple[str, ...], rank: int, world: int, local_world: int, **more: str) -> dict[str, str]:
    values = (rank, world, rank % local_world, local_world)
    return dict(zip(names, map(str, values), strict=True)) | more


@pytest.mark.parametrize("names", [OPEN_MPI, MVAPICH, HYDRA])
def test_each_family(names):
    found = read(started(names, 5, 8, 4, MASTER_ADDR="node-0"))
    assert (found.rank, found.world, found.local, found.local_world, found.nodes) == (5, 8, 1, 4, 2)
    assert (found.launcher, found.master) == ("mpi", "node-0")


def test_one_machine_needs_no_master_and_two_jobs_on_it_do_not_meet():
    first, second = (read(started(OPEN_MPI, 1, 2, 2, PMIX_NAMESPACE=f"prterun-host-{n}@1")) for n in (17, 18))
    assert first.master == "127.0.0.1"
    assert first.port != second.port
    assert 1024 < first.port < 32768


def test_several_nodes_need_to_know_where_rank_0_is():
    with pytest.raises(IngotError, match=r"OMPI_COMM_WORLD_RANK=5\).*mpirun -x MASTER_ADDR"):
        detect(started(OPEN_MPI, 5, 8, 4))


def test_half_a_set_and_a_rank_outside():
    with pytest.raises(IngotError, match="OMPI_COMM_WORLD_RANK=0 but not OMPI_COMM_WORLD_SIZE"):
        read({"OMPI_COMM_WORLD_RANK": "0"})
    with pytest.raises(IngotError, match="PMIX_RANK=1, and nothing says how many"):
        read({"PMIX_RANK": "1"})
    with pytest.raises(IngotError, match="MV2_COMM_WORLD_RANK=8, MV2_COMM_WORLD_SIZE=8"):
        read(started(MVAPICH, 8, 8, 4))


def test_what_slurm_sets_for_mpi_is_slurms():
    assert read({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}) is None
    assert read({"PMIX_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}) is None
    assert read({}) is None
