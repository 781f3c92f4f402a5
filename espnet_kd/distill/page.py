"""Method pages: one YAML that says which objectives pull, how hard, in which KD stages. Read strictly."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence

import yaml

from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import OBJECTIVES, Objective
from espnet_kd.distill.schedule import Ramp, Weight
from espnet_kd.strict import check_mapping, check_type, fits, nearest, parameters
from espnet_kd.targets.teacher import Needs

METHODS_DIR = Path(__file__).resolve().parent.parent / "conf" / "methods"
#: Options that training itself sets or reads beforehand: in a ``train:`` block they would be passed over in silence.
RESERVED = ("config", "kd_config", "kd_stage", "kd_stages", "max_epoch", "output_dir", "resume")


@dataclass
class ObjectiveSpec:
    """One entry of a KD stage's ``objectives``."""

    name: str
    weight: Weight
    conf: Dict[str, Any]
    make: Callable[[], Objective]

    @property
    def key(self) -> str:
        """Name in statistics and under ``kd_heads``: a dotted path's last part."""
        return self.name.rsplit(".", 1)[-1]


@dataclass
class KDStage:
    """A part of a method; see ``conf/methods/README.md`` for the keys."""

    number: int  #: from 1
    name: str
    share: float  #: of the student's max_epoch
    ctc_weight: Weight
    ctc_per: str
    attention_weight: Weight
    objectives: List[ObjectiveSpec]
    train: Dict[str, Any] = field(default_factory=dict)

    @property
    def needs_text(self) -> bool:
        """Whether it trains with transcripts."""
        branches = (self.ctc_weight, self.attention_weight)
        return any(w != 0.0 for w in branches) or any(o.make().needs_text for o in self.objectives)

    @property
    def nbest(self) -> int:
        """Hypotheses per utterance of the teacher's N-best that it reads."""
        return max((o.make().nbest for o in self.objectives), default=0)


@dataclass
class Page:
    """A method page."""

    path: Path
    method: str
    teacher: str  #: required | none
    pool: str
    init_from: str  #: last | best epoch of the KD stage before
    teacher_weights: List[float]  #: of several teachers; empty: equal
    stages: List[KDStage]

    def epochs(self, max_epoch: int, chosen: Sequence[int]) -> Dict[int, int]:
        """Epochs of each chosen KD stage: ``share`` of ``max_epoch``, at least 1; the last one gets the rest.

        Stages left out thus give their epochs to the last one, and every student trains ``max_epoch`` epochs.

        Raises:
            UserError: too few epochs.
        """
        counts = {k: max(1, round(self.stages[k - 1].share * max_epoch)) for k in chosen[:-1]}
        rest = max_epoch - sum(counts.values())
        if rest < 1:
            raise UserError(f"max_epoch {max_epoch} is too few for {len(chosen)} KD stages of {self.path}")
        return {**counts, chosen[-1]: rest}


def list_pages() -> List[str]:
    """Names of the pages that come with the package."""
    return sorted(p.stem for p in METHODS_DIR.glob("*.yaml"))


