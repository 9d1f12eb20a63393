"""From a real model and real pairs to a saved reward and back."""

from pathlib import Path

import pytest
import torch

from reprdpo.data import TokenizeConfig, load_preferences, tokenize_preferences
from reprdpo.models import load_causal_lm, load_tokenizer
from reprdpo.reward import HybridReward, extract_pair_states


@pytest.mark.filterwarnings("ignore:the reward ranks")
def test_fit_save_and_reload(real_dir: Path, tmp_path: Path) -> None:
    folder = real_dir / "models" / "stories260K"
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    pairs = load_preferences(real_dir / "pairs" / "hh_harmless.jsonl", limit=60)
    rows = tokenize_preferences(pairs, tokenizer, TokenizeConfig(max_length=192, truncation_mode="keep_end"))
    chosen, rejected = extract_pair_states(model, rows, pad_token_id=tokenizer.pad_token_id, progress=False)
    assert chosen.shape == (len(rows), 5, 64)

    with torch.no_grad():
        alone = model(input_ids=torch.tensor([rows[7]["rejected_input_ids"]]), output_hidden_states=True)
    expected = torch.stack([layer[0, -1] for layer in alone.hidden_states[1:]])
    torch.testing.assert_close(rejected[7], expected, rtol=1e-3, atol=1e-4)

    reward, report = HybridReward.fit(chosen, rejected, base=model, groups=rows["prompt_id"])
    assert report.num_groups == len(set(rows["prompt_id"]))
    reward.save_pretrained(tmp_path)
    loaded = HybridReward.from_pretrained(tmp_path)
    loaded.check_base(load_causal_lm(folder))
    assert torch.equal(loaded(chosen).reward, reward(chosen).reward)
