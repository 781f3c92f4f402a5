"""Deferred imports: only the listed importers get a stand-in, which gives way to the real module when it is used."""

import builtins
import importlib
import sys

import pytest

from espnet_kd.lazy import Deferred, exists, importing_lazily

MODULES = {
    "lz_big/__init__.py": "from lz_big.inside import Thing\nclass Base:\n    pass\nVALUE = 3\n",
    "lz_big/inside/__init__.py": "class Thing:\n    def __init__(self, x=1):\n        self.x = x\n",
    "lz_big/apart.py": "def twice(x):\n    return 2 * x\n",
    "lz_user/__init__.py": "import lz_big\nimport lz_big.apart\nfrom lz_big import Thing\n"
    "from lz_big.inside import Thing as Same\nfrom typing import Optional\n"
    "def f(x: Optional[Thing] = None):\n    return isinstance(x, Thing)\n",
    "lz_misled/__init__.py": "from lz_big import Missing\n"
    "try:\n    import lz_absent\nexcept ImportError:\n    lz_absent = None\n"
    "try:\n    from lz_big.gone import a\n    gone = True\nexcept ImportError:\n    gone = False\n",
    "lz_child/__init__.py": "from lz_big import Base\nclass Child(Base):\n    pass\n",
    "lz_outer/__init__.py": "import lz_middle\n",
    "lz_middle/__init__.py": "import lz_big.apart\ndef four():\n    return lz_big.apart.twice(2)\n",
    "lz_other/__init__.py": "import lz_big\n",
}  # fmt: skip


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A big library, packages that import it, and a function that returns the library's loaded modules."""
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()

    def loaded():
        return {name for name in sys.modules if name.startswith("lz_big")}

    yield loaded
    for name in [name for name in sys.modules if name.startswith("lz_")]:
        del sys.modules[name]


def load(*names, importers=("lz_user", "lz_misled", "lz_child"), deferred=("lz_big", "lz_absent")):
    with importing_lazily(importers, dict.fromkeys(deferred, ())):
        return [importlib.import_module(name) for name in names]


def test_nothing_is_loaded_until_it_is_used(packages):
    (user,) = load("lz_user")
    assert not packages() and isinstance(user.lz_big, Deferred)
    assert user.lz_big.VALUE == 3 and user.lz_big.apart.twice(4) == 8  # a submodule, from ``import a.b``
    assert packages() == {"lz_big", "lz_big.inside", "lz_big.apart"}


def test_what_is_called_and_compared_is_the_real_thing(packages):
    (user,) = load("lz_user")
    thing = user.Thing(x=5)
    import lz_big

    assert type(thing) is lz_big.Thing and thing.x == 5
    assert user.f(thing) and not user.f(None) and issubclass(lz_big.Thing, user.Same)


def test_what_is_not_there_fails_as_ever(packages):
    (misled,) = load("lz_misled")
    assert misled.lz_absent is None and misled.gone is False
    with pytest.raises(AttributeError, match="Missing"):
        misled.Missing()
    assert exists("lz_big.inside") and not exists("lz_big.gone") and not exists("lz_absent.x")


def test_a_base_class_is_imported_at_once(packages):
    (child,) = load("lz_child")
    import lz_big

    assert child.Child.__bases__ == (lz_big.Base,)


def test_other_importers_get_the_library_itself(packages):
    user, other = load("lz_user", "lz_other")
    assert isinstance(user.lz_big, Deferred) and other.lz_big is sys.modules["lz_big"]
    assert not any(isinstance(module, Deferred) for module in sys.modules.values())


def test_what_is_loaded_already_is_taken(packages):
    import lz_big.apart

    (user,) = load("lz_user")
    assert user.lz_big is lz_big and user.Same is lz_big.Thing


def test_the_import_function_comes_back_also_after_an_error(packages):
    before = builtins.__import__
    with pytest.raises(ModuleNotFoundError), importing_lazily(["lz_user"], {}):
        importlib.import_module("lz_nowhere")
    assert builtins.__import__ is before


def test_a_substitute_has_all_that_is_asked_for_or_is_not_given(packages):
    class Half:
        VALUE = 4

    with importing_lazily(["lz_child"], {}, {"lz_big": Half}):
        child = importlib.import_module("lz_child")  # asks for Base, which Half lacks
        exec("from lz_big import VALUE", found := {"__name__": "lz_child"})
    import lz_big

    assert child.Base is lz_big.Base and found["VALUE"] == 4


def test_a_deferred_library_may_wait_for_others_in_turn(packages):
    with importing_lazily(["lz_outer"], {"lz_middle": ["lz_big"]}):
        outer = importlib.import_module("lz_outer")
    four = outer.lz_middle.four
    assert "lz_middle" in sys.modules and not packages()
    assert four() == 4 and packages()
