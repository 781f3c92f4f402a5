"""A tiny corpus, teacher, batch and training run, for the tests of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

import numpy as np
import tiny_asr
import torch
import yaml

TOKENS = tiny_asr.TOKENS
SECONDS = (1.2, 0.8, 1.0, 0.9, 1.1, 0.7, 1.3, 0.95, 1.05)


def write_yaml(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def student_config(encoder: str = "conformer", **model_conf) -> dict:
    """The configuration of tiny_asr, with SpecAugment as in the training of a student."""
    conf = tiny_asr.config(encoder)
    conf["model_conf"] = {"ctc_weight": 1.0, **model_conf}
    conf["specaug"] = "specaug"
    conf["specaug_conf"] = {
        "apply_time_warp": False, "apply_freq_mask": True, "freq_mask_width_range": [0, 20], "num_freq_mask": 2,
        "apply_time_mask": True, "time_mask_width_range": [0, 20], "num_time_mask": 2,
    }  # fmt: skip
    return conf


def batch(lengths=(16000, 12345, 9000), dtype=torch.float32, seed=0) -> dict:
    """The arguments that the trainer passes to forward()."""
    g = torch.Generator().manual_seed(seed)
    speech = torch.zeros(len(lengths), max(lengths), dtype=dtype)
    for row, n in zip(speech, lengths):
        row[:n] = torch.from_numpy(tiny_asr.audio(n / 16000, int(torch.randint(1000, (), generator=g)))[:n]).to(dtype)
    text_lengths = torch.tensor([5, 3, 2])[: len(lengths)]
    text = torch.full((len(lengths), 5), -1)
    for row, n in zip(text, text_lengths):
        row[:n] = torch.randint(2, 13, (int(n),), generator=g)
    return {
        "utt_id": [f"utt{i}" for i in range(len(lengths))], "speech": speech,
        "speech_lengths": torch.tensor(lengths), "text": text, "text_lengths": text_lengths,
    }  # fmt: skip


def save_teacher(directory: Path, seed: int = 1, blank_share: float = 0.6, **encoder_conf) -> Path:
    """A random experiment whose argmax is blank on about ``blank_share`` of the frames."""
    conf = tiny_asr.config("conformer", **{"output_size": 24, "num_blocks": 3, **encoder_conf})
    model = tiny_asr.build(conf, seed=seed, sharpen=4.0)
    speech = batch()
    with torch.no_grad():
        logits = model.ctc.ctc_lo(model.encode(speech["speech"], speech["speech_lengths"])[0])
        lead = logits[..., 1:].amax(-1) - logits[..., 0]
        model.ctc.ctc_lo.bias[0] += lead.flatten().quantile(blank_share)
    return tiny_asr.save(model, conf, directory)


class Corpus:
    """Data dirs ``train`` and ``valid`` with shape files and random transcripts."""

    def __init__(self, directory: Path):
        self.dir = directory
        rng = np.random.default_rng(0)
        for name, seconds in (("train", SECONDS), ("valid", SECONDS[:3])):
            waves = {f"{name}{i}": tiny_asr.audio(s, 100 + i) for i, s in enumerate(seconds)}
            tiny_asr.data_dir(directory / name, waves)
            texts = {u: "".join(rng.choice(list("abcdefghij"), 4)) for u in waves}
            self._write(f"{name}/text", texts)
            self._write(f"{name}/speech_shape", {u: len(w) for u, w in waves.items()})
            self._write(f"{name}/text_shape.char", {u: f"{len(t)},{len(TOKENS)}" for u, t in texts.items()})
        (directory / "tokens.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
        # Statistics in the format of ESPnet's collect_stats: mean 0, variance 4.
        np.savez(directory / "feats_stats.npz", count=100, sum=np.zeros(40), sum_square=np.full(40, 400.0))

    def _write(self, name: str, lines: dict) -> None:
        (self.dir / name).write_text("".join(f"{k} {v}\n" for k, v in lines.items()), encoding="utf-8")

    def config(self, **changes: Any) -> Path:
        """A plain ESPnet training YAML of a student with BatchNorm, SpecAugment and global normalisation."""
        conf = student_config()
        keep = ("encoder", "encoder_conf", "frontend_conf", "specaug", "specaug_conf", "model_conf")
        content = {
            **{k: conf[k] for k in keep}, "normalize": "global_mvn",
            "normalize_conf": {"stats_file": str(self.dir / "feats_stats.npz")}, "optim": "adam",
            "optim_conf": {"lr": 0.01}, "max_epoch": 3, "batch_type": "unsorted", "batch_size": 3,
            "best_model_criterion": [["valid", "loss_ctc", "min"]], "keep_nbest_models": 1,
            "num_workers": 0, "num_att_plot": 0, "use_matplotlib": False, "log_interval": 1, "ngpu": 0, **changes,
        }  # fmt: skip
        name = "_".join(map(str, changes.values())) or "student"
        return write_yaml(self.dir / f"{name}.yaml", content)

    def options(self, output_dir: Path, *more: str, text: bool = True, **changes: Any) -> List[str]:
        """The command line of asr_kd_train, without teacher and page."""
        own = ["--config", str(self.config(**changes)), "--output_dir", str(output_dir), "--token_type", "char"]
        own += ["--token_list", str(self.dir / "tokens.txt")]
        for name in ("train", "valid"):
            for file, key, kind in (("wav.scp", "speech", "sound"), ("text", "text", "text"))[: 1 + text]:
                own += [f"--{name}_data_path_and_name_and_type", f"{self.dir / name / file},{key},{kind}"]
            for file in ("speech_shape", "text_shape.char")[: 1 + text]:
                own += [f"--{name}_shape_file", str(self.dir / name / file)]
        return [*own, *more]
