"""`make demo`: the whole pipeline on real input, from prompts to a trained student, in minutes on two CPU cores.

Runs the two programs as a user would, prints each command, and keeps everything under runs/demo/: the teacher, the
cache, the student, report.html and summary.json. An interrupted demo resumes where it stopped; a finished one shows its
result again.
"""

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from stillroom.errors import DataError
from stillroom.log import console, format_bytes, format_duration, note
from stillroom.storage.paths import write_text_atomic

Result = dict[str, Any]

FOLDER = Path("runs/demo")
CONFIGS = Path("benchmarks/demo")
INTERRUPTED = 130
EXPORTS = ("export", "export-int8")
QUESTION = {"system": "Answer in one sentence.", "user": "What is the capital of Italy?"}
NUM_ANSWERS, MAX_NEW_TOKENS = 48, 64
"""Held-out prompts that the student answers, and the longest answer."""
MEASURES = {
    "kl": "KL to the teacher (nats)",
    "js": "Jensen-Shannon divergence (nats)",
    "cross_entropy": "cross-entropy (nats)",
    "top1_agreement": "top-1 agreement",
}
CAVEAT = (
    "This shows that the whole pipeline works on real weights and that the student learns to answer questions like "
    "those it saw. It is too small to show how well distillation works at scale."
)
QUESTIONS = {
    "How long are the chains, how sure was the teacher, and how often is it right?": (
        "SELECT source, count(*) AS chains, sum(num_tokens) AS tokens, round(avg(num_tokens)) AS mean_tokens, "
        "round(avg(mean_entropy), 3) AS mean_entropy, round(avg(correct::INT), 3) AS pass_rate "
        "FROM chains GROUP BY source ORDER BY mean_entropy"
    ),
    "Which of its own tokens surprised it most?": (
        "SELECT piece, rank, round(exp(logprob), 4) AS prob, round(entropy, 2) AS entropy, position, source "
        "FROM tokens ORDER BY logprob LIMIT 5"
    ),
    "And what else did it consider at the first of them?": (
        "SELECT k.rank, k.piece, round(k.prob, 3) AS prob FROM topk k JOIN "
        "(SELECT sample_id, position FROM tokens ORDER BY logprob LIMIT 1) t USING (sample_id, position) "
        "ORDER BY k.rank LIMIT 5"
    ),
}


def main() -> None:
    """Runs the steps that have no result yet, then writes the report and the summary."""
    if (FOLDER / "summary.json").exists():
        _show(json.loads((FOLDER / "summary.json").read_text(encoding="utf-8")))
        note(f"This demo has already run. To run it again: rm -r {FOLDER}; make demo")
        return
    clock = Clock()
    teacher_config, student_config = str(CONFIGS / "teacher.yaml"), str(CONFIGS / "student.yaml")
    answers = ["--generate", str(NUM_ANSWERS), "--max-new-tokens", str(MAX_NEW_TOKENS)]

    _heading(1, "The teacher: SmolLM2-135M-Instruct with its real weights")
    if not (FOLDER / "teacher").exists():
        note("unpacking the weights into a Hugging Face folder")
        _convert_teacher(FOLDER / "teacher")
    note(f"{FOLDER / 'teacher'} is the model that both programs load")
    _heading(2, "Generate its answers once, with the distribution of every token")
    built = clock.step("build", ["teacher-cache", "build", teacher_config])
    verified = clock.step("verify", ["teacher-cache", "verify", str(FOLDER / "cache")])
    _heading(3, "Query the cache")
    for question, query in QUESTIONS.items():
        console.print(f"\n[italic]{question}[/italic]")
        _run(["teacher-cache", "sql", str(FOLDER / "cache"), query])
    _heading(4, "Cut a student from the teacher and train it from the cache alone")
    clock.step("init", ["student-train", "init", student_config])
    trained = clock.step("train", ["student-train", "run", student_config])
    _heading(5, "Let the student answer held-out prompts, before and after training")
    before = clock.step("before", ["student-train", "eval", student_config, "--initial", *answers])
    after = clock.step("after", ["student-train", "eval", student_config, *answers])
    _heading(6, "Export it as a Hugging Face folder")
    clock.step("export", ["student-train", "export", student_config, "--out", str(FOLDER / "export")])
    _heading(7, "Export it with 8-bit weights, check it, and ask it a question")
    int8 = [str(FOLDER / "export-int8"), "--format", "onnx-int8", "--check-chains", "12"]
    exported = clock.step("export_int8", ["student-train", "export", student_config, "--out", *int8])
    load = ["--rounds", "1", "--prompt-tokens", "32", "--new-tokens", "16"]
    speeds = clock.step("bench", ["student-train", "bench", *(str(FOLDER / one) for one in EXPORTS), *load])
    answer = _ask(FOLDER / "export-int8")

    # Imported late: it loads torch, which nothing before this line needs.
    from benchmarks.demo.page import write_demo_report

    summary = {**summarise(built, trained, before, after, clock.seconds), **_int8(exported, speeds, answer)}
    assert verified["ok"]
    write_demo_report(FOLDER / "report.html", FOLDER, summary)
    write_text_atomic(FOLDER / "summary.json", json.dumps(summary, indent=2) + "\n")
    _show(summary)


