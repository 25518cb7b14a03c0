"""A graph read as a structural causal model: its units, where they are read, and what they cost."""
