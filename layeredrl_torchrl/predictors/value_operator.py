"""A predictor's value function as TorchRL's value operator."""

from __future__ import annotations

from torch import Tensor, nn
from torchrl.modules import ValueOperator

from layeredrl_torchrl._checks import check_instance
from layeredrl_torchrl.nets import StepFunction
from layeredrl_torchrl.predictors._functions import checked, value_of_state
from layeredrl_torchrl.predictors.predictor import Predictor

__all__ = ["value_operator"]


def value_operator(predictor: Predictor) -> ValueOperator:
    """Return the value function in the form that TorchRL's estimators and planners take.

    It reads state and context, and writes ``"state_value" [*B, 1]``, for ``GAE``,
    ``TDLambdaEstimator`` and TorchRL's ``MPPIPlanner`` on a ``PredictorEnv``. It is the function
    used at the end of plans (the target network of a ``RewardPredictor``), and shares its weights.

    >>> from layeredrl_torchrl.predictors import value_operator
    >>> factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    >>> values = value_operator(factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,))))
    >>> values(TensorDict({"state": torch.zeros(7, 3)}, [7]))["state_value"].shape
    torch.Size([7, 1])

    Args:
        predictor: Has a value function.

    Raises:
        TypeError: Not a predictor. ValueError: A predictor without a value function.
    """
    check_instance("predictor", predictor, Predictor, hint="of an environment: env.predictor")
    keys = predictor.model.in_keys[: 2 if predictor.context_dim else 1]
    predictor.need("val_func")  # names the argument in its error
    return ValueOperator(_Column(predictor.need("terminal_value")), in_keys=keys)


class _Column(nn.Module):
    """Adds an axis to values of state and context."""

    def __init__(self, value: StepFunction) -> None:
        super().__init__()
        self.value = value

    def forward(self, state: Tensor, context: Tensor | None = None) -> Tensor:
        context = state[..., :0] if context is None else context
        found = value_of_state(self.value, state, context)
        return checked("val_func", found, state.shape[:-1]).unsqueeze(-1)
