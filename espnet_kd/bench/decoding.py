"""Decoding loops against stock ``espnet2.bin.asr_inference``: batched greedy, and beam search of equal width."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

import numpy as np

from espnet_kd.bench.timing import interleaved, median
from espnet_kd.cli import UserError

#: The decoders that are compared: (ours, the stock one).
PAIRS = {
    "greedy": ("greedy", "stock_greedy"),
    "beam": ("beam", "stock_beam"),
    "beam_for_greedy": ("beam", "stock_greedy"),
}
_NATS = 0.01  # smaller differences between two texts' log-probabilities are ignored


def measure(
    experiment: Path,
    data_dir: Path,
    rounds: int,
    *,
    beam_size: int = 10,
    beam_size_token: int = 20,
    batch_seconds: float = 60.0,
    most: int = 0,
    join_seconds: float = 0.0,
) -> Dict[str, Any]:
    """How many times faster our decoding loops are, and the error rates of all four.

    The data dir is decoded once by each, sorted by length as our decoder does, in ``rounds`` chunks of about equal
    audio; in each chunk the four take turns. One thread each, or the GPU where there is one. Imports, loading and
    reading audio are not in the times.

    Args:
        experiment: a finished ESPnet experiment with CTC, or an export.
        data_dir: formatted, with text.
        rounds: number of chunks.
        beam_size: width of both beam searches; stock greedy is its beam search of width 1.
        beam_size_token: option of our beam search (see `espnet_kd.decode.beam`); the stock one tries every token.
        batch_seconds: audio in each of our batches.
        most: number of utterances to decode, in the data dir's order; 0: all.
        join_seconds: neighbours in the data dir's order are joined to utterances of at most this length; 0: not joined.

    Returns:
        ``greedy``, ``beam``, ``beam_for_greedy`` (our beam against the stock search of width 1, which sums alignments
        up as well): seconds of the stock loop / ours, median over the chunks; ``…_total``: over all chunks;
        ``wer_greedy``, ``wer_stock_greedy`` and so on in percent; for each of the three, ``wer_…_difference``:
        (ours − stock, low, high) in percentage points with the paired bootstrap's 95 % interval over utterances;
        ``likelier_…``: numbers of utterances for which our search, and for which the stock search found the text of
        higher log P(text | audio), summed over all alignments, which shows errors of a search;
        seconds of each, and of loading (all four) and reading, which both loops would have to do.

    Raises:
        UserError: an utterance has no text, or all texts are empty.
    """
    import torch

    from espnet_kd.data.datadir import read_map
    from espnet_kd.decode.beam_recognise import BeamRecogniser
    from espnet_kd.decode.bootstrap import paired_bootstrap
    from espnet_kd.decode.score import count_errors, name_some
    from espnet_kd.decode.stock import StockRecogniser
    from espnet_kd.experiments.models import find_experiment, load_model
    from espnet_kd.inference.recognise import Recogniser, make_batches, read_audio, read_utterances, recognise_batches

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    search_jobs = len(os.sched_getaffinity(0)) if device == "cuda" else 0  # with a GPU, all cores search
    config, model_file = find_experiment(experiment)
    start = time.perf_counter()
    stock = functools.partial(StockRecogniser, config, model_file, device, ctc_weight=1.0, nbest=1)
    greedy = Recogniser(*load_model(config, model_file, device), config.parent)
    recognisers: Dict[str, Callable[[Sequence[np.ndarray]], List]] = {
        "greedy": greedy,
        "stock_greedy": stock(beam_size=1),
        "beam": BeamRecogniser(
            *load_model(config, model_file, device), config.parent, search_jobs=search_jobs,
            nbest=1, beam_size=beam_size, beam_size_token=beam_size_token,
        ),
        "stock_beam": stock(beam_size=beam_size),
    }  # fmt: skip
    load_seconds = time.perf_counter() - start
    utterances = read_utterances(data_dir, greedy.rate)[: most or None]
    references = read_map(data_dir / "text")
    if missing := {u.utt_id for u in utterances} - references.keys():
        raise UserError(f"{data_dir}/text lacks utterances of wav.scp: {name_some(missing)}")
    if not any(references[u.utt_id].split() for u in utterances):
        raise UserError(f"{data_dir}/text has no words, and an error rate needs them; give data with transcripts")

    start = time.perf_counter()
    audio = {u.utt_id: read_audio(u) for u in utterances}
    read_seconds = time.perf_counter() - start
    if join_seconds:
        utterances = join(utterances, audio, references, join_seconds)
    batches = make_batches(utterances, batch_seconds)
    best: Dict[str, Dict[str, Any]] = {name: {} for name in recognisers}  # {utt_id: Hypothesis}

    def decode(name: str, chunks) -> None:
        chunk = next(chunks)
        every = ([audio[u.utt_id] for u in batch] for batch in chunk)
        for batch, found in zip(chunk, recognise_batches(recognisers[name], every)):
            best[name].update((u.utt_id, h[0]) for u, h in zip(batch, found))

    for recogniser in recognisers.values():
        recogniser([audio[u.utt_id] for u in batches[0]])  # warm-up: one-time costs, such as first use of memory
    parts = min(rounds, len(batches))
    bounds = [len(batches) * i // parts for i in range(parts + 1)]
    chunks = [batches[a:b] for a, b in zip(bounds, bounds[1:])]
    times = interleaved(
        {name: functools.partial(decode, name, iter(chunks)) for name in recognisers}, len(chunks), warm_up=0
    )

    counts = {
        name: count_errors({k: (best[name][k].text, references[k]) for k in audio}, "word") for name in recognisers
    }
    result: Dict[str, Any] = {f"{name}_seconds": sum(values) for name, values in times.items()}
    result.update(load_seconds=load_seconds, read_seconds=read_seconds, utterances=len(audio), chunks=len(chunks))
    for name, found in counts.items():
        result[f"wer_{name}"] = 100.0 * float(found.errors.sum() / found.lengths.sum())
    likely = {name: likelihoods(recognisers["greedy"], batches, audio, found) for name, found in best.items()}
    for name, (ours, theirs) in PAIRS.items():
        result[name] = median([s / o for s, o in zip(times[theirs], times[ours])])
        result[f"{name}_total"] = sum(times[theirs]) / sum(times[ours])
        difference = paired_bootstrap(counts[ours].errors, counts[theirs].errors, counts[ours].lengths)
        result[f"wer_{name}_difference"] = difference[:3]
        gains = [a - b for a, b in zip(likely[ours], likely[theirs])]
        result[f"likelier_{name}"] = [sum(g > _NATS for g in gains), sum(g < -_NATS for g in gains)]
    return result


def join(utterances: Sequence, audio: Dict[str, np.ndarray], references: Dict[str, str], seconds: float) -> List:
    """Join neighbours to utterances of at most ``seconds`` (a longer one stays alone), under the first one's id.

    ``audio`` and ``references`` are changed to those of the joined utterances.
    """
    groups: List[List] = []
    for u in utterances:
        if not groups or sum(v.samples for v in groups[-1]) + u.samples > seconds * u.rate:
            groups.append([])
        groups[-1].append(u)
    joined = []
    for group in groups:
        first = group[0]
        audio[first.utt_id] = np.concatenate([audio.pop(u.utt_id) for u in group])
        references[first.utt_id] = " ".join(references[u.utt_id] for u in group)
        joined.append(dataclasses.replace(first, samples=len(audio[first.utt_id])))
    return joined


def likelihoods(recogniser: Any, batches: Sequence[Sequence], audio: Mapping, best: Mapping) -> List[float]:
    """Log P(text | audio) of each utterance's hypothesis in nats, in the order of ``batches``.

    Args:
        recogniser: a recogniser of the model.
        batches: utterances.
        audio: {utt_id: samples}.
        best: {utt_id: Hypothesis}.
    """
    import torch

    result: List[float] = []
    for batch in batches:
        logits, frames = recogniser.logits([audio[u.utt_id] for u in batch])
        texts = [best[u.utt_id].token_ids for u in batch]
        logits = torch.nn.functional.pad(
            logits, (0, 0, 0, 1)
        )  # one frame more, because ctc_loss needs one; it counts only `frames`
        losses = torch.nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1).cpu(),
            torch.tensor([i for text in texts for i in text], dtype=torch.long),
            frames,
            torch.tensor([len(text) for text in texts]),
            reduction="none",
        )
        result += (-losses).tolist()
    return result
