"""One pass over data: what is known of each unit, and of what its loss would do."""
