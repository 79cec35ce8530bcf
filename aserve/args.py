"""Every argument of the engine, declared once; flags, help and tables derive from the fields.

The server's own arguments are :class:`~aserve.config.server.ServerArgs`, found here too. Importing this
module reads no model and imports neither torch nor transformers.
"""

# ruff: noqa: RUF009  -- arg() makes a dataclasses.field, which is what the rule asks for

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aserve import packaged, registry
from aserve.config.cache import BLOCK_SIZES, CACHE_DTYPES
from aserve.config.cli import add_flags, arg, float_tuple, from_namespace, nullable_str
from aserve.config.device import DEVICES
from aserve.config.dtype import DTYPES
from aserve.config.engine import EngineConfig, resolve_engine_config
from aserve.config.lora import LORA_DTYPES
from aserve.config.model import TOKENIZER_MODES
from aserve.config.parallel import distributed_backends
from aserve.config.scheduler import OVERLAPS, PREEMPTION_MODES
from aserve.config.server import LoRAModule, ServerArgs
from aserve.config.vision import IMAGE_INPUT_TYPES
from aserve.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "AsyncEngineArgs",
    "EngineArgs",
    "LoRAModule",
    "ServerArgs",
    "default_model",
    "parse_serve_args",
    "serve_args_from_environment",
]

ARGS_VARIABLE = "ASERVE_ARGS"

SERVE_DEFAULTS: dict[str, Any] = {
    "enable_chunked_prefill": None,
    "enable_prefix_caching": None,
    "max_decode_slowdown": 1.7,
}
"""What serving sets where nothing is said: None switches on what the model allows."""

EMBEDDED_MODEL = "smollm2"
HUB_MODEL = "facebook/opt-125m"

_MODEL = "Model arguments"
_GUIDED = "Guided decoding"
_PARALLEL = "Parallel arguments"
_DEVICE = "CPU / GPU optimization"
_QUANT = "Quantization settings"
_SPEC = "Speculative decoding"
_LORA = "LoRA related configs"
_SCHEDULER = "Scheduler, batches, pools, stats"
_CACHE = "KV cache arguments"
_VISION = "Vision-language models"
_ASYNC = "AsyncEngine arguments"


def default_model() -> str:
    """The model served when none is named: the packaged one if it is installed."""
    try:
        packaged.resolve(EMBEDDED_MODEL)
    except ConfigError:
        return HUB_MODEL
    return EMBEDDED_MODEL


