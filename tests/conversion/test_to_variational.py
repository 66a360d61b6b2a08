"""Models converted to variational ones and back."""
from __future__ import annotations

import copy

import pytest
import torch
from test_recipes import run_readme
from torch import nn
from torch.nn.utils import prune

import bnn_fast as bf


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU()), nn.Linear(8, 3))


X = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
MODULES = {
    "Linear": (lambda: nn.Linear(3, 2, bias=False), [(4, 3)]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, "valid", 1, 2, padding_mode="zeros"), [(2, 4, 7)]),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=1, padding_mode="replicate"), [(2, 2, 3, 3, 3)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, 1, bias=False, dilation=2), [(2, 2, 4, 4)]),
    "Bilinear": (lambda: nn.Bilinear(2, 3, 4), [(5, 2), (5, 3)]),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4, 1e-3), [(2, 4, 3)]),
    "LayerNorm": (lambda: nn.LayerNorm(4, bias=False), [(2, 4)]),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3, momentum=None), [(6, 3)]),
    "RNN": (lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False), [(5, 2, 3)]),
    "LSTM": (lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2), [(2, 5, 3)]),
    "GRUCell": (lambda: nn.GRUCell(3, 4, bias=False), [(2, 3)]),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=3, vdim=5), [(4, 2, 8), (6, 2, 3), (6, 2, 5)]),
}


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("make, shapes", MODULES.values(), ids=MODULES)
def test_each_layer_there_and_back(make, shapes):
    torch.manual_seed(0)
    module, inputs = make().double(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    layer = bf.to_variational(module, init="moped", init_sigma=0.1)
    assert type(layer) is getattr(bf, f"Variational{type(module).__name__}") and layer.training
    back = bf.to_deterministic(layer)
    assert type(back) is type(module) and repr(back) == repr(module)
    assert torch.equal(first(back(*inputs)), first(module(*inputs)))
    for pair in layer.pairs():
        assert pair.mu.dtype == torch.float64
        torch.testing.assert_close(getattr(layer, f"{pair.name}_sigma"), torch.full_like(pair.mu, 0.1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first(layer(*inputs)), first(module(*inputs)))


def test_a_whole_model_keeps_what_is_not_its_layers():
    model, seen = network(), []
    model[0].register_forward_hook(lambda *arguments: seen.append(len(seen)))
    model[0].weight.requires_grad_(False)
    model.eval()[4].train()
    before = copy.deepcopy(model)
    converted = bf.to_variational(model, init="moped")
    assert [type(m).__name__ for m in converted.modules()][1:3] == ["VariationalConv2d", "VariationalBatchNorm2d"]
    assert all(type(a) is type(b) for a, b in zip(model.modules(), before.modules()))
    assert not converted[0].weight_mu.requires_grad and not converted[0].weight_rho.requires_grad
    assert converted[1].weight_mu.requires_grad and not converted[1].training and converted[4][0].training
    assert torch.equal(bf.to_deterministic(converted)(X), model(X)) and seen
    assert torch.equal(converted[1].running_mean, model[1].running_mean)
    count = len(seen)
    converted(X)
    assert len(seen) == count + 1
    assert bf.to_variational(model, inplace=True) is model and isinstance(model[0], bf.VariationalConv2d)
    bf.ELBO(model, bf.Categorical(), 5)(X, torch.zeros(5, dtype=torch.long)).backward()


@pytest.mark.parametrize("layers, names", [
    (None, ["0", "1", "4.0", "4.1", "5"]), ("last", ["5"]), ("4.*", ["4.0", "4.1"]), (["0", "5"], ["0", "5"]), (nn.Linear, ["4.0", "5"]),
    ([nn.Conv2d, "4.1"], ["0", "4.1"]), (lambda name, module: name == "4.0", ["4.0"])],
    ids=["all", "last", "pattern", "names", "class", "several", "function"])
def test_which_layers(layers, names):
    converted = bf.to_variational(network(), layers)
    assert [name for name, module in converted.named_modules() if isinstance(module, bf.VariationalLayer)] == names


def test_moped():
    model = network()
    with torch.no_grad():
        model[5].bias.zero_()
    converted = bf.to_variational(model, "last", init="moped", delta=0.2, prior=lambda name, mean: bf.Normal(mean, 1.0), scale="exp")
    layer = converted[5]
    w = model[5].weight.detach()
    assert torch.equal(layer.weight_mu, w) and torch.equal(layer.prior.loc, w) and layer.prior.scale == 1.0
    large = w.abs() > 0.01
    torch.testing.assert_close(layer.weight_sigma[large], 0.2 * w.abs()[large])
    assert (layer.bias_sigma > 0).all() and layer.bias_rho.isfinite().all()  # zeros are not pruned
    other = bf.to_variational(network(), "last", scale="exp")
    other.load_state_dict(converted.state_dict())
    torch.testing.assert_close(bf.kl_divergence(other), bf.kl_divergence(converted))
    fresh = bf.to_variational(model, "last")
    assert not torch.equal(fresh[5].weight_mu, w)  # a named initialisation begins anew


def test_priors_and_options_by_pattern():
    converted = bf.to_variational(network(), prior=bf.Normal(0.0, 2.0), bias_prior=bf.Normal(0.0, 3.0), init_sigma=0.05,
                                  options={"4.*": {"kl": "sampled"}, "4.1": {"scale": "exp"}})
    assert converted[4][0].kl == converted[4][1].kl == "sampled" and converted[5].kl == "analytic"
    assert (converted[4][1].scale, converted[4][0].scale) == ("exp", "softplus")
    assert converted[5].prior == bf.Normal(0.0, 2.0) and converted[5].bias_prior == bf.Normal(0.0, 3.0)
    torch.testing.assert_close(converted[5].weight_sigma, torch.full((3, 8), 0.05))
    model = network()
    converted = bf.to_variational(model, prior=bf.Normal(0.0, 2.0), init="moped", options={
        "5": {"prior": bf.Normal(0.0, 0.5), "init": "zeros"}, "4.0": {"delta": 0.3}, "4.1": {"bias_prior": bf.Normal(0.0, 3.0)}})
    assert converted[5].prior == converted[5].bias_prior == bf.Normal(0.0, 0.5) and not converted[5].weight_mu.any()
    assert [converted[4][1].prior.scale, converted[4][1].bias_prior.scale, converted[4][0].bias_prior.scale] == [2.0, 3.0, 2.0]
    w = model[4][0].weight.detach()
    torch.testing.assert_close(converted[4][0].weight_sigma[w.abs() > 0.01], 0.3 * w.abs()[w.abs() > 0.01])


def test_ties_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    converted = bf.to_variational(nn.Sequential(*model, model[0]), init="moped")
    assert converted[0].weight_mu is converted[1].weight_mu and converted[0] is converted[2]
    assert set(bf.posterior(converted)) == {"0.weight", "0.bias"}
    x = torch.randn(2, 3)
    with bf.sampling(converted, seed=1):
        assert torch.equal(converted[0](x) - converted[0](torch.zeros(1, 3)), converted[0](x) - converted[0](torch.zeros(1, 3)))
    torch.testing.assert_close(bf.draw(converted, 1)[0].weight, bf.draw(converted, 1)[1].weight)


def test_an_embedding_and_its_head_stay_tied():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    converted = bf.to_variational(model, init="moped")
    assert converted[0].weight_mu is converted[1].weight_mu and converted[0].weight_rho is converted[1].weight_rho
    network = bf.draw(converted, 1)
    assert torch.equal(network[0].weight, network[1].weight)
    torch.testing.assert_close(bf.kl_divergence(converted), bf.kl_divergence(converted[0]))
    back = bf.to_deterministic(converted)
    assert back[0].weight is back[1].weight and torch.equal(back[0].weight, model[0].weight)


def test_what_is_shared_or_held_fast_is_so_in_the_means():
    attention = nn.MultiheadAttention(4, 2, bias=False)
    model = nn.ModuleList([attention, nn.Linear(4, 4), nn.LSTM(4, 4), bf.Variational(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))])
    model[1].weight = attention.out_proj.weight
    attention.in_proj_weight.requires_grad_(False), model[2].weight_hh_l0.requires_grad_(False)
    back = bf.to_deterministic(bf.to_variational(model, init="moped"))
    assert back[1].weight is back[0].out_proj.weight and back[1].weight.requires_grad
    assert not back[0].in_proj_weight.requires_grad and not back[2].weight_hh_l0.requires_grad
    x = torch.randn(3, 1, 4)
    assert torch.equal(back[2](x)[0], model[2](x)[0]) and torch.equal(back[0](x, x, x)[0], model[0](x, x, x)[0])


class Remembers(nn.Module):
    """A method of its own is the hook of its layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(3, 3), []
        self.fc.register_forward_hook(self.remember)
        self.fc.register_full_backward_hook(lambda module, inputs, outputs: self.seen.append("gradient"))

    def remember(self, module, inputs, output):
        self.seen.append("output")

    def forward(self, x):
        return self.fc(x)


def test_hooks_are_the_copys_own():
    model, x = Remembers(), torch.randn(2, 3, requires_grad=True)
    converted = bf.to_variational(model)
    converted(x).sum().backward()
    assert converted.seen == ["output"] and model.seen == ["gradient"]  # a function that is no method belongs to both
    model.seen.clear()
    bf.to_variational(model, inplace=True)(x).sum().backward()
    assert model.seen == ["output", "gradient"]


@pytest.mark.parametrize("layers", [None, nn.Linear, nn.LayerNorm, nn.MultiheadAttention, "layers.1.*", "layers.1.linear2",
                                    "layers.1.self_attn", lambda name, module: isinstance(module, nn.Linear)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformers_in_part_and_with_padding(layers, padded):
    """In evaluation mode without gradients, where torch would take its fused path."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    converted = bf.to_variational(model, layers, init="moped")
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), bf.sampling(converted, mean=True):
        found, expected = converted(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    keep = slice(None) if padding is None else ~padding
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-4, atol=1e-5)


