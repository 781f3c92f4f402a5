"""Packages, token models and parameters that training options need are checked before the first step."""

import importlib.util

import numpy as np
import pytest
import soundfile
import tiny_asr
import torch
import yaml

from espnet_kd.bin import asr_kd_train
from espnet_kd.cli import UserError
from espnet_kd.distill.checks import options as requirements

KL = ["--kd_config", "kl"]


def refused(options, match, out):
    """Assert that the options are refused before training, with an error of one line."""
    with pytest.raises(UserError, match=match) as e:
        asr_kd_train.main(options)
    assert "\n" not in str(e.value) and not list(out.glob("**/*.pth"))


PACKAGES = {
    "wandb": ["--use_wandb", "true"],
    "tensorboard": ["--use_tensorboard", "true"],
    "matplotlib": ["--use_matplotlib", "true"],
    "fairscale": ["--sharded_ddp", "true"],
    "loralib": ["--use_adapter", "true", "--adapter", "lora"],
    "s3prl": ["--use_adapter", "true", "--adapter", "houlsby"],
    "transformers": ["--token_type", "hugging_face"],
    "whisper": ["--token_type", "whisper_multilingual"],
}


@pytest.mark.parametrize("module, options", PACKAGES.items(), ids=PACKAGES)
def test_packages_that_are_not_installed(corpus, tmp_path, monkeypatch, module, options):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    refused(corpus.options(tmp_path / "out", *options), r"^--\w+ \w+ needs .*not installed: pip install", tmp_path)


def test_another_trainer(corpus, tmp_path):
    refused(corpus.options(tmp_path / "out", "--use_deepspeed", "true"), "^--use_deepspeed true .*--ngpu", tmp_path)


def test_tokens_that_cannot_be_made(corpus, tmp_path):
    """g2p_en cannot work without the data that it downloads."""
    options = corpus.options(tmp_path / "out", "--token_type", "phn", "--g2p", "g2p_en")
    refused(options, "^--token_type phn, --g2p g2p_en: no tokens can be made of the transcripts: ", tmp_path)


