"""Chains of another cache, to be looked at by a second teacher, token by token.

In: a source of kind `cache`. Out: rows of its `chains` that a SQL condition picks, as a stream. Where both teachers
have the same vocabulary, `chain_id` joins what they think of the same tokens.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from shared.catalog import Catalog
from shared.errors import ConfigError, CorruptError
from shared.sql import Session
from shared.tokens import came_to_its_end, compare_vocab, special_pieces
from teacher_cache.intake.prompts import WorkerShare
from teacher_cache.score_config import CacheCompletions
from teacher_cache.teacher import IdentifiedTeacher

COLUMNS = (
    "sample_id, sample_index, run_id, source, split, messages, prompt_token_ids, reference, metadata, text, "
    "token_ids, finish_reason"
)
ROWS_PER_BATCH = 256
NUM_SHOWN = 3


class OtherCache:
    """A cache that is read."""

    def __init__(self, source: CacheCompletions, teacher: IdentifiedTeacher) -> None:
        """Raises DataError where there is no cache, ConfigError where the condition is wrong or the tokens mean
        something else to this teacher, CorruptError where a run's manifest is missing.
        """
        self._source = source
        self._catalog = Catalog(source.path)
        with contextlib.ExitStack() as stack:
            self._session = stack.enter_context(Session({"main": self._catalog}))
            condition = "true" if source.where is None else f"({source.where}\n)"
            # The same ones for every worker and every time: without an order DuckDB picks whichever come first.
            limit = "" if source.limit is None else f" ORDER BY sample_id LIMIT {source.limit}"
            picked = self._session.arrow(f"SELECT sample_id FROM chains WHERE {condition}{limit}")
            self._picked: set[str] = set(picked.column("sample_id").to_pylist())
            self._special = {
                run_id: special_pieces(self._catalog.vocab_path(run.teacher.tokenizer_fingerprint))
                for run_id, run in self._catalog.runs().items()
            }
            if not source.retokenise:
                self._require_same_tokens(teacher)
            stack.pop_all()

    def close(self) -> None:
        """Ends its session."""
        self._session.close()

    def count(self, share: WorkerShare) -> int:
        """How many chains are picked whose sample_id falls to the share."""
        return sum(sample_id in share for sample_id in self._picked)

    def judges(self) -> set[str]:
        """Kinds of checks that the picked chains' prompts name."""
        query = "SELECT sample_id, json_extract_string(metadata, '$.judge') AS kind FROM shards"
        return {row["kind"] for row in self._rows(query) if row["kind"] is not None}

    def chains(self, share: WorkerShare) -> Iterator[dict[str, Any]]:
        """Rows with `metadata` as a dictionary that also says which sample of which source and run this was, and
        `stopped`: whether the chain came to its own end.
        """
        for row in self._rows(f"SELECT {COLUMNS} FROM shards"):
            if row["sample_id"] in share:
                origin = {name: row[name] for name in ("sample_id", "run_id", "source")}
                row["metadata"] = {**json.loads(row["metadata"]), "scored_from": origin}
                last_piece = self._special.get(row["run_id"], {}).get(row["token_ids"][-1])
                row["stopped"] = came_to_its_end(row["finish_reason"], row["text"], last_piece)
                yield row

    def _rows(self, query: str) -> Iterator[dict[str, Any]]:
        """Rows of the picked chains, a batch of them in memory."""
        for batch in self._session.batches(query, ROWS_PER_BATCH):
            yield from (row for row in batch.to_pylist() if row["sample_id"] in self._picked)

    def _require_same_tokens(self, teacher: IdentifiedTeacher) -> None:
        runs = {row["run_id"] for row in self._rows("SELECT sample_id, run_id FROM shards")}
        manifests = self._catalog.runs()
        lost = runs - manifests.keys()
        if lost:
            raise CorruptError(
                f"source {self._source.name}: {self._source.path}/runs/{min(lost)}.json is missing: nobody "
                "could say what its tokens are"
            )
        fingerprints = {manifests[run_id].teacher.tokenizer_fingerprint for run_id in runs}
        for fingerprint in sorted(fingerprints - {teacher.record.tokenizer_fingerprint}):
            difference = compare_vocab(self._catalog.vocab_path(fingerprint), teacher.tokenizer)
            differing = [*difference.ordinary, *difference.special]
            if differing:
                shown = ", ".join(f"{i} is {one!r} there and {other!r} here" for i, one, other in differing[:NUM_SHOWN])
                raise ConfigError(
                    f"source {self._source.name}: {len(differing)} tokens of {self._source.path} mean something else "
                    f"to {teacher.record.model} ({shown}): set retokenise: true to score the chains' text instead"
                )
