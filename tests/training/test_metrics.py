"""Windows equal the plain means of what was added; histograms keep the first and the latest pairs."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reprdpo.files import read_jsonl, write_text
from reprdpo.training.metrics import ConfidenceHistogram, MetricsFile, MetricWindow


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_window_means_weigh_pairs_alike_across_unequal_batches() -> None:
    window = MetricWindow("confidence/mean")
    first, second = torch.rand(5), torch.rand(2)
    window.add({"margin": first, "loss": first.mean(), "confidence/mean": first}, num_pairs=5)
    window.add({"margin": second, "loss": second.mean(), "confidence/mean": second}, num_pairs=2)
    got, both = window.drain(whole), torch.cat([first, second]).double()
    assert got["margin"] == pytest.approx(both.mean().item(), abs=1e-6)
    assert got["loss"] == pytest.approx(both.mean().item(), abs=1e-6)
    assert got["confidence/std"] == pytest.approx(both.std(correction=0).item(), abs=1e-5)
    assert got["confidence/min"] == pytest.approx(both.min().item())
    assert got["confidence/max"] == pytest.approx(both.max().item())
    assert window.drain(whole) == {}


def test_window_adds_up_over_processes() -> None:
    window = MetricWindow("g/mean")
    window.add({"g/mean": torch.tensor([0.2, 0.4])}, num_pairs=2)

    def gather(row: torch.Tensor) -> torch.Tensor:
        other = MetricWindow("g/mean")
        other.add({"g/mean": torch.tensor([0.9])}, num_pairs=1)
        rows = [row]
        other.drain(lambda own: rows.append(own) or own)
        return torch.cat(rows)

    got = window.drain(gather)
    assert got["g/mean"] == pytest.approx(0.5)
    assert (got["g/min"], got["g/max"]) == (pytest.approx(0.2), pytest.approx(0.9))


def test_a_nan_shows() -> None:
    window = MetricWindow("g/mean")
    window.add({"g/mean": torch.tensor([0.2, math.nan])}, num_pairs=2)
    got = window.drain(whole)
    assert all(math.isnan(got[name]) for name in ("g/mean", "g/std", "g/min", "g/max"))


def test_window_state_goes_on_where_it_was_saved() -> None:
    window, again = MetricWindow("g/mean"), MetricWindow("g/mean")
    window.add({"g/mean": torch.rand(3)}, num_pairs=3)
    again.load_state_dict(window.state_dict(lambda row: row), torch.device("cpu"))
    for each in (window, again):
        each.add({"g/mean": torch.tensor([0.25])}, num_pairs=1)
    assert window.drain(whole) == again.drain(whole)


@pytest.mark.parametrize("batch", [1, 3, 8, 11])
def test_histogram_keeps_the_first_and_the_latest(batch: int) -> None:
    gammas = torch.rand(40)
    histogram = ConfidenceHistogram(capacity=8, bins=4)
    for part in gammas.split(batch):
        histogram.add(part)
    got = histogram.to_json()
    if batch <= 8:
        assert got["initial"] == torch.histc(gammas[:8], 4, 0, 1).tolist()
        assert got["final"] == torch.histc(gammas[-8:], 4, 0, 1).tolist()
    assert sum(got["initial"]) == sum(got["final"]) == 8
    assert got["edges"] == [0, 0.25, 0.5, 0.75, 1]


def test_histogram_before_its_capacity_counts_what_it_has() -> None:
    histogram = ConfidenceHistogram(capacity=8, bins=2)
    assert histogram.to_json()["final"] == [0, 0]
    histogram.add(torch.tensor([1.0, 0.0, 0.9]))
    assert histogram.to_json()["initial"] == histogram.to_json()["final"] == [1, 2]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [1, 2])])
def test_metrics_file_drops_lines_past_the_checkpoint(tmp_path: Path, step: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write_text(path, "".join(f'{{"step": {k}}}\n' for k in (1, 2, 3)) + '{"step": 4, "lo')
    args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=step, is_world_process_zero=True)
    callback = MetricsFile()
    callback.on_train_begin(args, state, None)
    state.global_step = step + 1
    callback.on_log(args, state, None, logs={"loss": 0.5})
    callback.on_log(args, state, None, logs={"train_runtime": 1.0})
    callback.on_train_end(args, state, None)
    assert [line["step"] for _, line in read_jsonl(path)] == [*kept, step + 1]
