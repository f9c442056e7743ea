"""From a SQL condition to packs: which chains are read, in which order, and what stands at each position of a pack."""
