"""Reports: whole, self-contained, escaped, in the reader's theme, readable on a phone; a browser sees what we mean."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.demo.page import write_demo_report
from stillroom.cache.catalog import Catalog
from stillroom.cache.reader import open_cache
from stillroom.config import Json, plain
from stillroom.errors import ConfigError, DataError
from stillroom.html.charts import Drawing, Group, Line, Mark, bars, histogram, line_chart, plain_number
from stillroom.html.report import Figure, Number, Numbers, Piece, Section, Table, Text, format_span, write_report
from student_train.config.run import TrainConfig
from student_train.report import student_sections, write_student_report
from teacher_cache.inspect.report import cache_sections, sample_signals, write_cache_report
from teacher_cache.inspect.show import write_chain_page
from tests.helpers.caches import make_cache

NASTY = "<script>alert(1)</script> & $x^2$ {{ 7 * 7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars"
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


def fake_run(folder: Path, num_steps: int = 80, scale: float = 1.0, **config: Any) -> Path:
    """A run folder with the three files that a report reads."""
    folder.mkdir(parents=True)
    steps = [
        {
            "stage": "distill",
            "stage_number": 0,
            "step": step,
            "epoch": 0,
            "loss": scale * (0.3 + 2 / step),
            "parts": {"forward_kl": scale * (0.2 + 2 / step), "cross_entropy": 0.9 + 1 / step},
            "weights": {"forward_kl": 0.9, "cross_entropy": 0.1},
            "learning_rate": 1e-4,
            "grad_norm": None,
            "num_tokens": 1000,
            "num_loss_tokens": 900,
            "tokens_per_s": 500.0,
            "stall_frac": 0.01,
            "memory_gib": 1.5,
            "step_s": 2.0,
            "time_s": 2.0 * step,
        }
        for step in range(1, num_steps + 1)
    ]
    write_steps(folder, steps)
    evals = [evaluation(0, 2.0 * scale, 0.4), evaluation(num_steps, 0.5 * scale, 0.7)]
    (folder / "eval.json").write_text(json.dumps(evals))
    stage = {"losses": {"forward_kl": 0.9, "cross_entropy": 0.1}, "learning_rate": 1e-4}
    write_config(folder, {"stages": [stage], **config})
    return folder


def write_config(folder: Path, changes: Json) -> None:
    """The configuration that the run began with."""
    whole = {"run": str(folder), "student": {"model": "small"}, "data": {"caches": ["cache"]}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(TrainConfig.model_validate(whole))))


def write_steps(folder: Path, steps: Sequence[Json]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def in_two_stages(folder: Path, num_first: int, *, weights_change: bool = False) -> Path:
    """A run whose later steps are of a stage `adapt`, where the whole loss jumps and the cross-entropy goes on falling.

    With `weights_change` the weights of `adapt` drift from step to step.
    """
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step in steps[num_first:]:
        share = step["step"] / len(steps) if weights_change else 0.5
        weights = {"forward_kl": 1 - share, "cross_entropy": share}
        step |= {"stage": "adapt", "stage_number": 1, "step": step["step"] - num_first, "weights": weights}
        step["loss"] += 100.0
    write_steps(folder, steps)
    return folder


def evaluation(step: int, kl: float, agreement: float) -> dict[str, object]:
    return {
        "stage": "distill",
        "stage_number": 0,
        "step": step,
        "num_chains": 8,
        "num_tokens": 2000,
        "cross_entropy": kl + 0.5,
        "forward_kl": kl,
        "reverse_kl": kl,
        "js": kl / 6,
        "top1_agreement": agreement,
        "accuracy": agreement,
        "confidence": 0.7,
        "confidence_minus_accuracy": 0.0,
        "entropy": 0.5,
    }


class Outline(HTMLParser):
    """Text of a page by kind of element, and whether its elements are closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def outline(path: Path) -> Outline:
    parsed = Outline()
    parsed.feed(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


def assert_self_contained(page: str) -> None:
    assert "<script" not in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "url(http" not in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("codec", ["topk-u8", "topk-f32"])
def test_a_cache_report_says_what_the_cache_holds(tmp_path: Path, codec: str) -> None:
    made = make_cache(tmp_path / "cache", num_chains=100, codec=codec, max_tokens=200, unfinished_frac=0.0)
    write_cache_report(made.catalog, tmp_path / "report.html", price_per_hour=2.0)
    page = (tmp_path / "report.html").read_text()
    assert_self_contained(page)
    found = outline(tmp_path / "report.html")
    tokens = sum(len(chain.token_ids) for chain in made.chains)
    assert "100" in found.texts["dd"]
    assert any(f"{tokens / 1000:.1f}k" in text for text in found.texts["dd"])
    titles = " ".join(found.texts["h3"])
    for title in ("Length of chains", "Pass rate by source", "Entropy along the chain", "Bytes by column"):
        assert title in titles
    assert found.texts["text"].count("completion tokens") == 1
    assert any(text.startswith("right: median ") for text in found.texts["text"])
    assert "synthetic-teacher" in " ".join(found.texts["td"])


def test_right_and_wrong_are_drawn_apart_from_twenty_chains_on(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=12)
    write_cache_report(made.catalog, tmp_path / "report.html")
    texts = outline(tmp_path / "report.html").texts["text"]
    assert not any(text.startswith("right: median ") for text in texts)
    assert any(text.startswith("median ") for text in texts)


def test_an_empty_cache_has_a_report(tmp_path: Path) -> None:
    write_cache_report(Catalog.create(tmp_path / "empty"), tmp_path / "report.html")
    assert "0" in outline(tmp_path / "report.html").texts["dd"]


def test_a_large_cache_is_sampled_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_cache(tmp_path / "cache", num_chains=60)
    whole = sample_signals(made.catalog)
    part = sample_signals(made.catalog, max_tokens=300)
    assert whole is not None
    assert part is not None
    assert whole.is_whole
    assert len(whole.token_ids_T) == sum(len(chain.token_ids) for chain in made.chains)
    assert not part.is_whole
    assert 300 <= len(part.token_ids_T) < len(whole.token_ids_T)
    monkeypatch.setattr("teacher_cache.inspect.report.sample_signals", lambda catalog: sample_signals(catalog, 300))
    intros = " ".join(section.intro for section in cache_sections(made.catalog))
    assert "From a sample of" in intros


def test_a_student_report_tells_before_from_after(tmp_path: Path) -> None:
    write_student_report([fake_run(tmp_path / "run")], tmp_path / "report.html")
    assert_self_contained((tmp_path / "report.html").read_text())
    found = outline(tmp_path / "report.html")
    assert "Before and after training" in found.texts["h3"]
    row = found.texts["td"].index("KL to the teacher")
    assert found.texts["td"][row : row + 4] == ["KL to the teacher", "2.000 nats", "0.500 nats", "-75%"]
    row = found.texts["td"].index("top-1 agreement")
    assert found.texts["td"][row : row + 4] == ["top-1 agreement", "40.0%", "70.0%", "-"]
    assert "Forward KL in training" in found.texts["h3"]
    assert "forward KL" in found.texts["dt"]
    assert [text for text in found.texts["td"] if text.startswith("distill")] == ["distill, step 0", "distill, step 80"]


def test_runs_are_compared_by_name(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "a" / "run"), fake_run(tmp_path / "b" / "run", scale=0.5)]
    write_student_report(runs, tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    assert "a/run" in found.texts["td"]
    assert {"Held-out KL to the teacher", "Forward KL in training"} <= set(found.texts["h3"])
    assert found.texts["text"].count("b/run") == found.texts["text"].count("a/run") >= 6


def test_numbers_of_a_run_agree(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", num_steps=4)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # One slow step that waited half of its time: 6 of 18 seconds in all, a mean of 12.5% and a median of 0.
    for step in steps:
        step |= {"stall_frac": 0.0, "tokens_per_s": 500.0}
    steps[0] |= {"stall_frac": 0.5, "step_s": 12.0, "tokens_per_s": 83.3}
    write_steps(run, steps)
    write_student_report([run], tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    assert "33.3% waiting for data" in found.texts["dd"]
    assert "222 tok/s" in found.texts["dd"]
    assert {"Speed", "Waiting for data", "Learning rate"} <= set(found.texts["h3"])
    assert "tokens read (thousands)" in found.texts["text"]


@pytest.mark.parametrize("weights_change", [False, True])
def test_losses_of_stages_are_shown_separately(tmp_path: Path, weights_change: bool) -> None:
    run = in_two_stages(fake_run(tmp_path / "run", num_steps=10), 4, weights_change=weights_change)
    write_student_report([run], tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    titles, cells = found.texts["h3"], found.texts["td"]
    assert not any(title.startswith("Loss:") for title in titles)
    assert "loss" not in found.texts["dt"]
    place = cells.index("adapt, 6 steps: cross-entropy")
    assert cells[place + 2 : place + 4] == ["1.100", "1.000"]
    assert "in training; 1.100 when adapt began" in found.texts["dd"]
    assert "distill, 4 steps: weighted sum" in cells
    assert ("adapt, 6 steps: weighted sum" in cells) != weights_change
    assert ("0.5 → 1" in cells) == weights_change
    # The four plots over steps of one stage and another: two parts, learning rate, speed, waiting, three evaluations.
    charts = [text for text in found.texts["text"] if text == "adapt"]
    assert len(charts) == sum("tokens read" in text for text in found.texts["text"]) >= 8


def test_a_run_of_one_stage_has_no_marks_and_one_loss(tmp_path: Path) -> None:
    write_student_report([fake_run(tmp_path / "run", num_steps=10)], tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    assert "Loss: weighted sum of its parts" in found.texts["h3"]
    assert "distill" not in found.texts["text"]
    assert "loss" in found.texts["dt"]


def test_a_comparison_begins_with_what_differs(tmp_path: Path) -> None:
    one = fake_run(tmp_path / "one", num_steps=10)
    stage = {"losses": {"forward_kl": 0.9, "cross_entropy": 0.1}, "learning_rate": 6e-4}
    other = fake_run(tmp_path / "other", num_steps=5, stages=[stage], eval={"max_chains": 7})
    write_student_report([one, other], tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    titles, cells = found.texts["h3"], found.texts["td"]
    assert titles[0] == "The configurations differ in 2 keys"
    assert cells[:6] == ["stages.0.learning_rate", "0.0001", "0.0006", "eval.max_chains", "512", "7"]
    assert titles[1] == "Progress of each run"
    speed = cells.index("optimizer steps")
    assert cells[speed : speed + 3] == ["optimizer steps", "10", "5"]
    write_student_report([one, fake_run(tmp_path / "same", num_steps=5)], tmp_path / "same.html")
    assert "The configurations agree in everything" in (tmp_path / "same.html").read_text()


def test_missing_stages_are_reported_once(tmp_path: Path) -> None:
    first = {"name": "head", "learning_rate": 1e-3}
    last = {"name": "adapt", "learning_rate": 1e-4}
    runs = [
        fake_run(tmp_path / "one", stages=[first]),
        fake_run(tmp_path / "two", stages=[first, last]),
        fake_run(tmp_path / "three", stages=[first, {**last, "max_steps": 9}]),
    ]
    write_student_report(runs[:2], tmp_path / "two.html")
    assert not any("stages.1" in cell for cell in outline(tmp_path / "two.html").texts["td"])
    write_student_report(runs, tmp_path / "three.html")
    cells = outline(tmp_path / "three.html").texts["td"]
    assert cells[:4] == ["stages.1.max_steps", "no such stage", "not set", "9"]


def test_a_price_makes_device_hours_a_cost(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, num_steps=10) for name in "ab"]
    with pytest.raises(ConfigError, match="recorded no times"):
        student_sections(*runs, price_per_hour=2.0)
    call = {"started_at": "", "device": "H200", "num_devices": 8, "seconds": 1800.0, "num_tokens": 5000}
    (runs[0] / "sessions.json").write_text(json.dumps([call, {**call, "device": "CPU", "num_devices": 1}]))
    result = write_student_report(runs, tmp_path / "report.html", 2.0)
    assert (result["costs"]["a"]["cost"], result["costs"]["b"]) == (9.0, None)
    found = outline(tmp_path / "report.html")
    assert "cost at 2 an hour" in found.texts["th"]
    cells = found.texts["td"]
    place = cells.index("4 h 0 min of H200, 30 min 0 s of CPU")
    assert cells[place - 1 : place + 4] == ["a", "4 h 0 min of H200, 30 min 0 s of CPU", "2 calls", "10.0k", "9.00"]


def test_stages_alone_do_not_make_runs_differ(tmp_path: Path) -> None:
    runs = [in_two_stages(fake_run(tmp_path / name, num_steps=10), 4) for name in "ab"]
    write_student_report(runs, tmp_path / "report.html")
    found = outline(tmp_path / "report.html")
    assert "Cross-entropy in training" in found.texts["h3"]
    assert "Before its weight." in found.texts["figcaption"]
    assert "The configurations agree" in (tmp_path / "report.html").read_text()


def test_evaluations_on_other_chains_are_not_compared(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name) for name in ("a", "b")]
    warning = "The runs were evaluated on different selections of chains"
    write_student_report(runs, tmp_path / "same.html")
    assert warning not in (tmp_path / "same.html").read_text()
    evals = [{**one, "selection": "another"} for one in json.loads((runs[1] / "eval.json").read_text())]
    (runs[1] / "eval.json").write_text(json.dumps(evals))
    write_student_report(runs, tmp_path / "different.html")
    assert warning in (tmp_path / "different.html").read_text()
    # Within a run the curve is of the chains of its last evaluation: here that is one point, and no curve.
    (runs[0] / "eval.json").write_text(json.dumps([evaluation(0, 2.0, 0.4), {**evals[1], "step": 80}]))
    write_student_report(runs[:1], tmp_path / "changed.html")
    assert not any(title.startswith("Held-out KL") for title in outline(tmp_path / "changed.html").texts["h3"])


def test_runs_at_every_stage_have_a_report(tmp_path: Path) -> None:
    begun = fake_run(tmp_path / "begun", num_steps=1)
    (begun / "eval.json").unlink()
    write_student_report([begun], tmp_path / "begun.html")
    evaluated = fake_run(tmp_path / "evaluated")
    (evaluated / "metrics.jsonl").unlink()
    write_student_report([evaluated], tmp_path / "evaluated.html")
    with pytest.raises(DataError, match="use a run folder"):
        student_sections(tmp_path)
    (begun / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"begun holds no config\.yaml"):
        student_sections(begun, evaluated)
    with pytest.raises(ConfigError, match="no run"):
        student_sections()


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    sections = [
        Section("lone", [Figure(NASTY, nasty_charts()[0], NASTY)]),
        Section(NASTY, [Numbers([Number(NASTY, NASTY, NASTY)]), Text(NASTY)], NASTY),
        Section("charts", [Figure(NASTY, chart, NASTY) for chart in nasty_charts()]),
        Section("table", [Table(NASTY, [NASTY], [[NASTY]], NASTY)]),
        Section("left out", []),
    ]
    write_report(tmp_path / "x.html", NASTY, sections, NASTY)
    page = (tmp_path / "x.html").read_text()
    assert_self_contained(page)
    assert "{{ 7 * 7 }}" in page
    assert "left out" not in page
    assert outline(tmp_path / "x.html").tags.isdisjoint({"script", "b", "img"})


def test_no_chart_stands_beside_an_empty_half() -> None:
    chart = nasty_charts()[0]
    odd = [Figure(name, chart) for name in "abc"]
    pieces: list[Piece] = [
        *odd,
        Text("words"),
        Figure("d", chart),
        Figure("e", chart),
        Figure("tall", chart, is_tall=True),
    ]
    assert [takes_row for _, takes_row in Section("s", pieces).placed()] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def nasty_charts() -> list[Drawing]:
    return [
        line_chart(
            [Line(NASTY, [0, 1], [1, 2]), Line("数$", [0, 1], [1, 2.01])], NASTY, NASTY, marks=[Mark(NASTY, 0.5)]
        ),
        histogram([Group(NASTY, [1.0, 2.0, 2.0]), Group("", [5.0])], NASTY),
        bars([NASTY, "b"], [1.0, 0.0], [NASTY, "x"], NASTY),
    ]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "chart",
    [
        line_chart([Line("", [3.0], [1.0])], "x", "y"),
        line_chart([Line("a", np.arange(5), np.ones(5), np.zeros(5), np.full(5, 2.0))], "x", "y", from_zero=True),
        histogram([Group("one value", [4.0, 4.0])], "x"),
        histogram([Group("", np.linspace(0, 1, 100))], "x"),
        bars(["only"], [0.0], ["0"], "x"),
    ],
)
def test_charts_take_the_colours_and_the_width_of_the_page(chart: Drawing, wide: bool) -> None:
    svg = chart.svg(wide=wide)
    assert svg.startswith("<svg viewBox=")
    assert "var(--" in svg
    assert "#fe" not in svg
    assert "font-family" not in svg
    assert "http" not in svg
    head = svg[: svg.index(">")]
    assert "width=" not in head
    assert "height=" not in head
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff", "#000000"}


def test_lines_and_marks_are_named() -> None:
    lines = [Line("a", [0, 10], [1, 2]), Line("b", [0, 5], [1, 2])]
    svg = line_chart(lines, "x", "y", marks=[Mark("p", 0.0), Mark("q", 5.0)]).svg()
    assert all(f">{name}</text>" in svg for name in "abpq")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(6e-4, "0.0006"), (2e-6, "0.000002"), (0.1 + 0.2, "0.3"), (40.0, "40"), (12000, "12k"), (0.0, "0"), (-5e6, "-5M")],
)
def test_ticks_are_plain_numbers(value: float, shown: str) -> None:
    assert plain_number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4930, "1 h 22 min"), (75, "1 min 15 s"), (14.2, "14 s"), (0.42, "0.4 s"), (9.96, "10 s")]
)
def test_times_have_units(seconds: float, shown: str) -> None:
    assert format_span(seconds) == shown


