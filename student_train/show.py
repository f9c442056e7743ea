"""Results as lines for a person; `--json` prints the same as one JSON object."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.log import format_bytes, format_count, format_duration, format_plural
from student_train.metrics_log import short_name

Result = Mapping[str, Any]


def init_lines(record: Result) -> list[str]:
    """`init`: what was kept."""
    kept = ", ".join(str(number) for number in record["kept_layers"])
    size = format_count(record["num_parameters"])
    return [
        f"{record['folder']}: {size} parameters, layers {kept} of {record['teacher_layers']} of {record['teacher']}"
    ]


def plan_lines(plan: Result) -> list[str]:
    """`plan`: what each stage reads and costs."""
    ranks = format_plural(plan["num_ranks"], "rank")
    lines = [*plan["notes"], f"student    {format_count(plan['num_parameters'])} parameters, {ranks}"]
    for stage in plan["stages"]:
        lines += ["", *_stage_lines(stage)]
    held = f"{format_plural(plan['heldout_chains'], 'chain')}, {format_count(plan['heldout_tokens'])} tokens"
    return [*lines, "", f"held out   {held if plan['heldout_chains'] else 'nothing: the run is not evaluated'}"]


def run_lines(summary: Result) -> list[str]:
    """`run`: what it came to."""
    lines = [
        f"{stage['name']:10} {format_plural(stage['num_steps'], 'step')}, {_course(stage)}"
        for stage in summary["stages"]
        if stage["num_steps"]
    ]
    lines.append(
        f"read       {format_count(summary['num_tokens'])} tokens ({format_count(summary['num_loss_tokens'])} in the "
        f"loss) in {format_duration(summary['train_s'])}, {summary['tokens_per_s']:.0f} tok/s, "
        f"{100 * summary['stall_frac']:.1f}% waiting for data"
    )
    if summary["num_skipped_steps"]:
        lines.append(f"skipped    {summary['num_skipped_steps']} steps: float16 overflowed, their packs taught nothing")
    for label, name in (("before", "heldout_before"), ("after", "heldout_after")):
        if summary[name] is not None:
            lines.append(f"{label:10} {_metrics(summary[name])}")
    best, run = summary["best_checkpoint"], Path(summary["run"])
    lines.append(
        f"checkpoint {run / 'checkpoints' / summary['checkpoint']}" + (f", best {best}" if best is not None else "")
    )
    config, folder = shlex.quote(str(run / "config.yaml")), shlex.quote(str(run))
    commands = (f"eval {config}", f"export {config} --out FOLDER", f"report {folder}")
    return [*lines, "next       " + "; ".join(f"student-train {one}" for one in commands)]


def eval_lines(result: Result) -> list[str]:
    """`eval`: the metrics."""
    count = f"{format_plural(result['num_chains'], 'chain')}, {format_count(result['num_tokens'])} tokens"
    lines = [f"{result['model']} on {count}: {result['where']}", _metrics(result)]
    answers = result["generation"]
    if answers is not None:
        accuracy, teacher = (_share(answers[name]) for name in ("accuracy", "teacher_accuracy"))
        lines.append(
            f"answers: {accuracy} right on {format_plural(answers['num_prompts'], 'prompt')} (teacher {teacher})  "
            f"undecided {answers['num_undecided']}  cut off {answers['truncated_frac']:.1%}  "
            f"{answers['mean_tokens']:.0f} tokens an answer  {answers['tokens_per_s']:.0f} tok/s"
        )
    return lines


def export_lines(result: Result) -> list[str]:
    """`export`: what was written."""
    kind = "LoRA adapter" if result["adapter_only"] else "model"
    line = f"{result['folder']}: {kind} of checkpoint {result['checkpoint']}, {format_bytes(result['size_bytes'])}"
    return [line, *([f"base model: {result['adapter_of']}"] if result["adapter_only"] else [])]


def _stage_lines(stage: Result) -> list[str]:
    memory = stage["memory_gib_per_rank"]
    parts = ", ".join(f"{name} {size:.1f}" for name, size in memory.items() if name != "total")
    long = [f"{stage[f'num_{what}']} {what}" for what in ("truncated", "skipped", "split") if stage[f"num_{what}"]]
    cut = f"; long chains: {', '.join(long)}, {format_count(stage['num_tokens_lost'])} tokens lost" if long else ""
    fill = f", {stage['pack_fill']:.0%} full" if stage["pack_fill"] is not None else ""
    chains = format_plural(stage["num_chains"], "chain")
    completion, prompt = format_count(stage["num_tokens"]), format_count(stage["num_prompt_tokens"])
    what = "text to learn" if stage["is_text"] else "tokens"
    left_out = f"; {stage['num_left_out']} left out (without {what}, or of weight 0)" if stage["num_left_out"] else ""
    packs, steps = format_plural(stage["packs_per_epoch"], "pack"), format_plural(stage["steps_per_epoch"], "step")
    epoch = f"{packs} an epoch{fill}; {steps} an epoch"
    return [
        f"stage      {stage['name']}: trains {stage['trainable']}",
        f"selection  {chains}, {completion} completion tokens, {prompt} prompt tokens{left_out}{cut}",
        f"batch      {format_plural(stage['packs_per_step'], 'pack')}: {stage['accumulation']} a rank",
        f"length     {epoch}, {format_plural(stage['num_steps'], 'step')} in all",
        *(f"loss       {name}: {targets}" for name, targets in stage["losses"].items()),
        *_temperature_lines(stage["temperatures"]),
        f"memory     about {memory['total']:.1f} GiB a rank ({parts})",
    ]


def _temperature_lines(steps: list[tuple[int, float]]) -> list[str]:
    if [temperature for _, temperature in steps] == [1.0]:
        return []
    return ["temperature " + ", ".join(f"{temperature:g} from step {step + 1}" for step, temperature in steps)]


def _course(stage: Result) -> str:
    """From the first step to the last: the whole loss where its weights stayed as they were, and its parts."""
    parts = [
        f"{short_name(name)} {first:.4f} -> {stage['last_parts'][name]:.4f}"
        for name, first in stage["first_parts"].items()
    ]
    if not stage["is_comparable"]:
        return ", ".join(parts)
    loss = f"loss {stage['first_loss']:.4f} -> {stage['last_loss']:.4f}"
    return f"{loss} ({', '.join(parts)})" if len(parts) > 1 else loss


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _metrics(result: Result) -> str:
    parts = [f"cross-entropy {result['cross_entropy']:.4f}"]
    if result["forward_kl"] is not None:
        parts += [
            f"KL {result['forward_kl']:.4f}",
            f"JSD {result['js']:.4f}",
            f"top-1 agreement {result['top1_agreement']:.1%}",
        ]
    return "  ".join([*parts, f"confidence - accuracy {result['confidence_minus_accuracy']:+.3f}"])
