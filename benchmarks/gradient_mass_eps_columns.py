"""How much of the vocabulary a product with gradient_mass_eps keeps, by how many rows share a list of columns.

    python -m benchmarks.gradient_mass_eps_columns [--rows 1024] [--vocabulary 32000] [--eps 0.001953125] [--seed 0]

Logits are drawn, labels from their softmax. A row needs the columns that Triton's thresholds leave it; a list holds
every column that one of its rows needs.
Shape suffixes: n rows, t of a tile, V vocabulary.
"""

import argparse
from collections.abc import Iterator
from itertools import chain

import torch
from reprdpo_kernels.sparse_product import slices_of
from torch import Tensor

from benchmarks.bench_logprob import SHARPNESS

_ROWS_AT_ONCE = 64


def kept_columns(sharpness_n: Tensor, vocabulary: int, shared: float, eps: float) -> tuple[Tensor, float]:
    """Which columns [n, V] each row needs, and the mean entropy in nats; ``shared``: of the logits' variance."""
    common_V = torch.randn(vocabulary)
    kept, nats = [], []
    for sharpness_t in sharpness_n.split(_ROWS_AT_ONCE):
        own_tV = torch.randn(sharpness_t.shape[0], vocabulary)
        logits_tV = sharpness_t[:, None] * ((1 - shared) ** 0.5 * own_tV + shared**0.5 * common_V)
        p_tV = logits_tV.softmax(1)
        nats.append(torch.special.entr(p_tV).sum(1))
        label_t1 = p_tV.multinomial(1)
        residual_tV = logits_tV.scatter(1, label_t1, -torch.inf).softmax(1).scatter_(1, label_t1, 1.0)
        parts = residual_tV.split(slices_of(vocabulary)[1], 1)
        kept.append(torch.cat([above_threshold(part, eps / len(parts)) for part in parts], dim=1))
    return torch.cat(kept), torch.cat(nats).mean().item()


def above_threshold(part_tW: Tensor, mass: float) -> Tensor:
    """What is not under the threshold that the kernel finds: by halving the exponents between mass / W and mass."""
    width = part_tW.shape[1]
    threshold_t1, factor = torch.full((part_tW.shape[0], 1), mass / width), (2.0 * width) ** 0.5
    for _ in range(6):
        above_t1 = threshold_t1 * factor
        under_t1 = part_tW.where(part_tW < above_t1, 0).sum(1, keepdim=True)
        threshold_t1 = torch.where(under_t1 <= mass, above_t1, threshold_t1)
        factor **= 0.5
    return part_tW >= threshold_t1.masked_fill_(part_tW.sum(1, keepdim=True) <= mass, torch.inf)


def share(kept_nV: Tensor, rows: int) -> float:
    """Of all columns, those in the lists of tiles of ``rows`` rows, on average."""
    return torch.stack([tile_tV.any(0).float().mean() for tile_tV in kept_nV.split(rows)]).mean().item()


def settings(rows: int) -> Iterator[tuple[str, Tensor, float]]:
    """Name, each row's standard deviation of logits, and how much of their variance all rows share."""
    for nats, sharpness in SHARPNESS.items():
        yield f"drawn at {nats:g} nats", torch.full((rows,), sharpness), 0.0
    yield "1.5 nats, half the variance shared", torch.full((rows,), SHARPNESS[1.5]), 0.5
    mixed = torch.tensor(list(SHARPNESS.values()))
    yield f"a row of {', '.join(map('{:g}'.format, SHARPNESS))} nats", mixed[torch.randint(len(mixed), (rows,))], 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--eps", type=float, default=2**-9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    names = ["a row alone", "64 sorted", "128 sorted", "128 as they come", "all rows"]
    print(f"{'share of the columns kept':36}", *(f"{name:>16}" for name in ("nats", *names)))
    for name, sharpness_n, shared in settings(options.rows):
        kept_nV, nats = kept_columns(sharpness_n, options.vocabulary, shared, options.eps)
        by_count_nV = kept_nV[kept_nV.sum(1).argsort(descending=True)]
        tiles = [(kept_nV, 1), (by_count_nV, 64), (by_count_nV, 128), (kept_nV, 128), (kept_nV, options.rows)]
        print(f"{name:36}", *(f"{cell:>16}" for cell in chain([f"{nats:.2f}"], (f"{share(*t):.1%}" for t in tiles))))


if __name__ == "__main__":
    main()
