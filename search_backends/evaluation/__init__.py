"""Stores an evaluation so that it can be resumed, and computes how certain its figures are."""
