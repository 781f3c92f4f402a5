"""Stage 3: token lists in ESPnet's form, for ``--token_type`` char, word and bpe; made from texts, or a teacher's.

``tokens.txt`` has one token a line, the line number (from 0) being its id: ``<blank>``, ``<unk>``, the tokens, and
``<sos/eos>`` last.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

from espnet_kd.cli import UserError
from espnet_kd.data.characters import name_character, odd_blank, text_fault
from espnet_kd.data.datadir import iter_lines, os_errors_as_user_errors, split_line
from espnet_kd.data.tokenizing import (
    BLANK,
    BPE_MODEL,
    CLEANER,
    NLSYMS,
    SOS_EOS,
    SPACE,
    UNKNOWN,
    Tokenizer,
    check_model,
    read_symbols,
    usable_pieces,
)
from espnet_kd.experiments.named_files import read_token_list
from espnet_kd.experiments.record import Record
from espnet_kd.files import PathLike, remove_leftovers, replacing

VERSION = 1
TOKEN_TYPES = ("char", "word", "bpe")
# SentencePiece keeps its text in memory, about 25 bytes per character, so that longer texts are sampled. A sample has
# each sentence once: speed-perturbed copies repeat them.
MAX_CHARACTERS = 20_000_000


def make_token_list(
    texts: Sequence[PathLike],
    out_dir: PathLike,
    token_type: str = "char",
    nbpe: int = 500,
    nlsyms: Optional[PathLike] = None,
) -> Path:
    """Make ``out_dir/tokens.txt`` (and ``bpe.model``) from Kaldi-style texts and return its path.

    Args:
        texts: ``text`` files of training data; validation or test texts do not belong here.
        token_type: "char" (blanks become ``<space>``), "word", or "bpe" (a SentencePiece unigram model; texts longer
            than MAX_CHARACTERS are sampled, so that memory does not grow with them).
        nbpe: length of the whole list for "bpe".
        nlsyms: a file of symbols that are not split, one a line, such as ``[NOISE]``. ``<unk>`` in a text, which
            stands for an unintelligible word in TED-LIUM, is always such a symbol: it becomes the token ``<unk>``.

    A second call with the same texts and settings changes nothing.

    Raises:
        UserError: a text is missing or empty, has the name of another special token in it or white space that is not a
            blank, ``nbpe`` does not suit the texts, or words are to be tokens and no text has a blank.
    """
    out_dir = Path(out_dir)
    if token_type not in TOKEN_TYPES:
        raise UserError(f"--token_type {token_type}: known are {', '.join(TOKEN_TYPES)}")
    if nlsyms is not None and not Path(nlsyms).is_file():
        raise UserError(f"--nlsyms {nlsyms}: no such file")
    symbols = read_symbols(Path(nlsyms)) if nlsyms is not None else []
    splitter = Tokenizer("word" if token_type == "word" else "char", symbols=[*symbols, UNKNOWN])
    read = functools.partial(_read_texts, texts, token_type, splitter)  # reads the files at each call, to save memory
    counts = Counter(dict.fromkeys(symbols, 0))
    digest = hashlib.sha256()
    number = 0
    for sentence in read():
        number += 1
        counts.update(splitter.split(sentence))
        digest.update(f"{sentence}\n".encode())
    if not number:
        raise UserError(f"{', '.join(map(str, texts))}: no text to make a token list from")
    settings = {"version": VERSION, "token_type": token_type, "texts": digest.hexdigest()}
    if token_type == "bpe":
        settings["nbpe"] = nbpe
    if counts.pop(UNKNOWN, 0):
        symbols.append(UNKNOWN)
    if symbols:
        settings["nlsyms"] = symbols
    if _is_made(out_dir, settings):
        logging.info("%s: made already from these texts", out_dir / "tokens.txt")
        return out_dir / "tokens.txt"
    model = None
    if token_type == "word" and counts.total() == number:
        raise UserError(
            f"--token_type word: no sentence of {', '.join(map(str, texts))} has a blank; char suits a language that "
            "is written without them"
        )
    if token_type != "bpe":
        tokens = _by_frequency(counts)
    else:
        model = _train_bpe(read() if counts.total() <= MAX_CHARACTERS else _sample(read()), nbpe, number, symbols)
        tokens = [piece for piece in usable_pieces(model) if piece != UNKNOWN]
    beside = {NLSYMS: "".join(f"{symbol}\n" for symbol in symbols)} if symbols and token_type == "char" else {}
    path = _write(out_dir, [BLANK, UNKNOWN, *tokens, SOS_EOS], model, settings, beside)
    logging.info("%s: %d tokens from %d sentences", path, len(tokens) + 3, number)
    return path


def take_token_list(config: Path, content: Mapping[str, Any], out_dir: PathLike, token_type: str = "char") -> Path:
    """Write a teacher's tokens to ``out_dir/tokens.txt`` and return the path.

    The teacher's ``bpe.model``, ``nlsyms.txt`` and ``cleaner``, if it has them, are written there too.

    Args:
        config: the teacher's config.yaml. A file that it names is searched beside it, then relative to each directory
            above it (one of them is the recipe of its training), then relative to the working directory.
        content: the contents of that file.
        token_type: the student's: "char", "word" or "bpe".

    A second call with the same teacher changes nothing.

    Raises:
        UserError: the teacher has another token type, or its tokens or BPE model are not found or do not belong
            together.
    """
    out_dir = Path(out_dir)
    theirs, tokens, model = content.get("token_type"), content.get("token_list"), None
    if theirs != token_type:
        what = f"give --token_type {theirs}" if theirs in TOKEN_TYPES else f"known are {', '.join(TOKEN_TYPES)}"
        raise UserError(f"--token_type {token_type}: the teacher's is {theirs} ({config}); {what}")
    if isinstance(tokens, str):
        tokens = read_token_list(tokens, config)
    if not isinstance(tokens, list) or len(tokens) < 3 or not all(isinstance(t, str) for t in tokens):
        raise UserError(f"{config}: token_list is neither a list of tokens nor the name of a file that has one")
    if token_type == "bpe":
        path = _beside(config, str(content.get("bpemodel")), "bpemodel")
        model = path.read_bytes()
        check_model(tokens, model, str(path), str(config))
    beside = _texts_of(config, content, token_type)
    digest = hashlib.sha256(model or b"").hexdigest()
    settings = {"version": VERSION, "token_type": token_type, "tokens": _hash(tokens), "bpe_model": digest, **beside}
    if _is_made(out_dir, settings):
        logging.info("%s: taken already from this teacher", out_dir / "tokens.txt")
        return out_dir / "tokens.txt"
    written = _write(out_dir, tokens, model, settings, beside)
    logging.info("%s: %d tokens%s, the teacher's", written, len(tokens), "".join(f", {name}" for name in beside))
    return written


def _texts_of(config: Path, content: Mapping[str, Any], token_type: str) -> Dict[str, str]:
    """Return the other files for the tokenization of a teacher's texts: {name: content}."""
    files = {}
    named = content.get("non_linguistic_symbols")
    if named and token_type == "char":  # ESPnet does not use them with other token types
        symbols = read_symbols(_beside(config, str(named), "non_linguistic_symbols"))
        if symbols:
            files[NLSYMS] = "".join(f"{symbol}\n" for symbol in symbols)
    cleaner = content.get("cleaner")
    if cleaner:
        if not isinstance(cleaner, str):
            raise UserError(f"{config}: cleaner is {cleaner!r}; expected the name of one of ESPnet's text cleaners")
        Tokenizer("char", cleaner=cleaner)  # raises an error if the cleaner cannot be used here
        files[CLEANER] = f"{cleaner}\n"
    return files


