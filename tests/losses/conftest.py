"""Run every test of the losses on each CPU backend, except the tests that use the fixture ``chosen``."""

import contextlib

import pytest

from espnet_kd.backend import using


def pytest_generate_tests(metafunc):
    if "chosen" not in metafunc.fixturenames:
        metafunc.parametrize("backend", ["rows", "masked"], indirect=True)


@pytest.fixture(autouse=True)
def backend(request):
    """The forced backend, or None if the library chooses."""
    name = getattr(request, "param", None)
    with using(name) if name else contextlib.nullcontext():
        yield name


@pytest.fixture
def chosen():
    """A test with this fixture runs once, on the backend that the library chooses for its tensors."""
