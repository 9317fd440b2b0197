#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sign in to LlamaCloud with one file and the standard library.

What it does   Makes profiles (an API key and a project of one control plane) from a key or
               by the OpenID Connect device flow, stores them, and hands them on in a .env
               file or to a command.
Files written  profiles.json (0600) in $LLAMACTL_CONFIG_DIR, %APPDATA%\\llamactl,
               $XDG_CONFIG_HOME/llamactl or ~/.config/llamactl (0700), with .lock, for an
               instant .new, where the file system has no locks .locked, and .damaged-...
               for a damaged file behind its name; the .env that `auth inject` is told to
               write, for an instant with .llamactl-lock and .llamactl-new.
Hosts          The control plane of the current environment (https://api.cloud.llamaindex.ai
               unless you add another); for `auth login`, and for the logout of a login, the
               identity provider that it named; by way of the proxies that urllib knows.
               No telemetry, no update check.
Sent about you The host's and the profile's name, in the title of a key that a login makes.
Files read     These; the file with a key that you name; git's ignore files; the official
               client's profiles.db, by `auth import`; certificates; /proc/self/mountinfo,
               before a warning about modes.
Variables      LLAMA_CLOUD_API_KEY, LLAMA_CLOUD_API_KEY_FILE, LLAMA_AGENTS_PROJECT_ID,
               LLAMA_CLOUD_BASE_URL, LLAMA_CLOUD_USE_PROFILE, LLAMACTL_PROFILE,
               LLAMACTL_CONFIG_DIR, LLAMACTL_TIMEOUT, XDG_CONFIG_HOME, APPDATA, HOME, CI,
               TERM, SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE;
               HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, or in lower case;
               COMPUTERNAME; to find a browser SSH_CONNECTION, SSH_CLIENT, SSH_TTY,
               DISPLAY, WAYLAND_DISPLAY, BROWSER; what Python and OpenSSL read, such as
               LANG, LC_*, PATH, PYTHON*, OPENSSL_CONF.
Programs run   The command given to `auth exec`; for `auth login` what opens your browser.
Never          Turns certificate verification off, sends a key to a server that is not its
               own, or prints one (but for `auth inject --env-file -`, which is asked to).
How to read    From the bottom: `main` catches every error, `COMMANDS` lists the commands,
               each command is one function, and everything it calls is defined above it.
               `Client.send` sends the key, `resolve_credential` says which one,
               `Store.change` writes it, and `auth_login` gets a new one.
"""

# Python before 3.6 stops here, and shows this line
NEEDS: str = "llamactl.py needs Python 3.6 or newer: start it with a newer python3"

import sys

# a json.py beside this file or in the working folder must not be imported in its place
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]

LACKS = (
    "this Python lacks the module %s; install all of it (Debian: apt-get install python3)"
)
try:
    import argparse
    import errno
    import json
    import os
    import re
    import stat
    import time
    from collections import namedtuple
    from contextlib import ExitStack, closing, contextmanager, suppress
    from functools import lru_cache
    from os.path import abspath, dirname, exists, isabs, isdir, isfile, join, realpath
except ImportError as error:
    sys.exit(f"error: {LACKS % error.name}")

__version__ = "1.0.0"

# Types stand in comments (PEP 484), since Python compiles annotations at each start. What
# only mypy needs is imported where it takes this for true.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl  # noqa: F401 (these are used in comments)
    import threading  # noqa: F401
    from email.message import Message
    from typing import (  # noqa: F401
        Any,
        Callable,
        Container,
        Dict,
        Iterator,
        List,
        Mapping,
        NamedTuple,
        NoReturn,
        Optional,
        Sequence,
        Set,
        Tuple,
        TypedDict,
        TypeGuard,
        Union,
    )
    from urllib.request import Request  # noqa: F401

    Args = argparse.Namespace
    Json = Dict[str, Any]
    Warn = Callable[[str], None]
    Check = Callable[[int], None]  # of an open file; raises Failure
    Wait = Callable[[float], None]  # waits for so many seconds
    Choices = Sequence[Tuple[str, str]]  # each a value and the text that people know it by

    # what profiles.json holds

    class Provider(TypedDict):
        """The identity provider of a login, as it was when the code was requested.

        RFC 8414 §2, OpenID Connect Discovery §3.
        """

        issuer: str
        client_id: str
        token_endpoint: str
        revocation_endpoint: "Optional[str]"

    class Profile(TypedDict, total=False):
        auth_type: str  # TOKEN, OIDC or NO_AUTH
        api_key: "Optional[str]"
        project_id: "Optional[str]"
        project_name: "Optional[str]"
        org_id: "Optional[str]"
        # of a login alone
        api_key_id: "Optional[str]"
        issuer: "Optional[str]"
        sub: "Optional[str]"
        email: "Optional[str]"
        provider: "Optional[Provider]"
        access_token: "Optional[str]"
        access_expires_at: "Optional[float]"  # seconds since 1970; None where nobody said
        refresh_token: "Optional[str]"

    class WaitingLogin(TypedDict, total=False):
        """A device code between `auth login --start` and `--resume`."""

        provider: "Optional[Provider]"
        device_code: str
        user_code: str
        verification_uri: str
        verification_uri_complete: "Optional[str]"
        expires_at: float  # seconds since 1970
        interval: float  # seconds

    class Environment(TypedDict, total=False):
        """One control plane; its API URL is the key that it is stored under."""

        requires_auth: bool
        current_profile: "Optional[str]"
        profiles: "Dict[str, Profile]"
        login: "Optional[WaitingLogin]"

    class StoreData(TypedDict):
        version: int
        current_environment: "Optional[str]"
        environments: "Dict[str, Environment]"

    # what rooms hand to each other

    class ProcessValues(NamedTuple):
        variables: "Dict[str, str]"
        home: "Optional[str]"
        host_name: str
        program_on_stdin: bool

    class Snapshot(NamedTuple):
        content: bytes
        status: os.stat_result  # of the very file that was read
        bits: int  # how others can use it

    class CaBundle(NamedTuple):
        file: "Optional[str]"
        folder: "Optional[str]"
        source: str  # the variable that named it, or where it was found

    class Proxy(NamedTuple):
        url: str  # as it was given, perhaps with a password
        address: str  # without that
        source: str  # what named it

    class ClientValues(NamedTuple):
        process: "Process"
        hide: "Callable[[str], None]"
        warn: Warn
        sleep: Wait
        deadline: "Optional[float]"  # monotonic: all requests together; then no retries

    class AnswerValues(NamedTuple):
        status: int
        headers: Message
        body: bytes  # all of it
        url: str  # that it came from, without the query

    class PlaneValues(NamedTuple):
        client: "Client"
        api_url: str
        token: "Optional[str]"

    class User(NamedTuple):
        issuer: str
        sub: str
        email: "Optional[str]"  # else another name that people know

    class Project(NamedTuple):
        project_id: str
        project_name: str
        deployment_count: int
        org_id: str

    class Credential(NamedTuple):
        """A key, a URL and a project that belong together."""

        api_url: str
        api_key: "Optional[str]"
        project_id: "Optional[str]"
        name: "Optional[str]"  # of the profile; None where variables hold the credential
        profile: Profile
        sources: "Mapping[str, Optional[str]]"  # each value's name, and where it came from
else:
    ProcessValues = namedtuple("ProcessValues", "variables home host_name program_on_stdin")
    Snapshot = namedtuple("Snapshot", "content status bits")
    CaBundle = namedtuple("CaBundle", "file folder source")
    Proxy = namedtuple("Proxy", "url address source")
    ClientValues = namedtuple("ClientValues", "process hide warn sleep deadline")
    AnswerValues = namedtuple("AnswerValues", "status headers body url")
    PlaneValues = namedtuple("PlaneValues", "client api_url token")
    User = namedtuple("User", "issuer sub email")
    Project = namedtuple("Project", "project_id project_name deployment_count org_id")
    Credential = namedtuple("Credential", "api_url api_key project_id name profile sources")

# ==== constants: what several rooms use; a literal with one user stands beside that user
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
VAR_KEY_FILE = "LLAMA_CLOUD_API_KEY_FILE"
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
ONE_DAY = 86400.0  # nothing that a server says lasts longer
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

    def __init__(self, message, hint="", code=EXIT_FAILED):
        # type: (str, str, int) -> None
        self.message = message
        self.hint = hint
        self.code = code


# how far an exchange with a server came
NOT_CONNECTED = "not connected"  # the request never left
SILENT = "silent"  # it may have been received
BROKEN_OFF = "broken off"  # the connection ended before the answer did
SLOW = "slow"  # the answer began, and did not end in time
FAILING = "failing"  # the server said that it fails, or has no time
UNUSABLE = "unusable"  # this program does not understand the answer


class Unreachable(Failure):
    """A server that could not be reached, or whose answer makes no sense.

    `stage` is how far the exchange came; `is_sure` that the request never arrived.
    """

    def __init__(self, message, stage=UNUSABLE, hint=""):
        # type: (str, str, str) -> None
        super().__init__(message, hint, EXIT_UNREACHABLE)
        self.stage = stage
        self.is_sure = stage == NOT_CONNECTED


class Refused(Failure):
    """A server that understood the request and said no, with this HTTP status.

    `is_sure` tells the server itself, which answers in JSON, from a gateway.
    """

    def __init__(self, message, status, hint="", code=EXIT_FAILED):
        # type: (str, int, str, int) -> None
        super().__init__(message, hint, code)
        self.status = status
        self.is_sure = False


class Damaged(Failure):
    """A store that makes no sense: a reader stops, a writer moves it aside and goes on."""


def misuse(message, hint=""):
    # type: (str, str) -> Failure
    """A wrong command line, or a choice that is missing where nobody can be asked."""
    return Failure(message, hint, EXIT_USAGE)


def require(condition, message, hint="", code=EXIT_FAILED):
    # type: (Any, str, str, int) -> None
    if not condition:
        raise Failure(message, hint, code)


def require_usable(condition, message):
    # type: (Any, str) -> None
    """Raise Unreachable unless a server's answer meets CONDITION."""
    if not condition:
        raise Unreachable(message)


# ==== process: variables, platform and home, read once; turning into another program
WINDOWS = os.name == "nt"
MACOS = sys.platform == "darwin"
SET = "set" if WINDOWS else "export"  # how a shell sets a variable
EXIT_NOT_EXECUTABLE = 126  # as a shell has it
EXIT_NOT_FOUND = 127


class Process(ProcessValues):
    """What the program takes from its surroundings."""

    def get(self, variable):
        # type: (str) -> Optional[str]
        """The value of VARIABLE without white space around it; an empty one is unset."""
        return self.variables.get(variable, "").strip() or None

    def prefers_profile(self):
        # type: () -> bool
        word = self.get(VAR_USE_PROFILE) or ""
        return word.lower() in "1 true yes on t y".split()

    def timeout(self, default):
        # type: (float) -> float
        """How many seconds a server may be silent; raises Failure."""
        text = self.get(VAR_TIMEOUT)
        if text is None:
            return default
        if not re.fullmatch("(?!0+$)[0-9]{1,3}", text):
            raise misuse(f"{VAR_TIMEOUT} must be a whole number of seconds, 1 to 999")
        return float(text)

    def config_folder(self):
        # type: () -> Optional[str]
        """The folder of profiles.json as an absolute path; None where there is no home."""
        path = self.get(VAR_FOLDER)
        if path is None:
            shared = self.get("APPDATA" if WINDOWS else "XDG_CONFIG_HOME") or ""
            path = join(shared if isabs(shared) else "~/.config", "llamactl")
        if re.match(r"~([/\\]|$)", path):
            path = join(self.home or "~", path[1:].lstrip("/\\"))
        else:
            path = os.path.expanduser(path)
        if path.startswith("~"):  # there is no home, or no such user
            return None
        with suppress(OSError):  # the working folder may be gone
            return abspath(path)
        return None


def read_process():
    # type: () -> Process
    """What this process was started with."""
    variables = dict(os.environ)
    home = None
    with suppress(KeyError):  # Python 3.6.7, for a user without an account
        home = os.path.expanduser("~")
    if variables.get("HOME") == "" or not isabs(str(home)):
        home = None
    host_name = variables.get("COMPUTERNAME", "")
    if hasattr(os, "uname"):
        host_name = os.uname().nodename
    # `python3 -` and `python3 < llamactl.py` leave these names; a file and -m leave a path
    program_on_stdin = sys.argv[0] in ("-", "")
    return Process(variables, home, host_name or "unknown", program_on_stdin)


def reason(error):
    # type: (BaseException) -> str
    """The operating system's or OpenSSL's own words for ERROR, without paths or values."""
    words = getattr(error, "strerror", None) or type(error).__name__
    return re.sub(r"^\[.*?\] | \(_ssl.*\)$", "", words)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program, after it has cleaned up as for Ctrl-C."""

    def __init__(self, number):
        # type: (int) -> None
        self.number = number


def ending_signals():
    # type: () -> List[int]
    """The signals that end a program; those that were ignored at the start stay ignored."""
    import signal

    names = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")
    return [
        number
        for number in signal.Signals
        if number.name in names and signal.getsignal(number) != signal.SIG_IGN
    ]


def catch_signals():
    # type: () -> None
    """Have the signals that end a program raise Interrupted instead of killing it."""
    import signal

    def interrupt(number, _):
        # type: (int, Any) -> None
        raise Interrupted(number)

    with suppress(ValueError):  # only the main thread may
        for number in ending_signals():
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, interrupt)


@contextmanager
def uninterrupted(tell):
    # type: (Callable[[str], None]) -> Iterator[None]
    """Delay signals to the end of this block, and tell the user so."""
    import signal

    caught = []  # type: List[int]

    def note(number, _):
        # type: (int, Any) -> None
        caught.append(number)
        tell("finishing first; please wait")

    with ExitStack() as stack:
        with suppress(ValueError):  # only the main thread may
            for number in ending_signals():
                stack.callback(signal.signal, number, signal.signal(number, note))
        try:
            yield
        except Failure as failure:
            if not caught:
                raise
            tell(f"error: {failure.message}")
    if caught:
        raise Interrupted(caught[0])


def replace_process(command, variables):
    # type: (List[str], Dict[str, str]) -> int
    """Become COMMAND; on Windows, which cannot, run it and return its exit code."""
    import signal

    program = command[0]
    require(program, "the command is empty", code=EXIT_NOT_FOUND)
    variables.pop("", None)  # as a shell drops it; it cannot be handed on
    try:
        if WINDOWS:
            import subprocess
            from shutil import which

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's
            command = [which(program) or program] + command[1:]  # which() may add .cmd
            code = subprocess.call(command, env=variables)
            return code - (1 << 32) if code >> 31 else code  # as os._exit() takes it
        # Python ignores these, which other programs die of
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execvpe(program, command, variables)
    except FileNotFoundError:
        problem = "command not found"
        if os.sep in program and exists(program):
            problem = "its interpreter was not found"
        raise Failure(f"{program}: {problem}", code=EXIT_NOT_FOUND) from None
    except OSError as error:
        raise Failure(f"{program}: {reason(error)}", code=EXIT_NOT_EXECUTABLE) from None


# ==== text: cleaning, masking, names and URLs; no input, no output
def clean(text):
    # type: (str) -> str
    """TEXT as one line that can neither move a cursor nor reorder what stands around it."""
    if text.isprintable():
        return text
    text = re.sub(SURROGATE, "\ufffd", text)
    text = re.sub(r"[\t\r\n]+", " ", text)
    return re.sub(f"[\x00-\x1f{INVISIBLE}]", "", text)


def masked(text, secrets):
    # type: (str, Set[str]) -> str
    """TEXT without SECRETS, the longest first, since one may be a part of another."""
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, json.dumps(secret)[1:-1]):
            text = text.replace(form, MASK)
    return text


def without_password(word):
    # type: (str) -> str
    """WORD, if it is an address, without its user (of the web) or its password."""
    scheme, _, rest = word.partition("//")
    # a password may hold what should be encoded; digits and a slash are a port and a path
    login = re.fullmatch("([^:/?#]*)(:(?![0-9]+/).*)?@[^@]*", rest)
    is_web = scheme.lower().endswith(("http:", "https:"))
    if login is None or not (login.group(2) or is_web):
        return word
    user = "" if is_web else f"{login.group(1)}:"
    host = rest.rpartition("@")[2]
    return f"{scheme}//{user}{MASK}@{host}"


def without_passwords(text):
    # type: (str) -> str
    """TEXT without the passwords of the addresses in it."""
    return re.sub(r"\S+", lambda match: without_password(match.group()), text)


def shortened(text, limit=300):
    # type: (str, int) -> str
    """TEXT on one line, cut at white space alone: half a secret would not be masked."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    whole_words = line[:limit].rpartition(" ")[0]
    return f"{whole_words} ...".strip()


