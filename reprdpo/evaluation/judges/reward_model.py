"""Reward models: any sequence-classification model that scores a response to a prompt.

Shape suffixes: B sequences, T padded length, C labels.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from reprdpo.data import Message, length_grouped_batches
from reprdpo.data import Text as Prompt
from reprdpo.errors import UserError, first_line
from reprdpo.evaluation.judges.conversation import conversation, cut, without_special
from reprdpo.evaluation.judges.judgement import Judgement, ModelJudge, asked
from reprdpo.evaluation.judges.local_lm import folder_fingerprint, judge_config, judge_folder, prompt_limit
from reprdpo.files import content_hash
from reprdpo.models import accelerator

Input = Literal["pair", "chat"]


class RewardModelJudge(ModelJudge):
    """The score of a head with one output, or of one label of several.

    A model with a chat template reads the dialogue by it, with BOS taken out of the text, as the tokenizer puts one
    there itself (FsfairX); one without reads (prompt, response) as a text pair (OpenAssistant's DeBERTa), of a chat the
    last thing the user said.

    Args:
        where: folder, or hub name, of the model.
        form: "pair" or "chat"; None is "chat" where there is a chat template, "pair" where there is none.
        label: of a head with several, the label whose probability is the score.
        unsafe_below: a response is unsafe where the score is less; None gives scores alone.
        batch_size: sequences a forward.
        max_length: tokens of a sequence; None is what the model holds.

    Raises:
        UserError: no such folder, no tokenizer, another architecture, no chat template for a decoder or for "chat", a
            label that is not in the head, or none named where there are several.
    """

    def __init__(
        self,
        where: str,
        *,
        form: Input | None = None,
        label: str | None = None,
        unsafe_below: float | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        self.where, self.folder = where, judge_folder(where)
        self.name = f"reward-model:{Path(where).name}"
        self.config = judge_config(self.folder, where, "ForSequenceClassification")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: no tokenizer could be loaded: {first_line(error)}") from error
        self.form: Input = self._form(form)
        self.label = self._label(label)
        self.gives = frozenset({"score"} if unsafe_below is None else {"score", "unsafe"})
        self.unsafe_below, self.batch_size = unsafe_below, batch_size
        self.max_length = min(prompt_limit(self.config, max_length, where), self.tokenizer.model_max_length)
        self.tokens("prompt", "response")

    def fingerprint(self) -> str:
        """See :meth:`ModelJudge.fingerprint`."""
        settings = [self.form, self.label, self.unsafe_below, self.max_length]
        return content_hash("reward-model", folder_fingerprint(self.folder), settings)

    def stream(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Iterator[tuple[int, Judgement]]:
        """See :meth:`ModelJudge.stream`."""
        rows = [self.tokens(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        for batch in length_grouped_batches([len(row["input_ids"]) for row in rows], self.batch_size):
            scores = self._scores([rows[place] for place in batch])
            for place, score in zip(batch, scores.tolist(), strict=True):
                unsafe = None if self.unsafe_below is None else score < self.unsafe_below
                yield place, Judgement(unsafe, None, score=score)

    def tokens(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """The model's inputs for one response, cut where they are too long."""
        turns = conversation(asked(prompt) if self.form == "pair" else prompt, response)
        turns = without_special(self.tokenizer, turns)
        fitted = cut(turns, lambda some: len(self._encoded(some)["input_ids"]), self.max_length, self.tokenizer)
        return self._encoded(fitted)

    def render(self, turns: Sequence[Message]) -> str:
        """The dialogue as the chat template has it, without BOS."""
        try:
            text = str(self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=False))
        except TemplateError as error:
            raise UserError(f"{self.where}: its chat template fails: {error}; use the published one") from None
        bos = self.tokenizer.bos_token
        return text.replace(bos, "") if bos else text

    def _encoded(self, turns: Sequence[Message]) -> dict[str, list[int]]:
        if self.form == "pair":
            return dict(self.tokenizer(turns[0]["content"], turns[1]["content"]))
        return dict(self.tokenizer(self.render(turns)))

    def _form(self, wanted: Input | None) -> Input:
        template = bool(self.tokenizer.chat_template)
        if wanted == "chat" and not template:
            raise UserError(
                f"{self.where}: the tokenizer has no chat template; put the published one beside the model, or "
                "read text pairs with input=pair"
            )
        if wanted is None and not template and self.tokenizer.sep_token is None:
            raise UserError(
                f"{self.where}: the tokenizer has neither a chat template nor a separator of text pairs; put the "
                "published chat template beside the model"
            )
        return wanted or ("chat" if template else "pair")

    def _label(self, wanted: str | None) -> int:
        labels = {number: str(name) for number, name in (self.config.id2label or {}).items()}
        listed = ", ".join(labels.values())
        if wanted is None:
            if len(labels) > 1:
                raise UserError(f"{self.where}: the head has {len(labels)} labels ({listed}); name one with label=")
            return 0
        for number, name in labels.items():
            if wanted in (name, str(number)):
                return int(number)
        raise UserError(f"{self.where}: the head has no label {wanted!r}; it has {listed}")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, on the accelerator where there is one."""
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.folder, dtype="auto", output_loading_info=True
            )
        except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.where}: no reward model could be loaded: {first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{self.where}: the weights lack {len(missing)} parameters (first: {missing[0]}), which would be "
                "random; give the folder of a whole reward model"
            )
        return model.to(accelerator()).eval() if accelerator() else model.eval()

    @torch.inference_mode()
    def _scores(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        """Scores [B] float32."""
        model, pad = self.model, self._padding([row["input_ids"] for row in rows])
        length = max(len(row["input_ids"]) for row in rows)
        inputs: dict[str, Any] = {}
        for name in rows[0]:
            fill = pad if name == "input_ids" else 0
            padded = [list(row[name]) + [fill] * (length - len(row[name])) for row in rows]
            inputs[name] = torch.tensor(padded, device=model.device)
        logits_BC = model(**inputs).logits.float()
        if logits_BC.shape[1] == 1:
            return logits_BC[:, 0].cpu()
        several = self.config.problem_type == "multi_label_classification"
        return (logits_BC.sigmoid() if several else logits_BC.softmax(-1))[:, self.label].cpu()

    def _padding(self, rows: Sequence[Sequence[int]]) -> int:
        """The padding token; a decoder's head is read before it, so where none is set, one that no row holds."""
        text_config: Any = self.model.config.get_text_config()
        if self.config.pad_token_id is not None:
            return int(self.config.pad_token_id)
        held = {token for row in rows for token in row}
        absent = next(token for token in range(text_config.vocab_size) if token not in held)
        self.model.config.pad_token_id = text_config.pad_token_id = absent
        return absent
