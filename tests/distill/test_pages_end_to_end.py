"""Every page of conf/methods: one epoch of two steps, an interruption, the other epochs, export, stock decoding."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny_kd
import torch
import yaml

from espnet_kd.bin import asr_kd_train
from espnet_kd.distill.export import export
from espnet_kd.distill.options import KD_OPTIONS
from espnet_kd.distill.page import METHODS_DIR, list_pages, load_page
from espnet_kd.distill.schedule import EpochHooks
from espnet_kd.experiments.checkpoints import load_checkpoint

PAGES = list_pages()
#: Page → encoder options of its student, where the default of tiny_asr does not fit.
STUDENTS = {
    "layer_pruning": {"output_size": 24, "num_blocks": 2},  # as wide as the teacher
    "self_kd": {"output_size": 24, "num_blocks": 3},  # the same encoder as the teacher
    "inter_kd": {"num_blocks": 4},
}
STREAMING = dict(
    encoder="contextual_block_conformer",
    encoder_conf=dict(
        output_size=16, attention_heads=2, num_blocks=2, linear_units=32, cnn_module_kernel=7, block_size=8, hop_size=4,
        look_ahead=2, macaron_style=True,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def nbest(corpus, directory):
    """Two hypotheses for every utterance."""
    ids = [line.split()[0] for n in ("train", "valid") for line in (corpus.dir / n / "text").read_text().splitlines()]
    lines = [f"{u} {rank} {-rank}.5 {' '.join('abcde'[rank:])}\n" for u in ids for rank in (1, 2)]
    (directory / "nbest").write_text("".join(lines))
    return directory / "nbest"


def options(corpus, directory, page, teacher_dir, nbest):
    """The command line that trains a student with ``page``: two steps per epoch, two epochs per KD stage."""
    encoder = {"encoder_conf": {**tiny_kd.student_config()["encoder_conf"], **STUDENTS.get(page, {})}}
    if page == "delayed_kd":
        encoder = STREAMING
    config = yaml.safe_load(corpus.config().read_text())
    if page in ("layer_pruning", "self_kd"):  # these need the features of the teacher too
        config.update(normalize="utterance_mvn", normalize_conf={})
    stages = len(load_page(page).stages)
    own = tiny_kd.write_yaml(directory / f"{page}.yaml", {**config, **encoder, "num_iters_per_epoch": 2})
    text = page != "label_free"
    command = corpus.options(directory / page, "--teacher", str(teacher_dir), "--kd_config", page, text=text)
    command[command.index("--config") + 1] = str(own)
    return [*command, "--max_epoch", str(2 * stages), "--nbest", str(nbest)]


class Killed(Exception):
    pass


@pytest.mark.parametrize("page", PAGES)
def test_train_resume_and_export(corpus, directory, teacher_dir, nbest, page, monkeypatch, caplog):
    command = options(corpus, directory, page, teacher_dir, nbest)
    out = directory / page
    with monkeypatch.context() as m:
        original = EpochHooks.build_iter

        def build_iter(self, epoch, shuffle=None):
            if epoch == 2:
                raise Killed
            return original(self, epoch, shuffle)

        m.setattr(EpochHooks, "build_iter", build_iter)
        with pytest.raises(Killed):
            asr_kd_train.main(command)
    assert list(out.rglob("1epoch.pth"))
    caplog.set_level("INFO")
    asr_kd_train.main(command)
    assert "from epoch 2" in caplog.text  # it resumed instead of starting again
    record = json.loads((out / "kd_stage.json").read_text())
    assert record["finished"]
    assert all(torch.isfinite(v).all() for v in torch.load(out / "student.pth", weights_only=True).values())

    exported = export(out)
    config = yaml.safe_load((exported / "config.yaml").read_text())
    state = torch.load(exported / "model.pth", weights_only=True)
    assert not set(config) & set(KD_OPTIONS)
    assert not [k for k in state if k.startswith("kd_heads")]
    if page == "self_kd":
        assert config["encoder_conf"]["num_blocks"] == 2
        assert not [k for k in state if k.startswith("encoder.encoders.2")]


def test_stock_espnet_decodes_them_all(directory, corpus):
    """All exports are decoded in one process, in which espnet_kd cannot be imported."""
    exports = [p for p in PAGES if (directory / p / "export").is_dir()]
    if not exports:
        pytest.skip("nothing was exported: run the whole file")
    speech = corpus.dir / "valid" / "valid0.wav"
    script = directory / "decode.py"
    script.write_text(
        "import json, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'espnet_kd':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import soundfile\n"
        "from espnet2.bin.asr_inference import Speech2Text\n"
        "from pathlib import Path\n"
        "found = {}\n"
        "for d in map(Path, sys.argv[2:]):\n"
        "    decode = Speech2Text(str(d / 'config.yaml'), str(d / 'model.pth'), ctc_weight=1.0, beam_size=2)\n"
        "    found[d.parent.name] = decode(soundfile.read(sys.argv[1])[0])[0][0]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(speech), *(str(directory / p / "export") for p in exports)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == exports == PAGES
    assert all(isinstance(text, str) for text in found.values())


def test_a_method_of_your_own_as_the_readme_has_it(corpus, directory, teacher_dir, monkeypatch):
    """The function, its test, the class and the page of conf/methods/README.md work from outside the package."""
    readme = (METHODS_DIR / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## A method of your own") :]
    code, page, test = re.findall(r"```(?:python|yaml)\n(.*?)```", section, re.DOTALL)
    assert len((code + page).splitlines()) < 30
    outside = directory / "outside"
    outside.mkdir()
    (outside / "my_kd.py").write_text(code)
    (outside / "my_kd.yaml").write_text(page)
    monkeypatch.syspath_prepend(str(outside))
    checked: dict = {}
    exec(test, checked)
    checked["test_reverse_kl"]()
    nothing = torch.zeros(1, 3, dtype=torch.bool)  # as a rule selects in a batch without speech
    assert checked["reverse_kl"](*torch.randn(2, 1, 3, 5), torch.tensor([3]), frames=nothing) == 0
    out = directory / "own"
    asr_kd_train.main(
        corpus.options(out, "--teacher", str(teacher_dir), "--kd_config", str(outside / "my_kd.yaml"), max_epoch=1)
    )
    stats = load_checkpoint(out / "checkpoint.pth")["reporter"]["stats"]
    assert stats[1]["train"]["loss_Reverse"] > 0
    assert json.loads((out / "kd_stage.json").read_text())["objectives"][0]["objective"] == "my_kd.Reverse"
    assert (export(out) / "model.pth").is_file()
