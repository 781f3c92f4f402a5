"""asr_kd_data: each subcommand's help has an example, and a user's mistake gives one line instead of a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, write_data_dir


@pytest.mark.parametrize("command", ["an4", "mini", "format", "combine", "tokens", "validate"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as e:
        asr_kd_data.main([command, "--help"])
    assert e.value.code == 0 and f"asr_kd_data {command}" in capsys.readouterr().out


def test_a_users_mistake_is_one_message_and_no_traceback(tmp_path: Path) -> None:
    write_data_dir(tmp_path / "d", [Utterance("s-1", "s", f"{tmp_path}/no.wav", "A")])
    command = [sys.executable, "-m", "espnet_kd.bin.asr_kd_data", "validate", str(tmp_path / "d"), str(tmp_path / "e")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr
    assert "wav.scp:1: 's-1': no such audio file" in done.stderr and f"{tmp_path / 'e'}: no such" in done.stderr


def test_no_process_at_all(tmp_path: Path) -> None:
    write_data_dir(tmp_path / "d", [Utterance("s-1", "s", f"{tmp_path}/no.wav", "A")])
    with pytest.raises(UserError, match="--nj is 0; it must be 1 or more"):
        asr_kd_data.main(["validate", str(tmp_path / "d"), "--nj", "0"])


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from espnet_kd.bin import asr_kd_data\n"
        "from espnet_kd.data import an4, mini, formatting, tokens, datadir; asr_kd_data.get_parser()\n"
        "sys.exit('torch' in sys.modules or 'espnet2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
