"""ESPnet's ASR task imports little, leaves every library unchanged, and still gets what a configuration uses."""

import json
import subprocess
import sys

import pytest

#: Stand-ins for libraries that ESPnet would import without need, whether or not the machine has the real ones.
FAKES = {
    "transformers/__init__.py": "class AutoTokenizer:\n    @staticmethod\n    def from_pretrained(name):\n"
    "        return AutoTokenizer()\n    def tokenize(self, line):\n        return line.split('-')\n",
    "transformers/file_utils.py": "",
    **{f"transformers/models/{name}": "" for name in ("__init__.py", "bart/__init__.py", "bart/modeling_bart.py")},
    **{f"transformers/models/wav2vec2_conformer/{name}.py": "" for name in ("__init__", "modeling_wav2vec2_conformer")},
    "g2p_en/__init__.py": "class G2p:\n    def __call__(self, text):\n        return list(text.upper())\n",
    "s3prl/__init__.py": "",
    "wandb/__init__.py": "",
}
SCRIPT = """
import builtins, json, sys
built_in = builtins.__import__
from espnet_kd.tasks.asr_kd import ASRKDTask
ASRKDTask.get_parser()
found = {"loaded": sorted(sys.modules)}
from espnet2.asr.frontend.default import DefaultFrontend
DefaultFrontend(fs=16000)
found |= {"for a frontend": sorted(sys.modules), "restored": builtins.__import__ is built_in}
found["stand-ins"] = [n for n, m in sys.modules.items() if type(m).__module__ == "espnet_kd.lazy"]

import nltk, torch, typeguard
found["nltk"], found["typeguard"] = nltk.download.__module__, typeguard.typechecked.__module__
from espnet2.text.phoneme_tokenizer import PhonemeTokenizer
found["phonemes"] = PhonemeTokenizer("g2p_en").text2tokens("ab")
from espnet2.text.hugging_face_tokenizer import HuggingFaceTokenizer
found["pieces"] = HuggingFaceTokenizer("a model").text2tokens("a-b")
from espnet2.text.cleaner import TextCleaner
found["cleaned"] = TextCleaner("tacotron")("Mr. X")
from espnet2.layers.create_adapter import create_adapter
try:
    create_adapter(torch.nn.Identity(), "lora", {})
except Exception as e:
    found["adapter"] = str(e)
from espnet2.asr.decoder.s4_decoder import SequenceModel
found["s4"] = SequenceModel.forward.__module__
from espnet2.main_funcs.calculate_all_attentions import AlignmentModule
found["alignments"] = isinstance(torch.nn.Identity(), AlignmentModule)
import librosa
found["librosa"] = type(librosa.resample).__name__
import g2p_en, transformers, scipy.signal
found["whole"] = [g2p_en.G2p.__name__, transformers.AutoTokenizer.__name__, scipy.signal.convolve.__name__]
from espnet2.train.preprocessor import librosa as theirs, scipy as their_scipy
import numpy
found["resampled"] = len(theirs.resample(numpy.zeros(160), orig_sr=16000, target_sr=8000))
found["convolved"] = their_scipy.signal.convolve([1.0], [2.0]).tolist()
print("found", json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The findings of a fresh process after the import of the task, with the libraries of ``FAKES`` on its path."""
    place = tmp_path_factory.mktemp("fakes")
    for name, text in FAKES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    script = f"import sys; sys.path.insert(0, {str(place)!r})\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("found ")[2])


@pytest.mark.trains
def test_what_few_configurations_use_is_not_imported(found):
    """Modules are counted, because times depend on the machine: 2,500 beside torch and numpy before, 900 now."""
    loaded = found["loaded"]
    packages = {name.partition(".")[0] for name in loaded}
    unwanted = {"g2p_en", "inflect", "nltk", "sklearn", "transformers", "s3prl", "wandb", "tacotron_cleaner", "hydra"}
    unwanted |= {"numba", "llvmlite", "librosa", "pandas", "matplotlib", "jiwer", "flashlight", "tensorboard"}
    # typeguard alone costs little, but its absence shows that it has rewritten no part of ESPnet.
    assert packages & (unwanted | {"typeguard"}) == set()
    assert not {"scipy.signal", "scipy.stats", "espnet2.tasks.ssl", "espnet2.gan_tts"} & set(loaded)
    assert not {"scipy.signal", "scipy.ndimage"} & set(found["for a frontend"])
    assert len([n for n in loaded if n.partition(".")[0] not in ("torch", "numpy", "torchaudio", "torchgen")]) < 1000


def test_no_library_is_left_changed(found):
    assert found["restored"] and found["stand-ins"] == []
    assert found["nltk"] == "nltk.downloader" and found["typeguard"].startswith("typeguard")
    assert found["whole"] == ["G2p", "AutoTokenizer", "convolve"] and found["librosa"] == "function"


def test_what_a_configuration_uses_is_there(found):
    assert found["phonemes"] == ["A", "B"] and found["pieces"] == ["a", "b"] and found["cleaned"] == "MISTER X"
    assert found["resampled"] == 80 and found["convolved"] == [2.0]
    assert found["alignments"] is False and found["s4"] == "espnet2.asr.state_spaces.model"


def test_what_is_missing_is_refused_in_espnets_words(found):
    assert "loralib" in found["adapter"]


def test_commands_import_espnet_here_alone():
    """Only the task imports ESPnet's parts. An import elsewhere, or earlier, would also import all that they import."""
    script = (
        "import sys, espnet_kd.distill.page, espnet_kd.distill.checks.data, espnet_kd.bin.asr_kd_train; "
        "print('found', [n for n in sys.modules if n.startswith(('espnet2.asr', 'espnet2.tasks', 'espnet2.text'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("found []\n"), done
