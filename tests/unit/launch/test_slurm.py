"""Slurm: tasks of a step are ranks; the batch script alone is one."""

import pytest

from ingot.errors import IngotError
from ingot.launch.slurm import expand, read, tasks_per_node

BATCH = {
    "SLURM_JOB_ID": "200505", "SLURM_JOB_NODELIST": "gpu[03-04]", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "2",
}  # fmt: skip


def step(rank: int, **more: str) -> dict[str, str]:
    node, local = divmod(rank, 8)
    return BATCH | {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node), **more,
    }  # fmt: skip


def test_a_task_of_srun():
    found = read(step(9))
    assert (found.rank, found.world, found.local, found.local_world, found.nodes) == (9, 16, 1, 8, 2)
    assert (found.launcher, found.master, found.job) == ("slurm", "gpu03", "slurm::200505")
    assert 1024 < found.port < 32768


def test_all_tasks_of_a_step_meet_at_one_place_and_another_step_at_another():
    assert len({(found.master, found.port) for rank in range(16) if (found := read(step(rank)))}) == 1
    assert read(step(0)).port != read(step(0, SLURM_STEP_ID="1")).port
    assert read(step(0)).port != read(step(0, SLURM_JOB_ID="200506")).port


def test_a_requeued_job_keeps_its_name():
    assert read(step(0)).job == read(step(0, SLURM_RESTART_COUNT="2")).job


@pytest.mark.parametrize("more", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_the_batch_script_itself_is_one_rank_whatever_it_asked_for(more):
    """It has SLURM_PROCID=0 and SLURM_NTASKS=16, and nobody else ever comes."""
    found = read(BATCH | more)
    assert (found.rank, found.world, found.job) == (0, 1, "slurm::200505")


def test_a_step_smaller_than_the_job():
    found = read(step(1, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="2"))
    assert (found.rank, found.world, found.local_world) == (1, 2, 2)


def test_nodes_with_different_numbers_of_tasks():
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_STEP_NUM_TASKS": "12"}
    assert (read(step(1, **uneven)).local_world, read(step(9, **uneven)).local_world) == (8, 4)


def test_the_users_own_master_wins():
    found = read(step(9, MASTER_ADDR="10.1.1.1", MASTER_PORT="4000"))
    assert (found.master, found.port) == ("10.1.1.1", 4000)


def test_half_a_set_and_a_rank_outside():
    env = step(9)
    del env["SLURM_LOCALID"]
    with pytest.raises(IngotError, match=r"SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=16 but not SLURM_LOCALID; .*srun"):
        read(env)
    with pytest.raises(IngotError, match=r"SLURM_PROCID=9, SLURM_STEP_NUM_TASKS=4: the rank is outside"):
        read(step(9, SLURM_STEP_NUM_TASKS="4"))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu01", ["gpu01"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a[8-11],b,c[2]", ["a8", "a9", "a10", "a11", "b", "c2"]),
        ("rack[1-2]n[1-2]-ib", ["rack1n1-ib", "rack1n2-ib", "rack2n1-ib", "rack2n2-ib"]),
        ("", []),
    ],
)
def test_lists_of_nodes(text, hosts):
    assert expand(text) == hosts


def test_tasks_per_node():
    assert tasks_per_node("8(x2),4") == [8, 8, 4]
    assert tasks_per_node("2") == [2]
