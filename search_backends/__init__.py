"""What search tools ask: providers behind a shared cache, a retrieval service, and pages of the public web.

Everything that comes back is bounded and cleaned before a model sees it. Nothing here knows veRL or a recipe;
docs/backends.md says what each part does and how it is used.
"""
