"""The page: what is on it, and which control starts what. It knows Gradio and nothing of models; `desk.py` does the work."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from qformer.messages import EMPTY_ANSWER, one_line
from qformer.web.adapters import LOOK, MATCH, SEARCH, WRITE
from qformer.web.desk import TEXT_CHARACTERS, Desk, Writing
from qformer.web.style import heading, notice, ranking
from qformer.web.uploads import shown

logger = logging.getLogger(__name__)
QUEUE = 64  # visitors that may wait; one more is told to come back
KEEP_S = 3600  # uploads are deleted after
# One at a time over all visitors: they wait in one queue, and are told their place and how long it takes.
IN_TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
DROP = "Drop a photo or video here"


def build_page(desk: Desk) -> gr.Blocks:
    """The page over a desk, its queue on."""
    with gr.Blocks(title="Ask a picture", analytics_enabled=False, delete_cache=(600, KEEP_S)) as page:
        gr.HTML(heading(desk.adapters.line()), elem_id="head")
        path, turns = gr.State(None), gr.State([])  # of this visitor alone
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                upload = gr.File(label=DROP, height=130, elem_id="upload")
                message = gr.HTML(elem_id="message", elem_classes="notice", visible=False)
                picture = gr.Image(
                    label="As the model reads it", interactive=False, buttons=[], elem_id="picture", format="png",
                    alt_text="the uploaded picture", visible=False,
                )  # fmt: skip
                caption = gr.Textbox(label="Caption", interactive=False, elem_id="caption", lines=2)
                again = gr.Button("Caption again", elem_id="again")
                writer, writing = _writing_controls(desk)
            with gr.Column(scale=6, min_width=320), gr.Tabs():
                chat = _ask_tab(desk, path=path, turns=turns, writer=writer, writing=writing)
                looked = _look_tab(desk, path=path, turns=turns, caption=caption)
                ranked = _match_tab(desk, path)
                _search_tab(desk)
        able = bool(desk.adapters.able(WRITE))
        again.interactive = able
        caption.placeholder = "" if able else desk.adapters.lack(WRITE)

        # An upload is one event with its caption. Gradio 6 closes a visitor's stream when no event is left, and never answers
        # one that begins in that moment, as a caption of its own did beside the next upload.
        def receive(file: str | None, name: str, *values: Any) -> Iterator[dict[Any, Any]]:
            """Shows an upload, or why it is refused, then its caption; whatever belonged to the one before is gone."""
            with _in_words():
                image, line = None, ""
                try:
                    image = shown(desk.receive(file)) if file else None
                except ValueError as error:
                    file, line = None, str(error)
                yield {
                    path: file, turns: [], chat: [], caption: "", ranked: "", message: _alert(line),
                    picture: gr.update(value=image, visible=image is not None),
                    **dict(zip(looked, ("", [], []), strict=True)),
                }  # fmt: skip
                try:
                    yield {caption: write(file, name, *values)}
                except ValueError as error:  # as an error of Gradio it would cost the upload that waits behind this one
                    yield {message: _alert(one_line(error))}

        def write(file: str | None, name: str, *values: Any) -> str:
            return desk.caption(name, file, Writing(*values)) if file and able else ""

        gr.on(
            [upload.upload, upload.clear], receive, [upload, writer, *writing],
            [path, turns, picture, message, caption, chat, ranked, *looked], show_progress_on=[upload, caption],
            trigger_mode="always_last", **IN_TURN,  # an upload while the one before is still read is not lost
        )  # fmt: skip
        again.click(_in_words()(write), [path, writer, *writing], caption, **IN_TURN)
    return page.queue(max_size=QUEUE, api_open=False)


def _picker(desk: Desk, task: str, label: str) -> gr.Dropdown:
    """Which adapter does it; hidden where there is no choice."""
    names = desk.adapters.able(task)
    first = next(iter([*desk.adapters.able(WRITE), *names] if task == LOOK else names), None)  # answers have words
    return gr.Dropdown(names, value=first, label=label, visible=len(names) > 1)


def _writing_controls(desk: Desk) -> tuple[gr.Dropdown, list[Any]]:
    """How captions and answers are written, with the defaults of the adapter's config."""
    able = desk.adapters.able(WRITE)
    writer = _picker(desk, WRITE, "Captions and answers by")
    default = Writing.of(desk.adapters.models[able[0]]) if able else Writing(False, 5, 1.0, 0.9, "", "{}")
    with gr.Accordion("How it writes", open=False, elem_id="writing"):
        sample = gr.Checkbox(
            default.sample, label="Sample", info="draw words instead of searching with beams", interactive=bool(able)
        )
        beams = gr.Slider(1, max(10, default.beams), default.beams, step=1, label="Beams", interactive=bool(able))
        temperature = gr.Slider(
            0.1, 2, default.temperature, step=0.1, label="Temperature", info="of a sample", interactive=bool(able)
        )
        top_p = gr.Slider(0.05, 1, default.top_p, step=0.05, label="Top p", info="of a sample", interactive=bool(able))
        prompt = gr.Textbox(
            default.caption_prompt, label="Prompt of a caption", info="text that the caption continues",
            max_length=TEXT_CHARACTERS, interactive=bool(able),
        )  # fmt: skip
        question = gr.Textbox(
            default.question_prompt, label="Prompt of a question", info="{} is where the question goes",
            max_length=TEXT_CHARACTERS, interactive=bool(able),
        )  # fmt: skip
    controls = [sample, beams, temperature, top_p, prompt, question]

    def defaults(name: str) -> list[Any]:
        w = Writing.of(desk.adapters.choose(WRITE, name))
        return [w.sample, w.beams, w.temperature, w.top_p, w.caption_prompt, w.question_prompt]

    writer.input(_in_words()(defaults), writer, controls, queue=False, api_visibility="private")
    return writer, controls


