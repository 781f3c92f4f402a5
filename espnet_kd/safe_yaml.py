"""Reading untrusted YAML within bounds: a few hundred bytes can expand to more than the memory of a machine.

Aliases (``*name``) repeat the value of an anchor, nested repetitions grow without bound, and deep nesting exhausts the
stack. Values and depth are counted on the parser's events, before anything is built.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import yaml

from espnet_kd.cli import UserError

#: Largest nesting depth of a page or a configuration; those of ESPnet and of this package need less than ten.
MAX_DEPTH = 32
#: Keys, values and list entries, those that aliases repeat included; a list of 200,000 tokens is below it.
MAX_NODES = 1_000_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str, where: str, max_nodes: int = MAX_NODES) -> Any:
    """The content of a YAML document of plain values (``where`` begins the messages).

    Raises:
        UserError: it is not YAML, has a value that cannot be constructed (such as month 13), or exceeds the bounds.
    """
    try:
        _measure(text, where, max_nodes)
        return yaml.load(text, Loader=_LOADER)  # noqa: S506 (a safe loader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, LookupError, AttributeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__  # PyYAML itself fails for some, e.g. !!bool maybe
        raise UserError(f"{where}: this is no YAML that can be read: {reason}") from e


def _measure(text: str, where: str, max_nodes: int) -> None:
    """Refuse a document beyond ``MAX_DEPTH`` or ``max_nodes``, or with an alias inside the value of its own anchor."""
    sizes: Dict[str, int] = {}
    open_: List[Tuple[str, int]] = []  # anchor and size of each open collection
    total = 0

    def add(count: int) -> None:
        nonlocal total
        if open_:
            anchor, size = open_[-1]
            open_[-1] = (anchor, size + count)
        total += count
        if total > max_nodes:
            raise UserError(f"{where}: more than {max_nodes} values, counting those that aliases (*name) repeat")

    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor or "", 1))
            if len(open_) > MAX_DEPTH:
                line = event.start_mark.line + 1
                raise UserError(f"{where}, line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            sizes[anchor] = size
            # Its members are in the total already, but not yet in the size of the enclosing collection.
            if open_:
                open_[-1] = (open_[-1][0], open_[-1][1] + size)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_]:
                raise UserError(f"{where}, line {event.start_mark.line + 1}: *{event.anchor} stands inside itself")
            add(sizes.get(event.anchor, 1))
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor or ""] = 1
            add(1)
