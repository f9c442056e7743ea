"""Whether all of a student's teachers are one: chains of two teachers that are said to be one teach neither.

Compared are the teacher that scores now, those of earlier rounds, and those of train.data.caches.
"""

from collections.abc import Iterator, Mapping

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, DataError
from stillroom.rounds.config import RoundsConfig, off_policy_caches, round_folder
from stillroom.schema.manifest import RunManifest, Teacher
from stillroom.storage.paths import location

FINGERPRINTS = {
    "tokenizer_fingerprint": "tokenizer",
    "template_fingerprint": "chat template",
    "weights_fingerprint": "weights",
    "adapter_fingerprint": "adapter",
}


def refuse_other_teacher(config: RoundsConfig, teacher: Teacher) -> None:
    """Raises ConfigError naming what differs between `teacher`, which scores, and other teachers of the student.

    Caches that this machine cannot reach are left to the other one.
    """
    if config.allow_other_teacher:
        return
    for where, manifest in _manifests(config):
        other = manifest.teacher
        different = [name for key, name in FINGERPRINTS.items() if getattr(other, key) != getattr(teacher, key)]
        if different:
            raise ConfigError(
                f"score.teacher is {teacher.model}, but run {manifest.run_id} of {where} is of {other.model} with "
                f"other {' and '.join(different)}: score with that teacher, or set allow_other_teacher: true"
            )


def refuse_other_scores(config: RoundsConfig, number: int) -> None:
    """The same of the chains that a round trains on, whoever has scored them. Raises ConfigError."""
    for manifest in _runs_of(_scored(config, number)):
        refuse_other_teacher(config, manifest.teacher)


def _manifests(config: RoundsConfig) -> Iterator[tuple[str, RunManifest]]:
    for cache in off_policy_caches(config):
        root = str(cache.get("path") if isinstance(cache, Mapping) else cache)
        for manifest in _runs_of(root):
            yield f"{root} in train.data.caches", manifest
    for number in range(1, config.rounds + 1):
        for manifest in _runs_of(_scored(config, number)):
            yield f"round {number}", manifest


def _scored(config: RoundsConfig, number: int) -> str:
    return str(round_folder(config, number) / "scored")


def _runs_of(root: str) -> list[RunManifest]:
    try:
        return list(Catalog(location(root)).runs().values())
    except DataError:
        return []
