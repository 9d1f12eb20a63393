"""What a batch of pairs costs beyond the policy's own step (the paper's Figure 7), by where the reward comes from.

P pairs, T tokens a sequence (half of them prompt), L layers, D hidden size, N parameters that multiply a token.
Weights are random: time does not depend on their values. Models too large for the device are counted, not measured.
"""

import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.device import PeakMemory, device_name, free_bytes, rounds_for, seconds
from benchmarks.harness import DEVICE, Work, count, measure
from reprdpo import costs, ops
from reprdpo.reward import HiddenStateTap, HybridReward, RewardUpdater
from reprdpo.sampling.transformers_engine import growing_cache

P = 4 if DEVICE == "cuda" else 1
DTYPE = torch.bfloat16
LENGTHS = (64, 512, 4096)
BUDGET_SECONDS = 0.5
DECODED = 8  # tokens a measurement of decoding draws


@dataclass(frozen=True)
class Decoder:
    """The shape of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 32000

    @property
    def parameters(self) -> int:
        """N: those that multiply every token, the head's included."""
        attention = 2 * self.hidden**2 * (1 + self.key_value_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate)) + self.vocabulary * self.hidden

    def model(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=2 * max(LENGTHS),
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with torch.device(DEVICE):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)


DECODERS = {
    "sandbox": Decoder(96, 256, 8, 4, 4, 1024),
    "cpu": Decoder(1024, 2816, 24, 16, 16),
    "llama2-7b": Decoder(4096, 11008, 32, 32, 32),
    "llama2-13b": Decoder(5120, 13824, 40, 40, 40),
    "llama2-70b": Decoder(8192, 28672, 80, 64, 8),
}
# What a device is asked to run; on a CPU the model-sized work of long sequences would take minutes a row.
MEASURED = {"cpu": {"sandbox": 512, "cpu": 512}, "cuda": {"llama2-7b": 4096, "llama2-13b": 512}}[DEVICE]
# The groups that the README shows.
CLAIMED = {("cpu", 512), ("llama2-7b", 512), ("llama2-70b", 512)}
STATES_MEASURED = ("sandbox", "cpu") if DEVICE == "cpu" else ("llama2-7b", "llama2-13b")


@pytest.fixture(scope="module")
def policy() -> Iterator[Callable[[str], LlamaForCausalLM]]:
    """The model of a name, one at a time."""
    held: dict[str, LlamaForCausalLM] = {}

    def build(name: str) -> LlamaForCausalLM:
        if name not in held:
            held.clear()
            gc.collect()
            if (needed := 2 * DECODERS[name].parameters * DTYPE.itemsize) > free_bytes(DEVICE):
                pytest.skip(f"{name} and its gradients need {needed / 1e9:.3g} GB")
            held[name] = DECODERS[name].model()
        return held[name]

    yield build
    held.clear()


def random_ids(sequences: int, length: int, shape: Decoder) -> Tensor:
    return torch.randint(shape.vocabulary, (sequences, length), device=DEVICE)


def random_reward(shape: Decoder, seed: int = 0) -> HybridReward:
    generator = torch.Generator().manual_seed(seed)
    L, D = shape.layers, shape.hidden
    weights = (torch.randn(L, D, generator=generator) / D for _ in range(2))
    return HybridReward(next(weights), torch.zeros(L), next(weights), torch.zeros(L)).to(DEVICE)


def states_of(shape: Decoder, length: int, seed: int) -> list[Tensor]:
    """What the training forward leaves: the L layers' outputs for all chosen, then all rejected."""
    torch.manual_seed(seed)
    return [torch.randn(2 * P, length, shape.hidden, device=DEVICE, dtype=DTYPE) for _ in range(shape.layers)]


def score_and_update(states: list[Tensor], index: Tensor, updater: RewardUpdater) -> Tensor:
    """The trainer's own path: rewards and gamma, one step of the reward."""
    gamma = updater.accumulate(states, index).confidence
    updater.apply()
    return gamma


def exact_confidence(states: list[Tensor], index: Tensor, updater: RewardUpdater) -> Tensor:
    reward = updater.reward
    parameters = [p.detach().double() for p in reward.parameters()]
    pooled = torch.stack([state[torch.arange(len(index)), index] for state in states], dim=1).double()
    rewards = ops.probe_reward(pooled, None, *parameters).reward
    return torch.sigmoid(reward.alpha * (rewards[:P] - rewards[P:]))


def axes(model: str, length: int) -> dict[str, int]:
    shape = DECODERS[model]
    return {"T": length, "D": shape.hidden, "L": shape.layers, "N": shape.parameters, "P": P}


def reward_bytes(shape: Decoder) -> int:
    """Each pooled row once; of each parameter, its gradient and Adam's two moments, one reading and one writing."""
    return 2 * P * shape.layers * shape.hidden * DTYPE.itemsize + 2 * shape.layers * shape.hidden * 4 * 7


