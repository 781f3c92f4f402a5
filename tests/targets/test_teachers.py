"""Each kind of teacher in each use works, or is refused in one line before any work.

The table in tests/README.md shows what this test asserts.
"""

import json
import sys
import types

import kaldiio
import numpy as np
import pytest
import soundfile
import tiny_asr
import tiny_kd
import torch
import yaml

from espnet_kd.bin import asr_kd_cache, asr_kd_inference, asr_kd_nbest, asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.experiments.models import find_experiment, load_model
from espnet_kd.inference.recognise import Recogniser, read_audio, read_utterances
from espnet_kd.targets.cached import CachedTeacher
from espnet_kd.targets.online import OnlineTeacher

LAYERS = dict(output_size=16, attention_heads=2, num_blocks=2, linear_units=32)
PART = dict(frontend_type="default", n_mels=40, fs=16000, n_fft=512, hop_length=160)


def changed(encoder="conformer", encoder_conf=None, **more):
    conf = tiny_asr.config(encoder)
    return {**conf, "encoder_conf": encoder_conf or conf["encoder_conf"], **more}


#: Configurations of the kinds of teachers that work.
WORKS = {
    "conformer": changed(),
    "transformer": changed("transformer"),
    "hybrid": changed(model_conf={"ctc_weight": 0.3}),
    "streaming": changed("contextual_block_conformer", LAYERS),
    "branchformer": changed("branchformer", dict(output_size=16, attention_heads=2, num_blocks=2, cgmlp_linear_units=32,
                                                 cgmlp_conv_kernel=7)),
    "e_branchformer": changed("e_branchformer"),
    "rnn": changed("rnn", dict(num_layers=2, hidden_size=16, output_size=24, subsample=[2, 2])),
    "vgg_rnn": changed("vgg_rnn", dict(num_layers=1, hidden_size=16, output_size=24)),
    "fused": changed(frontend="fused", preencoder="linear", preencoder_conf=dict(input_size=40, output_size=30),
                     frontend_conf=dict(frontends=[PART, PART], proj_dim=20, fs=16000)),
    "sinc": changed("transformer", {**LAYERS, "input_layer": "linear"}, frontend="sliding_window",
                    frontend_conf=dict(hop_length=200), preencoder="sinc", preencoder_conf=dict(fs=16000)),
    "mask_ctc": changed(model="maskctc", decoder="mlm", model_conf={"ctc_weight": 0.3}),
    "old checkpoint": changed(),
    "DeepSpeed": changed(),
    "lora": changed(use_adapter=True, adapter="lora",
                    adapter_conf=dict(rank=2, alpha=2, target_modules=["linear_q"], bias_type="none")),
    "loudness": changed(speech_volume_normalize=0.5),
    "wav2vec2": changed("wav2vec2", dict(w2v_url="w2v.pt", w2v_dir_path=".", output_size=24), frontend=None,
                        frontend_conf={}, input_size=1, normalize=None),
    "wav2vec2 loudness": changed("wav2vec2", dict(w2v_url="w2v.pt", w2v_dir_path=".", output_size=24), frontend=None,
                                 frontend_conf={}, input_size=1, normalize=None, speech_volume_normalize=0.5),
}  # fmt: skip
#: A model that takes features: it works as a teacher in training, but cannot read audio.
FEATURES = changed(frontend=None, frontend_conf={}, input_size=40)
#: The kinds that are refused, and a part of the message.
UNTRUSTED = "ESPNET_KD_TRUST_PICKLE=1"
REFUSED = {
    "wav2vec2 encoder": (dict(encoder="wav2vec2", frontend=None, frontend_conf={}, input_size=1), UNTRUSTED),
    "s3prl": (dict(frontend="s3prl"), UNTRUSTED),
    "whisper": (dict(encoder="whisper"), UNTRUSTED),
    "hugging face": (dict(postencoder="hugging_face_transformers"), UNTRUSTED),
    "OWSM-CTC": (dict(model="espnet_ctc", encoder="e_branchformer_ctc", preprocessor="s2t_ctc"), "is not supported"),
    "transducer with CTC": (
        dict(decoder="transducer", decoder_conf=dict(hidden_size=8), model_conf={"ctc_weight": 0.3},
             joint_net_conf=dict(joint_space_size=8)),
        "warprnnt_pytorch",
    ),
    "transducer task": (dict(encoder=None, joint_network_conf={}), "is not supported"),
}


