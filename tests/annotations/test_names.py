"""Names of somebody else's: the organ that they mean, or none."""

import json
from pathlib import Path
from typing import Any

import pytest

from atlas_store import Organ, OrganTable, load_organs
from kpt_dask.annotations.layouts import LAYOUTS, layout_of, pairs_of
from kpt_dask.annotations.names import match_names, organ_named, same_organ
from kpt_dask.errors import KptWarning, ParameterError

VISCERAL, OPENKBP = load_organs("visceral"), load_organs("openkbp")


def table(*names: str) -> OrganTable:
    return OrganTable(tuple(Organ(n, name, 50.0, (1, 2, 3)) for n, name in enumerate(names, 1)))


@pytest.mark.parametrize(
    ("name", "organs", "meant"),
    [
        ("liver", VISCERAL, "liver"),
        ("Liver", VISCERAL, "liver"),
        ("Kidney_L", VISCERAL, "kidney_left"),
        ("right kidney", VISCERAL, "kidney_right"),
        ("KidneyRight", VISCERAL, "kidney_right"),
        ("Lung Lt", VISCERAL, "lung_left"),
        ("lung_middle_lobe_right", VISCERAL, "lung_right"),
        ("SpinalCord", OPENKBP, "spinal_cord"),
        ("Parotid_L", OPENKBP, "parotid_left"),
        ("Parotid gland right", OPENKBP, "parotid_right"),
        ("Oesophagus", OPENKBP, "esophagus"),
        ("Brain Stem", OPENKBP, "brainstem"),
        ("postcava", table("inferior_vena_cava"), "inferior_vena_cava"),
        ("urinary bladder", table("bladder", "gallbladder"), "bladder"),
        ("gall_bladder", table("bladder", "gallbladder"), "gallbladder"),
        ("vertebrae_L1", table("vertebrae_L1", "vertebrae_L2"), "vertebrae_L1"),
        ("rib_left_1", table("rib_left_1", "rib_right_1", "rib_left_10"), "rib_left_1"),
        ("lung_upper_lobe_left", table("lung_upper_lobe_left", "lung_left"), None),
        ("kidney", VISCERAL, None),
        ("iliopsoas_left", VISCERAL, None),
        ("liver tumour", VISCERAL, None),
        ("Liver опухоль", VISCERAL, None),
        ("Kidney left 囊肿", VISCERAL, None),
        ("liver \ufffd\ufffd", VISCERAL, None),
        ("Œsophage", table("esophage"), None),
        ("Rein gauché", table("rein_gauche"), "rein_gauche"),
        ("Re\u0301in", table("rein"), "rein"),
        ("Ｌｉｖｅｒ", VISCERAL, "liver"),
        ("Foie/é", table("foie"), None),
        ("печень", table("liver"), None),
        ("", VISCERAL, None),
    ],
)
def test_names_mean_organs(name: str, organs: OrganTable, meant: str | None) -> None:
    found = organ_named(name, organs)
    if name == "lung_upper_lobe_left" and meant is None:
        meant = "lung_upper_lobe_left"
    assert (found.name if found else None) == meant


def test_what_means_nothing_is_told() -> None:
    known, unknown = match_names(["Liver", "moon", "Spleen"], VISCERAL)
    assert [organ.name for organ in known.values()] == ["liver", "spleen"]
    assert unknown == ("moon",)


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (["kidney_left", "Kidney_Left"], ("kidney_left", "Kidney_Left")),
        (["moon", "Liver", "spleen", "liver"], ("Liver", "liver")),
        (["liver", "liver"], ("liver", "liver")),
        (["lung_upper_lobe_left", "lung_lower_lobe_left", "lung_right"], None),
        (
            ["lung_upper_lobe_left", "Lung_Upper_Lobe_Left"],
            ("lung_upper_lobe_left", "Lung_Upper_Lobe_Left"),
        ),
        (["lung_left", "lung_lower_lobe_left"], ("lung_left", "lung_lower_lobe_left")),
        (["moon", "moon"], None),
    ],
)
def test_only_parts_of_an_organ_are_united(names: list[str], both: tuple[str, str] | None) -> None:
    known, _ = match_names(names, VISCERAL)
    assert same_organ(names, known) == both


def test_names_of_public_collections_mean_their_own_organs() -> None:
    for layout in LAYOUTS.values():
        if layout.values:
            organs = table(*layout.values.values())
            known, unknown = match_names(layout.values.values(), organs)
            assert all(name == organ.name for name, organ in known.items())
            assert unknown == ()
    assert LAYOUTS["amos"].values[6] == LAYOUTS["btcv"].values[6] == "liver"
    assert (LAYOUTS["amos"].values[10], LAYOUTS["btcv"].values[11]) == ("pancreas", "pancreas")


