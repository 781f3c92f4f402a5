"""Decoding loops against stock ``espnet2.bin.asr_inference``: batched greedy, and beam search of equal width."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from espnet_kd.bench.timing import interleaved, median


def measure(experiment: Path, data_dir: Path, rounds: int, *, beam_size: int = 10, most: int = 0) -> Dict[str, float]:
    """How many times faster our decoding loops are, and the error rates of all four.

    One thread each. Imports and loading are not in the times; reading the audio is in all of them.

    Args:
        experiment: a finished ESPnet experiment with CTC, or an export.
        data_dir: formatted, with text.
        beam_size: of both beam searches; stock greedy is its beam search of width 1.
        most: of the data dir's utterances; 0: all.

    Returns:
        ``greedy``, ``beam``: seconds of the stock loop / ours; seconds and ``wer_…`` of each.
    """
    import jiwer
    import torch
    from espnet2.bin.asr_inference import Speech2Text

    from espnet_kd.data.datadir import read_map
    from espnet_kd.decode.recognise import NbestRecogniser, Recogniser, read_audio, read_utterances, recognise
    from espnet_kd.targets.experiment import find_experiment, load_model

    torch.set_num_threads(1)
    config, model_file = find_experiment(experiment)
    greedy = Recogniser(*load_model(config, model_file), config.parent)
    beam = NbestRecogniser(*load_model(config, model_file), config.parent, nbest=1, beam_size=beam_size)
    utterances = read_utterances(data_dir, greedy.rate)[: most or None]
    references = read_map(data_dir / "text")
    stock = {
        width: Speech2Text(str(config), str(model_file), ctc_weight=1.0, beam_size=width, device="cpu")
        for width in (1, beam_size)
    }
    found: Dict[str, List[Tuple[str, str]]] = {}

    def run_stock(name: str, width: int) -> None:
        texts = []
        for u in utterances:
            hypotheses = stock[width](read_audio(u))
            texts.append((u.utt_id, hypotheses[0][0] or ""))
        found[name] = texts

    def run_greedy() -> None:
        found["greedy"] = [(k, h.text) for k, h in recognise(greedy, utterances, progress=False)[0].items()]

    def run_beam() -> None:
        result = recognise(beam, utterances, progress=False)[0]
        found["beam"] = [
            (k, greedy.to_text([greedy.token_list[i] for i in h[0][1]]) if h else "") for k, h in result.items()
        ]

    times = interleaved(
        {
            "greedy": run_greedy,
            "stock_greedy": lambda: run_stock("stock_greedy", 1),
            "beam": run_beam,
            "stock_beam": lambda: run_stock("stock_beam", beam_size),
        },
        rounds,
        warm_up=0 if rounds == 1 else 1,
    )
    result = {f"{name}_seconds": median(values) for name, values in times.items()}
    for name in ("greedy", "beam"):
        result[name] = median([s / o for s, o in zip(times[f"stock_{name}"], times[name])])
    for name, texts in found.items():
        result[f"wer_{name}"] = _wer(jiwer, references, texts)
    return result


def _wer(jiwer: object, references: Dict[str, str], texts: Sequence[Tuple[str, str]]) -> float:
    """Percent."""
    return 100 * jiwer.wer([references[k] for k, _ in texts], [text for _, text in texts])
