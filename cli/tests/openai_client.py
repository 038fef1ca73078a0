"""Speaks to a balancer as its users do: with the openai package. Exits non-zero on the first surprise.

usage: openai_client.py BASE_URL BALANCER_ADMIN_URL ENGINE_URL...
"""

import json
import sys
import time
import urllib.request

import openai

base_url, admin, engines = sys.argv[1], sys.argv[2], sys.argv[3:]
client = openai.OpenAI(base_url=base_url, api_key="any", max_retries=0, timeout=30)


def fetch(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def open_requests():
    """Running and waiting on all engines, by their own metrics."""
    total = 0.0
    for engine in engines:
        for line in fetch(engine + "/metrics").splitlines():
            if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting")):
                total += float(line.rsplit(" ", 1)[1])
    return total


def bookings():
    return json.loads(fetch(admin + "/debug/bookings"))["bookings"]


def settles(what, read, limit_s):
    """Seconds until `read` gives 0; fails after the limit."""
    began = time.monotonic()
    while True:
        value = read()
        took = time.monotonic() - began
        if value == 0:
            return took
        assert took < limit_s, f"{what} is still {value} after {took:.3f} s"
        time.sleep(0.002)


def refused(status, code, call):
    try:
        call()
    except openai.APIStatusError as error:
        assert error.status_code == status, (error.status_code, error.body)
        assert error.body["code"] == code, error.body
        assert error.body["message"] and error.body["type"], error.body
        assert error.request_id, "every answer has an x-request-id"
        return
    raise AssertionError(f"expected {status} {code}")


def ask(content, **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **more)


models = [model.id for model in client.models.list()]
assert models, "no models"
model = models[0]
assert client.models.retrieve(model).id == model

# Not streaming, and the same text streaming: the engine's text is a function of the prompt.
whole = ask("What is a forebay?", max_tokens=24)
assert whole.choices[0].finish_reason == "length", whole
assert whole.usage.completion_tokens == 24, whole.usage
pieces = list(ask("What is a forebay?", max_tokens=24, stream=True, stream_options={"include_usage": True}))
text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
assert text == whole.choices[0].message.content, "streaming and not differ"
assert pieces[-1].usage.completion_tokens == 24, pieces[-1]
assert any(piece.choices and piece.choices[0].finish_reason == "length" for piece in pieces)

refused(404, "model_not_found", lambda: client.chat.completions.create(model="no-such-model", messages=[]))
refused(404, "model_not_found", lambda: client.models.retrieve("no-such-model"))
refused(400, "model_required", lambda: client.post("/chat/completions", body={"messages": []}, cast_to=object))
try:
    ask("x", max_tokens=-1)
except openai.BadRequestError as error:
    assert error.body["message"], error.body
else:
    raise AssertionError("the engine's own 400 must come through")

# A stream that is given up: the engine notices, and nothing stays booked.
stream = ask("Count for a long time.", max_tokens=100_000, stream=True)
for _, piece in zip(range(5), stream):
    assert piece.choices
assert open_requests() == 1 and bookings() == 1
stream.response.close()
took = settles("open requests on the engines", open_requests, 0.1)
settles("bookings", bookings, 1.0)

# The same for a request that does not stream, given up while it runs.
try:
    client.with_options(timeout=0.5).chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Take your time."}], max_tokens=100_000
    )
except openai.APITimeoutError:
    pass
else:
    raise AssertionError("100,000 tokens cannot be ready yet")
settles("open requests on the engines", open_requests, 0.1)
settles("bookings", bookings, 1.0)

print(json.dumps({"models": models, "cancel_seen_ms": round(took * 1000, 1)}))
