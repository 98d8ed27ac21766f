"""`mot bench layers`: costs, timings, and void ratios."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mot_jax import cli
from mot_jax.benchmark import layers, timing
from mot_jax.benchmark.layers import COUNT_COLUMNS, bench_layers, plot
from mot_jax.benchmark.timing import Program, Timings
from mot_jax.config import CompanionsConfig, MixingConfig, MixtureOfTokensConfig, ModelConfig, ThresholdConfig
from mot_jax.cost.flops import forward_flops
from mot_jax.cost.layers import SHAPES, count_rows, layer_parts, paper_shapes, product_by_product
from mot_jax.errors import UserError
from mot_jax.nn.feed_forward import KINDS, MixtureOfTokens
from mot_jax.planning import hlo
from mot_jax.planning.hlo import UnknownTextError

TINY = SHAPES["tiny"]


@pytest.mark.parametrize("kind", TINY.kinds())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=lambda shape: shape.name)
def test_flops_equal_those_of_the_model(shape, kind):
    kind_config = shape.kinds()[kind]
    model = ModelConfig(1, shape.d_model, shape.d_ff, 1, context_length=shape.length, feed_forward=kind_config)
    model_flops = {n: f for n, f in forward_flops(model).items() if "attention" not in n and n != "head"}
    expected = shape.tokens * sum(model_flops.values())
    assert layer_parts(shape, kind)[-1].flops == (expected, 2 * expected)
    if kind != "dense":
        assert sum(part.flops[0] for part in layer_parts(shape, kind)[:-1]) == expected


def test_every_kind_that_trains_is_timed():
    assert {type(config) for config in TINY.kinds().values()} == set(KINDS) - {CompanionsConfig, ThresholdConfig}
    for shape in SHAPES.values():
        kinds = shape.kinds()
        assert kinds["mixture_of_tokens"].hidden_dim(shape.d_ff) == kinds["token_choice"].hidden_dim(shape.d_ff)


def test_bytes_of_a_dense_layer_by_hand():
    """x, y: T D; both kernels: D F; saved pre-activations: T F. Backward: x, dy, kernels, saved; dx, gradients."""
    t, d, f = 256, 32, 64
    (part,) = layer_parts(TINY, "dense", "bfloat16", "float32")
    assert part.bytes == (2 * 2 * t * d + 4 * 2 * d * f, 3 * 2 * t * d + 4 * 2 * 2 * d * f + 2 * t * f)
    assert part.saved == 2 * t * f
    assert part.of("forward") == (4 * t * d * f, part.bytes[0])
    assert part.of("forward_backward") == (12 * t * d * f, sum(part.bytes) + part.saved)
    assert part.floor(1e30, 1.0) == sum(part.bytes) + part.saved and part.floor(1.0, 1e30) == 12 * t * d * f


@pytest.mark.parametrize("kind", ["mixture_of_tokens", "token_choice"])
def test_a_layer_at_once_moves_less_than_its_parts(kind):
    for shape in SHAPES.values():
        *parts, whole = layer_parts(shape, kind)
        assert whole.training_bytes < sum(part.training_bytes for part in parts)
        assert whole.training_bytes > layer_parts(shape, "dense")[0].training_bytes


def test_bytes_of_the_mixture_at_once_by_hand():
    """More than dense: the controller, G times the experts' parameters, the mixing weights saved in float32."""
    t, d, e, g, params = 256, 32, 8, 4, 2 * 32 * 64
    *_, whole = layer_parts(TINY, "mixture_of_tokens", "float32", "float32")
    (dense,) = layer_parts(TINY, "dense", "float32", "float32")
    extra = 4 * ((g - 1) * params + d * e)
    assert whole.bytes == (dense.bytes[0] + extra, dense.bytes[1] + 2 * extra + 4 * t * e)
    assert whole.saved == dense.saved + 4 * t * e


