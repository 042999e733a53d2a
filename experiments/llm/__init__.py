"""What compressed caches cost a language model, and what they save in bytes and seconds."""
