"""How every command ends."""

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