@pytest.mark.parametrize(
    ("shape", "gigabytes"),
    [
        ("base_32e", (3.48, 6.95, 7.66)),
        ("medium_32e_8", (2.31, 10.67, 12.08)),
        ("v1", (1.15, 9.66, 10.91)),
        ("d2048", (4.97, 19.65, 20.59)),
    ],
)
def test_bytes_of_a_layer_product_by_product_by_hand(shape, gigabytes):
    """Six products of each network, and nine of the mixing: counted on paper, as multiples of a few arrays."""
    s, g = SHAPES[shape], SHAPES[shape].group_size
    a, h = 2 * s.tokens * s.d_model, 2 * s.tokens * s.d_ff
    u, logits = a * s.num_experts / g, 4 * s.tokens * s.num_experts
    weights = 4 * 2 * g * s.d_model * s.d_ff
    (dense,) = product_by_product(s, "dense")
    saved, pre_activations = product_by_product(s, "mixture_of_tokens")
    assert dense.training_bytes == 6 * a + 7 * h + 3 * weights / g
    assert saved.training_bytes == 10 * a + 12 * u + 7 * h + 13 * logits + 3 * weights
    assert pre_activations.training_bytes - saved.training_bytes == a + 2 * u + h
    for bound, expected in zip((dense, saved, pre_activations), gigabytes, strict=True):
        assert bound.training_bytes / 1e9 == pytest.approx(expected, abs=0.006)
        assert bound.floor(1e30, 1.0) == pytest.approx(bound.training_bytes)
        assert bound.floor(1.0, 1e30) == pytest.approx(sum(bound.flops))
    assert dense.flops == layer_parts(s, "dense")[-1].flops
    assert saved.flops == layer_parts(s, "mixture_of_tokens")[-1].flops


def test_the_floor_product_by_product_takes_the_larger_of_flops_and_bytes_of_each_product():
    """At a peak where one FLOP takes as long as a byte; forward: input and output projection."""
    t, d, f = 256, 32, 64
    (bound,) = product_by_product(TINY, "dense")
    moved = 2 * t * d + 2 * t * f + 4 * d * f  # by each of the two products
    assert bound.bytes[0] == 2 * moved
    assert bound.floor(1.0, 1.0, "forward") == 2 * max(moved, 2 * t * d * f)
    assert bound.floor(100.0, 1.0, "forward") == 2 * max(moved, 2 * t * d * f / 100)
    assert not product_by_product(TINY, "token_choice")


