"""Distillation from Python, in the manner of ``espnetez.Trainer``: a script or a notebook instead of run.sh.

    distiller = Distiller("train_student.yaml", "exp/student", "exp/stats", teacher="exp/teacher", method="kl",
        data_info={"speech": ("wav.scp", "sound"), "text": ("text", "text")},
        train_dump_dir="dump/raw/train", valid_dump_dir="dump/raw/valid", token_list="tokens.txt", token_type="char")
    distiller.collect_stats()
    export = distiller.train()

egs2/TEMPLATE/distil_from_python.py is a whole script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple, Union

import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.train_options import to_options
from espnet_kd.files import PathLike, replacing


class Distiller:
    """A student, its teacher and method; what ``espnetez.Trainer`` calls by a name is called so here."""

    def __init__(
        self,
        train_config: Union[PathLike, Mapping[str, Any]],
        output_dir: PathLike,
        stats_dir: PathLike,
        *,
        method: PathLike,
        data_info: Mapping[str, Tuple[str, str]],
        train_dump_dir: PathLike,
        valid_dump_dir: PathLike,
        teacher: Union[PathLike, Sequence[PathLike]] = (),
        **options: Any,
    ) -> None:
        """Take the student's ESPnet configuration (a YAML file or its content), and where everything is.

        Args:
            train_config: without the data, without ESPnet's defaults: what a ``train_student.yaml`` holds.
            output_dir: gets the student; the same again continues a run that was stopped.
            stats_dir: gets, or holds, the statistics.
            method: page by name (of conf/methods) or path.
            data_info: {name: (file in the dump directories, type)}; no ``text`` for a method without labels.
            teacher: experiments ``EXP[/FILE.pth]``, one or several; none where the method has none.
            options: further options of ``asr_kd_train``, such as ``token_list``, ``max_epoch``, ``ngpu``.
        """
        self.output_dir, self.stats_dir, self._config = Path(output_dir), Path(stats_dir), train_config
        self._kd = ["--kd_config", str(method)]
        teachers = [teacher] if isinstance(teacher, (str, Path)) else list(teacher)
        if teachers:
            self._kd += ["--teacher", *map(str, teachers)]
        self._own = to_options(options)
        for part, directory in (("train", train_dump_dir), ("valid", valid_dump_dir)):
            for name, (file, kind) in data_info.items():
                self._own += [f"--{part}_data_path_and_name_and_type", f"{Path(directory) / file},{name},{kind}"]

    def collect_stats(self) -> None:
        """Write shapes and feature statistics to ``stats_dir``: ``train/feats_stats.npz`` is what global_mvn reads."""
        # Without the normalisation, which would read what is made here.
        _train([*self._options(self.stats_dir), "--collect_stats", "true", "--normalize", "none"])

    def train(self) -> Path:
        """Train all KD stages and return the exported student's directory.

        Raises:
            UserError: student, teacher, method and data don't fit, or there are no statistics.
        """
        shapes: List[str] = []
        for part in ("train", "valid"):
            for path in sorted((self.stats_dir / part).glob("*_shape")):
                shapes += [f"--{part}_shape_file", str(path)]
        if not shapes:
            raise UserError(f"no statistics in {self.stats_dir}: call collect_stats() first")
        _train([*self._options(self.output_dir), *self._kd, *shapes])
        from espnet_kd.distill.export import export

        return export(self.output_dir)

    def _options(self, output_dir: Path) -> List[str]:
        config = self._config
        if isinstance(config, Mapping):
            content, config = dict(config), output_dir / "train_config.yaml"
            with replacing(config) as f:
                yaml.safe_dump(content, f)
        return ["--config", str(config), *self._own, "--output_dir", str(output_dir)]


def _train(options: List[str]) -> None:
    from espnet_kd.tasks.training import train_student  # imports ESPnet, which takes seconds

    train_student(options)
