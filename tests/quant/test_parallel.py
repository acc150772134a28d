"""One process here; tests/train/test_parallel.py has two."""

import pytest
import torch
from torch import nn

from qdeploy.quant import parallel


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined():
        assert (parallel.processes(), parallel.rank()) == (1, 0)
    batch, losses = torch.rand(6, 2), {"a": 1.0}
    assert torch.equal(parallel.part(batch), batch) and torch.equal(parallel.gathered(batch), batch)
    assert parallel.average_losses(losses) is losses
    norm = nn.BatchNorm2d(3)
    with parallel.synchronized_norms(norm):
        assert type(norm) is nn.BatchNorm2d


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_synchronized_norm_is_the_plain_one(momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes are simulated: the other holds the same images, so that sums double."""
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    torch.manual_seed(0)
    plain, synced = nn.BatchNorm2d(5, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    with parallel.synchronized_norms(synced):
        assert type(synced) is parallel.SyncedBatchNorm2d
        for _ in range(3):
            x = 3 * torch.randn(4, 5, 6, 6) + 100  # a large mean must not cost digits
            twice = torch.cat([x, x]).requires_grad_()
            once = x.clone().requires_grad_()
            grad = torch.randn(4, 5, 6, 6)
            expected, found = plain(twice), synced(once)
            torch.testing.assert_close(found, expected[:4], rtol=1e-3, atol=1e-4)
            expected.backward(torch.cat([grad, grad]))
            found.backward(grad)
            assert once.grad is not None and twice.grad is not None
            torch.testing.assert_close(once.grad, twice.grad[:4], rtol=1e-3, atol=1e-5)
    assert type(synced) is nn.BatchNorm2d
    assert plain.weight.grad is not None and synced.weight.grad is not None
    torch.testing.assert_close(2 * synced.weight.grad, plain.weight.grad, rtol=1e-3, atol=1e-3)
    for (name, a), (_, b) in zip(plain.named_buffers(), synced.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    synced.eval()
    plain.eval()
    torch.testing.assert_close(synced(x), plain(x), rtol=1e-3, atol=1e-4)
