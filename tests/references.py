"""Small models and outside implementations that several tests compare with."""
import importlib
import importlib.util
import sys
import types

import pytest
import torch

from clip_lab.model import CLIPConfig, build

TEXT = dict(context_length=16, vocab_size=600, text_width=64, text_heads=1, text_layers=2)
TINY_VIT = CLIPConfig("tiny ViT", 16, 32, 2, 128, 16, **TEXT)
TINY_RESNET = CLIPConfig("tiny ResNet", 16, 64, (1, 2, 1, 1), 8, **TEXT)


def shaken(model, seed=0):
    "Every parameter and statistic away from its initial value, so that no ones and zeros hide a mistake."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point(): continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"): tensor.copy_(1 + noise.abs())
            elif name != "logit_scale": tensor.copy_(0.1 * noise + (tensor.mean() if tensor.ndim == 1 else 0))
    return model.eval()


def tiny(config, seed=0): return shaken(build(config, seed=seed), seed)


def inputs(config, n=3, seed=0):
    "Random pictures, and token rows of different lengths padded with 0."
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(n, 3, config.image_resolution, config.image_resolution, generator=generator)
    tokens = torch.zeros(n, config.context_length, dtype=torch.long)
    for row, length in zip(tokens, range(3, 3 + n)):
        row[:length] = torch.randint(1, config.vocab_size - 2, (length,), generator=generator)
        row[0], row[length - 1] = config.vocab_size - 2, config.vocab_size - 1
    return pictures, tokens


def transformers_model(activation="quick_gelu", heads=2, eos=599):
    "A random CLIPModel of transformers with the sizes of TINY_VIT."
    transformers = pytest.importorskip("transformers")
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads, max_position_embeddings=16, vocab_size=600,
                hidden_act=activation, projection_dim=16, bos_token_id=598, eos_token_id=eos)
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=heads, image_size=32, patch_size=16,
                  hidden_act=activation, projection_dim=16)
    return shaken(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


@pytest.fixture
def open_clip(monkeypatch):
    "open_clip's model code without torchvision, which it imports for one class that a forward pass never uses."
    spec = importlib.util.find_spec("open_clip")
    if spec is None: pytest.skip("open_clip is not installed (pip install --no-deps open-clip-torch)")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    stubs = {"open_clip": package, "open_clip.hf_model": types.ModuleType("open_clip.hf_model"),
             **{n: types.ModuleType(n) for n in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    stubs["open_clip.hf_model"].HFTextEncoder = object
    for name in [n for n in sys.modules if n.split(".")[0] in ("open_clip", "torchvision")]: monkeypatch.delitem(sys.modules, name)
    for name, stub in stubs.items(): monkeypatch.setitem(sys.modules, name, stub)
    yield importlib.import_module("open_clip.model")
    for name in [n for n in sys.modules if n.split(".")[0] == "open_clip"]: del sys.modules[name]


def open_clip_tiny(open_clip, config, kind="CLIP"):
    "A random model of open_clip with the sizes of `config`."
    vision = dict(image_size=config.image_resolution, width=config.vision_width,
                  layers=config.vision_layers if config.is_vit else list(config.vision_layers), patch_size=config.vision_patch_size)
    text = dict(context_length=config.context_length, vocab_size=config.vocab_size, width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    return shaken(getattr(open_clip, kind)(config.embed_dim, vision, text, quick_gelu=config.activation == "quickgelu"))
