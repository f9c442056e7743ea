"""Checks and starts the engine that a configuration names."""

from stillroom.config import Json
from stillroom.log import note
from teacher_cache.config import BuildConfig, EmbeddedConfig, OpenAIConfig, ScoreConfig, ServerConfig, extra_sampling
from teacher_cache.engine.api import Engine
from teacher_cache.engine.switches import check_names, note_unknown
from teacher_cache.engine.teacher import IdentifiedTeacher
from teacher_cache.prompts.prompts import sampling_of


def check_values(config: BuildConfig | ScoreConfig) -> None:
    """Raises ConfigError for names and values that the installed vLLM does not take. For before prompts are read, which
    may take minutes.
    """
    if isinstance(config.engine, EmbeddedConfig):
        # Of a configuration that was made in Python, nobody has seen the names before.
        check_names("engine", config.engine.vllm)
        check_names("sampling", extra_sampling(config))
        from teacher_cache.engine.vllm.arguments import check_values as check_values_of_vllm

        check_values_of_vllm(config.engine, extra_sampling(config))


def start_engine(
    config: BuildConfig | ScoreConfig, teacher: IdentifiedTeacher, tokens_left: float | None = None
) -> Engine:
    """`tokens_left`: about how many it will generate. Raises ConfigError or StillroomError if it does not start."""
    engine = config.engine
    if isinstance(engine, ServerConfig):
        from teacher_cache.engine.http.server import ServerEngine

        note(f"connecting to {', '.join(engine.endpoints)}")
        note_unknown("sampling", extra_sampling(config))
        return ServerEngine(engine, teacher.record, teacher.tokenizer, config.capture, extra_sampling(config))
    if isinstance(engine, OpenAIConfig):
        from teacher_cache.engine.http.openai import OpenAIChat, OpenAIEngine

        note(f"connecting to {engine.endpoint}")
        if engine.signals == "none":
            note("engine.signals: none stores text without distributions: students train on it with data.kind: text")
        template_kwargs = config.teacher.chat_template_kwargs
        chat = OpenAIChat(engine, teacher, config.capture, config.reasoning, template_kwargs)
        return OpenAIEngine(engine, teacher.record.vocab_size, chat, _samplings(config))
    from teacher_cache.engine.vllm.engine import EmbeddedEngine

    # Load the commit that was fingerprinted, even if the branch has moved on since.
    pinned = config.teacher.updated(revision=teacher.record.revision)
    return EmbeddedEngine(
        pinned,
        engine,
        config.capture,
        scores=isinstance(config, ScoreConfig),
        sampling=_samplings(config),
        tokens_left=tokens_left,
    )


def _samplings(config: BuildConfig | ScoreConfig) -> list[Json]:
    """Sampling parameters of each source."""
    if isinstance(config, ScoreConfig):
        return []
    return [sampling_of(config.sampling, source) for source in config.prompts.sources]
