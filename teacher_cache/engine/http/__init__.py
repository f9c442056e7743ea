"""vLLM behind HTTP: endpoints that share a queue of requests, what is said to them and what their answers mean."""
