"""Plans are checked against what a run really takes: saved tensors and allocator peaks of small models."""

import dataclasses
import json
import re

import pytest
import torch

from shared import cli
from shared.evaluation.memory import peak_bytes
from shared.models.gpt import GPT, PRESETS, GPTConfig
from shared.runtime.errors import CourseError
from shared.runtime.files import repository_root
from shared.training import planning
from shared.training.config import DataConfig, Run, TrainConfig, load_run
from shared.training.planning import MACHINES, Layout, Machine
from shared.training.trainer import Trainer

CONFIGS = repository_root() / "configs" / "training"
LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu", "bias": False, "d_ff": 192}
MODELS = {
    "GPT-2": {"attention": "sdpa"},
    "GPT-2, plain attention": {"attention": "plain"},
    "GPT-2, auto": {},
    "GPT-2 with dropout": {"attention": "plain", "dropout": 0.1},
    "Llama": LLAMA | {"attention": "sdpa"},
    "grouped-query with QK-norm": LLAMA | {"qk_norm": True, "num_kv_heads": 2, "tie_embeddings": False},
    "bare RMSNorm, ReLU²": {
        "norm": "rmsnorm",
        "norm_affine": False,
        "position": "rope",
        "activation": "relu2",
        "qk_norm": True,
        "attention": "sdpa",
    },
    "QK-norm without RoPE": {"norm": "rmsnorm", "qk_norm": True, "attention": "sdpa"},
    "ReLU with a window": {"activation": "relu", "window": 64, "attention": "sdpa"},
}
DTYPES = [torch.float32, torch.bfloat16]


def a_config(layers=2, vocab_size=512, width=64, **choices):
    return GPTConfig(vocab_size, 256, num_layers=layers, num_heads=4, d_model=width, **choices)


def saved_bytes(config, ids, dtype):
    """Bytes of all that autograd keeps, parameters aside."""
    torch.manual_seed(0)
    model = GPT(config)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    low = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with low, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(ids, ids)
    del result
    return sum(storages.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("choices", MODELS.values(), ids=MODELS)
def test_a_block_keeps_what_the_formula_says(choices, dtype):
    """Within 1.5 %: statistics of norms and the like, a few numbers a token, are left out of the formula."""
    ids = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0))
    one, two = (saved_bytes(a_config(layers, **choices), ids, dtype) for layers in (1, 2))
    config = a_config(**choices)
    block = GPT(config).blocks[0]
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    copies = weights * dtype.itemsize if dtype != torch.float32 else 0
    planned = planning.block_activations(config, 2, 256, dtype, "cpu")
    assert planned == pytest.approx(two - one - copies, rel=0.015)


def test_the_formula_is_that_of_korthikanti_et_al_where_both_apply():
    """34·C a token with 16-bit numbers and dropout, and 4·C more for the two norms' inputs in float32.

    Their eq. 1 adds 5·H·T/C for attention's own weights, which a fused kernel does not keep; it keeps sums of
    exponentials, 4·H.
    """
    config = a_config(width=512, dropout=0.1)
    planned = planning.block_activations(config, 1, 256, torch.bfloat16, "cuda")
    assert planned == 256 * ((34 + 4) * 512 + 4 * 4)


F32, BF16 = "float32", "bfloat16"
PEAKS = {  # model, training, tolerance
    "GPT-2": ({"attention": "sdpa"}, {"dtype": F32}, 0.04),
    "a large vocabulary": ({"vocab_size": 8192}, {"dtype": BF16}, 0.04),
    "accumulation": ({"attention": "sdpa"}, {"dtype": BF16, "accumulation": 2}, 0.04),
    "Llama, Muon": (MODELS["grouped-query with QK-norm"], {"dtype": F32, "optimizer": "muon"}, 0.04),
    "Muon's update": (
        LLAMA,
        {"dtype": BF16, "optimizer": "muon", "batch_size": 1, "context_length": 32},
        0.08,
    ),
    "checkpointing": ({"layers": 3}, {"dtype": F32, "activation_checkpointing": True}, 0.04),
    "checkpointing, bf16": ({"layers": 3}, {"dtype": BF16, "activation_checkpointing": True}, 0.08),
}


