"""Prompts of a build: sources to distinct, split and shuffled prompts, and prompts to requests.

In: the `prompts` and `sampling` blocks of the configuration. Out: Prompts in processing order, the rows that were left
out and why, and a lazy stream of Requests.

Everything decided about a prompt (id, split, position, worker, seeds) is a hash of the prompt itself, so adding prompts
or samples never changes the split, seed or order of existing ones. All first samples come before any second sample, so
that a half-built cache is a fair sample of the whole.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from stillroom.errors import ConfigError, DataError, one_line
from stillroom.schema.records import Message, Prompt, prompt_id_of, sample_id_of, stable_hash
from teacher_cache.config import BuildConfig, PromptsConfig, SamplingConfig, Source
from teacher_cache.engine.api import Failure, Request
from teacher_cache.prompts.decontaminate import Contaminated, EvaluationTexts
from teacher_cache.prompts.sources import Draft, read_source

TOKENIZE_BATCH = 512
"""Prompts tokenised at once: enough to keep every core busy, few enough to start the engine soon."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What chat templates raise for a conversation that they do not accept."""

NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values without effect. They are left out of sample ids, so that a setting added later changes no existing id."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row whose messages equal those of an earlier row, which was kept."""

    where: str
    kept: str


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """Distinct prompts in processing order, and every row that is not among them."""

    prompts: list[Prompt]
    failures: list[Failure]
    duplicates: list[Duplicate]
    contaminated: list[Contaminated]


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """Worker `index` (from 0) of `count`, which processes the prompts whose hash falls to it."""

    index: int
    count: int

    def __contains__(self, prompt_id: str) -> bool:
        return _uniform_64("worker", prompt_id) % self.count == self.index


WHOLE = WorkerShare(0, 1)


def parse_worker(text: str) -> WorkerShare:
    """`I/N` with I from 0 to N-1. Raises ConfigError for anything else."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise ConfigError(f"--worker {text!r} is not I/N with I from 0 to N-1, for example 0/4 for the first of four")
    return WorkerShare(int(index), int(count))


def load_prompts(config: PromptsConfig) -> LoadedPrompts:
    """Reads every source. Raises DataError for a source that cannot be read or has no usable prompt."""
    evaluation = None if config.decontaminate is None else EvaluationTexts(config.decontaminate)
    loaded = LoadedPrompts([], [], [], [])
    places: dict[str, str] = {}
    for source in config.sources:
        num_drafts, num_failures = 0, len(loaded.failures)
        for row in read_source(source):
            if isinstance(row, Failure):
                loaded.failures.append(row)
            else:
                num_drafts += 1
                _add(row, source, config.heldout_frac, evaluation, places, loaded)
        if num_drafts == 0:
            raise DataError(_empty_source(source, loaded.failures[num_failures:]))
    # By hash rather than by shuffling: prompts added later do not change the order of the others.
    loaded.prompts.sort(key=lambda prompt: stable_hash("order", config.seed, prompt.prompt_id))
    return loaded


def num_requests(config: BuildConfig, prompts: Iterable[Prompt], worker: WorkerShare = WHOLE) -> int:
    """Number of chains that the configuration asks for."""
    samples = _samples_by_source(config)
    return sum(samples[prompt.source] for prompt in prompts if prompt.prompt_id in worker)


def requests(
    config: BuildConfig,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    teacher_fingerprint: str,
    worker: WorkerShare = WHOLE,
) -> Iterator[Request | Failure]:
    """One Request per chain: sample 0 of all prompts of this worker, then sample 1, and so on.

    `tokenizer` is a transformers tokenizer with a chat template (ConfigError if it has none). A prompt that the
    template refuses is a Failure, once per sample.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer of {config.teacher.model} has no chat template: use an instruction-tuned teacher, "
            "or add a chat_template.jinja to its folder"
        )
    sampling = {source.name: sampling_of(config.sampling, source) for source in config.prompts.sources}
    samples = _samples_by_source(config)
    remaining = [prompt for prompt in prompts if prompt.prompt_id in worker]
    # Later samples reuse the prompt's tokens: four bytes a token are cheaper than tokenising again.
    tokens: dict[str, array[int] | str] = {}
    for sample_index in range(max(samples.values())):
        remaining = [prompt for prompt in remaining if sample_index < samples[prompt.source]]
        for start in range(0, len(remaining), TOKENIZE_BATCH):
            batch = remaining[start : start + TOKENIZE_BATCH]
            if sample_index == 0:
                rows = tokenize(tokenizer, batch, config.teacher.chat_template_kwargs)
                tokens |= {
                    prompt.prompt_id: ids if isinstance(ids, str) else array("i", ids)
                    for prompt, ids in zip(batch, rows, strict=True)
                }
            for prompt in batch:
                ids = tokens[prompt.prompt_id]
                if isinstance(ids, str):
                    failed_id = stable_hash("template", prompt.prompt_id, sample_index)
                    yield template_failure(prompt, failed_id, sample_index, ids)
                else:
                    settings, seed = sampling[prompt.source], config.sampling.seed
                    yield _request(prompt, ids.tolist(), sample_index, settings, seed, teacher_fingerprint)


