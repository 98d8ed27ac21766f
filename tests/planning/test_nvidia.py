"""Target GPUs: the wheels of the compiler, its description of a GPU, and compiled steps."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jaxlib
import pytest

from mot_jax import cli
from mot_jax.config import Config, MeshConfig, MixtureOfTokensConfig, ModelConfig, TrainingConfig
from mot_jax.cost.hardware import GPUS, HARDWARE, parse_topology
from mot_jax.errors import UserError
from mot_jax.nn.kernels import fused_attention
from mot_jax.nn.sharding import make_mesh
from mot_jax.planning import nvidia
from mot_jax.planning.plan import plan_training

WHEELS = dict.fromkeys(("jax-cuda13-plugin", "jax-cuda13-pjrt"), jaxlib.__version__)
COMPILER = {"nvidia-cuda-nvcc": "13", "nvidia-nvvm": "13"}


@pytest.fixture
def install(monkeypatch):
    """Return a function that replaces the versions of the installed wheels."""

    def install(versions: dict[str, str]) -> None:
        monkeypatch.setattr(nvidia, "_version", versions.get)
        monkeypatch.setattr(nvidia.shutil, "which", lambda name: None)
        monkeypatch.setattr(nvidia.ctypes.util, "find_library", lambda name: None)

    return install


@pytest.mark.parametrize(
    "versions, message",
    [
        ({}, "needs XLA's CUDA plugin, which is missing"),
        ({**WHEELS, **COMPILER, "jax-cuda13-plugin": "0.0.1"}, "needs jax-cuda13-plugin .*, and 0.0.1 is installed"),
        ({**COMPILER, "jax-cuda13-plugin": jaxlib.__version__}, "needs jax-cuda13-pjrt .*, and none is installed"),
        (WHEELS, "needs nvidia-cuda-nvcc and nvidia-nvvm, with which"),
        ({name.replace("13", "12"): version for name, version in WHEELS.items()}, "needs nvidia-cuda-nvcc-cu12, with"),
    ],
)
def test_a_missing_or_mismatching_wheel_is_one_line_with_the_command(versions, message, install):
    install(versions)
    with pytest.raises(UserError, match=rf"^--topology = h100:8: {message}.*; try pip install .*cuda-aot\]'$") as error:
        nvidia.devices_of_gpus(parse_topology("h100:8"))
    assert "\n" not in str(error.value)


def with_attention(kernel: str, **fields) -> Config:
    config = Config()
    model = dataclasses.replace(config.model, attention_kernel=kernel, dtype="bfloat16", **fields)
    return dataclasses.replace(config, model=model)


def test_without_cudnn_the_automatic_choice_is_xla_and_the_plan_states_it(install):
    install({})
    config, line = nvidia.without_cudnn(with_attention("auto"))
    assert config.model.attention_kernel == "xla" and "cuda-aot-cudnn" in line
    for config in (with_attention("xla"), with_attention("auto", context_length=255)):
        assert nvidia.without_cudnn(config) == (config, None)
    with pytest.raises(UserError, match=r"attention_kernel = 'cudnn': needs cuDNN .*; try pip .*cuda-aot-cudnn"):
        nvidia.without_cudnn(with_attention("cudnn"))
    install({"nvidia-cudnn-cu13": "9.14"})
    assert nvidia.without_cudnn(with_attention("cudnn"))[1] is None


def test_cudnn_is_the_one_for_the_cuda_version_of_the_plugin(install, monkeypatch):
    """Of two plugins the one for CUDA 13 is in use. A library of the system is for both."""
    cuda_12 = {"jax-cuda12-plugin": jaxlib.__version__, "jax-cuda12-pjrt": jaxlib.__version__}
    cuda_12 |= {"nvidia-cuda-nvcc-cu12": "12"}
    for plugins, fitting, other in ((cuda_12, 12, 13), ({**WHEELS, **COMPILER}, 13, 12)):
        for cuda, installed in ((fitting, True), (other, False)):
            install({**cuda_12, **plugins, f"nvidia-cudnn-cu{cuda}": "9.14"})
            assert nvidia.cudnn_installed() == installed
        for library, installed in (("libcudnn.so.9", True), ("libcudnn.so.8", False)):
            install(plugins)
            monkeypatch.setattr(nvidia.ctypes.util, "find_library", lambda name, library=library: library)
            assert nvidia.cudnn_installed() == installed


def test_every_gpu_has_a_description_of_its_figures():
    assert set(GPUS) == set(nvidia._TARGETS)
    for name, target in nvidia._TARGETS.items():
        assert HARDWARE[name].hbm_bytes == pytest.approx(0.9 * target.memory_bytes)
        assert HARDWARE[name].hbm_bandwidth == pytest.approx(target.bandwidth, rel=0.005)
        text = nvidia._target_config(target, HARDWARE[name].device_kind, 13)
        assert f"core_count: {target.multiprocessors}\n" in text and text.count("{") == text.count("}")


def test_a_product_without_tiles_is_reported_with_a_remedy():
    """XLA of jax 0.10 refuses some, such as those of d_model 96; other errors of the compiler remain as they are."""

    class Refused(SimpleNamespace):
        def compile(self, options):
            raise jax.errors.JaxRuntimeError(self.text)

    device = SimpleNamespace(platform="gpu")
    text = "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.4 = f32[2048,96]{1,0} dot(%bitcast, %p)"
    with pytest.raises(UserError, match=r"'triton': .* a product of f32\[2048,96\]; try --products cublas"):
        nvidia.compile_for(device, Refused(text=text), "triton")
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        nvidia.compile_for(device, Refused(text="INTERNAL: another"), "triton")


# --- with XLA's CUDA plugin -------------------------------------------------------------------------------------------

INSTALLED = any(nvidia._version(f"jax-cuda{cuda}-plugin") == jaxlib.__version__ for cuda in (12, 13))
needs_plugin = pytest.mark.skipif(not INSTALLED, reason="needs the extra cuda-aot")


@needs_plugin
def test_target_gpus_choose_their_own_attention_and_devices_divide_the_mesh():
    devices = nvidia.devices_of_gpus(parse_topology("h100:2x8"))
    assert len(devices) == 16 and [device.process_index for device in devices] == [0] * 8 + [1] * 8
    with jax.set_mesh(jax.sharding.Mesh(devices, "data")):
        assert fused_attention.platform() == "gpu"  # the attached devices are CPUs
    mesh = dataclasses.replace(Config().mesh, data=2, expert=4)
    with pytest.raises(UserError, match=r"leaves 8 of 16 devices idle; try mesh.data = -1"):
        make_mesh(dataclasses.replace(Config(), mesh=mesh), devices)
    with pytest.raises(UserError, match="'splash': is for devices of platform tpu, not gpu; try 'auto'"):
        make_mesh(with_attention("splash"), devices[:1])


@pytest.mark.slow
@needs_plugin
@pytest.mark.parametrize("products", ["triton", "cublas"])
def test_a_step_on_eight_gpus(products):
    """One block in bfloat16: every FLOP is understood, gradients are reduced once, mixtures exchanged four times."""
    kind = MixtureOfTokensConfig(group_size=4, num_experts=8, save_for_backward="all")
    sizes = {"num_blocks": 1, "d_model": 128, "d_ff": 256, "context_length": 32, "loss_chunk": 32}
    model = ModelConfig(feed_forward=kind, dtype="bfloat16", attention_kernel="xla", **sizes)
    config = Config(model=model, training=TrainingConfig(batch_size=64), mesh=MeshConfig(data=2, expert=4))
    result = plan_training(config, "h100:8", products=products)
    assert result.fits and not result.program.unknown and not result.notes
    assert result.copies >= result.transposes >= 0
    assert 1.0 <= result.program.flops / result.model_flops < 1.3  # includes recomputation
    kinds = result.program.by_kind()
    # Sorted by FLOPs. XLA of jax 0.12 leaves some small products to cuBLAS.
    assert next(iter(kinds)) == {"triton": "Triton product", "cublas": "cuBLAS product"}[products]
    assert products == "triton" or "Triton product" not in kinds
    exchanges = [c for c in result.program.collectives if c.kind == "all-to-all" and c.axes == ("expert",)]
    # Of 64 / 8 sequences per GPU, 2 groups with E mixtures at 32 positions.
    assert sum(c.executions * c.bytes for c in exchanges) == 4 * (2 * 8 * 32 * 128) * 2
    # One host: NVLink only.
    seconds = 3 / 4 * 4 * (2 * 8 * 32 * 128) * 2 / 4.5e11
    assert result.times.collectives["all-to-all over expert"] == pytest.approx(seconds)
    assert 0 < result.efficiency_below_peak[0] <= result.efficiency[0] < 1
    content = json.loads(json.dumps(result.to_dict()))
    assert (
        content["program"]["kernels"] == kinds and content["times_below_peak"]["serial"] >= content["times"]["serial"]
    )
    lines = "\n".join(result.lines())
    assert "roofline MFU" in lines and "products at 70% of peak" in lines and "not understood" not in lines


@pytest.mark.slow
@needs_plugin
def test_a_step_that_does_not_fit_a_gpu_has_a_plan():
    model = ModelConfig(num_blocks=1, d_model=64, d_ff=128, context_length=32, loss_chunk=32, attention_kernel="xla")
    config = Config(model=model, training=TrainingConfig(batch_size=2**23), mesh=MeshConfig(data=1))
    result = plan_training(config, "h100:1")
    assert not result.fits and result.program is None and result.memory["needed"] > result.memory["HBM limit"]
    assert result.largest and any("--model.remat blocks" in line for line in result.lines())


@pytest.mark.slow
@needs_plugin
def test_one_layer_on_a_gpu(tmp_path, capsys):
    file = tmp_path / "rows.json"
    cli.main(["bench", "layers", "--topology", "h100:1", "--shapes", "tiny", "--json", str(file)])
    all_rows = json.loads(file.read_text())["rows"]
    assert [row["products"] for row in all_rows if row["kind"] == "dense"] == ["triton", "cublas"]
    rows = {row["kind"]: row for row in all_rows if row["products"] == "triton"}
    dense, mixture = rows["dense"], rows["mixture_of_tokens"]
    assert mixture["copies"] >= mixture["transposes"] > 0
    assert dense["kernel_s"] >= dense["hbm_bytes"] / 3.35e12 > 0
    assert mixture["ratio"] == mixture["hbm_bytes"] / dense["hbm_bytes"] > 1
    assert dense["cost_bytes"] is None and dense["temporaries"] is not None
    assert "needs a TPU v5e, v5p or later" in rows["mixture_of_tokens:fused_mixture"]["refused"]
