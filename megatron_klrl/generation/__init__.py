"""Generation: one small protocol, and vLLM behind it. The only package that imports vllm."""
