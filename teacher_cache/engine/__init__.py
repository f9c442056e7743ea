"""vLLM inside this program: engine, capture, and the plugin at its sampler. Only this folder imports vllm."""
