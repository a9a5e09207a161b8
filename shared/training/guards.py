"""A guard against updates that would throw a run off its course.

An update whose loss or gradient norm lies far above those of the updates before it is skipped: its batch is
passed over and the weights stay as they are (the rule of OLMo-core's skip-step optimisers, there with 6
standard deviations over 128 updates). When skipping does not help, the trainer goes back to the last
checkpoint and on with other batches, as was done by hand for PaLM (Chowdhery et al. 2022, §5.1).
"""

import math
from collections import deque
from typing import Any


class SpikeGuard:
    """Judges each update by the ones before it.

    Args:
        sigmas: standard deviations above the mean from which a loss or a gradient norm is a spike.
        window: updates that mean and deviation are taken over; judging starts when half of them are there.

    Attributes:
        skipped: updates skipped so far.
        streak: of those, how many in a row up to now.
    """

    def __init__(self, sigmas: float, window: int) -> None:
        self.sigmas = sigmas
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.skipped = self.streak = 0

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why the update is to be skipped, or None; either way it is counted.

        Args:
            loss: nats.
            grad_norm: before clipping.
        """
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self.recent.append((loss, grad_norm))  # a spike must not raise the bar for the next one
            self.streak = 0
        else:
            self.skipped += 1
            self.streak += 1
        return reason

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        for index, (name, value) in enumerate((("loss", loss), ("gradient norm", grad_norm))):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if 2 * len(self.recent) >= (self.recent.maxlen or 0):
                before = [pair[index] for pair in self.recent]
                mean = math.fsum(before) / len(before)
                deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / len(before))
                if value > mean + self.sigmas * deviation:
                    usual = f"{mean:.4g} ± {deviation:.2g}"
                    return f"the {name} is {value:.4g}, where {usual} is usual"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as the uninterrupted one would."""
        return {
            "recent": [list(pair) for pair in self.recent],
            "skipped": self.skipped,
            "streak": self.streak,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self.recent.clear()
        self.recent.extend((loss, norm) for loss, norm in state["recent"])
        self.skipped, self.streak = state["skipped"], state["streak"]
