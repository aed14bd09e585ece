"""A predictor that learns dynamics, reward, value and encoder from a replay buffer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.record.loggers import Logger

from layeredrl_torchrl import _reporting as reporting
from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl._state import refuse_other_shapes
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import Encoder, move_towards
from layeredrl_torchrl.objectives import (
    MemberBatches,
    ModelLoss,
    OwnBatches,
    PredictorLoss,
    TransitionSlices,
)
from layeredrl_torchrl.predictors import upkeep
from layeredrl_torchrl.predictors.early_stopping import EarlyStopping
from layeredrl_torchrl.predictors.optim import LearningRate, current_rates, make_optimizer
from layeredrl_torchrl.predictors.predictor import Predictor, RewardFunction
from layeredrl_torchrl.predictors.standardizer import DeltaStandardizer
from layeredrl_torchrl.predictors.updates import check_schedule, run_updates

__all__ = ["RewardPredictor"]


class RewardPredictor(Predictor):
    """Learns dynamics, reward and value, and the encoder through the reward loss.

    >>> predictor = RewardPredictor(
    ...     model=ProbabilisticEnsemble(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))),
    ...     val_func=ValueNet(3, 0),
    ...     rew_func=RewardNet(3, 0, 1),
    ...     encoder=IdentityEncoder((3,)),
    ...     latent_state_dim=3,
    ... )
    >>> predictor.rollout(torch.zeros(7, 3), torch.zeros(7, 15, 1)).batch_size
    torch.Size([7, 5, 1, 15])

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
        delta_standardizer: Whether to keep the statistics that
            :meth:`get_standardized_log_prob` needs.
        encoder_warm_up: Number of first updates, counted over all calls, in which only reward
            function and encoder learn. The model and the value function would chase a state
            that still moves, and have to forget what they learned of it.
        beta_nll: ``beta`` of :class:`~layeredrl_torchrl.ModelLoss`.
        model_weight_decay: Decoupled weight decay (arXiv 1711.05101) of all the model's
            parameters: each update shrinks them by this share of the learning rate.
        early_stopping: When the model stops learning within a call; ``None`` for never.

    The parameters are updated by :meth:`learn` only; so are the statistics that normalise
    inputs and outputs, and the encoder's mask, at the start of a call whenever the buffer has
    grown by a tenth (and once more when the encoder's warm-up is over).

    Raises:
        TypeError, ValueError: As :class:`Predictor`; a model that is no ensemble; numbers
            outside their range; an ``encoder_warm_up`` with nothing to learn in it;
            ``early_stopping`` without held-out transitions, or with an encoder that learns (the
            best model seen would be one of states that are no more).
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
        delta_standardizer: bool = True,
        encoder_warm_up: int = 0,
        beta_nll: float = 0.0,
        model_weight_decay: float = 0.0,
        early_stopping: EarlyStopping | None = None,
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
        self.encoder_warm_up = check_positive_int("encoder_warm_up", encoder_warm_up, minimum=0)
        self.early_stopping = early_stopping
        check_schedule(self)
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
        self.__dict__["model_loss"] = ModelLoss(model, per_member=True, beta=beta_nll)
        self.member_batches = OwnBatches() if member_batches is None else member_batches
        self.__dict__["predictor_loss"] = loss
        self.target_val_func = loss.target_val_func if isinstance(val_func, nn.Module) else None
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau must lie in [0, 1], got {tau}")
        self.tau = tau
        self.register_buffer("n_learn_updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_since_calibration", torch.zeros((), dtype=torch.long))
        self.register_buffer("n_written_at_statistics", torch.zeros((), dtype=torch.long))
        self.delta_standardizer = (
            DeltaStandardizer(latent_state_dim) if delta_standardizer else None
        )
        self._learning_rates: dict[str, LearningRate] = {
            "model": model_lr,
            "reward": reward_lr,
            "value": value_lr,
            "encoder": encoder_lr,
        }
        parts = {
            "model": model,
            "reward": rew_func,
            "value": val_func,
            "encoder": encoder if learn_encoder else None,
        }
        self.optim = make_optimizer(parts, model_weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy; its optimizer has lost its check."""
        super().__setstate__(state)
        refuse_other_shapes(self.optim)

    def update_target(self) -> None:
        """Move the target network towards the value function by a share of ``tau``."""
        if self.target_val_func is not None and isinstance(self.val_func, nn.Module):
            move_towards(self.target_val_func, self.val_func, self.tau)

    @property
    def terminal_value(self) -> RewardFunction | None:
        """The target network, an average over recent updates and so steadier than ``val_func``."""
        return self.val_func if self.target_val_func is None else self.target_val_func

    # -- learning ---------------------------------------------------------------------------

    def learn(
        self,
        buffer: ReplayBuffer,
        n_updates: int,
        batch_size: int,
        model_batch_size: int,
        n_total_env_steps: int,
        *,
        logger: Logger | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, dict[str, float]]:
        """Sample batches and update all parts; arguments as :meth:`Predictor.learn`.

        Transitions and the starts of slices are drawn uniformly over the buffer, and no slice
        crosses an episode's end.

        The terms, each averaged over those updates of this call that have it, unless it says
        otherwise:

        ====================  ================================================================
        ``loss``              what is minimised: the weighted sum of the four losses below
        ``loss_dynamics``     nats, summed over dimensions (normalised) and members
        ``loss_termination``  nats, summed over members
        ``loss_reward``       reward units squared
        ``loss_value``        in squares of the value head's scale (the rewards' root mean square)
        ``nll``               nats per dimension (normalised) and member
        ``termination_bce``   nats per member
        ``value_mean``        reward units
        ``n_updates``         updates of this call, not averaged
        ``model_updates``     those that the model took part in, likewise
        ``holdout_nll``       as ``nll``, but of all members as one mixture, on the held-out
                              transitions, of the model as it is left; with early stopping only
        ====================  ================================================================

        Raises:
            TypeError: Not a TorchRL replay buffer, no logger, or counts that are not integers.
            ValueError: An empty buffer, or one shorter than ``k_steps + n_steps``; NaN
                observations or rewards; actions outside their space; a loss that is not finite.
            KeyError: A buffer without one of the keys read; the message names it.

        After an error the predictor is as it was before the call.
        """
        check_positive_int("n_updates", n_updates)
        check_positive_int("batch_size", batch_size)
        check_positive_int("model_batch_size", model_batch_size)
        reporting.check_logger(logger)
        keys = self.predictor_loss.tensor_keys
        slices = TransitionSlices(
            buffer,
            observation_key=keys.observation,
            terminated_key=keys.terminated,
            valid_key=keys.valid,
        )
        rates = current_rates(self._learning_rates, n_total_env_steps)
        before = {name: value.clone() for name, value in self.state_dict().items()}
        moments = copy.deepcopy(self.optim.state_dict())
        try:
            upkeep.update_statistics(self, slices)
            bar = self.name if progress else None
            loss, info = run_updates(
                self, slices, n_updates, batch_size, model_batch_size, rates, bar
            )
            upkeep.calibrate(self, slices, int(info["model_updates"]))
        except (TypeError, ValueError, KeyError):
            self.load_state_dict(before)
            self.optim.load_state_dict(moments)
            raise
        reporting.log_terms(logger, self.name, info, n_total_env_steps)
        return loss, info

    def get_standardized_log_prob(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, std: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log-density of the standardised change of the state under the whole ensemble.

        The change and the members' predictions of it go through ``delta_standardizer``, and each
        prediction is taken as a Gaussian of a fixed std there. So every dimension counts alike,
        whatever its unit, and what the model is unsure of is no cheaper than the rest: what skills
        are told apart by (arXiv 1907.01657).

        Args:
            obs: ``[*B, obs]``.
            action: ``[*B, A]`` or discrete.
            next_obs: ``[*B, obs]``.
            std: A number, or ``[D]``, in units of the standardised change.

        Returns:
            As :meth:`~layeredrl_torchrl.Model.get_log_prob`: ``log_prob [*B]`` in nats, density
            over the standardised change; ``term_prob [*B]``; ``{"means": [*B, M, D]}``, next
            states that are not standardised.

        Raises:
            ValueError: A predictor built with ``delta_standardizer=False``; and as
                :meth:`~layeredrl_torchrl.Model.get_log_prob`.
        """
        if self.delta_standardizer is None:
            raise ValueError(
                "this predictor was built with delta_standardizer=False and keeps no statistics "
                "of state changes; build it with True, or use model.get_log_prob()"
            )
        state, context = self.encode(obs)
        next_state, _ = self.encode(next_obs)
        whitening = self.delta_standardizer.whitening
        return self.model.get_log_prob(
            state, context, action, next_state, std=std, transform=whitening
        )
