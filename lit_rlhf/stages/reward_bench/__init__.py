"""Reward models on questions of which people know the better answer (RewardBench's files)."""

from lit_rlhf.stages.stage import Stage, exports

STAGE = Stage(
    name="reward_bench",
    title="Reward benchmark",
    order=95,
    module="lit_rlhf.stages.reward_bench.module.RewardBenchModule",
    data=("lit_rlhf.stages.reward_bench.data.RewardBenchDataModule",),
    objective="accuracy",
    models={"reward_model": "reward"},
    note="{accuracy:%} of {questions} right",
    headline="The reward model scores the chosen answer highest in **{accuracy:%}** of {questions} questions.",
)
__getattr__, __all__ = exports(STAGE)
