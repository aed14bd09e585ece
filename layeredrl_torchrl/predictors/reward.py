"""A predictor that learns dynamics, reward, value and encoder from a replay buffer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import Encoder
from layeredrl_torchrl.objectives import (
    MemberBatches,
    ModelLoss,
    OwnBatches,
    PredictorLoss,
    TransitionSlices,
)
from layeredrl_torchrl.objectives.batches import fingerprint
from layeredrl_torchrl.predictors import upkeep
from layeredrl_torchrl.predictors.predictor import Predictor, RewardFunction
from layeredrl_torchrl.specs import canonical_action

__all__ = ["RewardPredictor"]

LearningRate: TypeAlias = float | Callable[[int], float]


class RewardPredictor(Predictor):
    """Learns dynamics, reward and value, and the encoder through the reward loss.

    Args:
        model: The ensemble.
        val_func: Value function; a module is trained, a plain callable taken as known.
        rew_func: Reward function, likewise.
        encoder: Observation to state and context.
        latent_state_dim: ``D``.
        context_dim: ``C``.
        learn_encoder: Whether the reward loss reaches the encoder.
        gamma: Discount over one environment step.
        tau: Share of the value network that its target takes over at each update.
        k_steps: Steps of a slice that reward and value are trained on.
        n_steps: Rewards in a value target.
        consistency_loss_weight: Weight of the dynamics and termination losses.
        termination_loss_weight: Weight of the termination loss beside that of the dynamics, whose
            gradients are larger by about one over the predicted std; with 1, the layers that
            the two share hardly learn terminations.
        value_loss_weight: Weight of the value loss.
        rew_loss_weight: Weight of the reward loss.
        encoder_lr: Learning rate of the encoder: a number, or a callable of the total
            environment steps; likewise the next three.
        reward_lr: Of the reward function.
        model_lr: Of the dynamics model.
        value_lr: Of the value function.
        model_lr_annealing: Share of each call's updates, at its end, over which the model's
            learning rate falls linearly to a tenth: the weights settle, and the predicted
            variance becomes that of the settled weights. 0 for none.
        member_batches: How the ensemble's members share the model batches; by default each gets
            ``model_batch_size`` transitions of its own.
        holdout_share: Share of the transitions that the model is not trained on but calibrated
            with (:meth:`ProbabilisticEnsemble.calibrate`), chosen once and for all by their
            content. 0 for no calibration.
        clip_grad_max_norm: Gradient norm of each of the four parts is clipped to it; ``None``
            for no clipping.

    The parameters are updated by :meth:`learn` only; so are the statistics that normalise
    inputs and outputs, and the encoder's mask, at the start of a call whenever the buffer has
    grown by a tenth.
    """

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        val_func: RewardFunction | None,
        rew_func: RewardFunction | None,
        encoder: Encoder,
        latent_state_dim: int,
        context_dim: int = 0,
        learn_encoder: bool = True,
        *,
        gamma: float = 0.99,
        tau: float = 0.005,
        k_steps: int = 1,
        n_steps: int = 3,
        consistency_loss_weight: float = 1.0,
        termination_loss_weight: float = 30.0,
        value_loss_weight: float = 1.0,
        rew_loss_weight: float = 1.0,
        encoder_lr: LearningRate = 1e-3,
        reward_lr: LearningRate = 3e-3,
        model_lr: LearningRate = 7e-3,
        value_lr: LearningRate = 1e-3,
        model_lr_annealing: float = 0.4,
        member_batches: MemberBatches | None = None,
        holdout_share: float = 0.05,
        clip_grad_max_norm: float | None = 200.0,
    ) -> None:
        super().__init__(model, val_func, rew_func, encoder, latent_state_dim, context_dim)
        if not isinstance(model, ProbabilisticEnsemble):
            raise TypeError(
                f"RewardPredictor trains a ProbabilisticEnsemble, got {type(model).__name__}; use "
                "StaticPredictor for a model that is given"
            )
        self.learn_encoder = learn_encoder
        self.consistency_loss_weight = consistency_loss_weight
        self.termination_loss_weight = termination_loss_weight
        self.value_loss_weight = value_loss_weight
        self.rew_loss_weight = rew_loss_weight
        self.clip_grad_max_norm = clip_grad_max_norm
        if not 0.0 <= model_lr_annealing <= 1.0:
            raise ValueError(f"model_lr_annealing must lie in [0, 1], got {model_lr_annealing}")
        if not 0.0 <= holdout_share < 1.0:
            raise ValueError(f"holdout_share must lie in [0, 1), got {holdout_share}")
        self.model_lr_annealing = model_lr_annealing
        self.holdout_share = holdout_share
        loss = PredictorLoss(
            encoder,
            rew_func,
            val_func,
            gamma=gamma,
            k_steps=k_steps,
            n_steps=n_steps,
            learn_encoder=learn_encoder,
            action_spec=model.action_spec,
        )
        # The losses share this module's parameters, so they are not registered a second time;
        # the target network is the one thing that they add to the state.
        self.__dict__["model_loss"] = ModelLoss(model, per_member=True)
        self.member_batches = OwnBatches() if member_batches is None else member_batches
        self.__dict__["predictor_loss"] = loss
        self.target_val_func = loss.target_val_func if isinstance(val_func, nn.Module) else None
        self.tau = tau
        self._link_target()
        self.register_buffer("n_learn_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_since_calibration", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_written_at_statistics", torch.zeros((), dtype=torch.long))
        self._learning_rates = {
            "model": model_lr,
            "reward": reward_lr,
            "value": value_lr,
            "encoder": encoder_lr,
        }
        self.optim = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parts: dict[str, object] = {
            "model": self.model,
            "reward": self.rew_func,
            "value": self.val_func,
            "encoder": self.encoder if self.learn_encoder else None,
        }
        groups = []
        for name, part in parts.items():
            parameters = (
                [p for p in part.parameters() if p.requires_grad]
                if isinstance(part, nn.Module)
                else []
            )
            if parameters:
                groups.append({"params": parameters, "name": name, "lr": 0.0})
        return torch.optim.Adam(groups, lr=0.0, fused=True)

    def _link_target(self) -> None:
        """Let TorchRL's ``SoftUpdate`` move the target network from where it is."""
        self.__dict__["_target_update"] = None
        if self.target_val_func is None:
            return
        # SoftUpdate begins by overwriting the target with its source.
        before = copy.deepcopy(self.target_val_func.state_dict())
        self.__dict__["_target_update"] = SoftUpdate(self.predictor_loss, tau=self.tau)
        self.target_val_func.load_state_dict(before)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and worker processes: the updater points into the original, so without."""
        return {**self.__dict__, "_target_update": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy and give it an updater of its own."""
        super().__setstate__(state)
        self._link_target()

    @property
    def terminal_value(self) -> RewardFunction | None:
        """The target network: an average over recent updates, so steadier than ``val_func``."""
        return self.val_func if self.target_val_func is None else self.target_val_func

    # -- learning ---------------------------------------------------------------------------

    def learn(
        self,
        buffer: ReplayBuffer,
        n_updates: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
    ) -> tuple[Tensor, dict[str, float]]:
        """Sample batches and update all parts; arguments as :meth:`Predictor.learn`.

        Transitions and the starts of slices are drawn uniformly over the buffer, and no slice
        crosses an episode's end.

        Raises:
            TypeError: Not a TorchRL replay buffer, or counts that are not integers.
            ValueError: An empty buffer, or one shorter than ``k_steps + n_steps``; NaN
                observations or rewards; actions outside their space; a loss that is not finite.
            KeyError: A buffer without one of the keys read; the message names it.

        After an error the predictor is as it was before the call.
        """
        check_positive_int("n_updates", n_updates)
        check_positive_int("batch_size", batch_size)
        check_positive_int("model_batch_size", model_batch_size)
        keys = self.predictor_loss.tensor_keys
        slices = TransitionSlices(
            buffer,
            observation_key=keys.observation,
            terminated_key=keys.terminated,
            valid_key=keys.valid,
        )
        rates = self._current_rates(n_total_env_steps)
        before = {name: value.clone() for name, value in self.state_dict().items()}
        moments = copy.deepcopy(self.optim.state_dict())
        try:
            upkeep.update_statistics(self, slices)
            totals = self._run(slices, n_updates, batch_size, model_batch_size, rates)
            upkeep.calibrate(self, slices, n_updates)
        except (TypeError, ValueError, KeyError):
            self.load_state_dict(before)
            self.optim.load_state_dict(moments)
            raise
        info = {name: float(value) / n_updates for name, value in totals.items()}
        info["n_updates"] = float(n_updates)
        return totals["loss"] / n_updates, info

    def _run(
        self,
        slices: TransitionSlices,
        n_updates: int,
        batch_size: int,
        model_batch_size: int,
        rates: dict[str, float],
    ) -> dict[str, Tensor]:
        """The updates of one call; returns the sums of their terms."""
        length = self.predictor_loss.k_steps + self.predictor_loss.n_steps
        n_rows = self.member_batches.n_rows(model_batch_size, self.model.n_models)
        totals: dict[str, Tensor] = {}
        for i in range(n_updates):
            for group in self.optim.param_groups:
                group["lr"] = rates[group["name"]]
                if group["name"] == "model":
                    group["lr"] *= self._annealing(i, n_updates)
            batch = slices.sample(batch_size, length)
            terms = self._update(batch, self._sample_model_batch(slices, n_rows))
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
        return totals

    def _sample_model_batch(self, slices: TransitionSlices, n_rows: int) -> TensorDict:
        """Transitions ``[R]`` of which at least one is not held out."""
        for _ in range(100):
            data = self.encode_transitions(slices.sample(n_rows, 1)[:, 0])
            if not self.holdout_share:
                return data
            valid = ~upkeep.held_out(self, data.get("fingerprint"))
            if bool(valid.any()):
                return data.set("valid", valid)
        raise ValueError(
            f"all transitions sampled are held out with holdout_share={self.holdout_share}; lower "
            "it, or collect more data"
        )

    def _current_rates(self, n_total_env_steps: int) -> dict[str, float]:
        rates = {
            name: float(rate(n_total_env_steps) if callable(rate) else rate)
            for name, rate in self._learning_rates.items()
        }
        for name, rate in rates.items():
            if not 0.0 <= rate < float("inf"):
                raise ValueError(f"{name}_lr is {rate}, expected a finite number of at least 0")
        return rates

    def _annealing(self, update: int, n_updates: int) -> float:
        """Factor of the model's learning rate at one update of a call."""
        left = 1.0 - (update + 0.5) / n_updates
        return (
            min(1.0, 0.1 + 0.9 * left / self.model_lr_annealing) if self.model_lr_annealing else 1.0
        )

    def _update(self, batch: TensorDictBase, transitions: TensorDict) -> dict[str, Tensor]:
        """One gradient step; returns the detached terms."""
        model_terms = self.model_loss(self.member_batches.assign(transitions, self.model.n_models))
        terms = self.predictor_loss(batch)
        loss = self.consistency_loss_weight * (
            model_terms["loss_dynamics"]
            + self.termination_loss_weight * model_terms["loss_termination"]
        )
        for name, weight in (
            ("loss_reward", self.rew_loss_weight),
            ("loss_value", self.value_loss_weight),
        ):
            if name in terms.keys():
                loss = loss + weight * terms[name]
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"the loss is {loss.item()} "
                f"({ {k: v.item() for td in (model_terms, terms) for k, v in td.items()} }); "
                "it reached no parameter. Lower the learning rate or check the data's scale"
            )
        self.optim.zero_grad()
        loss.backward()
        if self.clip_grad_max_norm is not None:
            for group in self.optim.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.clip_grad_max_norm)
        self.optim.step()
        self.model.update_average()
        if self._target_update is not None:
            self._target_update.step()
        self.n_learn_updates += 1
        detached = {k: v.detach() for td in (model_terms, terms) for k, v in td.items()}
        return {"loss": loss.detach(), **detached}

    @torch.no_grad()
    def encode_transitions(self, batch: TensorDictBase) -> TensorDict:
        """The model's training batch ``[N]`` from stored transitions ``[N]``."""
        keys = self.predictor_loss.tensor_keys
        state, context = self.encoder(batch.get(keys.observation))
        next_state, _ = self.encoder(batch.get(keys.next_observation))
        return TensorDict(
            {
                "state": state,
                "context": context,
                "action": self._action(batch),
                "fingerprint": fingerprint(
                    batch.get(keys.observation),
                    batch.get(keys.action),
                    batch.get(keys.next_observation),
                ),
                "next": {"state": next_state, "terminated": batch.get(keys.terminated)},
            },
            batch_size=batch.batch_size,
        )

    def _action(self, batch: TensorDictBase) -> Tensor:
        key: NestedKey = self.predictor_loss.tensor_keys.action
        action = batch.get(key, None)
        if action is None:
            names = sorted(map(str, batch.keys(True, True)))
            raise KeyError(f"the buffer has no entry {key!r}; it has {names}")
        return canonical_action(self.model.action_spec, action, batch.batch_size)
