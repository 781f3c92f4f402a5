"""Report the results of all experiments on one page of tables and pictures, or show the progress of running ones.

    python -m espnet_kd.bin.asr_kd_report exp [--teacher EXP]
    python -m espnet_kd.bin.asr_kd_report egs2/an4/asr_kd1/exp egs2/mini/asr_kd1/exp --output_dir report
    python -m espnet_kd.bin.asr_kd_report --watch exp

Writes report.html (opens anywhere, without network), RESULTS.md (the same), results.json and report/*.png into the
first EXPDIR, and prints the verdict: a paragraph for each distilled student (also in report/verdict.txt). Missing
results are listed; the rest is shown.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expdir", nargs="+", metavar="EXPDIR", help="directories of experiments, one for each recipe")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="EXP", help="teachers in other directories")
    parser.add_argument("--output_dir", metavar="DIR", help="where the report goes; default: the first EXPDIR")
    parser.add_argument(
        "--frame_utts",
        type=int,
        default=100,
        help="number of utterances of each test set for the alignment section (100)",
    )
    parser.add_argument("--examples", type=int, default=3, help="number of these to draw for each test set (3)")
    parser.add_argument(
        "--no_frames", action="store_true", help="leave out the alignment section, which runs the models"
    )
    parser.add_argument("--watch", action="store_true", help="show the progress of each run instead, until Ctrl-C")
    parser.add_argument("--once", action="store_true", help="with --watch: once")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can correct.
    """
    parser = get_parser()
    args = parser.parse_args(argv)
    cli.refuse_empty(args)
    if args.once and not args.watch:
        parser.error("--once goes with --watch")
    for name, least in (("frame_utts", 1), ("examples", 0)):
        if getattr(args, name) < least:
            raise cli.UserError(f"--{name} is {getattr(args, name)}; it must be {least} or more")
    expdirs = list(dict.fromkeys(map(Path, args.expdir)))
    if args.watch:
        from espnet_kd.report.watch import watch

        watch(expdirs, once=args.once)
        return
    # Imported here, so that --help and mistakes in the command line do not wait for the import.
    from espnet_kd.deploy.section import show_exports
    from espnet_kd.files import replacing
    from espnet_kd.report import sections as show
    from espnet_kd.report.frame_section import show_frames
    from espnet_kd.report.page import to_html, to_markdown
    from espnet_kd.report.results import gather, write_json

    teachers = [Path(t) for t in args.teacher]
    everything = [gather(e, teachers if i == 0 else ()) for i, e in enumerate(expdirs)]
    output_dir = Path(args.output_dir) if args.output_dir else expdirs[0]
    parts, pictures = show.make_parts(everything), show.Pictures(output_dir / "report")
    verdict = show.tell_verdict(parts)
    sections = [verdict, show.compare_methods(parts), show.draw_progress(parts, pictures)]
    sections.append(show.draw_costs(parts, pictures))
    exports = show_exports(parts)
    sections += [exports] if exports else []
    sections.append(show.draw_training(parts, pictures))
    if not args.no_frames:
        sections.append(show_frames(parts, pictures, args.frame_utts, args.examples))
    sections += [show.show_worst(parts), show.tell_environment()]
    missing = show.list_missing(parts)
    sections += [missing] if missing else []
    write_json([row for gathered in everything for row in gathered.rows], output_dir / "results.json")
    title, page = show.title_of(parts), output_dir / "report.html"
    short = "\n\n".join([*show.texts_of(verdict), f"The whole report: {page.resolve()}"])
    for path, text in (
        (output_dir / "RESULTS.md", to_markdown(sections, output_dir, title)),
        (page, to_html(sections, title)),
        (pictures.directory / "verdict.txt", f"{short}\n"),
    ):
        with replacing(path) as f:
            f.write(text)
    pictures.remove_others(sections)
    for note in (note for gathered in everything for note in gathered.notes):
        logging.warning("missing: %s", note)
    print(f"\n{short}")


if __name__ == "__main__":
    cli.run(main)
