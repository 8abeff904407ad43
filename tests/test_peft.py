"""LoRA adapters of peft: a posterior over the adapter alone, from preparation to the merged model's texts."""

import copy

import pytest
import texts
import torch

from distruction import Posterior, forget, language_metrics, prepare

peft = pytest.importorskip("peft")
QUIET = {"progress": False}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_an_adapter_is_prepared_saved_loaded_forgotten_merged_and_generates(family, base, tmp_path):
    frozen = getattr(texts, family)().to(base)
    before = copy.deepcopy(frozen.state_dict())
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=TARGETS[family],
                             fan_in_fan_out=family == "gpt2")  # fmt: skip
    model = peft.get_peft_model(frozen, config)
    adapter = {n for n, p in model.named_parameters() if p.requires_grad}
    batch = texts.padded(texts.rows())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    def likelihood(m):
        return torch.cat(language_metrics.token_log_likelihoods(m, [batch])).exp().mean().item()

    known = likelihood(model)
    prior = prepare(model, [batch], steps=10, **QUIET)
    assert set(prior) == adapter
    prior.save(tmp_path / "prior")
    loaded = Posterior.load(tmp_path / "prior", model=model)
    report = forget(model, loaded, [batch], objective="bounded-ce", level=known / 2, **QUIET)
    assert report.reached
    assert report.probability == pytest.approx(likelihood(model), rel=1e-3)
    assert report.probability < known / 2 + 1e-6
    # Nothing else than the adapter moved, and its folder and the merged model are the unlearned one.
    base_now = {n.replace("base_model.model.", "").replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert all(torch.equal(t, base_now[n]) for n, t in before.items())
    model.save_pretrained(tmp_path / "adapter")
    again = getattr(texts, family)().to(base)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    logits = model.eval()(**batch).logits
    assert torch.equal(again.eval()(**batch).logits, logits)
    merged = again.merge_and_unload()
    if base == torch.float32:
        torch.testing.assert_close(merged(**batch).logits, logits, atol=1e-4, rtol=1e-4)
    ids = texts.rows()[0][0][None, :3]
    made = merged.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > 3
