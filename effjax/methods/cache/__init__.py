"""Methods that change what a language model keeps of the keys and values of its sequences."""
