r"""Recognise audio files with an export of any format, or with an experiment.

Examples:
    python -m espnet_kd.bin.asr_kd_transcribe --model exp/student_progressive_fkl/export_onnx speech.flac talk.mp3
    python -m espnet_kd.bin.asr_kd_transcribe --model export_onnx --output_format srt --output_dir subtitles *.opus
    arecord -f S16_LE -r 16000 | python -m espnet_kd.bin.asr_kd_transcribe --model exp/streaming/export --streaming -

Audio may be WAV, FLAC, MP3, Opus and other formats of libsndfile, at any sampling rate; several channels are averaged.
The file - is standard input. The text is printed to standard output, one line per file, with the file's name before it
if there are several. Subtitles and JSON have times; a confidence is a token's mean posterior. Audio longer than
--longest_seconds is cut where it is quietest.

--streaming decodes with an encoder that works in blocks, as the audio arrives, and shows the text as soon as it is
recognised; the latency is logged. Standard input is then one channel of 16-bit samples at the student's rate, raw or
WAV.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from espnet_kd.cli import UserError, refuse_empty, run

FORMATS = {"text": "txt", "json": "json", "srt": "srt", "vtt": "vtt"}


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_transcribe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio files; -: standard input")
    parser.add_argument("--model", required=True, metavar="DIR", help="an export of any format, or an experiment")
    parser.add_argument("--output_format", choices=list(FORMATS), default="text", help="default: text")
    parser.add_argument("--output_dir", help="directory for one file per input; default: standard output")
    parser.add_argument("--longest_seconds", type=float, help="longer audio is cut at pauses (default: 20)")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of onnxruntime (default: 1)")
    parser.add_argument("--streaming", action="store_true", help="decode in blocks as the audio arrives")
    return parser


def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Transcribe (see the module's docstring).

    Raises:
        UserError: a mistake in the options, the model cannot be loaded, or a file could not be transcribed.
    """
    args = get_parser().parse_args(cmd)
    refuse_empty(args)
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}; it must be 1 or more")
    if args.longest_seconds is not None and not args.longest_seconds >= 1:
        raise UserError(f"--longest_seconds is {args.longest_seconds:g}; it must be 1 or more")
    outputs = list_outputs(args.files, args.output_dir and Path(args.output_dir), FORMATS[args.output_format])
    if args.streaming:
        from espnet_kd.deploy.live import LiveTranscriber
    else:
        from espnet_kd.transcribe import Transcriber
    with contextlib.redirect_stdout(sys.stderr):  # ESPnet prints to stdout when it is imported
        chosen: Any = LiveTranscriber if args.streaming else Transcriber
        transcriber = chosen(args.model, threads=args.threads, longest=args.longest_seconds)
    shown = [""]
    if args.streaming and not outputs and args.output_format == "text" and len(args.files) == 1:
        transcriber.on_text = lambda text: _show_more(text, shown)
    failed: List[UserError] = []
    for file in args.files:
        try:
            transcript = transcriber(file)
        except UserError as e:
            if len(args.files) == 1:
                raise
            print(f"error: {e}", file=sys.stderr)
            failed.append(e)
            continue
        content = transcriber.render(transcript, args.output_format)
        content = content.removeprefix(shown[0].lstrip())
        if outputs:
            from espnet_kd.files import replacing

            with replacing(outputs[file]) as f:
                f.write(content)
            logging.info("%s → %s", file, outputs[file])
        else:
            several = len(args.files) > 1 and args.output_format == "text"
            sys.stdout.write(f"{file}\t{content}" if several else content)
            sys.stdout.flush()
        if args.streaming:  # logged when the line of the text is complete
            logging.info("%s: %s", file, transcriber.latencies)
    if failed:
        raise UserError(f"{len(failed)} of {len(args.files)} files could not be transcribed, see above")


def _show_more(text: str, shown: List[str]) -> None:
    """Write the new part of a stream's text; ``shown`` has the text that was written before."""
    text = text.rstrip()  # a space at the end is written together with the next word
    if text.startswith(shown[0]):
        sys.stdout.write(text[len(shown[0]) :] if shown[0] else text.lstrip())
        sys.stdout.flush()
        shown[0] = text


def list_outputs(files: Sequence[str], output_dir: Optional[Path], suffix: str) -> Dict[str, Path]:
    """The output path of each file's transcript; empty without a directory.

    Raises:
        UserError: two transcripts would have the same path.
    """
    if output_dir is None:
        return {}
    from espnet_kd.files import check_writable

    check_writable(output_dir)
    outputs: Dict[str, Path] = {}
    for file in files:
        name = "standard_input" if file == "-" else Path(file).stem
        place = output_dir / f"{name}.{suffix}"
        other = next((f for f, p in outputs.items() if p == place and f != file), None)
        if other is not None:
            raise UserError(f"{other} and {file} would both be written to {place}; give them one at a time")
        outputs[file] = place
    return outputs


if __name__ == "__main__":
    run(main)
