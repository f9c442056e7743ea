"""vLLM embedded in this program: requests go in one at a time, completions with their distributions come out.

`LLMEngine.add_request` and `step` rather than `LLM.generate`: a window of requests is in flight, chains come out as
they finish, and a prompt that vLLM refuses fails alone. Each request has its own seed, so it gets the same tokens in
any batch, asks for the k most probable tokens, and is not detokenized: the builder decodes each chain once.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stillroom.errors import ConfigError, StillroomError
from stillroom.log import note, warn
from teacher_cache.config import CaptureConfig, EmbeddedConfig, TeacherConfig
from teacher_cache.engine.api import FINISH_REASONS, EngineInfo, Finished, Outcome, Request, refusal, seed_of_draws
from teacher_cache.engine.row_layout import Layout, is_marked
from teacher_cache.engine.vllm.arguments import adapter_args, check_switches, engine_args, new_config, scoring_args
from teacher_cache.engine.vllm.cpu import core_sharing, cpu_config
from teacher_cache.engine.vllm.fit import ARRAYS, HOW_TO_FIT, misfit, plugin_misfit
from teacher_cache.engine.vllm.process import Host, quiet_start, settings_of, short, shut_down, software, start_errors

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

    from teacher_cache.engine.vllm.arrays import ArrayLogprobs

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
        will have, for vLLM to check. `tokens_left`: how many tokens it is expected to generate; on a CPU few tokens do
        not repay compiling the model. None stands for many.

        Raises ConfigError where vLLM refuses the model or a setting, or cannot provide what `capture` needs;
        StillroomError where it fails to start.
        """
        with quiet_start(config.in_process) as host:
            self._start(teacher, config, capture, host, scores, sampling, tokens_left)
        self._core_sharing = core_sharing()
        if host.in_process:
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
        host: Host,
        scores: bool,
        sampling: Sequence[Mapping[str, Any]],
        tokens_left: float | None,
    ) -> None:
        import vllm
        from vllm.v1.engine.llm_engine import LLMEngine

        from teacher_cache.engine.plugin.register import register

        # Before the engine is made, so that workers forked from this process are prepared.
        unfit = register()
        self._typed_sampling: dict[str, dict[str, Any]] = {}
        arguments = engine_args(teacher, config, capture, host.on_cpu) | adapter_args(teacher.adapter, scores)
        for one in sampling:
            self._extra_params(one)
        check_switches(config, sampling, on_cpu=host.on_cpu, scores=scores)
        if scores:
            arguments |= scoring_args(config)
        with start_errors(teacher.model):
            if host.on_cpu:
                vllm_config, marker = cpu_config(arguments, config, scores, tokens_left)
            else:
                note(f"loading {teacher.model}")
                vllm_config, marker = new_config(arguments), None
            # Which of its two model runners vLLM takes depends on the model. Asked before the weights are loaded.
            unfit = unfit or plugin_misfit([2 if vllm_config.use_v2_model_runner else 1])
            if unfit is not None:
                require_no_plugin(capture, f"it does not fit vllm {vllm.__version__}: {unfit}: {HOW_TO_FIT}")
            self._engine = LLMEngine.from_vllm_config(vllm_config, disable_log_stats=True)
        try:
            self._prepare(teacher, capture, vllm_config, sampling, has_plugin=unfit is None)
        except StillroomError:
            shut_down(self._engine)
            raise
        if marker is not None:
            # Only now: an interrupted compilation is not saved. Where vLLM is told to save none there is no folder.
            with contextlib.suppress(OSError):
                marker.touch()
        self._max_in_flight = vllm_config.scheduler_config.max_num_seqs + config.max_waiting
        self._info = self._described(vllm_config, host)

    def _prepare(
        self,
        teacher: TeacherConfig,
        capture: CaptureConfig,
        vllm_config: "VllmConfig",
        sampling: Sequence[Mapping[str, Any]],
        *,
        has_plugin: bool,
    ) -> None:
        """Finds out how the engine that was loaded captures, and whether it accepts adapter and parameters."""
        self._adapter = None if teacher.adapter is None else self._loaded_adapter(teacher.adapter)
        self._arrays = _installed_arrays()
        self._k = min(capture.max_support, vllm_config.model_config.get_vocab_size())
        self._layout = self._working_layout(capture) if has_plugin else None
        self._require_accepted(sampling)
        # After the probes. It counts for the whole process, in which another engine may have run before.
        self._tokens_before = 0 if self._arrays is None else self._arrays.num_tokens

    def _described(self, vllm_config: "VllmConfig", host: Host) -> EngineInfo:
        from vllm.platforms import current_platform

        return EngineInfo(
            vocab_size=vllm_config.model_config.get_vocab_size(),
            max_model_len=vllm_config.model_config.max_model_len,
            entropy="support" if self._layout is None else "exact",
            software=software(),
            settings={
                **settings_of(vllm_config),
                "device": current_platform.device_name,
                "in_process": host.in_process,
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
            self._refused.append(request.failure("refused", short(error)))
        else:
            self._requests[request_id] = request

    def step(self) -> list[Outcome]:
        """One engine step: a token for every chain in the batch."""
        # Refused requests are answered here, so that every request gets its outcome from `step`.
        outcomes, self._refused = self._refused, []
        if not self._requests:
            return outcomes
        for output in self._stepped():
            if output.finished:
                outcomes.append(self._outcome(output))
        return outcomes

    def _stepped(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except Exception as error:
            raise StillroomError(f"vLLM died while generating: {short(error)}") from error
        return outputs

    def close(self) -> None:
        """Stops vLLM and frees its memory."""
        if self._closed:
            return
        self._closed = True
        self._core_sharing.__exit__()
        if self._arrays is not None:
            from teacher_cache.engine.vllm.arrays import uninstall_arrays

            uninstall_arrays()
        shut_down(self._engine)
        del self._engine

    def _loaded_adapter(self, path: str) -> "LoRARequest":
        """The adapter, loaded now: with the first chain, every one would fail."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, str(Path(path).absolute()))
        try:
            self._engine.add_lora(request)
        except Exception as error:
            # From another process it comes as a plain Exception.
            raise ConfigError(f"teacher.adapter: vLLM rejects {path}: {short(error)}") from error
        return request

    def _working_layout(self, capture: CaptureConfig) -> Layout | None:
        """The plugin's row layout where the workers, perhaps in other processes, answer a probe with it."""
        layout = Layout(self._k, capture.draws, tuple(capture.temperatures))
        if self._workers_know(layout):
            return layout
        require_no_plugin(capture, PLUGIN_MISSING)
        return None

    def _workers_know(self, layout: Layout) -> bool:
        from vllm.inputs.engine import tokens_input

        from teacher_cache.engine.vllm.capture import rows_of

        params = self._params(layout, {"temperature": 0.0}, seed=0, max_tokens=1)
        self._engine.add_request("probe", tokens_input([0]), params, lora_request=self._adapter)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._stepped()
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
        from teacher_cache.engine.vllm.values import typed

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
                raise ConfigError(f"vLLM rejects sampling.vllm: {short(error)}") from error
            self._engine.abort_request([f"check{number}"])

    def _outcome(self, output: Any) -> Outcome:
        from teacher_cache.engine.vllm.capture import capture_of, capture_of_scores

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


def _installed_arrays() -> "type[ArrayLogprobs] | None":
    """vLLM's log probabilities are kept as arrays from now on, where it is as expected."""
    reason = misfit(ARRAYS)
    if reason is not None:
        warn(f"reading logprobs from vLLM's slower flat lists: its arrays are not as expected: {reason}: {HOW_TO_FIT}")
        return None
    from teacher_cache.engine.vllm.arrays import ArrayLogprobs, install_arrays

    install_arrays()
    return ArrayLogprobs


def require_no_plugin(capture: CaptureConfig, reason: str) -> None:
    """Raises ConfigError for what only the plugin can capture. vLLM itself gives top candidates."""
    if capture.draws or capture.temperatures:
        needed = "draws" if capture.draws else "temperatures"
        raise ConfigError(
            f"capture.{needed} needs stillroom's plugin in vLLM's sampler, which is not active: {reason}. "
            "Without it set draws: 0, max_support: 64 and no temperatures"
        )
    warn(f"using vLLM's own top-k, slower and without exact entropies: the sampler plugin is not active: {reason}")
