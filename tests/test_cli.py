"""How commands end (exit codes and messages), empty values of options, and the names of installed commands."""

import importlib
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from espnet_kd.cli import UserError, command, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "error, code, said",
    [
        (None, 0, ""),
        (UserError("a.yaml: it is broken; mend it"), 1, "error: a.yaml: it is broken; mend it\n"),
        (
            OSError(28, "No space left on device", "exp/x"), 1,
            "error: exp/x: No space left on device; correct that, and the same command continues\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command continues where it stopped\n"),
    ],
)  # fmt: skip
def test_exit_codes(capsys, error, code, said):
    def main(cmd):
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as e:
        run(main)
    assert e.value.code == code and capsys.readouterr().err == said


def test_a_deprecation_in_espnet_is_not_shown_and_other_warnings_are(recwarn):
    def main(_):
        warnings.warn("`torch.cuda.amp.autocast(args...)` is deprecated.", FutureWarning, stacklevel=1)
        warnings.warn("another one", FutureWarning, stacklevel=1)

    with pytest.raises(SystemExit):
        run(main)
    assert [str(w.message) for w in recwarn] == ["another one"]


def test_a_mistake_of_the_program_is_not_hidden():
    def main(cmd):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run(main)


@pytest.mark.parametrize(
    "command, option",
    [
        ("data format --src x --dst", "dst"),
        ("data format --dst y --src x", "src"),
        ("data validate x", "data_dirs"),
        ("data tokens --text x --out", "out"),
        ("data mini --out", "out"),
        ("data an4 --an4", "an4"),
        ("cache --kd_config kl --teacher t --data_dir d --output", "output"),
        ("export --expdir", "expdir"),
        ("transcribe a.wav --model", "model"),
        ("inference --data_dir d --expdir", "expdir"),
        ("nbest --teacher t --data_dir d --output", "output"),
        ("score --expdir e --data_dir", "data_dir"),
        ("report", "expdir"),
        ("train --output_dir", "output_dir"),
        ("train --output_dir o --token_list t --kd_config", "kd_config"),
        ("train --output_dir o --token_list t --teacher", "teacher"),
        ("train --output_dir o --token_list t --train_shape_file", "train_shape_file"),
        ("page", "page"),
    ],
)
def test_an_empty_value_is_refused(tmp_path, monkeypatch, command, option):
    """An unset shell variable leaves an empty value. The command refuses it and writes nothing."""
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    module = importlib.import_module(f"espnet_kd.bin.asr_kd_{name}")
    for value in ("", " "):
        with pytest.raises(UserError, match=f"--{option} is empty"):
            module.main([*options, value])
    assert not list(tmp_path.iterdir())


def commands(monkeypatch) -> dict:
    """Names of the installed commands, and the functions that they call."""
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return dict(entry.split(" = ") for entry in given["entry_points"]["console_scripts"])


def test_every_command_is_installed(monkeypatch, capsys):
    """The commands in messages and READMEs are among the installed ones."""
    found = commands(monkeypatch)
    assert set(found) == {p.stem for p in (ROOT / "espnet_kd/bin").glob("asr_kd_*.py")}
    assert set(found.values()) == {"espnet_kd.cli:command"}
    texts = [*ROOT.glob("espnet_kd/**/*.py"), *ROOT.glob("egs2/**/*.md"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    use = re.compile(r"(?<![\w./-])(asr_kd_[a-z]+) (?:--?[a-z]|[a-z]+ --)")
    named = {name for p in texts for name in use.findall(p.read_text())}
    assert named and named <= set(found)
    monkeypatch.setattr(sys, "argv", ["/env/bin/asr_kd_page", "kl"])
    with pytest.raises(SystemExit) as e:
        command()
    assert e.value.code == 0 and "stages=1\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["/env/bin/asr_kd_page", "kll"])
    with pytest.raises(SystemExit) as e:
        command()
    assert e.value.code == 1 and "error: unknown method 'kll'" in capsys.readouterr().err
