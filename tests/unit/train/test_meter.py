"""What the seconds of a step go into, by a clock that the test winds itself."""

import numpy as np
import pytest
import torch

from ingot.train import meter as module
from ingot.train.meter import CudaClock, HostClock, Meter


class Wound:
    """Time that passes only when told to; marks are known `delay` marks later, as on a GPU."""

    def __init__(self, delay: int = 0) -> None:
        self.now, self.marks, self.delay = 0.0, 0, delay

    def mark(self):
        self.marks += 1
        return (self.now, self.marks)

    def passed(self, mark):
        return self.marks >= mark[1] + self.delay

    def seconds(self, start, end):
        return end[0] - start[0]


def wound(monkeypatch, delay=0):
    clock = Wound(delay)
    meter = Meter()
    meter._clock = clock
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    meter.resume()
    return meter, clock


def one_step(meter, clock, forward=2.0, reduced_after=None):
    clock.now += 1.0
    meter.got_data()
    for name, seconds in (("forward", forward), ("backward", 4.0), ("communication", 0.5), ("step", 1.5)):
        with meter.phase(name):
            if name == "backward" and reduced_after is not None:
                clock.now += reduced_after
                meter.reduction_set_out()
                clock.now += seconds - reduced_after
            else:
                clock.now += seconds
    clock.now += 1.0
    return meter.step(80, 40)


def test_split_names_every_second(monkeypatch):
    meter, clock = wound(monkeypatch)
    assert one_step(meter, clock) == 10.0
    with meter.phase("validation"):
        clock.now += 100.0
    meter.resume()
    one_step(meter, clock, forward=12.0)
    rates = meter.rates()
    seconds = {name: rates[f"{name}_seconds"] for name in ("data_wait", "forward", "backward", "optimizer", "other")}
    assert seconds == {"data_wait": 1.0, "forward": 12.0, "backward": 4.0, "optimizer": 1.5, "other": 1.0}
    assert rates["communication_exposed_seconds"] == 0.5
    assert rates["step_seconds"] == 20.0
    # Shares are of both steps, validation is of neither.
    assert rates["forward_share"] == pytest.approx(14 / 30)
    assert sum(value for name, value in rates.items() if name.endswith("_share")) == pytest.approx(1.0)
    assert rates["tokens_per_second"] == pytest.approx(160 / 30)
    assert rates["trainable_tokens_per_second"] == pytest.approx(80 / 30)
    means = meter.averages()
    assert means["forward_seconds"] == 7.0
    assert means["validation_total_seconds"] == 100.0
    assert "forward 46.7%" in meter.split()


def test_reduction_that_backward_does_not_hide_is_communication(monkeypatch):
    meter, clock = wound(monkeypatch)
    one_step(meter, clock, reduced_after=3.0)
    assert meter.rates()["backward_seconds"] == 3.0
    assert meter.rates()["communication_exposed_seconds"] == 0.5 + 1.0


def test_figures_of_a_device_come_a_step_later(monkeypatch):
    meter, clock = wound(monkeypatch, delay=1)
    one_step(meter, clock)
    assert "forward_seconds" not in meter.rates(), "nothing may wait for the device"
    meter.resume()
    one_step(meter, clock, forward=9.0)
    assert meter.rates()["forward_seconds"] == 2.0
    meter.resume()
    assert meter.averages()["forward_seconds"] == pytest.approx(5.5)


def test_phases_are_told_as_they_begin():
    heard = []
    meter = Meter(on_phase=heard.append)
    with meter.phase("forward"):
        assert meter.at == "forward"
    meter.resume()
    assert heard == ["forward", "data"]


def test_utilization_names_its_convention_and_is_absent_without_a_peak(sharded):
    meter = Meter()
    meter.watch(sharded, recomputes=True)
    meter.step(30, 10, np.array([10, 20]))
    operations, seconds = meter._flops.step(np.array([10, 20]), 10), meter.seconds
    rates = meter.rates()
    assert not any("mfu" in name for name in rates)
    assert rates["achieved_flops_per_second_6n"] == pytest.approx(operations["6n"] / seconds)
    meter._peak, meter._world = 1e12, 4
    rates = meter.rates()
    assert rates["mfu_lora_aware"] == pytest.approx(operations["lora_aware"] / seconds / 4e12)
    assert rates["hfu"] == pytest.approx(operations["hardware"] / seconds / 4e12)
    assert not any("achieved" in name for name in rates)


def test_a_training_run_keeps_all_figures(sharded, row_lists, make_recipe, curve):
    seen = []
    curve(sharded, row_lists, make_recipe(), on_step=(lambda info: seen.append(info.rates),))
    assert seen[-1].keys() >= {
        "tokens_per_second",
        "trainable_tokens_per_second",
        "peak_memory_mib",
        "step_seconds",
        "data_wait_seconds",
        "data_wait_share",
        "communication_exposed_share",
        "achieved_flops_per_second_lora_aware",
    }
    busy = seen[-1]["forward_share"] + seen[-1]["backward_share"]
    assert 0.3 < busy <= 1.0


@pytest.mark.gpu
def test_device_time_of_a_product_is_not_its_launch_time():
    clock, host = CudaClock(), HostClock()
    big = torch.randn(8192, 8192, device="cuda")
    big @ big
    torch.cuda.synchronize()
    start, launched = clock.mark(), host.mark()
    for _ in range(8):
        big @ big
    end, launch_seconds = clock.mark(), host.mark() - launched
    assert not clock.passed(end)
    torch.cuda.synchronize()
    assert clock.passed(end)
    assert clock.seconds(start, end) > 5 * launch_seconds


@pytest.mark.gpu
def test_figures_on_a_device(row_lists, make_recipe, make_model, curve):
    from ingot.parallel.strategies import parallelize
    from ingot.ranks import Ranks

    recipe = make_recipe()
    sharded = parallelize(make_model(), Ranks(), recipe, torch.device("cuda"), torch.bfloat16)
    seen = []
    curve(sharded, row_lists, recipe, on_step=(lambda info: seen.append(info.rates),))
    assert seen[-1]["peak_memory_reserved_mib"] >= seen[-1]["peak_memory_mib"] > 0
    assert seen[-1]["backward_seconds"] > 0
    assert any(name.startswith(("mfu_", "achieved_")) for name in seen[-1])
