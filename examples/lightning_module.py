"""A LightningModule with the loss of a teacher.

python examples/lightning_module.py     (a CPU, some minutes; needs lightning)
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from akl_triton.cli.smollm2 import load_teacher, read_text, shallow_copy
from akl_triton.integrations import distillation_loss_of_models


class Distillation(pl.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)  # a submodule goes to the device
        self.strict_loading = False  # its weights are not in the checkpoints

    def training_step(self, input_ids: Tensor, index: int) -> Tensor:
        loss = distillation_loss_of_models(self.student, self.teacher, {"input_ids": input_ids})
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, input_ids: Tensor, index: int) -> None:
        loss = distillation_loss_of_models(
            self.student, self.teacher, {"input_ids": input_ids}, divergence="forward_kl"
        )
        self.log("forward_kl", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.student.parameters() if p.requires_grad), lr=5e-4)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            name: weights[name] for name in weights if not name.startswith("teacher.")
        }


def main(steps: int) -> None:
    pl.seed_everything(0)
    teacher, tokenizer = load_teacher()
    module = Distillation(shallow_copy(teacher), teacher)  # 12 of the 30 layers
    train, held_out = (DataLoader(ids, batch_size=2) for ids in read_text(tokenizer))
    trainer = pl.Trainer(max_steps=steps, logger=False, enable_checkpointing=False)
    (before,) = trainer.validate(module, held_out, verbose=False)
    trainer.fit(module, train)
    (after,) = trainer.validate(module, held_out, verbose=False)
    print(f"held out, before: forward KL {before['forward_kl']:.4f}")
    print(f"held out, after:  forward KL {after['forward_kl']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
