"""What counterparts of torch's modules refuse, before anything is drawn."""
from __future__ import annotations

import pytest
import torch
from torch import nn

import bnn_fast as bf

t = torch.ones
conv, transpose = bf.VariationalConv2d(4, 2, 3), bf.VariationalConvTranspose1d(4, 2, 3)
layer_norm, group_norm = bf.VariationalLayerNorm((3, 4)), bf.VariationalGroupNorm(2, 4)
batch_norm, bilinear = bf.VariationalBatchNorm1d(4), bf.VariationalBilinear(3, 2, 5)
anything = bf.Variational(nn.Linear(3, 2))

CALLS = [
    (conv, (t(2, 3, 5, 5),), ValueError, r"input: expected a tensor \[B, 4, H, W\] or \[4, H, W\] \(in_channels=4\), given a float32"),
    (conv, (t(2, 4, 5),), ValueError, r"in_channels=4.*given a float32 tensor \[2, 4, 5\]"),
    (conv, ([1.0],), TypeError, "input: expected a tensor .*given list of 1"),
    (conv, (t(2, 4, 5, 5).double(),), TypeError, "input: expected torch.float32 as the parameters have, given a float64"),
    (conv, (t(2, 4, 5, 5).int(),), TypeError, "input: expected torch.float32"),
    (conv, (t(2, 4, 5, 5, device="meta"),), ValueError, "input: expected to be on cpu as the parameters are"),
    (transpose, (t(2, 3, 5),), ValueError, r"input: expected a tensor \[B, 4, L\] or \[4, L\]"),
    (transpose, (t(2, 4, 5), [50]), ValueError, "requested an output size"),
    (layer_norm, (t(2, 4, 3),), ValueError, r"input: expected a tensor \[..., 3, 4\] \(normalized_shape\), given a float32 tensor \[2, 4, 3\]"),
    (layer_norm, (t(4),), ValueError, "normalized_shape"),
    (layer_norm, (None,), TypeError, "input: expected a tensor"),
    (layer_norm, (t(2, 3, 4).double(),), TypeError, "input: expected torch.float32"),
    (group_norm, (t(2, 3, 4),), ValueError, r"input: expected a tensor \[B, 4, ...\] \(num_channels\), given a float32"),
    (group_norm, (t(4),), ValueError, "num_channels"),
    (group_norm, (1.0,), TypeError, "input: expected a tensor"),
    (batch_norm, (t(2, 3),), ValueError, r"\(num_features\) of 2 or 3 dimensions, given a float32 tensor \[2, 3\]"),
    (batch_norm, (t(2, 4, 1, 1),), ValueError, "2 or 3 dimensions"),
    (batch_norm, (t(2, 4).double(),), TypeError, "input: expected torch.float32"),
    (batch_norm, (t(2, 4, device="meta"),), ValueError, "input: expected to be on cpu"),
    (bilinear, (t(2, 3), t(2, 3)), ValueError, r"input2: expected a tensor \[..., 2\] \(in2_features\), given a float32 tensor \[2, 3\]"),
    (bilinear, (t(2, 2), t(2, 2)), ValueError, r"input1: expected a tensor \[..., 3\] \(in1_features\)"),
    (bilinear, (t(2, 3), t(4, 2)), ValueError, r"input2: expected \[2, 2\] beside input1 \[2, 3\]"),
    (bilinear, (t(2, 3), t(2, 2).bfloat16()), TypeError, "input2: expected torch.float32 as input1 has"),
    (bilinear, (t(2, 3), None), TypeError, "input2: expected a tensor"),
]
SEVERAL = [
    (conv, (t(5, 4, 5, 5),), "input: expected dimension 0 to be the batch repeated n_samples=2 times, given a float32"),
    (conv, (t(4, 5, 5),), "input: expected dimension 0 to be the batch"),
    (transpose, (t(4, 5),), "input: expected dimension 0"),
    (layer_norm, (t(3, 4),), "input: expected dimension 0"),
    (layer_norm, (t(3, 3, 4),), "input: expected dimension 0"),
    (group_norm, (t(3, 4),), "input: expected dimension 0"),
    (batch_norm, (t(3, 4),), "input: expected dimension 0"),
    (bilinear, (t(3), t(2)), "input1: expected dimension 0"),
    (bilinear, (t(3, 3), t(3, 2)), "input1: expected dimension 0"),
    (anything, (t(3, 3),), "inputs: expected dimension 0"),
]
CONSTRUCTORS = [
    (lambda: bf.VariationalConv2d(4, 2, (3, 3, 3)), ValueError, "kernel_size: expected an integer or 2 of them, given tuple of 3"),
    (lambda: bf.VariationalConv2d(4, 2, 0), ValueError, "kernel_size: expected at least 1, given 0"),
    (lambda: bf.VariationalConv2d(4, 2, 2.5), TypeError, "kernel_size: expected an integer or 2 of them, given float 2.5"),
    (lambda: bf.VariationalConv2d(4, 2, 3, stride=0), ValueError, "stride: expected at least 1"),
    (lambda: bf.VariationalConv2d(4, 2, 3, padding=-1), ValueError, "padding: expected at least 0"),
    (lambda: bf.VariationalConv2d(4, 2, 3, padding="full"), ValueError, "padding: expected one of 'same', 'valid', given 'full'"),
    (lambda: bf.VariationalConv2d(4, 2, 3, 2, padding="same"), ValueError, "stride: expected 1 beside padding='same', given 2"),
    (lambda: bf.VariationalConv2d(4, 2, 3, padding_mode="mirror"), ValueError, "padding_mode: expected one of 'zeros', 'reflect'"),
    (lambda: bf.VariationalConv2d(4, 3, 3, groups=2), ValueError, "out_channels: expected a multiple of groups=2, given 3"),
    (lambda: bf.VariationalConv2d(4, 2, 3, groups=0), ValueError, "groups: expected at least 1, given 0"),
    (lambda: bf.VariationalConv2d(True, 2, 3), TypeError, "in_channels: expected an integer, given bool"),
    (lambda: bf.VariationalConv2d(4, 2, 3, bias="no"), TypeError, "bias: expected True or False"),
    (lambda: bf.VariationalConv2d(4, 2, 3, prior=bf.Normal(t(2, 4), 1.0)), ValueError,
     r"prior.loc: expected a number or a tensor \[2, 4, 3, 3\]"),
    (lambda: bf.VariationalConv2d(4, 2, 3, init="he"), ValueError, "init: expected one of"),
    (lambda: bf.VariationalConvTranspose2d(4, 2, 3, padding="same"), TypeError, "padding: expected integers, given 'same'"),
    (lambda: bf.VariationalConvTranspose2d(4, 2, 3, padding_mode="reflect"), ValueError, "padding_mode: expected one of 'zeros'"),
    (lambda: bf.VariationalBilinear(0, 2, 3), ValueError, "in1_features: expected at least 1"),
    (lambda: bf.VariationalLayerNorm(2.0), TypeError, "normalized_shape: expected an integer"),
    (lambda: bf.VariationalLayerNorm(4, eps="small"), TypeError, "eps: expected a number, given str"),
    (lambda: bf.VariationalGroupNorm(3, 4), ValueError, "num_channels: expected a multiple of num_groups=3, given 4"),
    (lambda: bf.VariationalBatchNorm1d(4, momentum="fast"), TypeError, "momentum: expected a number or None"),
    (lambda: bf.VariationalBatchNorm1d(4, affine=None), TypeError, "affine: expected True or False"),
    (lambda: bf.Variational(nn.ReLU()), ValueError, "module: expected one with floating-point parameters, given the class ReLU"),
    (lambda: bf.Variational("linear"), TypeError, "module: expected an nn.Module, given str"),
    (lambda: bf.Variational(nn.Sequential(bf.VariationalLinear(2, 2))), ValueError, "without variational layers, given '0'"),
    (lambda: bf.Variational(nn.LazyLinear(2)), ValueError, "module: expected parameters with shapes, given weight of a lazy module"),
    (lambda: bf.Variational(nn.Linear(2, 2, dtype=torch.complex64)), TypeError, "module: expected real parameters, given weight"),
    (lambda: bf.Variational(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))), ValueError,
     "module: expected its parameters on one device, given cpu, meta"),
    (lambda: bf.Variational(nn.Linear(2, 2), init_sigma=None), TypeError, "init_sigma: expected a positive number, given None"),
]


def refused(layer, inputs, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        layer(*inputs)
    assert torch.equal(torch.get_rng_state(), state)   # nothing was drawn


@pytest.mark.parametrize("layer, inputs, error, message", CALLS)
def test_inputs(layer, inputs, error, message):
    refused(layer, inputs, error, message)
    with bf.sampling(layer, mean=True):
        refused(layer, inputs, error, message)


@pytest.mark.parametrize("layer, inputs, message", SEVERAL)
def test_inputs_of_several_samples(layer, inputs, message):
    with bf.sampling(layer, 2):
        refused(layer, inputs, ValueError, message)


@pytest.mark.parametrize("make, error, message", CONSTRUCTORS)
def test_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
