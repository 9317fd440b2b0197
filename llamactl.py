#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sign in to LlamaCloud with one file and the standard library.

What it does   Makes profiles (an API key and a project of one control plane) from a key or
               by the OpenID Connect device flow, stores them, and hands them on in a .env
               file or to a command.
Files written  profiles.json (0600), its lock, for an instant its successor, and damaged
               copies, in $LLAMACTL_CONFIG_DIR, %APPDATA%\\llamactl,
               $XDG_CONFIG_HOME/llamactl or ~/.config/llamactl (0700); the .env that
               `auth inject` is told to write.
               profiles.db, the official client's, is read by `auth import`, never changed.
Hosts          The control plane of the current environment (https://api.cloud.llamaindex.ai
               unless you add another); for `auth login`, and for the logout of a login, the
               identity provider that it named; by way of the proxies that urllib knows.
               No telemetry, no update check.
Sent of you    The host's and the profile's name, in the title of a key that a login makes.
Files read     These; certificates; /proc/self/mountinfo, before a warning about modes.
Variables      LLAMA_CLOUD_API_KEY, LLAMA_AGENTS_PROJECT_ID, LLAMA_CLOUD_BASE_URL,
               LLAMA_CLOUD_USE_PROFILE, LLAMACTL_PROFILE, LLAMACTL_CONFIG_DIR,
               LLAMACTL_TIMEOUT, XDG_CONFIG_HOME, APPDATA, HOME, CI, TERM, SSL_CERT_FILE,
               SSL_CERT_DIR, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE; HTTP_PROXY, HTTPS_PROXY,
               ALL_PROXY and NO_PROXY, or in lower case; COMPUTERNAME; to find a browser
               SSH_CONNECTION, SSH_CLIENT, SSH_TTY, DISPLAY, WAYLAND_DISPLAY, BROWSER; what
               Python and OpenSSL read, such as LANG, LC_*, PATH, PYTHON*, OPENSSL_CONF.
Programs run   The command given to `auth exec`; for `auth login` what opens your browser.
Never          Turns certificate verification off, sends a key to a server that is not its
               own, or prints one (but for `auth inject --env-file -`, which is asked to).
How to read    From the bottom: `main` catches every error, `COMMANDS` lists the commands,
               each command is one function, and what it calls stands above it: a name
               refers only upward. `Client.send` sends the key, `resolve_credential` says
               which one, `Store.change` writes it, and `auth_login` gets a new one.
"""

NEEDS: str = "llamactl.py needs Python 3.6 or newer: start it with a newer python3"

import sys

# a json.py beside this file or in the working folder must not be imported in its place
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import time
from collections import namedtuple

__version__ = "1.0.0"

TYPE_CHECKING = False  # mypy takes it for true; importing typing would slow the start
if TYPE_CHECKING:
    import socket
    import ssl
    import threading
    from email.message import Message
    from typing import (
        Any,
        Callable,
        Container,
        Dict,
        Iterator,
        List,
        Mapping,
        Match,
        NamedTuple,
        NoReturn,
        Optional,
        Sequence,
        Set,
        Tuple,
        TypedDict,
        TypeGuard,
    )
    from urllib.request import OpenerDirector, Request

    Args = argparse.Namespace
    Json = Dict[str, Any]
    Warn = Callable[[str], None]
    Check = Callable[[os.stat_result], None]  # raises Failure
    Wait = Callable[[float], None]  # waits for so many seconds
    Choices = Sequence[Tuple[str, str]]  # each a value and the text that people know it by

    # what profiles.json holds

    class PinnedProvider(TypedDict, total=False):
        """The identity provider of a login, as it was when the code was requested."""

        issuer: Optional[str]
        client_id: Optional[str]
        token_endpoint: Optional[str]
        revocation_endpoint: Optional[str]

    class Profile(TypedDict, total=False):
        auth_type: str  # TOKEN, OIDC or NO_AUTH
        api_key: Optional[str]
        project_id: Optional[str]
        project_name: Optional[str]
        org_id: Optional[str]
        # of a login alone
        api_key_id: Optional[str]
        issuer: Optional[str]
        sub: Optional[str]
        email: Optional[str]
        provider: Optional[PinnedProvider]
        access_token: Optional[str]
        access_expires_at: Optional[float]  # seconds since 1970; None where nobody said
        refresh_token: Optional[str]

    class WaitingLogin(TypedDict, total=False):
        """A device code between `auth login --start` and `--resume`."""

        provider: Optional[PinnedProvider]
        device_code: str
        user_code: str
        verification_uri: str
        verification_uri_complete: Optional[str]
        expires_at: float  # seconds since 1970
        interval: float  # seconds

    class Environment(TypedDict, total=False):
        """One control plane; its API URL is the key that it is stored under."""

        requires_auth: bool
        current_profile: Optional[str]
        profiles: Dict[str, Profile]
        login: Optional[WaitingLogin]

    class StoreData(TypedDict):
        version: int
        current_environment: Optional[str]
        environments: Dict[str, Environment]

    # what rooms hand to each other

    class ProcessValues(NamedTuple):
        variables: Dict[str, str]
        home: Optional[str]
        host_name: str
        program_on_stdin: bool

    class EnvPart(NamedTuple):
        """An assignment in a .env file, with all the lines of its value, or other lines."""

        text: str
        prefix: str  # indentation and `export `
        name: str  # empty where it assigns nothing
        comment: str
        ending: str  # the line end; empty at the end of the file
        ends_in_backslash: bool  # which joins the next line to it

    class Snapshot(NamedTuple):
        content: bytes
        status: os.stat_result  # of the very file that was read

    class CaBundle(NamedTuple):
        file: Optional[str]
        folder: Optional[str]
        source: str  # the variable that named it, or where it was found

    class Proxy(NamedTuple):
        url: str  # as it was given, perhaps with a password
        label: str  # its address without that, and what named it

    class Provider(NamedTuple):
        """RFC 8414 §2, RFC 8628 §4, OpenID Connect Discovery §3."""

        issuer: str
        client_id: str
        device_authorization_endpoint: str
        token_endpoint: str
        revocation_endpoint: Optional[str]

    class Tokens(NamedTuple):
        access_token: str
        expires_at: Optional[float]  # seconds since 1970
        refresh_token: Optional[str]

    class User(NamedTuple):
        issuer: str
        sub: str
        email: Optional[str]

    class Version(NamedTuple):
        requires_auth: bool
        capabilities: List[str]

    class Project(NamedTuple):
        project_id: str
        project_name: str
        deployment_count: int
        org_id: str

    class Credential(NamedTuple):
        """A key, a URL and a project that belong together."""

        api_url: str
        api_key: Optional[str]
        project_id: Optional[str]
        name: Optional[str]  # of the profile; None where variables hold the credential
        profile: Profile
        sources: Mapping[str, Optional[str]]  # each value's name, and where it came from

    class Verb(NamedTuple):
        run: Callable[..., Optional[int]]
        summary: str
        options: List[Any]
else:
    ProcessValues = namedtuple("ProcessValues", "variables home host_name program_on_stdin")
    EnvPart = namedtuple("EnvPart", "text prefix name comment ending ends_in_backslash")
    Snapshot = namedtuple("Snapshot", "content status")
    CaBundle = namedtuple("CaBundle", "file folder source")
    Proxy = namedtuple("Proxy", "url label")
    Provider = namedtuple(
        "Provider",
        "issuer client_id device_authorization_endpoint token_endpoint revocation_endpoint",
    )
    Tokens = namedtuple("Tokens", "access_token expires_at refresh_token")
    User = namedtuple("User", "issuer sub email")
    Version = namedtuple("Version", "requires_auth capabilities")
    Project = namedtuple("Project", "project_id project_name deployment_count org_id")
    Credential = namedtuple("Credential", "api_url api_key project_id name profile sources")
    Verb = namedtuple("Verb", "run summary options")

# ==== constants: what two rooms share; a literal with one user stands beside that user
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REJECTED = 4
EXIT_UNREACHABLE = 5

DEFAULT_API_URL = "https://api.cloud.llamaindex.ai"
DEFAULT_PORTS = {"http": 80, "https": 443}
WEB_CONSOLE = "in the web console (LlamaCloud: https://cloud.llamaindex.ai)"
HINT_LOGIN = "llamactl auth login"
HINT_TOKEN = "llamactl auth token"  # noqa: S105 (a command, no password)
HINT_IMPORT = "llamactl auth import --from-official"

VAR_API_KEY = "LLAMA_CLOUD_API_KEY"
VAR_API_URL = "LLAMA_CLOUD_BASE_URL"
VAR_PROJECT = "LLAMA_AGENTS_PROJECT_ID"
VAR_USE_PROFILE = "LLAMA_CLOUD_USE_PROFILE"
VAR_PROFILE = "LLAMACTL_PROFILE"
VAR_FOLDER = "LLAMACTL_CONFIG_DIR"
VAR_TIMEOUT = "LLAMACTL_TIMEOUT"

TOKEN = "token"  # noqa: S105 (how a profile authenticates: with a key that was given,
OIDC = "oidc"  # by a login,
NO_AUTH = "none"  # or not at all)

LOCK_PAUSE = 0.02  # seconds, as all times here
ANSWER_TIMEOUT = 10.0  # until an answer begins
PAUSE_TIMEOUT = 10.0  # between two pieces of it
WHOLE_TIMEOUT = 60.0  # until it is whole
RETRY_DELAYS = (0.5, 1.5)
MAX_DAY = 86400.0  # nothing that a server says lasts longer
DEFAULT_INTERVAL = 5.0  # RFC 8628 §3.2
SLOW_DOWN = 5.0  # RFC 8628 §3.5

MASK = "********"
# C1 controls, and what hides or reorders text: bidirectional marks, separators, joiners
INVISIBLE = (
    "\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ufffe\uffff"
)
SURROGATE = "[\ud800-\udfff]"


# ==== errors: the one exception, and the kinds of it that a caller treats differently
class Failure(Exception):
    """What went wrong in one line, the command to try next, and the exit code."""

    def __init__(self, message: str, hint: str = "", code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class Unreachable(Failure):
    """A server that could not be reached, or whose answer makes no sense.

    `stage` is how far the exchange came; it decides whether a second try is safe.
    """

    NOT_CONNECTED = "not connected"  # the request never left
    SILENT = "silent"  # it may have been received
    BROKEN_OFF = "broken off"  # the connection ended before the answer did
    SLOW = "slow"  # the answer began, and did not end in time
    FAILING = "failing"  # the server said that it fails, or has no time
    UNUSABLE = "unusable"  # the answer is none that this program understands

    def __init__(self, message: str, stage: str, hint: str = "") -> None:
        super().__init__(message, hint, EXIT_UNREACHABLE)
        self.stage = stage


class Refused(Failure):
    """A server that understood the request and said no, with this HTTP status.

    `is_json` tells the server itself from a gateway, which answers with a web page.
    """

    def __init__(
        self, message: str, status: int, hint: str = "", code: int = EXIT_FAILED
    ) -> None:
        super().__init__(message, hint, code)
        self.status = status
        self.is_json = False


class Damaged(Failure):
    """A store that makes no sense: a reader stops, a writer moves it aside and goes on."""


def require(
    condition: "Any", message: str, hint: str = "", code: int = EXIT_FAILED
) -> None:
    if not condition:
        raise Failure(message, hint, code)


def require_usable(condition: "Any", message: str) -> None:
    """Raise Unreachable unless a server's answer meets CONDITION."""
    if not condition:
        raise Unreachable(message, Unreachable.UNUSABLE)


# ==== process: variables, platform and home, read once; turning into another program
WINDOWS = os.name == "nt"
MACOS = sys.platform == "darwin"
EXIT_NOT_EXECUTABLE = 126  # as a shell has it
EXIT_NOT_FOUND = 127


class Process(ProcessValues):
    """All that is taken from outside the command line."""

    def get(self, variable: str) -> "Optional[str]":
        """The value of VARIABLE without white space around it; an empty one is unset."""
        return self.variables.get(variable, "").strip() or None

    def prefers_profile(self) -> bool:
        word = self.get(VAR_USE_PROFILE) or ""
        return word.lower() in ("1", "true", "yes", "on", "t", "y")

    def timeout(self, default: float) -> float:
        """How many seconds a server may be silent; raises Failure."""
        text = self.get(VAR_TIMEOUT)
        if text is None:
            return default
        if not re.fullmatch("[0-9]{1,5}", text) or int(text) == 0:
            raise Failure(f"{VAR_TIMEOUT} must be a number of seconds", code=EXIT_USAGE)
        return float(text)

    def config_folder(self) -> "Optional[str]":
        """The folder of profiles.json as an absolute path; None where there is no home."""
        path = self.get(VAR_FOLDER)
        if path is None:
            shared = self.get("APPDATA" if WINDOWS else "XDG_CONFIG_HOME")
            if shared is None or not os.path.isabs(shared):
                shared = "~/.config"
            path = os.path.join(shared, "llamactl")
        if re.match(r"~([/\\]|$)", path):
            if self.home is None:
                return None
            path = os.path.join(self.home, path[1:].lstrip("/\\"))
        path = os.path.expanduser(path)
        if path.startswith("~"):  # of a user who does not exist
            return None
        with contextlib.suppress(OSError):  # the working folder may be gone
            return os.path.abspath(path)
        return None


def read_process() -> Process:
    """What this process was started with."""
    variables = dict(os.environ)
    home = os.path.expanduser("~")  # type: Optional[str]
    if variables.get("HOME") == "" or not os.path.isabs(str(home)):
        home = None
    if hasattr(os, "uname"):
        host_name = os.uname().nodename
    else:
        host_name = variables.get("COMPUTERNAME", "")
    # `python3 -` and `python3 < llamactl.py` leave these names; a file and -m leave a path
    program_on_stdin = sys.argv[0] in ("-", "")
    return Process(variables, home, host_name or "unknown", program_on_stdin)


def reason(error: BaseException) -> str:
    """The operating system's own words for ERROR, without paths or values."""
    return getattr(error, "strerror", None) or type(error).__name__


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program, after it has cleaned up as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def ending_signals() -> "List[int]":
    """The signals that end a program; those that were ignored at the start stay ignored."""
    import signal

    names = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def catch_signals() -> None:
    """Have the signals that end a program raise Interrupted instead of killing it."""
    import signal

    def interrupt(number: int, _: "Any") -> None:
        raise Interrupted(number)

    with contextlib.suppress(ValueError):  # only the main thread may
        for number in ending_signals():
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, interrupt)


@contextlib.contextmanager
def uninterrupted(tell: "Callable[[str], None]") -> "Iterator[None]":
    """Delay the first signal to the end of this block; a second one interrupts at once."""
    import signal

    caught = []  # type: List[int]
    handlers = {}

    def note(number: int, _: "Any") -> None:
        caught.append(number)
        if len(caught) > 1:
            raise Interrupted(number)
        tell("finishing; interrupt again to stop at once")

    try:
        with contextlib.suppress(ValueError):  # only the main thread may
            for number in ending_signals():
                handlers[number] = signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if caught:
        raise Interrupted(caught[0])


def replace_process(command: "List[str]", variables: "Dict[str, str]") -> int:
    """Become COMMAND; on Windows, which cannot, run it and return its exit code."""
    import signal

    program = command[0]
    require(program, "the command is empty", code=EXIT_NOT_FOUND)
    try:
        if WINDOWS:
            import subprocess

            return subprocess.call(command, env=variables)
        # Python ignores these, which other programs die of
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execvpe(program, command, variables)
    except FileNotFoundError:
        raise Failure(f"{program}: command not found", code=EXIT_NOT_FOUND) from None
    except OSError as error:
        raise Failure(f"{program}: {reason(error)}", code=EXIT_NOT_EXECUTABLE) from None


# ==== text: cleaning, masking, names and URLs; no input, no output
def clean(text: str) -> str:
    """TEXT as one line that can neither move a cursor nor reorder what stands around it."""
    if text.isprintable():
        return text
    text = re.sub(SURROGATE, "\ufffd", text)
    text = re.sub(r"[\t\r\n]+", " ", text)
    return re.sub(f"[\x00-\x1f{INVISIBLE}]", "", text)


def masked(text: str, secrets: "Set[str]") -> str:
    """TEXT without SECRETS, the longest first, since one may be a part of another."""
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, json.dumps(secret)[1:-1]):
            text = text.replace(form, MASK)
    return text


def without_passwords(text: str) -> str:
    """TEXT with users and passwords of web addresses masked, of others the passwords."""

    def mask_user(match: "Match[str]") -> str:
        scheme, user = match.groups()
        if scheme:
            return f"{scheme}://{MASK}@"
        name, colon, _ = user.partition(":")
        return f"://{name}:{MASK}@" if colon else match.group()

    return re.sub(r"(?i)(https?)?://([^/?#\s]*)@", mask_user, text)


def shortened(text: str, limit: int = 300) -> str:
    """TEXT on one line, cut at white space alone: the mask fits no half of a secret."""
    line = without_passwords(" ".join(text.split()))
    if len(line) <= limit:
        return line
    whole_words = line[:limit].rpartition(" ")[0]
    return f"{whole_words} ...".strip()


def quotable(word: str) -> str:
    """WORD of the command line, masked where it may be a secret: long, and not a UUID."""
    uuid = "(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    return word if len(word) < 20 or re.fullmatch(uuid, word) else MASK


def shell_quoted(word: str) -> str:
    """WORD as a shell reads it, for hints that are pasted."""
    from shlex import quote

    return quote(word)


def last_four(secret: str) -> str:
    """At most the last four characters, none of a secret too short to spare them."""
    if len(secret) < 12:
        return ""
    return re.sub(r"[^A-Za-z0-9]", "", secret[-4:])


def is_plain(text: "Any") -> bool:
    """Whether TEXT is printable ASCII without white space, as keys and ids are."""
    return isinstance(text, str) and bool(re.fullmatch("[!-~]+", text))


def require_plain(text: str, name: str) -> str:
    """TEXT, if it is plain; the Failure otherwise calls it NAME and quotes nothing."""
    if not text:
        raise Failure(f"{name} is empty", code=EXIT_USAGE)
    if not is_plain(text):
        message = f"{name} contains white space or characters that are not ASCII"
        raise Failure(message, code=EXIT_USAGE)
    return text


def decoded_key(content: bytes) -> str:
    """The key in CONTENT, without a BOM and white space around it."""
    return content.decode("utf-8-sig", "replace").strip()


def split_url(url: str, rest: str) -> "Tuple[str, str, int, str]":
    """Scheme, host, port and what follows, which the pattern REST must match.

    Raises ValueError. Written by hand because local commands do without urllib, and
    because urllib accepts what is no URL.
    """
    host = r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)"
    match = re.fullmatch(f"(?ai)(https?)://{host}(?::([0-9]{{1,5}}))?({rest})?", url)
    if match is None:
        raise ValueError("not an http(s) URL")
    scheme = match.group(1).lower()
    port = int(match.group(3) or DEFAULT_PORTS[scheme])
    if not 0 < port < 65536:
        raise ValueError("not a port")
    return scheme, match.group(2).lower(), port, match.group(4) or ""


