"""Reference log-probabilities, computed once by a forward-only pass and cached by the content they depend on.

Shape suffixes: B sequences of a batch, T padded length, N scored tokens.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from reprdpo import costs, files, heads, models, ops
from reprdpo.data import ResponseCollator, length_grouped_batches

_FORMAT = "1"
_CHUNK_TOKENS = 1 << 18


def reference_logps(
    model: nn.Module,
    tokenized: Dataset,
    *,
    pad_token_id: int,
    batch_size: int = 16,
    cache_dir: str | Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Dataset:
    """Add ``ref_chosen_logps`` and ``ref_rejected_logps`` (float32, log pi_ref(y | x) summed over the response).

    The pass goes over sequences sorted by length, forward only. With ``cache_dir``, finished chunks of about a
    quarter of a million tokens are kept, so that a killed run goes on where it stopped, and the whole result is found
    again by the hash of the model's weights and of the tokens.

    Args:
        model: the reference policy; put into evaluation mode for the pass.
        tokenized: columns ``{chosen,rejected}_input_ids`` and ``{chosen,rejected}_response_start``.
        pad_token_id: any token id; it fills masked positions.
        batch_size: sequences a forward.
        autocast_dtype: the dtype training autocasts to, if it does, so that policy and reference round alike.
    """
    rows = [
        {"input_ids": ids, "response_start": start}
        for side in ("chosen", "rejected")
        for ids, start in zip(tokenized[f"{side}_input_ids"], tokenized[f"{side}_response_start"], strict=True)
    ]
    folder = None
    if cache_dir is not None:
        precision = "plain" if autocast_dtype is None else str(autocast_dtype).removeprefix("torch.")
        folder = Path(cache_dir) / f"{models.model_fingerprint(model)}-{_rows_hash(rows)}-{precision}"
    logps = _cached(folder, "logps")
    if logps is None or len(logps) != len(rows):
        device = next(model.parameters()).device
        rounding = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        with _evaluating(model), torch.no_grad(), rounding:
            logps = _sequence_logps(model, rows, pad_token_id, batch_size, folder, progress)
    chosen, rejected = logps.chunk(2) if rows else (logps, logps)
    columns = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    for name, values in columns.items():
        tokenized = tokenized.remove_columns(name) if name in tokenized.column_names else tokenized
        tokenized = tokenized.add_column(name, values.numpy())
    return tokenized


def batch_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probs [B] float32 of a batch of :class:`~reprdpo.data.ResponseCollator`."""
    labels_BT, scored_N = batch["labels"], batch["scored_index"]
    logps_BT = heads.token_logps(model, batch)
    costs.count(models.forward_flop(model, labels_BT.numel(), scored=len(scored_N)))
    num_rows, length = labels_BT.shape
    return ops.sequence_sum(
        logps_BT.flatten()[scored_N],
        sequence_ids=torch.div(scored_N, length, rounding_mode="floor"),
        num_sequences=num_rows,
    )


def _sequence_logps(
    model: nn.Module,
    rows: list[dict[str, Any]],
    pad_token_id: int,
    batch_size: int,
    folder: Path | None,
    progress: bool,
) -> Tensor:
    device = next(model.parameters()).device
    collate = ResponseCollator(pad_token_id)
    lengths = [len(row["input_ids"]) for row in rows]
    result = torch.full((len(rows),), float("nan"))
    bar = tqdm(total=len(rows), desc="reference log-probs", unit="seq", disable=not progress, leave=False, delay=1)
    with bar:
        for number, chunk in enumerate(_chunks(length_grouped_batches(lengths, batch_size), lengths)):
            name = f"chunk-{batch_size}-{number:06d}"
            values = _cached(folder, name)
            if values is None:
                batches = [collate([rows[index] for index in batch]) for batch in chunk]
                on_device = [batch_logps(model, {k: v.to(device) for k, v in batch.items()}) for batch in batches]
                values = torch.cat(on_device).float().cpu()
                _store(folder, name, values)
            indices = [index for batch in chunk for index in batch]
            result[torch.tensor(indices)] = values
            bar.update(len(indices))
    _store(folder, "logps", result)
    if folder is not None:
        for path in folder.glob("chunk-*.safetensors"):
            path.unlink(missing_ok=True)
    return result


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


def _rows_hash(rows: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for row in rows:
        digest.update(np.array([len(row["input_ids"]), row["response_start"]], dtype=np.int64).tobytes())
        digest.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
