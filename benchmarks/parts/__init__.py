"""One module a part; ``measure(quick)`` of each gives a `measuring.Part`."""
