"""``verl-tapo selftest``: does TAPO do here what it should, in the installed veRL?"""
