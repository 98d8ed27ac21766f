"""Fused attention: splash attention, interpreted, equals XLA's; the arguments of cuDNN's; the choice of a kernel."""

import dataclasses
import importlib.util
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mot_jax.config import Config, DenseConfig, ModelConfig, TrainingConfig, check, identity_changes
from mot_jax.cost import memory
from mot_jax.cost.flops import recomputed_flops
from mot_jax.errors import UserError
from mot_jax.nn.attention import Attention
from mot_jax.nn.kernels import fused_attention
from mot_jax.nn.sharding import make_mesh, parameter_spec, reshard

B, S, D, H = 4, 256, 32, 4
KEY = jax.random.key(0, impl="rbg")
RANDOM = np.random.default_rng(0)
X, DY = RANDOM.normal(size=(2, B, S, D)).astype("float32")
SEGMENTS = np.sort(RANDOM.integers(0, 5, size=(B, S)), axis=1).astype("int32")
# Padding between tokens, padding on the left, padding only, and none.
MASK = np.stack([RANDOM.random(S) < 0.6, np.arange(S) >= 100, np.zeros(S, bool), np.ones(S, bool)])

CHOICES = {
    "paper": {},
    "masked": {"objective": "masked"},
    "all": {"num_kv_heads": 2, "positions": "rotary", "document_mask": True, "attention_bias": True},
}


@pytest.fixture
def on_tpu(monkeypatch):
    """Act as if on a TPU: `auto` and `splash` choose splash attention, which is interpreted."""
    monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
    monkeypatch.setattr(fused_attention, "splash", partial(fused_attention.splash, interpret=True))
    monkeypatch.setattr(fused_attention, "BLOCK", 128)  # so that there are several blocks


def layer_of(kernel: str, **choices) -> Attention:
    config = ModelConfig(d_model=D, num_heads=H, context_length=S, attention_kernel=kernel, **choices)
    return Attention(config, rngs=nnx.Rngs(params=KEY))


def outputs_and_gradients(layer: Attention, mask: np.ndarray | None, place=None):
    """Outputs of non-padding tokens, and the gradients of their weighted sum by the parameters and x."""
    graph, state = nnx.split(layer)
    x, weights, valid = (jnp.asarray(a) for a in (X, DY, np.ones((B, S), bool) if mask is None else mask))
    if place is not None:
        state = place(state)

    def loss(state: nnx.State, x: jax.Array):
        y = nnx.merge(graph, state)(reshard(x, "sequences", "positions", None), mask, SEGMENTS)
        y = jnp.where(reshard(valid[..., None], "sequences", "positions", None), y, 0)
        return (y * reshard(weights, "sequences", "positions", None)).sum(), y

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)


def assert_close(actual, expected):
    def close(a, b):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(b).max())))

    jax.tree.map(close, actual, expected)


CASES = [("all", True), *(pytest.param(c, m, marks=pytest.mark.slow) for c, m in [("paper", 0), ("masked", 1)])]


@pytest.mark.parametrize("case, masked", CASES)
def test_splash_equals_xla(case, masked, on_tpu):
    """Also for a sequence with padding only; gradients are finite everywhere."""
    mask = MASK if masked else None
    assert_close(*(outputs_and_gradients(layer_of(kernel, **CHOICES[case]), mask) for kernel in ("splash", "xla")))


