"""`make demo`: the whole line on real input, from prompts to a better student, in under ten minutes on two CPU cores.

Runs the two programs as a user would, prints what it runs, and keeps everything under runs/demo/: the teacher, the
cache, the student, report.html and summary.json. A demo that was interrupted goes on where it stopped; one that is
complete is shown again.
"""

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

from stillroom.log import console, format_duration, note
from stillroom.storage.paths import write_text_atomic

FOLDER = Path("runs/demo")
CONFIGS = Path("benchmarks/demo")
INTERRUPTED = 130
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
        note(f"This demo was done before. Anew: rm -r {FOLDER}; make demo")
        return
    clock = Clock()
    teacher_config, student_config = str(CONFIGS / "teacher.yaml"), str(CONFIGS / "student.yaml")

    _heading(1, "The teacher: SmolLM2-135M-Instruct with its real weights")
    if not (FOLDER / "teacher").exists():
        note("unpacking its weights into a Hugging Face folder")
        _convert_teacher(FOLDER / "teacher")
    note(f"{FOLDER / 'teacher'} is what both programs are given")
    _heading(2, "Ask it, and keep the distribution of every token")
    built = clock.step("build", ["teacher-cache", "build", teacher_config])
    verified = clock.step("verify", ["teacher-cache", "verify", str(FOLDER / "cache")])
    _heading(3, "Ask the cache")
    for question, query in QUESTIONS.items():
        console.print(f"\n[italic]{question}[/italic]")
        _run(["teacher-cache", "sql", str(FOLDER / "cache"), query])
    _heading(4, "Cut a student from the teacher, and train it from the cache alone")
    clock.step("init", ["student-train", "init", student_config])
    trained = clock.step("train", ["student-train", "run", student_config])
    _heading(5, "Take it away: a Hugging Face folder")
    clock.step("export", ["student-train", "export", student_config, "--out", str(FOLDER / "export")])

    # Not before: it brings torch, which the demo needs nowhere else.
    from benchmarks.demo.page import write_demo_report

    summary = summarise(built, trained, clock.seconds)
    assert verified["ok"]
    write_demo_report(FOLDER / "report.html", FOLDER, summary)
    write_text_atomic(FOLDER / "summary.json", json.dumps(summary, indent=2) + "\n")
    _show(summary)


class Clock:
    """Runs steps, keeps their results, and counts what all of them took, also those of an earlier, interrupted demo."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._before_s = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the whole line."""
        return self._before_s + time.monotonic() - self._started_s

    def step(self, name: str, command: list[str]) -> dict[str, Any]:
        """The JSON result of a command that is run once; an interrupted demo finds it again."""
        path = FOLDER / "steps" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            note(f"  {name} was done before")
            self._before_s += found["step_seconds"]
            return found
        started_s = time.monotonic()
        result: dict[str, Any] = json.loads(_run([*command, "--json"], capture=True))
        write_text_atomic(path, json.dumps({**result, "step_seconds": time.monotonic() - started_s}))
        return result


def summarise(built: dict[str, Any], trained: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of the whole line, out of what the programs printed."""
    before, after = trained["heldout_before"], trained["heldout_after"]
    return {
        "num_chains": built["num_chains"],
        "num_tokens": built["num_tokens"],
        "bytes_per_token": round(built["bytes_per_token"], 2),
        "signal_bytes_per_token": round(built["signal_bytes_per_token"], 2),
        "pass_rate": built["pass_rate"],
        "build_tokens_per_s": built["tokens_per_s"] and round(built["tokens_per_s"], 1),
        "train_tokens_per_s": round(trained["tokens_per_s"], 1),
        "heldout_kl_before": before["forward_kl"],
        "heldout_kl_after": after["forward_kl"],
        "heldout_js_before": before["js"],
        "heldout_js_after": after["js"],
        "heldout_cross_entropy_before": before["cross_entropy"],
        "heldout_cross_entropy_after": after["cross_entropy"],
        "top1_agreement_before": before["top1_agreement"],
        "top1_agreement_after": after["top1_agreement"],
        "seconds": round(seconds, 1),
    }


def _convert_teacher(folder: Path) -> None:
    """In a process of its own, on the CPU: what transformers loads and prints for it is of no use to what follows."""
    quiet = {**os.environ, "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([sys.executable, "-m", "benchmarks.demo.smollm2", str(folder)], env=quiet, check=False)
    if ended.returncode != 0:
        sys.exit(ended.returncode)


def _heading(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}. {text}[/bold cyan]")


def _run(command: list[str], *, capture: bool = False) -> str:
    console.print(f"[dim]$ {shlex.join(command)}[/dim]", soft_wrap=True)
    program = str(Path(sys.executable).parent / command[0])
    # Ctrl-C reaches the command too, which saves and ends; killing it meanwhile would cost what it was about to save.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        stdout = subprocess.PIPE if capture else None
        ended = subprocess.run([program, *command[1:]], stdout=stdout, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    if ended.returncode in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if ended.returncode != 0:
        note(f"demo: stopped, the command above failed with exit code {ended.returncode}")
        sys.exit(ended.returncode)
    return ended.stdout or ""


def _show(summary: dict[str, Any]) -> None:
    table = Table(title="On held-out prompts", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in (
        ("heldout_kl", "KL to the teacher (nats)"),
        ("heldout_js", "Jensen-Shannon divergence (nats)"),
        ("heldout_cross_entropy", "cross-entropy (nats)"),
        ("top1_agreement", "top-1 agreement"),
    ):
        table.add_row(label, f"{summary[f'{name}_before']:.3f}", f"{summary[f'{name}_after']:.3f}")
    console.print()
    console.print(table)
    note(
        f"{summary['num_chains']} chains, {summary['num_tokens']} tokens at {summary['bytes_per_token']:.0f} B/token; "
        f"the teacher wrote {summary['build_tokens_per_s']:.0f} tok/s, the student read "
        f"{summary['train_tokens_per_s']:.0f} tok/s; "
        f"{format_duration(summary['seconds'])} in all"
    )
    print(f"{FOLDER / 'report.html'}    open it in a browser: the whole line with plots")
    print(f"{FOLDER / 'summary.json'}   the figures, for programs")
    note("next, in its environment (. .venv/bin/activate): the commands of README.md, from `Ask the cache` on")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        note("Interrupted. Resume with: make demo")
        sys.exit(INTERRUPTED)