class Clock:
    """Runs steps, keeps their results, and adds up their time, including steps of an earlier, interrupted demo."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._before_s = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the whole demo."""
        return self._before_s + time.monotonic() - self._started_s

    def step(self, name: str, command: list[str]) -> dict[str, Any]:
        """The JSON result of a command, which is run only if no earlier demo has finished it."""
        path = FOLDER / "steps" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            note(f"  {name}: already done")
            self._before_s += found["step_seconds"]
            return found
        started_s = time.monotonic()
        result: dict[str, Any] = json.loads(_run([*command, "--json"], capture=True))
        write_text_atomic(path, json.dumps({**result, "step_seconds": time.monotonic() - started_s}))
        return result


def summarise(built: Result, trained: Result, before: Result, after: Result, seconds: float) -> dict[str, Any]:
    """The figures of the whole demo, from what the programs printed."""
    measures = {"kl": "forward_kl", "js": "js", "cross_entropy": "cross_entropy", "top1_agreement": "top1_agreement"}
    heldout = {
        f"heldout_{name}_{when}": trained[f"heldout_{when}"][key]
        for name, key in measures.items()
        for when in ("before", "after")
    }
    return {
        "num_chains": built["num_chains"],
        "num_tokens": built["num_tokens"],
        "bytes_per_token": round(built["bytes_per_token"], 2),
        "signal_bytes_per_token": round(built["signal_bytes_per_token"], 2),
        "pass_rate": built["pass_rate"],
        "build_tokens_per_s": built["tokens_per_s"] and round(built["tokens_per_s"], 1),
        "train_tokens_per_s": round(trained["tokens_per_s"], 1),
        **heldout,
        "num_answers": after["generation"]["num_prompts"],
        "heldout_pass_rate_teacher": after["generation"]["teacher_accuracy"],
        "heldout_pass_rate_before": before["generation"]["accuracy"],
        "heldout_pass_rate_after": after["generation"]["accuracy"],
        "seconds": round(seconds, 1),
    }


