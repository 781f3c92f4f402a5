"""Every method page with a teacher trains a step with a Hugging Face model; one also trains from the model's cache."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra: pip install 'espnet_kd[foundation]'")

import tiny_hf  # noqa: E402

from espnet_kd.bin import asr_kd_cache, asr_kd_import, asr_kd_train  # noqa: E402
from espnet_kd.cli import UserError  # noqa: E402
from espnet_kd.distill.page import list_pages, load_page  # noqa: E402

#: Pages that copy the teacher's layers, which no ESPnet student can take from a Hugging Face model.
COPIES = ("layer_pruning", "self_kd")
PAGES = [p for p in list_pages() if load_page(p).teacher == "required" and p not in COPIES]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    home = tmp_path_factory.mktemp("foreign")
    asr_kd_import.main([f"hf:{tiny_hf.save(home / 'hf', 'wav2vec2', letters='abcdefghij')}",
                        "--output_dir", str(home / "exp")])  # fmt: skip
    return home / "exp"


@pytest.mark.parametrize("page", PAGES)
def test_a_step(corpus, foreign, tmp_path, page):
    text = page != "label_free"
    more = ["--teacher", str(foreign), "--kd_config", page, "--use_tensorboard", "false"]
    if page == "inter_kd":
        more += ["--encoder_conf", "num_blocks=4"]
    stages = len(load_page(page).stages)
    asr_kd_train.main(corpus.options(tmp_path / "out", *more, text=text, num_iters_per_epoch=1, max_epoch=stages))
    state = torch.load(tmp_path / "out/student.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state.values())


@pytest.mark.parametrize("page", COPIES)
def test_layer_pruning_is_refused_by_name(corpus, foreign, tmp_path, page):
    with pytest.raises(UserError, match="layer pruning"):
        asr_kd_train.main(
            corpus.options(tmp_path / "out", "--teacher", str(foreign), "--kd_config", page, max_epoch=1)
        )


def test_training_from_its_cache_and_a_changed_model_is_refused(corpus, foreign, tmp_path):
    cache = tmp_path / "cache"
    dirs = [str(corpus.dir / n) for n in ("train", "valid")]
    asr_kd_cache.main(["--teacher", str(foreign), "--output", str(cache), "--kd_config", "kl", "--data_dir", *dirs])
    more = ["--teacher", str(foreign), "--target_cache", str(cache), "--kd_config", "kl", "--use_tensorboard", "false"]
    asr_kd_train.main(corpus.options(tmp_path / "out", *more, max_epoch=1, num_iters_per_epoch=1))
    state = torch.load(foreign / "model.pth", weights_only=True)
    torch.save({k: v + (0.1 if k == "ctc.ctc_lo.bias" else 0) for k, v in state.items()}, foreign / "model.pth")
    with pytest.raises(UserError, match="teacher"):
        asr_kd_train.main(corpus.options(tmp_path / "other", *more, max_epoch=1, num_iters_per_epoch=1))
