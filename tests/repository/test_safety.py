"""What is read from elsewhere runs nothing: no pickle, no code of a model's, no checkpoint that holds more than
tensors; secrets stay out of what is written.
"""

import ast
import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stillroom.cache.catalog import Catalog
from stillroom.cache.reader import open_cache
from stillroom.config import load_config
from stillroom.errors import ConfigError, CorruptError, DataError, StillroomError
from stillroom.models import load_tokenizer, vocab_size_of
from stillroom.schema.records import Message, Prompt, prompt_id_of
from student_train.data.selection import load_selection
from student_train.doctor import diagnose as diagnose_student
from student_train.exporting import model_card
from student_train.planning.estimate import plan_run
from student_train.report import write_student_report
from student_train.runtime.checkpoint import find_state
from student_train.runtime.engine import make_universal, saved_weights
from student_train.runtime.run_folder import RunFolder
from teacher_cache.config import BuildConfig
from teacher_cache.doctor import diagnose as diagnose_teacher
from teacher_cache.inspect.report import write_cache_report
from teacher_cache.inspect.show import write_chain_page
from teacher_cache.inspect.stats import cache_stats
from tests.helpers import ROOT
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.fake_builds import make_config as make_build_config
from tests.helpers.fake_builds import make_engine, make_requests, run_build
from tests.helpers.training import (
    IGNORE_LIBRARY_WARNINGS,
    Trainer,
    asked_once,
    cache,
    references,
    student,
    trainer,
)

__all__ = ["asked_once", "cache", "references", "student", "trainer"]

EXAMPLE = ROOT / "docs" / "examples" / "r1_distill_qwen_7b.yaml"
PACKAGES = ("schemas", "shared", "teacher_cache", "student_train", "benchmarks", "tools")
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "_pickle"}
UNSAFE_CALLS = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def unsafe_lines(source: str) -> list[str]:
    """What in a source could run code that data brings along, by line."""
    found = []
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {one.name}" for one in node.names if one.name in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            # The exception alone: torch raises it for what it refuses.
            names = {one.name for one in node.names} - {"UnpicklingError"}
            found += [f"{node.lineno}: from {node.module} import {name}" for name in sorted(names)]
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {problem}" for problem in _unsafe_call(node, safe_loaders)]
    return found


def _unsafe_call(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    name = ast.unparse(call.func)
    options = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "yaml.load" and options.get("Loader") in safe_loaders:
        return
    if name in UNSAFE_CALLS:
        yield name
    if name == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name.endswith("load") and options.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if options.get("trust_remote_code") == "True":
        yield f"{name} with trust_remote_code=True"
    if options.get("shell", "False") != "False":
        yield f"{name} with a shell"


def test_no_code_of_ours_reads_pickle_or_runs_what_it_reads() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): unsafe_lines(path.read_text(encoding="utf-8")) for path in files}
    # The judge runs programs: that is its work, in a sandbox (tests/test_judge.py).
    found.pop("shared/stillroom/judging/sandbox_child.py")
    found.pop("shared/stillroom/judging/sandbox_harness.py")
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import joblib",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert len(unsafe_lines(source)) == 1


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@IGNORE_LIBRARY_WARNINGS
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_checkpoint_with_code_in_it_is_refused(trainer: Trainer, tmp_path: Path, zero_stage: int) -> None:
    config = trainer.config("run", engine={"zero_stage": zero_stage}, eval=None)
    trainer.run(config, stop_after=4)
    folder = RunFolder(config.run).checkpoints
    state = find_state(folder, "last")
    assert saved_weights(folder, state.tag, zero_stage)
    mark = tmp_path / "it ran"
    for path in (folder / state.tag).glob("*.pt"):
        whole = torch.load(path, weights_only=False)
        torch.save({**whole, "more": Bomb(mark)}, path)
    with pytest.raises(CorruptError, match="holds more than tensors"):
        saved_weights(folder, state.tag, zero_stage)
    with pytest.raises(CorruptError, match="holds more than tensors"):
        make_universal(folder / state.tag, tmp_path / "universal")
    with pytest.raises(CorruptError, match="holds more than tensors"):
        trainer.run(config)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the bomb is a dud: nothing was tested"


