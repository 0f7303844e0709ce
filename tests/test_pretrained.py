"""Every layout in and out, files that must be refused, and the same logits as the code that wrote them."""
from dataclasses import replace
import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import pytest
from safetensors.torch import save_file
import torch
from torch import nn

from clip_lab.archives import read_tensors
from clip_lab.images import preprocess as make_preprocess
from clip_lab.layouts import from_openai, infer_config, to_openai
from clip_lab.model import CONFIGS, build
from clip_lab.pretrained import (RELEASED, available_models, convert, load, locate, read, save, weights_hash)
from references import TINY_RESNET, TINY_VIT, inputs, open_clip, open_clip_tiny, tiny, transformers_model  # noqa: F401

BOTH = pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=lambda c: c.name)


class Harmful:
    "A pickle that creates the file `target` when it is opened as a program."
    def __init__(self, target): self.target = target
    def __reduce__(self): return os.system, (f"touch {self.target}",)


def same_tensors(a, b): return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def own_file(config, folder, **kwargs): return save(tiny(config), make_preprocess(config.image_resolution), folder / "own.safetensors", **kwargs)


def archive(model, path):
    "A TorchScript archive as OpenAI published it: the state, three scalars, and a mask that is no part of the state."
    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children(): self.add_module(name, child)
            for name, p in model.named_parameters(recurse=False): self.register_parameter(name, p)
            c = model.config
            for name, n in (("input_resolution", c.image_resolution), ("context_length", c.context_length), ("vocab_size", c.vocab_size)):
                self.register_buffer(name, torch.tensor(n))
            self.transformer.resblocks[0].attn_mask = torch.zeros(3, 3)
        def forward(self, x): return self.visual(x) * self.logit_scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Published(), torch.zeros(1, 3, *2 * [model.config.image_resolution], dtype=model.dtype))
        torch.jit.save(traced, path)
        return torch.jit.load(path).state_dict()


# ---- TorchScript archives


@BOTH
def test_an_archive_is_read_as_torch_reads_it(config, tmp_path):
    expected = archive(tiny(config), tmp_path / "model.pt")
    found, _, is_archive = read_tensors(tmp_path / "model.pt")
    assert is_archive and same_tensors(found, expected)
    checkpoint = read(tmp_path / "model.pt")
    assert (checkpoint.layout, checkpoint.config.activation) == ("openai", "quickgelu")
    assert same_tensors(checkpoint.state, tiny(config).state_dict())