@pytest.fixture
def bpe(tmp_path):
    """(SentencePiece model, token list) of the letters of a corpus."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("abcd efgh ij abcd\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "bpe"), vocab_size=14, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    return tmp_path / "bpe.model", ["<blank>", *(n for n in names if n not in ("<s>", "</s>")), "<sos/eos>"]


def bpe_options(corpus, tmp_path, tokens, *more):
    (tmp_path / "tokens.txt").write_text("".join(f"{t}\n" for t in tokens), encoding="utf-8")
    own = ["--token_type", "bpe", "--token_list", str(tmp_path / "tokens.txt"), "--max_epoch", "1"]
    return corpus.options(tmp_path / "out", *own, *more)


def test_token_models(corpus, tmp_path, bpe):
    """Refused: no model, a missing file, another kind of file, a model with more or fewer pieces than the list."""
    model, tokens = bpe
    refused(bpe_options(corpus, tmp_path, tokens), "^--token_type bpe needs --bpemodel", tmp_path)
    gone = str(tmp_path / "gone.model")
    refused(bpe_options(corpus, tmp_path, tokens, "--bpemodel", gone), "--bpemodel .*gone.model: no such", tmp_path)
    (tmp_path / "secret.txt").write_text("root:x:0:0\n")
    secret = ["--bpemodel", str(tmp_path / "secret.txt")]
    refused(bpe_options(corpus, tmp_path, tokens, *secret), "--bpemodel .*secret.txt is not a Sentence", tmp_path)
    own = ["--bpemodel", str(model)]
    fewer, more = [*tokens[:-4], tokens[-1]], [*tokens[:-1], "▁new", tokens[-1]]
    refused(bpe_options(corpus, tmp_path, fewer, *own), "--bpemodel .* does not belong to .*: 3 of its", tmp_path)
    refused(bpe_options(corpus, tmp_path, more, *own), "--bpemodel .* not belong .*: it has no pieces ▁new", tmp_path)
    asr_kd_train.main(bpe_options(corpus, tmp_path, tokens, *own))
    assert (tmp_path / "out/1epoch.pth").is_file()


@pytest.fixture
def other(tmp_path):
    """A directory with a model of another width, and a state without encoder but with an unknown parameter."""
    wide = tiny_asr.config(output_size=24)
    tiny_asr.save(tiny_asr.build(wide), wide, tmp_path / "wide")
    plain = tiny_asr.config()
    state = tiny_asr.build(plain).state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("encoder.")}
    torch.save({**state, "extra.weight": torch.zeros(2)}, tmp_path / "extra.pth")
    return tmp_path


def test_parameters_that_do_not_fit(corpus, other):
    wide = str(other / "wide/valid.loss.ave.pth")
    out = other / "out"
    sizes = r"^--init_param .*: \d+ of its parameters have another size than the student's \(encoder.* there, .* in"
    refused(corpus.options(out, "--init_param", wide), sizes, out)
    strange = "^--init_param .*: the student has no extra.weight; leave that out with .*extra.pth:::extra, or"
    refused(corpus.options(out, "--init_param", f"{other}/extra.pth"), strange, out)
    refused(corpus.options(out, "--init_param", f"{wide}:decoder"), "no parameter of the file is left", out)
    refused(corpus.options(out, "--init_param", f"{other}/gone.pth"), "cannot load .*gone.pth", out)


def test_what_espnet_takes_of_a_file(other):
    """``selected`` finds the parameters that ESPnet's own loader changes."""
    from espnet2.torch_utils.load_pretrained_model import load_pretrained_model

    file = str(other / "wide/valid.loss.ave.pth")
    for given in (file, f"{file}:ctc:ctc", f"{file}::", f"{file}:::encoder", f"{file}:ctc:ctc:ctc.ctc_lo.bias"):
        model = tiny_asr.build(tiny_asr.config(output_size=24), seed=8)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        load_pretrained_model(given, model, False)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        found = requirements.selected(given)
        assert changed <= set(found) and all(torch.equal(model.state_dict()[k], v) for k, v in found.items())


def test_parameters_that_fit_are_taken(corpus, other):
    file = str(other / "extra.pth")
    for more in ([f"{file}:::extra"], [file, "--ignore_init_mismatch", "true"]):
        args = asr_kd_train.get_parser().parse_args(corpus.options(other / "out", "--init_param", *more))
        requirements.check_init_param(args)


def test_audio_of_another_rate_is_refused(corpus, tmp_path, teacher_dir):
    """Also without a teacher, because inference would refuse such audio later."""
    for more in ([], ["--teacher", str(teacher_dir), *KL]):
        options = corpus.options(tmp_path / "out", "--frontend_conf", "fs=8000", *more)
        refused(options, r"train/wav.scp: utterance train0 has 16000 Hz, .* 8000 Hz; resample", tmp_path)


def stereo_data(corpus, tmp_path):
    lines = []
    for line in (corpus.dir / "train/wav.scp").read_text().splitlines():
        utt_id, path = line.split()
        samples, rate = soundfile.read(path)
        soundfile.write(tmp_path / f"{utt_id}.wav", np.stack([samples, 0.5 * samples], 1), rate)
        lines.append(f"{utt_id} {tmp_path}/{utt_id}.wav\n")
    (tmp_path / "wav.scp").write_text("".join(lines))
    return tmp_path / "wav.scp"


def test_several_channels_are_refused_where_there_is_a_teacher(corpus, tmp_path, teacher_dir):
    scp, old = str(stereo_data(corpus, tmp_path)), str(corpus.dir / "train/wav.scp")
    options = [o.replace(old, scp) for o in corpus.options(tmp_path / "out", "--teacher", str(teacher_dir), *KL)]
    refused(options, r"wav.scp: utterance train0 has 2 channels, .*force_single_channel=true", tmp_path)


