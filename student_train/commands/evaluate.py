"""`student-train eval`: its options by what they belong to. The page is written after every part."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import typer

from stillroom.errors import ConfigError
from stillroom.program import AsJson, print_result
from student_train.commands.options import (
    OptionalConfigPath,
    Overrides,
    WhichCheckpoint,
    load_train_config,
    refuse_unused,
)
from student_train.commands.result_lines import eval_lines

if TYPE_CHECKING:
    from stillroom.config import Json
    from student_train.answers import GenerateConfig
    from student_train.assess.evaluating import More
    from student_train.assess.harness import HarnessConfig
    from student_train.config.stage import QuantiseConfig

Kind = Literal["distributions", "projected", "text"]
Rounding = Literal["w8a8", "w4a16"]

# What is evaluated, on which chains.
Model = Annotated[str | None, typer.Option(help="Hugging Face folder or hub id to evaluate.")]
Caches = Annotated[list[Path] | None, typer.Option(help="Cache to evaluate on. Repeatable.")]
Where = Annotated[str | None, typer.Option(help="SQL condition on chains; default: split = 'heldout'.")]
Initial = Annotated[bool, typer.Option("--initial", help="Evaluate the student before training.")]
OfKind = Annotated[
    Kind | None,
    typer.Option(help="With --model: projected or text for a student of another vocabulary than the cache's."),
]
MaxChains = Annotated[int | None, typer.Option(min=1, help="With --model: maximum chains. Default: 512.")]
PackTokens = Annotated[int | None, typer.Option(min=16, help="With --model: tokens per pack. Default: 4096.")]
Quantise = Annotated[
    Rounding | None,
    typer.Option(help="Round weights (and activations) as a quantised export would. Default: as the stage trained."),
]

# Answers of its own.
Generate = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Also generate answers to N held-out prompts and judge them.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="With --generate: maximum tokens per answer. Default: 1024.")
]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="With --generate: sampling temperature. Default: 0 (greedy).")
]
Robustness = Annotated[
    bool,
    typer.Option(
        "--robustness", help="With --generate: repeat with typing noise, an irrelevant sentence, and reordered options."
    ),
]
PricePerHour = Annotated[
    float | None, typer.Option(min=0, help="With --generate: price of this machine's hour, for cost per answer.")
]

# A second held-out set.
Forgetting = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="Second held-out set, before and after: a cache, .txt or .jsonl."),
]
Before = Annotated[str | None, typer.Option(help="With --model and --forgetting: the student before its training.")]

# Public tasks.
Tasks = Annotated[
    str | None, typer.Option("--lm-eval", metavar="TASKS", help="Also run these lm-eval tasks, comma-separated.")
]
TasksPath = Annotated[Path | None, typer.Option("--lm-eval-path", help="With --lm-eval: folder with your own tasks.")]
TasksLimit = Annotated[
    int | None, typer.Option("--lm-eval-limit", min=1, help="With --lm-eval: documents per task. Default: all.")
]
TasksChat = Annotated[
    bool | None,
    typer.Option(
        "--lm-eval-chat/--no-lm-eval-chat",
        help="With --lm-eval: write prompts by the chat template. Default: if the tokenizer has one.",
        show_default=False,
    ),
]
Out = Annotated[Path | None, typer.Option(help="HTML page to write, again after every part.")]


def evaluate(
    config_path: OptionalConfigPath = None,
    overrides: Overrides = None,
    model: Model = None,
    cache: Caches = None,
    where: Where = None,
    initial: Initial = False,
    checkpoint: WhichCheckpoint = "last",
    kind: OfKind = None,
    max_chains: MaxChains = None,
    pack_tokens: PackTokens = None,
    quantise: Quantise = None,
    generate: Generate = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    robustness: Robustness = False,
    price_per_hour: PricePerHour = None,
    forgetting: Forgetting = None,
    before: Before = None,
    lm_eval: Tasks = None,
    lm_eval_path: TasksPath = None,
    lm_eval_limit: TasksLimit = None,
    lm_eval_chat: TasksChat = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a student against its teacher on held-out chains. With --generate, also judge its own answers.

    A part that fails leaves the others' results; the exit code is then its own.
    """
    from stillroom.storage.paths import check_out
    from student_train.assess.evaluating import More

    if out is not None:
        check_out("--out", out)
    answers = _answers(generate, max_new_tokens, temperature, robustness, price_per_hour)
    harness = _harness(lm_eval, lm_eval_path, lm_eval_limit, lm_eval_chat, quantise)
    more = More(robustness, forgetting, before, harness, price_per_hour)
    with _Results(out, as_json) as results:
        asked = _Asked(where, answers, quantise, more, results.save)
        if config_path is None:
            if initial or checkpoint != "last" or overrides:
                raise ConfigError("--initial, --checkpoint and --set need a CONFIG")
            _evaluate_folder(model, cache, kind, max_chains, pack_tokens, asked)
        else:
            if (model, cache, before) != (None, None, None):
                raise ConfigError("CONFIG already names model and caches: remove it, or --model, --cache and --before")
            refuse_unused({"--kind": kind}, "with a CONFIG: use --set data.kind=KIND")
            sizes = {"--max-chains": max_chains, "--pack-tokens": pack_tokens}
            refuse_unused(sizes, "with a CONFIG: use --set eval.max_chains=N and --set data.pack_tokens=N")
            if initial and checkpoint != "last":
                raise ConfigError("--checkpoint has no effect with --initial: remove one")
            _evaluate_run(config_path, overrides, "initial" if initial else checkpoint, asked)


