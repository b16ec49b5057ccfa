"""Records the cases beside it: small SAEs of random weights, which the libraries themselves save,
read back and run. Of a library only its files' layout is kept here; all are MIT-licensed.

    pip install sae-lens==6.54.12 eai-sparsify==1.3.3
    pip install --no-deps git+https://github.com/openai/sparse_autoencoder@4965b94
    python tests/golden/record.py saelens sparsify openai gemma_scope gemma_scope_2 qwen_scope

and each of these in an environment of its own:

    pip install dictionary-learning==0.1.0
    python tests/golden/record.py dictionary_learning

    pip install sae-lens==5.11.0
    python tests/golden/record.py saelens_5

    pip install sae-lens==6.54.12 pymongo    # for what lm_saes imports
    pip install --no-deps --ignore-requires-python \
        git+https://github.com/OpenMOSS/Language-Model-SAEs@16ca67a
    python tests/golden/record.py llama_scope

Google and Qwen published no library for their Scopes: the files are written here and read by
SAELens. It reads Llama Scope too, but without the norms of the decoder's rows, which the threshold
is meant for; here the library that trained these SAEs reads them, as it was at their release. On
another processor a library's sums may differ in their last bits.

A case is a folder:

    sae/                what the library saves
    case.safetensors    x [T, d], acts [T, N], recon [T, d], steered [T, d], by its encode and
                        decode; steered is decode(acts') + (x - decode(acts))
    case.json           acts' is acts with `values` at `features`; k; the versions that made it;
                        `place` in sae/ of an SAE whose path says what its file does not
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import distribution
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
T, D, N, K = 24, 12, 48, 4
VALUES = [6.0, 3.5, 0.0]
"""For the latent that is live most often, the one least often, and the second most often."""

Codec = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""A library's encode and decode, between [T, d] and [T, N]."""


