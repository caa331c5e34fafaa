"""The moving Shapes world: clips whose questions no single frame answers."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from qformer.data import Record, read_records
from qformer.data.clips import load_frames
from qformer.shapes import world
from qformer.shapes.moving import FRAMES, QUESTIONS, Motion, draw_motion, render_motion, write_world


def motions(n: int, validation: bool = False) -> list[Motion]:
    rng = random.Random(0)
    return [draw_motion(rng, validation) for _ in range(n)]


def test_the_first_frame_does_not_say_what_moves_or_where_to():
    for motion in motions(5):
        other = next(item for item in motion.scene if item != motion.mover)
        first = render_motion(motion, 7)[0]
        assert np.array_equal(first, render_motion(replace(motion, mover=other), 7)[0])
        assert other.shape != motion.mover.shape
        free = [place for place in world.PLACES if place not in {item.place for item in motion.scene}]
        assert motion.goal in free
        assert len(free) == 3
        for goal in free:
            assert np.array_equal(first, render_motion(replace(motion, goal=goal), 7)[0])


def test_it_rests_goes_and_rests_again_while_all_else_stays():
    for motion in motions(5):
        centres = [motion.centre(n) for n in range(FRAMES)]
        assert centres[0] == centres[motion.start] == motion.mover.xy
        assert centres[-1] == centres[motion.start + FRAMES // 6] == world.PLACES[motion.goal]
        assert len(set(centres)) == 1 + FRAMES // 6
        frames = [np.asarray(frame) for frame in render_motion(motion, 3)]
        assert np.array_equal(frames[0], frames[motion.start])
        (other,) = (item for item in motion.scene if item != motion.mover)
        x, y = other.xy
        if world.SIZES[other.size] < 5 and all(abs(x - cx) + abs(y - cy) > 30 for cx, cy in centres):
            assert np.array_equal(frames[0][y - 3 : y + 3, x - 3 : x + 3], frames[-1][y - 3 : y + 3, x - 3 : x + 3])


def test_splits_share_no_scene_and_every_answer_occurs():
    train, test = motions(200), motions(200, validation=True)
    assert not any(world.held_out(motion.scene) for motion in train)
    assert all(world.held_out(motion.scene) for motion in test)
    assert {motion.goal for motion in train} == set(world.PLACES)
    assert {motion.mover.shape for motion in train} == set(world.SHAPES)


def test_pictures_of_scenes_at_rest_are_as_they_were():
    scene = world.draw_scene(random.Random(1), 3)
    still, empty = world.render(scene, random.Random(2)), world.render(scene, random.Random(2), {})
    assert np.array_equal(still, empty)


def test_clips_are_written_and_read_as_records(tmp_path):
    pytest.importorskip("av", reason="clips need the extra video (PyAV)")
    write_world(tmp_path, n_train=2, n_test=1)
    records = read_records([str(tmp_path / "train.jsonl")])
    assert [record.question for record in records] == [*QUESTIONS.values()] * 2
    assert records[0].clip
    frames = load_frames(records[0], 8)
    assert len(frames) == 8
    assert frames[0].size == (world.IMAGE_SIDE, world.IMAGE_SIDE)
    assert np.abs(np.asarray(frames[0], int) - np.asarray(frames[-1], int)).max() > 60
    assert len(load_frames(Record(records[0].image, "a", clip=True), FRAMES)) == FRAMES
    before = (tmp_path / "train" / "00000.mp4").read_bytes()
    write_world(tmp_path, n_train=1, n_test=1)
    assert (tmp_path / "train" / "00000.mp4").read_bytes() == before
    assert json.loads((tmp_path / "test.jsonl").read_text().splitlines()[1])["question_type"] == "goal"
