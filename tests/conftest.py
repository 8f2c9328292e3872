"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Recipes first: they take minutes, and shorter tests then fill up the other processes."""
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are slower, and results less repeatable, with more threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real speech, texts and a small LLM; not part of the project, so tests skip without it."""
    path = Path(os.environ.get("ESPNET_LLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path} (set ESPNET_LLM_TEST_DATA)")
    return path