def is_uuid(text):
    # type: (str) -> bool
    return bool(re.fullmatch("(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))


def quotable(word):
    # type: (str) -> str
    """WORD of the command line, masked where it may be a secret: long, and not a UUID."""
    return word if len(word) < 20 or is_uuid(word) else MASK


def as_utf_8(word):
    # type: (str) -> str
    """WORD as its bytes have it, which Python 3.6 takes for ASCII in the C locale."""
    with suppress(UnicodeEncodeError):  # a lone surrogate, on Windows
        return word.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return word


def shell_quoted(word):
    # type: (str) -> str
    """WORD as a shell reads it, for hints that are pasted."""
    from shlex import quote

    return quote(word)


def last_four(secret):
    # type: (str) -> str
    """At most the last four characters, none of a secret too short to spare them."""
    if len(secret) < 12:
        return ""
    return re.sub(r"[^A-Za-z0-9]", "", secret[-4:])


def is_plain(text):
    # type: (Any) -> bool
    """Whether TEXT is printable ASCII without white space, as keys and ids are."""
    return isinstance(text, str) and bool(re.fullmatch("[!-~]+", text))


def require_plain(text, name):
    # type: (str, str) -> str
    """TEXT, if it is plain; the Failure otherwise calls it NAME and quotes nothing."""
    if not text:
        raise misuse(f"{name} is empty")
    if not is_plain(text):
        raise misuse(f"{name} contains white space or characters that are not ASCII")
    return text


def clean_key(text):
    # type: (str) -> str
    """A key without what surrounds it when it is pasted: white space, marks, quotes.

    Raises Failure for NAME=KEY.
    """
    text = re.sub("\x1b\\[20[01]~", "", text).strip()
    text = re.sub(r"""(?s)^(["'])(.*)\1$""", r"\2", text)
    if re.match("(export )?[A-Z][A-Z0-9_]*=", text):
        raise misuse("the API key has a name in front of it; give the key alone")
    return require_plain(text, "the API key")


def decoded_key(content):
    # type: (bytes) -> str
    """The key in CONTENT, which may begin with a BOM; raises Failure."""
    return clean_key(content.decode("utf-8-sig", "replace"))


def split_url(url, rest):
    # type: (str, str) -> Tuple[str, str, int, str]
    """Scheme, host, port and what follows, which the pattern REST must match.

    Raises ValueError. Written by hand because local commands do without urllib, and
    because urllib accepts what is no URL.
    """
    pattern = r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?"
    match = re.fullmatch(f"(?ai){pattern}({rest})?", url)
    if match is None:
        raise ValueError("not an http(s) URL")
    scheme, host, digits, path = match.groups("")
    port = int(digits or DEFAULT_PORTS[scheme.lower()])
    if not 0 < port < 65536:
        raise ValueError("not a port")
    return scheme.lower(), host.lower(), port, path


LOOPBACK = (  # as resolvers write it, too
    r"([a-z0-9-]+\.)*localhost\.?|ip6-localhost|127\.[0-9.]+|0(\.0){0,3}|2130706433|"
    r"0x7f[0-9a-f]{6}|(0x7f|0177)(\.[0-9]{1,3}){1,3}|"
    r"\[[0:]*(1|ffff:127\.[0-9.]+|ffff:7f[0-9a-f]{2}:[0-9a-f]+)?\]"
)


def is_loopback(url):
    # type: (str) -> bool
    """Whether URL leads to this machine."""
    return bool(re.match(f"(?i)https?://({LOOPBACK})([:/?]|$)", url))


def normal_url(url):
    # type: (str) -> str
    """An API URL as it is stored and compared (RFC 3986 §6.2.2.1, §6.2.3).

    Raises Failure.
    """
    try:
        scheme, host, port, path = split_url(url, "/[a-z0-9._~%/@:,+=-]*")
    except ValueError:
        likely = DEFAULT_API_URL
        pattern = r"(localhost|[0-9.]+|([A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,18})(:[0-9]+)?/?"
        if re.fullmatch(pattern, url):
            scheme = "http" if is_loopback(f"http://{url}") else "https"
            likely = f"{scheme}://{url}"
        message = "an API URL is http(s)://HOST, without user, query or fragment"
        raise misuse(message, f"llamactl environments add {likely}") from None
    place = host if port == DEFAULT_PORTS[scheme] else f"{host}:{port}"
    return f"{scheme}://{place}{path}".rstrip("/")


def origin_of(url):
    # type: (str) -> str
    """Scheme, host and port of URL, if secrets may be sent there at all; raises Failure."""
    try:
        scheme, host, port, _ = split_url(url, "[/?][!-~]*")
    except ValueError:
        raise Failure(f"the server named an unusable URL: {shortened(url)}") from None
    return f"{scheme}://{host}:{port}"


def is_sent_in_clear(url):
    # type: (str) -> bool
    """Whether URL is plain http to another machine."""
    return url.lower().startswith("http://") and not is_loopback(url)


def shell_safe(text):
    # type: (str) -> str
    """TEXT as a name that no shell acts on."""
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", text).strip("-")[:80]


def free_name(wanted, taken):
    # type: (str, Any) -> str
    """WANTED, or WANTED-2, WANTED-3 and so on where it is taken."""
    name = wanted
    number = 1
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def listed(choices):
    # type: (Choices) -> str
    """CHOICES as they stand in a sentence, 20 at most."""
    words = [
        value if label == value else f"{value} ({label})" for value, label in choices[:20]
    ]
    if len(choices) > 20:
        words.append(f"and {len(choices) - 20} more")
    return ", ".join(words) or "none"


def find_choices(answer, shown, choices):
    # type: (str, Choices, Choices) -> List[str]
    """The values that ANSWER may mean.

    A number of those SHOWN, else the whole name of one of CHOICES, else a part of it.
    """
    number = int(answer) if re.fullmatch("[0-9]{1,9}", answer) else 0
    if 0 < number <= len(shown):
        return [shown[number - 1][0]]
    whole = [value for value, label in choices if answer in (value, label)]
    if whole or not answer:
        return whole
    answer = answer.lower()
    return [value for value, label in choices if answer in f"{value}\n{label}".lower()]


def is_number(value, above=-1e300):
    # type: (Any, float) -> bool
    """Whether VALUE is a JSON number of a size that arithmetic with times can bear."""
    return type(value) in (int, float) and above < value < 1e300


def parse_object(content):
    # type: (bytes) -> Optional[Json]
    """The JSON object that CONTENT holds; None where it holds none or is not UTF-8."""

    def parse_int(digits):
        # type: (str) -> int
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
def json_text(value, indent=2):
    # type: (Any, Optional[int]) -> str
    """VALUE as JSON, the same, without characters that a terminal would act on."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    text = re.sub(SURROGATE, "\ufffd", text)
    return re.sub(f"[{INVISIBLE}]", lambda match: f"\\u{ord(match.group()):04x}", text)


def yaml_scalar(value):
    # type: (Any) -> str
    """VALUE bare where YAML 1.1 and 1.2 both read that text as a string, else as JSON."""
    special = "null|true|false|yes|no|on|off|y|n|nan|inf|e[0-9]+"
    bare = rf"(?ai)(?!(?:{special})\Z)[a-z_](?:[a-z0-9_./@:+-]*[a-z0-9_/])?"
    if isinstance(value, str) and re.fullmatch(bare, value):
        return value
    return json_text(value, indent=None)


def yaml_text(value, indent=""):
    # type: (Any, str) -> str
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


def cell_text(value):
    # type: (Any) -> str
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean("" if value is None else str(value)) or "-"


def cell_width(text):
    # type: (str) -> int
    """How many columns of a terminal TEXT takes: CJK and emoji 2, combining marks 0."""
    if len(text) == len(text.encode("utf-8", "replace")):
        return len(text)
    from unicodedata import category, east_asian_width, normalize

    width = 0
    for character in normalize("NFC", text):
        if category(character) not in "Mn Me Cf":
            width += 2 if east_asian_width(character) in "FW" else 1
    return width


MAX_COLUMN = 200  # what is longer stands out, and pads no other row


def table_text(headers, rows):
    # type: (Sequence[str], Sequence[Sequence[Any]]) -> str
    """A table without colour or truncation, two spaces between columns."""
    lines = [[cell_text(value) for value in row] for row in [headers, *rows]]
    widths = [min(max(map(cell_width, column)), MAX_COLUMN) for column in zip(*lines)]
    text = ""
    for line in lines:
        cells = [
            cell.ljust(width + len(cell) - cell_width(cell))
            for cell, width in zip(line, widths)
        ]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def output_text(value, output, columns):
    # type: (Any, str, str) -> str
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
ASSIGNMENT = r"([ \t]*(?:export[ \t]+)?)([^=#\s'\"`]+)[ \t]*=[ \t]*"
# a value in quotes that nothing but a comment follows, and any other up to its comment
QUOTED = r"""(?:"[^"\\]*(?:\\.[^"\\]*)*"|'[^']*'|`[^`]*`)[ \t]*(?=[#\r\n]|\Z)"""
BARE = r"[^#\r\n]*(?:(?<![ \t])#[^#\r\n]*)*"
LINE = r"[^\r\n]*(\r\n|\n|\r|\Z)"
ENV_PART = rf"(?s)(?:{ASSIGNMENT}(?:{QUOTED}|{BARE})(#[^\r\n]*)?)?{LINE}"


def env_value(value):
    # type: (str) -> str
    """VALUE as it stands behind `NAME=`, in quotes only where it needs them."""
    if re.fullmatch(r"[A-Za-z0-9_./:@%+,=-]+", value):
        return value
    if "'" not in value:
        return f"'{value}'"
    escaped = re.sub(r'(["\\$`])', r"\\\1", value)
    return f'"{escaped}"'


def unable_readers(value):
    # type: (str) -> List[str]
    """The tools that misread VALUE as env_value() writes it."""
    quoted = env_value(value)
    if quoted == value:
        return []
    readers = ["docker --env-file"]  # it takes quotes for a part of the value
    # python-dotenv expands ${...} in any quotes, unescapes backslashes in single ones, and
    # neither dollar signs nor backticks in double ones
    misread = r"[$`]|\\$" if quoted.startswith('"') else r"\$\{|\\\\|\\$"
    if re.search(misread, value):
        readers.append("python-dotenv")
    if "$" in value:
        readers += ["Next.js", "Vite"]  # which expand it in any quotes
    if quoted.startswith('"') and "\\" in quoted:
        readers.append("dotenv for Node.js")  # which unescapes nothing but line ends
    return readers


def env_lines(values):
    # type: (Dict[str, str]) -> Dict[str, str]
    """Each name and the line that assigns its value."""
    return {name: f"{name}={env_value(value)}" for name, value in values.items()}


def usual_line_end(text):
    # type: (str) -> str
    """The line end for new lines of TEXT: its own, \\r only where it has no other."""
    ends = re.findall(r"\r?\n|\r", text)
    return next((end for end in ("\n", "\r\n", "\r") if end in ends), "\n")


def joins_next_line(line):
    # type: (str) -> bool
    """Whether LINE ends in a backslash that is not escaped itself."""
    return line.rstrip("\r\n").replace("\\\\", "").endswith("\\")


def scan_env(text, names):
    # type: (str, Container[str]) -> Iterator[Tuple[str, str, str, str, str]]
    """The parts of a .env TEXT: each its prefix, name, comment, line end, and all of it.

    A part is a line, or an assignment with all the lines of its value; what backslashes
    join to a value of NAMES belongs to it. The prefix is indentation and `export `; the
    name is empty where the part assigns nothing.
    """
    at = 0
    while at < len(text):
        start = at
        match = next(re.compile(ENV_PART).finditer(text, start))
        prefix, name, comment, ending = match.groups("")
        at = match.end()
        is_named = name in names and not comment
        while is_named and joins_next_line(match.group()) and at < len(text):
            match = next(re.compile(LINE).finditer(text, at))
            ending = match.group(1)
            at = match.end()
        yield prefix, name, comment, ending, text[start:at]


def updated_env(text, values):
    # type: (str, Dict[str, str]) -> str
    """The .env TEXT with VALUES assigned where they stood, else at its end."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text[len(mark) :]
    lines = env_lines(values)
    missing = dict(lines)
    usual_end = usual_line_end(text)
    pieces = [mark]
    exports = set()
    line_above = ""  # empty where it is one of ours
    for prefix, name, comment, ending, part in scan_env(text, lines):
        if name:
            exports.add("export" in prefix)
        if name not in lines:
            pieces.append(part)
            line_above = part
            continue
        # it continues the line above, to a shell and to systemd
        is_joined = joins_next_line(line_above) and not line_above.lstrip().startswith("#")
        if not is_joined:
            missing.pop(name, None)
        if comment and not is_joined:  # Docker and systemd take it for part of the value
            indentation = prefix.partition("export")[0]
            pieces += [indentation, comment, usual_end]
        pieces += [prefix, lines[name], ending]
        line_above = ""
    export = "export " if exports == {True} else ""
    new_lines = [export + line for line in missing.values()]
    if missing and joins_next_line(line_above):  # a blank line ends what it continues
        new_lines.insert(0, "")
    if new_lines and text.endswith("\r") and usual_end != "\r":  # half of a line end
        pieces.append("\n")
    for line in new_lines:  # a last line end that is missing stays missing
        if not text or text.endswith(("\n", "\r")):
            pieces += [line, usual_end]
        else:
            pieces += [usual_end, line]
    return "".join(pieces)


# ==== terminal: data to stdout, words to stderr, questions where somebody can answer
BROWSER_TIMEOUT = 1.0
TEXT_BROWSERS = "www-browser links links2 elinks lynx w3m browsh".split()
MAX_KEY_BYTES = 64 * 1024
MAX_LINE = 4095  # all that a terminal hands over at once
MAX_TOLD = 4000  # characters of a line that is shown
MENU_LENGTH = 20


def open_controlling_terminal():
    # type: () -> Any
    with suppress(OSError):  # there is none
        return open("CONIN$" if WINDOWS else "/dev/tty")
    return None


def is_terminal(stream):
    # type: (Any) -> bool
    return stream is not None and not stream.closed and stream.isatty()


def wait_for_input(stream):
    # type: (Any) -> None
    """Make reads of STREAM wait for input; another program may have switched that off."""
    with suppress(AttributeError, OSError, ValueError):  # Windows; no descriptor
        os.set_blocking(stream.fileno(), True)


class Terminal:
    """The user's side. It remembers which secrets to mask and what it has warned of."""

    def __init__(self, process):
        # type: (Process) -> None
        self.process = process
        self.quiet = False
        self.secrets = set()  # type: Set[str]
        self.warned = set()  # type: Set[str]
        self.input = sys.stdin  # type: Any
        if process.program_on_stdin:
            self.input = open_controlling_terminal()

    def hide(self, secret):
        # type: (str) -> None
        """Mask SECRET in all output from now on."""
        if len(secret) >= 8:  # a shorter one would mask ordinary words
            self.secrets.add(secret)

    def write(self, text):
        # type: (str) -> None
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
            if WINDOWS and getattr(error, "errno", 0) == errno.EINVAL:
                raise BrokenPipeError from None  # as Windows has it
            raise Failure(f"standard output: {reason(error)}") from None

    def close(self):
        # type: () -> None
        """Close the controlling terminal, if that was opened."""
        if self.input not in (None, sys.stdin):
            self.input.close()

    def abandon(self, descriptor):
        # type: (int) -> None
        """Send what is still buffered nowhere, so that the interpreter exits quietly."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)

    def show(self, value, output, columns, noun=""):
        # type: (Any, str, str, str) -> None
        """Print a command's result; NOUN is what an empty list lacks."""
        text = without_passwords(output_text(value, output, columns))
        text = masked(text, self.secrets)
        if output == "yaml":  # where a bare * begins an alias
            text = re.sub(r"(?m)([:-] )(\*.*)$", r'\1"\2"', text)
        self.write(text)
        if value == []:
            self.say(f"no {noun} found")

    def write_error(self, text):
        # type: (str) -> None
        """Write TEXT to stderr; where that is closed or hung up, nobody is left to tell."""
        if sys.stderr is not None:  # else descriptor 2 may be anything by now
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):
                self.abandon(2)

    def tell(self, text):
        # type: (str) -> None
        """Print a line to stderr, masked; a key that was typed where none belongs, too."""
        line = masked(without_passwords(clean(text)), self.secrets)
        line = re.sub("(?i)llx-[a-z0-9_-]{14,}", MASK, line)
        self.write_error(f"{line[:MAX_TOLD]}\n")

    def say(self, text):
        # type: (str) -> None
        if not self.quiet:
            self.tell(text)

    def warn(self, text):
        # type: (str) -> None
        """Print a warning once."""
        if text not in self.warned:
            self.warned.add(text)
            self.tell(f"warning: {text}")

    def can_ask(self):
        # type: () -> bool
        """Whether somebody can answer a question."""
        is_ci = (self.process.get("CI") or "no").lower() not in "false 0 no off".split()
        if is_ci or self.process.get("TERM") == "dumb":
            return False
        return is_terminal(self.input) and is_terminal(sys.stderr)

    def ask(self, question):
        # type: (str) -> str
        """One line from the user, typed after the question appeared.

        Raises KeyboardInterrupt at Ctrl-C, Ctrl-D and a hang-up.
        """
        catch_signals()
        wait_for_input(self.input)
        with suppress(ImportError):  # Windows
            import termios

            with suppress(OSError, ValueError, termios.error):  # it hung up
                termios.tcflush(self.input.fileno(), termios.TCIFLUSH)
        self.write_error(masked(clean(question), self.secrets))
        line = b""
        with suppress(OSError):  # a hang-up
            line = self.input.buffer.readline()  # bytes, whatever the locale
        if not line.endswith(b"\n"):
            raise KeyboardInterrupt
        return str(line, "utf-8", "replace").strip()

    def confirm(self, question):
        # type: (str) -> None
        """Ask before what cannot be undone, where somebody can; raises Failure at no."""
        if self.can_ask() and self.ask(f"{question} [y/N] ").lower() not in ("y", "yes"):
            raise Failure("nothing was deleted")

    def ask_hidden(self, question):
        # type: (str) -> str
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
            raise misuse("this terminal cannot hide what is typed") from None
        except UnicodeDecodeError:  # which would quote it; getpass has not ended the line
            self.write_error("\n")
            raise misuse("what was typed is not text") from None

    def choose(self, name, choices, flag, current=None):
        # type: (str, Choices, str, Optional[str]) -> str
        """Let the user pick one of CHOICES, a NAME; raises Failure where none can be asked.

        FLAG is what chooses without asking. CURRENT stands for an empty answer.
        """
        if not self.can_ask():
            raise misuse(f"no {name} given; choose one with {flag}: {listed(choices)}")
        labels = dict(choices)
        question = f"{name.capitalize()}, by number or name: "
        if current in labels:
            question = f"{name.capitalize()}, by number or name [{labels[current]}]: "
        shown = choices
        self.show_menu(shown, current)
        while True:
            answer = self.ask(question)
            if not answer and current in labels:
                return str(current)
            matches = find_choices(answer, shown[:MENU_LENGTH], choices)
            if len(matches) == 1:
                return matches[0]
            if matches:
                shown = [choice for choice in choices if choice[0] in matches]
            self.show_menu(shown, current)
            if not matches:
                word = answer or "an empty answer"
                count = len(shown[:MENU_LENGTH])
                self.tell(f"{word} is not on the list (1 to {count})")

    def show_menu(self, choices, current):
        # type: (Choices, Optional[str]) -> None
        for number, (value, label) in enumerate(choices[:MENU_LENGTH], 1):
            mark = "*" if value == current else " "
            name = label if label == value else f"{label} ({value})"
            self.tell(f"{mark} {number:3}  {name}")
        if len(choices) > MENU_LENGTH:
            self.tell(
                f"       and {len(choices) - MENU_LENGTH} more; type a part of the name"
            )

    def countdown(self, expires_at):
        # type: (float) -> Wait
        """A way to wait that shows the time left until EXPIRES_AT (monotonic seconds)."""
        is_shown = is_terminal(sys.stderr) and not self.quiet
        if self.process.get("TERM") == "dumb":
            is_shown = False

        def wait(seconds):
            # type: (float) -> None
            """Wait for so many SECONDS, and show each."""
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if is_shown:
                    left = max(0, int(expires_at - time.monotonic()))
                    self.write_error(f"\rwaiting, {left // 60}:{left % 60:02} left ")
                # by the second: a Ctrl-C just before a sleep is seen only after it
                time.sleep(max(0.0, min(1.0, end - time.monotonic())))
            if is_shown:
                self.write_error("\r                      \r")

        return wait

    def open_browser(self, url):
        # type: (str) -> None
        """Open URL where a graphical browser is plausible; say nothing if there is none."""
        get = self.process.get
        is_remote = get("SSH_CONNECTION") or get("SSH_TTY") or get("SSH_CLIENT")
        has_display = WINDOWS or MACOS or get("DISPLAY") or get("WAYLAND_DISPLAY")
        if is_remote or not has_display:
            return
        import threading
        import webbrowser

        def start_browser():
            # type: () -> None
            with suppress(webbrowser.Error, OSError, ValueError):
                browser = webbrowser.get()
                program = str(getattr(browser, "name", ""))
                if os.path.basename(program) not in TEXT_BROWSERS:
                    browser.open(url)

        thread = threading.Thread(target=start_browser, daemon=True)
        with suppress(RuntimeError):  # the system allows no more threads
            thread.start()
            thread.join(BROWSER_TIMEOUT)  # some browsers return only when they are closed

    def read_stdin(self):
        # type: () -> str
        """The key that stdin holds."""
        if self.process.program_on_stdin:
            raise misuse(
                "standard input holds the program, so it cannot hold the key as well",
                "llamactl auth token --api-key-file PATH --project ID",
            )
        require(sys.stdin is not None, "standard input is closed", code=EXIT_USAGE)
        wait_for_input(sys.stdin)
        try:
            return decoded_key(sys.stdin.buffer.read(MAX_KEY_BYTES))
        except OSError as error:
            raise Failure(f"standard input cannot be read: {reason(error)}") from None


# ==== disk: whose file it is, private folders, a lock, atomic replacement
LOCK_TIMEOUT = 10.0
MAX_STARS = 6
MAX_HOLD = 60.0  # how old a lock file may get where the system has no locks
RENAME_TIMEOUT = 1.0
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0)  # Windows would write other line ends
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # so that no FIFO holds us up
FOLDER = getattr(os, "O_PATH", 0) | getattr(os, "O_DIRECTORY", 0) | NO_FOLLOW
ACL = "system.posix_acl_access"
MODELESS = "(9p|cifs|drvfs|exfat|fuseblk|msdos|ntfs3|smb3|vfat) "  # file systems
IMPORTED_LATER = """email.utils encodings.idna encodings.utf_8_sig fcntl ipaddress select
shlex signal sqlite3 ssl threading traceback urllib.request"""
INJECT_TO_STDOUT = "llamactl auth inject --env-file -"
NO_NEW_FILE = (errno.EACCES, errno.EPERM, errno.EROFS)  # how a folder refuses one
NO_RENAME = (errno.EBUSY, errno.EXDEV)  # how a file that is mounted refuses to be replaced
F_FULLFSYNC = 51  # as macOS has it
UNSUPPORTED = (  # how a file system says that it has no locks, or cannot sync
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
)


@contextmanager
def naming_path(path, verb, hint=""):
    # type: (str, str, str) -> Iterator[None]
    """Turn the operating system's errors into a Failure that names PATH, or its lock."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter where a path is no text
        name = str(getattr(error, "filename", ""))
        if name.startswith(f"{os.path.basename(path)}."):
            path = join(dirname(path), name)
        raise Failure(f"{path} cannot be {verb}: {reason(error)}", hint) from None


def user_name(uid):
    # type: (int) -> str
    with suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(uid).pw_name
    return f"uid {uid}"


def belongs_to(path, status, hint=""):
    # type: (str, os.stat_result, str) -> Failure
    """The refusal to use a file of somebody else's."""
    return Failure(f"{path} belongs to {user_name(status.st_uid)}", hint)


def is_ours(status):
    # type: (os.stat_result) -> bool
    """Whether a file is ours or root's, or of group 0 where that is our own primary group.

    The last is how OpenShift runs a container: with a random uid, and group 0.
    """
    if WINDOWS or status.st_uid in (0, os.geteuid()):
        return True
    return os.geteuid() != 0 and os.getegid() == status.st_gid == 0


def has_acl(target):
    # type: (Union[int, str]) -> bool
    """Whether an open file or a path has an ACL; its group bits then are the ACL's mask."""
    with suppress(OSError, AttributeError):
        return ACL in os.listxattr(target)
    return False


def bits_of_others(target, bits):
    # type: (Union[int, str], int) -> int
    """Which of the permission BITS (0o044 to read, 0o022 to write) others have.

    TARGET is an open file or a path. The bits of the group count unless it is root's or
    has our own number, as a private group has.
    """
    if WINDOWS:
        return 0
    status = os.stat(target)
    if status.st_gid in (0, os.geteuid()) and not has_acl(target):
        bits &= 0o007
    return status.st_mode & bits


def can_chmod(descriptor):
    # type: (int) -> bool
    """Whether chmod changes anything: not on a read-only file system, nor without modes."""
    if os.statvfs(descriptor).f_flag & getattr(os, "ST_RDONLY", 1):
        return False
    device = os.fstat(descriptor).st_dev
    line = rf"(?m)^\d+ \d+ {os.major(device)}:{os.minor(device)} .* - {MODELESS}"
    mounts = ""
    with suppress(OSError), open("/proc/self/mountinfo", errors="replace") as file:
        mounts = file.read()
    return not re.search(line, mounts)


def warn_if_open(descriptor, path, bits, fix, warn):
    # type: (int, str, int, str, Warn) -> None
    """Warn where others have one of the permission BITS of an open file or folder PATH.

    `chmod FIX` removes it. In a sticky folder of root's nobody can touch what is another's.
    """
    with suppress(OSError):
        status = os.fstat(descriptor)
        is_closed = status.st_mode & stat.S_ISVTX and status.st_uid == 0
        found = bits_of_others(descriptor, bits)
        if found and not is_closed and can_chmod(descriptor):
            verb = "write to" if found & 0o022 else "read"
            warn(f"others can {verb} {path}; run: chmod {fix} {shell_quoted(path)}")


def user_to_become(trail, is_allowed, hint):
    # type: (Sequence[Tuple[str, os.stat_result]], bool, str) -> Optional[int]
    """The one user to whom all on the TRAIL belongs that is not ours; None where all is.

    Raises Failure for two users, unless IS_ALLOWED, and where we are not root; for a link
    that a user put into somebody else's folder as well.
    """
    strangers = [(path, status) for path, status in trail if not is_ours(status)]
    if not strangers:
        return None
    for (path, status), (_, folder) in zip(trail, trail[1:]):
        is_link = stat.S_ISLNK(status.st_mode) and not is_ours(status)
        if is_link and folder.st_uid != status.st_uid:
            raise belongs_to(path, status, hint)
    uids = {status.st_uid for _, status in strangers}
    if len(uids) > 1 or not is_allowed or os.geteuid() != 0:
        raise belongs_to(*strangers[0], hint=hint)
    return uids.pop()


@contextmanager
def acting_as(uid, path, hint):
    # type: (Optional[int], str, str) -> Iterator[None]
    """Have the effective ids of the user UID, and no other groups: the kernel then decides.

    Only root can. PATH is what belongs to that user; None changes nothing.
    """
    if uid is None:
        yield
        return
    for module in IMPORTED_LATER.split():  # from files that the user may not read
        with suppress(ImportError):
            __import__(module)
    groups = os.getgroups()
    gid = os.getegid()
    user_gid = uid
    with suppress(ImportError, KeyError):
        import pwd

        user_gid = pwd.getpwuid(uid).pw_gid
    try:
        try:
            os.setgroups([])
            os.setegid(user_gid)
            os.seteuid(uid)
        except OSError as error:
            message = f"{path} belongs to {user_name(uid)}, whom root cannot become"
            raise Failure(f"{message}: {reason(error)}", hint) from None
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        with suppress(OSError):  # as at the start
            os.setgroups(groups)


def set_mode(descriptor, mode):
    # type: (int, int) -> None
    """Set the permissions of an open file, where its file system keeps any."""
    if not WINDOWS:
        with suppress(OSError):
            os.fchmod(descriptor, mode)


def copy_attributes(source, target):
    # type: (int, int) -> bool
    """Give the file TARGET the ACL and the other extended attributes of SOURCE.

    Returns whether the ACL is the same now; a folder may have given TARGET one of its own.
    """
    is_same = True
    with suppress(OSError, AttributeError):  # a system without attributes
        names = os.listxattr(source)
        if has_acl(target):
            os.removexattr(target, ACL)
        for name in names:
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError:  # some belong to the system alone
                is_same = is_same and name != ACL
    return is_same


def copy_access(source, target):
    # type: (int, int) -> None
    """Give the file TARGET owner, group, mode and attributes of SOURCE; raises OSError.

    Only root gives a file away, and must. Where the group or the ACL cannot be kept,
    nobody gains access.
    """
    status = os.fstat(source)
    mode = stat.S_IMODE(status.st_mode)
    if os.geteuid() == 0 and os.fstat(target).st_uid != status.st_uid:
        os.fchown(target, status.st_uid, status.st_gid)
    with suppress(OSError):
        os.fchown(target, -1, status.st_gid)
    is_same = copy_attributes(source, target)
    if not is_same or os.fstat(target).st_gid != status.st_gid:
        mode &= 0o700 | (mode >> 3 & 0o007)
    set_mode(target, mode)


def write_and_sync(descriptor, content):
    # type: (int, bytes) -> None
    """Write CONTENT to an open file, and have it reach the drive; raises OSError."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    try:
        os.fsync(descriptor)
        if MACOS:  # whose fsync may stop at the drive's cache
            import fcntl

            with suppress(OSError):  # not every file system can
                fcntl.fcntl(descriptor, F_FULLFSYNC)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def retried(action):
    # type: (Callable[[], Any]) -> Any
    """What ACTION returns; on Windows it waits for whoever has the file open."""
    end = time.monotonic() + RENAME_TIMEOUT
    while True:
        try:
            return action()
        except PermissionError:
            if not WINDOWS or time.monotonic() > end:
                raise
            time.sleep(LOCK_PAUSE)


class Place:
    """Where a file is: in a folder that stays open, so that nobody can put another there.

    `trail` holds what decides where the path leads: each link, each folder that holds one,
    and the folder of the file. `missing` are the folders to make, and the file. Names of
    other files in the folder are given by what follows the name of the file.
    """

    def __init__(self, path, prefix, warn):
        # type: (str, str, Warn) -> None
        """PREFIX begins what follows the name in those of the lock and the successor."""
        self.path = realpath(path) if WINDOWS else abspath(path)  # every link followed
        self.name = self.path
        self.warn = warn
        self.lock = f"{prefix}lock"
        self.new = f"{prefix}new"
        self.word = ""  # in a lock file that stands in for a lock
        self.is_exposed = False  # whether others can read the successor, for want of modes
        self.folder = None  # type: Optional[int]
        self.trail = []  # type: List[Tuple[str, os.stat_result]]
        self.missing = []  # type: List[str]
        if not WINDOWS:
            try:
                self._walk(self.path.split(os.sep))
            except BaseException:
                self.close()
                raise

    def _walk(self, parts):
        # type: (List[str]) -> None
        """Open the folder that PARTS lead to from the root, one after the other."""
        here = os.sep
        self.folder = os.open(here, FOLDER)
        count = 0
        while parts:
            self.name = parts.pop(0) or "."
            self.path = abspath(join(here, self.name))
            try:
                status = self.status()
            except FileNotFoundError:
                self.missing = [self.name] + [part for part in parts if part]
                self.path = join(here, *self.missing)
                break
            if stat.S_ISLNK(status.st_mode):
                target = os.readlink(self.name, dir_fd=self.folder)
                if not os.path.samestat(status, self.status()) or count == 40:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                count += 1
                self.trail += [(self.path, status), (here, os.fstat(self.folder))]
                parts = target.split(os.sep) + parts
                if isabs(target):
                    here = os.sep
                    self._enter(here)
            elif parts:
                here = self.path
                self._enter(self.name)
        self.trail.append((here, os.fstat(self.folder)))

    def _enter(self, name):
        # type: (str) -> None
        below = os.open(name, FOLDER, dir_fd=self.folder)
        self.close()
        self.folder = below

    def close(self):
        # type: () -> None
        if self.folder is not None:
            os.close(self.folder)
            self.folder = None

    def status(self, suffix=""):
        # type: (str) -> os.stat_result
        return os.stat(self.name + suffix, dir_fd=self.folder, follow_symlinks=WINDOWS)

    def open(self, suffix, flags):
        # type: (str, int) -> int
        if len(self.missing) > 1:  # `name` is a folder, which others may make now
            raise FileNotFoundError
        flags |= NO_FOLLOW | NO_WAIT | BINARY
        return os.open(self.name + suffix, flags, 0o600, dir_fd=self.folder)

    @contextmanager
    def opened(self, mode, suffix=""):
        # type: (str, str) -> Iterator[Any]
        """The file, or that with the SUFFIX; Failure if it is not regular; raises OSError.

        The built-in `open` hands the suffix to the method, which knows the folder.
        """
        with retried(lambda: open(suffix, mode, buffering=0, opener=self.open)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Failure(f"{self.path + suffix} is not a regular file")
            yield file

    def read(self, check=None):
        # type: (Optional[Check]) -> Optional[Snapshot]
        """The content of the file, None where there is none; raises OSError and Failure.

        CHECK raises Failure for an open file that must not be read.
        """
        try:
            with self.opened("rb") as file:
                descriptor = file.fileno()
                if check:
                    check(descriptor)
                bits = bits_of_others(descriptor, 0o066)
                return Snapshot(file.read(), os.fstat(descriptor), bits)
        except FileNotFoundError:
            return None

    @contextmanager
    def opened_folder(self):
        # type: () -> Iterator[int]
        """The folder of the file, to look into it; raises OSError."""
        if len(self.missing) > 1:
            raise FileNotFoundError
        descriptor = os.open(".", os.O_RDONLY, dir_fd=self.folder)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def names(self):
        # type: () -> List[str]
        """What lies beside the file; raises OSError."""
        if WINDOWS:
            return os.listdir(dirname(self.path))
        with self.opened_folder() as folder:
            return os.listdir(folder)

    def remove(self, suffix):
        # type: (str) -> None
        with suppress(FileNotFoundError):
            os.unlink(self.name + suffix, dir_fd=self.folder)

    def rename(self, suffix, target):
        # type: (str, str) -> None
        os.replace(
            self.name + suffix,
            self.name + target,
            src_dir_fd=self.folder,
            dst_dir_fd=self.folder,
        )

    def make_folders(self):
        # type: () -> None
        """Make the folders that are missing, 0700 whatever the umask; raises OSError."""
        if WINDOWS:
            os.makedirs(dirname(self.path), exist_ok=True)
        while len(self.missing) > 1:
            name = self.missing.pop(0)
            umask = os.umask(0o077)
            with suppress(FileExistsError):  # another process was first
                os.mkdir(name, 0o700, dir_fd=self.folder)
            os.umask(umask)
            self._enter(name)
            self.name = self.missing[0]

    def write_new(self, content, like=None):
        # type: (bytes, Optional[int]) -> None
        """Write the successor of the file, 0600 or as the open file LIKE is."""
        self.remove(self.new)
        with self.opened("xb", self.new) as file:
            descriptor = file.fileno()
            if like is None or WINDOWS:
                set_mode(descriptor, 0o600)
            else:
                copy_access(like, descriptor)
            if bits_of_others(descriptor, 0o044):
                self.is_exposed = not can_chmod(descriptor)
            write_and_sync(descriptor, content)

    def is_held(self):
        # type: () -> bool
        """Whether the lock file is ours: another process may believe us dead."""
        with suppress(FileNotFoundError), self.opened("rb", f"{self.lock}ed") as file:
            return bool(file.read(99) == self.word.encode("ascii"))
        return False

    def check_held(self):
        # type: () -> None
        """Raise Failure if another process took over what stands in for our lock."""
        if self.word and not self.is_held():
            raise Failure(f"another process took over {self.path + self.lock}ed")

    def put_new(self):
        # type: () -> None
        """Put the successor in the file's place in one step; raises OSError and Failure."""
        self.check_held()
        retried(lambda: self.rename(self.new, ""))
        with suppress(OSError), self.opened_folder() as folder:
            os.fsync(folder)  # so that a power cut leaves it; not every system can


def try_lock(descriptor):
    # type: (int) -> bool
    """Take the kernel's exclusive lock, which ends with the descriptor or the process."""
    try:
        if WINDOWS:
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        raise OSError(errno.ENOLCK, "this Python has no file locks") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def check_lock(place, descriptor, hint):
    # type: (Place, int, str) -> None
    """Make the open lock file private; raises Failure if it is not ours."""
    status = os.fstat(descriptor)
    if not is_ours(status):
        raise belongs_to(place.path + place.lock, status, hint)
    if status.st_nlink == 1:  # not of a hard link to another file
        set_mode(descriptor, 0o600)


def age(place, suffix):
    # type: (Place, str) -> float
    """How old a file is by the clock of its file system: a file made now tells."""
    now = f"{place.lock}.{place.word}.now"
    os.close(place.open(now, os.O_CREAT | os.O_WRONLY))
    try:
        return place.status(now).st_mtime - place.status(suffix).st_mtime
    finally:
        place.remove(now)


def take_over_if_old(place, held):
    # type: (Place, str) -> None
    """Remove the lock file HELD if its holder must have died."""
    aside = f"{held}.{place.word}"
    with suppress(FileNotFoundError):  # another process was faster
        if age(place, held) > MAX_HOLD:
            place.rename(held, aside)
            if age(place, aside) < MAX_HOLD:  # of one that was faster
                place.rename(aside, held)
            place.remove(aside)


def pause(end, message):
    # type: (float, str) -> None
    """Let others work for a moment; from END on, by the monotonic clock, a Failure."""
    require(time.monotonic() < end, message)
    time.sleep(LOCK_PAUSE)


def wait_for_lock_file(place, end):
    # type: (Place, float) -> None
    """Make a lock file with a random word in it; one that is too old is taken over."""
    place.word = os.urandom(8).hex()
    held = f"{place.lock}ed"
    while True:
        try:
            with place.opened("xb", held) as file:
                try:
                    write_and_sync(file.fileno(), place.word.encode("ascii"))
                except BaseException:
                    place.remove(held)
                    raise
            break
        except FileExistsError:
            take_over_if_old(place, held)
            pause(end, f"{place.path + held} is held by another process")
    name = os.path.basename(place.path)
    for each in place.names():  # of holders that died
        if each.startswith(f"{name}{place.new}."):
            place.remove(each[len(name) :])
    place.new = f"{place.new}.{place.word}"


def wait_for_lock(place, hint):
    # type: (Place, str) -> int
    """A descriptor that holds the lock; raises OSError, after 10 s Failure."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        descriptor = place.open(place.lock, os.O_RDWR | os.O_CREAT)
        is_held = False
        try:
            check_lock(place, descriptor, hint)
            while not try_lock(descriptor):
                pause(end, f"{place.path + place.lock} is locked by another process")
            with suppress(FileNotFoundError):  # its last holder removed it
                is_held = os.path.samestat(place.status(place.lock), os.fstat(descriptor))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            place.warn(
                f"{dirname(place.path)} does not support file locks; "
                "using a lock file instead"
            )
            wait_for_lock_file(place, end)
            is_held = True
        finally:
            if not is_held:
                os.close(descriptor)
        if is_held:
            return descriptor


def remove_lock(place):
    # type: (Place) -> None
    with suppress(PermissionError):  # on Windows another process has it open
        place.remove(place.lock)


def remove_lock_file(place):
    # type: (Place) -> None
    """Remove what stands in for a lock, unless another process took it over."""
    if place.word and place.is_held():
        place.remove(f"{place.lock}ed")


@contextmanager
def exclusive(place, hint, keep=True):
    # type: (Place, str, bool) -> Iterator[None]
    """Hold the lock of PLACE, and KEEP its file; remove the successor at the end.

    HINT is the command to try where the lock file is not ours.
    """
    catch_signals()
    with ExitStack() as stack:
        stack.callback(remove_lock_file, place)
        descriptor = wait_for_lock(place, hint)
        if WINDOWS and not keep:  # which removes nothing that is open
            stack.callback(remove_lock, place)
        stack.callback(os.close, descriptor)
        if not WINDOWS and not keep:
            stack.callback(remove_lock, place)
        stack.callback(place.remove, place.new)
        yield


def read_key_file(path):
    # type: (str) -> str
    """The key in the file PATH, which may be a pipe."""
    with naming_path(path, "read"), open(path, "rb") as file:
        return decoded_key(file.read(MAX_KEY_BYTES))


def warn_of_modeless(place):
    # type: (Place) -> None
    """Warn where others can read the successor, and no chmod can change that."""
    if place.is_exposed:
        place.warn(f"others can read {place.path}: its file system has no permissions")


def write_successor(place, edit, check, allowed):
    # type: (Place, Callable[[bytes], bytes], Check, int) -> None
    """Write what EDIT makes of the file beside it, with its owner and mode.

    ALLOWED is how others could use the file before. Raises OSError, and Failure if a file
    that is more open has taken its place.
    """
    try:
        with place.opened("rb") as file:
            descriptor = file.fileno()
            check(descriptor)
            if bits_of_others(descriptor, 0o066) & ~allowed:
                raise Failure(f"others put another file in the place of {place.path}")
            warn_if_open(descriptor, place.path, 0o066, "600", place.warn)
            place.write_new(edit(file.read()), descriptor)
    except FileNotFoundError:
        place.write_new(edit(b""))


def write_in_place(place, edit, seen):
    # type: (Place, Callable[[bytes], bytes], os.stat_result) -> None
    """Rewrite the file, which must be the one that was SEEN and have no other name.

    What needs more room is written first, so that a full disk damages nothing.
    """
    with place.opened("rb+") as file:
        descriptor = file.fileno()
        status = os.fstat(descriptor)
        if not os.path.samestat(status, seen) or status.st_nlink != 1:
            raise Failure(
                f"{place.path} was replaced during the update, or has another hard link"
            )
        warn_if_open(descriptor, place.path, 0o066, "600", place.warn)
        place.warn(
            f"{place.path} is written in place: a crash during the write would corrupt it"
        )
        before = file.read()
        after = edit(before)
        size = len(before)
        try:
            write_and_sync(descriptor, after[size:])
            file.seek(0)
            write_and_sync(descriptor, after)
            size = len(after)
        finally:
            file.truncate(size)


def rewrite_checked(place, edit, check, is_foreign):
    # type: (Place, Callable[[bytes], bytes], Check, bool) -> bool
    """Replace the file by what EDIT makes of it; False where that changes nothing.

    CHECK raises Failure for a file that must not be written to. IS_FOREIGN says that
    another user owns a part of the path: nothing is written in place then. Raises OSError.
    """
    before = place.read(check)
    if before and edit(before.content) == before.content:
        return False
    place.make_folders()
    refusals = NO_NEW_FILE  # type: Tuple[int, ...]
    try:
        with exclusive(place, INJECT_TO_STDOUT, keep=False):
            write_successor(place, edit, check, before.bits if before else 0)
            warn_of_modeless(place)
            refusals = NO_RENAME
            place.put_new()
    except OSError as error:
        if before is None or is_foreign or error.errno not in refusals:
            raise
        write_in_place(place, edit, before.status)
    return True


def first_lines(path):
    # type: (str) -> List[str]
    """The lines in the first 64 KiB of a file; none where it cannot be read at once."""

    def open_at_once(name, flags):
        # type: (str, int) -> int
        return os.open(name, flags | NO_WAIT | NO_FOLLOW)

    with suppress(OSError), open(path, "rb", opener=open_at_once) as file:
        content = file.read(MAX_KEY_BYTES) or b""
        return content.decode("utf-8", "replace").splitlines()
    return []


def is_ignored(pattern, parts):
    # type: (str, List[str]) -> bool
    """Whether a line of a .gitignore names the path PARTS, or a folder on it."""
    from fnmatch import fnmatch

    # a comment is no pattern; many stars take old versions of fnmatch exponential time
    if pattern.startswith("#") or pattern.count("*") > MAX_STARS:
        return False
    names = parts[:-1] if pattern.endswith("/") else parts
    pattern = re.sub(r"^\*\*/|/$", "", pattern)
    if "/" in pattern:
        names = ["/".join(names[:count]) for count in range(1, len(names) + 1)]
    with suppress(re.error):  # a reversed range, before Python 3.10
        return any(fnmatch(name, pattern.lstrip("/")) for name in names)
    return False


def is_unignored(path):
    # type: (str) -> bool
    """Whether PATH is in a git work tree whose .gitignore files do not name it."""
    folder = abspath(path)
    parts = []  # type: List[str]
    while folder != dirname(folder):
        folder, name = os.path.split(folder)
        parts.insert(0, name)
        for ignore in (".gitignore", ".git/info/exclude"):
            for line in reversed(first_lines(join(folder, ignore))):  # the last one decides
                if is_ignored(line.strip().lstrip("!"), parts):
                    return line.startswith("!")
        if exists(join(folder, ".git")):
            return True
    return False


def rewrite_file(path, edit, is_explicit, warn):
    # type: (str, Callable[[bytes], bytes], bool, Warn) -> Tuple[bool, str]
    """Replace the file PATH by what EDIT makes of it, but never another user's file.

    IS_EXPLICIT says that PATH was given, not the default: root then writes as the owner
    of the folder, or in a folder of its own into anybody's file. Returns whether anything
    changed, and what to call the file. Raises OSError and Failure.
    """
    with closing(Place(path, ".llamactl-", warn)) as place:
        is_root = not WINDOWS and os.geteuid() == 0
        is_foreign = not all(is_ours(status) for _, status in place.trail)
        trail = place.trail
        hint = INJECT_TO_STDOUT
        if not is_root:
            trail = [each for each in trail if stat.S_ISLNK(each[1].st_mode)]
        elif not is_explicit:
            hint = f"llamactl auth inject --env-file {shell_quoted(abspath(path))}"
        owner = user_to_become(trail, is_explicit, hint)
        any_owner = is_root and is_explicit and not is_foreign
        any_owner = any_owner and not bits_of_others(trail[-1][0], 0o022)

        def check(descriptor):
            # type: (int) -> None
            status = os.fstat(descriptor)
            is_right = is_ours(status) if owner is None else status.st_uid == owner
            if not is_right and not any_owner:
                raise belongs_to(path, status, hint)
            if is_foreign and (status.st_nlink > 1 or bits_of_others(descriptor, 0o044)):
                raise Failure(
                    f"others can read {path}, or it has another hard link", INJECT_TO_STDOUT
                )

        with acting_as(owner, place.path, hint):
            changed = rewrite_checked(place, edit, check, is_foreign)
        label = path if place.path == abspath(path) else f"{path} (a link to {place.path})"
        uid = place.status().st_uid
        if is_root and uid != 0:
            label += f", owned by {user_name(uid)}"
        return changed, label


# ==== store: profiles.json, the shape of its records and their check
STORE_NAME = "profiles.json"
HINT_FOLDER = f"{SET} {VAR_FOLDER}=PATH"
HINT_OWNER = f"run llamactl as that user, or {HINT_FOLDER}"
STORE_VERSION = 1
DAMAGED = ".damaged-"
OFFICIAL_STORE = "profiles.db"
# each record of profiles.json with its fields and their kinds: `?` may be null or missing,
# `*` is an object that has any number of the kind
SHAPES = {
    "store": "version=int current_environment=text? environments=environment*",
    "environment": "current_profile=text? profiles=profile* login=login?",
    "login": """provider=provider? device_code=text expires_at=number interval=number
        user_code=text verification_uri=text verification_uri_complete=text?""",
    "profile": """auth_type=text provider=provider? api_key=text? api_key_id=text?
        project_id=text? project_name=text? org_id=text? issuer=text? sub=text? email=text?
        access_token=text? access_expires_at=number? refresh_token=text?""",
    "provider": "issuer=text client_id=text token_endpoint=text revocation_endpoint=text?",
}


def has_shape(value, kind):
    # type: (Any, str) -> bool
    """Whether VALUE, which comes from JSON, is of the KIND; SHAPES has those of objects."""
    if kind.endswith("?"):
        return value is None or has_shape(value, kind[:-1])
    if kind == "number":
        return is_number(value)
    if kind == "int":
        return type(value) is int
    if kind == "text":
        return isinstance(value, str)
    if not isinstance(value, dict):
        return False
    if kind.endswith("*"):
        return all(has_shape(each, kind[:-1]) for each in value.values())
    fields = [each.split("=") for each in SHAPES[kind].split()]
    return all(has_shape(value.get(name), each) for name, each in fields)


def is_store(data):
    # type: (Any) -> TypeGuard[StoreData]
    return has_shape(data, "store")


def serialized_store(data):
    # type: (StoreData) -> bytes
    return json.dumps(data, indent=1, allow_nan=False).encode("ascii") + b"\n"


def new_store():
    # type: () -> StoreData
    return {"version": STORE_VERSION, "current_environment": None, "environments": {}}


def current_url(data):
    # type: (StoreData) -> str
    return data.get("current_environment") or DEFAULT_API_URL


def new_environment():
    # type: () -> Environment
    return {"requires_auth": True, "current_profile": None, "profiles": {}}


def get_environment(data, api_url):
    # type: (StoreData, str) -> Environment
    """What is stored of API_URL; an environment without profiles where nothing is."""
    return data["environments"].get(api_url) or new_environment()


def asks_for_key(environment):
    # type: (Environment) -> bool
    """Whether its server asks for a key; one of which nothing is known does."""
    return environment.get("requires_auth", True)


def add_environment(data, api_url):
    # type: (StoreData, str) -> Environment
    """What is stored of API_URL, to be changed, stored from now on if it was not."""
    return data["environments"].setdefault(api_url, new_environment())


class Store:
    """profiles.json: the environments, each with its profiles and its current one."""

    _place: Place  # while it is open
    path: str  # from then on, with every link followed

    def __init__(self, folder, warn):
        # type: (Optional[str], Warn) -> None
        self.folder = folder or ""
        self.warn = warn
        self.official_path = join(self.folder or os.sep, OFFICIAL_STORE)

    def load(self):
        # type: () -> StoreData
        if not self.folder:
            return new_store()
        with self.opened("read"):
            data = self._read()
            self._tighten_or_warn(is_change=False)
            return data

    @contextmanager
    def opened(self, verb, hint=HINT_FOLDER):
        # type: (str, str) -> Iterator[None]
        """Open the store's place, to work there as ourselves or, as root, as its owner.

        Raises Failure where a part of it belongs to anybody else.
        """
        require(self.folder, "there is no home directory to keep profiles in", HINT_FOLDER)
        path = join(self.folder, STORE_NAME)
        with naming_path(path, verb, hint), closing(Place(path, ".", self.warn)) as place:
            self._place = place
            self.path = place.path
            owner = user_to_become(place.trail, True, HINT_OWNER)
            if owner is not None:
                name = user_name(owner)
                self.warn(
                    f"{dirname(place.path)} belongs to {name}; working there as {name}"
                )
            with acting_as(owner, place.path, HINT_FOLDER):
                self._refuse_strangers(place, owner)
                yield

    def _refuse_strangers(self, place, owner):
        # type: (Place, Optional[int]) -> None
        """Raise Failure for a file or lock that is neither ours nor root's.

        Where root acts as OWNER, a link of that user's must not lead to root's either.
        """
        links = [
            path
            for path, status in place.trail
            if stat.S_ISLNK(status.st_mode) and status.st_uid == owner
        ]
        statuses = [place.trail[-1][1]] if links else []
        for suffix in ("", place.lock):
            with suppress(FileNotFoundError):
                statuses.append(place.status(suffix))
        for status in statuses:
            if not is_ours(status):
                raise belongs_to(self.path, status, HINT_OWNER)
            if links and status.st_uid != owner:
                raise Failure(f"{links[0]} points to a file of {user_name(status.st_uid)}")

    def _check_owner(self, descriptor):
        # type: (int) -> None
        status = os.fstat(descriptor)
        if not is_ours(status):
            raise belongs_to(self.path, status, HINT_OWNER)

    def _read(self):
        # type: () -> StoreData
        """The content, an empty store's where there is none; raises OSError and Failure."""
        snapshot = self._place.read(self._check_owner)
        if snapshot is None:
            return new_store()
        data = parse_object(snapshot.content) or {}  # type: Any
        version = data.get("version")
        if type(version) is int and version > STORE_VERSION:
            raise Failure(
                f"{self.path} was written by a newer llamactl.py and is left alone"
            )
        if not is_store(data):
            raise Damaged(
                f"{self.path} is damaged; the next change moves it aside", HINT_LOGIN
            )
        return data

    def _tighten_or_warn(self, is_change):
        # type: (bool) -> None
        """Warn where others can write to the folder, or use a file of ours.

        Before a change that file becomes private, where its file system has modes.
        """
        if WINDOWS:
            return
        with suppress(OSError), self._place.opened_folder() as folder:
            warn_if_open(folder, dirname(self.path), 0o022, "go-w", self.warn)
        with suppress(OSError), self._place.opened("rb") as file:
            descriptor = file.fileno()
            if os.fstat(descriptor).st_uid == os.geteuid():
                if is_change:
                    set_mode(descriptor, 0o600)
                warn_if_open(descriptor, self.path, 0o066, "600", self.warn)

    @contextmanager
    def change(self):
        # type: () -> Iterator[StoreData]
        """Lock the store, yield its content, and write what the caller made of it."""
        with self.opened("changed"):
            self._place.read(self._check_owner)
            self._place.make_folders()
            with exclusive(self._place, HINT_OWNER):
                data = self._read_for_change()
                yield data
                self.save(data)

    def _read_for_change(self):
        # type: () -> StoreData
        """The content of a file that is private from now on, or moved aside if damaged."""
        self._tighten_or_warn(is_change=True)
        try:
            data = self._read()
            serialized_store(data)
        except (Damaged, RecursionError, ValueError):  # or it cannot be written again
            self._move_aside()
            return self._read_for_change()
        return data

    def save(self, data):
        # type: (StoreData) -> None
        """Write DATA unless the file says the same; for whoever holds the lock."""
        if data != self._read():
            self._place.write_new(serialized_store(data))
            warn_of_modeless(self._place)
            self._place.put_new()

    def check_writable(self):
        # type: () -> StoreData
        """The content, after proof that the file can be replaced: it may be mounted."""
        with self.change() as data:
            snapshot = self._place.read()
            content = snapshot.content if snapshot else serialized_store(data)
            self._place.write_new(content)
            if snapshot:
                self._place.put_new()
        return data

    def _move_aside(self):
        # type: () -> None
        """Rename the file, which is damaged, if it is ours."""
        if not WINDOWS and self._place.status().st_uid != os.geteuid():
            raise Failure(f"{self.path} is damaged, and not ours to move aside")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder, name = os.path.split(self.path)
        aside = free_name(f"{name}{DAMAGED}{stamp}", self._place.names())
        self._place.check_held()
        self._place.rename("", aside[len(name) :])
        self.warn(f"{self.path} was damaged; it is kept as {join(folder, aside)}")

    def damaged_copies(self):
        # type: () -> List[str]
        """What was moved aside; the folder itself where that cannot be known."""
        folder = dirname(self.path)
        try:
            return [join(folder, name) for name in os.listdir(folder) if DAMAGED in name]
        except OSError:
            return [folder]


# ==== http: the one place that sends anything; urllib and ssl live here
MAX_ANSWER = 8 * 1024 * 1024  # bytes
MAX_REDIRECTS = 5
MAX_RETRY_AFTER = 30.0
FIRST_TRY = 1.0  # for each address of a host that has several
UNROUTABLE = (
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.EACCES,
    errno.EPERM,
)
# where Linux systems, the BSDs and macOS keep theirs
CA_BUNDLES = """/etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt
/etc/ssl/ca-bundle.pem /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem
/etc/ssl/cert.pem /usr/local/share/certs/ca-root-nss.crt""".split()
# what a form or an answer may hold that must never be shown
SECRET_FIELDS = """access_token refresh_token id_token device_code token
redacted_api_key""".split()


def first_text(answer, *names):
    # type: (Json, *str) -> Optional[str]
    """The first of NAMES that is a text in ANSWER and not empty; None where none is."""
    for name in names:
        text = answer.get(name)
        if text and isinstance(text, str):
            return text
    return None


class Answer(AnswerValues):
    """A server's whole answer."""

    def is_web_page(self):
        # type: () -> bool
        return self.body.lstrip().startswith(b"<")

    def json(self):
        # type: () -> Json
        """The object in the body; raises Unreachable where there is none."""
        if self.is_web_page():
            raise Unreachable(
                f"{self.url} returned a web page; is a portal in the way, or is it the "
                "web console?"
            )
        value = parse_object(self.body)
        if value is None:
            raise Unreachable(f"{self.url} sent no JSON object")
        return value

    def is_failing(self):
        # type: () -> bool
        """Whether the server failed, or had no time."""
        return self.status in (408, 429) or self.status >= 500

    def require_success(self):
        # type: () -> Answer
        """This answer, if its status is 2xx; raises Unreachable or Refused."""
        if 200 <= self.status < 300:
            return self
        message = f"{self.url} answered {self.status}{self.explanation()}"
        if self.is_failing():
            raise Unreachable(message, FAILING)
        refused = Refused(message, self.status)
        if self.status == 401:
            refused.hint = HINT_LOGIN
            refused.code = EXIT_REJECTED
        refused.is_sure = parse_object(self.body) is not None
        raise refused

    def explanation(self):
        # type: () -> str
        """The server's error (RFC 6749 §5.2) or `detail` (FastAPI), and the request id."""
        body = parse_object(self.body) or {}
        detail = body.get("detail")
        if isinstance(detail, list):
            body["detail"] = "; ".join(
                str(each.get("msg")) for each in detail if isinstance(each, dict)
            )
        text = " with a web page" if self.is_web_page() else ""
        for name in ("error", "error_description", "detail"):
            words = first_text(body, name)
            if words:
                text += f": {shortened(words)}"
        get = self.headers.get
        request_id = get("x-request-id") or get("x-correlation-id")
        if request_id:
            text += f" (request {shortened(request_id)})"
        return text


def trusted_url(url, api_url):
    # type: (Any, str) -> str
    """URL, which a server of the environment API_URL named, if secrets may go there.

    That is https, or http where the environment is http, on this machine if it is.
    """
    require_usable(isinstance(url, str), f"{api_url} named no URL where one belongs")
    if not origin_of(url).startswith("https:"):
        if not api_url.startswith("http:"):
            raise Failure(f"the server named a URL that is not https: {shortened(url)}")
        if is_loopback(api_url) and not is_loopback(origin_of(url)):
            raise Failure(f"the server named a URL beyond this machine: {shortened(url)}")
    return str(url)


def without_nulls(values):
    # type: (Json) -> Json
    return {name: value for name, value in values.items() if value is not None}


def endpoint(base, path, *names, **query):
    # type: (str, str, *str, **Optional[str]) -> str
    """The URL of PATH, then NAMES, each one segment, then what is not None of QUERY."""
    from urllib.parse import quote, urlencode

    require({".", ".."}.isdisjoint(names), "a name cannot consist of dots alone")
    url = base + path
    for name in names:
        url += "/" + quote(name, safe="", errors="replace")
    given = without_nulls(query)
    if given:
        url += "?" + urlencode(given, errors="replace")
    return url


def find_ca_bundle(process):
    # type: (Process) -> CaBundle
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
        if path and isdir(path):
            return CaBundle(None, path, variable)
        if path:
            return CaBundle(path, None, variable)
    own = ssl.get_default_verify_paths()
    has_folder = False
    with suppress(OSError):
        has_folder = bool(own.capath and os.listdir(own.capath))
    if own.cafile or has_folder or WINDOWS:
        return CaBundle(None, None, own.cafile or own.capath or "the system's store")
    for path in CA_BUNDLES:
        if exists(path):
            return CaBundle(path, None, "search")
    return CaBundle(None, None, "none found")


def tls_context(process):
    # type: (Process) -> ssl.SSLContext
    """What checks a server's certificate; raises Failure."""
    try:
        import ssl
    except ImportError:
        raise Failure("this Python has no ssl module, so it cannot use https") from None
    file, folder, source = find_ca_bundle(process)
    place = file or folder or "OpenSSL's store"
    with naming_path(f"{place} (from {source})", "trusted"):
        # not create_default_context(), which obeys SSLKEYLOGFILE
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if file or folder:
            context.load_verify_locations(file, folder)
        else:
            context.load_default_certs()
    if hasattr(context, "minimum_version"):
        # a policy may ask more
        context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        with suppress(AttributeError):  # an OpenSSL that cannot be told
            context.hostname_checks_common_name = False
    else:  # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def is_exempt(host, port, no_proxy):
    # type: (str, int, str) -> bool
    """Whether the list NO_PROXY names HOST.

    An entry is `*`, a host or a suffix (with `.` or `*.` in front, or without), perhaps
    with a port, an address or a CIDR block.
    """
    from ipaddress import ip_address, ip_network

    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name = re.sub(rf"^(\[.*\]|[^:]*):{port}$", r"\1", entry)
        suffix = name.lstrip("*.")
        if name == "*" or (suffix and f".{host}".endswith(f".{suffix}")):
            return True
        with suppress(ValueError):  # a name
            if ip_address(host.strip("[]")) in ip_network(name.strip("[]"), strict=False):
                return True
    return False


def find_proxy(process, url, is_offline=False):
    # type: (Process, str, bool) -> Optional[Proxy]
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
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    source = next(filter(process.get, names), "the system's settings")
    if source not in names and not is_offline and proxy_bypass(host):
        return None
    kind, _, place = address.rpartition("://")
    shown = f"http://{place.rpartition('@')[2]}"
    hint = f"{SET} {scheme}_proxy=http://HOST:PORT"
    if kind.lower() not in ("", "http"):
        message = f"{source} names a proxy of the kind {kind}://, which is not supported"
        raise Failure(message, hint)
    try:
        split_url(shown, "/.*")
    except ValueError:
        raise Failure(f"{source} is not a valid proxy address", hint) from None
    return Proxy(f"http://{place}", shown, source)


def connect(address, timeout, _=None):
    # type: (Tuple[str, int], float, Any) -> Any
    """A connection to a host; an address that is silent does not hold up the next one."""
    import socket

    count = len(socket.getaddrinfo(*address, 0, socket.SOCK_STREAM))
    connection = None
    if count > 1:
        with suppress(OSError):  # the second try tells
            first_try = min(FIRST_TRY, timeout / count / 2)
            connection = socket.create_connection(address, first_try)
    connection = connection or socket.create_connection(address, timeout / count)
    connection.settimeout(timeout)
    return connection


def new_handler(process, on_first_byte):
    # type: (Process, Callable[[], None]) -> Any
    """What urllib sends by: http and https alone; ON_FIRST_BYTE is told of each answer."""
    import http.client
    from urllib.request import HTTPHandler

    class Response(http.client.HTTPResponse):
        def begin(self):
            # type: () -> None
            if self.fp.peek(1):
                on_first_byte()
            super().begin()
            while 101 < self.status < 200:  # RFC 9110 §15.2: the answer is still to come
                self.headers = None  # type: ignore[assignment]
                super().begin()

    def new_connection(host, kind=http.client.HTTPConnection, **options):
        # type: (str, Any, **Any) -> Any
        connection = kind(host, **options)
        connection.response_class = Response
        connection._create_connection = connect
        return connection

    class Handler(HTTPHandler):
        https_request = HTTPHandler.http_request

        def http_open(self, request):
            # type: (Request) -> Any
            return self.do_open(new_connection, request)

        def https_open(self, request):
            # type: (Request) -> Any
            context = tls_context(process)  # which says so where Python has no ssl
            kind = http.client.HTTPSConnection
            return self.do_open(new_connection, request, kind=kind, context=context)

    return Handler()


def fetch(request, process, proxy, on_first_byte):
    # type: (Request, Process, Optional[Proxy], Callable[[], None]) -> Answer
    """The whole answer to REQUEST.

    Raises what urllib, http.client, ssl and sockets raise, and Unreachable.
    """
    from http.client import IncompleteRead
    from urllib.request import OpenerDirector, ProxyHandler

    url = request.full_url.partition("?")[0]
    opener = OpenerDirector()  # as it is, it knows no file, ftp or data, and no redirects
    opener.add_handler(ProxyHandler({request.type: proxy.url} if proxy else {}))
    opener.add_handler(new_handler(process, on_first_byte))
    body = bytearray()
    with opener.open(request, timeout=process.timeout(PAUSE_TIMEOUT)) as response:
        # one read of all would keep each chunk apart
        for piece in iter(lambda: response.read(65536), b""):
            body += piece
            require_usable(
                len(body) <= MAX_ANSWER, f"{url} sent more than {MAX_ANSWER >> 20} MiB"
            )
    if response.length:
        raise IncompleteRead(b"", response.length)
    if proxy and response.status == 407:
        raise OSError("Tunnel connection failed: 407")  # as http.client has it for https
    return Answer(response.status, response.headers, bytes(body), url)


def tls_failure(error, origin, has_begun):
    # type: (Exception, str, bool) -> Unreachable
    """What ssl raised: a failed handshake, or a connection that broke off."""
    if has_begun or "EOF" in type(error).__name__:
        return Unreachable(f"{origin}: the connection broke off", BROKEN_OFF)
    cause = getattr(error, "reason", "") or "the certificate is not valid here"
    words = getattr(error, "verify_message", "") or cause  # not on Python 3.6
    hint = f"{SET} SSL_CERT_FILE=PATH" if cause == "CERTIFICATE_VERIFY_FAILED" else ""
    if words == "WRONG_VERSION_NUMBER":
        words = "the server does not use TLS"
        if is_loopback(origin):  # elsewhere somebody in between may say so
            hint = f"llamactl environments add http{origin[5:]}"
    return Unreachable(f"{origin}: TLS failed: {words}", UNUSABLE, hint)


def network_failure(error, place, has_begun):
    # type: (Exception, str, bool) -> Unreachable
    """What urllib, http.client, ssl or a socket raised, in words that quote no request.

    PLACE is where the request went. HAS_BEGUN says whether a first byte came back.
    """
    from http.client import HTTPException, IncompleteRead
    from socket import gaierror, timeout

    cause = getattr(error, "reason", error)  # urllib wraps what a socket raised
    if not isinstance(cause, Exception):  # ssl's own errors have a text there
        cause = error
    tunnel = re.match("Tunnel connection failed: ([0-9]+)", str(cause))
    if tunnel:
        status = tunnel.group(1)
        stage = BROKEN_OFF if status >= "5" else UNUSABLE
        return Unreachable(f"{place}: the proxy answered {status}", stage)
    if "ssl" in type(cause).__module__:  # _ssl, on PyPy _cffi_ssl
        return tls_failure(cause, place, has_begun)
    for kinds, words, stage in (  # the first that fits
        ((gaierror, UnicodeError), "no such host", NOT_CONNECTED),
        (ConnectionRefusedError, "connection refused", NOT_CONNECTED),
        (timeout, "timed out waiting for data", SLOW if has_begun else SILENT),
        ((ConnectionError, IncompleteRead), "the connection broke off", BROKEN_OFF),
        ((HTTPException, ValueError), "the answer is not HTTP", UNUSABLE),
    ):  # type: Any, str, str
        if isinstance(cause, kinds):
            return Unreachable(f"{place}: {words}", stage)
    if getattr(cause, "errno", None) in UNROUTABLE:
        return Unreachable(f"{place}: no route to host", NOT_CONNECTED)
    return Unreachable(f"{place}: {reason(cause)}", BROKEN_OFF)


def retry_after(answer, default, now):
    # type: (Answer, float, float) -> float
    """How long ANSWER asks to wait, in seconds or by a date (RFC 9110 §10.2.3)."""
    from email.utils import parsedate_to_datetime

    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with suppress(TypeError, ValueError, IndexError, OverflowError):  # no date
        return max(default, parsedate_to_datetime(text).timestamp() - now)
    return default


def wait_in_steps(event, end):
    # type: (threading.Event, float) -> bool
    """Whether EVENT comes before END (monotonic); Windows sees Ctrl-C only in between."""
    while not event.wait(min(0.5, end - time.monotonic())):
        if time.monotonic() >= end:
            return False
    return True


class Client(ClientValues):
    """Sends every request; the secrets in it and in its answer are hidden from then on."""

    def within(self, seconds):
        # type: (float) -> Client
        """This client, for requests that must all be done in so many seconds."""
        return self._replace(deadline=time.monotonic() + seconds)

    def post_form(self, url, form, once=False):
        # type: (str, Dict[str, str], bool) -> Answer
        """The answer to FORM, which is hidden with its secrets; ONCE forbids retries."""
        from urllib.parse import quote_plus, urlencode

        self.hide_fields(form)
        self.hide_fields({name: quote_plus(form[name], errors="replace") for name in form})
        body = urlencode(form, errors="replace").encode("ascii")
        answer = self.send(
            "POST", url, None, body, "application/x-www-form-urlencoded", once
        )
        self.hide_fields(parse_object(answer.body) or {})
        return answer

    def hide_fields(self, values):
        # type: (Json) -> None
        for name in SECRET_FIELDS:
            self.hide(str(values.get(name) or ""))

    def send(self, method, url, token=None, body=None, content_type="", once=False):
        # type: (str, str, Optional[str], Optional[bytes], str, bool) -> Answer
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
            with suppress(ValueError):  # no URL: it stays, and the loop runs out
                url = urljoin(url, answer.headers.get("Location") or "")
            if method != "GET" or origin_of(url) != origin_of(answer.url):
                raise Refused(
                    f"{answer.url} redirects to {shortened(url)}: refused", answer.status
                )
        raise Failure(f"{answer.url} redirects in a circle")

    def _send_with_retries(self, method, url, headers, body, once):
        # type: (str, str, Json, Optional[bytes], bool) -> Answer
        """One answer; a second try only where the server can't have acted on the first."""
        delays = () if once or self.deadline else RETRY_DELAYS
        started = time.monotonic()
        for delay in delays:
            pause = delay
            try:
                answer = self.send_once(method, url, headers, body)
                if method != "GET" or answer.status not in (429, 502, 503, 504):
                    return answer
                pause = retry_after(answer, delay, time.time())
                if pause > MAX_RETRY_AFTER:
                    return answer
            except Unreachable as failure:
                is_safe = failure.stage == NOT_CONNECTED
                if method == "GET" and failure.stage == BROKEN_OFF:
                    is_safe = True
                if not is_safe or time.monotonic() - started > ANSWER_TIMEOUT:
                    raise
            self.sleep(pause)
        return self.send_once(method, url, headers, body)

    def send_once(self, method, url, headers, body):
        # type: (str, str, Json, Optional[bytes]) -> Answer
        """Send one request and receive its whole answer in time; raises Failure.

        A thread does it, since no name look-up heeds a time-out.
        """
        import threading
        from urllib.request import Request

        proxy = find_proxy(self.process, url)
        place = origin_of(url)
        if proxy:
            place += f" by way of {proxy.address} (from {proxy.source})"
        has_begun = threading.Event()
        has_ended = threading.Event()
        answers = []  # type: List[Answer]
        failures = []  # type: List[Exception]

        def exchange():
            # type: () -> None
            """What the thread does; it hands over what it got."""
            try:
                request = Request(url, body, headers, method=method)  # noqa: S310
                answers.append(fetch(request, self.process, proxy, has_begun.set))
            except (Failure, ImportError, MemoryError) as error:
                failures.append(error)  # the thread that waits raises it
            except Exception as error:
                failures.append(network_failure(error, place, has_begun.is_set()))
            has_begun.set()
            has_ended.set()

        self._run_in_time(exchange, has_begun, has_ended, place)
        if failures:
            raise failures[0]
        return answers[0]

    def _run_in_time(self, exchange, has_begun, has_ended, place):
        # type: (Callable[[], None], threading.Event, threading.Event, str) -> None
        """Run EXCHANGE in a thread until it ends; raises Unreachable when time is up."""
        import threading

        patience = self.process.timeout(ANSWER_TIMEOUT)
        end = self.deadline or time.monotonic() + WHOLE_TIMEOUT + patience - ANSWER_TIMEOUT
        try:
            threading.Thread(target=exchange, daemon=True).start()
        except RuntimeError:  # the system allows no more of them
            exchange()
        if not wait_in_steps(has_begun, min(time.monotonic() + patience, end)):
            raise Unreachable(f"{place}: timed out waiting for an answer", SILENT)
        if not wait_in_steps(has_ended, end):
            raise Unreachable(f"{place}: timed out before the answer was complete", SLOW)


# ==== oauth: the device flow of RFC 8628, a login's tokens and the claims of its ID token
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DEVICE_SCOPE = "email offline_access openid profile"
MIN_INTERVAL = 0.001
MAX_BACKOFF = 30.0
CLOCK_LEEWAY = 120.0  # between the provider's clock and ours
PENDING = "authorization_pending"
REFUSALS = {  # RFC 8628 §3.5: the errors that end a login
    "access_denied": "the login was denied in the browser",
    "authorization_declined": "the login was denied in the browser",  # Entra's word
    "expired_token": "the code expired before it was approved",
}
POLL_ERRORS = {PENDING, "slow_down", *REFUSALS}


def read_text(answer, name):
    # type: (Json, str) -> str
    """The text NAME of a provider's ANSWER, which must have it."""
    text = first_text(answer, name)
    if text is None:
        raise Unreachable(f"the identity provider sent no usable '{name}'")
    return text


def checked_provider(provider, api_url):
    # type: (Provider, str) -> Provider
    """PROVIDER, if the environment API_URL allows secrets to go there; raises Failure."""
    trusted_url(provider["token_endpoint"], api_url)
    if provider.get("revocation_endpoint") is not None:
        trusted_url(provider["revocation_endpoint"], api_url)
    return provider


def stored_provider(provider, api_url):
    # type: (Optional[Provider], str) -> Provider
    """The PROVIDER that was stored with a login, checked again; raises Failure."""
    if not provider:
        raise Failure("the login was stored without its identity provider")
    return checked_provider(provider, api_url)


def read_configuration(client, api_url, discovery_url, client_id):
    # type: (Client, str, str, str) -> Tuple[Provider, str]
    """The provider's configuration (OpenID Connect Discovery §4) and device endpoint.

    Each URL in it must be as safe as API_URL. Raises Failure.
    """
    url = trusted_url(discovery_url, api_url)
    answer = client.send("GET", url).require_success().json()
    device_endpoint = answer.get("device_authorization_endpoint")
    if not device_endpoint:
        raise Failure("the identity provider has no device flow", HINT_TOKEN)
    provider = {
        "issuer": read_text(answer, "issuer"),
        "client_id": client_id,
        "token_endpoint": read_text(answer, "token_endpoint"),
        "revocation_endpoint": answer.get("revocation_endpoint") or None,
    }  # type: Provider
    return checked_provider(provider, api_url), trusted_url(device_endpoint, api_url)


def read_seconds(answer, name):
    # type: (Json, str) -> Optional[float]
    """The number NAME of a provider's ANSWER, perhaps as a string of digits, else None."""
    seconds = answer.get(name)  # type: Any
    if isinstance(seconds, str) and re.fullmatch("[0-9]{1,9}", seconds):
        seconds = int(seconds)
    return seconds if is_number(seconds, above=0) else None


def request_device_code(client, api_url, provider, device_endpoint, now):
    # type: (Client, str, Provider, str, float) -> WaitingLogin
    """Device authorization, RFC 8628 §3.1 and §3.2; NOW in seconds since 1970."""
    form = {"client_id": provider["client_id"], "scope": DEVICE_SCOPE}
    device = client.post_form(device_endpoint, form).require_success().json()
    expires_in = read_seconds(device, "expires_in")
    if not expires_in:
        raise Unreachable("the identity provider sent no usable 'expires_in'")
    interval = read_seconds(device, "interval") or DEFAULT_INTERVAL
    address = "verification_uri" if device.get("verification_uri") else "verification_url"
    complete = device.get("verification_uri_complete")
    return {
        "verification_uri": trusted_url(read_text(device, address), api_url),
        "verification_uri_complete": trusted_url(complete, api_url) if complete else None,
        "user_code": read_text(device, "user_code"),
        "expires_at": int(now + min(expires_in, ONE_DAY)),
        "interval": min(max(interval, MIN_INTERVAL), ONE_DAY),
        "device_code": read_text(device, "device_code"),
        "provider": provider,
    }


def oauth_error(answer):
    # type: (Answer) -> Optional[str]
    """The error of an answer (RFC 6749 §5.2), None where it has none or an empty one.

    Where a server fails, only what RFC 8628 §3.5 knows is the provider's word.
    """
    error = first_text(parse_object(answer.body) or {}, "error")
    if answer.is_failing() and error not in POLL_ERRORS:
        return None
    return error


def poll_for_tokens(poll, interval, expires_at, wait, clock, warn):
    # type: (Callable[[], Answer], float, float, Wait, Callable[[], float], Warn) -> Json
    """The token response, once the user has approved (RFC 8628 §3.4, §3.5).

    POLL sends the request once. INTERVAL is in seconds, EXPIRES_AT a time of CLOCK. What is
    no answer of the provider's, but a gateway's, is told and waited out. Raises Failure.
    """
    pause = interval
    trouble = None  # type: Optional[Failure]
    while True:
        wait(max(0.0, min(pause, expires_at - clock())))
        if clock() >= expires_at:
            raise trouble or Failure(REFUSALS["expired_token"], HINT_LOGIN, EXIT_REJECTED)
        try:
            answer = poll()
            error = oauth_error(answer)
            if error is None:
                return answer.require_success().json()
        except Failure as failure:
            if trouble is None:
                warn(f"{failure.message}; still waiting")
            trouble = failure
            pause = max(interval, min(pause * 2, MAX_BACKOFF))
            continue
        if error in REFUSALS:
            raise Failure(REFUSALS[error], HINT_LOGIN, EXIT_REJECTED)
        if error == "slow_down":
            interval += SLOW_DOWN  # RFC 8628 §3.5: for this and all later requests
        elif error != PENDING:
            raise Failure(f"the login failed{answer.explanation()}")
        pause = interval
        trouble = None


def read_tokens(answer, now):
    # type: (Json, float) -> Profile
    """What is stored of a token response (RFC 6749 §5.1); NOW in seconds since 1970."""
    access_token = read_text(answer, "access_token")
    require_usable(
        is_plain(access_token), "the identity provider sent an unusable access token"
    )
    expires_in = read_seconds(answer, "expires_in")
    tokens = {
        "access_token": access_token,
        "access_expires_at": now + expires_in if expires_in else None,  # a 401 will tell
    }  # type: Profile
    if answer.get("refresh_token"):  # RFC 6749 §6: else the old one stays
        tokens["refresh_token"] = read_text(answer, "refresh_token")
    return tokens


def read_claims(id_token):
    # type: (Any) -> Json
    """The claims of a JWT (RFC 7519 §7.2), its signature not checked; raises Failure."""
    from base64 import urlsafe_b64decode

    if id_token is None:
        raise Failure(
            "the identity provider sent no ID token; it must offer the scope openid"
        )
    claims = None
    with suppress(AttributeError, ValueError):  # no text, not three parts, not Base64
        _, payload, _ = id_token.split(".")
        # more padding than it needs is ignored
        claims = parse_object(urlsafe_b64decode(payload + "=="))
    if claims is None:
        raise Failure("the identity provider sent an ID token that is not a JWT")
    return claims


def is_same_issuer(issuer, claims):
    # type: (str, Json) -> bool
    """Whether CLAIMS come from ISSUER, one slash at its end and Entra's tenant aside."""
    tenant = claims.get("tid")
    if isinstance(tenant, str):
        issuer = issuer.replace("{tenantid}", tenant)
    claimed = claims.get("iss")
    return isinstance(claimed, str) and (
        claimed in (issuer, f"{issuer}/") or f"{claimed}/" == issuer
    )


def read_user(id_token, provider, now):
    # type: (Any, Provider, float) -> User
    """Who logged in: OpenID Connect Core §3.1.3.7 without item 6, the signature.

    The ID token came from the token endpoint itself, over TLS unless the environment is
    plain http, which that item lets stand in for the signature. It names the profile and
    tells a returning user, no more. NOW is in seconds since 1970. Raises Failure.
    """
    claims = read_claims(id_token)
    refused = "the ID token is refused:"
    if not is_same_issuer(provider["issuer"], claims):
        raise Failure(
            f"{refused} its issuer is {claims.get('iss')}, not {provider['issuer']}"
        )
    client_id = provider["client_id"]
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    if client_id not in audiences:
        raise Failure(f"{refused} its audience is {audience}, not {client_id}")
    party = claims.get("azp")
    if party not in (None, client_id):
        raise Failure(f"{refused} its authorized party is {party}, not {client_id}")
    expires_at = claims.get("exp")  # type: Any
    if not is_number(expires_at) or expires_at + CLOCK_LEEWAY < now:
        raise Failure(
            f"{refused} it expired at {expires_at}, and this machine's clock says {now:.0f}"
        )
    sub = first_text(claims, "sub")
    if sub is None:
        raise Failure(f"{refused} it names no user")
    known_as = first_text(claims, "email", "preferred_username", "upn")
    return User(claims["iss"].rstrip("/"), sub, known_as)


# ==== api: one function an endpoint, typed data out
API = "/api/v1beta1/deployments"
VERSION_PATH = "/api/v1beta1/deployments-public/version"
DISCOVERY_PATH = "/api/v1/auth/oidc/discovery"
ME_PATH = "/api/v1/auth/me"
KEYS_PATH = "/api/v1/api-keys"


def field(answer, name, kind, default=None):
    # type: (Json, str, Any, Any) -> Any
    """The member NAME of a server's ANSWER, DEFAULT where it is missing or null."""
    value = answer.get(name)
    if value is None:
        value = default
    # a flag is no number, although bool is a kind of int
    require_usable(type(value) is kind, f"the server's answer has no usable '{name}'")
    return value


def text_or_none(answer, *names):
    # type: (Json, *str) -> Optional[str]
    """The first of NAMES that is a text and not empty."""
    for name in names:
        text = field(answer, name, str, "")  # type: str
        if text:
            return text
    return None


def objects(answer, name):
    # type: (Json, str) -> List[Json]
    rows = field(answer, name, list)  # type: List[Json]
    is_right = all(isinstance(row, dict) for row in rows)
    require_usable(is_right, f"the server's '{name}' are not objects")
    return rows


STATUS_TEXTS = "git_sha apiserver_url project_id warning".split()


def deployment(row):
    # type: (Json) -> Json
    """A deployment as it is shown: what was asked for in `spec`, what is in `status`."""
    names = [name for name in field(row, "secret_names", list, []) if isinstance(name, str)]
    spec = {
        "repo_url": field(row, "repo_url", str, ""),
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
        "spec": without_nulls(spec),
        "status": {
            "phase": field(row, "status", str),
            **{name: text_or_none(row, name) for name in STATUS_TEXTS},
        },
    }


class ControlPlane(PlaneValues):
    """A control plane, and the API key or access token that it gets."""

    def send(self, method, path, *names, **query):
        # type: (str, str, *str, **Optional[str]) -> Answer
        url = endpoint(self.api_url, path, *names, **query)
        return self.client.send(method, url, self.token)

    def get(self, path, *names, **query):
        # type: (str, *str, **Optional[str]) -> Json
        return self.send("GET", path, *names, **query).require_success().json()

    def get_version(self):
        # type: () -> Tuple[bool, List[str]]
        """Whether it requires a login, and its capabilities."""
        answer = self._replace(token=None).get(VERSION_PATH)
        field(answer, "version", str)
        requires_auth = field(answer, "requires_auth", bool, False)
        return requires_auth, field(answer, "capabilities", list, [])

    def get_organizations(self):
        # type: () -> List[Json]
        return [
            {
                "org_id": field(row, "org_id", str),
                "org_name": field(row, "org_name", str),
                "is_default": field(row, "is_default", bool, False),
            }
            for row in objects(self.get(f"{API}/organizations"), "organizations")
        ]

    def get_projects(self, org_id=None):
        # type: (Optional[str]) -> List[Project]
        """All projects that the key can see; ORG_ID narrows."""
        answer = self.get(f"{API}/list-projects", org_id=org_id)
        projects = []
        for row in objects(answer, "projects"):
            project_id = field(row, "project_id", str)
            is_usable = is_plain(project_id) and project_id != self.token
            require_usable(is_usable, "the server's answer has no usable 'project_id'")
            project = Project(
                project_id,
                text_or_none(row, "project_name") or project_id,
                field(row, "deployment_count", int, 0),
                field(row, "org_id", str, "default"),
            )
            projects.append(project)
        return projects

    def get_deployments(self, project_id):
        # type: (Optional[str]) -> List[Json]
        answer = self.get(API, project_id=project_id)
        return [deployment(row) for row in objects(answer, "deployments")]

    def get_deployment(self, project_id, name):
        # type: (Optional[str], str) -> Json
        return deployment(self.get(API, name, project_id=project_id))

    def discover_provider(self):
        # type: () -> Tuple[Provider, str]
        """The identity provider that it names, and where to ask that for a code."""
        answer = self.send("GET", DISCOVERY_PATH)
        if answer.status in (400, 404, 501):
            raise Failure(
                f"{self.api_url} offers no browser login{answer.explanation()}", HINT_TOKEN
            )
        discovery = answer.require_success().json()
        clients = field(discovery, "client_ids", dict, {})  # type: Json
        client_id = clients.get("cli")  # type: Any
        if not client_id and len(clients) == 1:
            [client_id] = clients.values()
        if not is_plain(client_id):
            raise Failure(f"{self.api_url} names no OAuth client for llamactl", HINT_TOKEN)
        url = field(discovery, "discovery_url", str)
        return read_configuration(self.client, self.api_url, url, client_id)

    def is_key_gone(self):
        # type: () -> bool
        """Whether it says that the key does not work; False where it cannot say."""
        with suppress(Failure):
            answer = self.send("GET", ME_PATH)
            return answer.status == 401 and parse_object(answer.body) is not None
        return False

    def get_user(self):
        # type: () -> Optional[str]
        """Whom the key belongs to; None where it does not say."""
        with suppress(Failure):
            return text_or_none(self.get(ME_PATH), "email", "id")
        return None

    def create_key(self, title):
        # type: (str) -> Tuple[Optional[str], Optional[str]]
        """Make an API key; its id and the key itself, shown this once, None if unusable."""
        body = json.dumps({"name": title, "project_id": None}).encode("ascii")
        url = endpoint(self.api_url, KEYS_PATH)
        answer = self.client.send("POST", url, self.token, body, "application/json")
        created = answer.require_success().json()
        self.client.hide_fields(created)
        key = created.get("redacted_api_key")  # despite its name, the whole key
        return first_text(created, "id"), key if is_plain(key) else None

    def delete_key(self, key_id):
        # type: (str) -> None
        """Delete an API key; one that is gone counts as deleted. Raises Failure."""
        answer = self.send("DELETE", KEYS_PATH, key_id)
        if answer.status != 404 or parse_object(answer.body) is None:
            answer.require_success()
        if answer.is_web_page():  # a portal's
            answer.json()


# ==== credential: which key, URL and project a command uses, and where each came from
@contextmanager
def naming_variable(name):
    # type: (str) -> Iterator[None]
    """Have a Failure name the variable whose value is at fault."""
    try:
        yield
    except Failure as failure:
        failure.message = f"{name}: {failure.message}"
        failure.hint = f"set {name}=" if WINDOWS else f"unset {name}"
        raise


def credential_with_key(process, key, source, project):
    # type: (Process, str, str, Optional[str]) -> Credential
    """KEY, which SOURCE gave, with the URL and the project of the variables.

    PROJECT is that of the command line. Raises Failure.
    """
    api_url = process.get(VAR_API_URL)
    project_id = process.get(VAR_PROJECT)
    if project_id and not project:
        with naming_variable(VAR_PROJECT):
            require_plain(project_id, "the project id")
    sources = {
        "environment": VAR_API_URL if api_url else "default",
        "project_id": "--project" if project else VAR_PROJECT,
        "api_key": source,
    }
    with naming_variable(VAR_API_URL):
        api_url = normal_url(api_url or DEFAULT_API_URL)
    return Credential(api_url, key, project or project_id, None, {}, sources)


def credential_of_variables(process, project, warn):
    # type: (Process, Optional[str], Warn) -> Optional[Credential]
    """The credential in the variables, None where they hold no key; raises Failure.

    PROJECT is that of the command line. Without any project it is not a full credential.
    """
    key = process.get(VAR_API_KEY)
    path = process.get(VAR_KEY_FILE)
    if process.prefers_profile():
        return None
    if key and path:
        raise misuse(f"{VAR_API_KEY} and {VAR_KEY_FILE} exclude each other")
    if key or path:
        variable = VAR_KEY_FILE if path else VAR_API_KEY
        with naming_variable(variable):
            key = read_key_file(path) if path else clean_key(key or "")
        return credential_with_key(process, key, variable, project)
    for name in (VAR_PROJECT, VAR_API_URL):
        if process.get(name):
            warn(f"{name} is ignored, as {VAR_API_KEY} is not set")
    return None


def find_profile(data, api_url, name):
    # type: (StoreData, str, Optional[str]) -> Optional[str]
    """The name of the profile NAME, else of the current one of API_URL; raises Failure.

    None where no login is required there.
    """
    environment = get_environment(data, api_url)
    profiles = environment["profiles"]
    name = name or environment.get("current_profile")
    if name in profiles:
        return name
    if name:
        for url, other in data["environments"].items():
            if name in other["profiles"]:
                raise Failure(
                    f"profile {name} belongs to {url}, not to {api_url}",
                    f"llamactl environments use {shell_quoted(url)}",
                )
        known = listed([(each, each) for each in sorted(profiles)])
        raise Failure(
            f"{api_url} has no profile {quotable(name)}; available: {known}",
            "llamactl auth get" if profiles else HINT_LOGIN,
        )
    if not asks_for_key(environment):
        return None
    if profiles:
        raise Failure(
            f"no profile of {api_url} is current", "llamactl auth use NAME", EXIT_REJECTED
        )
    raise Failure(f"not logged in to {api_url}", HINT_LOGIN, EXIT_REJECTED)


def source_of_url(data):
    # type: (StoreData) -> str
    """What decides the current environment."""
    return "environments use" if data.get("current_environment") else "default"


def credential_of_profile(process, data, name, named_by, project):
    # type: (Process, StoreData, Optional[str], str, Optional[str]) -> Credential
    """The credential in the profile NAME, which NAMED_BY gave, else in the current one."""
    if not name:
        name = as_utf_8(process.get(VAR_PROFILE) or "")
        named_by = VAR_PROFILE if name else "auth use"
    api_url = current_url(data)
    with naming_variable(VAR_PROFILE) if named_by == VAR_PROFILE else ExitStack():
        found = find_profile(data, api_url, name)
    profile = get_environment(data, api_url)["profiles"][found] if found else {}
    key = profile.get("api_key")
    if key:
        require_plain(key, "the stored API key")
    sources = {
        "environment": source_of_url(data),
        "profile": named_by,
        "project_id": "--project" if project else "profile",
        "api_key": "profile",
    }
    return Credential(
        api_url, key or None, project or profile.get("project_id"), found, profile, sources
    )


def resolve_credential(process, store, name, named_by, project, needs_project):
    # type: (Process, Store, Optional[str], str, Optional[str], bool) -> Credential
    """What a command uses.

    The profile NAME, which NAMED_BY gave; else the variables, if they hold a key and a
    project; else the current profile; else a lone key in the variables, for commands that
    need no project. Raises Failure.
    """
    of_variables = None if name else credential_of_variables(process, project, store.warn)
    if not of_variables:
        return credential_of_profile(process, store.load(), name, named_by, project)
    variable = of_variables.sources["api_key"]
    unused = ""
    with suppress(Failure):  # variables never fail on the state of the store
        data = store.load()
        if get_environment(data, current_url(data))["profiles"]:
            unused = "a stored profile"
        of_profile = credential_of_profile(process, data, None, "", project)
        if of_profile.name:
            unused = f"profile {of_profile.name}"
            if not of_variables.project_id:
                store.warn(f"{variable} is ignored, as {VAR_PROJECT} is not set")
                return of_profile
    if needs_project and not of_variables.project_id:
        raise misuse(f"{variable} is set, but {VAR_PROJECT} is not")
    if unused:
        store.warn(
            f"{variable} is used at {of_variables.api_url} instead of {unused}; "
            f"set {VAR_USE_PROFILE}=1 to use profiles"
        )
    return of_variables


# ==== login: signing in with a key or by device, signing out, leaving nothing behind
# for what is requested while the store is locked: less than others wait for the lock
KEY_TIMEOUT = 5.0
REVOCATION_TIMEOUT = 3.0
NEXT_STEP = "next: llamactl auth inject, or llamactl auth exec -- COMMAND"
TOKEN_LEEWAY = 30.0  # an access token this close to its end is refreshed first


def choices_of(projects):
    # type: (Sequence[Project]) -> Choices
    return [(project.project_id, project.project_name) for project in projects]


def find_project(projects, wanted):
    # type: (Sequence[Project], str) -> Project
    """The project whose id is WANTED, else the one of that name, in any letter case."""
    found = [each for each in projects if each.project_id == wanted] or [
        each for each in projects if each.project_name.casefold() == wanted.casefold()
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise Failure(
            f"{len(found)} projects are called {wanted}: {listed(choices_of(found))}"
        )
    raise Failure(
        f"project {quotable(wanted)} not found; available: {listed(choices_of(projects))}"
    )


class App:
    """What every command works with."""

    def __init__(self, process, terminal, commands):
        # type: (Process, Terminal, Mapping[str, str]) -> None
        """COMMANDS are the words of each command and its options."""
        self.process = process
        self.terminal = terminal
        self.commands = commands
        self.say = terminal.say
        self.tell = terminal.tell
        self.warn = terminal.warn
        self.show = terminal.show
        self.store = Store(process.config_folder(), terminal.warn)
        self.client = Client(process, terminal.hide, terminal.warn, time.sleep, None)
        self.rejected_hint = HINT_LOGIN  # what helps where a server rejects the credential

    def credential(self, args, name=None, needs_project=True):
        # type: (Args, Optional[str], bool) -> Credential
        """What the command uses; NAME is the profile that its command line names."""
        if name and args.profile and name != args.profile:
            raise misuse("NAME and --profile name different profiles")
        named_by = "NAME" if name else "--profile"
        name = name or args.profile
        if not args.api_key_file:
            credential = resolve_credential(
                self.process, self.store, name, named_by, args.project, needs_project
            )
            return self.use(credential)
        if name:
            raise misuse("--api-key-file and a profile exclude each other")
        key = self.read_key(args.api_key_file)
        process = self.process
        if process.prefers_profile():
            process = process._replace(variables={})
        credential = credential_with_key(process, key, "--api-key-file", args.project)
        if credential.sources["environment"] == "default":  # no variable names one
            credential = credential._replace(api_url=current_url(self.store.load()))
        return self.use(credential)

    def use(self, credential):
        # type: (Credential) -> Credential
        """Hide the key of CREDENTIAL, and know what helps where it is rejected."""
        self.terminal.hide(credential.api_key or "")
        if not credential.api_key:  # the server may ask for one now
            url = shell_quoted(credential.api_url)
            self.rejected_hint = f"llamactl environments add {url}"
        elif not credential.name:
            self.rejected_hint = f"replace or unset {credential.sources['api_key']}"
        elif credential.profile["auth_type"] != OIDC:
            self.rejected_hint = f"{HINT_TOKEN} --name {shell_quoted(credential.name)}"
        return credential

    def credential_with_project(self, args, name=None):
        # type: (Args, Optional[str]) -> Credential
        """What the command uses, with the id of a project; raises Failure.

        A project of the command line that is not the profile's own is looked up.
        """
        credential = self.credential(args, name)
        if not credential.project_id:
            if not credential.name:
                raise misuse("no project given; use --project ID")
            raise misuse(
                f"profile {credential.name} has no project", "llamactl projects use ID"
            )
        if args.project in (None, credential.profile.get("project_id")):
            return credential
        try:
            projects = self.plane_of(credential).get_projects()
        except Unreachable as failure:
            if not is_uuid(credential.project_id):
                raise
            self.warn(f"project {credential.project_id} is unverified: {failure.message}")
            return credential
        return credential._replace(
            project_id=find_project(projects, args.project).project_id
        )

    def read_key(self, path):
        # type: (str) -> str
        """The key in the file PATH; - is stdin, or the prompt where somebody can type."""
        if path != "-":
            return read_key_file(path)
        if self.terminal.can_ask():
            return self.ask_key("API key: ")
        return self.terminal.read_stdin()

    def ask_key(self, question):
        # type: (str) -> str
        """A key that is typed, and not shown; raises Failure."""
        key = clean_key(self.terminal.ask_hidden(question))
        if len(key) >= MAX_LINE:
            raise misuse(f"a terminal takes {MAX_LINE} characters; use --api-key-file")
        return key

    def plane(self, api_url, key=None):
        # type: (str, Optional[str]) -> ControlPlane
        return ControlPlane(self.client, api_url, key)

    def plane_of(self, credential):
        # type: (Credential) -> ControlPlane
        return self.plane(credential.api_url, credential.api_key)

    def report(self, text):
        # type: (str) -> None
        """Say what changed in the store, and warn where commands will not use it."""
        self.say(text)
        get = self.process.get
        variable = VAR_API_KEY if get(VAR_API_KEY) else VAR_KEY_FILE
        if get(variable) and get(VAR_PROJECT) and not self.process.prefers_profile():
            self.warn(
                f"{variable} and {VAR_PROJECT} are set and win over profiles; "
                f"unset them or set {VAR_USE_PROFILE}=1"
            )
        elif get(VAR_PROFILE):
            self.warn(f"using profile {get(VAR_PROFILE)} (from {VAR_PROFILE})")


class Session:
    """A login at one control plane, whose tokens are refreshed where they expired."""

    def __init__(self, plane, profile, on_rotation=lambda: None):
        # type: (ControlPlane, Profile, Callable[[], None]) -> None
        """PROFILE is what is known of the login so far: its provider, tokens and API key.

        ON_ROTATION is called when a refresh has changed PROFILE, before the new access
        token is used: the provider ends a login whose old refresh token comes again.
        """
        self.plane = plane
        self.profile = profile
        self.on_rotation = on_rotation

    def signed_in(self):
        # type: () -> ControlPlane
        """The control plane, with an access token that has not expired."""
        expires_at = self.profile.get("access_expires_at")
        is_expired = expires_at is not None and expires_at - TOKEN_LEEWAY < time.time()
        if is_expired or not self.profile.get("access_token"):
            self.refresh()
        return self.plane._replace(token=self.profile.get("access_token") or "")

    def post_once(self, provider, url, **form):
        # type: (Provider, str, **str) -> Answer
        """The answer to FORM at this URL of the PROVIDER, without retries."""
        form["client_id"] = provider["client_id"]
        return self.plane.client.post_form(url, form, once=True)

    def refresh(self):
        # type: () -> None
        """RFC 6749 §6, sent once; nothing where no refresh token or provider is known."""
        refresh_token = self.profile.get("refresh_token")
        provider = self.profile.get("provider")
        if not refresh_token or not provider:
            return
        answer = self.post_once(
            provider,
            provider["token_endpoint"],
            grant_type="refresh_token",
            refresh_token=refresh_token,
        )
        self.profile.update(read_tokens(answer.require_success().json(), time.time()))
        self.on_rotation()

    def revoke(self):
        # type: () -> None
        """Revoke the refresh token (RFC 7009 §2.1), where the provider offers that."""
        provider = self.profile.get("provider")
        if not provider:
            return
        url = checked_provider(provider, self.plane.api_url).get("revocation_endpoint")
        token = self.profile.get("refresh_token")
        if url and token:
            self.post_once(
                provider,
                url,
                token=token,
                token_type_hint="refresh_token",  # noqa: S106 (a kind of token)
            ).require_success()


def check_sign_in(app, args):
    # type: (App, Args) -> Tuple[str, Environment]
    """The API URL that a new profile is for, and what is stored of it.

    Raises Failure before anything is sent or asked: for a name that no listing could
    carry, a time-out that is none, a store that cannot be written, a variable that names
    another server.
    """
    name = args.name or ""
    if name != clean(name).strip() or name.startswith("-"):
        raise misuse("--name must be printable and not start with a dash")
    app.process.timeout(ANSWER_TIMEOUT)
    data = app.store.check_writable()
    api_url = current_url(data)
    variable = app.process.get(VAR_API_URL)
    if variable and not app.process.prefers_profile():
        with naming_variable(VAR_API_URL):
            named_url = normal_url(variable)
        if named_url != api_url:
            raise misuse(
                f"{VAR_API_URL} is not the current environment, {api_url}",
                f"llamactl environments add {named_url}",
            )
    return api_url, get_environment(data, api_url)


def choose_project(app, projects, wanted, current=None, flag="--project"):
    # type: (App, List[Project], Optional[str], Optional[str], str) -> Project
    """The project WANTED, else the only one, else the one that the user picks."""
    require(projects, f"no project found; create one {WEB_CONSOLE}")
    if not wanted:
        if len(projects) == 1:
            return projects[0]
        wanted = app.terminal.choose("project", choices_of(projects), flag, current)
    return find_project(projects, wanted)


def project_fields(project):
    # type: (Optional[Project]) -> Profile
    """What is stored of the project of a profile."""
    return {
        "project_id": project and project.project_id,
        "project_name": project and project.project_name,
        "org_id": project and project.org_id,
    }


def project_label(profile):
    # type: (Profile) -> str
    """The project of PROFILE as people know it."""
    project_id = profile.get("project_id") or "none"
    name = profile.get("project_name")
    return f"{name} ({project_id})" if name and name != project_id else project_id


def given_key(app, args):
    # type: (App, Args) -> Optional[str]
    """The key that the command line holds or names; None where it does neither."""
    if args.api_key is None:
        return None if args.api_key_file is None else app.read_key(args.api_key_file)
    if args.api_key_file is not None:
        raise misuse("--api-key and --api-key-file exclude each other")
    return app.read_key("-") if args.api_key == "-" else clean_key(args.api_key)


REGIONS = {  # each with the other one
    DEFAULT_API_URL: "https://api.cloud.eu.llamaindex.ai",
    "https://api.cloud.eu.llamaindex.ai": DEFAULT_API_URL,
}


def verify_key(app, api_url, key, org_id):
    # type: (App, str, Optional[str], Optional[str]) -> List[Project]
    """The projects that KEY can see; raises Failure where the server rejects it."""
    try:
        return app.plane(api_url, key).get_projects(org_id)
    except Refused as refused:
        if refused.status == 403:
            if not refused.is_sure:  # a gateway's
                raise Unreachable(refused.message, FAILING) from None
            raise Failure(
                f"the API key is not allowed to list projects: {refused.message}",
                "llamactl auth token --no-verify --api-key-file PATH --project ID",
                EXIT_REJECTED,
            ) from None
        if refused.status != 401:
            raise
        message = f"the API key was rejected: {refused.message}"
        hint = f"create a key {WEB_CONSOLE}"
        if key is None:
            message = f"an API key is needed: {refused.message}"
            hint = f"llamactl environments add {shell_quoted(api_url)}"
        elif not key.startswith("llx-"):
            message += "; a LlamaCloud key begins with llx-"
        elif api_url in REGIONS:
            message += "; a key belongs to one region"
            hint = f"llamactl environments add {REGIONS[api_url]}"
        raise Failure(message, hint, EXIT_REJECTED) from None


def ask_for_key(app, api_url, org_id):
    # type: (App, str, Optional[str]) -> Tuple[str, List[Project]]
    """A key typed at the prompt, three times at most, and the projects that it can see."""
    if not app.terminal.can_ask():
        raise misuse(
            "no API key given, and no terminal to ask on; use --api-key-file (- is stdin)",
            "llamactl auth token --api-key-file PATH --project ID",
        )
    app.say(f"Create an API key {WEB_CONSOLE}.")
    tries = 3
    while True:
        tries -= 1
        try:
            key = app.ask_key(f"API key for {api_url}: ")
            return key, verify_key(app, api_url, key, org_id)
        except Failure as failure:
            if not tries or failure.code not in (EXIT_REJECTED, EXIT_USAGE):
                raise
            app.tell(f"{failure.message}; try again")


def refuse_name_of_login(environment, name):
    # type: (Environment, Optional[str]) -> None
    """Raise Failure where the profile NAME is a login."""
    profile = environment["profiles"].get(name or "")
    if profile and profile["auth_type"] == OIDC:
        raise Failure(
            f"profile {name} is a login", f"llamactl auth logout {shell_quoted(name or '')}"
        )


def store_key_profile(environment, profile, name):
    # type: (Environment, Profile, Optional[str]) -> str
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
        name = f"llx-{last_four(key) or 'key'}" if key else shell_safe(project_id or "")
        name = free_name(name or "no-auth", profiles)
    profiles[name] = profile
    environment["current_profile"] = name
    return name


def forget_waiting_login(app, api_url, waiting):
    # type: (App, str, WaitingLogin) -> None
    """Drop WAITING from the store, if it is what waits there."""
    with app.store.change() as data:
        environment = get_environment(data, api_url)
        if environment.get("login") == waiting:
            environment["login"] = None


def name_login(environment, user, wanted):
    # type: (Environment, User, Optional[str]) -> Tuple[str, Profile]
    """What to call USER's login, and the profile of theirs that has that name, if any.

    It is WANTED, else a name that they have, else a new one.
    """
    profiles = environment["profiles"]
    theirs = {
        each: profile
        for each, profile in profiles.items()
        if profile.get("sub") == user.sub
        and (profile.get("issuer") or "").rstrip("/") == user.issuer
    }  # type: Dict[Optional[str], Profile]
    if wanted and wanted not in theirs:
        refuse_name_of_login(environment, wanted)
    current = environment.get("current_profile")
    name = wanted or (current if current in theirs else next(iter(theirs), None))
    name = name or free_name(shell_safe(user.email or user.sub) or "login", profiles)
    return name, theirs.get(name, {})


def choose_project_of_login(app, args, session, current):
    # type: (App, Args, Session, Optional[str]) -> Tuple[Optional[Project], str]
    """The project of a login, or why it has none yet, which does not undo the login.

    Raises Failure where there is no project at all, in any organization.
    """
    projects = session.signed_in().get_projects(args.org)
    wanted = args.project
    if not wanted and not app.terminal.can_ask():
        wanted = current
    try:
        return choose_project(app, projects, wanted, current), ""
    except Failure as failure:
        if args.org:  # which may be mistyped
            projects = session.signed_in().get_projects()
        if not projects:
            raise
        kept = next((each for each in projects if each.project_id == current), None)
        return kept, failure.message


def make_key(app, session, name):
    # type: (App, Session, str) -> None
    """Make an API key for the profile NAME, which SESSION knows as soon as it came.

    Raises Failure, which names a key that may exist although it is not known here.
    """
    title = f"{name} llamactl on {app.process.host_name}"
    plane = session.signed_in()
    try:
        key_id, key = plane.create_key(title)
        require_usable(key_id, "the server returned an unusable API key")
    except (Refused, Unreachable) as failure:
        if failure.is_sure:
            raise
        raise Failure(
            f"{failure.message}; an API key named '{title}' may exist now",
            f"delete the key {WEB_CONSOLE}",
            failure.code,
        ) from None
    session.profile["api_key"] = key
    session.profile["api_key_id"] = key_id
    require(key, "the server returned an unusable API key", code=EXIT_UNREACHABLE)


def delete_own_key(app, session):
    # type: (App, Session) -> None
    """Delete the key that was made, if no profile will hold it; warn where that fails."""
    key_id = session.profile.get("api_key_id")
    try:
        if key_id:
            session.signed_in().delete_key(key_id)
    except Failure as failure:
        app.warn(f"API key {key_id} may still work: {failure.message}")


def revoke_or_warn(app, session):
    # type: (App, Session) -> None
    """Revoke a refresh token that no profile will hold; warn where that fails."""
    try:
        session.revoke()
    except Failure as failure:
        app.warn(f"the refresh token may still be valid: {failure.message}")


def abandon_login(app, session):
    # type: (App, Session) -> None
    """Leave nothing behind of a login that ends without a profile."""
    with uninterrupted(app.tell):
        delete_own_key(app, session)
        revoke_or_warn(app, session)


def wait_for_approval(app, session, provider, waiting):
    # type: (App, Session, Provider, WaitingLogin) -> Json
    """The token response of PROVIDER, once the user has approved; raises Failure.

    SESSION knows its refresh token as soon as it came. The waiting login is forgotten once
    it can no longer succeed.
    """
    left = min(waiting["expires_at"] - time.time(), ONE_DAY)
    if left < 0:  # the clock may have been set since: ask the provider once
        left = waiting["interval"] + 1
    expires_at = time.monotonic() + left

    def poll():
        # type: () -> Answer
        """One answer of the token endpoint; a refresh token in it is known at once."""
        with uninterrupted(app.tell):
            answer = session.post_once(
                provider,
                provider["token_endpoint"],
                grant_type=DEVICE_GRANT,
                device_code=waiting["device_code"],
            )
            token = first_text(parse_object(answer.body) or {}, "refresh_token")
            if token:
                session.profile["refresh_token"] = token
        return answer

    wait = app.terminal.countdown(expires_at)
    try:
        return poll_for_tokens(
            poll, waiting["interval"], expires_at, wait, time.monotonic, app.warn
        )
    except Failure as failure:
        is_final = not isinstance(failure, (Refused, Unreachable))
        if is_final or time.monotonic() >= expires_at:
            forget_waiting_login(app, session.plane.api_url, waiting)
        raise


def store_login(
    app,  # type: App
    session,  # type: Session
    user,  # type: User
    wanted,  # type: Optional[str]
    old_key,  # type: Optional[str]
    project,  # type: Optional[Project]
):
    # type: (...) -> Tuple[str, Profile, Profile]
    """Store a login and make it current; its name, its profile, and the one it replaces.

    Where that has another key than the OLD_KEY that was known before, another process was
    faster: its key stays, and a logout of the old key is respected. Raises Failure.
    """
    with app.store.change() as data:
        environment = add_environment(data, session.plane.api_url)
        name, replaced = name_login(environment, user, wanted)
        key_holder = replaced
        if "api_key" in session.profile and replaced.get("api_key") in (None, "", old_key):
            key_holder = session.profile
        if not key_holder.get("api_key"):
            raise Failure(f"profile {name} was deleted during the login; log in again")
        profile = {
            **session.profile,
            **project_fields(project),
            "auth_type": OIDC,
            "api_key": key_holder["api_key"],
            "api_key_id": key_holder.get("api_key_id"),
            "sub": user.sub,
            "issuer": user.issuer,
            "email": user.email,
        }  # type: Profile
        environment["profiles"][name] = profile
        environment["current_profile"] = name
    return name, profile, replaced


def finish_login(app, args, api_url, waiting):
    # type: (App, Args, str, WaitingLogin) -> None
    """Wait for the approval and make a profile of it; raises Failure.

    If anything fails before the profile is stored, its key is deleted, its token revoked.
    """
    provider = stored_provider(waiting.get("provider"), api_url)
    session = Session(app.plane(api_url), {"provider": provider})
    with ExitStack() as undo:
        undo.callback(abandon_login, app, session)
        answer = wait_for_approval(app, session, provider, waiting)
        forget_waiting_login(app, api_url, waiting)
        session.profile.update(read_tokens(answer, time.time()))
        user = read_user(answer.get("id_token"), provider, time.time())
        environment = get_environment(app.store.load(), api_url)
        name, known = name_login(environment, user, args.name)
        project, missing = choose_project_of_login(
            app, args, session, known.get("project_id")
        )
        key = known.get("api_key")
        with uninterrupted(app.tell):
            if not key or app.plane(api_url, key).is_key_gone():
                make_key(app, session, name)
            name, profile, replaced = store_login(
                app, session, user, args.name, key, project
            )
            undo.pop_all()
            if profile["api_key"] != session.profile.get("api_key"):
                delete_own_key(app, session)
            if replaced.get("refresh_token") != profile.get("refresh_token"):
                # at its own provider: the new one must not get it
                revoke_or_warn(app, Session(session.plane, replaced))
            person = user.email or name
            account = person if person == name else f"{person} (profile {name})"
            app.report(f"logged in as {account}, project {project_label(profile)}")
    if missing:
        raise misuse(missing, "llamactl projects use ID")
    app.say(NEXT_STEP)


def delete_key_of_login(session):
    # type: (Session) -> None
    """Delete the key with the login's access token, refreshed once if that is rejected."""
    key_id = session.profile.get("api_key_id") or ""
    require(key_id, "its id is not known")
    before = session.profile.get("access_token")
    plane = session.signed_in()
    try:
        plane.delete_key(key_id)
    except Refused as refused:
        if refused.status != 401 or plane.token != before:
            raise
        session.refresh()
        session.signed_in().delete_key(key_id)


def end_login(plane, profile, on_rotation, warn):
    # type: (ControlPlane, Profile, Callable[[], None], Warn) -> str
    """Delete a login's key and revoke its refresh token; a sentence on a key that may live.

    Each has a time of its own, so that the one does not use up the other's.
    """
    trouble = ""
    problem = ""
    try:
        stored_provider(profile.get("provider"), plane.api_url)
    except Failure as failure:
        profile["provider"] = None  # so that nothing is sent to it
        trouble = failure.message
    session = Session(
        plane._replace(client=plane.client.within(KEY_TIMEOUT)), profile, on_rotation
    )
    key = profile.get("api_key")
    try:
        delete_key_of_login(session)
    except Failure as failure:
        if not key or not session.plane._replace(token=key).is_key_gone():
            problem = (
                f"API key {profile.get('api_key_id') or '(id unknown)'} "
                f"(…{last_four(key or '')}) may still work: {trouble or failure.message}"
            )
    session.plane = plane._replace(client=plane.client.within(REVOCATION_TIMEOUT))
    try:
        require(not trouble, trouble)
        session.revoke()
    except Failure as failure:
        warn(f"the login's refresh token may still be valid: {failure.message}")
    return problem


def log_out(app, api_url, name, problems):
    # type: (App, str, str, List[str]) -> None
    """Forget a profile, whatever the server says; add to PROBLEMS what may still work."""
    # of several processes one refreshes the tokens, and the others find the profile gone
    with uninterrupted(app.tell), app.store.change() as data:
        environment = get_environment(data, api_url)
        profile = environment["profiles"].get(name)
        if profile and profile["auth_type"] == OIDC:

            def save():
                # type: () -> None
                with naming_path(app.store.path, "changed"):
                    app.store.save(data)

            problem = end_login(app.plane(api_url), profile, save, app.warn)
            if problem:
                problems.append(f"profile {name}: {problem}")
        environment["profiles"].pop(name, None)
        if environment.get("current_profile") == name:
            environment["current_profile"] = None


def log_out_each(app, places):
    # type: (App, Sequence[Tuple[str, str]]) -> str
    """Forget each (API URL, profile); what may still work, or nothing."""
    problems = []  # type: List[str]
    try:
        for api_url, name in places:
            log_out(app, api_url, name, problems)
            app.report(f"profile {name} deleted")
    except BaseException:  # a signal, say; the profiles are gone, and with them the ids
        for problem in problems:
            app.tell(f"error: {problem}")
        raise
    for path in app.store.damaged_copies():
        app.warn(f"{path} may still hold keys; delete it when you no longer need it")
    return "; ".join(problems)


# ==== takeover: the official client's profiles.db, read only; can be removed whole
def read_official(path):
    # type: (str) -> Dict[str, List[Json]]
    """The tables of the SQLite file PATH, opened for reading alone; raises Failure."""
    try:
        import sqlite3
    except ImportError:
        raise Failure(f"this Python has no sqlite3 module, which reads {path}") from None
    from urllib.parse import quote

    target = realpath(path)  # SQLite looks for its logs beside that one
    journal = f"{target}-journal"
    for each in (path, target, f"{target}-wal", f"{target}-shm", journal):
        with suppress(FileNotFoundError):
            status = os.lstat(each)
            if not is_ours(status):
                raise belongs_to(each, status)
    in_use = exists(f"{target}-shm")
    has_log = exists(f"{target}-wal")
    if (has_log and not in_use) or (exists(journal) and os.path.getsize(journal)):
        raise Failure(f"{target} was left by a crash; start the official client once")
    # immutable keeps SQLite from making files beside it; a log that is in use must be read
    options = "mode=ro" if in_use else "mode=ro&immutable=1"
    url = f"file:{quote(os.fsencode(target))}?{options}"
    try:
        with closing(sqlite3.connect(url, uri=True)) as database:
            database.row_factory = sqlite3.Row
            # else SQLite's error quotes text that is not UTF-8, which may be a secret
            database.text_factory = lambda value: value.decode("utf-8", "replace")
            return {
                table: [dict(row) for row in database.execute(f"SELECT * FROM {table}")]
                for table in ("profiles", "environments", "settings")
            }
    except sqlite3.Error as error:
        raise Failure(f"{target} is not a store of the official client: {error}") from None


def import_profile(environment, row, name):
    # type: (Environment, Json, str) -> str
    """Add the official client's profile ROW as NAME; its name here.

    Raises Failure for a row that no command could use.
    """
    key = row.get("api_key") or None
    project_id = row.get("project_id")
    is_usable = is_plain(key) if key else not asks_for_key(environment)
    require(is_usable and is_plain(project_id), "it has no usable API key and project")
    profiles = environment["profiles"]
    for stored, other in profiles.items():
        if other.get("api_key") == key and other.get("project_id") == project_id:
            return stored
    name = free_name(name, profiles)
    profiles[name] = {
        "auth_type": TOKEN if key else NO_AUTH,
        "api_key": key,
        "project_id": project_id,
        "project_name": None,
    }
    return name


def import_official(data, tables, warn):
    # type: (StoreData, Dict[str, List[Json]], Warn) -> List[str]
    """Add the official client's rows to DATA; the names of the profiles here."""
    settings = {row.get("key"): row.get("value") for row in tables["settings"]}
    for row in tables["environments"]:
        with suppress(Failure):  # no URL: its profiles will say so
            environment = add_environment(data, normal_url(str(row.get("api_url"))))
            environment["requires_auth"] = bool(row.get("requires_auth", True))
    with suppress(Failure):  # none is current there
        data["current_environment"] = data.get("current_environment") or normal_url(
            str(settings.get("current_environment_api_url"))
        )
    imported = []
    for row in tables["profiles"]:
        name = clean(str(row.get("name"))).strip("- ") or "imported"
        try:
            api_url = normal_url(str(row.get("api_url")))
            environment = add_environment(data, api_url)
            chosen = import_profile(environment, row, name)
        except Failure as failure:
            warn(f"profile {name} is left out: {failure.message}")
            continue
        imported.append(chosen)
        if name == settings.get("current_profile") and api_url == current_url(data):
            environment["current_profile"] = environment.get("current_profile") or chosen
    return imported


# ==== commands: one function a verb: resolve, call, store, say
def auth_token(app, args):
    # type: (App, Args) -> None
    """Verify a key by listing its projects, choose one, and store both as a profile."""
    api_url, environment = check_sign_in(app, args)
    refuse_name_of_login(environment, args.name)
    project_id = args.project
    key = given_key(app, args)
    needs_key = asks_for_key(environment)
    if args.no_verify and not (project_id and (key or not needs_key)):
        raise misuse("--no-verify needs a key and --project ID")
    projects = None
    try:
        if needs_key and not key:
            key, projects = ask_for_key(app, api_url, args.org)
        elif not args.no_verify:
            projects = verify_key(app, api_url, key, args.org)
    except Unreachable as failure:
        if failure.stage not in (NOT_CONNECTED, SILENT) or not (key and project_id):
            raise
        app.warn(
            f"the key and the project id {project_id} are stored unverified: "
            f"{failure.message}"
        )
    if projects is None:
        profile = project_fields(None)
        profile["project_id"] = require_plain(project_id, "--project")
    else:
        profile = project_fields(choose_project(app, projects, project_id))
    profile["auth_type"] = TOKEN if key else NO_AUTH
    profile["api_key"] = key
    with app.store.change() as data:
        name = store_key_profile(add_environment(data, api_url), profile, args.name)
    app.report(f"profile {name} is current, project {project_label(profile)}")
    if key:  # which the next commands hand on
        app.say(NEXT_STEP)


def start_login(app, api_url, waiting, output):
    # type: (App, str, WaitingLogin, str) -> None
    """Store what waits for approval, and print what a person needs to approve it."""
    with app.store.change() as data:
        add_environment(data, api_url)["login"] = waiting
    fields = "verification_uri verification_uri_complete user_code expires_at interval"
    shown = {name: waiting.get(name) for name in fields.split()}  # type: Any
    if output == "text":
        del shown["expires_at"], shown["interval"]
        shown["expires_in"] = f"{(waiting['expires_at'] - time.time()) / 60:.0f} min"
        shown = [{"field": name, "value": value} for name, value in shown.items()]
    app.show(shown, output, "field value")
    app.say("finish with: llamactl auth login --resume")


def show_code(app, api_url, waiting, no_browser):
    # type: (App, str, WaitingLogin, bool) -> None
    """Say where to type the code, and open a browser where that makes sense."""
    complete = waiting.get("verification_uri_complete")
    provider = stored_provider(waiting.get("provider"), api_url)
    tell = app.terminal.tell
    tell(f"Logging in to {api_url} with {origin_of(provider['token_endpoint'])}.")
    tell(f"Open {waiting['verification_uri']} on any device and enter this code:")
    tell(f"    {waiting['user_code']}")
    if complete:
        tell("Or open this address, which has the code in it:")
        tell(f"    {complete}")
    if not no_browser:
        app.terminal.open_browser(complete or waiting["verification_uri"])


def auth_login(app, args):
    # type: (App, Args) -> None
    """The device flow in one go, or the half of it that --start or --resume asks for."""
    if args.start and (args.resume or args.project or args.org or args.name):
        raise misuse("--start takes only -o; the rest is for --resume")
    if args.output != "text" and not args.start:
        raise misuse("-o is for --start, which prints the code")
    api_url, environment = check_sign_in(app, args)
    if not asks_for_key(environment):
        raise Failure(f"{api_url} requires no login", "llamactl auth token --project ID")
    waiting = environment.get("login")
    if not args.resume:
        provider, device_endpoint = app.plane(api_url).discover_provider()
        waiting = request_device_code(
            app.client, api_url, provider, device_endpoint, time.time()
        )
    elif not waiting:
        raise misuse("no login is waiting", "llamactl auth login --start")
    if args.start:
        return start_login(app, api_url, waiting, args.output)
    if not args.resume or app.terminal.can_ask():
        show_code(app, api_url, waiting, args.no_browser or args.resume)
    return finish_login(app, args, api_url, waiting)


def auth_get(app, args):
    # type: (App, Args) -> None
    """Print the profiles of the current environment or of all, or the one that is named."""
    data = app.store.load()
    if args.all and args.name:
        raise misuse("NAME and --all exclude each other")
    name = args.name and find_profile(data, current_url(data), args.name)
    rows = [
        {
            "name": each,
            "api_url": api_url,
            "project_id": profile.get("project_id"),
            "active": each == environment.get("current_profile"),
            "auth_type": profile["auth_type"],
        }
        for api_url, environment in sorted(data["environments"].items())
        for each, profile in sorted(environment["profiles"].items())
        if args.all or (api_url == current_url(data) and name in (None, each))
    ]
    columns = "name api_url project_id active AUTH=auth_type"
    app.show(rows[0] if name else rows, args.output, columns, "profile")
    if not rows:
        is_official = exists(app.store.official_path)
        app.say(f"hint: {HINT_IMPORT if is_official else HINT_LOGIN}")


def pick_profile(app, data, name, flag="NAME"):
    # type: (App, StoreData, Optional[str], str) -> str
    """The profile NAME, else the one that the user picks or gives by FLAG."""
    api_url = current_url(data)
    environment = get_environment(data, api_url)
    profiles = environment["profiles"]
    if profiles and not name:
        choices = [(each, each) for each in sorted(profiles)]
        return app.terminal.choose(
            "profile", choices, flag, environment.get("current_profile")
        )
    found = find_profile(data, api_url, name)
    if not found:
        raise Failure(
            f"{api_url} has no profile", "llamactl auth token --project ID", EXIT_REJECTED
        )
    return found


def auth_use(app, args):
    # type: (App, Args) -> None
    """Make a profile the current one of its environment."""
    data = app.store.check_writable()
    api_url = current_url(data)
    name = pick_profile(app, data, args.name)
    with app.store.change() as data:
        find_profile(data, api_url, name)  # another process may have deleted it
        get_environment(data, api_url)["current_profile"] = name
    app.report(f"profile {name} is current")


def confirm_deletion(app, args, places):
    # type: (App, Args, List[Tuple[str, str]]) -> None
    """Ask before the profiles at PLACES are deleted, unless --yes; raises Failure at no."""
    if places and not args.yes:
        profiles = "1 profile" if len(places) == 1 else f"{len(places)} profiles"
        app.terminal.confirm(f"Delete {profiles} and, for logins, their API keys?")


def auth_logout(app, args):
    # type: (App, Args) -> None
    """Delete one profile or all; exit 1 where a key may still work."""
    if args.all and args.name:
        raise misuse("NAME and --all exclude each other")
    data = app.store.check_writable()
    if args.all:
        places = [
            (api_url, name)
            for api_url, environment in data["environments"].items()
            for name in environment["profiles"]
        ]
        confirm_deletion(app, args, places)
        with app.store.change() as data:
            for environment in data["environments"].values():
                environment["login"] = None
    else:
        places = [(current_url(data), pick_profile(app, data, args.name))]
    problems = log_out_each(app, places)
    require(not problems, problems, f"delete the key {WEB_CONSOLE}")


def variables_of(credential):
    # type: (Credential) -> Dict[str, str]
    """The three variables that hand a full credential on; raises Failure."""
    if not credential.api_key:
        raise Failure("there is no API key to hand on", HINT_TOKEN, EXIT_REJECTED)
    return {
        VAR_API_KEY: credential.api_key,
        VAR_API_URL: credential.api_url,
        VAR_PROJECT: require_plain(credential.project_id or "", "the project id"),
    }


def auth_inject(app, args):
    # type: (App, Args) -> None
    """Write the three variables into a .env file, or to stdout."""
    values = variables_of(app.credential_with_project(args))
    for name, value in values.items():
        readers = " and ".join(unable_readers(value))
        if readers:
            app.warn(f"{name} needs quotes, which {readers} cannot read")
    path = args.env_file or ".env"
    if path == "-":
        return app.terminal.write(updated_env("", values))

    @lru_cache(1)  # the file is read again under the lock, and is mostly the same
    def edit(content):
        # type: (bytes) -> bytes
        try:
            return updated_env(content.decode("utf-8"), values).encode("utf-8")
        except UnicodeDecodeError:
            raise Failure(f"{path} is not UTF-8 text and is left alone") from None

    with naming_path(path, "written"):
        changed, place = rewrite_file(path, edit, bool(args.env_file), app.warn)
        if is_unignored(path):
            app.warn(f"{path} is in a git work tree; add it to .gitignore")
    return app.say(f"{place} {'written' if changed else 'is up to date'}")


def auth_exec(app, args):
    # type: (App, Args) -> int
    """Become a command that has the three variables."""
    require(args.command, "no command given", "llamactl auth exec -- COMMAND", EXIT_USAGE)
    variables = dict(
        app.process.variables, **variables_of(app.credential_with_project(args, args.name))
    )
    for name in (VAR_USE_PROFILE, VAR_KEY_FILE, VAR_PROFILE):
        variables.pop(name, None)
    return replace_process(args.command, variables)


def credential_or_reason(app, args):
    # type: (App, Args) -> Tuple[Credential, Optional[str]]
    """What a command would use; where that is nothing, the environment alone, and why."""
    try:
        return app.credential(args, args.name, needs_project=False), None
    except Failure as failure:
        if failure.code != EXIT_REJECTED:
            raise
        app.rejected_hint = failure.hint
        data = app.store.load()
        sources = {"environment": source_of_url(data)}
        return Credential(current_url(data), None, None, None, {}, sources), failure.message


def check_credential(app, credential, wanted):
    # type: (App, Credential, Optional[str]) -> Optional[Project]
    """The project that CREDENTIAL uses, if any, as the server knows it.

    WANTED is the project of the command line, which may be a name. Raises Failure: with
    EXIT_FAILED where the key works, but cannot see the project.
    """
    try:
        projects = verify_key(app, credential.api_url, credential.api_key, None)
    except Failure as failure:
        if failure.code != EXIT_REJECTED:
            failure.code = EXIT_UNREACHABLE
        raise
    if wanted:
        return find_project(projects, wanted)
    for project in projects:
        if project.project_id == credential.project_id:
            return project
    require(not credential.project_id, "the key works, but has no access to the project")
    return None


def proxy_or_reason(app, url, is_offline):
    # type: (App, str, bool) -> Tuple[Optional[Proxy], Optional[str]]
    """The proxy for URL, if any; else why the one that is named cannot be used."""
    try:
        return find_proxy(app.process, url, is_offline), None
    except Failure as failure:
        return None, failure.message


def show_status(app, args, credential, project, state, detail):
    # type: (App, Args, Credential, Optional[Project], str, Optional[str]) -> None
    """Print CREDENTIAL, where each value of it came from, and what a check of it said."""
    project_id = credential.project_id
    project_name = None if args.project else credential.profile.get("project_name")
    if project:
        project_id = project.project_id
        project_name = project.project_name
    user = credential.profile.get("email")
    user_source = "profile"
    if state == "works" and not user:
        user = app.plane_of(credential).get_user()
        user_source = "server"
    proxy, problem = proxy_or_reason(app, credential.api_url, args.offline)
    bundle = find_ca_bundle(app.process)
    values = {
        "environment": credential.api_url,
        "profile": credential.name,
        "user": user,
        "project_id": project_id,
        "project_name": project_name,
        "api_key": credential.api_key and f"{MASK}{last_four(credential.api_key)}",
        "ca_bundle": bundle.file or bundle.folder or "the system's",
        "proxy": proxy and proxy.address,
        "credential": state,
        "detail": detail or problem,
    }
    sources = dict(credential.sources, user=user_source, ca_bundle=bundle.source)
    sources["project_name"] = sources.get("project_id")
    sources["proxy"] = proxy and proxy.source
    shown = [
        {"name": name, "value": value, "source": value and sources.get(name)}
        for name, value in values.items()
    ]  # type: Any
    if args.output != "text":  # the last two have no source
        shown = dict(
            values, **{f"{row['name']}_source": row["source"] for row in shown[:-2]}
        )
    app.show(shown, args.output, "name source value")  # what may be long comes last


def auth_status(app, args):
    # type: (App, Args) -> int
    """What a command would use, where each value came from, and whether it works now."""
    credential, detail = credential_or_reason(app, args)
    project = None
    code = EXIT_DONE
    state = "not checked"
    if detail:
        code = EXIT_REJECTED
        state = "missing"
    elif not args.offline:
        try:
            project = check_credential(app, credential, args.project)
        except Failure as failure:
            code = failure.code
            detail = failure.message
        state = {EXIT_REJECTED: "rejected", EXIT_UNREACHABLE: "unknown"}.get(code, "works")
    show_status(app, args, credential, project, state, detail)
    if code == EXIT_REJECTED:
        app.say(f"hint: {app.rejected_hint}")
    return code


def auth_import(app, args):
    # type: (App, Args) -> None
    """Add the official client's profiles to ours, and leave its file as it is."""
    require(
        args.from_official, "no source given; use --from-official", HINT_IMPORT, EXIT_USAGE
    )
    path = app.store.official_path
    with app.store.opened("read"):
        require(isfile(path), f"{path} not found")
        tables = read_official(path)
    with app.store.change() as data:
        names = import_official(data, tables, app.warn)
    require(names, f"{path} has no profile to import")
    app.report(f"imported: {', '.join(names)}; login tokens were not imported")


def known_urls(data):
    # type: (StoreData) -> List[str]
    """The default environment, which always exists, then the others."""
    return [DEFAULT_API_URL] + sorted(set(data["environments"]) - {DEFAULT_API_URL})


def pick_environment(app, data, url):
    # type: (App, StoreData, Optional[str]) -> str
    """The environment URL, else the one that the user picks; raises Failure."""
    choices = [(each, each) for each in known_urls(data)]
    if not url:
        return app.terminal.choose("environment", choices, "URL", current_url(data))
    api_url = normal_url(url)
    if (api_url, api_url) not in choices:
        raise Failure(
            f"environment {api_url} not found; available: {listed(choices)}",
            f"llamactl environments add {api_url}",
        )
    return api_url


def environments_get(app, args):
    # type: (App, Args) -> None
    """Print the environments, or the one that is named."""
    data = app.store.load()
    urls = [pick_environment(app, data, args.url)] if args.url else known_urls(data)
    rows = [
        {
            "api_url": url,
            "requires_auth": asks_for_key(get_environment(data, url)),
            "active": url == current_url(data),
        }
        for url in urls
    ]
    app.show(rows[0] if args.url else rows, args.output, "api_url requires_auth active")


def report_environment(app, api_url, environment):
    # type: (App, str, Environment) -> None
    """Say that API_URL is current now, and which profile is, or how to get one."""
    next_step = "next: llamactl auth token"
    if asks_for_key(environment):
        next_step = "next: llamactl auth login, or llamactl auth token"
    if environment["profiles"]:
        next_step = "next: llamactl auth use NAME"
    if environment.get("current_profile"):
        next_step = f"profile {environment['current_profile']}"
    app.report(f"environment {api_url} is current; {next_step}")


def ask_version(app, api_url):
    # type: (App, str) -> Tuple[bool, List[str]]
    """What the control plane says of itself; raises Failure with a likelier URL as hint."""
    try:
        return app.plane(api_url).get_version()
    except Failure as failure:
        scheme, host, port, path = split_url(api_url, ".*")
        likely = ""
        if host.startswith("cloud."):  # the web console
            likely = api_url.replace("://", "://api.", 1)
        elif isinstance(failure, Unreachable) and failure.stage in (NOT_CONNECTED, SILENT):
            likely = f"{api_url} --no-verify"
        elif path:
            likely = normal_url(f"{scheme}://{host}:{port}")
        if failure.hint == HINT_LOGIN:  # which would log in elsewhere
            failure.hint = ""
        if likely:
            failure.hint = failure.hint or f"llamactl environments add {likely}"
        raise


def environments_add(app, args):
    # type: (App, Args) -> None
    """Ask a server whether it is a control plane, and make it current."""
    if not args.url and not app.terminal.can_ask():
        raise misuse("no URL given", "llamactl environments add URL")
    api_url = normal_url(args.url or app.terminal.ask("API URL of the control plane: "))
    app.store.check_writable()
    if is_sent_in_clear(api_url):
        app.warn(f"{api_url} is not encrypted: others can read what is sent")
    version = None if args.no_verify else ask_version(app, api_url)
    with app.store.change() as data:
        environment = add_environment(data, api_url)
        if version:
            environment["requires_auth"] = version[0]
        data["current_environment"] = api_url
    report_environment(app, api_url, environment)


def environments_use(app, args):
    # type: (App, Args) -> None
    """Make an environment current, without a request."""
    api_url = pick_environment(app, app.store.check_writable(), args.url)
    with app.store.change() as data:
        data["current_environment"] = api_url
        environment = get_environment(data, api_url)
    report_environment(app, api_url, environment)


def environments_delete(app, args):
    # type: (App, Args) -> None
    """Log out of an environment and forget it; then the default is current."""
    data = app.store.check_writable()
    api_url = pick_environment(app, data, args.url)
    places = [(api_url, name) for name in get_environment(data, api_url)["profiles"]]
    confirm_deletion(app, args, places)
    problems = log_out_each(app, places)
    with app.store.change() as data:
        if get_environment(data, api_url)["profiles"]:
            raise Failure(f"{api_url} got a new profile in the meantime and is kept")
        data["environments"].pop(api_url, None)
        if data.get("current_environment") == api_url:
            data["current_environment"] = None
    app.report(f"environment {api_url} deleted")
    require(not problems, problems, f"delete the key {WEB_CONSOLE}")


def projects_get(app, args):
    # type: (App, Args) -> None
    """Print the projects that the credential can see, or the one that is named."""
    credential = app.credential(args, needs_project=False)
    projects = app.plane_of(credential).get_projects(args.org)
    if args.id:
        projects = [find_project(projects, args.id)]
    rows = [
        {
            "project_id": project.project_id,
            "project_name": project.project_name,
            "deployment_count": project.deployment_count,
            "active": project.project_id == credential.project_id,
            "org_id": project.org_id,
        }
        for project in projects
    ]
    columns = "NAME=project_name project_id DEPLOYMENTS=deployment_count active org_id"
    app.show(rows[0] if args.id else rows, args.output, columns, "project")


def projects_use(app, args):
    # type: (App, Args) -> None
    """Choose the project of a profile among those that its key can see."""
    data = app.store.check_writable()
    credential = app.use(
        credential_of_profile(app.process, data, args.profile, "--profile", None)
    )
    name = credential.name or pick_profile(app, data, None, "--profile")
    projects = app.plane_of(credential).get_projects(args.org)
    project = choose_project(app, projects, args.id, credential.project_id, "ID")
    with app.store.change() as data:
        find_profile(data, credential.api_url, name)  # another process may have deleted it
        profile = get_environment(data, credential.api_url)["profiles"][name]
        profile.update(project_fields(project))
    app.report(f"profile {name} uses project {project_label(profile)}")


def organizations_get(app, args):
    # type: (App, Args) -> None
    """Print the organizations, where the server has them."""
    credential = app.credential(args, needs_project=False)
    plane = app.plane_of(credential)
    organizations = []
    _, capabilities = plane.get_version()
    if "organizations" in capabilities:
        organizations = plane.get_organizations()
    else:
        app.warn(f"{credential.api_url} has no organizations")
    org_id = credential.profile.get("org_id")
    for row in organizations:  # the server's default is current where no project says
        row["active"] = row["org_id"] == org_id if org_id else row["is_default"]
    columns = "NAME=org_name org_id DEFAULT=is_default active"
    app.show(organizations, args.output, columns, "organization")


def config(app, args):
    # type: (App, Args) -> None
    """Print what commands use, without a request."""
    credential, _ = credential_or_reason(app, args)
    row = {
        "environment": credential.api_url,
        "profile": credential.name,
        "project_id": credential.project_id,
        "project_name": credential.profile.get("project_name"),
    }
    app.show(row, args.output, "environment profile project_id project_name")


def deployments_get(app, args):
    # type: (App, Args) -> None
    """Print the project's deployments, or the one that is named."""
    credential = app.credential_with_project(args)
    plane = app.plane_of(credential)
    if args.name:
        try:
            deployments = [plane.get_deployment(credential.project_id, args.name)]
        except Refused as refused:
            refused.message = refused.message.replace(args.name, quotable(args.name))
            raise
    else:
        deployments = plane.get_deployments(credential.project_id)
    if args.output in ("json", "yaml"):
        return app.show(
            deployments[0] if args.name else deployments, args.output, "", "deployment"
        )
    rows = [dict(each["spec"], name=each["name"], **each["status"]) for each in deployments]
    columns = "name REPO=repo_url git_ref phase"
    if args.output == "wide":
        columns += " APPSERVER=appserver_version git_sha apiserver_url PROJECT=project_id"
    app.show(rows, "text", columns, "deployment")
    for row in rows:
        if row["warning"]:
            app.warn(f"{row['name']}: {row['warning']}")
    return None


COMPLETION = {
    "bash": """_llamactl() {
    local line=${COMP_LINE:0:COMP_POINT} words last IFS=$' \\t\\n'
    read -ra words <<<"$line"
    [[ $line == *' ' ]] && words+=('')
    last=${words[${#words[@]} - 1]}
    IFS=$'\\n'
    COMPREPLY=($(llamactl completion words -- "${words[@]:1}" 2>/dev/null))
    # bash takes @ and : for the start of a word, and replaces only $2, which starts there
    COMPREPLY=("${COMPREPLY[@]#"${last%"$2"}"}")
}
complete -o default -F _llamactl llamactl
""",
    "zsh": """#compdef llamactl
_llamactl() {
    local -a found
    found=("${(@f)$(llamactl completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -- $found
}
compdef _llamactl llamactl
""",
    "fish": """function __llamactl_words
    llamactl completion words -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c llamactl -f -a '(__llamactl_words)'
""",
}


def next_words(typed, commands, profiles):
    # type: (List[str], Mapping[str, str], List[str]) -> str
    """What may come next, a line each, where the last of the words TYPED is not whole."""
    line = "".join(f"{word} " for word in typed[:-1] if not word.startswith("-"))
    found = []
    for command, options in commands.items():
        if command.startswith(line):
            found.append(command[len(line) :].split()[0])
        elif line.startswith(f"{command} "):
            found += re.findall("-[^ ]+", f"{options} --help --quiet")
            if "NAME" in options:
                found += profiles
    if typed[-2:-1] == ["--profile"]:
        found = profiles
    return "".join(sorted({f"{word}\n" for word in found if word.startswith(typed[-1])}))


def completion(app, args):
    # type: (App, Args) -> None
    """Print a script for a shell, or the next words, which the scripts ask for."""
    if args.shell == "words" and args.command:
        data = app.store.load()
        profiles = get_environment(data, current_url(data))["profiles"]
        safe = [name for name in profiles if name == shell_safe(name)]
        return app.terminal.write(next_words(args.command, app.commands, safe))
    if args.shell not in COMPLETION or args.command:
        raise misuse("name a shell: bash, zsh or fish")
    return app.terminal.write(COMPLETION[args.shell])


# ==== parser: the words of the command line, their help, examples and completion; no logic
# names and what they take, two spaces, help; a line without help heads those below it
OPTIONS = """
NAME  a profile, as `auth get` lists them
URL  an environment, as `environments get` lists them
ID  a project by its id or name, as `projects get` lists them
DEPLOYMENT  a deployment, as `deployments get` lists them
SHELL  bash, zsh or fish
credential
--api-key-file PATH  read the key from PATH, - for stdin
--api-key KEY  the key, - for stdin; on the command line it shows in the process list \
and in the shell's history, so prefer a file or stdin
--profile NAME  use this profile for this one command
choice
--project,--project-id ID  the project to use, by its id or name
--org ID  only projects of this organization
--name NAME  the name of the profile (default: generated)
--all  of every environment
browser
--no-browser  only print the address and the code
--start  print the address and the code, and exit
--resume  finish what --start began
how
--env-file PATH  the file (default: .env), - for stdout
--from-official  from the profiles.db of the official client, which stays as it is
--no-verify  store without asking the server
--offline  ask no server
--yes  do not ask for confirmation
-o,--output text|json|yaml  how to print (default: text)
--output,-o text|wide|json|yaml  how to print (default: text)
everywhere
-h,--help  show this help
--quiet  no notices and no progress
--native-tls  \0
-V,--version  show the version
"""
# each command: what it does, its options as the table above has them, an example
COMMANDS_HELP = """
auth token: Create a profile from an API key and choose its project.
  --api-key-file --api-key --project --org --name --no-verify
  auth token --api-key-file /run/secrets/llama --project ID
auth login: Log in with a browser on any device and create a profile.
  --project --org --name --no-browser --start --resume -o
  auth login --resume --project ID
auth get: List profiles, or show one.
  NAME --all -o
  auth get work -o json
auth use: Make a profile the current one.
  NAME
  auth use work
auth logout: Delete a profile and, for a login, its API key on the server.
  NAME --all --yes
  auth logout work
auth inject: Write the credential into a .env file.
  --profile --project --env-file
  auth inject --env-file deploy/.env --profile work
auth status: Show what commands use, where it came from, and whether it works.
  NAME --offline --profile --project -o
  auth status --offline
auth exec: Run a command with the credential in its variables.
  NAME --api-key-file --profile --project
  auth exec work -- python3 app.py
auth import: Import the official client's profiles.
  --from-official
  auth import --from-official
environments get: List environments, or show one.
  URL -o
  environments get -o yaml
environments add: Add an environment and make it current.
  URL --no-verify
  environments add https://llama.example.com
environments use: Make an environment the current one.
  URL
  environments use https://llama.example.com
environments delete: Delete an environment and its profiles.
  URL --yes
  environments delete https://llama.example.com
projects get: List projects, or show one.
  ID --org --profile -o
  projects get -o json
projects use: Choose the project of a profile.
  ID --org --profile
  projects use ID
organizations get: List organizations.
  --profile -o
  organizations get -o json
deployments get: List the project's deployments, or show one.
  DEPLOYMENT --profile --project --output
  deployments get invoices -o yaml
config: Show what commands use, without network.
  --profile -o
  config -o json
completion: Print a completion script.
  SHELL
  completion bash >> ~/.bashrc
"""
COMMANDS = {  # type: Dict[str, Callable[[App, Args], Optional[int]]]
    "auth token": auth_token,
    "auth login": auth_login,
    "auth get": auth_get,
    "auth use": auth_use,
    "auth logout": auth_logout,
    "auth inject": auth_inject,
    "auth status": auth_status,
    "auth exec": auth_exec,
    "auth import": auth_import,
    "environments get": environments_get,
    "environments add": environments_add,
    "environments use": environments_use,
    "environments delete": environments_delete,
    "projects get": projects_get,
    "projects use": projects_use,
    "organizations get": organizations_get,
    "deployments get": deployments_get,
    "config": config,
    "completion": completion,
}
GROUPS = {
    "": "Sign in to LlamaCloud with one file and the standard library.",
    "auth": "Get credentials, keep them, choose between them, hand them on.",
    "environments": "Choose the control plane.",
    "projects": "List projects and choose one.",
    "organizations": "List organizations.",
    "deployments": "List deployments.",
}
RENAMED = {  # words of older releases; `auth` stood before most of them
    "list": "auth get",
    "switch": "auth use",
    "destroy": "auth logout --all",
    "env": "environments get",
    "project": "projects use",
    "organizations": "organizations get",
}
LEADS_TO = {  # words of other programs
    "whoami": "auth status",
    "login": "auth login",
    "logout": "auth logout",
    "token": "auth token",
}
NOT_OFFERED = """\
agentcore
dev
init
pkg
serve
config destroy
config show-db
deployments apply
deployments configure-git-remote
deployments create
deployments delete
deployments edit
deployments history
deployments logs
deployments rollback
deployments template
deployments update
""".splitlines()
FOLDER_HELP = """variables (none of them supplies a credential):
  LLAMACTL_CONFIG_DIR      folder that the profiles are kept in"""
VARIABLES_HELP = f"""variables (a key and a project beat the current profile):
  LLAMA_CLOUD_API_KEY       API key
  LLAMA_CLOUD_API_KEY_FILE  file with the API key, in its place
  LLAMA_AGENTS_PROJECT_ID   id of the project
  LLAMA_CLOUD_BASE_URL      API URL (default: {DEFAULT_API_URL})
  LLAMA_CLOUD_USE_PROFILE   1: ignore those above
  LLAMACTL_PROFILE          profile to use in place of the current one
  LLAMACTL_CONFIG_DIR       folder that the profiles are kept in
  LLAMACTL_TIMEOUT          seconds that a server may be silent (default: 10)"""
EXIT_CODES_HELP = """

exit codes: 0 done, 1 failed, 2 wrong usage or a choice missing, 4 not logged in
or rejected, 5 server unreachable or failing (try again), 126 and 127 from `auth
exec`, 129, 130 and 143 interrupted"""


@lru_cache()
def read_commands():
    # type: () -> Dict[str, List[str]]
    """For each command what it does, its options and an example."""
    return {
        words: texts
        for words, *texts in re.findall("(?m)^(.+): (.+)\n  (.+)\n  (.+)", COMMANDS_HELP)
    }


class Parser(argparse.ArgumentParser):
    """argparse, but it raises, and never quotes what may be a secret."""

    def error(self, message):
        # type: (str) -> NoReturn
        message = re.sub("explicit argument .*", "value", message)
        message = re.sub(r"choice: .* \(choose", "choice (choose", message)
        raise misuse(message, f"{self.prog} --help")

    def parse_all(self, arguments):
        # type: (List[str]) -> Args
        """ARGUMENTS as argparse reads them; raises Failure for one too many or empty."""
        # before Python 3.8, allow_abbrev=False refuses `-ojson` as well
        whole = [re.sub(r"^-o(?=\w)", "-o=", argument) for argument in arguments]
        args, extra = self.parse_known_args(whole)
        for argument in extra:
            match = re.match("--?[A-Za-z][a-z_-]*", argument)
            if match:
                self.refuse_option(match.group())
        if extra:
            self.error(f"one argument too many: {quotable(extra[-1])}")
        for name, value in vars(args).items():
            if value == "":
                self.error(f"{name.replace('_', '-')} is empty")
            if value and name in ("id", "name", "org", "profile", "project"):
                setattr(args, name, as_utf_8(value))
        return args

    def refuse_option(self, option):
        # type: (str) -> NoReturn
        """Raise Failure for OPTION, with the one that it looks like."""
        from difflib import get_close_matches

        message = f"unknown option {quotable(option)}"
        for near in get_close_matches(option, self._option_string_actions, 1):
            message += f"; did you mean {near}?"
        self.error(message)


def read_options(wanted):
    # type: (Container[str]) -> Iterator[Tuple[Optional[str], List[str], Json]]
    """The OPTIONS whose first name is WANTED: heading, names, and what argparse is told."""
    heading = None
    for names, metavar, text in re.findall(r"(?m)^(\S+)(?: (\S+))?(?:  (.+))?$", OPTIONS):
        flags = names.split(",")
        if not text:
            heading = names
        if flags[0] not in wanted:
            continue
        settings = {"help": argparse.SUPPRESS if text == "\0" else text}  # type: Json
        if not names.startswith("-"):
            flags = ["name" if names == "DEPLOYMENT" else names.lower()]
            settings.update(metavar=names, nargs="?")
        elif metavar:
            settings["metavar"] = metavar
        else:
            settings["action"] = "store_true"
        if "|" in metavar:
            settings.update(choices=metavar.split("|"), type=str.lower, default="text")
        yield heading, flags, settings


def new_parser(words, usage, about, epilog, options):
    # type: (str, Optional[str], str, str, str) -> Parser
    """A parser for OPTIONS and those of every command.

    All are added to groups: a parser formats each one that it gets itself, which from
    Python 3.14 on imports half the standard library.
    """
    vars(argparse)["_"] = str  # else it imports locale, to look for translations
    parser = Parser(
        f"llamactl {words}".strip(),
        usage,
        about,
        epilog,
        # a fixed width keeps argparse from asking the terminal for it at each option
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 27, 80),
        add_help=False,
        allow_abbrev=False,
    )
    parser.color = False  # type: ignore[attr-defined]
    groups = {}
    wanted = f"{options} -h --quiet --native-tls".split()
    for heading, flags, settings in read_options(wanted):
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(*flags, **settings)
    return parser


def command_parser(words):
    # type: (str) -> Parser
    """The parser of the command WORDS."""
    summary, options, example = read_commands()[words]
    usage = None
    if words == "auth exec":
        usage = "llamactl auth exec [NAME] [options] -- COMMAND..."
    variables = VARIABLES_HELP if "--profile" in options else FOLDER_HELP
    epilog = f"example:\n  llamactl {example}\n\n{variables}"
    parser = new_parser(words, usage, summary, epilog, options)
    parser.set_defaults(name=None, profile=None, project=None, api_key_file=None)
    return parser


def group_parser(group):
    # type: (str) -> Parser
    """The parser of a group of commands, or of all where GROUP is empty."""
    about = f"{GROUPS[group]}\n\ncommands:"
    examples = ["examples:"]
    for words, (summary, _, example) in read_commands().items():
        if words.startswith(group):
            about += f"\n  {words:20} {summary}"
            examples.append(f"  llamactl {example}")
    usage = "%(prog)s COMMAND [options]"
    epilog = "\n".join(examples[:7]) + f"\n\n{VARIABLES_HELP}"
    if not group:
        epilog += EXIT_CODES_HELP
    return new_parser(group, usage, about, epilog, "" if group else "-V")


def split_command(arguments):
    # type: (List[str]) -> Tuple[str, List[str]]
    """The words that name a command, wherever options stand, and the other arguments."""
    # behind these stand one space, what they take, and two spaces
    valued = re.findall(r"-[^ ,\n]+(?=\S* \S+  )", OPTIONS)
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


def unknown_command(words):
    # type: (str) -> Failure
    """What to say of WORDS, which are no command, with the likeliest one as hint."""
    from difflib import get_close_matches

    group = words.split()[0]
    renamed = RENAMED.get(words.replace("auth ", ""))
    if words.endswith(" list") and group in GROUPS:
        renamed = f"{group} get"
    if renamed:
        return misuse(f"`{words}` is now `{renamed}`", f"llamactl {renamed}")
    shown = words if words in NOT_OFFERED else " ".join(map(quotable, words.split()))
    if words in NOT_OFFERED or group in NOT_OFFERED:
        message = f"`{shown}` is not offered here; use the official client"
        return misuse(message, "llamactl --help")
    hint = LEADS_TO.get(group) or RENAMED.get(group, "--help")
    for near in get_close_matches(words, [*COMMANDS, *GROUPS, *LEADS_TO], 1):
        hint = LEADS_TO.get(near, near)
    return misuse(f"there is no command `{shown}`", f"llamactl {hint}")


# ==== main: read, dispatch, and the only place that catches everything
def read_help_words(arguments):
    # type: (List[str]) -> List[str]
    """ARGUMENTS with `help` first or last, and `version`, as the options of that name."""
    words = [each for each in arguments if each not in ("--quiet", "--native-tls")]
    if words == ["version"]:
        return ["--version"]
    if words[:1] == ["help"]:
        return words[1:] + ["--help"]
    if words[-1:] == ["help"]:
        return words[:-1] + ["--help"]
    return arguments


def run_parsed(app, words, args):
    # type: (App, str, Args) -> int
    """Run a command; a hint never names the command that just failed."""
    try:
        return COMMANDS[words](app, args) or EXIT_DONE
    except Failure as failure:
        if failure.hint == HINT_LOGIN:
            failure.hint = app.rejected_hint
        if isinstance(failure, Unreachable) and not failure.hint:
            # it names server, proxy and certificates
            failure.hint = "llamactl auth status --offline"
        if failure.hint == f"llamactl {words}":
            failure.hint = ""
        raise


def run_command(terminal, arguments):
    # type: (Terminal, List[str]) -> int
    """Run the command that ARGUMENTS name; its exit code."""
    dashes = (arguments + ["--"]).index("--")
    words, others = split_command(read_help_words(arguments[:dashes]))
    behind = arguments[dashes:]
    if words in COMMANDS:
        parser = command_parser(words)
    elif words in GROUPS:
        parser = group_parser(words)
    else:
        raise unknown_command(words)
    if "-h" in others or "--help" in others:
        text = parser.format_help()
    elif words in COMMANDS:
        if words not in ("auth exec", "completion"):  # which take more words behind --
            others += behind
        args = parser.parse_all(others)
        args.command = behind[1:]
        terminal.quiet = args.quiet
        commands = {each: texts[1] for each, texts in read_commands().items()}
        return run_parsed(App(terminal.process, terminal, commands), words, args)
    elif words:
        terminal.write_error(f"error: `{words}` needs a command\n\n{parser.description}\n")
        return EXIT_USAGE
    elif parser.parse_all(others).version:
        text = f"llamactl.py {__version__}\n"
    else:
        text = parser.format_help()
    terminal.write(text)
    return EXIT_DONE


def describe_bug(error):
    # type: (Exception) -> str
    """Where this program is wrong; it quotes nothing."""
    line = 0
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == run_command.__code__.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    return (
        f"internal error in llamactl.py {__version__}: "
        f"{type(error).__name__} at line {line}"
    )


def run_and_report(terminal, arguments):
    # type: (Terminal, List[str]) -> int
    """Run the command that ARGUMENTS name, and tell what went wrong; the exit code."""
    try:
        return run_command(terminal, arguments)
    except Failure as failure:
        terminal.tell(f"error: {failure.message}")
        if failure.hint:
            terminal.tell(f"hint: {failure.hint}")
        return failure.code
    except BrokenPipeError:
        terminal.abandon(1)
        return EXIT_DONE
    except ImportError as error:
        message = LACKS % error.name
    except MemoryError:
        message = "out of memory"
    except OSError as error:  # a working folder that is gone, say
        message = reason(error)
    except Exception as error:
        message = describe_bug(error)
    terminal.tell(f"error: {message}")
    return EXIT_FAILED


def main(argv=None):
    # type: (Optional[List[str]]) -> int
    """Run llamactl with ARGV, by default the process's own; the exit code."""
    terminal = Terminal(read_process())
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return run_and_report(terminal, arguments)
    except KeyboardInterrupt as interrupt:
        if is_terminal(terminal.input):
            terminal.write_error("\n")
        terminal.write_error("interrupted\n")
        return 128 + getattr(interrupt, "number", 2)  # as a shell has it; 2 is Ctrl-C's
    finally:
        terminal.close()


if __name__ == "__main__":
    os._exit(main())  # all is written; to tidy up would take longer than a command
