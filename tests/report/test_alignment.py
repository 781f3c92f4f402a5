"""At which frames students put tokens: counts on hand-made posteriors, then tiny models in a tiny recipe."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_asr
import tiny_kd
import torch
from tiny_results import describe, experiment, texts

from espnet_kd.bin import asr_kd_inference, asr_kd_report
from espnet_kd.cli import UserError
from espnet_kd.report.alignment import FramePosteriors, _offset, compare_frames
from espnet_kd.topk import compress

TOKENS = ["<blank>", *"abcdef"]


def said(*paths: str, frame_shift=0.04, token_list=TOKENS):
    """Posteriors with the given most likely tokens (``-`` for blank), one path for each utterance u0, u1, …."""
    ids = [torch.tensor(["-abcdef".index(c) for c in path], dtype=torch.long) for path in paths]
    posteriors = {
        f"u{i}": compress(5.0 * torch.nn.functional.one_hot(x, len(TOKENS)).float(), 1) for i, x in enumerate(ids)
    }
    return FramePosteriors(list(token_list), frame_shift, posteriors)


def test_spikes_are_where_tokens_begin():
    assert said("-aa-ab--").spikes("u0") == [(1, 1), (1, 4), (2, 5)]
    assert said("----").spikes("u0") == []


def test_counts_of_a_case_done_by_hand():
    #       frame   0123456789
    teacher = said("-a--bb-c--", "--d-", "-f--")
    student = said("--a-b--e-f", "--d-", "----")
    found = compare_frames(teacher, student)
    assert found.tokens == 5 and found.offsets == {0: 2, 1: 1}  # a is late by one frame, b and d have no offset
    assert found.frames == {
        "all": 18, "teacher_all": 18, "teacher_blank": 12, "blank": 13, "nb": 6, "nb_same": 2, "bl": 12, "bl_same": 10,
    }  # fmt: skip
    shares = found.shares()
    assert shares["matched"] == 3 / 5 and shares["moved"] == 1 / 3 and shares["distance"] == 1
    assert shares["delay"] == pytest.approx(40 / 3) and shares["blank"] == 13 / 18
    assert (shares["teacher_blank"], shares["agreement_nb"], shares["agreement_bl"]) == (12 / 18, 2 / 6, 10 / 12)


def test_nothing_said_gives_no_numbers():
    shares = compare_frames(said("---"), said("---")).shares()
    assert shares["tokens"] == 0 and shares["agreement_bl"] == shares["blank"] == 1
    assert all(shares[k] is None for k in ("matched", "moved", "distance", "delay", "agreement_nb"))


def test_a_slower_student_in_place_is_in_place():
    # Frames of 40 and 60 ms; tokens at 120–160 ms, 240–280 ms and 400–440 ms.
    teacher = said("---a--b---c-", frame_shift=0.04)
    student = said("--a-b-c-", frame_shift=0.06)
    found = compare_frames(teacher, student)
    assert found.offsets == {0: 3} and found.step == 0.06
    assert found.shares()["agreement_nb"] == found.shares()["agreement_bl"] == 1
    assert compare_frames(student, teacher).offsets == {0: 3}
    assert [_offset(3, i, 1.5) for i in (1, 2, 4)] == [-1, 0, 2]
    assert [_offset(2, i, 2 / 3) for i in (2, 3, 6)] == [-1, 0, 2]


def test_an_utterance_too_short_for_a_teacher_of_another_frame_rate():
    found = compare_frames(said("", "-a-"), said("-", "-a", frame_shift=0.06))
    assert found.tokens == 1 and found.frames["all"] == found.frames["teacher_all"] == 3


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (said("-a--", token_list=[*TOKENS[:-1], "x"]), "tokens are not the teacher's"),
        (said("-a-------"), "u0: .*differ by more than two frames"),
    ],
)
def test_models_that_do_not_fit(student, words):
    with pytest.raises(UserError, match=words):
        compare_frames(said("-a--"), student)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A recipe with a teacher and students of another frame rate, all decoded; paths are relative to the recipe."""
    home = tmp_path_factory.mktemp("recipe")
    ids = [f"u{i}" for i in range(4)]
    (home / "dump/raw").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        data = Path("dump/raw/test")
        tiny_asr.data_dir(data, {u: tiny_asr.audio(1.5 + 0.3 * i, i) for i, u in enumerate(ids)})
        (data / "text").write_text("".join(f"{u} AB CDE\n" for u in ids))
        layers = {"teacher": "conv2d", "student_plain": "conv2d6", "student_kl": "conv2d6"}
        for seed, (name, layer) in enumerate(layers.items()):
            exp = tiny_kd.save_teacher(Path("exp") / name, seed, input_layer=layer, num_blocks=2)
            kd = name == "student_kl"
            role = "student" if kd else name.rpartition("_")[2]
            asr_kd_inference.main(["--expdir", str(exp), "--data_dir", str(data)])
            facts = json.loads((exp / "decode_test/decode.json").read_text())
            experiment(exp, role, [3, 1, 2, 2 + seed % 2], method="kl" if kd else None)
            (exp / "decode_test/decode.json").write_text(json.dumps({**facts, "params": 1000}))
        (exp / "kd_stage.json").write_text(json.dumps({"teacher": ["exp/teacher"]}))
    return home


