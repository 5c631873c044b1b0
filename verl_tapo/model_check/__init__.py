"""``verl-tapo doctor --model``: a model's tokenizer and chat template, with a run's tools and tool format."""
