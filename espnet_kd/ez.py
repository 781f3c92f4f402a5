"""Distillation from a Python script or notebook, with an interface like ``espnetez.Trainer``.

    distiller = Distiller("train_student.yaml", "exp/student", "exp/stats", teacher="exp/teacher", method="kl",
        data_info={"speech": ("wav.scp", "sound"), "text": ("text", "text")},
        train_dump_dir="dump/raw/train", valid_dump_dir="dump/raw/valid", token_list="tokens.txt", token_type="char")
    distiller.collect_stats()
    export = distiller.train()

egs2/TEMPLATE/distil_from_python.py is a complete script.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Mapping, Sequence, Tuple, Union

import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.train_options import to_options
from espnet_kd.files import PathLike, replacing


class Distiller:
    """A student with its teacher and method. Arguments have the names of ``espnetez.Trainer``."""

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
        """Take the student's ESPnet configuration (a YAML file or its content), and all paths.

        Args:
            train_config: the options of a ``train_student.yaml``, without the data and without ESPnet's defaults.
            output_dir: directory of the student; a run that was stopped is resumed there.
            stats_dir: directory of the statistics.
            method: page by name (of conf/methods) or path.
            data_info: {name: (file in the dump directories, type)}; no ``text`` for a method without labels.
            teacher: one or more experiments ``EXP[/FILE.pth]``; none for a method without a teacher.
            options: further options of ``asr_kd_train``, such as ``token_list``, ``max_epoch``, ``ngpu``.
        """
        self.output_dir, self.stats_dir, self._config = Path(output_dir), Path(stats_dir), train_config
        self._kd = ["--kd_config", str(method)]
        teachers = [teacher] if isinstance(teacher, (str, Path)) else list(teacher)
        if teachers:
            self._kd += ["--teacher", *map(str, teachers)]
        self._own = to_options(_as_in_yaml(options))
        for part, directory in (("train", train_dump_dir), ("valid", valid_dump_dir)):
            for name, (file, kind) in data_info.items():
                self._own += [f"--{part}_data_path_and_name_and_type", f"{Path(directory) / file},{name},{kind}"]

    def collect_stats(self) -> None:
        """Write shapes and feature statistics to ``stats_dir``: global_mvn reads ``train/feats_stats.npz``."""
        for path in self.stats_dir.glob("*/*_stats.npz"):
            path.unlink()  # they are written last: statistics that were stopped must not look complete
        # Normalisation is switched off, because it would read the statistics that are made here.
        _train([*self._options(self.stats_dir), "--collect_stats", "true", "--normalize", "none"])

    def train(self) -> Path:
        """Train all KD stages and return the exported student's directory.

        Raises:
            UserError: student, teacher, method and data don't fit, or there are no complete statistics.
        """
        shapes: List[str] = []
        for part in ("train", "valid"):
            found = sorted((self.stats_dir / part).glob("*_shape"))
            # The utterances of a training are those of its shape files, which a stopped collect_stats leaves cut.
            if not found or not any((self.stats_dir / part).glob("*_stats.npz")):
                raise UserError(f"no complete statistics in {self.stats_dir / part}: call collect_stats() first")
            for path in found:
                shapes += [f"--{part}_shape_file", str(path)]
        _train([*self._options(self.output_dir), *self._kd, *shapes])
        from espnet_kd.distill.export import export

        return export(self.output_dir)

    def _options(self, output_dir: Path) -> List[str]:
        config = self._config
        if isinstance(config, Mapping):
            content, config = _as_in_yaml(config), output_dir / "train_config.yaml"
            with replacing(config) as f:
                yaml.safe_dump(content, f)
        return ["--config", str(config), *self._own, "--output_dir", str(output_dir)]


def _as_in_yaml(value: Any) -> Any:
    """A value with paths as text and tuples as lists, also those inside of mappings and lists."""
    if isinstance(value, Mapping):
        return {key: _as_in_yaml(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_in_yaml(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _train(options: List[str]) -> None:
    from espnet_kd.tasks.training import train_student  # imports ESPnet, which takes seconds

    train_student(options)
