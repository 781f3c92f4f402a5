"""Lazy imports: a library is imported when it is first used.

Inside :func:`importing_lazily`, chosen packages get a proxy for each chosen library that they import. The proxy imports
the library when one of its attributes is first used. Only the importing module refers to the proxy: it is never in
``sys.modules``, no library is changed, and all other modules get the library itself.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any, Collection, ContextManager, Iterator, Mapping, Optional, Set, Tuple


class Deferred:
    """A proxy for a module, or an object in one, that is imported when it is used."""

    def __init__(self, window: _Window, module: str, path: Tuple[str, ...] = ()):
        self._window, self._module, self._path = window, module, path

    def _resolve(self) -> Any:
        """The real object (raises ImportError or AttributeError, as the import statement would)."""
        real = self._window.load(self._module)
        for part in self._path:
            real = getattr(real, part)
        return real

    def __getattr__(self, name: str) -> Any:
        if not self._window.is_open:
            with self._window.inside(self._module):  # a package may import submodules on attribute access
                return getattr(self._resolve(), name)
        if name.startswith("__"):  # Python itself reads such names of annotations and of class attributes
            raise AttributeError(name)
        return Deferred(self._window, self._module, (*self._path, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the real object."""
        return self._resolve()(*args, **kwargs)

    def __mro_entries__(self, bases: Tuple[Any, ...]) -> Tuple[Any, ...]:
        return (self._resolve(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._resolve())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._resolve())

    def __repr__(self) -> str:
        return f"<deferred {'.'.join((self._module, *self._path))}>"


class _Window:
    """A replacement of ``__import__`` that defers imports."""

    def __init__(
        self,
        importers: Collection[str],
        deferred: Mapping[str, Collection[str]],
        substitutes: Mapping[str, Any],
    ):
        self.is_open = True
        self._importers, self._covered, self._substitutes = importers, set(deferred), substitutes
        self._inside = dict(deferred)
        self._import = builtins.__import__
        self._asked: Set[str] = set()

    def inside(self, module: str) -> ContextManager[None]:
        """The context in which a deferred module is imported; its own imports may be deferred too."""
        waiting = self._inside.get(module)
        return importing_lazily([module], dict.fromkeys(waiting, ())) if waiting else contextlib.nullcontext()

    def load(self, module: str) -> types.ModuleType:
        """Import ``module`` and those of its submodules that an import statement has named."""
        # If it is needed before the block is left, its imports of its own modules must not be deferred.
        self._covered -= {name for name in self._covered if is_inside(name, module) or is_inside(module, name)}
        for name in sorted(name for name in self._asked if is_inside(name, module)):
            importlib.import_module(name)
        return importlib.import_module(module)

    def __call__(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        """``__import__``: return a proxy if one of the importers imports a covered module that is not loaded."""
        importer = (globals or {}).get("__name__", "").partition(".")[0]
        if level == 0 and importer in self._importers:
            substitute = self._substitutes.get(name)
            if substitute and fromlist and all(hasattr(substitute, attribute) for attribute in fromlist):
                return substitute
            covered = any(is_inside(name, c) for c in self._covered)
            if covered and name not in sys.modules and "*" not in (fromlist or ()) and exists(name):
                self._asked.add(name)
                # ``import a.b`` binds a, but ``from a.b import c`` reads c from a.b.
                return Deferred(self, name if fromlist else name.partition(".")[0])
        return self._import(name, globals, locals, fromlist, level)


def is_inside(name: str, package: str) -> bool:
    """Whether a dotted name is ``package`` or in it."""
    return name == package or name.startswith(f"{package}.")


def exists(name: str) -> bool:
    """Whether a module of this dotted name can be found; nothing is imported."""
    root, *parts = name.split(".")
    if root in sys.modules:
        found = getattr(sys.modules[root], "__spec__", None)
    else:
        found = importlib.util.find_spec(root)
    for part in parts:
        if found is None or found.submodule_search_locations is None:
            return False
        name = f"{found.name}.{part}"
        found = importlib.machinery.PathFinder.find_spec(name, found.submodule_search_locations)
    return found is not None


@contextlib.contextmanager
def importing_lazily(
    importers: Collection[str], deferred: Mapping[str, Collection[str]], substitutes: Optional[Mapping[str, Any]] = None
) -> Iterator[None]:
    """Let the packages ``importers`` import the modules ``deferred``, and all inside these, on first use.

    Args:
        importers: top-level packages whose imports are deferred; other packages import as usual.
        deferred: {dotted name: modules whose import it may defer in turn}; a module that cannot be found is imported at
            once, and fails as usual.
        substitutes: {module: object with some of its names}, which replaces the module for an importer that imports
            only these names.
    """
    window = _Window(importers, deferred, substitutes or {})
    builtins.__import__ = window
    try:
        yield
    finally:
        builtins.__import__ = window._import
        window.is_open = False
