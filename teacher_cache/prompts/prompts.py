"""Prompts of a build: sources to distinct, split and shuffled prompts, and prompts to requests.

In: the `prompts` and `sampling` blocks of the configuration. Out: Prompts in processing order, the rows that were left
out and why, and a lazy stream of Requests.

Everything decided about a prompt (id, split, position, worker, seeds) is a hash of the prompt itself, so adding prompts
or samples never changes the split, seed or order of existing ones. All first samples come before any second sample, so
that a half-built cache is a fair sample of the whole.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stillroom.errors import ConfigError, DataError
from stillroom.log import Progress, format_plural
from stillroom.schema.records import Prompt, sample_id_of, stable_hash
from teacher_cache.config import BuildConfig, SamplingConfig
from teacher_cache.engine.api import Failure, Request
from teacher_cache.engine.switches import effective
from teacher_cache.prompts.answers import read_answers
from teacher_cache.prompts.config import DedupeConfig, PromptsConfig, ReasoningGymSource, Source
from teacher_cache.prompts.decontaminate import Contaminated, EvaluationTexts
from teacher_cache.prompts.dedupe import Compared, NearDuplicate, near_duplicates
from teacher_cache.prompts.kept import KeptPrompt, prompt_of, uniform_64
from teacher_cache.prompts.rendering import tokenize
from teacher_cache.prompts.sources import Draft, read_source
from teacher_cache.prompts.variant_config import AugmentConfig
from teacher_cache.prompts.variants import Answers, NoVariant, Question, Variant, variants

if TYPE_CHECKING:
    from teacher_cache.scrub.rows import Scrubber

TOKENIZE_BATCH = 512
"""Prompts tokenised at once: enough to keep every core busy, few enough to start the engine soon."""

MANY_ROWS = 100
"""Unusable rows at the beginning of a source after which it is not read on."""
MIN_SAMPLE = 16
"""Prompts of a source, or all if it has fewer, that are rendered before it is refused."""

NEUTRAL_SAMPLING = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values without effect. They are left out of sample ids, so that a setting added later changes no existing id."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row whose messages equal those of an earlier row, which was kept, with this row's reference if it had none.

    `contradicts` says that both have references, which differ.
    """

    where: str
    kept: str
    contradicts: bool = False

    def __str__(self) -> str:
        return f"{self.where} repeats {self.kept}" + (", whose reference differs" if self.contradicts else "")


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """Distinct prompts in processing order, and every row that is not among them."""

    prompts: list[Prompt]
    failures: list[Failure]
    duplicates: list[Duplicate]
    contaminated: list[Contaminated]
    near_duplicates: list[NearDuplicate] = field(default_factory=list)
    variants: Counter[str] = field(default_factory=Counter)
    """Variants of prompts by kind, and how many there are not by kind and reason."""
    without_variant: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    """Variants for which the teacher must still be asked, by step."""

    def judgeless(self) -> list[tuple[str, int]]:
        """Sources and their numbers of prompts with a reference, which is most likely meant for a judge, and none."""
        return sorted(
            Counter(one.source for one in self.prompts if one.reference and "judge" not in one.metadata).items()
        )


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """Worker `index` (from 0) of `count`, which processes the prompts whose hash falls to it."""

    index: int
    count: int

    def __contains__(self, prompt_id: str) -> bool:
        return uniform_64("worker", prompt_id) % self.count == self.index


WHOLE = WorkerShare(0, 1)

Part = tuple[str, Callable[[], Sequence[Request | Failure]]]
"""What a worker leases: a name that depends on nothing but what is in the part, and its requests, made on demand
(teacher_cache.workers.joining.Leasable).
"""


def part_name(number: int, ids: Iterable[str]) -> str:
    """The name of a part with these prompts or rows. `number` separates parts with the same."""
    return f"{number}-{stable_hash('part', *ids)[:16]}"


