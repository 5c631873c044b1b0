"""Pages of the public web, read without a service in between: no address inside the network is reached by it."""

from search_backends.fetch.fetcher import Fetched, SafeFetcher
from search_backends.fetch.reader import DirectReader

__all__ = ["DirectReader", "Fetched", "SafeFetcher"]