def test_splash_does_not_depend_on_later_positions_other_documents_or_padding(monkeypatch):
    """Outputs have the same bits, and do change where they may depend on the changed tokens."""
    monkeypatch.setattr(fused_attention, "BLOCK", 128)  # so that there are several blocks
    run = jax.jit(partial(fused_attention.splash, causal=True, interpret=True))
    arrays = [jnp.asarray(a) for a in RANDOM.normal(size=(3, B, S, H, D // H)).astype("float32")]
    ids = fused_attention.attention_ids(MASK, SEGMENTS)
    expected = run(*arrays, ids)

    def run_with_changed_tokens(where: np.ndarray) -> jax.Array:
        changed = [jnp.where(where[..., None, None], 100 * RANDOM.normal(size=a.shape), a) for a in arrays]
        return run(*(a.astype("float32") for a in changed), ids)

    for last in (1, 100, 128, 200):
        later = np.broadcast_to(np.arange(S) >= last, (B, S))
        outputs = run_with_changed_tokens(later)
        np.testing.assert_array_equal(outputs[~later], expected[~later])
        assert (outputs[later] != expected[later]).any()
    for hidden in (~MASK, SEGMENTS == 2):
        outputs = run_with_changed_tokens(hidden)
        np.testing.assert_array_equal(outputs[~hidden & MASK], expected[~hidden & MASK])


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOICES)
def test_splash_on_a_mesh_equals_xla_on_one_device(case, mesh_of, on_tpu):
    def place(state: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(state)
        sharded = [(p, v.replace(jax.device_put(v[...], parameter_spec(p[-1], v.ndim)))) for p, v in flat]
        return nnx.from_flat_state(sharded)

    expected = outputs_and_gradients(layer_of("xla", **CHOICES[case]), MASK)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        actual = outputs_and_gradients(layer_of("splash", **CHOICES[case]), MASK, place)
    assert_close(actual, expected)


def test_tokens_share_an_attention_id_if_they_may_attend_to_each_other():
    assert fused_attention.attention_ids(None, None) is None
    assert fused_attention.attention_ids(None, SEGMENTS) is SEGMENTS
    both = np.asarray(fused_attention.attention_ids(MASK, SEGMENTS))
    same = both[:, :, None] == both[:, None, :]
    pairs = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & MASK[:, None, :]
    np.testing.assert_array_equal(same[MASK], pairs[MASK])
    assert same[:, np.arange(S), np.arange(S)].all()  # no row of scores is empty


BIG = ModelConfig(d_model=128, num_heads=2, context_length=2048, dtype="bfloat16", attention_kernel="auto")


@pytest.mark.parametrize(
    "platform, length, fields, kernel",
    [
        ("tpu", 2048, {}, "splash"),
        ("tpu", 2000, {}, "xla"),  # not a multiple of 128
        ("tpu", 256, {}, "xla"),  # too short for `auto`
        ("tpu", 256, {"attention_kernel": "splash"}, "splash"),
        ("tpu", 2048, {"attention_kernel": "xla"}, "xla"),
        ("gpu", 256, {}, "cudnn"),
        ("gpu", 255, {}, "xla"),
        ("gpu", 256, {"dtype": "float32"}, "xla"),
        ("gpu", 256, {"d_model": 264}, "xla"),
        ("cpu", 2048, {}, "xla"),
        ("cpu", 2048, {"attention_kernel": "splash"}, "xla"),  # trained on another platform
        ("cpu", 2048, {"attention_kernel": "cudnn"}, "xla"),
    ],
)
def test_unsupported_cases_fall_back_to_xla(platform, length, fields, kernel, monkeypatch):
    monkeypatch.setattr(fused_attention, "platform", lambda: platform)
    assert fused_attention.choose_kernel(dataclasses.replace(BIG, **fields), length) == kernel


@pytest.mark.parametrize("capability, name", [("9.0", "gpu"), ("8.0", "gpu"), ("7.5", "cpu"), ("gfx942", "cpu")])
def test_only_recent_nvidia_gpus_count_as_gpus(capability, name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert fused_attention.platform() == name


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention_kernel": "splash", "context_length": 192}, "multiple of 128 positions, and context_length = 192"),
        ({"attention_kernel": "cudnn"}, "computes in bfloat16, and dtype = 'float32'"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "d_model": 264, "num_heads": 1}, "num_heads = 264"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "context_length": 255, "loss_chunk": 51}, "even number"),
    ],
)
def test_a_config_that_a_kernel_does_not_support_is_refused(fields, message):
    model = dataclasses.replace(Config().model, **fields)
    with pytest.raises(UserError, match=rf"model.attention_kernel = '\w+': .*{message}.*; try 'auto'"):
        check(dataclasses.replace(Config(), model=model))
    check(dataclasses.replace(Config(), model=dataclasses.replace(model, attention_kernel="auto")))


@pytest.mark.parametrize("default", ["cpu", jax.devices("cpu")[0]], ids=["name", "device"])
def test_the_default_device_of_jax_selects_the_kernel(default, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert fused_attention.platform() == "tpu"
    with jax.default_device(default):
        assert fused_attention.platform() == "cpu"


@pytest.mark.parametrize("kernel, platform", [("splash", "tpu"), ("cudnn", "gpu")])
def test_training_on_another_platform_is_refused(kernel, platform):
    model = dataclasses.replace(Config().model, attention_kernel=kernel, dtype="bfloat16")
    config = Config(model=model, training=TrainingConfig(batch_size=32))
    with pytest.raises(UserError, match=f"kernel = '{kernel}': is for devices of platform {platform}, not cpu; try"):
        make_mesh(config, jax.devices()[:1])
    assert make_mesh(config, jax.devices()[:1], trains=False)


def test_a_run_may_resume_with_another_kernel():
    assert Config().model.attention_kernel == "auto"
    first = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, attention_kernel="xla"))
    other = dataclasses.replace(Config().model, attention_kernel="auto")
    assert not identity_changes(first, dataclasses.replace(first, model=other))


