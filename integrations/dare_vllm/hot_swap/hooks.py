"""What a swap depends on in vLLM."""

from dare_vllm.versions import Hook

_RELOAD = "vllm.model_executor.model_loader"

HOOKS = (
    Hook("vllm.v1.worker.worker_base:WorkerBase"),
    Hook("vllm.v1.worker.gpu_worker:Worker.update_config", ("self", "overrides")),
    Hook("vllm.v1.worker.gpu_worker:Worker.get_model", ("self",)),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights",
        ("self", "weights_iterator", "weights_path", "is_checkpoint_format"),
    ),
    Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner.reset_lora_state", ("self",)),
    Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner.reset_encoder_cache", ("self",)),
    Hook("vllm.v1.worker.gpu_model_runner:GPUModelRunner.reset_mm_cache", ("self",)),
    Hook(f"{_RELOAD}.reload:finalize_layerwise_reload", ("*args", "**kwargs")),
    Hook(
        f"{_RELOAD}.checkpoint_weight_patch:load_checkpoint_weight_patches",
        ("model", "patches", "max_chunk_bytes", "validate_unique_indices"),
    ),
    Hook(
        f"{_RELOAD}.checkpoint_weight_patch:CheckpointWeightPatch",
        ("name", "shape", "dtype", "values", "indices"),
    ),
    Hook(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe:"
        "CPUUnquantizedExperts.process_weights_after_loading",
        ("self", "layer"),
    ),
    Hook(
        "vllm.model_executor.layers.vocab_parallel_embedding:"
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        ("self", "layer"),
    ),
    Hook("vllm.v1.engine.core:EngineCore.pause_scheduler", ("self", "mode", "clear_cache")),
    Hook("vllm.v1.engine.core:EngineCoreProc._send_abort_outputs", ("self", "aborted_reqs")),
    Hook(
        "vllm.v1.core.sched.scheduler:Scheduler.finish_requests",
        ("self", "request_ids", "finished_status"),
    ),
    Hook(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("self", "method", "*args")
    ),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.pause_generation", ("self", "mode", "clear_cache")),
    Hook("vllm.v1.engine.async_llm:AsyncLLM.resume_generation", ("self",)),
    Hook(
        "vllm.v1.engine.async_llm:AsyncLLM.reset_prefix_cache",
        ("self", "reset_running_requests", "reset_connector"),
    ),
)
