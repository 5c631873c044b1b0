"""Tool calls: what training's agent loop and an evaluation say and count alike. Without veRL."""
