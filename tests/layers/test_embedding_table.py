"""Tables: their KL and its estimate from the rows looked up, the padding row, memory, what they refuse, torch's own inputs."""
from __future__ import annotations

import itertools

import pytest
import torch
from common import twin  # noqa: F401
from torch import distributions, nn

import bnn_fast as bf

ROWS, COLUMNS = 9, 4
DATA = torch.tensor([[1, 2, 2], [5, 1, 0], [7, 7, 7], [3, 1, 0], [8, 0, 0], [2, 2, 5]])    # row 0 pads, 4 and 6 do not occur
COUNTS = torch.bincount(DATA.flatten(), minlength=ROWS)
PRIOR = bf.Normal(torch.linspace(-0.5, 0.5, ROWS * COLUMNS).view(ROWS, COLUMNS).double(), 0.7)


def as_bags(tokens):
    """(tokens, offsets) without the padding: bags of several sizes."""
    kept = [row[row != 0] for row in tokens]
    return torch.cat(kept), torch.tensor([0, *(len(row) for row in kept)]).cumsum(0)[:-1]


def table(name="Embedding", **options):
    torch.manual_seed(0)
    return getattr(bf, f"Variational{name}")(ROWS, COLUMNS, padding_idx=0, init_sigma=0.4, scale="exp", dtype=torch.float64,
                                             **{"prior": PRIOR, **options})


def elements(layer, kl="analytic", sample=0):
    """The KL of every weight but the padding's, by its formula; sampled at the draw of seed 2 and this number."""
    mu, sigma = layer.weight_mu[1:], layer.weight_rho[1:].exp()
    q, p = distributions.Normal(mu, sigma), distributions.Normal(PRIOR.loc[1:], PRIOR.scale)
    if kl == "analytic":
        return distributions.kl_divergence(q, p)
    w = mu + sigma * ((bf.draw(layer, 2, first_sample=sample).weight[1:] - mu) / sigma).detach()
    return q.log_prob(w) - p.log_prob(w)


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_kl_of_the_whole_table(kl, sparse, twin):
    layer = table(kl=kl, sparse=sparse)
    with bf.sampling(layer, seed=2):
        layer(DATA).sum().backward()
        assert layer.weight_mu.grad.is_sparse == sparse
        layer.zero_grad()
        value = bf.kl_divergence(layer)
    expected = elements(layer, kl).sum()
    torch.testing.assert_close(value, expected)
    for a, b in zip(*(torch.autograd.grad(y, list(layer.parameters())) for y in (value, expected))):
        torch.testing.assert_close(a[1:], b[1:])
        assert not a.is_sparse and (a[0] == 0).all()


@pytest.mark.parametrize("n_samples", [1, 2])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag", "bags"])
def test_the_estimate_has_the_kl_as_its_mean(name, kl, n_samples):
    """Over all batches of 2 of the 6 entries, exactly."""
    counts = COUNTS.clone()
    counts[0] = 0       # of the padding, which no one has to count
    layer = table("Embedding" if name == "Embedding" else "EmbeddingBag", kl=kl, kl_rows="batch", row_counts=counts, n_data=len(DATA),
                  sparse=True)
    values, gradients, batches = 0.0, 0.0, list(itertools.combinations(range(len(DATA)), 2))
    for batch in batches:
        tokens = DATA[list(batch)].repeat(n_samples, 1)
        with bf.sampling(layer, n_samples, seed=2):
            layer(*as_bags(tokens) if name == "bags" else (tokens,))
            value = bf.kl_divergence(layer)
            assert torch.equal(bf.kl_divergence(layer), value)    # as often as it is read
        found = torch.autograd.grad(value, list(layer.parameters()))
        assert all(g.is_sparse for g in found)
        values, gradients = values + value.detach() / len(batches), gradients + torch.stack([g.to_dense() for g in found]) / len(batches)
    expected = sum(elements(layer, kl, s)[COUNTS[1:] > 0].sum() for s in range(n_samples)) / n_samples
    torch.testing.assert_close(values, expected.detach())
    for a, b in zip(gradients, torch.autograd.grad(expected, list(layer.parameters()))):
        torch.testing.assert_close(a[1:], b[1:])
        assert (a[0] == 0).all()


def test_what_the_estimate_is_of():
    layer = table(kl_rows="batch", row_counts=COUNTS, n_data=len(DATA))
    whole = elements(layer).sum()
    torch.testing.assert_close(bf.kl_divergence(layer), whole)       # no call yet
    layer(DATA[:1])
    estimate = bf.kl_divergence(layer)
    by_row = elements(layer).sum(1)
    torch.testing.assert_close(estimate, 6 * (by_row[0] / 3 + 2 * by_row[1] / 4))
    with torch.no_grad():
        torch.testing.assert_close(bf.kl_divergence(layer), whole)
    torch.testing.assert_close(bf.kl_divergence(layer, "none")["weight"].sum(), whole)
    layer(torch.tensor([[4]]))
    assert bf.kl_divergence(layer) == torch.inf     # it is not among the data
    with torch.no_grad():
        layer.weight_mu.add_(1.0)
    torch.testing.assert_close(bf.kl_divergence(layer), elements(layer).sum())      # of other parameters than the call's
    used = bf.VariationalEmbeddingBag(ROWS, 2, include_last_offset=True, kl_rows="batch", row_counts=COUNTS, n_data=1)
    used(torch.tensor([1, 4]), torch.tensor([0, 1]))    # 4 is in no bag
    assert bf.kl_divergence(used).isfinite()


