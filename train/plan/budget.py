"""Time, failures, energy, carbon and money of a run, from what others have published.

`facts.toml` holds every number that is not puna's own, with its source and date. Market-based
carbon accounts, embodied carbon and the network between devices are left out on purpose.
"""

import math
import pathlib
import tomllib
from collections.abc import Mapping

from ...configs.errors import UserError
from .figures import Figure

FACTS = pathlib.Path(__file__).with_name("facts.toml")
_LAW = ("floor", "a", "alpha", "b", "beta")
# Numbers of a section, or of each table in it.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "pue": ("value",), "failures": ("interruptions", "days", "devices"),
    "recovery": ("checkpoint_seconds", "restart_seconds"), "grid": (),
}  # fmt: skip
_NUMBERS_OF_EACH = {
    "power": ("watts", "server_watts"), "price": ("dollars_per_hour",), "scaling": _LAW,
    "trained": ("parameters", "tokens"),
}  # fmt: skip
_EXPERTS = ("delta", "gamma", "omega", "zeta", "start", "most")


def read_facts(path: pathlib.Path = FACTS) -> dict:
    """The published numbers.

    Raises:
      UserError: the file is not there, no TOML, or lacks a section or a number of `facts.toml`.
    """
    try:
        facts = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"--facts={path} cannot be read as TOML: {e}") from e
    wanted = {*_NUMBERS, *_NUMBERS_OF_EACH}
    if missing := sorted(wanted - facts.keys()):
        raise UserError(f"--facts={path} must have the sections of {FACTS}; no {missing[0]} there")
    try:
        for section, keys in _NUMBERS.items():
            _check_table(section, facts[section], keys)
        for section, keys in _NUMBERS_OF_EACH.items():
            for name, table in _table(section, facts[section]).items():
                _check_table(f"{section}.{name}", table, keys)
        experts = _table("scaling.experts", facts["scaling"].get("experts"))
        for key in _EXPERTS:
            _check_number("scaling.experts", experts, key, -math.inf)
        for key in facts["grid"].keys() - {"source", "date"}:
            _check_number("grid", facts["grid"], key)
    except UserError as e:
        raise UserError(f"--facts={path}: {e}") from None
    return facts


def _table(name, found) -> dict:
    if not isinstance(found, dict):
        raise UserError(f"{name} must be a table, as in {FACTS}")
    return found


def _check_table(name, found, keys) -> None:
    for key in ("source", "date"):
        if key not in _table(name, found):
            raise UserError(f"{name}.{key} is missing: every number says where it comes from")
    for key in keys:
        _check_number(name, found, key)


def _check_number(name, found, key, above=0.0) -> None:
    value = found.get(key)
    if type(value) not in (int, float) or not above < value < math.inf:
        rule = "a number" if above else "a number above 0"
        raise UserError(f"{name}.{key}={value!r} must be {rule}")


def footprint(device_hours: float, watts: float, pue: float, kg_per_kwh: float):
    """Energy in kWh and carbon in kg CO2e, as Meta's model cards have it (arXiv 2204.05149).

    Args:
      device_hours: of all devices together.
      watts: the most that one device takes.
      pue: energy of the data centre / energy of its computers.
      kg_per_kwh: of the grid.
    """
    kwh = device_hours * watts / 1000 * pue
    return kwh, kwh * kg_per_kwh


def mean_time_between_failures(devices: int, failures: Mapping) -> float:
    """Seconds between interruptions of a run, in inverse proportion to its devices."""
    device_seconds = failures["days"] * 86400 * failures["devices"]
    return device_seconds / failures["interruptions"] / devices


