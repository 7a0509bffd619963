"""Azure ML: ranks spawned by the platform with torch's names or mpirun's, and one process a node."""

import pytest

from ingot.errors import IngotError
from ingot.launch.azureml import read
from ingot.launch.detect import detect

RUN = {"AZUREML_RUN_ID": "brave_nut_1"}


def platform(rank: int, **more: str) -> dict[str, str]:
    """Two nodes of eight ranks, as the PyTorch distribution starts them."""
    node, local = divmod(rank, 8)
    return RUN | {
        "RANK": str(rank), "WORLD_SIZE": "16", "LOCAL_RANK": str(local), "NODE_RANK": str(node),
        "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105", **more,
    }  # fmt: skip


def test_ranks_spawned_by_the_platform():
    found = read(platform(9))
    assert (found.rank, found.world, found.local, found.local_world, found.nodes) == (9, 16, 1, 8, 2)
    assert (found.launcher, found.job, found.master, found.port) == ("azureml", "azureml:brave_nut_1", "10.0.0.4", 6105)


@pytest.mark.parametrize("more", [{"AZUREML_NODE_COUNT": "2"}, {"AZ_BATCH_HOST_LIST": "10.0.0.4,10.0.0.5"}])
def test_the_first_node_learns_how_many_nodes_there_are(more):
    assert {(found.local_world, found.nodes) for rank in range(16) if (found := read(platform(rank, **more)))} == {
        (8, 2)
    }


def test_one_process_a_node_is_told_to_start_torchrun():
    env = RUN | {"NODE_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105"}
    with pytest.raises(IngotError, match=r"NODE_RANK=1, WORLD_SIZE=2.*process_count_per_instance.*torchrun --nnodes"):
        detect(env)


def test_torchrun_in_a_process_a_node_wins_and_the_job_is_the_platforms():
    env = platform(1) | {"LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    found = detect(env)
    assert (found.launcher, found.job, found.rank) == ("torchrun", "azureml:brave_nut_1", 1)


def test_a_job_of_one_process():
    assert detect(RUN).world == 1
    assert detect(RUN | {"NODE_RANK": "0"}).world == 1
    assert detect(RUN | {"NODE_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}).world == 1


def mpirun(rank: int, world: int, local_world: int, **more: str) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = (rank, world, rank % local_world, local_world)
    return RUN | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, values, strict=True)} | more


def test_mpi_distribution_over_two_nodes():
    found = detect(mpirun(9, 16, 8, AZ_BATCH_MASTER_NODE="10.0.0.4:6000"))
    assert (found.rank, found.world, found.local, found.nodes) == (9, 16, 1, 2)
    assert (found.launcher, found.master, found.port, found.job) == ("azureml", "10.0.0.4", 6000, "azureml:brave_nut_1")


def test_mpi_distribution_on_one_node():
    found = detect(mpirun(3, 4, 4, AZ_BATCHAI_MPI_MASTER_NODE="localhost"))
    assert (found.rank, found.master, found.port) == (3, "localhost", 6105)


def test_mpi_over_nodes_without_a_first_node_names_the_variable():
    with pytest.raises(IngotError, match="neither AZ_BATCH_MASTER_NODE nor MASTER_ADDR"):
        detect(mpirun(9, 16, 8))


def test_half_a_set():
    env = platform(9)
    del env["LOCAL_RANK"]
    with pytest.raises(IngotError, match=r"but not LOCAL_RANK; set distribution"):
        read(env)
