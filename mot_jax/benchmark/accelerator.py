"""`mot bench accelerator`: every benchmark of the attached accelerators, in one command of a few minutes.

All parts but `mesh` and `collectives` use one device.

A part that fails, or for which no time is left, is reported as not measured or incomplete, and the other parts still
run. The JSON file is written after each row, or shape and direction of the layers, the others after each part; several
calls on the same day and device add their parts to the same files.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from etils import epath

from mot_jax.benchmark import attention, calibration, decoding, headline, layers, mesh, numerics, step, workloads
from mot_jax.benchmark.peers import comparable
from mot_jax.benchmark.report import Column, markdown
from mot_jax.benchmark.timing import machine
from mot_jax.config import Config, MeshConfig, kernel_runs_on
from mot_jax.cost.layers import DROPLESS, IMPLEMENTATIONS, MIXTURE, SHAPES, paper_shapes
from mot_jax.errors import ReportedError, UserError, error_words, nearest
from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import local_path, replace_file

Progress = Callable[[str], None]
_TITLES: dict[str, tuple[str, list[Column]]] = {
    "numerics": ("Numerics compared with float64 on a CPU", numerics.COLUMNS),
    "attention": ("Attention, forward and backward", attention.COLUMNS),
    "layers": ("Layers", layers.COLUMNS),
    "peers": ("Layers of other packages, random routing", layers.COLUMNS),
    "step": ("The training step of v1", step.COLUMNS),
    "step_base_32e": ("The training step of Base/32E", step.COLUMNS),
    "step_d2048": ("The training step of two blocks of d_model 2,048, E 32", step.COLUMNS),
    "mesh": ("The training step of v1 on one and on all devices", mesh.COLUMNS),
    "collectives": ("Collectives over all devices", mesh.COLLECTIVE_COLUMNS),
    "decoding": ("Generation with v1", decoding.COLUMNS),
    "headline": ("The models of v1 after 4,000 steps on Python source", headline.COLUMNS),
}


def bench_accelerator(out: str, parts: Sequence[str], small: bool, seconds: float, progress: Progress) -> list[str]:
    """Run the parts, write their results under `out` and print the Markdown.

    Args:
        out: Directory of the JSON, Markdown and PNG files.
        parts: Names of parts (`_TITLES`), in the order of execution.
        small: Use tiny sizes, to test that everything runs.
        seconds: Time after which no part, and no shape of the layers, is started.
        progress: Receives lines about the progress.

    Returns:
        The parts that failed or whose numerics are wrong.

    Raises:
        UserError: For an unknown part, and for an `out` that cannot be used.
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
        results: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--out = {out}: results cannot be added to {path.name} ({error_words(error)}); try another directory"
        ) from None
    model, failed = calibration.Model(), []
    for part in parts:
        start = time.monotonic()
        if start >= deadline:
            progress(f"--- {part}: skipped, no time left")
            if results.get(part, {}).get("rows"):  # from an earlier call
                continue
            results[part] = {"not_run": "no time was left", "rows": []}
        else:
            progress(f"--- {part}, {deadline - start:.0f} s left")
            results[part] = {"not_run": "interrupted", "rows": [], "seconds": 0.0, "date": about["date"]}
            try:
                for row in _measure(part, folder, small, deadline, model, progress):
                    results[part]["rows"].append(row)
                    results[part]["seconds"] = time.monotonic() - start
                    _write(path, {"machine": about, "parts": results})
                del results[part]["not_run"]
            except ReportedError:
                raise
            except NotApplicableError as error:
                progress(f"{part}: {error}")
                results[part]["not_run"] = str(error)
            except Exception as error:  # the other parts may still succeed
                progress(traceback.format_exc())
                results[part]["not_run"] = error_words(error)
                failed.append(part)
        results[part] |= {"seconds": time.monotonic() - start, "date": about["date"]}
        if any(not row.get("ok", True) for row in results[part]["rows"]):
            failed.append(part)
        _report(path, about, results, model.measured)
        if results[part]["rows"] and part == "layers":
            path.with_name(f"{path.stem}_layers.png").write_bytes(layers.plot(results[part]["rows"]))
    page, fault = _report(path, about, results, model.measured)
    print(page)
    progress(f"written: {path} and {path.with_suffix('.md').name}")
    if fault is not None:
        progress("".join(traceback.format_exception(fault)))
        failed.append("calibration")
    return failed


def _report(path: Path, about: dict[str, str], results: dict[str, Any], measured: bool) -> tuple[str, Exception | None]:
    """Write JSON and Markdown. Returns the Markdown, and the error of the calibration, which both files then lack."""
    content: dict[str, Any] = {"machine": about, "parts": results}
    error: Exception | None = None
    _write(path, content)
    try:
        calibrated = _calibration(results, measured)
    except Exception as reason:  # the measured parts are complete
        error, calibrated = reason, {"not_run": error_words(reason), "rows": [], "factors": {}}
    _write(path, content | {"calibration": calibrated})
    page = "\n".join(_page(about, results, calibrated))
    path.with_suffix(".md").write_text(page + "\n")
    return page, error


def _write(path: Path, content: dict[str, Any]) -> None:
    replace_file(epath.Path(path), (strict_json.dumps(content, indent=1) + "\n").encode())


class NotApplicableError(Exception):
    """Why a part does not exist on this machine."""