def _beside(config: Path, name: str, key: str) -> Path:
    """Find a file that a config.yaml names, relative to the directory in which its training ran."""
    places = [config.parent / Path(name).name, *(parent / name for parent in config.resolve().parents), Path(name)]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"{config}: {key}: {name} is found neither in a directory above this file nor in the working directory; copy "
        f"it to {config.parent}"
    )


def _is_made(out_dir: Path, settings: Dict[str, Any]) -> bool:
    """Whether ``out_dir`` holds a complete token list that was made with these settings."""
    needed = ["tokens.txt", "tokens.json"] + ([BPE_MODEL] if settings["token_type"] == "bpe" else [])
    needed += [name for name in (NLSYMS, CLEANER) if name in settings]
    needed += [NLSYMS] if "nlsyms" in settings and settings["token_type"] == "char" else []
    if not all((out_dir / name).exists() for name in needed):
        return False
    return Record(out_dir / "tokens.json").is_of(settings)


def _write(
    out_dir: Path, tokens: Sequence[str], model: Optional[bytes], settings: Dict[str, Any], beside: Mapping[str, str]
) -> Path:
    """Write ``tokens.txt``, ``bpe.model`` and the files ``beside``, and last the record with the settings."""
    with os_errors_as_user_errors(out_dir):
        for name in ("tokens.json", BPE_MODEL, NLSYMS, CLEANER, "tokens.txt"):
            remove_leftovers(out_dir / name)
        for name in ("tokens.json", NLSYMS, CLEANER):
            (out_dir / name).unlink(missing_ok=True)
        if model is not None:
            with replacing(out_dir / BPE_MODEL, "wb") as f:
                f.write(model)
        for name, content in beside.items():
            with replacing(out_dir / name) as f:
                f.write(content)
        with replacing(out_dir / "tokens.txt") as f:
            f.writelines(f"{token}\n" for token in tokens)
        Record(out_dir / "tokens.json").finish(settings)
    return out_dir / "tokens.txt"