def test_counts_are_printed_without_executing_anything(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(layers, "bench_layers", None)
    output = tmp_path / "counts.json"
    cli.main(["bench", "layers", "--counts", "--shapes", "base_32e,v1", "--json", str(output)])
    table = capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert {(row["shape"], row["kind"]) for row in rows} == {(s, k) for s in ("base_32e", "v1") for k in TINY.kinds()}
    assert table.count("\n| ") == 1 + len(rows) and "ms H100" in table and "ms v5p" in table
    dense = next(row for row in rows if (row["shape"], row["kind"]) == ("base_32e", "dense"))
    assert dense["floors"]["H100"] == pytest.approx(12 * 65_536 * 768 * 3072 / 989e12)


def test_the_table_of_the_docs_matches_the_counts():
    """The rows of dense and mixture of `mot bench layers --counts`, and the titles of its columns."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text().splitlines()
    kinds = ("dense", "mixture_of_tokens")
    rows = [row for row in count_rows(paper_shapes(on_cpu=False), "bfloat16") if row["kind"] in kinds]
    for row in rows:
        assert "| " + " | ".join(text_of(row) for _, text_of in COUNT_COLUMNS) + " |" in page
    assert "| " + " | ".join(title for title, _ in COUNT_COLUMNS) + " |" in page


def test_copies_are_counted_once_for_each_fusion():
    def copies(function, *shapes):
        arguments = (jax.ShapeDtypeStruct(s, "float32") for s in shapes)
        return hlo.count_copies(hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()))

    assert copies(lambda x, y: x @ y, (64, 64), (64, 64)) == 0
    assert copies(lambda x: x.T + 0.0, (64, 128)) == 1
    assert copies(lambda x: x.T + 0.0, (2, 4)) == 0  # too small to matter


def test_a_program_returns_its_results_in_donated_buffers():
    program = Program(lambda x: (x + 1, 2 * x), jnp.arange(2.0))
    for _ in range(3):
        one, two = program()()
        assert one.tolist() == [1, 2] and two.tolist() == [0, 2]
    assert program.seconds_to_compile > 0 and program.copies == 0


def test_a_program_whose_text_is_not_understood_is_timed(monkeypatch):
    def fails(*_):
        raise UnknownTextError("a new opcode")

    monkeypatch.setattr(timing, "read_program", fails)
    program = Program(lambda x: x + 1, jnp.arange(2.0))
    assert (program.copies, program.bytes, program.not_read) == (None, None, "a new opcode")
    assert program()().tolist() == [1, 2]


def test_programs_share_the_buffers_of_their_results():
    """A large and a small result, and the same large one: memory for one of each size."""
    buffers = {}
    sums = Program(lambda x: (x + 1, x.sum()), jnp.arange(2.0), buffers=buffers)
    doubles = Program(lambda x: 2 * x, jnp.arange(2.0), buffers=buffers)
    for _ in range(2):
        (one, total), two = [array.tolist() for array in sums()()], doubles()().tolist()
        assert (one, total, two) == ([1, 2], 1, [0, 2])
    assert sorted((shape, len(arrays)) for (shape, _), arrays in buffers.items()) == [((), 1), ((2,), 1)]


@pytest.mark.parametrize("where", [pytest.param("created", marks=pytest.mark.slow), "run"])
def test_a_program_that_does_not_fit_has_a_row_with_the_reason(where, monkeypatch):
    """The others have their times. Of results of a failed execution none is used again."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # programs share their buffers
    messages = {"dense_flat": "RESOURCE_EXHAUSTED: Out of memory\n1 GiB", "mixture_of_tokens": "INTERNAL: no algorithm"}

    class FailingProgram(Program):
        def __init__(self, function, variables, *rest, **options):
            super().__init__(function, variables, *rest, **options)
            flat = isinstance(variables, tuple) and isinstance(variables[0], list)
            name = "dense_flat" if flat else "mixture_of_tokens" if "controller" in str(variables) else "others"
            self.message = messages.get(name)
            if where == "created":
                self.fail()

        def fail(self):
            if self.message:
                raise jax.errors.JaxRuntimeError(self.message)

        def _execute(self):
            results = super()._execute()
            if self.message:  # as after a failure on the device
                jax.tree.map(lambda array: array.delete(), results)
            self.fail()
            return results

    monkeypatch.setattr(layers, "Program", FailingProgram)
    shape = dataclasses.replace(TINY, sequences=4, length=8)
    rows, _ = bench_layers(
        [shape], ["mixture_of_tokens"], "float32", 3, lambda line: None, directions=["forward_backward"]
    )
    *timed, first, second = rows
    assert [row["kind"] for row in timed] == [*layers.PRODUCTS, "dense"] and timed[-1]["ratio_to_dense"] == 1
    absent = {row["kind"]: row for row in (first, second)}
    about = {"shape": "tiny", "direction": "forward_backward"}
    assert absent["dense_flat"] == about | {"kind": "dense_flat", "reason": "RESOURCE_EXHAUSTED: Out of memory"}
    assert absent["mixture_of_tokens"] == about | {
        "kind": "mixture_of_tokens",
        "reason": "INTERNAL: no algorithm",
        "ok": False,
    }
    table = [[text_of(row) for _, text_of in layers.COLUMNS] for row in rows]
    assert any("dense_flat (RESOURCE_EXHAUSTED: Out of memory)" in cells and "-" in cells for cells in table)
    assert plot(rows).startswith(b"\x89PNG")


def test_without_a_dense_layer_no_program_has_a_ratio(monkeypatch):
    class FailingProgram(Program):
        def __init__(self, function, *arguments, **options):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(layers, "Program", FailingProgram)
    rows, _ = bench_layers([TINY], ["mixture_of_tokens"], "float32", 3, lambda line: None, directions=["forward"])
    assert {row["kind"] for row in rows} == {*layers.PRODUCTS, "dense", "mixture_of_tokens", "dense_flat"}
    assert all("Out of memory" in row["reason"] for row in rows)
    monkeypatch.setattr(layers, "Program", Program)
    monkeypatch.setattr(layers, "BASELINES", ())
    rows, _ = bench_layers([TINY], ["mixture_of_tokens"], "float32", 3, lambda line: None, directions=["forward"])
    assert all(row["reason"] == "no dense layer to compare with" for row in rows) and len(rows) == 5


def test_a_layer_is_timed_with_the_router_state_of_a_training_step():
    """Thresholds are such that as many experts process a token as top_k; before any step, about half of all do."""
    shape = dataclasses.replace(TINY, d_model=64, sequences=32, length=32)
    x = jax.random.normal(jax.random.key(0), (shape.sequences, shape.length, shape.d_model))
    layer = layers.layer_function(shape, "expert_threshold", "float32")
    router, metrics = layer.after_a_step(layer.variables, x)
    assert metrics["experts_per_token"] == pytest.approx(shape.kinds()["expert_threshold"].top_k, rel=0.05)
    assert metrics["dropped"] < 0.3
    params, initial = layer.variables
    assert jnp.any(layer.forward((params, router), x) != layer.forward((params, initial), x))
    rows, _ = bench_layers([shape], ["expert_threshold"], "float32", 2, lambda line: None, directions=["forward"])
    (row,) = (row for row in rows if row["kind"] == "expert_threshold")
    assert row["experts_per_token"] == pytest.approx(float(metrics["experts_per_token"]), rel=0.05)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("direction", layers.DIRECTIONS)
def test_products_of_the_experts_have_the_flops_of_those_of_the_dense_layer(direction, gated):
    """Counted by the compiler. Expert e multiplies its own weights."""
    shape = dataclasses.replace(TINY, gated=gated)
    programs = [layers._matrix_products(shape, "float32", direction, of_experts) for of_experts in (False, True)]
    flops = [jax.jit(f).lower(*arrays).compile().cost_analysis()["flops"] for f, *arrays in programs]
    products = (3 if gated else 2) * (1 if direction == "forward" else 3)
    assert flops == [products * 2 * TINY.tokens * TINY.d_model * TINY.d_ff] * 2
    function, *arrays = programs[1]
    assert {array.shape[0] for array in arrays} == {TINY.num_experts}
    each = [function(*(array[e] for array in arrays)) for e in range(TINY.num_experts)]
    for result, of_expert in zip(function(*arrays), zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(result, np.stack(of_expert), rtol=1e-4, atol=1e-4)


def rows_at(dense_ms: float) -> list[dict]:
    """Rows of timings in which the products take 1 ms."""
    program = Program(lambda x: x, jnp.zeros(1))
    names = (*layers.PRODUCTS, "dense", "dense_flat", "mixture_of_tokens")
    seconds = dict(zip(names, (1.0, 1.5, 2 * dense_ms, dense_ms, 3.0), strict=True))
    timings = {name: Timings((1e-3 * s,) * 3) for name, s in seconds.items()}
    return layers._timing_rows(TINY, "forward", "float32", "float32", dict.fromkeys(names, program), timings, 1e9)


def test_ratios_are_over_the_faster_dense_layer_and_void_where_its_rate_is_low_or_impossible():
    good, bad = rows_at(1 / 0.86), rows_at(1 / 0.84)
    for rows, void in ((good, False), (rows_at(1 / 1.09), False), (bad, True), (rows_at(1 / 1.11), True)):
        assert [row["void"] for row in rows] == [void] * 5
    assert good[-1]["ratio_to_dense"] == pytest.approx(3 * 0.86)
    assert good[3]["peak_share"] == good[0]["dense_share"] == pytest.approx(0.86)
    ratio = dict(layers.COLUMNS)["ratio to dense"]
    assert ratio(good[-1]) == "2.58" and ratio(bad[-1]) == "2.52 void"


def test_one_row_for_each_shape_direction_and_kind():
    shape = dataclasses.replace(TINY, sequences=4, length=8)
    rows, rate = bench_layers([shape], ["mixture_of_tokens"], "float32", 3, lambda line: None)
    kinds = [*layers.PRODUCTS, "dense", "mixture_of_tokens", "dense_flat"]
    assert [(row["direction"], row["kind"]) for row in rows] == [(d, k) for d in layers.DIRECTIONS for k in kinds]
    for row in rows:
        assert row["median_s"] > 0 and row["bound_s"] == row["bytes"] / rate and row["floor_s"] >= row["bound_s"] * 0.99
    assert plot(rows).startswith(b"\x89PNG")


def test_forward_backward_is_the_gradient():
    forward, variables, _ = layers.layer_function(TINY, "mixture_of_tokens", "float32")
    x = jax.random.normal(jax.random.key(0), (4, 2, 32))

    def loss(variables, x):
        y = forward(variables, x)
        return y.sum(), y

    results = jax.jit(layers.forward_and_backward(forward))(variables, x, jnp.ones_like(x))
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)
    for a, b in zip(jax.tree.leaves(results), jax.tree.leaves((y, *gradients)), strict=True):
        assert a.shape == b.shape and jnp.allclose(a, b, rtol=1e-4, atol=1e-5) and jnp.any(a)


def test_unknown_names_are_refused(capsys):
    for flags, message in ((["--shapes", "v2"], "did you mean 'v1'"), (["--kinds", "denser"], "did you mean 'dense'")):
        with pytest.raises(SystemExit):
            cli.main(["bench", "layers", "--routing", "random", *flags])
        assert message in capsys.readouterr().err
    with pytest.raises(UserError):
        layers.select_implementations([TINY], ["companions"])
    with pytest.raises(
        UserError, match=r"--kinds = mixture_of_tokens:fused_mixture: needs a TPU v5e, v5p or later; try --topology"
    ):
        layers.select_implementations([TINY], ["mixture_of_tokens:fused_mixture"])


def replace_device(monkeypatch, platform: str, kind: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, device_kind=kind)])


