"""vLLM's worker with the naive path on a layer: an ordinary forward hook, which vLLM compiles with
the model if it compiles at all."""

from __future__ import annotations

import torch

from saesteer_fast import SAE
from saesteer_fast.serve.vllm import PlatformWorker

from . import peers
from .workloads import Workload


class Worker(PlatformWorker):
    """Steers as its `additional_config` says: an SAE's folder, a layer, a latent, its value."""

    def load_model(self, **kwargs) -> None:
        super().load_model(**kwargs)
        given = self.vllm_config.additional_config
        sae, latent = SAE.load(given["sae"]), torch.tensor([given["latent"]])
        x = sae.W_enc.new_empty(0, sae.d)
        naive = peers.baselines(Workload.of("naive", x, sae, latent, value=given["value"]))["naive"]

        def steer(module, args, output):
            hidden, residual = output
            stream = naive(hidden + residual)
            return stream, torch.zeros_like(stream)

        model = self.model_runner.get_model()
        model.model.layers[given["layer"]].register_forward_hook(steer)
