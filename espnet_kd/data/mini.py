"""The embedded corpus: commands spoken by eSpeak NG, with noise and reverberation, synthesised on the spot.

Voices of ``valid`` and ``test`` occur nowhere else, and no sentence occurs twice. Every utterance is drawn from its
own random generator, keyed by (seed, split, index): the bytes depend on the settings, not on the number of processes.
"""

from __future__ import annotations

import functools
import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Set

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data import espeak
from espnet_kd.data.audio import write_audio
from espnet_kd.data.datadir import Utterance, write_data_dir
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.data.sentences import make_sentence, words
from espnet_kd.experiments.record import Record
from espnet_kd.files import PathLike

FS = 16000
VERSION = 3  # part of the settings: raise it when the same settings give other bytes
DEFAULT_SIZES = {"train": 2400, "valid": 100, "test": 250}
# Variants of the engine, fixed by name so that another version of it cannot move a voice between the splits. Whispers
# and robotic voices are left out, because people hardly understand them either.
VARIANTS = {
    "train": words(
        "Alex Alicia Andrea Andy Annie AnxiousAndy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario "
        "Michael Mike Nguyen RicishayMax RicishayMax2 RicishayMax3 Storm adam anika announcer antonio aunty belinda "
        "benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 fast grandma grandpa ian iven iven2 iven3 john klatt "
        "klatt2 klatt3 linda m1 m2 m3 m4 m5 m6 marcelo michel norbert pablo paul pedro rob robert sandro steph "
        "steph2 travis zac"
    ),
    "valid": words("Reed Tweaky f5 m7 iven4 klatt4 miguel shelby"),
    "test": words("gustave kaukovalta klatt5 klatt6 m8 quincy steph3 victor Mr_serious croak max mike2"),
}
ACCENTS = {"en": ("en-us", "en-us", "en-gb-x-rp"), "cmn": ("cmn",)}


@dataclass(frozen=True)
class Settings:
    """Everything that the bytes of the corpus depend on."""

    seed: int
    language: str
    snr_low: float
    snr_high: float
    reverb_ratio: float

    def check(self) -> None:
        """Refuse values out of range (:class:`UserError`)."""
        if self.language not in ACCENTS:
            raise UserError(f"--language {self.language}: known are {', '.join(ACCENTS)}")
        if not all(map(math.isfinite, (self.snr_low, self.snr_high))):
            raise UserError(f"--snr_low {self.snr_low} --snr_high {self.snr_high}: give numbers; 100 is without noise")
        if self.snr_low > self.snr_high:
            raise UserError(f"--snr_low {self.snr_low} is above --snr_high {self.snr_high}")
        if not 0 <= self.reverb_ratio <= 1:
            raise UserError(f"--reverb_ratio {self.reverb_ratio} is not between 0 and 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be 0 or more")


@dataclass(frozen=True)
class UtteranceJob:
    """One utterance to make."""

    split: str
    index: int
    voice: str
    spoken: str
    text: str
    path: str

    @property
    def speaker(self) -> str:
        """Speaker id: the variant's name."""
        return self.voice.split("+")[1].replace(" ", "_").lower()

    @property
    def utt_id(self) -> str:
        """Utterance id, speaker first so that ``utt2spk`` is sorted by both columns."""
        return f"{self.speaker}-{self.split}{self.index:05d}"


def _rng(settings: Settings, split: str, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, list(VARIANTS).index(split), index, purpose])


def voices_of(split: str, language: str = "en") -> List[str]:
    """Return the engine's voice names (accent+variant) of a split; a variant has the same accent in every call."""
    accents = ACCENTS[language]
    return [f"{accents[i % len(accents)]}+{v.replace('_', ' ')}" for i, v in enumerate(VARIANTS[split])]


def plan(settings: Settings, sizes: Mapping[str, int], out: Path) -> List[UtteranceJob]:
    """Draw all sentences, none of them twice, and the voices."""
    jobs: List[UtteranceJob] = []
    seen: Set[str] = set()
    # Test first: its sentences then stay the same when the size of train is changed.
    for split in ("test", "valid", "train"):
        voices = voices_of(split, settings.language)
        for index in range(sizes[split]):
            rng = _rng(settings, split, index, 0)
            for _ in range(1000):
                spoken, text = make_sentence(rng, settings.language)
                if text not in seen:
                    break
            else:
                raise UserError(f"--{split} {sizes[split]}: the grammar has no more new sentences; ask for fewer")
            seen.add(text)
            voice = voices[int(rng.integers(len(voices)))]
            job = UtteranceJob(split, index, voice, spoken, text, "")
            jobs.append(UtteranceJob(split, index, voice, spoken, text, str(out / "wav" / split / f"{job.utt_id}.wav")))
    return jobs


def _speak(text: str, voice: str, rng: np.random.Generator, data: bytes) -> np.ndarray:
    """Speak ``text`` at random rate and pitch; return float64 samples at FS, RMS 1, without silence at the ends."""
    import soxr

    raw, fs = espeak.synthesise(
        text,
        voice,
        rate=int(rng.integers(110, 191)),
        pitch=int(rng.integers(25, 76)),
        pitch_range=int(rng.integers(20, 81)),
        data=data,
    )
    x = soxr.resample(np.frombuffer(raw, np.int16).astype(np.float64) / 32768, fs, FS)
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    x = x[loud[0] : loud[-1] + 1]
    return x / np.sqrt(np.mean(x**2))