def test_accounting_equals_the_residuals_of_splash(monkeypatch):
    """The cost model counts the residuals that JAX saves: not the scores, which the kernels recompute."""
    plain = ModelConfig(d_model=D, num_heads=H, context_length=S, feed_forward=DenseConfig())
    splash = dataclasses.replace(plain, attention_kernel="splash")
    counted = memory.saved_bytes(splash, B)["attention"] // splash.num_blocks
    assert memory.saved_bytes(plain, B)["attention"] // plain.num_blocks - counted > B * H * S * S * 4 * 0.9
    difference = recomputed_flops(splash) - recomputed_flops(plain)
    assert difference == splash.num_blocks * 3 * 2 * S * D  # scores, and their gradient, in two kernels
    monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
    traced, _ = memory._trace_saved(splash, DenseConfig(), "attention", B)
    assert traced == counted


def test_cudnn_is_called_with_the_local_shapes(monkeypatch, mesh_of):
    """Lowered for CUDA, forward and backward, with a mask for one head; each device has its own sequences and heads."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((B, S, H, 64), "bfloat16")
    kv = jax.ShapeDtypeStruct((B, S, 2, 64), "bfloat16")

    def forward_and_backward(q, k, v, ids, dy):
        y, pull = jax.vjp(lambda *a: fused_attention.cudnn(*a, ids, causal=True), q, k, v)
        return y, pull(dy)

    def lowered_text(*args) -> str:
        return jax.jit(forward_and_backward).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    def assert_local_shapes(text: str, batch: int, heads: int) -> None:
        assert text.count("custom_call @__cudnn$fmha") == 2
        assert f"tensor<{batch}x1x{S}x{S}xbf16>" in text and f"tensor<{batch}x{S}x{heads}x64xbf16>" in text

    ids = jax.ShapeDtypeStruct((B, S), "int32")
    assert_local_shapes(lowered_text(q, kv, kv, ids, q), B, H)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        assert_local_shapes(lowered_text(q, kv, kv, ids, q), B // 2, H // 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    "batch, segments, causal", [(2, True, True), (2, False, True), (1, True, True), (1, True, False)]
)
@pytest.mark.parametrize("length, width, dtype", [(256, 64, "bfloat16"), (2048, 64, "bfloat16"), (256, 16, "float32")])
def test_splash_compiles_for_a_v5p(length, width, dtype, batch, segments, causal):
    """A plan has the FLOPs of 9 products (2 forward) for blocks of 512 that are not above the diagonal."""
    from mot_jax.cost.hardware import parse_topology
    from mot_jax.planning import hlo
    from mot_jax.planning.plan import devices_of
    from mot_jax.planning.program import read_program

    chip = SingleDeviceSharding(devices_of(parse_topology("v5p:2x2x1"))[0])
    q, kv = (jax.ShapeDtypeStruct((batch, length, h, width), dtype, sharding=chip) for h in (4, 2))
    ids = jax.ShapeDtypeStruct((batch, length), "int32", sharding=chip) if segments else None

    def forward_and_backward(q, k, v, ids, dy):
        y, pull = jax.vjp(lambda *a: fused_attention.splash(*a, ids, causal=causal), q, k, v)
        return y, pull(dy)

    text = jax.jit(forward_and_backward, out_shardings=chip).lower(q, kv, kv, ids, q).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert f"{length},{length}]" not in text
    program = read_program(hlo.parse(text), {})
    visited = {(256, True): 256**2, (2048, True): 10 * 512**2}.get((length, causal), length**2)
    assert program.unknown == () and program.hbm_bytes > 0
    assert program.flops == 9 * 2 * (batch * 4) * visited * width
    kernels = [kernel for body in program.bodies for kernel in body.kernels if kernel.flops]
    assert [(kernel.kind, kernel.dtype) for kernel in kernels] == 3 * [
        ("splash attention", {"bfloat16": "bf16"}.get(dtype, "f32"))
    ]
