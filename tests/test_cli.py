"""How every command ends."""

import importlib

import pytest

from espnet_kd.cli import UserError, run


@pytest.mark.parametrize(
    "error, code, said",
    [
        (None, 0, ""),
        (UserError("a.yaml: it is broken; mend it"), 1, "error: a.yaml: it is broken; mend it\n"),
        (
            OSError(28, "No space left on device", "exp/x"), 1,
            "error: exp/x: No space left on device; mend that, and the same command goes on\n",
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
    ],
)
def test_an_empty_value_is_refused(tmp_path, monkeypatch, command, option):
    """As an unset variable leaves it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    module = importlib.import_module(f"espnet_kd.bin.asr_kd_{name}")
    for value in ("", " "):
        with pytest.raises(UserError, match=f"--{option} is empty"):
            module.main([*options, value])
    assert not list(tmp_path.iterdir())
