"""SQL over a cache with DuckDB."""
