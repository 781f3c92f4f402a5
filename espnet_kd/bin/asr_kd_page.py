"""Check a method page, and print what it needs, as name=value lines that a shell can read.

    python -m espnet_kd.bin.asr_kd_page self_kd
    python -m espnet_kd.bin.asr_kd_page conf/my_method.yaml

teacher: required or none · stages: number of KD stages · labels: 1 if the method needs transcripts, else 0 ·
nbest: hypotheses per utterance that the method needs of the teacher's N-best, 0 for none

An objective that is a dotted path is code of the page's author. Unless --import_objectives is given, it is not
imported: its options are not checked, and its needs are not included.
"""

from __future__ import annotations

import argparse
import logging
from typing import Optional, Sequence

from espnet_kd import cli
from espnet_kd.lazy import importing_lazily


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="name of a page in conf/methods, or path of a page")
    parser.add_argument(
        "--import_objectives", action="store_true", help="import objectives that are dotted paths, as training does"
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: no such page, or a mistake in it.
    """
    args = get_parser().parse_args(argv)
    cli.refuse_empty(args)
    # Checking an objective's options does not need the libraries with which it computes.
    with importing_lazily(("espnet_kd",), dict.fromkeys(("torch", "numpy"), ())):
        from espnet_kd.distill.page import Unread, load_page

    page = load_page(args.page, args.import_objectives)
    unread = {spec.name for stage in page.stages for spec in stage.objectives if isinstance(spec.make(), Unread)}
    if unread:
        logging.warning("not imported, and therefore not checked: %s (see --help)", ", ".join(sorted(unread)))
    print(f"teacher={page.teacher}")
    print(f"stages={len(page.stages)}")
    print(f"labels={int(page.needs_text)}")
    print(f"nbest={page.nbest}")


if __name__ == "__main__":
    cli.run(main)
