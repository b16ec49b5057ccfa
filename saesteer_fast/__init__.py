"""Exact steering of language models by single latents of a sparse autoencoder.

import saesteer_fast as sf

sae = sf.SAE.load("path/to/layers.6")
with sf.steering(model, sae, {22373: 12.0}):
    model.generate(...)
"""

from .attach import Handle, steering, steerings
from .conditions import Active, Cause, Condition, Decision, Gate, GateInput, When, active, gate
from .edits import Configurations, Edit, Edits, add, at_least, at_most, scale, set_if_active
from .functional import Prepared, prepare, steer
from .plan import Rows
from .recipe import Handles, Recipe, Steering, load_steering
from .sae import SAE
from .scopes import NotTokens, Positions, Scope, not_tokens, positions

__version__ = "0.1.0"
__all__ = [
    "SAE",
    "Active",
    "Cause",
    "Condition",
    "Configurations",
    "Decision",
    "Edit",
    "Edits",
    "Gate",
    "GateInput",
    "Handle",
    "Handles",
    "NotTokens",
    "Positions",
    "Prepared",
    "Recipe",
    "Rows",
    "Scope",
    "Steering",
    "When",
    "active",
    "add",
    "at_least",
    "at_most",
    "gate",
    "load_steering",
    "not_tokens",
    "positions",
    "prepare",
    "scale",
    "set_if_active",
    "steer",
    "steering",
    "steerings",
]
