"""A copy of the recipes in which the tests run them."""

import os
import shutil
from pathlib import Path

import pytest
from recipe import ROOT


@pytest.fixture(scope="module")
def egs2(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("recipes") / "egs2"
    produced = shutil.ignore_patterns("data", "dump*", "exp*", "downloads")
    shutil.copytree(ROOT / "egs2", copy, symlinks=True, ignore=produced)
    shutil.copy(ROOT / "run_all.sh", copy.parent)
    return copy


@pytest.fixture(scope="session")
def corpora() -> Path:
    return Path(os.environ.get("ESPNET_KD_TEST_CORPORA", ROOT.parent / "shared"))
