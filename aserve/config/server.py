"""Arguments of the HTTP server, as opposed to the engine."""

# ruff: noqa: RUF009  -- arg() makes a dataclasses.field, which is what the rule asks for

from __future__ import annotations

import argparse
import os
import ssl
from dataclasses import dataclass

from aserve import registry
from aserve.config.cli import arg, check_types, json_strings, nullable_str
from aserve.config.unbuilt import refuse_unbuilt_server
from aserve.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "trace")
API_KEY_VARIABLES = ("ASERVE_API_KEY", "VLLM_API_KEY")

_SERVER = "Server arguments"


@dataclass(frozen=True)
class LoRAModule:
    """An adapter the server offers as a model called ``name``."""

    name: str
    path: str


def lora_module(text: str) -> LoRAModule:
    """Reads ``name=path``."""
    name, separator, path = text.partition("=")
    if not (name and separator and path) or "=" in path:
        raise argparse.ArgumentTypeError(f"expected name=path, got {text!r}")
    return LoRAModule(name, path)


def parser_name(text: str) -> str:
    """The name of a tool call parser, which may be written with underscores: ``llama3_json``."""
    return text.replace("_", "-")


@dataclass
class ServerArgs:
    """Arguments of the HTTP server; :meth:`check` raises ConfigError for values that cannot work."""

    host: str | None = arg(
        "127.0.0.1",
        group=_SERVER,
        help="Host name or address to listen on; 0.0.0.0 or None: every one.",
    )
    port: int = arg(8000, group=_SERVER, help="Port number; 0 takes a free one.")
    log_level: str = arg(
        "info",
        group=_SERVER,
        choices=LOG_LEVELS,
        aliases=("--uvicorn-log-level",),
        help="Log level of the server.",
    )
    allow_credentials: bool = arg(False, group=_SERVER, help="Allow credentials in cross-origin requests.")
    allowed_origins: list[str] = arg(
        ["*"], group=_SERVER, kind=json_strings, metavar="JSON", help="Origins that may call from a browser."
    )
    allowed_methods: list[str] = arg(
        ["*"], group=_SERVER, kind=json_strings, metavar="JSON", help="Methods they may use."
    )
    allowed_headers: list[str] = arg(
        ["*"], group=_SERVER, kind=json_strings, metavar="JSON", help="Headers they may send."
    )
    api_key: list[str] | None = arg(
        None,
        group=_SERVER,
        kind=nullable_str,
        nargs="+",
        action="extend",
        metavar="KEY",
        help="Require one of these keys as bearer token. ASERVE_API_KEY in the environment wins over it.",
    )
    api_key_file: str | None = arg(
        None,
        group=_SERVER,
        help="File of further keys, read again at SIGHUP: one a line as KEY, NAME KEY or NAME KEY admin. "
        "Logs show names; the routes under /admin need a key marked admin.",
    )
    lora_modules: list[LoRAModule] | None = arg(
        None,
        group=_SERVER,
        kind=lora_module,
        nargs="+",
        metavar="NAME=PATH",
        help="LoRA adapters to offer, each as a model of its own.",
    )
    chat_template: str | None = arg(
        None, group=_SERVER, help="Chat template: a file, or the template itself on one line."
    )
    response_role: str | None = arg(
        "assistant", group=_SERVER, help="Role of the answer when the request adds a generation prompt."
    )
    tool_call_parser: str | None = arg(
        None,
        group=_SERVER,
        kind=parser_name,
        choices=registry.tool_parsers,
        help="Format of the model's calls of tools; unset: the one that its chat template shows.",
    )
    enable_auto_tool_choice: bool = arg(
        False,
        group=_SERVER,
        help="Do not start if there is no way to read the calls of tools that the model writes of its own "
        'accord. Without it requests with tool_choice "auto" are then refused, and accepted otherwise.',
    )
    ssl_keyfile: str | None = arg(None, group=_SERVER, help="TLS key file.")
    ssl_certfile: str | None = arg(None, group=_SERVER, help="TLS certificate file.")
    ssl_ca_certs: str | None = arg(None, group=_SERVER, help="CA certificates to check clients against.")
    ssl_cert_reqs: int = arg(
        int(ssl.CERT_NONE),
        group=_SERVER,
        help="Whether clients need a certificate: 0 no, 1 checked if there is one, 2 yes.",
    )
    root_path: str | None = arg(
        None, group=_SERVER, help="Path prefix that a proxy in front of the server strips, such as /llm."
    )
    middleware: list[str] = arg(
        [],
        group=_SERVER,
        kind=nullable_str,
        action="append",
        metavar="MODULE.NAME",
        help="Import path of an ASGI middleware class or of a coroutine function (request, call_next); "
        "may be given several times.",
    )
    strict_fields: bool = arg(
        False,
        group=_SERVER,
        help="Answer 400 to a request with a field this server does not know, instead of ignoring the field.",
    )
    drain_timeout: float = arg(
        30.0, group=_SERVER, help="Seconds that running requests get to finish at shutdown."
    )
    max_body_size: int = arg(
        16 * 1024 * 1024, group=_SERVER, help="Most bytes of a request body; larger ones are answered 413."
    )

    stall_timeout: float = arg(
        120.0,
        group=_SERVER,
        help="Seconds without a finished step, while requests wait, after which health is 503. "
        "Longer than the longest step.",
    )
    otlp_traces_endpoint: str | None = arg(
        None,
        group=_SERVER,
        help="Address of a collector's OTLP/HTTP receiver, such as http://localhost:4318/v1/traces: requests "
        "are traced. Needs the extra aserve[otel].",
    )

    def take_environment(self) -> None:
        """Replaces the API keys by the one in the environment, if there is one."""
        for variable in API_KEY_VARIABLES:
            if os.environ.get(variable):
                self.api_key = [os.environ[variable]]
                return

    def check(self) -> None:
        """Raises ConfigError for values that cannot work; tidies empty ones away."""
        self.api_key = [key for key in self.api_key or () if key] or None
        self.middleware = [path for path in self.middleware if path]
        self.response_role = self.response_role or "assistant"
        check_types(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}", param="port")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}", param="log_level"
            )
        if self.tool_call_parser is not None and self.tool_call_parser not in registry.tool_parsers:
            raise ConfigError(
                f"tool_call_parser must be one of {', '.join(registry.tool_parsers)}, "
                f"got {self.tool_call_parser!r}",
                param="tool_call_parser",
            )
        if not 0 <= self.drain_timeout < float("inf"):
            raise ConfigError(
                f"drain_timeout must be seconds from 0, got {self.drain_timeout}", param="drain_timeout"
            )
        if not self.stall_timeout > 0:
            raise ConfigError(
                f"stall_timeout must be seconds above 0, got {self.stall_timeout}", param="stall_timeout"
            )
        self.otlp_traces_endpoint = self.otlp_traces_endpoint or None
        if self.max_body_size < 1:
            raise ConfigError(
                f"max_body_size must be at least 1, got {self.max_body_size}", param="max_body_size"
            )
        if self.root_path is not None:
            self.root_path = self.root_path.rstrip("/") or None
        if self.root_path is not None and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must begin with '/', got {self.root_path!r}", param="root_path")
        for path in self.middleware:
            if "." not in path.strip("."):
                raise ConfigError(
                    f"middleware must be an import path such as module.name, got {path!r}", param="middleware"
                )
        self._check_tls()
        refuse_unbuilt_server(self)

    def _check_tls(self) -> None:
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                raise ConfigError(f"{name}: no such file: {path}", param=name)
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
                if getattr(self, name):
                    raise ConfigError(f"{name} needs ssl_certfile", param=name)
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(
                f"ssl_cert_reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}", param="ssl_cert_reqs"
            )
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError(
                "ssl_cert_reqs needs ssl_ca_certs to check client certificates against", param="ssl_cert_reqs"
            )
