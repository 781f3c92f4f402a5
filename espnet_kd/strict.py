"""Strict checks of the user's YAML: errors for unknown keys name the nearest one, errors for types their place."""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import inspect
import math
import sys
import types
import typing
from typing import Any, Callable, Dict, Iterable, Literal, Mapping, Optional, Union

import yaml

from espnet_kd.cli import UserError

_NAMES: Dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"},
    **{list: "a list", tuple: "a list", dict: "a mapping"},
}
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest name, and all known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"


def check_mapping(value: Any, where: str, known: Optional[Iterable[str]] = None) -> Dict[str, Any]:
    """``value`` as a mapping whose keys are all ``known`` (None: any).

    Raises:
        UserError: not a mapping, or an unknown key.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a mapping, found {value!r}")
    for key in value:
        if known is not None and key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    return dict(value)


def to_yaml(value: Any) -> str:
    """A value as one line of YAML. For example, 0.00001 is 1.0e-05, because YAML reads 1e-05 as text."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def check_type(value: Any, hint: Any, where: str) -> None:
    """Refuse a value from YAML that does not fit an annotation (:class:`UserError`)."""
    if fits(value, hint):
        return
    if isinstance(value, str) and typing.get_origin(hint) is Literal:
        raise UserError(f"{where}: unknown value {value!r}{nearest(value, typing.get_args(hint))}")
    trap = ""
    if isinstance(value, str) and fits(0.5, hint):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3 as text, and 1.0e-3 as a number
            trap = f" (YAML takes that for text: write {to_yaml(float(value))})"
    raise UserError(f"{where}: expected {describe_type(hint)}, found {value!r}{trap}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML fits an annotation; a list may stand for a tuple, and 1 for a float."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, h) for h in inner)
    if origin is Literal:
        return value in inner
    if hint is None or hint is type(None):
        return value is None
    if origin is float:  # YAML has whole numbers that no float can hold
        huge = isinstance(value, int) and abs(value) > sys.float_info.max
        return isinstance(value, (int, float)) and not isinstance(value, bool) and not huge
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in _LISTS:
        each = [h for h in inner if h is not Ellipsis]
        same = len(each) == 1 or Ellipsis in inner  # otherwise a tuple with a type for each element
        listed = isinstance(value, (list, tuple))
        return listed and (not same or all(fits(v, each[0]) for v in value))
    if origin in _MAPPINGS:
        return isinstance(value, Mapping)
    # The classes that are left (tensors, modules) do not occur in YAML. Values of YAML's own types do not fit them, so
    # that the other types of a union decide; other values are not checked.
    return origin in (Any, object) or not isinstance(origin, type) or not isinstance(value, tuple(_NAMES))


def describe_type(hint: Any) -> str:
    """An annotation in words."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(h) for h in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in _LISTS:
        return "a list" + (f", each {describe_type(inner[0])}" if len(set(inner) - {Ellipsis, Any}) == 1 else "")
    if origin in _MAPPINGS:
        return "a mapping"
    return _NAMES.get(origin, getattr(origin, "__name__", str(origin)))


def parameters(function: Callable[..., Any]) -> Dict[str, Any]:
    """{parameter that may be named: annotation} of a function or class.

    A parameter without annotation gets the type of its default, or ``Any``. With the default None, None is accepted.
    """
    hints: Dict[str, Any] = {}
    # A dataclass's fields are resolved in the module of the class that defines each field, its __init__ in one module.
    for annotated in (function, inspect.getattr_static(function, "__init__", None)):
        with contextlib.suppress(NameError, TypeError, AttributeError):  # names that only a type checker imports
            hints.update(typing.get_type_hints(annotated))
    found = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            continue
        like = type(p.default) if p.default not in (p.empty, None) and type(p.default) in _NAMES else Any
        hint = hints.get(p.name, float if like is int else like)
        found[p.name] = Optional[hint] if p.default is None else hint
    return found


def takes_anything(function: Callable[..., Any]) -> bool:
    """Whether a function or class has ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
