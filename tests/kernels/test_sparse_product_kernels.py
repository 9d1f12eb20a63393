"""The sparse product's kernels under the interpreter: what they leave out, read off a product with the unit matrix."""

import pytest
import torch

pytest.importorskip("triton")

from reprdpo_kernels import sparse_product
from reprdpo_kernels.sparse_product import Config, sparse_residual_product

from benchmarks.gradient_mass_eps_columns import above_threshold
from reprdpo.ops.reference import mass_threshold

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles in few rows, and blocks that the sizes below are multiples of, or not."""
    monkeypatch.setattr(sparse_product, "TILE", 16)
    monkeypatch.setattr(sparse_product, "CONFIGS", {80: Config(32, 64, 8, 3)})
    for name in ("CONFIG_FLOAT32", "CONFIG_UNALIGNED"):
        monkeypatch.setattr(sparse_product, name, Config(256, 128, 8, 3))


@pytest.fixture(autouse=True)
def _poison():
    """What torch.empty returns is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def residual(rows, vocabulary, sharpness=4.0):
    """Sharpness: of all rows, or [rows]."""
    logits = torch.as_tensor(sharpness).expand(rows)[:, None] * torch.randn(rows, vocabulary)
    labels = torch.randint(0, vocabulary, (rows, 1))
    return (-logits.scatter(1, labels, -torch.inf).softmax(1)).scatter(1, labels, 1.0)


def kept_of(residual_nV, mass):
    """The residual without what is left out."""
    return sparse_residual_product(residual_nV.clone(), torch.eye(residual_nV.shape[1]), mass)


@pytest.mark.parametrize("hold", [16384, 256])  # one slice of the vocabulary, and three
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 8.0])
@pytest.mark.parametrize("mass", [2**-9, 0.2])
def test_a_single_row_drops_nearly_all_it_may(hold, sharpness, mass, monkeypatch):
    monkeypatch.setattr(sparse_product, "_HOLD", hold)
    rows = residual(1, 700, sharpness)
    kept = kept_of(rows, mass)
    assert torch.equal(kept[kept != 0], rows[kept != 0])
    share = mass if hold > 700 else mass / 3
    for whole, part in zip(rows.split(hold, 1), kept.split(hold, 1), strict=True):
        assert (whole - part).double().abs().sum() <= share
        least = mass_threshold(whole, share)
        assert (whole[part == 0].abs() < least).all()
        assert (whole[part != 0].abs() >= least / 1.25).all()


def test_rows_share_the_columns_of_their_tile_and_peaked_ones_lie_together():
    sharpness = torch.where(torch.arange(40) % 7 == 3, 0.1, 12.0)  # 6 flat rows, 34 peaked: tiles of 16, 16, 8
    rows = residual(40, 400, sharpness)
    kept = kept_of(rows, 0.01)
    assert ((rows - kept).double().abs().sum(1) <= 0.01).all()
    dropped = (kept == 0).sum(1)
    assert (dropped[sharpness < 1] < 40).all()
    assert (dropped > 40).sum() == 24
    lists = {tuple((kept[row] == 0).tolist()) for row in range(40)}
    assert len(lists) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"), [(0, 5, 3), (1, 1, 1), (5, 7, 3), (18, 300, 33), (33, 64, 48)]
)
def test_product(rows, vocabulary, width, dtype):
    scale = 4096 if dtype == torch.float16 else 1
    stored = torch.full((rows, vocabulary + 16), 7.0, dtype=dtype)
    stored[:, :vocabulary] = (scale * residual(rows, vocabulary)).to(dtype)
    weight = torch.randn(vocabulary, width).to(dtype)
    exact = stored[:, :vocabulary].double() @ weight.double() / scale
    rounding = 2 * torch.finfo(dtype).eps * exact.norm(dim=1)
    for mass in (1e-9, 0.05) if rows < 18 else (0.05,):
        consumed = stored.clone()
        product = sparse_residual_product(consumed[:, :vocabulary], weight, mass)
        assert (consumed[:, vocabulary:] == 7).all()
        assert product.dtype == dtype
        error = (product.double() - exact).norm(dim=1)
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        assert (error <= mass * weight.double().norm(dim=1).max() + 2 * rounding).all()


def test_nan_stays_in_its_row():
    rows = residual(6, 200, 8.0)
    rows[2] = torch.nan
    rows[4, 17] = torch.nan
    kept = kept_of(rows, 0.01)
    assert kept.isnan().any(1).tolist() == [False, False, True, False, True, False]
    others = [0, 1, 3, 5]
    assert ((rows - kept)[others].abs().sum(1) <= 0.01).all()


def test_rows_that_keep_nothing_read_nothing():
    rows = torch.zeros(3, 40)
    assert (sparse_residual_product(rows, torch.full((40, 8), torch.nan), 0.1) == 0).all()


def test_what_lies_otherwise_is_refused():
    with pytest.raises(ValueError, match="residual must have its columns side by side"):
        sparse_residual_product(torch.zeros(4, 3).t(), torch.zeros(4, 2), 0.1)
    with pytest.raises(ValueError, match="weight must have its columns side by side"):
        sparse_residual_product(torch.zeros(3, 4), torch.zeros(2, 4).t(), 0.1)


@pytest.mark.parametrize("sharpness", [2.0, 6.0])
def test_columns_are_counted_as_the_kernel_keeps_them(sharpness):
    """The benchmark's thresholds are a little higher: the kernel takes off what rounding could add to the mass."""
    torch.manual_seed(0)
    G = residual(12, 3000, sharpness)
    _, kept_ns, _ = sparse_product._thresholds(G, 2**-9)
    counted_n = above_threshold(G.abs(), 2**-9).sum(1)
    assert (counted_n <= kept_ns[:, 0]).all()
    torch.testing.assert_close(counted_n.double(), kept_ns[:, 0].double(), rtol=0.01, atol=1)