def parse_worker(text: str) -> WorkerShare:
    """`I/N` with I from 0 to N-1. Raises ConfigError for anything else."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise ConfigError(f"--worker {text!r} is not I/N with I from 0 to N-1, for example 0/4 for the first of four")
    return WorkerShare(int(index), int(count))


def own_share(worker: str, *, join: bool) -> WorkerShare | None:
    """The share that `worker` names, None to join. Raises ConfigError if both are asked for."""
    share = parse_worker(worker)
    if join and share != WHOLE:
        raise ConfigError("--join shares the work by itself: use either --join or --worker")
    return None if join else share


def load_prompts(config: PromptsConfig, scrubber: "Scrubber | None" = None) -> LoadedPrompts:
    """Reads every source, and makes variants; `scrubber` replaces personal data. Raises DataError for a source that
    cannot be read or has no usable prompt.
    """
    evaluation = None if config.decontaminate is None else EvaluationTexts(config.decontaminate)
    loaded, kept = _read_sources(config, evaluation, scrubber)
    if config.augment is not None:
        _add_variants(config.augment, evaluation, scrubber, kept, loaded)
    loaded.prompts.extend(one.prompt for one in kept.values())
    # By hash rather than by shuffling: prompts added later do not change the order of the others.
    loaded.prompts.sort(key=lambda prompt: stable_hash("order", config.seed, prompt.prompt_id))
    return loaded


def prompts_to_vary(config: PromptsConfig, scrubber: "Scrubber | None" = None) -> list[KeptPrompt]:
    """The prompts that variants are made of. Raises DataError as `load_prompts` does."""
    evaluation = None if config.decontaminate is None else EvaluationTexts(config.decontaminate)
    return [*_read_sources(config, evaluation, scrubber)[1].values()]


def heldout_problem(config: PromptsConfig, prompts: Sequence[Prompt]) -> str | None:
    """Says so if `heldout_frac` holds out none of the prompts."""
    if not config.heldout_frac or any(prompt.split == "heldout" for prompt in prompts):
        return None
    return (
        f"no prompt is held out: prompts.heldout_frac={config.heldout_frac:g} chooses by hash, and chose none of "
        f"{format_plural(len(prompts), 'prompt')}: raise it or add prompts"
    )


def samples_by_source(config: BuildConfig) -> dict[str, int]:
    """Chains per prompt of each source."""
    return {source.name: source.samples or config.sampling.samples for source in config.prompts.sources}


def num_requests(config: BuildConfig, prompts: Iterable[Prompt], worker: WorkerShare = WHOLE) -> int:
    """Number of chains that the configuration asks for."""
    samples = samples_by_source(config)
    return sum(samples[prompt.source] for prompt in prompts if prompt.prompt_id in worker)


def requests(
    config: BuildConfig,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    teacher_fingerprint: str,
    worker: WorkerShare = WHOLE,
) -> Iterator[Request | Failure]:
    """One Request per chain: sample 0 of all prompts of this worker, then sample 1, and so on.

    A prompt that the template refuses or does not render as a whole is a Failure, once per sample; DataError if these
    are most of a source's.
    """
    own = [prompt for prompt in prompts if prompt.prompt_id in worker]
    maker = RequestMaker(config, own, tokenizer, teacher_fingerprint)
    for sample_index, batch in maker.batches(TOKENIZE_BATCH):
        yield from maker.requests(sample_index, batch)


class RequestMaker:
    """Makes the requests of prompts. Later samples reuse the tokens of the first."""

    def __init__(
        self, config: BuildConfig, prompts: Sequence[Prompt], tokenizer: Any, teacher_fingerprint: str
    ) -> None:
        """`tokenizer` is a transformers tokenizer with a chat template; ConfigError if it has none."""
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {config.teacher.model} has no chat template: use an instruction-tuned teacher, "
                "or add a chat_template.jinja to its folder"
            )
        self._config, self._prompts = config, prompts
        self._tokenizer, self._teacher_fingerprint = tokenizer, teacher_fingerprint
        # Engine arguments that may change tokens distinguish samples as sampling parameters do.
        engine = {"engine": config.engine.switches} if config.engine.switches else {}
        self._sampling = {
            source.name: sampling_of(config.sampling, source) | engine for source in config.prompts.sources
        }
        self._check = _TemplateCheck(prompts, config.prompts.max_unusable_frac)
        # Four bytes a token are cheaper than tokenising again.
        self._tokens: dict[str, array[int] | str] = {}

    def batches(self, size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
        """Sample indices with up to `size` prompts that have such a sample: first samples first."""
        samples = samples_by_source(self._config)
        remaining = self._prompts
        for sample_index in range(max(samples.values())):
            remaining = [prompt for prompt in remaining if sample_index < samples[prompt.source]]
            for start in range(0, len(remaining), size):
                yield sample_index, remaining[start : start + size]

    def requests(self, sample_index: int, batch: Sequence[Prompt]) -> Iterator[Request | Failure]:
        """This sample of each prompt. Raises DataError if the template refuses most prompts of a source."""
        new = [prompt for prompt in batch if prompt.prompt_id not in self._tokens]
        rows = tokenize(self._tokenizer, new, self._config.teacher.chat_template_kwargs) if new else []
        self._check.require_most(new, rows)
        self._tokens |= {
            prompt.prompt_id: ids if isinstance(ids, str) else array("i", ids)
            for prompt, ids in zip(new, rows, strict=True)
        }
        for prompt in batch:
            ids = self._tokens[prompt.prompt_id]
            if isinstance(ids, str):
                failed_id = stable_hash("template", prompt.prompt_id, sample_index)
                yield template_failure(prompt, failed_id, sample_index, ids)
            else:
                settings, seed = self._sampling[prompt.source], self._config.sampling.seed
                yield _request(prompt, ids.tolist(), sample_index, settings, seed, self._teacher_fingerprint)


def template_failure(prompt: Prompt, sample_id: str, sample_index: int, message: str) -> Failure:
    """The failure of a prompt that the chat template refuses."""
    where = _place_of(prompt)
    return Failure(sample_id, prompt.prompt_id, prompt.source, sample_index, "chat_template", f"{where}: {message}")


def sampling_of(config: SamplingConfig, source: Source) -> dict[str, Any]:
    """Sampling parameters for one source: its own where set, else those of the `sampling` block."""
    return {
        "temperature": config.temperature if source.temperature is None else source.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p,
        "repetition_penalty": config.repetition_penalty,
        "max_tokens": config.max_tokens if source.max_tokens is None else source.max_tokens,
        **({"vllm": extra} if (extra := effective(config.vllm)) else {}),
    }


def seed_of(base_seed: int, prompt_id: str, sample_index: int) -> int:
    """The request's seed, 0 to 2^63-1: it depends on the prompt and sample, not on when or where they run."""
    return uniform_64("seed", base_seed, prompt_id, sample_index) >> 1