def _ask(folder: Path) -> str:
    """The 8-bit student's answer to QUESTION, in its own runtime."""
    from stillroom.models import load_tokenizer
    from student_train.export.worker import RuntimeWorker

    tokenizer = load_tokenizer(str(folder))
    messages = [{"role": role, "content": content} for role, content in QUESTION.items()]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer: list[int] = []
    with RuntimeWorker("onnx", folder, None, is_quick=True) as runtime:
        # Token by token: the runtime's own generation, made for measuring, does not stop at the end of sequence.
        while len(answer) < MAX_NEW_TOKENS // 2:
            scores = runtime.scores([*prompt, *answer], [len(prompt) + len(answer) - 1])
            assert scores.logits_NV is not None
            token = int(scores.logits_NV[0].argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
    return str(tokenizer.decode(answer)).strip()


def _int8(exported: Result, speeds: Result, answer: str) -> dict[str, Any]:
    plain, small = (one["batches"]["1"]["decode_tokens_per_s"]["median"] for one in speeds["formats"])
    return {
        "int8_top1_agreement": exported["agreement"]["top1_agreement"],
        "int8_kl": exported["agreement"]["kl"],
        "int8_size_bytes": exported["size_bytes"],
        "float_size_bytes": exported["float_size_bytes"],
        "int8_tokens_per_s": round(small, 1),
        "float_tokens_per_s": round(plain, 1),
        "question": QUESTION["user"],
        "int8_answer": answer,
    }


def _convert_teacher(folder: Path) -> None:
    """Converts the teacher in this process: the student's commands need torch and transformers here anyway."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: transformers draws a bar for every tensor
    from benchmarks.demo.smollm2 import ensure_teacher
    from student_train.model.student import use_cpu_where_there_is_no_gpu

    use_cpu_where_there_is_no_gpu()  # transformers imports DeepSpeed, which warns where it has to find that out itself
    try:
        ensure_teacher(folder)
    except DataError as error:
        sys.exit(f"demo: {error}")


def _heading(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}. {text}[/bold cyan]")


def _run(command: list[str], *, capture: bool = False) -> str:
    """Prints a command and runs it; returns its stdout if captured. Raises KeyboardInterrupt if it was interrupted."""
    console.print(f"[dim]$ {shlex.join(command)}[/dim]", soft_wrap=True)
    code, stdout = _student_train(command) if command[0] == "student-train" else _subprocess(command, capture=capture)
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != 0:
        note(f"demo: the command above failed with exit code {code}")
        sys.exit(code)
    return stdout


def _student_train(command: list[str]) -> tuple[int, str]:
    """Calls the program's entry point in this process, which imports torch, transformers and DeepSpeed only once."""
    from student_train.cli import main as student_train

    arguments, stdout, code = sys.argv, io.StringIO(), 0
    sys.argv = command
    try:
        with contextlib.redirect_stdout(stdout):
            student_train()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
    return code, stdout.getvalue()


def _subprocess(command: list[str], *, capture: bool) -> tuple[int, str]:
    program = str(Path(sys.executable).parent / command[0])
    # Ctrl-C reaches the command too, which saves and exits; subprocess.run would kill it before it has saved.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        stdout = subprocess.PIPE if capture else None
        ended = subprocess.run([program, *command[1:]], stdout=stdout, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    return ended.returncode, ended.stdout or ""


def _show(summary: dict[str, Any]) -> None:
    table = Table(title="On held-out prompts", title_justify="left")
    for column in ("", "teacher", "student before", "student after"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        f"correct answers, {summary['num_answers']} prompts",
        *(f"{summary[f'heldout_pass_rate_{who}']:.0%}" for who in ("teacher", "before", "after")),
    )
    for name, label in MEASURES.items():
        table.add_row(label, "", *(f"{summary[f'heldout_{name}_{when}']:.3f}" for when in ("before", "after")))
    console.print()
    console.print(table)
    note(
        f"{summary['num_chains']} chains, {summary['num_tokens']} tokens at {summary['bytes_per_token']:.0f} B/token, "
        f"{summary['pass_rate']:.0%} correct; teacher {summary['build_tokens_per_s']:.0f} tok/s, training "
        f"{summary['train_tokens_per_s']:.0f} tok/s; {format_duration(summary['seconds'])} in all"
    )
    note(
        f"8-bit ONNX: {format_bytes(summary['int8_size_bytes'])} (float {format_bytes(summary['float_size_bytes'])}), "
        f"top-1 agreement with the float student {summary['int8_top1_agreement']:.1%}, decoding "
        f"{summary['int8_tokens_per_s']:.0f} tok/s (float {summary['float_tokens_per_s']:.0f} in transformers)"
    )
    note(f"{summary['question']} {summary['int8_answer']}")
    note(CAVEAT)
    print(f"{FOLDER / 'report.html'}    the whole pipeline with plots: open it in a browser")
    print(f"{FOLDER / 'summary.json'}   the figures as JSON")
    note("Next: . .venv/bin/activate, then the commands of README.md from `Query the cache` on.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        note("Interrupted. Resume with: make demo")
        sys.exit(INTERRUPTED)
