"""What the teacher has said in a cache, by prompt and sample: paraphrases, translations, solutions."""

from collections import defaultdict

from stillroom.cache.catalog import Catalog
from stillroom.sql.session import open_session
from stillroom.storage.paths import Location


def read_answers(root: Location) -> dict[str, dict[int, str | None]]:
    """Answers of all chains; None for those that were cut off, and for samples that failed. Empty without a cache."""
    if not (root / "chains" / "_delta_log").is_dir():
        return {}
    with open_session(Catalog(root)) as session:
        failed = session.arrow("SELECT prompt_id, sample_index, NULL AS answer FROM failures").to_pylist()
        # Of several runs the newest counts, such as one with a larger max_tokens.
        chains = session.arrow(
            "SELECT prompt_id, sample_index, CASE WHEN NOT truncated THEN answer END AS answer FROM chains"
            " ORDER BY created_at, sample_id"
        ).to_pylist()
    found: defaultdict[str, dict[int, str | None]] = defaultdict(dict)
    for row in (*failed, *chains):
        found[row["prompt_id"]][row["sample_index"]] = row["answer"]
    return found