def test_a_half_precision_archive_is_loaded_as_float32(tmp_path):
    model = tiny(TINY_VIT)
    archive(model.bfloat16(), tmp_path / "model.pt")
    loaded, _ = load(tmp_path / "model.pt")
    assert loaded.dtype == torch.float32 and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.visual.proj, model.visual.proj.float())
    assert load(tmp_path / "model.pt", dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("pickled", [
    lambda harm: pickle.dumps(harm),
    lambda harm: pickle.dumps({"state_dict": [harm]}, protocol=2),
    lambda harm: b"c__torch__.x\nModel\n)\x81" + pickle.dumps({"weight": harm}, protocol=2)[2:-1] + b"b.",        # inside an object's state
    lambda harm: b"cbuiltins\neval\n(S'open(\"" + str(harm.target).encode() + b"\", \"w\")'\ntR.",
    lambda harm: b"ctorch.jit._pickle\nbuild_intlist\n(c__builtin__\nexec\ntR.",
    lambda harm: b"ctorch\nload\n(S'x'\ntR.",
    lambda harm: b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
], ids=["os.system", "in a list", "in an object", "eval", "exec as an argument", "torch.load", "dotted name"])
def test_a_harmful_archive_is_refused_and_not_run(pickled, tmp_path):
    target = tmp_path / "harm"
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as z:
        z.writestr("x/constants.pkl", pickle.dumps(()))
        z.writestr("x/data.pkl", pickled(Harmful(target)))
    with pytest.raises(ValueError, match="could run code.*no use for"): load(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_harmful_checkpoint_is_refused_and_not_run(legacy, tmp_path):
    target = tmp_path / "harm"
    torch.save({"state_dict": Harmful(target)}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="could run code"): load(tmp_path / "x.pt")
    assert not target.exists()


def test_a_tensor_cannot_reach_outside_its_storage(tmp_path):
    archive(tiny(TINY_VIT), tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name in old.namelist(): new.writestr(name, old.read(name)[:4] if "/data/" in name else old.read(name))
    with pytest.raises(ValueError, match="short.pt cannot be read"): read_tensors(tmp_path / "short.pt")


# ---- other people's code


@torch.no_grad()
@pytest.mark.parametrize("theirs, ours", [("quick_gelu", "quickgelu"), ("gelu", "gelu")])
def test_a_transformers_directory_gives_its_logits(theirs, ours, tmp_path):
    reference = transformers_model(theirs)
    reference.save_pretrained(tmp_path / "hf")
    model, preprocess = load(tmp_path / "hf")
    assert (model.config.activation, model.config.text_heads, model.config.vision_heads) == (ours, 2, None)
    assert preprocess == make_preprocess(32)
    pictures, tokens = inputs(TINY_VIT)
    expected = reference(pixel_values=pictures, input_ids=tokens).logits_per_image
    torch.testing.assert_close(model(pictures, tokens)[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny(replace(TINY_VIT, activation="gelu", text_heads=2))
    save(model, make_preprocess(32, mean=(.5, .5, .5), std=(.2, .3, .4)), tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "hf", "hf")
    reference, report = transformers.CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pictures, tokens = inputs(TINY_VIT)
    torch.testing.assert_close(model(pictures, tokens)[0], reference.eval()(pixel_values=pictures, input_ids=tokens).logits_per_image, atol=1e-4, rtol=0)
    assert load(tmp_path / "hf")[1] == make_preprocess(32, mean=(.5, .5, .5), std=(.2, .3, .4))


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("kind, layout", [("CLIP", "open_clip"), ("CustomTextCLIP", "open_clip_custom")])
def test_open_clip_files_in_both_directions(open_clip, config, kind, layout, tmp_path):
    reference = open_clip_tiny(open_clip, config, kind)
    torch.save({"epoch": 1, "state_dict": {"module." + k: t for k, t in reference.state_dict().items()}}, tmp_path / "epoch_1.pt")
    model, preprocess = load(tmp_path / "epoch_1.pt", activation="quickgelu")
    assert read(tmp_path / "epoch_1.pt", "quickgelu").layout == layout
    pictures, tokens = inputs(config)
    torch.testing.assert_close(model.encode_image(pictures), reference.encode_image(pictures), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens), reference.encode_text(tokens), atol=1e-5, rtol=1e-5)
    convert(save(model, preprocess, tmp_path / "own.safetensors"), tmp_path / "oc", layout)
    assert same_tensors(read_tensors(tmp_path / "oc" / "open_clip_model.safetensors")[0], dict(reference.state_dict()))
    cfg = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())["model_cfg"]
    rebuilt = getattr(open_clip, kind)(**{k: v for k, v in cfg.items() if k != "custom_text"}).eval()      # from the JSON that we wrote
    rebuilt.load_state_dict(reference.state_dict())
    torch.testing.assert_close(rebuilt.encode_image(pictures), model.encode_image(pictures), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_a_full_size_vit_b_32_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build("ViT-B/32", seed=0)
    save(model, make_preprocess(224), tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "hf", "hf")
    reference = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    picture, tokens = inputs(CONFIGS["ViT-B/32"], n=2)
    torch.testing.assert_close(model(picture, tokens)[0], reference(pixel_values=picture, input_ids=tokens).logits_per_image, atol=1e-4, rtol=0)
    back, _ = load(tmp_path / "hf")
    assert back.config == CONFIGS["ViT-B/32"] and weights_hash(back) == weights_hash(model)


# ---- round trips


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["openai", "open_clip", "open_clip_custom", "hf", "clip_lab"])
def test_round_trips_change_no_bit(layout, config, dtype, tmp_path):
    own = own_file(config, tmp_path, dtype=dtype)
    target = tmp_path / ("there" + {"openai": ".pt", "clip_lab": ".safetensors"}.get(layout, ""))
    if (config, layout) == (TINY_RESNET, "hf"):
        with pytest.raises(ValueError, match="is a ResNet"): convert(own, target, layout)
        return
    first, back = read(own), read(convert(convert(own, target, layout), tmp_path / "back.safetensors", "clip_lab"))
    assert first.state["visual.conv1.weight"].dtype == dtype and same_tensors(first.state, back.state)
    assert replace(back.config, name="") == replace(first.config, name="") and back.preprocess == first.preprocess


@BOTH
@pytest.mark.parametrize("layout", ["openai", "open_clip", "open_clip_custom"])
def test_wrapped_checkpoints_are_unwrapped(layout, config):
    state = tiny(config).state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        back, found = to_openai({prefix + k: t for k, t in from_openai(state, layout).items()})
        assert found == layout and same_tensors(back, dict(state))


def test_own_file_keeps_everything(tmp_path):
    config, preprocess = replace(TINY_RESNET, activation="gelu", name="mine"), make_preprocess(64, orient=True, background="white")
    model = tiny(config)
    path = save(model, preprocess, tmp_path / "sub" / "mine.safetensors", notes={"seed": 3, "scores": [0.5]})
    loaded, transform = load(path)
    assert (loaded.config, transform, read(path).notes) == (config, preprocess, {"seed": 3, "scores": [0.5]})
    assert weights_hash(loaded) == weights_hash(model) and not loaded.training
    assert [p.name for p in path.parent.iterdir()] == ["mine.safetensors"]      # no partial file is left
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode           # readable for whom other new files are


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = own_file(TINY_VIT, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("clip_lab.whole.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): own_file(TINY_VIT, tmp_path, dtype=torch.float16)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_hash_follows_the_weights_and_nothing_else(tmp_path):
    model = tiny(TINY_RESNET)
    first = weights_hash(model)
    assert len(first) == 64 and first == weights_hash(load(own_file(TINY_RESNET, tmp_path))[0])
    with torch.no_grad(): model.visual.bn1.running_mean[0] += 1e-7
    assert weights_hash(model) != first
    state = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3)}               # by hand, from the definition
    by_hand = hashlib.sha256(b"a torch.int64 ()\n" + (3).to_bytes(8, "little") + b"b torch.float32 (2,)\n" + b"\x00\x00\x80\x3f\x00\x00\x00\x40")
    holder = nn.Module()
    for k, t in state.items(): holder.register_buffer(k, t)
    assert weights_hash(holder) == by_hand.hexdigest()


# ---- the activation is never guessed


@pytest.mark.parametrize("layout", ["open_clip", "open_clip_custom"])
def test_a_lone_open_clip_file_needs_the_activation(layout, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({k: t.clone() for k, t in from_openai(tiny(TINY_VIT).state_dict(), layout).items()}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors does not say.*open_clip_config\.json.*activation='gelu'"): load(path)
    assert load(path, activation="gelu")[0].config.activation == "gelu"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True, "text_cfg": {"heads": 1}}}))
    assert load(path)[0].config.activation == "quickgelu"
    with pytest.raises(ValueError, match="trained with activation 'quickgelu', and 'gelu' was asked for"): load(path, activation="gelu")


def test_a_stored_activation_cannot_be_overruled(tmp_path):
    with pytest.raises(ValueError, match="was asked for"): load(own_file(TINY_VIT, tmp_path), activation="gelu")
    with pytest.raises(ValueError, match="neither activation nor heads"):
        convert(save(tiny(replace(TINY_VIT, activation="gelu")), make_preprocess(32), tmp_path / "g.safetensors"), tmp_path / "g.pt", "openai")


@pytest.mark.parametrize("edit, message", [
    ({"model_type": "siglip"}, "model type 'siglip'"),
    ({"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}, r"activations \['gelu', 'quick_gelu'\]"),
    ({"text_config": {"hidden_act": "gelu_new"}, "vision_config": {"hidden_act": "gelu_new"}}, "gelu_new"),
    ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps=1e-06"),
    ({"text_config": {"eos_token_id": 5, "vocab_size": 600}}, "token 5; .* 599"),
])
def test_transformers_models_that_compute_something_else(edit, message, tmp_path):
    convert(own_file(TINY_VIT, tmp_path), tmp_path / "hf", "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "clip"} | edit))
    with pytest.raises(ValueError, match=message): load(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("file, content, message", [
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}, "timm_model_name"),
    ("open_clip_config.json", {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "x"}}}, "hf_tokenizer_name"),
    ("open_clip_config.json", {"model_cfg": {"quick_gelu": True, "text_cfg": {"heads": 1}}, "preprocess_cfg": {"resize_mode": "squash"}}, "'squash'"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 40}, "crop_size": 32}, r"\{32, 40\}|\{40, 32\}"),
    ("preprocessor_config.json", {"resample": 2}, "'resample': 2"),
])
def test_settings_beside_the_weights_that_we_do_not_follow(file, content, message, tmp_path):
    folder = convert(own_file(TINY_VIT, tmp_path), tmp_path / "there", "open_clip" if "open_clip" in file else "hf")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message): load(folder)


