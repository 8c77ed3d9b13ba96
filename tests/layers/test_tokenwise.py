"""What proves to treat each token alone, and that the proof is made where a wrong index is an error and not the process's end."""

from __future__ import annotations

import torch
from ranks import ON_GPU, run_ranks
from torch import Tensor, nn

from ds_seqpar.layers.tokenwise import is_tokenwise


class _Table(nn.Embedding):
    """Takes what it is given for positions, as OPT's position embedding takes an attention mask."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input.cumsum(1)[..., 0] * 1000).long())


def _seen() -> list[bool]:
    device = torch.device("cuda") if ON_GPU else torch.device("cpu")
    modules = (nn.LayerNorm(48), nn.Linear(48, 20), nn.Softmax(1), _Table(8, 48), nn.Embedding(8, 48))
    found = [is_tokenwise(m.to(device), 48, torch.zeros(1, device=device)) for m in modules]
    if ON_GPU:
        torch.cuda.synchronize()  # where an index past a table's end would show
    return found


def test_rows_alone() -> None:
    assert run_ranks(1, _seen, deepspeed=False)[0] == [True, True, False, False, False]


def test_the_module_is_left_as_it_was() -> None:
    norm = nn.LayerNorm(48).train()
    before = norm.weight.detach().clone()
    assert is_tokenwise(norm, 48)
    assert norm.training and torch.equal(norm.weight, before) and norm.weight.grad is None