def browse(page: Path, folder: Path, *flags: str) -> str:
    """The document after a real browser has laid it out."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder}", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


def colours_of(path: Path) -> tuple[float, float]:
    """Mean brightness of a picture, 0 to 1, and the share of its pixels that are not the commonest colour."""
    from matplotlib.image import imread

    pixels = np.asarray(imread(path))[..., :3]
    flat = (pixels.reshape(-1, 3) * 255).astype(np.int64) @ np.array([65536, 256, 1])
    _, counts = np.unique(flat, return_counts=True)
    return float(pixels.mean()), 1 - counts.max() / len(flat)


def test_the_demo_page_follows_the_line(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "demo" / "cache", num_chains=8)
    fake_run(tmp_path / "demo" / "run")
    summary = {"num_chains": 8, "num_tokens": 1234, "bytes_per_token": 40.0, "pass_rate": 0.6, "seconds": 500.0}
    kl = {"heldout_kl_before": 2.0, "heldout_kl_after": 0.5}
    rates = {"teacher": 0.7, "before": 0.0, "after": 0.25}
    answers = {"num_answers": 48, **{f"heldout_pass_rate_{who}": rate for who, rate in rates.items()}}
    write_demo_report(tmp_path / "report.html", tmp_path / "demo", {**summary, **kl, **answers})
    found = outline(tmp_path / "report.html")
    parts = ["The pipeline", "The cache", "The student", "What to type next"]
    assert [title for title in found.texts["h2"] if title in parts] == parts
    assert found.texts["h2"][0] == parts[0]
    (introduction,) = (text for text in found.texts["p"] if text.startswith("A teacher"))
    assert introduction.index("the cache") < introduction.index("A student")
    assert "KL 2.00 → 0.50" in found.texts["dd"]
    assert "0% → 25% correct" in found.texts["dd"]
    shown = [text for text in found.texts["td"] if text.startswith("teacher-cache show")]
    assert any(chain.sample_id[:12] in shown[0] for chain in made.chains)


@needs_browser
def test_a_browser_shows_both_themes_and_no_sideways_scrolling_on_a_phone(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=40, max_tokens=120)
    page = tmp_path / "report.html"
    sections = [*cache_sections(made.catalog), *student_sections(fake_run(tmp_path / "run"))]
    write_report(page, "Both sides", sections)
    for theme, flag in (
        ("light", "--blink-settings=preferredColorScheme=1"),
        ("dark", "--blink-settings=preferredColorScheme=0"),
    ):
        browse(page, tmp_path / theme, flag, "--window-size=1280,1600", f"--screenshot={tmp_path / theme}.png")
    light, dark = colours_of(tmp_path / "light.png"), colours_of(tmp_path / "dark.png")
    assert light[0] > 0.8
    assert dark[0] < 0.3
    assert min(light[1], dark[1]) > 0.05
    # Headless windows are never narrower than 500 pixels: a frame stands in for the phone.
    measure = (
        '<iframe id="phone" src="report.html" style="width:390px;height:800px;border:0"></iframe><p id="answer"></p>'
        "<script>phone.onload = () => { const page = phone.contentDocument.documentElement;"
        "const cut = [...page.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth);"
        "answer.textContent = 'scroll ' + page.scrollWidth + ' of ' + page.clientWidth + ', cut tables ' + cut.length"
        " + ' of ' + page.querySelectorAll('.scroll').length; }</script>"
    )
    (tmp_path / "phone.html").write_text(measure)
    seen = browse(tmp_path / "phone.html", tmp_path / "phone", "--allow-file-access-from-files", "--dump-dom")
    # Runs, chains to look at, evaluations.
    assert "scroll 390 of 390, cut tables 0 of 3" in seen


@needs_browser
def test_a_browser_shows_the_distribution_of_a_token(tmp_path: Path) -> None:
    made = make_cache(tmp_path / "cache", num_chains=4)
    with open_cache(made.root) as cache:
        sample = cache.sample(made.chains[0].sample_id)
    write_chain_page(sample, tmp_path / "chain.html", 2)
    seen = browse(tmp_path / "chain.html", tmp_path / "profile", "--dump-dom")
    assert f"Token 2: “{sample.pieces_T[2]}”" in seen
    assert seen.count("outside the support") == 2
