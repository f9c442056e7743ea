"""`student-train eval`: a checkpoint, an untrained student or any Hugging Face folder on held-out chains."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shared.config import Json
from shared.errors import ConfigError
from student_train.checkpoint import find_state
from student_train.config import HELDOUT, CacheConfig, DataConfig, EvalConfig, StudentConfig, TrainConfig
from student_train.evaluate import evaluate, student_metrics
from student_train.export import adopt_tokens, cache_tokenizer, trained_model
from student_train.generate import GenerateConfig, generate_and_judge, heldout_prompts
from student_train.losses.head import fuse_head
from student_train.model import Student, load_causal, widen_vocab
from student_train.ranks import Ranks
from student_train.runfolder import RunFolder
from student_train.streaming.data import check_vocabulary, eval_request, eval_spec, open_data
from student_train.streaming.heldout import kept_or_temporary
from student_train.streaming.retokenise import HuggingFaceText
from student_train.streaming.selection import Selection

DEFAULT_CHAINS = 512
DEFAULT_PACK_TOKENS = 4096


def evaluate_config(config: TrainConfig, where: str | None, which: str, generate: GenerateConfig | None = None) -> Json:
    """Evaluates checkpoint `which` of a run, or with `initial` the student before its training.

    Without `where` on the held-out selection of the run; with `generate` also by the answers that it gives. Raises
    ConfigError, DataError, CorruptError.
    """
    if config.eval is None and where is None:
        raise ConfigError("the configuration has no eval block: set one, or say --where")
    run = RunFolder(config.run)
    asked = config.eval or EvalConfig()
    wanted = asked if where is None else asked.updated(where=where)
    if which == "initial":
        model = load_causal(config.student.model, config.student, config.engine.precision)
        name = config.student.model
    else:
        state = find_state(run.checkpoints, which)
        model, name = trained_model(config, state, merged=True), state.tag
    kept = run.heldout_path if where is None else None
    result = _evaluate(model, config.student, config.data, wanted, kept, config.engine.chunk_tokens, generate)
    return {"model": name, **result}


def evaluate_model(
    model: str,
    caches: Sequence[Path],
    where: str | None,
    *,
    max_chains: int | None = DEFAULT_CHAINS,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    generate: GenerateConfig | None = None,
) -> Json:
    """Evaluates a Hugging Face folder or hub id. Raises ConfigError, DataError, CorruptError."""
    if (Path(model) / "adapter_config.json").exists():
        raise ConfigError(
            f"--model {model} is a LoRA adapter alone: `student-train export` without --adapter-only writes it merged "
            "into its model, name that folder"
        )
    student = StudentConfig(model=model)
    data = DataConfig(caches=[CacheConfig(path=path) for path in caches], pack_tokens=pack_tokens)
    wanted = EvalConfig(where=where or HELDOUT, max_chains=max_chains)
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    loaded = load_causal(model, student, precision)
    return {"model": model, **_evaluate(loaded, student, data, wanted, None, None, generate)}


def _evaluate(
    model: Any,
    student: StudentConfig,
    data: DataConfig,
    wanted: EvalConfig,
    kept: Path | None,
    chunk_tokens: int | None,
    generate: GenerateConfig | None,
) -> Json:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="student-train-eval-") as temp:
        request = eval_request(data, wanted)
        path = Path(temp) / "heldout.selection.parquet"
        if kept is not None:
            path = kept_or_temporary(kept, request, Path(temp))
        selection = open_data(path, request, data, student)
        vocabulary = check_vocabulary(student, selection, [cache.path for cache in data.caches])
        widen_vocab(model, vocabulary.num_ids)
        fuse_head(model)
        metrics_of = student_metrics(Student(model, chunk_tokens).to(device))
        result = evaluate(metrics_of, selection, eval_spec(data), Ranks(0, 1, device))
        answers = None
        if generate is not None:
            answers = _answers(model, student, data, selection, wanted.where, generate)
    return {"where": wanted.where, **result.model_dump(), "generation": answers}


def _answers(
    model: Any, student: StudentConfig, data: DataConfig, selection: Selection, where: str, config: GenerateConfig
) -> Json:
    # Evaluation may have switched it to attention over packs.
    model.set_attn_implementation(student.attention)
    tokenizer = cache_tokenizer(student, selection, None)
    adopt_tokens(model, tokenizer)
    text = HuggingFaceText(tokenizer, selection.header.vocab_size) if selection.is_text else None
    pinned = [
        cache.model_copy(update={"root": str(source.path)})
        for cache, source in zip(selection.header.caches, data.caches, strict=True)
    ]
    prompts = heldout_prompts(pinned, where, config.num_prompts, text)
    return generate_and_judge(model, tokenizer, prompts, config).model_dump()
