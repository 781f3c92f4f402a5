"""Export: stock ESPnet decodes the folder and the zip from any directory."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
import tiny_asr
import torch
import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.export import FILES, export
from espnet_kd.experiments.models import find_experiment, load_model, load_state
from espnet_kd.experiments.portable import PORTABLE


def with_statistics(directory, **changes):
    """Create a recipe directory with a global_mvn experiment whose paths are relative to the recipe."""
    recipe = directory / "recipe"
    (recipe / "exp").mkdir(parents=True)
    rng = np.random.default_rng(3)
    mean, spread = rng.normal(-8, 3, 40), rng.uniform(1, 4, 40)
    np.savez(recipe / "exp/feats_stats.npz", count=1, sum=mean, sum_square=spread**2 + mean**2)
    conf = {**tiny_asr.config(), "normalize": "global_mvn", **changes}
    conf["normalize_conf"] = {"stats_file": "exp/feats_stats.npz", **changes.get("normalize_conf", {})}
    here = os.getcwd()
    os.chdir(recipe)
    try:
        tiny_asr.save(tiny_asr.build(conf, sharpen=8.0), conf, recipe / "exp/student")
    finally:
        os.chdir(here)
    return recipe


STOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "espnet_kd":
            raise ImportError("espnet_kd is not installed here")
sys.meta_path.insert(0, Blocker())
import nltk
nltk.download = lambda *a, **k: False
import numpy, torch
"""
#: Runs after the lines of an export's README, which define ``student``.
LOGITS = """
speech = torch.from_numpy(soundfile.read("speech.wav")[0].astype("float32"))[None]
with torch.no_grad():
    encoded, _ = student.asr_model.encode(speech, torch.tensor([speech.size(1)]))
    numpy.save("out.npy", student.asr_model.ctc.ctc_lo(encoded).numpy())
print("TEXT", repr(text))
"""


def stock(place, code):
    """Run code in a directory with speech.wav, without this package, and return its text and logits."""
    place.mkdir()
    soundfile.write(place / "speech.wav", tiny_asr.audio(1.5, 5), 16000, subtype="PCM_16")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK + code + LOGITS]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("TEXT ", 1)[1].strip(), np.load(place / "out.npy")


def readme_lines(folder):
    text = (folder / "README.md").read_text()
    return text.split("```python\n")[1].split("```")[0].replace('"export"', repr(str(folder)))


def own_logits(experiment):
    model, _ = load_model(*find_experiment(experiment))
    speech = torch.from_numpy(tiny_asr.audio(1.5, 5))[None]
    with torch.no_grad():
        return model.ctc.ctc_lo(model.encode(speech, torch.tensor([speech.size(1)]))[0]).numpy()


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """An export that was moved, while its experiment is no longer at the old path; and the student's logits."""
    recipe = with_statistics(tmp_path)
    monkeypatch.chdir(recipe)
    export("exp/student")
    expected = own_logits("exp/student")
    (recipe / "exp/student/export").rename(tmp_path / "folder")
    (recipe / "exp/student/export.zip").rename(tmp_path / "export.zip")
    recipe.rename(tmp_path / "gone")
    monkeypatch.chdir("/")
    return tmp_path, expected


@pytest.mark.trains
def test_folder_and_zip_are_decoded_anywhere(moved, record_property):
    """The lines of the README work in an unrelated directory."""
    place, expected = moved
    text, logits = stock(place / "elsewhere", readme_lines(place / "folder"))
    zipped = (
        "import soundfile\nfrom espnet2.bin.asr_inference import Speech2Text\nimport espnet2.main_funcs.pack_funcs\n"
        f'student = Speech2Text(**espnet2.main_funcs.pack_funcs.unpack({str(place / "export.zip")!r}, "student"), '
        'ctc_weight=1.0, beam_size=10)\ntext, *_ = student(soundfile.read("speech.wav")[0])[0]\n'
    )
    again, same = stock(place / "zipped", zipped)
    assert text == again and text.strip("'") and np.array_equal(logits, same)
    scale = np.abs(expected[..., :-1]).max()  # <sos/eos> has a bias of -10,000
    np.testing.assert_allclose(logits[..., :-1], expected[..., :-1], rtol=0, atol=5e-6 * scale)
    off = np.abs(logits - expected)[..., :-1].max() / scale
    record_property("summary", f"logits of an export against the student's: {off:.1e} of the largest apart")


