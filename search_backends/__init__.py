"""Back ends of a search agent: tools, cached providers, a retrieval service, pages, data sets,
evaluation.

Everything that comes back is bounded and cleaned before a model sees it. Nothing here knows veRL or
a recipe. docs/backends.md describes each part and its use.
"""
