"""`data.json` in the directory of a run or an export: fingerprints of its text, digests of some files."""

from __future__ import annotations

from etils import epath

from mot_jax.runtime import strict_json
from mot_jax.runtime.paths import replace_file

FILE = "data.json"


def load_fingerprints(workdir: epath.Path) -> dict[str, str]:
    """The content of `data.json` in `workdir`; empty if there is none. Raises UserError if it is damaged."""
    path = workdir / FILE
    advice = f"try rm -r {path}, and mot train with the same config writes it again"
    return strict_json.load(path, dict, advice) if path.exists() else {}


def save_fingerprints(workdir: epath.Path, fingerprints: dict[str, str]) -> None:
    """Write `data.json` in `workdir`, or replace it."""
    replace_file(workdir / FILE, strict_json.dumps(fingerprints, indent=1).encode())
