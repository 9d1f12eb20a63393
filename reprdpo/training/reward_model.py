"""A Bradley-Terry reward model of the policy's size: what the online baseline scores its samples with.

Shape suffixes: B sequences, P pairs (2P = B: all chosen, then all rejected), T padded length, D hidden size.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from reprdpo import costs, files, models, ops
from reprdpo.data import (
    PreferenceCollator,
    ResponseCollator,
    Text,
    TokenizeConfig,
    length_grouped_batches,
    to_device,
    tokenize_nonempty,
    tokenize_preferences,
)
from reprdpo.errors import UserError
from reprdpo.training.base import BaseTrainer, padding_id
from reprdpo.training.checkpoint import last_checkpoint
from reprdpo.training.config import RewardModelConfig
from reprdpo.training.metrics import MetricWindow

_HEAD_FILE = "reward_head.safetensors"


class BradleyTerryRewardModel(nn.Module):
    """A decoder and a linear head without bias on the last token's final hidden state: one number a sequence."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config
        self.head = nn.Linear(decoder.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel | str | Path) -> Self:
        """Start from a copy of a causal LM's decoder; the head starts at 0, so that every reward does."""
        causal_lm = models.load_causal_lm(model) if isinstance(model, (str, Path)) else copy.deepcopy(model)
        found: Any = models.decoder(causal_lm)
        return cls(found).to(next(causal_lm.parameters()).device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards [B] float32 of ``input_ids`` [B, T], read at the last position that is not padding."""
        hidden_BTD = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        if not self.training:
            costs.count(2 * models.matmul_parameters(self.decoder) * input_ids.numel())
        rows = torch.arange(len(input_ids), device=input_ids.device)
        last_BD = hidden_BTD[rows, ops.last_token_index(attention_mask)]
        return self.head(last_BD.to(self.head.weight.dtype)).squeeze(-1).float()

    @torch.no_grad()
    def score(self, rows: Sequence[dict[str, Any]], *, batch_size: int = 64) -> list[float]:
        """Rewards of tokenised rows (``input_ids``, ``response_start``), in their order."""
        collate = ResponseCollator(0)  # any token serves as padding: it is masked
        order: list[int] = []
        scores: list[Tensor] = []
        with models.evaluating(self):
            for batch in length_grouped_batches([len(row["input_ids"]) for row in rows], batch_size):
                inputs = to_device(collate([rows[index] for index in batch]), self.head.weight.device)
                scores.append(self(inputs["input_ids"], inputs["attention_mask"]))
                order.extend(batch)
        values = torch.cat(scores).cpu().tolist() if scores else []
        return [value for _, value in sorted(zip(order, values, strict=True))]

    def score_responses(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Text],
        responses: Sequence[Text],
        config: TokenizeConfig,
        *,
        batch_size: int = 64,
    ) -> list[float]:
        """Rewards of responses, each to its prompt, in order; NaN for an empty one."""
        places, rows = tokenize_nonempty(tokenizer, prompts, responses, config)
        rewards = [float("nan")] * len(responses)
        for place, value in zip(places, self.score(rows, batch_size=batch_size), strict=True):
            rewards[place] = value
        return rewards

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the decoder as transformers does, and the head beside it."""
        folder = Path(folder)
        with files.disk_errors(folder):
            self.decoder.save_pretrained(folder)
        with files.atomic_path(folder / _HEAD_FILE) as temporary:
            save_file({"weight": self.head.weight.detach().cpu().contiguous()}, temporary)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what :meth:`save_pretrained` wrote, in evaluation mode; UserError where it is no reward model."""
        path = Path(folder) / _HEAD_FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {_HEAD_FILE}; give the folder of a trained reward model")
        model = cls(AutoModel.from_pretrained(folder, dtype="auto"))
        model.head.load_state_dict(load_file(path))
        return model.eval()


class RewardModelTrainer(BaseTrainer):
    """Minimise -log sigma(r_c - r_r - m) (Bradley and Terry 1952, with a margin)."""

    args: RewardModelConfig

    def __init__(self, model: BradleyTerryRewardModel, args: RewardModelConfig, **kwargs: Any) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(padding_id(kwargs.get("processing_class"), model)),
            **kwargs,
        )
        self._window = MetricWindow()

    def _sizes(self) -> tuple[int, int]:
        return models.matmul_parameters(self.model.decoder), 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss over the batch's pairs."""
        chosen_P, rejected_P = model(inputs["input_ids"], inputs["attention_mask"]).chunk(2)
        losses_P = -F.logsigmoid(chosen_P - rejected_P - self.args.margin)
        if model.training:
            values = {"loss": losses_P, "accuracy": chosen_P > rejected_P, "margin": chosen_P - rejected_P}
            self._window.add(values, num_pairs=len(losses_P))
        loss = losses_P.mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._window.drain(self.accelerator.gather)}
        super().log(logs, start_time)


def train_reward_model(
    model: PreTrainedModel | str | Path,
    dataset: Dataset,
    args: RewardModelConfig,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> BradleyTerryRewardModel:
    """Train a reward model started from ``model``'s decoder, going on from the last checkpoint if there is one.

    Args:
        model: a causal LM or its folder; it is copied, not changed.
        dataset: preference data, raw or tokenised.
    """
    if "chosen_input_ids" not in dataset.column_names:
        if processing_class is None:
            raise UserError("processing_class: the preference data is text; pass the tokenizer")
        dataset = tokenize_preferences(
            dataset, processing_class, args.tokenize_config(), where="the reward model's data"
        )
    reward_model = BradleyTerryRewardModel.from_causal_lm(model)
    trainer = RewardModelTrainer(reward_model, args, train_dataset=dataset, processing_class=processing_class)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
    return reward_model.eval()
