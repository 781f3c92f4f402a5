"""Stage 3: token lists in ESPnet's form, for ``--token_type char`` and ``bpe``.

``tokens.txt`` has one token a line, the line number (from 0) being its id: ``<blank>``, ``<unk>``, the tokens, and
``<sos/eos>`` last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Iterator, List, Sequence, Union

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines, split_line
from espnet_kd.files import replacing

PathLike = Union[str, Path]
BLANK, UNKNOWN, SOS_EOS, SPACE = "<blank>", "<unk>", "<sos/eos>", "<space>"
VERSION = 1


def make_token_list(texts: Sequence[PathLike], out_dir: PathLike, token_type: str = "char", nbpe: int = 500) -> Path:
    """Make ``out_dir/tokens.txt`` (and ``bpe.model``) from Kaldi-style texts and return its path.

    Args:
        texts: ``text`` files of training data; validation or test texts do not belong here.
        token_type: "char" (blanks become ``<space>``) or "bpe" (a SentencePiece unigram model).
        nbpe: length of the whole list for "bpe".

    The same texts and settings again change nothing.

    Raises:
        UserError: a text is missing or empty, or ``nbpe`` does not suit it.
    """
    out_dir = Path(out_dir)
    if token_type not in ("char", "bpe"):
        raise UserError(f"--token_type {token_type}: known are char and bpe")
    sentences = [sentence for path in texts for sentence in _read_texts(path)]
    if not sentences:
        raise UserError(f"{', '.join(map(str, texts))}: no text to make a token list from")
    settings = {"version": VERSION, "token_type": token_type, "texts": _hash(sentences)}
    if token_type == "bpe":
        settings["nbpe"] = nbpe
    path, marker = out_dir / "tokens.txt", out_dir / "tokens.json"
    needed = [path] + ([out_dir / "bpe.model"] if token_type == "bpe" else [])
    if all(p.exists() for p in needed) and marker.exists():
        try:
            if json.loads(marker.read_text(encoding="utf-8")) == settings:
                logging.info("%s: made already from these texts", path)
                return path
        except json.JSONDecodeError:
            pass
    marker.unlink(missing_ok=True)
    tokens = count_characters(sentences) if token_type == "char" else _train_bpe(sentences, out_dir, nbpe)
    with replacing(path) as f:
        f.writelines(f"{token}\n" for token in [BLANK, UNKNOWN, *tokens, SOS_EOS])
    with replacing(marker) as f:
        json.dump(settings, f)
    logging.info("%s: %d tokens from %d sentences", path, len(tokens) + 3, len(sentences))
    return path


def _read_texts(path: PathLike) -> Iterator[str]:
    for number, line in iter_lines(path):
        key, text = split_line(line)
        if key and not text:
            raise UserError(f"{path}:{number}: utterance '{key}': the text is empty")
        if key:
            yield text


def _hash(sentences: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update(f"{sentence}\n".encode())
    return digest.hexdigest()


def count_characters(sentences: Sequence[str]) -> List[str]:
    """Return the characters by falling frequency (ties by code point), the blank as ``<space>``."""
    counts = Counter(char for sentence in sentences for char in sentence)
    ordered = sorted(counts, key=lambda char: (-counts[char], char))
    return [SPACE if char == " " else char for char in ordered]


def _train_bpe(sentences: Sequence[str], out_dir: Path, nbpe: int) -> List[str]:
    """Train a SentencePiece unigram model, write ``bpe.model`` and return its pieces but the three special ones."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=nbpe,
            model_type="unigram",
            character_coverage=1.0,
            input_sentence_size=100_000_000,
            # More threads add floats in another order: the list would not be the same on every machine.
            num_threads=1,
            minloglevel=1,
        )
    except (RuntimeError, ValueError) as e:
        # SentencePiece says what would fit, e.g. "Vocabulary size too high (500). Please set it to a value <= 123."
        raise UserError(f"--nbpe {nbpe} does not suit these {len(sentences)} sentences: {e}") from e
    with replacing(out_dir / "bpe.model", "wb") as f:
        f.write(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    return [piece for piece in pieces if piece not in ("<unk>", "<s>", "</s>")]
