"""Which steps a job has: data, teacher, plain students, stage 7, distilled students, decoding."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from espnet_kd.data.datadir import OWN_TEXT
from espnet_kd.runs.options import Job, WrongOption
from espnet_kd.runs.steps import Step

#: {method: other method}. The export of the method makes its student smaller, so that the student is compared with a
#: plain student of the other method's configuration.
EXPORTED_LIKE = {"self_kd": "layer_pruning"}
WITHOUT_TEXT = "statistics without text"


def stages(first: int, last: int, *options: str) -> Tuple[str, ...]:
    """Options of run.sh for these stages."""
    return ("--stage", str(first), "--stop_stage", str(last), *options)


DATA = Step("data", stages(1, 4))


@dataclass(frozen=True)
class Method:
    """A method of a comparison, and the requirements in its page."""

    page: str  #: a name in conf/methods, or an absolute path
    has_teacher: bool
    needs_text: bool
    nbest: int  #: hypotheses per utterance that it needs from the teacher's N-best list

    @property
    def name(self) -> str:
        """The method's part of the names of its students."""
        return name_of(self.page)


def name_of(page: str) -> str:
    """The part of students' names that stands for a method page."""
    return re.sub(r"\.yaml$", "", Path(page).name)


def tagged(name: str, tag: str) -> str:
    """The name of an experiment's directory."""
    return f"{name}_{tag}" if tag else name


def tag_of(seed: str) -> str:
    """The tag for a seed, as in run.sh; seed 0 has none."""
    return "" if seed == "0" else f"seed{seed}"


def epochs_in(config: Path, options: str) -> int:
    """The number of epochs of a training, 0 if it is not known.

    Args:
        options: options of the training, which override the file.
    """
    given = re.findall(r"(?:^|\s)--max_epoch[ =]+(\d+)", options)
    if not given and config.is_file():
        given = re.findall(r"^max_epoch: *(\d+) *$", config.read_text(encoding="utf-8"), re.MULTILINE)
    return int(given[-1]) if given else 0


def teacher_step(job: Job, needs: Sequence[str] = ()) -> Step:
    """The teacher's training. If a finished teacher is given, the step has no epochs."""
    get = job.settings
    epochs = 0 if get["teacher"] else epochs_in(job.recipe / get["teacher_config"], get["teacher_args"])
    return Step("teacher", stages(5, 5), tuple(needs), directory=job.exp / "teacher", epochs=epochs)


def student_epochs(job: Job, config: str = "") -> int:
    """The epochs of a student of this configuration, default: that of all students."""
    return epochs_in(job.recipe / (config or job.settings["student_config"]), job.settings["train_args"])


def one_method(job: Job) -> List[Step]:
    """The steps of one method, with the method, seed and tag among the options of run.sh."""
    get, epochs = job.settings, student_epochs(job)
    method, tag = name_of(get["method"]), get["tag"] or tag_of(get["seed"] or "0")
    pseudo, untranscribed = (name if get[name] else "" for name in ("pseudo", "untranscribed"))
    plain_name = tagged("student_plain", pseudo)
    student = tagged(f"student_{method}", get["kd_stages"].replace(" ", ""))
    student = tagged(tagged(student, pseudo), untranscribed)
    # Teacher and plain student do not need each other, and can be trained at the same time.
    plain_dir, kd_dir = (job.exp / tagged(name, tag) for name in (plain_name, student))
    plain = Step("plain student", stages(6, 6), ("data",), directory=plain_dir, epochs=epochs)
    name = f"{method} student, decoding, results"
    last = Step(name, stages(7, 13), ("teacher", plain.name), directory=kd_dir, epochs=epochs)
    return [DATA, teacher_step(job, ["data"]), plain, last]


def comparison(job: Job, methods: Sequence[Method]) -> List[Step]:
    """The steps between data and decoding, for all methods and seeds.

    The teacher and the steps that students share come first, then the students by seed. A distilled student can start
    as soon as its teacher is finished; plain students are trained until then.
    """
    steps = [teacher_step(job)]
    needs: Dict[str, Tuple[str, ...]] = {}
    shared: Optional[Step] = None
    for method in methods:
        needs[method.name] = ()
        if not method.needs_text:
            if not any(step.name == WITHOUT_TEXT for step in steps):  # once for all such methods
                steps.append(Step(WITHOUT_TEXT, stages(4, 4, *data_options(job, method))))
            needs[method.name] += (WITHOUT_TEXT,)
        if method.has_teacher or method.nbest:
            needs[method.name] += ("teacher",)
        if method.nbest or (method.has_teacher and job.settings["target_cache"] == "true"):
            # Stage 7 runs before the seeds, which share its result and may run at the same time. The stages 7 of all
            # methods run one after the other, because two methods may share an N-best list.
            shared = Step(
                f"stage 7 for {method.name}",
                stages(7, 7, "--method", method.page, *data_options(job, method)),
                needs[method.name],
                after=(shared.name,) if shared else (),
            )
            steps.append(shared)
            needs[method.name] += (shared.name,)
    for seed in job.seeds:
        steps.append(plain_student(job, seed))
        for method in methods:
            like = EXPORTED_LIKE.get(method.name, method.name)
            if own_config(job, like):
                step = plain_student(job, seed, like)
                steps += [] if step in steps else [step]
            steps.append(distilled_student(job, method, seed, needs[method.name]))
    return steps


