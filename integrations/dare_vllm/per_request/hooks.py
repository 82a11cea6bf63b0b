"""What serving adapters per request depends on in vLLM."""

from dare_vllm.versions import Hook

__all__ = ["HOOKS"]

_MANAGER = "vllm.lora.model_manager:LoRAModelManager"
_CPU = "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU"
_LAYERS = "vllm.model_executor.layers"
_LINEAR = f"{_LAYERS}.linear"
_EMBEDDING = f"{_LAYERS}.vocab_parallel_embedding"
_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"

HOOKS = (
    # Replaced: where adapters are loaded, kept and put into slots.
    Hook("vllm.lora.worker_manager:WorkerLoRAManager._load_adapter", ("self", "lora_request")),
    Hook("vllm.lora.worker_manager:WorkerLoRAManager.remove_adapter", ("self", "adapter_id")),
    Hook(f"{_MANAGER}._create_lora_modules", ("self",)),
    Hook(f"{_MANAGER}._add_adapter", ("self", "lora")),
    Hook(f"{_MANAGER}.activate_adapter", ("self", "lora_id")),
    Hook(f"{_MANAGER}._deactivate_adapter", ("self", "lora_id")),
    Hook(f"{_MANAGER}.remove_adapter", ("self", "adapter_id")),
    Hook(f"{_MANAGER}.remove_all_adapters", ("self",)),
    Hook(
        f"{_CPU}.add_lora_linear",
        (
            *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
            *("buffer", "**kwargs"),
        ),
    ),
    Hook(
        f"{_CPU}.add_lora_embedding",
        ("self", "y", "x", "lora_b_stacked", "add_inputs", "**kwargs"),
    ),
    Hook(
        f"{_CPU}.add_lora_logits",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "**kwargs"),
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        ("self", "hidden_states", "num_scheduled_tokens"),
    ),
    # Replaced: where requests come in.
    Hook("vllm.v1.engine.async_llm:AsyncLLM.add_lora", ("self", "lora_request")),
    Hook(f"{_MODELS}.load_lora_adapter", ("self", "request", "base_model_name")),
    Hook(f"{_MODELS}.resolve_lora", ("self", "lora_name")),
    Hook("vllm.v1.engine.llm_engine:LLMEngine.add_lora", ("self", "lora_request")),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        (
            *("self", "request_id", "prompt", "params", "supported_tasks", "arrival_time"),
            *("lora_request", "tokenization_kwargs", "trace_headers", "priority"),
            *("data_parallel_rank", "resumable", "session_id", "kv_hints"),
        ),
    ),
    # Called, or read.
    Hook(
        "vllm.lora.lora_model:LoRAModel.__init__",
        ("self", "lora_model_id", "rank", "loras", "is_3d_lora_weight", "modules_to_save"),
    ),
    Hook(f"{_MANAGER}._get_punica_wrapper", ("self", "module_name")),
    Hook("vllm.lora.resolver:LoRAResolver.resolve_lora", ("self", "base_model_name", "lora_name")),
    Hook("vllm.lora.utils:get_adapter_absolute_path", ("lora_path",)),
    Hook("vllm.model_executor.models.utils:WeightsMapper.get_rename_mapper", ("self",)),
    Hook("vllm.model_executor.models.utils:WeightsMapper.map_name", ("self", "key")),
    Hook("vllm.model_executor.models.utils:PPMissingLayer"),
    Hook(f"{_LINEAR}:UnquantizedLinearMethod.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_LINEAR}:RowParallelLinear.forward", ("self", "input_")),
    Hook(f"{_LINEAR}:QKVParallelLinear._get_shard_offset_mapping", ("self", "loaded_shard_id")),
    Hook(f"{_EMBEDDING}:UnquantizedEmbeddingMethod.apply", ("self", "layer", "x", "bias")),
    Hook(f"{_EMBEDDING}:UnquantizedEmbeddingMethod.embedding", ("self", "layer", "input_")),
    Hook(f"{_EMBEDDING}:VocabParallelEmbedding.forward", ("self", "input_")),
    Hook(
        f"{_LAYERS}.logits_processor:LogitsProcessor._apply_head",
        ("self", "lm_head", "hidden_states", "embedding_bias"),
    ),
    Hook(
        f"{_LAYERS}.fused_moe.routed_experts:RoutedExperts.forward_modular",
        (
            *("self", "x", "topk_weights", "topk_ids"),
            *("shared_experts", "shared_experts_input"),
        ),
    ),
    Hook("vllm.model_executor.models.transformers.base:Base"),
    Hook(
        "vllm.model_executor.models.opt:OPTLearnedPositionalEmbedding.forward",
        ("self", "positions"),
    ),
    Hook(f"{_LAYERS}.layernorm:RMSNorm.forward_native", ("self", "x", "residual")),
    Hook(f"{_LAYERS}.layernorm:GemmaRMSNorm.forward_native", ("self", "x", "residual")),
    Hook(f"{_LAYERS}.layernorm:LayerNorm.forward_native", ("self", "x")),
)
