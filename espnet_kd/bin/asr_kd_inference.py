"""Decode a data dir with the CTC head of an ESPnet experiment, in batches, greedily.

    python -m espnet_kd.bin.asr_kd_inference --expdir exp/student --data_dir dump/raw/test \
        --output_dir exp/student/decode_test

Writes OUTPUT_DIR/1best_recog/{text,token,token_int,score} in ESPnet's layout and OUTPUT_DIR/decode.json.
A finished decoding of the same model and data is kept; --force decodes again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Dict, Optional, Sequence

from espnet_kd import cli
from espnet_kd.files import replacing


def get_parser() -> argparse.ArgumentParser:
    """Command line of asr_kd_inference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expdir", required=True, metavar="EXP[/FILE.pth]", help="experiment or export to decode with")
    parser.add_argument("--data_dir", required=True, help="data dir with wav.scp")
    parser.add_argument("--output_dir", required=True, help="e.g. EXP/decode_test")
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help="0: CPU, 1: GPU")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="audio in a batch, padding included")
    parser.add_argument("--nj", type=int, default=1, help="batches decoded at the same time; 1 on a GPU")
    parser.add_argument("--force", action="store_true", help="decode again even if it is done")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command.

    Raises:
        UserError: anything that the user can mend.
    """
    args = get_parser().parse_args(argv)
    if args.nj < 1:
        raise cli.UserError(f"--nj is {args.nj}; it must be 1 or more")
    if not (args.batch_seconds > 0 and math.isfinite(args.batch_seconds)):
        raise cli.UserError(f"--batch_seconds is {args.batch_seconds}; it must be a number above 0")
    if args.ngpu:
        args.nj = 1  # a GPU gains nothing from batches side by side; recipes pass both options
    output_dir = Path(args.output_dir)
    start = time.perf_counter()
    # Imported here: --help and mistakes in the command line are answered at once.
    from espnet_kd.targets.experiment import find_experiment

    config, model_file = find_experiment(args.expdir)
    inputs = describe_inputs(model_file, Path(args.data_dir))
    if not args.force and is_done(output_dir, inputs):
        logging.info("%s is decoded already with this model and data (--force decodes again)", output_dir)
        return

    import torch

    from espnet_kd.decode.recognise import Recogniser, read_utterances, recognise
    from espnet_kd.targets.experiment import load_model

    if args.ngpu and not torch.cuda.is_available():
        raise cli.UserError("--ngpu 1, but torch sees no GPU; use --ngpu 0")
    if args.nj > 1:
        torch.set_num_threads(1)  # batches run side by side instead
    model, train_args = load_model(config, model_file, "cuda" if args.ngpu else "cpu")
    recogniser = Recogniser(model, train_args, config.parent)
    utterances = read_utterances(args.data_dir, recogniser.rate)
    _warm_up(recogniser)
    load_seconds = time.perf_counter() - start
    hypotheses, timing = recognise(recogniser, utterances, args.batch_seconds, args.nj)

    # decode.json vouches for the rest: it goes before anything is replaced, and comes back last.
    (output_dir / "decode.json").unlink(missing_ok=True)
    write_hypotheses(output_dir / "1best_recog", hypotheses)
    rtf = timing.decode_seconds / timing.audio_seconds if timing.audio_seconds else None
    facts = {
        "model": str(model_file),
        "params": recogniser.num_parameters,
        "utterances": len(utterances),
        "audio_seconds": round(timing.audio_seconds, 3),
        "decode_seconds": round(timing.decode_seconds, 4),
        "rtf": rtf,
        "read_seconds": round(timing.read_seconds, 4),
        "load_seconds": round(load_seconds, 3),
        "threads": args.nj * torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if args.ngpu else "cpu",
        "batch_seconds": args.batch_seconds,
        **_versions(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "inputs": inputs,
    }
    with replacing(output_dir / "decode.json") as f:
        json.dump(facts, f, indent=2)
        f.write("\n")
    logging.info("%d utterances → %s, real-time factor %s", len(utterances), output_dir, rtf and f"{rtf:.5f}")


def describe_inputs(model_file: Path, data_dir: Path) -> Dict:
    """What a decoding was made from: model file (name, bytes, mtime in ns) and data dir (hash of wav.scp)."""
    stat = model_file.stat()
    try:
        wav_scp = hashlib.sha256((data_dir / "wav.scp").read_bytes()).hexdigest()
    except OSError as e:
        raise cli.UserError(f"cannot read {data_dir}/wav.scp: {e.strerror}; is --data_dir a data dir?") from e
    return {
        "model_file": model_file.name,
        "model_bytes": stat.st_size,
        "model_mtime_ns": stat.st_mtime_ns,
        "wav_scp_sha256": wav_scp,
    }


def is_done(output_dir: Path, inputs: Dict) -> bool:
    """Whether ``output_dir`` holds a whole decoding of just these inputs."""
    try:
        return json.loads((output_dir / "decode.json").read_text(encoding="utf-8"))["inputs"] == inputs
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_hypotheses(directory: Path, hypotheses: Dict) -> None:
    """Write text, token, token_int and score of ``{utt_id: Hypothesis}``, as ESPnet does but with plain scores."""
    columns = {
        "text": lambda h: h.text,
        "token": lambda h: " ".join(h.tokens),
        "token_int": lambda h: " ".join(map(str, h.token_ids)),
        "score": lambda h: f"{h.score:.6f}",
    }
    for name, show in columns.items():
        with replacing(directory / name) as f:
            f.writelines(f"{utt_id} {show(h)}\n" for utt_id, h in hypotheses.items())


def _warm_up(recogniser) -> None:
    """Decode half a second of silence, so that one-time costs stay out of the real-time factor."""
    import numpy as np

    recogniser([np.zeros((recogniser.rate or 16000) // 2, dtype=np.float32)])


def _versions() -> Dict[str, str]:
    import espnet2
    import torch

    return {"torch": torch.__version__, "espnet": espnet2.__version__}


if __name__ == "__main__":
    cli.run(main)
