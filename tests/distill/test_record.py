"""The record of a distillation: the settings of a directory's student, and which trainings may continue it."""

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_kd
import torch
import yaml
from tiny_phases import MID, Killed, assert_same, train, write_page

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.page import load_page
from espnet_kd.distill.plan import make_plan
from espnet_kd.distill.record import claim, claim_plain, make_record, write_record
from espnet_kd.experiments.checkpoints import read_checkpoint
from espnet_kd.experiments.models import load_state
from espnet_kd.experiments.record import differences
from espnet_kd.experiments.resume import ACCEPTED, OWN, rule_of

PARSER = asr_kd_train.get_parser()
OPTIONS = sorted({a.dest for a in PARSER._actions} - {"help"})
#: Options whose content is compared, and those that set the training's length. Each has its own test below.
BY_CONTENT = {option for option, rule in OWN.items() if rule != "refused"} | {"kd_stages"}
PAGE = Path(__file__).parents[2] / "docs/resume.md"


@pytest.fixture
def recorded(corpus, teacher_dir, tmp_path):
    """A directory with a started training, its options and its plan."""
    command = corpus.options(tmp_path / "out", "--teacher", str(teacher_dir), "--kd_config", "progressive_fkl")
    args = PARSER.parse_args(command)
    plan = make_plan(load_page("progressive_fkl"), args.max_epoch)
    write_record(tmp_path / "out", make_record(args, PARSER, plan), 1, False)
    (tmp_path / "out/checkpoint.pth").touch()
    return tmp_path / "out", args, plan


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, dict):
        return {**value, "another": 1}
    if isinstance(value, (list, tuple)):
        return [*value, value[-1] if value else ("another", "speech", "sound")]
    return "another"


@pytest.mark.parametrize("option", sorted({*OPTIONS} - BY_CONTENT))
def test_every_option_of_a_distillation_is_accepted_or_refused(recorded, option):
    out, args, plan = recorded
    changed = copy.copy(args)
    setattr(changed, option, other(getattr(args, option)))
    record = make_record(changed, PARSER, plan)
    if rule_of(option) == "accepted":
        assert claim(out, record, plan) == 1
        return
    assert rule_of(option) == "refused"
    with pytest.raises(UserError, match=rf"out holds a student with other settings \({option}.*: .* → ") as e:
        claim(out, record, plan)
    assert "choose another --output_dir" in str(e.value)


@pytest.mark.parametrize("option", sorted({*OPTIONS} - {"output_dir", "resume", "config"}))
def test_every_option_of_a_plain_training_is_accepted_or_refused(corpus, tmp_path, option):
    out = tmp_path / "out"
    args = PARSER.parse_args(corpus.options(out, "--resume", "true"))
    out.mkdir()
    found = {**vars(args), "token_list": Path(args.token_list).read_text().split("\n")[:-1]}
    (out / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(found, default=str))))
    (out / "checkpoint.pth").touch()
    claim_plain(args, PARSER)
    changed = copy.copy(args)
    # A token list is compared by its tokens.
    setattr(changed, option, ["x"] if option == "token_list" else other(getattr(args, option)))
    if rule_of(option) != "refused":
        claim_plain(changed, PARSER)  # ``other`` makes max_epoch larger, which is accepted
        return
    with pytest.raises(UserError, match=rf"out holds a model of other settings \(.*{option}"):
        claim_plain(changed, PARSER)


def test_an_n_best_of_other_content(recorded, tmp_path):
    out, args, _ = recorded
    plan = make_plan(load_page("sequence_kd"), 3)
    args.nbest = str(tmp_path / "nbest")
    (tmp_path / "nbest").write_text("one\n")
    write_record(out, make_record(args, PARSER, plan), 1, False)
    assert claim(out, make_record(args, PARSER, plan), plan) == 1
    (tmp_path / "nbest").write_text("other\n")
    with pytest.raises(UserError, match="settings ./.*nbest has changed"):
        claim(out, make_record(args, PARSER, plan), plan)
    # At another place only the content counts, too.
    args.nbest = str((tmp_path / "nbest").rename(tmp_path / "moved"))
    with pytest.raises(UserError, match="settings ./.*moved has changed"):
        claim(out, make_record(args, PARSER, plan), plan)
    (tmp_path / "moved").write_text("one\n")
    assert claim(out, make_record(args, PARSER, plan), plan) == 1


