"""eSpeak NG through ctypes: text and voice in, 16-bit samples out, the same bytes on every call.

The engine is GPL-3; it comes with the optional package ``espeakng_loader`` and is loaded at run time only.
"""

from __future__ import annotations

import _ctypes
import contextlib
import ctypes
import tempfile
from pathlib import Path
from typing import Iterator, List, Tuple

from espnet_kd.cli import UserError

# Constants of espeak-ng/speak_lib.h.
_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_MAX_PATH = 140  # bytes; the library has a buffer of 160 bytes for its data path, and cuts a longer one
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _find() -> Tuple[str, Path]:
    """Return the library's file and its data directory."""
    try:
        import espeakng_loader
    except ImportError as e:
        raise UserError("the mini corpus is spoken by eSpeak NG, which is not installed: "
                        "pip install 'espnet_kd[mini]'") from e  # fmt: skip
    library, data = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    if not library.exists():
        raise UserError(f"espeakng_loader has no library for this machine: {library} is missing")
    return str(library), data


def list_variants() -> List[str]:
    """Return the names of the voice variants that the installed engine has."""
    return sorted(path.name for path in (_find()[1] / "voices" / "!v").iterdir())


@contextlib.contextmanager
def data_path() -> Iterator[bytes]:
    """Yield the engine's data path, or a short symbolic link to it if the path is too long for the engine."""
    data = _find()[1]
    if len(str(data).encode()) <= _MAX_PATH:
        yield str(data).encode()
        return
    with tempfile.TemporaryDirectory(prefix="espeak") as tmp:
        link = Path(tmp) / "espeak-ng-data"
        link.symlink_to(data)
        yield str(link).encode()


def synthesise(text: str, voice: str, *, rate: int, pitch: int, pitch_range: int, data: bytes) -> Tuple[bytes, int]:
    """Speak ``text`` and return (native-endian 16-bit mono samples, sampling rate in Hz).

    Args:
        voice: e.g. ``en-us+f3``: language and variant.
        rate: words per minute. pitch, pitch_range: 0 to 100.
        data: the path from :func:`data_path`.

    The engine keeps state between utterances (filter memories, noise generators), which none of its functions resets.
    Therefore each call loads the library again (5 ms), and seeds both random generators. So the result depends on the
    arguments only, not on the time, on earlier calls, or on the number of processes.

    Raises:
        UserError: the library cannot be loaded, has no such voice, or gives no audio.
    """
    path, _ = _find()
    chunks: List[bytes] = []

    @_CALLBACK
    def collect(samples, number, _events) -> int:
        if samples and number > 0:
            chunks.append(ctypes.string_at(samples, 2 * number))
        return 0

    try:
        lib = ctypes.CDLL(path)
    except OSError as e:
        raise UserError(f"{path} cannot be loaded: {e}; reinstall espeakng_loader") from e
    try:
        fs = lib.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if fs <= 0:
            raise UserError(f"eSpeak NG does not start with the data in {data.decode()}; reinstall espeakng_loader")
        lib.espeak_ng_SetRandSeed(ctypes.c_long(1))  # espeak_Initialize seeds it with the time of day
        ctypes.CDLL(None).srand(1)
        lib.espeak_SetSynthCallback(collect)
        if lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice '{voice}'")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            lib.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode("utf-8")
        lib.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        lib.espeak_Synchronize()
        lib.espeak_Terminate()
    finally:
        _ctypes.dlclose(lib._handle)
    if not chunks:
        raise UserError(f"eSpeak NG gives no audio for '{text}' with voice '{voice}'")
    return b"".join(chunks), fs
