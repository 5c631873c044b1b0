"""A retrieval service for training: an index of passages and images on the disk, and the HTTP service that searches it.

``python -m search_backends.retrieval.build`` makes an index, ``.serve`` answers from it, ``.load_test`` measures that.
"""
