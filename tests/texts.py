"""Tiny causal language models and their batches: random weights, no download."""

import torch

VOCABULARY = 23


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_head=2, bos_token_id=0,
                        eos_token_id=0, initializer_range=0.2, **{"n_layer": 2, **options})  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0,
                         eos_token_id=0, pad_token_id=0, initializer_range=0.2,
                         **{"num_hidden_layers": 2, **options})  # fmt: skip
    return LlamaForCausalLM(config).eval()


def recomputing(model):
    """With the activations of its layers to be made again in the backward pass."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def rows(lengths=(7, 4, 9, 5), prompt=2):
    """(ids, labels) of texts whose first ``prompt`` tokens are not asked for."""
    g = torch.Generator().manual_seed(3)
    texts = [torch.randint(1, VOCABULARY, (n,), generator=g) for n in lengths]
    return [(t, torch.cat([torch.full((prompt,), -100), t[prompt:]])) for t in texts]


def padded(texts, *, left=False, extra=0):
    """One batch, padded on the right or on the left; ``extra`` more than needed."""
    width = max(len(t) for t, _ in texts) + extra
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    if left:
        batch["position_ids"] = []
    for ids, labels in texts:
        fill = width - len(ids)
        sides = (fill, 0) if left else (0, fill)
        pad = torch.nn.functional.pad
        batch["input_ids"].append(pad(ids, sides))
        batch["attention_mask"].append(pad(torch.ones_like(ids), sides))
        batch["labels"].append(pad(labels, sides, value=-100))
        if left:
            batch["position_ids"].append(pad(torch.arange(len(ids)), sides, value=1))
    return {name: torch.stack(values) for name, values in batch.items()}


def packed(texts):
    """All texts in one row, whose ``position_ids`` begin anew with each."""
    return {
        "input_ids": torch.cat([t for t, _ in texts])[None],
        "position_ids": torch.cat([torch.arange(len(t)) for t, _ in texts])[None],
        "labels": torch.cat([labels for _, labels in texts])[None],
    }