@dataclass(frozen=True)
class _Asked:
    """What to measure, whatever the student comes from; `save` takes the result after every part."""

    where: str | None
    generate: "GenerateConfig | None"
    quantise: Rounding | None
    more: "More"
    save: "Callable[[Json], None]"

    def rounding(self) -> "QuantiseConfig | None":
        from student_train.config.stage import QuantiseConfig

        return None if self.quantise is None else QuantiseConfig(format=self.quantise)


class _Results:
    """The result so far: in the page after every part, on stdout at the end, also where that is Ctrl-C."""

    def __init__(self, out: Path | None, as_json: bool) -> None:
        self._out, self._as_json = out, as_json
        self._result: Json | None = None

    def save(self, result: "Json") -> None:
        self._result = result
        if self._out is not None:
            from student_train.assess.page import write_eval_page

            result["page"] = str(self._out)
            write_eval_page(result, self._out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._result is None:
            return
        print_result(self._result, eval_lines(self._result), self._as_json)
        if error is None and self._result["failed"]:
            raise typer.Exit(self._result["failed"][0]["exit_code"])


def _answers(
    generate: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    robustness: bool,
    price_per_hour: float | None,
) -> "GenerateConfig | None":
    from student_train.answers import DEFAULT_NEW_TOKENS, GenerateConfig

    if generate is not None:
        return GenerateConfig(generate, max_new_tokens or DEFAULT_NEW_TOKENS, temperature or 0.0)
    given: dict[str, object] = {"--max-new-tokens": max_new_tokens, "--temperature": temperature}
    given |= {"--robustness": robustness or None, "--price-per-hour": price_per_hour}
    refuse_unused(given, "without --generate")
    return None


def _harness(
    tasks: str | None, path: Path | None, limit: int | None, chat: bool | None, quantise: Rounding | None
) -> "HarnessConfig | None":
    from student_train.assess.harness import HarnessConfig

    if tasks is not None:
        refuse_unused({"--quantise": quantise}, "on --lm-eval")
        return HarnessConfig(tasks.split(","), path, limit, chat)
    given = {"--lm-eval-path": path, "--lm-eval-limit": limit, "--lm-eval-chat": chat}
    refuse_unused(given, "without --lm-eval")
    return None


def _evaluate_run(config_path: Path, overrides: list[str] | None, which: str, asked: _Asked) -> None:
    from student_train.assess.evaluating import evaluate_config

    config = load_train_config(config_path, overrides)
    evaluate_config(config, asked.where, which, asked.generate, asked.rounding(), asked.more, asked.save)


def _evaluate_folder(
    model: str | None,
    caches: list[Path] | None,
    kind: Kind | None,
    max_chains: int | None,
    pack_tokens: int | None,
    asked: _Asked,
) -> None:
    from student_train.assess.evaluating import DEFAULT_CHAINS, DEFAULT_PACK_TOKENS, evaluate_model

    if model is None or not caches:
        raise ConfigError("pass a CONFIG, or --model and --cache")
    evaluate_model(
        model,
        caches,
        asked.where,
        kind=kind or "distributions",
        max_chains=max_chains or DEFAULT_CHAINS,
        pack_tokens=pack_tokens or DEFAULT_PACK_TOKENS,
        generate=asked.generate,
        quantise=asked.rounding(),
        more=asked.more,
        saved=asked.save,
    )
