"""Token exchange of an expert group: rows go to the devices of their experts and come back.

For use inside `sharding.per_device`. A device has room for `ROOM` times the even share of the rows
of each other; what is beyond goes in further rounds, as many as it takes, so nothing is dropped and
memory does not grow with the worst case. TPUs and GPUs send just the rows there are
(`ragged_all_to_all`); other backends and v5e, which lack it, send the room as well. Letters: M rows
of this device in the order of their destination, n devices, S slots for the rows of one device,
R = n S.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import hardware

AXIS = "expert"
# Of M / n rows that a device sends another on average. A second round computes only what is left,
# but waits for the exchange once more.
ROOM = 2


class Plan(NamedTuple):
    """How many rows go to and come from each device of the group."""

    send_n: jax.Array
    receive_n: jax.Array


def plan(send_n) -> Plan:
    """Tell each device how many rows to expect."""
    return Plan(send_n, lax.all_to_all(send_n, AXIS, 0, 0, tiled=True))


def slots(num_rows: int, devices: int) -> int:
    """S: rows of one device that another has room for in one round."""
    return min(num_rows, -(-ROOM * num_rows // devices))


def of_round(i, all_n, order_M, slots: int):
    """Which rows a device sends in a round, and how many of them to each.

    Args:
      i: number of the round, from 0.
      all_n: rows for each device in all rounds.
      order_M: rows by destination; those beyond the sum of all_n go nowhere.

    Returns:
      row_P, send_n: of the P = min(M, n S) rows of a round the first send_n.sum() are sent, those
      for device 0 first; for the others row_P is M.
    """
    n, num_rows = len(all_n), len(order_M)
    send_n = jnp.clip(all_n - i * slots, 0, slots)
    place_P, end_n = jnp.arange(min(num_rows, n * slots)), jnp.cumsum(send_n)
    to_P = jnp.searchsorted(end_n, place_P, side="right", method="compare_all")
    first_n = _starts(all_n) + i * slots - (end_n - send_n)
    from_P = place_P + first_n[jnp.minimum(to_P, n - 1)]
    row_P = order_M[jnp.minimum(from_P, num_rows - 1)]
    return jnp.where(to_P < n, row_P, num_rows), send_n


def sum_of_rounds(f, count, args):
    """f(0, args) + ... + f(count - 1, args), at least the first.

    The first is differentiated as everything else is; the others, which are few or none, are
    computed again for the gradient, since JAX has none of a loop of unknown length.

    Args:
      f: (round, args) -> an array; its shape is that of all rounds.
      count: int32, the same on all devices that f makes exchange anything.
      args: arrays, of which those of numbers with a fraction have gradients.
    """
    leaves, tree = jax.tree.flatten(args)
    has_gradient = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

    def call(i, inexact, exact):
        sources = {True: iter(inexact), False: iter(exact)}
        return f(i, tree.unflatten([next(sources[has]) for has in has_gradient]))

    def add_others(first, one, count):
        """One after another onto the first round's."""

        def body(carry):
            i, total = carry
            return i + 1, jax.tree.map(jnp.add, total, one(i))

        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(1), first))[1]

    @jax.custom_vjp
    def run(count, inexact, exact):
        return add_others(call(0, inexact, exact), lambda i: call(i, inexact, exact), count)

    def forward(count, inexact, exact):
        first, pull = jax.vjp(lambda inexact: call(0, inexact, exact), inexact)
        y = add_others(first, lambda i: call(i, inexact, exact), count)
        return y, (pull, count, inexact, exact)

    def backward(saved, dy):
        pull, count, inexact, exact = saved

        def one(i):
            return jax.vjp(lambda inexact: call(i, inexact, exact), inexact)[1](dy)[0]

        return None, add_others(pull(dy)[0], one, count), None

    run.defvjp(forward, backward)
    inexact = [x for x, has in zip(leaves, has_gradient, strict=True) if has]
    exact = [x for x, has in zip(leaves, has_gradient, strict=True) if not has]
    return run(count, inexact, exact)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows_MD, plan: Plan, slots: int):
    """Rows to their devices: [R, D], those of device j from j S on, zeros where none came.

    Args:
      rows_MD: first the plan.send_n[0] rows for device 0, then those for device 1, ...
      slots: S, at least what any device sends to another.
    """
    ragged, padded = (functools.partial(f, slots=slots) for f in (_send_ragged, _send_padded))
    return lax.platform_dependent(
        rows_MD, plan, tpu=ragged if _tpu_sends_ragged() else padded, cuda=ragged, default=padded
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bring_back(rows_RD, plan: Plan, num_rows: int):
    """The opposite of `send`: [M, D] in the order in which rows were sent; M = num_rows."""
    ragged, padded = (functools.partial(f, num_rows=num_rows) for f in (_back_ragged, _back_padded))
    return lax.platform_dependent(
        rows_RD, plan, tpu=ragged if _tpu_sends_ragged() else padded, cuda=ragged, default=padded
    )


def _tpu_sends_ragged() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or hardware.sends_ragged(device.device_kind)


# Each is a partial permutation of rows and the other its inverse, hence also its transpose.
def _send_fwd(rows_MD, plan, slots):
    return send(rows_MD, plan, slots), (plan, len(rows_MD))


def _send_bwd(slots, saved, d_RD):
    plan, num_rows = saved
    return bring_back(d_RD, plan, num_rows), None


def _back_fwd(rows_RD, plan, num_rows):
    return bring_back(rows_RD, plan, num_rows), (plan, len(rows_RD))


def _back_bwd(num_rows, saved, d_MD):
    plan, rows = saved
    return send(d_MD, plan, rows // len(plan.send_n)), None


send.defvjp(_send_fwd, _send_bwd)
bring_back.defvjp(_back_fwd, _back_bwd)


def _starts(sizes_n):
    return jnp.cumsum(sizes_n) - sizes_n


def _send_padded(rows_MD, plan, *, slots):
    place_S = jnp.arange(slots)
    row_nS = _starts(plan.send_n)[:, None] + place_S
    row_nS = jnp.where(place_S < plan.send_n[:, None], row_nS, len(rows_MD))
    rows_nSD = rows_MD.at[row_nS].get(mode="fill", fill_value=0)
    rows_nSD = lax.all_to_all(rows_nSD, AXIS, 0, 0, tiled=True)
    return rows_nSD.reshape(-1, rows_MD.shape[1])


def _back_padded(rows_RD, plan, *, num_rows):
    n = len(plan.send_n)
    slots = len(rows_RD) // n
    rows_nSD = lax.all_to_all(rows_RD.reshape(n, slots, -1), AXIS, 0, 0, tiled=True)
    row_M, end_n = jnp.arange(num_rows), jnp.cumsum(plan.send_n)
    to_M = jnp.searchsorted(end_n, row_M, side="right", method="compare_all")
    slot_M = to_M * slots + row_M - _starts(plan.send_n)[jnp.minimum(to_M, n - 1)]
    slot_M = jnp.where(to_M < n, slot_M, len(rows_RD))
    return rows_nSD.reshape(len(rows_RD), -1).at[slot_M].get(mode="fill", fill_value=0)


def _send_ragged(rows_MD, plan, *, slots):
    n = len(plan.send_n)
    mine = jnp.full((n,), lax.axis_index(AXIS) * slots, jnp.int32)
    room_RD = jnp.zeros((n * slots, rows_MD.shape[1]), rows_MD.dtype)
    starts_n = _starts(plan.send_n)
    return lax.ragged_all_to_all(
        rows_MD, room_RD, starts_n, plan.send_n, mine, plan.receive_n, axis_name=AXIS
    )


def _back_ragged(rows_RD, plan, *, num_rows):
    n = len(plan.send_n)
    room_MD = jnp.zeros((num_rows, rows_RD.shape[1]), rows_RD.dtype)
    # Where the rows of each device start in the list it sent them from: it has to say so.
    theirs_n = lax.all_to_all(_starts(plan.send_n), AXIS, 0, 0, tiled=True)
    starts_n = jnp.arange(n, dtype=jnp.int32) * (len(rows_RD) // n)
    return lax.ragged_all_to_all(
        rows_RD, room_MD, starts_n, plan.receive_n, theirs_n, plan.send_n, axis_name=AXIS
    )
