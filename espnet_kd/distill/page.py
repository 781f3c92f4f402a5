"""Method pages: YAML files with the objectives of each KD stage and their weights, read with strict checks."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Literal, Mapping, Sequence, Type, Union

from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import OBJECTIVES, Objective
from espnet_kd.distill.schedule import Ramp, Weight, end_of
from espnet_kd.distill.train_options import check_train_options
from espnet_kd.safe_yaml import parse_yaml
from espnet_kd.strict import check_mapping, check_type, fits, nearest, parameters
from espnet_kd.targets.teacher import Needs

METHODS_DIR = Path(__file__).resolve().parent.parent / "conf" / "methods"


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

    @property
    def has_head(self) -> bool:
        """Whether a module is trained with the student for this objective."""
        return type(self.make()).build is not Objective.build


@dataclass
class KDStage:
    """A part of a method; see ``conf/methods/README.md`` for the keys."""

    number: int  #: from 1
    name: str
    share: float  #: share of the student's training
    keep: Union[str, List[str]]  #: objectives of the previous KD stage that continue with their last weights, or all
    restart: bool  #: whether optimizer and learning-rate schedule begin again
    ctc_weight: Weight
    ctc_per: str
    attention_weight: Weight
    objectives: List[ObjectiveSpec]

    @property
    def needs_text(self) -> bool:
        """Whether it needs transcripts."""
        branches = (self.ctc_weight, self.attention_weight)
        return any(w != 0.0 for w in branches) or any(o.make().needs_text for o in self.objectives)

    @property
    def nbest(self) -> int:
        """Number of hypotheses per utterance that it needs of the teacher's N-best."""
        return max((o.make().nbest for o in self.objectives), default=0)


@dataclass
class Page:
    """A method page."""

    path: Path
    method: str
    teacher: str  #: required | none
    pool: str
    teacher_weights: List[float]  #: weights of several teachers; empty: equal weights
    stages: List[KDStage]
    train: Dict[str, Any]  #: options of ESPnet for the whole training, as its ``train`` block has them

    def options(self, last: KDStage) -> Dict[str, Any]:
        """The options of ESPnet for a training whose last KD stage is ``last``, also those that it does not name."""
        implied = _implied_options(self.stages)
        if end_of(last.ctc_weight) == 0.0:
            # The best model cannot be chosen by a CTC loss whose weight ends at 0.
            implied["best_model_criterion"] = [["valid", "loss_kd", "min"]]
        return {**implied, **self.train}

    @property
    def needs_text(self) -> bool:
        """Whether one of its KD stages trains with transcripts."""
        return any(stage.needs_text for stage in self.stages)

    @property
    def nbest(self) -> int:
        """Hypotheses per utterance of the teacher's N-best that it reads; 0: none."""
        return max(stage.nbest for stage in self.stages)


def list_pages() -> List[str]:
    """Names of the pages that come with the package."""
    return sorted(p.stem for p in METHODS_DIR.glob("*.yaml"))


class Unread(Objective):
    """A placeholder for an objective of another module that is not imported."""

    def __init__(self, **options: Any):
        super().__init__()


