"""Gradient steps on a weighted sum of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from layeredrl_torchrl import _reporting as reporting
from layeredrl_torchrl._checks import check_number, check_trainable
from layeredrl_torchrl._graphs import Graphs
from layeredrl_torchrl._precision import uncached_autocast
from layeredrl_torchrl._state import follow_parameters, refuse_other_shapes
from layeredrl_torchrl._watch import flush, watched
from layeredrl_torchrl.objectives import MemberBatches, ModelLoss, PredictorLoss
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.predictors._experience import Experience
from layeredrl_torchrl.predictors._learning_rates import LearningRate, LearningRates, share_left
from layeredrl_torchrl.predictors._sums import Sums
from layeredrl_torchrl.predictors._weighted_loss import WeightedLoss
from layeredrl_torchrl.predictors.early_stopping import HoldoutWatch

__all__ = ["Updates", "trained_by"]

# Batches that are drawn and prepared at once, since this takes most of the time of small updates.
# On an accelerator many batches take as many operations as one, and each draw waits.
_N_AHEAD = 32
_N_AHEAD_ON_ACCELERATOR = 64
# Names that are reported in addition to the terms.
_REPORTED = {"loss", "n_updates", "model_updates", "holdout_nll"}


class Updates(nn.Module):
    """Owns the losses with their weights, the optimizer and the learning rates.

    Args:
        losses: The losses to minimise, by name.
        parts: The parts to train, each a group of the optimizer with that name; parts that are not
            modules, or have no trainable parameters, are left out.
        rates: The learning rate of each part: a number, or a callable of the environment steps.
        decays: Decoupled weight decay of parts; 0 by default, where ``AdamW`` equals ``Adam`` bit
            for bit.
        clip_grad_max_norm: Gradient norm that each part is clipped to; ``None`` for no clipping.
        followers: Called after each gradient step with a term of that name, to update averages and
            target networks.

    Attributes:
        graphs: Captures updates as CUDA graphs; ``None`` to run them as they are.

    Raises:
        TypeError, ValueError: Numbers of another kind or outside their range.
    """

    n_updates: Tensor  # []

    def __init__(
        self,
        losses: Mapping[str, WeightedLoss],
        parts: Mapping[str, object],
        rates: Mapping[str, LearningRate],
        *,
        decays: Mapping[str, float],
        clip_grad_max_norm: float | None,
        followers: Mapping[str, Callable[[], None]],
    ) -> None:
        super().__init__()
        if clip_grad_max_norm is not None:
            check_number("clip_grad_max_norm", clip_grad_max_norm, 0.0, open_low=True)
        self.clip_grad_max_norm = clip_grad_max_norm
        self.losses = dict(losses)
        self._first = frozenset(losses)
        self._own_names = _REPORTED.union(*(_names(one.loss) for one in losses.values()))
        self.followers = dict(followers)
        self.graphs: Graphs | None = None
        self._sums = Sums()
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.long))
        self.own_losses = nn.ModuleList()
        groups = []
        for name, part in parts.items():
            parameters = _trainable(part)
            if parameters:
                decay = check_number(f"the weight decay of {name}", decays.get(name, 0.0), 0.0)
                groups.append({"params": parameters, "name": name, "weight_decay": decay})
        self.optim = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
        refuse_other_shapes(self.optim)
        self.rates = LearningRates(self.optim, rates)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, and the check that its optimizer lost."""
        super().__setstate__(state)
        refuse_other_shapes(self.optim)
        # Torch warns of capturable optimizers that run uncaptured, but only if they were copied.
        self.optim._warned_capturable_if_run_uncaptured = True

    def add(
        self,
        loss: TermsLoss,
        weights: Mapping[str, float],
        rate: LearningRate,
        *,
        saved: Iterable[object],
        tau: float,
    ) -> None:
        """Minimise one more loss; see :meth:`RewardPredictor.add_loss`.

        Args:
            loss: The loss.
            weights: Of its terms.
            rate: Learning rate of its own parameters.
            saved: Tensors that are already saved with the predictor; a loss with others is saved
                too.
            tau: Step of the target network of a :class:`PredictorLoss`, where nothing else moves
                it.
        """
        name = f"{type(loss).__name__}_{len(self.losses)}"
        weighted = WeightedLoss(loss, weights)
        known = self._optimized()
        own = [p for p in trained_by(loss) if p not in known]
        if own:
            self.optim.add_param_group({"params": own, "name": name})
            self.rates.add(name, rate)
        held = {id(x) for x in saved}
        # For example a target network, or a count in a buffer.
        if own or any(id(x) not in held for x in loss.state_dict(keep_vars=True).values()):
            self.own_losses.append(loss)
        if isinstance(loss, PredictorLoss) and loss.tau is None:
            target = getattr(loss, "target_val_func", None)
            alone = target is not None and all(id(p) not in held for p in target.parameters())
            if alone and type(loss).after_update is PredictorLoss.after_update:
                loss.tau = tau
        self.losses[name] = weighted

    def _optimized(self) -> set[nn.Parameter]:
        """Return the parameters of the optimizer, including those frozen since."""
        return {p for group in self.optim.param_groups for p in group["params"]}

    def trains(self, part: object) -> bool:
        """Whether any parameter of a module is trained: in the optimizer, and not frozen.

        False for modules without parameters and for anything that is not a module.
        """
        return not self._optimized().isdisjoint(_trainable(part))

    # -- running ----------------------------------------------------------------------------

    def run(
        self,
        experience: Experience,
        n_updates: int,
        *,
        batch_size: int,
        model_batch_size: int,
        member_batches: MemberBatches,
        n_total_env_steps: int,
        warm_up: int = 0,
        after_warm_up: Callable[[], None] | None = None,
        annealed: Mapping[str, float] | None = None,
        watch: HoldoutWatch | None = None,
        states_move: bool = False,
        bar: str | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Take gradient steps on batches of ``experience``.

        Args:
            experience: Source of the batches.
            n_updates: Number of gradient steps.
            batch_size: Slices in a batch.
            model_batch_size: Transitions in a batch for the model.
            member_batches: How the members share them.
            n_total_env_steps: Argument of learning-rate functions.
            warm_up: Number of first updates, counted over all calls, without model and value
                function.
            after_warm_up: Called after the last of these.
            annealed: Share of this call's updates, at its end, over which the learning rate of a
                part falls linearly to a tenth. The ``beta`` of a model's loss falls to 0 over as
                many updates, but reaches 0 a quarter of them earlier (for means see
                ``mixture_loss``).
            watch: Ends the model's updates early.
            states_move: Whether to encode states again for each update, as with an encoder that
                learns.
            bar: Title of the progress bar; ``None`` for no bar.

        Returns:
            The mean loss and the mean terms.

        Raises:
            ValueError: Learning rates that are negative or not finite; a loss or gradient that is
                not finite; and as :class:`Experience` and the losses raise.
        """
        follow_parameters(self.optim)
        self.rates.begin(n_total_env_steps)
        device = self.optim.param_groups[0]["params"][0].device
        most = _N_AHEAD if device.type == "cpu" else _N_AHEAD_ON_ACCELERATOR
        most = max(experience.at_most(most * model_batch_size) // model_batch_size, 1)
        # Split evenly, so that all batches of the last draw are needed.
        n_ahead = math.ceil(n_updates / max(math.ceil(n_updates / most), 1))
        streams: dict[str, Iterator[Any]] = {}
        for name, weighted in self.losses.items():
            loss = weighted.loss
            if isinstance(loss, ModelLoss):
                n_rows = member_batches.n_rows(model_batch_size, loss.model.n_models)
                streams[name] = experience.model_batches(
                    loss, member_batches, n_rows, n_ahead, states_move=states_move
                )
            else:
                streams[name] = experience.slice_batches(loss, batch_size, n_ahead)
        of_model = {n for n, w in self.losses.items() if isinstance(w.loss, ModelLoss)}
        model_alone = all(group["name"] == "model" for group in self.optim.param_groups)
        left = warm_up - int(self.n_updates)
        sums = self._sums
        sums.start()
        take = self.step if self.graphs is None else self._captured(self.graphs)
        for i in reporting.updates(n_updates, sums.totals, sums.counts, bar=bar):
            stopped = watch is not None and watch.stopped
            if stopped and model_alone:
                break
            if warm_up and after_warm_up is not None and i == left:
                after_warm_up()
            self.rates.set(i, n_updates, annealed or {})
            idle = of_model if stopped or i < left else set()
            batch = {name: next(stream) for name, stream in streams.items() if name not in idle}
            for name in of_model & batch.keys():
                share = (annealed or {}).get("model", 0.0)
                loss = self.losses[name].loss
                # beta is 0 in the last quarter of the annealing, where the variances settle.
                beta = loss.beta * share_left(i, n_updates, share, share / 4)
                if device.type != "cpu" or (beta and loss.is_compiled):
                    # Captured and compiled code notices changes of a tensor, but not of a number.
                    beta = torch.full((), beta, device=device)
                batch[name] = batch[name]._replace(beta=beta)
            if i < left:
                batch = {name: _without_value(one) for name, one in batch.items()}
            take(batch)
            sums.count(_kind(batch))
            if watch is not None and not idle:
                if watch.is_due:
                    sums.check()
                watch.after_update()
        flush()
        sums.check()
        counts = sums.counts
        totals = torch.stack([sums.totals[name] for name in counts]).tolist()
        info = {name: total / counts[name] for name, total in zip(counts, totals, strict=True)}
        info |= {"n_updates": float(counts["loss"]), "model_updates": float(counts["nll"])}
        if watch is not None:
            info["holdout_nll"] = watch.finish()
        return sums.totals["loss"] / counts["loss"], info

    @watched
    def step(self, batch: Mapping[str, Any]) -> None:
        """Take one gradient step and add up its terms.

        It does not wait for an accelerator, and changes all tensors in place.

        Args:
            batch: A prepared batch for each loss that takes part, by its name.

        Raises:
            ValueError: A term without a weight; a loss or gradient that is not finite. On a CPU it
                reaches no parameter; on an accelerator it is found at the end of :meth:`run`.
        """
        device = self.optim.param_groups[0]["params"][0].device
        with torch.enable_grad(), uncached_autocast(device.type):
            found = [self.losses[name](prepared) for name, prepared in batch.items()]
            loss = torch.stack([value for weighted, _ in found for value in weighted]).sum()
        terms: dict[str, Tensor] = {}
        for name, (_, several) in zip(batch, found, strict=True):
            added = name not in self._first
            for term, value in several.items():
                taken = added and (term in self._own_names or term in terms)
                terms[f"{name}.{term}" if taken else term] = value
        check_trainable("the predictor", loss)
        self.optim.zero_grad()
        loss.backward()
        self._sums.add(_kind(batch), {"loss": loss, **terms}, self._clip())
        self.optim.step()
        for name, follow in self.followers.items():
            if name in terms:
                follow()
        for name in batch:
            self.losses[name].loss.after_update()
        self.n_updates += 1

    def _captured(self, graphs: Graphs) -> Callable[[Mapping[str, Any]], None]:
        """Return :meth:`step`, captured as a CUDA graph for each kind of batch."""
        parts: list[nn.Module] = [weighted.loss for weighted in self.losses.values()]
        owners = (getattr(follow, "__self__", None) for follow in self.followers.values())
        parts += [owner for owner in owners if isinstance(owner, nn.Module)]
        modules = list(dict.fromkeys(module for part in parts for module in part.modules()))
        tensors = {
            id(tensor): tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        models = [w.loss.model for w in self.losses.values() if isinstance(w.loss, ModelLoss)]
        options = (
            self.clip_grad_max_norm,
            tuple((name, *sorted(w.weights.items())) for name, w in self.losses.items()),
            tuple(
                (group["name"], group["betas"], group["eps"], group["weight_decay"])
                for group in self.optim.param_groups
            ),
            tuple(_numbers(module) for module in modules),
        )

        def take(batch: Mapping[str, Any]) -> None:
            averaging = tuple(model.predicting_averages for model in models)
            rates = [group["lr"] for group in self.optim.param_groups]
            moments = [x for state in self.optim.state.values() for x in state.values()]
            reads = [*tensors.values(), self.n_updates, *self._sums.tensors(), *rates, *moments]
            name = (_kind(batch), averaging, options)
            with torch.no_grad():
                graphs.run(name, self.step, (batch,), reads, changes=True)

        return take

    def _clip(self) -> dict[str, Tensor]:
        """Clip the gradients of each part; return their norms before clipping."""
        norms: dict[str, Tensor] = {}
        limit = self.clip_grad_max_norm
        grads = [
            [p.grad for p in group["params"] if p.grad is not None]
            for group in self.optim.param_groups
        ]
        # One call for all parts: torch's get_total_norm would need one for each part.
        every = list(chain(*grads))
        each = iter(torch._foreach_norm(every) if every else ())
        for group, own in zip(self.optim.param_groups, grads, strict=True):
            if not own:
                continue
            norm = torch.linalg.vector_norm(torch.stack(list(islice(each, len(own)))))
            norms[group["name"]] = norm
            # On a CPU, compare the norm first, since clipping takes time even without effect.
            if limit is not None and (norm.device.type != "cpu" or float(norm) > limit):
                clip_grads_with_norm_(group["params"], limit, norm)
        return norms


def _names(loss: TermsLoss) -> set[str]:
    """Return the names of the terms of a predictor's own loss."""
    names = set(loss.out_keys)
    if isinstance(loss, PredictorLoss):
        if not isinstance(loss.rew_func, nn.Module):
            names -= {"loss_reward"}
        if not isinstance(loss.val_func, nn.Module):
            names -= {"loss_value", "value_mean"}
    return names


def trained_by(loss: TermsLoss) -> list[nn.Parameter]:
    """Return the parameters that a loss trains, as far as this is visible."""
    still: set[nn.Parameter] = set()
    if isinstance(loss, PredictorLoss) and not loss.learn_encoder:
        still.update(loss.encoder.parameters())
    return [p for p in _trainable(loss) if p not in still]


def _trainable(part: object) -> list[nn.Parameter]:
    if not isinstance(part, nn.Module):
        return []
    return [p for p in part.parameters() if p.requires_grad]


def _kind(batch: Mapping[str, Any]) -> Hashable:
    """Return which losses take part in an update, and whether the value function does."""
    return tuple((name, getattr(one, "value", 0) is not None) for name, one in batch.items())


def _numbers(module: nn.Module) -> Hashable:
    """Return the options of a module; a captured update would not notice their changes."""
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, x)
        for name, x in vars(module).items()
        if isinstance(x, plain) and not name.startswith("_")
    )


def _without_value(prepared: Any) -> Any:
    return prepared._replace(value=None) if hasattr(prepared, "value") else prepared