@pytest.mark.parametrize("compiled", [False, True])
def test_in_an_elbo_and_a_sparse_optimiser(compiled):
    torch.manual_seed(0)
    layer = bf.VariationalEmbedding(ROWS, COLUMNS, sparse=True, kl_rows="batch", row_counts=COUNTS, n_data=len(DATA))
    model = nn.Sequential(layer, nn.Flatten())
    elbo = bf.ELBO(model, bf.Gaussian(0.5), n_data=len(DATA), seed=1)
    step = torch.compile(elbo, fullgraph=True, backend="aot_eager") if compiled else elbo
    optimiser = torch.optim.SparseAdam(list(layer.parameters()), lr=0.01)
    before, x = layer.weight_rho.detach().clone(), DATA[:2]
    loss = step(x, torch.zeros(2, 3 * COLUMNS))
    by_row = bf.kl_divergence(layer, "none")["weight"].detach().sum(1)
    torch.testing.assert_close(elbo.kl, (3 / COUNTS[x] * by_row[x]).sum())
    loss.backward()
    optimiser.step()
    changed = (layer.weight_rho != before).any(1)
    assert changed[x.unique()].all() and not changed[[3, 4, 6, 7, 8]].any()


def test_the_padding_row_stays():
    layer = table(sparse=False, prior=bf.Normal())
    assert (layer.weight_mu[0] == 0).all() and (layer.weight_rho[0] == -torch.inf).all() and (layer.weight_sigma[0] == 0).all()
    assert not layer._pruned    # no mask of the table's size
    average = torch.optim.swa_utils.AveragedModel(layer)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (layer(DATA).square().sum() + bf.kl_divergence(layer)).backward()
        optimiser.step()
        average.update_parameters(layer)
    for trained in (layer, average.module):
        with bf.sampling(trained, seed=1):
            y = trained(DATA)
        assert (y[DATA == 0] == 0).all() and (y[DATA != 0] != 0).all() and bf.kl_divergence(trained).isfinite()
    other = table(prior=bf.Normal())
    other.load_state_dict(layer.state_dict())
    assert not other._pruned
    other.reset_parameters()
    assert (other.weight_rho[0] == -torch.inf).all() and other.weight_rho[1:].isfinite().all()
    assert bf.prune(layer, 0.5) == 18 and layer._pruned and (layer.weight_rho[0] == -torch.inf).all()
    optimiser.step()
    assert (layer.weight_rho == -torch.inf).sum() == 18