def measure_reprdpo(benchmark: BenchmarkFixture, model: str, length: int, **columns: Any) -> None:
    """Ours, checked against float64 before it is timed."""
    shape = DECODERS[model]

    def make_inputs(seed: int) -> list[Any]:
        index = torch.full((2 * P,), length - 1, device=DEVICE)
        return [states_of(shape, length, seed), index, RewardUpdater(random_reward(shape, seed))]

    measure(
        benchmark,
        score_and_update,
        make_inputs,
        oracle=exact_confidence,
        max_error=1e-4,
        work=Work(bytes=reward_bytes(shape)),
        dtype=DTYPE,
        device=DEVICE,
        needs_bytes=3 * 2 * P * length * shape.hidden * shape.layers * DTYPE.itemsize,
        **columns,
    )
    benchmark.extra_info["flop"] = flop_of("reprdpo", shape, length)


Part = tuple[str, Callable[[], object], float]


def swift_head(shape: Decoder, length: int) -> list[Part]:
    """SWIFT's linear head (arXiv 2505.12225): every token's states of all layers give a reward and a gate."""
    states = states_of(shape, length, seed=0)
    weight = nn.Parameter(torch.randn(shape.layers, shape.hidden, 2, device=DEVICE, dtype=DTYPE) / shape.hidden)
    optimizer = torch.optim.Adam([weight], fused=True)

    def step() -> Tensor:
        out = torch.stack([state @ w for state, w in zip(states, weight, strict=True)]).sum(0).float()
        gate = out[..., 1].sigmoid()
        rewards = (out[..., 0] * gate).sum(1) / gate.sum(1)
        chosen, rejected = rewards.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        weight.grad = torch.autograd.grad(loss, weight)[0]
        optimizer.step()
        return loss

    return [("score and update", step, 1)]


def scoring(model: LlamaForCausalLM, shape: Decoder, length: int, sequences: int) -> Part:
    """A forward of a reward model of the policy's size."""
    ids = random_ids(sequences, length, shape)

    @torch.no_grad()
    def score() -> Tensor:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1, 0]

    return "score", score, 1


def learning(model: LlamaForCausalLM, shape: Decoder, length: int) -> Part:
    """Forward and backward of the reward model on a pair; its optimizer's step is left out, in its favour."""
    ids = random_ids(2, length, shape)

    def update() -> Tensor:
        chosen, rejected = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1, 0].float().chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return "update", update, P


