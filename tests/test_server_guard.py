"""Who may call a server, how much they may send, and what it fetches for them."""

import http.server
import ipaddress
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.server import page_files
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.page_files import read_page
from mlx_fastvlm.server.remote_images import fetch_image, is_public
from tests.live_server import example, openai_or_skip, serving, user

openai = openai_or_skip()

BODY = {"model": "demo", "messages": [user("Hello")], "max_tokens": 1}
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
PAGE = Path(page_files.__file__).parent / "page"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def closed(demo):
    """A server for this machine, with a key and small limits."""
    with serving(*demo, limits=Limits(max_request_mb=0.1), api_key="s3cret", allow_remote_images=True) as live:
        yield live


@pytest.fixture(scope="module")
def for_pages(demo):
    """A server that the pages of one site may call."""
    with serving(*demo, cors_origins=["https://app.example"]) as live:
        yield live


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere", "/pages", "/page"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic s3cret", "s3cret", b"Bearer \xff\xfe", "Bearer"])
def test_without_the_key_there_is_nothing_but_health_and_the_page(closed, path, header):
    response = closed.http().get(path, headers={} if header is None else {"Authorization": header})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert "s3cret" not in response.text


def test_with_the_key_there_is(closed):
    assert closed.http().get("/health").status_code == 200
    assert closed.ask("Hello", max_tokens=1).usage.completion_tokens == 1
    wrong = openai.OpenAI(base_url=closed.url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.parametrize("key", ["s3cret", "wrong", ""])
def test_anthropics_way_to_send_the_key_is_as_good(closed, key):
    response = closed.http().get("/v1/models", headers={"x-api-key": key})
    assert response.status_code == (200 if key == "s3cret" else 401)


def test_the_page_and_its_files_are_there_without_the_key(closed):
    page = closed.http().get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.content == (PAGE / "index.html").read_bytes()
    names = [path.name for path in PAGE.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert names
    for name in names:
        file = closed.http().get(f"/page/{name}")
        assert (file.status_code, file.content) == (200, (PAGE / name).read_bytes()), name
    script = next(name for name in names if name.endswith(".js"))
    assert closed.http().get(f"/page/{script}").headers["content-type"] == "text/javascript; charset=utf-8"


def test_the_page_can_ask_nobody_else_and_be_shown_nowhere_else(closed):
    for path in ("/", "/page/index.html"):
        headers = closed.http().get(path).headers
        policy = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "camera=(self)" in headers["permissions-policy"]


def test_a_page_that_the_browser_has_is_not_sent_again(closed):
    first = closed.http().get("/")
    assert first.headers["cache-control"] == "no-cache"
    for known, status in ((first.headers["etag"], 304), (f'W/{first.headers["etag"]}, "x"', 304), ('"x"', 200)):
        again = closed.http().get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (status, b"" if status == 304 else first.content)
    head = closed.http().head("/")
    assert (head.status_code, head.content) == (200, b"") and head.headers["etag"] == first.headers["etag"]


@pytest.mark.parametrize(
    "path",
    ["/page/../page_files.py", "/page/%2e%2e/page_files.py", "/page/..%2fpage_files.py", "/page/%2fetc%2fhostname"]
    + ["/page/missing.js", "/page/", "/page/.hidden", "/page/index.html/", "/page/index.html%00", "/page/INDEX.HTML"],
)
def test_a_path_leads_to_nothing_but_the_pages_files(closed, path):
    with socket.create_connection(("127.0.0.1", closed.port)) as connection:  # httpx would tidy the path up
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.split()[1] in (b"404", b"401", b"307"), reply
    assert b"import" not in reply


def test_which_files_are_the_pages(tmp_path):
    for name in ("index.html", "a.js", "b.py", ".c.js", "d"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.js").mkdir()
    files = read_page(tmp_path)
    assert {name: file.content.decode() for name, file in files.items()} == {"index.html": "index.html", "a.js": "a.js"}
    assert read_page(tmp_path / "nowhere") == {}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[", "", "10.0.0.1"])
def test_a_local_server_is_called_by_a_local_name_only(for_pages, host):
    response = for_pages.http().get("/v1/models", headers={"Host": host})
    assert response.status_code in (400, 403)  # 400: uvicorn's, for what is no name
    assert "demo" not in response.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:80"])
def test_all_local_names_are_good(for_pages, host):
    assert for_pages.http().get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "https://app.example.evil"])
def test_web_pages_from_elsewhere_may_not_call(for_pages, origin):
    response = for_pages.http().post(CHAT, json=BODY, headers={"Origin": origin})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_pages_and_the_named_sites_may(for_pages):
    own = for_pages.url.removesuffix("/v1")
    assert for_pages.http().post(CHAT, json=BODY, headers={"Origin": own}).status_code == 200
    site = {"Origin": "https://app.example"}
    asked = for_pages.http().options(CHAT, headers={**site, "Access-Control-Request-Method": "POST"})
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    answered = for_pages.http().post(CHAT, json=BODY, headers=site)
    assert answered.status_code == 200
    assert answered.headers["access-control-allow-origin"] == "https://app.example"


def test_a_page_cannot_pass_json_off_as_plain_text(for_pages):
    response = for_pages.http().post(CHAT, content=b'{"model": "demo"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400


def test_too_large_a_request_is_not_read(closed):
    key = {"Authorization": "Bearer s3cret"}
    large = b" " * 150_000
    told = closed.http().post(CHAT, content=large, headers=key)
    pieces = closed.http().post(CHAT, content=(large[i : i + 50_000] for i in range(0, 150_000, 50_000)), headers=key)
    for response in (told, pieces):
        assert response.status_code == 413
        assert "0.1 MiB" in response.json()["error"]["message"]


def test_wrong_routes_have_openais_errors(for_pages):
    assert for_pages.http().get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert for_pages.http().get(CHAT).status_code == 405


def test_no_documentation_page_that_loads_from_elsewhere(for_pages):
    assert for_pages.http().get("/docs").status_code == 404
    schema = for_pages.http().get("/openapi.json").json()
    assert set(schema["paths"]) >= {CHAT, "/v1/models", "/health", "/metrics"}


def test_the_schema_describes_the_replies(for_pages):
    schema = for_pages.http().get("/openapi.json").json()
    picture = user("What is this?", example("word.png"))
    chat = {"model": "demo", "messages": [picture], "max_tokens": 3, "logprobs": True, "top_logprobs": 1}
    message = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    asked = [("get", path, None) for path in ("/v1/models", "/health", "/metrics", "/v1/models/demo", "/v1/models/x")]
    asked += [("post", path, body) for path, valid in ((CHAT, chat), (MESSAGES, message)) for body in (valid, {})]
    for method, path, body in asked:
        response = for_pages.http().request(method, path, json=body)
        route = "/v1/models/{model}" if path.startswith("/v1/models/") else path
        described = schema["paths"][route][method]["responses"]
        assert "422" not in described
        reply = described.get(str(response.status_code)) or described[f"{response.status_code // 100}XX"]
        content = reply["content"][response.headers["content-type"].split(";")[0]]["schema"]
        value = response.text if path == "/metrics" else response.json()
        jsonschema.validate(value, content)
        assert content != {}, path
    assert "text/event-stream" in schema["paths"][CHAT]["post"]["responses"]["200"]["content"]


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_limit_is_above_zero(value):
    with pytest.raises(OptionError, match="max_seconds"):
        Limits(max_seconds=value)


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 224.0.0.1 255.255.255.255 240.0.0.1 "
    "::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: "
    "2001:db8::1".split(),
)
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are(address):
    assert is_public(ipaddress.ip_address(address))


class Site(http.server.BaseHTTPRequestHandler):
    """Serves a picture, a redirect to it, one to elsewhere, one to itself, too much, and too slowly."""

    asked: list[tuple[str, str]] = []

    def do_GET(self):
        Site.asked.append((self.headers["Host"], self.path))
        places = {"/moved": "/picture.png", "/inside": f"http://127.0.0.2:{self.server.server_port}/", "/loop": "/loop"}
        self.send_response(302 if self.path in places else 200 if self.path != "/missing" else 404)
        if self.path in places:
            self.send_header("Location", places[self.path])
        if self.path == "/slow-headers":
            self.trickle(b"X-Slow: ")
            return
        self.end_headers()
        if self.path == "/slow-body":
            self.trickle(b"")
        if self.path == "/picture.png":
            self.wfile.write(example("word.png"))
        if self.path == "/large":
            self.wfile.write(b"\0" * 2**21)

    def trickle(self, beginning):
        self.flush_headers()
        self.wfile.write(beginning)
        with suppress(OSError):  # the client has enough
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.1)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def is_this_machine(address) -> bool:
    return str(address) == "127.0.0.1"


def fetch(url: str, may_reach=is_this_machine) -> bytes:
    return fetch_image(url, max_mb=1, max_seconds=5, may_reach=may_reach)


def test_a_picture_is_fetched_and_redirects_are_followed(site):
    assert fetch(f"{site}/picture.png") == fetch(f"{site}/moved") == example("word.png")


@pytest.mark.parametrize(
    ("path", "words"),
    [("/inside", "not on the public"), ("/loop", "redirects"), ("/large", "larger than 1 MiB"), ("/missing", "404")],
)
def test_what_is_not_fetched(site, path, words):
    with pytest.raises(ImageError, match=words):
        fetch(site + path)


@pytest.mark.parametrize("path", ["/slow-headers", "/slow-body"])
def test_what_trickles_in_is_given_up_in_time(site, path):
    start = time.monotonic()
    with pytest.raises(ImageError, match="takes too long"):
        fetch_image(site + path, max_mb=1, max_seconds=0.5, may_reach=is_this_machine)
    assert time.monotonic() - start < 3


def test_a_name_is_judged_by_its_address_and_asked_for_once(site, monkeypatch):
    port = int(site.rpartition(":")[2])
    answers = iter(["127.0.0.1", "10.0.0.1"])  # another one each time it is asked
    resolve = socket.getaddrinfo

    def rebinding(host, *more, **options):
        return resolve(next(answers) if host == "pictures.example" else host, *more, **options)

    monkeypatch.setattr("socket.getaddrinfo", rebinding)
    assert fetch(f"http://pictures.example:{port}/picture.png") == example("word.png")
    assert Site.asked[-1] == (f"pictures.example:{port}", "/picture.png")
    with pytest.raises(ImageError, match="not on the public internet"):
        fetch(f"http://pictures.example:{port}/picture.png")


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_a_server_does_not_fetch_from_its_own_network(closed, site, name):
    url = f"http://{name}:{site.rpartition(':')[2]}/picture.png"
    before = len(Site.asked)
    with pytest.raises(openai.BadRequestError, match="not on the public internet|the request failed"):
        closed.ask("Hello", url)
    assert len(Site.asked) == before
