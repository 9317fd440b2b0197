#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sign in to LlamaCloud with one file and the standard library.

This page is the auditor's map; the rooms below follow it, and a name refers only upward.

What it does    Makes profiles (an API key and a project for one control plane) from a key or by
                the OpenID device flow, keeps them, hands them on in a .env or to a command.
Files written   profiles.json (0600), its lock, for an instant its successor, and damaged ones in
                $LLAMACTL_CONFIG_DIR, %APPDATA%\\llamactl, $XDG_CONFIG_HOME/llamactl or
                ~/.config/llamactl (0700); the .env that `auth inject` is told to write, likewise.
                profiles.db, the official client's, is read by `auth import` and never changed.
Hosts           The control plane of the current environment (https://api.cloud.llamaindex.ai
                unless you add another); for `auth login`, and the logout of a login, the identity
                provider that it names; by urllib's proxies. No telemetry, no update check.
Variables       LLAMA_CLOUD_API_KEY, LLAMA_AGENTS_PROJECT_ID, LLAMA_CLOUD_BASE_URL,
                LLAMA_CLOUD_USE_PROFILE, LLAMACTL_PROFILE, LLAMACTL_CONFIG_DIR, XDG_CONFIG_HOME,
                APPDATA, HOME, CI, TERM, SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE,
                CURL_CA_BUNDLE, HTTP_PROXY, HTTPS_PROXY, NO_PROXY, COMPUTERNAME; and to find a
                browser SSH_CONNECTION, SSH_CLIENT, SSH_TTY, DISPLAY, WAYLAND_DISPLAY, BROWSER.
Programs run    The command given to `auth exec`; for `auth login` what opens your browser.
Never           Turns certificate verification off, sends a key to a server that is not its own,
                or prints one (but for `auth inject --env-file -`, which is asked to).
"""

NEEDS: str = "llamactl.py needs Python 3.6 or newer: start it with a newer python3"

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import sys
import time
from collections import namedtuple
from functools import partial

__version__ = "1.0.0"
Args = argparse.Namespace
TYPE_CHECKING = False  # what stands below is for mypy alone: typing costs start-up time
if TYPE_CHECKING:
    import ssl
    from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple
    from urllib.request import Request
    Json = Dict[str, Any]
    Act = Callable[[], None]
    Tell = Callable[[str], None]
    Wait = Callable[[float], None]
    Text = Optional[str]
    Choices = Sequence[Tuple[str, str]]  # what is chosen, and how it is shown

# ==== constants: every literal that two places share or that a reader may want to argue with ======
EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_REJECTED, EXIT_UNREACHABLE = 0, 1, 2, 4, 5
EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 126, 127, 130
DEFAULT_API_URL = "https://api.cloud.llamaindex.ai"
WEB_CONSOLE = "in its web console (LlamaCloud's own: https://cloud.llamaindex.ai)"
DEFAULT_PORTS = {"http": 80, "https": 443}
OFFICIAL_VERSION = "0.10.4"  # of the official client, whose wire contract is spoken here
VAR_API_KEY, VAR_API_URL = "LLAMA_CLOUD_API_KEY", "LLAMA_CLOUD_BASE_URL"
VAR_PROJECT, VAR_USE_PROFILE = "LLAMA_AGENTS_PROJECT_ID", "LLAMA_CLOUD_USE_PROFILE"
VAR_PROFILE, VAR_FOLDER = "LLAMACTL_PROFILE", "LLAMACTL_CONFIG_DIR"
TRUE_WORDS = ("1", "true", "yes", "on", "t", "y")
STORE_NAME, STORE_VERSION = "profiles.json", 1
OFFICIAL_STORE, DAMAGED = "profiles.db", ".damaged-"
TOKEN, OIDC, NO_AUTH = "token", "oidc", "none"  # how a profile authenticates
MAX_DIGITS = MAX_EXPLANATION = 300  # int() takes its time over more; characters of a server's
LOCK_TIMEOUT, LOCK_PAUSE = 10.0, 0.02  # seconds, like all times here
RENAME_TIMEOUT = BROWSER_TIMEOUT = 1.0
UNROUTABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EACCES, errno.EPERM)
UNRENAMABLE = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)
ANSWER_TIMEOUT, PAUSE_TIMEOUT, WHOLE_TIMEOUT = 10.0, 10.0, 60.0  # its begin, silences, end
LOCKED_TIMEOUT = 8.0  # for all requests that are made while the store is locked
MAX_KEY_BYTES, MAX_ANSWER = 64 * 1024, 8 * 1024 * 1024
MAX_REDIRECTS, MAX_RETRY_AFTER, RETRY_DELAYS = 5, 30.0, (0.5, 1.5)
RETRIED_STATUS, REDIRECT_STATUS = (429, 502, 503, 504), (301, 302, 303, 307, 308)
CONNECT, SILENCE, CUT, SLOW, FAILING, NONSENSE = range(6)  # how far a failed exchange came
API = "/api/v1beta1/deployments"
VERSION_PATH = "/api/v1beta1/deployments-public/version"
DISCOVERY_PATH = "/api/v1/auth/oidc/discovery"
ME_PATH, KEYS_PATH = "/api/v1/auth/me", "/api/v1/api-keys"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
CODE_FIELDS = "verification_uri verification_uri_complete user_code expires_at interval".split()
DEFAULT_INTERVAL, SLOW_DOWN, MIN_INTERVAL = 5.0, 5.0, 0.001  # RFC 8628 §3.2 and §3.5
MAX_CODE_LIFETIME, CLOCK_LEEWAY = 86400.0, 120.0  # the latter between the provider and us
TOKEN_LEEWAY = 30.0  # an access token this close to its end is refreshed first
LOGIN_HINT, IMPORT_HINT = "llamactl auth login", "llamactl auth import --from-official"
KEY_FILE_HINT = "llamactl auth token --api-key-file PATH --project ID"
POLL_ENDS = {"access_denied": "the login was refused in the browser",
             "expired_token": "the code expired before it was approved"}
POLL_ERRORS = ["slow_down", "authorization_pending"] + list(POLL_ENDS)
RSA_BITS = (2048, 8192)
DIGEST_INFO = {  # RFC 8017 §9.2 note 1: the hash, and the DER that stands before its value
    "RS256": ("sha256", "3031300d060960864801650304020105000420"),
    "RS384": ("sha384", "3041300d060960864801650304020205000430"),
    "RS512": ("sha512", "3051300d060960864801650304020305000440")}
CA_BUNDLES = (  # where Linux systems, the BSDs and macOS keep theirs
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem", "/usr/local/share/certs/ca-root-nss.crt")
TEXT_BROWSERS = ("www-browser", "links", "links2", "elinks", "lynx", "w3m", "browsh")
# C1 controls, and what reorders or hides text: bidirectional marks, separators, joiners, BOM
INVISIBLE = ("\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
             "\ufeff\ufff9-\ufffb\ufffe\uffff")
SURROGATE, KEY_SHAPE = "[\ud800-\udfff]", "(?i)llx-[a-z0-9_-]{14,}"
MASK, MIN_MASKED = "********", 8  # a shorter secret would mask ordinary words
SAFE_ENV_VALUE = r"[A-Za-z0-9_./:@%+,=-]+"
ENV_QUOTED = r"""[ \t]*(?:"[^"\\]*(?:\\.[^"\\]*)*"|'[^']*')"""
ENV_ASSIGNMENT = r"([ \t]*)(export[ \t]+)?([^=#\s'\"]+)[ \t]*=(" + ENV_QUOTED + ")?"
ENV_DANGLING = r"(?<!\\)(?:\\\\)*\\\Z"  # an odd number of backslashes ends the line
ENV_OTHERS = r"((?:(?![^\r\n]*LLAMA_)[^'\"\\\r\n]*(?:\r\n|\n|\r)){1,500})|"  # by the hundred
ENV_LINE = r"(?s)(?!\Z)(?:" + ENV_OTHERS + "(?:" + ENV_ASSIGNMENT + r")?([^\r\n]*)(\r\n|\n|\r|\Z))"
ENV_COMMENT = r"[ \t]+(#.*)"
ENV_ENDINGS = ((r"\r\Z", "\r"), (r"(?<!\r)\n", "\n"), (r"\n", "\r\n"), (r"\r", "\r"))
SAFE_YAML = r"[A-Za-z_](?:[A-Za-z0-9_./@:+-]*[A-Za-z0-9_/])?"
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
IN_CLEAR = r"http://(?!(localhost|127\.[0-9.]+|\[::1\])([:/]|$))"
URL_HOST = r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)"

# ==== errors: the one exception, and the kinds of it that callers treat differently ===============
class Failure(Exception):
    """What went wrong in one line, the command to try next, and the exit code."""
    def __init__(self, message: str, hint: str = "", code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message, self.hint, self.code = message, hint, code

class Unreachable(Failure):
    """A server that could not be reached or made no sense; `stage` says how far that came."""
    def __init__(self, message: str, stage: int, hint: str = "") -> None:
        super().__init__(message, hint, EXIT_UNREACHABLE)
        self.stage = stage

class Damaged(Failure):
    """A store that cannot be made sense of: readers stop, a writer sets it aside and goes on."""

class Refused(Failure):
    """A server that understood and said no, with the HTTP status that it said it with."""
    def __init__(self, message: str, status: int, hint: str = "", code: int = EXIT_FAILED) -> None:
        super().__init__(message, hint, code)
        self.status = status

def require(condition: "Any", message: str, hint: str = "", code: int = EXIT_FAILED) -> None:
    if not condition:
        raise Failure(message, hint, code)

def require_usage(condition: "Any", message: str, hint: str = "") -> None:
    require(condition, message, hint, EXIT_USAGE)

def require_sense(condition: "Any", message: str) -> None:
    if not condition:
        raise Unreachable(message, NONSENSE)

# ==== surroundings: the process's environment, platform and home, read once =======================
WINDOWS = os.name == "nt"
MACOS = sys.platform == "darwin"

class Surroundings(namedtuple("Surroundings", "variables home host program_on_stdin")):
    """All that is taken from outside the command line; a home that is not known is "~"."""
    def get(self, variable: str) -> "Text":
        return self.variables.get(variable) or None

    def uses_profile(self) -> bool:
        return (self.get(VAR_USE_PROFILE) or "").strip().lower() in TRUE_WORDS

    def folder(self) -> "Text":
        shared = self.get("APPDATA" if WINDOWS else "XDG_CONFIG_HOME") or ""
        base = shared if os.path.isabs(shared) else os.path.join("~", ".config")
        path = self.get(VAR_FOLDER) or os.path.join(base, "llamactl")
        in_home = path.startswith("~") and path[1:2] in ("", "/", os.sep)
        path = os.path.join(self.home, "." + path[1:]) if in_home else os.path.expanduser(path)
        with contextlib.suppress(OSError):  # a working folder that is gone has no subfolder
            return None if path.startswith("~") else os.path.abspath(path)
        return None

def read_surroundings() -> Surroundings:
    variables, home = dict(os.environ), os.path.expanduser("~")
    known = os.path.isabs(home) and variables.get("HOME") != ""  # empty is unset
    host = os.uname().nodename if hasattr(os, "uname") else variables.get("COMPUTERNAME")
    # `python3 -` and `python3 < llamactl.py` leave these names; a file and -m leave a path
    program_on_stdin = sys.argv[0] in ("-", "")
    return Surroundings(variables, home if known else "~", host or "unknown", program_on_stdin)

# ==== formats: text in, text out; arithmetic; no input or output ==================================
def clean(text: str) -> str:
    """TEXT as one line that can neither move a cursor nor reorder what stands around it."""
    if text.isprintable():
        return text
    text = re.sub(r"[\t\r\n]+", " ", re.sub(SURROGATE, "\ufffd", text))
    return re.sub("[\x00-\x1f" + INVISIBLE + "]", "", text)

def masked(text: str, secrets: "Set[str]") -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK).replace(json.dumps(secret)[1:-1], MASK)
    return text

def shortened(text: str) -> str:
    """TEXT on one line, cut at white space alone, since no mask fits a part of a secret."""
    line = " ".join(text.split())
    whole_words = line[:MAX_EXPLANATION].rpartition(" ")[0]
    return line if len(line) <= MAX_EXPLANATION else (whole_words + " ...").strip()

def last_four(secret: str) -> str:
    """At most the last four characters, and none of a secret too short to spare them."""
    return re.sub(r"[^A-Za-z0-9]", "", secret[-4:]) if len(secret) >= 12 else ""

def json_text(value: "Any", indent: "Optional[int]" = 2) -> str:
    """VALUE as JSON without characters that a terminal would act on, its meaning unchanged."""
    text = re.sub(SURROGATE, "\ufffd", json.dumps(value, indent=indent, ensure_ascii=False))
    return re.sub("[" + INVISIBLE + "]", lambda match: "\\u%04x" % ord(match.group()), text)

def yaml_scalar(value: "Any") -> str:
    bare = isinstance(value, str) and re.fullmatch(SAFE_YAML, value)
    return str(value) if bare and value.lower() not in YAML_WORDS else json_text(value, None)

def yaml_text(value: "Any", indent: str = "") -> str:
    """VALUE as block YAML; a scalar or an empty container is one line of flow YAML."""
    if not value or not isinstance(value, (dict, list)):
        return yaml_scalar(value) + "\n"
    deeper = indent + "  "
    if isinstance(value, list):
        return indent.join("- " + yaml_text(item, deeper) for item in value)
    entries = []
    for key, item in value.items():
        name = yaml_scalar(key)
        if len(name) > 1024:  # YAML 1.2 §7.4.3: no longer key may stand before its colon
            name = "? " + name + "\n" + indent
        nested = item and isinstance(item, (dict, list))
        entries.append(name + (":\n" + deeper if nested else ": ") + yaml_text(item, deeper))
    return indent.join(entries)

