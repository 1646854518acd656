import pytest
import torch
from torch import nn

from lit_rlhf.training import make_trainer
from lit_rlhf.training.batches import BatchLoader, in_order
from lit_rlhf.training.parts import LearnsInParts


class Falling(LearnsInParts):
    def __init__(self, max_grad_norm):
        super().__init__()
        self.layer, self.max_grad_norm = nn.Linear(2, 1), max_grad_norm

    def training_step(self, batch, batch_idx):
        return self.layer(torch.tensor([1.0, float(batch[0])], dtype=torch.float64)).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(("own", "trainers", "norm"), [(1e-3, None, 1e-3), (1e-3, 1e-4, 1e-4), (None, 1e-4, 1e-4)])
def test_gradients_are_clipped_to_what_the_module_says_or_the_trainer(own, trainers, norm):
    falling, settings = Falling(own).double(), {"logger": False, "enable_progress_bar": False}
    before = nn.utils.parameters_to_vector(falling.parameters()).detach().clone()
    make_trainer("cpu", precision="64-true", max_steps=1, gradient_clip_val=trainers, **settings).fit(
        falling, BatchLoader(in_order(10), 1, lambda mine, _: mine)
    )
    step = nn.utils.parameters_to_vector(falling.parameters()).detach() - before
    torch.testing.assert_close(step.norm().item(), 0.01 * norm, rtol=1e-3, atol=0.0)  # a learning rate of 0.01
