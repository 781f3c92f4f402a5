"""Strict checks of an ESPnet training configuration, because ESPnet checks neither the keys of ``*_conf`` nor types.

Options are compared with ESPnet's parser, and keys of ``*_conf`` with the signature of the class that ``encoder``,
``frontend``, ``optim`` … chooses. Further keys for a class with ``**kwargs`` are not checked.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import float_or_none, int_or_none, str2bool, str2triple_str, str_or_none

from espnet_kd.cli import UserError
from espnet_kd.experiments.models import read_config
from espnet_kd.strict import check_mapping, check_type, describe_type, fits, nearest, parameters, takes_anything

#: What an option's converter makes of a word, as annotations. YAML's numbers serve as words.
_TYPES: Dict[Any, Any] = {
    **{int: int, float: float, str2bool: bool, str: Union[str, float]},
    **{int_or_none: Optional[int], float_or_none: Optional[float], str_or_none: Union[str, float, None]},
}


def check_configuration(parser: argparse.ArgumentParser, cmd: List[str]) -> argparse.Namespace:
    """Parse a command line; its ``--config`` and the options that override it are checked first.

    Raises:
        UserError: an unknown key or choice, with the nearest, or a value of a wrong type, with the path in the file.
    """
    file = argparse.ArgumentParser.parse_known_args(parser, cmd)[0].config  # ESPnet's own would read the file unchecked
    content = read_config(file) if file is not None else {}
    check_options(parser, content, str(file), ": ")
    args = parser.parse_args(cmd)
    check_classes(args, content)
    return args


def check_options(parser: argparse.ArgumentParser, content: Mapping[str, Any], where: str, sep: str = ".") -> None:
    """Refuse options from YAML that ``parser`` does not have, or that have a wrong type (:class:`UserError`).

    Messages name a key as ``where`` + ``sep`` + key.
    """
    actions = {a.dest: a for a in parser._actions}
    for key, value in content.items():
        if key not in actions:
            close = nearest(str(key), actions).split(" (known:")[0]  # there are 150 of them
            raise UserError(f"{where}: unknown key {key!r}{close} (--help lists all)")
        _check_option(actions[key], value, f"{where}{sep}{key}")


def _check_option(action: argparse.Action, value: Any, where: str) -> None:
    if isinstance(action, NestedDictAction):
        if value is not None or action.default is not None:
            for inner in check_mapping(value, where):
                # On its way through a command line it must not become another key, or YAML of its own.
                if not re.fullmatch(r"\w+", str(inner)):
                    raise UserError(f"{where}: unknown key {inner!r}")
        return
    hint = _TYPES.get(action.type)
    if action.dest == "token_list" and isinstance(value, list):  # as a saved configuration has it
        check_type(value, List[str], where)
        return
    if action.type is str2triple_str and not isinstance(value, (str, type(None))):  # criteria, data files
        triples = value if isinstance(value, list) else [None]
        if not all(isinstance(x, list) and len(x) == 3 and fits(x, List[str]) for x in triples):
            raise UserError(f"{where}: expected a list of lists of three texts, found {value!r}")
        return
    if isinstance(value, str) and action.type is not None:  # argparse converts a default that is a word
        try:
            value = action.type(value)  # type: ignore[operator]  # a string would name a type of the parser; none has
        except (ValueError, TypeError, argparse.ArgumentTypeError) as e:
            wanted = describe_type(hint) if hint else "another value"
            raise UserError(f"{where}: expected {wanted}, found {value!r}") from e
    elif hint is not None and (value is not None or action.default is not None):
        # ESPnet takes one value for a list of one.
        several = action.nargs is not None or isinstance(action.default, list)
        for v in value if several and isinstance(value, list) else [value]:
            check_type(v, hint, where)
    if action.choices is not None and value is not None and value not in action.choices:
        raise UserError(f"{where}: unknown {value!r}{nearest(str(value), map(str, action.choices))}")


def check_classes(args: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Refuse keys and values of ``*_conf`` that the chosen classes do not take (:class:`UserError`).

    Args:
        args: all options, parsed.
        content: the options in the file ``args.config``; all others were given on the command line.
    """

    def place(option: str, key: str = "") -> str:
        mine, other = getattr(args, option)[key] if key else None, (content.get(option) or {}).get(key)
        from_file = option in content if not key else key in (content.get(option) or {}) and mine == other
        return f"{args.config}: {option}" if from_file else f"--{option}"

    for option, cls in _chosen(args):
        conf = getattr(args, option, None) or {}
        hints = parameters(cls)
        for key, value in conf.items():
            if key in hints:
                check_type(value, hints[key], f"{place(option, key)}.{key}")
            elif not takes_anything(cls):
                raise UserError(f"{place(option, key)}: unknown key {key!r}{nearest(key, hints)}")
    _try_optimizer(args, place)


def _chosen(args: argparse.Namespace) -> Iterable[Tuple[str, type]]:
    """Yield (option, class) for every ``*_conf`` from which ESPnet builds an object."""
    from espnet2.asr.ctc import CTC
    from espnet2.asr_transducer.joint_network import JointNetwork
    from espnet2.tasks.abs_task import optim_classes, scheduler_classes

    from espnet_kd.offline import ASRTask

    choices = {c.name: c.classes for c in ASRTask.class_choices_list}
    for name, classes in {**choices, "optim": optim_classes, "scheduler": scheduler_classes}.items():
        if getattr(args, name, None) in classes:
            yield f"{name}_conf", classes[getattr(args, name)]
    yield "ctc_conf", CTC
    yield "joint_net_conf", JointNetwork


def _try_optimizer(args: argparse.Namespace, place: Callable[[str], str]) -> None:
    """Build optimizer and scheduler for one parameter; ESPnet reports their errors late and with a traceback."""
    from espnet2.tasks.abs_task import optim_classes, scheduler_classes

    made: Any = [torch.nn.Parameter(torch.zeros(1))]
    for name, classes in (("optim", optim_classes), ("scheduler", scheduler_classes)):
        chosen = getattr(args, name)
        if chosen is None:
            return
        try:
            made = classes[chosen](made, **getattr(args, f"{name}_conf"))
        except Exception as e:  # whatever a class raises because of its arguments
            raise UserError(f"{place(f'{name}_conf')}: {name} {chosen}: {e}") from e
