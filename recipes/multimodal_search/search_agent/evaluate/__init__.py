"""Evaluates models on the benchmarks, with the tools of training: ``python -m search_agent.evaluate --help``."""
