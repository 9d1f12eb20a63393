"""Reference log-probabilities, computed once by a forward-only pass and cached by the content they depend on.

Several processes share the pass: each takes every so-manieth chunk and all get the whole result.

Shape suffixes: P pairs, S = 2P sequences (all chosen, then all rejected), N scored tokens.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from reprdpo import costs, files, heads, models, ops
from reprdpo.data import PackingCollator, PreferenceCollator, length_grouped_batches, to_device
from reprdpo.data.packing import SIDES
from reprdpo.training.batches import RowLengths, row_lengths
from reprdpo.training.layout import loss_inputs, model_inputs

_FORMAT = "2"
_CHUNK_TOKENS = 1 << 18
_HASHED_ROWS = 10_000
_COLUMNS = ("input_ids", "response_start")


def reference_logps(
    model: nn.Module,
    tokenized: Dataset,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    collator: PackingCollator | None = None,
    fingerprint: str | None = None,
    lengths: RowLengths | None = None,
    progress: bool = True,
) -> Dataset:
    """Add ``ref_chosen_logps`` and ``ref_rejected_logps`` (float32, log pi_ref(y | x) summed over the response).

    The pass goes over pairs sorted by length, forward only. With ``cache_dir``, finished chunks of about a quarter of a
    million tokens are kept, so that a killed run goes on where it stopped, and the whole result is found again by the
    hash of the model's weights and of the tokens, by precision and by layout, and mapped from its file. Rows are read
    as they are needed, so that data in files stay there. Under torch.distributed every process calls this with the same
    arguments.

    Args:
        model: the reference policy; put into evaluation mode for the pass. Under peft it is the base model.
        tokenized: columns ``{chosen,rejected}_input_ids`` and ``{chosen,rejected}_response_start``.
        pad_token_id: any token id; it fills masked positions.
        batch_size: sequences a forward, two a pair.
        autocast_dtype: the dtype training autocasts to, if it does, so that policy and reference round alike.
        device: where the pass runs (default: where the model is); the model is moved there and back.
        collator: that of training, if it is to be computed in the same layout, which in half precision rounds in a way
            of its own (default: padded).
        fingerprint: the model's :func:`~reprdpo.models.base_fingerprint`, where it is known.
        lengths: the pairs', where they are known.
    """
    rows = _Rows(tokenized, lengths)
    if collator is None:
        collator = PackingCollator(PreferenceCollator(pad_token_id), ("padded",))
    folder = None
    if cache_dir is not None:
        dtypes = (next(model.parameters()).dtype, autocast_dtype or "plain")
        numbers = "-".join([*(str(dtype).removeprefix("torch.") for dtype in dtypes), *collator.layouts])
        folder = Path(cache_dir) / f"{fingerprint or models.base_fingerprint(model)}-{rows.hash()}-{numbers}"
    logps = _cached(folder, "logps")
    home = next(model.parameters()).device
    if not _on_all(logps is not None and len(logps) == 2 * len(rows), device or home):
        rounding = torch.autocast((device or home).type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        with _evaluating(model, device or home), torch.no_grad(), rounding:
            logps = _all_logps(model, rows, collator, max(batch_size // 2, 1), folder, progress)
    assert logps is not None
    chosen, rejected = logps.chunk(2) if len(rows) else (logps, logps)
    columns = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    for name, values in columns.items():
        tokenized = tokenized.remove_columns(name) if name in tokenized.column_names else tokenized
        tokenized = tokenized.add_column(name, values.numpy())
    return tokenized


def batch_logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed log-probs [S] float32 of a batch of :class:`~reprdpo.data.PackingCollator`, in whichever layout."""

    def at_head(hidden: Tensor, head: heads.HeadSpec) -> Tensor:
        inputs = loss_inputs(hidden, batch)
        sequences = {name: inputs.pop(name) for name in ("sequence_ids", "num_sequences") if name in inputs}
        logps = ops.linear_logprob(**inputs, **head._asdict())
        assert isinstance(logps, Tensor)
        if sequences:
            return ops.sequence_sum(logps, **sequences)
        num_sequences, length = logps.shape
        scored_N = batch["scored_index"]
        ids_N = torch.div(scored_N, length, rounding_mode="floor")
        return ops.sequence_sum(logps.flatten()[scored_N], sequence_ids=ids_N, num_sequences=num_sequences)

    costs.count(models.forward_flop(model, batch["input_ids"].numel(), scored=len(batch["scored_index"])))
    return heads.run_at_head(model, at_head, **model_inputs(model, batch))


