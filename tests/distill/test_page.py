"""Method pages are read strictly: every error names the place in the page and, if there is one, a similar name."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from espnet_kd.bin import asr_kd_page
from espnet_kd.cli import UserError
from espnet_kd.distill.objectives import FactorizedRepresentation
from espnet_kd.distill.page import METHODS_DIR, list_pages, load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.schedule import Progress, Ramp

GOOD = {
    "teacher": "required",
    "stages": [
        {"share": 0.2, "ctc": {"weight": 0.0}, "objectives": [{"objective": "blank_kl", "weight": 2}]},
        {"share": 0.8, "name": "second", "objectives": [{"objective": "kl", "temperature": 2, "tau_squared": True}]},
    ],
}


def edited(*path_and_value):
    """GOOD with the value at a path replaced (or a key added)."""
    *path, last, value = path_and_value
    content = deepcopy(GOOD)
    place = content
    for key in path:
        place = place[key]
    place[last] = value
    return content


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SHIPPED = sorted([*METHODS_DIR.glob("*.yaml"), *BENCHMARKS.glob("*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_page_loads(path):
    page = load_page(str(path))
    if path.parent == METHODS_DIR:
        assert load_page(page.method).method == page.method
    for stage in page.stages:
        for spec in stage.objectives:
            spec.make()


def test_the_main_page():
    assert "progressive_fkl" in list_pages()
    page = load_page("progressive_fkl")
    assert (page.method, page.teacher) == ("progressive_fkl", "required")
    assert page.pool == "least_blank"
    assert [s.share for s in page.stages] == [0.02, 0.03, 0.95]
    assert [[o.key for o in s.objectives] for s in page.stages] == [
        ["blank_kl"],
        ["factorized_representation"],
        ["blank_kl", "factorized_kl"],
    ]
    assert [s.keep for s in page.stages] == [[], ["blank_kl"], ["factorized_representation"]]
    assert [(s.ctc_weight, s.restart) for s in page.stages] == [(1.0, False)] * 3
    # The projection of the representation gets a gradient in part of the training only. The page sets no criterion for
    # the best model, because CTC chooses it in the student's own configuration.
    assert page.options(page.stages[-1]) == {"unused_parameters": True}


def test_what_a_page_says(write_page):
    page = load_page(str(write_page(GOOD, "mine.yaml")))
    first, second = page.stages
    assert (page.method, first.number, first.name, second.name) == ("mine", 1, "stage1", "second")
    assert (first.ctc_weight, first.attention_weight, second.ctc_weight, second.ctc_per) == (0, 0, 1, "utterance")
    assert first.objectives[0].weight == 2.0
    kl = second.objectives[0].make()
    assert kl.factor == 4.0 and kl.options["temperature"] == 2 and kl.per == "utterance"
    assert kl is not second.objectives[0].make()


def test_ctc_of_the_page_holds_where_a_stage_says_nothing(write_page):
    page = load_page(str(write_page({**GOOD, "ctc": {"weight": 0.5, "per": "label"}, "attention": {"weight": 0.25}})))
    assert [(s.ctc_weight, s.ctc_per) for s in page.stages] == [(0.0, "utterance"), (0.5, "label")]
    assert [s.attention_weight for s in page.stages] == [0.25, 0.25]


REFUSED = {
    "key": (edited("techer", "required"), "page.yaml: unknown key 'techer'; did you mean 'teacher'"),
    "key of a stage": (edited("stages", 0, "shares", 1), r"stages\[0\]: unknown key 'shares'; did you mean 'share'"),
    "key of ctc": (edited("stages", 0, "ctc", {"wieght": 1}), r"stages\[0\].ctc: unknown key 'wieght'.*'weight'"),
    "key of the page's ctc": (edited("ctc", {"pre": 1}), r"ctc: unknown key 'pre'; did you mean 'per'"),
    "option": (
        edited("stages", 1, "objectives", 0, "temprature", 2),
        r"stages\[1\].objectives\[0\] \(kl\): unknown key 'temprature'; did you mean 'temperature'",
    ),
    "another objective's option": (
        edited("stages", 1, "objectives", 0, "blank_weight", 2),
        r"\(kl\): unknown key 'blank_weight'.*known: objective, weight, per, temperature, tau_squared, frames",
    ),
    "objective": (edited("stages", 0, "objectives", 0, "objective", "blank_lk"), "'blank_lk'; did you mean 'blank_kl'"),
    "no objective": (edited("stages", 0, "objectives", 0, {"weight": 1}), r"objectives\[0\]: objective is missing"),
    "twice": (edited("stages", 0, "objectives", [{"objective": "kl"}] * 2), r"stages\[0\].*once, got kl, kl"),
    "a beginning in the middle": (
        edited("stages", 1, "objectives", 0, {"objective": "layer_pruning"}),
        r"stages\[1\]: layer_pruning sets where training begins, so that it belongs in the first KD stage",
    ),
    "number": (edited("stages", 1, "objectives", 0, "temperature", "hot"), r"\[0\] \(kl\): temperature.*number.*'hot'"),
    "flag for a number": (
        edited("stages", 1, "objectives", 0, "temperature", True),
        "temperature: expected a number, found True",
    ),
    "number for a flag": (
        edited("stages", 1, "objectives", 0, "tau_squared", 1),
        "tau_squared: expected true or false, found 1",
    ),
    "range": (edited("stages", 1, "objectives", 0, "temperature", 0), r"\[0\] \(kl\): temperature.*above 0.*not 0"),
    "per": (edited("stages", 1, "objectives", 0, "per", "frames"), r"\[0\] \(kl\): per: .*did you mean 'frame'"),
    "per of ctc": (edited("ctc", {"per": "frame"}), "ctc.per: unknown value 'frame'.*known: utterance, label"),
    "weight": (
        edited("stages", 0, "objectives", 0, "weight", "big"),
        r"objectives\[0\].weight: expected a number, or a ramp .*, found 'big'",
    ),
    "ramp without end": (edited("stages", 0, "objectives", 0, "weight", {"start": 1}), "a ramp needs start and end"),
    "ramp's key": (edited("stages", 0, "objectives", 0, "weight", {"strat": 1}), "'strat'; did you mean 'start'"),
    "ramp backwards": (
        edited("stages", 0, "objectives", 0, "weight", {"start": 0, "end": 1, "begin": 0.7, "until": 0.3}),
        "0 <= begin < until <= 1, got 0.7 and 0.3",
    ),
    "share sum": (edited("stages", 0, "share", 0.3), "add up to 1.1, not 1"),
    "share": (edited("stages", 0, "share", 0), r"stages\[0\].share must be above 0"),
    "share not a number": (edited("stages", 0, "share", float("nan")), "share"),
    "choice": (edited("teacher", "require"), "teacher: unknown value 'require'; did you mean 'required'"),
    "pool": (edited("pool", "max"), "pool: unknown value 'max' .known: least_blank, mean"),
    "init_from": (edited("init_from", "best"), "page.yaml: unknown key 'init_from'"),
    "keep before there is any": (
        edited("stages", 0, "keep", ["kl"]),
        r"stages\[0\]: .*keep refer to the KD stage before",
    ),
    "keep everything of nothing": (
        edited("stages", 0, "keep", "all"),
        r"stages\[0\]: .*keep refer to the KD stage before",
    ),
    "restart at the beginning": (edited("stages", 0, "restart", True), r"stages\[0\]: restart .* this is the first"),
    "restart a word": (
        edited("stages", 1, "restart", "yes"),
        r"stages\[1\].restart: expected true or false, found 'yes'",
    ),
    "keep what is not there": (
        edited("stages", 1, "keep", ["blank_lk"]),
        r"stages\[1\].keep: the KD stage before this one has no 'blank_lk'; did you mean 'blank_kl'",
    ),
    "keep what was dropped": (
        edited(
            "stages",
            [
                {"share": 0.3, "objectives": [{"objective": "kl"}]},
                {"share": 0.3},
                {"share": 0.4, "keep": ["kl"]},
            ],
        ),
        r"stages\[2\].keep: the KD stage before this one has no 'kl'",
    ),
    "keep a word": (edited("stages", 1, "keep", "blank_kl"), r"stages\[1\].keep: expected a list, .*found 'blank_kl'"),
    "two heads of one name": (
        edited(
            "stages",
            [
                {"share": 0.5, "objectives": [{"objective": "inter_kd", "layers": [1]}]},
                {"share": 0.5, "objectives": [{"objective": "inter_kd", "layers": [2]}]},
            ],
        ),
        r"stages\[1\]: inter_kd has a head, which all KD stages share: give it the same options",
    ),
    "no stages": (edited("stages", []), "stages must be a list of one to three"),
    "stages a mapping": (edited("stages", {"share": 1}), "stages must be a list"),
    "stage a word": (edited("stages", 0, "binary"), r"stages\[0\]: expected a mapping, found 'binary'"),
    "objectives a word": (edited("stages", 0, "objectives", "kl"), r"stages\[0\].objectives must be a list"),
    "train sets the epochs": (
        edited("train", {"max_epoch": 20}),
        r"page.yaml: train: max_epoch cannot be set by a page; give it on the command line",
    ),
    "train a list": (edited("train", ["--max_epoch"]), "page.yaml: train: expected a mapping"),
    "train of a KD stage": (
        edited("stages", 0, "train", {"accum_grad": 2}),
        r"stages\[0\]: train holds for the whole training, so that it belongs beside `stages`",
    ),
    "not a page": (["teacher"], r"page.yaml: expected a mapping, found \['teacher'\]"),
    "distance": (
        edited("stages", 0, "objectives", 0, {"objective": "factorized_representation", "distance": "l1"}),
        r"objectives\[0\] \(factorized_representation\): distance: unknown value 'l1'.*cosine, l2",
    ),
    "taps": (
        edited("stages", 0, "objectives", 0, {"objective": "factorized_representation", "taps": ["encoder"]}),
        "taps: expected a list, each a list, each text",
    ),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_refused(write_page, content, message):
    with pytest.raises(UserError, match=message) as e:
        load_page(str(write_page(content)))
    assert "page.yaml" in str(e.value)


def test_the_good_page_is_good(write_page):
    load_page(str(write_page(GOOD)))  # if this failed, the tests of refusals above would prove nothing


HEAD = {"objective": "factorized_representation"}
BY_KD = [["valid", "loss_kd", "min"]]  #: criterion of the best model


@pytest.mark.parametrize(
    "stages, train, unused",
    [
        ([{}], {}, None),
        ([{"ctc": {"weight": 0.0}}], {}, True),
        ([{"attention": {"weight": 0}}], {}, True),
        ([{"attention": {"weight": {"start": 0, "end": 1}}}], {}, True),
        ([{"ctc": {"weight": {"start": 0.7, "end": 0.3}}}], {}, None),
        ([{"attention": {"weight": 0}}], {"unused_parameters": False}, False),
        ([{}, {}], {}, None),
        ([{}, {"ctc": {"weight": 0.0}}, {}], {}, True),
        ([{"objectives": [HEAD]}], {}, None),
        ([{"objectives": [{**HEAD, "weight": {"start": 0, "end": 1}}]}], {}, True),
        ([{"objectives": [HEAD]}, {}], {}, True),
    ],
)
def test_parameters_without_gradient_are_announced(write_page, stages, train, unused):
    """A decoder without its loss, or a head without its objective, gets no gradient, for which DDP would wait."""
    stages = [{"share": 1 / len(stages), "objectives": [{"objective": "kl"}], **stage} for stage in stages]
    page = load_page(str(write_page({"stages": stages, "train": train})))
    assert make_plan(page, 10).options.get("unused_parameters") == unused


@pytest.mark.parametrize(
    "weights, wanted, criterion",
    [
        ([0.0], None, BY_KD),
        ([0.0, 1.0], None, None),
        ([1.0, 0.0], None, BY_KD),
        ([{"start": 1.0, "end": 0.0}], None, BY_KD),
        ([{"start": 0.0, "end": 1.0}], None, None),
        ([0.0, 1.0], [1], BY_KD),  # as with `--kd_stages 1`
        ([1.0, 0.0], [1], None),
        ([0.0, 1.0], [2], None),
    ],
)
def test_a_training_that_ends_without_ctc_is_judged_by_kd(write_page, weights, wanted, criterion):
    stages = [{"share": 1 / len(weights), "ctc": {"weight": w}, "objectives": [{"objective": "kl"}]} for w in weights]
    page, own = {"stages": stages}, [["valid", "acc", "max"]]
    plan = make_plan(load_page(str(write_page(page))), 10, wanted)
    assert plan.options.get("best_model_criterion") == criterion
    page["train"] = {"best_model_criterion": own}
    assert make_plan(load_page(str(write_page(page))), 10, wanted).options["best_model_criterion"] == own


def test_unknown_method_names_the_nearest():
    with pytest.raises(UserError, match="unknown method 'progresive_fkl'; did you mean 'progressive_fkl'"):
        load_page("progresive_fkl")


def test_unreadable_pages(tmp_path):
    with pytest.raises(UserError, match="cannot read the method page .*absent.yaml"):
        load_page(str(tmp_path / "absent.yaml"))
    (tmp_path / "broken.yaml").write_text("stages: [")
    with pytest.raises(UserError, match="broken.yaml: this is no YAML"):
        load_page(str(tmp_path / "broken.yaml"))
    (tmp_path / "code.yaml").write_text("stages: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="code.yaml: this is no YAML"):
        load_page(str(tmp_path / "code.yaml"))


def test_ramp(write_page):
    page = edited("stages", 0, "objectives", 0, "weight", {"start": 1, "end": 3, "begin": 0.25, "until": 0.75})
    ramp = load_page(str(write_page(page))).stages[0].objectives[0].weight
    assert ramp == Ramp(1.0, 3.0, 0.25, 0.75)
    at = [ramp(Progress(epoch=e, max_epoch=8)) for e in range(1, 10)]
    assert at == [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3]


OUTSIDE = """
from dataclasses import dataclass
from typing import Literal
from espnet_kd.distill.objectives import Objective
class Mine(Objective):
    def __init__(self, strength: float = 1.0, layer: int = None, per="frame"):
        super().__init__(per)
        self.strength, self.layer = strength, layer
