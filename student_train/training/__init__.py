"""The training loop, a stage and its steps, and what is watched while it trains."""
