"""The sections of a run file. Names equal Megatron-Core's wherever the meaning is equal.

Invariant: unknown keys are errors, and every default is a value that somebody would want to train with.
Units are in the names (`_tokens`, `_s`, `_bytes`) or in the description.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LayerType = Literal["full", "sliding"]
Fp32Island = Literal["residual", "norm", "qk_norm", "router", "loss"]
RecomputeModule = Literal["layernorm", "core_attn", "experts", "moe"]


class Section(BaseModel):
    """Base of every section: no unknown keys, no silent type changes, defaults are validated too."""

    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    """The architecture. Defaults are those of the released ZAYA1-8B."""

    num_layers: PositiveInt = 40
    """Layer pairs: one CCA attention and one mixture-of-experts each."""
    hidden_size: PositiveInt = 2048
    num_attention_heads: PositiveInt = 8
    """Query heads in the compressed space."""
    num_query_groups: PositiveInt = 2
    """Key-value heads."""
    kv_channels: PositiveInt = 128
    """Width of a head."""
    num_moe_experts: PositiveInt = 16
    """Experts with parameters; the router has one class more, the skip class."""
    moe_ffn_hidden_size: PositiveInt = 2048
    """Inner width of a SwiGLU expert."""
    router_hidden_size: PositiveInt = 256
    vocab_size: PositiveInt = 262_272
    """Rows of the embedding; may exceed the tokenizer's vocabulary (padding for alignment)."""
    share_embeddings_and_output_weights: bool = True
    max_position_embeddings: PositiveInt = 131_072
    layernorm_epsilon: PositiveFloat = 1e-5
    cca_time0: PositiveInt = 2
    """Taps of the depthwise causal convolution over time."""
    cca_time1: PositiveInt = 2
    """Taps of the causal convolution over time that mixes the channels of one head."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Part of each head that carries a rotary position."""
    rotary_base: PositiveFloat = 5_000_000.0
    """RoPE base of the layers with full attention."""
    sliding_rotary_base: PositiveFloat = 10_000.0
    """RoPE base of the layers with sliding-window attention."""
    sliding_window: PositiveInt | None = None
    """Tokens that a sliding layer sees, the current one included."""
    layer_types: list[LayerType] | None = None
    """One entry a layer; all "full" when not given."""
    skip_expert: Literal["zero", "scaled_identity"] = "zero"
    """What the skip class contributes: nothing (transformers), or probability times its normed input."""
    skip_expert_bias: float = -1.0
    """Start value of the skip class's balancing bias."""
    attention_temperature_init: PositiveFloat = 1.0
    """Start value of the key temperature; zero (the inference default elsewhere) would silence every key."""
    init_method_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}: each key-value head serves equally many"
            )
        if (self.num_query_groups * self.kv_channels) % 2:
            raise ValueError(
                f"num_query_groups * kv_channels = {self.num_query_groups * self.kv_channels} must be even: "
                "half of the value width comes from the previous token"
            )
        rotated = self.kv_channels * self.rotary_percent
        if rotated != int(rotated) or int(rotated) % 2:
            raise ValueError(f"kv_channels * rotary_percent = {rotated:g} must be an even number of rotated channels")
        types = self.layer_types
        if types is not None and len(types) != self.num_layers:
            raise ValueError(f"layer_types has {len(types)} entries for num_layers={self.num_layers}")
        if types is not None and "sliding" in types and self.sliding_window is None:
            raise ValueError("layer_types names a sliding layer, but sliding_window is not set")
        return self