# ---- files that do not fit


def test_keys_that_do_not_fit_are_listed_with_their_number(tmp_path):
    state = tiny(TINY_VIT).state_dict()
    bad = {k.replace(".mlp.", ".ffn."): t for k, t in state.items()} | {"logit_bias": torch.zeros(())}
    bad["ln_final.bias"] = torch.zeros(65)
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error: load(tmp_path / "bad.pt", activation="gelu")
    message = str(error.value)
    assert "bad.pt does not fit" in message and "missing: transformer.resblocks.0.mlp.c_fc.bias" in message and "(16 in all)" in message
    assert "unexpected: logit_bias" in message and "(17 in all)" in message and "wrong shape: ln_final.bias (65,) instead of (64,)" in message


@pytest.mark.parametrize("content, message", [
    (b"", "cannot be read"), (b"PK\x03\x04 and then nothing", "cannot be read"), (b"<html>Not found</html>", "x.pt")])
def test_broken_files_are_named(content, message, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message): load(tmp_path / "x.pt", activation="gelu")


def test_truncated_safetensors(tmp_path):
    path = own_file(TINY_VIT, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="own.safetensors is not a complete safetensors file"): load(path)


def test_a_state_dict_of_something_else(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="linear.pt.*not those of a CLIP model.*'bias', 'weight'"): load(tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="list.pt.*holds no state dict"): load(tmp_path / "list.pt")


