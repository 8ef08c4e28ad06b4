"""Answers held to a JSON schema: told to the engine, checked on the way out, asked for once more."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from registry.answer_schema import compiled
from registry.errors import RecipeError
from registry.serve_recipe import RouteTerms, StructuredAnswer, load_serve_recipe
from serving.ask import Ask
from serving.structured import Held, Unfit, is_closed, repairing, texts_of
from tests.fakes.told import Told
from tests.serving.test_chain import Line, on_line

SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["card", "loan"]}, "sure": {"type": "number"}},
    "required": ["label", "sure"],
    "additionalProperties": False,
}
GOOD, OTHER = '{"label": "card", "sure": 0.5}', '{"label": "loan", "sure": 1}'
BAD = '{"label": "cards", "sure": 0.5}'


def held(repair: bool = True, **more: Any) -> dict[str, Any]:
    return {"model": "tickets", "answer": {"schema": SCHEMA, "repair": repair}, **more}


def test_the_engine_is_told_the_routes_schema() -> None:
    async def test(here: Line) -> None:
        here.ours.answers = [GOOD]
        told = await here.ask(held())
        assert (told.status, told.said) == (200, GOOD)
        wanted = {"name": "tickets", "schema": SCHEMA, "strict": True}
        assert here.ours.seen[0][1]["response_format"] == {"type": "json_schema", "json_schema": wanted}
        assert int(told.headers["content-length"]) == len(told.body)
        assert not here.counted.repairs

    on_line(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bad", [BAD, "Sure! " + GOOD, "", '{"label": "card", "sure": NaN}', "[" * 5000])
def test_an_answer_that_does_not_fit_is_asked_for_once_more(bad: str, stream: bool) -> None:
    async def test(here: Line) -> None:
        here.ours.answers = [bad, GOOD]
        told = await here.ask(held(), stream=stream)
        assert (told.status, told.said, told.headers["x-ft-adapter"]) == (200, GOOD, "tickets@2")
        assert told.is_whole is stream
        first, second = (body["messages"] for _, body in here.ours.seen)
        assert second[: len(first)] == first
        assert second[-1]["role"] == "user"
        assert "does not fit" in second[-1]["content"]
        assert [each["content"] for each in second[1:-1]] == ([bad] if bad else [])
        assert here.counted.repairs == [("tickets", True)]

    on_line(test)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_still_does_not_fit_never_goes_out(stream: bool) -> None:
    async def test(here: Line) -> None:
        here.ours.answers = [BAD, BAD, GOOD]
        refusal = await here.refused(held(), stream=stream)
        assert (refusal.status, refusal.code) == (502, "answer_does_not_fit")
        assert "$.label" in refusal.message
        assert len(here.ours.seen) == 2
        assert here.counted.repairs == [("tickets", False)]

    on_line(test)


def test_without_repair_nothing_is_asked_again() -> None:
    async def test(here: Line) -> None:
        here.ours.answers = [BAD]
        refusal = await here.refused(held(repair=False))
        assert (refusal.status, refusal.code) == (502, "answer_does_not_fit")
        assert len(here.ours.seen) == 1

    on_line(test)


def test_without_repair_a_stream_goes_out_as_it_comes_and_its_end_tells() -> None:
    async def test(here: Line) -> None:
        here.ours.words = ('{"label": "card",', ' "sure": 1}')
        here.ours.faults = ["stall"]
        told = Told()
        asking = asyncio.create_task(here.ask(held(repair=False), told, stream=True))
        async with asyncio.timeout(3):
            while not told.body:
                await asyncio.sleep(0.01)
        assert not told.is_over
        here.ours.gate.set()
        await asking
        assert (told.said, told.is_whole) == ('{"label": "card", "sure": 1}', True)
        here.ours.answers = [BAD]
        told = await here.ask(held(repair=False), stream=True)
        assert told.said == BAD
        assert told.events[-1]["error"]["code"] == "answer_does_not_fit"
        assert (told.is_over, told.is_whole) == (True, False)
        assert b"[DONE]" not in told.body
        here.ours.faults = ["cut"]
        told = await here.ask(held(repair=False), stream=True)
        assert told.events[-1]["error"]["code"] == "engine_broke"

    on_line(test)


def test_a_kept_back_stream_that_breaks_is_asked_of_the_next_one() -> None:
    async def test(here: Line) -> None:
        here.ours.words, here.ours.faults = (GOOD[:5], GOOD[5:]), ["cut"]
        here.big.answers = [OTHER]
        told = await here.ask(held(fallbacks=[{"engine": "big"}]), stream=True)
        assert (told.said, told.is_whole) == (OTHER, True)
        assert told.headers["x-ft-fallback"] == "1"

    on_line(test)


def test_a_repair_that_breaks_is_asked_of_the_next_one() -> None:
    async def test(here: Line) -> None:
        here.ours.answers, here.big.answers = [BAD], [OTHER]

        async def fail_then() -> None:
            async with asyncio.timeout(3):
                while len(here.ours.seen) < 1:
                    await asyncio.sleep(0)
            here.ours.faults = ["close"]

        failing = asyncio.create_task(fail_then())
        here.ours.faults = []
        told = await here.ask(held(fallbacks=[{"engine": "big"}]))
        await failing
        assert told.said == OTHER

    on_line(test)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_a_request_that_wants_another_form_is_refused(more: dict[str, Any], param: str) -> None:
    async def test(here: Line) -> None:
        refusal = await here.refused(held(), **more)
        assert (refusal.status, refusal.code, refusal.param) == (400, "answer_is_held", param)
        assert not here.ours.seen

    on_line(test)


def test_a_request_with_the_routes_own_schema_is_taken() -> None:
    async def test(here: Line) -> None:
        here.ours.answers = [GOOD]
        given = {"type": "json_schema", "json_schema": {"name": "mine", "schema": SCHEMA}}
        assert (await here.ask(held(), response_format=given, tools=[])).status == 200

    on_line(test)


def test_what_the_engine_refuses_is_passed_on_unchecked() -> None:
    async def test(here: Line) -> None:
        here.ours.faults = ["refuse"]
        told = await here.ask(held())
        assert told.status == 400
        assert len(here.ours.seen) == 1

    on_line(test)


def test_a_route_without_a_schema_passes_on_what_a_caller_wants() -> None:
    async def test(here: Line) -> None:
        given = {"type": "json_schema", "json_schema": {"name": "mine", "schema": {"type": "objekt"}}}
        assert (await here.ask(response_format=given)).status == 200
        assert here.ours.seen[0][1]["response_format"] == given

    on_line(test)


def test_every_choice_is_checked() -> None:
    def body(*texts: str) -> bytes:
        choices = [{"index": place, "message": {"content": text}} for place, text in enumerate(texts)]
        return json.dumps({"choices": choices}, indent=1).encode()

    here = Held("tickets", StructuredAnswer(schema=SCHEMA))
    assert texts_of(body(GOOD, OTHER)) == [GOOD, OTHER]
    assert asyncio.run(here.unfit(texts_of(body(GOOD, OTHER)))) is None
    unfit = asyncio.run(here.unfit(texts_of(body(GOOD, BAD))))
    assert unfit is not None
    assert unfit.text == BAD
    for nothing in (b'{"choices": []}', b'{"choices": [{"message": {"content": null, "tool_calls": []}}]}'):
        assert asyncio.run(here.unfit(texts_of(nothing))) is not None


def test_others_go_on_while_a_long_answer_is_checked() -> None:
    here = Held("numbers", StructuredAnswer(schema={"type": "array", "items": {"type": "integer", "minimum": 0}}))
    ticks = []

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.001)
            ticks.append(1)

    async def test() -> Unfit | None:
        ticking = asyncio.create_task(tick())
        try:
            return await here.unfit([json.dumps([*range(50_000), -1])])
        finally:
            ticking.cancel()

    unfit = asyncio.run(test())
    assert unfit is not None
    assert unfit.why.startswith("$[50000]")
    assert len(ticks) > 5


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_a_streams_events_are_put_together_by_choice(end: str) -> None:
    events = [
        {"choices": [{"index": 1, "delta": {"content": "b"}}]},
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "가"}}, {"index": 1, "text": "c"}]},
        {"choices": [], "usage": {}},
    ]
    body = "".join(f"data: {json.dumps(each)}{end}" for each in events) + f": comment{end}data: [DONE]{end}"
    assert texts_of(body.encode()) == ["가", "bc"]
    assert texts_of(b"garbage") == []


def test_a_completion_is_repaired_in_its_prompt() -> None:
    here = Held("tickets", StructuredAnswer(schema=SCHEMA))
    unfit = asyncio.run(here.unfit([BAD]))
    assert unfit is not None
    repaired = repairing({"prompt": "What?", "max_tokens": 5}, unfit)
    assert repaired is not None
    assert repaired["prompt"].startswith("What?" + BAD)
    assert repairing({"prompt": [1, 2]}, unfit) is None


def test_only_a_closed_schema_is_called_strict() -> None:
    assert is_closed(SCHEMA)
    assert not is_closed({**SCHEMA, "required": ["label"]})
    assert not is_closed({"type": "array", "items": {"type": "object"}})


BROKEN = [
    ({"type": "objekt"}, "no JSON schema"),
    ({"pattern": "("}, "no JSON schema"),
    ({"$ref": "#"}, "without end"),
    ({"$ref": "#/$defs/nowhere"}, "does not exist"),
    ({"properties": {"a": {"$ref": "https://schemas.example/a.json"}}}, "nothing is fetched"),
    ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "nothing is fetched"),
]


@pytest.mark.parametrize(("schema", "says"), BROKEN)
def test_a_schema_that_cannot_be_compiled_is_an_error_of_the_recipe(
    schema: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=says):
        StructuredAnswer(schema=schema)
    recipe = {"kind": "serve", "engines": {"one": {"base": "x/y"}},
              "routes": {"labels": {"model": "m", "answer": {"schema": schema}}}}  # fmt: skip
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    with pytest.raises(RecipeError) as caught:
        load_serve_recipe(path)
    assert "routes.labels.answer" in str(caught.value)
    assert says in str(caught.value)


def test_references_within_a_schema_are_fine() -> None:
    tree = {"type": "object", "properties": {"of": {"$ref": "#"}, "as": {"$ref": "#/$defs/word"}},
            "$defs": {"word": {"type": "string"}}, "examples": [{"$ref": "https://not.fetched"}]}  # fmt: skip
    check = compiled(tree)
    assert check.is_valid({"of": {"as": "x"}})
    assert not check.is_valid({"of": {"as": 1}})


def test_embeddings_are_no_answers() -> None:
    async def test(here: Line) -> None:
        asked, told = {"model": "tickets", "input": "x"}, Told()
        terms = RouteTerms.model_validate(held())
        await here.chain.answer(
            Ask("/v1/embeddings", asked, "tickets", "tickets", terms, False, [], user="s"), told.send
        )
        assert told.status == 200
        assert "response_format" not in here.ours.seen[0][1]

    on_line(test)