def with_own_code(folder: Path, mark: Path) -> Path:
    """Turns a model folder into one whose configuration, model and tokenizer are code that ships with it."""
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    code += "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass OwnModel(LlamaForCausalLM):\n    pass\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    settings["tokenizer_class"] = "OwnTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@IGNORE_LIBRARY_WARNINGS
def test_a_models_own_code_is_not_run_unless_asked(
    trainer: Trainer, tmp_path: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "it ran"
    folder = with_own_code(Path(shutil.copytree(student, tmp_path / "student")), mark)
    with pytest.raises((DataError, ConfigError)):
        load_tokenizer(str(folder))
    with pytest.raises((DataError, ConfigError), match="trust_remote_code"):
        vocab_size_of(str(folder))
    config = trainer.config(
        "run",
        student={"model": str(folder)},
    )
    with pytest.raises(StillroomError):
        plan_run(config, 1)
    assert not mark.exists()
    assert vocab_size_of(str(folder), trust_remote_code=True) == 300
    assert mark.exists(), "the model's code does nothing: nothing was tested"


SECRET = "S3cretS3cretS3cretS3cret0"
SECRET_VALUES = [
    f"https://user:{SECRET}@hub.example/model",
    f"https://{SECRET}@hub.example/model",
    f"s3://key:{SECRET}@bucket/cache",
    f"hf_{SECRET}",
    f"sk-{SECRET}",
    "AKIAABCDEFGHIJKLMNOP",
]


@pytest.mark.parametrize("value", SECRET_VALUES)
@pytest.mark.parametrize("key", ["teacher.model", "prompts.sources.0.path", "teacher.chat_template_kwargs.a"])
def test_a_configuration_holds_no_secret(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} holds an? ") as told:
        load_config(EXAMPLE, [f"{key}={value}"], BuildConfig)
    assert SECRET not in str(told.value)
    assert "environment" in str(told.value)


@pytest.mark.parametrize("value", ["https://hub.example/a@b", "s3://bucket/cache", "a task-sk-1", "me@example.org"])
def test_values_that_are_not_secrets_are_accepted(value: str) -> None:
    config = load_config(EXAMPLE, [f"teacher.chat_template_kwargs.a={value}"], BuildConfig)
    assert config.teacher.chat_template_kwargs == {"a": value}


@IGNORE_LIBRARY_WARNINGS
def test_secrets_of_the_environment_reach_no_file(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    built = tmp_path / "built"
    run_build(make_build_config(built), make_requests(20))
    write_cache_report(Catalog(built), tmp_path / "cache.html")
    made = make_cache(tmp_path / "cache", num_chains=20, vocab_size=300, max_tokens=40)
    config = dataclasses.replace(trainer, cache=made).config("run", {"max_steps": 1}, eval=None)
    trainer.run(config)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    selections = {"distill": load_selection(RunFolder(config.run).selection_path("distill"))}
    card = model_card(config, state, selections, made.manifests)
    (tmp_path / "README.md").write_text(card)
    write_student_report([config.run], tmp_path / "student.html")
    print(diagnose_teacher(), diagnose_student(), cache_stats(Catalog(built)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in "".join(capfd.readouterr())


NASTY = "a\x1b[31m\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil\x1b\\b\x9b2J\x90\x08\u202e<script>alert(1)</script>"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal acts on: C0 without tab and newline, C1, and turns of direction."""


OWN = re.compile(r"\x1b\[(?:\?25[lh]|[0-9;]*[mKA])|\r")
"""What the programs send themselves: colours, and what a bar of progress needs."""


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose every text is hostile, and of which some requests failed with hostile messages."""
    folder = tmp_path_factory.mktemp("nasty") / "cache"
    requests = []
    for number, request in enumerate(make_requests(30)):
        messages = (Message("user\x1b[7m", f"{number} {NASTY}"),)
        prompt = Prompt(prompt_id_of(messages), messages, NASTY, "train", reference=NASTY, metadata={NASTY: NASTY})
        requests.append(dataclasses.replace(request, prompt=prompt))
    refused = {request.sample_id for request in requests[:3]}
    config = make_build_config(folder)
    run_build(config, requests, lambda: make_engine(refuse=lambda one: NASTY if one.sample_id in refused else None))
    for path in (folder / "vocab").glob("*.parquet"):
        table = pq.read_table(path)
        pieces = pa.array([f"{number}{NASTY}" for number in range(table.num_rows)])
        pq.write_table(table.set_column(table.schema.get_field_index("piece"), "piece", pieces), path)
    return folder


def commands_that_show(cache: Path) -> list[list[str]]:
    with open_cache(cache) as opened:
        sample = opened.sql("SELECT min(sample_id) AS one FROM chains").fetchall()[0][0]
    folder = str(cache)
    return [
        ["sql", folder, "SELECT prompt, source, reference, metadata, text FROM chains LIMIT 3"],
        ["sql", folder, "SELECT message FROM failures"],
        ["sql", folder, "SELECT piece FROM tokens LIMIT 5", "--format", "csv"],
        ["sql", folder, "SELECT error(prompt) FROM chains"],
        ["sql", folder, f'SELECT "{NASTY}" FROM chains'],
        ["show", folder, sample],
        ["show", folder, sample, "--token", "2"],
        ["show", folder, NASTY],
        ["stats", folder],
        ["verify", folder],
        ["judge", folder, "--where", f"source = '{NASTY}"],
        ["gc", folder, "--dry-run"],
    ]


END = "<end of a command>"
RUN_EACH = f"""
import contextlib, json, sys
from teacher_cache.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["teacher-cache", *arguments]
    with contextlib.suppress(SystemExit):
        main()
    print("{END}", flush=True)
"""


def test_nothing_from_a_cache_acts_on_a_terminal(nasty: Path) -> None:
    """Each command on a real terminal: what it writes there, colours of our own taken off, moves and hides nothing."""
    commands = commands_that_show(nasty)
    *seen, rest = on_a_terminal([sys.executable, "-c", RUN_EACH, json.dumps(commands)]).split(END)
    assert rest.strip() == ""
    for arguments, one in zip(commands, seen, strict=True):
        own = OWN.sub("", one)
        assert own.strip()
        assert not ACTS.findall(own), (arguments, own[:2000])
        assert "\x1b[31m\x1b]" not in one


def on_a_terminal(command: list[str]) -> str:
    """What a program writes to a terminal that it runs on."""
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    outside, inside = pty.openpty()
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=environ) as process:
        os.close(inside)
        pieces = []
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(outside, 65536):
                pieces.append(piece)
        process.wait(60)
    os.close(outside)
    return b"".join(pieces).decode()


def test_nothing_from_a_cache_acts_on_a_page(nasty: Path, tmp_path: Path) -> None:
    write_cache_report(Catalog(nasty), tmp_path / "report.html")
    with open_cache(nasty) as opened:
        sample = opened.sample(opened.sql("SELECT min(sample_id) AS one FROM chains").fetchall()[0][0])
    write_chain_page(sample, tmp_path / "chain.html")
    for name in ("report.html", "chain.html"):
        page = (tmp_path / name).read_text()
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert" in page
        assert not ACTS.findall(page), name


@IGNORE_LIBRARY_WARNINGS
def test_a_teachers_name_stays_text_on_the_model_card(trainer: Trainer, cache: SyntheticCache) -> None:
    config = trainer.config("run", {"max_steps": 1}, eval=None)
    trainer.run(config)
    state = find_state(RunFolder(config.run).checkpoints, "last")
    teacher = cache.manifests[0].teacher.model_copy(update={"model": "x\n---\n# <script>alert(1)</script>"})
    manifest = cache.manifests[0].model_copy(update={"teacher": teacher})
    selections = {"distill": load_selection(RunFolder(config.run).selection_path("distill"))}
    card = model_card(config, state, selections, [manifest])
    assert "<script>" not in card
    assert "\n# &lt;script" not in card
    assert "x --- # &lt;script&gt;alert(1)&lt;/script&gt;" in card
