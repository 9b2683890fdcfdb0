"""The layout argument of `make smoke`."""

import pytest

from megatron_zaya.config import load_config
from megatron_zaya.plan.layout import layout_problems
from tools.smoke import RUN_FILE, parse_layout


@pytest.mark.parametrize(("name", "ranks"), [("dp2", 2), ("tp2", 2), ("ep2", 2), ("tp2xep2", 2), ("tp2xpp2xep4", 8)])
def test_a_product_of_sizes_is_a_legal_layout_of_the_smoke_run(name, ranks):
    layout = parse_layout(name)
    assert layout.ranks == ranks
    assert layout_problems(load_config(RUN_FILE, layout.overrides), ranks) == []


@pytest.mark.parametrize("name", ["", "tp", "2", "tp0", "tp2,pp2", "zp2"])
def test_what_is_no_layout_is_named(name):
    with pytest.raises(SystemExit, match="is no layout"):
        parse_layout(name)
