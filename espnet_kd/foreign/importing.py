"""Writing a CTC model of another toolkit as a finished ESPnet experiment: config.yaml, model.pth, tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import torch
import yaml
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.files import replacing
from espnet_kd.foreign import encoders
from espnet_kd.foreign.pieces import has_pieces, sentencepiece_model
from espnet_kd.foreign.sources import CONFIG, RECORD, need, read_features, read_mapping, weights_of
from espnet_kd.foreign.vocabulary import Vocabulary, make_vocabulary
from espnet_kd.pieces import BPE_MODEL, SPACE, UNKNOWN, WORD_START

#: Names of the CTC blank; names that can have no other meaning come first.
BLANKS = ("<blank>", "<blk>", "<pad>", "[PAD]")
#: Names of the token for unknown characters.
UNKNOWNS = (UNKNOWN, "[UNK]")
#: Names of the token between words.
DELIMITERS = ("|", WORD_START, SPACE, " ")
#: Options of a feature extractor that only name classes; they are left out.
NAMES_OF_CLASSES = ("feature_extractor_type", "processor_class")


@dataclass
class Imported:
    """A model that is ready to be written."""

    encoder: str  #: a name of :data:`espnet_kd.foreign.encoders.ENCODERS`
    encoder_conf: Dict[str, Any]
    vocabulary: Vocabulary
    head: Tuple[Tensor, Optional[Tensor]]  #: weight (V', D), bias (V',) or None
    state: Dict[str, Tensor]  #: parameters of the encoder
    sampling_rate: int  #: Hz
    token_type: str = "char"
    pieces: Optional[bytes] = None  #: SentencePiece model, with the token type bpe
    record: Dict[str, Any] = field(default_factory=dict)


def import_model(
    source: str, output_dir: Path, files: Sequence[Path], record: Mapping[str, Any], **options: Any
) -> None:
    """Write the model of ``files`` (:func:`espnet_kd.foreign.sources.find_source`) to ``output_dir``.

    Args:
        options: options of :func:`read_onnx`, for an ONNX file.

    Raises:
        UserError: the model is damaged, or could run code.
    """
    if source.startswith("hf:"):
        model = read_hugging_face(files[0].parent)
    else:
        model = read_onnx(files[0], files[1], **options)
    model.record = dict(record)
    write_experiment(model, output_dir)


def read_hugging_face(directory: Path) -> Imported:
    """Read a fine-tuned CTC model of Hugging Face's; nothing in the directory is run.

    Raises:
        UserError: a file is missing, damaged or does not fit the others; or the model has code of its own.
    """
    config = read_mapping(directory / CONFIG)
    if config.get("auto_map"):
        raise UserError(f"{directory / CONFIG}: the model has code of its own (auto_map), which is not run here")
    transformers = need("transformers")
    if isinstance(config.get("pad_token_id"), int) and isinstance(config.get("vocab_size"), int):
        _check_blank(config["pad_token_id"], config["vocab_size"], directory)  # before transformers warns of it
    model = encoders.build_hugging_face(config)
    state = {}
    for path in weights_of(directory):
        try:
            state.update(need("safetensors.torch").load_file(path))
        except Exception as e:  # SafetensorError, OSError
            raise UserError(f"cannot read {path}: {e}") from e
    state = _renamed_weight_norm(state, model.state_dict())
    missing, _ = model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()}, strict=False)
    if missing:
        raise UserError(f"{directory}: {missing[0]} is missing from its weights ({len(missing)} in all)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_fast=None
        )
    except Exception as e:  # transformers raises many kinds of errors
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"{directory}: transformers cannot read its tokenizer: {reason}") from e
    head = encoders.ctc_head(model)
    weight = head.weight.detach().reshape(head.weight.size(0), -1)
    names = _names(tokenizer.get_vocab(), len(weight), directory)
    blank = config.get("pad_token_id", tokenizer.pad_token_id)
    _check_blank(blank, len(names), directory)
    # Without a tokenizer_config.json, transformers gives | and <unk>, whatever the vocabulary has.
    delimiter = next((t for t in (getattr(tokenizer, "word_delimiter_token", None), " ") if t in names), None)
    unknown = next((t for t in (tokenizer.unk_token, *UNKNOWNS) if t in names), tokenizer.unk_token)
    left_out = {t for t in tokenizer.all_special_tokens if t not in (unknown, delimiter)} | _blanks(names, delimiter)
    vocabulary = _vocabulary(directory, names, blank, delimiter, unknown, left_out)
    pieces = None
    if has_pieces(tokenizer):
        pieces = sentencepiece_model(tokenizer, vocabulary.tokens, directory / "tokenizer.json")
    features = read_features(directory)
    family = config["model_type"]
    conf: Dict[str, Any] = {"model": json.loads(json.dumps({**model.config.to_dict(), "model_type": family}))}
    if family in encoders.FEATURES:
        conf["features"] = {k: v for k, v in features.items() if k not in NAMES_OF_CLASSES}
    else:
        conf["normalize"] = bool(features.get("do_normalize", True))
    base, _ = encoders.base_model(model)
    return Imported(
        "hugging_face_ctc",
        conf,
        vocabulary,
        (weight, None if head.bias is None else head.bias.detach()),
        {f"model.{k}": v for k, v in base.state_dict().items()},
        int(features.get("sampling_rate", 16000)),
        "bpe" if pieces is not None else _token_type(vocabulary),
        pieces,
    )


def read_onnx(
    path: Path,
    tokens: Path,
    blank: Optional[int] = None,
    word_delimiter: Optional[str] = None,
    fs: Optional[int] = None,
) -> Imported:
    """Read an ONNX file that maps audio (B, N) to CTC scores (B, T, V').

    Args:
        tokens: a file with V' tokens, one a line; numbers after the tokens (sherpa-onnx's tokens.txt) are left out.
        blank: number of the CTC blank; default: the first of ``BLANKS`` that is among the tokens.
        word_delimiter: the token between words; default: the first of ``DELIMITERS`` that is among the tokens.
        fs: sampling rate in Hz; default 16000.

    Raises:
        UserError: a file or an option, which the message names, is wrong.
    """
    rows = _lines(tokens)
    content = path.read_bytes()
    try:
        session = encoders.open_graph(content)
        audio, _ = encoders.graph_inputs(session)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    rate, single = 16000 if fs is None else fs, audio.shape[0] == 1
    if rate < 1:
        raise UserError(f"--fs {rate}: a sampling rate is a positive number of Hz")
    if isinstance(audio.shape[1], int):
        raise UserError(
            f"{path}: its input has {audio.shape[1]} samples, and no other number; export it with a dynamic axis for "
            "the samples (dynamic_axes of torch.onnx.export)"
        )
    out, longer = (_scores(session, seconds, rate, path) for seconds in (1, 3))
    if out.dim() != 3 or out.size(2) != len(rows):
        raise UserError(
            f"{path}: the first output must be (utterances, frames, {len(rows)} tokens of {tokens}); "
            f"found {tuple(out.shape)}"
        )
    if longer.size(1) <= out.size(1):
        raise UserError(
            f"{path}: 1 s of audio has {out.size(1)} frames, and 3 s have {longer.size(1)}: the output does not follow "
            "the length of the audio; export it with dynamic axes (dynamic_axes of torch.onnx.export)"
        )
    if blank is None:
        blank = next((rows.index(t) for t in BLANKS if t in rows), None)
        if blank is None:
            raise UserError(f"{tokens}: which token is the CTC blank cannot be seen; give --blank NUMBER")
    if not 0 <= blank < len(rows):
        raise UserError(f"--blank {blank}: {tokens} has the tokens 0 to {len(rows) - 1}")
    if word_delimiter is None:
        word_delimiter = next((t for t in DELIMITERS if t in rows), None)
    elif word_delimiter not in rows:
        raise UserError(f"--word_delimiter: {tokens} has no token {word_delimiter!r}")
    # Tokens that a text cannot contain: marks such as <s>, and white space that is not the word delimiter.
    marks = {t for t in rows if t[:1] == "<" and t[-1:] == ">"} | _blanks(rows, word_delimiter)
    unknown = next((t for t in UNKNOWNS if t in rows), UNKNOWN)
    vocabulary = _vocabulary(tokens, rows, blank, word_delimiter, unknown, marks - {word_delimiter})
    conf = dict(
        graph_bytes=len(content),
        tokens=len(rows),
        probabilities=bool((out >= 0).all() and (out.sum(-1) - 1).abs().max() < 1e-2),
        single=single,
    )
    return Imported(
        "onnx_ctc",
        conf,
        vocabulary,
        (torch.eye(len(rows)), None),
        {"graph": encoders.content_of(content)},
        rate,
        _token_type(vocabulary),
    )


def _scores(session: Any, seconds: int, rate: int, path: Path) -> Tensor:
    """The first output of an ONNX file for noise; (1, T, V') if it is a model that can be imported."""
    try:
        return torch.from_numpy(encoders.run_graph(session, torch.randn(1, seconds * rate).mul(0.1).numpy()))
    except RuntimeError as e:
        raise UserError(f"{path}: it cannot run on {seconds} s of noise at {rate} Hz: {e}") from e


def write_experiment(model: Imported, output_dir: Path) -> None:
    """Write bpe.model, model.pth and last config.yaml, so that a directory that has config.yaml is complete."""
    weight, bias = model.vocabulary.head(*model.head)
    state = {f"encoder.{k}": v.contiguous() for k, v in model.state.items()}
    state.update({"ctc.ctc_lo.weight": weight, "ctc.ctc_lo.bias": bias})
    config = {
        **_espnet_defaults(),
        "token_list": model.vocabulary.tokens,
        "token_type": model.token_type,
        **({"bpemodel": BPE_MODEL} if model.pieces is not None else {}),
        "input_size": 1,
        "frontend": None,
        "frontend_conf": {"fs": model.sampling_rate},
        "specaug": None,
        "normalize": None,
        "encoder": model.encoder,
        "encoder_conf": model.encoder_conf,
        "decoder": None,
        "model_conf": {"ctc_weight": 1.0},
        RECORD: model.record,
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    if model.pieces is not None:
        with replacing(output_dir / BPE_MODEL, "wb") as f:
            f.write(model.pieces)
    with replacing(output_dir / "model.pth", "wb") as f:
        torch.save(state, f)
    with replacing(output_dir / "config.yaml") as f:
        yaml.safe_dump(config, f, allow_unicode=True, sort_keys=False)


def _espnet_defaults() -> Dict[str, Any]:
    """ESPnet's default options for a training."""
    from espnet_kd.offline import ASRTask

    config = ASRTask.get_default_config()
    return json.loads(json.dumps({k: v for k, v in config.items() if k not in ("config", "token_list")}))


def _check_blank(blank: Any, rows: int, directory: Path) -> None:
    if not isinstance(blank, int) or not 0 <= blank < rows:
        raise UserError(
            f"{directory / CONFIG}: pad_token_id, which is the CTC blank, is {blank!r}; the model has the tokens 0 to "
            f"{rows - 1}"
        )


def _vocabulary(where: Path, *given: Any) -> Vocabulary:
    """Call :func:`make_vocabulary`, and add the directory or file ``where`` to its errors."""
    try:
        return make_vocabulary(*given)
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def _names(vocabulary: Mapping[str, int], rows: int, directory: Path) -> List[str]:
    """The token of each row of the head; a row without a token gets a name such as ``<unused5>``."""
    if any(not 0 <= row < rows for row in vocabulary.values()):
        longest = max(vocabulary.values()) + 1
        if longest > rows + 2:  # Wav2Vec2CTCTokenizer adds <s> and </s> to a vocabulary without them
            raise UserError(f"{directory}: {longest} tokens in its vocabulary, and the model's head has {rows}")
    names = [f"<unused{i}>" for i in range(rows)]
    for token, row in vocabulary.items():
        if row < rows:
            names[row] = token
    return names


def _blanks(names: Sequence[str], delimiter: Optional[str]) -> Set[str]:
    """Tokens of white space other than the delimiter between words, which no transcript has."""
    return {t for t in names if t and not t.strip() and t != delimiter}


def _token_type(vocabulary: Vocabulary) -> str:
    """``char`` if all tokens are single characters, else ``word``: longer tokens (phones) are separated by blanks."""
    named = [t for t in vocabulary.tokens if not (t.startswith("<") and t.endswith(">"))]
    return "char" if all(len(t) == 1 for t in named) else "word"


def _renamed_weight_norm(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Rename the parts of weights under weight normalisation, which older versions of torch saved by other names."""
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    renamed = {}
    for key, value in state.items():
        stem, _, last = key.rpartition(".")
        other = f"{stem}.{new[last]}" if last in new else key
        renamed[other if other in wanted and key not in wanted else key] = value
    return renamed


def _lines(path: Path) -> List[str]:
    """The tokens of a file, one a line, without the numbers that follow them in sherpa-onnx's files.

    In these a line with nothing but its number has the token of a blank.
    """
    try:
        # Not splitlines(), which ends a line at characters that may be tokens; -sig skips a byte order mark.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--tokens: cannot read {path}: {e}") from e
    found = [re.fullmatch(r"(?:(.*?)[ \t]+)?([0-9]+)", line) for line in lines]
    numbered = [match[1] or " " for i, match in enumerate(found) if match and match[2] == str(i)]
    return numbered if len(numbered) == len(lines) and numbered.count(" ") <= 1 else lines
