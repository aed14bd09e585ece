"""Runs that are stopped at any point: they go on as they would have, or say why they cannot."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl import SafeCheckpoint, make_batched
from layeredrl_torchrl.runs import Run, RunError, RunOptions
from layeredrl_torchrl.runs._files import staged
from layeredrl_torchrl.runs._folder import RunFolder
from layeredrl_torchrl.runs._interrupts import Interrupts


class StopError(Exception):
    """As a kill: nothing is tidied up after it but what the system does."""


def stop_at(steps):
    def after(run):
        if run.steps == steps:
            raise StopError

    return after


def numbers(folder):
    """The rows of the curve without the seconds, as they stand in the file."""
    return [line.rsplit(",", 1)[0] for line in (folder / "curve.csv").read_text().splitlines()]


@pytest.mark.parametrize("steps", [20, 40, 60, 80])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(steps, small, tmp_path):
    """Also before its first checkpoint (at 20) and before the evaluation (at 80)."""
    alone = small(seed=3)
    expected, drawn = numbers(alone.folder), torch.rand(3)
    shutil.rmtree(alone.folder)
    with pytest.raises(StopError):
        small(stop_at(steps), seed=3)
    assert numbers(alone.folder) == expected[: 1 + steps // 20]
    torch.rand(1)
    resumed = small(seed=3, resume=True)
    assert numbers(alone.folder) == expected
    assert torch.equal(torch.rand(3), drawn)
    assert resumed.steps == 80
    seconds = [row["seconds"] for row in resumed.rows]
    assert seconds == sorted(seconds)


def test_it_saves_when_that_is_due_and_at_its_end(small):
    run = small(steps_per_checkpoint=60)
    saved = [path.parent.name for path in run.folder.glob("checkpoints/*/checksums.json")]
    assert sorted(int(name.split("-")[-1]) for name in saved) == [60, 80]


def test_the_last_two_checkpoints_are_kept(small):
    run = small(steps_per_checkpoint=20)
    assert sorted(int(path.name.split("-")[-1]) for path in run.rotation.directory.iterdir()) == [
        60,
        80,
    ]


def test_the_bar_says_what_is_being_done(small, capsys):
    small(seed=3)
    shown = capsys.readouterr().err
    assert all(f": {what}:" in shown for what in ("acting", "learning", "saving"))


@pytest.fixture
def listens():
    """Ctrl-C interrupts, also where the tests themselves were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens")
def test_ctrl_c_completes_and_saves_its_batch(small, capsys):
    """At 20, before the first checkpoint is due; what follows is the run that was left alone."""

    def press(run):
        if run.steps == 20:
            os.kill(os.getpid(), signal.SIGINT)

    alone = small(seed=3)
    expected = numbers(alone.folder)
    shutil.rmtree(alone.folder)
    with pytest.raises(KeyboardInterrupt, match=r"at step 20 of 80; continue .* --resume"):
        small(press, seed=3)
    assert "Ctrl-C again" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert numbers(alone.folder) == expected[:2]
    small(seed=3, resume=True)
    assert numbers(alone.folder) == expected


@pytest.mark.usefixtures("listens")
def test_a_second_ctrl_c_stops_at_once(small):
    def press(run):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="step 20, before the first checkpoint: start"):
        small(press, seed=3)
    small(seed=3)