def _reverberate(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a made-up room: a direct path and exponentially decaying noise (RT60 0.15 to 0.5 s)."""
    from scipy.signal import fftconvolve

    rt60 = rng.uniform(0.15, 0.5)
    n = int(rt60 * FS)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    direct_to_tail = 10 ** (rng.uniform(0, 8) / 20)
    rir = tail / np.sqrt(np.sum(tail**2)) / direct_to_tail
    rir[0] = 1.0
    return fftconvolve(x, rir)[: len(x) + n // 2]


def _pink(n: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls 3 dB per octave."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), n)


def _noise(n: int, job: UtteranceJob, settings: Settings, rng: np.random.Generator, data: bytes) -> np.ndarray:
    """White, pink or babble noise (three other sentences at once, voices of the same split), n samples of RMS 1."""
    kind = rng.integers(3)
    if kind == 0:
        x = rng.standard_normal(n)
    elif kind == 1:
        x = _pink(n, rng)
    else:
        x = np.zeros(n)
        voices = voices_of(job.split, settings.language)
        for _ in range(3):
            other, _ = make_sentence(rng, settings.language)
            y = _speak(other, voices[int(rng.integers(len(voices)))], rng, data)
            # The sentence is repeated to n samples and rotated by a random amount, so that the talkers do not start
            # together.
            x += np.roll(np.resize(y, n), int(rng.integers(n)))
    return x / np.sqrt(np.mean(x**2))


def render_utterance(job: UtteranceJob, settings: Settings, data: bytes) -> np.ndarray:
    """Make an utterance: int16 samples at 16 kHz, depending on the job and the settings only."""
    rng = _rng(settings, job.split, job.index, 1)
    x = _speak(job.spoken, job.voice, rng, data)
    if rng.random() < settings.reverb_ratio:
        x = _reverberate(x, rng)
    x = np.pad(x, tuple(int(rng.uniform(0.05, 0.25) * FS) for _ in range(2)))
    x = x + _noise(len(x), job, settings, rng, data) * 10 ** (-rng.uniform(settings.snr_low, settings.snr_high) / 20)
    x = x / np.abs(x).max() * 10 ** (rng.uniform(-12, -1) / 20)
    return np.round(x * 32767).astype(np.int16)


def _write(job: UtteranceJob, settings: Settings, data: bytes) -> int:
    """Render to the job's file and return the number of samples."""
    samples = render_utterance(job, settings, data)
    write_audio(job.path, samples, FS, sync=False)
    return len(samples)


def prepare_mini(
    out: PathLike,
    *,
    sizes: Optional[Mapping[str, int]] = None,
    nj: int = 1,
    seed: int = 0,
    language: str = "en",
    snr_low: float = 20.0,
    snr_high: float = 40.0,
    reverb_ratio: float = 0.1,
) -> Dict[str, int]:
    """Write ``out/{train,valid,test}`` with the audio in ``out/wav`` and return the numbers of utterances.

    ``out/mini.json`` holds the settings and is written last; if it has the same settings, nothing is done.

    Args:
        sizes: utterances of each split (DEFAULT_SIZES).
        nj: processes.
        snr_low, snr_high: range of the signal-to-noise ratio in dB.
        reverb_ratio: share of utterances with reverberation.

    Raises:
        UserError: the engine or a voice is missing, or a setting makes no sense.
    """
    out = Path(out)
    sizes = {**DEFAULT_SIZES, **(sizes or {})}
    settings = Settings(seed, language, snr_low, snr_high, reverb_ratio)
    settings.check()
    for name, number in {**sizes, "nj": nj}.items():
        if number < 1:
            raise UserError(f"--{name} is {number}; it must be 1 or more")
    inputs = {"version": VERSION, **settings.__dict__, "sizes": sizes}
    record = Record(out / "mini.json")
    if record.is_of(inputs) and all((out / split / "wav.scp").is_file() for split in sizes):
        logging.info("%s: the corpus is there with these settings", out)
        return dict(sizes)
    _check_voices()
    record.begin()
    jobs = plan(settings, sizes, out)
    for split in sizes:
        (out / split / "wav.scp").unlink(missing_ok=True)  # it names audio files that are removed next
        # Files of other settings would otherwise stay beside the new ones.
        shutil.rmtree(out / "wav" / split, ignore_errors=True)
        (out / "wav" / split).mkdir(parents=True)
    with espeak.data_path() as data:
        work = functools.partial(_write, settings=settings, data=data)
        lengths = list(map_with_bar(work, jobs, nj=nj, desc="mini corpus"))
    for split in sizes:
        rows = [(job, n) for job, n in zip(jobs, lengths) if job.split == split]
        utts = [Utterance(job.utt_id, job.speaker, job.path, job.text, n) for job, n in rows]
        write_data_dir(out / split, utts)
        voices, minutes = len({u.speaker for u in utts}), sum(n for _, n in rows) / FS / 60
        logging.info("%s %d utterances, %d voices, %.1f min", split, len(utts), voices, minutes)
    record.finish(inputs)
    return dict(sizes)


def _check_voices() -> None:
    have: Set[str] = set(espeak.list_variants())
    missing = [v for names in VARIANTS.values() for v in names if v.replace("_", " ") not in have]
    if missing:
        raise UserError(f"the installed eSpeak NG lacks the voices {', '.join(missing)}; pip install 'espnet_kd[mini]'")
