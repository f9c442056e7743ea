"""vLLM embedded in this program: requests go in one at a time, completions with their distributions come out.

`LLMEngine.add_request` and `step` rather than `LLM.generate`: a window of requests is in flight, chains come out as
they finish, and a prompt that vLLM refuses fails alone. Each request has its own seed, so it gets the same tokens in
any batch, asks for the k most probable tokens, and is not detokenized: the builder decodes each chain once.
"""

import contextlib
import logging
import os
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.cache.tensors import read_header
from stillroom.children import tie_children
from stillroom.cores import CoreSharing
from stillroom.errors import ConfigError, StillroomError
from stillroom.log import format_count, format_duration, note, warn
from stillroom.schema.records import stable_hash
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.adapter import MERGE, WEIGHTS
from teacher_cache.engine.api import FINISH_REASONS, EngineInfo, Finished, Outcome, Request, refusal, seed_of_draws
from teacher_cache.engine.row_layout import Layout, is_marked
from teacher_cache.engine.switches import note_unknown
from teacher_cache.engine.vllm_fit import ADAPTER, ARRAYS, ENGINE, HOW_TO_FIT, misfit, plugin_misfit, source_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

    from teacher_cache.engine.vllm_arrays import ArrayLogprobs

FREE_MEMORY_FRAC = 0.25
"""Largest share of a CPU's free memory that the key-value cache takes by default; vLLM's own default is 0.9."""

MAX_STATES_BYTES = 4 << 30
"""Default KV cache on a CPU where it also holds hidden states."""

SCORING_CHUNK_TOKENS = 2048
"""Default tokens per step when scoring: 1.2 GB of logits at a vocabulary of 150,000."""

COMPILE_S_PER_LAYER = 2.5
BREAK_EVEN_TOKENS = 130_000
"""Measured on two cores (benchmarks/results/start.md). Both the compilation and what it saves per token grow with the
number of layers, so the break-even is a number of tokens whatever the model."""

