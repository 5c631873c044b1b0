"""``python -m verl.trainer.main_ppo`` itself, on a CPU: Ray, FSDP2, TransferQueue, agent loop, reward, checkpoint."""

import math

import pytest
from cpu_runs import run_main_ppo
from tiny_models import save_tiny_model

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

SMALL = [
    "data.train_batch_size=2",
    "data.max_prompt_length=128",
    "data.max_response_length=24",
    "trainer.total_training_steps=2",
    "trainer.save_freq=2",
]


# Two updates a step, whose old log-probs are both of the weights before them; a server of its own.
SEPARATE = [
    "trainer.v1.separate_async.parameter_sync_step=2",
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=ray",
    "ray_kwargs.ray_init.num_gpus=2",
]


@pytest.mark.parametrize(
    ("family", "mode", "more"),
    [
        ("qwen2_5_vl", "sync", []),
        ("qwen3_vl", "colocate_async", []),
        ("qwen3_vl", "separate_async", SEPARATE),
    ],
)
def test_two_steps_of_a_vision_model(tmp_path, family, mode, more):
    model = save_tiny_model(tmp_path / "model", family)
    overrides = [f"actor_rollout_ref.model.path={model}", f"trainer.v1.trainer_mode={mode}", *SMALL, *more]
    run = run_main_ppo(overrides, tmp_path / "run")
    assert len(run.metrics) == 2
    on_policy = run.metrics if mode == "sync" else run.metrics[:1]  # the second's rollouts are an update old, by design
    for step in on_policy:
        assert step["training/rollout_probs_diff_max"] < 1e-4
    for step in run.metrics:
        assert step["actor/grad_norm"] > 0
        assert all(math.isfinite(value) for value in step.values())
    weights = run.weights()
    assert weights
    assert all(value.isfinite().all() for _, value in weights)
