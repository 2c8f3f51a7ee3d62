"""A plan as a page: one file, all figures, nothing from elsewhere."""

import xml.etree.ElementTree

import puna
from puna.train.plan import report
from puna.train.plan.figures import Figure

SMALL = ("train.batch_size=8", "mesh.data=1", "mesh.fsdp=4")


def a_plan(**settings):
    return puna.plan(puna.get_config("llama4:scout-tiny", [*SMALL]), "v5p-8", compile=False,
                     **settings)  # fmt: skip


def test_the_page_shows_memory_time_and_candidates():
    found = a_plan(search=True)
    seconds = {"products": 0.5, "other": 0.25, "waiting_fsdp": 0.25, "step_time": 1.0}
    found.sections["time_of_a_step"] = {
        name: Figure(value, "s", "modelled", "<note>") for name, value in seconds.items()
    }
    page = found.html()
    assert page.startswith("<!doctype html>") and "http" not in page and "<script" not in page
    assert page.count("<svg") == 3 and "--config.mesh" in page
    assert "<note>" not in page and "&lt;note&gt;" in page
    svg = page[page.rindex("<svg") : page.rindex("</svg>") + 6]
    bars = [x for x in xml.etree.ElementTree.fromstring(svg).iter("rect") if x.get("y") == "24"]
    widths = [float(x.get("width")) for x in bars]
    assert widths[0] == 2 * widths[1] == 2 * widths[2] and sum(widths) == 760
    for figures in found.sections.values():
        for name in figures:
            assert name.replace("_", " ") in page
    assert found._repr_html_() in page


def test_memory_beyond_the_limit_is_drawn_beyond_it():
    config = puna.get_config("llama3:3.1-8b")
    page = puna.plan(config, "v5e-4", compile=False).html()
    start = page.index("<svg")
    drawing = xml.etree.ElementTree.fromstring(page[start : page.index("</svg>") + 6])
    line = next(drawing.iter("line"))
    assert float(line.get("x1")) < 700
    assert "does not fit" in page


def test_generation_has_a_bar_too():
    found = puna.plan(puna.get_config("llama4:scout"), "h100-1", context=8192, quantize="auto")
    assert found.html().count("<svg") == 1 and "weights in int4" in found.verdict


def test_text_and_dictionary_have_the_candidates():
    found = a_plan(search=True)
    text, written = str(found), found.to_dict()
    assert text.count("--config.train.microbatches") == 8 < len(found.candidates)
    assert written["candidates"][0]["flags"] == found.candidates[0].flags
    assert "estimate, fits" in text
    assert set(report.SEARCHED) >= {
        flag.partition("=")[0].removeprefix("--config.")
        for flag in found.candidates[0].flags.split()
    }
