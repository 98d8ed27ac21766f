"""Calibration of the modeled times: known factors are found, and those that cannot be are marked."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from mot_jax.benchmark import calibration
from mot_jax.benchmark.calibration import COLUMNS, FACTOR_COLUMNS, Model, calibrate, fit, modeled, seconds_by_class
from mot_jax.cost.hardware import HARDWARE
from mot_jax.planning import hlo
from mot_jax.planning.program import read_program

FACTORS = {"products": 1.4, "elementwise": 1.1, "attention": 2.5, "collectives": 3.0}


def programs(count: int, noise: float = 0.0) -> tuple[list[dict[str, float]], list[float]]:
    """Programs of a microsecond to a second, of which each class takes a random part, and their times."""
    random = np.random.default_rng(0)
    sizes, parts = 10 ** random.uniform(-6, 0, count), random.dirichlet(np.ones(len(FACTORS)), count)
    modeled = [dict(zip(FACTORS, map(float, row), strict=True)) for row in sizes[:, None] * parts]
    times = [sum(FACTORS[name] * seconds for name, seconds in row.items()) for row in modeled]
    return modeled, [seconds * (1 + noise * random.standard_normal()) for seconds in times]


def test_known_factors_are_found():
    factors = fit(*programs(20))
    assert {name: factor.factor for name, factor in factors.items()} == pytest.approx(FACTORS, rel=0.02)
    assert all(factor.resolution > 0.98 and factor.share > 0.4 for factor in factors.values())
    noisy = fit(*programs(200, noise=0.05))
    assert {name: factor.factor for name, factor in noisy.items()} == pytest.approx(FACTORS, rel=0.1)


def test_a_single_class_has_the_ratio_of_its_times():
    """By hand: 4 / 2 and 8 / 4, whatever the other programs' sizes."""
    (factor,) = fit([{"products": 2.0}, {"products": 4e-6}], [4.0, 8e-6]).values()
    assert factor.factor == pytest.approx(2.0) and factor.share == 1.0


def test_a_class_that_the_measurements_do_not_determine_has_the_overall_ratio():
    """Two classes in the same proportion in every program, and one that takes a thousandth."""
    modeled = [{"products": s, "elementwise": s, "library": 2e-3 * s} for s in (1.0, 2.0, 3.0)]
    factors = fit(modeled, [3.0, 6.0, 9.0])
    assert [factor.factor for factor in factors.values()] == pytest.approx([1.5] * 3, rel=1e-2)
    assert factors["library"].resolution < 0.01 and factors["products"].resolution == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("launch", [12e-6, 0.0])
def test_the_time_of_a_launch_is_found(launch):
    """The programs take 2 µs to 3 s without it, so that it is most of the time of the shortest ones."""
    modeled, measured = programs(40)
    measured = [seconds + launch for seconds in measured]
    factors = fit(modeled, measured, launch=True)
    constant = factors.pop("launch")
    assert constant.factor == pytest.approx(launch, rel=0.02, abs=1e-7)
    assert {name: factor.factor for name, factor in factors.items()} == pytest.approx(FACTORS, rel=0.03)
    assert constant.share == pytest.approx(constant.factor / min(measured))
    assert not launch or constant.resolution > 0.98
    rows = [{"name": "", "modeled_s": m, "measured_s": t} for m, t in zip(modeled, measured, strict=True)]
    assert [row["calibrated_ratio"] for row in calibrate(rows, launch=True)[0]] == pytest.approx([1] * 40, abs=0.03)
    factor = dict(FACTOR_COLUMNS)["factor"]
    assert factor({"class": "launch", "factor": 12e-6}) == "12.0 µs"
    assert factor({"class": "products", "factor": 1.4}) == "1.40"


def test_rows_state_the_ratio_before_and_after():
    modeled, measured = programs(12)
    rows = [
        {"name": str(i), "modeled_s": m, "measured_s": t}
        for i, (m, t) in enumerate(zip(modeled, measured, strict=True))
    ]
    table, factors = calibrate([*rows, {"name": "empty", "modeled_s": {}, "measured_s": 1.0}])
    assert len(table) == 12 and set(factors) == set(FACTORS)
    for row, m, t in zip(table, modeled, measured, strict=True):
        assert row["ratio"] == pytest.approx(t / sum(m.values())) and row["calibrated_ratio"] == pytest.approx(
            1, abs=0.02
        )
    assert calibrate([]) == ([], {})


def test_a_program_without_a_model_is_marked_and_not_fitted():
    good = {"name": "good", "modeled_s": {"products": 1.0}, "measured_s": 2.0}
    compiled = SimpleNamespace(as_text=lambda: "ENTRY %main () -> f32[] {\n  ROOT %x = f32[] add(%y, %y)\n}\n")
    row = modeled(Model(), compiled, "float32")
    assert row == {"modeled_s": {}, "not_modeled": "UnknownTextError: KeyError: 'y'"}
    (first, second), factors = calibrate([{"name": "bad", "measured_s": 9.0} | row, good])
    assert first["name"] == "good" and first["ratio"] == 2 and second == {"name": "bad", "measured_s": 9.0} | row
    assert factors["products"].factor == pytest.approx(2)
    cells = [text_of(second) for _, text_of in COLUMNS]
    assert cells == ["bad", "-", "UnknownTextError: KeyError: 'y'", "9,000.000", "-", "-"]


