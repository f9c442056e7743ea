"""vLLM embedded in this program. Modules that import it where they are imported: `arrays`, `capture`, `values`."""
