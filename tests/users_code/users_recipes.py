"""What people write around a model: losses, views, hooks, penalties, optimizers, weights that are swapped, wrappers, calls of parts.

Each is written for a model as it is; users_run.py runs the same on a sharded one. V is 101, the banned ids are any.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from users_run import Run, recipe

import ds_seqpar

__all__ = ["BANNED", "layers_of"]

BANNED = torch.tensor([5, 17, 40, 99])


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if name != "labels"}


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


def _causal_lm(model: nn.Module) -> Any:
    """The model within PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers, also within PEFT's wrapper."""
    base = _causal_lm(model)
    return base.gpt_neox.layers if hasattr(base, "gpt_neox") else base.model.layers


def _norm(model: nn.Module) -> nn.Module:
    base = _causal_lm(model)
    return base.gpt_neox.final_layer_norm if hasattr(base, "gpt_neox") else base.model.norm


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


# ---- losses ----------------------------------------------------------------------------------------------------------


@recipe()
def the_models_own_loss(run: Run) -> None:
    out = run(**run.batches[0])
    run.see("loss", out.loss)
    run.backward(out.loss)


@recipe()
def cross_entropy_by_hand(run: Run) -> None:
    batch = run.batches[0]
    loss = _next_token_loss(run(**_inputs(batch)).logits, batch["labels"])
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def own_loss_beside_the_models(run: Run) -> None:
    out = run(**run.batches[0])
    loss = 0.7 * out.loss + 0.01 * out.logits.pow(2).mean()
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def label_smoothing(run: Run) -> None:
    batch = run.batches[0]
    logits = run(**_inputs(batch)).logits[:, :-1].reshape(-1, 101)
    run.backward(cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), label_smoothing=0.1))


@recipe()
def z_loss(run: Run) -> None:
    out = run(**run.batches[0])
    run.backward(out.loss + 1e-2 * out.logits.logsumexp(-1).pow(2).mean())


@recipe()
def distillation(run: Run) -> None:
    batch = run.batches[0]
    teacher = torch.randn(*batch["input_ids"].shape, 101, generator=torch.Generator().manual_seed(5)).softmax(-1)
    logits = run(**_inputs(batch)).logits
    loss = functional.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def preference_loss_over_log_probabilities(run: Run) -> None:
    sums = []
    for batch in run.batches[:2]:
        chosen = run(**_inputs(batch)).logits[:, :-1].log_softmax(-1)
        sums.append(chosen.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1).sum(-1))
    loss = -functional.logsigmoid(0.3 * (sums[0] - sums[1])).mean()
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def entropy_of_the_last_token(run: Run) -> None:
    last = run(**_inputs(run.batches[0])).logits[:, -1]
    probabilities = last.softmax(-1)
    run.backward((probabilities * last.log_softmax(-1)).sum(-1).mean())


@recipe()
def weights_for_tokens(run: Run) -> None:
    batch = run.batches[0]
    logits = run(**_inputs(batch)).logits
    each = cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
    run.backward((each * torch.linspace(0.1, 1.0, each.numel()).view_as(each)).mean())


@recipe()
def loss_over_a_hidden_state(run: Run) -> None:
    out = run(**run.batches[0], output_hidden_states=True)
    run.see("mean", out.hidden_states[1].mean())
    run.backward(out.loss + out.hidden_states[1].pow(2).mean() + out.hidden_states[-1].abs().mean())