def measured_peak(config, training):
    """Of an update, with all that was there before it: weights, optimiser states."""
    torch.manual_seed(0)
    model = GPT(config)
    ids = torch.randint(config.vocab_size, (training.batch_size, training.context_length))
    trainer = Trainer(model, training, lambda _: (ids, ids), progress=False)
    trainer.train_step()
    optimizers = getattr(trainer.optimizer, "optimizers", (trainer.optimizer,))
    states = [s for optimizer in optimizers for state in optimizer.state.values() for s in state.values()]
    before = sum(t.nbytes for t in [*model.parameters(), *states] if isinstance(t, torch.Tensor))
    return before + peak_bytes(trainer.train_step), before


@pytest.mark.parametrize(("choices", "settings", "tolerance"), PEAKS.values(), ids=PEAKS)
def test_the_planned_peak_is_the_measured_one(choices, settings, tolerance):
    """Within 4 % of what an update adds to weights and optimiser states, which are planned to the byte.

    Where blocks run again, or Muon's own intermediate results decide, within 8 %: the latter
    depend on the order of the shapes.
    """
    config = a_config(width=128, **choices)
    training = TrainConfig(steps=9, **{"batch_size": 4, "context_length": 128, **settings})
    layout = Layout(checkpointing=training.activation_checkpointing)
    planned = planning.memory(config, training, layout, kind="cpu")
    peak, before = measured_peak(config, training)
    steady = planned.parts["weights"] + planned.parts["optimizer"]
    assert steady == pytest.approx(before, abs=1000)  # AdamW counts its updates, once a parameter
    assert planned.peak - steady == pytest.approx(peak - before, rel=tolerance)


SPREAD = {"vocab_size": 512, "width": 256, "layers": 6, "attention": "sdpa"}


def spread(parallel):
    return TrainConfig(
        steps=9, batch_size=2, context_length=128, dtype=BF16, accumulation=2, parallel=parallel
    )


def peak_of_a_process(parallel):
    """Of the third update, beyond what the process holds between updates."""
    torch.manual_seed(0)
    ids = torch.randint(512, (2, 128))
    trainer = Trainer(GPT(a_config(**SPREAD)), spread(parallel), lambda _: (ids, ids), progress=False)
    trainer.train_step()
    trainer.train_step()
    return peak_bytes(trainer.train_step)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "tolerance"), [("ddp", 0.04), ("fsdp2", 0.08)])
def test_the_planned_peak_of_one_of_two_processes_is_the_measured_one(parallel, tolerance):
    """Of shards within 8 %: what is sent and received meanwhile depends on which process is ahead."""
    from shared.training.distributed_utils import launch

    measured = min(launch(peak_of_a_process, 2, parallel=parallel))
    layout = Layout(2, sharded=parallel == "fsdp2")
    planned = planning.memory(a_config(**SPREAD), spread(parallel), layout, kind="cpu")
    held = planned.parts["weights"] + planned.parts["optimizer"]
    if parallel == "ddp":
        held += planned.parts["weights"]  # its buckets
    assert planned.peak - held == pytest.approx(measured, rel=tolerance)


def test_presets_have_the_published_numbers_of_parameters_and_cost_no_memory():
    published = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    for name, parameters in published.items():
        model = planning.build(PRESETS[name])
        assert planning.sizes(model).total == parameters
        assert all(p.is_meta for p in model.parameters())


def a_run(machine="h100", devices=1, tokenizer="bpe", vocab_size=50_257, mfu=0.5, preset="gpt2", **training):
    settings = {"steps": 10, "batch_size": 4, "context_length": 1024, "dtype": "bfloat16", **training}
    data = DataConfig(tokenizer=tokenizer, vocab_size=vocab_size)
    run = Run(data, {"preset": preset}, TrainConfig(**settings), CONFIGS / "x.yaml")
    on = machine if isinstance(machine, Machine) else MACHINES[machine]
    return planning.plan(run, on, devices, mfu=mfu)


def test_flops_are_those_of_the_model_for_every_token_and_time_follows_from_the_peak():
    plan = a_run(devices=2, accumulation=3)
    assert plan.tokens == 10 * 3 * 4 * 1024 * 2
    with torch.device("meta"):
        per_token = GPT(PRESETS["gpt2"]).flops_per_token(1024)
    assert plan.flops == per_token * plan.tokens
    assert plan.seconds == pytest.approx(plan.flops / (2 * 0.5 * 989e12))
    again = plan.with_changes(checkpointing=True)
    head = 6 * 50_257 * 768 * plan.tokens
    assert again.seconds == pytest.approx(plan.seconds * (1 + (1 - head / plan.flops) / 3))


