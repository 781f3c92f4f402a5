"""The parts of a report, and its two formats: Markdown and one HTML file."""

from __future__ import annotations

import base64
import html
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Union

from espnet_kd.report.worst import Example


@dataclass
class Table:
    """A table of texts: the head, and the rows of ``body`` below it. A folded table is shown on demand."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    kind: str = "table"


@dataclass
class Picture:
    """A PNG file, its alternative text, and a caption that explains it."""

    path: Path
    alt: str
    caption: str = ""
    kind: str = "picture"


@dataclass
class Items:
    """A list of short texts."""

    texts: Sequence[str]
    title: str = ""
    kind: str = "items"


@dataclass
class Examples:
    """Utterances with their recognised texts, in which differences are marked."""

    examples: Sequence[Example]
    title: str = ""
    kind: str = "examples"


Block = Union[Table, Picture, Items, Examples]


@dataclass
class Section:
    """A heading, an explanation ``how`` to read the section, and the blocks."""

    title: str
    how: str
    blocks: List[Block] = field(default_factory=list)


def to_markdown(sections: Sequence[Section], home: Path, title: str = "Results") -> str:
    """Markdown whose pictures are links relative to ``home``."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.how, ""]
        for block in section.blocks:
            if title_of_block := getattr(block, "title", ""):
                lines += [f"### {_escape(title_of_block)}", ""]
            lines += [*_LINES[block.kind](block, home), ""]
    return "\n".join(lines).rstrip() + "\n"


def to_html(sections: Sequence[Section], title: str = "Results") -> str:
    """One self-contained HTML file: style inside, pictures as data, no script."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.PackageLoader("espnet_kd.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # With non-breaking spaces, a line can break before an interval, but not inside it or before a unit.
    env.filters["unbroken"] = lambda text: re.sub(r"(?<=[\d,]) (?=[-+]?\d|%|×|min|h |s$)", "\u00a0", text)
    env.filters["count_lines"] = count_lines
    env.filters["data"] = lambda path: base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return env.get_template("report.html.jinja").render(sections=sections, title=title)


def _escape(text: str) -> str:
    """Escape text for Markdown."""
    return re.sub(r"([\\`*|~]|(?<=\])\()", r"\\\1", html.escape(text, quote=False)).replace("\n", " ")


def _table(table: Table, home: Path) -> List[str]:
    rows = [table.head, ["---"] * len(table.head), *table.body]
    lines = [f"|{'|'.join(_escape(cell) for cell in cells)}|" for cells in rows]
    if not table.folded:
        return lines
    return [f"<details><summary>{count_lines(table)}</summary>", "", *lines, "", "</details>"]


def count_lines(table: Table) -> str:
    """The summary of a folded table."""
    return f"{len(table.body)} line{'' if len(table.body) == 1 else 's'}"


def _picture(picture: Picture, home: Path) -> List[str]:
    link = os.path.relpath(picture.path, home)
    return [f"![{_escape(picture.alt)}]({link})", *(["", _escape(picture.caption)] if picture.caption else [])]


def _items(items: Items, home: Path) -> List[str]:
    return [f"- {_escape(text)}" for text in items.texts]


def _examples(block: Examples, home: Path) -> List[str]:
    tags = {"equal": "{}", "ins": "<ins>{}</ins>", "del": "<del>{}</del>"}
    lines = []
    for example in block.examples:
        lines += [
            f"- {_escape(example.utt_id)} ({_escape(example.why)})",
            f"  - reference: {_escape(example.reference)}",
        ]
        for name, pieces in example.texts:
            lines.append(f"  - {_escape(name)}: {' '.join(tags[k].format(_escape(text)) for k, text in pieces)}")
    return lines


_LINES: Dict[str, Callable[[Any, Path], List[str]]] = {
    "table": _table,
    "picture": _picture,
    "items": _items,
    "examples": _examples,
}
