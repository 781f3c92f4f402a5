"""Use ``python -m espnet_kd`` in place of ``python``, so that ESPnet's own scripts distil without being edited.

Example, in a recipe of an ESPnet checkout:
    ./asr.sh --python "python3 -m espnet_kd" --asr_tag student \\
        --asr_args "--teacher exp/asr_teacher --kd_config progressive_fkl" <options of the recipe>

``-m espnet2.bin.asr_train`` with --teacher or --kd_config among its arguments becomes
``-m espnet_kd.bin.asr_kd_train``. Everything else, also asr_train without these options, is passed to the same
interpreter unchanged. Options of the KD training: python -m espnet_kd.bin.asr_kd_train --help
"""

# ESPnet's scripts start this module before every command, and read the standard output of some commands. It therefore
# prints nothing there, and imports only modules that Python itself has loaded.
from __future__ import annotations

import os
import sys

TRAINING = "espnet2.bin.asr_train"
KD_TRAINING = "espnet_kd.bin.asr_kd_train"
DECISIVE = ("--teacher", "--kd_config")  #: options that make a training a KD training
WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")  #: the interpreter's options whose value is the next argument


def translate(args: list[str]) -> list[str]:
    """Return the interpreter's arguments, with the KD training in place of ESPnet's if an option requires it."""
    at = find_module(args)
    if at is None or args[at] != TRAINING or not any(a.split("=")[0] in DECISIVE for a in args[at + 1 :]):
        return args
    return [*args[:at], KD_TRAINING, *args[at + 1 :]]


def find_module(args: list[str]) -> int | None:
    """Index of the module that ``python ARGS`` would run; None where it runs a script, a command or nothing."""
    i = 0
    while i + 1 < len(args) and args[i].startswith("-") and args[i] not in ("-", "-c"):
        if args[i] == "-m":
            return i + 1
        i += 2 if args[i] in WITH_VALUE else 1
    return None


def own_options() -> list[str]:
    """The options with which this interpreter was started (``python3 -u -m espnet_kd …``)."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    return before[:-2] if before[-2:] == ["-m", "espnet_kd"] else []


def main() -> None:
    """Replace this process by the interpreter for ``sys.argv``, so that signals and exit code are its own."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        usage = "usage: python3 -m espnet_kd [option of python] … -m MODULE | -c COMMAND | SCRIPT [argument] …"
        print(f"{usage}\n\n{__doc__}", end="", file=sys.stdout if args else sys.stderr)
        sys.exit(0 if args else 2)
    os.execv(sys.executable, [sys.executable, *own_options(), *translate(args)])


if __name__ == "__main__":
    main()