@pytest.fixture
def with_lora(monkeypatch):
    """loralib or, if it is not installed, a replacement for the part that ESPnet uses."""
    from espnet2.layers import create_adapter_fn

    if create_adapter_fn.is_lora_available:
        return
    lora = types.ModuleType("loralib")

    class LoRALayer:
        pass

    class Linear(torch.nn.Linear, LoRALayer):
        """x W + x A B, where A B is merged into W in eval mode, as in loralib."""

        def __init__(self, inputs, outputs, bias=True, r=0, lora_alpha=1, lora_dropout=0.0):
            super().__init__(inputs, outputs, bias=bias)
            self.lora_A = torch.nn.Parameter(torch.zeros(r, inputs))
            self.lora_B = torch.nn.Parameter(torch.zeros(outputs, r))
            self.scaling, self.merged = lora_alpha / r, False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                with torch.no_grad():
                    self.weight.add_(self.lora_B @ self.lora_A, alpha=-self.scaling if mode else self.scaling)
                self.merged = not mode
            return self

    lora.LoRALayer, lora.Linear, lora.Embedding = LoRALayer, Linear, None
    monkeypatch.setattr(create_adapter_fn, "lora", lora, raising=False)
    monkeypatch.setattr(create_adapter_fn, "is_lora_available", True)


@pytest.fixture
def with_fairseq(monkeypatch, tmp_path):
    """A replacement for fairseq and one of its files, for teachers with its encoder, which are trusted here."""
    names = ("fairseq", "fairseq.models", "fairseq.models.wav2vec", "fairseq.models.wav2vec.wav2vec2")
    modules = {name: types.ModuleType(name) for name in names}

    class Wav2Vec2Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(1, 24, 400, 320)
            self.cfg = types.SimpleNamespace(encoder_embed_dim=24)

        def forward(self, x, masks, mask=False, features_only=True):
            h = self.conv(x[:, None]).transpose(1, 2)
            n = ((~masks).sum(1) - 400) // 320 + 1
            return {"x": h, "padding_mask": torch.arange(h.size(1)) >= n[:, None]}

    modules[names[-1]].Wav2Vec2Model = Wav2Vec2Model
    loaded = types.SimpleNamespace(load_model_ensemble_and_task=lambda *a, **k: ([Wav2Vec2Model()], None, None))
    modules["fairseq"].checkpoint_utils = loaded
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("ESPNET_KD_TRUST_PICKLE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w2v.pt").write_bytes(b"x")


def build(kind):
    conf = {**(FEATURES if kind == "features" else WORKS[kind])}
    base = {**conf, "token_list": list(tiny_asr.TOKENS)}
    model = tiny_asr.build(base, seed=3, sharpen=5.0)
    state = model.state_dict()
    if kind == "lora":
        from espnet2.layers.create_adapter import create_adapter

        create_adapter(model, "lora", conf["adapter_conf"])
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_()
        state = model.state_dict()
    if kind == "old checkpoint":  # from before May 2021: it has a decoder, which is not used
        hybrid = tiny_asr.build({**base, "model_conf": {"ctc_weight": 0.3}})
        state = {**state, **{k: v for k, v in hybrid.state_dict().items() if k.startswith("decoder.")}}
    return conf, {"module": state} if kind == "DeepSpeed" else state


def save(directory, conf, state):
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "valid.loss.ave.pth")
    (directory / "config.yaml").write_text(yaml.safe_dump(conf))
    return directory


@pytest.fixture
def experiment(request, tmp_path, with_lora):
    if "wav2vec2" in request.param:
        request.getfixturevalue("with_fairseq")
    return save(tmp_path / "exp", *build(request.param))


kinds = pytest.mark.parametrize("experiment", WORKS, indirect=True)