def test_here_it_is_the_student_in_every_bit(moved):
    place, expected = moved
    for experiment in (place / "folder", place / "export.zip"):
        assert np.array_equal(own_logits(experiment), expected)
        config, model_file = find_experiment(experiment)
        model, args = load_model(config, model_file)
        student = load_state(place / "gone/exp/student/valid.loss.ave.pth")
        assert model.state_dict().keys() == student.keys() and args.preencoder is None
        assert all(torch.equal(v, student[k]) for k, v in model.state_dict().items())


def test_what_is_in_it(moved):
    place, _ = moved
    assert {p.name for p in (place / "folder").iterdir()} == set(FILES) - {"bpe.model"}
    options = yaml.safe_load((place / "folder/decode.yaml").read_text())
    assert options == {"ctc_weight": 1.0, "beam_size": 10, "nbest": 1}
    with zipfile.ZipFile(place / "export.zip") as packed:
        assert set(packed.namelist()) == {"meta.yaml", *FILES} - {"bpe.model"}
    config = yaml.safe_load((place / "folder/config.yaml").read_text())
    assert (config["normalize"], config["preencoder"]) == (None, "linear")


def test_an_export_exported_again_is_the_same(moved, tmp_path):
    place, expected = moved
    export(place / "folder", tmp_path / "second")
    assert np.array_equal(own_logits(tmp_path / "second"), expected)
    first, second = (load_state(d / "model.pth") for d in (place / "folder", tmp_path / "second"))
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


FLAGS = [{}, {"norm_vars": False}, {"norm_means": False}, {"norm_means": False, "norm_vars": False}]


@pytest.mark.parametrize("flags", FLAGS, ids=map(str, FLAGS))
@torch.no_grad()
def test_the_layer_computes_what_the_statistics_did(tmp_path, monkeypatch, flags):
    from espnet_kd.offline import ASRTask

    recipe = with_statistics(tmp_path, normalize_conf=flags)
    monkeypatch.chdir(recipe)
    out = export("exp/student")
    model, _ = ASRTask.build_model_from_file(str(out / "config.yaml"), str(out / "model.pth"), "cpu")
    speech = torch.from_numpy(tiny_asr.audio(1.5, 5))[None]
    found = model.eval().ctc.ctc_lo(model.encode(speech, torch.tensor([speech.size(1)]))[0]).numpy()
    expected = own_logits("exp/student")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=5e-6 * np.abs(expected[..., :-1]).max())


STAY = {
    "streaming": dict(encoder="contextual_block_conformer"),
    "a pre-encoder": dict(preencoder="linear", preencoder_conf=dict(input_size=40, output_size=40)),
}


@pytest.mark.parametrize("changes", STAY.values(), ids=STAY)
def test_where_no_layer_can_stand_in_the_file_comes_along(tmp_path, monkeypatch, changes):
    if "encoder" in changes:
        changes = {**changes, "encoder_conf": dict(output_size=16, attention_heads=2, num_blocks=2, linear_units=32)}
    recipe = with_statistics(tmp_path, **changes)
    monkeypatch.chdir(recipe)
    expected = own_logits("exp/student")
    out = export("exp/student")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert PORTABLE not in config and config["normalize_conf"]["stats_file"] == "exp/student/export/feats_stats.npz"
    assert "feats_stats.npz" in (out / "README.md").read_text()
    monkeypatch.chdir("/")
    for experiment in (recipe / "exp/student/export", recipe / "exp/student/export.zip"):
        assert np.array_equal(own_logits(experiment), expected)


@pytest.mark.parametrize(
    "changes",
    [{PORTABLE: {"normalize_conf": {"stats_file": "/etc/passwd"}}}, {PORTABLE: 3}, {"preencoder": None}],
    ids=["a file", "no mapping", "no layer"],
)
def test_an_entry_that_was_changed_is_refused(moved, changes):
    place, _ = moved
    config = place / "folder/config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **changes}))
    with pytest.raises(UserError, match=f"config.yaml: {PORTABLE}"):
        load_model(*find_experiment(place / "folder"))


def test_an_imported_model_is_refused(tmp_path):
    conf = tiny_asr.config()
    tiny_asr.save(tiny_asr.build(conf), {**conf, "encoder": "onnx_ctc"}, tmp_path / "imported")
    with pytest.raises(UserError, match="imported/config.yaml: its encoder, onnx_ctc, .*--teacher .*imported"):
        export(tmp_path / "imported")
    assert not (tmp_path / "imported/export").exists()


