"""How many held-out prompts a student answers correctly: it generates, and the judges of the cache's prompts decide.

In: a Hugging Face model, prompts from a cache. Out: accuracy beside the teacher's on the same prompts. Generation runs
in left-padded batches of the token ids that the teacher read.

    B prompts of a batch, L their longest, G generated tokens
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stillroom.cache.catalog import Catalog
from stillroom.config import Json
from stillroom.errors import ConfigError
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import require_judge
from stillroom.judging.process import JudgeProcess
from stillroom.log import Progress
from stillroom.models import reasoning_ids, split_reasoning
from stillroom.sql.conditions import in_brackets, run_with
from stillroom.sql.session import open_session
from stillroom.storage.paths import location
from student_train.data.selection import PinnedCache

Render = Callable[[Sequence[Mapping[str, str]], str], list[int]]
"""Token ids of a conversation, and of a run of the cache, as the student reads it."""
BATCH_PROMPTS = 16
DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """What to generate. Raises ConfigError for values out of range."""

    num_prompts: int
    max_new_tokens: int
    """Longer answers are cut off and judged as they are."""
    temperature: float
    """0 is greedy."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ConfigError(
                f"--generate {self.num_prompts}, --max-new-tokens {self.max_new_tokens}, --temperature "
                f"{self.temperature:g}: the first two must be at least 1, the last at least 0"
            )


@dataclass(frozen=True, slots=True)
class AskedPrompt:
    """A prompt and what judges its answer; `teacher_accuracy` is the share of the teacher's correct answers."""

    prompt_id: str
    token_ids: Sequence[int]
    judge: str
    reference: str | None
    metadata: Mapping[str, Any]
    reasoning: tuple[str, str] | None
    """Markers that open and close the reasoning; None if the teacher's run has none."""
    teacher_accuracy: float | None
    messages: Sequence[Mapping[str, str]] = ()
    source: str = ""
    run_id: str = ""
    teacher_tokens: float | None = None
    """Mean length of the teacher's chains."""


@dataclass(frozen=True, slots=True)
class Given:
    """An answer to a prompt. `answer` follows the reasoning; None if the reasoning never ended.

    `confidence` is the geometric mean of the probabilities (before temperature) that the student gave the answer's
    tokens; None where there is no answer.
    """

    prompt: AskedPrompt
    ids: Sequence[int]
    answer: str | None
    is_cut: bool
    confidence: float | None
    verdict: Verdict


class GenerationResult(BaseModel):
    """One answer to each of `num_prompts` prompts; accuracies are shares of the judged answers."""

    model_config = ConfigDict(frozen=True)

    num_prompts: int
    num_correct: int
    num_wrong: int
    num_undecided: int
    accuracy: float | None
    teacher_accuracy: float | None
    """Mean, over the same prompts, of the share of the teacher's answers judged correct."""
    truncated_frac: float
    """Share of answers cut off at the limit."""
    mean_tokens: float
    tokens_per_s: float
    seconds: float


def heldout_prompts(
    caches: Sequence[PinnedCache], where: str, num_prompts: int, render: Render | None
) -> list[AskedPrompt]:
    """Up to `num_prompts` distinct prompts of the selected chains that name a judge, those with the smallest ids.

    `render` gives a conversation the token ids that the student reads; None takes the teacher's. Raises ConfigError if
    there are none, StillroomError if a judge cannot run here.
    """
    found = [prompt for cache in caches for prompt in _prompts_of(cache, where, num_prompts, render)]
    chosen = sorted({prompt.prompt_id: prompt for prompt in found}.values(), key=lambda one: one.prompt_id)
    if not chosen:
        counted = f"SELECT count(*) AS num FROM chains WHERE {in_brackets(where)}"
        if not any(_rows(cache, where, counted)[0]["num"] for cache in caches):
            raise ConfigError(f"no chain matches {where!r}, so there is no prompt to ask")
        raise ConfigError(f"no prompt of the chains with {where!r} names a judge, so no answer can be judged")
    # Before anything is generated: a judge that is not installed would show after an hour.
    for judge in {prompt.judge for prompt in chosen[:num_prompts]}:
        require_judge(judge)
    return chosen[:num_prompts]