def normal_url(url: str) -> str:
    """An API URL as it is stored and compared (RFC 3986 §6.2.2.1, §6.2.3).

    Raises Failure.
    """
    try:
        scheme, host, port, path = split_url(url, "/[a-z0-9._~%/@:,+=-]*")
    except ValueError:
        raise Failure(
            "an API URL is http(s)://HOST, without user, query or fragment",
            f"llamactl environments add {DEFAULT_API_URL}",
            EXIT_USAGE,
        ) from None
    place = host if port == DEFAULT_PORTS[scheme] else f"{host}:{port}"
    return f"{scheme}://{place}{path}".rstrip("/")


def origin_of(url: str) -> str:
    """Scheme, host and port of URL, if secrets may be sent there at all; raises Failure."""
    try:
        scheme, host, port, _ = split_url(url, "[/?][!-~]*")
    except ValueError:
        raise Failure(f"the server named an unusable URL: {shortened(url)}") from None
    return f"{scheme}://{host}:{port}"


def is_loopback(url: str) -> bool:
    """Whether URL leads to this machine."""
    return bool(re.match(r"https?://(localhost|127\.[0-9.]+|\[::1\])([:/?]|$)", url))


def is_sent_in_clear(url: str) -> bool:
    """Whether URL is plain http to another machine."""
    return url.startswith("http://") and not is_loopback(url)


def shell_safe(text: str) -> str:
    """TEXT as a name that no shell acts on."""
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", text).strip("-")[:80]


def free_name(wanted: str, taken: "Any") -> str:
    """WANTED, or WANTED-2, WANTED-3 and so on where it is taken."""
    name = wanted
    number = 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def listed(choices: "Choices") -> str:
    """CHOICES as they stand in a sentence, 20 at most."""
    words = [
        value if label == value else f"{value} ({label})" for value, label in choices[:20]
    ]
    if len(choices) > 20:
        words.append(f"and {len(choices) - 20} more")
    return ", ".join(words) or "none"


def find_choices(answer: str, choices: "Choices") -> "List[str]":
    """The values that ANSWER may mean: a number, else a whole name, else a part of one."""
    number = int(answer) if re.fullmatch("[0-9]{1,9}", answer) else 0
    if 0 < number <= len(choices):
        return [choices[number - 1][0]]
    whole = [value for value, label in choices if answer in (value, label)]
    if whole:
        return whole
    part = answer.lower()
    return [value for value, label in choices if part in f"{value}\n{label}".lower()]


def is_number(value: "Any", above: float = float("-inf")) -> bool:
    """Whether VALUE is a JSON number of a size that arithmetic with times can bear."""
    return type(value) in (int, float) and above < value and abs(value) < 1e300


def parse_object(content: bytes) -> "Optional[Json]":
    """The JSON object that CONTENT holds; None where it holds none or is not UTF-8."""

    def parse_int(digits: str) -> int:
        if len(digits) > 300:  # int() is slow for long ones
            raise ValueError("a number of too many digits")
        return int(digits)  # which refuses NaN and Infinity

    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text, parse_int=parse_int, parse_constant=parse_int)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ==== output: a value as JSON, YAML or a table; no input, no output
def json_text(value: "Any", indent: "Optional[int]" = 2) -> str:
    """VALUE as JSON, the same, without characters that a terminal would act on."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    text = re.sub(SURROGATE, "\ufffd", text)
    return re.sub(f"[{INVISIBLE}]", lambda match: f"\\u{ord(match.group()):04x}", text)


def yaml_scalar(value: "Any") -> str:
    """VALUE bare where YAML 1.1 and 1.2 both read that text as a string, else as JSON."""
    words = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    bare = r"[A-Za-z_](?:[A-Za-z0-9_./@:+-]*[A-Za-z0-9_/])?"
    if isinstance(value, str) and re.fullmatch(bare, value) and value.lower() not in words:
        return value
    return json_text(value, indent=None)


def yaml_text(value: "Any", indent: str = "") -> str:
    """VALUE as block YAML; a scalar or an empty container is one line."""
    if not value or not isinstance(value, (dict, list)):
        return yaml_scalar(value) + "\n"
    deeper = indent + "  "
    if isinstance(value, list):
        return indent.join(f"- {yaml_text(item, deeper)}" for item in value)
    entries = []
    for key, item in value.items():
        name = yaml_scalar(key)
        if len(name) > 1024:  # YAML 1.2 §7.4.3: no longer key may stand before its colon
            name = f"? {name}\n{indent}"
        gap = ":\n" + deeper if item and isinstance(item, (dict, list)) else ": "
        entries.append(name + gap + yaml_text(item, deeper))
    return indent.join(entries)


def cell_text(value: "Any") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "-"
    return clean(str(value))


def table_text(headers: "Sequence[str]", rows: "Sequence[Sequence[Any]]") -> str:
    """A table without colour or truncation, two spaces between columns."""
    lines = [list(headers)]
    lines += [[cell_text(value) for value in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    text = ""
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def output_text(value: "Any", output: str, columns: str) -> str:
    """VALUE, an object or a list of them, as OUTPUT (json, yaml or text) wants it.

    COLUMNS are those of a table: words, `HEADER=field` where the two differ.
    """
    if output == "json":
        return json_text(value) + "\n"
    if output == "yaml":
        return yaml_text(value)
    rows = value if isinstance(value, list) else [value]
    if not rows:
        return ""
    pairs = [column.split("=") for column in columns.split()]
    headers = [pair[0].upper() for pair in pairs]
    return table_text(headers, [[row.get(pair[-1]) for pair in pairs] for row in rows])


# ==== dotenv: quoting a value, updating the text of a .env file; no input, no output
ASSIGNMENT = re.compile(r"([ \t]*(?:export[ \t]+)?)([^=#\s'\"`]+)[ \t]*=[ \t]*")
QUOTED = re.compile(  # a value in quotes that nothing but a comment follows
    r"""(?s)(?:"[^"\\]*(?:\\.[^"\\]*)*"|'[^']*'|`[^`]*`)(?=[ \t]*(?:#|[\r\n]|\Z))"""
)
COMMENT = re.compile(r"(?<=[ \t])#[^\r\n]*")
COMMENT_BEHIND_QUOTES = re.compile(r"#[^\r\n]*")
LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r|\Z)")
LINE_END = re.compile(r"\r\n|\n|\r|\Z")
# most of a long file, by the hundred: lines without quote, backslash or a name like ours
DULL_LINES = re.compile(r"(?:(?![^\r\n]*LLAMA_)[^'\"`\\\r\n]*(?:\r\n|\n|\r)){1,500}")


def env_value(value: str) -> str:
    """VALUE as it stands behind `NAME=`, in quotes only where it needs them."""
    if re.fullmatch(r"[A-Za-z0-9_./:@%+,=-]+", value):
        return value
    if "'" not in value:
        return f"'{value}'"
    escaped = re.sub(r'(["\\$`])', r"\\\1", value)
    return f'"{escaped}"'


def unable_readers(value: str) -> "List[str]":
    """Who reads another value than VALUE from what env_value() makes of it."""
    quoted = env_value(value)
    if quoted == value:
        return []
    readers = ["docker --env-file"]  # it takes quotes for a part of the value
    # python-dotenv expands ${...} in any quotes, unescapes backslashes in single ones, and
    # neither dollar signs nor backticks in double ones
    unescaped = r"[$`]|\\$" if quoted.startswith('"') else r"\\\\|\\$"
    if "${" in value or re.search(unescaped, value):
        readers.append("python-dotenv")
    if "$" in value:
        readers += ["Next.js", "Vite"]  # which expand it in any quotes
    if quoted.startswith('"') and "\\" in quoted:
        readers.append("dotenv for Node.js")  # which unescapes nothing but line ends
    return readers


def env_lines(values: "Dict[str, str]") -> "Dict[str, str]":
    """Each name and the line that assigns its value."""
    return {name: f"{name}={env_value(value)}" for name, value in values.items()}


def usual_line_end(text: str) -> str:
    """The line end for new lines of TEXT: its own, a lone \\n before a lone \\r."""
    for pattern, ending in (
        (r"\r\Z", "\r"),
        (r"(?<!\r)\n", "\n"),
        (r"\n", "\r\n"),
        (r"\r", "\r"),
    ):
        if re.search(pattern, text):
            return ending
    return "\n"


def joins_next_line(line: str) -> bool:
    """Whether LINE ends in a backslash that is not escaped itself."""
    body = line.rstrip("\r\n")
    return (len(body) - len(body.rstrip("\\"))) % 2 == 1


def scan_part(text: str, at: int) -> "EnvPart":
    """What TEXT holds from AT: dull lines, or that line to the end of its quoted value."""
    dull = DULL_LINES.match(text, at)
    if dull:
        return EnvPart(dull.group(), "", "", "", "", False)
    prefix = ""
    name = ""
    value_at = at
    comment_pattern = COMMENT
    start = ASSIGNMENT.match(text, at)
    if start:
        prefix, name = start.groups()
        value_at = start.end()
        quoted = QUOTED.match(text, value_at)
        if quoted:
            value_at = quoted.end()
            comment_pattern = COMMENT_BEHIND_QUOTES
    line_end = next(LINE_END.finditer(text, value_at))
    comment = comment_pattern.search(text, value_at, line_end.start())
    return EnvPart(
        text[at : line_end.end()],
        prefix,
        name,
        comment.group() if comment else "",
        line_end.group(),
        joins_next_line(text[value_at : line_end.start()]),
    )


def scan_env(text: str, names: "Container[str]") -> "Iterator[EnvPart]":
    """The parts of a .env TEXT; what backslashes join to a value of NAMES belongs to it."""
    at = 0
    while at < len(text):
        part = scan_part(text, at)
        at += len(part.text)
        is_named = part.name in names and not part.comment
        while is_named and part.ends_in_backslash and at < len(text):
            line = next(LINE.finditer(text, at)).group()
            at += len(line)
            ending = line[len(line.rstrip("\r\n")) :]
            part = part._replace(ending=ending, ends_in_backslash=joins_next_line(line))
        yield part


