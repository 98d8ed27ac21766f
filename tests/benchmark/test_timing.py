"""Programs that take turns, and the CPU time that other processes use at the same time."""

import os
import time

import jax
import pytest

from mot_jax.benchmark import timing


def test_the_cpu_time_of_other_processes_is_a_share_of_all_cores(tmp_path, monkeypatch):
    """Two cores for 10 s, of which this process uses 8 s, others 3 s, another virtual machine 1 s."""
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(time, "process_time", iter([5.0, 13.0, 21.0]).__next__)
    before = {"user": 100, "nice": 1, "system": 10, "idle": 500, "iowait": 7, "irq": 0, "softirq": 1, "steal": 2}
    after = {"user": 109, "nice": 1, "system": 12, "idle": 507, "iowait": 8, "irq": 0, "softirq": 1, "steal": 3}
    readings = []
    for seconds in (before, after, after):
        guest = [99 * ticks, 0]  # a part of user
        line = " ".join(str(value) for value in [*(round(s * ticks) for s in seconds.values()), *guest])
        (tmp_path / "stat").write_text(f"cpu  {line}\ncpu0 {line}\n")
        readings.append(timing.cpu_times(str(tmp_path / "stat")))
    assert timing.share_of_others(readings[0], readings[1]) == pytest.approx(4 / 20)
    assert timing.share_of_others(readings[1], readings[2]) is None  # no time has passed
    assert timing.cpu_times(str(tmp_path / "missing")) is None and timing.share_of_others(None, readings[0]) is None


def test_a_program_that_fails_is_left_out_and_the_others_continue():
    """It fails in the second of four rounds."""
    calls, failures = {"good": 0, "bad": 0}, []

    def program(name):
        def run():
            calls[name] += 1
            if name == "bad" and calls[name] == 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return lambda: run

    programs = {name: program(name) for name in calls}
    timings = timing.in_turns(programs, 3, failed=lambda name, error: failures.append((name, str(error))))
    assert set(timings) == {"good"} and len(timings["good"].seconds) == 3 and calls == {"good": 4, "bad": 2}
    assert failures == [("bad", "RESOURCE_EXHAUSTED: Out of memory")]
    calls["bad"] = 0
    with pytest.raises(jax.errors.JaxRuntimeError):
        timing.in_turns(programs, 3)


def test_slow_programs_take_turns_of_their_own_in_fewer_rounds(monkeypatch):
    """By a clock on which one takes 11 times as long as another. The first two rounds have all programs."""
    clock, order = [0.0], []

    def program(name, seconds):
        def run():
            clock[0] += seconds
            order.append(name)

        return lambda: run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    programs = {name: program(name, seconds) for name, seconds in (("slow", 11.0), ("a", 1.0), ("b", 10.0))}
    timings = timing.in_turns(programs, 16)
    assert set(order[:3]) == set(order[3:6]) == set(programs)
    assert set(order[6:36]) == {"a", "b"} and order[36:] == ["slow"] * 3
    assert timings["slow"].seconds == (11.0,) * 4 and timings["a"].seconds == (1.0,) * 16
    assert len(timing.in_turns(programs, 3)["slow"].seconds) == 3


@pytest.mark.parametrize(("platform", "calls"), [("cpu", 1), ("gpu", 8)])
def test_a_sample_of_a_short_program_has_several_calls_on_an_accelerator(platform, calls, monkeypatch):
    """By a clock on which a call takes 0.7 ms and a synchronization 0.3 ms: 8 calls are the first above 5 ms."""
    clock, prepared, waits = [0.0], [], []

    def advance(seconds):
        clock[0] += seconds

    def program():
        prepared.append(len(waits))
        return lambda: advance(0.7e-3)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.jax, "block_until_ready", lambda result: (waits.append(1), advance(0.3e-3)))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    timings = timing.in_turns({"short": program}, 3)["short"]
    assert timings.seconds == pytest.approx([0.7e-3 + 0.3e-3 / calls] * 3)
    first = {1: [1], 8: [1, 1, 2, 4, 8]}[calls]
    assert [prepared.count(wait) for wait in range(len(waits))] == [*first, calls, calls, calls]
