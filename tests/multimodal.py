"""Models of several parts made tiny: a vision tower and a language model, and batches with images in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["IMAGE", "PARTS", "Parts", "with_images"]

IMAGE = 3  # the id of an image's tokens


@dataclass(frozen=True)
class Parts:
    """`config` of the whole, `towers` its other parts' configs; `shapes` of one image's tensors, `tokens` that it stands for.

    `ids`: the argument, if any, that marks which tokens are an image's. `each`: numbers that every row has. `mask`: the argument, if
    any, that says which tokens see the row's image, [b, s, 1, 1].
    """

    config: Mapping[str, Any]
    towers: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    tokens: int = 4
    grid: tuple[int, int, int] | None = None
    ids: str = ""
    each: Mapping[str, Any] = field(default_factory=dict)
    mask: str = ""
    text: Mapping[str, Any] = field(default_factory=dict)


_VIT = dict(
    hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4
)
_PIXELS = {"pixel_values": (1, 3, 8, 8)}
_QWEN = dict(depth=2, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
_PATCHES = {"pixel_values": (16, 96)}  # 4 x 4 patches of 3 x 2 x 4 x 4
_MUSE = dict(
    patch_size=4, pos_emb_height=4, pos_emb_width=4, num_attention_heads=2, num_hidden_layers=2, hidden_size=16, intermediate_size=20,
)  # fmt: skip
PARTS: dict[str, Parts] = {
    "gemma3": Parts(
        dict(image_token_index=IMAGE, mm_tokens_per_image=4),
        {"vision_config": _VIT | dict(image_size=16, vision_use_head=False)},
        {"pixel_values": (1, 3, 16, 16)}, ids="token_type_ids",
    ),
    "got_ocr2": Parts(
        dict(image_token_index=IMAGE),
        {
            "vision_config": dict(
                hidden_size=16, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4, window_size=4,
                global_attn_indexes=[1], mlp_dim=20,
            ),
        },
        {"pixel_values": (1, 3, 32, 32)},
    ),
    "llama4": Parts(
        dict(image_token_index=IMAGE),
        {
            "vision_config": _VIT
            | dict(image_size=16, intermediate_size=96, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)
        },
        {"pixel_values": (1, 3, 16, 16)},
    ),
    "llava": Parts(dict(image_token_index=IMAGE), {"vision_config": _VIT}, _PIXELS),
    "mllama": Parts(
        dict(image_token_index=IMAGE),
        {
            "vision_config": dict(
                hidden_size=16, num_hidden_layers=2, num_global_layers=1, attention_heads=2, intermediate_size=20, vision_output_dim=32,
                image_size=8, patch_size=4, max_num_tiles=1, intermediate_layers_indices=[1], supported_aspect_ratios=[[1, 1]],
            ),
        },
        {"pixel_values": (1, 1, 1, 3, 8, 8)}, mask="cross_attention_mask",
        each={"aspect_ratio_ids": [1], "aspect_ratio_mask": [[1]]},
        text=dict(num_hidden_layers=3, cross_attention_layers=[1]),
    ),
    "muse_glimmer": Parts(
        dict(image_token_id=IMAGE, out_hidden_size=64, projector_hidden_size=20), {"vision_config": _MUSE}, _PATCHES,
        grid=(1, 4, 4),
    ),
    "muse_spark": Parts(
        dict(image_token_id=IMAGE, out_hidden_size=64, projector_hidden_size=20),
        {
            "vision_config": _MUSE,
            "audio_config": dict(
                patch_sizes=[4, 2], hidden_sizes=[6, 8], depths=[1, 1], num_hidden_layers=2, out_hidden_size=48,
            ),
        },
        _PATCHES, grid=(1, 4, 4),
    ),
    "qwen2_vl": Parts(
        dict(image_token_id=IMAGE), {"vision_config": _QWEN | dict(embed_dim=16, hidden_size=48, mlp_ratio=2)}, _PATCHES,
        grid=(1, 4, 4), ids="mm_token_type_ids",
    ),
    "qwen3_vl": Parts(
        dict(image_token_id=IMAGE),
        {
            "vision_config": _QWEN
            | dict(hidden_size=16, intermediate_size=20, out_hidden_size=48, num_position_embeddings=16)
            | dict(deepstack_visual_indexes=[0, 1])
        },
        _PATCHES, grid=(1, 4, 4), ids="mm_token_type_ids",
    ),
    "qwen3_vl_moe": Parts(
        dict(image_token_id=IMAGE),
        {
            "vision_config": _QWEN
            | dict(hidden_size=16, intermediate_size=20, out_hidden_size=48, num_position_embeddings=16)
            | dict(deepstack_visual_indexes=[0, 1])
        },
        _PATCHES, grid=(1, 4, 4), ids="mm_token_type_ids",
    ),
}  # fmt: skip


def with_images(
    batch: dict[str, torch.Tensor], model_type: str, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """`batch` with one image in every row, after its first token; nothing is predicted of an image's tokens."""
    parts = PARTS[model_type]
    ids, labels = batch["input_ids"].clone(), batch["labels"].clone()
    rows, here = ids.shape[0], slice(1, 1 + parts.tokens)
    ids[ids == IMAGE] = IMAGE + 1
    ids[:, here], labels[:, here] = IMAGE, -100
    generator = torch.Generator().manual_seed(seed)
    more = {
        name: torch.randn((rows * shape[0], *shape[1:]), generator=generator).to(ids.device, dtype)
        for name, shape in parts.shapes.items()
    }
    if parts.grid is not None:
        more["image_grid_thw"] = torch.tensor([parts.grid] * rows, device=ids.device)
    if parts.ids:
        more[parts.ids] = (ids == IMAGE).long()
    for name, value in parts.each.items():
        more[name] = torch.tensor([value] * rows, device=ids.device)
    if parts.mask:
        more[parts.mask] = torch.ones((*ids.shape, 1, 1), dtype=torch.long, device=ids.device)
        more[parts.mask][:, :2] = 0
    return {**batch, "input_ids": ids, "labels": labels, **more}