def draw(random: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """An SAE whose encoder leans towards its unit decoder rows, and a stream: tokens of unlike
    means and scales.
    """
    normal = torch.randn(4, N, D, generator=random)
    W_dec = normal[0] / normal[0].norm(dim=1, keepdim=True)
    weights = {
        "W_enc": W_dec + 0.1 * normal[1],
        "bias": 0.1 * normal[2, :, 0],
        "W_dec": W_dec,
        "b_dec": 0.5 * normal[2, 0],
        "norms": 0.5 + 2 * torch.rand(N, generator=random),
        "threshold": torch.rand(N, generator=random),
        "r_mag": 0.1 * normal[2, :, 1],
        "b_mag": 0.1 * normal[2, :, 2],
    }
    scales = 0.5 + torch.rand(T, 1, generator=random)
    return weights, scales * (normal[3, :T] + 0.5 * normal[2, :T, 3:4])


def saelens(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
    from sae_lens.training.activation_scaler import ActivationScaler

    architecture, _, option = kind.partition("-")
    options = {
        "": {},
        "decoder-norm": {"rescale_acts_by_decoder_norm": True},
        "layer-norm": {"normalize_activations": "layer_norm"},
        "constant-norm": {"normalize_activations": "constant_norm_rescale"},
        "scaled": {"normalize_activations": "expected_average_only_in"},
        "no-b_dec": {"apply_b_dec_to_input": False},
    }[option] | ({"k": K} if architecture == "topk" else {})
    kind_of_sae, configuration = get_sae_class(architecture)
    weights = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if architecture == "gated":
        weights |= {"b_gate": w["bias"] - 0.6, "b_mag": w["b_mag"], "r_mag": w["r_mag"]}
    else:
        weights["b_enc"] = w["bias"]
    if architecture == "jumprelu":
        weights["threshold"] = w["threshold"]
    if option == "decoder-norm":
        weights["W_dec"] = w["W_dec"] * w["norms"][:, None]
    sae = kind_of_sae(configuration(d_in=D, d_sae=N, **options))
    sae.load_state_dict(weights)
    sae.save_model(folder)
    sae = SAE.load_from_disk(folder)
    if option == "scaled":  # As its trainer keeps a checkpoint, and runs it.
        scaler = ActivationScaler(scaling_factor=0.8)
        scaler.save(str(folder / "activation_scaler.json"))
        return lambda x: sae.encode(scaler(x)), lambda acts: scaler.unscale(sae.decode(acts))
    return sae.encode, sae.decode


def saelens_5(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from sae_lens import SAE, SAEConfig

    sae = SAE(
        SAEConfig(
            architecture="standard",
            d_in=D,
            d_sae=N,
            activation_fn_str="topk" if kind == "topk" else "relu",
            activation_fn_kwargs={"k": K} if kind == "topk" else {},
            apply_b_dec_to_input=True,
            finetuning_scaling_factor=False,
            context_size=128,
            model_name="microsoft/Phi-3-mini-4k-instruct",
            hook_name="blocks.6.hook_resid_post",
            hook_layer=6,
            hook_head_index=None,
            prepend_bos=True,
            dataset_path="monology/pile-uncopyrighted",
            dataset_trust_remote_code=True,
            normalize_activations="none",
            dtype="float32",
            device="cpu",
            sae_lens_training_version=None,
        )
    )
    weights = {"W_enc": w["W_enc"].T, "b_enc": w["bias"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    sae.load_state_dict(weights)
    sae.save_model(folder)
    sae = SAE.load_from_disk(str(folder))
    return sae.encode, sae.decode


def sparsify(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from sparsify import SparseCoder, SparseCoderConfig

    activation, _, width = kind.partition("-")
    size = {"expansion_factor": N // D} if width else {"num_latents": N}
    sae = SparseCoder(D, SparseCoderConfig(activation=activation, k=K, **size))
    weights = {"encoder.weight": w["W_enc"], "encoder.bias": w["bias"]}
    sae.load_state_dict(weights | {"W_dec": w["W_dec"], "b_dec": w["b_dec"]})
    sae.save_to_disk(folder)
    sae = SparseCoder.load_from_disk(folder)

    def encode(x: Tensor) -> Tensor:
        top = sae.encode(x)
        return x.new_zeros(len(x), N).scatter(-1, top.top_indices, top.top_acts)

    return encode, lambda acts: sae.decode(acts, torch.arange(N).expand(len(acts), N))


def dictionary_learning(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers import (
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )
    from dictionary_learning.utils import load_dictionary

    trainer_of = {
        "batchtopk": batch_top_k.BatchTopKTrainer,
        "gated": gdm.GatedSAETrainer,
        "jumprelu": jumprelu.JumpReluTrainer,
        "matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        "relu": standard.StandardTrainer,
        "relu-decoder-norm": standard.StandardTrainerAprilUpdate,
        "relu-new": standard.StandardTrainerAprilUpdate,
        "topk": top_k.TopKTrainer,
    }
    trainer = trainer_of[kind](
        steps=10_000,
        activation_dim=D,
        dict_size=N,
        layer=6,
        lm_name="microsoft/Phi-3-mini-4k-instruct",
        submodule_name="resid_post_layer_6",
        device="cpu",
        **({"k": K} if kind in ("batchtopk", "matryoshka", "topk") else {}),
        **({"group_fractions": [0.25, 0.75]} if kind == "matryoshka" else {}),
        **({"dict_class": AutoEncoderNew} if kind == "relu-new" else {}),
    )
    if kind in ("jumprelu", "matryoshka"):
        weights = {"W_enc": w["W_enc"].T, "b_enc": w["bias"], "W_dec": w["W_dec"]}
    else:
        weights = {"encoder.weight": w["W_enc"], "decoder.weight": w["W_dec"].T}
    if kind == "gated":
        weights |= {"gate_bias": w["bias"] - 0.6, "mag_bias": w["b_mag"], "r_mag": w["r_mag"]}
    elif "encoder.weight" in weights:
        weights["encoder.bias"] = w["bias"]
    if kind in ("relu-decoder-norm", "relu-new"):
        weights["decoder.weight"] = weights["decoder.weight"] * w["norms"]
    if kind == "jumprelu":
        weights["threshold"] = w["threshold"]
    elif kind in ("batchtopk", "matryoshka"):
        weights["threshold"] = torch.tensor(0.4)
    b_dec = {
        "gated": "decoder_bias",
        "relu": "bias",
        "relu-decoder-norm": "bias",
        "relu-new": "decoder.bias",
    }
    weights[b_dec.get(kind, "b_dec")] = w["b_dec"]
    trainer.ae.load_state_dict(trainer.ae.state_dict() | weights)
    config = trainer.config
    if kind == "relu-new":  # The trainers that wrote it are gone, load_dictionary knows it still.
        config["dict_class"] = "AutoEncoderNew"
    # As its training.py ends.
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": config}, indent=4))
    torch.save({key: t.cpu() for key, t in trainer.ae.state_dict().items()}, folder / "ae.pt")
    ae, _ = load_dictionary(str(folder), "cpu")
    return ae.encode, ae.decode


def openai(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from sparse_autoencoder.model import Autoencoder, TopK

    activation = TopK(K) if kind == "topk" else torch.nn.ReLU()
    ae = Autoencoder(N, D, activation, normalize=kind == "topk")
    for parameter, name in (
        (ae.pre_bias, "b_dec"),
        (ae.latent_bias, "bias"),
        (ae.encoder.weight, "W_enc"),
        (ae.decoder.weight.T, "W_dec"),
    ):
        parameter.data.copy_(w[name])
    folder.mkdir(parents=True)
    torch.save(ae.state_dict(), folder / "autoencoder.pt")
    state = torch.load(folder / "autoencoder.pt", weights_only=True)
    ae = Autoencoder.from_state_dict(state, strict=False)  # A TopK's own entries are there twice.
    info = {}

    def encode(x: Tensor) -> Tensor:
        acts, told = ae.encode(x)
        info.update(told)
        return acts

    return encode, lambda acts: ae.decode(acts, info)


def by_saelens(loader: str, repo: str, name: str, folder: Path, **config: int) -> Codec:
    """What SAELens' `loader` makes of `name` in a repository, whose files are those in `folder`."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, **_: object) -> Path:
        return folder / Path(filename).name

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {key: list(t.shape) for key, t in load_file(download(repo_id, filename)).items()}

    def read(path: Path, device: str, cfg_overrides: None) -> tuple[dict, dict]:
        instead = {"hf_hub_download": download, "get_safetensors_tensor_shapes": shapes}
        with mock.patch.multiple(loaders, **instead):
            settings, state, _ = getattr(loaders, loader)(repo, name, device, cfg_overrides=config)
        return settings, state

    sae = SAE.load_from_disk(folder, converter=read)
    return sae.encode, sae.decode


def gemma_scope(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    folder.mkdir(parents=True)
    root = D**0.5 if kind == "embedding" else 1  # Those SAEs see the stream divided by it.
    weights = {"W_enc": w["W_enc"].T * root, "W_dec": w["W_dec"] / root, "b_enc": w["bias"]}
    weights |= {"b_dec": w["b_dec"], "threshold": w["threshold"]}
    np.savez(folder / "params.npz", **{key: t.numpy() for key, t in weights.items()})
    return by_saelens(
        "gemma_2_sae_huggingface_loader",
        "google/gemma-scope-2b-pt-res",
        PLACES.get(f"gemma_scope-{kind}", "layer_6/width_16k/average_l0_70"),
        folder,
        d_in=D,
        d_sae=N,
    )


def gemma_scope_2(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    folder.mkdir(parents=True)
    weights = {"w_enc": w["W_enc"].T.contiguous(), "w_dec": w["W_dec"], "b_enc": w["bias"]}
    weights |= {"b_dec": w["b_dec"], "threshold": w["threshold"]}
    save_file(weights, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.6.output",
        "hf_hook_point_out": "model.layers.6.output",
        "width": N,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    name = "resid_post_all/layer_6_width_16k_l0_big"
    repo = "google/gemma-scope-2-1b-pt"
    return by_saelens("gemma_3_sae_huggingface_loader", repo, name, folder)


def qwen_scope(kind: str, path: Path, w: dict[str, Tensor]) -> Codec:
    path.parent.mkdir(parents=True)
    weights = {"W_enc": w["W_enc"], "W_dec": w["W_dec"].T.contiguous(), "b_enc": w["bias"]}
    torch.save(weights | {"b_dec": w["b_dec"]}, path)
    return by_saelens(
        "qwen_scope_sae_huggingface_loader",
        f"Qwen/{path.parent.name}",
        path.name,
        path.parent,
        d_in=D,
        d_sae=N,
    )


def llama_scope(kind: str, folder: Path, w: dict[str, Tensor]) -> Codec:
    from lm_saes import SAEConfig, SparseAutoEncoder

    (folder / "checkpoints").mkdir(parents=True)
    config = SAEConfig(
        hook_point_in="blocks.6.hook_resid_post",
        apply_decoder_bias_to_pre_encoder=False,
        expansion_factor=N // D,
        d_model=D,
        act_fn="jumprelu",
        jump_relu_threshold=1.5,
        norm_activation="dataset-wise",
        dataset_average_activation_norm={"in": 4.25, "out": 4.25},
        init_decoder_norm=0.5,
    )
    sae = SparseAutoEncoder(config)
    weights = {"encoder.weight": w["W_enc"], "encoder.bias": w["bias"], "decoder.bias": w["b_dec"]}
    sae.load_state_dict(weights | {"decoder.weight": (w["W_dec"] * w["norms"][:, None]).T})
    config.save_hyperparameters(str(folder))
    sae.save_pretrained(str(folder / "checkpoints/final.safetensors"))
    sae = SparseAutoEncoder.from_pretrained(str(folder))
    return sae.encode, sae.decode


LIBRARIES = {
    saelens: (
        "sae-lens",
        "gated jumprelu standard standard-scaled topk topk-constant-norm topk-decoder-norm "
        "topk-layer-norm topk-no-b_dec",
    ),
    saelens_5: ("sae-lens", "standard topk"),
    sparsify: ("eai-sparsify", "groupmax topk topk-default-width"),
    dictionary_learning: (
        "dictionary-learning",
        "batchtopk gated jumprelu matryoshka relu relu-decoder-norm relu-new topk",
    ),
    openai: ("sparse_autoencoder", "relu topk"),
    gemma_scope: ("sae-lens", "embedding jumprelu"),
    gemma_scope_2: ("sae-lens", "jumprelu"),
    qwen_scope: ("sae-lens", "topk"),
    llama_scope: ("lm-saes", "jumprelu"),
}
"""Of each function the package that it calls, and the kinds of SAE that it can make."""

PLACES = {
    "gemma_scope-embedding": "embedding/width_4k/average_l0_6",
    "qwen_scope-topk": f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}/layer6.sae.pt",
}
"""Of the SAEs that are not sae/ itself, where they lie in it."""


@torch.no_grad()
def record(make: Callable[..., Codec], package: str, kind: str) -> None:
    name = f"{make.__name__}-{kind}"
    folder, place = HERE / name, PLACES.get(name)
    shutil.rmtree(folder, ignore_errors=True)
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weights, x = draw(random)
    with redirect_stdout(io.StringIO()):
        encode, decode = make(kind, folder / "sae" / (place or ""), weights)
    acts = encode(x)
    recon = decode(acts)
    often = (acts > 0).sum(0).argsort(descending=True, stable=True)
    features = [often[0].item(), often[-1].item(), often[1].item()]
    edited = acts.clone()
    edited[:, features] = torch.tensor(VALUES)
    encode(x)  # SAELens forgets a token's mean and scale once it has decoded.
    tensors = {"x": x, "acts": acts, "recon": recon, "steered": decode(edited) + (x - recon)}
    # No activation may be live by a last bit, which another order of its sum would decide.
    near = 2**-14 * torch.randn(T, D, generator=random)
    assert torch.equal(encode(x + near) > 0, acts > 0), f"{name}: choose another seed"
    save_file(tensors, folder / "case.safetensors")
    case = {"place": place} if place else {}
    case |= {
        "features": features,
        "values": VALUES,
        "k": K if "topk" in kind.split("-") or kind == "groupmax" else None,
        "made_by": f"{version(package)}, torch {torch.__version__}",
    }
    (folder / "case.json").write_text(json.dumps(case) + "\n")


def version(package: str) -> str:
    """Its name and version, and the commit if it is no release."""
    found = distribution(package)
    origin = json.loads(found.read_text("direct_url.json") or "{}").get("vcs_info", {})
    commit = f" at {origin['commit_id'][:7]}" if origin else ""
    return f"{package} {found.version}{commit}"


def main() -> None:
    by_name = {make.__name__: make for make in LIBRARIES}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=by_name)
    for name in parser.parse_args().names:
        package, kinds = LIBRARIES[by_name[name]]
        for kind in kinds.split():
            record(by_name[name], package, kind)


if __name__ == "__main__":
    main()
