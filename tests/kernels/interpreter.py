"""Fails where Triton's interpreter cannot run what Triton's compiler can: `TRITON_INTERPRET=1 python interpreter.py`.

Triton 3.6's takes no loop bound beside NumPy 2.4 (3.8's does); 3.9's makes integers of a scalar mask beside a block's.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _sums(x, out, rows, width, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(0, rows):
        total += tl.load(x + row * width + cols, mask=(row < rows) & (cols < width), other=0.0)
    tl.store(out + cols, total, mask=cols < width)


if __name__ == "__main__":
    out = torch.zeros(3)
    _sums[(1,)](torch.ones(2, 3), out, 2, 3, BLOCK=4)
    assert out.tolist() == [2.0, 2.0, 2.0]