def data_options(job: Job, method: Method) -> Tuple[str, ...]:
    """Options for the training data of a method, if it needs data without text."""
    return () if method.needs_text else ("--train_set", f"{job.settings['train_set']}_without_text")


def own_config(job: Job, method: str) -> str:
    """The student configuration of a method, relative to the recipe; empty if the method has none of its own."""
    config = f"conf/train_student_{method}.yaml"
    return config if (job.recipe / config).exists() else ""


def plain_student(job: Job, seed: str, like: str = "") -> Step:
    """A plain student with the configuration of all students, or with that of the method ``like``."""
    name, tag, config = f"plain, seed {seed}", tag_of(seed), own_config(job, like) if like else ""
    own: Tuple[str, ...] = ()
    if like:
        name, tag = f"plain like {like}, seed {seed}", tagged(like, tag)
        own = ("--student_config", config, "--tag", tag)
    directory = tagged("student_plain", tag)
    return Step(
        name,
        stages(6, 6, "--seed", seed, *own),
        directory=job.exp / directory,
        epochs=student_epochs(job, config),
        experiment=f"{job.settings['expdir']}/{directory}",
    )


def distilled_student(job: Job, method: Method, seed: str, needs: Tuple[str, ...]) -> Step:
    """A student of a method, with the method's own configuration if there is one."""
    config = own_config(job, method.name)
    own = ("--student_config", config) if config else ()
    directory = tagged(f"student_{method.name}", tag_of(seed))
    return Step(
        f"{method.name}, seed {seed}",
        stages(8, 11, "--method", method.page, "--seed", seed, *own, *data_options(job, method)),
        needs,
        directory=job.exp / directory,
        epochs=student_epochs(job, config),
        experiment=f"{job.settings['expdir']}/{directory}/export",
    )


def decoding(experiments: Sequence[str]) -> Optional[Step]:
    """The step that decodes and scores these experiments and the teacher; None if there are no experiments."""
    if not experiments:
        return None
    return Step("decoding, scoring and results", ("--stage", "12", "--experiments", " ".join(experiments)))


def copy_without_text(job: Job) -> None:
    """Make the training data of methods without labels. They have no text, which proves that no label is used.

    All files except the texts are copied; the audio stays in place, because wav.scp has its paths.
    The token list of the training set is copied too, because run.sh has one for each training set.
    """
    source = job.recipe / job.settings["dumpdir"] / "raw" / job.settings["train_set"]
    destination = source.with_name(f"{source.name}_without_text")
    destination.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in ("text", OWN_TEXT):
            shutil.copy2(file, destination / file.name)
    tokens = token_dir(job, source.name)
    if (job.recipe / tokens).is_dir():  # with a given teacher, the students get the teacher's list
        shutil.copytree(job.recipe / tokens, job.recipe / token_dir(job, destination.name), dirs_exist_ok=True)


def token_dir(job: Job, train_set: str) -> str:
    """The directory of a training set's token list, relative to the recipe, as run.sh names it."""
    get = job.settings
    home = "data" if get["dumpdir"] == "dump" else get["dumpdir"]
    kind = f"bpe_unigram{get['nbpe']}" if get["token_type"] == "bpe" else get["token_type"]
    return f"{home}/token_list/{tagged(kind, '' if train_set == 'train' else train_set)}"


def choose_methods(job: Job, names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """The pages that --methods asks for, and those of ``all`` that the recipe cannot run.

    Args:
        names: names of the package's pages.

    Raises:
        WrongOption: a method is named twice, or has the name of the plain students.
    """
    if job.methods == "all":
        # If another recipe has a student configuration for a method, the method needs one in this recipe too.
        own = {p.name for p in job.root.glob("egs2/*/asr_kd1/conf/train_student_*.yaml")}
        left_out = [n for n in names if f"train_student_{n}.yaml" in own and not own_config(job, n)]
        return [name for name in names if name not in left_out], left_out
    # Paths are made absolute, because run.sh works in the recipe's directory.
    chosen = [str(Path(w).resolve()) if w.endswith((".yaml", ".yml")) else w for w in job.methods.split()]
    short = [name_of(page) for page in chosen]
    for name in short:
        if short.count(name) > 1:
            raise WrongOption(f"--methods names {name} twice: its students would be in one directory")
        if name == "plain":
            raise WrongOption("--methods names plain, and student_plain is the student without KD: rename the page")
    return chosen, []
