"""The public Stable Diffusion sizes, and counting parameters without weights, on PyTorch's meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progidiff.cards import load_card
from progidiff.errors import ModelError
from progidiff.model.components import NETWORKS, read_json, require_folder, resolve_class
from progidiff.places import INDEX_NAME, model_size

if TYPE_CHECKING:
    import torch

# "367.13M trainable parameters": ProGiDiff, arXiv 2601.16060.
PAPER_TRAINABLE_PARAMETERS = 367_130_000

# The paper does not publish its image encoder. A control branch without its stock hint block leaves room for
# 6.94 M parameters with SD 1.5 (3.99 M with SD 2.1); this U-shaped encoder down to stride 32 fills it.
SD_IMAGE_ENCODER: Mapping[str, Any] = {
    "in_channels": 1,
    "stride": 8,
    "stem_patch": 2,
    "block_out_channels": (64, 128, 192, 256, 256),
    "feature_channels": 176,
    "norm_num_groups": 16,
}

_UNET: Mapping[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": False,
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_VAE: Mapping[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
_TEXT: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "vocab_size": 49408,
}


@dataclass(frozen=True)
class Backbone:
    """Constructor arguments of one published backbone, by component."""

    title: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    image_encoder: Mapping[str, Any]


BACKBONES: Mapping[str, Backbone] = {
    "sd15": Backbone(
        title="Stable Diffusion 1.5",
        unet={**_UNET, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        vae={**_VAE, "sample_size": 512},
        text_encoder={  # CLIP ViT-L/14
            **_TEXT,
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        image_encoder=SD_IMAGE_ENCODER,
    ),
    "sd21": Backbone(
        title="Stable Diffusion 2.1",
        unet={
            **_UNET,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        vae={**_VAE, "sample_size": 768},
        text_encoder={  # OpenCLIP ViT-H/14 without its last layer
            **_TEXT,
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
        image_encoder=SD_IMAGE_ENCODER,
    ),
}


def backbone_name(unet_config: Mapping[str, Any]) -> str | None:
    """Which published backbone a UNet's config is: ``"sd15"`` (as all SD 1.x), ``"sd21"`` or ``None``."""
    for name, backbone in BACKBONES.items():
        same = ("cross_attention_dim", "block_out_channels", "in_channels")
        if all(_plain(unet_config.get(key)) == _plain(backbone.unet[key]) for key in same):
            return name
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


TRAINABLE = ("controlnet", "image_encoder")


@dataclass(frozen=True)
class ComponentRow:
    """One network of a model; ``trainable`` tells whether the control stage trains it."""

    component: str
    class_name: str
    parameters: int
    trainable: bool

    def as_dict(self) -> dict[str, str | int | bool]:
        return {
            "component": self.component,
            "class": self.class_name,
            "parameters": self.parameters,
            "trainable": self.trainable,
        }


def parameter_table(config: str | Path) -> list[ComponentRow]:
    """Parameters per network of a named backbone (``"sd15"``, ``"sd21"``) or of a model folder; no weights
    are read.

    Raises:
        ModelError: neither a known name nor a model folder.
    """
    import torch

    with torch.device("meta"):
        if isinstance(config, str) and config in BACKBONES:
            networks = _published(BACKBONES[config])
        else:
            networks = _from_configs(_model_folder(config))
    return [
        ComponentRow(name, type(net).__name__, sum(p.numel() for p in net.parameters()), name in TRAINABLE)
        for name, net in networks.items()
    ]


def trainable_parameters(rows: Sequence[ComponentRow]) -> int:
    """Sum over the trainable rows."""
    return sum(row.parameters for row in rows if row.trainable)


def _published(backbone: Backbone) -> dict[str, torch.nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from progidiff.model.networks import ControlBranch, ImageEncoder

    unet = UNet2DConditionModel(**backbone.unet)
    return {
        "vae": AutoencoderKL(**backbone.vae),
        "unet": unet,
        "controlnet": ControlBranch.from_unet(unet),
        "image_encoder": ImageEncoder(
            **backbone.image_encoder,
            hint_channels=unet.config.block_out_channels[0],
            text_dim=unet.config.cross_attention_dim,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**backbone.text_encoder)),
    }


def _model_folder(config: str | Path) -> Path:
    folder = Path(config)
    if not folder.is_dir():
        raise ModelError(
            f'"{config}" is neither a known configuration ({", ".join(BACKBONES)}) nor a model folder; name one of these.'
        )
    return folder