class Needy(Objective):
    def __init__(self, size: int):
        super().__init__()
        self.size = size
@dataclass(kw_only=True)
class Short(Objective):
    norm: Literal["l1", "l2"] = "l2"
class Other: pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_kd.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("outside_kd", None)


@pytest.mark.parametrize(
    "options, attributes",
    [
        ({}, {"strength": 1.0}),
        *(({k: v}, {k: v}) for k, v in [("strength", 3), ("layer", 2), ("size", 5), ("norm", "l1")]),
    ],
)
def test_an_objective_from_outside(write_page, outside, options, attributes):
    name = f"outside_kd.{'Needy' if 'size' in options else 'Short' if 'norm' in options else 'Mine'}"
    page = load_page(str(write_page(edited("stages", 0, "objectives", 0, {"objective": name, **options}))))
    spec = page.stages[0].objectives[0]
    assert spec.key == name.split(".")[1]  # the key of statistics and kd_heads must not contain dots
    assert attributes.items() <= vars(spec.make()).items()


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"objective": "outside_kd.Absent"}, "cannot import objective outside_kd.Absent"),
        ({"objective": "nowhere_kd.Mine"}, "cannot import objective nowhere_kd.Mine.*PYTHONPATH"),
        ({"objective": "outside_kd.Other"}, "outside_kd.Other is not a subclass of .*Objective"),
        ({"objective": "outside_kd.Mine", "strenght": 1}, "unknown key 'strenght'; did you mean 'strength'"),
        ({"objective": "outside_kd.Short", "norm": "l3"}, r"\[0\] \(outside_kd.Short\): norm: .*'l3'.*known: l1, l2"),
        ({"objective": "outside_kd.Short", "per": "frames"}, r"Short\): per: .*'frames'; did you mean 'frame'"),
        ({"objective": "outside_kd.Needy"}, r"objectives\[0\] \(outside_kd.Needy\): size is missing"),
    ],
)
def test_refused_from_outside(write_page, outside, entry, message):
    with pytest.raises(UserError, match=message):
        load_page(str(write_page(edited("stages", 0, "objectives", 0, entry))))


