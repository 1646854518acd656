"""Policy optimization against a reward model: PPO, and the simpler algorithms on the way to it."""

from lit_rlhf.stages.stage import GRADES, SFT_STD, Model, Panel, RoundFigure, Section, Stage, exports

STAGE = Stage(
    name="ppo",
    title="PPO",
    order=60,
    module="lit_rlhf.stages.ppo.module.PPOModule",
    data=("lit_rlhf.stages.ppo.data.PPODataModule", "lit_rlhf.stages.ppo.data.WorldPPODataModule"),
    objective="win_rate.mean",
    models={"policy": "sft", "reward_model": "reward"},
    in_pipeline=True,
    aligns=True,
    trains_on_prompts=True,
    per_round=(RoundFigure("Episodes", "", "episodes"), RoundFigure("KL from where it began", "nats", "kl")),
    panels=(
        Panel(
            "Score",
            SFT_STD,
            {"ppo/score": "rollouts", "val/ppo/score": "held out", "ppo/reward": "rollouts, less the KL penalty"},
        ),
        Panel("KL to SFT", "nats per answer", {"ppo/kl": "rollouts", "val/ppo/kl": "held out"}),
        Panel("Win rate against SFT", "%", {"val/ppo/win_rate": "held out"}, (0.5, "as good as SFT")),
        Panel("Gold grade", "points", {"ppo/gold": "rollouts", "val/ppo/gold": "held out"}),
        Panel("Correctness", GRADES, {"val/ppo/correct": "held out"}),
        Panel("Entropy", "nats per token", {"ppo/entropy": "rollouts"}),
        Panel("Policy loss", "", {"ppo/policy_loss": "clipped surrogate"}),
        Panel("Value loss", f"{SFT_STD}²", {"ppo/value_loss": "critic"}),
        Panel("Explained variance", "", {"ppo/explained_variance": "critic"}, (0.0, "a constant does as well")),
        Panel("Loss, total", "", {"ppo/loss": "policy + critic"}, folded=True),
        Panel("Clipped ratios", "%", {"ppo/clip_fraction": "of tokens"}, folded=True),
        Panel("Step KL", "nats per token", {"ppo/approx_kl": "to the rollout's policy"}, folded=True),
        Panel("Answer length", "tokens", {"ppo/response_length": "rollouts"}, folded=True),
        Panel("Answers that ended", "%", {"ppo/finished": "rollouts"}, folded=True),
        Panel("Value", SFT_STD, {"ppo/value": "critic's mean"}, folded=True),
        Panel(
            "Spread, standard deviation",
            SFT_STD,
            {"ppo/score_std": "scores", "ppo/advantage_std": "advantages"},
            folded=True,
        ),
        Panel(
            "Gradient norm",
            "before clipping",
            {"ppo/grad_norm": "policy", "ppo/critic_grad_norm": "critic"},
            folded=True,
        ),
        Panel("Learning rate", "", {"ppo/lr": "policy"}, folded=True),
    ),
    x_axis=("ppo/episodes", "episodes"),
    model=Model("ppo", "PPO", "orange"),
    own_section=True,
    section=Section(
        "PPO, episode by episode",
        "An episode is one sampled answer. The score is what PPO is asked to raise, the KL to the SFT model is what it "
        "pays for it. Where values jump about, the thin line is what was logged and the thick one is smoothed.",
        "More of PPO: clipping, lengths, gradients, learning rate",
    ),
    note="{episodes} episodes",
    in_sweeps=("kl", "score_last", "gold"),
)
__getattr__, __all__ = exports(
    STAGE,
    advantage="GAE MonteCarlo",
    health="HealthWatch Limits Unhealthy",
    kl="KLPenalty",
    loss="ClippedLoss KLPenaltyLoss",
    module="ReferenceUpdate",
    scoring="Scoring",
)
