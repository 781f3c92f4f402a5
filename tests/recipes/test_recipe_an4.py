"""AN4, which is real speech: a teacher of stock ESPnet, stock decoding without espnet_kd, pack and unpack."""

import json
import os
import subprocess
import sys

import pytest
from recipe import ROOT, STOCK, TINY, Recipe
from webpage import BROWSER, check_in_browser, check_static

STUDENT = f"{TINY} --max_epoch 3"


@pytest.fixture(scope="module")
def recipe(egs2, corpora, tmp_path_factory):
    source = corpora / "an4"
    if not source.is_dir():
        pytest.skip(f"no AN4 in {corpora} (ESPNET_KD_TEST_CORPORA)")
    # A few of its utterances, in the original layout.
    few = tmp_path_factory.mktemp("an4")
    (few / "etc").mkdir()
    (few / "wav").symlink_to(source / "wav")
    for name, step in (("an4_train", 20), ("an4_test", 16)):
        for kind in ("transcription", "fileids"):
            lines = (source / f"etc/{name}.{kind}").read_text().splitlines(keepends=True)
            (few / f"etc/{name}.{kind}").write_text("".join(lines[::step]))
    result = Recipe(egs2, "an4")
    result.run("--an4", str(few), "--stage", "1", "--stop_stage", "4")
    return result


@pytest.fixture(scope="module")
def student(recipe):
    """A student distilled from a teacher that stock ESPnet trained outside the recipe; a plain student comes first."""
    teacher = recipe.dir / "elsewhere"
    data = [f"dump/raw/{d}/{f}" for d in ("train", "valid") for f in ("wav.scp,speech,sound", "text,text,text")]
    stats = recipe.dir / "exp/stats_train_char"
    stock = [
        *(sys.executable, "-m", "espnet2.bin.asr_train", "--config", "conf/train_teacher.yaml", *STOCK.split()),
        *("--token_type", "char", "--token_list", "data/token_list/char/tokens.txt", "--max_epoch", "2"),
        *("--train_data_path_and_name_and_type", data[0], "--train_data_path_and_name_and_type", data[1]),
        *("--valid_data_path_and_name_and_type", data[2], "--valid_data_path_and_name_and_type", data[3]),
        *("--train_shape_file", f"{stats}/train/speech_shape", "--valid_shape_file", f"{stats}/valid/speech_shape"),
        *("--normalize", "global_mvn", "--normalize_conf", f"stats_file={stats}/train/feats_stats.npz"),
        *("--output_dir", str(teacher)),
    ]
    done = subprocess.run(stock, cwd=recipe.dir, env=recipe.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two of three KD stages, as in an ablation.
    recipe.run("--stage", "5", "--teacher", str(teacher), "--train_args", STUDENT, "--kd_stages", "1 3")
    return recipe.dir / "exp/student_progressive_fkl_13"


def test_results(recipe, student):
    table = {row["role"]: row for row in json.loads((recipe.dir / "exp/results.json").read_text())}
    assert table["student"]["kd_stages"] == [1, 3]
    assert table["student"]["epochs"] == table["plain"]["epochs"] == 3
    assert table["teacher"]["wer"] is not None


def test_report(recipe, student, tmp_path):
    page = check_static((recipe.dir / "exp/report.html").read_text())
    shown = [attrs["alt"] for attrs in page.all("img")]
    for what in ("Validation CTC loss", "Training curves", "Spikes", "Offsets"):
        assert any(what.lower() in alt.lower() for alt in shown), (what, shown)
    if BROWSER:
        check_in_browser(recipe.dir / "exp/report.html", tmp_path)


def decode_without_espnet_kd(tmp_path, cwd, config, model) -> str:
    """The text from stock espnet2.bin.asr_inference in a process that cannot import espnet_kd."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'espnet_kd':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    lines = (cwd / "dump/raw/test/wav.scp").read_text().splitlines()[:2]
    (tmp_path / "wav.scp").write_text("".join(f"{line}\n" for line in lines))
    out = tmp_path / "decode"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "espnet2.bin.asr_inference", "--ngpu", "0", "--beam_size", "2"),
            *("--ctc_weight", "1.0", "--asr_train_config", str(config), "--asr_model_file", str(model)),
            *("--data_path_and_name_and_type", f"{tmp_path / 'wav.scp'},speech,sound", "--output_dir", str(out)),
        ],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return (out / "1best_recog/text").read_text()


def test_stock_decoding_and_pack(recipe, student, tmp_path):
    export = student / "export"
    text = decode_without_espnet_kd(tmp_path, recipe.dir, export / "config.yaml", export / "model.pth")
    assert len(text.splitlines()) == 2

    packed, elsewhere = tmp_path / "student.zip", tmp_path / "elsewhere"
    relative = export.relative_to(recipe.dir)
    subprocess.run(
        [
            *(sys.executable, "-m", "espnet2.bin.pack", "asr", "--asr_train_config", f"{relative}/config.yaml"),
            *("--asr_model_file", f"{relative}/model.pth", "--option", f"{relative}/feats_stats.npz"),
            *("--outpath", str(packed)),
        ],
        cwd=recipe.dir,
        env=recipe.env,
        check=True,
        capture_output=True,
    )
    export.rename(student / "moved")  # the unpacked model must not use files of the old place
    try:
        code = (
            "import json, sys; from espnet2.main_funcs.pack_funcs import unpack\n"
            "print(json.dumps(unpack(*sys.argv[1:])))"
        )
        found = subprocess.run(
            [sys.executable, "-c", code, str(packed), str(elsewhere)], check=True, capture_output=True, text=True
        )
        files = json.loads(found.stdout.splitlines()[-1])
        again = decode_without_espnet_kd(tmp_path, recipe.dir, files["asr_train_config"], files["asr_model_file"])
    finally:
        (student / "moved").rename(export)
    assert again == text


def test_no_corpus_audio_is_committed():
    if not (ROOT / ".git").exists():
        pytest.skip("the list of committed files needs a git checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "README.md" in names.splitlines()
    assert not [n for n in names.splitlines() if n.endswith((".wav", ".flac", ".opus", ".sph", ".pth", ".ark"))]
