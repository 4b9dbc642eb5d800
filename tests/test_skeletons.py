"""Keypoint tables agree with themselves and the reference; custom sets find left and right or say they cannot."""
import json
from common.errors import UserError
from dataclasses import replace

import pytest

from common.skeletons import (DEFAULT_SIGMA, SKELETONS, Skeleton, flip_from_names, get_skeleton,
                              skeleton_from_category)
from tests.helpers import reference


@pytest.mark.parametrize("name", SKELETONS)
def test_flip_is_its_own_inverse_and_pairs_left_with_right(name):
    s = SKELETONS[name]
    for k, m in enumerate(s.flip):
        assert s.flip[m] == k
        swapped = s.keypoints[k].replace("left", "?").replace("right", "left").replace("?", "right")
        assert s.keypoints[m] == swapped or s.keypoints[k].startswith("face-")
        assert s.sigmas[m] == s.sigmas[k] or name == "wholebody"        # its feet and face differ by side
    mirrored = {tuple(sorted((s.flip[a], s.flip[b]))) for a, b in s.edges}
    assert mirrored == {tuple(sorted(edge)) for edge in s.edges} and len(mirrored) == len(s.edges)


def test_every_set_has_the_published_number_of_keypoints_and_sigmas():
    counts = dict(coco=17, crowdpose=14, posetrack=15, wholebody=133, humanart21=21)
    assert {name: s.num_keypoints for name, s in SKELETONS.items()} == counts
    assert {name: len(s.sigmas) for name, s in SKELETONS.items()} == counts


def test_tables_equal_the_reference():
    formats = json.loads(reference("formats.json").read_text())
    for name in ("coco", "crowdpose", "humanart21", "wholebody"):
        s, table = SKELETONS[name], formats["coco_wholebody" if name == "wholebody" else name]
        assert list(s.keypoints) == table["keypoints"] and list(s.flip) == table["flip"]
        assert [list(e) for e in s.edges] == table["skeleton"] and list(s.sigmas) == table["sigmas"]
    full, s = formats["posetrack18"], SKELETONS["posetrack"]
    kept = [k for k, name in enumerate(full["keypoints"]) if "ear" not in name.split("_")]
    assert list(s.keypoints) == [full["keypoints"][k] for k in kept]
    assert [kept[m] for m in s.flip] == [full["flip"][k] for k in kept]
    assert [[kept[a], kept[b]] for a, b in s.edges] == [e for e in full["skeleton"] if set(e) <= set(kept)]


@pytest.mark.parametrize("names, flip", [
    (["left_eye", "right_eye", "nose"], (1, 0, 2)), (["l_eye", "r_eye"], (1, 0)),
    (["eye_right", "eye_left"], (1, 0)), (["Left Eye", "Right Eye", "Tail"], (1, 0, 2)),
    (["LEye", "REye"], (1, 0)), (["lefteye", "righteye"], (1, 0)), (["ear.L", "ear.R"], (1, 0)),
    (["eyeL", "eyeR", "lip"], (1, 0, 2)), (["lwrist", "rwrist", "root"], (1, 0, 2)),
    (["front_left_paw", "front_right_paw", "chin"], (1, 0, 2)), (["R1", "L1"], (1, 0)),
    (["nose", "tail", "1"], (0, 1, 2)),                                 # no sides at all: every point stays
    (["left_eye", "nose"], None), (["left_eye", "eye_right"], None),
    (["left_eye", "Left Eye", "right_eye"], None)])
def test_flip_is_found_in_the_names_or_refused(names, flip):
    assert flip_from_names(names) == flip


def test_custom_category_becomes_a_skeleton_with_0_based_edges(capsys):
    dog = {"id": 1, "name": "dog", "keypoints": ["nose", "left_paw", "right_paw"], "skeleton": [[1, 2], [1, 3]]}
    s = skeleton_from_category(dog)
    assert s.edges == ((0, 1), (0, 2)) and s.flip == (0, 2, 1) and s.name == "dog"
    assert s.sigmas == (0.026, DEFAULT_SIGMA, DEFAULT_SIGMA)             # the nose is COCO's
    assert "no OKS sigmas given" in capsys.readouterr().out
    assert skeleton_from_category(dog, [.1, .2, .2]).sigmas == (.1, .2, .2)
    assert "no OKS sigmas" not in capsys.readouterr().out


def test_known_names_give_the_known_set_whatever_edges_the_file_has(capsys):
    names = list(SKELETONS["crowdpose"].keypoints)
    assert skeleton_from_category({"keypoints": names, "skeleton": [[16, 14]]}) is SKELETONS["crowdpose"]
    assert skeleton_from_category({"keypoints": [n.title() for n in names]}) is SKELETONS["crowdpose"]
    assert skeleton_from_category({"keypoints": names}, [0.1] * 14).sigmas == (0.1,) * 14
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("category, sigmas, message", [
    ({"name": "person"}, None, "no 'keypoints' names"),
    ({"keypoints": ["a", "b"]}, [.1], "1 sigmas for the 2 keypoints")])
def test_a_category_that_cannot_be_used_is_explained(category, sigmas, message):
    with pytest.raises(UserError, match=message):
        skeleton_from_category(category, sigmas)


@pytest.mark.parametrize("given, edges", [
    ([[1, 2], [32, 33]], ((0, 1),)), ([["head", "tail"], ["Left Fin", "tail"]], ((0, 1), (2, 1))), ([[1, 2, 3]], ()),
    (None, ()), ([1, 2, 2, 3], ()), ([["1", "2"]], ((0, 1),)), ([[1, None], [2, 3], [1.5, 2]], ((1, 2),)), ([[0, 1]], ((0, 1),)),
    ("1-2", ()), ({"a": 1}, ()), ([[1, 1e400]], ())], ids=str)
def test_edges_are_for_drawing_and_what_joins_nothing_is_left_out_with_a_note(given, edges, capsys):
    category = {"keypoints": ["head", "tail", "left_fin", "right_fin"], "skeleton": given}
    assert skeleton_from_category(category, [0.1] * 4).edges == edges
    dropped = given is not None and len(given if isinstance(given, list) else [given]) > len(edges)
    assert ("join no two keypoints" in capsys.readouterr().out) == dropped


@pytest.mark.parametrize("names, text", [([0, 1, 2], ("0", "1", "2")), ("a, b;c", ("a", "b", "c")), ([None, "b"], ("None", "b"))])
def test_keypoint_names_are_taken_as_text(names, text):
    assert skeleton_from_category({"keypoints": names}, [0.1] * len(text)).keypoints == text


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_sigmas_that_oks_cannot_divide_by_are_refused(bad):
    with pytest.raises(UserError, match="positive"):
        replace(SKELETONS["coco"], sigmas=(bad, *SKELETONS["coco"].sigmas[1:]))


def test_skeletons_survive_json_and_names_are_corrected():
    for s in SKELETONS.values():
        assert get_skeleton(json.loads(json.dumps(s.to_dict()))) == s
        assert get_skeleton(s.name) is s and get_skeleton(s) is s
    with pytest.raises(UserError, match="did you mean crowdpose"):
        get_skeleton("crowd_pose")
    assert Skeleton.from_dict(SKELETONS["coco"].to_dict() | {"flip": None}).flip is None
