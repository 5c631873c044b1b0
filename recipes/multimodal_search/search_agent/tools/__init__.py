"""The agent's tools, as veRL runs them (``class_name`` in a tools YAML): text search, image search, zoom, visit."""

from search_agent.tools.image_search import ImageSearch
from search_agent.tools.text_search import TextSearch
from search_agent.tools.visit import Visit
from search_agent.tools.zoom import Zoom

__all__ = ["ImageSearch", "TextSearch", "Visit", "Zoom"]