def updated_env(text: str, values: "Dict[str, str]") -> str:
    """The .env TEXT with VALUES assigned where they stood, else at its end."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text[len(mark) :]
    lines = env_lines(values)
    missing = dict(lines)
    ending = usual_line_end(text)
    pieces = [mark]
    outline = []  # the text without what is inside of quotes
    is_continuation = False  # of the line above, to a shell and to systemd
    ends_in_backslash = False
    for part in scan_env(text, lines):
        if part.name in lines:
            if part.comment:  # Docker and systemd would read it as part of the value
                indentation = part.prefix.partition("export")[0]
                pieces += [indentation, part.comment, ending]
            pieces += [part.prefix, lines[part.name], part.ending]
            if not is_continuation:
                missing.pop(part.name, None)
            ends_in_backslash = False
        else:
            pieces.append(part.text)
            ends_in_backslash = part.ends_in_backslash
        is_continuation = ends_in_backslash and not part.text.lstrip().startswith("#")
        outline.append(f"{part.prefix}{part.name}=" if part.name else part.text)
    if not missing:
        return "".join(pieces)
    lines_outside = "\n".join(outline).replace("\r", "\n")
    exports = re.findall(r"(?m)^[ \t]*(export[ \t]+)?[^=#\s'\"`]+[ \t]*=", lines_outside)
    export = "export " if exports and all(exports) else ""
    new_lines = [export + line for line in missing.values()]
    if ends_in_backslash:  # a blank line ends what that would continue
        new_lines.insert(0, "")
    block = ending.join(new_lines)
    if not text or text.endswith(("\n", "\r")):
        return "".join(pieces) + block + ending
    return "".join(pieces) + ending + block  # a last line end that is missing stays missing


# ==== terminal: data to stdout, words to stderr, questions where somebody can answer
BROWSER_TIMEOUT = 1.0
TEXT_BROWSERS = ("www-browser", "links", "links2", "elinks", "lynx", "w3m", "browsh")
MAX_KEY_BYTES = 64 * 1024


def open_controlling_terminal() -> "Any":
    with contextlib.suppress(OSError):  # there is none here, or none on this platform
        return open("/dev/tty")
    return None


def is_terminal(stream: "Any") -> bool:
    return stream is not None and not stream.closed and bool(stream.isatty())


class Terminal:
    """The user's side. It remembers which secrets to mask and what it has warned of."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.quiet = False
        self.secrets = set()  # type: Set[str]
        self.warned = set()  # type: Set[str]
        self.input = sys.stdin  # type: Any
        if process.program_on_stdin:
            self.input = open_controlling_terminal()

    def hide(self, secret: str) -> None:
        """Mask SECRET in all output from now on."""
        if len(secret) >= 8:  # a shorter one would mask ordinary words
            self.secrets.add(secret)

    def write(self, text: str) -> None:
        """Write TEXT to stdout, all of it; raises Failure and BrokenPipeError."""
        require(sys.stdout is not None, "standard output is closed")
        left = memoryview(text.encode("utf-8", "replace"))
        try:
            while left:  # `python3 -u` writes as much as fits, or None where it would wait
                written = sys.stdout.buffer.write(left)
                require(written, "standard output takes no more")
                left = left[written:]
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            self.abandon(1)
            raise Failure(f"standard output: {reason(error)}") from None

    def abandon(self, descriptor: int) -> None:
        """Send what is still buffered nowhere, so that the interpreter exits quietly."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)

    def show(self, value: "Any", output: str, columns: str) -> None:
        """Print a command's result, as output_text() describes it."""
        self.write(masked(output_text(value, output, columns), self.secrets))

    def write_error(self, text: str) -> None:
        """Write TEXT to stderr; where that is closed or hung up, nobody is left to tell."""
        if sys.stderr is not None:  # else descriptor 2 may be anything by now
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):
                self.abandon(2)

    def tell(self, text: str) -> None:
        """Print a line to stderr, masked; a key that was typed where none belongs, too."""
        line = masked(clean(text), self.secrets)
        line = re.sub("(?i)llx-[a-z0-9_-]{14,}", MASK, line)
        self.write_error(f"{line}\n")

    def say(self, text: str) -> None:
        if not self.quiet:
            self.tell(text)

    def warn(self, text: str) -> None:
        """Print a warning once."""
        if text not in self.warned:
            self.warned.add(text)
            self.tell(f"warning: {text}")

    def can_ask(self) -> bool:
        if self.process.get("CI") or self.process.get("TERM") == "dumb":
            return False
        return is_terminal(self.input) and is_terminal(sys.stderr)

    def ask(self, question: str) -> str:
        """One line from the user.

        Raises KeyboardInterrupt at Ctrl-C, Ctrl-D and a hang-up.
        """
        catch_signals()
        self.write_error(masked(clean(question), self.secrets))
        line = b""
        with contextlib.suppress(OSError):  # a hang-up
            line = self.input.buffer.readline()  # bytes, whatever the locale
        if not line.endswith(b"\n"):
            raise KeyboardInterrupt
        return str(line, "utf-8", "replace").strip()

    def ask_hidden(self, question: str) -> str:
        """One line that is not shown as it is typed; raises Failure, and as ask() does."""
        import getpass
        import warnings

        catch_signals()  # so that the terminal gets its echo back
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(clean(question), sys.stderr).strip()
        except (EOFError, OSError):
            raise KeyboardInterrupt from None
        except getpass.GetPassWarning:
            raise Failure(
                "this terminal cannot hide what is typed", code=EXIT_USAGE
            ) from None
        except UnicodeDecodeError:  # which would quote it; getpass has not ended the line
            self.write_error("\n")
            raise Failure("what was typed is not text", code=EXIT_USAGE) from None

    def choose(
        self, name: str, choices: "Choices", flag: str, current: "Optional[str]" = None
    ) -> str:
        """Let the user pick one of CHOICES, a NAME; raises Failure where none can be asked.

        FLAG is what chooses without asking. CURRENT stands for an empty answer.
        """
        if not self.can_ask():
            message = f"no {name} given; choose one with {flag}: {listed(choices)}"
            raise Failure(message, code=EXIT_USAGE)
        values = [value for value, _ in choices]
        question = f"{name.capitalize()}, by number or name: "
        if current in values:
            question = f"{name.capitalize()}, by number or name [{current}]: "
        self.show_menu(choices, current)
        while True:
            answer = self.ask(question)
            if not answer and current in values:
                return str(current)
            matches = find_choices(answer, choices) if answer else []
            if len(matches) == 1:
                return matches[0]
            if matches:
                self.tell(f"{answer} matches {len(matches)} of them: {', '.join(matches)}")
            else:
                word = answer or "an empty answer"
                self.tell(f"{word} is not on the list (1 to {len(choices)})")

    def show_menu(self, choices: "Choices", current: "Optional[str]") -> None:
        for number, (value, label) in enumerate(choices, 1):
            mark = "*" if value == current else " "
            name = label if label == value else f"{label} ({value})"
            self.tell(f"{mark} {number:3}  {name}")

    def countdown(self, expires_at: float) -> "Wait":
        """A way to wait that shows the time left until EXPIRES_AT (monotonic seconds)."""
        width = 20  # a narrow terminal must not wrap it
        blank = "\r".ljust(width + 1) + "\r"
        is_shown = is_terminal(sys.stderr) and not self.quiet
        if self.process.get("TERM") == "dumb":
            is_shown = False

        def wait(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if is_shown:
                    left = max(0, int(expires_at - time.monotonic()))
                    text = f"waiting, {left // 60}:{left % 60:02} left"
                    self.write_error(blank + text[:width])
                # by the second: a Ctrl-C just before a sleep is seen only after it
                time.sleep(max(0.0, min(1.0, end - time.monotonic())))
            if is_shown:
                self.write_error(blank)

        return wait

    def open_browser(self, url: str) -> None:
        """Open URL where a graphical browser is plausible; say nothing if there is none."""
        get = self.process.get
        is_remote = get("SSH_CONNECTION") or get("SSH_TTY") or get("SSH_CLIENT")
        has_display = WINDOWS or MACOS or get("DISPLAY") or get("WAYLAND_DISPLAY")
        if is_remote or not has_display or not re.fullmatch("(?i)https?://[!-~]+", url):
            return
        import threading
        import webbrowser

        def start_browser() -> None:
            with contextlib.suppress(webbrowser.Error, OSError, ValueError):
                browser = webbrowser.get()
                program = str(getattr(browser, "name", ""))
                if os.path.basename(program) not in TEXT_BROWSERS:
                    browser.open(url)

        thread = threading.Thread(target=start_browser, daemon=True)
        with contextlib.suppress(RuntimeError):  # the system allows no more threads
            thread.start()
            thread.join(BROWSER_TIMEOUT)  # some browsers return only when they are closed

    def read_stdin(self) -> str:
        """The key that stdin holds."""
        if self.process.program_on_stdin:
            message = "standard input holds the program, so it cannot hold the key as well"
            hint = "llamactl auth token --api-key-file PATH --project ID"
            raise Failure(message, hint, EXIT_USAGE)
        require(sys.stdin is not None, "standard input is closed", code=EXIT_USAGE)
        return decoded_key(sys.stdin.buffer.read(MAX_KEY_BYTES))


# ==== disk: whose file it is, private folders, a lock, atomic replacement
LOCK_TIMEOUT = 10.0
RENAME_TIMEOUT = 1.0
ACL = "system.posix_acl_access"
IMPORTED_LATER = """email.utils encodings.idna encodings.utf_8_sig fcntl ipaddress select
shlex signal ssl threading traceback urllib.request"""
INJECT_TO_STDOUT = "llamactl auth inject --env-file -"
NO_NEW_FILE = (errno.EACCES, errno.EPERM, errno.EROFS)  # how a folder refuses one
NO_RENAME = (errno.EBUSY, errno.EXDEV)  # how a file that is mounted refuses to be replaced


@contextlib.contextmanager
def naming_path(path: str, verb: str) -> "Iterator[None]":
    """Turn the operating system's errors into a Failure that names PATH."""
    try:
        yield
    except (OSError, RecursionError, UnicodeError) as error:  # the last two for an odd path
        raise Failure(f"{path} cannot be {verb}: {reason(error)}") from None


def user_name(uid: int) -> str:
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"


def belongs_to(path: str, status: "os.stat_result", hint: str = "") -> Failure:
    """The refusal to use a file of somebody else's."""
    return Failure(f"{path} belongs to {user_name(status.st_uid)}", hint)


def is_ours(status: "os.stat_result") -> bool:
    """Whether a file is ours or root's, or of group 0 where that is our own primary group.

    The last is how OpenShift runs a container: with a random uid, and group 0.
    """
    if WINDOWS or status.st_uid in (0, os.geteuid()):
        return True
    return os.geteuid() != 0 and os.getegid() == 0 and status.st_gid == 0


def bits_of_others(status: "os.stat_result", bits: int) -> int:
    """Which of the permission BITS (0o044 to read, 0o022 to write) others have.

    Those of the group count unless it is root's or has our own number, as a private group
    has. In a sticky folder of root's nobody can touch what is another's.
    """
    if WINDOWS or (status.st_mode & stat.S_ISVTX and status.st_uid == 0):
        return 0
    if status.st_gid in (0, os.geteuid()):
        bits &= 0o007
    return status.st_mode & bits


def can_chmod(path: str) -> bool:
    """Whether chmod changes anything: not on a read-only file system, nor without modes."""
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return False
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, kind = line.partition(" - ")
            if fields.split()[2] == number:
                return kind.split()[0] not in (
                    "9p",
                    "cifs",
                    "drvfs",
                    "exfat",
                    "fuseblk",
                    "vfat",
                )
    return True


def warn_if_open(path: str, bits: int, fix: str, warn: "Warn") -> None:
    """Warn where others have one of the permission BITS at PATH; `chmod FIX` removes it."""
    with contextlib.suppress(FileNotFoundError):
        found = bits_of_others(os.stat(path), bits)
        if found and can_chmod(path):
            verb = "write to" if found & 0o022 else "read"
            warn(f"others can {verb} {path}; run: chmod {fix} {shell_quoted(path)}")


def links_on(path: str) -> "List[str]":
    """Each link that the absolute PATH leads through, itself included; on POSIX alone."""
    links = []  # type: List[str]
    if WINDOWS:
        return links
    place = os.sep
    parts = path.split(os.sep)
    while parts and len(links) < 40:
        here = os.path.normpath(os.path.join(place, parts.pop(0)))
        if os.path.islink(here):
            links.append(here)
            target = os.readlink(here)
            if os.path.isabs(target):
                place = os.sep
            parts = target.split(os.sep) + parts
        else:
            place = here
    return links


def nearest_folder(path: str) -> str:
    """The folder PATH, else the nearest one above it that there is."""
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


@contextlib.contextmanager
def acting_as(uid: int, folder: str) -> "Iterator[None]":
    """Have the effective ids of the user UID, and no other groups: the kernel then decides.

    Only root can. FOLDER has the group of a user whom the system does not know.
    """
    for module in IMPORTED_LATER.split():  # from files that the user may not read
        with contextlib.suppress(ImportError):
            __import__(module)
    groups = os.getgroups()
    gid = os.getegid()
    try:
        import pwd

        user_gid = pwd.getpwuid(uid).pw_gid
    except (ImportError, KeyError):
        user_gid = os.stat(folder).st_gid
    try:
        try:
            os.setgroups([])
            os.setegid(user_gid)
            os.seteuid(uid)
        except OSError as error:
            message = f"{folder} belongs to {user_name(uid)}, whom root cannot become"
            raise Failure(
                f"{message}: {reason(error)}", f"export {VAR_FOLDER}=PATH"
            ) from None
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        with contextlib.suppress(OSError):  # as at the start
            os.setgroups(groups)


def open_unblocked(path: str, flags: int) -> int:
    """An opener for open() that no FIFO holds up and that follows no link."""
    for name in ("O_NONBLOCK", "O_NOFOLLOW"):
        flags |= getattr(os, name, 0)
    return os.open(path, flags)


@contextlib.contextmanager
def open_regular(path: str, mode: str) -> "Iterator[Any]":
    """The regular file PATH, opened without a buffer; raises OSError and Failure."""
    with open(path, mode, buffering=0, opener=open_unblocked) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Failure(f"{path} is not a regular file")
        yield file


def read_regular(path: str) -> "Optional[Snapshot]":
    """The regular file PATH, None where there is none; raises OSError and Failure."""
    try:
        with open_regular(path, "rb") as file:
            return Snapshot(file.read(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return None


def read_key_file(path: str) -> str:
    """The key in the file PATH, which may be a pipe."""
    with naming_path(path, "read"), open(path, "rb") as file:
        return decoded_key(file.read(MAX_KEY_BYTES))


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def make_private_folder(path: str) -> None:
    """Make the folder PATH and those above it, 0700 whatever the umask; raises OSError."""
    if os.path.isdir(path):
        return
    make_private_folder(os.path.dirname(path))
    umask = os.umask(0o077)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:  # another process was first
        return
    finally:
        os.umask(umask)


def set_mode(descriptor: int, mode: int) -> None:
    """Set the permissions of an open file, where its file system keeps any."""
    if not WINDOWS:
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, mode)


def copy_attributes(source: int, target: int) -> bool:
    """Give the file TARGET the ACL and the other extended attributes of SOURCE.

    Returns whether the ACL is the same now; a folder may have given TARGET one of its own.
    """
    if not hasattr(os, "listxattr"):
        return True
    with contextlib.suppress(OSError):  # a file system without attributes
        is_same = True
        names = os.listxattr(source)
        if ACL in os.listxattr(target) and ACL not in names:
            os.removexattr(target, ACL)
        for name in names:
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError:  # some belong to the system alone
                is_same = is_same and name != ACL
        return is_same
    return True


def copy_access(source: int, target: int) -> None:
    """Give the file TARGET owner, group, mode and attributes of SOURCE.

    What cannot be copied gives nobody access who did not have it.
    """
    status = os.fstat(source)
    mode = stat.S_IMODE(status.st_mode)
    for uid in (status.st_uid, -1):  # only root gives a file away; its group we may keep
        with contextlib.suppress(OSError):
            os.fchown(target, uid, status.st_gid)
            break
    is_same = copy_attributes(source, target)
    if not is_same or os.fstat(target).st_gid != status.st_gid:
        mode &= 0o707
    set_mode(target, mode)


def write_and_sync(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def write_new(path: str, content: bytes, like: "Optional[int]" = None) -> None:
    """Make the file PATH anew, 0600 or as the open file LIKE is; raises OSError."""
    remove(path)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        if like is None or WINDOWS:
            set_mode(file.fileno(), 0o600)
        else:
            copy_access(like, file.fileno())
        write_and_sync(file.fileno(), content)


def sync_folder(path: str) -> None:
    """Make a rename survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace(source: str, target: str) -> None:
    """Put SOURCE in TARGET's place in one step; raises OSError."""
    end = time.monotonic() + RENAME_TIMEOUT
    while True:
        try:
            os.replace(source, target)
            break
        except PermissionError:  # Windows, for the moment that a reader has TARGET open
            if not WINDOWS or time.monotonic() > end:
                raise
            time.sleep(LOCK_PAUSE)
    sync_folder(os.path.dirname(target))


def try_lock(descriptor: int) -> bool:
    """Take the kernel's exclusive lock, which ends with the descriptor or the process."""
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # this Python has no locks, as the README says
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def open_lock(path: str, hint: str) -> int:
    """A descriptor of the lock file PATH, which is ours; raises OSError and Failure."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o600)
    status = os.fstat(descriptor)
    if not is_ours(status):
        os.close(descriptor)
        raise belongs_to(path, status, hint)
    if status.st_nlink == 1:  # another name may be of a file that has a mode of its own
        set_mode(descriptor, 0o600)
    return descriptor


def wait_for_lock(path: str, hint: str) -> int:
    """A descriptor that holds the lock file PATH; raises OSError, after 10 s Failure."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        descriptor = open_lock(path, hint)
        is_held = False
        try:
            while not try_lock(descriptor):
                require(time.monotonic() < end, f"{path} is locked by another process")
                time.sleep(LOCK_PAUSE)
            with contextlib.suppress(FileNotFoundError):  # its last holder removed it
                is_held = os.path.samestat(os.stat(path), os.fstat(descriptor))
        finally:
            if not is_held:
                os.close(descriptor)
        if is_held:
            return descriptor


@contextlib.contextmanager
def exclusive(path: str, *temporary: str, hint: str = "") -> "Iterator[None]":
    """Hold the lock file PATH, and remove the TEMPORARY files at the end.

    HINT is the command to try where the lock file is not ours.
    """
    catch_signals()
    descriptor = wait_for_lock(path, hint)
    try:
        yield
    finally:
        try:
            for each in temporary:
                with contextlib.suppress(PermissionError):  # Windows keeps what is open
                    remove(each)
        finally:
            os.close(descriptor)


def write_successor(
    path: str, new: str, edit: "Callable[[bytes], bytes]", check: "Check"
) -> None:
    """Write what EDIT makes of the file PATH to NEW, which is like it."""
    try:
        with open_regular(path, "rb") as file:
            check(os.fstat(file.fileno()))
            write_new(new, edit(file.read()), file.fileno())
    except FileNotFoundError:
        write_new(new, edit(b""))


def write_in_place(
    path: str, edit: "Callable[[bytes], bytes]", seen: "os.stat_result"
) -> None:
    """Rewrite the file PATH, which must be the one that was SEEN and have no other name.

    What needs more room is written first: a full disk then tears nothing.
    """
    with open_regular(path, "rb+") as file:
        status = os.fstat(file.fileno())
        if not os.path.samestat(status, seen) or status.st_nlink != 1:
            raise Failure(f"{path} was replaced meanwhile, or has a second name")
        before = file.read()
        after = edit(before)
        size = len(before)
        try:
            write_and_sync(file.fileno(), after[size:])
            file.seek(0)
            write_and_sync(file.fileno(), after)
            size = len(after)
        finally:
            file.truncate(size)


def rewrite_checked(
    path: str, edit: "Callable[[bytes], bytes]", check: "Check", warn: "Warn"
) -> bool:
    """Replace the file PATH by what EDIT makes of it; False where that changes nothing.

    CHECK raises Failure for a file that must not be written to. Raises OSError.
    """
    before = read_regular(path)
    if before:
        check(before.status)
        if edit(before.content) == before.content:
            return False
        warn_if_open(path, 0o066, "600", warn)
    make_private_folder(os.path.dirname(path))
    lock = f"{path}.llamactl-lock"
    new = f"{path}.llamactl-new"
    refusals = NO_NEW_FILE  # type: Tuple[int, ...]
    try:
        with exclusive(lock, new, lock, hint=INJECT_TO_STDOUT):
            write_successor(path, new, edit, check)
            refusals = NO_RENAME
            replace(new, path)
    except OSError as error:
        if before is None or error.errno not in refusals:
            raise
        warn(f"{path} is written in place: a crash meanwhile would tear it")
        write_in_place(path, edit, before.status)
    return True


def rewrite_file(
    path: str, edit: "Callable[[bytes], bytes]", is_named: bool, warn: "Warn"
) -> "Tuple[bool, str]":
    """Replace the file PATH by what EDIT makes of it, but never a file of a stranger's.

    IS_NAMED says that PATH was named in full: root then writes as the owner of the folder,
    or in a folder of its own into anybody's file. Returns whether anything changed, and
    what to call the file. Raises OSError and Failure.
    """
    real = os.path.realpath(path)
    folder = nearest_folder(os.path.dirname(real))
    owner = os.stat(folder)
    is_root = not WINDOWS and os.geteuid() == 0
    is_shared = not is_ours(owner)
    hint = INJECT_TO_STDOUT
    if is_root and not is_named:
        hint = f"llamactl auth inject --env-file {shell_quoted(os.path.abspath(path))}"

    def check(status: "os.stat_result") -> None:
        is_safe = is_ours(status)
        if is_root:
            is_closed = not is_shared and not owner.st_mode & 0o022
            is_safe = status.st_uid == owner.st_uid or (is_named and is_closed)
        if not is_safe:
            raise belongs_to(path, status, hint)
        if is_shared and (status.st_nlink > 1 or bits_of_others(status, 0o044)):
            message = f"others can read {path}, or it has a second name"
            raise Failure(message, f"chmod 600 {shell_quoted(path)}")

    for link in links_on(os.path.abspath(path)):
        status = os.lstat(link)
        if not is_ours(status) and not (is_root and status.st_uid == owner.st_uid):
            raise belongs_to(link, status, hint)
    place = path if real == os.path.abspath(path) else f"{path} (a link to {real})"
    if not is_root or not is_shared:
        return rewrite_checked(real, edit, check, warn), place
    if not is_named:
        raise belongs_to(folder, owner, hint)
    with acting_as(owner.st_uid, folder):
        changed = rewrite_checked(real, edit, check, warn)
    return changed, f"{place}, owned by {user_name(owner.st_uid)}"


# ==== store: profiles.json, the shape of its records and their check
STORE_NAME = "profiles.json"
STORE_VERSION = 1
DAMAGED = ".damaged-"
OFFICIAL_STORE = "profiles.db"
PROVIDER_FIELDS = ("issuer", "client_id", "token_endpoint", "revocation_endpoint")
PROFILE_TEXTS = (
    "api_key",
    "project_id",
    "project_name",
    "org_id",
    "api_key_id",
    "issuer",
    "sub",
    "email",
    "access_token",
    "refresh_token",
)


def is_text_or_none(value: "Any") -> bool:
    return value is None or isinstance(value, str)


def has_texts(record: "Any", names: "Sequence[str]") -> bool:
    """Whether RECORD is an object whose NAMES are texts, null or missing."""
    return isinstance(record, dict) and all(
        is_text_or_none(record.get(name)) for name in names
    )


def is_provider_or_none(record: "Any") -> bool:
    return record is None or has_texts(record, PROVIDER_FIELDS)


def is_profile(record: "Any") -> bool:
    if not has_texts(record, PROFILE_TEXTS) or not isinstance(record.get("auth_type"), str):
        return False
    expires_at = record.get("access_expires_at")
    if expires_at is not None and not is_number(expires_at):
        return False
    return is_provider_or_none(record.get("provider"))


def is_waiting_login(record: "Any") -> bool:
    return (
        isinstance(record, dict)
        and is_provider_or_none(record.get("provider"))
        and isinstance(record.get("device_code"), str)
        and is_number(record.get("expires_at"))
        and is_number(record.get("interval"))
    )


def is_environment(record: "Any") -> bool:
    if not has_texts(record, ("current_profile",)):
        return False
    profiles = record.get("profiles")
    login = record.get("login")
    return (
        isinstance(profiles, dict)
        and all(is_profile(profile) for profile in profiles.values())
        and (login is None or is_waiting_login(login))
    )


def is_store(data: "Any") -> "TypeGuard[StoreData]":
    environments = data.get("environments")
    return (
        type(data.get("version")) is int
        and is_text_or_none(data.get("current_environment"))
        and isinstance(environments, dict)
        and all(is_environment(environment) for environment in environments.values())
    )


def serialized_store(data: "StoreData") -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode("ascii") + b"\n"


def new_store() -> "StoreData":
    return {"version": STORE_VERSION, "current_environment": None, "environments": {}}


def current_url(data: "StoreData") -> str:
    return data.get("current_environment") or DEFAULT_API_URL


def new_environment() -> "Environment":
    return {"requires_auth": True, "current_profile": None, "profiles": {}}


def get_environment(data: "StoreData", api_url: str) -> "Environment":
    """What is stored of API_URL; an environment without profiles where nothing is."""
    return data["environments"].get(api_url) or new_environment()


def add_environment(data: "StoreData", api_url: str) -> "Environment":
    """What is stored of API_URL, to be changed, stored from now on if it was not."""
    return data["environments"].setdefault(api_url, new_environment())


class Store:
    """profiles.json: the environments, each with its profiles and its current one."""

    def __init__(self, folder: "Optional[str]", warn: "Warn") -> None:
        self.folder = folder or ""
        self.warn = warn
        self.named_path = os.path.join(self.folder or os.sep, STORE_NAME)
        self.path = os.path.realpath(self.named_path)
        self.lock_path = f"{self.path}.lock"
        self.new_path = f"{self.path}.new"
        self.official_path = os.path.join(self.folder or os.sep, OFFICIAL_STORE)

    def load(self) -> "StoreData":
        with naming_path(self.path, "read"), self._as_owner():
            data = self._read()
            self._warn_if_open()
            return data

    @contextlib.contextmanager
    def _as_owner(self) -> "Iterator[None]":
        """Work on the store as ourselves; as root, as the owner of its folder.

        Raises Failure where a part of it belongs to anybody else.
        """
        if not self.folder or WINDOWS:
            yield
            return
        folder = os.path.dirname(self.path)
        is_root = os.geteuid() == 0
        if is_root:
            folder = nearest_folder(folder)  # whoever it belongs to gets the new one
        owner = self._require_one_owner(folder, is_root)
        if owner is None:
            yield
            return
        name = user_name(owner)
        self.warn(f"{folder} belongs to {name}; working there as {name}")
        with acting_as(owner, folder):
            yield

    def _require_one_owner(self, folder: str, is_root: bool) -> "Optional[int]":
        """The uid that root works as, None for our own; raises Failure for a stranger.

        A user's link may lead to that user's own file alone.
        """
        owner = os.stat(folder).st_uid if os.path.exists(folder) else 0
        links = links_on(self.named_path)
        for path in [folder, self.path, self.lock_path] + links:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                status = os.lstat(path)
                if not is_ours(status) and not (is_root and status.st_uid == owner):
                    name = user_name(status.st_uid)
                    hint = f"run llamactl as {name}, or export {VAR_FOLDER}=PATH"
                    raise belongs_to(path, status, hint)
        if not is_root or owner == 0:
            return None
        if os.path.exists(self.path) and os.stat(self.path).st_uid != owner:
            for link in links:
                if os.lstat(link).st_uid == owner:
                    raise Failure(
                        f"{link} leads to a file that is not {user_name(owner)}'s"
                    )
        return owner

    def _read(self) -> "StoreData":
        """The content, an empty store's where there is none; raises OSError and Failure."""
        found = read_regular(self.path) if self.folder else None
        if found is None:
            return new_store()
        if not is_ours(found.status):
            raise belongs_to(self.path, found.status)
        data = parse_object(found.content) or {}  # type: Any
        version = data.get("version")
        if type(version) is int and version > STORE_VERSION:
            raise Failure(
                f"{self.path} was written by a newer llamactl.py and is left alone"
            )
        if not is_store(data):
            message = f"{self.path} is damaged; the next change moves it aside"
            raise Damaged(message, HINT_LOGIN)
        return data

    def _warn_if_open(self) -> None:
        """Warn where others can write to the folder, or use a file of ours."""
        if not WINDOWS:
            warn_if_open(os.path.dirname(self.path), 0o022, "go-w", self.warn)
            if os.path.exists(self.path) and os.stat(self.path).st_uid == os.geteuid():
                warn_if_open(self.path, 0o066, "600", self.warn)

    @contextlib.contextmanager
    def change(self) -> "Iterator[StoreData]":
        """Lock the store, yield its content, and write what the caller made of it."""
        if not self.folder:
            message = "there is no home directory to keep profiles in"
            raise Failure(message, f"export {VAR_FOLDER}=PATH")
        with naming_path(self.path, "changed"), self._as_owner():
            make_private_folder(os.path.dirname(self.path))
            with exclusive(self.lock_path, self.new_path):
                data = self._read_for_change()
                yield data
                self.save(data)

    def _read_for_change(self) -> "StoreData":
        """The content of a file that is private from now on, or moved aside if damaged."""
        self._make_private()
        try:
            data = self._read()
            serialized_store(data)
        except (
            Damaged,
            RecursionError,
            ValueError,
        ):  # the last two: it can't be written again
            self._move_aside()
            return self._read_for_change()
        return data

    def _make_private(self) -> None:
        with contextlib.suppress(FileNotFoundError), open_regular(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if not WINDOWS and status.st_uid == os.geteuid() and status.st_mode & 0o077:
                set_mode(file.fileno(), 0o600)
        self._warn_if_open()

    def save(self, data: "StoreData") -> None:
        """Write DATA unless the file says the same; for whoever holds the lock."""
        if data != self._read():
            write_new(self.new_path, serialized_store(data))
            replace(self.new_path, self.path)

    def check_writable(self) -> "StoreData":
        """The content, after proof that the file can be replaced: it may be mounted."""
        with self.change() as data:
            found = read_regular(self.path)
            write_new(self.new_path, found.content if found else serialized_store(data))
            if found:
                replace(self.new_path, self.path)
        return data

    def _move_aside(self) -> None:
        """Rename the file, which is damaged, if it is ours."""
        if not WINDOWS and os.stat(self.path).st_uid != os.geteuid():
            raise Failure(f"{self.path} is damaged, and not ours to move aside")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder, name = os.path.split(self.path)
        name = free_name(f"{name}{DAMAGED}{stamp}", os.listdir(folder))
        aside = os.path.join(folder, name)
        os.rename(self.path, aside)
        self.warn(f"{self.path} was damaged; it is kept as {aside}")

    def damaged_copies(self) -> "List[str]":
        """What was moved aside; the folder itself where that cannot be known."""
        folder = os.path.dirname(self.path)
        try:
            names = os.listdir(folder)
        except OSError:
            return [folder]
        return [os.path.join(folder, name) for name in names if DAMAGED in name]


# ==== http: the one place that sends anything; urllib and ssl live here
MAX_ANSWER = 8 * 1024 * 1024  # bytes
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 30.0
UNROUTABLE = (
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EACCES,
    errno.EPERM,
)
CA_BUNDLES = (  # where Linux systems, the BSDs and macOS keep theirs
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/usr/local/share/certs/ca-root-nss.crt",
)
# what a form or an answer may hold that must never be shown
SECRET_FIELDS = (
    "access_token",
    "refresh_token",
    "id_token",
    "device_code",
    "token",
    "redacted_api_key",
)


class Answer:
    """A server's whole answer, and the scheme, host and port that it came from."""

    def __init__(self, status: int, headers: "Message", body: bytes, origin: str) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.origin = origin

    def json(self) -> "Json":
        value = parse_object(self.body)
        if value is None:
            message = f"{self.origin} sent no JSON object"
            raise Unreachable(message, Unreachable.UNUSABLE)
        return value

    def require_success(self) -> "Answer":
        """This answer, if its status is 2xx; raises Unreachable or Refused."""
        if 200 <= self.status < 300:
            return self
        message = f"{self.origin} answered {self.status}{self.explanation()}"
        if self.status == 429 or self.status >= 500:
            raise Unreachable(message, Unreachable.FAILING)
        refused = Refused(message, self.status)
        if self.status == 401:
            refused = Refused(message, self.status, HINT_LOGIN, EXIT_REJECTED)
        refused.is_json = parse_object(self.body) is not None
        raise refused

    def explanation(self) -> str:
        """The server's `detail` (FastAPI) or error (RFC 6749 §5.2), and the request id."""
        body = parse_object(self.body) or {}
        detail = body.get("detail") or body.get("error_description") or body.get("error")
        if isinstance(detail, list):
            messages = [str(each.get("msg")) for each in detail if isinstance(each, dict)]
            detail = "; ".join(messages)
        text = ""
        if detail and isinstance(detail, str):
            text = f": {shortened(detail)}"
        request_id = self.headers.get("x-request-id") or self.headers.get(
            "x-correlation-id"
        )
        if request_id:
            text += f" (request {shortened(request_id)})"
        return text


def trusted_url(url: "Any", api_url: str) -> str:
    """URL, which a server of the environment API_URL named, if secrets may go there.

    That is https; http where the environment is http itself, and as near as that is.
    """
    require_usable(isinstance(url, str), f"{api_url} named no URL where one belongs")
    if not origin_of(url).startswith("https:"):
        if not api_url.startswith("http:"):
            raise Failure(f"the server named a URL that is not https: {shortened(url)}")
        if is_loopback(api_url) and not is_loopback(origin_of(url)):
            raise Failure(f"the server named a URL beyond this machine: {shortened(url)}")
    return str(url)


def endpoint(base: str, path: str, *names: str, **query: "Optional[str]") -> str:
    """The URL of PATH, then NAMES, each one segment, then what is not None of QUERY."""
    from urllib.parse import quote, urlencode

    require(not {".", ".."}.intersection(names), "a name cannot consist of dots alone")
    segments = [quote(name, safe="", errors="replace") for name in names]
    url = base + "/".join([path] + segments)
    given = {name: value for name, value in query.items() if value is not None}
    if given:
        url += "?" + urlencode(given, errors="replace")
    return url


def find_ca_bundle(process: Process) -> "CaBundle":
    """The trusted certificates; neither file nor folder where OpenSSL finds its own."""
    try:
        import ssl
    except ImportError:
        return CaBundle(None, None, "none: this Python has no ssl module")
    file = process.get("SSL_CERT_FILE")
    folder = process.get("SSL_CERT_DIR")
    if file or folder:
        return CaBundle(file, folder, "SSL_CERT_FILE" if file else "SSL_CERT_DIR")
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        path = process.get(variable)
        if path and os.path.isdir(path):
            return CaBundle(None, path, variable)
        if path:
            return CaBundle(path, None, variable)
    own = ssl.get_default_verify_paths()
    has_folder = False
    with contextlib.suppress(OSError):
        has_folder = bool(own.capath and os.listdir(own.capath))
    if own.cafile or has_folder or WINDOWS:
        return CaBundle(None, None, own.cafile or own.capath or "the system's store")
    for path in CA_BUNDLES:
        if os.path.exists(path):
            return CaBundle(path, None, "search")
    return CaBundle(None, None, "none found")


def tls_context(process: Process) -> "ssl.SSLContext":
    """What checks a server's certificate; raises Failure."""
    try:
        import ssl
    except ImportError:
        raise Failure("this Python has no ssl module, so it cannot use https") from None
    bundle = find_ca_bundle(process)
    place = bundle.file or bundle.folder or "OpenSSL's store"
    with naming_path(f"{place} (from {bundle.source})", "trusted"):
        # not create_default_context(), which obeys SSLKEYLOGFILE
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if bundle.file or bundle.folder:
            context.load_verify_locations(bundle.file, bundle.folder)
        else:
            context.load_default_certs()
    if hasattr(context, "minimum_version"):
        least = ssl.TLSVersion.TLSv1_2
        context.minimum_version = max(
            context.minimum_version, least
        )  # a policy may ask more
        with contextlib.suppress(AttributeError):  # an OpenSSL that cannot be told
            context.hostname_checks_common_name = False
    else:  # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def is_exempt(host: str, port: int, no_proxy: str) -> bool:
    """Whether the list NO_PROXY names HOST.

    An entry is `*`, a host or a suffix (with `.` or `*.` in front, or without), perhaps
    with a port, an address or a CIDR block.
    """
    host = host.strip("[]")
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        match = re.fullmatch(r"(\[.*\]|[^:]*):([0-9]+)", entry)
        name = match.group(1) if match else entry
        if match and int(match.group(2)) != port:
            continue
        name = name.strip("[]")
        suffix = name.lstrip("*.")
        if name == "*" or (suffix and f".{host}".endswith(f".{suffix}")):
            return True
        if "/" in name:
            from ipaddress import ip_address, ip_network

            with contextlib.suppress(ValueError):  # a name, or no block
                if ip_address(host) in ip_network(name, strict=False):
                    return True
    return False


def find_proxy(process: Process, url: str, is_offline: bool = False) -> "Optional[Proxy]":
    """The proxy for URL; none for this machine itself. Raises Failure unless it is http.

    The system's own exemptions are not asked for where IS_OFFLINE: they look names up.
    """
    from urllib.request import getproxies, proxy_bypass

    try:
        scheme, host, port, _ = split_url(url, ".*")
    except ValueError:  # no request goes there
        return None
    proxies = getproxies()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or is_loopback(url) or is_exempt(host, port, proxies.get("no", "")):
        return None
    source = "the system's settings"
    for name in ("ALL_PROXY", "all_proxy", f"{scheme}_proxy".upper(), f"{scheme}_proxy"):
        if process.get(name):
            source = name
    if source == "the system's settings" and not is_offline and proxy_bypass(host):
        return None
    kind, _, place = address.rpartition("://")
    if kind.lower() not in ("", "http"):
        message = f"{source} names a proxy of the kind {kind}://, which is not supported"
        raise Failure(message, f"export {scheme}_proxy=http://HOST:PORT")
    shown = place.rpartition("@")[2]
    return Proxy(f"http://{place}", f"http://{shown} (from {source})")


def connect_to_first(
    address: "Tuple[str, int]", timeout: float, _: "Any" = None
) -> "socket.socket":
    """A connection to the first address of a host that answers; raises OSError.

    One that is silent for 250 ms does not hold up the next (RFC 8305 §5).
    """
    import select
    import socket

    queue = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
    attempts = []  # type: List[socket.socket]
    failure = OSError("the host has no address")
    end = time.monotonic() + timeout
    try:
        while queue or attempts:
            if queue:
                family, kind, protocol, _, place = queue.pop(0)
                attempt = socket.socket(family, kind, protocol)
                attempts.append(attempt)
                attempt.setblocking(False)
                number = attempt.connect_ex(place)
                if number not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
                    failure = OSError(number, os.strerror(number))
                    attempts.pop().close()
            pause = 0.25 if queue else max(0.0, end - time.monotonic())
            _, ready, failed = select.select([], attempts, attempts, pause)
            for attempt in set(ready + failed):
                attempts.remove(attempt)
                number = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number == 0:
                    attempt.settimeout(timeout)
                    return attempt
                failure = OSError(number, os.strerror(number))
                attempt.close()
            if time.monotonic() >= end:
                raise socket.timeout("timed out")
    finally:
        for attempt in attempts:
            attempt.close()
    raise failure


def new_opener(
    process: Process, proxies: "Dict[str, str]", on_first_byte: "Callable[[], None]"
) -> "OpenerDirector":
    """urllib for http and https alone: no file, ftp or data, and no redirects."""
    import http.client
    import urllib.request

    class Response(http.client.HTTPResponse):
        def begin(self) -> None:
            if self.fp.peek(1):
                on_first_byte()
            super().begin()

    def prepared(connection: "Any") -> "Any":
        connection.response_class = Response
        connection._create_connection = connect_to_first
        return connection

    def connect_http(host: str, **options: "Any") -> "Any":
        return prepared(http.client.HTTPConnection(host, **options))

    def connect_https(host: str, **options: "Any") -> "Any":
        context = tls_context(process)
        return prepared(http.client.HTTPSConnection(host, context=context, **options))

    class Handler(urllib.request.AbstractHTTPHandler):
        http_request = urllib.request.AbstractHTTPHandler.do_request_
        https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: "Request") -> "Any":
            return self.do_open(connect_http, request)

        def https_open(self, request: "Request") -> "Any":
            return self.do_open(connect_https, request)

    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler(proxies))
    opener.add_handler(Handler())
    return opener


def fetch(
    request: "Request",
    process: Process,
    proxy: "Optional[Proxy]",
    on_first_byte: "Callable[[], None]",
) -> Answer:
    """The whole answer to REQUEST.

    Raises what urllib, http.client, ssl and sockets raise, and Unreachable.
    """
    from http.client import IncompleteRead

    origin = origin_of(request.full_url)
    proxies = {request.type: proxy.url} if proxy else {}
    opener = new_opener(process, proxies, on_first_byte)
    body = bytearray()
    with opener.open(request, timeout=process.timeout(PAUSE_TIMEOUT)) as response:
        while len(body) <= MAX_ANSWER:
            piece = response.read(65536)  # one read of all would keep each chunk apart
            if not piece:
                break
            body += piece
    is_small = len(body) <= MAX_ANSWER
    require_usable(is_small, f"{origin} sent more than {MAX_ANSWER >> 20} MiB")
    if response.length:
        raise IncompleteRead(b"", response.length)
    if proxy and response.status == 407:
        raise OSError("Tunnel connection failed: 407")  # as http.client has it for https
    return Answer(response.status, response.headers, bytes(body), origin)


def tls_failure(error: Exception, origin: str, has_begun: bool) -> Unreachable:
    """What ssl raised: a failed handshake, or a connection that broke off."""
    if has_begun or "EOF" in type(error).__name__:
        return Unreachable(f"{origin}: the connection broke off", Unreachable.BROKEN_OFF)
    words = getattr(error, "verify_message", "") or getattr(error, "reason", "")
    message = f"{origin}: TLS failed: {words or 'the certificate is not valid here'}"
    return Unreachable(message, Unreachable.UNUSABLE, "llamactl auth status")


def network_failure(error: Exception, place: str, has_begun: bool) -> Unreachable:
    """What urllib, http.client, ssl or a socket raised, in words that quote no request.

    PLACE is where the request went. HAS_BEGUN says whether a first byte came back.
    """
    from http.client import HTTPException, IncompleteRead
    from socket import gaierror, timeout

    cause = error
    reason_of_urllib = getattr(error, "reason", None)
    if isinstance(reason_of_urllib, Exception):  # ssl's own errors have a text there
        cause = reason_of_urllib
    tunnel = re.match("Tunnel connection failed: ([0-9]+)", str(cause))
    if tunnel:
        status = tunnel.group(1)
        stage = Unreachable.BROKEN_OFF if status >= "5" else Unreachable.UNUSABLE
        return Unreachable(f"{place}: the proxy answered {status}", stage)
    if "ssl" in type(cause).__module__:  # _ssl, on PyPy _cffi_ssl
        return tls_failure(cause, place, has_begun)
    if isinstance(cause, (gaierror, UnicodeError)):
        return Unreachable(f"{place}: no such host", Unreachable.NOT_CONNECTED)
    if isinstance(cause, ConnectionRefusedError):
        return Unreachable(f"{place}: connection refused", Unreachable.NOT_CONNECTED)
    if getattr(cause, "errno", None) in UNROUTABLE:
        return Unreachable(f"{place}: no route to host", Unreachable.NOT_CONNECTED)
    if isinstance(cause, timeout):
        stage = Unreachable.SLOW if has_begun else Unreachable.SILENT
        return Unreachable(f"{place}: timed out waiting for data", stage)
    if isinstance(cause, (ConnectionError, IncompleteRead)):
        return Unreachable(f"{place}: the connection broke off", Unreachable.BROKEN_OFF)
    if isinstance(cause, (HTTPException, ValueError)):
        return Unreachable(f"{place}: the answer is not HTTP", Unreachable.UNUSABLE)
    return Unreachable(f"{place}: {reason(cause)}", Unreachable.BROKEN_OFF)


def retry_after(answer: Answer, default: float, now: float) -> float:
    """How long ANSWER asks to wait, in seconds or by a date (RFC 9110 §10.2.3)."""
    from email.utils import parsedate_to_datetime

    text = (answer.headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(TypeError, ValueError):  # no date
        return max(default, parsedate_to_datetime(text).timestamp() - now)
    return default


class Client:
    """Sends every request. What is sent or received that is secret is hidden from then on.

    `deadline` (monotonic seconds) is when all requests together must be done; with it,
    none is retried.
    """

    def __init__(
        self,
        process: Process,
        hide: "Callable[[str], None]",
        warn: "Warn",
        sleep: "Wait" = time.sleep,
        deadline: "Optional[float]" = None,
    ) -> None:
        self.process = process
        self.hide = hide
        self.warn = warn
        self.sleep = sleep
        self.deadline = deadline

    def within(self, seconds: float) -> "Client":
        """This client, for requests that must all be done in so many seconds."""
        deadline = time.monotonic() + seconds
        return Client(self.process, self.hide, self.warn, self.sleep, deadline)

    def get_json(self, url: str, token: "Optional[str]" = None) -> "Json":
        return self.send("GET", url, token).require_success().json()

    def post_json(self, url: str, value: "Json", token: str) -> "Json":
        body = json.dumps(value).encode("ascii")
        answer = self.send("POST", url, token, body, "application/json")
        return self._hide_fields(answer.require_success().json())

    def post_form(self, url: str, form: "Dict[str, str]", once: bool = False) -> Answer:
        from urllib.parse import quote_plus, urlencode

        self._hide_fields(form)
        self._hide_fields({name: quote_plus(form[name], errors="replace") for name in form})
        body = urlencode(form, errors="replace").encode("ascii")
        kind = "application/x-www-form-urlencoded"
        answer = self.send("POST", url, None, body, kind, once)
        self._hide_fields(parse_object(answer.body) or {})
        return answer

    def _hide_fields(self, values: "Json") -> "Json":
        for name in SECRET_FIELDS:
            self.hide(str(values.get(name) or ""))
        return values

    def send(
        self,
        method: str,
        url: str,
        token: "Optional[str]" = None,
        body: "Optional[bytes]" = None,
        content_type: str = "",
        once: bool = False,
    ) -> Answer:
        """The answer of any status, after as many retries and redirects as are safe.

        TOKEN goes out as a bearer token (RFC 6750 §2.1), to URL's scheme, host and port
        alone. Raises Failure.
        """
        from urllib.parse import urljoin

        headers = {"User-Agent": f"llamactl/{__version__}", "Accept": "application/json"}
        if content_type:
            headers["Content-Type"] = content_type
        if is_sent_in_clear(url) and (token is not None or body is not None):
            self.warn(f"{origin_of(url)} is not encrypted: others can read what is sent")
        if token is not None:
            self.hide(token)
            headers["Authorization"] = f"Bearer {require_plain(token, 'the key or token')}"
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._send_with_retries(method, url, headers, body, once)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            with contextlib.suppress(ValueError):  # no URL: the loop ends it
                url = urljoin(url, answer.headers.get("Location") or "")
            if method != "GET" or origin_of(url) != answer.origin:
                message = f"{answer.origin} redirects to {shortened(url)}: refused"
                raise Refused(message, answer.status)
        raise Failure(f"{answer.origin} redirects in a circle")

    def _send_with_retries(
        self, method: str, url: str, headers: "Json", body: "Optional[bytes]", once: bool
    ) -> Answer:
        """One answer; a second try only where the server can't have acted on the first."""
        delays = () if once or self.deadline else RETRY_DELAYS
        started = time.monotonic()
        for delay in delays:
            try:
                answer = self.send_once(method, url, headers, body)
            except Unreachable as failure:
                is_safe = failure.stage == Unreachable.NOT_CONNECTED
                if method == "GET" and failure.stage == Unreachable.BROKEN_OFF:
                    is_safe = True
                if not is_safe or time.monotonic() - started > ANSWER_TIMEOUT:
                    raise
                self.sleep(delay)
                continue
            if method != "GET" or answer.status not in (429, 502, 503, 504):
                return answer
            pause = retry_after(answer, delay, time.time())
            if pause > MAX_RETRY_AFTER:
                return answer
            self.sleep(pause)
        return self.send_once(method, url, headers, body)

    def send_once(
        self, method: str, url: str, headers: "Json", body: "Optional[bytes]"
    ) -> Answer:
        """Send one request and receive its whole answer in time; raises Failure.

        A thread does it, since no name look-up heeds a time-out.
        """
        import threading
        from urllib.request import Request

        proxy = find_proxy(self.process, url)
        place = f"{origin_of(url)} by way of {proxy.label}" if proxy else origin_of(url)
        has_begun = threading.Event()
        answers = []  # type: List[Answer]
        failures = []  # type: List[Failure]

        def exchange() -> None:
            try:
                request = Request(url, body, headers, method=method)  # noqa: S310
                answers.append(fetch(request, self.process, proxy, has_begun.set))
            except Failure as failure:
                failures.append(failure)
            except Exception as error:  # the thread that waits raises it
                failures.append(network_failure(error, place, has_begun.is_set()))
            has_begun.set()

        self._run_in_time(exchange, has_begun, place)
        if failures:
            raise failures[0]
        return answers[0]

    def _run_in_time(
        self, exchange: "Callable[[], None]", has_begun: "threading.Event", place: str
    ) -> None:
        """Run EXCHANGE in a thread until it ends; raises Unreachable when time is up."""
        import threading

        patience = self.process.timeout(ANSWER_TIMEOUT)
        end = self.deadline or time.monotonic() + WHOLE_TIMEOUT + patience - ANSWER_TIMEOUT
        thread = threading.Thread(target=exchange, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system allows no more of them
            return exchange()
        if not has_begun.wait(max(0.0, min(patience, end - time.monotonic()))):
            message = f"{place}: timed out waiting for an answer"
            raise Unreachable(message, Unreachable.SILENT)
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            message = f"{place}: timed out before the answer was complete"
            raise Unreachable(message, Unreachable.SLOW)
        return None


# ==== oauth: the device flow of RFC 8628, a login's tokens and the claims of its ID token
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DEVICE_SCOPE = "email offline_access openid profile"
MIN_INTERVAL = 0.001
CLOCK_LEEWAY = 120.0  # between the provider's clock and ours
TOKEN_LEEWAY = 30.0  # an access token this close to its end is refreshed first
REFUSALS = {  # RFC 8628 §3.5: the errors that end a login
    "access_denied": "the login was denied in the browser",
    "expired_token": "the code expired before it was approved",
}


def read_configuration(
    client: Client, api_url: str, discovery_url: str, client_id: str
) -> Provider:
    """The provider's configuration (OpenID Connect Discovery §4).

    Each URL in it must be as safe as API_URL. Raises Failure.
    """
    answer = client.get_json(trusted_url(discovery_url, api_url))
    issuer = answer.get("issuer")
    require_usable(isinstance(issuer, str), f"{origin_of(discovery_url)} names no issuer")
    device_endpoint = answer.get("device_authorization_endpoint")
    if device_endpoint is None:
        raise Failure("the identity provider has no device flow", HINT_TOKEN)
    revocation_endpoint = answer.get("revocation_endpoint")
    if revocation_endpoint is not None:
        trusted_url(revocation_endpoint, api_url)
    return Provider(
        str(issuer),
        client_id,
        trusted_url(device_endpoint, api_url),
        trusted_url(answer.get("token_endpoint"), api_url),
        revocation_endpoint,
    )


def pinned_fields(provider: Provider) -> "PinnedProvider":
    """What is stored of PROVIDER, so that nobody is asked again who it is."""
    return {
        "issuer": provider.issuer,
        "client_id": provider.client_id,
        "token_endpoint": provider.token_endpoint,
        "revocation_endpoint": provider.revocation_endpoint,
    }


def pinned_provider(pinned: "Optional[PinnedProvider]", api_url: str) -> Provider:
    """The provider that was stored, its URLs checked again; raises Failure."""
    pinned = pinned or {}
    issuer = pinned.get("issuer")
    client_id = pinned.get("client_id")
    token_endpoint = pinned.get("token_endpoint")
    revocation_endpoint = pinned.get("revocation_endpoint")
    if not issuer or not client_id or not token_endpoint:
        raise Failure("its identity provider was not stored with the login")
    trusted_url(token_endpoint, api_url)
    if revocation_endpoint is not None:
        trusted_url(revocation_endpoint, api_url)
    return Provider(issuer, client_id, "", token_endpoint, revocation_endpoint)


def read_text(answer: "Json", name: str) -> str:
    """The text NAME of a provider's ANSWER, which must have it."""
    text = answer.get(name)
    if not text or not isinstance(text, str):
        message = f"the identity provider sent no usable '{name}'"
        raise Unreachable(message, Unreachable.UNUSABLE)
    return text


def read_seconds(answer: "Json", name: str) -> "Optional[float]":
    """The number NAME of a provider's ANSWER; None where it is missing or unusable."""
    seconds = answer.get(name)  # type: Any
    return seconds if is_number(seconds, above=0) else None


def request_device_code(client: Client, provider: Provider, now: float) -> "WaitingLogin":
    """Device authorization, RFC 8628 §3.1 and §3.2; NOW in seconds since 1970."""
    form = {"client_id": provider.client_id, "scope": DEVICE_SCOPE}
    answer = client.post_form(provider.device_authorization_endpoint, form)
    device = answer.require_success().json()
    expires_in = read_seconds(device, "expires_in")
    if expires_in is None:
        message = "the identity provider sent no usable 'expires_in'"
        raise Unreachable(message, Unreachable.UNUSABLE)
    complete = device.get("verification_uri_complete")
    interval = read_seconds(device, "interval") or DEFAULT_INTERVAL
    return {
        "verification_uri": read_text(device, "verification_uri"),
        "verification_uri_complete": complete if isinstance(complete, str) else None,
        "user_code": read_text(device, "user_code"),
        "expires_at": int(now + min(expires_in, MAX_DAY)),
        "interval": min(max(interval, MIN_INTERVAL), MAX_DAY),
        "device_code": read_text(device, "device_code"),
        "provider": pinned_fields(provider),
    }


def poll_for_tokens(
    poll: "Callable[[], Answer]",
    interval: float,
    expires_at: float,
    wait: "Wait",
    clock: "Callable[[], float]",
) -> "Json":
    """The token response, once the user has approved (RFC 8628 §3.4, §3.5).

    POLL sends the token request once. INTERVAL is in seconds, EXPIRES_AT a time of CLOCK.
    Raises Failure.
    """
    pause = interval
    trouble = None  # type: Optional[Unreachable]
    while True:
        wait(max(0.0, min(pause, expires_at - clock())))
        if clock() >= expires_at:
            raise trouble or Failure(REFUSALS["expired_token"], HINT_LOGIN, EXIT_REJECTED)
        try:
            answer = poll()
            error = (parse_object(answer.body) or {}).get("error")
            if isinstance(error, str) and error in REFUSALS:
                raise Failure(REFUSALS[error], HINT_LOGIN, EXIT_REJECTED)
            if error == "slow_down":
                interval += SLOW_DOWN  # RFC 8628 §3.5: for this and all later requests
            elif error != "authorization_pending":
                tokens = answer.require_success().json()
                require_usable(
                    error is None, f"{answer.origin} sent an error with status 200"
                )
                return tokens
        except Unreachable as failure:
            if failure.stage == Unreachable.UNUSABLE:
                raise
            pause *= 2  # RFC 8628 §3.5: on a connection timeout, back off
            trouble = failure
            continue
        pause = interval
        trouble = None


def read_tokens(answer: "Json", now: float) -> Tokens:
    """The tokens of a token response (RFC 6749 §5.1); NOW in seconds since 1970."""
    access_token = read_text(answer, "access_token")
    require_usable(
        is_plain(access_token), "the identity provider sent an unusable access token"
    )
    refresh_token = answer.get("refresh_token")
    expires_in = read_seconds(answer, "expires_in")
    return Tokens(
        access_token,
        now + expires_in if expires_in else None,  # where it is unknown, a 401 will tell
        refresh_token if is_plain(refresh_token) else None,
    )


class Session:
    """A login's own tokens, refreshed where they expired.

    ON_ROTATION gets the tokens of each refresh, before the new access token is used: the
    provider ends a login whose old refresh token comes again.
    """

    def __init__(
        self,
        client: Client,
        provider: "Optional[Provider]",
        tokens: Tokens,
        on_rotation: "Callable[[Tokens], None]" = lambda tokens: None,
    ) -> None:
        self.client = client
        self.provider = provider
        self.tokens = tokens
        self.on_rotation = on_rotation

    def access_token(self) -> str:
        expires_at = self.tokens.expires_at
        is_expired = expires_at is not None and expires_at - TOKEN_LEEWAY < time.time()
        if is_expired or not self.tokens.access_token:
            self.refresh()
        return self.tokens.access_token

    def refresh(self) -> None:
        """RFC 6749 §6, sent once; nothing where no refresh token or provider is known."""
        refresh_token = self.tokens.refresh_token
        if not refresh_token or not self.provider:
            return
        form = {
            "grant_type": "refresh_token",
            "refresh_token": refresh_token,
            "client_id": self.provider.client_id,
        }
        answer = self.client.post_form(self.provider.token_endpoint, form, once=True)
        tokens = read_tokens(answer.require_success().json(), time.time())
        if not tokens.refresh_token:  # RFC 6749 §6: then the old one stays
            tokens = tokens._replace(refresh_token=refresh_token)
        self.tokens = tokens
        self.on_rotation(tokens)

    def revoke(self) -> None:
        """RFC 7009 §2.1, where the provider offers it."""
        refresh_token = self.tokens.refresh_token
        if refresh_token and self.provider and self.provider.revocation_endpoint:
            form = {
                "token": refresh_token,
                "token_type_hint": "refresh_token",
                "client_id": self.provider.client_id,
            }
            endpoint = self.provider.revocation_endpoint
            self.client.post_form(endpoint, form, once=True).require_success()


def read_claims(id_token: "Any") -> "Json":
    """The claims of a JWT (RFC 7519 §7.2), its signature not checked; raises Failure."""
    from base64 import urlsafe_b64decode

    if id_token is None:
        raise Failure(
            "the identity provider sent no ID token; it must offer the scope openid"
        )
    claims = None
    parts = id_token.split(".") if isinstance(id_token, str) else []
    if len(parts) == 3:
        with contextlib.suppress(ValueError):
            payload = parts[1].encode("ascii")
            claims = parse_object(
                urlsafe_b64decode(payload + b"==")
            )  # more padding than it needs is ignored
    if claims is None:
        raise Failure("the identity provider sent an ID token that is not a JWT")
    return claims


def is_same_issuer(issuer: str, claims: "Json") -> bool:
    """Whether CLAIMS come from ISSUER, one slash at its end and Entra's tenant aside."""
    expected = issuer.replace("{tenantid}", str(claims.get("tid")))
    found = claims.get("iss")
    if not isinstance(found, str):
        return False
    return found == expected or f"{found}/" == expected or found == f"{expected}/"


def read_user(id_token: "Any", provider: Provider, now: float) -> User:
    """Who logged in: OpenID Connect Core §3.1.3.7 without item 6, the signature.

    The ID token came from the token endpoint itself, over TLS, which that item lets stand
    in for the signature. It names the profile and tells a returning user, no more. NOW is
    in seconds since 1970. Raises Failure.
    """
    claims = read_claims(id_token)
    refused = "the ID token is refused:"
    if not is_same_issuer(provider.issuer, claims):
        raise Failure(f"{refused} its issuer is {claims.get('iss')}, not {provider.issuer}")
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if provider.client_id not in audiences:
        raise Failure(f"{refused} its audience is {audience}, not {provider.client_id}")
    party = claims.get("azp")
    if party is not None and party != provider.client_id:
        raise Failure(
            f"{refused} its authorized party is {party}, not {provider.client_id}"
        )
    expires_at = claims.get("exp")
    if not is_number(expires_at) or claims["exp"] + CLOCK_LEEWAY < now:
        clock = f"this machine's clock says {now:.0f}"
        raise Failure(f"{refused} it expired at {expires_at}, and {clock}")
    sub = claims.get("sub")
    if not sub or not isinstance(sub, str):
        raise Failure(f"{refused} it names no user")
    email = claims.get("email")
    return User(claims["iss"], sub, email if isinstance(email, str) else None)


# ==== api: one function an endpoint, typed data out
API = "/api/v1beta1/deployments"
VERSION_PATH = "/api/v1beta1/deployments-public/version"
DISCOVERY_PATH = "/api/v1/auth/oidc/discovery"
ME_PATH = "/api/v1/auth/me"
KEYS_PATH = "/api/v1/api-keys"


def field(answer: "Json", name: str, kind: "Any", default: "Any" = None) -> "Any":
    """The member NAME of a server's ANSWER, DEFAULT where it is missing or null."""
    value = answer.get(name)
    if value is None:
        value = default
    is_flag = isinstance(value, bool)
    is_right = isinstance(value, kind) and is_flag == (kind is bool)
    require_usable(is_right, f"the server's answer has no usable '{name}'")
    return value


def text_or_none(answer: "Json", *names: str) -> "Optional[str]":
    """The first of NAMES that is a text and not empty."""
    for name in names:
        text = field(answer, name, str, "")  # type: str
        if text:
            return text
    return None


def objects(answer: "Json", name: str) -> "List[Json]":
    rows = field(answer, name, list)  # type: List[Json]
    is_right = all(isinstance(row, dict) for row in rows)
    require_usable(is_right, f"the server's '{name}' are not objects")
    return rows


def get_version(client: Client, api_url: str) -> Version:
    answer = client.get_json(endpoint(api_url, VERSION_PATH))
    field(answer, "version", str)
    return Version(
        field(answer, "requires_auth", bool, False), field(answer, "capabilities", list, [])
    )


def get_organizations(client: Client, api_url: str, key: "Optional[str]") -> "List[Json]":
    answer = client.get_json(endpoint(api_url, f"{API}/organizations"), key)
    return [
        {
            "org_id": field(row, "org_id", str),
            "org_name": field(row, "org_name", str),
            "is_default": field(row, "is_default", bool, False),
        }
        for row in objects(answer, "organizations")
    ]


def get_projects(
    client: Client, api_url: str, key: "Optional[str]", org_id: "Optional[str]" = None
) -> "List[Project]":
    """All projects that KEY can see; ORG_ID narrows."""
    answer = client.get_json(endpoint(api_url, f"{API}/list-projects", org_id=org_id), key)
    projects = []
    for row in objects(answer, "projects"):
        project_id = row.get("project_id")
        is_usable = is_plain(project_id) and project_id != key
        require_usable(is_usable, "the server's answer has no usable 'project_id'")
        name = text_or_none(row, "project_name") or str(project_id)
        count = field(row, "deployment_count", int, 0)
        projects.append(
            Project(str(project_id), name, count, field(row, "org_id", str, "default"))
        )
    return projects


def deployment(row: "Json") -> "Json":
    """A deployment as it is shown: what was asked for in `spec`, what is in `status`."""
    names = [name for name in field(row, "secret_names", list, []) if isinstance(name, str)]
    spec = {
        "repo_url": without_passwords(field(row, "repo_url", str, "")),
        "deployment_file_path": text_or_none(row, "deployment_file_path"),
        "git_ref": text_or_none(row, "git_ref"),
        "appserver_version": text_or_none(row, "appserver_version", "llama_deploy_version"),
        "suspended": field(row, "suspended", bool, False),
        "secrets": dict.fromkeys(names, MASK) or None,
        "personal_access_token": MASK if row.get("has_personal_access_token") else None,
    }
    return {
        "name": field(row, "id", str),
        "generate_name": text_or_none(row, "display_name", "name"),
        "spec": {name: value for name, value in spec.items() if value is not None},
        "status": {
            "phase": field(row, "status", str),
            "git_sha": text_or_none(row, "git_sha"),
            "apiserver_url": without_passwords(text_or_none(row, "apiserver_url") or "")
            or None,
            "project_id": text_or_none(row, "project_id"),
            "warning": text_or_none(row, "warning"),
        },
    }


def get_deployments(
    client: Client, api_url: str, key: "Optional[str]", project_id: str
) -> "List[Json]":
    answer = client.get_json(endpoint(api_url, API, project_id=project_id), key)
    return [deployment(row) for row in objects(answer, "deployments")]


def get_deployment(
    client: Client, api_url: str, key: "Optional[str]", project_id: str, name: str
) -> "Json":
    return deployment(
        client.get_json(endpoint(api_url, API, name, project_id=project_id), key)
    )


def discover_provider(client: Client, api_url: str) -> Provider:
    """The identity provider that API_URL names, and the OAuth client for llamactl there."""
    answer = client.send("GET", endpoint(api_url, DISCOVERY_PATH))
    if answer.status in (400, 404, 501):
        message = f"{api_url} offers no browser login{answer.explanation()}"
        raise Failure(message, HINT_TOKEN)
    found = answer.require_success().json()
    clients = field(found, "client_ids", dict, {})  # type: Json
    client_ids = [clients["cli"]] if clients.get("cli") else list(clients.values())
    if len(client_ids) != 1 or not is_plain(client_ids[0]):
        raise Failure(f"{api_url} names no OAuth client for llamactl", HINT_TOKEN)
    return read_configuration(
        client, api_url, field(found, "discovery_url", str), client_ids[0]
    )


def is_key_gone(client: Client, api_url: str, key: str) -> bool:
    """Whether the server says that KEY does not work; False where it cannot say."""
    with contextlib.suppress(Failure):
        return client.send("GET", endpoint(api_url, ME_PATH), key).status == 401
    return False


def create_key(
    client: Client, api_url: str, access_token: str, title: str
) -> "Tuple[Optional[str], Optional[str]]":
    """Make an API key; its id and the key itself, shown this once, None where unusable."""
    body = {"name": title, "project_id": None}
    answer = client.post_json(endpoint(api_url, KEYS_PATH), body, access_token)
    key_id = answer.get("id")
    key = answer.get("redacted_api_key")  # despite its name, the whole key
    if not isinstance(key_id, str):
        key_id = None
    return key_id or None, key if is_plain(key) else None


def delete_key(client: Client, api_url: str, access_token: str, key_id: str) -> None:
    """Delete an API key; one that is gone counts as deleted. Raises Failure."""
    answer = client.send("DELETE", endpoint(api_url, KEYS_PATH, key_id), access_token)
    if answer.status != 404:
        answer.require_success()


# ==== credential: which key, URL and project a command uses, and where each came from
def credential_of_variables(
    process: Process, project: "Optional[str]", needs_project: bool, warn: "Warn"
) -> "Optional[Credential]":
    """The credential in the variables; None, after a warning, where it is not a full one.

    PROJECT is that of the command line.
    """
    if process.prefers_profile():
        return None
    key = process.get(VAR_API_KEY)
    api_url = process.get(VAR_API_URL)
    project_id = project or process.get(VAR_PROJECT)
    if not key:
        for name in (VAR_PROJECT, VAR_API_URL):
            if process.get(name):
                warn(f"{name} is ignored, as {VAR_API_KEY} is not set")
        return None
    if needs_project and not project_id:
        warn(f"{VAR_API_KEY} is ignored, as {VAR_PROJECT} is not set")
        return None
    if project_id:
        require_plain(project_id, "the project id")
    sources = {
        "environment": VAR_API_URL if api_url else "default",
        "project_id": "--project" if project else VAR_PROJECT,
        "api_key": VAR_API_KEY,
    }  # type: Dict[str, Optional[str]]
    api_url = normal_url(api_url or DEFAULT_API_URL)
    return Credential(
        api_url, require_plain(key, VAR_API_KEY), project_id, None, {}, sources
    )


def find_profile(data: "StoreData", api_url: str, name: "Optional[str]") -> "Optional[str]":
    """The name of the profile NAME, else of the current one of API_URL; raises Failure.

    None where no login is required there.
    """
    environment = get_environment(data, api_url)
    profiles = environment["profiles"]
    name = name or environment.get("current_profile")
    if name in profiles:
        return name
    if name:
        known = listed([(each, each) for each in sorted(profiles)])
        message = f"{api_url} has no profile {quotable(name)}; available: {known}"
        raise Failure(message, "llamactl auth get")
    if not environment.get("requires_auth", True):
        return None
    if profiles:
        message = f"no profile of {api_url} is current"
        raise Failure(message, "llamactl auth use NAME", EXIT_REJECTED)
    raise Failure(f"not logged in to {api_url}", HINT_LOGIN, EXIT_REJECTED)


def source_of_url(data: "StoreData") -> str:
    """What decides the current environment."""
    return "environments use" if data.get("current_environment") else "default"


def credential_of_profile(
    process: Process,
    data: "StoreData",
    name: "Optional[str]",
    named_by: str,
    project: "Optional[str]",
) -> Credential:
    """The credential in the profile NAME, which NAMED_BY gave, else in the current one."""
    if not name:
        name = process.get(VAR_PROFILE)
        named_by = VAR_PROFILE if name else "auth use"
    api_url = current_url(data)
    found = find_profile(data, api_url, name)
    profile = {}  # type: Profile
    if found:
        profile = get_environment(data, api_url)["profiles"][found]
    key = profile.get("api_key")
    if key:
        require_plain(key, "the stored API key")
    project_id = profile.get("project_id")
    if project:
        project_id = require_plain(project, "--project")
    sources = {
        "environment": source_of_url(data),
        "profile": named_by,
        "project_id": "--project" if project else "profile",
        "project_name": None if project else "profile",
        "api_key": "profile",
    }
    return Credential(api_url, key or None, project_id, found, profile, sources)


def warn_of_unused_profile(process: Process, store: "Store") -> None:
    """Say which profile would be used if the variables held no credential."""
    with contextlib.suppress(Failure):  # variables never fail on the state of the store
        data = store.load()
        environment = get_environment(data, current_url(data))
        profiles = environment["profiles"]
        name = process.get(VAR_PROFILE) or environment.get("current_profile")
        unused = f"profile {name}" if name in profiles else "a stored profile"
        if profiles:
            store.warn(
                f"{VAR_API_KEY} is used instead of {unused}; "
                f"set {VAR_USE_PROFILE}=1 to use profiles"
            )


def resolve_credential(
    process: Process,
    store: "Store",
    name: "Optional[str]",
    named_by: str,
    project: "Optional[str]",
    needs_project: bool,
) -> Credential:
    """What a command uses: the profile NAME, the variables or the current profile."""
    if not name:
        credential = credential_of_variables(process, project, needs_project, store.warn)
        if credential:
            warn_of_unused_profile(process, store)
            return credential
    return credential_of_profile(process, store.load(), name, named_by, project)


# ==== login: signing in with a key or by device, signing out, leaving nothing behind
# for what is requested while the store is locked: less than others wait for the lock
KEY_TIMEOUT = 5.0
REVOCATION_TIMEOUT = 3.0


class App:
    """What every command works with."""

    def __init__(self, process: Process, terminal: Terminal) -> None:
        self.process = process
        self.terminal = terminal
        self.store = Store(process.config_folder(), terminal.warn)
        self.client = Client(process, terminal.hide, terminal.warn)

    def credential(
        self, args: "Args", name: "Optional[str]" = None, needs_project: bool = True
    ) -> Credential:
        """What the command uses; NAME is the profile that its command line names."""
        if name and args.profile and name != args.profile:
            raise Failure("NAME and --profile name two profiles", code=EXIT_USAGE)
        named_by = "NAME" if name else "--profile"
        name = name or args.profile
        credential = resolve_credential(
            self.process, self.store, name, named_by, args.project, needs_project
        )
        self.terminal.hide(credential.api_key or "")
        return credential

    def report(self, text: str) -> None:
        """Say what changed in the store, and warn where commands will not use it."""
        self.terminal.say(text)
        get = self.process.get
        if get(VAR_API_KEY) and get(VAR_PROJECT) and not self.process.prefers_profile():
            self.terminal.warn(
                f"{VAR_API_KEY} and {VAR_PROJECT} are set and win over profiles; "
                f"unset them or set {VAR_USE_PROFILE}=1"
            )
        elif get(VAR_PROFILE):
            self.terminal.warn(f"using profile {get(VAR_PROFILE)} (from {VAR_PROFILE})")


def check_sign_in(app: App, args: "Args") -> "Tuple[str, Environment]":
    """The API URL that a new profile is for, and what is stored of it.

    Raises Failure before anything is sent or asked: for a name that no listing could
    carry, a store that cannot be written, a variable that names another server.
    """
    name = args.name
    if name is not None and (name != clean(name).strip() or name.startswith("-")):
        raise Failure("--name must be printable and not start with a dash", code=EXIT_USAGE)
    data = app.store.check_writable()
    api_url = current_url(data)
    variable = app.process.get(VAR_API_URL)
    if variable and not app.process.prefers_profile():
        named_url = normal_url(variable)
        if named_url != api_url:
            message = f"{VAR_API_URL} is not the current environment, {api_url}"
            raise Failure(message, f"llamactl environments add {named_url}", EXIT_USAGE)
    return api_url, get_environment(data, api_url)


def choose_project(
    app: App,
    projects: "List[Project]",
    project_id: "Optional[str]",
    current: "Optional[str]" = None,
    flag: str = "--project",
) -> Project:
    """The project PROJECT_ID, else the only one, else the one that the user picks."""
    by_id = {project.project_id: project for project in projects}
    choices = [(project.project_id, project.project_name) for project in by_id.values()]
    if project_id:
        if project_id not in by_id:
            message = (
                f"project {quotable(project_id)} not found; available: {listed(choices)}"
            )
            raise Failure(message)
        return by_id[project_id]
    if not projects:
        raise Failure(f"no project found; create one {WEB_CONSOLE}")
    if len(choices) == 1:
        return by_id[choices[0][0]]
    return by_id[app.terminal.choose("project", choices, flag, current)]


def project_fields(project: "Optional[Project]") -> "Profile":
    """What is stored of the project of a profile."""
    if project is None:
        return {"project_id": None, "project_name": None, "org_id": None}
    return {
        "project_id": project.project_id,
        "project_name": project.project_name,
        "org_id": project.org_id,
    }


def project_label(profile: "Profile") -> str:
    """The project of PROFILE as people know it."""
    project_id = profile.get("project_id") or "none"
    name = profile.get("project_name")
    return f"{name} ({project_id})" if name and name != project_id else project_id


def given_key(app: App, args: "Args") -> "Optional[str]":
    """The key that the command line holds or names; None where it does neither."""
    if args.api_key is not None and args.api_key_file is not None:
        raise Failure("--api-key and --api-key-file exclude each other", code=EXIT_USAGE)
    key = args.api_key  # type: Optional[str]
    if "-" in (args.api_key, args.api_key_file):
        key = app.terminal.read_stdin()
    elif args.api_key_file is not None:
        key = read_key_file(args.api_key_file)
    return None if key is None else require_plain(key, "the API key")


def verify_key(
    app: App, api_url: str, key: "Optional[str]", org_id: "Optional[str]"
) -> "List[Project]":
    """The projects that KEY can see; raises Failure where the server rejects it."""
    try:
        return get_projects(app.client, api_url, key, org_id)
    except Refused as refused:
        if refused.status not in (401, 403):
            raise
        message = f"the API key was rejected: {refused.message}"
        raise Refused(message, refused.status, HINT_TOKEN, EXIT_REJECTED) from None


def ask_for_key(
    app: App, api_url: str, org_id: "Optional[str]"
) -> "Tuple[str, List[Project]]":
    """A key typed at the prompt, three times at most, and the projects that it can see."""
    if not app.terminal.can_ask():
        raise Failure(
            "no API key given, and no terminal to ask on; use --api-key-file (- is stdin)",
            "llamactl auth token --api-key-file PATH --project ID",
            EXIT_USAGE,
        )
    tries = 3
    while True:
        tries -= 1
        try:
            key = app.terminal.ask_hidden(f"API key for {api_url}: ")
            require_plain(key, "the API key")
            return key, verify_key(app, api_url, key, org_id)
        except Failure as failure:
            if not tries or failure.code not in (EXIT_REJECTED, EXIT_USAGE):
                raise
            app.terminal.tell(f"{failure.message}; try again")


def refuse_name_of_login(environment: "Environment", name: "Optional[str]") -> None:
    """Raise Failure where the profile NAME is a login."""
    profile = environment["profiles"].get(name or "")
    if profile and profile["auth_type"] == OIDC:
        hint = f"llamactl auth logout {shell_quoted(name or '')}"
        raise Failure(f"profile {name} is a login", hint)


def store_key_profile(
    environment: "Environment", profile: "Profile", name: "Optional[str]"
) -> str:
    """Make PROFILE current under NAME, else under its present or a new one; the name."""
    refuse_name_of_login(environment, name)
    profiles = environment["profiles"]
    key = profile["api_key"]
    project_id = profile["project_id"]
    for each, other in profiles.items():
        is_same = other.get("api_key") == key and other.get("project_id") == project_id
        if is_same and not name and other["auth_type"] != OIDC:
            name = each
    if not name:
        if key:
            name = f"llx-{last_four(key) or 'key'}"
        else:
            name = shell_safe(project_id or "") or "no-auth"
        name = free_name(name, profiles)
    profiles[name] = profile
    environment["current_profile"] = name
    return name


def store_waiting_login(app: App, api_url: str, waiting: "WaitingLogin") -> None:
    with app.store.change() as data:
        add_environment(data, api_url)["login"] = waiting


def forget_waiting_login(app: App, api_url: str, waiting: "WaitingLogin") -> None:
    """Drop WAITING from the store, if it is what waits there."""
    with app.store.change() as data:
        login = get_environment(data, api_url).get("login")
        if login and login["device_code"] == waiting["device_code"]:
            data["environments"][api_url]["login"] = None


def forget_waiting_logins(app: App) -> None:
    """Drop the device codes of all environments."""
    with app.store.change() as data:
        for environment in data["environments"].values():
            environment["login"] = None


def wait_for_approval(app: App, api_url: str, waiting: "WaitingLogin") -> "Json":
    """The token response, once the user has approved the code; raises Failure.

    The waiting login is forgotten when it can come to nothing any more.
    """
    provider = pinned_provider(waiting.get("provider"), api_url)
    left = min(waiting["expires_at"] - time.time(), MAX_DAY)
    expires_at = time.monotonic() + left
    form = {
        "grant_type": DEVICE_GRANT,
        "device_code": waiting["device_code"],
        "client_id": provider.client_id,
    }

    def poll() -> Answer:
        return app.client.post_form(provider.token_endpoint, form, once=True)

    wait = app.terminal.countdown(expires_at)
    try:
        return poll_for_tokens(poll, waiting["interval"], expires_at, wait, time.monotonic)
    except Failure as failure:
        is_final = not isinstance(failure, (Refused, Unreachable))
        if is_final or time.monotonic() >= expires_at:
            forget_waiting_login(app, api_url, waiting)
        raise


def is_of_user(profile: "Profile", user: User) -> bool:
    if profile["auth_type"] != OIDC or profile.get("sub") != user.sub:
        return False
    return profile.get("issuer") == user.issuer


def name_login(environment: "Environment", user: User, name: "Optional[str]") -> str:
    """The profile for USER's login: NAME, theirs, or a new one that is named after them."""
    profiles = environment["profiles"]
    known = [each for each, profile in profiles.items() if is_of_user(profile, user)]
    if name:
        if name not in known:
            refuse_name_of_login(environment, name)
        return name
    current = environment.get("current_profile")
    if current in known:
        return str(current)
    if known:
        return known[0]
    return free_name(shell_safe(user.email or user.sub) or "login", profiles)


def choose_project_of_login(
    app: App, args: "Args", api_url: str, session: Session, current: "Optional[str]"
) -> "Tuple[Optional[Project], Optional[Failure]]":
    """The project of a login, or why it has none yet, which does not undo the login.

    Raises Failure where there is no project at all.
    """
    projects = get_projects(app.client, api_url, session.access_token(), args.org)
    wanted = args.project
    if not wanted and not app.terminal.can_ask():
        wanted = current
    try:
        return choose_project(app, projects, wanted, current), None
    except Failure as failure:
        if not projects:
            raise
        return None, failure


def make_key(app: App, api_url: str, session: Session, name: str) -> "Tuple[str, str]":
    """A new API key for the profile NAME, and its id.

    Raises Failure, which names a key that may exist although it is not known here.
    """
    title = f"{name} llamactl on {app.process.host_name}"
    access_token = session.access_token()
    doubt = f"an API key named '{title}' may exist now"
    try:
        key_id, key = create_key(app.client, api_url, access_token, title)
        if key and key_id:
            return key, key_id
        if key_id:
            delete_key(app.client, api_url, access_token, key_id)
            raise Failure("the server returned an unusable API key", code=EXIT_UNREACHABLE)
        raise Unreachable("the server returned an unusable API key", Unreachable.UNUSABLE)
    except Unreachable as failure:
        if failure.stage == Unreachable.NOT_CONNECTED:
            raise
        message = f"{failure.message}; {doubt}"
        raise Failure(message, f"delete the key {WEB_CONSOLE}", EXIT_UNREACHABLE) from None
    except KeyboardInterrupt:
        app.terminal.warn(doubt)
        raise


def delete_own_key(app: App, api_url: str, session: Session, key_id: str) -> None:
    """Delete a key that no profile will hold; warn where that fails."""
    try:
        delete_key(app.client, api_url, session.access_token(), key_id)
    except Failure as failure:
        app.terminal.warn(f"API key {key_id} may still work: {failure.message}")


def revoke_or_warn(app: App, session: Session) -> None:
    """Revoke a refresh token that no profile will hold; warn where that fails."""
    try:
        session.revoke()
    except Failure as failure:
        app.terminal.warn(f"the refresh token may not be revoked: {failure.message}")


def revoke_replaced(app: App, session: Session, replaced: "Profile") -> None:
    """Revoke the refresh token of the login that a new SESSION of its user replaces."""
    token = replaced.get("refresh_token")
    if token and token != session.tokens.refresh_token:
        old_tokens = Tokens("", None, token)
        revoke_or_warn(app, Session(app.client, session.provider, old_tokens))


def token_fields(tokens: Tokens) -> "Profile":
    return {
        "access_token": tokens.access_token,
        "access_expires_at": tokens.expires_at,
        "refresh_token": tokens.refresh_token,
    }


def login_profile(user: User, session: Session, project: "Optional[Project]") -> "Profile":
    """What is stored of a login beside its API key."""
    profile = {
        "auth_type": OIDC,
        "sub": user.sub,
        "issuer": user.issuer,
        "email": user.email,
        "provider": pinned_fields(session.provider) if session.provider else None,
    }  # type: Profile
    profile.update(token_fields(session.tokens))
    profile.update(project_fields(project))
    return profile


def profile_of_user(environment: "Environment", name: str, user: User) -> "Profile":
    """The profile NAME if it is USER's login, else an empty one."""
    profile = environment["profiles"].get(name)
    return profile if profile and is_of_user(profile, user) else {}


def store_login(
    app: App,
    api_url: str,
    user: User,
    wanted: "Optional[str]",
    known: "Profile",
    new: "Profile",
) -> "Tuple[str, Profile]":
    """Store a NEW login and make it current; its name, and the profile that it replaces.

    Where that is not the one that was KNOWN before, another process was faster: the key of
    its login stays, and a logout of the known key is respected. Raises Failure.
    """
    with app.store.change() as data:
        environment = add_environment(data, api_url)
        name = name_login(environment, user, wanted)
        replaced = profile_of_user(environment, name, user)
        key = replaced.get("api_key")
        if not key and new["api_key"] == known.get("api_key"):
            raise Failure(f"profile {name} was deleted meanwhile; log in again")
        if key and key != known.get("api_key"):
            new["api_key"] = key
            new["api_key_id"] = replaced.get("api_key_id")
        environment["profiles"][name] = new
        environment["current_profile"] = name
    return name, replaced


def finish_login(
    app: App, args: "Args", api_url: str, waiting: "WaitingLogin", answer: "Json"
) -> None:
    """Make a profile of the token response ANSWER; raises Failure.

    Whatever ends this before the profile is stored, what it made is deleted and revoked.
    """
    provider = pinned_provider(waiting.get("provider"), api_url)
    session = Session(app.client, provider, read_tokens(answer, time.time()))
    with contextlib.ExitStack() as undo:
        undo.callback(revoke_or_warn, app, session)
        forget_waiting_login(app, api_url, waiting)
        user = read_user(answer.get("id_token"), provider, time.time())
        environment = get_environment(app.store.load(), api_url)
        name = name_login(environment, user, args.name)
        known = profile_of_user(environment, name, user)
        current = known.get("project_id")
        project, missing = choose_project_of_login(app, args, api_url, session, current)
        key = known.get("api_key") or ""
        key_id = known.get("api_key_id") or ""
        needs_key = not key or is_key_gone(app.client, api_url, key)
        with uninterrupted(app.terminal.tell):
            if needs_key:
                key, key_id = make_key(app, api_url, session, name)
                undo.callback(delete_own_key, app, api_url, session, key_id)
            profile = login_profile(user, session, project)
            profile["api_key"] = key
            profile["api_key_id"] = key_id
            name, replaced = store_login(app, api_url, user, args.name, known, profile)
            undo.pop_all()
            if needs_key and profile["api_key"] != key:
                delete_own_key(app, api_url, session, key_id)
            revoke_replaced(app, session, replaced)
            app.report(f"logged in as {name}, project {project_label(profile)}")
    if missing:
        raise Failure(missing.message, "llamactl projects use ID", EXIT_USAGE)


def delete_key_of_login(session: Session, api_url: str, key_id: str) -> None:
    """Delete the key with the login's access token, refreshed once if that is rejected."""
    before = session.tokens
    token = session.access_token()
    try:
        delete_key(session.client, api_url, token, key_id)
    except Refused as refused:
        if refused.status != 401 or session.tokens is not before:
            raise
        session.refresh()
        delete_key(session.client, api_url, session.tokens.access_token, key_id)


def end_login(
    client: Client,
    api_url: str,
    profile: "Profile",
    on_rotation: "Callable[[Tokens], None]",
    warn: "Warn",
) -> str:
    """Delete a login's key and revoke its refresh token; a sentence on a key that may live.

    Each has a time of its own, so that the one does not use up the other's.
    """
    provider = None
    trouble = ""
    problem = ""
    try:
        provider = pinned_provider(profile.get("provider"), api_url)
    except Failure as failure:
        trouble = failure.message
    tokens = Tokens(
        profile.get("access_token") or "",
        profile.get("access_expires_at"),
        profile.get("refresh_token"),
    )
    session = Session(client.within(KEY_TIMEOUT), provider, tokens, on_rotation)
    key = profile.get("api_key") or ""
    key_id = profile.get("api_key_id") or ""
    try:
        require(key_id, "its id is not known")
        delete_key_of_login(session, api_url, key_id)
    except Failure as failure:
        if not key or not is_key_gone(session.client, api_url, key):
            name = f"API key {key_id or '(id unknown)'} (…{last_four(key)})"
            problem = f"{name} may still work: {trouble or failure.message}"
    session.client = client.within(REVOCATION_TIMEOUT)
    try:
        require(provider, trouble)
        session.revoke()
    except Failure as failure:
        warn(f"the login's refresh token may not be revoked: {failure.message}")
    return problem


def log_out(app: App, api_url: str, name: str) -> str:
    """Forget a profile, whatever the server says; what may still work, or nothing."""
    problem = ""
    with (
        app.store.change()
    ) as data:  # of several processes one refreshes, the others find it gone
        environment = get_environment(data, api_url)
        profile = environment["profiles"].get(name)
        if profile and profile["auth_type"] == OIDC:

            def store_tokens(tokens: Tokens) -> None:
                environment["profiles"][name].update(token_fields(tokens))
                with naming_path(app.store.path, "changed"):
                    app.store.save(data)

            warn = app.terminal.warn
            problem = end_login(app.client, api_url, profile, store_tokens, warn)
        environment["profiles"].pop(name, None)
        if environment.get("current_profile") == name:
            environment["current_profile"] = None
    return f"profile {name}: {problem}" if problem else ""


def log_out_each(app: App, places: "Sequence[Tuple[str, str]]") -> str:
    """Forget each (API URL, profile); what may still work, or nothing."""
    problems = []
    for api_url, name in places:
        problems.append(log_out(app, api_url, name))
        app.report(f"profile {name} deleted")
    for path in app.store.damaged_copies():
        app.terminal.warn(
            f"{path} may still hold keys; delete it when you no longer need it"
        )
    return "; ".join(problem for problem in problems if problem)


# ==== takeover: the official client's profiles.db, read only; can be removed whole
def read_official(path: str) -> "Dict[str, List[Json]]":
    """The tables of the SQLite file PATH, opened for reading alone; raises Failure."""
    try:
        import sqlite3
    except ImportError:
        raise Failure(f"this Python has no sqlite3 module, which reads {path}") from None
    from urllib.parse import quote

    path = os.path.realpath(path)  # SQLite looks for its logs beside that one
    require(os.path.isfile(path), f"{path} not found")
    if not is_ours(os.stat(path)):
        raise belongs_to(path, os.stat(path))
    in_use = os.path.exists(f"{path}-shm")
    has_log = os.path.exists(f"{path}-wal")
    journal = f"{path}-journal"
    if (has_log and not in_use) or (os.path.exists(journal) and os.path.getsize(journal)):
        raise Failure(f"{path} was left by a crash; start the official client once")
    # immutable keeps SQLite from making files beside it; a log that is in use must be read
    options = "mode=ro" if in_use else "mode=ro&immutable=1"
    url = f"file:{quote(os.fsencode(path))}?{options}"
    tables = {}
    try:
        with contextlib.closing(sqlite3.connect(url, uri=True)) as database:
            database.row_factory = sqlite3.Row
            for table in ("profiles", "environments", "settings"):
                rows = database.execute(f"SELECT * FROM {table}")
                tables[table] = [dict(row) for row in rows]
    except sqlite3.Error as error:
        raise Failure(f"{path} is not a store of the official client: {error}") from None
    return tables


def import_environments(data: "StoreData", tables: "Dict[str, List[Json]]") -> None:
    for row in tables["environments"]:
        with contextlib.suppress(Failure):  # no URL: its profiles will say so
            environment = add_environment(data, normal_url(str(row.get("api_url"))))
            environment["requires_auth"] = bool(row.get("requires_auth", True))


def import_profile(
    data: "StoreData", row: "Json", name: str, settings: "Dict[Any, Any]"
) -> str:
    """Add the official client's profile ROW as NAME; what to say of it, raises Failure."""
    api_url = normal_url(str(row.get("api_url")))
    environment = add_environment(data, api_url)
    key = row.get("api_key") or None
    project_id = row.get("project_id")
    is_usable = is_plain(key) if key else not environment.get("requires_auth", True)
    require(is_usable and is_plain(project_id), "it has no usable API key and project")
    profiles = environment["profiles"]
    for stored, other in profiles.items():
        if other.get("api_key") == key and other.get("project_id") == project_id:
            return f"profile {name} is already here, as {stored}"
    chosen = free_name(name, profiles)
    profiles[chosen] = {
        "auth_type": TOKEN if key else NO_AUTH,
        "api_key": key,
        "project_id": project_id,
        "project_name": None,
    }
    is_current = name == settings.get("current_profile") and api_url == current_url(data)
    if is_current and not environment.get("current_profile"):
        environment["current_profile"] = chosen
    login = " (a login: its API key alone)" if row.get("device_oidc") else ""
    return f"profile {name} imported as {chosen}{login}"


def import_official(
    data: "StoreData", tables: "Dict[str, List[Json]]"
) -> "Tuple[List[str], List[str]]":
    """Add the official client's rows to DATA; what to say of those added and those not."""
    settings = {row.get("key"): row.get("value") for row in tables["settings"]}
    import_environments(data, tables)
    with contextlib.suppress(Failure):  # none is current there
        current = normal_url(str(settings.get("current_environment_api_url")))
        data["current_environment"] = data.get("current_environment") or current
    added = []
    left_out = []
    for row in tables["profiles"]:
        name = clean(str(row.get("name"))).strip("- ") or "imported"
        try:
            added.append(import_profile(data, row, name, settings))
        except Failure as failure:
            left_out.append(f"profile {name} is left out: {failure.message}")
    return added, left_out


# ==== commands: one function a verb: resolve, call, store, say
def require_project(credential: Credential) -> str:
    """The project id of CREDENTIAL; raises Failure where it has none."""
    if not credential.project_id:
        owner = f"profile {credential.name} has" if credential.name else "there is"
        raise Failure(f"{owner} no project", "llamactl projects use ID", EXIT_USAGE)
    return credential.project_id


def auth_token(app: App, args: "Args") -> None:
    """Verify a key by listing its projects, choose one, and store both as a profile."""
    api_url, environment = check_sign_in(app, args)
    refuse_name_of_login(environment, args.name)
    project_id = args.project  # type: Optional[str]
    if project_id is not None:
        require_plain(project_id, "--project")
    key = given_key(app, args)
    needs_key = environment.get("requires_auth", True)
    if args.no_verify and not (project_id and (key or not needs_key)):
        raise Failure("--no-verify needs a key and --project ID", code=EXIT_USAGE)
    project = None
    try:
        if needs_key and not key:
            key, projects = ask_for_key(app, api_url, args.org)
            project = choose_project(app, projects, project_id)
        elif not args.no_verify:
            projects = verify_key(app, api_url, key, args.org)
            project = choose_project(app, projects, project_id)
    except Unreachable as failure:
        is_unanswered = failure.stage in (Unreachable.NOT_CONNECTED, Unreachable.SILENT)
        if not is_unanswered or not key or not project_id:
            raise
        app.terminal.warn(f"the key is stored unverified: {failure.message}")
    profile = {"auth_type": TOKEN if key else NO_AUTH, "api_key": key}  # type: Profile
    profile.update(project_fields(project))
    if not project:
        profile["project_id"] = project_id
    with app.store.change() as data:
        name = store_key_profile(add_environment(data, api_url), profile, args.name)
    app.report(f"profile {name} is current, project {project_label(profile)}")


def start_login(app: App, api_url: str, waiting: "WaitingLogin", output: str) -> None:
    """Store what waits for approval, and print what a person needs to approve it."""
    store_waiting_login(app, api_url, waiting)
    shown = {
        "verification_uri": waiting["verification_uri"],
        "verification_uri_complete": waiting["verification_uri_complete"],
        "user_code": waiting["user_code"],
        "expires_at": waiting["expires_at"],
        "interval": waiting["interval"],
    }  # type: Any
    if output == "text":
        shown = [{"field": name, "value": value} for name, value in shown.items()]
    app.terminal.show(shown, output, "field value")
    app.terminal.say("finish with: llamactl auth login --resume")


def show_code(app: App, waiting: "WaitingLogin", no_browser: bool) -> None:
    """Show where to type the code, and open a browser where that makes sense."""
    address = waiting["verification_uri"]
    complete = waiting["verification_uri_complete"]
    app.terminal.tell(f"open  {address}")
    app.terminal.tell(f"code  {waiting['user_code']}")
    if complete:
        app.terminal.tell(f"or    {complete}")
    if not no_browser:
        app.terminal.open_browser(complete or address)


def auth_login(app: App, args: "Args") -> None:
    """The device flow in one go, or the half of it that --start or --resume asks for."""
    if args.start and (args.resume or args.project or args.org or args.name):
        raise Failure("--start takes only -o; the rest is for --resume", code=EXIT_USAGE)
    if args.output != "text" and not args.start:
        raise Failure("-o is for --start, which prints the code", code=EXIT_USAGE)
    api_url, environment = check_sign_in(app, args)
    if not environment.get("requires_auth", True):
        raise Failure(f"{api_url} requires no login", "llamactl auth token --project ID")
    waiting = environment.get("login")
    if args.resume and not waiting:
        raise Failure("no login is waiting", "llamactl auth login --start", EXIT_USAGE)
    if not args.resume or not waiting:
        provider = discover_provider(app.client, api_url)
        waiting = request_device_code(app.client, provider, time.time())
    if args.start:
        return start_login(app, api_url, waiting, args.output)
    if not args.resume:
        show_code(app, waiting, args.no_browser)
    answer = wait_for_approval(app, api_url, waiting)
    return finish_login(app, args, api_url, waiting, answer)


def auth_get(app: App, args: "Args") -> None:
    """Print the profiles of the current environment, or the one that is named."""
    data = app.store.load()
    api_url = current_url(data)
    environment = get_environment(data, api_url)
    profiles = environment["profiles"]
    names = sorted(profiles)
    if args.name:
        names = [find_profile(data, api_url, args.name) or ""]
    rows = [
        {
            "name": name,
            "api_url": api_url,
            "project_id": profiles[name].get("project_id"),
            "active": name == environment.get("current_profile"),
            "auth_type": profiles[name]["auth_type"],
        }
        for name in names
    ]
    columns = "name api_url project_id active AUTH=auth_type"
    app.terminal.show(rows[0] if args.name else rows, args.output, columns)
    if not rows:
        app.terminal.say(f"no profile in {api_url}")
        is_official = os.path.exists(app.store.official_path)
        app.terminal.say(f"hint: {HINT_IMPORT if is_official else HINT_LOGIN}")


def pick_profile(app: App, data: "StoreData", name: "Optional[str]") -> str:
    """The profile NAME, else the one that the user picks; raises Failure."""
    api_url = current_url(data)
    environment = get_environment(data, api_url)
    profiles = environment["profiles"]
    if profiles and not name:
        choices = [(each, each) for each in sorted(profiles)]
        return app.terminal.choose(
            "profile", choices, "NAME", environment.get("current_profile")
        )
    found = find_profile(data, api_url, name)
    if not found:
        hint = "llamactl auth token --project ID"
        raise Failure(f"{api_url} has no profile", hint, EXIT_REJECTED)
    return found


def auth_use(app: App, args: "Args") -> None:
    """Make a profile the current one of its environment."""
    data = app.store.check_writable()
    api_url = current_url(data)
    name = pick_profile(app, data, args.name)
    with app.store.change() as data:
        find_profile(data, api_url, name)  # another process may have deleted it
        get_environment(data, api_url)["current_profile"] = name
    app.report(f"profile {name} is current")


def auth_logout(app: App, args: "Args") -> None:
    """Delete one profile or all; exit 1 where a key may still work."""
    if args.all and args.name:
        raise Failure("NAME and --all exclude each other", code=EXIT_USAGE)
    data = app.store.check_writable()
    if args.all:
        environments = data["environments"].items()
        places = [
            (url, name) for url, record in environments for name in record["profiles"]
        ]
        forget_waiting_logins(app)
    else:
        places = [(current_url(data), pick_profile(app, data, args.name))]
    problems = log_out_each(app, places)
    require(not problems, problems, f"delete the key {WEB_CONSOLE}")


def variables_of(app: App, args: "Args", name: "Optional[str]") -> "Dict[str, str]":
    """The three variables that hand a full credential on; raises Failure."""
    credential = app.credential(args, name)
    if not credential.api_key:
        raise Failure("there is no API key to hand on", HINT_TOKEN, EXIT_REJECTED)
    return {
        VAR_API_KEY: credential.api_key,
        VAR_API_URL: credential.api_url,
        VAR_PROJECT: require_plain(require_project(credential), "the project id"),
    }


def auth_inject(app: App, args: "Args") -> None:
    """Write the three variables into a .env file, or to stdout."""
    values = variables_of(app, args, None)
    for name, value in values.items():
        readers = " and ".join(unable_readers(value))
        if readers:
            app.terminal.warn(f"{name} needs quotes, which {readers} cannot read")
    path = args.env_file or ".env"
    if path == "-":
        lines = env_lines(values).values()
        return app.terminal.write("\n".join(lines) + "\n")

    def edit(content: bytes) -> bytes:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise Failure(f"{path} is not UTF-8 text and is left alone") from None
        return updated_env(text, values).encode("utf-8")

    is_named = args.env_file is not None
    with naming_path(path, "written"):
        changed, place = rewrite_file(path, edit, is_named, app.terminal.warn)
    return app.terminal.say(f"{place} {'written' if changed else 'is up to date'}")


def auth_exec(app: App, args: "Args") -> int:
    """Become a command that has the three variables."""
    if not args.command:
        raise Failure("no command given", "llamactl auth exec -- COMMAND", EXIT_USAGE)
    variables = dict(app.process.variables)
    variables.update(variables_of(app, args, args.name))
    variables.pop(VAR_USE_PROFILE, None)
    return replace_process(args.command, variables)


def credential_or_reason(
    app: App, args: "Args", name: "Optional[str]" = None
) -> "Tuple[Credential, str]":
    """What a command would use; where that is nothing, the environment alone, and why."""
    try:
        return app.credential(args, name), ""
    except Failure as failure:
        if failure.code != EXIT_REJECTED:
            raise
        data = app.store.load()
        sources = {"environment": source_of_url(data)}
        return Credential(current_url(data), None, None, None, {}, sources), failure.message


def check_credential(
    app: App, credential: Credential, missing: str, is_offline: bool
) -> "Tuple[int, str, Optional[str]]":
    """Exit code, state and detail of CREDENTIAL, by listing what it can see.

    MISSING says why there is no credential; it is empty where there is one.
    """
    if missing:
        return EXIT_REJECTED, "missing", missing
    if is_offline:
        return EXIT_DONE, "not checked", None
    try:
        projects = verify_key(app, credential.api_url, credential.api_key, None)
    except Failure as failure:
        if failure.code == EXIT_REJECTED:
            return EXIT_REJECTED, "rejected", failure.message
        return EXIT_UNREACHABLE, "unknown", failure.message
    project_ids = [project.project_id for project in projects]
    if credential.project_id and credential.project_id not in project_ids:
        return EXIT_DONE, "works", "but it cannot see the project"
    return EXIT_DONE, "works", None


def auth_status(app: App, args: "Args") -> int:
    """What a command would use, where each value came from, and whether it works now."""
    credential, missing = credential_or_reason(app, args, args.name)
    code, state, detail = check_credential(app, credential, missing, args.offline)
    source = credential.sources.get
    profile = credential.profile
    key = credential.api_key
    proxy = find_proxy(app.process, credential.api_url, args.offline)
    bundle = find_ca_bundle(app.process)
    bundle_place = bundle.file or bundle.folder
    rows = [
        ("environment", credential.api_url, source("environment")),
        ("profile", credential.name, source("profile")),
        ("project_id", credential.project_id, source("project_id")),
        ("project_name", source("project_name") and profile.get("project_name"), "profile"),
        ("api_key", MASK + last_four(key) if key else None, source("api_key")),
        ("ca_bundle", bundle_place or bundle.source, bundle_place and bundle.source),
        ("proxy", proxy and proxy.label, None),
        ("credential", state, detail),
    ]
    if args.output == "text":
        shown = [
            {"name": name, "value": value, "source": value and origin}
            for name, value, origin in rows
        ]  # type: Any
    else:
        shown = {name: value for name, value, _ in rows}
        for name, value, origin in rows[:-2]:
            shown[f"{name}_source"] = origin if value else None
        shown["detail"] = detail
    app.terminal.show(shown, args.output, "name value source")
    return code


def auth_import(app: App, args: "Args") -> None:
    """Add the official client's profiles to ours, and leave its file as it is."""
    require(args.from_official, "say what to import from", HINT_IMPORT, EXIT_USAGE)
    tables = read_official(app.store.official_path)
    with app.store.change() as data:
        added, left_out = import_official(data, tables)
    for text in added:
        app.terminal.say(text)
    for text in left_out:
        app.terminal.warn(text)
    app.report(
        f"{app.store.official_path} is unchanged; refresh tokens and key ids stay there"
    )


def known_urls(data: "StoreData") -> "List[str]":
    """The default environment, which always exists, then the others."""
    return [DEFAULT_API_URL] + sorted(set(data["environments"]) - {DEFAULT_API_URL})


def pick_environment(app: App, data: "StoreData", url: "Optional[str]") -> str:
    """The environment URL, else the one that the user picks; raises Failure."""
    choices = [(each, each) for each in known_urls(data)]
    if not url:
        return app.terminal.choose("environment", choices, "URL", current_url(data))
    api_url = normal_url(url)
    if (api_url, api_url) not in choices:
        message = f"environment {api_url} not found; available: {listed(choices)}"
        raise Failure(message, f"llamactl environments add {api_url}")
    return api_url


def environments_get(app: App, args: "Args") -> None:
    """Print the environments, or the one that is named."""
    data = app.store.load()
    urls = [pick_environment(app, data, args.url)] if args.url else known_urls(data)
    rows = [
        {
            "api_url": url,
            "requires_auth": get_environment(data, url).get("requires_auth", True),
            "active": url == current_url(data),
        }
        for url in urls
    ]
    shown = rows[0] if args.url else rows
    app.terminal.show(shown, args.output, "api_url requires_auth active")


def environments_add(app: App, args: "Args") -> None:
    """Ask a server whether it is a control plane, and make it current."""
    api_url = normal_url(args.url)
    app.store.check_writable()
    if is_sent_in_clear(api_url):
        app.terminal.warn(f"{api_url} is not encrypted: others can read the key on its way")
    version = None if args.no_verify else get_version(app.client, api_url)
    with app.store.change() as data:
        environment = add_environment(data, api_url)
        if version:
            environment["requires_auth"] = version.requires_auth
        data["current_environment"] = api_url
    app.report(f"environment {api_url} is current")


def environments_use(app: App, args: "Args") -> None:
    """Make an environment current, without a request."""
    api_url = pick_environment(app, app.store.check_writable(), args.url)
    with app.store.change() as data:
        data["current_environment"] = api_url
    app.report(f"environment {api_url} is current")


def environments_delete(app: App, args: "Args") -> None:
    """Log out of an environment and forget it; then the default is current."""
    data = app.store.check_writable()
    api_url = pick_environment(app, data, args.url)
    names = list(get_environment(data, api_url)["profiles"])
    problems = log_out_each(app, [(api_url, name) for name in names])
    with app.store.change() as data:
        if get_environment(data, api_url)["profiles"]:
            raise Failure(f"{api_url} got a new profile meanwhile and stays")
        data["environments"].pop(api_url, None)
        if data.get("current_environment") == api_url:
            data["current_environment"] = None
    app.report(f"environment {api_url} deleted")
    require(not problems, problems, f"delete the key {WEB_CONSOLE}")


def projects_get(app: App, args: "Args") -> None:
    """Print the projects that the credential can see, or the one that is named."""
    credential = app.credential(args, needs_project=False)
    projects = get_projects(app.client, credential.api_url, credential.api_key, args.org)
    rows = [
        {
            "project_id": project.project_id,
            "project_name": project.project_name,
            "deployment_count": project.deployment_count,
            "active": project.project_id == credential.project_id,
            "org_id": project.org_id,
        }
        for project in projects
        if args.id in (None, project.project_id)
    ]
    if args.id and not rows:
        raise Failure(f"project {quotable(args.id)} not found", "llamactl projects get")
    columns = "NAME=project_name project_id DEPLOYMENTS=deployment_count active org_id"
    app.terminal.show(rows[0] if args.id else rows, args.output, columns)


def projects_use(app: App, args: "Args") -> None:
    """Choose the project of a profile among those that its key can see."""
    data = app.store.check_writable()
    credential = credential_of_profile(app.process, data, args.profile, "--profile", None)
    name = credential.name or pick_profile(app, data, None)
    projects = get_projects(app.client, credential.api_url, credential.api_key, args.org)
    project = choose_project(app, projects, args.id, credential.project_id, "ID")
    with app.store.change() as data:
        find_profile(data, credential.api_url, name)  # another process may have deleted it
        profile = get_environment(data, credential.api_url)["profiles"][name]
        profile.update(project_fields(project))
    app.report(f"profile {name} uses project {project_label(profile)}")


def organizations_get(app: App, args: "Args") -> None:
    """Print the organizations, where the server has them."""
    credential = app.credential(args, needs_project=False)
    organizations = []
    if "organizations" in get_version(app.client, credential.api_url).capabilities:
        organizations = get_organizations(
            app.client, credential.api_url, credential.api_key
        )
    else:
        app.terminal.warn(f"{credential.api_url} has no organizations")
    org_id = credential.profile.get("org_id")
    for (
        row
    ) in organizations:  # of variables it is unknown: then the server's default is shown
        row["active"] = row["org_id"] == org_id if org_id else row["is_default"]
    columns = "NAME=org_name org_id DEFAULT=is_default active"
    app.terminal.show(organizations, args.output, columns)


def config(app: App, args: "Args") -> None:
    """Print what commands use, without a request."""
    credential, _ = credential_or_reason(app, args)
    row = {
        "environment": credential.api_url,
        "profile": credential.name,
        "project_id": credential.project_id,
        "project_name": credential.profile.get("project_name"),
    }
    app.terminal.show(row, args.output, " ".join(row))


def deployments_get(app: App, args: "Args") -> None:
    """Print the project's deployments, or the one that is named."""
    credential = app.credential(args)
    place = (credential.api_url, credential.api_key, require_project(credential))
    shown = None  # type: Any
    if args.name:
        shown = get_deployment(app.client, *place, args.name)
    else:
        shown = get_deployments(app.client, *place)
    if args.output in ("json", "yaml"):
        return app.terminal.show(shown, args.output, "")
    rows = []
    for each in [shown] if args.name else shown:
        rows.append(dict(each["spec"], name=each["name"], **each["status"]))
    columns = "name REPO=repo_url git_ref phase"
    if args.output == "wide":
        columns += " APPSERVER=appserver_version git_sha apiserver_url PROJECT=project_id"
    app.terminal.show(rows, "text", columns)
    for row in rows:
        if row["warning"]:
            app.terminal.warn(f"{row['name']}: {row['warning']}")
    return None


# ==== parser: the words of the command line, their help and examples; no logic
def option(flag: str, metavar: str, text: str, *aliases: str, **more: "Any") -> "Any":
    """An argument as argparse takes it: its names, and its settings."""
    settings = {"help": text}  # type: Dict[str, Any]
    if not metavar:
        settings["action"] = "store_true"
    elif "|" in metavar:
        settings.update(
            metavar=metavar, choices=metavar.split("|"), type=str.lower, default="text"
        )
    else:
        settings["metavar"] = metavar
        if not flag.startswith("-"):
            settings["nargs"] = "?"
    settings.update(more)
    return (flag,) + aliases, settings


NAME = option("name", "NAME", "a profile, as `auth get` lists them")
URL = option("url", "URL", "an environment, as `environments get` lists them")
NEW_URL = option("url", "URL", "its API URL", nargs=None)
ID = option("id", "ID", "a project, as `projects get` lists them")
DEPLOYMENT = option("name", "NAME", "a deployment")
PROFILE = option("--profile", "NAME", "use this profile for this one command")
PROJECT = option("--project", "ID", "use this project")
KEY_FILE = option("--api-key-file", "PATH", "read the key from PATH, - for stdin")
KEY = option(
    "--api-key",
    "KEY",
    "the key, - for stdin; on the command line it shows in the process list and in the "
    "shell's history, so prefer a file or stdin",
)
NEW_PROJECT = option("--project", "ID", "the project to use (default: ask)", "--project-id")
ORG = option("--org", "ID", "only projects of this organization")
NEW_NAME = option("--name", "NAME", "the new profile's name (default: made up)")
NO_VERIFY = option("--no-verify", "", "do not ask the server")
OFFLINE = option("--offline", "", "do not ask the server")
NO_BROWSER = option("--no-browser", "", "only print the address and the code")
START = option("--start", "", "print them and exit; --resume finishes")
RESUME = option("--resume", "", "finish what --start began")
ALL = option("--all", "", "every profile of every environment")
ENV_FILE = option("--env-file", "PATH", "the file (default: .env), - for stdout")
OFFICIAL = option("--from-official", "", "from its profiles.db, which stays as it is")
OUTPUT = option("-o", "text|json|yaml", "how to print (default: text)", "--output")
WIDE_OUTPUT = option(
    "-o", "text|wide|json|yaml", "how to print (default: text)", "--output"
)
VERSION = option("--version", "", "show the version")
EVERYWHERE = [
    option("-h", "", "show this help", "--help"),
    option("--quiet", "", "no notices and no progress"),
    option("--native-tls", "", argparse.SUPPRESS),  # the official client's: always so here
]
HEADINGS = {
    "credential": ("--api-key-file", "--api-key", "--profile"),
    "choice": ("--project", "--org", "--name"),
    "browser": ("--no-browser", "--start", "--resume"),
    "everywhere": ("-h", "--quiet", "--native-tls"),
}
COMMANDS = {
    "auth token": Verb(
        auth_token,
        "Create a profile from an API key and choose its project.",
        [KEY_FILE, KEY, NEW_PROJECT, ORG, NEW_NAME, NO_VERIFY],
    ),
    "auth login": Verb(
        auth_login,
        "Log in with a browser on any device and create a profile.",
        [NEW_PROJECT, ORG, NEW_NAME, NO_BROWSER, START, RESUME, OUTPUT],
    ),
    "auth get": Verb(auth_get, "List profiles, or show one.", [NAME, OUTPUT]),
    "auth use": Verb(auth_use, "Make a profile the current one.", [NAME]),
    "auth logout": Verb(
        auth_logout,
        "Delete a profile and, for a login, its API key on the server.",
        [NAME, ALL],
    ),
    "auth inject": Verb(
        auth_inject, "Write the credential into a .env file.", [PROFILE, PROJECT, ENV_FILE]
    ),
    "auth status": Verb(
        auth_status,
        "Show what commands use, where it came from, and whether it works.",
        [NAME, OFFLINE, PROFILE, PROJECT, OUTPUT],
    ),
    "auth exec": Verb(
        auth_exec,
        "Run a command with the credential in its variables.",
        [NAME, PROFILE, PROJECT],
    ),
    "auth import": Verb(auth_import, "Import the official client's profiles.", [OFFICIAL]),
    "environments get": Verb(
        environments_get, "List environments, or show one.", [URL, OUTPUT]
    ),
    "environments add": Verb(
        environments_add, "Add an environment and make it current.", [NEW_URL, NO_VERIFY]
    ),
    "environments use": Verb(
        environments_use, "Make an environment the current one.", [URL]
    ),
    "environments delete": Verb(
        environments_delete, "Delete an environment and its profiles.", [URL]
    ),
    "projects get": Verb(
        projects_get, "List projects, or show one.", [ID, ORG, PROFILE, OUTPUT]
    ),
    "projects use": Verb(
        projects_use, "Choose the project of a profile.", [ID, ORG, PROFILE]
    ),
    "organizations get": Verb(organizations_get, "List organizations.", [PROFILE, OUTPUT]),
    "deployments get": Verb(
        deployments_get,
        "List the project's deployments, or show one.",
        [DEPLOYMENT, PROFILE, PROJECT, WIDE_OUTPUT],
    ),
    "config": Verb(config, "Show what commands use, without network.", [PROFILE, OUTPUT]),
}
EXAMPLES = (
    "auth token --api-key-file /run/secrets/llama --project ID",
    "auth login",
    "auth login --resume --project ID",
    "auth inject --env-file deploy/.env --profile llx-wxyz",
    "auth exec llx-wxyz -- python3 app.py",
)
GROUPS = {
    "": "Sign in to LlamaCloud with one file and the standard library.",
    "auth": "Get credentials, keep them, choose between them, hand them on.",
    "environments": "Choose the control plane.",
    "projects": "List projects and choose one.",
    "organizations": "List organizations.",
    "deployments": "List deployments.",
}
RENAMED = {  # `auth` stood before most of them
    "list": "auth get",
    "switch": "auth use",
    "destroy": "auth logout --all",
    "env": "environments get",
    "project": "projects use",
    "organizations": "organizations get",
}
NOT_OFFERED = (
    "agentcore",
    "completion",
    "dev",
    "init",
    "pkg",
    "serve",
    "config destroy",
    "config show-db",
    "deployments apply",
    "deployments configure-git-remote",
    "deployments create",
    "deployments delete",
    "deployments edit",
    "deployments history",
    "deployments logs",
    "deployments rollback",
    "deployments template",
    "deployments update",
)
FOLDER_HELP = """variables (no credential is taken from any):
  LLAMACTL_CONFIG_DIR      folder that the profiles are kept in"""
VARIABLES_HELP = f"""variables (a key and a project beat the current profile):
  LLAMA_CLOUD_API_KEY      API key
  LLAMA_AGENTS_PROJECT_ID  project
  LLAMA_CLOUD_BASE_URL     API URL (default: {DEFAULT_API_URL})
  LLAMA_CLOUD_USE_PROFILE  1: ignore the three above
  LLAMACTL_PROFILE         profile to use in place of the current one
  LLAMACTL_CONFIG_DIR      folder that the profiles are kept in"""
EXIT_CODES_HELP = """
exit codes: 0 done, 1 failed, 2 wrong usage or a choice missing, 4 not logged in
or rejected, 5 server unreachable or failing (try again), 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """argparse, but it raises, and never quotes what may be a secret."""

    def error(self, message: str) -> "NoReturn":
        message = re.sub("explicit argument .*", "value", message)
        message = re.sub(r"choice: .* \(choose", "choice (choose", message)
        raise Failure(message, f"{self.prog} --help", EXIT_USAGE)

    def parse_all(self, arguments: "List[str]") -> "Args":
        """ARGUMENTS as argparse reads them; raises Failure for one too many or empty."""
        args, extra = self.parse_known_args(arguments)
        for argument in extra:
            match = re.match("--?[a-z-]+", argument)
            if match:
                self.error(f"unknown option {quotable(match.group())}")
        if extra:
            self.error("one argument too many")
        for name, value in vars(args).items():
            if value == "":
                self.error(f"{name.replace('_', '-')} is empty")
        return args


def heading_of(flag: str) -> "Optional[str]":
    for heading, flags in HEADINGS.items():
        if flag in flags:
            return heading
    return None


def new_parser(
    words: str, usage: "Optional[str]", about: str, epilog: str, options: "List[Any]"
) -> Parser:
    """A parser for OPTIONS and those of every command."""

    def formatter(prog: str) -> argparse.HelpFormatter:
        # a fixed width keeps argparse from asking the terminal for it at each option
        return argparse.RawDescriptionHelpFormatter(prog, 2, 27, 80)

    parser = Parser(
        f"llamactl {words}".strip(),
        usage,
        about,
        epilog,
        formatter_class=formatter,
        add_help=False,
        allow_abbrev=False,
    )
    groups = {None: parser}  # type: Dict[Optional[str], Any]
    for flags, settings in options + EVERYWHERE:
        heading = heading_of(flags[0])
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(*flags, **settings)
    return parser


def examples(words: str) -> str:
    """The examples of a command, of a group its commands, as they stand in help."""
    lines = [line for line in EXAMPLES if line.startswith(words)]
    if not lines:
        lines = [command for command in COMMANDS if command.startswith(words)]
    return "\n  llamactl ".join(["examples:"] + lines) + "\n\n"


def verb_parser(words: str) -> Parser:
    """The parser of the command WORDS."""
    verb = COMMANDS[words]
    usage = None
    if words == "auth exec":
        usage = "llamactl auth exec [NAME] [options] -- COMMAND..."
    variables = VARIABLES_HELP if PROFILE in verb.options else FOLDER_HELP
    parser = new_parser(
        words, usage, verb.summary, examples(words) + variables, verb.options
    )
    parser.set_defaults(profile=None, project=None, output="text")
    return parser


def group_parser(group: str) -> Parser:
    """The parser of a group of commands, or of all where GROUP is empty."""
    verbs = {words: verb for words, verb in COMMANDS.items() if words.startswith(group)}
    width = max(len(words) for words in verbs)
    listing = [f"  {words:{width}}  {verb.summary}" for words, verb in verbs.items()]
    about = "\n".join([GROUPS[group], "", "commands:"] + listing)
    epilog = examples(group) + VARIABLES_HELP
    if group:
        return new_parser(group, f"llamactl {group} COMMAND [options]", about, epilog, [])
    epilog = f"{epilog}\n{EXIT_CODES_HELP}"
    return new_parser("", "llamactl COMMAND [options]", about, epilog, [VERSION])


def flags_with_value() -> "Set[str]":
    flags = set()  # type: Set[str]
    for verb in COMMANDS.values():
        for names, settings in verb.options:
            if names[0].startswith("-") and "metavar" in settings:
                flags.update(names)
    return flags


def split_command(arguments: "List[str]") -> "Tuple[str, List[str]]":
    """The words that name a command, wherever options stand, and the other arguments."""
    valued = flags_with_value()
    words = ""
    others = []
    is_value = False
    for argument in arguments:
        is_whole = " " in words or (
            words in COMMANDS and f"{words} {argument}" not in NOT_OFFERED
        )
        if is_value or is_whole or argument.startswith("-"):
            others.append(argument)
        else:
            words = f"{words} {argument}".strip()
        is_value = argument in valued
    return words, others


def unknown_command(words: str) -> Failure:
    """What to say of WORDS, which are no command, with the likeliest one as hint."""
    from difflib import get_close_matches

    group, _, verb = words.partition(" ")
    renamed = RENAMED.get(words.replace("auth ", ""))
    if words.endswith(" list") and group in GROUPS:
        renamed = f"{group} get"
    if renamed:
        return Failure(f"`{words}` is now `{renamed}`", f"llamactl {renamed}", EXIT_USAGE)
    if words in NOT_OFFERED or group in NOT_OFFERED:
        message = f"`{words}` is not offered here, but by the official client"
        return Failure(message, "llamactl --help", EXIT_USAGE)
    message = f"there is no command `{' '.join(quotable(word) for word in words.split())}`"
    verbs = [command for command in COMMANDS if command.startswith(f"{group} ")]
    if verbs:
        near = get_close_matches(verb, [command.split()[1] for command in verbs], 1)
        hint = f"{group} {near[0]}" if near else f"{group} --help"
    else:
        near = get_close_matches(words, list(COMMANDS) + list(GROUPS), 1)
        hint = near[0] if near else RENAMED.get(group, "--help")
    return Failure(message, f"llamactl {hint}", EXIT_USAGE)


# ==== main: read, dispatch, and the only place that catches everything
def run_command(process: Process, terminal: Terminal, arguments: "List[str]") -> int:
    """Run the command that ARGUMENTS name; its exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    words, others = split_command(arguments[:cut])
    wants_help = "-h" in others or "--help" in others
    if words in COMMANDS:
        parser = verb_parser(words)
    elif words in GROUPS:
        parser = group_parser(words)
    else:
        raise unknown_command(words)
    if wants_help:
        terminal.write(parser.format_help())
        return EXIT_DONE
    if words in COMMANDS:
        behind = arguments[cut:]
        args = parser.parse_all(others if words == "auth exec" else others + behind)
        args.command = behind[1:]
        terminal.quiet = args.quiet
        return COMMANDS[words].run(App(process, terminal), args) or EXIT_DONE
    if words:
        terminal.write_error(parser.format_help())
        return EXIT_USAGE
    if parser.parse_all(others).version:
        terminal.write(f"llamactl.py {__version__}\n")
    else:
        terminal.write(parser.format_help())
    return EXIT_DONE


def report_bug(terminal: Terminal, error: Exception) -> None:
    """Say where this program is wrong, and quote nothing."""
    from traceback import walk_tb

    line = 0
    for frame, number in walk_tb(error.__traceback__):
        if frame.f_code.co_filename == run_command.__code__.co_filename:
            line = number
    kind = type(error).__name__
    terminal.tell(f"error: a mistake in llamactl.py {__version__}: {kind} at line {line}")


def main(argv: "Optional[List[str]]" = None) -> int:
    """Run llamactl with ARGV, by default the process's own; the exit code."""
    process = read_process()
    terminal = Terminal(process)
    try:
        return run_command(process, terminal, list(sys.argv[1:] if argv is None else argv))
    except Failure as failure:
        terminal.tell(f"error: {failure.message}")
        if failure.hint:
            terminal.tell(f"hint: {failure.hint}")
        return failure.code
    except KeyboardInterrupt as interrupt:
        if is_terminal(terminal.input):
            terminal.write_error("\n")
        terminal.write_error("interrupted\n")
        return 128 + getattr(interrupt, "number", 2)  # as a shell has it; 2 is Ctrl-C's
    except BrokenPipeError:
        terminal.abandon(1)
        return EXIT_DONE
    except OSError as error:  # a working folder that is gone, say
        terminal.tell(f"error: {reason(error)}")
        return EXIT_FAILED
    except Exception as error:
        report_bug(terminal, error)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