def test_stages_add_up_and_the_most_demanding_one_decides_the_memory():
    stages = (
        {"start": 0, "batch_size": 8, "context_length": 256},
        {"start": 5, "batch_size": 4, "context_length": 1024},
    )
    from shared.training.config import Stage

    staged = a_run(stages=tuple(Stage(**stage) for stage in stages))
    assert staged.tokens == 5 * 8 * 256 + 5 * 4 * 1024
    assert staged.memory.peak == a_run().memory.peak


def test_sharding_divides_what_each_gpu_holds_and_not_its_activations():
    config, training = PRESETS["gpt2-large"], TrainConfig(steps=1, dtype="bfloat16", context_length=1024)
    one = planning.memory(config, training, Layout(1)).parts
    copied = planning.memory(config, training, Layout(4)).parts
    shared = planning.memory(config, training, Layout(4, sharded=True)).parts
    assert one["weights"] == copied["weights"] == 4 * 774_030_080
    assert copied["gradients"] == 2 * one["gradients"]  # DDP's buckets
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] == one[part] // 4
    assert shared["activations"] == one["activations"]
    assert shared["copies"] > one["copies"]  # blocks are put together


def test_shards_add_up_micro_batches_in_whole_gradients():
    config = PRESETS["gpt2"]
    training = TrainConfig(steps=1, dtype="bfloat16", accumulation=2)
    parts = planning.memory(config, training, Layout(8, sharded=True)).parts
    assert parts["gradients"] == 4 * 124_439_808


def test_a_run_that_fits_is_not_refused():
    plan = a_run()
    assert plan.fits()
    assert plan.problem() is None
    plan.check()


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"batch_size": 64, "machine": "rtx4090"},
            r"with training.batch_size=16 and training.accumulation=4\.$",
        ),
        (
            {"preset": "gpt2-large", "machine": "a100-40", "batch_size": 16, "devices": 4},
            r"training.batch_size=8 and training.accumulation=2\.$",
        ),
        (
            {"preset": "gpt2-xl", "machine": "rtx3080", "batch_size": 1},
            r"with 4 GPUs, training.activation_checkpointing=true and training.parallel=fsdp2\.$",
        ),
        (
            {"preset": "gpt2-xl", "machine": "rtx3080", "batch_size": 1, "optimizer": "muon"},
            r"at its smallest it takes [\d.]+ GB; train a smaller model\.$",  # Muon's are not sharded
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_what_would_help(changes, advice):
    plan = a_run(**changes)
    with pytest.raises(CourseError, match=r"The run needs [\d.]+ GB .* for it \(.*\); ") as refusal:
        plan.check()
    assert re.search(advice, str(refusal.value))


def test_the_advice_is_followed_by_a_run_that_fits():
    plan = a_run(machine="rtx3080", preset="gpt2-xl", batch_size=1)
    helped = plan.with_changes(devices=4, sharded=True, checkpointing=True)
    assert helped.fits()
    assert not plan.with_changes(devices=2, sharded=True, checkpointing=True).fits()


def test_each_machine_has_the_memory_that_it_is_sold_with():
    sold = {"h200": 141, "h100": 80, "a100": 80, "a100-40": 40, "rtx4090": 24, "rtx3080": 10}
    assert {name: machine.memory / 1e9 for name, machine in MACHINES.items()} == sold
    server = planning.machine("cpu:24:128")
    assert (server.kind, server.memory) == ("cpu", 128e9)
    assert server.usable < server.memory
    assert planning.machine("cpu").kind == "cpu"
    with pytest.raises(CourseError, match="no GPU 'h1000'"):
        planning.machine("h1000")


def test_processes_on_one_cpu_share_its_memory_and_cores():
    server = planning.machine("cpu:24:128")
    alone, one_of_two = a_run(machine=server), a_run(machine=server, devices=2)
    assert one_of_two.machine.memory == 64e9
    assert one_of_two.seconds == pytest.approx(2 * alone.seconds)  # twice the tokens on the same cores


def test_a_gpu_of_this_computer_is_known_by_its_name(monkeypatch):
    from shared.runtime import hardware

    here = dataclasses.replace(hardware.detect(), gpus=(hardware.GPU("NVIDIA A100-SXM4-40GB", 42.3, (8, 0)),))
    monkeypatch.setattr(hardware, "detect", lambda: here)
    assert planning.machine("auto").memory == 42.3e9
    assert planning.machine("auto").peak == MACHINES["a100"].peak
    unknown = dataclasses.replace(here, gpus=(hardware.GPU("Some GPU", 16.0, (9, 0)),))
    monkeypatch.setattr(hardware, "detect", lambda: unknown)
    assert a_run(machine=planning.machine("auto")).seconds is None


def test_a_character_vocabulary_is_assumed_and_said_to_be():
    plan = a_run(tokenizer="char")
    assert plan.config.vocab_size == planning.CHARACTERS
    assert "assumed" in plan.vocabulary
    assert a_run().vocabulary is None


# ------------------------------------------------------------------------------------- course train --dry-run


def dry_run(capsys, *arguments, config="gpt2-124m"):
    status = cli.main(["train", "--config", str(CONFIGS / f"{config}.yaml"), "--dry-run", *arguments])
    return status, *capsys.readouterr()


def test_a_dry_run_prints_the_plan_and_needs_no_data(capsys):
    status, out, err = dry_run(capsys, "--gpus", "2", "--gpu", "h100")
    assert (status, err) == (0, "")
    for part in ("124,439,808", "9,999,745,024", "FLOPs", "assuming 40%", "activations", "H100", "DDP"):
        assert part in out


def test_a_dry_run_as_json_can_be_read(capsys):
    status, out, _ = dry_run(capsys, "--gpus", "2", "--gpu", "h100", "--mfu", "0.5", "--json")
    report = json.loads(out)
    assert (status, report["fits"], report["problem"]) == (0, True, None)
    assert (report["parameters"], report["devices"], report["assumed_mfu"]) == (124_439_808, 2, 0.5)
    assert report["memory"]["peak"] < report["usable_memory"]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_dry_run_that_cannot_fit_shows_the_plan_and_ends_with_status_two_and_one_sentence(capsys, as_json):
    status, out, err = dry_run(capsys, "--gpu", "rtx3080", *as_json, config="gpt2-1558m")
    assert status == 2
    assert err.count("\n") == 1
    assert "on each GPU and RTX 3080 10 GB has 9.5 GB" in err
    assert "1557611200" in out.replace(",", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dry-run", "--gpu", "h1000"], "There is no GPU 'h1000'"),
        (["--dry-run", "--mfu", "1.5"], "--mfu is 1.5"),
        (["--dry-run", "--set", "training.stepz=3"], "unknown key training.stepz"),
        (["--gpus", "2"], "add --dry-run"),
    ],
)
def test_bad_input_to_a_dry_run_is_one_sentence(capsys, arguments, complaint):
    assert cli.main(["train", "--config", str(CONFIGS / "gpt2-124m.yaml"), *arguments]) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


