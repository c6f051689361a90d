"""OpenAI's endpoints, asked by its own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from fastapi import FastAPI
from openai import AsyncOpenAI

from emendo.edits.edit import compose
from emendo.ledger.workspace import Workspace
from serve.samples import FACT, MODEL, OTHER, PLAIN, ask, ask_openai, completed

Served = tuple[FastAPI, Workspace]
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0}


def in_force(answer: Any) -> list[int]:
    return [edit["id"] for edit in answer.emendo["edits"]]


def test_the_models(served: Served) -> None:
    async def calls(client: AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()]

    assert ask_openai(served[0], calls) == [MODEL, f"{MODEL}@base", f"{MODEL}@first"]


def test_a_completion_is_the_routed_answer(served: Served) -> None:
    app, work = served

    async def calls(client: AsyncOpenAI) -> None:
        for prompt, edits in ((FACT["prompt"], [1]), (OTHER["prompt"], [2]), (PLAIN, [])):
            found = await client.completions.create(prompt=prompt, **GREEDY)
            (choice,) = found.choices
            with work.applied() as routed:
                assert choice.text == routed.generate(prompt, 6)
            assert in_force(found) == edits and in_force(choice) == edits
            assert found.usage and found.usage.completion_tokens == 6 and choice.finish_reason == "length"
            assert found.usage.prompt_tokens == len(work.lm.prompt_texts([prompt])[0].inputs)

    ask_openai(app, calls)


def test_rows_of_one_request_have_edits_of_their_own(served: Served) -> None:
    prompts = [FACT["prompt"], PLAIN, OTHER["prompt"], "The river in Dorumi is called"]

    async def calls(client: AsyncOpenAI) -> None:
        raw = await client.completions.with_raw_response.create(prompt=prompts, n=2, **GREEDY)
        together = raw.parse()
        alone = [await client.completions.create(prompt=prompt, **GREEDY) for prompt in prompts]
        want = [each.choices[0].text for each in alone for _ in range(2)]
        assert [choice.text for choice in together.choices] == want
        assert [in_force(choice) for choice in together.choices] == [in_force(e) for e in alone for _ in "xx"]
        named = raw.headers["x-emendo-edits"].split(", ")
        assert [each.partition(";")[0] for each in named] == [
            "1",
            "1",
            "none",
            "none",
            "2",
            "2",
            "none",
            "none",
        ]

    ask_openai(served[0], calls)


def test_the_body_chooses_the_edits(served: Served) -> None:
    app, work = served
    prompt, base = FACT["prompt"], work.lm.generate(FACT["prompt"], 6)
    both = compose([work.edit(1), work.edit(2)])
    with both.applied(work.lm) as edited:
        added = edited.generate(prompt, 6)
    with work.edit(2).applied(work.lm) as edited:
        other = edited.generate(prompt, 6)

    async def text(client: AsyncOpenAI, model: str, edits: object) -> str:
        values = GREEDY | {"model": model}
        found = await client.completions.create(prompt=prompt, extra_body={"edits": edits}, **values)
        return found.choices[0].text

    async def calls(client: AsyncOpenAI) -> None:
        assert await text(client, MODEL, "off") == base
        assert await text(client, f"{MODEL}@base", "auto") == base
        assert await text(client, f"{MODEL}@0", "auto") == base
        assert await text(client, MODEL, [2]) == other
        assert await text(client, MODEL, [1, 2, 1]) == added
        assert await text(client, f"{MODEL}@first", "auto") == await text(client, MODEL, "auto") != base
        with pytest.raises(openai.BadRequestError, match="not active"):
            await text(client, f"{MODEL}@first", [2])
        with pytest.raises(openai.BadRequestError, match="not active"):
            await text(client, MODEL, [9])

    ask_openai(app, calls)


def test_a_stream_is_the_same_answer_in_pieces(served: Served) -> None:
    async def calls(client: AsyncOpenAI) -> None:
        whole = await client.completions.create(prompt=FACT["prompt"], **GREEDY)
        stream = await client.completions.create(
            prompt=FACT["prompt"], stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = [chunk async for chunk in stream]
        assert len(chunks) > 3
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].usage == whole.usage and in_force(chunks[0]) == [1]

    ask_openai(served[0], calls)


def test_a_conversation(served: Served) -> None:
    app, work = served
    user = {"role": "user", "content": FACT["prompt"]}
    turns = [{"role": "system", "content": "Be brief."}, user, {"role": "assistant", "content": "Oslo"}]

    async def calls(client: AsyncOpenAI) -> None:
        found = await client.chat.completions.create(messages=[user], **GREEDY)
        with work.applied() as routed:
            assert found.choices[0].message.content == routed.reading(chat=True).generate(user["content"], 6)
        assert in_force(found) == [1]
        stream = await client.chat.completions.create(messages=[user], stream=True, **GREEDY)
        deltas = [chunk.choices[0].delta async for chunk in stream]
        assert "".join(each.content or "" for each in deltas) == found.choices[0].message.content
        assert [each.role for each in deltas][:2] == ["assistant", None]
        parts = [{"role": "user", "content": [{"type": "text", "text": PLAIN}]}]
        later = await client.chat.completions.create(messages=[*turns, *parts], **GREEDY)
        assert in_force(later) == []
        again = {"role": "user", "content": "Say it again."}  # "it" may stand for what an earlier turn names
        assert in_force(await client.chat.completions.create(messages=[*turns, again], **GREEDY)) == [1]
        asked = {"role": "user", "content": OTHER["prompt"]}
        assert in_force(await client.chat.completions.create(messages=[*turns, asked], **GREEDY)) == [2]

    ask_openai(app, calls)


def test_stop_texts_end_an_answer_and_are_not_part_of_it(served: Served) -> None:
    async def calls(client: AsyncOpenAI) -> None:
        values = GREEDY | {"max_tokens": 12, "prompt": PLAIN}
        whole = (await client.completions.create(**values)).choices[0].text
        stop = whole[3:5]
        want = whole[: whole.index(stop)]
        found = await client.completions.create(stop=["never", stop], **values)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (want, "stop")
        stream = await client.completions.create(stop=stop, stream=True, **values)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == want

    ask_openai(served[0], calls)


def test_a_seed_gives_the_same_samples(served: Served) -> None:
    async def calls(client: AsyncOpenAI) -> None:
        async def text(seed: int, **more: Any) -> list[str]:
            values = GREEDY | {"temperature": 1.0, "seed": seed, "prompt": PLAIN} | more
            return [choice.text for choice in (await client.completions.create(**values)).choices]

        assert await text(1) == await text(1) != await text(2)
        first, second = await text(1, n=2)
        assert [first, second] == [*(await text(1)), *(await text(2))]
        greedy = await client.completions.create(prompt=PLAIN, **GREEDY)
        assert await text(5, top_p=1e-6) == [greedy.choices[0].text]

    ask_openai(served[0], calls)


def test_log_probabilities_are_those_of_the_model(served: Served) -> None:
    app, work = served
    want = work.lm.next_logits([PLAIN])[0].log_softmax(-1)

    async def calls(client: AsyncOpenAI) -> None:
        found = (await client.completions.create(prompt=PLAIN, logprobs=3, **GREEDY)).choices[0].logprobs
        assert found and found.top_logprobs and len(found.tokens or []) == 6
        assert torch.tensor(found.token_logprobs)[0] == pytest.approx(float(want.max()), abs=1e-4)
        best = sorted(found.top_logprobs[0].values(), reverse=True)
        assert best == pytest.approx(want.topk(3).values.tolist(), abs=1e-4)
        chat = await client.chat.completions.create(
            messages=[{"role": "user", "content": PLAIN}], logprobs=True, top_logprobs=2, **GREEDY
        )
        tokens = chat.choices[0].logprobs
        assert tokens and tokens.content and [len(each.top_logprobs) for each in tokens.content] == [2] * 6

    ask_openai(app, calls)


@pytest.mark.parametrize(
    ("error", "body"),
    [
        (openai.NotFoundError, {"model": "another"}),
        (openai.NotFoundError, {"model": f"{MODEL}@no-such-tag"}),
        (openai.BadRequestError, {"prompt": "long " * 200}),
        (openai.BadRequestError, {"prompt": " "}),
        (openai.UnprocessableEntityError, {"temperature": -1}),
        (openai.UnprocessableEntityError, {"extra_body": {"edits": "on"}}),
    ],
)
def test_what_cannot_be_answered_is_refused(served: Served, error: type[Exception], body: Any) -> None:
    async def calls(client: AsyncOpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(error) as refused:
                await client.completions.create(**GREEDY | {"prompt": PLAIN, "stream": stream} | body)
            assert refused.value.body["message"]  # type: ignore[attr-defined]

    ask_openai(served[0], calls)


@pytest.mark.parametrize("path", ["completions", "edits", "why"])
def test_half_a_surrogate_pair_is_refused(served: Served, path: str) -> None:
    body = b'{"model": "tiny-llama", "prompt": "half \\ud800", "target": "x"}'
    body = body if path == "completions" else body.replace(b'"model": "tiny-llama", ', b"")
    body = body.replace(b', "target": "x"', b"") if path == "why" else body
    headers = {"content-type": "application/json"}
    reply = ask(served[0], lambda http: http.post(f"/v1/{path}", content=body, headers=headers))
    assert reply.status_code in (400, 422) and reply.json()["error"]["message"]


def test_the_answer_names_its_state(served: Served) -> None:
    found = ask(served[0], lambda http: completed(http, FACT["prompt"]))
    assert found["emendo"]["operation"] == 2
    assert found["emendo"]["score"] >= found["emendo"]["threshold"]
