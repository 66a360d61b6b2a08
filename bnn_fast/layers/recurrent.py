"""The variational counterparts of torch's recurrent modules: one draw for a whole sequence."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, _VF, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .. import checks
from ..operators import functional
from ..priors import Normal
from .counterpart import Counterpart


class _Recurrent(Counterpart):
    """What whole sequences and single steps have in common."""

    def _fan_in(self, module: nn.Module) -> int:
        return 6 * module.hidden_size   # N(0, 2 / fan_in) has the variance of torch's own U(-1 / sqrt(hidden), 1 / sqrt(hidden))

    def _check_features(self, x: Tensor, dimensions: tuple[int, ...]) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"input: expected a tensor [..., {self.input_size}] (input_size), given {checks.describe(x)}")
        if x.dim() not in dimensions or x.shape[-1] != self.input_size:
            raise ValueError(f"input: expected {' or '.join(map(str, dimensions))} dimensions, the last of {self.input_size} "
                             f"(input_size), given {checks.describe(x)}")
        self._check("input", x)

    def _check_states(self, hx, shapes: list[list[int]], x: Tensor) -> None:
        """hx, if it is given, is one tensor, or a tuple of more, of these shapes, with x's dtype and device."""
        if hx is None:
            return
        states = (hx,) if len(shapes) == 1 else hx
        if not isinstance(states, (tuple, list)) or len(states) != len(shapes):
            raise TypeError(f"hx: expected a tuple (h, c), given {checks.describe(hx)}")
        for state, shape in zip(states, shapes):
            if not isinstance(state, Tensor):
                raise TypeError(f"hx: expected a tensor {shape}, given {checks.describe(state)}")
            if list(state.shape) != shape:
                raise ValueError(f"hx: expected {shape}, given {checks.describe(state)}")
            if state.dtype != x.dtype and not functional.autocasting(x):
                raise TypeError(f"hx: expected {x.dtype} as the input has, given {checks.describe(state)}")
            if state.device != x.device:
                raise ValueError(f"hx: expected to be on {x.device} as the input is, given {checks.describe(state)}")

    def _in_dtype(self, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
        return list(weights.values()) if functional.autocasting(x) else [w.to(x.dtype) for w in weights.values()]


class _Sequence(_Recurrent):
    """Counterpart of nn.RNNBase."""
    cell_state = False
    no_settings = ("_flat_weights", "_flat_weight_refs", "_all_weights")

    def __init__(self, arguments: dict, **options):
        for name in ("input_size", "hidden_size", "num_layers"):
            arguments[name] = checks.positive_int(name, arguments[name])
        checks.flags(**{name: arguments[name] for name in ("bias", "batch_first", "bidirectional")})
        super().__init__(arguments, **options)

    def forward(self, input: Tensor | PackedSequence, hx=None):
        return super().forward(input, hx)

    def check(self, n_samples: int, input: Tensor | PackedSequence, hx=None) -> None:
        if isinstance(input, PackedSequence):
            x = input.data
            self._check_features(x, (2,))
            batch = [int(input.batch_sizes[0])]
        else:
            x = input
            self._check_features(x, (2, 3))
            batch = [x.shape[0 if self.batch_first else 1]] if x.dim() == 3 else []
        rows = batch[0] if batch else 1
        if n_samples > 1 and (rows % n_samples or (isinstance(input, Tensor) and input.dim() == 2)):
            place = "a packed batch" if isinstance(input, PackedSequence) else f"dimension {0 if self.batch_first else 1}"
            raise ValueError(f"input: expected {place} to be the batch repeated n_samples={n_samples} times, "
                             f"given {checks.describe(input)} with {rows} sequences; see mc_forward")
        layers = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [getattr(self, "proj_size", 0) or self.hidden_size, self.hidden_size]
        self._check_states(hx, [[layers, *batch, size] for size in sizes[:2 if self.cell_state else 1]], x)

    def compute(self, weights: dict[str, Tensor], input: Tensor | PackedSequence, hx=None):
        module = copy.copy(self._described[0])  # its forward is to have the drawn weights, in this call alone
        module.__dict__.update({name: getattr(self, name) for name in self._settings}, training=self.training, _flat_weights=(
            self._in_dtype(weights, input.data if isinstance(input, PackedSequence) else input)))
        return type(module).forward(module, input, hx)

    def compute_samples(self, weights: dict[str, Tensor], n_samples: int, input: Tensor | PackedSequence, hx=None):
        """Sample by sample; the samples are along the batch: dimension 0 of the input with batch_first, else 1, and 1 of states."""
        packed, lengths = isinstance(input, PackedSequence), None
        if packed:
            input, lengths = pad_packed_sequence(input, self.batch_first)
        at = 0 if self.batch_first else 1
        states = [None] * n_samples if hx is None else _split_states(hx, n_samples)
        outputs, finals = [], []
        for s, part in enumerate(input.chunk(n_samples, at)):
            if packed:
                part = pack_padded_sequence(part, lengths.chunk(n_samples)[s], self.batch_first, enforce_sorted=False)
            output, final = self.compute({name: w[s] for name, w in weights.items()}, part, states[s])
            outputs.append(pad_packed_sequence(output, self.batch_first, total_length=input.shape[1 - at])[0] if packed else output)
            finals.append(final)
        output = torch.cat(outputs, at)
        if packed:
            output = pack_padded_sequence(output, lengths, self.batch_first, enforce_sorted=False)
        return output, (tuple(torch.cat(each, 1) for each in zip(*finals)) if isinstance(finals[0], tuple) else torch.cat(finals, 1))


def _split_states(hx, n_samples: int) -> list:
    if isinstance(hx, Tensor):
        return list(hx.chunk(n_samples, 1))
    return list(zip(*(state.chunk(n_samples, 1) for state in hx)))


_SEQUENCE = """{line}, with weights drawn at every call, one draw for the whole sequence.

    Arguments, inputs and outputs: those of nn.{name}, packed sequences and states among them; then the keyword arguments of
    VariationalLinear. Priors of tensors have a weight's shape, and so are set by name: `layer.set_prior("weight_ih_l0", ...)`.

    Under `sampling` with several samples the batch is the samples', sample-major: dimension 0 of the input with batch_first, else
    dimension 1, and 1 of the states. `mc_forward`, `predict` and `ELBO` repeat dimension 0; with time first they need vectorized=False.

    Raises ValueError or TypeError where an argument does not fit, or input or states have another shape, dtype or device, or, with
    several samples, no batch that they divide. As with torch's own, torch.compile leaves the call to eager mode.
    """


class VariationalRNN(_Sequence):
    __doc__ = _SEQUENCE.format(line="Elman recurrence, h_t = tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)", name="RNN")
    ordinary = nn.RNN

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        checks.choice("nonlinearity", nonlinearity, {"tanh": 0, "relu": 1})
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, nonlinearity=nonlinearity,
                              bias=bias, batch_first=batch_first, dropout=dropout, bidirectional=bidirectional),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)