def load_page(name: str) -> Page:
    """Read a page by path or by the name of one of the package's.

    Raises:
        UserError: not found (naming the nearest), unreadable, unknown or mistyped keys with their place in the file.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = METHODS_DIR / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"unknown method {name!r}{nearest(name, list_pages())}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as e:  # beside its own errors, PyYAML lets out those of a value that it cannot make (2026-13-01)
        raise UserError(f"cannot read the method page {path}: {e}") from e
    return _page(path, content)


def check_cacheable(page: Page) -> None:
    """Refuse a page that no target cache can serve (:class:`UserError`)."""
    if page.pool == "mean":
        raise UserError(f"{page.path}: pool: mean needs whole posteriors, which a target cache has not; use --teacher")
    if page.teacher_weights:
        raise UserError(f"{page.path}: teacher_weights: a target cache holds one teacher's; use --teacher alone")


def needed_targets(pages: Sequence[str]) -> Needs:
    """What the objectives of some pages read of a teacher, together.

    Raises:
        UserError: as :func:`load_page` and :func:`check_cacheable`; or no page has a teacher whose outputs it reads.
    """
    loaded = [load_page(name) for name in pages]
    for page in loaded:
        check_cacheable(page)
    objectives = [spec.make() for page in loaded for stage in page.stages for spec in stage.objectives]
    each = [o.needs() for o in objectives if o.hears_teacher]
    if not each:
        raise UserError(f"{', '.join(pages)}: no objective reads a teacher's outputs, so there is nothing to keep")
    return Needs(
        "all" if any(n.tokens_on == "all" for n in each) else "nonblank",
        tuple(sorted({tau for n in each for tau in n.temperatures})),
        tuple(sorted({tap for n in each for tap in n.taps})),
    )


def _page(path: Path, content: Any) -> Page:
    where = str(path)
    keys = ["teacher", "teacher_weights", "pool", "init_from", "ctc", "attention", "stages"]
    top = check_mapping(content, where, keys)
    if not isinstance(top.get("stages"), list) or not 1 <= len(top["stages"]) <= 3:
        raise UserError(f"{where}: stages must be a list of one to three KD stages")
    page = Page(
        path=path,
        method=path.stem,
        teacher=_choice(top, "teacher", ["required", "none"], "required", where),
        pool=_choice(top, "pool", ["least_blank", "mean"], "least_blank", where),
        init_from=_choice(top, "init_from", ["last", "best"], "last", where),
        teacher_weights=_typed(top, "teacher_weights", List[float], [], where),
        stages=[_stage(n, stage, top, f"{where}: stages[{n - 1}]") for n, stage in enumerate(top["stages"], 1)],
    )
    for weight in page.teacher_weights:
        if not 0 < weight < math.inf:
            raise UserError(f"{where}: teacher_weights must be numbers above 0, not {page.teacher_weights}")
    if page.teacher == "none" and page.teacher_weights:
        raise UserError(f"{where}: teacher_weights with teacher: none")
    total = sum(s.share for s in page.stages)
    if abs(total - 1) > 1e-6:
        raise UserError(f"{where}: the shares of the KD stages add up to {total:g}, not 1")
    return page


def _stage(number: int, content: Any, top: Mapping[str, Any], where: str) -> KDStage:
    stage = check_mapping(content, where, ["name", "share", "ctc", "attention", "objectives", "train"])
    ctc = check_mapping(stage.get("ctc", top.get("ctc", {})), f"{where}.ctc", ["weight", "per"])
    attention = check_mapping(stage.get("attention", top.get("attention", {})), f"{where}.attention", ["weight"])
    objectives = stage.get("objectives", [])
    if not isinstance(objectives, list):
        raise UserError(f"{where}.objectives must be a list")
    ctc_weight = _weight(ctc.get("weight", 1.0), f"{where}.ctc.weight")
    result = KDStage(
        number=number,
        name=_typed(stage, "name", str, f"stage{number}", where),
        share=_typed(stage, "share", float, 1.0, where),
        ctc_weight=ctc_weight,
        ctc_per=_choice(ctc, "per", ["utterance", "label"], "utterance", f"{where}.ctc"),
        # A hybrid student's attention branch uses labels too: off where CTC is off, unless said otherwise.
        attention_weight=_weight(attention.get("weight", float(ctc_weight != 0.0)), f"{where}.attention.weight"),
        objectives=[_objective(o, f"{where}.objectives[{i}]") for i, o in enumerate(objectives)],
        train=check_mapping(stage.get("train", {}), f"{where}.train"),
    )
    for key in RESERVED:
        if key in result.train:
            raise UserError(f"{where}.train: {key} is not a page's to set; give it on the command line")
    if any(_may_be_0(w) for w in (ctc_weight, result.attention_weight)):
        # The CTC head, or a hybrid's decoder, may get no gradient, which DDP has to be told.
        result.train = {"unused_parameters": True, **result.train}
    if ctc_weight == 0.0:
        # No CTC loss can choose the model.
        result.train = {"best_model_criterion": [["valid", "loss_kd", "min"]], **result.train}
    if not 0 < result.share <= 1:
        raise UserError(f"{where}.share must be above 0 and at most 1, not {result.share}")
    keys = [o.key for o in result.objectives]
    if len(set(keys)) < len(keys):
        raise UserError(f"{where}.objectives: each objective may stand once, got {', '.join(keys)}")
    for o in result.objectives:
        if number > 1 and type(o.make()).init_student is not Objective.init_student:
            raise UserError(f"{where}: {o.name} sets where training begins, so that it belongs in the first KD stage")
    return result


def _objective(content: Any, where: str) -> ObjectiveSpec:
    entry = check_mapping(content, where)
    name = _typed(entry, "objective", str, None, where)
    weight = _weight(entry.pop("weight", 1.0), f"{where}.weight")
    entry.pop("objective")
    cls = objective_class(name, where)
    hints = parameters(cls)
    check_mapping(entry, where, ["objective", "weight", *hints])
    for key, hint in hints.items():
        if key in entry:
            check_type(entry[key], hint, f"{where}.{key}")
        elif inspect.signature(cls).parameters[key].default is inspect.Parameter.empty:
            raise UserError(f"{where}: {key} is missing")

    def make() -> Objective:
        try:
            return cls(**entry)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e

    make()  # refuse wrong values now, not when the KD stage begins
    return ObjectiveSpec(name, weight, entry, make)


def objective_class(name: str, where: str) -> type:
    """Find an objective by its name, or by the dotted path of a class outside the package.

    Raises:
        UserError: unknown (naming the nearest), not importable, or not an Objective.
    """
    if name.lower() in OBJECTIVES.classes:
        return OBJECTIVES.get_class(name)
    if "." not in name:
        raise UserError(f"{where}: unknown objective {name!r}{nearest(name, list(OBJECTIVES.classes))}")
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # also whatever is wrong inside that module
        raise UserError(f"{where}: cannot import objective {name}: {e}; is its directory on PYTHONPATH?") from e
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise UserError(f"{where}: {name} is not a subclass of espnet_kd.distill.objectives.Objective")
    return cls


def _weight(value: Any, where: str) -> Weight:
    if not isinstance(value, Mapping):
        if not fits(value, float):
            raise UserError(f"{where}: expected a number, or a ramp {{start: …, end: …}}, found {value!r}")
        return _finite(value, where)
    ramp = check_mapping(value, where, ["start", "end", "begin", "until", "by"])
    numbers = {k: _finite(_typed(ramp, k, float, 0.0, where), f"{where}.{k}") for k in ramp if k != "by"}
    if not {"start", "end"} <= set(numbers):
        raise UserError(f"{where}: a ramp needs start and end (and may have begin and until, shares of the KD stage)")
    result = Ramp(**numbers, by=_choice(ramp, "by", ["step", "epoch"], "step", where))
    if not 0 <= result.begin < result.until <= 1:
        raise UserError(f"{where}: needs 0 <= begin < until <= 1, got {result.begin:g} and {result.until:g}")
    return result


def _may_be_0(weight: Weight) -> bool:
    return 0.0 in ((weight.start, weight.end) if isinstance(weight, Ramp) else (weight,))


def _finite(value: float, where: str) -> float:
    if not 0 <= value < math.inf:
        raise UserError(f"{where} must be 0 or more, not {value}")
    return float(value)


def _typed(mapping: Mapping[str, Any], key: str, kind: Any, default: Any, where: str) -> Any:
    if key not in mapping:
        if default is None:
            raise UserError(f"{where}: {key} is missing")
        return default
    check_type(mapping[key], kind, f"{where}.{key}")
    return mapping[key]


def _choice(mapping: Mapping[str, Any], key: str, choices: List[str], default: str, where: str) -> str:
    value = _typed(mapping, key, str, default, where)
    if value not in choices:
        raise UserError(f"{where}.{key} must be one of {', '.join(choices)}, not {value!r}")
    return value