def test_heads_are_not_guessed_either():
    with pytest.raises(ValueError, match="96 wide, which is not a multiple of 64"):
        infer_config(build(replace(TINY_VIT, text_width=96, text_heads=3), device="meta").state_dict(), activation="gelu")


@pytest.mark.parametrize("name", list(RELEASED))
def test_a_released_file_name_with_other_content(name, tmp_path):
    released = RELEASED[name]
    (tmp_path / released.file).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=f"{released.sha256[:16]}.*{released.url}"): load(tmp_path / released.file)
    with pytest.raises(ValueError, match="is the name of OpenAI's own file"): convert(own_file(TINY_VIT, tmp_path), tmp_path / "new" / released.file, "openai")


def test_newer_formats_and_wrong_arguments(tmp_path):
    path = own_file(TINY_VIT, tmp_path)
    tensors, metadata, _ = read_tensors(path)
    save_file(tensors, tmp_path / "newer.safetensors", metadata=metadata | {"clip_lab": "99"})
    with pytest.raises(ValueError, match="format version 99.*update clip_lab"): load(tmp_path / "newer.safetensors")
    with pytest.raises(ValueError, match="dtype torch.int8"): load(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="should end in .safetensors"): save(tiny(TINY_VIT), make_preprocess(32), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="makes 64 px pictures, tiny ViT takes 32 px"): save(tiny(TINY_VIT), make_preprocess(64), path)
    with pytest.raises(ValueError, match="unknown layout 'onnx'"): convert(path, tmp_path / "x", "onnx")
    with pytest.raises(FileNotFoundError, match="holds none of"): load(tmp_path / "sub") if (tmp_path / "sub").mkdir() is None else None
    white = save(tiny(TINY_VIT), make_preprocess(32, background="white"), tmp_path / "white.safetensors")
    with pytest.raises(ValueError, match="cannot describe the transform"): convert(white, tmp_path / "hf", "hf")


# ---- names, the hub, and no network