def test_loudness_that_the_teacher_does_not_know_is_refused(corpus, tmp_path, teacher_dir):
    more = ["--speech_volume_normalize", "0.5", "--teacher", str(teacher_dir), *KL]
    refused(corpus.options(tmp_path / "out", *more), f"^speech_volume_normalize: 0.5 .*teacher {teacher_dir}", tmp_path)


def test_a_token_list_in_the_yaml(corpus, tmp_path):
    """The token list may be a list in the YAML, as in a configuration that ESPnet saved."""
    from espnet_kd.distill.checks.configuration import check_configuration

    content = yaml.safe_load(corpus.config().read_text())
    for value, good in ((tiny_asr.TOKENS, True), (["a", 3], False), ({"a": 1}, False)):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({**content, "token_list": value}))
        cmd = ["--config", str(tmp_path / "s.yaml"), "--token_type", "char"]
        if good:
            assert check_configuration(asr_kd_train.get_parser(), cmd).token_list == value
        else:
            with pytest.raises(UserError, match="s.yaml: token_list: expected "):
                check_configuration(asr_kd_train.get_parser(), cmd)


@pytest.mark.parametrize("content, message", [("nan", "2 of 40 features .* no number"), (None, "no such file")])
def test_statistics_of_the_users_own(corpus, tmp_path, content, message):
    """A statistics file outside of the recipe's directories is checked too."""
    stats = tmp_path / "mine.npz"
    if content:
        total = np.zeros(40)
        total[3], total[7] = np.nan, np.inf
        np.savez(stats, count=100, sum=total, sum_square=np.full(40, 400.0))
    command = corpus.options(tmp_path / "out", normalize_conf={"stats_file": str(stats)})
    with pytest.raises(UserError, match=f"mine.npz: .*{message}"):
        asr_kd_train.main(command)
    assert not (tmp_path / "out/config.yaml").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--accum_grad", "0"], "--accum_grad is 0; it must be 1 or more"),
        (["--accum_grad", "-1"], "--accum_grad is -1"),  # the loss would change its sign
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--batch_type", "numel", "--batch_bins", "0"], "--batch_bins is 0"),
        (["--valid_batch_size", "0"], "--valid_batch_size is 0"),
        (["--num_iters_per_epoch", "-1"], "--num_iters_per_epoch is -1"),
        (["--log_interval", "0"], "--log_interval is 0"),
        (["--num_workers", "-1"], "--num_workers is -1; it must be 0 or more"),
        (["--keep_nbest_models", "5", "0"], "--keep_nbest_models is 0"),
        (["--patience", "-1"], "--patience is -1"),  # training would end after its first epoch
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", "99999999999"], "--seed is 99999999999; it must be at most"),
        (["--grad_clip", "-1"], "--grad_clip is -1.0; it must be above 0"),  # gradients would change their sign
        (["--grad_clip", "nan"], "--grad_clip is nan"),
        (["--speech_volume_normalize", "0"], "--speech_volume_normalize is 0.0"),  # all audio would be silent
        (["--batch_type", "folded"], "--fold_length has 0 numbers for 2 files of --train_shape_file"),
        (["--freeze_param", "encoders"], "--freeze_param encoders: .*; did you mean 'encoder'?"),
        (["--freeze_param", "encoder", "ctc"], "--freeze_param encoder ctc freezes all parameters"),
    ],
)
def test_numbers_out_of_range(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *options, max_epoch=1))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_number_out_of_range_in_a_page(corpus, teacher_dir, tmp_path, write_page):
    page = write_page({"stages": [{"share": 1.0, "objectives": [{"objective": "kl"}]}], "train": {"accum_grad": 0}})
    options = ["--teacher", str(teacher_dir), "--kd_config", str(page)]
    with pytest.raises(UserError, match="^--accum_grad is 0"):
        asr_kd_train.main(corpus.options(tmp_path / "out", *options, max_epoch=1))
