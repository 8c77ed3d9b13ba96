"""Handles: the full shape at no cost, the real tensor for whoever needs it, and the unsharded model's gradients either way."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, batches
from ranks import ON_GPU, run_ranks
from sharding import relative_error, same_loss_and_gradients, twins
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from ds_seqpar.layers.handles import Handle
from ds_seqpar.layers.logits import ShardedLogits
from ds_seqpar.layers.token_handles import GatheredInput, TokenShard

if ON_GPU:
    pytest.skip("operations on handles are compared on tensors made on the CPU; run without a GPU", allow_module_level=True)
ROWS, SEQ, V, H = 2, 7, 101, 48
BATCH = batches(1, ROWS, SEQ)[0]
NO_LABELS = {name: x for name, x in BATCH.items() if name != "labels"}


def _same(mine: Any, theirs: Tensor, what: str, tolerance: float = 1e-6) -> None:
    assert isinstance(mine, Tensor) and mine.shape == theirs.shape and mine.dtype is theirs.dtype, what
    error = relative_error(mine.detach(), theirs.detach())
    assert error <= tolerance, f"{what}: relative error {error}"


def _metadata() -> None:
    model, reference = twins()
    out, expected = model(**BATCH), reference(**BATCH)
    base, base_expected = model.model(**NO_LABELS), reference.model(**NO_LABELS)
    pairs = [
        (out.logits, expected.logits, ShardedLogits),
        (base.last_hidden_state, base_expected.last_hidden_state, TokenShard),
    ]
    for handle, real, kind in pairs:
        assert type(handle) is kind and isinstance(handle, Tensor) and torch.is_tensor(handle)
        assert handle.shape == real.shape and handle.size() == real.size() and handle.size(-1) == real.size(-1)
        assert handle.dim() == handle.ndim == 3 and handle.numel() == real.numel() and len(handle) == ROWS
        assert handle.dtype is real.dtype and handle.device == real.device and handle.layout is real.layout
        assert handle.is_floating_point() and not handle.is_cuda and not handle.is_meta and handle.requires_grad
        assert not handle.is_leaf and handle.grad_fn is not None and handle.element_size() == 8
        assert handle[...] is handle and handle[:, :, :] is handle and handle[:] is handle
        assert kind.__name__ in repr(handle) and kind.__name__ in str(handle)
        hash(handle)
    assert not model.seqpar.materialised, f"gathered: {dict(model.seqpar.materialised)}"


def test_metadata_costs_no_gather() -> None:
    run_ranks(2, _metadata, timeout=60)


def _no_gather_in_training(families: tuple[str, ...]) -> dict[str, dict[str, int]]:
    gathered = {}
    for family in families:
        model, _ = twins(family)
        model(**BATCH).loss.backward()
        model.eval()
        with torch.no_grad():
            float(model(**BATCH).loss)
        gathered[family] = dict(model.seqpar.materialised)
    return gathered


def test_no_family_gathers_anything_in_a_training_step() -> None:
    """Slow paths are counted; the models that are said to be supported take none."""
    for gathered in run_ranks(2, _no_gather_in_training, FAMILIES, timeout=120):
        assert gathered == {family: {} for family in FAMILIES}


def _elementwise() -> None:
    model, reference = twins()
    hidden, real = model.model(**NO_LABELS).last_hidden_state, reference.model(**NO_LABELS).last_hidden_state
    half = torch.tensor(0.5, dtype=torch.float64)
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "x * 2": lambda x: x * 2,
        "2 * x": lambda x: 2 * x,
        "tensor * x": lambda x: half * x,
        "x / 3": lambda x: x / 3,
        "x + 1": lambda x: x + 1,
        "1 + x": lambda x: 1 + x,
        "x - 1": lambda x: x - 1,
        "1 - x": lambda x: 1 - x,
        "1 / x": lambda x: 1 / (1 / x),  # turned back: near zero 1 / x only shows rounding
        "-x": lambda x: -x,
        "tanh": torch.tanh,
        "x.tanh": lambda x: x.tanh(),
        "mul(0.5)": lambda x: torch.mul(x, half),
        "float": lambda x: x.float(),
        "to": lambda x: x.to(torch.float32),
        "type": lambda x: x.type(torch.float32),
        "to like": lambda x: x.to(torch.zeros(1, dtype=torch.float32)),
        "contiguous": lambda x: x.contiguous(),
        "chain": lambda x: torch.tanh(x / 3.0).float() * 3,
        "vector": lambda x: x * torch.arange(x.shape[-1], dtype=x.dtype),
        "x * x": lambda x: x * x,
        "x + other": lambda x: x + real.detach()[..., :1],
        "alpha": lambda x: torch.add(x, 1.0, alpha=3),
    }
    gathers = {"1 - x", "1 / x", "type", "to like", "vector", "x * x", "x + other"}
    for name, act in acts.items():
        for kind in ("hidden", "logits"):
            before = sum(model.seqpar.materialised.values())
            handle = hidden * 1 if kind == "hidden" else model(**NO_LABELS).logits
            theirs = real if kind == "hidden" else reference(**NO_LABELS).logits
            if name == "x + other" or name == "vector":
                theirs = theirs * 1
            result = act(handle)
            if name not in gathers:
                assert isinstance(result, Handle), f"{kind}: {name} left the shard"
                assert sum(model.seqpar.materialised.values()) == before, f"{kind}: {name} gathered"
            real_result = result.materialise() if isinstance(result, Handle) else result
            _same(real_result, act(theirs), f"{kind}: {name}", 1e-5)


def test_scalings_and_casts_act_on_the_shard_and_mean_what_they_say() -> None:
    run_ranks(2, _elementwise, timeout=120)


def _sum_of_squares(x: Tensor) -> Tensor:
    return (x.double() ** 2).mean()


WEIGHTS = torch.randn(ROWS, SEQ, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
SMALL = torch.randn(ROWS, SEQ, H, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def _shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[..., :-1, :].contiguous().view(-1, V), labels[..., 1:].reshape(-1))


def _log_probs(logits: Tensor) -> Tensor:
    """What preference losses do: the log-probability of each label."""
    labels = BATCH["labels"].clamp_min(0)[:, 1:]
    return log_softmax(logits[:, :-1], dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _with_hook(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad * 2)
    return x


def _set(x: Tensor) -> Tensor:
    x = x * 1
    x[..., 0] = 0.0
    x[:, 1:3] *= 2
    return x


def _write_in_place(x: Tensor) -> Tensor:
    x.div_(2)
    x += 1
    x[0].mul_(3)
    x.clamp_(-2.0, 2.0)
    return x


def _peek(m: Any, *, hidden: bool) -> Tensor:
    """A metric under no_grad first, the loss afterwards: what a training loop that logs accuracy does."""
    out = m.model(**NO_LABELS).last_hidden_state if hidden else m(**NO_LABELS).logits
    with torch.no_grad():
        float(out.argmax(-1).double().mean())
    return (out * (SMALL if hidden else WEIGHTS)).mean()


def _watched(m: Any) -> Tensor:
    """Statistics of every layer's output, taken under no_grad by forward hooks."""

    @torch.no_grad()
    def watch(module: Any, args: Any, output: Any) -> None:
        float((output[0] if isinstance(output, tuple) else output).pow(2).mean())

    handles = [layer.register_forward_hook(watch) for layer in [*m.model.layers, m.model.norm, m.model]]
    handles[-1].remove()
    loss = m(**BATCH).loss
    for handle in handles:
        handle.remove()
    return loss


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "own cross-entropy": lambda m: _shifted(m(**NO_LABELS).logits, BATCH["labels"]),
    "log-probabilities": lambda m: -torch.nn.functional.logsigmoid(_log_probs(m(**NO_LABELS).logits).sum(-1)).mean(),
    "by key and index": lambda m: (m(**NO_LABELS)["logits"] * WEIGHTS).mean() + m(**NO_LABELS)[0].sum() * 0.01,
    "last token": lambda m: (m(**NO_LABELS).logits[:, -1] * WEIGHTS[:, 0]).mean(),
    "iteration": lambda m: torch.stack([_sum_of_squares(row) for row in m(**NO_LABELS).logits]).sum(),
    "unpacking": lambda m: (lambda a, b: (a * b).mean())(*m(**NO_LABELS).logits),
    "cat": lambda m: _sum_of_squares(torch.cat([m(**NO_LABELS).logits, WEIGHTS], dim=1)),
    "stack": lambda m: (lambda x: _sum_of_squares(torch.stack([x, x * 2])))(m(**NO_LABELS).logits),
    "einsum": lambda m: torch.einsum("bsv,bsv->b", m(**NO_LABELS).logits, WEIGHTS).pow(2).sum(),
    "keyword": lambda m: _sum_of_squares(torch.logsumexp(input=m(**NO_LABELS).logits, dim=-1)),
    "other side": lambda m: (WEIGHTS * m(**NO_LABELS).logits).mean() + (WEIGHTS - m(**NO_LABELS).logits).pow(2).mean(),
    "where": lambda m: torch.where(WEIGHTS > 0, m(**NO_LABELS).logits, 0.0).pow(2).mean(),
    "boolean index": lambda m: m(**NO_LABELS).logits[BATCH["attention_mask"].bool()].pow(2).mean(),
    "topk": lambda m: m(**NO_LABELS).logits.topk(5).values.pow(2).mean(),
    "module": lambda m: _sum_of_squares(nn.Softmax(-1)(m(**NO_LABELS).logits)),
    "softcap by hand": lambda m: _shifted(torch.tanh(m(**NO_LABELS).logits / 2) * 2, BATCH["labels"]),
    "float first": lambda m: _shifted(m(**NO_LABELS).logits.float(), BATCH["labels"]),
    "hook": lambda m: (_with_hook(m(**NO_LABELS).logits) * WEIGHTS).mean(),
    "set items": lambda m: (_set(m(**NO_LABELS).logits) * WEIGHTS).mean(),
    "in place": lambda m: (_write_in_place(m(**NO_LABELS).logits) * WEIGHTS).mean(),
    "both losses": lambda m: (lambda o: o.loss + 0.1 * _sum_of_squares(o.logits))(m(**BATCH)),
    "z loss": lambda m: (lambda o: o.loss + 0.1 * torch.logsumexp(o.logits, -1).pow(2).mean())(m(**BATCH)),
    "two forwards": lambda m: m(**BATCH).loss - 0.5 * _log_probs(m(**NO_LABELS).logits).mean(),
    "last hidden state": lambda m: (m.model(**NO_LABELS).last_hidden_state * SMALL).mean(),
    "pooled": lambda m: (lambda h: h[torch.arange(ROWS), [6, 4]].pow(2).mean())(m.model(**NO_LABELS).last_hidden_state),
    "hidden, hook": lambda m: (_with_hook(m.model(**NO_LABELS).last_hidden_state) * SMALL).mean(),
    "hidden states": lambda m: sum(
        ((i + 1) * (h * SMALL).mean() for i, h in enumerate(m(**NO_LABELS, output_hidden_states=True).hidden_states)),
        start=torch.zeros((), dtype=torch.float64),
    ),
    "hidden states and loss": lambda m: (
        lambda o: o.loss + (o.hidden_states[1] * SMALL).mean() + _sum_of_squares(o.hidden_states[-1])
    )(m(**BATCH, output_hidden_states=True)),
    "head by hand": lambda m: (m.lm_head(m.model(**NO_LABELS).last_hidden_state) * WEIGHTS).mean(),
    "head on a slice": lambda m: m.lm_head(m.model(**NO_LABELS).last_hidden_state[:, -2:]).pow(2).mean(),
    "head on rows": lambda m: m.lm_head(m.model(**NO_LABELS).last_hidden_state.view(-1, H)).pow(2).mean(),
    "embedding alone": lambda m: (m.get_input_embeddings()(BATCH["input_ids"]) * SMALL).mean(),
    "hidden states looked at under no_grad": lambda m: _watched(m),
    "tuple": lambda m: (m(**NO_LABELS, return_dict=False)[0] * WEIGHTS).mean(),
    "loss of a tuple": lambda m: m(**BATCH, return_dict=False)[0],
}  # fmt: skip


