"""A predictor that learns dynamics, reward, value and encoder from a replay buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.objectives import SoftUpdate

from layeredrl_torchrl._checks import check_finite, check_positive_int
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import Encoder, EncoderNet, ScalarHead
from layeredrl_torchrl.objectives import ModelLoss, PredictorLoss, TransitionSlices, n_step_targets
from layeredrl_torchrl.predictors.predictor import Predictor, RewardFunction
from layeredrl_torchrl.specs import canonical_action

__all__ = ["RewardPredictor"]

LearningRate: TypeAlias = float | Callable[[int], float]

# Statistics are taken from this many transitions, and again whenever the buffer was written to
# by another tenth of what had been written at the last time.
_N_STATISTICS = 10_000
_REFRESH = 1.1


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
        value_loss_weight: Weight of the value loss.
        rew_loss_weight: Weight of the reward loss.
        encoder_lr: Learning rate of the encoder: a number, or a callable of the total
            environment steps; likewise the next three.
        reward_lr: Of the reward function.
        model_lr: Of the dynamics model.
        value_lr: Of the value function.
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
        value_loss_weight: float = 1.0,
        rew_loss_weight: float = 1.0,
        encoder_lr: LearningRate = 1e-3,
        reward_lr: LearningRate = 1e-3,
        model_lr: LearningRate = 1e-3,
        value_lr: LearningRate = 1e-3,
        clip_grad_max_norm: float | None = 20.0,
    ) -> None:
        super().__init__(model, val_func, rew_func, encoder, latent_state_dim, context_dim)
        if not isinstance(model, ProbabilisticEnsemble):
            raise TypeError(
                f"RewardPredictor trains a ProbabilisticEnsemble, got {type(model).__name__}; use "
                "StaticPredictor for a model that is given"
            )
        self.learn_encoder = learn_encoder
        self.consistency_loss_weight = consistency_loss_weight
        self.value_loss_weight = value_loss_weight
        self.rew_loss_weight = rew_loss_weight
        self.clip_grad_max_norm = clip_grad_max_norm
        loss = PredictorLoss(
            encoder,
            rew_func,
            val_func,
            gamma=gamma,
            k_steps=k_steps,
            n_steps=n_steps,
            learn_encoder=learn_encoder,
        )
        # The losses share this module's parameters, so they are not registered a second time;
        # the target network is the one thing that they add to the state.
        self.__dict__["model_loss"] = ModelLoss(model)
        self.__dict__["predictor_loss"] = loss
        self.target_val_func = loss.target_val_func if isinstance(val_func, nn.Module) else None
        self.__dict__["_target_update"] = (
            SoftUpdate(loss, tau=tau) if self.target_val_func is not None else None
        )
        self.register_buffer("n_learn_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("_n_written_at_statistics", torch.zeros((), dtype=torch.long))
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
            parameters = list(part.parameters()) if isinstance(part, nn.Module) else []
            if parameters:
                groups.append({"params": parameters, "name": name, "lr": 0.0})
        return torch.optim.Adam(groups, lr=0.0, fused=True)

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
                observations or rewards; actions outside their space; a loss that is not finite
                (before it reaches any parameter).
            KeyError: A buffer without one of the keys read; the message names it.
        """
        check_positive_int("n_updates", n_updates)
        check_positive_int("batch_size", batch_size)
        check_positive_int("model_batch_size", model_batch_size)
        keys = self.predictor_loss.tensor_keys
        slices = TransitionSlices(
            buffer, observation_key=keys.observation, terminated_key=keys.terminated
        )
        length = self.predictor_loss.k_steps + self.predictor_loss.n_steps
        self._update_statistics(buffer, slices, length)
        for group in self.optim.param_groups:
            rate = self._learning_rates[group["name"]]
            group["lr"] = float(rate(n_total_env_steps) if callable(rate) else rate)
        totals: dict[str, Tensor] = {}
        for _ in range(n_updates):
            terms = self._update(
                slices.sample(batch_size, length), slices.sample(model_batch_size, 1)[:, 0]
            )
            for name, value in terms.items():
                totals[name] = totals[name] + value if name in totals else value
        info = {name: float(value) / n_updates for name, value in totals.items()}
        info["n_updates"] = float(n_updates)
        return totals["loss"] / n_updates, info

    def _update(self, batch: TensorDictBase, model_batch: TensorDictBase) -> dict[str, Tensor]:
        """One gradient step; returns the detached terms."""
        model_terms = self.model_loss(self._encode_transitions(model_batch))
        terms = self.predictor_loss(batch)
        loss = self.consistency_loss_weight * (
            model_terms["loss_dynamics"] + model_terms["loss_termination"]
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
                "nothing was updated. Lower the learning rate or check the data's scale"
            )
        self.optim.zero_grad()
        loss.backward()
        if self.clip_grad_max_norm is not None:
            for group in self.optim.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.clip_grad_max_norm)
        self.optim.step()
        if self._target_update is not None:
            self._target_update.step()
        self.n_learn_updates += 1
        detached = {k: v.detach() for td in (model_terms, terms) for k, v in td.items()}
        return {"loss": loss.detach(), **detached}

    @torch.no_grad()
    def _encode_transitions(self, batch: TensorDictBase) -> TensorDict:
        """The model's training batch ``[N]`` from stored transitions."""
        keys = self.predictor_loss.tensor_keys
        state, context = self.encoder(batch.get(keys.observation))
        next_state, _ = self.encoder(batch.get(keys.next_observation))
        return TensorDict(
            {
                "state": state,
                "context": context,
                "action": self._action(batch),
                "next": {"state": next_state, "terminated": batch.get(keys.terminated)},
            },
            batch_size=batch.batch_size,
        )

    def _action(self, batch: TensorDictBase) -> Tensor:
        key: NestedKey = self.predictor_loss.tensor_keys.action
        return canonical_action(self.model.action_spec, batch.get(key), batch.batch_size)

    # -- statistics -------------------------------------------------------------------------

    @torch.no_grad()
    def _update_statistics(
        self, buffer: ReplayBuffer, slices: TransitionSlices, length: int
    ) -> None:
        """Refit normalisers, output scales and the encoder's mask if the data has grown."""
        # A buffer that was loaded or filled by another process counts what it holds.
        n_written = max(int(buffer.write_count), len(slices))
        last = int(self._n_written_at_statistics)
        if last and last <= n_written < _REFRESH * last:
            return
        n = min(max(len(slices), 1), _N_STATISTICS)
        batch = slices.sample(n, length)
        keys = self.predictor_loss.tensor_keys
        for key in (keys.action, keys.reward):
            if batch.get(key, None) is None:
                names = sorted(map(str, batch.keys(True, True)))
                raise KeyError(f"the buffer has no entry {key!r}; it has {names}")
        first = batch[:, 0]
        observation, next_observation = first.get(keys.observation), first.get(keys.next_observation)
        check_finite("observation", observation, hint="repair the environment's observations")
        check_finite("next observation", next_observation, hint="repair the observations")
        reward = first.get(keys.reward)
        check_finite("reward", reward, hint="repair the environment's rewards")
        if isinstance(self.encoder, EncoderNet) and self.learn_encoder:
            self.encoder.update_mask(observation, next_observation)
        transitions = self._encode_transitions(first)
        state, context, action = (transitions.get(key) for key in ("state", "context", "action"))
        self.model.fit_statistics(state, context, action, transitions.get(("next", "state")))
        if isinstance(self.rew_func, ScalarHead):
            std, mean = torch.std_mean(reward.float(), correction=0)
            rms = reward.float().square().mean().sqrt()
            scale = torch.where(std > 1e-3 * rms, std, rms)
            self.rew_func.fit_inputs(state, context, action)
            self.rew_func.rescale(mean, torch.where(scale > 0, scale, torch.ones_like(scale)))
        if isinstance(self.val_func, ScalarHead):
            scale = self._value_scale(batch)
            for head in (self.val_func, self.target_val_func):
                head.fit_inputs(state, context, action)
                head.rescale(0.0, scale)
        self._n_written_at_statistics.fill_(n_written)

    def _value_scale(self, batch: TensorDictBase) -> Tensor:
        """The size of returns: that of n-step returns, continued geometrically."""
        loss = self.predictor_loss
        keys, n, gamma = loss.tensor_keys, loss.n_steps, loss.gamma
        part = batch[:, :n]
        returns = n_step_targets(
            part.get(keys.reward).squeeze(-1),
            part.get(keys.terminated).squeeze(-1),
            part.get(keys.valid),
            k_steps=1,
            n_steps=n,
            gamma=gamma,
        ).returns
        scale = returns.float().square().mean().sqrt() / max(1.0 - gamma**n, 1e-3)
        return torch.where(scale > 0, scale, torch.ones_like(scale))
