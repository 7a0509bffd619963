"""The process group behind the ranks: what launchers leave unset, who does not come, and what a restart finds."""

import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ingot import ranks as module
from ingot.errors import IngotError
from ingot.ranks import Ranks, idle_gpus, on_main, pick_device, process_group, read_ranks
from ingot.recipe import Parallel

CPU = torch.device("cpu")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*NAMES, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def free_port() -> int:
    return dist.TCPStore("localhost", 0, 1, is_master=True).port


def test_without_a_launcher_there_is_one_rank():
    assert read_ranks({}) == Ranks()
    with process_group(Ranks(), Parallel(strategy="none"), CPU):
        assert not dist.is_initialized()
        assert on_main(lambda: 7) == 7


def test_a_launcher_that_sets_other_variables_gets_torchs_for_as_long_as_the_group_lives(free_port, monkeypatch):
    """transformers and deepspeed read them, whoever started the ranks."""
    met: dict[str, str] = {}
    monkeypatch.setattr(module, "_meet", lambda ranks, section: met.update(os.environ))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    found = Ranks(3, 4, 1, 2, 2, "slurm", "slurm::7", "gpu03", free_port)
    with process_group(found, Parallel(strategy="ddp", backend="gloo"), CPU):
        pass
    assert [met[name] for name in NAMES] == ["3", "4", "1", "2", "gpu03", str(free_port)]
    assert not set(NAMES) & set(os.environ)


def test_ranks_that_do_not_come_are_an_error_that_names_the_place(free_port):
    alone = Ranks(0, 2, 0, 2, 1, "slurm", None, "localhost", free_port)
    section = Parallel(strategy="ddp", backend="gloo", meeting_minutes=0.01)
    with (
        pytest.raises(IngotError, match=rf"rank 0 of 2 \(slurm\) did not meet the others at localhost:{free_port}"),
        process_group(alone, section, CPU),
    ):
        pass
    assert not dist.is_initialized()


def test_a_restart_does_not_read_what_dead_ranks_left_in_the_agents_store(monkeypatch):
    agent = dist.TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    agent.set("address of rank 0", "a dead one's")

    def start() -> None:
        stores: dict[int, dist.Store] = {}

        def come(rank: int) -> None:
            stores[rank] = module._fresh_store(Ranks(rank, 3, rank, 3), timedelta(seconds=20))

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not stores[1].check(["address of rank 0"])
        stores[0].set("address of rank 0", "mine")
        assert [stores[rank].get("address of rank 0") for rank in range(3)] == [b"mine"] * 3

    start()
    agent.set("ingot/ask/2", "of one that died while it asked")
    start()


def test_gpus_and_ranks_must_fit(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(Ranks(5, 8, 1, 2)) == torch.device("cuda", 1)
    with pytest.raises(IngotError, match="4 ranks and 2 GPUs"):
        pick_device(Ranks(3, 4, 3, 4))
    assert "2 GPUs are here and 1 is used" in idle_gpus(Ranks())
    assert idle_gpus(Ranks(0, 2, 0, 2)) is None
    # Slurm's --gpus-per-task=1: every task sees one GPU of its own.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(Ranks(3, 4, 3, 4, launcher="slurm")) == torch.device("cuda", 0)
