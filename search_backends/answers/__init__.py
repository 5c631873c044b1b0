"""Extracts the answer of a response and judges it with a model. (`verl_tapo.answers` compares by
rules.)"""