@pytest.mark.usefixtures("listens")
def test_ctrl_c_waits_for_a_batch_while_there_are_batches_only(tmp_path):
    """What comes after them, such as the evaluation, it interrupts at once."""
    handlers = []
    with Run(RunOptions(output=tmp_path / "run", steps_per_batch=20), 40) as run:
        for _ in run.collect(make_batched("InvertedPendulum-v5", 1, seed=0)):
            handlers.append(signal.getsignal(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(handlers) == 2
        assert signal.default_int_handler not in handlers


@pytest.mark.usefixtures("listens")
@pytest.mark.parametrize("how", ["another thread", "a handler of one's own"])
def test_where_somebody_else_listens_to_ctrl_c_nothing_is_changed(how):
    def own(number, frame):
        pass

    def look():
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    seen, expected = [], signal.default_int_handler
    if how == "another thread":
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    else:
        signal.signal(signal.SIGINT, expected := own)
        look()
    assert seen == [expected]
    assert signal.getsignal(signal.SIGINT) is expected


def test_an_output_that_is_no_folder_is_named(small, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match=r"run.* cannot be (read|written)") as said:
        small()
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("left", ["", "env_steps,rew", None])
def test_a_cut_curve_is_made_whole_again(left, small):
    run = small(seed=3)
    whole = numbers(run.folder)
    if left is None:
        (run.folder / "curve.csv").unlink()
    else:
        (run.folder / "curve.csv").write_text(left)
    small(seed=3, resume=True, total_env_steps=120)
    assert numbers(run.folder)[: len(whole)] == whole
    assert [line.split(",")[0] for line in numbers(run.folder)[1:]] == [
        f"{steps:.1f}" for steps in range(20, 121, 20)
    ]


def test_a_damaged_checkpoint_is_passed_over(small, capsys):
    run = small(seed=3)
    whole = numbers(run.folder)
    last, before = sorted((run.folder / "checkpoints").iterdir(), reverse=True)
    os.truncate(next(last.rglob("*.memmap")), 3)
    small(seed=3, resume=True)
    assert "trying the one before" in capsys.readouterr().out
    assert numbers(run.folder) == whole
    for path in (last, before):
        (path / "checksums.json").write_text("")
    with pytest.raises(RunError, match=r"no checkpoint in .* is sound"):
        small(seed=3, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 7, "resume": True}, r"was made with \{'seed': 3\}; use the same"),
        ({"seed": 3, "n_envs": 1, "resume": True}, r"was made with \{'n_envs': 2\}"),
        ({"seed": 3}, "holds a run; add --resume"),
    ],
)
def test_a_folder_belongs_to_one_run(options, message, small):
    run = small(seed=3)
    before = numbers(run.folder)
    with pytest.raises(RunError, match=message):
        small(**options)
    assert numbers(run.folder) == before
    shutil.rmtree(run.folder)
    with pytest.raises(RunError, match="holds no run"):
        small(resume=True)
    assert not run.folder.exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"total_env_steps": 120, "steps_per_checkpoint": 7},
        {"eval_episodes": 3, "video": True},
        {"logger": "tensorboard", "device": "cuda", "threads": 2},
    ],
)
def test_a_resumed_run_may_change_what_does_not_change_learning(changed, small):
    """Nothing of it changes what is learned."""
    options = small(seed=3).options
    RunFolder(replace(options, resume=True, **changed), ()).check(any_saved=True)


@pytest.mark.parametrize("name", ["settings.json", "curve.csv", "evaluation.csv", "video.gif"])
def test_files_of_something_else_are_not_written_over(name, small, tmp_path):
    """As in the current folder, which an empty `--output` means."""
    folder = small(seed=3).folder
    shutil.rmtree(folder)
    folder.mkdir()
    content = '{"seed": 3, "window": "maximized"}'
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=f"holds {name} of something else.*another --output"):
        small(seed=3)
    assert [path.name for path in folder.iterdir()] == [name]
    assert (folder / name).read_text() == content


def test_checkpoints_of_another_run_are_not_gone_on_from(small, tmp_path):
    run = small(seed=3)
    checkpoints = run.folder / "checkpoints"
    shutil.move(checkpoints, tmp_path / "others")
    shutil.rmtree(run.folder)
    small(seed=4)
    before = numbers(run.folder)
    shutil.rmtree(checkpoints)
    shutil.move(tmp_path / "others", checkpoints)
    for _ in range(2):  # the folder is free again after the error
        with pytest.raises(RunError, match=r"checkpoint-0\d+ was made with \{'seed': 3\}"):
            small(seed=4, resume=True)
    assert numbers(run.folder) == before
    (run.folder / "settings.json").unlink()
    with pytest.raises(RunError, match=r"settings.json is missing; restore it"):
        small(seed=4, resume=True)


@pytest.mark.parametrize("value", ["0.5", torch.tensor(0.5), None])
def test_a_curve_has_numbers_only(value, small):
    run = small(seed=3)
    with pytest.raises(TypeError, match=r"curve.csv: reward is .*, expected a number"):
        run.log({"reward": value})


def test_an_evaluation_is_not_taken_for_that_of_later_steps(small):
    run = small(seed=3)
    run.report(TensorDict({"episode_reward": torch.tensor([[1.0], [2.0]])}, [2]))
    run.report(TensorDict({"episode_reward": torch.tensor([[3.0]])}, [1]), how="asleep")
    small(seed=3, resume=True)
    found = {path.name for path in run.folder.glob("evaluation*")}
    assert found == {"evaluation.csv", "evaluation_asleep.csv"}
    for total in (120, 160):
        small(seed=3, resume=True, total_env_steps=total)
        found = {path.name: path.read_text().split() for path in run.folder.glob("evaluation*")}
        assert found == {
            "evaluation_at_80.csv": ["return", "1.0", "2.0"],
            "evaluation_asleep_at_80.csv": ["return", "3.0"],
        }


