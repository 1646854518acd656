"""Where Hydra looks for sweepers, and takes none from elsewhere."""

from lit_rlhf.pipeline import optuna_sweeper


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """``hydra/sweeper=optuna``."""
