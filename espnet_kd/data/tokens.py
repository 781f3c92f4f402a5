"""Stage 3: token lists in ESPnet's form, for ``--token_type char`` and ``bpe``; made of texts, or a teacher's.

``tokens.txt`` has one token a line, the line number (from 0) being its id: ``<blank>``, ``<unk>``, the tokens, and
``<sos/eos>`` last.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Union

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import iter_lines, os_errors_told, split_line
from espnet_kd.files import read_settings, remove_leftovers, replacing

PathLike = Union[str, Path]
BLANK, UNKNOWN, SOS_EOS, SPACE = "<blank>", "<unk>", "<sos/eos>", "<space>"
VERSION = 1
# SentencePiece holds its text, and takes some 25 bytes a character for it. Speed-perturbed copies say the same again.
MAX_CHARACTERS = 20_000_000


def make_token_list(texts: Sequence[PathLike], out_dir: PathLike, token_type: str = "char", nbpe: int = 500) -> Path:
    """Make ``out_dir/tokens.txt`` (and ``bpe.model``) from Kaldi-style texts and return its path.

    Args:
        texts: ``text`` files of training data; validation or test texts do not belong here.
        token_type: "char" (blanks become ``<space>``) or "bpe" (a SentencePiece unigram model; of texts longer than
            MAX_CHARACTERS a sample, so that memory does not grow with them).
        nbpe: length of the whole list for "bpe".

    The same texts and settings again change nothing.

    Raises:
        UserError: a text is missing or empty, or ``nbpe`` does not suit it.
    """
    out_dir = Path(out_dir)
    if token_type not in ("char", "bpe"):
        raise UserError(f"--token_type {token_type}: known are char and bpe")
    read = functools.partial(_read_texts, texts)  # read anew each time: sentences are not held
    counts = Counter()
    digest = hashlib.sha256()
    number = 0
    for sentence in read():
        number += 1
        counts.update(sentence)
        digest.update(f"{sentence}\n".encode())
    if not number:
        raise UserError(f"{', '.join(map(str, texts))}: no text to make a token list from")
    settings = {"version": VERSION, "token_type": token_type, "texts": digest.hexdigest()}
    if token_type == "bpe":
        settings["nbpe"] = nbpe
    if _is_made(out_dir, settings):
        logging.info("%s: made already from these texts", out_dir / "tokens.txt")
        return out_dir / "tokens.txt"
    model = None
    if token_type == "char":
        tokens = _by_frequency(counts)
    else:
        model = _train_bpe(read() if counts.total() <= MAX_CHARACTERS else _sample(read()), nbpe, number)
        tokens = [piece for piece in read_pieces(model) if piece not in ("<unk>", "<s>", "</s>")]
    path = _write(out_dir, [BLANK, UNKNOWN, *tokens, SOS_EOS], model, settings)
    logging.info("%s: %d tokens from %d sentences", path, len(tokens) + 3, number)
    return path


def take_token_list(config: Path, content: Mapping[str, Any], out_dir: PathLike, token_type: str = "char") -> Path:
    """Write a teacher's tokens to ``out_dir/tokens.txt`` (and its ``bpe.model`` beside) and return the path.

    Args:
        config: its config.yaml. Files that it names are looked for beside it, then where the name leads from each
            directory above it (the recipe it was trained in), then from here.
        content: what that says.
        token_type: "char" or "bpe": what the student is to have.

    The same teacher again changes nothing.

    Raises:
        UserError: the teacher has another token type, or its tokens or BPE model are not found or do not belong
            together.
    """
    out_dir = Path(out_dir)
    theirs, tokens, model = content.get("token_type"), content.get("token_list"), None
    if theirs != token_type:
        what = f"give --token_type {theirs}" if theirs in ("char", "bpe") else "known are char and bpe"
        raise UserError(f"--token_type {token_type}: the teacher's is {theirs} ({config}); {what}")
    if isinstance(tokens, str):
        tokens = [line for _, line in iter_lines(_beside(config, tokens, "token_list"))]
    if not isinstance(tokens, list) or len(tokens) < 3 or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"{config}: token_list is neither a list of tokens nor the name of a file that has one")
    if token_type == "bpe":
        path = _beside(config, str(content.get("bpemodel")), "bpemodel")
        model = path.read_bytes()
        pieces = set(read_pieces(model, str(path)))
        absent = [t for t in tokens if t not in pieces and t not in (BLANK, UNKNOWN, SOS_EOS)]
        if absent:
            raise UserError(f"{path} does not belong to {config}: it has no pieces {' '.join(absent[:5])}")
    digest = hashlib.sha256(model or b"").hexdigest()
    settings = {"version": VERSION, "token_type": token_type, "tokens": _hash(tokens), "bpe_model": digest}
    if _is_made(out_dir, settings):
        logging.info("%s: taken already from this teacher", out_dir / "tokens.txt")
        return out_dir / "tokens.txt"
    written = _write(out_dir, tokens, model, settings)
    logging.info("%s: %d tokens, the teacher's", written, len(tokens))
    return written


def _beside(config: Path, name: str, key: str) -> Path:
    """Find a file that a config.yaml names, relative to the directory in which its training ran."""
    places = [config.parent / Path(name).name, *(parent / name for parent in config.resolve().parents), Path(name)]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{config} names {key} {name}, which is found neither from there nor from here; copy it beside it")


def _is_made(out_dir: Path, settings: Dict[str, Any]) -> bool:
    """Whether ``out_dir`` holds a list made with these settings, whole."""
    needed = ["tokens.txt", "tokens.json"] + (["bpe.model"] if settings["token_type"] == "bpe" else [])
    if not all((out_dir / name).exists() for name in needed):
        return False
    return read_settings(out_dir / "tokens.json") == settings


def _write(out_dir: Path, tokens: Sequence[str], model: Optional[bytes], settings: Dict[str, Any]) -> Path:
    """Write ``tokens.txt`` and ``bpe.model``, and last the settings they were made with."""
    with os_errors_told(out_dir):
        for name in ("tokens.json", "bpe.model", "tokens.txt"):
            remove_leftovers(out_dir / name)
        (out_dir / "tokens.json").unlink(missing_ok=True)
        if model is not None:
            with replacing(out_dir / "bpe.model", "wb") as f:
                f.write(model)
        with replacing(out_dir / "tokens.txt") as f:
            f.writelines(f"{token}\n" for token in tokens)
        with replacing(out_dir / "tokens.json") as f:
            json.dump(settings, f)
    return out_dir / "tokens.txt"


def _read_texts(texts: Sequence[PathLike]) -> Iterator[str]:
    for path in texts:
        for number, line in iter_lines(path):
            key, text = split_line(line)
            if key and not text:
                raise UserError(f"{path}:{number}: utterance '{key}': the text is empty")
            if key:
                yield text


def _hash(sentences: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update(f"{sentence}\n".encode())
    return digest.hexdigest()


def _by_frequency(counts: Mapping[str, int]) -> List[str]:
    """Return the characters by falling frequency (ties by code point), the blank as ``<space>``."""
    ordered = sorted(counts, key=lambda char: (-counts[char], char))
    return [SPACE if char == " " else char for char in ordered]


def _sample(sentences: Iterable[str]) -> List[str]:
    """Return different sentences of at most MAX_CHARACTERS: those whose hashes come first, whatever their order."""
    kept: Dict[int, str] = {}
    hashes: List[int] = []  # a heap of negative ones, so that its first is the next to go
    characters, limit = 0, 1 << 64
    for sentence in sentences:
        value = int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "big")
        if value >= limit or value in kept:
            continue
        kept[value] = sentence
        heapq.heappush(hashes, -value)
        characters += len(sentence)
        while characters > MAX_CHARACTERS:
            limit = -heapq.heappop(hashes)
            characters -= len(kept.pop(limit))
    logging.info("the BPE model is trained on %d different sentences, %d characters", len(kept), characters)
    return [kept[value] for value in sorted(kept)]


def read_pieces(model: bytes, name: str = "the BPE model") -> List[str]:
    """Return all pieces of a SentencePiece model, in order (:class:`UserError` naming ``name`` where it is none)."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
        raise UserError(f"{name} is not a SentencePiece model: {e}") from e
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def _train_bpe(sentences: Iterable[str], nbpe: int, number: int) -> bytes:
    """Train a SentencePiece unigram model and return it as the bytes of its file."""
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
    except (RuntimeError, ValueError, SyntaxError) as e:  # SyntaxError: a number of more than 32 bits
        # SentencePiece says what would fit, e.g. "Vocabulary size too high (500). Please set it to a value <= 123."
        raise UserError(f"--nbpe {nbpe} does not suit these {number} sentences: {e}") from e
    return model.getvalue()
