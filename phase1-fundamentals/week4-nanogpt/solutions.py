"""One answer to each exercise of week 4, and wrong answers that the tests must catch."""

import copy
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn


def read_window(file: BinaryIO, header_bytes: int, start: int, T: int) -> tuple[Tensor, Tensor]:
    """Seek, then read T + 1 ids of two bytes."""
    file.seek(header_bytes + 2 * start)
    ids = torch.from_numpy(np.frombuffer(file.read(2 * (T + 1)), "<u2").astype(np.int64))
    return ids[:-1], ids[1:]


def windows_of_step(
    step: int, batch_size: int, rank: int, world_size: int, windows_per_epoch: int
) -> list[tuple[int, int]]:
    """All processes' batches in one line, cut into epochs."""
    first = (step * world_size + rank) * batch_size
    return [divmod(number, windows_per_epoch) for number in range(first, first + batch_size)]


def accumulate(loss_of: Callable[[Tensor], Tensor], micro_batches: list[Tensor]) -> float:
    """Each micro-batch counts by its share of the tokens, and is let go before the next."""
    total, mean = sum(batch.numel() for batch in micro_batches), 0.0
    for batch in micro_batches:
        loss = loss_of(batch) * (batch.numel() / total)
        loss.backward()
        mean += loss.item()
    return mean


