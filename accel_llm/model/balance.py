"""The loss that balances the use of the experts of a mixture, as the model's family computes it."""

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


def asks_for_balance(model: PreTrainedModel) -> bool:
    """Return whether the config asks for a loss that balances the use of the experts."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def balance_loss(model: PreTrainedModel, output: ModelOutput) -> torch.Tensor | float:
    """Return the term that the family adds to its mean loss to balance its experts; 0 if it has none."""
    if getattr(output, "aux_loss", None) is None:
        return 0.0
    holders = (model, model.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the second one is JetMoE's
    coefficients = [getattr(holder, name) for holder in holders for name in names if hasattr(holder, name)]
    return coefficients[0] * output.aux_loss  # type: ignore
