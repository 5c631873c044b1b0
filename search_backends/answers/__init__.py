"""Whether an answer is right: the accepted ones, comparison by rules, and a model that judges."""
