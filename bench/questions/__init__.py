"""The questions that bench/ answers, a module each.

A module has

    collect(...) -> dict    the figures, as JSON can hold them; its parameters are options of the
                            command, and its defaults are what is stored
    markdown(data) -> str   the same to read
    plot(data, path)        a picture, where there is something to see
    failures(data) -> list  a line for each figure that is not as it must be; any line fails the
    command
"""

from __future__ import annotations

import importlib
from types import ModuleType

QUESTIONS = {
    "instructions": "What do the compiled kernels execute per vocabulary position, and the peers'?",
    "family": "What do the kernels of each divergence of the family execute?",
    "traffic": "What do they read, write and execute on real logits?",
    "operators": "How many bytes does each way to compute a loss move, operator by operator?",
    "growth": "How does cost grow with the rows and with the vocabulary?",
    "convergence": "How right is every divergence as the student nears the teacher?",
    "linear": "What do the losses of hidden states hold and take, compared with others?",
    "trainer_step": "What does a step of a Trainer hold and take, with TRL's losses and with ours?",
    "vocabulary_parallel": "Which losses of sharded logits are right on all ranks? What is sent?",
    "sharded_heads": "Are all heads of sharded logits right, and what do the ranks exchange?",
    "sparse": "How far are the gradients of k pairs from the dense ones, and what do they cost?",
    "offline": "How many bytes does a teacher's token take on disk, and how fast is it read?",
    "floor": "Which time can no GPU beat, by the stored figures of the others?",
    "on_real_logits": "Is the PyTorch backend faster than the authors' code here, and as right?",
    "demo": "What does `akl-triton demo` make of a student of each loss?",
    "overview": "What is the gap of one real token, and what memory do the losses need?",
    "busy": "Does the time of the PyTorch backend fall off a cliff on this CPU?",
    "compiled": "Is the PyTorch backend as fast as torch.compile of the plain formula on this CPU?",
    "host": "How long does a call keep the host, until the kernels are launched?",
    "budgets": "Are the compiled kernels within their budgets?",
    "l2": "Which sweeps of a row would the L2 serve, by a model of it?",
    "on_chip": "What would a kernel cost that holds its row in registers?",
    "gpu": "How long do the losses take on a GPU?",
    "dram": "How many bytes do our losses move to and from a GPU's memory?",
}


class Unanswerable(Exception):
    """This machine lacks what the question needs."""


def question(name: str) -> ModuleType:
    """The module of a question."""
    return importlib.import_module(f"bench.questions.{name}")