def test_further_implementations_are_timed_on_devices_that_support_them(monkeypatch):
    kinds = list(TINY.kinds())
    assert layers.select_implementations([TINY], None) == kinds
    assert set(layers.select_implementations([TINY], None, peers=True)) == {*kinds, "token_choice:dropless"}
    kernels = ["all_saved", "fused_mixture", "fused_experts"]
    for *device, others in (("gpu", "H100", kernels[:1]), ("tpu", "TPU v4", kernels[:1]), ("tpu", "TPU v5", kernels)):
        replace_device(monkeypatch, *device)
        names = [*(f"mixture_of_tokens:{name}" for name in others)]
        names += [f"token_choice:{name}" for name in ("dropless", "capacity_1")]
        assert layers.select_implementations([TINY], None) == kinds + names


@pytest.mark.slow
def test_a_kernel_that_does_not_support_a_shape_is_skipped(monkeypatch):
    """On a simulated TPU, with interpreted kernels."""
    replace_device(monkeypatch, "tpu", "TPU v5")
    lines, shape = [], dataclasses.replace(TINY, num_experts=4)  # not a multiple of 8
    kinds = ["mixture_of_tokens:fused_mixture", "mixture_of_tokens:fused_experts"]
    rows, _ = bench_layers([shape], kinds, "float32", 3, lines.append, directions=["forward_backward"])
    assert [row["kind"] for row in rows] == [*layers.PRODUCTS, "dense", kinds[1], "dense_flat"]
    assert any("requires a multiple of 8 experts" in line for line in lines)


