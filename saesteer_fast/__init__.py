"""Exact steering of language models by single latents of a sparse autoencoder.

import saesteer_fast as sf

sae = sf.SAE.load("path/to/layers.6")
with sf.steering(model, sae, {22373: 12.0}):
    model.generate(...)
"""

from .attach import steering
from .sae import SAE
from .steering import steer

__version__ = "0.1.0"
__all__ = ["SAE", "steer", "steering"]
