"""The page of --format web: its folder; in a headless Chromium, files and the microphone give the student's text."""

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import tiny_asr
import tiny_students
from browser import open_page
from webpage import needs_browser

from espnet_kd.cli import UserError
from espnet_kd.deploy import web, write
from espnet_kd.deploy.student import load_student
from espnet_kd.transcribe import Transcriber

pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra 'onnx'")


@pytest.fixture(scope="session")
def ort_web(tmp_path_factory):
    """dist/ of onnxruntime-web, from $ESPNET_KD_ORT_WEB or from npm."""
    if "ESPNET_KD_ORT_WEB" in os.environ:
        return Path(os.environ["ESPNET_KD_ORT_WEB"])
    try:
        return web.fetch(tmp_path_factory.mktemp("ort"))
    except UserError as e:
        pytest.skip(f"there is no onnxruntime-web, which ESPNET_KD_ORT_WEB can name: {e}")


@pytest.fixture
def stand_in(tmp_path):
    """Empty files with the names of onnxruntime-web's files."""
    (tmp_path / "dist").mkdir()
    for name in web.ORT_FILES:
        (tmp_path / "dist" / name).touch()
    return tmp_path / "dist"


def test_the_folder(tmp_path, stand_in):
    options = write.Options(ort_web=stand_in)
    out = write.write_form(tiny_students.student(), "web", tmp_path / "out", options)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"model.onnx", "student.json", *web.PAGE_FILES, *(f"ort/{n}" for n in web.ORT_FILES)}
    assert set(json.loads((out / "student.json").read_text())["files"]) == files - {"student.json"}
    write.write_form(tiny_students.student(), "web", out, options)  # the same folder is written again
    assert Transcriber(out)(tiny_asr.audio(2.0, 1)).seconds == 2.0


def test_the_page_names_no_other_host():
    for name in web.PAGE_FILES:
        assert not re.search(r"https?:|//[a-z]+\.", (web.PAGE / name).read_text()), name
    assert "default-src 'self'" in (web.PAGE / "index.html").read_text()


def test_without_onnxruntime_web_nothing_is_written(tmp_path, stand_in, monkeypatch):
    (stand_in / web.ORT_FILES[2]).unlink()
    student = tiny_students.student()
    with pytest.raises(UserError, match=f"--ort_web: .*{web.ORT_FILES[2]}"):
        write.write_form(student, "web", tmp_path / "out", write.Options(ort_web=stand_in))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm, which is not installed; give --ort_web"):
        write.write_form(student, "web", tmp_path / "out", write.Options())
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match="npm cannot fetch .*: no network; give --ort_web"):
        write.write_form(student, "web", tmp_path / "out", write.Options())
    assert {p.name for p in tmp_path.iterdir()} == {"dist", "npm"}


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's functions")
@pytest.mark.parametrize(
    "texts, whole",
    [
        *[([], ""), (["a b"], "a b"), (["a", "b", "c"], "a b c"), (["今天", "天气", "ok", "很好"], "今天天气 ok 很好")],
        *[(["สวัสดี", "ครับ"], "สวัสดีครับ"), (["한국", "사람"], "한국 사람")],
    ],
)
def test_the_page_joins_the_pieces_of_long_audio(tmp_path, texts, whole):
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / web.ORT_FILES[0]).write_text("export const env = { wasm: {} };")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    shutil.copy(web.PAGE / "recognise.js", tmp_path)
    (tmp_path / "run.js").write_text(
        f'import {{ join }} from "./recognise.js"; process.stdout.write(join({json.dumps(texts)}));'
    )
    done = subprocess.run(["node", str(tmp_path / "run.js")], capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == whole, done.stderr


def encoded(samples, form, **options):
    content = io.BytesIO()
    soundfile.write(content, samples, 16000, format=form, **options)
    return content.getvalue()


@pytest.mark.trains
@needs_browser
def test_in_a_browser(tmp_path, ort_web):
    """The page takes files of several kinds (long, short, no audio) and the microphone, and requests no other host."""
    experiment = tiny_students.experiment(tmp_path / "exp", sharpen=20.0)
    student = load_student(experiment)
    out = write.write_form(student, "web", tmp_path / "web", write.Options(ort_web=ort_web))
    waves = {f"{i}.wav": tiny_asr.audio(1.0 + 0.4 * i, i) for i in range(6)}
    waves["long.wav"] = tiny_asr.audio(47.0, 11)
    waves["a.flac"] = tiny_asr.audio(2.0, 12)
    waves["short.wav"] = tiny_asr.audio(1.0, 12)[:20]
    audio = {n: encoded(w, n.rpartition(".")[2].upper(), subtype="PCM_16") for n, w in waves.items()}
    audio["no.wav"] = b"no audio"
    soundfile.write(tmp_path / "spoken.wav", tiny_asr.audio(30.0, 5), 16000, subtype="PCM_16")
    results, asked, elsewhere = open_page(out, audio, tmp_path, microphone=tmp_path / "spoken.wav")
    assert results.get("end") == "" and results["loaded"] == "ready"
    torch_student = Transcriber(experiment)
    for name, wave in waves.items():
        text, _, state = results[name].rpartition("\n")
        assert text.strip() == torch_student(wave).text, (name, state)
    assert "no.wav cannot be read" in results["no.wav"]
    assert results["while recording"].endswith("recording …") and len(results["recorded"]) > 20
    assert not elsewhere and "/ort/ort-wasm-simd-threaded.wasm" in asked
