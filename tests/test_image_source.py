"""Where image bytes come from: every kind of source, and one clear line for each way it can fail."""

import base64
import io
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mlx_fastvlm import image_source
from mlx_fastvlm.errors import ImageError
from mlx_fastvlm.image_source import named_page, read_image_bytes, source_name

DATA = b"\x89PNG and whatever follows"


def error_of(*args, **kwargs) -> str:
    with pytest.raises(ImageError) as caught:
        read_image_bytes(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Site(BaseHTTPRequestHandler):
    """What each path of the test site answers: status, headers, pieces of the body, seconds between pieces."""

    def do_GET(self):
        pieces, pause, status, headers = [DATA], 0.0, 200, {"Content-Type": "image/png"}
        match self.path.split("?")[0]:
            case "/gone":
                status = 404
            case "/page":
                headers = {"Content-Type": "text/html; charset=utf-8"}
            case "/empty":
                pieces = []
            case "/moved":
                status, headers, pieces = 302, {"Location": "/image"}, []
            case "/loop":
                status, headers, pieces = 302, {"Location": "/loop"}, []
            case hops if hops.startswith("/hops/"):
                status, headers, pieces = 302, {"Location": hops[:-1] if hops[-1] == "x" else "/image"}, []
            case "/to-file":
                status, headers, pieces = 302, {"Location": "file:///etc/hostname"}, []
            case "/announced":
                headers["Content-Length"] = str(10**9)
            case "/endless":
                pieces = [b"x" * 1000] * 100
            case "/trickle":
                pieces, pause = [b"x"] * 100, 0.05
            case "/silent":
                pieces, pause = [b"x"] * 2, 1.0
            case "/cut":
                headers["Content-Length"] = str(len(DATA) + 5)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(pause)
        except OSError:
            pass  # the client has seen enough

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


def test_every_kind_of_source_gives_the_same_bytes(tmp_path, monkeypatch, site):
    path = tmp_path / "a b.png"
    path.write_bytes(DATA)
    monkeypatch.setenv("HOME", str(tmp_path))
    data_url = "data:image/png;base64," + base64.b64encode(DATA).decode()
    sources = [path, str(path), "~/a b.png", DATA, bytearray(DATA), memoryview(DATA), io.BytesIO(DATA), data_url]
    for source in [*sources, "data:,%89PNG and whatever follows", f"{site}/image", f"{site}/moved"]:
        assert read_image_bytes(source) == DATA, source
    assert read_image_bytes("-", stdin=io.BytesIO(DATA)) == DATA
    with open(path, "rb") as file:
        assert read_image_bytes(file) == DATA


def test_a_page_at_the_end_of_a_name(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(DATA)
    assert read_image_bytes(f"{path}#page=12") == read_image_bytes(Path(f"{path}#page=12")) == DATA
    assert named_page(f"{path}#page=12") == named_page("https://example.org/a.pdf#page=12") == 12
    for nameless in (path, f"{path}#page=x", f"{path}#page=", "#page=3", DATA, io.BytesIO(DATA), None):
        assert named_page(nameless) is None, nameless
    literal = tmp_path / "a.pdf#page=12"
    literal.write_bytes(b"its own")
    assert read_image_bytes(str(literal)) == b"its own"
    with open(literal, "rb") as file:
        assert named_page(literal) is named_page(file) is None
    assert "There is no file" in error_of(f"{tmp_path}/b.pdf#page=2")


def test_dash_reads_the_process_standard_input():
    program = "from mlx_fastvlm.image_source import read_image_bytes as r; import sys; sys.stdout.buffer.write(r('-'))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], input=DATA, capture_output=True, check=True, cwd=root)
    assert result.stdout == DATA


def test_a_name_with_a_dash_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(DATA)
    assert read_image_bytes(Path("-")) == DATA
    assert read_image_bytes("./-") == DATA


def test_file_objects_are_read_from_where_they_stand():
    file = io.BytesIO(b"skipped" + DATA)
    file.seek(7)
    assert read_image_bytes(file) == DATA


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing.png", "There is no file missing.png in "),
        ("", "There is no file ''"),
        ("folder", "folder is a folder"),
        ("empty.png", "empty.png is empty (0 bytes)"),
        ("empty.png/x.png", "cannot be read (Not a directory)"),
        ("null\0byte", "null?byte cannot be read"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("ftp://example.org/a.png", "use an http:// or https:// URL"),
        ("file:///tmp/a.png", "use an http:// or https:// URL"),
        ("http://", "http:// cannot be fetched"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png;base64,", "data:image/png;base64 is empty"),
        (b"", "The image is empty"),
        (io.BytesIO(), "The image is empty"),
        (io.StringIO("text"), "open in text mode"),
        (3, "No image can be read from int"),
        (None, "No image can be read from NoneType"),
    ],
)
def test_errors_without_network(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty.png").touch()
    message = error_of(name)
    assert expected in message
    assert len(message) < 400


def test_permission_denied(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_source, "open", refuse, raising=False)  # chmod does not stop a test run as root
    assert "secret.png may not be read (permission denied)" in error_of("secret.png")


def test_closed_file():
    file = io.BytesIO(DATA)
    file.close()
    assert "closed file" in error_of(file)


def test_standard_input_without_data(monkeypatch):
    class Terminal(io.BytesIO):
        def isatty(self):
            return True

    assert error_of("-", stdin=io.BytesIO()).startswith("Standard input is empty (0 bytes)")
    assert "nothing is piped in" in error_of("-", stdin=Terminal(DATA))
    monkeypatch.setattr(sys, "stdin", None)  # as under a service manager
    assert "nothing is piped in" in error_of("-")


def test_limit_holds_for_every_kind_of_stream(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(bytes(1001))
    monkeypatch.setattr(image_source, "MAX_FILE_BYTES", 1000)
    for source, stdin in ((path, None), (io.BytesIO(bytes(1001)), None), ("-", io.BytesIO(bytes(1001)))):
        assert "is larger than" in error_of(source, stdin=stdin)
    assert len(read_image_bytes(io.BytesIO(bytes(1000)))) == 1000
    monkeypatch.setattr(image_source, "MAX_DOWNLOAD_BYTES", 300)
    assert "is larger than" in error_of("data:;base64," + "A" * 1000)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_an_endless_file_stops_at_the_limit(monkeypatch):
    monkeypatch.setattr(image_source, "MAX_FILE_BYTES", 3 * 2**20)
    assert "/dev/zero is larger than 3 MiB" in error_of("/dev/zero")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/gone", "answered 404 Not Found: check the URL"),
        ("/page", "is not an image but text/html"),
        ("/empty", "is empty (0 bytes)"),
        ("/loop", "redirects more than 5 times"),
        ("/to-file", "cannot be fetched"),
        ("/announced", "is 954 MiB; at most 64 MiB are downloaded"),
        ("/cut", "cannot be fetched (peer closed connection"),
    ],
)
def test_download_errors(site, path, expected):
    assert expected in error_of(site + path)


def test_redirects_are_counted(site):
    assert read_image_bytes(f"{site}/hops/xxxx") == DATA  # five redirects
    assert "redirects more than 5 times" in error_of(f"{site}/hops/xxxxx")


def test_download_stops_at_the_limit(site, monkeypatch):
    monkeypatch.setattr(image_source, "MAX_DOWNLOAD_BYTES", 50_000)
    assert "/endless is larger than" in error_of(f"{site}/endless")
    monkeypatch.setattr(image_source, "MAX_DOWNLOAD_BYTES", 100_000)
    assert len(read_image_bytes(f"{site}/endless")) == 100_000


def test_download_stops_at_the_deadline_though_bytes_keep_coming(site, monkeypatch):
    monkeypatch.setattr(image_source, "DOWNLOAD_SECONDS", 0.3)
    start = time.monotonic()
    assert "is not complete after 0.3 seconds" in error_of(f"{site}/trickle")
    assert time.monotonic() - start < 3  # the whole body would take 5


def test_download_stops_when_the_server_falls_silent(site, monkeypatch):
    monkeypatch.setattr(image_source, "SILENCE_SECONDS", 0.2)
    assert "gave no answer for 0.2 seconds" in error_of(f"{site}/silent")


def test_unreachable_hosts():
    # Nothing listens on port 1; the host name has a label that no resolver is asked about.
    assert "cannot be fetched" in error_of("http://127.0.0.1:1/a.png")
    assert "cannot be fetched" in error_of("http://" + "a" * 64 + ".invalid/a.png")


def test_proxy_that_httpx_cannot_use(site, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:1")
    assert "cannot be fetched (Unknown scheme for proxy URL" in error_of(f"{site}/image")


def test_httpx_is_missing(site, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert "pip install httpx" in error_of(f"{site}/image")


def test_names_in_messages_hide_passwords_and_stay_short():
    assert source_name("https://user:secret@example.org/a.png") == "https://example.org/a.png"
    assert source_name("data:image/png;base64,AAAA") == "data:image/png;base64"
    assert source_name("a\nb") == "a?b"
    assert len(source_name("x" * 1000)) == 120
    assert "secret" not in error_of("http://user:secret@127.0.0.1:1/a.png")


def test_httpx_is_not_imported_for_local_files(tmp_path):
    program = (
        "import sys; from mlx_fastvlm.image_source import read_image_bytes as r; r(b'x'); print('httpx' in sys.modules)"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "False\n"