def cell_text(value: "Any") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(str(value)) if value not in (None, "") else "-"

def table_text(headers: "Sequence[str]", rows: "Sequence[Sequence[Any]]") -> str:
    lines = [list(headers)] + [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "".join("  ".join(cells).rstrip() + "\n" for cells in padded)

def is_plain(text: "Any") -> bool:
    return isinstance(text, str) and bool(re.fullmatch("[!-~]+", text))

def plain(text: str, what: str) -> str:
    """TEXT, if it is plain; the Failure otherwise names WHAT and quotes nothing."""
    require_usage(text, what + " is empty")
    require_usage(is_plain(text), what + " has white space or characters that are not ASCII")
    return text

def split_url(text: str, rest: str) -> "Tuple[str, str, int, str]":
    """Scheme, host, port and what follows, which the pattern REST must fit; raises ValueError."""
    # by hand because local commands do without urllib, and urllib takes what is no URL
    match = re.fullmatch("(?ai)(https?)://" + URL_HOST + "(?::([0-9]{1,5}))?(" + rest + ")?", text)
    if not match or not 0 < int(match.group(3) or 1) < 65536:
        raise ValueError("no http(s) URL")
    scheme, host, port, path = match.groups("")
    scheme = scheme.lower()
    return scheme, host.lower(), int(port or DEFAULT_PORTS[scheme]), path

def normal_url(text: str) -> str:
    """An API URL as it is stored and compared (RFC 3986 §6.2.2.1, §6.2.3); raises Failure."""
    try:
        scheme, host, number, path = split_url(text, "/[a-z0-9._~%/@:,+=-]*")
    except ValueError:
        what = "an API URL must be http(s)://HOST, without user, query or fragment"
        raise Failure(what, "llamactl environments add " + DEFAULT_API_URL, EXIT_USAGE) from None
    port = "" if number == DEFAULT_PORTS[scheme] else ":%d" % number
    return scheme + "://" + host + port + path.rstrip("/")

def version_numbers(text: str) -> "List[int]":
    return [int(number) for number in re.findall("[0-9]{1,9}", text)]

def shell_safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9@._+-]+", "-", text).strip("-")[:80]

def free_name(wanted: str, taken: "Any") -> str:
    numbered = ("%s-%d" % (wanted, number) for number in range(2, len(taken) + 2))
    return next(name for name in numbered if name not in taken) if wanted in taken else wanted

def picked(answer: str, choices: "Choices", current: "Text") -> "Text":
    if not answer:
        return current
    numbered = [value for number, (value, _) in enumerate(choices, 1) if answer == str(number)]
    exact = [value for value, label in choices if answer in (value, label)]
    part = [value for value, label in choices if answer.lower() in (value + "\n" + label).lower()]
    found = numbered or exact or part
    return found[0] if len(found) == 1 else None

def listed(choices: "Choices") -> str:
    names = (value if label == value else "%s (%s)" % (value, label) for value, label in choices)
    return ", ".join(names) or "none"

def env_value(value: str) -> "Tuple[str, List[str]]":
    if re.fullmatch(SAFE_ENV_VALUE, value):
        return value, []
    in_double_quotes = "'" in value or "\\" in value
    readers = ["docker --env-file"]  # keeps quotes
    # python-dotenv expands ${...} in any quotes and knows no backslash before a dollar sign or `
    if "${" in value or in_double_quotes and re.search(r"[$`]|\\$", value):
        readers.append("python-dotenv")
    in_quotes = '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'
    return in_quotes if in_double_quotes else "'" + value + "'", readers

def env_lines(values: "Dict[str, str]") -> "List[str]":
    return [name + "=" + env_value(value)[0] for name, value in values.items()]

def updated_env(text: str, values: "Dict[str, str]") -> str:
    """The .env TEXT with VALUES assigned where they stood, else at the end; the rest stays."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text[len(mark):]
    ending = next((end for shape, end in ENV_ENDINGS if re.search(shape, text)), "\n")
    lines = dict(zip(values, env_lines(values)))
    missing, pieces, dangling, continued = dict(lines), [mark], False, False
    for line in re.finditer(ENV_LINE, text):
        others, indent, export, name, quoted, rest, end = line.groups("")
        if name in lines:
            # behind the value, Docker and systemd would take a comment for a part of it
            comment = re.search(ENV_COMMENT, " " + rest if quoted else rest)
            moved = indent + comment.group(1) + ending if comment else ""
            pieces += [moved, indent, export, lines[name], end]
            if not continued:  # else shells and systemd see no assignment here
                missing.pop(name, None)
        else:
            pieces.append(line.group())
        dangling = bool(re.search(ENV_DANGLING, rest))
        continued = dangling and (bool(name) or not rest.lstrip().startswith("#"))
    if missing:
        complete = not text or text.endswith(("\n", "\r"))  # else the last line end stays missing
        gap = ("" if complete else ending) + (ending if dangling else "")
        pieces += [gap, ending.join(missing.values()), ending if complete else ""]
    return "".join(pieces)

def parsed_object(content: bytes) -> "Optional[Json]":
    """The JSON object that CONTENT is; None where it is none, or not UTF-8."""
    def bounded(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError("a number of %d digits" % len(digits))
        return int(digits)  # which refuses NaN and Infinity

    try:
        value = json.loads(content.decode("utf-8-sig"), parse_int=bounded, parse_constant=bounded)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None

def decoded_segment(segment: "Any") -> bytes:
    """Base64url without padding, and nothing else (RFC 7515 §2)."""
    from base64 import urlsafe_b64decode
    sound = is_plain(segment) and re.fullmatch("[A-Za-z0-9_-]+", segment) and len(segment) % 4 != 1
    require(sound, "it is not base64url")
    return urlsafe_b64decode(segment + "=" * (-len(segment) % 4))

def decoded_object(segment: str) -> "Json":
    value = parsed_object(decoded_segment(segment))
    require(value is not None, "it holds no JSON object")
    return value or {}

def is_number(value: "Any", above: float = float("-inf")) -> bool:
    return type(value) in (int, float) and above < value and abs(value) < 1e300

def signing_key(jwks: "Json", kid: "Any") -> "Json":
    """The RSA key that a token names by KID, or {}; a lone key needs no name (OIDC Core §10.1)."""
    keys = [key for key in jwks["keys"] if isinstance(key, dict) and key.get("kty") == "RSA"
            and key.get("use") in (None, "sig") and key.get("alg") in [None] + list(DIGEST_INFO)]
    alone = len(keys) == 1 and None in (kid, keys[0].get("kid"))
    return next((key for key in keys if alone or kid is not None and key.get("kid") == kid), {})

def is_signed_by(key: "Json", algorithm: str, signed: bytes, signature: bytes) -> bool:
    """RSASSA-PKCS1-v1_5 verification by comparing the whole encoded message (RFC 8017 §8.2.2)."""
    import hashlib
    modulus, exponent = (int.from_bytes(decoded_segment(key.get(name)), "big") for name in "ne")
    bits = modulus.bit_length()
    sound = RSA_BITS[0] <= bits <= RSA_BITS[1] and 3 <= exponent < 1 << 33 and exponent % 2
    require(sound, "its RSA key is too small, too large or malformed")
    size, number = (bits + 7) // 8, int.from_bytes(signature, "big")
    if len(signature) != size or number >= modulus:
        return False
    hash_name, prefix = DIGEST_INFO[algorithm]
    digest = bytes.fromhex(prefix) + hashlib.new(hash_name, signed).digest()
    expected = b"\x00\x01" + b"\xff" * (size - len(digest) - 3) + b"\x00" + digest
    return pow(number, exponent, modulus).to_bytes(size, "big") == expected

def check_claims(claims: "Json", issuer: str, client_id: str, now: float) -> None:
    """ID token validation, OIDC Core §3.1.3.7; NOW in seconds since 1970."""
    audience, expires, not_before = (claims.get(name) for name in ("aud", "exp", "nbf"))
    audiences = audience if isinstance(audience, list) else [audience]
    alone, party = all(each == client_id for each in audiences), claims.get("azp")
    require(claims.get("iss") == issuer, "another issuer made it")
    require(client_id in audiences and (party == client_id or alone and party is None),
            "it is for another client")
    require(is_number(expires) and (not_before is None or is_number(not_before)),
            "it does not say how long it is valid")
    valid = (not_before or 0) - CLOCK_LEEWAY <= now <= (expires or 0) + CLOCK_LEEWAY
    require(valid, "it is not valid now; is this machine's clock right?")
    require(isinstance(claims.get("sub"), str) and claims["sub"], "it names no user")

# ==== terminal: data to stdout, words to stderr, questions where somebody can answer ==============
def controlling_terminal() -> "Any":
    with contextlib.suppress(OSError):  # none here, or none on this platform
        return open("/dev/tty")
    return None

def is_terminal(stream: "Any") -> bool:
    return stream is not None and not stream.closed and bool(stream.isatty())

def reason(error: Exception) -> str:
    """The operating system's own words for ERROR, without paths or values."""
    return getattr(error, "strerror", None) or type(error).__name__

