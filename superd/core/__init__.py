"""Values and rules: no I/O, no clock, no trio. Give it facts and `now`, it gives back values."""
