"""asr_kd_export: formats, output directories, model cards, and measurements of the exported forms."""

import json

import pytest
import soundfile
import tiny_asr
import tiny_students
import yaml

from espnet_kd.bin import asr_kd_export, asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.deploy import measure, web
from espnet_kd.deploy.card import make_card
from espnet_kd.distill.export import FILES
from espnet_kd.files import sha256_of
from espnet_kd.transcribe import Transcriber

pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")

FORMATS = [f for f in asr_kd_export.FORMATS if f != "stream"]  # a stream needs another encoder


@pytest.fixture
def recipe(tmp_path):
    """An experiment in exp/, a data dir with transcripts, and stand-ins for onnxruntime-web."""
    tiny_students.experiment(tmp_path / "exp/student", sharpen=20.0)
    waves = {f"u{i}": tiny_asr.audio(1.0 + i, i) for i in range(3)}
    (tmp_path / "exp/student/experiment.json").write_text('{"role": "student", "method": "kl", "seed": 3}')
    data = tiny_asr.data_dir(tmp_path / "dump/test", waves)
    (data / "text").write_text("".join(f"{u} a b\n" for u in waves))
    (tmp_path / "dist").mkdir()
    for name in web.ORT_FILES:
        (tmp_path / "dist" / name).touch()
    return tmp_path