@kinds
def test_training(experiment, corpus, tmp_path):
    """Training with an online teacher and unsorted batches."""
    options = ["--teacher", str(experiment), "--kd_config", "kl", "--max_epoch", "1"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *options))
    assert (tmp_path / "out/student.pth").is_file()


@kinds
def test_online_cache_and_inference_say_the_same(experiment, corpus, tmp_path):
    """Each utterance is alone in its batch. Options that change the audio must have the same effect in all three."""
    data = corpus.dir / "valid"
    argv = ["--teacher", str(experiment), "--kd_config", "kl", "--data_dir", str(data), "--output", str(tmp_path / "c")]
    asr_kd_cache.main([*argv, "--batch_seconds", "0.1"])
    online, cached = OnlineTeacher(experiment), CachedTeacher(tmp_path / "c")
    config, file = find_experiment(experiment)
    recogniser = Recogniser(*load_model(config, file), config.parent)
    assert cached.token_list == online.token_list == recogniser.token_list == tiny_asr.TOKENS
    for utterance in read_utterances(data, recogniser.rate):
        samples = read_audio(utterance)
        batch = ([utterance.utt_id], torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
        now, kept = online.targets(*batch), cached.targets(*batch)
        logits, frames = recogniser.logits([samples])
        assert now.lengths.tolist() == kept.lengths.tolist() == frames.tolist()
        expected = logits.float().log_softmax(-1)
        torch.testing.assert_close(now.logits.log_softmax(-1), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(kept.logits.log_blank, expected[..., 0], rtol=0, atol=2e-4)


@kinds
def test_a_batch_is_what_its_utterances_are(experiment):
    """An online teacher gives the same in an unsorted batch, except for ESPnet's padding: at most two frames more."""
    teacher, batch = OnlineTeacher(experiment), tiny_kd.batch(lengths=(9000, 16000, 12345))
    together = teacher.targets((), batch["speech"], batch["speech_lengths"])
    for row, n in enumerate(batch["speech_lengths"].tolist()):
        alone = teacher.targets((), batch["speech"][row : row + 1, :n], torch.tensor([n]))
        assert abs(int(together.lengths[row]) - int(alone.lengths[0])) <= 2
        inside = slice(0, int(alone.lengths[0]) - 6)  # the last frames depend on the padding after them
        first, second = (x[inside].argmax(-1) for x in (together.logits[row], alone.logits[0]))
        assert (first == second).float().mean() > 0.85


@kinds
def test_inference_and_nbest(experiment, corpus, tmp_path):
    data = str(corpus.dir / "valid")
    asr_kd_inference.main(["--expdir", str(experiment), "--data_dir", data, "--output_dir", str(tmp_path / "o")])
    asr_kd_nbest.main(["--teacher", str(experiment), "--data_dir", data, "--output", str(tmp_path / "nbest")])
    assert len((tmp_path / "o/1best_recog/text").read_text().splitlines()) == 3
    assert "<mask>" not in (tmp_path / "nbest").read_text()


@pytest.mark.parametrize("experiment", [*WORKS, "features"], indirect=True)
def test_packed(experiment, tmp_path, monkeypatch):
    from espnet2.main_funcs.pack_funcs import pack

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    files = {"asr_model_file": "exp/valid.loss.ave.pth"}
    pack(files, {"asr_train_config": "exp/config.yaml"}, tmp_path / "x.zip")
    speech = torch.from_numpy(tiny_asr.audio(1.0, 3))[None]
    if yaml.safe_load((experiment / "config.yaml").read_text())["input_size"] == 40:
        speech = torch.randn(1, 100, 40)
    teachers = [OnlineTeacher(e) for e in (experiment, tmp_path / "x.zip")]
    first, second = (t.targets((), speech, torch.tensor([speech.size(1)])).logits for t in teachers)
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def of_8_khz(tmp_path_factory):
    directory = tmp_path_factory.mktemp("8k")
    soundfile.write(directory / "a.wav", tiny_asr.audio(0.5, 1), 8000, subtype="PCM_16")
    (directory / "wav.scp").write_text(f"a {directory}/a.wav\n")
    return directory


@kinds
def test_audio_of_another_rate_is_refused(experiment, of_8_khz, tmp_path):
    data, out = str(of_8_khz), str(tmp_path / "out")
    for command, argv in (
        (asr_kd_inference, ["--expdir", str(experiment), "--output_dir", out]),
        (asr_kd_cache, ["--teacher", str(experiment), "--kd_config", "kl", "--output", out]),
        (asr_kd_nbest, ["--teacher", str(experiment), "--output", f"{out}.nbest"]),
    ):
        with pytest.raises(UserError, match="wav.scp: a has 8000 Hz and the model needs 16000 Hz"):
            command.main([*argv, "--data_dir", data])


@pytest.mark.parametrize("changes, words", REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_refused_before_training(corpus, tmp_path, changes, words):
    conf, state = build("conformer")
    exp = save(tmp_path / "exp", {**conf, **changes}, state)
    with pytest.raises(UserError, match=words) as e:
        asr_kd_train.main(corpus.options(tmp_path / "out", "--teacher", str(exp), "--kd_config", "kl"))
    assert "\n" not in str(e.value) and not list((tmp_path / "out").rglob("*.pth"))


def test_a_teacher_fed_with_features(corpus, tmp_path):
    """It normalises by utterance, so that the width of features is only in its configuration."""
    exp = save(tmp_path / "exp", *build("features"))
    teacher = OnlineTeacher(exp)
    assert teacher.frame_shift == pytest.approx(0.04)
    features = torch.randn(2, 100, 40)
    out = teacher.targets((), features, torch.tensor([100, 60]))
    assert out.logits.shape[0] == 2 and out.lengths[0] > out.lengths[1]
    with pytest.raises(UserError, match="the student gets audio, the teacher .* features of width 40"):
        asr_kd_train.main(corpus.options(tmp_path / "out", "--teacher", str(exp), "--kd_config", "kl"))
    data, place = str(corpus.dir / "valid"), str(tmp_path / "o")
    for command, argv in (
        (asr_kd_inference, ["--expdir", str(exp), "--output_dir", place]),
        (asr_kd_cache, ["--teacher", str(exp), "--kd_config", "kl", "--output", place]),
        (asr_kd_nbest, ["--teacher", str(exp), "--output", f"{place}.nbest"]),
    ):
        with pytest.raises(UserError, match="takes features .*, not audio"):
            command.main([*argv, "--data_dir", data])


def test_a_student_fed_with_the_features_of_its_teacher(corpus, tmp_path):
    exp, options = save(tmp_path / "exp", *build("features")), []
    for part in ("train", "valid"):
        features = {f"{part}{i}": np.random.default_rng(i).standard_normal((90 + i, 40)) for i in range(3)}
        kaldiio.save_ark(str(tmp_path / f"{part}.ark"), features, scp=str(tmp_path / f"{part}.scp"))
        (tmp_path / f"{part}.shape").write_text("".join(f"{u} {len(x)},40\n" for u, x in features.items()))
        (tmp_path / f"{part}.text").write_text("".join(f"{u} abc\n" for u in features))
        data = f"--{part}_data_path_and_name_and_type"
        options += [data, f"{tmp_path}/{part}.scp,speech,kaldi_ark", data, f"{tmp_path}/{part}.text,text,text"]
        options += [f"--{part}_shape_file", f"{tmp_path}/{part}.shape"]
    config = corpus.config(input_size=40, normalize="utterance_mvn", normalize_conf={}, frontend_conf={}, max_epoch=1)
    options += ["--config", str(config), "--token_type", "char", "--token_list", str(corpus.dir / "tokens.txt")]
    out = tmp_path / "out"
    asr_kd_train.main([*options, "--teacher", str(exp), "--kd_config", "kl", "--output_dir", str(out)])
    assert (out / "student.pth").is_file()


@pytest.mark.parametrize("lengths", [(300, 200), (1500, 1900), (16000, 1500), (1500, 16000), (100, 16000)])
@pytest.mark.parametrize("layer", ["conv2d", "conv2d8"])
def test_utterances_too_short_for_the_teacher_have_no_frame(tmp_path, lengths, layer):
    """They have no frame at inference either, and the outputs of the other utterances stay finite."""
    conf = tiny_asr.config(input_layer=layer)
    exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path)
    teacher = OnlineTeacher(exp)
    recogniser = Recogniser(*load_model(*find_experiment(exp)), exp)
    waves = [tiny_asr.audio(1.0, i)[:n] for i, n in enumerate(lengths)]
    speech = torch.zeros(2, max(lengths))
    for row, wave in zip(speech, waves):
        row[: len(wave)] = torch.from_numpy(wave)
    found = teacher.targets((), speech, torch.tensor(lengths))
    for row, n in enumerate(lengths):
        alone = recogniser.logits([waves[row]])[1]
        assert (found.lengths[row] == 0) == (alone == 0), (n, teacher._least)
    assert found.logits.isfinite().all()


def test_an_adapter_alone_is_no_teacher(tmp_path, with_lora):
    conf, state = build("lora")
    exp = save(tmp_path / "exp", conf, {k: v for k, v in state.items() if "lora_" in k})
    with pytest.raises(UserError, match="holds an adapter without the model"):
        OnlineTeacher(exp)


def test_an_adapter_without_its_package(tmp_path, monkeypatch):
    from espnet2.layers import create_adapter_fn

    monkeypatch.setattr(create_adapter_fn, "is_lora_available", False)
    conf, state = build("conformer")
    adapter = {k: WORKS["lora"][k] for k in ("use_adapter", "adapter", "adapter_conf")}
    exp = save(tmp_path / "exp", {**conf, **adapter}, state)
    with pytest.raises(UserError, match="adapter: lora needs a package that is not installed: pip install loralib"):
        OnlineTeacher(exp)


def test_old_names_of_an_s3prl_frontend():
    """They are renamed when such a file is loaded, as in ESPnet. This test does not need s3prl."""
    from espnet_kd.experiments.states import fit_state

    model = torch.nn.Module()
    model.frontend = torch.nn.Module()
    model.frontend.upstream = torch.nn.Module()
    model.frontend.upstream.upstream = torch.nn.Module()
    model.frontend.upstream.upstream.model = torch.nn.Linear(2, 2)
    old = {f"frontend.upstream.model.{k}": v for k, v in model.frontend.upstream.upstream.model.state_dict().items()}
    assert fit_state(model, old, "x").keys() == model.state_dict().keys()
    assert fit_state(model, model.state_dict(), "x").keys() == model.state_dict().keys()


@pytest.mark.parametrize("experiment", ["wav2vec2"], indirect=True)
def test_an_encoder_that_takes_samples(experiment, monkeypatch):
    """wav2vec 2.0 without frontend (input_size: 1) works like any teacher if it is trusted, else it is refused."""
    teacher = OnlineTeacher(experiment)
    assert teacher.frame_shift == pytest.approx(0.02) and teacher._least == 400
    recogniser = Recogniser(*load_model(*find_experiment(experiment)), experiment)
    assert recogniser.rate == 16000 and recogniser.logits([np.zeros(8000, np.float32)])[1].tolist() == [24]
    monkeypatch.delenv("ESPNET_KD_TRUST_PICKLE")
    with pytest.raises(UserError, match="encoder: wav2vec2 .*ESPNET_KD_TRUST_PICKLE=1"):
        OnlineTeacher(experiment)


def test_a_cache_that_was_forged_is_not_noticed(corpus, tmp_path):
    """A cache with the targets of another teacher under this one's name is accepted: users must trust its source."""
    exp, other = (tiny_kd.save_teacher(tmp_path / name, seed=seed) for name, seed in (("mine", 1), ("other", 2)))
    argv = ["--kd_config", "kl", "--data_dir", str(corpus.dir / "valid"), "--output", str(tmp_path / "cache")]
    asr_kd_cache.main(["--teacher", str(other), *argv])
    manifest = tmp_path / "cache/manifest.json"
    content = {**json.loads(manifest.read_text()), "teacher": str(exp)}
    manifest.write_text(json.dumps(content))
    forged = CachedTeacher(tmp_path / "cache")
    assert forged.name.startswith(str(exp))
    assert len(forged.targets(["valid0"], torch.zeros(1, 1), torch.ones(1)).lengths) == 1
