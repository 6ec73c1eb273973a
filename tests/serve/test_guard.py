"""Another site in the same browser cannot drive the server; on a network it takes a token."""

from urllib.parse import parse_qs, urlsplit

import pytest
from served import BASE, application, client, create, message
from starlette.testclient import TestClient

from titans.serve import ServeSettings
from titans.serve.guard import allowed_hosts
from titans.serve.run import announce

GOOD_HOSTS = ["127.0.0.1:8321", "localhost:8321", "LOCALHOST:8321", "[::1]:8321"]
BAD_HOSTS = [
    "evil.example:8321",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.0.0.1:8321.evil.example",
    "localhost:8321@evil.example",
    "evil.example/localhost:8321",
    "127.0.0.1:8321, evil.example",
    "localhost.:8321",
    "",
    " ",
]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_names_of_this_machine(c, host) -> None:
    assert c.get("/v1/sessions", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize("path", ["/v1/sessions", "/health", "/", "/page/x", "/openapi.json"])
def test_other_names_are_refused_everywhere(c, host, path) -> None:
    message(c.get(path, headers={"host": host}), 421)


def test_two_hosts_or_none(c, tmp_path) -> None:
    message(c.get("/health", headers=[("host", "127.0.0.1:8321"), ("host", "evil")]), 421)


BAD_PAGES = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:9999"},
    {"origin": "http://localhost:8321"},  # not the name that was asked: a rebound one would be
    {"origin": "http://127.0.0.1:8321.evil.example"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": BASE, "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", BAD_PAGES, ids=str)
def test_pages_of_other_sites_are_refused(c, headers) -> None:
    before = create(c)
    for method, path in (
        ("GET", "/v1/sessions"),
        ("POST", "/v1/sessions"),
        ("DELETE", f"/v1/sessions/{before}"),
        ("POST", f"/v1/sessions/{before}/read"),
        ("POST", "/health"),
        ("GET", "/metrics"),
        ("GET", "/studio/anything"),
        ("OPTIONS", "/v1/sessions"),
    ):
        message(c.request(method, path, headers=headers), 403)
    assert [s["id"] for s in c.get("/v1/sessions").json()["sessions"]] == [before]


def test_the_page_itself_and_programs_are_not(c) -> None:
    for headers in (
        {"origin": BASE, "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {},
    ):
        assert c.post("/v1/sessions", json={}, headers=headers).status_code == 201
    link = {"sec-fetch-site": "cross-site"}
    assert c.get("/health", headers=link).status_code == 200
    message(c.get("/", headers=link), 404)  # there is no page here, but it may be linked to


def test_no_site_is_told_that_it_may(c) -> None:
    answer = c.get("/v1/sessions", headers={"origin": BASE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/health", "/v1/sessions", "/nothing", "/v1/sessions/x"])
def test_every_answer_has_the_headers(c, path) -> None:
    headers = c.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'self'; ")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert (headers.get("cache-control") == "no-store") == (path != "/health")


def test_a_token_opens_what_it_should(tmp_path, model_file) -> None:
    with client(tmp_path, model_file, token="s3cret") as c:
        assert c.get("/health").status_code == 200
        for wrong in ("", "Bearer", "Bearer x", "Bearer s3cre", "Basic s3cret", "Bearer s3cret2"):
            for path in ("/v1/sessions", "/metrics", "/openapi.json", "/nothing"):
                answer = c.get(path, headers={"authorization": wrong})
                message(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
        odd = c.get(
            "/v1/sessions", headers={"authorization": "Bearer s3cret\xe4".encode("latin-1")}
        )
        message(odd, 401)
        message(c.get("/v1/sessions?token=s3cret"), 401)
        good = {"authorization": "bearer s3cret"}
        assert c.get("/v1/sessions", headers=good).status_code == 200
        described = c.get("/openapi.json", headers=good).json()
        assert described["security"] == [{"token": []}]
        evil = {**good, "origin": "http://evil.example"}
        message(c.get("/v1/sessions", headers=evil), 403)


def test_a_server_on_all_addresses_answers_to_any_name_for_a_token(tmp_path, model_file) -> None:
    """It does not know them all; a page of another site has no token."""
    with client(tmp_path, model_file, host="0.0.0.0", token="secret") as c:
        there = {"host": "192.168.7.9:8321"}
        assert c.get("/health", headers=there).status_code == 200
        message(c.get("/v1/sessions", headers=there), 401)
        right = {**there, "authorization": "Bearer secret"}
        assert c.get("/v1/sessions", headers=right).status_code == 200
        message(c.get("/v1/sessions", headers={**right, "origin": "http://evil.example"}), 403)
        message(c.get("/v1/sessions", headers={**right, "host": "no host"}), 421)


def test_further_hosts(tmp_path, model_file) -> None:
    with client(tmp_path, model_file, allow_hosts=("Box.local", "proxy:80")) as c:
        for host in ("box.local", "box.local:8321", "proxy:80", "localhost:8321"):
            assert c.get("/health", headers={"host": host}).status_code == 200
        for host in ("box.local:1", "proxy", "proxy:8321"):
            message(c.get("/health", headers={"host": host}), 421)
    with pytest.raises(ValueError, match=r"expected a host such as box\.local"):
        allowed_hosts(ServeSettings(allow_hosts=("http://x",)))
    for host in ("fe80::1", "FE80::1"):
        assert "[fe80::1]:8321" in allowed_hosts(ServeSettings(host=host))
    assert "localhost" in allowed_hosts(ServeSettings(port=80))


def test_paths_that_only_look_open(c, model_file, tmp_path) -> None:
    with client(tmp_path / "t", model_file, token="x") as d:
        for path in (
            "//v1/sessions",
            "/page/../v1/sessions",
            "/page/%2e%2e/v1/sessions",
            "/Health",
        ):
            assert d.get(path).status_code in (401, 404)
            assert "sessions" not in d.get(path).json()


def test_websockets_are_not_answered(c) -> None:
    with pytest.raises(Exception), TestClient(c.app, base_url=BASE).websocket_connect("/v1"):  # noqa: B017, PT011
        pass


def test_any_token_comes_whole_out_of_the_pages_address(tmp_path, model_file, capsys) -> None:
    settings = ServeSettings(token="a+b&c#d%41/", folder=tmp_path)
    app = application(tmp_path, model_file)
    app.state.store.folder.close()
    announce(app, settings, page=True, browser=False)
    address = urlsplit(capsys.readouterr().out.split("Serving at ")[1].strip())
    assert parse_qs(address.query) == {"token": ["a+b&c#d%41/"]}
    assert not address.fragment


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sessions": 0}, "sessions must be at least 1, got 0"),
        ({"port": -1}, "port must be at least 0"),
        ({"port": 70000}, "port must be at most 65535"),
        ({"idle_s": 0.0}, "idle_s must be a positive number"),
        ({"idle_s": float("nan")}, "idle_s must be a positive number"),
        ({"token": ""}, "token must not be empty"),
        ({"token": "a b"}, "token must not be empty or hold a space"),
        ({"token": "ä"}, "token must be printable ASCII"),
    ],
)
def test_settings_that_cannot_be(changes, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        ServeSettings(**changes)
