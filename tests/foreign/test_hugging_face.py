"""CTC models of Hugging Face as teachers give the same posteriors and text as in transformers."""

import json

import pytest
import tiny_asr
import torch
import yaml

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'espnet_kd[foundation]'")

import tiny_hf  # noqa: E402

from espnet_kd.bin import asr_kd_import  # noqa: E402
from espnet_kd.cli import UserError  # noqa: E402
from espnet_kd.targets.online import OnlineTeacher  # noqa: E402
from espnet_kd.targets.teacher import Needs  # noqa: E402


def utterances(seconds):
    """Audio (B, N) padded with zeros, and lengths."""
    waves = [torch.from_numpy(tiny_asr.audio(s, seed)) for seed, s in enumerate(seconds)]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves])


@torch.no_grad()
def theirs(directory, speech, lengths):
    """Yield the logits of each utterance, and the tokenizer, from transformers alone."""
    model = transformers.AutoModelForCTC.from_pretrained(directory).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for x, n in zip(speech, lengths):
        given = extractor(x[:n].numpy(), sampling_rate=16000, return_tensors="pt")
        yield model(input_values=given.input_values).logits[0], tokenizer


@pytest.mark.parametrize("blank_last", [False, True])
@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
def test_posteriors_and_greedy_text_are_those_of_transformers(tmp_path, family, blank_last):
    directory = tiny_hf.save(tmp_path / "hf", family, blank_last)
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    assert teacher.token_list[:3] == ["<blank>", "<unk>", "<space>"] and teacher.token_list[-1] == "<sos/eos>"
    speech, lengths = utterances([1.3, 0.7, 1.3, 2.0])
    out = teacher.targets(list("abcd"), speech, lengths)
    rows = tiny_hf.names(blank_last)
    order = [rows.index({"<blank>": "<pad>", "<space>": "|"}.get(t, t)) for t in teacher.token_list[:-1]]
    for i, (logits, tokenizer) in enumerate(theirs(directory, speech, lengths)):
        assert out.lengths[i] == len(logits)
        mine = out.logits[i, : len(logits)].softmax(-1)
        # <s> and </s> are in no transcript, so their probability goes to the other tokens.
        logits[:, [rows.index("<s>"), rows.index("</s>")]] = -1e9
        assert (mine[:, :-1] - logits.softmax(-1)[:, order]).abs().max() <= 1e-6
        best = mine.argmax(-1).unique_consecutive()
        text = "".join(teacher.token_list[k] for k in best if k).replace("<space>", " ").replace("<unk>", "")
        wanted = tokenizer.decode(logits.argmax(-1)).replace("<unk>", "")
        assert " ".join(text.split()) == " ".join(wanted.split())


@pytest.mark.parametrize("family, shift", [("wav2vec2-bert", 0.02), ("parakeet_ctc", 0.08)])
def test_families_that_take_features(tmp_path, family, shift):
    """The features come from the model's own extractor; the frames are 20 or 80 ms long."""
    directory = tiny_hf.save_of_features(tmp_path / "hf", family)
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    assert teacher.frame_shift == pytest.approx(shift)
    speech, lengths = utterances([1.3, 0.7])
    out = teacher.targets(["a", "b"], speech, lengths)
    model = transformers.AutoModelForCTC.from_pretrained(directory).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    rows = tiny_hf.names(False)
    order = [rows.index({"<blank>": "<pad>", "<space>": "|"}.get(t, t)) for t in teacher.token_list[:-1]]
    for i, n in enumerate(lengths):
        with torch.no_grad():
            logits = model(**extractor(speech[i, :n].numpy(), sampling_rate=16000, return_tensors="pt")).logits[0]
        logits[:, [rows.index("<s>"), rows.index("</s>")]] = -1e9
        assert out.lengths[i] == len(logits)
        mine = out.logits[i, : len(logits)].softmax(-1)
        assert (mine[:, :-1] - logits.softmax(-1)[:, order]).abs().max() <= 1e-6


