"""VeRL on a CPU: platform, FSDP2 engine and a rollout replica on transformers. Switched on by ``VERL_PLATFORM=cpu``."""

ROLLOUT_NAME = "transformers"
"""``actor_rollout_ref.rollout.name``."""
BACKEND = "ray"
"""``actor_rollout_ref.rollout.checkpoint_engine.backend`` for ``trainer_mode=separate_async``."""
