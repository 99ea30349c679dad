"""Weights for models without any, in the place of SGLang's own, which are so small that all tokens are alike.

Runs in a server's process: it knows torch, and models as SGLang has built them.
"""

from __future__ import annotations

import torch

SEED = 2410_23317


def random_weights(model: torch.nn.Module) -> None:
    """Fill all weights of `model`, each by its name and size: the same in every process.

    Matrices keep the size of what they are given; vectors are scales, near one, unless their name ends in ``bias``.
    """
    for number, (name, weight) in enumerate(sorted(model.state_dict().items())):
        if not torch.is_floating_point(weight):
            continue
        random = torch.Generator(device=weight.device).manual_seed(SEED + number)
        if weight.dim() > 1:
            inputs = weight[0].numel() if weight.dim() == 2 or weight.dim() > 3 else weight.shape[-1]
            weight.normal_(0.0, inputs**-0.5, generator=random)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.02, generator=random)
        else:
            weight.normal_(1.0, 0.05, generator=random)
