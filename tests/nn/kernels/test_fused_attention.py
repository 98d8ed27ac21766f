"""Fused attention against XLA's: splash interpreted, in values and gradients; what cuDNN is given; who is chosen."""

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
# Holes, padding to the left, no real token at all, and all of them.
MASK = np.stack([RANDOM.random(S) < 0.6, np.arange(S) >= 100, np.zeros(S, bool), np.ones(S, bool)])

CHOICES = {
    "paper": {},
    "masked": {"objective": "masked"},
    "all": {"num_kv_heads": 2, "positions": "rotary", "document_mask": True, "attention_bias": True},
}


@pytest.fixture
def on_tpu(monkeypatch):
    """As if this were one: `auto` and `splash` are chosen, and interpreted."""
    monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
    monkeypatch.setattr(fused_attention, "splash", partial(fused_attention.splash, interpret=True))
    monkeypatch.setattr(fused_attention, "BLOCK", 128)  # several


def layer_of(kernel: str, **choices) -> Attention:
    config = ModelConfig(d_model=D, num_heads=H, context_length=S, attention_kernel=kernel, **choices)
    return Attention(config, rngs=nnx.Rngs(params=KEY))


def results(layer: Attention, mask: np.ndarray | None, place=None):
    """Outputs of real tokens, and the gradients by parameters and x of what they are weighed by."""
    graph, state = nnx.split(layer)
    x, weights, real = (jnp.asarray(a) for a in (X, DY, np.ones((B, S), bool) if mask is None else mask))
    if place is not None:
        state = place(state)

    def loss(state: nnx.State, x: jax.Array):
        y = nnx.merge(graph, state)(reshard(x, "rows", "positions", None), mask, SEGMENTS)
        y = jnp.where(reshard(real[..., None], "rows", "positions", None), y, 0)
        return (y * reshard(weights, "rows", "positions", None)).sum(), y

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)


def assert_close(found, expected):
    def close(a, b):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(b).max())))

    jax.tree.map(close, found, expected)


CASES = [("all", True), *(pytest.param(c, m, marks=pytest.mark.slow) for c, m in [("paper", 0), ("masked", 1)])]


@pytest.mark.parametrize("case, masked", CASES)
def test_splash_is_what_xla_computes(case, masked, on_tpu):
    """Rows without a real token among them; gradients are finite everywhere."""
    mask = MASK if masked else None
    assert_close(*(results(layer_of(kernel, **CHOICES[case]), mask) for kernel in ("splash", "xla")))


def test_splash_shows_no_later_position_no_other_document_and_no_padding(monkeypatch):
    """Whatever they are, outputs are the same to the last bit; what is changed does show where it may."""
    monkeypatch.setattr(fused_attention, "BLOCK", 128)  # several
    run = jax.jit(partial(fused_attention.splash, causal=True, interpret=True))
    arrays = [jnp.asarray(a) for a in RANDOM.normal(size=(3, B, S, H, D // H)).astype("float32")]
    documents = fused_attention.documents_of(MASK, SEGMENTS)
    expected = run(*arrays, documents)

    def changed(where: np.ndarray) -> jax.Array:
        found = [jnp.where(where[..., None, None], 100 * RANDOM.normal(size=a.shape), a) for a in arrays]
        return run(*(a.astype("float32") for a in found), documents)

    for last in (1, 100, 128, 200):
        later = np.broadcast_to(np.arange(S) >= last, (B, S))
        found = changed(later)
        np.testing.assert_array_equal(found[~later], expected[~later])
        assert (found[later] != expected[later]).any()
    for hidden in (~MASK, SEGMENTS == 2):
        found = changed(hidden)
        np.testing.assert_array_equal(found[~hidden & MASK], expected[~hidden & MASK])


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOICES)
def test_splash_on_a_mesh(case, mesh_of, on_tpu):
    def place(state: nnx.State) -> nnx.State:
        flat = nnx.to_flat_state(state)
        spread = [(p, v.replace(jax.device_put(v[...], parameter_spec(p[-1], v.ndim)))) for p, v in flat]
        return nnx.from_flat_state(spread)

    expected = results(layer_of("xla", **CHOICES[case]), MASK)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        found = results(layer_of("splash", **CHOICES[case]), MASK, place)
    assert_close(found, expected)


def test_documents_are_numbers_that_tokens_share():
    assert fused_attention.documents_of(None, None) is None
    assert fused_attention.documents_of(None, SEGMENTS) is SEGMENTS
    both = np.asarray(fused_attention.documents_of(MASK, SEGMENTS))
    same = both[:, :, None] == both[:, None, :]
    pairs = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & MASK[:, None, :]
    np.testing.assert_array_equal(same[MASK], pairs[MASK])
    assert same[:, np.arange(S), np.arange(S)].all()  # no row of scores is empty


BIG = ModelConfig(d_model=128, num_heads=2, context_length=2048, dtype="bfloat16", attention_kernel="auto")


@pytest.mark.parametrize(
    "platform, length, fields, kernel",
    [
        ("tpu", 2048, {}, "splash"),
        ("tpu", 2000, {}, "xla"),  # no multiple of 128
        ("tpu", 256, {}, "xla"),  # short
        ("tpu", 256, {"attention_kernel": "splash"}, "splash"),
        ("tpu", 2048, {"attention_kernel": "xla"}, "xla"),
        ("gpu", 256, {}, "cudnn"),
        ("gpu", 255, {}, "xla"),
        ("gpu", 256, {"dtype": "float32"}, "xla"),
        ("gpu", 256, {"d_model": 264}, "xla"),
        ("cpu", 2048, {}, "xla"),
        ("cpu", 2048, {"attention_kernel": "splash"}, "xla"),  # trained elsewhere, read here
        ("cpu", 2048, {"attention_kernel": "cudnn"}, "xla"),
    ],
)
def test_what_does_not_fit_gives_way(platform, length, fields, kernel, monkeypatch):
    monkeypatch.setattr(fused_attention, "platform", lambda: platform)
    assert fused_attention.choose(dataclasses.replace(BIG, **fields), length) == kernel


@pytest.mark.parametrize("capability, name", [("9.0", "gpu"), ("8.0", "gpu"), ("7.5", "cpu"), ("gfx942", "cpu")])
def test_which_gpus_run_cudnn(capability, name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert fused_attention.platform() == name


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"attention_kernel": "splash", "context_length": 192}, "multiple of 128 positions, and context_length = 192"),
        ({"attention_kernel": "cudnn"}, "computes in bfloat16, and dtype = 'float32'"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "d_model": 264, "num_heads": 1}, "num_heads = 264"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "context_length": 255, "loss_chunk": 51}, "even number"),
    ],
)
def test_what_a_kernel_does_not_do_is_refused(fields, words):
    model = dataclasses.replace(Config().model, **fields)
    with pytest.raises(UserError, match=rf"model.attention_kernel = '\w+': .*{words}.*; try 'auto'"):
        check(dataclasses.replace(Config(), model=model))
    check(dataclasses.replace(Config(), model=dataclasses.replace(model, attention_kernel="auto")))


