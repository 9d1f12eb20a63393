"""docs/ops.md: its snippets run, its tables are those of the code and of the committed figures."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reprdpo import ops
from reprdpo.ops import backend

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
# Ops that have no declaration of their own.
SERVED_AS = {"probe_confidence": "probe_reward"}


def run(marker: str) -> dict[str, Any]:
    (snippet,) = (text for text in SNIPPETS if marker in text)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(snippet, "docs/ops.md", "exec"), names)
    return names


def table(head: str) -> list[list[str]]:
    """The cells of the rows of the table whose head line begins with ``head``."""
    lines = PAGE[PAGE.index(f"\n{head}") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_public_name_is_on_the_page() -> None:
    rows = {name.strip("`") for row in table("| op | takes |") for name in row[0].split(", ")}
    functions = {name for name in ops.__all__ if not isinstance(getattr(ops, name), type)}
    assert rows == functions - {"use_backend", "backends", "empty_cache"}
    assert all(f"`{name}`" in PAGE for name in ops.__all__)


def test_the_backends_of_every_op_are_those_declared() -> None:
    for name, *_, kernels in table("| op | takes |"):
        op = name.strip("`")
        declared = backend._KERNELS.get(SERVED_AS.get(op, op))
        if kernels == "any":
            assert declared is None, op
            continue
        assert declared is not None, op
        shown = [", ".join(declared[kind]) or "none" for kind in ("cpu", "cuda")]
        if not backend._INTERPRETING:
            assert kernels == "; ".join(shown), op


def test_every_environment_variable_is_written_down() -> None:
    sources = [*ROOT.glob("reprdpo/**/*.py"), *ROOT.glob("csrc/common/*.cpp"), ROOT / "setup.py"]
    read = r"(?:environ\.get\(|environ\[|getenv\(|request\()\s*\"(REPRDPO_\w+)\""
    found = {name for path in sources for name in re.findall(read, path.read_text(encoding="utf-8"))}
    assert {"REPRDPO_BACKEND", "REPRDPO_CPU_CAPABILITY", "REPRDPO_NATIVE"} <= found
    assert not [name for name in found if f"`{name}`" not in PAGE]


def test_the_time_of_gradient_mass_eps_is_that_of_the_committed_results() -> None:
    shares: dict[tuple[str, str, str], float] = {}
    for path in (ROOT / "benchmarks" / "results" / "epyc-avx512").glob("*.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if match := re.fullmatch(r"test_head_frozen_mass_eps\[(\w+)-([\d.]+)-0\.0-(\S+)\]", row["name"]):
                shares[match[1], match[2], match[3]] = row["p50_s"] / row["floor_s"]
    for dtype, *cells in table("| | 0.5 nats | 1.5 nats"):
        keys = [(dtype, nats, "0.001953125") for nats in ("0.5", "1.5", "3.0")] + [(dtype, "1.5", "None")]
        assert cells == [f"{shares[key]:.2f}" for key in keys], dtype


def test_the_snippet_of_linear_logprob() -> None:
    names = run("return_entropy=True")
    logits = names["hidden"].detach() @ names["weight"].detach().t()
    scored = names["labels"] != -100
    wanted = logits.log_softmax(-1).gather(-1, names["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(names["logp"].detach(), wanted.masked_fill(~scored, 0), rtol=1e-4, atol=1e-4)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["weight"].grad.abs().sum() > 0


def test_the_snippet_of_packed_sequences() -> None:
    names = run("sequence_ids=sequence_ids")
    assert names["result"].loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert names["hidden"].grad.abs().sum() > 0


def test_the_snippet_of_logits() -> None:
    names = run("inplace_backward=True")
    assert torch.isfinite(names["loss"])
    assert names["logits"].sum(-1).abs().max() < 1e-4, "a gradient of logits sums to 0 over the vocabulary"


def test_the_snippet_of_confidence() -> None:
    names = run("probe_confidence")
    chosen, rejected = names["scored"].reward.chunk(2)
    torch.testing.assert_close(names["scored"].confidence, torch.sigmoid(7.5 * (chosen - rejected)).detach())
    assert names["probes"].weight.grad.abs().sum() > 0


def test_the_snippet_of_backends(capsys: pytest.CaptureFixture[str]) -> None:
    run("use_backend")
    assert "reference  active: plain PyTorch" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["linear_logprob", "logprob", "pool_last_token", "preference_loss", "sequence_sum"])
def test_what_the_page_calls_refused_is(op: str) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    labels, zeros = torch.randint(4, (2, 3)), torch.zeros(4)
    calls = {
        "linear_logprob": lambda x: ops.linear_logprob(x, torch.eye(4), labels),
        "logprob": lambda x: ops.logprob(x, labels),
        "pool_last_token": lambda x: ops.pool_last_token([x], torch.tensor([0, 2])),
        "preference_loss": lambda x: ops.preference_loss(x[0, 0], x[0, 1], zeros, zeros, beta=1.0).loss,
        "sequence_sum": lambda x: ops.sequence_sum(x.flatten(), cu_seqlens=torch.tensor([0, 24])),
    }
    (first,) = torch.autograd.grad(calls[op](x).square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second derivative|once_differentiable|autograd"):
        torch.autograd.grad(first.sum(), x)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: calls[op](x).sum())(x.detach())