class ParallelConfig(Section):
    """How the model is spread over ranks. The data-parallel size is what the world leaves."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """Stages per rank, for the interleaved schedule."""
    pipeline_model_parallel_layout: list[PositiveInt] | None = None
    """Layers of each (virtual) stage, in the order a token passes them; None spreads them evenly."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence."""
    cp_comm_type: Literal["all_gather", "p2p"] = "all_gather"
    """How attention gets the keys and values of the other context-parallel ranks: all at once, or around a ring."""
    expert_model_parallel_size: PositiveInt = 1
    expert_tensor_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    """Split the sequence over tensor-parallel ranks outside attention; needed with tensor parallelism."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Activations that the backward pass computes again: parts of each layer, whole layers, or none."""
    recompute_modules: list[RecomputeModule] = Field(default=["core_attn"])
    """With "selective": layernorm, core_attn (between the projections of attention), experts (their inner
    activations) and moe (router, dispatch and experts)."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With "full": keep the input of every `recompute_num_layers` layers, or run again only so many of each stage."""
    recompute_num_layers: PositiveInt = 1
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    grad_reduce_in_fp32: bool = True
    ddp_bucket_size: PositiveInt | None = None
    """Elements of a gradient bucket; None leaves the choice to Megatron-Core."""


class OptimizerConfig(Section):
    """AdamW or Muon with AdamW, and the balancing of the experts. `zaya optimizer table` shows which goes where."""

    optimizer: Literal["adam", "muon"] = "adam"
    """"adam" is AdamW for every parameter; "muon" is Muon for hidden matrices and AdamW for the rest."""
    lr: PositiveFloat = 6e-4
    min_lr: NonNegativeFloat = 2e-4
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: PositiveFloat = 1e-8
    muon_momentum: Fraction = 0.95
    muon_use_nesterov: bool = True
    muon_num_ns_steps: PositiveInt = 5
    """Newton-Schulz iterations."""
    muon_newton_schulz_dtype: Literal["bf16", "fp32"] = "bf16"
    """Type in which matrices travel and are orthogonalised; momentum and masters are fp32."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    moe_router_bias_update_rate: NonNegativeFloat = 1e-3
    """Step size of the balancing biases, in units of probability; 0 freezes them."""
    moe_router_bias_update_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Whose load the biases follow: one update per step, or one for each micro-batch of the step."""
    skip_expert_target: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the tokens that should skip; None means as much as each expert gets."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}")
        return self


