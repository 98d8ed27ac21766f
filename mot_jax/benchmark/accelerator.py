"""`mot bench accelerator`: all that there is to measure on one device, in one command for a few minutes.

A part that fails, or for which no time is left, says so in its place, and the others go on. Files are written after
each part; of several calls on one day and device each adds its parts to them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mot_jax.benchmark import decoding, headline, layers, numerics, step
from mot_jax.benchmark.report import Column, markdown
from mot_jax.benchmark.timing import machine
from mot_jax.config import Config, MixtureOfTokensConfig, ModelConfig, TrainingConfig, kernel_runs_on, load_config
from mot_jax.cost.layers import MIXTURE, SHAPES, WAYS, paper_shapes
from mot_jax.errors import UserError, error_words, nearest
from mot_jax.runtime.paths import local_path

Progress = Callable[[str], None]
_TITLES: dict[str, tuple[str, list[Column]]] = {
    "numerics": ("Numerics, against float64 on a CPU", numerics.COLUMNS),
    "layers": ("Layers", layers.COLUMNS),
    "step": ("The training step of v1", step.COLUMNS),
    "step_base_32e": ("The training step of Base/32E", step.COLUMNS),
    "step_d2048": ("The training step of two blocks of d_model 2,048, E 32", step.COLUMNS),
    "decoding": ("Writing text with v1", decoding.COLUMNS),
    "headline": ("v1's models, 4,000 steps on Python source", headline.COLUMNS),
}


def bench_accelerator(out: str, parts: Sequence[str], small: bool, seconds: float, progress: Progress) -> list[str]:
    """Runs the parts and writes their results under `out`; names those that failed or were wrong.

    Prints the Markdown. seconds: after which no part, and no shape of the layers, begins. Raises UserError for a part
    that there is not, and for an `out` that cannot be.
    """
    for part in parts:
        if part not in _TITLES:
            raise UserError(f"--parts = {part}: no such part{nearest(part, list(_TITLES))}")
    deadline, about = time.monotonic() + seconds, machine()
    folder = Path(local_path("--out", out))
    device = re.sub(r"[^a-z0-9]+", "-", about.get("processor", about["device"]).lower()).strip("-")
    path = folder / f"{about['date']}_{device}{'_small' if small else ''}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--out = {out}: {path.name} is no place for results ({error_words(error)})") from None
    failed = []
    for part in parts:
        start = time.monotonic()
        if start >= deadline:
            progress(f"--- {part}: no time is left")
            if found.get(part, {}).get("rows"):  # of an earlier call
                continue
            found[part] = {"not_run": "no time was left", "rows": []}
        else:
            progress(f"--- {part}, {deadline - start:.0f} s left")
            try:
                found[part] = {"rows": _run(part, folder, small, deadline, progress)}
            except UserError:
                raise
            except Exception as error:  # the other parts may still work
                progress(traceback.format_exc())
                found[part] = {"not_run": error_words(error), "rows": []}
                failed.append(part)
        found[part] |= {"seconds": time.monotonic() - start, "date": about["date"]}
        if any(not row.get("ok", True) for row in found[part]["rows"]):
            failed.append(part)
        path.write_text(json.dumps({"machine": about, "parts": found}, indent=1) + "\n")
        path.with_suffix(".md").write_text("\n".join(_page(about, found)) + "\n")
        if found[part]["rows"] and part == "layers":
            path.with_name(f"{path.stem}_layers.png").write_bytes(layers.plot(found[part]["rows"]))
    print("\n".join(_page(about, found)))
    progress(f"written: {path} and {path.with_suffix('.md').name}")
    return failed


def _run(part: str, folder: Path, small: bool, deadline: float, progress: Progress) -> list[dict[str, Any]]:
    import jax

    rounds, on_cpu = 3 if small else 10, jax.default_backend() == "cpu"
    if part == "numerics":
        return numerics.bench_numerics(small, progress)
    if part == "layers":
        shapes = [SHAPES["tiny"]] if small else paper_shapes(on_cpu)
        dtype = "float32" if on_cpu else "bfloat16"
        may_go_on = lambda: time.monotonic() < deadline  # noqa: E731
        return layers.bench_layers(shapes, None, dtype, rounds, progress, may_go_on=may_go_on)[0]
    if part == "headline":
        return headline.bench_headline(folder / "headline", small, deadline - time.monotonic(), progress)
    if part.startswith("step"):
        config = _SMALL if small else _stepping(part)
        configs = {MIXTURE: config, "dense": step.dense_twin(config)}
        if part == "step":  # the models are small: there is room for both ways to attend
            auto = {f"{name}, attention_kernel auto": _auto(config) for name, config in configs.items()}
            configs = auto | configs
        kernel, device = (
            "fused_mixture" if part == "step" else "fused_experts",
            jax.devices()[0],
        )  # what takes their experts
        by_kernel = _by(kernel, config)
        if kernel_runs_on(by_kernel.model.feed_forward, device):
            configs = {f"{MIXTURE}, kernel {kernel}": by_kernel} | configs
        return step.bench_step(configs, rounds, progress)[0]
    config = _SMALL if small else load_config(headline.CONFIGS / "v1.py")
    rows: list[dict[str, Any]] = []
    for batch in (1, 32):
        if time.monotonic() < deadline and not (small and rows):
            rows += decoding.bench_decoding(config, [batch], rounds, progress)[0]
    return rows


def _by(kernel: str, config: Config) -> Config:
    feed_forward = dataclasses.replace(config.model.feed_forward, **WAYS[kernel])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=feed_forward))


def _auto(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention_kernel="auto"))


def _stepping(part: str) -> Config:
    """Whose step is timed."""
    if part == "step":
        return load_config(headline.CONFIGS / "v1.py")
    config = load_config(headline.CONFIGS / "v2.py:base_32e")
    if part == "step_base_32e":
        return config
    model = dataclasses.replace(config.model, num_blocks=2, d_model=2048, d_ff=8192, num_heads=16)
    return dataclasses.replace(config, model=model, training=dataclasses.replace(config.training, batch_size=128))


_SMALL = Config(
    model=ModelConfig(1, 16, 32, 2, context_length=16, loss_chunk=16, feed_forward=MixtureOfTokensConfig(4, 8)),
    training=TrainingConfig(batch_size=8),
)


def _page(about: dict[str, str], found: dict[str, Any]) -> list[str]:
    lines = [f"# {about['device']}, {about['date']}", "", ", ".join(f"{n} {v}" for n, v in about.items()), ""]
    for part, (title, columns) in _TITLES.items():
        if part in found:
            content = found[part]
            lines += [f"## {title}", ""]
            lines += [f"Not measured: {content['not_run']}.", ""] if "not_run" in content else []
            lines += [*markdown({}, content["rows"], columns)[2:], ""] if content["rows"] else []
            lines += [f"In {content['seconds']:.0f} s, {content['date']}.", ""]
    return lines
