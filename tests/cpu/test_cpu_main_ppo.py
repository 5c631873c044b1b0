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


# A step begins as soon as its rollouts are there, not up to two seconds later, when the others may be finished too.
EAGER = """
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync


class Eager(ReplayBufferAsync):
    def __init__(self, **kwargs):
        super().__init__(poll_interval=0.02, **kwargs)
"""
# A server takes a rollout at a time, and always has others to do besides those that are trained on. So new weights come
# in the middle of one, however fast the machine is. What was queued before it is trained on first, in up to four steps.
ASYNC = [
    "algorithm.adv_estimator=tapo",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "data.train_batch_size=4",
    "data.max_prompt_length=128",
    "data.max_response_length=48",
    "trainer.total_training_steps=8",
    "trainer.save_freq=1",
    "trainer.n_gpus_per_node=2",
]


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("colocate_async", ["trainer.v1.colocate_async.num_warmup_batches=2"]),
        (
            "separate_async",
            [
                "trainer.v1.separate_async.num_warmup_batches=2",
                "trainer.v1.separate_async.parameter_sync_step=2",
                # Two prompts for each worker: one's rollouts may all be equally long (see docs/tested.md).
                "data.train_batch_size=8",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "data.max_response_length=96",
                "actor_rollout_ref.rollout.nnodes=1",
                "actor_rollout_ref.rollout.n_gpus_per_node=1",
                "actor_rollout_ref.rollout.checkpoint_engine.backend=ray",
                "ray_kwargs.ray_init.num_gpus=3",
            ],
        ),
    ],
)
def test_two_workers_killed_and_resumed(tmp_path, mode, more):
    model = save_tiny_model(tmp_path / "model", "qwen3_vl")
    eager = tmp_path / "eager.py"
    eager.write_text(EAGER)
    overrides = [
        f"actor_rollout_ref.model.path={model}",
        f"trainer.v1.trainer_mode={mode}",
        f"trainer.v1.sampler.custom_sampler.path={eager}",
        "trainer.v1.sampler.custom_sampler.name=Eager",
        *ASYNC,
        *more,
    ]
    before = run_main_ppo(overrides, tmp_path / "run", killed_after=2)
    after = run_main_ppo(overrides, tmp_path / "run")
    steps = [*before.metrics, *after.metrics]
    begun = after.metrics[0]["training/global_step"]
    assert f"Resuming from {tmp_path / 'run' / 'checkpoints' / f'global_step_{begun - 1}'}" in after.stdout
    assert begun > 2
    assert [step["training/global_step"] for step in after.metrics] == list(range(begun, 9))
    fresh = "training/off_policy/trajectory_staleness_worst/max"
    assert steps[0][fresh] == 0
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
        # The checkpoint keeps finished rollouts of older weights; all others are of the trainer's.
        assert step[fresh] > 0 or step["training/rollout_probs_diff_max"] < 1e-4
    for figure, least in ("tapo/weights_apart", 0), ("training/off_policy/trajectory_spans/max", 1):
        assert max(step[figure] for step in after.metrics) > least
    weights = after.weights()
    assert {name.partition("/")[0] for name, _ in weights} == {f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)}
    assert all(value.isfinite().all() for _, value in weights)