@pytest.fixture
def recipe(decoded, tmp_path, monkeypatch):
    """A copy of the recipe for a test to damage; it is the working directory."""
    home = tmp_path / "recipe"
    shutil.copytree(decoded, home)
    monkeypatch.chdir(home)
    return home


def run(*options):
    asr_kd_report.main(["exp", *options])
    rows = {r["experiment"]: r for r in json.loads(Path("exp/results.json").read_text())}
    section = Path("exp/RESULTS.md").read_text().split("## Alignment")[1].split("\n## ")[0]
    return rows, section, Path("exp/report.html").read_text()


def test_models_are_run_and_drawn(recipe):
    rows, section, page = run()
    for name in ("student_plain", "student_kl"):
        frames = rows[name]["frames"]
        assert frames["utterances"] == 4 and frames["tokens"] > 0 and 0 <= frames["agreement_nb"] <= 1
        assert f"|{name}|" in section
    assert rows["teacher"]["frames"] is None and "|teacher|" not in section
    assert section.count("](report/spikes_") == 3 and "](report/offsets_1.png)" in section
    assert "most improved" in section or "typical" in section
    # There are no other pictures, because all models have one size and nothing was trained.
    assert "Missing" not in section and page.count("data:image/png") == section.count("](report/")


def test_teacher_against_itself_agrees_everywhere(recipe):
    (recipe / "exp/student_kl/valid.loss.ave.pth").write_bytes((recipe / "exp/teacher/valid.loss.ave.pth").read_bytes())
    (recipe / "exp/student_kl/config.yaml").write_text((recipe / "exp/teacher/config.yaml").read_text())
    rows, _, _ = run("--examples", "0", "--frame_utts", "3")
    frames = rows["student_kl"]["frames"]
    assert (frames["utterances"], frames["matched"], frames["moved"], frames["delay"]) == (3, 1, 0, 0)
    assert frames["agreement_nb"] == frames["agreement_bl"] == 1


def test_works_from_elsewhere(recipe, tmp_path_factory, monkeypatch):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)  # a relative path of wav.scp does not exist here
    asr_kd_report.main([str(recipe / "exp"), "--output_dir", "report"])
    assert "|student_kl|" in (here / "report/RESULTS.md").read_text().split("## Alignment")[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: (r / "exp/student_kl/valid.loss.ave.pth").unlink(), "student_kl: the model that decoded it"),
        (lambda r: (r / "exp/student_kl/valid.loss.ave.pth").write_bytes(b"PK no model"), "cannot load"),
        (lambda r: (r / "dump/raw/test").rename(r / "moved"), "test: its data dir is not there"),
        (lambda r: (r / "dump/raw/test/u1.wav").unlink(), "utterance u1: no such audio file"),
        (lambda r: soundfile.write(r / "dump/raw/test/u1.wav", np.zeros(99), 8000), "u1 has 8000 Hz"),
        (lambda r: (r / "exp/student_kl/decode_test/decode.json").write_text("{"), "decode.json cannot be read"),
        (
            lambda r: (r / "exp/student_kl/kd_stage.json").write_text('{"teacher": ["exp/gone"]}'),
            "its teacher exp/gone is not there",
        ),
    ],
)
def test_what_is_missing_is_said(recipe, damage, words):
    damage(recipe)
    _, section, _ = run("--examples", "1")
    assert re.search(f"- Missing: .*{words}", section.replace("\\", ""))


def test_models_with_nan_are_named(recipe):
    path = recipe / "exp/student_kl/valid.loss.ave.pth"
    state = torch.load(path)
    torch.save({k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in state.items()}, path)
    rows, section, _ = run()
    assert "student_kl/valid.loss.ave.pth: it gives NaN" in section and rows["student_kl"]["frames"] is None
    assert rows["student_plain"]["frames"]["tokens"] > 0


def test_without_students_nothing_is_run(tmp_path):
    describe(tmp_path / "teacher", "teacher")
    texts(tmp_path / "teacher", {})
    asr_kd_report.main([str(tmp_path)])
    assert "Nothing is decoded yet" in (tmp_path / "RESULTS.md").read_text()
