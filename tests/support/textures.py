"Made-up color images."
import torch
from torch import nn

from archrepair.baselines.parts.augmented import to_uint8


def smooth_pictures(n: int, size: int = 32, seed: int = 0, width: int | None = None) -> torch.Tensor:
    "Smooth color images with full range, uint8 n×size×width×3."
    small = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return to_uint8(nn.functional.interpolate(small, (size, width or size), mode="bilinear", align_corners=True) * 255)


def textured_pictures(n: int, size: int, seed: int = 0) -> torch.Tensor:
    "Color images with texture, float n×3×size×size in gray levels."
    generator = torch.Generator().manual_seed(seed)
    smooth = nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size, mode="bilinear")
    mixing = torch.rand(n, 3, 3, generator=generator)
    texture = (mixing @ torch.randn(n, 3, size * size, generator=generator)).view(n, 3, size, size)
    return (smooth * 160 + 40 + 12 * texture).clamp(0, 255).round()
