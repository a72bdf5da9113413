"""What is pointed at a model: hook-based probes that take any hooked model."""
