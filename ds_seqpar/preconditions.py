"""What is refused, or decided by measurement, before the first parameter of a model is touched."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapters import check_adapters
from .errors import PlanError
from .families import family
from .groups import ParallelGroups
from .layers.tokenwise import is_tokenwise
from .plan.facts import ModelFacts
from .plan.model_plan import ModelPlan
from .plan.patterns import matches_in
from .plan.styles import BlockKind, Style
from .plan.words import data_file_of
from .plan.wrappers import unwrapped
from .planning import PartlyLoaded, parts_of

__all__ = [
    "check_modules", "holds", "module_at", "refuse_different_weights", "refuse_unfit", "require_parts", "width_of",
]  # fmt: skip


def refuse_unfit(model: nn.Module) -> None:
    """Raises PlanError for a model that is in no state to be sharded: sharded already, partitioned, on the meta device, in use."""
    if vars(model).get("seqpar_report") is not None:
        raise PlanError("this model is already sharded by ds_seqpar; build a fresh one from its checkpoint")
    if getattr(model, "ds_autotp_parsed", False) or getattr(model, "_tp_size", None):
        raise PlanError(
            "this model is already tensor-parallel (DeepSpeed AutoTP or transformers' tp_plan); load it without"
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise PlanError(
                f"{name} was partitioned by zero.Init while the model was built; build the model outside it (for Hugging Face: "
                "before TrainingArguments, or after transformers.integrations.deepspeed.unset_hf_deepspeed_config())"
            )
        if parameter.is_meta:
            raise PlanError(f"{name} is on the meta device; load the weights first")
        if type(parameter.data) is not Tensor:
            raise PlanError(f"{name} is a {type(parameter.data).__name__}; only plain tensors can be sharded")
        if parameter.grad is not None:
            raise PlanError(
                f"{name} already has a gradient; shard the model before its first backward, or zero_grad() it"
            )


def require_parts(model: nn.Module, loaded: PartlyLoaded, rank: int) -> None:
    """Raises PlanError if a model that was loaded in part does not hold the parts any more."""
    for name, parameter, cut in parts_of(model, loaded.cuts):
        if parameter.shape[cut.dim] != cut.local_size(rank):
            raise PlanError(f"{name} was changed after it was loaded in part: its shape is {list(parameter.shape)}")


def refuse_different_weights(model: nn.Module, groups: ParallelGroups, parts: set[int]) -> None:
    """Ranks that built the model from different seeds would train replicas that never agree. Collective over the group.

    `parts`: ids of the parameters of which each rank holds its own part.
    """
    sums = {name: _checksum(p) for name, p in model.named_parameters() if id(p) not in parts}
    mine = torch.tensor(list(sums.values()), dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(groups.tp_size)]
    dist.all_gather(everyone, mine, group=groups.tp_cpu_group)
    differs = torch.stack(everyone).ne(everyone[0]).any(0)
    if differs.any():
        name = list(sums)[int(differs.nonzero()[0])]
        raise PlanError(
            f"{name} differs between the ranks of one tensor-parallel group; every rank must build the same whole model: load it "
            "from one checkpoint, or seed all ranks alike before building it"
        )


def _checksum(parameter: Tensor) -> int:
    """A number that any one value that differs changes. Summed in words of 64 bits: a sum that widens runs thirty times longer."""
    flat = parameter.detach().reshape(-1)
    if not flat.is_floating_point():
        return int(flat.sum())
    size = flat.element_size()
    bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    if bits.storage_offset() * size % 8:
        bits = bits.clone()
    end = bits.numel() * size // 8 * 8 // size
    return int(bits[:end].view(torch.int64).sum() + bits[end:].sum(dtype=torch.int64))


def check_modules(model: nn.Module, facts: ModelFacts, plan: ModelPlan) -> None:
    """What needs the modules themselves to be checked, and must be before any is touched. Decides the undecided blocks; cuts none."""
    proven = set(plan.asserted)
    for block in plan.blocks.values():
        if block.kind is BlockKind.UNDECIDED:
            module = model.get_submodule(block.name)
            if _may_run_on_shards(module, facts.hidden_size):
                names = [n for n in facts.modules if n == block.name or n.startswith(f"{block.name}.")]
                plan.tokenwise.extend(names)
                proven.update(names)
            else:
                block.kind = BlockKind.WHOLE
                plan.remarks.append(
                    f"{block.name} ({type(module).__name__}) is repeated whole by every rank: no plan says how to cut it"
                )
    plan.blocks = {name: block for name, block in plan.blocks.items() if block.kind is not BlockKind.UNDECIDED}
    for name in plan.tokenwise:
        module = module_at(model, name)
        if (
            name not in proven
            and name not in plan.layers
            and not is_tokenwise(module, width_of(module, facts.hidden_size))
        ):
            raise PlanError(
                f"{name} ({facts.modules[name].type_name}) owns parameters and mixes tokens, or takes more than hidden states, so "
                f"it cannot run on a shard of the tokens; {facts.model_type} needs a data file that says what becomes of it"
            )
    for name, about in facts.modules.items():
        around = name.rpartition(".")[0]
        if around in plan.modules and facts.modules[around].role == "linear":
            raise PlanError(
                f"{name} ({about.type_name}) owns parameters {list(about.shapes)} inside {around}, which is cut; take it out, or "
                "use an adapter that is known (docs/integrations.md)"
            )
    _refuse_replaced_forwards(model, plan)
    check_adapters(model, facts, plan)
    for name in filter(None, (facts.embedding, *facts.more_embeddings)):
        embedding = module_at(model, name)
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(embedding, option, None):
                raise PlanError(
                    f"{name}: nn.Embedding({option}={getattr(embedding, option)}) cannot be cut by vocabulary"
                )
    whole = [b.name for b in plan.blocks.values() if b.kind is BlockKind.WHOLE and b.why != data_file_of(facts)]
    if len(facts.stacks) > 1 and whole:
        raise PlanError(
            f"{whole[0]} would be repeated whole by every rank, which is not possible in a model of {len(facts.stacks)} stacks, "
            "where blocks share the encoder's output; its data file, or a plan of yours, must say how it is cut"
        )
    for pattern, attributes in family(facts.data_file).attributes.items():
        for name in plan.blocks:
            if matches_in(facts, pattern, name):
                for path in attributes:
                    _owner(model.get_submodule(name), path)  # raises if it was renamed


def _refuse_replaced_forwards(model: nn.Module, plan: ModelPlan) -> None:
    """What becomes a parallel linear or embedding computes something else than before: a forward on the object would hide it."""
    swapped = (Style.COLUMN, Style.PACKED_COLUMN, Style.ROW, Style.HEAD, Style.EMBEDDING)
    for name, planned in plan.modules.items():
        own = vars(module_at(model, name)).get("forward") if planned.style in swapped else None
        if own is not None:
            raise PlanError(
                f"the forward of {name} was replaced on the object by {getattr(own, '__module__', 'somebody')}, and what that does "
                "is not known; leave it to the model's own"
            )


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of that name in the unwrapped model."""
    module: nn.Module = unwrapped(model.get_submodule(name))
    return module


def width_of(module: nn.Module, hidden_size: int) -> int:
    """The width of what `module` takes."""
    if isinstance(module, nn.Linear):
        return module.in_features
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 1 else hidden_size


def _may_run_on_shards(module: nn.Module, hidden_size: int) -> bool:
    """Token-wise by measurement, and holding nothing that routes: recorded router logits must be of all tokens."""
    if any(p.dim() > 2 for p in module.parameters()):
        return False
    return is_tokenwise(module, width_of(module, hidden_size))


def _owner(block: nn.Module, path: str) -> tuple[Any, str]:
    owner: Any = block
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if not hasattr(owner, attribute):
        raise PlanError(
            f"{type(block).__name__} has no attribute {path!r} any more; this transformers version needs a new data file"
        )
    return owner, attribute


def holds(block: str, name: str) -> bool:
    """Whether the module `name` is `block`, or stands in it."""
    return name == block or name.startswith(f"{block}.")
