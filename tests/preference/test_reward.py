"""Rewards: what plain transformers computes at the last token of each answer, in any layout, and the paper's loss."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hand_made_answers import pair_rows
from support import FAMILIES, SIZES, character_tokenizer, relative_distance
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from accel_llm.config.preference_options import RewardOptions
from accel_llm.data.answers import Pairs, collate_answers
from accel_llm.errors import ConfigError
from accel_llm.model import classifier
from accel_llm.model.attention import enable_packing
from accel_llm.model.classifier import (
    answer_scores,
    attach_scores,
    check_gives_scores,
    check_gives_tokens,
    check_scores,
    score_config,
)
from accel_llm.model.padding import separate_pad_token
from accel_llm.model.probe import sharing_obstacle
from accel_llm.preference.reward import reward_loss, reward_losses
from accel_llm.training.preference_evaluation import preference_metrics

CENTERED = RewardOptions(center_rewards_coefficient=0.1, max_length=64)
LAYOUTS = ("padded", "packed", "shared")


def scoring_model(family: str = "llama", seed: int = 0, packed: bool = True) -> Any:
    torch.manual_seed(seed)
    config = score_config(CONFIG_MAPPING[family](**SIZES | FAMILIES[family]))
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.get_input_embeddings().padding_idx = None  # as configure_for_training does
    if packed:
        enable_packing(model)
    attach_scores(model)
    return model.train()


def pairs(margins: bool = True) -> Pairs:
    """Answers that end with the pad token of the config, 0, at which transformers itself would take no score."""
    rows = pair_rows().rows
    last, ids, labels = rows.offsets[1:] - 1, rows.input_ids.copy(), rows.labels.copy()
    ids[last[::3]] = labels[last[::3]] = 0
    margin = np.repeat(np.linspace(0, 1, len(rows) // 2), 2).astype(np.float32) if margins else None
    return Pairs(replace(rows, input_ids=ids, labels=labels, margin=margin))


def batch_of(units: list[int], layout: str, rows: Pairs | None = None) -> dict:
    return collate_answers(replace(rows or pairs(), share_prompts=layout == "shared"), units, layout != "padded", 0)


def plain_scores(model: Any, rows: Pairs) -> torch.Tensor:
    """The scores of plain transformers, which gets each document alone, and no pad token to look for."""
    plain = AutoModelForSequenceClassification.from_config(deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    plain.config.pad_token_id = None
    documents = [torch.from_numpy(rows.rows[k][0].astype(np.int64))[None] for k in range(len(rows.rows))]
    return torch.cat([plain(input_ids=ids).logits for ids in documents])[:, 0]


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def test_the_loss_is_that_of_the_papers():
    rng = np.random.default_rng(0)
    chosen, rejected, margins = 3 * rng.normal(size=(3, 50))
    expected = np.log1p(np.exp(-(chosen - rejected - margins))) + 0.01 * (chosen + rejected) ** 2
    ours = reward_losses(*(torch.from_numpy(each) for each in (chosen, rejected, margins)), center=0.01)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    equal = torch.zeros(1)
    assert float(reward_losses(equal, equal, 0.0, 0.0)) == pytest.approx(np.log(2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_plain_transformers(layout):
    model, rows = scoring_model(packed=layout != "padded").eval(), pairs()
    with torch.no_grad():
        scores = answer_scores(model, batch_of(list(range(12)), layout))[:, 0]
        torch.testing.assert_close(scores, plain_scores(model, rows), rtol=1e-5, atol=1e-5)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "opt", "mixtral", "phi3"])
def test_families_give_the_scores_of_plain_transformers(family):
    model, rows = scoring_model(family).eval(), pairs()
    if family == "gemma2":  # its scores have the soft-cap of attention, which transformers computes by eager attention
        assert model.config.attn_logit_softcapping
    obstacle = sharing_obstacle(model, "cpu", torch.float32, 64)
    with torch.no_grad():
        scores = answer_scores(model, batch_of(list(range(12)), "packed" if obstacle else "shared"))[:, 0]
        torch.testing.assert_close(scores, plain_scores(model, rows), rtol=1e-4, atol=1e-4)
    assert check_scores(model, "cpu", torch.float32) == "scores"


def test_loss_and_gradient_are_those_of_plain_transformers_in_any_layout():
    model, rows = scoring_model(), pairs()
    plain = scoring_model(packed=False).eval()
    scores = plain_scores(plain, rows)
    # The gradient of the reference, through plain transformers.
    reference = AutoModelForSequenceClassification.from_config(
        deepcopy(plain.config), attn_implementation="eager"
    ).double()
    reference.load_state_dict(plain.state_dict())
    reference.config.pad_token_id = reference.get_input_embeddings().padding_idx = None
    documents = [torch.from_numpy(rows.rows[k][0].astype(np.int64))[None] for k in range(24)]
    values = torch.cat([reference(input_ids=ids).logits for ids in documents])[:, 0]
    torch.testing.assert_close(values.float(), scores)
    margins = torch.from_numpy(rows.rows.margin[::2].astype(np.float64))
    gaps, sums = values[0::2] - values[1::2] - margins, values[0::2] + values[1::2]
    expected = (torch.log1p(torch.exp(-gaps)) + 0.1 * sums**2).sum()
    expected.backward()
    for layout in LAYOUTS:
        model = scoring_model(packed=layout != "padded")
        loss = reward_loss(model, batch_of(list(range(12)), layout), CENTERED)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert relative_distance(gradient(model), gradient(reference)) < 1e-5
    # Without the margins it is another loss.
    assert reward_loss(model, batch_of([0, 5], layout, pairs(False)), CENTERED).item() != pytest.approx(
        reward_loss(model, batch_of([0, 5], layout), CENTERED).item(), rel=1e-3
    )


def test_a_step_is_the_same_however_it_is_cut():
    results = []
    for cut in ([range(12)], [range(k, k + 3) for k in range(0, 12, 3)], [range(1), range(0), range(1, 12)]):
        model = scoring_model()
        total, measured = 0.0, torch.zeros(())
        for units in cut:
            batch = batch_of(list(units), "shared")
            loss = reward_loss(model, batch, CENTERED) / 12
            loss.backward()
            total += loss.item()
            measured = measured + torch.stack(list(batch["measured"].values()))
        results.append((total, gradient(model), measured))
    for total, slope, measured in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-6)
        assert relative_distance(slope, results[0][1]) < 1e-5
        torch.testing.assert_close(measured, results[0][2])


def test_metrics_of_held_out_pairs_count_each_once(accelerator):
    model, rows = scoring_model(), replace(pairs(), share_prompts=True)

    def metrics(size: int) -> dict[str, float]:
        options = RewardOptions(max_length=64, per_device_eval_batch_size=size, packing=True)
        return preference_metrics(rows, collate_answers, accelerator, model, rows.rows, options, 0)

    scores = plain_scores(model, rows).detach().double()
    chosen, rejected = scores[0::2], scores[1::2]
    expected = {"chosen": chosen, "rejected": rejected, "accuracies": (chosen > rejected).double()}
    for size in (1, 3):
        found = metrics(size)
        for name, values in (expected | {"margins": chosen - rejected}).items():
            assert found[f"eval/rewards/{name}"] == pytest.approx(float(values.mean()), abs=1e-5)


def test_the_head_computes_in_float32():
    model = scoring_model(packed=False).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        batch = batch_of([0, 1], "padded")
        scores = answer_scores(model, batch)
        hidden = classifier.token_states(model, {"input_ids": batch["input_ids"]}).flatten(0, 1)
    expected = hidden[batch["last_positions"]].double() @ model.score.weight.double().T
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-6)


def test_scores_at_other_places_are_noticed(monkeypatch):
    model = scoring_model()
    assert check_scores(model, "cpu", torch.float32) == "scores"
    monkeypatch.setattr(
        classifier,
        "answer_scores",
        lambda m, batch: answer_scores(m, batch | {"last_positions": batch["last_positions"] - 1}),
    )
    with pytest.raises(ConfigError, match="its own scores of test rows differ from those at their last tokens"):
        check_scores(model, "cpu", torch.float32)


def test_a_pad_token_that_ends_answers_is_replaced(capsys):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=105), pad_token_id=None)
    tokenizer = character_tokenizer()
    rows = pairs().rows
    data: Any = SimpleNamespace(train=rows, eval=None)
    separate_pad_token(tokenizer, config, data, 2)  # type: ignore[arg-type]
    assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.bos_token_id != 0
    assert "texts to score end with <pad>" in capsys.readouterr().out
    separate_pad_token(tokenizer, config, data, 2)  # type: ignore[arg-type]
    assert config.pad_token_id == 1 and not capsys.readouterr().out
    separate_pad_token(tokenizer, config, data, 1)  # type: ignore[arg-type]
    assert config.pad_token_id == tokenizer.eos_token_id


def test_models_that_cannot_give_a_reward_are_refused():
    llama = CONFIG_MAPPING["llama"](**SIZES)
    check_gives_scores(llama, "base", rewards=True)
    check_gives_tokens(llama, "base", "model")
    reward = score_config(llama)
    assert (reward.num_labels, reward.problem_type, reward.id2label) == (1, "regression", {0: "reward"})
    check_gives_scores(reward, "reward", rewards=True)
    with pytest.raises(ConfigError, match="model: here is a reward model or a classifier, whose head gives scores"):
        check_gives_tokens(reward, "here", "model")
    reward.num_labels = 3
    with pytest.raises(ConfigError, match="is a classifier of 3 classes, but a reward is one score"):
        check_gives_scores(reward, "sentiment", rewards=True)
    for family in ("granite", "cohere"):
        with pytest.raises(ConfigError, match="transformers has no text model with scores of the family"):
            check_gives_scores(CONFIG_MAPPING[family](**SIZES), "base", rewards=True)
    routed = CONFIG_MAPPING["mixtral"](**SIZES, output_router_logits=True)
    with pytest.raises(ConfigError, match=r"output_router_logits: .* set it to false"):
        check_gives_scores(routed, "base", rewards=True)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"eval_generate": 3}, "eval_generate: 3 answers, but a reward model gives scores; remove it."),
        ({"method": "prompt"}, "method: prompt trains virtual tokens"),
        ({"add_tokens": True}, "add_tokens: a reward model is trained on tokens that its base knows"),
        ({"train_on": "last_assistant"}, "train_on: last_assistant chooses tokens to train"),
        ({"train_on_eos": "none"}, "train_on_eos: none chooses tokens to train"),
        ({"z_loss_coef": 0.1}, "z_loss_coef: it has no effect on preferences; remove it."),
    ],
)
def test_options_without_a_meaning_are_refused(options, sentence):
    assert any(problem.startswith(sentence) for problem in RewardOptions(**options).problems())
