"""The exploration bonus against a loop over members, and where it can be used."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from layeredrl_torchrl import EnsembleDisagreement, Model

INF = float("inf")


def test_it_is_the_std_of_the_members_means_in_units_of_the_change(fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_models=3, n_modes=2)
    ensemble.fit_statistics(*transitions())
    state, context, action = torch.randn(2, 4, 3), torch.randn(2, 4, 2), torch.randn(2, 4, 2)
    mean, weights, _, _ = ensemble.predict(state, context, action)
    bonus = EnsembleDisagreement(ensemble, scale=2.0)(state, context, action)
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


def test_it_is_a_module_of_a_pipeline(fc, recorded):
    ensemble, _ = recorded(fc)
    bonus = EnsembleDisagreement(ensemble, out_keys=["curiosity"])
    td = TensorDict(
        state=torch.randn(5, 3), context=torch.randn(5, 2), action=torch.randn(5, 2), batch_size=5
    )
    out = TensorDictSequential(bonus)(td)
    expected = bonus(td["state"], td["context"], td["action"])
    assert torch.equal(out["curiosity"], expected.unsqueeze(-1))
    assert not list(bonus.parameters())  # they stay with whoever owns the model


def test_far_from_the_data_trained_members_disagree_more():
    """Members trained on states around 0, asked around 0 and beyond."""
    from layeredrl_torchrl import ModelLoss, ProbabilisticEnsemble

    torch.manual_seed(0)
    box = gym.spaces.Box(-INF, INF, (1,))
    model = ProbabilisticEnsemble(box, None, box, n_models=5, ema_decay=None, clip_inputs=False)
    state, action = torch.randn(500, 1), torch.randn(500, 1)
    following = state + torch.sin(3 * state) + 0.1 * action
    model.fit_statistics(state, state[:, :0], action, following)
    batch = TensorDict(
        state=state,
        context=state[:, :0],
        action=action,
        next=TensorDict(state=following, terminated=torch.zeros(500, 1, dtype=torch.bool)),
        batch_size=500,
    )
    loss, optim = ModelLoss(model), torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        optim.zero_grad()
        loss(batch)["loss_dynamics"].backward()
        optim.step()
    bonus = EnsembleDisagreement(model)
    near = bonus(state[:100], None, action[:100]).mean()
    far = bonus(state[:100].sign() * 6, None, action[:100]).mean()
    assert far > 3 * near


def test_bad_input_is_named(fc, recorded):
    ensemble, _ = recorded(fc, n_models=1)
    with pytest.raises(ValueError, match="n_models >= 2"):
        EnsembleDisagreement(ensemble)
    with pytest.raises(TypeError, match="needs a ProbabilisticEnsemble, got int"):
        EnsembleDisagreement(3)
    with pytest.raises(TypeError, match="needs a ProbabilisticEnsemble, got Model"):
        EnsembleDisagreement(Model(*[gym.spaces.Box(-1, 1, (1,))] * 3))
    pair, _ = recorded(fc)
    with pytest.raises(ValueError, match="action is missing"):
        EnsembleDisagreement(pair)(torch.randn(2, 3), torch.randn(2, 2))
    with pytest.raises(KeyError, match="state"):
        EnsembleDisagreement(pair)(TensorDict(action=torch.randn(2, 2), batch_size=2))
