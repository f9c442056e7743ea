"""Self-contained HTML reports and their charts."""