def test_a_curve_is_read_as_numbers(small):
    run = small(seed=3)
    run.curve.rows.clear()
    run.curve.rewrite()
    run.curve.add({"solved": True, "n": np.int64(3), "share": np.float32(0.5)})
    assert run.curve.path.read_text().splitlines() == ["solved,n,share", "1.0,3.0,0.5"]
    assert run.rows == [{"solved": 1.0, "n": 3.0, "share": 0.5}]


@pytest.mark.parametrize("total", [None, 0, 10.5])
def test_a_total_that_is_no_number_of_steps_is_named_before_anything_is_written(total, tmp_path):
    """As ``total_env_steps`` may be ``None``, which stands for the task's budget."""
    with pytest.raises((TypeError, ValueError), match="total must be"):
        Run(RunOptions(output=tmp_path / "run"), total)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_killed_in_its_first_checkpoint_a_run_begins_again(resume, small, capsys, tmp_path):
    expected = numbers(small(seed=3).folder)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StopError):
        small(stop_at(20), seed=3)
    half = tmp_path / "run" / "checkpoints" / ".checkpoint-000000000040.stage-1" / "checkpoint"
    half.mkdir(parents=True)
    (half / "manifest.json").write_text("{")
    small(seed=3, resume=resume)
    assert ("has no checkpoint yet" in capsys.readouterr().out) == resume
    assert numbers(tmp_path / "run") == expected
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def _hold(folder, taken, release):
    with Run(RunOptions(output=folder, n_envs=1), 10):
        taken.set()
        release.wait(60)


def test_two_processes_do_not_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    taken, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", taken, release))
    other.start()
    try:
        assert taken.wait(60)
        with pytest.raises(RunError, match="another process runs in"):
            Run(RunOptions(output=tmp_path / "run"), 10).__enter__()
    finally:
        other.kill()  # the lock ends with it
        other.join()
    with Run(RunOptions(output=tmp_path / "run"), 10):
        pass


def test_a_disk_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    """As network disks may answer."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"run cannot be locked: No locks available; choose a fold"):
        Run(RunOptions(output=tmp_path / "run"), 10).__enter__()


def test_a_file_that_is_not_completed_leaves_the_one_before(tmp_path):
    path = tmp_path / "video.gif"
    path.write_text("old")

    def write(text, stop):
        with staged(path) as stage:
            stage.write_text(text)
            assert path.read_text() == "old"
            stop()

    with pytest.raises(ZeroDivisionError):
        write("half", lambda: 1 / 0)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
    write("new", list)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]


def test_parts_are_loaded_when_they_are_given(tmp_path):
    options = {"output": tmp_path / "run", "steps_per_batch": 10}
    net = torch.nn.Linear(2, 2)
    with Run(RunOptions(**options), 10) as run:
        run.keep(net=net, nothing=None)
        list(run.collect(make_batched("InvertedPendulum-v5", 1, seed=0)))
    other = torch.nn.Linear(2, 2)
    with Run(RunOptions(**options, resume=True), 10) as run:
        run.keep(net=other)
        assert torch.equal(net.weight, other.weight)
        with pytest.raises(RunError, match=r"--resume: .*more"):
            run.keep(more=torch.nn.Linear(2, 2))
    with (
        pytest.raises(RunError, match=r"--resume: .*'net'[\s\S]*size mismatch"),
        Run(RunOptions(**options, resume=True), 10) as run,
    ):
        run.keep(net=torch.nn.Linear(3, 2))


def test_a_full_disk_ends_the_run_in_one_line(tmp_path):
    net = torch.nn.Module()
    net.register_buffer("many", torch.zeros(1).expand(10**15))
    options = RunOptions(output=tmp_path / "run", steps_per_batch=10)

    def go():
        with Run(options, 10) as run:
            run.keep(net=net)
            list(run.collect(make_batched("InvertedPendulum-v5", 1, seed=0)))

    with pytest.raises(RunError, match="no room for the checkpoint"):
        go()


def test_settings_are_saved_as_plain_json(small):
    run = small(seed=3)
    settings = json.loads((run.folder / "settings.json").read_text())
    assert settings["seed"] == 3
    assert Path(settings["output"]) == run.folder
    newest = max((run.folder / "checkpoints").iterdir())
    assert SafeCheckpoint.manifest(newest)["metadata"] == settings
