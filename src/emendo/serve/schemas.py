"""The bodies of requests and answers.

Those of OpenAI's endpoints have its names, with ``edits`` and ``emendo`` added.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=200_000)]
Line = Annotated[str, StringConstraints(max_length=10_000)]
Name = Annotated[str, StringConstraints(max_length=200)]
Choosing = (
    Literal["auto", "off"] | Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(max_length=64)]
)


class _Body(BaseModel):
    """A body whose unknown fields are ignored, as OpenAI's clients expect of servers."""

    model_config = ConfigDict(extra="ignore")


# ---------------------------------------------------------------------------------------------- questions


class Sampling(_Body):
    """What completions and chats have in common."""

    model: Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Line | Annotated[list[Line], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    edits: Choosing = Field(
        "auto", description="auto: the router decides; off: the base model; a list: exactly these edits."
    )


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


class Message(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextPart(_Body):
    """A part of a turn."""

    type: Literal["text"]
    text: Text


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None


# ------------------------------------------------------------------------------------------------ answers


class InForceBody(BaseModel):
    """An edit that was in force."""

    id: int
    score: float | None = Field(description="Of the router; null where the request named the edit.")
    in_weights: bool = False
    digest: str


class EmendoBody(BaseModel):
    """What emendo adds to an answer or a choice."""

    operation: int = Field(description="Number of the ledger's operation after which this holds.")
    edits: list[InForceBody]
    best: int | None = Field(description="The edit with the highest score, in force or not.")
    score: float | None
    threshold: float | None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelBody(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["emendo"] = "emendo"


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    class Error(BaseModel):
        """The error."""

        model_config = ConfigDict(extra="allow")
        message: str
        type: str
        param: str | None = None
        code: str | None = None

    error: Error


# -------------------------------------------------------------------------------------------------- edits


class NewEditBody(_Body):
    """``POST /v1/edits``."""

    model_config = ConfigDict(extra="forbid")
    prompt: Line
    target: Line
    paraphrases: Annotated[list[Line], Field(max_length=64)] = []
    subject: Name | None = None
    aliases: Annotated[list[Name], Field(max_length=64)] = []
    note: Line = ""
    force: bool = Field(False, description="Apply it even if the guard refuses it; the ledger records that.")
    by: Name | None = Field(None, description="Your name, where no token says it.")


class EditBody(BaseModel):
    """An edit of the ledger."""

    id: int
    active: bool
    requests: list[dict[str, Any]]
    editor: str
    made: str
    applied: str
    by: str
    note: str
    forced: bool
    in_weights: bool
    digest: str


class FullEditBody(EditBody):
    """An edit with the guard's figures and the answers before and after it."""

    scope: dict[str, Any] | None
    health: dict[str, Any] | None
    before_after: list[dict[str, Any]]
    operations: list[dict[str, Any]]


class EditList(BaseModel):
    """``GET /v1/edits``."""

    operation: int
    total: int
    data: list[EditBody]


class StepBody(BaseModel):
    """A step of the ledger."""

    id: int | None = Field(description="The edit, where there is one.")
    operation: int
    kind: str
    edits: list[int]
    active: int = Field(description="Number of edits that are active now.")
    at: str
    by: str
    note: str
    forced: bool
    health: dict[str, Any] | None


class UndoBody(_Body):
    """``POST /v1/undo``."""

    model_config = ConfigDict(extra="forbid")
    n: Annotated[int, Field(ge=1, lt=2**31)] = 1
    note: Line = ""
    by: Name | None = None


class NewTagBody(_Body):
    """``POST /v1/tags``."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    operation: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    by: Name | None = None


class TagBody(BaseModel):
    """A name of a state."""

    name: str
    operation: int
    at: str
    by: str


class WhyBody(_Body):
    """``POST /v1/why``."""

    model_config = ConfigDict(extra="forbid")
    prompt: Text
    model: Name | None = None
