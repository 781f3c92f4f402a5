"""ESPnet encoders that run a CTC model of another toolkit on audio.

An experiment's config.yaml chooses them like any encoder of ESPnet (``encoder: hugging_face_ctc``), so that such a
model works as an ESPnet model everywhere: in training, for the target cache, at inference.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from espnet2.asr.encoder.abs_encoder import AbsEncoder
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_kd.cli import UserError
from espnet_kd.foreign.sources import need
from espnet_kd.foreign.vocabulary import ABSENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Model families of Hugging Face's that take samples; these encoders normalise the samples themselves.
SAMPLES = ("wav2vec2", "hubert", "wavlm", "wav2vec2-conformer", "data2vec-audio", "unispeech", "unispeech-sat", "sew")
#: Model families that take features, each with the class of transformers that computes the features.
FEATURES = {"wav2vec2-bert": "SeamlessM4TFeatureExtractor", "parakeet_ctc": "ParakeetFeatureExtractor"}
#: Entries of config.json that do not describe the model, or its dtype: a teacher on a CPU computes in float32.
NO_OPTIONS = ("model_type", "auto_map", "transformers_version", "torch_dtype", "dtype")
#: Added to the variance when audio is normalised, as in transformers' Wav2Vec2FeatureExtractor.
EPS = 1e-7


class ForeignEncoder(AbsEncoder):
    """Base of the encoders of other toolkits.

    Utterances of different length never share a batch: many of these models normalise over time, so that the padding
    would change their output.
    """

    #: For :func:`espnet_kd.inference.encode.probe`: long test signals need no more memory than long utterances.
    long_probes = True
    #: For :func:`espnet_kd.inference.padding.make_encoder_exact`: the output for an utterance is the same in any batch.
    no_padding = True

    def run(self, speech: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Run on utterances (B, N) of equal length.

        Returns:
            (B, T, D) and each layer's hidden states, (B, T, D); an empty list if no hook records these
        """
        raise NotImplementedError(f"{type(self).__name__} needs a run method")

    def forward(
        self, xs_pad: Tensor, ilens: Tensor, prev_states: Optional[Tensor] = None
    ) -> Tuple[Tensor, Tensor, None]:
        """Encode audio (B, N) of ``ilens`` (B,) samples; returns (B, T, D), frames (B,), None."""
        lengths = ilens.tolist()
        rows: List[Tensor] = [xs_pad] * len(lengths)  # each is replaced below
        layers: List[List[Tensor]] = [[] for _ in lengths]
        for n in sorted(set(lengths)):
            group = [i for i, length in enumerate(lengths) if length == n]
            out, hidden = self.run(xs_pad[group, :n])
            for j, i in enumerate(group):
                rows[i] = out[j]
                layers[i] = [h[j] for h in hidden]
        for tap, of_layer in zip(getattr(self, "encoders", ()), zip(*layers)):
            tap(pad_sequence(list(of_layer), batch_first=True))
        frames = torch.tensor([len(x) for x in rows], device=xs_pad.device)
        return pad_sequence(rows, batch_first=True), frames, None


class Tap(torch.nn.Module):
    """A module in a foreign encoder through which the hidden states of a layer pass, so that a hook can record them."""

    def forward(self, hidden: Tensor) -> Tuple[Tensor]:
        """Return ``hidden`` in the form in which ESPnet's layers return it."""
        return (hidden,)


