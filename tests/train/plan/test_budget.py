"""Time, failures, energy and carbon against what Meta published."""

import pytest

from puna.configs.errors import UserError
from puna.train.plan import budget

FACTS = budget.read_facts()

# GPU hours, watts, MWh where stated, tCO2e (location-based), grid of the time: the LLaMA paper's
# table 15, then the model cards.
CARDS = {
    "Llama 1 7B": (82_432, 400, 36, 14, "us-2021"),
    "Llama 1 13B": (135_168, 400, 59, 23, "us-2021"),
    "Llama 1 33B": (530_432, 400, 233, 90, "us-2021"),
    "Llama 1 65B": (1_022_362, 400, 449, 173, "us-2021"),
    "Llama 2 7B": (184_320, 400, None, 31.22, "us-2021"),
    "Llama 2 13B": (368_640, 400, None, 62.44, "us-2021"),
    "Llama 2 70B": (1_720_320, 400, None, 291.42, "us-2021"),
    "Llama 3 8B": (1.3e6, 700, None, 390, "us-2021"),
    "Llama 3 70B": (6.4e6, 700, None, 1_900, "us-2021"),
    "Llama 3.1 8B": (1.46e6, 700, None, 420, "us-2021"),
    "Llama 3.1 70B": (7.0e6, 700, None, 2_040, "us-2021"),
    "Llama 3.1 405B": (30.84e6, 700, None, 8_930, "us-2021"),
    "Llama 3.2 1B": (370e3, 700, None, 107, "us-2021"),
    "Llama 3.2 3B": (460e3, 700, None, 133, "us-2021"),
    "Llama 3.2 11B vision": (246e3, 700, None, 71, "us-2021"),
    "Llama 3.2 90B vision": (1.78e6, 700, None, 513, "us-2021"),
    "Llama 3.3 70B": (7.0e6, 700, None, 12.9, "us-2021"),
    "Llama 4 Scout": (5.0e6, 700, None, 1_354, "us"),
    "Llama 4 Maverick": (2.38e6, 700, None, 645, "us"),
}
# The same hours as Llama 3.1 70B, for which 2,040 t are stated.
CONTRADICTS = {"Llama 3.3 70B"}


def test_energy_and_carbon_of_metas_model_cards():
    far = set()
    for name, (hours, watts, mwh, tonnes, grid) in CARDS.items():
        kwh, kg = budget.footprint(
            hours, watts, FACTS["pue"]["value"], budget.intensity(grid, FACTS)
        )
        assert mwh is None or kwh / 1000 == pytest.approx(mwh, rel=0.05), name
        if kg / 1000 != pytest.approx(tonnes, rel=0.05):
            far.add(name)
    assert far == CONTRADICTS


def test_failures_of_16384_devices_come_every_three_hours():
    mtbf = budget.mean_time_between_failures(16384, FACTS["failures"])
    assert mtbf / 3600 == pytest.approx(3.09, abs=0.01)
    assert budget.mean_time_between_failures(8192, FACTS["failures"]) == 2 * mtbf


@pytest.mark.parametrize("mtbf", [1e3, 11_137, 1e6])
def test_no_other_checkpoint_interval_loses_less(mtbf):
    save, restart = 20, 300
    best = budget.checkpoint_interval(save, mtbf)
    shares = [budget.goodput(best * f, save, restart, mtbf) for f in (0.8, 0.95, 1, 1.05, 1.25)]
    assert max(shares) == shares[2]


def test_goodput_of_metas_run_is_over_nine_tenths():
    recovery = FACTS["recovery"]
    save, restart = recovery["checkpoint_seconds"], recovery["restart_seconds"]
    mtbf = budget.mean_time_between_failures(16384, FACTS["failures"])
    share = budget.goodput(budget.checkpoint_interval(save, mtbf), save, restart, mtbf)
    assert 0.9 < share < 0.95
    assert budget.goodput(1, 1, 1e9, 1) == 0