def warmup_cosine(step: int, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """A line to 1 at `warmup_steps`, then half a cosine to `min_ratio` at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / (steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_steps: int, min_ratio: float
) -> float:
    """The smaller of two ramps, and never more than 1."""
    left = max(0, steps - step) / decay_steps
    return min(1.0, (step + 1) / (warmup_steps + 1), min_ratio + (1 - min_ratio) * left)


def clip_gradients(gradients: list[Tensor], max_norm: float) -> float:
    """One norm, one factor."""
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def unscale(
    gradients: list[Tensor], scale: float, good: int, interval: int
) -> tuple[list[Tensor] | None, float, int]:
    """Overflow: skip and halve. Otherwise divide, count, and double when the count is full."""
    if not all(gradient.isfinite().all() for gradient in gradients):
        return None, scale / 2, 0
    true = [gradient / scale for gradient in gradients]
    return (true, scale * 2, 0) if good + 1 == interval else (true, scale, good + 1)


def write_checked(path: Path, data: bytes) -> None:
    """Write beside the target, sync, rename."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_checked(path: Path) -> bytes:
    """Compare before anything is used."""
    content = path.read_bytes()
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return data


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Tensor],
    steps: int,
    state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put everything back, train on, and copy everything out."""
    first = 0
    if state:
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it takes the tensors as they are
        torch.set_rng_state(state["generator"])
    for step in range(first, steps):
        loss = model(batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"step": steps, "generator": torch.get_rng_state(), **copy.deepcopy(parts)}


def skipped_updates(losses: list[float], sigmas: float, window: int) -> list[int]:
    """What was skipped does not raise the bar for what follows."""
    kept, skipped = [], []
    for number, loss in enumerate(losses):
        recent = kept[-window:]
        spike = not math.isfinite(loss)
        if not spike and 2 * len(recent) >= window:
            mean = math.fsum(recent) / len(recent)
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in recent) / len(recent))
            spike = loss > mean + sigmas * deviation
        if spike:
            skipped.append(number)
        else:
            kept.append(loss)
    return skipped


def mfu(
    tokens_per_second: float,
    num_layers: int,
    d_model: int,
    vocab_size: int,
    context_length: int,
    peak: float,
    devices: int,
) -> float:
    """6 operations a weight that is multiplied, and 12·C·T a layer."""
    weights = num_layers * (4 + 8) * d_model**2 + vocab_size * d_model
    flops = 6 * weights + 12 * num_layers * d_model * context_length
    return tokens_per_second * flops / (peak * devices)


def attainable(m: int, k: int, n: int, number_bytes: int, peak: float, bandwidth: float) -> float:
    """Under the roof: the sloping part is bandwidth times intensity."""
    intensity = 2 * m * k * n / (number_bytes * (m * k + k * n + m * n))
    return min(peak, intensity * bandwidth)


def qk_norm_scores(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """Vectors of length √D, so that their dot products are at most D."""
    q, k = (x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() for x in (q, k))
    return q @ k.mT / math.sqrt(q.shape[-1])


def newton_schulz(matrix: Tensor, rounds: int) -> Tensor:
    """Only matrix products; the Frobenius norm is never less than the largest singular value."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_update(
    weight: Tensor,
    gradient: Tensor,
    buffer: Tensor,
    orthogonalize: Callable[[Tensor], Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Momentum, look ahead, orthogonalise, decay, step."""
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    update = orthogonalize(momentum * buffer + (1 - momentum) * gradient)
    R, C = weight.shape
    weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * math.sqrt(max(1.0, R / C)))


# Wrong answers: mistakes that people make.


def _window_start_in_bytes(file, header_bytes, start, T):
    file.seek(header_bytes + start)
    ids = torch.from_numpy(np.frombuffer(file.read(2 * (T + 1)), "<u2").astype(np.int64))
    return ids[:-1], ids[1:]


def _window_signed(file, header_bytes, start, T):
    file.seek(header_bytes + 2 * start)
    ids = torch.from_numpy(np.frombuffer(file.read(2 * (T + 1)), "<i2").astype(np.int64))
    return ids[:-1], ids[1:]


def _window_reads_everything(file, header_bytes, start, T):
    file.seek(header_bytes)
    ids = torch.from_numpy(np.frombuffer(file.read(), "<u2").astype(np.int64))[start : start + T + 1]
    return ids[:-1], ids[1:]


def _window_one_id_short(file, header_bytes, start, T):
    file.seek(header_bytes + 2 * start)
    ids = torch.from_numpy(np.frombuffer(file.read(2 * T), "<u2").astype(np.int64))
    return ids[:-1], ids[1:]


def _window_targets_are_inputs(file, header_bytes, start, T):
    inputs, _ = read_window(file, header_bytes, start, T)
    return inputs, inputs.clone()


def _windows_same_for_all(step, batch_size, rank, world_size, windows_per_epoch):
    return windows_of_step(step, batch_size, 0, 1, windows_per_epoch)


def _windows_of_a_block(step, batch_size, rank, world_size, windows_per_epoch):
    """Every process has a part of its own, but after each step it goes on where its neighbour began."""
    first = (step + rank) * batch_size
    return [divmod(number, windows_per_epoch) for number in range(first, first + batch_size)]


def _windows_wrap_round(step, batch_size, rank, world_size, windows_per_epoch):
    epoch, place = divmod((step * world_size + rank) * batch_size, windows_per_epoch)
    return [(epoch, (place + i) % windows_per_epoch) for i in range(batch_size)]


def _accumulate_sums_means(loss_of, micro_batches):
    mean = 0.0
    for batch in micro_batches:
        loss = loss_of(batch)
        loss.backward()
        mean += loss.item() / len(micro_batches)
    return mean


def _accumulate_equal_weights(loss_of, micro_batches):
    mean = 0.0
    for batch in micro_batches:
        loss = loss_of(batch) / len(micro_batches)
        loss.backward()
        mean += loss.item()
    return mean


def _accumulate_holds_all_graphs(loss_of, micro_batches):
    total = sum(batch.numel() for batch in micro_batches)
    loss = sum(loss_of(batch) * (batch.numel() / total) for batch in micro_batches)
    loss.backward()
    return loss.item()


def _accumulate_reports_the_last_loss(loss_of, micro_batches):
    total, loss = sum(batch.numel() for batch in micro_batches), None
    for batch in micro_batches:
        loss = loss_of(batch)
        (loss * (batch.numel() / total)).backward()
    return loss.item()


def _cosine_starts_at_zero(step, steps, warmup_steps, min_ratio):
    if step < warmup_steps:
        return step / warmup_steps
    return warmup_cosine(step, steps, warmup_steps, min_ratio)


def _cosine_ignores_warmup(step, steps, warmup_steps, min_ratio):
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return warmup_cosine(step, steps, 0, min_ratio)


def _cosine_floor_by_max(step, steps, warmup_steps, min_ratio):
    return max(min_ratio, warmup_cosine(step, steps, warmup_steps, 0.0))


def _cosine_comes_back(step, steps, warmup_steps, min_ratio):
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _wsd_decays_at_once(step, steps, warmup_steps, decay_steps, min_ratio):
    left = max(0, steps - step) / (steps - warmup_steps)
    return min((step + 1) / (warmup_steps + 1), min_ratio + (1 - min_ratio) * min(1.0, left))


def _wsd_without_warmup(step, steps, warmup_steps, decay_steps, min_ratio):
    return warmup_stable_decay(step, steps, 0, decay_steps, min_ratio)


def _wsd_goes_below_its_floor(step, steps, warmup_steps, decay_steps, min_ratio):
    left = (steps - step) / decay_steps
    return min(1.0, (step + 1) / (warmup_steps + 1), min_ratio + (1 - min_ratio) * left)


def _clip_each_alone(gradients, max_norm):
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / gradient.norm().item()))
    return norm


def _clip_values(gradients, max_norm):
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient.clamp_(-max_norm, max_norm)
    return norm


def _clip_also_lengthens(gradients, max_norm):
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
    for gradient in gradients:
        gradient.mul_(max_norm / norm)
    return norm


def _clip_returns_the_norm_after(gradients, max_norm):
    return min(max_norm, clip_gradients(gradients, max_norm))


def _clip_adds_norms(gradients, max_norm):
    norm = sum(gradient.norm().item() for gradient in gradients)
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / norm))
    return norm


def _unscale_ignores_overflow(gradients, scale, good, interval):
    true = [gradient / scale for gradient in gradients]
    return (true, scale * 2, 0) if good + 1 == interval else (true, scale, good + 1)


def _unscale_sees_only_inf(gradients, scale, good, interval):
    if any(gradient.isinf().any() for gradient in gradients):
        return None, scale / 2, 0
    return _unscale_ignores_overflow(gradients, scale, good, interval)


def _unscale_keeps_counting(gradients, scale, good, interval):
    true, after, count = unscale(gradients, scale, good, interval)
    return (None, after, good) if true is None else (true, after, count)


def _unscale_never_grows(gradients, scale, good, interval):
    if not all(gradient.isfinite().all() for gradient in gradients):
        return None, scale / 2, 0
    return [gradient / scale for gradient in gradients], scale, good + 1


def _unscale_by_the_new_scale(gradients, scale, good, interval):
    true, after, count = unscale(gradients, scale, good, interval)
    return (None if true is None else [gradient / after for gradient in gradients]), after, count


def _write_in_place(path, data):
    path.write_bytes(hashlib.sha256(data).digest() + data)


def _write_without_sync(path, data):
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


def _write_elsewhere_and_move(path, data):
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    shutil.move(file.name, path)


def _write_leaves_its_rubbish(path, data):
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(hashlib.sha256(data).digest() + data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_deletes_first(path, data):
    path.unlink(missing_ok=True)
    write_checked(path, data)


def _write_checksum_in_hex(path, data):
    digest = hashlib.sha256(data).hexdigest().encode()
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(digest + data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


def _read_trusts(path):
    return path.read_bytes()[32:]


def _read_checks_the_length_only(path):
    content = path.read_bytes()
    if len(content) < 32:
        raise ValueError("cut short")
    return content[32:]


def _read_checks_the_beginning(path):
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest()[:4] != content[:4]:
        raise ValueError("damaged")
    return content[32:]


def _train_saving(keep):
    """A `train` that saves and puts back only the parts named in `keep`."""

    def train_with_less(model, optimizer, batches, steps, state=None):
        if state:
            model.load_state_dict(state["model"])
            if "optimizer" in keep:
                optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            if "generator" in keep:
                torch.set_rng_state(state["generator"])
        first = state["step"] if state and "step" in keep else 0
        for step in range(first, first + steps - (state["step"] if state else 0)):
            loss = model(batches(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {"step": steps, "generator": torch.get_rng_state(), **copy.deepcopy(parts)}

    return train_with_less


def _train_hands_out_live_tensors(model, optimizer, batches, steps, state=None):
    train(model, optimizer, batches, steps, state)
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"step": steps, "generator": torch.get_rng_state(), **parts}


def _train_uses_the_state_up(model, optimizer, batches, steps, state=None):
    if state:
        optimizer.load_state_dict(state["optimizer"])  # its moments are the state's own tensors from now on
        state = {**state, "optimizer": optimizer.state_dict()}
        model.load_state_dict(state["model"])
        torch.set_rng_state(state["generator"])
    for step in range(state["step"] if state else 0, steps):
        loss = model(batches(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"step": steps, "generator": torch.get_rng_state(), **copy.deepcopy(parts)}


def _train_adds_steps(model, optimizer, batches, steps, state=None):
    return train(model, optimizer, batches, steps + (state["step"] if state else 0), state)


def _skip_remembers_spikes(losses, sigmas, window):
    skipped = []
    for number, loss in enumerate(losses):
        recent = [one for one in losses[max(0, number - window) : number] if math.isfinite(one)]
        spike = not math.isfinite(loss)
        if not spike and 2 * len(recent) >= window:
            mean = math.fsum(recent) / len(recent)
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in recent) / len(recent))
            spike = loss > mean + sigmas * deviation
        if spike:
            skipped.append(number)
    return skipped


def _skip_lets_nan_pass(losses, sigmas, window):
    finite = [(number, loss) for number, loss in enumerate(losses) if math.isfinite(loss)]
    skipped = skipped_updates([loss for _, loss in finite], sigmas, window)
    return [finite[number][0] for number in skipped]


def _skip_by_the_sample_deviation(losses, sigmas, window):
    kept, skipped = [], []
    for number, loss in enumerate(losses):
        recent = kept[-window:]
        spike = not math.isfinite(loss)
        if not spike and 2 * len(recent) >= window:
            spike = loss > np.mean(recent) + sigmas * np.std(recent, ddof=1)
        (skipped if spike else kept).append(number if spike else loss)
    return skipped


def _skip_low_losses_too(losses, sigmas, window):
    kept, skipped = [], []
    for number, loss in enumerate(losses):
        recent = kept[-window:]
        spike = not math.isfinite(loss)
        if not spike and 2 * len(recent) >= window:
            mean, deviation = np.mean(recent), np.std(recent)
            spike = abs(loss - mean) > sigmas * deviation
        (skipped if spike else kept).append(number if spike else loss)
    return skipped


def _skip_from_the_start(losses, sigmas, window):
    kept, skipped = [], []
    for number, loss in enumerate(losses):
        recent = kept[-window:]
        spike = not math.isfinite(loss)
        if not spike and recent:
            spike = loss > np.mean(recent) + sigmas * np.std(recent)
        (skipped if spike else kept).append(number if spike else loss)
    return skipped


def _skip_over_the_whole_past(losses, sigmas, window):
    kept, skipped = [], []
    for number, loss in enumerate(losses):
        spike = not math.isfinite(loss)
        if not spike and 2 * len(kept) >= window:
            spike = loss > np.mean(kept) + sigmas * np.std(kept)
        (skipped if spike else kept).append(number if spike else loss)
    return skipped


def _mfu_forward_only(*arguments):
    return mfu(*arguments) / 3


def _mfu_without_attention(tokens_per_second, num_layers, d_model, vocab_size, context_length, peak, devices):
    return mfu(tokens_per_second, num_layers, d_model, vocab_size, 0, peak, devices)


def _mfu_of_all_parameters(tokens_per_second, num_layers, d_model, vocab_size, context_length, peak, devices):
    more = vocab_size + context_length  # the embedding beside the head, and the positions
    return mfu(tokens_per_second, num_layers, d_model, vocab_size + more, context_length, peak, devices)


def _mfu_without_head(tokens_per_second, num_layers, d_model, vocab_size, context_length, peak, devices):
    return mfu(tokens_per_second, num_layers, d_model, 0, context_length, peak, devices)


def _mfu_of_one_device(tokens_per_second, num_layers, d_model, vocab_size, context_length, peak, devices):
    return mfu(tokens_per_second, num_layers, d_model, vocab_size, context_length, peak, 1)


def _roof_without_peak(m, k, n, number_bytes, peak, bandwidth):
    return 2 * m * k * n / (number_bytes * (m * k + k * n + m * n)) * bandwidth


def _roof_counts_numbers(m, k, n, number_bytes, peak, bandwidth):
    return min(peak, 2 * m * k * n / (m * k + k * n + m * n) * bandwidth)


def _roof_forgets_the_result(m, k, n, number_bytes, peak, bandwidth):
    return min(peak, 2 * m * k * n / (number_bytes * (m * k + k * n)) * bandwidth)


def _roof_half_the_operations(m, k, n, number_bytes, peak, bandwidth):
    return min(peak, m * k * n / (number_bytes * (m * k + k * n + m * n)) * bandwidth)


def _scores_of_unit_vectors(q, k, eps):
    q, k = (x / (x.norm(dim=-1, keepdim=True) + eps) for x in (q, k))
    return q @ k.mT / math.sqrt(q.shape[-1])


def _scores_normed_over_all_heads(q, k, eps):
    q, k = (x * (x.square().mean(dim=(1, 3), keepdim=True) + eps).rsqrt() for x in (q, k))
    return q @ k.mT / math.sqrt(q.shape[-1])


def _scores_not_scaled(q, k, eps):
    return qk_norm_scores(q, k, eps) * math.sqrt(q.shape[-1])


def _scores_of_normed_queries_only(q, k, eps):
    q = q * (q.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return q @ k.mT / math.sqrt(q.shape[-1])


def _scores_epsilon_outside(q, k, eps):
    q, k = (x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps) for x in (q, k))
    return q @ k.mT / math.sqrt(q.shape[-1])


def _newton_not_normalised(matrix, rounds):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _newton_cubic(matrix, rounds):
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(rounds):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    return x


def _newton_elementwise(matrix, rounds):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm().clamp_min(1e-7)
    for _ in range(rounds):
        x = a * x + b * x**3 + c * x**5
    return x


def _newton_one_round_too_many(matrix, rounds):
    return newton_schulz(matrix, rounds + 1)


def _newton_divides_by_zero(matrix, rounds):
    return newton_schulz(matrix / matrix.norm(), rounds)


def _muon_without_nesterov(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    R, C = weight.shape
    step = lr * math.sqrt(max(1.0, R / C))
    weight.mul_(1 - lr * weight_decay).sub_(orthogonalize(buffer), alpha=step)


def _muon_shape_the_other_way(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    update = orthogonalize(momentum * buffer + (1 - momentum) * gradient)
    R, C = weight.shape
    weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * math.sqrt(max(1.0, C / R)))


def _muon_decays_like_adam(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    """Decay as a part of the gradient, where the orthogonalisation takes its size away."""
    muon_update(weight, gradient + weight_decay * weight, buffer, orthogonalize, lr, momentum, 0.0)


def _muon_decays_by_lambda_alone(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    muon_update(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay / lr)


def _muon_keeps_no_momentum(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    muon_update(weight, gradient, buffer.clone(), orthogonalize, lr, momentum, weight_decay)


def _muon_keeps_the_orthogonal_matrix(weight, gradient, buffer, orthogonalize, lr, momentum, weight_decay):
    """Momentum of what has been orthogonalised, where it should be orthogonalised last."""
    buffer.mul_(momentum).add_(orthogonalize(gradient), alpha=1 - momentum)
    R, C = weight.shape
    weight.mul_(1 - lr * weight_decay).sub_(buffer, alpha=lr * math.sqrt(max(1.0, R / C)))


WRONG_ANSWERS = {
    "read_window": [
        _window_start_in_bytes,
        _window_signed,
        _window_reads_everything,
        _window_one_id_short,
        _window_targets_are_inputs,
    ],
    "windows_of_step": [_windows_same_for_all, _windows_of_a_block, _windows_wrap_round],
    "accumulate": [
        _accumulate_sums_means,
        _accumulate_equal_weights,
        _accumulate_holds_all_graphs,
        _accumulate_reports_the_last_loss,
    ],
    "warmup_cosine": [
        _cosine_starts_at_zero,
        _cosine_ignores_warmup,
        _cosine_floor_by_max,
        _cosine_comes_back,
    ],
    "warmup_stable_decay": [_wsd_decays_at_once, _wsd_without_warmup, _wsd_goes_below_its_floor],
    "clip_gradients": [
        _clip_each_alone,
        _clip_values,
        _clip_also_lengthens,
        _clip_returns_the_norm_after,
        _clip_adds_norms,
    ],
    "unscale": [
        _unscale_ignores_overflow,
        _unscale_sees_only_inf,
        _unscale_keeps_counting,
        _unscale_never_grows,
        _unscale_by_the_new_scale,
    ],
    "write_checked": [
        _write_in_place,
        _write_without_sync,
        _write_elsewhere_and_move,
        _write_leaves_its_rubbish,
        _write_deletes_first,
        _write_checksum_in_hex,
    ],
    "read_checked": [_read_trusts, _read_checks_the_length_only, _read_checks_the_beginning],
    "train": [
        _train_saving({"step", "generator"}),
        _train_saving({"step", "optimizer"}),
        _train_saving({"optimizer", "generator"}),
        _train_hands_out_live_tensors,
        _train_uses_the_state_up,
        _train_adds_steps,
    ],
    "skipped_updates": [
        _skip_remembers_spikes,
        _skip_lets_nan_pass,
        _skip_by_the_sample_deviation,
        _skip_low_losses_too,
        _skip_from_the_start,
        _skip_over_the_whole_past,
    ],
    "mfu": [
        _mfu_forward_only,
        _mfu_without_attention,
        _mfu_of_all_parameters,
        _mfu_without_head,
        _mfu_of_one_device,
    ],
    "attainable": [
        _roof_without_peak,
        _roof_counts_numbers,
        _roof_forgets_the_result,
        _roof_half_the_operations,
    ],
    "qk_norm_scores": [
        _scores_of_unit_vectors,
        _scores_normed_over_all_heads,
        _scores_not_scaled,
        _scores_of_normed_queries_only,
        _scores_epsilon_outside,
    ],
    "newton_schulz": [
        _newton_not_normalised,
        _newton_cubic,
        _newton_elementwise,
        _newton_one_round_too_many,
        _newton_divides_by_zero,
    ],
    "muon_update": [
        _muon_without_nesterov,
        _muon_shape_the_other_way,
        _muon_decays_like_adam,
        _muon_decays_by_lambda_alone,
        _muon_keeps_no_momentum,
        _muon_keeps_the_orthogonal_matrix,
    ],
}
