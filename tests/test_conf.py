"""Every shipped training YAML builds its model, optimizer and scheduler, and a README states the model's size.

The README states it in a table row: the file's path from the README's directory, the length of the token list, and the
parameters in millions: ``| `conf/train_teacher.yaml` | 500 | 25.28 M | …``.
"""

import re
from pathlib import Path

import pytest
from espnet2.tasks.abs_task import scheduler_classes
from espnet2.tasks.asr import ASRTask

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| `([^`]+\.yaml)` \| (\d+) \| (\d+\.\d\d) M \|", re.MULTILINE)
#: Directories with a README, and the YAML files that the README must list.
FILES = {
    home: sorted(str(p.relative_to(home)) for p in (home / below).rglob("*.yaml"))
    for home, below in [(ROOT / "conf/models", "."), *((p.parent, "conf") for p in ROOT.glob("egs2/*/asr_kd1/conf"))]
}


def stated(home: Path) -> dict:
    return {name: (int(tokens), millions) for name, tokens, millions in ROW.findall((home / "README.md").read_text())}


@pytest.mark.parametrize("home", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_readme_lists_the_files(home):
    assert FILES[home] and sorted(stated(home)) == FILES[home]


@pytest.mark.parametrize(
    ("home", "name"),
    [
        pytest.param(home, name, id=str((home / name).relative_to(ROOT)))
        for home, names in FILES.items()
        for name in names
    ],
)
def test_model_builds_and_has_the_size_stated(home, name, tmp_path, record_property):
    tokens, millions = stated(home)[name]
    words = ["<blank>", "<unk>", *(f"t{i}" for i in range(tokens - 3)), "<sos/eos>"]
    (tmp_path / "tokens.txt").write_text("".join(f"{word}\n" for word in words))
    args = ASRTask.get_parser().parse_args(["--config", str(home / name), "--token_list", str(tmp_path / "tokens.txt")])
    model = ASRTask.build_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    record_property("summary", f"{(home / name).relative_to(ROOT)}: {parameters:,} parameters with {tokens} tokens")
    assert f"{parameters / 1e6:.2f}" == millions
    (optimizer,) = ASRTask.build_optimizers(args, model)
    scheduler_classes[args.scheduler](optimizer, **args.scheduler_conf)
    # KD and greedy decoding need a CTC head without a decoder, and models chosen by the CTC loss.
    assert args.model_conf["ctc_weight"] == 1.0 and model.decoder is None
    assert args.best_model_criterion == [["valid", "loss_ctc", "min"]]
