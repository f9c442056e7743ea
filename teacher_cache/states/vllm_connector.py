"""Inside vLLM's workers: hands each request's hidden states to this program as a file.

vLLM's own connector copies through pinned memory and CUDA events, which a CPU does not have, and fails there after the
request (0.32). Here a CPU copies at once; on a GPU its code runs unchanged.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class StatesConnector(ExampleHiddenStatesConnector):
    """One safetensors file per request, `hidden_states` [tokens, layers, D], in the folder of the configuration."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        cache: Any = self._kv_cache
        if cache is None or cache.is_cuda:
            super()._submit_async_write(pending)
            return
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None]
        slots = (blocks * self._block_size + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(cache, slots, len(pending.token_ids))
        # The lock that waiting readers block on is held since the request began.
        descriptor = self._lock_fds.pop(pending.req_id, None)
        save_file({"hidden_states": states.contiguous()}, pending.filename)
        if descriptor is not None:
            os.close(descriptor)
        # Without it the parent would never report the request as sent, and its blocks would not be freed.
        events: dict[str, Any] = self._req_copy_events
        events[pending.req_id] = _Done()


class _Done:
    """Stands for the event of a copy that has ended."""

    def query(self) -> bool:
        return True