def _user_losses() -> None:
    model, reference = twins()
    failures = []
    for name, loss_of in LOSSES.items():
        try:
            same_loss_and_gradients(model, reference, loss_of, what=name)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            model.zero_grad()
            reference.zero_grad()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world", [2, 3])
def test_any_loss_over_the_outputs_has_the_unsharded_gradients(world: int) -> None:
    run_ranks(world, _user_losses, timeout=120)


def _packed(m: Any) -> Tensor:
    """Three sequences in one row, told apart by their positions alone."""
    ids = BATCH["input_ids"].view(1, -1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    return m(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss


LEFT = torch.ones_like(BATCH["input_ids"]).index_fill(1, torch.tensor([0, 1]), 0)
SHIFTED = torch.nn.functional.pad(BATCH["labels"], (0, 1), value=-100)[:, 1:].contiguous()
INPUTS: dict[str, Callable[[Any], Tensor]] = {
    "plain": lambda m: m(**BATCH).loss,
    "positional": lambda m: m(BATCH["input_ids"], BATCH["attention_mask"], labels=BATCH["labels"]).loss,
    "no mask": lambda m: m(input_ids=BATCH["input_ids"], labels=BATCH["labels"]).loss,
    "left padding": lambda m: m(input_ids=BATCH["input_ids"], attention_mask=LEFT, labels=BATCH["labels"]).loss,
    "packed": _packed,
    "a loss as wide as the head says it is": lambda m: m.loss_function(
        m(input_ids=BATCH["input_ids"]).logits, BATCH["labels"], m.lm_head.out_features
    ),
    "one token": lambda m: m(input_ids=BATCH["input_ids"][:, :1]).logits.pow(2).mean(),
    "one row, two tokens": lambda m: m(input_ids=BATCH["input_ids"][:1, :2], labels=BATCH["input_ids"][:1, :2]).loss,
    "own embeddings": lambda m: m(inputs_embeds=SMALL, labels=BATCH["labels"]).loss,
    "embeddings of its own": lambda m: m(
        inputs_embeds=m.get_input_embeddings()(BATCH["input_ids"]) + SMALL, labels=BATCH["labels"]
    ).loss,
    "shift_labels": lambda m: m(**NO_LABELS, labels=BATCH["labels"], shift_labels=SHIFTED).loss,
    "num_items_in_batch": lambda m: m(**BATCH, num_items_in_batch=17).loss,
    "num_items as tensor": lambda m: m(**BATCH, num_items_in_batch=torch.tensor(17)).loss,
    "labels of int32": lambda m: m(**NO_LABELS, labels=BATCH["labels"].long()).loss,
    "logits_to_keep": lambda m: m(**NO_LABELS, logits_to_keep=3).logits.pow(2).mean(),
    "logits_to_keep indices": lambda m: m(**NO_LABELS, logits_to_keep=torch.tensor([1, 4])).logits.pow(2).mean(),
    "logits_to_keep with labels": lambda m: m(**NO_LABELS, labels=BATCH["labels"][:, -3:], logits_to_keep=3).loss,
    "loss_function by hand": lambda m: m.loss_function(
        logits=m(**NO_LABELS).logits, labels=BATCH["labels"], vocab_size=m.config.vocab_size
    ),
    "loss_function on scaled logits": lambda m: m.loss_function(
        logits=m(**NO_LABELS).logits * 0.5, labels=BATCH["labels"], vocab_size=m.config.vocab_size
    ),
    "loss_function on real logits": lambda m: m.loss_function(
        logits=m(**NO_LABELS).logits.clone(), labels=BATCH["labels"], vocab_size=m.config.vocab_size
    ),
    "loss_function after a change": lambda m: m.loss_function(
        logits=_set(m(**NO_LABELS).logits), labels=BATCH["labels"], vocab_size=m.config.vocab_size
    ),
    "other ignore_index": lambda m: m.loss_function(
        logits=m(**NO_LABELS).logits, labels=BATCH["labels"].masked_fill(BATCH["labels"] < 0, 7), vocab_size=V, ignore_index=7
    ),
}  # fmt: skip


def _input_forms(keys: list[dict[str, Any]]) -> None:
    failures = []
    for key in keys:
        model, reference = twins(key=key)
        for name, loss_of in INPUTS.items():
            try:
                same_loss_and_gradients(model, reference, loss_of, what=name)
            except Exception as error:
                failures.append(f"{key} {name}: {type(error).__name__}: {error}")
                model.zero_grad()
                reference.zero_grad()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("world", "keys"),
    [(2, [{}, {"sequence_parallel": False}, {"recompute": "selective"}]), (3, [{"recompute": "full"}])],
)
def test_every_form_of_input_gives_the_unsharded_loss_and_gradients(world: int, keys: list[dict[str, Any]]) -> None:
    run_ranks(world, _input_forms, keys, timeout=120)


def _all_ignored() -> None:
    model, reference = twins()
    labels = torch.full_like(BATCH["labels"], -100)
    same_loss_and_gradients(model, reference, lambda m: m(**NO_LABELS, labels=labels).loss, what="all labels ignored")


def test_a_batch_without_labels_has_a_nan_loss_and_zero_gradients_as_in_torch() -> None:
    """torch gives nan / 0 there a zero gradient; nan would destroy the weights in the next step."""
    run_ranks(2, _all_ignored, timeout=60)


@torch.no_grad()
def _values() -> None:
    for family in ("llama", "gemma2", "olmo2"):
        model, reference = twins(family)
        for training in (True, False):
            model.train(training), reference.train(training)
            out = model(**NO_LABELS, output_hidden_states=True, use_cache=False)
            expected = reference(**NO_LABELS, output_hidden_states=True, use_cache=False)
            assert len(out.hidden_states) == len(expected.hidden_states) == 3
            for i, (mine, theirs) in enumerate(zip(out.hidden_states, expected.hidden_states, strict=True)):
                _same(mine + 0, theirs, f"{family}: hidden state {i}")
            _same(out.logits.detach().clone(), expected.logits, f"{family}: logits")
            assert out.logits.argmax(-1).tolist() == expected.logits.argmax(-1).tolist()
            assert out.logits.float().numpy().shape == (ROWS, SEQ, V)
            assert bool((out.logits == out.logits).all()) and torch.equal(out.logits, out.logits.clone())
            assert abs(out.logits.sum().item() - float(expected.logits.sum())) < 1e-3
            _same(copy.deepcopy(out.logits), expected.logits, f"{family}: deepcopy")
            file = io.BytesIO()
            torch.save(out.logits, file)
            file.seek(0)
            _same(torch.load(file, weights_only=False), expected.logits, f"{family}: torch.save")
            assert torch.zeros_like(out.logits).shape == out.logits.new_ones(ROWS, SEQ, V).shape
            target = torch.empty(ROWS, SEQ, V, dtype=torch.float64)
            torch.add(out.logits, 1, out=target)
            _same(target, expected.logits + 1, f"{family}: out=")
            target.copy_(out.logits)
            _same(target, expected.logits, f"{family}: copy_ from a handle")


def test_hidden_states_and_logits_have_the_unsharded_values() -> None:
    run_ranks(2, _values, timeout=120)


def _grad_mode() -> None:
    model, reference = twins()
    with torch.no_grad():
        outs = [m(**NO_LABELS, output_hidden_states=True, use_cache=False) for m in (model, reference)]
    for made in (outs[0].logits, outs[0].hidden_states[-1], outs[0].logits * 2):
        assert not made.sum().requires_grad, "made under no_grad, yet it has a graph when it is read later"
    assert outs[0].logits.float().numpy().shape == outs[1].logits.float().numpy().shape
    with torch.inference_mode():
        out = model(**NO_LABELS, use_cache=False)
    assert not out.logits.sum().requires_grad


def test_outputs_made_under_no_grad_have_no_graph_when_they_are_read_later() -> None:
    """The evaluation loop: `with torch.no_grad(): out = model(...)`, then `out.logits.numpy()` after the block."""
    run_ranks(2, _grad_mode, timeout=60)


def _looked_at_first() -> None:
    model, reference = twins()
    for hidden in (False, True):
        same_loss_and_gradients(model, reference, lambda m, hidden=hidden: _peek(m, hidden=hidden), what=f"{hidden=}")


def test_a_look_under_no_grad_does_not_cut_the_gradient() -> None:
    """A training loop that logs accuracy under no_grad, then uses the same outputs for its loss."""
    run_ranks(2, _looked_at_first, timeout=60)


def _hidden_in_place() -> None:
    model, reference = twins()
    same_loss_and_gradients(
        model,
        reference,
        lambda m: (_write_in_place(m.model(**NO_LABELS).last_hidden_state) * SMALL).mean(),
        what="in place",
    )


def test_the_last_hidden_state_may_be_changed_in_place() -> None:
    run_ranks(2, _hidden_in_place, timeout=60)


def _changed_between_layers() -> None:
    """Model code that writes to the hidden states between its modules: the layers after it see what was written."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    original = LlamaRotaryEmbedding.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        x[:, 1] *= 3.0
        return original(self, x, position_ids)

    LlamaRotaryEmbedding.forward = forward
    model, reference = twins()
    same_loss_and_gradients(model, reference, lambda m: m(**BATCH).loss, what="written between modules")


def test_hidden_states_changed_between_layers_are_what_the_next_layer_sees() -> None:
    run_ranks(2, _changed_between_layers, timeout=60)


def _hooks() -> None:
    model, reference = twins()
    seen: dict[str, Tensor] = {}
    for which, m in (("mine", model), ("theirs", reference)):
        logits = m(**NO_LABELS).logits
        logits.register_hook(lambda grad, which=which: seen.update({f"{which} logits": grad.clone()}))
        removed = logits.register_hook(lambda grad: pytest.fail("a removed hook was called"))
        removed.remove()
        hidden = m.model(**NO_LABELS).last_hidden_state
        hidden.register_hook(lambda grad, which=which: seen.update({f"{which} hidden": grad.clone()}))
        ((logits * WEIGHTS).mean() + (hidden * SMALL).mean()).backward()
    assert set(seen) == {f"{which} {what}" for which in ("mine", "theirs") for what in ("logits", "hidden")}
    _same(seen["mine logits"], seen["theirs logits"], "gradient of the logits")
    _same(seen["mine hidden"], seen["theirs hidden"], "gradient of the hidden state")

    model.zero_grad(), reference.zero_grad()
    for which, m in (("mine", model), ("theirs", reference)):  # the fused loss must not bypass a hook on its logits
        logits = m(**NO_LABELS).logits
        logits.register_hook(lambda grad, which=which: seen.update({f"{which} fused": grad.clone()}))
        m.loss_function(logits=logits, labels=BATCH["labels"], vocab_size=V).backward()
    _same(seen["mine fused"], seen["theirs fused"], "gradient of the logits under the model's loss")

    for which, m in (("mine", model), ("theirs", reference)):
        logits = m(**NO_LABELS).logits
        logits.retain_grad()
        (logits * WEIGHTS).mean().backward()
        seen[f"{which} retained"] = logits.grad
    _same(seen["mine retained"], seen["theirs retained"], "retain_grad()")


def test_hooks_on_outputs_see_the_whole_gradient() -> None:
    run_ranks(2, _hooks, timeout=60)


def _block_input() -> None:
    model, reference = twins()
    seen: dict[str, Tensor] = {}
    for which, m in (("mine", model), ("theirs", reference)):
        mlp = m.model.layers[0].mlp

        def hook(module: Any, args: Any, which: str = which) -> None:
            seen[which] = args[0]

        handle = mlp.gate_proj.register_forward_pre_hook(hook)
        m(**BATCH)
        handle.remove()
    assert isinstance(seen["mine"], GatheredInput) and seen["mine"].shape == seen["theirs"].shape == (ROWS, SEQ, H)
    assert seen["mine"].shape[:-1] == (ROWS, SEQ)
    block_input = seen["mine"]
    for change in (
        lambda: block_input.mul_(2),
        lambda: block_input.__setitem__(0, 0.0),
        lambda: block_input.__iadd__(1),
    ):
        with pytest.raises(RuntimeError, match=r"would change a block's input in place.*clone\(\) it first"):
            change()
    _same(seen["mine"].materialise(), seen["theirs"], "a block's input")


def test_a_blocks_input_is_whole_when_read_and_never_written() -> None:
    run_ranks(2, _block_input, timeout=60)


def _block_reads_its_input() -> None:
    """A block that uses its input for more than its linears: every rank has a part of that gradient."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(
            torch.sigmoid(x.mean(-1, keepdim=True)) * self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        )

    LlamaMLP.forward = forward
    for key in ({}, {"sequence_parallel": False}):
        model, reference = twins(key=key)
        same_loss_and_gradients(model, reference, lambda m: m(**BATCH).loss, what=str(key))
        assert model.seqpar.materialised == {"GatheredInput.mean": 2}


