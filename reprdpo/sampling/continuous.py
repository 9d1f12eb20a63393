"""Sampling by transformers' continuous batching: a finished response makes room for the next one at once."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from reprdpo import costs
from reprdpo.errors import UserError
from reprdpo.models import evaluating, forward_flop
from reprdpo.sampling.engine import LocalEngine, Response, SamplingConfig, check_finite, pick_tokens, uniforms

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig

try:
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
except ImportError:
    _SUPPORTED = False
    ContinuousBatchingLogitsProcessor = object
else:
    _SUPPORTED = hasattr(ContinuousBatchingManager, "pause")

_FLASH_PAGE, _MASKED_PAGE = 256, 32  # tokens a page of the cache; flash-attn's kernels take multiples of 256
_FLASH_TOKENS, _MASKED_TOKENS = 4096, 512  # tokens a forward; without flash-attn a mask holds them by the whole cache


class ContinuousBatchingEngine(LocalEngine):
    """An :class:`~reprdpo.sampling.engine.Engine` on transformers' paged cache and continuous batching.

    ``batch_size`` sequences are decoded together, and the next one enters where one ends. Tokens are picked by the
    streams and the rule of :class:`~reprdpo.sampling.TransformersEngine`, so both engines give the same texts
    but for rounding, and one goes on with a file of the other. flash-attn is used where it is installed and the model
    is in half precision; the other attentions read the whole cache through a mask, which suits small models.

    Raises:
        UserError: a transformers without what this needs.
    """

    independent = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_supported()
        super().__init__(model, tokenizer)

    def _responses(
        self, encoded: list[list[int]], prompt_ids: Sequence[int], config: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Generation rests while the caller holds what was yielded, so that the caller can use the model."""
        if not encoded:
            return
        copies = 1 if config.temperature == 0 else config.num_responses
        self._check_logits(encoded[0])
        finished: dict[int, list[list[int]]] = {}
        following = 0
        with self._manager(encoded, prompt_ids, config, copies) as manager:
            for place, copy, tokens in self._results(manager, len(encoded) * copies):
                finished.setdefault(place, [[]] * copies)[copy] = tokens
                costs.count(forward_flop(self.model, len(encoded[place]) + len(tokens), scored=len(tokens)))
                while following in finished and all(finished[following]):
                    responses = self._decode(encoded[following], finished.pop(following))
                    with manager.pause():
                        yield following, responses * (config.num_responses // copies)
                    following += 1

    @contextlib.contextmanager
    def _manager(
        self, encoded: list[list[int]], ids: Sequence[int], config: SamplingConfig, copies: int
    ) -> Iterator["ContinuousBatchingManager"]:
        """A manager at work on every response, under names that :meth:`_results` reads."""
        settings = GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=sorted(self._end_ids)
        )
        was_training, manager = self.model.training, None
        try:
            with _refused():
                manager = self.model.init_continuous_batching(
                    settings, self._cache_config(max(map(len, encoded)), config)
                )
                if config.temperature > 0:
                    manager.logit_processor = _picking(encoded, ids, config, copies)
                manager.start()
            for place, tokens in enumerate(encoded):
                for copy in range(copies):
                    manager.add_request(tokens, request_id=_name(place, copy), max_new_tokens=config.max_new_tokens)
            yield manager
        finally:
            if manager is not None:
                manager.stop(block=True, hard_stop=True)
                manager.destroy()
            self.model.train(was_training)

    def _results(self, manager: "ContinuousBatchingManager", number: int) -> Iterator[tuple[int, int, list[int]]]:
        """Place, copy and tokens of every response, as they end."""
        left = number
        while left:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise _cannot_run(manager.background_thread_status.fatal_error or "it stopped early")
                continue
            if result.error is not None:
                raise _cannot_run(manager.background_thread_status.fatal_error or result.error)
            if result.is_finished():
                left -= 1
                yield (*_place(result.request_id), list(result.generated_tokens))

    def _cache_config(self, longest: int, config: SamplingConfig) -> "ContinuousBatchingConfig":
        """Room for ``batch_size`` of the longest sequences: what is left of the memory is the reward's."""
        from transformers import ContinuousBatchingConfig

        half = self.model.dtype in (torch.float16, torch.bfloat16)
        # Only what is installed: transformers would fetch kernels from the hub else.
        flash = half and (is_flash_attn_2_available() or is_flash_attn_3_available())
        page = _FLASH_PAGE if flash else _MASKED_PAGE
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=config.batch_size * math.ceil((longest + config.max_new_tokens) / page),
            max_batch_tokens=max(config.batch_size, _FLASH_TOKENS if flash else _MASKED_TOKENS),
            max_requests_per_batch=config.batch_size,
            auto_switch_to_flash=flash,
            seed=0,  # the picks have streams of their own; without it the global state would be reseeded at random
        )

    @torch.inference_mode()
    def _check_logits(self, tokens: list[int]) -> None:
        """One forward ahead: in the thread of the manager nobody would look."""
        with evaluating(self.model):
            ids = torch.tensor([tokens], device=self.model.device)
            check_finite(self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float())


class _PickProcessor(ContinuousBatchingLogitsProcessor):
    """Leaves one token possible, picked by its response's uniform for this step.

    The steps are read from how far each sequence has come, so that one set aside for want of room picks the same
    tokens again.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, uniform: dict[str, np.ndarray], config: SamplingConfig) -> None:
        self._uniform, self._config = uniform, config

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(torch.full_like(int32_tensor, 0.5, dtype=torch.float32).view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Float32 [requests] as int32, the type of the storage."""
        values = [self._next(request.state) for request in requests_with_new_token]
        return torch.tensor(values, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        uniform_B = tensor_arg[: len(scores)].view(torch.float32).double()
        picked_B1 = pick_tokens(scores, uniform_B, self._config)[:, None]
        return torch.full_like(scores, float("-inf")).scatter_(1, picked_B1, 0.0)

    def _next(self, state: Any) -> float:
        stream = self._uniform.get(state.request_id)
        if stream is None:  # warm-up
            return 0.5
        prompt_length = state._true_initial_tokens or len(state.initial_tokens)
        # Beyond the end is a forward already under way when the last token came.
        return float(stream[min(state.position_offset - prompt_length, len(stream) - 1)])


def _picking(
    encoded: list[list[int]], ids: Sequence[int], config: SamplingConfig, copies: int
) -> "ContinuousBatchingLogitsProcessorList":
    below_one = np.nextafter(np.float32(1), np.float32(0))
    streams = {
        _name(place, copy): np.minimum(
            uniforms(config.seed, ids[place], copy, config.max_new_tokens).astype(np.float32), below_one
        )
        for place in range(len(encoded))
        for copy in range(copies)
    }
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_PickProcessor(streams, config)]))
    processors.tensors_required = 1
    return processors


def check_supported() -> None:
    """Raise a UserError where the installed transformers lacks what the engine uses."""
    if not _SUPPORTED:
        import transformers

        raise UserError(
            f"engine continuous: transformers {transformers.__version__} has no continuous batching that can pause; "
            "upgrade it, or use the engine transformers"
        )


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        raise _cannot_run(error) from error


def _cannot_run(why: object) -> UserError:
    text = " ".join(str(why).split())[:300] or type(why).__name__
    cure = "lower batch_size, or use the engine transformers"
    return UserError(f"engine continuous: cannot run this model here ({text}); {cure}")


def _name(place: int, copy: int) -> str:
    return f"{place}/{copy}"


def _place(name: str) -> tuple[int, int]:
    place, copy = name.split("/")
    return int(place), int(copy)
