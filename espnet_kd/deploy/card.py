"""A model card in Hugging Face's format, made from the files of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import yaml

from espnet_kd.deploy.measure import exports_table, read_rows
from espnet_kd.distill.export import usage_of_export
from espnet_kd.environment import environment
from espnet_kd.files import read_json, replacing, sha256_of
from espnet_kd.report.labels import GREEDY
from espnet_kd.report.page import Section, Table, to_markdown

CARD = "README.md"
#: Value of facts that are not in any file.
UNKNOWN = "[to be filled in by the author]"
USAGE = {
    "onnx": '''```python
import json, numpy, onnxruntime, soundfile
about = json.load(open("{folder}/student.json", encoding="utf-8"))
session = onnxruntime.InferenceSession("{folder}/model.onnx")
speech = soundfile.read("speech.wav", dtype="float32")[0][None]  # (1, N), {rate} Hz
lengths = numpy.array([speech.shape[1]])
log_probs, frames = session.run(None, {{"speech": speech, "speech_lengths": lengths}})
best = log_probs[0, : frames[0]].argmax(axis=-1)  # greedy search: repeats are merged, blanks dropped
changed = [label for label, before in zip(best, [-1, *best]) if label != before]
print([about["tokens"][label] for label in changed if label not in (about["blank"], *about["no_text"])])
```

With espnet_kd: `from espnet_kd.transcribe import Transcriber; print(Transcriber("{folder}")("speech.mp3").text)`''',
    "sherpa": '''```python
import sherpa_onnx, soundfile
student = sherpa_onnx.OfflineRecognizer.from_omnilingual_asr_ctc(
    model="{folder}/model.onnx", tokens="{folder}/tokens.txt")
stream = student.create_stream()
stream.accept_waveform({rate}, soundfile.read("speech.wav", dtype="float32")[0])
student.decode_stream(stream)
print(stream.result.text)
```''',
    "stream": '''```sh
arecord -f S16_LE -r {rate} | python -m espnet_kd.bin.asr_kd_transcribe --model {folder} --streaming -
```''',
    "web": '''```sh
python3 -m http.server --directory {folder}  # and open the address that it names; it works offline
```''',
}


def write_cards(expdir: Path, folders: Mapping[str, Path]) -> None:
    """Write README.md into exports {format: folder} of the student of ``expdir``."""
    for form, folder in folders.items():
        with replacing(folder / CARD) as f:
            f.write(make_card(expdir, form, folder, folders))
        about = read_json(folder / "student.json") or {}
        if about:
            import json

            about["files"][CARD] = sha256_of(folder / CARD)
            with replacing(folder / "student.json") as f:
                f.write(json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def make_card(expdir: Path, form: str, folder: Path, folders: Mapping[str, Path]) -> str:
    """Return the card of one export; ``folders`` are all exports that were made together."""
    from espnet_kd.experiments.models import read_config

    config = read_config(expdir / "config.yaml")
    given, stage = (read_json(expdir / name) or {} for name in ("experiment.json", "kd_stage.json"))
    about: Dict[str, Any] = next((a for f in folders.values() if (a := read_json(f / "student.json"))), {})
    rate = about.get("sampling_rate") or (config.get("frontend_conf") or {}).get("fs", 16000)
    name = expdir.resolve().name
    rows = _results(expdir)
    head: Dict[str, Any] = {
        "license": "other",
        "license_name": UNKNOWN,
        "language": UNKNOWN,
        "pipeline_tag": "automatic-speech-recognition",
        "library_name": "espnet" if form == "espnet" else "onnx",
        "tags": ["automatic-speech-recognition", "ctc", "knowledge-distillation", "espnet"],
        "metrics": ["cer", "wer"],
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    how = "trained with espnet_kd, without a teacher" if stage else "trained with ESPnet"
    if any(stage.get(source) for source in ("teacher", "target_cache", "nbest")):
        how = "distilled from a larger one with espnet_kd"
    lines += [
        f"A CTC speech recogniser, {how}.",
        "",
        *_facts(config, stage, given, about, rate),
        "",
    ]
    sections: List[Section] = []
    if stage.get("stages"):
        trained = Table(("KD stage", "epochs", "objectives and weights"), [_stage(s) for s in stage["stages"]])
        sections.append(Section("How it was trained", "Its KD stages, phases of one training.", [trained]))
    if rows:
        body = [[str(r.get("testset")), r["label"], *_rates(r)] for r in rows]
        columns = ("test set", "model", "parameters", "CER", "WER", "95 % interval of the WER")
        how = "In percent; CTC decoding, greedy where no other search is named."
        sections.append(Section("Results", how, [Table(columns, body)]))
    measured = read_rows(expdir)
    if measured:
        sections.append(Section("Forms", f"One thread of {environment()['CPU']}.", [Table(*exports_table(measured))]))
    lines += to_markdown(sections, folder, "").split("\n")[2:] if sections else []
    lines += ["## How to run it", ""]
    for kind, place in folders.items():
        how = usage_of_export(place) if kind == "espnet" else USAGE[kind].format(folder=place.name, rate=rate)
        lines += [f"### {kind}", "", how, ""]
    lines += ["## Licence, data and limits", ""]
    for what in ("Licence of the model", "Licence of the training data", "Intended use", "Known limits"):
        lines.append(f"- {what}: {UNKNOWN}")
    return "\n".join(lines) + "\n"


def _facts(config: Mapping[str, Any], stage: Any, given: Any, about: Any, rate: Any) -> List[str]:
    """Facts about the model, as lines of a list."""
    data = [str(d[0]).rsplit("/", 1)[0] for d in config.get("train_data_path_and_name_and_type") or [] if d]
    facts = [
        ("encoder", config.get("encoder")),
        ("parameters", f"{about['parameters']:,}" if about else None),
        ("tokens", f"{len(config.get('token_list') or [])} ({config.get('token_type')})"),
        ("audio", f"{rate} Hz, one channel"),
        ("frame shift", f"{1000 * about['frame_shift']:g} ms" if about else None),
        ("training data", ", ".join(dict.fromkeys(data)) or None),
        ("method", stage.get("method") or given.get("method")),
        ("teacher", ", ".join(stage.get("teacher") or []) or None),
        ("epochs", stage.get("epochs") or config.get("max_epoch")),
        ("seed", stage.get("seed", config.get("seed"))),
        ("largest difference to ESPnet", f"{about['largest_difference']:.1e} nats" if about else None),
    ]
    return [f"- {what}: {value}" for what, value in facts if value is not None]


def _stage(stage: Mapping[str, Any]) -> Sequence[str]:
    """The table row of a KD stage."""

    def weight(value: Any) -> str:
        return f"{value['start']:g} → {value['end']:g}" if isinstance(value, dict) else f"{value:g}"

    named = ", ".join(f"{o['objective']} {weight(o['weight'])}" for o in stage.get("objectives", []))
    first, last = stage.get("epochs", ["–", "–"])
    return str(stage.get("name") or stage.get("kd_stage")), f"{first}–{last}", named


def _results(expdir: Path) -> List[Dict[str, Any]]:
    """Rows of results.json beside the experiment: this experiment, its teacher, and plain students of its size.

    A report on several directories also has rows of the others, in which experiments may have the same names.
    """
    rows = read_json(expdir.parent / "results.json") or []
    name = expdir.resolve().name
    rows = [row for row in rows if row.get("wer") is not None] if isinstance(rows, list) else []
    homes = [str(row.get("expdir")) for row in rows]
    # The first directory of a report is the one that it is written to.
    home = next((h for h in homes if Path(h).resolve() == expdir.parent.resolve()), homes[0] if homes else "")
    rows = [row for row in rows if str(row.get("expdir")) == home]
    size = next((row.get("params") for row in rows if row.get("experiment") == name), None)
    found = []
    for row in rows:
        own = row.get("experiment") == name
        if own or row.get("role") == "teacher" or (row.get("role") == "plain" and row.get("params") == size):
            label = "this model" if own else f"{row['role']} ({row.get('experiment')})"
            other = row.get("search") not in (None, GREEDY)
            found.append({**row, "label": f"{label}, {row['search']}" if other else label})
    return sorted(found, key=lambda row: str(row.get("testset")))


def _rates(row: Mapping[str, Any]) -> List[str]:
    """Parameters, CER, WER and its interval, as text."""
    shown = [f"{row['params']:,}" if row.get("params") else "–"]
    shown += ["–" if row.get(k) is None else f"{row[k]:.2f}" for k in ("cer", "wer")]
    low, high = row.get("wer_low"), row.get("wer_high")
    return [*shown, "–" if low is None or high is None else f"{low:.2f} to {high:.2f}"]
