"""A predictor that learns dynamics, reward, value and encoder from a replay buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from torch import Tensor, nn
from torchrl.data import ReplayBuffer
from torchrl.record.loggers import Logger

from layeredrl_torchrl import _reporting as reporting
from layeredrl_torchrl._checks import (
    check_flag,
    check_instance,
    check_number,
    check_positive_int,
)
from layeredrl_torchrl._graphs import Graphs
from layeredrl_torchrl._state import undone_on_error
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.nets import Encoder, StepFunction, move_towards
from layeredrl_torchrl.objectives import ConsistencyLoss, ModelLoss, PredictorLoss
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.predictors._experience import JOINED, Experience
from layeredrl_torchrl.predictors._learning_rates import LearningRate
from layeredrl_torchrl.predictors._updates import Updates, trained_by
from layeredrl_torchrl.predictors._upkeep import N_STATISTICS, Upkeep
from layeredrl_torchrl.predictors._weighted_loss import WeightedLoss
from layeredrl_torchrl.predictors.early_stopping import HoldoutWatch
from layeredrl_torchrl.predictors.predictor import Predictor
from layeredrl_torchrl.predictors.standardizer import DeltaStandardizer
from layeredrl_torchrl.predictors.training import ModelTraining

__all__ = ["RewardPredictor"]


class RewardPredictor(Predictor):
    """Learns dynamics, reward and value from a buffer, and the encoder through the reward loss.

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
        val_func: Value function; a module is trained, a plain callable is taken as known.
        rew_func: Reward function, likewise.
        encoder: Observation to state and context.
        latent_state_dim: ``D``.
        context_dim: ``C``.
        learn_encoder: Whether the reward loss reaches the encoder.
        term_func: As :class:`Predictor`. With it, the model's terminations are not trained, nor is
            any module in ``term_func``.
        gamma: Discount over one environment step.
        tau: Step of the target network towards the value network at each update, in [0, 1].
        k_steps: Steps of a slice on which reward and value are trained.
        n_steps: Rewards in a value target.
        consistency_loss_weight: Weight of the dynamics and termination losses.
        termination_loss_weight: Weight of the termination loss relative to the dynamics loss, whose
            gradients are larger by about one over the predicted std; with 1, the layers that the
            two share hardly learn terminations.
        value_loss_weight: Weight of the value loss.
        rew_loss_weight: Weight of the reward loss.
        encoder_lr: Learning rate of the encoder: a number, or a callable of the total environment
            steps; the next three likewise.
        reward_lr: Of the reward function.
        model_lr: Of the dynamics model.
        value_lr: Of the value function.
        holdout_share: Share of the transitions that are held out from the model's training and used
            for its calibration (:meth:`ProbabilisticEnsemble.calibrate`), chosen by their place in
            the storage. 0 for no calibration.
        clip_grad_max_norm: Limit to which the gradient norm of each of the four parts is clipped;
            ``None`` for no clipping.
        delta_standardizer: Whether to keep the statistics that
            :meth:`get_standardized_log_prob` needs.
        encoder_warm_up: Number of first updates, counted over all calls, in which only reward
            function and encoder learn. Otherwise model and value function would learn from states
            that still change, and would later have to unlearn this.
        beta_nll: ``beta`` of :class:`~layeredrl_torchrl.ModelLoss` at the start of each call. It
            falls to 0 towards the end of the call (``ModelTraining.annealing``), for the means only
            as far as they explain the variance. So the means are fitted first, including those of
            dimensions that seldom change, and then the variances.
        model_training: Further options of the model's training.

    Only :meth:`learn` updates the parameters. It also updates the statistics that normalise inputs
    and outputs, and the encoder's mask: at the start of a call if a tenth of the buffer's data is
    new, and once more at the end of the encoder's warm-up. A frozen part
    (``requires_grad_(False)``) keeps its weights, statistics, averages and calibration.

    Raises:
        TypeError, ValueError: As :class:`Predictor`; a model that is not an ensemble; numbers
            outside their range; an ``encoder_warm_up`` in which nothing can learn;
            ``early_stopping`` without held-out transitions, or with an encoder that learns (the
            best model of a call would predict states that have changed since).
    """

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        val_func: StepFunction | None,
        rew_func: StepFunction | None,
        encoder: Encoder,
        latent_state_dim: int,
        context_dim: int = 0,
        learn_encoder: bool = True,
        *,
        term_func: StepFunction | None = None,
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
        holdout_share: float = 0.05,
        clip_grad_max_norm: float | None = 200.0,
        delta_standardizer: bool = True,
        encoder_warm_up: int = 0,
        beta_nll: float = 0.75,
        model_training: ModelTraining = ModelTraining(),  # noqa: B008 - it is frozen
    ) -> None:
        super().__init__(
            model, val_func, rew_func, encoder, latent_state_dim, context_dim, term_func=term_func
        )
        check_instance(
            "model",
            model,
            ProbabilisticEnsemble,
            hint="use StaticPredictor for a given model",
        )
        check_instance("model_training", model_training, ModelTraining, hint="pass ModelTraining()")
        self.learn_encoder = check_flag("learn_encoder", learn_encoder)
        self.holdout_share = check_number("holdout_share", holdout_share, 0.0, 1.0, open_high=True)
        self.tau = check_number("tau", tau, 0.0, 1.0)
        self.encoder_warm_up = check_positive_int("encoder_warm_up", encoder_warm_up, minimum=0)
        self.model_training = model_training
        check_number("beta_nll", beta_nll, 0.0, 1.0)
        check_number("value_loss_weight", value_loss_weight, 0.0)
        check_number("rew_loss_weight", rew_loss_weight, 0.0)
        rates = {"model": model_lr, "reward": reward_lr, "value": value_lr, "encoder": encoder_lr}
        for part, rate in rates.items():
            if not callable(rate):
                check_number(f"{part}_lr", rate, 0.0)
        # The losses share this module's parameters, so they are not registered again; they add only
        # the target network to the state.
        predictor_loss = PredictorLoss(
            encoder,
            rew_func,
            val_func,
            gamma=gamma,
            k_steps=k_steps,
            n_steps=n_steps,
            learn_encoder=learn_encoder,
            action_spec=model.action_form,
        )
        observation = JOINED if encoder.joins else encoder.in_keys[0]
        predictor_loss.set_keys(
            observation=observation,
            next_observation=unravel_key(("next", observation)),
            action=model.in_keys[2],
        )
        self.__dict__["predictor_loss"] = predictor_loss
        huber_std = model_training.huber_std
        self.__dict__["model_loss"] = ModelLoss(
            model, per_member=True, beta=beta_nll, huber_std=huber_std
        )
        trains_value = isinstance(val_func, nn.Module)
        self.target_val_func = predictor_loss.target_val_func if trains_value else None
        self.delta_standardizer = (
            DeltaStandardizer(latent_state_dim)
            if check_flag("delta_standardizer", delta_standardizer)
            else None
        )
        check_number("consistency_loss_weight", consistency_loss_weight, 0.0)
        check_number("termination_loss_weight", termination_loss_weight, 0.0)
        if term_func is not None:  # the model's termination is never used
            termination_loss_weight = 0.0
        self.updates = Updates(
            {
                "predictor": WeightedLoss(
                    predictor_loss,
                    {"loss_reward": rew_loss_weight, "loss_value": value_loss_weight},
                ),
                "model": WeightedLoss(
                    self.model_loss,
                    {
                        "loss_dynamics": consistency_loss_weight,
                        "loss_termination": consistency_loss_weight * termination_loss_weight,
                    },
                ),
            },
            parts={
                "model": model,
                "reward": rew_func,
                "value": val_func,
                "encoder": encoder if learn_encoder else None,
            },
            rates=rates,
            decays={"model": model_training.weight_decay},
            clip_grad_max_norm=clip_grad_max_norm,
            followers={"loss_dynamics": self._update_average, "loss_value": self.update_target},
        )
        self.upkeep = Upkeep(
            model,
            encoder,
            learn_encoder,
            rew_func,
            val_func,
            self.target_val_func,
            self.delta_standardizer,
            gamma,
            self.updates.trains,
        )
        self._check_schedule()

    def compile(self, *, cudagraphs: bool = False, **options: Any) -> None:
        """Compile imagined steps and the losses; with ``cudagraphs`` also capture updates.

        On a GPU, with ``cudagraphs``, each whole update of :meth:`learn` (losses, gradients,
        clipping, optimizer, averages and target network) is captured as a CUDA graph, one for each
        set of losses that take part, and replayed; the first few updates run uncaptured. Everything
        that learning depends on may change between calls: parameters, statistics, learning rates,
        options, loaded states. Added losses are captured too and must not wait for the GPU. On a
        CPU nothing is captured.

        Args:
            cudagraphs: Whether to capture updates, and what :meth:`Predictor.compile` captures.
            **options: Of ``torch.compile``, for example ``dynamic=False``; ``backend="eager"``
                compiles nothing.

        Raises:
            TypeError: As :meth:`Predictor.compile`.
        """
        super().compile(cudagraphs=cudagraphs, **options)
        self.model_loss.compile(**options)
        self.predictor_loss.compile(**options)
        self.updates.graphs = Graphs() if cudagraphs else None

    @property
    def optim(self) -> torch.optim.Optimizer:
        """The optimizer of all parts; save it together with the predictor."""
        return self.updates.optim

    @property
    def n_learn_updates(self) -> Tensor:
        """Updates over all calls, a scalar."""
        return self.updates.n_updates

    def add_loss(
        self, loss: TermsLoss, weights: Mapping[str, float], *, lr: LearningRate = 1e-3
    ) -> None:
        """Minimise one more loss in every update.

        :class:`~layeredrl_torchrl.TermsLoss` has an example of a loss to add.

        Args:
            loss: Gets slices ``[B, loss.length]`` with all entries of the buffer and ``"valid"``,
                as :class:`~layeredrl_torchrl.TransitionSlices` draws them.
            weights: Weights of the terms whose names begin with ``"loss_"``.
            lr: Learning rate of the loss's own parameters, those outside the predictor.

        Its buffers and parameters are saved and restored with the predictor, and the target network
        of a :class:`~layeredrl_torchrl.PredictorLoss` is updated with the predictor's ``tau``,
        unless one of TorchRL's target updaters is associated with it. A term whose name is already
        taken, by the predictor or by a loss added before, is reported with the loss's class and
        position: ``"PredictorLoss_2.loss_reward"``.

        Raises:
            TypeError, ValueError: Not a :class:`~layeredrl_torchrl.objectives.TermsLoss`; weights
                that are not finite numbers of at least 0; a ``ConsistencyLoss`` whose encoder
                nothing trains; a loss that trains the encoder together with ``early_stopping``. In
                :meth:`learn`, ``ValueError`` for a term without a weight.
        """
        self._check_added(loss, weights)
        saved = self.state_dict(keep_vars=True).values()
        self.updates.add(loss, weights, lr, saved=saved, tau=self.tau)

    def _check_added(self, loss: TermsLoss, weights: Mapping[str, float]) -> None:
        """Refuse a loss that would have no effect, or that contradicts ``early_stopping``."""
        if isinstance(loss, ConsistencyLoss) and isinstance(weights, Mapping):
            if any(weights.values()) and not self.updates.trains(loss.encoder):
                raise ValueError(
                    "ConsistencyLoss trains the encoder, but nothing here updates that encoder; "
                    "pass predictor.encoder, build the predictor with learn_encoder=True and an "
                    "encoder whose parameters are not frozen, or give its term a weight of 0"
                )
        elif self.model_training.early_stopping is not None and isinstance(loss, nn.Module):
            of_encoder = {p for p in self.encoder.parameters() if p.requires_grad}
            if any(p in of_encoder for p in trained_by(loss)):
                raise ValueError(
                    f"early_stopping needs states that stay the same, but {type(loss).__name__} "
                    "trains the encoder; freeze it (encoder.requires_grad_(False)), or leave "
                    "early_stopping out"
                )

    def _check_schedule(self) -> None:
        """Refuse a warm-up or early stopping that would have no effect."""
        if self.encoder_warm_up and not (
            self._states_move and isinstance(self.rew_func, nn.Module)
        ):
            raise ValueError(
                f"encoder_warm_up={self.encoder_warm_up} trains reward function and encoder, but "
                "one of them has nothing to train; leave it at 0, or give an EncoderNet, "
                "learn_encoder=True and a reward module"
            )
        if self.model_training.early_stopping is None:
            return
        if not self.holdout_share:
            raise ValueError("early_stopping evaluates held-out transitions; raise holdout_share")
        if self._states_move:
            raise ValueError(
                "early_stopping needs states that stay the same, but the encoder learns; pass "
                "learn_encoder=False"
            )

    @property
    def _states_move(self) -> bool:
        """Whether the encoder learns, by the reward loss or by an added loss."""
        return self.updates.trains(self.encoder)

    def _update_average(self) -> None:
        """Update the averaged weights that the model predicts with, unless it is frozen."""
        if any(p.requires_grad for p in self.model.members.parameters()):
            self.model.update_average()

    def update_target(self) -> None:
        """Move the target network towards the value function by ``tau``."""
        if self.target_val_func is not None and isinstance(self.val_func, nn.Module):
            move_towards(self.target_val_func, self.val_func, self.tau)

    @property
    def n_steps_needed(self) -> int:
        """Steps of the slices from which reward and value learn."""
        return int(self.predictor_loss.k_steps + self.predictor_loss.n_steps)

    @property
    def terminal_value(self) -> StepFunction | None:
        """The target network, an average over recent updates and so steadier than ``val_func``."""
        return self.val_func if self.target_val_func is None else self.target_val_func

    def reset_parameters(self) -> None:
        """Draw new weights for all parts but frozen ones; keep statistics, counts and optimizer."""
        super().reset_parameters()
        for weighted in self.updates.losses.values():
            weighted.loss.after_reset()

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

        The terms, each averaged over the updates of this call that compute it, unless stated
        otherwise:

        ====================  ================================================================
        ``loss``              the minimised loss: the weighted sum of the four losses below
        ``loss_dynamics``     nats, summed over dimensions (normalised) and members
        ``loss_termination``  nats, summed over members; not minimised where there is a
                              ``term_func``
        ``loss_reward``       in squares of the reward head's scale (the rewards' std)
        ``loss_value``        in squares of the value head's scale (the rewards' root mean square,
                              without the offset that they have where nothing terminates)
        ``nll``               nats per dimension (normalised) and member
        ``termination_bce``   nats per member
        ``value_mean``        reward units
        ``n_updates``         updates of this call, not averaged
        ``model_updates``     updates that included the model, not averaged
        ``holdout_nll``       as ``nll``, but of all members as one mixture, on held-out
                              transitions, for the model at the end of the call; with early
                              stopping only
        ====================  ================================================================

        Raises:
            TypeError: Not a TorchRL replay buffer, not a logger, or counts that are not integers.
            ValueError: An empty buffer, or one shorter than ``k_steps + n_steps``; NaN
                observations or rewards; actions outside their space; a loss that is not finite.
            KeyError: A buffer without one of the keys read; the message names it.

        After an error the predictor is as it was before the call.
        """
        check_positive_int("n_updates", n_updates)
        check_positive_int("batch_size", batch_size)
        check_positive_int("model_batch_size", model_batch_size)
        check_number("n_total_env_steps", n_total_env_steps, 0.0)
        check_flag("progress", progress)
        reporting.check_logger(logger)
        experience = Experience(
            buffer,
            self.encoder,
            self.model.action_form,
            self.predictor_loss.tensor_keys,
            holdout_share=self.holdout_share,
            device=self.model.floats.device,
        )
        training = self.model_training
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            undone_on_error(self, self.optim),
        ):
            self.upkeep.refit(experience)
            watch = None
            if training.early_stopping is not None:
                held_out = experience.held_out(N_STATISTICS)
                watch = HoldoutWatch(self.model, self.optim, held_out, training.early_stopping)
            loss, info = self.updates.run(
                experience,
                n_updates,
                batch_size=batch_size,
                model_batch_size=model_batch_size,
                member_batches=training.member_batches,
                n_total_env_steps=n_total_env_steps,
                warm_up=self.encoder_warm_up,
                after_warm_up=lambda: self.upkeep.refit(experience, anew=True),
                annealed={"model": training.annealing},
                watch=watch,
                states_move=self._states_move,
                bar=self.name if progress else None,
            )
            self.upkeep.calibrate(experience, int(info["model_updates"]))
            reporting.log_terms(logger, self.name, info, n_total_env_steps)
        return loss, info

    def get_standardized_log_prob(
        self,
        obs: Tensor | TensorDictBase,
        action: Tensor,
        next_obs: Tensor | TensorDictBase,
        std: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the log-density of the standardised state change under the whole ensemble.

        The change and the members' predictions of it go through ``delta_standardizer``, and each
        prediction becomes a Gaussian of fixed std there. So every dimension counts equally, in any
        unit, and uncertain dimensions have no advantage. Skills are distinguished by this density
        (arXiv 1907.01657).

        Args:
            obs: ``[*B, obs]``, or a TensorDict with its entries.
            action: ``[*B, A]`` or discrete.
            next_obs: As ``obs``.
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
        state, context = self.state_of(obs)
        next_state, _ = self.state_of(next_obs)
        whitening = self.delta_standardizer.whitening
        log_prob, predicted, info = self.model.get_log_prob(
            state, context, action, next_state, std=std, transform=whitening
        )
        action = self.model.action_form(action, state.shape[:-1])
        term_prob = self.term_prob_of(state, context, action, next_state, predicted)
        return log_prob, term_prob, info
