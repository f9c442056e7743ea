"""Exports in other formats: written, run, compared, described; refused by name; chosen by latency."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from safetensors import SafetensorError

from stillroom.config import Json
from stillroom.errors import ConfigError, DataError, Disagreement, StillroomError
from student_train import cli
from student_train.commands.result_lines import bench_lines, format_lines
from student_train.export import worker, writing
from student_train.export.bench import Load, _turn, bench, choose, contestant
from student_train.export.bench_page import write_bench_page
from student_train.export.energy import EnergyMeter
from student_train.export.formats import FORMATS, REFUSED, RUNTIMES, find_format
from student_train.export.writing import Check, export_folder
from student_train.model.folder import atomic_folder
from tests.helpers.caches import SyntheticCache
from tests.helpers.students import make_student

pytestmark = pytest.mark.usefixtures("asked_once")

WRITER = """
import json, shutil
from pathlib import Path
print("2026-11-29 a library imported")
from protocol import serve

def write(folder, out, precision, chains):
    if precision == "gptq":
        raise ValueError("no kernel\\nfor it")
    shutil.copy(Path(folder) / "config.json", out)
    Path(out, "calibration.json").write_text(Path(chains).read_text())
    Path(out, "calibration.json").chmod(0o600)
    return {"writer": "1.0"}

serve({"write": write})
"""
RUNTIME = """
import sys
import numpy as np
from protocol import serve_runtime

class Fake:
    def __init__(self, folder, threads, is_quick):
        self._is_float = not (folder / "calibration.json").exists()

    def scores(self, ids, positions):
        # Any function of what precedes: reading one position too far changes it.
        rows = [np.random.default_rng([*ids[: place + 1]]).normal(0, 3, 300) for place in positions]
        logits = np.stack(rows).astype(np.float32)
        if self._is_float:
            return {"logits": logits}
        logits = logits * SCALE
        order = np.argsort(-logits, axis=1)[:, :100]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return {"ids": order.astype(np.int32), "logprobs": np.take_along_axis(logprobs, order, axis=1)}

    def generate(self, prompts, num_new):
        return [[0] * num_new for _ in prompts]

serve_runtime(Fake, {"fake": "2.0"})
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts in place of llmcompressor, vLLM and transformers, in this environment."""
    folder = tmp_path / "workers"
    folder.mkdir()
    shutil.copy(worker.WORKERS / "protocol.py", folder)
    (folder / "write_compressed.py").write_text(WRITER)
    for name in ("run_vllm", "run_transformers"):
        (folder / f"{name}.py").write_text(RUNTIME.replace("SCALE", "1.02"))
    monkeypatch.setattr(worker, "WORKERS", folder)
    for module in (worker, writing):
        monkeypatch.setattr(module, "python_of", lambda environment: Path(sys.executable))
    return folder


def test_a_format_is_calibrated_checked_and_described(
    fakes: Path, student: Path, cache: SyntheticCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result = export_folder(student, [cache.root], None, out, "w8a8", Check(max_chains=4))
    found = result["agreement"]
    assert (found["num_chains"], found["top1_agreement"]) == (4, 1.0)
    assert 0 < found["js"] < found["kl"] < 0.01
    heldout = [chain for chain in cache.chains if chain.split == "heldout"]
    calibration = json.loads((out / "calibration.json").read_text())
    assert len(calibration) == len(cache.chains) - len(heldout)
    assert (out / "calibration.json").stat().st_mode == (out / "export.json").stat().st_mode
    assert json.loads((out / "export.json").read_text()) == {key: one for key, one in result.items() if key != "folder"}
    assert (out / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "library_name: vllm" in card
    assert "| top-1 agreement | 1.0000 |" in card
    assert "writer 1.0, fake 2.0" in card
    assert "top-1 agreement 100.0%" in format_lines(result)[1]
    with pytest.raises(ConfigError, match="already exists"):
        export_folder(student, [cache.root], None, out, "w8a8", Check())
    # Chains of the check do not calibrate, and here all of them are in the check.
    with pytest.raises(StillroomError, match="split = 'train' and not"):
        export_folder(student, [cache.root], "split = 'train'", tmp_path / "again", "w8a8", Check())
    with monkeypatch.context() as patch:
        patch.setattr(writing, "python_of", lambda _: pytest.fail("gigabytes of environments come last"))
        with pytest.raises(ConfigError, match=r"^--where 'split =': it ends too early"):
            export_folder(student, [cache.root], "split =", tmp_path / "again", "w8a8", Check())
    (out / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(DataError, match="is quantised already"):
        export_folder(out, [cache.root], None, tmp_path / "again", "w8a8", Check())


def test_a_worker_cleans_up_and_does_not_take_its_libraries_apart(fakes: Path, student: Path, tmp_path: Path) -> None:
    library = f"""
import atexit, os

