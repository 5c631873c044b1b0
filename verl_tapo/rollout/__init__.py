"""Agent loops for veRL that record what happened: imports veRL."""