class HuggingFaceCTCEncoder(ForeignEncoder):
    """The encoder of a CTC model of Hugging Face's ``transformers``, without its head; needs that package.

    Args:
        input_size: 1, as for every encoder of ESPnet that takes samples.
        model: the model's config.json.
        normalize: bring each utterance to zero mean and unit variance, as the model's feature extractor does.
        features: options of the feature extractor, for families that take features.

    Raises:
        UserError: transformers is not installed, or the family is not known.
    """

    normalize_before = False  # the recorded hidden states need no further layer norm

    def __init__(
        self,
        input_size: int,
        model: Mapping[str, Any],
        normalize: bool = False,
        features: Optional[Mapping[str, Any]] = None,
    ):
        super().__init__()
        self.model, self._output_size = base_model(build_hugging_face(model))
        self.normalize = normalize
        self.extractor = _extractor(model["model_type"], features) if features is not None else None
        # With an adapter after the layers, or SEW's squeezing before them, their frames are not those of the output.
        config = self.model.config
        same_frames = not getattr(config, "add_adapter", False) and getattr(config, "squeeze_factor", 1) == 1
        self.encoders = torch.nn.ModuleList(Tap() for _ in range(int(config.num_hidden_layers) if same_frames else 0))

    def output_size(self) -> int:
        """Width of the hidden states."""
        return self._output_size

    def run(self, speech: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """See :class:`ForeignEncoder`."""
        wanted = any(tap._forward_hooks for tap in self.encoders)
        if self.extractor is not None:
            given = self.extractor(
                list(speech.float().cpu().numpy()), sampling_rate=self.extractor.sampling_rate, return_tensors="pt"
            )
            given = {k: v.to(speech.device) for k, v in given.items() if k in ("input_features", "attention_mask")}
        else:
            if self.normalize:
                mean, var = speech.mean(1, keepdim=True), speech.var(1, keepdim=True, unbiased=False)
                speech = (speech - mean) / (var + EPS).sqrt()
            given = {"input_values": speech}
        out = self.model(**given, output_hidden_states=wanted)
        return out.last_hidden_state, list(out.hidden_states[1:]) if wanted else []


class OnnxCTCEncoder(ForeignEncoder):
    """An ONNX file that maps audio (B, N) to CTC scores (B, T, V'); runs in onnxruntime, which must be installed.

    The file is a buffer of the model, so that an experiment's .pth file holds all of it.

    Args:
        input_size: 1, as for every encoder of ESPnet that takes samples.
        graph_bytes: size of the file.
        tokens: V'.
        probabilities: the file gives probabilities rather than logits or log-probabilities.
        single: the file takes one utterance at a time.
    """

    #: For the number of parameters, which are in the graph: the model's own are only the order of its tokens.
    is_graph = True

    def __init__(
        self, input_size: int, graph_bytes: int, tokens: int, probabilities: bool = False, single: bool = False
    ):
        super().__init__()
        self.register_buffer("graph", torch.zeros(graph_bytes, dtype=torch.uint8))
        self.tokens, self.probabilities, self.single = tokens, probabilities, single
        self._session: Any = None

    def output_size(self) -> int:
        """Number of tokens of the file."""
        return self.tokens

    def __getstate__(self) -> Dict[str, Any]:
        """The state without the session, which cannot be copied, and is made again when it is needed."""
        return {**self.__dict__, "_session": None}

    def run(self, speech: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """See :class:`ForeignEncoder`."""
        if self._session is None:
            self._session = open_graph(self.graph.cpu().numpy().tobytes())
        given = speech.float().cpu()
        parts = given.split(1) if self.single else [given]
        out = torch.cat([torch.from_numpy(run_graph(self._session, part.numpy())) for part in parts])
        out = out.to(speech.device)
        # Finite, also where a file masks a token by -inf, from which the identity matrix of the head would make NaN.
        return (out.clamp(min=torch.finfo(out.dtype).tiny).log() if self.probabilities else out.clamp(min=ABSENT)), []


#: {value of ``encoder`` in config.yaml: class}.
ENCODERS = {"hugging_face_ctc": HuggingFaceCTCEncoder, "onnx_ctc": OnnxCTCEncoder}


@contextlib.contextmanager
def known_to_espnet() -> Iterator[None]:
    """Register the encoders of this module while ESPnet builds a model."""
    from espnet2.tasks.asr import encoder_choices

    encoder_choices.classes.update(ENCODERS)
    try:
        yield
    finally:
        for name in ENCODERS:
            encoder_choices.classes.pop(name, None)


def build_hugging_face(config: Mapping[str, Any]) -> PreTrainedModel:
    """A CTC model of transformers with random values.

    Args:
        config: contents of config.json.

    Raises:
        UserError: transformers is not installed; or the family is unknown here, or brings code of its own.
    """
    transformers = need("transformers")
    family = config.get("model_type")
    if family not in SAMPLES and family not in FEATURES:
        known = ", ".join((*SAMPLES, *FEATURES))
        raise UserError(f"model_type: {family} is not a CTC family that can be imported; known: {known}")
    options = {k: v for k, v in config.items() if k not in NO_OPTIONS}
    try:
        return transformers.AutoModelForCTC.from_config(
            transformers.AutoConfig.for_model(family, **options), trust_remote_code=False
        )
    except Exception as e:  # transformers, huggingface_hub and torch raise different errors for wrong values
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"transformers cannot build the model_type {family} of this configuration: {reason}") from e


def base_model(model: PreTrainedModel) -> Tuple[PreTrainedModel, int]:
    """The model below the CTC head, and the width of its output."""
    head = ctc_head(model)
    base: Any = getattr(model, model.base_model_prefix, None)
    if base is None or base is model:
        base = model.encoder
    return base, head.weight.size(1)


def ctc_head(model: PreTrainedModel) -> Union[torch.nn.Linear, torch.nn.Conv1d]:
    """The head of a CTC model of transformers: weight (V', D) or, as a convolution, (V', D, 1); and bias (V',)."""
    head: Any = model.lm_head if hasattr(model, "lm_head") else model.ctc_head
    return head


def _extractor(family: str, options: Mapping[str, Any]) -> Any:
    return getattr(need("transformers"), FEATURES[family])(**options)


def open_graph(content: bytes) -> Any:
    """An onnxruntime session of an ONNX file's content.

    Raises:
        UserError: it is no ONNX model that onnxruntime can run.
    """
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal errors only, because errors are raised as well
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as e:  # onnxruntime raises a different class for each kind of error
        raise UserError(f"onnxruntime cannot run the ONNX file: {next(iter(str(e).splitlines()), e)}") from e


def graph_inputs(session: Any) -> Tuple[Any, Optional[Any]]:
    """The inputs of an ONNX file: audio (B, N), and the number of samples (B,) where the graph has that input.

    Raises:
        UserError: it has other inputs.
    """
    inputs = session.get_inputs()
    audio = [i for i in inputs if "float" in i.type and len(i.shape) == 2]
    lengths = [i for i in inputs if "int" in i.type and len(i.shape) == 1]
    if len(audio) != 1 or len(lengths) > 1 or len(audio) + len(lengths) != len(inputs):
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise UserError(
            "the input must be audio, float (utterances, samples), and beside it nothing but the number of samples; "
            f"found: {found}"
        )
    return audio[0], lengths[0] if lengths else None


def run_graph(session: Any, speech: np.ndarray) -> np.ndarray:
    """Scores (B, T, V'), float32, of audio (B, N) without padding.

    Raises:
        RuntimeError: onnxruntime fails, as it does on audio that is too short for the model.
    """
    audio, lengths = graph_inputs(session)
    given = {audio.name: speech}
    if lengths is not None:
        kind = np.int32 if "int32" in lengths.type else np.int64
        given[lengths.name] = np.full(len(speech), speech.shape[1], kind)
    try:
        outputs = session.run(None, given)
    except Exception as e:  # onnxruntime raises a different class for each kind of error
        raise RuntimeError(f"onnxruntime: {next(iter(str(e).splitlines()), e)}") from e
    scores = next((x for x in outputs if x.ndim == 3), outputs[0]).astype(np.float32)
    # All utterances have the same number of samples, and so the same number of frames.
    frames = next((int(x[0]) for x in outputs if x.ndim == 1 and np.issubdtype(x.dtype, np.integer)), None)
    return scores if frames is None else scores[:, :frames]


def content_of(graph: bytes) -> Tensor:
    """A file's content as the buffer of :class:`OnnxCTCEncoder`."""
    return torch.frombuffer(bytearray(graph), dtype=torch.uint8)