def _read_texts(texts: Sequence[PathLike], token_type: str, splitter: Tokenizer) -> Iterator[str]:
    for path in texts:
        for number, line in iter_lines(path):
            key, text = split_line(line)
            if not key:
                continue
            blank = odd_blank(text) if token_type == "char" else None  # BPE treats any white space as a blank
            fault = text_fault(text) or splitter.special_fault(text)
            if not text.strip():
                fault = "the text is empty"
            elif blank:
                fault = f"the text has {name_character(blank)}, which is no plain blank; make it one (stage 2 does)"
            if fault:
                raise UserError(f"{path}:{number}: utterance '{key}': {fault}")
            yield text


def _hash(sentences: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for sentence in sentences:
        digest.update(f"{sentence}\n".encode())
    return digest.hexdigest()


def _by_frequency(counts: Mapping[str, int]) -> List[str]:
    """Return the tokens by falling frequency (ties by code point, where ``<space>`` counts as a blank)."""
    return sorted(counts, key=lambda token: (-counts[token], " " if token == SPACE else token))


def _sample(sentences: Iterable[str]) -> List[str]:
    """Return different sentences, in all at most MAX_CHARACTERS: those with the lowest hashes, in any input order."""
    kept: Dict[int, str] = {}
    hashes: List[int] = []  # a heap of negated hashes: the first item is the highest hash, which is removed next
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


def _train_bpe(sentences: Iterable[str], nbpe: int, number: int, symbols: Sequence[str]) -> bytes:
    """Train a SentencePiece unigram model, in which ``symbols`` stay whole, and return it as the bytes of its file."""
    import sentencepiece

    model, extra = io.BytesIO(), int(UNKNOWN in symbols)
    options: Dict[str, Any] = {"user_defined_symbols": list(symbols)} if symbols else {}
    if extra:
        # SentencePiece splits the name of its own unknown piece into characters. That piece gets another name, so that
        # <unk> can be a symbol. It needs a piece more, because the token list has <unk> in any case.
        options["unk_piece"] = "<unknown>"
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=nbpe + extra,
            **options,
            model_type="unigram",
            character_coverage=1.0,
            input_sentence_size=100_000_000,
            # More threads would add floats in another order, and the list would differ between machines.
            num_threads=1,
            minloglevel=1,
        )
    except (RuntimeError, ValueError, SyntaxError) as e:  # SyntaxError: a number of more than 32 bits
        raise UserError(f"--nbpe {nbpe} does not suit these {number} sentences: {_what_fits(str(e), extra)}") from e
    return model.getvalue()


def _what_fits(message: str, extra: int) -> str:
    """Return advice on --nbpe from SentencePiece's message on a wrong size; ``extra`` is subtracted from its limit."""
    high = re.search(r"too high .*<= (\d+)", message)
    low = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if high:
        return f"give {int(high[1]) - extra} or less, or --token_type char"
    if low:
        return f"give {int(low[1]) - extra} or more, as each character is a piece of its own, or --token_type char"
    return "give a number between some ten and a few thousand, as small as that of the words in them"