def test_a_cache_of_another_teacher(recorded, monkeypatch):
    """With a cache, the path in --teacher may change; the cache must be of the same teacher."""
    from espnet_kd.distill import record as module
    from espnet_kd.targets.cache import Policy

    out, args, plan = recorded
    manifest = SimpleNamespace(teacher_sha256="a", config_sha256="b", policy=Policy(5))
    monkeypatch.setattr(module, "read_manifest", lambda cache: manifest)
    args.target_cache = "targets"
    write_record(out, make_record(args, PARSER, plan), 1, False)
    args.teacher, args.target_cache = [], "elsewhere/targets"
    assert claim(out, make_record(args, PARSER, plan), plan) == 1
    manifest.teacher_sha256 = "c"
    with pytest.raises(UserError, match="target_cache is another teacher's"):
        claim(out, make_record(args, PARSER, plan), plan)


def test_what_is_harmless_exists():
    """Every accepted option exists. If ESPnet removed one, a new option of the same name would be accepted unseen."""
    assert ACCEPTED | set(OWN) <= set(OPTIONS) and not ACCEPTED & set(OWN)


def test_the_page_has_every_rule():
    """docs/resume.md lists every option that is accepted or compared."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    listed = {part.split("\n", 1)[0].split()[0].lower(): set(re.findall(r"`--(\w+)`", part)) for part in sections}
    assert listed["accepted"] == ACCEPTED and listed["compared"] == set(OWN)


def test_what_decides_is_not_called_harmless():
    decides = "optim optim_conf scheduler scheduler_conf batch_type batch_size batch_bins accum_grad grad_clip use_amp"
    decides += " encoder encoder_conf model_conf ctc_conf specaug_conf normalize_conf init_param freeze_param patience"
    decides += " best_model_criterion keep_nbest_models num_iters_per_epoch sort_in_batch augmented_teacher train_dtype"
    decides += " train_shape_file train_data_path_and_name_and_type token_list bpemodel preprocessor_conf"
    assert set(decides.split()) <= set(OPTIONS) - ACCEPTED - set(OWN)


@pytest.mark.parametrize(
    "max_epoch, page, wanted, key",
    [
        (3, "progressive_fkl", None, None),
        (2, "progressive_fkl", None, "epochs: 3 → 2"),
        (4, "progressive_fkl", None, "epochs: 3 → 4"),  # refused, because the training is not finished
        (3, "progressive_fkl", [1, 3], r"kd_stages: \[1, 2, 3\] → \[1, 3\]"),
        (3, "kl", None, "method: progressive_fkl → kl"),
    ],
)
def test_pages_kd_stages_and_epochs(recorded, max_epoch, page, wanted, key):
    out, args, _ = recorded
    plan = make_plan(load_page(page), max_epoch, wanted)
    record = make_record(args, PARSER, plan)
    if key is None:
        assert claim(out, record, plan) == 1
        return
    with pytest.raises(UserError, match=key):
        claim(out, record, plan)


@pytest.mark.parametrize(
    "edit, key",
    [
        (lambda s: s[2].update(share=0.94) or s[1].update(share=0.04), r"stages\[1\].share: 0.03 → 0.04"),
        (lambda s: s[1].update(keep=[]), r"stages\[1\].objectives"),
        (lambda s: s[2].update(restart=True), r"stages\[2\].restart: False → True"),
        (lambda s: s[0].update(ctc={"weight": 0.5}), r"stages\[0\].ctc.weight: 1.0 → 0.5"),
        (lambda s: s[1].update(attention={"weight": 0.5}), r"stages\[1\].attention: 1.0 → 0.5"),
        (
            lambda s: s[1]["objectives"][0].update(distance="l2"),
            r"stages\[1\].objectives\[1\].distance: cosine → l2",
        ),
        (lambda s: s[1]["objectives"][0]["weight"].update(end=4.0), r"objectives\[1\].weight.end: 15.0 → 4.0"),
    ],
)
def test_a_page_that_was_edited(recorded, write_page, edit, key):
    """The edited page has the same name, so that only its content tells them apart."""
    import yaml

    out, args, plan = recorded
    content = yaml.safe_load(plan.page.path.read_text())
    same = load_page(str(write_page(content, "progressive_fkl.yaml")))
    assert claim(out, make_record(args, PARSER, make_plan(same, 3)), plan) == 1
    edit(content["stages"])
    plan = make_plan(load_page(str(write_page(content, "progressive_fkl.yaml"))), 3)
    with pytest.raises(UserError, match=key):
        claim(out, make_record(args, PARSER, plan), plan)


@pytest.mark.parametrize("file", ["tokens.txt", "train/wav.scp", "train/text", "train/speech_shape"])
def test_data_that_changed(recorded, tmp_path, corpus, file):
    """A file of the same path has other content: tokens, audio, transcripts or the list of training utterances."""
    out, args, plan = recorded
    own = tmp_path / "corpus"
    shutil.copytree(corpus.dir, own)
    args.token_list = str(own / "tokens.txt")
    kinds = (("wav.scp", "speech", "sound"), ("text", "text", "text"))
    args.train_data_path_and_name_and_type = [(str(own / "train" / f), *kind) for f, *kind in kinds]
    args.train_shape_file = [str(own / "train/speech_shape")]
    write_record(out, make_record(args, PARSER, plan), 1, False)
    assert claim(out, make_record(args, PARSER, plan), plan) == 1
    with open(own / file, "a") as f:
        f.write("more 1\n")
    with pytest.raises(UserError, match=f"settings .{own / file} has changed"):
        claim(out, make_record(args, PARSER, plan), plan)


def test_a_token_list_in_the_yaml(recorded):
    _, args, plan = recorded
    args.token_list = list(tiny_kd.TOKENS)
    assert make_record(args, PARSER, plan)["options"]["token_list"] == tiny_kd.TOKENS


@pytest.mark.parametrize("content", ["[", "[]", "3", "null"])
def test_a_damaged_record(recorded, content):
    out, args, plan = recorded
    (out / "kd_stage.json").write_text(content)
    with pytest.raises(UserError, match="out/kd_stage.json is damaged .*remove .*out to train again"):
        claim(out, make_record(args, PARSER, plan), plan)


@pytest.mark.parametrize("trace", ["checkpoint.pth", "config.yaml", "7epoch.pth"])
def test_a_foreign_training(recorded, trace):
    out, args, plan = recorded
    for file in out.iterdir():
        file.unlink()
    (out / "train.log").touch()
    assert claim(out, make_record(args, PARSER, plan), plan) == 0
    (out / trace).touch()
    with pytest.raises(
        UserError, match=f"out holds a training that is not a distillation .{trace} without kd_stage.json"
    ):
        claim(out, make_record(args, PARSER, plan), plan)


def test_nothing_was_trained_yet(recorded):
    """If nothing was trained yet, a corrected command may use the directory."""
    out, args, plan = recorded
    (out / "checkpoint.pth").unlink()
    args.optim_conf = {"lr": 0.5}
    assert claim(out, make_record(args, PARSER, plan), plan) == 0


def test_differences():
    old = {"a": 1, "b": {"c": [1, {"d": 2}]}, "e": [1]}
    assert list(differences(old, copy.deepcopy(old))) == []
    new = {"a": 2, "b": {"c": [1, {"d": 3, "x": 4}]}, "e": [1, 2]}
    assert list(differences(old, new)) == [("a", 1, 2), ("b.c[1].d", 2, 3), ("b.c[1].x", None, 4), ("e", [1], [1, 2])]


@pytest.mark.parametrize("foreign", ["espnet", "ours"])
def test_a_plain_training_lies_there(corpus, teacher_dir, tmp_path, foreign):
    """The plain training comes from asr.sh with the same tag, or from asr_kd_train without a method."""
    from espnet_kd.offline import ASRTask

    out, page = tmp_path / "student", write_page(tmp_path, **MID)
    plain = corpus.options(out, "--use_tensorboard", "false", "--resume", "true", max_epoch=1)
    asr_kd_train.main(plain) if foreign == "ours" else ASRTask.main(cmd=plain)
    before = {p: p.read_bytes() for p in out.glob("*.pth")}
    with pytest.raises(
        UserError, match="student holds a training that is not a distillation .*choose another --output_dir"
    ):
        train(corpus, out, page, "--teacher", teacher_dir)
    assert {p: p.read_bytes() for p in out.glob("*.pth")} == before and not (out / "kd_stage.json").exists()


def test_a_plain_training_into_a_distilled_student(corpus, teacher_dir, tmp_path):
    out = tmp_path / "student"
    train(corpus, out, "kl", "--teacher", teacher_dir, max_epoch=1)
    before = {p: p.read_bytes() for p in out.glob("*.pth")}
    with pytest.raises(
        UserError, match="student holds a distilled student .*no --kd_config is given; choose another --out"
    ):
        asr_kd_train.main(corpus.options(out, "--resume", "true", max_epoch=2))
    assert {p: p.read_bytes() for p in out.glob("*.pth")} == before


@pytest.mark.parametrize(
    "more, what",
    [
        ([], None),
        (["--num_workers", "1"], None),
        (["--max_epoch", "3"], None),  # a longer training continues
        (["--max_epoch", "1"], "max_epoch: 2 → 1"),
        (["--encoder_conf", "num_blocks=3"], "encoder_conf.num_blocks: 2 → 3"),
        (["--seed", "5"], "seed: 0 → 5"),
        (["--optim_conf", "lr=0.5", "--accum_grad", "2"], "accum_grad: 1 → 2; optim_conf.lr: 0.01 → 0.5"),
    ],
)
def test_a_plain_training_of_other_options(corpus, tmp_path, monkeypatch, more, what):
    """The error names the options, before ESPnet would fail on tensors of another size."""
    from espnet_kd.tasks.asr_kd import ASRKDTask

    out = tmp_path / "plain"
    asr_kd_train.main(corpus.options(out, "--resume", "true", max_epoch=2))
    before, trained = (out / "config.yaml").read_bytes(), []
    main = ASRKDTask.main
    monkeypatch.setattr(ASRKDTask, "main", classmethod(lambda cls, cmd: trained.append(cmd) or main(cmd=cmd)))
    command = corpus.options(out, "--resume", "true", *more, max_epoch=2)
    if what is None:
        asr_kd_train.main(command)
        assert trained
        return
    with pytest.raises(UserError, match=f"plain holds a model of other settings .*{what}.*choose another --output_dir"):
        asr_kd_train.main(command)
    assert not trained and (out / "config.yaml").read_bytes() == before


def test_a_finished_training_goes_on(corpus, teacher_dir, tmp_path, caplog):
    """More epochs extend the last KD stage. After a kill the result is the same, bit for bit."""
    page, outs = write_page(tmp_path, **MID), [tmp_path / "one", tmp_path / "other"]
    for out in outs:
        train(corpus, out, page, "--teacher", teacher_dir)
    early = {n: load_state(outs[0] / f"kd_stage{n}/student.pth") for n in (1, 2)}
    train(corpus, outs[0], page, "--teacher", teacher_dir, max_epoch=6)
    with pytest.raises(Killed):
        train(corpus, outs[1], page, "--teacher", teacher_dir, max_epoch=6, kill_at=("step", 6, 1))
    record = json.loads((outs[1] / "kd_stage.json").read_text())
    assert (record["finished"], record["finished_kd_stage"], record["epochs"]) == (False, 2, 6)
    # It is no longer a training of four epochs.
    with pytest.raises(UserError, match="epochs: 6 → 4"):
        train(corpus, outs[1], page, "--teacher", teacher_dir)
    train(corpus, outs[1], page, "--teacher", teacher_dir, max_epoch=6)
    assert_same(*outs)
    record = json.loads((outs[0] / "kd_stage.json").read_text())
    assert sorted(read_checkpoint(outs[0] / "checkpoint.pth")["reporter"]["stats"]) == [1, 2, 3, 4, 5, 6]
    # The boundaries of the earlier KD stages have not moved, although KD stage 2 would now end in epoch 4.
    assert [s["epochs"] for s in record["stages"]] == [[1, 2], [2, 3], [3, 6]]
    for number, state in early.items():
        assert all(torch.equal(v, state[k]) for k, v in load_state(outs[0] / f"kd_stage{number}/student.pth").items())
    with caplog.at_level("INFO"):
        train(corpus, outs[0], page, "--teacher", teacher_dir, max_epoch=6)
    assert "KD stage 3 is finished" in caplog.text
    # Refused: with 40 epochs the last KD stage would begin later than the epochs that are already trained.
    with pytest.raises(UserError, match="epochs: 6 → 40"):
        train(corpus, outs[0], page, "--teacher", teacher_dir, max_epoch=40)
