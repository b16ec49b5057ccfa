"""Learn by gradient descent how strongly to steer: the strength is a tensor like any other."""

import torch
from transformers import Phi3Config, Phi3ForCausalLM

import saesteer_fast as sf

torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}
tokens = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None}
model = Phi3ForCausalLM(Phi3Config(**tokens, **size, **heads))
W = torch.nn.functional.normalize(torch.randn(128, 32), dim=1)
sae = sf.SAE(W_enc=W, b_enc=torch.zeros(128), W_dec=W, b_dec=torch.zeros(32), k=8)

prompt, wanted, losses = torch.tensor([[5, 17, 60]]), torch.tensor([42]), []
edits = dict.fromkeys(range(16), sf.add(0))
with sf.steering(model.requires_grad_(False), sae, edits, layer=1) as handle:
    optimizer = torch.optim.Adam([handle.strengths.requires_grad_()], lr=0.5)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(prompt).logits[:, -1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}: {handle}")
