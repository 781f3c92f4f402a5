"""How much of a teacher's text survives on the frames of a slower student."""

import pytest
import tiny_asr
import torch
import yaml

from espnet_kd.bin import asr_kd_ceiling
from espnet_kd.cli import UserError
from espnet_kd.data.tokenizing import Tokenizer
from espnet_kd.decode.ceiling import measure_ceiling
from espnet_kd.inference.encode import EncoderOutputs

TOKENS = ["<blank>", "<unk>", "<space>", "A", "B", "<sos/eos>"]


class Scripted:
    """A teacher with frames of 20 ms that gives the tokens of a script, whatever the audio."""

    token_list, sampling_rate, frame_shift = TOKENS, 16000.0, 0.02

    def __init__(self, script):
        self.script = script

    def targets(self, utt_ids, speech, lengths):
        ids = torch.tensor([TOKENS.index({" ": "<space>", "-": "<blank>"}.get(c, c)) for c in self.script])
        logits = torch.nn.functional.one_hot(ids, len(TOKENS))[None] * 20.0
        return EncoderOutputs(logits, torch.tensor([len(ids)]), self.frame_shift)


def frames_of(shift):
    return lambda samples: round(samples / 16000 / shift)


@pytest.mark.parametrize(
    "script, shift, lost, aligned",
    [
        ("A---B---", 0.02, 0.0, 0.0),
        ("A---B---", 0.04, 0.0, 0.0),  # one token in four frames: none is lost on frames of 40 ms
        ("AB------", 0.04, 50.0, 50.0),  # both tokens are in one student frame, so B is lost
        ("A-A-B---", 0.04, 33.3, 0.0),  # the blank between the A's is lost, so CTC merges them; the truth has one A
        ("A B-----", 0.08, 66.7, 50.0),
    ],
)
def test_by_hand(tmp_path, script, shift, lost, aligned):
    data = tiny_asr.data_dir(tmp_path, {"u": tiny_asr.audio(0.16, 0)})
    (data / "text").write_text("u AB\n")
    found = measure_ceiling(Scripted(script), data, frames_of(shift), shift, tokenizer=Tokenizer("char"))
    assert found.utterances == 1 and found.lost == pytest.approx(lost, abs=0.1)
    assert found.aligned == pytest.approx(aligned, abs=0.1)


def test_without_transcripts(tmp_path):
    data = tiny_asr.data_dir(tmp_path, {"u": tiny_asr.audio(0.16, 0)})
    found = measure_ceiling(Scripted("A---B---"), data, frames_of(0.04), 0.04, tokenizer=Tokenizer("char"))
    assert (found.own, found.aligned) == (None, None)


def test_the_command_warns_of_a_slow_student(corpus, teacher_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    config = yaml.safe_load(corpus.config().read_text())
    config["encoder_conf"]["input_layer"] = "conv2d8"
    slow = tmp_path / "slow.yaml"
    slow.write_text(yaml.safe_dump(config))
    command = ["--teacher", str(teacher_dir), "--data_dir", str(corpus.dir / "valid"), "--student_config"]
    asr_kd_ceiling.main([*command, str(corpus.config())])
    assert "loses 0.0 %" in caplog.text and "input_layer" not in caplog.text
    asr_kd_ceiling.main([*command, str(slow)])
    assert "frames of 80 ms" in caplog.text and "input_layer: conv2d1" in caplog.text
    caplog.clear()
    asr_kd_ceiling.main([*command, str(corpus.config()), "--student_args=--encoder_conf input_layer=conv2d8"])
    assert "frames of 80 ms" in caplog.text
    with pytest.raises(UserError, match="the student takes audio of 8000 Hz"):
        asr_kd_ceiling.main([*command, str(corpus.config()), "--student_args=--frontend_conf fs=8000"])
    short = tiny_asr.data_dir(tmp_path / "short", {"brief": tiny_asr.audio(0.1, 0)})
    with pytest.raises(UserError, match="short, utterance brief: 0.100 s"):  # 80 ms frames need more
        asr_kd_ceiling.main([*command[:3], str(short), *command[4:], str(slow)])
    caplog.clear()
    asr_kd_ceiling.main([*command, str(corpus.config()), "--student_args=--encoder_conf input_layer=conv2d8"])
    assert "frames of 80 ms" in caplog.text
    for option, value in (("--utterances", "0"), ("--student_config", "/nowhere.yaml")):
        with pytest.raises(UserError, match=option):
            asr_kd_ceiling.main([*command, str(corpus.config()), option, value])