def load_page(name: str, import_objectives: bool = True) -> Page:
    """Read a page by its path, or by its name if it comes with the package.

    Args:
        import_objectives: whether to import objectives that are named by a dotted path, which is code of the page's
            author; if False, their options are not checked (:class:`Unread`).

    Raises:
        UserError: the page is not found (the message has the nearest name) or not readable, or has unknown or mistyped
            keys (the message has their place in the file).
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = METHODS_DIR / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"unknown method {name!r}{nearest(name, list_pages())}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the method page {path}: {e}") from e
    return _page(path, parse_yaml(text, str(path)), import_objectives)


def check_cacheable(page: Page) -> None:
    """Refuse a page that cannot be trained from a target cache (:class:`UserError`)."""
    if page.pool == "mean":
        raise UserError(f"{page.path}: pool: mean needs whole posteriors, not a target cache; train with --teacher")
    if page.teacher_weights:
        raise UserError(f"{page.path}: teacher_weights: a target cache has one teacher; train with --teacher")


def needed_targets(pages: Sequence[str]) -> Needs:
    """The teacher's outputs that the objectives of some pages need together.

    Raises:
        UserError: as :func:`load_page` and :func:`check_cacheable`; or no objective reads a teacher's outputs.
    """
    loaded = [load_page(name) for name in pages]
    for page in loaded:
        check_cacheable(page)
    objectives = [spec.make() for page in loaded for stage in page.stages for spec in stage.objectives]
    each = [o.needs() for o in objectives if o.uses_teacher]
    if not each:
        raise UserError(f"{', '.join(pages)}: no objective reads a teacher's outputs, so there is nothing to keep")
    return Needs(
        "all" if any(n.tokens_on == "all" for n in each) else "nonblank",
        tuple(sorted({tau for n in each for tau in n.temperatures})),
        tuple(sorted({tap for n in each for tap in n.taps})),
    )


def _page(path: Path, content: Any, imports: bool) -> Page:
    where = str(path)
    keys = ["teacher", "teacher_weights", "pool", "ctc", "attention", "stages", "train"]
    top = check_mapping(content, where, keys)
    if not isinstance(top.get("stages"), list) or not 1 <= len(top["stages"]) <= 3:
        raise UserError(f"{where}: stages must be a list of one to three KD stages")
    page = Page(
        path=path,
        method=path.stem,
        teacher=_typed(top, "teacher", Literal["required", "none"], "required", where),
        pool=_typed(top, "pool", Literal["least_blank", "mean"], "least_blank", where),
        teacher_weights=_typed(top, "teacher_weights", List[float], [], where),
        stages=[_stage(n, x, top, f"{where}: stages[{n - 1}]", imports) for n, x in enumerate(top["stages"], 1)],
        train=check_train_options(top.get("train", {}), f"{where}: train"),
    )
    _check_kept(page)
    for weight in page.teacher_weights:
        if not 0 < weight < math.inf:
            raise UserError(f"{where}: teacher_weights must be numbers above 0, not {page.teacher_weights}")
    if page.teacher == "none" and page.teacher_weights:
        raise UserError(f"{where}: teacher_weights needs teachers, and the page has teacher: none; leave one out")
    total = sum(s.share for s in page.stages)
    if abs(total - 1) > 1e-6:
        raise UserError(f"{where}: the shares of the KD stages add up to {total:g}, not 1")
    return page


def _check_kept(page: Page) -> None:
    """Refuse a ``keep`` of unknown objectives, and an objective with a head that has two sets of options."""
    options: Dict[str, ObjectiveSpec] = {}
    before: List[str] = []
    for stage in page.stages:
        where = f"{page.path}: stages[{stage.number - 1}]"
        for key in () if stage.keep == "all" else stage.keep:
            if key not in before:
                raise UserError(f"{where}.keep: the KD stage before this one has no {key!r}{nearest(key, before)}")
        kept = before if stage.keep == "all" else stage.keep
        before = [*kept, *(spec.key for spec in stage.objectives)]
        for spec in stage.objectives:
            other = options.setdefault(spec.key, spec)
            if spec.has_head and spec.conf != other.conf:
                raise UserError(f"{where}: {spec.key} has a head, which all KD stages share: give it the same options")


def _implied_options(stages: Sequence[KDStage]) -> Dict[str, Any]:
    """ESPnet options that follow from all KD stages of a page."""
    implied: Dict[str, Any] = {}
    weights = [w for s in stages for w in (s.ctc_weight, s.attention_weight)]
    heads = [o for s in stages for o in s.objectives if o.has_head]
    if any(map(_may_be_0, weights)) or (heads and (len(stages) > 1 or any(_may_be_0(o.weight) for o in heads))):
        # In a step the CTC head, a hybrid's decoder or an objective's head may get no gradient; DDP must expect this.
        implied["unused_parameters"] = True
    return implied


def _stage(number: int, content: Any, top: Mapping[str, Any], where: str, imports: bool) -> KDStage:
    keys = ["name", "share", "keep", "restart", "ctc", "attention", "objectives"]
    if isinstance(content, Mapping) and "train" in content:
        raise UserError(f"{where}: train holds for the whole training, so that it belongs beside `stages`")
    stage = check_mapping(content, where, keys)
    ctc = check_mapping(stage.get("ctc", top.get("ctc", {})), f"{where}.ctc", ["weight", "per"])
    attention = check_mapping(stage.get("attention", top.get("attention", {})), f"{where}.attention", ["weight"])
    objectives = stage.get("objectives", [])
    if not isinstance(objectives, list):
        raise UserError(f"{where}.objectives must be a list")
    keep = stage.get("keep", [])
    if keep != "all":
        check_type(keep, List[str], f"{where}.keep")
    ctc_weight = _weight(ctc.get("weight", 1.0), f"{where}.ctc.weight")
    result = KDStage(
        number=number,
        name=_typed(stage, "name", str, f"stage{number}", where),
        share=_typed(stage, "share", float, 1.0, where),
        keep=keep,
        restart=_typed(stage, "restart", bool, False, where),
        ctc_weight=ctc_weight,
        ctc_per=_typed(ctc, "per", Literal["utterance", "label"], "utterance", f"{where}.ctc"),
        # A hybrid student's attention branch uses labels, too; by default it is off if CTC is off.
        attention_weight=_weight(attention.get("weight", float(ctc_weight != 0.0)), f"{where}.attention.weight"),
        objectives=[_objective(o, f"{where}.objectives[{i}]", imports) for i, o in enumerate(objectives)],
    )
    if not 0 < result.share <= 1:
        raise UserError(f"{where}.share must be above 0 and at most 1, not {result.share}")
    if number == 1 and (result.restart or result.keep):
        raise UserError(f"{where}: restart and keep refer to the KD stage before, and this is the first")
    names = [o.key for o in result.objectives]
    if len(set(names)) < len(names):
        raise UserError(f"{where}.objectives: each objective may stand once, got {', '.join(names)}")
    for o in result.objectives:
        if number > 1 and type(o.make()).init_student is not Objective.init_student:
            raise UserError(f"{where}: {o.name} sets where training begins, so that it belongs in the first KD stage")
    return result


def _objective(content: Any, where: str, imports: bool) -> ObjectiveSpec:
    entry = check_mapping(content, where)
    name = _typed(entry, "objective", str, None, where)
    weight = _weight(entry.pop("weight", 1.0), f"{where}.weight")
    entry.pop("objective")
    cls = objective_class(name, where, imports)
    where = f"{where} ({name})"
    hints = parameters(cls)
    check_mapping(entry, where, None if cls is Unread else ["objective", "weight", *hints])
    for key, hint in hints.items():
        if key in entry:
            check_type(entry[key], hint, f"{where}: {key}")
        elif inspect.signature(cls).parameters[key].default is inspect.Parameter.empty:
            raise UserError(f"{where}: {key} is missing")

    def make() -> Objective:
        try:
            return cls(**entry)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e

    make()  # refuse wrong values now, not when the KD stage begins
    return ObjectiveSpec(name, weight, entry, make)


def objective_class(name: str, where: str, imports: bool = True) -> Type[Objective]:
    """Find an objective by its name, or by the dotted path of a class outside the package.

    Args:
        imports: whether to import the class of a dotted path; if False, `Unread` is returned for it.

    Raises:
        UserError: it is unknown (the message has the nearest name), not importable, or not an Objective.
    """
    if name.lower() in OBJECTIVES.classes:
        return OBJECTIVES.get_class(name)
    if "." not in name:
        raise UserError(f"{where}: unknown objective {name!r}{nearest(name, list(OBJECTIVES.classes))}")
    if not imports:
        return Unread
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as e:  # code of that module may raise anything
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
    result = Ramp(**numbers, by=_typed(ramp, "by", Literal["step", "epoch"], "step", where))
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
