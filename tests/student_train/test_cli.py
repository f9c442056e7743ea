"""`student-train` as a user meets it: help without torch, results on stdout, mistakes in one line."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from student_train import cli
from tests.helpers import ROOT
from tests.helpers.caches import SyntheticCache, make_cache
from tests.helpers.students import make_student, make_tokenizer
from tests.helpers.training import IGNORE_LIBRARY_WARNINGS

pytestmark = IGNORE_LIBRARY_WARNINGS


@dataclass(frozen=True)
class Cli:
    """`student-train` in this process, and a configuration for it that trains `student` on `cache`."""

    folder: Path
    cache: SyntheticCache
    student: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of one command."""
        self.monkeypatch.setattr(sys, "argv", ["student-train", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        out, err = self.capsys.readouterr()
        return code, out, err

    def config(self, **blocks: object) -> str:
        """The path of a written configuration; `blocks` replace whole blocks of it."""
        config = {
            "run": str(self.folder / "run"),
            "student": {"model": str(self.student)},
            "data": {"caches": [str(self.cache.root)], "where": "split = 'train'", "pack_tokens": 128},
            "stages": [{"learning_rate": 0.01, "batch_tokens": 512}],
            **blocks,
        }
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)


@pytest.fixture
def call(
    tmp_path: Path,
    cache: SyntheticCache,
    student: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked_once: None,
) -> Cli:
    return Cli(tmp_path, cache, student, monkeypatch, capsys)


def run_alone(*commands: list[str]) -> list[tuple[str, set[str]]]:
    """stdout of each command, in one process of their own, and the modules that are loaded once it has ended well."""
    check = (
        "import json, sys; from student_train import cli\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['student-train', *command]\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    print('\\0', *sys.modules, sep='\\n', end='\\0')"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, json.dumps(commands)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("\0")
    return [(said, set(loaded.split())) for said, loaded in zip(parts[::2], parts[1::2], strict=False)]


def test_help_and_plan_load_no_heavy_library(call: Cli) -> None:
    (said, by_help), (_, by_plan) = run_alone(["--help"], ["plan", call.config()])
    assert "export" in said
    assert by_help & {"torch", "transformers", "deepspeed", "pyarrow", "duckdb", "pydantic"} == set()
    assert by_plan & {"deepspeed", "peft", "vllm"} == set()


def test_plan_counts_without_leaving_a_trace(call: Cli, tmp_path: Path, cache: SyntheticCache) -> None:
    config = call.config()
    code, out, _ = call("plan", config, "--json")
    planned = json.loads(out)
    chains = [chain for chain in cache.chains if chain.split == "train"]
    stage = planned["stages"][0]
    assert code == 0
    assert stage["num_chains"] == len(chains)
    assert stage["num_tokens"] == sum(len(chain.token_ids) for chain in chains)
    assert stage["num_steps"] == -(-stage["packs_per_epoch"] // 4)
    assert planned["heldout_chains"] == len(cache.chains) - len(chains)
    # One rank of a CPU needs no ZeRO in float32: AdamW's moments only, and no bucket.
    (stage,) = json.loads(call("plan", config, "--set", "engine.precision=float32", "--json")[1])["stages"]
    memory = stage["memory_gib_per_rank"]
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"])
    assert "bucket" not in memory
    assert not (tmp_path / "run").exists()
    code, out, _ = call("plan", config, "--set", "stages.0.epochs=3", "--nproc", "2")
    assert code == 0
    assert "4 packs: 2 per rank" in out
    entries = f"at most {cache.chains[0].signals.topk_n_T.max()} stored entries a token"
    assert f"loss       forward_kl: {entries}, all others in one bucket\n" in out
    code, out, _ = call("plan", config, "--set", "stages.0={max_steps: 1, batch_tokens: 128, learning_rate: 1}")
    assert "batch      1 pack: 1 per rank\n" in out
    assert "1 step in all\n" in out
    assert "is tied to its embeddings" not in out
    code, out, _ = call("plan", config, "--set", "stages.0.trainable=head", "--set", "engine.offload_optimizer=true")
    assert "is tied to its embeddings: stage distill trains both" in out
    assert re.search(r"^memory .*bucket 0\.0\), and 0\.0 GiB of the CPU's$", out, re.MULTILINE)


def test_plan_says_what_each_loss_makes_of_draws(call: Cli, tmp_path: Path) -> None:
    drawn = make_cache(tmp_path / "cache", num_chains=20, vocab_size=300, draws=3, heldout_frac=0.0)
    losses = {
        "forward_kl": 1.0,
        "jsd": {"tail": "bucket"},
        "total_variation": {"tail": "drop"},
        "reverse_kl": 1.0,
        "cross_entropy": 1.0,
    }
    stage = {"learning_rate": 0.01, "batch_tokens": 512, "losses": losses}
    config = call.config(stages=[stage], data={"caches": [str(drawn.root)], "pack_tokens": 128})
    code, out, err = call("plan", config, "--set", "eval=null")
    assert code == 0, err
    entries = "at most 8 stored entries a token"
    for line in (
        f"forward_kl: {entries}, the tail estimated from 3 draws",
        f"jsd: {entries}, all others in one bucket",
        f"total_variation: {entries} only",
        f"reverse_kl: {entries} and the distinct ones of 3 drawn ids, all others in one bucket",
        "cross_entropy: the next token",
    ):
        assert f"loss       {line}\n" in out


@pytest.mark.parametrize("given", [("--price", "a=-1/2"), ("--price", "a=1"), ("--price-per-hour", "a=nan")])
def test_a_price_is_a_number(call: Cli, given: tuple[str, str]) -> None:
    code, _, err = call("compare", "a=http://one", "b=http://two", "--cache", "unused", *given)
    assert code == 2
    assert f"{given[0]} {given[1]}: write NAME=" in err


def test_a_folder_is_refused_as_a_configuration(call: Cli, tmp_path: Path) -> None:
    code, _, err = call("plan", str(tmp_path))
    assert (code, err) == (2, f"student-train: {tmp_path} is a folder: use a YAML configuration file\n")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.learning_rat=1", "did you mean 'learning_rate'?"),
        (
            "stages.0.batch_tokens=500",
            "stages.0 (distill): batch_tokens=500 is not a multiple of data.pack_tokens=128: set it to 512",
        ),
        ("data.where=split = 'nowhere'", "selects none of the 60 chains"),
        ("data.where=nonsense >", "data.where"),
        ("data.caches=[nowhere]", "nowhere is not a cache"),
        (
            "stages.0.losses={jsd: {tail: sampled}}",
            "jsd.tail: must be 'stored', 'bucket', 'drop', 'renormalise' or 'exact'",
        ),
        (
            "stages.0.losses={kl: 1}",
            "stages.0 (distill): loss 'kl' is unknown: choose one of asymmetric_likelihood, attention_kl, ",
        ),
        (
            "stages.0.losses={jsd: {beta: 1.5}}",
            "stages.0 (distill): jsd.beta=1.5 must be strictly between 0 and 1",
        ),
        ("stages.0.temperature=3", "stages.0 (distill): temperature 3 needs the teacher's log-partition"),
        ("stages.0.where=split = 'nowhere'", "stages.0 (distill): where \"split = 'nowhere'\" selects none"),
        (
            "stages.0={learning_rate: 1, batch_tokens: 512, trainable: lora, lora: {targets: [q_proj, q_prj]}}",
            "stages.0 (distill): lora.targets: the student has no linear layer 'q_prj': there are embed_tokens, ",
        ),
        (
            "stages.0.balance_weight=0.1",
            "stages.0 (distill): balance_weight: the student has no balance loss of experts",
        ),
        ("stages.0.losses={forward: 1}", "loss 'forward' is unknown: did you mean 'forward_kl'?"),
        ("student.model=./nowhere", "student.model: ./nowhere is not a folder"),
        ("student.model=.", ". has no config.json: use a Hugging Face model folder"),
        ("student={model: nowhere, init: {teacher: x, layers: 2}}", "nowhere does not exist yet"),
        ("stages.0.losses={}", "stages.0.losses: is empty: it needs at least 1 item"),
        ("stages.0.losses=[cross_entropy]", "stages.0.losses: must be a mapping of keys to values"),
        ("data.caches=x", "data.caches: must be a list, for example [a, b] (got 'x')"),
        ("data.pack_tokens=many", "data.pack_tokens: must be a valid integer (got 'many')"),
        ("student={}", "student.model: is required"),
        (
            "stages.0.losses={jsd: {weight: {kind: steep, start: 1}}}",
            "yaml: stages.0.losses.jsd.weight.kind: must be 'linear', ",
        ),
        (
            "stages.0.losses={jsd: {weight: much}}",
            "jsd.weight: must be a valid number (got 'much')",
        ),
        ("data.kind=text", "losses must be {cross_entropy: 1}"),
        ("stages.0.token_weights={}", "sets neither entropy nor tail"),
        (
            "stages.0.losses={cross_entropy: {weight: {kind: elastic, start: 1, end: 2}}}",
            "has an elastic weight, which follows the held-out loss: set eval.every_steps",
        ),
        ("stages.0.lora={}", "lora has no effect with trainable: all"),
        ("engine={zero_stage: 2, offload_parameters: true}", "offload_parameters needs zero_stage 3"),
    ],
)
def test_mistakes_are_one_line(call: Cli, override: str, message: str) -> None:
    config = call.config()
    code, out, err = call("plan", config, "--set", override)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--robustness", "--temperature", "1"], "--temperature and --robustness have no effect without --generate"),
        (["--lm-eval-limit", "5"], "--lm-eval-limit has no effect without --lm-eval"),
        (["--lm-eval", "sums", "--quantise", "w8a8"], "--quantise has no effect on --lm-eval"),
        (["--lm-eval", "a b"], "--lm-eval a b: write task names separated by commas"),
        (["--model", "x", "--cache", "y", "--forgetting", "z"], "--forgetting needs --before"),
        (["CONFIG", "--before", "x"], "CONFIG already names model and caches"),
        (["CONFIG", "--initial", "--forgetting", "x"], "--forgetting compares with the student before the run"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(call: Cli, options: list[str], message: str) -> None:
    config = call.config(eval={})
    code, out, err = call("eval", *(config if one == "CONFIG" else one for one in options))
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("override", "message"),
    [("stages.0.losses={kl: 1}", "loss 'kl' is unknown"), ("data.caches=[nowhere]", "nowhere is not a cache")],
)
def test_a_student_is_not_cut_for_a_run_that_would_be_refused(call: Cli, override: str, message: str) -> None:
    config = call.config()
    cut = "student={model: nowhere, init: {teacher: x, layers: 2}}"
    code, _, err = call("plan", config, "--set", cut, "--set", override)
    assert code == 2
    assert message in err


def test_held_out_chains_that_are_all_too_long_are_refused_before_training(call: Cli) -> None:
    overrides = ("data.max_tokens=30", "data.long_chains=skip", "eval.where=num_prompt_tokens + num_tokens > 30")
    options = [word for one in overrides for word in ("--set", one)]
    code, _, err = call("plan", call.config(), *options)
    assert code == 2
    assert "(num_prompt_tokens + num_tokens > 30) are longer than 30 tokens and long_chains='skip' leaves none" in err


def test_vocabulary_of_another_family_is_refused_with_its_ids(call: Cli, tmp_path: Path) -> None:
    other = make_student(tmp_path / "other", tokenizer=make_tokenizer(first_ordinary="v"))
    code, _, err = call("plan", call.config(student={"model": str(other)}))
    assert code == 2
    assert "differs from the cache's in 297 ordinary tokens (3 is 'w3' in the cache and 'v3' in the student" in err
    assert "project the distributions into the student's vocabulary (data.kind: projected)" in err


def test_init_from_flags_and_from_a_config(call: Cli, tmp_path: Path, student: Path) -> None:
    out_folder = tmp_path / "cut"
    flags = ["--teacher", str(student), "--layers", "1", "--out", str(out_folder)]
    code, out, _ = call("init", *flags)
    assert code == 0
    assert "layers 0 of 2 of" in out
    block = {"model": str(out_folder), "init": {"teacher": str(student), "layers": 1}}
    config = call.config(student=block)
    code, out, err = call("init", config, "--json")
    assert code == 0
    assert f"{out_folder} already holds this student" in err
    assert json.loads(out)["kept_layers"] == [0]
    code, _, err = call("init", config, *flags)
    assert code == 2
    assert "CONFIG already" in err


def test_what_was_not_trained_is_not_exported(call: Cli, tmp_path: Path) -> None:
    config = call.config()
    code, _, err = call("export", config, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "train first with `student-train run`" in err


def test_doctor_names_what_is_there(call: Cli) -> None:
    _, out, _ = call("doctor", "--json")
    found = {one["name"]: one for one in json.loads(out)["checks"]}
    assert found["torch"]["state"] == "ok"
    assert {"deepspeed", "c++ compiler", "python headers", "communication op", "disk"} <= found.keys()
