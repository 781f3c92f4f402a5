"""A real CTC model of another maker: the phone recogniser in the package hama, if that is installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_asr
import torch

ort = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'espnet_kd[foundation]'")

from espnet_kd.bin import asr_kd_import  # noqa: E402
from espnet_kd.experiments.models import find_experiment, load_model  # noqa: E402
from espnet_kd.inference.recognise import Recogniser  # noqa: E402
from espnet_kd.targets.online import OnlineTeacher  # noqa: E402


@pytest.fixture
def hama(tmp_path):
    spec = importlib.util.find_spec("hama")
    if spec is None:
        pytest.skip("needs the extra: pip install 'espnet_kd[hama]'")
    assets = Path(spec.origin).parent / "assets"
    tokens = json.loads((assets / "g2p_vocab.json").read_text(encoding="utf-8"))["decoder"]
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in [*tokens, "<wb>", "<blank>"]), encoding="utf-8")
    return assets / "asr_waveform_fp16.onnx", tmp_path / "tokens.txt"


def test_posteriors_and_phones_are_those_of_onnxruntime(tmp_path, hama):
    model, tokens = hama
    asr_kd_import.main(
        [f"onnx:{model}", "--tokens", str(tokens), "--word_delimiter", "<wb>", "--output_dir", str(tmp_path / "exp")]
    )
    teacher = OnlineTeacher(tmp_path / "exp")
    assert teacher.frame_shift == pytest.approx(0.02) and teacher.sampling_rate == 16000
    rows = tokens.read_text(encoding="utf-8").splitlines()
    wave = tiny_asr.audio(2.0, 0)
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    given = {i.name: wave[None] if len(i.shape) == 2 else np.array([len(wave)]) for i in session.get_inputs()}
    theirs = torch.from_numpy(next(x for x in session.run(None, given) if x.ndim == 3)[0].astype(np.float32))
    out = teacher.targets(["a"], torch.from_numpy(wave)[None], torch.tensor([len(wave)]))
    order = [rows.index("<wb>" if t == "<space>" else t) for t in teacher.token_list[:-1]]
    mine = out.logits[0, : out.lengths[0]].softmax(-1)
    theirs = theirs[:, order].softmax(-1)  # <pad>, <sos> and <eos> are in no transcript
    assert (mine[:, :-1] - theirs[: len(mine)]).abs().max() <= 1e-6
    recogniser = Recogniser(*load_model(*find_experiment(tmp_path / "exp")), tmp_path / "exp")
    [hypothesis] = recogniser([wave])[0]
    best = [int(k) for k in theirs.argmax(-1).unique_consecutive() if k]
    assert hypothesis.token_ids == best
