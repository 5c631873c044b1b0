"""Adapters to veRL's trainers: the only place, with `verl_tapo.rollout`, that imports veRL."""