# ---------------------------------------------------------------------------------------- configs/training


PLANNED = re.compile(
    r"# Planned \(--gpus (\d+) --gpu (\S+)\): ([\d.]+)[MB] parameters, ([\d.]+) billion tokens, "
    r"([\d,.]+) (hours|days) at 40 % MFU, (\d+) GB (?:a GPU|of memory)\."
)


PLANS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "# Planned (" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_what_a_configuration_says_it_costs_is_what_the_plan_says(path):
    text = path.read_text(encoding="utf-8")
    said = PLANNED.search(text)
    assert said, f"{path.name}: the line '# Planned (' is not of the usual form"
    gpus, gpu, parameters, tokens, time, unit, gigabytes = said.groups()
    machine = planning.machine(gpu)
    run = load_run(path, dtype="float32" if machine.kind == "cpu" else "bfloat16")
    plan = planning.plan(run, machine, int(gpus))
    plan.check()
    assert float(parameters) == pytest.approx(
        plan.sizes.total / (1e6 if "M param" in said[0] else 1e9), rel=0.01
    )
    assert float(tokens) == pytest.approx(plan.tokens / 1e9, rel=0.01)
    seconds = float(time.replace(",", "")) * (3600 if unit == "hours" else 86_400)
    assert seconds == pytest.approx(plan.seconds, rel=0.05)
    assert int(gigabytes) == pytest.approx(plan.memory.peak / 1e9, abs=1)


def test_the_plans_of_the_large_runs_are_there():
    names = {path.stem for path in PLANS}
    wanted = {"llama-300m-a100x4", "gpt2-774m-cpu", "path-125m-rtx4090x4", "path-350m-rtx4090x4"}
    assert wanted | {"path-1b-a100x2", "gpt-1.3b-h100x2"} <= names


def test_the_run_on_four_a100_keeps_its_five_checkpoints():
    training = load_run(CONFIGS / "llama-300m-a100x4.yaml").training
    assert training.steps == 100_000
    for step in (10_000, 25_000, 50_000, 75_000, 100_000):
        assert step % training.checkpoint_interval == 0
        assert step % training.keep_every == 0
