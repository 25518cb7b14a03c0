"""Goals: which widths, and candidates tried on the way down."""
