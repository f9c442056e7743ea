"""Several workers on one cache: parts by lease, workers as child processes, and on a Ray cluster."""
