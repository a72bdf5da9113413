"""One check of devices, whatever asks."""

from __future__ import annotations

import pytest
import torch

from hijacklens.errors import InputError
from hijacklens.models.devices import choose_device
from hijacklens.models.loading import load_model
from hijacklens.one_layer.task import ConceptTask
from hijacklens.one_layer.training import train


def test_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device(None) == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; allowed: cpu, cuda"),
        ("", "unknown device ''"),
        ("cuda:99", "'cuda:99' does not exist: this machine has"),
        ("meta", "'meta' cannot be used here"),
    ],
)
def test_language_models_and_one_layer_models_say_the_same(device, message):
    said = []
    for ask in (
        lambda: choose_device(device),
        lambda: load_model("smollm2-135m", device=device),
        lambda: train(ConceptTask(bits=2), d_model=2, steps=1, device=device, quiet=True),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        said.append(str(caught.value))
    assert message in said[0]
    assert len(set(said)) == 1
    assert len(said[0]) < 300