class Terminal:
    """The user's side. What it must remember: which secrets to mask, what it has warned of."""
    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings, self.quiet = surroundings, False
        self.input = controlling_terminal() if surroundings.program_on_stdin else sys.stdin
        self.secrets = set()  # type: Set[str]
        self.warned = set()  # type: Set[str]

    def hide(self, secret: str) -> None:
        if len(secret) >= MIN_MASKED:
            self.secrets.add(secret)

    def data(self, text: str) -> None:
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
            raise Failure("standard output: " + reason(error)) from None

    def abandon(self, descriptor: int) -> None:
        """Send what is still buffered nowhere, so that the interpreter's exit stays quiet."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)

    def show(self, value: "Any", output: str, columns: str) -> None:
        if output in ("json", "yaml"):
            text = json_text(value) + "\n" if output == "json" else yaml_text(value)
        else:
            shown = [column.split("=") for column in columns.split()]
            rows = value if isinstance(value, list) else [value]
            cells = [[row.get(column[-1]) for column in shown] for row in rows]
            text = table_text([column[0].upper() for column in shown], cells) if cells else ""
        self.data(masked(text, self.secrets))

    def to_stderr(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # closed or hung up: nobody is left to tell
            self.abandon(2)

    def tell(self, text: str) -> None:
        text = masked(clean(text), self.secrets)
        self.to_stderr(re.sub(KEY_SHAPE, MASK, text) + "\n")  # one typed where none belongs

    def say(self, text: str) -> None:
        if not self.quiet:
            self.tell(text)

    def warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.tell("warning: " + text)

    def can_ask(self) -> bool:
        get, streams = self.surroundings.get, (self.input, sys.stderr)
        return all(map(is_terminal, streams)) and not get("CI") and get("TERM") != "dumb"

    def ask(self, question: str) -> str:
        """One line from the user; raises KeyboardInterrupt at Ctrl-C, Ctrl-D and a hang-up."""
        self.to_stderr(masked(clean(question), self.secrets))
        line = b""
        with contextlib.suppress(OSError):  # a hang-up
            line = self.input.buffer.readline()  # bytes, whatever the locale
        if not line.endswith(b"\n"):
            raise KeyboardInterrupt
        return str(line, "utf-8", "replace").strip()

    def ask_hidden(self, question: str) -> str:
        import getpass
        import warnings
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            answer = getpass.getpass(clean(question), sys.stderr).strip()
        except (EOFError, OSError):
            raise KeyboardInterrupt from None
        except getpass.GetPassWarning:
            raise Failure("this terminal cannot hide what is typed", code=EXIT_USAGE) from None
        except UnicodeDecodeError:  # which would quote it; getpass has not ended the line
            self.to_stderr("\n")
            raise Failure("what was typed is no text", code=EXIT_USAGE) from None
        self.hide(answer)
        return answer

    def choose(self, what: str, choices: "Choices", flag: str, current: "Text" = None) -> str:
        """Let the user pick one of CHOICES; where nobody can be asked, say which FLAG picks."""
        problem = "no %s given; name one with %s: %s" % (what, flag, listed(choices))
        require_usage(self.can_ask(), problem)
        current = current if current in dict(choices) else None
        for number, (value, label) in enumerate(choices, 1):
            name = label if label == value else "%s (%s)" % (label, value)
            self.tell("%s %3d  %s" % ("*" if value == current else " ", number, name))
        default = " [%s]" % current if current else ""
        while True:
            answer = self.ask("%s, by number or name%s: " % (what.capitalize(), default))
            found = picked(answer, choices, current)
            if found is not None:
                return found
            self.tell("%s is none of them, or part of several" % (answer or "an empty answer"))

    def countdown(self, expires_at: float) -> "Wait":
        """A sleep that shows meanwhile how long is left until EXPIRES_AT (monotonic seconds)."""
        capable = is_terminal(sys.stderr) and self.surroundings.get("TERM") != "dumb"
        shown = capable and not self.quiet
        blank = "\r" + " " * 20 + "\r"  # a narrow terminal must not wrap it

        def wait(seconds: float) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                left = divmod(max(0, int(expires_at - time.monotonic())), 60)
                self.to_stderr((blank + ("waiting, %d:%02d left" % left)[:20]) * shown)
                # by the second, since a Ctrl-C that comes just before a sleep is seen after it
                time.sleep(max(0.0, min(1.0, end - time.monotonic())))
            self.to_stderr(blank * shown)

        return wait

    def browse(self, url: str) -> None:
        """Open URL where a graphical browser is plausible."""
        get = self.surroundings.get
        remote = any(map(get, ("SSH_CONNECTION", "SSH_TTY", "SSH_CLIENT")))
        display = WINDOWS or MACOS or get("DISPLAY") or get("WAYLAND_DISPLAY")
        if remote or not display or not re.fullmatch("(?i)https?://[!-~]+", url):
            return
        import threading
        import webbrowser

        def start() -> None:
            with contextlib.suppress(webbrowser.Error, OSError, ValueError):  # nor is it missed
                browser = webbrowser.get()
                if os.path.basename(str(getattr(browser, "name", ""))) not in TEXT_BROWSERS:
                    browser.open(url)

        opening = threading.Thread(target=start, daemon=True)
        opening.start()
        opening.join(BROWSER_TIMEOUT)  # some browsers return only when they are closed

    def read_input(self) -> str:
        what = "standard input brought the program, so it cannot bring the key as well"
        require_usage(not self.surroundings.program_on_stdin, what, KEY_FILE_HINT)
        require_usage(sys.stdin is not None, "standard input is closed")
        return sys.stdin.buffer.read(MAX_KEY_BYTES).decode("utf-8", "replace").strip()

def replace_process(command: "List[str]", variables: "Dict[str, str]") -> int:
    """Become COMMAND; on Windows, where that would detach it, run it and return its exit code."""
    import signal
    require(command[0], "the command is empty", code=EXIT_NOT_FOUND)
    try:
        if WINDOWS:
            import subprocess
            return subprocess.call(command, env=variables)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores what programs die of
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], command, variables)
    except FileNotFoundError:
        raise Failure(command[0] + ": command not found", code=EXIT_NOT_FOUND) from None
    except OSError as error:
        raise Failure("%s: %s" % (command[0], reason(error)), code=EXIT_NOT_EXECUTABLE) from None

# ==== files: modes, locks, atomic replacement; the profile store; the .env file ===================
@contextlib.contextmanager
def failing_plainly(path: str, verb: str) -> "Iterator[None]":
    try:
        yield
    except (OSError, RecursionError, UnicodeError) as error:  # the latter two for an odd path
        raise Failure("%s cannot be %s: %s" % (path, verb, reason(error))) from None

def read_regular(path: str) -> "Optional[bytes]":
    """The content of the regular file PATH; None where there is none. Raises OSError."""
    unblocked = getattr(os, "O_NONBLOCK", 0)  # a FIFO must not hang its reader
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | unblocked)) as file:
            require(stat.S_ISREG(os.fstat(file.fileno()).st_mode), path + " is not a regular file")
            return file.read()
    except FileNotFoundError:
        return None

def read_key_file(path: str) -> str:
    with failing_plainly(path, "read"), open(path, "rb") as file:
        return file.read(MAX_KEY_BYTES).decode("utf-8-sig", "replace").strip()

def read_official(path: str) -> "Dict[str, List[Json]]":
    """The official client's tables in the SQLite file PATH, which is opened to be read alone."""
    try:
        import sqlite3
    except ImportError:
        raise Failure("this Python has no sqlite3 module, which reads " + path) from None
    from urllib.parse import quote
    path = os.path.realpath(path)  # beside which SQLite looks for its logs
    require(os.path.isfile(path), "there is no " + path)
    # immutable keeps SQLite from making files beside it; a write-ahead log in use must be read
    used, logged, undone = (os.path.exists(path + end) for end in ("-shm", "-wal", "-journal"))
    crashed = logged and not used or undone and os.path.getsize(path + "-journal")
    require(not crashed, path + " was left by a crash; start the official client once")
    url = "file:%s?mode=ro%s" % (quote(os.fsencode(path)), "" if used else "&immutable=1")
    try:
        with contextlib.closing(sqlite3.connect(url, uri=True)) as database:
            database.row_factory = sqlite3.Row
            return {table: [dict(row) for row in database.execute("SELECT * FROM " + table)]
                    for table in ("profiles", "environments", "settings")}
    except sqlite3.Error as error:
        raise Failure("%s is no store of the official client: %s" % (path, error)) from None

def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

def make_private_folder(path: str) -> None:
    if not os.path.isdir(path):
        make_private_folder(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # by another process; a file fails when used
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)

def write_through(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left):]
    os.fsync(descriptor)

def write_new(path: str, content: bytes, like: "Optional[os.stat_result]" = None) -> None:
    """Write the file PATH anew, 0600 or with the mode and owner of LIKE. Raises OSError."""
    remove(path)
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        if not WINDOWS:
            if like:
                os.fchown(file.fileno(), like.st_uid, like.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode) if like else 0o600)
        write_through(file.fileno(), content)

def rename(source: str, target: str) -> None:
    """Put SOURCE in TARGET's place in one step. Raises OSError."""
    end = time.monotonic() + RENAME_TIMEOUT
    while True:
        try:
            os.replace(source, target)
            break
        except PermissionError:  # Windows, while a reader has TARGET open, which is never for long
            if not WINDOWS or time.monotonic() > end:
                raise
            time.sleep(LOCK_PAUSE)
    with contextlib.suppress(OSError):  # it is done, and not every system syncs folders
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

def try_lock(descriptor: int) -> bool:
    """Take the kernel's exclusive lock, which ends with the descriptor or the process."""
    try:
        with contextlib.suppress(ImportError):  # no locks then, and the README says so
            if WINDOWS:
                import msvcrt
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise

@contextlib.contextmanager
def exclusive(path: str, *passing: str) -> "Iterator[None]":
    """Hold the lock file PATH, then remove those PASSING. Raises OSError and Failure."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if not WINDOWS and os.fstat(descriptor).st_nlink == 1:  # another name may be anyone's
                os.fchmod(descriptor, 0o600)  # whatever the umask left of it
            while not try_lock(descriptor):
                require(time.monotonic() < end, path + " is locked by another process")
                time.sleep(LOCK_PAUSE)
            held = False
            with contextlib.suppress(FileNotFoundError):  # its last holder removed it
                held = os.path.samestat(os.stat(path), os.fstat(descriptor))
            if held:
                try:
                    yield
                finally:
                    with contextlib.suppress(PermissionError):  # Windows keeps what is open
                        for each in passing:
                            remove(each)
                return
        finally:
            os.close(descriptor)

TEXT, NUMBER, NOTHING = (str, type(None)), (int, float), type(None)
PROFILE_SHAPE = dict.fromkeys("api_key api_key_id project_id project_name org_id sub issuer email "
                              "access_token refresh_token".split(), TEXT)  # type: Json
PROFILE_SHAPE.update(auth_type=str, access_expires_at=NUMBER + (NOTHING,))
WAITING_SHAPE = {"device_code": str, "expires_at": NUMBER, "interval": NUMBER, "issuer": TEXT}
STORE_SHAPE = {"version": int, "current_environment": TEXT, "environments": {"*": {
    "current_profile": TEXT, "min_llamactl_version": TEXT, "profiles": {"*": PROFILE_SHAPE},
    "login": [NOTHING, WAITING_SHAPE]}}}

def fits(value: "Any", shape: "Any") -> bool:
    if isinstance(shape, list):
        return any(fits(value, each) for each in shape)
    if not isinstance(shape, dict):
        return isinstance(value, shape) and not isinstance(value, bool)
    if not isinstance(value, dict):
        return False
    shapes = dict.fromkeys(value, shape["*"]) if "*" in shape else shape
    return all(fits(value.get(name), each) for name, each in shapes.items())

def serialized_store(data: "Json") -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode("ascii") + b"\n"

def empty_store() -> "Json":
    return {"version": STORE_VERSION, "current_environment": None, "environments": {}}

def current_url(data: "Json") -> str:
    return data.get("current_environment") or DEFAULT_API_URL

def environment(data: "Json", api_url: "Text" = None) -> "Json":
    new = {"requires_auth": True, "current_profile": None, "profiles": {}}  # type: Json
    record = data["environments"].setdefault(api_url or current_url(data), new)  # type: Json
    return record

def is_open_to_others(path: str, mode: int) -> bool:
    found = os.stat(path)
    return not WINDOWS and (bool(found.st_mode & mode) or found.st_uid not in (0, os.geteuid()))

class Store:
    """profiles.json: the environments, each with its profiles and its current one."""
    def __init__(self, folder: "Text", warn: "Tell") -> None:
        self.folder, self.warn = folder or "", warn
        self.path = os.path.realpath(os.path.join(self.folder or os.sep, STORE_NAME))
        self.official = os.path.join(self.folder or os.sep, OFFICIAL_STORE)
        self._new, self._written = self.path + ".new", b""

    def load(self) -> "Json":
        with failing_plainly(self.path, "read"):
            return self._read() if self.folder else empty_store()

    def _read(self) -> "Json":
        """The content, an empty store's where there is none yet. Raises OSError and Damaged."""
        content = read_regular(self.path)
        for path in filter(os.path.exists, (os.path.dirname(self.path), self.path)):
            if is_open_to_others(path, 0o022):
                self.warn("others can write to %s; choose a folder with %s" % (path, VAR_FOLDER))
        if content is None:
            return empty_store()
        data = parsed_object(content) or {}
        newer = type(data.get("version")) is int and data["version"] > STORE_VERSION
        require(not newer, self.path + " was written by a newer llamactl.py; it stays as it is")
        if not fits(data, STORE_SHAPE):
            raise Damaged(self.path + " is damaged; the next change sets it aside", LOGIN_HINT)
        return data

    @contextlib.contextmanager
    def change(self) -> "Iterator[Json]":
        """Lock the store, yield its content, and save it if it is different afterwards."""
        require(self.folder, "there is no home to keep profiles in", "export %s=PATH" % VAR_FOLDER)
        with failing_plainly(self.path, "changed"):
            make_private_folder(os.path.dirname(self.path))
            with exclusive(self.path + ".lock", self._new):
                data = self._read_to_write()
                yield data
                self.save(data)

    def _read_to_write(self) -> "Json":
        try:
            data = self._read()
            self._written = serialized_store(data)
        except (Damaged, RecursionError, ValueError):  # the latter two: not to be written again
            self._set_aside()
            return self._read_to_write()
        if os.path.exists(self.path) and os.stat(self.path).st_mode & 0o077:
            os.chmod(self.path, 0o600)
        return data

    def save(self, data: "Json") -> None:
        content = serialized_store(data)
        if content != self._written:
            write_new(self._new, content)
            rename(self._new, self.path)
            self._written = content

    def check_writable(self) -> "Json":
        with self.change() as data:
            content = read_regular(self.path)
            write_new(self._new, content or serialized_store(data))
            if content:  # where it is mounted or immutable, nothing can take its place
                rename(self._new, self.path)
        return data

    def _set_aside(self) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        folder, name = os.path.split(self.path)
        aside = os.path.join(folder, free_name(name + DAMAGED + stamp, os.listdir(folder)))
        os.chmod(self.path, 0o600)
        os.rename(self.path, aside)
        self.warn("%s was damaged; it is kept as %s" % (self.path, aside))

    def remains(self, secrets: "Sequence[str]") -> "List[str]":
        """The files that may still hold SECRETS, or cannot be read."""
        folder = os.path.dirname(self.path)
        try:
            found = [os.path.join(folder, name) for name in os.listdir(folder) if DAMAGED in name]
            content = read_regular(self.official) or b""
        except (OSError, Failure):
            return [self.official]
        secret_stays = any(secret.encode("utf-8", "replace") in content for secret in secrets)
        return found + [self.official] * secret_stays

def replace_env(real: str, edit: "Callable[[Optional[bytes]], bytes]") -> None:
    lock, new = real + ".llamactl-lock", real + ".llamactl-new"
    with exclusive(lock, new, lock):
        now = read_regular(real)  # another process may have written meanwhile
        write_new(new, edit(now), None if now is None else os.stat(real))
        rename(new, real)

def rewrite_env(path: str, edit: "Callable[[str], str]", warn: "Tell") -> bool:
    """Replace the .env file PATH by what EDIT makes of its text; False where nothing changes."""
    def edited(content: "Optional[bytes]") -> bytes:
        try:
            return edit((content or b"").decode("utf-8")).encode("utf-8")
        except UnicodeDecodeError:
            raise Failure("%s is not UTF-8 text; it is left as it is" % path) from None

    with failing_plainly(path, "written"):
        real = os.path.realpath(path)
        before = read_regular(real)
        if edited(before) == before:
            return False
        os.makedirs(os.path.dirname(real), exist_ok=True)
        if before is not None and is_open_to_others(real, 0o044):
            warn("others can read " + path)
        try:
            replace_env(real, edited)
        except OSError as error:
            if before is None or error.errno not in UNRENAMABLE:
                raise
            warn("%s is written in place, so a crash meanwhile would tear it" % path)
            with open(real, "rb+", buffering=0) as file:
                content = file.read()
                size, content = len(content), edited(content)
                try:
                    write_through(file.fileno(), content[size:])  # first what needs more room
                    file.seek(0)
                    write_through(file.fileno(), content)
                    size = len(content)
                finally:
                    file.truncate(size)
    return True

