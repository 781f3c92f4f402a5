"""Fixtures for the tests of the target cache."""

import pytest
from tiny_cache import command


@pytest.fixture(scope="session")
def unbroken(corpus, teacher_dir, tmp_path_factory):
    """A cache that was made without an interruption. Tests must not change it."""
    from espnet_kd.bin import asr_kd_cache

    cache = tmp_path_factory.mktemp("cache") / "targets"
    asr_kd_cache.main(command(teacher_dir, corpus, cache))
    return cache
