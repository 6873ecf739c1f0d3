"""The Llama family in the exact tier: losses and adapters' gradients whose bits no machine can change."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.exact import attention, linear, ops
from nf4.exact.head import Inputs, head, inputs_of
from nf4.exact.linear import LinearCache
from nf4.exact.tables import rotation
from nf4.lora import Dropout, Workspace
from nf4.model.llama import EMBEDDING, FINAL_NORM, HEAD, TARGETS, Batch, Llama

Float32 = NDArray[np.float32]
Trace = Callable[[str, NDArray[Any]], None]
"""Is shown every intermediate under its name of NF4-15.4, as it is made; the array is written over later."""


@dataclass
class _Kept:
    """The activations of a layer that its backward needs; the cheap ones are computed again."""

    x: Float32  # [T, hidden], the layer's input
    rstd: Float32  # [T, 1]
    q: Float32  # rotated, [T, heads * dim]
    k: Float32
    v: Float32
    raw: dict[
        str, tuple[Float32, Float32]
    ]  # q and k before their norms, and 1 / rms, where there are such norms
    mixed: Float32  # attention's output, [T, heads * dim]
    middle: Float32  # after attention's residual, [T, hidden]
    middle_rstd: Float32
    gate: Float32  # [T, intermediate]
    up: Float32
    lora: dict[str, LinearCache]


@dataclass
class _Call:
    """What one pass over a batch shares between layers."""

    space: Workspace
    lengths: tuple[int, ...]
    cos: Float32  # [T, head_dim / 2]
    sin: Float32
    dropout: Dropout | None
    trace: Trace

    def show(self, prefix: str = "", **arrays: Float32) -> None:
        """Show arrays under these names."""
        for name, array in arrays.items():
            self.trace(f"{prefix}{name}", array)


def silent(name: str, array: NDArray[Any]) -> None:
    """Look at nothing."""


def embed(table: NDArray[Any], ids: NDArray[np.int32]) -> Float32:
    """The rows of the tokens, widened: float32 [T, hidden]."""
    rows: Float32 = table[ids].astype(np.float32, copy=False)
    return rows


def gradients(params: Mapping[str, NDArray[Any]], sequences: int) -> dict[str, Float32]:
    """Memory for the gradients of params by sequence: float32 [sequences, ...] by name."""
    return {name: np.empty((sequences, *p.shape), np.float32) for name, p in params.items()}


@dataclass(frozen=True)
class Rooms:
    """What a model computes with: the modules of this package, or those that mirror them on a device."""

    ops: Any
    linear: Any
    attention: Any
    inputs_of: Callable[[Batch], Any]
    embed: Callable[..., Any]
    head: Callable[..., Any]
    gradients: Callable[..., Any]
    rotation: Callable[..., Any]
    workspace: Callable[[], Any]


HOST = Rooms(ops, linear, attention, inputs_of, embed, head, gradients, rotation, Workspace)


class ExactLlama:
    """A model of the Llama family with adapters, of the parameters of nf4.model.llama.Llama (NF4-15.4).

    Sequences are independent of one another: how they are packed into batches can't be seen in any result.
    """

    def __init__(self, model: Llama, rooms: Rooms = HOST) -> None:
        self.model, self.config, self._rooms = model, model.config, rooms
        self._spaces: list[Workspace] = []  # not in use; a step's memory serves the next

    def losses(self, batch: Batch) -> Float32:
        """The loss of every row, float32 [T], +0 where there is no target; nothing is dropped (NF4-15.5)."""
        with self._call(batch, None, silent) as call:
            inputs = self._rooms.inputs_of(batch)
            x = self._embed(inputs)
            for index in range(self.config.num_hidden_layers):
                x, _ = self._forward(index, x, call, keep=False)
            return self._head(x, inputs, None, call)[0]

    def losses_and_gradients(
        self, batch: Batch, *, scale: float, checkpointing: bool, seed: int, trace: Trace = silent
    ) -> tuple[Float32, dict[str, Float32]]:
        """The losses of rows [T], and each sequence's gradient of scale times their sum (NF4-15.4, NF4-15.5).

        The gradients are [sequences, ...] by the names of Llama.trainable. checkpointing: keep only each
        layer's input and compute the rest again in backward, to the same bits. seed keys the dropout. Raises
        InputError where something on the way is not finite.
        """
        with self._call(batch, Dropout(seed, batch.lengths, batch.samples), trace) as call:
            return self._losses_and_gradients(self._rooms.inputs_of(batch), scale, checkpointing, call)

    def _losses_and_gradients(
        self, inputs: Inputs, scale: float, checkpointing: bool, call: _Call
    ) -> tuple[Float32, dict[str, Float32]]:
        bottom, count = self.model.lowest_adapted, self.config.num_hidden_layers
        x = self._embed(inputs)
        call.show(x=x)
        kept_inputs: list[Float32] = []
        kept: list[_Kept] = []
        for index in range(count):
            if index >= bottom and checkpointing:
                kept_inputs.append(x)
            x, activations = self._forward(index, x, call, keep=index >= bottom and not checkpointing)
            if activations is not None:
                kept.append(activations)
        losses, dx = self._head(x, inputs, scale, call)
        assert dx is not None
        gradients: dict[str, Float32] = self._rooms.gradients(self.model.trainable("lora"), len(call.lengths))
        for index in reversed(range(bottom, count)):
            if checkpointing:
                _, activations = self._forward(index, kept_inputs.pop(), call, keep=True, need_y=False)
            else:
                activations = kept.pop()
            assert activations is not None
            self._backward(index, dx, activations, call, gradients, index == bottom)
        return losses, gradients

    @contextmanager
    def _call(self, batch: Batch, dropout: Dropout | None, trace: Trace) -> Iterator[_Call]:
        self.model.check_batch(batch.ids, batch.targets, batch.lengths)
        cos, sin = self._rooms.rotation(self.config, batch.lengths)
        try:
            space = self._spaces.pop()
        except IndexError:
            space = self._rooms.workspace()
        call = _Call(space, batch.lengths, cos, sin, dropout, trace)
        call.show(cos=cos, sin=sin)
        yield call
        self._spaces.append(space)

    def _embed(self, inputs: Inputs) -> Float32:
        rows: Float32 = self._rooms.embed(self.model.vector(EMBEDDING), inputs.ids)
        return rows

    def _head(
        self, x: Float32, inputs: Inputs, scale: float | None, call: _Call
    ) -> tuple[Float32, Float32 | None]:
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        norm, eps = self.model.vector(FINAL_NORM), self.config.rms_norm_eps
        found: tuple[Float32, Float32 | None] = self._rooms.head(
            x, norm, eps, self.model.params[name], inputs, scale, call.space, call.trace
        )
        return found

    def _forward(
        self, index: int, x: Float32, call: _Call, keep: bool, need_y: bool = True
    ) -> tuple[Float32, _Kept | None]:
        """One layer: x [T, hidden] -> its output (or x unless need_y), and if `keep`, what backward needs."""
        config, space, rooms = self.config, call.space, self._rooms
        layer = self.model.layers[index]
        lora: dict[str, LinearCache] = {}
        own = str(index) if keep and need_y else ""

        def linears(targets: tuple[str, ...], shared: Float32, names: tuple[str, ...]) -> list[Float32]:
            modules = [layer.linears[target] for target in targets]
            outs = [
                space.take(name, (len(shared), module.weight.shape[0]), np.float32)
                for name, module in zip(names, modules, strict=True)
            ]
            found = rooms.linear.forward(modules, shared, call.dropout, outs, space)
            lora.update(zip(targets, found, strict=True))
            return outs

        def show(**arrays: Float32) -> None:
            if need_y:  # what is computed again has been shown
                call.show(f"{index}.", **arrays)

        normed = space.take("normed", x.shape, np.float32)
        _, rstd = rooms.ops.rms_norm(x, layer.input_norm, config.rms_norm_eps, normed)
        q, k, v = linears(TARGETS[:3], normed, tuple(f"{c}{own}" for c in "qkv"))
        show(normed1=normed, q=q, k=k, v=v)
        raw: dict[str, tuple[Float32, Float32]] = {}
        if layer.q_norm is not None and layer.k_norm is not None:
            by_head = (-1, config.head_dim)
            normed_q, q_rstd = rooms.ops.rms_norm(q.reshape(by_head), layer.q_norm, config.rms_norm_eps)
            normed_k, k_rstd = rooms.ops.rms_norm(k.reshape(by_head), layer.k_norm, config.rms_norm_eps)
            raw = {"q": (q.reshape(by_head), q_rstd), "k": (k.reshape(by_head), k_rstd)}
            q, k = normed_q.reshape(q.shape), normed_k.reshape(k.shape)
            show(q_normed=q, k_normed=k)
        rooms.ops.rotate(q, call.cos, call.sin)
        rooms.ops.rotate(k, call.cos, call.sin)
        show(q_turned=q, k_turned=k)
        mixed = space.take(f"mixed{own}", q.shape, np.float32)
        rooms.attention.attend(q, k, v, call.lengths, self.model.heads, layer.window, space, mixed)
        (middle,) = linears(("o_proj",), mixed, (f"middle{own}",))
        rooms.ops.add(middle, x)
        show(mixed=mixed, middle=middle)

        _, middle_rstd = rooms.ops.rms_norm(middle, layer.post_norm, config.rms_norm_eps, normed)
        gate, up = linears(("gate_proj", "up_proj"), normed, (f"gate{own}", f"up{own}"))
        act = rooms.ops.swiglu(gate, up, space.take("act", gate.shape, np.float32))
        show(normed2=normed, gate=gate, up=up, act=act)
        y = x
        if need_y:
            y = space.new(x.shape, np.float32)
            down = layer.linears["down_proj"]
            (lora["down_proj"],) = rooms.linear.forward([down], act, call.dropout, [y], space)
            rooms.ops.add(y, middle)
            show(y=y)
        else:
            lora["down_proj"] = rooms.linear.project(
                layer.linears["down_proj"], act, None, call.dropout, space
            )
        if not keep:
            return y, None
        return y, _Kept(x, rstd, q, k, v, raw, mixed, middle, middle_rstd, gate, up, lora)

    def _backward(
        self,
        index: int,
        dy: Float32,
        kept: _Kept,
        call: _Call,
        gradients: dict[str, Float32],
        is_bottom: bool,
    ) -> None:
        """One layer's gradients, and its input's over dy [T, hidden]; consumes `kept`.

        is_bottom: nothing below has anything to train, so what only serves the input's gradient is left out.
        """
        config, space, rooms = self.config, call.space, self._rooms
        layer = self.model.layers[index]

        def linears(
            targets: tuple[str, ...], douts: tuple[Float32, ...], shared: Float32, need_dx: bool = True
        ) -> Float32 | None:
            modules = [layer.linears[target] for target in targets]
            names = [layer.names(target) for target in targets]
            dx: Float32 | None = rooms.linear.backward(
                modules,
                douts,
                [kept.lora[target] for target in targets],
                shared,
                call.dropout,
                call.lengths,
                space,
                [tuple(gradients.get(f"{name}.lora_{side}.weight") for side in "AB") for name in names],
                need_dx,
            )
            return dx

        def show(**arrays: Float32) -> None:
            call.show(f"{index}.", **arrays)

        show(dy=dy)
        attention_trains = not is_bottom or layer.adapted(TARGETS[:4])
        act = rooms.ops.swiglu(kept.gate, kept.up, space.take("act", kept.gate.shape, np.float32))
        dact = linears(
            ("down_proj",), (dy,), act, attention_trains or layer.adapted(("gate_proj", "up_proj"))
        )
        if dact is None:
            return
        rooms.ops.swiglu_backward(dact, kept.gate, kept.up)  # kept.gate and kept.up now hold their gradients
        show(dact=dact, dgate=kept.gate, dup=kept.up)
        normed = space.take("normed", dy.shape, np.float32)
        rooms.ops.rms_scale(kept.middle, layer.post_norm, kept.middle_rstd, normed)
        dnormed = linears(("gate_proj", "up_proj"), (kept.gate, kept.up), normed, attention_trains)
        if dnormed is None:
            return
        show(dnormed2=dnormed)
        rooms.ops.rms_norm_backward(dnormed, kept.middle, layer.post_norm, kept.middle_rstd)
        rooms.ops.add(dy, dnormed)
        show(dmiddle=dy)

        dmixed = linears(("o_proj",), (dy,), kept.mixed, not is_bottom or layer.adapted(TARGETS[:3]))
        if dmixed is None:
            return
        dq, dk, dv = rooms.attention.attend_backward(
            dmixed, kept.q, kept.k, kept.v, call.lengths, self.model.heads, layer.window, space
        )
        show(dmixed=dmixed, dq_turned=dq, dk_turned=dk, dv=dv)
        rooms.ops.rotate(dq, call.cos, call.sin, inverse=True)
        rooms.ops.rotate(dk, call.cos, call.sin, inverse=True)
        if layer.q_norm is not None and layer.k_norm is not None:
            show(dq_normed=dq, dk_normed=dk)
            by_head = (-1, config.head_dim)
            dq = rooms.ops.rms_norm_backward(
                dq.reshape(by_head), kept.raw["q"][0], layer.q_norm, kept.raw["q"][1]
            )
            dk = rooms.ops.rms_norm_backward(
                dk.reshape(by_head), kept.raw["k"][0], layer.k_norm, kept.raw["k"][1]
            )
            dq, dk = dq.reshape(kept.q.shape), dk.reshape(kept.k.shape)
        show(dq=dq, dk=dk)
        rooms.ops.rms_scale(kept.x, layer.input_norm, kept.rstd, normed)
        dnormed = linears(TARGETS[:3], (dq, dk, dv), normed, not is_bottom)
        if dnormed is not None:
            show(dnormed1=dnormed)
            rooms.ops.rms_norm_backward(dnormed, kept.x, layer.input_norm, kept.rstd)
            rooms.ops.add(dy, dnormed)
