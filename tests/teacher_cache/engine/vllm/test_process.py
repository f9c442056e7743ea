"""What vLLM raises while it starts reaches the user as one line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError

from stillroom.cache.tensors import tensor_bytes
from stillroom.errors import ConfigError, DataError, StillroomError
from teacher_cache.engine.row_layout import Layout
from teacher_cache.engine.vllm.engine import EmbeddedEngine
from teacher_cache.engine.vllm.process import start_errors


def test_a_weight_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    data = tensor_bytes({"weight": np.zeros(8, np.float32)})
    (tmp_path / "a.safetensors").write_bytes(data)
    (tmp_path / "b.safetensors").write_bytes(data[:-1])
    with (
        pytest.raises(DataError, match=r"b\.safetensors is damaged or cut short: copy it again"),
        start_errors(str(tmp_path)),
    ):
        raise SafetensorError("incomplete metadata, file not fully covered")


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (KeyError("layers.5.bias"), StillroomError, "vLLM did not start with model: KeyError 'layers.5.bias'"),
        (RuntimeError("out of\nmemory"), StillroomError, "vLLM did not start with model: out of memory"),
        (ValueError("no such architecture"), ConfigError, "vLLM rejects model: no such architecture"),
        (ConfigError("as it is"), ConfigError, "as it is"),
    ],
)
def test_any_error_is_one_line(error: Exception, kind: type[StillroomError], line: str) -> None:
    with pytest.raises(kind, match=f"^{line}$"), start_errors("model"):
        raise error


def test_an_engine_that_dies_at_the_first_probe_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        """vLLM's engine after its worker has died."""

        def add_request(self, *_: object, **__: object) -> None:
            pass

        def has_unfinished_requests(self) -> bool:
            return True

        def step(self) -> None:
            raise RuntimeError("out of memory")

    # vLLM changes the process that imports it.
    for name in ("vllm", "vllm.inputs", "vllm.inputs.engine", "teacher_cache.engine.vllm.capture"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(tokens_input=list, rows_of=None))
    monkeypatch.setattr(EmbeddedEngine, "_params", lambda *_, **__: None)
    monkeypatch.setattr(EmbeddedEngine, "_engine", Dying(), raising=False)
    engine = EmbeddedEngine.__new__(EmbeddedEngine)
    engine._adapter = None
    with pytest.raises(StillroomError, match=r"^vLLM died while generating: out of memory$"):
        engine._workers_know(Layout(4, 0, ()))
