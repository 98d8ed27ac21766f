"""A whole run in a workdir on an object store, where nothing is appended to, renamed or locked."""

from __future__ import annotations

import pytest
from etils import epath
from object_store import ObjectStore
from training.test_loop import StoppedError, numbers, stop_at

from mot_jax.training import loop


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as patch, ObjectStore() as store:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        pytest.importorskip("gcsfs", reason="an extra")  # after the environment, which it reads when it is imported
        import fsspec.config

        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield store


def test_a_run(tiny, store, tmp_path, monkeypatch, capsys):
    workdir = epath.Path("gs://bucket/runs/mine")
    loop.train(tiny, tmp_path / "local")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(StoppedError):
            loop.train(tiny, str(workdir))
    print(sorted(store.objects))
    print(numbers(workdir))
    loop.train(tiny, str(workdir))
    print(sorted(store.objects))
    assert numbers(workdir) == numbers(epath.Path(tmp_path / "local"))
    print(store.refused)