# ==== http: the one place that sends anything; urllib and ssl live here ===========================
class Answer(namedtuple("Answer", "status headers body origin")):
    """A server's whole answer, and the scheme, host and port it came from."""

    def json(self) -> "Json":
        value = parsed_object(self.body)
        require_sense(value is not None, self.origin + " sent no JSON object")
        return value or {}

    def checked(self) -> "Answer":
        if 200 <= self.status < 300:
            return self
        message = "%s answered %d%s" % (self.origin, self.status, self.explanation())
        if self.status == 429 or self.status >= 500:
            raise Unreachable(message, FAILING)
        hint, code = (LOGIN_HINT, EXIT_REJECTED) if self.status == 401 else ("", EXIT_FAILED)
        raise Refused(message, self.status, hint, code)

    def explanation(self) -> str:
        """The server's `detail` (FastAPI) or error (RFC 6749 §5.2), and the request's id."""
        body = parsed_object(self.body) or {}
        detail = body.get("detail") or body.get("error_description") or body.get("error")
        if isinstance(detail, list):
            detail = "; ".join(str(each.get("msg")) for each in detail if isinstance(each, dict))
        request = self.headers.get("x-request-id") or self.headers.get("x-correlation-id")
        text = ": " + shortened(detail) if detail and isinstance(detail, str) else ""
        return text + (" (request %s)" % shortened(request) if request else "")

def origin_of(url: str) -> str:
    """The scheme, host and port of URL, if it is one to send to: http(s), nobody's password."""
    try:
        scheme, host, port, _ = split_url(url, "[/?][!-~]*")
    except ValueError:
        raise Failure("a server named no plain http(s) URL: " + shortened(url)) from None
    return "%s://%s:%d" % (scheme, host, port)

def trusted_url(named: "Any", api_url: str) -> str:
    """NAMED, which a server of the environment API_URL named, if secrets may go there."""
    require_sense(isinstance(named, str), api_url + " named no URL where one belongs")
    safe = origin_of(named).startswith("https:") or api_url.startswith("http:")
    require(safe, "a server named a URL that is not https: " + shortened(named))
    return str(named)

def address(base: str, path: str, *names: str, **query: "Text") -> str:
    from urllib.parse import quote, urlencode
    require(not {".", ".."}.intersection(names), "no name is made of dots alone")
    given = {name: value for name, value in query.items() if value is not None}
    url = base + "/".join([path] + [quote(name, safe="", errors="replace") for name in names])
    return url + ("?" + urlencode(given, errors="replace") if given else "")

