"""TRL's DPOTrainer with the loss computed at the head by linear_preference_loss.

    python examples/trl_dpo.py MODEL PAIRS.jsonl OUTPUT

Data, collator, schedule and logging stay TRL's; reference log-probs are precomputed, as TRL does it.
"""

import argparse
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from reprdpo import ops
from reprdpo.heads import HeadSpec, run_at_head


class FusedDPOTrainer(DPOTrainer):
    """DPOTrainer with ``precompute_ref_log_probs=True``, any loss of ``ops.linear_preference_loss``, and a confidence.

    ``confidence`` in [0, 1] is how sure each label is: 1 is DPO, 1 - eps is conservative DPO.
    """

    def __init__(self, *args: Any, confidence: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.confidence = confidence

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        def use(hidden: Tensor, head: HeadSpec) -> ops.LinearPreferenceLoss:
            return ops.linear_preference_loss(
                hidden,
                labels=inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
                shift=True,
                ref_chosen_logp=inputs["ref_chosen_logps"],
                ref_rejected_logp=inputs["ref_rejected_logps"],
                beta=self.args.beta,
                confidence=self.confidence,
                loss_type=self.args.loss_type,
                loss_weights=self.args.loss_weights,
                **head._asdict(),
            )

        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        result = run_at_head(model, use, **batch, use_cache=False)
        metrics = {
            "rewards/chosen": result.chosen_reward,
            "rewards/rejected": result.rejected_reward,
            "rewards/margins": result.chosen_reward - result.rejected_reward,
            "rewards/accuracies": (result.chosen_reward > result.rejected_reward).float(),
            "logps/chosen": result.chosen_logp,
            "logps/rejected": result.rejected_logp,
        }
        for name, values in metrics.items():
            self._metrics["train" if model.training else "eval"][name].append(values.mean().item())
        return (result.loss, {"loss": result.loss}) if return_outputs else result.loss


def main(argv: list[str] | None = None) -> FusedDPOTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs")
    parser.add_argument("output")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--confidence", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    config = DPOConfig(
        output_dir=arguments.output,
        max_steps=arguments.max_steps,
        precompute_ref_log_probs=True,
        disable_dropout=True,
        bf16=torch.cuda.is_available(),
        report_to="none",
        logging_steps=1,
    )
    trainer = FusedDPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=load_dataset("json", data_files=arguments.pairs, split="train"),
        confidence=arguments.confidence,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
