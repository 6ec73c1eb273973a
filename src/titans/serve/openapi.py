"""The API's description, for `/openapi.json`."""

from typing import Any

from titans.serve.reading import PIECE as MOST_TOKENS_A_PIECE
from titans.serve.settings import ServeSettings

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
MAYBE_NUMBER: Schema = {"type": ["number", "null"]}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
SSE = "text/event-stream"
BINARY = "application/octet-stream"
BODY = (400, 408, 413, 415)  # of what reads a request's body
STATUS = {
    400: "The request is not understood; the message says what was expected.",
    401: "The server's token is missing or wrong.",
    403: "The request comes from a page of another site.",
    404: "No such session or model.",
    408: "The rest of the body did not come.",
    409: "The session is busy, or the memory belongs to another model or tokenizer.",
    413: "The body is too long.",
    415: "The body is of another kind than expected, or compressed.",
    421: "The Host header names another server.",
    429: "As many sessions, or requests at once, as may be.",
    507: "There is no room on the disk; nothing was changed.",
}


def description(settings: ServeSettings) -> Schema:
    """OpenAPI 3.1, with the limits that this server has."""
    schemas = {
        "Session": SESSION,
        "Answer": ANSWER,
        "Piece": PIECE,
        "Completion": COMPLETION,
        "CompletionRequest": completion_request(settings),
        "AskRequest": record(ask_fields(settings) | {"stream": {"type": "boolean"}}, "prompt"),
        "Error": record({"error": record({"message": TEXT, "type": TEXT, "code": MAYBE_TEXT})}),
    }
    described: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "titans serve",
            "version": "1",
            "description": "Sessions are memories that this server holds. Reading writes to one; "
            "asking leaves it as it is.",
        },
        "paths": PATHS,
        "components": {"schemas": schemas},
    }
    if settings.token is not None:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described


def record(properties: Schema, *required: str) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def content(**kinds: Schema) -> Schema:
    """By short names of media types."""
    names = {"json": "application/json", "events": SSE, "binary": BINARY, "text": "text/plain"}
    return {"content": {names[kind]: {"schema": schema} for kind, schema in kinds.items()}}


def operation(
    summary: str,
    answer: Schema,
    *errors: int,
    status: int = 200,
    body: Schema | None = None,
    query: Schema | None = None,
    public: bool = False,
) -> Schema:
    """public: anybody may ask for it, as often as they like."""
    always = (421,) if public else (401, 403, 421, 429)
    answers: Schema = {str(status): {"description": "Done.", **answer}}
    for code in sorted({*errors, *always}):
        answers[str(code)] = {"description": STATUS[code], **content(json=ref("Error"))}
    described: Schema = {"summary": summary, "responses": answers}
    if public:
        described["security"] = []
    if body is not None:
        described["requestBody"] = body
    if query is not None:
        described["parameters"] = [
            {"name": name, "in": "query", "schema": schema} for name, schema in query.items()
        ]
    return described


def ask_fields(settings: ServeSettings) -> Schema:
    return {
        "prompt": {**TEXT, "description": f"1 to {settings.prompt_tokens} tokens."},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": settings.max_tokens},
        "temperature": {**NUMBER, "minimum": 0, "default": 1},
        "top_p": {**NUMBER, "exclusiveMinimum": 0, "maximum": 1},
        "seed": {"type": "integer"},
        "stop": {"oneOf": [TEXT, listed(TEXT)]},
    }


def completion_request(settings: ServeSettings) -> Schema:
    ids = listed(COUNT)
    several = {"oneOf": [TEXT, listed(TEXT), ids, listed(ids)]}
    fields = ask_fields(settings) | {
        "model": {**TEXT, "description": "Default: the server's first."},
        "prompt": several,
        "n": {"type": "integer", "minimum": 1, "maximum": settings.choices},
        "stream": {"type": "boolean"},
        "stream_options": record({"include_usage": {"type": "boolean"}}),
        "session": {**TEXT, "description": "Answer with what this session remembers."},
    }
    return record(fields, "prompt")


