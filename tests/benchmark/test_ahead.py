"""Layers compiled for a chip that is not here."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mot_jax import cli


def rows_of(tmp_path, topology: str) -> dict[str, dict]:
    file = tmp_path / "rows.json"
    cli.main(["bench", "layers", "--topology", topology, "--shapes", "tiny", "--json", str(file)])
    return {row["kind"]: row for row in json.loads(file.read_text())["rows"]}


def test_bytes_stand_beside_those_of_the_dense_layer(tmp_path, capsys):
    rows = rows_of(tmp_path, "local:1")
    dense, mixture, refused = (rows[f"{kind}"] for kind in ("dense", "mixture_of_tokens", "mixture_of_tokens, pallas"))
    weights, tokens = 4 * 2 * 32 * 64, 2 * 8 * 32 * 32  # of tiny: D 32, d_ff 64, 8 rows of 32 tokens
    assert dense["hbm_bytes"] > 3 * weights + 4 * tokens and dense["ratio"] == 1
    assert mixture["ratio"] == mixture["hbm_bytes"] / dense["hbm_bytes"] > 1 and mixture["copies"] > 0
    assert "is for TPU; try --topology v5p" in refused["refused"] and "is for TPU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not here")
def test_a_kernels_bytes_are_those_of_its_blocks(tmp_path):
    rows = rows_of(tmp_path, "v5p:2x2x1")
    kernel = rows["mixture_of_tokens, pallas"]
    assert 0 < kernel["kernel_bytes"] < kernel["hbm_bytes"] and kernel["kernel_bytes"] < kernel["cost_bytes"]
    assert not rows["mixture_of_tokens"]["kernel_bytes"]
