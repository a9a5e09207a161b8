"""Two processes train like one, and a process that dies is named."""

import os
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from shared.models.gpt import GPT, GPTConfig
from shared.runtime.errors import CourseError
from shared.training.checkpointing import list_checkpoints, load_checkpoint
from shared.training.distributed_utils import (
    GradientAverager,
    all_reduce_mean,
    broadcast_parameters,
    largest_difference,
    launch,
)
from shared.training.sharding import gather_model
from shared.training.trainer import TrainConfig, Trainer

pytestmark = pytest.mark.slow
VOCAB, B, T = 13, 8, 5


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.hidden = nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids, targets):
        logits = self.head(torch.tanh(self.hidden(self.embedding(ids))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def model_of(seed):
    torch.manual_seed(seed)
    return TinyLM()


def big_batch(step):
    ids = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def share(step):
    rank, size = dist.get_rank(), dist.get_world_size()
    return tuple(part.chunk(size)[rank] for part in big_batch(step))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def from_scratch_and_ddp():
    """The gradients of one batch by both ways; ranks start different, and are made equal first."""
    model = model_of(dist.get_rank())
    before = largest_difference(model.parameters())
    broadcast_parameters(model)
    after = largest_difference(model.parameters())

    averager = GradientAverager(model, bucket_mb=0.0005)
    model(*share(0))[1].backward()
    averager.finish()
    scratch = flat(p.grad for p in model.parameters())

    other = model_of(dist.get_rank())
    wrapped = nn.parallel.DistributedDataParallel(other, find_unused_parameters=True)
    wrapped(*share(0))[1].backward()
    library = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in other.parameters())
    return {
        "before": before,
        "after": after,
        "buckets": len(averager.buckets),
        "scratch": scratch,
        "ddp": library,
    }


def accumulating():
    model = model_of(0)
    averager = GradientAverager(model)
    with averager.paused():
        (model(*share(0))[1] / 2).backward()
    local = largest_difference([model.head.weight.grad])
    (model(*share(1))[1] / 2).backward()
    averager.finish()
    return {"local": local, "gradients": flat(p.grad for p in model.parameters())}


def training(directory=None, resume=False, accumulation=1):
    model = model_of(dist.get_rank())
    del model.unused
    settings = config(accumulation)
    history = Trainer(model, settings, share, directory=directory, progress=False).fit(resume=resume)
    return {
        "weights": flat(model.parameters()),
        "loss": history[-1]["loss"],
        "threads": torch.get_num_threads(),
    }


def config(accumulation):
    return TrainConfig(
        steps=5,
        batch_size=B,
        context_length=T,
        log_interval=1,
        learning_rate=0.01,
        accumulation=accumulation,
        checkpoint_interval=3,
    )


def gpt():
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    # Tied embeddings, blocks that become shards, and no biases: the gradient of the keys' bias is
    # rounding error, which AdamW would make an update of.
    return GPT(GPTConfig(VOCAB, T, 2, 2, 16, bias=False))


def gpt_settings(**changes):
    settings = {"steps": 6, "batch_size": B, "context_length": T, "log_interval": 1, "learning_rate": 1e-3}
    return TrainConfig(**settings | {"checkpoint_interval": 3, "clip": 0.5, "tracker": "none"} | changes)


def mean_loss(model):
    """Over two fixed batches, as `evaluate_lm` would have it."""
    with torch.inference_mode():
        return {"loss": sum(float(model(*big_batch(step))[1]) for step in (100, 101)) / 2}


def sharded(directory=None, resume=False, accumulation=1, **changes):
    """A training on shards; what comes back shows that they were shards, and what they were trained to."""
    model = gpt()
    before = largest_difference(model.parameters())
    settings = gpt_settings(accumulation=accumulation, parallel="fsdp2", **changes)
    trainer = Trainer(model, settings, share, evaluate=mean_loss, directory=directory, progress=False)
    parts = sum(p.to_local().numel() for p in model.parameters())
    history = trainer.fit(resume=resume)
    return {
        "before": before,
        "parts": parts,
        "weights": gather_model(model).state_dict(),
        "losses": [entry["loss"] for entry in history],
        "norms": [entry["grad_norm"] for entry in history],
        "val_loss": history[-1]["val_loss"],
    }


def one_process_gpt(**changes):
    model = gpt()
    trainer = Trainer(model, gpt_settings(**changes), big_batch, evaluate=mean_loss, progress=False)
    return model, trainer.fit()


def mean_of_ranks(start):
    return all_reduce_mean(start + dist.get_rank())


def dying(how):
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the dog ate my shard")
    dist.barrier()


def sleeping():
    time.sleep(600)


def one_process(accumulation=1):
    model = model_of(0)
    del model.unused
    history = Trainer(model, config(accumulation), big_batch, progress=False).fit()
    return flat(model.parameters()), history[-1]["loss"]


def test_our_averaged_gradients_equal_ddps_and_one_process_with_the_whole_batch():
    results = launch(from_scratch_and_ddp, 2)
    alone = model_of(0)
    alone(*big_batch(0))[1].backward()
    expected = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in alone.parameters())
    for result in results:
        assert result["before"] > 0.1  # otherwise the rest would prove nothing
        assert result["after"] == 0.0
        assert result["buckets"] > 2
        torch.testing.assert_close(result["scratch"], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(result["ddp"], expected, rtol=0, atol=1e-6)


def test_paused_averaging_accumulates_locally_and_sends_once():
    results = launch(accumulating, 2)
    alone = model_of(0)
    for step in (0, 1):
        (alone(*big_batch(step))[1] / 2).backward()
    del alone.unused
    expected = flat(p.grad for p in alone.parameters())
    for result in results:
        assert result["local"] > 1e-3
        unused = 3 * 3 + 3
        start = VOCAB * 16 + 16 * 16 + 16
        got = torch.cat((result["gradients"][:start], result["gradients"][start + unused :]))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_to_the_weights_of_one(accumulation):
    expected, loss = one_process(accumulation)
    for result in launch(training, 2, accumulation=accumulation):
        torch.testing.assert_close(result["weights"], expected, rtol=0, atol=1e-6)
        assert result["loss"] == pytest.approx(loss, abs=1e-6)


def test_two_processes_save_one_run_and_resume_it(tmp_path):
    launch(training, 2, directory=str(tmp_path))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000005"]
    shutil.rmtree(tmp_path / "step-00000005")  # as if it had been stopped after step 3
    expected, _ = one_process()
    for result in launch(training, 2, directory=str(tmp_path), resume=True):
        torch.testing.assert_close(result["weights"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"activation_checkpointing": True}])