def ca_bundle(surroundings: Surroundings) -> "Tuple[Text, Text, str]":
    """File and folder of trusted certificates (neither: OpenSSL's own), and what named them."""
    try:
        import ssl
    except ImportError:
        return None, None, "none: this Python has no ssl module"
    file, folder = surroundings.get("SSL_CERT_FILE"), surroundings.get("SSL_CERT_DIR")
    if file or folder:
        return file, folder, "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
    for variable in filter(surroundings.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")):
        path = surroundings.get(variable) or ""
        return (None, path, variable) if os.path.isdir(path) else (path, None, variable)
    own = ssl.get_default_verify_paths()
    if own.cafile or WINDOWS or own.capath and os.listdir(own.capath):
        return None, None, own.cafile or own.capath or "the system's store"
    found = next(filter(os.path.exists, CA_BUNDLES), None)
    return found, None, "search" if found else "none found"

def tls_context(surroundings: Surroundings) -> "ssl.SSLContext":
    try:
        import ssl
    except ImportError:
        raise Failure("this Python has no ssl module, so it cannot use https") from None
    file, folder, source = ca_bundle(surroundings)
    with failing_plainly("%s (from %s)" % (file or folder or "OpenSSL's store", source), "trusted"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default one obeys SSLKEYLOGFILE
        if file or folder:
            context.load_verify_locations(file, folder)
        else:
            context.load_default_certs()
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context

def proxy_for(url: str) -> "Text":
    from urllib.request import getproxies, proxy_bypass
    scheme, _, rest = url.lower().partition("://")
    proxy = None if proxy_bypass(re.split("[/?]", rest)[0]) else getproxies().get(scheme)
    return re.sub("(?s)^([^/:]+://)?.*@", r"\1", proxy) if proxy else None

def fetched(request: "Request", surroundings: Surroundings, answer_began: "Act") -> Answer:
    """The answer, by urllib for http and https alone; calls ANSWER_BEGAN at its first byte."""
    import http.client
    import urllib.request

    class Response(http.client.HTTPResponse):
        def begin(self) -> None:
            if self.fp.peek(1):
                answer_began()
            super().begin()

    def answering(kind: "Any") -> "Any":
        return type(kind.__name__, (kind,), {"response_class": Response})

    class Handler(urllib.request.AbstractHTTPHandler):
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: "Request") -> "Any":
            return self.do_open(answering(http.client.HTTPConnection), request)

        def https_open(self, request: "Request") -> "Any":
            context = tls_context(surroundings)
            return self.do_open(answering(http.client.HTTPSConnection), request, context=context)

    origin = origin_of(request.full_url)
    opener = urllib.request.OpenerDirector()  # without file, ftp, data and redirect handlers
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(Handler())
    with opener.open(request, timeout=PAUSE_TIMEOUT) as response:
        body = response.read(MAX_ANSWER + 1)
    require_sense(len(body) <= MAX_ANSWER, origin + " sent more than %d MiB" % (MAX_ANSWER >> 20))
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return Answer(response.status, response.headers, body, origin)

def explained(error: Exception, origin: str, answered: bool) -> Unreachable:
    """What urllib, http.client, ssl or a socket stumbled over, in words that quote no request."""
    from http.client import HTTPException, IncompleteRead
    from socket import gaierror, timeout
    cause = getattr(error, "reason", None)
    cause = cause if isinstance(cause, Exception) else error  # ssl's errors have a text there
    tunnel = re.match("Tunnel connection failed: ([0-9]+)", str(cause))
    if tunnel:
        stage = CUT if tunnel.group(1) >= "5" else NONSENSE
        return Unreachable("%s: its proxy answered %s" % (origin, tunnel.group(1)), stage)
    if "ssl" in type(cause).__module__:  # _ssl, _cffi_ssl… elsewhere
        if not answered and "EOF" not in type(cause).__name__:
            words = getattr(cause, "verify_message", "") or getattr(cause, "reason", "")
            text = "%s: TLS failed: %s" % (origin, words or "the certificate does not fit")
            return Unreachable(text, NONSENSE, "llamactl auth status")
        cause = ConnectionError()  # whatever OpenSSL calls it
    unroutable = OSError if getattr(cause, "errno", None) in UNROUTABLE else ()
    kinds = (  # the first that fits
        ((gaierror, UnicodeError), "its name cannot be resolved", CONNECT),
        (ConnectionRefusedError, "it refused the connection", CONNECT),
        (unroutable, "there is no way to it", CONNECT),
        (timeout, "it fell silent", SLOW if answered else SILENCE),
        ((ConnectionError, IncompleteRead), "the connection was cut off", CUT),
        ((HTTPException, ValueError), "it does not speak HTTP", NONSENSE),
        (Exception, reason(cause), CUT))  # type: Any
    words, stage = next(meaning for kind, *meaning in kinds if isinstance(cause, kind))
    return Unreachable("%s: %s" % (origin, words), stage)

class Client:
    """Sends every request. Its state: when all must be done, and whom to tell which secrets go."""
    def __init__(self, surroundings: Surroundings, hide: "Tell", warn: "Tell",
                 sleep: "Wait" = time.sleep, deadline: "Optional[float]" = None) -> None:
        self.surroundings, self.hide, self.warn = surroundings, hide, warn
        self.sleep, self.deadline = sleep, deadline

    def get(self, url: str, token: "Text" = None) -> "Json":
        return self.send("GET", url, token).checked().json()

    def post_form(self, url: str, form: "Dict[str, str]", once: bool = False) -> Answer:
        from urllib.parse import quote_plus, urlencode
        for secret in (form.get(name, "") for name in ("device_code", "refresh_token", "token")):
            self.hide(secret)
            self.hide(quote_plus(secret, errors="replace"))
        body = urlencode(form, errors="replace").encode("ascii")
        return self.send("POST", url, None, body, "application/x-www-form-urlencoded", once)

    def send(self, method: str, url: str, token: "Text" = None, body: "Optional[bytes]" = None,
             kind: str = "", once: bool = False) -> Answer:
        """The server's answer, after as many retries and redirects as are safe; raises Failure."""
        from urllib.parse import urljoin
        headers = {"User-Agent": "llamactl/" + __version__, "Accept": "application/json"}
        if kind:
            headers["Content-Type"] = kind
        if token is not None:
            self.hide(token)
            if re.match(IN_CLEAR, url):
                self.warn(origin_of(url) + " is not encrypted: keys can be read on the way")
            headers["Authorization"] = "Bearer " + plain(token, "the API key")
        for _ in range(MAX_REDIRECTS + 1):
            attempt = partial(self.exchange, method, url, headers, body)
            answer = self._retried(attempt, method == "GET", once)
            if answer.status not in REDIRECT_STATUS:
                return answer
            with contextlib.suppress(ValueError):  # a host that is none: the circle below ends it
                url = urljoin(url, answer.headers.get("Location") or "")
            stays = method == "GET" and origin_of(url) == answer.origin
            require(stays, "%s redirects to %s, which is refused" % (answer.origin, shortened(url)))
        raise Failure(answer.origin + " redirects in a circle")

    def _retried(self, attempt: "Callable[[], Answer]", idempotent: bool, once: bool) -> Answer:
        """One exchange, tried again only where the server cannot have acted on the first try."""
        started = time.monotonic()
        for pause in () if once or self.deadline else RETRY_DELAYS:
            try:
                answer = attempt()
                asked = (answer.headers.get("Retry-After") or "").strip()
                pause = float(asked) if asked.isdecimal() else pause
                retried = idempotent and answer.status in RETRIED_STATUS
                if not retried or pause > MAX_RETRY_AFTER:
                    return answer
            except Unreachable as failure:
                safe = failure.stage == CONNECT or failure.stage == CUT and idempotent
                if not safe or time.monotonic() - started > ANSWER_TIMEOUT:
                    raise
            self.sleep(pause)
        return attempt()

    def exchange(self, method: str, url: str, headers: "Json", body: "Optional[bytes]") -> Answer:
        """Send one request and read its whole answer in time; raises Failure."""
        import threading  # neither a name look-up nor a row of dead addresses heeds a time-out
        from urllib.request import Request
        origin, end = origin_of(url), self.deadline or time.monotonic() + WHOLE_TIMEOUT
        began = threading.Event()
        answers, failures = [], []  # type: List[Answer], List[Failure]

        def run() -> None:
            try:
                request = Request(url, body, headers, method=method)  # noqa: S310 (origin_of did)
                answers.append(fetched(request, self.surroundings, began.set))
            except Failure as failure:
                failures.append(failure)
            except Exception as error:  # handed over to the thread that waits
                failures.append(explained(error, origin, began.is_set()))
            began.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        if not began.wait(max(0.0, min(ANSWER_TIMEOUT, end - time.monotonic()))):
            raise Unreachable(origin + ": no answer in time", SILENCE)
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            raise Unreachable(origin + ": the answer was not whole in time", SLOW)
        if failures:
            raise failures[0]
        return answers[0]

# ==== oauth: the device flow, refresh, revocation and the ID token, for any OpenID provider =======
# the endpoints of OpenID Connect Discovery §3, RFC 8414 §2 and RFC 8628 §4
Provider = namedtuple("Provider", "issuer client_id device token jwks revocation")

def configured_provider(client: Client, api_url: str, discovery: str, client_id: str) -> Provider:
    """Read the provider's configuration; each URL in it must be as trusted as API_URL itself."""
    answer = client.get(trusted_url(discovery, api_url))
    issuer, revocation = answer.get("issuer"), answer.get("revocation_endpoint")
    require_sense(isinstance(issuer, str), origin_of(discovery) + " names no issuer")
    names = ("device_authorization_endpoint", "token_endpoint", "jwks_uri")
    offered = answer.get(names[0]) is not None
    require(offered, "the identity provider has no device flow", "llamactl auth token")
    urls = [trusted_url(answer.get(name), api_url) for name in names]
    urls.append(trusted_url(revocation, api_url) if revocation is not None else "")
    return Provider(issuer, client_id, *urls)

def request_device_code(client: Client, provider: Provider) -> "Json":
    """RFC 8628 §3.1 and §3.2, all defaults filled in; `expires_in` and `interval` in seconds."""
    form = {"client_id": provider.client_id, "scope": "email offline_access openid profile"}
    answer = client.post_form(provider.device, form).checked().json()
    code = {name: answer.get(name) for name in ("verification_uri", "user_code", "device_code")}
    whole = all(text and isinstance(text, str) for text in code.values())
    lasts = is_number(answer.get("expires_in"), above=0)
    require_sense(whole and lasts, origin_of(provider.device) + " sent no whole device code")
    client.hide(answer["device_code"])
    complete, paced = answer.get("verification_uri_complete"), answer.get("interval")
    interval = answer["interval"] if is_number(paced, above=0) else DEFAULT_INTERVAL
    return dict(code, issuer=provider.issuer,
                interval=min(max(interval, MIN_INTERVAL), MAX_CODE_LIFETIME),
                verification_uri_complete=complete if isinstance(complete, str) else None,
                expires_at=int(time.time() + min(answer["expires_in"], MAX_CODE_LIFETIME)))

def poll_for_tokens(poll: "Callable[[], Answer]", interval: float, expires_at: float,
                    wait: "Wait", clock: "Callable[[], float]") -> "Json":
    """The token answer, once approved (RFC 8628 §3.4, §3.5); times in seconds; raises Failure."""
    pause, trouble = interval, None  # type: float, Optional[Unreachable]
    while True:
        wait(max(0.0, min(pause, expires_at - clock())))
        if clock() >= expires_at:
            raise trouble or Failure(POLL_ENDS["expired_token"], LOGIN_HINT, EXIT_REJECTED)
        try:
            answer = poll()
            error = (parsed_object(answer.body) or {}).get("error")
            if error not in POLL_ERRORS:
                answer.checked()
        except Unreachable as failure:
            if failure.stage == NONSENSE:
                raise
            pause, trouble = pause * 2, failure
            continue
        if error is None:
            return answer.json()
        require_sense(error in POLL_ERRORS, answer.origin + " sent an error as if it were none")
        if error in POLL_ENDS:
            raise Failure(POLL_ENDS[error], LOGIN_HINT, EXIT_REJECTED)
        interval += SLOW_DOWN if error == "slow_down" else 0
        pause, trouble = interval, None

class Tokens:
    """A login's own tokens; the state is `saved`, the fields of the profile that hold them."""
    def __init__(self, client: Client, provider: "Any", saved: "Json", on_rotation: "Act") -> None:
        self.client, self.provider = client, provider
        self.saved, self.on_rotation = saved, on_rotation

    def take(self, answer: "Json") -> None:
        """Adopt a token endpoint's answer (RFC 6749 §5.1), the rotated refresh token with it."""
        access, refresh = answer.get("access_token"), answer.get("refresh_token")
        require_sense(is_plain(access), "the identity provider sent no access token")
        for secret in (access, refresh, answer.get("id_token")):
            self.client.hide(str(secret or ""))
        lasts = is_number(answer.get("expires_in"), above=0)  # where it is unknown, a 401 will tell
        expires_at = time.time() + answer["expires_in"] if lasts else None
        self.saved.update(access_token=access, access_expires_at=expires_at)
        if is_plain(refresh):
            self.saved["refresh_token"] = refresh

    def fresh(self) -> str:
        expires_at = self.saved.get("access_expires_at")
        if expires_at is not None and expires_at - TOKEN_LEEWAY < time.time():
            self.renew()
        return self.saved.get("access_token") or ""

    def renew(self) -> None:
        """RFC 6749 §6, once: the provider ends a login whose old refresh token comes again."""
        refresh = self.saved.get("refresh_token")
        if refresh and self.provider:
            form = {"grant_type": "refresh_token", "refresh_token": refresh,
                    "client_id": self.provider.client_id}
            self.take(self.client.post_form(self.provider.token, form, True).checked().json())
            self.on_rotation()

    def revoke(self) -> None:
        """RFC 7009 §2.1, where the provider offers it."""
        refresh = self.saved.get("refresh_token")
        if refresh and self.provider and self.provider.revocation:
            form = {"token": refresh, "token_type_hint": "refresh_token",
                    "client_id": self.provider.client_id}
            self.client.post_form(self.provider.revocation, form, True).checked()

def provider_key(client: Client, provider: Provider, kid: "Any") -> "Json":
    for _ in range(2):
        jwks = client.get(provider.jwks)
        require_sense(isinstance(jwks.get("keys"), list), "the identity provider sent no key set")
        key = signing_key(jwks, kid)
        if key:
            return key
    raise Failure("no key of the provider's fits it")

def verified_claims(client: Client, provider: Provider, id_token: "Any", now: float) -> "Json":
    """The claims of a login's ID token, after every check of OIDC Core §3.1.3.7."""
    try:
        require(isinstance(id_token, str) and id_token.count(".") == 2, "it is no signed JWT")
        signed, _, signature = id_token.rpartition(".")
        head, body = map(decoded_object, signed.split("."))
        algorithm = str(head.get("alg"))
        accepted = algorithm in DIGEST_INFO and "crit" not in head
        require(accepted, "it is signed in a way that is not accepted")
        key = provider_key(client, provider, head.get("kid"))
        sound = is_signed_by(key, algorithm, signed.encode("ascii"), decoded_segment(signature))
        require(sound, "its signature is wrong")
        check_claims(body, provider.issuer, provider.client_id, now)
    except (Unreachable, Refused):
        raise
    except Failure as failure:
        raise Failure("the identity provider's ID token is refused: " + failure.message) from None
    return body

# ==== api: one function an endpoint, plain data out ===============================================
def field(answer: "Json", name: str, kind: "Any", default: "Any" = None) -> "Any":
    value = default if answer.get(name) is None else answer[name]
    sound = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    require_sense(sound, "the server's answer has no usable '%s'" % name)
    return value

def text_or_none(answer: "Json", *names: str) -> "Text":
    return next(filter(None, (field(answer, name, str, "") for name in names)), None)

def objects(answer: "Json", name: str) -> "List[Json]":
    found = field(answer, name, list)
    sound = all(isinstance(row, dict) for row in found)
    require_sense(sound, "the server's '%s' are no objects" % name)
    return list(found)

def get_version(client: Client, api_url: str) -> "Json":
    answer = client.get(address(api_url, VERSION_PATH))
    field(answer, "version", str)
    return {"requires_auth": field(answer, "requires_auth", bool, False),
            "min_llamactl_version": text_or_none(answer, "min_llamactl_version"),
            "capabilities": field(answer, "capabilities", list, [])}

def get_organizations(client: Client, api_url: str, key: "Text") -> "List[Json]":
    answer = client.get(address(api_url, API + "/organizations"), key)
    return [{"org_id": field(row, "org_id", str), "org_name": field(row, "org_name", str),
             "is_default": field(row, "is_default", bool, False)}
            for row in objects(answer, "organizations")]

def get_projects(client: Client, api_url: str, key: "Text", org: "Text" = None) -> "List[Json]":
    answer = client.get(address(api_url, API + "/list-projects", org_id=org), key)
    rows = objects(answer, "projects")
    sound = all(is_plain(row.get("project_id")) and row["project_id"] != key for row in rows)
    require_sense(sound, "the server's answer has no usable 'project_id'")
    return [{"project_id": row["project_id"],
             "project_name": text_or_none(row, "project_name", "project_id"),
             "deployment_count": field(row, "deployment_count", int, 0),
             "active": False,
             "org_id": field(row, "org_id", str, "default")} for row in rows]

def deployment(row: "Json") -> "Json":
    """A deployment as it is shown: what was asked for in `spec`, what is in `status`."""
    secrets = [name for name in field(row, "secret_names", list, []) if isinstance(name, str)]
    spec = {"repo_url": field(row, "repo_url", str, ""),
            "deployment_file_path": text_or_none(row, "deployment_file_path"),
            "git_ref": text_or_none(row, "git_ref"),
            "appserver_version": text_or_none(row, "appserver_version", "llama_deploy_version"),
            "suspended": field(row, "suspended", bool, False),
            "secrets": dict.fromkeys(secrets, MASK) or None,
            "personal_access_token": MASK if row.get("has_personal_access_token") else None}
    status = {"phase": field(row, "status", str)}  # type: Json
    for name in ("git_sha", "apiserver_url", "project_id", "warning"):
        status[name] = text_or_none(row, name)
    return {"name": field(row, "id", str),
            "generate_name": text_or_none(row, "display_name", "name"),
            "spec": {name: value for name, value in spec.items() if value is not None},
            "status": status}

def get_deployments(client: Client, url: str, key: "Text", project: str,
                    name: "Text") -> "List[Json]":
    names = [name] if name else []
    answer = client.get(address(url, API, *names, project_id=project), key)
    return [deployment(row) for row in ([answer] if name else objects(answer, "deployments"))]

def find_provider(client: Client, api_url: str, issuer: "Text" = None) -> Provider:
    """The identity provider of API_URL; raises Failure if it is not ISSUER, where one is given."""
    found = client.send("GET", address(api_url, DISCOVERY_PATH))
    what = "%s has no browser login%s" % (api_url, found.explanation())
    require(found.status not in (400, 404, 501), what, "llamactl auth token")
    answer = found.checked().json()
    clients = field(answer, "client_ids", dict, {})
    ids = [clients["cli"]] if clients.get("cli") else list(clients.values())
    what = api_url + " names no OAuth client for llamactl"
    require(len(ids) == 1 and is_plain(ids[0]), what, "llamactl auth token")
    provider = configured_provider(client, api_url, field(answer, "discovery_url", str), ids[0])
    require(issuer in (None, provider.issuer), api_url + " names another identity provider now")
    return provider

def is_key_gone(client: Client, api_url: str, key: str) -> bool:
    """Whether the server says that KEY works no more; where it cannot say, the key stays."""
    with contextlib.suppress(Failure):
        return bool(client.send("GET", address(api_url, ME_PATH), key).status == 401)
    return False

def create_key(client: Client, api_url: str, access_token: str, name: str) -> "Tuple[str, str]":
    """Make an API key; its id and the key itself, which the server shows this once."""
    body = json.dumps({"name": name, "project_id": None}).encode("ascii")
    url = address(api_url, KEYS_PATH)
    answer = client.send("POST", url, access_token, body, "application/json").checked().json()
    key_id, key = field(answer, "id", str), field(answer, "redacted_api_key", str)
    client.hide(key)
    require_sense(is_plain(key) and key_id, "the server made an API key that is none")
    return key_id, key

def delete_key(client: Client, api_url: str, access_token: str, key_id: str) -> None:
    answer = client.send("DELETE", address(api_url, KEYS_PATH, key_id), access_token)
    if answer.status != 404:
        answer.checked()

# ==== session: which credential a command uses and whence; how profiles are kept and ended ========
# A key and a project for one URL from one source: the profile with its `record`, or variables
Credential = namedtuple("Credential", "api_url api_key project_id profile record")

def credential_of_variables(surroundings: Surroundings, project: "Text", needs_project: bool,
                            warn: "Tell") -> "Optional[Credential]":
    """The environment's credential; None, after a warning, where it is not a full one."""
    get = surroundings.get
    key, project, url = get(VAR_API_KEY), project or get(VAR_PROJECT), get(VAR_API_URL)
    if surroundings.uses_profile():
        return None
    if not key:
        for name in filter(get, (VAR_PROJECT, VAR_API_URL)):
            warn("%s changes nothing without %s" % (name, VAR_API_KEY))
        return None
    if needs_project and not project:
        warn("%s without %s: the profile is used" % (VAR_API_KEY, VAR_PROJECT))
        return None
    url, key = normal_url(url or DEFAULT_API_URL), plain(key, VAR_API_KEY)
    return Credential(url, key, plain(project, "the project id") if project else None, None, {})

def selected_profile(data: "Json", url: str, named: "Text") -> "Text":
    """The profile NAMED, else the current one of URL; None where no auth is required there."""
    record = environment(data, url)
    name = named or record.get("current_profile")
    if name in record["profiles"]:
        return str(name)
    there = listed([(each, each) for each in sorted(record["profiles"])])
    require(not name, "%s has no profile %s; there: %s" % (url, name, there), "llamactl auth get")
    if not record.get("requires_auth", True):
        return None
    if record["profiles"]:
        raise Failure("no profile of %s is current" % url, "llamactl auth use NAME", EXIT_REJECTED)
    raise Failure("not logged in to " + url, LOGIN_HINT, EXIT_REJECTED)

def credential_of_profile(
        surroundings: Surroundings, data: "Json", named: "Text", project: "Text") -> Credential:
    url = current_url(data)
    name = selected_profile(data, url, named or surroundings.get(VAR_PROFILE))
    record = environment(data, url)["profiles"][name] if name else {}
    key = plain(record["api_key"], "the stored API key") if record.get("api_key") else None
    chosen = plain(project, "--project") if project else record.get("project_id")
    return Credential(url, key, chosen, name, record)

def resolve(surroundings: Surroundings, store: Store, named: "Text", project: "Text",
            needs_project: bool) -> Credential:
    """A command's credential: of the profile NAMED, else of variables, else of the current one."""
    warn = store.warn
    found = None if named else credential_of_variables(surroundings, project, needs_project, warn)
    if found is None:
        return credential_of_profile(surroundings, store.load(), named, project)
    with contextlib.suppress(Failure):  # variables never fail on the state of the store
        record = environment(store.load())
        name = surroundings.get(VAR_PROFILE) or record.get("current_profile")
        stored = "profile %s" % name if name in record["profiles"] else "a stored profile"
        if record["profiles"]:
            text = "%s is used instead of %s; set %s=1 to use profiles"
            warn(text % (VAR_API_KEY, stored, VAR_USE_PROFILE))
    return found

def refuse_login_name(record: "Json", name: "Text") -> None:
    login = name and record["profiles"].get(name, {}).get("auth_type") == OIDC
    require(not login, "profile %s is a login" % name, "llamactl auth logout %s" % name)

def put_key_profile(record: "Json", profile: "Json", name: "Text") -> str:
    refuse_login_name(record, name)
    profiles, same = record["profiles"], (profile["api_key"], profile["project_id"])
    own = (each for each, other in profiles.items() if other["auth_type"] != OIDC
           and (other.get("api_key"), other.get("project_id")) == same)
    made = "llx-" + (last_four(same[0]) or "key") if same[0] else shell_safe(same[1]) or "no-auth"
    name = name or next(own, None) or free_name(made, profiles)
    profiles[name] = profile
    record["current_profile"] = name
    return name

def is_of_user(profile: "Json", user: "Json") -> bool:
    return all(profile.get(name) == user[name] for name in ("auth_type", "sub", "issuer"))

def login_name(record: "Json", user: "Json", wanted: "Text") -> str:
    """The profile that a login goes to: WANTED, the same user's, or one named after the user."""
    profiles, current = record["profiles"], record.get("current_profile")
    own = [name for name, profile in profiles.items() if is_of_user(profile, user)]
    if wanted not in own:
        refuse_login_name(record, wanted)
    made = free_name(shell_safe(user["email"] or user["sub"]) or "login", profiles)
    return wanted or (str(current) if current in own else next(iter(own), made))

def project_fields(project: "Json") -> "Json":
    return {name: project.get(name) for name in ("project_id", "project_name", "org_id")}

def end_login(tokens: Tokens, url: str, trouble: str, warn: "Tell") -> str:
    """Delete a login's key and revoke its token; returns what could not be done, or nothing."""
    profile, problem = tokens.saved, ""
    key_id, before = profile.get("api_key_id") or "", profile.get("access_token")
    try:
        require(key_id, "its id is not known")
        try:
            delete_key(tokens.client, url, tokens.fresh(), key_id)
        except Refused as refused:
            if refused.status != 401 or profile.get("access_token") != before:
                raise
            tokens.renew()
            delete_key(tokens.client, url, profile["access_token"], key_id)
    except Failure as failure:
        end = last_four(profile.get("api_key") or "") or "?"
        place = (key_id or "?", end, trouble or failure.message)
        problem = "API key %s, which ends in %s, may still work: %s" % place
    try:
        require(not trouble, trouble)
        tokens.revoke()
    except Failure as failure:
        warn("the login's refresh token may not be revoked: " + failure.message)
    return problem

def log_out(client: Client, store: Store, url: str, name: str, warn: "Tell") -> str:
    """Forget a profile, whatever the server says; returns what may still work, or nothing."""
    provider, trouble, problem = None, "", ""
    profile = environment(store.load(), url)["profiles"].get(name, {})
    if profile.get("auth_type") == OIDC:
        try:
            provider = find_provider(client, url, profile.get("issuer"))
        except Failure as failure:
            trouble = failure.message
    with store.change() as data:  # of many processes one refreshes, the others find it gone
        record = environment(data, url)
        profile = record["profiles"].get(name, {})
        if profile.get("auth_type") == OIDC:
            save = failing_plainly(store.path, "changed")(lambda: store.save(data))
            client = Client(client.surroundings, client.hide, client.warn, client.sleep,
                            time.monotonic() + LOCKED_TIMEOUT)
            tokens = Tokens(client, provider, profile, save)
            problem = end_login(tokens, url, trouble, warn)
        record["profiles"].pop(name, None)
        if record.get("current_profile") == name:
            record["current_profile"] = None
    return "profile %s: %s" % (name, problem) if problem else ""

def take_over_profile(data: "Json", row: "Json", name: str, current: "Any") -> str:
    url, project = normal_url(str(row.get("api_url"))), row.get("project_id")
    key = row.get("api_key") or None
    record = environment(data, url)
    sound = is_plain(key) or not key and not record.get("requires_auth", True)
    require(sound and is_plain(project), "it has no usable API key and project")
    for stored, other in record["profiles"].items():
        if (other.get("api_key"), other.get("project_id")) == (key, project):
            return "profile %s is here already, as %s" % (name, stored)
    chosen = free_name(name, record["profiles"])
    record["profiles"][chosen] = {"auth_type": TOKEN if key else NO_AUTH, "api_key": key,
                                  "project_id": project, "project_name": None}
    if name == current and url == current_url(data) and not record.get("current_profile"):
        record["current_profile"] = chosen
    login = " (a login: its API key alone)" if row.get("device_oidc") else ""
    return "profile %s taken over as %s%s" % (name, chosen, login)

def take_over(data: "Json", tables: "Dict[str, List[Json]]") -> "Iterator[Tuple[bool, str]]":
    """Add the official client's rows to DATA; yields of each if it is here, and what to say."""
    settings = {row.get("key"): row.get("value") for row in tables["settings"]}
    for row in tables["environments"]:
        with contextlib.suppress(Failure):  # its profiles will say that the URL is none
            record = environment(data, normal_url(str(row.get("api_url"))))
            record["requires_auth"] = bool(row.get("requires_auth", True))
    with contextlib.suppress(Failure):  # none is current there
        current = normal_url(str(settings.get("current_environment_api_url")))
        data["current_environment"] = data.get("current_environment") or current
    for row in tables["profiles"]:
        name = clean(str(row.get("name"))).strip("- ") or "imported"
        try:
            yield True, take_over_profile(data, row, name, settings.get("current_profile"))
        except Failure as failure:
            yield False, "profile %s is left out: %s" % (name, failure.message)

# ==== commands: one function a verb: resolve, call, store, say ====================================
class App:
    """What every command works with."""
    def __init__(self, surroundings: Surroundings, terminal: Terminal) -> None:
        self.surroundings, self.terminal = surroundings, terminal
        self.store = Store(surroundings.folder(), terminal.warn)
        self.client = Client(surroundings, terminal.hide, terminal.warn)

    def resolved(self, args: Args, name: "Text" = None, needs_project: bool = True) -> Credential:
        require_usage(name in (None, args.profile or name), "NAME and --profile name two profiles")
        named = name or args.profile
        found = resolve(self.surroundings, self.store, named, args.project, needs_project)
        self.terminal.hide(found.api_key or "")
        return found

    def report(self, text: str) -> None:
        self.terminal.say(text)
        key, project, chosen = map(self.surroundings.get, (VAR_API_KEY, VAR_PROJECT, VAR_PROFILE))
        if key and project and not self.surroundings.uses_profile():
            text = "%s and %s are set and win over the current profile; unset them or set %s=1"
            self.terminal.warn(text % (VAR_API_KEY, VAR_PROJECT, VAR_USE_PROFILE))
        elif chosen:
            self.terminal.warn("%s=%s stands in for the current profile" % (VAR_PROFILE, chosen))

def require_project(found: Credential) -> None:
    what = "profile %s has no project" % found.profile if found.profile else "no project"
    require_usage(found.project_id, what, "llamactl projects use ID")

def check_sign_in(app: App, args: Args) -> "Tuple[str, Json]":
    name = args.name
    sound = name is None or name == clean(name).strip() and not name.startswith("-")
    require_usage(sound, "--name must be printable and not start with a dash")
    data = app.store.check_writable()
    url = current_url(data)
    ignored = app.surroundings.uses_profile()
    named = url if ignored else normal_url(app.surroundings.get(VAR_API_URL) or url)
    what = "%s names another server than the current environment, %s" % (VAR_API_URL, url)
    require_usage(named == url, what, "llamactl environments add " + named)
    return url, environment(data, url)

def chosen_project(app: App, projects: "List[Json]", wanted: "Text", now: "Text" = None,
                   flag: str = "--project") -> "Json":
    by_id = {project["project_id"]: project for project in projects}
    choices = [(each, project["project_name"]) for each, project in by_id.items()]
    unknown = "no project %s is to be seen; there: %s" % (wanted, listed(choices))
    require(not wanted or wanted in by_id, unknown)
    require(projects, "no project is to be seen; make one " + WEB_CONSOLE)
    if not wanted and len(choices) > 1:
        wanted = app.terminal.choose("project", choices, flag, now)
    return by_id[wanted or choices[0][0]]

def given_key(app: App, args: Args) -> "Text":
    key, path = args.api_key, args.api_key_file
    require_usage(None in (key, path), "--api-key and --api-key-file exclude each other")
    if "-" in (key, path):
        key = app.terminal.read_input()
    elif path is not None:
        key = read_key_file(path)
    return None if key is None else plain(key, "the API key")

def verified_projects(app: App, url: str, key: "Text", org: "Text") -> "List[Json]":
    try:
        return get_projects(app.client, url, key, org)
    except Refused as refused:
        if refused.status not in (401, 403):
            raise
        what = "the API key was rejected: " + refused.message
        raise Refused(what, refused.status, "llamactl auth token", EXIT_REJECTED) from None

def asked_key(app: App, url: str, org: "Text", tries: int = 3) -> "Tuple[str, List[Json]]":
    """A key typed at the prompt and the projects it can see."""
    what = "no API key, and nobody to ask; name one with --api-key-file PATH (- is stdin)"
    require_usage(app.terminal.can_ask(), what, KEY_FILE_HINT)
    try:
        key = plain(app.terminal.ask_hidden("API key for %s: " % url), "the API key")
        return key, verified_projects(app, url, key, org)
    except Failure as failure:
        if tries == 1 or failure.code not in (EXIT_REJECTED, EXIT_USAGE):
            raise
        app.terminal.tell(failure.message + "; try again")
    return asked_key(app, url, org, tries - 1)

def project_label(profile: "Json") -> str:
    name, project = profile.get("project_name"), profile.get("project_id") or "none"
    return "%s (%s)" % (name, project) if name and name != project else project

def auth_token(app: App, args: Args) -> None:
    """Verify a key by listing its projects, choose one, and store both as a profile."""
    url, record = check_sign_in(app, args)
    refuse_login_name(record, args.name)
    project = {"project_id": None if args.project is None else plain(args.project, "--project")}
    key, needed = given_key(app, args), record.get("requires_auth", True)
    enough = args.project and (key or not needed)
    require_usage(enough or not args.no_verify, "--no-verify needs a key and --project ID")
    try:
        if needed and not key:
            key, projects = asked_key(app, url, args.org)
            project = chosen_project(app, projects, args.project)
        elif not args.no_verify:
            projects = verified_projects(app, url, key, args.org)
            project = chosen_project(app, projects, args.project)
    except Unreachable as failure:
        if failure.stage not in (CONNECT, SILENCE) or not (key and args.project):
            raise
        app.terminal.warn("the key is stored unverified: " + failure.message)
    profile = dict(project_fields(project), auth_type=TOKEN if key else NO_AUTH, api_key=key)
    with app.store.change() as data:
        name = put_key_profile(environment(data, url), profile, args.name)
    app.report("profile %s is current, project %s" % (name, project_label(profile)))

def start_login(app: App, url: str, waiting: "Json", output: str) -> None:
    with app.store.change() as data:
        environment(data, url)["login"] = waiting
    shown = {name: waiting[name] for name in CODE_FIELDS}  # type: Any
    if output == "text":
        shown = [{"field": name, "value": value} for name, value in shown.items()]
    app.terminal.show(shown, output, "field value")
    app.terminal.say("finish with: llamactl auth login --resume")

def show_code(app: App, waiting: "Json", no_browser: bool) -> None:
    plain, complete = waiting["verification_uri"], waiting["verification_uri_complete"]
    for word, text in (("open ", plain), ("code ", waiting["user_code"]), ("or   ", complete)):
        if text:
            app.terminal.tell(word + " " + text)
    if not no_browser:
        app.terminal.browse(complete or plain)

def forget_waiting(app: App, url: str, waiting: "Json") -> None:
    with app.store.change() as data:
        record = data["environments"].get(url, {})
        if (record.get("login") or {}).get("device_code") == waiting["device_code"]:
            record["login"] = None

def approved(app: App, url: str, provider: Provider, waiting: "Json") -> "Tuple[Tokens, Json]":
    """The tokens, and who the user is, once the code is approved, and with that used up."""
    expires_at = time.monotonic() + min(waiting["expires_at"] - time.time(), MAX_CODE_LIFETIME)
    wait, code = app.terminal.countdown(expires_at), waiting["device_code"]
    form = {"grant_type": DEVICE_GRANT, "device_code": code, "client_id": provider.client_id}
    poll = partial(app.client.post_form, provider.token, form, once=True)
    try:
        answer = poll_for_tokens(poll, waiting["interval"], expires_at, wait, time.monotonic)
    except Failure as failure:
        if not isinstance(failure, (Refused, Unreachable)) or time.monotonic() >= expires_at:
            forget_waiting(app, url, waiting)
        raise
    forget_waiting(app, url, waiting)
    tokens = Tokens(app.client, provider, {}, lambda: None)
    tokens.take(answer)
    claims = verified_claims(app.client, provider, answer.get("id_token"), time.time())
    email = claims["email"] if isinstance(claims.get("email"), str) else None
    user = {"auth_type": OIDC, "sub": claims["sub"], "issuer": claims["iss"], "email": email}
    return tokens, user

def project_of_login(app: App, projects: "List[Json]", wanted: "Text",
                     now: "Text") -> "Tuple[Json, Optional[Failure]]":
    try:
        chosen = wanted or (None if app.terminal.can_ask() else now)
        return chosen_project(app, projects, chosen, now), None
    except Failure as failure:
        if not projects:
            raise
        return {}, failure

def finish_login(app: App, args: Args, url: str, tokens: Tokens, user: "Json") -> None:
    """Choose a project, make a key or keep the one that works, and store the profile."""
    projects = get_projects(app.client, url, tokens.fresh(), args.org)
    record = environment(app.store.load(), url)
    name = login_name(record, user, args.name)
    known = record["profiles"].get(name, {})
    known = known if is_of_user(known, user) else {}
    project, missing = project_of_login(app, projects, args.project, known.get("project_id"))
    key_id, key = known.get("api_key_id"), known.get("api_key")
    made = not key or is_key_gone(app.client, url, key)
    if made:
        title = "%s llamactl on %s" % (name, app.surroundings.host)
        key_id, key = create_key(app.client, url, tokens.fresh(), title)
    profile = dict(user, api_key_id=key_id, api_key=key, **project_fields(project))
    try:
        with app.store.change() as data:
            record = environment(data, url)
            name = record["current_profile"] = login_name(record, user, args.name)
            record["profiles"][name] = dict(profile, **tokens.saved)
    except BaseException:  # nobody would know of the new key
        if made:
            with contextlib.suppress(Failure):
                delete_key(app.client, url, tokens.fresh(), str(key_id))
        raise
    app.report("logged in as %s, project %s" % (name, project_label(profile)))
    if missing:
        raise Failure(missing.message, "llamactl projects use ID", EXIT_USAGE)

def auth_login(app: App, args: Args) -> None:
    """The device flow in one go, or the half of it that --start or --resume asks for."""
    later = args.resume or args.project or args.org or args.name
    require_usage(not (args.start and later), "--start takes only -o; the rest is for --resume")
    require_usage(args.start or args.output == "text", "-o is for --start, which prints the code")
    url, record = check_sign_in(app, args)
    needed, hint = record.get("requires_auth", True), "llamactl auth token --project ID"
    require(needed, url + " requires no login", hint)
    waiting = record.get("login") or {}  # type: Json
    require_usage(waiting or not args.resume, "no login is waiting", "llamactl auth login --start")
    provider = find_provider(app.client, url, waiting.get("issuer") if args.resume else None)
    if not args.resume:
        waiting = request_device_code(app.client, provider)
    if args.start:
        return start_login(app, url, waiting, args.output)
    if not args.resume:
        show_code(app, waiting, args.no_browser)
    finish_login(app, args, url, *approved(app, url, provider, waiting))

def auth_get(app: App, args: Args) -> None:
    data = app.store.load()
    url, record = current_url(data), environment(data)
    profiles, current = record["profiles"], record.get("current_profile")
    names = [selected_profile(data, url, args.name)] if args.name else sorted(profiles)
    found = [{"name": name, "api_url": url, "project_id": profiles[name].get("project_id"),
              "active": name == current, "auth_type": profiles[name]["auth_type"]}
             for name in names]
    columns = "name api_url project_id active AUTH=auth_type"
    app.terminal.show(found[0] if args.name else found, args.output, columns)
    if not found:
        app.terminal.say("no profile in " + url)
        hint = IMPORT_HINT if os.path.exists(app.store.official) else LOGIN_HINT
        app.terminal.say("hint: " + hint)

def pick_profile(app: App, data: "Json", name: "Text") -> str:
    record = environment(data)
    if not name and record["profiles"]:
        choices = [(each, each) for each in sorted(record["profiles"])]
        return app.terminal.choose("profile", choices, "NAME", record.get("current_profile"))
    found = selected_profile(data, current_url(data), name or app.surroundings.get(VAR_PROFILE))
    require(found, "there is no profile", "llamactl auth token --project ID", EXIT_REJECTED)
    return str(found)

def auth_use(app: App, args: Args) -> None:
    data = app.store.check_writable()
    name, url = pick_profile(app, data, args.name), current_url(data)
    with app.store.change() as data:
        selected_profile(data, url, name)  # another process may have deleted it
        environment(data, url)["current_profile"] = name
    app.report("profile %s is current" % name)

def log_out_each(app: App, places: "List[Tuple[str, str]]") -> str:
    problems, secrets = [], []
    data = app.store.load()
    for url, name in places:
        profile = environment(data, url)["profiles"].get(name, {})
        secrets += [profile[each] for each in ("api_key", "refresh_token") if profile.get(each)]
        problems.append(log_out(app.client, app.store, url, name, app.terminal.warn))
        app.report("profile %s is deleted" % name)
    for path in app.store.remains(secrets):
        app.terminal.warn("%s may still hold keys; delete it when it is not needed" % path)
    return "; ".join(filter(None, problems))

def auth_logout(app: App, args: Args) -> None:
    require_usage(not (args.all and args.name), "NAME and --all exclude each other")
    data = app.store.check_writable()
    if args.all:
        places = [(url, name) for url, record in data["environments"].items()
                  for name in record["profiles"]]
    else:
        places = [(current_url(data), pick_profile(app, data, args.name))]
    problems = log_out_each(app, places)
    require(not problems, problems, "delete the key " + WEB_CONSOLE)

def handed_over(app: App, args: Args, name: "Text") -> "Dict[str, str]":
    found, what = app.resolved(args, name), "there is no API key to hand over"
    require(found.api_key, what, "llamactl auth token", EXIT_REJECTED)
    require_project(found)
    return {VAR_API_KEY: found.api_key, VAR_API_URL: found.api_url,
            VAR_PROJECT: plain(found.project_id, "the project id")}

def auth_inject(app: App, args: Args) -> None:
    values = handed_over(app, args, None)
    for name, value in values.items():
        readers = " and ".join(env_value(value)[1])
        if readers:
            app.terminal.warn("%s needs quotes, which %s cannot read" % (name, readers))
    if args.env_file == "-":
        return app.terminal.data("\n".join(env_lines(values)) + "\n")
    changed = rewrite_env(args.env_file, lambda text: updated_env(text, values), app.terminal.warn)
    app.terminal.say("%s %s" % (args.env_file, "written" if changed else "is up to date"))

def auth_exec(app: App, args: Args) -> int:
    require_usage(args.command, "no command given", "llamactl auth exec -- COMMAND")
    variables = dict(app.surroundings.variables, **handed_over(app, args, args.name))
    variables.pop(VAR_USE_PROFILE, None)
    return replace_process(args.command, variables)

def known_credential(app: App, args: Args, name: "Text" = None) -> "Tuple[Credential, str]":
    try:
        return app.resolved(args, name), ""
    except Failure as failure:
        if failure.code != EXIT_REJECTED:
            raise
        return Credential(current_url(app.store.load()), None, None, None, {}), failure.message

def tested(app: App, found: Credential, missing: str, offline: bool) -> "Tuple[int, str, Text]":
    """Exit code, state and detail of a credential, by listing what it can see."""
    if missing:
        return EXIT_REJECTED, "missing", missing
    if offline:
        return EXIT_DONE, "not checked", None
    try:
        projects = verified_projects(app, found.api_url, found.api_key, None)
    except Failure as failure:
        if failure.code == EXIT_REJECTED:
            return EXIT_REJECTED, "rejected", failure.message
        return EXIT_UNREACHABLE, "unknown", failure.message
    blind = found.project_id and found.project_id not in [each["project_id"] for each in projects]
    return EXIT_DONE, "works", "but it cannot see the project" if blind else None

def origins(app: App, args: Args, found: Credential) -> "Json":
    """Where each value of a credential came from."""
    of_variables, get = found.api_key and not found.profile, app.surroundings.get
    stored_url = None if of_variables else app.store.load().get("current_environment")
    named_url = VAR_API_URL if of_variables and get(VAR_API_URL) else "default"
    current = VAR_PROFILE if get(VAR_PROFILE) else "auth use"
    project = VAR_PROJECT if of_variables else "profile"
    return {"environment": "environments use" if stored_url else named_url,
            "profile": "NAME" if args.name else "--profile" if args.profile else current,
            "project_id": "--project" if args.project else project,
            "project_name": "profile", "api_key": VAR_API_KEY if of_variables else "profile"}

def auth_status(app: App, args: Args) -> int:
    """What a command would use, where each value came from, and whether it works now."""
    found, missing = known_credential(app, args, args.name)
    code, state, detail = tested(app, found, missing, args.offline)
    file, folder, bundle_from = ca_bundle(app.surroundings)
    values = {"environment": found.api_url, "profile": found.profile,
              "project_id": found.project_id,
              "project_name": None if args.project else found.record.get("project_name"),
              "api_key": MASK + last_four(found.api_key) if found.api_key else None,
              "ca_bundle": file or folder or bundle_from,
              "proxy": proxy_for(found.api_url), "credential": state}
    sources = dict(origins(app, args, found), ca_bundle=bundle_from if file or folder else None)
    sources = {name: source if values[name] else None for name, source in sources.items()}
    shown = dict(values, **{name + "_source": sources[name] for name in sources})  # type: Any
    shown["detail"], sources["credential"] = detail, detail
    if args.output == "text":
        shown = [{"name": name, "value": value, "source": sources.get(name)}
                 for name, value in values.items()]
    app.terminal.show(shown, args.output, "name value source")
    return code

def auth_import(app: App, args: Args) -> None:
    require_usage(args.from_official, "say where from", IMPORT_HINT)
    tables = read_official(app.store.official)
    with app.store.change() as data:
        reports = list(take_over(data, tables))
    for taken, text in reports:
        (app.terminal.say if taken else app.terminal.warn)(text)
    app.report(app.store.official + " is unchanged; refresh tokens and key ids stay there")

def known_urls(data: "Json") -> "List[str]":
    return [DEFAULT_API_URL] + sorted(set(data["environments"]) - {DEFAULT_API_URL})

def pick_environment(app: App, data: "Json", named: "Text") -> str:
    choices = [(url, url) for url in known_urls(data)]
    if not named:
        return app.terminal.choose("environment", choices, "URL", current_url(data))
    url = normal_url(named)
    what = "no environment %s; there: %s" % (url, listed(choices))
    require((url, url) in choices, what, "llamactl environments add " + url)
    return url

def environments_get(app: App, args: Args) -> None:
    data = app.store.load()
    urls = [pick_environment(app, data, args.url)] if args.url else known_urls(data)
    found = [{"api_url": url, "requires_auth": environment(data, url).get("requires_auth", True),
              "active": url == current_url(data)} for url in urls]
    app.terminal.show(found[0] if args.url else found, args.output, "api_url requires_auth active")

def environments_add(app: App, args: Args) -> None:
    url = normal_url(args.url)
    app.store.check_writable()
    if re.match(IN_CLEAR, url):
        app.terminal.warn(url + " is not encrypted: keys can be read on the way")
    facts = {} if args.no_verify else get_version(app.client, url)
    facts.pop("capabilities", None)
    wanted = facts.get("min_llamactl_version") or ""
    if version_numbers(wanted) > version_numbers(OFFICIAL_VERSION):
        app.terminal.warn("%s asks for llamactl %s or newer" % (url, wanted))
    with app.store.change() as data:
        environment(data, url).update(facts)
        data["current_environment"] = url
    app.report("environment %s is current" % url)

def environments_use(app: App, args: Args) -> None:
    url = pick_environment(app, app.store.check_writable(), args.url)
    with app.store.change() as data:
        data["current_environment"] = url
    app.report("environment %s is current" % url)

def environments_delete(app: App, args: Args) -> None:
    data = app.store.check_writable()
    url = pick_environment(app, data, args.url)
    problems = log_out_each(app, [(url, name) for name in environment(data, url)["profiles"]])
    with app.store.change() as data:
        data["environments"].pop(url, None)
        if data.get("current_environment") == url:
            data["current_environment"] = None
    app.report("environment %s is deleted" % url)
    require(not problems, problems, "delete the key " + WEB_CONSOLE)

def projects_get(app: App, args: Args) -> None:
    found = app.resolved(args, needs_project=False)
    projects = get_projects(app.client, found.api_url, found.api_key, args.org)
    projects = [dict(project, active=project["project_id"] == found.project_id)
                for project in projects if args.id in (None, project["project_id"])]
    require(projects or not args.id, "there is no project %s" % args.id, "llamactl projects get")
    columns = "NAME=project_name project_id DEPLOYMENTS=deployment_count active org_id"
    app.terminal.show(projects[0] if args.id else projects, args.output, columns)

def projects_use(app: App, args: Args) -> None:
    data = app.store.check_writable()
    found = credential_of_profile(app.surroundings, data, args.profile, None)
    name = found.profile or pick_profile(app, data, None)
    projects = get_projects(app.client, found.api_url, found.api_key, args.org)
    project = chosen_project(app, projects, args.id, found.project_id, "ID")
    with app.store.change() as data:
        selected_profile(data, found.api_url, name)
        environment(data, found.api_url)["profiles"][name].update(project_fields(project))
    app.report("profile %s uses project %s" % (name, project_label(project)))

def organizations_get(app: App, args: Args) -> None:
    found = app.resolved(args, needs_project=False)
    organizations = []
    if "organizations" in get_version(app.client, found.api_url)["capabilities"]:
        organizations = get_organizations(app.client, found.api_url, found.api_key)
    else:
        app.terminal.warn(found.api_url + " has no organizations")
    own = found.record.get("org_id")  # unknown for variables: then the server's default is shown
    for row in organizations:
        row["active"] = row["org_id"] == own if own else row["is_default"]
    columns = "NAME=org_name org_id DEFAULT=is_default active"
    app.terminal.show(organizations, args.output, columns)

def config(app: App, args: Args) -> None:
    found, _ = known_credential(app, args)
    row = {"environment": found.api_url, "profile": found.profile, "project_id": found.project_id,
           "project_name": found.record.get("project_name")}
    app.terminal.show(row, args.output, " ".join(row))

def deployments_get(app: App, args: Args) -> None:
    found = app.resolved(args)
    require_project(found)
    listing = get_deployments(app.client, found.api_url, found.api_key, found.project_id, args.name)
    if args.output in ("json", "yaml"):
        return app.terminal.show(listing[0] if args.name else listing, args.output, "")
    rows = [dict(each["spec"], name=each["name"], **each["status"]) for each in listing]
    columns = "name REPO=repo_url git_ref phase"
    if args.output == "wide":
        columns += " APPSERVER=appserver_version git_sha apiserver_url PROJECT=project_id"
    app.terminal.show(rows, "text", columns)
    for row in rows:
        if row["warning"]:
            app.terminal.warn("%s: %s" % (row["name"], row["warning"]))

# ==== parser: the words of the command line, their help and examples; no logic ====================
Verb = namedtuple("Verb", "run summary options")

def option(flag: str, metavar: str, text: str, *aliases: str, **more: "Any") -> "Any":
    if not metavar:
        more = {"action": "store_true"}
    elif "|" in metavar:
        more = dict(metavar=metavar, choices=metavar.split("|"), type=str.lower, default="text")
    else:
        nargs = None if flag.startswith("-") else "?"
        more = dict({"nargs": nargs}, metavar=metavar, **more)
    return (flag,) + aliases, dict(more, help=text)

NAME = option("name", "NAME", "a profile, as `auth get` lists them")
URL = option("url", "URL", "an environment, as `environments get` lists them")
NEW_URL = option("url", "URL", "its API URL", nargs=None)
ID = option("id", "ID", "a project, as `projects get` lists them")
DEPLOYMENT = option("name", "NAME", "a deployment")
PROFILE = option("--profile", "NAME", "use this profile for this one command")
PROJECT = option("--project", "ID", "use this project")
KEY_FILE = option("--api-key-file", "PATH", "read the key from PATH, - for stdin")
KEY = option("--api-key", "KEY", "the key, - for stdin; on the command line it stands in the list "
             "of processes and the shell's history, so prefer a file or stdin")
NEW_PROJECT = option("--project", "ID", "the project to use (default: ask)", "--project-id")
ORG = option("--org", "ID", "only projects of this organization")
NEW_NAME = option("--name", "NAME", "the new profile's name (default: made up)")
NO_VERIFY = option("--no-verify", "", "do not ask the server")
OFFLINE = option("--offline", "", "do not ask the server")
NO_BROWSER = option("--no-browser", "", "only print the address and the code")
START = option("--start", "", "print them and exit; --resume finishes")
RESUME = option("--resume", "", "finish what --start began")
ALL = option("--all", "", "every profile of every environment")
ENV_FILE = option("--env-file", "PATH", "the file (default: .env), - for stdout", default=".env")
OFFICIAL = option("--from-official", "", "from profiles.db, which stays as it is")
OUTPUT = option("-o", "text|json|yaml", "how to print (default: text)", "--output")
WIDE_OUTPUT = option("-o", "text|wide|json|yaml", "how to print (default: text)", "--output")
EVERYWHERE = [option("-h", "", "show this help", "--help"),
              option("--quiet", "", "no notices and no progress"),
              option("--native-tls", "", "changes nothing: always so")]
VERSION = [option("--version", "", "show the version")]
HEADINGS = {"credential": "--api-key-file --api-key --profile",
            "choice": "--project --org --name", "browser": "--no-browser --start --resume",
            "everywhere": "-h --quiet --native-tls"}
COMMANDS = {
    "auth token": Verb(auth_token, "Create a profile from an API key and choose its project.",
                       [KEY_FILE, KEY, NEW_PROJECT, ORG, NEW_NAME, NO_VERIFY]),
    "auth login": Verb(auth_login, "Log in with a browser on any device, create a profile.",
                       [NEW_PROJECT, ORG, NEW_NAME, NO_BROWSER, START, RESUME, OUTPUT]),
    "auth get": Verb(auth_get, "List profiles, or show one.", [NAME, OUTPUT]),
    "auth use": Verb(auth_use, "Make a profile the current one.", [NAME]),
    "auth logout": Verb(auth_logout, "Delete a profile; of a login its key too.", [NAME, ALL]),
    "auth inject": Verb(auth_inject, "Write it into a .env file.", [PROFILE, PROJECT, ENV_FILE]),
    "auth status": Verb(auth_status, "Show what commands use, from where, and whether it works.",
                        [NAME, OFFLINE, PROFILE, PROJECT, OUTPUT]),
    "auth exec": Verb(auth_exec, "Run a command with the credential.", [NAME, PROFILE, PROJECT]),
    "auth import": Verb(auth_import, "Take over the official client's profiles.", [OFFICIAL]),
    "environments get": Verb(environments_get, "List environments, or show one.", [URL, OUTPUT]),
    "environments add": Verb(environments_add, "Add one, make it current.", [NEW_URL, NO_VERIFY]),
    "environments use": Verb(environments_use, "Make an environment the current one.", [URL]),
    "environments delete": Verb(environments_delete, "Delete one and its profiles.", [URL]),
    "projects get": Verb(projects_get, "List projects, or show one.", [ID, ORG, PROFILE, OUTPUT]),
    "projects use": Verb(projects_use, "Choose the profile's project.", [ID, ORG, PROFILE]),
    "organizations get": Verb(organizations_get, "List organizations.", [PROFILE, OUTPUT]),
    "deployments get": Verb(deployments_get, "List the project's deployments, or show one.",
                            [DEPLOYMENT, PROFILE, PROJECT, WIDE_OUTPUT]),
    "config": Verb(config, "Show what commands use, without network.", [PROFILE, OUTPUT])}
EXAMPLES = """auth token --api-key-file /run/secrets/llama --project ID
auth login
auth login --resume --project ID
auth inject --env-file deploy/.env --profile llx-wxyz
auth exec llx-wxyz -- python3 app.py""".splitlines()
GROUPS = {
    "": "Sign in to LlamaCloud with one file and the standard library.",
    "auth": "Get credentials, keep them, choose between them, hand them on.",
    "environments": "Choose the control plane.", "projects": "List projects and choose one.",
    "organizations": "List organizations.", "deployments": "List deployments."}
RETIRED = {  # `auth` stood before most of them
    "list": "auth get", "switch": "auth use", "destroy": "auth logout --all",
    "env": "environments get", "project": "projects use", "organizations": "organizations get"}
NOT_OFFERED = "agentcore completion dev init pkg serve config/destroy config/show-db".split() + [
    "deployments/" + verb for verb in "apply configure-git-remote create delete edit history logs "
    "rollback template update".split()]
NO_CREDENTIAL_HELP = """variables (no credential is taken from any):
  LLAMACTL_CONFIG_DIR      folder that the profiles are kept in"""
VARIABLES_HELP = """variables (a key and a project beat the current profile):
  LLAMA_CLOUD_API_KEY      API key
  LLAMA_AGENTS_PROJECT_ID  project
  LLAMA_CLOUD_BASE_URL     API URL (default: %s)
  LLAMA_CLOUD_USE_PROFILE  1: ignore the three above
  LLAMACTL_PROFILE         profile to use in place of the current one
  LLAMACTL_CONFIG_DIR      folder that the profiles are kept in""" % DEFAULT_API_URL
MAIN_HELP = """%s

exit codes: 0 done, 1 failed, 2 wrong usage or a choice missing, 4 not logged in
or rejected, 5 server unreachable or failing (try again), 130 interrupted""" % VARIABLES_HELP

class Parser(argparse.ArgumentParser):
    """argparse, but it raises, and never quotes what may be a secret."""
    def error(self, message: str) -> "Any":
        message = re.sub("explicit argument .*", "value", message)
        message = re.sub(r"choice: .* \(choose", "choice (choose", message)
        raise Failure(message, self.prog + " --help", EXIT_USAGE)

    def complete(self, arguments: "List[str]") -> Args:
        args, extra = self.parse_known_args(arguments)
        if extra:
            flags = re.findall("^--?[a-z-]+", "\n".join(extra), re.MULTILINE)
            self.error("unknown option " + flags[0] if flags else "one argument too many")
        for name, value in vars(args).items():
            if value == "":
                self.error("%s is empty" % name.replace("_", "-"))
        return args

def new_parser(words: str, usage: "Text", about: str, epilog: str, options: "List[Any]") -> Parser:
    # a width of its own keeps argparse from asking the terminal, by way of shutil, at each option
    parser = Parser(
        ("llamactl " + words).strip(), usage, about, epilog, add_help=False, allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 27, 80))
    groups = {None: parser}  # type: Dict[Any, Any]
    for flags, settings in options + EVERYWHERE:
        heading = next((name for name, of in HEADINGS.items() if flags[0] in of.split()), None)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(*flags, **settings)
    return parser

