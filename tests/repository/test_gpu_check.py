"""tools/gpu_check.py as far as it goes without a GPU and without an engine; `--device cpu` runs the rest by hand."""

import json
from pathlib import Path

from tools.gpu_check import CHECKS, check_loss, page_of, run_check, verdict_of


def test_the_loss_is_compared_with_float64(tmp_path: Path) -> None:
    found = check_loss("cpu", tmp_path, None)
    assert found["problems"] == []
    assert 0 < float(found["worst relative error, float32"]) < float(found["worst relative error, bfloat16"])


def test_the_page_says_what_failed_and_what_was_skipped() -> None:
    second = next(one for one in CHECKS if one.needs_cuda)
    results = {
        second.name: run_check(second, "cpu", None),
        "fused loss": {"problems": ["jsd in float32: relative error 1.0"], "seconds": 3.0, "worst": "1.0"},
        "training": {"problems": [], "seconds": 20.0, "zero 1 tok/s": 500},
    }
    assert [verdict_of(one) for one in results.values()] == ["skipped", "failed", "ok"]
    page = page_of({"device": "cpu", "hardware": "x", "versions": "torch 2", "results": results})
    assert "| second model runner | skipped |  | needs CUDA |" in page
    assert "| fused loss | failed | 3.0 | jsd in float32: relative error 1.0; worst 1.0 |" in page
    assert "| training | ok | 20.0 | zero 1 tok/s 500 |" in page
    assert json.loads(page.split("```json")[1].split("```")[0])["results"] == results
