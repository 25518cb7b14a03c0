"""Long runs: what they keep, who works, and when they stop. Nothing here changes a result."""
