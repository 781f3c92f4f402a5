"""Every test of the losses on each backend that a CPU has, but those that ask for what is chosen by itself."""

import contextlib

import pytest

from espnet_kd.backend import using


def pytest_generate_tests(metafunc):
    if "chosen" not in metafunc.fixturenames:
        metafunc.parametrize("backend", ["rows", "masked"], indirect=True)


@pytest.fixture(autouse=True)
def backend(request):
    """The backend that is forced, if any."""
    name = getattr(request, "param", None)
    with using(name) if name else contextlib.nullcontext():
        yield name


@pytest.fixture
def chosen():
    """Whoever asks for it runs once, by the backend that is chosen for its tensors."""
