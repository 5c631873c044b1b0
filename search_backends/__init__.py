"""What a search agent stands on: tools, providers behind a cache, a retrieval service, pages, data sets, evaluation.

Everything that comes back is bounded and cleaned before a model sees it. Nothing here knows veRL or a recipe;
docs/backends.md says what each part does and how it is used.
"""