def test_a_class_whose_factor_would_not_be_positive_has_the_overall_ratio():
    """The second program is faster than the first, which it contains. Overall: the median of 2 / 1 and 1 / 2."""
    factors = fit([{"products": 1.0}, {"products": 1.0, "elementwise": 1.0}], [2.0, 1.0])
    assert factors["elementwise"].factor == 1.25 and factors["elementwise"].resolution == 0
    assert factors["products"].factor > 0 and factors["products"].resolution > 0.99
    assert fit([{}], [1.0]) == {}


# --- classes of kernels -----------------------------------------------------------------------------------------------

# Two devices; a fusion with a product and one without, calls of cuBLAS, cuDNN and another library, an all-reduce, and a
# loop of three iterations that negates x.
TEXT = """
HloModule step, num_partitions=2

%product (p0: f32[1024,512], p1: f32[512,256]) -> f32[1024,256] {
  %p0 = f32[1024,512]{1,0} parameter(0)
  %p1 = f32[512,256]{1,0} parameter(1)
  ROOT %dot = f32[1024,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%negate (q: f32[1024,512]) -> f32[1024,512] {
  %q = f32[1024,512]{1,0} parameter(0)
  ROOT %neg = f32[1024,512]{1,0} negate(%q)
}

%body (state: (s32[], f32[1024,512])) -> (s32[], f32[1024,512]) {
  %state = (s32[], f32[1024,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %v = f32[1024,512]{1,0} get-tuple-element(%state), index=1
  %w = f32[1024,512]{1,0} fusion(%v), kind=kLoop, calls=%negate
  ROOT %next = (s32[], f32[1024,512]{1,0}) tuple(%i, %w)
}

%condition (state.1: (s32[], f32[1024,512])) -> pred[] {
  %state.1 = (s32[], f32[1024,512]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (x: f32[1024,512], y: f32[512,256], state.2: (s32[], f32[1024,512])) -> f32[1024,256] {
  %x = f32[1024,512]{1,0} parameter(0)
  %y = f32[512,256]{1,0} parameter(1)
  %state.2 = (s32[], f32[1024,512]{1,0}) parameter(2)
  %z = f32[1024,256]{1,0} fusion(%x, %y), kind=kOutput, calls=%product
  %n = f32[1024,512]{1,0} fusion(%x), kind=kLoop, calls=%negate
  %loop = (s32[], f32[1024,512]{1,0}) while(%state.2), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[1024,256]{1,0} custom-call(%n, %y), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %f = f32[1024,256]{1,0} custom-call(%g, %z), custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"intermediate_tensor_shape":{"dimensions":["1","1","16","16"]},"mask_type":"NO_MASK"}
  %s = f32[1024,256]{1,0} custom-call(%f), custom_call_target="other"
  ROOT %r = f32[1024,256]{1,0} all-reduce(%s), replica_groups={{0,1}}, to_apply=%sum
}
"""
X, Y, Z = 4 * 1024 * 512, 4 * 512 * 256, 4 * 1024 * 256  # bytes


def test_modeled_seconds_have_the_class_of_their_kernel():
    """By hand: each kernel takes the larger of FLOPs and bytes."""
    h100, program = HARDWARE["h100"], read_program(hlo.parse(TEXT), {"data": 2})
    devices, rate = [SimpleNamespace(coords=()) for _ in range(2)], h100.hbm_bandwidth
    expected = {
        "products": 2 * (X + Y + Z) / rate,  # of both: by their bytes
        "elementwise": 4 * 2 * X / rate + 2 * Z / rate,  # once, and in the loop; traffic of the all-reduce
        "attention": 3 * Z / rate,
        "library": 2 * Z / rate,
        "collectives": Z / h100.link_bandwidth,  # twice a half
    }
    fast = dataclasses.replace(h100, float32_peak=1e30)
    assert seconds_by_class(program, fast, 1e30, devices) == pytest.approx(expected)
    slow = dataclasses.replace(h100, float32_peak=1e12)
    by_flops = seconds_by_class(program, slow, 1e12, devices)
    assert by_flops["products"] == pytest.approx(2 * 2 * 1024 * 512 * 256 / 1e12)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_what_is_understood_of_a_program_and_its_devices_is_modeled(platform, monkeypatch):
    """The FLOPs of the call `other` are not known, nor is the network of GPUs that are not in `cost.hardware`."""
    monkeypatch.setattr(calibration, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(calibration, "matmul_peak", lambda dtype: 1e30)
    device = SimpleNamespace(platform=platform, device_kind="new", coords=(), process_index=0)
    monkeypatch.setattr(calibration.jax, "devices", lambda: [device] * 2)
    mesh = SimpleNamespace(devices=np.array([device] * 2), shape={"data": 2})

    def of(text):
        return modeled(Model(), SimpleNamespace(as_text=lambda: text), "float32", mesh)

    assert of(TEXT) == {"modeled_s": {}, "not_modeled": "not understood: FLOPs of the custom call other"}
    understood = TEXT.replace('="other"', '="__cub$DeviceRadixSort"')
    if platform == "cpu":
        assert of(understood)["modeled_s"]["collectives"] == pytest.approx(Z / 1e9)
    else:
        assert of(understood) == {"modeled_s": {}, "not_modeled": "the network of these devices is not known"}
    alone = understood.replace("all-reduce(%s), replica_groups={{0,1}}, to_apply=%sum", "negate(%s)")
    assert of(alone)["modeled_s"]["products"] == pytest.approx(2 * (X + Y + Z) / 1e9)
