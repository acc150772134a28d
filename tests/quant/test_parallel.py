"""One process here; tests/train/test_parallel.py has two."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from qdeploy.quant import parallel
from qdeploy.quant.batchquant import ESTIMATORS


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined():
        assert (parallel.processes(), parallel.rank()) == (1, 0)
    x = torch.rand(4, 3, 2, 2)
    assert torch.equal(parallel.least(x, (0, 2, 3)), x.amin((0, 2, 3)))
    assert torch.equal(parallel.greatest(x, (0,)), x.amax(0)) and parallel.mean_of_parts(x) is x
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


def test_a_synchronized_norm_keeps_a_small_deviation_beside_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    torch.manual_seed(0)
    x, plain, synced = 0.01 * torch.randn(4, 5, 6, 6) + 100, nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    with parallel.synchronized_norms(synced):
        torch.testing.assert_close(synced(x), plain(x), rtol=0.0, atol=0.05)


class Parts:
    """Processes as threads that meet in every reduction."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=20)
        self.local = threading.local()
        self.slots: list[torch.Tensor] = [torch.empty(0)] * count

    def all_reduce(self, tensor: torch.Tensor, op: object = parallel.dist.ReduceOp.SUM) -> None:
        self.slots[self.local.rank] = tensor.clone()
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        self.barrier.wait()
        if op == parallel.dist.ReduceOp.SUM:
            tensor.copy_(stacked.sum(0))
        else:
            tensor.copy_(stacked.amin(0) if op == parallel.dist.ReduceOp.MIN else stacked.amax(0))

    def run(self, work: Callable[[int], None]) -> None:
        def start(rank: int) -> None:
            self.local.rank = rank
            work(rank)

        with ThreadPoolExecutor(self.count) as pool:
            list(pool.map(start, range(self.count)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_extreme_values_are_those_of_the_whole_batch(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of parts, ties among them, are those of one process on the whole batch."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(9, 4, 5, 5, generator=generator).double()
    whole[1, 2, 3, 3] = whole[7, 2, 0, 0] = whole[8, 2, 1, 4] = 9.0  # a maximum in three places of two parts
    whole[0, 1] = whole[5, 1] = 0.0
    factors = torch.randn(3, 2, generator=generator).double()  # each part's loss weighs the two by numbers of its own
    expected = whole.clone().requires_grad_()
    low, high = ESTIMATORS[estimator](expected, True)
    (low * factors[:, 0].sum() + high * factors[:, 1].sum()).backward()
    assert expected.grad is not None
    parts, xs = Parts(3), [part.clone().requires_grad_() for part in whole.chunk(3)]
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    monkeypatch.setattr("qdeploy.quant.batchquant.processes", lambda: 3)
    monkeypatch.setattr(parallel.dist, "all_reduce", parts.all_reduce)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(rank: int) -> None:
        own = ESTIMATORS[estimator](xs[rank], True)
        found[rank] = own[0].detach(), own[1].detach()
        (own[0] * factors[rank, 0] + own[1] * factors[rank, 1]).backward()

    parts.run(work)
    for rank in range(3):
        torch.testing.assert_close(found[rank], (low.detach(), high.detach()))
    torch.testing.assert_close(torch.cat([x.grad for x in xs if x.grad is not None]), expected.grad)
