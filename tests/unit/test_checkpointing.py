"""Checkpoints come back exactly, or not at all and with a sentence."""

import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shared.runtime.errors import CourseError
from shared.runtime.files import repository_root
from shared.training import checkpointing
from shared.training.checkpointing import (
    generator_states,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    lock,
    marked_checkpoint,
    pack,
    prune,
    restore,
    restore_generators,
    save_checkpoint,
    unpack,
    verify,
)

CONFIG = {"learning_rate": 0.1, "betas": (0.9, 0.95), "steps": 3}


def tied(seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def trained(seed=0):
    model = tied(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained()
    path = save_checkpoint(
        tmp_path, 3, model, optimizer, CONFIG, extra={"history": [{"step": 3, "loss": 0.1}]}
    )
    return path, model, optimizer


def test_everything_comes_back(saved):
    path, model, optimizer = saved
    expected = torch.rand(3), np.random.rand(3), random.random()
    other, other_optimizer = trained(seed=9)
    checkpoint = load_checkpoint(path.parent)
    restore(checkpoint, other, other_optimizer, CONFIG)
    assert checkpoint.step == 3
    assert checkpoint.extra == {"history": [{"step": 3, "loss": 0.1}]}
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # the optimiser's state counts from here on
        o.zero_grad()
        m["b"](m["a"](torch.ones(1, 2))).sum().backward()
        o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert other["a"].weight is other["b"].weight


def test_nothing_in_it_is_pickled(saved):
    names = {p.name for p in saved[0].iterdir()}
    assert names == {"model.safetensors", "state.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "state.safetensors"])
def test_a_file_cut_at_any_byte_is_refused(saved, name):
    path, _, _ = saved
    content = (path / name).read_bytes()
    for length in range(len(content)):
        (path / name).write_bytes(content[:length])
        with pytest.raises(CourseError, match="is damaged"):
            load_checkpoint(path)
    (path / name).write_bytes(content)
    assert load_checkpoint(path).step == 3


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        save_checkpoint(folder, 1, *trained(), CONFIG)
    path = latest_checkpoint(folder)
    name = data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    content = (path / name).read_bytes()
    index, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    altered = bytearray(content)
    altered[index] ^= 1 << bit
    (path / name).write_bytes(altered)
    try:
        with pytest.raises(CourseError, match="is damaged"):
            load_checkpoint(path)
    finally:
        (path / name).write_bytes(content)


def test_a_missing_file_is_named_with_the_checkpoint_to_go_back_to(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *trained(), CONFIG)
    (tmp_path / "step-00000002" / "model.safetensors").unlink()
    with pytest.raises(
        CourseError, match=r"model.safetensors is missing\); before it there is step-00000001"
    ):
        load_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "step-00000002")
    assert load_checkpoint(tmp_path).step == 1


def test_another_configuration_is_refused_and_nothing_is_changed(saved):
    model, optimizer = trained(seed=9)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CourseError, match=r"learning_rate = 0.1 and this run has 0.2"):
        restore(load_checkpoint(saved[0]), model, optimizer, {**CONFIG, "learning_rate": 0.2})
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_model_of_another_shape_is_refused(saved):
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2, bias=False)})
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CourseError, match=r"a.weight of shape \(2, 2\) and this model has \(2, 3\)"):
        restore(load_checkpoint(saved[0]), model, optimizer, CONFIG)


def test_a_checkpoint_of_a_later_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr(checkpointing, "FORMAT", 2)
    with pytest.raises(CourseError, match="format 1"):
        load_checkpoint(saved[0])


def test_a_checkpoint_edited_by_hand_with_a_right_manifest_makes_no_sense(saved):
    path, _, _ = saved
    state = json.loads((path / "state.json").read_text())
    del state["optimizer"]
    (path / "state.json").write_text(json.dumps(state))
    listing = {p.name: checkpointing._fingerprint(p) for p in path.iterdir() if p.name != "manifest.json"}
    manifest = {"files": listing, "sha256": checkpointing.files.sha256_json(listing)}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CourseError, match="makes no sense"):
        load_checkpoint(path)


def test_a_run_may_have_any_name(tmp_path):
    save_checkpoint(tmp_path / "step-by-step", 4, *trained(), CONFIG)
    assert load_checkpoint(tmp_path / "step-by-step").step == 4


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, *trained(), CONFIG, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, *trained(seed=1), CONFIG)
    save_checkpoint(tmp_path, 1, *trained(seed=2), CONFIG)
    expected = trained(seed=2)[0]["a"].weight
    assert torch.equal(load_checkpoint(tmp_path).model["a.weight"], expected)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_packing_and_unpacking_give_the_value_back(value):
    assert unpack(json.loads(json.dumps(pack(value, {}))), {}) == value


