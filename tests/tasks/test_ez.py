"""The example of distillation from Python, on a tiny corpus."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import soundfile
import yaml

from espnet_kd.cli import UserError
from espnet_kd.ez import Distiller

EXAMPLE = Path(__file__).resolve().parents[2] / "egs2/TEMPLATE/distil_from_python.py"
QUICK = {"max_epoch": 3, "num_workers": 0, "use_tensorboard": False, "use_matplotlib": False, "batch_bins": 100000}


def test_the_example(tmp_path, corpus, teacher_dir):
    spec = importlib.util.spec_from_file_location("distil_from_python", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    where = (str(teacher_dir), str(corpus.dir), str(corpus.dir / "tokens.txt"), str(tmp_path))
    student = example.main(*where, **QUICK)
    out = tmp_path / "student"
    assert json.loads((out / "experiment.json").read_text())["kd_stages"] == [1, 2, 3]
    assert [n.name for n in (out / "export").iterdir() if n.suffix == ".pth"] == ["model.pth"]
    samples, _ = soundfile.read(corpus.dir / "valid/valid0.wav")
    assert isinstance(student(samples)[0][0], str)
    # A second run finds everything finished.
    before = (out / "student.pth").stat().st_mtime_ns
    example.main(*where, **QUICK)
    assert (out / "student.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "words, code, said", [([], 2, "TEACHER DUMP TOKENS OUTPUT"), (["t", "d", "n", "{out}"], 1, "error: ")]
)
def test_mistakes_in_the_examples_command_line(tmp_path, monkeypatch, capfd, words, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *(w.format(out=tmp_path / "out") for w in words)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    err = capfd.readouterr().err
    assert done.value.code == code and said in err and "Traceback" not in err


def test_training_asks_for_statistics(tmp_path, corpus, monkeypatch):
    distiller = Distiller(
        corpus.config(), tmp_path / "student", tmp_path / "stats", method="cr_ctc",
        data_info={"speech": ("wav.scp", "sound"), "text": ("text", "text")},
        train_dump_dir=corpus.dir / "train", valid_dump_dir=corpus.dir / "valid",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"stats/train: call collect_stats\(\) first"):
        distiller.train()
    # Stopped within the validation data: training would choose its model on the utterances that are listed so far.
    for name in ("train/speech_shape", "train/feats_stats.npz", "valid/speech_shape"):
        (tmp_path / "stats" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stats" / name).write_text("valid0 16000\n")
    with pytest.raises(UserError, match=r"stats/valid: call collect_stats\(\) first"):
        distiller.train()
    # A second collect_stats that is stopped leaves no statistics that look complete either.
    monkeypatch.setattr("espnet_kd.ez._train", lambda options: None)
    (tmp_path / "stats/valid/feats_stats.npz").touch()
    distiller.collect_stats()
    with pytest.raises(UserError, match=r"stats/train: call collect_stats\(\) first"):
        distiller.train()


def test_paths_and_tuples_in_options(tmp_path, monkeypatch):
    """Options of a script have them also inside of mappings, which become YAML."""
    given = []
    monkeypatch.setattr("espnet_kd.ez._train", given.append)
    stats = {"stats_file": tmp_path / "stats/train/feats_stats.npz"}
    distiller = Distiller(
        {"encoder": "conformer", "normalize_conf": stats}, tmp_path / "student", tmp_path / "stats", method="kl",
        data_info={"speech": ("wav.scp", "sound")}, train_dump_dir=tmp_path, valid_dump_dir=tmp_path,
        normalize_conf=stats, token_list=tmp_path / "tokens.txt", kd_stages=(1, 3),
    )  # fmt: skip
    distiller.collect_stats()
    content = yaml.safe_load((tmp_path / "stats/train_config.yaml").read_text())
    assert content["normalize_conf"] == {"stats_file": str(stats["stats_file"])}
    options = " ".join(given[0])
    assert f"--normalize_conf stats_file={stats['stats_file']} --token_list {tmp_path}/tokens.txt" in options
    assert "--kd_stages 1 3 " in options
