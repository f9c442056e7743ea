"""Whether the student's tokenizer is the cache's, id by id."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillroom.cache.catalog import Catalog
from stillroom.errors import ConfigError, naming
from stillroom.models import (
    compare_vocab,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprints_from_files,
    load_tokenizer,
    require_same_vocab,
    vocab_size_of,
)
from stillroom.storage.paths import Location
from student_train.config.run import StudentConfig
from student_train.data.kept_ids import ids_of, read_kept_ids
from student_train.data.selection import Selection
from student_train.model.shape import read_config

SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class Vocabulary:
    """What the student's tokenizer has to do with the cache's. `notes` are lines for the person who watches."""

    num_ids: int
    """Rows that the student's embeddings must have."""
    notes: list[str]


def check_vocabulary(student: StudentConfig, selection: Selection, caches: Sequence[Location]) -> Vocabulary:
    """Compares the student's tokenizer with the cache's.

    Equal fingerprints are fine. Otherwise ordinary ids must agree; special tokens may differ, and so may the number of
    embedding rows. Raises ConfigError naming the ids where they do not.
    """
    config = read_config(student)
    with naming("student.model"):
        width = (
            vocab_size_of(student.model, student.revision, student.trust_remote_code)
            if config is None
            else int(config["vocab_size"])
        )
    if selection.is_retokenised:
        return Vocabulary(width, [])
    if selection.header.kept_ids is not None:
        return _cut_vocabulary(student, selection)
    # Embeddings of one family are padded differently: Qwen2.5 has 151936 rows at 1.5B, 152064 at 7B.
    num_ids = max(width, selection.header.vocab_size)
    notes = []
    if width < num_ids:
        notes.append(
            f"{student.model} has {width} embedding rows, the cache's ids go up to {num_ids - 1}: "
            f"{num_ids - width} rows are added, each the mean of the others"
        )
    cached = selection.header.tokenizer_fingerprints[0]
    # Reading two JSON files takes milliseconds, importing transformers to load the tokenizer seconds.
    found = fingerprints_from_files(student.model)
    if found is None or found[0] != cached:
        with naming("student.model"):
            tokenizer = load_tokenizer(student.model, student.revision, student.trust_remote_code)
        found = fingerprint_tokenizer(tokenizer), fingerprint_template(tokenizer)
    if found[0] == cached:
        if selection.header.template_fingerprints != [found[1]]:
            notes.append("the student's chat template differs from the cache's: the student learns the cache's")
        return Vocabulary(num_ids, notes)
    difference = compare_vocab(_vocab_path(caches, cached), tokenizer)
    require_same_vocab(difference, student.model)
    notes.append(
        f"the student adopts the cache's tokenizer; {len(difference.special)} special tokens differ"
        + "".join(f"; id {i}: {mine!r} for {other!r}" for i, mine, other in difference.special[:SHOWN_DIFFERENCES])
        + (", ..." if len(difference.special) > SHOWN_DIFFERENCES else "")
    )
    return Vocabulary(num_ids, notes)


def _cut_vocabulary(student: StudentConfig, selection: Selection) -> Vocabulary:
    """Of a student that keeps some of the cache's ids. Raises ConfigError where it was cut for another tokenizer."""
    kept = read_kept_ids(student.model)
    if kept is None or kept.packed != selection.header.kept_ids:
        raise ConfigError(
            f"{student.model} has a different vocabulary than when the run started: choose another run folder"
        )
    if selection.header.tokenizer_fingerprints != [kept.tokenizer_fingerprint]:
        raise ConfigError(f"{student.model} was cut for a cache of another tokenizer: train it from that cache")
    num_ids = len(ids_of(kept.packed))
    tail = "" if kept.has_all_stored else "; the others' mass in distributions counts as tail"
    return Vocabulary(num_ids, [f"the student keeps {num_ids} of the cache's ids{tail}"])


def _vocab_path(caches: Sequence[Location], fingerprint: str) -> Location:
    paths = [Catalog(root).vocab_path(fingerprint) for root in caches]
    for path in paths:
        if path.exists():
            return path
    raise ConfigError(f"{paths[0]} is missing, and the student's tokenizer is not the cache's: copy the whole cache")