@pytest.fixture
def bpe(tmp_path, monkeypatch):
    """A recipe whose student uses BPE tokens."""
    import sentencepiece

    (tmp_path / "text").write_text("one two three four five six seven eight nine ten\n" * 20)
    recipe = tmp_path / "recipe"
    (recipe / "data").mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(recipe / "data/bpe"), vocab_size=20, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(recipe / "data/bpe.model"))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    tokens = ["<blank>", "<unk>", *(n for n in names if n not in ("<unk>", "<s>", "</s>")), "<sos/eos>"]
    conf = {**tiny_asr.config(), "token_list": tokens, "token_type": "bpe", "bpemodel": "data/bpe.model"}
    tiny_asr.save(tiny_asr.build(conf, sharpen=8.0), conf, recipe / "exp/student")
    monkeypatch.chdir(recipe)
    return recipe


@pytest.mark.trains
def test_a_student_with_bpe_is_decoded_anywhere(bpe, tmp_path, monkeypatch):
    export("exp/student")
    lines = readme_lines(bpe / "exp/student/export")
    plain = lines.replace('{**options, "bpemodel": str(folder / "bpe.model")}', "options")
    assert plain != lines
    in_place, _ = stock(tmp_path / "here", plain)  # in its recipe an export needs only decode.yaml
    (bpe / "exp/student/export").rename(tmp_path / "folder")
    (bpe / "exp/student/export.zip").rename(tmp_path / "export.zip")
    bpe.rename(tmp_path / "gone")
    monkeypatch.chdir("/")
    text, _ = stock(tmp_path / "elsewhere", readme_lines(tmp_path / "folder"))
    assert text == in_place and text.strip("'")
    config, model_file = find_experiment(tmp_path / "export.zip")
    assert (config.parent / "bpe.model").is_file() and load_model(config, model_file)


SECRET = "root:x:0:0:root:/root:/bin/sh\n"


def secret_as_model(recipe):
    (recipe / "secret.txt").write_text(SECRET)
    return {"bpemodel": "secret.txt"}


def absolute_secret(recipe):
    (recipe.parent / "secret.txt").write_text(SECRET)
    return {"bpemodel": str(recipe.parent / "secret.txt")}


def link_to_secret(recipe):
    (recipe.parent / "secret.txt").write_text(SECRET)
    (recipe / "data/link.model").symlink_to(recipe.parent / "secret.txt")
    return {"bpemodel": "data/link.model"}


def tokens_of_secret(recipe):
    (recipe.parent / "secret.txt").write_text(SECRET)
    return {"token_list": str(recipe.parent / "secret.txt")}


def other_pieces(recipe):
    return {"token_list": ["<blank>", "<unk>", *(f"w{i}" for i in range(25)), "<sos/eos>"]}


@pytest.mark.parametrize("change", [secret_as_model, absolute_secret, link_to_secret, tokens_of_secret, other_pieces])
def test_only_files_that_are_what_they_must_be_are_copied(bpe, change):
    config = bpe / "exp/student/config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **change(bpe)}))
    with pytest.raises(UserError, match="secret.txt|link.model|bpe.model") as e:
        export("exp/student")
    assert SECRET.strip() not in str(e.value)
    assert not (bpe / "exp/student/export").exists() and not list((bpe / "exp/student").glob("*.zip"))
    assert not [p for p in (bpe / "exp/student").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_an_objective_of_a_record_is_imported(tmp_path, monkeypatch):
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "exp")
    (tmp_path / "outside_objectives.py").write_text(
        "from espnet_kd.distill.objectives import Objective\nclass Mine(Objective):\n    @classmethod\n"
        "    def export(cls, key, options, config, state):\n        return {**config, 'mine': key}, state\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = {"objectives": [{"objective": "outside_objectives.Mine", "weight": "1.0"}]}
    (exp / "kd_stage.json").write_text(json.dumps(record))
    assert yaml.safe_load((export(exp) / "config.yaml").read_text())["mine"] == "Mine"


def test_leftovers_of_a_killed_export_are_removed(tmp_path):
    conf = tiny_asr.config()
    exp = tiny_asr.save(tiny_asr.build(conf), conf, tmp_path / "exp")
    for name in (".export.abcd_123", ".export.abcd_123.old"):
        (exp / name).mkdir()
        (exp / name / "model.pth").touch()
    (exp / ".export.zip.abcd_123").touch()
    out = export(exp)
    assert {p.name for p in exp.iterdir()} == {"config.yaml", "valid.loss.ave.pth", "export", "export.zip"}
    assert {p.name for p in out.iterdir()} == {"config.yaml", "model.pth", "decode.yaml", "README.md"}
