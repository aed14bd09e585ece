"""Checkpoints on a real disk: whatever happens to a file is noticed before anything is read."""

from __future__ import annotations

import copy as copying
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from buffer_parts import make_buffer, steps
from tensordict import NonTensorData, TensorDict
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointOptions, GlobalRNGState

from layeredrl_torchrl import SafeCheckpoint, SafeRotation
from layeredrl_torchrl._state import refuse_other_shapes


def make_parts(filled=True):
    """A network that has learned, its optimizer and a buffer."""
    net = torch.nn.Linear(3, 2)
    optim = torch.optim.Adam(net.parameters())
    buffer = make_buffer()
    if filled:
        net(torch.randn(4, 3)).sum().backward()
        optim.step()
        buffer.extend(steps(25))
    return {"net": net, "optim": optim, "buffer": buffer}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    return SafeCheckpoint(**make_parts(), counts={"steps": 3}).save(path, metadata={"seed": 1})


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def restored(path):
    parts = make_parts(filled=False) | {"counts": {}}
    SafeCheckpoint(**parts).load(path)
    return parts


def test_what_is_loaded_is_what_was_saved(saved):
    torch.manual_seed(0)
    parts, found = make_parts(), restored(saved)
    assert found["counts"] == {"steps": 3}
    assert Checkpoint.manifest(saved)["metadata"] == {"seed": 1}
    for a, b in zip(parts["net"].parameters(), found["net"].parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [p["optim"].state_dict()["state"][0] for p in (parts, found)]
    assert all(torch.equal(value, moments[1][name]) for name, value in moments[0].items())
    assert (parts["buffer"][:] == found["buffer"][:]).all()
    assert not list(saved.parent.glob(".*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "removed": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_is_read(damage, saved, copy):
    """Every file of the checkpoint in turn, the checksums included; the message names it."""
    files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
    assert len(files) > 15
    for name in files:
        DAMAGES[damage](copy / name)
        parts = make_parts(filled=False)
        before = parts["net"].weight.clone()
        with pytest.raises(CheckpointError, match=name.name):
            SafeCheckpoint(**parts).load(copy)
        assert torch.equal(parts["net"].weight, before)
        assert not len(parts["buffer"])
        shutil.copy(saved / name, copy / name)
    restored(copy)


def test_what_a_file_manager_leaves_is_not_damage(copy):
    """In a folder that was looked at on macOS or Windows."""
    for name in (".DS_Store", "components/Thumbs.db", "components/0000-buffer/desktop.ini"):
        (copy / name).write_bytes(b"icons")
    assert restored(copy)["counts"] == {"steps": 3}


def test_a_file_too_many_is_not_read(copy):
    (copy / "components" / "0000-buffer" / "next" / "more.memmap").parent.mkdir(parents=True)
    (copy / "components" / "0000-buffer" / "next" / "more.memmap").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match=r"more.memmap is not part of the checkpoint"):
        restored(copy)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forge(path: Path, change) -> Path:
    """A checkpoint by somebody who also writes right checksums."""
    change(path)
    from layeredrl_torchrl.checkpoints import safe

    safe._write_checksums(path)
    return path


@pytest.mark.parametrize("name", ["buffer/prefetch.pkl", "buffer/transform.t", "net/state.pt"])
def test_nothing_is_unpickled(name, copy, tmp_path):
    part, file = name.split("/")
    (folder,) = copy.glob(f"components/*-{part}")
    trap = tmp_path / "was-run"
    forge(copy, lambda _: (folder / file).write_bytes(pickle.dumps(Evil(trap))))
    with pytest.raises(CheckpointError, match=f"{file} is not loaded.*without running code"):
        restored(copy)
    assert not trap.exists()


def test_no_object_hides_in_a_tensordict(copy, tmp_path):
    (state,) = copy.glob("components/*-net/state")
    trap = tmp_path / "was-run"

    def hide(_):
        data = TensorDict.load_memmap(state).clone()
        shutil.rmtree(state)
        data.set("extra", NonTensorData(Evil(trap))).save(state)

    forge(copy, hide)
    with pytest.raises(CheckpointError, match=r"other.pickle is not loaded"):
        restored(copy)
    assert not trap.exists()


def test_other_classes_and_links_are_refused(copy, tmp_path):
    (meta,) = copy.glob("components/*-net/state/meta.json")
    good = meta.read_text()
    forge(copy, lambda _: meta.write_text(good.replace("_td.TensorDict", "persistent.Other")))
    with pytest.raises(CheckpointError, match="expected a TensorDict"):
        restored(copy)
    outside = tmp_path / "meta.json"
    outside.write_text(good)
    meta.unlink()
    forge(copy, lambda _: meta.symlink_to(outside))
    with pytest.raises(CheckpointError, match="is not loaded"):
        restored(copy)


def test_checkpoints_of_others_are_refused(tmp_path):
    path = Checkpoint(net=torch.nn.Linear(3, 2)).save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"checksums.json is missing"):
        SafeCheckpoint(net=torch.nn.Linear(3, 2)).load(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        SafeCheckpoint(net=torch.nn.Linear(3, 2)).load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="format must be 'directory'"):
        SafeCheckpoint(format="archive")
    with pytest.raises(ValueError, match="format must be 'directory'"):
        SafeCheckpoint(a=1).save(tmp_path / "a", format="archive")


def test_options_of_single_components_are_passed_on(tmp_path):
    class Noting:
        def state_dict(self, *, noted=0):
            return {"noted": noted}

        def load_state_dict(self, state, *, factor=1):
            self.found = factor * state["noted"]

    part = Noting()
    own = CheckpointOptions(save_kwargs={"noted": 7}, load_kwargs={"factor": 2})
    path = SafeCheckpoint(part=part).save(tmp_path / "a", component_options={"part": own})
    SafeCheckpoint(part=part).load(path, component_options={"part": own})
    assert part.found == 14


def test_a_file_in_its_place_is_replaced_and_leaves_nothing(tmp_path):
    (tmp_path / "checkpoint").write_text("something else")
    SafeCheckpoint.verify(SafeCheckpoint(a=1).save(tmp_path / "checkpoint"))
    assert os.listdir(tmp_path) == ["checkpoint"]


PLAIN = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(1, dtype=torch.bfloat16),
    "array": np.arange(3, dtype=np.int8),
    "number": np.float32(0.1),
    "pair": (1, ("a", [2.5])),
    "keys": {1: "number", "1": "text", None: 0},
    "nothing": None,
    "nan": float("nan"),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_plain_values_come_back_as_they_were(name, kind, tmp_path):
    value = {"some": PLAIN[name]} if kind is dict else kind([PLAIN[name]])
    path = SafeCheckpoint(value=value).save(tmp_path / "checkpoint")
    held = {"stale": 1} if kind is dict else kind([1, 2, 3])
    found = SafeCheckpoint(value=held).load(path).values["value"]
    assert found is held or kind is tuple
    assert repr(found) == repr(value)


def test_a_disk_without_room_is_noticed_before(tmp_path):
    """More numbers than any disk holds, which take no memory; what was saved before stays."""
    net = torch.nn.Module()
    net.register_buffer("few", torch.ones(3))
    path = SafeCheckpoint(net=net).save(tmp_path / "checkpoint")
    net.register_buffer("many", torch.zeros(1).expand(10**15))
    with pytest.raises(CheckpointError, match=r"no room for the checkpoint .* 4000000\d+.\d MB"):
        SafeCheckpoint(net=net).save(path)
    SafeCheckpoint.verify(path)
    assert os.listdir(tmp_path) == ["checkpoint"]
    # Of what is not saved nothing has to fit.
    some = SafeCheckpoint(net=net, count={"n": 1}).save(tmp_path / "some", components=["count"])
    assert list(SafeCheckpoint.manifest(some)["components"]) == ["count"]


def other_net():
    return torch.nn.Linear(4, 2)


DO_NOT_FIT = {
    "a network": lambda: {"net": other_net()},
    "the last network": lambda: {"z_net": other_net()},
    "an optimizer": lambda: {"optim": torch.optim.Adam(other_net().parameters(), lr=0.1)},
    "a small buffer": lambda: {"z_buffer": make_buffer(10)},
    "a full small buffer": lambda: {"z_buffer": filled(make_buffer(10), 10)},
    "another kind": lambda: {"z_net": {"n": 1}},
}


def filled(buffer, n):
    buffer.extend(steps(n))
    return buffer


@pytest.mark.parametrize("held", [0, 7])
@pytest.mark.parametrize("name", DO_NOT_FIT)
def test_what_does_not_fit_leaves_all_components_as_they_were(name, held, tmp_path):
    """Empty and filled buffers, networks, moments, values and random numbers."""
    full = make_parts()
    more = {"z_net": torch.nn.Linear(3, 2), "z_buffer": filled(make_buffer(), 30)}
    saved = full | more | {"counts": {"n": 3}, "list": [1, 2], "rng": GlobalRNGState()}
    path = SafeCheckpoint(**saved).save(tmp_path / "checkpoint")
    parts = make_parts(filled=False) | {"z_net": torch.nn.Linear(3, 2), "z_buffer": make_buffer()}
    (unfit,) = (changed := DO_NOT_FIT[name]())
    parts |= {"counts": {"n": 0}, "list": [0], "rng": GlobalRNGState()} | changed
    refuse_other_shapes(parts["optim"])
    if held:
        filled(parts["buffer"], held)

    def state():
        rows = {
            key: (len(part), part[:].to_dict() if len(part) else None, part.writer.state_dict())
            for key, part in parts.items()
            if key.endswith("buffer")
        }
        others = {
            key: part.state_dict() if hasattr(part, "state_dict") else part
            for key, part in parts.items()
            if not key.endswith("buffer")
        }
        # As lists, which are equal where every number is.
        return torch.utils._pytree.tree_map(
            lambda x: x.tolist() if hasattr(x, "tolist") else x, (rows, others)
        )

    before = copying.deepcopy(state())
    with pytest.raises(CheckpointError, match=rf"'{unfit}'"):
        SafeCheckpoint(**parts).load(path)
    assert state() == before
    parts["buffer"].extend(steps(2))
    assert len(parts["buffer"]) == held + 2


# -- rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["components/0000-count/value.json", "manifest.json"])
def test_the_last_sound_checkpoint_is_loaded(file, tmp_path):
    rotation = SafeRotation(tmp_path, keep_last=3)
    assert rotation.latest() is None
    for step in (9, 10, 11):
        rotation.save(SafeCheckpoint(count={"n": step}), step=step)
    flip(tmp_path / "checkpoint-000000000011" / file)
    flip(tmp_path / "checkpoint-000000000010" / "checksums.json")
    count: dict[str, int] = {}
    with pytest.warns(UserWarning, match="trying the one before") as said:
        rotation.load_latest(SafeCheckpoint(count=count))
    assert count == {"n": 9}
    assert [Path(file).name in str(said[0].message), "checksums" in str(said[1].message)] == [
        True
    ] * 2
    flip(tmp_path / "checkpoint-000000000009" / file)
    with (
        pytest.warns(UserWarning, match="trying"),
        pytest.raises(CheckpointError, match=r"is sound: .*checkpoint-0+11/"),  # the newest
    ):
        rotation.latest()


@pytest.mark.parametrize("prefix", ["checkpoint", "lr=[1e-3]*"])
def test_halves_are_cleared_and_never_loaded(prefix, tmp_path):
    """Whatever the characters of their names mean in a pattern."""
    rotation = SafeRotation(tmp_path, keep_last=1, prefix=prefix)
    path = rotation.save(SafeCheckpoint(count={"n": 1}), step=1)
    for name in (f".{prefix}-000000000002.stage-0", f".{prefix}-000000000000.delete-0"):
        shutil.copytree(path, tmp_path / name)
    assert rotation.latest() == path
    rotation.save(SafeCheckpoint(count={"n": 2}), step=2)
    assert os.listdir(tmp_path) == [f"{prefix}-000000000002"]
    with pytest.raises(TypeError, match="expected a SafeCheckpoint"):
        rotation.save(Checkpoint(a=1), step=3)