def test_a_page_is_read_without_what_it_names(write_page, outside, capsys, caplog):
    """asr_kd_page does not import objectives. With --import_objectives it does, and checks their options."""
    path = str(write_page(edited("stages", 0, "objectives", 0, {"objective": "outside_kd.Mine", "strenght": 1})))
    asr_kd_page.main([path])
    assert "outside_kd" not in sys.modules and "stages=" in capsys.readouterr().out
    assert "not imported, and therefore not checked: outside_kd.Mine" in caplog.text
    with pytest.raises(UserError, match="unknown key 'strenght'; did you mean 'strength'"):
        asr_kd_page.main([path, "--import_objectives"])
    assert "outside_kd" in sys.modules
    # The recipes do import them, because training does too.
    script = Path(__file__).resolve().parents[2] / "egs2/TEMPLATE/asr_kd1/kd_functions.sh"
    calls = [line for line in script.read_text().splitlines() if "asr_kd_page" in line]
    assert calls and all("--import_objectives" in line for line in calls)


def test_taps_reach_the_objective(write_page):
    entry = {"objective": "factorized_representation", "taps": [["encoder.1", "encoder.2"], ["encoder", "encoder"]]}
    text = yaml.safe_load(yaml.safe_dump(edited("stages", 0, "objectives", 0, entry)))
    objective = load_page(str(write_page(text))).stages[0].objectives[0].make()
    assert isinstance(objective, FactorizedRepresentation)
    assert objective.student_taps == ("encoder.1", "encoder") and objective.teacher_taps == ("encoder.2", "encoder")