def _ask_tab(desk: Desk, *, path: gr.State, turns: gr.State, writer: gr.Dropdown, writing: Sequence[Any]) -> gr.Chatbot:
    """Questions and answers, one conversation a picture."""
    with gr.Tab("Ask", id="ask"):
        lack = desk.adapters.lack(WRITE)
        gr.HTML(notice(lack), visible=bool(lack), elem_classes="notice")
        chat = gr.Chatbot(
            label="Conversation", elem_id="chat", height=340, buttons=[], feedback_options=None, render_markdown=False,
            placeholder="Questions about the picture and their answers",
        )  # fmt: skip
        question = gr.Textbox(
            label="Question", placeholder="what colour is it?", elem_id="question", max_length=TEXT_CHARACTERS,
            interactive=not lack,
        )  # fmt: skip
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask", interactive=not lack)
            anew = gr.Button("New conversation", elem_id="anew", interactive=not lack)

    def answer(file: str | None, before: list[Any], name: str, asked: str, *values: Any) -> list[Any]:
        conversation = [tuple(turn) for turn in before]
        desk.answer(name, file, asked, turns=conversation, writing=Writing(*values))
        return [conversation, _messages(conversation), ""]

    for start in (ask.click, question.submit):
        start(_in_words()(answer), [path, turns, writer, question, *writing], [turns, chat, question], **IN_TURN)
    gr.on([anew.click, chat.clear], lambda: ([], []), None, [turns, chat], queue=False, api_visibility="private")
    return chat


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The conversation as the Chatbot takes it, which would show a visitor's tags as HTML."""
    return [
        {"role": role, "content": escape(text or EMPTY_ANSWER, quote=False)}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _look_tab(desk: Desk, *, path: gr.State, turns: gr.State, caption: gr.Textbox) -> list[Any]:
    """Where the queries look, and what on the picture speaks for each word."""
    with gr.Tab("Attention", id="look"):
        looker = _picker(desk, LOOK, "Attention of")
        text = gr.Textbox(
            label="Text", elem_id="looked_for", max_length=TEXT_CHARACTERS,
            info="whose words are looked for; empty = the last answer, before a question the caption",
        )  # fmt: skip
        look = gr.Button("Show attention", variant="primary", elem_id="look")
        line = gr.HTML(elem_id="look_line")
        words, queries = (
            gr.Gallery(
                label=label, object_fit="contain", interactive=False, buttons=[], height="auto",
                format="jpeg", elem_id=f"look_{label.lower()}", elem_classes="tiles",
            )
            for label in ("Words", "Queries")
        )  # fmt: skip

    def show(file: str | None, name: str, *rest: Any) -> list[Any]:
        of, written, before = rest
        turn = (before[-1][0], before[-1][1]) if before else None
        maps = desk.look(name, file, of or ("" if turn else written), turn)
        return [notice(maps.line), maps.words, maps.queries]

    outputs = [line, words, queries]
    look.click(_in_words()(show), [path, looker, text, caption, turns], outputs, **IN_TURN)
    return outputs


def _match_tab(desk: Desk, path: gr.State) -> gr.HTML:
    """Captions in the order of how well they fit."""
    with gr.Tab("Match", id="match"):
        matcher = _picker(desk, MATCH, "Matching by")
        lines = gr.Textbox(
            label="Captions, one a line", lines=5, elem_id="lines", placeholder="a red circle\na blue square"
        )
        question = gr.Textbox(
            label="Question that they answer", elem_id="of_question", max_length=TEXT_CHARACTERS,
            info="empty = they are captions; adapters of stage 2 only", visible=bool(desk.adapters.able(WRITE)),
        )  # fmt: skip
        rank = gr.Button("Rank", variant="primary", elem_id="rank")
        table = gr.HTML(elem_id="ranking")

    def order(file: str | None, name: str, text: str, asked: str) -> str:
        candidates = desk.rank(name, file, text, asked)
        return ranking(candidates, f"{len(candidates)} texts by {name}, the best first")

    rank.click(_in_words()(order), [path, matcher, lines, question], table, **IN_TURN)
    return table


def _search_tab(desk: Desk) -> None:
    """Pictures of the folder by words."""
    with gr.Tab("Search", id="search"):
        lack = desk.adapters.lack(SEARCH)
        if not lack and desk.folder is None:
            lack = "There is no folder to search; start the page with --folder PICTURES."
        count = 0 if desk.folder is None else len(desk.folder.names)
        gr.HTML(notice(lack or f"{count} pictures in the folder."), elem_classes="notice")
        searcher = _picker(desk, SEARCH, "Search by")
        text = gr.Textbox(
            label="What is on the picture?", elem_id="sought", max_length=TEXT_CHARACTERS, interactive=not lack
        )
        number = gr.Slider(1, 24, 8, step=1, label="Pictures to show", interactive=not lack)
        find = gr.Button("Search", variant="primary", elem_id="find", interactive=not lack)
        gallery = gr.Gallery(
            label="Pictures",
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_id="hits",
            height="auto",
        )

    def search(name: str, sought: str, most: int) -> list[Any]:
        return [(hit.thumbnail, f"{hit.cosine:.2f} {hit.name}") for hit in desk.search(name, sought, most)]

    for start in (find.click, text.submit):
        start(_in_words()(search), [searcher, text, number], gallery, **IN_TURN)


@contextmanager
def _in_words() -> Iterator[None]:
    """In it, and in a function that it decorates, errors reach the visitor in one line; one that is no visitor's is logged."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(one_line(error), title="Not done", duration=None, print_exception=False) from None
    except Exception as error:
        logger.exception("the page: %s", one_line(error))
        line = "Something went wrong here; whoever started the page sees what in its terminal."
        raise gr.Error(line, title="Not done", duration=None, print_exception=False) from None


def _alert(line: str) -> dict[str, Any]:
    """The update of the line under the upload, which is hidden where there is nothing to say."""
    return gr.update(value=notice(line, alert=True), visible=bool(line))
