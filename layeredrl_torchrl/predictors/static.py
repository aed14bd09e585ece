"""A predictor whose parts are given and not trained."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.record.loggers import Logger

from layeredrl_torchrl._reporting import check_logger, log_terms
from layeredrl_torchrl.predictors.predictor import Predictor

__all__ = ["StaticPredictor"]

_log = logging.getLogger(__name__)


class StaticPredictor(Predictor):
    """Known or hand-written dynamics, reward and value; arguments as :class:`Predictor`.

    >>> model = ProbabilisticEnsemble(Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,)))
    >>> reward = lambda state, context, action: -state.square().sum(-1)
    >>> predictor = StaticPredictor(model, None, reward, IdentityEncoder((3,)), 3)
    >>> predictor.predict_reward(torch.ones(7, 3), torch.zeros(7, 1))
    tensor([-3., -3., -3., -3., -3., -3., -3.])
    """

    def learn(
        self,
        buffer: ReplayBuffer | None = None,
        n_updates: int = 0,
        batch_size: int = 0,
        model_batch_size: int = 0,
        n_total_env_steps: int = 0,
        *,
        logger: Logger | None = None,
        progress: bool = False,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return at once with a loss of 0 and ``{"n_updates": 0.0}``, and log this at INFO.

        ``logger`` gets that term; ``progress`` has no update to show.
        """
        check_logger(logger)
        _log.info("StaticPredictor.learn: nothing to learn, its parts are given")
        info = {"n_updates": 0.0}
        log_terms(logger, self.name, info, n_total_env_steps)
        return torch.zeros(()), info
