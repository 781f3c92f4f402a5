"""Fabricated experiments: the files that training, decoding and scoring write."""

import json
import math
from datetime import timedelta

import torch


def train(run_dir, epochs, names, log_only=False):
    """Write the files of an ESPnet run with this number of epochs, each 61.5 s of training and 3 s of validation."""
    from espnet2.train.reporter import Reporter

    run_dir.mkdir(parents=True, exist_ok=True)
    reporter, log = Reporter(), []
    for epoch in range(1, epochs + 1):
        reporter.set_epoch(epoch)
        for phase, duration in (("train", 61.5), ("valid", 3.0)):
            with reporter.observe(phase) as sub:
                sub.register({n: torch.tensor(10.0 * math.exp(-epoch) + i) for i, n in enumerate(names)})
                sub.next()
            reporter.stats[epoch][phase]["time"] = timedelta(seconds=duration)
        log.append(f"[host] 2025-01-01 (trainer:1) INFO: {reporter.log_message()}\n")
    (run_dir / "train.log").write_text("".join(log))
    if not log_only:
        torch.save({"model": {"w": torch.zeros(9)}, "reporter": reporter.state_dict()}, run_dir / "checkpoint.pth")


def record(expdir, *epochs, finished=True, method="progressive_fkl", **more):
    """Write the record of a distillation: one training with KD stages in these epochs."""
    expdir.mkdir(parents=True, exist_ok=True)
    stages = [{"kd_stage": k, "name": f"s{k}", "epochs": list(e)} for k, e in enumerate(epochs, 1)]
    facts = {"method": method, "epochs": epochs[-1][1], "stages": stages, "finished": finished, **more}
    (expdir / "kd_stage.json").write_text(json.dumps(facts))


def describe(expdir, role, method=None, kd_stages=None, seed=0):
    expdir.mkdir(parents=True, exist_ok=True)
    facts = {"role": role, "method": method, "kd_stages": kd_stages, "seed": seed}
    (expdir / "experiment.json").write_text(json.dumps(facts))


def score(expdir, wer, testset="test", params=1234567):
    out = expdir / f"decode_{testset}"
    out.mkdir(parents=True, exist_ok=True)
    rates = {k: {"err": e, "low": e - 1, "high": e + 1} for k, e in (("cer", wer / 2), ("wer", wer))}
    (out / "score.json").write_text(json.dumps({"testset": testset, **rates, "utterances": 7}))
    (out / "decode.json").write_text(json.dumps({"params": params, "rtf": 0.01}))


def experiment(expdir, role, errors, *, method=None, seed=0, params=1000, testset="test", kd_stages=None, prefix="u"):
    """Write a finished experiment with this number of word errors in each utterance of ten words (50 characters)."""
    describe(expdir, role, method, kd_stages or ([1] if role == "student" else None), seed)
    score(expdir, 100.0 * sum(errors) / (10 * len(errors)), testset, params)
    lines = ["\t".join(["utt_id", *(f"{u}_{k}" for u in ("cer", "wer") for k in ("corr", "sub", "del", "ins"))])]
    for i, e in enumerate(errors):
        lines.append("\t".join(map(str, [f"{prefix}{i}", 50 - e, e, 0, 0, 10 - e, e, 0, 0])))
    (expdir / f"decode_{testset}" / "per_utt.tsv").write_text("\n".join(lines) + "\n")


def texts(expdir, said, testset="test"):
    """Write the recognised texts, {utterance: text}."""
    directory = expdir / f"decode_{testset}" / "1best_recog"
    directory.mkdir(parents=True)
    (directory / "text").write_text("".join(f"{u} {t}\n" for u, t in said.items()))


def report(exp, *options):
    """Run asr_kd_report without models; return its rows and Markdown page."""
    from espnet_kd.bin import asr_kd_report

    asr_kd_report.main([str(exp), "--no_frames", *map(str, options)])
    return json.loads((exp / "results.json").read_text()), (exp / "RESULTS.md").read_text()


def table(page, title):
    """The table after a heading as {first cell: {column: cell}}, in its order."""
    lines = [line.strip("|").split("|") for line in page.split(f"# {title}\n")[1].split("\n#")[0].splitlines()
             if line.startswith("|")]  # fmt: skip
    return {cells[0]: dict(zip(lines[0], cells)) for cells in lines[2:]}


def comparison(page):
    """The table "Comparison of methods"."""
    return table(page, "Comparison of methods")
