"""What value gradients take, refuse and call by name; TorchRL's hooks; copies; compiled."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from gradient_parts import ACTION, make_learned, make_line, make_steps
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, OneHot, Unbounded
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import SoftUpdate, ValueEstimators

from layeredrl_torchrl import PredictorFactory, ValueGradientLoss
from layeredrl_torchrl.imagination._following import follow
from layeredrl_torchrl.nets import QValueOperator, TanhActor

pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


@pytest.mark.parametrize("batch", [(6,), (2, 3)])
def test_forward_leaves_the_predictor_alone_and_takes_any_batch(batch):
    loss = make_learned(horizon=2)
    td = TensorDict({"state": torch.randn(*batch, 2)}, batch)
    out = loss(td)
    assert td["td_error"].shape == (*batch, 1)
    sum(out[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    members = loss.predictor.model.members
    assert all(p.requires_grad and p.grad is None for p in members.parameters())
    assert not set(map(id, loss.parameters())) & set(map(id, loss.predictor.parameters()))


@pytest.mark.parametrize("frozen", [[], ["model"], ["rew_func"], ["model", "rew_func", "val_func"]])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_frozen_stays_so_and_nothing_of_the_predictor_gets_a_gradient(frozen, fails):
    loss = make_learned(horizon=2)
    predictor = loss.predictor
    for name in frozen:
        getattr(predictor, name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in predictor.named_parameters()}
    assert not all(before.values())  # target networks are frozen in any case
    td = TensorDict({"state": torch.full((6, 2), torch.nan if fails else 0.5)}, [6])
    with pytest.raises(ValueError, match="finite") if fails else nullcontext():
        loss(td)["loss_actor"].backward()
    assert {name: p.requires_grad for name, p in predictor.named_parameters()} == before
    assert all(p.grad is None for p in predictor.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_reduction_every_output_has_a_number_for_each_row(padded):
    torch.manual_seed(0)
    loss = make_learned(horizon=1, reduction="none")
    td = TensorDict({"state": torch.randn(6, 2)}, [6])
    kept = torch.arange(6) != 2
    if padded:
        td[("collector", "mask")] = kept
    torch.manual_seed(1)
    rows = loss(td)
    loss.reduction = "mean"
    torch.manual_seed(1)
    mean = loss(td.exclude("td_error"))
    assert set(rows.keys()) == set(mean.keys()) == set(loss.out_keys)
    for key in loss.out_keys:
        assert rows[key].shape == (6,)
        counted = rows[key][kept] if padded else rows[key]
        torch.testing.assert_close(counted.mean(), mean[key])
        assert not padded or key == "alpha" or rows[key][2] == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("horizon", [0, 2])
def test_tensors_by_name_give_what_a_tensordict_gives(horizon, reduction):
    loss, td = make_learned(horizon=horizon, reduction=reduction), make_steps(6)
    named = {"_".join([key] if isinstance(key, str) else key): td[key] for key in loss.in_keys}
    torch.manual_seed(0)
    found = loss(**named)
    torch.manual_seed(0)
    expected = loss(td)
    torch.testing.assert_close(found, tuple(expected[key] for key in loss.out_keys))


def test_torchrls_soft_update_and_key_names_and_state_dicts_work():
    loss = make_learned(horizon=1)
    update = SoftUpdate(loss, tau=0.25)
    before = loss.target_qvalue_network_params.clone()
    with torch.no_grad():
        loss.qvalue_network_params.data.apply_(lambda x: x.add_(1) if x.is_floating_point() else x)
    update.step()
    key = ("module", "head", "net", "0", "weight")
    shift = loss.target_qvalue_network_params[key] - before[key]
    torch.testing.assert_close(shift, torch.full_like(shift, 0.25), atol=1e-5, rtol=0)
    loss.set_keys(value_target="worth")
    td = TensorDict({"state": torch.randn(4, 2), "action": ACTION.rand((4,))}, [4])
    td["worth"] = torch.zeros(4, 1)
    assert loss(td)["loss_qvalue"] > 0
    other = make_learned(horizon=1)
    other.load_state_dict(loss.state_dict())
    for a, b in zip(loss.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"horizon": -1}, ValueError, "horizon"),
        ({"horizon": 1.5}, TypeError, "horizon"),
        ({"alpha_init": 0.0}, ValueError, "alpha_init"),
        ({"num_qvalue_nets": 0}, ValueError, "num_qvalue_nets"),
        ({"loss_function": "huber"}, ValueError, "loss_function"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"mean_qvalue": "yes"}, TypeError, "mean_qvalue"),
        ({"predictor": nn.Linear(2, 2)}, TypeError, "predictor"),
        ({"actor": nn.Linear(2, 2)}, TypeError, "actor_network must be"),
        ({"actor": TanhActor(2, 0, ACTION, in_keys=["observation"])}, ValueError, "observation"),
        ({"actor": TanhActor(2, 0, ACTION, action_key="u")}, ValueError, "writes"),
        ({"critic": QValueOperator(2, 0, 2, in_keys=["z", "", "action"])}, ValueError, "'z'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_when_built(options, error, message):
    parts = {"actor": TanhActor(2, 0, ACTION), "critic": QValueOperator(2, 0, 2)}
    parts["predictor"] = PredictorFactory(hidden_sizes=(8,))(Unbounded((2,)), ACTION)
    parts |= {name: options.pop(name) for name in list(options) if name in parts}
    with pytest.raises(error, match=message):
        ValueGradientLoss(*parts.values(), **options)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("value_targets", ("next", "reward")),
        ("value_targets", ("next", "state")),
        ("fit_scale", "state"),
        ("fit_scale", ("next", "reward")),
        ("fit_inputs", "action"),
        ("qvalue_loss", "value_target"),
        ("actor_loss", "state"),
        ("forward", "action"),
    ],
)
def test_values_that_are_not_finite_are_refused(method, key, unchanged):
    loss, steps = make_learned(horizon=1), make_steps(4, 3)
    steps["value_target"] = torch.zeros(4, 3, 1)
    steps[key][1, 1] = torch.nan
    with unchanged(loss), pytest.raises(ValueError, match="non-finite"):
        getattr(loss, method)(steps)


def test_options_of_the_value_estimator_are_checked():
    loss = make_learned(horizon=1)
    with pytest.raises(NotImplementedError, match="GAE"):
        loss.make_value_estimator(ValueEstimators.GAE)
    with pytest.raises(TypeError, match="lmbda"):
        loss.make_value_estimator(ValueEstimators.TD0, lmbda=0.5)
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="gamma"):
            loss.make_value_estimator(gamma=value)
        with pytest.raises(ValueError, match="lmbda"):
            loss.make_value_estimator(ValueEstimators.TDLambda, lmbda=value)
    for value in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"^rate must be finite and lie in"):
            loss.fit_scale(make_steps(4), rate=value)
    for value in (0.0, 1.0):
        loss.make_value_estimator(ValueEstimators.TDLambda, lmbda=value, gamma=value)
    loss.make_value_estimator(gamma=1.0)
    loss.make_value_estimator(ValueEstimators.TD0)
    assert loss.gamma == 1.0  # until another is given
    with pytest.raises(ValueError, match="no bounds"):
        loss.fit_scale(make_steps(4))


def test_flags_may_be_bytes():
    loss, steps = make_learned(horizon=0), make_steps(20)
    flags = steps.clone()
    for key in ("done", "terminated"):
        flags["next", key] = flags["next", key].byte()
    found = []
    for td in (steps, flags):
        torch.manual_seed(0)
        found.append(loss.qvalue_loss(td)[0])
        torch.manual_seed(0)
        found.append(loss.value_targets(td.unsqueeze(0))["value_target"])
    assert steps["next", "terminated"].any()
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.parametrize("key", [("collector", "mask"), "mask", "mine"])
def test_padding_counts_nowhere(key):
    loss = make_learned(horizon=2)
    if key == "mine":
        loss.loss_mask_key = key
    steps = make_steps(6)
    padded = torch.cat([steps, steps.apply(lambda x: 50 * x if x.is_floating_point() else x)])
    padded[key] = torch.arange(12) < 6
    loss.log_alpha.data.fill_(-60.0)  # actions are drawn at random
    states = []
    for td in (steps, padded):
        loss.fit_inputs(td)
        loss.fit_scale(td)
        states.append({k: v.clone() for k, v in loss.state_dict().items()})
    torch.testing.assert_close(*states)
    torch.manual_seed(0)
    said = loss(padded)
    torch.manual_seed(0)
    found = loss.actor_loss(padded)[1]
    torch.testing.assert_close(said["value"], found["value"][:6].mean())
    torch.testing.assert_close(said["entropy"], -found["log_prob"][:6].mean())


def test_statistics_of_no_rows_are_refused():
    loss, steps = make_learned(horizon=1), make_steps(4)
    steps["mask"] = torch.zeros(4, dtype=torch.bool)
    for given, masks in ((steps, r"\('collector', 'mask'\)"), (make_steps(0), "")):
        for fit in (loss.fit_inputs, loss.fit_scale):
            with pytest.raises(ValueError, match=rf"no row of .* counts.*masks \[{masks}\]"):
                fit(given)


def test_names_of_entries_may_be_nested_keys():
    loss = make_learned(horizon=0)
    loss.set_keys(reward=("team", "reward"), state_action_value="q")
    assert loss.in_keys[2] == ("next", "team", "reward")
    with pytest.raises(KeyError, match="state_action_value"):
        loss(make_steps(4).update({"next": {"team": {"reward": torch.zeros(4, 1)}}}))


def test_starts_of_another_shape_are_refused():
    loss = make_learned(horizon=1)
    for state, batch in (((4, 3), [4]), ((4, 2), []), ((4, 1, 2), [4])):
        with pytest.raises(ValueError, match="'state' has shape"):
            loss(TensorDict({"state": torch.zeros(state)}, batch))
    assert loss(TensorDict({"state": torch.zeros(0, 2)}, [0]))["loss_actor"].shape == ()


def test_targets_of_another_shape_are_refused():
    loss, td = make_learned(horizon=1), make_steps(4)
    found = []
    for shape in ((4, 1), (4,)):
        td["value_target"] = torch.arange(4.0).reshape(shape)
        found.append(loss.qvalue_loss(td)[0])
    assert torch.equal(*found)
    td["value_target"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"'value_target' has shape \(4, 2\), expected \(4, 1\)"):
        loss.qvalue_loss(td)


@pytest.mark.parametrize("batch", [(6,), (2, 3)])
@pytest.mark.parametrize("horizon", [0, 2])
def test_a_context_is_read_and_must_be_there(horizon, batch):
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=2, context_dims=[2])(
        Unbounded((3,)), ACTION
    )
    actor, critic = TanhActor(2, 1, ACTION, (8,)), QValueOperator(2, 1, 2, (8,))
    loss = ValueGradientLoss(actor, critic, predictor, horizon=horizon)
    td = make_steps(*batch)
    with pytest.raises(KeyError, match="'context'"):
        loss(td)
    td["context"] = 5.0 + torch.zeros(*batch, 1)
    loss.fit_inputs(td)
    loc = loss.actor_network_params["module", "0", "module", "inputs", "loc"]
    torch.testing.assert_close(loc[2].item(), 5.0)
    loss.fit_scale(td)
    assert loss(td)["loss_actor"].isfinite()  # the next context is this one


def test_a_policy_acts_in_the_predictors_space():
    def build(spec, own):
        predictor = PredictorFactory(hidden_sizes=(8,), n_models=2)(Unbounded((2,)), spec)
        critic = QValueOperator(2, 0, own, (8,))
        return ValueGradientLoss(TanhActor(2, 0, own, (8,)), critic, predictor, horizon=1)

    build(ACTION, Bounded(-0.5, 0.5, (2,)))
    with pytest.raises(ValueError, match="acts in"):
        build(ACTION, Bounded(-1.0, 2.0, (2,)))
    with pytest.raises(ValueError, match="choices"):
        build(OneHot(2), ACTION)
    with pytest.raises(ValueError, match=r"actions \(3, 1\).*expected \(3, 2\)"):
        build(ACTION, Bounded(-1.0, 1.0, (1,)))


def test_a_copy_learns_by_itself():
    loss = make_learned(horizon=1)
    twin = copy.deepcopy(loss)
    td = TensorDict({"state": torch.randn(4, 2)}, [4])
    twin(td.clone())["loss_actor"].backward()
    assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_evaluates_its_own_critics(duplicate):
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=2)(Unbounded((2,)), ACTION)
    critic = ValueOperator(MLP(4, 1, num_cells=[64], dropout=0.5), in_keys=["state", "action"])
    loss, td = ValueGradientLoss(TanhActor(2, 0, ACTION, (8,)), critic, predictor), make_steps(5)
    twin = duplicate(loss)
    twin.qvalue_network.eval()
    said = twin.qvalues(td)
    assert torch.equal(twin.qvalues(td), said)
    assert not torch.equal(loss.qvalues(td), said)
    loss.qvalue_network.eval()
    assert torch.equal(loss.qvalues(td), said)
    loss.qvalue_network.train()
    loss.set_vmap_randomness("error")
    with pytest.raises(RuntimeError, match="random"):
        loss.qvalues(td)


def test_policy_and_critics_begin_anew_and_all_else_stays(unchanged):
    loss = make_learned(horizon=1, num_qvalue_nets=3)
    loss.fit_inputs(make_steps(9))
    loss.fit_scale(make_steps(9))
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    with unchanged(loss.predictor):
        loss.reset_parameters_recursive()
    moved = {name for name, x in loss.state_dict().items() if not torch.equal(x, before[name])}
    assert {name.split(".")[-1] for name in moved} == {"weight", "bias"}
    assert {name.split(".")[0] for name in moved} == {
        "actor_network_params",
        "qvalue_network_params",
        "target_qvalue_network_params",
    }
    critics, targets = loss.qvalue_network_params, loss.target_qvalue_network_params
    for key, value in critics.items(True, True):
        assert torch.equal(targets[key], value)
    first = critics["module", "head", "net", "0", "weight"]
    assert not torch.equal(first[0], first[1])
    limit = first.shape[-1] ** -0.5  # of torch's own initialisation
    assert (first.abs().amax((1, 2)) > 0.7 * limit).all()
    assert (first.abs() <= limit).all()


def test_a_frozen_policy_keeps_what_it_does():
    loss, td = make_learned(horizon=1), TensorDict({"state": torch.randn(5, 2)}, [5])
    for p in loss.actor_network_params.parameters():
        p.requires_grad_(False)

    def said():
        with loss._acting() as act, torch.no_grad():
            torch.manual_seed(0)
            return act(td.clone())

    before, values = said(), loss.qvalues(td.set("action", ACTION.rand((5,))))
    loss.fit_inputs(make_steps(9))
    assert torch.equal(said(), before)
    assert not torch.equal(loss.qvalues(td), values)
    loss.reset_parameters_recursive()
    assert torch.equal(said(), before)


def test_a_state_is_loaded_as_a_whole_and_leaves_options(unchanged):
    options = {"horizon": 1, "fixed_alpha": True}
    loss = make_learned(alpha_init=0.5, target_entropy=-7.0, **options)
    state = make_learned(**options).state_dict()
    spoiled = {key: value.clone() for key, value in state.items()}
    spoiled["actor_network_params.module.0.module.net.0.weight"][0] = torch.nan
    with unchanged(loss), pytest.raises(ValueError, match="not finite"):
        loss.load_state_dict(spoiled)
    # Options were part of the state once.
    loss.load_state_dict(state | {"log_alpha": torch.zeros(()), "target_entropy": torch.zeros(())})
    assert loss.alpha.item() == pytest.approx(0.5)
    assert loss.target_entropy.item() == -7.0
    for key, value in loss.state_dict().items():
        assert torch.equal(value, state[key])


def test_compiled_anew_it_takes_the_new_options():
    loss, td, used = make_learned(horizon=1), TensorDict({"state": torch.randn(6, 2)}, [6]), []

    def backend(name):
        def compiled(graph, _):
            used.append(name)
            return graph.forward

        return compiled

    for name in ("first", "second"):
        loss.compile(backend=backend(name))
        loss(td.clone())
    assert set(used) == {"first", "second"}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_losses_and_gradients(backend):
    loss = make_learned(horizon=1)
    options = {"fallback_random": True} if backend == "inductor" else None
    td, found = TensorDict({"state": torch.randn(6, 2)}, [6]), []
    for compiled in (False, True):
        if compiled:
            loss.compile(backend=backend, options=options)
        torch.manual_seed(0)
        loss.zero_grad()
        out = loss(td.clone())
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        found.append([*out.values(), *(p.grad for p in loss.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    next(loss.predictor.model.members.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        loss(td)


@pytest.mark.parametrize("part", range(3))
def test_each_part_of_compiled_steps_is_checked(part):
    """Compiled steps check nothing by themselves; these stand in for them."""
    loss, state = make_line(horizon=2), torch.zeros(3, 1)

    def steps(*_):
        found = [torch.zeros(2, 3), torch.zeros(3, 3), torch.ones(3, 3), *[torch.zeros(3, 1)] * 3]
        found[part][1, 1] = torch.inf
        return tuple(found)

    with pytest.raises(ValueError, match="imagined rewards, terminations or log-probabilities"):
        follow(loss.predictor, loss.actor_network, (state, state[:, :0]), 2, 0.9, steps)
