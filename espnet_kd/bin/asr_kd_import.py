"""Import a CTC model of another toolkit as an ESPnet experiment, which can be a teacher in every stage.

    python -m espnet_kd.bin.asr_kd_import hf:DIRECTORY --output_dir exp/wav2vec2
    python -m espnet_kd.bin.asr_kd_import onnx:model.onnx --tokens tokens.txt --output_dir exp/phones

hf: is a fine-tuned CTC model of Hugging Face's transformers: a directory, or OWNER/NAME[@REVISION] on the hub. onnx: is
a file that maps audio (utterances, samples), as it is, to CTC scores. An export of wav2vec 2.0 needs audio of zero mean
and unit variance, which is not computed for onnx:, so that such a model is imported with hf:. No code that comes with a
model is run. The experiment contains the whole model, so that the source is not needed afterwards. Repeating an import
changes nothing.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from espnet_kd import cli


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="asr_kd_import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="hf:DIRECTORY, hf:OWNER/NAME[@REVISION] or onnx:FILE")
    parser.add_argument("--output_dir", required=True, type=Path, help="the experiment to write")
    onnx = parser.add_argument_group("for an ONNX file")
    onnx.add_argument("--tokens", help="file with its tokens, one per line; tokens.txt of sherpa-onnx is accepted too")
    onnx.add_argument("--blank", type=int, help="number of the CTC blank (default: of <blank>, <blk>, <pad> or [PAD])")
    onnx.add_argument("--word_delimiter", help="the token between words (default: |, ▁, <space> or a blank)")
    onnx.add_argument("--fs", type=int, help="sampling rate in Hz (default: 16000)")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Import (see the module's docstring)."""
    args = get_parser().parse_args(cmd)
    cli.refuse_empty(args)
    from espnet_kd.foreign.sources import find_source, is_imported

    given = {name: getattr(args, name) for name in ("blank", "word_delimiter", "fs")}
    options = {name: value for name, value in given.items() if value is not None}
    if options and not args.source.startswith("onnx:"):
        option = next(iter(options))
        raise cli.UserError(f"--{option} is for an ONNX file; a Hugging Face model has it in its own files")
    files, record = find_source(args.source, args.tokens)
    record.update(options)
    if is_imported(args.output_dir, record):
        logging.info("%s: %s is imported already", args.output_dir, args.source)
        return
    import espnet_kd.offline  # noqa: F401, I001  (before espnet2)
    from espnet_kd.foreign.importing import import_model
    from espnet_kd.targets.online import OnlineTeacher

    import_model(args.source, args.output_dir, files, record, **options)
    try:
        teacher = OnlineTeacher(args.output_dir)  # as every stage will load it
    except Exception as e:
        # Without this file, the same command again does not take the import for finished.
        (args.output_dir / "config.yaml").unlink(missing_ok=True)
        if not isinstance(e, RuntimeError):
            raise
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise cli.UserError(f"{args.source}: the model does not run on audio of 10 and 30 s: {reason}") from e
    logging.info(
        "%s: %d tokens, a frame each %g ms, audio of %g Hz",
        args.output_dir, len(teacher.token_list), teacher.frame_shift * 1000, teacher.sampling_rate,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
