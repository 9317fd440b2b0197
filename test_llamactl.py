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
python3 test_llamactl.py yaml-readers  what PyYAML and ruamel.yaml read (CI has them)
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
import tempfile
import threading
import time
import tokenize
import types
import unicodedata
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


DAMAGED = ("drip", "pause", "truncated", "short_length", "bad_chunk")  # the real answer


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

    def call(self, *argv, stdin=b"", env=(), terminal=False, sings=False):
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
        with mock.multiple(sys, argv=["llamactl"] + argv, **streams):
            with mock.dict(os.environ, environment, clear=True):
                code = llamactl.main(argv)
                streams["stdout"].flush()
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
        if not re.match(transcript_pattern(lines), text):
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


def split_first(argv):
    """A command line as a list; its first word may be several."""
    return argv[0].split(" ") + list(argv[1:]) if argv else []


def transcript_pattern(lines):
    """What LINES stand for: `...` is any text, on a line of its own any lines."""
    patterns = []
    for line in lines:
        if line == "...":
            patterns.append("(?:.*\n)*")
        else:
            patterns.append(".*".join(map(re.escape, line.split("..."))) + "\n")
    return "".join(patterns) + r"\Z"


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


LIST_PROJECTS = "/api/v1beta1/deployments/list-projects"
DEPLOYMENTS_PATH = "/api/v1beta1/deployments"
VERSION_ENDPOINT = "/api/v1beta1/deployments-public/version"
OFFICIAL_URL = "https://api.cloud.llamaindex.ai"
UNSEEN = "0a1b2c3d-0000-4000-8000-123456789abc"  # the id of a project that nobody has
NOWHERE = "http://127.0.0.1:1"  # nothing listens there, and no name must be looked up
# what would move a cursor, ring a bell, set a title, forge a row or turn the text around
HOSTILE = "a\x1b[2J\x1b]0;x\x07\nFORGED  row\r\u202e\u2066\u200b\u2028\x9b31m\x00\tz"
UNSHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
)
# runs the program as the main one, after what stands in front of it
AS_MAIN = """\
import sys
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
    "GET POST DELETE NAME URL ID PATH KEY AUTH DEPLOYMENT EOF SHELL FW O_PATH O_BINARY "
    "ST_RDONLY O_DIRECTORY O_NOFOLLOW O_NONBLOCK WRONG_VERSION_NUMBER SIGINT SIGHUP "
    "SIGQUIT SIGTERM".split()
)
# The other tests shrink these; behaviour.md and the RFCs say what they are.
PROMISED = """
    EXIT_DONE = 0           EXIT_FAILED = 1           EXIT_USAGE = 2
    EXIT_REJECTED = 4       EXIT_UNREACHABLE = 5      EXIT_NOT_EXECUTABLE = 126
    EXIT_NOT_FOUND = 127    ANSWER_TIMEOUT = 10.0       PAUSE_TIMEOUT = 10.0
    WHOLE_TIMEOUT = 60.0      LOCK_TIMEOUT = 10.0         KEY_TIMEOUT = 5.0
    REVOCATION_TIMEOUT = 3.0  MAX_ANSWER = 8388608      MAX_RETRY_AFTER = 30.0
    DEFAULT_INTERVAL = 5.0    SLOW_DOWN = 5.0             CLOCK_LEEWAY = 120.0
    DEFAULT_API_URL = https://api.cloud.llamaindex.ai
"""
MAX_TOKENS = 28930  # the goal is 26,000


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

    def test_the_numbers_are_those_promised(self):
        for promise in re.split(" {2,}|\n", PROMISED.strip()):
            name, _, value = promise.partition(" = ")
            if name:
                self.assertEqual(str(getattr(llamactl, name)), value, name)
        self.assertEqual(len(llamactl.RETRY_DELAYS), 2)

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
            {OFFICIAL_URL} ...
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


class Tables(Case):
    def test_two_spaces_no_colour_no_truncation_nothing_behind(self):
        text = llamactl.table_text(
            ("NAME", "ID"), [("a", "x" * 300), ("longer name", True)]
        )
        self.assertEqual(
            "NAME         ID\na            %s\nlonger name  yes\n" % ("x" * 300), text
        )

    def test_columns_stand_below_each_other(self):
        rows = [("caf\u00e9", "one"), ("abcdef", "two"), ("", "three"), (None, "four")]
        text = llamactl.table_text(("NAME", "ID"), rows)
        self.assertEqual(
            ["ID", "one", "two", "three", "four"], [line[8:] for line in text.splitlines()]
        )
        self.assertEqual({" "}, {char for line in text.splitlines() for char in line[6:8]})

    def test_one_row_a_line_whatever_the_cells_hold(self):
        rows = [(text, "end") for text in TRICKY_TEXTS]
        text = llamactl.table_text(("NAME", "END"), rows)
        self.assertEqual(len(rows) + 1, len(text.splitlines()))
        self.assertEqual([], unprintable(text))
        text.encode("utf-8")
        for line in text.splitlines()[1:]:
            self.assertTrue(line.endswith("  end"), line)

    def test_yes_no_and_zero_are_shown(self):
        text = llamactl.table_text(("A", "B", "C"), [(True, False, 0)])
        self.assertEqual("A    B   C\nyes  no  0\n", text)

    def test_a_server_cannot_forge_a_row(self):
        cloud = self.cloud_server()
        self.with_profile()
        evil = "a\r\n\x1b[2J\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1eforged\u202e\x9b31m"
        cloud.projects = [
            {
                "project_id": "proj-alpha",
                "project_name": evil,
                "org_id": evil,
                "deployment_count": 0,
            }
        ]
        cloud.organizations = [{"org_id": evil, "org_name": evil, "is_default": True}]
        cloud.deployments = [
            dict(
                cloud.deployments[0],
                id=evil,
                repo_url=evil,
                git_ref=evil,
                status=evil,
                warning=evil,
            )
        ]
        for argv in (
            ("projects", "get"),
            ("organizations", "get"),
            ("deployments", "get"),
            ("deployments", "get", "-o", "wide"),
        ):
            with self.subTest(argv=argv):
                result = self.call(*argv)
                self.assertEqual(0, result.code, result.err)
                self.assertEqual(2, len(result.out.splitlines()), result.out)
                self.assertEqual([], unprintable(result.out + result.err))

    def test_headers_are_upper_case(self):
        self.cloud_server()
        self.with_profile()
        for argv in (
            ("auth", "get"),
            ("environments", "get"),
            ("projects", "get"),
            ("config",),
            ("organizations", "get"),
            ("deployments", "get", "-o", "WIDE"),
        ):
            header = self.call(*argv).out.splitlines()[0]
            self.assertRegex(header, r"\A[A-Z_]+(  +[A-Z_]+)*\Z")


class WideTables(unittest.TestCase):
    def test_one_long_cell_pads_no_other_row(self):
        rows = [["x" * 100000, "1"]] + [["y", "2"]] * 1000
        text = llamactl.table_text(["NAME", "N"], rows)
        self.assertLess(len(text), 400000)
        self.assertIn("x" * 100000 + "  1\n", text)


class CleanAndMasked(Case):
    def test_clean_leaves_nothing_that_acts_on_a_terminal(self):
        every = "".join(map(chr, range(0x11000))) + "\U0001f600\U000e0041\U0010ffff"
        text = llamactl.clean(every)
        self.assertEqual([], unprintable(text))
        self.assertNotIn("\n", text)
        text.encode("utf-8")

    def test_clean_leaves_letters_alone(self):
        for text in (
            "",
            "plain text",
            "caf\u00e9 \u4e2d\u6587 \U0001f600",
            "e\u0301",
            "a  b",
        ):
            self.assertEqual(text, llamactl.clean(text))
        self.assertEqual("a\ufffdb", llamactl.clean("a\ud800b"))

    def test_masked_reaches_every_place(self):
        masked = llamactl.masked("x-s3cret-y s3cret\n", {"s3cret"})
        self.assertEqual("x-********-y ********\n", masked)
        self.assertEqual("nothing here", llamactl.masked("nothing here", {"s3cret"}))
        cloud = self.cloud_server()
        self.with_profile()
        cloud.deployments = [
            dict(
                cloud.deployments[0],
                display_name=KEY + KEY,
                status="x" + KEY,
                secret_names=[KEY],
                git_ref=KEY,
                warning=KEY,
            )
        ]
        for output in ("json", "yaml", "text", "wide"):  # the canary listens in tearDown()
            result = self.call("deployments", "get", "-o", output)
            self.assertEqual(0, result.code, result.err)
            self.assertIn("x********", result.out)

    def test_a_secret_that_begins_like_another_is_masked_whole(self):
        for secrets_in_use in (
            ("abcdef", "abcdefghij"),
            ("abcdefghij", "abcdef"),
            ("cdef", "abcdefghij"),
            ("abcdefghij", "cdef"),
        ):
            with self.subTest(secrets=secrets_in_use):
                self.assertEqual(
                    "<********>", llamactl.masked("<abcdefghij>", secrets_in_use)
                )

    def test_a_secret_that_a_server_echoes_is_masked(self):
        cloud = self.cloud_server()
        self.with_profile()
        # what clean() takes out must not put the secret together again
        for gap in ("", "\x07", "\u200b", "\u202e", "\x1b"):
            echo = KEY[:7] + gap + KEY[7:]
            cloud.projects = [
                {
                    "project_id": "p-1",
                    "project_name": echo,
                    "deployment_count": 0,
                    "org_id": echo,
                }
            ]
            for output in ("text", "json", "yaml"):
                result = self.call("projects", "get", "-o", output)
                with self.subTest(gap=gap, output=output):
                    self.assertEqual(0, result.code, result.err)
                    self.assertNotIn(KEY, result.out)
                    self.heard.remove(result.out)
            cloud.fault("*", "status", status=400, body={"detail": "bad key " + echo})
            result = self.call("projects", "get")
            with self.subTest(gap=gap, output="error"):
                self.assertEqual(1, result.code)
                self.assertNotIn(KEY, result.err)
                self.heard.remove(result.err)


class Loopback(unittest.TestCase):
    def test_this_machine_in_each_spelling(self):
        for host in (
            "localhost LOCALHOST localhost. foo.localhost ip6-localhost 127.0.0.1 127.1 "
            "0.0.0.0 0x7f.1 0177.0.0.1 2130706433 [::1] [::] [0:0:0:0:0:0:0:1] "
            "[::ffff:127.0.0.1] [::ffff:7f00:1]"
        ).split():
            for rest in ("", ":8000", "/x"):
                self.assertTrue(llamactl.is_loopback("http://" + host + rest), host)
        for host in (
            "localhost.example.com mylocalhost 128.0.0.1 10.0.0.1 1.127.0.0.1.example "
            "0x7f.example 0x7f.de 0xcafe.de 0x0a000001 167772161 010.0.0.1 0.0.0.1 "
            "[::2] [fe80::1] [::ffff:10.0.0.1] example.com 127.example.com"
        ).split():
            self.assertFalse(llamactl.is_loopback("http://" + host), host)


class Passwords(unittest.TestCase):
    def test_of_addresses_are_masked_and_all_else_stays(self):
        for text, shown in (
            ("https://u:p@h/x", "https://********@h/x"),
            ("https://token@h/x", "https://********@h/x"),
            ("see 'https://u:p@h'.", "see 'https://********@h'."),
            ('"repo": "https://u:p\'w@h",', '"repo": "https://********@h",'),
            ("https://u:p/w@h", "https://********@h"),
            ("http://u:12w/x@h", "http://********@h"),
            ("//u:pw@h", "//u:********@h"),
            ("socks5://u:p@h:1", "socks5://u:********@h:1"),
            ("ssh://git@h/x", "ssh://git@h/x"),
            ("git@github.com:x/y", "git@github.com:x/y"),
            ("https://h/x@v1", "https://h/x@v1"),
            ("http://h:80/x@v1", "http://h:80/x@v1"),
            ("https://h/?to=a@b", "https://h/?to=a@b"),
            ("ann@example.com", "ann@example.com"),
        ):
            with self.subTest(text):
                self.assertEqual(llamactl.without_passwords(text), shown)

    def test_take_no_longer_the_longer_the_text(self):
        for piece in ("://a:", "http://", "//u:p@", "@", "https://u:p@h "):
            started = time.monotonic()
            llamactl.without_passwords(piece * 200000)
            self.assertLess(time.monotonic() - started, 3, piece)


class Urls(Case):
    GOOD = (
        ("https://api.cloud.llamaindex.ai", "https://api.cloud.llamaindex.ai"),
        ("https://api.cloud.llamaindex.ai/", "https://api.cloud.llamaindex.ai"),
        ("https://api.cloud.llamaindex.ai///", "https://api.cloud.llamaindex.ai"),
        ("HTTPS://API.Example.COM", "https://api.example.com"),
        ("https://example.com:443", "https://example.com"),
        ("https://example.com:443/a/", "https://example.com/a"),
        ("http://example.com:80", "http://example.com"),
        ("http://example.com:443", "http://example.com:443"),
        ("https://example.com:80", "https://example.com:80"),
        ("https://example.com:8443/Base/Path/", "https://example.com:8443/Base/Path"),
        ("https://example.com:65535", "https://example.com:65535"),
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
        ("https://[2001:DB8::AB]", "https://[2001:db8::ab]"),
        ("https://[2001:db8::1]:443/x", "https://[2001:db8::1]/x"),
        ("https://my_host-1.internal", "https://my_host-1.internal"),
        ("https://xn--bcher-kva.example/a%20b", "https://xn--bcher-kva.example/a%20b"),
    )
    BAD = (
        "",
        "example.com",
        "//example.com",
        "https:",
        "https://",
        "https:///a",
        "https:example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:text/plain,a",
        "httpss://example.com",
        " https://a b",
        "https://a b",
        "https://example.com/a b",
        "https://example.com\n",
        "https://example.com\nX: y",
        "https://example.com/\r\nX: y",
        "https://example.com\t",
        "https://example.com/\x00",
        "https://user@example.com",
        "https://user:CANARY@example.com",
        "https://:@example.com",
        "https://@example.com",
        "https://example.com@evil.example",
        "https://example.com:80@evil.example",
        "https://example.com?a=b",
        "https://example.com/?a",
        "https://example.com/a?",
        "https://example.com#a",
        "https://example.com/#",
        "https://example.com/a#b",
        "https://example.com:0",
        "https://example.com:65536",
        "https://example.com:99999",
        "https://example.com:-1",
        "https://example.com:abc",
        "https://example.com:80:80",
        "https://example.com:8 0",
        "https://[::1",
        "https://::1",
        "https://[::1]evil.example",
        "https://[::1]]",
        "https://[example.com]",
        "https://[]",
        "https://exa\\mple.com",
        "https://example.com\\@evil.example",
        "https://ex\u00e4mple.com",
        "https://example\u3002com",
        "https://example.com/\u00e4",
        "https://example.com/\u202e",
        "\ufeffhttps://example.com",
        "https://exa\ud800mple.com",
        "https://example.com:\u0661",
        "https://example.com:\u00b2",
        "http\u017f://example.com",
        "https://example\u017f.com",
        "https://\u212aelvin.example",
        "https://example.com/\u017f",
        "https://example.com/\u212a",
        "https://example.com/\u0131",
        "https://<script>",
        "https://example.com,evil.example",
        "https://$(id).example",
    )

    def test_good_ones_are_normalised_once(self):
        for text, wanted in self.GOOD:
            with self.subTest(text=text):
                self.assertEqual(wanted, llamactl.normal_url(text))
                self.assertEqual(wanted, llamactl.normal_url(wanted))

    def test_bad_ones_are_refused(self):
        for text in self.BAD:
            with self.subTest(text=text), self.assertRaises(llamactl.Failure) as caught:
                llamactl.normal_url(text)
            self.assertNotIn("CANARY", str(caught.exception) + caught.exception.hint)

    def test_the_command_says_so_in_one_line_and_stores_nothing(self):
        for text in self.BAD:
            if not text.startswith("-") and "\x00" not in text:
                result = self.call("environments", "add", "--no-verify", text)
                with self.subTest(text=text):
                    self.assertEqual((2, ""), (result.code, result.out), result.err)
                    self.assertTrue(result.err.startswith("error: "))
                    self.assertLessEqual(result.err.count("\n"), 2)
        self.assertFalse(os.path.exists(self.store_path))

    def test_what_a_server_names_is_as_strict(self):
        for bad in self.BAD:
            if not re.search(r"[/?][!-~]*\Z", bad[len("https://") :]):
                for rest in ("", "/authorize?a=b"):
                    with self.subTest(bad=bad + rest), self.assertRaises(
                        llamactl.Failure
                    ) as caught:
                        llamactl.origin_of(bad + rest)
                    self.assertEqual(1, caught.exception.code)
        self.assertEqual(
            "https://a.example:443", llamactl.origin_of("HTTPS://A.example/?x=\x7e")
        )


class SmallFormats(Case):
    def test_what_a_server_wrote_is_cut_at_white_space_alone(self):
        for text, wanted in (
            ("a\n b\t", "a b"),
            ("a" * 300, "a" * 300),
            ("a" * 301, "..."),
            ("ab " * 200, "ab " * 100 + "..."),
            (" " * 40000 + "a-" * 200, "..."),
            ("a " * 149 + "b-" * 40, "a " * 149 + "..."),
        ):
            with self.subTest(text=text):
                self.assertEqual(wanted, llamactl.shortened(text))

    def test_a_name_shows_at_most_the_last_four_characters_of_a_key(self):
        for key in (
            KEY,
            "llx-CANARY-0123456789abcdef-wxyz",
            "sk_CANARY_abcdefghijkl",
            "CANARY",
            "a",
            "abcd",
            "abcdefgh",
            "llx-CANARY-$(touch x)`;&|'\"*",
            "CANARY-------------",
            "llx-CANARY-0123456789../",
            "llx-CANARY-0123456789-{a}",
            "!" * 40,
        ):
            key = key.replace(" ", "")
            result = self.call(
                "auth",
                "token",
                "--no-verify",
                "--project",
                "p-1",
                "--api-key-file",
                "-",
                stdin=key.encode(),
            )
            with self.subTest(key=key):
                self.assertEqual(0, result.code, result.err)
                self.url = llamactl.DEFAULT_API_URL
                (name,) = self.profiles()
                self.assertRegex(name, r"\A[A-Za-z0-9][A-Za-z0-9@._+-]*\Z")
                rest = name[len("llx-") :] if name.startswith("llx-") else name
                for size in range(5, len(rest) + 1):
                    for start in range(len(rest) - size + 1):
                        self.assertNotIn(rest[start : start + size], key)
                os.unlink(self.store_path)

    def test_an_ordinary_key_is_named_after_its_last_four(self):
        self.call("auth", "token", "--no-verify", "--project", "p-1", "--api-key", KEY)
        self.url = llamactl.DEFAULT_API_URL
        self.assertEqual(["llx-wxyz"], list(self.profiles()))


try:
    import sqlite3
except ImportError:
    sqlite3 = None  # some Pythons are built without; one test says what happens then

MODULE = os.path.splitext(os.path.basename(os.path.abspath(__file__)))[0]
DEFAULT_URL = "https://api.cloud.llamaindex.ai"
STORE_FILES = ["profiles.json", "profiles.json.lock"]


# ----------------------------------------------------------------------------------------
# output: JSON and YAML
# ----------------------------------------------------------------------------------------

YAML_ESCAPES = {'"': '"', "\\": "\\", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
YAML_11 = (  # https://yaml.org/type/: what is no string where it stands bare
    ("null", r"~|null|Null|NULL|"),
    ("true", r"y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON"),
    ("false", r"n|N|no|No|NO|false|False|FALSE|off|Off|OFF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)"),
    ("other", r"[-+]?(0b[0-1_]+|0[0-7_]+|0x[0-9a-fA-F_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)"),
    ("float", r"[-+]?([0-9][0-9_]*)?\.[0-9.]*([eE][-+][0-9]+)?"),
    (
        "other",
        r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
    ("other", r"[0-9]{4}-[0-9][0-9]?-[0-9][0-9]?([Tt \t].*)?|<<|="),
)
YAML_12 = (  # YAML 1.2.2 section 10.3.2, the core schema
    ("null", r"~|null|Null|NULL|"),
    ("true", r"true|True|TRUE"),
    ("false", r"false|False|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("other", r"0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
    ("other", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
)
YAML_KINDS = {
    "null": lambda text: None,
    "true": lambda text: True,
    "false": lambda text: False,
    "int": int,
    "float": float,
}
YAML_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class StrictYaml:
    """Reads the block YAML that a writer of JSON values needs, and refuses all else.

    RULES, YAML_11 or YAML_12, say what a plain scalar is; one that both a JSON writer and a
    reader would not take for the same is a ValueError.
    """

    def __init__(self, rules):
        self.rules = [(kind, re.compile("(?:%s)\\Z" % pattern)) for kind, pattern in rules]

    def load(self, text):
        odd = re.search("[^\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", text)
        if odd or re.search("[\u2028\u2029\ufeff]", text) or not text.endswith("\n"):
            raise ValueError("not printable: %r" % text)
        self.lines = text[:-1].split("\n")
        value, at = self.node(0, 0)
        if at != len(self.lines):
            raise ValueError("line %d is left over: %r" % (at, self.lines[at]))
        return value

    def is_item(self, at, indent, start):
        return at < len(self.lines) and self.lines[at].startswith(" " * indent + start)

    def node(self, at, indent):
        """(value, next line) of what begins on line AT, behind INDENT blanks."""
        text = self.lines[at][indent:] if self.is_item(at, indent, "") else ""
        if not text or text[0] == " ":
            raise ValueError("nothing on line %d, or less indented than it must be" % at)
        if text.startswith("- "):
            return self.sequence(at, indent)
        if self.key_end(text):
            return self.mapping(at, indent)
        return self.scalar(text), at + 1

    def sequence(self, at, indent):
        items = []
        while self.is_item(at, indent, "- "):
            self.lines[at] = " " * (indent + 2) + self.lines[at][indent + 2 :]
            item, at = self.node(at, indent + 2)
            items.append(item)
        return items, at

    def mapping(self, at, indent):
        pairs = {}
        while self.is_item(at, indent, "") and self.lines[at][indent : indent + 1] not in (
            "",
            " ",
        ):
            text = self.lines[at][indent:]
            end = self.key_end(text)
            if not end or end > 1024:  # YAML 1.1 and 1.2: the limit of an implicit key
                raise ValueError("no key: %r" % text[:2000])
            key = self.scalar(text[:end])
            if not isinstance(key, str) or key in pairs:
                raise ValueError("the key %r" % text)
            if text[end + 1 :]:
                pairs[key], at = self.scalar(text[end + 2 :]), at + 1
            else:
                pairs[key], at = self.node(at + 1, indent + 2)
        return pairs, at

    def key_end(self, text):
        """Where the key of TEXT ends and its colon stands, or 0."""
        quoted = YAML_QUOTED.match(text)
        end = quoted.end() if quoted else re.search(r":(?= |\Z)|\Z", text).start()
        return end if re.match(r":( |\Z)", text[end:]) else 0

    def scalar(self, text):
        if text in ("[]", "{}"):
            return json.loads(text)
        if text.startswith('"'):
            if not YAML_QUOTED.match(text) or YAML_QUOTED.match(text).end() != len(text):
                raise ValueError("quotes: %r" % text)
            return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", self.unescaped, text[1:-1])
        # YAML 1.2.2 section 7.3.3; an indicator may not begin a plain scalar
        if re.match(
            r"[-?:](\s|\Z)|[\s,\[\]{}#&*!|>'\"%@`]|(---|\.\.\.)(\s|\Z)", text
        ) or re.search(r": | #|:\Z|\s\Z|\t", text):
            raise ValueError("no plain scalar: %r" % text)
        for kind, pattern in self.rules:
            if pattern.match(text):
                return YAML_KINDS[kind](text)
        return text

    def unescaped(self, found):
        char = found.group(1)
        if len(char) == 1:
            return YAML_ESCAPES[
                char
            ]  # a KeyError: an escape that JSON or YAML 1.1 does not know
        if 0xD800 <= int(char[1:], 16) < 0xE000:
            raise ValueError("YAML has no surrogate pairs")
        return chr(int(char[1:], 16))


TRICKY_TEXTS = (
    "",
    " ",
    "a",
    "a b",
    " a",
    "a ",
    "null",
    "Null",
    "~",
    "true",
    "False",
    "yes",
    "No",
    "on",
    "OFF",
    "y",
    "N",
    "0",
    "1",
    "-1",
    "+1",
    "007",
    "0o7",
    "0x1F",
    "0b1",
    "1_000",
    "1.5",
    "1.",
    ".5",
    "1e3",
    "1e+3",
    "1.0e+3",
    ".inf",
    "-.Inf",
    ".nan",
    "NaN",
    "Infinity",
    "1:30",
    "190:20:30",
    "12:30:45.5",
    "2001-01-01",
    "2001-12-14t21:59:43.10-05:00",
    "2001-1-1 1:1:1",
    "<<",
    "=",
    "-",
    "--",
    "---",
    "...",
    "--- a",
    "- a",
    "?",
    "? a",
    ":",
    "a:",
    "a: b",
    ":a",
    "a:b",
    "a #b",
    "#a",
    "a#b",
    "[]",
    "{}",
    "[a]",
    "{a: b}",
    "&a",
    "*a",
    "!a",
    "!!str a",
    "|",
    ">",
    "'a'",
    '"a"',
    "it's",
    '"',
    "\\",
    "\\n",
    "%YAML 1.1",
    "@a",
    "`a`",
    ",",
    "a,b",
    "line\nline",
    "\n",
    "\r\n",
    "\r",
    "\t",
    "a\tb",
    "\0",
    "\x07",
    "\x1b[31mred\x1b[0m",
    "\x7f",
    "\x80",
    "\x85",
    "\x9b31m",
    "\xa0",
    "\xad",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\ufeffa",
    "\u200b",
    "\u200e",
    "\u202e\u2066evil\u2069",
    "\u061c",
    "\ufffd",
    "\ufffe",
    "\uffff",
    "\ud800",
    "a\udfffb",
    "\udc00\ud800",
    "\U0001f600",
    "\U0010ffff",
    "\u00e9",
    "\u4e2d\u6587",
    "e\u0301",
    "https://api.example.com:8443/a?b=c#d",
    "dev@example.com",
    "C:\\dir",
    "a" * 200,
    "word " * 40,
    "********",
    "0123456789abcdef0123456789abcdef01234567",
    "12e03",
    "0e0",
    "1__0",
    "0_",
    "+.5",
    "-0",
    "08",
    "1,000",
    "null ",
    "a\u2028b",
    "key\x00value",
    "\x1f",
    "!",
    "%",
)
TRICKY_PARTS = (
    "a",
    "0",
    "1",
    ":",
    " ",
    "#",
    "-",
    "\n",
    "\t",
    "'",
    '"',
    "\\",
    ",",
    "[",
    "{",
    ".",
    "e",
    "_",
    "true",
    "\x85",
    "\u2028",
    "\U0001f600",
    "\ud800",
    "\ufeff",
    "\x00",
    "~",
    "T",
    "\u00e9",
)


def tricky_text(rng):
    if rng.random() < 0.6:
        return rng.choice(TRICKY_TEXTS)
    return "".join(rng.choice(TRICKY_PARTS) for _ in range(rng.randrange(8)))


def tricky_row(rng):
    """A flat object as most commands print them: any order of texts, booleans, numbers,
    nulls."""
    values = (
        lambda: tricky_text(rng),
        lambda: tricky_text(rng),
        lambda: rng.choice((True, False)),
        lambda: rng.choice((0, 1, -7, 10**20)),
        lambda: None,
    )
    names = ("name", "api_url", "project_id", "active", "auth_type", "deployment_count")
    return {name: rng.choice(values)() for name in names[: rng.randrange(1, 7)]}


def tricky_deployment(rng):
    """A deployment: what was asked for, its secrets' names as keys, and its status."""
    spec = {"repo_url": tricky_text(rng), "suspended": rng.random() < 0.5}
    for name in ("git_ref", "appserver_version", "personal_access_token"):
        if rng.random() < 0.5:
            spec[name] = tricky_text(rng)
    if rng.random() < 0.7:
        spec["secrets"] = {tricky_text(rng): "********" for _ in range(rng.randrange(4))}
    status = {"phase": tricky_text(rng), "git_sha": rng.choice((None, tricky_text(rng)))}
    return {
        "name": tricky_text(rng),
        "generate_name": tricky_text(rng),
        "spec": spec,
        "status": dict(status, warning=rng.choice((None, tricky_text(rng)))),
    }


def document_values():
    """Values of every shape that a command prints, each kind of text in each place."""
    rng = random.Random("documents")
    yield from (
        [],
        {},
        "",
        None,
        True,
        0,
        -1,
        [[]],
        [{}],
        {"a": []},
        {"a": {}},
        [[1, [2]], []],
    )
    for text in TRICKY_TEXTS:
        yield text
        yield {"name": text, "active": True}
        yield [{"name": text}, {text: "name"}]
        yield {"spec": {"secrets": {text: "********"}}, "status": {"warning": text}}
    for _ in range(400):
        yield tricky_row(rng)
        yield [tricky_row(rng) for _ in range(rng.randrange(4))]
        yield rng.choice(
            (tricky_deployment(rng), [tricky_deployment(rng) for _ in range(2)])
        )


def whole_characters(value):
    """VALUE with each lone surrogate replaced; none where that makes two keys the same."""
    text = re.sub(
        "\\\\ud[89a-f][0-9a-f]{2}",
        "\\\\ufffd",
        re.sub(
            "\\\\ud[89ab][0-9a-f]{2}\\\\ud[c-f][0-9a-f]{2}",
            lambda pair: json.loads('"' + pair.group() + '"'),
            json.dumps(value),
        ),
    )
    return json.loads(text)


def yaml_samples():
    """(JSON, YAML) of the same value, as a command prints them."""
    for value in document_values():
        yield llamactl.json_text(value), llamactl.yaml_text(value)


def check_yaml_with_readers():
    """Prove with PyYAML (YAML 1.1) and ruamel.yaml (YAML 1.2), which must be installed."""
    import yaml
    from ruamel.yaml import YAML

    readers = {"PyYAML": yaml.safe_load, "ruamel.yaml": YAML(typ="safe", pure=True).load}
    samples = list(yaml_samples())
    for json_text, yaml_text in samples:
        wanted = json.dumps(json.loads(json_text))
        for name, read in readers.items():
            found = json.dumps(read(yaml_text), default=repr)
            if found != wanted:
                sys.exit("%s reads %s from\n%s\nnot %s" % (name, found, yaml_text, wanted))
    print("%d documents: PyYAML and ruamel.yaml read what JSON says" % len(samples))


def unprintable(text):
    """What of TEXT could act on a terminal or reorder it, or has no UTF-8."""
    return [
        char
        for char in text
        if char != "\n"
        and (
            unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
            or char
            in "\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e"
            "\u2066\u2067\u2068\u2069"
            "\ufeff\ufffe\uffff"
        )
    ]


class Documents(Case):
    """JSON and YAML: the same value, for every reader, and nothing that moves a cursor."""

    def test_generated_values_load_to_what_json_says(self):
        readers = [("YAML 1.1", StrictYaml(YAML_11)), ("YAML 1.2", StrictYaml(YAML_12))]
        for value in document_values():
            json_text, yaml_text = llamactl.json_text(value), llamactl.yaml_text(value)
            wanted = json.dumps(whole_characters(value))
            self.assertEqual(wanted, json.dumps(json.loads(json_text)))
            self.assertEqual([], unprintable(json_text + yaml_text), yaml_text)
            for name, reader in readers:
                try:
                    found = json.dumps(reader.load(yaml_text))
                except (ValueError, KeyError) as error:
                    self.fail("%s: %r in %r" % (name, error, yaml_text))
                self.assertEqual(wanted, found, "%s: %r" % (name, yaml_text))

    def test_the_strict_reader_is_strict(self):
        for text in (
            "a: b: c\n",
            "a: #b\n",
            "- \n",
            "a:\n",
            '"\\ud83d\\ude00"\n',
            '"\\/"\n',
            "a\n b\n",
            "a: [\n",
            "\ta: b\n",
            "a: \x85\n",
            "a: b",
            "a: *b\n",
            "1: a\n",
            "a: b\na: c\n",
            "a: 'b'\n",
            "- a\nb\n",
            "a: b \n",
            "-\n",
            "a:\n- b\n",
        ):
            for rules in (YAML_11, YAML_12):
                with self.subTest(text=text), self.assertRaises((ValueError, KeyError)):
                    StrictYaml(rules).load(text)
        for text, old, new in (
            ("on\n", True, "on"),
            ("1e3\n", "1e3", 1000.0),
            ("08\n", "08", 8),
        ):
            self.assertEqual(old, StrictYaml(YAML_11).load(text))
            self.assertEqual(new, StrictYaml(YAML_12).load(text))
        for text in ("1:30\n", "2001-01-01\n", "0x1f\n", "<<\n", "010\n"):
            with self.assertRaises(KeyError):
                StrictYaml(YAML_11).load(text)

    def test_a_key_is_never_too_long_for_a_reader(self):
        # YAML limits a key that stands before its colon on one line to 1,024 characters
        value = {"spec": {"secrets": {"K" * 1100: "********", "\u202e" * 200: "********"}}}
        for line in llamactl.yaml_text(value).splitlines():
            key = line.strip().partition(": ")[0]
            self.assertTrue(line.strip().startswith("?") or len(key) <= 1024, len(key))

    def test_a_command_prints_the_same_in_json_and_yaml(self):
        cloud = self.cloud_server()
        self.with_profile()
        texts = [text for text in TRICKY_TEXTS if text]
        cloud.projects += [
            {
                "project_id": "p%d" % number,
                "project_name": text,
                "org_id": "o",
                "deployment_count": number,
            }
            for number, text in enumerate(texts)
        ]
        cloud.deployments = [
            dict(
                cloud.deployments[0],
                id="d%d" % number,
                display_name=text,
                status=text,
                warning=text,
                secret_names=[text],
                git_ref=text,
            )
            for number, text in enumerate(texts)
        ]
        for argv in (
            ("projects", "get"),
            ("projects", "get", "p40"),
            ("deployments", "get"),
            ("deployments", "get", "d7"),
            ("organizations", "get"),
            ("config",),
            ("auth", "get"),
            ("auth", "get", "main"),
            ("environments", "get"),
        ):
            as_json = self.call(*(argv + ("-o", "json")))
            as_yaml = self.call(*(argv + ("-o", "YAML")))
            with self.subTest(argv=argv):
                self.assertEqual(
                    (0, 0), (as_json.code, as_yaml.code), as_json.err + as_yaml.err
                )
                self.assertEqual([], unprintable(as_json.out + as_yaml.out))
                for rules in (YAML_11, YAML_12):
                    self.assertEqual(
                        json.dumps(json.loads(as_json.out)),
                        json.dumps(StrictYaml(rules).load(as_yaml.out)),
                    )

    def test_a_number_where_a_text_belongs_is_not_passed_on_in_a_form_of_two_meanings(self):
        # 1e+22 is a number in JSON and YAML 1.2 and a text in YAML 1.1; NaN is neither's
        cloud = self.cloud_server()
        self.with_profile()
        for number in (1e22, float("nan"), float("inf")):
            cloud.deployments = [dict(cloud.deployments[0], git_sha=number)]
            results = [
                self.call("deployments", "get", "-o", kind) for kind in ("json", "yaml")
            ]
            with self.subTest(number=number):
                self.assertEqual(results[0].code, results[1].code)
                if results[0].code == 0:
                    for rules in (YAML_11, YAML_12):
                        self.assertEqual(
                            json.dumps(json.loads(results[0].out)),
                            json.dumps(StrictYaml(rules).load(results[1].out)),
                        )
                else:
                    self.assertEqual(5, results[0].code)


# ----------------------------------------------------------------------------------------
# dotenv: independent readers, written from the rules of each program alone
# ----------------------------------------------------------------------------------------

ENV_NAMES = ("LLAMA_CLOUD_API_KEY", "LLAMA_CLOUD_BASE_URL", "LLAMA_AGENTS_PROJECT_ID")
ENV_NEW = dict(
    zip(ENV_NAMES, ("llx-new_1.2+3", "https://api.example.com:8443/a", "p=%@,-9"))
)
ENV_PROBE = "ENV_PROBE"
ENV_UNSET = dict.fromkeys(ENV_NAMES + (ENV_PROBE,), "(unset)")
GO_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


DOTENV_SPACE = re.compile(r"\s*")
DOTENV_REST = re.compile(r"[^\n]*\n?")
DOTENV_EXPORT = re.compile(r"(?:export[^\S\n]+)?")
DOTENV_NAME = re.compile(r"(?:(?=#)|'([^']+)'|([^=#\s']+[^=#\s]*))[^\S\n]*")
DOTENV_EQUALS = re.compile(r"=[^\S\n]*")
DOTENV_QUOTED = {  # whether the version is a recent one -> how a quoted value looks
    True: re.compile(r"""'((?:\\.|[^'\\])*)'|"((?:\\.|[^"\\])*)\"""", re.DOTALL),
    False: re.compile(r"""'((?:\\'|[^'])*)'|"((?:\\"|[^"])*)\""""),
}
DOTENV_BARE = re.compile(r"[^\n]*")
DOTENV_END = re.compile(r"(?:[^\S\n]*#[^\n]*)?[^\S\n]*(?:\n|\Z)")
DOTENV_VARIABLE = re.compile(r"\$\{([^}:]*)(?::-([^}]*))?\}")
DOTENV_ESCAPES = dict(zip("abfnrtv", "\a\b\f\n\r\t\v"))


def read_as_dotenv(text, recent=True):
    """python-dotenv's parser.py and variables.py: [(name, value or None)]; it refuses
    nothing.

    RECENT: as of 1.2.4, which knows a BOM, an escaped backslash and `NAME= # comment`.
    """
    text = re.sub("\r\n?", "\n", text)  # it opens the file with universal newlines
    pairs, known, at = [], {}, int(recent and text.startswith("\ufeff"))
    while True:
        at = DOTENV_SPACE.match(text, at).end()
        if at == len(text):
            return pairs
        at, name, value = dotenv_binding(text, at, recent)
        end = DOTENV_END.match(text, at)
        at = (end or DOTENV_REST.match(text, at)).end()
        if end and name:
            if value:
                value = DOTENV_VARIABLE.sub(
                    lambda found: known.get(found.group(1)) or found.group(2) or "", value
                )
            known[name] = value
            pairs.append((name, value))


def dotenv_binding(text, at, recent):
    """(where it ended, name, value) of the binding at AT; if malformed, no line ends
    there."""
    at = DOTENV_EXPORT.match(text, at).end()
    found = DOTENV_NAME.match(text, at)
    if not found:
        return at, None, None
    name, at = found.group(1) or found.group(2), found.end()
    equals = DOTENV_EQUALS.match(text, at)
    if not equals:
        return at, name, None
    at = equals.end()
    if recent and text[at : at + 1] == "#" and len(equals.group()) > 1:
        return at, name, ""
    if text[at : at + 1] not in ("'", '"'):
        found = DOTENV_BARE.match(text, at)
        return found.end(), name, re.sub(r"\s+#.*", "", found.group()).rstrip()
    found = DOTENV_QUOTED[recent].match(text, at)
    if not found:
        return at, name, None
    escapes = r"\\([\\'])" if found.group(2) is None else r"\\([\\'\"abfnrtv])"
    return (
        found.end(),
        name,
        re.sub(
            escapes,
            lambda one: DOTENV_ESCAPES.get(one.group(1), one.group(1)),
            found.group(1) if found.group(2) is None else found.group(2),
        ),
    )


def read_as_docker(text):
    """docker run --env-file, pkg/kvfile: [(name, value)]; None where it refuses the
    file."""
    pairs = []
    for number, line in enumerate(text.split("\n")):
        line = line[:-1] if line.endswith("\r") else line
        line = (line[1:] if number == 0 and line.startswith("\ufeff") else line).lstrip(
            GO_SPACE
        )
        name, equals, value = line.partition("=")
        if not line or line.startswith("#"):
            continue
        if not name or " " in name or "\t" in name:
            return None
        if equals:
            pairs.append((name, value))
    return pairs


SYSTEMD_QUOTED = re.compile(
    r"""[ \t]*(?:'([^']*)('|\Z)|"((?:[^"\\]|\\.)*)(?:"|\\?\Z))""", re.DOTALL
)
SYSTEMD_BARE = re.compile(r"[ \t]*((?:[^\r\n\\]|\\.)*)\\?", re.DOTALL)
SYSTEMD_LINE = re.compile(r"[^\r\n]*")
SYSTEMD_OLD_COMMENT = re.compile(r"(?:[^\r\n\\]|\\.)*\\?", re.DOTALL)
SYSTEMD_KEY = re.compile(r"[^\r\n][^\r\n=]*")


def read_as_systemd(text, recent=True):
    """systemd's EnvironmentFile=, env-file.c: [(name, value)]; bad names are dropped.

    Before version 254 (not RECENT) a backslash also continued a comment.
    """
    pairs, at = [], 0
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n"))
        if at == len(text):
            return pairs
        if text[at] in "#;":
            at = (SYSTEMD_LINE if recent else SYSTEMD_OLD_COMMENT).match(text, at).end()
            continue
        key = SYSTEMD_KEY.match(text, at)
        at = key.end()
        if text[at : at + 1] != "=":
            continue
        at, value = systemd_value(text, at + 1)
        if re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", key.group().rstrip(" \t")):
            pairs.append((key.group().rstrip(" \t"), value))


def systemd_value(text, at):
    """(where it ended, value): quoted parts, then a bare one, in which quotes mean
    nothing."""
    value = ""
    found = SYSTEMD_QUOTED.match(text, at)
    while found:
        value += found.group(1) or ""
        value += re.sub(r"\\(.)", systemd_unescaped, found.group(3) or "", flags=re.DOTALL)
        at = found.end()
        found = SYSTEMD_QUOTED.match(text, at) if at < len(text) else None
    found = SYSTEMD_BARE.match(text, at)
    bare = found.group(1)
    if not re.search(r"(?<!\\)(?:\\\\)*\\[ \t]?\Z", found.group()):
        bare = bare.rstrip(" \t")
    return found.end(), value + re.sub(
        r"\\(.)", lambda one: one.group(1).strip("\r\n"), bare, flags=re.DOTALL
    )


def systemd_unescaped(found):
    """A backslash in double quotes: as in a shell."""
    char = found.group(1)
    return char if char in '"\\`$' else "" if char == "\n" else "\\" + char


ENV_READERS = {
    "python-dotenv": read_as_dotenv,
    "python-dotenv before 1.2.4": lambda text: read_as_dotenv(text, recent=False),
    "docker --env-file": read_as_docker,
    "systemd": read_as_systemd,
    "systemd before 254": lambda text: read_as_systemd(text, recent=False),
}

# A subshell for each file: a syntax error ends it before the record is printed. Nothing
# is in the
# PATH, so that no line of a generated file can start a program.
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
    """What a real `sh` makes of each text: {name: value}, or None where it refuses the
    file."""
    if os.name == "nt":
        raise unittest.SkipTest("needs a shell of POSIX")
    half = (len(texts) + 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        shells = []
        for number, part in enumerate((texts[:half], texts[half:])):
            place = os.path.join(folder, str(number))
            os.mkdir(place)
            for index, text in enumerate(part):
                with open(os.path.join(place, "f%d" % index), "wb") as file:
                    file.write(text.encode("utf-8"))
            shells.append(
                (
                    len(part),
                    subprocess.Popen(
                        ["/bin/sh", "-c", SHELL_LOOP, "sh", str(len(part))],
                        cwd=place,
                        env={"PATH": "/nonexistent"},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                    ),
                )
            )
        read = []
        for count, shell in shells:
            out = shell.communicate()[0].decode("utf-8", "replace")
            records = (record.split("\1") for record in out.split("\2")[:-1])
            found = {
                fields[0]: dict(zip(ENV_NAMES + (ENV_PROBE,), fields[1:]))
                for fields in records
            }
            read += [found.get(str(index)) for index in range(count)]
    return read


def last_values(pairs):
    """The value that wins for each of our names and for the probe."""
    return dict(
        ENV_UNSET, **{name: value for name, value in pairs or () if name in ENV_UNSET}
    )


def with_env_probe(text):
    """TEXT and behind it, as carefully as can be, lines that a reader sees if it got so
    far."""
    ends = re.findall("\r\n|\n|\r", text) or ["\n"]
    ending = "\n" if "\n" in ends else ends[0]  # every reader knows the bare line feed
    return text + ending * 2 + ENV_PROBE + "=early" + ending + ENV_PROBE + "=seen" + ending


# ----------------------------------------------------------------------------------------
# dotenv: the generator. Each piece brings what must stand there afterwards, so that the
# expected file is put together and never computed from the generated one.
# ----------------------------------------------------------------------------------------

# `lines`: the text, "\n" for a line end. `after`: the same afterwards, "\0" for a line
# end that is
# new. `name`, `value`: what it assigns, if it is one of ours.
EnvPiece = collections.namedtuple("EnvPiece", "lines after name value")

FOREIGN_LINES = (
    "",
    "",
    "   ",
    "\t",
    "# a comment",
    "#LLAMA_CLOUD_API_KEY=commented out",
    "  # LLAMA_CLOUD_BASE_URL='commented",
    "# it's",
    '# say "',
    "# ends in a backslash \\",
    "FOO=bar",
    "export FOO=bar",
    "FOO=a=b=c",
    "FOO=a#b",
    "FOO=a # b",
    "FOO = spaced",
    "FOO=",
    "FOO='a b' # c",
    "FOO='#'",
    'FOO="a \\" b"',
    'FOO="a\\\\"',
    "FOO='a\\'",
    'FOO="it\'s" # "',
    "FOO=it\\'s",
    "FOO=a\\\\",
    "just words",
    "LLAMA_CLOUD_API_KEY",
    "export LLAMA_CLOUD_API_KEY",
    "MY_LLAMA_CLOUD_API_KEY=mine",
    "LLAMA_CLOUD_API_KEY_2=second",
    "LLAMA_CLOUD_API_KEY.x=1",
    "llama_cloud_api_key=lower",
    "FOO=LLAMA_CLOUD_API_KEY=x",
    "FOO='LLAMA_CLOUD_BASE_URL=x'",
    "\u00dcML\u00c4UT=\u00df\u00e9\u0301",
    "FOO=\U0001f600\u202e\u200b",
    "FOO=a\u2028b",
    "FOO=\ufeff",
    "FOO=a\x0bLLAMA_CLOUD_API_KEY=x",
    "FOO=a\x0cLLAMA_AGENTS_PROJECT_ID=x",
    "FOO=a\x85LLAMA_CLOUD_BASE_URL=x",
    "FOO=a\u2028LLAMA_CLOUD_BASE_URL=x",
    "FOO=\x1b[31m",
    "FOO=x LLAMA_CLOUD_API_KEY=y",
    "LLAMA_CLOUD_API_KEY: yaml",
    "[section]",
    "=nameless",
)
FOREIGN_BLOCKS = (  # values of several lines, with a line inside that is no assignment
    'FOO="one\n%s\nthree"',
    "FOO='one\n%s\nthree'",
    'export FOO="\n%s\n" # behind',
    'FOO="a \\"quoted\\" word\n%s\n"',
    'FOO="it\'s\n%s\n\\\\"',
    "FOO='say \"\n%s\n'",
    'FOO = "# no comment\n\n%s\n#"',
    "FOO='\\\n%s\n'",
    '  FOO="x\n  export %s"',
)
OPEN_LINES = ("FOO=%sopen", "export FOO=%sopen # end", "FOO=%s")
# before, after: NAME, the OLD value, QUOTE for one that is left open
OWN_LINES = (
    ("NAME=OLD", "NAME=NEW"),
    ("NAME=OLD", "NAME=NEW"),
    ("NAME=", "NAME=NEW"),
    ("export NAME=OLD", "export NAME=NEW"),
    ("export \t NAME=OLD", "export \t NAME=NEW"),
    ("  NAME=OLD", "  NAME=NEW"),
    ("\texport NAME='OLD'", "\texport NAME=NEW"),
    ("NAME =OLD", "NAME=NEW"),
    ("NAME= OLD", "NAME=NEW"),
    ("NAME=OLD  ", "NAME=NEW"),
    ("NAME='OLD'", "NAME=NEW"),
    ('NAME="OLD"', "NAME=NEW"),
    ("NAME='OLD # b'", "NAME=NEW"),
    ("NAME=OLD#b", "NAME=NEW"),
    ('NAME="a \\" OLD"', "NAME=NEW"),
    ('NAME="\\\\"', "NAME=NEW"),
    ("NAME=OLD # why", "# why\0NAME=NEW"),
    ("NAME='OLD' # it's", "# it's\0NAME=NEW"),
    ('NAME="OLD"\t# say "', '# say "\0NAME=NEW'),
    ('NAME="OLD # b" # c', "# c\0NAME=NEW"),
    ("export NAME=OLD #", "#\0export NAME=NEW"),
    ("NAME=OLD #a # b", "#a # b\0NAME=NEW"),
    ('NAME="OLD\nMINE"', "NAME=NEW"),
    ("NAME='OLD\n# no\nMINE' # c", "# c\0NAME=NEW"),
    ("NAME='\n\nOLD'", "NAME=NEW"),
    ("NAME=QUOTEOLD", "NAME=NEW"),
    ("NAME= QUOTEOLD", "NAME=NEW"),
)


def env_piece(rng, tail):
    """A piece that may stand before the text TAIL: no quote left open that TAIL would
    close."""
    kind = rng.random()
    name = rng.choice(ENV_NAMES)
    quotes = [quote for quote in "'\"" if quote not in tail]
    if kind < 0.40:
        line = rng.choice(FOREIGN_LINES)
        return EnvPiece(line, line, None, None)
    if kind < 0.52:
        lines = rng.choice(FOREIGN_BLOCKS) % (name + "=not this one")
        return EnvPiece(lines, lines, None, None)
    if kind < 0.60:
        quote = rng.choice(quotes + [""])
        line = rng.choice(OPEN_LINES) % quote
        return EnvPiece(line, line, None, None)
    old = "old%d" % rng.randrange(10**6)
    before, after = rng.choice(OWN_LINES)
    if "QUOTE" in before and not quotes:
        before, after = OWN_LINES[0]
    quote = rng.choice(quotes) if "QUOTE" in before else None
    texts = [
        text.replace("NAME", name)
        .replace("OLD", old)
        .replace("QUOTE", quote or "")
        .replace("NEW", ENV_NEW[name])
        .replace("MINE", rng.choice(ENV_NAMES) + "=inner")
        for text in (before, after)
    ]
    return EnvPiece(texts[0], texts[1], name, own_value(texts[0]))


def own_value(line):
    """The value in a line of OWN_LINES, as every reader that can read it agrees."""
    value = line.partition("=")[2].strip()
    quoted = re.match(r"""'([^']*)'|"((?:[^"\\]|\\.)*)\"""", value, re.DOTALL)
    if not quoted:
        return re.sub(r"\s+#.*", "", value)
    return quoted.group(1) or re.sub(r"\\(.)", r"\1", quoted.group(2) or "")


EnvSample = collections.namedtuple("EnvSample", "before after values")
ENV_START = r"[ \t]*(export[ \t]+)?[^=#\s'\"`]+[ \t]*="
# who takes `export NAME` for a name, and so never sees the lines of a file that exports all
KNOWS_NO_EXPORT = ("docker --env-file", "systemd", "systemd before 254")


def env_samples(count, seed):
    """COUNT files: before, after (as is_expected_env() reads it), the old values."""
    rng = random.Random(seed)
    for _ in range(count):
        pieces, tail = [], ""
        for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5, 6, 8, 11))):
            piece = env_piece(rng, tail)
            pieces.insert(0, piece)
            tail = piece.lines + "\n" + tail
        endings = rng.choice((("\n",),) * 6 + (("\r\n",),) * 2 + (("\r",), ("\n", "\r\n")))
        marked = "\1".join(piece.lines.replace("\n", "\1") for piece in pieces)
        ends = [rng.choice(endings) for _ in range(marked.count("\1") + 1)]
        last = ends.pop() * (rng.random() < 0.75 and bool(pieces))
        # behind a BOM a moved comment is none to a shell; what it is before is no better
        bom = (
            "\ufeff"
            if rng.random() < 0.1 and pieces and "\0" not in pieces[0].after
            else ""
        )
        before = bom + put_ends(marked, ends) + last
        after = bom + ended_as_before(pieces, ends) + last
        values = {piece.name: piece.value for piece in pieces if piece.name}
        starts = [re.match(ENV_START, line) for piece in pieces for line in [piece.lines]]
        exports = [start.group(1) for start in starts if start]
        export = "export " if exports and all(exports) else ""
        new = [
            export + name + "=" + ENV_NEW[name] for name in ENV_NAMES if name not in values
        ]
        # a blank line may end what a backslash would continue
        gap = "\2" if new and before.rstrip("\r\n").endswith("\\") else ""
        if new and (not before or before.endswith(("\r", "\n"))):
            after += gap + "\0".join(new) + "\0"
        elif new:
            after += "\0" + gap + "\0".join(new)
        yield EnvSample(before, after, values)


def put_ends(marked, ends):
    return "".join(
        itertools.chain(*itertools.zip_longest(marked.split("\1"), ends, fillvalue=""))
    )


def ended_as_before(pieces, ends):
    """The pieces as they are afterwards, each line end between them as it was before."""
    text, ends = "", list(ends)
    for number, piece in enumerate(pieces):
        inner = [ends.pop(0) for _ in range(piece.lines.count("\n"))]
        text += put_ends(
            piece.after.replace("\n", "\1"), inner if "\n" in piece.after else []
        )
        text += ends.pop(0) if number < len(pieces) - 1 else ""
    return text


def is_expected_env(expected, text):
    """Whether TEXT is EXPECTED: "\0" is a line end of any kind, "\2" is one or nothing."""
    if "\2" in expected:
        return any(is_expected_env(expected.replace("\2", end), text) for end in ("", "\0"))
    parts = expected.split("\0")
    if not text.startswith(parts[0]):
        return False
    at = len(parts[0])
    for part in parts[1:]:
        end = re.compile("\r\n|\n|\r").match(text, at)
        if not end or not text.startswith(part, end.end()):
            return False
        at = end.end() + len(part)
    return at == len(text)


SOUP = (
    (
        "FOO",
        "FOO=",
        "'",
        '"',
        "'",
        '"',
        "\\",
        "\\",
        "=",
        " ",
        " ",
        "#",
        " # ",
        "export ",
        "x",
        "y z",
        "\n",
        "\n",
        "\n",
        "\n",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\u2028",
        "\ufeff",
    )
    + tuple(name + "=" for name in ENV_NAMES)
    + ENV_NAMES
    + tuple("\n%s=old" % n for n in ENV_NAMES)
)


def env_soups(count, seed):
    """Files of random tokens, most of them nonsense that no reader likes."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice(SOUP) for _ in range(rng.randrange(1, 24))) for _ in range(count)
    ]


class EnvText(unittest.TestCase):
    """updated_env(): generated files, and each sentence about the text by an example."""

    maxDiff = None

    def updated(self, text):
        return llamactl.updated_env(text, dict(ENV_NEW))

    def test_generated_files_keep_all_but_the_three_assignments(self):
        for sample in env_samples(4000, "files"):
            after = self.updated(sample.before)
            if not is_expected_env(sample.after, after):
                self.assertEqual(sample.after, after, "from %r" % sample.before)
            if self.updated(after) != after:
                self.assertEqual(
                    after, self.updated(after), "twice from %r" % sample.before
                )

    def check_reader(self, reader, sample, read, after):
        """AFTER, what READER read of the file after the update; True if it could READ it
        before."""
        could = dict(ENV_UNSET, **dict(sample.values, **{ENV_PROBE: "seen"}))
        if read != could:
            return False
        # older versions look for the end of such a value further down, and sometimes
        # find one
        if "1.2.4" in reader and '\\\\"' in sample.before:
            return False
        if reader in KNOWS_NO_EXPORT and "export LLAMA" in self.updated(sample.before):
            return False
        # a comment that moves leaves its carriage return, which hid in it, to the value
        if reader == "sh" and re.search("#.*\r", sample.before):
            return False
        wanted = dict(ENV_UNSET, **ENV_NEW)
        if after != wanted:
            self.assertEqual(
                wanted,
                after,
                "%s: %r became %r" % (reader, sample.before, self.updated(sample.before)),
            )
        return True

    def test_generated_files_read_back_in_every_reader_that_could_read_them(self):
        counts = collections.Counter()
        for sample in env_samples(3000, "readers"):
            probed, after = with_env_probe(sample.before), self.updated(sample.before)
            for reader, read in ENV_READERS.items():
                counts[reader] += self.check_reader(
                    reader, sample, last_values(read(probed)), last_values(read(after))
                )
        # the generator must not become so wild that nobody reads its files
        self.assertGreater(min(counts[reader] for reader in ENV_READERS), 500, counts)

    def test_generated_files_read_back_in_a_shell_that_could_read_them(self):
        samples = list(env_samples(1000, "shells"))
        texts = [
            (with_env_probe(sample.before), self.updated(sample.before))
            for sample in samples
        ]
        read = read_by_shells(list(itertools.chain(*texts)))
        count = sum(
            self.check_reader("sh", *both) for both in zip(samples, read[::2], read[1::2])
        )
        self.assertGreater(count, 250)

    def test_nonsense_is_kept_and_the_second_update_changes_nothing(self):
        wanted = dict(ENV_UNSET, **ENV_NEW)
        for text in env_soups(4000, "soup"):
            after = self.updated(text)
            if self.updated(after) != after:
                self.assertEqual(after, self.updated(after), "twice from %r" % text)
            if re.search("['\"\\\\\ufeff\u2028]", text):
                continue
            lines = set(re.split("[\r\n]", after))
            for line in re.split("[\r\n]", text):
                if "LLAMA" not in line:
                    self.assertIn(line, lines, "%r became %r" % (text, after))
            known = last_values(read_as_dotenv(with_env_probe(text)))
            for reader, read in ENV_READERS.items():
                if reader in KNOWS_NO_EXPORT and "export LLAMA" in after:
                    continue
                # what is no probe to one of them, or has no value, is nobody's assignment
                is_clear = None not in known.values() and not re.search("\r(?!\n)", text)
                if is_clear and last_values(read(with_env_probe(text))) == known:
                    self.assertEqual(
                        wanted, last_values(read(after)), "%s: %r" % (reader, text)
                    )

    def test_by_example(self):
        key, url, project = (name + "=" + ENV_NEW[name] for name in ENV_NAMES)
        both = url + "\n" + project + "\n"
        for before, after in (
            # appended
            ("", key + "\n" + both),
            ("A=1\n", "A=1\n" + key + "\n" + both),
            ("A=1", "A=1\n" + key + "\n" + url + "\n" + project),
            ("A=1\r\n", "A=1\r\n" + "".join(line + "\r\n" for line in (key, url, project))),
            ("A=1\r\nB=2", "A=1\r\nB=2\r\n" + "\r\n".join((key, url, project))),
            (
                "A=1\rB=2\r",
                "A=1\rB=2\r" + "".join(line + "\r" for line in (key, url, project)),
            ),
            ("\ufeffA=1\n", "\ufeffA=1\n" + key + "\n" + both),
            # updated where they stand
            ("LLAMA_CLOUD_API_KEY=a\nB=2\n", key + "\nB=2\n" + both),
            ("\ufeffLLAMA_CLOUD_API_KEY=a\n", "\ufeff" + key + "\n" + both),
            (
                "LLAMA_CLOUD_API_KEY=a\nLLAMA_CLOUD_API_KEY=b\n",
                key + "\n" + key + "\n" + both,
            ),
            (
                "export LLAMA_CLOUD_API_KEY=a\n",
                "export " + "\nexport ".join((key, url, project)) + "\n",
            ),
            (
                "# all\nexport A=1\nexport B='\nC=x\n'\n",
                "# all\nexport A=1\nexport B='\nC=x\n'\nexport "
                + "\nexport ".join((key, url, project))
                + "\n",
            ),
            ("export A=1\nB=2\n", "export A=1\nB=2\n" + key + "\n" + both),
            # a quote that is not closed before something else makes an ordinary line
            (
                'LLAMA_CLOUD_API_KEY="llx-old\nOPENAI_API_KEY="sk-1"\n',
                key + '\nOPENAI_API_KEY="sk-1"\n' + both,
            ),
            ("A='x\nLLAMA_CLOUD_API_KEY=a\nB='y'\n", "A='x\n" + key + "\nB='y'\n" + both),
            # backticks
            (
                "A=`one\nLLAMA_CLOUD_API_KEY=a\n`\n",
                "A=`one\nLLAMA_CLOUD_API_KEY=a\n`\n" + key + "\n" + both,
            ),
            ("LLAMA_CLOUD_API_KEY=`a\nb` # c\n", "# c\n" + key + "\n" + both),
            # a value that a backslash continues goes with its continuation
            ("LLAMA_CLOUD_API_KEY=a\\\nb\\\nc\nD=1\n", key + "\nD=1\n" + both),
            ("LLAMA_CLOUD_API_KEY=a\\\n", key + "\n" + both),
            ("LLAMA_CLOUD_API_KEY=a\\", key + "\n" + url + "\n" + project),
            ("LLAMA_CLOUD_API_KEY=a\\\\\nb\n", key + "\nb\n" + both),
            # a hash makes a comment only behind white space
            ("LLAMA_CLOUD_API_KEY=a # b\n", "# b\n" + key + "\n" + both),
            ("LLAMA_CLOUD_API_KEY=a#b\n", key + "\n" + both),
            ("LLAMA_CLOUD_API_KEY='a # b' # c\n", "# c\n" + key + "\n" + both),
            ("LLAMA_CLOUD_API_KEY=#secret\n", key + "\n" + both),
            # text inside a quoted value of several lines, and behind it
            (
                "A='\n%s\n'\n" % "LLAMA_CLOUD_API_KEY=a",
                "A='\nLLAMA_CLOUD_API_KEY=a\n'\n" + key + "\n" + both,
            ),
            (
                'A="\\"\n%s\n"\nLLAMA_CLOUD_API_KEY=b\n' % "LLAMA_CLOUD_API_KEY=a",
                'A="\\"\nLLAMA_CLOUD_API_KEY=a\n"\n' + key + "\n" + both,
            ),
            (
                'A="one \\\ntwo"\nLLAMA_CLOUD_API_KEY=b\n',
                'A="one \\\ntwo"\n' + key + "\n" + both,
            ),
            ("A='\\\n'\nLLAMA_CLOUD_API_KEY=b\n", "A='\\\n'\n" + key + "\n" + both),
            # an unterminated quote makes an ordinary line
            ("A='\nLLAMA_CLOUD_API_KEY=a\n", "A='\n" + key + "\n" + both),
            ('A="\\"\nLLAMA_CLOUD_API_KEY=a\n', 'A="\\"\n' + key + "\n" + both),
            ('LLAMA_CLOUD_API_KEY="a\nB=2\n', key + "\nB=2\n" + both),
            # what only looks like one of ours
            (
                "#LLAMA_CLOUD_API_KEY=a\nXLLAMA_CLOUD_API_KEY=b\nLLAMA_CLOUD_API_KEY\n",
                "#LLAMA_CLOUD_API_KEY=a\nXLLAMA_CLOUD_API_KEY=b\nLLAMA_CLOUD_API_KEY\n"
                + key
                + "\n"
                + both,
            ),
            (
                "A=\x00\x85\u2028LLAMA_CLOUD_API_KEY=a\n",
                "A=\x00\x85\u2028LLAMA_CLOUD_API_KEY=a\n" + key + "\n" + both,
            ),
            # mixed line ends: no line too many, the last character is no part of a CRLF
            ("A=1\r\nB='a\\'\n", "A=1\r\nB='a\\'\n\0".replace("\0", key + "\n" + both)),
        ):
            with self.subTest(before=before):
                got = self.updated(before)
                if (
                    "\r\nB='a" in before
                ):  # which line end is new lines' is tested by readers below
                    got = got[: len(before)] + got[len(before) :].replace("\r\n", "\n")
                self.assertEqual(after, got)

    def test_a_line_that_is_continued_does_not_swallow_ours(self):
        wanted = dict(ENV_UNSET, **ENV_NEW)
        for before in (
            "A=1\\",
            "A=1\\\n",
            "A=1\\\r\n",
            "A=1\n# c\\",
            "A=1\n# c\\\n",
            "A=1 \\\\\\\n",
        ):
            after = self.updated(before)
            self.assertTrue(after.startswith(before))
            self.assertEqual(after, self.updated(after))
            for reader, read in ENV_READERS.items():
                with self.subTest(before=before, reader=reader):
                    self.assertEqual(wanted, last_values(read(after)), repr(after))
            with self.subTest(before=before, reader="sh"):
                known = read_by_shells([after.replace("\r\n", "\n")])[0]
                self.assertEqual(wanted, known, repr(after))

    def test_a_value_that_a_backslash_continues_is_updated_once_and_for_all(self):
        # a shell and systemd read two lines as one, python-dotenv and Docker read two
        for before in (
            "LLAMA_CLOUD_API_KEY=old\\\nLLAMA_AGENTS_PROJECT_ID=p\n",
            "LLAMA_CLOUD_API_KEY=old # c\\\nLLAMA_AGENTS_PROJECT_ID=p\n",
            "LLAMA_CLOUD_API_KEY='old'\\\nLLAMA_AGENTS_PROJECT_ID=p\nB=2\n",
        ):
            with self.subTest(before=before):
                after = self.updated(before)
                self.assertEqual(after, self.updated(after))
                for reader in ("python-dotenv", "docker --env-file"):
                    self.assertEqual(
                        dict(ENV_UNSET, **ENV_NEW),
                        last_values(ENV_READERS[reader](after)),
                        repr(after),
                    )

    def test_the_last_assignment_is_new_behind_a_folder_of_windows(self):
        # to python-dotenv and Docker the backslash is a part of A's value, nothing else
        after = self.updated("LLAMA_CLOUD_API_KEY=a\nA=C:\\dir\\\nLLAMA_CLOUD_API_KEY=b\n")
        for reader in ("python-dotenv", "python-dotenv before 1.2.4", "docker --env-file"):
            with self.subTest(reader=reader):
                self.assertEqual(
                    dict(ENV_UNSET, **ENV_NEW),
                    last_values(ENV_READERS[reader](after)),
                    repr(after),
                )

    def test_a_stray_carriage_return_does_not_decide_how_new_lines_end(self):
        # a shell and Docker know the line feed alone; they could read these files
        for before in (
            "A=1\rB\nC=3\n",
            "# a\r# b\nLLAMA_CLOUD_API_KEY=a # c\n",
            "A=1\r\nB=2\n",
        ):
            after = self.updated(before)
            wanted = dict(ENV_UNSET, **ENV_NEW)
            with self.subTest(before=before):
                self.assertEqual(wanted, read_by_shells([after])[0], repr(after))
                self.assertEqual(wanted, last_values(read_as_docker(after)))

    def test_a_huge_file(self):
        line = "VARIABLE_%d='some value' # and \"a comment\"\n"
        half = "".join(line % number for number in range(50000))
        after = self.updated(half + "LLAMA_CLOUD_API_KEY=old\n" + half[:-1])
        new = [name + "=" + ENV_NEW[name] for name in ENV_NAMES]
        self.assertEqual("".join((half, new[0], "\n", half, new[1], "\n", new[2])), after)

    def test_a_huge_value_and_a_great_many_open_quotes(self):
        for text in (
            'A="' + '\\"\n' * 300000 + '"\n',
            "A='" + "\n" * 300000 + "'\n",
            'A="\\"\n' * 30000,
            "A='\nB=\"\n" * 20001 + "\"'\n",
        ):
            after = self.updated(text)
            self.assertEqual(text, after[: len(text)])
            self.assertEqual(self.updated(""), after[len(text) :])

    def test_no_line_takes_long(self):
        """Twice the length takes twice the time, not four times."""
        for start, filler, end in (
            ("LLAMA_CLOUD_API_KEY=", " ", "x"),
            ("LLAMA_CLOUD_API_KEY", " ", ""),
            ("", " ", "x"),
            ("A=b", " ", "#"),
            ("A='", "\\", ""),
            ("A=", "'", ""),
            ("", "export ", "A=1"),
            ("", "a", "=1"),
            ("A=", "\\", "\n"),
            ("A=", '"" ', "\n"),
        ):
            with self.subTest(start=start, filler=filler, end=end):
                text = start + filler * 200000 + end
                started = time.monotonic()
                self.updated(text)
                self.assertLess(time.monotonic() - started, 2)


ENV_VALUES = (
    "a",
    "llx-0.9_/:@%+,=-Z",
    "$HOME",
    "${HOME}",
    "$",
    "'",
    '"',
    "\\",
    "`id`",
    "#",
    "a#b",
    ";",
    "&",
    "a;b&c|d",
    "(",
    "~",
    "~root",
    "*",
    "!",
    "{a,b}",
    "[x]",
    "<>",
    "it's",
    'say"so"',
    "a\\n",
    "\\\\",
    "it's$HOME",
    "it's`id`",
    "it's${HOME}",
    "\\$HOME",
    "'\"",
    "\"'$`\\",
    "a\\'b",
    "\\'",
    "a=b",
    "=",
    "-",
    "--help",
    "^",
    "?",
    "a'\"b",
    "\\t\\x41",
    "%n",
    "@",
    "'a'",
    '"a"',
    "'a",
    '"a',
    "$(id)",
    "a$",
    "${A:-b}",
    "'${HOME}",
    "key\\",
)


OF_NODE = {"Next.js", "Vite", "dotenv for Node.js"}  # whose rules no reader here has


class EnvValues(unittest.TestCase):
    """env_value(): who reads it, and who is named as unable to, is the same."""

    def text_of(self, value):
        lines = ["%s=%s" % (name, llamactl.env_value(value)) for name in ENV_NAMES]
        return "\n".join(["A=1"] + lines + ['Z="last"', ""])

    def values(self):
        rng = random.Random("values")
        signs = [chr(code) for code in range(33, 127)]
        short = [
            "".join(rng.choice("'\"\\$`#{}a") for _ in range(rng.randrange(1, 7)))
            for _ in range(300)
        ]
        return list(ENV_VALUES) + signs + short + ["x" + sign + "y" for sign in signs]

    def test_every_reader_that_is_not_named_reads_it(self):
        for value in self.values():
            named = llamactl.unable_readers(value)
            text = self.text_of(value)
            wanted = dict.fromkeys(ENV_NAMES, value)
            for reader, read in ENV_READERS.items():
                if not any(
                    reader.startswith(name) or name.startswith(reader) for name in named
                ):
                    known = last_values(read(text))
                    del known[ENV_PROBE]
                    self.assertEqual(wanted, known, "%s does not read %r" % (reader, text))

    def test_every_reader_that_is_named_cannot_read_it(self):
        for value in ENV_VALUES:
            for name in set(llamactl.unable_readers(value)) - OF_NODE:
                readers = [reader for reader in ENV_READERS if reader.startswith(name[:10])]
                self.assertTrue(readers, name)
                known = [
                    last_values(ENV_READERS[each](self.text_of(value))) for each in readers
                ]
                self.assertTrue(
                    any(one[ENV_NAMES[0]] != value for one in known),
                    "%s reads %r well" % (name, value),
                )

    def test_a_shell_reads_every_value(self):
        values = self.values()
        for value, known in zip(
            values, read_by_shells([self.text_of(one) for one in values])
        ):
            wanted = dict(dict.fromkeys(ENV_NAMES, value), **{ENV_PROBE: "(unset)"})
            self.assertEqual(wanted, known, value)

    def test_a_safe_value_is_bare(self):
        for value in (
            "llx-abcXYZ_019",
            "https://api.cloud.llamaindex.ai",
            "http://[::1]:8000"[:4],
            "proj-1.2",
            "0d5a1e2c-1111-4222-8333-444455556666",
        ):
            self.assertEqual(
                (value, []), (llamactl.env_value(value), llamactl.unable_readers(value))
            )


# ========================================================================================
# terminal: real pseudo-terminals, real streams, real signals
# ========================================================================================


class SignalCase(CommandCase):
    """Children must not inherit signals that whoever started the tests ignores."""

    def setUp(self):
        super().setUp()
        for number, action in (
            (signal.SIGINT, signal.default_int_handler),
            (signal.SIGHUP, signal.SIG_DFL),
        ):
            self.addCleanup(signal.signal, number, signal.signal(number, action))

    def two_profiles(self):
        self.write_store(
            {
                "blue": {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"},
                "blue-2": {
                    "auth_type": "token",
                    "api_key": KEY,
                    "project_id": "proj-alpha",
                },
                "red": {"auth_type": "token", "api_key": KEY, "project_id": "proj-beta"},
            },
            "blue",
        )

    def current(self):
        return self.stored()[self.url]["current_profile"]

    def interrupted(self, argv, prompt, typed):
        """Type at PROMPT, and see that the program leaves the terminal as it found it."""
        screen = Screen([sys.executable, PROGRAM] + argv, self.env, self.home)
        try:
            before = termios.tcgetattr(screen.master)
            screen.wait_for(prompt, 15)
            screen.type(typed)
            try:
                code = screen.finish(5)
            except subprocess.TimeoutExpired:
                # Python sees a signal that comes just before a read with the next one only
                screen.type(typed)
                code = screen.finish(15)
            self.assertEqual(termios.tcgetattr(screen.master), before)
        finally:
            screen.close()
        self.note(code, b"", bytes(screen.seen))
        self.assertEqual(code, 130, bytes(screen.seen))
        return bytes(screen.seen).decode()


class Questions(SignalCase):
    def test_key_is_typed_hidden_and_project_picked(self):
        self.cloud.projects[0]["project_name"] = "Al\x1b[2Jpha\u202e"
        shown = self.pty(
            ["auth", "token"],
            [
                ("API key for", b"llx-CANARY-a-wrong-one\n"),
                ("API key for", b"llx-CANARY bad\n"),
                ("API key for", b"  %s \n" % KEY.encode()),
                ("or name", b"9\n"),
                ("or name", b"\n"),
                ("or name", b"proj\n"),
                ("or name", b"BET\n"),
            ],
        )
        self.assertEqual(shown.code, 0)
        self.assertNotIn("\x1b", shown.out)
        self.assertNotIn("\u202e", shown.out)
        self.assertNotIn("llx-", shown.out.replace("llx-wxyz", ""))
        self.assertRegex(shown.out, r"1 .*Al.*pha.*proj-alpha.*\n.*2 .*Beta.*proj-beta")
        profile = self.profiles()["llx-wxyz"]
        self.assertEqual((profile["api_key"], profile["project_id"]), (KEY, "proj-beta"))

    def test_a_byte_that_is_no_text_is_asked_for_again_and_not_quoted(self):
        shown = self.pty(
            ["auth", "token", "--project", "proj-beta"],
            [
                ("API key for", b"llx-CANARY-\xff\xfe\n"),
                ("API key for", KEY.encode() + b"\n"),
            ],
        )
        self.assertEqual((shown.code, list(self.profiles())), (0, ["llx-wxyz"]), shown.out)
        self.assertRegex(shown.out, r"\n[^\n]*is not text; try again\n")
        self.assertNotRegex(shown.out, "CANARY|utf|codec|ff|xff")

    def test_what_a_menu_shows_is_harmless(self):
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        self.write_store({HOSTILE: profile, "red": profile}, HOSTILE)
        shown = self.pty(["auth", "use"], [("or name [", b"red\n")])
        self.assertEqual((shown.code, self.current()), (0, "red"))
        self.assertIsNone(UNSHOWN.search(shown.out), ascii(shown.out))
        self.assertEqual(4, shown.out.count("\n"), shown.out)

    def test_three_tries(self):
        shown = self.pty(["auth", "token"], [("API key for", b"llx-CANARY-wrong\n")] * 3)
        self.assertEqual((shown.code, self.profiles()), (4, {}))
        self.assertEqual(shown.out.count("API key for"), 3)
        self.assertRegex(shown.out, "(?m)^error: .*401")

    def test_menus(self):
        self.two_profiles()
        self.done("environments", "add", NOWHERE, "--no-verify")
        self.done("environments", "use", self.url)
        table = (
            ("auth use", [b"3\n"], lambda: self.current() == "red"),
            # a part of several names is none, the whole of one is
            (
                "auth use",
                [b"0\n", b"4\n", b"nope\n", b"blu\n", b"blue\n"],
                lambda: self.current() == "blue",
            ),
            (
                "projects use",
                [b"beta\n"],
                lambda: self.profiles()["blue"]["project_id"] == "proj-beta",
            ),
            ("auth logout", [b"E-2\n"], lambda: sorted(self.profiles()) == ["blue", "red"]),
            (
                "auth logout",
                [b"\n"],
                lambda: (list(self.profiles()), self.current()) == (["red"], None),
            ),
            (
                "environments use",
                [b"127.0.0.1:1\n"],
                lambda: self.rows("config")["environment"] == NOWHERE,
            ),
            ("environments delete", [b"\n"], lambda: list(self.stored()) == [self.url]),
        )
        for words, answers, proof in table:
            with self.subTest(words=words, answers=answers):
                shown = self.pty(words.split(), [("or name", answer) for answer in answers])
                self.assertEqual(shown.code, 0, shown.out)
                self.assertTrue(proof(), shown.out)
                if words.startswith("auth use"):
                    self.assertRegex(shown.out, r"(?m)^\* +\d  (red|blue)$")

    def test_leaving_a_question(self):
        self.two_profiles()
        before = self.store_text()
        for argv, prompt in (
            (["auth", "token"], "API key for"),
            (["auth", "use"], "or name"),
        ):
            for typed in (b"\x03", b"\x04"):
                with self.subTest(argv=argv, typed=typed):
                    shown = self.interrupted(argv, prompt, typed)
                    self.assertNotIn("Traceback", shown)
                    self.assertLessEqual(shown.count("\n"), 6)
        self.assertEqual(self.store_text(), before)

    def test_signals_at_the_hidden_prompt_leave_the_echo_on(self):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            with self.subTest(signal=number):
                command = [sys.executable, PROGRAM, "auth", "token"]
                screen = Screen(command, self.env, self.home)
                try:
                    before = termios.tcgetattr(screen.master)
                    screen.wait_for("API key for", 15)
                    while termios.tcgetattr(screen.master) == before:
                        time.sleep(0.01)  # until the prompt has turned the echo off
                    screen.process.send_signal(number)
                    self.assertEqual(screen.finish(15), 128 + number)
                    self.assertEqual(termios.tcgetattr(screen.master), before)
                finally:
                    screen.close()
                self.note(0, b"", bytes(screen.seen))

    def test_where_nobody_can_be_asked(self):
        self.two_profiles()
        quiet = 'exec "$0" "$@" 2> error.txt'
        table = (
            (["auth", "use"], {"TERM": "dumb"}, None),
            (["auth", "logout"], {"CI": "true"}, None),
            (["auth", "token"], {"TERM": "dumb"}, None),
            (["auth", "use"], {"CI": ""}, ["sh", "-c", quiet, sys.executable, PROGRAM]),
        )
        for argv, env, command in table:
            with self.subTest(argv=argv, env=env):
                shown = self.pty(argv, env=env, command=command and command + argv)
                text = shown.out
                if command:
                    with open(os.path.join(self.home, "error.txt")) as file:
                        text = file.read()
                    self.assertEqual(shown.out, "")
                self.assertEqual(shown.code, 2)
                choices = "--api-key" if "token" in argv else "NAME.*blue, blue-2, red"
                self.assertRegex(text, choices)
                self.assertNotIn("by number", text)

    def test_login_counts_down_and_asks_for_the_project(self):
        self.cloud.pending_polls = 1
        shown = self.pty(["auth", "login"], [("left", b""), ("or name", b"2\n")])
        self.assertEqual(shown.code, 0, shown.out)
        self.assertRegex(shown.out, r"[0-9]:[0-5][0-9] left")
        for lifetime in (600, 86400):
            self.cloud.pending_polls, self.cloud.expires_in = 1, lifetime
            shown = self.pty(
                ["auth", "login", "--project", "proj-beta"], [("waiting, ", b"")]
            )
            lines = re.findall("\r([^\r\n]+)(?=\r)", shown.out)
            self.assertEqual(
                {22}, {max(map(len, lines))}, lines
            )  # a narrow terminal's width
        self.assertEqual(self.profiles()["dev@example.com"]["project_id"], "proj-beta")

    def test_login_that_is_interrupted_or_whose_terminal_hangs_up(self):
        self.cloud.interval, self.cloud.auto_approve = 60, None
        before = self.store_text()
        self.interrupted(["auth", "login"], "left", b"\x03")
        result = self.pty(["auth", "login"], [("left", None)])
        self.assertEqual(result.code, 129)
        self.assertEqual(
            (self.store_text(), os.listdir(self.folder).count("profiles.json.new")),
            (before, 0),
        )

    def test_hang_up_at_a_question_under_nohup(self):
        self.two_profiles()
        nohup = ["sh", "-c", 'trap \'\' HUP; exec "$0" "$@"', sys.executable, PROGRAM]
        for argv, prompt in (
            (["auth", "use"], "or name"),
            (["auth", "token"], "API key for"),
        ):
            with self.subTest(argv=argv):
                result = self.pty(argv, [(prompt, None)], command=nohup + argv)
                # getpass, once it cannot restore a terminal that is gone, says so instead
                codes = [130, 2] if "token" in argv else [130]
                if platform.python_implementation() == "PyPy":
                    codes.append(129)  # it does not see that a signal was ignored before
                self.assertIn(result.code, codes)
                self.assertEqual(self.current(), "blue")


class ProgramOnStdin(SignalCase):
    """curl ... | python3 - auth token"""

    def shell(self, *argv):
        return ["sh", "-c", '"$0" - %s < "$1"' % " ".join(argv), sys.executable, PROGRAM]

    def test_it_asks_at_the_controlling_terminal(self):
        shown = self.pty(
            [],
            [("API key for", KEY.encode() + b"\n"), ("or name", b"beta\n")],
            command=self.shell("auth", "token"),
        )
        self.assertEqual(shown.code, 0, shown.out)
        self.assertNotIn("llx-", shown.out.replace("llx-wxyz", ""))
        self.assertEqual(self.profiles()["llx-wxyz"]["project_id"], "proj-beta")

    def test_the_program_is_no_key(self):
        """The key is asked for where somebody can answer; else an error says why not."""
        for flag in ("--api-key", "--api-key-file"):
            with self.subTest(flag=flag):
                command = self.shell("auth", "token", flag, "-", "--project", "proj-beta")
                answers = [("API key: ", KEY.encode("ascii") + b"\n")]
                shown = self.pty([], answers, command=command)
                self.assertEqual((shown.code, len(self.profiles())), (0, 1))
                self.assertNotIn(KEY, shown.out)
                self.write_store({})
                self.env["CI"] = "true"
                shown = self.pty([], command=command)
                del self.env["CI"]
                self.assertEqual((shown.code, self.profiles()), (2, {}))
                self.assertRegex(shown.out, "(?m)^error: .*(stdin|standard input).*program")

    def test_without_any_terminal(self):
        self.two_profiles()
        for argv in (["auth", "token"], ["auth", "use"]):
            with self.subTest(argv=argv):
                with open(PROGRAM, "rb") as program:
                    process = subprocess.Popen(
                        [sys.executable, "-"] + argv,
                        env=self.env,
                        cwd=self.home,
                        stdin=program,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        start_new_session=True,
                    )
                    out, err = process.communicate()
                self.expect_failure(
                    self.note(process.returncode, out, err), 2, "--api-key|NAME.*blue"
                )


class Streams(SignalCase):
    def shell(self, redirection, *argv, **options):
        """Run with REDIRECTION; the program's stderr is read unless that was redirected."""
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" ' + redirection, sys.executable, PROGRAM]
            + list(argv),
            env=dict(self.env, **options.pop("env", {})),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=30)
        return self.note(process.returncode, out, err)

    def test_closed_and_full(self):
        self.with_profile()
        listing = self.done("auth", "get").out
        for redirection, argv, code, out, err in (
            (">&-", "auth get", 1, "", "^error: .*output.*\n$"),
            ("> /dev/full", "auth get", 1, "", "^error: .*output.*\n$"),
            ("<&-", "auth get", 0, listing, ""),
            ("<&-", "auth token", 2, "", "^error: .*--api-key.*\nhint: .*\n$"),
            ("<&-", "auth token --api-key - --project p", 2, "", "^error: .*input.*\n$"),
            ("2>&-", "auth get", 0, listing, ""),
            ("2>&-", "auth use nope", 1, "", ""),
            ("2> /dev/full", "auth use nope", 1, "", ""),
            (">&- 2>&- <&-", "auth use main", 0, "", ""),
        ):
            with self.subTest(redirection=redirection, argv=argv):
                self.expect(self.shell(redirection, *argv.split()), code, out, err)

    def test_output_is_whole_or_an_error(self):
        """Unbuffered, one write may take a part of it, or nothing of it where it would
        wait."""
        read, full = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, full)
        os.set_blocking(full, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(full, b"x" * 4096):
                pass
        for env in ({}, {"PYTHONUNBUFFERED": "1"}):
            with self.subTest(env=env), open(os.path.join(self.home, "out"), "wb") as file:
                self.assertEqual(
                    self.process("--help", env=env).out, self.done("--help").out
                )
                with file_size_limit(100):
                    limited = self.spawn("--help", env=env, stdout=file)
                for process in (limited, self.spawn("--help", env=env, stdout=full)):
                    _, err = process.communicate(timeout=30)
                    self.expect(
                        self.note(process.returncode, b"", err),
                        1,
                        "",
                        r"\Aerror: standard output.*\n\Z",
                    )

    def test_closed_pipe_ends_quietly(self):
        self.with_profile()
        for argv, stream, code in (
            (["auth", "get"], "stdout", 0),
            (["--help"], "stdout", 0),
            (["auth", "get", "-o", "json"], "stdout", 0),
            (["auth", "use", "main"], "stderr", 0),
            (["auth", "use", "nope"], "stderr", 1),
        ):
            with self.subTest(argv=argv):
                read, write = os.pipe()
                os.close(read)
                process = self.spawn(*argv, **{stream: write})
                os.close(write)
                out, err = process.communicate()
                self.assertEqual((process.returncode, out or err or b""), (code, b""))

    def test_stdout_is_utf_8_in_any_locale(self):
        self.with_profile(project_name="Gr\u00fc\u00dfe \u4f60\u597d \U0001f999")
        ascii_only = {
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
            "PYTHONIOENCODING": "ascii",
        }
        for flags in ((), ("-o", "json")):
            result = self.process("config", *flags, env=ascii_only)
            self.assertEqual(result.code, 0)
            self.assertEqual(result.out, self.done("config", *flags).out)
        self.assertIn("\U0001f999", self.done("config").out)
        self.assertEqual(
            self.process("projects", "use", "proj-alpha", env=ascii_only).code, 0
        )

    def test_ctrl_c_while_waiting(self):
        """A poll's pause of a minute, and a server that never answers."""
        self.with_profile()
        self.cloud.interval, self.cloud.auto_approve = 60, None
        self.cloud.fault(LIST_PROJECTS, "silence")
        for argv, reached in (
            (["auth", "login"], lambda: self.cloud.sent("/oidc/device_authorization")),
            (["projects", "get"], lambda: self.cloud.sent(LIST_PROJECTS)),
        ):
            with self.subTest(argv=argv):
                process = self.spawn(*argv)
                if argv == ["auth", "login"]:
                    process.stderr.readline()
                end = time.monotonic() + 20
                while not reached() and time.monotonic() < end:
                    select.select([], [], [], 0.005)
                started = time.monotonic()
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=30)
                self.note(process.returncode, out, err)
                self.assertEqual((process.returncode, out), (130, b""), err)
                self.assertLess(time.monotonic() - started, 5)


class Browser(CommandCase):
    def setUp(self):
        super().setUp()
        self.patch(MACOS=False)

    def opened(self, env, *argv, browser="firefox", code=4, **device):
        """The addresses that a login, refused at once, gave to the browser."""
        self.cloud.device_answer = device
        self.cloud.token_script = [(400, {"error": "access_denied"})]
        addresses = []
        fake = types.SimpleNamespace(
            name=browser, open=lambda url, *rest: addresses.append(url)
        )
        error = webbrowser.Error if browser is None else None
        with unittest.mock.patch.object(
            webbrowser, "get", return_value=fake, side_effect=error
        ):
            result = self.call("auth", "login", *argv, env=env)
        self.assertEqual(result.code, code, result.err)
        return addresses

    def test_where_a_graphical_one_is_plausible(self):
        display = {"DISPLAY": ":0"}
        for env in (display, {"WAYLAND_DISPLAY": "wayland-0"}):
            (address,) = self.opened(env)
            self.assertTrue(address.startswith(self.url + "/oidc/device?user_code="))
        plain = {
            "verification_uri": "https://id.example/d",
            "verification_uri_complete": None,
        }
        self.assertEqual(self.opened(display, **plain), ["https://id.example/d"])

    def test_where_it_is_not(self):
        display = {"DISPLAY": ":0"}
        for env in (
            {},
            {"DISPLAY": ""},
            dict(display, SSH_CONNECTION="a 1 b 2"),
            dict(display, SSH_TTY="/dev/pts/1"),
            dict(display, SSH_CLIENT="a 1 2"),
        ):
            with self.subTest(env=env):
                self.assertEqual(self.opened(env), [])
        self.assertEqual(self.opened(display, "--no-browser"), [])
        self.assertEqual(self.opened(display, browser=None), [])
        for name in (
            "w3m",
            "lynx",
            "links",
            "elinks",
            "www-browser",
            "/usr/bin/lynx",
            "links2",
        ):
            with self.subTest(name=name):
                self.assertEqual(self.opened(display, browser=name), [])

    def test_addresses_that_no_browser_must_see(self):
        """The login is refused, as for each unsafe URL that a server names."""
        for address in (
            "javascript:alert(1)",
            "file:///etc/passwd",
            "ftp://x/",
            "-x",
            "",
            "https://a.example/\n--profile",
            "data:text/html,x",
            "https:evil",
        ):
            with self.subTest(address=address):
                device = {
                    "verification_uri": address or "javascript:1",
                    "verification_uri_complete": address or None,
                }
                self.assertEqual(self.opened({"DISPLAY": ":0"}, code=1, **device), [])


# ========================================================================================
# disk: helpers
# ========================================================================================


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


def mode_of(path):
    return oct(stat.S_IMODE(os.stat(path).st_mode))


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


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
    return os.path.normpath(os.path.join(os.readlink("/proc/self/fd/%d" % folder), name))


def skip_without_paths_of_descriptors():
    if not os.path.exists("/proc/self/fd"):
        raise unittest.SkipTest("needs /proc, to know the path of an open folder")


@contextlib.contextmanager
def opening_fails(refused, number):
    """os.open fails with the error NUMBER where REFUSED(path, flags), even for root."""
    skip_without_paths_of_descriptors()
    really_open = os.open

    def failing_open(path, flags, *args, dir_fd=None):
        if refused(full_path(path, dir_fd), flags):
            raise OSError(number, os.strerror(number), path)
        return really_open(path, flags, *args, dir_fd=dir_fd)

    with unittest.mock.patch.object(os, "open", failing_open):
        yield


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


def without_fsync():
    """Only a power cut tells the difference, and a busy disk takes its time for each of
    them."""
    return unittest.mock.patch.object(os, "fsync", lambda descriptor: None)


class DiskCase(Case):
    """Commands that read, commands that write, and what both do to the files of the
    home."""

    READERS = (
        ("auth", "get"),
        ("auth", "get", "main", "-o", "yaml"),
        ("auth", "status"),
        ("auth", "status", "--offline"),
        ("environments", "get"),
        ("projects", "get"),
        ("organizations", "get"),
        ("deployments", "get"),
        ("config", "-o", "json"),
    )
    OFFLINE_READERS = (
        ("auth", "get"),
        ("auth", "status", "--offline"),
        ("environments", "get"),
        ("config",),
        ("auth", "inject", "--env-file", "-"),
    )
    WRITERS = (
        ("auth", "token", "--no-verify", "--api-key", OTHER_KEY, "--project", "proj-beta"),
        ("auth", "use", "main"),
        ("auth", "logout", "main"),
        ("auth", "login", "--start"),
        ("projects", "use", "proj-beta"),
        ("environments", "use", DEFAULT_URL),
        ("environments", "add", "https://other.example.com", "--no-verify"),
        ("environments", "delete", DEFAULT_URL),
    )
    # writers that need neither a profile nor the network
    ALWAYS_WRITERS = (
        ("auth", "token", "--no-verify", "--api-key", OTHER_KEY, "--project", "proj-beta"),
        ("environments", "add", "https://other.example.com", "--no-verify"),
    )

    def setUp(self):
        Case.setUp(self)
        patcher = without_fsync()
        patcher.start()
        self.addCleanup(patcher.stop)

    def assert_one_error(self, result, code=1, names=""):
        """CODE, nothing on stdout, and one error line that names NAMES."""
        lines = result.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        self.assertEqual((result.code, result.out, len(errors)), (code, "", 1), result)
        self.assertIn(names, errors[0])
        for line in lines:
            self.assertRegex(line, "^(error|hint|warning): ")

    def files(self):
        return sorted(os.listdir(self.folder))

    def warnings_of(self, result):
        return [line for line in result.err.splitlines() if line.startswith("warning: ")]

    def put(self, content, mode=0o600):
        """CONTENT as the store, whatever it is."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        with open(self.store_path, "wb") as file:
            file.write(content)
        os.chmod(self.store_path, mode)

    def of_variables(self):
        return {
            "LLAMA_CLOUD_API_KEY": KEY,
            "LLAMA_AGENTS_PROJECT_ID": "proj-alpha",
            "LLAMA_CLOUD_BASE_URL": self.url,
        }

    def log_in(self, expired=True):
        """A login of dev@example.com made by the program, its access token EXPIRED or
        not."""
        result = self.call("auth", "login", "--project", "proj-alpha")
        self.assertEqual(result.code, 0, result.err)
        if expired:
            self.cloud.expire_access_tokens()
            text = file_bytes(self.store_path).decode()
            self.put(re.sub(r'("access_expires_at": )[0-9.]+', r"\g<1>1.0", text).encode())
        return self.profiles()["dev@example.com"]

    def assert_nowhere(self, *secrets):
        for path, (_, _, _, content) in tree(self.home).items():
            for secret in secrets:
                self.assertNotIn(
                    secret.encode(),
                    content if isinstance(content, bytes) else b"",
                    path + " holds a secret that was logged out",
                )


# ========================================================================================
# disk: the folder, modes, who creates and who only reads
# ========================================================================================


class StoreFolderTest(DiskCase):
    def test_where_the_folder_is(self):
        cases = (
            ({"LLAMACTL_CONFIG_DIR": "%s/a"}, "a"),
            ({"LLAMACTL_CONFIG_DIR": "~/b"}, "b"),
            ({"LLAMACTL_CONFIG_DIR": "%s/c", "XDG_CONFIG_HOME": "%s/xdg"}, "c"),
            ({"XDG_CONFIG_HOME": "%s/xdg"}, "xdg/llamactl"),
            ({"XDG_CONFIG_HOME": "relative"}, ".config/llamactl"),
            ({"XDG_CONFIG_HOME": ""}, ".config/llamactl"),
            ({"APPDATA": "%s/appdata"}, ".config/llamactl"),
            ({}, ".config/llamactl"),
        )
        del self.env["LLAMACTL_CONFIG_DIR"]
        for variables, expected in cases:
            with self.subTest(variables):
                env = {
                    name: value.replace("%s", self.home)
                    for name, value in variables.items()
                }
                self.assertEqual(self.call(*self.ALWAYS_WRITERS[1], env=env).code, 0)
                path = os.path.join(self.home, expected)
                self.assertEqual(sorted(os.listdir(path)), STORE_FILES)
                self.assertEqual(mode_of(path), "0o700")
                shutil.rmtree(path)

    def test_without_a_home_there_is_no_folder_in_it(self):
        for home, chosen, expected in (
            ("", "~/x", None),
            ("", "~", None),
            ("", "", None),
            ("relative", "~/x", None),
            ("/", "~/x", "/x"),
            ("/a/", "~//x", "/a/x"),
            ("/a", "~", "/a"),
            ("", "~nobody-of-that-name/x", None),
            ("", "./~/x", os.path.abspath("~/x")),
            (None, "~/x", None),
            (None, "/x", "/x"),
        ):
            variables = {"LLAMACTL_CONFIG_DIR": chosen}
            variables.update({} if home is None else {"HOME": home})
            unknown = unittest.mock.patch(
                "pwd.getpwuid", side_effect=KeyError("uid not found")
            )
            with self.subTest(home=home, chosen=chosen), unknown:
                with unittest.mock.patch.dict(os.environ, variables, clear=True):
                    self.assertEqual(llamactl.read_process().config_folder(), expected)

    def test_a_working_folder_that_is_gone_has_no_folder_in_it(self):
        self.cloud, here = self.cloud_server(), os.getcwd()
        env = dict(self.of_variables(), LLAMACTL_CONFIG_DIR="relative")
        os.chdir(tempfile.mkdtemp(dir=self.home))
        try:
            os.rmdir(os.getcwd())
            self.assertEqual(self.call("projects", "get", env=env).code, 0)
            self.assert_one_error(self.call(*self.ALWAYS_WRITERS[0], env=env), 1, "no home")
        finally:
            os.chdir(here)

    def test_windows_keeps_it_in_appdata(self):
        del self.env["LLAMACTL_CONFIG_DIR"]
        env = {"APPDATA": os.path.join(self.home, "Roaming"), "XDG_CONFIG_HOME": self.home}
        with unittest.mock.patch.object(llamactl, "WINDOWS", True):
            self.assertEqual(self.call(*self.ALWAYS_WRITERS[1], env=env).code, 0)
        self.assertEqual(
            sorted(os.listdir(os.path.join(self.home, "Roaming", "llamactl"))), STORE_FILES
        )

    def test_reading_creates_nothing(self):
        self.cloud = self.cloud_server()
        shutil.rmtree(self.folder)
        for command in self.READERS + self.OFFLINE_READERS:
            with self.subTest(command):
                self.call(*command)
                self.assertEqual(os.listdir(self.home), [])
        self.call("projects", "get", env=self.of_variables())
        self.assertEqual(os.listdir(self.home), [])

    def test_reading_changes_nothing(self):
        self.cloud = self.cloud_server()
        self.with_profile()
        os.chmod(self.store_path, 0o644)  # loose, but that is for a writer to mend
        with open(self.store_path + ".new", "w") as file:
            file.write("what a crash left")
        os.chmod(self.folder, 0o755)
        before = tree(self.home)
        for command in self.READERS:
            with self.subTest(command):
                self.assertEqual(self.call(*command).code, 0)
                self.assertEqual(tree(self.home), before)
        self.assertEqual(self.call("auth", "inject", "--env-file", "-", sings=True).code, 0)
        self.assertEqual(self.process("auth", "exec", "--", "true").code, 0)
        self.assertEqual(tree(self.home), before)

    def test_reading_needs_no_right_to_write(self):
        self.cloud = self.cloud_server()
        self.with_profile()
        with opening_fails(is_for_writing, errno.EROFS):
            for command in self.READERS:
                with self.subTest(command):
                    self.assertEqual(self.call(*command).code, 0)

    def test_modes_under_every_umask(self):
        self.cloud = self.cloud_server()
        for mask in (0o000, 0o022, 0o077, 0o277):
            for command in (
                self.ALWAYS_WRITERS * 2
            ):  # the second time they find the files there
                with self.subTest(umask=oct(mask), command=command[:2]), umask(mask):
                    self.assertEqual(self.call(*command).code, 0)
                    self.assertEqual(mode_of(self.folder), "0o700")
                    modes = {
                        name: mode_of(os.path.join(self.folder, name))
                        for name in self.files()
                    }
                    self.assertEqual(modes, dict.fromkeys(STORE_FILES, "0o600"))
            shutil.rmtree(self.folder)

    def test_files_are_private_from_birth(self):
        """Before anything is written: who opened the empty file could read what comes
        later."""
        born, fchmod = [], os.fchmod

        def noted(descriptor, mode):
            born.append(oct(stat.S_IMODE(os.fstat(descriptor).st_mode)))
            fchmod(descriptor, mode)

        with umask(0), unittest.mock.patch.object(os, "fchmod", noted):
            self.assertEqual(self.call(*self.ALWAYS_WRITERS[0]).code, 0)
            self.assertEqual(
                self.call(
                    "auth", "inject", "--env-file", os.path.join(self.home, "new.env")
                ).code,
                0,
            )
        self.assertGreaterEqual(len(born), 4)  # the store, the .env and their locks
        self.assertEqual(set(born), {"0o600"})

    def test_missing_parents_are_made_private_too(self):
        self.folder = os.path.join(self.home, "a", "b", "c")
        with umask(0):
            result = self.call(
                *self.ALWAYS_WRITERS[0], env={"LLAMACTL_CONFIG_DIR": self.folder}
            )
        self.assertEqual(result.code, 0)
        for path in ("a", "a/b", "a/b/c"):
            self.assertEqual(mode_of(os.path.join(self.home, path)), "0o700")

    def test_writers_tighten_a_loose_store(self):
        self.cloud = self.cloud_server()
        for command in self.WRITERS:
            with self.subTest(
                command
            ):  # "auth use main" finds nothing to change but the mode
                self.with_profile()
                os.chmod(self.store_path, 0o644)
                self.assertEqual(self.call(*command).code, 0)
                self.assertEqual(mode_of(self.store_path), "0o600")

    def test_a_folder_that_others_can_write_to_is_a_warning_and_stays(self):
        self.cloud = self.cloud_server()
        for mode, warned in (
            (0o777, True),
            (0o770, has_a_shared_group()),
            (0o702, True),
            (0o755, False),
        ):
            for command in (
                ("auth", "get"),
                ("auth", "use", "main"),
                ("auth", "logout", "main"),
            ):
                with self.subTest(mode=oct(mode), command=command):
                    self.with_profile()
                    os.chmod(self.folder, mode)
                    result = self.call(*command)
                    warnings = [
                        line for line in self.warnings_of(result) if self.folder in line
                    ]
                    self.assertEqual((result.code, bool(warnings)), (0, warned), result.err)
                    self.assertEqual(mode_of(self.folder), oct(mode))

    def test_a_change_is_synced_before_it_is_renamed_and_the_folder_after(self):
        steps = []

        def noting(name):
            function = getattr(os, name)

            def noted(*args, **options):
                kind = ""
                if name == "fsync":
                    mode = os.fstat(args[0]).st_mode
                    kind = " folder" if stat.S_ISDIR(mode) else " file"
                steps.append(name + kind)
                return function(*args, **options)

            return unittest.mock.patch.object(os, name, noted)

        with noting("fsync"), noting("replace"), noting("rename"), noting("write"):
            self.change_store()
        self.assertEqual(steps, ["write", "fsync file", "replace", "fsync folder"])

    def change_store(self, url="https://new.example.com", warn=None):
        store = llamactl.Store(self.folder, warn or self.fail)
        with store.change() as data:
            data["current_environment"] = url

    def test_a_change_that_fails_is_not_written(self):
        self.change_store()
        before = file_bytes(self.store_path)
        store = llamactl.Store(self.folder, self.fail)
        with self.assertRaises(KeyError), store.change() as data:
            data["current_environment"] = None
            raise KeyError("something of ours went wrong")
        self.assertEqual(file_bytes(self.store_path), before)
        self.assertEqual(self.files(), STORE_FILES)


# ========================================================================================
# disk: crashes, full and forbidden disks
# ========================================================================================


def die_at_line(number):
    """A trace function that kills this process at the NUMBERth line it executes of
    llamactl."""
    filename, left = llamactl.main.__code__.co_filename, [number]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != filename:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def killed_at_line(number, write):
    """Run WRITE in a child that dies at its NUMBERth line; whether it executed that
    many."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.settrace(die_at_line(number))
            write()
            sys.settrace(None)
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise AssertionError("the write failed by itself: status %d" % status)
    return False


def content_of(path):
    """The bytes of the file PATH; None where there is none."""
    return file_bytes(path) if os.path.exists(path) else None


class StoreCrash:
    """A change of profiles.json that dies; BEFORE is the file's content, None for no
    folder."""

    def __init__(self, home, before, linked=False, left_over=None):
        self.folder = os.path.join(home, "conf")
        self.before, self.linked, self.left_over = before, linked, left_over
        self.path = os.path.join(self.folder, "profiles.json")

    def prepare(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is None:
            return
        os.mkdir(self.folder, 0o700)
        real = os.path.join(self.folder, "profiles.json.real") if self.linked else self.path
        with open(real, "wb") as file:
            file.write(self.before)
        os.chmod(real, 0o600)
        if self.linked:
            os.symlink("profiles.json.real", self.path)
        if self.left_over is not None:
            with open(self.path + ".new", "wb") as file:
                file.write(self.left_over)
            os.chmod(self.path + ".new", 0o600)

    def add(self, name):
        with llamactl.Store(self.folder, lambda text: None).change() as data:
            data["current_environment"] = "https://%s.example.com" % name
            record = {"requires_auth": True, "current_profile": name, "profiles": {}}
            record["profiles"][name] = {"auth_type": "token", "api_key": KEY}
            data["environments"]["https://%s.example.com" % name] = record

    def write(self):
        self.add("written")

    def judge(self, after):
        """What the crash must have left, and what the next change makes of it."""
        content = content_of(self.path)
        aside = self.damaged_copies()
        if content not in (self.before, after) and (content, aside) != (
            None,
            [self.before],
        ):
            yield "neither the old nor the new content: %r" % content
            return
        for path, (mode, _, _, _) in tree(os.path.dirname(self.folder)).items():
            if int(mode, 8) & 0o077 and not os.path.islink(path):
                yield "%s can be read by others: %s" % (path, mode)
        expected = sorted(self.names(content) + ["next"])
        self.add("next")
        if self.names(content_of(self.path)) != expected:
            yield "the next change lost a neighbour: %s" % self.names(content_of(self.path))
        left = set(os.listdir(self.folder)) - set(STORE_FILES) - {"profiles.json.real.lock"}
        left -= {"profiles.json.real"} if self.linked else set()
        if any(".damaged-" not in name for name in left):
            yield "left over: %s" % sorted(left)
        if self.damaged_copies() != ([self.before] if self.is_damaged() else []):
            yield "the damaged content is lost, or there twice"
        if self.linked != os.path.islink(self.path):
            yield "the link is gone"

    def is_damaged(self):
        return self.before is not None and not self.before.endswith(b"}")

    def damaged_copies(self):
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return [
            file_bytes(os.path.join(self.folder, name))
            for name in sorted(names)
            if ".damaged-" in name
        ]

    def names(self, content):
        if content is None or content == self.before and self.is_damaged():
            return []
        environments = json.loads(content.decode())["environments"].values()
        return sorted(name for record in environments for name in record["profiles"])


class EnvCrash:
    """A change of a .env file that dies; BEFORE is its content, None for no folder."""

    def __init__(self, home, before, linked=False):
        self.folder = os.path.join(home, "project")
        self.path = os.path.join(self.folder, ".env")
        self.before, self.linked = before, linked

    def prepare(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is None:
            return
        os.mkdir(self.folder)
        real = os.path.join(self.folder, "real.env") if self.linked else self.path
        with open(real, "wb") as file:
            file.write(self.before)
        os.chmod(real, 0o640)
        if self.linked:
            os.symlink("real.env", self.path)

    def set(self, value):
        def edit(content):
            return llamactl.updated_env(
                content.decode(), {"LLAMA_CLOUD_API_KEY": value}
            ).encode()

        llamactl.rewrite_file(self.path, edit, True, lambda text: None)

    def write(self):
        self.set(KEY)

    def judge(self, after):
        content = content_of(self.path)
        if content not in (self.before, after):
            yield "neither the old nor the new content: %r" % content
            return
        allowed = 0o600 if self.before is None else 0o640
        for path, (mode, _, _, _) in tree(self.folder).items():
            if int(mode, 8) & 0o777 & ~allowed and not os.path.islink(path):
                yield "%s has mode %s" % (path, mode)
        self.set(OTHER_KEY)
        if content_of(self.path) != after.replace(KEY.encode(), OTHER_KEY.encode()):
            yield "the next change made %r" % content_of(self.path)
        if stat.S_IMODE(os.stat(self.path).st_mode) != allowed:
            yield "the next change made the mode %s" % mode_of(self.path)
        if sorted(os.listdir(self.folder)) != sorted([".env"] + ["real.env"] * self.linked):
            yield "left over: %s" % os.listdir(self.folder)


def crash_cases(home):
    record = {
        "requires_auth": True,
        "current_profile": "old",
        "profiles": {
            "old": {"auth_type": "token", "api_key": OTHER_KEY},
            "other": {"auth_type": "none"},
        },
    }
    url = "https://old.example.com"
    store = {"version": 1, "current_environment": url, "environments": {url: record}}
    before = json.dumps(store).encode()
    lines = b'# mine\nA=1\nLLAMA_CLOUD_API_KEY=old\nLAST="no newline"'
    return {
        "store": StoreCrash(home, before, left_over=before[:50]),
        "first store": StoreCrash(home, None),
        "damaged store": StoreCrash(home, before[:99], linked=True),
        "linked env": EnvCrash(home, lines, linked=True),
        "first env": EnvCrash(home, None),
    }


def crash_everywhere(home, kinds):
    """Kill each of KINDS at every line of its write; prints {kind: [kills, complaints]}
    as JSON.

    For a process of its own: it forks, which a process with threads must not.
    """
    os.umask(0)
    without_fsync().start()
    report = {}
    for kind, case in crash_cases(home).items():
        if kind not in kinds:
            continue
        case.prepare()
        case.write()
        after, kills, complaints = content_of(case.path), 0, []
        case.prepare()
        while killed_at_line(kills + 1, case.write):
            kills += 1
            complaints += ["line %d: %s" % (kills, text) for text in case.judge(after)]
            case.prepare()
        report[kind] = [kills, complaints]
        shutil.rmtree(case.folder, ignore_errors=True)
    print(json.dumps(report))


class CrashTest(DiskCase):
    SCRIPT = (
        "import sys; sys.path.insert(0, sys.argv[1]); import %s as tests; "
        "tests.crash_everywhere(sys.argv[2], sys.argv[3:])" % MODULE
    )

    def assert_survives(self, least, *kinds):
        command = [sys.executable, "-B", "-c", self.SCRIPT, HERE, self.home] + list(kinds)
        env = dict(os.environ, LLAMACTL_UNDER_TEST=PROGRAM)
        report = load(subprocess.check_output(command, env=env, cwd=self.home).decode())
        self.assertEqual(sorted(report), sorted(kinds))
        for kind, (kills, complaints) in report.items():
            self.assertEqual(complaints, [], kind)
            self.assertGreater(kills, least, kind)  # so many lines a write has at the least

    def test_killed_at_every_line_of_a_change_of_the_store(self):
        self.assert_survives(40, "store", "first store", "damaged store")

    def test_killed_at_every_line_of_a_change_of_a_env_file(self):
        self.assert_survives(30, "first env", "linked env")


class FullDiskTest(DiskCase):
    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()
        self.with_profile()
        self.call(*self.ALWAYS_WRITERS[1])
        self.call("environments", "use", self.url)

    def test_a_change_is_none_the_less_one_where_folders_cannot_be_synced(self):

        def as_a_file(path, flags):
            walked = os.O_DIRECTORY & flags
            return os.path.normpath(path) == self.folder and not walked

        for refused in (as_a_file, None):
            with self.subTest(opened=refused is None), contextlib.ExitStack() as stack:
                if refused:
                    stack.enter_context(opening_fails(refused, errno.EACCES))
                else:

                    def of_files(descriptor, fsync=os.fsync):
                        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                            raise OSError(errno.EINVAL, "no folder can be synced")
                        fsync(descriptor)

                    stack.enter_context(unittest.mock.patch.object(os, "fsync", of_files))
                result = self.call("environments", "use", llamactl.DEFAULT_API_URL)
                self.assertEqual(
                    (result.code, self.call("environments", "use", self.url).code),
                    (0, 0),
                    result.err,
                )
        self.cloud.reset()

    def test_the_disk_is_full_after_so_many_bytes(self):
        before, size = file_bytes(self.store_path), os.path.getsize(self.store_path)
        for limit in sorted({0, 1, size // 2, size - 1} | set(range(0, size, 97))):
            for command in self.ALWAYS_WRITERS[:1] + (
                ("auth", "token", "--api-key-file", "-"),
            ):
                with self.subTest(limit=limit, command=command), file_size_limit(limit):
                    result = self.call(*command, stdin=KEY.encode())
                    self.assert_one_error(result, 1, self.store_path)
                self.assertEqual(file_bytes(self.store_path), before)
                self.assertEqual(self.files(), STORE_FILES)
        self.assertEqual(self.call(*self.ALWAYS_WRITERS[0]).code, 0)

    def test_a_whole_process_on_a_full_disk(self):
        with open(os.path.join(self.home, ".env"), "w") as file:
            file.write("# a long line of mine\n" * 50)
        before = {path: entry[3] for path, entry in tree(self.home).items()}
        for blocks, command in ((0, self.ALWAYS_WRITERS[0]), (1, ("auth", "inject"))):
            with self.subTest(command):
                limited = [
                    "sh",
                    "-c",
                    'ulimit -f %d; exec "$@"' % blocks,
                    "sh",
                    sys.executable,
                ]
                process = subprocess.Popen(
                    limited + ["-B", PROGRAM] + list(command),
                    env=self.env,
                    cwd=self.home,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                out, err = process.communicate()
                self.assert_one_error(self.note(process.returncode, out, err))
                after = {path: entry[3] for path, entry in tree(self.home).items()}
                self.assertEqual(after, before)

    def test_a_full_disk_tears_no_env_file(self):
        path = os.path.join(self.home, ".env")
        content = b"# mine\n" * 30
        for before in (content, None):
            for limit in (0, 1, 50, len(content)):
                with self.subTest(limit=limit, before=before):
                    if before:
                        with open(path, "wb") as file:
                            file.write(before)
                    with file_size_limit(min(limit, 100) if before is None else limit):
                        result = self.call("auth", "inject", "--env-file", path)
                    self.assert_one_error(result, 1, path)
                    self.assertEqual(content_of(path), before)
                    self.assertEqual(
                        sorted(os.listdir(self.home)),
                        sorted(["conf"] + [".env"] * bool(before)),
                    )
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def test_nothing_is_asked_of_a_server_before_the_store_is_proven_writable(self):
        for command in (
            ("auth", "login"),
            ("auth", "login", "--start"),
            ("auth", "token", "--api-key-file", "-"),
        ):
            with self.subTest(command), file_size_limit(200):
                self.assert_one_error(self.call(*command, stdin=KEY.encode()))
                self.assertEqual(self.cloud.requests, [])

    def test_a_logout_that_cannot_be_stored_ends_nothing_on_the_server(self):
        login = self.log_in()
        self.cloud.reset()
        with file_size_limit(200):
            for command in (
                ("auth", "logout", "dev@example.com"),
                ("auth", "logout", "--all"),
                ("environments", "delete", self.url),
            ):
                with self.subTest(command):
                    self.assert_one_error(self.call(*command))
        self.assertEqual([r for r in self.cloud.requests if r.method != "GET"], [])
        self.assertEqual(self.profiles()["dev@example.com"], login)

    def test_nothing_is_asked_where_no_other_file_can_take_the_stores_place(self):
        self.log_in()
        before, mode = file_bytes(self.store_path), mode_of(self.store_path)
        self.cloud.reset()
        for number in (errno.EBUSY, errno.EPERM):
            failing = unittest.mock.patch.object(
                os, "replace", side_effect=OSError(number, "no")
            )
            for command in (
                ("auth", "login"),
                ("auth", "token", "--api-key-file", "-"),
                ("auth", "logout", "dev@example.com"),
                ("auth", "logout", "--all"),
            ):
                with self.subTest(command), failing:
                    self.assert_one_error(self.call(*command, stdin=KEY.encode()))
                    self.assertEqual((self.cloud.requests, self.files()), ([], STORE_FILES))
        inode = os.stat(self.store_path).st_ino
        llamactl.Store(self.folder, self.fail).check_writable()
        self.assertNotEqual(os.stat(self.store_path).st_ino, inode)
        self.assertEqual(
            (file_bytes(self.store_path), mode_of(self.store_path)), (before, mode)
        )
        os.unlink(self.store_path)
        llamactl.Store(self.folder, self.fail).check_writable()
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
        del self.env["LLAMACTL_CONFIG_DIR"]
        blocked = os.path.join(self.home, "file")
        with open(blocked, "w") as file:
            file.write("not a folder")
        unknown = unittest.mock.patch("pwd.getpwuid", side_effect=KeyError("uid not found"))
        nothing = contextlib.ExitStack()
        blocked_home = os.path.join(blocked, "home")
        cases = (
            (os.path.join(self.home, "missing", "deep"), nothing, False),
            (blocked_home, nothing, True),
            ("relative", nothing, True),
            (None, unknown, True),
        )
        for home, surroundings, fails in cases:
            self.env.pop("HOME", None)
            self.env.update({"HOME": home} if home else {})
            before = tree(self.home)
            with surroundings:
                for command in self.OFFLINE_READERS[:4] if home != blocked_home else ():
                    with self.subTest(home=home, command=command):
                        result = self.call(*command)
                        self.assertIn(result.code, (0, 4), result.err)
                        self.assertEqual(tree(self.home), before)
                with self.subTest(home=home, command="of variables"):
                    result = self.call("projects", "get", env=self.of_variables())
                    self.assertEqual(result.code, 0, result.err)
                for command in self.ALWAYS_WRITERS:
                    with self.subTest(home=home, command=command):
                        result = self.call(*command)
                        if fails:
                            self.assert_one_error(result)
                            self.assertEqual(tree(self.home), before)
                        else:
                            self.assertEqual(result.code, 0, result.err)


@contextlib.contextmanager
def mid_change(act):
    """ACT gets the path of each file that is written whole, and not yet in its place."""
    skip_without_paths_of_descriptors()
    really_sync = os.fsync

    def hooked(descriptor):
        path = full_path("", descriptor)
        if "new" in os.path.basename(path):
            act(path)
        really_sync(descriptor)

    with unittest.mock.patch.object(os, "fsync", hooked):
        yield


def failing(module, name, error):
    """MODULE's function NAME fails with ERROR, a name such as "EIO"."""
    number = getattr(errno, error)
    refusal = OSError(number, os.strerror(number))
    return unittest.mock.patch.object(module, name, side_effect=refusal)


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
        for path, entry in tree(self.home).items():
            if entry[3] is not None:
                os.unlink(path)
        self.with_profile()
        with open(self.env_file.path, "w") as file:
            file.write("A=1\n")
        os.chmod(self.env_file.path, 0o600)

    def rows(self, *lists):
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
        result = self.call(*change.command)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn(change.result.encode(), file_bytes(change.path))
        self.assertEqual(self.left(), self.LEFT)
        self.assertEqual(len(self.warnings_of(result)), warnings, result.err)
        return self.warnings_of(result)

    def assert_refused(self, change, names, content, *others):
        """An error NAMES something; CONTENT is in the file, and OTHERS lie beside it."""
        self.assert_one_error(self.call(*change.command), 1, names)
        self.assertEqual(file_bytes(change.path), content)
        self.assertEqual(self.left(), sorted(self.LEFT + list(others)))


class FileSystemsWithoutLocks(FileSystemCase):
    """Some network and FUSE mounts: a lock file with a random word in it stands in."""

    def setUp(self):
        super().setUp()
        patcher = failing(fcntl, "flock", "ENOLCK")
        self.flock = patcher.start()
        self.addCleanup(patcher.stop)
        self.patch(LOCK_TIMEOUT=0.3)

    def hold(self, change, word, seconds=0):
        """The lock file of another process with its WORD, made so many SECONDS ago."""
        with open(change.lock, "w") as file:
            file.write(word)
        made = os.stat(change.lock).st_mtime - seconds
        os.utime(change.lock, (made, made))

    def clock(self, shift):
        """The clock of this machine, not of the file system, is SHIFT seconds ahead."""
        real = time.time
        return unittest.mock.patch.object(time, "time", lambda: real() + shift)

    def assert_blocked(self, change, before, word):
        """The lock file with that WORD is named, and stays."""
        self.patch(LOCK_TIMEOUT=0.03)
        name = os.path.basename(change.lock)
        self.assert_refused(change, change.lock, before, name)
        self.assertEqual(file_bytes(change.lock), word.encode())

    def test_every_change_is_made_and_warned_about_once(self):
        commands = self.WRITERS + (
            ("auth", "login", "--project", "proj-alpha"),
            ("auth", "token", "--api-key", KEY, "--project", "proj-alpha"),
            ("auth", "logout", "--all"),
            self.env_file.command,
        )
        for error in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL"):
            for command in commands:
                with self.subTest(error, command=command):
                    self.start_anew()
                    self.flock.side_effect = OSError(getattr(errno, error), "no locks")
                    result = self.call(*command)
                    warnings = self.warnings_of(result)
                    self.assertEqual((result.code, len(warnings)), (0, 1), result.err)
                    self.assertIn("locks", warnings[0])
                    self.assertEqual(self.left(), self.LEFT)

    def test_a_lock_file_holds_a_new_word_that_the_new_file_s_name_carries(self):
        for (change,) in self.rows():
            seen = []

            def look(new, seen=seen, lock=change.lock):
                seen.append((new.rpartition(".")[2], content_of(lock), mode_of(lock)))

            for turn in ("first", "second"):
                with self.case(change, turn), mid_change(look):
                    self.assert_made(change, 1)
            words = {ending for ending, _, _ in seen}
            self.assertGreater(len(words), 1)
            self.assertEqual(seen, [(each[0], each[0].encode(), "0o600") for each in seen])
            self.assertEqual(len(words), len(seen))

    def test_one_younger_than_a_minute_blocks_whatever_time_it_is_here(self):
        for change, seconds, shift in self.rows((0, 50), (0, 7200, -7200)):
            with self.case(change, seconds, shift) as before, self.clock(shift):
                self.hold(change, "alive", seconds)
                with failing(os, "replace", "EIO"):  # it is not even put aside
                    self.assert_blocked(change, before, "alive")

    def test_an_older_one_is_taken_over_whatever_time_it_is_here(self):
        for change, seconds, shift in self.rows((70, 100000), (0, 7200, -7200)):
            with self.case(change, seconds, shift), self.clock(shift):
                self.hold(change, "dead", seconds)
                self.assert_made(change, 1)

    def test_one_that_goes_meanwhile_is_waited_for(self):
        for (change,) in self.rows():
            pauses = []

            def let_go(seconds, pauses=pauses, lock=change.lock):
                pauses.append(seconds)
                os.unlink(lock)

            with self.case(change), unittest.mock.patch.object(time, "sleep", let_go):
                self.hold(change, "alive")
                self.assert_made(change, 1)
                self.assertEqual(len(pauses), 1)

    def test_that_of_a_process_that_took_over_first_is_put_back(self):
        skip_without_paths_of_descriptors()
        really_replace = os.replace
        for (change,) in self.rows():
            seen = []

            def replace(source, target, seen=seen, change=change, **folders):
                path = full_path(source, folders["src_dir_fd"])
                if path == change.lock and not seen:
                    seen.append(file_bytes(path))
                    self.hold(change, "faster")
                really_replace(source, target, **folders)

            patched = unittest.mock.patch.object(os, "replace", replace)
            with self.case(change) as before, patched:
                self.hold(change, "dead", 120)
                self.assert_blocked(change, before, "faster")
                self.assertEqual(seen, [b"dead"])

    def test_a_process_that_slept_until_it_was_taken_over_changes_nothing(self):
        for change, word in self.rows(("other", None)):

            def take_over(_, change=change, word=word):
                os.unlink(change.lock)
                with open(change.path, "wb") as file:
                    file.write(b"OTHERS=1\n")
                if word:  # else that process is at its end
                    self.hold(change, word)

            others = [os.path.basename(change.lock)] if word else []
            with self.case(change, word), mid_change(take_over):
                self.assert_refused(change, change.path, b"OTHERS=1\n", *others)
                self.assertEqual(content_of(change.lock), word and word.encode())

    def test_a_change_that_fails_or_is_interrupted_leaves_no_lock_file(self):
        ends = ((OSError(errno.ENOSPC, "full"), 1), (KeyboardInterrupt(), 130))
        for change, (error, code) in self.rows(ends):
            act = unittest.mock.Mock(side_effect=error)
            with self.case(change, code) as before, mid_change(act):
                self.assertEqual(self.call(*change.command).code, code)
                self.assertEqual(self.left(), self.LEFT)
                self.assertEqual(file_bytes(change.path), before)

    def test_eight_processes_at_once_lose_nothing(self):
        script = (
            "import errno, fcntl, sys\n"
            "def flock(descriptor, operation):\n"
            "    raise OSError(errno.ENOLCK, 'no locks')\n"
            "fcntl.flock = flock\n" + AS_MAIN + "sys.exit(status)\n"
        )
        command = ("auth", "token", "--no-verify", "--project", "proj-alpha", "--api-key")
        processes = []
        for number in range(8):
            argv = command + ("llx-CANARY-0123456789abcdef-%04d" % number,)
            process = self.spawn(*argv, python=("-c", script), stdin=subprocess.DEVNULL)
            self.addCleanup(process.kill)
            processes.append(process)
        for process in processes:
            out, err = process.communicate(timeout=60)
            result = self.note(process.returncode, out, err)
            self.assertEqual((result.code, len(self.warnings_of(result))), (0, 1), err)
        names = ["llx-%04d" % number for number in range(8)]
        self.assertEqual(sorted(self.profiles()), names + ["main"])
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

        with contextlib.ExitStack() as stack:
            stack.enter_context(unittest.mock.patch.object(os, "open", opened))
            stack.enter_context(unittest.mock.patch("builtins.open", mounts))
            stack.enter_context(failing(os, "fchmod", error))
            stack.enter_context(failing(os, "chmod", error))
            yield

    ERRORS = ("EPERM", "ENOTSUP")

    def assert_made_with_mode(self, change, error, mode, is_new, warnings=0):
        os.chmod(change.path, mode)
        if is_new:
            os.unlink(change.path)
        with self.modes(error, mode):
            for warning in self.assert_made(change, warnings):
                self.assertIn("others can read " + change.path, warning)
        self.assertEqual(mode_of(change.path), oct(mode))

    def test_a_change_is_made_where_nobody_else_can_read_the_file(self):
        for change, *row in self.rows(self.ERRORS, (0o600, 0o700), (True, False)):
            with self.case(change, *row):
                self.assert_made_with_mode(change, *row)

    def test_a_change_of_a_store_that_others_can_read_is_made_and_warned_about(self):
        for row in itertools.product(self.ERRORS, (0o604, 0o755), (True, False)):
            with self.case(self.store, *row):
                self.assert_made_with_mode(self.store, *row, warnings=1)

    def test_a_file_system_that_cannot_sync_stops_nothing(self):
        for change, error in self.rows(("EINVAL", "ENOTSUP", "ENOSYS")):
            with self.case(change, error), failing(os, "fsync", error):
                self.assert_made(change)

    def test_one_without_locks_modes_and_syncs_stops_nothing(self):
        for (change,) in self.rows():
            with self.case(change), contextlib.ExitStack() as stack:
                stack.enter_context(failing(fcntl, "flock", "ENOSYS"))
                stack.enter_context(failing(os, "fsync", "ENOSYS"))
                stack.enter_context(self.modes("ENOSYS", 0o600))
                self.assert_made(change, 1)

    def test_a_sync_that_fails_stops_a_change(self):
        for change, error in self.rows(("EIO", "ENOSPC", "EDQUOT")):
            with self.case(change, error) as before, failing(os, "fsync", error):
                self.assert_refused(change, change.path, before)


# ========================================================================================
# disk: two accounts and root: nobody's key in, or from, somebody else's file
# ========================================================================================

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
ANN, MALLORY = 54321, 54322  # uids that nobody has
set_groups = getattr(os, "setgroups", None)  # as it is where a test replaces it
ACL = "system.posix_acl_access"


def acl(*entries):
    """A POSIX ACL as the kernel stores it; an entry is (tag, permissions, uid or gid)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


# its owner rw, the user MALLORY r, the group nothing, the mask r, others nothing
SHARED_WITH_MALLORY = acl(
    (0x01, 6, 0xFFFFFFFF),
    (0x02, 4, MALLORY),
    (0x04, 0, 0xFFFFFFFF),
    (0x10, 4, 0xFFFFFFFF),
    (0x20, 0, 0xFFFFFFFF),
)


class TwoAccounts(DiskCase):
    """Folders and files of several users; commands run as any of them."""

    def setUp(self):
        if not ROOT:
            self.skipTest("needs root, to be two users")
        super().setUp()
        self.start_anew()

    # what a child that is not root could not import: the interpreter may be root's alone
    PRELOADED = ("difflib", "encodings.utf_8_sig", "getpass", "pwd", "shlex", "traceback")

    def start_anew(self):
        """An empty place for the next case, with the store's folder in it."""
        self.place = tempfile.mkdtemp(dir=self.home)
        for folder in (self.home, self.place):
            os.chmod(folder, 0o755)
        self.folder = os.path.join(self.place, "conf")
        self.env["LLAMACTL_CONFIG_DIR"] = self.folder

    def make(self, path, owner=0, mode=0o600, content=None, target=None, group=None):
        """A file with CONTENT, a link to TARGET, else a folder, of OWNER's."""
        path = os.path.join(self.place, path)
        if target is not None:
            os.symlink(os.path.join(self.place, target), path)
        elif content is None:
            os.mkdir(path)
        else:
            with open(path, "wb") as file:
                file.write(content)
        os.chown(path, owner, owner if group is None else group, follow_symlinks=False)
        if target is None:
            os.chmod(path, mode)
        return path

    def make_two(self, path, other, owner):
        """A file of OWNER's that has two names."""
        os.link(self.make(path, owner, 0o600, b"A=1\n"), os.path.join(self.place, other))

    def call_as(self, uid, *argv, gid=None, cwd=None, **options):
        """The command run as UID, with GID and no other groups, by a process of its own."""
        for module in self.PRELOADED:
            importlib.import_module(module)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.chdir(cwd or self.place)
                set_groups([])
                os.setresgid(*[uid if gid is None else gid] * 3)
                os.setresuid(uid, uid, uid)
                result = list(self.call(*argv, **options))
            except BaseException as error:
                result = [-1, "", repr(error)]
            os.write(write, json.dumps(result).encode("ascii"))
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with open(read, "rb") as pipe:
            result = Result(*load(pipe.read().decode("ascii")))
        return self.note(result.code, result.out.encode(), result.err.encode())

    def owner(self, path):
        status = os.lstat(os.path.join(self.place, path))
        return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)

    def refused(self, result, *names):
        """One error line with NAMES, and no key in any file but the store."""
        self.assert_one_error(result, 1)
        for name in names:
            self.assertIn(name, result.err)
        for path, (_, _, _, content) in tree(self.home).items():
            if "profiles.json" not in path and isinstance(content, bytes):
                self.assertNotIn(KEY.encode(), content, path)


class WhoseEnv(TwoAccounts):
    """behaviour.md, .env, "Whose file"."""

    INJECT = ("auth", "inject")

    def setUp(self):
        super().setUp()
        self.env.update(self.of_variables_alone())

    def of_variables_alone(self):
        return {"LLAMA_CLOUD_API_KEY": KEY, "LLAMA_AGENTS_PROJECT_ID": "proj-alpha"}

    def test_root_in_a_users_folder_writes_only_what_it_names(self):
        folder = self.make("m", MALLORY, 0o755)
        path = os.path.join(folder, ".env")
        for before in (None, b"A=1\n"):
            if before:
                self.make("m/.env", MALLORY, content=before)
            result = self.call_as(0, *self.INJECT, cwd=folder)
            self.refused(result, "belongs to uid %d" % MALLORY, "--env-file " + path)
            self.assertEqual(content_of(path), before)

    def test_root_deploys_for_a_service_user(self):
        """What root names in a user's folder becomes that user's, and is said to."""
        folder = self.make("srv", MALLORY, 0o755)
        path = os.path.join(folder, ".env")
        for before in (None, b"A=1\n"):
            with self.subTest(before=before):
                if before:
                    self.make("srv/.env", MALLORY, content=before)
                result = self.call_as(0, *self.INJECT, "--env-file", path)
                self.assertEqual((result.code, result.out), (0, ""), result.err)
                self.assertIn("%s, owned by uid %d written" % (path, MALLORY), result.err)
                self.assertEqual(self.owner("srv/.env"), (MALLORY, MALLORY, 0o600))
                self.assertIn(KEY.encode(), file_bytes(path))
                self.assertEqual(os.listdir(folder), [".env"])
                os.unlink(path)
        deep = os.path.join(folder, "new", "app.env")
        self.assertEqual(self.call_as(0, *self.INJECT, "--env-file", deep).code, 0)
        self.assertEqual(self.owner("srv/new"), (MALLORY, MALLORY, 0o700))

    def test_root_names_a_file_in_a_users_folder_that_is_not_that_users_alone(self):
        for name, make in (
            ("root's own file", lambda: self.make("m/.env", 0, 0o644, b"log\n")),
            ("others can read it", lambda: self.make("m/.env", MALLORY, 0o644, b"A=1\n")),
            ("ann's", lambda: self.make("m/.env", ANN, 0o600, b"A=1\n")),
            ("two names", lambda: self.make_two("m/.env", "m/x", MALLORY)),
            ("a link to root's", lambda: self.make("m/.env", MALLORY, target="root.txt")),
        ):
            folder = self.make("m", MALLORY, 0o755)
            path = os.path.join(folder, ".env")
            self.make("root.txt", 0, 0o600, b"root's\n")
            with self.subTest(name):
                make()
                before = file_bytes(path)
                self.refused(self.call_as(0, *self.INJECT, "--env-file", path))
                self.assertEqual(file_bytes(path), before)
            self.start_anew()

    def test_root_in_a_folder_of_its_own_that_is_everybodys(self):
        """What another user planted there is refused, though root names it in full."""
        for name, make in (
            ("a file", lambda: self.make("tmp/.env", MALLORY, 0o600, b"A=1\n")),
            ("a link", lambda: self.make("tmp/.env", MALLORY, target="m/theirs")),
            ("a link to the folder", lambda: self.make("tmp/d", MALLORY, target="m")),
        ):
            for mode in (0o1777, 0o777):
                with self.subTest(name, mode=oct(mode)):
                    folder = self.make("tmp", 0, mode)
                    self.make("m", MALLORY, 0o755)
                    self.make("m/.env", MALLORY, 0o600, b"A=1\n")
                    make()
                    below = "d/.env" if name.endswith("folder") else ".env"
                    path = os.path.join(folder, below)
                    result = self.call_as(0, *self.INJECT, "--env-file", path)
                    self.refused(result, "belongs to uid %d" % MALLORY)
                self.start_anew()

    def test_root_in_a_folder_of_its_own(self):
        """A service user's file is written where it is named; else nobody's but root's."""
        folder = self.make("etc", 0, 0o755)
        path = self.make("etc/.env", MALLORY, 0o640, b"A=1\n")
        self.refused(self.call_as(0, *self.INJECT, cwd=folder), "--env-file " + path)
        result = self.call_as(0, *self.INJECT, "--env-file", path)
        self.assertEqual(result.code, 0, result.err)
        self.assertEqual(self.owner("etc/.env"), (MALLORY, MALLORY, 0o640))
        self.assertIn(KEY.encode(), file_bytes(path))

    def test_a_user_in_a_folder_of_others(self):
        for name, folder_owner, folder_mode, make in (
            (
                "a file of mallory's",
                0,
                0o1777,
                lambda: self.make("d/.env", MALLORY, 0o666, b"A=1\n"),
            ),
            (
                "a lock of mallory's",
                0,
                0o1777,
                lambda: self.make("d/.env.llamactl-lock", MALLORY, 0o666, b""),
            ),
            (
                "a link of mallory's",
                0,
                0o1777,
                lambda: self.make("d/.env", MALLORY, target="there"),
            ),
            (
                "mallory's folder and file",
                MALLORY,
                0o777,
                lambda: self.make("d/.env", MALLORY, 0o666, b"A=1\n"),
            ),
            (
                "ann's own file, which others can read",
                MALLORY,
                0o777,
                lambda: self.make("d/.env", ANN, 0o644, b"A=1\n"),
            ),
        ):
            with self.subTest(name):
                folder = self.make("d", folder_owner, folder_mode)
                make()
                for argv in (self.INJECT, self.INJECT + ("--env-file", folder + "/.env")):
                    result = self.call_as(ANN, *argv, cwd=folder)
                    self.refused(result)
                    if "mallory" in name:
                        self.assertRegex(result.err, "belongs to uid %d" % MALLORY)
                        self.assertIn(
                            "hint: llamactl auth inject --env-file -\n", result.err
                        )
            self.start_anew()

    def test_a_user_in_a_shared_folder_with_a_private_file(self):
        for owner, mode in ((0, 0o1777), (MALLORY, 0o777)):
            folder = self.make("d", owner, mode)
            for _ in range(2):
                self.assertEqual(self.call_as(ANN, *self.INJECT, cwd=folder).code, 0)
                self.assertEqual(self.owner("d/.env"), (ANN, ANN, 0o600))
            self.start_anew()

    def test_no_file_of_a_stranger_is_written_in_place(self):
        """Nor one that took the place of the file that was read."""
        folder = self.make("d", ANN, 0o555)  # takes no new file
        path = self.make("d/.env", ANN, 0o600, b"A=1\n")
        result = self.call_as(ANN, *self.INJECT, cwd=folder)
        self.assertEqual(result.code, 0, result.err)
        self.assertIn("in place", result.err)
        os.unlink(path)
        self.make("d/.env", 0, 0o666, b"A=1\n")
        os.link(path, os.path.join(self.place, "second"))
        self.refused(self.call_as(ANN, *self.INJECT, cwd=folder))

    def test_a_link_is_named(self):
        """A clone may hold `.env -> ../.bashrc`: its user must see that."""
        self.make("clone", ANN, 0o755)
        self.make("my.env", ANN, 0o600, b"# mine\n")
        self.make("clone/.env", ANN, target="my.env")
        os.chown(self.place, ANN, ANN)
        result = self.call_as(ANN, *self.INJECT, cwd=os.path.join(self.place, "clone"))
        self.assertEqual(result.code, 0, result.err)
        self.assertIn(".env (a link to %s/my.env) written" % self.place, result.err)

    def test_openshift(self):
        """A random uid of group 0 in folders that the image gave to that group."""
        folder = self.make("app", 1001, 0o775, group=0)
        for before in (None, b"A=1\n"):
            if before:
                self.make("app/.env", 1001, 0o660, before, group=0)
            result = self.call_as(ANN, *self.INJECT, cwd=folder, gid=0)
            self.assertEqual((result.code, "warning" in result.err), (0, False), result.err)
            self.assertIn(KEY.encode(), file_bytes(folder + "/.env"))
            os.unlink(folder + "/.env")

    def test_acl_and_attributes_are_kept(self):
        folder = self.make("d", ANN, 0o755)
        path = self.make("d/.env", ANN, 0o600, b"A=1\n")
        try:
            os.setxattr(path, ACL, SHARED_WITH_MALLORY)
            os.setxattr(path, "user.note", b"mine")
        except OSError as error:
            self.skipTest("no ACL on this file system: %s" % error)
        before = self.owner("d/.env")
        self.assertEqual(self.call_as(ANN, *self.INJECT, cwd=folder).code, 0)
        self.assertEqual(os.getxattr(path, ACL), SHARED_WITH_MALLORY)
        self.assertEqual(os.getxattr(path, "user.note"), b"mine")
        self.assertEqual(self.owner("d/.env"), before)

    def test_an_acl_that_cannot_be_kept_gives_nobody_access(self):
        folder = self.make("d", ANN, 0o755)
        path = self.make("d/.env", ANN, 0o600, b"A=1\n")
        try:
            os.setxattr(path, ACL, SHARED_WITH_MALLORY)
        except OSError as error:
            self.skipTest("no ACL on this file system: %s" % error)
        with unittest.mock.patch.object(
            os, "setxattr", side_effect=OSError(errno.EPERM, "no")
        ):
            self.assertEqual(self.call_as(ANN, *self.INJECT, cwd=folder).code, 0)
        self.assertEqual(self.owner("d/.env")[2], 0o600)
        self.assertNotIn(ACL, os.listxattr(path))

    def test_an_acl_that_the_folder_gives_is_not_taken(self):
        folder = self.make("d", ANN, 0o755)
        path = self.make("d/.env", ANN, 0o640, b"A=1\n")
        entries = (
            (0x01, 7, 0xFFFFFFFF),
            (0x02, 7, MALLORY),
            (0x04, 0, 0xFFFFFFFF),
            (0x10, 7, 0xFFFFFFFF),
            (0x20, 0, 0xFFFFFFFF),
        )
        try:
            os.setxattr(folder, "system.posix_acl_default", acl(*entries))
        except OSError as error:
            self.skipTest("no ACL on this file system: %s" % error)
        self.assertEqual(self.call_as(ANN, *self.INJECT, cwd=folder).code, 0)
        self.assertNotIn(ACL, os.listxattr(path))
        self.assertEqual(self.owner("d/.env"), (ANN, ANN, 0o640))


class WhoseStore(TwoAccounts):
    """behaviour.md, "Whose files"."""

    ADD = ("environments", "add", "https://added.example", "--no-verify")
    ALL = (
        ("auth", "get"),
        ("config",),
        ADD,
        ("auth", "use", "main"),
        ("auth", "logout", "--all"),
        ("auth", "inject", "--env-file", "-"),
    )

    def store_of(self, key=KEY):
        record = {
            "requires_auth": True,
            "current_profile": "main",
            "profiles": {"main": {"auth_type": "token", "api_key": key, "project_id": "p"}},
        }
        data = {
            "version": 1,
            "current_environment": "https://m.example",
            "environments": {"https://m.example": record},
        }
        return json.dumps(data).encode("ascii")

    def test_a_strangers_store_is_refused(self):
        """Its folder, its file, its lock, or a link to them: nothing is read or changed."""
        for name, make in (
            (
                "folder",
                lambda: (
                    self.make("conf", MALLORY, 0o777),
                    self.make("conf/profiles.json", ANN, 0o600, self.store_of()),
                ),
            ),
            (
                "file",
                lambda: (
                    self.make("conf", 0, 0o1777),
                    self.make("conf/profiles.json", MALLORY, 0o666, self.store_of()),
                ),
            ),
            (
                "damaged file",
                lambda: (
                    self.make("conf", ANN, 0o777),
                    self.make("conf/profiles.json", MALLORY, 0o666, b"{"),
                ),
            ),
            (
                "lock",
                lambda: (
                    self.make("conf", ANN, 0o777),
                    self.make("conf/profiles.json.lock", MALLORY, 0o666, b""),
                ),
            ),
            (
                "link to the file",
                lambda: (
                    self.make("conf", 0, 0o1777),
                    self.make("profiles.json", ANN, 0o600, self.store_of()),
                    self.make("conf/profiles.json", MALLORY, target="profiles.json"),
                ),
            ),
            (
                "link to the folder",
                lambda: (
                    self.make("there", ANN, 0o700),
                    self.make("conf", MALLORY, target="there"),
                ),
            ),
        ):
            make()
            before = {path: entry[0::3] for path, entry in tree(self.place).items()}
            for command in self.ALL:
                with self.subTest(name, command=command):
                    result = self.call_as(ANN, *command)
                    self.assert_one_error(result, 1, "belongs to uid %d" % MALLORY)
                    self.assertIn("hint: run llamactl as that user, or export", result.err)
                    after = {path: entry[0::3] for path, entry in tree(self.place).items()}
                    self.assertEqual(after, before)
            with self.subTest(name, command="of variables"):
                result = self.call_as(
                    ANN,
                    "config",
                    env={"LLAMA_CLOUD_API_KEY": KEY, "LLAMA_AGENTS_PROJECT_ID": "p"},
                )
                self.assertEqual(result.code, 0, result.err)
            self.start_anew()

    def test_root_with_a_users_home_works_as_that_user(self):
        """Who would else be locked out."""
        home = self.make("ann", ANN, 0o700)
        env = {"HOME": home, "LLAMACTL_CONFIG_DIR": ""}
        for _ in range(2):
            result = self.call_as(0, *self.ADD, env=env)
            self.assertEqual(result.code, 0, result.err)
            self.assertIn("warning: %s" % home, result.err)
            self.assertIn("belongs to uid %d" % ANN, result.err)
            for path, mode in (
                ("", 0o700),
                ("/.config", 0o700),
                ("/.config/llamactl", 0o700),
                ("/.config/llamactl/profiles.json", 0o600),
            ):
                self.assertEqual(self.owner("ann" + path), (ANN, ANN, mode), path)
        self.assertEqual(self.call_as(ANN, *self.ADD, env=env).code, 0)

    def test_root_follows_no_link_of_a_user_to_another_file(self):
        for name, make in (
            (
                "a file of root's",
                lambda: (
                    self.make("ann/.config/llamactl", ANN, 0o700),
                    self.make("secret", 0, 0o600, b"root's"),
                    self.make("ann/.config/llamactl/profiles.json", ANN, target="secret"),
                ),
            ),
            (
                "a file of root's that all can read",
                lambda: (
                    self.make("ann/.config/llamactl", ANN, 0o700),
                    self.make("secret", 0, 0o644, b"root's"),
                    self.make("ann/.config/llamactl/profiles.json", ANN, target="secret"),
                ),
            ),
            (
                "root's own store",
                lambda: (
                    self.make("ann/.config/llamactl", ANN, 0o700),
                    self.make("secret", 0, 0o644, self.store_of("key-of-root")),
                    self.make("ann/.config/llamactl/profiles.json", ANN, target="secret"),
                ),
            ),
            (
                "a file of root's beside their own",
                lambda: (
                    self.make("ann/.config/llamactl", ANN, 0o700),
                    self.make("ann/secret", 0, 0o644, self.store_of("key-of-root")),
                    self.make(
                        "ann/.config/llamactl/profiles.json", ANN, target="ann/secret"
                    ),
                ),
            ),
            (
                "a folder of root's",
                lambda: (
                    self.make("roots", 0, 0o755),
                    self.make("ann/.config/llamactl", ANN, target="roots"),
                ),
            ),
            (
                "a file of mallory's",
                lambda: (
                    self.make("ann/.config/llamactl", ANN, 0o700),
                    self.make("secret", MALLORY, 0o666, b"mallory's"),
                    self.make("ann/.config/llamactl/profiles.json", ANN, target="secret"),
                ),
            ),
        ):
            home = self.make("ann", ANN, 0o755)
            self.make("ann/.config", ANN, 0o755)
            make()
            before = {path: entry[0::3] for path, entry in tree(self.place).items()}
            for command in (("auth", "get"), self.ADD, ("auth", "logout", "--all")):
                with self.subTest(name, command=command):
                    result = self.call_as(
                        0, *command, env={"HOME": home, "LLAMACTL_CONFIG_DIR": ""}
                    )
                    self.assert_one_error(result, 1)
                    after = {path: entry[0::3] for path, entry in tree(self.place).items()}
                    self.assertEqual(after, before)
            self.start_anew()

    def test_where_root_cannot_become_the_user(self):
        home = self.make("ann", ANN, 0o700)
        for name in ("setgroups", "setegid", "seteuid"):
            with self.subTest(name):
                real = getattr(os, name)

                def fail(value, real=real):
                    if value in ([], ANN):
                        raise OSError(errno.EPERM, "Operation not permitted")
                    real(value)

                with unittest.mock.patch.object(os, name, fail):
                    result = self.call_as(
                        0, *self.ADD, env={"HOME": home, "LLAMACTL_CONFIG_DIR": ""}
                    )
                self.assert_one_error(result, 1, "whom root cannot become")
                self.assertEqual(os.listdir(home), [])

    def test_what_must_go_on_working(self):
        for name, uid, gid, make in (
            (
                "a random uid of group 0",
                ANN,
                0,
                lambda: (
                    self.make("conf", 1001, 0o775, group=0),
                    self.make("conf/profiles.json", 1001, 0o660, self.store_of(), group=0),
                ),
            ),
            (
                "an image with root's store",
                ANN,
                ANN,
                lambda: (
                    self.make("conf", 0, 0o755),
                    self.make("conf/profiles.json", 0, 0o644, self.store_of()),
                ),
            ),
            (
                "a link of a dotfile manager",
                ANN,
                ANN,
                lambda: (
                    self.make("dotfiles", ANN, 0o700),
                    self.make("dotfiles/profiles.json", ANN, 0o600, self.store_of()),
                    self.make("conf", ANN, target="dotfiles"),
                ),
            ),
            (
                "a mounted Secret",
                ANN,
                ANN,
                lambda: (
                    self.make("conf", 0, 0o755),
                    self.make("conf/..2024", 0, 0o755),
                    self.make("conf/..2024/profiles.json", 0, 0o644, self.store_of()),
                    self.make("conf/..data", 0, target="conf/..2024"),
                    self.make("conf/profiles.json", 0, target="conf/..data/profiles.json"),
                ),
            ),
        ):
            make()
            with self.subTest(name):
                for command in (("auth", "get"), ("config", "-o", "json")):
                    result = self.call_as(uid, *command, gid=gid)
                    self.assertEqual((result.code, result.err), (0, ""))
                    self.assertIn("https://m.example", result.out)
            self.start_anew()

    def test_a_group_with_members_counts(self):
        folder = self.make("conf", ANN, 0o700)
        path = self.make("conf/profiles.json", ANN, 0o600, self.store_of())
        for group, mode, warned in (
            (MALLORY, 0o640, True),
            (MALLORY, 0o660, True),
            (ANN, 0o660, False),
            (0, 0o640, False),
            (ANN, 0o604, True),
            (ANN, 0o600, False),
        ):
            with self.subTest(group=group, mode=oct(mode)):
                os.chown(path, ANN, group)
                os.chmod(path, mode)
                result = self.call_as(ANN, "auth", "get")
                self.assertEqual("run: chmod 600 " + path in result.err, warned, result.err)
        for group, mode, warned in (
            (MALLORY, 0o770, True),
            (ANN, 0o770, False),
            (0, 0o770, False),
            (ANN, 0o702, True),
        ):
            with self.subTest(group=group, mode=oct(mode)):
                os.chown(folder, ANN, group)
                os.chmod(folder, mode)
                result = self.call_as(ANN, "auth", "get")
                self.assertEqual(
                    "run: chmod go-w " + folder in result.err, warned, result.err
                )


class MountedHome(TwoAccounts):
    """A user's folder, mounted where only root may go."""

    def test_root_works_there_as_that_user(self):
        closed = self.make("root", 0, 0o700)
        self.folder = self.make("root/conf", ANN, 0o700)
        self.env["LLAMACTL_CONFIG_DIR"] = self.folder
        self.store_path = os.path.join(self.folder, "profiles.json")
        self.cloud = self.cloud_server()
        self.with_profile()
        os.chown(self.store_path, ANN, ANN)
        for argv in (
            ("auth", "use", "main"),
            ("auth", "token", "--api-key", KEY, "--project", "Beta"),
            ("environments", "use", self.url),
            ("auth", "get"),
        ):
            with self.subTest(argv):
                result = self.call_as(0, *argv)
                self.assertEqual(result.code, 0, result.err)
                self.assertIn("working there as uid %d" % ANN, result.err)
                self.assertEqual(os.stat(self.store_path).st_uid, ANN)
        os.chmod(self.store_path, 0o666)
        self.assertIn("others can write to", self.call_as(0, "auth", "get").err)
        self.make("root/conf/broken", ANN, 0o600, b"{")
        os.rename(os.path.join(self.folder, "broken"), self.store_path)
        moved = self.call_as(0, "environments", "use", DEFAULT_URL)
        self.assertEqual(moved.code, 0, moved.err)
        self.assertIn("was damaged; it is kept as", moved.err)
        self.assertEqual(stat.S_IMODE(os.stat(closed).st_mode), 0o700)

    def test_a_file_that_others_can_read_takes_the_place_of_one_that_they_cannot(self):
        """Mallory may write to the folder, and exchanges two of ann's files."""
        folder = self.make("team", 0, 0o777)
        path = self.make("team/.env", ANN, 0o600, b"A=1\n")
        readable = self.make("team/README", ANN, 0o644, b"read me\n")
        self.env.update({"LLAMA_CLOUD_API_KEY": KEY, "LLAMA_AGENTS_PROJECT_ID": "p"})
        really_lock = llamactl.try_lock

        def exchange(descriptor):
            os.rename(path, path + ".private")
            os.rename(readable, path)
            return really_lock(descriptor)

        for before in (True, False):
            with self.subTest(before=before):
                if not before:
                    os.unlink(path)
                    self.make("team/README", ANN, 0o644, b"read me\n")
                    os.rename(path + ".private", path + ".gone")
                    rename = lambda _: os.rename(readable, path) or really_lock(_)  # noqa: E731
                hook = exchange if before else rename
                with unittest.mock.patch.object(llamactl, "try_lock", hook):
                    result = self.call_as(ANN, "auth", "inject", cwd=folder)
                self.refused(result, "others put another file in the place")
                self.assertEqual(file_bytes(path), b"read me\n")


class StrangersOfficialStore(TwoAccounts):
    def test_what_belongs_to_another_user_is_not_imported(self):
        for name in ("profiles.db", "profiles.db-wal", "profiles.db-shm", "a link"):
            with self.subTest(name):
                self.make("conf", 0, 0o1777)
                path = os.path.join(self.folder, "profiles.db")
                make_official_store(path)
                os.chown(path, ANN, ANN)
                if name == "a link":
                    os.rename(path, path + ".there")
                    os.symlink(path + ".there", path)
                elif name != "profiles.db":
                    self.make("conf/" + name, MALLORY, 0o644, b"")
                os.chown(
                    os.path.join(self.folder, name if "." in name else "profiles.db"),
                    MALLORY,
                    MALLORY,
                    follow_symlinks=False,
                )
                result = self.call_as(ANN, "auth", "import", "--from-official")
                self.refused(result, "belongs to uid %d" % MALLORY)
            self.start_anew()


class StrangerBySeam(DiskCase):
    """Without root: we are somebody else than who made the files."""

    def setUp(self):
        super().setUp()
        if not hasattr(os, "geteuid"):
            self.skipTest("there are no owners here")
        self.cloud = self.cloud_server()
        self.with_profile()
        real = os.geteuid()
        for name in ("geteuid", "getegid"):
            patcher = unittest.mock.patch.object(os, name, return_value=real + 4242)
            self.addCleanup(patcher.stop)
            patcher.start()

    def test_store_and_env(self):
        if ROOT:
            self.skipTest("root's files are everybody's")
        before = tree(self.home)
        for command in (("auth", "get"), ("projects", "get"), self.ALWAYS_WRITERS[0]):
            self.assert_one_error(self.call(*command), 1, "belongs to")
        path = os.path.join(self.home, ".env")
        with open(path, "w") as file:
            file.write("A=1\n")
        before = tree(self.home)
        result = self.call("auth", "inject", "--env-file", path, env=self.of_variables())
        self.assert_one_error(result, 1, "belongs to")
        self.assertEqual((tree(self.home), self.cloud.requests), (before, []))


# ========================================================================================
# disk: the .env, written
# ========================================================================================


class EnvFile(Case):
    """`auth inject`: what happens to the file."""

    def setUp(self):
        super().setUp()
        self.url = "https://api.example.test"
        self.with_profile()
        self.path = os.path.join(self.home, "app.env")
        self.lines = [
            "LLAMA_CLOUD_API_KEY=" + KEY,
            "LLAMA_CLOUD_BASE_URL=" + self.url,
            "LLAMA_AGENTS_PROJECT_ID=proj-alpha",
        ]
        self.text = "\n".join(self.lines) + "\n"

    def test_a_lock_that_its_last_holder_removed_is_taken_anew(self):
        lock, still_there, try_lock = self.path + ".llamactl-lock", [], llamactl.try_lock

        def taken(descriptor):
            if (
                not still_there
            ):  # the last holder leaves between our opening and our locking
                os.unlink(lock)
            still_there.append(os.path.exists(lock))
            return try_lock(descriptor)

        with unittest.mock.patch.object(llamactl, "try_lock", taken):
            self.inject()
        self.assertEqual((still_there, self.read().decode()), ([False, True], self.text))
        self.assertFalse(os.path.exists(lock))

    def inject(self, *argv, code=0, path=None, **options):
        result = self.call(
            "auth", "inject", "--env-file", path or self.path, *argv, **options
        )
        self.assertEqual(code, result.code, result.err)
        if code:
            self.assertTrue(result.err.startswith("error: "), result.err)
            self.assertLessEqual(result.err.count("\n"), 2)
        if not options.get("sings"):
            self.assertEqual("", result.out)
        return result

    def write(self, content, mode=0o600, path=None):
        path = path or self.path
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, mode)
        os.utime(path, ns=(10**18, 10**18))
        return path

    def read(self, path=None):
        with open(path or self.path, "rb") as file:
            return file.read()

    def mode(self, path=None):
        return stat.S_IMODE(os.stat(path or self.path).st_mode)

    def test_a_new_file_is_private_whatever_the_umask(self):
        for umask in (0o000, 0o022, 0o077):
            with self.subTest(umask=umask):
                path = os.path.join(self.home, "%o.env" % umask)
                before = os.umask(umask)
                try:
                    result = self.inject(path=path)
                finally:
                    os.umask(before)
                self.assertEqual(0o600, self.mode(path))
                self.assertEqual(
                    sorted(self.lines), sorted(self.read(path).decode().split())
                )
                self.assertNotIn("warning", result.err)

    def test_the_mode_is_kept_and_one_that_lets_others_read_is_warned_about(self):
        for mode, warned in (
            (0o600, False),
            (0o400, False),
            (0o700, False),
            (0o640, has_a_shared_group()),
            (0o644, True),
            (0o604, True),
            (0o444, True),
            (0o666, True),
        ):
            with self.subTest(mode=oct(mode)):
                with contextlib.suppress(FileNotFoundError):  # it may be unwritable
                    os.unlink(self.path)
                self.write(b"A=1\n", mode)
                result = self.inject()
                self.assertEqual(mode, self.mode())
                self.assertEqual(("A=1\n" + self.text).encode(), self.read())
                self.assertEqual(warned, "warning" in result.err, result.err)
                if warned:
                    self.assertIn("app.env", result.err)

    def test_bytes_survive(self):
        for before in (
            b"\xef\xbb\xbfA=\xc3\xa4\r\n",
            b"A=1\r\n\r\n# c",
            b"A=\x00\x1b\x7f\r\n",
        ):
            with self.subTest(before=before):
                self.write(before)
                self.inject()
                self.assertTrue(self.read().startswith(before))
                self.assertEqual(
                    len(before.splitlines()) + 3,
                    self.read().count(b"\r\n") + (not before.endswith(b"\n")),
                )

    def test_it_is_written_whole_by_a_rename(self):
        self.write(b"A=1\n")
        other = os.path.join(self.home, "other.env")
        os.link(self.path, other)
        self.inject()
        self.assertEqual(b"A=1\n", self.read(other))
        self.assertEqual(("A=1\n" + self.text).encode(), self.read())
        self.assertEqual({"app.env", "other.env", "conf"}, set(os.listdir(self.home)))

    def test_nothing_changes_nothing_is_touched(self):
        self.write(b"# mine\r\nA='1")
        self.inject()
        content = self.read()
        os.utime(self.path, ns=(10**18, 10**18))
        before = os.stat(self.path)
        folder = os.stat(self.home)
        self.inject()
        after = os.stat(self.path)
        self.assertEqual(
            (before.st_ino, before.st_mtime_ns, before.st_ctime_ns),
            (after.st_ino, after.st_mtime_ns, after.st_ctime_ns),
        )
        self.assertEqual(folder.st_mtime_ns, os.stat(self.home).st_mtime_ns)
        self.assertEqual(content, self.read())

    def test_a_symlink_is_followed_and_kept(self):
        os.mkdir(os.path.join(self.home, "real"))
        target = self.write(b"A=1\n", path=os.path.join(self.home, "real", "target.env"))
        middle = os.path.join(self.home, "middle.env")
        os.symlink(os.path.join("real", "target.env"), middle)
        os.symlink("middle.env", self.path)
        self.inject()
        self.assertEqual("middle.env", os.readlink(self.path))
        self.assertEqual(os.path.join("real", "target.env"), os.readlink(middle))
        self.assertEqual(("A=1\n" + self.text).encode(), self.read(target))
        self.assertEqual(["target.env"], os.listdir(os.path.join(self.home, "real")))

    def test_a_symlink_to_nothing_gets_its_target(self):
        os.symlink(os.path.join("missing", "target.env"), self.path)
        self.inject()
        self.assertTrue(os.path.islink(self.path))
        target = os.path.join(self.home, "missing", "target.env")
        self.assertEqual(self.text.encode(), self.read(target))
        self.assertEqual(0o600, self.mode(target))

    def test_missing_parents_are_made(self):
        path = os.path.join(self.home, "a", "b c", "new.env")
        self.inject(path=path)
        self.assertEqual(self.text.encode(), self.read(path))

    def test_the_default_is_dot_env_here(self):
        result = self.process("auth", "inject")
        self.assertEqual((0, ""), (result.code, result.out), result.err)
        self.assertEqual(self.text.encode(), self.read(os.path.join(self.home, ".env")))

    def test_what_is_no_regular_file_is_refused(self):
        # never a device of the system here: run as root, a broken program would replace it
        folder, loop, door = (
            os.path.join(self.home, name) for name in ("folder.env", "loop.env", "door.env")
        )
        file = self.write(b"A=1\n")
        os.mkdir(folder)
        os.symlink("loop.env", loop)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(door)
        for path in (folder, loop, door, os.path.join(file, "x.env")):
            with self.subTest(path=path):
                result = self.inject(code=1, path=path)
                self.assertIn(os.path.basename(path), result.err)
        self.assertEqual([], os.listdir(folder))
        self.assertTrue(stat.S_ISSOCK(os.stat(door).st_mode))
        self.assertEqual(b"A=1\n", self.read())

    def test_a_fifo_is_refused_and_not_waited_for(self):
        os.mkfifo(self.path)
        result = self.process("auth", "inject", "--env-file", self.path, timeout=10)
        self.assertEqual((1, ""), (result.code, result.out))
        self.assertRegex(result.err, r"\Aerror: .*app\.env.*\n\Z")
        self.assertTrue(stat.S_ISFIFO(os.stat(self.path).st_mode))

    def test_what_is_not_utf_8_is_refused_and_left(self):
        for content in (
            b"A=\xff\n",
            b"\xff\xfeA\x00=\x00",
            b"A=\xed\xa0\x80\n",
            b"A=1\n\xc3",
        ):
            with self.subTest(content=content):
                self.write(content)
                inode = os.stat(self.path).st_ino
                result = self.inject(code=1)
                self.assertIn("UTF-8", result.err)
                self.assertIn("app.env", result.err)
                self.assertEqual(
                    (content, inode, 10**18),
                    (
                        self.read(),
                        os.stat(self.path).st_ino,
                        os.stat(self.path).st_mtime_ns,
                    ),
                )

    def test_in_place_only_where_a_rename_cannot_be(self):
        for number in (errno.EBUSY, errno.EXDEV):
            with self.subTest(errno=errno.errorcode[number]):
                # longer than what replaces it: nothing of it may stick out behind
                self.write(b"LLAMA_CLOUD_API_KEY='" + b"long" * 99 + b"'\n", 0o640)
                inode = os.stat(self.path).st_ino
                with unittest.mock.patch(
                    "os.replace", side_effect=OSError(number, "no rename")
                ):
                    result = self.inject()
                self.assertEqual(self.text.encode(), self.read())
                self.assertEqual((inode, 0o640), (os.stat(self.path).st_ino, self.mode()))
                self.assertRegex(result.err, "warning: .*app.env.*crash")
                self.assertEqual({"app.env", "conf"}, set(os.listdir(self.home)))

    def test_a_rename_that_fails_for_another_reason_loses_nothing(self):
        self.write(b"A=1\n")
        with unittest.mock.patch(
            "os.replace", side_effect=OSError(errno.ENOSPC, "disk full")
        ):
            result = self.inject(code=1)
        self.assertIn("app.env", result.err)
        self.assertEqual(b"A=1\n", self.read())
        self.assertEqual({"app.env", "conf"}, set(os.listdir(self.home)))

    def test_a_full_disk_tears_nothing_that_is_written_in_place(self):
        before = b"# mine\n" * 30
        for room in (0, 1, 50, len(self.text) - 1):
            with self.subTest(room=room):
                inode = os.stat(self.write(before)).st_ino
                with opening_fails(lambda path, _: path.endswith("-lock"), errno.EACCES):
                    with file_size_limit(len(before) + room):
                        result = self.call("auth", "inject", "--env-file", self.path)
                self.assertEqual(1, result.code)
                self.assertRegex(result.err, "warning: .*crash.*\nerror: .*app.env")
                self.assertEqual((before, inode), (self.read(), os.stat(self.path).st_ino))

    def test_a_name_that_the_system_cannot_encode_is_refused(self):
        self.assertIn("cannot be written", self.inject(code=1, path="\ud800.env").err)

    def test_a_value_that_needs_quotes_gets_them_and_a_warning(self):
        for key, named in (
            ("llx-CANARY$0123456789", ("docker",)),
            ("llx-CANARY-it's-${A}-0123", ("docker", "python-dotenv")),
        ):
            with self.subTest(key=key):
                self.with_profile(key=key)
                result = self.inject()
                for name in named:
                    self.assertRegex(result.err, "warning: LLAMA_CLOUD_API_KEY .*" + name)
                self.assertEqual(len(named) == 2, "python-dotenv" in result.err)
                known = read_by_shells([self.read().decode()])[0]
                self.assertEqual(key, known["LLAMA_CLOUD_API_KEY"])
                self.assertNotIn(
                    "warning",
                    self.inject(env={"X": "1"}).err.replace(
                        "warning: LLAMA_CLOUD_API_KEY", ""
                    ),
                )

    def test_a_dash_prints_the_lines(self):
        result = self.inject(path="-", sings=True)
        self.assertEqual(sorted(self.lines), sorted(result.out.splitlines()))
        self.assertTrue(result.out.endswith("\n"))
        self.assertFalse(os.path.exists("-"))

    def test_without_a_credential_no_file_is_made(self):
        none = {"auth_type": "none", "api_key": None}
        for profiles, code, hint in (
            ((), 4, "llamactl auth "),
            ((none,), 4, "llamactl auth "),
            (({"project_id": None},), 2, "llamactl projects use"),
        ):
            with self.subTest(profiles=profiles):
                self.write_store({})
                for extra in profiles:
                    self.with_profile(**extra)
                self.assertIn("hint: " + hint, self.inject(code=code).err)
                self.assertFalse(os.path.exists(self.path))


# ========================================================================================
# disk: Windows, by simulation
# ========================================================================================


class OtherSystems(CommandCase):
    """The branches for Windows, walked here by simulation."""

    def setUp(self):
        super().setUp()
        self.patch(WINDOWS=True)
        interrupt = signal.getsignal(signal.SIGINT)
        self.addCleanup(signal.signal, signal.SIGINT, interrupt)

    def test_exec_waits_and_passes_the_code_on(self):
        self.with_profile()
        with unittest.mock.patch.object(subprocess, "call", return_value=9) as call:
            result = self.call("auth", "exec", "--", "tool", "-x")
        self.assertEqual(result.code, 9)
        self.assertEqual(call.call_args[0][0], ["tool", "-x"])
        self.assertEqual(call.call_args[1]["env"]["LLAMA_CLOUD_API_KEY"], KEY)
        for error, code in ((FileNotFoundError(), 127), (PermissionError(), 126)):
            with unittest.mock.patch.object(subprocess, "call", side_effect=error):
                self.assertEqual(self.call("auth", "exec", "--", "tool").code, code)

    def test_a_reader_holds_up_a_rename_but_for_a_moment(self):
        self.with_profile()
        replace, refusals = os.replace, [PermissionError(), PermissionError()]

        def stubborn(source, target, **folders):
            if refusals:
                raise refusals.pop()
            replace(source, target, **folders)

        self.patch(LOCK_PAUSE=0.0)
        with unittest.mock.patch.object(os, "replace", stubborn):
            self.done("auth", "logout", "main")
        self.assertEqual((self.profiles(), refusals), ({}, []))

    def test_the_store_needs_nothing_of_posix(self):
        """No fcntl, no owners, no modes on descriptors, no folder that could be fsynced."""
        calls, busy = [], [OSError(errno.EDEADLK, "busy"), OSError(errno.EACCES, "busy")]

        def locking(descriptor, mode, size):
            calls.append((mode, size))
            if busy:
                raise busy.pop()

        fake = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
        for name in ("geteuid", "getuid", "fchmod", "fchown", "uname"):
            if hasattr(os, name):
                patcher = unittest.mock.patch.object(os, name, create=True)
                patcher.start()
                self.addCleanup(patcher.stop)
                delattr(os, name)
        self.patch(LOCK_PAUSE=0.0)
        with unittest.mock.patch.dict(sys.modules, {"fcntl": None, "msvcrt": fake}):
            self.done("auth", "token", "--api-key", KEY, "--project", "proj-alpha")
            self.done("auth", "inject", "--env-file", os.path.join(self.home, "win.env"))
        self.assertEqual(list(self.profiles()), ["llx-wxyz"])
        self.assertGreater(len(calls), 3)
        self.assertEqual(set(calls), {(2, 1)})

    def test_a_lock_that_a_live_process_holds_is_named(self):
        fake = types.SimpleNamespace(
            locking=unittest.mock.Mock(side_effect=OSError(errno.EACCES, "busy")),
            LK_NBLCK=2,
        )
        self.patch(LOCK_TIMEOUT=0.05)
        with unittest.mock.patch.dict(sys.modules, {"fcntl": None, "msvcrt": fake}):
            self.expect_failure(self.call("auth", "use", "x"), 1, "profiles.json")

    def test_folder(self):
        roaming = os.path.join(self.home, "Roaming")
        self.done(
            "environments",
            "add",
            NOWHERE,
            "--no-verify",
            env={"LLAMACTL_CONFIG_DIR": "", "APPDATA": roaming, "XDG_CONFIG_HOME": "/x"},
        )
        self.assertIn("profiles.json", os.listdir(os.path.join(roaming, "llamactl")))


# ========================================================================================
# store: a store that is not as it should be
# ========================================================================================


class OddStoreTest(DiskCase):
    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()
        self.with_profile()

    def assert_refused_and_untouched(self, names=""):
        """Every reader and every writer exits 1 in one line; the variables' credential
        works."""
        before, names = self.unlocked_tree(), names or self.store_path
        for command in self.OFFLINE_READERS + self.WRITERS:
            with self.subTest(command):
                self.assert_one_error(self.call(*command), 1, names)
                self.assertEqual(self.unlocked_tree(), before)
        self.assertEqual(self.cloud.requests, [])
        self.assertEqual(self.call("projects", "get", env=self.of_variables()).code, 0)

    def unlocked_tree(self):
        """The tree without the lock, which writers may make, and so without folders'
        times."""
        return {
            path: entry[0] if entry[0].startswith("0o4") else entry
            for path, entry in tree(self.home).items()
            if not path.endswith(".lock")
        }

    def test_a_folder_in_its_place(self):
        os.unlink(self.store_path)
        os.mkdir(self.store_path)
        self.assert_refused_and_untouched()

    def test_a_fifo_hangs_nobody(self):
        os.unlink(self.store_path)
        os.mkfifo(self.store_path, 0o600)
        for command in (("auth", "get"),) + self.ALWAYS_WRITERS[:1]:
            # whole processes, which a time limit can end, and no call before both have
            # passed
            result = self.process(*command, timeout=20)
            self.assert_one_error(result, 1, self.store_path)
        self.assert_refused_and_untouched()
        self.assertTrue(stat.S_ISFIFO(os.stat(self.store_path).st_mode))

    def test_unreadable(self):
        def is_store(path, flags):
            return path == self.store_path

        for number in (errno.EACCES, errno.EIO, errno.EPERM):
            with self.subTest(errno.errorcode[number]), opening_fails(is_store, number):
                self.assert_refused_and_untouched()
                self.cloud.reset()

    def test_a_newer_version(self):
        for newer in ({"version": 2}, {"version": 99, "profiles": [], "environments": 7}):
            with self.subTest(newer):
                self.put(json.dumps(newer).encode())
                self.assert_refused_and_untouched()
                self.cloud.reset()

    def test_a_link_to_itself(self):
        os.unlink(self.store_path)
        os.symlink("profiles.json", self.store_path)
        self.assert_refused_and_untouched()

    def test_the_folder_is_a_file(self):
        shutil.rmtree(self.folder)
        with open(self.folder, "w") as file:
            file.write("mine")
        self.assert_refused_and_untouched(self.folder)

    def test_the_lock_file_is_no_file(self):
        os.mkdir(self.store_path + ".lock")
        before = tree(self.home)
        for command in self.WRITERS:
            with self.subTest(command):
                self.assert_one_error(self.call(*command), 1, self.store_path)
        self.assertEqual(tree(self.home), before)
        self.assertEqual(self.call("auth", "get").code, 0)

    def test_a_link_is_followed_and_kept(self):
        valid = file_bytes(self.store_path)
        for target, there in (
            ("real/profiles.json", True),
            ("real/profiles.json", False),
            ("missing/profiles.json", False),
        ):
            for kind in ("relative", "absolute"):
                with self.subTest(target=target, there=there, kind=kind):
                    shutil.rmtree(self.folder)
                    os.makedirs(os.path.join(self.folder, "real"), 0o700)
                    real = os.path.join(self.folder, target)
                    os.symlink(target if kind == "relative" else real, self.store_path)
                    if there:
                        with open(real, "wb") as file:
                            file.write(valid)
                    reading = self.call("auth", "get", "-o", "json")
                    self.assertEqual(
                        (reading.code, len(load(reading.out))), (0, int(there))
                    )
                    self.assertEqual(self.call(*self.ALWAYS_WRITERS[0]).code, 0)
                    self.assertTrue(os.path.islink(self.store_path))
                    self.assertEqual(mode_of(real), "0o600")
                    names = [
                        name for name in self.files() if name.startswith("profiles.json.")
                    ]
                    self.assertIn(names, ([], ["profiles.json.lock"]))
                    profiles = [record["profiles"] for record in self.stored().values()]
                    self.assertEqual(sum(map(len, profiles)), 1 + there)

    def test_what_a_crash_left_is_overwritten_and_removed(self):
        for made in ("file", "link"):
            for command in self.WRITERS:
                with self.subTest(made=made, command=command):
                    self.with_profile()
                    victim = os.path.join(self.home, "victim")
                    with open(victim, "w") as file:
                        file.write("not ours")
                    if made == "link":
                        os.symlink(victim, self.store_path + ".new")
                    else:
                        shutil.copy(self.store_path, self.store_path + ".new")
                    self.assertEqual(self.call(*command).code, 0)
                    self.assertEqual(self.files(), STORE_FILES)
                    self.assertEqual(file_bytes(victim), b"not ours")
                    self.assertFalse(os.path.islink(self.store_path))

    def test_a_left_over_lock_file_blocks_nobody(self):
        for content in (b"", b"12345\n"):
            with open(self.store_path + ".lock", "wb") as file:
                file.write(content)
            self.assertEqual(self.call("auth", "use", "main").code, 0)

    def test_a_lock_that_is_held_is_an_error_that_names_the_file(self):
        self.assertEqual(llamactl.LOCK_TIMEOUT, 10)
        before = file_bytes(self.store_path)
        with unittest.mock.patch.object(llamactl, "LOCK_TIMEOUT", 0.0):
            with locked(self.store_path + ".lock"):
                for command in self.WRITERS:
                    with self.subTest(command):
                        self.assert_one_error(
                            self.call(*command), 1, self.store_path + ".lock"
                        )
                        self.assertEqual(file_bytes(self.store_path), before)
                for command in self.READERS:
                    with self.subTest(command):
                        self.assertEqual(self.call(*command).code, 0)

    def test_a_lock_that_is_let_go_is_waited_for(self):
        with locked(self.store_path + ".lock") as let_go:

            def pause(seconds):
                pauses.append(seconds)
                let_go()

            pauses = []
            with unittest.mock.patch.object(llamactl.time, "sleep", pause):
                self.assertEqual(self.call("auth", "logout", "main").code, 0)
        self.assertEqual(len(pauses), 1)
        self.assertEqual(self.profiles(), {})


class DamagedStoreTest(DiskCase):
    URL = "https://llama.example.com"

    def setUp(self):
        DiskCase.setUp(self)
        self.url = self.URL

    def whole_store(self):
        """A store with every member that there may be."""
        token = {
            "auth_type": "token",
            "api_key": KEY,
            "project_id": "proj-alpha",
            "project_name": "Alpha",
            "org_id": "org-one",
        }
        login = dict(
            token,
            auth_type="oidc",
            api_key_id="key-1",
            sub="user-1",
            issuer=self.URL,
            email="dev@example.com",
            access_token="at-CANARY-0123456789",
            access_expires_at=1.5,
            refresh_token="rt-CANARY-0123456789",
        )
        none = dict(token, auth_type="none", api_key=None)
        waiting = {
            "verification_uri": self.URL,
            "verification_uri_complete": None,
            "user_code": "ABCD-EFGH",
            "expires_at": 4102444800,
            "interval": 5.0,
            "device_code": "dc-CANARY-0123456789",
        }
        record = {
            "requires_auth": True,
            "min_llamactl_version": None,
            "current_profile": "main",
            "profiles": {"main": token, "me": login, "open": none},
            "login": waiting,
        }
        return {
            "version": 1,
            "current_environment": self.URL,
            "environments": {self.URL: record},
        }

    def damages(self):
        whole = json.dumps(self.whole_store()).encode()
        deep = b"[" * 100000 + b"]" * 100000
        return (
            b"",
            b" ",
            b"\n",
            b"\0" * 64,
            b"null",
            b"[]",
            b"7",
            b'"text"',
            b"{}",
            b"{",
            b"}",
            b"not JSON at all",
            b"\xff\xfe" + whole,
            whole.replace(b"Alpha", b"\xff\x80"),
            whole[:-1],
            whole + b"}",
            whole * 2,
            whole.replace(b'"version": 1', b'"version": "1"'),
            whole.replace(b'"version": 1', b'"version": true'),
            whole.replace(b'"version": 1', b'"version": null'),
            whole.replace(b'"version": 1, ', b""),
            deep,
            b'{"version": 1, "environments": ' + deep,
            b'{"version": 1, "current_environment": null, "environments": {"' + b"x" * 10,
            whole.decode().encode("utf-16"),
        )

    def test_the_whole_store_is_not_damaged(self):
        self.put(json.dumps(self.whole_store()).encode())
        result = self.call("auth", "get", "-o", "json")
        self.assertEqual([row["name"] for row in load(result.out)], ["main", "me", "open"])

    def test_readers_name_it_and_touch_nothing(self):
        for damage in self.damages():
            self.put(damage, 0o644)
            before = tree(self.home)
            for command in self.OFFLINE_READERS:
                with self.subTest(damage=damage[:60], command=command):
                    self.assert_one_error(self.call(*command), 1, self.store_path)
            self.assertEqual(tree(self.home), before)

    def test_a_writer_sets_it_aside_warns_and_goes_on(self):
        for damage in self.damages():
            for command in self.ALWAYS_WRITERS:
                with self.subTest(damage=damage[:60], command=command[:2]):
                    self.put(damage, 0o644)
                    result = self.call(*command)
                    self.assertEqual(result.code, 0, result.err)
                    (copy,) = set(self.files()) - set(STORE_FILES)
                    path = os.path.join(self.folder, copy)
                    self.assertTrue(copy.startswith("profiles.json.damaged-"), copy)
                    self.assertEqual((file_bytes(path), mode_of(path)), (damage, "0o600"))
                    self.assertEqual(
                        sum(path in line for line in self.warnings_of(result)),
                        1,
                        result.err,
                    )
                    self.assertEqual(self.call("auth", "get").code, 0)
                    shutil.rmtree(self.folder)

    def test_no_damaged_copy_replaces_another(self):
        for damage in (b"first", b"second", b"third"):
            self.put(damage)
            self.assertEqual(self.call(*self.ALWAYS_WRITERS[1]).code, 0)
        copies = [
            file_bytes(os.path.join(self.folder, name))
            for name in self.files()
            if ".damaged-" in name
        ]
        self.assertEqual(sorted(copies), [b"first", b"second", b"third"])

    def test_cut_off_after_every_byte(self):
        store = llamactl.Store(self.folder, self.fail)
        whole = json.dumps(self.whole_store()).encode()
        for size in range(len(whole)):
            self.put(whole[:size])
            with self.assertRaises(llamactl.Failure) as caught:
                store.load()
            self.assertIn(self.store_path, str(caught.exception))
        self.put(whole)
        self.assertEqual(store.load(), self.whole_store())

    def test_wrong_types_everywhere_are_damage_or_do_no_harm(self):
        """Each member of a whole store in turn as each other type: never a mistake of
        ours."""
        wrong = (None, True, float("inf"), "\ud800", [1], {"a": {"b": 1}}, 10**400)
        commands = self.OFFLINE_READERS + (
            ("auth", "login", "--resume"),
            ("auth", "use", "me"),
            ("auth", "logout", "me"),
        )
        refused, accepted = 0, 0
        nobody = (llamactl.Unreachable("nobody is there", llamactl.NOT_CONNECTED),)
        with unittest.mock.patch.object(
            llamactl.Client, "send", side_effect=nobody * 10**6
        ):
            for place, value, content in self.variants(wrong):
                self.put(content)
                try:
                    llamactl.Store(self.folder, self.fail).load()
                except llamactl.Failure as failure:
                    refused += 1
                    self.assertIn(self.store_path, failure.message)
                    continue
                accepted += 1
                for command in commands:
                    with self.subTest(place=place, value=value, command=command[:3]):
                        self.put(content)
                        result = self.call(*command, sings="inject" in command)
                        self.assertIn(result.code, (0, 1, 2, 4, 5), result)
        self.assertGreater(refused, 50)
        self.assertGreater(accepted, 10)

    def variants(self, wrong):
        places = list(self.places(self.whole_store(), ()))
        for place in places:
            for value in wrong:
                whole = self.whole_store()
                inner = whole
                for name in place[:-1]:
                    inner = inner[name]
                if inner[place[-1]] != value:
                    inner[place[-1]] = value
                    yield place, value, json.dumps(whole).encode()
            whole = inner = self.whole_store()
            for name in place[:-1]:
                inner = inner[name]
            del inner[place[-1]]
            yield place, "missing", json.dumps(whole).encode()

    def places(self, value, place):
        """The path of names to every member of VALUE."""
        for name, item in value.items():
            yield place + (name,)
            if isinstance(item, dict):
                yield from self.places(item, place + (name,))

    def test_deep_nesting_in_a_member_of_no_meaning(self):
        for depth in (300, 900, 990, 5000, 20000):
            with self.subTest(depth):
                whole = json.dumps(self.whole_store())[:-1]
                self.put((whole + ', "x": ' + "[" * depth + "]" * depth + "}").encode())
                self.assertIn(self.call("auth", "get").code, (0, 1))
                result = self.call(*self.ALWAYS_WRITERS[0])
                self.assertEqual(
                    result.code, 0, result.err
                )  # kept, or set aside as damaged
                self.assertEqual(self.call("auth", "get").code, 0)

    def test_a_number_that_cannot_be_written_again_is_damage(self):
        whole = json.dumps(self.whole_store())
        for damage in (
            whole.replace("4102444800", "1e999"),
            whole[:-1] + ', "x": [-1e999]}',
        ):
            with self.subTest(damage=damage[-20:]):
                self.put(damage.encode())
                self.assertIn("damaged-", self.call(*self.ALWAYS_WRITERS[0]).err)
                self.assertEqual(self.call("auth", "get").code, 0)
                (copy,) = set(self.files()) - set(STORE_FILES)
                self.assertEqual(
                    file_bytes(os.path.join(self.folder, copy)), damage.encode()
                )
                shutil.rmtree(self.folder)


# ========================================================================================
# store: crowds
# ========================================================================================


class CrowdTest(DiskCase):
    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()

    def start_all(self, commands):
        """A process for each command, all at once; killed at the end if need be."""
        processes = [self.spawn(*command, stdin=subprocess.DEVNULL) for command in commands]
        for process in processes:
            self.addCleanup(self.stop, process)
        return processes

    def stop(self, process):
        if process.poll() is None:
            process.kill()
            process.communicate()

    def finish_all(self, processes, codes=(0,)):
        results = []
        for process in processes:
            out, err = process.communicate()
            results.append(self.note(process.returncode, out, err))
        self.assertEqual([r.err for r in results if r.code not in codes], [])
        return results

    def test_32_processes_of_auth_token_while_readers_read(self):
        keys = ["llx-CANARY-0123456789abcdef-%04d" % number for number in range(32)]
        for key in keys:
            self.cloud.add_key(key)
        processes = self.start_all(
            ("auth", "token", "--project", "proj-alpha", "--api-key", key) for key in keys
        )
        reader, seen, readings = llamactl.Store(self.folder, self.fail), 0, 0
        while any(process.poll() is None for process in processes):
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # the writers need the CPUs too
                processes[-1].wait(0.002)
            with open(self.store_path, "rb") as file:  # as any other program would read it
                count = len(
                    json.loads(file.read().decode())["environments"][self.url]["profiles"]
                )
            now = len(reader.load()["environments"][self.url]["profiles"])
            self.assertLessEqual(seen, count)
            self.assertLessEqual(count, now)
            seen, readings = now, readings + 1
        self.finish_all(processes)
        self.assertGreater(readings, 10)
        profiles = self.profiles()
        self.assertEqual(sorted(profile["api_key"] for profile in profiles.values()), keys)
        self.assertEqual(sorted(profiles), ["llx-%04d" % number for number in range(32)])
        self.assertEqual(self.files(), STORE_FILES)

    def test_16_commands_of_an_expired_login_refresh_nothing(self):
        login = self.log_in(expired=True)
        self.cloud.reset()
        refreshes = self.cloud.refreshes
        results = self.finish_all(self.start_all([("projects", "get", "-o", "json")] * 16))
        self.assertEqual([len(load(result.out)) for result in results], [2] * 16)
        self.assertEqual(
            {request.path for request in self.cloud.requests},
            {"/api/v1beta1/deployments/list-projects"},
        )
        self.assertEqual((len(self.cloud.requests), self.cloud.refreshes), (16, refreshes))
        self.assertEqual(self.profiles()["dev@example.com"], login)

    def test_eight_logouts_of_one_login(self):
        login = self.log_in(expired=True)
        refreshes = self.cloud.refreshes
        results = self.finish_all(
            self.start_all([("auth", "logout", "dev@example.com")] * 8), codes=(0, 1)
        )
        late = [result.err for result in results if result.code]
        self.assertLess(len(late), 8)  # who comes when it is gone is told so
        for err in late:
            self.assertIn("has no profile dev@example.com", err)
        self.assertLessEqual(self.cloud.refreshes - refreshes, 1)
        self.assertEqual(self.cloud.reuse_detected, 0)
        self.assertNotIn(login["api_key"], self.cloud.keys_alive())
        self.assertTrue(self.cloud.logins[0]["revoked"])
        self.assertEqual(self.profiles(), {})
        self.assert_nowhere(login["api_key"], login["refresh_token"], login["access_token"])

    def test_the_rotated_token_is_on_disk_before_its_access_token_is_used(self):
        login, stored = self.log_in(expired=True), []
        receive = self.cloud.receive

        def look_at_the_disk(request):
            if request.method == "DELETE":
                stored.append((request.headers["authorization"], self.profiles()))
            return receive(request)

        with unittest.mock.patch.object(self.cloud, "receive", look_at_the_disk):
            self.assertEqual(self.call("auth", "logout", "dev@example.com").code, 0)
        ((bearer, profiles),) = stored
        profile = profiles["dev@example.com"]
        self.assertEqual(bearer, "Bearer " + profile["access_token"])
        self.assertNotEqual(profile["refresh_token"], login["refresh_token"])
        self.assertFalse(self.cloud.refresh_tokens[profile["refresh_token"]]["used"])

    def test_a_crowd_with_the_lock_held_by_a_killed_process(self):
        """The kernel lets go of a dead process's lock, whoever waits for it then."""
        self.with_profile()
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\n"
                "fcntl.flock(f, fcntl.LOCK_EX)\nprint(1, flush=True)\ntime.sleep(60)",
                self.store_path + ".lock",
            ],
            stdout=subprocess.PIPE,
        )
        self.addCleanup(holder.stdout.close)
        self.assertEqual(holder.stdout.read(1), b"1")
        tried, try_lock = threading.Event(), llamactl.try_lock

        def noted(descriptor):
            taken = try_lock(descriptor)
            if not taken and not tried.is_set():
                tried.set()
                holder.kill()
                holder.wait()
            return taken

        with unittest.mock.patch.object(llamactl, "try_lock", noted):
            self.assertEqual(self.call("auth", "logout", "main").code, 0)
        self.assertTrue(tried.is_set())
        self.assertEqual(self.profiles(), {})


# ========================================================================================
# store: what a logout leaves
# ========================================================================================


class LeakTest(DiskCase):
    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()

    def leave_over(self, name, content=None):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(file_bytes(self.store_path) if content is None else content)
        return path

    def test_nothing_of_an_api_key_is_left(self):
        for command in (
            ("auth", "logout", "main"),
            ("auth", "logout", "--all"),
            ("environments", "delete", self.url),
        ):
            for left_over in (False, True):
                with self.subTest(command=command, left_over=left_over):
                    self.with_profile()
                    if left_over:
                        self.leave_over("profiles.json.new")
                    self.cloud.reset()
                    self.assertEqual(self.call(*command).code, 0)
                    self.assert_nowhere(KEY)
                    self.assertEqual(self.cloud.requests, [])  # it needs no network

    def test_nothing_of_a_login_is_left(self):
        for command in (
            ("auth", "logout", "dev@example.com"),
            ("auth", "logout", "--all"),
            ("environments", "delete", self.url),
        ):
            with self.subTest(command):
                self.write_store({})
                login = self.log_in()
                self.leave_over("profiles.json.new")
                self.assertEqual(self.call(*command).code, 0)
                self.assert_nowhere(
                    login["api_key"],
                    login["refresh_token"],
                    login["access_token"],
                    "at-CANARY",
                    "rt-CANARY",
                    "llx-CANARY",
                )
                self.assertNotIn(login["api_key"], self.cloud.keys_alive())
                self.assertTrue(self.cloud.logins[-1]["revoked"])

    def test_nothing_of_a_login_is_left_when_the_server_fails(self):
        for kind in ("silence", "status", "garbage"):
            with self.subTest(kind):
                self.write_store({})
                login = self.log_in(expired=kind == "status")
                path = "/api/v1/api-keys/" + login["api_key_id"]
                self.cloud.reset()
                self.cloud.fault(path, kind, times=9)
                with self.impatient() if kind == "silence" else contextlib.ExitStack():
                    result = self.call("auth", "logout", "dev@example.com", "--quiet")
                self.assert_one_error(result, 1, login["api_key_id"])
                self.assertEqual(self.cloud.count("DELETE", path), 1)  # tried once
                self.assert_nowhere(
                    login["api_key"], "at-CANARY", "rt-CANARY", "llx-CANARY"
                )
                self.cloud.reset()

    def test_a_damaged_copy_that_remains_is_named(self):
        for with_key in (True, False):
            with self.subTest(with_key=with_key):
                self.with_profile()
                copy = self.leave_over(
                    "profiles.json.damaged-20200101T000000Z", None if with_key else b"{"
                )
                before = file_bytes(copy)
                result = self.call("auth", "logout", "main")
                self.assertEqual(result.code, 0)
                self.assertEqual(
                    sum(copy in line for line in self.warnings_of(result)), 1, result.err
                )
                self.assertEqual(file_bytes(copy), before)

    def test_a_folder_that_cannot_be_listed_is_named(self):
        self.with_profile()
        with unittest.mock.patch.object(os, "listdir", side_effect=PermissionError):
            result = self.call("auth", "logout", "main")
        self.assertEqual(result.code, 0)
        self.assertIn(self.folder, "".join(self.warnings_of(result)))

    def test_logging_out_of_one_keeps_the_others(self):
        self.with_profile()
        self.call(
            "auth",
            "token",
            "--no-verify",
            "--api-key",
            OTHER_KEY,
            "--project",
            "p",
            "--name",
            "other",
        )
        other = self.profiles()["other"]
        self.assertEqual(self.call("auth", "logout", "main").code, 0)
        self.assertEqual(self.profiles(), {"other": other})
        self.assert_nowhere(KEY)

    def test_logout_all_ends_every_profile_of_every_environment(self):
        login = self.log_in()
        self.call("auth", "token", "--no-verify", "--api-key", KEY, "--project", "p")
        self.call(*self.ALWAYS_WRITERS[1])
        self.call(*self.ALWAYS_WRITERS[0])
        self.assertEqual(self.call("auth", "logout", "--all").code, 0)
        self.assertEqual(
            [record["profiles"] for record in self.stored().values()], [{}, {}]
        )
        self.assertNotIn(login["api_key"], self.cloud.keys_alive())
        self.assert_nowhere(KEY, OTHER_KEY, login["api_key"], login["refresh_token"])

    def test_deleting_an_environment_keeps_the_others(self):
        self.with_profile()
        self.call(*self.ALWAYS_WRITERS[1])
        self.call(*self.ALWAYS_WRITERS[0])
        self.assertEqual(self.call("environments", "delete", self.url).code, 0)
        self.assertEqual(list(self.stored()), ["https://other.example.com"])
        self.assertEqual(self.call("auth", "get", "-o", "json").out.count("llx-abcd"), 1)
        self.assertEqual(
            self.call("environments", "delete", "https://other.example.com").code, 0
        )
        self.assertEqual(
            load(self.call("config", "-o", "json").out)["environment"], DEFAULT_URL
        )
        self.assert_nowhere(KEY, OTHER_KEY)

    def test_exec_puts_no_secret_on_a_command_line(self):
        self.with_profile()
        script = 'printf "%s\\n" "$0" "$@"; test -n "$LLAMA_CLOUD_API_KEY"'
        result = self.process(
            "auth", "exec", "--", "sh", "-c", script, "zero", "one two", ""
        )
        self.assertEqual((result.code, result.out), (0, "zero\none two\n\n"))

    def test_a_browser_gets_no_secret_on_its_command_line(self):
        browser = os.path.join(self.home, "browser")
        with open(browser, "w") as file:
            file.write(
                '#!/bin/sh\nprintf "%s\\n" "$@" > "$0.arguments"; env > "$0.variables"\n'
            )
        os.chmod(browser, 0o700)
        env = {"DISPLAY": ":9", "BROWSER": browser + " %s"}
        result = self.process("auth", "login", "--project", "proj-alpha", env=env)
        self.assertEqual(result.code, 0, result.err)
        arguments = file_bytes(browser + ".arguments").decode()
        self.assertTrue(
            arguments.startswith(self.url + "/oidc/device?user_code="), arguments
        )
        # that no secret is in what the browser saw is checked at the end of every test


# ========================================================================================
# store: profiles, their names, and which one is current
# ========================================================================================


class ProfilesTest(DiskCase):
    def setUp(self):
        DiskCase.setUp(self)
        self.cloud = self.cloud_server()

    def token(self, key, project="proj-alpha", *more):
        self.cloud.add_key(key)
        return self.call("auth", "token", "--api-key", key, "--project", project, *more)

    def current(self, url=None):
        return self.stored()[url or self.url]["current_profile"]

    def test_auto_made_names_are_safe_and_show_four_characters_at_most(self):
        for key in (
            KEY,
            "llx-CANARY-0123456789$(a)",
            "llx-CANARY-0123456789';*&",
            "llx-CANARY-0123456789-~~~",
            "llx-abcd",
            "abc",
            "x",
            "llx-CANARY-ab\\`c",
        ):
            with self.subTest(key):
                self.write_store({})
                self.assertEqual(self.token(key).code, 0)
                (name,) = self.profiles()
                self.assertEqual(shlex.quote(name), name)
                self.assertRegex(name, "^llx-")
                for start in range(len(key) - 4):
                    self.assertNotIn(key[start : start + 5], name[len("llx-") :])
        self.write_store({})
        self.token(KEY)
        self.assertEqual(list(self.profiles()), ["llx-wxyz"])

    def test_a_login_is_named_after_its_user(self):
        for sub, email, expected in (
            ("user-1", "dev@example.com", "dev@example.com"),
            ("user-1", "dev.ops+ci@example.com", "dev.ops+ci@example.com"),
            ("user-1", None, "user-1"),
            ("user-1", "", "user-1"),
            ("auth0|7 'x", "o'neil;rm -rf@example.com", None),
            ("; $(x)", None, None),
            ("\u0436", None, None),
            ("--all", None, None),
        ):
            with self.subTest(sub=sub, email=email):
                self.write_store({})
                self.cloud.auto_approve = {"sub": sub, "email": email}
                result = self.call("auth", "login", "--project", "proj-alpha")
                self.assertEqual(result.code, 0, result.err)
                (name,) = self.profiles()
                self.assertEqual(shlex.quote(name), name)
                self.assertNotEqual(name[0], "-")
                if expected:
                    self.assertEqual(name, expected)

    def test_taken_names_and_the_same_key_again(self):
        twin = "llx-CANARY-another-key-wxyz"
        for step, (key, project, expected) in enumerate(
            (
                (KEY, "proj-alpha", "llx-wxyz"),
                (twin, "proj-alpha", "llx-wxyz-2"),
                (KEY, "proj-alpha", "llx-wxyz"),
                (KEY, "proj-beta", "llx-wxyz-3"),
                (twin, "proj-alpha", "llx-wxyz-2"),
            )
        ):
            with self.subTest(step=step):
                self.assertEqual(self.token(key, project).code, 0)
                self.assertEqual(self.current(), expected)
        self.assertEqual(len(self.profiles()), 3)

    def test_two_users_with_one_address_are_two_profiles(self):
        for sub in ("user-1", "user-2", "user-1"):
            self.cloud.auto_approve = {"sub": sub, "email": "dev@example.com"}
            self.assertEqual(self.call("auth", "login", "--project", "proj-alpha").code, 0)
        self.assertEqual(
            {name: profile["sub"] for name, profile in self.profiles().items()},
            {"dev@example.com": "user-1", "dev@example.com-2": "user-2"},
        )

    def test_a_chosen_name_replaces_a_key_but_no_login(self):
        self.assertEqual(self.token(KEY, "proj-alpha", "--name", "ci").code, 0)
        self.assertEqual(self.token(OTHER_KEY, "proj-beta", "--name", "ci").code, 0)
        profile = self.profiles()["ci"]
        self.assertEqual(
            (profile["api_key"], profile["project_id"]), (OTHER_KEY, "proj-beta")
        )
        self.assert_nowhere(KEY)
        self.log_in()
        before = file_bytes(self.store_path)
        self.cloud.reset()
        self.assert_one_error(self.token(KEY, "proj-alpha", "--name", "dev@example.com"))
        self.assertEqual((self.cloud.requests, file_bytes(self.store_path)), ([], before))

    def test_the_current_profile_is_one_for_each_environment(self):
        other = "https://other.example.com"
        self.token(KEY, "proj-alpha", "--name", "here")
        self.call("environments", "add", other, "--no-verify")
        self.call(
            "auth",
            "token",
            "--no-verify",
            "--api-key",
            OTHER_KEY,
            "--project",
            "p",
            "--name",
            "there",
        )
        self.call("environments", "use", self.url)
        self.assertEqual((self.current(), self.current(other)), ("here", "there"))
        self.call("environments", "use", other)
        self.assertEqual(load(self.call("config", "-o", "json").out)["profile"], "there")
        self.call("environments", "use", self.url)
        self.assertEqual(load(self.call("config", "-o", "json").out)["profile"], "here")
        self.assertEqual(self.call("auth", "logout", "here").code, 0)
        self.assertEqual((self.current(), self.current(other)), (None, "there"))

    def test_deleting_another_profile_keeps_the_selection(self):
        self.token(OTHER_KEY)
        self.token(KEY)
        self.assertEqual(self.call("auth", "logout", "llx-abcd").code, 0)
        self.assertEqual(self.current(), "llx-wxyz")

    def test_the_project_name_is_stored_when_it_is_chosen(self):
        self.token(KEY)
        self.assertEqual(self.call("projects", "use", "proj-beta").code, 0)
        self.cloud.reset()
        shown = load(self.call("config", "-o", "json").out)
        self.assertEqual(
            (shown["project_id"], shown["project_name"]), ("proj-beta", "Beta")
        )
        self.assertEqual(self.cloud.requests, [])

    def test_ten_thousand_profiles(self):
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "proj-alpha"}
        self.write_store({"p%05d" % number: profile for number in range(10000)}, "p00001")
        rows = load(self.call("auth", "get", "-o", "json").out)
        self.assertEqual((len(rows), rows[-1]["name"]), (10000, "p09999"))
        self.assertEqual(self.call("auth", "logout", "p00001").code, 0)
        self.assertEqual(self.call("auth", "use", "p09999").code, 0)
        self.assertEqual((len(self.profiles()), self.current()), (9999, "p09999"))


# ========================================================================================
# http: every endpoint under every fault, hostile redirects, TLS, proxies, retries
# ========================================================================================

CONTROL = "/api/v1beta1/deployments"
VERSION = "/api/v1beta1/deployments-public/version"
PROJECT_LIST = CONTROL + "/list-projects"
ORGANIZATION_LIST = CONTROL + "/organizations"
DISCOVERY = "/api/v1/auth/oidc/discovery"
CONFIGURATION = "/oidc/.well-known/openid-configuration"
DEVICE_CODE = "/oidc/device_authorization"
TOKEN, REVOKE = "/oidc/token", "/oidc/revoke"
ME, API_KEYS, KEY_ID = "/api/v1/auth/me", "/api/v1/api-keys", "key-stored"
LOGIN = ["auth", "login", "--project", "proj-alpha"]
TOKEN_BOTH = ["auth", "token", "--api-key", OTHER_KEY, "--project", "proj-beta"]
ELSEWHERE = "https://elsewhere.invalid"

# How a command ends when one answer goes wrong: the kind's name -> its fault and exit code.
# behaviour.md: 5 is worth another try, 4 is a rejected credential, any other no is 1.
FAST_FAULTS = {
    "refused": (None, {}, 5),
    "reset": ("reset", {}, 5),
    "close": ("close", {}, 5),
    "truncated": ("truncated", {}, 5),
    "short length": ("short_length", {}, 5),
    "bad chunk": ("bad_chunk", {}, 5),
    "html": ("html", {}, 5),
    "not JSON": ("not_json", {}, 5),
    "wrong shape": ("wrong_shape", {}, 5),
    "huge": ("huge", {}, 5),
    "deep": ("deep", {}, 5),
    "401": ("status", {"status": 401}, 4),
    "403": ("status", {"status": 403}, 1),
    "404": ("status", {"status": 404}, 1),
    "429": ("status", {"status": 429, "headers": {"retry-after": "0"}}, 5),
    "429 for an hour": ("status", {"status": 429, "headers": {"retry-after": "3600"}}, 5),
    "500": ("status", {"status": 500}, 5),
    "503": ("status", {"status": 503}, 5),
    "redirect": ("redirect", {}, 1),
    "loop": ("loop", {}, 1),
}
SLOW_FAULTS = {
    "silence": ("silence", {}, 5),
    "drip": ("drip", {"delay": 0.05, "part": "all"}, 5),
    "pause": ("pause", {}, 5),
}
# What is waited for with the endpoint that fails; all else has time enough on the
# busiest machine.
SHORT_WAITS = {
    "silence": {"ANSWER_TIMEOUT": 0.4, "PAUSE_TIMEOUT": 0.4, "WHOLE_TIMEOUT": 20},
    "drip": {"ANSWER_TIMEOUT": 20, "PAUSE_TIMEOUT": 20, "WHOLE_TIMEOUT": 1},
    "pause": {"ANSWER_TIMEOUT": 20, "PAUSE_TIMEOUT": 0.8, "WHOLE_TIMEOUT": 20},
}
# How often a GET is sent: twice more after a failed connection and after these refusals.
GETS_SENT = {
    "reset": 3,
    "close": 3,
    "429": 3,
    "503": 3,
    "429 for an hour": 1,
    "500": 1,
    "401": 1,
    "403": 1,
    "404": 1,
    "html": 1,
    "huge": 1,
    "silence": 1,
    "drip": 1,
    "pause": 1,
    "redirect": 1,
    "refused": 0,
}
# While polling, all that is no answer of the provider's is waited out.
WAITED_OUT = dict.fromkeys(
    (
        "refused",
        "reset",
        "close",
        "truncated",
        "bad chunk",
        "429",
        "429 for an hour",
        "500",
        "503",
        "silence",
        "drip",
        "pause",
        "html",
        "not JSON",
        "wrong shape",
        "short length",
        "huge",
        "deep",
        "redirect",
        "loop",
        "401",
        "403",
        "404",
    ),
    0,
)
# A login keeps its key where the server does not say that it is gone.
KEY_KEPT = dict.fromkeys(set(FAST_FAULTS) | set(SLOW_FAULTS), 0)
# A profile goes whatever the server says; what has no body cannot be cut or misread.
KEY_MAY_WORK = dict.fromkeys(KEY_KEPT, 1)
KEY_DELETED = dict(
    KEY_MAY_WORK,
    **dict.fromkeys(
        (
            "truncated",
            "short length",
            "bad chunk",
            "not JSON",
            "wrong shape",
            "deep",
            "401",
            "404",
            "pause",
        ),
        0,
    ),
)
LOGGED_OUT = dict.fromkeys(KEY_KEPT, 0)

Endpoint = collections.namedtuple("Endpoint", "path method argv start times codes")

ENDPOINTS = {
    "version": Endpoint(VERSION, "GET", ["environments", "add", "URL"], "elsewhere", 9, {}),
    "version for organizations": Endpoint(
        VERSION, "GET", ["organizations", "get"], "key", 9, {}
    ),
    "organizations": Endpoint(
        ORGANIZATION_LIST, "GET", ["organizations", "get"], "key", 9, {}
    ),
    "projects": Endpoint(PROJECT_LIST, "GET", ["projects", "get"], "key", 9, {}),
    "project of a profile": Endpoint(
        PROJECT_LIST, "GET", ["projects", "use", "proj-beta"], "key", 9, {}
    ),
    "projects of a key": Endpoint(
        PROJECT_LIST, "GET", TOKEN_BOTH[:4], "key", 9, {"403": 4}
    ),
    "projects of a key, both flags": Endpoint(
        PROJECT_LIST, "GET", TOKEN_BOTH, "key", 9, {"403": 4, "refused": 0, "silence": 0}
    ),
    "projects for the status": Endpoint(
        PROJECT_LIST,
        "GET",
        ["auth", "status"],
        "key",
        9,
        {"403": 4, "404": 5, "redirect": 5, "loop": 5},
    ),
    "deployments": Endpoint(CONTROL, "GET", ["deployments", "get"], "key", 9, {}),
    "deployment": Endpoint(
        CONTROL + "/invoices", "GET", ["deployments", "get", "invoices"], "key", 9, {}
    ),
    "discovery": Endpoint(DISCOVERY, "GET", LOGIN, "key", 9, {}),
    "configuration": Endpoint(CONFIGURATION, "GET", LOGIN, "key", 9, {}),
    "device code": Endpoint(DEVICE_CODE, "POST", LOGIN, "key", 9, {}),
    "poll": Endpoint(TOKEN, "POST", LOGIN, "key", 1, WAITED_OUT),
    "projects of a login": Endpoint(PROJECT_LIST, "GET", LOGIN, "key", 9, {}),
    "me": Endpoint(ME, "GET", LOGIN, "login", 9, KEY_KEPT),
    "new key": Endpoint(API_KEYS, "POST", LOGIN, "key", 9, {}),
    "deleted key": Endpoint(
        API_KEYS + "/" + KEY_ID,
        "DELETE",
        ["auth", "logout", "main"],
        "login",
        1,
        KEY_DELETED,
    ),
    "refresh": Endpoint(
        TOKEN, "POST", ["auth", "logout", "main"], "expired", 9, KEY_MAY_WORK
    ),
    "revocation": Endpoint(
        REVOKE, "POST", ["auth", "logout", "main"], "login", 9, LOGGED_OUT
    ),
}

# Reads shares of cases from stdin and works on all shares at once, each in a process of
# its own,
# since a silence must be waited for. Each share's results go to a file.
SLOW_WORKER = """
import io, json, os, ssl, sys, time, urllib.request
shares, folder = json.load(sys.stdin)
sys.path.insert(0, folder)
import llamactl
llamactl.RETRY_DELAYS, llamactl.DEFAULT_INTERVAL, send = (0, 0), 0.01, llamactl.Client.send

def outcome(argv, environment, endpoint, times, waits):
    llamactl.KEY_TIMEOUT = 2.0  # its beginning is not seen from here
    llamactl.REVOCATION_TIMEOUT = 2.0
    faults = [True] * times  # what is asked again after them must have time to answer
    def send_in_time(client, method, url, *rest, **options):
        fails = url.partition("?")[0].endswith(endpoint) and bool(faults) and faults.pop()
        for name, value in waits.items():
            setattr(llamactl, name, value if fails else 20)
        return send(client, method, url, *rest, **options)

    llamactl.Client.send = send_in_time
    os.environ.clear()
    os.environ.update(environment)
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdout = io.TextIOWrapper(out, "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, "utf-8", write_through=True)
    started = time.monotonic()
    code = llamactl.main(argv)
    texts = [stream.getvalue().decode("utf-8") for stream in (out, err)]
    return [code] + texts + [time.monotonic() - started]

for path, cases in shares:
    if os.fork() == 0:
        with open(path, "w") as file:
            json.dump([outcome(*case) for case in cases], file)
        os._exit(0)
for share in shares:
    os.wait()
"""


class NetworkCase(Case):
    """A stand-in, another origin that must hear nothing, and time-outs that luck cannot
    hit."""

    def setUp(self):
        Case.setUp(self)
        self.cloud = self.cloud_server()
        self.cloud.add_key(OTHER_KEY)
        self.other = self.another_origin()
        # a login that waits in vain, for want of a guard, fails instead of hanging
        self.cloud.expires_in = self.other.cloud.expires_in = 5

    def another_origin(self, **options):
        stand_in = StandIn(**options).start()
        self.addCleanup(stand_in.stop)
        return stand_in

    def move(self, name):
        """Go on in a home of its own, so that the cases of one test share nothing."""
        self.folder = os.path.join(self.home, re.sub("[^a-z0-9]+", "-", name.lower()))
        self.store_path = os.path.join(self.folder, "profiles.json")
        self.env["LLAMACTL_CONFIG_DIR"] = self.folder

    def with_login(self, expired=False, **extra):
        """A login that the provider knows, whose profile is `main`."""
        login = {
            "sub": "user-1",
            "email": "dev@example.com",
            "client_id": "llamactl-cli",
            "scope": "email offline_access openid profile",
            "revoked": False,
        }
        tokens = self.cloud._tokens(login).body
        key = "llx-CANARY-of-the-login-0123"
        self.cloud.add_key(key)["id"] = KEY_ID
        if expired:
            self.cloud.expire_access_tokens()
        profile = dict(
            {
                "auth_type": "oidc",
                "sub": "user-1",
                "issuer": self.cloud.base_url + "/oidc",
                "provider": self.pinned(),
                "email": "dev@example.com",
                "api_key_id": KEY_ID,
                "access_token": tokens["access_token"],
                "refresh_token": tokens["refresh_token"],
                "access_expires_at": time.time() + (-1 if expired else 300),
            },
            **extra,
        )
        self.with_profile(key=key, **profile)
        return profile

    def pinned(self, **changes):
        """What a login keeps of its provider."""
        issuer = self.cloud.base_url + "/oidc"
        return dict(
            {
                "issuer": issuer,
                "client_id": "llamactl-cli",
                "token_endpoint": issuer + "/token",
                "revocation_endpoint": issuer + "/revoke",
            },
            **changes,
        )

    def start(self, how):
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

    def bytes_stored(self):
        with open(self.store_path, "rb") as file:
            return file.read()

    def error_of(self, result, code=None):
        """The one line of error; every other line is one that a failing command may
        print."""
        lines = result.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        self.assertEqual(1, len(errors), result.err)
        for line in lines:
            self.assertRegex(
                line,
                r"\A((error|hint|warning): |Logging in to|Open|    \S|Or open|profile )",
            )
        if code is None:
            self.assertNotEqual(0, result.code)
        else:
            self.assertEqual(code, result.code, result.err)
        return errors[0]

    def fails(self, *argv, code=None, **options):
        """Run ARGV, which must fail in one line and leave the store as it was; that
        line."""
        before = self.bytes_stored()
        result = self.call(*argv, **options)
        error = self.error_of(result, code)
        self.assertEqual(before, self.bytes_stored())
        return error

    def succeeds(self, *argv, **options):
        result = self.call(*argv, **options)
        self.assertEqual(0, result.code, result.err)
        return result

    def paths_sent(self):
        """What the stand-in was asked, in order, as `METHOD path`."""
        return ["%s %s" % (request.method, request.path) for request in self.cloud.requests]


def closed_port():
    """A bound socket that does not listen: connections to its port are refused."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return holder


@contextlib.contextmanager
def refusing(path, times=99):
    """Requests to PATH alone meet a closed port, so that a login fails at any one step."""
    real = http.client.HTTPConnection.request
    left = [None] * times

    def request(connection, method, url, *rest, **options):
        if url.partition("?")[0].endswith(path) and left:
            left.pop()
            connection.port = holder.getsockname()[1]
        return real(connection, method, url, *rest, **options)

    with contextlib.closing(closed_port()) as holder:
        with unittest.mock.patch.object(http.client.HTTPConnection, "request", request):
            yield


def certificate_file(folder):
    path = os.path.join(folder, "trusted.pem")
    with open(path, "w") as file:
        file.write(TLS_CERTIFICATE)
    return path


class FaultMatrix(NetworkCase):
    """Each endpoint x each fault: one line, the right code, the store as before, no
    credential
    anywhere else."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.cloud.interval = 0.001

    def argv(self, endpoint):
        return [self.url if word == "URL" else word for word in endpoint.argv]

    def queue(self, endpoint, kind, fault, options):
        # A poll whose answer is lost, but waited out, must not have used the code up.
        self.cloud.pending_polls = (
            1 if endpoint.codes is WAITED_OUT and kind in WAITED_OUT else 0
        )
        if fault == "redirect":
            options = dict(options, to=options.get("to", self.other.url) + endpoint.path)
        if fault:
            self.cloud.fault(
                endpoint.path, fault, endpoint.times, endpoint.method, **options
            )

    def judge(self, endpoint, kind, code, result, before):
        expected = endpoint.codes.get(kind, code)
        if endpoint.codes is KEY_DELETED and kind == "drip" and result.code == 0:
            expected = 0  # the answer came too late, but there was time to ask for the key
        if endpoint.argv[1] == "status" and expected in (4, 5):
            hint = "hint: llamactl auth token --name main\n" if expected == 4 else ""
            self.assertEqual((result.code, result.err), (expected, hint))
        elif expected:
            self.error_of(result, expected)
        else:
            self.assertEqual(0, result.code, result.err)
            self.assertNotIn("error:", result.err)
        if endpoint.argv[1] == "logout":
            self.assertEqual({}, self.profiles(), "a profile outlived its logout")
        elif expected == 0:
            self.judge_done(endpoint, kind, result)
        else:
            self.assertEqual(before, self.bytes_stored())
        self.assertEqual([], self.other.cloud.requests)
        self.judge_count(endpoint, kind)

    def judge_done(self, endpoint, kind, result):
        """The documented exceptions: what is stored although an answer went wrong."""
        profile = self.profiles()[self.stored()[self.url]["current_profile"]]
        if endpoint.argv == TOKEN_BOTH:
            self.assertEqual(
                (OTHER_KEY, "proj-beta"), (profile["api_key"], profile["project_id"])
            )
            self.assertIn("warning: ", result.err)
        elif endpoint.path == ME:
            kept = profile["api_key_id"] == KEY_ID
            # only a 401 says that the key is gone; another no would leave it behind, alive
            self.assertEqual(kind != "401", kept)
        self.assertIn(profile["api_key"], self.cloud.keys_alive() + [OTHER_KEY])

    def judge_count(self, endpoint, kind):
        sent = self.cloud.count(endpoint.method, endpoint.path)
        if endpoint.method == "GET" and kind in GETS_SENT and "logout" not in endpoint.argv:
            self.assertEqual(GETS_SENT[kind], sent)
        elif endpoint.path == API_KEYS:
            self.assertEqual(0 if kind == "refused" else 1, sent, "a key is created once")

    def run_case(self, name, endpoint, kind):
        fault, options, code = FAST_FAULTS[kind]
        with self.subTest(endpoint=name, fault=kind):
            self.start(endpoint.start)
            self.queue(endpoint, kind, fault, options)
            before = self.bytes_stored()
            started = time.monotonic()
            with contextlib.ExitStack() as stack:
                if kind == "refused":
                    stack.enter_context(refusing(endpoint.path, endpoint.times))
                result = self.call(*self.argv(endpoint))
            self.assertLess(time.monotonic() - started, 8)
            self.judge(endpoint, kind, code, result, before)

    def test_fast_faults(self):
        for name, endpoint in ENDPOINTS.items():
            for kind in FAST_FAULTS:
                self.run_case(name, endpoint, kind)

    def test_redirects_from_https_to_http(self):
        secure = self.another_origin(tls=True)
        self.cloud, self.url = secure.cloud, secure.url
        self.cloud.add_key(KEY)
        self.cloud.add_key(OTHER_KEY)
        self.cloud.auto_approve = {}
        self.cloud.interval = 0.001
        self.env["SSL_CERT_FILE"] = certificate_file(self.home)
        for name, endpoint in ENDPOINTS.items():
            self.run_case(name, endpoint, "redirect")

    def test_slow_faults(self):
        cases = [(name, kind) for name in ENDPOINTS for kind in SLOW_FAULTS]
        places = [self.slow_case(name, kind) for name, kind in cases]
        orders = [
            [argv, env, ENDPOINTS[name].path, ENDPOINTS[name].times, SHORT_WAITS[kind]]
            for (name, kind), (_, argv, env, _) in zip(cases, places)
        ]
        paths = [
            os.path.join(self.home, "results-%d.json" % number) for number in range(22)
        ]
        shares = [(path, orders[number::22]) for number, path in enumerate(paths)]
        task = json.dumps([shares, os.path.dirname(os.path.abspath(PROGRAM))])
        worker = subprocess.Popen(
            [sys.executable, "-c", SLOW_WORKER],
            stdin=subprocess.PIPE,
            env=self.env,
            start_new_session=True,
        )
        try:
            worker.communicate(task.encode("ascii"), timeout=30)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        for number, path in enumerate(paths):
            with open(path) as file:
                results = json.load(file)
            for case, place, result in zip(cases[number::22], places[number::22], results):
                self.judge_slow(case, place, result)

    def slow_case(self, name, kind):
        """A stand-in and a home for the case: (what to restore, argv, environment,
        store)."""
        endpoint, (fault, options, _) = ENDPOINTS[name], SLOW_FAULTS[kind]
        self.move(name + "-" + kind)
        self.cloud = self.cloud_server()
        self.cloud.add_key(OTHER_KEY)
        self.cloud.interval = 0.001
        self.start(endpoint.start)
        self.queue(endpoint, kind, fault, options)
        restored = (self.cloud, self.url, self.folder, self.store_path)
        return restored, self.argv(endpoint), dict(self.env), self.bytes_stored()

    def judge_slow(self, case, place, result):
        (name, kind), (restored, _, _, before) = case, place
        with self.subTest(endpoint=name, fault=kind):
            self.cloud, self.url, self.folder, self.store_path = restored
            code, out, err, seconds = result
            self.assertLess(seconds, 12)
            result = self.note(code, out.encode(), err.encode())
            self.judge(ENDPOINTS[name], kind, SLOW_FAULTS[kind][2], result, before)


class Redirects(NetworkCase):
    """behaviour.md: followed for a GET only, never to another scheme, host or port."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.with_profile()

    def test_same_origin_is_followed_with_the_key(self):
        for status in (301, 302, 303, 307, 308):
            for to in (ORGANIZATION_LIST, self.url + ORGANIZATION_LIST, "organizations"):
                with self.subTest(status=status, to=to):
                    self.cloud.reset()
                    self.cloud.fault(
                        ORGANIZATION_LIST, "redirect", status=status, to=to + "?again"
                    )
                    self.succeeds("organizations", "get")
                    sent = self.cloud.sent(ORGANIZATION_LIST)
                    self.assertEqual(2, len(sent))
                    self.assertEqual("Bearer " + KEY, sent[1].headers["authorization"])

    def test_elsewhere_is_refused(self):
        port = self.url.rpartition(":")[2]
        for to in (
            self.other.url + "/",
            "http://localhost:%s/" % port,
            "//localhost:%s/" % port,
            "https://127.0.0.1:%s/" % port,
            "http://user@127.0.0.1:%s/" % port,
            "http://127.0.0.1/",
            "ftp://127.0.0.1:%s/" % port,
            "file:///etc/hostname",
            "data:application/json,{}",
            "javascript:alert(1)",
            "http://127.0.0.1:%s\\@localhost/" % port,
            "http://:0/",
            "http://127.0.0.1:99999999/",
            "%s/?key=%s" % (self.other.url, KEY),
        ):
            with self.subTest(to=to):
                self.cloud.reset()
                self.cloud.fault(PROJECT_LIST, "redirect", to=to)
                self.fails("projects", "get", code=1)
                self.assertEqual(1, len(self.cloud.requests))
                self.assertEqual([], self.other.cloud.requests)

    def test_a_location_that_cannot_be_read(self):
        for to in ("http://[::1", "http://[::1]:port/", "\x00", "", "\u00e9://"):
            with self.subTest(to=to):
                self.cloud.reset()
                self.cloud.fault(PROJECT_LIST, "redirect", 99, to=to)
                self.fails("projects", "get", code=1)
                self.assertLess(len(self.cloud.requests), 10)

    def test_a_post_or_delete_is_never_repeated_elsewhere(self):
        for path in (DEVICE_CODE, TOKEN, API_KEYS):
            for status in (301, 302, 303, 307, 308):
                with self.subTest(path=path, status=status):
                    self.cloud.reset()
                    self.with_profile()
                    to = path + "?again"
                    self.cloud.fault(path, "redirect", 1, to=to, status=status)
                    result = self.call(*LOGIN)
                    self.assertEqual(0 if path == TOKEN else 1, result.code)  # waited out
                    sent = self.cloud.sent(path)
                    self.assertEqual(2 if path == TOKEN else 1, len(sent))
                    self.assertEqual([], [each for each in sent if each.query])
                    self.assertIn("redirects to", result.err)
        self.with_login()
        path = API_KEYS + "/" + KEY_ID
        self.cloud.reset()
        self.cloud.fault(path, "redirect", 9, to=path + "?again")
        self.error_of(self.call("auth", "logout", "main"), 1)
        self.assertEqual(1, len(self.cloud.sent(path)))


class ServerWords(NetworkCase):
    """What a server says in an error arrives, and only its harmless part."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.with_profile()

    def error(self, status, body, **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.cloud.fault(PROJECT_LIST, "status", status=status, body=body, headers=headers)
        return self.fails("projects", "get")

    def test_status_detail_and_request_id(self):
        error = self.error(
            422,
            {
                "detail": [
                    {"loc": ["query"], "msg": "first wrong"},
                    {"loc": [], "msg": "second wrong"},
                    "third",
                    None,
                ]
            },
        )
        for words in ("422", "first wrong", "second wrong", "req-"):
            self.assertIn(words, error)
        error = self.error(
            403,
            {"detail": "not for you"},
            x_request_id=None,
            x_correlation_id="correlated-7",
        )
        for words in ("403", "not for you", "correlated-7"):
            self.assertIn(words, error)

    def test_a_gateway_without_json(self):
        for body in ("<html><h1>Forbidden</h1></html>", "", b"\xff\xfe", "[" * 100000):
            self.assertIn("418", self.error(418, body))

    def test_hostile_words(self):
        error = self.error(
            400,
            {"detail": "a\x1b[2J\x07\u202eb\nerror: forged\r\ud800"},
            x_request_id="r\x1b[31m",
        )
        self.assertNotRegex(error, "[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]")

    def test_an_echoed_key_is_masked(self):
        # tearDown looks for the canary in all that was printed
        for body in (
            {"detail": "no such key " + KEY},
            {"detail": [{"msg": KEY}]},
            {"error": KEY},
        ):
            self.assertIn("400", self.error(400, body, x_request_id=KEY))

    def test_a_long_list_is_cut(self):
        """80,000 projects and a wrong --project made one line of 3.5 MB."""
        self.cloud.projects = [
            {
                "project_id": "project-%d" % number,
                "project_name": None,
                "deployment_count": 0,
            }
            for number in range(80000)
        ]
        for argv in (
            ["projects", "use", "nope"],
            ["projects", "use"],
            TOKEN_BOTH[:-1] + ["nope"],
        ):
            with self.subTest(argv=argv):
                error = self.fails(*argv)
                self.assertIn("project-19, and 79980 more", error)
                self.assertNotIn("project-20", error)

    def test_small_chunks_take_little_memory(self):
        """Each was an object of its own until the last had come."""
        try:
            import tracemalloc  # noqa: F401 (the process below uses it)
        except ImportError:
            self.skipTest("PyPy cannot trace its memory")
        body = json.dumps({"projects": [], "filler": "x" * 200000}).encode("ascii")
        script = (
            "import sys, tracemalloc\nsys.path.insert(0, %r)\n"
            "import llamactl, threading, http.client, urllib.request, ssl\n"
            "tracemalloc.start()\n"
            "code = llamactl.main(['projects', 'get'])\n"
            "peak = tracemalloc.get_traced_memory()[1] >> 10\n"
            "sys.exit(code or ('peak: %%d KiB' %% peak))\n" % HERE
        )
        self.cloud.fault(PROJECT_LIST, "chunks", 9, body=body)
        process = subprocess.Popen(
            PYTHON + ["-c", script],
            env=self.env,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=60)
        (peak,) = re.findall("peak: ([0-9]+) KiB", err.decode())
        self.assertLess(int(peak), 6000)

    def test_a_gateway_that_answers_a_poll(self):
        """Told once, with its status, and waited out: the provider said nothing yet."""
        self.cloud.fault(TOKEN, "status", status=403, body="<html>Blocked</html>", times=2)
        told = self.succeeds(*LOGIN).err
        self.assertEqual(1, told.count("answered 403"), told)
        self.assertIn("still waiting", told)


class TlsCase(NetworkCase):
    """The environment is an https one."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.plain, secure = self.other, self.another_origin(tls=True)
        self.cloud, self.url = secure.cloud, secure.url
        self.cloud.add_key(KEY)
        self.cloud.auto_approve, self.cloud.interval, self.cloud.expires_in = {}, 0.01, 5
        self.pem = certificate_file(self.home)
        self.with_profile()


class Tls(TlsCase):
    def test_unknown_certificate(self):
        self.assertIn("TLS", self.fails("projects", "get", code=5))
        self.assertEqual([], self.cloud.requests)

    def test_verification_cannot_be_switched_off(self):
        self.env["PYTHONHTTPSVERIFY"] = "0"
        with unittest.mock.patch.object(
            ssl, "_create_default_https_context", ssl._create_unverified_context
        ):
            self.fails("projects", "get", code=5)
        self.assertEqual([], self.cloud.requests)

    def test_no_secret_of_the_connection_is_logged(self):
        path = os.path.join(self.home, "keys.log")
        env = {"SSL_CERT_FILE": self.pem, "SSLKEYLOGFILE": path}
        result = self.process("projects", "get", env=env)
        self.assertEqual((0, False), (result.code, os.path.exists(path)), result.err)

    def least_version(self, policy):
        """What the program demands where the system's policy demands POLICY."""
        context = types.SimpleNamespace(
            minimum_version=policy,
            hostname_checks_common_name=True,
            load_default_certs=lambda: None,
            load_verify_locations=lambda file, folder: None,
        )
        fake = types.SimpleNamespace(**vars(ssl))
        fake.SSLContext = lambda protocol: context
        with unittest.mock.patch.dict(sys.modules, ssl=fake):
            llamactl.tls_context(llamactl.read_process())
        self.assertIs(context.hostname_checks_common_name, False)
        return context.minimum_version

    @unittest.skipUnless(hasattr(ssl, "TLSVersion"), "3.6 cannot say which it takes")
    def test_at_least_1_2_and_what_the_system_asks(self):
        versions = ssl.TLSVersion
        for policy, least in (
            (versions.MINIMUM_SUPPORTED, versions.TLSv1_2),
            (versions.TLSv1_2, versions.TLSv1_2),
            (versions.TLSv1_3, versions.TLSv1_3),
        ):
            with self.subTest(policy=policy):
                self.assertEqual(self.least_version(policy), least)

    def test_wrong_host(self):
        real = socket.getaddrinfo
        port = int(self.url.rpartition(":")[2])
        self.url = "https://elsewhere.invalid:%d" % port
        self.with_profile()

        def resolved(host, *rest, **options):
            return real(
                "127.0.0.1" if host == "elsewhere.invalid" else host, *rest, **options
            )

        with unittest.mock.patch.object(socket, "getaddrinfo", resolved):
            error = self.fails("projects", "get", code=5, env={"SSL_CERT_FILE": self.pem})
        self.assertIn("TLS", error)
        self.assertEqual([], self.cloud.requests)

    def test_bundles(self):
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            with self.subTest(variable=name):
                self.succeeds("projects", "get", env={name: self.pem})
        # the more specific variable wins, and a wrong one is not passed over in silence
        gone = os.path.join(self.home, "no-such.pem")
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            env = {"CURL_CA_BUNDLE": self.pem, name: gone}
            error = self.fails("projects", "get", env=env)
            self.assertIn(gone, error)
            self.assertIn(name, error)

    def test_folders_of_certificates(self):
        for name in ("SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            with self.subTest(variable=name):
                surroundings = llamactl.Process({name: self.home}, "", "", False)
                self.assertEqual(
                    llamactl.find_ca_bundle(surroundings), (None, self.home, name)
                )
                self.fails("projects", "get", code=5, env={name: self.home})  # an empty one

    def test_bundles_where_linux_systems_keep_them(self):
        """A self-compiled Python finds none by itself."""
        none = ssl.get_default_verify_paths()._replace(cafile=None, capath=None)
        places = (os.path.join(self.home, "gone.pem"), self.pem)
        with unittest.mock.patch.object(
            ssl, "get_default_verify_paths", return_value=none
        ), unittest.mock.patch.object(llamactl, "CA_BUNDLES", places):
            self.succeeds("projects", "get")
            status = self.succeeds("auth", "status", "-o", "json")
        self.assertEqual(json.loads(status.out)["ca_bundle"], self.pem)

    def test_whole_login_and_logout(self):
        self.env["SSL_CERT_FILE"] = self.pem
        self.succeeds(*LOGIN)
        self.succeeds("auth", "logout", "dev@example.com")
        self.assertEqual([KEY], self.cloud.keys_alive())

    def test_no_handshake_counts_as_unanswered(self):
        with contextlib.closing(socket.socket()) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(5)
            self.url = "https://127.0.0.1:%d" % listener.getsockname()[1]
            self.write_store({})
            with self.impatient():
                result = self.succeeds(*TOKEN_BOTH)
        self.assertIn("warning: ", result.err)
        self.assertEqual(1, len(self.profiles()))

    def test_plain_http_behind_https_port(self):
        port = self.plain.url.rpartition(":")[2]
        self.url = "https://127.0.0.1:" + port
        self.with_profile()
        self.fails("projects", "get", code=5, env={"SSL_CERT_FILE": self.pem})
        self.fails(*TOKEN_BOTH, code=5, env={"SSL_CERT_FILE": self.pem})


class NamedUrls(TlsCase):
    """Every URL that a server names must be https where the environment is; else exit 1 and
    nothing sent."""

    NAMES = ("device_authorization_endpoint", "token_endpoint", "revocation_endpoint")

    def refused(self, url, code=1):
        self.cloud.reset()
        self.fails(*LOGIN, code=code)
        self.assertEqual([], self.plain.cloud.requests, url)
        paths = [request.path for request in self.cloud.requests]
        self.assertEqual(
            [], [path for path in paths if path not in (DISCOVERY, CONFIGURATION)]
        )

    def hostile(self, path):
        plain, place = self.plain.url + path, self.url.partition("//")[2] + path
        return [
            plain,
            plain.replace("http:", "HTTP:"),
            "file:///etc/hostname",
            "ftp://" + place,
            "data:application/json,{}",
            "javascript:alert(1)",
            "//" + place,
            path,
            "https://user:secret@" + place,
            "https:" + place,
            "https://" + place + "\n",
            "https://" + place + " HTTP/1.1\r\nx: y",
            "",
            "https://",
            "gopher://" + place,
            "https://127.0.0.1:0" + path,
            "https://127.0.0.1:99999" + path,
            "http\u017f://" + place,
            "https://\u212a." + place,
            "https://" + place + "\u017f",
        ]

    def test_discovery_url(self):
        self.env["SSL_CERT_FILE"] = self.pem
        for url in self.hostile(CONFIGURATION):
            with self.subTest(url=url):
                self.cloud.discovery_overrides = {"discovery_url": url}
                self.refused(url)

    def test_endpoints(self):
        self.env["SSL_CERT_FILE"] = self.pem
        for name in self.NAMES:
            for url in self.hostile(
                self.cloud.configuration().body[name].rpartition("/")[2]
            ):
                if name == "revocation_endpoint" and not url:
                    continue  # there is none
                with self.subTest(name=name, url=url):
                    self.cloud.configuration_overrides = {name: url}
                    is_missing = url == "" and name == "token_endpoint"
                    self.refused(url, code=5 if is_missing else 1)

    def test_http_environment_may_name_http_but_nothing_else(self):
        self.cloud, self.url = self.plain.cloud, self.plain.url
        self.plain = self.another_origin()
        self.with_profile()
        for url in self.hostile(CONFIGURATION)[2:]:
            with self.subTest(url=url):
                self.cloud.discovery_overrides = {"discovery_url": url}
                self.refused(url)

    def test_an_environment_on_this_machine_names_http_on_this_machine_alone(self):
        self.cloud, self.url = self.plain.cloud, self.plain.url
        self.with_profile()
        for name in self.NAMES + ("discovery_url",):
            with self.subTest(name=name):
                url = {name: "http://id.example/" + name}
                self.cloud.configuration_overrides = url
                self.cloud.discovery_overrides = url if name == "discovery_url" else {}
                self.assertIn("beyond this machine", self.fails(*LOGIN, code=1))

    def test_no_url_at_all(self):
        self.env["SSL_CERT_FILE"] = self.pem
        for value in (None, 7, ["https://127.0.0.1/"], {}):
            with self.subTest(value=value):
                self.cloud.configuration_overrides = {"token_endpoint": value}
                self.fails(*LOGIN)
                self.assertEqual(0, self.cloud.count("POST", DEVICE_CODE))

    def test_what_is_no_url_to_some_python_is_none_to_any(self):
        """A long s, a Kelvin sign, a bracketed host that is no address: one line, and
        on."""
        self.env["SSL_CERT_FILE"] = self.pem
        for url in (
            "http\u017f://127.0.0.1/",
            "https://\u017f.invalid/",
            "https://\u212a.invalid/",
            "https://[:::]/",
            "https://[1.2.3.4]/",
            "https://[::1::]:1/",
            "https://[fe]/a",
        ):
            for name in ("discovery_url",) + self.NAMES[:1]:
                with self.subTest(url=url, name=name):
                    self.cloud.reset()
                    self.cloud.discovery_overrides = self.cloud.configuration_overrides = {
                        name: url
                    }
                    self.write_store({})
                    self.error_of(self.call(*LOGIN))
            self.with_login(expired=True, provider=self.pinned(token_endpoint=url))
            result = self.call("auth", "logout", "main")
            self.assertIn(KEY_ID, self.error_of(result, 1))
            self.assertEqual({}, self.profiles())

    def test_logout_sends_no_token_in_the_clear(self):
        self.env["SSL_CERT_FILE"] = self.pem
        for name in ("token_endpoint", "revocation_endpoint"):
            with self.subTest(name=name):
                pinned = self.pinned(**{name: self.plain.url + TOKEN})
                self.with_login(expired=True, provider=pinned)
                self.error_of(self.call("auth", "logout", "main"), 1)
                self.assertEqual([], self.plain.cloud.requests)


class Origins(NetworkCase):
    """A provider on another origin hears of no API key, and the API of no refresh token."""

    def test_each_credential_stays_at_home(self):
        provider = StandIn(
            self.cloud
        ).start()  # one state, two origins: tokens are valid at both
        self.addCleanup(provider.stop)
        self.cloud.access_token_lifetime = 1  # so that refreshing happens as well
        self.succeeds(*LOGIN)
        self.succeeds("auth", "logout", "dev@example.com")
        self.assertGreater(self.cloud.refreshes, 0)
        at_home = self.url.partition("//")[2]
        for request in self.cloud.requests:
            sent = str(request.headers) + request.body + str(request.query)
            if request.headers["host"] == at_home:
                self.assertTrue(request.path.startswith("/api/"), request.path)
                for secret in ("rt-CANARY", "dc-CANARY"):
                    self.assertNotIn(secret, sent)
            else:
                self.assertTrue(request.path.startswith("/oidc/"), request.path)
                self.assertNotIn("authorization", request.headers)
                for secret in ("llx-", "at-CANARY"):
                    self.assertNotIn(secret, sent)
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())

    def test_a_stored_key_goes_to_no_url_but_its_own(self):
        self.with_profile()
        result = self.call("projects", "get", env={"LLAMA_CLOUD_BASE_URL": self.other.url})
        self.assertEqual(0, result.code, result.err)
        self.assertEqual([], self.other.cloud.requests)

    def test_user_agent(self):
        self.succeeds(*LOGIN)
        for request in self.cloud.requests:
            self.assertRegex(request.headers["user-agent"], r"\Allamactl/[0-9.]+\Z")


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
        NetworkCase.setUp(self)
        self.proxy, self.real_url = self.url, self.url
        self.url = "http://llama.invalid"
        self.with_profile()

    def test_used(self):
        for name in ("http_proxy", "HTTP_PROXY"):
            with self.subTest(variable=name):
                self.cloud.reset()
                result = self.succeeds("projects", "get", env={name: self.proxy})
                self.assertEqual(
                    ["llama.invalid"], [r.headers["host"] for r in self.cloud.requests]
                )
                # a key that leaves this machine unencrypted is warned about
                self.assertRegex(
                    result.err, r"\Awarning: http://llama\.invalid:80 is not encrypted"
                )

    def test_password_is_sent_and_not_shown(self):
        proxy = self.proxy.replace("//", "//somebody:CANARY-password@")
        self.succeeds("projects", "get", env={"http_proxy": proxy})
        expected = base64.b64encode(b"somebody:CANARY-password").decode("ascii")
        self.assertEqual(
            "Basic " + expected, self.cloud.requests[0].headers["proxy-authorization"]
        )
        result = self.succeeds("auth", "status", "--offline", env={"http_proxy": proxy})
        self.assertIn(self.proxy.partition("//")[2], result.out)
        self.assertNotIn("somebody", result.out + result.err)

    def test_refused(self):
        with contextlib.closing(closed_port()) as holder:
            place = "127.0.0.1:%d" % holder.getsockname()[1]
            for proxy in ("http://" + place, "http://somebody:CANARY-password@" + place):
                with self.subTest(proxy=proxy):
                    self.fails("projects", "get", code=5, env={"http_proxy": proxy})
                    result = self.call("auth", "status", env={"http_proxy": proxy})
                    self.assertEqual(5, result.code)

    def test_what_goes_to_this_machine_goes_by_no_proxy(self):
        """The key would be sent to the proxy in clear."""
        with contextlib.closing(closed_port()) as holder:
            place = "http://127.0.0.1:%d" % holder.getsockname()[1]
            port = self.real_url.rpartition(":")[2]
            for url in (self.real_url, "http://localhost:" + port):
                for name in ("http_proxy", "HTTP_PROXY"):
                    with self.subTest(url=url, name=name):
                        self.url = url
                        self.with_profile()
                        self.succeeds("projects", "get", env={name: place})
                        status = self.succeeds("auth", "status", env={name: place})
                        self.assertRegex(status.out, "(?m)^proxy +- ")

    def test_what_no_proxy_names_goes_by_none(self):
        proxy = {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
        for exempt in ("llama.invalid", "*"):
            result = self.succeeds(
                "auth",
                "status",
                "--offline",
                env=dict(proxy, NO_PROXY=exempt, no_proxy=exempt),
            )
            self.assertRegex(result.out, "(?m)^proxy +- ")

    def test_https_tunnel(self):
        """The proxy sees a host and a port, no credential; its refusal is one line."""
        self.url = "https://llama.invalid"
        self.with_profile()
        proxy = self.proxy.replace("//", "//somebody:CANARY-password@")
        with unraised_resource_warnings():
            self.fails("projects", "get", code=5, env={"https_proxy": proxy})
        self.assertNotEqual([], self.cloud.requests)
        for request in self.cloud.requests:
            self.assertEqual("CONNECT", request.method)
            self.assertNotIn("authorization", request.headers)
            self.assertNotIn("CANARY", request.path + request.body)

    def test_a_tunnel_that_is_refused(self):
        """Trouble of the proxy's is worth another try, its no is not; its words are
        nobody's."""
        self.url = "https://llama.invalid"
        self.with_profile()
        for status, tries in ((407, 1), (403, 1), (429, 1), (500, 3), (502, 3), (503, 3)):
            with self.subTest(status=status), unraised_resource_warnings():
                self.cloud.reset()
                self.cloud.fault("*", "status", 9, status=status)
                error = self.fails(
                    "projects", "get", code=5, env={"https_proxy": self.proxy}
                )
                self.assertEqual(
                    ["CONNECT"] * tries, [r.method for r in self.cloud.requests]
                )
                self.assertRegex(error, r"the proxy answered %d\Z" % status)

    def test_odd_proxies(self):
        for proxy in (
            "socks5://127.0.0.1:1",
            "http://127.0.0.1:port",
            "http://",
            "::",
            "http://[",
        ):
            with self.subTest(proxy=proxy):
                self.fails("projects", "get", env={"http_proxy": proxy})


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

        def resolved(host, *rest, **options):
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [kind + ((each, port),) for each in ("127.0.0.2", "127.0.0.1")]

        with unittest.mock.patch.object(socket, "getaddrinfo", resolved):
            with unittest.mock.patch.object(socket.socket, "connect", connect):
                self.succeeds("environments", "add", "http://two.localhost:%d" % port)
        self.assertEqual(tried, [("127.0.0.2", 1.0), ("127.0.0.1", 1.0)])

    def test_all_that_are_slow_share_the_time(self):
        waits = []

        def create(address, seconds):
            waits.append(seconds)
            raise socket.timeout("timed out")

        with unittest.mock.patch.object(socket, "getaddrinfo", lambda *_: [1, 2]):
            with unittest.mock.patch.object(socket, "create_connection", create):
                with self.assertRaises(socket.timeout):
                    llamactl.connect(("two.example", 1), 10.0)
        self.assertEqual(waits, [1.0, 5.0])


class Retries(NetworkCase):
    """Twice more for a GET, as the server asks up to 30 s; a key is created once."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.patch(RETRY_DELAYS=(0.5, 1.5))
        self.slept = []

    def send(self, method="GET", path=VERSION):
        """What becomes of one request: its status, or the exit code of its failure."""
        surroundings = llamactl.read_process()
        client = llamactl.Client(surroundings, str, str, self.slept.append, None)
        try:
            return client.send(method, self.url + path).status
        except llamactl.Failure as failure:
            return -failure.code

    def test_delays(self):
        asking = {"status": 503, "headers": {"retry-after": "7"}}
        patient = {"status": 429, "headers": {"retry-after": "30"}}
        impatient = {"status": 429, "headers": {"retry-after": "31"}}
        endless = {"status": 503, "headers": {"retry-after": "9" * 12}}
        odd = {"status": 503, "headers": {"retry-after": "-5"}}
        table = [
            ("reset", {}, 1, 200, [0.5]),
            ("reset", {}, 2, 200, [0.5, 1.5]),
            ("reset", {}, 9, -5, [0.5, 1.5]),
            ("close", {}, 9, -5, [0.5, 1.5]),
            ("status", {"status": 429}, 1, 200, [0.5]),
            ("status", {"status": 502}, 1, 200, [0.5]),
            ("status", {"status": 503}, 9, 503, [0.5, 1.5]),
            ("status", {"status": 504}, 2, 200, [0.5, 1.5]),
            ("status", asking, 2, 200, [7, 7]),
            ("status", patient, 1, 200, [30]),
            ("status", impatient, 1, 429, []),
            ("status", endless, 1, 503, []),
            ("status", odd, 1, 200, [0.5]),
            ("status", {"status": 500}, 1, 500, []),
            ("status", {"status": 404}, 1, 404, []),
            ("status", {"status": 401}, 1, 401, []),
            ("html", {}, 1, 200, []),
        ]
        for kind, options, times, outcome, slept in table:
            with self.subTest(kind=kind, options=options, times=times):
                self.cloud.reset()
                del self.slept[:]
                self.cloud.fault(VERSION, kind, times, **options)
                self.assertEqual((outcome, slept), (self.send(), self.slept))
                self.assertEqual(len(slept) + 1, len(self.cloud.requests))

    def test_refused(self):
        with refusing(VERSION, 2):
            self.assertEqual((200, [0.5, 1.5]), (self.send(), self.slept))
        del self.slept[:]
        with refusing(VERSION):
            self.assertEqual((-5, [0.5, 1.5]), (self.send(), self.slept))

    def test_silence_is_not_repeated(self):
        self.cloud.fault(VERSION, "silence", 9)
        with self.impatient():
            self.assertEqual((-5, []), (self.send(), self.slept))
        self.assertEqual(1, len(self.cloud.requests))

    def test_a_post_only_where_no_connection_was_made(self):
        for kind, options in (
            ("reset", {}),
            ("close", {}),
            ("status", {"status": 503}),
            ("status", {"status": 429, "headers": {"retry-after": "1"}}),
        ):
            with self.subTest(kind=kind):
                self.cloud.reset()
                self.cloud.fault(API_KEYS, kind, 9, **options)
                self.send("POST", API_KEYS)
                self.assertEqual((1, []), (len(self.cloud.requests), self.slept))
        with refusing(API_KEYS, 2):
            self.cloud.reset()
            self.send("POST", API_KEYS)
        self.assertEqual((1, [0.5, 1.5]), (len(self.cloud.requests), self.slept))

    def test_a_key_survives_a_refused_connection(self):
        with refusing(API_KEYS, 2), unittest.mock.patch.multiple(
            llamactl, RETRY_DELAYS=(0, 0)
        ):
            self.succeeds(*LOGIN)
        self.assertEqual(3, len(self.cloud.keys_alive()))


class UnverifiedToken(NetworkCase):
    """`auth token` with both flags: stored only where there was no answer at all."""

    def test_unknown_host(self):
        self.url = "http://llama.invalid"
        self.write_store({})
        trouble = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with unittest.mock.patch.object(socket, "getaddrinfo", side_effect=trouble):
            result = self.succeeds(*TOKEN_BOTH)
            self.fails("auth", "token", "--api-key", KEY, code=5)
        self.assertRegex(result.err, "(?m)^warning: .*verified")
        self.assertEqual([OTHER_KEY], [p["api_key"] for p in self.profiles().values()])

    def test_a_look_up_that_hangs(self):
        self.url = "http://llama.invalid"
        self.write_store({})
        over = threading.Event()
        self.addCleanup(over.set)

        def hang(*arguments, **options):
            over.wait(8)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        with unittest.mock.patch.object(socket, "getaddrinfo", hang):
            with unittest.mock.patch.multiple(llamactl, ANSWER_TIMEOUT=0.2):
                started = time.monotonic()
                result = self.succeeds(*TOKEN_BOTH)
                self.assertLess(time.monotonic() - started, 6)
        self.assertIn("warning: ", result.err)

    def test_no_verify_sends_nothing(self):
        self.succeeds(*TOKEN_BOTH + ["--no-verify"])
        self.assertEqual([], self.cloud.requests)
        self.assertEqual(1, len(self.profiles()))

    def test_rejected(self):
        for status in (401, 403):
            with self.subTest(status=status):
                self.cloud.fault(PROJECT_LIST, "status", 1, status=status)
                self.fails(*TOKEN_BOTH, code=4)

    def test_project_that_the_key_cannot_see(self):
        self.cloud.keys[OTHER_KEY]["projects"] = ["proj-alpha"]
        self.assertIn("proj-alpha", self.fails(*TOKEN_BOTH, code=1))


# ========================================================================================
# oauth: the provider that lies: ID tokens, keys and numbers
# ========================================================================================


class IdToken(unittest.TestCase):
    """read_user(): OpenID Connect Core section 3.1.3.7 without the signature, by
    example."""

    NOW = 1000000
    GOOD = {"iss": "https://id", "aud": "me", "sub": "u", "exp": NOW + 60}

    def read(self, token, issuer="https://id"):
        provider = {
            "issuer": issuer,
            "client_id": "me",
            "token_endpoint": "https://id/token",
            "revocation_endpoint": None,
        }
        return llamactl.read_user(token, provider, self.NOW)

    def test_claims_that_are_accepted(self):
        for changes in (
            {},
            {"exp": self.NOW - 119},
            {"exp": self.NOW + 0.5},
            {"aud": ["me"]},
            {"azp": "me"},
            {"aud": ["me", "you"], "azp": "me"},
            {"aud": ["you", "me"]},
            {"iss": "https://id/"},
            {"nonce": "n", "iat": 5, "email": None},
        ):
            with self.subTest(changes=changes):
                self.assertEqual(self.read(jwt(merged(self.GOOD, changes))).sub, "u")

    def test_issuers(self):
        for issuer, claims in (
            ("https://id/", {}),
            ("https://id", {"iss": "https://id/"}),
            (
                "https://login.example/{tenantid}/v2.0",
                {"iss": "https://login.example/t-1/v2.0", "tid": "t-1"},
            ),
        ):
            with self.subTest(issuer=issuer, claims=claims):
                user = self.read(jwt(dict(self.GOOD, **claims)), issuer)
                self.assertEqual(user.issuer, claims.get("iss", "https://id").rstrip("/"))
        for issuer, claims in (
            ("https://id//", {}),
            ("https://id/a", {}),
            (
                "https://login.example/{tenantid}/v2.0",
                {"iss": "https://login.example/t-1/v2.0", "tid": "t-2"},
            ),
            (
                "https://login.example/{tenantid}/v2.0",
                {"iss": "https://login.example/t-1/v2.0"},
            ),
        ):
            with self.subTest(issuer=issuer, claims=claims):
                with self.assertRaises(llamactl.Failure) as caught:
                    self.read(jwt(dict(self.GOOD, **claims)), issuer)
                for value in (issuer, claims.get("iss", "https://id")):
                    self.assertIn(value, caught.exception.message)

    def test_claims_that_are_refused(self):
        for changes in (
            {"iss": None},
            {"iss": ["https://id"]},
            {"iss": "HTTPS://id"},
            {"aud": "you"},
            {"aud": None},
            {"aud": []},
            {"aud": "me too"},
            {"aud": {"me": 1}},
            {"aud": ["me", "you"], "azp": "you"},
            {"azp": "you"},
            {"aud": ["you"], "azp": "me"},
            {"exp": self.NOW - 121},
            {"exp": None},
            {"exp": "9" * 10},
            {"exp": True},
            {"exp": float("nan")},
            {"exp": float("inf")},
            {"exp": [self.NOW + 60]},
            {"exp": -(10**400)},
            {"sub": None},
            {"sub": ""},
            {"sub": 7},
            {"sub": ["u"]},
        ):
            with self.subTest(changes=changes):
                with self.assertRaises(llamactl.Failure):
                    self.read(jwt(merged(self.GOOD, changes)))

    def test_shapes(self):
        def text(value):
            return b64url(
                value if isinstance(value, bytes) else json.dumps(value).encode("ascii")
            )

        for name, token in (
            ("a number", 7),
            ("a list", [jwt(self.GOOD)]),
            ("empty", ""),
            ("two segments", "a." + text(self.GOOD)),
            ("five segments", "a.b.c.d.e"),
            ("broken base64", "a.%%%.c"),
            ("one character", "a.A.c"),
            ("not ASCII", "a.\u00e9.c"),
            ("no JSON", "a." + text(b"{") + ".c"),
            ("not UTF-8", "a." + text(b'{"sub": "\xff"}') + ".c"),
            ("a list of claims", "a." + text([self.GOOD]) + ".c"),
            ("null", "a." + text(None) + ".c"),
            ("deep claims", "a." + text(b"[" * 100000 + b"]" * 100000) + ".c"),
            (
                "a number of 100,000 digits",
                "a."
                + text(
                    json.dumps(self.GOOD)[:-1].encode() + b', "x": ' + b"9" * 100000 + b"}"
                )
                + ".c",
            ),
        ):
            with self.subTest(name):
                started = time.monotonic()
                with self.assertRaises(llamactl.Failure) as caught:
                    self.read(token)
                self.assertIn("not a JWT", caught.exception.message)
                self.assertLess(time.monotonic() - started, 5)
        with self.assertRaisesRegex(llamactl.Failure, "no ID token.*openid"):
            self.read(None)


class LyingProvider(NetworkCase):
    """A login that ends in one line, with no key made and the store as it was."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.cloud.interval = 0.001
        self.with_profile()

    def refused(self, code=None):
        self.cloud.reset()
        error = self.fails(*LOGIN, code=code)
        self.assertEqual(0, self.cloud.count("POST", API_KEYS))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())
        return error

    def accepted(self):
        self.cloud.reset()
        self.succeeds(*LOGIN)
        self.assertIn("dev@example.com", self.profiles())
        self.cloud.keys = {KEY: self.cloud.keys[KEY], OTHER_KEY: self.cloud.keys[OTHER_KEY]}
        self.with_profile()

    def test_an_id_token_that_is_refused(self):
        """One of each kind through the real flow; IdToken has them all."""
        for claims, words in (
            ({"iss": ELSEWHERE}, ELSEWHERE + ".*" + self.url + "/oidc"),
            ({"aud": "another"}, "another.*llamactl-cli"),
            ({"azp": "another"}, "another.*llamactl-cli"),
            ({"exp": 1}, "clock"),
            ({"sub": None}, "user"),
        ):
            with self.subTest(claims=claims):
                self.cloud.id_token_claims = claims
                self.assertRegex(self.refused(1), words)
        self.cloud.id_token_claims = {}
        for make, words in (
            (lambda claims: None, "no ID token"),
            (lambda claims: 7, "JWT"),
        ):
            self.cloud.id_token_override = make
            self.assertRegex(self.refused(1), words)
        self.cloud.id_token_override = None
        self.accepted()

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
                self.refused()

    def test_keys_that_cannot_be_keys(self):
        for key in ("", "a b", "two\nlines", "\u00e9", 7, None, ["x"]):
            with self.subTest(key=key):
                self.cloud.fault(
                    API_KEYS, "wrong_shape", body={"id": "key-1", "redacted_api_key": key}
                )
                self.fails(*LOGIN)
                self.cloud.reset()

    def test_device_answers(self):
        for name in ("device_code", "user_code", "verification_uri"):
            for value in (None, "", 7, ["x"]):
                with self.subTest(name=name, value=value):
                    self.cloud.device_answer = {name: value}
                    self.refused(5)
                    self.assertEqual(0, self.cloud.count("POST", TOKEN))

    def test_expires_in(self):
        for value in (0, -1, "soon", None, float("nan"), True, [600], float("-inf")):
            with self.subTest(expires_in=value):
                self.cloud.device_answer = {"expires_in": value}
                started = time.monotonic()
                self.refused()
                self.assertEqual(0, self.cloud.count("POST", TOKEN))
                self.assertLess(time.monotonic() - started, 5)
        for value in (10**12, 10**30, 600.5):
            with self.subTest(expires_in=value):
                self.cloud.device_answer = {"expires_in": value}
                self.accepted()

    def test_hostile_addresses(self):
        browser = unittest.mock.Mock()
        browser.open.return_value, browser.name = True, "firefox"
        for address, opened in (
            ("javascript:alert(1)", 0),
            ("file:///etc/passwd", 0),
            ("data:text/html,x", 0),
            ("https://id.invalid/\x1b[2J\x1b]0;x\x07", 0),
            ("https://id.invalid/ --new", 0),
            ("--remote=https://id.invalid/", 0),
            ("https://id.invalid/\u202egpj", 0),
            ("https://id.invalid/device", 1),
        ):
            with self.subTest(address=address):
                self.cloud.device_answer = {
                    "verification_uri": address,
                    "verification_uri_complete": None,
                }
                browser.open.reset_mock()
                with unittest.mock.patch("webbrowser.get", return_value=browser):
                    result = self.call(*LOGIN, env={"DISPLAY": ":0"})
                self.assertEqual(opened, browser.open.call_count)
                self.assertNotRegex(result.out + result.err, "[\x00-\x09\x0b-\x1f\u202e]")
                self.cloud.device_answer["verification_uri_complete"] = address
                self.cloud.device_answer["verification_uri"] = "https://id.invalid/device"
                browser.open.reset_mock()
                with unittest.mock.patch("webbrowser.get", return_value=browser):
                    self.call(*LOGIN, env={"DISPLAY": ":0"})
                for call in browser.open.call_args_list:
                    self.assertEqual(
                        address if opened else "https://id.invalid/device", call[0][0]
                    )

    def test_a_user_code_with_escapes(self):
        self.cloud.device_answer = {"user_code": "AB\x1b[8mCD\r\nerror: x\u200b"}
        result = self.call(*LOGIN)
        self.assertNotRegex(result.err, "[\x00-\x09\x0b-\x1f\u200b]")
        self.assertNotRegex(result.err, "(?m)^error:")


# ========================================================================================
# credential: which credential wins
# ========================================================================================


class Variables(CommandCase):
    def setUp(self):
        super().setUp()
        self.cloud.add_key(OTHER_KEY)
        self.with_profile()
        self.done(
            "auth",
            "token",
            "--api-key",
            OTHER_KEY,
            "--project",
            "proj-beta",
            "--name",
            "second",
        )
        self.done("auth", "use", "main")
        self.cloud.deployments = []  # no warnings but those of the variables
        self.servers = {"profile's": self.cloud}
        for name in ("variable's", "default"):
            stand_in = StandIn(Cloud())
            stand_in.start()
            self.addCleanup(stand_in.stop)
            stand_in.cloud.add_key(OTHER_KEY)
            stand_in.cloud.deployments = []
            self.servers[name] = stand_in.cloud
        self.patch(DEFAULT_API_URL=stand_in.url)
        self.full = {
            "LLAMA_CLOUD_API_KEY": OTHER_KEY,
            "LLAMA_AGENTS_PROJECT_ID": "proj-beta",
            "LLAMA_CLOUD_BASE_URL": self.servers["variable's"].base_url + "/",
        }
        self.forget()

    def forget(self):
        for cloud in self.servers.values():
            cloud.reset()

    def used(self, argv, env):
        """(server, key, project) that a command used, and what it warned of."""
        self.forget()
        result = self.done(*argv.split(), env=env)
        sent = [
            (name, request)
            for name, cloud in self.servers.items()
            for request in cloud.requests
        ]
        self.assertEqual(len({name for name, _ in sent}), 1)
        self.assertLessEqual(len(sent), 1 + ("--project" in argv))  # which is looked up
        name, request = sent[-1]
        key = {KEY: "stored", OTHER_KEY: "other"}[
            request.headers["authorization"].split()[1]
        ]
        warned = [line for line in result.err.splitlines() if line.startswith("warning: ")]
        return (name, key, request.query.get("project_id")), warned

    def without(self, *names):
        return {name: value for name, value in self.full.items() if name not in names}

    def test_precedence(self):
        url, key, project = (
            "LLAMA_CLOUD_BASE_URL",
            "LLAMA_CLOUD_API_KEY",
            "LLAMA_AGENTS_PROJECT_ID",
        )
        get = "deployments get"
        main = ("profile's", "stored", "proj-alpha")
        second = ("profile's", "other", "proj-beta")
        variables = ("variable's", "other", "proj-beta")
        table = (
            (get, {}, main, None),
            (get, self.full, variables, "LLAMA_CLOUD_USE_PROFILE=1"),
            (get, self.without(project), main, key),
            (get, self.without(url), ("default", "other", "proj-beta"), key),
            (get, self.without(key, url), main, project),
            (get, self.without(key, project), main, url),
            (get, self.without(key), main, project),
            (get, dict(self.full, LLAMACTL_PROFILE="main"), variables, "main"),
            (get, dict(self.full, LLAMA_CLOUD_USE_PROFILE="1"), main, None),
            (get, {"LLAMACTL_PROFILE": "second"}, second, None),
            (get, dict.fromkeys(self.full, ""), main, None),
            (
                get,
                dict(self.full, LLAMACTL_PROFILE="", LLAMA_CLOUD_USE_PROFILE=""),
                variables,
                key,
            ),
            (get, dict.fromkeys(["LLAMACTL_PROFILE", key], ""), main, None),
            (
                get + " --project proj-alpha",
                self.full,
                ("variable's", "other", "proj-alpha"),
                key,
            ),
            (
                get + " --project proj-alpha",
                self.without(project),
                ("variable's", "other", "proj-alpha"),
                key,
            ),
            (get + " --project proj-beta", {}, ("profile's", "stored", "proj-beta"), None),
            (get + " --project proj-alpha", self.without(key, url), main, project),
            (get + " --profile main", self.full, main, None),
            ("--profile second " + get, {}, second, None),
            (get + " --profile main", {"LLAMACTL_PROFILE": "second"}, main, None),
            (
                get + " --profile second --project proj-alpha",
                self.full,
                ("profile's", "other", "proj-alpha"),
                None,
            ),
            ("projects get", self.without(project), main[:2] + (None,), key),
            ("projects get", self.without(url, project), main[:2] + (None,), key),
            ("projects get", self.without(key, project), main[:2] + (None,), url),
            ("projects get --profile main", self.full, main[:2] + (None,), None),
        )
        for argv, env, expected, warning in table:
            with self.subTest(argv=argv, env=sorted(env)):
                used, warned = self.used(argv, env)
                self.assertEqual(used, expected)
                if warning is None:
                    self.assertEqual(warned, [])
                else:
                    self.assertIn(warning, "\n".join(warned))

    def test_words_of_use_profile(self):
        for word in ("1", "true", "yes", "on", "t", "y", "TRUE", "Yes", "oN"):
            with self.subTest(word=word):
                env = dict(self.full, LLAMA_CLOUD_USE_PROFILE=word)
                self.assertEqual(self.used("deployments get", env)[0][0], "profile's")
        for word in ("0", "false", "no", "off", "f", "n", "2", "maybe", "truely"):
            with self.subTest(word=word):
                env = dict(self.full, LLAMA_CLOUD_USE_PROFILE=word)
                self.assertEqual(self.used("deployments get", env)[0][0], "variable's")

    def test_no_key_goes_to_another_server(self):
        """Whatever is set, the profile's key is seen by its own server alone."""
        names = sorted(self.full) + ["LLAMACTL_PROFILE"]
        for bits in range(16):
            chosen = [name for index, name in enumerate(names) if bits >> index & 1]
            env = {name: self.full.get(name, "main") for name in chosen}
            for command in (
                "deployments get",
                "projects get",
                "auth status",
                "organizations get",
            ):
                self.call(*command.split(), env=env)
        for name, key in (
            ("profile's", KEY),
            ("variable's", OTHER_KEY),
            ("default", OTHER_KEY),
        ):
            with self.subTest(server=name):
                self.assertGreater(len(self.servers[name].requests), 4)
                self.assertEqual(bearers(self.servers[name].requests) - {"none"}, {key})

    def test_state_of_the_store_does_not_matter_to_a_full_credential(self):
        before = self.store_text()
        for state in (
            "{",
            "",
            "[]",
            '{"version": 99}',
            before[:-20],
            "[" * 100000,
            "folder",
        ):
            with self.subTest(state=state[:20]):
                if state == "folder":
                    os.unlink(self.store_path)
                    os.mkdir(self.store_path)
                else:
                    with open(self.store_path, "w") as file:
                        file.write(state)
                for command in (
                    "deployments get",
                    "projects get",
                    "auth status",
                    "config",
                    "auth inject --env-file %s/.env" % self.home,
                ):
                    self.done(*command.split(), env=self.full)
                self.assertEqual(self.call("deployments", "get").code, 1)
        for folder in ("/proc/nowhere", "/dev/null/x"):
            self.done("projects", "get", env=dict(self.full, LLAMACTL_CONFIG_DIR=folder))
        homeless = dict(self.full, LLAMACTL_CONFIG_DIR="", HOME="/nonexistent")
        self.done("deployments", "get", env=homeless)

    def test_the_profile_that_is_not_used_is_named(self):
        profiles = self.profiles()
        for current, named, words in (
            ("main", "", "profile main"),
            (None, "", "a stored profile"),
            (None, "second", "profile second"),
            ("main", "nope", "a stored profile"),
        ):
            with self.subTest(current=current, named=named):
                self.write_store(profiles, current)
                env = dict(self.full, LLAMACTL_PROFILE=named)
                self.assertIn(
                    "LLAMA_CLOUD_API_KEY is used at %s instead of %s; "
                    % (self.full["LLAMA_CLOUD_BASE_URL"].rstrip("/"), words),
                    self.done("deployments", "get", env=env).err,
                )
        self.write_store({})
        self.assertNotIn("warning", self.done("deployments", "get", env=self.full).err)

    def test_changes_say_that_variables_win_anyway(self):
        make_official_store(os.path.join(self.folder, "profiles.db"))
        winning = self.without("LLAMA_CLOUD_BASE_URL")
        changes = [
            "auth use main",
            "projects use proj-alpha",
            "auth logout second",
            "auth token --api-key %s --project proj-beta" % KEY,
            "auth login --project proj-alpha",
            "environments use " + self.url,
            "environments add " + self.url,
            "environments delete " + llamactl.DEFAULT_API_URL,
        ]
        if os.path.exists(os.path.join(self.folder, "profiles.db")):
            changes.append("auth import --from-official")
        before = self.store_text()
        for argv in changes:
            for env, warning in (
                (winning, "warning: .*LLAMA_CLOUD_API_KEY.*LLAMA_CLOUD_USE_PROFILE"),
                (
                    {"LLAMACTL_PROFILE": "main"},
                    "warning: using profile main .from LLAMACTL_PROFILE.",
                ),
                (dict(winning, LLAMA_CLOUD_USE_PROFILE="1"), None),
            ):
                with self.subTest(argv=argv, env=sorted(env)):
                    with open(self.store_path, "w") as file:
                        file.write(before)
                    result = self.done(*argv.split(), env=env)
                    if warning:
                        self.assertRegex(result.err, warning)
                    elif "logout" not in argv:  # which warns of what remains
                        self.assertNotIn("warning", result.err)

    def test_a_file_with_the_key_is_a_full_credential_too(self):
        path = os.path.join(self.home, "key.txt")
        with open(path, "w", encoding="utf-8") as file:
            file.write("\ufeff%s\n" % OTHER_KEY)
        env = dict(self.without("LLAMA_CLOUD_API_KEY"), LLAMA_CLOUD_API_KEY_FILE=path)
        used, warned = self.used("deployments get", env)
        self.assertEqual(used, ("variable's", "other", "proj-beta"))
        self.assertIn("LLAMA_CLOUD_API_KEY_FILE", warned[0])
        env["LLAMA_CLOUD_API_KEY"] = OTHER_KEY
        result = self.call("deployments", "get", env=env)
        self.expect_failure(result, 2, "exclude each other")
        env = dict(env, LLAMA_CLOUD_API_KEY="", LLAMA_CLOUD_API_KEY_FILE="/nowhere")
        self.expect_failure(self.call("deployments", "get", env=env), 1, "/nowhere")
        self.done("deployments", "get", env=dict(env, LLAMA_CLOUD_USE_PROFILE="1"))

    def test_malformed_values(self):
        for name, value, message in (
            ("LLAMA_CLOUD_BASE_URL", "ftp://x", "http"),
            ("LLAMA_CLOUD_BASE_URL", "https://user:CANARY@x", "http"),
            ("LLAMA_AGENTS_PROJECT_ID", "a b", "project"),
            ("LLAMACTL_PROFILE", "nope", "nope.*main"),
        ):
            with self.subTest(name=name, value=value):
                env = dict(self.full, **{name: value})
                if name == "LLAMACTL_PROFILE":
                    self.done("projects", "get", env=env)
                    env = {name: value}
                result = self.call("projects", "get", env=env)
                self.expect_failure(result, 1 if name == "LLAMACTL_PROFILE" else 2, message)


# ========================================================================================
# login: the waits of RFC 8628, the outcomes, and how many requests it all takes
# ========================================================================================


class ToldTime:
    """A clock that only sleeping moves, in the place of the time module."""

    def __init__(self):
        self.now, self.ahead, self.slept = 1700000000.0, 0.0, []

    def time(self):
        return self.now + self.ahead

    def monotonic(self):
        return self.now - 1600000000.0

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def __getattr__(self, name):
        return getattr(time, name)


def pending(times=1, error="authorization_pending"):
    return [(400, {"error": error})] * times


class Polling(NetworkCase):
    """The exact waits, with the real numbers of seconds and a clock of our own."""

    def setUp(self):
        NetworkCase.setUp(self)
        self.told = ToldTime()
        self.cloud.clock, self.cloud.interval, self.cloud.expires_in = (
            self.told.time,
            5,
            600,
        )
        self.patch(SLOW_DOWN=5.0, DEFAULT_INTERVAL=5.0, time=self.told)
        self.waited, countdown = [], llamactl.Terminal.countdown

        def noted(terminal, expires_at):
            wait = countdown(terminal, expires_at)
            return lambda seconds: self.waited.append(seconds) or wait(seconds)

        patcher = unittest.mock.patch.object(llamactl.Terminal, "countdown", noted)
        patcher.start()
        self.addCleanup(patcher.stop)
        self.with_profile()

    def log_in(self):
        """Log in; what came of it, and that what was to be waited was slept, by the
        second."""
        del self.told.slept[:], self.waited[:]
        result = self.call(*LOGIN)
        self.assertAlmostEqual(sum(self.waited), sum(self.told.slept), 6)
        self.assertLessEqual(max(self.told.slept, default=0), 1)
        return result

    def waits(self, code=0):
        """Log in; how long the program waited before each poll."""
        before = self.bytes_stored()
        result = self.log_in()
        self.assertEqual(code, result.code, result.err)
        if code:
            self.error_of(result, code)
            self.assertEqual(before, self.bytes_stored())
        return self.waited

    def test_before_every_poll(self):
        self.assertEqual([5], self.waits())
        self.cloud.pending_polls = 3
        self.assertEqual([5, 5, 5, 5], self.waits())
        # the stand-in checks the pace as well, by the same clock
        self.assertEqual(6, self.cloud.count("POST", TOKEN) + 1)

    def test_interval(self):
        for value, expected in (
            (2, 2),
            (7.5, 7.5),
            (None, 5),
            (0, 5),
            (-3, 5),
            ("2", 2),
            ("2.5", 5),
            (True, 5),
            ([2], 5),
            ({}, 5),
        ):
            with self.subTest(interval=value):
                self.cloud.enforce_interval = False
                self.cloud.device_answer = {"interval": value}
                self.cloud.pending_polls = 1
                self.assertEqual([expected] * 2, self.waits())

    def test_intervals_that_only_python_calls_json(self):
        for value in (float("nan"), float("inf"), float("-inf")):
            with self.subTest(interval=value):
                self.cloud.device_answer = {"interval": value}
                code = self.log_in().code
                self.assertIn((code, self.waited), [(5, []), (0, [5])])

    def test_huge_intervals_end_with_the_code(self):
        for value in (601, 10**9, 10**25):
            with self.subTest(interval=value):
                self.cloud.reset()
                self.cloud.device_answer = {"interval": value}
                self.assertEqual([600], self.waits(4))
                self.assertEqual(0, self.cloud.count("POST", TOKEN))

    def test_slow_down_thrice_is_for_good(self):
        self.cloud.token_script = (
            pending(1, "slow_down") + pending() + pending(2, "slow_down")
        )
        self.cloud.device_answer = {"interval": 2}
        self.cloud.pending_polls = 1
        self.assertEqual([2, 7, 7, 12, 17, 17], self.waits())

    def test_trouble_doubles_the_wait(self):
        for kind, options in (
            ("reset", {}),
            ("close", {}),
            ("status", {"status": 500}),
            ("status", {"status": 503, "body": "<html>"}),
            ("status", {"status": 502, "body": "bad gateway"}),
        ):
            with self.subTest(kind=kind, options=options):
                self.cloud.reset()
                self.cloud.fault(TOKEN, kind, 3, **options)
                self.assertEqual([5, 10, 20, 30], self.waits())

    def test_refused_doubles_the_wait(self):
        with refusing(TOKEN, 2):
            self.assertEqual([5, 10, 20], self.waits())

    def test_the_end(self):
        for error, code in (
            ("access_denied", 4),
            ("expired_token", 4),
            ("invalid_grant", 1),
            ("invalid_request", 1),
            ("unsupported_grant_type", 1),
        ):
            with self.subTest(error=error):
                self.cloud.token_script = pending(2) + pending(1, error)
                self.assertEqual([5, 5, 5], self.waits(code))
        self.cloud.token_script = [(401, {"error": "invalid_client"})]
        self.assertEqual([5], self.waits(1))

    def test_the_code_expires(self):
        self.cloud.auto_approve, self.cloud.expires_in = None, 12
        self.assertEqual([5, 5, 2], self.waits(4))
        self.assertEqual(2, self.cloud.count("POST", TOKEN))

    def test_trouble_until_the_code_expires(self):
        self.cloud.fault(TOKEN, "reset", 99)
        self.cloud.expires_in = 60
        before = self.bytes_stored()
        self.assertIn(self.log_in().code, (4, 5))
        self.assertEqual([5, 10, 20, 25], self.waited)
        self.assertEqual(before, self.bytes_stored())

    def test_errors_of_rfc_8628_count_whatever_the_status(self):
        for status in (429, 500, 503):
            with self.subTest(status=status):
                self.cloud.reset()
                self.cloud.token_script = [
                    (status, {"error": error})
                    for error in ("slow_down", "authorization_pending", "slow_down")
                ]
                self.assertEqual([5, 10, 10, 15], self.waits())
                for error in ("access_denied", "expired_token"):
                    self.cloud.token_script = [(status, {"error": error})]
                    self.assertEqual([5], self.waits(4))

    def test_a_proxy_that_fails_is_waited_out(self):
        self.cloud.configuration_overrides = {
            "token_endpoint": "https://llama.invalid/token"
        }
        self.cloud.expires_in, self.env["https_proxy"] = 60, self.url
        for status in (503, 407):
            with self.subTest(status=status), unraised_resource_warnings():
                self.cloud.reset()
                self.cloud.fault("*", "status", 9, "CONNECT", status=status)
                self.assertEqual([5, 10, 20, 25], self.waits(5))

    def test_an_access_token_that_expires_meanwhile(self):
        """The user thinks about the project longer than the access token lives."""

        def think(request):
            self.told.ahead += 600

        hear(self.cloud, PROJECT_LIST, after=think)
        self.waits()
        self.assertEqual(1, self.cloud.refreshes)
        profile = self.profiles()["dev@example.com"]
        self.assertIn(profile["refresh_token"], self.cloud.refresh_tokens)
        self.assertFalse(self.cloud.refresh_tokens[profile["refresh_token"]]["used"])
        self.assertIn(profile["api_key"], self.cloud.keys_alive())


# A login at a stand-in that a row changes, and what comes of it: exit code, WORDS on the
# screen, profile, seconds waited before each poll, how often trouble is told, how many
# tokens a logout revokes. {url} is the stand-in's address.
PLAIN_ROW = load("""{
    "configuration": {}, "device": {}, "polls": [], "tokens": {}, "claims": {},
    "approval": {}, "faults": [], "code": 0, "words": "logged in as",
    "profile": "dev@example.com", "waits": [5], "told": 0, "revoked": 1
}""")


def provider(name, source, **row):
    return dict(PLAIN_ROW, name=name, source=source, **row)


RFC_8628_3_2, RFC_8628_3_5 = "RFC 8628 section 3.2", "RFC 8628 section 3.5"
RFC_6749_5_1, RFC_6749_5_2 = "RFC 6749 section 5.1", "RFC 6749 section 5.2"
ID_TOKEN = "OpenID Connect Core section 3.1.3.7"
METADATA = "OpenID Connect Discovery section 3"
ENTRA_DEVICES = "Microsoft Entra ID documentation: device authorization grant"
ENTRA_CLAIMS = "Microsoft Entra ID documentation: ID token claims reference"
PORTALS = "users of device-flow CLIs behind a captive portal or a gateway"
WEB_PAGE = "<!doctype html><title>Sign in to this network</title>"
ANY_TENANT = {"issuer": "https://login.example/{tenantid}/v2.0"}

QUIRKS = (
    # whose ID token it is
    provider("iss: a slash more", ID_TOKEN, claims={"iss": "{url}/oidc/"}),
    provider(
        "iss: a slash less",
        "indigo-iam/iam issue 714",
        configuration={"issuer": "{url}/oidc/"},
        claims={"iss": "{url}/oidc"},
    ),
    provider(
        "iss: tid in the place of {tenantid}",
        "MicrosoftDocs/azure-docs issues 38427 and 95994",
        configuration=ANY_TENANT,
        claims={"iss": "https://login.example/t-1/v2.0", "tid": "t-1"},
    ),
    provider(
        "iss: another tenant than tid",
        "MicrosoftDocs/azure-docs issue 113944",
        code=1,
        words="error: .*/t-2/v2.0, not https://login.example/{tenantid}/v2.0\n",
        configuration=ANY_TENANT,
        claims={"iss": "https://login.example/t-2/v2.0", "tid": "t-1"},
    ),
    provider(
        "iss: no tid that could be filled in",
        "MicrosoftDocs/azure-docs issue 113944",
        code=1,
        words="error: .*/None/v2.0, not https://login.example/{tenantid}/v2.0\n",
        configuration=ANY_TENANT,
        claims={"iss": "https://login.example/None/v2.0"},
    ),
    provider(
        "iss: another provider",
        ID_TOKEN,
        code=1,
        words="error: .*issuer is https://elsewhere.invalid, not {url}/oidc\n",
        claims={"iss": ELSEWHERE},
    ),
    provider("aud: others, no azp", ID_TOKEN, claims={"aud": ["api", "llamactl-cli"]}),
    provider(
        "azp: another client",
        ID_TOKEN,
        code=1,
        words="error: .*authorized party is other, not llamactl-cli\n",
        claims={"aud": ["llamactl-cli", "other"], "azp": "other"},
    ),
    provider(
        "no ID token",
        RFC_6749_5_1,
        code=1,
        words="error: .*no ID token.* openid\n",
        tokens={"id_token": None},
    ),
    # what names the profile
    *(
        provider(name, ENTRA_CLAIMS, profile=profile, claims=dict(claims, email=None))
        for name, profile, claims in (
            ("no email, two names", "jo", {"preferred_username": "jo", "upn": "jo@corp"}),
            ("no email, but a upn", "jo@corp.example", {"upn": "jo@corp.example"}),
            ("no email, only a sub", "user-1", {}),
        )
    ),
    # what a configuration may lack
    provider(
        "no jwks_uri, and nothing else that is not needed",
        METADATA,
        configuration=dict.fromkeys(
            "jwks_uri authorization_endpoint scopes_supported response_types_supported "
            "grant_types_supported id_token_signing_alg_values_supported".split()
        ),
    ),
    provider(
        "no way to revoke", METADATA, revoked=0, configuration={"revocation_endpoint": None}
    ),
    provider(
        "an empty way to revoke",
        METADATA,
        revoked=0,
        configuration={"revocation_endpoint": ""},
    ),
    # device codes
    provider(
        "numbers as strings",
        "Azure AD v1.0 endpoints; assembledhq/143 pull request 35",
        waits=[1],
        device={"expires_in": "600", "interval": "1"},
        tokens={"expires_in": "3599"},
    ),
    provider(
        "a short life as a string",
        "Azure AD v1.0 endpoints",
        code=4,
        words="error: .*expired",
        waits=[5, 5, 2],
        device={"expires_in": "12"},
        approval=None,
    ),
    provider("no interval", RFC_8628_3_2, device={"interval": None}),
    provider("interval 0", "sigstore/sigstore pull request 2381", device={"interval": 0}),
    provider("interval below 0", RFC_8628_3_2, device={"interval": -1}),
    provider("interval a text", RFC_8628_3_2, device={"interval": "soon"}),
    provider(
        "verification_url",
        "cli/oauth pull request 24",
        words="https://id.example/device",
        device={"verification_uri": None, "verification_url": "https://id.example/device"},
    ),
    provider(
        "an empty verification_uri",
        "cli/oauth pull request 24",
        words="https://id.example/device",
        device={"verification_uri": "", "verification_url": "https://id.example/device"},
    ),
    # tokens
    provider(
        "no access token",
        RFC_6749_5_1,
        code=5,
        words="error: .*'access_token'",
        tokens={"access_token": None},
    ),
    provider("an empty error", "dotnet/aspnetcore issue 53457", tokens={"error": ""}),
    provider("no refresh token", RFC_6749_5_1, revoked=0, tokens={"refresh_token": None}),
    provider("no expires_in", RFC_6749_5_1, tokens={"expires_in": None}),
    # the provider's word
    provider(
        "slow_down is for good",
        RFC_8628_3_5,
        waits=[5, 10, 10, 15, 15],
        polls=(pending(1, "slow_down") + pending()) * 2,
    ),
    provider(
        "pending with status 200",
        "GitHub documentation: error codes for the device flow",
        waits=[5, 5],
        polls=[(200, {"error": "authorization_pending"})],
    ),
    *(
        provider(error, source, code=code, words=words, polls=[(status, {"error": error})])
        for error, source, status, code, words in (
            ("authorization_declined", ENTRA_DEVICES, 400, 4, "error: .*denied in the"),
            ("bad_verification_code", ENTRA_DEVICES, 400, 1, "error: .*bad_verification_c"),
            ("invalid_grant", RFC_6749_5_2, 400, 1, "error: .*invalid_grant"),
            ("invalid_client", RFC_6749_5_2, 401, 1, "error: .*invalid_client"),
            ("unauthorized_client", RFC_6749_5_2, 403, 1, "error: .*unauthorized_client"),
            ("mfa_required", "RFC 6749 section 8.5", 403, 1, "error: .*mfa_required"),
        )
    ),
    # not the provider's word
    *(
        provider(name, PORTALS, waits=[5, 10], told=1, polls=[(status, body)])
        for name, status, body in (
            ("403, a page", 403, WEB_PAGE),
            ("404, a page", 404, WEB_PAGE),
            ("408", 408, None),
            ("408, JSON", 408, {"message": "Request Timeout"}),
            ("429", 429, {"message": "too many requests"}),
            ("429, an error of its own", 429, {"error": "too_many_requests"}),
            ("500", 500, {"detail": "Internal Server Error"}),
            ("500, RFC 6749 section 4.1.2.1", 500, {"error": "server_error"}),
            ("500, an object", 500, {"error": {"code": 500, "message": "Internal"}}),
            ("503, RFC 6749 section 4.1.2.1", 503, {"error": "temporarily_unavailable"}),
            ("503, Spring", 503, {"status": 503, "error": "Service Unavailable"}),
            ("403, an API gateway", 403, {"message": "Forbidden"}),
            ("511, RFC 6585 section 6", 511, WEB_PAGE),
            ("200, a page", 200, WEB_PAGE),
            ("200, empty", 200, None),
        )
    ),
    provider(
        "302",
        PORTALS,
        words="redirects to http://portal.invalid/: refused; still waiting\n",
        waits=[5, 10],
        told=1,
        faults=[(TOKEN, "redirect", {"to": "http://portal.invalid/"})],
    ),
    provider(
        "a run of trouble",
        "modelcontextprotocol/registry pull request 1588",
        waits=[5, 10, 20, 30, 30],
        told=1,
        polls=[(502, WEB_PAGE), (200, WEB_PAGE), (403, WEB_PAGE), (408, "late")],
    ),
    provider(
        "two runs, a slow_down between them",
        "brandonrc/mobula issue 22",
        waits=[5, 10, 10, 20, 10],
        told=2,
        polls=[(502, "")] + pending(1, "slow_down") + [(503, "")] + pending(),
    ),
    # a 401 of the control plane: to log in again would go in a circle
    *(
        provider(name, "RFC 6750", code=4, words="error: .*401", faults=[fault])
        for name, fault in (
            ("401 for the projects", (PROJECT_LIST, "status", {"status": 401})),
            ("401 for the new key", (API_KEYS, "status", {"status": 401})),
        )
    ),
)


class ProviderCase(NetworkCase):
    """Time is told as in Polling, and a row says what the provider does."""

    def setUp(self):
        Polling.setUp(self)
        self.cloud.enforce_interval = False

    def check_login(self, row, *commands):
        """Run COMMANDS, the last of which ends as ROW says, and log out again."""
        row = load(json.dumps(row).replace("{url}", self.url))
        self.cloud.reset()
        self.cloud.configuration_overrides = row["configuration"]
        self.cloud.device_answer = row["device"]
        self.cloud.token_script = row["polls"]
        self.cloud.token_answer = row["tokens"]
        self.cloud.id_token_claims = row["claims"]
        self.cloud.auto_approve = row["approval"]
        for path, kind, options in row["faults"]:
            self.cloud.fault(path, kind, **options)
        self.write_store({})
        keys = self.cloud.keys_alive()
        del self.waited[:]
        results = [self.call(*argv) for argv in commands]
        screen = "".join(result.out + result.err for result in results)
        self.assertEqual(results[-1].code, row["code"], screen)
        self.assertRegex(screen, row["words"])
        self.assertEqual(self.waited, row["waits"])
        self.assertEqual(screen.count("; still waiting\n"), row["told"], screen)
        self.assertNotIn("hint: llamactl auth login\n", screen)
        self.assertEqual(list(self.profiles()), [] if row["code"] else [row["profile"]])
        if row["code"]:
            self.error_of(results[-1], row["code"])
        else:
            self.check_logout(row)
        self.assertEqual(self.cloud.keys_alive(), keys)

    def check_logout(self, row):
        profile = self.profiles()[row["profile"]]
        self.assertIn(profile["api_key"], self.cloud.keys_alive())
        result = self.call("auth", "logout", row["profile"])
        self.assertEqual(result, (0, "", "profile %s deleted\n" % row["profile"]))
        sent = [urllib.parse.parse_qs(each.body) for each in self.cloud.sent(REVOKE)]
        revoked = [token for form in sent for token in form["token"]]
        self.assertEqual(revoked, [profile.get("refresh_token")] * row["revoked"])


class ProviderQuirks(ProviderCase):
    def test_a_login_ends_as_the_row_says(self):
        for row in QUIRKS:
            with self.subTest(row["name"], source=row["source"]):
                self.check_login(row, LOGIN)

    def test_two_halves_end_as_the_whole_and_leave_nothing_waiting(self):
        resume = LOGIN + ["--resume"]
        for row in QUIRKS:
            with self.subTest(row["name"], source=row["source"]):
                self.check_login(row, ["auth", "login", "--start"], resume)
                error = self.error_of(self.call(*resume), 2)
                self.assertIn("no login is waiting", error)

    def test_a_slash_behind_the_issuer_makes_no_other_user(self):
        for issuer in (self.url + "/oidc", self.url + "/oidc/"):
            self.cloud.id_token_claims = {"iss": issuer}
            self.succeeds(*LOGIN)
        self.assertEqual(sorted(self.profiles()), ["dev@example.com", "main"])


# What each provider publishes and sends, in short.
KNOWN_PROVIDERS = """[
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
        "error_description": "AADSTS70016: Authorization is pending.\\r\\nTrace ID: ..."}]],
    "tokens": {"expires_in": 3599, "ext_expires_in": 3599},
    "claims": {
        "iss": "https://login.microsoftonline.com/aaaabbbb-0000-cccc-1111-dddd2222eeee/v2.0",
        "tid": "aaaabbbb-0000-cccc-1111-dddd2222eeee", "ver": "2.0",
        "oid": "aaaaaaaa-0000-1111-2222-bbbbbbbbbbbb", "sub": "AAAAAIkzqFVrSaSa",
        "email": null, "preferred_username": "jo@contoso.example"},
    "words": "Open https://microsoft.com/devicelogin on",
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
    "words": "    https://dev-1.okta.com/activate.user_code=BCDFGHJK",
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
    "words": "Open https://www.google.com/device on", "waits": [5, 5, 10]
}]"""


class KnownProviders(ProviderCase):
    def test_a_login_ends_in_a_profile_and_a_logout_leaves_nothing(self):
        for row in [provider(**document) for document in load(KNOWN_PROVIDERS)]:
            with self.subTest(row["name"], source=row["source"]):
                self.check_login(row, LOGIN)
                self.assertEqual(self.cloud.sent("/oidc/keys"), [])


def hear(cloud, path, before=None, after=None):
    """Call BEFORE or AFTER with each request to a path that begins so, as it is
    answered."""
    real = cloud.answer

    def answer(function, request, *segments):
        if before and request.path.startswith(path):
            before(request)
        answer = real(function, request, *segments)
        if after and request.path.startswith(path):
            after(request)
        return answer

    cloud.answer = answer


class LoginOutcomes(NetworkCase):
    def test_nobody_known_yet(self):
        result = self.succeeds(*LOGIN)
        profile = self.profiles()["dev@example.com"]
        self.assertEqual(
            ("oidc", "proj-alpha", "Alpha", "user-1"),
            tuple(
                profile[name] for name in ("auth_type", "project_id", "project_name", "sub")
            ),
        )
        self.assertEqual("dev@example.com", self.stored()[self.url]["current_profile"])
        record = self.cloud.keys[profile["api_key"]]
        self.assertEqual(profile["api_key_id"], record["id"])
        self.assertRegex(record["name"], r"\Adev@example\.com llamactl on .")
        code = list(self.cloud.devices.values())[0]["user_code"]
        self.assertIn(code, result.err)
        self.assertIn(self.url + "/oidc/device", result.err)
        self.assertIn("user_code=" + code, result.err)
        self.assertEqual("", result.out)
        # the helper that other tests start from stores just what a login stores
        made = self.with_login()
        self.assertEqual(set(profile), set(self.profiles()["main"]) | set(made))

    def test_without_an_address(self):
        self.cloud.auto_approve = {"email": None}
        self.succeeds(*LOGIN)
        self.assertEqual(["user-1"], list(self.profiles()))

    def test_one_project_is_chosen(self):
        del self.cloud.projects[1]
        self.succeeds("auth", "login")
        self.assertEqual("proj-alpha", self.profiles()["dev@example.com"]["project_id"])

    def test_a_choice_is_missing(self):
        for argv in (["auth", "login"], ["auth", "login", "--project", "proj-none"]):
            with self.subTest(argv=argv):
                self.cloud.reset()
                self.write_store({})
                result = self.call(*argv)
                self.assertEqual(2, result.code)
                error = [
                    line for line in result.err.splitlines() if line.startswith("error: ")
                ]
                self.assertEqual(1, len(error))
                for project in ("proj-alpha", "proj-beta"):
                    self.assertIn(project, error[0])
                self.assertIn("hint: llamactl projects use ID", result.err)
                profile = self.profiles()["dev@example.com"]
                self.assertIsNone(profile["project_id"])
                self.assertIn(profile["api_key"], self.cloud.keys_alive())
                self.succeeds("projects", "use", "proj-beta")
                self.assertEqual(
                    "proj-beta", self.profiles()["dev@example.com"]["project_id"]
                )

    def test_no_project_anywhere(self):
        self.cloud.projects = []
        for argv in (["auth", "login"], LOGIN):
            with self.subTest(argv=argv):
                self.fails(*argv, code=1)
                self.assertEqual(0, self.cloud.count("POST", API_KEYS))

    def test_narrowed_to_an_organization(self):
        self.succeeds("auth", "login", "--org", "org-two")
        self.assertEqual("proj-beta", self.profiles()["dev@example.com"]["project_id"])

    def test_same_user_again(self):
        old = self.with_login()
        key = self.profiles()["main"]["api_key"]
        result = self.succeeds("auth", "login", "--project", "proj-beta")
        self.assertNotIn("error", result.err)
        profile = self.profiles()["main"]
        self.assertEqual(["main"], list(self.profiles()))
        self.assertEqual(
            (key, KEY_ID, "proj-beta"),
            tuple(profile[name] for name in ("api_key", "api_key_id", "project_id")),
        )
        self.assertNotEqual(old["refresh_token"], profile["refresh_token"])
        self.assertEqual(0, self.cloud.count("POST", API_KEYS))

    def test_same_user_whose_key_is_gone(self):
        self.with_login()
        gone = self.profiles()["main"]["api_key"]
        del self.cloud.keys[gone]
        self.succeeds(*LOGIN)
        profile = self.profiles()["main"]
        self.assertNotEqual(gone, profile["api_key"])
        self.assertEqual(self.cloud.keys[profile["api_key"]]["id"], profile["api_key_id"])

    def test_same_user_and_an_unsure_server(self):
        for status in (400, 403, 404, 429, 500, 503):
            with self.subTest(status=status):
                self.cloud.reset()
                self.with_login()
                key = self.profiles()["main"]["api_key"]
                self.cloud.fault(ME, "status", 9, status=status)
                self.succeeds(*LOGIN)
                self.assertEqual(key, self.profiles()["main"]["api_key"])
                self.assertEqual(0, self.cloud.count("POST", API_KEYS))

    def test_another_user(self):
        self.with_login()
        self.cloud.auto_approve = {"sub": "user-2"}
        self.succeeds(*LOGIN)
        self.assertEqual(["dev@example.com", "main"], sorted(self.profiles()))
        self.assertEqual("user-1", self.profiles()["main"]["sub"])
        self.cloud.reset()
        self.fails(*LOGIN + ["--name", "main"], code=1)
        self.assertEqual(0, self.cloud.count("POST", API_KEYS))

    def test_a_taken_name(self):
        self.with_profile(name="dev@example.com")
        self.succeeds(*LOGIN)
        self.assertEqual(["dev@example.com", "dev@example.com-2"], sorted(self.profiles()))
        self.assertEqual(KEY, self.profiles()["dev@example.com"]["api_key"])

    def test_a_store_that_fails_after_the_key_was_made(self):
        """The key that nobody would know of is deleted again."""
        made = []

        def sabotage(request):
            made.extend(set(self.cloud.keys_alive()) - {KEY, OTHER_KEY})
            os.unlink(self.store_path)
            os.mkdir(self.store_path)

        hear(self.cloud, API_KEYS, after=lambda r: r.method == "POST" and sabotage(r))
        self.error_of(self.call(*LOGIN), 1)
        self.assertEqual(1, len(made))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())

    def test_a_token_of_unknown_lifetime_is_not_refreshed_at_once(self):
        self.cloud.token_answer = {"expires_in": None}
        self.succeeds(*LOGIN)
        self.assertIsNone(self.profiles()["dev@example.com"]["access_expires_at"])
        self.assertEqual(0, self.cloud.refreshes)
        # a 401 tells that its life is over
        self.cloud.expire_access_tokens()
        self.succeeds("auth", "logout", "dev@example.com")
        self.assertEqual((1, 0), (self.cloud.refreshes, self.cloud.reuse_detected))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())

    def test_an_echoed_code_is_masked_as_it_was_sent(self):
        code = "dc/CANARY+0123=4567"
        self.cloud.device_answer = {"device_code": code}
        for form in (code, urllib.parse.quote_plus(code)):
            self.cloud.token_script = [
                (
                    400,
                    {
                        "error": "invalid_grant",
                        "error_description": "no device_code=" + form,
                    },
                )
            ]
            self.assertIn("no device_code=********", self.fails(*LOGIN, code=1))

    def test_no_browser_login(self):
        self.cloud.browser_login = False
        before = self.bytes_stored()
        result = self.call(*LOGIN)
        self.error_of(result, 1)
        self.assertIn("hint: llamactl auth token", result.err)
        for status in (400, 404, 501):
            self.cloud.fault(
                DISCOVERY, "status", status=status, body={"detail": "no OIDC here"}
            )
            self.assertIn("no OIDC here", self.fails(*LOGIN, code=1))
        self.assertEqual(before, self.bytes_stored())

    def test_client_ids(self):
        for ids, accepted in (
            ({"cli": "llamactl-cli", "web": "w"}, True),
            ({"other": "llamactl-cli"}, True),
            ({"a": "x", "b": "y"}, False),
            ({}, False),
            (None, False),
            ({"cli": 7}, False),
        ):
            with self.subTest(client_ids=ids):
                self.write_store({})
                self.cloud.discovery_overrides = {"client_ids": ids}
                self.succeeds(*LOGIN) if accepted else self.fails(*LOGIN)

    def test_refusals_in_the_browser(self):
        for error in ("access_denied", "expired_token"):
            self.cloud.token_script = pending(1, error)
            self.fails(*LOGIN, code=4)

    def test_unwritable_store_is_noticed_before_a_code_is_shown(self):
        os.unlink(self.store_path)
        os.mkdir(self.store_path)
        self.error_of(self.call(*LOGIN), 1)
        self.assertEqual([], self.cloud.requests)


class NothingLeftBehind(NetworkCase):
    """A login that ends without a profile leaves neither a key nor a token alive."""

    def setUp(self):
        super().setUp()
        self.keys = [KEY, OTHER_KEY]

    def assert_nothing_left(self, keys=()):
        self.assertEqual(self.keys + list(keys), self.cloud.keys_alive())
        self.assertEqual([True], [login["revoked"] for login in self.cloud.logins])

    def test_what_ends_a_login_after_the_approval(self):
        def unwritable(request):
            os.unlink(self.store_path)
            os.mkdir(self.store_path)

        table = (
            ("refused ID token", 1, {"id_token_claims": {"aud": "another"}}, LOGIN),
            ("no ID token", 1, {"id_token_override": lambda claims: None}, LOGIN),
            ("no project", 1, {"projects": []}, LOGIN),
            (
                "another user's name",
                1,
                {"auto_approve": {"sub": "user-2"}},
                LOGIN + ["--name", "main"],
            ),
        )
        for name, code, settings, argv in table:
            with self.subTest(name):
                self.start("login")
                self.keys = self.cloud.keys_alive()
                for setting, value in settings.items():
                    before = getattr(self.cloud, setting)
                    self.addCleanup(setattr, self.cloud, setting, before)
                    setattr(self.cloud, setting, value)
                self.fails(*argv, code=code)
                self.assert_nothing_left()
                for setting in settings:
                    setattr(self.cloud, setting, self.cloud_defaults(setting))
        for path in (PROJECT_LIST, API_KEYS):
            with self.subTest("a store that fails behind " + path):
                self.start("key")
                hear(self.cloud, path, after=unwritable)
                self.error_of(self.call(*LOGIN), 1)
                self.assertEqual([True], [login["revoked"] for login in self.cloud.logins])
                del self.cloud.answer
                os.rmdir(self.store_path)
        self.assertEqual(
            [KEY, OTHER_KEY],
            [key for key in self.cloud.keys_alive() if not key.endswith("0123")],
        )

    def cloud_defaults(self, name):
        return getattr(Cloud(), name) if name != "auto_approve" else {}

    def test_ctrl_c_at_the_menu(self):
        self.start("key")
        with unittest.mock.patch.object(
            llamactl.Terminal, "choose", side_effect=KeyboardInterrupt
        ):
            result = self.call("auth", "login")
        self.assertEqual(130, result.code)
        self.assert_nothing_left()

    def test_answers_to_a_new_key(self):
        """The key may have been made: its title says which, and where to delete it."""
        for name, kind, options in (
            ("cut off", "truncated", {"executed": True}),
            ("reset", "reset", {"executed": True}),
            ("a web page", "html", {"executed": True}),
            ("not JSON", "not_json", {"executed": True}),
            ("500 after it took effect", "status", {"executed": True, "status": 500}),
            ("no key in it", "wrong_shape", {"executed": True, "body": {}}),
        ):
            with self.subTest(name):
                self.start("key")
                self.cloud.fault(API_KEYS, kind, 1, "POST", **options)
                result = self.call(*LOGIN)
                self.assertIn("'dev@example.com llamactl on ", self.error_of(result, 5))
                self.assertIn("hint: delete the key in the web console", result.err)
                self.assertEqual([True], [login["revoked"] for login in self.cloud.logins])
        for status in (400, 403, 404):
            with self.subTest("refused", status=status):
                self.start("key")
                self.cloud.fault(API_KEYS, "status", 1, "POST", status=status)
                self.assertNotIn("llamactl on", self.fails(*LOGIN, code=1))

    def test_a_key_that_the_server_shows_masked_is_deleted(self):
        self.start("key")
        real = Cloud.create_key

        def masked(cloud, request):
            answer = real(cloud, request)
            return answer._replace(body=dict(answer.body, redacted_api_key="llx-\u2026"))

        with unittest.mock.patch.object(
            self.cloud,
            "answer",
            lambda function, *rest: Cloud.answer(
                self.cloud, masked if function is real else function, *rest
            ),
        ):
            self.fails(*LOGIN, code=5)
        self.assert_nothing_left()

    def started(self, *events):
        """A real process of a login that has reached the making of its key."""
        process = self.spawn(*LOGIN)
        self.addCleanup(process.kill)
        for event in events:
            self.assertTrue(event.wait(15))
        return process

    def ended(self, process, code):
        out, err = process.communicate(timeout=30)
        self.note(process.returncode, out, err)
        self.assertEqual((process.returncode, out), (code, b""), err)
        return err.decode()

    def test_signals_while_the_key_is_made(self):
        """The first one waits for the key, so that it can be stored or deleted."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(signal=number):
                self.start("key")
                made, signalled = threading.Event(), threading.Event()

                def slowly(request, made=made, signalled=signalled):
                    made.set()
                    signalled.wait(15)

                hear(self.cloud, API_KEYS, after=slowly)
                process = self.started(made)
                process.send_signal(number)
                time.sleep(0.1)
                signalled.set()
                self.ended(process, 128 + number)
                del self.cloud.answer
                profile = self.profiles()["dev@example.com"]
                self.assertEqual(self.keys + [profile["api_key"]], self.cloud.keys_alive())
                self.assertEqual([False], [login["revoked"] for login in self.cloud.logins])
                self.succeeds("auth", "logout", "dev@example.com")
                self.assertEqual(self.keys, self.cloud.keys_alive())

    def test_signals_while_the_lock_is_awaited(self):
        """However many: the key that was made is stored, since its time is bounded."""
        self.start("key")
        made = threading.Event()
        os.makedirs(self.folder, exist_ok=True)
        with contextlib.ExitStack() as stack:
            hear(
                self.cloud,
                API_KEYS,
                before=lambda request: (
                    request.method == "POST"
                    and stack.enter_context(locked(self.store_path + ".lock")),
                    made.set(),
                ),
            )
            process = self.started(made)
            end = time.monotonic() + 15
            while len(self.cloud.keys_alive()) < 3 and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        self.assertIn("finishing first; please wait", self.ended(process, 143))
        profile = self.profiles()["dev@example.com"]
        self.assertEqual(self.keys + [profile["api_key"]], self.cloud.keys_alive())

    def test_a_signal_at_each_line_between_the_approval_and_the_menu(self):
        """The refresh token is revoked, wherever the signal comes."""
        self.start("key")
        self.cloud.token_answer = {"id_token": "not one"}  # which ends the login
        names = ("wait_for_approval", "finish_login", "poll_for_tokens", "read_tokens")
        lines = set()

        def trace(frame, event, _):
            if frame.f_code.co_name not in names:
                return None
            place = (frame.f_code.co_name, frame.f_lineno)
            source = linecache.getline(llamactl.__file__, frame.f_lineno)
            if sys.exc_info()[0] or source.lstrip().startswith("with "):
                return trace  # Python itself is leaving the block
            approved = self.cloud.logins and not self.cloud.logins[-1]["revoked"]
            if event == "line" and approved and place not in lines:
                lines.add(place)
                raise llamactl.Interrupted(signal.SIGTERM)
            return trace

        for _ in range(40):
            before = len(lines)
            del self.cloud.logins[:]
            sys.settrace(trace)
            try:
                code = self.call(*LOGIN).code
            finally:
                sys.settrace(None)
            revoked = [login["revoked"] for login in self.cloud.logins]
            self.assertEqual(revoked, [True], sorted(lines))
            if len(lines) == before:
                break
            self.assertEqual(code, 143)
        self.assertGreater(len(lines), 3)

    def test_a_signal_while_a_poll_fails(self):
        """Trouble on the way is waited out, but does not swallow the signal."""
        self.start("key")
        polled = threading.Event()
        self.cloud.interval = 0.01
        self.cloud.fault(TOKEN, "close", 99)
        hear_apart(self.cloud, TOKEN, lambda request: (polled.set(), time.sleep(0.3)))
        process = self.started(polled)
        process.send_signal(signal.SIGTERM)
        self.ended(process, 143)

    def test_two_logins_of_one_user_at_once(self):
        """Both make a key; who stores second keeps the stored one."""
        self.start("key")
        both, counts = threading.Barrier(2), []

        def together(request):
            if request.method == "POST":
                counts.append(request)
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(15)

        hear_apart(self.cloud, API_KEYS, together)
        processes = [self.started(), self.started()]
        for process in processes:
            self.ended(process, 0)
        self.assertEqual(2, len(counts))
        profile = self.profiles()["dev@example.com"]
        self.assertEqual(self.keys + [profile["api_key"]], self.cloud.keys_alive())
        self.assertEqual(self.cloud.keys[profile["api_key"]]["id"], profile["api_key_id"])
        self.assertEqual(
            [False, True], sorted(login["revoked"] for login in self.cloud.logins)
        )
        login = self.cloud.refresh_tokens[profile["refresh_token"]]["login"]
        self.assertFalse(login["revoked"])

    def test_the_replaced_token_goes_to_its_own_provider_alone(self):
        """A control plane that names another one, which claims to be the same."""
        elsewhere = self.another_origin()
        old = self.with_login()["refresh_token"]
        url = elsewhere.url + REVOKE
        self.cloud.configuration_overrides = {"revocation_endpoint": url}
        self.succeeds(*LOGIN)
        self.assertEqual(elsewhere.cloud.requests, [])
        self.assertTrue(self.cloud.refresh_tokens[old]["login"]["revoked"])

    def test_a_second_login_revokes_the_token_that_it_replaces(self):
        old = self.with_login()["refresh_token"]
        self.succeeds(*LOGIN)
        self.assertTrue(self.cloud.refresh_tokens[old]["login"]["revoked"])
        new = self.profiles()["main"]["refresh_token"]
        self.assertFalse(self.cloud.refresh_tokens[new]["login"]["revoked"])
        self.with_login()
        self.cloud.fault(REVOKE, "status", 9, status=500)
        result = self.succeeds(*LOGIN)
        self.assertIn("warning: the refresh token may still be valid", result.err)


def hear_apart(cloud, path, before):
    """Call BEFORE with each request to PATH, while others are answered."""
    receive = cloud.receive

    def receiving(request):
        if request.path.startswith(path):
            before(request)
        return receive(request)

    cloud.receive = receiving


class LogoutOfALogin(NetworkCase):
    def logout(self, code=0):
        result = self.call("auth", "logout", "main")
        self.assertEqual(code, result.code, result.err)
        self.assertEqual({}, self.profiles())
        return result

    def test_deletes_and_revokes(self):
        token = self.with_login()["refresh_token"]
        self.logout()
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())
        self.assertTrue(self.cloud.refresh_tokens[token]["login"]["revoked"])
        self.assertEqual(0, self.cloud.refreshes)

    def test_rotation_reaches_the_disk_before_the_new_token_is_used(self):
        old = self.with_login(expired=True)["refresh_token"]
        on_disk = []
        hear(
            self.cloud,
            API_KEYS,
            before=lambda request: on_disk.append(self.profiles()["main"]),
        )
        self.logout()
        self.assertEqual(1, len(on_disk))
        self.assertNotEqual(old, on_disk[0]["refresh_token"])
        bearer = self.cloud.sent(API_KEYS + "/" + KEY_ID)[0].headers["authorization"]
        self.assertEqual("Bearer " + on_disk[0]["access_token"], bearer)
        self.assertEqual((1, 0), (self.cloud.refreshes, self.cloud.reuse_detected))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())
        # what is revoked is the new token, and with it the login
        revoked = self.cloud.sent(REVOKE)[0].body
        self.assertIn(urllib.parse.quote(on_disk[0]["refresh_token"]), revoked)

    def test_rejected_access_token_is_refreshed_once(self):
        self.with_login()
        self.cloud.expire_access_tokens()  # sooner than the provider had said
        self.logout()
        self.assertEqual((1, 0), (self.cloud.refreshes, self.cloud.reuse_detected))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())

    def test_a_gateway_does_not_say_that_the_key_is_gone(self):
        """Only the server does, which answers in JSON or with nothing."""
        web = "<html>Not here</html>"
        for status, page in ((200, web), (404, web), (404, "default backend - 404")):
            with self.subTest(status=status, page=page):
                self.cloud.reset()
                self.with_login()
                for path in (API_KEYS + "/" + KEY_ID, ME):
                    code = 401 if path == ME else status
                    self.cloud.fault(path, "status", 9, status=code, body=page)
                self.assertIn(KEY_ID, self.error_of(self.logout(1), 1))

    def test_nobody_is_asked_who_the_provider_is(self):
        self.with_login(expired=True)
        self.cloud.configuration_overrides = {
            "issuer": ELSEWHERE,
            "token_endpoint": ELSEWHERE,
        }
        self.cloud.discovery_overrides = {"discovery_url": ELSEWHERE}
        self.logout()
        self.assertEqual([], self.cloud.sent(DISCOVERY) + self.cloud.sent(CONFIGURATION))
        self.assertEqual([KEY, OTHER_KEY], self.cloud.keys_alive())

    def test_a_login_without_its_provider(self):
        """Of an older store: its access token may still do; nothing else is sent
        anywhere."""
        for expired in (False, True):
            for provider in (None, {}, self.pinned(token_endpoint=None)):
                with self.subTest(expired=expired, provider=provider):
                    self.cloud.reset()
                    self.with_login(expired=expired, provider=provider)
                    result = self.logout(int(expired))
                    self.assertIn("stored without its identity provider", result.err)
                    self.assertEqual([], self.cloud.sent(TOKEN) + self.cloud.sent(REVOKE))
                    self.assertEqual(expired, KEY_ID in result.err)

    def test_an_echoed_refresh_token_is_masked_as_it_was_sent(self):
        token = "rt/CANARY+0123=4567"
        for form in (token, urllib.parse.quote_plus(token)):
            self.with_login(expired=True, refresh_token=token)
            self.cloud.fault(
                TOKEN,
                "status",
                status=400,
                body={"error_description": "no refresh_token=" + form},
            )
            self.assertIn("no refresh_token=********", self.error_of(self.logout(1), 1))

    def test_a_rotated_token_that_cannot_be_stored_keeps_no_profile(self):
        self.with_login(expired=True)
        save, trouble = (
            llamactl.Store.save,
            [OSError(errno.ENOSPC, "No space left on device")],
        )

        def full_once(store, data):
            if data["environments"][self.url]["profiles"] and trouble:
                raise trouble.pop()
            save(store, data)

        with unittest.mock.patch.object(
            llamactl.Store, "check_writable", llamactl.Store.load
        ):
            with unittest.mock.patch.object(llamactl.Store, "save", full_once):
                self.assertIn(KEY_ID, self.error_of(self.logout(1), 1))
        self.assertEqual([], trouble)
        self.assertEqual(0, self.cloud.count("DELETE", API_KEYS + "/" + KEY_ID))

    def test_a_lost_refresh_is_not_sent_twice(self):
        self.with_login(expired=True)
        self.cloud.fault(TOKEN, "truncated", 9)
        self.assertIn(KEY_ID, self.error_of(self.logout(1), 1))
        self.assertEqual(1, self.cloud.count("POST", TOKEN))

    def test_a_key_that_may_still_work_is_named(self):
        self.with_login()
        self.cloud.fault(API_KEYS + "/" + KEY_ID, "status", 9, status=500)
        self.assertIn(KEY_ID, self.error_of(self.logout(1), 1))

    def test_a_key_that_is_gone_counts_as_deleted(self):
        self.with_login()
        self.cloud.keys = {KEY: self.cloud.keys[KEY], OTHER_KEY: self.cloud.keys[OTHER_KEY]}
        self.logout()

    def test_a_key_that_is_dead_already_is_no_problem(self):
        """Deleted elsewhere, while the login's own tokens are of no use any more."""
        self.with_login(expired=True)
        self.cloud.fault(TOKEN, "status", 9, status=400, body={"error": "invalid_grant"})
        del self.cloud.keys[self.profiles()["main"]["api_key"]]
        self.assertNotIn("may still work", self.logout().err)

    def test_the_providers_401_is_not_the_control_planes(self):
        self.with_login(expired=True)
        self.cloud.fault(TOKEN, "status", 9, status=401, body={"error": "invalid_client"})
        self.assertIn(KEY_ID, self.error_of(self.logout(1), 1))
        self.assertEqual(1, self.cloud.count("POST", TOKEN))


class RequestCounts(NetworkCase):
    """No request is sent that a command can do without."""

    ONE_LOGIN = [
        "GET " + DISCOVERY,
        "GET " + CONFIGURATION,
        "POST " + DEVICE_CODE,
        "POST " + TOKEN,
        "GET " + PROJECT_LIST,
    ]

    def test_of_commands(self):
        projects = "GET " + PROJECT_LIST
        for argv, expected in (
            (TOKEN_BOTH, [projects]),
            (TOKEN_BOTH + ["--no-verify"], []),
            (["projects", "get"], [projects]),
            (["projects", "get", "proj-alpha"], [projects]),
            (["projects", "use", "proj-beta"], [projects]),
            (["auth", "status"], [projects, "GET " + ME]),
            (["auth", "status", "--offline"], []),
            (["auth", "get"], []),
            (["auth", "get", "main", "-o", "json"], []),
            (["auth", "use", "main"], []),
            (["config"], []),
            (["environments", "get"], []),
            (["environments", "use", self.url], []),
            (["environments", "add", self.url], ["GET " + VERSION]),
            (["environments", "add", self.url, "--no-verify"], []),
            (["organizations", "get"], ["GET " + VERSION, "GET " + ORGANIZATION_LIST]),
            (["deployments", "get"], ["GET " + CONTROL]),
            (["deployments", "get", "invoices"], ["GET " + CONTROL + "/invoices"]),
            (["auth", "inject", "--env-file", os.path.join(self.home, "new.env")], []),
            (["auth", "logout", "main"], []),
            (["environments", "delete", self.url], []),
        ):
            with self.subTest(argv=argv):
                self.start("key")
                self.succeeds(*argv)
                self.assertEqual(expected, self.paths_sent())

    def test_of_logins(self):
        self.succeeds(*LOGIN)
        self.assertEqual(self.ONE_LOGIN + ["POST " + API_KEYS], self.paths_sent())
        self.start("login")
        self.succeeds(*LOGIN)
        self.assertEqual(
            self.ONE_LOGIN + ["GET " + ME, "POST " + REVOKE], self.paths_sent()
        )
        self.start("login")
        del self.cloud.keys[self.profiles()["main"]["api_key"]]
        self.succeeds(*LOGIN)
        self.assertEqual(
            self.ONE_LOGIN + ["GET " + ME, "POST " + API_KEYS, "POST " + REVOKE],
            self.paths_sent(),
        )

    def test_of_logouts(self):
        for how, refresh in (("login", 0), ("expired", 1)):
            with self.subTest(how):
                self.start(how)
                self.succeeds("auth", "logout", "main")
                self.assertEqual(
                    ["POST " + TOKEN] * refresh
                    + ["DELETE %s/%s" % (API_KEYS, KEY_ID), "POST " + REVOKE],
                    self.paths_sent(),
                )

    def test_without_organizations(self):
        self.start("key")
        self.cloud.capabilities = []
        result = self.succeeds("organizations", "get", "-o", "json")
        self.assertEqual([], load(result.out))
        self.assertIn("warning: ", result.err)
        self.assertEqual(["GET " + VERSION], self.paths_sent())


# ========================================================================================
# commands: one class a command: argv, environment, stdin -> exit code, stdout, stderr
# ========================================================================================


class AuthToken(CommandCase):
    def test_key_and_project_make_a_current_profile_without_a_question(self):
        result = self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-beta", terminal=True
        )
        self.assertEqual(result.out, "")
        profile = self.profiles()["llx-wxyz"]
        self.assertEqual(
            (profile["api_key"], profile["project_id"], profile["project_name"]),
            (KEY, "proj-beta", "Beta"),
        )
        self.assertEqual(self.stored()[self.url]["current_profile"], "llx-wxyz")
        self.assertEqual(self.requests(), [("GET", LIST_PROJECTS)])

    def test_ways_to_give_a_key_each_stripped(self):
        padded = (" \t%s\r\n" % KEY).encode()
        path = self.key_file(b"\xef\xbb\xbf" + padded)
        fifo = os.path.join(self.home, "fifo")
        os.mkfifo(fifo)
        ways = (
            (["--api-key", KEY], b""),
            (["--api-key=" + KEY], b""),
            (["--api-key", "-"], padded),
            (["--api-key=-"], padded),
            (["--api-key-file", "-"], padded),
            (["--api-key-file", path], b""),
            (["--api-key-file", fifo], b""),
        )
        for way, stdin in ways:
            with self.subTest(way=way[0][:14], stdin=stdin):
                self.write_store({})
                writer = threading.Thread(target=self.write_pipe, args=(fifo, padded))
                if fifo in way:
                    writer.start()
                self.done("auth", "token", "--project-id", "proj-alpha", *way, stdin=stdin)
                self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)
                if fifo in way:
                    writer.join()

    def write_pipe(self, path, content):
        with open(path, "wb") as file:
            file.write(content)

    def test_key_from_an_inherited_descriptor(self):
        skip_without_paths_of_descriptors()
        self.key_file(KEY.encode() + b"\n")
        command = 'exec "$0" "$@" 3< key.txt'
        process = subprocess.Popen(
            [
                "sh",
                "-c",
                command,
                sys.executable,
                PROGRAM,
                "auth",
                "token",
                "--api-key-file",
                "/dev/fd/3",
                "--project",
                "proj-alpha",
            ],
            env=self.env,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate()
        self.assertEqual(self.note(process.returncode, out, err).code, 0)
        self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)

    def test_failures_store_nothing(self):
        self.cloud.add_key(OTHER_KEY, projects=[])
        before = self.store_text()
        self.failures(
            (
                ("auth token", 2, "--api-key", "auth token"),
                ("auth token --project proj-alpha", 2, "--api-key", None),
                (
                    "auth token --api-key %s" % KEY,
                    2,
                    "--project.*proj-alpha.*proj-beta",
                    None,
                ),
                (
                    "auth token --api-key llx-CANARY-unknown-key",
                    4,
                    "rejected: .*401.*req-",
                    "create a key in the web console",
                ),
                (
                    "auth token --api-key %s --project nope" % KEY,
                    1,
                    "nope.*proj-alpha.*proj-beta",
                    None,
                ),
                ("auth token --api-key %s" % OTHER_KEY, 1, "no project", None),
                (
                    "auth token --api-key %s --api-key-file x" % KEY,
                    2,
                    "--api-key-file",
                    None,
                ),
                (
                    "auth token --api-key-file /nowhere/at/all --project p",
                    1,
                    "/nowhere/at/all",
                    None,
                ),
                ("auth token --api-key %s --no-verify" % KEY, 2, "--project", None),
                ("auth token --api-key %s --name=-x --project p" % KEY, 2, "--name", None),
                ("auth token --api-key %s --project a\u00e9" % KEY, 1, "not found", None),
                (
                    "auth token --no-verify --api-key %s --project a\u00e9" % KEY,
                    2,
                    "--project",
                    None,
                ),
                ("auth token --api-key", 2, "--api-key", "auth token --help"),
            )
        )
        self.assertEqual(self.store_text(), before)

    def test_what_the_server_says_decides_what_is_stored(self):
        both = ["auth", "token", "--api-key", KEY, "--project", "proj-alpha"]
        for kind, options, code, stored in (
            ("status", {"status": 401}, 4, False),
            ("status", {"status": 403}, 4, False),
            ("status", {"status": 404}, 1, False),
            ("status", {"status": 500}, 5, False),
            ("html", {}, 5, False),
            ("wrong_shape", {}, 5, False),
            ("silence", {}, 0, True),
        ):
            with self.subTest(kind=kind, options=options):
                self.write_store({})
                self.cloud.reset()
                self.cloud.fault("*", kind, **options)
                with self.impatient() if kind == "silence" else contextlib.ExitStack():
                    result = self.call(*both)
                self.assertEqual(
                    (result.code, bool(self.profiles())), (code, stored), result.err
                )
                self.assertEqual("warning: " in result.err, stored)

    def test_no_server_at_all(self):
        self.url = NOWHERE
        self.write_store({})
        result = self.done("auth", "token", "--api-key", KEY, "--project", "proj-alpha")
        self.assertRegex(result.err, "warning: .*verified")
        self.assertEqual(list(self.profiles()), ["llx-wxyz"])
        self.write_store({})
        self.expect_failure(self.call("auth", "token", "--api-key", KEY), 5, "refused")
        self.assertEqual(self.profiles(), {})

    def test_no_verify_sends_nothing(self):
        self.done(
            "auth",
            "token",
            "--api-key",
            "llx-CANARY-never-seen",
            "--project",
            "p",
            "--no-verify",
        )
        self.assertEqual(self.requests(), [])
        self.assertEqual(self.profiles()["llx-seen"]["project_id"], "p")

    def test_one_project_is_chosen(self):
        for argv, project in (
            (["--org", "org-two"], "proj-beta"),
            (["--org", "org-one"], "proj-alpha"),
        ):
            self.write_store({})
            self.done("auth", "token", "--api-key", KEY, *argv)
            self.assertEqual(self.profiles()["llx-wxyz"]["project_id"], project)

    def test_environment_without_auth_needs_no_key(self):
        self.cloud.requires_auth = False
        self.write_store({}, requires_auth=False)
        self.done("auth", "token", "--project", "proj-alpha")
        self.assertEqual(self.rows("auth", "get")[0]["auth_type"], "none")
        self.assertEqual(bearers(self.cloud.requests), {"none"})
        self.expect_failure(self.call("auth", "inject", "--env-file", "-"), 4, "API key")
        self.expect_failure(self.call("auth", "login"), 1, "login", "auth token")

    def test_variables_are_no_source_of_a_new_profile(self):
        env = {"LLAMA_CLOUD_API_KEY": KEY, "LLAMA_AGENTS_PROJECT_ID": "proj-alpha"}
        self.expect_failure(self.call("auth", "token", env=env), 2, "--api-key")
        for verb in ("token", "login"):
            with self.subTest(verb=verb):
                other = {"LLAMA_CLOUD_BASE_URL": "https://other.example/"}
                result = self.call("auth", verb, "--project", "proj-alpha", env=other)
                self.expect_failure(
                    result,
                    2,
                    "LLAMA_CLOUD_BASE_URL",
                    "environments add https://other.example",
                )
        self.assertEqual((self.profiles(), self.requests()), ({}, []))
        for env in (
            {"LLAMA_CLOUD_BASE_URL": self.url + "/"},
            dict(other, LLAMA_CLOUD_USE_PROFILE="1"),
        ):
            self.done("auth", "token", "--api-key", KEY, "--project", "proj-alpha", env=env)
            self.done("auth", "login", "--project", "proj-alpha", env=env)


class AuthLogin(CommandCase):
    def test_start_prints_what_a_person_needs_and_resume_finishes(self):
        started = load(self.done("auth", "login", "--start", "-o", "JSON").out)
        self.assertEqual(
            fields(started),
            [
                "verification_uri",
                "verification_uri_complete",
                "user_code",
                "expires_at",
                "interval",
            ],
        )
        self.assertIn(started["user_code"], self.cloud.pending())
        self.assertLess(abs(started["expires_at"] - time.time() - 600), 60)
        for kind, shown in (
            ("text", r"(?m)^user_code +[A-Z]{4}-[A-Z]{4}$"),
            ("yaml", r"(?m)^user_code: [A-Z]{4}-[A-Z]{4}$"),
        ):
            self.assertRegex(self.done("auth", "login", "--start", "-o", kind).out, shown)
        self.assertNotIn("device_code", json.dumps(started))
        self.assertEqual(self.cloud.count("POST", "/oidc/token"), 0)
        self.done("auth", "login", "--resume", "--project", "proj-beta", "--name", "work")
        self.assertEqual(self.profiles()["work"]["project_id"], "proj-beta")
        self.assertEqual(self.rows("auth", "get", "work")["auth_type"], "oidc")
        self.expect_failure(
            self.call("auth", "login", "--resume"), 2, "waiting", "auth login --start"
        )

    def test_start_replaces_what_waited(self):
        first, second = (
            self.done("auth", "login", "--start", "-o", "json").out for _ in "12"
        )
        self.assertNotEqual(load(first)["user_code"], load(second)["user_code"])
        self.cloud.auto_approve = None
        self.cloud.approve(load(second)["user_code"])
        self.done("auth", "login", "--resume", "--project", "proj-alpha")

    def test_a_gateway_s_no_leaves_what_waits(self):
        self.done("auth", "login", "--start")
        for status in (403, 404, 302):
            self.cloud.fault(
                "/oidc/token", "status", status=status, body="<html>Blocked</html>"
            )
        self.done("auth", "login", "--resume", "--project", "proj-alpha")

    def test_nobody_is_asked_who_the_provider_is(self):
        self.done("auth", "login", "--start")
        self.cloud.reset()
        elsewhere = "https://elsewhere.invalid"
        self.cloud.configuration_overrides = {"issuer": elsewhere}
        self.cloud.discovery_overrides = {"discovery_url": elsewhere}
        self.cloud.id_token_claims = {"iss": self.url + "/oidc"}
        self.done("auth", "login", "--resume", "--project", "proj-alpha")
        self.assertEqual(self.requests()[0], ("POST", "/oidc/token"))

    def test_end_of_a_login_drops_what_waited(self):
        for error, message in (("access_denied", "denied"), ("expired_token", "expired")):
            with self.subTest(error=error):
                self.done("auth", "login", "--start")
                self.cloud.token_script = [(400, {"error": error})]
                self.expect_failure(self.call("auth", "login", "--resume"), 4, message)
                self.expect_failure(self.call("auth", "login", "--resume"), 2, "waiting")
        self.done("auth", "login", "--start")
        waiting = dict(self.stored()[self.url]["login"], expires_at=int(time.time()) - 1)
        self.write_store({}, login=waiting)
        self.expect_failure(self.call("auth", "login", "--resume"), 4, "expired")
        self.expect_failure(self.call("auth", "login", "--resume"), 2, "waiting")

    def test_a_mistyped_project_leaves_a_known_user_s_own(self):
        self.login("--project", "proj-beta")
        result = self.call("auth", "login", "--project", "Typo")
        self.assertEqual(result.code, 2)
        self.assertIn("error: project Typo not found; available: proj-alpha", result.err)
        self.assertIn("hint: llamactl projects use ID\n", result.err)
        self.assertIn("logged in as dev@example.com, project Beta (proj-beta)", result.err)
        self.assertEqual(self.profiles()["dev@example.com"]["project_id"], "proj-beta")

    def test_a_known_user_s_project_is_the_default(self):
        self.login("--project", "proj-beta")
        for options in ({}, {"stdin": b"\n", "terminal": True}):
            result = self.login("--quiet", **options)
            self.assertEqual(self.profiles()["dev@example.com"]["project_id"], "proj-beta")
        self.assertIn("\n*   2  Beta (proj-beta)\n", result.err)
        self.assertIn("by number or name [Beta]: ", result.err)

    def test_quiet_hides_the_countdown(self):
        for flags, shown in (([], True), (["--quiet"], False)):
            result = self.login("--project", "proj-alpha", *flags, terminal=True)
            self.assertEqual(" left" in result.err, shown)

    def test_failures(self):
        self.failures(
            (
                ("auth login --start --resume", 2, "--resume", None),
                ("auth login -o json", 2, "-o is for --start", None),
                ("auth login --resume -o yaml", 2, "-o is for --start", None),
                ("auth login --resume", 2, "waiting", "auth login --start"),
                ("auth login --name=-x", 2, "--name", None),
            )
        )
        self.cloud.browser_login = False
        self.expect_failure(self.call("auth", "login"), 1, "not configured", "auth token")
        self.assertEqual(self.profiles(), {})

    def test_code_and_address_are_shown_even_when_quiet(self):
        for flags in ((), ("--quiet",)):
            result = self.login("--project", "proj-alpha", *flags)
            self.assertRegex(result.err, self.url + "/oidc/device on any device")
            self.assertRegex(
                result.err, self.url + r"/oidc/device\?user_code=[A-Z]{4}-[A-Z]{4}\n"
            )
            self.assertRegex(result.err, r"(?m)^ +[A-Z]{4}-[A-Z]{4}$")
            self.assertEqual(result.out, "")

    def test_no_project_anywhere(self):
        self.cloud.projects = []
        result = self.login(code=1)
        self.assertRegex(result.err, "error: .*project.*https://")
        self.assertEqual(self.profiles(), {})

    def test_an_approval_is_never_wasted_on_a_project(self):
        for flags, message in (
            ((), "proj-alpha.*proj-beta"),
            (("--project", "nope"), "nope.*proj-alpha.*proj-beta"),
        ):
            with self.subTest(flags=flags):
                self.write_store({})
                result = self.login(*flags, code=2)
                self.assertRegex(result.err, "error: .*" + message)
                self.assertIn("hint: llamactl projects use ID\n", result.err)
                self.assertIsNone(self.profiles()["dev@example.com"]["project_id"])
                self.expect_failure(
                    self.call("auth", "inject", "--env-file", "-"),
                    2,
                    "project",
                    "projects use",
                )
                self.expect_failure(
                    self.call("deployments", "get"), 2, "project", "projects use"
                )
                self.done("projects", "use", "proj-beta")
                self.assertEqual(self.rows("config")["project_id"], "proj-beta")


class AuthGet(CommandCase):
    def test_rows(self):
        self.with_profile()
        self.done("auth", "token", "--api-key", KEY, "--project", "proj-beta")
        found = self.rows("auth", "get")
        self.assertEqual(
            fields(found), ["name", "api_url", "project_id", "active", "auth_type"]
        )
        self.assertEqual(
            [list(row.values()) for row in found],
            [
                ["llx-wxyz", self.url, "proj-beta", True, "token"],
                ["main", self.url, "proj-alpha", False, "token"],
            ],
        )
        self.assertEqual(self.rows("auth", "get", "main"), dict(found[1]))
        self.assertEqual(
            self.table("auth", "get"),
            [
                ["NAME", "API_URL", "PROJECT_ID", "ACTIVE", "AUTH"],
                ["llx-wxyz", self.url, "proj-beta", "yes", "token"],
                ["main", self.url, "proj-alpha", "no", "token"],
            ],
        )
        self.assertEqual(
            self.done("auth", "get").out,
            (
                "NAME      API_URL{0}  PROJECT_ID  ACTIVE  AUTH\n"
                "llx-wxyz  {1}  proj-beta   yes     token\n"
                "main      {1}  proj-alpha  no      token\n"
            ).format(" " * (len(self.url) - 7), self.url),
        )

    def test_empty(self):
        self.assertEqual(self.done("auth", "get", "-o", "json").out, "[]\n")
        self.assertEqual(self.rows("auth", "get"), [])
        self.expect(self.call("auth", "get"), 0, "", "hint: llamactl auth login\n")
        open(os.path.join(self.folder, "profiles.db"), "w").close()
        self.expect(
            self.call("auth", "get"), 0, "", "hint: .*auth import --from-official\n"
        )

    def test_only_profiles_of_the_current_environment(self):
        self.with_profile()
        self.done("environments", "add", "https://other.example", "--no-verify")
        self.assertEqual(self.rows("auth", "get"), [])
        self.expect_failure(self.call("auth", "get", "main"), 1, "main")

    def test_a_read_creates_nothing(self):
        shutil.rmtree(self.folder)
        self.assertEqual(self.done("auth", "get", "-o", "json").out, "[]\n")
        self.done("config")
        self.done("environments", "get")
        self.assertFalse(os.path.exists(self.folder))


class AuthUse(CommandCase):
    def test_use(self):
        self.write_store(
            {
                "a": {"auth_type": "token", "api_key": KEY, "project_id": "p"},
                "b": {"auth_type": "token", "api_key": KEY, "project_id": "q"},
            },
            "a",
        )
        self.expect(self.call("auth", "use", "b"), 0, "", "b")
        self.assertEqual(self.stored()[self.url]["current_profile"], "b")
        self.failures(
            (
                ("auth use", 2, "NAME.*a, b", None),
                ("auth use c", 1, "c.*a, b", "auth get"),
                ("auth use a b", 2, "argument", "auth use --help"),
            )
        )
        self.assertEqual(
            (self.stored()[self.url]["current_profile"], self.requests()), ("b", [])
        )

    def test_another_process_switches_the_environment_meanwhile(self):
        self.with_profile()
        self.done("environments", "add", NOWHERE, "--no-verify")
        before = self.stored()

        def switch(*_):
            with open(self.store_path, "w") as file:
                data = {"version": 1, "current_environment": NOWHERE, "environments": left}
                json.dump(data, file)
            return "main"

        hear(self.cloud, LIST_PROJECTS, after=switch)
        for words in ("auth use", "projects use proj-beta"):
            for left, code in ((before, 0), ({NOWHERE: before[NOWHERE]}, 1)):
                with self.subTest(words=words, code=code):
                    self.with_profile()
                    with unittest.mock.patch.object(llamactl.Terminal, "choose", switch):
                        result = self.call(*words.split())
                    self.assertEqual(result.code, code, result.err)
                    self.assertEqual(self.stored()[NOWHERE], before[NOWHERE])
                    self.assertEqual(len(self.stored()), 2 - code)
        self.assertRegex(result.err, "^error: %s has no profile main" % self.url)

    def test_nothing_to_use(self):
        self.failures(
            (("auth use", 4, "not logged in", "auth login"), ("auth use x", 1, "x", None))
        )

    def test_nothing_to_use_where_no_login_is_needed(self):
        self.write_store({}, requires_auth=False)
        for verb in ("use", "logout"):
            with self.subTest(verb=verb):
                result = self.call("auth", verb)
                self.assertIn(result.code, (1, 2, 4))
                self.assertRegex(result.err, "^error: .*no profile")
                self.assertNotIn("None", result.err)


class AuthLogout(CommandCase):
    def test_token_profile_goes_without_a_request(self):
        self.with_profile()
        self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-beta", "--name", "b"
        )
        self.cloud.reset()
        self.done("auth", "logout", "main")
        self.assertEqual(self.stored()[self.url]["current_profile"], "b")
        self.done("auth", "logout", "b")
        self.assertEqual(
            (self.profiles(), self.stored()[self.url]["current_profile"]), ({}, None)
        )
        self.assertEqual(self.requests(), [])
        self.assertNotIn(CANARY, self.store_text())
        self.failures(
            (
                ("auth inject --env-file -", 4, "not logged in", "auth login"),
                ("auth logout b", 1, "b", None),
                ("auth logout", 4, "not logged in", None),
            )
        )

    def test_a_profile_that_goes_meanwhile_is_logged_out(self):
        self.with_profile()

        def go_and_choose(*_):
            self.write_store({})
            return "main"

        with unittest.mock.patch.object(llamactl.Terminal, "choose", go_and_choose):
            self.done("auth", "logout")

    def test_choice_is_needed(self):
        self.with_profile()
        self.failures(
            (
                ("auth logout", 2, "NAME.*main", None),
                ("auth logout main --all", 2, "--all", None),
            )
        )
        self.assertEqual(list(self.profiles()), ["main"])

    def test_selection_of_other_environments_stays(self):
        self.with_profile()
        first = self.url
        self.done("environments", "add", NOWHERE, "--no-verify")
        self.done(
            "auth",
            "token",
            "--api-key",
            KEY,
            "--project",
            "p",
            "--no-verify",
            "--name",
            "main",
        )
        self.done("auth", "logout", "main")
        self.assertEqual(self.stored()[first]["current_profile"], "main")
        self.assertIsNone(self.stored()[NOWHERE]["current_profile"])

    def test_all_is_every_profile_of_every_environment(self):
        self.with_profile()
        self.done("environments", "add", NOWHERE, "--no-verify")
        self.done("auth", "token", "--api-key", KEY, "--project", "p", "--no-verify")
        self.done("auth", "logout", "--all")
        self.assertEqual(
            [record["profiles"] for record in self.stored().values()], [{}, {}]
        )
        self.assertNotIn(CANARY, self.store_text())
        self.done("auth", "logout", "--all")

    def test_login_is_ended_on_the_server(self):
        self.login("--project", "proj-alpha")
        made = self.profiles()["dev@example.com"]["api_key"]
        self.done("auth", "logout", "dev@example.com")
        self.assertNotIn(made, self.cloud.keys_alive())
        self.assertTrue(self.cloud.logins[0]["revoked"])
        self.assertEqual(self.profiles(), {})

    def test_a_key_that_may_still_work_is_named(self):
        for command in (
            "auth logout dev@example.com",
            "auth logout --all",
            "environments delete " + self.url,
        ):
            with self.subTest(command=command):
                self.with_profile()
                self.login("--project", "proj-alpha")
                key_id = self.profiles()["dev@example.com"]["api_key_id"]
                self.cloud.fault("/api/v1/api-keys/" + key_id, "status", status=500)
                result = self.call("--quiet", *command.split())
                self.expect_failure(result, 1, key_id, "delete the key in the web console")
                left = self.stored().get(self.url, {"profiles": {}})["profiles"]
                self.assertEqual(list(left), ["main"] if "@" in command else [])
        self.assertNotIn(self.url, self.stored())


def write_sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


class AuthInject(CommandCase):
    def lines(self, key=KEY, project="proj-alpha", url=None):
        return (
            "LLAMA_CLOUD_API_KEY=%s\nLLAMA_CLOUD_BASE_URL=%s\nLLAMA_AGENTS_PROJECT_ID=%s\n"
            % (key, url or self.url, project)
        )

    def inject(self, *argv, **options):
        return self.done(
            "auth", "inject", "--env-file", "-", *argv, sings=True, **options
        ).out

    def test_where_it_writes(self):
        self.with_profile()
        self.assertEqual(
            sorted(self.inject().splitlines()), sorted(self.lines().splitlines())
        )
        self.assertEqual(self.process("auth", "inject").code, 0)
        self.done(
            "auth", "inject", "--env-file", os.path.join(self.home, "new/folder/x.env")
        )
        for name in (".env", "new/folder/x.env"):
            with open(os.path.join(self.home, name)) as file:
                self.assertEqual(file.read(), self.inject())
        self.assertEqual(self.requests(), [])

    def test_whose_credential(self):
        self.with_profile()
        self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-beta", "--name", "b"
        )
        variables = {
            "LLAMA_CLOUD_API_KEY": OTHER_KEY,
            "LLAMA_AGENTS_PROJECT_ID": "env-project",
        }
        for argv, env, expected in (
            ([], {}, self.lines(project="proj-beta")),
            (["--profile", "main"], {}, self.lines()),
            (["--project", "proj-alpha"], {}, self.lines(project="proj-alpha")),
            (["--project", "ALPHA"], {}, self.lines(project="proj-alpha")),
            (["--project", "Beta"], {}, self.lines(project="proj-beta")),
            ([], variables, self.lines(OTHER_KEY, "env-project", OFFICIAL_URL)),
            (["--profile", "main"], variables, self.lines()),
            (
                ["--project", UNSEEN],
                dict(variables, LLAMA_CLOUD_BASE_URL=NOWHERE),
                self.lines(OTHER_KEY, UNSEEN, NOWHERE),
            ),
        ):
            with self.subTest(argv=argv, env=sorted(env)):
                found = self.inject(*argv, env=env)
                self.assertEqual(sorted(found.splitlines()), sorted(expected.splitlines()))

    def test_failures(self):
        self.failures(
            (
                ("auth inject", 4, "not logged in", "auth login"),
                ("auth inject --env-file", 2, "--env-file", "auth inject --help"),
            )
        )
        self.with_profile(project=None)
        self.failures(
            (
                ("auth inject", 2, "project", "projects use"),
                ("auth inject --profile nope", 1, "nope", None),
            )
        )
        self.with_profile(key=None)
        self.failures((("auth inject --env-file -", 4, "API key", None),))
        self.assertEqual(os.listdir(self.home), ["conf"])

    def test_a_file_that_git_would_add_is_warned_about(self):
        self.with_profile()
        tree = os.path.join(self.home, "clone")
        os.makedirs(os.path.join(tree, ".git"))
        os.makedirs(os.path.join(tree, "deploy"))
        for name, ignored, warned in (
            (".env", None, True),
            (".env", "", True),
            (".env", "# .env\n!x\ndocs/*\n", True),
            (".env", ".env\n", False),
            (".env", "build\n/.env\r\n", False),
            (".env", "*.env", False),
            (".env", ".env*\n", False),
            (".env", "**/.env\n", False),
            (".env", ".env\n!.env\n", True),
            (".env", "!.env\n.env\n", False),
            ("deploy/.env", "/.env\n", True),
            ("deploy/.env", "deploy/\n", False),
            ("deploy/.env", "/deploy\n", False),
            ("deploy/.env", "other/\n", True),
            (".env", "deploy/.env\n", True),
            ("deploy/.env", "deploy/.env\n", False),
            ("deploy/.env", ".env\n", False),
            ("deploy/prod.env", ".env\n", True),
            ("../outside.env", None, False),
        ):
            with self.subTest(name=name, ignored=ignored):
                path = os.path.join(tree, ".gitignore")
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                if ignored is not None:
                    with open(path, "w", newline="") as file:
                        file.write(ignored)
                target = os.path.join(tree, name)
                result = self.done("auth", "inject", "--env-file", target)
                self.assertEqual("add it to .gitignore" in result.err, warned, result.err)

    def test_an_odd_gitignore_holds_nobody_up(self):
        self.with_profile()
        os.mkdir(os.path.join(self.home, ".git"))
        ignore = os.path.join(self.home, ".gitignore")
        for make in (
            lambda: os.mkfifo(ignore),
            lambda: os.symlink("/dev/zero", ignore),
            lambda: os.mkdir(ignore),
            lambda: write_sparse(ignore, 1 << 30),
        ):
            make()
            argv = ["auth", "inject", "--env-file", os.path.join(self.home, ".env")]
            result = self.process(*argv, timeout=10)
            self.assertEqual(result.code, 0, result.err)
            self.assertIn("add it to .gitignore", result.err)
            (os.rmdir if os.path.isdir(ignore) else os.unlink)(ignore)


class AuthStatus(CommandCase):
    def values(self, *argv, code=0, env=()):
        """field -> (value, source), from the text; the same facts stand in JSON and
        YAML."""
        shown = {}
        for kind in ("text", "json", "YAML"):
            result = self.call("auth", "status", "-o", kind, *argv, env=env)
            self.assertEqual(result.code, code, result.err)
            shown[kind] = re.sub("req-[0-9]+", "req", result.out)
        rows = [re.split(" {2,}", line) for line in shown["text"].splitlines()]
        self.assertRegex(" ".join(rows[0]), "^[A-Z ]+$")
        told = json.loads(shown["json"])
        self.assertEqual(shown["YAML"], llamactl.yaml_text(told))
        found = {row[0]: tuple(row[:0:-1]) for row in rows[1:]}
        for name, cells in found.items():
            self.assertEqual(cells[0], told[name] or "-")
        return found

    def test_it_works_and_says_where_each_value_came_from(self):
        self.with_profile()
        found = self.values()
        self.assertEqual(found["environment"][0], self.url)
        self.assertEqual(found["profile"][0], "main")
        self.assertEqual(found["project_id"], ("proj-alpha", "profile"))
        self.assertEqual(found["api_key"][1], "profile")
        self.assertNotIn(KEY[:-4], str(found))

    def test_sources(self):
        self.with_profile()
        self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-beta", "--name", "b"
        )
        full = {
            "LLAMA_CLOUD_API_KEY": KEY,
            "LLAMA_AGENTS_PROJECT_ID": "proj-beta",
            "LLAMA_CLOUD_BASE_URL": self.url,
        }
        table = (
            ([], {}, "profile", "b", "auth use"),
            (["main"], {}, "profile", "main", "NAME"),
            (["--profile", "main"], {}, "profile", "main", "--profile"),
            ([], {"LLAMACTL_PROFILE": "main"}, "profile", "main", "LLAMACTL_PROFILE"),
            ([], full, "environment", self.url, "LLAMA_CLOUD_BASE_URL"),
            ([], full, "project_id", "proj-beta", "LLAMA_AGENTS_PROJECT_ID"),
            (["main"], full, "profile", "main", "NAME"),
            ([], {}, "environment", self.url, "environments use"),
            ([], {}, "project_name", "Beta", "profile"),
            (["--project", "third"], {}, "project_id", "third", "--project"),
            (["--project", "third"], {}, "project_name", "-", "-"),
            (["--project", "third"], full, "project_id", "third", "--project"),
            (
                [],
                dict(full, LLAMA_CLOUD_BASE_URL=""),
                "environment",
                OFFICIAL_URL,
                "default",
            ),
            ([], dict(full, LLAMA_CLOUD_USE_PROFILE="1"), "profile", "b", "auth use"),
        )
        for argv, env, name, value, source in table:
            with self.subTest(argv=argv, name=name, env=sorted(env)):
                found = self.values("--offline", *argv, env=env)
                self.assertEqual(found[name], (value, source))

    def test_exit_codes(self):
        self.values(code=4)
        self.values("--offline", code=4)
        self.with_profile()
        self.values(code=0)
        for project in ("proj-alpha", "BETA"):
            self.values("--project", project, code=0)
        self.assertEqual(
            self.values("--project", "BETA")["project_id"], ("proj-beta", "--project")
        )
        named = self.values("--project", "nope", code=1)
        self.with_profile(project="Beta")  # an id, which is never taken for a name
        for found, detail in (
            (named, "project nope not found; available: proj-alpha (Alpha), "),
            (self.values(code=1), "the key works, but has no access to the project"),
        ):
            self.assertEqual(found["credential"][0], "works")
            self.assertIn(detail, found["detail"][0])
        self.with_profile(key="llx-CANARY-rejected-key")
        self.values(code=4)
        self.values("--offline", code=0)
        self.url = NOWHERE
        self.with_profile()
        self.values(code=5)

    def test_offline_sends_nothing(self):
        self.with_profile()
        self.values("--offline")
        self.assertEqual(self.requests(), [])

    def test_certificates_and_proxy(self):
        self.url = "https://llama.example"
        self.with_profile()
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            with self.subTest(name=name):
                bundle = os.path.join(self.home, name + ".pem")
                found = self.values("--offline", env={name: bundle})
                self.assertEqual(found["ca_bundle"], (bundle, name))
        for proxy in (
            "http://user:pw-CANARY@proxy.example:3128",
            "user:CANARY@proxy.example:3128",
            "http://user:p@CANARY@proxy.example:3128/",
            "http://proxy.example:3128",
            "http://user:p/CANARY@proxy.example:3128",
        ):
            with self.subTest(proxy=proxy):
                shown = self.values("--offline", env={"https_proxy": proxy})["proxy"][0]
                self.assertIn("proxy.example:3128", shown)
                self.assertNotIn("CANARY", shown)
        direct = {"https_proxy": "http://proxy.example:3128", "no_proxy": "llama.example"}
        self.assertEqual(self.values("--offline", env=direct)["proxy"][0], "-")


class AuthExec(CommandCase):
    def test_the_command_replaces_the_program(self):
        self.with_profile()
        before = sorted(os.listdir(self.folder)), self.store_text()
        script = (
            'echo "$$|$LLAMA_CLOUD_API_KEY|$LLAMA_CLOUD_BASE_URL|$LLAMA_AGENTS_PROJECT_ID|'
            '${LLAMA_CLOUD_USE_PROFILE-dropped}|$KEPT"; exit 7'
        )
        process = self.spawn(
            "auth",
            "exec",
            "--",
            "sh",
            "-c",
            script,
            env={"LLAMA_CLOUD_USE_PROFILE": "1", "KEPT": "kept"},
        )
        out, err = process.communicate()
        self.assertEqual(self.note(process.returncode, out, err, sings=True).code, 7)
        self.assertEqual(
            out.decode(),
            "|".join([str(process.pid), KEY, self.url, "proj-alpha", "dropped", "kept"])
            + "\n",
        )
        self.assertEqual((sorted(os.listdir(self.folder)), self.store_text()), before)
        self.assertEqual(os.listdir(self.home), ["conf"])

    def test_the_command_dies_of_a_closed_pipe_again(self):
        self.with_profile()
        result = self.process(
            "auth", "exec", "--", "sh", "-c", "kill -PIPE $$; echo survived"
        )
        self.assertEqual((result.code, result.out), (-signal.SIGPIPE, ""))

    def test_a_key_from_a_file_stands_in_for_a_profile(self):
        """A mounted secret; what the command line says wins, or fails."""
        self.with_profile()
        path = os.path.join(self.home, "key.txt")
        with open(path, "w") as file:
            file.write(OTHER_KEY + "\n")
        self.cloud.add_key(OTHER_KEY)
        env = {"LLAMA_CLOUD_BASE_URL": self.url}
        secret = ["auth", "exec", "--api-key-file", path]
        shell = ["--", "sh", "-c", 'echo "$LLAMA_CLOUD_API_KEY $LLAMA_AGENTS_PROJECT_ID"']
        for project in ("Beta", "proj-beta"):
            argv = secret + ["--project", project] + shell
            shown = self.process(*argv, env=env, sings=True)
            self.assertEqual(shown, (0, OTHER_KEY + " proj-beta\n", ""))
        self.failures(
            (
                (" ".join(secret + ["--", "env"]), 2, "no project", None),
                (" ".join(secret + ["main", "--", "env"]), 2, "exclude each other", None),
                (
                    "auth exec --api-key-file /nowhere --project p -- env",
                    1,
                    "/nowhere",
                    None,
                ),
            )
        )

    def test_its_own_options_end_at_the_dashes(self):
        self.with_profile()
        self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-beta", "--name", "b"
        )
        with unittest.mock.patch.object(
            os, "execvpe", side_effect=FileNotFoundError
        ) as execute:
            with unittest.mock.patch.object(signal, "signal"):
                for argv, project in (
                    (["--", "env", "--help", "-o", "--"], "proj-beta"),
                    (["main", "--", "env"], "proj-alpha"),
                    (["--profile", "main", "--quiet", "--", "env"], "proj-alpha"),
                    (["main", "--project", "beta", "--", "env"], "proj-beta"),
                ):
                    with self.subTest(argv=argv):
                        self.assertEqual(self.call("auth", "exec", *argv).code, 127)
                        program, command, variables = execute.call_args[0]
                        self.assertEqual(["--"] + command, argv[argv.index("--") :])
                        self.assertEqual(variables["LLAMA_AGENTS_PROJECT_ID"], project)

    def test_failures(self):
        self.with_profile()
        plain = os.path.join(self.home, "plain")
        open(plain, "w").close()
        with unittest.mock.patch.object(signal, "signal"):
            self.failures(
                (
                    ("auth exec", 2, "command", None),
                    ("auth exec --", 2, "command", None),
                    ("auth exec main nope", 2, "argument", None),
                    ("auth exec -- /nowhere/at/all", 127, "/nowhere/at/all", None),
                    ("auth exec -- no-such-command-anywhere", 127, "not found", None),
                    ("auth exec -- " + plain, 126, "plain", None),
                    ("auth exec nope -- env", 1, "nope", None),
                )
            )
            with open(os.path.join(self.home, "script"), "w") as file:
                file.write("echo no interpreter is named\n")
            os.chmod(file.name, 0o755)
            self.failures(
                (
                    ("auth exec -- plain", 126, "plain: ", None),
                    ("auth exec -- script", 126, "script: ", None),
                    ("auth exec -- " + file.name, 126, "script: ", None),
                ),
                env={"PATH": self.home},
            )
            self.write_store({})
            self.failures((("auth exec -- env", 4, "not logged in", "auth login"),))


class Environments(CommandCase):
    def test_get(self):
        self.assertEqual(
            [list(row.items()) for row in self.rows("environments", "get")],
            [
                [("api_url", OFFICIAL_URL), ("requires_auth", True), ("active", False)],
                [("api_url", self.url), ("requires_auth", True), ("active", True)],
            ],
        )
        self.assertEqual(self.rows("environments", "get", self.url + "/")["active"], True)
        self.assertEqual(
            self.table("environments", "get")[0], ["API_URL", "REQUIRES_AUTH", "ACTIVE"]
        )
        shutil.rmtree(self.folder)
        self.assertEqual(
            [list(row.values()) for row in self.rows("environments", "get")],
            [[OFFICIAL_URL, True, True]],
        )

    def test_add_probes_stores_and_makes_current(self):
        shutil.rmtree(self.folder)
        self.cloud.requires_auth = False
        self.expect(
            self.call("environments", "add", self.url.upper() + "/"), 0, "", self.url
        )
        self.assertEqual(self.requests(), [("GET", VERSION_ENDPOINT)])
        self.assertEqual(
            list(self.rows("environments", "get", self.url).values()),
            [self.url, False, True],
        )

    def test_add_of_what_does_not_answer_changes_nothing(self):
        self.expect_failure(self.call("environments", "add", NOWHERE), 5, "refused")
        self.cloud.fault(VERSION_ENDPOINT, "html")
        self.expect_failure(self.call("environments", "add", self.url + "/x"), 1, "404")
        self.expect_failure(self.call("environments", "add", self.url), 5, "web page")
        self.assertEqual(list(self.stored()), [self.url])

    def test_addresses(self):
        for given, stored in (
            ("HTTP://LocalHost:80/", "http://localhost"),
            ("https://Llama.Example:443", "https://llama.example"),
            ("https://llama.example:8443/Path/", "https://llama.example:8443/Path"),
            ("http://[::1]:8000", "http://[::1]:8000"),
            ("https://10.0.0.1/", "https://10.0.0.1"),
        ):
            with self.subTest(given=given):
                self.expect(
                    self.call("environments", "add", given, "--no-verify"),
                    0,
                    "",
                    re.escape(stored),
                )
                self.assertEqual(self.rows("config")["environment"], stored)
        before = self.store_text()
        self.expect_failure(self.call("environments", "add", ""), 2, "url is empty")
        for bad in (
            "llama.example",
            "ftp://llama.example",
            "file:///etc/passwd",
            "https://",
            "https://u:p-CANARY@llama.example",
            "https://llama.example?x=1",
            "https://llama.example/#a",
            "https://llama.example:99999",
            "https://a b",
            "https://llama.example:x",
            "javascript:alert(1)",
            "https://llama.example/?",
            "https://a\nb.example",
            "https://llama.example/$(id)",
            "https://llama.example/a;b",
        ):
            for verb in ("get", "add", "use", "delete"):
                with self.subTest(bad=bad, verb=verb):
                    self.expect_failure(self.call("environments", verb, bad), 2, "http")
        self.assertEqual((self.store_text(), self.requests()), (before, []))

    def test_warnings_of_an_environment(self):
        for url, plain in (
            ("http://llama.example", True),
            ("http://127.0.0.2", False),
            ("http://localhost:9", False),
            ("http://[::1]", False),
            ("http://localhost.llama.example", True),
            ("https://a.example", False),
        ):
            with self.subTest(url=url):
                result = self.done("environments", "add", url, "--no-verify", "--quiet")
                self.assertEqual("warning: " in result.err, plain)

    def test_use(self):
        self.done("environments", "use", OFFICIAL_URL)
        self.assertEqual(self.rows("config")["environment"], OFFICIAL_URL)
        self.done("environments", "use", self.url + "/")
        self.assertEqual(
            (self.rows("config")["environment"], self.requests()), (self.url, [])
        )
        self.failures(
            (
                ("environments use", 2, "URL.*%s.*%s" % (OFFICIAL_URL, self.url), None),
                (
                    "environments use https://nope.example",
                    1,
                    "https://nope.example",
                    "environments add https://nope.example",
                ),
                ("environments get https://nope.example", 1, "https://nope.example", None),
                ("environments add", 2, "no URL", "environments add URL"),
            )
        )

    def test_delete_takes_the_profiles_along(self):
        self.with_profile()
        self.login("--project", "proj-alpha")
        made = self.profiles()["dev@example.com"]["api_key"]
        self.done("environments", "delete", self.url)
        left = self.rows("environments", "get")
        self.assertEqual([row["api_url"] for row in left], [OFFICIAL_URL])
        self.assertEqual(self.rows("config")["environment"], OFFICIAL_URL)
        self.assertNotIn(made, self.cloud.keys_alive())
        self.assertNotIn(CANARY, self.store_text())
        self.failures(
            (
                ("environments delete", 2, "URL.*" + OFFICIAL_URL, None),
                ("environments delete " + self.url, 1, self.url, None),
            )
        )
        self.done("environments", "delete", OFFICIAL_URL)
        self.assertEqual(
            [row["active"] for row in self.rows("environments", "get")], [True]
        )


class Projects(CommandCase):
    def test_get(self):
        self.with_profile()
        found = self.rows("projects", "get")
        self.assertEqual(
            fields(found),
            ["project_id", "project_name", "deployment_count", "active", "org_id"],
        )
        self.assertEqual(
            [list(row.values()) for row in found],
            [
                ["proj-alpha", "Alpha", 2, True, "org-one"],
                ["proj-beta", "Beta", 0, False, "org-two"],
            ],
        )
        self.assertEqual(self.rows("projects", "get", "proj-beta"), dict(found[1]))
        self.assertEqual(self.rows("projects", "get", "--org", "org-two"), [dict(found[1])])
        self.assertEqual(
            self.table("projects", "get"),
            [
                ["NAME", "PROJECT_ID", "DEPLOYMENTS", "ACTIVE", "ORG_ID"],
                ["Alpha", "proj-alpha", "2", "yes", "org-one"],
                ["Beta", "proj-beta", "0", "no", "org-two"],
            ],
        )

    def test_missing_members_have_defaults(self):
        self.with_profile()
        self.cloud.projects = [{"project_id": "bare", "project_name": None, "more": [1]}]
        self.assertEqual(
            list(self.rows("projects", "get", "bare").values()),
            ["bare", "bare", 0, False, "default"],
        )

    def test_empty_and_missing(self):
        self.with_profile()
        self.failures((("projects get nope", 1, "nope", None),))
        self.cloud.projects = []
        self.assertEqual(self.done("projects", "get", "-o", "json").out, "[]\n")
        self.assertEqual(self.rows("projects", "get"), [])

    def test_one_request_with_the_profile_s_key(self):
        self.with_profile()
        self.done("projects", "get")
        self.assertEqual(self.requests(), [("GET", LIST_PROJECTS)])
        self.assertEqual(bearers(self.cloud.requests), {KEY})
        self.with_profile(key="llx-CANARY-rejected-key")
        self.failures((("projects get", 4, "401.*req-", "auth token --name main"),))

    def test_use(self):
        self.with_profile()
        self.expect(self.call("projects", "use", "proj-beta"), 0, "", "Beta")
        self.assertEqual(
            list(self.rows("config").values()), [self.url, "main", "proj-beta", "Beta"]
        )
        self.failures(
            (
                ("projects use nope", 1, "nope.*proj-alpha.*proj-beta", None),
                ("projects use", 2, "with ID: proj-alpha.*proj-beta", None),
                ("projects use proj-alpha --profile nope", 1, "nope", None),
                ("projects use proj-alpha --org org-two", 1, "proj-alpha.*proj-beta", None),
            )
        )
        self.assertEqual(self.profiles()["main"]["project_id"], "proj-beta")
        asked = self.done("projects", "use", "--quiet", stdin=b"\n", terminal=True).err
        self.assertEqual(
            asked,
            "    1  Alpha (proj-alpha)\n*   2  Beta (proj-beta)\n"
            "Project, by number or name [Beta]: ",
        )
        self.assertEqual(self.profiles()["main"]["project_id"], "proj-beta")
        self.done(
            "auth", "token", "--api-key", KEY, "--project", "proj-alpha", "--name", "b"
        )
        self.done("projects", "use", "proj-alpha", "--profile", "main")
        self.assertEqual(self.profiles()["main"]["project_id"], "proj-alpha")
        self.assertEqual(self.rows("config")["profile"], "b")

    def test_nothing_to_use_it_for(self):
        self.failures(
            (
                ("projects use proj-alpha", 4, "not logged in", "auth login"),
                ("projects get", 4, "not logged in", "auth login"),
            )
        )
        self.cloud.requires_auth = False
        self.write_store({}, requires_auth=False)
        self.assertEqual(len(self.rows("projects", "get")), 2)


class Organizations(CommandCase):
    def test_get(self):
        self.with_profile()
        found = self.rows("organizations", "get")
        self.assertEqual(fields(found), ["org_id", "org_name", "is_default", "active"])
        self.assertEqual(
            [list(row.values()) for row in found],
            [["org-one", "Org One", True, True], ["org-two", "Org Two", False, False]],
        )
        self.assertEqual(
            self.table("organizations", "get"),
            [
                ["NAME", "ORG_ID", "DEFAULT", "ACTIVE"],
                ["Org One", "org-one", "yes", "yes"],
                ["Org Two", "org-two", "no", "no"],
            ],
        )
        self.with_profile(org_id="org-two")
        self.assertEqual(
            [row["active"] for row in self.rows("organizations", "get")], [False, True]
        )

    def test_server_without_organizations_is_not_asked_for_them(self):
        self.with_profile()
        self.cloud.capabilities = ["code_push"]
        self.expect(self.call("organizations", "get", "-o", "json"), 0, "[]\n", "warning: ")
        self.assertEqual(self.requests(), [("GET", VERSION_ENDPOINT)])


class Config(CommandCase):
    def test_values(self):
        self.assertEqual(
            list(self.rows("config").items()),
            [
                ("environment", self.url),
                ("profile", None),
                ("project_id", None),
                ("project_name", None),
            ],
        )
        self.with_profile()
        self.assertEqual(
            list(self.rows("config").values()), [self.url, "main", "proj-alpha", "Alpha"]
        )
        self.assertEqual(
            self.table("config"),
            [
                ["ENVIRONMENT", "PROFILE", "PROJECT_ID", "PROJECT_NAME"],
                [self.url, "main", "proj-alpha", "Alpha"],
            ],
        )
        env = {"LLAMA_CLOUD_API_KEY": OTHER_KEY, "LLAMA_AGENTS_PROJECT_ID": "p"}
        self.assertEqual(
            list(self.rows("config", env=env).values()), [OFFICIAL_URL, None, "p", None]
        )
        self.assertEqual(
            self.rows("config", "--profile", "main", env=env)["project_id"], "proj-alpha"
        )
        self.failures((("config --profile nope", 1, "nope.*main", None),))
        self.assertEqual(self.requests(), [])


class Deployments(CommandCase):
    def setUp(self):
        super().setUp()
        self.with_profile()

    def test_values(self):
        invoices = {
            "name": "invoices",
            "generate_name": "Invoices",
            "spec": {
                "repo_url": "https://github.com/example/invoices",
                "deployment_file_path": "llama_deploy.yml",
                "git_ref": "main",
                "appserver_version": "0.4.2",
                "suspended": False,
                "secrets": {"OPENAI_API_KEY": "********", "DATABASE_URL": "********"},
                "personal_access_token": "********",
            },
            "status": {
                "phase": "Running",
                "git_sha": "0123456789abcdef0123456789abcdef01234567",
                "apiserver_url": "https://invoices.example.com/",
                "project_id": "proj-alpha",
                "warning": None,
            },
        }
        found = self.rows("deployments", "get", "invoices")
        self.assertEqual(found, invoices)
        self.assertEqual(fields(found), ["name", "generate_name", "spec", "status"])
        self.assertEqual(fields(found["spec"]), list(invoices["spec"]))
        self.assertEqual(fields(found["status"]), list(invoices["status"]))
        both = self.rows("deployments", "get")
        self.assertEqual([row["name"] for row in both], ["invoices", "chat-bot"])
        spec = dict(both[1]["spec"])
        self.assertFalse(spec.pop("secrets", None))
        self.assertEqual(
            spec, {"repo_url": "", "deployment_file_path": ".", "suspended": True}
        )
        self.assertEqual(both[1]["status"]["git_sha"], None)

    def test_text(self):
        self.assertEqual(
            self.table("deployments", "get")[:2],
            [
                ["NAME", "REPO", "GIT_REF", "PHASE"],
                ["invoices", "https://github.com/example/invoices", "main", "Running"],
            ],
        )
        for kind in ("wide", "WIDE"):
            wide = self.done("deployments", "get", "invoices", "-o", kind).out.splitlines()
            self.assertEqual(
                [re.split(" {2,}", line) for line in wide],
                [
                    [
                        "NAME",
                        "REPO",
                        "GIT_REF",
                        "PHASE",
                        "APPSERVER",
                        "GIT_SHA",
                        "APISERVER_URL",
                        "PROJECT",
                    ],
                    [
                        "invoices",
                        "https://github.com/example/invoices",
                        "main",
                        "Running",
                        "0.4.2",
                        "0123456789abcdef0123456789abcdef01234567",
                        "https://invoices.example.com/",
                        "proj-alpha",
                    ],
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
        found = self.rows("deployments", "get", "old")
        self.assertEqual(
            (
                found["generate_name"],
                found["spec"]["appserver_version"],
                found["status"]["phase"],
            ),
            ("Old", "0.3", "Levitating"),
        )

    def test_names_and_failures(self):
        self.failures(
            (
                ("deployments get nope", 1, "404: Deployment nope not found .*req-", None),
                (
                    "deployments get --project proj-zeta",
                    1,
                    "proj-zeta not found; available: proj-alpha",
                    None,
                ),
                ("deployments get ..", 1, "dots", None),
                ("deployments get -o wider", 2, "wide", None),
                ("auth get -o wide", 2, "json", None),
            )
        )
        self.call("deployments", "get", "a/b c?d#\u00e9")
        last = self.cloud.requests[-1]
        self.assertEqual(last.path, DEPLOYMENTS_PATH + "/a%2Fb%20c%3Fd%23%C3%A9")
        self.assertEqual(last.query, {"project_id": "proj-alpha"})
        empty = self.done("deployments", "get", "--project", "proj-beta", "-o", "json")
        self.assertEqual(empty.out, "[]\n")

    def test_no_password_of_an_address_is_shown(self):
        for address, shown in (
            ("https://user:CANARY@git.example/a", "https://********@git.example/a"),
            ("https://CANARY-token@git.example/a", "https://********@git.example/a"),
            ("https://u:CANARY@x@git.example/a", "https://********@git.example/a"),
            ("ssh://git:CANARY@git.example/a", "ssh://git:********@git.example/a"),
            ("ssh://git@git.example/a", "ssh://git@git.example/a"),
            ("git@git.example:a/b", "git@git.example:a/b"),
            ("https://git.example/@scope/a", "https://git.example/@scope/a"),
        ):
            self.cloud.deployments[0].update(repo_url=address, apiserver_url=address)
            for output in ("text", "wide", "json", "yaml"):
                with self.subTest(address=address, output=output):
                    self.assertIn(shown, self.done("deployments", "get", "-o", output).out)


# ========================================================================================
# commands: auth import
# ========================================================================================


OFFICIAL_TABLES = (
    "CREATE TABLE profiles (name TEXT, api_url TEXT, project_id TEXT, api_key TEXT,"
    " api_key_id TEXT, device_oidc TEXT, id TEXT, PRIMARY KEY (name, api_url))",
    "CREATE TABLE environments (api_url TEXT, requires_auth INTEGER, min_llamactl_version)",
    "CREATE TABLE settings (key, value)",
)
OLD_OFFICIAL_TABLES = (
    "CREATE TABLE profiles (name TEXT, api_url TEXT, project_id TEXT, api_key TEXT,"
    " PRIMARY KEY (name, api_url))",
) + OFFICIAL_TABLES[1:]


class ImportCase(DiskCase):
    URL = "https://llama.example.com"
    IMPORT = ("auth", "import", "--from-official")

    def setUp(self):
        DiskCase.setUp(self)
        self.url = self.URL
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(self.folder, "profiles.db")

    def may_hold_secrets(self, path):
        return "profiles.db" in path or DiskCase.may_hold_secrets(self, path)

    def assert_import_fails(self, names, code=1):
        before = tree(self.home)
        self.assert_one_error(self.call(*self.IMPORT), code, names)
        self.assertEqual(tree(self.home), before)


class ImportWithoutSqliteTest(ImportCase):
    def test_a_python_without_sqlite3_says_so(self):
        with open(self.path, "wb") as file:
            file.write(b"SQLite format 3\0")
        with unittest.mock.patch.dict(sys.modules, {"sqlite3": None}):
            self.assert_import_fails("sqlite3")

    def test_get_hints_at_it_where_there_is_nothing_of_ours(self):
        hint = "hint: llamactl auth import --from-official"
        self.assertNotIn(hint, self.call("auth", "get").err)
        with open(self.path, "wb") as file:
            file.write(b"anything")
        self.assertIn(hint, self.call("auth", "get").err)
        self.call(*self.ALWAYS_WRITERS[0])
        self.assertNotIn(hint, self.call("auth", "get").err)

    def test_import_must_say_where_from(self):
        before = tree(self.home)
        self.assert_one_error(self.call("auth", "import"), 2)
        self.assertEqual(tree(self.home), before)


class ImportTest(ImportCase):
    LOGIN = json.dumps(
        {
            "email": "dev@example.com",
            "user_id": "user-1",
            "device_name": "laptop",
            "device_access_token": "at-CANARY-official",
            "device_refresh_token": "rt-CANARY-official",
        }
    )
    ROWS = (
        ("work", "https://llama.example.com", "proj-alpha", KEY, None, None, "id-1"),
        (
            "dev@example.com",
            "https://llama.example.com",
            "proj-beta",
            OTHER_KEY,
            "key-7",
            LOGIN,
            "id-2",
        ),
        ("local", "http://localhost:8011", "proj-local", None, None, None, "id-3"),
    )
    ENVIRONMENTS = (
        ("https://llama.example.com", 1, "0.4.0"),
        ("http://localhost:8011", 0, None),
    )
    SETTINGS = (
        ("current_profile", "dev@example.com"),
        ("current_environment_api_url", "https://llama.example.com"),
    )

    def official(
        self,
        rows=ROWS,
        environments=ENVIRONMENTS,
        settings=SETTINGS,
        tables=OFFICIAL_TABLES,
        journal="delete",
    ):
        """The official client's database; returns the open connection."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        url = "file:" + urllib.parse.quote(os.fsencode(self.path))  # in any locale
        database = sqlite3.connect(url, uri=True)
        database.execute("PRAGMA synchronous = off")
        database.execute(
            "PRAGMA journal_mode = " + journal
        ).fetchall()  # PyPy waits for its end
        for statement in tables:
            database.execute(statement)
        for table, content in (
            ("profiles", rows),
            ("environments", environments),
            ("settings", settings),
        ):
            for row in content:
                marks = ", ".join("?" * len(row))
                database.execute("INSERT INTO %s VALUES (%s)" % (table, marks), row)
        database.commit()
        self.addCleanup(database.close)
        return database

    def closed(self, **options):
        self.official(**options).close()

    def official_files(self):
        """The official client's files; readers of a live log share its index, "-shm"."""
        return {
            path: None if path.endswith("-shm") else entry
            for path, entry in tree(self.home).items()
            if "profiles.db" in path
        }

    def take_over(self):
        before = self.official_files()
        result = self.call(*self.IMPORT)
        self.assertEqual(self.official_files(), before)
        return result

    def forget(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.store_path)

    def names(self, url=None):
        return sorted(self.stored().get(url or self.url, {"profiles": ()})["profiles"])

    def test_everything_is_taken_over_and_said(self):
        self.closed()
        result = self.take_over()
        self.assertEqual((result.code, result.out), (0, ""), result.err)
        for name, *_ in self.ROWS:
            self.assertIn(name, result.err)
        stored = self.stored()
        self.assertEqual(set(stored), {url for url, _, _ in self.ENVIRONMENTS})
        self.assertFalse(stored["http://localhost:8011"]["requires_auth"])
        expected = {
            ("work", "token", KEY, "proj-alpha"),
            ("dev@example.com", "token", OTHER_KEY, "proj-beta"),
            ("local", "none", None, "proj-local"),
        }
        self.assertEqual(
            expected,
            {
                (name, profile["auth_type"], profile.get("api_key"), profile["project_id"])
                for record in stored.values()
                for name, profile in record["profiles"].items()
            },
        )
        shown = load(self.call("config", "-o", "json").out)
        self.assertEqual(
            (shown["environment"], shown["profile"]), (self.url, "dev@example.com")
        )
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
            self.assertEqual(self.call("auth", "logout", "dev@example.com").code, 0)

    def test_twice_is_the_same_as_once(self):
        self.closed()
        self.take_over()
        once = file_bytes(self.store_path)
        result = self.take_over()
        self.assertEqual((result.code, file_bytes(self.store_path)), (0, once))

    def test_what_is_ours_already_stays(self):
        key = "llx-CANARY-quite-another-one"
        self.write_store(
            {
                "work": {"auth_type": "token", "api_key": key, "project_id": "p"},
                "mine": {
                    "auth_type": "token",
                    "api_key": OTHER_KEY,
                    "project_id": "proj-beta",
                },
            },
            "work",
        )
        self.closed()
        for _ in range(2):
            self.assertEqual(self.take_over().code, 0)
            profiles = self.profiles()
            self.assertEqual(sorted(profiles), ["mine", "work", "work-2"])
            self.assertEqual(
                [profiles[name]["api_key"] for name in ("work", "work-2")], [key, KEY]
            )
            self.assertEqual(self.stored()[self.url]["current_profile"], "work")

    def test_old_databases_have_fewer_columns(self):
        self.closed(rows=[row[:4] for row in self.ROWS], tables=OLD_OFFICIAL_TABLES)
        self.assertEqual(self.take_over().code, 0)
        self.assertEqual(self.names(), ["dev@example.com", "work"])

    def test_an_open_database_with_a_write_ahead_log(self):
        # the rows stand in the log alone while the official client has the file open
        database = self.official(journal="wal")
        self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
        self.assertEqual(self.take_over().code, 0)
        self.assertEqual(self.names(), ["dev@example.com", "work"])
        database.close()

    def test_a_closed_database_with_a_write_ahead_log(self):
        self.closed(journal="wal")
        self.assertEqual(sorted(os.listdir(self.folder)), ["profiles.db"])
        self.assertEqual(self.take_over().code, 0)
        self.assertEqual(self.names(), ["dev@example.com", "work"])

    def test_a_write_ahead_log_that_a_crash_left(self):
        self.official(journal="wal")
        kept = {suffix: file_bytes(self.path + suffix) for suffix in ("", "-wal")}
        shutil.rmtree(self.folder)
        os.mkdir(self.folder, 0o700)
        for suffix, content in kept.items():
            with open(self.path + suffix, "wb") as file:
                file.write(content)
        before = tree(self.home)
        result = self.call(*self.IMPORT)
        left = {path for path in tree(self.home) if "profiles.json" not in path}
        self.assertEqual(left, set(before))  # reading made no index beside it
        self.assertEqual(
            self.official_files(),
            {path: entry for path, entry in before.items() if path != self.folder},
        )
        if result.code:
            self.assert_one_error(result, 1, self.path)  # never an import of half the rows
        else:
            self.assertEqual(self.names(), ["dev@example.com", "work"])

    def test_a_journal_that_a_crash_left(self):
        self.closed()
        for content, code in ((b"not undone yet", 1), (b"", 0)):
            with open(self.path + "-journal", "wb") as file:
                file.write(content)
            result = self.take_over()
            self.assertEqual(
                (result.code, "left by a crash" in result.err), (code, code == 1)
            )

    def test_a_link_to_an_open_database_with_a_write_ahead_log(self):
        link, self.path = self.path, os.path.join(self.home, "real-profiles.db")
        os.symlink(self.path, link)
        database = self.official(journal="wal")
        self.assertEqual(self.take_over().code, 0)
        self.assertEqual(self.names(), ["dev@example.com", "work"])
        database.close()

    def test_a_folder_with_an_odd_name(self):
        odd = os.fsdecode("we?ird %20#f;older\u00e9".encode("utf-8"))  # in any locale
        self.folder = os.path.join(self.home, odd)
        self.env["LLAMACTL_CONFIG_DIR"] = self.folder
        os.mkdir(self.folder, 0o700)
        self.path = os.path.join(self.folder, "profiles.db")
        self.store_path = os.path.join(self.folder, "profiles.json")
        self.closed()
        self.assertEqual(self.take_over().code, 0)
        self.assertEqual(self.names(), ["dev@example.com", "work"])

    def assert_left_out(self, rows):
        """Each of ROWS, before a good one: it is warned about, and the good one arrives."""
        for row in rows:
            with self.subTest(row=row):
                self.closed(rows=(row + (None, None, None), self.ROWS[0]))
                self.forget()
                result = self.take_over()
                self.assertEqual(result.code, 0, result.err)
                self.assertEqual(self.names(), ["work"])
                self.assertEqual(len(self.warnings_of(result)), 1, result.err)

    def test_rows_without_a_usable_key_or_project_are_left_out(self):
        self.assert_left_out(
            (
                ("bad", self.URL, "p", None),
                ("bad", self.URL, "p", ""),
                ("bad", self.URL, "p", "two words"),
                ("bad", self.URL, "p", "llx-CANARY-line\nbreak"),
                ("bad", self.URL, "p", b"llx-CANARY-bytes"),
                ("bad", self.URL, None, OTHER_KEY),
                ("bad", self.URL, b"\xff", OTHER_KEY),
            )
        )

    def test_a_stored_environment_that_does_not_say_so_requires_auth(self):
        self.closed(
            rows=(("bad", self.URL, "p", None, None, None, None), self.ROWS[0]),
            environments=(),
        )
        self.url = self.URL
        self.write_store({})
        data = load(file_bytes(self.store_path).decode())
        del data["environments"][self.URL]["requires_auth"]
        with open(self.store_path, "w") as file:
            json.dump(data, file)
        result = self.take_over()
        self.assertEqual((result.code, self.names()), (0, ["work"]))
        self.assertEqual(len(self.warnings_of(result)), 1, result.err)

    def test_rows_without_a_usable_url_are_left_out(self):
        self.assert_left_out(
            ("bad", url, "p", OTHER_KEY)
            for url in (
                None,
                "",
                "not a URL",
                "ftp://example.com",
                b"https://llama.example.com",
            )
        )

    def test_names_and_logins_of_odd_types_do_no_harm(self):
        rows = (
            (None, self.URL, "p", OTHER_KEY, None, None, None),
            (b"\xff", self.URL, "p", OTHER_KEY, None, None, None),
            (7, self.URL, "p", 123456789012, None, None, None),
            ("", self.URL, "p", OTHER_KEY, None, None, None),
            ("\x1b[2Jevil\u202e\n", self.URL, "p", OTHER_KEY, None, None, None),
            ("--all", self.URL, "p", OTHER_KEY, None, None, None),
            ("odd", self.URL, "p q\n", OTHER_KEY, 7, "not JSON", b"\0"),
            ("odd", self.URL, "", OTHER_KEY, b"\xff", 9, None),
            ("odd", self.URL + "/", "p", OTHER_KEY, None, "[" * 5000, None),
        )
        for row in rows:
            with self.subTest(row=row[:4]):
                self.closed(rows=(row, self.ROWS[0]))
                self.forget()
                result = self.take_over()
                self.assertEqual(result.code, 0, result.err)
                self.assertIn("work", self.names())
                self.assertNotRegex(result.err, "[\x00-\x09\x0b-\x1f\u202e]")
                self.assertEqual(self.call("auth", "get").code, 0)

    def test_odd_settings_and_environments_do_no_harm(self):
        odd = (None, 7, 1.5, b"\xff", "", "not a URL", "file:///etc/passwd", "\x1b[2J")
        for value in odd:
            for kind in (
                "environment",
                "current environment",
                "current profile",
                "version",
            ):
                with self.subTest(kind=kind, value=value):
                    environments, settings = self.ENVIRONMENTS, self.SETTINGS
                    if kind == "environment":
                        environments += ((value, value, None),)
                    elif kind == "version":
                        environments = ((self.URL, value, value),)
                    else:
                        changed = {
                            "current environment": "current_environment_api_url",
                            "current profile": "current_profile",
                        }[kind]
                        settings = tuple(
                            (key, value if key == changed else other)
                            for key, other in settings
                        )
                    self.closed(environments=environments, settings=settings)
                    self.forget()
                    result = self.take_over()
                    self.assertEqual(result.code, 0, result.err)
                    self.assertEqual(self.names(), ["dev@example.com", "work"])
                    for command in (("environments", "get"), ("config",), ("auth", "get")):
                        self.assertEqual(self.call(*command).code, 0)

    def test_text_that_is_not_utf_8(self):
        self.closed(rows=(self.ROWS[0],))
        url = "file:" + urllib.parse.quote(os.fsencode(self.path))  # in any locale
        database = sqlite3.connect(url, uri=True)
        database.execute(
            "INSERT INTO profiles SELECT CAST(X'ff41' AS TEXT), api_url, 'q',"
            " CAST(X'ff42' AS TEXT), null, null, null FROM profiles"
        )
        database.commit()
        database.close()
        result = self.take_over()
        self.assertIn(result.code, (0, 1))
        if result.code:
            self.assert_one_error(result, 1, self.path)
        else:
            self.assertEqual(self.names(), ["work"])

    def test_what_is_no_database_of_the_official_client(self):
        self.closed()
        whole = file_bytes(self.path)
        damaged = (
            b"",
            b"not a database",
            b"SQLite format 3\0",
            b"\0" * 4096,
            whole[:100],
            whole[:4096],
            whole[:100] + b"\xff" * 8000,
        )
        for content in damaged:
            with self.subTest(content[:20]):
                with open(self.path, "wb") as file:
                    file.write(content)
                self.assert_import_fails(self.path)
        for missing in range(3):
            with self.subTest(missing=missing):
                tables = OFFICIAL_TABLES[:missing] + OFFICIAL_TABLES[missing + 1 :]
                kept = [
                    content if number != missing else ()
                    for number, content in enumerate(
                        (self.ROWS, self.ENVIRONMENTS, self.SETTINGS)
                    )
                ]
                self.closed(
                    tables=tables, rows=kept[0], environments=kept[1], settings=kept[2]
                )
                self.assert_import_fails(self.path)

    def test_nothing_there(self):
        self.assert_import_fails(self.path)
        os.mkdir(self.path)
        self.assert_import_fails(self.path)
        os.rmdir(self.path)
        os.mkfifo(self.path)
        self.assert_one_error(self.process(*self.IMPORT, timeout=20), 1, self.path)
        os.unlink(self.path)
        shutil.rmtree(self.folder)
        self.assert_import_fails(self.path)


if sqlite3 is None:
    del ImportTest


# ========================================================================================
# parser: what all commands share: words, help, keys, names, hostile texts, doing it twice
# ========================================================================================


class Words(CommandCase):
    EVERY = (
        "auth token",
        "auth login",
        "auth get",
        "auth use",
        "auth logout",
        "auth inject",
        "auth status",
        "auth exec",
        "auth import",
        "environments get",
        "environments add",
        "environments use",
        "environments delete",
        "projects get",
        "projects use",
        "organizations get",
        "config",
        "deployments get",
    )
    GROUPS = ("auth", "environments", "projects", "organizations", "deployments")

    def test_help_at_each_level(self):
        for argv in ("", "-h", "--help"):
            result = self.done(*argv.split())
            self.assertEqual(result.err, "")
            for command in self.EVERY:
                self.assertIn(command + " ", result.out)
            for code in ("0 ", "1 ", "2 ", "4 ", "5 ", "130 "):
                self.assertIn(code, result.out)
        for group in self.GROUPS:
            for flag in ("-h", "--help"):
                shown = self.done(group, flag)
                self.assertEqual(shown.err, "")
                self.assertIn("llamactl %s" % group, shown.out)
            self.expect(self.call(group), 2, "", "^error: `%s` needs a command\n" % group)
        for command in self.EVERY:
            with self.subTest(command=command):
                shown = self.done(*command.split() + ["-h"])
                self.assertEqual(shown.err, "")
                self.assertIn("llamactl " + command, shown.out)
                self.assertEqual(self.done("--help", *command.split()).out, shown.out)
                self.assertRegex(
                    shown.out,
                    r"(?s)\neverywhere:\n  -h, .*\n\nexample:\n"
                    r"  llamactl %s.*\n\nvariables.*:\n  LLAMA" % command,
                )
        self.assertEqual(self.done("--version", "--help").out, self.done().out)

    def test_a_format_is_taken_in_any_letter_case(self):
        for word in ("-o JSON", "-o Json", "-o YAML", "--output=Yaml", "-o TEXT"):
            with self.subTest(word):
                self.with_profile()
                shown = self.done(f"projects get {word}").out
                self.assertEqual(shown, self.done(f"projects get {word.lower()}").out)

    def test_help_groups_the_options_and_tells_of_variables_that_count(self):
        shown = self.done("auth", "token", "-h").out
        self.assertEqual(
            re.findall(r"(?m)^([a-z]+).*:$", shown),
            ["credential", "choice", "how", "everywhere", "example", "variables"],
        )
        self.assertRegex(
            shown, r"(?s)credential:\n  --api-key-file .*\n\nchoice:\n  --project[ ,]"
        )
        self.assertIn(
            "\n  llamactl auth token --api-key-file /run/secrets/llama --project ID\n",
            shown,
        )
        self.assertIn(
            "\nvariables (none of them supplies a credential):\n  LLAMACTL_CONFIG_DIR",
            shown,
        )
        self.assertNotIn("LLAMA_CLOUD", shown)
        self.assertIn("LLAMA_CLOUD_API_KEY ", self.done("deployments", "get", "-h").out)

    def test_help_says_why_a_key_on_the_command_line_is_the_worse_way(self):
        text = " ".join(self.done("auth", "token", "-h").out.split())
        self.assertRegex(text, "(?i)--api-key KEY.*(processes|history)")
        for name in (
            "LLAMA_CLOUD_API_KEY",
            "LLAMA_AGENTS_PROJECT_ID",
            "LLAMA_CLOUD_BASE_URL",
            "LLAMA_CLOUD_USE_PROFILE",
        ):
            self.assertIn(name, self.done("-h").out)

    def test_version(self):
        for argv in (["--version"], ["--quiet", "--version"]):
            shown = self.done(*argv)
            self.assertRegex(shown.out, r"^\S+ %s\n$" % re.escape(llamactl.__version__))
            self.assertEqual(shown.err, "")

    def test_words_of_older_releases(self):
        self.failures(
            (
                ("auth list", 2, "auth list", "llamactl auth get"),
                ("auth switch", 2, "auth switch", "llamactl auth use"),
                ("auth switch main", 2, "auth switch", "llamactl auth use"),
                ("auth env", 2, "auth env", "llamactl environments"),
                ("auth env add https://a.example", 2, "auth env", "llamactl environments"),
                ("auth project", 2, "auth project", "llamactl projects use"),
                (
                    "auth organizations",
                    2,
                    "auth organizations",
                    "llamactl organizations get",
                ),
                ("auth destroy", 2, "auth destroy", "llamactl auth logout --all"),
                ("destroy", 2, "destroy", "llamactl auth logout --all"),
                ("list", 2, "list", "llamactl auth get"),
                ("switch main", 2, "switch", "llamactl auth use"),
                ("env", 2, "env", "llamactl environments get"),
                ("env list", 2, "env list", "llamactl environments get"),
                ("project", 2, "project", "llamactl projects use"),
                ("environments list", 2, "environments list", "llamactl environments get"),
                ("deployments list", 2, "deployments list", "llamactl deployments get"),
            )
        )

    def test_commands_of_the_official_client_that_are_not_offered(self):
        for words in (
            "serve",
            "init",
            "init --template x",
            "deployments apply",
            "deployments create",
            "deployments apply -f x.yml",
            "deployments delete x",
            "deployments edit x",
            "deployments logs x",
            "deployments history",
            "deployments update x",
            "pkg container",
            "dev validate",
            "config destroy",
            "config show-db",
        ):
            with self.subTest(words=words):
                self.expect_failure(self.call(*words.split()), 2, "not offered")

    def test_mistyped(self):
        self.failures(
            (
                ("auth tokn", 2, "auth tokn", "llamactl auth token"),
                ("auht login", 2, "auht", "llamactl auth login"),
                ("auth get-all", 2, "auth get-all", "llamactl"),
                ("project use", 2, "project use", "llamactl projects use"),
                ("deployment get", 2, "deployment get", "llamactl deployments get"),
                ("confg", 2, "confg", "llamactl config"),
                ("xyzzy", 2, "xyzzy", "llamactl --help"),
                ("auth get -o xml", 2, "text.*json.*yaml", "auth get --help"),
                ("auth get -o", 2, "-o", "auth get --help"),
                ("auth get --nmae x", 2, "--nmae", "auth get --help"),
                ("auth get a b", 2, "argument", "auth get --help"),
                ("auth token --proj x", 2, "--proj", "auth token --help"),
                ("auth inject --env x", 2, "--env", "auth inject --help"),
                ("auth get --out json", 2, "--out", "auth get --help"),
                ("--bogus", 2, "--bogus", "llamactl --help"),
            )
        )

    def test_an_empty_value_is_none(self):
        self.with_profile()
        before = self.store_text()
        for words, flags in (
            ("auth get", [""]),
            ("auth use", [""]),
            ("auth logout", [""]),
            ("auth status", [""]),
            ("auth status", ["--profile", ""]),
            ("auth exec", ["", "--", "/nowhere"]),
            ("auth token", ["--api-key", ""]),
            ("auth token", ["--api-key-file", ""]),
            ("auth token", ["--project", ""]),
            ("auth login", ["--name", ""]),
            ("auth login", ["--org="]),
            ("auth inject", ["--env-file", ""]),
            ("environments use", [""]),
            ("environments add", [""]),
            ("projects use", [""]),
            ("projects get", ["--org", ""]),
            ("config", ["--profile="]),
            ("deployments get", ["--project", ""]),
        ):
            with self.subTest(words=words, flags=flags):
                self.expect_failure(
                    self.call(*words.split() + flags),
                    2,
                    "is empty",
                    "llamactl %s --help" % words,
                )
        self.assertEqual(self.store_text(), before)

    def test_two_profiles_are_not_named_at_once(self):
        self.with_profile()
        self.done("auth", "status", "main", "--profile", "main")
        self.failures(
            (
                ("auth status main --profile b", 2, "NAME and --profile", None),
                ("auth exec main --profile b -- /nowhere", 2, "NAME and --profile", None),
            )
        )

    def test_options_may_stand_before_the_words(self):
        for words, (_, options, _) in llamactl.read_commands().items():
            for _, flags, settings in llamactl.read_options(options.split()):
                for flag in flags if flags[0].startswith("-") else ():
                    given = [flag, "config"] if "metavar" in settings else [flag]
                    with self.subTest(words=words, flag=flag):
                        self.assertEqual(
                            llamactl.split_command(given + words.split()), (words, given)
                        )

    def test_options_that_are_accepted_everywhere(self):
        self.with_profile()
        lines = (
            "auth get",
            "auth use main",
            "auth inject --env-file %s/.env" % self.home,
            "auth status",
            "environments get",
            "environments add " + self.url,
            "environments use " + self.url,
            "projects get",
            "projects use proj-alpha",
            "organizations get",
            "config",
            "deployments get invoices",
            "auth token --api-key %s --project proj-alpha" % KEY,
            "auth login --start -o json",
            "auth logout main",
            "--version",
            "",
        )
        for line in lines:
            with self.subTest(line=line):
                store = self.store_text()
                plain = self.done(*line.split())
                for argv in (
                    ["--native-tls"] + line.split(),
                    line.split() + ["--native-tls"],
                    ["--quiet"] + line.split(),
                    line.split() + ["--quiet"],
                ):
                    with open(self.store_path, "w") as file:
                        file.write(store)
                    result = self.done(*argv)
                    if "--start" not in line:
                        self.assertEqual(result.out, plain.out)
                    if "--quiet" in argv:
                        self.assertEqual(result.err, "")

    def test_profile_is_accepted_wherever_a_credential_is_used(self):
        self.with_profile()
        for line in (
            "auth inject",
            "auth status",
            "auth exec -- env",
            "projects get",
            "projects use proj-alpha",
            "organizations get",
            "config",
            "deployments get",
        ):
            with self.subTest(line=line):
                words = line.split()
                for argv in (
                    words[:1] + ["--profile", "nope"] + words[1:],
                    ["--profile=nope"] + words,
                ):
                    self.expect_failure(self.call(*argv), 1, "nope.*main")


class Completion(CommandCase):
    """The scripts, in the shells themselves."""

    # each prints what the shell offers behind the words of its arguments, or of $LINE
    ASK = {
        "bash": """eval "$(llamactl completion bash)"
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=999
            _llamactl
            printf '%s\\n' "${COMPREPLY[@]}" """,
        "zsh": """compdef() { :; }; compadd() { shift; print -rl -- "$@"; }
            eval "$(llamactl completion zsh)"; words=("$@"); CURRENT=$#; _llamactl""",
        "fish": 'llamactl completion fish | source; complete -C "$LINE"',
    }
    TABLE = (
        (["auth", "log"], ["login", "logout"]),
        (["conf"], ["config"]),
        (["projects", ""], ["get", "use"]),
        (["auth", "logout", "--"], ["--all", "--help", "--quiet", "--yes"]),
        (["auth", "use", ""], ["--help", "--quiet", "dev@example.com", "main"]),
        (["auth", "inject", "--profile", ""], ["dev@example.com", "main"]),
        (["auth", "use", "dev@"], ["dev@example.com"]),
        (["nonsense", ""], []),
    )

    def setUp(self):
        super().setUp()
        names = [
            "main",
            "dev@example.com",
            "$(touch owned)",
            "a b",
            "`touch owned`",
            "-x",
            "\u00e9",
        ]
        profile = {"auth_type": "token", "api_key": KEY, "project_id": "p"}
        self.write_store(dict.fromkeys(names, profile), "main")
        tools = os.path.join(self.home, "bin")
        os.mkdir(tools)
        command = os.path.join(tools, "llamactl")
        with open(command, "w") as file:
            file.write(
                '#!/bin/sh\nexec %s "$@"\n' % " ".join(map(shlex.quote, PYTHON + [PROGRAM]))
            )
        os.chmod(command, 0o755)
        self.env["PATH"] = tools + os.pathsep + os.environ["PATH"]

    def offered(self, shell, words):
        options = ["-f", "-c"] if shell == "zsh" else ["-c"]  # without anybody's settings
        process = subprocess.Popen(
            [shell] + options + [self.ASK[shell], shell, "llamactl"] + words,
            env=dict(self.env, LINE=" ".join(["llamactl"] + words)),
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = process.communicate(timeout=30)
        self.assertEqual((process.returncode, err), (0, b""))
        return sorted(line for line in out.decode("utf-8").splitlines() if line)

    def check(self, shell):
        if not shutil.which(shell):
            self.skipTest("there is no %s here" % shell)
        for words, expected in self.TABLE:
            with self.subTest(words=words):
                self.assertEqual(self.offered(shell, words), expected)
        self.assertFalse(os.path.exists(os.path.join(self.home, "owned")))

    def test_in_bash(self):
        self.check("bash")

    def test_in_zsh(self):
        self.check("zsh")

    def test_in_fish(self):
        self.check("fish")

    def test_without_a_shell(self):
        for argv in ("completion", "completion tcsh"):
            self.expect_failure(self.call(*argv.split()), 2, "bash, zsh or fish")


class Advice(CommandCase):
    """What comes next, said where it helps."""

    def test_the_next_command(self):
        use = ["environments", "use", self.url]
        for current, profiles, words in (
            (None, {}, "next: llamactl auth login, or llamactl auth token\n"),
            (None, {"a": {"auth_type": "token"}}, "next: llamactl auth use NAME\n"),
            ("a", {"a": {"auth_type": "token"}}, "profile a\n"),
        ):
            with self.subTest(current=current, profiles=list(profiles)):
                self.write_store(profiles, current)
                told = self.done(*use).err
                self.assertEqual(told, "environment %s is current; %s" % (self.url, words))
        token = ["auth", "token", "--api-key", KEY, "--project", "Alpha"]
        for argv in (token, ["auth", "login", "--project", "Alpha"]):
            self.assertRegex(self.done(*argv).err, "\nnext: llamactl auth inject, or .*\n$")

    def test_how_many_profiles_are_to_be_deleted(self):
        for count, words in ((1, "Delete 1 profile and"), (3, "Delete 3 profiles and")):
            profile = {"auth_type": "token", "api_key": KEY, "project_id": "p"}
            self.write_store(dict.fromkeys("abc"[:count], profile))
            for answer, left in ((b"n\n", count), (b"y\n", 0)):
                result = self.call("auth", "logout", "--all", stdin=answer, terminal=True)
                self.assertIn(words, result.err)
                self.assertEqual((result.code, len(self.profiles())), (left > 0, left))

    def test_a_key_for_the_dash_is_typed_at_a_terminal_and_read_elsewhere(self):
        for argv in (
            ["auth", "token", "--api-key", "-", "--project", "proj-beta"],
            ["auth", "token", "--api-key-file", "-", "--project", "beta"],
            ["auth", "token", "--no-verify", "--api-key", "-", "--project", "proj-beta"],
        ):
            with self.subTest(argv=argv):
                self.write_store({})
                self.done(*argv, stdin=KEY.encode("ascii"))
                self.assertEqual(self.profiles()["llx-wxyz"]["project_id"], "proj-beta")
                self.write_store({})
                shown = self.pty(argv, [("API key: ", KEY.encode("ascii") + b"\n")])
                self.assertEqual((shown.code, len(self.profiles())), (0, 1), shown.out)
        argv = ["auth", "exec", "--api-key-file", "-", "--project", UNSEEN, "--", "env"]
        env = {"LLAMA_CLOUD_BASE_URL": NOWHERE}
        shown = self.process(*argv, stdin=KEY.encode("ascii"), env=env, sings=True)
        self.assertEqual(shown.code, 0, shown.err)
        self.assertIn("LLAMA_CLOUD_API_KEY=" + KEY, shown.out)

    def test_a_complaint_about_an_answer_stands_above_the_question(self):
        self.cloud.projects = [
            {"project_id": "p-%d" % n, "project_name": "Project %d" % n} for n in range(40)
        ]
        argv = ["auth", "token", "--api-key", KEY]
        shown = self.pty(argv, [("name: ", b"zzz\n"), ("name: ", b"p-7\n")])
        self.assertIn("zzz is not on the list (1 to 20)\nProject, by number", shown.out)
        self.assertEqual(shown.code, 0, shown.out)


class StraySecrets(CommandCase):
    def test_a_secret_in_the_wrong_place_is_not_echoed(self):
        secret, plain = OTHER_KEY, "CANARY-with-no-prefix"
        table = (
            ["auth", "token", plain],
            ["auth", "token", "--api-kye=" + plain],
            ["auth", "token", "--api-kye", plain],
            ["auth", "token", "--no-verify=" + plain],
            ["auth", "token", secret],
            ["auth", "token", "--", secret],
            ["auth", "token", "--api-kye=" + secret],
            ["auth", "token", "--api-kye", secret],
            ["auth", "token", "--api-key" + secret],
            ["auth", "token", "--apikey:" + secret],
            ["auth", "token", "-k" + secret],
            ["auth", "token", "-k", secret],
            ["auth", "token", "--no-verify=" + secret],
            ["auth", "token", "--quiet=" + secret],
            ["auth", "get", "-o", secret],
            ["auth", "get", "--output=" + secret],
            ["auth", "login", secret],
            ["auth", "inject", secret],
            ["--api-key=" + secret],
            ["auth", secret],
            ["auth", "tokn", secret],
            ["auth", "tokn", "--api-key", secret],
            [secret],
            ["token", secret],
            ["auth", "use", secret],
            ["auth", "get", secret],
            ["--profile", secret, "projects", "get"],
            ["projects", "get", secret],
            ["environments", "add", secret],
            ["environments", "use", "https://" + secret + "@llama.example"],
        )
        self.with_profile()
        for argv in table:
            with self.subTest(argv=argv):
                result = self.call(*argv)
                self.assertNotIn("canary", (result.out + result.err).lower())
                self.assertIn(result.code, (1, 2))
                self.assertRegex(result.err, "error: ")
        self.assertEqual(list(self.profiles()), ["main"])

    def test_a_long_word_is_not_quoted(self):
        """It may be a secret of any kind; what is short, or a UUID, is a slip."""
        self.with_profile()
        uuid = "0d5a1e2c-1111-4222-8333-444455556666"
        for word, quoted in (
            ("s3cr3t-of-20-letters", False),
            ("s3cr3t-of-19-letter", True),
            ("x" * 500, False),
        ):
            for argv in (
                ["auth", word],
                [word],
                ["auth", "get", word],
                ["auth", "use", word],
                ["auth", "logout", word],
                ["projects", "get", word],
                ["projects", "use", word],
                ["auth", "status", word],
                ["environments", "add", word],
                ["environments", "use", word],
                ["deployments", "get", word],
                ["auth", "--" + word],
            ):
                with self.subTest(argv=argv):
                    result = self.call(*argv)
                    self.assertIn(result.code, (1, 2))
                    never = argv[0] == "environments" or argv[-1].startswith("--")
                    self.assertEqual(word in result.err, quoted and not never, result.err)
        self.assertIn(uuid, self.call("projects", "use", uuid).err)


class MalformedKeys(CommandCase):
    BAD = (
        "llx-CANARY\nX-Forged: 1",
        "llx-CANARY with space",
        "llx-CANARY-\u00e9t\u00e9",
        "llx-CANARY\x1b[2J",
        "llx-CANARY\x00",
        "llx-CANARY\r\ninjected",
        "llx-CANARY\u2028x",
    )

    def check(self, result, codes=(2,)):
        self.assertIn(result.code, codes, result.err)
        self.assertRegex(result.err, "(?i)error: .*key")
        self.assertNotIn("CANARY", result.out + result.err)
        self.assertEqual(self.requests(), [])

    def test_flag_stdin_and_file(self):
        project = ["--project", "proj-alpha"]
        for bad in self.BAD:
            for verify in ([], ["--no-verify"]):
                with self.subTest(bad=bad, verify=verify):
                    argv = ["auth", "token"] + project + verify
                    data = bad.encode()
                    self.check(self.call(*argv + ["--api-key", bad]))
                    self.check(self.call(*argv + ["--api-key", "-"], stdin=data))
                    self.check(self.call(*argv + ["--api-key-file", self.key_file(data)]))
        for nothing in (b"", b"\n", b" \t\r\n"):
            argv = ["auth", "token", "--api-key", "-"] + project
            self.check(self.call(*argv, stdin=nothing))
        self.check(self.call("auth", "token", "--api-key", "", *project))
        self.check(
            self.call("auth", "token", "--api-key", "-", *project, stdin=b"llx-CANARY\xff")
        )
        self.assertEqual(self.profiles(), {})

    def test_variable_and_store(self):
        for bad in self.BAD:
            with self.subTest(bad=bad):
                if "\x00" not in bad:
                    variable = os.fsdecode(bad.encode())  # as any locale would hand it over
                    env = {
                        "LLAMA_CLOUD_API_KEY": variable,
                        "LLAMA_AGENTS_PROJECT_ID": "p",
                        "LLAMA_CLOUD_BASE_URL": self.url,
                    }
                    self.write_store({})
                    self.check(self.call("deployments", "get", env=env))
                    self.check(self.call("auth", "inject", "--env-file", "-", env=env))
                self.with_profile(key=bad)
                self.check(self.call("projects", "get"), (1, 2))
                self.check(self.call("auth", "inject", "--env-file", "-"), (1, 2))
                self.done("auth", "get")
                self.done("auth", "logout", "main")


class Mistakes(CommandCase):
    """What people get wrong, and the two lines that come back.

    <URL> is the stand-in's, <SECURE> the same with https, <OTHER> that of another region;
    @NAME=VALUE is a variable.
    """

    OTHER = "https://api.cloud.eu.llamaindex.ai"
    TOKEN = "auth token --project Alpha --api-key "
    WEB_PAGE = ("html", {})
    BLOCKED = ("status", {"status": 403, "body": "<html>Blocked by policy</html>"})
    TABLE = (
        (
            "no scheme",
            "environments add api.cloud.llamaindex.ai",
            None,
            2,
            "an API URL is http(s)://HOST, without user, query or fragment",
            "llamactl environments add https://api.cloud.llamaindex.ai",
        ),
        (
            "no scheme, on this machine",
            "environments add localhost:8000",
            None,
            2,
            "an API URL is http(s)://HOST, without user, query or fragment",
            "llamactl environments add http://localhost:8000",
        ),
        (
            "the web console's address",
            "environments add http://cloud.localhost:<PORT>",
            WEB_PAGE,
            5,
            "http://cloud.localhost:<PORT>/api/v1beta1/deployments-public/version returned "
            "a web page; is a portal in the way, or is it the web console?",
            "llamactl environments add http://api.cloud.localhost:<PORT>",
        ),
        (
            "a path behind the address",
            "environments add <URL>/api/v1",
            None,
            1,
            "<URL>/api/v1/api/v1beta1/deployments-public/version answered 404: Not Found "
            "(request ID)",
            "llamactl environments add <URL>",
        ),
        (
            "https to an http port",
            "environments add <SECURE>",
            None,
            5,
            "<SECURE>: TLS failed: the server does not use TLS",
            "llamactl environments add <URL>",
        ),
        (
            "a server that is down",
            "environments add http://127.0.0.1:1",
            None,
            5,
            "http://127.0.0.1:1: connection refused",
            "llamactl environments add http://127.0.0.1:1 --no-verify",
        ),
        (
            "a key with its name",
            TOKEN + "LLAMA_CLOUD_API_KEY=" + KEY,
            None,
            2,
            "the API key has a name in front of it; give the key alone",
            None,
        ),
        (
            "a key of OpenAI's",
            TOKEN + "sk-proj-CANARY-0123456789",
            None,
            4,
            "the API key was rejected: <PROJECTS> answered "
            "401: Invalid authentication credentials (request ID); a LlamaCloud key begins "
            "with llx-",
            "create a key in the web console (LlamaCloud: https://cloud.llamaindex.ai)",
        ),
        (
            "a key of another region",
            TOKEN + "llx-CANARY-of-another-region",
            None,
            4,
            "the API key was rejected: <PROJECTS> answered "
            "401: Invalid authentication credentials (request ID); a key belongs to one "
            "region",
            "llamactl environments add https://api.cloud.eu.llamaindex.ai",
        ),
        (
            "a key that may not list projects",
            TOKEN + OTHER_KEY,
            ("status", {"status": 403, "body": {"detail": "No access"}}),
            4,
            "the API key is not allowed to list projects: <PROJECTS> "
            "answered 403: No access (request ID)",
            "llamactl auth token --no-verify --api-key-file PATH --project ID",
        ),
        (
            "a firewall's page while a key is verified",
            TOKEN + OTHER_KEY,
            BLOCKED,
            5,
            "<PROJECTS> answered 403 with a web page (request ID)",
            "llamactl auth status --offline",
        ),
        (
            "a portal's page",
            "projects get",
            WEB_PAGE,
            5,
            "<PROJECTS> returned a web page; is a portal in "
            "the way, or is it the web console?",
            "llamactl auth status --offline",
        ),
        (
            "a project that is not there",
            "auth inject --project Gamma",
            None,
            1,
            "project Gamma not found; available: proj-alpha (Alpha), proj-beta (Beta)",
            None,
        ),
        (
            "a profile of another environment",
            "auth use elsewhere",
            None,
            1,
            "profile elsewhere belongs to <OTHER>, not to <URL>",
            "llamactl environments use <OTHER>",
        ),
        (
            "a profile that is not there",
            "auth use Alpha",
            None,
            1,
            "<URL> has no profile Alpha; available: main, old",
            "llamactl auth get",
        ),
        (
            "a variable that names no profile",
            "config @LLAMACTL_PROFILE=nope",
            None,
            1,
            "LLAMACTL_PROFILE: <URL> has no profile nope; available: main, old",
            "unset LLAMACTL_PROFILE",
        ),
        (
            "a variable with a key and its name",
            "projects get @LLAMA_CLOUD_API_KEY=X=1 @LLAMA_AGENTS_PROJECT_ID=p",
            None,
            2,
            "LLAMA_CLOUD_API_KEY: the API key has a name in front of it; give the key "
            "alone",
            "unset LLAMA_CLOUD_API_KEY",
        ),
        (
            "a variable with an address without its scheme",
            "projects get @LLAMA_CLOUD_API_KEY=k @LLAMA_CLOUD_BASE_URL=api.example.com",
            None,
            2,
            "LLAMA_CLOUD_BASE_URL: an API URL is http(s)://HOST, without user, query or "
            "fragment",
            "unset LLAMA_CLOUD_BASE_URL",
        ),
        (
            "a revoked key of a profile that is not the current one",
            "projects use beta --profile old",
            None,
            4,
            "<PROJECTS> answered 401: Invalid authentication credentials (request ID)",
            "llamactl auth token --name old",
        ),
        (
            "a key file without a project",
            "auth exec --api-key-file <FILE> -- true",
            None,
            2,
            "no project given; use --project ID",
            None,
        ),
        (
            "a key where a name belongs",
            "auth use " + KEY,
            None,
            1,
            "<URL> has no profile ********; available: main, old",
            "llamactl auth get",
        ),
        (
            "a key as a word",
            "auth token " + KEY,
            None,
            2,
            "one argument too many: ********",
            "llamactl auth token --help",
        ),
    )

    def setUp(self):
        super().setUp()
        self.patch(REGIONS={self.url: self.OTHER})
        self.with_profile()
        data = self.stored()
        old = {"auth_type": "token", "api_key": "llx-CANARY-revoked"}
        data[self.url]["profiles"]["old"] = old
        data[self.OTHER] = {
            "profiles": {"elsewhere": {"auth_type": "token", "api_key": OTHER_KEY}}
        }
        with open(self.store_path, "w") as file:
            json.dump(
                {"version": 1, "current_environment": self.url, "environments": data}, file
            )

    def test_two_lines_that_help(self):
        names = {"URL": self.url, "OTHER": self.OTHER}
        names["PROJECTS"] = self.url + LIST_PROJECTS
        names["PORT"] = self.url.rpartition(":")[2]
        names["FILE"] = os.path.join(self.home, "key.txt")
        with open(names["FILE"], "w") as file:
            file.write(KEY)
        lookup = socket.getaddrinfo
        local = lambda host, *rest: lookup("127.0.0.1", *rest)  # noqa: E731
        names["SECURE"] = self.url.replace("http:", "https:")
        before = self.store_text()
        for name, line, fault, code, message, hint in self.TABLE:
            with self.subTest(name):
                self.cloud.reset()
                if fault:
                    self.cloud.fault("*", fault[0], 9, **fault[1])
                expected = "error: %s\n" % message
                if hint:
                    expected += "hint: %s\n" % hint
                for word, value in names.items():
                    line = line.replace("<%s>" % word, value)
                    expected = expected.replace("<%s>" % word, value)
                words = line.split()
                env = dict(word[1:].split("=", 1) for word in words if word[0] == "@")
                words = [word for word in words if word[0] != "@"]
                with unittest.mock.patch.object(socket, "getaddrinfo", local):
                    result = self.call(*words, env=env)
                told = re.sub(r"request [^)]*", "request ID", result.err)
                told = re.sub("^warning: .* is not encrypted: .*\n", "", told)
                self.assertEqual((result.code, told), (code, expected))
                self.assertEqual(self.store_text(), before)

    def test_what_surrounds_a_pasted_key_is_removed(self):
        for pasted in ('"%s"', "'%s'", " %s\r\n", "\x1b[200~%s\x1b[201~"):
            with self.subTest(pasted=pasted):
                self.write_store({})
                argv = self.TOKEN.split() + [pasted % KEY]
                self.done(*argv)
                self.assertEqual(self.profiles()["llx-wxyz"]["api_key"], KEY)


class Names(CommandCase):
    def token(self, key, project="proj-alpha", *argv):
        self.done(
            "auth", "token", "--no-verify", "--api-key", key, "--project", project, *argv
        )
        return self.stored()[self.url]["current_profile"]

    def test_names_of_new_profiles(self):
        other = "llx-CANARY-of-somebody-else-wxyz"
        self.assertEqual(self.token(KEY), "llx-wxyz")
        self.assertEqual(self.token(KEY), "llx-wxyz")
        self.assertEqual(self.token(KEY, "proj-beta"), "llx-wxyz-2")
        self.assertEqual(self.token(other), "llx-wxyz-3")
        self.assertEqual(self.token(other), "llx-wxyz-3")
        self.assertEqual(self.token(KEY, "proj-beta"), "llx-wxyz-2")
        self.assertEqual(self.token(KEY), "llx-wxyz")
        self.assertEqual(len(self.profiles()), 3)

    def test_names_are_safe_and_show_four_characters_at_most(self):
        for key in (
            "llx-CANARY-0123456789-$(x)",
            "llx-CANARY-0123456789`;'\"",
            "x",
            "llx-CANARY-*",
            "0123456789abcdefghij",
            "llx-CANARY-0123456789-a-",
        ):
            with self.subTest(key=key):
                name = self.token(key)
                self.assertRegex(name, r"\A[A-Za-z0-9][A-Za-z0-9._@+-]*\Z")
                shown = name[4:] if name.startswith("llx-") else name
                self.assertFalse(
                    any(key[at : at + 5] in shown for at in range(len(key) - 4))
                )

    def test_chosen_names(self):
        self.assertEqual(self.token(KEY, "proj-alpha", "--name", "prod"), "prod")
        self.assertEqual(self.token(OTHER_KEY, "proj-beta", "--name", "prod"), "prod")
        self.assertEqual(
            [profile["api_key"] for profile in self.profiles().values()], [OTHER_KEY]
        )

    def test_a_login_is_not_replaced_by_a_key(self):
        self.login("--project", "proj-alpha")
        before = self.store_text()
        argv = ["auth", "token", "--api-key", KEY, "--project", "proj-alpha", "--name"]
        for flags in ([], ["--no-verify"]):
            self.expect_failure(self.call(*argv + ["dev@example.com"] + flags), 1, "login")
        self.assertEqual(self.store_text(), before)

    def test_a_hint_can_be_pasted_whatever_the_name(self):
        self.login("--project", "proj-alpha", "--name", "$(id)")
        argv = [
            "auth",
            "token",
            "--api-key",
            KEY,
            "--project",
            "proj-alpha",
            "--name",
            "$(id)",
        ]
        self.expect_failure(self.call(*argv), 1, "is a login", "auth logout '$(id)'")

    def test_names_of_logins(self):
        for person, name in (
            ({"email": "a@example.com"}, "a@example.com"),
            ({"sub": "user|7", "email": None}, "user-7"),
            ({"sub": "u8", "email": "$(reboot)@x y"}, "reboot-@x-y"),
            ({"sub": "u9", "email": "a@example.com"}, "a@example.com-2"),
        ):
            with self.subTest(person=person):
                self.cloud.auto_approve = person
                self.login("--project", "proj-alpha")
                self.assertEqual(self.stored()[self.url]["current_profile"], name)

    def test_names_that_no_listing_could_carry(self):
        empty = self.call("auth", "token", "--api-key", KEY, "--project", "p", "--name", "")
        self.expect_failure(empty, 2, "name is empty", "auth token --help")
        for name in (" ", "-x", "a\nb", "a\x1b[2J", "\u202ea", " a"):
            with self.subTest(name=name):
                result = self.call(
                    "auth",
                    "token",
                    "--api-key",
                    KEY,
                    "--project",
                    "proj-alpha",
                    "--name=" + name,
                )
                self.expect_failure(result, 2, "--name")
        self.assertEqual(self.profiles(), {})


class HostileTexts(CommandCase):
    def setUp(self):
        super().setUp()
        self.with_profile()
        for project in self.cloud.projects:
            project["project_name"] = HOSTILE
        for organization in self.cloud.organizations:
            organization["org_name"] = HOSTILE
        self.cloud.deployments = [
            dict(
                self.cloud.deployments[0],
                display_name=HOSTILE,
                repo_url=HOSTILE,
                git_ref=HOSTILE,
                status=HOSTILE,
                warning=HOSTILE,
                apiserver_url=HOSTILE,
                appserver_version=HOSTILE,
                secret_names=[HOSTILE],
            )
        ]

    def assert_harmless(self, text, lines=None):
        self.assertIsNone(UNSHOWN.search(text), ascii(text))
        if lines is not None:
            self.assertEqual(len(text.splitlines()), lines, text)

    def test_tables(self):
        for argv, lines in (
            ("projects get", 3),
            ("organizations get", 3),
            ("deployments get", 2),
            ("deployments get -o wide", 2),
            ("deployments get invoices", 2),
        ):
            with self.subTest(argv=argv):
                result = self.done(*argv.split())
                self.assert_harmless(result.out, lines)
                self.assert_harmless(result.err)
                self.assertIn("FORGED", result.out)

    def test_json_and_yaml_keep_the_value_in_harmless_words(self):
        for argv in ("projects get proj-alpha", "deployments get", "organizations get"):
            with self.subTest(argv=argv):
                for kind in ("json", "yaml"):
                    self.assert_harmless(self.done(*argv.split() + ["-o", kind]).out)
                self.rows(*argv.split())
        self.assertEqual(
            self.rows("projects", "get", "proj-alpha")["project_name"], HOSTILE
        )

    def test_notices_and_stored_names(self):
        self.assert_harmless(self.done("projects", "use", "proj-beta").err, 1)
        self.assert_harmless(self.done("config").out, 2)
        self.assertEqual(self.rows("config")["project_name"], HOSTILE)
        self.assert_harmless(self.done("auth", "status").out, None)
        self.assert_harmless(self.call("projects", "use").err, 1)

    def test_codes_and_addresses_of_a_login(self):
        self.cloud.device_answer = {
            "user_code": HOSTILE,
            "verification_uri": "https://id.example/",
        }
        self.cloud.token_script = [(400, {"error": "access_denied"})]
        self.assert_harmless(self.call("auth", "login").err, 6)
        self.assert_harmless(self.done("auth", "login", "--start").out, 5)
        for name in ("verification_uri", "verification_uri_complete"):
            with self.subTest(name=name):
                self.cloud.device_answer = {name: HOSTILE}
                result = self.call("auth", "login")
                self.expect_failure(result, 1, "unusable URL")
                self.assert_harmless(result.err)

    def test_lone_surrogates(self):
        self.cloud.projects[0]["project_name"] = "a\ud800z"
        self.assertIn("a\ufffdz", self.done("projects", "get").out)
        self.assertEqual(
            self.rows("projects", "get", "proj-alpha")["project_name"], "a\ufffdz"
        )

    def test_errors(self):
        for body in (
            {"detail": HOSTILE},
            {"detail": [{"loc": [HOSTILE], "msg": HOSTILE}]},
            {"error": HOSTILE},
            HOSTILE,
            {"detail": {"a": [HOSTILE]}},
            [HOSTILE],
        ):
            for status in (400, 401, 422, 500):
                with self.subTest(body=body, status=status):
                    self.cloud.reset()
                    self.cloud.fault("*", "status", status=status, body=body, times=9)
                    result = self.call("projects", "get")
                    self.expect_failure(
                        result, {401: 4, 500: 5}.get(status, 1), str(status)
                    )
                    self.assert_harmless(result.err)

    def test_project_ids(self):
        for bad in (
            HOSTILE,
            "a b",
            "\u00e9",
            "x\nLLAMA_CLOUD_BASE_URL=https://evil.example",
        ):
            with self.subTest(bad=bad):
                self.cloud.projects = [{"project_id": bad, "project_name": "x"}]
                before = self.store_text()
                for argv in (["auth", "token", "--api-key", KEY], ["projects", "use"]):
                    result = self.call(*argv)
                    self.assertNotEqual(result.code, 0)
                    self.assert_harmless(result.err)
                self.assertEqual(self.store_text(), before)

    def test_an_echoed_secret_is_masked(self):
        echo = "key %s of %s" % (KEY, KEY)
        for project in self.cloud.projects:
            project["project_name"] = echo
        self.cloud.deployments[0].update(
            display_name=echo,
            repo_url=echo,
            git_ref=echo,
            status=echo,
            warning=echo,
            secret_names=[KEY],
        )
        for argv in (
            "projects get",
            "projects get -o json",
            "projects get -o yaml",
            "deployments get",
            "deployments get -o wide",
            "deployments get -o json",
            "deployments get -o yaml",
        ):
            with self.subTest(argv=argv):
                result = self.done(*argv.split())
                self.assertIn("key ******** of ********", result.out)
        for status in (400, 401, 403, 500):
            for body in ({"detail": echo}, {"detail": [{"msg": echo}]}):
                self.cloud.fault("*", "status", status=status, body=body, times=3)
                result = self.call("projects", "get")
                self.assertIn("key ******** of ********", result.err)
                self.cloud.reset()
                self.cloud.fault("*", "status", status=status, body=body, times=3)
                self.call("auth", "token", "--api-key", KEY, "--project", "proj-alpha")
                self.cloud.reset()
        self.cloud.fault(
            "*", "status", status=400, body={"detail": echo}, headers={"x-request-id": KEY}
        )
        self.assertIn("(request ********)", self.call("projects", "get").err)
        self.cloud.fault("*", "redirect", to="https://evil.example/" + KEY)
        self.expect_failure(self.call("projects", "get"), 1, r"\*{8}")
        self.assertEqual(self.done("projects", "use", "proj-beta").code, 0)
        self.done("config")
        self.done("auth", "status")

    def test_a_text_that_is_cut_leaves_no_part_of_an_echoed_secret(self):
        key = "CANARY-of-a-key-in-words-that-hyphens-part"
        self.with_profile(key=key)
        parts = [key[start : start + 8] for start in range(len(key) - 7)]
        for offset in range(200, 311, 3):
            for filler in ("word " * 62, "a-b-" * 78, " " * 311):
                echo = filler[:offset] + key + " and more" * 40
                path = echo.replace(" ", "/")
                for kind, options in (
                    ("status", {"status": 400, "body": {"detail": echo}}),
                    ("status", {"status": 400, "headers": {"x-request-id": echo}}),
                    ("redirect", {"to": "https://evil.example/" + path}),
                    ("redirect", {"to": "ftp://evil.example/" + path}),
                ):
                    with self.subTest(offset=offset, filler=filler[:4], kind=kind):
                        self.cloud.fault("*", kind, **options)
                        result = self.call("projects", "get")
                        self.assertEqual(1, result.code, result.err)
                        self.assertEqual([], [part for part in parts if part in result.err])


class Twice(CommandCase):
    """Bootstrap scripts run again: the same outcome, exit 0, nothing added."""

    def test_each_command(self):
        path = os.path.join(self.home, ".env")
        for line in (
            "environments add " + self.url,
            "environments use " + self.url,
            "auth token --api-key %s --project proj-alpha" % KEY,
            "auth token --api-key %s --project proj-beta --name prod" % KEY,
            "auth use prod",
            "projects use proj-alpha",
            "auth inject --env-file " + path,
        ):
            with self.subTest(line=line):
                self.done(*line.split())
                store = self.store_text()
                state = os.stat(path) if os.path.exists(path) else None
                self.done(*line.split())
                self.assertEqual(self.store_text(), store)
                if state:
                    self.assertEqual(os.stat(path).st_ino, state.st_ino)
                    self.assertEqual(os.stat(path).st_mtime_ns, state.st_mtime_ns)
        self.assertEqual(sorted(self.profiles()), ["llx-wxyz", "prod"])

    def test_a_login(self):
        for _ in range(2):
            self.login("--project", "proj-alpha")
        self.assertEqual(list(self.profiles()), ["dev@example.com"])
        self.assertEqual(self.cloud.count("POST", "/api/v1/api-keys"), 1)


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
        command, *lines = step.splitlines()
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
    """Every console block is typed against the stand-in, and prints what it says."""

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
        return 0
    stale = [
        pair for pair in zip(text.splitlines(), pinned.splitlines()) if len({*pair}) > 1
    ]
    for was, should_be in stale:
        print(f"README.md is stale:\n- {was}\n+ {should_be}")
    return 1 if stale else 0


class Release(Case):
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
        self.assertEqual(self.release("9.8.7"), (0, ""))
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
        for block in console_blocks() + [NOT_IN_THE_README]:
            if block is NOT_IN_THE_README:
                make_official_store(os.path.join(home, ".config/llamactl/profiles.db"))
            for command, lines in steps(block.replace(SANDBOX_URL, stand_in.url)):
                print(f"\n$ {command}", flush=True)
                code, shown = run_apart(["sh", "-c", command], env, home)
                print(shown, end="", flush=True)
                is_failure = any(line.startswith("error: ") for line in lines)
                is_as_said = re.match(transcript_pattern(lines), shown)
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

    # a child's peak counts from the size of the process that forked it: so a small one does
    MEASURE = """
import os, sys, time
started = time.perf_counter()
pid = os.fork()
if not pid:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp(sys.argv[1], sys.argv[1:])
status, usage = os.wait4(pid, 0)[1:]
wall = time.perf_counter() - started
print(wall, usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
sys.exit(status != 0)
"""

    def __init__(self, home):
        self.home = home
        self.over = 0  # rows that missed their limit
        self.env = {"HOME": home, "PATH": shell_tools(home), "PYTHONDONTWRITEBYTECODE": "1"}

    def once(self, command):
        """Wall seconds, peak memory in KiB (macOS: bytes), seconds of CPU of a process."""
        words = [sys.executable, "-I", "-S", "-c", self.MEASURE, *shlex.split(command)]
        shown = subprocess.check_output(words, env=self.env, cwd=self.home)
        return [float(word) for word in shown.split()]

    def against(self, what, floor, command, limit, memory_limit=None, times=21):
        """Rows of the medians of FLOOR and COMMAND, run in turn after a warm-up."""
        runs = [self.once(floor) + self.once(command) for _ in range(times + 1)]
        below, small, _, above, large, _ = map(statistics.median, zip(*runs[1:]))
        self.row(f"{what}, time", f"{below * 1000:.0f} ms", above / below, limit)
        if memory_limit:
            self.row(f"{what}, memory", f"{small:,.0f}", large / small, memory_limit)

    def row(self, what, floor, mine, limit, unit="x"):
        verdict = "ok" if mine <= limit else "OVER"
        self.over += mine > limit
        print(f"{what:52} {floor:>8} {mine:9.2f}{unit} {limit:8.2f}  {verdict}", flush=True)

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
        self.store(3)
        floor = "python3 -c 'import argparse, json'"
        self.against("auth get, as a script", floor, "llamactl auth get", 1.8, 1.6)
        subprocess.check_call([sys.executable, "-m", "compileall", "-q", self.home])
        installed = "python3 -c 'import llamactl; llamactl.main()' auth get"
        self.against("auth get, installed", floor, installed, 1.25, 1.15)

    def network(self, stand_in):
        self.store(1, stand_in.url)
        floor = "python3 -c 'import urllib.request'"
        self.against("projects get over loopback", floor, "llamactl projects get", 1.6)

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
        self.row(what, f"{medians[0]:.0f} ms", medians[1] - medians[0], 150.0, " ms")

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
            seconds.append(self.once(f"sh -c '{script}'")[2])
            if text_of(path).count("crowd-") != len(numbers):
                sys.exit("one of a crowd failed")
        serial, together = seconds
        what = "32 x auth token at once, CPU"
        self.row(what, f"{serial:.1f} s", together / serial, 1.5)


def bench():
    """What the house promises, measured here and now."""
    home = tempfile.mkdtemp(prefix="llamactl-bench-")
    version = sys.version.split()[0]
    print(f"Python {version}; medians of processes run in turn with their floor")
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


def worker():
    """Run the classes that stdin names, and answer each by a line of JSON on stdout."""
    with os.fdopen(os.dup(0)) as asked, os.fdopen(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what a test prints must not look like an answer
        for line in asked:
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
        "yaml-readers": check_yaml_with_readers,
        "windows": check_windows,
        "release": release,
        "--list": list_tests,
        "--help": show_help,
        "-h": show_help,
        "--worker": worker,
    }
    sys.exit(words.get(sys.argv[1] if len(sys.argv) > 1 else "", run_tests)())