def drawing(model: LlamaForCausalLM, shape: Decoder, length: int, samples: int) -> Iterator[Part]:
    """The prompts read, then T/2 tokens drawn with a cache: a few at the middle length stand for all of them."""
    prompt, batch, middle = length // 2, samples * P, 3 * length // 4
    ids, token = random_ids(P, prompt, shape), random_ids(batch, 1, shape)

    @torch.no_grad()
    def read() -> Tensor:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    yield "read", read, 1
    cache = growing_cache(model, middle + DECODED)
    head_size = shape.hidden // shape.heads
    for layer in range(shape.layers):
        states = torch.zeros(batch, shape.key_value_heads, middle, head_size, device=DEVICE, dtype=DTYPE)
        cache.update(states, states.clone(), layer)

    @torch.no_grad()
    def draw() -> Tensor:
        following = token
        for step in range(DECODED):
            place = torch.full((batch, 1), middle + step, device=DEVICE)
            out = model(
                input_ids=following, position_ids=place, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            following = out.logits[:, -1].argmax(-1, keepdim=True)
        cache.crop(-DECODED)
        return following.float()

    yield "draw", draw, (length - prompt) / DECODED


def policy_step(model: LlamaForCausalLM, shape: Decoder, length: int) -> list[Part]:
    """The policy's own forward and backward, its optimizer's step left out: what the extra is an addition to."""
    ids, reference = random_ids(2, length, shape), torch.zeros(1, device=DEVICE)
    labels = torch.cat([ids[:, 1:], ids.new_full((2, 1), -100)], dim=1)
    labels[:, : length // 2] = -100
    scored = (labels != -100).flatten().nonzero().squeeze(1)

    def step() -> Tensor:
        with HiddenStateTap(model) as tap:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        loss = ops.linear_preference_loss(
            tap.states[-1],
            model.lm_head.weight,
            labels,
            ref_chosen_logp=reference,
            ref_rejected_logp=reference,
            beta=0.1,
            scored_index=scored,
        ).loss
        loss.backward()
        model.zero_grad()
        return loss.detach()

    return [("forward and backward", step, P)]


def parts_of(system: str, model: LlamaForCausalLM | None, shape: Decoder, length: int) -> Iterator[Part]:
    """One after another: who takes the next lets the last go, and with it what it held, such as a cache."""
    if model is None:
        yield from swift_head(shape, length)
    elif system == "the policy's own step":
        yield from policy_step(model, shape, length)
    elif system == "reward model":
        yield scoring(model, shape, length, 2 * P)
    else:
        samples = int(system.split()[1])
        yield from drawing(model, shape, length, samples)
        yield scoring(model, shape, length, samples * P)
        yield learning(model, shape, length)


def flop_of(system: str, shape: Decoder, length: int) -> int:
    """As arXiv 2503.10093 counts: 2 N a token drawn or scored, 6 N a token learned from."""
    N = shape.parameters
    reward = costs.reward_flop(shape.layers, shape.hidden, sequences=2 * P, gradients=True)
    return {
        "reprdpo": reward + costs.reward_step_flop(shape.layers, shape.hidden),
        "SWIFT head": 2 * 4 * shape.layers * shape.hidden * length * 2 * P,
        "reward model": 2 * N * length * 2 * P,
        "online, 2 samples": P * costs.online_flop(N, length),
        "online, 8 samples": P * costs.online_flop(N, length, responses=8),
        "the policy's own step": 6 * N * length * 2 * P,
    }[system]


SYSTEMS = ("reprdpo", "SWIFT head", "reward model", "online, 2 samples", "online, 8 samples", "the policy's own step")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", list(DECODERS))
def test_extra_cost(
    benchmark: BenchmarkFixture, policy: Callable[[str], LlamaForCausalLM], model: str, length: int, system: str
) -> None:
    shape = DECODERS[model]
    benchmark.group = f"extra cost of {P} pair{'s' if P > 1 else ''}, {model}, T={length}"
    columns: dict[str, Any] = {
        "implementation": system,
        "peer": system != "reprdpo",
        "shape": axes(model, length),
        "headline": "claim" if (model, length) in CLAIMED else None,
    }
    on_states = system in ("reprdpo", "SWIFT head")
    flop = flop_of(system, shape, length)
    if not (model in STATES_MEASURED if on_states else length <= MEASURED.get(model, 0)):
        count(benchmark, Work(bytes=0), flop=flop, reason="not measured on this device", **columns)
    elif system == "reprdpo":
        measure_reprdpo(benchmark, model, length, **columns)
    else:
        parts = parts_of(system, None if on_states else policy(model), shape, length)
        time_parts(benchmark, parts, flop=flop, **columns)


def time_parts(benchmark: BenchmarkFixture, parts: Iterable[Part], **columns: Any) -> None:
    """The sum over parts of median time and how often each runs; a result that is not finite fails the row."""
    took: dict[str, float] = {}
    peak = 0
    for name, call, often in parts:
        with PeakMemory(DEVICE) as memory:
            result = call()
        assert isinstance(result, Tensor)
        if not bool(result.isfinite().all()):
            pytest.fail(f"{name}: not finite; not timed")
        peak = max(peak, memory.bytes)
        once = seconds(call, DEVICE)
        rounds = rounds_for(once, BUDGET_SECONDS) if once < BUDGET_SECONDS else 0
        took[name] = often * statistics.median([once, *(seconds(call, DEVICE) for _ in range(min(rounds, 20)))])
    total = sum(took.values())
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(
        columns
        | {
            **dict.fromkeys(("p20_s", "p50_s", "p80_s"), total),
            "parts": took,
            "peak_bytes": peak,
            "bytes": 0,
            "dtype": str(DTYPE).removeprefix("torch."),
            "device": device_name(DEVICE),
            "threads": torch.get_num_threads(),
        }
    )


@pytest.mark.parametrize("epochs", [1, 3, 10])
@pytest.mark.parametrize("model", list(DECODERS))
@pytest.mark.parametrize("system", ["reprdpo", "online, 2 samples"])
def test_whole_run(benchmark: BenchmarkFixture, system: str, model: str, epochs: int) -> None:
    """Counted: a million pairs, gone through ``epochs`` times; ours draws and scores 8 responses a prompt once."""
    shape, pairs, length = DECODERS[model], 1_000_000, 512
    benchmark.group = f"whole run of 1M pairs, {epochs} epoch{'s' if epochs > 1 else ''}, {model}, T={length}"
    once = pairs * 8 * 2 * 2 * shape.parameters * length
    marginal = (
        flop_of(system, shape, length) / P if system == "reprdpo" else costs.online_flop(shape.parameters, length)
    )
    count(
        benchmark,
        Work(bytes=0),
        flop=int(epochs * pairs * marginal + (once if system == "reprdpo" else 0)),
        reason="ours = 8 responses a prompt drawn and scored once (8 x 4 N T) + a reward step a pair; "
        "online = 2 responses drawn, scored and learned from at every visit (20 N T)",
        implementation=system,
        peer=system != "reprdpo",
        shape=axes(model, length) | {"epochs": epochs},
        headline="claim" if model == "llama2-7b" else None,
    )
