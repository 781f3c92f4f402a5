"""Values read from YAML are checked against type annotations."""

from typing import Any, Dict, List, Literal, Optional, Sequence, Tuple, Union

import pytest
import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.strict import check_mapping, check_type, fits, nearest, parameters, takes_anything, to_yaml


@pytest.mark.parametrize(
    "value, hint, good",
    [
        (1, int, True), (True, int, False), (1.0, int, False), ("1", int, False),
        (1, float, True), (0.5, float, True), (True, float, False), (None, float, False),
        (True, bool, True), (1, bool, False), ("x", str, True), (1, str, False),
        (None, Optional[int], True), (3, Union[int, str], True), (3.5, Union[int, str], False), (3.5, int | str, False),
        ([1, 2], Sequence[int], True), ([1, "a"], List[int], False), ((1, 2), List[int], True), ("a", List[str], False),
        ([0.9, 0.99], Tuple[float, float], True), ([1, "a"], Tuple[int, str], True), (["a"], Tuple[int, ...], False),
        ({"a": 1}, Dict[str, int], True), ([], dict, False), ("a", Literal["a", "b"], True), ("c", Literal["a"], False),
        (0.1, Union[float, torch.Tensor], True), ("0.1", Union[float, torch.Tensor], False),
        ([1], Any, True), ([1], object, True), (1, "forward reference", True), ([], list, True), (3, list, False),
    ],
)  # fmt: skip
def test_fits(value, hint, good):
    assert fits(value, hint) is good


def test_messages_say_where_what_and_what_instead():
    with pytest.raises(UserError, match="^a.yaml: lr: expected a number, found '1e-3' .* write 0.001"):
        check_type("1e-3", float, "a.yaml: lr")
    with pytest.raises(UserError, match="^x: expected a whole number or nothing, found 'six'$"):
        check_type("six", Optional[int], "x")
    with pytest.raises(UserError, match="^x: expected a list, each a whole number, found 3$"):
        check_type(3, Sequence[int], "x")
    with pytest.raises(UserError, match=r"^x: unknown key 'wieght'; did you mean 'weight'\? \(known: weight, per\)$"):
        check_mapping({"wieght": 1}, "x", ["weight", "per"])
    assert nearest("zzz", ["a", "b"]) == " (known: a, b)"


def test_parameters():
    def function(a, b: int, c=0.5, d=2, *rest, e: str = None, f=None, **more):
        pass

    hints = parameters(function)
    assert hints == {"a": Any, "b": int, "c": float, "d": float, "e": Optional[str], "f": Optional[Any]}
    assert takes_anything(function) and not takes_anything(torch.nn.Linear)
    assert parameters(torch.nn.Linear)["in_features"] is int


def test_numbers_are_written_as_yaml_reads_them():
    for value in (1e-5, 0.001, 1e16, float("inf"), [1e-6, "a: b"], {"x": 1e-9}, True, None, "1e-05"):
        assert yaml.safe_load(to_yaml(value)) == value and "\n" not in to_yaml(value)
    with pytest.raises(UserError, match="write 1.0e-05"):
        check_type("1e-5", float, "a.yaml: lr")
