"""A user's own accelerate loop: prepare, accumulate, gather_for_metrics, save_state; it knows nothing of ds_seqpar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DataLoaderConfiguration, DummyOptim, DummyScheduler, set_seed
from hf_trainer import Rows, collate
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Trains as `job` says: {"model": folder, "deepspeed": dict or None, "accumulation": n, "rows": n, "steps": n}."""
    set_seed(5)
    plugin = DeepSpeedPlugin(hf_ds_config=job["deepspeed"]) if job.get("deepspeed") else None
    PartialState(cpu=True)  # a machine without GPUs
    accelerator = Accelerator(
        cpu=plugin is None, deepspeed_plugin=plugin, gradient_accumulation_steps=job["accumulation"],
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"]).train()
    if job.get("dummies"):  # the JSON describes both
        optimizer: Any = DummyOptim(model.parameters(), lr=1e-2)
        scheduler: Any = DummyScheduler(optimizer, total_num_steps=48, warmup_num_steps=2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train = DataLoader(Rows(job["rows"], 9), batch_size=2, shuffle=True, collate_fn=collate)
    evaluation = DataLoader(Rows(5, 9), batch_size=2, collate_fn=collate)
    processes = len(accelerator.gather(torch.zeros(1)))  # before there is any model
    model, optimizer, scheduler, train, evaluation = accelerator.prepare(model, optimizer, scheduler, train, evaluation)
    losses: list[float] = []
    tokens: list[tuple[float, float, float]] = []
    rates: list[float] = []
    norms: list[float] = []

    def epoch() -> None:
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    norms.append(float(norm if norm is not None else model.get_global_grad_norm()))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            count = batch["labels"].ne(-100).sum()
            everyone = accelerator.gather(count), accelerator.reduce(count), accelerator.reduce(count.float(), "mean")
            tokens.append(tuple(float(x.sum()) for x in everyone))  # type: ignore[arg-type]
            losses.append(float(accelerator.gather(loss.detach()).mean()))
            rates.append(scheduler.get_last_lr()[0])

    epoch()
    if job.get("states", True):
        accelerator.save_state(str(out / "state"))
        epoch()
        accelerator.load_state(str(out / "state"))
        epoch()  # from the weights, moments, rates and rows that were saved
    model.eval()
    predicted, names = [], []
    with torch.no_grad():
        for i, batch in enumerate(evaluation):
            logits = model(**batch).logits
            predicted.append(accelerator.gather_for_metrics((logits[:, :4].sum(-1), batch["labels"][:, :4])))
            names += accelerator.gather_for_metrics(
                [f"{i}.{j}" for j in range(len(batch["labels"]))], use_gather_object=True
            )
    weights = accelerator.get_state_dict(model)
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        unwrapped.save_pretrained(out / "saved", state_dict=weights)
    accelerator.save_model(model, str(out / "weights"))
    return {
        "losses": losses, "rates": rates, "norms": norms, "tokens": tokens, "processes": processes, "names": names,
        "type": type(unwrapped).__name__,
        "predicted": [[x.tolist() for x in pair] for pair in predicted],
    }  # fmt: skip
