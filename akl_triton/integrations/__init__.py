"""The losses inside the models of Hugging Face, and in other frameworks.

They are not part of `import akl_triton`: write `from akl_triton.integrations import
distillation_loss_of_models`. Neither transformers nor peft is imported here: who has a model of
theirs has imported them.

`distillation_loss_of_models` is the loss of two causal language models, computed in the place of
the student's lm_head; `describe_model` and `in_place_of_head` are what it is made of.
`PairCollator` and `teacher_of` are for teachers whose pairs were stored, and `teacher_of_vllm`,
`teacher_of_trl` and `teacher_of_distillkit` for those whose pairs others compute. The Trainer with
that loss is in `akl_triton.integrations.transformers`, which does import transformers, and those of
TRL are in `akl_triton.integrations.trl`. `akl_triton.integrations.criteria` has the losses that
configurations of torchtune and NeMo AutoModel name.
"""

from .heads import HeadInfo, describe_model, in_place_of_head
from .models import check_vocabularies, distillation_loss_of_models
from .pairs import PairCollator, teacher_of
from .readers import teacher_of_distillkit, teacher_of_trl, teacher_of_vllm

__all__ = [
    "HeadInfo",
    "PairCollator",
    "check_vocabularies",
    "describe_model",
    "distillation_loss_of_models",
    "in_place_of_head",
    "teacher_of",
    "teacher_of_distillkit",
    "teacher_of_trl",
    "teacher_of_vllm",
]