QUIET_ENVIRONMENT = {
    # stdout is for results. vLLM reads these on import; what the user has set stays.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

NOT_INSTALLED = "the embedded engine needs vllm"
HOW_TO_INSTALL = "pip install 'stillroom[teacher]', or 'stillroom[teacher-cpu]' where there is no GPU"
PLUGIN_MISSING = (
    "vLLM's workers did not load it: install stillroom where they run, and add it to VLLM_PLUGINS if that is set"
)


class EmbeddedEngine:
    """A vLLM engine that this program starts, feeds and stops. Implements teacher_cache.engine.api.Engine."""

    def __init__(
        self,
        teacher: TeacherConfig,
        config: EmbeddedConfig,
        capture: CaptureConfig,
        *,
        scores: bool = False,
        sampling: Sequence[Mapping[str, Any]] = (),
        tokens_left: float | None = None,
    ) -> None:
        """Loads the model: seconds to minutes. Captures `capture.max_support` candidates per token, or the vocabulary.

        `scores`: the engine scores existing completions instead of generating. `sampling`: the parameters that requests
        will have, for vLLM to check. `tokens_left`: how many tokens it is
        expected to generate; on a CPU few tokens do not repay compiling the model. None stands for many.

        Raises ConfigError where vLLM refuses the model or a setting, or cannot provide what `capture` needs;
        StillroomError where it fails to start.
        """
        for name, value in QUIET_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        tie_children()
        with stdout_to_stderr(), _restored_preload(), warnings.catch_warnings():
            # Deprecation warnings about vLLM's own code: our user cannot fix them.
            warnings.simplefilter("ignore")
            self._start(teacher, config, capture, scores, sampling, tokens_left)
        self._core_sharing = _core_sharing()
        if self._info.settings["in_process"]:
            self._core_sharing.__enter__()
        self._requests: dict[str, Request] = {}
        self._refused: list[Outcome] = []
        self._num_submitted = 0
        self._num_finished_tokens = self._num_scored_tokens = 0
        self._closed = False

    def _start(
        self,
        teacher: TeacherConfig,
        config: EmbeddedConfig,
        capture: CaptureConfig,
        scores: bool,
        sampling: Sequence[Mapping[str, Any]],
        tokens_left: float | None,
    ) -> None:
        if _is_cpu_build():
            # It warns while it is imported.
            _set_log_level("ERROR")
        if source_folder() is not None and (lacking := misfit(ENGINE)) is not None:
            raise ConfigError(f"the embedded engine does not fit this vLLM: {lacking}: {HOW_TO_FIT}")
        try:
            import vllm
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine

            from teacher_cache.engine.plugin.register import register
        except ImportError as error:
            raise ConfigError(f"{NOT_INSTALLED} ({error}): {HOW_TO_INSTALL}") from error
        on_cpu = current_platform.is_cpu()
        _set_log_level("ERROR" if on_cpu else "WARNING")
        # Says when a saved compilation cannot be used, which costs a minute or more at this start.
        logging.getLogger("vllm.compilation.decorators").setLevel("WARNING")
        in_process = on_cpu if config.in_process is None else config.in_process
        # Read when the engine is made.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        # Before the engine is made, so that workers forked from this process are prepared.
        unfit = register()
        self._typed_sampling: dict[str, dict[str, Any]] = {}
        arguments = engine_args(teacher, config, capture, on_cpu) | _adapter_args(teacher.adapter, scores)
        for one in sampling:
            self._extra_params(one)
        _check_switches(config, sampling, on_cpu=on_cpu, scores=scores)
        if scores:
            arguments |= scoring_args(config)
        with _start_errors(teacher.model):
            if on_cpu:
                vllm_config, marker = _cpu_config(arguments, config, scores, tokens_left)
            else:
                note(f"loading {teacher.model}")
                vllm_config, marker = _vllm_config(arguments), None
            # Which of its two model runners vLLM takes depends on the model. Asked before the weights are loaded.
            unfit = unfit or plugin_misfit([2 if vllm_config.use_v2_model_runner else 1])
            if unfit is not None:
                _require_no_plugin(capture, f"it does not fit vllm {vllm.__version__}: {unfit}: {HOW_TO_FIT}")
            self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        self._adapter = None if teacher.adapter is None else self._loaded_adapter(teacher.adapter)
        if marker is not None:
            # Only now: an interrupted compilation is not saved. Where vLLM is told to save none there is no folder.
            with contextlib.suppress(OSError):
                marker.touch()
        self._arrays = _installed_arrays()
        model = vllm_config.model_config
        self._k = min(capture.max_support, model.get_vocab_size())
        self._layout = self._working_layout(capture) if unfit is None else None
        self._require_accepted(sampling)
        # It counts for the whole process, in which another engine may have run before.
        self._tokens_before = 0 if self._arrays is None else self._arrays.num_tokens
        self._max_in_flight = vllm_config.scheduler_config.max_num_seqs + config.max_waiting
        self._info = EngineInfo(
            vocab_size=model.get_vocab_size(),
            max_model_len=model.max_model_len,
            entropy="support" if self._layout is None else "exact",
            software={"vllm": vllm.__version__, **_versions("torch", "transformers")},
            settings={
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": current_platform.device_name,
                "max_model_len": model.max_model_len,
                "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
                "enforce_eager": model.enforce_eager,
                "in_process": in_process,
                "capture": "flat" if self._arrays is None else "arrays",
                "sampler": "vllm" if self._layout is None else "plugin",
            },
        )

    @property
    def info(self) -> EngineInfo:
        """What vLLM made of the configuration."""
        return self._info

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far. Chains being scored count when they finish, as do all chains on the flat path."""
        if self._arrays is None:
            return self._num_finished_tokens
        return self._arrays.num_tokens - self._tokens_before + self._num_scored_tokens

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet answered by `step`."""
        return len(self._requests) + len(self._refused)

    def has_room(self) -> bool:
        """Whether fewer than max_num_seqs + max_waiting requests are in flight."""
        return self.num_unfinished < self._max_in_flight

    def submit(self, request: Request) -> None:
        """Hands a request to vLLM; one that it refuses is answered by the next step."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input

        refused = refusal(request, self._info)
        if refused is not None:
            self._refused.append(refused)
            return
        request_id = str(self._num_submitted)
        self._num_submitted += 1
        try:
            # Tokens rather than text: vLLM must see exactly the ids whose hash is the sample's.
            prompt = tokens_input([*request.prompt_token_ids, *(request.completion_token_ids or ())[:-1]])
            self._engine.add_request(request_id, prompt, self._sampling_params(request), lora_request=self._adapter)
        except (VLLMValidationError, ValueError) as error:
            self._refused.append(request.failure("refused", _one_line(error)))
        else:
            self._requests[request_id] = request

    def step(self) -> list[Outcome]:
        """One engine step: a token for every chain in the batch."""
        # Refused requests are answered here, so that every request gets its outcome from `step`.
        outcomes, self._refused = self._refused, []
        if not self._requests:
            return outcomes
        try:
            outputs = self._engine.step()
        except Exception as error:
            raise StillroomError(f"vLLM died while generating: {_one_line(error)}") from error
        for output in outputs:
            if output.finished:
                outcomes.append(self._outcome(output))
        return outcomes

    def close(self) -> None:
        """Stops vLLM and frees its memory."""
        if self._closed:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._closed = True
        self._core_sharing.__exit__()
        if self._arrays is not None:
            from teacher_cache.engine.vllm_arrays import uninstall_arrays

            uninstall_arrays()
        with stdout_to_stderr():
            self._engine.engine_core.shutdown()
            del self._engine
            cleanup_dist_env_and_memory()

    def _loaded_adapter(self, path: str) -> "LoRARequest":
        """The adapter, loaded now: with the first chain, every one would fail."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, str(Path(path).absolute()))
        try:
            self._engine.add_lora(request)
        except Exception as error:
            # From another process it comes as a plain Exception.
            self._engine.engine_core.shutdown()
            raise ConfigError(f"teacher.adapter: vLLM rejects {path}: {_one_line(error)}") from error
        return request

    def _working_layout(self, capture: CaptureConfig) -> Layout | None:
        """The plugin's row layout where the workers, perhaps in other processes, answer a probe with it."""
        layout = Layout(self._k, capture.draws, tuple(capture.temperatures))
        if self._workers_know(layout):
            return layout
        if _needs_plugin(capture):
            self._engine.engine_core.shutdown()
        _require_no_plugin(capture, PLUGIN_MISSING)
        return None

    def _workers_know(self, layout: Layout) -> bool:
        from vllm.inputs.engine import tokens_input

        from teacher_cache.engine.vllm_capture import rows_of

        params = self._params(layout, {"temperature": 0.0}, seed=0, max_tokens=1)
        self._engine.add_request("probe", tokens_input([0]), params, lora_request=self._adapter)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        ids, logprobs, _ = rows_of(outputs[-1].outputs[0].logprobs, layout.width)
        return is_marked(ids, logprobs, layout)

    def _sampling_params(self, request: Request) -> Any:
        if request.completion_token_ids is None:
            return self._params(self._layout, request.sampling, request.seed, request.max_tokens)
        params = self._params(self._layout, {"temperature": 0.0}, seed_of_draws(request), max_tokens=1)
        # The last token is generated rather than read: a chain of max_model_len tokens leaves no room to generate.
        params.allowed_token_ids = [request.completion_token_ids[-1]]
        # Rows that are read and the one that is generated must have the same layout.
        params.prompt_logprobs = params.logprobs
        return params

    def _params(self, layout: Layout | None, sampling: Mapping[str, Any], seed: int | None, max_tokens: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        extra = self._extra_params(sampling)
        return SamplingParams(
            temperature=sampling.get("temperature", 1.0),
            top_p=sampling.get("top_p", 1.0),
            top_k=sampling.get("top_k") or 0,
            min_p=sampling.get("min_p", 0.0),
            repetition_penalty=sampling.get("repetition_penalty", 1.0),
            seed=seed,
            max_tokens=max_tokens,
            logprobs=self._k if layout is None else layout.width,
            extra_args=None if layout is None else layout.extra_args(),
            # Marks the requests for which ArrayLogprobs keeps arrays; without it, flat lists are the cheapest vLLM has.
            flat_logprobs=True,
            # Stop strings are looked for in text.
            detokenize="stop" in extra,
            # Nobody reads half a chain: no output objects per step.
            output_kind=RequestOutputKind.FINAL_ONLY,
            **extra,
        )

    def _extra_params(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """`sampling.vllm` in vLLM's types."""
        from teacher_cache.engine.vllm_switches import typed

        given = sampling.get("vllm")
        if not given:
            return {}
        # Once for all requests of a source: the builder gives them one mapping.
        key = repr(given)
        if key not in self._typed_sampling:
            self._typed_sampling[key] = typed("sampling", given)
        return self._typed_sampling[key]

    def _require_accepted(self, sampling: Sequence[Mapping[str, Any]]) -> None:
        """One token of a request of each kind: what vLLM refuses in it, it would refuse in every chain."""
        from vllm.inputs.engine import tokens_input

        for number, one in enumerate(sampling):
            if not one.get("vllm"):
                continue
            try:
                params = self._params(self._layout, one, seed=0, max_tokens=int(one["max_tokens"]))
                self._engine.add_request(f"check{number}", tokens_input([0]), params, lora_request=self._adapter)
            except ValueError as error:
                self._engine.engine_core.shutdown()
                raise ConfigError(f"vLLM rejects sampling.vllm: {_one_line(error)}") from error
            self._engine.abort_request([f"check{number}"])

    def _outcome(self, output: Any) -> Outcome:
        from teacher_cache.engine.vllm_capture import capture_of, capture_of_scores

        request = self._requests.pop(output.request_id)
        completion = output.outputs[0]
        given = request.completion_token_ids
        self._num_finished_tokens += len(completion.token_ids if given is None else given)
        self._num_scored_tokens += 0 if given is None else len(given) - 1
        if completion.finish_reason not in FINISH_REASONS:
            return request.failure("engine_error", f"vLLM ended the chain with {completion.finish_reason!r}")
        if given is None:
            capture, reason = capture_of(completion.logprobs, completion.token_ids, self._k, self._layout), None
        else:
            rows = (output.prompt_logprobs, completion.logprobs)
            capture, reason = capture_of_scores(*rows, given, self._k, self._layout), "scored"
        if np.isnan(capture.topk_logprobs_TK).any() or np.isnan(capture.sampled_logprob_T).any():
            return request.failure("not_finite", "the model's log probabilities hold NaN: check its dtype and weights")
        return Finished(request, capture, reason or completion.finish_reason)


@contextlib.contextmanager
def quiet_start() -> Iterator[bool]:
    """Prepares this process for an engine other than EmbeddedEngine and yields whether it runs on a CPU.

    Raises ConfigError if vLLM is not installed.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    tie_children()
    with stdout_to_stderr(), _restored_preload(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_cpu_build():
            _set_log_level("ERROR")
        try:
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(f"{NOT_INSTALLED} ({error}): {HOW_TO_INSTALL}") from error
        on_cpu = current_platform.is_cpu()
        _set_log_level("ERROR" if on_cpu else "WARNING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if on_cpu else "1"
        yield on_cpu


def started(model: str, arguments: dict[str, Any], config: EmbeddedConfig, on_cpu: bool) -> tuple[Any, dict[str, Any]]:
    """An engine with these arguments, not compiled on a CPU, and its settings and software.

    Raises ConfigError where vLLM refuses the model or a setting, StillroomError where it fails to start.
    """
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

    with _start_errors(model):
        if on_cpu:
            import torch._dynamo.config

            # vLLM compiles a kernel for ranks at the first request, whatever enforce_eager says.
            torch._dynamo.config.disable = True
            # States lie beside keys and values, which _fitted_config does not count.
            free_bytes = int(FREE_MEMORY_FRAC * _free_memory_bytes())
            arguments.setdefault("kv_cache_memory_bytes", min(MAX_STATES_BYTES, free_bytes))
        vllm_config = _fitted_config(arguments, config, True) if on_cpu else _vllm_config(arguments)
        engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
    settings = {
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "max_model_len": vllm_config.model_config.max_model_len,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "enforce_eager": vllm_config.model_config.enforce_eager,
    }
    software = {"vllm": vllm.__version__, **_versions("torch", "transformers")}
    return engine, {"settings": settings, "software": software}


@contextlib.contextmanager
def _start_errors(model: str) -> Iterator[None]:
    """vLLM's errors while it starts as one line each."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"vLLM rejects {model}: {_one_line(error)}") from error
    except (RuntimeError, OSError) as error:
        raise StillroomError(f"vLLM did not start with {model}: {_one_line(error)}") from error


def _core_sharing() -> CoreSharing:
    import torch

    num_threads = torch.get_num_threads()
    # Large enough that torch splits it over all threads.
    return CoreSharing(num_threads, lambda: torch.zeros(2**15 * num_threads).add_(1))


def engine_args(teacher: TeacherConfig, config: EmbeddedConfig, capture: CaptureConfig, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs. A setting that is None is left to vLLM.

    Raises ConfigError for a value in `config.vllm` that vLLM's type does not take.
    """
    optional: Mapping[str, Any] = {
        "revision": teacher.revision,
        "tokenizer_revision": teacher.revision,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "distributed_executor_backend": config.distributed_executor_backend,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "enforce_eager": config.enforce_eager,
        "kv_cache_memory_bytes": None if config.kv_cache_gb is None else int(config.kv_cache_gb * 2**30),
        # vLLM's CPU sampler cannot use a request's own seed while a prompt is split into chunks.
        "enable_chunked_prefill": False if on_cpu else None,  # None: vLLM's own default, or engine.vllm's
    }
    return {
        # First: teacher-cache's own arguments cannot be among them.
        **_typed_switches(config),
        "model": teacher.model,
        "trust_remote_code": teacher.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "enable_expert_parallel": config.enable_expert_parallel,
        "max_logprobs": Layout(capture.max_support, capture.draws, tuple(capture.temperatures)).width,
        # The teacher's own distribution: before penalties, temperature and truncation.
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": sys.stderr.isatty(),
        **{name: value for name, value in optional.items() if value is not None},
    }


def _adapter_args(path: str | None, scores: bool) -> dict[str, Any]:
    """Room for one adapter. Raises ConfigError, before weights are loaded, for one that vLLM cannot apply."""
    if path is None:
        return {}
    if (lacking := misfit(ADAPTER)) is not None:
        raise ConfigError(f"teacher.adapter does not fit this vLLM: {lacking}: {HOW_TO_FIT}")
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    ranks = sorted(typing.get_args(MaxLoRARanks))
    try:
        helper = PEFTHelper.from_local_dir(path, None)
        rank = max([helper.r, *helper.rank_pattern.values()])
        # vLLM allocates one of these ranks; matrices of a smaller one are padded with zeros.
        max_rank = next((one for one in ranks if one >= rank), ranks[-1])
        helper.validate_legal(LoRAConfig(max_lora_rank=max_rank))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher.adapter: vLLM cannot apply {path} ({_one_line(error)}): {MERGE}") from error
    names = sorted(read_header(Path(path) / WEIGHTS))
    if scores and any("lm_head" in name for name in names):
        raise ConfigError(f"teacher.adapter: vLLM does not score with an adapter of lm_head ({path}): {MERGE}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank, "lora_target_modules": names}


def check_values(config: EmbeddedConfig, sampling: Mapping[str, Any]) -> None:
    """Raises ConfigError for values of `engine.vllm` and `sampling.vllm` that this vLLM does not take. Checks nothing
    where vLLM is not installed.
    """
    # The import takes seconds.
    if source_folder() is None or not (config.vllm or sampling):
        return
    with quiet_start():
        from teacher_cache.engine.vllm_switches import typed

        typed("engine", config.vllm)
        typed("sampling", sampling)


def _typed_switches(config: EmbeddedConfig) -> dict[str, Any]:
    if not config.vllm:
        return {}
    from teacher_cache.engine.vllm_switches import typed

    return typed("engine", config.vllm)


def _check_switches(
    config: EmbeddedConfig, sampling: Sequence[Mapping[str, Any]], *, on_cpu: bool, scores: bool
) -> None:
    """Raises ConfigError for what cannot work here, and says what nobody has compared."""
    from teacher_cache.engine.vllm_switches import cpu_problem

    is_random = any(one.get("temperature", 1.0) > 0 for one in sampling)
    if on_cpu and (problem := cpu_problem(config.vllm, scores=scores, is_random=is_random)) is not None:
        raise ConfigError(f"engine.vllm: {problem}")
    note_unknown("engine", config.vllm)
    note_unknown("sampling", [name for one in sampling for name in one.get("vllm", ())])


def scoring_args(config: EmbeddedConfig) -> dict[str, Any]:
    """Scoring samples no tokens, so prompts can be split on a CPU too; it holds the logits of a whole chunk."""
    num_tokens = config.max_num_batched_tokens or SCORING_CHUNK_TOKENS
    return {"enable_chunked_prefill": True, "max_num_batched_tokens": num_tokens}


def cpu_start(
    model: str, num_layers: int, *, enforce_eager: bool | None, is_compiled: bool, tokens_left: float | None
) -> tuple[bool, str]:
    """Whether to start without compiling, and the line that says so."""
    seconds = format_duration(COMPILE_S_PER_LAYER * num_layers)
    if enforce_eager:
        return True, f"loading {model} without compiling it (engine.enforce_eager)"
    if is_compiled:
        return False, f"loading {model} with its saved compilation"
    if enforce_eager is None and tokens_left is not None and tokens_left < BREAK_EVEN_TOKENS:
        left = f"about {format_count(tokens_left)} tokens left do not repay {seconds} of compiling"
        return True, f"loading {model} without compiling it: {left}"
    return False, f"loading {model} and compiling it for this CPU (about {seconds}, once)"


def _vllm_config(arguments: Mapping[str, Any]) -> "VllmConfig":
    from vllm.engine.arg_utils import EngineArgs

    vllm_config = EngineArgs(**arguments).create_engine_config()
    if (lora := vllm_config.lora_config) is not None:
        lora.target_modules = _adapted_modules(vllm_config, lora.target_modules or ())
    return vllm_config


def _adapted_modules(vllm_config: "VllmConfig", names: Sequence[str]) -> list[str]:
    """Modules of the adapter by the names that vLLM's model gives them, in place of the names of its matrices.

    Left to itself vLLM adapts the output head too, and its path for that counts on one row per chain: while it scores,
    which takes a row per token, it crashes on a CPU.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name
    from vllm.model_executor.model_loader.utils import get_model_cls

    # As vLLM renames the adapter's matrices when it loads them.
    mapper = getattr(get_model_cls(vllm_config.model_config), "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    modules = {parse_fine_tuned_lora_name(name, renames)[0] for name in names}
    # All experts are one module.
    experts = {"experts"} if any(".experts" in name for name in modules) else set()
    return sorted(experts | {name.rpartition(".")[2] for name in modules})


def _cpu_config(
    arguments: dict[str, Any], config: EmbeddedConfig, scores: bool, tokens_left: float | None
) -> tuple["VllmConfig", Path | None]:
    """The VllmConfig, and the file to create once the model is compiled (None: it is not compiled)."""
    import torch._dynamo.config
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors

    # vLLM's key for saved compilations names no instruction set: machines that share a home would share kernels.
    capability = {"cpu_capability": torch.backends.cpu.get_cpu_capability()}
    arguments |= {"additional_config": {**arguments.get("additional_config", {}), **capability}}
    vllm_config = _fitted_config(arguments, config, scores)
    folder = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "torch_aot_compile"
    marker = folder / f"stillroom-{stable_hash(str(aot_compile_hash_factors(vllm_config)))}"
    model = vllm_config.model_config
    eager, line = cpu_start(
        arguments["model"],
        model.get_total_num_hidden_layers(),
        enforce_eager=config.enforce_eager,
        is_compiled=marker.exists(),
        tokens_left=tokens_left,
    )
    note(line)
    if not eager:
        return vllm_config, marker
    # vLLM compiles a kernel for ranks at the first request, whatever enforce_eager says: a minute on a small machine.
    torch._dynamo.config.disable = True
    return vllm_config if model.enforce_eager else _fitted_config(
        arguments | {"enforce_eager": True}, config, scores
    ), None


def _fitted_config(arguments: Mapping[str, Any], config: EmbeddedConfig, scores: bool) -> "VllmConfig":
    vllm_config = _vllm_config(arguments)
    scheduler, max_model_len = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    if not scores:
        # Prompts are not split on a CPU: one step must take the longest one whole.
        if config.max_num_batched_tokens is not None and config.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"engine.max_num_batched_tokens={config.max_num_batched_tokens} is below max_model_len={max_model_len}:"
                " on a CPU prompts are not split into chunks, raise it or lower engine.max_model_len"
            )
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, max_model_len)
    # Either may be set: kv_cache_gb, or vLLM's own VLLM_CPU_KVCACHE_SPACE.
    if vllm_config.cache_config.kv_cache_memory_bytes is None:
        vllm_config.cache_config.kv_cache_memory_bytes = _kv_cache_bytes(vllm_config)
    return vllm_config


def _kv_cache_bytes(vllm_config: "VllmConfig") -> int:
    """What `max_num_seqs` chains of `max_model_len` tokens need, within FREE_MEMORY_FRAC of what is free."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    limit = int(FREE_MEMORY_FRAC * _free_memory_bytes())
    if model.has_inner_state:
        # Recurrent layers keep states of other sizes than keys and values.
        return limit
    itemsize = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model).itemsize
    # 2: keys and values.
    token_bytes = (
        2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size() * itemsize
    )
    blocks_per_chain = -(-model.max_model_len // cache.block_size)
    # vLLM holds one block back.
    num_blocks = vllm_config.scheduler_config.max_num_seqs * blocks_per_chain + 1
    return min(limit, num_blocks * cache.block_size * token_bytes)


def _free_memory_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _installed_arrays() -> "type[ArrayLogprobs] | None":
    """vLLM's log probabilities are kept as arrays from now on, where it is as expected."""
    reason = misfit(ARRAYS)
    if reason is not None:
        warn(f"reading logprobs from vLLM's slower flat lists: its arrays are not as expected: {reason}: {HOW_TO_FIT}")
        return None
    from teacher_cache.engine.vllm_arrays import ArrayLogprobs, install_arrays

    install_arrays()
    return ArrayLogprobs


def _needs_plugin(capture: CaptureConfig) -> bool:
    return capture.draws > 0 or bool(capture.temperatures)


def _require_no_plugin(capture: CaptureConfig, reason: str) -> None:
    """vLLM itself gives top candidates; draws, temperatures and exact entropies need the plugin at its sampler."""
    if _needs_plugin(capture):
        needed = "draws" if capture.draws else "temperatures"
        raise ConfigError(
            f"capture.{needed} needs stillroom's plugin in vLLM's sampler, which is not active: {reason}. "
            "Without it set draws: 0, max_support: 64 and no temperatures"
        )
    warn(f"using vLLM's own top-k, slower and without exact entropies: the sampler plugin is not active: {reason}")


def _set_log_level(level: str) -> None:
    """vLLM on a CPU warns of a dozen things that are as they should be here. VLLM_LOGGING_LEVEL brings them back."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    logging.getLogger("vllm").setLevel(level)


def _is_cpu_build() -> bool:
    return any(one.name == "vllm-cpu" for one in distributions())


def _versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Sends file descriptor 1 to 2: C++ libraries and engine processes print to it, and stdout is for results."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


@contextlib.contextmanager
def _restored_preload() -> Iterator[None]:
    """Restores LD_PRELOAD, which vLLM sets for its own processes: other children of ours must not inherit it."""
    before = os.environ.get("LD_PRELOAD")
    try:
        yield
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before
