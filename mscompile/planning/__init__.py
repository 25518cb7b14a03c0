"""Who stays, and what stands in for the others."""
