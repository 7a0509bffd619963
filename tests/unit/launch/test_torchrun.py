"""torchrun's variables, and those that others set by hand under the same names."""

import pytest

from ingot.errors import IngotError
from ingot.launch.torchrun import read

TORCHRUN = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "week-long",
    "TORCHELASTIC_RESTART_COUNT": "1",
}  # fmt: skip


def test_torchrun():
    found = read(TORCHRUN)
    assert (found.rank, found.world, found.local, found.local_world, found.nodes) == (9, 16, 1, 8, 2)
    assert (found.launcher, found.master, found.port) == ("torchrun", "node-0", 29500)
    assert not found.main


def test_nobody():
    assert read({"PATH": "/bin"}) is None


def test_a_launch_without_a_name_keeps_its_job_over_restarts_and_shares_it_with_no_other_launch():
    def started(folder: str, attempt: int) -> str | None:
        error_file = f"/tmp/torchelastic_x/{folder}/attempt_{attempt}/0/error.json"
        return read(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_ERROR_FILE": error_file}).job

    assert started("none_a", 0) == started("none_a", 2)
    assert started("none_a", 0) != started("none_b", 0)
    assert read(TORCHRUN).job == "torchrun:week-long"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": None}, r"RANK=9, LOCAL_RANK=1, LOCAL_WORLD_SIZE=8 but not WORLD_SIZE; launch with torchrun"),
        ({"RANK": "16"}, r"RANK=16, WORLD_SIZE=16: the rank is outside of the world"),
        ({"RANK": "-1"}, r"RANK=-1"),
        ({"RANK": "one"}, r"RANK='one', which is no integer"),
        ({"LOCAL_RANK": "8"}, r"LOCAL_RANK=8, LOCAL_WORLD_SIZE=8, WORLD_SIZE=16, which do not fit"),
        ({"LOCAL_RANK": None}, r"but not LOCAL_RANK, so it is unknown which GPU"),
    ],
)
def test_what_cannot_be_names_variables_values_and_the_fix(changes, named):
    env = {name: value for name, value in (TORCHRUN | changes).items() if value is not None}
    with pytest.raises(IngotError, match=named):
        read(env)


def test_two_ranks_started_by_hand_on_one_machine():
    found = read({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"})
    assert (found.local, found.local_world, found.nodes, found.launcher, found.job) == (1, 2, 1, "environment", None)