@pytest.mark.parametrize("other", [{"<unk>": "[UNK]", "<pad>": "[PAD]"}, {"J": "\u00a0"}, {"|": " "}])
def test_vocabularies_of_other_people(tmp_path, other):
    """[UNK] without a tokenizer_config.json, white space that was in someone's transcripts, a blank between words."""
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    rows = {other.get(t, t): i for i, t in enumerate(tiny_hf.names(False))}
    (directory / "vocab.json").write_text(json.dumps(rows))
    if "[UNK]" in rows:
        (directory / "tokenizer_config.json").unlink()
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    letters = [t for t in tiny_hf.LETTERS if t in rows]
    assert OnlineTeacher(tmp_path / "exp").token_list == ["<blank>", "<unk>", "<space>", *letters, "<sos/eos>"]
    assert yaml.safe_load((tmp_path / "exp/config.yaml").read_text())["token_type"] == "char"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_checkpoint_in_half_precision_computes_in_single(tmp_path, kind, key):
    from safetensors.torch import load_file, save_file

    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    state = load_file(directory / "model.safetensors")
    save_file({k: v.to(getattr(torch, kind)) for k, v in state.items()}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    (directory / "config.json").write_text(json.dumps({**config, key: kind}))
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    assert {v.dtype for v in teacher.state_dict().values() if v.is_floating_point()} == {torch.float32}
    speech, lengths = utterances([1.3])
    mine = teacher.targets(["a"], speech, lengths).logits[0].softmax(-1)
    (directory / "config.json").write_text(json.dumps({**config, key: "float32"}))
    [(logits, _)] = theirs(directory, speech, lengths)
    blank = tiny_hf.names(False).index("<pad>")
    keep = [i for i, name in enumerate(tiny_hf.names(False)) if name not in ("<s>", "</s>")]
    assert (mine[:, 0] - logits[:, keep].softmax(-1)[:, blank]).abs().max() <= 1e-5


def test_a_model_of_8_khz_says_so(tmp_path):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    conf = json.loads((directory / "preprocessor_config.json").read_text())
    (directory / "preprocessor_config.json").write_text(json.dumps({**conf, "sampling_rate": 8000}))
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    assert teacher.sampling_rate == 8000 and teacher.frame_shift == pytest.approx(0.04)


def test_weights_in_parts_and_those_of_other_languages_beside_them(tmp_path):
    """The files of an index make the model; MMS's adapters have names of its weights, but must not be read."""
    from safetensors.torch import load_file, save_file

    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    state = load_file(directory / "model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in state.items()}, directory / "adapter.fra.safetensors")
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "one")])
    parts = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(state))}
    for name in set(parts.values()):
        save_file({k: v for k, v in state.items() if parts[k] == name}, directory / name)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "parts")])
    one, other = (torch.load(tmp_path / n / "model.pth", weights_only=True) for n in ("one", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(v.abs().sum() > 0 for k, v in one.items() if "lm_head" not in k)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json names model-00002-of-00002\.safetensors"):
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_features_are_read_where_a_processor_was_saved(tmp_path):
    """transformers 5 saves a processor's feature extractor in processor_config.json alone, and reads it there first."""
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=False)
    (directory / "processor_config.json").write_text(json.dumps({"feature_extractor": extractor.to_dict()}))
    for name in ("both", "one"):
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / name)])
        conf = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert conf["encoder_conf"]["normalize"] is False and conf["frontend_conf"]["fs"] == 8000
        assert "processor_config.json" in conf["foreign"]["files"]
        (directory / "preprocessor_config.json").unlink(missing_ok=True)


def test_taps_are_the_layers_hidden_states(tmp_path):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    speech, lengths = utterances([1.3, 0.7])
    hidden = teacher.targets(["a", "b"], speech, lengths, ["encoder", "encoder.1", "encoder.3"]).hidden
    model = transformers.AutoModelForCTC.from_pretrained(directory).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    for i, n in enumerate(lengths):
        given = extractor(speech[i, :n].numpy(), sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            out = model.wav2vec2(given, output_hidden_states=True)
        for tap, wanted in (("encoder", out.last_hidden_state), ("encoder.1", out.hidden_states[1])):
            assert (hidden[tap][i, : wanted.size(1)] - wanted[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["sew", "wav2vec2-bert"])
def test_layers_with_other_frames_than_the_output_have_no_taps(tmp_path, family):
    """SEW squeezes frames before its layers, and an adapter does so after them, usual in fine-tuned wav2vec2-bert."""
    if family == "sew":
        directory = tiny_hf.save(tmp_path / "hf", family)
    else:
        directory = tiny_hf.save_of_features(tmp_path / "hf", family, add_adapter=True, num_adapter_layers=1)
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    teacher = OnlineTeacher(tmp_path / "exp")
    assert teacher.frame_shift == pytest.approx(0.02 if family == "sew" else 0.04)
    speech, lengths = utterances([1.3, 0.7])
    out = teacher.targets(["a", "b"], speech, lengths, ["encoder"])
    assert out.hidden["encoder"].shape[:2] == out.logits.shape[:2]
    with pytest.raises(UserError, match="teacher .* has no tap 'encoder.1'; it has: encoder$"):
        teacher.check(Needs(taps=("encoder.1",)))


def test_the_same_import_again_changes_nothing_and_a_changed_source_is_refused(tmp_path):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    command = [f"hf:{directory}", "--output_dir", str(tmp_path / "exp")]
    asr_kd_import.main(command)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "exp").iterdir()}
    asr_kd_import.main(command)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "exp").iterdir()}
    other = tiny_hf.save(tmp_path / "other", "wav2vec2", seed=1)
    (directory / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"exp .*model\.safetensors"):
        asr_kd_import.main(command)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "exp").iterdir()}


