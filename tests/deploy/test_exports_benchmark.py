"""tests/benchmarks/exports.py: its output for equal and for different students."""

import re
import runpy
from pathlib import Path

import pytest
import tiny_asr
import tiny_students

from espnet_kd.bin import asr_kd_export

pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")
pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is in the extra 'test'")
main = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/exports.py"))["main"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny_asr.data_dir(tmp_path_factory.mktemp("data"), {f"u{i}": tiny_asr.audio(1.5 + i, i) for i in range(3)})


def rows(printed):
    """{form: cells} of the table that was printed."""
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {cells[0]: dict(zip(lines[0], cells)) for cells in lines[2:]}


def test_forms_of_a_student_and_another_student(tmp_path, data_dir, capsys):
    experiment = tiny_students.experiment(tmp_path / "exp", sharpen=20.0)
    asr_kd_export.main(["--expdir", str(experiment), "--format", "espnet", "onnx", "sherpa"])
    places = [str(experiment / f"export{form}") for form in ("", "_onnx", "_sherpa")]
    main([*places, "--data_dir", str(data_dir), "--rounds", "1"])
    found = rows(capsys.readouterr().out)
    assert list(found) == ["ESPnet", "onnx", "sherpa"] and found["ESPnet"]["CPU time / ESPnet's"] == "1.00"
    assert found["onnx"]["same text"] == "3 of 3" and float(found["onnx"]["largest difference"]) < 1e-4
    # sherpa-onnx subtracts the mean of the audio, which changes a random model's text; the column is still filled.
    assert re.fullmatch("[0-3] of 3", found["sherpa"]["same text"])
    assert re.fullmatch(r"-?\d+ ms", found["sherpa"]["last token off"])

    other = tiny_students.experiment(tmp_path / "other", normalize=None, sharpen=20.0)
    main([str(other), places[1], "--data_dir", str(data_dir), "--rounds", "1"])
    found = rows(capsys.readouterr().out)
    assert found["onnx"]["same text"] == "0 of 3" and float(found["onnx"]["largest difference"]) > 0.1


def test_streams(tmp_path, data_dir, capsys):
    experiment = tiny_students.experiment(tmp_path / "exp", "contextual_block_conformer", "global_mvn", sharpen=20.0)
    asr_kd_export.main(["--expdir", str(experiment), "--format", "stream"])
    command = [str(experiment), str(experiment / "export_stream"), "--data_dir", str(data_dir), "--rounds", "1"]
    main([*command, "--minutes", "1"])
    printed = capsys.readouterr().out
    found = rows(printed)
    assert list(found) == ["ESPnet", "ESPnet, on a stream", "stream"]
    counts = re.findall(r"(\d+) tokens, (kept|dropped .*): memory in MB \(after minutes\) [\d.]+ \(1\);", printed)
    assert [how for _, how in counts] == ["dropped as they come", "kept"]
    assert counts[0][0] == counts[1][0] > "0"  # the same text, whether it is kept or not
    for form in ("ESPnet, on a stream", "stream"):
        assert found[form]["same text"] == "3 of 3" and float(found[form]["largest difference"]) < 1e-4
        first, last, _ = found[form]["latency: first, last, all"].removesuffix(" ms").split(", ")
        assert 0 < float(first) < 2000 and 0 < float(last) < 2000