class VariationalLSTM(_Sequence):
    __doc__ = _SEQUENCE.format(line="Long short-term memory (Hochreiter and Schmidhuber 1997)", name="LSTM")
    ordinary = nn.LSTM
    cell_state = True

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
                              batch_first=batch_first, dropout=dropout, bidirectional=bidirectional,
                              proj_size=checks.integer("proj_size", proj_size, 0)),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)


class VariationalGRU(_Sequence):
    __doc__ = _SEQUENCE.format(line="Gated recurrent unit (Cho et al. 2014)", name="GRU")
    ordinary = nn.GRU

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
                 dropout: float = 0.0, bidirectional: bool = False, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, num_layers=num_layers, bias=bias,
                              batch_first=batch_first, dropout=dropout, bidirectional=bidirectional),
                         prior=prior, bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device,
                         dtype=dtype)


class _Cell(_Recurrent):
    """Counterpart of nn.RNNCellBase: `step` is the operator, `states` how many tensors a state has."""
    states = 1

    def __init__(self, arguments: dict, **options):
        for name in ("input_size", "hidden_size"):
            arguments[name] = checks.positive_int(name, arguments[name])
        checks.flags(bias=arguments["bias"])
        super().__init__(arguments, **options)

    def forward(self, input: Tensor, hx=None):
        return super().forward(input, hx)

    def check(self, n_samples: int, input: Tensor, hx=None) -> None:
        self._check_features(input, (1, 2))
        self._check_states(hx, [[*input.shape[:-1], self.hidden_size]] * self.states, input)
        if n_samples > 1:
            checks.repeated("input", input, n_samples, 1)

    def compute(self, weights: dict[str, Tensor], input: Tensor, hx=None):
        states = [input.new_zeros(*input.shape[:-1], self.hidden_size)] * self.states if hx is None else (
            [hx] if self.states == 1 else list(hx))
        alone = input.dim() == 1
        if alone:
            input, states = input.unsqueeze(0), [state.unsqueeze(0) for state in states]
        found = self.step()(input, states[0] if self.states == 1 else states, *self._in_dtype(weights, input))
        if not alone:
            return found
        return found.squeeze(0) if self.states == 1 else tuple(state.squeeze(0) for state in found)

    def step(self):
        raise NotImplementedError


_CELL = """One step of a {name}, with weights drawn at every call: in a loop over time draw once for it by
    `with bnn_fast.sampling(model, pinned=True):`.

    Arguments, input [B, in] or [in], and states: those of nn.{name}Cell; then the keyword arguments of VariationalLinear.

    Raises ValueError or TypeError where an argument does not fit, or input or state have another shape, dtype or device.
    """


class VariationalRNNCell(_Cell):
    __doc__ = _CELL.format(name="RNN")
    ordinary = nn.RNNCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        checks.choice("nonlinearity", nonlinearity, {"tanh": 0, "relu": 1})
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, bias=bias, nonlinearity=nonlinearity), prior=prior,
                         bias_prior=bias_prior, scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device, dtype=dtype)

    def step(self):
        return _VF.rnn_tanh_cell if self.nonlinearity == "tanh" else _VF.rnn_relu_cell


class VariationalLSTMCell(_Cell):
    __doc__ = _CELL.format(name="LSTM")
    ordinary = nn.LSTMCell
    states = 2

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, bias=bias), prior=prior, bias_prior=bias_prior,
                         scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device, dtype=dtype)

    def step(self):
        return _VF.lstm_cell


class VariationalGRUCell(_Cell):
    __doc__ = _CELL.format(name="GRU")
    ordinary = nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, *,
                 prior: Normal = Normal(0.0, 1.0), bias_prior: Normal | None = None, scale: str = "softplus", kl: str = "analytic",
                 init: str = "default", init_sigma: float | None = None, device=None, dtype=None):
        super().__init__(dict(input_size=input_size, hidden_size=hidden_size, bias=bias), prior=prior, bias_prior=bias_prior,
                         scale=scale, kl=kl, init=init, init_sigma=init_sigma, device=device, dtype=dtype)

    def step(self):
        return _VF.gru_cell
