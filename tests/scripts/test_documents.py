"""The numbers in the documents are those of the records: the tables are generated, and up to date."""

import json
import re

import pytest
from helpers import ROOT

from pipeline.run_folder import RunFolder
from scripts import documents
from scripts.documents import PACKED, TABLES, number, written


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_tables_are_up_to_date(name):
    """If this fails: python scripts/documents.py."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert documents.TABLE.search(text) and text == written(text)


def test_a_number_that_was_changed_by_hand_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = documents.TABLE.search(text)[0]
    value = re.search(r"\d\.\d\d", table)[0]
    changed = text.replace(table, table.replace(value, "0.01", 1))
    assert changed != text == written(changed)


def test_each_value_is_that_of_its_record():
    """Of the packed weights' own metrics.json, with the settings that their config.json has."""
    for packed in PACKED:
        (record,) = (record for record in packed.run.read_records() if record["name"] == "fad")
        for table in ("summary", packed.preset):
            assert f"| {number([record['value']])}, of {record['num_generated']:,} |" in TABLES[table]()
        assert record["weights"] and record["sampling"]["seed"] == packed.run.read_config()["seed"]


def test_costs_are_those_of_the_lineage(monkeypatch):
    lineage = [{"stage": stage, "images": 1234, "minutes": 90} for stage in ("vqsvae", "sdid", "sdid")]
    monkeypatch.setattr(RunFolder, "lineage", lineage)
    assert "| 1,234; 1 h 30 min |" in TABLES["summary"]() and "| 2,468; 3 h 0 min |" in TABLES["summary"]()


def test_the_readme_has_few_rows_and_none_that_is_empty():
    for preset, rows in ("improved", 8), ("faithful", 7):  # the faithful denoiser knows no classes
        lines = TABLES[preset]().splitlines()[2:]
        assert len(lines) == rows and ("recognised" in "".join(lines)) == (preset == "improved")
        assert all(all(map(str.strip, line.split("|")[1:-1])) for line in lines)


def test_several_sets_of_samples_are_a_mean_with_its_half_width():
    assert number([3.0, 4.0, 5.0]) == "4.00 ± 2.48"  # t = 4.303, standard deviation 1, three values
    assert (number([]), number([12.34]), number([0.8567]), number([2785.4], 0)) == ("not run", "12.3", "0.857", "2,785")


def test_a_published_value_stands_in_the_column_of_its_protocol_alone():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLES["fid"]().splitlines()]
    head = rows[0]
    for row in rows[2:]:
        if row[1].startswith("FSDDIM"):
            assert row[head.index("clean-fid, 10,000 at 32x32")] and not row[head.index("FID, 10,000 against test")]
        if row[1].startswith("FSVAE"):
            assert row[head.index("clean-fid, 5,000 at 32x32")] and row[-1] == ""
        if row[1].startswith("Spiking-Diffusion"):
            assert not any(row[2:-1]) and "the paper's" in row[-1]


def test_real_images_are_read_from_the_records_of_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "docs" / "records").mkdir(parents=True)
    for seed, value in enumerate((1.0, 2.0)):
        records = [
            {"name": "fid", "value": value, "dataset": "MNIST"},
            {"name": "fid", "value": 9, "dataset": "FMNIST"},
        ]
        (tmp_path / "docs" / "records" / f"{seed}.json").write_text(json.dumps(records))
    assert [record["value"] for record in documents.of_real_images("MNIST")] == [1.0, 2.0]