def _all_logps(
    model: nn.Module,
    rows: "_Rows",
    collator: PackingCollator,
    batch_size: int,
    folder: Path | None,
    progress: bool,
) -> Tensor:
    """[2P]: of all chosen, then of all rejected."""
    device = next(model.parameters()).device
    process, processes = _rank()
    result_2P = torch.zeros(2, len(rows))
    bar = tqdm(total=len(rows), desc="reference log-probs", unit="pair", disable=not progress, leave=False, delay=1)
    with bar:
        for number, chunk in enumerate(_chunks(length_grouped_batches(rows.lengths, batch_size), rows.lengths)):
            indices = [index for batch in chunk for index in batch]
            bar.update(len(indices))
            if number % processes != process:
                continue
            name = f"chunk-{batch_size}-{number:06d}"
            values_2C = _cached(folder, name)
            if values_2C is None:
                batches = (collator([rows[index] for index in batch]) for batch in chunk)
                on_device = [batch_logps(model, to_device(batch, device)).view(2, -1) for batch in batches]
                values_2C = torch.cat(on_device, dim=1).float().cpu()
                _store(folder, name, values_2C)
            result_2P[:, torch.tensor(indices)] = values_2C
    if processes > 1:  # one process has a number, the others have 0
        result_2P = result_2P.to(device)
        dist.all_reduce(result_2P)
        result_2P = result_2P.cpu()
    result = result_2P.flatten()
    if process == 0:
        _store(folder, "logps", result)
        for path in folder.glob("chunk-*.safetensors") if folder is not None else ():
            path.unlink(missing_ok=True)
    return result


class _Rows:
    """Tokenised pairs, each read when it is asked for."""

    def __init__(self, tokenized: Dataset, lengths: RowLengths | None) -> None:
        self._pairs = tokenized.select_columns([f"{side}_{name}" for side in SIDES for name in _COLUMNS])
        found = lengths or row_lengths(self._pairs)
        assert found is not None
        self.lengths: list[int] = found.tokens.tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pair_id": index, **self._pairs[index]}

    def hash(self) -> str:
        """Of every token and response start."""
        digest = hashlib.sha256(_FORMAT.encode())
        for batch in self._pairs.with_format("arrow").iter(batch_size=_HASHED_ROWS):
            for side in SIDES:
                ids = batch[f"{side}_input_ids"].combine_chunks()
                for column in (pc.list_value_length(ids), batch[f"{side}_response_start"], ids.flatten()):
                    digest.update(column.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


def _rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def _on_all(here: bool, device: torch.device) -> bool:
    """Whether ``here`` is true on every process."""
    if _rank()[1] == 1:
        return here
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _chunks(batches: Sequence[list[int]], lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Consecutive batches of about ``_CHUNK_TOKENS`` tokens together."""
    chunk: list[list[int]] = []
    tokens = 0
    for batch in batches:
        chunk.append(batch)
        tokens += sum(lengths[index] for index in batch)
        if tokens >= _CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _cached(folder: Path | None, name: str) -> Tensor | None:
    if folder is None or not (folder / f"{name}.safetensors").is_file():
        return None
    return load_file(folder / f"{name}.safetensors")["logps"]


def _store(folder: Path | None, name: str, values: Tensor) -> None:
    if folder is not None:
        with files.atomic_path(folder / f"{name}.safetensors") as temporary:
            save_file({"logps": values}, temporary)


@contextlib.contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The base model in evaluation mode on ``device``; all as it was afterwards."""
    home = next(model.parameters()).device
    adapters: Any = getattr(model, "disable_adapter", contextlib.nullcontext)
    if device != home:  # not even asked of a quantised model, which may refuse to move
        model.to(device)
    try:
        with models.evaluating(model), adapters():
            yield
    finally:
        if device != home:
            model.to(home)