@pytest.mark.trains
def test_all_formats_measured_and_described(recipe, tmp_path):
    experiment = recipe / "exp/student"
    command = ["--expdir", str(experiment), "--format", *FORMATS, "--ort_web", str(recipe / "dist")]
    asr_kd_export.main([*command, "--measure", str(recipe / "dump/test"), "--card"])
    rows = json.loads((experiment / "exports.json").read_text())
    assert [tuple(row) for row in rows] == [measure.KEYS] * 4
    assert [row["format"] for row in rows] == list(FORMATS)
    for row in rows:
        folder = experiment / ("export" if row["format"] == "espnet" else f"export_{row['format']}")
        assert row["testset"] == "test" and row["utterances"] == row["same_text"] == 3 and row["wer"] > 0
        assert 0 < row["rtf"] < 1 and row["first_result_seconds"] > 0
        if row["format"] != "espnet":
            about = json.loads((folder / "student.json").read_text())
            assert about["files"] == {
                str(p.relative_to(folder)): sha256_of(p)
                for p in folder.rglob("*")
                if p.is_file() and p.name != "student.json"
            }
        head, _, text = (folder / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(head)["pipeline_tag"] == "automatic-speech-recognition"
        assert "# student\n" in text and "- method: kl\n" in text and "to be filled in" in text
        for form in FORMATS:
            assert f"### {form}\n" in text and f"|{form}|test|" in text
    # torch and ESPnet are not loaded for a graph, which saves memory
    assert rows[1]["memory_bytes"] < 0.6 * rows[0]["memory_bytes"]
    asr_kd_export.main([*command, "--card"])  # the same folders are written again
    measured = ["--format", "onnx", "--quantize", "int8", "--measure", str(recipe / "dump/test")]
    asr_kd_export.main(["--expdir", str(experiment), *measured, "--output_dir", str(recipe / "int8")])
    shown = {(row["format"], row["quantize"]): row for row in json.loads((experiment / "exports.json").read_text())}
    assert set(shown) == {*((f, "none") for f in FORMATS), ("onnx", "int8")}
    assert shown["espnet", "none"]["bytes"] >= rows[0]["bytes"]  # of the export with its card, not of the experiment
    assert {p.name for p in (experiment / "export").iterdir()} <= set(FILES)
    asr_kd_report.main([str(recipe / "exp"), "--no_frames"])
    assert "## Exported forms" in (recipe / "exp/RESULTS.md").read_text()
    assert "|sherpa|test|" in (recipe / "exp/RESULTS.md").read_text()


def plain_experiment(home):
    home.mkdir(parents=True)
    config = {"encoder": "conformer", "token_list": ["<blank>", "a"], "token_type": "char"}
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    return home


def test_a_card_has_the_results_of_its_own_directory(tmp_path):
    """A report on several directories has rows of all; experiments of the same name are other models."""
    home = plain_experiment(tmp_path / "exp/student")
    row = {"role": "student", "testset": "test", "experiment": "student", "params": 5, "cer": 1.0, "search": "greedy"}
    rows = [{**row, "expdir": "exp", "wer": 2.0}, {**row, "expdir": "exp", "wer": 1.5, "search": "beam size 10"}]
    rows += [{**row, "expdir": "other/exp", "wer": 9.0}]
    rows += [{**row, "expdir": "other/exp", "wer": 8.0, "role": "teacher", "experiment": "teacher"}]
    (tmp_path / "exp/results.json").write_text(json.dumps(rows))
    card = make_card(home, "onnx", home, {})
    assert [line.split("|")[2:6:3] for line in card.splitlines() if line.startswith("|test|")] == [
        ["this model", "2.00"], ["this model, beam size 10", "1.50"],
    ]  # fmt: skip
    (tmp_path / "exp/results.json").write_text("[]")
    assert "## Results" not in make_card(home, "onnx", home, {})


@pytest.mark.parametrize("record, expected", [
    ({"method": "cr_ctc", "teacher": []}, False),
    ({"method": "kl", "teacher": ["exp/teacher"]}, True),
    ({"method": "kl", "teacher": [], "target_cache": {"teacher": "0"}}, True),
    ({"method": "sequence_kd", "teacher": [], "nbest": {"exp/nbest": "0"}}, True),
])  # fmt: skip
def test_only_a_student_with_a_teacher_is_called_distilled(tmp_path, record, expected):
    home = plain_experiment(tmp_path / "exp/student")
    (home / "kd_stage.json").write_text(json.dumps(record))
    assert ("distilled from" in make_card(home, "onnx", home, {})) == expected


def test_what_a_card_says_runs(recipe, monkeypatch, capsys):
    """The card's code for onnxruntime and for sherpa-onnx runs beside the folders and a speech.wav."""
    pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is in the extra 'test'")
    experiment, wave = recipe / "exp/student", tiny_asr.audio(3.0, 4)
    asr_kd_export.main(["--expdir", str(experiment), "--format", "onnx", "sherpa", "--card"])
    card = (experiment / "export_sherpa/README.md").read_text()
    onnx, sherpa = (block.partition("```")[0] for block in card.split("```python\n")[1:])
    monkeypatch.chdir(experiment)
    soundfile.write("speech.wav", wave, 16000, subtype="PCM_16")
    expected = Transcriber("export_onnx")("speech.wav")
    capsys.readouterr()
    exec(onnx, {})
    assert capsys.readouterr().out == f"{[t.token for t in expected.tokens]}\n" != "[]\n"
    exec(sherpa, {})
    assert capsys.readouterr().out.split() == Transcriber("export_sherpa")("speech.wav").text.split() != []


@pytest.mark.trains
def test_a_streaming_student(recipe):
    experiment = tiny_students.experiment(recipe / "exp/live", "contextual_block_conformer", "global_mvn", sharpen=20.0)
    command = ["--expdir", str(experiment), "--format", "espnet", "stream", "--card"]
    asr_kd_export.main([*command, "--measure", str(recipe / "dump/test")])
    espnet, stream = json.loads((experiment / "exports.json").read_text())
    assert espnet["latency_seconds"] is None and 0 < stream["latency_seconds"] < 1.5
    assert stream["format"] == "stream" and stream["same_text"] == 3 and stream["bytes"] < espnet["bytes"] * 4
    assert "--streaming -" in (experiment / "export_stream/README.md").read_text()


def test_one_format_elsewhere(recipe):
    out = recipe / "elsewhere"
    command = ["--expdir", str(recipe / "exp/student"), "--format", "onnx"]
    asr_kd_export.main([*command, "--output_dir", str(out), "--max_seconds", "8", "--opset", "16"])
    about = json.loads((out / "student.json").read_text())
    assert (about["max_seconds"], about["opset"], about["name"]) == (8, 16, "student")
    assert not (recipe / "exp/student/export").exists() and not (recipe / "exp/student/export_onnx").exists()
    (out / "mine.txt").touch()
    with pytest.raises(UserError, match="mine.txt"):
        asr_kd_export.main([*command, "--output_dir", str(out)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "espnet", "onnx", "--output_dir", "x"], "--output_dir goes with one --format"),
        (["--format", "onnx", "--output_dir", ""], "--output_dir is empty"),
        (["--format", "onnx", "--max_seconds", "nan"], "--max_seconds"),
        (["--format", "web", "--ort_web", "nowhere"], "--ort_web: nowhere"),
        (["--quantize", "int8"], "--quantize int8"),
    ],
)
def test_mistakes(recipe, monkeypatch, options, message):
    monkeypatch.chdir(recipe)
    before = sorted(recipe.rglob("*"))
    with pytest.raises(UserError, match=message):
        asr_kd_export.main(["--expdir", "exp/student", *options])
    assert sorted(recipe.rglob("*")) == before


def test_without_onnxruntime(recipe, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="onnxruntime is not installed"):
        asr_kd_export.main(["--expdir", str(recipe / "exp/student"), "--format", "onnx"])
    assert not (recipe / "exp/student/export_onnx").exists()


def test_a_damaged_exports_json_shows_nothing(tmp_path):
    for content in ("{", "5", "[1]", '[{"format": "onnx"}]'):
        (tmp_path / "exports.json").write_text(content)
        assert measure.read_rows(tmp_path) == []