@pytest.mark.parametrize("kernel, platform", [("splash", "tpu"), ("cudnn", "gpu")])
def test_devices_of_another_kind_are_refused_for_training(kernel, platform):
    model = dataclasses.replace(Config().model, attention_kernel=kernel, dtype="bfloat16")
    config = Config(model=model, training=TrainingConfig(batch_size=32))
    with pytest.raises(UserError, match=f"kernel = '{kernel}': is for devices of platform {platform}, not cpu; try"):
        make_mesh(config, jax.devices()[:1])
    assert make_mesh(config, jax.devices()[:1], trains=False)


def test_a_run_may_go_on_with_another_kernel():
    other = dataclasses.replace(Config().model, attention_kernel="auto")
    assert not identity_changes(Config(), dataclasses.replace(Config(), model=other))


def test_accounting_knows_what_splash_keeps(monkeypatch):
    """Without the scores, by JAX's own residuals; a kernel computes them again."""
    plain = ModelConfig(d_model=D, num_heads=H, context_length=S, feed_forward=DenseConfig())
    splash = dataclasses.replace(plain, attention_kernel="splash")
    counted = memory.saved_bytes(splash, B)["attention"] // splash.num_blocks
    assert memory.saved_bytes(plain, B)["attention"] // plain.num_blocks - counted > B * H * S * S * 4 * 0.9
    again = recomputed_flops(splash) - recomputed_flops(plain)
    assert again == splash.num_blocks * 3 * 2 * S * D  # scores, and their gradient, in two kernels
    monkeypatch.setattr(fused_attention, "platform", lambda: "tpu")
    traced, _ = memory._trace_saved(splash, DenseConfig(), "attention")
    assert traced * B == counted


def test_cudnn_is_given_what_it_takes(monkeypatch, mesh_of):
    """Lowered for CUDA, forward and backward, with a mask of one head; each device its own rows and heads."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((B, S, H, 64), "bfloat16")
    kv = jax.ShapeDtypeStruct((B, S, 2, 64), "bfloat16")

    def both(q, k, v, documents, dy):
        y, pull = jax.vjp(lambda *a: fused_attention.cudnn(*a, documents, causal=True), q, k, v)
        return y, pull(dy)

    def text(*args) -> str:
        return jax.jit(both).trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    def calls(found: str, rows: int, heads: int) -> None:
        assert found.count("custom_call @__cudnn$fmha") == 2
        assert f"tensor<{rows}x1x{S}x{S}xbf16>" in found and f"tensor<{rows}x{S}x{heads}x64xbf16>" in found

    ids = jax.ShapeDtypeStruct((B, S), "int32")
    calls(text(q, kv, kv, ids, q), B, H)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        calls(text(q, kv, kv, ids, q), B // 2, H // 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not here")
@pytest.mark.parametrize("length, width, dtype", [(256, 64, "bfloat16"), (2048, 64, "bfloat16"), (256, 16, "float32")])
def test_mosaic_compiles_it_for_a_v5p(length, width, dtype, monkeypatch):
    from mot_jax.cost.hardware import parse_topology
    from mot_jax.planning import hlo
    from mot_jax.planning.plan import devices_of
    from mot_jax.planning.program import read_program

    chip = SingleDeviceSharding(devices_of(parse_topology("v5p:2x2x1"))[0])
    q, kv = (jax.ShapeDtypeStruct((2, length, h, width), dtype, sharding=chip) for h in (4, 2))
    ids = jax.ShapeDtypeStruct((2, length), "int32", sharding=chip)

    def both(q, k, v, documents, dy):
        y, pull = jax.vjp(lambda *a: fused_attention.splash(*a, documents, causal=True), q, k, v)
        return y, pull(dy)

    text = jax.jit(both, out_shardings=chip).lower(q, kv, kv, ids, q).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert f"{length},{length}]" not in text
    assert read_program(hlo.parse(text), {}).hbm_bytes > 0
