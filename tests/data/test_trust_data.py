"""Data dirs from somebody else: commands in wav.scp run only when an ESPnet dump is converted."""

import pytest

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError


@pytest.fixture
def with_command(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "wav.scp").write_text(f"s1-u1 touch {tmp_path}/ran |\n")
    (data / "text").write_text("s1-u1 a\n")
    (data / "utt2spk").write_text("s1-u1 s1\n")
    return data


@pytest.mark.parametrize("verb", ["format", "validate"])
def test_commands_are_not_run_by_format_and_validate(with_command, tmp_path, verb):
    argv = {"format": ["--src", str(with_command), "--dst", str(tmp_path / "out")], "validate": [str(with_command)]}
    with pytest.raises(UserError):
        asr_kd_data.main([verb, *argv[verb]])
    assert not (tmp_path / "ran").exists()


def test_commands_are_run_where_a_dump_is_converted(tmp_path):
    from espnet_kd.data.espnet_dump import _run

    assert _run("s1-u1", f"touch {tmp_path}/ran |", tmp_path).read() == b""
    assert (tmp_path / "ran").exists()