def generate_and_judge(
    model: Any, tokenizer: Any, prompts: Sequence[AskedPrompt], config: GenerateConfig
) -> tuple[GenerationResult, list[Given]]:
    """Generates answers on the model's device and judges them; answers are in the order of the prompts."""
    started_s = time.perf_counter()
    given = answer_and_judge(model, tokenizer, prompts, config)
    seconds = time.perf_counter() - started_s
    num_correct = sum(one.verdict.correct is True for one in given)
    num_wrong = sum(one.verdict.correct is False for one in given)
    num_tokens = sum(len(one.ids) for one in given)
    known = [prompt.teacher_accuracy for prompt in prompts if prompt.teacher_accuracy is not None]
    result = GenerationResult(
        num_prompts=len(prompts),
        num_correct=num_correct,
        num_wrong=num_wrong,
        num_undecided=len(given) - num_correct - num_wrong,
        # Undecided answers say nothing about the student: a check timed out, or there is no reference.
        accuracy=num_correct / (num_correct + num_wrong) if num_correct + num_wrong else None,
        teacher_accuracy=sum(known) / len(known) if known else None,
        truncated_frac=sum(one.is_cut for one in given) / len(given),
        mean_tokens=num_tokens / len(given),
        tokens_per_s=num_tokens / seconds,
        seconds=seconds,
    )
    return result, given


def answer_and_judge(
    model: Any, tokenizer: Any, prompts: Sequence[AskedPrompt], config: GenerateConfig, label: str = "generate"
) -> list[Given]:
    """One judged answer to each prompt, in order; `label` names the progress."""
    ends = end_ids(model)
    found: dict[int, Given] = {}
    num_tokens = 0
    with JudgeProcess() as judge, Progress(label, len(prompts), "prompts") as progress:
        judge.prepare(sorted({prompt.judge for prompt in prompts}))
        for batch in _batches(prompts):
            chosen = ChosenLogprobs()
            answers = generate(model, tokenizer, [prompts[place] for place in batch], config, chosen)
            for row, (place, ids) in enumerate(zip(batch, answers, strict=True)):
                prompt, is_cut = prompts[place], ids[-1] not in ends
                first, answer = answer_of(tokenizer, prompt, ids)
                verdict = judge.judge(prompt.judge, answer, prompt.reference, prompt.metadata, is_cut)
                confidence = None if first is None else chosen.confidence(row, first, len(ids))
                found[place] = Given(prompt, ids, answer, is_cut, confidence, verdict)
                num_tokens += len(ids)
            progress.update(len(found), num_tokens)
    return [found[place] for place in range(len(prompts))]