@pytest.mark.parametrize("kl", ["analytic", "sampled"])
@pytest.mark.parametrize("kl_rows", ["all", "batch"])
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag"])
def test_a_step_takes_memory_for_its_rows_alone(name, kl_rows, kl, twin):
    rows, batch = 1_000_000, torch.randint(1, 1_000_000, (8, 64))
    counts = {"row_counts": torch.ones(rows, dtype=torch.int64, device="meta"), "n_data": 1000} if kl_rows == "batch" else {}
    layer = getattr(bf, f"Variational{name}")(rows, 64, sparse=True, padding_idx=0, kl_rows=kl_rows, kl=kl, device="meta", **counts)
    layer = layer.to_empty(device="cpu")    # the system gives zeros, and a page where one is touched
    with torch.no_grad():
        layer.weight_mu[batch], layer.weight_rho[batch] = 0.5, -1.0
    if kl_rows == "batch":
        layer.row_counts.fill_(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = layer(batch).square().sum()
        if kl_rows == "batch":
            loss = loss + bf.kl_divergence(layer)
        loss.backward()
    assert layer.weight_mu.grad.is_sparse and layer.weight_mu.grad.coalesce().values().shape[0] <= 512
    taken = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 512 * 64 * 4 <= max(taken) < 512 * 64 * 4 * 20    # in plain PyTorch the words of the noise are int64, beside each other


def test_what_is_refused():
    layer, bag = bf.VariationalEmbedding(5, 2), bf.VariationalEmbeddingBag(5, 2)
    total = bf.VariationalEmbeddingBag(5, 2, mode="sum")
    x, two, counts = torch.tensor([1, 2, 3]), torch.tensor([[1, 2], [3, 4]]), torch.ones(5, dtype=torch.int64)

    def with_samples(layer, *inputs):
        with bf.sampling(layer, 2, seed=0):
            layer(*inputs)

    for act, error, message in (
            (lambda: layer([1]), TypeError, "input: expected an int64 or int32 tensor, given list of 1"),
            (lambda: layer(x.float()), TypeError, "input: expected an int64 or int32 tensor, given a float32 tensor"),
            (lambda: layer(x.to("meta")), ValueError, "input: expected to be on cpu as the parameters are"),
            (lambda: layer(x + 2), IndexError, r"input: expected row numbers from 0 to 4 \(num_embeddings - 1\), given 3 to 5"),
            (lambda: layer(x - 2), IndexError, "input: expected row numbers from 0 to 4 .*, given -1 to 1"),
            (lambda: with_samples(layer, x), ValueError, "input: expected dimension 0 to be the batch repeated n_samples=2 times"),
            (lambda: with_samples(layer, x[0]), ValueError, "input: expected dimension 0 to be the batch repeated"),
            (lambda: bag(x), TypeError, "offsets: expected an int64 or int32 tensor, given NoneType None"),
            (lambda: bag(two, x), ValueError, r"offsets: expected None beside an input \[B, N\]"),
            (lambda: bag(two[None]), ValueError, r"input: expected \[B, N\], or \[T\] with offsets"),
            (lambda: bag(x, two), ValueError, r"offsets: expected \[B\], given a int64 tensor \[2, 2\]"),
            (lambda: bag(two + 1), IndexError, "input: expected row numbers from 0 to 4 .*, given 2 to 5"),
            (lambda: with_samples(bag, two[:1]), ValueError, "input: expected dimension 0 to be the batch repeated n_samples=2"),
            (lambda: with_samples(bag, x, x[:1] - 1), ValueError, r"offsets: expected \[B\], B the bags repeated n_samples=2 times"),
            (lambda: bag(two, None, two.float()), ValueError, "per_sample_weights: expected None, or with mode='sum'.* with mode='mean'"),
            (lambda: total(two, None, two), TypeError, r"per_sample_weights: .*a tensor \[2, 2\] of torch.float32 on cpu, .*given a int64"),
            (lambda: total(two, None, two[:1].float()), ValueError, "per_sample_weights: expected None, or"),
            (lambda: bf.VariationalEmbedding(5, 2, max_norm=1.0), ValueError, "max_norm: expected None, .* given 1.0"),
            (lambda: bf.VariationalEmbedding(5, 2, padding_idx=5), ValueError, "padding_idx: expected -5 to 4, given 5"),
            (lambda: bf.VariationalEmbedding(5, 2, padding_idx=1.0), TypeError, "padding_idx: expected an integer or None"),
            (lambda: bf.VariationalEmbedding(5.0, 2), TypeError, "num_embeddings: expected an integer"),
            (lambda: bf.VariationalEmbedding(5, -2), ValueError, "embedding_dim: expected at least 0"),
            (lambda: bf.VariationalEmbedding(5, 2, sparse="no"), TypeError, "sparse: expected True or False"),
            (lambda: bf.VariationalEmbedding(5, 2, sparse=True, scale_grad_by_freq=True), ValueError, "sparse: expected False beside"),
            (lambda: bf.VariationalEmbeddingBag(5, 2, mode="min"), ValueError, "mode: expected one of 'sum', 'mean', 'max'"),
            (lambda: bf.VariationalEmbeddingBag(5, 2, mode="max", sparse=True), ValueError, "sparse: expected False with mode='max'"),
            (lambda: bf.VariationalEmbedding(5, 2, kl_rows="some"), ValueError, "kl_rows: expected one of 'all', 'batch'"),
            (lambda: bf.VariationalEmbedding(5, 2, row_counts=counts), ValueError, "row_counts: expected None without kl_rows='batch'"),
            (lambda: bf.VariationalEmbedding(5, 2, kl_rows="batch", n_data=3), TypeError, r"row_counts: expected an int64 tensor \[5\]"),
            (lambda: bf.VariationalEmbedding(5, 2, kl_rows="batch", row_counts=counts), TypeError, "n_data: expected an integer"),
            (lambda: bf.VariationalEmbedding(5, 2, kl_rows="batch", row_counts=counts[1:], n_data=3), ValueError, r"row_counts: .*\[5\]"),
            (lambda: bf.VariationalEmbedding(5, 2, kl_rows="batch", row_counts=-counts, n_data=3), ValueError, "given -1 among them")):
        with pytest.raises(error, match=message):
            act()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_own_inputs(dtype, training):
    modules = pytest.importorskip("torch.testing._internal.common_modules", reason="torch's own tests are not installed",
                                  exc_type=ImportError)
    [info] = [info for info in modules.module_db if info.module_cls is nn.Embedding]
    for case in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training):
        made, given = case.constructor_input, case.forward_input
        module = nn.Embedding(*made.args, **made.kwargs, dtype=dtype).train(training)
        layer = bf.VariationalEmbedding(*made.args, **made.kwargs, dtype=dtype).train(training)
        with torch.no_grad():
            layer.weight_mu.copy_(module.weight)
        with bf.sampling(layer, mean=True):
            assert torch.equal(layer(*given.args, **given.kwargs), module(*given.args, **given.kwargs))


def test_means_begin_as_torchs_own():
    torch.manual_seed(0)
    layer = bf.VariationalEmbedding(2000, 64)
    assert abs(layer.weight_mu.std() - 1) < 0.02 and abs(layer.weight_mu.mean()) < 0.02