class ScheduleConfig(Section):
    """Batch sizes, length of the run, learning-rate curve and evaluation."""

    train_iters: PositiveInt = 1000
    global_batch_size: PositiveInt = 8
    """Sequences per optimizer step over all ranks."""
    rampup_batch_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)] | None = None
    """[start, increment, samples]: the global batch grows from start by equal increments over that many samples."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass on one rank."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "cosine"
    lr_warmup_iters: NonNegativeInt = 0
    lr_decay_iters: PositiveInt | None = None
    """Iterations until min_lr; None means train_iters."""
    eval_interval: NonNegativeInt = 0
    """Iterations between evaluations on held-out text; 0 evaluates never."""
    eval_iters: PositiveInt = 8
    """Global batches per evaluation."""
    nan_policy: Literal["stop", "skip"] = "stop"
    """A loss that is not finite ends the run (a supervised one goes on from its last checkpoint), or costs the step."""
    nan_limit: PositiveInt = 3
    """With "skip": consecutive steps that may be left out before the run ends after all."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        decay = self.lr_decay_iters or self.train_iters
        if self.lr_warmup_iters >= decay:
            raise ValueError(
                f"lr_warmup_iters={self.lr_warmup_iters} must be below the decay length {decay} "
                "(lr_decay_iters, or train_iters)"
            )
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            if start > self.global_batch_size or (self.global_batch_size - start) % increment:
                raise ValueError(
                    f"rampup_batch_size={self.rampup_batch_size} does not lead to global_batch_size="
                    f"{self.global_batch_size}: their difference must be a multiple of the increment"
                )
        return self

    def batch_size_at(self, consumed_samples: int) -> int:
        """Return the global batch size of the step that starts after ``consumed_samples``."""
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        sizes = (self.global_batch_size - start) // increment + 1
        return min(start + consumed_samples * sizes // samples * increment, self.global_batch_size)

    def _ramp(self, iterations: float, samples: float) -> tuple[int, int]:
        """Return (iterations, samples) at the end of the ramp, or where one of the limits is reached first."""
        done, consumed = 0, 0
        while (
            done < iterations and consumed < samples and (size := self.batch_size_at(consumed)) < self.global_batch_size
        ):
            done, consumed = done + 1, consumed + size
        return done, consumed

    @property
    def train_samples(self) -> int:
        """Samples of the whole run."""
        done, consumed = self._ramp(self.train_iters, math.inf)
        return consumed + (self.train_iters - done) * self.global_batch_size

    def iterations_for(self, samples: int) -> int:
        """Return the number of iterations that consume at least ``samples``."""
        done, consumed = self._ramp(math.inf, samples)
        return done + max(0, -(-(samples - consumed) // self.global_batch_size))


class DataConfig(Section):
    """Tokenised text in Megatron's .bin/.idx format (`zaya data prepare` makes it)."""

    data_path: list[str] = Field(default_factory=list)
    """Prefixes of .bin/.idx pairs, or alternating weight and prefix for a blend."""
    split: str = "969,30,1"
    """Relative sizes of the train, validation and test parts."""
    seq_length: PositiveInt = 4096
    tokenizer_model: str = "byte"
    """"byte" (built in), or a folder with a Hugging Face tokenizer.json."""
    reset_position_ids: bool = False
    """Count positions from the start of each document; goes with `reset_attention_mask`."""
    reset_attention_mask: bool = False
    """Keep the documents of a sample apart: no token sees another document, in any layer."""
    eod_mask_loss: bool = False
    """Give no loss to the token after the end of a document."""
    data_cache_path: str | None = None
    """Folder of the sample index; None keeps it beside the data."""
    num_workers: NonNegativeInt = 0
    """Loader processes per rank."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.reset_position_ids != self.reset_attention_mask:
            raise ValueError(
                f"reset_position_ids={self.reset_position_ids} and reset_attention_mask={self.reset_attention_mask}: "
                "set both, to keep documents apart, or none"
            )
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    save_interval: NonNegativeInt = 0
    """Iterations between saves; 0 saves at the end only."""
    save_at_end: bool = True
    keep_last: PositiveInt | None = None
    """Steps that stay, counted from the newest; None with `keep_every` None keeps all of them."""
    keep_every: PositiveInt | None = None
    """Steps whose iteration is a multiple of this stay as well."""
    max_host_bytes: PositiveInt | None = None
    """Cap of a rank's staging memory; None takes as much as its part of a step. Less makes saves wait for the disk."""
    local_dir: str | None = None
    """Folder on each node's own disk ({name} is replaced). Steps are written there first and copied to the run folder
    in the background; a restart completes what was not copied yet. None writes to the run folder at once."""
    commit_timeout_s: PositiveFloat = 600.0
    """How long a save waits for the slowest rank's file before it counts as failed."""
    stall_timeout_s: PositiveFloat = 300.0
    """A writer that makes no progress for so long is ended, and its save counts as failed."""
    load: str | None = None
    """Checkpoint folder to start from; missing is an error. None resumes from the run folder, if any."""
    load_iteration: NonNegativeInt | None = None
    """Iteration to load; None means the newest complete one."""
    continue_from: str | None = None
    """Folder of a run whose last checkpoint gives weights, optimizer and balancing state to the first start of this
    one, which begins its own schedule and order of samples; phases set it."""
    load_optimizer: bool = True
    """False takes the weights only and starts at iteration 0."""


class TelemetryConfig(Section):
    """What the run says about itself."""

    log_interval: PositiveInt = 1
    """Iterations between step lines."""
    live: Literal["auto", "on", "off"] = "auto"
    """Live view on the terminal; auto means only on a TTY."""
    loss_spike_threshold: NonNegativeFloat = 6.0
    """Report a loss that many deviations above the median of the last ones; 0 reports none."""
    loss_spike_window: PositiveInt = 100
    """Iterations that a loss is compared with."""
    health_interval: PositiveInt = 10
    """Iterations between reports of each layer's expert load, of memory, and of where steps wait."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one accelerator, for MFU; None takes the vendor's figure where the device is known."""
    grad_norm_groups_interval: NonNegativeInt = 0
    """Iterations between reports of the gradient norm by group of parameters; 0 reports none."""
    loss_curve: bool = True
    """Draw loss_curve.png in the run folder (needs the extra `plots`)."""
    prometheus: Literal["off", "http", "textfile"] = "off"
    """Metrics for Prometheus: an endpoint of the first rank, or a file for node_exporter's textfile collector."""
    prometheus_host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this node only, 0.0.0.0 from everywhere."""
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] = 9840
    prometheus_textfile_dir: str | None = None
    """Folder that node_exporter reads (its --collector.textfile.directory)."""
    prometheus_textfile_interval_s: PositiveFloat = 10.0
    tensorboard: bool = False
    """Write TensorBoard's event files into the run folder (needs the extra `tensorboard`)."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases, or into the run folder for `wandb sync` (needs the extra `wandb`)."""
    wandb_project: str = "zaya"
    mlflow_tracking_uri: str | None = None
    """Log to MLflow: a server, or a file as in sqlite:///mlflow.db (needs the extra `mlflow`)."""
    mlflow_experiment: str = "zaya"

    @model_validator(mode="after")
    def _check(self) -> TelemetryConfig:
        if self.prometheus == "textfile" and self.prometheus_textfile_dir is None:
            raise ValueError("prometheus=textfile needs prometheus_textfile_dir, the folder that node_exporter reads")
        return self


class RouterReplayConfig(Section):
    """The experts that tokens go to: kept, or forced. One file per step, `step_<iteration>.npy`, of integers
    [sample, layer, token]; the number of experts means skip."""

    record: str | None = None
    """Folder to write every step's choices to."""
    replay: str | None = None
    """Folder whose choices are forced on every step; probabilities and gradients stay the router's own."""

    @model_validator(mode="after")
    def _check_one(self) -> RouterReplayConfig:
        if self.record is not None and self.replay is not None:
            raise ValueError("record and replay exclude each other: a replayed run makes the choices that it was given")
        return self


class RunSection(Section):
    """Identity, place and numerics of the run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    dir: str = "runs/{name}"
    """Run folder; {name} is replaced."""
    seed: NonNegativeInt = 1234
    precision: Literal["fp32", "bf16"] = "bf16"
    """Parameter and compute type; bf16 keeps fp32 master weights, residual stream, norms and softmaxes."""
    fp32_islands: list[Fp32Island] = Field(default=["residual", "norm", "qk_norm", "router", "loss"])
    """What bf16 runs compute in fp32, all five in the released model: the residual stream, the statistics of the norms,
    the mean coupling and norm of q and k, the softmax of the router, the softmax of the loss."""
    deterministic: bool = False
    """Let torch use (and insist on) algorithms that give the same bits in every run; slower on an accelerator."""
    loss_workspace_mib: PositiveInt = 256
    """fp32 logits that exist at a time, in MiB per rank; all of them would need 4 x tokens x vocabulary bytes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library; auto is nccl (RCCL on ROCm) with an accelerator, else gloo."""
    distributed_timeout_s: PositiveInt = 600
    router_replay: RouterReplayConfig = Field(default_factory=RouterReplayConfig)


class PhaseConfig(Section):
    """One part of a run: what it changes, and for how long."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    train_tokens: PositiveInt
    """Length of the phase; rounded up to whole steps, it replaces schedule.train_iters."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """section.key: value; any setting of the run file, layout and data included."""