def checkpoint_interval(save: float, mtbf: float) -> float:
    """Seconds of steps between checkpoints that lose the least time (Daly 2006, equation 37).

    Its first term is Young's sqrt(2 * save * mtbf).

    Args:
      save: seconds that a checkpoint stops the run.
      mtbf: mean seconds between failures.
    """
    if save >= 2 * mtbf:
        return mtbf
    x = save / (2 * mtbf)
    return math.sqrt(2 * save * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - save


def goodput(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Share of the time that goes into steps which count (Daly 2006, equation 20).

    Failures come as a Poisson process, during saves and restarts too.
    """
    try:
        wall = mtbf * math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    except OverflowError:  # a failure comes before anything is done
        return 0.0
    return interval / wall


def expected(devices: int, facts: Mapping) -> tuple[float, float, float]:
    """Seconds between failures, best seconds between checkpoints, and the goodput with them."""
    recovery = facts["recovery"]
    save, restart = recovery["checkpoint_seconds"], recovery["restart_seconds"]
    mtbf = mean_time_between_failures(devices, facts["failures"])
    interval = checkpoint_interval(save, mtbf)
    return mtbf, interval, goodput(interval, save, restart, mtbf)


def _check_positive(flag, value):
    if not 0 < value < math.inf:
        raise UserError(f"--{flag}={value:g} must be more than 0")


def _check_mfu(mfu):
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu:g} must be more than 0 and at most 1")


def training(flops_per_token, tokens, mfu, peak, devices, kind, country, facts) -> dict:
    """What training on so many tokens takes.

    Args:
      flops_per_token: model FLOPs.
      tokens: to train on.
      mfu: share of the peak that the steps reach.
      peak: FLOP/s of one device.
      devices: how many.
      kind: of device, as in `hardware.CHIPS`.
      country: a name of the section `grid` of `facts`.

    Returns:
      Figures by name; without energy, carbon or cost where the facts lack the device.

    Raises:
      UserError: a value that cannot be.
    """
    _check_positive("tokens", tokens)
    _check_mfu(mfu)
    recovery = facts["recovery"]
    save, restart = recovery["checkpoint_seconds"], recovery["restart_seconds"]
    total = tokens * flops_per_token
    seconds = total / (mfu * peak * devices)
    mtbf, interval, useful = expected(devices, facts)
    found = {
        "tokens": Figure(tokens, "", "given"),
        "utilisation": Figure(mfu, "", "given", "model FLOPs / peak"),
        "model_flops": Figure(total, "FLOPs", "modelled", "tokens * model FLOPs a token"),
        "time_of_steps": Figure(seconds / 86400, "days", "modelled", "FLOPs / (mfu * peak)"),
        "time_between_failures": Figure(
            mtbf, "s", "modelled", f"a device's mean / {devices}: {facts['failures']['source']}"
        ),
        "checkpoint_pause": Figure(save, "s", "assumed"),
        "restart": Figure(restart, "s", "assumed"),
        "best_checkpoint_interval": Figure(interval, "s", "modelled", "Daly 2006, equation 37"),
        "goodput": Figure(useful, "", "modelled", "Daly 2006, equation 20"),
    }
    if not useful:
        return found
    hours = seconds * devices / useful / 3600
    found["time"] = Figure(seconds / useful / 86400, "days", "modelled", "steps / goodput")
    found["device_hours"] = Figure(hours, "h", "modelled", "time * devices")
    if kind in facts["power"]:
        power, pue = facts["power"][kind], facts["pue"]["value"]
        grid = intensity(country, facts)
        kwh, kg = footprint(hours, power["watts"], pue, grid)
        found["device_power"] = Figure(power["watts"] / 1000, "kW", "published", power["source"])
        found["energy"] = Figure(kwh, "kWh", "modelled", f"device hours * power * PUE {pue}")
        found["carbon"] = Figure(kg, "kg", "modelled", f"energy * {grid} kg/kWh of {country}")
    if kind in facts["price"]:
        price = facts["price"][kind]
        note = f"{price['source']}, {price['date']}"
        found["price"] = Figure(price["dollars_per_hour"], "dollars/h", "published", note)
        cost = hours * price["dollars_per_hour"]
        found["cost"] = Figure(cost, "dollars", "modelled", "device hours * price")
    return found


def intensity(country: str, facts: Mapping) -> float:
    """Kilograms of CO2e a kWh.

    Raises:
      UserError: the facts do not have the country.
    """
    known = [name for name in facts["grid"] if name not in ("source", "date")]
    if country not in known:
        raise UserError(f"--country={country} must be one of {', '.join(known)}")
    return facts["grid"][country]


def site(megawatts: float, kind: str, facts: Mapping) -> dict:
    """How many devices so much power of a whole site feeds, of `kind` and of H100.

    Raises:
      UserError: the power is none.
    """
    _check_positive("power_mw", megawatts)
    found = {"power": Figure(megawatts, "MW", "given")}
    for name in dict.fromkeys([kind, "h100"]):
        if power := facts["power"].get(name):
            watts = megawatts * 1e6 / facts["pue"]["value"]
            found[f"{name}_in_servers"] = Figure(
                watts // power["server_watts"], "devices", "modelled",
                f"power / PUE / {power['server_watts']} W of server a device",
            )  # fmt: skip
            found[f"{name}_alone"] = Figure(
                watts // power["watts"], "devices", "modelled",
                f"power / PUE / {power['watts']} W; nothing for the servers around them",
            )  # fmt: skip
    return found


def trained(megawatts: float, days: float, mfu: float, kind: str, peak: float, facts) -> dict:
    """How far the devices of a site get in so many days: FLOPs, and the days of Meta's models.

    All devices at one run: 6 * active parameters * tokens at a share `mfu` of the peak, with the
    failures of so many devices.

    Args:
      megawatts: of the whole site.
      kind: of device, whose power the facts have.
      peak: FLOP/s of one.

    Raises:
      UserError: a value that cannot be.
    """
    _check_positive("power_mw", megawatts)
    _check_positive("days", days)
    _check_mfu(mfu)
    per_device = facts["pue"]["value"] * facts["power"][kind]["server_watts"]
    devices = int(megawatts * 1e6 // per_device)
    if not devices:
        raise UserError(f"--power_mw={megawatts:g} must be at least {per_device / 1e6:g}")
    mtbf, interval, useful = expected(devices, facts)
    done = devices * peak * mfu * useful  # FLOPs of steps that count, a second
    found = {
        "devices": Figure(devices, "devices", "modelled", f"{kind} in their servers"),
        "accelerators": Figure(
            devices * facts["power"][kind]["watts"] / 1e6 / megawatts, "", "modelled",
            "share of the power; the rest is for servers, network, cooling",
        ),
        "time_between_failures": Figure(mtbf, "s", "modelled"),
        "best_checkpoint_interval": Figure(interval, "s", "modelled"),
        "goodput": Figure(useful, "", "modelled"),
        "flops": Figure(
            done * days * 86400, "FLOPs", "modelled", f"{days:g} days, {mfu:.0%} of the peak"
        ),
    }  # fmt: skip
    for name, model in facts["trained"].items():
        flops = 6 * model["parameters"] * model["tokens"]
        note = f"{flops:.2g} FLOPs: {model['source']}"
        takes = flops / done / 86400 if done else math.inf
        if takes > days:
            note += "; more than there are"
        found[name] = Figure(takes, "days", "modelled", note)
    return found
