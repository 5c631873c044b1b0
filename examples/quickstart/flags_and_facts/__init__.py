"""Flags & Facts: a small multimodal search task on real flags and real facts, all of it on this disk."""
