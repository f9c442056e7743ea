"""What both sides of stillroom need. Loads neither torch nor vllm nor deepspeed."""