def test_an_import_that_was_killed_is_made_again(tmp_path):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    exp = tmp_path / "exp"
    exp.mkdir()
    for name in ("model.pth", ".model.pth.0a1b2c3d", ".config.yaml.0a1b2c3d"):  # as a kill leaves them
        (exp / name).write_text("half a file")
    asr_kd_import.main([f"hf:{directory}", "--output_dir", str(exp)])
    assert (exp / "config.yaml").is_file() and OnlineTeacher(exp).frame_shift == 0.02
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(UserError, match="full holds other files"):
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "full")])


def test_a_name_on_the_hub_is_fetched_with_its_revision(tmp_path, monkeypatch):
    import huggingface_hub

    directory = tiny_hf.save(tmp_path / "abc123", "wav2vec2")
    asked, patterns = [], []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        patterns.append((allow_patterns, ignore_patterns))
        if revision == "gone":
            raise OSError("404 Client Error")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    asr_kd_import.main(["hf:owner/name@main", "--output_dir", str(tmp_path / "exp")])
    assert asked == [("owner/name", "main")]
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model-00001-of-00002.safetensors", "adapter.fra.safetensors", "pytorch_model.bin"]
    fetched = list(filter_repo_objects(there, allow_patterns=patterns[0][0], ignore_patterns=patterns[0][1]))
    assert fetched == there[:2]  # MMS has adapters of a thousand languages, 9 MB each, which are not read
    assert yaml.safe_load((tmp_path / "exp/config.yaml").read_text())["foreign"]["revision"] == "abc123"
    with pytest.raises(UserError, match="hf:owner/name@gone.*404"):
        asr_kd_import.main(["hf:owner/name@gone", "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def damage(directory, fault):
    config = json.loads((directory / "config.json").read_text())
    if fault == "no vocabulary":
        for name in ("vocab.json", "tokenizer.json"):
            (directory / name).unlink(missing_ok=True)
    elif fault == "pickled weights":
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    elif fault == "custom code":
        config["auto_map"] = {"AutoModelForCTC": "modeling.Evil"}
    elif fault == "blank out of range":
        config["pad_token_id"] = 99
    elif fault == "half a file":
        (directory / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:1000])
    elif fault == "no features":
        (directory / "preprocessor_config.json").unlink()
    elif fault == "another family":
        config["model_type"] = "bert"
    elif fault == "no config":
        (directory / "config.json").unlink()
        return
    elif fault == "broken config":
        (directory / "config.json").write_text("{")
        return
    (directory / "config.json").write_text(json.dumps(config))


FAULTS = {
    "no vocabulary": "vocab.json",
    "pickled weights": "pytorch_model.bin",
    "custom code": "auto_map",
    "blank out of range": "config.json: pad_token_id",
    "half a file": "model.safetensors",
    "no features": "preprocessor_config.json",
    "another family": "model_type: bert",
    "no config": "config.json",
    "broken config": "config.json",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_directory_is_refused_in_one_line_and_nothing_is_written(tmp_path, fault):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    damage(directory, fault)
    with pytest.raises(UserError) as refusal:
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(tmp_path / "exp")])
    assert FAULTS[fault] in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("source", ["hf:", "hf:/nowhere", "wav2vec2", "onnx:/nowhere.onnx"])
def test_a_source_that_is_none_is_refused(tmp_path, source):
    with pytest.raises(UserError, match=source.split(":")[-1] or "hf:"):
        asr_kd_import.main([source, "--output_dir", str(tmp_path / "exp")])


def test_an_experiment_that_was_not_imported_is_not_written_over(tmp_path, teacher_dir):
    directory = tiny_hf.save(tmp_path / "hf", "wav2vec2")
    before = {p.name: p.stat().st_mtime_ns for p in teacher_dir.iterdir()}
    with pytest.raises(UserError, match=str(teacher_dir)):
        asr_kd_import.main([f"hf:{directory}", "--output_dir", str(teacher_dir)])
    assert before == {p.name: p.stat().st_mtime_ns for p in teacher_dir.iterdir()}