def examples(words: str) -> str:
    lines = [line for line in EXAMPLES if line.startswith(words)] or [
        command for command in COMMANDS if command.startswith(words)]
    return "\n".join(["examples:"] + ["  llamactl " + line for line in lines] + ["", ""])

def verb_parser(words: str) -> Parser:
    verb = COMMANDS[words]
    usage = "llamactl auth exec [NAME] [options] -- COMMAND..." if words == "auth exec" else None
    variables = VARIABLES_HELP if PROFILE in verb.options else NO_CREDENTIAL_HELP
    parser = new_parser(words, usage, verb.summary, examples(words) + variables, verb.options)
    parser.set_defaults(profile=None, project=None, output="text")
    return parser

def list_parser(group: str) -> Parser:
    verbs = {words: verb for words, verb in COMMANDS.items() if words.startswith(group)}
    width = max(map(len, verbs))
    listing = ["  %s  %s" % (words.ljust(width), verb.summary) for words, verb in verbs.items()]
    about = "\n".join([GROUPS[group], "", "commands:"] + listing)
    usage = " ".join(("llamactl %s COMMAND [options]" % group).split())
    epilog = examples(group) + (VARIABLES_HELP if group else MAIN_HELP)
    return new_parser(group, usage, about, epilog, [] if group else VERSION)