SESSION = record(
    {
        "id": TEXT,
        "name": TEXT,
        "model": TEXT,
        "parent": {**MAYBE_TEXT, "description": "The session that this one was forked from."},
        "created": {**NUMBER, "description": "Seconds since 1970."},
        "used": {**NUMBER, "description": "Likewise, of its last change."},
        "tokens_read": COUNT,
        "state_bytes": {**COUNT, "description": "Does not grow with the tokens read."},
        "surprise": record(
            {
                "mean_nll": {**MAYBE_NUMBER, "description": "Nats a token."},
                "bits_per_token": MAYBE_NUMBER,
                "last_nll": MAYBE_NUMBER,
            }
        ),
    }
)
ANSWER = record(
    {
        "text": TEXT,
        "ids": listed(COUNT),
        "tokens": COUNT,
        "finish_reason": {"enum": ["stop", "length"]},
        "nll_prompt": {**listed(MAYBE_NUMBER), "description": "Nats of each token of the prompt."},
    }
)
PER_HEAD = listed(listed(NUMBER))
PER_TOKEN = listed(listed(listed(NUMBER)))
MAYBE_PER_TOKEN = {"oneOf": [PER_TOKEN, {"type": "null"}]}
PIECE = record(
    {
        "start": {**COUNT, "description": "Position of its first token."},
        "text": {**listed(TEXT), "description": "What each token adds to the text."},
        "ids": listed(COUNT),
        "nll": {**listed(MAYBE_NUMBER), "description": "Null for the first of a request."},
        "surprise": {**PER_TOKEN, "description": "Norm of the gradient, [memory][head][token]."},
        "learning_rate": PER_TOKEN,
        "momentum": MAYBE_PER_TOKEN,
        "decay": MAYBE_PER_TOKEN,
        "past_surprise": {
            "oneOf": [PER_HEAD, {"type": "null"}],
            "description": "Norm of the momentum after the piece, [memory][head].",
        },
        "moved": {**PER_HEAD, "description": "How far the weights are from M_0 after the piece."},
    }
)
CHOICE = record(
    {"index": COUNT, "text": TEXT, "logprobs": {"type": "null"}, "finish_reason": MAYBE_TEXT}
)
USAGE = record({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
COMPLETION = record(
    {
        "id": TEXT,
        "object": {"const": "text_completion"},
        "created": COUNT,
        "model": TEXT,
        "choices": listed(CHOICE),
        "usage": USAGE,
    }
)
READ = {"allOf": [ref("Session"), record({"read": COUNT})]}
IDENTIFIED = {"name": "id", "in": "path", "required": True, "schema": TEXT}
ONE_SESSION = content(json=ref("Session"))
NEW_SESSION = content(
    json=record(
        {
            "model": TEXT,
            "name": TEXT,
            "fork": {**TEXT, "description": "A session to copy, instead of a model."},
        }
    ),
    binary={"type": "string", "format": "binary", "description": "A memory file."},
)
ALIVE = content(json=record({"status": TEXT}))
HEALTH = operation("Is the server able to answer?", ALIVE, public=True)
HEALTH["responses"]["503"] = {"description": "Nothing is computed any more.", **ALIVE}
PATHS: Schema = {
    "/health": {"get": HEALTH},
    "/metrics": {"get": operation("Metrics in Prometheus' format", content(text=TEXT))},
    "/openapi.json": {"get": operation("This description", content(json=record({})))},
    "/v1/models": {
        "get": operation("The models, as OpenAI lists them", content(json=record({}))),
    },
    "/v1/models/{id}": {
        "parameters": [IDENTIFIED],
        "get": operation("One of them", content(json=record({})), 404),
    },
    "/v1/completions": {
        "post": operation(
            "Continue texts; streamed, each event is a Completion and the last one is [DONE]",
            content(json=ref("Completion"), events=TEXT),
            *(404, 409, *BODY),
            body=content(json=ref("CompletionRequest")),
        ),
    },
    "/v1/sessions": {
        "get": operation(
            "All sessions", content(json=record({"sessions": listed(ref("Session"))}))
        ),
        "post": operation(
            "A new session: from a model, from a memory file, or as a fork",
            ONE_SESSION,
            *(404, 409, 507, *BODY),
            status=201,
            body=NEW_SESSION,
            query={"name": TEXT, "model": TEXT},
        ),
    },
    "/v1/sessions/{id}": {
        "parameters": [IDENTIFIED],
        "get": operation("The session", ONE_SESSION, 404),
        "patch": operation(
            "Rename it",
            ONE_SESSION,
            *(404, 409, 507, *BODY),
            body=content(json=record({"name": TEXT}, "name")),
        ),
        "delete": operation("Forget it for good", {}, 404, 409, 507, status=204),
    },
    "/v1/sessions/{id}/read": {
        "parameters": [IDENTIFIED],
        "post": operation(
            "Read a text. Answered at the end, with all of it read or nothing; or, when events "
            "are accepted, as events `piece`, then `done` (the session) or `error`: then what "
            "was read before an end counts.",
            content(json=READ, events=ref("Piece")),
            *(404, 409, 507, *BODY),
            body=content(text=TEXT),
            query={"piece": {"type": "integer", "minimum": 1, "maximum": MOST_TOKENS_A_PIECE}},
        ),
    },
    "/v1/sessions/{id}/ask": {
        "parameters": [IDENTIFIED],
        "post": operation(
            "Continue a prompt with what the session remembers, and leave it as it is; streamed, "
            "as events `delta` and then `done` (the Answer) or `error`",
            content(json=ref("Answer"), events=TEXT),
            *(404, 409, *BODY),
            body=content(json=ref("AskRequest")),
        ),
    },
    "/v1/sessions/{id}/reset": {
        "parameters": [IDENTIFIED],
        "post": operation(
            "Back to what the model had learned", ONE_SESSION, *(404, 409, 507, *BODY)
        ),
    },
    "/v1/sessions/{id}/memory": {
        "parameters": [IDENTIFIED],
        "get": operation("The memory as a file", content(binary={"type": "string"}), 404),
    },
}
