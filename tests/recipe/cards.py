"""Recipes of the kinds that model cards carry."""

CARDS = {
    # mergekit's own first example, and half the hub's.
    "ties": """
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
dtype: float16
""",
    "ties_gradients": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: mistralai/Mistral-7B-v0.1
    # No parameters necessary for base model
  - model: samir-fama/SamirGPT-v1
    parameters:
      density: 0.53
      weight: 0.4
  - model: abacusai/Slerp-CM-mist-dpo
    parameters:
      density: 0.53
      weight: 0.3
  - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.2
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "dare_ties_union": """
models:
  - model: fblgit/una-cybertron-7b-v2
    parameters: {density: 0.6, weight: 0.45}
  - model: teknium/OpenHermes-2.5-Mistral-7B
    parameters: {density: 0.4, weight: 0.35}
merge_method: dare_ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  rescale: false
  lambda: 0.9
tokenizer_source: union
dtype: bfloat16
""",
    "dare_linear": """
merge_method: dare_linear
base_model: meta-llama/Meta-Llama-3-8B
models:
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 0.6, density: 0.9}
  - model: meta-llama/Meta-Llama-3-8B-Instruct
    parameters: {weight: 0.4}
parameters:
  density: 0.35
dtype: float32
out_dtype: bfloat16
""",
    "task_arithmetic": """
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: mistralai/Mistral-7B-v0.1
  - model: stabilityai/japanese-stablelm-base-gamma-7b
  - model: WizardLM/WizardMath-7B-V1.1
    parameters: {weight: 0.8}
merge_method: task_arithmetic
parameters:
  weight: 1.0
dtype: bfloat16
""",
    "slerp": """
slices:
  - sources:
      - model: AIDC-ai-business/Marcoroni-7B-v3
        layer_range: [0, 32]
      - model: EmbeddedLLM/Mistral-7B-Merge-14-v0.1
        layer_range: [0, 32]
merge_method: slerp
base_model: AIDC-ai-business/Marcoroni-7B-v3
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "slerp_models": """
models:
  - model: Qwen/Qwen2-7B-Instruct
  - model: Qwen/Qwen2-7B
merge_method: slerp
base_model: Qwen/Qwen2-7B
parameters:
  t: [0, 1]
dtype: torch.bfloat16
""",
    "passthrough": """
slices:
  - sources:
    - model: OpenPipe/mistral-ft-optimized-1218
      layer_range: [0, 24]
  - sources:
    - model: mlabonne/NeuralHermes-2.5-Mistral-7B
      layer_range: [8, 32]
merge_method: passthrough
dtype: bfloat16
""",
    "passthrough_zeroed": """
slices:
  - sources:
      - model: meta-llama/Meta-Llama-3-8B
        layer_range: [0, 4]
  - sources:
      - model: meta-llama/Meta-Llama-3-8B
        layer_range: [3, 4]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources:
      - model: meta-llama/Meta-Llama-3-8B
        layer_range: [4, 8]
merge_method: passthrough
dtype: bfloat16
""",
    "linear": """
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
  - model: garage-bAInd/Platypus2-13B
    parameters:
      weight: 0.5
merge_method: linear
dtype: float16
""",
    "linear_slices": """
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 20]
        parameters: {weight: [1, 0]}
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 20]
        parameters: {weight: [0, 1]}
  - parameters: {normalize: false, weight: 0.5}
    sources:
      - model: WizardLM/WizardLM-13B-V1.2
        layer_range: [10, 30]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [20, 40]
        parameters:
          weight:
            - {filter: self_attn, value: 0.75}
merge_method: linear
parameters: {normalize: true}
dtype: float16
""",
    "model_stock": """
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
  - model: meta-llama/Meta-Llama-3-8B-Instruct
merge_method: model_stock
base_model: meta-llama/Meta-Llama-3-8B
dtype: bfloat16
""",
    "breadcrumbs": """
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters: {weight: 0.5, density: 0.9, gamma: 0.02}
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 0.5, density: 0.7}
merge_method: breadcrumbs
base_model: meta-llama/Meta-Llama-3-8B
parameters: {normalize: true}
dtype: bfloat16
""",
    "breadcrumbs_ties": """
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters:
      weight: [0.5, 0.25, 0.5]
      density: [0.9, 0.85, 0.9]
      gamma: 0.01
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters:
      weight: 0.4
      density: 0.9
      gamma: 0.05
