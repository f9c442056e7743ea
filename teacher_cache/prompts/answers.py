"""What the teacher has said in a cache, by prompt and sample: paraphrases, translations, solutions."""

from collections import defaultdict

from stillroom.cache.catalog import Catalog
from stillroom.sql.session import open_session
from stillroom.storage.paths import Location


def read_answers(root: Location, max_tokens: int = 0, *, retry: bool = False) -> dict[str, dict[int, str | None]]:
    """Answers of all chains; None for those that were cut off, and for samples that failed. Empty without a cache.

    What was cut off below `max_tokens` has no answer yet, nor, with `retry`, what failed.
    """
    if not (root / "chains" / "_delta_log").is_dir():
        return {}
    catalog = Catalog(root)
    shorter = [run_id for run_id, run in catalog.runs().items() if run.sampling.get("max_tokens", 0) < max_tokens]
    is_open = f"truncated AND run_id IN ({', '.join(map(repr, shorter))})" if shorter else "false"
    with open_session(catalog) as session:
        failed = session.arrow(
            "SELECT prompt_id, sample_index, NULL AS answer FROM failures"
            " WHERE sample_id NOT IN (SELECT sample_id FROM chains)"
        ).to_pylist()
        # Of several runs the newest counts, such as one with a larger max_tokens.
        chains = session.arrow(
            "SELECT prompt_id, sample_index, CASE WHEN NOT truncated THEN answer END AS answer FROM chains"
            f" WHERE NOT ({is_open}) ORDER BY created_at, sample_id"
        ).to_pylist()
    found: defaultdict[str, dict[int, str | None]] = defaultdict(dict)
    for row in (*([] if retry else failed), *chains):
        found[row["prompt_id"]][row["sample_index"]] = row["answer"]
    return found