@recipe()
def contrastive_loss_of_pooled_states(run: Run) -> None:
    batch = run.batches[0]
    last = run(**_inputs(batch), output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"][..., None].to(last.dtype)
    pooled = functional.normalize((last * mask).sum(1) / mask.sum(1), dim=-1)
    run.backward(cross_entropy(pooled @ pooled.T / 0.1, torch.arange(len(pooled))))


@recipe(ways=("loop",))
def own_head_over_hidden_states(run: Run) -> None:
    torch.manual_seed(7)
    head = nn.Linear(48, 3)
    last = run(**_inputs(run.batches[0]), output_hidden_states=True).hidden_states[-1]
    run.backward(cross_entropy(head(last[:, -1]), torch.tensor([0, 2])))
    run.see("head", head.weight.grad)


@recipe()
def two_forwards_one_backward(run: Run) -> None:
    first, second = (run(**batch).loss for batch in run.batches[:2])
    run.backward(first + 0.5 * second * first.detach())


@recipe(ways=("loop",))
def backward_twice_through_one_graph(run: Run) -> None:
    loss = run(**run.batches[0]).loss
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()


@recipe(ways=("loop",))
def accumulation_by_hand(run: Run) -> None:
    for batch in run.batches:
        run.backward(run(**batch).loss / 3)


@recipe(ways=("loop",))
def gradients_by_autograd_grad(run: Run) -> None:
    parameters = list(_trained(run.model))
    for parameter, grad in zip(parameters, torch.autograd.grad(run(**run.batches[0]).loss, parameters), strict=True):
        parameter.grad = grad


@recipe()
def all_labels_of_a_row_ignored(run: Run) -> None:
    batch = dict(run.batches[0])
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0] = -100
    loss = run(**batch).loss
    run.see("loss", loss)
    run.backward(loss)


# ---- views and writes ------------------------------------------------------------------------------------------------


def _banned_loss(run: Run, ban: Any) -> None:
    batch = run.batches[0]
    logits = run(**_inputs(batch)).logits
    loss = _next_token_loss(ban(logits), batch["labels"].where(~torch.isin(batch["labels"], BANNED), -100))
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def write_through_a_view(run: Run) -> None:
    def ban(logits: Tensor) -> Tensor:
        logits.view(-1, 101)[:, BANNED] = -30.0
        return logits

    _banned_loss(run, ban)


@recipe()
def write_in_place(run: Run) -> None:
    def ban(logits: Tensor) -> Tensor:
        logits[..., BANNED] = -30.0
        return logits

    _banned_loss(run, ban)


@recipe()
def write_by_index_fill(run: Run) -> None:
    _banned_loss(run, lambda logits: logits.index_fill_(-1, BANNED, -30.0))


@recipe()
def write_to_a_slice(run: Run) -> None:
    def ban(logits: Tensor) -> Tensor:
        half = logits[:, ::2]
        half.mul_(0.5)
        logits.select(1, 1).add_(0.25)
        return logits

    _banned_loss(run, ban)


@recipe()
def write_to_what_keeps_its_dtype(run: Run) -> None:
    def ban(logits: Tensor) -> Tensor:
        logits.float().contiguous().to(torch.float32)[..., BANNED] = -30.0
        return logits

    _banned_loss(run, ban)


@recipe()
def mask_out_of_place(run: Run) -> None:
    mask = torch.zeros(101, dtype=torch.bool)
    mask[BANNED] = True
    _banned_loss(run, lambda logits: logits.masked_fill(mask, -30.0))


@recipe()
def write_into_detached_logits(run: Run) -> None:
    out = run(**run.batches[0])
    read = out.logits.detach()
    read.fill_(0.0)
    run.see("sum", out.logits.sum())
    run.backward(out.loss)


@recipe()
def write_into_hidden_states(run: Run) -> None:
    out = run(**_inputs(run.batches[0]), output_hidden_states=True)
    state = out.hidden_states[-1] * 1.0
    state[:, 0] = 0.0
    run.backward(state.pow(2).mean() + out.logits.pow(2).mean())


# ---- hooks -----------------------------------------------------------------------------------------------------------


@recipe()
def hook_on_logits_of_an_own_loss(run: Run) -> None:
    batch = run.batches[0]
    logits = run(**_inputs(batch)).logits
    logits.register_hook(lambda grad: grad * 0.5)
    run.backward(_next_token_loss(logits, batch["labels"]))


@recipe()
def retained_gradient_of_logits_of_an_own_loss(run: Run) -> None:
    batch = run.batches[0]
    logits = run(**_inputs(batch)).logits
    logits.retain_grad()
    run.backward(_next_token_loss(logits, batch["labels"]))
    run.see("gradient", logits.grad)