def _measure(
    part: str, folder: Path, small: bool, deadline: float, model: calibration.Model, progress: Progress
) -> Iterator[dict[str, Any]]:
    """The rows of a part, each as soon as it is measured."""
    rounds, on_cpu = 3 if small else 10, jax.default_backend() == "cpu"
    if part == "numerics":
        yield from numerics.bench_numerics(small, progress)
    elif part == "attention":
        yield from attention.bench_attention(small, rounds, model, progress)
    elif part in ("layers", "peers"):
        shapes = [SHAPES["tiny"]] if small else sorted(paper_shapes(on_cpu), key=lambda s: s.tokens * s.d_ff)
        kinds, peers = None, part == "peers"
        if peers:
            kinds = [MIXTURE, "token_choice", DROPLESS]
            shapes = [comparable(shape) for shape in shapes if small or shape.name == PEER_SHAPE[on_cpu]]
        dtype = "float32" if on_cpu else "bfloat16"
        has_time = lambda: time.monotonic() < deadline  # noqa: E731
        options: dict[str, Any] = {"has_time": has_time, "peers": peers, "model": model}
        for shape, direction in itertools.product(shapes, layers.DIRECTIONS):
            rows, _ = layers.bench_layers([shape], kinds, dtype, rounds, progress, directions=[direction], **options)
            yield from rows
    elif part in ("mesh", "collectives"):
        if jax.device_count() == 1:
            raise NotApplicableError("there is one device")
        if part == "mesh":
            yield from mesh.bench_mesh(workloads.SMALL if small else workloads.v1_mot(), rounds, model, progress)
        else:
            yield from mesh.bench_collectives(2**16 if small else 2**27, rounds, model, progress)
    elif part == "headline":
        yield from headline.bench_headline(folder / "headline", small, deadline - time.monotonic(), progress)
    elif part.startswith("step"):
        config = workloads.SMALL if small else STEP_WORKLOADS[part]()
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
        yield from step.bench_step(step_configs(part, config, jax.devices()[0]), rounds, progress, model=model)[0]
    else:
        config = workloads.SMALL if small else workloads.v1_mot()
        for batch in (1,) if small else (1, 32):
            if time.monotonic() < deadline:
                yield from decoding.bench_decoding(config, [batch], rounds, progress)[0]


PEER_SHAPE = {True: "cpu_e32", False: "base_32e"}  # whether on a CPU: the shape of the layers of other packages
STEP_WORKLOADS = {"step": workloads.v1_mot, "step_base_32e": workloads.v2_base_32e, "step_d2048": workloads.d2048}


def step_configs(part: str, config: Config, device: jax.Device) -> dict[str, Config]:
    """The configs whose steps are compared, by name; the dense baseline is the last one."""
    configs = {MIXTURE: config, "dense": workloads.dense_of_equal_width(config)}
    if part == "step":  # the other models are too large to time both attention kernels
        auto = {f"{name}, attention_kernel auto": _with_attention("auto", c) for name, c in configs.items()}
        configs = auto | {name: _with_attention("xla", c) for name, c in configs.items()}
    kernel = "fused_mixture" if part == "step" else "fused_experts"  # the one that supports the shape of the experts
    fused = with_kernel(kernel, config)
    if kernel_runs_on(fused.model.feed_forward, device):
        configs = {f"{MIXTURE}, kernel {kernel}": fused} | configs
    return configs


def with_kernel(kernel: str, config: Config) -> Config:
    """`config` with its mixture computed by a fused kernel."""
    feed_forward = dataclasses.replace(config.model.feed_forward, **IMPLEMENTATIONS[MIXTURE][kernel])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, feed_forward=feed_forward))


def _with_attention(kernel: Literal["auto", "xla"], config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention_kernel=kernel))


_LABELS = ("shape", "direction", "kind", "config", "size", "kernel", "mesh", "collective")  # of a row of any part


def _calibration(results: dict[str, Any], measured: bool) -> dict[str, Any]:
    """Modeled and measured times of all programs with a model, and the factors.

    measured: whether the rates of the model are.
    """
    programs = [
        {
            "name": ", ".join([part, *(row[name] for name in _LABELS if name in row)]),
            "modeled_s": row["modeled_s"],
            "measured_s": row["median_s"],
        }
        | {name: row[name] for name in ("not_modeled",) if name in row}
        for part, content in results.items()
        for row in content["rows"]
        if row.get("modeled_s") or "not_modeled" in row
    ]
    rows, factors = calibration.calibrate(programs, launch=jax.default_backend() != "cpu")
    by_class = {name: dataclasses.asdict(factor) for name, factor in factors.items()}
    return {"rates": "measured" if measured else "data sheet", "rows": rows, "factors": by_class}


def _page(about: dict[str, str], results: dict[str, Any], calibrated: dict[str, Any]) -> list[str]:
    lines = [f"# {about['device']}, {about['date']}", "", ", ".join(f"{n} {v}" for n, v in about.items()), ""]
    for part, (title, columns) in _TITLES.items():
        if part in results:
            content = results[part]
            lines += [f"## {title}", ""]
            state = "Incomplete" if content["rows"] else "Not measured"
            lines += [f"{state}: {content['not_run']}.", ""] if "not_run" in content else []
            lines += [*markdown({}, content["rows"], columns)[2:], ""] if content["rows"] else []
            lines += [f"Took {content['seconds']:.0f} s on {content['date']}.", ""]
    if "not_run" in calibrated:
        lines += ["## Modeled against measured", "", f"Not calibrated: {calibrated['not_run']}.", ""]
    if calibrated["rows"]:
        factors = [{"class": name} | factor for name, factor in calibrated["factors"].items()]
        lines += ["## Modeled against measured", ""]
        lines += [f"Peak, bandwidth and network of the model: {calibrated['rates']}.", ""]
        lines += [*markdown({}, calibrated["rows"], calibration.COLUMNS)[2:], ""]
        lines += [*markdown({}, factors, calibration.FACTOR_COLUMNS)[2:], ""]
    return lines
