"""Running a recipe's run.sh from Python."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]

#: Options for models that train in seconds and may recognise nothing. The recipe's own YAML is read before them, and
#: is thus tested too.
STOCK = (
    "--encoder_conf num_blocks=1 --encoder_conf output_size=16 --encoder_conf linear_units=32 "
    "--encoder_conf attention_heads=2 --batch_bins 1000000 --use_tensorboard false --use_matplotlib false"
)
#: The same for asr_kd_train, which otherwise refuses a teacher that recognises nothing.
TINY = f"{STOCK} --blank_teacher true"


class Recipe:
    """``run.sh`` of a recipe in a copy of egs2/."""

    def __init__(self, egs2: Path, name: str):
        self.dir = egs2 / name / "asr_kd1"
        self.env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ESPNET_KD_INSTALLED": "1",
            # The interpreter of these tests and the package of this checkout, whichever environment is active.
            "VIRTUAL_ENV": sys.prefix,
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def command(self, *options: str) -> list:
        return ["./run.sh", *options]

    def run(self, *options: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.command(*options),
            cwd=self.dir,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, done.stdout[-6000:]
        return done


def sleepers(directory: Path, seconds: str) -> list:
    """The processes ``sleep SECONDS`` that run in a recipe's directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == ["sleep", seconds] and process.cwd() == str(directory.resolve()):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile, or belongs to another user
            continue
    return found
