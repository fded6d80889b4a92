"""KL divergence against torch's own, in float64."""

import torch

from workers.evaluation.divergence import ROWS_AT_A_TIME, kl_divergence_of_logits


def test_every_row_is_compared() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(3, ROWS_AT_A_TIME, 17), torch.randn(3, ROWS_AT_A_TIME, 17)
    expected = torch.nn.functional.kl_div(
        after.double().log_softmax(-1), before.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(
        kl_divergence_of_logits(before.log_softmax(-1), after), expected.flatten().float(), rtol=1e-4, atol=1e-6
    )


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(4, 9)
    found = kl_divergence_of_logits(logits.log_softmax(-1), logits)
    torch.testing.assert_close(found, torch.zeros(4), rtol=0, atol=1e-6)
