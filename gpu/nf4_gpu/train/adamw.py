"""AdamW on the device: states stay there within a budget, and else with the host (NF4-10)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from nf4.errors import InputError
from nf4.floats import FLOAT32
from nf4.train.adamw import AdamW
from numpy.typing import NDArray

from nf4_gpu.arena import Arena, round_up
from nf4_gpu.device import IN, MAIN, OUT, Device, Mark

SOURCE = "train/adamw.cu"
PARTS, THREADS = 1024, 256  # of the sum of squares: as there
_SCALARS = np.dtype(
    [(name, "<f4") for name in ("rest1", "beta2", "rest2", "eps", "decay", "step", "root", "loss_scale")]
    + [("max_norm", "<f8")]
)
_OUTCOME = np.dtype([("loss", "<f8"), ("norm", "<f8"), ("factor", "<f4"), ("made", "<i4")])
_LARGEST, _SHARES = 1 << 20, 16  # parameters whose states are moved at a time: a share of all, up to so many
_TURNS = 3  # places on the device that paged segments take turns in
STATE_BYTES = 8  # a parameter


class Optimizer:
    """States of all parameters: those of the first `resident` segments are on the device, others paged.

    Segments that are paged lie in pinned host memory, and go through a few places of the device: copied in
    while gradients are still made, updated, copied out, all asynchronously. What is computed is the same.
    """

    def __init__(self, arena: Arena, count: int, budget: int | None) -> None:
        self.count = count
        segment = _segment(count)
        self.segments = [(i, min(segment, count - i)) for i in range(0, count, segment)]
        self.resident, self.turns = split(count, budget)
        self._memory = arena.take("states", STATE_BYTES * sum(n for _, n in self.segments[: self.resident]))
        self._places = [arena.take("states", STATE_BYTES * segment) for _ in range(self.turns)]
        self._scalars = arena.take("buffers", _SCALARS.itemsize)
        self._outcome = arena.take("buffers", _OUTCOME.itemsize)
        self._parts = arena.take("buffers", 8 * PARTS)
        self.loss = self._outcome
        self.loss_scale = self._scalars + _SCALARS.fields["loss_scale"][1] if _SCALARS.fields else 0

    def load(self, device: Device, parameters: int, gradients: int, kind: int) -> None:
        """Take memory of the host. parameters, gradients: addresses; kind: the parameters' DTYPE."""
        self._device, self._parameters, self._gradients, self._kind = device, parameters, gradients, kind
        self._paged = [device.allocate_pinned(STATE_BYTES * n) for _, n in self.segments[self.resident :]]
        self._host_scalars = device.allocate_pinned(_SCALARS.itemsize).view(_SCALARS)
        self._host_outcome = device.allocate_pinned(_OUTCOME.itemsize).view(_OUTCOME)
        self._ready: list[Mark] = []

    def begin(self, scalars: NDArray[Any]) -> None:
        """Launch what precedes the gradients of an update: its scalars, zeros, the first paged states."""
        device = self._device
        self._host_scalars[0] = scalars
        device.copy(self._scalars, self._host_scalars.ctypes.data, _SCALARS.itemsize)
        device.fill(self._outcome, 0, _OUTCOME.itemsize)
        device.fill(self._gradients, 0, 4 * self.count)
        start = device.mark()
        self._ready = []
        with device.on(IN):
            device.wait(start)
            for turn in range(min(self.turns, len(self._paged))):
                self._copy_in(turn)
                self._ready.append(device.mark())

    def update(self) -> None:
        """Launch the update from the gradients; what `begin` copied is waited for by the caller."""
        device, n = self._device, self.count
        device.launch(
            SOURCE, "sum_squares", (PARTS,), THREADS, (self._gradients, n, self._parts), DTYPE=self._kind
        )
        device.launch(
            SOURCE,
            "finish_norm",
            (1,),
            THREADS,
            (self._parts, self._scalars, self._outcome),
            DTYPE=self._kind,
        )
        at = 0
        for first, size in self.segments[: self.resident]:
            self._launch(first, size, self._memory + at)
            at += STATE_BYTES * size
        if not self._paged:
            return
        start = device.mark()
        for stream in (IN, OUT):
            with device.on(stream):
                device.wait(start)
        arrived: list[Mark | None] = [None] * min(self.turns, len(self._paged))
        for number, (first, size) in enumerate(self.segments[self.resident :]):
            turn = number % self.turns
            mark = arrived[number]
            if mark is not None:
                device.wait(mark)
            self._launch(first, size, self._places[turn])
            updated = device.mark()
            with device.on(OUT):
                device.wait(updated)
                device.copy(self._paged[number].ctypes.data, self._places[turn], STATE_BYTES * size)
                gone = device.mark()
            following = number + self.turns
            if following < len(self._paged):
                with device.on(IN):
                    device.wait(gone)
                    self._copy_in(following)
                    arrived.append(device.mark())
        for stream in (IN, OUT):
            with device.on(stream):
                mark = device.mark()
            device.wait(mark)

    def wait_for_states(self) -> None:
        """Let MAIN wait for the states that `begin` copies."""
        for mark in self._ready:
            self._device.wait(mark)

    def outcome(self) -> tuple[float, float, bool]:
        """Wait for the update; return the sum of the losses, the norm, and whether the update was made."""
        device = self._device
        device.copy(self._host_outcome.ctypes.data, self._outcome, _OUTCOME.itemsize)
        device.synchronize()
        found = self._host_outcome[0]
        return float(found["loss"]), float(found["norm"]), bool(found["made"])

    def store(self, host: AdamW, places: Sequence[tuple[str, int]], steps: int) -> None:
        """Copy parameters and states to the host's; places: names and the elements before each."""
        m, v = self._states()
        for name, at in places:
            array = host.params[name]
            self._get(self._parameters + at * array.itemsize, array)
        split = {name: slice(at, at + host.params[name].size) for name, at in places}
        shapes = {name: host.params[name].shape for name, _ in places}
        host.restore(
            steps,
            {name: m[part].reshape(shapes[name]) for name, part in split.items()},
            {name: v[part].reshape(shapes[name]) for name, part in split.items()},
        )

    def take(self, host: AdamW, places: Sequence[tuple[str, int]]) -> None:
        """Copy the host's parameters and states to their places."""
        m, v = np.zeros(self.count, np.float32), np.zeros(self.count, np.float32)
        for name, at in places:
            array = np.ascontiguousarray(host.params[name])
            self._put(self._parameters + at * array.itemsize, array)
            m[at : at + array.size] = host.m[name].reshape(-1)
            v[at : at + array.size] = host.v[name].reshape(-1)
        at = 0
        for number, (first, size) in enumerate(self.segments):
            both = np.concatenate([m[first : first + size], v[first : first + size]])
            if number < self.resident:
                self._put(self._memory + at, both)
                at += STATE_BYTES * size
            else:
                self._paged[number - self.resident].view(np.float32)[:] = both

    def _states(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        m, v = np.empty(self.count, np.float32), np.empty(self.count, np.float32)
        at = 0
        for number, (first, size) in enumerate(self.segments):
            both = np.empty(2 * size, np.float32)
            if number < self.resident:
                self._get(self._memory + at, both)
                at += STATE_BYTES * size
            else:
                self._device.synchronize()
                both[:] = self._paged[number - self.resident].view(np.float32)
            m[first : first + size], v[first : first + size] = both[:size], both[size:]
        return m, v

    def _copy_in(self, number: int) -> None:
        paged = self._paged[number]
        self._device.copy(self._places[number % self.turns], paged.ctypes.data, paged.nbytes)

    def _launch(self, first: int, size: int, states: int) -> None:
        element = 4 if self._kind == 0 else 2
        self._device.launch(
            SOURCE,
            "adamw",
            (-(-size // THREADS),),
            THREADS,
            (
                self._parameters + first * element, self._gradients + first * 4, states, states + 4 * size,
                size, self._scalars, self._outcome,
            ),
            DTYPE=self._kind,
        )  # fmt: skip

    def _get(self, address: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        with self._device.on(MAIN):
            self._device.copy(array.ctypes.data, address, array.nbytes)
        self._device.synchronize()

    def _put(self, address: int, array: NDArray[Any]) -> None:
        with self._device.on(MAIN):
            self._device.copy(address, array.ctypes.data, array.nbytes)
        self._device.synchronize()


def split(count: int, budget: int | None) -> tuple[int, int]:
    """Return how many segments' states stay on the device within a budget in bytes, and places for others.

    Raises InputError for a budget that has no room for one place.
    """
    size = _segment(count)
    segments = -(-count // size)
    if budget is None or STATE_BYTES * count <= budget:
        return segments, 0
    size *= STATE_BYTES
    if budget < size:
        raise InputError(
            f"--optimizer-budget: {budget / 2**20:.1f} MiB are too few; the states go through the device in "
            f"parts of {size / 2**20:.1f} MiB"
        )
    turns = min(_TURNS, segments, budget // size)
    return min(segments - 1, budget // size - turns), turns


def _segment(count: int) -> int:
    return min(_LARGEST, round_up(-(-count // _SHARES), THREADS))


def scalars(host: AdamW, powers: tuple[float, float], lr: float, loss_scale: float, max_norm: float) -> Any:
    """Return what the kernel needs of an update, in float64 and each rounded once (NF4-10.3)."""
    beta1, beta2 = host.betas
    return np.array(
        (
            FLOAT32.type(1.0 - beta1),
            FLOAT32.type(beta2),
            FLOAT32.type(1.0 - beta2),
            FLOAT32.type(host.eps),
            FLOAT32.type(1.0 - lr * host.weight_decay),
            FLOAT32.type(lr / (1.0 - powers[0])),
            FLOAT32.type(math.sqrt(1.0 - powers[1])),
            FLOAT32.type(loss_scale),
            max_norm,
        ),
        _SCALARS,
    )