class ChosenLogprobs:
    """Log probabilities of the tokens that were chosen, as a logits processor: one [B, V] is kept from step to step."""

    def __init__(self) -> None:
        self._before_BV: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        """Called before each token is chosen, with the tokens so far. Leaves the logits as they are."""
        self.chose(ids_BL[:, -1:])
        # Kept until the next call, which shows what was chosen from it.
        self._before_BV = logits_BV.float().log_softmax(dim=-1)
        return logits_BV

    def chose(self, ids_B1: Tensor) -> None:
        """The tokens that came of the step before."""
        if self._before_BV is not None:
            self._columns.append(self._before_BV.gather(1, ids_B1).squeeze(1))

    def confidence(self, row: int, first: int, stop: int) -> float | None:
        """Geometric mean over a row's tokens from `first` on; None for none."""
        if first >= stop:
            return None
        logprobs_G = torch.stack([column_B[row] for column_B in self._columns[first:stop]])
        return float(logprobs_G.mean().exp())


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[AskedPrompt],
    config: GenerateConfig,
    chosen: ChosenLogprobs | None = None,
) -> list[list[int]]:
    """Token ids of one answer to each prompt, including the end of sequence if there is one; `chosen` is filled."""
    from transformers import GenerationConfig, LogitsProcessorList

    ends = end_ids(model)
    # Many models have no padding token. The mask hides these positions, so any id will do.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids_BL = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        # Padded on the left: generation continues at the last position.
        ids_BL[row, longest - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask_BL[row, longest - len(prompt.token_ids) :] = 1
    # Without top_k, transformers cuts the distribution to its default of 50 tokens.
    sampling = {"temperature": config.temperature, "top_k": 0} if config.temperature else {}
    wanted = GenerationConfig(
        do_sample=bool(config.temperature),
        max_new_tokens=config.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding,
        **sampling,
    )
    torch.manual_seed(config.seed)
    models_own = model.generation_config
    # transformers fills whatever a generation config leaves open from the model's own: sampling, nuclei, penalties.
    model.generation_config = wanted
    try:
        ids_BG: Tensor = model.generate(
            ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=wanted,
            # transformers calls given processors before temperature and nucleus.
            logits_processor=LogitsProcessorList([] if chosen is None else [chosen]),
        )[:, longest:]
    finally:
        model.generation_config = models_own
    if chosen is not None:
        # The processor is not called again after the last token.
        chosen.chose(ids_BG[:, -1:])
    return [_until_end(ids, ends) for ids in ids_BG.tolist()]


def answer_of(tokenizer: Any, prompt: AskedPrompt, ids: Sequence[int]) -> tuple[int, str] | tuple[None, None]:
    """Where the answer begins, after the reasoning, and its text; None if the reasoning never ended."""
    start_id, end_id = reasoning_ids(tokenizer, *prompt.reasoning) if prompt.reasoning is not None else (None, None)
    first = split_reasoning(ids, prompt.token_ids, start_id, end_id)
    if first is None:
        return None, None
    return first, str(tokenizer.decode(ids[first:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _catalog(cache: PinnedCache) -> Catalog:
    return Catalog(location(cache.root), cache.chains_version, cache.verdicts_version)


def _rows(cache: PinnedCache, where: str, query: str) -> list[Json]:
    with open_session(_catalog(cache)) as session:
        rows: list[Json] = run_with(session, "--where", where, query).to_pylist()
    return rows


def _prompts_of(cache: PinnedCache, where: str, num_prompts: int, render: Render | None) -> Iterator[AskedPrompt]:
    catalog = _catalog(cache)
    query = (
        # All chains of a prompt have the same messages and reference, so any value is the value.
        "SELECT a.prompt_id, any_value(s.messages) AS messages, any_value(s.prompt_token_ids) AS ids, "
        "any_value(s.reference) AS reference, any_value(s.metadata) AS metadata, any_value(s.run_id) AS run_id, "
        "any_value(s.source) AS source, "
        "avg(a.correct::INTEGER) AS teacher_accuracy, avg(a.num_tokens) AS teacher_tokens "
        f"FROM (SELECT sample_id, prompt_id, correct, num_tokens FROM chains WHERE {in_brackets(where)}) a "
        "JOIN shards s USING (sample_id) "
        "WHERE json_extract_string(s.metadata, '$.judge') IS NOT NULL "
        f"GROUP BY a.prompt_id ORDER BY a.prompt_id LIMIT {num_prompts}"
    )
    runs = catalog.runs()
    for row in _rows(cache, where, query):
        metadata = json.loads(row["metadata"])
        markers = runs[row["run_id"]].reasoning
        yield AskedPrompt(
            prompt_id=row["prompt_id"],
            token_ids=row["ids"] if render is None else render(row["messages"], row["run_id"]),
            judge=str(metadata["judge"]),
            reference=row["reference"],
            metadata=metadata,
            reasoning=(markers["start"], markers["end"]) if markers.get("end") else None,
            teacher_accuracy=row["teacher_accuracy"],
            messages=row["messages"],
            source=row["source"] or "",
            run_id=row["run_id"],
            teacher_tokens=row["teacher_tokens"],
        )


def _batches(prompts: Sequence[AskedPrompt]) -> Iterator[list[int]]:
    """Places of prompts of similar lengths, the longest first: too little memory shows at once."""
    ordered = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place].token_ids), prompts[place].prompt_id))
    for first in range(0, len(ordered), BATCH_PROMPTS):
        yield ordered[first : first + BATCH_PROMPTS]


def end_ids(model: Any) -> list[int]:
    """Ids that end an answer. Raises ConfigError if there are none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ConfigError("the model has no eos_token_id in its generation config: answers would never end")
    return list(ends) if isinstance(ends, list) else [ends]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Drops the padding of shorter answers in a batch."""
    first = next((number for number, one in enumerate(ids) if one in ends), len(ids) - 1)
    return ids[: first + 1]
