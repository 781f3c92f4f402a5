"""LibriSpeech, AISHELL-1 and TED-LIUM 2 in miniature, from the original layout to the results table.

The data dirs are compared with the corpus, which these tests read with their own code instead of the package's. The
tests in ``tests/data/`` of the same layouts are not repeated.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import pytest
import soundfile
from recipe import ROOT, TINY, Recipe

FACTORS = (0.9, 1.0, 1.1)
#: TINY, with the GPU settings of the recipes' YAML switched off.
SMALL = f"{TINY} --num_workers 0 --use_amp false --accum_grad 1"
TEACHER = f"{SMALL} --encoder_conf cgmlp_linear_units=32 --max_epoch 1"
Expected = Dict[str, List[str]]  # file name in a data dir → its lines


def as_files(rows: List[Tuple[str, str, str, str]]) -> Expected:
    """The data dir's files for utterances (id, speaker, audio file, text)."""
    rows = sorted(rows)
    return {
        "text": [f"{utt} {text}" for utt, _, _, text in rows],
        "wav.scp": [f"{utt} {audio}" for utt, _, audio, _ in rows],
        "utt2spk": [f"{utt} {speaker}" for utt, speaker, _, _ in rows],
    }


def librispeech(root: Path) -> Dict[str, Expected]:
    sets = {}
    for name, part in {"train": "train-clean-100", "valid": "test-clean", "test_other": "test-other"}.items():
        rows = []
        for path in (root / part).rglob("*.trans.txt"):
            for line in path.read_text().splitlines():
                utt, text = line.split(" ", 1)
                rows.append((utt, path.parent.parent.name, str(path.parent / f"{utt}.flac"), text))
        sets[name] = as_files(rows)
    return sets


def aishell(root: Path) -> Dict[str, Expected]:
    lines = (root / "transcript/aishell_transcript_v0.8.txt").read_text("utf-8").splitlines()
    text = {line.split()[0]: "".join(line.split()[1:]) for line in lines}
    return {
        name: as_files([(p.stem, p.parent.name, str(p), text[p.stem]) for p in (root / "wav" / theirs).rglob("*.wav")])
        for name, theirs in {"train": "train", "valid": "dev", "test": "test"}.items()
    }


def tedlium2(root: Path) -> Dict[str, Expected]:
    sets = {}
    for name, theirs in {"train": "train", "valid": "dev", "test": "test"}.items():
        texts, segments, talks = [], [], {}
        for path in sorted((root / theirs / "stm").glob("*.stm")):
            talk, sph = path.stem, root / theirs / "sph" / f"{path.stem}.sph"
            lines = [x.split(None, 6) for x in path.read_text().splitlines() if "ignore_time_segment" not in x]
            times = [(float(x[3]), float(x[4])) for x in lines]
            for i, (start, end) in enumerate(times):
                utt = f"{talk}-{round(start * 100):07d}-{round(end * 100):07d}"
                words = re.sub(r"<sil>|</?s>|\(2\)", "", lines[i][6]).replace(" '", "'")
                texts.append(f"{utt} {' '.join(words.split())}")
                talks[utt] = talk
                if name == "train":  # widened by at most half of the pause to each neighbour
                    before = (start - times[i - 1][1]) / 2 if i else start
                    after = (times[i + 1][0] - end) / 2 if i + 1 < len(times) else soundfile.info(sph).duration - end
                    start, end = start - min(0.15, before), end + min(0.1, after)
                segments.append(f"{utt} {talk} {start:.3f} {end:.3f}")
        audio = {f"{talk} {root / theirs / 'sph' / talk}.sph" for talk in talks.values()}
        sets[name] = {
            "text": sorted(texts),
            "wav.scp": sorted(audio),
            "utt2spk": sorted(f"{utt} {talk}" for utt, talk in talks.items()),
            "segments": sorted(segments),
        }
    return sets


@dataclass
class Corpus:
    """One recipe: its miniature corpus, its options and the expected results."""

    name: str
    layout: str
    expected: Callable[[Path], Dict[str, Expected]]
    options: List[str]
    epochs: int
    method: str
    kd_stages: List[int]
    tokens: int  # length of the token list; 0: it follows from the characters of the training text
    left_out: Dict[str, str] = field(default_factory=dict)


