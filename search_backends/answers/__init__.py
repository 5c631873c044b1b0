"""Which answer a response gives, and a model that judges it. (Comparison by rules: `verl_tapo.answers`.)"""
