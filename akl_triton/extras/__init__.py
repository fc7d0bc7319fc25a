"""Relatives of the losses that need no kernel, in plain PyTorch.

They are not part of `import akl_triton`: write `from akl_triton.extras import sinkd_loss`.

`sinkd_loss` is an optimal transport between the tokens of a batch, `dpkd_loss` a preference for the
teacher's outputs over the student's, `kl_regularised_policy_loss` a policy gradient that a
divergence keeps near a reference model.
"""

from .dpkd import dpkd_loss
from .policy import PolicyStats, kl_regularised_policy_loss
from .sinkd import sinkd_loss

__all__ = ["PolicyStats", "dpkd_loss", "kl_regularised_policy_loss", "sinkd_loss"]