def test_a_transformer_trains_and_predicts():
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    converted = bf.to_variational(model, init="moped")
    torch.testing.assert_close(bf.to_deterministic(converted)(source, target), model(source, target))
    converted(source, target).sum().backward()
    assert all(p.grad is not None for p in converted.parameters())
    converted.eval()
    with torch.no_grad():
        assert converted(source, target).shape == (2, 4, 8)
    encoder = bf.to_variational(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2,
                                                      enable_nested_tensor=False), init="moped")
    found = bf.predict(encoder, source, n_samples=3, seed=0)
    torch.testing.assert_close(found.samples[2], bf.draw(encoder.eval(), 0, first_sample=2)(source), rtol=1e-4, atol=1e-5)


class Reads(nn.Module):
    """Takes the weight of a child."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return x @ self.fc.weight.T


def test_a_module_that_reads_its_childs_weight():
    model, x = nn.Sequential(Reads(), nn.Linear(3, 2)), torch.randn(4, 3)
    with pytest.raises(AttributeError, match=r"bnn_fast\.Variational\(module\) draws the parameters of a module that takes the weight"):
        bf.to_variational(model)(x)
    model[0] = bf.Variational(model[0])  # the remedy, after which the rest can be converted
    converted = bf.to_variational(model)
    assert [type(module).__name__ for module in converted] == ["Variational", "VariationalLinear"]
    assert not torch.equal(converted(x), converted(x))
    assert bf.predict(converted, x, n_samples=3).samples.shape == (3, 4, 2)


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def with_parametrized_projection() -> nn.Module:
    attention = nn.MultiheadAttention(4, 2)
    nn.utils.parametrizations.weight_norm(attention.out_proj)
    return attention


def half_tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def test_what_had_been_parametrized_is_converted():
    model = pruned()
    prune.remove(model[0], "weight")  # the weight now comes after the bias
    assert torch.equal(bf.to_variational(model, init="moped")[0].weight_mu, model[0].weight)


@pytest.mark.parametrize("call, error, message", [
    (lambda: bf.to_variational(network(), "6"), ValueError, "layers: expected names, patterns or classes of layers among 0, 1, 4.0"),
    (lambda: bf.to_variational(network(), 3), TypeError, "layers: expected None, 'last', names"),
    (lambda: bf.to_variational(network(), lambda name, module: True), ValueError, "layers: expected layers that have a counterpart"),
    (lambda: bf.to_variational(nn.ReLU()), ValueError, r"bnn_fast\.Variational\(module\)"),
    (lambda: bf.to_variational(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), ValueError, "parametrized: remove that"),
    (lambda: bf.to_variational(pruned()), ValueError, "given '0', whose are parametrized: remove that first.*weight_orig.*prune.remove"),
    (lambda: bf.to_variational(nn.utils.weight_norm(nn.Linear(2, 2))), ValueError, "weight_g.*remove_weight_norm"),
    (lambda: bf.to_variational(with_parametrized_projection()), ValueError, "out_proj_weight"),
    (lambda: bf.to_variational(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))), ValueError, "given '1', a lazy one: call the model once"),
    (lambda: bf.to_variational(half_tied(), "last"), ValueError, "given '1' without '0', which has it as 'weight': choose both"),
    (lambda: bf.to_variational(half_tied(), options={"1": {"scale": "exp"}}), ValueError, "scale: expected one for layers that share"),
    (lambda: bf.to_variational(network(), options={"7": {}}), ValueError, "options: expected patterns of layers among 0, 1, 4.0.*'7'"),
    (lambda: bf.to_variational(network(), options={"5": 0.1}), TypeError, "options: expected a dictionary of dictionaries"),
    (lambda: bf.to_variational(nn.Linear(2, 2), inplace=True), ValueError, "inplace: expected False"),
    (lambda: bf.to_variational(network(), init="best"), ValueError, "init: expected one of .*'moped'"),
    (lambda: bf.to_variational(network(), prior=1.0), TypeError, "prior: expected a Normal or a function"),
    (lambda: bf.to_variational(network(), delta=-1.0), ValueError, "delta: expected a positive finite number"),
    (lambda: bf.to_variational(network(), sigma=1.0), TypeError, "sigma"),
    (lambda: bf.to_variational([1]), TypeError, "model: expected an nn.Module")])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_readmes_lines_run():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    pretrained = nn.Sequential(backbone, nn.Linear(8, 3))
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    names = run_readme("A Bayesian last layer on a pretrained backbone, in ten lines", pretrained=pretrained, train_x=x, train_y=y,
                       test_x=x, batches=[(x, y)] * 3)
    assert names["prediction"].probs.shape == (20, 3)
    assert torch.equal(names["model"][0][0].weight, backbone[0].weight)
