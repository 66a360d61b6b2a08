"""The inputs that torch's own tests make for each class of torch.nn: the counterparts at their means, and `Variational` of every class
that has parameters.
"""
from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch
from torch import nn

import bnn_fast as bf

module_db = pytest.importorskip("torch.testing._internal.common_modules", reason="torch's own tests, or expecttest, are not installed",
                                exc_type=ImportError).module_db

COUNTERPARTS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d",
                "ConvTranspose2d", "ConvTranspose3d", "Embedding", "GRU", "GRUCell", "GroupNorm", "LSTM", "LSTMCell", "LayerNorm",
                "MultiheadAttention", "RNN", "RNNCell"]
CLASSES = {name: cls for name, cls in sorted(vars(nn).items()) if isinstance(cls, type) and issubclass(cls, nn.Module)}
KNOWN = {info.module_cls: info for info in module_db if info.module_cls in CLASSES.values()}
x = torch.linspace(-1.0, 1.0, 24)
# Those for which torch has none: how they are made, and inputs.
OWN = {
    "AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4]), (x.view(6, 4), torch.arange(6))),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 3), (torch.tensor([[0, 1], [4, 4]]),)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (x.view(2, 3, 4),)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (x.view(2, 3, 2, 2),)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(3, affine=True), (x.view(2, 3, 2, 2, 1),)),
    "LazyBatchNorm1d": (nn.LazyBatchNorm1d, (x.view(2, 3, 4),)),
    "LazyBatchNorm2d": (nn.LazyBatchNorm2d, (x.view(2, 3, 2, 2),)),
    "LazyBatchNorm3d": (nn.LazyBatchNorm3d, (x.view(2, 3, 2, 2, 1),)),
    "LazyInstanceNorm1d": (lambda: nn.LazyInstanceNorm1d(affine=True), (x.view(2, 3, 4),)),
    "LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(affine=True), (x.view(2, 3, 2, 2),)),
    "LazyInstanceNorm3d": (lambda: nn.LazyInstanceNorm3d(affine=True), (x.view(2, 3, 2, 2, 1),)),
    "LazyLinear": (lambda: nn.LazyLinear(2), (x.view(6, 4),)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3).eval(), (x.view(2, 3, 4),)),   # in training it wants a GPU
    "TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8), 2), (x.view(3, 2, 4), x.view(3, 2, 4))),
}
SKIPPED = {"ParameterDict": "has no forward", "ParameterList": "has no forward", "RNNBase": "is the base of RNN, LSTM and GRU",
           "RNNCellBase": "is the base of the cells"}
pytestmark = pytest.mark.filterwarnings("ignore")


def inputs_of(info, dtype, training):
    for given in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training):
        if given.forward_input is not None:
            yield given.constructor_input, given.forward_input


def outputs_of(module, *inputs, **keywords) -> list[torch.Tensor]:
    torch.manual_seed(0)    # of dropout
    return [y for y in torch.utils._pytree.tree_leaves(module(*inputs, **keywords)) if isinstance(y, torch.Tensor)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) > 0
    for mine, theirs in zip(a, b):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COUNTERPARTS)
def test_counterparts_at_their_means(name, dtype, training):
    count = 0
    for made, given in inputs_of(KNOWN[getattr(nn, name)], dtype, training):
        module = getattr(nn, name)(*made.args, **{**made.kwargs, "dtype": dtype}).train(training)
        layer = getattr(bf, f"Variational{name}")(*made.args, **{**made.kwargs, "dtype": dtype}).train(training)
        with torch.no_grad():
            theirs = dict(layer._named(module) if hasattr(layer, "_named") else module._parameters)
            for pair in layer.pairs():
                pair.mu.copy_(theirs.pop(pair.name))
            assert all(p is None for p in theirs.values())
        with bf.sampling(layer, mean=True):
            same(outputs_of(layer, *given.args, **given.kwargs), outputs_of(module, *given.args, **given.kwargs))
        count += 1
    assert count


def of_class(name):
    """(module, positional and named inputs) for some of the known inputs, among them the first and the last."""
    if name in OWN:
        make, inputs = OWN[name]
        yield make(), inputs, {}
    if CLASSES[name] in KNOWN:
        known = list(inputs_of(KNOWN[CLASSES[name]], torch.float32, True))
        for made, given in known[::-(-len(known) // 6)][:6] + known[-1:]:
            yield CLASSES[name](*made.args, **made.kwargs), given.args, given.kwargs


def has_parameters(name) -> bool:
    if CLASSES[name] in KNOWN or name in OWN:
        return any(list(module.parameters()) for module, _, _ in of_class(name))
    source = "".join(inspect.getsource(cls) for cls in CLASSES[name].__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module)
    return re.search(r"\bParameter\(|\bLinear\(|_get_clones\(", re.sub(r'r?"""(.|\n)*?"""', "", source)) is not None


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    WITH_PARAMETERS = [name for name in CLASSES if has_parameters(name)]


def test_every_class_of_torch_is_looked_at():
    assert len(SKIPPED) <= 5 and set(SKIPPED) <= set(WITH_PARAMETERS)
    assert len(WITH_PARAMETERS) > 50 and {"Linear", "LSTM", "Transformer", "PReLU"} < set(WITH_PARAMETERS)


@pytest.mark.parametrize("name", [name for name in WITH_PARAMETERS if name not in SKIPPED])
def test_any_class_with_its_parameters_drawn(name):
    count = 0
    for module, inputs, keywords in of_class(name):
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters()):
            with pytest.raises(ValueError, match="module: expected parameters with shapes, given .* of a lazy module"):
                bf.Variational(module)
            module(*inputs, **keywords)
        if not list(module.parameters()):
            continue
        layer = bf.Variational(module, init_sigma=0.1)
        assert sum(p.numel() for p in layer.parameters()) == 2 * sum(p.numel() for p in module.parameters())
        drawn = bf.draw(layer, seed=1)
        assert {n: p.shape for n, p in drawn.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
        for mode, torchs in (({"mean": True}, module), ({"seed": 1}, drawn)):
            with bf.sampling(layer, **mode):
                found = outputs_of(layer, *inputs, **keywords)
            same(found, outputs_of(torchs, *inputs, **keywords))
        (sum(y.sum() for y in found if y.requires_grad) + bf.kl_divergence(layer)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        count += 1
    assert count