class Library:
    def __del__(self, mkdir=os.mkdir):
        mkdir({str(tmp_path / "apart")!r})

library = Library()
atexit.register(os.mkdir, {str(tmp_path / "clean")!r})
"""
    (fakes / "run_transformers.py").write_text(library + RUNTIME)
    with worker.RuntimeWorker("transformers", student, None, is_quick=True):
        assert not (tmp_path / "clean").exists()
    assert [(tmp_path / name).exists() for name in ("clean", "apart")] == [True, False]


def test_another_student_is_refused_unless_allowed(
    fakes: Path, student: Path, cache: SyntheticCache, tmp_path: Path
) -> None:
    script = (fakes / "run_vllm.py").read_text()
    # One position off.
    (fakes / "run_vllm.py").write_text(script.replace("ids[: place + 1]", "ids[: place]"))
    with pytest.raises(Disagreement, match=r"not the same student: top-1 agreement \d.*--allow-disagreement") as raised:
        export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", Check(max_chains=4))
    assert raised.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    check = Check(max_chains=4, allow_disagreement=True)
    result = export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", check)
    assert not result["is_same_student"]
    assert "**It is not the same student.**" in (tmp_path / "out" / "README.md").read_text()
    assert format_lines(result)[2].startswith("warning: below --min-agreement 0.9")


def test_failures_of_tools_are_one_line_and_leave_nothing(
    fakes: Path, student: Path, cache: SyntheticCache, tmp_path: Path
) -> None:
    with pytest.raises(StillroomError, match=r"^writing compressed-tensors, .* failed: ValueError: no kernel for it$"):
        export_folder(student, [cache.root], None, tmp_path / "out", "gptq", Check(max_chains=4))
    (fakes / "run_vllm.py").write_text("raise SystemExit('no module named vllm')")
    with pytest.raises(StillroomError, match=r"^loading the model in vllm: its process ended: no module named vllm"):
        export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", Check(max_chains=4))
    (fakes / "run_vllm.py").write_text(
        "import os; print('loading', file=__import__('sys').stderr); os.kill(os.getpid(), 9)"
    )
    with pytest.raises(StillroomError, match="its process ended: killed by SIGKILL: it may need more memory"):
        export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", Check(max_chains=4))
    assert [path.name for path in tmp_path.iterdir()] == ["workers"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_ends_the_tool_and_leaves_nothing(
    fakes: Path,
    student: Path,
    cache: SyntheticCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    for name in ("temporary", "exports"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (fakes / "write_compressed.py").write_text(
        "import os, tempfile, time\nfrom pathlib import Path\nfrom protocol import serve\n\n"
        "def write(folder, out, precision, chains):\n"
        "    Path(out, 'half.safetensors').write_text('half')\n"
        "    Path(tempfile.mkdtemp(), 'pid').write_text(str(os.getpid()))\n"
        f"    Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        f"    os.kill(os.getppid(), {int(number)})\n    time.sleep(60)\n\nserve({{'write': write}})\n"
    )
    arguments = ["--model", str(student), "--cache", str(cache.root), "--format", "w8a8"]
    monkeypatch.setattr(sys, "argv", ["student-train", "export", *arguments, "--out", str(tmp_path / "exports" / "a")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert list((tmp_path / "exports").iterdir()) == list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    fakes: Path, student: Path, cache: SyntheticCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left on device"):
            export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", Check(max_chains=4))
    (fakes / "write_compressed.py").write_text(
        WRITER.replace("shutil.copy(Path", "raise OSError(28, 'No space left on device')\n    shutil.copy(Path")
    )
    with pytest.raises(StillroomError, match=r"failed: OSError: \[Errno 28\] No space left on device$"):
        export_folder(student, [cache.root], None, tmp_path / "out", "w8a8", Check(max_chains=4))
    # safetensors has an error of its own for what the system refuses.
    with pytest.raises(StillroomError, match="/out: weights cannot be written: I/O error: No space left"):  # noqa: SIM117
        with atomic_folder(tmp_path / "out"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert [path.name for path in tmp_path.iterdir()] == ["workers"]


def test_onnx_is_the_same_student_and_its_speed_is_compared(cache: SyntheticCache, tmp_path: Path) -> None:
    # ONNX Runtime's attention wants heads of 16 values or a multiple.
    student, out = make_student(tmp_path / "student", heads=2), tmp_path / "onnx"
    result = export_folder(student, [cache.root], None, out, "onnx-fp32", Check(max_chains=4))
    assert result["agreement"]["top1_agreement"] == 1.0
    assert result["agreement"]["kl"] < 1e-6
    made = bench([contestant(one) for one in (str(out), f"onnx:{out}")], Load(16, 4, rounds=2, threads=1))
    first, second = made["formats"]
    assert (first["name"], second["name"], second["runtime"]) == ("onnx-fp32", "onnx-fp32 in onnx", "onnx")
    assert first["batches"]["8"]["decode_ratio"] == 1.0
    speeds = [one["batches"]["1"]["decode_tokens_per_s"]["median"] for one in (first, second)]
    assert second["batches"]["1"]["decode_ratio"] == speeds[1] / speeds[0]
    assert second["peak_memory_bytes"] > 10 << 20
    write_bench_page(tmp_path / "bench.html", made)
    assert "onnx-fp32" in (tmp_path / "bench.html").read_text()
    lines = bench_lines({**made, "max_ms": 1e6, "chosen": "onnx-fp32"})
    took_ms = first["batches"]["1"]["request_ms"]["median"]
    assert lines[7:] == [f"onnx-fp32 answers a request of 16 + 4 tokens in {took_ms:.0f} ms, within 1e+06 ms"]


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_do_not_keep_the_student_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--format {name} is refused: .*Use "):
        find_format(name)


def test_names_of_formats() -> None:
    assert find_format("onnx")[0] == "onnx-int8"
    with pytest.raises(ConfigError, match="unknown: choose one of hf, onnx-fp32"):
        find_format("coreml")
    for made in FORMATS.values():
        assert made.runtime in RUNTIMES
        assert (worker.WORKERS / f"{made.writer}.py").exists()
        assert (worker.WORKERS / f"{RUNTIMES[made.runtime].script}.py").exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^/proc/x cannot be written \(.*\): use a folder you can write to$"):
        export_folder(
            make_student(tmp_path / "student"), [tmp_path / "none"], None, Path("/proc/x"), "onnx-int8", Check()
        )


def test_awq_needs_a_gpu(student: Path, cache: SyntheticCache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="awq needs a GPU"):
        export_folder(student, [cache.root], None, tmp_path / "out", "awq", Check())


def test_latency_chooses_the_closest_format_that_is_fast_enough() -> None:
    def one(name: str, ms: float, agreement: float | None, size: int) -> Json:
        found = None if agreement is None else {"top1_agreement": agreement}
        batches = {"1": {"request_ms": {"median": ms}}}
        is_float = name == "float"
        return {"name": name, "agreement": found, "is_float": is_float, "size_bytes": size, "batches": batches}

    result: Json = {
        "formats": [
            one("float", 900, None, 9),
            one("a", 200, 0.95, 5),
            one("b", 100, 0.95, 4),
            one("c", 50, 0.5, 1),
            # Made elsewhere and never compared.
            one("unknown", 10, None, 1),
        ]
    }
    assert choose(result, 1000, 0.9) == "float"
    assert choose(result, 300, 0.9) == "b"
    assert choose(result, 60, 0.9) is None
    assert choose(result, 60, 0.4) == "c"


def test_a_turn_that_noise_made_meaningless_is_repeated() -> None:
    worker, meter = Mock(), EnergyMeter()
    worker.generate.side_effect = [(2.0, []), (1.0, []), (1.0, []), (3.0, [])]
    assert _turn(worker, [[1, 2]], 5, meter)["decode_tokens_per_s"] == 2
    worker.generate.side_effect = [(2.0, []), (1.0, [])] * 5
    with pytest.raises(StillroomError, match="5 tokens took no longer than the first one"):
        _turn(worker, [[1, 2]], 5, meter)


def test_contestants_are_told_apart(student: Path, tmp_path: Path) -> None:
    assert contestant(f"vllm:{student}").name == "student in vllm"
    assert contestant(f"vllm:{student}").runtime == "vllm"
    assert contestant(f"vllm:{student}").is_float
    with pytest.raises(ConfigError, match="'tvm' is not a runtime"):
        contestant(f"tvm:{student}")
    with pytest.raises(DataError, match="holds no model"):
        contestant(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert contestant(str(tmp_path)).runtime == "llama.cpp"
    assert not contestant(str(tmp_path)).is_float
    with pytest.raises(ConfigError, match=r"is for llama\.cpp, which vllm cannot read: leave vllm: out"):
        contestant(f"vllm:{tmp_path}")
    with pytest.raises(
        ConfigError, match=r"has room for [\d,]+ tokens and a request has 100,032: lower --prompt-tokens"
    ):
        bench([contestant(str(student))], Load(prompt_tokens=100_000))
    with pytest.raises(ConfigError, match=r"student \(.*\) is named twice"):
        bench([contestant(str(student))] * 2, Load())
    with pytest.raises(ConfigError, match="--eager has no effect"):
        bench([contestant(str(student))], Load(is_eager=True))


def test_energy_counters_start_over(tmp_path: Path) -> None:
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("10000000")
    (package / "energy_uj").write_text("9000000")
    meter = EnergyMeter(tmp_path)
    before = meter.read_j()
    (package / "energy_uj").write_text("1000000")
    after = meter.read_j()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(2.0)