def test_names_are_openais():
    assert available_models() == ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "emoji", "photos"]
    prefixes = dict(zip(RELEASED, "afeb0e10 8fa8567b 7e526bd1 52378b40 be1cfb55 40d36571 5806e77c b8cca3fd 3035c92b".split()))
    assert {n: r.sha256[:8] for n, r in RELEASED.items()} == prefixes
    assert locate("emoji").parts[-3:] == ("assets", "weights", "emoji.safetensors")


@pytest.mark.parametrize("name, message", [
    ("ViT-B-32", "did you mean 'ViT-B/32'"), ("nothing.pt", "neither a file, a directory nor a model's name"), ("some/where/else", "neither a file")])
def test_unknown_names(name, message):
    with pytest.raises(FileNotFoundError, match=message): load(name)


def hub_cache(folder, repo, files):
    "A hub cache as huggingface_hub lays it out."
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in files: (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_a_hub_id_is_loaded_from_the_cache(layout, tmp_path):
    own = own_file(TINY_VIT, tmp_path)
    files = list(convert(own, tmp_path / layout, layout).iterdir())
    hub_cache(tmp_path / "cache", "someone/model", files)
    model, _ = load("someone/model", cache_dir=tmp_path / "cache", local_files_only=True)
    assert weights_hash(model) == weights_hash(load(own)[0])


def test_a_released_name_is_loaded_from_the_cache_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights = tmp_path / "open_clip_model.safetensors"
    save_file({k: t.clone() for k, t in tiny(TINY_VIT).state_dict().items()}, weights)
    hub_cache(tmp_path / "cache", RELEASED["ViT-B/32"].hub, [weights])
    with pytest.raises(ValueError, match="which is not ViT-B/32; delete it"): load("ViT-B/32", cache_dir=tmp_path / "cache", local_files_only=True)
    monkeypatch.setitem(CONFIGS, "ViT-B/32", replace(TINY_VIT, name="ViT-B/32"))
    model, preprocess = load("ViT-B/32", cache_dir=tmp_path / "cache", local_files_only=True)
    assert (model.config.activation, model.config.name, preprocess.size) == ("quickgelu", "ViT-B/32", 32)


def test_openais_own_cache_comes_first_and_its_hash_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    (tmp_path / ".cache" / "clip" / "RN50.pt").write_bytes(b"half a download")
    with pytest.raises(ValueError, match="possibly a truncated download"): load("RN50", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("name", ["RN50", "someone/model"])
def test_offline_without_a_cache_says_what_to_do(name, tmp_path):
    code = f"import clip_lab.pretrained as p\ntry: p.load({name!r})\nexcept FileNotFoundError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert "cannot be reached" in said and "HF_HOME" in said
    if name == "RN50": assert RELEASED["RN50"].url in said and "load('path/to/RN50.pt')" in said


def test_without_a_network_the_hub_is_asked_once(tmp_path):
    "A port where nobody listens, as the hub's address: the message comes after one question, not after the pauses of five more."
    code = ("import time, clip_lab.pretrained as p\n"
            "time.sleep = lambda seconds: print('PAUSE', seconds)\n"
            "try: p.load('RN50')\nexcept FileNotFoundError as e: print(e)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "cannot be reached (ConnectError" in done.stdout and "HF_HOME" in done.stdout
    assert "PAUSE" not in done.stdout and "Retrying" not in done.stderr


def test_local_files_are_loaded_without_slow_imports(tmp_path):
    path = own_file(TINY_VIT, tmp_path)
    code = (f"import sys, clip_lab.pretrained as p; p.load({str(path)!r})\n"
            "print([m for m in ('huggingface_hub', 'transformers', 'torch._dynamo', 'matplotlib', 'gradio', 'accelerate') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.weights
@torch.no_grad()
@pytest.mark.parametrize("name", list(RELEASED))
def test_released_weights(name):
    try: model, preprocess = load(name, local_files_only=True)
    except FileNotFoundError: pytest.skip("not in the hub's cache")
    assert model.config == CONFIGS[name] and preprocess == make_preprocess(model.config.image_resolution)
    assert model.encode_text(model.tokenize(["a photo of a cat"])).isfinite().all()
