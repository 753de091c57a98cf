"""One cluster for all the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import MISSING, Cluster, started


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert not MISSING, f"{', '.join(MISSING)}: not installed (Debian: apt-get install slurm-wlm)"
    assert os.geteuid() == 0, "the cluster's nodes are Linux namespaces: they need root"
    with started(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of submission."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
