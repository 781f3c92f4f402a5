"""Transcribe a data dir with a Whisper model, for asr_kd_pseudo; needs pip install faster-whisper.

    python local/whisper_labels.py --model small.en --data_dir dump/raw/extra --out whisper.jsonl

The output has one JSON object per line. --model is a directory in the format of CTranslate2, or a name that
faster-whisper downloads from the Hugging Face hub. The confidence is the mean probability of the tokens; no_speech and
compression are Whisper's own signs of hallucination.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import soxr
from tqdm import tqdm

from espnet_kd.cli import UserError, check_positive, run
from espnet_kd.files import replacing
from espnet_kd.inference.recognise import AudioFile, read_audio, read_utterances

RATE = 16000  #: sampling rate of the audio that Whisper takes, in Hz


def transcribe(whisper: Any, utterance: AudioFile, language: str) -> Dict[str, Any]:
    """Text and confidences of one utterance."""
    audio = read_audio(utterance)
    if utterance.rate != RATE:
        audio = soxr.resample(audio, utterance.rate, RATE)
    segments = list(whisper.transcribe(audio, language=language, temperature=0)[0])
    tokens = sum(len(s.tokens) for s in segments)
    mean = sum(s.avg_logprob * len(s.tokens) for s in segments) / max(tokens, 1)
    return {
        "text": " ".join(s.text.strip() for s in segments),
        "confidence": math.exp(mean) if tokens else 0.0,
        "no_speech": max((s.no_speech_prob for s in segments), default=1.0),
        "compression": max((s.compression_ratio for s in segments), default=0.0),
    }


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Transcribe a formatted data dir."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, or name such as small.en")
    parser.add_argument("--data_dir", required=True, type=Path, help="formatted data dir (stage 2)")
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument("--language", default="en", help="code of the language (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default: %(default)s)")
    args = parser.parse_args(argv)
    check_positive(args, "threads")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a directory; give a file")
    utterances = read_utterances(args.data_dir)
    try:
        from faster_whisper import WhisperModel
    except ImportError as e:
        raise UserError(f"{e}; pip install faster-whisper") from e
    try:
        whisper = WhisperModel(args.model, device=args.device, compute_type="int8", cpu_threads=args.threads)
    except (OSError, RuntimeError, ValueError) as e:  # no such name or directory, files missing, no network, no GPU
        raise UserError(f"--model {args.model} on --device {args.device}: {e}") from e
    with replacing(args.out) as f:
        for utterance in tqdm(utterances, desc=str(args.out), unit="utt"):
            found = {"utt_id": utterance.utt_id, **transcribe(whisper, utterance, args.language)}
            f.write(json.dumps(found, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run(main)
