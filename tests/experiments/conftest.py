"""A cache of their own for the tests, so that they neither read nor write the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The digits network is trained once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CBS_OPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for a single test."""
    folder = tmp_path / "own-cache"
    monkeypatch.setenv("CBS_OPT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data_dir(shared: Path) -> Path:
    """Folder with the literature's data, beside the repository."""
    folder = shared / "datasets"
    if not folder.is_dir():
        pytest.skip("the optional folder ../shared has no datasets")
    return folder
