"""The SAE that users hold: weights that are read, written and moved, and that encode and decode."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import measures
from .numbers import TINY, require_float
from .weights import Weights, constants


@dataclass(frozen=True, eq=False, repr=False)
class SAE(Weights):
    """A sparse autoencoder with N latents on a stream of width d.

        z     = scale n(x)                              n as `normalize` says
        p_j   = s_j (W_enc[j]·(z - b_dec) + b_enc_j)    b_dec only if subtract_b_dec
        a_j   = f_j(p)                                  f as `measure` says
        recon = n⁻¹((b_dec + sum_j a_j W_dec[j] / s_j) / scale)

    s_j is the norm of W_dec[j] if decoder_norm, else 1. Normalisations, mean, std and norm over
    the d numbers of one token, std unbiased:

        none            n(x) = x
        layer_norm      n(x) = (x - mean) / (std + 1e-5)    n⁻¹(y) = y std + mean
        constant_norm   n(x) = x sqrt(d) / norm             n⁻¹(y) = y norm / sqrt(d)

    Measures:

        topk        p_j where p_j > 0 and j is among the k largest p, else 0
        groupmax    p_j where p_j > 0 and j is the largest of its group, else 0;
                    group g holds latents g N/k to (g + 1) N/k - 1
        threshold   p_j where p_j > max(threshold_j, 0), else 0 (JumpReLU, BatchTopK)
        relu        max(p_j, 0)
        gated       max(exp(r_mag_j) (p_j - b_enc_j) + b_mag_j, 0) where p_j > 0, else 0

    Of equal p the lower index is the larger. Weights are fp32, bf16 or fp16, in any mix, and on one
    device. They are shared with the caller, made contiguous where they are not, and must not be
    written to once the SAE is used: what is made of them is kept. Steering or encoding then raises
    RuntimeError; what steered before does not notice. Raises TypeError or ValueError, naming the
    argument, for a wrong type, dtype, shape, device or k, for an argument that the measure lacks or
    does not use, and for NaN or infinity.
    """

    def calibrate(self, x: Tensor | Iterable[Tensor]) -> SAE:
        """This SAE with the `order` in which latents are live most often on x.

        x [..., d] fp32, bf16 or fp16 is a sample of the stream that will be steered, on any device,
        or several such; some ten thousand tokens are plenty. Steering with the SAE returned reads
        less of W_enc before it knows that a latent is not among the k largest, and gives the same
        result; ties still go to the lower latent. For topk. Raises ValueError for another measure,
        and where x holds no token or has another width, TypeError for what is no such tensor.
        """
        return replace(self, order=measures.hot_first(self, x))

    def encode(self, x: Tensor) -> Tensor:
        """All activations of x [..., d], dense: [..., N] fp32. Differentiable.

        Raises TypeError for another dtype than fp32, bf16 or fp16, ValueError for another width.
        """
        self.require_unwritten()
        return measures.encode(self, x)

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """recon of dense activations [..., N]: [..., d] fp32. Differentiable.

        x [..., d], from which they were encoded, is needed to undo a normalisation. Raises
        ValueError where it is missing, and for another number of latents.
        """
        self.require_unwritten()
        return measures.decode(self, acts, x)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """This SAE on another device, or rounded to another dtype (which is another SAE); where
        both are what they were, itself. Raises TypeError for another dtype than fp32, bf16 or fp16,
        RuntimeError, which is torch's, for a device that is not there."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: got {device}, a device is needed; dtype={device} rounds")
        if dtype is not None:
            require_float("dtype", dtype)
        moved = {name: getattr(self, name).to(device, dtype) for name in self._shapes()}
        if all(tensor is getattr(self, name) for name, tensor in moved.items()):
            return self
        order = None if self.order is None else self.order.to(device)
        return replace(self, **moved, order=order)

    def fold(self) -> SAE:
        """The same SAE with scale and decoder norms multiplied into the weights, rounded once.

        Activations keep their units. For formats that have no place for either.
        """
        with constants():
            inner = self.decoder_norms if self.decoder_norm else self.b_enc.new_ones(1).float()
            outer = (inner.clamp_min(TINY) * self.scale)[:, None]
            b_enc = self.b_enc * inner
            return replace(
                self,
                W_enc=(self.W_enc * (inner * self.scale)[:, None]).to(self.W_enc.dtype),
                b_enc=b_enc.to(self.b_enc.dtype),
                W_dec=(self.W_dec / outer).to(self.W_dec.dtype),
                b_dec=(self.b_dec / self.scale).to(self.b_dec.dtype),
                decoder_norm=False,
                scale=1.0,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SAE:
        """Read an SAE; its files tell the format, and the format tells what lies transposed.

        `path` is a folder, or a file where a format keeps all in one, or a repository on the
        Hugging Face Hub: "org/name", or "org/name/folder/in/it". Formats: sparsify, SAELens,
        dictionary_learning, Gemma Scope 1 and 2, Llama Scope, Qwen Scope, OpenAI's.

        hookpoint is set where the files, or the folder's name (`layers.6`), tell it. Weights stay
        in the file's dtype, on the CPU, and share nothing with the file. Nothing in a file is
        executed. Raises FileNotFoundError for what is missing, and ValueError for a file that is
        broken, or that holds what cannot be measured exactly (transcoders, for one).
        """
        from . import formats  # and safetensors, which steering does not need

        return formats.load(path, cls)

    def save(self, path: str | os.PathLike[str], format: str = "sparsify") -> None:
        """Write folder `path` in `format`, "sparsify" or "saelens", for `load` and for these.

        Every weight is read back bit for bit; `order` gets a file of its own beside the format's,
        saesteer_order.safetensors, which other libraries leave alone. All files are complete on
        disk before any takes its place, so that a save that fails leaves what was there. Raises
        ValueError, naming the argument, for an SAE that the format cannot express, and for a folder
        that holds an SAE of another format, or is named for another hookpoint.

        sparsify tells the hookpoint by the folder's name alone: name it "layers.6".
        """
        from . import formats

        formats.save(self, path, format)

    @property
    def kind(self) -> str:
        """Its measure in words: "topk, k=32"."""
        return self.measure if self.k is None else f"{self.measure}, k={self.k}"

    def __repr__(self) -> str:
        return (
            f"SAE({self.num_latents} latents, d={self.d}, {self.kind}, "
            f"hookpoint={self.hookpoint!r}, {self.W_enc.dtype}, {self.device})"
        )
