"""Whether all of a student's teachers are one: chains of two teachers that are said to be one teach neither."""

from collections.abc import Iterator, Mapping

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, DataError
from stillroom.rounds.config import RoundsConfig, off_policy_caches
from stillroom.schema.manifest import RunManifest, Teacher
from stillroom.storage.paths import location

FINGERPRINTS = {
    "tokenizer_fingerprint": "tokenizer",
    "template_fingerprint": "chat template",
    "weights_fingerprint": "weights",
}


def refuse_other_teacher(config: RoundsConfig, teacher: Teacher) -> None:
    """Raises ConfigError naming what differs between `teacher`, which scores, and the teachers of train.data.caches.

    Caches that this machine cannot reach are left to the other one.
    """
    if config.allow_other_teacher:
        return
    for root, manifest in _manifests(config):
        other = manifest.teacher
        different = [name for key, name in FINGERPRINTS.items() if getattr(other, key) != getattr(teacher, key)]
        if different:
            raise ConfigError(
                f"score.teacher is {teacher.model}, but run {manifest.run_id} of {root} in train.data.caches is of "
                f"{other.model} with other {' and '.join(different)}: score with that teacher, or set "
                "allow_other_teacher: true"
            )


def _manifests(config: RoundsConfig) -> Iterator[tuple[str, RunManifest]]:
    for cache in off_policy_caches(config):
        root = cache.get("path") if isinstance(cache, Mapping) else cache
        try:
            runs = Catalog(location(str(root))).runs()
        except DataError:
            continue
        for manifest in runs.values():
            yield str(root), manifest