merge_method: breadcrumbs_ties
base_model: meta-llama/Meta-Llama-3-8B
parameters:
  int8_mask: true
  rescale: true
dtype: bfloat16
""",
    "della": """
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters: {weight: 0.6, density: 0.55, epsilon: 0.1}
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 0.4, density: 0.45}
merge_method: della
base_model: meta-llama/Meta-Llama-3-8B
parameters: {lambda: 1.1}
dtype: bfloat16
""",
    "della_linear": """
merge_method: della_linear
base_model: meta-llama/Meta-Llama-3-8B
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters: {weight: [0.1, 0.3], density: 0.5, epsilon: "1e-1"}
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 0.4, density: [0.4, 0.6]}
parameters: {normalize: off, rescale: "no"}
""",
    "nuslerp": """
merge_method: nuslerp
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters:
      weight:
        - {filter: mlp, value: [1, 2]}
        - value: 1
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 2}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
tokenizer: {source: union}
""",
    "multislerp": """
merge_method: multislerp
base_model: meta-llama/Meta-Llama-3-8B
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
    parameters: {weight: 0.4}
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
    parameters: {weight: 0.3}
  - model: meta-llama/Meta-Llama-3-8B-Instruct
    parameters: {weight: 0.3}
""",
    "karcher": """
merge_method: karcher
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
parameters: {max_iter: 1000, tol: 1e-9}
dtype: bfloat16
""",
    "nearswap": """
merge_method: nearswap
base_model: Sao10K/L3-8B-Stheno-v3.2
models:
  - model: Sao10K/L3-8B-Stheno-v3.2
  - model: NousResearch/Hermes-2-Pro-Llama-3-8B
parameters:
  t: 0.0001
dtype: bfloat16
""",
    "arcee_fusion": """
merge_method: arcee_fusion
base_model: Qwen/Qwen2-7B
models:
  - model: Qwen/Qwen2-7B
  - model: Qwen/Qwen2-7B-Instruct
out_dtype: bfloat16
""",
    "sce": """
merge_method: sce
base_model: Qwen/Qwen2-7B
models:
  - model: Qwen/Qwen2-7B-Instruct
  - model: arcee-ai/Arcee-Spark
parameters: {select_topk: 0.8}
dtype: bfloat16
""",
    "ram": """
merge_method: ram
base_model: Qwen/Qwen2-7B
models:
  - model: Qwen/Qwen2-7B-Instruct
  - model: arcee-ai/Arcee-Spark
""",
    "ramplus": """
merge_method: ramplus_tl
base_model: Qwen/Qwen2-7B
models:
  - model: Qwen/Qwen2-7B-Instruct
  - model: arcee-ai/Arcee-Spark
parameters: {r: 0.3, alpha: 0.1}
""",
    "modules": """
merge_method: ties
base_model: Qwen/Qwen2-7B
modules:
  default:
    parameters: {density: 0.25, lambda: 0.7}
    models:
      - model: Qwen/Qwen2-7B-Instruct
        parameters: {weight: 1}
      - model: arcee-ai/Arcee-Spark
        parameters: {weight: 1, density: 0.75}
parameters: {density: 0.1, normalize: false}
""",
    "tokens": """
merge_method: linear
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: mistralai/Mistral-7B-v0.1
    parameters: {weight: 0.5}
  - model: teknium/OpenHermes-2.5-Mistral-7B
    parameters: {weight: 0.5}
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>:
      source: teknium/OpenHermes-2.5-Mistral-7B
    <|im_end|>:
      source: teknium/OpenHermes-2.5-Mistral-7B
      force: true
    <|pad|>:
      source: {kind: zero}
    <|user|>:
      source:
        kind: model_token
        model: mistralai/Mistral-7B-v0.1
        token: "[INST]"
chat_template: chatml
dtype: bfloat16
""",
}

DEEP = ("13b", "13B")


def layers_of(model: str) -> int:
    """How many layers the models of the recipes have, by their names."""
    if any(size in model for size in DEEP):
        return 40
    return 28 if "Qwen" in model or "Arcee" in model else 32
