"""vLLM over HTTP: endpoints that share a queue of requests, and the two APIs that they are spoken to in."""
