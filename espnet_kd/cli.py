"""Shared code of all commands: errors for the user, exit codes, log format.

Exit codes: 0 done · 1 an error that the user can correct (one line ``error: …``) · 2 wrong command line
(argparse) · 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Callable, Collection, NoReturn, Optional, Sequence


class UserError(Exception):
    """An error that the user can correct. The message has the fault, its place, and the remedy."""


def refuse_empty(args: argparse.Namespace, may_be: Collection[str] = ()) -> None:
    """Refuse empty options and list items: ``--out ""`` is the result of an unset variable.

    Args:
        may_be: names of options that may be empty.

    Raises:
        UserError: an option is empty; the message names it.
    """
    for name, value in vars(args).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if name not in may_be and any(isinstance(part, str) and not part.strip() for part in values):
            raise UserError(f"--{name} is empty (an unset variable?); give a value, or leave the option out")


def add_batch_options(parser: argparse.ArgumentParser, *, nj: str, force: str, ngpu: str = "") -> None:
    """Add ``--ngpu --batch_seconds --nj --force``, the options of every command that runs a model over data dirs.

    Args:
        nj, force: the help texts of these options.
        ngpu: an addition to the help text of ``--ngpu``.
    """
    parser.add_argument("--ngpu", type=int, default=0, choices=(0, 1), help=f"0: CPU, 1: GPU{ngpu}")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="seconds of audio in a batch, with padding")
    parser.add_argument("--nj", type=int, default=1, help=nj)
    parser.add_argument("--force", action="store_true", help=force)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse options ``names`` below 1, and a ``--batch_seconds`` that is not a number above 0.

    Raises:
        UserError: a value is out of range; the message names the option.
    """
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    seconds = getattr(args, "batch_seconds", 1.0)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UserError(f"--batch_seconds is {seconds}; it must be a number above 0")


def check_gpus(ngpu: int) -> None:
    """Refuse more GPUs than torch can use on this machine (:class:`UserError`)."""
    import torch

    usable = torch.cuda.device_count() if ngpu else 0
    if ngpu > usable:
        raise UserError(
            f"--ngpu {ngpu}: torch finds {usable} usable GPUs on this machine; give --ngpu {usable}, or see "
            "nvidia-smi"
        )


def trusts_pickles() -> bool:
    """Whether checkpoints may hold more than tensors, which can run code: ``ESPNET_KD_TRUST_PICKLE=1``."""
    return os.environ.get("ESPNET_KD_TRUST_PICKLE") == "1"


def refusal(error: BaseException) -> Optional[str]:
    """One line on what the operating system refused (permission, space); None if ``error`` is something else."""
    if isinstance(error, OSError):
        return f"{error.filename or 'cannot read or write'}: {error.strerror or error}"
    # errors of torch.save that have no cause in their message
    if "inline_container" in str(error) or "iostream error" in str(error):
        return "a checkpoint cannot be written: the disk is full, or fails"
    return None


def run(main: Callable[[Optional[Sequence[str]]], None]) -> NoReturn:
    """Call ``main(None)`` (arguments from the shell) and exit with a code of the module's docstring."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s (%(module)s:%(lineno)d) %(levelname)s: %(message)s",
    )
    # ESPnet's own code causes these warnings with every batch, which no user can change.
    warnings.filterwarnings("ignore", message=r"`torch\.cuda\.amp\.", category=FutureWarning)
    try:
        main(None)
    except UserError as e:
        # ESPnet's own scripts, too, search the log for "error:" when a job dies.
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except (OSError, RuntimeError) as e:
        reason = refusal(e)
        if reason is None:
            raise
        logging.debug("where it was refused", exc_info=True)
        print(f"error: {reason}; correct that, and the same command continues", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def command() -> NoReturn:
    """Run the module of ``espnet_kd.bin`` with the name of the installed command (see setup.py)."""
    run(importlib.import_module(f"espnet_kd.bin.{Path(sys.argv[0]).stem}").main)
