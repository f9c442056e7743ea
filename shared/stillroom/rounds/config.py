"""The YAML of `teacher-cache rounds` and `student-train rounds`, and the configurations of a round's parts.

A round's parts are commands that exist, each with a configuration of its own in the round's folder:

FOLDER/rounds.yaml             what the rounds were started with
FOLDER/state.json              which parts are done, and who does what now
FOLDER/round-1/generate.yaml   for `teacher-cache build`: chains of the student, into chains/
FOLDER/round-1/score.yaml      for `teacher-cache score`: the same chains with the teacher's distributions, into scored/
FOLDER/round-1/train.yaml      for `student-train run`: from scored/, into run/
FOLDER/round-1/student/        what the run exports: the student of round 2
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from stillroom.config import Json, StrictModel, flat, plain

ON_POLICY = {"temperature": 1.0, "top_p": 1.0}
"""Sampling at which the stored log probabilities are those of the tokens that were drawn."""
FILLED = {
    "generate": ("cache", "run", "teacher.model", "teacher.revision"),
    "score": ("cache", "run", "completions"),
    "train": ("run", "student.model", "student.init", "data.behaviour"),
}
"""Keys that each round sets itself."""
BLOCKS = {"generate": ("teacher", "sampling"), "score": (), "train": ("student", "data")}
"""Blocks in which a round sets keys besides those that are given."""
FREE = {
    "generate": ("engine", "shard", "judging", "failures"),
    "score": ("engine", "shard", "judging", "failures"),
    "train": ("engine", "checkpoint", "eval", "tensorboard"),
}
"""Blocks that say where and how fast, and may change between rounds."""


class AnswersConfig(StrictModel):
    """Held-out prompts that the student answers, judged, before the first round and after each."""

    prompts: int = Field(default=64, ge=1)
    """Held-out prompts to answer; generate.prompts.heldout_frac holds them out."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Maximum tokens per answer."""


class RoundsConfig(StrictModel):
    """On-policy rounds: the student generates chains, the teacher scores them, the student trains on them. The programs
    meet only in `folder`; `teacher-cache rounds` and `student-train rounds` read the same file, on one machine or two.
    """

    folder: Path
    """Folder that both machines see."""
    rounds: int = Field(default=1, ge=1)
    """Number of rounds; may be raised later."""
    student: str
    """Hugging Face folder or hub id of the student before the first round."""
    generate: Json
    """Configuration of `teacher-cache build` for the student's chains, without cache, run and teacher.model, which each
    round sets. sampling.temperature and top_p are 1 unless set."""
    score: Json
    """Configuration of `teacher-cache score` for the teacher, without cache, run and completions."""
    train: Json
    """Configuration of `student-train run`, without run, student.model and data.behaviour. Caches in data.caches, which
    may be left out, are read besides the round's own (off-policy chains)."""
    answers: AnswersConfig | None = AnswersConfig()
    """None judges no answers."""
    allow_other_teacher: bool = False
    """Let the teacher differ from the one of the caches in train.data.caches."""

    @field_validator("generate", "score", "train")
    @classmethod
    def _sets_nothing_filled(cls, value: Json, info: Any) -> Json:
        for key in FILLED[info.field_name]:
            if _get(value, key) is not None:
                raise ValueError(f"each round sets {key} itself: remove it")
        if info.field_name == "generate" and _get(value, "teacher.adapter") is not None:
            # It would be applied to every round's student, and no round trains that model.
            raise ValueError(
                "teacher.adapter is not part of the student that trains: merge it and name that in student"
            )
        for key in BLOCKS[info.field_name]:
            if not isinstance(value.get(key), Mapping | None):
                raise ValueError(f"{key} must be a mapping of keys to values (got {value[key]!r})")
        return value


def round_folder(config: RoundsConfig, number: int) -> Path:
    """The folder of round `number`, from 1."""
    return config.folder / f"round-{number}"


def student_of(config: RoundsConfig, number: int) -> str:
    """The student that writes and then trains in round `number`."""
    return config.student if number == 1 else str(round_folder(config, number - 1) / "student")


def generate_config(config: RoundsConfig, number: int) -> Json:
    """`teacher-cache build` of the round."""
    teacher = {**_block(config.generate, "teacher"), "model": student_of(config, number)}
    # A preset sets both itself.
    given = _block(config.generate, "sampling")
    # Other seeds each round: a student that has hardly changed would write the same chains again.
    sampling = {**({} if given.get("preset") else ON_POLICY), **given, **_seed(given, number)}
    root = str(round_folder(config, number) / "chains")
    return {**config.generate, "cache": root, "run": "chains", "teacher": teacher, "sampling": sampling}


def score_config(config: RoundsConfig, number: int) -> Json:
    """`teacher-cache score` of the round."""
    folder = round_folder(config, number)
    source = {"kind": "cache", "name": "student", "path": str(folder / "chains")}
    return {**config.score, "cache": str(folder / "scored"), "run": "scored", "completions": {"sources": [source]}}


def train_config(config: RoundsConfig, number: int) -> Json:
    """`student-train run` of the round."""
    folder, data = round_folder(config, number), _block(config.train, "data")
    student = {**_block(config.train, "student"), "model": student_of(config, number)}
    caches = [str(folder / "scored"), *off_policy_caches(config)]
    data = {**data, "caches": caches, "behaviour": [str(folder / "chains")]}
    return {**config.train, "run": str(folder / "run"), "student": student, "data": data}


def off_policy_caches(config: RoundsConfig) -> list[Any]:
    """Entries of train.data.caches: paths, or mappings with a path."""
    caches = _block(config.train, "data").get("caches") or []
    # What is not a list is left for the training configuration to refuse by its key.
    return list(caches) if isinstance(caches, list) else [caches]


def meaning_of_rounds(config: RoundsConfig) -> Json:
    """Dotted keys and values of everything that decides what is learnt, and must stay the same over all rounds."""
    # As rounds.yaml holds them: a date that was not quoted is text there.
    values = plain(config)
    kept = {name: {key: value for key, value in values[name].items() if key not in FREE[name]} for name in FREE}
    return flat({"student": config.student, **kept})


def _seed(sampling: Json, number: int) -> Json:
    seed = sampling.get("seed", 0)
    # What is not a number is left for the command's own configuration to refuse.
    return {"seed": seed + number - 1} if isinstance(seed, int) else {}


def _block(values: Mapping[str, Any], key: str) -> Json:
    block = values.get(key)
    return dict(block) if isinstance(block, Mapping) else {}


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