def test_generators_go_back_to_where_they_were():
    random.gauss(0, 1)  # leaves half of its work for the next call, which is state too
    states = generator_states()
    first = random.gauss(0, 1), np.random.randn(), torch.randn(2)
    restore_generators(states)
    second = random.gauss(0, 1), np.random.randn(), torch.randn(2)
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])


# ---------------------------------------------------------------- lists, markers, pruning, the lock


def save(directory, step, **options):
    options = {"keep": 99} | options
    return save_checkpoint(directory, step, *trained(step), CONFIG, **options)


def test_a_list_says_what_is_whole_and_how_large(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000003" / "state.json").unlink()
    found = list_checkpoints(tmp_path)
    assert [(one.step, one.name, one.complete) for one in found] == [
        (1, "step-00000001", True),
        (2, "step-00000002", False),
        (3, "step-00000003", False),
    ]
    assert found[0].problem is None
    assert "model.safetensors has 0 of" in found[1].problem
    assert "state.json is missing" in found[2].problem
    assert found[0].bytes == sum(path.stat().st_size for path in found[0].path.iterdir())
    assert list_checkpoints(tmp_path / "none") == []


def test_verify_reads_every_byte(saved):
    path, _, _ = saved
    verify(path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    assert list_checkpoints(path.parent)[0].complete  # the sizes are right
    with pytest.raises(CourseError, match="is damaged .model.safetensors was altered"):
        verify(path)


def test_the_newest_whole_checkpoint_is_loaded_and_the_damaged_ones_are_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert load_newest(tmp_path)[1] == []
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    checkpoint, problems = load_newest(tmp_path)
    assert checkpoint.step == 1
    assert len(problems) == 2
    assert "step-00000003 is damaged (manifest.json is missing)" in problems[0]
    assert "step-00000002 is damaged (model.safetensors has 0 of" in problems[1]
    with pytest.raises(CourseError, match="No checkpoint in"):
        load_newest(tmp_path / "none")


def test_markers_name_the_latest_and_the_best(tmp_path):
    save(tmp_path, 1, best=True)
    save(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert load_checkpoint(tmp_path / "best").step == 1
    assert marked_checkpoint(tmp_path) == tmp_path / "step-00000001"
    shutil.rmtree(tmp_path / "step-00000001")
    assert marked_checkpoint(tmp_path) is None
    with pytest.raises(CourseError, match="best names no checkpoint"):
        load_checkpoint(tmp_path / "best")
    (tmp_path / "best").write_text("../../somewhere\n")
    assert marked_checkpoint(tmp_path) is None
    (tmp_path / "best").unlink()
    assert marked_checkpoint(tmp_path) is None


def test_pruning_leaves_the_last_the_best_the_multiples_and_what_is_damaged(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step, best=step == 2)
    (tmp_path / "step-00000009" / "model.safetensors").write_bytes(b"")
    gone = prune(tmp_path, keep_last=2, keep_every=4)
    assert [one.step for one in list_checkpoints(tmp_path)] == [2, 4, 8, 9, 10]
    assert [path.name for path in gone] == [f"step-{step:08d}" for step in (1, 3, 5, 6, 7)]
    assert not list(tmp_path.glob(".*.tmp"))
    assert prune(tmp_path, keep_last=2, keep_every=4) == []
    assert [path.name for path in prune(tmp_path, keep_last=1)] == ["step-00000004", "step-00000008"]


def test_a_full_disk_is_explained_in_numbers(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpointing.safetensors.torch, "save_file", full)
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    model = nn.Linear(1000, 1000)  # 4 MB
    with pytest.raises(
        CourseError,
        match=r"step 2 was not saved \(the disk is full: it needs 4.0 MB and 1.0 MB are free, so 3.0 MB are "
        r"missing\); the previous one, .*step-00000001, is intact",
    ):
        save_checkpoint(tmp_path, 2, model, torch.optim.AdamW(model.parameters()), CONFIG)
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


HOLDER = """
import sys, time
from shared.training.checkpointing import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_other_processes_out_until_their_end_however_it_comes(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(command, cwd=repository_root(), stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(CourseError, match="Another process is training in .*run; wait for its end"),
            lock(tmp_path / "run"),
        ):
            pass
    finally:
        holder.kill()  # SIGKILL: it releases nothing itself
        holder.wait()
        holder.stdout.close()
    with lock(tmp_path / "run"), lock(tmp_path / "run"):  # the same process may take it twice
        pass


def test_a_folder_that_cannot_be_locked_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="Cannot write"), lock(tmp_path / "file" / "run"):
        pass