VALUED = {flag for verb in COMMANDS.values() for flags, settings in verb.options for flag in flags
          if flag.startswith("-") and "metavar" in settings}

def split_words(arguments: "List[str]") -> "Tuple[str, List[str]]":
    words, others, value_follows = "", [], False
    for argument in arguments:
        known = words in COMMANDS and words + "/" + argument not in NOT_OFFERED
        wanted = not known and " " not in words
        if wanted and not value_follows and not argument.startswith("-"):
            words = (words + " " + argument).strip()
        else:
            others.append(argument)
        value_follows = argument in VALUED
    return words, others

def unknown_command(words: str) -> Failure:
    from difflib import get_close_matches
    group, _, verb = words.partition(" ")
    listing = words.replace(" list", " get")
    retired = listing if listing in COMMANDS else RETIRED.get(words.replace("auth ", ""))
    if retired:
        what = "'llamactl %s' is a word of older releases" % words
        return Failure(what, "llamactl " + retired, EXIT_USAGE)
    if words.replace(" ", "/") in NOT_OFFERED or group in NOT_OFFERED:
        what = "'llamactl %s' is not offered here, but by the official client" % words
        return Failure(what, "llamactl --help", EXIT_USAGE)
    verbs = {command.split()[1]: command for command in COMMANDS if command.startswith(group + " ")}
    known = verbs or {name: name for name in list(COMMANDS) + list(GROUPS)}
    near = get_close_matches(verb if verbs else words, known, 1)
    hint = known[near[0]] if near else RETIRED.get(group, group + " --help" if verbs else "--help")
    return Failure("there is no command '%s'" % words, "llamactl " + hint, EXIT_USAGE)

