"""Unmodified sherpa-onnx runs an export, and gives the text and the times of the student."""

import numpy as np
import pytest
import tiny_asr
import tiny_students

from espnet_kd.deploy import sherpa, write
from espnet_kd.deploy.student import load_student
from espnet_kd.transcribe import Transcriber

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx is in the extra 'test'")


@pytest.mark.parametrize("encoder", ["conformer", "conformer, 60 ms", "e_branchformer", "transformer"])
def test_text_and_times_are_the_students(tmp_path, encoder):
    experiment = tiny_students.experiment(tmp_path / "exp", encoder, "utterance_mvn", sharpen=20.0)
    student = load_student(experiment)
    out = write.write_form(student, "sherpa", tmp_path / "out", write.Options())
    recogniser = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(
        model=str(out / "model.onnx"), tokens=str(out / "tokens.txt"), num_threads=1
    )
    torch_student = Transcriber(experiment)
    for seed in range(20):
        wave = tiny_asr.audio(1.0 + 0.3 * seed, seed)
        wave -= wave.mean()  # sherpa-onnx subtracts the mean, which changes a random model's text
        stream = recogniser.create_stream()
        stream.accept_waveform(16000, wave)
        recogniser.decode_stream(stream)
        expected = torch_student(wave)
        assert stream.result.text.split() == expected.text.split() != []
        assert np.allclose(stream.result.timestamps, [t.start for t in expected.tokens], atol=0.001)


def test_lines_of_tokens_txt():
    tokens = ["<blank>", "<unk>", "<space>", "a", "<sos/eos>"]
    assert sherpa.token_lines(tokens, "char", "<space>", [4]) == [
        "<blank> 0", "<unk> 1", "▁ 2", "a 3", "<sos/eos> 4",
    ]  # fmt: skip
    words = sherpa.token_lines(["<blank>", "<unk>", "on", "<sos/eos>"], "word", "<space>", [3])
    assert words == ["<blank> 0", "▁<unk> 1", "▁on 2", "<sos/eos> 3"]
    assert sherpa.token_lines(["<blank>", "▁on"], "bpe", "<space>", []) == ["<blank> 0", "▁on 1"]