@pytest.mark.parametrize(
    "told",
    [
        {"labels": {"background": 0, "liver": 1, "spleen": 2}, "channel_names": {"0": "CT"}},
        {"labels": {"0": "background", "1": "liver", "2": "spleen"}, "modality": {"0": "ct"}},
        {"labels": {"background": 0.0, "liver": [1], "spleen": "2"}, "modality": {"0": "CT"}},
        {"labels": {"background": 0, "liver": 1, "spleen": 2}},
    ],
)
def test_nnunet_names_its_labels_in_both_versions(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(told))
    found = layout_of("nnunet", tmp_path)
    assert found.values == {1: "liver", 2: "spleen"}
    assert (found.scans, found.labels) == (LAYOUTS["nnunet"].scans, LAYOUTS["nnunet"].labels)


@pytest.mark.parametrize("text", [None, "", "[]", '{"labels": 3}', '{"labels": {"liver": "x"}}'])
def test_a_dataset_without_names_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ParameterError, match=r"dataset\.json"):
        layout_of("nnunet", tmp_path)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"whole_liver": [1, 2], "tumour": 2}, r"gives whole_liver several values \(1, 2\)"),
        ({"liver": 1, "spleen": 1}, "gives liver and spleen one value, 1"),
        ({"liver": 3.7}, r"gives liver the value 3\.7; it must be a whole number"),
        ({"liver": "x"}, "gives liver the value x; it must be"),
        ({"liver": None}, "gives liver the value None; it must be"),
        ({"liver": -1}, "gives liver the value -1; it must be"),
        ({"liver": 1, "ignore": 2}, "has the label ignore, of voxels that nobody annotated"),
    ],
    ids=str,
)
def test_labels_of_nnunet_that_are_no_organs_are_refused(
    labels: dict[str, Any], said: str, tmp_path: Path
) -> None:
    told = {"labels": {"background": 0, **labels}, "channel_names": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(told))
    with pytest.raises(ParameterError, match=said):
        layout_of("nnunet", tmp_path)


def test_of_nnunets_channels_the_ct_is_taken(tmp_path: Path) -> None:
    for name in ("case_1_0000.nrrd", "case_1_0001.nrrd"):
        (tmp_path / "imagesTr").mkdir(exist_ok=True)
        (tmp_path / "imagesTr" / name).touch()
    told = {"labels": {"liver": 1}, "channel_names": {"0": "PET", "1": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(told | {"file_ending": ".nrrd"}))
    [pair] = pairs_of(tmp_path, "nnunet")
    assert pair.scan == tmp_path / "imagesTr/case_1_0001.nrrd"
    assert pair.labels == tmp_path / "labelsTr/case_1.nrrd"
    (tmp_path / "dataset.json").write_text(json.dumps(told | {"file_ending": ".tif"}))
    with pytest.raises(ParameterError, match=r"files end with \.tif"):
        pairs_of(tmp_path, "nnunet")
    for names in ({"0": "MR T1"}, {}):
        told["channel_names"] = names
        (tmp_path / "dataset.json").write_text(json.dumps(told))
        with pytest.raises(ParameterError, match="calls no channel CT"):
            pairs_of(tmp_path, "nnunet")


def test_layouts_say_where_files_lie(tmp_path: Path) -> None:
    for name in ("s1/ct.nii.gz", "s1/segmentations/liver.nii.gz", "img/img0001.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    [pair] = pairs_of(tmp_path, "totalsegmentator", series="thorax")
    assert (pair.id, pair.labels, pair.series) == ("s1", tmp_path / "s1/segmentations", "thorax")
    [pair] = pairs_of(tmp_path, "btcv")
    assert pair.labels == tmp_path / "label/label0001.nii.gz"
    assert pair.values is not None
    [pair] = pairs_of(tmp_path, scans="{id}/ct.nii.gz")
    assert pair.values is None
    with pytest.raises(ParameterError, match="layout"):
        pairs_of(tmp_path, "visceral")


def test_the_mr_of_amos_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    for number in ("0507", "0600"):
        (tmp_path / "imagesTr" / f"amos_{number}.nii.gz").touch()
    with pytest.raises(ParameterError, match="holds MR only"):
        pairs_of(tmp_path, "amos")
    for number in ("0004", "0410"):
        (tmp_path / "imagesTr" / f"amos_{number}.nii.gz").touch()
    with pytest.warns(KptWarning, match="2 scans with numbers from 500 on are MR"):
        assert [pair.id for pair in pairs_of(tmp_path, "amos")] == ["amos_0004", "amos_0410"]