# ==== main: read, dispatch, and the only place that catches everything ============================
def run(surroundings: Surroundings, terminal: Terminal, arguments: "List[str]") -> int:
    """Run the command that ARGUMENTS name; returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    words, others = split_words(arguments[:cut])
    if words not in COMMANDS and words not in GROUPS:
        raise unknown_command(words)
    parser = verb_parser(words) if words in COMMANDS else list_parser(words)
    wants_help = bool({"-h", "--help"} & set(others))
    if words in GROUPS and words and not wants_help:
        terminal.to_stderr(parser.format_help())
        return EXIT_USAGE
    if words not in COMMANDS or wants_help:
        version = not wants_help and parser.complete(others).version
        terminal.data("llamactl.py %s\n" % __version__ if version else parser.format_help())
        return EXIT_DONE
    args = parser.complete(others if words == "auth exec" else others + arguments[cut:])
    args.command = arguments[cut + 1:]
    terminal.quiet = args.quiet
    return COMMANDS[words].run(App(surroundings, terminal), args) or EXIT_DONE

def main(argv: "Optional[List[str]]" = None) -> int:
    """Run llamactl with ARGV (default: the process's own); returns the exit code."""
    surroundings = read_surroundings()
    terminal = Terminal(surroundings)
    try:
        return run(surroundings, terminal, list(sys.argv[1:] if argv is None else argv))
    except Failure as failure:
        terminal.tell("error: " + failure.message)
        if failure.hint:
            terminal.tell("hint: " + failure.hint)
        return failure.code
    except KeyboardInterrupt:
        terminal.to_stderr("\n" * is_terminal(terminal.input) + "interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        terminal.abandon(1)
        return EXIT_DONE
    except OSError as error:  # a working folder that is gone, say
        terminal.tell("error: " + reason(error))
        return EXIT_FAILED
    except Exception as error:  # a mistake of ours: say where, but quote nothing
        from traceback import walk_tb
        lines = [line for frame, line in walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == main.__code__.co_filename]
        place = (__version__, type(error).__name__, lines[-1])
        terminal.tell("error: a mistake in llamactl.py %s: %s at line %d" % place)
        return EXIT_FAILED

if __name__ == "__main__":
    import gc
    gc.disable()  # a process this short has nothing to collect
    sys.exit(main())
