"""Write docs/api.md from the docstrings of the public functions and classes.

Example:
    python docs/make_api.py

tests/test_docs.py compares the page with what this script would write.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, Iterable, List, Tuple

PAGE = Path(__file__).with_name("api.md")
#: The public modules, with the names that the page shows; without names, those of ``__all__``, or all public ones.
MODULES: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    ("espnet_kd.ez", ()),
    ("espnet_kd.transcribe", ()),
    ("espnet_kd.losses", ()),
    ("espnet_kd.frames", ()),
    ("espnet_kd.distill.objectives.base", ("Objective", "Batch")),
    ("espnet_kd.inference.encode", ("EncoderOutputs",)),
)
HEAD = """# Public functions and classes

This page is written by `python docs/make_api.py` from the docstrings; do not edit it by hand. Shapes: B utterances,
T frames, V tokens, D the width of a hidden state. NB and BL: non-blank and blank frames, by the teacher's argmax.
"""
#: Sections of a docstring in Google's style.
SECTIONS = ("Args", "Returns", "Raises", "Yields", "Source")


def make_page() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [f"- [`{name}`](#{name.replace('.', '')})" for name, _ in MODULES]
    for name, shown in MODULES:
        module = importlib.import_module(name)
        parts += [f"\n## {name}\n", to_markdown(inspect.getdoc(module) or "")]
        for member in shown or public_names(module):
            parts.append(describe(getattr(module, member), member))
    return "\n".join(parts).rstrip() + "\n"


def public_names(module: Any) -> List[str]:
    """``__all__``, or the functions and classes that the module defines, in the order of its source."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [
        (inspect.getsourcelines(value)[1], name)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return [name for _, name in sorted(own)]


def describe(thing: Any, name: str) -> str:
    """A function, or a class with its attributes and methods, as Markdown."""
    parts = [entry("###", name, thing)]
    if inspect.isclass(thing):
        source = textwrap.dedent(inspect.getsource(thing))
        attributes = attribute_lines(source)
        parts += ["", "Attributes:\n", *attributes] if attributes else []
        for node in class_body(source, ast.FunctionDef):
            value = inspect.getattr_static(thing, node.name)
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if function.__doc__ and (not node.name.startswith("_") or node.name == "__call__"):
                parts.append(entry("####", f"{name}.{node.name}", function, isinstance(value, property)))
            elif function.__doc__ and node.name == "__init__":
                parts.append("\n" + to_markdown(inspect.getdoc(function)))
    return "\n".join(parts)


def class_body(source: str, kind: type) -> List[Any]:
    """The nodes of type ``kind`` in the class's own source."""
    return [node for node in ast.parse(source).body[0].body if isinstance(node, kind)]


def entry(level: str, name: str, thing: Any, is_property: bool = False) -> str:
    """Heading, signature and docstring."""
    lines = [f"\n{level} {name}\n"]
    if not is_property:
        lines += ["```python", f"{name.rpartition('.')[2]}{signature(thing)}", "```\n"]
    return "\n".join([*lines, to_markdown(inspect.getdoc(thing) or "")])


class _Unquoted(str):
    """An annotation that is written without the quotes which ``inspect`` puts around a string."""

    def __repr__(self) -> str:
        return str(self)


def signature(thing: Any) -> str:
    """Parameters and result of a function or class, over several lines if they are long."""
    found = inspect.signature(thing)
    parameters = [
        p.replace(annotation=_Unquoted(p.annotation)) if isinstance(p.annotation, str) else p
        for p in found.parameters.values()
        if p.name not in ("self", "cls")
    ]
    result = found.return_annotation
    result = _Unquoted(result) if isinstance(result, str) else result
    text = str(found.replace(parameters=parameters, return_annotation=result))
    if len(text) < 100:
        return text
    inside, kinds = [str(p) for p in parameters], [p.kind for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        inside.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return "(\n" + "".join(f"    {part},\n" for part in inside) + text[text.rindex(")") :]


def attribute_lines(source: str) -> List[str]:
    """``- `name: type = value`: comment`` for each annotated attribute; its comment begins with ``#:``."""
    written, lines = source.splitlines(), []
    for node in class_body(source, ast.AnnAssign):
        above = node.lineno - 1
        while written[above - 1].strip().startswith("#:"):
            above -= 1
        comments = [line.strip() for line in written[above : node.lineno - 1]] + [written[node.end_lineno - 1]]
        found = [line.partition("#: ")[2] for line in comments]
        text = inline(" ".join(filter(None, found)))
        lines.append(f"- `{ast.unparse(node)}`" + (f": {text}" if text else ""))
    return lines


def to_markdown(doc: str) -> str:
    """A docstring in Google's style as Markdown: its sections as lists, its code in backticks."""
    return "\n".join(_blocks(doc.splitlines())).rstrip()


def _blocks(lines: Iterable[str]) -> Iterable[str]:
    section = ""
    for line in lines:
        head = re.match(rf"({'|'.join(SECTIONS)}):\s*(.*)$", line)
        if head:
            section = head[1] if not head[2] else ""
            yield f"**{head[1]}:** {inline(head[2])}".rstrip() + ("" if head[2] else "\n")
        elif section and line.startswith("    "):
            named = re.match(r"    ([\w*, ]+): (.*)$", line) if section in ("Args", "Raises") else None
            yield f"- `{named[1]}`: {inline(named[2])}" if named else inline(line[4:])
        else:
            if line and section:
                section = ""
            yield inline(line)


def inline(text: str) -> str:
    """Roles and double backticks of reStructuredText as backticks."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