def test_shards_are_trained_to_the_weights_of_one_process(options):
    model, history = one_process_gpt(**options)
    results = launch(sharded, 2, **options)
    assert sum(result["parts"] for result in results) == model.num_parameters()
    for result in results:
        assert result["before"] > 0.01  # the ranks started different
        assert 0.4 < result["parts"] / model.num_parameters() < 0.6
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=1e-6)
        assert result["losses"] == pytest.approx([entry["loss"] for entry in history], abs=1e-6)
        assert result["norms"] == pytest.approx([entry["grad_norm"] for entry in history], rel=1e-5)
        assert result["val_loss"] == pytest.approx(history[-1]["val_loss"], abs=1e-6)
    assert history[0]["grad_norm"] > 0.5  # the clipping had something to do


def test_a_checkpoint_of_shards_is_whole_and_goes_on_as_shards_or_as_copies(tmp_path):
    model, _ = one_process_gpt()
    launch(sharded, 2, directory=str(tmp_path))
    for step in (3, 6):
        saved = load_checkpoint(tmp_path / f"step-{step:08d}")
        assert {n: t.shape for n, t in saved.model.items()} == {
            n: t.shape for n, t in model.state_dict().items()
        }
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved.model[name], tensor, rtol=0, atol=1e-6)
    moments = saved.optimizer["state"][0]
    assert moments["exp_avg"].shape == next(model.parameters()).shape
    for parallel in ("fsdp2", "ddp"):
        folder = tmp_path / parallel
        shutil.copytree(tmp_path / "step-00000003", folder / "step-00000003")
        function = sharded if parallel == "fsdp2" else copies
        for result in launch(function, 2, directory=str(folder), resume=True):
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=1e-6)


def copies(directory, resume):
    model = gpt()
    Trainer(model, gpt_settings(), share, evaluate=mean_loss, directory=directory, progress=False).fit(
        resume=resume
    )
    return {"weights": model.state_dict()}


def stopping_early(directory):
    """All ranks stop, and save the best, after the same evaluation, though one alone evaluates."""
    model = gpt()
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    settings = gpt_settings(eval_interval=1, patience=2, save_best=True, checkpoint_interval=0)
    trainer = Trainer(
        model,
        settings,
        share,
        evaluate=lambda model: {"loss": next(losses)},
        directory=directory,
        progress=False,
    )
    trainer.fit()
    return trainer.step


def test_all_processes_stop_early_together(tmp_path):
    assert launch(stopping_early, 2, directory=str(tmp_path), timeout=60) == [4, 4]
    assert [found.step for found in list_checkpoints(tmp_path)] == [2, 4]
    assert (tmp_path / "best").read_text() == "step-00000002\n"


@pytest.mark.parametrize(("optimizer", "dtype"), [("muon", "float32"), ("adamw", "float16")])
def test_what_shards_cannot_do_is_refused(optimizer, dtype):
    with pytest.raises(CourseError, match=f"parallel is 'fsdp2' with {optimizer} in {dtype}"):
        gpt_settings(parallel="fsdp2", optimizer=optimizer, dtype=dtype)


def test_processes_share_the_cores_and_return_tensors_by_rank():
    assert [result.tolist() for result in launch(mean_of_ranks, 3, start=torch.tensor([1.0]))] == [[2.0]] * 3


@pytest.mark.parametrize(
    ("how", "said"), [("killed", "killed by SIGKILL"), ("raises", "the dog ate my shard")]
)
def test_a_dead_rank_is_named_and_the_others_are_ended(how, said):
    began = time.monotonic()
    with pytest.raises(CourseError, match=f"Rank 1 of 2.*{said}.*the others were ended"):
        launch(dying, 2, how=how)
    assert time.monotonic() - began < 120  # far below gloo's own ten minutes: nobody hung


def test_processes_that_do_not_finish_are_ended():
    with pytest.raises(CourseError, match="did not finish within"):
        launch(sleeping, 2, timeout=8)


def test_a_function_without_a_file_is_refused_with_the_way_out():
    function = eval("lambda: 1")
    with pytest.raises(CourseError, match="%%writefile"):
        launch(function, 2)
