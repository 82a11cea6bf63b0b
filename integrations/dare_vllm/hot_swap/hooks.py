"""What a swap depends on in vLLM."""

from dare_vllm.versions import Hook

HOOKS: tuple[Hook, ...] = ()