def test_default_shapes_of_a_cpu_and_of_accelerators():
    assert [shape.name for shape in paper_shapes(on_cpu=True)] == ["cpu_e32", "cpu_e128"]
    assert [shape.name for shape in paper_shapes(on_cpu=False)] == ["d2048", "base_32e", "medium_32e_8", "v1"]


@pytest.mark.slow
def test_the_command_writes_json_picture_and_trace(tmp_path, capsys):
    files = {name: tmp_path / name for name in ("a.json", "a.png", "trace")}
    flags = ["--json", str(files["a.json"]), "--plot", str(files["a.png"]), "--profile", str(files["trace"])]
    cli.main(["bench", "layers", "--routing", "random", "--shapes", "tiny", "--rounds", "3", *flags])
    rows = json.loads(files["a.json"].read_text())["rows"]
    assert {row["kind"] for row in rows} == {*layers.PRODUCTS, "dense_flat", *TINY.kinds()}
    assert {"kind", "shape", "direction", "median_s", "ratio_to_dense", "peak_share"} <= rows[0].keys()
    assert capsys.readouterr().out.count("\n| tiny") == len(rows) == 2 * (3 + len(TINY.kinds()))
    assert files["a.png"].stat().st_size > 1000 and list(files["trace"].rglob("*.xplane.pb"))


def test_a_layer_that_depends_on_the_step_is_timed_as_late_in_training():
    mixing = MixingConfig(annealing="linear", final_temperature=0.5, annealing_steps=(0, 9))
    layer = MixtureOfTokens(16, 32, MixtureOfTokensConfig(4, 8, mixing=mixing), rngs=nnx.Rngs(0))
    forward, variables, _ = layers.as_function(layer)
    x = jax.random.normal(jax.random.key(0), (4, 3, 16))
    np.testing.assert_array_equal(forward(variables, x), layer(x).y)
