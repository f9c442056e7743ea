"""What scrubbing does not replace: texts of the configuration itself, and chains that a cache holds already.

A configuration's own texts (system messages, instructions, templates) are sent with every prompt and stored in the
run's manifest. They are refused rather than replaced: a placeholder in an instruction would change what it says.
"""

import datetime
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stillroom.cache.catalog import Catalog
from stillroom.config import Json, plain
from stillroom.errors import ConfigError
from stillroom.log import format_plural, warn
from stillroom.schema.manifest import RunManifest
from stillroom.sql.session import open_session
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.scrub.config import ScrubConfig
from teacher_cache.scrub.counts import counted
from teacher_cache.scrub.recognisers import Recognisers
from teacher_cache.scrub.rows import Scrubber

TEXTS = {"system", "instruction", "where", "prompt", "text", "choices", "answer", "expression", "conditions"}
"""Keys of a configuration that hold texts a person wrote."""
FREE = {"chat_template_kwargs", "parameters", "vllm"}
"""Blocks of which every text counts."""
KEY, SINCE = "scrub", "scrubbed_since"
"""In a manifest's `prompts`: the setting, and when it was switched on if the run had chains before."""


def scrubber_of(config: BuildConfig | ScoreConfig) -> Scrubber | None:
    """Raises ConfigError if a recogniser is not installed, or if the configuration itself contains personal data."""
    if config.scrub is None:
        return None
    scrubber = Scrubber(config.scrub)
    require_clean_settings(config, scrubber.recognisers)
    return scrubber


def require_clean_settings(config: BuildConfig | ScoreConfig, recognisers: Recognisers) -> None:
    """Raises ConfigError for a text of the configuration that contains personal data, without quoting it."""
    data = plain(config)
    texts = [*_texts({name: value for name, value in data.items() if name != KEY}, "", is_text=False)]
    for (path, text), found in zip(
        texts, recognisers.find([text for _, text in texts], recognisers.kinds), strict=True
    ):
        if found:
            places = ", ".join(f"{one.start + 1}-{one.stop}" for one in found[:3])
            raise ConfigError(
                f"{path} contains personal data ({counted(Counter(one.kind for one in found))}; characters {places} of "
                f"{len(text)}), and texts of the configuration are sent and stored as they are: remove it, or list it "
                "in scrub.allowed"
            )


def manifest_entries(known: RunManifest | None, scrub: ScrubConfig | None) -> Json:
    """What a run's manifest says about scrubbing; `known` is the manifest so far."""
    if scrub is None:
        return {}
    since = None if known is None else known.prompts.get(SINCE)
    if known is not None and not _covers(known.prompts.get(KEY), scrub):
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return {KEY: plain(scrub), **({} if since is None else {SINCE: since})}


def unscrubbed_chains(catalog: Catalog, scrub: ScrubConfig) -> Counter[str]:
    """Chains by run that may contain what `scrub` replaces, because they were stored without it."""
    counts: Counter[str] = Counter()
    for run_id, run in catalog.runs().items():
        files = [file for file in catalog.chains.files() if file.path.startswith(f"{run_id}/")]
        since = run.prompts.get(SINCE)
        if not _covers(run.prompts.get(KEY), scrub):
            counts[run_id] += sum(file.num_rows for file in files)
        elif since is not None and files:
            with open_session(catalog) as session:
                query = f"SELECT count(*) AS num FROM chains WHERE run_id = '{run_id}' AND created_at < '{since}'"
                counts[run_id] += session.arrow(query).column("num").to_pylist()[0]
    return +counts


def warn_of_unscrubbed(config: BuildConfig | ScoreConfig) -> None:
    """Warns of chains that the cache holds without this `scrub` setting."""
    if config.scrub is None or not (config.cache / "chains" / "_delta_log").is_dir():
        return
    if old := unscrubbed_chains(Catalog(config.cache), config.scrub):
        warn(unscrubbed_problem(old, config.cache))


def unscrubbed_problem(counts: Counter[str], cache: Any) -> str:
    """One line for a person."""
    drop = " ".join(f"--drop-run {run_id}" for run_id in sorted(counts))
    return (
        f"{cache} holds {format_plural(counts.total(), 'chain')} stored without this scrub setting, which may contain "
        f"personal data: build into a new cache, or remove them: teacher-cache gc {cache} {drop} --delete-removed"
    )


def _covers(old: Any, new: ScrubConfig) -> bool:
    """Whether what `old` replaced includes all that `new` replaces. Chains may be cut or dropped, it is the same."""
    if not isinstance(old, dict):
        return False
    before, now = ScrubConfig.model_validate(old), new
    return (
        {*before.kinds} >= {*now.kinds}
        and {*before.kinds_of_chains} >= {*now.kinds_of_chains}
        and {*before.languages} >= {*now.languages}
        and {*before.phone_regions} >= {*now.phone_regions}
        and {*before.allowed} <= {*now.allowed}
    )


def _texts(value: Any, path: str, *, is_text: bool) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, one in value.items():
            inside = f"{path}.{name}" if path else str(name)
            yield from _texts(one, inside, is_text=is_text or name in TEXTS or name in FREE)
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _texts(one, f"{path}[{number}]", is_text=is_text)
    elif is_text and isinstance(value, str):
        yield path, value
