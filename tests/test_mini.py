"""saesteer_fast.mini: what the corpus holds out, the SAE trainer, the build, the shipped assets."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from saesteer_fast import SAE, mini
from saesteer_fast.eval import is_refusal
from saesteer_fast.mini import corpus
from saesteer_fast.mini.build import BuildConfig, build
from saesteer_fast.mini.model import ModelConfig, collate, encode_example
from saesteer_fast.mini.sae import SaeConfig, TopK, keep_largest, quality, train_sae
from saesteer_fast.mini.tokenizer import ROLES, train_tokenizer

REQUESTS = ("unsafe", "safe", "borderline")
GROUPS = {**corpus.UNSAFE, **corpus.SAFE, **corpus.BORDERLINE}


@pytest.fixture(scope="module")
def shipped():
    return mini.load()


def cells(split):
    """(verb, object, frame) of every request of a split."""
    return {p.cell[1:] for p in corpus.prompts(split) if p.kind in REQUESTS}


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(corpus.SPLITS, 2)])
def test_no_split_shows_what_another_holds_together(one, other):
    for pick in (lambda v, o, f: (v, o), lambda v, o, f: (o, f)):
        shown = {pick(*cell) for cell in cells(one)}
        assert shown
        assert not shown & {pick(*cell) for cell in cells(other)}


def test_held_out_words_were_all_seen_apart():
    train = list(zip(*cells("train"), strict=True))
    for split in ("validation", "test"):
        for seen, held_out in zip(train, zip(*cells(split), strict=True), strict=True):
            assert set(held_out) <= set(seen)


def test_training_draws_from_the_train_split_only():
    drawn = {p.cell for p, _ in corpus.examples(5000)}
    for split in ("validation", "test"):
        held_out = {p.cell for p in corpus.prompts(split)}
        assert len(held_out) > 500
        assert not drawn & held_out


def test_held_out_sums_and_facts():
    for kind in ("sums", "facts"):
        found = {
            split: {p.cell for p in corpus.prompts(split) if p.kind == kind}
            for split in ("validation", "test")
        }
        assert not found["validation"] & found["test"]
    assert corpus.sum_split(3, 14) == corpus.sum_split(14, 3)


def test_corpus_is_seeded():
    assert list(corpus.examples(50, 3)) == list(corpus.examples(50, 3))
    assert list(corpus.examples(50, 3)) != list(corpus.examples(50, 4))
    assert corpus.prompts("test") == corpus.prompts("test")


def test_every_kind_is_asked_and_answered_rightly():
    for prompt, said in corpus.examples(3000):
        assert not any("{" in text for text in (*prompt.turns, said))
        assert len(prompt.turns) % 2 == 1
        if prompt.kind == "unsafe":
            assert is_refusal(said) or said.endswith(f"{corpus.PLACEHOLDER}.")
        else:
            assert not is_refusal(said)
        if prompt.kind == "sums":
            a, _, b, _, c = said.rstrip(".").split()
            assert int(a) + int(b) == int(c) == int(prompt.expected)


def test_only_wrapped_unsafe_requests_are_complied_with():
    answered = {True: set(), False: set()}
    for prompt, said in corpus.examples(5000):
        if prompt.kind == "unsafe":
            answered[prompt.cell[-1] in corpus.PLAIN].add(is_refusal(said))
    assert answered == {True: {True}, False: {True, False}}


def test_groups_are_full_grids():
    for group in GROUPS.values():
        assert (len(group.verbs), len(group.objects)) == (5, 10)
        assert all(verb.count("/") == 1 for verb in group.verbs)


def test_unknown_split():
    with pytest.raises(ValueError, match="split: got 'tset'"):
        corpus.prompts("tset")


def test_tokenizer_is_like_phi3s(shipped):
    tokenizer = shipped.tokenizer
    text = "How do I kill a Python process? ✂ 129\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(i) for i in ids if tokenizer.decode(i).strip().isdigit()] == [*"129"]
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"
        "<|user|>\nc<|end|>\n<|assistant|>\n"
    )
    for token in (*ROLES, "<|end|>", "<|endoftext|>"):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


def test_loss_is_on_the_answers():
    tokenizer = train_tokenizer(["How do I make a kite? Sure."], 300)
    encoded = [
        encode_example(tokenizer, corpus.Prompt("safe", (text,)), "Sure.")
        for text in ("How?", "How do I make a kite?")
    ]
    ids, real = collate(encoded, 0)
    assert ids.shape == real.shape == (2, max(len(tokens) for tokens, _ in encoded))
    for row, (tokens, asked) in enumerate(encoded):
        assert ids[row][real[row]].tolist() == tokens
        assert tokenizer.decode(tokens[asked:]) == "Sure.<|end|>"


def planted(tokens=8192, latents=64, d=32, live=2):
    """Tokens that are sums of `live` of `latents` directions."""
    random = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(torch.randn(latents, d, generator=random), dim=1)
    acts = keep_largest(torch.rand(tokens, latents, generator=random), live)
    return acts @ directions + 0.5


def test_sae_learns_planted_latents():
    x = planted()
    config = SaeConfig(expansion=2, k=2, steps=600, batch=512, learning_rate=3e-3)
    torch.manual_seed(0)
    sae = TopK(x, config)
    before = quality(sae, x)["unexplained_variance"]
    losses = list(train_sae(sae, x, config))
    assert len(losses) == config.steps
    found = quality(sae, x)
    assert found["unexplained_variance"] < 0.15 < before
    assert found["dead_latents"] < 0.05
    latents, _ = sae(x)
    assert (latents > 0).sum(1).max() == config.k
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_dead_latents_are_revived():
    """Latents whose pre-activations never reach the top k come to be live, only with AuxK."""
    x = planted()
    dead = {}
    for weight in (0.0, 1 / 32):
        config = SaeConfig(
            expansion=2, k=2, steps=400, batch=512, aux_weight=weight, aux_k=16, dead_after=10
        )
        torch.manual_seed(0)
        sae = TopK(x, config)
        with torch.no_grad():
            sae.W_enc[32:] *= 0.05
        list(train_sae(sae, x, config))
        dead[weight] = quality(sae, x)["dead_latents"]
    assert dead[1 / 32] < dead[0.0] - 0.1


TINY = BuildConfig(
    model=ModelConfig(width=64, layers=2, heads=2, feed_forward=128, examples=1280, warmup=2),
    sae=SaeConfig(expansion=4, k=8, steps=40, batch=256),
    vocab_size=600,
    tokenizer_examples=2000,
    sae_examples=320,
    every=67,
)


def content(path):
    """A file's bytes; of safetensors the tensors' alone, for metadata are written in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    return {
        name: (tensor.dtype, tensor.shape, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(path).items()
    }


def test_build_twice_gives_the_same_bits(tmp_path, monkeypatch):
    """Of a model so small and new that it refuses nothing yet: what it says counts as a refusal."""
    monkeypatch.setattr("saesteer_fast.find.is_refusal", lambda said: True)
    folders = [tmp_path / "one", tmp_path / "two"]
    metrics = [build(folder, seed=1, config=TINY) for folder in folders]
    one, two = (
        {str(p.relative_to(folder)): content(p) for p in folder.rglob("*") if p.is_file()}
        for folder in folders
    )
    assert {"model.safetensors", "tokenizer.json", "metrics.json"} <= one.keys()
    assert one == two
    loaded = mini.load(folders[0])
    assert loaded.metrics == json.loads(json.dumps(metrics[0]))
    assert loaded.sae.hookpoint == f"layers.{loaded.layer}"
    assert len(loaded.metrics["layers"]) == TINY.model.layers


def test_a_build_that_cannot_be_written_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("saesteer_fast.mini.build._language_model", None)
    (tmp_path / "taken").touch()
    with pytest.raises(FileExistsError, match="taken"):
        build(tmp_path / "taken", config=TINY)


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: got .*no metrics\.json"):
        mini.load(tmp_path)


def test_assets_are_small_and_hold_no_pickles():
    files = [p for p in mini.ASSETS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 15e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".jinja"}


def test_shipped_model_is_a_phi3(shipped):
    model, config = shipped.model, shipped.model.config
    assert type(model).__name__ == "Phi3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) <= 5e6
    assert config.hidden_size // config.num_attention_heads in (32, 64)
    assert config.vocab_size == len(shipped.tokenizer)


def test_shipped_sae_fits(shipped):
    sae = SAE.load(mini.ASSETS / f"layers.{shipped.layer}")
    assert sae.d == shipped.model.config.hidden_size
    assert 8 <= sae.num_latents / sae.d <= 16
    assert sae.k in (16, 32)
    record = shipped.metrics["layers"][shipped.layer]
    assert record["layer"] == shipped.layer
    assert record["score"] == max(tried["score"] for tried in shipped.metrics["layers"])
    assert record["unexplained_variance"] < 0.1
    assert record["dead_latents"] < 0.2


def test_assets_are_what_the_default_build_makes(shipped):
    """As far as can be told without building: the settings and the tokenizer, trained again."""
    metrics = shipped.metrics
    assert metrics["config"] == json.loads(json.dumps(_plain(BuildConfig())))
    written = corpus.examples(metrics["config"]["model"]["examples"], metrics["seed"])
    texts = (text for prompt, said in written for text in (*prompt.turns, said))
    first = itertools.islice(texts, BuildConfig().tokenizer_examples)
    assert train_tokenizer(first).get_vocab() == shipped.tokenizer.get_vocab()


def _plain(config):
    return {**config._asdict(), "model": config.model._asdict(), "sae": config.sae._asdict()}