class _TemplateCheck:
    """Counts by source what the chat template refuses. Prompts come shuffled, so the first ones are a fair sample."""

    def __init__(self, prompts: Sequence[Prompt], max_unusable_frac: float) -> None:
        self._num_prompts = Counter(prompt.source for prompt in prompts)
        self._num_seen: Counter[str] = Counter()
        self._num_refused: Counter[str] = Counter()
        self._max_frac = max_unusable_frac

    def require_most(self, prompts: Sequence[Prompt], rows: Sequence[list[int] | str]) -> None:
        """Adds prompts with their token ids or refusals. Raises DataError if too many of a source are refused."""
        self._num_seen.update(prompt.source for prompt in prompts)
        refused = [(prompt, row) for prompt, row in zip(prompts, rows, strict=True) if isinstance(row, str)]
        self._num_refused.update(prompt.source for prompt, _ in refused)
        for prompt, message in refused:
            name = prompt.source
            # A worker's share may hold very few prompts of a source, too few to judge it by.
            is_sample = self._num_seen[name] >= min(MIN_SAMPLE, self._num_prompts[name])
            if is_sample and self._num_refused[name] > self._max_frac * self._num_seen[name]:
                raise DataError(
                    f"source {name}: {self._num_refused[name]} of the first {self._num_seen[name]} prompts cannot be "
                    f"used, first {_place_of(prompt)}: {message} (prompts.max_unusable_frac is the limit)"
                )


def _place_of(prompt: Prompt) -> str:
    """The prompt's row for a person, as far as its metadata says."""
    unit = next((unit for unit in ("line", "row", "index") if unit in prompt.metadata), None)
    return f"source {prompt.source}" + (f", {unit} {prompt.metadata[unit]}" if unit is not None else "")


def _read_sources(
    config: PromptsConfig, evaluation: EvaluationTexts | None, scrubber: "Scrubber | None"
) -> tuple[LoadedPrompts, dict[str, KeptPrompt]]:
    loaded = LoadedPrompts([], [], [], [])
    kept: dict[str, KeptPrompt] = {}
    for source in config.sources:
        num_drafts, first_failure = 0, len(loaded.failures)
        for row, against in _read(source, evaluation, scrubber):
            if isinstance(row, Failure):
                loaded.failures.append(row)
                if num_drafts == 0 and len(loaded.failures) - first_failure >= MANY_ROWS:
                    break
            else:
                num_drafts += 1
                _add(row, source, config.heldout_frac, against, kept, loaded)
        _require_usable(source, num_drafts, loaded.failures[first_failure:], config.max_unusable_frac)
    if config.dedupe is not None:
        loaded.near_duplicates.extend(_remove_near_duplicates(kept, config.dedupe))
    return loaded, kept


def _read(
    source: Source, evaluation: EvaluationTexts | None, scrubber: "Scrubber | None"
) -> Iterator[tuple[Draft | Failure, str | None]]:
    """Drafts with the evaluation text that they overlap, None for clean ones; and malformed rows."""
    rows, originals = itertools.tee(read_source(source))
    # Generated tasks have no real persons, and their checkers need the names.
    scrubs = scrubber is not None and not isinstance(source, ReasoningGymSource)
    for row, original in zip(scrubber.drafts(rows) if scrubber and scrubs else rows, originals, strict=True):
        # The draft, not the finished prompt: an instruction that all prompts share is not an overlap. And the original:
        # evaluation sets have their names.
        if evaluation is None or isinstance(original, Failure):
            yield row, None
        else:
            yield row, evaluation.overlap(original.messages)


