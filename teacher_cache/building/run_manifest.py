"""What describes a run: its id, its manifest and vocabulary, and the header of its shards."""

import time

from stillroom.cache.catalog import Catalog
from stillroom.cache.shards import open_shard
from stillroom.config import Json, plain
from stillroom.log import note, warn
from stillroom.models import write_vocab
from stillroom.schema.manifest import RunManifest, ShardHeader, Teacher, run_id_for
from teacher_cache.config import BuildConfig, ScoreConfig, extra_sampling
from teacher_cache.engine.api import EngineInfo
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.scrub.settings import manifest_entries
from teacher_cache.writer.recorder import explained


def run_id_of(config: BuildConfig | ScoreConfig, teacher: Teacher) -> str:
    """`<run>_<8 hex>`: a different teacher, capture, reasoning, sampling or argument of the chat template makes a
    different run, and so does scoring; more prompts, samples or completions do not.
    """
    capture, reasoning = plain(config.capture), plain(config.reasoning)
    template = plain(config.teacher)["chat_template_kwargs"]
    return run_id_for(config.run, _kind(config), teacher.fingerprint, _sampling(config), capture, reasoning, template)


class RunDescription:
    """The files beside a run's shards that they refer to, and their header."""

    def __init__(self, catalog: Catalog, config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher) -> None:
        self._catalog, self._config, self._teacher = catalog, config, teacher
        self._run_id = run_id_of(config, teacher.record)

    def write(self, info: EngineInfo) -> None:
        """Writes manifest and vocabulary, before the first row refers to them."""
        try:
            known = self._catalog.runs().get(self._run_id)
            self._catalog.write_run(self._manifest(known, info))
            self._write_vocab()
        except OSError as error:
            raise explained(error) from error
        if known is not None:
            _warn_of_other_entropies(known, info)

    def restore(self) -> None:
        """Rewrites a missing manifest or vocabulary of a finished cache. No engine runs then, so the manifest lacks
        what the engine resolves at startup.
        """
        shards = [file for file in self._catalog.chains.files() if file.path.startswith(f"{self._run_id}/")]
        if not shards:
            return
        try:
            if (self._config.cache / "runs" / f"{self._run_id}.json").exists():
                self._write_vocab()
                return
            parquet, header = open_shard(self._catalog.chains.path_of(shards[0]))
            parquet.close()
        except OSError as error:
            raise explained(error) from error
        self.write(EngineInfo(header.vocab_size, 0, header.entropy, {}, {}))
        note(f"rewrote runs/{self._run_id}.json, which was missing")

    def header(self, info: EngineInfo, worker: str) -> ShardHeader:
        """The header of the shards that a worker writes."""
        capture, teacher = self._config.capture, self._teacher.record
        return ShardHeader(
            codec=capture.codec,
            # Readers check counts against the header, and a small vocabulary has fewer candidates than were asked for.
            max_support=min(capture.max_support, info.vocab_size),
            nucleus=capture.nucleus,
            draws=capture.draws,
            temperatures=capture.temperatures,
            entropy=info.entropy,
            vocab_size=info.vocab_size,
            run_id=self._run_id,
            worker=worker,
            teacher_fingerprint=teacher.fingerprint,
            tokenizer_fingerprint=teacher.tokenizer_fingerprint,
            template_fingerprint=teacher.template_fingerprint,
        )

    def _manifest(self, known: RunManifest | None, info: EngineInfo) -> RunManifest:
        config, teacher = self._config, self._teacher.record
        return RunManifest(
            run_id=self._run_id,
            name=config.run,
            kind=_kind(config),
            # A resumed run keeps its age; all else describes its newest start.
            created_at=known.created_at if known else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            teacher=teacher.model_copy(update={"vocab_size": info.vocab_size}),
            sampling=_sampling(config),
            capture=plain(config.capture),
            engine={**plain(config.engine), **info.settings},
            prompts={
                **plain(config.prompts if isinstance(config, BuildConfig) else config.completions),
                **manifest_entries(known, config.scrub),
            },
            reasoning=plain(config.reasoning),
            chat_template_kwargs=plain(config.teacher)["chat_template_kwargs"],
            software=dict(info.software),
        )

    def _write_vocab(self) -> None:
        path = self._catalog.vocab_path(self._teacher.record.tokenizer_fingerprint)
        if not path.exists():
            write_vocab(path, self._teacher.tokenizer)


def _kind(config: BuildConfig | ScoreConfig) -> str:
    return "generate" if isinstance(config, BuildConfig) else "score"


def _sampling(config: BuildConfig | ScoreConfig) -> Json:
    """As in the manifest: settings that decide tokens, vLLM's own among them where there are any."""
    engine = {"engine": config.engine.switches} if config.engine.switches else {}
    if isinstance(config, ScoreConfig):
        return engine
    return {**plain(config.sampling.updated(vllm=extra_sampling(config))), **engine}


def _warn_of_other_entropies(known: RunManifest, info: EngineInfo) -> None:
    """Warns if the run was started with the sampler plugin and continues without it, or the other way round."""
    before, now = known.engine.get("sampler"), info.settings.get("sampler")
    if before is not None and now is not None and before != now:
        kinds = {"plugin": "exact entropies", "vllm": "entropies of the stored support"}
        warn(
            f"run {known.run_id} was started with {kinds.get(before, before)} and continues with "
            f"{kinds.get(now, now)}: each shard's header says which it holds"
        )