def _from_configs(folder: Path) -> dict[str, torch.nn.Module]:
    index = read_json(folder / INDEX_NAME)
    networks: dict[str, torch.nn.Module] = {}
    for name in NETWORKS:
        if name not in index:
            continue
        cls = resolve_class(name, index[name])
        settings: dict[str, Any] = read_json(require_folder(folder, name) / "config.json")
        try:
            networks[name] = cls(cls.config_class(**settings)) if name == "text_encoder" else cls.from_config(settings)
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(
                f'The config of the model\'s "{name}" does not describe a {cls.__name__}; copy the whole model folder again.'
            ) from error
    return networks


def print_info(config_or_folder: str | Path, as_json: bool = False) -> str | dict[str, Any]:
    """What a configuration or a model folder is: a text for people, or (``as_json``) a dictionary of plain
    JSON values.

    The dictionary has ``config``, ``components`` (component, class, parameters, trainable),
    ``total_parameters`` and ``trainable_parameters``; for a published backbone also
    ``paper_trainable_parameters``, ``deviation_percent``, ``within_one_percent``, ``closest_config`` and
    ``statement``; for a folder ``bytes`` and ``card``.

    Raises:
        ModelError: neither a known name nor a model folder.
    """
    rows = parameter_table(config_or_folder)
    info: dict[str, Any] = {
        "config": str(config_or_folder),
        "components": [row.as_dict() for row in rows],
        "total_parameters": sum(row.parameters for row in rows),
        "trainable_parameters": trainable_parameters(rows),
    }
    if isinstance(config_or_folder, str) and config_or_folder in BACKBONES:
        info |= _beside_paper(config_or_folder, info["trainable_parameters"])
    else:
        folder = Path(config_or_folder)
        info |= {"bytes": model_size(folder), "card": load_card(folder).to_dict()}
    return info if as_json else _as_text(info, rows)


def _beside_paper(config: str, trainable: int) -> dict[str, Any]:
    found = {name: trainable if name == config else trainable_parameters(parameter_table(name)) for name in BACKBONES}
    off = {name: 100 * (count / PAPER_TRAINABLE_PARAMETERS - 1) for name, count in found.items()}
    closest = min(off, key=lambda name: abs(off[name]))
    within = abs(off[config]) <= 1
    verdict = "within" if within else "not within"
    others = "; ".join(f"{BACKBONES[n].title} has {found[n] / 1e6:.2f} M ({off[n]:+.2f} %)" for n in found if n != config)
    statement = (
        f"{BACKBONES[config].title}: {trainable / 1e6:.2f} M trainable parameters, {verdict} 1 % of the"
        f" paper's {PAPER_TRAINABLE_PARAMETERS / 1e6:.2f} M ({off[config]:+.2f} %); {others}. The closest fit"
        f" is {BACKBONES[closest].title}. The paper names neither the version nor the encoder's layout, so"
        " the encoder's widths were chosen here to match."
    )
    return {
        "paper_trainable_parameters": PAPER_TRAINABLE_PARAMETERS,
        "deviation_percent": round(off[config], 4),
        "within_one_percent": within,
        "closest_config": closest,
        "statement": statement,
    }


def _as_text(info: dict[str, Any], rows: Sequence[ComponentRow]) -> str:
    widths = max(len(row.component) for row in rows), max(len(row.class_name) for row in rows)
    lines = [f"{'component':<{max(widths[0], 9)}}  {'class':<{widths[1]}}  {'parameters':>13}  trained"]
    lines += [
        f"{row.component:<{max(widths[0], 9)}}  {row.class_name:<{widths[1]}}  {row.parameters:>13,}  "
        f"{'yes' if row.trainable else 'frozen'}"
        for row in rows
    ]
    lines += ["", f"total      {info['total_parameters']:,}", f"trainable  {info['trainable_parameters']:,}"]
    if "statement" in info:
        lines += ["", info["statement"]]
    if "card" in info:
        card = info["card"]
        lines += [
            "",
            f"model      {card['name']} ({card['model_id']}), {info['bytes'] / 1e6:.1f} MB",
            f"licence    {card['licence']}",
            (f"images     {', '.join(card['modalities'])}; {', '.join(card['planes'])}; {card['spacing_mm']:g} mm"),
            f"targets    {', '.join(card['vocabulary']) or 'none yet (not trained)'}",
            *(
                f"trained on {s['name']} ({s['licence']}):"
                f" {s['n'] if s['n'] is not None else 'unknown number of'} {s['what']}"
                for s in card["trained_on"]
            ),
            *(
                f"accuracy   {a['set']}, {a['target']}: {a['metric']} {a['value']:.3f} (n = {a['n_patients']}"
                f" patients, {a['n_slices']} slices)"
                for a in card["accuracy"]
            ),
        ]
        lines += [f"notes      {card['notes']}"] if card["notes"] else []
    return "\n".join(lines)
