"""A judge's causal LM: its tokenizer read at once, its weights when the first response waits to be judged.

Shape suffixes: B sequences, T padded length, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from reprdpo.data import Message, length_grouped_batches, pad_sequences
from reprdpo.errors import UserError, first_line
from reprdpo.files import content_hash, looks_local
from reprdpo.models import accelerator, load_causal_lm, load_tokenizer

LONGEST = 8192  # tokens of a judge's prompt, where neither the model nor the user sets a lower limit

_SCORED_STEPS = 4  # a verdict's first word stands among them

_HASHED = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class Generated:
    """Greedy tokens of one row, the end-of-sequence token too, and the first steps' log-probabilities [S, V]."""

    tokens: list[int]
    logps: Tensor


class LocalLM:
    """A causal LM on disk that continues prompts greedily, by batches of like length.

    Args:
        where: folder, or hub name, with a configuration, a tokenizer and safetensors.
        batch_size: prompts a forward.
        max_length: tokens of a prompt and its continuation; None is what the model holds, at most :data:`LONGEST`.

    Raises:
        UserError: no such folder, no tokenizer, another architecture, pickled weights, or a limit the model exceeds.
    """

    def __init__(self, where: str, *, batch_size: int = 16, max_length: int | None = None) -> None:
        self.where = where
        self.folder = judge_folder(where)
        self.config = judge_config(self.folder, where, "ForCausalLM")
        self.tokenizer = load_tokenizer(self.folder)
        self.batch_size = batch_size
        self.max_length = prompt_limit(self.config, max_length, where)
        self._begins = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: the special tokens in it as such, one BOS where the tokenizer puts one."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        # Llama Guard 3's published template has a space before its own BOS, which therefore stands second.
        return [bos, *ids] if self._begins and bos not in ids[:2] else ids

    def render(self, messages: Sequence[Message], **options: bool) -> str:
        """The chat template's text of ``messages``; :class:`UserError` where the tokenizer has none."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.where}: the tokenizer has no chat template, which holds this judge's prompt; "
                "put the published tokenizer_config.json (or chat_template.jinja) beside the model"
            )
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    def generate(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, *, scored: bool = False
    ) -> Iterator[list[tuple[int, Generated]]]:
        """Greedy continuations, a batch at a time: each row's place and at most ``max_new_tokens`` tokens.

        ``scored`` keeps the log-probabilities of the first steps.
        """
        for batch in length_grouped_batches([len(row) for row in rows], self.batch_size):
            found = self._continue([rows[place] for place in batch], max_new_tokens, scored)
            yield list(zip(batch, found, strict=True))

    def text(self, tokens: Sequence[int]) -> str:
        """What a continuation says, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def fingerprint(self) -> str:
        """A hash of the folder's files."""
        return folder_fingerprint(self.folder)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, on the accelerator where there is one."""
        return load_causal_lm(self.folder, device=accelerator())

    @torch.inference_mode()
    def _continue(self, rows: Sequence[Sequence[int]], max_new_tokens: int, scored: bool) -> list[Generated]:
        pad, ends = self.tokenizer.pad_token_id, self._ends()
        ids_BT, mask_BT = (part.to(self.model.device) for part in pad_sequences(rows, pad, side="left"))
        found = self.model.generate(
            ids_BT,
            attention_mask=mask_BT,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=pad,
                bos_token_id=self.tokenizer.bos_token_id,
                return_dict_in_generate=True,
                output_logits=scored,
            ),
        )
        steps = found.logits[:_SCORED_STEPS] if scored else []
        logps_BSV = torch.stack(steps, 1).float().log_softmax(-1).cpu() if steps else torch.empty(len(rows), 0, 0)
        generated = []
        for row, tokens in enumerate(found.sequences[:, ids_BT.shape[1] :].tolist()):
            end = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
            generated.append(Generated(tokens[:end], logps_BSV[row, :end]))
        return generated

    def _ends(self) -> list[int]:
        """Every token that ends a turn: the tokenizer's and the generation configuration's."""
        configured = self.model.generation_config.eos_token_id
        ends = [configured] if isinstance(configured, int) else list(configured or [])
        return sorted({self.tokenizer.eos_token_id, *ends})


def judge_folder(where: str) -> Path:
    """The folder a judge lies in; one on the hub is fetched.

    Raises:
        UserError: no such folder or repository, or no safetensors in it.
    """
    folder = Path(where).expanduser()
    if not looks_local(where):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(where, allow_patterns=list(_HASHED)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = first_line(error)
            raise UserError(f"judge {where!r}: is no folder here and could not be fetched ({reason})") from None
    if not folder.is_dir():
        raise UserError(f"judge {where!r}: no such folder; give the folder of the judge's model (with config.json)")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"judge {where!r}: holds no *.safetensors; pickled weights are not read, see docs/judges.md")
    return folder


def judge_config(folder: Path, where: str, kind: str) -> PretrainedConfig:
    """The model's configuration; :class:`UserError` where there is none, or its architecture is not a ``kind``."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"judge {where!r}: no configuration: {first_line(error)}") from None
    found = config.architectures or []
    if found and not any(name.endswith(kind) for name in found):
        raise UserError(f"judge {where!r}: is a {found[0]}; this judge needs a model whose name ends in {kind}")
    return config


def prompt_limit(config: PretrainedConfig, wanted: int | None, where: str) -> int:
    """Tokens that fit a judge; :class:`UserError` for a wish beyond the model's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
    if wanted is not None and not 0 < wanted <= positions:
        raise UserError(f"judge {where!r}: max_length is {wanted}; the model holds 1 to {positions} tokens")
    return wanted or min(positions, LONGEST)


def folder_fingerprint(folder: Path) -> str:
    """A hash of what lies in a model's folder: configuration, tokenizer, chat template and weights."""
    files = sorted({file for pattern in _HASHED for file in folder.glob(pattern)})
    return _hash_of(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _hash_of(files: tuple[tuple[str, int, int], ...]) -> str:
    """Size and time stand in the key so that weights are read once a process, unless they change."""
    return content_hash(*(value for name, _, _ in files for value in (Path(name).name, Path(name))))
