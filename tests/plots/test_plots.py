"""What the pictures draw, against arithmetic of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import known, make_buffer, make_predictor, make_transitions
from tensordict import TensorDict
from torchrl.collectors.utils import split_trajectories
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import IdentityEncoder, Model, StaticPredictor
from layeredrl_torchrl.plots import (
    plot_calibration,
    plot_disagreement,
    plot_error_by_horizon,
    plot_prediction,
)

pytest.importorskip("matplotlib")


class Drifting(Model):
    """Two members that add 1 and 3 to each dimension a step, with a std of 0.5."""

    def __init__(self):
        super().__init__(Unbounded((2,)), None, Bounded(-1.0, 1.0, (1,)), n_models=2)

    def predict_members(self, state, context, action):
        step = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        mean = state.unsqueeze(-2) + step
        weights = torch.ones_like(mean[..., 0])
        return (mean, torch.full_like(mean, 0.5)), weights, torch.zeros_like(weights[..., 0])


@pytest.fixture
def drifting():
    return StaticPredictor(Drifting(), None, None, IdentityEncoder((2,)), 2)


def episodes(n, steps, rate):
    """Real states move by ``rate * (1, 10)`` a step and a little noise."""
    moves = rate * torch.tensor([1.0, 10.0]) + 0.1 * torch.randn(n, steps, 2)
    following = moves.cumsum(1)
    done = torch.zeros(n, steps, 1, dtype=torch.bool)
    after = {"observation": following, "done": done}
    rows = {"observation": following - moves, "action": torch.zeros(n, steps, 1), "next": after}
    return TensorDict(rows, [n, steps])


PLOTS = {
    plot_prediction: lambda data: data[1],
    plot_calibration: lambda data: data,
    plot_error_by_horizon: lambda data: data,
    plot_disagreement: lambda data: data,
}


def line(figure, label, axis=0):
    (found,) = [x for x in figure.axes[axis].get_lines() if x.get_label() == label]
    return np.asarray(found.get_ydata(), dtype=float)


def test_a_prediction_shows_the_mean_the_truth_and_both_bands(drifting):
    torch.manual_seed(0)
    (episode,) = episodes(1, 6, 2.0)
    names = ["slow", "fast"]
    figure = plot_prediction(drifting, episode, names=names, n_particles=4000)
    time = np.arange(1, 7)
    for d, name in enumerate(names):
        axis = figure.axes[d]
        assert axis.get_ylabel() == name
        real = episode["next", "observation"][:, d].numpy()
        assert np.array_equal(line(figure, "real", d), real.astype(float))
        # By hand: members at 1 t and 3 t, so 2 t, variance t² between them and t / 4 within.
        mean = float(episode["observation"][0, d]) + 2.0 * time
        np.testing.assert_allclose(line(figure, "predicted mean", d), mean, atol=0.1)
        total, between = (band.get_paths()[0].vertices for band in axis.collections)
        for vertices, variance in ((total, time**2 + time / 4), (between, time**2)):
            for t in time:
                edge = vertices[vertices[:, 0] == t][:, 1]
                np.testing.assert_allclose(np.ptp(edge), 4 * variance[t - 1] ** 0.5, rtol=0.05)


def test_of_many_dimensions_a_prediction_shows_the_four_that_vary_most():
    predictor, data = make_predictor(state_dim=6), make_transitions(8, obs_dim=6)
    data["next", "done"][:] = False
    data["next", "observation"] *= torch.tensor([3.0, 0.1, 9.0, 7.0, 0.2, 5.0])
    figure = plot_prediction(predictor, data)
    assert [axis.get_ylabel() for axis in figure.axes] == [f"state {d}" for d in (0, 2, 3, 5)]
    for axis, d in zip(figure.axes, (0, 2, 3, 5), strict=True):
        real = data["next", "observation"][:, d]
        low, high = axis.get_ylim()
        assert low < real.min() < real.max() < high
        for shown in axis.get_lines():
            assert shown.get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("plot", PLOTS)
def test_axes_and_what_is_drawn_are_named(plot):
    figure = plot(make_predictor(), PLOTS[plot](make_transitions(8).reshape(2, 4)))
    first, last = figure.axes[0], figure.axes[-1]
    assert first.get_ylabel()
    assert last.get_ylabel()
    if plot is plot_disagreement:  # the last is its scale
        assert first.get_xlabel()
    else:
        assert last.get_xlabel()
        assert len(first.get_legend().get_texts()) >= 3
    assert (first.get_yscale() == "log") == (plot is plot_error_by_horizon)


@pytest.mark.parametrize(("margin", "share"), [({}, 0.5), ({"margin": 0.0}, 0.0)])
def test_the_map_reaches_beyond_the_data_by_half_their_range(margin, share):
    data = make_transitions(40)
    data["observation"] = data["observation"].clamp(-1, 1)
    data["observation"][:2] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    (mesh,) = plot_disagreement(make_predictor(), data, n=5, **margin).axes[0].collections
    corners = mesh.get_coordinates().reshape(-1, 2)
    step = 2 * (1 + 2 * share) / 4  # of the five points, which the fields are around
    end = pytest.approx(1 + 2 * share + step / 2)
    assert list(-corners.min(0)) == [end, end]
    assert list(corners.max(0)) == [end, end]


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_leave_the_data_as_they_are(plot):
    data = make_transitions(24, episode_length=8).reshape(3, 8)
    if plot is plot_error_by_horizon:
        data["next", "done"][:, 2] = True  # several episodes in a row
    data["collector", "mask"] = torch.ones(3, 8, dtype=torch.bool)
    data["collector", "mask"][1, 6:] = False
    given = PLOTS[plot](data)
    before = given.clone()
    plot(make_predictor(), given)
    assert (given == before).all()


def test_the_error_by_horizon_is_counted_up_to_the_end_of_each_episode(drifting):
    torch.manual_seed(0)
    data = episodes(5, 4, 2.0)
    data["next", "done"][0, 1] = True  # steps 3 and 4 of the first episode do not count
    data["next", "observation"][0, 2:] = 1e6
    figure = plot_error_by_horizon(drifting, data, dims=[1], n_particles=4000)
    state, real = data["observation"], data["next", "observation"]
    counts = torch.ones(5, 4, dtype=torch.bool)
    counts[0, 2:] = False
    unit = (real - state)[..., 1][counts].std()
    for t in range(4):
        rows = range(1 if t > 1 else 0, 5)
        wrong = [(float(state[e, 0, 1] + 2 * (t + 1) - real[e, t, 1]) / unit) ** 2 for e in rows]
        same = [(float(state[e, 0, 1] - real[e, t, 1]) / unit) ** 2 for e in rows]
        std = ((t + 1) ** 2 + (t + 1) / 4) ** 0.5 / unit
        found = [line(figure, name)[t] for name in ("error of the mean", "if nothing changed")]
        assert found == pytest.approx([np.mean(wrong) ** 0.5, np.mean(same) ** 0.5], rel=0.02)
        assert line(figure, "predicted std")[t] == pytest.approx(float(std), rel=0.02)


def drawn(figure):
    """All numbers of a picture: its lines, and the points that its bands and maps are drawn by."""
    found = [np.asarray(x.get_ydata(), dtype=float) for a in figure.axes for x in a.get_lines()]
    for axis in figure.axes:
        for part in axis.collections:
            if hasattr(part, "get_coordinates"):
                found += [part.get_array(), part.get_coordinates()]
            found += [path.vertices for path in part.get_paths()[:1]]
    return [np.ravel(np.asarray(x, dtype=float)) for x in found]


@pytest.mark.parametrize("plot", PLOTS)
def test_padding_is_left_out(plot):
    """TorchRL's split_trajectories pads an episode that goes on, so nothing ends before it."""
    predictor = make_predictor()
    rows = make_transitions(10)
    rows["collector", "traj_ids"] = torch.tensor([0] * 6 + [1] * 4)
    rows["next", "done"][:] = rows["next", "terminated"][:] = False
    padded = split_trajectories(rows)
    assert padded.shape == (2, 6)
    assert not padded["collector", "mask"].all()
    kept = [rows[:6], rows[6:]]
    torch.manual_seed(0)
    found = drawn(plot(predictor, PLOTS[plot](padded)))
    padded[1, 4:]["next", "observation"].fill_(50.0)
    torch.manual_seed(0)
    for one, other in zip(found, drawn(plot(predictor, PLOTS[plot](padded))), strict=True):
        np.testing.assert_array_equal(one, other)
    if plot is not plot_error_by_horizon:
        alone = kept[1] if plot is plot_prediction else rows
        torch.manual_seed(0)
        for one, other in zip(found, drawn(plot(predictor, alone)), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("plot", PLOTS)
def test_predictors_of_other_precision_are_drawn(plot, dtype):
    predictor = make_predictor().to(dtype)
    data = make_transitions(8).reshape(2, 4)
    data["next", "done"] = torch.zeros(2, 4, 1)  # floats, as some data sets have them
    figure = plot(predictor, PLOTS[plot](data))
    assert all(np.isfinite(x).all() for x in drawn(figure))


@pytest.mark.parametrize("plot", PLOTS)
def test_the_default_device_of_torch_does_not_matter(plot):
    """What is new is drawn, and so on the host; meta has no numbers to draw."""
    predictor, data = make_predictor(), make_transitions(8).reshape(2, 4)
    with torch.device("meta"):
        figure = plot(predictor, PLOTS[plot](data))
    assert all(np.isfinite(x).all() for x in drawn(figure))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", PLOTS)
def test_inputs_that_show_nothing_are_refused(plot):
    predictor, data = make_predictor(), make_transitions(8).reshape(2, 4)
    rows = PLOTS[plot](data)
    with pytest.raises(ValueError, match=r"the shape \(0.* and no transition"):
        plot(predictor, rows[:0])
    with pytest.raises(TypeError, match=r"predictor must be .* level.predictor"):
        plot(predictor.model, rows)
    with pytest.raises(TypeError, match=r"data must be .* got dict"):
        plot(predictor, rows.to_dict())
    with pytest.raises(ValueError, match=r"dims (is empty|is \[\])"):
        plot(predictor, rows, dims=[])
    one = rows[:1] if rows.ndim == 1 else rows[:1, :1]
    if plot in (plot_prediction, plot_disagreement):
        plot(predictor, one)
    else:
        with pytest.raises(ValueError, match="single transition, so changes have no std"):
            plot(predictor, one)


def test_too_few_points_are_refused():
    predictor, data = make_predictor(), make_transitions(8)
    with pytest.raises(ValueError, match="n_levels must be at least 2, got 1"):
        plot_calibration(predictor, data, n_levels=1)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        plot_disagreement(predictor, data, n=1)


def test_a_calibration_curve_counts_what_lies_below_each_quantile():
    predictor = make_predictor()
    data = make_transitions(400)
    figure = plot_calibration(predictor, data, n_levels=5)
    found = line(figure, "all dimensions")
    mean, weights, std, _, _ = predictor.predict(data["observation"], data["action"])
    below = torch.distributions.Normal(mean, std).cdf(data["next", "observation"][:, None, None])
    cdf = (weights.unsqueeze(-1) * below).sum(2).mean(1)  # [N, D]
    shares = [float((cdf <= level).float().mean()) for level in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(found, shares, atol=0.005)
    assert [x.get_label() for x in figure.axes[0].get_lines()][1:3] == ["state 0", "state 1"]
    gap = np.abs(found - [0.0, 0.25, 0.5, 0.75, 1.0]).mean()
    assert figure.axes[0].get_title().endswith(f"mean gap {gap:.3f}")
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert said == ["calibrated", "one dimension", "all dimensions"]


def test_the_map_of_disagreement_is_the_spread_of_the_members():
    torch.manual_seed(0)
    predictor, data = make_predictor(state_dim=3), make_transitions(50, obs_dim=3)
    predictor.learn(make_buffer(data), 5, 8, 8, 50)
    figure = plot_disagreement(predictor, data, dims=(2, 0), margin=0.5, n=5)
    (mesh,) = [x for x in figure.axes[0].collections if hasattr(x, "get_coordinates")]
    drawn = mesh.get_array().reshape(5, 5)
    obs = data["observation"]
    middle = int(((obs - obs.median(0).values) / obs.std(0)).square().sum(-1).argmin())
    across, up = (
        np.linspace(lo - 0.5 * (hi - lo), hi + 0.5 * (hi - lo), 5)
        for lo, hi in ((float(obs[:, d].min()), float(obs[:, d].max())) for d in (2, 0))
    )
    for i, j in ((0, 0), (4, 1), (2, 3)):
        row = obs[middle].clone()
        row[2], row[0] = across[j], up[i]
        mean, *_ = predictor.predict(row, data["action"][middle])
        spread = mean[:, 0].std(0, correction=0) / predictor.model.scaling.target.scale
        assert drawn[i, j] == pytest.approx(float(spread.mean()), rel=1e-3)


def test_data_of_another_shape_are_refused(drifting):
    data = episodes(3, 4, 1.0)
    with pytest.raises(ValueError, match=r"expected one episode \[T\]"):
        plot_prediction(drifting, data)
    with pytest.raises(ValueError, match=r"expected \[E, H\]"):
        plot_error_by_horizon(drifting, data[0])
    data["next", "done"][0, 1] = True
    with pytest.raises(ValueError, match="ends at step 1 of 4"):
        plot_prediction(drifting, data[0])
    with pytest.raises(KeyError, match="action"):
        plot_calibration(drifting, data.exclude("action"))
    with pytest.raises(ValueError, match="names has 1 entries"):
        plot_calibration(drifting, data, names=["x"])
    with pytest.raises(TypeError, match="needs a ProbabilisticEnsemble"):
        plot_disagreement(drifting, data)
    still = known(
        lambda state, action: state, lambda s, c, a: s.sum(-1), Bounded(-1.0, 1.0, (1,)), 2
    )
    data["next", "observation"] = data["observation"]
    with pytest.raises(ValueError, match="no change of the state"):
        plot_error_by_horizon(still, data)
