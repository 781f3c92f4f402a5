"""YAML from somebody else is read within bounds, and refused at once beyond them."""

import time

import pytest
import yaml

from espnet_kd.cli import UserError
from espnet_kd.safe_yaml import MAX_DEPTH, parse_yaml


def laughs(levels, width=10):
    """Each line repeats the one before ``width`` times, so a few hundred bytes hold width ** levels values."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


BEYOND = {
    "aliases of aliases": (laughs(12), "x.yaml: more than 1000000 values"),
    "few aliases of many": (laughs(30, 2), "x.yaml: more than 1000000 values"),
    "nested flow lists": ("[" * 350 + "]" * 350, f"x.yaml, line 1: nested deeper than {MAX_DEPTH}"),
    "nested mappings": ("{a: " * 100 + "1" + "}" * 100, f"nested deeper than {MAX_DEPTH}"),
    "nested block lists": ("- " * 350 + "x", f"nested deeper than {MAX_DEPTH}"),
    "unclosed lists": ("[" * 100_000, "x.yaml: .*exceeded maximum nesting depth|nested deeper than"),
    "inside itself": ("a: &a\n  - 1\n  - *a\n", r"x.yaml, line 3: \*a stands inside itself"),
    "the thirteenth month": ("a: 2026-13-01", "x.yaml: this is no YAML that can be read: month"),
    "broken": ("a: [", "x.yaml: this is no YAML that can be read: "),
    "code": ("a: !!python/object/apply:os.getcwd []", "x.yaml: this is no YAML .*could not determine a constructor"),
    "a list for a key": ("? [a]\n: 1", "x.yaml: this is no YAML .*unhashable"),
    "unknown alias": ("a: *b", "x.yaml: this is no YAML .*undefined alias"),
    "no point of time": ("a: !!timestamp x", "x.yaml: this is no YAML"),
    "no truth value": ("a: !!bool maybe", "x.yaml: this is no YAML"),
    "no number": ("a: !!int ''", "x.yaml: this is no YAML"),
    "control characters": ("a: \x00", "x.yaml: this is no YAML"),
}


@pytest.mark.parametrize("text, message", BEYOND.values(), ids=BEYOND)
def test_what_is_beyond_the_bounds_is_refused_at_once(text, message):
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as e:
        parse_yaml(text, "x.yaml")
    assert time.perf_counter() - start < 5 and "\n" not in str(e.value) and len(str(e.value)) < 500


def test_the_bound_on_values_counts_what_is_there():
    assert parse_yaml(laughs(3), "x", max_nodes=400)["a2"][0][0] == ["x", "x"]
    with pytest.raises(UserError, match="more than 200 values"):
        parse_yaml(laughs(3), "x", max_nodes=200)
    with pytest.raises(UserError, match="more than 5 values"):
        parse_yaml("[1, 2, 3, 4, 5, 6]", "x", max_nodes=5)


@pytest.mark.parametrize("content", [{"a": [1, 2.5, None, True, "é"]}, [], None, "", {"token_list": ["x"] * 100_000}])
def test_everything_else_is_what_pyyaml_reads(content):
    assert parse_yaml(yaml.safe_dump(content, allow_unicode=True), "x") == content


def test_anchors_within_the_bounds_are_taken():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: [*a, *a]\n", "x") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}] * 2}
