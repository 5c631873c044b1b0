"""TAPO's rule, without a veRL import: `credit` is the rule, `reference` the same as plain loops."""
