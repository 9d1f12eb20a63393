"""What a training run logs: means kept on the device, the cost of a step, the distribution of gamma, metrics.jsonl.

Shape suffixes: K metrics, P pairs, W processes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import IntervalStrategy, TrainerCallback

from reprdpo import costs, files

METRICS_FILE = "metrics.jsonl"
HISTOGRAM_FILE = "confidence_histogram.json"


class MetricWindow:
    """Means over all pairs since the last :meth:`drain`; nothing leaves the device before.

    ``spread`` names the one metric whose std, min and max are reported beside its mean, as ``<prefix>/mean`` etc.
    """

    def __init__(self, spread: str | None = None) -> None:
        self._spread = spread
        self._names: list[str] = []
        self._sums_K: Tensor | None = None
        self._limits_2: Tensor | None = None

    def add(self, values: Mapping[str, Tensor], num_pairs: int, *, counted: bool = True) -> None:
        """Add a batch: one value a pair ([P] float32), or a scalar that already is the mean over the pairs.

        One that is not ``counted`` says which metrics there are and changes none.
        """
        rows = [value.detach().float().expand(num_pairs) for value in values.values()]
        rows.append(rows[0].new_ones(num_pairs))
        if self._spread is not None:
            rows.append(values[self._spread].detach().float().square())
            low, high = torch.aminmax(values[self._spread].detach().float())
            limits_2 = torch.stack([-low, high]) if counted else low.new_full((2,), -torch.inf)
            self._limits_2 = limits_2 if self._limits_2 is None else torch.maximum(self._limits_2, limits_2)
        sums_K = torch.stack(rows).sum(dim=1) if counted else rows[0].new_zeros(len(rows))
        self._names = list(values)
        self._sums_K = sums_K if self._sums_K is None else self._sums_K + sums_K

    def drain(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, over all processes (``gather``: [1, K] -> [W, K]); the one synchronisation."""
        if self._sums_K is None:
            return {}
        parts = [self._sums_K] if self._limits_2 is None else [self._sums_K, self._limits_2]
        table_WK = gather(torch.cat(parts)[None]).double().cpu()
        sums = table_WK.sum(dim=0).tolist()
        names, count = self._names, sums[len(self._names)]
        result = {name: sums[k] / count for k, name in enumerate(names)}
        if self._spread is not None:
            prefix, mean = self._spread.rsplit("/", 1)[0], result[self._spread]
            square = sums[len(names) + 1] / count
            minus_low, high = table_WK[:, -2:].amax(dim=0).tolist()
            # in this order max() lets a NaN through
            deviation = max(square - mean * mean, 0.0) ** 0.5
            result |= {f"{prefix}/std": deviation, f"{prefix}/min": -minus_low, f"{prefix}/max": high}
        self._sums_K = self._limits_2 = None
        return result

    def state_dict(self, gather: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Of all processes together, for one of them to load."""
        sums_K, limits_2 = self._sums_K, self._limits_2
        if sums_K is not None:
            sums_K = gather(sums_K[None]).sum(dim=0)
        if limits_2 is not None:
            limits_2 = gather(limits_2[None]).amax(dim=0)
        return {"names": self._names, "sums": sums_K, "limits": limits_2}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._names = list(state["names"])
        self._sums_K, self._limits_2 = (
            None if state[key] is None else state[key].to(device) for key in ("sums", "limits")
        )


class StepCosts(TrainerCallback):
    """Seconds and FLOP of the optimizer steps since the last :meth:`drain`, the reward's part of them apart."""

    def __init__(self, device: torch.device) -> None:
        self.reward = costs.Stopwatch(device)
        self._step = costs.Stopwatch(device)
        self._steps = 0
        self._flop = {"policy": 0.0, "reward": 0.0}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._step.stop()
        self._steps += 1

    def count(self, flop: float, part: str) -> None:
        """Add FLOP to "policy" or "reward"."""
        self._flop[part] += flop
        costs.count(flop, part)

    def drain(self) -> dict[str, float]:
        """Means a step, and the most memory in use; the stage under way is told the seconds of each part."""
        if not self._steps:
            return {}
        step, reward = self._step.read(), self.reward.read()
        costs.count_seconds(step - reward, "policy")
        costs.count_seconds(reward, "reward")
        found = {"cost/step_seconds": step / self._steps, "cost/policy_flop": self._flop["policy"] / self._steps}
        if self._flop["reward"]:
            found["cost/reward_seconds"] = reward / self._steps
            found["cost/reward_flop"] = self._flop["reward"] / self._steps
            found["cost/reward_share"] = reward / step
        if (peak := costs.peak_bytes()) is not None:
            found["cost/peak_bytes"] = peak
        self._steps, self._flop = 0, dict.fromkeys(self._flop, 0.0)
        return found


class ConfidenceHistogram:
    """gamma of the first and of the latest ``capacity`` pairs, kept on the device, binned when it is written."""

    def __init__(self, capacity: int = 256, bins: int = 20) -> None:
        self._capacity, self._bins, self._seen = capacity, bins, 0
        self._first: Tensor | None = None
        self._latest: Tensor | None = None

    def add(self, gamma_P: Tensor) -> None:
        gamma_P = gamma_P.detach().float()[-self._capacity :]
        if self._first is None or self._latest is None:
            self._first, self._latest = (gamma_P.new_zeros(self._capacity) for _ in range(2))
        num_pairs, room = len(gamma_P), self._capacity - self._seen
        if room > 0:
            self._first[self._seen : self._seen + num_pairs] = gamma_P[:room]
        start = self._seen % self._capacity
        before_end = min(num_pairs, self._capacity - start)
        self._latest[start : start + before_end] = gamma_P[:before_end]
        self._latest[: num_pairs - before_end] = gamma_P[before_end:]
        self._seen += num_pairs

    def to_json(self) -> dict[str, list[float]]:
        """``{"edges": [bins + 1], "initial": [bins] counts, "final": [bins] counts}``."""
        edges = [k / self._bins for k in range(self._bins + 1)]
        return {"edges": edges, "initial": self._count(self._first), "final": self._count(self._latest)}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "first": self._first, "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._seen = state["seen"]
        self._first, self._latest = (
            None if state[key] is None else state[key].to(device) for key in ("first", "latest")
        )

    def _count(self, gamma: Tensor | None) -> list[float]:
        if gamma is None:
            return [0] * self._bins
        held = gamma[: min(self._seen, self._capacity)].cpu()
        return torch.histc(held[held.isfinite()], self._bins, 0.0, 1.0).int().tolist()


class LastStep(TrainerCallback):
    """Log the last step whether or not ``logging_steps`` divides it: the figures of a training end where it does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True


class ProgressBar(TrainerCallback):
    """One bar for the training, with the latest loss and reward accuracy beside it; standard output stays free."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm and state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", delay=2)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._bar is not None and logs is not None:
            shown = {name: logs[name] for name in ("loss", "rewards/accuracies", "confidence/mean") if name in logs}
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class MetricsFile(TrainerCallback):
    """Append every log to ``OUTPUT_DIR/metrics.jsonl``; lines past the checkpoint resumed from are dropped first."""

    def __init__(self) -> None:
        self._writer: files.JsonlWriter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        before = files.read_jsonl(path) if state.global_step and path.exists() else ()
        files.write_jsonl(path, [line for _, line in before if line["step"] <= state.global_step])
        self._writer = files.JsonlWriter(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self._writer is not None and logs is not None and "train_runtime" not in logs:
            self._writer.write({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