def _add(
    draft: Draft,
    source: Source,
    heldout_frac: float,
    against: str | None,
    kept: dict[str, KeptPrompt],
    loaded: LoadedPrompts,
) -> None:
    """Adds one draft to `kept` by its prompt_id, or to those in `loaded` that are left out."""
    where = f"{source.name} {draft.where}"
    frac = 0.0 if draft.is_variant else heldout_frac
    prompt = prompt_of(draft, source.name, source.system, source.instruction, frac)
    earlier = kept.get(prompt.prompt_id)
    if against is not None:
        loaded.contaminated.append(Contaminated(where, against))
    elif earlier is None:
        kept[prompt.prompt_id] = KeptPrompt(prompt, where, draft, source)
    else:
        old, new = earlier.prompt.reference, prompt.reference
        loaded.duplicates.append(Duplicate(where, earlier.where, None not in (old, new) and old != new))
        if old is None and new is not None:
            # The judge and what it needs come along; the row's place stays that of the row that was kept.
            judge = {name: value for name, value in prompt.metadata.items() if name == "judge"}
            metadata = {**prompt.metadata, **earlier.prompt.metadata, **judge}
            earlier.prompt = replace(earlier.prompt, reference=new, metadata=metadata)


def _add_variants(
    config: AugmentConfig,
    evaluation: EvaluationTexts | None,
    scrubber: "Scrubber | None",
    kept: dict[str, KeptPrompt],
    loaded: LoadedPrompts,
) -> None:
    answers: Answers = {} if config.cache is None else read_answers(config.cache)
    is_personal = None if scrubber is None else scrubber.is_personal
    for one in variants(config, [*kept.values()], answers, is_personal):
        match one:
            case Question():
                loaded.unanswered[one.step] += 1
            case NoVariant():
                loaded.without_variant[f"{one.kind}: {one.reason}"] += 1
            case Variant():
                against = None if evaluation is None else evaluation.overlap(one.draft.messages)
                if against is not None:
                    loaded.contaminated.append(Contaminated(one.where, against))
                elif (twin := kept.get(one.prompt.prompt_id)) is not None:
                    loaded.duplicates.append(Duplicate(one.where, twin.where))
                else:
                    kept[one.prompt.prompt_id] = KeptPrompt(one.prompt, one.where, one.draft, one.source)
                    loaded.variants[one.kind] += 1


def _remove_near_duplicates(kept: dict[str, KeptPrompt], config: DedupeConfig) -> list[NearDuplicate]:
    rows = [one for one in kept.values() if not (one.draft.is_variant or isinstance(one.source, ReasoningGymSource))]
    # The draft: an instruction that all prompts share would make short ones alike. The system message may be the
    # source's own.
    compared = [
        Compared(one.where, one.draft.messages, "\n".join(m.content for m in one.prompt.messages if m.role == "system"))
        for one in rows
    ]
    found = []
    with Progress("dedupe", len(rows), "prompts") as progress:
        for number, (one, earlier) in enumerate(zip(rows, near_duplicates(config, compared), strict=True), 1):
            if earlier is not None:
                found.append(earlier)
                del kept[one.prompt.prompt_id]
            progress.update(number, 0)
    return found


def _request(
    prompt: Prompt,
    prompt_token_ids: list[int],
    sample_index: int,
    sampling: dict[str, Any],
    base_seed: int,
    teacher_fingerprint: str,
) -> Request:
    seed = seed_of(base_seed, prompt.prompt_id, sample_index)
    # Off is off: adding a setting at its neutral value must not change the ids of chains that exist.
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


def _require_usable(source: Source, num_drafts: int, failures: Sequence[Failure], max_frac: float) -> None:
    """Raises DataError if a source has no usable row, or too few."""
    if num_drafts == 0 and not failures:
        raise DataError(f"source {source.name} holds no rows")
    num_rows = num_drafts + len(failures)
    if num_drafts == 0:
        which = "all" if len(failures) < MANY_ROWS else "the first"
        problem, hint = f"has no usable prompt: {which} {len(failures)} rows are malformed", ""
    elif len(failures) > max_frac * num_rows:
        problem = f"has {len(failures)} malformed rows among {num_rows}"
        hint = " (prompts.max_unusable_frac is the limit)"
    else:
        return
    raise DataError(f"source {source.name} {problem}, first {failures[0].message}{hint}")
