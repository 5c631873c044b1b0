"""YAML for Hydra."""
