"""The teacher in vLLM: states of all wanted layers through its method for draft models, `extract_hidden_states`.

vLLM keeps the states beside the keys and values of a request and its connector writes them to a file when the request
ends. Layer i is the stream after i decoder layers; the last one still lacks the final norm, which is applied here.
Measured on vLLM 0.32 on a CPU only: on a GPU the connector is vLLM's own.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.errors import ConfigError, StillroomError, one_line
from stillroom.log import note
from stillroom.schema.manifest import Teacher
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.vllm.arguments import engine_args, new_config, scoring_args
from teacher_cache.engine.vllm.cpu import FREE_MEMORY_FRAC, compile_nothing, fitted_config, free_memory_bytes
from teacher_cache.engine.vllm.process import quiet_start, settings_of, shut_down, software, start_errors
from teacher_cache.states.config import VllmConfig
from teacher_cache.states.engine import ChainTokens, HeadWeights, Shape, States, Wanted
from teacher_cache.states.model import head_of, load_outer

if TYPE_CHECKING:
    from vllm.config import VllmConfig as EngineConfig

FILE_WAIT_S = 60.0
CONNECTOR = "StatesConnector"
MAX_STATES_BYTES = 4 << 30
"""Default KV cache on a CPU, where it also holds the states."""


class VllmStates:
    """Implements teacher_cache.states.engine.StatesEngine."""

    is_teacher = True

    def __init__(
        self, teacher: Teacher, trust_remote_code: bool, config: VllmConfig, wanted: Wanted, shape: Shape
    ) -> None:
        """Loads the model. Raises ConfigError if vLLM refuses it or a setting, StillroomError if it does not start."""
        self._wanted, self._norm, self._head = wanted, None, None
        # Sorted by id and unnamed in the files: the last is what the final norm reads.
        self._numbers = [*wanted.layers, *([shape.num_layers] if wanted.hidden else [])]
        if wanted.hidden:
            head, norm, settings = load_outer(teacher, trust_remote_code)
            self._norm, self._head = norm, head_of(head, settings, norm)
        self._folder = tempfile.TemporaryDirectory(prefix="stillroom-states-")
        model = TeacherConfig(model=teacher.model, revision=teacher.revision, trust_remote_code=trust_remote_code)
        embedded = EmbeddedConfig(**config.model_dump(exclude={"kind", "batch_tokens"}))
        with quiet_start() as host:
            note(f"loading {teacher.model} in vLLM")
            self._in_process = host.in_process
            arguments = engine_args(model, embedded, CaptureConfig(max_support=1, draws=0), host.on_cpu)
            arguments |= {**scoring_args(embedded), "enable_prefix_caching": False}
            arguments["speculative_config"] = {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": self._numbers}},
            }
            from vllm.config import KVTransferConfig

            arguments["kv_transfer_config"] = KVTransferConfig(
                kv_connector=CONNECTOR,
                kv_connector_module_path="teacher_cache.states.vllm_connector",
                kv_role="kv_producer",
                kv_connector_extra_config={"shared_storage_path": self._folder.name},
            )
            with start_errors(teacher.model):
                from vllm.v1.engine.llm_engine import LLMEngine

                vllm_config = _cpu_config(arguments, embedded) if host.on_cpu else new_config(arguments)
                self._engine: Any = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        self.settings: Mapping[str, Any] = {"kind": "vllm", **settings_of(vllm_config)}
        self.software: Mapping[str, str] = software()
        self._max_model_len = vllm_config.model_config.max_model_len
        self._num_requests = 0

    def head(self) -> HeadWeights:
        """The output layer, read from the model's files."""
        assert self._head is not None
        return self._head

    def run(self, chains: Sequence[ChainTokens]) -> list[States]:
        """Reads every chain as a prompt and generates one token, which is dropped."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        names = []
        for chain in chains:
            if chain.num_context > self._max_model_len:
                raise ConfigError(
                    f"chain {chain.sample_id} has {chain.num_context} tokens with its prompt, more than "
                    f"engine.max_model_len={self._max_model_len}: raise it, or exclude such chains with chains.where"
                )
            names.append(str(self._num_requests))
            self._num_requests += 1
            self._engine.add_request(names[-1], tokens_input(chain.inputs), params)
        paths: dict[str, str] = {}
        try:
            while len(paths) < len(chains):
                for output in self._engine.step():
                    if output.finished:
                        paths[output.request_id] = output.kv_transfer_params["hidden_states_path"]
        except Exception as error:
            raise StillroomError(f"vLLM died while computing states: {one_line(error)}") from error
        return [self._states(chain, Path(paths[name])) for name, chain in zip(names, chains, strict=True)]

    def close(self) -> None:
        """Stops vLLM and frees its memory."""
        shut_down(self._engine)
        del self._engine
        self._folder.cleanup()

    def _states(self, chain: ChainTokens, path: Path) -> States:
        import torch

        states_TSD = self._read(path)
        if len(states_TSD) < len(chain.inputs):
            raise StillroomError(
                f"vLLM gave {len(states_TSD)} states of the {len(chain.inputs)} tokens of chain {chain.sample_id}"
            )
        picked_PSD = states_TSD[torch.from_numpy(chain.query_P.astype(np.int64))].float()
        layers = {number: picked_PSD[:, place].numpy() for place, number in enumerate(self._wanted.layers)}
        hidden_PD = None
        if self._norm is not None:
            with torch.inference_mode():
                hidden_PD = self._norm(picked_PSD[:, -1]).numpy()
        return States(hidden_PD, {number: np.ascontiguousarray(one) for number, one in layers.items()})

    def _read(self, path: Path) -> Any:
        """The file of a finished request. Its worker writes it in the step after the last one."""
        from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import load_hidden_states

        deadline_s = time.monotonic() + FILE_WAIT_S
        while not path.exists():
            if time.monotonic() > deadline_s:
                raise StillroomError(f"vLLM did not write {path} within {FILE_WAIT_S:.0f} s")
            # In this process a step does it. An engine process steps by itself, and asking it would wait for an output.
            if self._in_process:
                self._engine.step()
            time.sleep(0.001)
        states = load_hidden_states(str(path))["hidden_states"]
        path.unlink()
        # vLLM's locks lie beside the files.
        Path(f"{path}.lock").unlink(missing_ok=True)
        return states


def _cpu_config(arguments: dict[str, Any], config: EmbeddedConfig) -> "EngineConfig":
    """Nothing is compiled: a pass reads each chain once."""
    compile_nothing()
    # States lie beside keys and values, which fitted_config does not count.
    free_bytes = int(FREE_MEMORY_FRAC * free_memory_bytes())
    arguments.setdefault("kv_cache_memory_bytes", min(MAX_STATES_BYTES, free_bytes))
    return fitted_config(arguments, config, True)
