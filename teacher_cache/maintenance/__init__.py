"""Care of a cache that exists: verify, quarantine, sweep, copy."""
