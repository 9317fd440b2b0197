#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tests of llamactl.py: the standard library, and a stand-in for LlamaCloud on loopback.

python3 test_llamactl.py               all tests; --slow names the slowest five, -f stops
                                       after the first class that fails
python3 test_llamactl.py ROOM          those of a room: http, store, login, ...
python3 test_llamactl.py Class         those of a class; Class.test is one of them
python3 test_llamactl.py --list        rooms and classes, and how many tests they have
python3 test_llamactl.py demo          the whole job, each command with what it printed
python3 test_llamactl.py sandbox       keeps the stand-in up to play with, until Ctrl-C
python3 test_llamactl.py bench         measures start-up, network commands and growth
python3 test_llamactl.py readers       what PyYAML, ruamel.yaml and python-dotenv read (CI)
python3 test_llamactl.py windows PYTHON...  the program on a Windows Python (CI has Wine)
python3 test_llamactl.py release [X.Y.Z]  pins the version and its checksum, or checks them
"""

import ast
import base64
import collections
import contextlib
import errno
import fnmatch
import gc
import glob
import hashlib
import http.server
import importlib
import inspect
import io
import itertools
import json
import linecache
import os
import platform
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tokenize
import types
import unittest
import unittest.mock
import urllib.parse
import warnings
import webbrowser

try:
    import fcntl
    import resource
    import termios
except ImportError:  # Windows
    fcntl = resource = termios = None


# ---------------------------------------------------------------------------------------
# ID tokens, and the certificate of the stand-in.
# ---------------------------------------------------------------------------------------

# For tests only: public knowledge. Self-signed, 127.0.0.1 and localhost, 2020 to 2120.
TLS_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIB0TCCAXagAwIBAgIBATAKBggqhkjOPQQDAjA2MRIwEAYDVQQDDAlsb2NhbGhv
c3QxIDAeBgNVBAoMF3N0YW5kLWluIGZvciB0ZXN0cyBvbmx5MCAXDTIwMDEwMTAw
MDAwMFoYDzIxMjAwMTAxMDAwMDAwWjA2MRIwEAYDVQQDDAlsb2NhbGhvc3QxIDAe
BgNVBAoMF3N0YW5kLWluIGZvciB0ZXN0cyBvbmx5MFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAErhO04RJoJPlatB5K2P6UOPRv827bWepHube8vrWcVZXoNisZkzVe
e59ZzXhzQFJ+Tdr0rOgx5Jfh5XJG5PU6sqNzMHEwDwYDVR0TAQH/BAUwAwEB/zAO
BgNVHQ8BAf8EBAMCAoQwEwYDVR0lBAwwCgYIKwYBBQUHAwEwHQYDVR0OBBYEFI8F
E89Q8lZ+7Yp9w2sW3C3aSKMzMBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9zdDAK
BggqhkjOPQQDAgNJADBGAiEAnqiuzuqz3joGlfrMN2T0BVyfYaTd38BYKsWg+6YZ
rxACIQC2qMtoNjYvUskBuzqYY7JQajgvyRKypGqwhTIHaYF0HA==
-----END CERTIFICATE-----
"""

TLS_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg7LtYqYeTRHtvAcx5
0WXgyOJ3O+MuqPpLN/y5vsAezGKhRANCAASuE7ThEmgk+Vq0HkrY/pQ49G/zbttZ
6ke5t7y+tZxVleg2KxmTNV57n1nNeHNAUn5N2vSs6DHkl+Hlckbk9Tqy
-----END PRIVATE KEY-----
"""


def b64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def jwt(claims):
    """A JWT in compact form, whose signature nobody reads (OpenID Connect Core 3.1.3.7)."""
    header = b64url(b'{"alg": "RS256", "kid": "test-1", "typ": "JWT"}')
    payload = b64url(json.dumps(claims).encode("ascii"))
    return f"{header}.{payload}.{b64url(b'signature')}"


# ---------------------------------------------------------------------------------------
# Requests, answers, refusals.
# ---------------------------------------------------------------------------------------

Request = collections.namedtuple("Request", "method path query headers body time")
Answer = collections.namedtuple("Answer", "status body headers")

NO_STORE = {"cache-control": "no-store"}  # RFC 6749 section 5.1
BEARER = {"www-authenticate": "Bearer"}  # RFC 6750 section 3
HTML = {"content-type": "text/html; charset=utf-8"}
JSON = {"content-type": "application/json"}
FORM = "application/x-www-form-urlencoded"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class Refusal(Exception):
    def __init__(self, status, body, headers=()):
        super().__init__(status, body)
        self.answer = reply(body, status, headers)


def load(text):
    return json.loads(text)


def write_file(path, content, mode=0o644):
    """CONTENT, text or bytes, at PATH, which it returns."""
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    with open(path, "wb") as file:
        file.write(content)
    os.chmod(path, mode)
    return path


def reply(body, status=200, headers=()):
    return Answer(status, body, dict(headers))


def refusal(status, detail, headers=()):
    return Refusal(status, {"detail": detail}, headers)


def invalid(place, name):
    error = {"loc": [place, name], "msg": "Field required", "type": "value_error"}
    return refusal(422, [error])


def oauth_error(error, status=400):
    body = {"error": error, "error_description": f"stand-in: {error}"}
    return Refusal(status, body, NO_STORE)


def merged(base, overrides):
    """Overrides win; one that is None removes the member."""
    return {
        name: value
        for name, value in dict(base, **overrides).items()
        if name not in overrides or value is not None
    }


def oauth_form(request):
    pairs = urllib.parse.parse_qsl(request.body, keep_blank_values=True)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # RFC 6749 section 3.2: a parameter must not be included more than once.
    if kind != FORM or len(dict(pairs)) != len(pairs):
        raise oauth_error("invalid_request")
    return dict(pairs)


def required(form, name):
    if not form.get(name):
        raise oauth_error("invalid_request")
    return form[name]


# ---------------------------------------------------------------------------------------
# The state: recorded requests and queued faults, the OpenID provider, the cloud.
# ---------------------------------------------------------------------------------------


class Recorder:
    """Every request that came, and the faults that wait for the next ones."""

    clock = staticmethod(time.time)
    base_url = "http://stand-in.invalid"
    received = 0

    def __init__(self):
        self.lock = threading.RLock()
        self.requests = []
        self.faults = []

    def fault(self, path, kind, times=1, method=None, executed=False, **options):
        """Queue a fault for the next TIMES requests to PATH ("*": any).

        KIND is one of the Handler's fault_ methods, which has these OPTIONS. EXECUTED: the
        request takes effect although its answer is lost.
        """
        function = getattr(Handler, "fault_" + kind)
        inspect.signature(function).bind(None, None, **options)
        executed = executed or kind in DAMAGED
        with self.lock:
            self.faults += [(path, method, function, executed, options)] * times

    def receive(self, request):
        """Record the request; its number, and (method, executed, options) of a fault."""
        with self.lock:
            self.requests.append(request)
            self.received += 1
            for fault in self.faults:
                path, method, *rest = fault
                if path in ("*", request.path) and method in (None, request.method):
                    self.faults.remove(fault)
                    return self.received, rest
        return self.received, None

    def sent(self, path):
        with self.lock:
            return [request for request in self.requests if request.path == path]

    def count(self, method, path):
        return sum(request.method == method for request in self.sent(path))

    def reset(self):
        """Forget the requests and the faults; keys, logins and projects stay."""
        with self.lock:
            del self.requests[:], self.faults[:]


PROVIDER_METADATA = """{
    "issuer": "BASE/oidc",
    "device_authorization_endpoint": "BASE/oidc/device_authorization",
    "token_endpoint": "BASE/oidc/token",
    "revocation_endpoint": "BASE/oidc/revoke",
    "authorization_endpoint": "BASE/oidc/authorize",
    "scopes_supported": ["openid", "email", "profile", "offline_access"],
    "response_types_supported": ["code"],
    "grant_types_supported":
        ["urn:ietf:params:oauth:grant-type:device_code", "refresh_token"],
    "subject_types_supported": ["public"],
    "id_token_signing_alg_values_supported": ["RS256"]
}"""


class Provider(Recorder):
    """OpenID provider: RFC 8628 device flow, rotating refresh tokens, RFC 7009."""

    interval = 1
    enforce_interval = True
    slow_down_step = 5  # RFC 8628 section 3.5
    expires_in = 600
    auto_approve = None  # else what approve() gets
    pending_polls = 0
    access_token_lifetime = 300
    refreshes = 0
    reuse_detected = 0
    id_token_lifetime = 3600
    id_token_override = None

    def __init__(self):
        super().__init__()
        self.client_ids = {"cli": "llamactl-cli", "web": "llamacloud-web"}
        self.discovery_overrides = {}
        self.configuration_overrides = {}
        self.devices = {}
        self.device_answer = {}
        self.token_script = []
        self.token_answer = {}
        self.id_token_claims = {}
        self.logins = []
        self.access_tokens = {}
        self.refresh_tokens = {}

    # What the person at the browser does.

    def _is_pending(self, device):
        return device["state"] == "pending" and self.clock() < device["expires_at"]

    def pending(self):
        """The user codes that wait for a decision."""
        with self.lock:
            devices = filter(self._is_pending, self.devices.values())
            return [device["user_code"] for device in devices]

    def approve(self, user_code, sub="user-1", email="dev@example.com"):
        """LookupError where no such code is pending; email=None: an account without one."""
        self._decide(user_code, state="approved", sub=sub, email=email)

    def deny(self, user_code):
        self._decide(user_code, state="denied")

    def expire(self, user_code):
        self._decide(user_code, expires_at=self.clock())

    def _decide(self, user_code, **decision):
        with self.lock:
            for device in filter(self._is_pending, self.devices.values()):
                if device["user_code"] == user_code:
                    device.update(decision)
                    return
        raise LookupError(f"no such code is pending: {user_code}")

    def approval_page(self, request):
        return page("Connect a device", "Decide in the terminal of the sandbox.")

    # What a client asks.

    def configuration(self, request=None):
        body = load(PROVIDER_METADATA.replace("BASE", self.base_url))
        return reply(merged(body, self.configuration_overrides))

    def device_authorization(self, request):
        form = oauth_form(request)
        shown = {
            "device_code": "dc-CANARY-" + secrets.token_hex(16),
            "user_code": new_user_code(),
            "interval": self.interval,
        }
        self.devices[shown["device_code"]] = dict(
            shown,
            client_id=self._client(form),
            scope=form.get("scope", ""),
            expires_at=self.clock() + self.expires_in,
            state="pending",
            polls=0,
            last_poll=float("-inf"),
        )
        address = self.base_url + "/oidc/device"
        shown.update(
            verification_uri=address,
            verification_uri_complete=f"{address}?user_code={shown['user_code']}",
            expires_in=self.expires_in,
        )
        return reply(merged(shown, self.device_answer), headers=NO_STORE)

    def token(self, request):
        form = oauth_form(request)
        self._client(form)
        grants = {DEVICE_GRANT: self._poll, "refresh_token": self._refresh}
        grant = required(form, "grant_type")
        if grant not in grants:
            raise oauth_error("unsupported_grant_type")
        return grants[grant](form)

    def revoke(self, request):
        """RFC 7009 section 2.2: 200 whether or not the token was known."""
        form = dict(urllib.parse.parse_qsl(request.body))
        token = form.get("token")
        record = self.refresh_tokens.get(token) or self.access_tokens.get(token)
        if record and record["login"]["client_id"] == form.get("client_id"):
            record["login"]["revoked"] = True
        return reply(None)

    def expire_access_tokens(self):
        with self.lock:
            for record in self.access_tokens.values():
                record["expires_at"] = float("-inf")

    def _client(self, form):
        client_id = required(form, "client_id")
        overridden = self.discovery_overrides.get("client_ids") or {}
        if client_id not in [*self.client_ids.values(), *overridden.values()]:
            raise oauth_error("invalid_client", 401)
        return client_id

    def _poll(self, form):
        if self.token_script:
            status, body = self.token_script.pop(0)
            return reply(body, status, NO_STORE)
        device = self.devices.get(required(form, "device_code"))
        if not device or device["client_id"] != form["client_id"]:
            raise oauth_error("invalid_grant")
        if device["state"] == "consumed":
            raise oauth_error("invalid_grant")
        if self.clock() >= device["expires_at"]:
            raise oauth_error("expired_token")
        self._check_pace(device)
        self._check_decision(device)
        device["state"] = "consumed"
        self.logins.append(dict(device, revoked=False))
        return self._tokens(self.logins[-1])

    def _check_pace(self, device):
        now = self.clock()
        waited = now - device["last_poll"]
        device["last_poll"] = now
        # A fiftieth of tolerance: clocks of 16 ms exist, and so do sums of floats.
        if self.enforce_interval and waited < device["interval"] * 0.98:
            device["interval"] += self.slow_down_step
            raise oauth_error("slow_down")

    def _check_decision(self, device):
        device["polls"] += 1
        if device["state"] == "pending":
            if self.auto_approve is None or device["polls"] <= self.pending_polls:
                raise oauth_error("authorization_pending")
            self.approve(device["user_code"], **self.auto_approve)
        if device["state"] == "denied":
            raise oauth_error("access_denied")

    def _refresh(self, form):
        record = self.refresh_tokens.get(required(form, "refresh_token"))
        if not record or record["login"]["client_id"] != form["client_id"]:
            raise oauth_error("invalid_grant")
        if record["used"]:
            self.reuse_detected += 1
            record["login"]["revoked"] = True
        if record["login"]["revoked"]:
            raise oauth_error("invalid_grant")
        record["used"] = True
        self.refreshes += 1
        return self._tokens(record["login"])

    def _tokens(self, login):
        scopes = login["scope"].split()
        answer = {
            "access_token": "at-CANARY-" + secrets.token_hex(24),
            "token_type": "Bearer",
            "scope": login["scope"],
            "expires_in": self.access_token_lifetime,
        }
        self.access_tokens[answer["access_token"]] = {
            "login": login,
            "expires_at": self.clock() + self.access_token_lifetime,
        }
        if "openid" in scopes:
            answer["id_token"] = self._id_token(login)
        if "offline_access" in scopes:
            answer["refresh_token"] = "rt-CANARY-" + secrets.token_hex(24)
            self.refresh_tokens[answer["refresh_token"]] = {"login": login, "used": False}
        return reply(merged(answer, self.token_answer), headers=NO_STORE)

    def _id_token(self, login):
        now = int(self.clock())
        claims = {
            "iss": self.configuration().body.get("issuer"),
            "sub": login["sub"],
            "aud": login["client_id"],
            "iat": now,
            "exp": now + self.id_token_lifetime,
        }
        if login["email"] is not None:
            claims.update(email=login["email"], email_verified=True)
        return (self.id_token_override or jwt)(merged(claims, self.id_token_claims))

    def _live_login(self, access_token):
        record = self.access_tokens.get(access_token)
        if not record or self.clock() >= record["expires_at"]:
            return None
        return None if record["login"]["revoked"] else record["login"]


def new_user_code():
    # RFC 8628 section 6.1: no vowels, so that no words come out.
    letters = [secrets.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(8)]
    return "".join(letters[:4] + ["-"] + letters[4:])


def page(title, body):
    return reply(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>
<body style="font: 1.1em sans-serif; max-width: 30em; margin: 4em auto">
<h1>{title}</h1>
<p>{body}</p>
</body></html>
""",
        headers=HTML,
    )


PROJECTS = """[
    {"project_id": "proj-alpha", "project_name": "Alpha", "deployment_count": 2,
     "org_id": "org-one"},
    {"project_id": "proj-beta", "project_name": "Beta", "deployment_count": 0,
     "org_id": "org-two"}
]"""
ORGANIZATIONS = """[
    {"org_id": "org-one", "org_name": "Org One", "is_default": true},
    {"org_id": "org-two", "org_name": "Org Two", "is_default": false}
]"""
DEPLOYMENTS = """[
    {"id": "invoices", "display_name": "Invoices",
     "repo_url": "https://github.com/example/invoices",
     "deployment_file_path": "llama_deploy.yml",
     "git_ref": "main", "git_sha": "0123456789abcdef0123456789abcdef01234567",
     "has_personal_access_token": true, "project_id": "proj-alpha",
     "secret_names": ["OPENAI_API_KEY", "DATABASE_URL"],
     "apiserver_url": "https://invoices.example.com/",
     "status": "Running", "warning": null, "events": null,
     "appserver_version": "0.4.2", "suspended": false},
    {"id": "chat-bot", "display_name": "Chat bot", "repo_url": "",
     "deployment_file_path": ".", "git_ref": null, "git_sha": null,
     "has_personal_access_token": false, "project_id": "proj-alpha",
     "secret_names": [], "apiserver_url": null, "status": "BuildFailed",
     "warning": "The last build failed; the previous one is served.", "events": null,
     "appserver_version": null, "suspended": true}
]"""


class Cloud(Provider):
    """Control plane and platform, on top of the provider."""

    server_version = "0.10.4"
    requires_auth = True
    min_llamactl_version = None
    browser_login = True

    def __init__(self):
        super().__init__()
        self.capabilities = ["organizations"]
        self.projects = load(PROJECTS)
        self.organizations = load(ORGANIZATIONS)
        self.deployments = load(DEPLOYMENTS)
        self.keys = {}

    def add_key(self, key, projects=None, sub="user-1", email="dev@example.com", name=None):
        """An API key that sees these project ids (None: all); its record."""
        record = {"id": "key-" + secrets.token_hex(6), "name": name}
        record.update(sub=sub, email=email, projects=projects)
        with self.lock:
            self.keys[key] = record
        return record

    def keys_alive(self):
        with self.lock:
            return list(self.keys)

    def answer(self, function, request, *segments):
        with self.lock:
            try:
                return function(self, request, *segments)
            except Refusal as error:
                return error.answer

    # Control plane.

    def version(self, request):
        body = {"version": self.server_version}
        for name in ("requires_auth", "min_llamactl_version", "capabilities"):
            body[name] = getattr(self, name)
        return reply(body)

    def list_organizations(self, request):
        self._principal(request)
        if "organizations" not in self.capabilities:
            raise refusal(404, "Not Found")
        return reply({"organizations": self.organizations})

    def list_projects(self, request):
        projects = self._visible(request)
        wanted = request.query.get("org_id")
        if wanted is not None:
            projects = [row for row in projects if row.get("org_id", "default") == wanted]
        return reply({"projects": projects})

    def list_deployments(self, request):
        return reply({"deployments": self._deployments(request)})

    def one_deployment(self, request, name):
        for deployment in self._deployments(request):
            if deployment["id"] == name:
                return reply(deployment)
        raise refusal(404, f"Deployment {name} not found")

    def _deployments(self, request):
        visible = self._visible(request)
        project_id = request.query.get("project_id")
        if not project_id:
            raise invalid("query", "project_id")
        if project_id not in [project["project_id"] for project in visible]:
            raise refusal(403, f"No access to project {project_id}")
        return [row for row in self.deployments if row["project_id"] == project_id]

    # Platform.

    def discovery(self, request):
        if not self.browser_login:
            raise refusal(404, "OIDC is not configured on this server")
        url = self.base_url + "/oidc/.well-known/openid-configuration"
        body = {"discovery_url": url, "client_ids": self.client_ids}
        return reply(merged(body, self.discovery_overrides))

    def me(self, request):
        principal = self._principal(request)
        return reply({"id": principal["sub"], "email": principal["email"], "name": None})

    def create_key(self, request):
        login = self._login(request)
        if request.headers.get("content-type") != "application/json":
            raise invalid("header", "content-type")
        asked = json.loads(request.body)
        if not isinstance(asked.get("name"), str):
            raise invalid("body", "name")
        if "project_id" not in asked:
            raise invalid("body", "project_id")
        key = "llx-CANARY-" + secrets.token_hex(20)
        projects = None if asked["project_id"] is None else [asked["project_id"]]
        record = self.add_key(key, projects, login["sub"], login["email"], asked["name"])
        return reply(dict(asked, id=record["id"], redacted_api_key=key))

    def delete_key(self, request, key_id):
        login = self._login(request)
        for key, record in self.keys.items():
            if (record["id"], record["sub"]) == (key_id, login["sub"]):
                del self.keys[key]
                return reply(None, 204)
        raise refusal(404, "API key not found")

    def _login(self, request):
        login = self._live_login(bearer_token(request))
        if login is None:
            raise refusal(401, "A live access token of a login is needed", BEARER)
        return login

    def _principal(self, request):
        token = bearer_token(request)
        login = self._live_login(token)
        if token in self.keys:
            return self.keys[token]
        if login:
            return dict(login, projects=None)
        if not self.requires_auth:
            return {"sub": "anonymous", "email": None, "projects": None}
        raise refusal(401, "Invalid authentication credentials", BEARER)

    def _visible(self, request):
        allowed = self._principal(request)["projects"]
        return [
            project
            for project in self.projects
            if allowed is None or project["project_id"] in allowed
        ]


def bearer_token(request):
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


# ---------------------------------------------------------------------------------------
# The HTTP side: routes, handler, server.
# ---------------------------------------------------------------------------------------

# The first match wins; {} stands for one segment, which the method gets as an argument.
ROUTES = """
    GET     /api/v1beta1/deployments-public/version    version
    GET     /api/v1beta1/deployments/organizations     list_organizations
    GET     /api/v1beta1/deployments/list-projects     list_projects
    GET     /api/v1beta1/deployments                   list_deployments
    GET     /api/v1beta1/deployments/{}                one_deployment
    GET     /api/v1/auth/oidc/discovery                discovery
    GET     /api/v1/auth/me                            me
    POST    /api/v1/api-keys                           create_key
    DELETE  /api/v1/api-keys/{}                        delete_key
    GET     /oidc/.well-known/openid-configuration     configuration
    POST    /oidc/device_authorization                 device_authorization
    POST    /oidc/token                                token
    POST    /oidc/revoke                               revoke
    GET     /oidc/device                               approval_page
"""


def route(method, path):
    """The method of Cloud and its arguments from the path; 404 and 405 as FastAPI."""
    missing = refusal(404, "Not Found")
    for line in ROUTES.strip().splitlines():
        verb, pattern, name = line.split()
        match = re.fullmatch(pattern.replace("{}", "([^/]+)"), path)
        if match and verb == method:
            return getattr(Cloud, name), map(urllib.parse.unquote, match.groups())
        if match:
            missing = refusal(405, "Method Not Allowed")
    raise missing


def encoded(body):
    """(bytes, content type); a str may hold lone surrogates, sent as they are."""
    if body is None:
        return b"", None
    if isinstance(body, bytes):
        return body, "application/octet-stream"
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass"), "text/plain; charset=utf-8"
    return json.dumps(body).encode("ascii"), "application/json"


SERVER_ERROR = {"detail": "Internal Server Error"}


DAMAGED = "interim drip pause truncated short_length bad_chunk".split()  # the real answer


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    number = 0

    def log_message(self, *args):
        pass

    def respond(self):
        request = self._request()
        self.number, fault = self.server.cloud.receive(request)
        try:
            if fault:
                function, executed, options = fault
                answer = function(self, executed and self._answer(request), **options)
            else:
                answer = self._answer(request)
            if answer:
                self.wfile.write(b"".join(self._parts(answer)))
        except OSError:
            self.close_connection = True  # the client is gone

    do_GET = do_POST = do_DELETE = do_CONNECT = respond

    def _request(self):
        path, _, query = self.path.partition("?")
        # A proxy gets the absolute form, RFC 9112 section 3.2.2.
        path = re.sub("^https?://[^/]*", "", path) or "/"
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        body = self.rfile.read(int(length) if length.isdigit() else 0)
        body = body.decode("utf-8", "replace")
        query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        return Request(self.command, path, query, headers, body, self.server.cloud.clock())

    def _answer(self, request):
        try:
            function, segments = route(request.method, request.path)
            return self.server.cloud.answer(function, request, *segments)
        except Refusal as error:
            return error.answer
        except Exception as error:  # a bug of a test shows in its output, as a 500
            return refusal(500, f"stand-in: {error!r}").answer

    def _parts(self, answer, **changes):
        """Head and body as bytes; a header that is None is left out."""
        body, kind = encoded(answer.body)
        headers = {
            "date": self.date_time_string(),
            "x-request-id": f"req-{self.number}",
            "content-type": kind,
            "content-length": None if answer.status == 204 else len(body),
        }
        headers.update({name.lower(): value for name, value in answer.headers.items()})
        headers.update({name.replace("_", "-"): value for name, value in changes.items()})
        reason = self.responses.get(answer.status, ("Unknown",))[0]
        lines = [f"HTTP/1.1 {answer.status} {reason}"]
        lines += [
            f"{name}: {headers[name]}" for name in headers if headers[name] is not None
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape"), body

    def _send_last(self, *blocks):
        self.close_connection = True
        for block in blocks:
            self.wfile.write(block)

    # The faults, one method a kind: the answer that it damages, its options; what it
    # returns is sent.

    def fault_reset(self, answer):
        self.close_connection = True
        # With a linger time of 0 closing sends RST; a shutdown first would send FIN.
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        socket.socket(fileno=self.connection.detach()).close()

    def fault_close(self, answer):
        self.close_connection = True

    def fault_interim(self, answer):
        interim = b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\na: b\r\n\r\n"
        self._send_last(interim, *self._parts(answer))

    def fault_silence(self, answer):
        self.close_connection = True
        self.server.stopping.wait()

    def fault_drip(self, answer, delay=0.1, part="body"):
        head, body = self._parts(answer)
        if part == "body":
            self._send_last(head)
        else:
            body = head + body
        self.close_connection = True
        for index in range(len(body)):
            if self.server.stopping.wait(delay):
                return
            self.wfile.write(body[index : index + 1])

    def fault_pause(self, answer):
        head, body = self._parts(answer)
        self._send_last(head + body[: len(body) // 2])
        self.server.stopping.wait()

    def fault_truncated(self, answer):
        size = len(encoded(answer.body)[0])
        self._send_last(*self._parts(answer, content_length=size + 100))

    def fault_short_length(self, answer):
        size = len(encoded(answer.body)[0])
        self._send_last(*self._parts(answer, content_length=size // 2))

    def fault_bad_chunk(self, answer):
        head, body = self._parts(answer, content_length=None, transfer_encoding="chunked")
        self._send_last(head + b"%x\r\n" % (len(body) + 100) + body)

    def fault_html(self, answer):
        return page("Welcome", "This is a portal, not an API.")

    def fault_not_json(self, answer):
        return reply('{"version": "0.1', headers=JSON)

    def fault_wrong_shape(self, answer, body=(1,)):
        return reply(body, headers=JSON)

    def fault_huge(self, answer):
        self._send_last(
            self._parts(reply(b"", headers=JSON), content_length=None, connection="close")[
                0
            ]
        )
        for _ in range(10 * 2**30 // 65536):
            self.wfile.write(b" " * 65536)

    def fault_deep(self, answer):
        return reply("[" * 100000 + "]" * 100000, headers=JSON)

    def fault_status(self, answer, status=500, body=SERVER_ERROR, headers=()):
        return reply(body, status, headers)

    def fault_redirect(self, answer, to="/", status=302):
        return reply(None, status, {"location": to})

    def fault_loop(self, answer, status=302):
        return reply(None, status, {"location": self.path})

    def fault_garbage(self, answer):
        self._send_last(b"\x00\xff\x16\x03garbage, not HTTP\r\n\r\n\x1b[2J")

    def fault_chunks(self, answer, body=b""):
        """The body in chunks of two bytes."""
        chunked = {"content_length": None, "transfer_encoding": "chunked"}
        pieces = [body[at : at + 2] for at in range(0, len(body), 2)]
        chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
        head = self._parts(reply(b"", headers=JSON), **chunked)[0]
        self._send_last(head, b"".join(chunks), b"0\r\n\r\n")


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, cloud, context):
        self.cloud = cloud
        self.context = context
        self.stopping = threading.Event()
        self.live = set()
        super().__init__(address, Handler)

    def server_bind(self):
        # HTTPServer asks DNS for the host's name here, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        pass

    def get_request(self):
        connection, address = super().get_request()
        if self.context:  # hands are shaken in the thread, at its first read
            connection = self.context.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        self.live.add(connection)
        return connection, address

    def shutdown_request(self, request):
        super().shutdown_request(request)
        self.live.discard(request)

    def hang_up(self):
        """Wake every handler by closing its connection, and wait until it is gone."""
        give_up = time.monotonic() + 2
        while self.live and time.monotonic() < give_up:
            for connection in list(self.live):
                with contextlib.suppress(OSError):  # closed already
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)
            time.sleep(0.001)


def tls_context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "certificate-and-key.pem")
        context.load_cert_chain(write_file(path, TLS_CERTIFICATE + TLS_KEY))
    return context


class StandIn:
    """A cloud on a free port of its own: `with StandIn() as it: it.url, it.cloud`."""

    url = None
    _server = None

    def __init__(self, cloud=None, tls=False, host="127.0.0.1", port=0):
        self.cloud = cloud or Cloud()
        self.tls = tls
        self.host = host
        self.port = port

    def start(self):
        context = tls_context() if self.tls else None
        self._server = Server((self.host, self.port), self.cloud, context)
        scheme = "https" if self.tls else "http"
        self.url = f"{scheme}://{self.host}:{self._server.server_port}"
        self.cloud.base_url = self.url
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.002,), daemon=True).start()
        return self

    def stop(self):
        server, self._server = self._server, None
        if server:
            server.stopping.set()
            server.shutdown()
            server.server_close()
            server.hang_up()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.stop()


# ========================================================================================
# the harness: one temporary home and one stand-in a test; the program called in-process,
# as a real process, or on a real pseudo-terminal
# ========================================================================================

THIS = os.path.abspath(__file__)
HERE = os.path.dirname(THIS)
PROGRAM = os.environ.get("LLAMACTL_UNDER_TEST") or os.path.join(HERE, "llamactl.py")
KEY = "llx-CANARY-0123456789abcdef-wxyz"
OTHER_KEY = "llx-CANARY-fedcba9876543210-abcd"
# the interpreter as it was started: what runs under -I, -S, -O or -W runs its children so
PYTHON = (
    [sys.executable]
    + ["-I"] * sys.flags.isolated
    + ["-S"] * sys.flags.no_site
    + ["-O"] * sys.flags.optimize
    + ["-W" + each for each in sys.warnoptions]
)
CANARY = "CANARY"  # stands in every secret of every test, and in no output

sys.path.insert(0, os.path.dirname(PROGRAM))
import llamactl  # noqa: E402

Result = collections.namedtuple("Result", "code out err")


def text_of(*path):
    """The text of a file, of the project where PATH is relative."""
    with open(os.path.join(HERE, *path), encoding="utf-8") as file:
        return file.read()


class Case(unittest.TestCase):
    """A home of its own, the environment of a bare server, and a canary that must not
    sing."""

    maxDiff = None

    def setUp(self):
        self.home = os.path.realpath(tempfile.mkdtemp(prefix="llamactl-test-"))
        self.addCleanup(remove_tree, self.home)
        self.folder = os.path.join(self.home, "conf")
        self.store_path = os.path.join(self.folder, "profiles.json")
        self.env = {"HOME": self.home, "PATH": os.environ.get("PATH", ""), "TERM": "xterm"}
        self.env["LLAMACTL_CONFIG_DIR"] = self.folder
        if "LC_ALL" in os.environ:
            self.env["LC_ALL"] = os.environ["LC_ALL"]
        self.heard = []
        # Pauses too short to be noticed. Time-outs stay: only waiting in vain takes theirs.
        self.patch(RETRY_DELAYS=(0.0, 0.0), SLOW_DOWN=0.02, DEFAULT_INTERVAL=0.02)

    def patch(self, **constants):
        """Other constants than llamactl's own, until the test ends."""
        patcher = unittest.mock.patch.multiple(llamactl, **constants)
        patcher.start()
        self.addCleanup(patcher.stop)

    def impatient(self):
        """For where no answer comes."""
        waits = {"ANSWER_TIMEOUT": 0.25, "PAUSE_TIMEOUT": 0.25}
        return unittest.mock.patch.multiple(llamactl, **waits)

    def tearDown(self):
        for heard in self.heard:
            self.assertNotIn(CANARY, heard, "a secret was printed")
        for folder, _, names in os.walk(self.home):
            for path in [os.path.join(folder, name) for name in names]:
                if os.path.isfile(path) and not self.may_hold_secrets(path):
                    self.assertNotIn(CANARY.encode(), file_bytes(path), path)

    def may_hold_secrets(self, path):
        name = os.path.basename(path)
        return re.match(r"profiles\.json|(.*\.env|profiles\.db|key\.txt)\Z", name)

    def cloud_server(self):
        """A running stand-in for LlamaCloud, with KEY known and its environment current."""
        stand_in = StandIn().start()
        self.addCleanup(stand_in.stop)
        cloud = stand_in.cloud
        cloud.interval, cloud.auto_approve = 0.01, {}
        cloud.add_key(KEY)
        self.url = stand_in.url
        self.write_store({})
        return cloud

    def write_store(self, profiles, current=None, **extra):
        """A store whose current environment is the stand-in's."""
        record = {"requires_auth": True, "current_profile": current, "profiles": profiles}
        record.update(extra)
        data = {"version": 1, "current_environment": self.url}
        data["environments"] = {self.url: record}
        os.makedirs(self.folder, 0o700, exist_ok=True)
        write_file(self.store_path, json.dumps(data), 0o600)

    def with_profile(self, name="main", key=KEY, project="proj-alpha", **extra):
        profile = {"auth_type": "token", "api_key": key, "project_id": project}
        profile.update({"project_name": "Alpha", "org_id": "org-one"}, **extra)
        self.write_store({name: profile}, name)

    def stored(self):
        return load(text_of(self.store_path))["environments"]

    def profiles(self, url=None):
        return self.stored()[url or self.url]["profiles"]

    def call(
        self, *argv, stdin=b"", env=(), terminal=False, sings=False, program="llamactl"
    ):
        """main() in this process -> Result; SINGS: this command prints a secret rightly.

        The first of ARGV may be several words, with a space between each two.
        """
        argv = split_first(argv)
        out, err = io.BytesIO(), io.BytesIO()
        streams = {
            "stdin": io.TextIOWrapper(io.BytesIO(stdin), "utf-8"),
            "stdout": io.TextIOWrapper(out, "utf-8"),
            "stderr": io.TextIOWrapper(err, "utf-8", write_through=True),
        }
        if terminal:
            streams["stdin"].isatty = streams["stderr"].isatty = lambda: True
        environment = dict(self.env, **dict(env))
        mock = unittest.mock.patch
        before = state_of_process()
        with mock.multiple(sys, argv=[program] + argv, **streams):
            with mock.dict(os.environ, environment, clear=True):
                code = llamactl.main(argv)
                streams["stdout"].flush()
        self.assertEqual(state_of_process(), before)
        return self.note(code, out.getvalue(), err.getvalue(), sings)

    def note(self, code, out, err, sings=False):
        out, err = out.decode("utf-8"), err.decode("utf-8", "replace")
        out, err = out.replace(os.linesep, "\n"), err.replace(os.linesep, "\n")
        self.heard += [err] if sings else [out, err]
        self.assertNotIn("Traceback", err)
        self.assertNotIn("internal error in llamactl", err)
        return Result(code, out, err)

    def spawn(self, *argv, python=(), **options):
        """A real process of the program; PYTHON are the interpreter's own options."""
        return self.popen(*PYTHON, *python, PROGRAM, *split_first(argv), **options)

    def popen(self, *command, env=(), **options):
        """A process of any program in the home of the test, with pipes."""
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        options.setdefault("cwd", self.home)
        return subprocess.Popen(command, env=dict(self.env, **dict(env)), **options)

    def process(self, *argv, stdin=b"", sings=False, timeout=30, **options):
        """What spawn() starts, run to its end -> Result."""
        return self.outcome_of(self.spawn(*argv, **options), stdin, sings, timeout)

    def run_command(self, *command, stdin=b"", sings=False, timeout=30, **options):
        """What popen() starts, run to its end -> Result."""
        return self.outcome_of(self.popen(*command, **options), stdin, sings, timeout)

    def outcome_of(self, process, stdin=b"", sings=False, timeout=30):
        try:
            out, err = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return self.note(process.returncode, out or b"", err or b"", sings)

    def play(self, transcript, **options):
        """Call what stands behind each `$`, and compare what it prints.

        A line is `$ [NAME=VALUE...] llamactl WORDS...`, as a shell reads it. Below it stand
        all lines of its stdout, then all of its stderr, then [CODE] where that is not 0;
        `...` is any text, on a line of its own any lines. Returns the last Result.
        """
        for block in re.split(r"(?m)^\s*\$ ", transcript)[1:]:
            command, *lines = [line.strip() for line in block.strip().splitlines()]
            words = shlex.split(command)
            start = words.index("llamactl")
            env = dict(word.split("=", 1) for word in words[:start])
            with self.subTest(command):
                result = self.call(*words[start + 1 :], env=env, **options)
                code = f"[{result.code}]\n" if result.code else ""
                shown = re.sub("(?m)^ +| +$", "", result.out + result.err) + code
                self.assert_shown(shown, lines)
        return result

    def assert_shown(self, text, lines):
        if not re.match(transcript_pattern(lines), text, re.MULTILINE):
            self.assertEqual(text, "\n".join(lines + [""]))

    def pty(self, argv, script=(), env=(), command=None, timeout=15, sings=False):
        """The program on a pseudo-terminal in a session of its own -> Result, all text
        in `out`.

        SCRIPT is a list of (text to wait for, bytes to type; None hangs up).
        """
        argv = argv.split(" ") if isinstance(argv, str) else argv
        command = command or PYTHON + [PROGRAM] + argv
        screen = Screen(command, dict(self.env, **dict(env)), self.home)
        try:
            for expected, typed in script:
                screen.wait_for(expected, timeout)
                screen.type(typed)
            code = screen.finish(timeout)
        finally:
            screen.close()
        self.note(code, b"", bytes(screen.seen), sings)
        return Result(code, screen.text().replace("\r\n", "\n"), "")


def state_of_process():
    """What a command, whatever becomes of it, leaves as it was."""
    here = os.stat(os.curdir)
    state = [here.st_dev, here.st_ino]
    if hasattr(os, "geteuid"):
        state += [os.geteuid(), os.getegid(), os.getgroups()]
    open_files = []
    with contextlib.suppress(OSError):  # only Linux tells
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the one that lists
                open_files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    # not the stand-in's connections, nor what SQLite keeps open while a test does
    open_files = [path for path in open_files if re.match(r"/(?!.*\.db(-\w+)?$)", path)]
    return state + sorted(open_files)


def split_first(argv):
    """A command line as a list; its first word may be several."""
    return argv[0].split(" ") + list(argv[1:]) if argv else []


def transcript_pattern(lines):
    """What LINES stand for: `...` is any text, on a line of its own any lines."""
    patterns = []
    for line in lines:
        if line == "...":
            patterns.append(r"(?:(?!\[\d+\]$).*\n)*")
        else:
            patterns.append(".*".join(map(re.escape, line.split("..."))) + "\n")
    return "".join(patterns) + r"\Z"


# what pip makes of the entry point, without its file
INSTALLED = [
    *PYTHON,
    "-c",
    f"""import sys; sys.path.insert(0, {os.path.dirname(PROGRAM)!r})
import llamactl; sys.exit(llamactl.main())""",
]


class Screen:
    """A process on a pseudo-terminal that is its controlling one."""

    # a session leader without a terminal takes the one it is told to
    SHIM = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""

    def __init__(self, command, env, cwd):
        try:
            self.master, slave = os.openpty()
        except OSError:
            raise unittest.SkipTest("there are no pseudo-terminals here") from None
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.SHIM] + command,
            env=env,
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = bytearray()
        self.searched = 0

    def text(self):
        return self.seen.decode("utf-8", "replace")

    def read(self, timeout):
        ready = select.select([self.master], [], [], timeout)[0] if self.master >= 0 else []
        if not ready:
            return False
        try:
            chunk = os.read(self.master, 65536)
        except OSError:  # Linux says EIO when the last one hangs up
            return False
        self.seen += chunk
        return bool(chunk)

    def wait_for(self, text, timeout):
        end = time.monotonic() + timeout
        while text.encode() not in self.seen[self.searched :]:
            if not self.read(max(0, end - time.monotonic())):
                raise AssertionError(f"{text!r} never came; there was {self.text()!r}")
        self.searched = self.seen.index(text.encode(), self.searched) + len(text)

    def type(self, typed):
        if typed is None:
            os.close(self.master)
            self.master = -1
        else:
            os.write(self.master, typed)

    def finish(self, timeout):
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, end - time.monotonic()))

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.master >= 0:
            os.close(self.master)


def remove_tree(folder):
    for path, folders, _ in os.walk(folder):
        for name in folders:
            with contextlib.suppress(OSError):
                os.chmod(os.path.join(path, name), 0o700)
    shutil.rmtree(folder, ignore_errors=True)


CONTROL = "/api/v1beta1/deployments"
VERSION = "/api/v1beta1/deployments-public/version"
LIST_PROJECTS = "/api/v1beta1/deployments/list-projects"
ORGANIZATION_LIST = "/api/v1beta1/deployments/organizations"
DISCOVERY = "/api/v1/auth/oidc/discovery"
CONFIGURATION = "/oidc/.well-known/openid-configuration"
DEVICE_CODE = "/oidc/device_authorization"
TOKEN = "/oidc/token"
REVOKE = "/oidc/revoke"
ME = "/api/v1/auth/me"
API_KEYS = "/api/v1/api-keys"
DEFAULT_URL = "https://api.cloud.llamaindex.ai"
UNSEEN = "0a1b2c3d-0000-4000-8000-123456789abc"  # the id of a project that nobody has
NOWHERE = "http://127.0.0.1:1"  # nothing listens there, and no name must be looked up
# what would move a cursor, ring a bell, set a title, forge a row or turn the text around
HOSTILE = "a\x1b[2J\x1b]0;x\x07\nFORGED  row\r\u202e\u2066\u200b\u2028\x9b31m\x00\tz"
UNSHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
# runs the program as the main one, after what stands in front of it
AS_MAIN = """\
import os, sys
os._exit = sys.exit
sys.argv = sys.argv[1:]
with open(sys.argv[0], encoding="utf-8") as file:
    code = compile(file.read(), sys.argv[0], "exec")
try:
    exec(code, {"__name__": "__main__", "__file__": sys.argv[0]})
except SystemExit as end:
    status = end.code
"""


class CommandCase(Case):
    """A stand-in, no profile yet, and short ways to say what a command must answer."""

    def setUp(self):
        super().setUp()
        self.cloud = self.cloud_server()

    def expect(self, result, code, out="", err=""):
        """OUT is the whole of stdout, None any; ERR is searched for in stderr, '' is
        none."""
        self.assertEqual(result.code, code, result.err)
        if out is not None:
            self.assertEqual(result.out, out)
        if err:
            self.assertRegex(result.err, err)
        else:
            self.assertEqual(result.err, "")

    def expect_failure(self, result, code, message, hint=None):
        """One line that says what and why, then HINT if that is the next command; no
        data."""
        self.assertEqual((result.code, result.out), (code, ""), result.err)
        lines = re.sub("(?m)^warning: .*\n", "", result.err).splitlines()
        self.assertRegex("".join(lines[:1]), "^error: ", result.err)
        self.assertRegex(lines[0], message)
        self.assertLessEqual(len(lines), 2, result.err)
        if hint is not None:
            self.assertRegex("".join(lines[1:]), "^hint: .*" + re.escape(hint))

    def failures(self, table, **options):
        for argv, code, message, hint in table:
            with self.subTest(argv=argv):
                result = self.call(*argv.split(), **options)
                self.expect_failure(result, code, message, hint)

    def done(self, *argv, **options):
        result = self.call(*argv, **options)
        self.assertEqual(result.code, 0, result.err)
        return result

    def rows(self, *argv, **options):
        """The JSON value, after proof that YAML says the same."""
        text = self.done(*argv, "-o", "json", **options).out
        value = json.loads(text, object_pairs_hook=collections.OrderedDict)
        text = self.done(*argv, "-o", "yaml", **options).out
        self.assertEqual(text, llamactl.yaml_text(value))
        return value

    def table(self, *argv, **options):
        """The cells of a text table; no command colours or truncates."""
        text = self.done(*argv, **options).out
        self.assertNotIn("\x1b", text)
        return [re.split(" {2,}", line) for line in text.splitlines()]

    def login(self, *argv, code=0, **options):
        result = self.call("auth login --no-browser", *split_first(argv), **options)
        self.assertEqual(result.code, code, result.err)
        return result

    def requests(self):
        return [(request.method, request.path) for request in self.cloud.requests]

    def store_text(self):
        return text_of(self.store_path)

    def key_file(self, content):
        return write_file(os.path.join(self.home, "key.txt"), content)


def fields(value):
    return list(value[0] if isinstance(value, list) else value)


def bearers(requests):
    headers = [request.headers.get("authorization", "none") for request in requests]
    return {header.split()[-1] for header in headers}


# ========================================================================================
# house: its rooms, who owns what, its size
# ========================================================================================

ROOMS = (
    "front door,constants,errors,process,text,output,dotenv,terminal,disk,store,http,oauth,"
    "api,credential,login,takeover,commands,parser,main"
).split(",")
NETWORK_MODULES = {"urllib", "ssl", "http", "socket", "email"}
SLOW_MODULES = NETWORK_MODULES | {"typing", "hashlib", "getpass"}
ALLOWED_MODULES = set(
    "argparse contextlib errno json os re stat sys time collections io base64 getpass "
    "warnings webbrowser signal subprocess sqlite3 fcntl msvcrt ssl urllib http socket "
    "threading difflib textwrap typing email pwd shlex select ipaddress fnmatch shutil "
    "functools unicodedata termios".split()
)
# What is called in one room alone: the rooms, a pattern, places that may call it as well.
OWNED = r"""
    terminal    sys\.(stdout|stderr|stdin)\..*|input|getpass\..*|webbrowser\..*
    process     os\.environ\..*|os\.uname|os\.exec.*|subprocess\..*|os\.path\.expanduser
    takeover    sqlite3\..*
    http        urllib\..*|ssl\..*|http\..*|socket\..*
    disk,store  os\.(open|replace|rename|unlink|mkdir|makedirs|chmod|fchmod|fchown)
    disk,store  os\.(fsync|ftruncate)|fcntl\..*|msvcrt\..*
    disk,store,http      os\.listdir
    disk,store,terminal  open
"""
USED = r"""
    process          os\.environ
    main,front door  sys\.exit
    terminal         sys\.(stdin|stdout|stderr)
"""
# What looks like a variable of the environment and is none.
NO_VARIABLES = set(
    "CERTIFICATE_VERIFY_FAILED WRONG_VERSION_NUMBER "
    "GET POST NFC DELETE NAME URL ID PATH KEY AUTH DEPLOYMENT EOF SHELL FW O_PATH O_BINARY "
    "ST_RDONLY O_DIRECTORY O_NOFOLLOW O_NONBLOCK SIGINT SIGHUP "
    "SIGQUIT SIGTERM".split()
)
MAX_TOKENS = 26000


def dotted(node):
    """`os.open` for the expression os.open; empty for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return dotted(node.value) + "." + node.attr
    return node.id if isinstance(node, ast.Name) else ""


class House(unittest.TestCase):
    """What house.md asks of llamactl.py; pyproject.toml has what ruff and mypy check."""

    @classmethod
    def setUpClass(cls):
        cls.source = text_of(PROGRAM)
        cls.tree = ast.parse(cls.source)
        cls.nodes = list(ast.walk(cls.tree))
        cls.rooms = {1: "front door"}  # by the line that each begins at
        for number, line in enumerate(cls.source.splitlines(), 1):
            banner = re.match("# =+ ([a-z]+):", line)
            if banner:
                cls.rooms[number] = banner.group(1)

    def all_of(self, *kinds):
        return [node for node in self.nodes if isinstance(node, kinds)]

    def room(self, number):
        return self.rooms[max(line for line in self.rooms if line <= number)]

    def assert_only(self, table, uses):
        """Of USES, (line, name), those that match a pattern of TABLE are in its rooms."""
        for row in table.strip().splitlines():
            rooms, pattern = re.split(" {2,}", row.strip())
            lines = [line for line, name in uses if re.fullmatch(pattern, name)]
            found = set(map(self.room, lines))
            with self.subTest(pattern):
                self.assertTrue(found, "nobody does")
                self.assertEqual(found - set(rooms.split(",")), set())

    def test_rooms_stand_in_order(self):
        self.assertEqual(list(self.rooms.values()), ROOMS)

    def test_the_tests_stand_in_the_order_of_the_rooms(self):
        banners = re.findall("(?m)^# [-=]+\n# ([a-z ]+): ", text_of(THIS))
        rooms = [room for room in banners if room in ROOMS]
        self.assertGreater(len(set(rooms)), 8)
        self.assertEqual(rooms, sorted(rooms, key=ROOMS.index))

    def test_size(self):
        self.assertLessEqual(self.tokens(), MAX_TOKENS)
        sizes = []
        for function in self.all_of(ast.FunctionDef):
            last = max(getattr(node, "lineno", 0) for node in ast.walk(function))
            sizes.append(last - function.lineno + 1)
            self.assertLessEqual(sizes[-1], 40, function.name)
            if sizes[-1] > 10 and function.name not in ("__init__", "wait"):
                self.assertTrue(ast.get_docstring(function), function.name)
        self.assertLessEqual(statistics.median(sizes), 12)

    def tokens(self):
        """What is read and compiled, an f-string being one token, as before 3.12."""
        count, depth = 0, 0
        counted = ("NAME", "NUMBER", "STRING", "OP", "FSTRING_END")
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            name = tokenize.tok_name[token.type]
            depth -= name == "FSTRING_END"
            count += depth == 0 and name in counted
            depth += name == "FSTRING_START"
        return count

    def test_names_refer_only_upward(self):
        """A function may use what was defined above its own end: never what comes later."""
        defined = {}
        for node in self.tree.body:
            names = [node.name] if hasattr(node, "name") else []
            for target in getattr(node, "targets", ()):
                names += [part.id for part in ast.walk(target) if hasattr(part, "id")]
            for name in names:
                defined.setdefault(name, node.lineno)
        for node in self.tree.body:
            parts = list(ast.walk(node))
            own = {part.arg for part in parts if isinstance(part, ast.arg)}
            own |= {part.name for part in parts[1:] if isinstance(part, ast.FunctionDef)}
            for name in parts:
                if isinstance(name, ast.Name) and name.id not in own:
                    self.assertLessEqual(defined.get(name.id, 0), name.lineno, name.id)

    def test_who_owns_what(self):
        calls = [(call.lineno, dotted(call.func)) for call in self.all_of(ast.Call)]
        self.assert_only(OWNED, calls)
        self.assertNotIn("print", [name for _, name in calls])
        uses = [(node.lineno, dotted(node)) for node in self.all_of(ast.Attribute)]
        self.assert_only(USED, uses)

    def test_only_the_standard_library_and_the_network_only_when_it_is_used(self):
        """In functions of http, but for urllib.parse, which sends nothing."""
        checked_only = self.source.index("\nif TYPE_CHECKING:")
        statement = r"(?m)^( *)(?:from ([\w.]+) import .+|import ([\w.]+))$"
        for match in re.finditer(statement, self.source):
            indent, *modules = match.groups()
            module = modules[0] or modules[1]
            package = module.partition(".")[0]
            room = self.room(self.source.count("\n", 0, match.start()) + 1)
            with self.subTest(match.group()):
                self.assertIn(package, ALLOWED_MODULES)
                if not indent or match.start() < checked_only:
                    self.assertNotIn(package, SLOW_MODULES)
                elif module != "urllib.parse" and room not in ("http", "front door"):
                    self.assertNotIn(package, NETWORK_MODULES)

    def test_only_main_and_the_thread_of_an_exchange_catch_everything(self):
        catchers = {
            function.name
            for function in self.all_of(ast.FunctionDef)
            for node in ast.walk(function)
            if dotted(getattr(node, "type", None)) == "Exception"
        }
        self.assertEqual(catchers - {"send_once"}, {"exchange", "run_and_report"})

    def test_four_files(self):
        """At the top level, besides dot files, of what git has or, without it, would."""
        command = "git ls-files --error-unmatch llamactl.py >&2 && git ls-files || ls"
        quiet = subprocess.DEVNULL
        listed = subprocess.check_output(
            command, shell=True, cwd=HERE, stderr=quiet
        ).decode()
        names = {line.partition("/")[0] for line in listed.splitlines()}
        for pattern in [".*"] + text_of(".gitignore").split():
            names -= set(fnmatch.filter(names, pattern.strip("/")))
        known = {"llamactl.py", "test_llamactl.py", "README.md", "pyproject.toml"}
        self.assertEqual(names - known, set())

    def test_the_docstring_names_each_variable(self):
        """The auditor's map is whole: what the file reads from the environment stands in
        it."""
        words = set(re.findall('"([A-Z][A-Z_]+)"', self.source)) - NO_VARIABLES
        self.assertLessEqual({"LLAMA_CLOUD_API_KEY", "CI", "APPDATA", "DISPLAY"}, words)
        docstring = ast.get_docstring(self.tree)
        self.assertEqual({word for word in words if word not in docstring}, set())

    def test_the_package(self):
        text = text_of("pyproject.toml")
        for line in (
            'requires-python = ">=3.6"',
            "dependencies = []",
            'llamactl = "llamactl:main"',
            'build-backend = "flit_core.buildapi"',
            'name = "llamactl-single-file"',
        ):
            self.assertIn(f"\n{line}\n", text)


# ========================================================================================
# front door: start-up, everywhere
# ========================================================================================

# types the lines of stdin into one process of the program, after what stands in front
TYPED = """
import argparse, json, sys
bare = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import llamactl
for line in sys.stdin.read().splitlines():
    print(line, flush=True)
    code = llamactl.main(line.split()[2:])
    if code:
        print("[%d]" % code, flush=True)
"""


class Numbers(unittest.TestCase):
    """What the other tests shrink, as behaviour.md, the RFCs and the systems have it."""

    PROMISED = """
        EXIT_DONE = 0  EXIT_FAILED = 1  EXIT_USAGE = 2  EXIT_REJECTED = 4
        EXIT_UNREACHABLE = 5  EXIT_NOT_EXECUTABLE = 126  EXIT_NOT_FOUND = 127
        ANSWER_TIMEOUT = 10.0  PAUSE_TIMEOUT = 10.0  WHOLE_TIMEOUT = 60.0
        LOCK_TIMEOUT = 10.0  MAX_HOLD = 60.0  RETRY_DELAYS = (0.5, 1.5)
        KEY_TIMEOUT = 5.0  REVOCATION_TIMEOUT = 3.0  TOKEN_LEEWAY = 30.0
        DEFAULT_INTERVAL = 5.0  SLOW_DOWN = 5.0  CLOCK_LEEWAY = 120.0  ONE_DAY = 86400.0
        MAX_ANSWER = 8388608  MAX_REDIRECTS = 5  MAX_RETRY_AFTER = 30.0
        MAX_KEY_BYTES = 65536  MAX_LINE = 4095  MENU_LENGTH = 20  MAX_STARS = 6
        MAX_TOLD = 4000  MAX_COLUMN = 200  STORE_VERSION = 1  F_FULLFSYNC = 51
        DEFAULT_API_URL = https://api.cloud.llamaindex.ai
    """

    def test_they_are_those_promised(self):
        for promise in re.split(" {2,}|\n", self.PROMISED.strip()):
            name, _, value = promise.partition(" = ")
            if name:
                self.assertEqual(str(getattr(llamactl, name)), value, name)


class StartUp(CommandCase):
    def python(self, *argv, **options):
        return self.run_command(sys.executable, *argv, **options)

    def copy(self, *path):
        """A copy of the program at PATH below the home."""
        return shutil.copy(PROGRAM, os.path.join(self.home, *path))

    def play_in_one_process(self, transcript, *options, before="", after=""):
        """Like play(); each line's stdout and stderr come as they come."""
        lines = [line.strip() for line in transcript.strip().splitlines()]
        typed = "\n".join(line for line in lines if line.startswith("$ "))
        script = before + TYPED + after
        argv = [*options, "-c", script, os.path.dirname(PROGRAM)]
        result = self.python(*argv, stdin=typed.encode(), stderr=subprocess.STDOUT)
        self.assert_shown(result.out, lines)

    def test_modules_beside_the_script_are_not_imported(self):
        """Nor those in the working folder, when it came in on stdin."""
        self.with_profile()
        folder = os.path.join(self.home, "downloads")
        os.mkdir(folder)
        for name in (
            "argparse base64 collections contextlib difflib email errno getpass http json "
            "os pwd re shlex signal socket ssl stat threading time traceback typing urllib"
        ).split():
            path = os.path.join(folder, f"{name}.py")
            write_file(path, f"import sys; sys.exit('{name} was imported')\n")
        script = self.copy("downloads", "llamactl.py")
        link = os.path.join(self.home, "link")
        os.symlink(script, link)
        expected = self.done("projects get").out
        for name, program, cwd, stdin in (
            ("a script in the working folder", "llamactl.py", folder, b""),
            ("a link", link, self.home, b""),
            ("-", "-", folder, file_bytes(script)),
        ):
            with self.subTest(name):
                result = self.python(program, "projects", "get", cwd=cwd, stdin=stdin)
                self.expect(result, 0, expected)

    def test_ways_to_start_it(self):
        self.with_profile()
        renamed = self.copy("my tool")
        self.copy("llamactl.py")
        expected = self.done("auth get").out
        for argv in (
            ["-m", "llamactl"],
            ["-I", "-S", "-O", PROGRAM],
            ["-W", "error", renamed],
        ):
            with self.subTest(argv=argv):
                self.expect(self.python(*argv, "auth", "get"), 0, expected)
        source = file_bytes(PROGRAM)
        self.expect(self.python(stdin=source), 0, self.done().out)
        self.assertEqual(source.splitlines()[0], b"#!/usr/bin/env python3")

    def test_local_commands_import_next_to_nothing(self):
        self.with_profile()
        heavy = (
            "urllib ssl http email getpass webbrowser hashlib subprocess tempfile shutil "
            "sqlite3 typing dataclasses inspect socket"
        )
        self.play_in_one_process(
            f"""
            $ llamactl auth get
            NAME ...
            main ...
            $ llamactl --quiet auth use main
            $ llamactl --quiet auth inject
            $ llamactl config -o yaml
            environment: {self.url}
            profile: main
            project_id: proj-alpha
            project_name: Alpha
            $ llamactl environments get
            API_URL ...
            {DEFAULT_URL} ...
            {self.url} ...
            $ llamactl --quiet environments add https://a.example --no-verify
            $ llamactl --quiet environments use {self.url}
            $ llamactl --quiet environments delete https://a.example
            $ llamactl --quiet auth logout main
            heavy and new:
            """,
            "-I",
            "-S",
            after=f"""
new = set(sys.modules) - bare
print("heavy and new:", *new & set("{heavy}".split()))
""",
        )

    def test_python_2_reads_a_sentence(self):
        source = text_of(PROGRAM)
        first = ast.parse(source).body[1]
        self.assertIsInstance(first, ast.AnnAssign)  # which Python 2 and 3.5 cannot parse
        sentence = source.splitlines()[first.lineno - 1]
        self.assertIn("needs Python 3.6 or newer", sentence)
        root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
        pythons = glob.glob(os.path.join(root, "versions", "2.7*", "bin", "python2.7"))
        for python in filter(None, [shutil.which("python2.7"), *pythons]):
            if self.run_command(python, "-c", "").code == 0:  # pyenv's own may lead nowhere
                shown = self.run_command(python, PROGRAM, "auth", "get").err
                self.assertIn(sentence, shown)

    def test_a_stripped_python_is_told_which_module_it_lacks(self):
        """As Debian's python3-minimal is, wherever the module is needed first."""
        self.with_profile()
        for name in ("json", "argparse"):
            run = f"import sys\nsys.modules['{name}'] = None\n{AS_MAIN}sys.exit(status)"
            self.expect(
                self.python("-c", run, PROGRAM, "--version"),
                1,
                "",
                rf"\Aerror: this Python lacks the module {name}; install .*\n\Z",
            )
        importlib.import_module("urllib.request")  # so that http.client is the thread's
        for name, line in (
            ("difflib", "confg"),
            ("http.client", "projects get"),
            ("urllib.request", "projects get"),
        ):
            with unittest.mock.patch.dict(sys.modules, {name: None}):
                self.play(f"""
                    $ llamactl {line}
                    error: this Python lacks the module {name}; install ...
                    [1]
                """)

    def test_where_memory_ends_one_line_says_so(self):
        self.with_profile()
        for failing in ("load", "opened"):
            error = {failing: unittest.mock.Mock(side_effect=MemoryError)}
            with unittest.mock.patch.multiple(llamactl.Store, **error):
                self.play("""
                    $ llamactl auth get
                    error: out of memory
                    [1]
                """)

    def test_what_no_command_has_caught(self):
        for error, said in (
            (OSError(errno.ENOENT, "No such file", "/secret"), "No such file"),
            (MemoryError(), "out of memory"),
            (ValueError("a secret"), "internal error in .*: ValueError at line [0-9]+"),
            (ImportError("a secret", name="ssl"), ".*lacks the module ssl; .*"),
        ):

            def fail(*_, error=error):
                raise error

            terminal = unittest.mock.Mock()
            with patched(llamactl, "run_command", fail):
                self.assertEqual(llamactl.run_and_report(terminal, []), 1)
            self.assertRegex(terminal.tell.call_args[0][0], rf"\Aerror: {said}\Z")

    def test_a_mistake_of_its_own_is_told_with_its_line(self):
        try:
            llamactl.retried(lambda: {}["a secret"])
        except KeyError as error:
            said = llamactl.describe_bug(error)
        self.assertNotIn("secret", said)
        line = int(re.search(r": KeyError at line (\d+)$", said).group(1))
        self.assertIn("return action()", text_of(PROGRAM).splitlines()[line - 1])

    def test_missing_modules(self):
        """What a self-compiled Python may lack: one by one, then all together."""
        self.with_profile()
        for name in ("fcntl", "sqlite3", "readline"):
            with unittest.mock.patch.dict(sys.modules, {name: None}):
                self.play("""
                    $ llamactl auth use main
                    ...
                    profile main is current
                    $ llamactl projects get
                    NAME ...
                    Alpha ...
                    Beta ...
                """)
        write_file(os.path.join(self.folder, "profiles.db"), "")
        missing = "fcntl _ssl ssl sqlite3 _sqlite3 readline"
        self.play_in_one_process(
            """
            $ llamactl auth get
            NAME ...
            main ...
            $ llamactl projects get
            NAME ...
            Alpha ...
            Beta ...
            $ llamactl --quiet environments add https://127.0.0.1:1 --no-verify
            warning: ... does not support file locks; ...
            $ llamactl auth token --api-key llx-1 --project p
            warning: ... does not support file locks; ...
            error: ...no ssl module...
            [1]
            $ llamactl auth status --offline
            NAME ...
            ...
            hint: llamactl auth login
            [4]
            $ llamactl auth import --from-official
            error: this Python has no sqlite3 module, ...
            [1]
            """,
            before=f"import sys\nsys.modules.update(dict.fromkeys('{missing}'.split()))",
        )

    def test_nothing_below_the_folder_is_made_elsewhere(self):
        self.done("auth get", env={"LLAMACTL_CONFIG_DIR": ""})
        self.assertEqual(os.listdir(self.home), ["conf"])


# ----------------------------------------------------------------------------------------
# text: clean(), masked(), URLs, names; and tables
# ----------------------------------------------------------------------------------------

# what could act on a terminal, hide or reorder text, or has no UTF-8
UNPRINTABLE = UNSHOWN.pattern + "|[\ud800-\udfff\ufffe\uffff]"


class Tables(unittest.TestCase):
    def test_columns_are_two_spaces_apart_and_stand_below_each_other(self):
        rows = (
            ("caf\u00e9", True, "one"),
            ("\u1112\u1161\u11ab\u304b\u3099", True, "\u200b"),
            ("", 0, "two"),
            (None, False, "x" * 300),
            ("\u4e2d\u6587e\u0301\U0001f600", 10**20, None),
            ("x\u0301", 1, "three"),  # which NFC cannot compose
        )
        self.assertEqual(
            llamactl.table_text(("NAME", "N", "ID"), rows),
            f"""\
NAME     N                      ID
caf\u00e9     yes                    one
\u1112\u1161\u11ab\u304b\u3099     yes                    -
-        0                      two
-        no                     {"x" * 300}
\u4e2d\u6587e\u0301\U0001f600  100000000000000000000  -
x\u0301        1                      three
""",
        )

    def test_a_value_in_each_output(self):
        row = {"name": "a", "project_id": 1}
        for value, output, text in (
            (row, "text", "NAME  ID\na     1\n"),
            ([row, row], "text", "NAME  ID\na     1\na     1\n"),
            ([], "text", ""),
            ([row], "json", '[\n  {\n    "name": "a",\n    "project_id": 1\n  }\n]\n'),
            ([row], "yaml", "- name: a\n  project_id: 1\n"),
        ):
            with self.subTest(value=value, output=output):
                found = llamactl.output_text(value, output, "name id=project_id")
                self.assertEqual(found, text)

    def test_one_row_a_line_whatever_the_cells_hold(self):
        rows = [(text, "end") for text in TRICKY_TEXTS]
        text = llamactl.table_text(("NAME", "END"), rows)
        self.assertNotRegex(text, UNPRINTABLE)
        lines = text.splitlines()
        self.assertEqual(len(lines), len(rows) + 1)
        self.assertEqual([line for line in lines[1:] if not line.endswith("  end")], [])

    def test_one_long_cell_pads_no_other_row(self):
        long = "x" * 201
        text = llamactl.table_text(("NAME", "N"), [(long, 1), ("y" * 200, 2), ("z", 3)])
        self.assertEqual(
            text.splitlines()[1:],
            [f"{long}  1", "y" * 200 + "  2", "z" + " " * 199 + "  3"],
        )


class CleanAndMasked(CommandCase):
    def test_clean_leaves_nothing_that_acts_on_a_terminal(self):
        every = "".join(map(chr, range(0x11000))) + "\U0001f600\U000e0041\U0010ffff"
        self.assertNotRegex(llamactl.clean(every), UNPRINTABLE + "|\n")
        self.assertEqual(llamactl.clean("a\r\n\tb\ud800c\x07"), "a b\ufffdc")

    def test_clean_leaves_letters_alone(self):
        for text in ("", "a  b caf\u00e9 \u4e2d\u6587 e\u0301 \U0001f600"):
            self.assertEqual(llamactl.clean(text), text)
            self.assertEqual(llamactl.clean(text + "\x07"), text)

    def test_masked_leaves_no_part_of_a_secret(self):
        for text, secrets_in_use, shown in (
            ("x-s3cret-y s3cret\n", ["s3cret"], "x-********-y ********\n"),
            ("nothing here", ["s3cret"], "nothing here"),
            ('{"key": "a\\"b"}', ['a"b'], '{"key": "********"}'),
            ("<abcdefghij>", ["abcdef", "abcdefghij"], "<********>"),
            ("<abcdefghij>", ["abcdefghij", "abcdef"], "<********>"),
            ("<abcdefghij>", ["cdef", "abcdefghij"], "<********>"),
        ):
            with self.subTest(text, secrets=secrets_in_use):
                self.assertEqual(llamactl.masked(text, secrets_in_use), shown)

    def test_clean_does_not_put_an_echoed_secret_together_again(self):
        key = "CANARY-without-a-prefix"
        self.cloud.add_key(key)
        self.with_profile(key=key)
        for gap in ("\x07", "\u200b", "\u202e", "\x1b"):
            echo = key[:3] + gap + key[3:]
            self.cloud.projects[0].update(project_name=echo, org_id=echo)
            for output in ("text", "json", "yaml"):  # the canary listens in tearDown()
                self.done("projects get -o", output)
            self.cloud.fault("*", "status", status=400, body={"detail": echo})
            self.assertEqual(self.call("projects get").code, 1)

    def test_a_secret_of_seven_characters_is_not_masked(self):
        for key, shown in (("seven77", "seven77"), ("eight888", "********")):
            with self.subTest(key):
                self.cloud.add_key(key)
                self.with_profile(key=key)
                self.cloud.projects[0].update(project_name=key)
                self.assertIn(shown, self.table("projects get")[1])


class Loopback(unittest.TestCase):
    def test_this_machine_in_each_spelling(self):
        for host in (
            "localhost LOCALHOST localhost. foo.localhost ip6-localhost 127.0.0.1 127.1 "
            "0.0.0.0 0x7f.1 0177.0.0.1 2130706433 [::1] [::] [0:0:0:0:0:0:0:1] "
            "[::ffff:127.0.0.1] [::ffff:7f00:1]"
        ).split():
            for rest in ("", ":8000", "/x"):
                self.assertTrue(llamactl.is_loopback(f"http://{host}{rest}"), host)
        for host in (
            "localhost.example.com mylocalhost 128.0.0.1 10.0.0.1 1.127.0.0.1.example "
            "0x7f.example 0x7f.de 0xcafe.de 0x0a000001 167772161 010.0.0.1 0.0.0.1 "
            "[::2] [fe80::1] [::ffff:10.0.0.1] example.com 127.example.com"
        ).split():
            self.assertFalse(llamactl.is_loopback(f"http://{host}"), host)


class Passwords(unittest.TestCase):
    ADDRESSES = """\
        https://u:p@h/x        https://********@h/x
        https://token@h/x      https://********@h/x
        see 'https://u:p@h'.   see 'https://********@h'.
        "a": "https://u:'w@h"  "a": "https://********@h"
        https://u:p/w@h        https://********@h
        http://u:12w/x@h       http://********@h
        //u:pw@h               //u:********@h
        socks5://u:p@h:1       socks5://u:********@h:1
        ssh://git@h/x          ssh://git@h/x
        git@github.com:x/y     git@github.com:x/y
        https://h/x            https://h/x
        https://h/x@v1         https://h/x@v1
        https://h/a:b@v1       https://h/a:b@v1
        http://h:80/x@v1       http://h:80/x@v1
        https://h/?to=a@b      https://h/?to=a@b
        ann@example.com        ann@example.com"""

    def test_of_addresses_are_masked_and_all_else_stays(self):
        for row in self.ADDRESSES.splitlines():
            text, shown = row.strip().split("  ", 1)
            with self.subTest(text):
                self.assertEqual(llamactl.without_passwords(text), shown.strip())

    def test_take_no_longer_the_longer_the_text(self):
        for piece in ("://a:", "http://", "//u:p@", "@", "https://u:p@h "):
            started = time.process_time()
            llamactl.without_passwords(piece * 40000)
            self.assertLess(time.process_time() - started, 2, piece)


class Urls(unittest.TestCase):
    GOOD = """\
        https://api.cloud.llamaindex.ai       https://api.cloud.llamaindex.ai
        https://api.cloud.llamaindex.ai/      https://api.cloud.llamaindex.ai
        https://api.cloud.llamaindex.ai///    https://api.cloud.llamaindex.ai
        HTTPS://API.Example.COM               https://api.example.com
        https://example.com:443               https://example.com
        https://example.com:443/a/            https://example.com/a
        http://example.com:80                 http://example.com
        http://example.com:443                http://example.com:443
        https://example.com:80                https://example.com:80
        https://example.com:8443/Base/Path/   https://example.com:8443/Base/Path
        https://example.com:65535             https://example.com:65535
        http://localhost:8000                 http://localhost:8000
        http://127.0.0.1:1                    http://127.0.0.1:1
        http://[::1]:8000/                    http://[::1]:8000
        https://[2001:DB8::AB]                https://[2001:db8::ab]
        https://[2001:db8::1]:443/x           https://[2001:db8::1]/x
        https://my_host-1.internal            https://my_host-1.internal
        https://xn--bcher-kva.example/a%20b   https://xn--bcher-kva.example/a%20b"""
    NO_ORIGINS = (  # cut at each single space
        " example.com //example.com https: https:// https:///a https:example.com "
        "ftp://example.com file:///etc/passwd javascript:alert(1) data:text/plain,a "
        "httpss://example.com https://example.com\n https://example.com\nX:y "
        "https://example.com/\r\nX:y https://example.com\t https://example.com/\x00 "
        "https://user@example.com https://user:CANARY@example.com https://:@example.com "
        "https://@example.com https://example.com@evil.example "
        "https://example.com:80@evil.example https://example.com#a https://example.com:0 "
        "https://example.com:65536 https://example.com:99999 https://example.com:-1 "
        "https://example.com:abc https://example.com:80:80 https://[::1 https://::1 "
        "https://[::1]evil.example https://[::1]] https://[example.com] https://[] "
        "https://exa\\mple.com https://example.com\\@evil.example https://ex\u00e4mple.com "
        "https://example\u3002com https://example.com/\u00e4 https://example.com/\u202e "
        "\ufeffhttps://example.com https://exa\ud800mple.com https://example.com:\u0661 "
        "https://example.com:\u00b2 http\u017f://example.com https://example\u017f.com "
        "https://\u212aelvin.example https://example.com/\u017f "
        "https://example.com/\u212a https://example.com/\u0131 https://<script> "
        "https://example.com,evil.example https://$(id).example"
    ).split(" ") + [" https://a b", "https://a b", "https://example.com/a b"]
    NO_API_URLS = (
        "https://example.com?a=b https://example.com/?a https://example.com/a? "
        "https://example.com/# https://example.com/a#b https://example.com/$(id)"
    ).split()

    def test_good_ones_are_normalised_once(self):
        for row in self.GOOD.splitlines():
            text, normal = row.split()
            with self.subTest(text):
                self.assertEqual(llamactl.normal_url(text), normal)
                self.assertEqual(llamactl.normal_url(normal), normal)

    def refusal_of(self, function, url):
        with self.subTest(url), self.assertRaises(llamactl.Failure) as caught:
            function(url)
        return caught.exception

    def test_bad_ones_are_refused_and_not_quoted(self):
        for text in self.NO_ORIGINS + self.NO_API_URLS:
            failure = self.refusal_of(llamactl.normal_url, text)
            self.assertEqual(failure.code, 2)
            self.assertNotRegex(f"{failure}{failure.hint}", f"CANARY|\n|{UNPRINTABLE}")

    def test_what_a_server_names_is_as_strict(self):
        for bad in self.NO_ORIGINS:
            for rest in ("", "/authorize?a=b"):
                self.assertEqual(self.refusal_of(llamactl.origin_of, bad + rest).code, 1)
        origin = llamactl.origin_of("HTTPS://A.example/?x=\x7e")
        self.assertEqual(origin, "https://a.example:443")


class SmallFormats(unittest.TestCase):
    def test_what_a_server_wrote_is_cut_at_white_space_alone(self):
        for text, shown in (
            ("a\n b\t", "a b"),
            ("a" * 300, "a" * 300),
            ("a" * 301, "..."),
            ("ab " * 200, "ab " * 100 + "..."),
            (" " * 40000 + "a-" * 200, "..."),
            ("a " * 149 + "b-" * 40, "a " * 149 + "..."),
        ):
            with self.subTest(text):
                self.assertEqual(llamactl.shortened(text), shown)

    def test_of_a_key_the_last_four_characters_show_if_it_is_long(self):
        for key, shown in (
            (KEY, "wxyz"),
            ("CANARY-12345", "2345"),
            ("CANARY-1234", ""),
            ("llx-CANARY-0123456789-{a}", "a"),
            ("llx-CANARY-0123456789../", "9"),
            ("CANARY-------------", ""),
        ):
            with self.subTest(key):
                self.assertEqual(llamactl.last_four(key), shown)

    def test_a_name_that_is_made_has_80_characters_at_most(self):
        self.assertEqual(llamactl.shell_safe("a b" + "c" * 80), "a-b" + "c" * 77)

    def test_a_number_in_json_has_300_digits_at_most(self):
        for count, value in ((300, {"n": 10**300 - 1}), (301, None)):
            with self.subTest(count):
                found = llamactl.parse_object(b'{"n": %s}' % (b"9" * count))
                self.assertEqual(found, value)


try:
    import sqlite3
except ImportError:
    sqlite3 = None  # some Pythons are built without; one test says what happens then

STORE_FILES = ["profiles.json", "profiles.json.lock"]


# ----------------------------------------------------------------------------------------
# output: JSON and YAML
# ----------------------------------------------------------------------------------------

YAML_TEXT = r"(?!(?i:true|false|yes|no|on|off|y|n|null)\Z)[A-Za-z_][A-Za-z0-9_./@:+-]*"
YAML_START = r'(- )|("(?:[^"\\]|\\.)*"|[^" \n]+):[ \n]'  # of an item, or with a key


def read_yaml(text):
    """Block YAML, whose scalars must be JSON or words that every YAML takes for text."""
    if not re.match(YAML_START, text):
        return text[:-1] if re.fullmatch(YAML_TEXT, text[:-1]) else json.loads(text)
    items, pairs = [], {}
    for block in re.findall("(?m)^[^ ].*\n(?:  .*\n)*", text):
        start = re.match(YAML_START, block)
        value = read_yaml(re.sub("(?m)^  ", "", block[start.end() :]))
        if start.group(1):
            items.append(value)
        else:
            pairs[read_yaml(start.group(2) + "\n")] = value
    return items or pairs


YAML_READERS = {"strict": read_yaml}  # `readers` adds PyYAML and ruamel.yaml
TRICKY_TEXTS = (  # cut at each single space
    " a null Null ~ true False yes No on OFF y N 0 1 -1 +1 007 0o7 0x1F 0b1 1_000 1.5 1. "
    ".5 1e3 1e+3 1.0e+3 .inf -.Inf .nan NaN Infinity 1:30 190:20:30 12:30:45.5 2001-01-01 "
    "2001-12-14t21:59:43.10-05:00 12e03 0e0 1__0 0_ +.5 -0 08 1,000 << = - -- --- ... ? : "
    "a: :a a:b #a a#b [] {} [a] &a *a !a ! | > % 'a' \"a\" it's \" \\ \\n @a `a` , a,b "
    "line\nline \n \r\n \r \t a\tb \0 key\0value \x07 \x1b[31mred\x1b[0m \x1f \x7f \x80 "
    "\x85 \x9b31m \xa0 \xad \u2028 a\u2028b \u2029 \ufeff \ufeffa \u200b \u200e "
    "\u202e\u2066evil\u2069 \u061c \ufffd \ufffe \uffff \ud800 a\udfffb \udc00\ud800 "
    "\U0001f600 \U0010ffff \u00e9 \u4e2d\u6587 e\u0301 dev@example.com C:\\dir ******** "
    "https://api.example.com:8443/a?b=c#d 0123456789abcdef0123456789abcdef01234567"
).split(" ") + (
    " |a b| a|a |2001-1-1 1:1:1|--- a|- a|? a|a: b|a #b|{a: b}|!!str a|%YAML 1.1|null "
).split("|")
TRICKY_TEXTS += ["a" * 200, "word " * 40]
TRICKY_PARTS = "a 0 1 : # - \n \t ' \" \\ , [ { . e _ true \x85 \u2028 \ud800 \ufeff \0 ~ T"


def tricky_text(rng):
    if rng.random() < 0.6:
        return rng.choice(TRICKY_TEXTS)
    parts = TRICKY_PARTS.split(" ") + [" ", "\U0001f600", "\u00e9"]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(8)))


def tricky_value(rng, depth=3):
    """A container of scalars and containers, at most DEPTH of them in each other."""
    if rng.random() >= depth / 3:
        return rng.choice((tricky_text(rng), True, False, None, 0, -7, 10**20))
    items = [tricky_value(rng, depth - 1) for _ in range(rng.randrange(5))]
    return rng.choice((items, {tricky_text(rng): item for item in items}))


def yaml_samples():
    """Values of every shape, with each kind of text in each place."""
    yield from ([], {}, "", None, True, 0, -1, [[]], [{}], {"a": []}, {"a": {}})
    yield [[1, [2]], []]
    for text in TRICKY_TEXTS:
        yield text
        yield {"name": text, "active": True}
        yield [{"name": text}, {text: "name"}]
        yield {"spec": {"secrets": {text: "********"}}, "status": {"warning": text}}
    rng = random.Random("documents")
    for _ in range(1200):
        yield tricky_value(rng)


class Documents(CommandCase):
    """JSON and YAML: the same value, for every reader, and nothing that moves a cursor."""

    def test_generated_values_are_what_each_reader_finds(self):
        for value in yaml_samples():
            json_text, yaml_text = llamactl.json_text(value), llamactl.yaml_text(value)
            self.assertNotRegex(json_text + yaml_text, UNPRINTABLE)
            text = json.dumps(value, ensure_ascii=False)
            expected = json.dumps(json.loads(re.sub("[\ud800-\udfff]", "\ufffd", text)))
            self.assertEqual(json.dumps(json.loads(json_text)), expected)
            for reader, read in YAML_READERS.items():
                found = json.dumps(read(yaml_text), default=repr)
                self.assertEqual(found, expected, f"{reader} of {yaml_text!r}")

    def test_a_text_is_bare_where_every_yaml_takes_it_for_text_and_else_in_quotes(self):
        bare = {text for text in TRICKY_TEXTS if llamactl.yaml_text(text) == text + "\n"}
        self.assertEqual(bare, {"a", "a:b", "Infinity", "dev@example.com", "a" * 200})
        for text in set(TRICKY_TEXTS) - bare:
            self.assertEqual(llamactl.yaml_text(text), llamactl.json_text(text) + "\n")

    def test_containers_stand_in_blocks(self):
        value = {
            "spec": {"secrets": {"on": None}, "names": [], "sizes": [1, [True], {}]},
            "rows": [{"a": 1, "b": {"c": "2"}}, [["d"], "e"], [{"f": []}]],
            "K" * 1024: "longest key that may stand before its colon",
            "last": {"L" * 1025: {"g": 1}, "M" * 1025: "2"},
        }
        self.assertEqual(
            llamactl.yaml_text(value),
            f"""\
spec:
  secrets:
    "on": null
  names: []
  sizes:
    - 1
    - - true
    - {{}}
rows:
  - a: 1
    b:
      c: "2"
  - - - d
    - e
  - - f: []
{"K" * 1024}: "longest key that may stand before its colon"
last:
  ? {"L" * 1025}
  :
    g: 1
  ? {"M" * 1025}
  : "2"
""",
        )

    def test_a_number_where_a_text_belongs_is_refused(self):
        """1e+22 is a number in JSON and YAML 1.2, and a text in YAML 1.1."""
        self.with_profile()
        for number in (1e22, float("nan")):
            self.cloud.deployments[0]["git_sha"] = number
            self.play(
                """
                $ llamactl deployments get -o yaml
                error: ...
                hint: ...
                [5]
                """
            )


# ----------------------------------------------------------------------------------------
# dotenv: what reads a .env. `readers` adds python-dotenv, which knows `export`.
# ----------------------------------------------------------------------------------------

ENV_NEW = {
    "LLAMA_CLOUD_API_KEY": "llx-new_1.2+3",
    "LLAMA_CLOUD_BASE_URL": "https://api.example.com:8443/a",
    "LLAMA_AGENTS_PROJECT_ID": "p=%@,-9",
}
ENV_UNSET = dict.fromkeys([*ENV_NEW, "ENV_PROBE"], "(unset)")
ENV_READ = {**ENV_UNSET, **ENV_NEW}


def read_as_docker(text):
    """docker run --env-file, pkg/kvfile: {name: value}, or None where it refuses a file."""
    lines = re.sub("\r(\n|\\Z)", "\n", text.lstrip("\ufeff")).split("\n")
    lines = [line.lstrip() for line in lines]
    pairs = [line.partition("=") for line in lines if line and line[0] != "#"]
    if not all(re.fullmatch("[^ \t]+", name) for name, _, _ in pairs):
        return None
    return {name: value for name, equals, value in pairs if equals}


SYSTEMD_ASSIGNMENT = r"""(?sx)
    [\ \t]* (?: [#;][^\r\n]*  # a comment
    | ([^\r\n=]+) =  # a name, then what is in quotes, then what is not
      ( (?: [\ \t]* (?: '[^']*(?:'|\Z) | "(?:[^"\\]|\\.)*(?:"|\\?\Z) ) )*
        (?: [^\r\n\\] | \\. )* \\? )
    | [^\r\n]+ ) | [\r\n]"""
SYSTEMD_PART = r"""(?s)[ \t]*(?:'([^']*)(?:'|\Z)|"((?:[^"\\]|\\.)*)(?:"|\\?\Z)|(.+)\Z)"""


def systemd_part(match):
    single, double, bare = match.groups("")
    double = re.sub(r'\\(?:(["\\`$])|\n)', r"\1", double)
    return single + double + re.sub(r"(?s)\\(?:([^\r\n])|.)", r"\1", bare.rstrip(" \t"))


def read_as_systemd(text):
    """systemd's EnvironmentFile=, env-file.c: {name: value}."""
    pairs = re.findall(SYSTEMD_ASSIGNMENT, text)
    return {
        name.rstrip(" \t"): re.sub(SYSTEMD_PART, systemd_part, value)
        for name, value in pairs
    }


ENV_READERS = {"docker --env-file": read_as_docker, "systemd": read_as_systemd}
KNOWS_NO_EXPORT = tuple(ENV_READERS)  # `export NAME` is a name of its own to these

# A subshell for each file: a syntax error ends it before the record is printed. Nothing is
# in the PATH, so that no line of a generated file can start a program.
SHELL_LOOP = r"""
i=0
while [ $i -lt $1 ]; do
    (
        set -a
        . ./f$i >/dev/null 2>&1
        printf '%s\001%s\001%s\001%s\001%s\002' $i "${LLAMA_CLOUD_API_KEY-(unset)}" \
            "${LLAMA_CLOUD_BASE_URL-(unset)}" "${LLAMA_AGENTS_PROJECT_ID-(unset)}" \
            "${ENV_PROBE-(unset)}"
    ) 2>/dev/null
    i=$((i+1))
done
"""


def read_by_shells(texts):
    """What a real `sh` makes of each: {name: value}, or None where it refuses a file."""
    if os.name == "nt":
        raise unittest.SkipTest("needs a shell of POSIX")
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            with open(os.path.join(folder, f"f{number}"), "wb") as file:
                file.write(text.encode())
        out = subprocess.check_output(
            ["/bin/sh", "-c", SHELL_LOOP, "sh", str(len(texts))],
            cwd=folder,
            env={"PATH": "/nonexistent"},
        )
    found = {}
    for record in out.decode("utf-8", "replace").split("\2")[:-1]:
        number, *values = record.split("\1")
        found[int(number)] = dict(zip(ENV_UNSET, values))
    return [found.get(number) for number in range(len(texts))]


def probed(text):
    """TEXT and, behind it, lines that a reader sees if it got so far."""
    ends = re.findall("\r\n|\n|\r", text) or ["\n"]
    end = "\n" if "\n" in ends else ends[0]  # every reader knows the bare line feed
    return f"{text}{end}{end}ENV_PROBE=early{end}ENV_PROBE=seen{end}"


def last_values(pairs):
    """The value that a reader found for each of our names and for the probe."""
    return {name: (pairs or {}).get(name, unset) for name, unset in ENV_UNSET.items()}


# ----------------------------------------------------------------------------------------
# dotenv: the generator. Each piece brings what must stand there afterwards, so that the
# expected file is put together and never computed from the generated one.
# ----------------------------------------------------------------------------------------

# A piece a line: what stands there, and of an assignment of ours what stands there
# afterwards and its value, as every reader that can read it agrees. ^ is a line end, @ one
# that is new, ~ one that goes; NAME is one of our names, INNER another assignment, and OPEN
# a quote that nothing closes.
FOREIGN_LINES = """

\x20\x20\x20
\t
# a comment
#LLAMA_CLOUD_API_KEY=commented out
  # LLAMA_CLOUD_BASE_URL='commented
# it's
# say "
# ends in a backslash \\
FOO=bar
export FOO=bar
FOO=a=b=c
FOO=a#b
FOO=a # b
FOO = spaced
FOO=
FOO='a b' # c
FOO='#'
FOO="a \\" b"
FOO="a\\\\"
FOO='a\\'
FOO="it's" # "
FOO=it\\'s
FOO=a\\\\
just words
LLAMA_CLOUD_API_KEY
export LLAMA_CLOUD_API_KEY
MY_LLAMA_CLOUD_API_KEY=mine
LLAMA_CLOUD_API_KEY_2=second
LLAMA_CLOUD_API_KEY.x=1
llama_cloud_api_key=lower
FOO=LLAMA_CLOUD_API_KEY=x
FOO='LLAMA_CLOUD_BASE_URL=x'
\u00dcML\u00c4UT=\u00df\u00e9\u0301
FOO=\U0001f600\u202e\u200b
FOO=a\u2028b
FOO=\ufeff
FOO=a\x0bLLAMA_CLOUD_API_KEY=x
FOO=a\x0cLLAMA_AGENTS_PROJECT_ID=x
FOO=a\x85LLAMA_CLOUD_BASE_URL=x
FOO=a\u2028LLAMA_CLOUD_BASE_URL=x
FOO=\x1b[31m
FOO=x LLAMA_CLOUD_API_KEY=y
LLAMA_CLOUD_API_KEY: yaml
[section]
=nameless"""
FOREIGN_BLOCKS = """FOO="one^NAME=not this one^three"
FOO='one^NAME=not this one^three'
export FOO="^NAME=not this one^" # behind
FOO="a \\"quoted\\" word^NAME=not this one^"
FOO="it's^NAME=not this one^\\\\"
FOO='say "^NAME=not this one^'
FOO = "# no comment^^NAME=not this one^#"
FOO='\\^NAME=not this one^'
  FOO="x^  export NAME=not this one\""""
OPEN_LINES = """FOO=OPENopen
export FOO=OPENopen # end
FOO=OPEN"""
OWN_LINES = """NAME=OLD -> NAME=NEW -> OLD
NAME=OLD -> NAME=NEW -> OLD
NAME= -> NAME=NEW ->\x20
export NAME=OLD -> export NAME=NEW -> OLD
export \t NAME=OLD -> export \t NAME=NEW -> OLD
  NAME=OLD ->   NAME=NEW -> OLD
\texport NAME='OLD' -> \texport NAME=NEW -> OLD
NAME =OLD -> NAME=NEW -> OLD
NAME= OLD -> NAME=NEW -> OLD
NAME=OLD   -> NAME=NEW -> OLD
NAME='OLD' -> NAME=NEW -> OLD
NAME="OLD" -> NAME=NEW -> OLD
NAME='OLD # b' -> NAME=NEW -> OLD # b
NAME=OLD#b -> NAME=NEW -> OLD#b
NAME="a \\" OLD" -> NAME=NEW -> a " OLD
NAME="\\\\" -> NAME=NEW -> \\
NAME=OLD # why -> # why@NAME=NEW -> OLD
NAME='OLD' # it's -> # it's@NAME=NEW -> OLD
NAME="OLD"\t# say " -> # say "@NAME=NEW -> OLD
NAME="OLD # b" # c -> # c@NAME=NEW -> OLD # b
export NAME=OLD # -> #@export NAME=NEW -> OLD
NAME=OLD #a # b -> #a # b@NAME=NEW -> OLD
NAME="OLD~INNER" -> NAME=NEW -> OLD~INNER
NAME='OLD~# no~INNER' # c -> # c@NAME=NEW -> OLD~# no~INNER
NAME='~~OLD' -> NAME=NEW -> ~~OLD
NAME=OPENOLD -> NAME=NEW -> OPENOLD
NAME= OPENOLD -> NAME=NEW -> OPENOLD"""
ENV_PIECES = [
    text.split("\n") for text in (FOREIGN_LINES, FOREIGN_BLOCKS, OPEN_LINES, OWN_LINES)
]
ENV_START = r"[ \t]*(export[ \t]+)?[^=#\s'\"`]+[ \t]*="
EnvPiece = collections.namedtuple("EnvPiece", "before after values")


def env_piece(rng, tail):
    """A piece that may stand before TAIL: TAIL closes no quote that it leaves open."""
    piece = rng.choice(rng.choices(ENV_PIECES, (40, 12, 8, 40))[0])
    name, inner = rng.choice(list(ENV_NEW)), rng.choice(list(ENV_NEW))
    quotes = [quote for quote in "'\"" if quote not in tail] or [""]
    for sign, text in (
        ("@", "\0"),
        ("~", "\1"),
        ("^", "\n"),
        ("NAME", name),
        ("INNER", f"{inner}=inner"),
        ("OPEN", rng.choice(quotes)),
        ("OLD", f"old{rng.randrange(10**6)}"),
        ("NEW", ENV_NEW[name]),
    ):
        piece = piece.replace(sign, text)
    before, *own = piece.split(" -> ")
    if not own:
        return EnvPiece(before, before, {})
    return EnvPiece(before, own[0], {name: own[1].replace("\1", "\n")})


def new_lines(pieces, before):
    """What is appended to BEFORE, which PIECES make up."""
    starts = [re.match(ENV_START, piece.before) for piece in pieces]
    exports = [start.group(1) for start in starts if start]
    export = "export " if exports and all(exports) else ""
    known = {name for piece in pieces for name in piece.values}
    new = [f"{export}{name}={ENV_NEW[name]}" for name in ENV_NEW if name not in known]
    if not new:
        return ""
    if re.search(r" \\\n?\Z", before):
        new.insert(0, "")  # a blank line ends what the backslash would continue
    is_whole = before.endswith("\n") or not before
    return "\0".join(new + [""] if is_whole else ["", *new])


def with_ends(text, ends):
    """TEXT with ENDS for its line ends, one for each."""
    remaining = iter(ends)
    return re.sub("\n", lambda _: next(remaining), text)


def env_samples(count, seed):
    """COUNT files: before and after the update, and the values before."""
    rng = random.Random(seed)
    for _ in range(count):
        pieces, tail = [], ""
        for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 8, 11))):
            pieces.insert(0, env_piece(rng, tail))
            tail = f"{pieces[0].before}\n{tail}"
        last_end = rng.choice(("\n", "\n", "\n", "")) if pieces else ""
        before = "\n".join(piece.before for piece in pieces) + last_end
        after = "\n".join(piece.after for piece in pieces) + last_end
        kinds = rng.choice([["\n"]] * 6 + [["\r\n"]] * 2 + [["\r"], ["\n", "\r\n"]])
        ends = [rng.choice(kinds) for _ in range(before.count("\n"))]
        known = ends + kinds[:1] * before.count("\1")
        new_end = "\n" if "\n" in known or not known else known[0]
        # behind a BOM a moved comment is none to a shell; what it is before is no better
        may_have_bom = pieces and "\0" not in pieces[0].after
        mark = rng.choice(["\ufeff"] + [""] * 9) if may_have_bom else ""
        after = with_ends(after, ends) + new_lines(pieces, before)
        yield EnvPiece(
            mark + with_ends(before, ends).replace("\1", kinds[0]),
            mark + after.replace("\0", new_end),
            {name: value for piece in pieces for name, value in piece.values.items()},
        )


def env_soups(count, seed):
    """Files of random tokens, most of them nonsense that no reader likes."""
    tokens = (
        "FOO|FOO=|'|\"|'|\"|\\|\\|=| | |#| # |export |x|y z|"
        "\n|\n|\n|\n|\n|\r\n|\r|\t|\u2028|\ufeff"
    ).split("|")
    for name in ENV_NEW:
        tokens += [name, name + "=", f"\n{name}=old"]
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(tokens) for _ in range(rng.randrange(1, 24)))


class EnvText(unittest.TestCase):
    """updated_env(): generated files, and each sentence about the text by an example."""

    maxDiff = None
    GENERATED = {"files": 7500, "shells": 500, "soup": 4000}
    # before -> after the update of KEY and URL; ^ is a line end, % a carriage return
    EXAMPLES = """\
appended
 -> KEY=new^URL=u^
A=1^ -> A=1^KEY=new^URL=u^
A=1 -> A=1^KEY=new^URL=u
A=1%^ -> A=1%^KEY=new%^URL=u%^
A=1%^B=2 -> A=1%^B=2%^KEY=new%^URL=u
A=1%B=2% -> A=1%B=2%KEY=new%URL=u%
\ufeffA=1^ -> \ufeffA=1^KEY=new^URL=u^
updated where they stand, each duplicate too
URL=b^A=1^KEY=a^ -> URL=u^A=1^KEY=new^
URL=b^A=1^KEY=a -> URL=u^A=1^KEY=new
KEY=a^B=2^ -> KEY=new^B=2^URL=u^
\ufeffKEY=a^ -> \ufeffKEY=new^URL=u^
KEY=a^KEY=b^ -> KEY=new^KEY=new^URL=u^
exported where all is
export KEY=a^ -> export KEY=new^export URL=u^
export B='^C=x^'^ -> export B='^C=x^'^export KEY=new^export URL=u^
# all^export A=1^ -> # all^export A=1^export KEY=new^export URL=u^
export A=1^B=2^ -> export A=1^B=2^KEY=new^URL=u^
export KEY=a # b^ -> # b^export KEY=new^export URL=u^
  export KEY=a # b^ ->   # b^  export KEY=new^export URL=u^
with its own line end each, and for new lines a lone line feed first
A=1%^KEY=a # b%^URL=b^ -> A=1%^# b^KEY=new%^URL=u^
A=1%^B='a\\'^ -> A=1%^B='a\\'^KEY=new^URL=u^
A=1%B^C=3^ -> A=1%B^C=3^KEY=new^URL=u^
A=1^B=2%^ -> A=1^B=2%^KEY=new^URL=u^
A=1^B=2% -> A=1^B=2%^KEY=new^URL=u^
A=1%^B=2% -> A=1%^B=2%^KEY=new%^URL=u%^
KEY=a # b^B=2% -> # b^KEY=new^B=2%^URL=u^
a comment does not get behind a backslash, where a shell would run it
A=1\\^KEY=a # b^ -> A=1\\^KEY=new^KEY=new^URL=u^
a quote that is not closed before something else makes an ordinary line
KEY="a^B="c"^ -> KEY=new^B="c"^URL=u^
A='x^KEY=a^B='y'^ -> A='x^KEY=new^B='y'^URL=u^
A='^KEY=a^ -> A='^KEY=new^URL=u^
A="\\"^KEY=a^ -> A="\\"^KEY=new^URL=u^
KEY="a^B=2^ -> KEY=new^B=2^URL=u^
what stands in a value of several lines stays
A='^KEY=a^'^ -> A='^KEY=a^'^KEY=new^URL=u^
A=`one^KEY=a^`^ -> A=`one^KEY=a^`^KEY=new^URL=u^
A="\\"^KEY=a^"^KEY=b^ -> A="\\"^KEY=a^"^KEY=new^URL=u^
A="one \\^two"^KEY=b^ -> A="one \\^two"^KEY=new^URL=u^
A='\\^'^KEY=b^ -> A='\\^'^KEY=new^URL=u^
KEY=`a^b` # c^ -> # c^KEY=new^URL=u^
a value that a backslash continues goes with its continuation
KEY=a\\^b\\^c^D=1^ -> KEY=new^D=1^URL=u^
KEY='a'\\^URL=b^C=2^ -> KEY=new^C=2^URL=u^
KEY=a\\%^b%^ -> KEY=new%^URL=u%^
KEY=a\\^ -> KEY=new^URL=u^
KEY=a\\ -> KEY=new^URL=u
KEY=a\\\\^b^ -> KEY=new^b^URL=u^
KEY=a # c\\^B=2^ -> # c\\^KEY=new^B=2^URL=u^
a line that is continued does not swallow ours
A=1\\ -> A=1\\^^KEY=new^URL=u
A=1\\^ -> A=1\\^^KEY=new^URL=u^
A=1\\%^ -> A=1\\%^%^KEY=new%^URL=u%^
A=1\\\\^ -> A=1\\\\^KEY=new^URL=u^
A=1\\^KEY=a^ -> A=1\\^KEY=new^KEY=new^URL=u^
# c\\^ -> # c\\^^KEY=new^URL=u^
# c\\^KEY=a^ -> # c\\^KEY=new^URL=u^
KEY=a^A=C:\\d\\^KEY=b^ -> KEY=new^A=C:\\d\\^KEY=new^URL=u^
a hash makes a comment only behind white space
KEY=a # b^ -> # b^KEY=new^URL=u^
KEY=a#b^ -> KEY=new^URL=u^
KEY=#a^ -> KEY=new^URL=u^
KEY='a # b' # c^ -> # c^KEY=new^URL=u^
KEY='a'#c^ -> #c^KEY=new^URL=u^
what only looks like one of ours stays
#KEY=a^XKEY=b^KEY^ -> #KEY=a^XKEY=b^KEY^KEY=new^URL=u^
A=\0\x85\u2028KEY=a^ -> A=\0\x85\u2028KEY=a^KEY=new^URL=u^"""

    def updated(self, text):
        return llamactl.updated_env(text, dict(ENV_NEW))

    def test_by_example(self):
        for row in self.EXAMPLES.split("\n"):
            with self.subTest(row):
                text = row.replace("^", "\n").replace("%", "\r")
                before, arrow, after = text.partition(" -> ")
                if arrow:
                    found = llamactl.updated_env(before, {"KEY": "new", "URL": "u"})
                    self.assertEqual(found, after)

    def could_read(self, reader, sample, found):
        """Whether READER FOUND what a file says, so that it must read it afterwards."""
        if found != {**ENV_UNSET, **sample.values, "ENV_PROBE": "seen"}:
            return False
        if reader in KNOWS_NO_EXPORT:
            return "export LLAMA" not in sample.after
        if reader == "sh":  # a comment that moves leaves the carriage return that hid in it
            return not re.search("#.*\r", sample.before)
        # to python-dotenv alone this quote closes nothing; one further down may, and go
        return "\\'" not in sample.before

    def test_generated_files_keep_all_but_the_three_assignments(self):
        counts = dict.fromkeys(ENV_READERS, 0)
        for sample in env_samples(self.GENERATED["files"], "files"):
            after = self.updated(sample.before)
            self.assertEqual(after, sample.after, sample.before)
            self.assertEqual(self.updated(after), after)
            for reader, read in ENV_READERS.items():
                if self.could_read(
                    reader, sample, last_values(read(probed(sample.before)))
                ):
                    self.assertEqual(last_values(read(after)), ENV_READ, (reader, sample))
                    counts[reader] += 1
        # the generator must not become so wild that nobody reads its files
        self.assertGreater(min(counts.values()), 1000, counts)

    def test_generated_files_read_back_in_a_shell_that_could_read_them(self):
        samples = list(env_samples(self.GENERATED["shells"], "shells"))
        found = read_by_shells([probed(sample.before) for sample in samples])
        kept = [
            sample
            for sample, values in zip(samples, found)
            if self.could_read("sh", sample, values)
        ]
        self.assertGreater(len(kept), 125)
        found = read_by_shells([self.updated(sample.before) for sample in kept])
        for sample, values in zip(kept, found):
            self.assertEqual(values, ENV_READ, sample)

    def test_nonsense_is_kept_and_the_second_update_changes_nothing(self):
        for text in env_soups(self.GENERATED["soup"], "soup"):
            after = self.updated(text)
            self.assertEqual(self.updated(after), after, text)
            if re.search("['\"\\\\\ufeff\u2028]", text):
                continue
            foreign = {line for line in re.split("[\r\n]", text) if "LLAMA" not in line}
            self.assertLessEqual(foreign, set(re.split("[\r\n]", after)), text)
            if re.search("\r(?!\n)|export LLAMA", text + after):
                continue
            seen = [last_values(read(probed(text))) for read in ENV_READERS.values()]
            if None not in seen[-1].values() and seen.count(seen[0]) == len(seen):
                for reader, read in ENV_READERS.items():
                    self.assertEqual(last_values(read(after)), ENV_READ, (reader, text))

    def test_who_reads_lines_that_end_in_backslashes_and_carriage_returns(self):
        readers = dict(ENV_READERS, sh=lambda text: read_by_shells([text])[0])
        for left_out, befores in (
            ((), ("A=1\\", "A=1\\\n", "A=1\n# c\\", "A=1\n# c\\\n", "A=1 \\\\\\\n")),
            (("sh",), ("A=1\\\r\n",)),
            (  # to these two, one line, which the backslash continues
                ("sh", "systemd"),
                (
                    "LLAMA_CLOUD_API_KEY=old\\\nLLAMA_AGENTS_PROJECT_ID=p\n",
                    "LLAMA_CLOUD_API_KEY=old # c\\\nLLAMA_AGENTS_PROJECT_ID=p\n",
                    "LLAMA_CLOUD_API_KEY='old'\\\nLLAMA_AGENTS_PROJECT_ID=p\nB=2\n",
                    "LLAMA_CLOUD_API_KEY=a\nA=C:\\dir\\\nLLAMA_CLOUD_API_KEY=b\n",
                ),
            ),
            (  # to these two, a carriage return is a line end
                ("systemd", "python-dotenv"),
                ("A=1\rB\nC=3\n", "# a\r# b\nLLAMA_CLOUD_API_KEY=a # c\n", "A=1\r\nB=2\n"),
            ),
        ):
            for before in befores:
                after = self.updated(before)
                for reader in set(readers).difference(left_out):
                    with self.subTest(before, reader=reader):
                        self.assertEqual(last_values(readers[reader](after)), ENV_READ)

    def test_twice_the_length_takes_twice_the_time(self):
        for start, filler, count, end in (
            ("LLAMA_CLOUD_API_KEY=", " ", 50000, "x"),
            ("LLAMA_CLOUD_API_KEY", " ", 50000, ""),
            ("", " ", 50000, "x"),
            ("A=b", " ", 50000, "#"),
            ("A='", "\\", 50000, ""),
            ("A=", "'", 50000, ""),
            ("", "export ", 50000, "A=1"),
            ("", "a", 50000, "=1"),
            ("A=", "\\", 50000, "\n"),
            ("A=", '"" ', 50000, "\n"),
            ('A="', '\\"\n', 300000, '"\n'),
            ("A='", "\n", 300000, "'\n"),
            ("", 'A="\\"\n', 30000, ""),
            ("", "A='\nB=\"\n", 20001, "\"'\n"),
            ("", "VARIABLE='some value' # and \"a comment\"\n", 40000, ""),
        ):
            with self.subTest(start=start, filler=filler):
                started = time.process_time()
                self.updated(start + filler * count + end)
                self.assertLess(time.process_time() - started, 2)


class EnvValues(unittest.TestCase):
    """env_value(): who reads it, and who is named as unable to, is the same."""

    # the value, how it is written, and who misreads that
    WRITTEN = r"""
        llx-0.9_/:@%+,=-Z  llx-0.9_/:@%+,=-Z
        a#b    'a#b'    docker --env-file
        a\n    'a\n'    docker --env-file
        \      '\'      docker --env-file, python-dotenv
        a\     'a\'     docker --env-file, python-dotenv
        a\\b   'a\\b'   docker --env-file, python-dotenv
        $A     '$A'     docker --env-file, Next.js, Vite
        ${A}   '${A}'   docker --env-file, python-dotenv, Next.js, Vite
        it's   "it's"   docker --env-file
        '"     "'\""    docker --env-file, dotenv for Node.js
        \'     "\\'"    docker --env-file, dotenv for Node.js
        '\     "'\\"    docker --env-file, python-dotenv, dotenv for Node.js
        '`     "'\`"    docker --env-file, python-dotenv, dotenv for Node.js
        '$A    "'\$A"   docker --env-file, python-dotenv, Next.js, Vite, dotenv for Node.js
        '${A}  "'\${A}" docker --env-file, python-dotenv, Next.js, Vite, dotenv for Node.js
        """
    VALUES = r"""
        a llx-0.9_/:@%+,=-Z $HOME ${HOME} $ ' " \ `id` # a#b ; & a;b&c|d ( ~ ~root * ! {a,b}
        [x] <> it's say"so" a\n \\ it's$HOME it's`id` it's${HOME} \$HOME '" "'$`\ a\'b \'
        a=b = - --help ^ ? a'"b \t\x41 %n @ 'a' "a" 'a "a $(id) a$ ${A:-b} '${HOME} key\
        """.split()

    def text_of(self, value):
        lines = [f"{name}={llamactl.env_value(value)}\n" for name in ENV_NEW]
        return "A=1\n" + "".join(lines) + 'Z="last"\n'

    def values(self):
        signs = "".join(map(chr, range(33, 127)))
        yield from itertools.chain(self.VALUES, signs, (f"x{sign}y" for sign in signs))
        rng = random.Random("values")
        for _ in range(300):
            yield "".join(rng.choice("'\"\\$`#{}a") for _ in range(rng.randrange(1, 7)))

    def test_in_quotes_only_where_it_needs_them(self):
        for row in self.WRITTEN.strip().splitlines():
            value, written, *readers = row.split(None, 2)
            with self.subTest(value):
                self.assertEqual(llamactl.env_value(value), written)
                self.assertEqual(
                    ", ".join(llamactl.unable_readers(value)), "".join(readers)
                )

    def test_who_is_named_misreads_it_and_nobody_else(self):
        for value in self.values():
            text = self.text_of(value)
            for reader, read in ENV_READERS.items():
                found = set(map(read(text).get, ENV_NEW))
                if reader not in llamactl.unable_readers(value):
                    self.assertEqual(found, {value}, f"{reader}: {text}")
                elif value in self.VALUES:
                    self.assertNotIn(value, found, f"{reader}: {text}")

    def test_a_shell_reads_every_value(self):
        values = list(self.values())
        for value, found in zip(
            values, read_by_shells([self.text_of(value) for value in values])
        ):
            expected = dict.fromkeys(ENV_NEW, value)
            self.assertEqual(found, {**ENV_UNSET, **expected})


def check_with_libraries():
    """The tests of YAML and .env, to which these libraries are readers, too."""
    import logging

    import dotenv
    import yaml
    from ruamel.yaml import YAML

    logging.disable()  # python-dotenv tells of each line that it does not understand
    YAML_READERS["PyYAML (YAML 1.1)"] = yaml.safe_load
    YAML_READERS["ruamel.yaml (YAML 1.2)"] = YAML(typ="safe", pure=True).load
    ENV_READERS["python-dotenv"] = lambda text: dotenv.dotenv_values(
        stream=io.StringIO(text, newline=None)
    )
    unittest.main(argv=["readers", "Documents", "EnvText", "EnvValues"])


# ========================================================================================
# terminal: real pseudo-terminals, real streams, real signals
# ========================================================================================


class SignalCase(CommandCase):
    """Children must not inherit signals that whoever started the tests ignores."""

    def setUp(self):
        super().setUp()
        for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGQUIT"):
            number = getattr(signal, name)
            action = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            self.addCleanup(signal.signal, number, signal.signal(number, action))

    def three_profiles(self):
        blue = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        red = dict(blue, project_id="proj-beta")
        self.write_store({"blue": blue, "blue-2": blue, "red": red}, "blue")

    def in_shell(self, line):
        """The command that has `sh` run LINE, in which `python3 llamactl.py` is ours."""
        python = " ".join(map(shlex.quote, PYTHON))
        line = line.replace("python3", python)
        return ["sh", "-c", line.replace("llamactl.py", shlex.quote(PROGRAM))]

    def shell(self, line):
        """LINE, run to its end without any terminal -> Result."""
        process = subprocess.run(
            self.in_shell(line),
            env=self.env,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            timeout=30,
            check=False,
        )
        return self.note(process.returncode, process.stdout, process.stderr)


class Questions(SignalCase):
    def test_a_key_is_typed_hidden_and_a_project_picked(self):
        shown = self.pty(
            "auth token",
            [
                ("API key for", b"llx-CANARY-\xff\xfe\n"),
                ("API key for", b"llx-CANARY-a-wrong-one\n"),
                ("API key for", f"  {KEY} \n".encode()),
                ("or name", b"\n"),
                ("or name", b"9\n1\n"),  # the 1 comes before its question: thrown away
                ("or name", b"proj\n"),
                ("or name", b"BET\n"),
            ],
        )
        self.assertEqual(shown.code, 0, shown.out)
        self.assertIn("\nwhat was typed is not text; try again\n", shown.out)
        self.assertNotRegex(shown.out.replace("llx-wxyz", ""), "llx-|utf|codec|ff")
        profile = self.profiles()["llx-wxyz"]
        self.assertEqual((profile["api_key"], profile["project_id"]), (KEY, "proj-beta"))

    def test_a_key_is_asked_for_three_times(self):
        with unittest.mock.patch("getpass.getpass", return_value=OTHER_KEY) as ask:
            result = self.call("auth token", terminal=True)
        self.assertEqual((result.code, ask.call_count, self.profiles()), (4, 3, {}))
        self.assertRegex(result.err, "\nerror: .*401")

    def test_a_key_is_not_asked_for_again_where_the_server_fails(self):
        self.cloud.fault(LIST_PROJECTS, "status", status=500)
        with unittest.mock.patch("getpass.getpass", return_value=KEY) as ask:
            result = self.call("auth token", terminal=True)
        self.assertEqual((result.code, ask.call_count), (5, 1), result.err)

    def test_a_key_that_may_have_been_cut_by_the_terminal_is_refused(self):
        for length, code, count in ((4094, 0, 1), (4095, 2, 3)):
            key = "llx-CANARY".ljust(length, "-")
            self.cloud.add_key(key)
            with self.subTest(length), unittest.mock.patch("getpass.getpass") as ask:
                ask.return_value = key
                result = self.call("auth token --project proj-beta", terminal=True)
                self.assertEqual((result.code, ask.call_count), (code, count), result.err)
                self.assertEqual("a terminal takes 4095" in result.err, code == 2)

    def test_a_key_is_not_typed_where_it_would_be_shown(self):
        from getpass import fallback_getpass  # which warns, and reads it all the same

        with unittest.mock.patch("getpass.getpass", fallback_getpass):
            with warnings.catch_warnings():
                result = self.call("auth token", stdin=KEY.encode(), terminal=True)
        self.assertEqual((result.code, self.profiles()), (2, {}))
        self.assertIn("error: this terminal cannot hide what is typed\n", result.err)

    def answer(self, typed, transcript):
        """Play what is shown to somebody who types that; it is not echoed."""
        self.play(transcript, stdin=typed, terminal=True)

    def test_a_menu_takes_a_number_a_name_or_a_part_of_one(self):
        self.three_profiles()
        self.answer(
            b"3\n",
            """
            $ llamactl auth use
            *   1  blue
                2  blue-2
                3  red
            Profile, by number or name [blue]: ...
            """,
        )
        self.answer(
            b"0\n4\nnope\nBLU\n2\n",
            """
            $ llamactl auth use
                1  blue
                2  blue-2
            *   3  red
            Profile, by number or name [red]:     1  blue
                2  blue-2
            *   3  red
            0 is not on the list (1 to 3)
            ...
            4 is not on the list (1 to 3)
            ...
            nope is not on the list (1 to 3)
            Profile, by number or name [red]:     1  blue
                2  blue-2
            Profile, by number or name [red]: ...
            """,
        )
        self.answer(
            b"blue\n",  # the whole of one, though a part of two
            """
            $ llamactl auth use
                1  blue
            *   2  blue-2
            ...
            $ llamactl auth get blue
            NAME ...
            blue ... yes ...
            """,
        )

    def test_the_current_one_is_the_default_of_a_menu(self):
        self.three_profiles()
        self.done("environments add --no-verify", NOWHERE)
        self.done("environments use", self.url)
        self.answer(
            b"\n",
            f"""
            $ llamactl projects use
            *   1  Alpha (proj-alpha)
                2  Beta (proj-beta)
            Project, by number or name [Alpha]: ...proj-alpha...
            $ llamactl auth logout
            *   1  blue
                2  blue-2
                3  red
            Profile, by number or name [blue]: profile blue deleted
            $ llamactl environments use
                1  {DEFAULT_URL}
                2  {NOWHERE}
            *   3  {self.url}
            Environment, by number or name [{self.url}]: environment {self.url} is ...
            $ llamactl environments use {NOWHERE}
            ...
            $ llamactl environments delete
                1  {DEFAULT_URL}
            *   2  {NOWHERE}
                3  {self.url}
            Environment, by number or name [{NOWHERE}]: environment {NOWHERE} deleted
            """,
        )

    def test_projects_of_one_name_are_told_apart_by_number(self):
        self.cloud.projects = [
            {"project_id": name, "project_name": "Same", "deployment_count": 0}
            for name in ("p-1", "q-2", "p-3")
        ]
        self.with_profile()
        self.answer(
            b"p-\n2\n",
            """
            $ llamactl projects use
                1  Same (p-1)
                2  Same (q-2)
                3  Same (p-3)
            Project, by number or name:     1  Same (p-1)
                2  Same (p-3)
            Project, by number or name: profile main uses project Same (p-3)
            """,
        )

    def test_a_terminal_that_another_program_left_without_waiting(self):
        self.three_profiles()
        script = f"import os; os.set_blocking(0, False)\n{AS_MAIN}sys.exit(status)"
        command = [*PYTHON, "-c", script, PROGRAM, "auth", "use"]
        shown = self.pty("", [("or name", b"1\n")], command=command)
        self.assertEqual(shown.code, 0, shown.out)

    def test_a_long_menu_is_cut_and_still_takes_a_part_of_a_name(self):
        self.cloud.projects = [
            {"project_id": f"p-{number}", "project_name": None, "deployment_count": 0}
            for number in range(22)
        ]
        self.with_profile()
        self.answer(
            b"21\n",
            """
            $ llamactl projects use
                1  p-0
            ...
               20  p-19
                   and 2 more; type a part of the name
            Project, by number or name: profile main uses project p-21
            """,
        )

    def test_twenty_choices_are_shown_and_told_whole(self):
        self.with_profile(project=None)
        for count, more in ((20, []), (21, ["and 1 more"])):
            self.cloud.projects = [
                {"project_id": f"p-{number}", "project_name": None, "deployment_count": 0}
                for number in range(count)
            ]
            for terminal in (True, False):  # asked at the one, and left by Ctrl-D
                with self.subTest(count, terminal=terminal):
                    shown = self.call("projects use", terminal=terminal).err
                    self.assertEqual(len(re.findall(r"\bp-\d+", shown)), 20, shown)
                    self.assertEqual(re.findall(r"and \d+ more", shown), more)

    def test_what_a_menu_shows_is_harmless(self):
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        self.write_store({HOSTILE: profile, "red": profile}, HOSTILE)
        shown = self.done("auth use", stdin=b"red\n", terminal=True).err
        self.assertIsNone(UNSHOWN.search(shown), ascii(shown))
        self.assertEqual(shown.count("\n"), 3, shown)

    def test_leaving_a_question_changes_nothing_and_restores_the_echo(self):
        self.three_profiles()
        self.cloud.interval, self.cloud.auto_approve = 60, None
        before = self.store_text()
        for command, prompt, how, code in (
            ("auth token", "API key for", b"\x03", 130),
            ("auth token", "API key for", b"\x04", 130),
            ("auth token", "API key for", signal.SIGTERM, 143),
            ("auth token", "API key for", signal.SIGHUP, 129),
            ("auth token", "API key for", signal.SIGQUIT, 131),
            ("auth exec --api-key-file - -- true", "API key", signal.SIGTERM, 143),
            ("auth use", "or name", b"\x03", 130),
            ("auth use", "or name", b"\x04", 130),
            ("auth login", "left", b"\x03", 130),
        ):
            with self.subTest(command, how=how):
                self.assertEqual(self.leave(command, prompt, how), code)
                self.assertEqual(self.store_text(), before)
                self.assertNotIn("profiles.json.new", os.listdir(self.folder))

    def leave(self, command, prompt, how):
        """Type HOW at PROMPT, or send that signal; the exit code."""
        screen = Screen(PYTHON + [PROGRAM] + command.split(), self.env, self.home)
        with contextlib.closing(screen):
            before = termios.tcgetattr(screen.master)
            screen.wait_for(prompt, 15)
            code = None
            for _ in range(3):
                if isinstance(how, bytes):
                    screen.type(how)
                else:
                    screen.process.send_signal(how)
                # Python sees a signal that comes just before a read with the next one only
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = screen.finish(5)
                    break
            self.assertEqual(termios.tcgetattr(screen.master), before)
            self.note(code, b"", bytes(screen.seen))
        return code

    def test_a_terminal_that_cannot_be_flushed(self):
        self.three_profiles()
        script = """import termios
def tcflush(*_):
    raise termios.error(5, "Input/output error")
termios.tcflush = tcflush
"""
        command = [
            *PYTHON,
            "-c",
            f"{script}{AS_MAIN}sys.exit(status)",
            PROGRAM,
            "auth",
            "use",
        ]
        shown = self.pty("", [("or name", b"1\n")], command=command, env={"CI": ""})
        self.assertEqual(shown.code, 0, shown.out)

    def test_a_terminal_that_hangs_up_ends_the_program(self):
        self.three_profiles()
        self.cloud.interval, self.cloud.auto_approve = 60, None
        before = self.store_text()
        nohup = "trap '' HUP; exec python3 llamactl.py "
        # getpass, once it cannot restore a terminal that is gone, may say so instead; and
        # PyPy does not see that a signal was ignored before
        pypy = [129] if platform.python_implementation() == "PyPy" else []
        for line, prompt, codes in (
            ("exec python3 llamactl.py auth login", "left", [129]),
            (nohup + "auth use", "or name", [130] + pypy),
            (nohup + "auth token", "API key for", [130, 2] + pypy),
        ):
            with self.subTest(line):
                shown = self.pty("", [(prompt, None)], command=self.in_shell(line))
                self.assertIn(shown.code, codes)
                self.assertEqual(self.store_text(), before)

    def test_where_nobody_can_be_asked(self):
        self.three_profiles()
        self.play(
            """
            $ TERM=dumb llamactl auth use
            error: ...NAME: blue, blue-2, red
            [2]
            $ CI=true llamactl auth logout
            error: ...NAME: blue, blue-2, red
            [2]
            $ TERM=dumb llamactl auth token
            error: ...--api-key...
            ...
            [2]
            """,
            terminal=True,
        )
        line = "exec python3 llamactl.py auth use 2> error.txt"
        shown = self.pty("", env={"CI": ""}, command=self.in_shell(line))
        self.assertEqual((shown.code, shown.out), (2, ""))

    def test_a_login_counts_down_and_asks_for_the_project(self):
        for lifetime, left in ((600, "9:5[0-9]"), (86400, "1439:5[0-9]")):
            self.cloud.pending_polls, self.cloud.expires_in = 1, lifetime
            shown = self.login(stdin=b"2\n", terminal=True).err
            self.assertRegex(shown, f"\rwaiting, {left} left \r {{22}}\r")
        self.assertEqual(self.profiles()["dev@example.com"]["project_id"], "proj-beta")

    def test_a_countdown_ends_at_nothing_and_needs_a_cursor(self):
        for term, expected in (("xterm", "\rwaiting, 0:00 left "), ("dumb", "")):
            process = llamactl.Process({"TERM": term}, None, "host", False)
            with patched(llamactl, "is_terminal", return_value=True):
                with contextlib.redirect_stderr(io.StringIO()) as shown:
                    wait = llamactl.Terminal(process).countdown(time.monotonic() - 1)
                    wait(0.001)
            self.assertEqual(shown.getvalue()[:20], expected)


class ProgramOnStdin(SignalCase):
    """curl ... | python3 - auth token"""

    def test_it_closes_the_terminal_that_it_opened(self):
        terminal = io.StringIO()
        self.patch(open_controlling_terminal=lambda: terminal)
        self.done("--version", program="-")
        self.assertTrue(terminal.closed)

    def test_windows_has_its_own_name_for_the_terminal(self):
        with patched(llamactl, "WINDOWS", True):
            with unittest.mock.patch("builtins.open") as opened:
                llamactl.open_controlling_terminal()
        opened.assert_called_once_with("CONIN$")

    def test_it_asks_at_the_controlling_terminal(self):
        for flags, question in (("", "API key for"), ("--api-key-file -", "API key: ")):
            with self.subTest(flags):
                self.write_store({})
                shown = self.pty(
                    "",
                    [(question, KEY.encode() + b"\n"), ("or name", b"beta\n")],
                    command=self.in_shell(f"python3 - auth token {flags} < llamactl.py"),
                )
                self.assertEqual(shown.code, 0, shown.out)
                self.assertNotIn("llx-", shown.out.replace("llx-wxyz", ""))
                self.assertEqual(self.profiles()["llx-wxyz"]["project_id"], "proj-beta")

    def test_the_program_is_no_key(self):
        self.play(
            """
            $ CI=true llamactl auth token --api-key - --project proj-beta
            error: standard input holds the program, so it cannot hold the key as well
            hint: llamactl auth token --api-key-file PATH --project ID
            [2]
            $ CI=true llamactl auth token --api-key-file - --project proj-beta
            error: ...holds the program...
            hint: ...
            [2]
            """,
            program="-",
        )

    def test_without_any_terminal_it_asks_nothing(self):
        self.three_profiles()
        for command, choices in (("auth token", "--api-key"), ("auth use", "NAME.*blue")):
            result = self.shell(f"python3 - {command} < llamactl.py")
            self.expect_failure(result, 2, choices)


class Streams(SignalCase):
    def test_closed_and_full(self):
        self.with_profile()
        listing = self.done("auth get").out
        installed = " ".join(map(shlex.quote, INSTALLED[len(PYTHON) :]))
        for line, code, out, err in (
            ("auth get >&-", 1, "", "^error: .*output.*\n$"),
            ("auth get > /dev/full", 1, "", "^error: .*output.*\n$"),
            ("auth get <&-", 0, listing, ""),
            ("auth token <&-", 2, "", "^error: .*--api-key.*\nhint: .*\n$"),
            ("auth token --api-key - --project p <&-", 2, "", "^error: .*input.*\n$"),
            ("auth token --api-key - --project p 0> x", 1, "", "^error: .* input can.*\n$"),
            ("auth get 2>&-", 0, listing, ""),
            ("auth use nope 2>&-", 1, "", ""),
            ("auth use nope 2> /dev/full", 1, "", ""),
            ("auth use main >&- 2>&- <&-", 0, "", ""),
        ):
            for program in ("llamactl.py", installed):
                with self.subTest(line, program=program[:11]):
                    result = self.shell(f"exec python3 {program} {line}")
                    self.expect(result, code, out, err)

    def test_a_closed_one_is_no_terminal(self):
        stream = io.StringIO()
        stream.close()
        self.assertFalse(llamactl.is_terminal(stream))

    def test_output_is_whole_or_an_error(self):
        """Unbuffered, one write may take a part of it, or nothing where it would wait."""
        read, full = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, full)
        os.set_blocking(full, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(full, b"x" * 4096):
                pass
        whole = self.done("--help").out
        for env in ({}, {"PYTHONUNBUFFERED": "1"}):
            with self.subTest(env=env), open(os.path.join(self.home, "out"), "wb") as file:
                self.assertEqual(self.process("--help", env=env).out, whole)
                with file_size_limit(100):
                    limited = self.process("--help", env=env, stdout=file)
                for cut in (limited, self.process("--help", env=env, stdout=full)):
                    self.expect(cut, 1, "", r"\Aerror: standard output.*\n\Z")

    def test_a_key_that_comes_late_on_a_pipe_that_does_not_wait(self):
        read, write = os.pipe()
        os.set_blocking(read, False)
        with open(read, "rb") as stdin, open(write, "wb") as pipe:
            process = self.spawn("auth token --api-key - --project proj-beta", stdin=stdin)
            time.sleep(0.3)
            pipe.write(KEY.encode())
        out, err = process.communicate(timeout=20)
        self.assertEqual(self.note(process.returncode, out, err).code, 0, err)
        self.assertEqual(self.profiles()["llx-wxyz"]["project_id"], "proj-beta")

    def test_a_name_in_the_locale_of_python_3_6(self):
        """Which takes the bytes of the command line for ASCII, and stands for itself."""
        self.with_profile("caf\u00e9")
        env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        name = "caf\u00e9".encode()
        said = r"profile caf(\\xe9|\u00e9) is current\n"
        use = [*PYTHON, PROGRAM, "auth", "use"]
        self.expect(self.run_command(*use, name, env=env), 0, "", said)
        env["LLAMACTL_PROFILE"] = name
        shown = self.run_command(*PYTHON, PROGRAM, "config", env=env)
        self.expect(shown, 0, None, "")
        self.assertIn("caf\u00e9", shown.out)

    def test_a_closed_pipe_ends_it_quietly(self):
        self.with_profile()
        for command, stream, code in (
            ("auth get", "stdout", 0),
            ("auth use main", "stderr", 0),
            ("auth use nope", "stderr", 1),
        ):
            with self.subTest(command):
                read, write = os.pipe()
                os.close(read)
                with open(write, "wb") as pipe:
                    self.expect(self.process(command, **{stream: pipe}), code)

    def test_stdout_is_utf_8_in_any_locale(self):
        self.with_profile(project_name="Gr\u00fc\u00dfe \u4f60\u597d \U0001f999")
        ascii_only = {
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
            "PYTHONIOENCODING": "ascii",
        }
        shown = self.process("config", env=ascii_only).out
        self.assertEqual(shown, self.done("config").out)
        self.assertIn("\U0001f999", shown)
        command = "projects use proj-alpha"
        self.assertEqual(self.process(command, env=ascii_only).code, 0)

    def test_ctrl_c_while_a_server_is_silent(self):
        self.with_profile()
        for program in (PYTHON + [PROGRAM], INSTALLED):
            with self.subTest(program):
                self.cloud.fault(LIST_PROJECTS, "silence")
                self.cloud.requests.clear()
                process = self.popen(*program, "projects", "get")
                while process.poll() is None and not self.cloud.requests:
                    time.sleep(0.005)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=5)
                result = self.note(process.returncode, out, err)
                self.assertEqual(result, (130, "", "interrupted\n"))


class Browser(CommandCase):
    def setUp(self):
        super().setUp()
        self.patch(MACOS=False)

    def opened(self, variables, flags="", browser="firefox", code=4, delay=0, **device):
        """The addresses that a login, refused at once, gave to the browser."""
        self.cloud.device_answer = device
        self.cloud.token_script = [(400, {"error": "access_denied"})]
        fake = unittest.mock.Mock()
        fake.name = browser

        def get_browser():
            time.sleep(delay)
            if not browser:
                raise webbrowser.Error
            return fake

        env = dict(word.split("=") for word in variables.split())
        with patched(webbrowser, "get", get_browser):
            result = self.call(f"auth login {flags}".strip(), env=env)
        self.assertEqual(result.code, code, result.err)
        return [call[0][0] for call in fake.open.call_args_list]

    def test_it_is_opened_where_a_graphical_one_is_plausible(self):
        for variables in ("DISPLAY=:0", "WAYLAND_DISPLAY=wayland-0"):
            (address,) = self.opened(variables, delay=0.3)
            self.assertTrue(address.startswith(f"{self.url}/oidc/device?user_code="))
        for variables in (
            "",
            "DISPLAY=",
            "DISPLAY=:0 SSH_CONNECTION=a",
            "DISPLAY=:0 SSH_TTY=/dev/pts/1",
            "DISPLAY=:0 SSH_CLIENT=a",
        ):
            with self.subTest(variables):
                self.assertEqual(self.opened(variables), [])
        self.assertEqual(self.opened("DISPLAY=:0", "--no-browser"), [])

    def test_macos_needs_no_display(self):
        self.patch(MACOS=True)
        self.assertEqual(len(self.opened("")), 1)
        self.assertEqual(self.opened("SSH_TTY=/dev/pts/1"), [])

    def test_one_in_the_terminal_is_not_opened(self):
        names = "w3m lynx links elinks www-browser /usr/bin/lynx links2".split()
        for name in names + [None]:  # none: webbrowser found no browser
            with self.subTest(name):
                self.assertEqual(self.opened("DISPLAY=:0", browser=name), [])

    def test_one_that_stays_open_holds_nothing_up(self):
        browser = os.path.join(self.home, "browser")
        write_file(browser, "#!/bin/sh\nexec sleep 9 >/dev/null 2>&1\n", 0o700)
        env = {"DISPLAY": ":9", "BROWSER": f"{browser} %s"}
        started = time.monotonic()
        command = INSTALLED + "auth login --project proj-alpha".split()
        self.assertEqual(self.run_command(*command, env=env).code, 0)
        self.assertLess(time.monotonic() - started, 8)

    def test_it_sees_no_address_but_http_and_https(self):
        plain = {"verification_uri": "https://id.example/d"}
        plain["verification_uri_complete"] = None
        self.assertEqual(self.opened("DISPLAY=:0", **plain), ["https://id.example/d"])
        for address in (
            "javascript:alert(1)",
            "file:///etc/passwd",
            "ftp://x/",
            "-x",
            "https://a.example/\n--profile",
            "data:text/html,x",
            "https:evil",
        ):
            for name in plain:
                with self.subTest(address, name=name):
                    device = dict(plain, **{name: address})
                    self.assertEqual(self.opened("DISPLAY=:0", code=1, **device), [])


# ========================================================================================
# disk: helpers
# ========================================================================================

patched = unittest.mock.patch.object


def tree(folder):
    """What stands under FOLDER: path -> (mode, inode, time of change, content or link
    target)."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(parent, name)
            info, content = os.lstat(path), None
            if stat.S_ISREG(info.st_mode):
                content = file_bytes(path)
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            found[path] = (oct(info.st_mode), info.st_ino, info.st_mtime_ns, content)
    return found


def file_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def content_of(path):
    """The bytes of the file PATH; None where there is none."""
    return file_bytes(path) if os.path.exists(path) else None


def mode_of(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))


@contextlib.contextmanager
def umask(mask):
    """What runs under MASK leaves it as it is: a child of `auth exec` inherits it."""
    before = os.umask(mask)
    try:
        yield
    finally:
        after = os.umask(before)
    if after != mask:
        raise AssertionError(f"the umask was {mask:o} and is {after:o}")


@contextlib.contextmanager
def file_size_limit(size):
    """No file of this process grows beyond SIZE bytes: a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_path(name, folder):
    """The path of NAME, which may be relative to the open FOLDER."""
    if folder is None:
        return os.fspath(name)
    return os.path.normpath(os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name))


def skip_without_paths_of_descriptors():
    if not os.path.exists("/proc/self/fd"):
        raise unittest.SkipTest("needs /proc, to know the path of an open folder")


def failing(module, name, error):
    """The module's function NAME fails with ERROR, a name such as "EIO"."""
    number = getattr(errno, error)
    return patched(module, name, side_effect=OSError(number, os.strerror(number)))


def opening_fails(refused, number):
    """os.open fails with the error NUMBER where REFUSED(path, flags), even for root."""
    skip_without_paths_of_descriptors()
    really_open = os.open

    def failing_open(path, flags, *args, dir_fd=None):
        if refused(full_path(path, dir_fd), flags):
            raise OSError(number, os.strerror(number), path)
        return really_open(path, flags, *args, dir_fd=dir_fd)

    return patched(os, "open", failing_open)


def is_for_writing(path, flags):
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextlib.contextmanager
def locked(path):
    """Hold the kernel's lock on PATH as another process would; yields what lets go of
    it."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield lambda: fcntl.flock(file, fcntl.LOCK_UN)


def has_a_shared_group():
    """Whether our group may have other members: it is not root's and not ours alone."""
    return os.getegid() not in (0, os.geteuid())


def unknown_user():
    """The system does not know our uid, as in many a container."""
    return unittest.mock.patch("pwd.getpwuid", side_effect=KeyError("uid not found"))


def commands(text):
    """The command lines of TEXT, each as its words."""
    return tuple(tuple(line.split()) for line in text.strip().splitlines())


class DiskCase(CommandCase):
    """Commands that read, commands that write, and what both do to the files of the
    home, where there is nothing at first."""

    READERS = commands("""
        auth get
        auth get main -o yaml
        auth status
        auth status --offline
        environments get
        projects get
        organizations get
        deployments get
        config -o json
    """)
    OFFLINE_READERS = commands("""
        auth get
        auth status --offline
        environments get
        config
        auth inject --env-file -
    """)
    # writers that need neither a profile nor the network
    ALWAYS_WRITERS = commands(f"""
        auth token --no-verify --api-key {OTHER_KEY} --project proj-beta
        environments add https://other.example.com --no-verify
    """)
    WRITERS = ALWAYS_WRITERS + commands(f"""
        auth use main
        auth logout main
        auth login --start
        projects use proj-beta
        environments use {DEFAULT_URL}
        environments delete {DEFAULT_URL}
    """)

    def setUp(self):
        Case.setUp(self)
        # only a power cut tells the difference, and a busy disk takes its time for each
        patcher = patched(os, "fsync", lambda descriptor: None)
        patcher.start()
        self.addCleanup(patcher.stop)

    def assert_one_error(self, result, code=1, names=""):
        """CODE, nothing on stdout, and one error line that names NAMES."""
        self.assertEqual((result.code, result.out), (code, ""), result.err)
        others = r"((hint|warning): .*\n)*"
        error = f"error: .*{re.escape(names)}.*\n"
        self.assertRegex(result.err, rf"\A{others}{error}{others}\Z")

    def files(self):
        return sorted(os.listdir(self.folder))

    def warnings_of(self, result):
        return re.findall("(?m)^warning: .*", result.err)

    def put(self, content, mode=0o600):
        """CONTENT as the store, whatever it is."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        write_file(self.store_path, content, mode)

    def of_variables(self):
        return {
            "LLAMA_CLOUD_API_KEY": KEY,
            "LLAMA_AGENTS_PROJECT_ID": "proj-alpha",
            "LLAMA_CLOUD_BASE_URL": self.url,
        }

    def log_in(self, expired=True):
        """A login of dev@example.com made by the program, its access token EXPIRED or
        not."""
        self.login("--project proj-alpha")
        if expired:
            self.cloud.expire_access_tokens()
            past = re.sub('("access_expires_at": )[0-9.]+', r"\g<1>1.0", self.store_text())
            self.put(past.encode())
        return self.profiles()["dev@example.com"]

    def assert_nowhere(self, *secrets):
        """No file holds any of the SECRETS, which were logged out."""
        for path, (*_, content) in tree(self.home).items():
            for secret in secrets:
                self.assertNotIn(secret, repr(content), path)


# ========================================================================================
# disk: the folder, modes, who creates and who only reads
# ========================================================================================


class StoreFolderTest(DiskCase):
    def test_where_the_folder_is(self):
        here = os.path.abspath("./~/x")
        for row in f"""
            HOME=/home LLAMACTL_CONFIG_DIR=/a                     | /a
            HOME=/home LLAMACTL_CONFIG_DIR=~/b                    | /home/b
            HOME=/home LLAMACTL_CONFIG_DIR=/c XDG_CONFIG_HOME=/d  | /c
            HOME=/home XDG_CONFIG_HOME=/d                         | /d/llamactl
            HOME=/home XDG_CONFIG_HOME=relative                   | /home/.config/llamactl
            HOME=/home XDG_CONFIG_HOME=                           | /home/.config/llamactl
            HOME=/home APPDATA=/roaming                           | /home/.config/llamactl
            HOME=/home                                            | /home/.config/llamactl
            HOME=/home LLAMACTL_CONFIG_DIR=~                      | /home
            HOME=/home/ LLAMACTL_CONFIG_DIR=~//x                  | /home/x
            HOME=/ LLAMACTL_CONFIG_DIR=~/x                        | /x
            HOME=relative LLAMACTL_CONFIG_DIR=~/x                 | None
            HOME= LLAMACTL_CONFIG_DIR=~/x                         | None
            HOME= LLAMACTL_CONFIG_DIR=~                           | None
            HOME= LLAMACTL_CONFIG_DIR=                            | None
            HOME= LLAMACTL_CONFIG_DIR=~nobody-at-all              | None
            HOME= LLAMACTL_CONFIG_DIR=./~/x                       | {here}
            LLAMACTL_CONFIG_DIR=~/x                               | None
            LLAMACTL_CONFIG_DIR=/x                                | /x
        """.strip().splitlines():
            words, expected = row.split("|")
            env = dict(word.split("=") for word in words.split())
            only = unittest.mock.patch.dict(os.environ, env, clear=True)
            with self.subTest(row), unknown_user(), only:
                folder = llamactl.read_process().config_folder()
                self.assertEqual(str(folder), expected.strip())

    def test_a_host_without_a_name(self):
        with unittest.mock.patch("os.uname", return_value=unittest.mock.Mock(nodename="")):
            self.assertEqual(llamactl.read_process().host_name, "unknown")

    def test_a_user_without_an_account_on_python_3_6_7(self):
        with unittest.mock.patch("os.path.expanduser", side_effect=KeyError(54321)):
            self.assertIsNone(llamactl.read_process().home)

    def test_windows_keeps_it_in_appdata(self):
        del self.env["LLAMACTL_CONFIG_DIR"]
        roaming = os.path.join(self.home, "Roaming")
        with patched(llamactl, "WINDOWS", True):
            env = {"APPDATA": roaming, "XDG_CONFIG_HOME": self.home}
            self.done(*self.ALWAYS_WRITERS[1], env=env)
        names = os.listdir(os.path.join(roaming, "llamactl"))
        self.assertEqual(sorted(names), STORE_FILES)

    def test_a_full_credential_in_variables_needs_no_home(self):
        self.cloud = self.cloud_server()
        for folder in ("", "~/x", "~nobody-at-all/x"):
            env = dict(self.of_variables(), LLAMACTL_CONFIG_DIR=folder, HOME="")
            self.done("projects get", env=env)

    def test_a_working_folder_that_is_gone_has_no_folder_in_it(self):
        self.cloud = self.cloud_server()
        env = dict(self.of_variables(), LLAMACTL_CONFIG_DIR="relative")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(tempfile.mkdtemp(dir=self.home))
        os.rmdir(os.getcwd())
        self.done("projects get", env=env)
        self.assert_one_error(self.call(*self.ALWAYS_WRITERS[0], env=env), 1, "no home")

    def test_reading_creates_nothing(self):
        self.cloud = self.cloud_server()
        shutil.rmtree(self.folder)
        for command in self.READERS + self.OFFLINE_READERS:
            self.call(*command)
            self.assertEqual(os.listdir(self.home), [], command)
        self.done("projects get", env=self.of_variables())
        self.assertEqual(os.listdir(self.home), [])

    def test_reading_changes_nothing_and_needs_no_right_to_write(self):
        self.cloud = self.cloud_server()
        self.with_profile()
        os.chmod(self.store_path, 0o644)  # loose, but that is for a writer to mend
        write_file(self.store_path + ".new", b"what a crash left", 0o600)
        os.chmod(self.folder, 0o755)
        before = tree(self.home)
        for command in self.READERS + self.OFFLINE_READERS:
            with self.subTest(command):
                self.done(*command, sings="inject" in command)
                self.assertEqual(tree(self.home), before)
                with opening_fails(is_for_writing, errno.EROFS):
                    self.done(*command, sings="inject" in command)

    def test_folders_and_files_are_private_under_every_umask(self):
        self.env["LLAMACTL_CONFIG_DIR"] = os.path.join(self.home, "a", "b", "c")
        private = dict.fromkeys("abc", "0o40700")
        private.update(dict.fromkeys(STORE_FILES, "0o100600"))
        for mask in (0o000, 0o022, 0o077, 0o277):
            for command in self.ALWAYS_WRITERS * 2:  # the files are there the second time
                with self.subTest(umask=oct(mask), command=command[:2]), umask(mask):
                    self.done(*command)
                found = tree(self.home).items()
                modes = {os.path.basename(path): entry[0] for path, entry in found}
                self.assertEqual(modes, private)
            shutil.rmtree(os.path.join(self.home, "a"))

    def test_a_folder_that_another_process_makes_meanwhile(self):
        walk = llamactl.Place._walk

        def slow_walk(place, parts):
            walk(place, parts)
            os.makedirs(os.path.dirname(place.path), exist_ok=True)

        for top, folder in (("new", "new"), ("newer", "newer/conf")):
            path = os.path.join(self.home, folder)
            self.env["LLAMACTL_CONFIG_DIR"] = path
            with self.subTest(folder), patched(llamactl.Place, "_walk", slow_walk):
                self.done("auth get")
                shutil.rmtree(os.path.join(self.home, top))
                self.done(*self.ALWAYS_WRITERS[0])
                self.assertEqual(mode_of(os.path.join(path, "profiles.json")), "0o600")

    def test_an_error_of_the_lock_names_the_lock(self):
        os.makedirs(self.folder, exist_ok=True)
        lock = f"{self.store_path}.lock"
        os.mkdir(lock)
        result = self.call(*self.ALWAYS_WRITERS[0])
        self.assert_one_error(result, 1, f"{lock} cannot be changed: Is a directory")

    def test_files_are_private_from_birth(self):
        """Before anything is written: who opened the empty file could read what comes
        later."""
        born = []

        def noted(descriptor, mode, fchmod=os.fchmod):
            born.append(oct(stat.S_IMODE(os.fstat(descriptor).st_mode)))
            fchmod(descriptor, mode)

        with umask(0), patched(os, "fchmod", noted):
            self.done(*self.ALWAYS_WRITERS[0])
            self.done("auth inject --env-file", os.path.join(self.home, "new.env"))
        self.assertGreaterEqual(len(born), 4)  # the store, the .env and their locks
        self.assertEqual(set(born), {"0o600"})

    def test_writers_tighten_a_loose_store(self):
        self.cloud = self.cloud_server()
        for command in self.WRITERS:  # "auth use main" changes nothing but the mode
            self.with_profile()
            os.chmod(self.store_path, 0o644)
            self.done(*command)
            self.assertEqual(mode_of(self.store_path), "0o600", command)

    def test_a_folder_that_others_can_write_to_is_a_warning_and_stays(self):
        self.cloud = self.cloud_server()
        shared = has_a_shared_group()
        modes = ((0o777, True), (0o770, shared), (0o702, True), (0o755, False))
        for mode, warned in modes:
            for command in ("auth get", "auth use main", "auth logout main"):
                with self.subTest(mode=oct(mode), command=command):
                    self.with_profile()
                    os.chmod(self.folder, mode)
                    warnings = self.warnings_of(self.done(command))
                    self.assertEqual(self.folder in str(warnings), warned)
                    self.assertEqual(mode_of(self.folder), oct(mode))

    def test_of_a_folder_that_is_missing_nothing_is_said(self):
        self.cloud = self.cloud_server()
        shutil.rmtree(self.folder)
        os.chmod(self.home, 0o777)
        self.assertEqual(self.warnings_of(self.done("auth get")), [])

    def test_where_there_are_no_acls_the_bits_of_a_private_group_do_not_matter(self):
        self.cloud = self.cloud_server()
        self.with_profile()
        os.chmod(self.store_path, 0o640)
        with failing(os, "listxattr", "ENOTSUP"):
            is_warned = "run: chmod 600" in self.done("auth get").err
        self.assertEqual(is_warned, has_a_shared_group())

    def test_no_chmod_is_advised_on_a_read_only_file_system(self):
        self.cloud = self.cloud_server()
        self.with_profile()
        os.chmod(self.store_path, 0o711)
        self.assertEqual(self.done("auth get").err, "")
        os.chmod(self.store_path, 0o604)
        self.assertIn("run: chmod 600", self.done("auth get").err)
        read_only = unittest.mock.Mock(f_flag=getattr(os, "ST_RDONLY", 1))
        with patched(os, "statvfs", return_value=read_only):
            self.assertEqual(self.done("auth get").err, "")

    def test_a_change_is_synced_before_it_is_renamed_and_the_folder_after(self):
        steps = []

        def noting(name):
            function = getattr(os, name)

            def noted(*args, **options):
                is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
                steps.append(name + " folder" * is_folder)
                return function(*args, **options)

            return patched(os, name, noted)

        self.url = DEFAULT_URL
        self.with_profile()
        with noting("fsync"), noting("replace"), noting("rename"), noting("write"):
            self.done(*self.ALWAYS_WRITERS[0])
        # first the proof that the store can be changed, then the change
        self.assertEqual(steps, ["write", "fsync", "replace", "fsync folder"] * 2)

    def test_a_change_that_fails_is_not_written(self):
        self.put(b'{"version": 1, "current_environment": null, "environments": {}}')
        before = file_bytes(self.store_path)
        with self.assertRaises(KeyError):
            with llamactl.Store(self.folder, self.fail).change() as data:
                data["current_environment"] = DEFAULT_URL
                raise KeyError("something of ours went wrong")
        self.assertEqual(file_bytes(self.store_path), before)
        self.assertEqual(self.files(), STORE_FILES)


# ========================================================================================
# disk: crashes, full and forbidden disks
# ========================================================================================


class CrashTest(DiskCase):
    """What stands on the disk at any line of a change is what a crash leaves there."""

    WRITE, NEXT = DiskCase.ALWAYS_WRITERS

    def setUp(self):
        super().setUp()
        self.addCleanup(os.umask, os.umask(0))
        self.url = DEFAULT_URL

    def state(self):
        return {path: entry[0::3] for path, entry in tree(self.home).items()}

    def states(self, *command):
        """What stands in the home before COMMAND, at its lines, each change once, and
        after."""
        states = [self.state()]
        program = llamactl.main.__code__.co_filename

        def trace(frame, event, argument):
            if frame.f_code.co_filename != program:
                return None
            state = self.state()
            if state != states[-1]:
                states.append(state)
            return trace

        self.addCleanup(sys.settrace, sys.gettrace())
        sys.settrace(trace)
        self.done(*command)
        sys.settrace(None)
        return states + [self.state()]

    def outcome(self, state, *command):
        """What COMMAND makes of the home in a STATE; a damaged copy has no date."""
        shutil.rmtree(self.home)
        os.mkdir(self.home)
        for path, (mode, content) in state.items():
            bits = stat.S_IMODE(int(mode, 8))
            if isinstance(content, str):
                os.symlink(content, path)
            elif content is None:
                os.mkdir(path, bits)
            else:
                write_file(path, content, bits)
        self.done(*command)
        after = self.state().items()
        return sorted((path.partition(".damaged-")[0], entry) for path, entry in after)

    def assert_survives(self, path, write, following):
        """A crash during WRITE leaves the old or the new content in the file PATH, tells
        others nothing, and what is done next ends as without a crash."""
        states = self.states(*write)
        self.assertGreater(len(states), 5)
        before, after = states[0], states[-1]
        whole = (None, before.get(path), after.get(path))
        modes = {"0o40700", "0o100600", "0o120777"}.union(
            each[0] for each in before.values()
        )
        outcomes = [self.outcome(state, *following) for state in (before, after)]
        for number, state in enumerate(states):
            with self.subTest(number):
                self.assertIn(state.get(path), whole)
                self.assertLessEqual({mode for mode, _ in state.values()}, modes)
                self.assertIn(self.outcome(state, *following), outcomes)

    def test_the_first_change_of_a_store(self):
        self.assert_survives(self.store_path, self.WRITE, self.NEXT)

    def test_a_change_beside_what_a_crash_left(self):
        self.with_profile()
        write_file(self.store_path + ".new", b'{"version": 1', 0o600)
        self.assert_survives(self.store_path, self.WRITE, self.NEXT)

    def test_a_change_of_a_damaged_store_behind_a_link(self):
        self.put(b'{"version": 1')
        real = self.store_path + ".real"
        os.rename(self.store_path, real)
        os.symlink("profiles.json.real", self.store_path)
        self.assert_survives(real, self.WRITE, self.NEXT)

    def test_a_process_that_is_killed_at_its_rename_blocks_nobody(self):
        script = (
            "import os, signal, sys\n"
            "os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = self.process(*self.WRITE, python=("-c", script + AS_MAIN))
        self.assertEqual(killed.code, -signal.SIGKILL)
        self.done(*self.NEXT)
        self.assertEqual(self.files(), STORE_FILES)

    def test_the_first_change_of_a_env_file_and_one_behind_a_link(self):
        self.with_profile()
        self.done(*self.WRITE)  # another profile, which is the current one
        folder = os.path.join(self.home, "project")
        path = os.path.join(folder, ".env")
        inject = ("auth", "inject", "--env-file", path)
        self.assert_survives(path, inject, inject + ("--profile", "main"))
        real = os.path.join(folder, "real.env")
        write_file(real, b'# mine\nA=1\nLLAMA_CLOUD_API_KEY=old\nLAST="no newline"', 0o640)
        os.unlink(path)
        os.symlink("real.env", path)
        self.assert_survives(real, inject, inject + ("--profile", "main"))


class FullDiskTest(DiskCase):
    def setUp(self):
        super().setUp()
        self.cloud = self.cloud_server()
        self.with_profile()
        self.done("environments use", self.url)

    def test_the_disk_is_full_after_so_many_bytes(self):
        before = file_bytes(self.store_path)
        for limit in (0, 1, *range(97, len(before), 97), len(before) - 1):
            with self.subTest(limit):
                with file_size_limit(limit):
                    result = self.call(*self.ALWAYS_WRITERS[0])
                self.assert_one_error(result, 1, self.store_path)
                self.assertEqual(file_bytes(self.store_path), before)
                self.assertEqual(self.files(), STORE_FILES)
        self.done(*self.ALWAYS_WRITERS[0])

    def test_a_full_disk_tears_no_env_file(self):
        path = os.path.join(self.home, ".env")
        for before in (None, b"# mine\n" * 30):
            if before:
                write_file(path, before, 0o600)
            for limit in (0, 1, 50, len(before or b"") or 100):
                with self.subTest(limit=limit, before=before):
                    with file_size_limit(limit):
                        result = self.call("auth inject --env-file", path)
                    self.assert_one_error(result, 1, path)
                    self.assertEqual(content_of(path), before)
                    left = [".env", "conf"] if before else ["conf"]
                    self.assertEqual(sorted(os.listdir(self.home)), left)

    def test_nothing_is_sent_before_the_store_is_proven_writable(self):
        """Nothing is asked for then, and nothing ended, that could not be stored."""
        self.log_in()
        self.cloud.reset()
        before = file_bytes(self.store_path)
        for command in commands(f"""
            auth login
            auth login --start
            auth token --api-key-file -
            auth logout dev@example.com
            auth logout --all
            environments delete {self.url}
        """):
            for obstacle in (
                file_size_limit(200),
                failing(os, "replace", "EBUSY"),  # the store is mounted
                failing(os, "replace", "EPERM"),
            ):
                with self.subTest(command), obstacle:
                    self.assert_one_error(self.call(*command, stdin=KEY.encode()))
                    self.assertEqual(self.cloud.requests, [])
                    self.assertEqual(file_bytes(self.store_path), before)
                    self.assertEqual(self.files(), STORE_FILES)

    def test_the_proof_leaves_no_store_behind(self):
        os.unlink(self.store_path)
        elsewhere = {"LLAMA_CLOUD_BASE_URL": self.url}
        self.assert_one_error(self.call("auth token", env=elsewhere), 2)
        self.assertEqual(self.files(), ["profiles.json.lock"])

    def test_a_folder_that_is_read_only(self):
        before = tree(self.home)
        for number in (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT):
            for command in self.WRITERS:
                with self.subTest(errno.errorcode[number], command=command):
                    with opening_fails(is_for_writing, number):
                        self.assert_one_error(self.call(*command), 1, self.folder)
                    self.assertEqual(tree(self.home), before)

    def test_no_home(self):
        """Missing, impossible or unknown: reading works, writing says where it failed."""
        write_file(os.path.join(self.home, "file"), b"not a folder", 0o600)
        del self.env["LLAMACTL_CONFIG_DIR"]
        missing, blocked = f"{self.home}/missing/deep", f"{self.home}/file/home"
        for home in (missing, blocked, "relative", None):
            self.env.pop("HOME", None)
            self.env.update({"HOME": home} if home else {})
            before = tree(self.home)
            with self.subTest(home), unknown_user():
                for command in self.OFFLINE_READERS[:4] if home != blocked else ():
                    self.assertIn(self.call(*command).code, (0, 4))
                self.done("projects get", env=self.of_variables())
                self.assertEqual(tree(self.home), before)
                for command in self.ALWAYS_WRITERS:
                    if home == missing:
                        self.done(*command)
                        names = os.listdir(f"{home}/.config/llamactl")
                        self.assertEqual(sorted(names), STORE_FILES)
                    else:
                        self.assert_one_error(self.call(*command))
                        self.assertEqual(tree(self.home), before)


def mid_change(act):
    """ACT gets the path of each file that is written whole, and not yet in its place."""
    skip_without_paths_of_descriptors()

    def hooked(descriptor):
        path = full_path("", descriptor)
        if "new" in os.path.basename(path):
            act(path)

    return patched(os, "fsync", hooked)


Change = collections.namedtuple("Change", "name command path result lock")


class FileSystemCase(DiskCase):
    """A change of the store and one of a .env, where the file system lacks something."""

    LEFT = ["app.env", "conf", "profiles.json"]  # and nothing else, but for locks let go

    def setUp(self):
        skip_without_paths_of_descriptors()
        super().setUp()
        self.cloud = self.cloud_server()
        path = os.path.join(self.home, "app.env")
        use = ("environments", "use", DEFAULT_URL)
        inject = ("auth", "inject", "--env-file", path)
        lock = self.store_path + ".locked"
        self.store = Change("store", use, self.store_path, DEFAULT_URL, lock)
        self.env_file = Change("env", inject, path, KEY, path + ".llamactl-locked")
        self.start_anew()

    def start_anew(self):
        """A store with one profile, a .env with a line of somebody's, and nothing else."""
        for path, (*_, content) in tree(self.home).items():
            if content is not None:
                os.unlink(path)
        self.with_profile()
        write_file(self.env_file.path, b"A=1\n", 0o600)

    def changes(self, *lists):
        """Each of the two changes with each row of LISTS."""
        return itertools.product((self.store, self.env_file), *lists)

    @contextlib.contextmanager
    def case(self, change, *row):
        """A sub-test that begins anew; yields what the file holds."""
        with self.subTest(change.name, row=row):
            self.start_anew()
            yield file_bytes(change.path)

    def left(self):
        names = [os.path.basename(path) for path in tree(self.home)]
        return sorted(name for name in names if not name.endswith("lock"))

    def assert_made(self, change, warnings=0):
        """The change is made, with so many WARNINGS -> these."""
        told = self.warnings_of(self.done(*change.command))
        self.assertIn(change.result.encode(), file_bytes(change.path))
        self.assertEqual(self.left(), self.LEFT)
        self.assertEqual(len(told), warnings, told)
        return told

    def assert_refused(self, change, names, content, *others):
        """An error NAMES something; CONTENT is in the file, and OTHERS lie beside it."""
        self.assert_one_error(self.call(*change.command), 1, names)
        self.assertEqual(file_bytes(change.path), content)
        self.assertEqual(self.left(), sorted([*self.LEFT, *others]))


class FileSystemsWithoutLocks(FileSystemCase):
    """Some network and FUSE mounts: a lock file with a random word in it stands in."""

    def setUp(self):
        super().setUp()
        patcher = failing(fcntl, "flock", "ENOLCK")
        self.flock = patcher.start()
        self.addCleanup(patcher.stop)
        self.patch(LOCK_TIMEOUT=0.3)

    def test_the_empty_lock_file_of_another_process_is_not_removed(self):
        self.flock.side_effect = None  # here there are locks; it has not written its word
        self.with_profile()
        held = write_file(f"{self.store_path}.locked", "", 0o600)
        self.done("auth use main")
        self.assertTrue(os.path.exists(held))

    def hold(self, change, word, seconds=0):
        """The lock file of another process with its WORD, made so many SECONDS ago."""
        write_file(change.lock, word, 0o600)
        made = os.stat(change.lock).st_mtime - seconds
        os.utime(change.lock, (made, made))

    def clock(self, shift, real=time.time):
        """The clock of this machine, not of the file system, is SHIFT seconds ahead."""
        return patched(time, "time", lambda: real() + shift)

    def assert_blocked(self, change, before, word):
        """The lock file with that WORD is named, and stays."""
        self.patch(LOCK_TIMEOUT=0.03)
        self.assert_refused(change, change.lock, before, os.path.basename(change.lock))
        self.assertEqual(file_bytes(change.lock), word)

    def test_every_change_is_made_and_warned_about_once(self):
        for change, error in self.changes(("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")):
            with self.case(change, error):
                self.flock.side_effect = OSError(getattr(errno, error), "no locks")
                self.assertIn("locks", self.assert_made(change, 1)[0])
        more = commands(f"""
            auth login --project proj-alpha
            auth token --api-key {KEY} --project proj-alpha
            auth logout --all
        """)
        for command in self.WRITERS + more:
            with self.subTest(command):
                self.start_anew()
                self.assertEqual(len(self.warnings_of(self.done(*command))), 1)
                self.assertEqual(self.left(), self.LEFT)

    def test_a_lock_file_holds_a_new_word_that_the_new_file_s_name_carries(self):
        for (change,) in self.changes():
            words = []

            def look(new, lock=change.lock, words=words):
                words.append(new.rpartition(".")[2])
                self.assertEqual(content_of(lock), words[-1].encode())
                self.assertEqual(mode_of(lock), "0o600")

            for turn in ("first", "second"):
                with self.case(change, turn), mid_change(look):
                    self.assert_made(change, 1)
            self.assertGreater(len(words), 1)
            self.assertEqual(len(set(words)), len(words))

    def test_one_younger_than_a_minute_blocks_whatever_time_it_is_here(self):
        for change, seconds, shift in self.changes((0, 50), (0, 7200, -7200)):
            with self.case(change, seconds, shift) as before, self.clock(shift):
                self.hold(change, b"alive", seconds)
                with failing(os, "replace", "EIO"):  # it is not even put aside
                    self.assert_blocked(change, before, b"alive")

    def test_an_older_one_is_taken_over_whatever_time_it_is_here(self):
        for change, seconds, shift in self.changes((70, 100000), (0, 7200, -7200)):
            with self.case(change, seconds, shift), self.clock(shift):
                self.hold(change, b"dead", seconds)
                write_file(
                    change.lock.replace("locked", "new.dead"), b"what it wrote", 0o600
                )
                self.assert_made(change, 1)

    def test_one_that_goes_meanwhile_is_waited_for(self):
        for (change,) in self.changes():
            with self.case(change), patched(time, "sleep") as sleep:
                sleep.side_effect = lambda seconds, lock=change.lock: os.unlink(lock)
                self.hold(change, b"alive")
                self.assert_made(change, 1)
                self.assertEqual(sleep.call_count, 1)

    def test_that_of_a_process_that_took_over_first_is_put_back(self):
        really_replace = os.replace
        for (change,) in self.changes():
            seen = []

            def replace(source, target, seen=seen, change=change, **folders):
                path = full_path(source, folders["src_dir_fd"])
                if path == change.lock and not seen:
                    seen.append(file_bytes(path))
                    self.hold(change, b"faster")
                really_replace(source, target, **folders)

            with self.case(change) as before, patched(os, "replace", replace):
                self.hold(change, b"dead", 120)
                self.assert_blocked(change, before, b"faster")
                self.assertEqual(seen, [b"dead"])

    def test_a_process_that_slept_until_it_was_taken_over_changes_nothing(self):
        for change, word in self.changes((b"other", None)):

            def take_over(_, change=change, word=word):
                os.unlink(change.lock)
                write_file(change.path, b"OTHERS=1\n", 0o600)
                if word:  # else that process is at its end
                    self.hold(change, word)

            others = [os.path.basename(change.lock)] if word else []
            with self.case(change, word), mid_change(take_over):
                self.assert_refused(change, change.path, b"OTHERS=1\n", *others)
                self.assertEqual(content_of(change.lock), word)

    def test_nor_does_it_move_aside_what_another_process_wrote(self):
        names = llamactl.Place.names

        def slow_names(place):
            self.hold(self.store, b"other")
            return names(place)

        write_file(self.store_path, b"{", 0o600)
        with patched(llamactl.Place, "names", slow_names):
            error = "another process took over"
            self.assert_refused(self.store, error, b"{", "profiles.json.locked")

    def test_a_change_that_fails_or_is_interrupted_leaves_no_lock_file(self):
        ends = ((OSError(errno.ENOSPC, "full"), 1), (KeyboardInterrupt(), 130))
        for change, (error, code) in self.changes(ends):
            act = unittest.mock.Mock(side_effect=error)
            with self.case(change, code) as before, mid_change(act):
                self.assertEqual(self.call(*change.command).code, code)
                self.assertEqual(self.left(), self.LEFT)
                self.assertEqual(file_bytes(change.path), before)

    def test_none_stands_in_where_locking_fails_otherwise(self):
        self.flock.side_effect = OSError(errno.EIO, "Input/output error")
        for (change,) in self.changes():
            with self.case(change) as before:
                self.assert_refused(change, "Input/output error", before)

    def test_a_lock_file_that_cannot_be_written_is_removed(self):
        for (change,) in self.changes():
            with self.case(change) as before, failing(os, "write", "ENOSPC"):
                self.assert_refused(change, change.path, before)

    def test_eight_processes_at_once_lose_nothing(self):
        script = (
            "import errno, fcntl, sys\n"
            "def flock(descriptor, operation):\n"
            "    raise OSError(errno.ENOLCK, 'no locks')\n"
            f"fcntl.flock = flock\n{AS_MAIN}sys.exit(status)\n"
        )
        command = "auth token --no-verify --project proj-alpha --api-key llx-CANARY-of-task"
        processes = []
        for number in range(8):
            process = self.spawn(f"{command}-000{number}", python=("-c", script))
            self.addCleanup(process.kill)
            processes.append(process)
        for process in processes:
            out, err = process.communicate(timeout=60)
            result = self.note(process.returncode, out, err)
            self.assertEqual((result.code, len(self.warnings_of(result))), (0, 1), err)
        names = [f"llx-000{number}" for number in range(8)]
        self.assertEqual(sorted(self.profiles()), [*names, "main"])
        self.assertEqual(self.left(), self.LEFT)


class FileSystemsWithoutModes(FileSystemCase):
    """Where chmod fails, and each file has the mode that the mount gives to all."""

    @contextlib.contextmanager
    def modes(self, error, mode):
        """chmod fails with ERROR, each new file has MODE, and all mounts are FAT."""
        really_open = os.open
        really_chmod = os.fchmod
        open_file = open

        def opened(path, flags, *args, **options):
            descriptor = really_open(path, flags, *args, **options)
            if flags & os.O_CREAT:
                really_chmod(descriptor, mode)
            return descriptor

        def mounts(path, *args, **options):
            file = open_file(path, *args, **options)
            if path != "/proc/self/mountinfo":
                return file
            with file:
                return io.StringIO(re.sub(" - [^ ]+ ", " - vfat ", file.read()))

        with patched(os, "open", opened), unittest.mock.patch("builtins.open", mounts):
            with failing(os, "fchmod", error), failing(os, "chmod", error):
                yield

    def assert_made_with_mode(self, change, error, mode, is_new, warnings=0):
        os.chmod(change.path, mode)
        if is_new:
            os.unlink(change.path)
        with self.modes(error, mode):
            for warning in self.assert_made(change, warnings):
                self.assertIn("others can read " + change.path, warning)
        self.assertEqual(mode_of(change.path), oct(mode))

    ERRORS = ("EPERM", "ENOTSUP")

    def test_a_change_is_made_where_nobody_else_can_read_the_file(self):
        for change, *row in self.changes(self.ERRORS, (0o600, 0o700), (True, False)):
            with self.case(change, *row):
                self.assert_made_with_mode(change, *row)

    def test_a_change_of_a_file_that_others_can_read_is_made_and_warned_about(self):
        for change, *row in self.changes(self.ERRORS, (0o604, 0o755), (True, False)):
            with self.case(change, *row):
                self.assert_made_with_mode(change, *row, warnings=1)

    def test_a_file_system_that_cannot_sync_stops_nothing(self):
        for change, error in self.changes(("EINVAL", "ENOTSUP", "ENOSYS")):
            with self.case(change, error), failing(os, "fsync", error):
                self.assert_made(change)

    def test_a_folder_that_cannot_be_opened_to_be_synced_stops_nothing(self):
        for (change,) in self.changes():
            folder = os.path.dirname(change.path)

            def is_synced(path, flags, folder=folder):
                return path == folder and not flags & os.O_DIRECTORY

            with self.case(change), opening_fails(is_synced, errno.EACCES):
                self.assert_made(change)

    def test_one_without_locks_modes_and_syncs_stops_nothing(self):
        for (change,) in self.changes():
            without_locks = failing(fcntl, "flock", "ENOSYS")
            without_sync = failing(os, "fsync", "ENOSYS")
            with self.case(change), without_locks, without_sync:
                with self.modes("ENOSYS", 0o600):
                    self.assert_made(change, 1)

    def test_a_sync_that_fails_stops_a_change(self):
        for change, error in self.changes(("EIO", "ENOSPC", "EDQUOT")):
            with self.case(change, error) as before, failing(os, "fsync", error):
                self.assert_refused(change, change.path, before)


# ========================================================================================
# disk: two accounts and root: nobody's key in, or from, somebody else's file
# ========================================================================================

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
ANN, MALLORY = 54321, 54322  # uids that nobody has
USERS = {"root": 0, "image": 1001, "ann": ANN, "mallory": MALLORY}
ACL = "system.posix_acl_access"
# as the kernel stores it: a tag, permissions and a uid by turns; the owner rw, the user
# MALLORY r, the group nothing, the mask r, others nothing
SHARED_WITH_MALLORY = struct.pack(
    "<I" + 5 * "HHi", 2, 1, 6, -1, 2, 4, MALLORY, 4, 0, -1, 16, 4, -1, 32, 0, -1
)


def split_rows(text):
    return [row.split() for row in text.strip().splitlines()]


class TwoAccounts(DiskCase):
    """Places with files of several users; commands run as any of them."""

    # what a user could not import later: the interpreter may be root's alone
    PRELOADED = "difflib encodings.utf_8_sig getpass pwd shlex traceback"

    def setUp(self):
        if not ROOT:
            self.skipTest("needs root, to be two users")
        super().setUp()
        for module in self.PRELOADED.split():
            importlib.import_module(module)
        self.url = "https://m.example"
        self.with_profile()
        self.store_content = file_bytes(self.store_path).decode()
        os.chmod(self.home, 0o755)

    def make(self, files):
        """A new place with FILES; a row has a path, an owner or owner:group, mode, content.

        A folder ends with a slash; in place of the mode, -> makes a link, = a hard link.
        STORE is the content of a store with a profile.
        """
        self.place = tempfile.mkdtemp(dir=self.home)
        os.chmod(self.place, 0o755)
        self.folder = self.env["LLAMACTL_CONFIG_DIR"] = self.path("conf")
        for name, owner, mode, *words in split_rows(files):
            path, content = self.path(name), " ".join(words)
            user, _, group = owner.partition(":")
            if mode == "->":
                os.symlink(self.path(content), path)
            elif mode == "=":
                os.link(self.path(content), path)
            elif name.endswith("/"):
                os.makedirs(path, exist_ok=True)
            else:
                with open(path, "w") as file:
                    file.write(content.replace("STORE", self.store_content))
            os.lchown(path, USERS[user], USERS[group or user])
            if mode.isdigit():
                os.chmod(path, int(mode, 8))

    def places(self, table):
        """Make one place after the other; a blank line of TABLE ends each."""
        for files in table.split("\n\n"):
            self.make(files)
            yield files

    def path(self, name):
        return os.path.join(self.place, name)

    def listing(self):
        """All that is in the place, in rows; KEY is the content where a key was added."""
        names = {uid: name for name, uid in USERS.items()}
        rows = []
        for path, (_, _, _, content) in tree(self.place).items():
            status = os.lstat(path)
            name = os.path.relpath(path, self.place)
            owner, group = names[status.st_uid], names[status.st_gid]
            text = content or ""
            if content is None:
                name += "/"
            elif isinstance(content, bytes):
                text = content.decode()
            if KEY in text and text != self.store_content:
                text = "KEY"
            if group != owner:
                owner += ":" + group
            mode = f"{stat.S_IMODE(status.st_mode):o}"
            rows.append(f"{name} {owner} {mode} {text}".split())
        return sorted(rows)

    def assert_place(self, rows):
        """All that is in the place is ROWS."""
        self.assertEqual(self.listing(), sorted(split_rows(rows)))

    def call_as(self, uid, command, cwd="", gid=None, **options):
        """The command with the effective ids UID and GID (else the same), no other groups.

        CWD is a folder of the place.
        """
        here, groups = os.getcwd(), os.getgroups()
        os.chdir(self.path(cwd))
        try:
            os.setgroups([])
            os.setegid(uid if gid is None else gid)
            os.seteuid(uid)
            return self.call(command, **options)
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)
            os.chdir(here)

    def done_as(self, uid, command, after, **options):
        """The command succeeds, and AFTER is all that is in the place -> its stderr."""
        result = self.call_as(uid, command, **options)
        self.assertEqual(result.code, 0, result.err)
        self.assert_place(after)
        return result.err

    def refused(self, uid, command, message, **options):
        """The command fails with MESSAGE, and the place is as before -> its stderr."""
        before = self.listing()
        result = self.call_as(uid, command, **options)
        self.assert_one_error(result, 1, message)
        self.assertEqual(self.listing(), before)
        return result.err


class WhoseEnv(TwoAccounts):
    """behaviour.md, .env, "Whose file"."""

    NAMED = "auth inject --env-file d/.env"

    def setUp(self):
        super().setUp()
        self.env.update(LLAMA_CLOUD_API_KEY=KEY, LLAMA_AGENTS_PROJECT_ID="proj-alpha")

    def test_root_writes_a_service_users_file_only_where_it_is_named(self):
        """It stays or becomes that user's, and is said to be."""
        for folder, before, mode in (
            ("d/ mallory 755", "", 600),
            ("d/ mallory 755", "d/.env mallory 600 A=1", 600),
            ("d/ root 755", "d/.env mallory 640 A=1", 640),
        ):
            with self.subTest(folder, before=before):
                self.make(f"{folder}\n{before}")
                message = f"belongs to uid {MALLORY}"
                err = self.refused(0, "auth inject", message, cwd="d")
                self.assertIn(f"auth inject --env-file {self.place}/d/.env\n", err)
                after = f"{folder}\nd/.env mallory {mode} KEY"
                err = self.done_as(0, self.NAMED, after)
                self.assertIn(f"d/.env, owned by uid {MALLORY} written", err)

    def test_root_makes_folders_for_a_service_user(self):
        self.make("d/ mallory 755")
        after = """
            d/             mallory  755
            d/new/         mallory  700
            d/new/app.env  mallory  600  KEY"""
        self.done_as(0, "auth inject --env-file d/new/app.env", after)

    def test_root_writes_no_file_in_a_users_folder_that_is_not_that_users_alone(self):
        for files in self.places("""
            d/        mallory  755
            d/.env    root     644  log

            d/        mallory  755
            d/.env    mallory  644  A=1

            d/        mallory  755
            d/.env    ann      600  A=1

            d/        mallory  755
            d/.env    mallory  600  A=1
            d/x       mallory  =    d/.env

            root.env  root     600  A=1
            d/        mallory  755
            d/.env    mallory  ->   root.env"""):
            with self.subTest(files):
                self.refused(0, self.NAMED, "d/.env")

    def test_root_writes_nothing_that_was_planted_in_a_folder_of_everybody(self):
        """The folder is root's own, and root names the file."""
        for mode in (1777, 777):
            for files in self.places(f"""
                d/      root     {mode}
                d/.env  mallory  600  A=1

                m/      mallory  755
                m/.env  mallory  600  A=1
                d/      root     {mode}
                d/.env  mallory  ->   m/.env

                m/      mallory  755
                m/.env  mallory  600  A=1
                ./      root     {mode}
                d       mallory  ->   m"""):
                with self.subTest(files):
                    self.refused(0, self.NAMED, f"belongs to uid {MALLORY}")

    def test_a_user_writes_no_file_and_follows_no_link_of_another(self):
        for files in self.places("""
            d/                    root     1777
            d/.env                mallory  666   A=1

            d/                    root     1777
            d/.env.llamactl-lock  mallory  666

            d/                    root     1777
            d/.env                mallory  ->    there

            d/                    mallory  777
            d/.env                mallory  666   A=1"""):
            for command in ("auth inject", "auth inject --env-file .env"):
                with self.subTest(files, command=command):
                    err = self.refused(ANN, command, f"belongs to uid {MALLORY}", cwd="d")
                    self.assertIn("hint: llamactl auth inject --env-file -\n", err)

    def test_a_user_writes_only_private_files_in_a_folder_of_others(self):
        for folder in ("d/ root 1777", "d/ mallory 777"):
            for files in (folder, folder + "\nd/.env ann 600 A=1"):
                with self.subTest(files):
                    self.make(files)
                    after = folder + "\nd/.env ann 600 KEY"
                    self.done_as(ANN, "auth inject", after, cwd="d")
        self.make("d/ mallory 777\nd/.env ann 711 A=1")
        self.done_as(ANN, "auth inject", "d/ mallory 777\nd/.env ann 711 KEY", cwd="d")
        self.make("d/ mallory 777\nd/.env ann 644 A=1")
        self.refused(ANN, "auth inject", "others can read .env", cwd="d")

    def test_no_file_of_a_stranger_is_written_in_place(self):
        self.make("d/ ann 555\nd/.env ann 600 A=1")  # the folder takes no new file
        after = "d/ ann 555\nd/.env ann 600 KEY"
        err = self.done_as(ANN, "auth inject", after, cwd="d")
        self.assertIn("in place", err)
        self.make("d/ ann 555\nd/.env root 666 A=1\nd/x root = d/.env")
        self.refused(ANN, "auth inject", "has another hard link", cwd="d")
        self.make("d/ mallory 755\nd/.env ann 600 A=1")
        self.refused(ANN, "auth inject", "Permission denied", cwd="d")

    def test_a_file_put_in_the_place_of_another_is_not_written(self):
        """Mallory may write to the folder, and moves a file there meanwhile."""
        really_lock = llamactl.try_lock

        def lock(descriptor):
            os.rename("README", ".env")
            return really_lock(descriptor)

        self.patch(try_lock=lock)
        for before, other, error in (
            ("d/.env ann 600 A=1", "ann", "others put another file in the place"),
            ("", "ann", "others put another file in the place"),
            ("d/.env ann 644 A=1", "mallory", f"belongs to uid {MALLORY}"),
        ):
            with self.subTest(before, other=other):
                self.make(f"d/ root 777\nd/README {other} 644 text\n{before}")
                result = self.call_as(ANN, "auth inject", cwd="d")
                self.assert_one_error(result, 1, error)
                self.assert_place(f"d/ root 777\nd/.env {other} 644 text")

    def test_a_random_uid_of_group_0_writes_where_that_group_may(self):
        """As OpenShift runs a container, in folders that its image made."""
        folder = "d/ image:root 775\n"
        for before, mode in (("", 600), ("d/.env image:root 660 A=1", 660)):
            with self.subTest(before):
                self.make(folder + before)
                after = f"{folder}d/.env ann:root {mode} KEY"
                err = self.done_as(ANN, "auth inject", after, cwd="d", gid=0)
                self.assertNotIn("warning", err)

    def test_the_group_of_a_file_is_kept(self):
        self.make("d/ root 755\nd/.env root:mallory 640 A=1")
        self.done_as(0, self.NAMED, "d/ root 755\nd/.env root:mallory 640 KEY")

    def test_a_group_that_cannot_be_kept_gives_nobody_access(self):
        for before, after in ((640, 600), (604, 600), (644, 604)):
            with self.subTest(before):
                self.make(f"d/ ann 755\nd/.env ann:mallory {before} A=1")
                self.inject_with_mode(after)

    def make_shared(self, name, *attributes):
        """Ann's .env; NAME, the file or its folder, has the extended ATTRIBUTES."""
        self.make("d/ ann 755\nd/.env ann 600 A=1")
        try:
            for attribute in attributes:
                os.setxattr(self.path(name), attribute, SHARED_WITH_MALLORY)
        except OSError as error:
            self.skipTest(f"no ACL on this file system: {error}")

    def inject_with_mode(self, mode):
        """Written, the file has MODE -> the names of its extended attributes."""
        self.done_as(ANN, "auth inject", f"d/ ann 755\nd/.env ann {mode} KEY", cwd="d")
        return os.listxattr(self.path("d/.env"))

    def test_acl_and_attributes_are_kept(self):
        self.make_shared("d/.env", ACL, "user.note")
        self.inject_with_mode(640)
        for attribute in (ACL, "user.note"):
            value = os.getxattr(self.path("d/.env"), attribute)
            self.assertEqual(value, SHARED_WITH_MALLORY)

    def test_an_acl_that_cannot_be_kept_gives_nobody_access(self):
        really_list = os.listxattr
        for attributes in ((ACL,), (ACL, "user.note")):  # the ACL fails first
            self.make_shared("d/.env", *attributes)
            in_order = patched(os, "listxattr", lambda file: sorted(really_list(file)))
            with self.subTest(attributes), in_order, failing(os, "setxattr", "EPERM"):
                self.assertNotIn(ACL, self.inject_with_mode(600))

    def test_an_acl_that_the_folder_gives_is_not_taken(self):
        self.make_shared("d", "system.posix_acl_default")
        os.chmod(self.path("d/.env"), 0o640)
        self.assertNotIn(ACL, self.inject_with_mode(640))


class WhoseStore(TwoAccounts):
    """behaviour.md, "Whose files"."""

    ADD = f"auth token --no-verify --api-key {KEY} --project proj-alpha"
    BY_ROOT = f"belongs to uid {ANN}; working there as uid {ANN}\n"

    def test_a_strangers_store_is_refused(self):
        """Its folder, its file, its lock, or a link to them: nothing is read or changed."""
        for files in self.places("""
            conf/                    mallory  777
            conf/profiles.json       ann      600   STORE

            conf/                    root     1777
            conf/profiles.json       mallory  666   STORE

            conf/                    ann      777
            conf/profiles.json       mallory  666   {

            conf/                    ann      777
            conf/profiles.json.lock  mallory  666

            profiles.json            ann      600   STORE
            conf/                    root     1777
            conf/profiles.json       mallory  ->    profiles.json

            there/                   ann      700
            conf                     mallory  ->    there"""):
            for command in (
                "auth get",
                "config",
                self.ADD,
                "auth use main",
                "auth logout --all",
                "auth inject --env-file -",
            ):
                with self.subTest(files, command=command):
                    err = self.refused(ANN, command, f"belongs to uid {MALLORY}")
                    self.assertIn("hint: run llamactl as that user, or export", err)
            with self.subTest(files, command="of variables"):
                result = self.call_as(ANN, "config", env=self.of_variables())
                self.assertEqual(result.code, 0, result.err)

    def test_a_store_that_becomes_a_strangers_meanwhile_is_refused(self):
        self.make("conf/ ann 777\nconf/profiles.json mallory 666 STORE")
        with patched(llamactl.Store, "_refuse_strangers"):
            for command in ("auth get", self.ADD):
                with self.subTest(command):
                    self.refused(ANN, command, f"belongs to uid {MALLORY}")

    def test_a_damaged_store_of_roots_is_not_moved_aside_by_a_user(self):
        self.make("""
            conf/                    ann   700
            conf/profiles.json       root  644  {
            conf/profiles.json.lock  ann   600""")
        self.refused(ANN, self.ADD, "not ours to move aside")

    def test_an_official_store_of_a_stranger_is_not_imported(self):
        for files in self.places("""
            conf/                     root     1777
            conf/profiles.db          mallory  600

            conf/                     root     1777
            conf/profiles.db          ann      600
            conf/profiles.db-wal      mallory  644

            conf/                     root     1777
            conf/profiles.db          ann      600
            conf/profiles.db-shm      mallory  644

            conf/                     root     1777
            conf/profiles.db          ann      600
            conf/profiles.db-journal  mallory  644

            conf/                     root     1777
            conf/there                ann      600
            conf/profiles.db          mallory  ->   conf/there

            conf/                     root     1777
            conf/there                mallory  644
            conf/profiles.db          ann      ->   conf/there"""):
            with self.subTest(files):
                command = "auth import --from-official"
                self.refused(ANN, command, f"belongs to uid {MALLORY}")

    def test_root_with_a_users_home_works_as_that_user(self):
        """Who would else be locked out."""
        self.make("ann/ ann 700")
        after = """
            ann/                             ann  700
            ann/new/                         ann  700
            ann/new/conf/                    ann  700
            ann/new/conf/profiles.json       ann  600  KEY
            ann/new/conf/profiles.json.lock  ann  600"""
        env = {"LLAMACTL_CONFIG_DIR": "ann/new/conf"}
        for uid in (0, 0, ANN):
            err = self.done_as(uid, self.ADD, after, env=env)
            warning = f"warning: {self.place}/ann/new/conf {self.BY_ROOT}"
            self.assertEqual(warning in err, uid == 0, err)

    def test_root_follows_a_link_of_its_own_in_a_users_folder(self):
        self.make("""
            there/    ann   700
            ann/      ann   755
            ann/conf  root  ->   there""")
        env = {"LLAMACTL_CONFIG_DIR": "ann/conf"}
        self.assertIn(self.BY_ROOT, self.call_as(0, self.ADD, env=env).err)
        self.assertIn("profiles.json", os.listdir(self.path("there")))

    def test_root_works_as_a_user_in_a_folder_where_only_root_may_go(self):
        self.make("root/ root 700\nroot/conf/ ann 700")
        self.folder = self.env["LLAMACTL_CONFIG_DIR"] = self.path("root/conf")
        self.store_path = os.path.join(self.folder, "profiles.json")
        self.cloud_server()
        self.with_profile()
        os.chown(self.store_path, ANN, ANN)
        after = """
            root/                         root  700
            root/conf/                    ann   700
            root/conf/profiles.json       ann   600  KEY
            root/conf/profiles.json.lock  ann   600"""
        for command in (
            "auth use main",
            f"auth token --api-key {KEY} --project Beta",
            f"environments use {self.url}",
            "auth get",
        ):
            with self.subTest(command):
                self.assertIn(self.BY_ROOT, self.done_as(0, command, after))
        os.chmod(self.store_path, 0o666)
        self.assertIn("others can write to", self.call("auth get").err)
        with open(self.store_path, "w") as file:
            file.write("{")
        result = self.call("environments use", DEFAULT_URL)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn("was damaged; it is kept as", result.err)

    def test_root_follows_no_link_of_a_user_to_another_file(self):
        for files in self.places("""
            profiles.json           root     600  root's
            ann/                    ann      755
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   profiles.json

            profiles.json           root     644  root's
            ann/                    ann      755
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   profiles.json

            profiles.json           root     644  STORE
            ann/                    ann      755
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   profiles.json

            ann/                    ann      755
            ann/profiles.json       root     644  STORE
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   ann/profiles.json

            roots/                  root     755
            ann/                    ann      755
            ann/conf                ann      ->   roots

            anns/                   ann      700
            ann/                    mallory  755
            ann/conf                mallory  ->   anns

            profiles.json           mallory  666  mallory's
            ann/                    ann      755
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   profiles.json"""):
            for command in ("auth get", self.ADD, "auth logout --all"):
                with self.subTest(files, command=command):
                    self.refused(0, command, "", env={"LLAMACTL_CONFIG_DIR": "ann/conf"})

    def test_root_that_cannot_become_the_user_changes_nothing(self):
        self.make("ann/ ann 700")
        before, env = self.listing(), {"LLAMACTL_CONFIG_DIR": self.path("ann/conf")}
        for name in ("setgroups", "setegid", "seteuid"):
            really_set = getattr(os, name)

            def fail(value, really_set=really_set):
                if value in ([], ANN):
                    raise OSError(errno.EPERM, "Operation not permitted")
                really_set(value)

            with self.subTest(name), unittest.mock.patch.object(os, name, fail):
                result = self.call(self.ADD, env=env)
                self.assert_one_error(result, 1, "whom root cannot become")
                self.assertEqual(self.listing(), before)

    def test_root_follows_a_link_of_a_user_to_a_file_of_the_same_user(self):
        self.make("""
            ann/                    ann      700
            ann/dots/               ann      700
            ann/dots/profiles.json  ann      600  STORE
            ann/conf/               ann      700
            ann/conf/profiles.json  ann      ->   ann/dots/profiles.json""")
        result = self.call("auth get", env={"LLAMACTL_CONFIG_DIR": self.path("ann/conf")})
        self.assertEqual(result.code, 0, result.err)
        self.assertIn(self.url, result.out)

    def test_what_is_imported_later_is_there_before_root_becomes_a_user(self):
        """That user may not be able to read Python's own files."""
        with unittest.mock.patch.dict(sys.modules):
            del sys.modules["shlex"]
            with llamactl.acting_as(ANN, self.home, ""):
                self.assertIn("shlex", sys.modules)

    def test_root_gets_its_groups_back(self):
        self.make("ann/ ann 700")
        groups = os.getgroups()
        self.addCleanup(os.setgroups, groups)
        os.setgroups([7])
        self.call(self.ADD, env={"LLAMACTL_CONFIG_DIR": self.path("ann/conf")})
        self.assertEqual((os.getgroups(), os.geteuid(), os.getegid()), ([7], 0, 0))
        self.assertTrue(os.path.exists(self.path("ann/conf/profiles.json")))

    def test_stores_of_root_or_an_image_or_behind_a_link_of_the_user_are_read(self):
        """OpenShift's random uid of group 0; root's; a dotfile manager's; a Secret."""
        openshift = """
            conf/                      image:root  775
            conf/profiles.json         image:root  660  STORE"""
        others = """
            conf/                      root        755
            conf/profiles.json         root        644  STORE

            dotfiles/                  ann         700
            dotfiles/profiles.json     ann         600  STORE
            conf                       ann         ->   dotfiles

            conf/                      root        755
            conf/..2024/               root        755
            conf/..2024/profiles.json  root        644  STORE
            conf/..data                root        ->   conf/..2024
            conf/profiles.json         root        ->   conf/..data/profiles.json"""
        for gid, table in ((0, openshift), (ANN, others)):
            for files in self.places(table):
                for command in ("auth get", "config -o json"):
                    with self.subTest(files, command=command):
                        result = self.call_as(ANN, command, gid=gid)
                        self.assertEqual((result.code, result.err), (0, ""))
                        self.assertIn(self.url, result.out)

    def test_permissions_of_a_group_with_other_members_are_warned_about(self):
        for row in """
            ann          700  ann:mallory  640  read   600
            ann          700  ann:mallory  660  write  600
            ann          700  ann          660
            ann          700  ann:root     640
            ann          700  ann          604  read   600
            ann          700  ann          600
            ann:mallory  770  ann          600  write  go-w
            ann          770  ann          600
            ann:root     770  ann          600
            ann          702  ann          600  write  go-w
            ann         1777  ann          600  write  go-w
            root        1777  ann          600""".strip().splitlines():
            folder, folder_mode, owner, mode, *fix = row.split()
            with self.subTest(row):
                self.make(f"""
                    conf/               {folder}  {folder_mode}
                    conf/profiles.json  {owner}   {mode}  STORE""")
                err = self.call_as(ANN, "auth get").err
                found = re.findall(
                    f"others can (read|write) .*; run: chmod (.*) {self.folder}", err
                )
                self.assertEqual(found, [tuple(fix)] if fix else [])


class StrangerBySeam(DiskCase):
    def test_without_root_files_of_others_are_refused(self):
        """We are somebody else than who made them."""
        if ROOT:
            self.skipTest("root's files are everybody's")
        self.url = "https://m.example"
        self.with_profile()
        path = os.path.join(self.home, ".env")
        with open(path, "w") as file:
            file.write("A=1\n")
        before = tree(self.home)
        stranger = os.geteuid() + 4242
        ids = {"geteuid": lambda: stranger, "getegid": lambda: stranger}
        with unittest.mock.patch.multiple(os, **ids):
            for command, env in (
                ("auth get", {}),
                (f"auth token --no-verify --api-key {KEY} --project p", {}),
                (f"auth inject --env-file {path}", self.of_variables()),
            ):
                with self.subTest(command):
                    self.assert_one_error(self.call(command, env=env), 1, "belongs to")
        self.assertEqual(tree(self.home), before)


# ========================================================================================
# disk: the .env, written
# ========================================================================================


class EnvFile(DiskCase):
    """`auth inject`: what happens to the file."""

    def setUp(self):
        super().setUp()
        self.url = "https://api.example.test"
        self.with_profile()
        self.path = self.at("app.env")
        self.lines = (
            f"LLAMA_CLOUD_API_KEY={KEY}\n"
            f"LLAMA_CLOUD_BASE_URL={self.url}\n"
            "LLAMA_AGENTS_PROJECT_ID=proj-alpha\n"
        ).encode()

    def at(self, name):
        return os.path.join(self.home, name)

    def inject(self, path=None):
        """Done without a word on stdout -> what stderr says."""
        result = self.call("auth inject --env-file", path or self.path)
        self.assertEqual((result.code, result.out), (0, ""), result.err)
        return result.err

    def refused(self, path=None, names="app.env"):
        """An error NAMES something, and every file is as before."""
        before = tree(self.home)
        self.assert_one_error(
            self.call("auth inject --env-file", path or self.path), 1, names
        )
        self.assertEqual(tree(self.home), before)

    def write(self, content=b"A=1\n", mode=0o600, path=None):
        with open(path or self.path, "wb") as file:
            file.write(content)
        os.chmod(file.name, mode)
        os.utime(file.name, ns=(10**18, 10**18))
        return content

    def test_a_lock_that_its_last_holder_removed_is_taken_anew(self):
        lock, still_there, try_lock = self.path + ".llamactl-lock", [], llamactl.try_lock

        def taken(descriptor):
            if not still_there:  # its last holder leaves between our opening and locking
                os.unlink(lock)
            still_there.append(os.path.exists(lock))
            return try_lock(descriptor)

        self.patch(try_lock=taken)
        self.inject()
        self.assertEqual(still_there, [False, True])
        self.assertEqual(file_bytes(self.path), self.lines)
        self.assertFalse(os.path.exists(lock))

    def test_a_new_file_is_private_whatever_the_umask(self):
        for mask in (0o000, 0o022, 0o277):
            with self.subTest(umask=oct(mask)):
                path = self.at(f"{mask}/b c/new.env")
                with umask(mask):
                    self.assertNotIn("warning", self.inject(path))
                self.assertEqual(file_bytes(path), self.lines)
                self.assertEqual(mode_of(path), "0o600")
                self.assertEqual(mode_of(os.path.dirname(path)), "0o700")

    def test_the_mode_is_kept_and_one_that_lets_others_read_is_warned_about(self):
        bits_of_others = 0o066 if has_a_shared_group() else 0o006
        for mode in (0o600, 0o400, 0o700, 0o711, 0o640, 0o644, 0o604, 0o444, 0o666):
            with self.subTest(mode=oct(mode)):
                path = self.at(f"{mode}.env")
                before = self.write(mode=mode, path=path)
                is_warned = f"run: chmod 600 {path}" in self.inject(path)
                self.assertEqual(is_warned, bool(mode & bits_of_others))
                self.assertEqual(mode_of(path), oct(mode))
                self.assertEqual(file_bytes(path), before + self.lines)

    def test_it_is_written_whole_by_a_rename_and_each_other_byte_survives(self):
        before = self.write(b"\xef\xbb\xbfA=\xc3\xa4\x00\x1b\x7f\r\n\r\n# c")
        os.link(self.path, self.at("other.env"))
        self.inject()
        self.assertEqual(file_bytes(self.at("other.env")), before)
        added = b"\r\n" + self.lines.strip().replace(b"\n", b"\r\n")
        self.assertEqual(file_bytes(self.path), before + added)
        self.assertEqual(sorted(os.listdir(self.home)), ["app.env", "conf", "other.env"])

    def test_the_lock_file_is_removed_once_the_next_may_be_another_s(self):
        with unittest.mock.patch("llamactl.remove_lock") as remove:
            self.inject()
        self.assertEqual(remove.call_count, 1)

    def test_where_nothing_changes_nothing_is_touched(self):
        path = self.at("folder/app.env")
        self.inject(path)
        os.utime(path, ns=(10**18, 10**18))
        before = tree(self.home), os.stat(path).st_ctime_ns
        self.inject(path)
        self.assertEqual((tree(self.home), os.stat(path).st_ctime_ns), before)

    def test_links_are_followed_named_and_kept(self):
        target, middle = self.at("real/target.env"), self.at("middle.env")
        os.symlink("middle.env", self.path)
        os.symlink("real/target.env", middle)
        for case in ("no folder", "a file"):
            with self.subTest(case):
                before = self.write(path=target) if case == "a file" else b""
                label = f"{self.path} (a link to {target}) written"
                self.assertIn(label, self.inject())
                self.assertEqual(file_bytes(target), before + self.lines)
                self.assertEqual(mode_of(target), "0o600")
        self.assertEqual(os.readlink(self.path), "middle.env")
        self.assertEqual(os.readlink(middle), "real/target.env")
        self.assertEqual(os.listdir(self.at("real")), ["target.env"])

    def test_as_many_links_are_followed_as_linux_follows(self):
        for number in range(41):
            os.symlink(self.path, self.at(f"{number}.env"))
            self.path = self.at(f"{number}.env")
        self.assertIn("app.env) written", self.inject(self.at("39.env")))
        self.refused(self.at("40.env"), "40.env")

    def test_what_is_no_regular_file_is_refused(self):
        # never a device of the system here: run as root, a broken program would replace it
        self.write()
        os.mkdir(self.at("folder.env"))
        os.symlink("loop.env", self.at("loop.env"))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.at("door.env"))
        for name in ("folder.env", "loop.env", "door.env", "app.env/x.env"):
            with self.subTest(name):
                self.refused(self.at(name), name)
        self.refused("\ud800.env", "cannot be written")

    def test_a_fifo_is_refused_and_not_waited_for(self):
        os.mkfifo(self.path)
        result = self.process("auth inject --env-file", self.path, timeout=10)
        self.assert_one_error(result, 1, "app.env")
        self.assertTrue(stat.S_ISFIFO(os.stat(self.path).st_mode))

    def test_what_is_not_utf_8_is_refused(self):
        for content in (b"A=\xff\n", b"\xff\xfeA\0=\0", b"A=\xed\xa0\x80\n", b"A=1\n\xc3"):
            with self.subTest(content):
                self.write(content)
                self.refused(names="app.env is not UTF-8")

    def test_in_place_only_where_a_rename_cannot_be(self):
        for error in ("EBUSY", "EXDEV"):
            with self.subTest(error), failing(os, "replace", error):
                # longer than what replaces it: nothing of it may stick out behind
                self.write(b"LLAMA_CLOUD_API_KEY='" + b"long" * 99 + b"'\n", 0o640)
                inode = os.stat(self.path).st_ino
                self.assertRegex(self.inject(), "warning: .*app.env.*crash")
                self.assertEqual(file_bytes(self.path), self.lines)
                self.assertEqual(os.stat(self.path).st_ino, inode)
                self.assertEqual(mode_of(self.path), "0o640")
                self.assertEqual(sorted(os.listdir(self.home)), ["app.env", "conf"])
        self.write()
        with failing(os, "replace", "ENOSPC"):
            self.refused()

    def test_one_written_in_place_that_others_can_read_is_warned_about(self):
        for mode, is_warned in ((0o604, True), (0o711, False)):
            with self.subTest(mode=oct(mode)):
                self.write(mode=mode)
                with opening_fails(lambda path, _: "-lock" in path, errno.EACCES):
                    err = self.inject()
                self.assertIn("crash", err)
                self.assertEqual("run: chmod 600" in err, is_warned)

    def test_nothing_is_written_in_place_of_what_was_replaced_or_is_new(self):
        def replace(*_, **__):
            os.rename(other, self.path)
            raise OSError(errno.EBUSY, "Device or resource busy")

        with failing(os, "replace", "EBUSY"):
            self.refused(names="busy")
        self.write()
        other = self.at("other.env")
        content = self.write(b"OTHERS=1\n", path=other)
        with patched(os, "replace", replace):
            result = self.call("auth inject --env-file", self.path)
        self.assert_one_error(result, 1, "app.env was replaced during the update")
        self.assertEqual(file_bytes(self.path), content)

    def test_a_full_disk_tears_nothing_that_is_written_in_place(self):
        line = b"LLAMA_CLOUD_API_KEY=x\n"  # what is longer moves all that follows
        before = self.write(line + b"# mine\n" * 30)
        inode = os.stat(self.path).st_ino
        growth = len(self.lines) - len(line)
        for room in (0, 1, growth // 2, growth - 1):
            with self.subTest(room=room), contextlib.ExitStack() as stack:
                lock_fails = opening_fails(
                    lambda path, _: path.endswith("-lock"), errno.EACCES
                )
                stack.enter_context(lock_fails)
                stack.enter_context(file_size_limit(len(before) + room))
                result = self.call("auth inject --env-file", self.path)
                self.assertEqual(result.code, 1)
                self.assertRegex(result.err, "warning: .*crash.*\nerror: .*app.env")
                self.assertEqual(file_bytes(self.path), before)
                self.assertEqual(os.stat(self.path).st_ino, inode)
        with opening_fails(is_for_writing, errno.EROFS):
            result = self.call("auth inject --env-file", self.path)
        self.assertNotIn("crash", result.err)

    def test_who_cannot_read_the_quotes_that_a_value_needs_is_named(self):
        self.with_profile(key="llx-CANARY-${A}-0123")
        readers = "docker --env-file and python-dotenv and Next.js and Vite"
        warning = f"warning: LLAMA_CLOUD_API_KEY needs quotes, which {readers} cannot read"
        self.assertEqual(self.inject(), f"{warning}\n{self.path} written\n")


# ========================================================================================
# disk: Windows, by simulation
# ========================================================================================


class MacOs(CommandCase):
    def test_a_change_reaches_the_drive(self):
        self.patch(MACOS=True)
        refusal = OSError(errno.ENOTTY, "no such thing on this file system")
        with unittest.mock.patch.object(fcntl, "fcntl", side_effect=refusal) as control:
            self.done(f"auth token --api-key {KEY} --project proj-alpha")
        self.assertEqual({call[0][1] for call in control.call_args_list}, {51})


class OtherSystems(CommandCase):
    """The branches for Windows, walked here by simulation."""

    def setUp(self):
        super().setUp()
        self.patch(WINDOWS=True, LOCK_PAUSE=0.0)
        interrupt = signal.getsignal(signal.SIGINT)
        self.addCleanup(signal.signal, signal.SIGINT, interrupt)

    @contextlib.contextmanager
    def locking(self, outcomes):
        """The one module for locks is msvcrt; yields its function, which has OUTCOMES."""
        function = unittest.mock.Mock(side_effect=outcomes)
        msvcrt = types.SimpleNamespace(locking=function, LK_NBLCK=2)
        modules = {"fcntl": None, "msvcrt": msvcrt}
        with unittest.mock.patch.dict(sys.modules, modules):
            yield function

    def test_exec_waits_and_passes_the_code_on(self):
        self.with_profile()
        for outcome, code in (
            ([9], 9),
            ([0xC000013A], 0xC000013A - 2**32),  # what a Ctrl-C ends a program with
            (FileNotFoundError, 127),
            (PermissionError, 126),
        ):
            with unittest.mock.patch.object(
                subprocess, "call", side_effect=outcome
            ) as call:
                self.assertEqual(self.call("auth exec -- tool -x").code, code)
            self.assertEqual(call.call_args[0][0], ["tool", "-x"])
            self.assertIs(signal.getsignal(signal.SIGINT), signal.SIG_IGN)
            self.assertEqual(call.call_args[1]["env"]["LLAMA_CLOUD_API_KEY"], KEY)

    def test_how_its_shell_unsets_a_variable(self):
        env = {"LLAMACTL_PROFILE": "nobody"}
        err = self.call("projects get", env=env).err
        self.assertIn("hint: set LLAMACTL_PROFILE=\n", err)

    def test_a_pipe_that_closed_is_told_from_a_disk_that_is_full(self):
        for number, code in ((errno.EINVAL, 0), (errno.ENOSPC, 1)):
            stdout = unittest.mock.Mock()
            stdout.buffer.write.side_effect = OSError(number, "so Windows says")
            stderr = io.StringIO()
            abandon = patched(llamactl.Terminal, "abandon")
            redirected = contextlib.redirect_stderr(stderr)
            with abandon, redirected, patched(sys, "stdout", stdout):
                self.assertEqual(llamactl.main(["--version"]), code)
            self.assertEqual("so Windows says" in stderr.getvalue(), bool(code))

    def test_a_reader_holds_up_a_rename_but_for_a_moment(self):
        self.with_profile()
        replace, refusals = os.replace, [PermissionError(), PermissionError()]

        def stubborn(source, target, **folders):
            if refusals:
                raise refusals.pop()
            replace(source, target, **folders)

        with patched(os, "replace", stubborn), patched(time, "sleep") as sleep:
            self.done("auth logout main")
        self.assertEqual(sleep.call_count, 2)
        self.assertEqual((self.profiles(), refusals), ({}, []))

    def test_a_reader_that_stays_is_waited_for_in_vain(self):
        self.patch(RENAME_TIMEOUT=0.05)
        refused = PermissionError(errno.EACCES, "it is open")
        with patched(os, "replace", side_effect=refused):
            self.assertEqual(self.call("environments add https://a.example").code, 1)

    def test_elsewhere_a_refused_rename_is_not_waited_out(self):
        self.patch(WINDOWS=False, RENAME_TIMEOUT=0.2)
        self.with_profile()
        with unittest.mock.patch.object(
            os, "replace", side_effect=PermissionError(errno.EPERM, "no")
        ) as replace:
            self.assertEqual(self.call("environments add https://a.example").code, 1)
        self.assertEqual(replace.call_count, 1)

    def test_the_store_needs_nothing_of_posix(self):
        """No fcntl, no owners, no modes on descriptors, no folder that could be fsynced."""
        for name in "geteuid getuid fchmod fchown statvfs uname".split():
            patcher = unittest.mock.patch.object(os, name)
            patcher.start()
            self.addCleanup(patcher.stop)
            delattr(os, name)
        busy = [OSError(errno.EDEADLK, "busy"), OSError(errno.EACCES, "busy")]
        with self.locking(itertools.chain(busy, itertools.repeat(None))) as locking:
            self.done(f"auth token --api-key {KEY} --project proj-alpha")
            self.done("auth inject --env-file", os.path.join(self.home, "win.env"))
        self.assertEqual(glob.glob(os.path.join(self.home, "win.env?*")), [])
        self.assertEqual(list(self.profiles()), ["llx-wxyz"])
        self.assertGreater(locking.call_count, 3)
        self.assertEqual({call[0][1:] for call in locking.call_args_list}, {(2, 1)})

    def test_it_needs_no_flag_that_a_system_may_lack(self):
        names = "O_PATH O_DIRECTORY O_NOFOLLOW O_NONBLOCK"
        script = f"import os\nfor name in {names!r}.split(): vars(os).pop(name, None)\n"
        python = ("-c", f"{script}{AS_MAIN}sys.exit(status)")
        command = f"auth token --api-key {KEY} --project proj-alpha"
        for words in (command, "auth use llx-wxyz"):
            self.expect(self.process(words, python=python), 0, "", "llx-wxyz is current")
        self.assertEqual(list(self.profiles()), ["llx-wxyz"])

    def test_a_lock_that_a_live_process_holds_is_named(self):
        self.patch(LOCK_TIMEOUT=0.05)
        with self.locking(OSError(errno.EACCES, "busy")):
            self.expect_failure(self.call("auth use x"), 1, "profiles.json")


# ========================================================================================
# store: a store that is not as it should be
# ========================================================================================


class StoreCase(DiskCase):
    """Files and commands, with a stand-in."""

    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()


class OddStoreTest(StoreCase):
    def setUp(self):
        super().setUp()
        self.with_profile()

    def unlocked_tree(self):
        """The tree without locks, which writers may make, and so without times."""
        return {
            path: (mode, inode, content)
            for path, (mode, inode, _, content) in tree(self.home).items()
            if not path.endswith(".lock")
        }

    def assert_refused(self, commands, path):
        """COMMANDS exit 1 in one line that names PATH, and touch nothing."""
        before = self.unlocked_tree()
        for command in commands:
            with self.subTest(command):
                self.assert_one_error(self.call(*command), 1, path)
                self.assertEqual(self.unlocked_tree(), before)

    def assert_nobody_uses(self, path):
        """Neither readers nor writers do; the variables' credential works."""
        self.assert_refused(self.OFFLINE_READERS + self.WRITERS, path)
        self.done("projects get", env=self.of_variables())
        self.assertEqual(self.requests(), [("GET", LIST_PROJECTS)])
        self.cloud.reset()

    def test_a_folder_in_its_place(self):
        os.unlink(self.store_path)
        os.mkdir(self.store_path)
        self.assert_nobody_uses(self.store_path)

    def test_a_link_to_itself(self):
        os.unlink(self.store_path)
        os.symlink("profiles.json", self.store_path)
        self.assert_nobody_uses(self.store_path)

    def test_a_fifo_hangs_nobody(self):
        os.unlink(self.store_path)
        os.mkfifo(self.store_path, 0o600)
        for command in (("auth", "get"), self.ALWAYS_WRITERS[0]):
            # first whole processes, which a time limit can end
            self.assert_one_error(self.process(*command, timeout=20), 1, self.store_path)
        self.assert_nobody_uses(self.store_path)

    def test_a_file_in_place_of_the_folder(self):
        shutil.rmtree(self.folder)
        shutil.copy(PROGRAM, self.folder)
        self.assert_nobody_uses(self.folder)

    def test_an_unreadable_file(self):
        def is_store(path, flags):
            return path == self.store_path

        for number in (errno.EACCES, errno.EIO, errno.EPERM):
            with self.subTest(errno.errorcode[number]), opening_fails(is_store, number):
                self.assert_nobody_uses(self.store_path)

    def test_a_newer_version(self):
        for newer in (
            b'{"version": 2}',
            b'{"version": 99, "profiles": [], "environments": 7}',
        ):
            with self.subTest(newer):
                self.put(newer)
                self.assert_nobody_uses(self.store_path)

    def test_a_link_is_followed_and_kept(self):
        profile = file_bytes(self.store_path)
        for target, content in (
            ("real/profiles.json", profile),
            ("real/profiles.json", None),
            ("missing/profiles.json", None),
        ):
            for start in ("", self.folder + "/"):
                with self.subTest(target=start + target, content=content):
                    shutil.rmtree(self.folder)
                    os.makedirs(self.folder + "/real")
                    os.symlink(start + target, self.store_path)
                    if content:
                        self.put(content)
                    count = len(self.rows("auth get"))
                    self.assertEqual(count, int(bool(content)))
                    self.done(*self.ALWAYS_WRITERS[0])
                    self.assertEqual(len(self.rows("auth get --all")), count + 1)
                    self.assertTrue(os.path.islink(self.store_path))
                    self.assertEqual(mode_of(self.store_path), "0o600")
                    self.assertNotIn("profiles.json.new", self.files())

    def test_what_a_crash_left_is_overwritten_and_removed(self):
        victim = os.path.join(self.home, "victim")
        for leave in (os.symlink, shutil.copy):
            with open(victim, "w") as file:
                file.write("not ours")
            for command in self.WRITERS:
                with self.subTest(leave=leave, command=command):
                    self.with_profile()
                    leave(victim, self.store_path + ".new")
                    with open(self.store_path + ".lock", "w") as file:
                        file.write("12345\n")
                    self.done(*command)
                    self.assertEqual(self.files(), STORE_FILES)
                    self.assertEqual(file_bytes(victim), b"not ours")
                    self.assertFalse(os.path.islink(self.store_path))

    def test_a_lock_that_cannot_be_had_stops_writers_alone(self):
        """Held by another process, or no file."""
        lock = self.store_path + ".lock"
        self.assertEqual(llamactl.LOCK_TIMEOUT, 10)
        self.patch(LOCK_TIMEOUT=0.0)
        with locked(lock):
            self.assert_refused(self.WRITERS, lock)
            for command in self.READERS:
                self.done(*command)
        os.unlink(lock)
        os.mkdir(lock)
        self.assert_refused(self.WRITERS, self.store_path)
        self.done("auth get")

    def test_a_lock_that_is_a_hard_link_keeps_its_mode(self):
        other = write_file(os.path.join(self.home, "other"), b"", 0o644)
        os.link(other, self.store_path + ".lock")
        self.done("auth use main")
        self.assertEqual(mode_of(other), "0o644")
        os.unlink(other)
        self.done("auth use main")
        self.assertEqual(mode_of(self.store_path + ".lock"), "0o600")

    def test_a_lock_that_is_let_go_is_waited_for(self):
        with locked(self.store_path + ".lock") as let_go:
            with unittest.mock.patch.object(llamactl.time, "sleep") as pause:
                pause.side_effect = lambda seconds: let_go()
                self.done("auth logout main")
        self.assertEqual((pause.call_count, self.profiles()), (1, {}))


class DamagedStoreTest(StoreCase):
    # every member that there may be, but no provider: a login would ask it for ever
    WHOLE = b"""{"version": 1, "current_environment": "http://127.0.0.1:1",
 "environments": {"http://127.0.0.1:1": {
  "requires_auth": true, "min_llamactl_version": null, "current_profile": "main",
  "profiles": {
   "main": {"auth_type": "token", "api_key": "llx-CANARY-0123456789abcdef-wxyz",
    "project_id": "proj-alpha", "project_name": "Alpha", "org_id": "org-one"},
   "me": {"auth_type": "oidc", "api_key": "llx-CANARY-fedcba9876543210-abcd",
    "project_id": "proj-alpha", "project_name": "Alpha", "org_id": "org-one",
    "api_key_id": "key-1", "sub": "user-1", "issuer": "http://127.0.0.1:1",
    "email": "dev@example.com", "access_token": "at-CANARY-0123456789",
    "access_expires_at": 1.5, "refresh_token": "rt-CANARY-0123456789"},
   "open": {"auth_type": "none", "api_key": null, "project_id": "proj-alpha"}},
  "login": {"verification_uri": "http://127.0.0.1:1",
   "verification_uri_complete": null, "user_code": "ABCD-EFGH",
   "expires_at": 4102444800, "interval": 5.0, "device_code": "dc-CANARY-0123456789"}
}}}"""
    DEEP = b"[" * 100000 + b"]" * 100000
    DAMAGES = (
        b"",
        b" ",
        b"\n",
        b"\0" * 64,
        *b'null [] 7 "text" {} { } no-JSON'.split(),
        b"\xff\xfe" + WHOLE,
        WHOLE.replace(b"Alpha", b"\xff\x80"),
        WHOLE.decode().encode("utf-16"),
        WHOLE + b"}",
        WHOLE * 2,
        WHOLE.replace(b'"version": 1', b'"version": "1"'),
        WHOLE.replace(b'"version": 1', b'"version": true'),
        WHOLE.replace(b'"version": 1', b'"version": null'),
        WHOLE.replace(b'"version": 1,', b""),
        WHOLE.replace(b'"access_expires_at": 1.5', b'"provider": {}'),
        DEEP,
        b'{"version": 1, "environments": ' + DEEP,
    )
    UNWRITABLE = (  # numbers that can be read, but not written again
        WHOLE.replace(b"4102444800", b"1e999"),
        WHOLE[:-1] + b', "x": [-1e999]}',
    )
    WRONG = (None, True, float("inf"), "\ud800", [1], {"a": {"b": 1}}, 10**400)

    def test_a_link_that_is_replaced_while_it_is_followed_is_refused(self):
        self.with_profile()
        os.rename(self.store_path, self.store_path + ".real")
        os.symlink("profiles.json.real", self.store_path)
        readlink = os.readlink

        def replaced(path, **options):
            target = readlink(path, **options)
            os.symlink("elsewhere", self.store_path + ".next")
            os.replace(self.store_path + ".next", self.store_path)
            return target

        with patched(os, "readlink", replaced):
            self.assert_one_error(self.call("auth get"), 1, self.store_path)

    def test_readers_name_it_and_touch_nothing(self):
        for damage in self.DAMAGES:
            self.put(damage, 0o644)
            before = tree(self.home)
            for command in self.OFFLINE_READERS:
                with self.subTest(damage=damage[:60], command=command):
                    self.assert_one_error(self.call(*command), 1, self.store_path)
            self.assertEqual(tree(self.home), before)

    def test_a_writer_sets_it_aside_warns_and_goes_on(self):
        for damage in self.DAMAGES + self.UNWRITABLE:
            for command in self.ALWAYS_WRITERS:
                with self.subTest(damage=damage[:60], command=command):
                    shutil.rmtree(self.folder)
                    self.put(damage, 0o644)
                    result = self.done(*command)
                    (name,) = set(self.files()) - set(STORE_FILES)
                    self.assertRegex(name, r"^profiles\.json\.damaged-")
                    copy = os.path.join(self.folder, name)
                    self.assertEqual((file_bytes(copy), mode_of(copy)), (damage, "0o600"))
                    told = [copy in warning for warning in self.warnings_of(result)]
                    self.assertEqual(told.count(True), 1, result.err)
                    self.done("auth get")

    def test_no_damaged_copy_replaces_another(self):
        damages = {b"first", b"second", b"third"}
        for damage in damages:
            self.put(damage)
            self.done(*self.ALWAYS_WRITERS[1])
        contents = {file_bytes(os.path.join(self.folder, name)) for name in self.files()}
        self.assertLess(damages, contents)

    def test_cut_off_after_every_byte(self):
        store = llamactl.Store(self.folder, self.fail)
        self.put(self.WHOLE)
        self.assertEqual(store.load(), load(self.WHOLE.decode()))
        for size in reversed(range(len(self.WHOLE))):
            os.truncate(self.store_path, size)
            with self.assertRaisesRegex(llamactl.Failure, re.escape(self.store_path)):
                store.load()

    def variants(self, value):
        """VALUE with each of its members in turn missing and as each other type."""
        for name, item in value.items():
            yield name, {other: value[other] for other in value if other != name}
            changed = list(self.variants(item)) if isinstance(item, dict) else []
            for place, new in changed + [("", wrong) for wrong in self.WRONG]:
                yield f"{name}/{place}", dict(value, **{name: new})

    def test_wrong_types_everywhere_are_damage_or_do_no_harm(self):
        writers = (("auth login --resume",), ("auth use me",), ("auth logout me",))
        refused, accepted = [], []
        for place, data in self.variants(load(self.WHOLE.decode())):
            content = json.dumps(data).encode()
            self.put(content)
            try:
                llamactl.Store(self.folder, self.fail).load()
            except llamactl.Failure as failure:
                self.assertIn(self.store_path, failure.message)
                refused.append(place)
                continue
            accepted.append(place)
            for command in self.OFFLINE_READERS + writers:
                with self.subTest(place=place, command=command):
                    if command in writers:
                        self.put(content)
                    result = self.call(*command, sings="inject" in command)
                    self.assertIn(result.code, (0, 1, 2, 4, 5), result)
        self.assertGreater(len(refused), 50)
        self.assertGreater(len(accepted), 10)

    def test_deep_nesting_in_a_member_of_no_meaning(self):
        """The next change keeps it, or sets the file aside."""
        for depth in (300, 900, 990, 5000, 20000):
            with self.subTest(depth):
                nested = b"[" * depth + b"]" * depth
                self.put(self.WHOLE[:-1] + b', "x": ' + nested + b"}")
                self.assertIn(self.call("auth get").code, (0, 1))
                self.done(*self.ALWAYS_WRITERS[0])
                self.done("auth get")


# ========================================================================================
# store: crowds
# ========================================================================================

# Becomes a process for each command line, lets all go at once, and tells their exit codes.
CROWD = """
import json, os, sys
_, program, _, *commands = sys.argv
sys.path.insert(0, os.path.dirname(program))
import llamactl
gate, opener = os.pipe()
children = []
for command in commands:
    children.append(os.fork())
    if children[-1] == 0:
        os.close(opener)
        os.read(gate, 1)
        os._exit(llamactl.main(command.split()))
os.close(opener)
statuses = [os.waitpid(child, 0)[1] for child in children]
print(json.dumps([status >> 8 or status for status in statuses]))
"""


class CrowdTest(StoreCase):
    def crowd(self, commands):
        process = self.spawn(
            "crowd", *commands, python=("-c", CROWD), stdin=subprocess.DEVNULL
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def finish(self, process):
        """The exit codes of a crowd, and all that it said."""
        result = self.note(0, *process.communicate())
        return load(result.out), result.err

    def test_32_processes_at_once_lose_nothing_while_readers_read(self):
        keys = [f"llx-CANARY-0123456789abcdef-{number:04}" for number in range(32)]
        token = "auth token --no-verify --project p --api-key "
        process = self.crowd([token + key for key in keys])
        store, seen, readings = llamactl.Store(self.folder, self.fail), 0, 0
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.002)  # the writers need the CPUs too
            count = len(self.profiles())  # as any other program would read it
            now = len(store.load()["environments"][self.url]["profiles"])
            self.assertLessEqual(seen, count)
            self.assertLessEqual(count, now)
            seen, readings = now, readings + 1
        codes, told = self.finish(process)
        self.assertEqual(codes, [0] * 32, told)
        self.assertGreater(readings, 10)
        self.assertEqual(
            {name: profile["api_key"] for name, profile in self.profiles().items()},
            {"llx-" + key[-4:]: key for key in keys},
        )
        self.assertEqual(self.files(), STORE_FILES)

    def test_eight_logouts_of_one_login_refresh_it_once(self):
        login = self.log_in()
        codes, told = self.finish(self.crowd(["auth logout dev@example.com"] * 8))
        # who comes when it is gone is told so
        late = told.count(f"error: {self.url} has no profile dev@example.com")
        self.assertEqual(sorted(codes), [0] * (8 - late) + [1] * late, told)
        self.assertLess(late, 8)
        self.assertEqual((self.cloud.refreshes, self.cloud.reuse_detected), (1, 0))
        self.assertNotIn(login["api_key"], self.cloud.keys_alive())
        self.assertTrue(self.cloud.logins[0]["revoked"])
        self.assert_nowhere(CANARY)

    def test_everyday_use_of_an_expired_login_refreshes_nothing(self):
        login = self.log_in()
        self.cloud.reset()
        for command in ("auth status", "projects get", "deployments get"):
            self.done(command)
        self.assertEqual(bearers(self.cloud.requests), {login["api_key"]})
        self.assertEqual(self.cloud.refreshes, 0)
        self.assertEqual(self.profiles(), {"dev@example.com": login})


# ========================================================================================
# store: what a logout leaves
# ========================================================================================


class LeakTest(StoreCase):
    OTHER = "https://other.example.com"

    def leave_over(self, name):
        path = os.path.join(self.folder, name)
        shutil.copy(self.store_path, path)
        return path

    def start(self, is_login):
        """A login or a key, what a crash left of it, and a profile elsewhere."""
        self.write_store({})
        self.done(f"environments add {self.OTHER} --no-verify")
        self.done("auth token --no-verify --api-key elsewhere --project p --name there")
        self.done("environments use " + self.url)
        if is_login:
            self.log_in()
        else:
            self.done(f"auth token --no-verify --api-key {KEY} --project p")
        self.leave_over("profiles.json.new")

    def test_nothing_of_a_profile_is_left(self):
        """Only a login's needs the network; what is elsewhere stays, unless all goes."""
        for is_login in (False, True):
            name = "dev@example.com" if is_login else "llx-wxyz"
            for command, left in (
                ("auth logout " + name, ["there"]),
                ("auth logout --all", []),
                ("environments delete " + self.url, ["there"]),
            ):
                with self.subTest(command, is_login=is_login):
                    self.start(is_login)
                    self.cloud.reset()
                    self.done(command)
                    self.assert_nowhere(CANARY)
                    self.assertEqual(list(self.profiles(self.OTHER)), left)
                    self.assertEqual(bool(self.requests()), is_login)
                    self.assertEqual(self.cloud.keys_alive(), [KEY])
                    revoked = [login["revoked"] for login in self.cloud.logins]
                    self.assertNotIn(False, revoked)

    def test_nothing_of_a_login_is_left_when_the_server_fails(self):
        for kind in ("reset", "status", "garbage"):
            with self.subTest(kind):
                self.write_store({})
                key_id = self.log_in(expired=kind == "status")["api_key_id"]
                path = "/api/v1/api-keys/" + key_id
                self.cloud.reset()
                self.cloud.fault(path, kind, times=9)
                result = self.call("auth logout dev@example.com --quiet")
                self.assert_one_error(result, 1, key_id)
                self.assertEqual(self.cloud.count("DELETE", path), 1)
                self.assert_nowhere(CANARY)

    def test_a_damaged_copy_that_remains_is_named(self):
        self.with_profile()
        copy = self.leave_over("profiles.json.damaged-20200101T000000Z")
        before = file_bytes(copy)
        for command in ("auth logout main", "auth logout --all"):
            warnings = self.warnings_of(self.done(command))
            self.assertEqual([copy in warning for warning in warnings], [True])
        self.assertEqual(file_bytes(copy), before)
        link = os.path.join(self.home, "link")
        os.symlink(self.folder, link)
        env = {"LLAMACTL_CONFIG_DIR": link}  # what is told is where it really is
        warnings = self.warnings_of(self.call("auth logout --all", env=env))
        self.assertEqual([copy in warning for warning in warnings], [True])
        with unittest.mock.patch.object(os, "listdir", side_effect=PermissionError):
            warnings = self.warnings_of(self.done("auth logout --all"))
        self.assertIn(self.folder + " ", "".join(warnings))

    def test_a_browser_gets_no_secret_on_its_command_line(self):
        browser = os.path.join(self.home, "browser")
        with open(browser, "w") as file:
            file.write('#!/bin/sh\necho "$@" > "$0.arguments"; env > "$0.variables"\n')
        os.chmod(browser, 0o700)
        self.env.update(DISPLAY=":9", BROWSER=browser + " %s")
        result = self.process("auth login --project proj-alpha")
        self.assertEqual(result.code, 0, result.err)
        arguments = file_bytes(browser + ".arguments").decode()
        self.assertIn(self.url + "/oidc/device?user_code=", arguments)
        # that no secret is in what the browser saw is checked at the end of every test


# ========================================================================================
# store: profiles, their names, and which one is current
# ========================================================================================


class ProfilesTest(StoreCase):
    def current(self, url=None):
        return self.stored()[url or self.url]["current_profile"]

    def token(self, key, project="proj-alpha", *more):
        self.done(f"auth token --no-verify --api-key {key} --project {project}", *more)
        return self.current()

    def test_the_file_is_indented_for_people(self):
        self.token(KEY)
        text = self.store_text()
        self.assertEqual(text, json.dumps(json.loads(text), indent=1) + "\n")

    def test_names_of_keys_are_safe_and_show_four_characters_at_most(self):
        for row in r"""
            llx-CANARY-0123456789abcdef-wxyz  llx-wxyz
            llx-CANARY-0123456789$(a)         llx-a
            llx-CANARY-ab\`c                  llx-bc
            llx-CANARY-0123456789';*&         llx-key
            llx-CANARY-0123456789-~~~         llx-key
            abcdefghijkl                      llx-ijkl
            abcdefghijk                       llx-key
            x                                 llx-key
        """.strip().splitlines():
            key, name = row.split()
            with self.subTest(key):
                self.write_store({})
                self.assertEqual(self.token(key), name)

    def test_taken_names_and_the_same_key_again(self):
        twin = "llx-CANARY-another-key-wxyz"
        for key, project, name in (
            (KEY, "proj-alpha", "llx-wxyz"),
            (twin, "proj-alpha", "llx-wxyz-2"),
            (KEY, "proj-alpha", "llx-wxyz"),
            (KEY, "proj-beta", "llx-wxyz-3"),
            (twin, "proj-alpha", "llx-wxyz-2"),
        ):
            self.assertEqual(self.token(key, project), name)
        self.assertEqual(len(self.profiles()), 3)

    def test_a_login_is_named_after_its_user(self):
        rows = (
            ("user-1", "dev@example.com", "dev@example.com"),
            ("user-2", "dev@example.com", "dev@example.com-2"),
            ("user-1", "dev@example.com", "dev@example.com"),
            ("user-3", "dev.ops+ci@example.com", "dev.ops+ci@example.com"),
            ("user-4", None, "user-4"),
            ("user-5", "", "user-5"),
            ("auth0|7 'x", "o'neil;rm -rf@example.com", "o-neil-rm--rf@example.com"),
            ("; $(x)", None, "x"),
            ("\u0436", None, "login"),
            ("--all", None, "all"),
        )
        for sub, email, name in rows:
            with self.subTest(sub=sub, email=email):
                self.cloud.auto_approve = {"sub": sub, "email": email}
                self.done("auth login --project proj-alpha")
                self.assertEqual(self.current(), name)
        self.assertEqual(
            {(profile["sub"], name) for name, profile in self.profiles().items()},
            {(sub, name) for sub, _, name in rows},
        )

    def test_a_chosen_name_replaces_a_key_but_no_login(self):
        self.token(KEY, "proj-alpha", "--name", "ci")
        self.assertEqual(self.token(OTHER_KEY, "proj-beta", "--name", "ci"), "ci")
        (profile,) = self.profiles().values()
        self.assertEqual(
            (profile["api_key"], profile["project_id"]), (OTHER_KEY, "proj-beta")
        )
        self.assert_nowhere(KEY)
        self.log_in()
        before = file_bytes(self.store_path)
        self.cloud.reset()
        token = f"auth token --api-key {KEY} --project proj-alpha --name dev@example.com"
        self.assert_one_error(self.call(token), 1, "dev@example.com")
        self.assertEqual((self.requests(), file_bytes(self.store_path)), ([], before))

    def test_the_current_profile_is_one_for_each_environment(self):
        self.token(KEY, "proj-alpha", "--name", "here")
        other = "https://other.example.com"
        self.done(f"environments add {other} --no-verify")
        self.done("auth token --no-verify --api-key elsewhere --project p --name there")
        self.assertEqual(self.rows("config")["profile"], "there")
        self.done("environments use " + self.url)
        self.assertEqual(self.rows("config")["profile"], "here")
        self.done("auth logout here")
        self.assertEqual((self.current(), self.current(other)), (None, "there"))

    def test_logging_out_of_one_of_thousands_keeps_the_others_and_the_selection(self):
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        others = {f"p{number:05}": profile for number in range(2000)}
        self.write_store(dict(others, gone=dict(profile, api_key=OTHER_KEY)), "p00001")
        self.done("auth logout gone")
        self.assertEqual((self.profiles(), self.current()), (others, "p00001"))
        self.assert_nowhere(OTHER_KEY)
        self.assertEqual(len(load(self.done("auth get -o json").out)), 2000)


# ========================================================================================
# http: every endpoint under every fault, hostile redirects, TLS, proxies, retries
# ========================================================================================

KEY_ID = "key-stored"
LOG_IN = "auth login --project proj-alpha"
LOGIN = LOG_IN.split()
ONE_FLAG = f"auth token --api-key {OTHER_KEY}"
BOTH_FLAGS = f"{ONE_FLAG} --project proj-beta"
TOKEN_BOTH = BOTH_FLAGS.split()
ELSEWHERE = "https://elsewhere.invalid"


def cells(text):
    """The cells of a table whose columns are parted by |."""
    return [
        [cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()
    ]


Fault = collections.namedtuple("Fault", "code gets kind options")


def faults(text):
    return {
        name: Fault(int(code), int(gets), kind, load(options or "{}"))
        for name, code, gets, kind, options in cells(text)
    }


# What goes wrong with one answer | the exit code then: 5 is worth another try, 4 a rejected
# credential, 1 any other no (behaviour.md) | how often a GET is sent | the stand-in's fault
FAST_FAULTS = faults("""
refused         | 5 | 0 |              |
reset           | 5 | 3 | reset        |
close           | 5 | 3 | close        |
truncated       | 5 | 3 | truncated    |
short length    | 5 | 1 | short_length |
bad chunk       | 5 | 3 | bad_chunk    |
html            | 5 | 1 | html         |
not JSON        | 5 | 1 | not_json     |
wrong shape     | 5 | 1 | wrong_shape  |
huge            | 5 | 1 | huge         |
deep            | 5 | 1 | deep         |
401             | 4 | 1 | status       | {"status": 401}
403             | 1 | 1 | status       | {"status": 403}
404             | 1 | 1 | status       | {"status": 404}
429             | 5 | 3 | status       | {"status": 429, "headers": {"retry-after": "0"}}
429 for an hour | 5 | 1 | status       | {"status": 429, "headers": {"retry-after": "3600"}}
500             | 5 | 1 | status       | {"status": 500}
503             | 5 | 3 | status       | {"status": 503}
redirect        | 1 | 1 | redirect     |
loop            | 1 | 6 | loop         |
""")
SLOW_FAULTS = faults("""
silence         | 5 | 1 | silence      |
drip            | 5 | 1 | drip         | {"delay": 0.05, "part": "all"}
pause           | 5 | 1 | pause        |
""")
ALL_FAULTS = dict(**FAST_FAULTS, **SLOW_FAULTS)
# the time-outs for the answer that goes wrong; all else has time on the busiest machine
SHORT_WAITS = {
    "silence": {"ANSWER_TIMEOUT": 0.4},
    "drip": {"WHOLE_TIMEOUT": 1.5},
    "pause": {"PAUSE_TIMEOUT": 0.8},
}
LONG_WAITS = {"ANSWER_TIMEOUT": 20, "PAUSE_TIMEOUT": 20, "WHOLE_TIMEOUT": 20}

Endpoint = collections.namedtuple("Endpoint", "method path times start command")

# Each endpoint, in each use of it | how many answers go wrong | the profile | the command
ENDPOINTS = {
    name: Endpoint(*request.split(), int(times), start, command)
    for name, request, times, start, command in cells(f"""
version              | GET {VERSION}           | 9 | elsewhere | environments add URL
version for a list   | GET {VERSION}           | 9 | key       | organizations get
organizations        | GET {ORGANIZATION_LIST} | 9 | key       | organizations get
projects             | GET {LIST_PROJECTS}      | 9 | key       | projects get
projects of a choice | GET {LIST_PROJECTS}      | 9 | key       | projects use proj-beta
projects of a key    | GET {LIST_PROJECTS}      | 9 | key       | {ONE_FLAG}
projects, both flags | GET {LIST_PROJECTS}      | 9 | key       | {BOTH_FLAGS}
projects of a status | GET {LIST_PROJECTS}      | 9 | key       | auth status
deployments          | GET {CONTROL}           | 9 | key       | deployments get
deployment           | GET {CONTROL}/invoices  | 9 | key       | deployments get invoices
discovery            | GET {DISCOVERY}         | 9 | key       | {LOG_IN}
configuration        | GET {CONFIGURATION}     | 9 | key       | {LOG_IN}
device code          | POST {DEVICE_CODE}      | 9 | key       | {LOG_IN}
poll                 | POST {TOKEN}            | 1 | key       | {LOG_IN}
projects of a login  | GET {LIST_PROJECTS}      | 9 | key       | {LOG_IN}
me                   | GET {ME}                | 9 | login     | {LOG_IN}
new key              | POST {API_KEYS}         | 9 | key       | {LOG_IN}
deleted key          | DELETE {API_KEYS}/{KEY_ID} | 1 | login  | auth logout main
refresh              | POST {TOKEN}            | 9 | expired   | auth logout main
revocation           | POST {REVOKE}           | 9 | login     | auth logout main
""")
}
# Where the exit code is another. A poll waits out what is no answer of the provider's. A
# login keeps its key where the server does not say that it is gone. A profile goes whatever
# the server says; what has no body cannot be cut or misread.
OTHER_CODES = {
    name: dict(re.findall(r"(\w[\w ]*): (\d)", codes))
    for name, codes in cells("""
projects of a key    | 403: 4
projects, both flags | 403: 4, refused: 0, silence: 0
projects of a status | 403: 4, 404: 5, redirect: 5, loop: 5
poll                 | all: 0
me                   | all: 0
deleted key          | all: 1, 401: 0, 404: 0, truncated: 0, short length: 0, not JSON: 0, \
                       bad chunk: 0, wrong shape: 0, deep: 0, pause: 0
refresh              | all: 1
revocation           | all: 0
""")
}


class NetworkCase(CommandCase):
    """Another origin, that must hear nothing, and a login that waits 5 s at most."""

    succeeds = CommandCase.done
    bytes_stored = CommandCase.store_text

    def setUp(self):
        super().setUp()
        self.cloud.add_key(OTHER_KEY)
        self.other = self.another_origin()
        # a login that waits in vain, for want of a guard, fails instead of hanging
        self.cloud.expires_in = self.other.cloud.expires_in = 5

    def another_origin(self, cloud=None, **options):
        stand_in = StandIn(cloud, **options)
        self.addCleanup(stand_in.stop)
        return stand_in.start()

    def move_to_https(self):
        """An https environment becomes the current one; self.pem is its certificate."""
        secure = self.another_origin(tls=True)
        secure.cloud.keys = self.cloud.keys
        self.cloud, self.url = secure.cloud, secure.url
        self.cloud.auto_approve, self.cloud.interval, self.cloud.expires_in = {}, 0.001, 5
        self.pem = os.path.join(self.home, "trusted.pem")
        with open(self.pem, "w") as file:
            file.write(TLS_CERTIFICATE)

    def with_login(self, expired=False, **extra):
        """A login that the provider knows, whose profile is `main`."""
        person = {"sub": "user-1", "email": "dev@example.com"}
        scope = "email offline_access openid profile"
        login = dict(person, client_id="llamactl-cli", scope=scope, revoked=False)
        tokens = self.cloud._tokens(login).body
        key = "llx-CANARY-of-the-login-0123"
        self.cloud.add_key(key)["id"] = KEY_ID
        if expired:
            self.cloud.expire_access_tokens()
        profile = dict(
            person,
            auth_type="oidc",
            issuer=self.pinned()["issuer"],
            provider=self.pinned(),
            api_key_id=KEY_ID,
            access_token=tokens["access_token"],
            refresh_token=tokens["refresh_token"],
            access_expires_at=time.time() + (-1 if expired else 300),
        )
        profile.update(extra)
        self.with_profile(key=key, **profile)
        return profile

    def pinned(self, **changes):
        """What a login keeps of its provider."""
        issuer = f"{self.cloud.base_url}/oidc"
        provider = {"issuer": issuer, "client_id": "llamactl-cli"}
        provider["token_endpoint"] = f"{issuer}/token"
        provider["revocation_endpoint"] = f"{issuer}/revoke"
        return dict(provider, **changes)

    def start(self, how):
        """Forget what was sent, and begin with that profile."""
        self.cloud.reset()
        self.cloud.logins, self.cloud.devices = [], {}
        if how == "key":
            self.with_profile()
        elif how == "elsewhere":
            url, self.url = self.url, ELSEWHERE
            self.with_profile()
            self.url = url
        else:
            self.with_login(expired=how == "expired")

    def error_of(self, result, code=None):
        """The one line of error; all others are ones that a failing command may print."""
        known = "error: |hint: |warning: |Logging in to|Open|    \\S|Or open|profile "
        self.assertRegex(result.err, rf"\A(({known}).*\n)+\Z")
        errors = re.findall("(?m)^error: .*", result.err)
        self.assertEqual(len(errors), 1, result.err)
        if code is None:
            self.assertNotEqual(result.code, 0)
        else:
            self.assertEqual(result.code, code, result.err)
        return errors[0]

    def fails(self, *argv, code=None, **options):
        """Run ARGV, which must fail in one line and leave the store as it was; that
        line."""
        before = self.store_text()
        error = self.error_of(self.call(*argv, **options), code)
        self.assertEqual(self.store_text(), before)
        return error

    def paths_sent(self):
        """What the stand-in was asked, in order, as `METHOD path`."""
        return [" ".join(request) for request in self.requests()]


@contextlib.contextmanager
def refusing(path, times=99):
    """The next TIMES requests to PATH meet a port where nothing listens."""
    really_request = http.client.HTTPConnection.request

    def request(connection, method, url, *rest, **options):
        nonlocal times
        if times and url.partition("?")[0].endswith(path):
            times -= 1
            connection.port = 1
        return really_request(connection, method, url, *rest, **options)

    with unittest.mock.patch("http.client.HTTPConnection.request", request):
        yield


class FaultMatrix(NetworkCase):
    """Each endpoint x each fault: one line, the right code, the store as before, no
    credential anywhere else."""

    def prepare(self, name, kind):
        """Have that fault happen at that endpoint; the command to run."""
        endpoint, fault = ENDPOINTS[name], ALL_FAULTS[kind]
        self.cloud.interval = 0.001
        self.start(endpoint.start)
        # a poll whose answer is lost, but waited out, must not have used the code up
        self.cloud.pending_polls = int(name == "poll")
        options = dict(fault.options)
        if kind == "redirect":
            options["to"] = self.other.url + endpoint.path
        if fault.kind:
            arguments = endpoint.path, fault.kind, endpoint.times, endpoint.method
            self.cloud.fault(*arguments, **options)
        return endpoint.command.replace("URL", self.url)

    def judge(self, name, kind, result, before):
        endpoint, fault = ENDPOINTS[name], ALL_FAULTS[kind]
        codes = OTHER_CODES.get(name, {})
        code = int(codes.get(kind, codes.get("all", fault.code)))
        if (name, kind, result.code) == ("deleted key", "drip", 0):
            code = 0  # the answer came too late, but there was time to ask for the key
        if name == "projects of a status" and code != 1:  # which is a result as well
            hint = "hint: llamactl auth token --name main\n" if code == 4 else ""
            self.assertEqual((result.code, result.err), (code, hint))
        elif code:
            self.error_of(result, code)
        else:
            self.assertEqual(result.code, 0, result.err)
            self.assertNotIn("error:", result.err)
        if endpoint.command == "auth logout main":
            self.assertEqual(self.profiles(), {}, "a profile outlived its logout")
        elif code:
            self.assertEqual(self.store_text(), before)
        else:
            self.judge_profile(name, kind, result)
        self.assertEqual(self.other.cloud.requests, [])
        sent = self.cloud.count(endpoint.method, endpoint.path)
        if endpoint.method == "GET":
            self.assertEqual(sent, fault.gets)
        elif name == "new key":
            self.assertEqual(sent, int(kind != "refused"), "a key is created once")

    def judge_profile(self, name, kind, result):
        """The documented exceptions: what is stored although an answer went wrong."""
        profile = self.profiles()[self.stored()[self.url]["current_profile"]]
        if name == "me":
            kept = profile["api_key_id"] == KEY_ID
            # only a 401 says that the key is gone; another no would leave it behind, alive
            self.assertEqual(kept, kind != "401")
        elif name != "poll":
            self.assertEqual(profile["api_key"], OTHER_KEY)
            self.assertEqual(profile["project_id"], "proj-beta")
            self.assertIn("warning: ", result.err)
        self.assertIn(profile["api_key"], self.cloud.keys_alive() + [OTHER_KEY])

    def run_case(self, name, kind):
        endpoint = ENDPOINTS[name]
        with self.subTest(endpoint=name, fault=kind):
            command = self.prepare(name, kind)
            before = self.store_text()
            started = time.monotonic()
            with refusing(endpoint.path, endpoint.times if kind == "refused" else 0):
                result = self.call(command)
            self.assertLess(time.monotonic() - started, 12)
            self.judge(name, kind, result, before)

    def test_fast_faults(self):
        for name, kind in itertools.product(ENDPOINTS, FAST_FAULTS):
            self.run_case(name, kind)

    def test_redirects_from_https_to_http(self):
        self.move_to_https()
        self.env["SSL_CERT_FILE"] = self.pem
        for name in ENDPOINTS:
            self.run_case(name, "redirect")

    def run_slow_case(self):
        """The only case of a FaultMatrix that SlowFaults made."""
        name, kind = self.case
        path, left = ENDPOINTS[name].path, [kind] * ENDPOINTS[name].times
        really_send = llamactl.Client.send

        def send(client, method, url, *rest, **options):
            waits = LONG_WAITS
            if left and url.partition("?")[0].endswith(path):
                waits = dict(LONG_WAITS, **SHORT_WAITS[left.pop()])
            with unittest.mock.patch.multiple(llamactl, **waits):
                return really_send(client, method, url, *rest, **options)

        # these two begin before a request is sent
        self.patch(KEY_TIMEOUT=2.0, REVOCATION_TIMEOUT=2.0)
        with unittest.mock.patch("llamactl.Client.send", send):
            self.run_case(name, kind)


class SlowFaults(unittest.TestCase):
    """FaultMatrix's that must be waited for: each in a process of its own, some at once."""

    def test_slow_faults(self):
        running = []
        with tempfile.TemporaryFile("w+") as heard:
            for case in itertools.product(ENDPOINTS, SLOW_FAULTS):
                if len(running) == 12:
                    os.waitpid(running.pop(0), 0)
                running.append(os.fork())
                if not running[-1]:
                    self.run_here(case, heard)
            for pid in running:
                os.waitpid(pid, 0)
            heard.seek(0)
            said = heard.read()
        self.assertEqual(said.count("ok\n"), len(ENDPOINTS) * len(SLOW_FAULTS), said)

    def run_here(self, case, heard):
        """Run a case to the end of this process, and write what came of it."""
        try:
            signal.alarm(40)
            test = FaultMatrix("run_slow_case")
            test.case = case
            result = unittest.TestResult()
            test.run(result)
            wrong = ["%s\n%s" % each for each in result.failures + result.errors]
            os.write(heard.fileno(), "\n".join(wrong or ["ok", ""]).encode())
        finally:
            os._exit(0)


class Redirects(NetworkCase):
    """behaviour.md: followed for a GET only, never to another scheme, host or port."""

    def setUp(self):
        super().setUp()
        self.with_profile()

    def test_same_origin_is_followed_with_the_key(self):
        path = ORGANIZATION_LIST
        for status in (301, 302, 303, 307, 308):
            for to in (path, self.url + path, "organizations"):
                with self.subTest(status=status, to=to):
                    self.cloud.reset()
                    self.cloud.fault(path, "redirect", status=status, to=f"{to}?again")
                    self.done("organizations get")
                    _, second = self.cloud.sent(path)
                    self.assertEqual(second.headers["authorization"], f"Bearer {KEY}")

    def test_elsewhere_is_refused(self):
        port = self.url.rpartition(":")[2]
        for to in f"""
            {self.other.url}/
            {self.other.url}/?key={KEY}
            http://localhost:{port}/
            //localhost:{port}/
            https://127.0.0.1:{port}/
            http://user@127.0.0.1:{port}/
            http://127.0.0.1:{port}\\@localhost/
            http://127.0.0.1/
            http://127.0.0.1:99999999/
            http://:0/
            ftp://127.0.0.1:{port}/
            file:///etc/hostname
            data:application/json,{{}}
            javascript:alert(1)
        """.split():
            with self.subTest(to=to):
                self.cloud.reset()
                self.cloud.fault(LIST_PROJECTS, "redirect", to=to)
                self.fails("projects get", code=1)
                self.assertEqual(len(self.cloud.requests), 1)
                self.assertEqual(self.other.cloud.requests, [])

    def test_a_location_that_cannot_be_read(self):
        for to in ("http://[::1", "http://[::1]:port/", "\x00", "", "\u00e9://"):
            with self.subTest(to=to):
                self.cloud.reset()
                self.cloud.fault(LIST_PROJECTS, "redirect", 99, to=to)
                self.fails("projects get", code=1)
                self.assertLess(len(self.cloud.requests), 10)

    def test_a_post_or_delete_is_never_repeated_elsewhere(self):
        for path, profile, command in (
            (DEVICE_CODE, "key", LOG_IN),
            (API_KEYS, "key", LOG_IN),
            (f"{API_KEYS}/{KEY_ID}", "login", "auth logout main"),
        ):
            with self.subTest(path):
                self.start(profile)
                self.cloud.fault(path, "redirect", to=f"{path}?again", status=307)
                self.assertIn("redirects to", self.call(command).err)
                (request,) = self.cloud.sent(path)
                self.assertEqual(request.query, {})


class ServerWords(NetworkCase):
    """What a server says in an error arrives, and only its harmless part."""

    def setUp(self):
        super().setUp()
        self.with_profile()

    def error(self, status, body, headers=()):
        options = {"status": status, "body": body, "headers": dict(headers)}
        self.cloud.fault(LIST_PROJECTS, "status", **options)
        return self.fails("projects get")

    def test_status_detail_and_request_id(self):
        wrong = [{"loc": ["query"], "msg": "first"}, {"loc": [], "msg": "second"}]
        error = self.error(422, {"detail": wrong + ["third", None]})
        self.assertRegex(error, r"422: first; second \(request req-[0-9]+\)\Z")
        ids = {"x-request-id": None, "x-correlation-id": "correlated-7"}
        error = self.error(403, {"detail": "not for you"}, ids)
        self.assertRegex(error, r"403: not for you \(request correlated-7\)\Z")
        ids["x-correlation-id"] = None
        self.assertRegex(self.error(403, {"detail": "no"}, ids), r"403: no\Z")
        self.assertRegex(self.error(300, {"detail": "which"}), "300: which")

    def test_what_a_server_leaves_out(self):
        organization = {"org_id": "o", "org_name": "O"}
        deployment = {"id": "d", "status": "x"}
        for path, answer, command, name, value in (
            (LIST_PROJECTS, {"project_id": "p"}, "projects get", "deployment_count", "0"),
            (LIST_PROJECTS, {"project_id": "p"}, "projects get", "org_id", '"default"'),
            (ORGANIZATION_LIST, organization, "organizations get", "is_default", "false"),
            (CONTROL, deployment, "deployments get", "suspended", "false"),
        ):
            with self.subTest(command, name=name):
                body = {command.split()[0]: [answer]}
                self.cloud.fault(path, "wrong_shape", body=body)
                shown = self.done(command, "-o", "json").out
                self.assertEqual(re.findall(f'"{name}": (.*?),?\n', shown), [value])
        self.cloud.fault(VERSION, "wrong_shape", body={"version": "1"})
        self.done("environments add", self.url)
        self.assertIs(self.stored()[self.url]["requires_auth"], False)

    def test_what_is_no_list_of_objects_and_no_version(self):
        for path, body, command in (
            (LIST_PROJECTS, {"projects": [1]}, "projects get"),
            (LIST_PROJECTS, {"projects": {}}, "projects get"),
            (VERSION, {"requires_auth": True}, f"environments add {self.url}"),
        ):
            with self.subTest(body):
                self.cloud.fault(path, "wrong_shape", body=body)
                self.fails(command, code=5)

    def test_an_answer_that_is_too_long(self):
        self.cloud.fault(LIST_PROJECTS, "huge")
        error = self.fails("projects get", code=5)
        self.assertTrue(error.endswith(f"{LIST_PROJECTS} sent more than 8 MiB"), error)

    def test_a_gateway_without_json(self):
        for body in ("<html><h1>Forbidden</h1></html>", "", b"\xff\xfe", "[" * 100000):
            self.assertIn("418", self.error(418, body))

    def test_hostile_words(self):
        detail = "a\x1b[2J\x07\u202eb\nerror: forged\r\ud800"
        error = self.error(400, {"detail": detail}, {"x-request-id": "r\x1b[31m"})
        self.assertNotRegex(error, "[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]")

    def test_an_echoed_key_is_masked(self):
        # tearDown looks for the canary in all that was printed
        for body in (
            {"detail": f"no key {KEY}"},
            {"detail": [{"msg": KEY}]},
            {"error": KEY},
        ):
            self.assertIn("400", self.error(400, body, {"x-request-id": KEY}))

    def test_a_long_list_is_cut(self):
        """80,000 projects and a wrong --project made one line of 3.5 MB."""
        self.cloud.projects = [
            {"project_id": f"project-{number}", "project_name": None, "deployment_count": 0}
            for number in range(300)
        ]
        for command in ("projects use nope", "projects use", f"{ONE_FLAG} --project nope"):
            with self.subTest(command):
                error = self.fails(command)
                self.assertIn("project-19, and 280 more", error)
                self.assertNotIn("project-20", error)

    @unittest.skipIf(platform.python_implementation() == "PyPy", "it traces no memory")
    def test_small_chunks_take_little_memory(self):
        """Each was an object of its own until the last had come."""
        script = """if True:
            import http.client, os, ssl, sys, threading, tracemalloc, urllib.request
            sys.path.insert(0, os.path.dirname(sys.argv[1]))
            import llamactl
            tracemalloc.start()
            code = llamactl.main(sys.argv[2:])
            sys.exit(code or "peak: %d" % tracemalloc.get_traced_memory()[1])
        """
        body = json.dumps({"projects": [], "filler": "x" * 200000}).encode("ascii")
        self.cloud.fault(LIST_PROJECTS, "chunks", body=body)
        (peak,) = re.findall(
            "peak: ([0-9]+)", self.process("projects get", python=["-c", script]).err
        )
        self.assertLess(int(peak), 6000 << 10)


class TlsCase(NetworkCase):
    """The environment is an https one."""

    def setUp(self):
        super().setUp()
        self.plain = self.other
        self.move_to_https()
        self.with_profile()


class Tls(TlsCase):
    def unheard(self, **options):
        """The error of a command that sent nothing."""
        error = self.fails("projects get", code=5, **options)
        self.assertEqual(self.cloud.requests, [])
        return error

    def test_unknown_certificate(self):
        self.assertIn("TLS", self.unheard())

    def test_the_hint_of_a_certificate_comes_first(self):
        self.play(f"""
            $ llamactl environments add {self.url}/x
            error: ...: TLS failed: ...
            hint: export SSL_CERT_FILE=PATH
            [5]
        """)

    def test_status_shows_which_certificates_are_used(self):
        status = self.done("auth status --offline", env={"SSL_CERT_DIR": self.home}).out
        self.assertRegex(status, f"\nca_bundle +SSL_CERT_DIR +{self.home}\n")
        own = llamactl.CaBundle(None, None, "there")
        with patched(llamactl, "find_ca_bundle", lambda process: own):
            status = self.done("auth status --offline").out
        self.assertRegex(status, "\nca_bundle +there +the system's\n")

    def test_a_store_of_openssl_s_that_cannot_be_read(self):
        own = llamactl.CaBundle(None, None, "there")
        failing = unittest.mock.patch.object(
            ssl.SSLContext, "load_default_certs", side_effect=OSError(errno.EIO, "broken")
        )
        with failing, patched(llamactl, "find_ca_bundle", lambda process: own):
            error = self.fails("projects get", code=1)
        self.assertIn("OpenSSL's store (from there) cannot be trusted: broken", error)

    def test_an_error_that_has_no_words(self):
        refusal = ssl.CertificateError()
        with unittest.mock.patch("http.client.HTTPConnection.connect", side_effect=refusal):
            self.assertIn("TLS failed: the certificate is not valid", self.unheard())

    def test_verification_cannot_be_switched_off(self):
        unverified = ssl._create_unverified_context
        with unittest.mock.patch("ssl._create_default_https_context", unverified):
            self.unheard(env={"PYTHONHTTPSVERIFY": "0"})

    def test_wrong_host(self):
        self.url = self.url.replace("127.0.0.1", "elsewhere.invalid")
        self.with_profile()
        real = socket.getaddrinfo
        with unittest.mock.patch(
            "socket.getaddrinfo", lambda host, *rest: real("127.0.0.1", *rest)
        ):
            self.assertIn("TLS", self.unheard(env={"SSL_CERT_FILE": self.pem}))

    def test_no_secret_of_the_connection_is_logged(self):
        path = os.path.join(self.home, "keys.log")
        env = {"SSL_CERT_FILE": self.pem, "SSLKEYLOGFILE": path}
        result = self.process("projects get", env=env)
        self.assertEqual((result.code, os.path.exists(path)), (0, False), result.err)

    @unittest.skipUnless(hasattr(ssl, "TLSVersion"), "3.6 cannot say which it takes")
    def test_at_least_1_2_and_what_the_system_asks(self):
        for policy, least in (
            ("MINIMUM_SUPPORTED", "TLSv1_2"),
            ("TLSv1_3", "TLSv1_3"),
        ):
            with self.subTest(policy=policy):
                context = unittest.mock.Mock(minimum_version=ssl.TLSVersion[policy])
                with unittest.mock.patch("ssl.SSLContext", return_value=context):
                    llamactl.tls_context(llamactl.read_process())
                self.assertEqual(context.minimum_version, ssl.TLSVersion[least])
                self.assertIs(context.hostname_checks_common_name, False)

    def test_bundles(self):
        # the more specific variable wins, and a wrong one is not passed over in silence
        gone = os.path.join(self.home, "no-such.pem")
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
        for name, less_specific in zip(names, names[1:] + (None,)):
            with self.subTest(name):
                self.done("projects get", env={name: self.pem})
                if less_specific:
                    env = {name: gone, less_specific: self.pem}
                    error = self.fails("projects get", env=env)
                    self.assertIn(f"{gone} (from {name})", error)

    def test_folders_of_certificates(self):
        for name in ("SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            with self.subTest(name):
                process = llamactl.Process({name: self.home}, "", "", False)
                bundle = llamactl.find_ca_bundle(process)
                self.assertEqual(bundle, (None, self.home, name))
                self.unheard(env={name: self.home})  # an empty one

    def test_bundles_where_linux_systems_keep_them(self):
        """A self-compiled Python finds none by itself."""
        none = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
        self.patch(CA_BUNDLES=(os.path.join(self.home, "gone.pem"), self.pem))
        with unittest.mock.patch("ssl.get_default_verify_paths", return_value=none):
            self.done("projects get")
            status = load(self.done("auth status -o json").out)
        self.assertEqual(status["ca_bundle"], self.pem)

    def test_bundles_where_openssl_looks(self):
        empty, gone = (os.path.join(self.home, name) for name in ("empty", "gone"))
        os.mkdir(empty)
        found, none = (self.pem, None, "search"), (None, None, "none found")
        for file, folder, is_windows, searched, expected in (
            (self.pem, None, False, self.pem, (None, None, self.pem)),
            (None, self.home, False, self.pem, (None, None, self.home)),
            (None, empty, False, self.pem, found),
            (None, gone, False, self.pem, found),
            (None, None, False, gone, none),
            (None, None, True, self.pem, (None, None, "the system's store")),
        ):
            own = unittest.mock.Mock(cafile=file, capath=folder)
            self.patch(WINDOWS=is_windows, CA_BUNDLES=(gone, searched))
            with self.subTest(file=file, folder=folder, is_windows=is_windows):
                with unittest.mock.patch("ssl.get_default_verify_paths", return_value=own):
                    bundle = llamactl.find_ca_bundle(llamactl.Process({}, "", "", False))
                self.assertEqual(bundle, expected)

    def test_whole_login_and_logout(self):
        self.env["SSL_CERT_FILE"] = self.pem
        self.done(LOG_IN)
        self.done("auth logout dev@example.com")
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])

    def test_no_handshake_counts_as_unanswered(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.url = "https://127.0.0.1:%d" % listener.getsockname()[1]
            self.write_store({})
            with self.impatient():
                self.assertIn("warning: ", self.done(BOTH_FLAGS).err)
        self.assertEqual(len(self.profiles()), 1)

    def test_plain_http_behind_https_port(self):
        self.url = self.plain.url.replace("http:", "https:")
        self.with_profile()
        for command in ("projects get", BOTH_FLAGS):
            self.fails(command, code=5, env={"SSL_CERT_FILE": self.pem})

    def test_words_for_what_fails_on_the_way(self):
        plain = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
        plain.reason = "WRONG_VERSION_NUMBER"
        no_tls = "TLS failed: the server does not use TLS"
        no_route, odd = OSError(errno.EHOSTUNREACH, "x"), OSError(errno.EIO, "odd words")
        here, there = "https://127.0.0.1:8443", "https://llama.example:443"
        advice = "llamactl environments add http://127.0.0.1:8443"
        for error, place, has_begun, words, stage, hint in (
            (plain, here, False, no_tls, llamactl.UNUSABLE, advice),
            (plain, there, False, no_tls, llamactl.UNUSABLE, ""),
            (plain, here, True, "the connection broke off", llamactl.BROKEN_OFF, ""),
            (ssl.SSLEOFError(), here, False, "the conn", llamactl.BROKEN_OFF, ""),
            (no_route, here, False, "no route to host", llamactl.NOT_CONNECTED, ""),
            (odd, here, False, "odd words", llamactl.BROKEN_OFF, ""),
        ):
            with self.subTest(error, place=place, has_begun=has_begun):
                failure = llamactl.network_failure(error, place, has_begun)
                self.assertIn(f"{place}: {words}", failure.message)
                self.assertEqual((failure.stage, failure.hint), (stage, hint))


class NamedUrls(TlsCase):
    """Every URL that a server names must be https where the environment is; else exit 1 and
    nothing sent."""

    ENDPOINTS = ("device_authorization_endpoint", "token_endpoint", "revocation_endpoint")

    def setUp(self):
        super().setUp()
        self.env["SSL_CERT_FILE"] = self.pem

    def refused(self, url, *names, code=1):
        """The error of a login where the server names that URL."""
        with self.subTest(url=url, names=names):
            self.cloud.reset()
            overrides = dict.fromkeys(names, url)
            self.cloud.discovery_overrides = overrides if "discovery_url" in names else {}
            self.cloud.configuration_overrides = overrides
            error = self.fails(LOG_IN, code=code)
            self.assertEqual(self.plain.cloud.requests, [])
            sent = {request.path for request in self.cloud.requests}
            self.assertLessEqual(sent, {DISCOVERY, CONFIGURATION})
            return error

    def hostile(self):
        """URLs that neither an https nor an http environment may name."""
        place = self.url.partition("//")[2] + CONFIGURATION
        return (
            f"""
            file:///etc/hostname
            ftp://{place}
            gopher://{place}
            data:application/json,{{}}
            javascript:alert(1)
            //{place}
            {CONFIGURATION}
            https://user:secret@{place}
            https:{place}
            https://
            https://127.0.0.1:0{CONFIGURATION}
            https://127.0.0.1:99999{CONFIGURATION}
            http\u017f://{place}
            https://\u212a.{place}
            https://{place}\u017f
        """.split()
            + ["", f"https://{place}\n", f"https://{place} HTTP/1.1\r\nx: y"]
        )

    def test_discovery_url(self):
        plain = self.plain.url + CONFIGURATION
        for url in self.hostile() + [plain, plain.replace("http:", "HTTP:")]:
            self.refused(url, "discovery_url")

    def test_endpoints(self):
        for name in self.ENDPOINTS:
            self.refused(self.plain.url, name)
            self.refused("file:///etc/hostname", name)
        for value in (None, 7, ["https://127.0.0.1/"], {}, ""):
            self.refused(value, "token_endpoint", code=5)

    def move_to_http(self):
        self.cloud, self.url = self.plain.cloud, self.plain.url
        self.plain = self.another_origin()
        self.with_profile()

    def test_http_environment_may_name_http_but_nothing_else(self):
        self.move_to_http()
        for url in self.hostile():
            self.refused(url, "discovery_url")

    def test_an_environment_on_this_machine_names_http_on_this_machine_alone(self):
        self.move_to_http()
        for name in self.ENDPOINTS + ("discovery_url",):
            self.assertIn("beyond this", self.refused("http://id.example/", name))

    def test_what_each_environment_may_name(self):
        for environment, url, refusal in cells("""
            https://llama.example | https://id.example/  |
            https://llama.example | http://id.example/   | not https
            http://llama.example  | http://id.example/   |
            http://localhost      | https://id.example/  |
            http://localhost      | http://127.0.0.1:81/ |
            http://localhost      | http://id.example/   | beyond this machine
        """):
            with self.subTest(environment=environment, url=url):
                if refusal:
                    with self.assertRaisesRegex(llamactl.Failure, refusal):
                        llamactl.trusted_url(url, environment)
                else:
                    self.assertEqual(llamactl.trusted_url(url, environment), url)

    def test_what_is_no_url_to_some_python_is_none_to_any(self):
        """A long s, a Kelvin sign, a bracketed host that is no address."""
        for url in """
            http\u017f://127.0.0.1/
            https://\u017f.invalid/
            https://\u212a.invalid/
            https://[:::]/
            https://[1.2.3.4]/
            https://[::1::]:1/
            https://[fe]/a
        """.split():
            self.refused(url, "discovery_url", code=None)
            self.refused(url, "device_authorization_endpoint", code=None)
            self.with_login(expired=True, provider=self.pinned(token_endpoint=url))
            self.assertIn(KEY_ID, self.error_of(self.call("auth logout main"), 1))
            self.assertEqual(self.profiles(), {})

    def test_logout_sends_no_token_in_the_clear(self):
        for name in self.ENDPOINTS[1:]:
            with self.subTest(name):
                pinned = self.pinned(**{name: self.plain.url + TOKEN})
                self.with_login(expired=True, provider=pinned)
                self.error_of(self.call("auth logout main"), 1)
                self.assertEqual(self.plain.cloud.requests, [])


class Origins(NetworkCase):
    """A provider on another origin hears of no API key, and the API of no refresh token."""

    def test_each_credential_stays_at_home(self):
        self.another_origin(self.cloud)  # one state, two origins: tokens are valid at both
        self.cloud.access_token_lifetime = 1  # so that refreshing happens as well
        self.done(LOG_IN)
        self.done("auth logout dev@example.com")
        self.assertGreater(self.cloud.refreshes, 0)
        for request in self.cloud.requests:
            self.assertRegex(request.headers["user-agent"], r"\Allamactl/[0-9.]+\Z")
            room, secrets = "/oidc/", "llx-|at-CANARY|'authorization'"
            if f"http://{request.headers['host']}" == self.url:
                room, secrets = "/api/", "rt-CANARY|dc-CANARY"
            self.assertEqual(request.path[: len(room)], room)
            self.assertNotRegex(str(request), secrets)
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])


@contextlib.contextmanager
def unraised_resource_warnings():
    """Up to 3.9 http.client leaves the answer of a refused tunnel to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


class Proxies(NetworkCase):
    """As urllib reads the variables; the proxy's password is never shown."""

    def setUp(self):
        super().setUp()
        self.proxy = self.url
        self.secret_proxy = self.proxy.replace("//", "//somebody:CANARY-password@")
        self.move("http://llama.invalid")

    def move(self, url):
        self.url = url
        self.with_profile()

    def test_used(self):
        for name in ("http_proxy", "HTTP_PROXY"):
            with self.subTest(name):
                self.cloud.reset()
                err = self.done("projects get", env={name: self.proxy}).err
                (request,) = self.cloud.requests
                self.assertEqual(request.headers["host"], "llama.invalid")
                # a key that leaves this machine unencrypted is warned about
                self.assertIn("warning: http://llama.invalid:80 is not encrypted", err)

    def test_password_is_sent_and_not_shown(self):
        env = {"http_proxy": self.secret_proxy}
        self.done("projects get", env=env)
        (request,) = self.cloud.requests
        password = base64.b64encode(b"somebody:CANARY-password").decode()
        self.assertEqual(request.headers["proxy-authorization"], f"Basic {password}")
        result = self.done("auth status --offline", env=env)
        self.assertIn(self.proxy, result.out)
        self.assertNotIn("somebody", result.out + result.err)

    def test_refused(self):
        env = {"http_proxy": NOWHERE.replace("//", "//somebody:CANARY-password@")}
        self.fails("projects get", code=5, env=env)
        self.assertEqual(self.call("auth status", env=env).code, 5)

    def test_what_goes_to_this_machine_goes_by_no_proxy(self):
        """The key would be sent to the proxy in clear."""
        for url in (self.proxy, self.proxy.replace("127.0.0.1", "localhost")):
            for name in ("http_proxy", "HTTP_PROXY"):
                with self.subTest(url=url, name=name):
                    self.move(url)
                    status = self.done("auth status", env={name: NOWHERE}).out
                    self.assertRegex(status, "(?m)^proxy +- ")

    def test_what_no_proxy_names_goes_by_none(self):
        for exempt in ("llama.invalid", "*"):
            env = {"http_proxy": NOWHERE, "NO_PROXY": exempt, "no_proxy": exempt}
            status = self.done("auth status --offline", env=env).out
            self.assertRegex(status, "(?m)^proxy +- ")

    def test_a_tunnel_that_is_refused(self):
        """It learns a host and a port; its trouble is worth another try, its no is not."""
        self.move("https://llama.invalid")
        for status, tries in ((407, 1), (403, 1), (429, 1), (500, 3), (502, 3), (503, 3)):
            with self.subTest(status=status), unraised_resource_warnings():
                self.cloud.reset()
                self.cloud.fault("*", "status", 9, status=status)
                env = {"https_proxy": self.secret_proxy}
                error = self.fails("projects get", code=5, env=env)
                self.assertRegex(error, rf"the proxy answered {status}\Z")
                self.assertEqual(
                    self.requests(), [("CONNECT", "llama.invalid:443")] * tries
                )
                for request in self.cloud.requests:
                    self.assertNotIn("authorization", request.headers)

    def test_odd_proxies(self):
        for (
            proxy
        ) in "socks5://127.0.0.1:1 http://127.0.0.1:port http:// :: http://[".split():
            with self.subTest(proxy):
                self.fails("projects get", env={"http_proxy": proxy})
                result = self.call("auth status --offline", env={"http_proxy": proxy})
                self.assertEqual((result.code, result.err), (0, ""))
                self.assertRegex(result.out, r"detail .* http_proxy (names|is not)")
        error = self.fails("projects get", code=1, env={"http_proxy": "p.example:8o80"})
        self.assertIn("http_proxy is not a valid proxy address", error)

    def test_what_no_proxy_names(self):
        for host, port, exempt, expected in cells("""
            llama.example     | 443 | llama.example         | yes
            llama.example     | 443 | LLAMA.Example         | yes
            llama.example     | 443 | .llama.example        | yes
            a.llama.example   | 443 | llama.example         | yes
            a.llama.example   | 443 | *.llama.example       | yes
            a.llama.example   | 443 | x.org, llama.example  | yes
            a.llama.example   | 443 | llama.example x.org   | yes
            allama.example    | 443 | llama.example         | no
            llama.example     | 443 | a.llama.example       | no
            llama.example     | 443 | llama.example.org     | no
            llama.example.    | 443 |                       | no
            llama.example     | 443 | *                     | yes
            llama.example     | 443 | llama.example:443     | yes
            llama.example     | 80  | llama.example:443     | no
            10.1.2.34         | 80  | 10.1.2.3:804          | no
            10.1.2.3          | 80  | 10.1.2.3              | yes
            10.1.2.3          | 80  | 10.1.2.3:80           | yes
            10.1.2.30         | 80  | 10.1.2.3              | no
            10.1.2.3          | 80  | 10.0.0.0/8            | yes
            10.1.2.3          | 80  | 10.1.2.1/30           | yes
            10.1.2.3          | 80  | 10.1.2.4/30           | no
            11.1.2.3          | 80  | 10.0.0.0/8            | no
            [fd00::1]         | 80  | fd00::1               | yes
            [fd00::1]         | 80  | [fd00:0::1]           | yes
            [fd00::1]         | 80  | [fd00::1]:80          | yes
            [fd00::1]         | 81  | [fd00::1]:80          | no
            [fd00::1]         | 80  | fd00::/16             | yes
            [fd00::1]         | 80  | fe00::/16, 10.0.0.0/8 | no
        """):
            with self.subTest(host, port=port, exempt=exempt):
                found = llamactl.is_exempt(host, int(port), exempt)
                self.assertIs(found, expected == "yes")

    def test_where_a_proxy_comes_from(self):
        """Only the system's own exemptions are asked for, and never offline."""
        for kinds, variable, is_bypassed, is_offline, used, asked in (
            ("http all", "http_proxy", True, False, "http", 0),
            ("https all", "all_proxy", True, False, "all", 0),
            ("all", "ALL_PROXY", True, False, "all", 0),
            ("https", "", False, False, None, 0),
            ("http", "", False, False, "http", 1),
            ("http", "", True, False, None, 1),
            ("http", "", True, True, "http", 0),
        ):
            process = llamactl.Process({variable: "set"}, "", "", False)
            mocks = {
                "getproxies": unittest.mock.Mock(
                    return_value={kind: f"http://{kind}:1" for kind in kinds.split()}
                ),
                "proxy_bypass": unittest.mock.Mock(return_value=is_bypassed),
            }
            options = {"is_offline": True} if is_offline else {}
            with self.subTest(kinds, variable=variable, is_offline=is_offline):
                with unittest.mock.patch.multiple("urllib.request", **mocks):
                    proxy = llamactl.find_proxy(process, self.url, **options)
                source = variable or "the system's settings"
                expected = used and (f"http://{used}:1",) * 2 + (source,)
                self.assertEqual(proxy, expected)
                hosts = [call[1] for call in mocks["proxy_bypass"].mock_calls]
                self.assertEqual(hosts, [("llama.invalid",)] * asked)

    def test_a_password_that_the_proxy_wants(self):
        self.cloud.fault("*", "status", 9, status=407)
        error = self.fails("projects get", code=5, env={"http_proxy": self.secret_proxy})
        self.assertRegex(error, r"the proxy answered 407\Z")
        self.assertEqual(len(self.cloud.requests), 1)
        self.move(self.proxy)  # by no proxy
        self.assertRegex(self.fails("projects get", code=1), "list-projects answered 407")

    def test_a_warning_only_of_what_can_be_read(self):
        told = []
        client = llamactl.Client(llamactl.read_process(), str, told.append, str, None)
        with unittest.mock.patch.dict(os.environ, {"http_proxy": self.proxy}, clear=True):
            client.send("GET", self.url + VERSION)
            self.assertEqual(told, [])
            client.post_form(self.url + TOKEN, {"grant_type": "x"})
        self.assertIn("is not encrypted", told[0])


class Addresses(NetworkCase):
    """A host with several of them."""

    def test_one_that_is_silent_does_not_hold_up_the_next(self):
        port = int(self.url.rpartition(":")[2])
        really_connect, tried = socket.socket.connect, []

        def connect(sock, address):
            tried.append((address[0], sock.gettimeout()))
            if address[0] == "127.0.0.2":
                raise socket.timeout("timed out")
            return really_connect(sock, address)

        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        both = [kind + ((host, port),) for host in ("127.0.0.2", "127.0.0.1")]
        with unittest.mock.patch("socket.getaddrinfo", return_value=both):
            with unittest.mock.patch("socket.socket.connect", connect):
                self.done(f"environments add http://two.localhost:{port}")
        self.assertEqual(tried, [("127.0.0.2", 1.0), ("127.0.0.1", 1.0)])

    def test_all_that_are_slow_share_the_time(self):
        late = unittest.mock.Mock(side_effect=socket.timeout("timed out"))
        address = ("two.example", 1)
        with unittest.mock.patch("socket.getaddrinfo", return_value=[1, 2]):
            with unittest.mock.patch("socket.create_connection", late):
                with self.assertRaises(socket.timeout):
                    llamactl.connect(address, 10.0)
                with self.assertRaises(socket.timeout):
                    llamactl.connect(address, 1.0)
        times = [call[0][1] for call in late.call_args_list]
        self.assertEqual(times, [1.0, 5.0, 0.25, 0.5])

    def test_the_answer_may_take_as_long_as_with_one(self):
        with unittest.mock.patch("socket.getaddrinfo", return_value=[1, 2]):
            with unittest.mock.patch("socket.create_connection") as create:
                llamactl.connect(("two.example", 1), 10.0)
        create.return_value.settimeout.assert_called_once_with(10.0)


class Retries(NetworkCase):
    """Twice more for a GET, as the server asks up to 30 s; a key is created once."""

    def setUp(self):
        super().setUp()
        self.patch(RETRY_DELAYS=(0.5, 1.5))

    def send(self, method="GET", path=VERSION, within=None):
        """One request: its status, or the exit code of its failure below 0; the waits."""
        slept = []
        client = llamactl.Client(llamactl.read_process(), str, str, slept.append, None)
        if within:
            client = client.within(within)
        try:
            return client.send(method, self.url + path).status, slept
        except llamactl.Failure as failure:
            return -failure.code, slept

    def queue(self, path, fault, times):
        """FAULT is a kind, or a status, perhaps with what the server asks to wait."""
        self.cloud.reset()
        status, _, seconds = fault.partition(" after ")
        if status.isdigit():
            options = {"status": int(status), "headers": {"retry-after": seconds or None}}
            self.cloud.fault(path, "status", times, **options)
        else:
            self.cloud.fault(path, fault, times)

    def test_a_get(self):
        for fault, times, outcome, waits in cells("""
            reset                  | 1 | 200 | 0.5
            reset                  | 2 | 200 | 0.5 1.5
            reset                  | 9 | -5  | 0.5 1.5
            close                  | 9 | -5  | 0.5 1.5
            429                    | 1 | 200 | 0.5
            502                    | 1 | 200 | 0.5
            503                    | 9 | 503 | 0.5 1.5
            504                    | 2 | 200 | 0.5 1.5
            503 after 7            | 2 | 200 | 7 7
            429 after 30           | 1 | 200 | 30
            429 after 31           | 1 | 429 |
            503 after 999999999999 | 1 | 503 |
            503 after -5           | 1 | 200 | 0.5
            500                    | 1 | 500 |
            404                    | 1 | 404 |
            401                    | 1 | 401 |
            html                   | 1 | 200 |
            interim                | 1 | 200 |
            503 after Wed, 21 Oct 2015 07:28:00 GMT        | 1 | 200 | 0.5
            503 after Wed, 21 Oct 99999999999 07:28:00 GMT | 1 | 200 | 0.5
            503 after Jan 2015 07: , +0100                 | 1 | 200 | 0.5
        """):
            with self.subTest(fault, times=times):
                self.queue(VERSION, fault, int(times))
                slept = list(map(float, waits.split()))
                self.assertEqual(self.send(), (int(outcome), slept))
                self.assertEqual(len(self.cloud.requests), len(slept) + 1)

    def test_a_get_where_no_connection_was_made(self):
        with refusing(VERSION, 2):
            self.assertEqual(self.send(), (200, [0.5, 1.5]))
        with refusing(VERSION):
            self.assertEqual(self.send(), (-5, [0.5, 1.5]))
            self.assertEqual(self.send(within=8), (-5, []))

    def test_no_second_try_after_a_long_first_one(self):
        clock = ToldTime()

        def refuse_late(*_):
            clock.now += 10.1
            raise ConnectionRefusedError

        self.patch(time=clock)
        with unittest.mock.patch("socket.create_connection", refuse_late):
            self.assertEqual(self.send(), (-5, []))

    def test_silence_is_not_repeated(self):
        self.queue(VERSION, "silence", 9)
        with self.impatient():
            self.assertEqual(self.send(), (-5, []))
        self.assertEqual(len(self.cloud.requests), 1)

    def test_a_post_only_where_no_connection_was_made(self):
        for fault in ("reset", "close", "503", "429 after 1"):
            with self.subTest(fault):
                self.queue(API_KEYS, fault, 9)
                self.assertEqual(self.send("POST", API_KEYS)[1], [])
                self.assertEqual(len(self.cloud.requests), 1)
        with refusing(API_KEYS, 2):
            self.cloud.reset()
            self.assertEqual(self.send("POST", API_KEYS)[1], [0.5, 1.5])
        self.assertEqual(len(self.cloud.requests), 1)

    def test_a_login_survives_a_refused_connection(self):
        self.patch(RETRY_DELAYS=(0, 0))
        for count, path in enumerate((DEVICE_CODE, API_KEYS), 3):
            with self.subTest(path), refusing(path, 2):
                self.write_store({})
                self.done(LOG_IN)
                self.assertEqual(len(self.cloud.keys_alive()), count)


class Patience(NetworkCase):
    """Until an answer begins, and until it is whole."""

    def test_seconds_of_both(self):
        really_wait, clock, ends = llamactl.wait_in_steps, ToldTime(), []

        def noted(event, end):
            ends.append(end - clock.monotonic())
            return really_wait(event, end)

        self.patch(wait_in_steps=noted, time=clock)
        for timeout, within, expected in (
            ("", None, [10, 60]),
            ("3", None, [3, 53]),
            ("90", None, [90, 140]),
            ("", 20, [10, 20]),
            ("", 8, [8, 8]),
            ("90", 20, [20, 20]),
        ):
            with self.subTest(timeout=timeout, within=within):
                del ends[:]
                process = llamactl.Process({"LLAMACTL_TIMEOUT": timeout}, "", "", False)
                client = llamactl.Client(process, str, str, str, None)
                if within:
                    client = client.within(within)
                client.send("GET", self.url + VERSION)
                self.assertEqual(ends, expected)

    def test_steps(self):
        """Windows sees a Ctrl-C only between two of them."""
        clock = ToldTime()
        self.patch(time=clock)
        event = unittest.mock.Mock(wait=clock.sleep)  # which never comes
        self.assertFalse(llamactl.wait_in_steps(event, clock.monotonic() + 1.25))
        self.assertEqual(clock.slept, [0.5, 0.5, 0.25])
        event = threading.Event()
        event.set()
        self.assertTrue(llamactl.wait_in_steps(event, clock.monotonic() + 9))


class UnverifiedToken(NetworkCase):
    """`auth token` with both flags: stored only where there was no answer at all."""

    def setUp(self):
        super().setUp()
        self.url = "http://llama.invalid"
        self.write_store({})
        self.trouble = socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def test_unknown_host(self):
        with unittest.mock.patch("socket.getaddrinfo", side_effect=self.trouble):
            self.assertRegex(self.done(BOTH_FLAGS).err, "(?m)^warning: .*verified")
            self.fails(f"auth token --api-key {KEY}", code=5)
        self.assertEqual(
            [each["api_key"] for each in self.profiles().values()], [OTHER_KEY]
        )

    def test_a_look_up_that_hangs(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def hang(*_):
            over.wait(8)
            raise self.trouble

        self.patch(ANSWER_TIMEOUT=0.2)
        started = time.monotonic()
        with unittest.mock.patch("socket.getaddrinfo", hang):
            self.assertIn("warning: ", self.done(BOTH_FLAGS).err)
        self.assertLess(time.monotonic() - started, 6)


# ========================================================================================
# oauth: the provider that lies: ID tokens, keys and numbers
# ========================================================================================


class IdToken(unittest.TestCase):
    """read_user(): OpenID Connect Core section 3.1.3.7 without the signature, by
    example."""

    NOW = 1000000
    GOOD = {"iss": "https://id", "aud": "me", "sub": "u", "exp": NOW + 60}
    # what the claims are in place of these; null is none
    ACCEPTED = """
        {}
        {"exp": 999880}
        {"exp": 1000000.5}
        {"aud": ["me"]}
        {"azp": "me"}
        {"aud": ["me", "you"], "azp": "me"}
        {"aud": ["you", "me"]}
        {"nonce": "n", "iat": 5, "email": null}
    """
    REFUSED = """
        issuer is None, not https://id           {"iss": null}
        issuer is .*, not https://id             {"iss": ["https://id"]}
        issuer is HTTPS://id, not https://id     {"iss": "HTTPS://id"}
        audience is you, not me                  {"aud": "you"}
        audience is None, not me                 {"aud": null}
        audience is .*, not me                   {"aud": []}
        audience is me too, not me               {"aud": "me too"}
        audience is .*, not me                   {"aud": {"me": 1}}
        audience is .*, not me                   {"aud": ["you"], "azp": "me"}
        party is you, not me                     {"aud": ["me", "you"], "azp": "you"}
        party is you, not me                     {"azp": "you"}
        expired at 999879, .* clock .* 1000000   {"exp": 999879}
        expired at None                          {"exp": null}
        expired at 9999999999                    {"exp": "9999999999"}
        expired at True                          {"exp": true}
        expired at                               {"exp": [1000060]}
        expired at -1e\\+300                      {"exp": -1e300}
        not a JWT                                {"exp": NaN}
        not a JWT                                {"exp": Infinity}
        no user                                  {"sub": null}
        no user                                  {"sub": ""}
        no user                                  {"sub": 7}
        no user                                  {"sub": ["u"]}
    """
    ENTRA = "https://login.example/{tenantid}/v2.0"
    TENANT = "https://login.example/t-1/v2.0"

    def read(self, token, issuer="https://id"):
        provider = {"issuer": issuer, "client_id": "me"}
        return llamactl.read_user(token, provider, self.NOW)

    def assert_refused(self, words, token, issuer="https://id"):
        with self.assertRaisesRegex(llamactl.Failure, words):
            self.read(token, issuer)

    def test_claims_that_are_accepted(self):
        for row in self.ACCEPTED.strip().splitlines():
            with self.subTest(row):
                claims = merged(self.GOOD, json.loads(row))
                self.assertEqual(self.read(jwt(claims)).sub, "u")

    def test_claims_that_are_refused(self):
        for row in self.REFUSED.strip().splitlines():
            with self.subTest(row):
                words, changes = re.split(" {2,}(?={)", row.strip())
                self.assert_refused(words, jwt(merged(self.GOOD, json.loads(changes))))

    def test_issuers(self):
        for is_accepted, issuer, iss, tid in (
            (True, "https://id/", "https://id", None),
            (True, "https://id", "https://id/", None),
            (True, self.ENTRA, self.TENANT, "t-1"),
            (False, "https://id//", "https://id", None),
            (False, "https://id/a", "https://id", None),
            (False, self.ENTRA, self.TENANT, "t-2"),
            (False, self.ENTRA, self.TENANT, None),
            (False, self.ENTRA, self.TENANT, 1),
        ):
            with self.subTest(issuer=issuer, iss=iss, tid=tid):
                token = jwt(merged(self.GOOD, {"iss": iss, "tid": tid}))
                if is_accepted:
                    self.assertEqual(self.read(token, issuer).issuer, iss.rstrip("/"))
                else:
                    self.assert_refused(f"is {iss}, not {re.escape(issuer)}", token, issuer)

    def test_shapes(self):
        for token in (
            7,
            [jwt(self.GOOD)],
            "",
            "a.e30",
            "a.b.c.d.e",
            "a.%%%.c",
            "a.A.c",
            "a.\u00e9.c",
        ):
            with self.subTest(token):
                self.assert_refused("not a JWT", token)
        for claims in (
            b"{",
            b'{"sub": "\xff"}',
            b"[{}]",
            b"null",
            b"[" * 100000 + b"]" * 100000,
            b'{"x": ' + b"9" * 100000 + b"}",
        ):
            with self.subTest(claims[:20]):
                self.assert_refused("not a JWT", f"a.{b64url(claims)}.c")
        self.assert_refused("no ID token.*openid", None)


class LyingProvider(NetworkCase):
    """A login that ends in one line, with no key made and the store as it was."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.cloud.interval = 0.001
        self.with_profile()

    def refused(self, code=5, sent=API_KEYS):
        """The one line of a login that ends with CODE, before anything is SENT there."""
        self.cloud.reset()
        error = self.fails(*LOGIN, code=code)
        self.assertEqual(self.cloud.count("POST", sent), 0)
        return error

    def test_an_id_token_of_another_issuer(self):
        """That others are refused, and why: IdToken."""
        self.cloud.id_token_claims = {"iss": ELSEWHERE}
        self.assertRegex(self.refused(1), f"{ELSEWHERE}.*{self.url}/oidc")

    def test_an_address_that_is_no_text(self):
        for name in ("revocation_endpoint", "device_authorization_endpoint"):
            self.cloud.configuration_overrides = {name: 5}
            self.assertIn("named no URL where one", self.refused(5, sent=DEVICE_CODE))

    def test_no_device_flow(self):
        for value in (None, ""):
            self.cloud.configuration_overrides = {"device_authorization_endpoint": value}
            self.assertIn("no device flow", self.refused(1, sent=DEVICE_CODE))

    def test_token_answers(self):
        for body in (
            {},
            {"access_token": ""},
            {"access_token": 7, "id_token": "x"},
            {"access_token": None},
            {"error": "nonsense"},
            {"error": 7},
        ):
            with self.subTest(body=body):
                self.cloud.token_script = [(200, body)]
                self.refused(None)
        self.cloud.token_answer = {"access_token": "two words"}
        self.assertIn("an unusable access token", self.refused())

    def test_keys_that_cannot_be_keys(self):
        for key in ("", "a b", "two\nlines", "\u00e9", 7, None, ["x"]):
            with self.subTest(key=key):
                self.cloud.reset()
                body = {"id": "key-1", "redacted_api_key": key}
                self.cloud.fault(API_KEYS, "wrong_shape", body=body)
                self.fails(*LOGIN)

    def test_device_answers(self):
        names = ("device_code", "user_code", "verification_uri")
        for name, value in itertools.product(names, (None, "", 7, ["x"])):
            with self.subTest(name=name, value=value):
                self.cloud.device_answer = {name: value}
                self.refused(sent=TOKEN)

    def test_expires_in(self):
        for value in (0, -1, "soon", None, float("nan"), True, [600], float("-inf")):
            with self.subTest(expires_in=value):
                self.cloud.device_answer = {"expires_in": value}
                self.refused(sent=TOKEN)
        for value in (10**12, 10**30, 600.5):
            with self.subTest(expires_in=value):
                self.cloud.device_answer = {"expires_in": value}
                self.succeeds(*LOGIN)

    def test_a_project_that_is_the_key(self):
        self.cloud.projects[0]["project_id"] = OTHER_KEY
        for command in (ONE_FLAG, f"{ONE_FLAG} --project {OTHER_KEY}"):
            self.assertIn("no usable 'project_id'", self.fails(command, code=5))


# ========================================================================================
# credential: which credential wins
# ========================================================================================


class Variables(CommandCase):
    NAMES = {
        "key": "LLAMA_CLOUD_API_KEY",
        "file": "LLAMA_CLOUD_API_KEY_FILE",
        "project": "LLAMA_AGENTS_PROJECT_ID",
        "url": "LLAMA_CLOUD_BASE_URL",
        "profile": "LLAMACTL_PROFILE",
        "use": "LLAMA_CLOUD_USE_PROFILE",
    }

    def setUp(self):
        super().setUp()
        self.servers = {"profile's": self.cloud}
        for name in ("variable's", "default"):
            stand_in = StandIn().start()
            self.addCleanup(stand_in.stop)
            self.servers[name] = stand_in.cloud
        for cloud in self.servers.values():
            cloud.add_key(OTHER_KEY)
            cloud.deployments = []  # no warnings but those of the variables
        self.patch(DEFAULT_API_URL=stand_in.url)
        self.variable_url = self.servers["variable's"].base_url
        self.with_profile()
        self.done(f"auth token --api-key {OTHER_KEY} --project proj-beta --name second")
        self.done("auth use main")
        self.forget()

    def forget(self):
        for cloud in self.servers.values():
            cloud.reset()

    def variables(self, words):
        """The environment of WORDS: NAMES, some with a value, `all` being a credential."""
        values = {"key": OTHER_KEY, "project": "proj-beta", "url": self.variable_url + "/"}
        env = {}
        for word in re.sub("^all", "key project url", words).split():
            name, given, value = word.partition("=")
            env[self.NAMES[name]] = value if given else values[name]
        return env

    def used(self, command, variables):
        """`SERVER KEY PROJECT` that COMMAND used, and all that it warned of."""
        self.forget()
        result = self.done(command, env=self.variables(variables))
        sent = [(name, cloud.requests) for name, cloud in self.servers.items()]
        ((name, requests),) = [(name, requests) for name, requests in sent if requests]
        self.assertLessEqual(len(requests), 1 + ("--project" in command))  # a look-up
        (key,) = bearers(requests[-1:])
        words = name, {KEY: "main", OTHER_KEY: "other"}[key]
        warned = re.findall("(?m)^warning: .*", result.err)
        return " ".join(words + (requests[-1].query.get("project_id", "-"),)), warned

    def assert_used(self, command, table):
        """Rows of TABLE: options | variables | what is used | what a warning names."""
        for row in table.strip().splitlines():
            options, variables, expected, warning = map(str.strip, row.split("|"))
            with self.subTest(row):
                used, warned = self.used(f"{command} {options}".strip(), variables)
                self.assertEqual(used, expected)
                self.assertEqual(bool(warned), bool(warning), warned)
                self.assertIn(self.NAMES.get(warning, warning), "".join(warned))

    def test_a_key_alone_where_a_project_is_needed(self):
        self.write_store({})
        result = self.call("deployments get", env=self.variables("key url"))
        error = "error: LLAMA_CLOUD_API_KEY is set, but LLAMA_AGENTS_PROJECT_ID is not\n"
        self.assertEqual((result.code, result.err), (2, error))
        for command in ("auth status", "projects get", "organizations get"):
            self.done(command, env=self.variables("key url"))

    def test_a_key_that_the_server_rejects_is_to_be_replaced_where_it_stands(self):
        env = self.variables("all key=llx-CANARY-rejected-0000")
        err = self.call("projects get", env=env).err
        self.assertIn("hint: replace or unset LLAMA_CLOUD_API_KEY\n", err)

    def test_precedence(self):
        table = """
                               |                    | profile's main proj-alpha   |
                               | all                | variable's other proj-beta  | use
                               | key url            | profile's main proj-alpha   | key
                               | key project        | default other proj-beta     | key
                               | project            | profile's main proj-alpha   | project
                               | url                | profile's main proj-alpha   | url
                               | project url        | profile's main proj-alpha   | project
                               | all use=1          | profile's main proj-alpha   |
                               | all use= profile=  | variable's other proj-beta  | key
                               | all profile=main   | variable's other proj-beta  | main
                               | key= project= url= | profile's main proj-alpha   |
                               | key= profile=      | profile's main proj-alpha   |
                               | profile=second     | profile's other proj-beta   |
          --project proj-alpha | all                | variable's other proj-alpha | key
          --project proj-alpha | key url            | variable's other proj-alpha | key
          --project proj-alpha | project            | profile's main proj-alpha   | project
          --project proj-alpha | profile=second     | profile's other proj-alpha  |
          --project proj-beta  |                    | profile's main proj-beta    |
          --profile second     |                    | profile's other proj-beta   |
          --profile main       | profile=second     | profile's main proj-alpha   |
          --profile main       | all                | profile's main proj-alpha   |
        """
        self.assert_used("deployments get", table)
        self.assertEqual(
            self.used("--profile second deployments get", ""),
            ("profile's other proj-beta", []),
        )

    def test_precedence_where_no_project_is_needed(self):
        table = """
                         | key url | profile's main - | key
                         | key     | profile's main - | key
                         | url     | profile's main - | url
          --profile main | all     | profile's main - |
        """
        self.assert_used("projects get", table)

    def test_words_of_use_profile(self):
        for server, words in (
            ("profile's main", "1 true yes on t y TRUE Yes oN"),
            ("variable's other", "0 false no off f n 2 maybe truely"),
        ):
            for word in words.split():
                used, _ = self.used("projects get", "all use=" + word)
                self.assertEqual(used, server + " -", word)

    def test_no_key_goes_to_another_server(self):
        """Whatever is set, the profile's key is seen by its own server alone."""
        variables = self.variables("all profile=main").items()
        for count in range(5):
            for chosen in itertools.combinations(variables, count):
                self.call("deployments get", env=chosen)
                self.call("projects get", env=chosen)
                self.call("auth status", env=chosen)
                self.call("organizations get", env=chosen)
        for name, cloud in self.servers.items():
            self.assertGreater(len(cloud.requests), 4, name)
            key = KEY if name == "profile's" else OTHER_KEY
            self.assertEqual(bearers(cloud.requests) - {"none"}, {key}, name)

    def test_state_of_the_store_does_not_matter_to_a_full_credential(self):
        env = self.variables("all")
        commands = ["deployments get", "projects get", "auth status", "config"]
        commands.append(f"auth inject --env-file {self.home}/.env")
        cut_off = self.store_text()[:-20]
        for state in ("{", "", "[]", '{"version": 99}', cut_off, "[" * 100000, None):
            with self.subTest(state=state and state[:20]):
                if state is None:
                    os.unlink(self.store_path)
                    os.mkdir(self.store_path)
                else:
                    with open(self.store_path, "w") as file:
                        file.write(state)
                for command in commands:
                    self.done(command, env=env)
                self.assertEqual(self.call("deployments get").code, 1)
        for folder, home in (
            ("/proc/nowhere", self.home),
            ("/dev/null/x", self.home),
            ("", "/nonexistent"),
        ):
            elsewhere = dict(env, LLAMACTL_CONFIG_DIR=folder, HOME=home)
            self.done("deployments get", env=elsewhere)

    def test_the_profile_that_is_not_used_is_named(self):
        profiles = self.profiles()
        for current, named, words in (
            ("main", "", "profile main"),
            (None, "", "a stored profile"),
            (None, "second", "profile second"),
            ("main", "nope", "a stored profile"),
        ):
            self.write_store(profiles, current)
            env = self.variables("all profile=" + named)
            self.assertIn(
                f"LLAMA_CLOUD_API_KEY is used at {self.variable_url} instead of {words}; ",
                self.done("deployments get", env=env).err,
            )
        self.write_store({})
        self.assertNotIn("warning", self.done("deployments get", env=env).err)

    def test_changes_say_that_variables_win_anyway(self):
        official = os.path.join(self.folder, "profiles.db")
        make_official_store(official)
        commands = [
            "auth use main",
            "projects use proj-alpha",
            "auth logout second",
            f"auth token --api-key {KEY} --project proj-beta",
            "auth login --project proj-alpha",
            "environments use " + self.url,
            "environments add " + self.url,
            "environments delete " + llamactl.DEFAULT_API_URL,
        ] + ["auth import --from-official"] * os.path.exists(official)
        before = self.store_text()
        for command in commands:
            for variables, warning in (
                ("key project", "LLAMA_CLOUD_API_KEY.*LLAMA_CLOUD_USE_PROFILE"),
                ("profile=main", "using profile main .from LLAMACTL_PROFILE."),
                ("key project use=1", None),
            ):
                with self.subTest(command=command, variables=variables):
                    with open(self.store_path, "w") as file:
                        file.write(before)
                    err = self.done(command, env=self.variables(variables)).err
                    if warning:
                        self.assertRegex(err, "warning: .*" + warning)
                    elif "logout" not in command:  # which warns of what remains
                        self.assertNotIn("warning", err)

    def test_a_file_with_the_key_is_a_full_credential_too(self):
        path = self.key_file(f"\ufeff{OTHER_KEY}\n".encode())
        used, warned = self.used("deployments get", "project url file=" + path)
        self.assertEqual(used, "variable's other proj-beta")
        self.assertIn("LLAMA_CLOUD_API_KEY_FILE", warned[0])
        nowhere = "project url key= file=/nowhere"
        for variables, code, message in (
            ("all file=" + path, 2, "exclude each other"),
            (nowhere, 1, "/nowhere"),
        ):
            result = self.call("deployments get", env=self.variables(variables))
            self.expect_failure(result, code, message)
        self.done("deployments get", env=self.variables(nowhere + " use=1"))

    def test_a_key_without_a_project(self):
        key = self.variables("key url")
        result = self.call("auth use main", env=key)  # which warns of full credentials
        self.assertEqual(result.err, "profile main is current\n")
        for profiles, requires_auth in (({}, True), ({}, False)):
            self.write_store(profiles, requires_auth=requires_auth)
            with self.subTest(requires_auth=requires_auth):
                result = self.call("auth inject --env-file -", env=key)
                message = "LLAMA_CLOUD_API_KEY is set, but LLAMA_AGENTS_PROJECT_ID is not"
                self.expect_failure(result, 2, message)

    def test_malformed_values(self):
        for variables, code, message in (
            ("all url=ftp://x", 2, "http"),
            ("all url=https://user:CANARY@x", 2, "http"),
            ("all project=a\x7fb", 2, "project"),
            ("profile=nope", 1, "nope.*main"),
        ):
            with self.subTest(variables):
                result = self.call("projects get", env=self.variables(variables))
                self.expect_failure(result, code, message)
        self.done("projects get", env=self.variables("all profile=nope"))


# ========================================================================================
# login: the waits of RFC 8628, the outcomes, and how many requests it all takes
# ========================================================================================


SIGN_IN = "auth login --project proj-alpha"
USER = "dev@example.com"  # whom the stand-in lets in, unless a test says otherwise


class ToldTime:
    """A clock that only sleeping moves, in the place of the time module."""

    def __init__(self):
        self.now = 1700000000.0
        self.slept = []

    def time(self):
        return self.now

    def monotonic(self):
        return self.now - 1600000000.0

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def __getattr__(self, name):
        return getattr(time, name)


def said(errors, status=400):
    """The ERRORS of a provider, as answers to one poll after the other."""
    return [(status, {"error": error}) for error in errors.split()]


class DeviceFlow(NetworkCase):
    """The real numbers of seconds, by a clock that is told the time."""

    # What the stand-in changes (none of it here), and how such a login ends: exit code, a
    # pattern of what it prints, profile, seconds before each poll and from the last one to
    # the end, how often trouble is told, whether a logout revokes the refresh token.
    USUAL = """{
        "configuration": {}, "device": {}, "polls": [], "tokens": {}, "claims": {},
        "approval": {}, "faults": [],
        "code": 0, "words": "logged in as", "profile": "dev@example.com",
        "waits": [5], "rest": 0, "told": 0, "revoked": true
    }"""

    def setUp(self):
        super().setUp()
        self.told = ToldTime()
        self.cloud.clock = self.told.time
        self.cloud.expires_in = 600
        self.cloud.interval = 5
        self.patch(SLOW_DOWN=5.0, DEFAULT_INTERVAL=5.0, time=self.told)

    def check(self, *commands, **changes):
        """Run COMMANDS, by default a login, which end as CHANGES say; then log out."""
        row = dict(load(self.USUAL), **changes)
        self.write_store({})
        self.cloud.reset()
        self.cloud.logins = []
        self.cloud.configuration_overrides = row["configuration"]
        self.cloud.device_answer = row["device"]
        self.cloud.token_script = list(row["polls"])
        self.cloud.token_answer = row["tokens"]
        self.cloud.id_token_claims = row["claims"]
        self.cloud.auto_approve = row["approval"]
        for path, kind, options in row["faults"]:
            self.cloud.fault(path, kind, **options)
        results = [self.call(command) for command in commands or [SIGN_IN]]
        screen = "".join(result.out + result.err for result in results)
        self.assertEqual(results[-1].code, row["code"], screen)
        self.assertRegex(screen, row["words"])
        self.assertEqual(self.waits(), row["waits"] + [row["rest"]])
        self.assertEqual(screen.count("; still waiting\n"), row["told"], screen)
        self.assertNotIn("hint: llamactl auth login\n", screen)
        self.assertIsNone(self.stored()[self.url].get("login"))  # nothing waits any more
        if row["code"]:
            self.error_of(results[-1])
            self.assertEqual(self.profiles(), {})
        else:
            self.check_logout(row["profile"], row["revoked"])
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])

    def waits(self):
        """The seconds from the code to the first poll, ..., from the last to the end."""
        moments = [
            request.time
            for request in self.cloud.requests
            if request.path in (DEVICE_CODE, TOKEN) or request.method == "CONNECT"
        ]
        ends = moments[1:] + [self.told.now]
        return [end - start for start, end in zip(moments, ends)]

    def check_logout(self, name, is_revoked):
        self.assertEqual(list(self.profiles()), [name])
        self.assertIn(self.profiles()[name]["api_key"], self.cloud.keys_alive())
        result = self.call("auth logout", name)
        self.assertEqual(result, (0, "", f"profile {name} deleted\n"))
        revoked = [login["revoked"] for login in self.cloud.logins]
        self.assertEqual(revoked, [is_revoked])


# What is no answer of the provider's, but a gateway's or a captive portal's: status, body.
TROUBLE = """
403 "<!doctype html><title>Sign in to this network</title>"
404 "<!doctype html><title>Sign in to this network</title>"
511 "<!doctype html><title>RFC 6585 section 6</title>"
200 "<!doctype html><title>Sign in to this network</title>"
200 null
403 {"message": "Forbidden"}
408 null
408 {"error": "Request Timeout"}
429 {"message": "too many requests"}
429 {"error": "too_many_requests"}
500 {"detail": "Internal Server Error"}
500 {"error": "server_error"}
500 {"error": {"code": 500, "message": "Internal"}}
503 {"error": "temporarily_unavailable"}
503 {"status": 503, "error": "Service Unavailable"}
"""


class Polling(DeviceFlow):
    def test_the_interval_is_five_seconds_where_it_is_no_number_above_zero(self):
        for interval, seconds in load("""[
            [2, 2], [7.5, 7.5], ["2", 2], [null, 5], [0, 5], [-1, 5],
            ["2.5", 5], ["soon", 5], [true, 5], [[2], 5], [{}, 5]
        ]"""):
            with self.subTest(interval=interval):
                self.check(device={"interval": interval}, waits=[seconds])
        self.assertLessEqual(max(self.told.slept), 1)  # so that Ctrl-C is seen
        for interval in load("[NaN, Infinity, -Infinity]"):
            with self.subTest(interval=interval):
                self.check(device={"interval": interval}, code=5, words="JSON", waits=[])

    def test_a_huge_interval_ends_with_the_code(self):
        for interval in (601, 10**9, 10**25):
            with self.subTest(interval=interval):
                device = {"interval": interval}
                self.check(device=device, code=4, words="expired", waits=[], rest=600)

    def test_the_words_of_rfc_8628_count_whatever_the_status(self):
        for status in (200, 400, 429, 500, 503):
            with self.subTest(status=status):
                polls = said("slow_down authorization_pending slow_down", status)
                self.check(polls=polls, waits=[5, 10, 10, 15])  # slow_down is for good
                for error, words in (
                    ("access_denied", "denied"),
                    ("expired_token", "expired"),
                ):
                    self.check(polls=said(error, status), code=4, words=f"error: .*{words}")

    def test_trouble_doubles_the_wait_up_to_30_seconds_and_is_told_once(self):
        lines = [line.split(" ", 1) for line in TROUBLE.strip().splitlines()]
        polls = [(int(status), load(body)) for status, body in lines]
        self.check(polls=polls, waits=[5, 10, 20] + [30] * (len(polls) - 2), told=1)

    def test_a_poll_that_no_connection_carried_is_not_sent_again_before_its_time(self):
        with refusing(TOKEN, 2):
            self.check(waits=[5 + 10 + 20], told=1)

    def test_a_proxy_that_fails_is_waited_out_until_the_code_expires(self):
        self.env["https_proxy"] = self.url
        for status in (503, 407):
            fault = ["*", "status", {"times": 9, "method": "CONNECT", "status": status}]
            with self.subTest(status=status), unraised_resource_warnings():
                self.check(
                    configuration={"token_endpoint": "https://llama.invalid/token"},
                    device={"expires_in": 60},
                    faults=[fault],
                    code=5,
                    words=f"error: .*{status}",
                    waits=[5, 10, 20],
                    rest=25,
                    told=1,
                )


QUIRKS = r"""[
{
    "name": "iss: a slash more", "source": "OpenID Connect Core section 3.1.3.7",
    "claims": {"iss": "{url}/oidc/"}
},
{
    "name": "iss: a slash less", "source": "indigo-iam/iam issue 714",
    "configuration": {"issuer": "{url}/oidc/"}, "claims": {"iss": "{url}/oidc"}
},
{
    "name": "iss: another tenant than tid",
    "source": "MicrosoftDocs/azure-docs issues 38427, 95994 and 113944",
    "configuration": {"issuer": "https://login.example/{tenantid}/v2.0"},
    "claims": {"iss": "https://login.example/t-2/v2.0", "tid": "t-1"},
    "code": 1, "words": "error: .*/t-2/v2.0, not https://login.example/{tenantid}/v2.0\n"
},
{
    "name": "aud: others, no azp", "source": "OpenID Connect Core section 3.1.3.7",
    "claims": {"aud": ["api", "llamactl-cli"]}
},
{
    "name": "no text as email, two names", "source": "learn.microsoft.com: ID token claims",
    "claims": {"email": 7, "preferred_username": "jo", "upn": "jo@corp"},
    "profile": "jo"
},
{
    "name": "no email, but a upn", "source": "learn.microsoft.com: ID token claims",
    "claims": {"email": null, "upn": "jo@corp.example"}, "profile": "jo@corp.example"
},
{
    "name": "nothing that is not needed", "source": "OpenID Connect Discovery section 3",
    "configuration": {
        "authorization_endpoint": null, "scopes_supported": null,
        "response_types_supported": null, "grant_types_supported": null,
        "id_token_signing_alg_values_supported": null}
},
{
    "name": "an empty way to revoke", "source": "OpenID Connect Discovery section 3",
    "configuration": {"revocation_endpoint": ""}, "revoked": false
},
{
    "name": "numbers as strings",
    "source": "Azure AD v1.0 endpoints; assembledhq/143 pull request 35",
    "device": {"expires_in": "600", "interval": "1"}, "tokens": {"expires_in": "3599"},
    "waits": [1]
},
{
    "name": "a short life as a string", "source": "Azure AD v1.0 endpoints",
    "device": {"expires_in": "12"}, "approval": null,
    "code": 4, "words": "error: .*expired", "waits": [5, 5], "rest": 2
},
{
    "name": "an empty verification_uri", "source": "cli/oauth pull request 24",
    "device": {"verification_uri": "", "verification_url": "https://id.example/device"},
    "words": "https://id.example/device"
},
{
    "name": "no access token", "source": "RFC 6749 section 5.1",
    "tokens": {"access_token": null}, "code": 5, "words": "error: .*'access_token'"
},
{
    "name": "an empty error", "source": "dotnet/aspnetcore issue 53457",
    "tokens": {"error": ""}
},
{
    "name": "no refresh token", "source": "RFC 6749 section 5.1",
    "tokens": {"refresh_token": null}, "revoked": false
},
{
    "name": "Entra's word for a denial",
    "source": "learn.microsoft.com: device authorization grant",
    "polls": [[400, {"error": "authorization_declined"}]],
    "code": 4, "words": "error: .*denied in the"
},
{
    "name": "an error of its own",
    "source": "learn.microsoft.com: device authorization grant",
    "polls": [[400, {"error": "bad_verification_code"}]],
    "code": 1, "words": "error: .*bad_verification_code"
},
{
    "name": "another client", "source": "RFC 6749 section 5.2",
    "polls": [[401, {"error": "invalid_client"}]],
    "code": 1, "words": "error: .*invalid_client"
},
{
    "name": "403 with an error", "source": "RFC 6749 section 8.5",
    "polls": [[403, {"error": "mfa_required"}]], "code": 1, "words": "error: .*mfa_required"
},
{
    "name": "302", "source": "a captive portal",
    "faults": [["/oidc/token", "redirect", {"to": "http://portal.invalid/"}]],
    "words": "redirects to http://portal.invalid/: refused; still waiting\n",
    "waits": [5, 10], "told": 1
},
{
    "name": "two runs of trouble", "source": "brandonrc/mobula issue 22",
    "polls": [
        [502, ""], [400, {"error": "slow_down"}],
        [503, ""], [400, {"error": "authorization_pending"}]],
    "waits": [5, 10, 10, 20, 10], "told": 2
},
{
    "name": "401 for the projects: to log in again would go in a circle",
    "source": "RFC 6750", "code": 4, "words": "error: .*401",
    "faults": [["/api/v1beta1/deployments/list-projects", "status", {"status": 401}]]
},
{
    "name": "401 for the new key: to log in again would go in a circle",
    "source": "RFC 6750", "code": 4, "words": "error: .*401",
    "faults": [["/api/v1/api-keys", "status", {"status": 401}]]
}]"""

# What each provider publishes and sends, in short.
KNOWN_PROVIDERS = r"""[
{
    "name": "Microsoft Entra ID, v2.0 endpoints, any tenant, no claim email configured",
    "source": "learn.microsoft.com: device authorization grant, ID token claims reference",
    "configuration": {
        "issuer": "https://login.microsoftonline.com/{tenantid}/v2.0",
        "jwks_uri": "{url}/oidc/keys", "revocation_endpoint": null,
        "http_logout_supported": true, "cloud_instance_name": "microsoftonline.com"},
    "device": {
        "user_code": "GTHKQPMN7", "message": "To sign in, use a web browser to open ...",
        "verification_uri": "https://microsoft.com/devicelogin",
        "verification_uri_complete": null, "expires_in": 900, "interval": 5},
    "polls": [[400, {
        "error": "authorization_pending", "error_codes": [70016],
        "error_description": "AADSTS70016: Authorization is pending.\r\nTrace ID: ..."}]],
    "tokens": {"expires_in": 3599, "ext_expires_in": 3599},
    "claims": {
        "iss": "https://login.microsoftonline.com/aaaabbbb-0000-cccc-1111-dddd2222eeee/v2.0",
        "tid": "aaaabbbb-0000-cccc-1111-dddd2222eeee", "ver": "2.0",
        "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb", "sub": "AAAAAIkzqFVrSaSa",
        "email": null, "preferred_username": "jo@contoso.example"},
    "words": "https://microsoft.com/devicelogin",
    "profile": "jo@contoso.example", "waits": [5, 5], "revoked": 0
},
{
    "name": "Okta, a custom authorization server",
    "source": "developer.okta.com: Device Authorization Grant, OpenID Connect, rate limits",
    "configuration": {
        "issuer": "https://dev-1.okta.com/oauth2/default", "jwks_uri": "{url}/oidc/keys",
        "dpop_signing_alg_values_supported": ["RS256"]},
    "device": {
        "user_code": "BCDFGHJK", "verification_uri": "https://dev-1.okta.com/activate",
        "verification_uri_complete": "https://dev-1.okta.com/activate?user_code=BCDFGHJK",
        "expires_in": 600, "interval": 5},
    "polls": [
        [400, {"error": "authorization_pending"}],
        [429, {"errorCode": "E0000047", "errorSummary": "API call exceeded rate limit"}]],
    "tokens": {"expires_in": 3600},
    "claims": {
        "ver": 1, "sub": "00uid4BxXw6I6TV4m0g3", "amr": ["pwd"], "jti": "ID.4eAW",
        "idp": "00oi5vxJhUQqIJmsS0g4", "preferred_username": "jo@example.com"},
    "words": "  https://dev-1.okta.com/activate.user_code=BCDFGHJK",
    "waits": [5, 5, 10], "told": 1
},
{
    "name": "Auth0",
    "source": "auth0.com/docs: Authentication API, Device Authorization Flow",
    "configuration": {
        "issuer": "https://tenant.auth0.com/", "jwks_uri": "{url}/oidc/keys",
        "mfa_challenge_endpoint": "https://tenant.auth0.com/mfa/challenge"},
    "device": {"expires_in": 900, "interval": 5},
    "polls": [
        [403, {"error": "authorization_pending", "error_description": "User has yet ..."}],
        [429, {"error": "slow_down", "error_description": "You are polling faster ..."}]],
    "tokens": {"expires_in": 86400},
    "claims": {
        "sub": "auth0|5f7c8ec7c33c6c004bbafe82", "nickname": "dev", "sid": "0sXR",
        "updated_at": "2026-01-01T00:00:00.000Z"},
    "waits": [5, 5, 10]
},
{
    "name": "Keycloak, a user without an address",
    "source": "keycloak.org: Securing applications, AccessTokenResponse, IDToken",
    "configuration": {
        "issuer": "https://id.example/realms/llama", "jwks_uri": "{url}/oidc/keys",
        "mtls_endpoint_aliases": {"token_endpoint": "https://mtls.example/token"}},
    "device": {"expires_in": 600, "interval": 5},
    "polls": [[400, {"error": "slow_down", "error_description": "Slow down"}]],
    "tokens": {
        "expires_in": 300, "refresh_expires_in": 0, "not-before-policy": 0,
        "session_state": "c4b5f9d0"},
    "claims": {
        "typ": "ID", "azp": "llamactl-cli", "acr": "1", "sid": "c4b5f9d0",
        "email": null, "email_verified": false, "preferred_username": "jo"},
    "profile": "jo", "waits": [5, 10]
},
{
    "name": "Zitadel, no user info inside the ID token",
    "source": "zitadel.com/docs: Claims in ZITADEL, Device Authorization",
    "configuration": {
        "issuer": "https://llama.zitadel.cloud", "jwks_uri": "{url}/oidc/keys",
        "ui_locales_supported": ["de", "en"]},
    "device": {"expires_in": 300, "interval": 5},
    "polls": [[400, {"error": "authorization_pending"}]],
    "tokens": {"expires_in": 43199},
    "claims": {
        "aud": ["180357174402711809", "llamactl-cli", "180357041636540673"],
        "azp": "llamactl-cli", "client_id": "llamactl-cli", "amr": ["user", "mfa"],
        "sub": "170848145649959169", "email": null, "email_verified": null},
    "profile": "170848145649959169", "waits": [5, 5]
},
{
    "name": "Google",
    "source": "developers.google.com: OAuth 2.0 for TV and Limited-Input Devices",
    "configuration": {
        "issuer": "https://accounts.google.com", "jwks_uri": "{url}/oidc/keys",
        "code_challenge_methods_supported": ["plain", "S256"]},
    "device": {
        "user_code": "GQVQ-JKEC", "verification_url": "https://www.google.com/device",
        "verification_uri": null, "verification_uri_complete": null,
        "expires_in": 1800, "interval": 5},
    "polls": [
        [428, {"error": "authorization_pending", "error_description": "Precondition ..."}],
        [403, {"error": "slow_down", "error_description": "Forbidden"}]],
    "tokens": {"expires_in": 3920},
    "claims": {"azp": "llamactl-cli", "sub": "110169484474386276334", "hd": "example.com"},
    "words": "https://www.google.com/device", "waits": [5, 5, 10]
}]"""


class Providers(DeviceFlow):
    """A login ends as the row says, and a logout leaves nothing of it."""

    def check_rows(self, text, *commands):
        for row in load(text.replace("{url}", self.url)):
            with self.subTest(row.pop("name"), source=row.pop("source")):
                self.check(*commands, **row)
                self.assertEqual(self.cloud.sent("/oidc/keys"), [])

    def test_a_login_with_an_odd_provider(self):
        self.check_rows(QUIRKS)

    def test_two_halves_of_a_login_with_a_known_provider(self):
        self.check_rows(KNOWN_PROVIDERS, "auth login --start", f"{SIGN_IN} --resume")

    def test_a_slash_behind_the_issuer_makes_no_other_user(self):
        for issuer in (f"{self.url}/oidc", f"{self.url}/oidc/"):
            self.cloud.id_token_claims = {"iss": issuer}
            self.succeeds(SIGN_IN)
        self.assertEqual(list(self.profiles()), [USER])


def hear(cloud, path, before=None, after=None):
    """Call BEFORE with each request to a path that begins so, AFTER as it is answered.

    It takes the place of what was to be called so far.
    """

    def receive(request):
        if before and request.path.startswith(path):
            before(request)
        return Cloud.receive(cloud, request)

    def answer(function, request, *segments):
        answered = Cloud.answer(cloud, function, request, *segments)
        if after and request.path.startswith(path):
            after(request)
        return answered

    cloud.receive, cloud.answer = receive, answer


def sending(number):
    """What to do with a request: send this process the signal NUMBER."""
    return lambda request: os.kill(os.getpid(), number)


class LoginOutcomes(NetworkCase):
    def test_a_new_user_gets_a_profile_with_a_key_of_its_own(self):
        self.assertEqual(self.succeeds(SIGN_IN).out, "")
        profile = self.profiles()[USER]
        self.assertEqual(
            [profile[name] for name in "auth_type project_id project_name sub".split()],
            "oidc proj-alpha Alpha user-1".split(),
        )
        self.assertEqual(self.stored()[self.url]["current_profile"], USER)
        record = self.cloud.keys[profile["api_key"]]
        self.assertEqual(profile["api_key_id"], record["id"])
        self.assertEqual(record["name"], f"dev@example.com llamactl on {platform.node()}")
        # the helper that other tests start from stores just what a login stores
        self.with_login()
        self.assertEqual(set(self.profiles()["main"]), set(profile))

    def test_the_same_user_again_gets_new_tokens_and_keeps_the_key(self):
        self.with_login()
        before = self.profiles()["main"]
        self.succeeds("auth login --project proj-beta")
        after = self.profiles().pop("main")
        self.assertEqual(list(self.profiles()), ["main"])
        changed = (
            "access_expires_at access_token org_id project_id project_name refresh_token"
        )
        self.assertEqual(
            sorted(name for name in after if after[name] != before[name]), changed.split()
        )
        self.assertEqual(after["project_id"], "proj-beta")
        self.succeeds(f"{SIGN_IN} --name main")  # it is theirs

    def test_another_user_gets_another_profile(self):
        self.with_login()
        self.cloud.auto_approve = {"sub": "user-2"}
        self.succeeds(SIGN_IN)
        users = {name: profile["sub"] for name, profile in self.profiles().items()}
        self.assertEqual(users, {"main": "user-1", USER: "user-2"})

    def test_a_taken_name_gets_a_number(self):
        self.with_profile(USER)
        self.succeeds(SIGN_IN)
        kinds = {name: each["auth_type"] for name, each in self.profiles().items()}
        self.assertEqual(kinds, {USER: "token", f"{USER}-2": "oidc"})

    def test_org_narrows_the_projects_and_the_only_one_is_chosen(self):
        self.succeeds("auth login --org org-two")
        self.assertEqual(self.profiles()[USER]["project_id"], "proj-beta")

    def test_an_access_token_that_expires_meanwhile_is_refreshed(self):
        """The user thinks about the project longer than the token lives."""
        self.cloud.access_token_lifetime = 1
        self.succeeds(SIGN_IN)
        self.assertEqual((self.cloud.refreshes, self.cloud.reuse_detected), (2, 0))
        profile = self.profiles()[USER]
        self.assertFalse(self.cloud.refresh_tokens[profile["refresh_token"]]["used"])
        self.assertIn(profile["api_key"], self.cloud.keys_alive())

    def test_the_same_sub_at_another_issuer_is_another_user(self):
        for issuer in ("https://elsewhere.example", None):
            self.with_login(issuer=issuer)
            self.succeeds(SIGN_IN)
            self.assertEqual(sorted(self.profiles()), [USER, "main"])

    def test_a_key_profile_does_not_take_the_place_of_a_login(self):
        profile = self.with_login()
        key = self.profiles()["main"]["api_key"]
        self.succeeds("auth token --project proj-alpha --api-key", key)
        self.assertEqual(sorted(self.profiles()), ["llx-0123", "main"])
        self.assertEqual(self.profiles()["main"]["sub"], profile["sub"])

    def test_nor_of_one_that_was_stored_meanwhile(self):
        self.write_store({})
        hear(self.cloud, LIST_PROJECTS, before=lambda request: self.with_login())
        result = self.call(f"auth token --api-key {KEY} --project proj-alpha --name main")
        self.assertIn("profile main is a login", self.error_of(result, 1))

    def test_a_profile_that_is_deleted_during_the_login_stays_so(self):
        self.with_login()
        hear(self.cloud, ME, before=lambda request: self.write_store({}))
        error = self.error_of(self.call(SIGN_IN), 1)
        self.assertIn("was deleted during the login; log in again", error)
        self.assertEqual(self.profiles(), {})

    def test_a_token_of_unknown_lifetime_is_refreshed_once_a_401_says_so(self):
        self.cloud.token_answer = {"expires_in": None}
        self.succeeds(SIGN_IN)
        self.assertIsNone(self.profiles()[USER]["access_expires_at"])
        self.assertEqual(self.cloud.refreshes, 0)
        self.cloud.expire_access_tokens()
        self.succeeds("auth logout", USER)
        self.assertEqual((self.cloud.refreshes, self.cloud.reuse_detected), (1, 0))
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])

    def test_an_echoed_code_is_masked_as_it_was_sent(self):
        code = "dc/CANARY+0123=4567"
        self.cloud.device_answer = {"device_code": code}
        for form in (code, urllib.parse.quote_plus(code)):
            error = {"error": "invalid_grant", "error_description": f"device_code={form}"}
            self.cloud.token_script = [(400, error)]
            self.assertIn("device_code=********", self.fails(SIGN_IN, code=1))
        token = "rt/CANARY-0123456789"  # of an answer that quotes it
        error = {"error": "invalid_grant", "error_description": f"{token} is no use"}
        self.cloud.token_script = [(400, dict(error, access_token=token))]
        self.assertIn("******** is no use", self.fails(SIGN_IN, code=1))

    def test_a_server_without_browser_login_says_so(self):
        for status in (400, 404, 501):
            body = {"detail": "no OIDC here"}
            self.cloud.fault(DISCOVERY, "status", status=status, body=body)
            self.play("""
                $ llamactl auth login
                error: ...: no OIDC here...
                hint: llamactl auth token
                [1]
            """)

    def test_the_client_id_is_the_cli_s_or_the_only_one(self):
        for end, client_ids in (
            (self.succeeds, '{"cli": "llamactl-cli", "web": "w"}'),
            (self.succeeds, '{"other": "llamactl-cli"}'),
            (self.fails, '{"a": "x", "b": "y"}'),
            (self.fails, "{}"),
            (self.fails, "null"),
            (self.fails, '{"cli": 7}'),
        ):
            with self.subTest(client_ids):
                self.cloud.discovery_overrides = {"client_ids": load(client_ids)}
                end(SIGN_IN)


class NothingLeftBehind(NetworkCase):
    """A login that ends without a profile leaves neither a key nor a token alive."""

    def setUp(self):
        super().setUp()
        self.start("key")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.signal(number, lambda *_: None)
            self.addCleanup(signal.signal, number, handler)

    def assert_left(self, *keys, revoked=True):
        """The keys that live beside the two of the stand-in, and whether the login does."""
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY, *keys])
        self.assertEqual([login["revoked"] for login in self.cloud.logins], [revoked])

    def break_store(self, *_):
        """A folder in the place of the store, which nobody can write then."""
        if os.path.isfile(self.store_path):
            os.unlink(self.store_path)
            os.mkdir(self.store_path)

    def test_an_unwritable_store_is_noticed_before_anything_is_sent(self):
        self.break_store()
        self.error_of(self.call(SIGN_IN), 1)
        self.assertEqual(self.cloud.requests, [])

    def test_a_store_that_breaks_after_the_approval(self):
        for path in (LIST_PROJECTS, API_KEYS):
            with self.subTest(path):
                self.start("key")
                hear(self.cloud, path, after=self.break_store)
                self.error_of(self.call(SIGN_IN), 1)
                self.assert_left()
                os.rmdir(self.store_path)

    def test_what_cannot_be_undone_is_named(self):
        hear(self.cloud, API_KEYS, after=self.break_store)
        self.cloud.fault("*", "status", 9, method="DELETE")
        self.cloud.fault(REVOKE, "status", 9)
        said = self.call(SIGN_IN).err
        self.assertRegex(said, "warning: API key .* may still work: .*500")
        self.assertRegex(said, "warning: the refresh token may still be valid: .*500")

    def test_a_login_that_is_refused_after_the_approval(self):
        for settings, options in (
            ({"id_token_claims": {"aud": "another"}}, ""),
            ({"token_answer": {"id_token": None}}, ""),
            ({"projects": []}, ""),
            ({"auto_approve": {"sub": "user-2"}}, " --name main"),
        ):
            with self.subTest(settings), unittest.mock.patch.multiple(
                self.cloud, keys=dict(self.cloud.keys), **settings
            ):
                self.start("login")
                self.fails(SIGN_IN + options, code=1)
                self.assert_left(self.profiles()["main"]["api_key"])
                self.assertEqual(self.cloud.count("POST", API_KEYS), 0)

    def test_ctrl_c_at_the_menu(self):
        with unittest.mock.patch.object(
            llamactl.Terminal, "choose", side_effect=KeyboardInterrupt
        ):
            self.assertEqual(self.call("auth login").code, 130)
        self.assert_left()

    def test_a_key_that_is_made_is_masked_from_then_on(self):
        token = self.with_login()["access_token"]
        hidden = []
        client = llamactl.Client(llamactl.read_process(), hidden.append, str, str, None)
        _, key = llamactl.ControlPlane(client, self.url, token).create_key("title")
        self.assertIn(key, hidden)

    def test_a_key_that_may_have_been_made_is_named_by_its_title(self):
        for kind, options in load("""{
            "truncated": {}, "reset": {}, "html": {}, "not_json": {}, "status": {},
            "wrong_shape": {"body": {}}
        }""").items():
            with self.subTest(kind):
                self.start("key")
                self.cloud.fault(API_KEYS, kind, executed=True, **options)
                result = self.call(SIGN_IN)
                self.assertIn("'dev@example.com llamactl on ", self.error_of(result, 5))
                self.assertIn("hint: delete the key in the web console", result.err)
                self.assertTrue(self.cloud.logins[0]["revoked"])
        self.start("key")
        self.cloud.fault(API_KEYS, "redirect", executed=True)
        named = self.error_of(self.call(SIGN_IN), 1)
        self.assertIn("'dev@example.com llamactl on ", named)
        for status in (400, 403, 404):
            with self.subTest(status=status):
                self.cloud.fault(API_KEYS, "status", status=status)
                self.assertNotIn("llamactl on", self.fails(SIGN_IN, code=1))

    def test_a_key_that_the_server_shows_masked_is_deleted(self):
        made = self.cloud.add_key("llx-CANARY-of-which-only-the-id-is-told")
        answer = {"id": made["id"], "redacted_api_key": "llx-\u2026"}
        self.cloud.fault(API_KEYS, "wrong_shape", body=answer)
        self.fails(SIGN_IN, code=5)
        self.assert_left()

    def assert_interrupted(self, number):
        """A login that a signal ended, but only once it was stored."""
        result = self.call(SIGN_IN)
        self.assertEqual(result.code, 128 + number, result.err)
        self.assertIn("finishing first; please wait\n", result.err)
        self.assert_left(self.profiles()[USER]["api_key"], revoked=False)

    def test_a_signal_waits_until_the_key_that_is_made_is_stored(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number):
                self.start("key")
                hear(self.cloud, API_KEYS, after=sending(number))
                with unittest.mock.patch.object(self.cloud, "keys", dict(self.cloud.keys)):
                    self.assert_interrupted(number)

    def test_signals_wait_for_the_lock_too_however_many(self):
        with contextlib.ExitStack() as lock:

            def signal_twice():
                for _ in "12":
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.1)
                lock.close()

            def hold_the_lock(request):
                lock.enter_context(locked(self.store_path + ".lock"))
                threading.Timer(0.1, signal_twice).start()

            hear(self.cloud, API_KEYS, after=hold_the_lock)
            self.assert_interrupted(signal.SIGTERM)

    def test_a_poll_that_fails_does_not_swallow_a_signal(self):
        self.cloud.fault(TOKEN, "close", 99)
        hear(self.cloud, TOKEN, before=sending(signal.SIGTERM))
        result = self.call(SIGN_IN)
        self.assertEqual(result.code, 143)
        self.assertIn("\nerror: ", result.err)

    def test_a_signal_at_each_line_between_the_approval_and_the_menu(self):
        """The refresh token is revoked, wherever the signal comes."""
        self.cloud.token_answer = {"id_token": "not one"}  # which ends the login
        names = ("wait_for_approval", "finish_login", "poll_for_tokens", "read_tokens")
        places = set()

        def trace(frame, event, _):
            if frame.f_code.co_name not in names:
                return None
            place = (frame.f_code.co_name, frame.f_lineno)
            source = linecache.getline(llamactl.__file__, frame.f_lineno)
            if sys.exc_info()[0] or source.lstrip().startswith("with "):
                return trace  # Python itself is leaving the block
            is_approved = self.cloud.logins and not self.cloud.logins[-1]["revoked"]
            if event == "line" and is_approved and place not in places:
                places.add(place)
                raise llamactl.Interrupted(signal.SIGTERM)
            return trace

        while True:  # each time at the next line, until there is none
            count = len(places)
            del self.cloud.logins[:]
            sys.settrace(trace)
            try:
                code = self.call(SIGN_IN).code
            finally:
                sys.settrace(None)
            self.assert_left()
            if len(places) == count:
                break
            self.assertEqual(code, 143)
        self.assertGreater(count, 3)

    def test_of_two_logins_of_one_user_at_once_one_key_is_left(self):
        """Both make one; who stores second keeps the stored one."""
        both = threading.Barrier(2, timeout=15)
        hear(self.cloud, API_KEYS, before=lambda r: r.method == "POST" and both.wait())
        processes = [self.spawn(SIGN_IN) for _ in "12"]
        for process in processes:
            out, err = process.communicate(timeout=30)
            self.assertEqual(self.note(process.returncode, out, err)[:2], (0, ""), err)
        profile = self.profiles()[USER]
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY, profile["api_key"]])
        self.assertEqual(self.cloud.keys[profile["api_key"]]["id"], profile["api_key_id"])
        kept = self.cloud.refresh_tokens[profile["refresh_token"]]["login"]
        alive = [login for login in self.cloud.logins if not login["revoked"]]
        self.assertEqual(alive, [kept])

    def test_a_login_revokes_the_token_that_it_replaces_at_its_own_provider_alone(self):
        old = self.with_login()["refresh_token"]
        url = self.other.url + REVOKE  # of one that claims to be the same
        self.cloud.configuration_overrides = {"revocation_endpoint": url}
        self.succeeds(SIGN_IN)
        self.assertEqual(self.other.cloud.requests, [])
        new = self.profiles()["main"]["refresh_token"]
        logins = [self.cloud.refresh_tokens[token]["login"] for token in (old, new)]
        self.assertEqual([login["revoked"] for login in logins], [True, False])

    def test_a_replaced_token_that_cannot_be_revoked_is_warned_about(self):
        self.with_login()
        self.cloud.fault(REVOKE, "status")
        result = self.succeeds(SIGN_IN)
        self.assertIn("warning: the refresh token may still be valid", result.err)


class LogoutOfALogin(NetworkCase):
    def logout(self, code=0):
        """Log out of `main`, which is gone then whatever the server says."""
        result = self.call("auth logout main")
        self.assertEqual(result.code, code, result.err)
        self.assertEqual(self.profiles(), {})
        return result

    def assert_key_named(self):
        named = f"API key {KEY_ID} (…0123) may still work"
        self.assertIn(named, self.error_of(self.logout(1)))

    def test_a_token_that_the_server_quotes_is_masked(self):
        body = {"detail": self.with_login()["access_token"]}
        self.cloud.fault(f"{API_KEYS}/{KEY_ID}", "status", status=400, body=body)
        self.assertIn("answered 400: ********", self.error_of(self.logout(1)))

    def test_rotation_reaches_the_disk_before_the_new_token_is_used(self):
        self.with_login(expired=True)
        on_disk = []
        hear(self.cloud, API_KEYS, lambda _: on_disk.append(self.profiles()["main"]))
        self.logout()
        (profile,) = on_disk
        (deletion,) = self.cloud.sent(f"{API_KEYS}/{KEY_ID}")
        self.assertEqual(
            deletion.headers["authorization"], "Bearer " + profile["access_token"]
        )
        self.assertEqual((self.cloud.refreshes, self.cloud.reuse_detected), (1, 0))
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])
        # what is revoked is the new token, and with it the login
        self.assertIn(profile["refresh_token"], self.cloud.sent(REVOKE)[0].body)

    def test_a_gateway_does_not_say_that_the_key_is_gone(self):
        """Only the server does, which answers in JSON or with nothing."""
        for status, page in (
            (200, "<html>Not here</html>"),
            (404, "<html>Not here</html>"),
            (404, "default backend - 404"),
        ):
            with self.subTest(status=status, page=page):
                self.with_login()
                key_path = f"{API_KEYS}/{KEY_ID}"
                self.cloud.fault(key_path, "status", status=status, body=page)
                self.cloud.fault(ME, "status", status=401, body=page)
                self.assert_key_named()

    def test_revoking_has_a_time_of_its_own(self):
        self.with_login()
        self.patch(KEY_TIMEOUT=0.2)
        self.cloud.fault(f"{API_KEYS}/{KEY_ID}", "silence")
        result = self.logout(1)
        self.assertNotIn("refresh token", result.err)
        self.assertEqual(len(self.cloud.sent(REVOKE)), 1)

    def test_a_signal_meanwhile_does_not_hide_a_key_that_may_still_work(self):
        self.with_login()
        self.cloud.fault(f"{API_KEYS}/{KEY_ID}", "status")
        hear(self.cloud, API_KEYS, before=sending(signal.SIGTERM))
        result = self.call("auth logout main")
        self.assertEqual(result.code, 143)
        self.assertRegex(result.err, f"error: profile main: API key {KEY_ID} .*may still")

    def test_a_login_without_access_token_is_refreshed(self):
        self.with_login(access_token=None, access_expires_at=None)
        self.logout()
        self.assertEqual(self.cloud.refreshes, 1)
        self.assertEqual(self.cloud.keys_alive(), [KEY, OTHER_KEY])

    def test_a_key_whose_id_is_not_known_is_named_by_its_end(self):
        self.with_login(api_key_id=None)
        error = self.error_of(self.logout(1))
        self.assertIn("API key (id unknown) (…0123) may still work", error)

    def test_a_token_that_was_just_refreshed_is_not_refreshed_again(self):
        self.with_login(expired=True)
        self.cloud.fault(f"{API_KEYS}/{KEY_ID}", "status", status=401, body={})
        self.assert_key_named()
        self.assertEqual(self.cloud.refreshes, 1)

    def test_a_signal_that_was_ignored_at_the_start_stays_ignored(self):
        self.addCleanup(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.with_login()
        hear(self.cloud, API_KEYS, before=sending(signal.SIGTERM))
        self.assertEqual(self.logout().err, "profile main deleted\n")

    def test_a_signal_at_a_later_profile_does_not_hide_the_key_of_an_earlier_one(self):
        self.with_login()
        profile = self.profiles()["main"]
        other = dict(profile, api_key_id="key-of-another", api_key=OTHER_KEY)
        self.write_store({"main": profile, "other": other}, "main")
        self.cloud.fault(f"{API_KEYS}/{KEY_ID}", "status")
        later = f"{API_KEYS}/key-of-another"
        hear(self.cloud, later, before=sending(signal.SIGTERM))
        result = self.call("auth logout --all")
        self.assertEqual((result.code, self.profiles()), (143, {}))
        self.assertRegex(result.err, f"error: profile main: API key {KEY_ID} .*may still")

    def test_a_login_without_its_provider_sends_nothing_to_any(self):
        """It is of an older store; its access token may still do."""
        for expired in (False, True):
            with self.subTest(expired=expired):
                self.cloud.reset()
                self.with_login(expired=expired, provider=None)
                result = self.logout(int(expired))
                self.assertIn("stored without its identity provider", result.err)
                self.assertEqual(KEY_ID in result.err, expired)
                self.assertEqual(self.cloud.sent(TOKEN) + self.cloud.sent(REVOKE), [])

    def test_an_echoed_refresh_token_is_masked_as_it_was_sent(self):
        token = "rt/CANARY+0123=4567"
        for form in (token, urllib.parse.quote_plus(token)):
            self.with_login(expired=True, refresh_token=token)
            body = {"error_description": f"refresh_token={form}"}
            self.cloud.fault(TOKEN, "status", status=400, body=body)
            self.assertIn("refresh_token=********", self.error_of(self.logout(1)))

    def test_a_rotated_token_that_cannot_be_stored_keeps_no_profile(self):
        self.with_login(expired=True)
        save = llamactl.Store.save
        trouble = [OSError(errno.ENOSPC, "No space left on device")]

        def full_once(store, data):
            if data["environments"][self.url]["profiles"] and trouble:
                raise trouble.pop()
            save(store, data)

        with unittest.mock.patch.multiple(
            llamactl.Store, check_writable=llamactl.Store.load, save=full_once
        ):
            self.assert_key_named()
        self.assertEqual(trouble, [])
        self.assertEqual(self.cloud.sent(f"{API_KEYS}/{KEY_ID}"), [])

    def test_a_refresh_that_fails_is_not_sent_twice(self):
        """A 401 is the provider's here, which says nothing of the access token."""
        unknown = {"status": 401, "body": {"error": "invalid_client"}}
        for kind, options in (("truncated", {}), ("status", unknown)):
            with self.subTest(kind):
                self.start("expired")
                self.cloud.fault(TOKEN, kind, 9, **options)
                self.assert_key_named()
                self.assertEqual(self.cloud.count("POST", TOKEN), 1)

    def test_a_key_that_was_deleted_elsewhere_is_no_problem(self):
        """Nor is it that the login's own tokens are of no use any more."""
        self.with_login(expired=True)
        self.cloud.fault(TOKEN, "status", status=400, body={"error": "invalid_grant"})
        del self.cloud.keys[self.profiles()["main"]["api_key"]]
        self.assertNotIn("may still work", self.logout().err)


class RequestCounts(NetworkCase):
    """No request is sent that a command can do without."""

    def check(self, start, table):
        """Each line of TABLE is a command, and after `|` the requests that it sends."""
        for line in table.strip().splitlines():
            command, *requests = line.strip().split(" | ")
            with self.subTest(command):
                self.start(start)
                self.succeeds(*shlex.split(command))
                self.assertEqual(self.paths_sent(), requests)

    def test_of_commands(self):
        self.check(
            "key",
            f"""
            auth token --api-key {OTHER_KEY} --project proj-beta | GET {LIST_PROJECTS}
            auth token --api-key {OTHER_KEY} --project proj-beta --no-verify
            projects get | GET {LIST_PROJECTS}
            projects get proj-alpha | GET {LIST_PROJECTS}
            projects use proj-beta | GET {LIST_PROJECTS}
            auth status | GET {LIST_PROJECTS} | GET {ME}
            auth status --offline
            auth get
            auth get main -o json
            auth use main
            config
            environments get
            environments use {self.url}
            environments add {self.url} | GET {VERSION}
            environments add {self.url} --no-verify
            organizations get | GET {VERSION} | GET {ORGANIZATION_LIST}
            deployments get | GET {CONTROL}
            deployments get invoices | GET {CONTROL}/invoices
            auth inject --env-file {shlex.quote(self.home)}/new.env
            auth logout main
            environments delete {self.url}
            """,
        )

    def test_of_logouts(self):
        end = f"DELETE {API_KEYS}/{KEY_ID} | POST {REVOKE}"
        self.check("login", f"auth logout main | {end}")
        self.check("expired", f"auth logout main | POST {TOKEN} | {end}")

    def test_of_logins(self):
        login = (
            f"{SIGN_IN} | GET {DISCOVERY} | GET {CONFIGURATION} | POST {DEVICE_CODE}"
            f" | POST {TOKEN} | GET {LIST_PROJECTS}"
        )
        self.check("key", f"{login} | POST {API_KEYS}")
        self.check("login", f"{login} | GET {ME} | POST {REVOKE}")
        hear(
            self.cloud, TOKEN, lambda _: self.cloud.keys.pop("llx-CANARY-of-the-login-0123")
        )
        self.check("login", f"{login} | GET {ME} | POST {API_KEYS} | POST {REVOKE}")


# ========================================================================================
# commands: one class a command: argv, environment, stdin -> exit code, stdout, stderr
# ========================================================================================


class AuthToken(CommandCase):
    """A profile from an API key, which the server is asked about first."""

    def test_a_key_and_a_project_make_a_current_profile_without_a_question(self):
        result = self.play(
            f"""
            $ llamactl auth token --api-key {KEY} --project proj-beta
            profile llx-wxyz is current, project Beta (proj-beta)
            next: ...
            """,
            terminal=True,
        )
        self.assertEqual(result.out, "")
        self.assertEqual(self.requests(), [("GET", LIST_PROJECTS)])
        self.play(f"""
            $ llamactl config
            ENVIRONMENT...  PROFILE   PROJECT_ID  PROJECT_NAME
            {self.url}  llx-wxyz  proj-beta   Beta
        """)

    def test_ways_to_give_a_key_each_stripped(self):
        padded = f" \t{KEY}\r\n".encode()
        path = self.key_file(b"\xef\xbb\xbf" + padded)
        for way in (
            f"--api-key {KEY}",
            f"--api-key={KEY}",
            "--api-key -",
            "--api-key=-",
            "--api-key-file -",
            f"--api-key-file {path}",
        ):
            with self.subTest(way):
                self.write_store({})
                stdin = padded if way.endswith("-") else b""
                self.done(f"auth token --project-id proj-alpha {way}", stdin=stdin)
                self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)

    def test_a_key_from_a_named_pipe_is_waited_for(self):
        path = os.path.join(self.home, "pipe")
        os.mkfifo(path)
        subprocess.run(f"echo {KEY} > pipe &", shell=True, cwd=self.home, check=True)
        self.done(f"auth token --api-key-file {path} --project proj-alpha")
        self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)

    def test_a_key_comes_from_an_inherited_descriptor(self):
        skip_without_paths_of_descriptors()
        with open(self.key_file(KEY.encode())) as file:
            path = f"/dev/fd/{file.fileno()}"
            self.done(f"auth token --api-key-file {path} --project proj-alpha")
        self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)

    def test_failures_store_nothing(self):
        self.cloud.add_key(OTHER_KEY, projects=[])
        before = self.store_text()
        self.play(f"""
            $ llamactl auth token
            error: no API key given, and no terminal to ask on; use --api-key-file...
            hint: llamactl auth token --api-key-file PATH --project ID
            [2]
            $ llamactl auth token --project proj-alpha
            error: ...--api-key...
            hint: llamactl auth token --api-key-file PATH --project ID
            [2]
            $ llamactl auth token --api-key {KEY}
            error: ...--project: proj-alpha (Alpha), proj-beta (Beta)
            [2]
            $ llamactl auth token --api-key llx-CANARY-unknown-key
            error: ...rejected: ...401...req-...
            hint: create a key in the web console...
            [4]
            $ llamactl auth token --api-key {KEY} --project nope
            error: ...nope...proj-alpha...proj-beta...
            [1]
            $ llamactl auth token --api-key {OTHER_KEY}
            error: no project...
            [1]
            $ llamactl auth token --api-key {KEY} --api-key-file x
            error: --api-key and --api-key-file exclude each other
            [2]
            $ llamactl auth token --api-key-file /nowhere/at/all --project p
            error: .../nowhere/at/all...
            [1]
            $ llamactl auth token --api-key {KEY} --no-verify
            error: --no-verify needs a key and --project ID
            [2]
            $ llamactl auth token --no-verify --project p
            error: --no-verify needs a key and --project ID
            [2]
            $ llamactl auth token --api-key {KEY} --name=-x --project p
            error: --name...
            [2]
            $ llamactl auth token --api-key {KEY} --project a\u00e9
            error: ...not found...
            [1]
            $ llamactl auth token --api-key {KEY} --project a\u00e9 --no-verify
            error: --project...
            [2]
            $ llamactl auth token --api-key
            error: ...--api-key...
            hint: llamactl auth token --help
            [2]
        """)
        self.assertEqual(self.store_text(), before)

    def test_a_key_is_stored_unverified_where_no_server_answers(self):
        self.url = NOWHERE
        self.write_store({})
        self.play(f"""
            $ llamactl auth token --api-key {KEY}
            error: ...refused...
            ...
            [5]
            $ llamactl auth get -o json
            []
            ...
            hint: ...
            $ llamactl auth token --api-key {KEY} --project proj-alpha
            warning: the key and the project id proj-alpha are stored unverified: ...
            ...llx-wxyz...proj-alpha
            next: ...
        """)
        self.write_store({}, requires_auth=False)
        self.play("""
            $ llamactl auth token --project proj-alpha
            error: ...refused...
            ...
            [5]
        """)
        self.assertEqual(self.profiles(), {})

    def test_no_verify_sends_nothing(self):
        self.play("""
            $ llamactl auth token --api-key llx-CANARY-never-seen --project p --no-verify
            ...llx-seen...project p
            next: ...
        """)
        self.assertEqual(self.requests(), [])

    def test_the_only_project_of_an_organization_is_chosen(self):
        self.play(f"""
            $ llamactl auth token --no-verify --project proj-alpha
            error: --no-verify needs a key and --project ID
            [2]
            $ llamactl auth token --api-key {KEY} --org typo --project Alpha
            error: no project found; create one in the web console ...
            [1]
            $ llamactl auth token --api-key {KEY} --org org-two
            ...llx-wxyz...Beta (proj-beta)
            next: ...
            $ llamactl auth token --api-key {KEY} --org org-one
            ...llx-wxyz-2...Alpha (proj-alpha)
            next: ...
        """)

    def test_an_environment_without_auth_needs_no_key(self):
        self.cloud.requires_auth = False
        self.write_store({}, requires_auth=False)
        self.play(f"""
            $ llamactl auth token --project proj-alpha
            profile proj-alpha is current, project Alpha (proj-alpha)
            $ llamactl auth get
            NAME        API_URL...  PROJECT_ID  ACTIVE  AUTH
            proj-alpha  {self.url}  proj-alpha  yes     none
            $ llamactl auth inject --env-file -
            error: ...API key...
            hint: llamactl auth token
            [4]
            $ llamactl auth login
            error: ...login...
            hint: llamactl auth token --project ID
            [1]
            $ llamactl environments add {self.url}/
            environment {self.url} is current; profile proj-alpha
            $ llamactl auth logout proj-alpha
            profile proj-alpha deleted
            $ llamactl environments add {self.url}
            environment {self.url} is current; next: llamactl auth token
        """)
        self.assertEqual(bearers(self.cloud.requests), {"none"})
        self.play("""
            $ llamactl auth token --no-verify --project proj-beta
            profile proj-beta is current, project proj-beta
        """)

    def test_an_environment_that_asks_for_a_key_from_now_on(self):
        self.write_store({}, requires_auth=False)
        add = f"llamactl environments add {self.url}"
        self.play(f"""
            $ llamactl projects get
            error: ...401...
            hint: {add}
            [4]
            $ llamactl auth status
            ...
            hint: {add}
            [4]
            $ llamactl auth token --project proj-alpha
            error: an API key is needed: ...401...
            hint: {add}
            [4]
        """)

    def test_variables_are_no_source_of_a_new_profile(self):
        other = "LLAMA_CLOUD_BASE_URL=https://other.example/"
        self.play(f"""
            $ LLAMA_CLOUD_API_KEY={KEY} LLAMA_AGENTS_PROJECT_ID=p llamactl auth token
            error: ...--api-key...
            hint: llamactl auth token --api-key-file PATH --project ID
            [2]
            $ {other} llamactl auth token --project proj-alpha
            error: LLAMA_CLOUD_BASE_URL is not the current environment, {self.url}
            hint: llamactl environments add https://other.example
            [2]
            $ {other} llamactl auth login --project proj-alpha
            error: LLAMA_CLOUD_BASE_URL is not the current environment, {self.url}
            hint: llamactl environments add https://other.example
            [2]
        """)
        self.assertEqual((self.profiles(), self.requests()), ({}, []))
        for words in (
            f"LLAMA_CLOUD_BASE_URL={self.url}/ llamactl",
            f"{other} LLAMA_CLOUD_USE_PROFILE=1 llamactl",
        ):
            self.play(f"""
                $ {words} auth token --api-key {KEY} --project proj-alpha
                ...llx-wxyz...
                next: ...
                $ {words} auth login --project proj-alpha
                ...
                ...dev@example.com...
                next: ...
            """)


class AuthLogin(CommandCase):
    """A profile from a login in a browser on any device, at once or in two halves."""

    def test_start_prints_what_a_person_needs_and_resume_finishes(self):
        started = load(self.done("auth login --start -o json").out)
        self.assertIn(started["user_code"], self.cloud.pending())
        self.assertLess(abs(started["expires_at"] - time.time() - 600), 60)
        self.cloud.expires_in = 3000
        page = f"{self.url}/oidc/device"
        self.play(f"""
            $ llamactl auth login --start -o yaml
            verification_uri: {page}
            verification_uri_complete: "{page}?user_code=...-..."
            user_code: ...-...
            expires_at: ...
            interval: 0.01
            finish with: llamactl auth login --resume
            $ llamactl auth login --start
            FIELD                      VALUE
            verification_uri           {page}
            verification_uri_complete  {page}?user_code=...-...
            user_code                  ...-...
            expires_in                 50 min
            finish with: llamactl auth login --resume
        """)
        self.assertEqual(self.cloud.count("POST", "/oidc/token"), 0)
        self.play(f"""
            $ llamactl auth login --resume --project proj-beta --name work
            logged in as dev@example.com (profile work), project Beta (proj-beta)
            next: ...
            $ llamactl auth get
            NAME  API_URL...  PROJECT_ID  ACTIVE  AUTH
            work  {self.url}  proj-beta   yes     oidc
            $ llamactl auth login --resume
            error: no login is waiting
            hint: llamactl auth login --start
            [2]
        """)

    def test_resume_shows_the_code_to_whom_sees_it_and_opens_no_browser(self):
        code = load(self.done("auth login --start -o json").out)["user_code"]
        command = "auth login --resume --project proj-alpha"
        with unittest.mock.patch("webbrowser.get") as browser:
            result = self.call(command, terminal=True, env={"DISPLAY": ":9"})
        self.assertEqual((result.code, browser.call_count), (0, 0), result.err)
        self.assertIn(code, result.err)

    def test_start_replaces_what_waited(self):
        self.done("auth login --start")
        second = load(self.done("auth login --start -o json").out)["user_code"]
        self.cloud.auto_approve = None
        self.cloud.approve(second)
        self.done("auth login --resume --project proj-alpha")

    def test_what_waits_is_forgotten_by_a_logout_of_all(self):
        self.done("auth login --start")
        self.done("auth logout --all --yes")
        self.assertIsNone(self.stored()[self.url]["login"])
        self.assertEqual(self.call("auth login --resume").code, 2)

    def test_a_gateway_s_no_leaves_what_waits(self):
        self.done("auth login --start")
        page = "<html>Blocked</html>"
        for status in (403, 404, 302):
            self.cloud.fault("/oidc/token", "status", status=status, body=page)
        self.done("auth login --resume --project proj-alpha")

    def test_nobody_is_asked_who_the_provider_is(self):
        self.done("auth login --start")
        self.cloud.reset()
        elsewhere = "https://elsewhere.invalid"
        self.cloud.configuration_overrides = {"issuer": elsewhere}
        self.cloud.discovery_overrides = {"discovery_url": elsewhere}
        self.cloud.id_token_claims = {"iss": f"{self.url}/oidc"}
        self.done("auth login --resume --project proj-alpha")
        self.assertEqual(self.requests()[0], ("POST", "/oidc/token"))

    def play_the_end(self, word):
        self.play(f"""
            $ llamactl auth login --resume
            error: ...{word}...
            ...
            [4]
            $ llamactl auth login --resume
            error: ...waiting
            hint: llamactl auth login --start
            [2]
        """)

    def test_the_end_of_a_login_drops_what_waited(self):
        for error, word in (("access_denied", "denied"), ("expired_token", "expired")):
            self.done("auth login --start")
            self.cloud.token_script = [(400, {"error": error})]
            self.play_the_end(word)
        self.done("auth login --start")
        waiting = self.stored()[self.url]["login"]
        self.write_store({}, login=dict(waiting, expires_at=int(time.time()) - 1))
        self.cloud.token_script = [(400, {"error": "expired_token"})]
        self.play_the_end("expired")

    def test_the_clock_was_set_while_a_login_waited(self):
        for wrong in (-4000, 4000, 10**6):
            self.done("auth login --start")
            waiting = self.stored()[self.url]["login"]
            expires_at = int(time.time()) + wrong
            self.write_store({}, login=dict(waiting, expires_at=expires_at))
            self.done("auth login --resume --project proj-beta")

    def test_a_known_user_s_project_is_the_default(self):
        self.login("--project proj-beta")
        self.play(f"""
            $ llamactl auth login --no-browser --org typo
            ...
            ...dev@example.com...Beta (proj-beta)
            error: no project found...
            hint: llamactl projects use ID
            [2]
            $ llamactl auth login --no-browser --project Typo
            ...
            ...dev@example.com...Beta (proj-beta)
            error: ...Typo...proj-alpha...proj-beta...
            hint: llamactl projects use ID
            [2]
            $ llamactl auth login --no-browser
            ...
            ...dev@example.com...Beta (proj-beta)
            next: ...
            $ llamactl config
            ...
            {self.url}  dev@example.com  proj-beta   Beta
        """)
        self.play(
            """
            $ llamactl auth login --no-browser
            ...
            ...1  Alpha (proj-alpha)
            *   2  Beta (proj-beta)
            Project, by number or name [Beta]: ...dev@example.com...Beta (proj-beta)
            next: ...
            """,
            stdin=b"\n",
            terminal=True,
        )

    def test_quiet_hides_the_countdown(self):
        for flags, shown in (("", True), (" --quiet", False)):
            result = self.login(f"--project proj-alpha{flags}", terminal=True)
            self.assertEqual(" left" in result.err, shown)

    def test_quiet_shows_code_and_address(self):
        result = self.play(f"""
            $ llamactl auth login --no-browser --quiet --project proj-alpha
            ...
            ...{self.url}/oidc/device on any device...
            ...-...
            ...
            {self.url}/oidc/device?user_code=...-...
        """)
        self.assertEqual(result.out, "")

    def test_failures(self):
        self.play("""
            $ llamactl auth login --start --resume
            error: --start takes only -o; the rest is for --resume
            [2]
            $ llamactl auth login --start --org org-one
            error: --start takes only -o; the rest is for --resume
            [2]
            $ llamactl auth login --start --project proj-alpha
            error: --start takes only -o; the rest is for --resume
            [2]
            $ llamactl auth login --start --name a
            error: --start takes only -o; the rest is for --resume
            [2]
            $ llamactl auth login -o json
            error: -o is for --start, which prints the code
            [2]
            $ llamactl auth login --resume -o yaml
            error: -o is for --start, which prints the code
            [2]
            $ llamactl auth login --name=-x
            error: --name...
            [2]
        """)
        self.cloud.browser_login = False
        self.play("""
            $ llamactl auth login
            error: ...not configured...
            hint: llamactl auth token
            [1]
        """)
        self.assertEqual(self.profiles(), {})

    def test_no_project_anywhere(self):
        self.cloud.projects = []
        for flag in ("", " --org typo"):
            self.play(f"""
                $ llamactl auth login --no-browser{flag}
                ...
                error: no project found; create one in the web console...https://...
                [1]
            """)
        self.assertEqual(self.profiles(), {})

    def test_an_approval_is_never_wasted_on_a_project(self):
        for words, error in (("", "--project"), (" --project nope", "nope")):
            self.write_store({})
            self.play(f"""
                $ llamactl auth login --no-browser{words}
                ...
                ...dev@example.com, project none
                error: ...{error}...proj-alpha (Alpha), proj-beta (Beta)
                hint: llamactl projects use ID
                [2]
                $ llamactl auth inject --env-file -
                error: ...project...
                hint: llamactl projects use ID
                [2]
                $ llamactl deployments get
                error: ...project...
                hint: llamactl projects use ID
                [2]
                $ llamactl projects use proj-beta
                ...Beta (proj-beta)
                $ llamactl config
                ...
                {self.url}  dev@example.com  proj-beta   Beta
            """)


class AuthGet(CommandCase):
    """The profiles of the current environment, read and nothing else."""

    def test_profiles_of_the_current_environment(self):
        self.with_profile()
        self.done(f"auth token --api-key {KEY} --project proj-beta")
        self.play(f"""
            $ llamactl auth get
            NAME      API_URL...  PROJECT_ID  ACTIVE  AUTH
            llx-wxyz  {self.url}  proj-beta   yes     token
            main      {self.url}  proj-alpha  no      token
            $ llamactl auth get -o yaml
            - name: llx-wxyz
              api_url: {self.url}
              project_id: proj-beta
              active: true
              auth_type: token
            - name: main
              api_url: {self.url}
              project_id: proj-alpha
              active: false
              auth_type: token
        """)
        self.assertEqual(self.rows("auth get main"), self.rows("auth get")[1])
        self.play(f"""
            $ llamactl environments add {NOWHERE} --no-verify
            environment ...
            $ llamactl auth get -o json
            []
            ...
            hint: ...
            $ llamactl auth get main
            error: ...main...
            ...
            [1]
        """)

    def test_no_profile(self):
        self.play("""
            $ llamactl auth get -o json
            []
            no profile found
            hint: llamactl auth login
        """)
        self.assertEqual(self.rows("auth get"), [])
        open(os.path.join(self.folder, "profiles.db"), "w").close()
        self.play("""
            $ llamactl auth get
            ...
            hint: llamactl auth import --from-official
        """)

    def test_a_read_creates_nothing(self):
        shutil.rmtree(self.folder)
        for words in ("auth get", "config", "environments get"):
            self.done(words)
        self.assertFalse(os.path.exists(self.folder))


class AuthUse(CommandCase):
    """Another profile is current from now on."""

    def test_use(self):
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "p"}
        self.write_store({"a": profile, "b": profile}, "a")
        self.play(f"""
            $ llamactl auth use b
            profile b is current
            $ llamactl auth use
            error: ...NAME: a, b
            [2]
            $ llamactl auth use c
            error: ...c...a, b
            hint: llamactl auth get
            [1]
            $ llamactl auth use a b
            error: ...argument...
            hint: llamactl auth use --help
            [2]
            $ llamactl config
            ...
            {self.url}  b        p           -
        """)
        self.assertEqual(self.requests(), [])

    def test_another_process_switches_the_environment_meanwhile(self):
        self.with_profile()
        self.done(f"environments add {NOWHERE} --no-verify")
        before = self.stored()

        def switch(*_):
            data = {"version": 1, "current_environment": NOWHERE, "environments": left}
            with open(self.store_path, "w") as file:
                json.dump(data, file)
            return "main"

        hear(self.cloud, LIST_PROJECTS, after=switch)
        for words in ("auth use", "projects use proj-beta"):
            for left, code in ((before, 0), ({NOWHERE: before[NOWHERE]}, 1)):
                with self.subTest(words=words, code=code):
                    self.with_profile()
                    with unittest.mock.patch.object(llamactl.Terminal, "choose", switch):
                        result = self.call(words)
                    self.assertEqual(result.code, code, result.err)
                    self.assertEqual(self.stored()[NOWHERE], before[NOWHERE])
                    self.assertEqual(len(self.stored()), 2 - code)
        self.assertRegex(result.err, f"^error: {self.url} has no profile main")

    def test_nothing_to_use(self):
        self.play("""
            $ llamactl auth use
            error: not logged in...
            hint: llamactl auth login
            [4]
            $ llamactl auth use x
            error: ...x...
            hint: llamactl auth login
            [1]
        """)
        self.write_store({}, requires_auth=False)
        for verb in ("use", "logout"):
            self.play(f"""
                $ llamactl auth {verb}
                error: {self.url} has no profile
                hint: llamactl auth token --project ID
                [4]
            """)

    def test_projects_of_an_environment_without_auth(self):
        self.write_store({"a": {"auth_type": "none"}}, requires_auth=False)
        self.play("""
            $ llamactl projects use Alpha
            error: no profile given; choose one with --profile: a
            [2]
        """)
        self.cloud.requires_auth = False
        profile = {"auth_type": "none", "api_key": "", "project_id": "proj-alpha"}
        self.write_store({"a": profile}, "a", requires_auth=False)
        self.done("projects get")  # an empty key, as an editor may leave it, is none


class AuthLogout(CommandCase):
    """A profile goes, and what a login left on the server with it."""

    def test_a_token_profile_goes_without_a_request(self):
        self.with_profile()
        self.done(f"auth token --api-key {KEY} --project proj-beta --name b")
        self.cloud.reset()
        self.play(f"""
            $ llamactl auth logout
            error: ...NAME: b, main
            [2]
            $ llamactl auth logout main --all
            error: NAME and --all exclude each other
            [2]
            $ llamactl auth get main --all
            error: NAME and --all exclude each other
            [2]
            $ llamactl auth logout main
            profile main deleted
            $ llamactl auth get
            NAME  API_URL...  PROJECT_ID  ACTIVE  AUTH
            b     {self.url}  proj-beta   yes     token
            $ llamactl auth logout b
            profile b deleted
            $ llamactl auth logout b
            error: ...b...
            ...
            [1]
            $ llamactl auth logout
            error: not logged in...
            hint: llamactl auth login
            [4]
            $ llamactl auth inject --env-file -
            error: not logged in...
            hint: llamactl auth login
            [4]
        """)
        self.assertIsNone(self.stored()[self.url]["current_profile"])
        self.assertEqual(self.requests(), [])
        self.assertNotIn(CANARY, self.store_text())

    def test_a_profile_that_goes_meanwhile_is_logged_out(self):
        self.with_profile()

        def go_and_choose(*_):
            self.write_store({})
            return "main"

        with unittest.mock.patch.object(llamactl.Terminal, "choose", go_and_choose):
            self.done("auth logout")

    def test_all_is_every_profile_of_every_environment(self):
        self.with_profile()
        first = self.url
        token = f"auth token --api-key {KEY} --project p --no-verify --name main"
        self.play(f"""
            $ llamactl environments add {NOWHERE} --no-verify
            environment ...
            $ llamactl {token}
            ...
            next: ...
            $ llamactl auth logout main
            profile main deleted
        """)
        self.assertEqual(self.stored()[first]["current_profile"], "main")
        self.assertIsNone(self.stored()[NOWHERE]["current_profile"])
        self.play(f"""
            $ llamactl {token}
            ...
            next: ...
            $ llamactl auth logout --all
            profile main deleted
            profile main deleted
            $ llamactl auth get --all -o json
            []
            ...
            hint: ...
            $ llamactl auth logout --all
        """)
        self.assertNotIn(CANARY, self.store_text())

    def test_a_login_is_ended_on_the_server(self):
        self.login("--project proj-alpha")
        made = self.profiles()["dev@example.com"]["api_key"]
        self.play("""
            $ llamactl auth logout dev@example.com
            profile dev@example.com deleted
        """)
        self.assertNotIn(made, self.cloud.keys_alive())
        self.assertTrue(self.cloud.logins[0]["revoked"])
        self.assertEqual(self.profiles(), {})

    def test_a_key_that_may_still_work_is_named(self):
        for words, left in (
            ("auth logout dev@example.com", [["main"]]),
            ("auth logout --all", [[]]),
            (f"environments delete {self.url}", []),
        ):
            self.with_profile()
            self.login("--project proj-alpha")
            key_id = self.profiles()["dev@example.com"]["api_key_id"]
            self.cloud.fault(f"/api/v1/api-keys/{key_id}", "status", status=500)
            self.play(f"""
                $ llamactl --quiet {words}
                error: ...{key_id}...
                hint: delete the key in the web console...
                [1]
            """)
            names = [list(record["profiles"]) for record in self.stored().values()]
            self.assertEqual(names, left)


class AuthInject(CommandCase):
    """The credential as three lines of a .env file."""

    # the file, and between | the lines of the .gitignore in the work tree's root; - is none
    UNIGNORED = """
        .env             -
        .env             # .env | !x | docs/*
        .env             .env | !.env
        .env             deploy/.env
        deploy/.env      /.env
        deploy/.env      other/
        .env             .env/
        deploy/prod.env  .env
        .env             # [T-1] | [z-a]
        .env             *******env
    """
    IGNORED = """
        .env             .env
        .env             build | /.env
        .env             *.env
        .env             .env*
        .env             **/.env
        .env             !.env | .env
        .env             .env | [z-a]nv | # .env
        .env             ******env
        .env             *.*.*.env | *.e*n*v*
        deploy/.env      deploy/
        deploy/.env      /deploy
        deploy/.env      deploy/.env
        deploy/.env      .env
        ../outside.env   -
    """

    def test_where_it_writes(self):
        self.with_profile()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.home)
        path = os.path.join(self.home, "new/folder/x.env")
        self.play(
            f"""
            $ llamactl auth inject --env-file -
            LLAMA_CLOUD_API_KEY={KEY}
            LLAMA_CLOUD_BASE_URL={self.url}
            LLAMA_AGENTS_PROJECT_ID=proj-alpha
            $ llamactl auth inject --env-file {path}
            {path} written
            $ llamactl auth inject --env-file {path}
            {path} is up to date
            $ llamactl auth inject
            .env written
            """,
            sings=True,
        )
        lines = self.done("auth inject --env-file -", sings=True).out
        for name in (path, os.path.join(self.home, ".env")):
            with open(name) as file:
                self.assertEqual(file.read(), lines)
        self.assertEqual(self.requests(), [])

    def test_whose_credential(self):
        self.with_profile()
        self.done(f"auth token --api-key {KEY} --project proj-beta --name b")
        variables = f"LLAMA_CLOUD_API_KEY={OTHER_KEY} LLAMA_AGENTS_PROJECT_ID=p"
        stored = f"""LLAMA_CLOUD_API_KEY={KEY}
            LLAMA_CLOUD_BASE_URL={self.url}
            LLAMA_AGENTS_PROJECT_ID"""
        self.play(
            f"""
            $ llamactl auth inject --env-file -
            {stored}=proj-beta
            $ llamactl auth inject --env-file - --profile main
            {stored}=proj-alpha
            $ llamactl auth inject --env-file - --project proj-alpha
            {stored}=proj-alpha
            $ llamactl auth inject --env-file - --project ALPHA
            {stored}=proj-alpha
            $ llamactl auth inject --env-file - --project Beta
            {stored}=proj-beta
            $ {variables} llamactl auth inject --env-file -
            LLAMA_CLOUD_API_KEY={OTHER_KEY}
            LLAMA_CLOUD_BASE_URL={DEFAULT_URL}
            LLAMA_AGENTS_PROJECT_ID=p
            warning: ...
            $ {variables} llamactl auth inject --env-file - --profile main
            {stored}=proj-alpha
            $ {variables} LLAMA_CLOUD_BASE_URL={NOWHERE} \
                llamactl auth inject --env-file - --project {UNSEEN}
            LLAMA_CLOUD_API_KEY={OTHER_KEY}
            LLAMA_CLOUD_BASE_URL={NOWHERE}
            LLAMA_AGENTS_PROJECT_ID={UNSEEN}
            warning: ...
            warning: ...
            """,
            sings=True,
        )

    def test_failures(self):
        self.play("""
            $ llamactl auth inject
            error: not logged in...
            hint: llamactl auth login
            [4]
            $ llamactl auth inject --env-file
            error: ...--env-file...
            hint: llamactl auth inject --help
            [2]
        """)
        self.with_profile(project=None)
        self.play("""
            $ llamactl auth inject
            error: ...project...
            hint: llamactl projects use ID
            [2]
            $ llamactl auth inject --profile nope
            error: ...nope...
            ...
            [1]
        """)
        self.with_profile(key=None)
        self.play("""
            $ llamactl auth inject --env-file -
            error: ...API key...
            hint: llamactl auth token
            [4]
        """)
        self.assertEqual(os.listdir(self.home), ["conf"])

    def test_a_file_that_git_would_add_is_warned_about(self):
        self.with_profile()
        tree = os.path.join(self.home, "clone")
        ignore = os.path.join(tree, ".gitignore")
        os.makedirs(os.path.join(tree, ".git"))
        for table, warned in ((self.UNIGNORED, True), (self.IGNORED, False)):
            for row in table.strip().splitlines():
                with self.subTest(row):
                    name, lines = row.strip().split(maxsplit=1)
                    with open(ignore, "w") as file:
                        file.write(lines.replace(" | ", "\n"))
                    if lines == "-":
                        os.unlink(ignore)
                    target = os.path.join(tree, name)
                    result = self.done(f"auth inject --env-file {target}")
                    self.assertEqual("add it to .gitignore" in result.err, warned)

    def test_an_odd_gitignore_holds_nobody_up(self):
        self.with_profile()
        make = """
            mkdir -p .git/info a/b/c
            mkfifo .gitignore .git/info/exclude
            mkdir a/.gitignore
            ln -s /dev/zero a/b/.gitignore
            : > a/b/c/.gitignore
        """
        subprocess.run(make, shell=True, cwd=self.home, check=True)
        huge = os.path.join(self.home, "a/b/c/.gitignore")
        os.truncate(huge, 1 << 30)
        silent_writer = os.path.join(self.home, ".git/info/exclude")
        with open(silent_writer, "rb+", buffering=0):
            result = self.process("auth inject --env-file a/b/c/.env", timeout=10)
        os.unlink(huge)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn("add it to .gitignore", result.err)


class AuthStatus(CommandCase):
    """What a command would use, where it came from, and whether it works now."""

    def setUp(self):
        super().setUp()
        self.env["SSL_CERT_FILE"] = "/ca.pem"

    def test_where_no_profile_is_current(self):
        self.write_store({"a": {"auth_type": "token"}})
        self.assertIn("hint: llamactl auth use NAME\n", self.call("auth status").err)

    def test_where_each_value_came_from(self):
        self.with_profile()
        self.done(f"auth token --api-key {KEY} --project proj-beta --name b")
        self.cloud.reset()
        full = f"LLAMA_CLOUD_API_KEY={KEY} LLAMA_AGENTS_PROJECT_ID=proj-beta"
        url = f"LLAMA_CLOUD_BASE_URL={self.url}"
        self.play(f"""
            $ llamactl auth status --offline
            NAME          SOURCE            VALUE
            environment   environments use  {self.url}
            profile       auth use          b
            user          -                 -
            project_id    profile           proj-beta
            project_name  profile           Beta
            api_key       profile           ********wxyz
            ca_bundle     SSL_CERT_FILE     /ca.pem
            proxy         -                 -
            credential    -                 not checked
            detail        -                 -
            $ llamactl auth status --offline main
            ...
            profile       NAME              main
            ...
            detail...
            $ llamactl auth status --offline --profile main
            ...
            profile       --profile         main
            ...
            detail...
            $ LLAMACTL_PROFILE=main llamactl auth status --offline
            ...
            profile       LLAMACTL_PROFILE  main
            ...
            detail...
            $ {full} {url} llamactl auth status --offline
            ...
            environment   LLAMA_CLOUD_BASE_URL     {self.url}
            profile       -                        -
            user          -                        -
            project_id    LLAMA_AGENTS_PROJECT_ID  proj-beta
            project_name  -                        -
            api_key       LLAMA_CLOUD_API_KEY      ********wxyz
            ...
            warning: ...
            $ {full} llamactl auth status --offline
            ...
            environment   default                  {DEFAULT_URL}
            ...
            warning: ...
            $ {full} LLAMA_CLOUD_USE_PROFILE=1 llamactl auth status --offline
            ...
            profile       auth use          b
            ...
            detail...
            $ {full} {url} llamactl auth status --offline main
            ...
            profile       NAME              main
            ...
            detail...
            $ {full} {url} llamactl auth status --offline --project third
            ...
            project_id    --project             third
            ...
            warning: ...
            $ llamactl auth status --offline --project third
            ...
            project_id    --project         third
            project_name  -                 -
            ...
            detail...
        """)
        self.assertEqual(self.requests(), [])

    def test_whether_it_works(self):
        self.play("""
            $ llamactl auth status
            ...
            credential    -                 missing
            detail        -                 not logged in...
            hint: llamactl auth login
            [4]
            $ llamactl auth status --offline
            ...
            credential    -                 missing
            detail...
            hint: llamactl auth login
            [4]
        """)
        self.with_profile()
        self.play(f"""
            $ llamactl auth status -o yaml
            environment: {self.url}
            profile: main
            user: dev@example.com
            project_id: proj-alpha
            project_name: Alpha
            api_key: "********wxyz"
            ca_bundle: "/ca.pem"
            proxy: null
            credential: works
            detail: null
            environment_source: "environments use"
            profile_source: "auth use"
            user_source: server
            project_id_source: profile
            project_name_source: profile
            api_key_source: profile
            ca_bundle_source: SSL_CERT_FILE
            proxy_source: null
            $ llamactl auth status --project proj-alpha
            ...
            credential    -                 works
            ...
            detail...
            $ llamactl auth status --project BETA
            ...
            project_id    --project         proj-beta
            project_name  --project         Beta
            ...
            detail...
            $ llamactl auth status --project nope
            ...
            credential    -                 works
            detail        -                 ...nope...proj-alpha (Alpha)...
            [1]
        """)
        self.rows("auth status --offline")
        self.with_profile(project="Beta")  # an id, which is never taken for a name
        self.play("""
            $ llamactl auth status
            ...
            credential    -                 works
            detail        -                 the key works, but has no access to the project
            [1]
        """)
        self.with_profile(key="llx-CANARY-rejected-key")
        self.play("""
            $ llamactl auth status
            ...
            credential    -                 rejected
            detail        -                 ...
            hint: llamactl auth token --name main
            [4]
            $ llamactl auth status --offline
            ...
            credential    -                 not checked
            ...
            detail...
        """)
        self.url = NOWHERE
        self.with_profile()
        self.play("""
            $ llamactl auth status
            ...
            credential    -                 unknown
            detail        -                 ...refused
            [5]
        """)

    def test_certificates_and_proxy(self):
        self.url = "https://llama.example"
        self.with_profile()
        del self.env["SSL_CERT_FILE"]
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            status = self.rows("auth status --offline", env={name: "/ca.pem"})
            self.assertEqual(status["ca_bundle"], "/ca.pem")
            self.assertEqual(status["ca_bundle_source"], name)
        for proxy in """
            http://proxy.example:3128
            http://user:pw-CANARY@proxy.example:3128
            user:CANARY@proxy.example:3128
            http://user:p@CANARY@proxy.example:3128/
            http://user:p/CANARY@proxy.example:3128
        """.split():
            with self.subTest(proxy):
                status = self.rows("auth status --offline", env={"https_proxy": proxy})
                self.assertIn("proxy.example:3128", status["proxy"])
                self.assertEqual(status["proxy_source"], "https_proxy")
        direct = {"https_proxy": proxy, "no_proxy": "llama.example"}
        self.assertIsNone(self.rows("auth status --offline", env=direct)["proxy"])


class AuthExec(CommandCase):
    """A command that has the credential in its variables."""

    def setUp(self):
        super().setUp()
        self.with_profile()
        # what is done to this process on the way to becoming another one
        patcher = unittest.mock.patch.object(signal, "signal")
        patcher.start()
        self.addCleanup(patcher.stop)

    def executed(self, words, env=()):
        """The command that the program becomes, and its variables."""
        with unittest.mock.patch.object(os, "execvpe") as execute:
            self.call(f"auth exec {words}", env=env)
        program, command, variables = execute.call_args[0]
        self.assertEqual(program, command[0])
        return command, variables

    def test_the_command_replaces_the_program(self):
        before = os.listdir(self.folder), self.store_text()
        script = (
            'echo "$$|$LLAMA_CLOUD_API_KEY|$LLAMA_CLOUD_BASE_URL|$LLAMA_AGENTS_PROJECT_ID|'
            '${LLAMA_CLOUD_USE_PROFILE-dropped}|$KEPT"; exit 7'
        )
        env = {"LLAMA_CLOUD_USE_PROFILE": "1", "KEPT": "kept"}
        process = self.spawn("auth exec -- sh -c", script, env=env)
        result = self.note(7, *process.communicate(), sings=True)
        shown = f"{process.pid}|{KEY}|{self.url}|proj-alpha|dropped|kept\n"
        self.assertEqual((process.returncode, result.out), (7, shown), result.err)
        self.assertEqual((os.listdir(self.folder), self.store_text()), before)
        self.assertEqual(os.listdir(self.home), ["conf"])

    def test_a_script_whose_interpreter_is_missing(self):
        path = write_file(os.path.join(self.home, "tool"), "#!/no/such/sh\n", 0o755)
        self.play(f"""
            $ llamactl auth exec -- {path}
            error: {path}: its interpreter was not found
            [127]
            $ llamactl auth exec -- ''
            error: the command is empty
            [127]
            $ llamactl auth exec -- no-such-tool
            error: no-such-tool: command not found
            [127]
        """)

    def test_a_variable_without_a_name_is_dropped(self):
        result = self.process("auth exec -- env", env={"": "x"}, sings=True)
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertNotIn("\n=", result.out)

    def test_the_command_dies_of_a_closed_pipe_again(self):
        result = self.process("auth exec -- sh -c", "kill -PIPE $$; echo survived")
        self.assertEqual((result.code, result.out), (-signal.SIGPIPE, ""))

    def test_a_key_from_a_file_stands_in_for_a_profile(self):
        """A mounted secret; what the command line says wins, or fails."""
        path = self.key_file(f"{OTHER_KEY}\n".encode())
        self.cloud.add_key(OTHER_KEY)
        env = {"LLAMA_CLOUD_BASE_URL": self.url}
        _, variables = self.executed(f"--api-key-file {path} --project Beta -- env", env)
        self.assertEqual(variables["LLAMA_CLOUD_API_KEY"], OTHER_KEY)
        self.assertEqual(variables["LLAMA_AGENTS_PROJECT_ID"], "proj-beta")
        _, variables = self.executed(f"--api-key-file {path} --project Beta -- env")
        self.assertEqual(variables["LLAMA_CLOUD_BASE_URL"], self.url)  # of the environment
        ignored = {"LLAMA_CLOUD_USE_PROFILE": "1", "LLAMA_CLOUD_BASE_URL": NOWHERE}
        words = f"--api-key-file {path} --project Beta -- env"
        _, variables = self.executed(words, ignored)
        self.assertEqual(variables["LLAMA_CLOUD_BASE_URL"], self.url)
        self.play(f"""
            $ llamactl auth exec --api-key-file {path} -- env
            error: ...--project...
            [2]
            $ llamactl auth exec --api-key-file {path} main -- env
            error: --api-key-file and a profile exclude each other
            [2]
            $ llamactl auth exec --api-key-file /nowhere --project p -- env
            error: .../nowhere...
            [1]
        """)

    def test_its_own_options_end_at_the_dashes(self):
        self.done(f"auth token --api-key {KEY} --project proj-beta --name b")
        for own, command, project in (
            ("", "env --help -o --", "proj-beta"),
            ("main ", "env", "proj-alpha"),
            ("--profile main --quiet ", "env", "proj-alpha"),
            ("main --project beta ", "env", "proj-beta"),
        ):
            with self.subTest(own):
                words, variables = self.executed(f"{own}-- {command}")
                self.assertEqual(words, command.split())
                self.assertEqual(variables["LLAMA_AGENTS_PROJECT_ID"], project)

    def test_failures(self):
        for name, mode in (("plain", 0o644), ("script", 0o755)):
            with open(os.path.join(self.home, name), "w") as file:
                file.write("echo no interpreter is named\n")
            os.chmod(file.name, mode)
        self.env["PATH"] = self.home
        self.play(f"""
            $ llamactl auth exec
            error: no command given
            hint: llamactl auth exec -- COMMAND
            [2]
            $ llamactl auth exec --
            error: no command given
            hint: llamactl auth exec -- COMMAND
            [2]
            $ llamactl auth exec main nope
            error: ...argument...
            hint: llamactl auth exec --help
            [2]
            $ llamactl auth exec nope -- env
            error: ...nope...
            ...
            [1]
            $ llamactl auth exec -- /nowhere/at/all
            error: /nowhere/at/all: command not found
            [127]
            $ llamactl auth exec -- no-such-command-anywhere
            error: no-such-command-anywhere: command not found
            [127]
            $ llamactl auth exec -- plain
            error: plain: ...
            [126]
            $ llamactl auth exec -- {self.home}/plain
            error: {self.home}/plain: ...
            [126]
            $ llamactl auth exec -- script
            error: script: ...
            [126]
            $ llamactl auth exec -- {self.home}/script
            error: {self.home}/script: ...
            [126]
        """)
        self.write_store({})
        self.play("""
            $ llamactl auth exec -- env
            error: not logged in...
            hint: llamactl auth login
            [4]
        """)


class Environments(CommandCase):
    """The servers, of which one is current, each with its profiles."""

    def test_get(self):
        self.play(f"""
            $ llamactl environments get
            API_URL...  REQUIRES_AUTH  ACTIVE
            {DEFAULT_URL}  yes            no
            {self.url}...  yes            yes
            $ llamactl environments get -o yaml
            - api_url: {DEFAULT_URL}
              requires_auth: true
              active: false
            - api_url: {self.url}
              requires_auth: true
              active: true
        """)
        rows = self.rows("environments get")
        self.assertEqual(self.rows(f"environments get {self.url}/"), rows[1])
        shutil.rmtree(self.folder)
        self.play(f"""
            $ llamactl environments get
            API_URL...  REQUIRES_AUTH  ACTIVE
            {DEFAULT_URL}  yes            yes
        """)

    def test_add_probes_stores_and_makes_current(self):
        shutil.rmtree(self.folder)
        self.cloud.requires_auth = False
        self.play(f"""
            $ llamactl environments add {self.url.upper()}/
            environment {self.url} is current; ...
            $ llamactl environments get {self.url}
            API_URL...  REQUIRES_AUTH  ACTIVE
            {self.url}  no             yes
        """)
        self.assertEqual(self.requests(), [("GET", VERSION)])

    def test_add_of_what_does_not_answer_changes_nothing(self):
        self.cloud.fault(VERSION, "html")
        self.play(f"""
            $ llamactl environments add
            error: no URL given
            hint: llamactl environments add URL
            [2]
            $ llamactl environments add {NOWHERE}/base
            error: ...refused
            hint: llamactl environments add {NOWHERE}/base --no-verify
            [5]
            $ llamactl environments add {self.url}/x
            error: ...404...
            hint: llamactl environments add {self.url}
            [1]
            $ llamactl environments add {self.url}
            error: ...web page...
            ...
            [5]
        """)
        self.cloud.fault(VERSION, "status", status=401)
        self.play(f"""
            $ llamactl environments add {self.url}
            error: ...401...
            [4]
        """)
        self.assertEqual(list(self.stored()), [self.url])

    def test_add_asks_for_the_address_where_somebody_can_answer(self):
        answer = f"{self.url}/\n".encode()
        result = self.call("environments add", stdin=answer, terminal=True)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn(f"control plane: environment {self.url} is current", result.err)

    def test_a_profile_that_is_made_during_delete_is_kept(self):
        log_out_each = llamactl.log_out_each

        def slow_log_out(*args):
            log_out_each(*args)
            self.with_profile("late")

        self.with_profile()
        with patched(llamactl, "log_out_each", slow_log_out):
            self.play(f"""
                $ llamactl environments delete {self.url} --yes
                profile main deleted
                error: {self.url} got a new profile in the meantime and is kept
                [1]
            """)
        self.assertEqual(list(self.profiles()), ["late"])

    def test_each_verb_checks_and_normalises_the_address(self):
        self.play("""
            $ llamactl environments add HTTPS://Llama.Example:443/ --no-verify
            environment https://llama.example is current; ...
            $ llamactl environments get HTTPS://Llama.Example:443/
            API_URL                REQUIRES_AUTH  ACTIVE
            https://llama.example  yes            yes
            $ llamactl environments use HTTPS://Llama.Example:443/
            environment https://llama.example is current; ...
            $ llamactl environments delete HTTPS://Llama.Example:443/
            environment https://llama.example deleted
        """)
        before = self.store_text()
        self.expect_failure(self.call("environments", "add", ""), 2, "url is empty")
        for bad in (
            "llama.example",
            "https://a\nb.example",
            "https://a/$(id)",
            "https://a/;b",
        ):
            for verb in ("get", "add", "use", "delete"):
                with self.subTest(bad=bad, verb=verb):
                    self.expect_failure(self.call("environments", verb, bad), 2, "http")
        self.assertEqual((self.store_text(), self.requests()), (before, []))

    def test_an_environment_without_encryption_is_warned_about(self):
        for url, warned in (
            ("http://llama.example", True),
            ("http://localhost.llama.example", True),
            ("http://127.0.0.2", False),
            ("http://localhost:9", False),
            ("http://[::1]", False),
            ("https://a.example", False),
        ):
            with self.subTest(url):
                result = self.done(f"environments add {url} --no-verify --quiet")
                self.assertEqual("warning: " in result.err, warned)

    def test_use(self):
        self.play(f"""
            $ llamactl environments use {DEFAULT_URL}
            environment {DEFAULT_URL} is current; ...
            $ llamactl config
            ...
            {DEFAULT_URL}  -        -           -
            $ llamactl environments use {self.url}/
            environment {self.url} is current; ...
            $ llamactl config
            ...
            {self.url}  -        -           -
            $ llamactl environments use
            error: ...URL: {DEFAULT_URL}, {self.url}
            [2]
            $ llamactl environments use https://nope.example
            error: environment https://nope.example not found; available: ...
            hint: llamactl environments add https://nope.example
            [1]
            $ llamactl environments get https://nope.example
            error: ...https://nope.example...
            hint: llamactl environments add https://nope.example
            [1]
        """)
        self.assertEqual(self.requests(), [])

    def test_delete_takes_the_profiles_along(self):
        self.with_profile()
        self.login("--project proj-alpha")
        made = self.profiles()["dev@example.com"]["api_key"]
        default = f"""
            $ llamactl environments get
            API_URL...  REQUIRES_AUTH  ACTIVE
            {DEFAULT_URL}  yes            yes
        """
        self.play(f"""
            $ llamactl environments delete {self.url}
            ...main...
            ...dev@example.com...
            environment {self.url} deleted
            {default}
            $ llamactl environments delete
            error: ...URL: {DEFAULT_URL}
            [2]
            $ llamactl environments delete {self.url}
            error: ...{self.url}...
            ...
            [1]
            $ llamactl environments delete {DEFAULT_URL}
            environment {DEFAULT_URL} deleted
            {default}
        """)
        self.assertNotIn(made, self.cloud.keys_alive())
        self.assertNotIn(CANARY, self.store_text())


class Projects(CommandCase):
    """The projects that a key can see, of which its profile uses one."""

    def test_get(self):
        self.with_profile()
        self.play("""
            $ llamactl projects get
            NAME   PROJECT_ID  DEPLOYMENTS  ACTIVE  ORG_ID
            Alpha  proj-alpha  2            yes     org-one
            Beta   proj-beta   0            no      org-two
        """)
        self.assertEqual(self.requests(), [("GET", LIST_PROJECTS)])
        self.assertEqual(bearers(self.cloud.requests), {KEY})
        self.play("""
            $ llamactl projects get --org org-two -o yaml
            - project_id: proj-beta
              project_name: Beta
              deployment_count: 0
              active: false
              org_id: org-two
            $ llamactl projects get proj-beta
            NAME  PROJECT_ID  DEPLOYMENTS  ACTIVE  ORG_ID
            Beta  proj-beta   0            no      org-two
            $ llamactl projects get nope
            error: ...nope...
            [1]
        """)
        rows = self.rows("projects get")
        self.assertEqual(self.rows("projects get proj-beta"), rows[1])

    def test_missing_members_have_defaults(self):
        self.with_profile()
        self.cloud.projects = [{"project_id": "bare", "project_name": None, "more": [1]}]
        self.play("""
            $ llamactl projects get bare -o yaml
            project_id: bare
            project_name: bare
            deployment_count: 0
            active: false
            org_id: default
        """)

    def test_no_project(self):
        self.with_profile()
        self.cloud.projects = []
        self.play("""
            $ llamactl projects get -o json
            []
            no project found
        """)
        self.assertEqual(self.rows("projects get"), [])

    def test_use(self):
        self.with_profile()
        self.play("""
            $ llamactl projects use nope
            error: ...nope...proj-alpha...proj-beta...
            [1]
            $ llamactl projects use
            error: ...ID: proj-alpha (Alpha), proj-beta (Beta)
            [2]
            $ llamactl projects use proj-alpha --profile nope
            error: ...nope...
            ...
            [1]
            $ llamactl projects use proj-alpha --org org-two
            error: ...proj-alpha...proj-beta...
            [1]
            $ llamactl projects use proj-beta
            profile main uses project Beta (proj-beta)
        """)
        self.play(
            """
            $ llamactl projects use
                1  Alpha (proj-alpha)
            *   2  Beta (proj-beta)
            Project, by number or name [Beta]: profile main uses project Beta (proj-beta)
            """,
            stdin=b"\n",
            terminal=True,
        )
        self.play(f"""
            $ llamactl auth token --api-key {KEY} --project proj-alpha --name b
            ...
            next: ...
            $ llamactl config --profile main
            ...
            {self.url}  main     proj-beta   Beta
            $ llamactl projects use proj-alpha --profile main
            profile main uses project Alpha (proj-alpha)
            $ llamactl config --profile main
            ...
            {self.url}  main     proj-alpha  Alpha
            $ llamactl config
            ...
            {self.url}  b        proj-alpha  Alpha
        """)

    def test_whose_key(self):
        self.play("""
            $ llamactl projects use proj-alpha
            error: not logged in...
            hint: llamactl auth login
            [4]
            $ llamactl projects get
            error: not logged in...
            hint: llamactl auth login
            [4]
        """)
        self.with_profile(key="llx-CANARY-rejected-key")
        self.play("""
            $ llamactl projects get
            error: ...401...req-...
            hint: llamactl auth token --name main
            [4]
        """)
        self.cloud.requires_auth = False
        self.write_store({}, requires_auth=False)
        self.assertEqual(len(self.rows("projects get")), 2)


class Organizations(CommandCase):
    """The organizations of a server that has some."""

    def test_get(self):
        self.with_profile()
        self.play("""
            $ llamactl organizations get
            NAME     ORG_ID   DEFAULT  ACTIVE
            Org One  org-one  yes      yes
            Org Two  org-two  no       no
            $ llamactl organizations get -o yaml
            - org_id: org-one
              org_name: "Org One"
              is_default: true
              active: true
            - org_id: org-two
              org_name: "Org Two"
              is_default: false
              active: false
        """)
        self.rows("organizations get")
        self.with_profile(org_id="org-two")
        self.play("""
            $ llamactl organizations get
            NAME     ORG_ID   DEFAULT  ACTIVE
            Org One  org-one  yes      no
            Org Two  org-two  no       yes
        """)

    def test_server_without_organizations_is_not_asked_for_them(self):
        self.with_profile()
        self.cloud.capabilities = ["code_push"]
        self.play(f"""
            $ llamactl organizations get -o json
            []
            warning: {self.url} has no organizations
            no organization found
        """)
        self.assertEqual(self.requests(), [("GET", VERSION)])


class Config(CommandCase):
    """What commands use, without a request."""

    def test_values(self):
        self.play(f"""
            $ llamactl config
            ENVIRONMENT...  PROFILE  PROJECT_ID  PROJECT_NAME
            {self.url}  -        -           -
        """)
        self.with_profile()
        self.play(f"""
            $ llamactl config
            ENVIRONMENT...  PROFILE  PROJECT_ID  PROJECT_NAME
            {self.url}  main     proj-alpha  Alpha
            $ llamactl config -o yaml
            environment: {self.url}
            profile: main
            project_id: proj-alpha
            project_name: Alpha
            $ llamactl config --profile nope
            error: ...nope...main
            ...
            [1]
        """)
        self.rows("config")
        variables = f"LLAMA_CLOUD_API_KEY={OTHER_KEY} LLAMA_AGENTS_PROJECT_ID=p llamactl"
        self.play(f"""
            $ {variables} config
            ENVIRONMENT...  PROFILE  PROJECT_ID  PROJECT_NAME
            {DEFAULT_URL}  -        p           -
            warning: ...
            $ {variables} config --profile main
            ENVIRONMENT...  PROFILE  PROJECT_ID  PROJECT_NAME
            {self.url}  main     proj-alpha  Alpha
        """)
        self.assertEqual(self.requests(), [])


class Deployments(CommandCase):
    """The deployments of a project, in short, wide and whole."""

    def setUp(self):
        super().setUp()
        self.with_profile()

    def test_get(self):
        self.play("""
            $ llamactl deployments get invoices -o yaml
            name: invoices
            generate_name: Invoices
            spec:
              repo_url: https://github.com/example/invoices
              deployment_file_path: llama_deploy.yml
              git_ref: main
              appserver_version: "0.4.2"
              suspended: false
              secrets:
                OPENAI_API_KEY: "********"
                DATABASE_URL: "********"
              personal_access_token: "********"
            status:
              phase: Running
              git_sha: "0123456789abcdef0123456789abcdef01234567"
              apiserver_url: https://invoices.example.com/
              project_id: proj-alpha
              warning: null
            $ llamactl deployments get
            NAME      REPO                                 GIT_REF  PHASE
            invoices  https://github.com/example/invoices  main     Running
            chat-bot  -                                    -        BuildFailed
            warning: chat-bot: The last build failed; the previous one is served.
            $ llamactl deployments get chat-bot -o yaml
            name: chat-bot
            generate_name: "Chat bot"
            spec:
              repo_url: ""
              deployment_file_path: "."
              suspended: true
            status:
              phase: BuildFailed
              git_sha: null
              apiserver_url: null
              project_id: proj-alpha
              warning: "The last build failed; the previous one is served."
        """)
        names = [row["name"] for row in self.rows("deployments get")]
        self.assertEqual(names, ["invoices", "chat-bot"])

    def test_wide(self):
        self.assertEqual(
            self.table("deployments get invoices -o wide"),
            [
                "NAME REPO GIT_REF PHASE APPSERVER GIT_SHA APISERVER_URL PROJECT".split(),
                """
                invoices https://github.com/example/invoices main Running 0.4.2
                0123456789abcdef0123456789abcdef01234567
                https://invoices.example.com/ proj-alpha
                """.split(),
            ],
        )

    def test_older_servers_and_newer_words(self):
        self.cloud.deployments = [
            {
                "id": "old",
                "name": "Old",
                "repo_url": "",
                "deployment_file_path": ".",
                "project_id": "proj-alpha",
                "llama_deploy_version": "0.3",
                "status": "Levitating",
                "unheard_of": {"of": 1},
            }
        ]
        self.play("""
            $ llamactl deployments get old -o yaml
            name: old
            generate_name: Old
            spec:
            ...
              appserver_version: "0.3"
            ...
            status:
              phase: Levitating
            ...
              warning: null
        """)

    def test_names_and_failures(self):
        self.play("""
            $ llamactl deployments get nope
            error: ...404: Deployment nope not found ...req-...
            [1]
            $ llamactl deployments get --project proj-zeta
            error: ...proj-zeta...proj-alpha...
            [1]
            $ llamactl deployments get ..
            error: a name cannot consist of dots alone
            [1]
            $ llamactl deployments get -o wider
            error: ...wide...
            hint: llamactl deployments get --help
            [2]
            $ llamactl auth get -o wide
            error: ...json...
            hint: llamactl auth get --help
            [2]
            $ llamactl deployments get --project proj-beta -o json
            []
            no deployment found
            $ llamactl deployments get "a/b c?d#\u00e9"
            error: ...
            [1]
        """)
        last = self.cloud.requests[-1]
        self.assertEqual(last.path, f"{CONTROL}/a%2Fb%20c%3Fd%23%C3%A9")
        self.assertEqual(last.query, {"project_id": "proj-alpha"})

    def test_no_password_of_an_address_is_shown(self):
        for address, shown in (
            ("https://user:CANARY@git.example/a", "https://********@git.example/a"),
            ("https://CANARY-token@git.example/a", "https://********@git.example/a"),
            ("https://u:CANARY@x@git.example/a", "https://********@git.example/a"),
            ("ssh://git:CANARY@git.example/a", "ssh://git:********@git.example/a"),
            ("git@git.example:a/b", "git@git.example:a/b"),
        ):
            self.cloud.deployments[0].update(repo_url=address, apiserver_url=address)
            for output in ("text", "wide", "json", "yaml"):
                with self.subTest(address=address, output=output):
                    self.assertIn(shown, self.done(f"deployments get -o {output}").out)


# ========================================================================================
# commands: auth import
# ========================================================================================

# What the official client stores.
OFFICIAL = f"""
CREATE TABLE profiles (name TEXT, api_url TEXT, project_id TEXT, api_key TEXT,
    api_key_id TEXT, device_oidc TEXT, id TEXT, PRIMARY KEY (name, api_url));
CREATE TABLE environments (api_url TEXT, requires_auth INTEGER, min_llamactl_version);
CREATE TABLE settings (key, value);
INSERT INTO profiles VALUES
    ('work', 'https://llama.example.com', 'proj-alpha', '{KEY}', NULL, NULL, 'id-1'),
    ('dev@example.com', 'https://llama.example.com', 'proj-beta', '{OTHER_KEY}', 'key-7',
     '{{"email": "dev@example.com", "user_id": "user-1", "device_name": "laptop",
        "device_access_token": "at-CANARY", "device_refresh_token": "rt-CANARY"}}', 'id-2'),
    ('local', 'http://localhost:8011', 'proj-local', NULL, NULL, NULL, 'id-3');
INSERT INTO environments VALUES
    ('https://llama.example.com', 1, '0.4.0'),
    ('http://localhost:8011', 0, NULL);
INSERT INTO settings VALUES
    ('current_profile', 'dev@example.com'),
    ('current_environment_api_url', 'https://llama.example.com');
"""
WITH_LOG = f"PRAGMA journal_mode = wal; {OFFICIAL}"


class ImportCase(DiskCase):
    IMPORT = "auth import --from-official"

    def setUp(self):
        super().setUp()
        self.url = "https://llama.example.com"
        self.use_folder(self.folder)

    def use_folder(self, folder):
        os.mkdir(folder, 0o700)
        self.env["LLAMACTL_CONFIG_DIR"] = folder
        self.store_path = os.path.join(folder, "profiles.json")
        self.path = os.path.join(folder, "profiles.db")

    def may_hold_secrets(self, path):
        return "profiles.db" in path or super().may_hold_secrets(path)

    def write(self, content, suffix=""):
        with open(self.path + suffix, "wb") as file:
            file.write(content)

    def assert_import_fails(self, names):
        before = tree(self.home)
        self.assert_one_error(self.call(self.IMPORT), 1, names)
        self.assertEqual(tree(self.home), before)


class ImportWithoutSqliteTest(ImportCase):
    def test_a_python_without_sqlite3_says_so(self):
        self.write(b"SQLite format 3\0")
        with unittest.mock.patch.dict(sys.modules, {"sqlite3": None}):
            self.assert_import_fails("sqlite3")

    def test_import_must_say_where_from(self):
        self.assert_one_error(self.call("auth import"), 2, "--from-official")


class ImportTest(ImportCase):
    def official(self, sql=OFFICIAL):
        """The official client's database, and no store of ours; the open connection."""
        for path in (self.path, self.store_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        url = "file:" + urllib.parse.quote(os.fsencode(self.path))  # in any locale
        database = sqlite3.connect(url, uri=True)
        self.addCleanup(database.close)
        database.executescript(f"PRAGMA synchronous = off; {sql}")
        return database

    def closed(self, changes=""):
        self.official(OFFICIAL + changes).close()

    def official_files(self):
        """The official client's files; readers of a live log share its index, "-shm"."""
        return {
            path: None if path.endswith("-shm") else entry
            for path, entry in tree(self.home).items()
            if "profiles.db" in path
        }

    def take_over(self, names="dev@example.com work"):
        """Import, which changes no file but ours; NAMES are then at the first URL."""
        before = self.official_files()
        result = self.call(self.IMPORT)
        self.assertEqual(self.official_files(), before)
        self.assertEqual((result.code, result.out), (0, ""), result.err)
        self.assertEqual(sorted(self.profiles()), names.split())
        return result

    def test_everything_is_taken_over_and_said(self):
        self.closed()
        told = self.take_over().err
        self.assertEqual(
            told.splitlines()[0],
            "imported: work, dev@example.com, local; login tokens were not imported",
        )
        self.assertEqual(
            [
                (url, record["requires_auth"], name, profile["auth_type"])
                + (profile["api_key"], profile["project_id"])
                for url, record in self.stored().items()
                for name, profile in record["profiles"].items()
            ],
            [
                (self.url, True, "work", "token", KEY, "proj-alpha"),
                (self.url, True, "dev@example.com", "token", OTHER_KEY, "proj-beta"),
                ("http://localhost:8011", False, "local", "none", None, "proj-local"),
            ],
        )
        self.play("""
            $ llamactl config
            ENVIRONMENT ...
            https://llama.example.com  dev@example.com  proj-beta   -
        """)
        self.assertEqual(mode_of(self.store_path), "0o600")

    def test_a_login_arrives_without_what_would_end_it(self):
        self.closed()
        self.take_over()
        text = file_bytes(self.store_path).decode()
        for word in ("at-CANARY", "rt-CANARY", "key-7", "user-1", "laptop"):
            self.assertNotIn(word, text)
        with unittest.mock.patch.object(
            llamactl.Client, "send", side_effect=AssertionError
        ):
            self.assertEqual(self.call("auth logout dev@example.com").code, 0)

    def test_twice_is_the_same_as_once(self):
        self.closed()
        self.take_over()
        once = file_bytes(self.store_path)
        self.take_over()
        self.assertEqual(file_bytes(self.store_path), once)

    def test_what_is_ours_already_stays(self):
        self.closed("""
            UPDATE settings SET value = 'http://localhost:8011' WHERE value LIKE 'http%'
        """)
        ours = {"auth_type": "token", "api_key": OTHER_KEY, "project_id": "proj-beta"}
        same_name = dict(ours, api_key="llx-CANARY-quite-another-one")
        self.write_store({"work": same_name, "mine": ours}, "work")
        for _ in "12":
            self.take_over("mine work work-2")
            self.assertEqual(self.profiles()["work"], same_name)
            self.assertEqual(self.profiles()["work-2"]["api_key"], KEY)
            shown = load(self.call("config -o json").out)
            self.assertEqual((shown["environment"], shown["profile"]), (self.url, "work"))

    def test_old_databases_have_fewer_columns(self):
        self.closed("""
            CREATE TABLE old AS SELECT name, api_url, project_id, api_key FROM profiles;
            DROP TABLE profiles;
            ALTER TABLE old RENAME TO profiles;
        """)
        self.take_over()

    def test_an_open_database_with_a_write_ahead_log(self):
        # the rows stand in the log alone while the official client has the file open
        self.official(WITH_LOG)
        self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
        self.take_over()

    def test_a_closed_database_with_a_write_ahead_log(self):
        self.official(WITH_LOG).close()
        self.assertEqual(os.listdir(self.folder), ["profiles.db"])
        self.take_over()

    def test_a_write_ahead_log_that_a_crash_left(self):
        self.official(WITH_LOG)
        os.unlink(self.path + "-shm")
        self.assert_import_fails("left by a crash")  # and not half of the rows

    def test_a_journal_that_a_crash_left(self):
        self.closed()
        self.write(b"not undone yet", "-journal")
        self.assert_import_fails("left by a crash")
        self.write(b"", "-journal")
        self.take_over()

    def test_a_link_to_an_open_database_with_a_write_ahead_log(self):
        link, self.path = self.path, os.path.join(self.home, "real-profiles.db")
        os.symlink(self.path, link)
        self.official(WITH_LOG)
        self.take_over()

    def test_a_folder_with_an_odd_name(self):
        name = os.fsdecode("we?ird %20#f;older\u00e9".encode("utf-8"))  # in any locale
        self.use_folder(os.path.join(self.home, name))
        self.closed()
        self.take_over()

    def closed_with(self, row):
        """The database with a profile ROW, which may name columns of `work`, and `work`."""
        self.closed(f"""
            DELETE FROM profiles WHERE name != 'work';
            INSERT INTO profiles SELECT {row} FROM profiles;
            UPDATE profiles SET rowid = 9 WHERE name = 'work';
        """)

    def test_rows_without_a_usable_key_project_or_url_are_left_out(self):
        rows = """
            'bad', api_url, 'p', NULL
            'bad', api_url, 'p', ''
            'bad', api_url, 'p', 'two words'
            'bad', api_url, 'p', 'llx-CANARY-line' || char(10) || 'break'
            'bad', api_url, 'p', CAST('llx-CANARY-bytes' AS BLOB)
            'bad', api_url, NULL, api_key
            'bad', api_url, X'ff', api_key
            'bad', NULL, 'p', api_key
            'bad', '', 'p', api_key
            'bad', 'not a URL', 'p', api_key
            'bad', 'ftp://example.com', 'p', api_key
            'bad', CAST(api_url AS BLOB), 'p', api_key
            'bad', api_url, 'p', CAST('llx-CANARY-not-' || X'fc' AS TEXT)
        """
        for row in rows.strip().splitlines():
            with self.subTest(row.strip()):
                self.closed_with(f"{row}, NULL, NULL, NULL")
                self.assertEqual(len(self.warnings_of(self.take_over("work"))), 1)

    def test_names_and_logins_of_odd_types_do_no_harm(self):
        rows = f"""
            NULL, api_url, 'p', api_key, NULL, NULL, NULL
            X'ff', api_url, 'p', api_key, NULL, NULL, NULL
            7, api_url, 'p', 123456789012, NULL, NULL, NULL
            '', api_url, 'p', api_key, NULL, NULL, NULL
            char(27, 91, 50, 74, 8238, 10), api_url, 'p', api_key, NULL, NULL, NULL
            '--all', api_url, 'p', api_key, NULL, NULL, NULL
            'odd', api_url, 'p q' || char(10), api_key, 7, 'not JSON', X'00'
            'odd', api_url, '', api_key, X'ff', 9, NULL
            'odd', api_url || '/', 'p', api_key, NULL, '{"[" * 5000}', NULL
            'odd', api_url, 'p', api_key, NULL, CAST('"CANARY' || X'fc' AS TEXT), NULL
        """
        for row in rows.strip().splitlines():
            with self.subTest(row.strip()[:80]):
                self.closed_with(row)
                result = self.call(self.IMPORT)
                self.assertEqual(result.code, 0, result.err)
                self.assertIn("work", self.profiles())
                for name in self.profiles():
                    self.assertRegex(name, r"\A(?![ -])[^\x00-\x1f\u202e]+\Z")
                self.assertNotRegex(result.err, "[\x00-\x09\x0b-\x1f\u202e]")
                self.assertEqual(self.call("auth get").code, 0)

    def test_an_environment_that_does_not_say_so_requires_auth(self):
        self.closed("DELETE FROM environments; UPDATE profiles SET api_key = NULL")
        self.write_store({})
        data = load(file_bytes(self.store_path).decode())
        del data["environments"][self.url]["requires_auth"]
        self.put(json.dumps(data).encode())
        self.assertEqual(len(self.warnings_of(self.call(self.IMPORT))), 3)
        self.play("""
            $ llamactl auth token --project proj-alpha
            error: ...no API key...
            hint: ...
            [2]
            $ llamactl environments get -o yaml
            ...
              requires_auth: true
            ...
        """)
        self.assertEqual(self.profiles(), {})

    def test_odd_settings_and_environments_do_no_harm(self):
        values = "NULL 7 1.5 X'ff' '' 'no-URL' 'file:///etc/passwd' char(27)||'[2J'"
        for value in values.split():
            with self.subTest(value):
                self.closed(f"""
                    INSERT INTO environments VALUES ({value}, {value}, NULL);
                    UPDATE environments SET requires_auth = {value};
                    UPDATE settings SET value = {value};
                """)
                self.take_over()
                for command in ("environments get", "config", "auth get"):
                    self.assertEqual(self.call(command).code, 0)

    def test_what_is_no_database_of_the_official_client(self):
        self.closed()
        whole = file_bytes(self.path)
        for content in (
            b"",
            b"not a database",
            b"SQLite format 3\0",
            b"\0" * 4096,
            whole[:100],
            whole[:4096],
            whole[:100] + b"\xff" * 8000,
        ):
            with self.subTest(content[:20]):
                self.write(content)
                self.assert_import_fails(self.path)
        for change in (
            "DROP TABLE profiles",
            "DROP TABLE environments",
            "DROP TABLE settings",
        ):
            with self.subTest(change):
                self.closed(change)
                self.assert_import_fails(self.path)

    def test_no_profiles(self):
        self.closed("DELETE FROM profiles")
        result = self.call(self.IMPORT)
        self.assert_one_error(result, 1, f"{self.path} has no profile to import")

    def test_nothing_there(self):
        env = {"LLAMACTL_CONFIG_DIR": "", "HOME": ""}
        self.assert_one_error(self.call(self.IMPORT, env=env), 1, "no home directory")
        self.assert_import_fails(self.path)
        os.mkdir(self.path)
        self.assert_import_fails(self.path)
        os.rmdir(self.path)
        os.mkfifo(self.path)
        self.assert_one_error(self.process(self.IMPORT, timeout=20), 1, self.path)
        shutil.rmtree(self.folder)
        self.assert_import_fails(self.path)


if sqlite3 is None:
    del ImportTest


# ========================================================================================
# parser: what all commands share: words, help, keys, names, hostile texts, doing it twice
# ========================================================================================


class Words(CommandCase):
    """Commands, options and their help; the tables tell what is typed, and the answer."""

    RENAMED = """
        auth list           auth get
        auth switch         auth use
        auth env            environments get
        auth project        projects use
        auth organizations  organizations get
        auth destroy        auth logout --all
        destroy             auth logout --all
        list                auth get
        env                 environments get
        project             projects use
        environments list   environments get
        deployments list    deployments get
    """
    NOT_OFFERED = """
        deployments configure-git-remote
        agentcore
        dev
        dev validate
        init
        pkg
        pkg container
        serve
        config destroy
        config show-db
        deployments apply
        deployments create
        deployments delete
        deployments edit
        deployments history
        deployments logs
        deployments rollback
        deployments template
        deployments update
    """
    MISTAKEN = """
        auth switch main     `auth switch` is now ...                  auth use
        auth env add x       `auth env` is now ...                     environments get
        switch main          there is no command `switch main`         auth use
        env list             there is no command `env list`            environments get
        init --template x    `init x` is not offered ...               --help
        deployments logs x   `deployments logs` is not offered ...     --help
        deployments logs -f  `deployments logs` is not offered ...     --help
        auth tokn            there is no command `auth tokn`           auth token
        auht login           there is no command `auht login`          auth login
        auth get-all         there is no command `auth get-all`        auth get
        project use          there is no command `project use`         projects use
        deployment get       there is no command `deployment get`      deployments get
        confg                there is no command `confg`               config
        whoami               there is no command `whoami`              auth status
        logout a@b.example   there is no command ...                   auth logout
        token CANARY-0123456789-abcdef  there is no command ...        auth token
        xyzzy                there is no command `xyzzy`               --help
        auth get -o xml      ...-o/--output: ...text...json...yaml...  auth get --help
        auth get -o          ...-o/--output: ...                       auth get --help
        auth get --nmae x    unknown option --nmae                     auth get --help
        auth get a b         one argument too many: b                  auth get --help
        auth token --proj x  ...--proj; did you mean --project?        auth token --help
        auth inject --env x  ...--env; did you mean --env-file?        auth inject --help
        auth get --out json  ...--out; did you mean --output?          auth get --help
        --bogus              unknown option --bogus                    --help
        auth use --api_key   unknown option --api_key                  auth use --help
        auth import -- foo   one argument too many: foo                auth import --help
        auth get -V          unknown option -V                         auth get --help
    """
    EMPTY = """
        auth get ''                  name is empty          auth get --help
        auth use ''                  name is empty          auth use --help
        auth logout ''               name is empty          auth logout --help
        auth status ''               name is empty          auth status --help
        auth status --profile ''     profile is empty       auth status --help
        auth exec '' -- /nowhere     name is empty          auth exec --help
        auth token --api-key ''      api-key is empty       auth token --help
        auth token --api-key-file=   api-key-file is empty  auth token --help
        auth token --project ''      project is empty       auth token --help
        auth token --name ''         name is empty          auth token --help
        auth login --name ''         name is empty          auth login --help
        auth login --org=            org is empty           auth login --help
        auth inject --env-file ''    env-file is empty      auth inject --help
        environments use ''          url is empty           environments use --help
        environments add ''          url is empty           environments add --help
        projects use ''              id is empty            projects use --help
        projects get --org ''        org is empty           projects get --help
        config --profile=            profile is empty       config --help
        deployments get --project=   project is empty       deployments get --help
    """

    def refused(self, table):
        """Each row: what is typed, the error, the hint."""
        for row in table.strip().splitlines():
            typed, message, hint = re.split(" {2,}", row.strip())
            self.play(f"$ llamactl {typed}\nerror: {message}\nhint: llamactl {hint}\n[2]")

    def test_words_of_older_releases_lead_to_those_of_today(self):
        for row in self.RENAMED.strip().splitlines():
            typed, today = re.split(" {2,}", row.strip())
            self.refused(f"{typed}  `{typed}` is now `{today}`  {today}")

    def test_commands_of_the_official_client_that_are_not_offered(self):
        for row in self.NOT_OFFERED.strip().splitlines():
            message = f"`{row.strip()}` is not offered here; use the official client"
            self.refused(f"{row}  {message}  --help")

    def test_a_slip_is_told_what_it_looks_like(self):
        self.refused(self.MISTAKEN)

    def test_an_empty_value_is_none(self):
        self.with_profile()
        before = self.store_text()
        self.refused(self.EMPTY)
        self.assertEqual(self.store_text(), before)

    def test_help_of_the_program(self):
        commands = "\n".join(f"{words} ..." for words in llamactl.COMMANDS)
        shown = self.play(f"""
            $ llamactl
            usage: llamactl COMMAND [options]

            ...

            commands:
            {commands}

            everywhere:
            ...
            -V, --version ...

            examples:
            llamactl auth token ...
            ...

            variables (a key and a project beat the current profile):
            LLAMA_CLOUD_API_KEY ...
            ...
            LLAMA_AGENTS_PROJECT_ID ...
            LLAMA_CLOUD_BASE_URL ...
            LLAMA_CLOUD_USE_PROFILE ...
            ...

            exit codes: 0 done, 1 failed, 2 ..., 4 ...
            ... 5 ... 126 and 127 ...
            ... 129, 130 and 143 interrupted
        """)
        for words in ("-h", "--help", "--version --help", "--quiet", "--native-tls"):
            self.assertEqual(self.done(words), shown)

    def test_help_of_each_command_and_each_group(self):
        commands = re.findall("(?m)^  ([a-z]+(?: [a-z]+)?)  +[A-Z]", self.done().out)
        self.assertEqual(commands, list(llamactl.COMMANDS))
        groups = {words.split()[0] for words in commands if " " in words}
        self.assertEqual(groups, set(filter(None, llamactl.GROUPS)))
        for words in commands:
            shown = self.play(f"""
                $ llamactl {words} -h
                usage: llamactl {words} ...
                ...

                everywhere:
                -h, --help ...
                ...

                example:
                llamactl {words} ...

                variables...:
                LLAMA...
                ...
            """)
            self.assertEqual(shown.err, "")
            for typed in (f"--help {words}", f"help {words}", f"{words} help"):
                self.assertEqual(self.done(typed), shown)
            colourful = {"FORCE_COLOR": "1"}  # as argparse would be from Python 3.14 on
            self.assertEqual(self.done(f"{words} -h", env=colourful), shown)
        for group in groups:
            shown = self.play(f"""
                $ llamactl {group}
                error: `{group}` needs a command
                ...
                [2]
                $ llamactl {group} -h
                usage: llamactl {group} COMMAND [options]
                ...
            """)
            self.assertEqual(shown.err, "")
            self.assertEqual(self.done(f"{group} --help"), shown)

    def test_help_groups_the_options_and_tells_of_variables_that_count(self):
        shown = self.play("""
            $ llamactl deployments get -h
            ...
            variables (a key and a project beat the current profile):
            LLAMA_CLOUD_API_KEY ...
            ...
            $ llamactl auth token -h
            usage: llamactl auth token [--api-key-file PATH] [--api-key KEY] ...
            ...

            Create a profile ...

            credential:
            --api-key-file PATH ...
            --api-key KEY ...it shows in
            the process list and in the shell's history, ...
            ...

            choice:
            --project...--project-id ID
            ...
            --org ID ...
            --name NAME ...

            how:
            --no-verify ...

            everywhere:
            -h, --help ...
            --quiet ...

            example:
            llamactl auth token --api-key-file /run/secrets/llama --project ID

            variables (none of them supplies a credential):
            LLAMACTL_CONFIG_DIR ...
        """)
        self.assertNotIn("LLAMA_CLOUD", shown.out)

    def test_version(self):
        flags = "--native-tls version|version --quiet|--quiet --version"
        for words in ("--version", "-V", "version", *flags.split("|")):
            self.play(f"$ llamactl {words}\nllamactl.py {llamactl.__version__}")

    def test_a_format_is_taken_in_any_letter_case(self):
        self.with_profile()
        for word in ("-oJSON", "-o Json", "-o YAML", "--output=Yaml", "-o TEXT"):
            with self.subTest(word):
                shown = self.done(f"projects get {word}")
                self.assertEqual(shown, self.done(f"projects get {word.lower()}"))

    def test_two_profiles_are_not_named_at_once(self):
        self.with_profile()
        self.done("auth status main --profile main")
        self.play("""
            $ llamactl auth status main --profile b
            error: NAME and --profile name different profiles
            [2]
            $ llamactl auth exec main --profile b -- /nowhere
            error: NAME and --profile ...
            [2]
        """)

    def test_options_may_stand_before_the_words(self):
        for words, (_, options, _) in llamactl.read_commands().items():
            for _, flags, settings in llamactl.read_options(options.split()):
                for flag in flags if flags[0].startswith("-") else ():
                    given = [flag, "config"] if "metavar" in settings else [flag]
                    with self.subTest(words, flag=flag):
                        found = llamactl.split_command(given + words.split())
                        self.assertEqual(found, (words, given))

    def test_options_that_are_accepted_everywhere(self):
        self.with_profile()
        for words in f"""
            auth get
            auth use main
            auth inject --env-file {self.home}/.env
            auth status
            environments get
            environments add {self.url}
            environments use {self.url}
            projects get
            projects use proj-alpha
            organizations get
            config
            deployments get invoices
            auth token --api-key {KEY} --project proj-alpha
            auth login --start
            auth logout main
            --version
        """.strip().splitlines():
            words = words.strip()
            store = self.store_text()
            with self.subTest(words):
                plain = self.done(words)
                for option in ("--native-tls", "--quiet"):
                    for typed in (f"{option} {words}", f"{words} {option}"):
                        with open(self.store_path, "w") as file:
                            file.write(store)
                        result = self.done(typed)
                        if "--start" not in words:  # each login has its code
                            self.assertEqual(result.out, plain.out)
                        if option == "--quiet":
                            self.assertEqual(result.err, "")

    def test_profile_is_accepted_wherever_a_credential_is_used(self):
        self.with_profile()
        for words in (
            "auth inject|auth status|auth exec -- env|projects get|projects use proj-alpha|"
            "organizations get|config|deployments get"
        ).split("|"):
            first, _, rest = words.partition(" ")
            self.play(f"""
                $ llamactl --profile=nope {words}
                error: ...nope...main
                ...
                [1]
                $ llamactl {first} --profile nope {rest}
                error: ...nope...main
                ...
                [1]
            """)


class Completion(CommandCase):
    """The words that may come next, and the scripts, in the shells themselves."""

    # each prints what the shell offers behind the words of its arguments, or of $LINE
    ASK = {
        "bash": """eval "$(llamactl completion bash)"
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=999
            _llamactl llamactl "${@: -1}"
            printf '%s\\n' "${COMPREPLY[@]}" """,
        "zsh": """compdef() { :; }; compadd() { shift; print -rl -- "$@"; }
            eval "$(llamactl completion zsh)"; words=("$@"); CURRENT=$#; _llamactl""",
        "fish": 'llamactl completion fish | source; complete -C "$LINE"',
    }
    NAMES = "main|dev@example.com|$(touch owned)|a b|`touch owned`|-x|\u00e9".split("|")

    def setUp(self):
        super().setUp()
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "p"}
        self.write_store(dict.fromkeys(self.NAMES, profile), "main")

    def test_the_next_words(self):
        self.play("""
            $ llamactl completion words -- auth log
            login
            logout
            $ llamactl completion words -- conf
            config
            $ llamactl completion words -- projects u
            use
            $ llamactl completion words -- auth logout --
            --all
            --help
            --quiet
            --yes
            $ llamactl completion words -- auth use ''
            --help
            --quiet
            dev@example.com
            main
            $ llamactl completion words -- auth inject --profile ''
            dev@example.com
            main
            $ llamactl completion words -- nonsense ''
            $ llamactl completion
            error: name a shell: bash, zsh or fish
            [2]
            $ llamactl completion words
            error: name a shell: bash, zsh or fish
            [2]
            $ llamactl completion tcsh
            error: name a shell: ...
            [2]
            $ llamactl completion bash -- x
            error: name a shell: ...
            [2]
        """)

    def offered(self, shell, typed):
        options = ["-f", "-c"] if shell == "zsh" else ["-c"]  # without anybody's settings
        line = f"llamactl {typed}"
        process = subprocess.run(
            [shell] + options + [self.ASK[shell], shell] + line.split(" "),
            env=dict(self.env, LINE=line),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=30,
            check=False,
        )
        self.assertEqual((process.returncode, process.stderr), (0, b""))
        return sorted(process.stdout.decode("utf-8").split())

    def install(self, shell):
        """Where SHELL is, make a llamactl that it finds."""
        if not shutil.which(shell):
            self.skipTest(f"there is no {shell} here")
        command = os.path.join(self.home, "bin", "llamactl")
        os.mkdir(os.path.dirname(command))
        with open(command, "w") as file:
            program = " ".join(map(shlex.quote, PYTHON + [PROGRAM]))
            file.write(f'#!/bin/sh\nexec {program} "$@"\n')
        os.chmod(command, 0o755)
        self.env["PATH"] = os.path.dirname(command) + os.pathsep + os.environ["PATH"]

    def check(self, shell):
        self.install(shell)
        for typed, words in (
            ("auth log", ["login", "logout"]),
            ("auth use ", ["--help", "--quiet", "dev@example.com", "main"]),
            ("auth use dev@", ["dev@example.com"]),
            ("nonsense ", []),
        ):
            with self.subTest(typed):
                self.assertEqual(self.offered(shell, typed), words)
        self.assertNotIn("owned", os.listdir(self.home))

    def test_in_bash(self):
        self.check("bash")

    def test_bash_completes_a_name_that_it_takes_for_two_words(self):
        self.install("bash")
        begin = b'eval "$(llamactl completion bash)"; stty -echo; echo re""ady\r'
        script = [("$ ", begin), ("ready", b"llamactl auth use dev@ex\t\r")]
        script += [("is current", b"exit\r")]
        bash = ["bash", "--norc", "--noprofile", "-i"]
        shown = self.pty("", script, env={"PS1": "$ "}, command=bash)
        self.assertIn("profile dev@example.com is current", shown.out)

    def test_in_zsh(self):
        self.check("zsh")

    def test_in_fish(self):
        self.check("fish")


class Advice(CommandCase):
    """What comes next, said where it helps."""

    def test_the_next_command(self):
        for profiles, current, advice in (
            ({}, None, "next: llamactl auth login, or llamactl auth token"),
            ({"a": {"auth_type": "token"}}, None, "next: llamactl auth use NAME"),
            ({"a": {"auth_type": "token"}}, "a", "profile a"),
        ):
            self.write_store(profiles, current)
            self.play(f"""
                $ llamactl environments use {self.url}
                environment {self.url} is current; {advice}
            """)
        self.play(f"""
            $ llamactl auth token --api-key {KEY} --project Alpha
            ...
            next: llamactl auth inject, or llamactl auth exec -- COMMAND
            $ llamactl auth login --project Alpha
            ...
            next: llamactl auth inject, or llamactl auth exec -- COMMAND
        """)

    def test_how_many_profiles_are_to_be_deleted(self):
        for names, count in (("a", "1 profile"), ("abc", "3 profiles")):
            self.write_store(dict.fromkeys(names, {"auth_type": "token"}))
            question = f"Delete {count} and, for logins, their API keys? [y/N]"
            self.answer(b"n\n", f"{question} error: nothing was deleted\n[1]")
            self.assertEqual(list(self.profiles()), list(names))
            self.answer(b"y\n", f"{question} profile a deleted\n...")
            self.assertEqual(self.profiles(), {})
        self.write_store({"a": {"auth_type": "token"}})
        question = "Delete 1 profile and, for logins, their API keys? [y/N]"
        refusal = f"{question} error: nothing was deleted\n[1]"
        self.answer(b"n\n", refusal, f"environments delete {self.url}")
        self.assertEqual(list(self.profiles()), ["a"])

    def answer(self, typed, shown, command="auth logout --all"):
        transcript = f"$ llamactl {command}\n{shown}"
        self.play(transcript, stdin=typed, terminal=True)

    def test_a_key_for_the_dash_is_typed_where_somebody_can(self):
        with unittest.mock.patch("getpass.getpass", return_value=KEY) as ask:
            for flags in ("--api-key -", "--api-key-file -", "--no-verify --api-key -"):
                self.write_store({})
                self.done(f"auth token {flags} --project proj-beta", terminal=True)
                self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)
        self.assertEqual({call[0][0] for call in ask.call_args_list}, {"API key: "})

    def test_a_key_for_the_dash_is_read_where_nobody_can_type(self):
        command = f"auth exec --api-key-file - --project {UNSEEN} -- env"
        env = {"LLAMA_CLOUD_BASE_URL": NOWHERE}
        result = self.process(command, stdin=KEY.encode(), env=env, sings=True)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn(f"LLAMA_CLOUD_API_KEY={KEY}\n", result.out)

    def test_a_complaint_about_an_answer_stands_above_the_question(self):
        self.cloud.projects = [
            {"project_id": f"p-{number}", "project_name": f"Project {number}"}
            for number in range(40)
        ]
        self.play(
            f"""
            $ llamactl auth token --api-key {KEY}
            ...
            zzz is not on the list (1 to 20)
            Project, by number or name: profile llx-wxyz is current, project ...(p-7)
            next: ...
            """,
            stdin=b"zzz\np-7\n",
            terminal=True,
        )


class StraySecrets(CommandCase):
    """A key in the wrong place is not echoed."""

    SECRET = "s3cr3t-of-20-letters"
    SHORT = "s3cr3t-of-19-letter"

    def setUp(self):
        super().setUp()
        self.with_profile()

    def test_a_mask_is_a_text_in_yaml(self):
        self.with_profile()
        for name in (KEY, f"{KEY}-a", f"a {KEY}"):
            self.cloud.projects[0]["project_name"] = name
            shown = self.rows("projects get")[0]["project_name"]
            self.assertEqual(shown, name.replace(KEY, "********"))

    def test_a_key_in_the_wrong_place_is_not_echoed(self):
        for words in f"""
            auth token CANARY-with-no-prefix
            auth token --api-kye=CANARY-with-no-prefix
            auth token --api-kye CANARY-with-no-prefix
            auth token --no-verify=CANARY-with-no-prefix
            auth token {OTHER_KEY}
            auth token -- {OTHER_KEY}
            auth token --api-kye={OTHER_KEY}
            auth token --api-kye {OTHER_KEY}
            auth token --api-key{OTHER_KEY}
            auth token --apikey:{OTHER_KEY}
            auth token -k{OTHER_KEY}
            auth token -k {OTHER_KEY}
            auth token --no-verify={OTHER_KEY}
            auth token --quiet={OTHER_KEY}
            auth get -o {OTHER_KEY}
            auth get -o CANARY-with-no-prefix
            auth get --output={OTHER_KEY}
            auth login {OTHER_KEY}
            auth inject {OTHER_KEY}
            --api-key={OTHER_KEY}
            auth {OTHER_KEY}
            auth tokn {OTHER_KEY}
            auth tokn --api-key {OTHER_KEY}
            {OTHER_KEY}
            token {OTHER_KEY}
            auth use {OTHER_KEY}
            auth get {OTHER_KEY}
            --profile {OTHER_KEY} projects get
            projects get {OTHER_KEY}
            environments add {OTHER_KEY}
            environments use https://{OTHER_KEY}@llama.example
        """.strip().splitlines():
            with self.subTest(words):
                result = self.call(words.strip())
                self.assertIn(result.code, (1, 2))
                self.assertRegex(result.err, "^error: ")
                self.assertNotIn("canary", (result.out + result.err).lower())
        self.assertEqual(list(self.profiles()), ["main"])

    def test_a_long_word_is_not_quoted(self):
        """It may be a secret of any kind; what is short, or a UUID, is a slip."""
        for words in (
            "auth|auth get|auth use|auth logout|auth status|projects get|projects use|"
            "deployments get|environments add|environments use"
        ).split("|"):
            for word in (self.SHORT, self.SECRET, "x" * 500):
                with self.subTest(words, word=word):
                    result = self.call(words, word)
                    self.assertIn(result.code, (1, 2))
                    quoted = word == self.SHORT and not words.startswith("environments")
                    self.assertEqual(word in result.err, quoted, result.err)
        self.play(f"""
            $ llamactl {self.SHORT}
            error: ...`{self.SHORT}`
            hint: ...
            [2]
            $ llamactl {self.SECRET}
            error: ...`********`
            hint: ...
            [2]
            $ llamactl auth get --{self.SHORT}
            error: unknown option --s
            hint: ...
            [2]
            $ llamactl auth get --secret-of-letters-alone
            error: unknown option ********
            hint: ...
            [2]
            $ llamactl projects use {UNSEEN}
            error: ...{UNSEEN}...
            [1]
        """)


class MalformedKeys(CommandCase):
    """A key that no header or file could carry is neither sent, stored nor shown."""

    BAD = (
        "llx-CANARY\nX-Forged: 1",
        "llx-CANARY with space",
        "llx-CANARY-\u00e9t\u00e9",
        "llx-CANARY\x1b[2J",
        "llx-CANARY\x00",
        "llx-CANARY\r\ninjected",
        "llx-CANARY\u2028x",
    )

    def check(self, *argv, codes=(2,), **options):
        result = self.call(*argv, **options)
        self.assertIn(result.code, codes, result.err)
        self.assertRegex(result.err, "(?i)^error: .*key")
        self.assertEqual(self.requests(), [])

    def test_flag_stdin_and_file(self):
        token = "auth token --project proj-alpha"
        for bad in self.BAD:
            path = self.key_file(bad.encode())
            for command in (token, f"{token} --no-verify"):
                with self.subTest(command, bad=bad):
                    self.check(f"{command} --api-key", bad)
                    self.check(f"{command} --api-key -", stdin=bad.encode())
                    self.check(f"{command} --api-key-file {path}")
        for content in (b"", b"\n", b" \t\r\n", b"llx-CANARY\xff"):
            self.check(f"{token} --api-key -", stdin=content)
        self.assertEqual(self.profiles(), {})

    def test_variable_and_store(self):
        inject = "auth inject --env-file -"
        env = {"LLAMA_AGENTS_PROJECT_ID": "p", "LLAMA_CLOUD_BASE_URL": self.url}
        for bad in self.BAD:
            with self.subTest(bad):
                self.with_profile(key=bad)
                if "\x00" not in bad:  # as any locale would hand it over
                    env["LLAMA_CLOUD_API_KEY"] = os.fsdecode(bad.encode())
                    self.check("deployments get", env=env)
                    self.check(inject, env=env)
                self.check("projects get", codes=(1, 2))
                self.check(inject, codes=(1, 2))
                self.done("auth get")
                self.done("auth logout main")

    def test_what_surrounds_a_pasted_key_is_removed(self):
        for pasted in (f'"{KEY}"', f"'{KEY}'", f" {KEY}\r\n", f"\x1b[200~{KEY}\x1b[201~"):
            with self.subTest(pasted):
                self.write_store({})
                self.done("auth token --project Alpha --api-key", pasted)
                self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)


class Mistakes(CommandCase):
    """What people get wrong, and the two lines that come back."""

    OTHER = "https://api.cloud.eu.llamaindex.ai"

    def setUp(self):
        super().setUp()
        self.patch(REGIONS={self.url: self.OTHER})
        main = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        old = {"auth_type": "token", "api_key": "llx-CANARY-revoked"}
        self.write_store({"main": main, "old": old}, "main")
        with open(self.store_path) as file:
            data = json.load(file)
        data["environments"][self.OTHER] = {"profiles": {"elsewhere": main}}
        with open(self.store_path, "w") as file:
            json.dump(data, file)
        self.before = self.store_text()
        self.projects = self.url + LIST_PROJECTS

    def tearDown(self):
        self.assertEqual(self.store_text(), self.before)
        super().tearDown()

    def test_with_an_address(self):
        self.play(f"""
            $ llamactl environments add api.cloud.llamaindex.ai
            error: an API URL is http(s)://HOST, without user, query or fragment
            hint: llamactl environments add https://api.cloud.llamaindex.ai
            [2]
            $ llamactl environments add localhost:8000
            error: an API URL is ...
            hint: llamactl environments add http://localhost:8000
            [2]
            $ llamactl environments add {self.url}/api/v1
            error: {self.url}/api/v1{VERSION} answered 404: Not Found (request ...)
            hint: llamactl environments add {self.url}
            [1]
            $ llamactl environments add {self.url.replace("http:", "https:")}
            error: ...: TLS failed: the server does not use TLS
            hint: llamactl environments add {self.url}
            [5]
            $ llamactl environments add {NOWHERE}
            error: {NOWHERE}: connection refused
            hint: llamactl environments add {NOWHERE} --no-verify
            [5]
        """)

    def test_with_the_address_of_the_web_console(self):
        site = self.url.replace("127.0.0.1", "cloud.localhost")
        self.cloud.fault("*", "html")
        lookup = socket.getaddrinfo
        with unittest.mock.patch.object(
            socket, "getaddrinfo", lambda host, *rest: lookup("127.0.0.1", *rest)
        ):
            self.play(f"""
                $ llamactl environments add {site}
                error: {site}{VERSION} returned a web page; \
is a portal in the way, or is it the web console?
                hint: llamactl environments add {site.replace("cloud", "api.cloud")}
                [5]
            """)

    def test_with_a_key(self):
        token = "llamactl auth token --project Alpha --api-key"
        self.play(f"""
            $ {token} LLAMA_CLOUD_API_KEY={KEY}
            error: the API key has a name in front of it; give the key alone
            [2]
            $ {token} '"LLAMA_CLOUD_API_KEY={KEY}"'
            error: the API key has a name in front of it; give the key alone
            [2]
            $ {token} sk-proj-CANARY-0123456789
            error: the API key was rejected: {self.projects} answered 401: \
Invalid authentication credentials (request ...); a LlamaCloud key begins with llx-
            hint: create a key in the web console (LlamaCloud: https://cloud.llamaindex.ai)
            [4]
            $ {token} llx-CANARY-of-another-region
            error: the API key was rejected: ...; a key belongs to one region
            hint: llamactl environments add {self.OTHER}
            [4]
            $ llamactl auth exec --api-key-file {self.key_file(KEY.encode())} -- true
            error: no project given; use --project ID
            [2]
            $ llamactl auth use {KEY}
            error: {self.url} has no profile ********; available: main, old
            hint: llamactl auth get
            [1]
            $ llamactl auth token {KEY}
            error: one argument too many: ********
            hint: llamactl auth token --help
            [2]
            $ llamactl projects use beta --profile old
            error: {self.projects} answered 401: ...
            hint: llamactl auth token --name old
            [4]
        """)

    def test_with_a_key_that_may_not_list_projects(self):
        body = {"detail": "No access"}
        self.cloud.fault("*", "status", status=403, body=body)
        self.play(f"""
            $ llamactl auth token --project Alpha --api-key {OTHER_KEY}
            error: the API key is not allowed to list projects: {self.projects} \
answered 403: No access (request ...)
            hint: llamactl auth token --no-verify --api-key-file PATH --project ID
            [4]
        """)

    def test_with_a_name_that_two_projects_have(self):
        self.cloud.projects.append(dict(self.cloud.projects[0], project_id="third"))
        self.play(f"""
            $ llamactl auth inject --project Alpha
            error: 2 projects are called Alpha: proj-alpha (Alpha), third (Alpha)
            [1]
            $ llamactl environments use {self.url}
            environment {self.url} is current; profile main
        """)
        self.cloud.fault(LIST_PROJECTS, "status", status=500)
        self.play("""
            $ llamactl auth inject --project Alpha
            error: ...500...
            ...
            [5]
        """)

    def test_behind_a_firewall_or_a_portal(self):
        page = "<html>Blocked by policy</html>"
        self.cloud.fault("*", "status", status=403, body=page)
        self.cloud.fault("*", "html")
        self.play(f"""
            $ llamactl auth token --project Alpha --api-key {OTHER_KEY}
            error: {self.projects} answered 403 with a web page (request ...)
            hint: llamactl auth status --offline
            [5]
            $ llamactl projects get
            error: {self.projects} returned a web page; is a portal in the way, ...
            hint: llamactl auth status --offline
            [5]
        """)

    def test_with_a_name(self):
        self.play(f"""
            $ llamactl auth inject --project Gamma
            error: project Gamma not found; available: proj-alpha (Alpha), proj-beta (Beta)
            [1]
            $ llamactl auth use elsewhere
            error: profile elsewhere belongs to {self.OTHER}, not to {self.url}
            hint: llamactl environments use {self.OTHER}
            [1]
            $ llamactl auth use Alpha
            error: {self.url} has no profile Alpha; available: main, old
            hint: llamactl auth get
            [1]
        """)

    def test_with_a_variable(self):
        self.play(f"""
            $ LLAMACTL_PROFILE=nope llamactl config
            error: LLAMACTL_PROFILE: {self.url} has no profile nope; available: main, old
            hint: unset LLAMACTL_PROFILE
            [1]
            $ LLAMACTL_TIMEOUT=abc llamactl auth token
            error: LLAMACTL_TIMEOUT must be a whole number of seconds, 1 to 999
            [2]
            $ LLAMA_CLOUD_API_KEY=X=1 LLAMA_AGENTS_PROJECT_ID=p llamactl projects get
            error: LLAMA_CLOUD_API_KEY: the API key has a name in front of it; ...
            hint: unset LLAMA_CLOUD_API_KEY
            [2]
            $ LLAMA_CLOUD_API_KEY=k LLAMA_CLOUD_BASE_URL=a.example llamactl projects get
            error: LLAMA_CLOUD_BASE_URL: an API URL is ...
            hint: unset LLAMA_CLOUD_BASE_URL
            [2]
        """)


class Names(CommandCase):
    """Names that people choose; those that are made stand in ProfilesTest."""

    def test_a_hint_can_be_pasted_whatever_the_name(self):
        self.login("--project proj-alpha --name $(id)")
        self.play(f"""
            $ llamactl auth token --api-key {KEY} --project proj-alpha --name '$(id)'
            error: profile $(id) is a login
            hint: llamactl auth logout '$(id)'
            [1]
        """)

    def test_names_that_no_listing_could_carry(self):
        token = f"auth token --api-key {KEY} --project proj-alpha"
        for name in (" ", "-x", "a\nb", "a\x1b[2J", "\u202ea", " a"):
            with self.subTest(name):
                self.expect_failure(self.call(token, "--name=" + name), 2, "--name")
        self.assertEqual(self.profiles(), {})


class HostileTexts(CommandCase):
    """What a server sends can neither act on a terminal nor give a secret away."""

    TEXTS = "display_name repo_url git_ref status warning apiserver_url appserver_version"

    def setUp(self):
        super().setUp()
        self.with_profile()
        self.everywhere(HOSTILE)

    def everywhere(self, text):
        """Let the server say TEXT wherever it may say any."""
        for project in self.cloud.projects:
            project["project_name"] = text
        for organization in self.cloud.organizations:
            organization["org_name"] = text
        texts = dict.fromkeys(self.TEXTS.split(), text)
        deployment = dict(self.cloud.deployments[0], secret_names=[text], **texts)
        self.cloud.deployments = [deployment]

    def assert_harmless(self, text, lines=None):
        self.assertIsNone(UNSHOWN.search(text), ascii(text))
        if lines is not None:
            self.assertEqual(len(text.splitlines()), lines, text)

    def test_tables(self):
        for words, lines in (
            ("projects get", 3),
            ("organizations get", 3),
            ("deployments get", 2),
            ("deployments get -o wide", 2),
            ("deployments get invoices", 2),
        ):
            with self.subTest(words):
                result = self.done(words)
                self.assert_harmless(result.out, lines)
                self.assert_harmless(result.err)
                self.assertIn("FORGED", result.out)

    def test_json_and_yaml_keep_the_value_in_harmless_words(self):
        for words in ("projects get proj-alpha", "deployments get", "organizations get"):
            with self.subTest(words):
                for output in ("json", "yaml"):
                    self.assert_harmless(self.done(f"{words} -o {output}").out)
        self.assertEqual(self.rows("projects get proj-alpha")["project_name"], HOSTILE)
        self.cloud.projects[0]["project_name"] = "a\ud800z"
        self.assertEqual(self.rows("projects get proj-alpha")["project_name"], "a\ufffdz")
        self.assertIn("a\ufffdz", self.done("projects get").out)

    def test_notices_and_stored_names(self):
        self.assert_harmless(self.done("projects use proj-beta").err, 1)
        self.assert_harmless(self.done("config").out, 2)
        self.assertEqual(self.rows("config")["project_name"], HOSTILE)
        self.assert_harmless(self.done("auth status").out)
        self.assert_harmless(self.call("projects use").err, 1)

    def test_codes_and_addresses_of_a_login(self):
        page = "https://id.example/"
        self.cloud.device_answer = {"user_code": HOSTILE, "verification_uri": page}
        self.cloud.token_script = [(400, {"error": "access_denied"})]
        self.assert_harmless(self.call("auth login").err, 6)
        self.assert_harmless(self.done("auth login --start").out, 5)
        for name in ("verification_uri", "verification_uri_complete"):
            with self.subTest(name):
                self.cloud.device_answer = {name: HOSTILE}
                result = self.call("auth login")
                self.expect_failure(result, 1, "unusable URL")
                self.assert_harmless(result.err)

    def test_errors_of_any_shape(self):
        for body in (
            {"detail": HOSTILE},
            {"detail": [{"loc": [HOSTILE], "msg": HOSTILE}]},
            {"detail": {"a": [HOSTILE]}},
            {"error": HOSTILE},
            [HOSTILE],
            HOSTILE,
        ):
            for status, code in ((400, 1), (401, 4), (500, 5)):
                with self.subTest(body=body, status=status):
                    self.cloud.fault("*", "status", status=status, body=body)
                    result = self.call("projects get")
                    self.expect_failure(result, code, str(status))
                    self.assert_harmless(result.err)

    def test_a_project_whose_id_is_no_word_is_not_used(self):
        before = self.store_text()
        for bad in (HOSTILE, "a b", "\u00e9", "x\nLLAMA_CLOUD_BASE_URL=https://evil"):
            self.cloud.projects = [{"project_id": bad, "project_name": "x"}]
            for words in (f"auth token --api-key {KEY}", "projects use"):
                with self.subTest(words, bad=bad):
                    result = self.call(words)
                    self.assertNotEqual(result.code, 0)
                    self.assert_harmless(result.err)
        self.assertEqual(self.store_text(), before)

    def test_an_echoed_secret_is_masked(self):
        echo = f"key {KEY} of {KEY}"
        self.everywhere(echo)
        for words in ("projects get", "deployments get", "deployments get -o wide"):
            for option in ("", " -o json", " -o yaml"):
                with self.subTest(words + option):
                    shown = self.done(words + option).out
                    self.assertIn("key ******** of ********", shown)
        for words in ("projects use proj-beta", "config", "auth status"):
            self.done(words)  # the canary listens in tearDown()
        ids = {"x-request-id": KEY}
        for body in ({"detail": echo}, {"detail": [{"msg": echo}]}):
            self.cloud.fault("*", "status", status=403, body=body, headers=ids, times=2)
            self.play(f"""
                $ llamactl projects get
                error: ...403: key ******** of ******** (request ********)
                [1]
                $ llamactl auth token --api-key {KEY} --project proj-alpha
                error: ...403: key ******** of ******** (request ********)
                ...
                [4]
            """)
        self.cloud.fault("*", "redirect", to=f"https://evil.example/{KEY}")
        self.play("""
            $ llamactl projects get
            error: ...https://evil.example/********: refused
            [1]
        """)

    def test_a_text_that_is_cut_leaves_no_part_of_an_echoed_secret(self):
        key = "CANARY-of-a-key-in-words-that-hyphens-part"
        self.with_profile(key=key)
        parts = [key[start : start + 8] for start in range(len(key) - 7)]
        for offset in range(200, 311, 9):
            for filler in ("word " * 62, "a-b-" * 78, " " * 311):
                echo = filler[:offset] + key + " and more" * 40
                path = echo.replace(" ", "/")
                for kind, options in (
                    ("status", {"status": 400, "body": {"detail": echo}}),
                    ("status", {"status": 400, "headers": {"x-request-id": echo}}),
                    ("redirect", {"to": f"https://evil.example/{path}"}),
                    ("redirect", {"to": f"ftp://evil.example/{path}"}),
                ):
                    with self.subTest(kind, offset=offset, filler=filler[:4]):
                        self.cloud.fault("*", kind, **options)
                        result = self.call("projects get")
                        self.assertEqual(result.code, 1, result.err)
                        self.assertEqual([part for part in parts if part in result.err], [])


class Twice(CommandCase):
    """Bootstrap scripts run again: the same outcome, exit 0, nothing added."""

    def test_each_command(self):
        for words in (
            f"environments add {self.url}",
            f"environments use {self.url}",
            f"auth token --api-key {KEY} --project proj-alpha",
            f"auth token --api-key {KEY} --project proj-beta --name prod",
            "auth use prod",
            "projects use proj-alpha",
            f"auth inject --env-file {self.home}/.env",
        ):
            with self.subTest(words):
                self.done(words)
                before = self.store_text()
                self.done(words)
                self.assertEqual(self.store_text(), before)
        self.assertEqual(sorted(self.profiles()), ["llx-wxyz", "prod"])

    def test_a_file_that_is_up_to_date_is_not_written(self):
        self.with_profile()
        path = os.path.join(self.home, ".env")
        self.done("auth inject --env-file", path)
        before = os.stat(path)
        self.done("auth inject --env-file", path)
        after = os.stat(path)
        self.assertEqual(after.st_ino, before.st_ino)
        self.assertEqual(after.st_mtime_ns, before.st_mtime_ns)


# ========================================================================================
# readme: typed from top to bottom; the demo; the sandbox; a release
# ========================================================================================

SANDBOX_URL = "http://127.0.0.1:8000"
SANDBOX_KEY = "llx-sandbox-0123456789-demo"


def console_blocks():
    """The `console` blocks of the README."""
    return re.findall(r"(?ms)^```console\n(.*?)^```", text_of("README.md"))


def steps(block):
    """Each command of a console block, and the lines that it prints."""
    for step in re.split(r"(?m)^\$ ", block)[1:]:
        command, *lines = step.replace("\\\n> ", "").splitlines()
        yield command, lines


def sandbox_cloud():
    """A cloud that approves each login by itself, at the second poll, unless told."""
    cloud = Cloud()
    cloud.interval, cloud.pending_polls, cloud.auto_approve = 0.2, 1, {}
    cloud.add_key(SANDBOX_KEY)
    return cloud


def stand_in_on_a_port_as_wide():
    """The sandbox's stand-in on a port of four digits, so that tables are as wide as
    shown."""
    for port in random.sample(range(8001, 9999), 50):
        with contextlib.suppress(OSError):
            return StandIn(sandbox_cloud(), port=port).start()
    raise AssertionError("no free port")


def shell_tools(home):
    """The PATH of a shell that finds `llamactl`, and this Python as `python3`."""
    tools = os.path.join(home, "bin")
    os.mkdir(tools)
    for name, program in (("llamactl", f'"{PROGRAM}"'), ("python3", "")):
        script = f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n'
        write_file(os.path.join(tools, name), script, 0o755)
    shutil.copy(PROGRAM, os.path.join(home, "llamactl.py"))
    return tools + os.pathsep + os.environ.get("PATH", os.defpath)


class Readme(Case):
    """Every console block is typed against the stand-in, and prints what it says.

    A recipe runs as pasted, but for the paths of its unit or image, and with small scripts
    in place of the programs around it.
    """

    # where the commands of a recipe stand, by the language of its block
    COMMANDS = {
        "sh": r"(?s)(.*)",
        "text": r"(?m)^[0-9* ]+  (.*)$",
        "ini": r"(?m)^ExecStart=(.*)$",
        "dockerfile": r"(?m)^(?:RUN(?: --\S+)?|CMD) +(.*)$",
        "yaml": r"(?s)(?:run: \||script:)\n(.*)|command: (\[[^\n]*\])",
    }
    PATHS = (
        r"/usr/local/bin/|/usr/bin/(?!env)|\$HOME/.local/bin/|/srv/app/|/etc/app/|/var/lib/"
    )
    TOOLS = {
        "kubectl": "cat",
        "vault": f"echo {SANDBOX_KEY}",
        "op": f"echo {SANDBOX_KEY}",
        "useradd": ":",
    }
    # the words that a recipe begins with, and what it prints
    RECIPES = """
        **GitHub Actions.**    ::add-mask::llx-sandbox-0123456789-demo
        **GitLab.**            app in proj-alpha
        **A Docker image**     app in proj-alpha
        An image whose user
        A key for one step     app in proj-alpha
        **Docker Compose:**    app in proj-alpha
        **systemd.**           llama.env written
        or systemd hands       app in proj-alpha
        **Kubernetes.**        LLAMA_CLOUD_API_KEY=llx-sandbox-0123456789-demo
        **cron**,              app in proj-alpha
        **Vault, 1Password.**  profile op is current, project Alpha (proj-alpha)
        **zipapp.**
        """

    def setUp(self):
        super().setUp()
        self.text = text_of("README.md")

    def may_hold_secrets(self, path):
        return True  # a README shows where keys come to lie

    def sandbox(self):
        """The stand-in as `sandbox` sets it up, and a shell's environment with
        `llamactl`."""
        stand_in = stand_in_on_a_port_as_wide()
        self.addCleanup(stand_in.stop)
        self.env["PATH"] = shell_tools(self.home)
        del self.env["LLAMACTL_CONFIG_DIR"]
        return stand_in.url

    def test_every_console_block(self):
        """In this process where a line needs no shell; `demo` types all into a shell."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.home)
        url = self.sandbox()
        blocks = console_blocks()
        self.assertGreater(len(blocks), 5)
        self.call(f"environments add {url}")
        for command, lines in steps("".join(blocks).replace(SANDBOX_URL, url)):
            if re.search(r"[|<>']|auth exec", command):
                shown = self.run_command("sh", "-c", command, stderr=subprocess.STDOUT)
                with self.subTest(command):
                    self.assert_shown(shown.out, lines)
                    self.assertEqual(shown.code != 0, "error: " in shown.out)
            else:
                self.play("\n".join(["$ " + command] + lines))

    def test_the_script_for_bootstrapping_runs_twice_as_once(self):
        url = self.sandbox()
        (script,) = re.findall(
            "(?ms)^```sh\n(#!.*?\nset -euo pipefail\n.*?)^```$", self.text
        )
        self.assertLessEqual(len(script.splitlines()), 25)
        os.unlink(os.path.join(self.home, "bin", "llamactl"))  # it installs that
        settings = {
            "LLAMACTL_URL": f"file://{self.home}/llamactl.py",
            "LLAMACTL_SHA256": sha256_of(PROGRAM) + "  llamactl.py",
            "LLAMA_URL": url,
            "LLAMA_KEY_FILE": write_file(f"{self.home}/key.txt", SANDBOX_KEY + "\n"),
            "LLAMA_PROJECT": "beta",
        }
        if not shutil.which("curl"):  # then what it would fetch is there already
            folder = os.path.join(self.home, ".local", "bin")
            os.makedirs(folder)
            os.chmod(shutil.copy(PROGRAM, os.path.join(folder, "llamactl")), 0o755)
        written = []
        for said in (
            "profile bootstrap is current, project Beta (proj-beta)",
            ".env is up to date",
        ):
            result = self.run_command("bash", "-c", script, env=settings, timeout=60)
            self.assertEqual(result.code, 0, result.err)
            self.assertIn(said, result.err)
            self.assertIn("running in project proj-beta", result.out)
            store = os.path.join(self.home, ".config", "llamactl", "profiles.json")
            written.append(file_bytes(store) + file_bytes(self.home + "/.env"))
        self.assertEqual(written[0], written[1])

    def script(self, kind, block):
        """The commands of a recipe for a shell."""
        found = re.findall(self.COMMANDS[kind], block.replace("\\\n", ""))
        lines = []
        for line in "\n".join("".join(each) for each in found).splitlines():
            line = re.sub("^ *(- )?", "", line)
            if line.startswith("["):
                line = " ".join(shlex.quote(word) for word in json.loads(line))
            lines.append(re.sub(self.PATHS, "", line))
        script = "\n".join(lines).replace("/run/secrets/llama", "key.txt")
        return script.replace("-o app ", "")

    def shell(self, script):
        return self.run_command("sh", "-e", "-c", script, stderr=subprocess.STDOUT)

    def test_every_recipe(self):
        url = self.sandbox()
        for name, command in self.TOOLS.items():
            write_file(f"{self.home}/bin/{name}", f"#!/bin/sh\n{command}\n", 0o755)
        for name in ("key.txt", "llama"):
            write_file(f"{self.home}/{name}", SANDBOX_KEY)
        app = "import os\nprint('app in', os.environ['LLAMA_AGENTS_PROJECT_ID'])\n"
        write_file(f"{self.home}/app.py", app)
        self.shell(f"llamactl environments add {url}")
        self.shell(
            "llamactl auth token --name bootstrap --api-key-file key.txt --project Alpha"
        )
        self.env.update(
            LLAMA_CLOUD_API_KEY=SANDBOX_KEY,
            LLAMA_AGENTS_PROJECT_ID="proj-alpha",
            LLAMA_CLOUD_BASE_URL=url,
            CREDENTIALS_DIRECTORY=self.home,
            GITHUB_ENV=f"{self.home}/github.env",
        )
        recipes = self.text.partition("### Recipes")[2].partition("\n### ")[0]
        table = [line.strip().split("  ", 1) for line in self.RECIPES.strip().splitlines()]
        self.assertEqual(recipes.count("\n```\n"), len(table) + 1)  # a unit more
        for words, *printed in table:
            with self.subTest(words):
                part = recipes[recipes.index(f"\n{words}") :]
                kind, block = re.search("(?ms)^```([a-z]+)\n(.*?)^```$", part).groups()
                result = self.shell(self.script(kind, block))
                self.assertEqual(result.code, 0, result.out)
                self.assertIn("".join(printed).strip(), result.out)
        with open(self.env["GITHUB_ENV"]) as file:
            self.assertIn(f"LLAMA_CLOUD_API_KEY={SANDBOX_KEY}\n", file.read())
        self.assertEqual(self.shell("set -a; . ./llama.env; python3 app.py").code, 0)
        self.assertEqual(self.shell("./llamactl.pyz auth get nobody").code, 1)

    def test_the_first_screen_shows_what_one_came_for(self):
        screen = "\n".join(self.text.splitlines()[:40])
        for words in ("llamactl auth login", "llamactl auth inject", "## Install", "PATH"):
            self.assertIn(words, screen)
        self.assertIn("`python3 test_llamactl.py`", self.text)

    def test_nothing_in_it_is_out_of_date(self):
        commands = ["llamactl " + words for words in llamactl.COMMANDS]
        codes = [f"\n| {code} |" for code in (0, 1, 2, 4, 5, 130)]
        variables = (
            "LLAMA_CLOUD_API_KEY LLAMA_AGENTS_PROJECT_ID LLAMA_CLOUD_BASE_URL "
            "LLAMA_CLOUD_USE_PROFILE LLAMACTL_PROFILE LLAMACTL_CONFIG_DIR"
        )
        for words in commands + codes + variables.split():
            self.assertTrue(words in self.text, words)

    def test_the_table_of_attacks_counts_rightly(self):
        rows = dict(re.findall(r"(?m)^\| ([^|:]+)[^|]*\| ([^|]+) \|", self.text))
        faults = len(FAST_FAULTS) + len(SLOW_FAULTS) + 1  # 1: https to http
        self.assertEqual(rows["network"], str(len(ENDPOINTS) * faults))
        documents = sum(1 for _ in yaml_samples())
        self.assertEqual(rows["YAML"], f"{documents:,} documents")
        files = sum(EnvText.GENERATED.values())
        self.assertEqual(rows["`.env`"], f"{files:,} files")


def sha256_of(path):
    return hashlib.sha256(file_bytes(path)).hexdigest()


def release(folder=HERE):
    """Set __version__, and what the README pins of it; without a version check these."""
    source = text_of(folder, "llamactl.py")
    text = text_of(folder, "README.md")
    (stated,) = re.findall('(?m)^__version__ = "(.*)"$', source)
    version = sys.argv[2] if sys.argv[2:] else stated
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        print(f"a version is X.Y.Z, not {version}")
        return 2
    source = source.replace(f'__version__ = "{stated}"', f'__version__ = "{version}"')
    digest = hashlib.sha256(source.encode("utf-8")).hexdigest()
    pinned = re.sub(r"/v\d+\.\d+\.\d+/", f"/v{version}/", text)
    pinned = re.sub(r"\b[0-9a-f]{64}\b", digest, pinned)
    if sys.argv[2:]:
        for name, content in (("llamactl.py", source), ("README.md", pinned)):
            path = os.path.join(folder, name)
            write_file(path, content, os.stat(path).st_mode)
        print(f"pinned {version}, {digest}")
        return 0
    stale = [
        pair for pair in zip(text.splitlines(), pinned.splitlines()) if len({*pair}) > 1
    ]
    for was, should_be in stale:
        print(f"README.md is stale:\n- {was}\n+ {should_be}")
    return 1 if stale else 0


class Release(Case):
    def test_a_checkout_with_other_line_ends_runs_and_has_the_same_checksum(self):
        for name in ("llamactl.py", "README.md"):
            content = file_bytes(os.path.join(HERE, name)).replace(b"\n", b"\r\n")
            write_file(os.path.join(self.home, name), content)
        self.release("9.8.7")
        self.assertEqual(self.release(), (0, ""))
        command = [sys.executable, os.path.join(self.home, "llamactl.py"), "--version"]
        self.assertEqual(self.run_command(*command).code, 0)

    def release(self, *argv):
        """The exit code of the command, on copies, and what it says."""
        said = io.StringIO()
        with unittest.mock.patch.object(sys, "argv", ["test", "release", *argv]):
            with contextlib.redirect_stdout(said):
                return release(self.home), said.getvalue()

    def test_it_pins_a_version_or_says_what_is_stale(self):
        for name in ("llamactl.py", "README.md"):
            shutil.copy(os.path.join(HERE, name), self.home)
        program = os.path.join(self.home, "llamactl.py")
        code, said = self.release("9.8.7")
        self.assertEqual((code, said[:13]), (0, "pinned 9.8.7,"))
        self.assertEqual(self.release(), (0, ""))
        readme = text_of(self.home, "README.md")
        self.assertEqual(
            [readme.count("/v9.8.7/"), readme.count(sha256_of(program))], [2, 2]
        )
        source = text_of(program)
        self.assertIn('\n__version__ = "9.8.7"\n', source)
        write_file(program, source.replace("9.8.7", "9.8.8"))
        code, said = self.release()
        self.assertEqual(code, 1)
        for pin in ("/v9.8.8/", sha256_of(program)):
            self.assertRegex(said, f"(?m)^[+] .*{pin}")
        self.assertEqual(self.release("9.8"), (2, "a version is X.Y.Z, not 9.8\n"))


class Demo(Case):
    def test_it_shows_the_whole_job(self):
        env = {"LLAMACTL_UNDER_TEST": PROGRAM}
        shown = self.run_command(
            sys.executable, THIS, "demo", env=env, timeout=120, sings=True
        )
        self.assertEqual(shown.code, 0, shown.out)
        for command, _ in steps("".join(console_blocks() + [NOT_IN_THE_README])):
            command = command.partition("http:")[0]
            self.assertIn(f"\n$ {command}", shown.out)


class Sandbox(Case):
    def test_what_it_says_works_and_a_login_ends_as_it_is_told(self):
        env = dict(self.env, LLAMACTL_UNDER_TEST=PROGRAM, TMPDIR=self.home)
        sandbox = Screen([sys.executable, THIS, "sandbox"], env, self.home)
        self.addCleanup(sandbox.close)
        sandbox.wait_for("Ctrl-C ends it", 20)
        script = "\n".join(re.findall("(?m)^  (.*?)\r?$", sandbox.text()))
        script = script.replace("alias llamactl=", "run=").replace("\nllamactl", "\n$run")
        for word, code, said in (
            ("approve", 0, "logged in as dev@example.com"),
            ("deny", 4, "denied in the browser"),
            ("expire", 4, "expired before it was approved"),
        ):
            with self.subTest(word):
                login = self.popen("sh", "-e", "-c", f"{script} --project proj-alpha")
                for line in login.stderr:
                    if b"Or open" in line:
                        break
                sandbox.type(f"{word}\n".encode())
                sandbox.wait_for(f"{word}: ", 20)
                result = self.outcome_of(login)
                self.assertEqual(result.code, code, result.err)
                self.assertIn(said, result.err)
        sandbox.type(b"\x03")
        self.assertEqual(sandbox.finish(20), 0)
        self.assertNotIn("llamactl-sandbox", "".join(os.listdir(self.home)))


# ========================================================================================
# demo, sandbox, bench
# ========================================================================================

NOT_IN_THE_README = """
$ llamactl auth token --api-key-file key.txt --project alpha
profile llx-demo is current, project Alpha (proj-alpha)
next: llamactl auth inject, or llamactl auth exec -- COMMAND
$ llamactl auth status
NAME ... SOURCE ... VALUE
environment ... environments use ... http://127.0.0.1:8000
profile ... auth use ... llx-demo
user ... server ... dev@example.com
project_id ... profile ... proj-alpha
project_name ... profile ... Alpha
api_key ... profile ... ********demo
...
credential ... works
detail ...
$ llamactl auth login --project beta --quiet
Logging in to http://127.0.0.1:8000 with http://127.0.0.1:8000.
...
$ cat .env
LLAMA_CLOUD_API_KEY=...
LLAMA_CLOUD_BASE_URL=http://127.0.0.1:8000
LLAMA_AGENTS_PROJECT_ID=...
$ llamactl deployments get --project alpha -o wide
NAME ... REPO ... GIT_REF ... PHASE ... APPSERVER ... GIT_SHA ... APISERVER_URL ... PROJECT
...
warning: chat-bot: The last build failed; the previous one is served.
$ llamactl auth import --from-official
...
$ LLAMACTL_PROFILE=llx-demo llamactl auth get -o yaml
...
- name: llx-demo
...
$ llamactl auth logout dev@example.com
profile dev@example.com deleted
$ llamactl auth logout --all
profile llx-demo deleted
profile old deleted
$ llamactl projects get
error: not logged in to http://127.0.0.1:8000
hint: llamactl auth login
"""


def run_apart(command, env, folder, stdin=""):
    """The exit code of a process, and all that it printed."""
    process = subprocess.Popen(
        command,
        env=env,
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    shown = process.communicate(stdin.encode("utf-8"), timeout=120)[0]
    return process.returncode, shown.decode("utf-8").replace("\r\n", "\n")


def demo():
    """Play what the README shows and what it does not, each line in a real shell."""
    home = tempfile.mkdtemp(prefix="llamactl-demo-")
    started, count = time.monotonic(), 0
    env = {"HOME": home, "PATH": shell_tools(home), "TERM": "dumb"}
    stand_in = stand_in_on_a_port_as_wide()
    try:
        run_apart(["llamactl", "environments", "add", stand_in.url], env, home)
        for block in console_blocks() + [NOT_IN_THE_README]:
            if block is NOT_IN_THE_README:
                make_official_store(os.path.join(home, ".config/llamactl/profiles.db"))
            for command, lines in steps(block.replace(SANDBOX_URL, stand_in.url)):
                print(f"\n$ {command}", flush=True)
                code, shown = run_apart(["sh", "-c", command], env, home)
                print(shown, end="", flush=True)
                is_failure = any(line.startswith("error: ") for line in lines)
                is_as_said = re.match(transcript_pattern(lines), shown, re.MULTILINE)
                if not is_as_said or is_failure != bool(code):
                    sys.exit("that should have been:\n" + "\n".join(lines))
                count += 1
    finally:
        stand_in.stop()
        remove_tree(home)
    took = time.monotonic() - started
    print(f"\n{count} commands in {took:.1f} s, all as they should be")
    return 0


def make_official_store(path):
    """What the official client keeps; where this Python cannot make one, import says so."""
    try:
        import sqlite3
    except ImportError:
        return
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript("""
            CREATE TABLE profiles (name TEXT, api_url TEXT, project_id TEXT, api_key TEXT,
                api_key_id TEXT, device_oidc TEXT, id TEXT, PRIMARY KEY (name, api_url));
            CREATE TABLE environments (api_url TEXT PRIMARY KEY, requires_auth INTEGER,
                min_llamactl_version TEXT);
            CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT);
            INSERT INTO profiles
                VALUES ('old', 'https://api.cloud.llamaindex.ai', 'proj-old',
                'llx-from-the-official-client', NULL, NULL, NULL);
            INSERT INTO environments VALUES ('https://api.cloud.llamaindex.ai', 1, NULL);
            INSERT INTO settings VALUES ('current_profile', 'old');""")


def sandbox():
    """Keep the stand-in up, say what to type, and decide about logins as it is told."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` in a script ignores it
    home = tempfile.mkdtemp(prefix="llamactl-sandbox-")
    cloud = sandbox_cloud()
    words = "It approves each login by itself."
    is_asked = sys.stdin is not None and sys.stdin.isatty()
    if is_asked:
        cloud.auto_approve = None
        words = "To decide about a login, type here: approve, deny or expire."
    try:
        stand_in = StandIn(cloud, port=8000).start()
    except OSError:  # taken: any other will do
        stand_in = StandIn(cloud).start()
    print(
        f"""A stand-in for LlamaCloud listens at {stand_in.url}. {words}
Its API key: {SANDBOX_KEY}. In another terminal:

  export LLAMACTL_CONFIG_DIR={home}
  alias llamactl='{sys.executable} {PROGRAM}'
  llamactl environments add {stand_in.url}
  llamactl auth login

Ctrl-C ends it and deletes that folder.""",
        flush=True,
    )
    try:
        for word in map(str.strip, sys.stdin if is_asked else ()):
            if word in ("approve", "deny", "expire"):
                codes = cloud.pending()
                for code in codes:
                    getattr(cloud, word)(code)
                print(f"{word}: {', '.join(codes) or 'no login waits'}", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        stand_in.stop()
        remove_tree(home)
    return 0


# For Windows: arguments, exit code, and a pattern of the output. Stdin is a key each time.
ON_WINDOWS = r"""
    --version                                        0    llamactl.py [0-9.]+\n$
    environments add URL                             0    environment URL is current
    auth token --api-key-file KEY --project alpha    0    llx-demo is current
    auth token --api-key - --project beta            0    Beta
    auth get -o json                                 0    "name": "llx-demo-2"
    auth use llx-demo                                0    profile llx-demo is current
    projects get                                     0    Beta +proj-beta
    auth inject --env-file ENV                       0    written
    auth inject --env-file ENV                       0    is up to date
    auth login --project Beta                        0    logged in as dev@example.com
    auth login --start -o json                       0    "user_code"
    auth login --resume --project Alpha              0    project Alpha
    auth status                                      0    credential +- +works
    auth exec -- CMD                                 5    from cmd proj-alpha
    auth exec -- cmd /c exit 7                       7    ^$
    auth exec -- nope                              127    ^error: nope: command not found\n$
    auth get nope                                    1    no profile nope
    projects use nope                                1    project nope not found
    environments add ftp://x                         2    ^error: an API\b
    confg                                            2    hint: llamactl config
    auth token                                       2    no terminal to ask on
    auth logout --all                                0    profile dev@example.com deleted
    projects get                                     4    not logged in
"""


def check_windows():
    """The table above, each row a real process of the Windows Python that argv names."""
    rows = ON_WINDOWS.strip().splitlines()
    with tempfile.TemporaryDirectory() as home, StandIn(sandbox_cloud()) as stand_in:

        def on_windows(*path):
            return "Z:" + os.path.join(home, *path).replace("/", "\\")

        say = "@echo from cmd %LLAMA_AGENTS_PROJECT_ID%\n@exit 5\n"
        write_file(os.path.join(home, "say.cmd"), say)
        write_file(os.path.join(home, "key.txt"), SANDBOX_KEY + "\n")
        shutil.copy(PROGRAM, home)
        names = {"KEY": on_windows("key.txt"), "ENV": on_windows("new", ".env")}
        names.update(CMD=on_windows("say"), URL=stand_in.url)
        for row in rows:
            line, code, pattern = re.split(" {2,}", row.strip(" "))
            words = [names.get(word, word) for word in line.split()]
            returned, shown = run_apart(
                sys.argv[2:] + ["-I", on_windows(os.path.basename(PROGRAM))] + words,
                dict(os.environ, LLAMACTL_CONFIG_DIR=on_windows("conf")),
                home,
                f"\ufeff{SANDBOX_KEY}\r\n",
            )
            pattern = pattern.replace("URL", re.escape(stand_in.url))
            if returned != int(code) or not re.search(pattern, shown):
                sys.exit(f"$ llamactl {line}\n{shown}(exit {returned})")
        written = file_bytes(os.path.join(home, "new", ".env"))
        left = sorted(os.listdir(home + "/new") + os.listdir(home + "/conf"))
        if b"\r" in written or left != [".env", "profiles.json", "profiles.json.lock"]:
            sys.exit(f"{written!r} in .env; there are {left}")
    print(f"{len(rows) + 1} passed, 0 failed", flush=True)
    return 0


class Bench:
    """Whole processes, timed in turn with the floor that they stand on."""

    # so that Python's own work to start a process is not counted
    MEASURE = """
import os, sys, time
started = time.perf_counter()
pid = os.fork()
if not pid:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.execvp(sys.argv[1], sys.argv[1:])
usage = os.wait4(pid, 0)[2]
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)
"""
    # what people start of the same kind, where it is installed
    PEERS = ("gh auth status", "hf auth whoami", "aws --version", "docker --version")

    def __init__(self, home):
        self.home = home
        self.over = 0  # rows that missed their limit
        self.env = {"HOME": home, "PATH": shell_tools(home), "PYTHONDONTWRITEBYTECODE": "1"}

    def once(self, command):
        """Wall seconds, and seconds of CPU, of a process."""
        words = shlex.split(command)
        if words[0] == "llamactl":
            words[0] = PROGRAM
        if words[0] in (PROGRAM, "-c"):
            words.insert(0, sys.executable)
        measure = [sys.executable, "-I", "-S", "-c", self.MEASURE]
        shown = subprocess.check_output(measure + words, env=self.env, cwd=self.home)
        return [float(word) for word in shown.split()]

    def against(self, what, floor, command, limit=None, times=21):
        """A row of the medians of FLOOR and COMMAND, run in turn after a warm-up."""
        runs = [self.once(floor) + self.once(command) for _ in range(times + 1)]
        below, _, above, _ = map(statistics.median, zip(*runs[1:]))
        self.row(what, f"{below * 1000:.0f} ms", above / below, limit)

    def row(self, what, floor, mine, limit=None, unit="x"):
        verdict = ""
        if limit is not None:
            verdict = f"{limit:8.2f}  {'ok' if mine <= limit else 'OVER'}"
            self.over += mine > limit
        print(f"{what:52} {floor:>8} {mine:9.2f}{unit} {verdict}", flush=True)

    def store(self, count, url=llamactl.DEFAULT_API_URL):
        """Work with a store of COUNT profiles from now on."""
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        profiles = {f"profile-{number}": profile for number in range(count)}
        record = {"requires_auth": True, "profiles": profiles}
        record["current_profile"] = next(iter(profiles), None)
        data = {"version": 1, "current_environment": url, "environments": {url: record}}
        folder = tempfile.mkdtemp(dir=self.home)
        write_file(os.path.join(folder, "profiles.json"), json.dumps(data), 0o600)
        self.env["LLAMACTL_CONFIG_DIR"] = folder
        return folder

    def start_up(self):
        """Against the two imports that it cannot do without, then against its peers."""
        self.store(3)
        subprocess.check_call([sys.executable, "-m", "compileall", "-q", self.home])
        is_judged = (3, 11) <= sys.version_info < (3, 16)
        floor = "-c 'import argparse, json'"
        script = "llamactl auth get"
        installed = "-c 'import llamactl; llamactl.main()' auth get"
        limits = (2.5, 1.25) if is_judged else (None, None)
        self.against("auth get, as a script", floor, script, limits[0])
        self.against("auth get, installed", floor, installed, limits[1])
        for peer in self.PEERS:
            if shutil.which(peer.split()[0]):
                limits = (1.2, 0.65) if peer.startswith("gh ") else (None, None)
                self.against(
                    f"the same as a script, against `{peer}`", peer, script, limits[0]
                )
                self.against(f"installed, against `{peer}`", peer, installed, limits[1])

    def network(self, stand_in):
        self.store(1, stand_in.url)
        floor = "-c 'import urllib.request'"
        self.against("projects get over loopback", floor, "llamactl projects get")

    def growth(self):
        many, few = self.store(10000), self.store(3)
        command = "sh -c 'LLAMACTL_CONFIG_DIR={} exec llamactl auth get -o json'"
        what = "auth get -o json, 10,000 profiles against 3"
        self.against(what, command.format(few), command.format(many), 6.0, times=5)
        medians = []
        for count in (0, 100000):
            runs = []
            for _ in range(6):
                text = "".join(f"NAME_{n}=value {n}\n" for n in range(count))
                write_file(os.path.join(self.home, ".env"), text, 0o600)
                runs.append(self.once("llamactl --quiet auth inject")[0] * 1000)
            medians.append(statistics.median(runs[1:]))
        what = "auth inject into 100,000 lines, more than into 0"
        self.row(what, f"{medians[0]:.0f} ms", medians[1] - medians[0], unit=" ms")

    def crowd(self, stand_in):
        """32 x auth token one after the other, then at once."""
        numbers = range(100, 132)
        for number in numbers:
            stand_in.cloud.add_key(f"llx-CANARY-crowd-{number}")
        token = "llamactl auth token --project proj-alpha --api-key llx-CANARY-crowd-$n"
        seconds = []
        for end in (";", "&"):
            path = os.path.join(self.store(0, stand_in.url), "profiles.json")
            words = " ".join(map(str, numbers))
            script = f"for n in {words}; do {token} 2>/dev/null {end} done; wait"
            seconds.append(self.once(f"sh -c '{script}'")[1])
            if text_of(path).count("crowd-") != len(numbers):
                sys.exit("one of a crowd failed")
        serial, together = seconds
        what = "32 x auth token at once, CPU"
        self.row(what, f"{serial:.1f} s", together / serial, 1.5)


def bench():
    """What the house promises, measured here and now."""
    home = tempfile.mkdtemp(prefix="llamactl-bench-")
    settings = shlex.split(str(sysconfig.get_config_var("CONFIG_ARGS")))
    options = [word for word in settings if re.match("--(enable|with)-(opt|lto)", word)]
    print(platform.python_implementation(), platform.python_version(), end=", ")
    print(" ".join(platform.python_build()), platform.python_compiler(), *options)
    print("medians of processes run in turn with their floor")
    print(f"{'':52} {'floor':>8} {'llamactl':>10} {'limit':>8}")
    runner = Bench(home)
    try:
        with StandIn() as stand_in:
            stand_in.cloud.add_key(KEY)
            runner.start_up()
            runner.network(stand_in)
            runner.growth()
            runner.crowd(stand_in)
    finally:
        remove_tree(home)
    return 1 if runner.over else 0


class Report(unittest.TextTestResult):
    """What unittest notes, and how long each test took."""

    seconds = {}

    def startTest(self, test):
        self.started = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        self.seconds[test.id()] = time.monotonic() - self.started


def whole_test(test):
    """The name of a test, of which TEST may be a row."""
    return getattr(test, "test_case", test).id()


def run_named(name):
    """Run a class or Class.test; what became of it, for the process that asked."""
    said = io.StringIO()
    suite = unittest.defaultTestLoader.loadTestsFromName(name, sys.modules["__main__"])
    result = unittest.TextTestRunner(said, verbosity=0, resultclass=Report).run(suite)
    bad = {whole_test(test) for test, _ in result.failures + result.errors}
    left_out = {whole_test(test): why for test, why in result.skipped}
    return {
        "passed": max(0, result.testsRun - len(bad.union(left_out))),
        "failed": len(bad),
        "left_out": sorted(left_out.items()),
        "said": "" if result.wasSuccessful() else said.getvalue(),
        "seconds": result.seconds,
    }


CLASS_TIMEOUT = 300  # seconds


def worker():
    """Run the classes that stdin names, and answer each by a line of JSON on stdout."""
    with os.fdopen(os.dup(0)) as asked, os.fdopen(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what a test prints must not look like an answer
        for line in asked:
            if hasattr(signal, "alarm"):  # a loop without end must not outlive the run
                signal.alarm(CLASS_TIMEOUT)
            print(json.dumps(run_named(line.strip())), file=answers, flush=True)
    return 0


class Suite:
    """Runs classes in as many processes as there are processors, and says how it goes."""

    def __init__(self, rooms):
        """ROOMS: for each room the names of its classes, or Class.test."""
        self.left = {room: len(names) for room, names in rooms.items()}
        self.count = sum(self.left.values())
        # the threads share one iterator: each class is handed out once
        self.todo = iter([(room, name) for room, names in rooms.items() for name in names])
        self.lock = threading.Lock()
        self.started = time.monotonic()
        self.reports = []

    def run(self):
        count = min(4, os.cpu_count() or 1, self.count)
        workers = [threading.Thread(target=self.feed) for _ in range(count)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        return self.conclude()

    def feed(self):
        """Give one worker process a class after the other."""
        process = None
        for room, name in self.todo:
            process = process or subprocess.Popen(
                PYTHON + [THIS, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                universal_newlines=True,
            )
            with contextlib.suppress(OSError):
                print(name, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if answer:
                report = json.loads(answer)
            else:
                said = f"{name} ended its process ({process.wait()})\n"
                report = {"failed": 1, "said": said}
                process = None
            with self.lock:
                self.note(room, report)
        if process:
            process.communicate()

    def note(self, room, report):
        self.reports.append(report)
        self.left[room] -= 1
        if report["said"]:
            print(report["said"], flush=True)
            if "-f" in sys.argv:
                list(self.todo)  # taken, so that none is left for any thread
        if not self.left[room]:
            classes = f"{len(self.reports)} of {self.count} classes"
            print(f"{room:12} done; {classes}, {self.seconds():.0f} s", flush=True)

    def seconds(self):
        return time.monotonic() - self.started

    def conclude(self):
        times = {}
        for report in self.reports:
            times.update(report.get("seconds", {}))
            for name, why in report.get("left_out", ()):
                print(f"left out: {name.partition('.')[2]} ({why})")
        if "--slow" in sys.argv:
            for name in sorted(times, key=times.get, reverse=True)[:5]:
                print(f"{times[name]:6.1f} s  {name.partition('.')[2]}")
        passed = sum(report.get("passed", 0) for report in self.reports)
        failed = sum(report["failed"] for report in self.reports)
        print(f"Ran {passed + failed} tests in {self.seconds():.1f} s")
        print(f"{passed} passed, {failed} failed", flush=True)
        return 0 if passed and not failed else 1


def classes_of_rooms():
    """For each room of this file, in its order, its classes and their tests."""
    rooms, room = {}, ""
    pattern = r"(?m)^# [-=]{20,}\n# ([a-z ]+)|^class (\w+)\("
    for banner, name in re.findall(pattern, text_of(THIS)):
        room = banner or room
        value = globals().get(name)
        if name and issubclass(value, unittest.TestCase):
            tests = unittest.defaultTestLoader.getTestCaseNames(value)
            if tests:
                rooms.setdefault(room, {})[name] = tests
    return rooms


def list_tests():
    for room, classes in classes_of_rooms().items():
        print(f"{room} ({sum(map(len, classes.values()))})")
        for name, tests in classes.items():
            print(f"    {name} ({len(tests)})")
    return 0


ROOMS_OF_TEXT = ("text", "output", "dotenv")  # whose tests need neither POSIX nor a shell


def run_tests():
    """All tests, or those of the rooms and classes that are named."""
    rooms = classes_of_rooms()
    if os.name == "nt" and not sys.argv[1:]:
        for room in rooms.keys() - set(ROOMS_OF_TEXT):
            for name, tests in rooms.pop(room).items():
                print(f"left out: {name} ({len(tests)}, which need POSIX)")
    chosen = {}
    for word in [word for word in sys.argv[1:] if word not in ("--slow", "-f")] or rooms:
        if word in rooms:
            chosen[word] = list(rooms[word])
        elif isinstance(globals().get(word.partition(".")[0]), type):
            chosen.setdefault("chosen", []).append(word)
        else:
            sys.exit(f"there is no room and no class {word}; see --list")
    return Suite(chosen).run()


def show_help():
    print(__doc__)
    return 0


if __name__ == "__main__":
    words = {
        "demo": demo,
        "sandbox": sandbox,
        "bench": bench,
        "readers": check_with_libraries,
        "windows": check_windows,
        "release": release,
        "--list": list_tests,
        "--help": show_help,
        "-h": show_help,
        "--worker": worker,
    }
    sys.exit(words.get(sys.argv[1] if len(sys.argv) > 1 else "", run_tests)())
