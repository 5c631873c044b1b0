"""Rows, images and twins of public data sets, as they are distributed."""