@dataclass
class EngineArgs:
    """Arguments of the engine. Nothing is checked until :meth:`create_engine_config`."""

    model: str = arg(
        group=_MODEL,
        help="Model to use: a Hugging Face id, a local directory, a .gguf file, or the name of a packaged "
        "model (smollm2, gemma3-270m).",
        default_text=f"{EMBEDDED_MODEL} if its package is installed, else {HUB_MODEL}",
    )
    served_model_name: list[str] | None = arg(
        None,
        group=_MODEL,
        kind=str,
        nargs="+",
        metavar="NAME",
        help="Model names the API answers to. The first is the one in responses and in the metrics label; "
        "without any it is the value of --model.",
    )
    tokenizer: str | None = arg(
        None, group=_MODEL, help="Name or path of the tokenizer; the model's own if unset."
    )
    skip_tokenizer_init: bool = arg(
        False, group=_MODEL, help="Load no tokenizer: prompts are token ids and outputs carry no text."
    )
    tokenizer_mode: str = arg(
        "auto",
        group=_MODEL,
        choices=TOKENIZER_MODES,
        help='"auto" uses the fast tokenizer if there is one, "slow" always the Python one.',
    )
    trust_remote_code: bool = arg(
        False, group=_MODEL, help="Let the model's repository run its own Python code."
    )
    download_dir: str | None = arg(
        None, group=_MODEL, help="Directory to download weights to; the Hugging Face cache if unset."
    )
    load_format: str = arg(
        "auto",
        group=_MODEL,
        choices=registry.loaders.names,
        help='Format of the weights. "auto": safetensors, else PyTorch files; "safetensors", "pt", "gguf": '
        'that format alone; "npcache": PyTorch files with a numpy cache beside them; "dummy": random '
        'weights, to measure without a checkpoint; "tensorizer": a tensorizer file.',
    )
    dtype: str = arg(
        "auto",
        group=_MODEL,
        choices=DTYPES,
        help='Data type of weights and activations. "auto": bfloat16 for bfloat16 models, float16 for '
        "float16 and float32 ones; on a CPU float16 becomes bfloat16. half = float16, float = float32. Of a "
        "quantised .gguf file it says only what activations and the KV cache are; an explicit float32 also "
        "decodes the weights, which makes results exact.",
    )
    kv_cache_dtype: str = arg(
        "auto",
        group=_QUANT,
        choices=CACHE_DTYPES,
        help='Data type of the KV cache; "auto" is the model\'s. fp8 is fp8_e4m3.',
    )
    quantization_param_path: str | None = arg(
        None, group=_QUANT, help="JSON file with KV cache scaling factors; without it they are 1.0."
    )
    seed: int = arg(0, group=_DEVICE, help="Seed of the random number generators.")
    max_model_len: int | None = arg(
        None, group=_MODEL, help="Context length, prompt and output together; from the model config if unset."
    )
    worker_use_ray: bool = arg(
        False, group=_PARALLEL, help="Deprecated: use --distributed-executor-backend=ray."
    )
    distributed_executor_backend: str | None = arg(
        None,
        group=_PARALLEL,
        kind=str,
        choices=distributed_backends,
        help="How workers are run. With more than one it is ray if installed, else mp.",
    )
    pipeline_parallel_size: int = arg(1, group=_PARALLEL, short=("-pp",), help="Number of pipeline stages.")
    tensor_parallel_size: int = arg(
        1, group=_PARALLEL, short=("-tp",), help="Number of tensor parallel replicas."
    )
    max_parallel_loading_workers: int | None = arg(
        None, group=_PARALLEL, help="Load the weights in waves of this many workers, to spare host memory."
    )
    block_size: int = arg(16, group=_CACHE, choices=BLOCK_SIZES, help="Tokens per block of the KV cache.")
    enable_prefix_caching: bool | None = arg(
        False,
        group=_CACHE,
        default_text="off; with aserve serve on, where it can be",
        help="Compute what prompts begin with in common once: full blocks, generated ones included, are "
        "found by their tokens for as long as there is room. Not with a sliding window in every layer.",
    )
    use_v2_block_manager: bool = arg(
        False, group=_CACHE, help="Accepted for compatibility: there is one block manager and it serves both."
    )
    swap_space: int = arg(
        4,
        group=_DEVICE,
        help="CPU swap space per GPU, GiB: holds the KV cache of preempted requests. The default shrinks to "
        "a quarter of what memory a small machine has available; 0 allocates none.",
    )
    preemption_mode: str | None = arg(
        None,
        group=_SCHEDULER,
        choices=PREEMPTION_MODES,
        default_text="swap with several sequences, else recompute",
        help="What becomes of a request that must give way when the KV cache is full: it is recomputed "
        "later, or moved to swap space and back. Without room there it is recomputed.",
    )
    gpu_memory_utilization: float = arg(
        0.90, group=_DEVICE, help="Fraction of GPU memory to use, above 0 and up to 1."
    )
    max_num_batched_tokens: int | None = arg(
        None,
        group=_SCHEDULER,
        help="Most tokens per step; unset: the larger of the context length and 2048, or 512 with chunked "
        "prefill.",
    )
    max_num_seqs: int = arg(256, group=_SCHEDULER, help="Most sequences per step.")
    max_logprobs: int = arg(5, group=_SCHEDULER, help="Most log probabilities per token in a request.")
    disable_log_stats: bool = arg(
        False, group=_SCHEDULER, help="Log no statistics, export no engine metrics."
    )
    revision: str | None = arg(
        None, group=_MODEL, help="Model version on the hub: a branch, a tag or a commit id."
    )
    code_revision: str | None = arg(None, group=_MODEL, help="Version of the model's remote code on the hub.")
    rope_scaling: dict[str, Any] | None = arg(
        None,
        group=_MODEL,
        metavar="JSON",
        help='RoPE scaling in place of the model\'s own, such as {"type": "dynamic", "factor": 2.0}.',
    )
    tokenizer_revision: str | None = arg(
        None, group=_MODEL, help="Tokenizer version on the hub; the value of --revision if unset."
    )
    quantization: str | None = arg(
        None,
        group=_QUANT,
        short=("-q",),
        choices=registry.quantizations.names,
        help="How the weights are quantised; if unset, what the model config says.",
    )
    enforce_eager: bool = arg(
        False, group=_DEVICE, help="Never capture CUDA graphs. A CPU always runs eagerly."
    )
    max_context_len_to_capture: int | None = arg(
        None, group=_DEVICE, help="Removed: use --max-seq-len-to-capture."
    )
    max_seq_len_to_capture: int = arg(
        8192,
        group=_DEVICE,
        help="Longest sequence run from a captured CUDA graph; longer ones run eagerly. No effect on a CPU.",
    )
    disable_custom_all_reduce: bool = arg(
        False, group=_PARALLEL, help="Use NCCL's all-reduce. No effect with a single worker."
    )
    tokenizer_pool_size: int = arg(
        0, group=_SCHEDULER, help="Workers that tokenize; 0 tokenizes in the server's process."
    )
    tokenizer_pool_type: str = arg(
        "ray", group=_SCHEDULER, help="Kind of tokenizer pool; ignored if the pool size is 0."
    )
    tokenizer_pool_extra_config: dict[str, Any] | str | None = arg(
        None,
        group=_SCHEDULER,
        kind=nullable_str,
        metavar="JSON",
        help="JSON object for the pool; ignored if its size is 0.",
    )
    enable_lora: bool = arg(False, group=_LORA, help="Serve LoRA adapters.")
    max_loras: int = arg(1, group=_LORA, help="Most adapters in one batch.")
    max_lora_rank: int = arg(16, group=_LORA, help="Largest adapter rank: 8, 16, 32 or 64.")
    fully_sharded_loras: bool = arg(
        False, group=_LORA, help="Shard both halves of an adapter under tensor parallelism."
    )
    lora_extra_vocab_size: int = arg(
        256, group=_LORA, help="Most tokens an adapter may add to the vocabulary: 0, 256 or 512."
    )
    long_lora_scaling_factors: tuple[float, ...] | None = arg(
        None,
        group=_LORA,
        kind=float_tuple,
        metavar="F,F",
        help="Context scaling factors that adapters may have besides the model's own.",
    )
    lora_dtype: str = arg(
        "auto", group=_LORA, choices=LORA_DTYPES, help="Data type of adapters; auto is the model's."
    )
    max_cpu_loras: int | None = arg(
        None, group=_LORA, help="Most adapters kept in host memory; unset: the value of --max-loras."
    )
    device: str = arg(
        "auto",
        group=_DEVICE,
        choices=DEVICES,
        help='Where the model runs; "auto" is cuda if there is a CUDA device, else cpu.',
    )
    ray_workers_use_nsight: bool = arg(False, group=_PARALLEL, help="Profile Ray workers with nsight.")
    num_gpu_blocks_override: int | None = arg(
        None, group=_DEVICE, help="Number of KV cache blocks, in place of what memory allows."
    )
    num_lookahead_slots: int = arg(
        0, group=_CACHE, help="KV cache slots reserved behind the next token of each sequence that draws one."
    )
    model_loader_extra_config: dict[str, Any] | str | None = arg(
        None,
        group=_MODEL,
        kind=nullable_str,
        metavar="JSON",
        help="JSON object for the loader of the chosen load format.",
    )
    image_input_type: str | None = arg(
        None, group=_VISION, choices=IMAGE_INPUT_TYPES, help="What an image is passed as."
    )
    image_token_id: int | None = arg(None, group=_VISION, help="Token id that stands for an image.")
    image_input_shape: str | None = arg(
        None, group=_VISION, help="Largest image input shape, such as 1,3,336,336."
    )
    image_feature_size: int | None = arg(None, group=_VISION, help="Tokens an image takes in the context.")
    scheduler_delay_factor: float = arg(
        0.0,
        group=_SCHEDULER,
        help="Wait this many times the last prompt's latency before scheduling the next prompt.",
    )
    enable_chunked_prefill: bool | None = arg(
        False,
        group=_SCHEDULER,
        default_text="off; with aserve serve and LLM on",
        help="Let a prompt be computed in pieces, beside decodes, within --max-num-batched-tokens.",
    )
    guided_decoding_backend: str = arg(
        "llguidance",
        group=_GUIDED,
        choices=registry.guided_backends.names,
        help="What guides decoding by JSON schema, regex and the like, unless a request says otherwise. "
        "outlines and lm-format-enforcer need the extra `guided`.",
    )
    speculative_model: str | None = arg(
        None, group=_SPEC, help="Draft model, or [ngram] to look continuations up in the prompt."
    )
    num_speculative_tokens: int | None = arg(None, group=_SPEC, help="Tokens to propose per step.")
    speculative_max_model_len: int | None = arg(
        None, group=_SPEC, help="Context length of the draft model; longer sequences are not speculated on."
    )
    speculative_disable_by_batch_size: int | None = arg(
        None, group=_SPEC, help="Stop speculating when this many requests are running."
    )
    ngram_prompt_lookup_max: int | None = arg(None, group=_SPEC, help="Longest n-gram to look up.")
    ngram_prompt_lookup_min: int | None = arg(None, group=_SPEC, help="Shortest n-gram to look up.")
    max_waiting_requests: int | None = arg(
        None,
        group=_SCHEDULER,
        default_text="any number",
        help="Most requests that may wait; beyond it new ones are refused at once with HTTP status 429.",
    )
    max_waiting_tokens: int | None = arg(
        None,
        group=_SCHEDULER,
        default_text="any number",
        help="Most prompt tokens that may wait, likewise. A request that finds nobody waiting is let in.",
    )
    num_scheduler_steps: int | None = arg(
        None,
        group=_SCHEDULER,
        default_text="what suits the device",
        help="Most greedy decode steps computed for one scheduling decision, up to 16 on a CPU. They end "
        "early when a request arrives or ends, and after 16 ms. Their tokens are streamed together.",
    )
    max_decode_slowdown: float | None = arg(
        None,
        group=_SCHEDULER,
        default_text="any time; with aserve serve 1.7",
        help="With chunked prefill, keep the pieces so small that a step takes at most this many "
        "times what its decodes alone take, or 10 ms; more where requests wait to begin.",
    )
    overlap: int = arg(
        1,
        group=_SCHEDULER,
        choices=OVERLAPS,
        help="Steps launched before the previous one's results are read: 1, or 0 to run them one by one.",
    )
    guided_compile_timeout: float | None = arg(
        None,
        group=_GUIDED,
        default_text="2 with llguidance, else 20",
        help="Seconds that compiling one schema, regex or grammar may take; what takes longer is refused.",
    )
    guided_cache_size: int = arg(
        256, group=_GUIDED, help="MiB of memory for the compiled schemas, regexes and grammars that are kept."
    )

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            self.tokenizer = self.model

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds a flag for every argument of this class and returns the parser."""
        add_flags(parser, cls)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments in a namespace that :meth:`add_cli_args`'s parser returned."""
        values = from_namespace(cls, args)
        if values.get("model") is None:
            values["model"] = default_model()
        return cls(**values)

    def create_engine_config(self) -> EngineConfig:
        """Checks every argument and reads the model's config, but no weights.

        Raises ConfigError for values that cannot work, and then UnsupportedError for features this
        release does not have.
        """
        return resolve_engine_config(self)


