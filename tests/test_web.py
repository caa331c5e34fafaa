"""The demo page without a browser: what it does, what it refuses in one line, and what no request gets out of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import run_stage

import qformer
from qformer.messages import EMPTY_ANSWER, one_line
from qformer.web.adapters import Adapters, adapter_names
from qformer.web.desk import CANDIDATES, Candidate, Desk, Writing
from qformer.web.folder import PictureFolder, list_pictures
from qformer.web.guard import Guard
from qformer.web.style import notice, ranking
from qformer.web.uploads import Limits, read_upload, shown

REPO = Path(__file__).resolve().parent.parent
WRITTEN = ["s2", False, 1, 1.0, 0.9, "", "{}"]  # adapter and settings of an upload's caption
PRINTED = re.compile(r"http://127\.0\.0\.1:(\d+)")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for stage in (1, 2):
        run_stage(
            stage, getattr(tiny, f"stage{stage}")(folder / f"s{stage}", "train.max_steps=1", "data.validation=[]")
        )
    return folder


@pytest.fixture(scope="module")
def desk(runs, tiny) -> Desk:
    adapters = Adapters({name: qformer.load(runs / name, device="cpu") for name in ("s1", "s2")})
    return Desk(adapters, Limits(megabytes=1, megapixels=2, video_s=2), tiny.records.parent)


@pytest.fixture(scope="module")
def pictures(tiny) -> list[Path]:
    return sorted(tiny.records.parent.glob("*.png"))


def refusal(call) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- what it does ----


def test_it_captions_and_answers_as_the_model_does_and_keeps_the_conversation(desk, runs, pictures):
    model, image = desk.adapters.models["s2"], str(pictures[0])
    default = Writing.of(model)
    assert (default.beams, default.question_prompt) == (model.config.llm.num_beams, model.vqa_prompt)
    assert desk.caption("s2", image, default) == (model.caption(image)[0] or EMPTY_ANSWER)
    greedy = Writing(False, 1, 1.0, 0.9, "a photo of", "{}")
    assert desk.caption("s2", image, greedy) == (model.caption(image, "a photo of", num_beams=1)[0] or EMPTY_ANSWER)
    turns: list[tuple[str, str]] = []
    first = desk.answer("s2", image, "what colour ?", turns=turns, writing=greedy)
    second = desk.answer("s2", image, "where ?", turns=turns, writing=greedy)
    assert [(question, answer or EMPTY_ANSWER) for question, answer in turns] == [
        ("what colour ?", first),
        ("where ?", second),
    ]
    assert second == model.answer(image, "where ?", history=turns[:1], prompt="{}", num_beams=1)[0]
    assert "must hold {} once" in refusal(lambda: desk.caption("s2", image, Writing(False, 1, 1, 0.9, "", "no place")))


def test_a_conversation_forgets_its_oldest_turns_when_it_grows_too_long(desk, pictures):
    turns: list[tuple[str, str]] = []
    writing = Writing(False, 1, 1.0, 0.9, "", "{}")
    for _ in range(12):
        desk.answer("s2", str(pictures[0]), "what colour is it ?", turns=turns, writing=writing)
    assert 0 < len(turns) < 12


def test_captions_are_ranked_by_matching_and_by_the_language_models_loss(desk, pictures):
    image, texts = str(pictures[0]), ["a red square", "a blue square on the left", "a dot"]
    by_match = desk.rank("s1", image, "\n".join([*texts, "", "  "]))
    match = desk.adapters.models["s1"].match([image] * 3, texts).tolist()
    assert [(c.text, c.value) for c in by_match] == sorted(zip(texts, match, strict=True), key=lambda pair: -pair[1])
    by_loss = desk.rank("s2", image, "red\nblue", "what colour ?")
    (losses,) = desk.adapters.models["s2"].rank(image, "what colour ?", ["red", "blue"])
    assert by_loss[0].text == ["red", "blue"][int(losses.argmin())]
    assert sum(c.value for c in by_loss) == pytest.approx(1)
    assert {c.text for c in desk.rank("s2", image, "a red square\na dot")} == {"a red square", "a dot"}
    assert f"expected 1 to {CANDIDATES}, one a line" in refusal(lambda: desk.rank("s1", image, "\n"))
    assert f"expected 1 to {CANDIDATES}" in refusal(lambda: desk.rank("s1", image, "a\n" * (CANDIDATES + 1)))


def test_attention_is_shown_for_every_word_of_the_last_answer_and_for_every_query(desk, pictures):
    image, model = str(pictures[0]), desk.adapters.models["s2"]
    look = desk.look("s2", image, "", ("what colour ?", "red square"))
    maps = model.attention(image, "red square", question="what colour ?")
    assert [word for _, word in look.words] == maps.words
    assert len(look.queries) == len(maps.of_queries()) == model.config.qformer.queries
    assert '"red square", the answer to "what colour ?"' in look.line
    brightest = np.asarray(look.words[0][0].convert("L").resize(maps.of_words()[0].shape[::-1])).ravel()
    darkest = int(maps.of_words()[0].argmin())
    assert brightest[int(maps.of_words()[0].argmax())] >= brightest[darkest]
    assert [word for _, word in desk.look("s1", image, "a red square", None).words] == ["a", "red", "square"]
    assert desk.look("s1", image, "", ("what ?", "red")).words == []
    assert "no picture yet" in refusal(lambda: desk.look("s1", None, "a dot", None))


def test_a_folder_is_embedded_once_and_only_what_changed_is_embedded_again(desk, tmp_path, pictures, monkeypatch):
    folder, cache = tmp_path / "mine", tmp_path / "cache"
    folder.mkdir()
    for picture in pictures[:5]:
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    model, embedded, embed = desk.adapters.models["s1"], [], desk.adapters.models["s1"].embed_image
    monkeypatch.setattr(model, "embed_image", lambda rows: embedded.append(len(rows)) or embed(rows))
    mine = PictureFolder(folder, cache)
    assert mine.embed("s1", model, workers=0) == 1
    assert embedded == [5]
    hits = mine.search("s1", model, "a red square", count=3)
    near = (embed([str(p) for p in pictures[:5]]) @ model.embed_text("a red square")[0]).amax(1)
    assert [hit.cosine for hit in hits] == pytest.approx(near.topk(3).values.tolist(), abs=1e-5)
    assert hits[0].name == pictures[int(near.argmax())].name
    again = PictureFolder(folder, cache)
    again.embed("s1", model, workers=0)
    assert embedded == [5]
    assert [hit.name for hit in again.search("s1", model, "a red square", count=3)] == [hit.name for hit in hits]
    (folder / pictures[0].name).write_bytes(pictures[6].read_bytes())
    os.utime(folder / pictures[0].name, ns=(1, 1))
    (folder / "new.png").write_bytes(pictures[7].read_bytes())
    PictureFolder(folder, cache).embed("s1", model, workers=0)
    assert embedded == [5, 2]


def test_what_no_adapter_of_the_page_can_do_is_said(runs, desk, pictures):
    alone = Desk(Adapters({"s1": desk.adapters.models["s1"]}), desk.limits, desk.uploads)
    line = refusal(lambda: alone.caption("s1", str(pictures[0]), Writing(False, 1, 1, 0.9, "", "{}")))
    assert line.startswith(
        "Captions and answers need an adapter of stage 2; this page was started with s1 (stage 1) alone"
    )
    assert refusal(lambda: desk.search("s2", "a dot", 3)) == "'s2' is no adapter for this; nearest is s1"
    assert refusal(lambda: desk.search("s1", "a dot", 3)).endswith("start the page with --folder PICTURES")
    assert adapter_names(["runs/a/s1/adapter", "runs/a/s2"]) == ["s1", "s2"]
    assert adapter_names(["a/s1", "b/s1"]) == ["a/s1", "b/s1"]
    assert "is there twice" in refusal(lambda: adapter_names(["a/s1", "a/s1"]))


# ---- uploads ----


def test_an_upload_that_is_no_picture_or_too_large_is_one_line_without_its_folder(desk, tmp_path, pictures):
    limits, transform = desk.limits, desk.adapters.models["s2"].transform
    Image.new("RGB", (2000, 1100)).save(tmp_path / "wide.png")
    (tmp_path / "big.png").write_bytes(b"\x89PNG" + bytes(1_100_000))
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:60])
    (tmp_path / "words.txt").write_text("no picture")
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    (tmp_path / "clip.mp4").write_bytes(b"no clip")
    np.save(tmp_path / "features.npy", np.ones((3, 8), np.float32))
    for name, reason in {
        "wide.png": "wide.png has 2000 x 1100 pixels; expected 2 million at most",
        "big.png": "big.png has 1.1 MB; expected 1 MB at most",
        "half.png": "half.png cannot be read: ",
        "words.txt": "words.txt cannot be read: it is no image of JPEG, PNG",
        "script.eps": "script.eps cannot be read: it is no image of JPEG, PNG",
        "clip.mp4": "clip.mp4 cannot be read: ",
        "features.npy": "features.npy holds features; these adapters read images and videos",
        "gone.png": "gone.png is no longer kept here; drop it again",
    }.items():
        line = refusal(lambda name=name: read_upload(str(tmp_path / name), limits, transform))
        assert line.startswith(reason)
        assert str(tmp_path) not in line
        assert "Error:" not in line
    assert read_upload(str(tmp_path / "features.npy"), limits, None) == []


def test_a_video_is_shown_by_the_frames_that_are_read_and_one_too_long_is_refused(desk, tmp_path):
    av = pytest.importorskip("av")
    for name, frames in (("short.mp4", 20), ("long.mp4", 60)):
        with av.open(str(tmp_path / name), "w") as clip:
            stream = clip.add_stream("mpeg4", rate=20)
            stream.width = stream.height = 64
            for number in range(frames):
                picture = Image.new("RGB", (64, 64), (4 * number, 0, 0))
                clip.mux(stream.encode(av.VideoFrame.from_image(picture)))
            clip.mux(stream.encode())
    transform = desk.adapters.models["s2"].transform
    images = read_upload(str(tmp_path / "short.mp4"), desk.limits, transform)
    assert len(images) == transform.frames == 8
    assert shown(images).width > shown(images).height
    line = refusal(lambda: read_upload(str(tmp_path / "long.mp4"), desk.limits, transform))
    assert line == "long.mp4 is 3 s long, in 60 frames; expected 2 s at most"


def test_a_path_that_leads_out_of_the_uploads_is_not_read(desk, runs, tmp_path, pictures):
    outside = tmp_path / "secret.png"
    outside.write_bytes(pictures[0].read_bytes())
    link = desk.uploads / "link.png"
    link.symlink_to(outside)
    for path in (outside, link, desk.uploads / ".." / outside.name, Path("/etc/passwd")):
        assert refusal(lambda path=path: desk.receive(str(path))) == f"{path.name} was not uploaded here"
    link.unlink()


def test_links_that_lead_out_of_the_picture_folder_are_no_pictures_of_it(tmp_path, pictures):
    folder, outside = tmp_path / "mine", tmp_path / "others"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (folder / "a.png", folder / "sub/b.png", outside / "c.png"):
        path.write_bytes(pictures[0].read_bytes())
    (folder / "c.png").symlink_to(outside / "c.png")
    (folder / "others").symlink_to(outside)
    (folder / "within.png").symlink_to(folder / "sub/b.png")
    (folder / "notes.txt").write_text("no picture")
    assert list_pictures(folder) == ["a.png", "within.png", "sub/b.png"]
    assert "no such folder" in refusal(lambda: PictureFolder(tmp_path / "none", tmp_path))
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refusal(lambda: PictureFolder(tmp_path / "empty", tmp_path))


def test_words_of_a_visitor_are_never_html():
    table = ranking([Candidate("<img src=x onerror=alert(1)>", 0.5, "loss")], "<b>")
    assert "<img" not in table
    assert "<b>" not in table
    assert "<script" not in notice("<script>")


def test_the_guard_lets_through_what_the_page_needs_and_files_of_the_uploads_alone(tmp_path):
    uploads, outside = tmp_path / "uploads", tmp_path / "secret.txt"
    uploads.mkdir()
    outside.write_text("secret")
    (uploads / "a.png").write_text("a")
    (uploads / "link.png").symlink_to(outside)
    guard = Guard(None, uploads, max_bytes=100)

    def status(path, method="GET", **headers):
        pairs = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
        return guard.refusal({"path": path, "method": method, "headers": pairs})

    file = "/gradio_api/file="
    assert [status(path) for path in ("/", "/config", "/assets/index.js", f"{file}{uploads}/a.png")] == [None] * 4
    closed = ["/docs", "/openapi.json", "/gradio_api/proxy=http://example.com/", "/gradio_api/component_server",
              "/gradio_api/run/predict", "/gradio_api/call/v2/x", "/monitoring", "/login", "/svelte/x", "/static/../x"[:1] + "svelte",
              f"{file}{outside}", f"{file}{uploads}/link.png", f"{file}{uploads}/../secret.txt", f"{file}/etc/passwd",
              f"{file}http://example.com/a.png", f"{file}a.png", f"{file}{uploads}", f"{file}{uploads}/\0"]  # fmt: skip
    assert [(path, status(path)) for path in closed] == [(path, 404) for path in closed]
    assert status("/gradio_api/upload", "POST") == 411
    assert status("/gradio_api/upload", "POST", content_length="1000101") == 413
    assert status("/gradio_api/upload", "POST", content_length="1000100") is None
    assert status("/gradio_api/queue/join", "POST", content_length="1000001") == 413


# ---- the page served ----


class Served:
    """A running `stages/web.py`."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port, self.url = process, port, f"http://127.0.0.1:{port}"

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Status, body and headers; the path goes out as it is."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def upload(self, name: str, content: bytes) -> str:
        """Where the server keeps a file that is uploaded to it."""
        edge = "edge"
        body = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body += content + f"\r\n--{edge}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={edge}"}
        status, answer, _ = self.ask("/gradio_api/upload", body, **kind)
        assert status == 200, answer
        return json.loads(answer)[0]

    def join(self, session: str, target: str, data: list) -> int:
        """Start what the control with the element id `target` starts; returns the status."""
        config = json.loads(self.ask("/config")[1])
        component = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == target)
        function = next(d["id"] for d in config["dependencies"] if [component, "click"] in d["targets"]
                        or [component, "upload"] in d["targets"])  # fmt: skip
        body = json.dumps({"data": data, "fn_index": function, "session_hash": session, "trigger_id": component})
        return self.ask("/gradio_api/queue/join", body.encode(), **{"Content-Type": "application/json"})[0]

    def messages(self, session: str) -> list[dict]:
        """What the queue tells a session until its work is done."""
        _, body, _ = self.ask(f"/gradio_api/queue/data?session_hash={session}")
        return [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: ")]


def form(path) -> dict:
    """A file as the page's forms name it."""
    return {"path": path, "orig_name": "00.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def served(runs, tiny, tmp_path_factory):
    """The page of a stage-1 and a stage-2 adapter with a folder to search."""
    pytest.importorskip("gradio", reason="the page needs pip install '.[web]'")
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, "stages/web.py", str(runs / "s1"), str(runs / "s2"), "--port", "0", "--device", "cpu"]
    command += ["--folder", str(tiny.records.parent), "--cache", str(folder / "cache"), "--max-upload-mb", "1"]
    command += ["--data-folder", str(folder / "uploads")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            match = PRINTED.search(process.stdout.readline())
            assert match, (folder / "log").read_text()
            yield Served(process, int(match[1]))
            process.send_signal(signal.SIGINT)
            assert process.wait(90) in (0, -signal.SIGINT, 130)
            assert "Traceback" not in (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()


def test_the_served_page_names_no_other_host_and_forbids_the_browser_to_ask_one(served):
    status, page, headers = served.ask("/")
    assert status == 200
    hosts = {urllib.parse.urlsplit(url).hostname for url in re.findall(r"https?://[^\"'\s<>\\]+", page.decode())}
    assert hosts <= {"127.0.0.1"}
    assert "default-src 'self'" in headers["content-security-policy"]
    assert set(re.findall(rb"https?://[\w.]+", served.ask("/theme.css")[1])) <= {b"http://www.w3.org"}, "names of SVG"


def test_no_path_gets_a_file_that_was_not_uploaded(served, tiny, runs, tmp_path):
    content = (tiny.records.parent / "00.png").read_bytes()
    kept = served.upload("../../evil.png", content)
    assert Path(kept).name == "evil.png"
    assert served.ask(f"/gradio_api/file={kept}")[:2] == (200, content)
    uploads = Path(kept).parent.parent
    (uploads / "link.png").symlink_to(tiny.records.parent / "00.png")
    secrets = ["/etc/passwd", f"{tiny.records.parent}/00.png", str(REPO / "setup.cfg"), f"{uploads}/link.png",
               f"{kept}/../../../../../../../../../etc/passwd", "setup.cfg", "file:///etc/passwd"]  # fmt: skip
    for secret in secrets:
        quoted = urllib.parse.quote(secret, safe="")
        for path in (f"/gradio_api/file={secret}", f"/gradio_api/file={quoted}", f"/gradio_api/file/{secret}",
                     f"/file={secret}", f"/static/{quoted}", f"/assets/{quoted}", f"/assets/../../{secret}",
                     f"/assets/%2e%2e%2f%2e%2e%2f{quoted}"):  # fmt: skip
            status, body, _ = served.ask(path)
            assert status in (400, 403, 404), path
            assert b"root:" not in body
    (uploads / "link.png").unlink()


def test_a_form_that_names_a_file_of_the_server_is_refused(served, tiny):
    kept = served.upload("00.png", (tiny.records.parent / "00.png").read_bytes())
    secrets = [
        "/etc/passwd",
        str(tiny.records.parent / "00.png"),
        f"{kept}/../../../00.png",
        "http://127.0.0.1:1/a.png",
        3,
        [kept],
    ]
    for path in secrets:
        for data in ([form(path)], [[form(path)]], [{"video": form(path)}]):
            assert served.join("thief", "upload", data) == 403
    assert served.join("honest", "upload", [form(kept), *WRITTEN]) == 200
    assert served.messages("honest")[-2]["success"]


def test_an_upload_too_large_and_a_request_under_another_name_are_refused(served):
    status, _, _ = served.ask("/gradio_api/upload", bytes(3_000_000), **{"Content-Type": "multipart/form-data"})
    assert status == 413
    assert served.ask("/", Host="evil.example")[0] == 400


def test_visitors_wait_in_one_queue_and_are_told_their_place_and_for_how_long(served, tiny):
    image = (tiny.records.parent / "00.png").read_bytes()
    lines = "\n".join(f"a red square on the left of a grey field {n}" for n in range(CANDIDATES))
    sessions = [f"waiting{n}" for n in range(6)]
    for session in sessions:
        kept = served.upload("00.png", image)
        assert served.join(session, "upload", [form(kept), *WRITTEN]) == 200
        served.messages(session)
    for session in sessions:
        assert served.join(session, "rank", [None, "s1", lines, ""]) == 200
    told: dict[str, list[dict]] = {}
    threads = [threading.Thread(target=lambda s=s: told.update({s: served.messages(s)})) for s in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(messages[-1]["msg"] == "close_stream" for messages in told.values())
    done = [m for messages in told.values() for m in messages if m["msg"] == "process_completed"]
    assert len(done) == 6
    assert all("a red square" in m["output"]["data"][0] for m in done)
    places = [m for messages in told.values() for m in messages if m["msg"] == "estimation"]
    assert max(m["rank"] for m in places) >= 2
    assert any(m["rank_eta"] is not None for m in places)


def test_everything_that_calls_a_model_runs_one_at_a_time(desk):
    pytest.importorskip("gradio", reason="the page needs pip install '.[web]'")
    from qformer.web.page import build_page

    queued = [function for function in build_page(desk).fns.values() if function.queue]
    assert len(queued) >= 8
    assert {(function.concurrency_id, function.concurrency_limit) for function in queued} == {("model", 1)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--folder", "nowhere"], "--folder nowhere: no such folder; expected one with pictures"),
        (["--port", "taken"], "cannot be listened on ([Errno 98] Address already in use"),
        (["--max-upload-mb", "0"], "--max-upload-mb 0.0: expected more than 0"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(runs, tmp_path, options, line, capsys):
    sys.modules.get("gradio") or pytest.importorskip("gradio", reason="the page needs pip install '.[web]'")
    from qformer.stages import web

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        options = [str(taken.getsockname()[1]) if word == "taken" else word for word in options]
        port = [] if "--port" in options else ["--port", "0"]
        with pytest.raises(SystemExit) as stopped:
            web.main([str(runs / "s1"), *options, *port, "--device", "cpu", "--cache", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1, one_line(said)


def test_without_gradio_the_extra_is_named(runs, monkeypatch, capsys):
    from qformer.stages import web

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        web.main([str(runs / "s1"), "--port", "0"])
    assert "pip install 'qformer[web]'" in capsys.readouterr().err
