"""What loading depends on in vLLM."""

from dare_vllm.versions import Hook

_MODULE = "vllm.model_executor.model_loader"
_VOCABULARY = "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding"

HOOKS = (
    Hook(f"{_MODULE}:register_model_loader", ("load_format",)),
    Hook(f"{_MODULE}.default_loader:DefaultModelLoader.__init__", ("self", "load_config")),
    Hook(
        f"{_MODULE}.default_loader:DefaultModelLoader.get_all_weights",
        ("self", "model_config", "model"),
    ),
    Hook(
        f"{_MODULE}.default_loader:DefaultModelLoader.load_weights",
        ("self", "model", "model_config"),
    ),
    Hook(
        f"{_MODULE}.default_loader:DefaultModelLoader._prepare_weights",
        (
            "self",
            "model_name_or_path",
            "subfolder",
            "revision",
            "fall_back_to_pt",
            "allow_patterns_overrides",
        ),
    ),
    # Replaced: vocabularies with rows that no checkpoint fills.
    Hook("vllm.engine.arg_utils:EngineArgs.create_model_config", ("self",)),
    Hook(f"{_VOCABULARY}.weight_loader", ("self", "param", "loaded_weight")),
    Hook("vllm.config.model:ModelConfig.get_model_arch_config", ("self",)),
    Hook(
        f"{_MODULE}.ep_weight_filter:should_skip_weight",
        ("weight_name", "local_expert_ids"),
    ),
)