def test_a_block_that_reads_its_input_is_slow_never_wrong() -> None:
    run_ranks(2, _block_reads_its_input, timeout=60)


def _below_python() -> None:
    model, _ = twins()
    handle = model(**NO_LABELS).logits
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(RuntimeError, match=r"below Python.*call \.materialise\(\)"),
    ):
        _ = handle + 1


def test_a_handle_below_python_is_an_error_that_says_what_to_do() -> None:
    run_ranks(2, _below_python, timeout=60)


def _hooks_on_a_column_linear() -> dict[str, bool]:
    model, _ = twins()
    projection, seen = model.model.layers[0].self_attn.k_proj, []
    projection.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    projection.register_forward_hook(lambda module, args, kwargs, output: seen.append("kwargs"), with_kwargs=True)
    projection.register_forward_hook(lambda module, args, output: output * 0)
    batch = batches(1, 2)[0]
    zeroed = model(**batch).loss
    return {"called": seen == ["pre", "kwargs"], "changed": not torch.equal(zeroed, twins()[0](**batch).loss)}


def test_a_users_hooks_on_a_column_parallel_linear_run() -> None:
    for result in run_ranks(2, _hooks_on_a_column_linear):
        assert all(result.values()), result


def _learnable_temperature() -> float:
    model, reference = twins()
    batch = batches(1, 2)[0]
    gradients = []
    for each in (model, reference):
        temperature = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        logits = each(input_ids=batch["input_ids"]).logits * temperature
        each.loss_function(logits=logits, labels=batch["labels"], vocab_size=101).backward()
        assert temperature.grad is not None
        gradients.append(float(temperature.grad))
    return abs(gradients[0] / gradients[1] - 1)


def test_a_learnable_scalar_on_the_logits_gets_its_whole_gradient() -> None:
    assert max(run_ranks(2, _learnable_temperature)) < 1e-5