def test_a_budget_adds_up():
    found = budget.training(6e9, 1e12, 0.4, 989e12, 1024, "h100", "us", FACTS)
    value = {name: figure.value for name, figure in found.items()}
    assert value["time_of_steps"] == pytest.approx(6e21 / (0.4 * 989e12 * 1024) / 86400)
    assert value["time"] * value["goodput"] == pytest.approx(value["time_of_steps"])
    assert value["device_hours"] == pytest.approx(value["time"] * 24 * 1024)
    assert value["energy"] == pytest.approx(value["device_hours"] * 0.7 * 1.1)
    assert value["cost"] == pytest.approx(value["device_hours"] * 4.916)
    # Nobody publishes what a v5p takes: nothing is made up.
    assert (
        not {"energy", "carbon"}
        & budget.training(6e9, 1e12, 0.4, 459e12, 128, "v5p", "us", FACTS).keys()
    )


def test_150_megawatts_feed_about_100_000_h100():
    found = budget.site(150, "v5p", FACTS)
    assert found["h100_in_servers"].value == 150e6 // (1275 * 1.1)
    assert 100_000 < found["h100_in_servers"].value < 110_000


def test_which_llama_150_megawatts_train_in_60_days():
    found = budget.trained(150, 60, 0.4, "h100", 989e12, FACTS)
    value = {name: figure.value for name, figure in found.items()}
    assert value["devices"] == budget.site(150, "h100", FACTS)["h100_in_servers"].value
    assert value["accelerators"] == pytest.approx(0.5, abs=0.01)  # 700 of 1275 W, PUE 1.1
    assert value["flops"] == pytest.approx(
        value["devices"] * 989e12 * 0.4 * value["goodput"] * 60 * 86400
    )
    # Days of each are its FLOPs over those of a day.
    assert value["Llama 3.1 405B"] == pytest.approx(
        6 * 405e9 * 15.6e12 / value["flops"] * 60, rel=1e-6
    )
    assert value["Llama 4 Behemoth"] < 60 and "more than" not in found["Llama 4 Behemoth"].note
    short = budget.trained(150, 10, 0.4, "h100", 989e12, FACTS)
    assert "more than there are" in short["Llama 4 Behemoth"].note
    with pytest.raises(UserError, match="--days=0"):
        budget.trained(150, 0, 0.4, "h100", 989e12, FACTS)
    with pytest.raises(UserError, match="--power_mw=0.001"):
        budget.trained(0.001, 60, 0.4, "h100", 989e12, FACTS)


def test_every_published_number_has_a_source_and_a_date():
    entries = [FACTS["pue"], FACTS["failures"], FACTS["recovery"], FACTS["grid"]]
    for section in ("power", "price", "scaling", "trained"):
        entries += FACTS[section].values()
    for entry in entries:
        assert entry["source"] and entry["date"].year > 2000


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("watts = 700", 'watts = "700"', "power.h100.watts='700' must be a number above 0"),
        ("server_watts = 1275", "", "power.h100.server_watts=None must be"),
        ("dollars_per_hour = 4.916", "dollars_per_hour = -4", "price.h100.dollars_per_hour=-4"),
        ("france = 0.056", "france = '0.1'", "grid.france='0.1' must be"),
        ("value = 1.1", "value = nan", "pue.value=nan must be"),
        ("[scaling.experts]", "[scaling.others]", "scaling.experts must be a table"),
        ("gamma = -0.0098", "gamma = inf", "scaling.experts.gamma=inf must be a number"),
    ],
)
def test_a_number_of_the_facts_that_is_none_is_one_line(tmp_path, old, new, reason):
    text = budget.FACTS.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "facts.toml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        budget.read_facts(tmp_path / "facts.toml")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_grid_may_be_a_whole_number(tmp_path):
    text = budget.FACTS.read_text(encoding="utf-8").replace("france = 0.056", "france = 1")
    (tmp_path / "facts.toml").write_text(text, encoding="utf-8")
    assert budget.intensity("france", budget.read_facts(tmp_path / "facts.toml")) == 1