@recipe(refused="call the model without labels")
def hook_on_logits_of_the_models_loss(run: Run) -> None:
    out = run(**run.batches[0])
    out.logits.register_hook(lambda grad: grad * 0.5)
    run.backward(out.loss)


@recipe()
def retained_gradient_of_hidden_states(run: Run) -> None:
    out = run(**run.batches[0], output_hidden_states=True)
    out.hidden_states[1].retain_grad()
    run.backward(out.loss)
    run.see("gradient", out.hidden_states[1].grad)


@recipe(refused="call the model without labels", ways=("loop",))
def gradient_of_the_models_loss_by_logits(run: Run) -> None:
    out = run(**run.batches[0])
    (grad,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
    run.see("gradient", grad)
    run.backward(out.loss)


def _head_casts(model: nn.Module) -> None:
    _causal_lm(model).get_output_embeddings().register_forward_hook(lambda m, args, output: output.to(torch.float32))


@recipe(before=_head_casts)
def hook_that_casts_the_heads_output(run: Run) -> None:
    out = run(**run.batches[0])
    run.see("logits", out.logits)
    run.backward(out.loss)


def _head_scales(model: nn.Module) -> None:
    _causal_lm(model).get_output_embeddings().register_forward_hook(lambda m, args, output: output * 0.5)


@recipe(before=_head_scales)
def hook_that_scales_the_heads_output(run: Run) -> None:
    out = run(**run.batches[0])
    run.see("loss", out.loss)
    run.backward(out.loss)


@recipe()
def hook_that_scales_a_layers_output(run: Run) -> None:
    layers_of(run.model)[0].register_forward_hook(
        lambda m, args, output: (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9
    )
    run.backward(run(**run.batches[0]).loss)


@recipe()
def hook_that_adds_a_constant_vector(run: Run) -> None:
    vector = torch.linspace(-0.5, 0.5, 48)
    layers_of(run.model)[0].register_forward_hook(
        lambda m, args, output: (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
    )
    run.backward(run(**run.batches[0]).loss)


@recipe(ways=("loop",))
def hook_that_adds_a_trained_vector(run: Run) -> None:
    vector = torch.linspace(-0.5, 0.5, 48).requires_grad_()
    layers_of(run.model)[0].register_forward_hook(
        lambda m, args, output: (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
    )
    run.backward(run(**run.batches[0]).loss)
    run.see("vector", vector.grad)


@recipe(ways=("loop",))
def hook_that_calls_a_trained_module(run: Run) -> None:
    torch.manual_seed(7)
    module = nn.Linear(48, 48)
    _norm(run.model).register_forward_hook(lambda m, args, output: output + 0.1 * module(output))
    run.backward(run(**run.batches[0]).loss)
    run.see("weight", module.weight.grad)
    run.see("bias", module.bias.grad)


@recipe()
def backward_hook_that_halves_a_layers_gradient(run: Run) -> None:
    layers_of(run.model)[1].register_full_backward_hook(lambda m, inputs, outputs: tuple(
        x if x is None else x * 0.5 for x in inputs
    ))
    run.backward(run(**run.batches[0]).loss)


@recipe()
def parameter_hook_that_scales(run: Run) -> None:
    for parameter in _trained(run.model):
        parameter.register_hook(lambda grad: grad * 0.5)
    run.backward(run(**run.batches[0]).loss)


@recipe(ways=("loop",), kinds=("llama", "gpt_neox", "mixtral"))
def parameter_hook_that_trains_new_tokens_only(run: Run) -> None:
    mask = torch.zeros(101, 1)
    mask[90:] = 1.0
    run.model.get_input_embeddings().weight.register_hook(lambda grad: grad * mask)
    run.backward(run(**run.batches[0]).loss)


def _new_tokens_only(model: nn.Module) -> None:
    mask = torch.zeros(101, 1)
    mask[90:] = 1.0
    model.get_input_embeddings().weight.register_hook(lambda grad: grad * mask)


@recipe(before=_new_tokens_only, kinds=("llama", "gpt_neox", "mixtral"))
def parameter_hook_from_before(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


@recipe(refused="register_hook, which is shown the whole gradient", ways=("loop",))
def hook_behind_the_accumulation(run: Run) -> None:
    for parameter in _trained(run.model):
        parameter.register_post_accumulate_grad_hook(_halve)
    run.backward(run(**run.batches[0]).loss)


# ---- penalties, norms, calls with other parameters -------------------------------------------------------------------


@recipe()
def l2_penalty(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss + 1e-2 * sum(p.pow(2).sum() for p in _trained(run.model)))


@recipe()
def l2_penalty_that_is_printed(run: Run) -> None:
    penalty = ds_seqpar.parameter_sum(_trained(run.model), lambda p: p.square().sum())
    run.see("penalty", penalty)
    run.backward(run(**run.batches[0]).loss + 1e-2 * penalty)


@recipe()
def l1_penalty(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss + 1e-3 * sum(p.abs().sum() for p in _trained(run.model)))


@recipe()
def pulled_to_the_old_weights(run: Run) -> None:
    old = [p.detach() * 0.9 for p in _trained(run.model)]
    penalty = sum((p - q).pow(2).sum() for p, q in zip(_trained(run.model), old, strict=True))
    run.backward(run(**run.batches[0]).loss + 1e-2 * penalty)


@recipe(ways=("loop",))
def functional_call_with_other_weights(run: Run) -> None:
    other = {n: (p.detach() * 1.1).requires_grad_() for n, p in run.model.named_parameters() if p.requires_grad}
    loss = torch.func.functional_call(run.model, other, (), run.batches[0]).loss
    run.see("loss", loss)
    loss.backward()
    for name, parameter in run.model.named_parameters():
        if name in other:
            parameter.grad = other[name].grad


@recipe(ways=("loop",))
def functional_call_with_its_own(run: Run) -> None:
    own = dict(run.model.named_parameters())
    run.backward(torch.func.functional_call(run.model, own, (), run.batches[0]).loss)


@recipe(ways=("loop",))
def gradients_clipped_by_norm(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)
    run.see("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.05))


@recipe(ways=("loop",))
def gradients_clipped_by_the_largest(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)
    run.see("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1, norm_type=float("inf")))


@recipe(ways=("loop",))
def norm_of_the_gradients(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)
    run.see("norm", torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None]))


@recipe(ways=("loop",))
def gradients_clipped_by_value(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)
    torch.nn.utils.clip_grad_value_(run.model.parameters(), 1e-3)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _two_steps(run: Run) -> None:
    for batch in run.batches[:2]:
        loss = run(**batch).loss
        run.see("loss", loss)
        run.backward(loss)
        run.step()
    run.backward(run(**run.batches[2]).loss)


def _matrices_only(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.dim() == 2]


@recipe(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4))
def adamw(run: Run) -> None:
    _two_steps(run)


@recipe(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True))
def momentum(run: Run) -> None:
    _two_steps(run)


@recipe(
    refused="looks at whole parameters",
    ways=("loop",),
    optimizer=lambda parameters: torch.optim.Muon(_matrices_only(parameters), lr=1e-2),
)
def muon(run: Run) -> None:
    """ZeRO itself flattens what it is given, and Muon and Adafactor want matrices: without an engine only."""
    _two_steps(run)


@recipe(refused="looks at whole parameters", ways=("loop",), optimizer=lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2))
def adafactor(run: Run) -> None:
    _two_steps(run)


# ---- weights that change between a forward and a reading -------------------------------------------------------------


@recipe(ways=("loop",))
def averaged_weights_for_evaluation(run: Run) -> None:
    out = run(**run.batches[0])
    kept = [p.detach().clone() for p in run.model.parameters()]
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(0.9)
        run.model.eval()
        run.see("evaluated", run(**_inputs(run.batches[1])).logits)
        run.model.train()
        for parameter, values in zip(run.model.parameters(), kept, strict=True):
            parameter.copy_(values)
    run.backward(run(**run.batches[0]).loss)
    del out


@recipe(refused="before the step or the swap", ways=("loop",))
def logits_read_while_averaged_weights_are_in(run: Run) -> None:
    logits = run(**_inputs(run.batches[0])).logits
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.data.mul_(0.9)
    run.see("logits", logits)


@recipe(refused="before the step or the swap", ways=("loop",))
def logits_read_after_load_state_dict(run: Run) -> None:
    with torch.no_grad():
        logits = run(**_inputs(run.batches[0])).logits
    run.model.load_state_dict({name: x * 0.5 for name, x in run.model.state_dict().items()})
    run.see("logits", logits)


@recipe(refused="before the step or the swap", ways=("loop",))
def logits_read_after_the_step(run: Run) -> None:
    out = run(**run.batches[0])
    run.backward(out.loss)
    run.step()
    run.see("logits", out.logits)
    run.backward(run(**run.batches[1]).loss)


@recipe(ways=("loop",))
def hidden_states_read_after_the_step(run: Run) -> None:
    out = run(**run.batches[0], output_hidden_states=True)
    run.backward(out.loss)
    run.step()
    run.see("state", out.hidden_states[-1])
    run.backward(run(**run.batches[1]).loss)


@recipe(refused="build the second model from the checkpoint", ways=("loop",))
def averaged_copy(run: Run) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(run.model)
    averaged.update_parameters(run.model)
    run.backward(run(**run.batches[0]).loss)


# ---- wrappers, parts, inputs -----------------------------------------------------------------------------------------


class _Wrapper(nn.Module):
    """What people put around a model to return their own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out = self.inner(**batch)
        return 0.5 * out.loss + out.logits.float().logsumexp(-1).mean()  # type: ignore[no-any-return]


@recipe(ways=("loop",))
def wrapped_in_a_module(run: Run) -> None:
    run.backward(_Wrapper(run.model)(run.batches[0]))


@recipe()
def base_model_and_head_by_hand(run: Run) -> None:
    model, batch = _causal_lm(run.model), run.batches[0]
    hidden = model.base_model(**_inputs(batch)).last_hidden_state
    run.backward(_next_token_loss(model.get_output_embeddings()(hidden), batch["labels"]))


@recipe()
def head_on_chosen_tokens(run: Run) -> None:
    model, batch = _causal_lm(run.model), run.batches[0]
    hidden = model.base_model(**_inputs(batch)).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, 2:4].reshape(-1, 48))
    run.see("logits", logits)
    run.backward(logits.pow(2).mean())


@recipe(ways=("loop",))
def perturbed_embeddings(run: Run) -> None:
    batch = dict(run.batches[0])
    embeddings = run.model.get_input_embeddings()(batch.pop("input_ids")).detach().clone().requires_grad_()
    run(**batch, inputs_embeds=embeddings).loss.backward()
    run.see("gradient", embeddings.grad)
    run.backward(run(**batch, inputs_embeds=embeddings.detach() + 0.1 * embeddings.grad.sign()).loss)


@recipe(ways=("loop",))
def soft_prompt(run: Run) -> None:
    batch = dict(run.batches[0])
    prompt = torch.linspace(-0.1, 0.1, 2 * 48).view(1, 2, 48).requires_grad_()
    embeddings = run.model.get_input_embeddings()(batch.pop("input_ids"))
    rows = len(embeddings)
    batch["attention_mask"] = torch.cat([torch.ones(rows, 2, dtype=torch.long), batch["attention_mask"]], 1)
    batch["labels"] = torch.cat([torch.full((rows, 2), -100), batch["labels"]], 1)
    run.backward(run(**batch, inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embeddings], 1)).loss)
    run.see("prompt", prompt.grad)


@recipe(refused="give what is trained as inputs_embeds", ways=("loop",), kinds=("llama", "gpt_neox", "lora"))
def trained_prefix_of_keys_and_values(run: Run) -> None:
    from transformers import DynamicCache

    config, batch = _causal_lm(run.model).config, dict(run.batches[0])
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prefix = torch.linspace(-0.2, 0.2, 4 * heads * 2 * size).view(4, 1, heads, 2, size).requires_grad_()
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(x.expand(2, -1, -1, -1) for x in prefix[2 * layer : 2 * layer + 2]), layer)
    batch["attention_mask"] = torch.cat([torch.ones(2, 2, dtype=torch.long), batch["attention_mask"]], 1)
    run.backward(run(**batch, past_key_values=cache, use_cache=True).loss)
    run.see("prefix", prefix.grad)


@recipe()
def packed_rows(run: Run) -> None:
    ids = run.batches[0]["input_ids"].view(1, -1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]])
    run.backward(run(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss)


@recipe(kinds=("llama", "gpt_neox", "lora"))
def mask_of_four_dimensions(run: Run) -> None:
    batch = dict(run.batches[0])
    seq = batch["input_ids"].shape[1]
    batch["attention_mask"] = torch.full((seq, seq), -1e9).triu(1).expand(2, 1, seq, seq).contiguous()
    loss = run(**batch).loss
    run.see("loss", loss)
    run.backward(loss)


@recipe()
def checkpointed_by_the_user(run: Run) -> None:
    from torch.utils.checkpoint import checkpoint

    batch = run.batches[0]
    run.backward(checkpoint(lambda **kwargs: run(**kwargs).loss, use_reentrant=False, **batch))


@recipe()
def gradient_checkpointing_enabled_later(run: Run) -> None:
    _causal_lm(run.model).gradient_checkpointing_enable()
    run.backward(run(**run.batches[0]).loss)


@recipe(ways=("loop",))
def autocast(run: Run) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = run(**_inputs(run.batches[0]))
        run.see("bf16", out.logits.dtype is torch.bfloat16)
        run.see("read as said", out.logits.dtype is (out.logits + 0).dtype)
    run.backward(run(**run.batches[0]).loss)


@recipe()
def evaluation_between_two_forwards(run: Run) -> None:
    first = run(**run.batches[0]).loss
    run.model.eval()
    with torch.no_grad():
        run.see("accuracy", (run(**_inputs(run.batches[1])).logits.argmax(-1) == run.batches[1]["input_ids"]).float().mean())
    run.model.train()
    run.backward(first)


@recipe()
def generation_between_steps(run: Run) -> None:
    run.model.eval()
    ids = run.batches[0]["input_ids"][:1, :4]
    run.see("tokens", run.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    run.model.train()
    run.backward(run(**run.batches[0]).loss)


@recipe()
def logits_read_in_every_way(run: Run) -> None:
    out = run(**run.batches[0])
    logits = out.logits
    run.see("item", logits[0, 0].max().item())
    run.see("list", torch.tensor(logits[0, 1, :5].tolist()))
    run.see("numpy", torch.from_numpy(logits.detach().numpy()))
    run.see("copy", copy.copy(logits).cpu().detach().max())
    run.see("perplexity", out.loss.detach().exp())
    run.backward(out.loss)


def _frozen_below(model: nn.Module) -> None:
    layers_of(model)[0].requires_grad_(False)


@recipe(before=_frozen_below)
def lower_layers_frozen(run: Run) -> None:
    run.backward(run(**run.batches[0]).loss)


@recipe(ways=("loop",))
def frozen_and_thawed_by_turns(run: Run) -> None:
    layers_of(run.model)[0].requires_grad_(False)
    run.backward(run(**run.batches[0]).loss)
    for parameter in layers_of(run.model)[0].parameters():
        parameter.requires_grad_(hasattr(parameter, "grad") and parameter.grad is None and run.model is _causal_lm(run.model))
    run.backward(run(**run.batches[1]).loss)


@recipe(ways=("loop",))
def positional_arguments(run: Run) -> None:
    batch = run.batches[0]
    run.backward(run.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss)


@recipe(ways=("loop",))
def tuple_instead_of_an_output(run: Run) -> None:
    loss, logits = run.model(**run.batches[0], return_dict=False)[:2]
    run.see("logits", logits)
    run.backward(loss)

