"""What `teacher-cache build` and `score` return and print."""

from dataclasses import dataclass

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.log import format_bytes, format_count, format_duration, format_plural
from teacher_cache.config import BuildConfig, ScoreConfig
from teacher_cache.writer.recorder import Recorded


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What one process did. `seconds` is generation without loading the model; `stopped` says why it ended early."""

    run_id: str
    worker: str
    num_total: int
    num_done_before: int
    num_adopted: int
    recorded: Recorded
    seconds: float
    stopped: str | None

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens per second of generation, None if nothing was generated."""
        return self.recorded.num_tokens / self.seconds if self.recorded.num_tokens else None


def result_json(config: BuildConfig | ScoreConfig, result: BuildResult) -> Json:
    """The result for programs. Totals are of the whole cache, rates of this process."""
    from teacher_cache.inspect.stats import cache_stats

    catalog = Catalog(config.cache)
    stats, run = cache_stats(catalog), catalog.runs().get(result.run_id)
    return {
        "run_id": result.run_id,
        "worker": result.worker,
        "device": None if run is None else run.engine.get("device"),
        "num_wanted": result.num_total,
        "num_done_before": result.num_done_before,
        "num_adopted": result.num_adopted,
        "num_new_chains": result.recorded.num_chains,
        "num_new_tokens": result.recorded.num_tokens,
        "num_failures": result.recorded.num_failures,
        "num_failed": stats.num_failed,
        "failures": stats.failures,
        "failure_example": stats.failure_example,
        "seconds": result.seconds,
        "tokens_per_s": result.tokens_per_s,
        "num_chains": stats.num_chains,
        "num_tokens": stats.num_tokens,
        "bytes_per_token": stats.bytes_per_token,
        "signal_bytes_per_token": stats.signal_bytes_per_token,
        "pass_rate": stats.pass_rate,
        "chains_version": stats.chains_version,
        "stopped": result.stopped,
    }


def result_lines(result: Json, cache: str) -> list[str]:
    """The result for a person."""
    from teacher_cache.inspect.stats import failures_text

    rate = "" if result["tokens_per_s"] is None else f" at {result['tokens_per_s']:.0f} tok/s"
    took = f"{format_count(result['num_new_tokens'])} tokens in {format_duration(result['seconds'])}{rate}"
    others = f"{result['num_failures']} failed, {result['num_done_before']} tried before"
    size = "" if result["bytes_per_token"] is None else f", {result['bytes_per_token']:.1f} B/token"
    total = format_bytes((result["bytes_per_token"] or 0.0) * result["num_tokens"])
    counts = f"{format_plural(result['num_chains'], 'chain')}, {format_count(result['num_tokens'])} tokens"
    reasons = failures_text(result["failures"], result["failure_example"])
    return [
        f"new     {format_plural(result['num_new_chains'], 'chain')}, {took}; {others}",
        f"cache   {cache}: {counts}, {total}{size}",
        *([f"failed  {result['num_failed']:,} in this cache: {reasons}"] if result["num_failed"] else []),
    ]
