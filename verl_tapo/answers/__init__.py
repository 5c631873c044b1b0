"""Accepted answers: reading them, comparing answers, and searching texts for them."""
