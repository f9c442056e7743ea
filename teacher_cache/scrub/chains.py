"""Checks generated chains for personal data before they become rows.

A chain's distributions belong to its tokens, and the candidates of a token may spell what was sampled there. So nothing
in a chain is replaced: it is dropped, or cut before the first token of the first finding, which leaves tokens and
distributions as the engine gave them. A dropped chain is a failure that names kinds and counts, never a text.
"""

import bisect
import dataclasses
import re
from collections import Counter

from stillroom.schema.records import Capture
from teacher_cache.engine.api import Failure, Finished
from teacher_cache.scrub.config import ScrubConfig
from teacher_cache.scrub.counts import counted, is_made_up
from teacher_cache.scrub.recognisers import Recognisers, TooSlow
from teacher_cache.writer.rows import ChainRow, RowMaker

REASON = "personal_data"
CUT_KEY = "scrub_cut"
QUOTED_BYTES = re.compile(r"\bb(['\"])(?:\\.|(?!\1).)*\1")
"""How failures quote a token."""


class ChainCheck:
    """Makes rows of finished chains, or failures of those with personal data."""

    def __init__(self, config: ScrubConfig, recognisers: Recognisers) -> None:
        self._config, self._recognisers = config, recognisers

    def row(self, finished: Finished, rows: RowMaker) -> ChainRow | Failure:
        """The row, a shorter one, or a failure. Raises StillroomError as the row maker does."""
        row, prompt = rows.row(finished), finished.request.prompt
        # Generated tasks name persons, and answers repeat them.
        known = " ".join(one.content for one in prompt.messages) if is_made_up(prompt.metadata) else ""
        try:
            (found,) = self._recognisers.find([row.text], self._config.kinds_of_chains)
        except TooSlow as error:
            # Not an error of the build, which would generate the same chain again.
            return finished.request.failure(REASON, str(error))
        found = [one for one in found if row.text[one.start : one.stop] not in known]
        if not found:
            return row
        counts = Counter(one.kind for one in found)
        num_kept = _num_before(row, found[0].start, rows) if self._config.chains == "cut" else 0
        if num_kept == 0:
            remedy = "" if self._config.chains == "cut" else ": scrub.chains: cut keeps the tokens before it"
            return finished.request.failure(REASON, f"the chain contains personal data ({counted(counts)}){remedy}")
        metadata = {**prompt.metadata, CUT_KEY: dict(sorted(counts.items()))}
        request = dataclasses.replace(finished.request, prompt=dataclasses.replace(prompt, metadata=metadata))
        return rows.row(Finished(request, _first(finished.capture, num_kept), "length"))

    def failure(self, failure: Failure) -> Failure:
        """The failure without personal data: engines quote tokens of a chain, and servers what they were sent."""
        # A token is a part of a name or number, which no recogniser knows.
        text = QUOTED_BYTES.sub("<TOKEN>", failure.message)
        (found,) = self._recognisers.find([text], self._config.kinds)
        message, place = "", 0
        for one in found:
            message += f"{text[place : one.start]}<{one.kind.upper()}>"
            place = one.stop
        return dataclasses.replace(failure, message=message + text[place:])


def _num_before(row: ChainRow, start: int, rows: RowMaker) -> int:
    """Tokens whose text ends at or before a character of the chain's text."""
    ids = row.token_ids.tolist()
    num = bisect.bisect_right(range(len(ids) + 1), start, key=lambda num: len(rows.text(ids[:num]))) - 1
    # Half of a character decodes to a replacement sign, which the chain's text does not have there.
    while num and not row.text.startswith(rows.text(ids[:num])):
        num -= 1
    return num


def _first(capture: Capture, num: int) -> Capture:
    arrays = ((one.name, getattr(capture, one.name)) for one in dataclasses.fields(capture))
    return dataclasses.replace(capture, **{name: array[:num] for name, array in arrays if array is not None})