CORPORA = [
    Corpus(
        "librispeech", "LibriSpeech", librispeech,
        ["--train_parts", "train-clean-100", "--valid_parts", "test-clean", "--test_parts", "test-other",
         "--nbpe", "60", "--kd_stages", "3", "--target_cache", "true"],
        1, "progressive_fkl", [3], 60,
    ),
    Corpus("aishell", "data_aishell", aishell, [], 3, "progressive_fkl", [1, 2, 3], 0),
    Corpus(
        "tedlium2", "TEDLIUM_release2", tedlium2,
        ["--nbpe", "60", "--method", "kl", "--student_config", "../../../conf/models/transformer_18x128.yaml"],
        1, "kl", [1], 60,
        {"valid": "3: 3 ignore_time_segment_in_scoring", "test": "8: 8 ignore_time_segment_in_scoring"},
    ),
]  # fmt: skip


@pytest.fixture(scope="module", params=CORPORA, ids=lambda c: c.name)
def finished(request, egs2, corpora):
    """A corpus, its recipe after stages 1 to 13, the expected data dirs and the output of the stages."""
    corpus: Corpus = request.param
    root = (corpora / "layouts" / corpus.layout).resolve()
    if not root.is_dir():
        pytest.skip(f"no {corpus.layout} in {corpora / 'layouts'} (ESPNET_KD_TEST_CORPORA)")
    if not (egs2.parent / "conf").exists():
        (egs2.parent / "conf").symlink_to(ROOT / "conf")
    recipe = Recipe(egs2, corpus.name)
    student = f"{SMALL} --max_epoch {corpus.epochs}"
    done = recipe.run(f"--{corpus.name}", str(root), *corpus.options, "--nj", "1",
                      "--teacher_args", TEACHER, "--train_args", student)  # fmt: skip
    return corpus, recipe, corpus.expected(root), done.stdout


def lines_of(path: Path) -> List[str]:
    return path.read_text("utf-8").splitlines()


def test_data_dirs_hold_what_the_corpus_says(finished):
    corpus, recipe, expected, said = finished
    for name, files in expected.items():
        there = {p.name for p in (recipe.dir / "data" / name).iterdir()} & {"text", "wav.scp", "utt2spk", "segments"}
        assert there == set(files)
        for file, lines in files.items():
            assert lines_of(recipe.dir / "data" / name / file) == lines, f"{name}/{file}"
        assert f"data/{name}: left out: {corpus.left_out.get(name, 0)}" in said


def test_formatted_audio_adds_up(finished):
    _, recipe, expected, said = finished
    assert "outside" not in said  # no utterance is too short or too long
    for name in expected:
        seconds = {}
        audio = dict(x.split(" ") for x in lines_of(recipe.dir / "data" / name / "wav.scp"))
        if (recipe.dir / "data" / name / "segments").exists():
            for line in lines_of(recipe.dir / "data" / name / "segments"):
                utt, _, start, end = line.split()
                seconds[utt] = float(end) - float(start)
        else:
            seconds = {utt: soundfile.info(path).duration for utt, path in audio.items()}
        factors = FACTORS if name == "train" else (1.0,)
        copies = {("" if f == 1 else f"sp{f}-") + utt: s / f for utt, s in seconds.items() for f in factors}
        raw = recipe.dir / "dump/raw" / name
        infos = {utt: soundfile.info(recipe.dir / path) for utt, path in map(str.split, lines_of(raw / "wav.scp"))}
        assert {info.samplerate for info in infos.values()} == {16000}
        assert {utt: info.duration for utt, info in infos.items()} == pytest.approx(copies, abs=2e-3)
        text = dict(line.split(" ", 1) for line in expected[name]["text"])
        assert lines_of(raw / "text") == sorted(f"{utt} {text[re.sub('^sp[0-9.]+-', '', utt)]}" for utt in copies)


def test_results(finished):
    corpus, recipe, expected, _ = finished
    rows = {row["role"]: row for row in json.loads((recipe.dir / "exp/results.json").read_text())}
    assert set(rows) == {"teacher", "plain", "student"}
    student = rows["student"]
    assert (student["method"], student["kd_stages"]) == (corpus.method, corpus.kd_stages)
    (record,) = (recipe.dir / "exp").glob(f"student_{corpus.method}*/kd_stage.json")
    assert ("target_cache" in json.loads(record.read_text())) == ("--target_cache" in corpus.options)
    assert student["epochs"] == rows["plain"]["epochs"] == corpus.epochs
    assert all(row["testset"] in expected and row["cer"] is not None for row in rows.values())
    token_list = next((recipe.dir / "data/token_list").iterdir())
    characters = set("".join(line.split(" ", 1)[1] for line in expected["train"]["text"]))
    assert len(lines_of(token_list / "tokens.txt")) == (corpus.tokens or len(characters) + 3)
    assert (token_list / "bpe.model").exists() == bool(corpus.tokens)
