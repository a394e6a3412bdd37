"""A small model in a folder, and programs of it that other tests of the run find again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.families import make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", num_hidden_layers=1).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")
