"""Results of the commands as lines for a person, out of the objects that `--json` prints."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.log import format_bytes, format_count, format_duration, format_plural, format_price
from student_train.runtime.metrics_log import short_name

Result = Mapping[str, Any]
SHOWN_TERMS = 8


def init_lines(record: Result) -> list[str]:
    """`init`: what was kept."""
    kept = ", ".join(str(number) for number in record["kept_layers"])
    size = format_count(record["num_parameters"])
    lines = [
        f"{record['folder']}: {size} parameters, layers {kept} of {record['teacher_layers']} of {record['teacher']}"
    ]
    sizes, before = record.get("sizes"), record.get("sizes_before")
    if sizes is not None and before is not None:
        cut = [f"{axis} {sizes[axis]} of {before[axis]}" for axis in sizes if sizes[axis] != before[axis]]
        lines.append(f"sizes      {', '.join(cut) or 'as the teacher'}")
    if record.get("vocabulary") is not None:
        lines.append(f"vocabulary {record['num_ids']} ids")
    if record.get("kl_by_removal") is not None:
        # The teacher against its own stored distributions: rounding can take that below 0.
        first, *_, last = (max(0.0, kl) for kl in record["kl_by_removal"])
        lines.append(f"layers     KL to the cached teacher {first:.4f} with all of them, {last:.4f} with those kept")
    return lines


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
    if summary["usage"] is not None:
        hours = ", ".join(
            f"{format_duration(3600 * one)} of {kind}" for kind, one in summary["usage"]["device_hours"].items()
        )
        lines.append(f"took       {hours}")
    if summary["num_skipped_steps"]:
        why = "float16 overflow" if summary["precision"] == "float16" else "a gradient that was not finite"
        lines.append(f"skipped    {summary['num_skipped_steps']} steps with {why}: their packs had no effect")
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
    rounded = f" rounded to {result['quantise']}" if result.get("quantise") else ""
    lines = [f"{result['model']}{rounded} on {count}: {result['where']}", _metrics(result)]
    answers = result["generation"]
    if answers is not None:
        accuracy, teacher = (_share(answers[name]) for name in ("accuracy", "teacher_accuracy"))
        lines.append(
            f"answers: {accuracy} correct on {format_plural(answers['num_prompts'], 'prompt')} (teacher {teacher})  "
            f"undecided {answers['num_undecided']}  truncated {answers['truncated_frac']:.1%}  "
            f"{answers['mean_tokens']:.0f} tokens per answer  {answers['tokens_per_s']:.0f} tok/s"
        )
        if answers["cost"] is not None:
            each = answers["cost_per_correct"]
            right = "no" if each is None else f"{format_price(each)} per"
            lines.append(f"cost {format_price(answers['cost'])}, {right} right answer")
    return [*lines, *_more_lines(result), *([str(result["page"])] if result.get("page") else [])]


def _more_lines(result: Result) -> list[str]:
    """Retention by source, calibration, and what else `eval` was asked for."""
    by_source = [row for row in result["by"].get("source", []) if row["retention"] is not None]
    lines = []
    if by_source:
        parts = [f"{row['group']} {row['retention']:.1%}" for row in by_source]
        lines.append(f"retention {result['retention']:.1%}: {', '.join(parts)}")
    if result["calibration"] is not None:
        lines.append(f"calibration error {result['calibration']['ece']:.3f}: mean gap between confidence and accuracy")
    for kind, one in ((result["generation"] or {}).get("robustness") or {}).items():
        if not one["num_prompts"]:
            lines.append(f"{kind:10} applies to none of these prompts")
            continue
        lines.append(
            f"{kind:10} {_share(one['accuracy'])} correct (clean {_share(one['accuracy_clean'])}), same answer "
            f"{_share(one['agreement'])} of {format_plural(one['num_prompts'], 'prompt')}"
        )
    if (found := result["forgetting"]) is not None:
        labels = {"forward_kl": "KL", "cross_entropy": "cross-entropy", "bits_per_byte": "bits per byte"}
        name = next(one for one in labels if one in found["change"])
        lines.append(
            f"forgetting {found['path']}: {labels[name]} {found['before'][name]:.4f} before the run, "
            f"{found['after'][name]:.4f} after ({found['change'][name]:+.4f})"
            + ("" if found["same_tokens"] else "; per byte because their vocabularies differ")
        )
    for task, metrics in (result["lm_eval"] or {}).get("tasks", {}).items():
        shown = [f"{one['metric']} ({one['filter']}) {one['value']:.4f}" for one in metrics]
        lines.append(f"lm-eval {task}: {', '.join(shown)}")
    lines += [f"not measured: {one['part']}: {one['reason']}" for one in result["failed"]]
    return [*lines, *(f"not measured: {part}: interrupted" for part in result["pending"])]


def export_lines(result: Result) -> list[str]:
    """`export`: what was written."""
    kind = "LoRA adapter" if result["adapter_only"] else "model"
    line = f"{result['folder']}: {kind} of checkpoint {result['checkpoint']}, {format_bytes(result['size_bytes'])}"
    return [line, *([f"base model: {result['adapter_of']}"] if result["adapter_only"] else [])]


def format_lines(result: Result) -> list[str]:
    """`export --format`: what was written, and how close it is to the float student."""
    sizes = f"{format_bytes(result['size_bytes'])} (float {format_bytes(result['float_size_bytes'])})"
    lines = [f"{result['folder']}: {result['format']} of {result['source']}, {sizes}", _agreement(result)]
    if not result["is_same_student"]:
        lines.append(f"warning: below --min-agreement {result['min_agreement']:g}: this is not the same student")
    return lines


def bench_lines(result: Result) -> list[str]:
    """`bench`: one line a folder and batch, then the choice."""
    lines = []
    width = max(len(one["name"]) for one in result["formats"])
    for one in result["formats"]:
        found = one["agreement"]
        agreement = "" if found is None else f"  top-1 {found['top1_agreement']:.1%}"
        memory = "" if one["peak_memory_bytes"] is None else f", {format_bytes(one['peak_memory_bytes'])} of memory"
        lines.append(f"{one['name']:{width}}  {format_bytes(one['size_bytes'])}{memory}{agreement}")
        for batch, speed in one["batches"].items():
            energy = speed["energy_j_per_token"]
            lines.append(
                f"{'':{width}}  batch {batch}: prefill {speed['prefill_tokens_per_s']['median']:.0f} tok/s "
                f"({speed['prefill_ratio']:.2f}x)  decode {speed['decode_tokens_per_s']['median']:.1f} tok/s "
                f"({speed['decode_ratio']:.2f}x)  first token {speed['first_token_ms']['median']:.0f} ms"
                + ("" if energy is None else f"  {energy['median']:.2f} J/token")
            )
    first = result["formats"][0]["name"]
    lines.append(f"medians of {format_plural(result['rounds'], 'round')}; x is relative to the speed of {first}")
    if "chosen" in result:
        took_ms = {one["name"]: one["batches"]["1"]["request_ms"]["median"] for one in result["formats"]}
        took = "" if result["chosen"] is None else f" in {took_ms[result['chosen']]:.0f} ms,"
        size = f"{result['prompt_tokens']} + {result['new_tokens']} tokens"
        limit = f"within {result['max_ms']:g} ms"
        lines.append(f"{result['chosen'] or 'no format'} answers a request of {size}{took} {limit}")
    return lines


def compare_lines(result: Result) -> list[str]:
    """`compare`: each side, then each pair."""
    from student_train.compare.page import difference_words, verdict_words

    lines = []
    for side in result["sides"]:
        latency, first = side["latency_s"], side["first_token_s"]
        parts = [f"{_share(side['accuracy'] and side['accuracy']['mean'])} correct"]
        parts += [f"{side['num_failed']} failed"] if side["num_failed"] else []
        parts += [f"{side['num_undecided']} undecided", f"{side['num_cut']} cut"]
        parts += [f"latency p50 {latency['p50']:.2f} s, p99 {latency['p99']:.2f} s"] if latency else []
        parts += [f"first token p50 {first['p50']:.3f} s"] if first else []
        parts += [f"{side['tokens_per_answer']:.0f} tokens per answer"] if side["tokens_per_answer"] is not None else []
        if side["cost"] is not None:
            each = (
                ""
                if side["cost_per_correct"] is None
                else f" ({format_price(side['cost_per_correct'])} per right answer)"
            )
            parts.append(f"cost {format_price(side['cost'])}{each}")
        lines.append(f"{side['name']:10} {', '.join(parts)}")
    pairs = [f"{difference_words(pair)}. {verdict_words(pair)}" for pair in result["pairs"]]
    return [*lines, *pairs, str(result["page"])]


def _agreement(result: Result) -> str:
    found = result["agreement"]
    return (
        f"against the float student, in {result['runtime']}: top-1 agreement {found['top1_agreement']:.1%}  KL "
        f"{found['kl']:.4f}  JSD {found['js']:.4f}  retention {found['retention']:.1%} on "
        f"{format_plural(found['num_chains'], 'chain')}, {format_count(found['num_tokens'])} tokens"
    )


def _stage_lines(stage: Result) -> list[str]:
    memory = stage["memory_gib_per_rank"]
    parts = ", ".join(f"{name} {size:.1f}" for name, size in memory.items() if name not in ("total", "offloaded"))
    beside = f", and {memory['offloaded']:.1f} GiB of the CPU's" if "offloaded" in memory else ""
    long = [f"{stage[f'num_{what}']} {what}" for what in ("truncated", "skipped", "split") if stage[f"num_{what}"]]
    cut = f"; long chains: {', '.join(long)}, {format_count(stage['num_tokens_lost'])} tokens lost" if long else ""
    fill = f", {stage['pack_fill']:.0%} full" if stage["pack_fill"] is not None else ""
    chains = format_plural(stage["num_chains"], "chain")
    completion, prompt = format_count(stage["num_tokens"]), format_count(stage["num_prompt_tokens"])
    what = "text to learn" if stage["is_text"] else "tokens"
    # Of pairs it would count wrong chains and those without a partner, which their own line explains.
    num_left_out = 0 if (stage["prepared"] or {}).get("num_pairs") else stage["num_left_out"]
    left_out = f"; {num_left_out} left out (no {what}, or weight 0)" if num_left_out else ""
    packs, steps = format_plural(stage["packs_per_epoch"], "pack"), format_plural(stage["steps_per_epoch"], "step")
    epoch = f"{packs} per epoch{fill}; {steps} per epoch"
    return [
        f"stage      {stage['name']}: trains {stage['trainable']}",
        f"selection  {chains}, {completion} completion tokens, {prompt} prompt tokens{left_out}{cut}",
        *_example_lines(stage),
        *_projection_lines(stage),
        *_own_words_lines(stage),
        *_term_lines(stage),
        f"batch      {format_plural(stage['packs_per_step'], 'pack')}: {stage['accumulation']} per rank",
        f"length     {epoch}, {format_plural(stage['num_steps'], 'step')} in all",
        *(f"loss       {name}: {targets}" for name, targets in stage["losses"].items()),
        *_feature_lines(stage),
        *_adversarial_lines(stage),
        *_temperature_lines(stage["temperatures"]),
        f"memory     about {memory['total']:.1f} GiB per rank ({parts}){beside}",
    ]


def _feature_lines(stage: Result) -> list[str]:
    found = stage["features"]
    if found is None:
        return []
    held = f"{found['num_chains']} of {format_plural(stage['num_chains'], 'chain')}"
    return [f"features   {', '.join(found['sets'])}: {held} have them"]


def _example_lines(stage: Result) -> list[str]:
    if stage["num_examples"] is None:
        return []
    read = format_count(stage["num_packed_tokens"])
    per_chain = stage["num_examples"] / stage["num_chains"]
    return [f"steps      {stage['num_examples']} examples, {per_chain:.1f} per chain; an epoch reads {read} tokens"]


def _adversarial_lines(stage: Result) -> list[str]:
    asked = stage["adversarial"]
    if asked is None:
        return []
    passes = 1 + asked["fraction"] * asked["steps"]
    return [f"disturbed  {asked['fraction']:.0%} of the packs: {passes:.1f} passes per pack on average"]


def _projection_lines(stage: Result) -> list[str]:
    made = stage["projection"]
    if made is None:
        return []
    student, teacher = made["num_common"] / stage["num_tokens"], made["num_common"] / max(made["num_teacher_tokens"], 1)
    problems = {
        "num_changed": "that the student's tokenizer cannot spell",
        "num_respelled": "whose tokens do not spell their text",
    }
    text = [f"{made[name]} {problem}" for name, problem in problems.items() if made[name]]
    special = ", ".join(f"{mine} as {'text' if own is None else own}" for mine, own in made["special"])
    return [
        f"vocabulary {student:.1%} of the student's tokens begin where a teacher token does ({teacher:.1%} of the "
        f"teacher's); {made['mass']:.1%} of the teacher's mass is on student tokens"
        + (f"; chains trained on text only: {', '.join(text)}" if text else ""),
        *([f"special    {special}"] if special else []),
    ]


def _own_words_lines(stage: Result) -> list[str]:
    made, lines = stage["prepared"], []
    if stage["num_own_chains"] is not None:
        lines.append(f"own chains {stage['num_own_chains']} were generated by the student")
    if made is not None and made["num_mixed"]:
        lines.append(f"teachers   {made['num_mixed']} chains have several")
    if made is not None and made["num_pairs"]:
        lines.append(
            f"pairs      {made['num_pairs']} of a right and a wrong chain; {made['num_unpaired']} chains left out (no "
            "partner, or together longer than a pack)"
        )
    elif stage["num_negative"]:
        lines.append(f"wrong      {format_plural(stage['num_negative'], 'chain')} to move away from")
    return lines


def _term_lines(stage: Result) -> list[str]:
    found = stage["terms"]
    if found is None:
        return []
    shown = ", ".join(f"{one['term']} {one['count']}" for one in found["terms"][:SHOWN_TERMS])
    more = f" and {len(found['terms']) - SHOWN_TERMS} more" if len(found["terms"]) > SHOWN_TERMS else ""
    missing = found["unmatched"]
    never = ", ".join(missing[:SHOWN_TERMS]) + (", ..." if len(missing) > SHOWN_TERMS else "")
    marked = f"{format_count(found['num_tokens'])} tokens ({found['num_tokens'] / stage['num_tokens']:.1%})"
    where = format_plural(found["num_chains"], "chain")
    return [
        f"terms      {marked} of {where} count {found['weight']:g}x: {shown}{more}",
        *([f"           never found: {never}"] if missing else []),
    ]


def _temperature_lines(steps: list[tuple[int, float]]) -> list[str]:
    if [temperature for _, temperature in steps] == [1.0]:
        return []
    return ["temperature " + ", ".join(f"{temperature:g} from step {step + 1}" for step, temperature in steps)]


def _course(stage: Result) -> str:
    """From the first step to the last: the whole loss where its weights stayed as they were, and its parts."""
    rise = stage["adversarial_rise"]
    return _losses(stage) + ("" if rise is None else f"; disturbed prompts raised the loss by {rise:.4f} on average")


def _losses(stage: Result) -> str:
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
    # Evaluations of older runs have none.
    if result.get("bits_per_byte") is not None:
        parts.append(f"bits per byte {result['bits_per_byte']:.4f}")
    if result["forward_kl"] is not None:
        parts += [
            f"KL {result['forward_kl']:.4f}",
            f"JSD {result['js']:.4f}",
            f"top-1 agreement {result['top1_agreement']:.1%}",
        ]
    return "  ".join([*parts, f"confidence - accuracy {result['confidence_minus_accuracy']:+.3f}"])
