"""The blocks of a localization, as a chart and as a table."""
from archrepair.deploy.blocks_view import draw_blocks, leading_blocks, table_of_blocks
from support.reports import Checked, make


def many(n: int = 40, chosen: str = "layer7") -> dict:
    "A localization with `n` blocks, as a dictionary."
    names = [f"layer{i}" for i in range(n)]
    row = {"size": 3, "per_neuron": 0.1, "expected": 1.0, "enrichment": 1.0, "p": 0.5, "gradient": 0.1, "s_hat": 0.1}
    return {"block": chosen, "verdict": f"{chosen} holds most", "blocks": names, "k": 50, "warnings": [],
            "summary": {name: {**row, "count": i % 7} for i, name in enumerate(names)}}


def test_a_long_list_of_blocks_is_held_to_those_that_lead():
    localization = many()
    leading, counts = leading_blocks(localization, 12), {name: row["count"] for name, row in localization["summary"].items()}
    assert len(leading) == 12 and "layer7" in leading and leading == sorted(leading, key=localization["blocks"].index)
    assert min(counts[n] for n in leading if n != "layer7") >= max(counts[n] for n in localization["blocks"] if n not in leading)
    assert len(draw_blocks(localization, most=12).patches) == 12 and "16 more blocks are not shown" in table_of_blocks(localization)
    assert leading_blocks(localization, 40) == leading_blocks(localization, 400) == localization["blocks"]


def test_bars_turn_where_there_are_many_or_their_names_are_long():
    label = "neurons among the top 50"
    assert draw_blocks(many(4, "layer2")).get_ylabel() == label and draw_blocks(many(9)).get_xlabel() == label
    localization = many(1, "layer0")
    name = "a.very.long.name"
    localization |= {"block": name, "blocks": [name], "summary": {name: localization["summary"]["layer0"]}}
    assert draw_blocks(localization).get_xlabel() == label


def test_a_localization_is_drawn_as_its_dictionary_is(parts):
    localization = make(parts).localization
    heights = lambda ax: [bar.get_height() for bar in ax.patches]
    assert heights(localization.plot()) == heights(draw_blocks(localization.to_dict())) == [2, 0]
    assert localization._repr_html_() == table_of_blocks(localization.to_dict())._repr_html_()


def test_numbers_that_are_not_known_are_dashes():
    localization = many(2, "layer1")
    localization["summary"]["layer0"]["p"] = None
    assert Checked(table_of_blocks(localization)).words.count("–") == 1
