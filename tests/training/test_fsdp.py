import pytest
from torch import nn

from lit_rlhf.errors import UserError
from lit_rlhf.training import FSDP2, make_trainer


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "fsdp"}, "strategy=fsdp2"),
        ({"strategy": "fsdp2", "precision": "64-true"}, "32-true, bf16-true, bf16-mixed"),
        ({"strategy": FSDP2(), "precision": "16-mixed"}, "32-true, bf16-true, bf16-mixed"),
        ({"strategy": "fsdp2", "compile": True}, "trainer.compile"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        make_trainer("cpu", logger=False, **settings)


def test_the_class_names_that_are_missing_are_said(policy):
    [kind] = {type(layer).__name__ for part in policy.modules() if isinstance(part, nn.ModuleList) for layer in part}
    assert len(FSDP2([kind])._layers(policy.base_model)) == len(FSDP2()._layers(policy.base_model)) == 2
    with pytest.raises(UserError, match=rf"layer_classes=.*what it repeats is {kind}"):
        FSDP2(["Block"])._layers(policy.base_model)


def test_inference_mode_is_off_where_weights_are_gathered():
    assert make_trainer("cpu", logger=False).predict_loop.inference_mode
    assert not make_trainer("cpu", logger=False, strategy="fsdp2").predict_loop.inference_mode
