"""What quantization costs in quality, and what it saves in bytes and seconds."""