def tokenize(tokenizer: Any, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any]) -> list[list[int] | str]:
    """Token ids of each prompt with the assistant's turn opened, or why the chat template refuses it."""
    chats = [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]
    try:
        return list(_apply_template(tokenizer, chats, template_kwargs))
    except TEMPLATE_ERRORS:
        # One refused prompt fails the whole batch: find it.
        return [_tokenize_one(tokenizer, chat, template_kwargs) for chat in chats]


def template_failure(prompt: Prompt, sample_id: str, sample_index: int, message: str) -> Failure:
    """The failure of a prompt that the chat template refuses."""
    return Failure(sample_id, prompt.prompt_id, prompt.source, sample_index, "chat_template", message)


def sampling_of(config: SamplingConfig, source: Source) -> dict[str, Any]:
    """Sampling parameters for one source: its own where set, else those of the `sampling` block."""
    return {
        "temperature": config.temperature if source.temperature is None else source.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "max_tokens": config.max_tokens if source.max_tokens is None else source.max_tokens,
    }


def seed_of(base_seed: int, prompt_id: str, sample_index: int) -> int:
    """The request's seed, 0 to 2^63-1: it depends on the prompt and sample, not on when or where they run."""
    return _uniform_64("seed", base_seed, prompt_id, sample_index) >> 1


def prompt_of(draft: Draft, source: str, system: str | None, instruction: str | None, heldout_frac: float) -> Prompt:
    """The draft with its system message and instruction, and the split that its hash decides."""
    messages = list(draft.messages)
    if system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system))
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if instruction is not None and last_user is not None:
        messages[last_user] = Message("user", f"{messages[last_user].content}\n\n{instruction}")
    prompt_id = prompt_id_of(messages)
    # By hash, a prompt's split never depends on what else is in the configuration.
    split = "heldout" if _uniform_64("split", prompt_id) < heldout_frac * 2.0**64 else "train"
    return Prompt(prompt_id, tuple(messages), source, split, draft.reference, draft.metadata)


def _add(
    draft: Draft,
    source: Source,
    heldout_frac: float,
    evaluation: EvaluationTexts | None,
    places: dict[str, str],
    loaded: LoadedPrompts,
) -> None:
    """Adds one draft to `loaded`; `places` maps the prompt_id of each kept prompt to its place."""
    where = f"{source.name} {draft.where}"
    # The draft, not the finished prompt: an instruction that all prompts share is not an overlap.
    against = None if evaluation is None else evaluation.overlap(draft.messages)
    prompt = prompt_of(draft, source.name, source.system, source.instruction, heldout_frac)
    if against is not None:
        loaded.contaminated.append(Contaminated(where, against))
    elif prompt.prompt_id in places:
        loaded.duplicates.append(Duplicate(where, places[prompt.prompt_id]))
    else:
        places[prompt.prompt_id] = where
        loaded.prompts.append(prompt)


def _request(
    prompt: Prompt,
    prompt_token_ids: list[int],
    sample_index: int,
    sampling: dict[str, Any],
    base_seed: int,
    teacher_fingerprint: str,
) -> Request:
    seed = seed_of(base_seed, prompt.prompt_id, sample_index)
    effective = {name: value for name, value in sampling.items() if (name, value) not in NEUTRAL_SAMPLING.items()}
    return Request(
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        sample_index=sample_index,
        seed=seed,
        sampling=sampling,
        max_tokens=sampling["max_tokens"],
        sample_id=sample_id_of(teacher_fingerprint, prompt_token_ids, effective, seed, sample_index),
    )


def _apply_template(tokenizer: Any, chats: list[Any], template_kwargs: Mapping[str, Any]) -> list[list[int]]:
    encoded = tokenizer.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, return_dict=True, **template_kwargs
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _tokenize_one(tokenizer: Any, chat: list[dict[str, str]], template_kwargs: Mapping[str, Any]) -> list[int] | str:
    try:
        return _apply_template(tokenizer, [chat], template_kwargs)[0]
    except TEMPLATE_ERRORS as error:
        return f"the chat template refuses the prompt: {one_line(error)}"


def _samples_by_source(config: BuildConfig) -> dict[str, int]:
    return {source.name: source.samples or config.sampling.samples for source in config.prompts.sources}


def _empty_source(source: Source, failures: Sequence[Failure]) -> str:
    if not failures:
        return f"source {source.name} holds no rows"
    first = failures[0].message
    return f"source {source.name} has no usable prompt: all {len(failures)} rows are malformed, first {first}"


def _uniform_64(*parts: object) -> int:
    return int(stable_hash(*parts)[:16], 16)
