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
from stillroom.errors import ConfigError
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import require_judge
from stillroom.judging.process import JudgeProcess
from stillroom.log import Progress
from stillroom.models import reasoning_ids, split_reasoning
from stillroom.sql.conditions import in_brackets
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
        raise ConfigError(
            f"--generate: no prompt of the chains with {where!r} names a judge, so no answer can be judged"
        )
    for judge in {prompt.judge for prompt in chosen[:num_prompts]}:
        require_judge(judge)
    return chosen[:num_prompts]


def generate_and_judge(
    model: Any, tokenizer: Any, prompts: Sequence[AskedPrompt], config: GenerateConfig
) -> GenerationResult:
    """Generates answers on the model's device and judges them."""
    started_s, num_tokens, num_done, num_ended = time.perf_counter(), 0, 0, 0
    verdicts: list[Verdict] = []
    with JudgeProcess() as judge, Progress("generate", len(prompts), "prompts") as progress:
        judge.prepare(sorted({prompt.judge for prompt in prompts}))
        for batch in _batches(prompts):
            for prompt, ids in zip(batch, generate(model, tokenizer, batch, config), strict=True):
                num_tokens += len(ids)
                num_ended += ids[-1] in end_ids(model)
                answer = answer_of(tokenizer, prompt, ids)
                is_cut = ids[-1] not in end_ids(model)
                verdicts.append(judge.judge(prompt.judge, answer, prompt.reference, prompt.metadata, is_cut))
            num_done += len(batch)
            progress.update(num_done, num_tokens)
    num_correct = sum(one.correct is True for one in verdicts)
    num_wrong = sum(one.correct is False for one in verdicts)
    known = [prompt.teacher_accuracy for prompt in prompts if prompt.teacher_accuracy is not None]
    return GenerationResult(
        num_prompts=len(prompts),
        num_correct=num_correct,
        num_wrong=num_wrong,
        num_undecided=len(verdicts) - num_correct - num_wrong,
        accuracy=num_correct / (num_correct + num_wrong) if num_correct + num_wrong else None,
        teacher_accuracy=sum(known) / len(known) if known else None,
        truncated_frac=1 - num_ended / len(prompts),
        mean_tokens=num_tokens / len(prompts),
        tokens_per_s=num_tokens / (time.perf_counter() - started_s),
    )


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[AskedPrompt], config: GenerateConfig) -> list[list[int]]:
    """Token ids of one answer to each prompt, including the end of sequence if there is one."""
    from transformers import GenerationConfig

    ends = end_ids(model)
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
            ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), generation_config=wanted
        )[:, longest:]
    finally:
        model.generation_config = models_own
    return [_until_end(ids, ends) for ids in ids_BG.tolist()]


def answer_of(tokenizer: Any, prompt: AskedPrompt, ids: Sequence[int]) -> str | None:
    """The text after the reasoning; None if the reasoning never ended."""
    start_id, end_id = reasoning_ids(tokenizer, *prompt.reasoning) if prompt.reasoning is not None else (None, None)
    first = split_reasoning(ids, prompt.token_ids, start_id, end_id)
    if first is None:
        return None
    return str(tokenizer.decode(ids[first:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _prompts_of(cache: PinnedCache, where: str, num_prompts: int, render: Render | None) -> Iterator[AskedPrompt]:
    catalog = Catalog(location(cache.root), cache.chains_version, cache.verdicts_version)
    query = (
        "SELECT a.prompt_id, any_value(s.messages) AS messages, any_value(s.prompt_token_ids) AS ids, "
        "any_value(s.reference) AS reference, any_value(s.metadata) AS metadata, any_value(s.run_id) AS run_id, "
        "any_value(s.source) AS source, "
        "avg(a.correct::INTEGER) AS teacher_accuracy "
        f"FROM (SELECT sample_id, prompt_id, correct FROM chains WHERE {in_brackets(where)}) a "
        "JOIN shards s USING (sample_id) "
        "WHERE json_extract_string(s.metadata, '$.judge') IS NOT NULL "
        f"GROUP BY a.prompt_id ORDER BY a.prompt_id LIMIT {num_prompts}"
    )
    with open_session(catalog) as session:
        rows = session.arrow(query).to_pylist()
    runs = catalog.runs()
    for row in rows:
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
        )


def _batches(prompts: Sequence[AskedPrompt]) -> Iterator[list[AskedPrompt]]:
    """Prompts of similar lengths, the longest first: too little memory shows at once."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.token_ids), prompt.prompt_id))
    for first in range(0, len(ordered), BATCH_PROMPTS):
        yield ordered[first : first + BATCH_PROMPTS]


def end_ids(model: Any) -> list[int]:
    """Ids that end an answer. Raises ConfigError if there are none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ConfigError("--generate: the model has no eos_token_id in its generation config: answers would never end")
    return list(ends) if isinstance(ends, list) else [ends]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Drops the padding of shorter answers in a batch."""
    first = next((number for number, one in enumerate(ids) if one in ends), len(ids) - 1)
    return ids[: first + 1]
