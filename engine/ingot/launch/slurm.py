"""Slurm: the tasks of a job step (srun) are the ranks.

https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ingot.errors import IngotError
from ingot.launch.value import Ranks, complete, master_of, number, shown, within

FIX = "launch with: srun --ntasks-per-node=GPUS python -m ingot ..."
# slurm.h: ids from here on are no steps of tasks (the batch script, an interactive shell, ...).
SPECIAL_STEPS = 0xFFFFFFF0
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_HOST = re.compile(r"(?:\[[^\]]*\]|[^,\[\]])+")  # up to a comma outside of brackets
_PART = re.compile(r"\[([^\]]*)\]|([^\[]+)")


def read(env: Mapping[str, str]) -> Ranks | None:
    """None outside of Slurm.

    The batch script itself has SLURM_NTASKS and SLURM_PROCID=0 too, but no step: there is one process, and waiting for
    the others would wait for ever. So it is one rank.
    """
    if "SLURM_JOB_ID" not in env:
        return None
    if not _in_parallel_step(env):
        return Ranks(launcher="slurm", job=job(env))
    world_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    complete(env, ("SLURM_PROCID", "SLURM_LOCALID", world_name), (), FIX)
    rank, world = within(env, "SLURM_PROCID", world_name, FIX)
    local = number(env, "SLURM_LOCALID")
    if world == 1:
        return Ranks(launcher="slurm", job=job(env))
    hosts = list(expand(_first(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")))
    counts = tasks_per_node(_first(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"))
    nodes = number(env, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in env else max(1, len(hosts))
    node = number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    local_world = counts[node] if node < len(counts) else counts[-1] if counts else -(-world // nodes)
    if not 0 <= local < local_world <= world:
        known = shown(env, world_name, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
        raise IngotError(f"the environment has {known}, which do not fit; {FIX}")
    master, port = master_of(env)
    found = Ranks(rank, world, local, local_world, nodes, "slurm", job(env), master, port or _port(env))
    return found if master else replace(found, master=_master(env, hosts, nodes))


def job(env: Mapping[str, str]) -> str:
    """Name of the job; Slurm starts it again (requeue) under the same number."""
    return f"slurm:{env.get('SLURM_CLUSTER_NAME', '')}:{env['SLURM_JOB_ID']}"


def expand(hosts: str) -> list[str]:
    """Names in a list such as `node[01-03,07],gpu5`, in order. Raises IngotError for brackets that do not close."""
    if hosts.count("[") != hosts.count("]"):
        raise IngotError(f"Slurm's list of nodes {hosts!r} cannot be read; set MASTER_ADDR to the host of rank 0")
    found: list[str] = []
    for host in _HOST.findall(hosts):
        parts = [list(_numbers(ranges)) if ranges else [text] for ranges, text in _PART.findall(host)]
        found += ["".join(name) for name in itertools.product(*parts)]
    return found


def _numbers(ranges: str) -> Iterator[str]:
    """The numbers in `01-03,07`, with their leading zeros."""
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        yield from (f"{value:0{len(low)}d}" for value in range(int(low), int(high or low) + 1))


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node from a list such as `8(x2),4`."""
    return [int(count) for count, times in _REPEATED.findall(counts) for _ in range(int(times or 1))]


def _in_parallel_step(env: Mapping[str, str]) -> bool:
    name = "SLURM_STEP_ID" if "SLURM_STEP_ID" in env else "SLURM_STEPID"
    return name in env and number(env, name) < SPECIAL_STEPS


def _first(env: Mapping[str, str], *names: str) -> str:
    return next((env[name] for name in names if env.get(name)), "")


def _master(env: Mapping[str, str], hosts: list[str], nodes: int) -> str:
    """Task 0 runs on the first node of the step's list."""
    if hosts:
        return hosts[0]
    if nodes == 1:
        return "127.0.0.1"
    raise IngotError(
        f"Slurm started ranks on {nodes} nodes ({shown(env, 'SLURM_JOB_ID', 'SLURM_STEP_NUM_NODES')}), and neither "
        "SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST says which; set MASTER_ADDR to the host of rank 0"
    )


def _port(env: Mapping[str, str]) -> int:
    """The same on all ranks of a step, another in the next step, and under 32768, where the ports begin that systems
    give away.
    """
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0"))
    return 12_000 + (number(env, "SLURM_JOB_ID") * 7 + int(step)) % 20_000
