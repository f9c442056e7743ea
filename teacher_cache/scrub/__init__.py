"""Personal data out of prompts, completions and chains, before anything is sent or stored."""
