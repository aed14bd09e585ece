"""The loss of a predictor's reward function, value function and encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn
from torchrl.data import TensorSpec

from layeredrl_torchrl._checks import (
    check_finite,
    check_flag,
    check_instance,
    check_number,
    check_per_item,
    check_positive_int,
    require,
)
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.nets import (
    Encoder,
    StepFunction,
    check_step_function,
    move_towards,
    needs_next_state,
    on_step,
)
from layeredrl_torchrl.objectives.targets import n_step_targets
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.specs import ActionForm

__all__ = ["PredictorLoss", "PreparedSlices", "PreparedValue"]


class PreparedValue(NamedTuple):
    """The parts of value targets: ``returns + discount * V(observation, action)``."""

    observation: Tensor  # [B, k, obs]: where the target network is evaluated
    action: Tensor  # [B, k, A], or discrete in the form of the spec
    returns: Tensor  # [B, k]
    discount: Tensor  # [B, k]
    counts: Tensor  # [B, k], bool: whether the step has a target


class PreparedSlices(NamedTuple):
    """A checked batch of :class:`PredictorLoss`, without NaN in invalid steps."""

    observation: Tensor  # [B, k, obs]
    action: Tensor  # [B, k, A], or discrete in the form of the spec
    reward: Tensor  # [B, k]
    valid: Tensor  # [B, k], bool
    value: PreparedValue | None = None
    next_observation: Tensor | None = None  # [B, k, obs], if the reward function reads it

    def split(self, size: int) -> list[PreparedSlices]:
        """Split into batches of ``size`` slices each."""
        batches = [
            PreparedSlices(*part) for part in zip(*(x.split(size) for x in self[:4]), strict=True)
        ]
        if self.value is not None:
            values = zip(*(x.split(size) for x in self.value), strict=True)
            batches = [
                batch._replace(value=PreparedValue(*value))
                for batch, value in zip(batches, values, strict=True)
            ]
        if self.next_observation is not None:
            batches = [
                batch._replace(next_observation=following)
                for batch, following in zip(batches, self.next_observation.split(size), strict=True)
            ]
        return batches


class PredictorLoss(TermsLoss):
    """Squared errors of the reward and of the n-step value over slices of ``k + n`` steps.

    The reward loss also trains the encoder (``learn_encoder``): state and context are computed from
    the observation with gradients. The context is taken from the first step of the slice only, so
    that it cannot encode anything that changes. The value loss does not train the encoder. Value
    targets are those of :func:`~layeredrl_torchrl.objectives.targets.n_step_targets`, bootstrapped
    from a target network. Steps that are not ``valid`` do not count in either loss.

    >>> loss = PredictorLoss(IdentityEncoder((3,)), RewardNet(3, 0, 1), ValueNet(3, 0), n_steps=2)
    >>> loss.in_keys
    ['observation', 'action', ('next', 'observation'), ('next', 'reward'), ('next', 'terminated'),
     'valid']

    Args:
        encoder: Observation to state and context.
        rew_func: ``(state, context, action) -> [*B]``. Only a module is trained; a plain callable
            is taken as known, and ``None`` means no reward function. A module that reads the next
            state (:func:`~layeredrl_torchrl.reads_next_state`) learns from the real one, encoded.
        val_func: Likewise, without the next state.
        gamma: Discount over one environment step.
        k_steps: Steps of a slice that get a target.
        n_steps: Rewards in a value target.
        learn_encoder: Whether the reward loss trains the encoder.
        target_val_func: The target network; a copy of ``val_func`` by default. Update it with
            TorchRL's ``SoftUpdate(loss, tau=...)``.
        action_spec: The form that stored actions are brought into (a choice may be stored as an
            integer or one-hot); by default they are used as they are. The
            :class:`~layeredrl_torchrl.specs.ActionForm` of a model moves with the model.

    Reads (``set_keys`` renames) a batch ``[B, L]`` with ``L = k_steps + n_steps``, as
    :class:`~layeredrl_torchrl.objectives.slices.TransitionSlices` samples it: ``observation``,
    ``action``, ``next_observation``, ``reward``, ``terminated``, ``valid``, and where present
    ``elapsed_steps`` (environment steps that a transition took) and ``random_action`` (bool
    ``[B, L]`` or ``[B, L, 1]``: the action was drawn at random and not by the evaluated policy).
    (``done`` is not read here; it tells ``RewardPredictor.learn`` where episodes end.) Steps
    excluded by a mask of TorchRL's ``loss_mask_key`` (by default ``("collector", "mask")``, which
    is false for padding) are not valid. Value targets end before a random action, and a step with a
    random action has no target: random behaviour would bias values downwards.

    Writes ``loss_reward`` and ``loss_value`` (mean squared errors in reward units squared, divided
    by the square of the head's scale where it is a :class:`~layeredrl_torchrl.ScalarHead`), and for
    logging ``value_mean``.

    Raises:
        TypeError, ValueError: Functions that cannot be called, or give other than one number for
            each step; a target network without a value to train; slices of another length; NaN
            rewards. KeyError: A missing entry.
    """

    @dataclass
    class _AcceptedKeys:
        """Names of the entries read; see :class:`PredictorLoss`."""

        observation: NestedKey = "observation"
        next_observation: NestedKey = ("next", "observation")
        action: NestedKey = "action"
        reward: NestedKey = ("next", "reward")
        terminated: NestedKey = ("next", "terminated")
        done: NestedKey = ("next", "done")
        elapsed_steps: NestedKey = ("next", "elapsed_steps")
        valid: NestedKey = "valid"
        random_action: NestedKey = "random_action"

    #: Step of the target network in :meth:`after_update`; None to leave it unchanged.
    tau: float | None = None

    default_keys = _AcceptedKeys
    out_keys = ["loss_reward", "loss_value", "value_mean"]

    value_params: TensorDictParams
    target_value_params: TensorDictParams

    def __init__(
        self,
        encoder: Encoder,
        rew_func: StepFunction | None,
        val_func: StepFunction | None,
        *,
        gamma: float = 0.99,
        k_steps: int = 1,
        n_steps: int = 1,
        learn_encoder: bool = True,
        target_val_func: nn.Module | None = None,
        action_spec: TensorSpec | ActionForm | None = None,
    ) -> None:
        super().__init__()
        check_instance("encoder", encoder, Encoder, hint="subclass Encoder")
        check_step_function("rew_func", rew_func)
        check_step_function("val_func", val_func, may_look_ahead=False)
        check_number("gamma", gamma, 0.0, 1.0)
        self.encoder = encoder
        self.rew_func = rew_func
        self.val_func = val_func
        self.gamma = gamma
        self.k_steps = check_positive_int("k_steps", k_steps)
        self.n_steps = check_positive_int("n_steps", n_steps)
        self.length = k_steps + n_steps
        self.learn_encoder = check_flag("learn_encoder", learn_encoder)
        if action_spec is not None and not isinstance(action_spec, ActionForm):
            action_spec = ActionForm(action_spec)
        self._action_form = action_spec
        if isinstance(val_func, nn.Module):
            if target_val_func is None:
                target_val_func = copy.deepcopy(val_func)
            self.target_val_func = target_val_func.requires_grad_(False)
            self._view_parameters()
            self._has_update_associated["value"] = False
        elif target_val_func is not None:
            raise ValueError(
                "target_val_func is the target network of a val_func that is trained, a module, "
                f"but val_func is {val_func!r}; leave target_val_func out"
            )

    def _view_parameters(self) -> None:
        """Expose both value networks' parameters under the names that SoftUpdate looks for."""
        self.value_params = TensorDict.from_module(self.val_func, as_module=True)
        self.target_value_params = TensorDict.from_module(self.target_val_func, as_module=True)

    def after_reset(self) -> None:
        """Make the target network a copy of the new value function."""
        if isinstance(self.val_func, nn.Module):
            self.target_val_func.load_state_dict(self.val_func.state_dict())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the views: in a copy they would become separate parameters."""
        views = ("value_params", "target_value_params")
        modules = {k: v for k, v in self._modules.items() if k not in views}
        return {**super().__getstate__(), "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy and view its parameters."""
        super().__setstate__(state)
        if isinstance(self.val_func, nn.Module):
            self._view_parameters()

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that must be present."""
        k = self.tensor_keys
        return [k.observation, k.action, k.next_observation, k.reward, k.terminated, k.valid]

    @watched
    @torch.no_grad()
    def prepare(self, tensordict: TensorDictBase) -> PreparedSlices:
        """Check slices ``[B, L]`` and precompute what needs no gradient.

        Join many batches: this takes hardly longer than one. :meth:`PreparedSlices.split` separates
        them again.

        Raises:
            KeyError, ValueError: See the class.
        """
        keys = self.tensor_keys
        data = {key: self._get(tensordict, key) for key in self.in_keys}
        if tensordict.ndim != 2 or tensordict.shape[1] != self.length:
            raise ValueError(
                f"expected slices [B, L] with L = k_steps + n_steps = {self.length}, got a "
                f"batch of shape {tuple(tensordict.shape)}"
            )
        k = self.k_steps
        observation, action = data[keys.observation][:, :k], data[keys.action][:, :k]
        valid = self._valid(tensordict)[:, :k]
        refuse(
            ~valid.any(),
            lambda _: ValueError(f"no step of the slices is valid; check {keys.valid!r}"),
        )
        stored_reward = data[keys.reward]
        if stored_reward.shape != (*tensordict.shape, 1):
            raise ValueError(
                f"{keys.reward!r} has shape {tuple(stored_reward.shape)}, expected "
                f"{(*tensordict.shape, 1)} (TorchRL's layout)"
            )
        reward = torch.where(valid, stored_reward[:, :k].squeeze(-1), 0.0)
        check_finite(str(keys.reward), reward, hint="repair the rewards")
        prepared = PreparedSlices(
            observation=_filled(observation, valid),
            action=self._canonical(_filled(action, valid)),
            reward=reward,
            valid=valid,
        )
        self.encoder.check(prepared.observation)
        if self._learns_of_next_state:
            following = _filled(data[keys.next_observation][:, :k], valid)
            self.encoder.check(following)
            prepared = prepared._replace(next_observation=following)
        if not isinstance(self.val_func, nn.Module):
            return prepared
        return prepared._replace(value=self._prepare_value(tensordict))

    def terms(self, prepared: PreparedSlices) -> dict[str, Tensor]:
        """Compute the losses of prepared slices, as :meth:`forward` writes them."""
        valid, action = prepared.valid, prepared.action
        with torch.set_grad_enabled(self.learn_encoder and torch.is_grad_enabled()):
            state, context = self.encoder.encode_checked(prepared.observation)
            context = context[:, :1].expand_as(context)
            next_state = state  # a placeholder, not read
            if prepared.next_observation is not None:
                next_state, _ = self.encoder.encode_checked(prepared.next_observation)
        out: dict[str, Tensor] = {}
        if isinstance(self.rew_func, nn.Module):
            reward = on_step(self.rew_func, state, context, action, next_state)
            check_per_item("rew_func", reward, valid.shape)  # others would broadcast
            error = (reward - prepared.reward) / getattr(self.rew_func, "out_scale", 1.0)
            error = torch.where(valid, error, 0.0)
            out["loss_reward"] = error.square().sum() / valid.sum().clamp_min(1)
        if isinstance(self.val_func, nn.Module) and prepared.value is not None:
            target, counts = self._targets(prepared.value), prepared.value.counts
            value = self.val_func(state.detach(), context.detach(), action)
            check_per_item("val_func", value, valid.shape)
            error = (value - target) / getattr(self.val_func, "out_scale", 1.0)
            error = torch.where(counts, error, 0.0)
            out["loss_value"] = error.square().sum() / counts.sum().clamp_min(1)
            out["value_mean"] = value.detach().mean()
        return out

    def after_update(self) -> None:
        """Move the target network by ``tau``, which is set when a predictor adds this loss.

        It does nothing if one of TorchRL's target updaters is associated with the loss.
        """
        if self.tau is None or self._has_update_associated.get("value", True):
            return
        if isinstance(self.val_func, nn.Module):
            move_towards(self.target_val_func, self.val_func, self.tau)

    @property
    def _learns_of_next_state(self) -> bool:
        """Whether the trained reward function reads the next state."""
        return isinstance(self.rew_func, nn.Module) and needs_next_state(self.rew_func)

    @torch.no_grad()
    def value_target(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Return the n-step value targets ``[B, k]`` of slices ``[B, L]``, and which exist."""
        prepared = self._prepare_value(tensordict)
        return self._targets(prepared), prepared.counts

    def _prepare_value(self, tensordict: TensorDictBase) -> PreparedValue:
        """Compute the parts of the value targets of slices ``[B, L]``."""
        keys = self.tensor_keys
        length = self.k_steps + self.n_steps - 1
        elapsed = tensordict.get(keys.elapsed_steps, None)
        valid = self._valid(tensordict)
        counts = valid[:, :length]
        random = tensordict.get(keys.random_action, None)
        if random is not None:
            if random.dtype != torch.bool:
                raise ValueError(f"{keys.random_action!r} is {random.dtype}, expected torch.bool")
            counts = counts & ~random[:, :length].reshape(counts.shape)
        targets = n_step_targets(
            self._get(tensordict, keys.reward)[:, :length].squeeze(-1),
            self._get(tensordict, keys.terminated)[:, :length].squeeze(-1),
            counts,
            k_steps=self.k_steps,
            n_steps=self.n_steps,
            gamma=self.gamma,
            elapsed_steps=None if elapsed is None else elapsed[:, :length].squeeze(-1),
        )
        index = targets.bootstrap_index
        own = torch.arange(index.shape[0], device=index.device)
        rows = torch.where(counts[:, : self.k_steps], own.unsqueeze(1), _donors(valid))
        # An action-value function is bootstrapped with the action that was taken there. At the end
        # of a slice, which may be padding, that is the last action taken.
        acted = index + valid[rows, index + 1]
        action = self._get(tensordict, keys.action)[rows, acted]
        observation = self._get(tensordict, keys.next_observation)[rows, index]
        self.encoder.check(observation)
        return PreparedValue(
            observation=observation,
            action=self._canonical(action),
            returns=targets.returns,
            discount=targets.bootstrap_discount,
            counts=counts[:, : self.k_steps],
        )

    @torch.no_grad()
    def _targets(self, prepared: PreparedValue) -> Tensor:
        state, context = self.encoder.encode_checked(prepared.observation)
        value = self.target_val_func(state, context, prepared.action)
        check_per_item("target_val_func", value, prepared.returns.shape)
        return prepared.returns + prepared.discount * value

    def _valid(self, tensordict: TensorDictBase) -> Tensor:
        """Return which steps ``[B, L]`` of slices count."""
        self._get(tensordict, self.tensor_keys.valid)  # raises where it is missing
        return self.counted(tensordict, self.tensor_keys.valid)

    def _canonical(self, action: Tensor) -> Tensor:
        """Bring actions ``[B, k, ...]`` into the form of the spec."""
        if self._action_form is None:
            return action
        return self._action_form(action, action.shape[:2])

    @staticmethod
    def _get(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        return require(tensordict, key, reader="PredictorLoss", hint="rename it with set_keys()")


def _donors(valid: Tensor) -> Tensor:
    """Return the slice ``[B, 1]`` that fills steps that are not ``valid [B, L]``.

    This is the slice itself if its first step is valid, else the first slice of which that holds.
    """
    begins = valid[:, :1]
    own = torch.arange(len(valid), device=valid.device).unsqueeze(1)
    return torch.where(begins, own, begins.int().argmax())


def _filled(x: Tensor, valid: Tensor) -> Tensor:
    """Replace steps of ``x [B, k, ...]`` that are not valid, which may hold anything, even NaN.

    They are replaced by the first step of the slice, or of another slice (:func:`_donors`).
    """
    mask = valid.reshape(valid.shape + (1,) * (x.ndim - 2))
    return torch.where(mask, x, x[_donors(valid)[:, 0], :1])
