"""Export a trained student for other programs: as a plain ESPnet experiment, for ONNX, sherpa-onnx, or a web page.

Examples:
    python -m espnet_kd.bin.asr_kd_export --expdir exp/student_progressive_fkl
    python -m espnet_kd.bin.asr_kd_export --expdir exp/student_progressive_fkl --format onnx web --card

Formats, and the files of each:

  espnet  EXP/export with config.yaml (no KD keys), model.pth (student keys only), feats_stats.npz, bpe.model if any,
          decode.yaml (options for decoding a CTC model) and README.md (how to use it), and EXP/export.zip, in the
          format of espnet2.bin.pack. ESPnet loads them from any directory. Paths in config.yaml are relative to the
          directory in which the command runs, as ESPnet writes them.
  onnx    EXP/export_onnx with model.onnx, a graph from samples to log-probabilities with dynamic batch and time, and
          tokens.txt
  sherpa  EXP/export_sherpa with model.onnx and tokens.txt, for sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc
  web     EXP/export_web, a folder for any web server: a page that recognises files and the microphone in the browser
  stream  EXP/export_stream with model.onnx, one block of a streaming student with its state as inputs and outputs, for
          asr_kd_transcribe --streaming; for contextual-block encoders, which the other formats do not support

The last four have student.json (sampling rate, frame shift, tokens, versions, SHA-256 of every file) and README.md.
Before one of them is written, its graph is run at several lengths, alone and in batches. A graph is refused if its
log-probabilities differ from ESPnet's by more than 1e-4. With --quantize int8 this holds for the graph before its
weights are quantised; the difference afterwards is in student.json (largest_difference).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Dict, Optional, Sequence

from espnet_kd.cli import UserError, refuse_empty, run

FORMATS = ("espnet", "onnx", "sherpa", "web", "stream")


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", required=True, metavar="EXP[/FILE.pth]", help="the student's experiment")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["espnet"], help="default: espnet")
    parser.add_argument("--output_dir", help="directory for one format; default: EXP/export, EXP/export_onnx, …")
    parser.add_argument(
        "--quantize",
        choices=("none", "int8"),
        default="none",
        help="int8: a smaller graph, in all formats but espnet; measure the loss of accuracy",
    )
    parser.add_argument(
        "--max_seconds", type=float, default=30.0,
        help="longest utterance that the graph accepts, in seconds (default: 30)",
    )
    parser.add_argument("--opset", type=int, default=17, help="version of the ONNX operators (default: 17)")
    parser.add_argument(
        "--ort_web", metavar="DIR", help="for web: dist/ of onnxruntime-web; default: that of npm"
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        default=[],
        metavar="DIR",
        help="data dirs: measure speed, size and error rates of every format there, for the report (EXP/exports.json)",
    )
    parser.add_argument("--card", action="store_true", help="write a model card into every folder, as README.md")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Export (see the module's docstring)."""
    args = get_parser().parse_args(cmd)
    refuse_empty(args)
    formats = list(dict.fromkeys(args.format))
    output_dir = args.output_dir and Path(args.output_dir)
    if output_dir and len(formats) > 1:
        raise UserError("--output_dir goes with one --format; leave it out for several")
    if args.quantize != "none" and formats == ["espnet"]:
        raise UserError(f"--quantize {args.quantize}: an export for ESPnet has no graph; give --format, such as onnx")
    # Imported here, so that --help and mistakes in the command line do not wait for the import.
    from espnet_kd.distill.export import export
    from espnet_kd.experiments.models import find_experiment

    home = find_experiment(args.expdir)[0].parent
    home = home.parent if home.name == "export" else home
    folders = {}
    if "espnet" in formats:
        folders["espnet"] = export(args.expdir, output_dir)
    if formats != ["espnet"]:
        folders.update(_write_graphs(args, [f for f in formats if f != "espnet"], output_dir, home))
    for folder in folders.values():
        logging.info("exported to %s", folder)
    if args.measure:
        from espnet_kd.deploy.measure import measure_exports

        given = Path(args.expdir)
        reference = folders.get("espnet") or (home / "export" if (home / "export").is_dir() else given)
        measure_exports(home, list(folders.values()), args.measure, reference)
        logging.info("speed, size and error rates: %s", home / "exports.json")
    if args.card:
        from espnet_kd.deploy.card import write_cards

        write_cards(home, folders)


def _write_graphs(
    args: argparse.Namespace, formats: Sequence[str], output_dir: Optional[Path], home: Path
) -> Dict[str, Path]:
    """Write the forms that have a graph, and return the folder of each."""
    from espnet_kd.deploy.student import load_student
    from espnet_kd.deploy.write import Options, write_form

    options = Options(args.quantize, args.max_seconds, args.opset, args.ort_web and Path(args.ort_web))
    options.check()
    student = load_student(args.expdir)
    return {form: write_form(student, form, output_dir or home / f"export_{form}", options) for form in formats}


if __name__ == "__main__":
    run(main)
