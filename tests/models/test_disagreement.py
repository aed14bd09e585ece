"""The exploration bonus against a loop over members, and where it can be used."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl import EnsembleDisagreement, Model

INF = float("inf")


def test_it_is_the_std_of_the_members_means_in_units_of_the_change(fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_models=3, n_modes=2)
    ensemble.fit_statistics(*transitions())
    state, context, action = torch.randn(2, 4, 3), torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    mean, weights, _, _ = ensemble.predict(state, context, action)
    disagreement = EnsembleDisagreement(ensemble, scale=2.0)
    assert not list(disagreement.parameters())  # they stay with whoever owns the model
    bonus = disagreement(state, context, action)
    assert torch.equal(2.0 * EnsembleDisagreement(ensemble)(state, context, action), bonus)
    assert bonus.shape == (2, 4)
    unit = ensemble.scaling.target.scale.tolist()
    for i in range(2):
        for j in range(4):
            total = 0.0
            for d in range(3):
                values = [
                    sum(weights[i, j, m, k].item() * mean[i, j, m, k, d].item() for k in range(2))
                    for m in range(3)
                ]
                center = sum(values) / 3
                total += math.sqrt(sum((v - center) ** 2 for v in values) / 3) / unit[d]
            assert bonus[i, j].item() == pytest.approx(2.0 * total / 3, rel=1e-3, abs=1e-5)


def test_members_that_agree_give_none(fc, recorded):
    ensemble, _ = recorded(fc, n_models=3)
    with torch.no_grad():
        for parameter in ensemble.members.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    given = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 2)
    torch.testing.assert_close(EnsembleDisagreement(ensemble)(*given), torch.zeros(5))


def test_bad_input_is_named(fc, recorded):
    ensemble, _ = recorded(fc, n_models=1)
    with pytest.raises(ValueError, match="n_models >= 2"):
        EnsembleDisagreement(ensemble)
    EnsembleDisagreement(recorded(fc, n_models=2)[0])
    with pytest.raises(TypeError, match="needs a ProbabilisticEnsemble, got int"):
        EnsembleDisagreement(3)
    with pytest.raises(TypeError, match="needs a ProbabilisticEnsemble, got Model"):
        EnsembleDisagreement(Model(*[gym.spaces.Box(-1, 1, (1,))] * 3))
    pair, _ = recorded(fc)
    with pytest.raises(ValueError, match="action is missing"):
        EnsembleDisagreement(pair)(torch.randn(2, 3), torch.randn(2, 2))
    with pytest.raises(KeyError, match="state"):
        EnsembleDisagreement(pair)(TensorDict(action=torch.randn(2, 2), batch_size=2))