@dataclass
class AsyncEngineArgs(EngineArgs):
    """Arguments of the asynchronous engine."""

    engine_use_ray: bool = arg(
        False, group=_ASYNC, help="Run the engine in a process of its own, apart from the server."
    )
    disable_log_requests: bool = arg(False, group=_ASYNC, help="Log no requests.")
    max_log_len: int | None = arg(
        None,
        group=_ASYNC,
        help="Most prompt characters and token ids logged per request; unset: nothing of what it says.",
    )


def parse_serve_args(argv: list[str], *, prog: str = "aserve serve") -> tuple[AsyncEngineArgs, ServerArgs]:
    """Reads the command line of the server: ``[MODEL] [flags]``.

    The key in ``ASERVE_API_KEY`` (or ``VLLM_API_KEY``) wins over ``--api-key``. Ends the process with
    status 2 and a message on standard error when the command line is malformed; raises ConfigError for
    server settings that cannot work. Engine settings are checked by ``create_engine_config``.
    """
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False)
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    add_flags(parser, ServerArgs)
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(**SERVE_DEFAULTS)
    namespace = parser.parse_args(argv)
    named = namespace.model_positional
    if named is not None:
        if namespace.model not in (None, named):
            parser.error(f"MODEL is {named!r} and --model {namespace.model!r}: give one of them")
        namespace.model = named
    server = ServerArgs(**from_namespace(ServerArgs, namespace))
    server.take_environment()
    server.check()
    return AsyncEngineArgs.from_cli_args(namespace), server


def serve_args_from_environment() -> tuple[AsyncEngineArgs, ServerArgs]:
    """The same from the flags in the environment variable ``ASERVE_ARGS``, quoted as in a shell."""
    try:
        argv = shlex.split(os.environ.get(ARGS_VARIABLE, ""))
    except ValueError as error:
        raise ConfigError(f"{ARGS_VARIABLE}: {error}", param=ARGS_VARIABLE) from None
    return parse_serve_args(argv, prog=ARGS_VARIABLE)
