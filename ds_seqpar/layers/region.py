"""Where a forward stands: how its tokens lie over the ranks, and what the layers of one model share.

Legend: b batch, s sequence, T = b*s tokens, t tp_size, c = ceil(T/t), h hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]

from ..comm.exchange import Exchange
from ..comm.regions import (
    copy_for_partial,
    gather_for_partial,
    gather_for_replicated,
    reduce_partial,
    reduce_scatter_partial,
    scatter,
)
from ..comm.tokens import rows_per_rank
from ..errors import SeqParError
from ..groups import ParallelGroups
from ..plan.report import ParameterEntry
from .early import EarlyGatherings
from .guard import InputGuard
from .partial import PartialGradients
from .random import ParallelRandom

__all__ = ["ShardingState", "TokenRegion"]


@dataclass(frozen=True)
class TokenRegion:
    """One forward's tokens. `cut`: each rank holds [1, c, h] of them; otherwise every rank holds [b, s, h].

    `exchange` moves the rows; a region that is not cut needs none. `summed_later`: the gradient of a column-parallel
    linear's input stays this rank's part, because the gather that the input came from sums it.
    `by_layer`: layers have backward passes of their own, see PartialGradients. `apart`: see ShardingState; a recompute groups
    linears as its forward did.
    `watched`: ids of modules whose hooks see plain tensors, see layers/models.py; of the forward's start, so that a recompute repeats it.
    `early`: gradients whose gathering starts where they are made.
    """

    batch: int
    seq: int
    cut: bool
    groups: ParallelGroups
    exchange: Exchange | None = None
    summed_later: bool = False
    by_layer: bool = field(default=False, compare=False)
    apart: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    watched: frozenset[int] = field(default=frozenset(), compare=False, repr=False)
    early: EarlyGatherings | None = field(default=None, compare=False, repr=False)

    @property
    def transport(self) -> Exchange:
        """What moves this region's rows. Only a region that cuts tokens has it."""
        assert self.exchange is not None, "a region that cuts tokens names what exchanges them"
        return self.exchange

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.seq

    @property
    def rows(self) -> int:
        """Rows that a rank holds: c where tokens are cut, otherwise T."""
        return rows_per_rank(self.tokens, self.groups.tp_size) if self.cut else self.tokens

    def local_shape(self, width: int) -> tuple[int, int, int]:
        """The shape in which a rank holds the region's activations."""
        return (1, self.rows, width) if self.cut else (self.batch, self.seq, width)

    def full_for_partial(self, local: Tensor) -> Tensor:
        """Local [1, c, ...] -> [b, s, ...] for work that is cut over the group; backward sums over it."""
        rows = local.reshape(self.rows, -1)
        group = self.groups.tp_group
        full = gather_for_partial(rows, self.tokens, group) if self.cut else copy_for_partial(rows, group)
        return full.view(self.batch, self.seq, *local.shape[2:])

    def full_for_replicated(self, local: Tensor) -> Tensor:
        """Local [1, c, ...] -> [b, s, ...] for work that every rank repeats alike."""
        if not self.cut:
            return local
        full = gather_for_replicated(local.reshape(self.rows, -1), self.tokens, self.groups.tp_group)
        return full.view(self.batch, self.seq, *local.shape[2:])

    def local_of_partial(self, partial: Tensor) -> Tensor:
        """[T, h] partial sums -> this rank's rows of their sum, in `local_shape`."""
        group = self.groups.tp_group
        local = reduce_scatter_partial(partial, group) if self.cut else reduce_partial(partial, group)
        return local.view(self.local_shape(partial.shape[-1]))

    def local_of_replicated(self, full: Tensor) -> Tensor:
        """[b, s, ...] on every rank -> this rank's rows, in `local_shape`."""
        if not self.cut:
            return full
        mine = scatter(full.reshape(self.tokens, -1), self.groups.tp_group)
        return mine.view(1, self.rows, *full.shape[2:])


@dataclass
class ShardingState:
    """What the sharded modules of one model share. Reached from each of them as `seqpar`."""

    groups: ParallelGroups
    sequence_parallel: bool
    exchange: Exchange
    recompute_mlp: bool
    loss_chunk_tokens: int
    partial: PartialGradients
    random: ParallelRandom
    guard: InputGuard
    guarded_seed: int | None = None
    region: TokenRegion | None = None
    begin: Callable[[int, int], TokenRegion] | None = None  # what the first layer of a forward calls, see `beginning`
    in_block: bool = False
    block_left: bool = False  # the running block's row-parallel linear has given its output, of this rank's rows
    block_forked: bool = False  # the running block opened a random stream of its own
    sums_rows_later: bool = False  # the running block's outputs go to the layer's code alone, see UnsummedRows
    hook_spans: list[tuple[int, int]] | None = None  # see `hooks_see_rows`; None where no hooks are the user's
    generation: int = 0  # how often the weights have changed
    apart: frozenset[int] = (
        frozenset()
    )  # ids of column-parallel linears that their block feeds with something else than its input
    found_apart: frozenset[int] = frozenset()  # those of the forwards so far; a forward begins with what was found before it
    materialised: Counter[str] = field(default_factory=Counter)
    early: EarlyGatherings = field(default_factory=EarlyGatherings)
    entries: dict[int, ParameterEntry] = field(
        default_factory=dict
    )  # by id: wrappers rename parameters, and unwrap them

    def __deepcopy__(self, memo: dict[int, object]) -> ShardingState:
        raise SeqParError(
            "a sharded model cannot be copied: gradient hooks and tags would stay behind; build the second model from the "
            "checkpoint and shard it too"
        )

    def region_for(
        self, batch: int, seq: int, *, by_layer: bool = False, watched: frozenset[int] = frozenset()
    ) -> TokenRegion:
        """The region of a forward over [b, s] tokens.

        Tokens are cut whenever a gradient may be asked for, so that a parameter's kind never depends on the call;
        without gradients, single-token decoding runs as plain tensor parallelism.
        """
        self.early.let_go()
        if torch._C._current_graph_task_id() == -1:  # a checkpoint of the user's repeats the forward within backward
            self.apart = self.found_apart
        cut = self.sequence_parallel and (torch.is_grad_enabled() or seq > 1)
        return TokenRegion(
            batch, seq, cut, self.groups, self.exchange,
            by_layer=by_layer, apart=self.apart, watched=watched, early=None if self.guard.any_hooked else self.early,
        )  # fmt: skip

    @contextmanager
    def hooks_see_rows(self) -> Iterator[None]:
        """Notes between which of autograd's sequence numbers a module ran whose hooks see this rank's rows."""
        spans = self.hook_spans
        if spans is None:
            yield
            return
        begun = _get_sequence_nr()
        yield
        spans.append((begun, _get_sequence_nr()))

    @contextmanager
    def within(self, region: TokenRegion | None) -> Iterator[None]:
        """Makes `region` the current one, also while a checkpointed layer is recomputed during backward."""
        before, self.region = self.region, region
        try:
            yield
        finally:
            self.region = before

    @contextmanager
    def beginning(
        self, make: Callable[[int, int], TokenRegion], fork: Callable[[TokenRegion], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """A forward whose tokens are counted where its first layer is given them, such as patches of images: it has no region before,
        and that of `make(b, s)`, within `fork` of it, from then on."""
        with ExitStack() as rest:

            def begin(batch: int, seq: int) -> TokenRegion:
                self.region = make(batch, seq)
                rest.enter_context(fork(self.region))
                return self.region

            before, self.begin = self.begin, begin
            try:
                yield
            finally:
                self.begin = before
