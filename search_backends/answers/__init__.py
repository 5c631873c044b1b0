"""Which answer was given, which ones are accepted, and whether it is right: by rules, or by a model that judges."""
